"""Checkpoints (Orbax) and run directories. The only file that imports orbax.

A checkpoint holds trainable parameters, optimizer state, step, what they were made with, and a
fingerprint of every array. Frozen weights are not copied: they come from where the configuration
says, or from the seed. Their fingerprints are kept, so that a checkpoint is never put on top of
other weights.

DIR may be local or remote (gs://...).
"""

import functools
import json
import logging
import sys
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from orbax.checkpoint import v1 as ocp

from otreg_jax import cluster, optim, rundir
from otreg_jax.data import prompts

DEV_LOSS = "dev_ce"  # the metric of a checkpoint by which the best one is kept
NEWEST, BEST = "newest", "best"


class Checkpoints:
    """Saves checkpoints to a run directory and decides which stay.

    Kept are the newest `keep`, the one with the lowest dev loss, and every one whose step is a
    multiple of `keep_every` (0: none). Leftovers of interrupted saves are removed. A save that
    fails (the disk is full, say) is reported, and the next one goes ahead.

    As a context manager it waits at the end for the save under way.
    """

    def __init__(self, workdir, keep: int = 2, keep_every: int = 0):
        self.path = rundir.of(workdir).checkpoints
        self.failure = ""  # of the last save
        self._saving: int | None = None  # the step of the save under way
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[DEV_LOSS],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        durable = [policies.EveryNSteps(keep_every)] if keep_every else []
        self._kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best, *durable])
        self._open()

    def _open(self) -> None:
        self._orbax = ocp.training.Checkpointer(
            self.path,
            preservation_policy=self._kept,
            step_name_format=_Steps(),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(after_error=kind is not None)

    def save(self, state, step: int, made_of: dict, metrics: dict | None = None) -> None:
        """Saves asynchronously; returns once the state is copied from the devices, so that the next
        step may donate its buffers. `look` and the next call tell whether it succeeded.

        made_of: see `provenance`. metrics: {"dev_ce": value}, if the dev set was evaluated.
        """
        about = _sealed(made_of | {"state": fingerprints(state)}, metrics)
        self._settle()
        if self.failure:  # opened anew, it removes what the failed save left
            self._orbax.close()
            self._open()
        try:
            # Overwrite: a step that is there already could not be read, and training came back.
            self._orbax.save_async(
                step, state, force=True, overwrite=True, custom_metadata=about, metrics=metrics
            )
            self._saving = step
        except Exception as error:  # whatever a file system makes the writer raise
            self._failed(step, error)

    def look(self) -> None:
        """Says so, once, if the save under way has failed; does not wait for it."""
        if self._saving is not None and not self._orbax.is_saving_in_progress():
            self._settle()

    def close(self, after_error: bool = False) -> None:
        """Waits for the save under way.

        Raises:
          OSError: the last save failed; not `after_error`, which is what should be heard of.
        """
        self._settle()
        self._orbax.close()
        if self.failure and not after_error:
            raise OSError(f"{self.failure}; make room, and start the run again to go on")

    def _settle(self) -> None:
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._orbax.wait()
            self.failure = ""
        except Exception as error:  # as above
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        self.failure = f"the checkpoint {self.path}/{step} could not be saved: {_reason(error)}"
        logging.error("%s. Training goes on; the next one is saved when it is due", self.failure)


class _Steps:
    """Orbax's way to find checkpoints, without those whose description is damaged."""

    def __init__(self):
        self._all = orbax.checkpoint.path.step.standard_name_format()
        self.build_name, self.find_step = self._all.build_name, self._all.find_step
        self.damaged: dict[int, str] = {}  # why

    def find_all(self, path):
        for found in self._all.find_all(path):
            try:
                if found.commit_timestamp_nsecs is None:
                    raise ValueError("its description is missing, or not JSON")
                found.commit_timestamp  # noqa: B018 (whether it is a date)
                metrics = found.path / "metrics" / "metrics"
                if metrics.exists():
                    json.loads(metrics.read_text())
                yield found
            except Exception as error:  # whatever damaged JSON makes Orbax raise
                self.damaged[found.step] = _reason(error)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]


def restore(
    workdir,
    abstract_state,
    made_of: dict | None = None,
    any_corpus: bool = False,
    params_only: bool = False,
    which: str = NEWEST,
):
    """A checkpoint in the shardings of `abstract_state`; None if there is none.

    Every array must have the fingerprint that it was saved with (older checkpoints have none). Of
    the newest, an unreadable or damaged one is skipped with a warning. With `params_only` the
    optimizer's state is not read; where it holds an average of the weights, that is read alone.
    which: as for `choose`. any_corpus: the corpora are not compared.

    All processes restore the same one, or none: they try those that process 0 finds.

    Raises:
      ValueError: the one asked for does not exist; checkpoints exist, and none can be read; or the
        one that can was made with another tokenizer, prompt, corpus or frozen weights than
        `made_of`; every difference is listed.
      SystemExit: with cluster.RESTART, if only some processes can read it.
    """
    path = rundir.of(workdir).checkpoints
    if not cluster.gather(exists(workdir))[0]:
        return None
    if params_only:
        average = optim.averaged(None, abstract_state.opt_state)
        nothing = lambda tree: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
        abstract_state = abstract_state._replace(opt_state=nothing(abstract_state.opt_state))
        if average is not None:
            abstract_state = abstract_state._replace(
                params=nothing(abstract_state.params),
                opt_state=optax.tree.set(abstract_state.opt_state, ema=average),
            )
    _hush()
    problems, steps = [], _Steps()
    with ocp.training.Checkpointer(path, step_name_format=steps) as orbax:
        found = {info.step: info.metrics or {} for info in orbax.checkpoints}
        chosen = choose(path, found | dict.fromkeys(steps.damaged, {}), which)
        for step in cluster.gather(chosen)[0]:  # as process 0 sees them
            state, about, problem = _read(orbax, step, found.get(step), abstract_state, steps)
            if problem:
                problems.append(f"step {step}: {problem}")
                logging.warning(
                    "the checkpoint of step %d cannot be read%s: %s",
                    step,
                    ", trying the one before" if which == NEWEST else "",
                    problem,
                )
                continue
            different = _differences(about, made_of or {}, ("corpus",) if any_corpus else ())
            if different:
                raise ValueError(
                    f"{path}/{step} does not fit what this run has loaded:\n  "
                    + "\n  ".join(different)
                    + "\nbring back what it was trained with, or use another --workdir"
                )
            return state
    if problems:
        raise ValueError(f"{path}: no checkpoint can be read:\n  " + "\n  ".join(problems))
    return None


@functools.cache
def _hush() -> None:
    """Reads that are under way when one of them fails end later, in other threads, each with a
    trace that Python prints and nobody can act on: no more. What failed is raised, and said."""
    hook = sys.unraisablehook
    echoes = ("Event loop is closed", "Encountered error while reading array")
    sys.unraisablehook = lambda raised: (
        None if str(raised.exc_value).startswith(echoes) else hook(raised)
    )


def _read(orbax, step: int, metrics: dict | None, abstract_state, steps: _Steps) -> tuple:
    """(state, what it was made of, problem) of a checkpoint that all processes can read, or (None,
    None, why not) of one that none can."""
    path, state, about = f"{orbax.directory}/{step}", None, None
    problem = steps.damaged.get(step, "" if metrics is not None else "not found")
    # Orbax would wait for the others at a barrier that a process which cannot read never reaches.
    alone, me = ocp.Context(), ocp.multihost.process_index()
    alone.multiprocessing.primary_host, alone.multiprocessing.active_processes = me, {me}
    try:
        if not problem:
            about = _unsealed(orbax.metadata(step).custom_metadata or {}, metrics)
    except Exception as error:  # whatever a broken file makes the reader raise
        problem = _reason(error)
    if problem := _of_all(path, problem):
        return None, None, problem
    try:
        with alone:
            state = orbax.load(step, abstract_state)
    except Exception as error:  # likewise
        problem = _reason(error)
    if problem := _of_all(path, problem):
        return None, None, problem
    found = fingerprints(state) if "state" in about else {}
    changed = [name for name in found if found[name] != about["state"].get(name)]
    if changed:
        return None, None, f"damaged since it was saved: {', '.join(changed)}"
    return state, about, ""


def _of_all(path: str, problem: str) -> str:
    """The problem that all processes have with a checkpoint, or "".

    If only some have one, the checkpoint is good and their access to it is not: all end with
    cluster.RESTART. Some would else go on from another step, and overwrite it.
    """
    everyones = cluster.gather(problem)
    if all(everyones) or not any(everyones):
        return everyones[0]
    process = next(i for i, theirs in enumerate(everyones) if theirs)
    print(
        f"process {process} cannot read {path}, which others can: {everyones[process]}\n"
        f"Ending with status {cluster.RESTART}; start the run again to go on.",
        file=sys.stderr,
    )
    raise SystemExit(cluster.RESTART)


def choose(path, found: Mapping[int, dict], which: str) -> list[int]:
    """The steps to try, one after the other.

    Args:
      path: for messages. found: {step: metrics} of the checkpoints that are there.
      which: "newest" (all, from the newest on), "best" (the lowest dev loss), or a step.

    Raises:
      ValueError: there is no such checkpoint; the message says which there are.
    """
    if which == NEWEST or not found:
        return sorted(found, reverse=True)
    if which == BEST:
        scored = [step for step in sorted(found, reverse=True) if DEV_LOSS in found[step]]
        chosen = [min(scored, key=lambda step: found[step][DEV_LOSS])] if scored else []
        hint = "; none has a dev loss, which training with eval_every gives them"
    else:
        chosen = [step for step in found if str(step) == which]
        hint = ""
    if not chosen:
        steps = ", ".join(map(str, sorted(found)))
        raise ValueError(
            f"{path}: no checkpoint {which!r}: choose {NEWEST}, {BEST} or one of "
            f"the steps {steps}{hint}"
        )
    return chosen


def _sealed(about: dict, metrics: dict | None) -> dict:
    return about | {"seal": _seal(about, metrics)}


def _unsealed(about: dict, metrics: dict | None) -> dict:
    """What `_sealed` was given (older checkpoints were not sealed). Raises ValueError if it has
    changed since."""
    seal = about.pop("seal", None)
    if (seal or "state" in about) and seal != _seal(about, metrics):
        raise ValueError("its description is damaged")
    return about


def _seal(about: dict, metrics: dict | None) -> int:
    return zlib.crc32(json.dumps([about, metrics or {}], sort_keys=True).encode())


def provenance(config, tokenizer, frozen, corpus: str = "") -> dict:
    """What a checkpoint is only valid with: {"tokenizer", "prompt", "frozen": {path: fingerprint}},
    and, to train on, "corpus" (see `agreement.corpus`).

    Of the frozen weights those that files gave; what the seed gives follows from config.json, and
    its last bits from the kind of device.
    """
    from_files = {
        "encoder": bool(config.encoder.path),
        "adapter": bool(config.adapter.path),
        "llm": bool(config.llm.path or config.llm.pretrain.num_steps),
    }
    loaded = {part: frozen[part] for part in frozen if from_files.get(part)}
    # How int8 rounds may depend on the device as well; the columns' maxima do not, and tell.
    exact = {path: x for path, x in optim.flat_paths(loaded).items() if x.dtype != jnp.int8}
    return {
        "tokenizer": tokenizer.fingerprint,
        "prompt": prompts.described(config),
        "frozen": fingerprints(exact),
    } | ({"corpus": corpus} if corpus else {})


def fingerprints(tree) -> dict[str, str]:
    """{"llm/embed/embedding": "bfloat16[8,4] 1a2b3c4d", ...}: dtype, shape and, modulo 2**32, the
    sum over all elements of their mixed bits times 2 * index + 1.

    Integers add up to the same in any order, so the sum is the same on any devices; a change of one
    element always changes it, since odd numbers have inverses modulo 2**32. Mixed: as they are, one
    and the same change of every element (twice the weights) adds a multiple of 2**32.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    flat = {name(path): x for path, x in leaves if x is not ocp.PLACEHOLDER}
    sums = jax.device_get(_checksums(flat))
    shape = lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return {path: f"{shape(x)} {int(sums[path]):08x}" for path, x in sorted(flat.items())}


@jax.jit
def _checksums(flat: dict) -> dict:
    def mix(bits):  # one to one (Appleby's MurmurHash3, its finalizer)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        return bits ^ (bits >> 16)

    def checksum(x):
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        strides = np.cumprod([1, *x.shape[:0:-1]], dtype=np.uint64)[::-1].astype(np.uint32)
        iotas = (jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) for d in range(x.ndim))
        index = sum(i * stride for i, stride in zip(iotas, strides, strict=False))
        return jnp.sum(mix(bits) * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, flat)


def _differences(stored: dict, made_of: dict, may_differ: Sequence[str] = ()) -> list[str]:
    """Lines 'what: stored -> now'; what the checkpoint does not say cannot differ."""
    made_of = {key: x for key, x in made_of.items() if key not in may_differ}
    remedy = {"corpus": " (data.allow_change=True goes on with it)"}
    lines = [
        f"{key}: {stored[key]!r} -> {made_of[key]!r}{remedy.get(key, '')}"
        for key in ("tokenizer", "prompt", "corpus")
        if key in made_of and stored.get(key, made_of[key]) != made_of[key]
    ]
    before, now = stored.get("frozen"), made_of.get("frozen")
    if before is None or now is None:
        return lines
    return lines + [
        f"frozen {path}: {before.get(path, 'absent')} -> {now.get(path, 'absent')}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def exists(workdir) -> bool:
    """Whether a run directory holds a checkpoint, readable or not."""
    return bool(rundir.checkpoint_steps(rundir.of(workdir)))
