"""Compiles the training step, or what evaluation runs, for devices that are not there: does it fit,
and what does it cost?

    python -m otreg_jax.aot --config=configs/multilingual.py --topology=v5p:4x4x4
    python -m otreg_jax.aot --config=configs/multilingual.py --topology=v5p:4x4x4 --slices=2
    python -m otreg_jax.aot --config=configs/quickstart.py --topology=cpu:8
    python -m otreg_jax.aot --config=configs/multilingual.py --topology=v5e:4x4 --program=decode

Needs no TPU and no weights, only the pretrained models' config.json; for TPU topologies it needs
libtpu (pip install 'jax[tpu]'). The whole step is compiled as training compiles it: loss, OTReg,
gradients, optimizer, donated state, over the mesh of `config.mesh`. `--program=decode` compiles
what evaluation runs, on the mesh it would take: the prompt, and a loop of which one token counts.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from otreg_jax import (
    build,
    command,
    compiler,
    decoding,
    flops,
    optim,
    preflight,
    pretrained,
    recognition,
    sharding,
    train_step,
)
from otreg_jax import config as config_lib
from otreg_jax.data import features, prompts, text, tokenization
from otreg_jax.models import encoders, llm
from otreg_jax.models import slm as slm_lib

GIB = 2**30
TOKENS_PER_SECOND = 8  # of transcripts, when neither a flag nor data.max_tokens says
PROMPT_TOKENS = 16  # on either side of the speech, when no tokenizer is at hand


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compilation found; sizes in bytes and counts are those of one device and step.

    memory: by what it holds. peak: of all of it at once. capacity: of the device, None if unknown.
    flops: model FLOPs over all devices. collectives: {kind: (count, bytes of results)}.
    positions: the length of the LLM's sequence. mesh: {axis: devices}.
    of: what FLOPs and collectives are counted of.
    host: memory of a host while it loads the weights, about.
    """

    batch_size: int
    memory: dict[str, int]
    peak: int
    capacity: int | None
    flops: int
    collectives: dict[str, tuple[int, int]]
    positions: int
    mesh: dict[str, int]
    of: str = "a step"
    host: int | None = None

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.peak <= self.capacity


def devices_of(topology: str, slices: int = 1) -> list:
    """Devices of "cpu:8" or of a TPU slice such as "v5p:4x4x4" that may not exist.

    Raises:
      ValueError: the topology is unknown, or libtpu is missing.
    """
    platform, _, count = topology.partition(":")
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(count or 1))
        return jax.devices()
    # libtpu would look for a TPU, and for the machines of its pod.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_LOG_DIR", "disabled"),
    ):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=slices
        ).devices
    except Exception as error:  # whatever libtpu, or its absence, makes jax raise
        raise ValueError(
            f"topology {topology!r} ({slices} slice(s)) cannot be described: {error}\n"
            "It reads like v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1 (in chips of two devices) or "
            "cpu:8; TPU topologies need libtpu: pip install 'jax[tpu]'"
        ) from error


def modules_of(config, mesh):
    """The modules of a configuration; from config.json alone where its tokenizer is not at hand."""
    path = config.llm.path
    try:
        source = config.tokenizer.path or pretrained.resolve(path, config.llm.revision or None)
        tokenizer = tokenization.load_tokenizer(source)
        vocab_size, prompt = tokenizer.vocab_size, prompts.shared(tokenizer, config)
    except (FileNotFoundError, ValueError):
        vocab_size = 0 if path else config.tokenizer.vocab_size
        prompt = text.Prompt((0,) * PROMPT_TOKENS, (0,) * PROMPT_TOKENS, 0)
    return build.modules(config, vocab_size, prompt, path, mesh)


def abstract_batch(
    config, slm, frames: int, tokens: int, on_host: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `config.batch_size` utterances of so many mel frames and transcript tokens; of mel
    features `on_host`, whatever `data.features` says."""
    placed, rows = sharding.batch_sharding(slm.mesh), config.batch_size
    width = encoders.frontend(slm.encoder.config).width
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=placed)
    if config.data.features == "step" and not on_host:
        speech = {"audio": array(jnp.float32, frames * features.HOP)}
        speech["audio_length"] = array(jnp.int32)
    else:
        speech = {"mel": array(jnp.float32, frames, width), "mel_length": array(jnp.int32)}
    packed = {}
    if config.packing and not on_host:  # nothing to gain where all are as long: the most it takes
        units = sharding.batch_shards(slm.mesh.shape) * config.accumulation
        most = {"segments": _prompt_length(slm, frames) + tokens}
        if length_of := encoders.packed_length(slm.encoder.config):
            most["encoder_segments"] = length_of(frames)
        slots = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=placed)
        packed = {name: slots((units, rows // units * n)) for name, n in most.items()}
    lengths = {"token_length": array(jnp.int32), "index": array(jnp.int32)}
    return speech | {"tokens": array(jnp.int32, tokens)} | lengths | packed


def abstract_step(config, devices, frames: int, tokens: int):
    """The training step and what it takes, nothing traced.

    Returns:
      (slm, step function of a model, (state, frozen, batch)): the step as training jits it, and
      its arguments, ShapeDtypeStructs with shardings.

    Raises:
      ValueError: the mesh or the configuration is impossible.
    """
    mesh = sharding.make_mesh(config, devices)
    slm = modules_of(config, mesh)
    params, frozen = build.abstract_params(slm, config)
    frozen |= jax.eval_shape(functools.partial(build.text_target, config=config), params)
    optimizer = optim.make_optimizer(config)
    state = train_step.abstract_state(params, optimizer, mesh)
    arguments = (state, _placed(frozen, mesh), abstract_batch(config, slm, frames, tokens))
    return slm, lambda slm: train_step.make_step(slm, config, optimizer, state), arguments


def compile_step(config, devices, frames: int, tokens: int) -> Report:
    """Compiles the training step of a configuration for `devices`; errors as `abstract_step`."""
    slm, step_of, arguments = abstract_step(config, devices, frames, tokens)
    state, frozen, batch = arguments
    memory = {
        "frozen weights": _bytes(frozen),
        "trained weights": _bytes(state.params),
        "optimizer state": _bytes(state.opt_state),
        "batch": _bytes(batch),
    }
    traced = step_of(slm).trace(*arguments)
    memory, peak, capacity, collectives = _compile(
        traced, devices, memory, "activations, gradients, buffers"
    )
    return Report(
        config.batch_size,
        memory,
        peak,
        capacity,
        flops.count(step_of(build.plain(slm)), *arguments),
        collectives,
        _prompt_length(slm, frames) + tokens,
        dict(slm.mesh.shape),
    )


def compile_decode(config, devices, frames: int, tokens: int) -> Report:
    """Compiles what evaluation runs on a batch of `config.batch_size` utterances, greedy search for
    up to `tokens` tokens, on the mesh that `build.load_run` would take.

    Raises:
      ValueError: the configuration is impossible on these devices.
    """
    shapes = optim.merge(*build.abstract_params(modules_of(config, None), config))
    mesh = sharding.mesh_at_hand(config, shapes, devices)
    slm = modules_of(config, mesh)
    params = _placed(shapes, mesh)
    trained, frozen = optim.split(params, config.freeze)
    batch = abstract_batch(config, slm, frames, tokens, on_host=True)
    length = _prompt_length(slm, frames) + tokens
    cache = jax.eval_shape(lambda: llm.init_cache(slm.llm.config, config.batch_size, length))
    cache = jax.tree.map(lambda x: _at(x, sharding.cache_sharding(x.shape, mesh)), cache)
    memory = {
        "frozen weights": _bytes(frozen),
        "trained weights": _bytes(trained),
        "keys and values": _bytes(cache),
        "batch": _bytes(batch),
    }

    def trace(slm):
        settings = decoding.Settings(tokens)
        return recognition.recognize_and_embed.trace(
            slm, params, batch, settings, config.otreg.layer
        )

    memory, peak, capacity, collectives = _compile(
        trace(slm), devices, memory, "activations, buffers"
    )
    return Report(
        config.batch_size,
        memory,
        peak,
        capacity,
        flops.of_jaxpr(trace(build.plain(slm)).jaxpr),
        collectives,
        length,
        dict(mesh.shape),
        of="the prompt and one token",
        host=_loading(trained, frozen, devices),
    )


def _compile(traced, devices, memory: dict[str, int], rest: str) -> tuple:
    """(memory, peak, capacity, collectives) of a traced program as `Report` has them, its peak
    beside the given `memory` called `rest`."""
    known = flops.chip(devices[0])
    capacity = int(known.memory) if known else None
    collectives = {}
    try:
        program = traced.lower(lowering_platforms=(devices[0].platform,)).compile()
        peak = compiler.peak_memory(program.memory_analysis(), devices[0].platform)
        collectives = compiler.count_collectives(program.as_text())
    except jax.errors.JaxRuntimeError as error:  # how XLA says that the memory does not suffice
        found = compiler.needed_and_available(str(error))
        if not found:
            raise
        # What is named may be temporaries alone.
        peak, capacity = max(found[0], sum(memory.values())), found[1]
    return memory | {rest: peak - sum(memory.values())}, peak, capacity, collectives


def _prompt_length(slm, frames: int) -> int:
    """Positions of the LLM's sequence before the transcript."""
    return len(slm.prompt.prefix) + slm_lib.speech_length(slm, frames) + len(slm.prompt.suffix)


def _placed(params, mesh):
    return jax.tree.map(_at, params, sharding.tree_shardings(params, mesh))


def _at(x, placed) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def _loading(trained, frozen, devices) -> int:
    """Bytes of a host's memory while it loads a run, about: all that its devices take of the
    checkpoint, and the largest tensor of a file."""
    local = max(collections.Counter(device.process_index for device in devices).values())
    pieces = (
        _bytes(x) // (len(x) if "/layers/" in path else 1)
        for path, x in optim.flat_paths(frozen).items()
    )
    return local * (_bytes(trained) + max(pieces, default=0))


def model_flops(config, devices, frames: int, tokens: int) -> int:
    """FLOPs of the step's matrix products over all devices, without recomputation; no compiling."""
    slm, step_of, arguments = abstract_step(config, devices, frames, tokens)
    return flops.count(step_of(build.plain(slm)), *arguments)


def _bytes(tree) -> int:
    """Bytes of one device's shards."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def largest_batch(compile_at, first: Report, unit: int) -> Report | None:
    """The largest batch found to fit, a multiple of `unit` rows; compiled, not only estimated.

    Memory is nearly a line in the batch size: two points give a guess, a few steps settle it.

    Args:
      compile_at: batch size -> Report. first: the report at the configured batch size.
    """
    tried = {first.batch_size // unit: first}

    def fits(units: int) -> bool:
        if units not in tried:
            tried[units] = compile_at(units * unit)
        return tried[units].fits

    start = first.batch_size // unit
    other = 2 * start if first.fits else max(start // 2, 1)
    fits(other)
    if other != start:
        slope = (tried[other].peak - first.peak) / (other - start)
        units = max(int(start + (first.capacity - first.peak) / max(slope, 1)), 1)
        while not fits(units) and units > 1:
            units = max(units - max(units // 16, 1), 1)
    fitting = [units for units, report in tried.items() if report.fits]
    return tried[max(fitting)] if fitting else None


def largest_batches(compile_at, first: Report, unit: int, shapes) -> dict[tuple[int, int], Report]:
    """{(frames, tokens): the largest batch that fits}, as far as any does.

    Args:
      compile_at: (batch size, frames, tokens) -> Report. first: the report of the last of `shapes`,
        the longest, at the configured batch size.
    """
    found = {}
    for frames, tokens in reversed(shapes):
        compile_here = functools.partial(compile_at, frames=frames, tokens=tokens)
        if found:  # about as many frames as of the longest
            rows = next(iter(found.values())).batch_size * shapes[-1][0] // frames
            first = compile_here(max(rows // unit, 1) * unit)
        best = largest_batch(compile_here, first, unit)
        if best:
            found[frames, tokens] = best
    return found


def describe_batches(found: dict[tuple[int, int], Report], unit: int) -> tuple[list[str], dict]:
    """What `largest_batches` found as people read it, and the settings that it comes to."""
    if not found:
        return [f"no batch fits, not even {unit}: use more devices, bfloat16, remat or LoRA"], {}
    fitting = [(r.batch_size, s[0] / features.FRAME_RATE, s[1], r.peak) for s, r in found.items()]
    lines = ["largest batches that fit"] + [
        f"  {rows:6} of {seconds:g} s and {tokens} tokens ({peak / GIB:.2f} GiB)"
        for rows, seconds, tokens, peak in fitting
    ]
    settings = {"batch_size": fitting[0][0]}
    if len(fitting) > 1:
        settings["batch_seconds"] = min(rows * seconds for rows, seconds, _, _ in fitting)
    return [*lines, " ".join(f"--config.{name}={x:g}" for name, x in settings.items())], settings


def describe(report: Report, devices, config, frames: int, tokens: int) -> str:
    """The report as people read it."""
    chip, count = flops.chip(devices[0]), len(devices)
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [
        f"{count} x {devices[0].device_kind}; mesh {mesh}; batch {report.batch_size}"
        + (f" in {config.accumulation} micro-batches" if config.accumulation > 1 else "")
        + f" of {frames / features.FRAME_RATE:g} s and {tokens} tokens: "
        f"sequences of {report.positions} positions",
        "",
        "memory of one device, GiB",
        *(f"  {name:32}{size / GIB:9.3f}" for name, size in report.memory.items()),
    ]
    verdict = "" if report.fits is None else "  fits" if report.fits else "  DOES NOT FIT"
    of = "" if report.capacity is None else f" of {report.capacity / GIB:.2f}"
    peak = "peak, at least" if report.fits is False else "peak"
    lines += [f"  {peak:32}{report.peak / GIB:9.3f}{of}{verdict}", ""]
    if report.host is not None:
        lines += [f"memory of a host while it loads, about: {report.host / GIB:.3f} GiB", ""]
    each = report.flops / count
    lines += [f"model FLOPs of {report.of}: {report.flops:.4g}, {each:.4g} a device"]
    if chip:
        lines += [f"  {each / chip.flops:.3f} s at the peak of {chip.flops:.3g} FLOP/s a device"]
    lines += ["", f"collectives of {report.of}, on one device"]
    lines += [
        f"  {kind:20}{times:8} times{size / GIB:10.3f} GiB"
        for kind, (times, size) in report.collectives.items()
    ] or ["  none" if report.fits is not False else "  unknown: XLA stops where memory ends"]
    return "\n".join(lines)


def main(values, _):
    config = config_lib.given(values)
    config_lib.check(config)
    preflight.check_model(config)
    devices = devices_of(values.topology, values.slices)
    seconds = config.data.window or values.seconds or config.data.max_duration
    frames = round(seconds * features.SAMPLE_RATE) // features.HOP
    spoken = round(frames * TOKENS_PER_SECOND / features.FRAME_RATE)
    tokens = values.tokens or config.data.max_tokens or spoken

    compile_program = {"train": compile_step, "decode": compile_decode}[values.program]

    def compile_at(batch_size, frames=frames, tokens=tokens):
        print(f"compiling batch {batch_size} x {frames} frames ...", file=sys.stderr)
        with config.unlocked():
            changed = config.copy_and_resolve_references()
        changed.batch_size = batch_size
        return compile_program(changed, devices, frames, tokens)

    report = compile_at(config.batch_size)
    print(describe(report, devices, config, frames, tokens))
    result = {
        "topology": values.topology,
        "slices": values.slices,
        "devices": len(devices),
        **dataclasses.asdict(report),
    }
    if values.largest_batch and report.capacity:
        training = values.program == "train"
        unit = sharding.batch_shards(report.mesh) * (config.accumulation if training else 1)
        count = config.data.num_buckets if training else 1
        shapes = [(frames * i // count, tokens * i // count) for i in range(1, count + 1)]
        found = largest_batches(compile_at, report, unit, shapes)
        lines, settings = describe_batches(found, unit)
        print("", *lines, sep="\n")
        result["largest"] = settings
    if values.out:
        with open(values.out, "a") as file:
            file.write(json.dumps(result) + "\n")


def define_flags(define) -> None:
    config_lib.define_flag(define)
    define.string("topology", None, "v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, cpu:8, ...")
    define.enum("program", "train", ["train", "decode"], "The training step, or evaluation.")
    define.integer("slices", 1, "How many such slices, joined by the data centre's network.", 1)
    define.float("seconds", 0, "Of audio in every utterance; 0: data.max_duration.", 0)
    define.integer("tokens", 0, "In every transcript; 0: data.max_tokens, or 8 a second.", 0)
    largest = "Find it for all of data.num_buckets shapes; compiles each several times."
    define.bool("largest_batch", False, largest)
    define.string("out", "", "File that the result is appended to, as a line of JSON.")


cli = functools.partial(
    command.run,
    main,
    define_flags,
    required=["config", "topology"],
    check=config_lib.check_flags,
)

if __name__ == "__main__":
    sys.exit(cli())
