"""What XLA says of a program that it compiled, or could not: memory and collectives."""

import collections
import functools
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def peak_memory(analysis, platform: str) -> int:
    """Bytes of one device that a compiled program needs at once; on CPUs, whose compiler leaves
    temporaries out of its peak, all that it needs at any time."""
    if platform != "cpu":
        return analysis.peak_memory_in_bytes
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return held + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes


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


def count_collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """{kind: (how often, bytes of results)} on one device, from the text of a compiled program.

    A loop counts as often as it runs where the text tells: by XLA's annotation, or by the one
    constant that its condition compares a counter with (loops of JAX count up from 0). One that may
    end before counts once.
    """
    found, calls = collections.defaultdict(list), collections.defaultdict(list)
    constants, open_ended = collections.defaultdict(list), set()
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
        if opcode == "and":
            open_ended.add(computation)
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
                counts = len(constants[times]) == 1 and times not in open_ended
                times = constants[times][0] if counts else 1
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
