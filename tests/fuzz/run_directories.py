"""Damaged run directories: checkpoints, configuration, tokenizer, metrics, evaluation."""

import functools
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import mutate
import numpy as np
import toy_run
from harness import Wrong, refusal

from otreg_jax import build, checkpoint, evaluate, optim, report, rundir, sharding, tracking
from otreg_jax import config as config_lib
from otreg_jax import train_step as step_lib
from otreg_jax.data import sets, sources, tokenization

SETTINGS = {"in_domain": ["dev"], "normalizer": {"style": "whisper", "version": 2}}


def prepare(folder: Path) -> None:
    """A run with checkpoints of the steps 3 and 6, and an evaluation of the second."""
    manifest = toy_run.write_set(folder / "set", 2, seed=0)
    workdir = toy_run.make_run(folder / "good", dev=manifest)
    config = config_lib.load(workdir / "config.json")
    tokenizer = tokenization.load_tokenizer(workdir)
    _, params = build.build(config, tokenizer)
    params, frozen = build.split(params, config)
    state = step_lib.init_state(params, optim.make_optimizer(config))._replace(step=np.int32(6))
    state = jax.device_put(state, sharding.tree_shardings(state, sharding.data_mesh()))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, 6, checkpoint.provenance(config, tokenizer, frozen))
    files = rundir.of(workdir)
    rows = [
        {
            "set": "dev",
            "id": f"u{i}",
            "reference": "a b",
            "hypothesis": "a",
            "errors": 1,
            "words": 2,
        }
        | {"score": -1.0, "unfinished": False, "lang": "en"}
        for i in range(3)
    ]
    results = SETTINGS | {"step": 6, "sets": evaluate.score_rows(rows, ["dev"])}
    rundir.write_json(files.results, results)
    rundir.write_lines(files.hypotheses, rows)
    rundir.write_lines(files.partial, [SETTINGS, *rows])
    np.savez_compressed(files.figures, speech=np.ones((4, 3)), text=np.ones((2, 3)))
    rundir.write_json(files.description, sets.describe(sources.read_manifest(manifest)))


def case(folder: Path, seed: int) -> str:
    rng = random.Random(seed)
    workdir = folder / "bad"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(folder / "good", workdir)
    files = rundir.of(workdir)
    own = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    saved = [path for path in own if "checkpoints" in path.parts]
    damaged = [
        rng.choice(saved if rng.random() < 0.5 else own) for _ in range(rng.choice([1, 1, 2]))
    ]
    for path in damaged:
        _damage(rng, path)
    outcomes = [_load(folder, workdir, Path(files.config) in damaged)]
    for read in (_evaluation, _metrics):
        _, message = _refused(read, workdir)
        outcomes.append("refused" if message else "used")
    return "refused" if "refused" in outcomes else "used"


def _damage(rng: random.Random, path: Path) -> None:
    if not path.is_file():
        return
    data, accident = path.read_bytes(), rng.random()
    if accident < 0.4:
        path.write_bytes(mutate.of_bytes(rng, data))
    elif accident < 0.55 and data:
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    elif accident < 0.65:
        path.write_bytes(b"")
    elif accident < 0.75:
        path.write_bytes(bytes(len(data)))
    elif accident < 0.85:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    else:
        path.unlink()
        if accident > 0.93:
            path.mkdir()


def _refused(read, workdir: Path):
    try:
        return read(workdir), None
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        if str(workdir) not in message:
            raise Wrong(f"no file is named: {message}") from None
        return None, message


def _load(folder: Path, workdir: Path, other_configuration: bool) -> str:
    run, message = _refused(build.load_run, workdir)
    if message:
        return "refused"
    if run.step not in (3, 6):
        raise Wrong(f"step {run.step}")
    known = _known(folder, run.step)
    if not other_configuration:
        same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), run.params, known)
        if not all(jax.tree.leaves(same)):
            raise Wrong(f"other weights than those of step {run.step}, and nothing is said")
    return "used"


@functools.cache
def _known(folder: Path, step: int):
    return jax.tree.map(np.asarray, build.load_run(folder / "good", str(step)).params)


def _evaluation(workdir: Path) -> None:
    """What a comparison with this run reads of it."""
    stored = evaluate._stored(workdir, SETTINGS, checkpoint.NEWEST)
    if stored:
        column = evaluate._column(rundir.of(workdir), config_lib.default(), *stored)
        report.page([column._replace(curve=())], versions={})


def _metrics(workdir: Path) -> None:
    tracking.time_before(rundir.of(workdir), 3)
    sets.longest_seconds(workdir)
