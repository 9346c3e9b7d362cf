"""Trains a spoken language model.

    python -m otreg_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m otreg_jax.train --config=configs/manifest.py --workdir=runs/mine \\
        --config.data.train=train.jsonl --config.data.dev=dev.jsonl --config.otreg.weight=1

Every setting can be given as --config.KEY=VALUE: `python -m otreg_jax.config` lists them, and so
does docs/configuration.md. If the work directory holds a checkpoint of the same configuration,
training resumes from it. On SIGTERM (preemption), SIGHUP and Ctrl-C the run saves and exits, with
code 75 (Ctrl-C: 130): start it again to go on. A second Ctrl-C ends it at once.

The work directory may be remote (gs://...). Several processes train one run if they are started as
docs/launch.md says; they share the work directory, and process 0 alone writes to it, except for its
checkpoints, which all of them write.
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from otreg_jax import (
    agreement,
    build,
    checkpoint,
    cluster,
    command,
    encode_once,
    flops,
    optim,
    preflight,
    pretrain_llm,
    pretrained,
    rundir,
    sharding,
    stages,
    stopping,
    tracking,
)
from otreg_jax import config as config_lib
from otreg_jax import train_step as step_lib
from otreg_jax.data import bucketing, pipeline, prompts, sets, sources, text, tokenization
from otreg_jax.models import encoders
from otreg_jax.models import slm as slm_lib


def train(config, workdir) -> step_lib.TrainState:
    """Trains to `config.num_steps`, from the newest checkpoint in `workdir` if there is one.

    Returns:
      The final state; its step is below `num_steps` if the run was told to stop (SIGTERM, SIGHUP).

    Raises:
      ValueError, FileNotFoundError: the configuration, the data or the work directory is unusable.
      FloatingPointError: `max_bad_steps` steps in a row were not finite.
      KeyboardInterrupt: Ctrl-C. As after an unreadable file, what was trained is saved.
    """
    preflight.check(config)
    agreement.check_start(config)
    mesh = sharding.make_mesh(config)
    share, files = cluster.batch_share(mesh), rundir.of(workdir)
    stored = preflight.stored_config(workdir, config)
    preflight.check_model(config, mesh)

    # ---- data, tokenizer, model ------------------------------------------------------------------
    data = load_data(config, files)
    slm, params = build.build(config, data.tokenizer, data.llm_dir, mesh, data.ctc_classes)

    # ---- state, sharded over the mesh ------------------------------------------------------------
    params, frozen = build.split(params, config)
    frozen |= build.text_target(params, config)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    plan = stages.stages_of(config)
    optimizer = optim.make_optimizer(plan[0].config)
    abstract_state = step_lib.abstract_state(params, optimizer, mesh)
    made_of = checkpoint.provenance(config, data.tokenizer, frozen, data.digest)
    state = checkpoint.restore(workdir, abstract_state, made_of, config.data.allow_change)
    state = state or new_state(params, optimizer, abstract_state)
    start = int(state.step)
    del params
    announce(config, mesh, start, stored, abstract_state.params, frozen)

    # ---- the loop --------------------------------------------------------------------------------
    functions = {s.name: stage_functions(slm, s, abstract_state, frozen) for s in plan}
    eval_fn = step_lib.make_eval_step(slm)

    def save(dev_metrics=None):
        late.read()  # no checkpoint before the lines of its steps
        writer.publish()
        checkpoints.save(state, int(state.step), made_of, dev_metrics)
        watch.lap("checkpoint", int(state.step))

    batches = train_batches(config, data, files, share, start, save, slm, frozen)
    watch = cluster.Watch(config.stall_seconds, *tracking.time_before(files, start))
    rate = optim.learning_rates(plan)
    writer = tracking.writer_of(config, files, start, rate, watch, share[1])
    profiler = tracking.Profiler(files.profile, *config_lib.profile_window(config))
    progress = progress_bar(batches, start, config.num_steps)
    late = tracking.OneStepLate(lambda *s: read_metrics(*s, writer, progress, data.train, config))
    checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints, config.keep_every)
    phase_of, signals = tracking.phases(), stopping.StopSignals()
    with closing(checkpoints, profiler, watch, writer, progress, signals):
        for step, batch in progress:
            profiler.before(step)
            run = functions[stages.at(plan, step).name]
            state = run.restart(state) if 0 < step == run.start else state
            placed = sharding.to_global(batch, mesh)
            state, metrics = run.step(state, frozen, placed)
            late.add(step + 1, metrics, batch, run.flops_of(placed))
            watch.lap(phase_of(run.start, batch), step + 1)
            profiler.after(step, state)
            checkpoints.look()
            stop, dev_metrics = signals.told_to_stop(step), None
            if run.evaluates and not stop and is_due(step + 1, config.eval_every, config):
                weights = optim.averaged(state.params, state.opt_state)
                loss = dev_loss(eval_fn, weights, frozen, data, config, slm, share)
                dev_metrics = {"dev_ce": loss}
                writer.evaluated(step + 1, dev_metrics)
                watch.lap("evaluation", step + 1)
            if stop or is_due(step + 1, config.checkpoint_every, config):
                save(dev_metrics)
            if stop:
                break
        late.read()
    return state


class Data(NamedTuple):
    """What a run learns from."""

    train: Sequence[sources.Utterance]
    dev: list[sources.Utterance]  # empty if it is not evaluated while training
    tokenizer: tokenization.Tokenizer
    llm_dir: str  # the LLM's weights; "" builds one from scratch
    ctc_classes: list[int] | None  # token ids, see `losses.init_ctc`; None: all
    prompter: prompts.Prompter
    corpus: bucketing.Corpus  # of `train`
    digest: str  # `agreement.corpus` of it


def load_data(config, files: rundir.Files) -> Data:
    """Reads, and makes where the configuration says so, what a run learns from; process 0 first,
    which writes the tokenizer, config.json and data.json."""
    check_remote(files.root, config)
    files.root.mkdir(parents=True, exist_ok=True)
    process = jax.process_index()
    with cluster.process_0_first():
        skipped = None if process else str(files.skipped(process))
        utterances = sets.load_train(config, files.root, skipped)
        dev = sets.load_dev(config, files.root) if config.eval_every else []
        tokenizer = make_tokenizer(config, files, utterances)
        prompter = prompts.make(config, tokenizer, utterances)
        answers = [prompts.answer(prompter, u) for u in text.sample(utterances)]
        report = text.check_transcripts(tokenizer, answers, config.tokenizer.max_unknown)
        corpus = bucketing.make_corpus(utterances, tokenizer, prompter, config.data.window)
        llm_dir = prepare_llm(config, files.root, tokenizer, utterances)
    if process == 0:
        print(*report, sep="\n")
        config_lib.save(config, files.config)
        rundir.write_json(files.description, sets.describe(utterances))
    are_used = stages.is_ever_on(config, "ctc") and config.ctc.classes == "used"
    digest = agreement.check_data("training data", utterances)
    agreement.check_data("dev set", dev)
    agreement.check_weights([config.encoder.path, config.adapter.path, llm_dir])
    classes = bucketing.used_tokens(corpus, tokenizer, prompter) if are_used else None
    return Data(utterances, dev, tokenizer, llm_dir, classes, prompter, corpus, digest)


def new_state(params, optimizer, abstract_state) -> step_lib.TrainState:
    """The state before the first step, in the shardings of `abstract_state`."""
    init = functools.partial(step_lib.init_state, optimizer=optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    return jax.jit(init, out_shardings=shardings)(params)


def announce(config, mesh, start: int, stored, trained, frozen) -> None:
    """Prints what is trained, on what, from where on, and what has changed since (`stored`)."""
    if jax.process_index() == 0:
        print(build.parameter_table(trained, frozen))
        print(
            f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s); "
            + (f"resuming at step {start}" if start else "starting at step 0")
        )
        if stored and start:
            print(*preflight.resume_notes(stored, config, start), sep="\n")


class StageFunctions(NamedTuple):
    """What a stage runs: its step; what starts it from the state that the stage before left; of a
    batch, the FLOPs of its step. start: its first step. evaluates: whether it has a dev loss."""

    start: int
    evaluates: bool
    step: Callable
    restart: Callable
    flops_of: Callable


def stage_functions(slm, stage: stages.Stage, abstract_state, frozen) -> StageFunctions:
    """The functions of a stage, jitted and not yet compiled.

    FLOPs are the model's own, as MFU counts them, counted in the traced step. Recomputation would
    be counted as well there, and what a fused attention kernel computes would not, so the step
    counted is that of the same model without both (`build.plain`). It is traced and never compiled.
    Where the model has neither, it is the very step that trains, whose trace is there already.
    """
    optimizer = optim.make_optimizer(stage.config, stage.train)

    def make_step(slm):
        return step_lib.make_step(
            slm, stage.config, optimizer, abstract_state, stage.start, stage.train
        )

    step, plain = make_step(slm), build.plain(slm)
    counted = step if plain == slm else make_step(plain)
    return StageFunctions(
        stage.start,
        stage.config.eval_every > 0 and stage.config.ce.weight > 0,
        step,
        step_lib.make_restart(optimizer, abstract_state),
        flops.of_batches(counted, abstract_state, frozen),
    )


def keep_encoded(config, data: Data, files: rundir.Files, share, slm, frozen):
    """The frozen encoder's outputs for the training set, read from where they are kept."""
    skipped = str(files.skipped(jax.process_index()))
    folder = epath.Path(config.data.cache) / "encoded" if config.data.cache else files.encoded
    return encode_once.encode_once(
        config, data.train, data.tokenizer, slm, frozen, share, folder, skipped
    )


def train_batches(
    config, data: Data, files: rundir.Files, share, start: int, save, slm, frozen
) -> Iterator:
    """This process's rows of the batches from step `start` on.

    If one cannot be made (an unreadable file), `save` is called first, unless the last step was
    saved anyway; alone, for with several processes the others would not join in the save.
    """
    kept = keep_encoded(config, data, files, share, slm, frozen) if config.encoder.keep else None
    batches = pipeline.train_batches(
        data.train,
        data.tokenizer,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        num_steps=config.num_steps,
        start_step=start,
        host_index=share[0],
        host_count=share[1],
        skipped_path=str(files.skipped(jax.process_index())),
        kept=kept,
        prompter=data.prompter,
        batch_seconds=config.batch_seconds,
        unit=sharding.batch_shards(slm.mesh.shape) * config.accumulation,
        corpus=data.corpus,
        frontend=encoders.frontend(slm.encoder.config),
        positions_of=slm_lib.positions_of(slm, data.corpus.prompt_N2 is None),
        encoder_positions_of=None if kept else encoders.packed_length(slm.encoder.config),
        packed=config.packing,
        accumulation=config.accumulation,
    )

    def saving_first():
        step = start
        try:
            for batch in batches:
                yield batch
                step += 1
        except Exception:
            is_saved = step == start or is_due(step, config.checkpoint_every, config)
            if jax.process_count() == 1 and not is_saved:
                save()
            raise

    return saving_first()


def progress_bar(batches, start: int, num_steps: int) -> tqdm.tqdm:
    """Iterates over (step, batch)."""
    return tqdm.tqdm(
        zip(range(start, num_steps), batches, strict=False),
        initial=start,
        total=num_steps,
        desc="training",
        unit="step",
        mininterval=1.0,
    )


@contextlib.contextmanager
def closing(checkpoints, *opened):
    """Closes all at the end. It waits for the save under way, unless after an error with several
    processes: the others would not come to finish theirs."""
    with contextlib.ExitStack() as stack:
        for each in reversed(opened):
            stack.callback(each.close)
        try:
            yield
        except BaseException:
            if jax.process_count() == 1:
                checkpoints.close(after_error=True)
            raise
        checkpoints.close()


def is_due(step: int, every: int, config) -> bool:
    """Whether something that happens each `every` steps, and at the end, happens after `step`."""
    return step % every == 0 or step == config.num_steps


def check_remote(workdir, config) -> None:
    """Raises ValueError if the run would make in a remote workdir what needs a local disk."""
    if not rundir.is_remote(workdir):
        return
    problems = []
    if sets.is_spoken(config) and not config.data.cache:
        problems.append("set data.cache to a local directory for the synthetic speech")
    if config.llm.pretrain.num_steps and not config.llm.path:
        problems.append("pretrain the LLM in a local run and set llm.path to its WORKDIR/llm")
    if problems:
        raise ValueError(f"{workdir} is remote:\n  " + "\n  ".join(problems))


def make_tokenizer(config, files: rundir.Files, utterances) -> tokenization.Tokenizer:
    """The run's tokenizer, a copy of it in the run directory: that of `tokenizer.path` or
    `llm.path`, else one trained on answers and prompts; a run that resumes, and every process but
    the first, takes what is there."""
    if checkpoint.exists(files.root) or jax.process_index():
        return tokenization.load_tokenizer(files.root)
    path = config.tokenizer.path
    if config.llm.path and not path:
        path = pretrained.resolve(config.llm.path, config.llm.revision or None)
    if path:
        tokenizer = tokenization.load_tokenizer(path)
        tokenization.save_tokenizer(files.root, tokenizer)
        return tokenizer
    return tokenization.train_sentencepiece(
        prompts.texts(config, utterances),
        files.tokenizer,
        config.tokenizer.vocab_size,
        model_type=config.tokenizer.model_type,
    )


def prepare_llm(config, workdir, tokenizer, utterances) -> str:
    """Path of the LLM ("" builds one from scratch); pretrains it on text first if asked to."""
    path = build.llm_path(config, workdir)
    if path and not config.llm.path:
        sentences = prompts.texts(config, utterances)
        if sets.is_spoken(config):
            sentences = sets.text_corpus(config.synthetic, config.llm.pretrain.num_sentences)
        pretrain_llm.ensure_llm(config, tokenizer, sentences, path)
    return path


def dev_loss(eval_fn, params, frozen, data: Data, config, slm, share) -> float:
    """Mean cross-entropy a token over the dev set (nats); unreadable audio is left out."""
    data_config = pipeline.for_evaluation(config.data, num_workers=0)
    batches = pipeline.eval_batches(
        data.dev,
        data.tokenizer,
        data_config,
        batch_size=config.batch_size,
        host_index=share[0],
        host_count=share[1],
        prompter=data.prompter,
        frontend=encoders.frontend(slm.encoder.config),
    )
    sums = [eval_fn(params, frozen, sharding.to_global(batch, slm.mesh)) for batch in batches]
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


def main(values, _):
    # Until the loop listens: nothing is there to be saved. Of several processes jax itself takes
    # SIGTERM and tells all of them.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(cluster.RESTART))
    config, workdir = config_lib.given(values), values.workdir
    if rundir.is_remote(workdir) and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Compiled once: restarts on fresh disks, and the other hosts, load it from the bucket.
        jax.config.update("jax_compilation_cache_dir", str(rundir.of(workdir).compiled))
    try:
        with tracking.log_may_be_lost(), cluster.membership(config.stall_seconds):
            state = train(config, workdir)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if int(state.step) < config.num_steps:
        sys.exit(cluster.RESTART)


def define_flags(define) -> None:
    config_lib.define_flag(define)
    define.string("workdir", None, "Directory of the run; made if missing.")


cli = functools.partial(
    command.run,
    main,
    define_flags,
    required=["config", "workdir"],
    check=config_lib.check_flags,
)

if __name__ == "__main__":
    sys.exit(cli())
