"""Trains a spoken language model.

    python -m otreg_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m otreg_jax.train --config=configs/manifest.py --workdir=runs/mine \\
        --config.data.train=train.jsonl --config.data.dev=dev.jsonl --config.otreg.weight=1

Every key of otreg_jax/config.py can be set as --config.KEY=VALUE. If the work directory holds a
checkpoint of the same configuration, training resumes from it. On SIGTERM (preemption) the run
saves and exits with code 75: start it again to go on.
"""

import functools
import json
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import config_flags

from otreg_jax import build, checkpoint, flops, optim, pretrain_llm, pretrained, sharding
from otreg_jax import config as config_lib
from otreg_jax import train_step as step_lib
from otreg_jax.data import features, pipeline, sets, text

PREEMPTED = 75  # EX_TEMPFAIL: launchers restart a run that ends with it


def train(config, workdir) -> step_lib.TrainState:
    """Trains to `config.num_steps`, from the newest checkpoint in `workdir` if there is one.

    Writes config.json, tokenizer files, metrics.jsonl, TensorBoard events and checkpoints.

    Returns:
      The final state; its step is below `num_steps` if the run was told to stop (SIGTERM).

    Raises:
      ValueError, FileNotFoundError: the configuration, the data or the work directory is unusable.
      FloatingPointError: `max_bad_steps` steps in a row were not finite.
    """
    config_lib.check(config)
    mesh = sharding.make_mesh(config)
    workdir = Path(workdir)
    checkpoint.check_workdir(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)

    # ---- data, tokenizer, model ------------------------------------------------------------------
    utterances = sets.load_train(config, workdir)
    tokenizer = make_tokenizer(config, workdir, utterances)
    llm_dir = prepare_llm(config, workdir, tokenizer, utterances)
    slm, params = build.build(config, tokenizer, llm_dir, mesh)
    config_lib.save(config, workdir / "config.json")

    # ---- state, sharded over the mesh ------------------------------------------------------------
    params, frozen = build.split(params, config)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    optimizer = optim.make_optimizer(config)
    abstract_state = step_lib.abstract_state(params, optimizer, mesh)
    state_sharding = jax.tree.map(lambda x: x.sharding, abstract_state)
    checkpointer = checkpoint.open_checkpoints(workdir, config.keep_checkpoints)
    state = checkpoint.restore(checkpointer, abstract_state)
    if state is None:
        init = functools.partial(step_lib.init_state, optimizer=optimizer)
        state = jax.jit(init, out_shardings=state_sharding)(params)
    start = int(state.step)

    step_fn = step_lib.make_step(slm, config, optimizer, abstract_state)
    flops_of = flops.of_batches(
        step_lib.make_step(build.plain(slm), config, optimizer, abstract_state),
        abstract_state, frozen,
    )  # fmt: skip
    metadata = {"tokenizer": tokenizer.fingerprint, "prompt": config.prompt}
    if jax.process_index() == 0:
        print(build.parameter_table(abstract_state.params, frozen))
        print(
            f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s); "
            + (f"resuming at step {start}" if start else "starting at step 0")
        )
    del params

    # ---- the loop --------------------------------------------------------------------------------
    batches = pipeline.train_batches(
        utterances, tokenizer, config.data, batch_size=config.batch_size,
        seed=config.seed, num_steps=config.num_steps, start_step=start,
        host_index=jax.process_index(), host_count=jax.process_count(),
        skipped_path=str(workdir / "skipped.jsonl"),
    )  # fmt: skip
    writer = MetricsWriter(workdir, start, config.log_every, optim.learning_rate(config))
    told_to_stop, stop_listening = listen_for_preemption()
    pending = None
    progress = tqdm.tqdm(
        zip(range(start, config.num_steps), batches, strict=False), initial=start,
        total=config.num_steps, desc="training", unit="step", mininterval=1.0,
    )  # fmt: skip
    try:
        for step, batch in progress:
            placed = sharding.to_global(batch, mesh)
            state, metrics = step_fn(state, frozen, placed)
            # Metrics of the step before are ready now: reading them does not stall the device.
            if pending:
                read_metrics(*pending, writer, progress, utterances, config)
            pending = (step + 1, metrics, batch, flops_of(placed))
            stop = told_to_stop(step)
            if stop or (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
                checkpoint.save(checkpointer, state, step + 1, metadata)
            if stop:
                progress.write(f"told to stop: saving step {step + 1}; start again to resume")
                break
        if pending:
            read_metrics(*pending, writer, progress, utterances, config)
    finally:
        stop_listening()
        writer.close()
        progress.close()
        checkpointer.close()  # waits for saves under way
    return state


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


def make_tokenizer(config, workdir, utterances) -> text.Tokenizer:
    """The run's tokenizer, a copy of it in `workdir`: that of `tokenizer.path` or `llm.path`, else
    one trained on the transcripts; a run that resumes keeps what it has."""
    if checkpoint.exists(workdir):
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
        if config.synthetic.num_train:
            sentences = sets.text_corpus(config.synthetic, config.llm.pretrain.num_sentences)
        pretrain_llm.ensure_llm(config, tokenizer, sentences, path)
    return path


def read_metrics(step, metrics, batch, step_flops, writer, progress, utterances, config) -> None:
    """Logs the metrics of a finished step; names the utterances of a non-finite one.

    Raises:
      FloatingPointError: after `max_bad_steps` non-finite steps in a row.
    """
    metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
    bad_steps = int(metrics.pop("bad_steps"))
    if bad_steps:
        ids = [utterances[i].id for i in batch["index"] if i >= 0]
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
    value the mean over these steps. Lines after the resumed step are dropped."""

    def __init__(self, workdir, start: int, log_every: int, learning_rate):
        self.log_every, self.learning_rate = log_every, learning_rate
        self.is_writer = jax.process_index() == 0
        self.window, self.count = [], {"audio": 0.0, "tokens": 0, "flops": 0}
        chip = flops.chip(jax.devices()[0])
        self.peak_flops = chip.flops * jax.device_count() if chip else None
        self.time = None  # the first window starts after the first step: compilation is no speed
        if not self.is_writer:
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start] if start else []
        path.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a")
        self.board = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)

    def step(self, step: int, metrics: dict, batch, step_flops: int) -> dict | None:
        """Adds a step; returns the line if one was written."""
        self.window.append(metrics)
        self.count["audio"] += audio_seconds(batch) * jax.process_count()
        self.count["tokens"] += int(batch["token_length"].sum()) * jax.process_count()
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
        if self.is_writer:
            self.file.write(json.dumps({"step": step, **line}) + "\n")
            self.file.flush()
            for key, value in line.items():
                self.board.add_scalar(key, value, step)
        return line

    def skipped(self, step: int, metrics: dict, ids: list[str]) -> None:
        """Records a skipped step at once."""
        if self.is_writer:
            self.file.write(json.dumps({"step": step, "skipped": ids, **metrics}) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.is_writer:
            self.file.close()
            self.board.close()


def audio_seconds(batch) -> float:
    """Seconds of audio in a host's batch, without its padding."""
    if "audio_length" in batch:
        return float(batch["audio_length"].sum()) / features.SAMPLE_RATE
    return float(batch["mel_length"].sum()) * features.HOP / features.SAMPLE_RATE


def main(argv):
    del argv
    sharding.join_cluster()
    config = flags.FLAGS.config
    state = train(config, flags.FLAGS.workdir)
    if int(state.step) < config.num_steps:
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Recipe, a file of configs/.")
    flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
    flags.mark_flags_as_required(["config", "workdir"])
    config_lib.run(main)
