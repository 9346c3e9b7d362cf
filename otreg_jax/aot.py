"""Compiles the training step for devices that are not there: does it fit, and what does it cost?

    python -m otreg_jax.aot --config=configs/multilingual.py --topology=v5p:4x4x4
    python -m otreg_jax.aot --config=configs/multilingual.py --topology=v5p:4x4x4 --slices=2
    python -m otreg_jax.aot --config=configs/quickstart.py --topology=cpu:8

Needs no TPU and no weights, only the pretrained models' config.json; for TPU topologies it needs
libtpu (pip install 'jax[tpu]'). The whole step is compiled as training compiles it: loss, OTReg,
gradients, optimizer, donated state, over the mesh of `config.mesh`.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from otreg_jax import build, command, flops, optim, pretrained, sharding, train_step
from otreg_jax import config as config_lib
from otreg_jax.data import features, text
from otreg_jax.models import slm as slm_lib

GIB = 2**30
TOKENS_PER_SECOND = 8  # of transcripts, when neither a flag nor data.max_tokens says
PROMPT_TOKENS = 16  # on either side of the speech, when no tokenizer is at hand
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compilation found; sizes in bytes and counts are those of one device and step.

    memory: by what it holds. peak: of all of it at once. capacity: of the device, None if unknown.
    flops: model FLOPs over all devices. collectives: {kind: (count, bytes of results)}.
    positions: the length of the LLM's sequence.
    """

    batch_size: int
    memory: dict[str, int]
    peak: int
    capacity: int | None
    flops: int
    collectives: dict[str, tuple[int, int]]
    positions: int

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
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_LOG_DIR", "disabled"),
    ):  # fmt: skip
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
        tokenizer = text.load_tokenizer(source)
        vocab_size, prompt = tokenizer.vocab_size, text.build_prompt(tokenizer, config.prompt)
    except (FileNotFoundError, ValueError):
        vocab_size = 0 if path else config.tokenizer.vocab_size
        prompt = text.Prompt((0,) * PROMPT_TOKENS, (0,) * PROMPT_TOKENS, 0)
    return build.modules(config, vocab_size, prompt, path, mesh)


def abstract_batch(config, mesh, frames: int, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `config.batch_size` utterances of so many mel frames and transcript tokens."""
    placed = sharding.batch_sharding(mesh)
    rows = config.batch_size
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=placed)
    if config.data.features == "step":
        speech = {
            "audio": array(jnp.float32, frames * features.HOP), "audio_length": array(jnp.int32)
        }  # fmt: skip
    else:
        speech = {
            "mel": array(jnp.float32, frames, config.data.num_mels),
            "mel_length": array(jnp.int32),
        }
    lengths = {"token_length": array(jnp.int32), "index": array(jnp.int32)}
    return speech | {"tokens": array(jnp.int32, tokens)} | lengths


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
    place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
    frozen = jax.tree.map(place, frozen, sharding.tree_shardings(frozen, mesh))
    arguments = (state, frozen, abstract_batch(config, mesh, frames, tokens))
    return slm, lambda slm: train_step.make_step(slm, config, optimizer, state), arguments


def compile_step(config, devices, frames: int, tokens: int) -> Report:
    """Compiles the training step of a configuration for `devices`; errors as `abstract_step`."""
    slm, step_of, arguments = abstract_step(config, devices, frames, tokens)
    traced = step_of(slm).trace(*arguments)
    state, frozen, batch = arguments
    memory = {
        "frozen weights": _bytes(frozen), "trained weights": _bytes(state.params),
        "optimizer state": _bytes(state.opt_state), "batch": _bytes(batch),
    }  # fmt: skip
    known = flops.chip(devices[0])
    capacity = int(known.memory) if known else None
    collectives = {}
    try:
        compiled = traced.lower(lowering_platforms=(devices[0].platform,)).compile()
        peak = peak_memory(compiled.memory_analysis(), devices[0].platform)
        collectives = count_collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:  # how XLA says that the memory does not suffice
        found = needed_and_available(str(error))
        if not found:
            raise
        # What is named may be temporaries alone.
        peak, capacity = max(found[0], sum(memory.values())), found[1]
    memory["activations, gradients, buffers"] = peak - sum(memory.values())
    positions = (
        len(slm.prompt.prefix)
        + slm_lib.speech_length(slm, frames)
        + len(slm.prompt.suffix)
        + tokens
    )
    return Report(
        config.batch_size, memory, peak, capacity,
        flops.count(step_of(build.plain(slm)), *arguments), collectives, positions,
    )  # fmt: skip


def model_flops(config, devices, frames: int, tokens: int) -> int:
    """FLOPs of the step's matrix products over all devices, without recomputation; no compiling."""
    slm, step_of, arguments = abstract_step(config, devices, frames, tokens)
    return flops.count(step_of(build.plain(slm)), *arguments)


def needed_and_available(message: str) -> tuple[int, int] | None:
    """Bytes, from an error of XLA's for TPUs that says so; None from any other error."""
    amount = r"([\d.]+)([KMGT])"
    for pattern in (
        rf"Used {amount} of {amount} hbm",
        rf"memory required for [\w ]+ \({amount}\) exceeds available HBM \({amount}\)",
    ):
        if match := re.search(pattern, message):
            sizes = zip(match.groups()[::2], match.groups()[1::2], strict=True)
            needed, available = (int(float(n) * 1024 ** " KMGT".index(u)) for n, u in sizes)
            return needed, available
    return None


def peak_memory(analysis, platform: str) -> int:
    """Bytes of one device that a compiled program needs at once; on CPUs, whose compiler leaves
    temporaries out of its peak, all that it needs at any time."""
    if platform != "cpu":
        return analysis.peak_memory_in_bytes
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return held + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes


def _bytes(tree) -> int:
    """Bytes of one device's shards."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def count_collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """{kind: (how often, bytes of results)} on one device, from the text of a compiled program.

    A loop counts as often as it runs where the text tells: by XLA's annotation, or by the one
    constant that its condition compares a counter with (loops of JAX count up from 0).
    """
    found, calls = collections.defaultdict(list), collections.defaultdict(list)
    constants = collections.defaultdict(list)
    computation = entry = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            computation = header[2]
            entry = computation if header[1] else entry
            continue
        instruction = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", line)
        if not instruction:
            continue
        shape, opcode = instruction.groups()
        if opcode == "constant" and shape.startswith("s32[]"):
            constants[computation].append(int(re.search(r"constant\((-?\d+)\)", line)[1]))
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            found[computation].append((kind, _result_bytes(shape, opcode)))
        if opcode in ("async-update", "async-done"):
            continue  # their start has been counted
        times = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        condition = re.search(r"condition=%?([\w.-]+)", line)
        called = r"(?:body|calls|to_apply|\w+_computations?)=(\{.*?\}|[^,\s]+)"
        for names in re.findall(called, line):
            for name in names.strip("{}").split(", "):
                calls[computation].append(
                    (name.lstrip("%"), int(times[1]) if times else condition and condition[1])
                )

    @functools.cache
    def total(name):
        sums = collections.Counter()
        for kind, size in found[name]:
            sums[kind, "count"] += 1
            sums[kind, "bytes"] += size
        for callee, times in calls[name]:
            if isinstance(times, str):  # the name of a condition
                times = constants[times][0] if len(constants[times]) == 1 else 1
            for key, value in total(callee).items():
                sums[key] += (times or 1) * value
        return sums

    sums = total(entry)
    used = [kind for kind in KINDS if sums[kind, "count"]]
    return {kind: (sums[kind, "count"], sums[kind, "bytes"]) for kind in used}


def _result_bytes(shape: str, opcode: str) -> int:
    """Bytes of an HLO shape or tuple; of "start" operations that also return their operands, the
    results alone."""
    sizes = []
    for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        sizes.append(bits * math.prod(map(int, dims.split(",")) if dims else ()) // 8)
    if opcode in ("all-gather-start", "collective-permute-start"):
        sizes = [size for size in sizes if size > 4]
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


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


def describe(report: Report, devices, config, frames: int, tokens: int) -> str:
    """The report as people read it."""
    chip, count = flops.chip(devices[0]), len(devices)
    mesh = ", ".join(f"{axis}={size}" for axis, size in sharding.mesh_sizes(config, count).items())
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
    lines += [f"model FLOPs of a step: {report.flops:.4g}, {report.flops / count:.4g} a device"]
    if chip:
        seconds = report.flops / count / chip.flops
        lines += [f"  {seconds:.3f} s at the peak of {chip.flops:.3g} FLOP/s a device"]
    lines += ["", "collectives of a step, on one device"]
    lines += [
        f"  {kind:20}{times:8} times{size / GIB:10.3f} GiB"
        for kind, (times, size) in report.collectives.items()
    ] or ["  none" if report.fits is not False else "  unknown: XLA stops where memory ends"]
    return "\n".join(lines)


def main(values, _):
    config = config_lib.given(values)
    config_lib.check(config)
    devices = devices_of(values.topology, values.slices)
    frames = round((values.seconds or config.data.max_duration) * features.SAMPLE_RATE)
    frames //= features.HOP
    tokens = values.tokens or config.data.max_tokens or round(
        frames * TOKENS_PER_SECOND / features.FRAME_RATE
    )

    def compile_at(batch_size):
        print(f"compiling batch {batch_size} ...", file=sys.stderr)
        with config.unlocked():
            changed = config.copy_and_resolve_references()
        changed.batch_size = batch_size
        return compile_step(changed, devices, frames, tokens)

    report = compile_at(config.batch_size)
    print(describe(report, devices, config, frames, tokens))
    result = {
        "topology": values.topology, "slices": values.slices, "devices": len(devices),
        **dataclasses.asdict(report),
    }  # fmt: skip
    if values.largest_batch and report.capacity:
        sizes = sharding.mesh_sizes(config, len(devices))
        unit = sharding.batch_shards(sizes) * config.accumulation
        best = largest_batch(compile_at, report, unit)
        if best:
            result["largest_batch"], result["largest_peak"] = best.batch_size, best.peak
            print(f"\nlargest batch that fits: {best.batch_size} ({best.peak / GIB:.2f} GiB)")
        else:
            print(f"\nno batch fits, not even {unit}: use more devices, bfloat16, remat or LoRA")
    if values.out:
        with open(values.out, "a") as file:
            file.write(json.dumps(result) + "\n")


def define_flags(define) -> None:
    config_lib.define_flag(define)
    define.string("topology", None, "v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, cpu:8, ...")
    define.integer("slices", 1, "How many such slices, joined by the data centre's network.", 1)
    define.float("seconds", 0, "Of audio in every utterance; 0: data.max_duration.", 0)
    define.integer("tokens", 0, "In every transcript; 0: data.max_tokens, or 8 a second.", 0)
    define.bool("largest_batch", False, "Find it; compiles the step several times.")
    define.string("out", "", "File that the result is appended to, as a line of JSON.")


if __name__ == "__main__":
    required = ("config", "topology")
    sys.exit(command.run(main, define_flags, required=required, check=config_lib.check_flags))
