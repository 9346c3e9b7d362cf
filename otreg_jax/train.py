"""Trains a spoken language model.

    python -m otreg_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m otreg_jax.train --config=configs/manifest.py --workdir=runs/mine \\
        --config.data.train=train.jsonl --config.data.dev=dev.jsonl --config.otreg.weight=1

Every setting can be given as --config.KEY=VALUE: `python -m otreg_jax.config` lists them, and so
does docs/configuration.md. If the work directory holds a checkpoint of the same configuration,
training resumes from it. On SIGTERM (preemption) the run saves and exits with code 75: start it
again to go on.

The work directory may be remote (gs://...). Several processes train one run if they are started as
docs/launch.md says; they share the work directory, and process 0 alone writes to it, except for its
checkpoints, which all of them write.
"""

import functools
import io
import json
import signal
import sys
import threading
import time

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_flags

from otreg_jax import (
    build,
    checkpoint,
    cluster,
    flops,
    optim,
    preflight,
    pretrain_llm,
    pretrained,
    sharding,
)
from otreg_jax import config as config_lib
from otreg_jax import train_step as step_lib
from otreg_jax.data import features, pipeline, sets, text


def train(config, workdir) -> step_lib.TrainState:
    """Trains to `config.num_steps`, from the newest checkpoint in `workdir` if there is one.

    Writes config.json, tokenizer files, metrics.jsonl, TensorBoard events and checkpoints.

    Returns:
      The final state; its step is below `num_steps` if the run was told to stop (SIGTERM).

    Raises:
      ValueError, FileNotFoundError: the configuration, the data or the work directory is unusable.
      FloatingPointError: `max_bad_steps` steps in a row were not finite.
    """
    preflight.check(config)
    mesh = sharding.make_mesh(config)
    share = cluster.batch_share(mesh)
    workdir = epath.Path(workdir)
    stored = preflight.stored_config(workdir, config)
    check_remote(workdir, config)
    preflight.check_model(config, mesh)
    workdir.mkdir(parents=True, exist_ok=True)

    # ---- data, tokenizer, model ------------------------------------------------------------------
    process = jax.process_index()
    skipped_path = str(workdir / (f"skipped-{process}.jsonl" if process else "skipped.jsonl"))
    with cluster.process_0_first():
        utterances = sets.load_train(config, workdir, None if process else skipped_path)
        dev = sets.load_dev(config, workdir) if config.eval_every else []
        tokenizer = make_tokenizer(config, workdir, utterances)
        texts = [u.text for u in utterances]
        report = text.check_transcripts(tokenizer, texts, config.tokenizer.max_unknown)
        llm_dir = prepare_llm(config, workdir, tokenizer, utterances)
    slm, params = build.build(config, tokenizer, llm_dir, mesh)
    if process == 0:
        print(*report, sep="\n")
        config_lib.save(config, workdir / "config.json")
        description = json.dumps(sets.describe(utterances), indent=2)
        (workdir / sets.DESCRIPTION).write_text(description + "\n")

    # ---- state, sharded over the mesh ------------------------------------------------------------
    params, frozen = build.split(params, config)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    optimizer = optim.make_optimizer(config)
    abstract_state = step_lib.abstract_state(params, optimizer, mesh)
    state_sharding = jax.tree.map(lambda x: x.sharding, abstract_state)
    made_of = checkpoint.provenance(config, tokenizer, frozen)
    state = checkpoint.restore(workdir, abstract_state, made_of)
    if state is None:
        init = functools.partial(step_lib.init_state, optimizer=optimizer)
        state = jax.jit(init, out_shardings=state_sharding)(params)
    start = int(state.step)

    step_fn = step_lib.make_step(slm, config, optimizer, abstract_state)
    plain = build.plain(slm)
    plain_step = step_fn  # whose trace is there already
    if plain != slm:
        plain_step = step_lib.make_step(plain, config, optimizer, abstract_state)
    flops_of = flops.of_batches(plain_step, abstract_state, frozen)
    eval_fn = step_lib.make_eval_step(slm)
    if process == 0:
        print(build.parameter_table(abstract_state.params, frozen))
        print(
            f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s); "
            + (f"resuming at step {start}" if start else "starting at step 0")
        )
        if stored and start:
            print(*preflight.resume_notes(stored, config, start), sep="\n")
    del params

    # ---- the loop --------------------------------------------------------------------------------
    batches = pipeline.train_batches(
        utterances, tokenizer, config.data, batch_size=config.batch_size,
        seed=config.seed, num_steps=config.num_steps, start_step=start,
        host_index=share[0], host_count=share[1], skipped_path=skipped_path,
    )  # fmt: skip
    watch = cluster.Watch(config.stall_seconds, *time_before(workdir, start))
    writer = MetricsWriter(
        workdir, start, config.log_every, optim.learning_rate(config), watch, share[1]
    )
    told_to_stop, stop_listening = listen_for_preemption()
    profile_start, profile_stop = config_lib.profile_window(config)
    pending, shapes, compiled, tracing = None, set(), False, False
    checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints, config.keep_every)
    progress = tqdm.tqdm(
        zip(range(start, config.num_steps), batches, strict=False), initial=start,
        total=config.num_steps, desc="training", unit="step", mininterval=1.0,
    )  # fmt: skip
    try:
        for step, batch in progress:
            if profile_start <= step < profile_stop and not tracing:
                jax.profiler.start_trace(workdir / "profile")
                tracing = True
            placed = sharding.to_global(batch, mesh)
            state, metrics = step_fn(state, frozen, placed)
            # Metrics of the step before are ready now: reading them does not stall the device.
            if pending:
                read_metrics(*pending, writer, progress, utterances, config)
            pending = (step + 1, metrics, batch, flops_of(placed))
            # The step after a compilation waits for that of the other processes.
            waited, compiled = compiled, batch["tokens"].shape not in shapes
            shapes.add(batch["tokens"].shape)
            watch.lap("compilation" if compiled or waited else "step", step + 1)
            if tracing and step + 1 == profile_stop:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False
            checkpoints.look()
            stop = told_to_stop(step)
            dev_metrics = None
            if dev and not stop and is_due(step + 1, config.eval_every, config):
                weights = optim.averaged(state.params, state.opt_state)
                loss = dev_loss(eval_fn, weights, frozen, dev, tokenizer, config, mesh, share)
                dev_metrics = {"dev_ce": loss}
                writer.evaluated(step + 1, dev_metrics)
                watch.lap("evaluation", step + 1)
            if stop or is_due(step + 1, config.checkpoint_every, config):
                checkpoints.save(state, step + 1, made_of, dev_metrics)
                writer.publish()
                watch.lap("checkpoint", step + 1)
            if stop:
                progress.write(f"told to stop: saving step {step + 1}; start again to resume")
                break
        if pending:
            read_metrics(*pending, writer, progress, utterances, config)
    finally:
        if tracing:
            jax.profiler.stop_trace()
        failed = sys.exc_info()[0] is not None
        try:
            # Waits for the save under way; after an error other processes would not come to finish
            # theirs.
            if jax.process_count() == 1 or not failed:
                checkpoints.close(after_error=failed)
        finally:
            watch.close()
            writer.close()
            progress.close()
            stop_listening()
    return state


def is_due(step: int, every: int, config) -> bool:
    """Whether something that happens each `every` steps, and at the end, happens after `step`."""
    return step % every == 0 or step == config.num_steps


def listen_for_preemption():
    """Two functions: of the step, whether the run must stop now, as preempted machines are told by
    SIGTERM (several hosts agree on the step); and one that ends the listening."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point, lambda: None
    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        return lambda step: False, lambda: None
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    return lambda step: told.is_set(), lambda: signal.signal(signal.SIGTERM, before)


def check_remote(workdir, config) -> None:
    """Raises ValueError if the run would make in a remote workdir what needs a local disk."""
    if "://" not in str(workdir):
        return
    problems = []
    if sets.is_spoken(config) and not config.data.cache:
        problems.append("set data.cache to a local directory for the synthetic speech")
    if config.llm.pretrain.num_steps and not config.llm.path:
        problems.append("pretrain the LLM in a local run and set llm.path to its WORKDIR/llm")
    if problems:
        raise ValueError(f"{workdir} is remote:\n  " + "\n  ".join(problems))


def make_tokenizer(config, workdir, utterances) -> text.Tokenizer:
    """The run's tokenizer, a copy of it in `workdir`: that of `tokenizer.path` or `llm.path`, else
    one trained on the transcripts; a run that resumes, and every process but the first, takes what
    is there."""
    if checkpoint.exists(workdir) or jax.process_index():
        return text.load_tokenizer(workdir)
    path = config.tokenizer.path
    if config.llm.path and not path:
        path = pretrained.resolve(config.llm.path, config.llm.revision or None)
    if path:
        tokenizer = text.load_tokenizer(path)
        text.save_tokenizer(workdir, tokenizer)
        return tokenizer
    return text.train_sentencepiece(
        [u.text for u in utterances], workdir / "tokenizer", config.tokenizer.vocab_size,
        model_type=config.tokenizer.model_type,
    )  # fmt: skip


def prepare_llm(config, workdir, tokenizer, utterances) -> str:
    """Path of the LLM ("" builds one from scratch); pretrains it on text first if asked to."""
    path = build.llm_path(config, workdir)
    if path and not config.llm.path:
        sentences = [u.text for u in utterances]
        if sets.is_spoken(config):
            sentences = sets.text_corpus(config.synthetic, config.llm.pretrain.num_sentences)
        pretrain_llm.ensure_llm(config, tokenizer, sentences, path)
    return path


def dev_loss(eval_fn, params, frozen, utterances, tokenizer, config, mesh, share) -> float:
    """Mean cross-entropy a token over the utterances (nats); unreadable audio is left out."""
    data_config = pipeline.for_evaluation(config.data, num_workers=0)
    batches = pipeline.eval_batches(
        utterances, tokenizer, data_config, batch_size=config.batch_size,
        host_index=share[0], host_count=share[1],
    )  # fmt: skip
    sums = [eval_fn(params, frozen, sharding.to_global(batch, mesh)) for batch in batches]
    total, num_tokens = np.sum(jax.device_get(sums), axis=0)
    return float(total / num_tokens)


def read_metrics(step, metrics, batch, step_flops, writer, progress, utterances, config) -> None:
    """Logs the metrics of a finished step; names the utterances of a non-finite one.

    Raises:
      FloatingPointError: after `max_bad_steps` non-finite steps in a row.
    """
    metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
    bad_steps = int(metrics.pop("bad_steps"))
    if bad_steps:
        index = multihost_utils.process_allgather(batch["index"])
        ids = [utterances[i].id for i in np.unique(index) if i >= 0]
        progress.write(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: skipped. "
            f"Its utterances: {', '.join(ids)}"
        )
        writer.skipped(step, metrics, ids)
        if bad_steps >= config.max_bad_steps:
            raise FloatingPointError(
                f"{bad_steps} steps in a row had a non-finite loss or gradient, the last one step "
                f"{step}; lower optim.learning_rate, look at the utterances named above, or run "
                "with JAX_DEBUG_NANS=1 to find the operation"
            )
    logged = writer.step(step, metrics, batch, step_flops)
    if logged:
        shown = ("loss", "ce", "otreg", "ctc")
        progress.set_postfix({key: f"{logged[key]:.3f}" for key in shown if key in logged})


class MetricsWriter:
    """metrics.jsonl and TensorBoard events of process 0; one line each `log_every` steps, every
    value the mean over these steps. Lines after the resumed step are dropped.

    Remote files cannot be appended to: on a remote workdir metrics.jsonl is written whole with each
    checkpoint, and there are no TensorBoard events.
    """

    def __init__(self, workdir, start: int, log_every: int, learning_rate, watch, num_shares: int):
        self.log_every, self.learning_rate = log_every, learning_rate
        self.watch, self.num_shares = watch, num_shares
        self.is_writer = jax.process_index() == 0
        self.window, self.count = [], {"audio": 0.0, "tokens": 0, "flops": 0}
        chip = flops.chip(jax.devices()[0])
        self.peak_flops = chip.flops * jax.device_count() if chip else None
        self.time = None  # the first window starts after the first step: compilation is no speed
        if not self.is_writer:
            return
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(workdir) if line["step"] <= start] if start else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        is_remote = "://" in str(workdir)
        self.file = io.StringIO(self.path.read_text()) if is_remote else open(self.path, "a")
        self.file.seek(0, io.SEEK_END)
        self.board = None
        if not is_remote:
            self.board = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)

    def step(self, step: int, metrics: dict, batch, step_flops: int) -> dict | None:
        """Adds a step; returns the line if one was written."""
        self.window.append(metrics)
        self.count["audio"] += audio_seconds(batch) * self.num_shares
        self.count["tokens"] += int(batch["token_length"].sum()) * self.num_shares
        self.count["flops"] += step_flops
        if self.time is None:
            self.time, self.timed = time.perf_counter(), -len(self.window)
            self.count = dict.fromkeys(self.count, 0)
        if step % self.log_every:
            return None
        line = {key: float(np.mean([m[key] for m in self.window])) for key in metrics}
        line["learning_rate"] = float(self.learning_rate(step - 1))
        elapsed = time.perf_counter() - self.time
        steps = len(self.window) + self.timed
        if steps > 0:
            line["steps_per_sec"] = steps / elapsed
            line["audio_sec_per_sec"] = self.count["audio"] / elapsed
            line["tokens_per_sec"] = self.count["tokens"] / elapsed
            line["flops_per_sec"] = self.count["flops"] / elapsed
            if self.peak_flops:
                line["mfu"] = line["flops_per_sec"] / self.peak_flops
        self.window, self.timed = [], 0
        self.count = dict.fromkeys(self.count, 0)
        self.time = time.perf_counter()
        self._write({"step": step, **line, **self.watch.times()})
        return line

    def evaluated(self, step: int, metrics: dict) -> None:
        """Records an evaluation after `step`, in a line of its own."""
        self._write({"step": step, **metrics})

    def skipped(self, step: int, metrics: dict, ids: list[str]) -> None:
        """Records a skipped step at once."""
        self._write({"step": step, "skipped": ids, **metrics})

    def _write(self, line: dict) -> None:
        if not self.is_writer:
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key, value in line.items():
            if self.board and isinstance(value, float):
                self.board.add_scalar(key, value, line["step"])

    def publish(self) -> None:
        """Writes the lines to where they belong, if that is remote."""
        if self.is_writer and isinstance(self.file, io.StringIO):
            self.path.write_text(self.file.getvalue())

    def close(self) -> None:
        if self.is_writer:
            self.publish()
            self.file.close()
            if self.board:
                self.board.close()


def read_lines(workdir) -> list[dict]:
    """The lines of metrics.jsonl, without one that was being written when the run was killed."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def time_before(workdir, start: int) -> tuple[float, float | None]:
    """(seconds that led to the resumed step `start`, when the run first started) after what
    metrics.jsonl says; (0, None) for a new run."""
    lines = [line for line in read_lines(workdir) if "elapsed" in line]
    productive = [line["goodput"] * line["elapsed"] for line in lines if line["step"] <= start]
    starts = [line["time"] - line["elapsed"] for line in lines]
    return max(productive, default=0.0), min(starts, default=None)


def audio_seconds(batch) -> float:
    """Seconds of audio in a host's batch, without its padding."""
    if "audio_length" in batch:
        return float(batch["audio_length"].sum()) / features.SAMPLE_RATE
    return float(batch["mel_length"].sum()) * features.HOP / features.SAMPLE_RATE


def main(argv):
    del argv
    # Until the loop listens for it: nothing is there to be saved. Of several processes jax itself
    # takes the signal and tells all of them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cluster.RESTART))
    config = flags.FLAGS.config
    with cluster.membership(config.stall_seconds):
        state = train(config, flags.FLAGS.workdir)
    if int(state.step) < config.num_steps:
        sys.exit(cluster.RESTART)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Recipe, a file of configs/.")
    flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
    flags.mark_flags_as_required(["config", "workdir"])
    config_lib.run(main)
