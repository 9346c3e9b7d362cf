"""Runs mutated inputs, each within seconds, and says how each ended.

The property is the same for all inputs: the right result, or one clear message that names the
place. A kind of input is a module with

    prepare(folder)             makes the good inputs, once
    case(folder, seed) -> str   makes one mutated input, uses it, and returns how that ended:
                                "used" or "refused"; raises Wrong if a result is wrong

Whatever else `case` raises is a trace that a user would have seen.
"""

import concurrent.futures
import contextlib
import importlib
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

import otreg_jax

SECONDS = 10  # of its processor's time that one input may take, beyond which it counts as hanging
PATIENCE = 300  # seconds that it may take by the clock, on a machine that does other work too
MEMORY = 3 * 2**30  # bytes that one process may come to
PACKAGE = os.path.dirname(otreg_jax.__file__)


class Wrong(Exception):
    """A result that is not right, and that nobody was told about."""


class Failure(NamedTuple):
    kind: str
    seed: int
    how: str  # "trace", "wrong", "hang", "memory"
    details: str


def refusal(error: BaseException) -> str | None:
    """The message of an error that a command shows as one, or None if a user would see a trace.

    Errors of the package's own are raised in its files (see config.run).
    """
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    shown = isinstance(error, ValueError | OSError | FloatingPointError | ImportError)
    return str(error) if shown and raised_in.startswith(PACKAGE) else None


def run(
    kinds: dict[str, int], folder: str, seed: int = 0
) -> tuple[dict[str, Counter], list[Failure]]:
    """`kinds[kind]` inputs of every kind. Returns how often each ended how, and what failed."""
    counts, failures = {}, []
    for kind, number in kinds.items():
        counts[kind] = Counter()
        work = os.path.join(folder, kind)
        os.makedirs(work, exist_ok=True)
        pool = _pool(kind)
        pool.submit(_prepare, kind, work).result()
        for i in range(number):
            how, details = _watched(pool, kind, work, seed + i)
            if how in ("hang", "memory"):
                _kill(pool)
                pool = _pool(kind)
            counts[kind][how] += 1
            if how in ("trace", "wrong", "hang", "memory"):
                failures.append(Failure(kind, seed + i, how, details))
            if sys.stderr.isatty():
                print(f"\r{kind}: {i + 1} of {number}", end="", file=sys.stderr)
        pool.shutdown()
    return counts, failures


def _watched(pool, kind: str, folder: str, seed: int) -> tuple[str, str]:
    future, start = pool.submit(_one, kind, folder, seed), time.monotonic()
    (process,) = pool._processes
    used = lambda: sum(psutil.Process(process).cpu_times()[:2])
    before = used()
    while True:
        try:
            return future.result(timeout=1)
        except concurrent.futures.TimeoutError:
            if used() - before > SECONDS or time.monotonic() - start > PATIENCE:
                return "hang", f"over {SECONDS} s"
        except concurrent.futures.process.BrokenProcessPool:
            return "memory", "the process died"


def _pool(kind: str) -> concurrent.futures.ProcessPoolExecutor:
    """A process that has imported what a kind needs: that is no input's time."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, context)
    pool.submit(_import, kind).result()
    return pool


def _kill(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _import(kind: str) -> None:
    importlib.import_module(kind)


def _prepare(kind: str, folder: str) -> None:
    importlib.import_module(kind).prepare(Path(folder))


def _one(kind: str, folder: str, seed: int) -> tuple[str, str]:
    logging.disable(logging.CRITICAL)
    with _elsewhere() as said:
        try:
            how, details = importlib.import_module(kind).case(Path(folder), seed), ""
        except Wrong as error:
            how, details = "wrong", str(error)
        except BaseException:
            how, details = "trace", traceback.format_exc()
    said.seek(0)
    text = said.read()
    said.close()
    if "Traceback (most recent call last)" in text:  # of a thread, or in a destructor
        return "trace", text[-3000:]
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
        return "memory", f"over {MEMORY >> 30} GiB"
    return how, details


@contextlib.contextmanager
def _elsewhere():
    """Sends what is printed, by Python or below it, to the file that is given."""
    said = tempfile.TemporaryFile("w+", errors="replace")
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
    try:
        yield said
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for number, file in zip((1, 2), kept, strict=True):
            os.dup2(file, number)
            os.close(file)


def table(counts: dict[str, Counter]) -> str:
    columns = ("used", "refused", "trace", "wrong", "hang", "memory")
    lines = [f"{'inputs':<14}" + "".join(f"{name:>11}" for name in ("all", *columns))]
    for kind, found in counts.items():
        cells = (found.total(), *(found[name] for name in columns))
        lines.append(f"{kind:<14}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
