"""Checkpoints (Orbax) and run directories. The only file that imports orbax.

DIR/config.json        the resolved configuration
DIR/checkpoints/STEP   trainable parameters, optimizer state, step; what they were made with
Frozen weights are not copied: they come from where the configuration says, or from the seed. Their
fingerprints are kept, so that a checkpoint is never put on top of other weights.

DIR may be local or remote (gs://...).
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from orbax.checkpoint import v1 as ocp

from otreg_jax import config as config_lib
from otreg_jax import optim

DEV_LOSS = "dev_ce"  # the metric of a checkpoint by which the best one is kept
NEWEST, BEST = "newest", "best"


def open_checkpoints(workdir, keep: int = 2) -> ocp.training.Checkpointer:
    """The checkpoints of a run directory; leftovers of interrupted saves are removed.

    The newest `keep` stay, and the one with the lowest dev loss.
    """
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[DEV_LOSS], reverse=True, n=1,
        keep_checkpoints_without_metrics=False,
    )  # fmt: skip
    return ocp.training.Checkpointer(
        checkpoint_dir(workdir),
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        cleanup_tmp_directories=True,
    )


def checkpoint_dir(workdir) -> epath.Path:
    """Where the checkpoints of a run are."""
    path = epath.Path(workdir) / "checkpoints"
    return path if "://" in str(path) else path.absolute()


def save(checkpointer, state, step: int, made_of: dict, metrics: dict | None = None) -> None:
    """Saves asynchronously; returns once the state is copied from the devices, so that the next
    step may donate its buffers.

    made_of: see `provenance`. metrics: {"dev_ce": value}, if the dev set was evaluated.
    """
    # Overwrite: a step that is there already could not be read, and training came back to it.
    checkpointer.save_async(
        step, state, force=True, overwrite=True, custom_metadata=made_of, metrics=metrics
    )


def restore(
    checkpointer, abstract_state, made_of: dict | None = None, params_only: bool = False,
    which: str = NEWEST,
):  # fmt: skip
    """A checkpoint in the shardings of `abstract_state`; None if there is none.

    Of the newest, an unreadable one (truncated, say) is skipped with a warning. With `params_only`
    no more of the optimizer's state is read than an average of the weights. which: as for `choose`.

    Raises:
      ValueError: the one asked for does not exist; checkpoints exist, and none can be read; or the
        one that can was made with another tokenizer, prompt or frozen weights than `made_of`;
        every difference is listed.
    """
    if params_only:
        average = optim.averaged(None, abstract_state.opt_state)
        nothing = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract_state.opt_state)
        needed = nothing if average is None else optax.tree.set(nothing, ema=average)
        abstract_state = abstract_state._replace(opt_state=needed)
    problems = []
    for info in choose(checkpointer, which):
        try:
            stored = checkpointer.metadata(info.step).custom_metadata or {}
            state = checkpointer.load(info.step, abstract_state)
        except Exception as error:  # whatever a broken file makes the reader raise
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
            problems.append(f"step {info.step}: {reason}")
            next_one = ", trying the one before" if which == NEWEST else ""
            logging.warning(
                "the checkpoint of step %d cannot be read%s: %s", info.step, next_one, reason
            )
            continue
        different = _differences(stored, made_of or {})
        if different:
            raise ValueError(
                f"{checkpointer.directory}/{info.step} does not fit what this run has loaded:\n  "
                + "\n  ".join(different)
                + "\nbring back what it was trained with, or use another --workdir"
            )
        return state
    if problems:
        raise ValueError(
            f"{checkpointer.directory}: no checkpoint can be read:\n  " + "\n  ".join(problems)
        )
    return None


def choose(checkpointer, which: str) -> list:
    """The checkpoints to try, one after the other.

    which: "newest" (all, from the newest on), "best" (the lowest dev loss), or a step.

    Raises:
      ValueError: there is no such checkpoint; the message says which there are.
    """
    found = list(reversed(checkpointer.checkpoints))
    if which == NEWEST or not found:
        return found
    if which == BEST:
        scored = [info for info in found if DEV_LOSS in (info.metrics or {})]
        chosen = [min(scored, key=lambda info: info.metrics[DEV_LOSS])] if scored else []
        hint = "; none has a dev loss, which training with eval_every gives them"
    else:
        chosen = [info for info in found if str(info.step) == which]
        hint = ""
    if not chosen:
        steps = ", ".join(str(info.step) for info in reversed(found))
        raise ValueError(
            f"{checkpointer.directory}: no checkpoint {which!r}: choose {NEWEST}, {BEST} or one of "
            f"the steps {steps}{hint}"
        )
    return chosen


def provenance(config, tokenizer, frozen) -> dict:
    """What a checkpoint is only valid with: {"tokenizer", "prompt", "frozen": {path: fingerprint}}.

    Of the frozen weights those that files gave; what the seed gives follows from config.json, and
    its last bits from the kind of device.
    """
    from_files = {
        "encoder": bool(config.encoder.path),
        "llm": bool(config.llm.path or config.llm.pretrain.num_steps),
    }
    loaded = {part: frozen[part] for part in frozen if from_files.get(part)}
    # How int8 rounds may depend on the device as well; the columns' maxima do not, and tell.
    exact = {path: x for path, x in optim.flat_paths(loaded).items() if x.dtype != jnp.int8}
    return {
        "tokenizer": tokenizer.fingerprint,
        "prompt": config.prompt,
        "frozen": fingerprints(exact),
    }


def fingerprints(params) -> dict[str, str]:
    """{"llm/embed/embedding": "bfloat16[8,4] 1a2b3c4d", ...}: dtype, shape and, modulo 2**32, the
    sum over all elements of their mixed bits times 2 * index + 1.

    Integers add up to the same in any order, so the sum is the same on any devices; a change of one
    element always changes it, since odd numbers have inverses modulo 2**32. Mixed: as they are, one
    and the same change of every element (twice the weights) adds a multiple of 2**32.
    """

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

    flat = optim.flat_paths(params)
    sums = jax.device_get(jax.jit(lambda flat: jax.tree.map(checksum, flat))(flat))
    shape = lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return {path: f"{shape(x)} {int(sums[path]):08x}" for path, x in sorted(flat.items())}


def _differences(stored: dict, made_of: dict) -> list[str]:
    """Lines 'what: stored -> now'; what the checkpoint does not say cannot differ."""
    lines = [
        f"{key}: {stored[key]!r} -> {made_of[key]!r}"
        for key in ("tokenizer", "prompt")
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
    path = checkpoint_dir(workdir)
    return path.exists() and any(p.name.isdigit() for p in path.iterdir())


def check_workdir(workdir, config) -> None:
    """Refuses a run directory that holds checkpoints of another configuration.

    Raises:
      ValueError: naming every key that differs and may not.
    """
    path = epath.Path(workdir) / "config.json"
    if not (path.exists() and exists(workdir)):
        return
    different = config_lib.differences(config_lib.load(path), config)
    if different:
        raise ValueError(
            f"{workdir} holds checkpoints of another configuration (stored -> now):\n  "
            + "\n  ".join(different)
            + "\nuse another --workdir, or remove this one"
        )
