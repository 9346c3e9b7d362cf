"""Rehearses a run on a TPU slice, from the first line of launch/train_tpu.sh to the report.

    python -m benchmarks.rehearsal                       # installs on every played TPU VM: minutes
    python -m benchmarks.rehearsal --venv=.venv          # takes what is installed here instead
    python -m benchmarks.rehearsal --venv=.venv --faults=preempt,kill,unavailable,full-disk
    python -m benchmarks.rehearsal --venv=.venv --slices=2 --workers=1 [--group]

The last commit trains; the cloud is played, on loopback (benchmarks/cloud.py). What is real and
what is played is printed. Faults, one after the other, each after a checkpoint:

    preempt      the TPU is gone, with the disks of its VMs
    kill         kill -9 of the training on the last worker; what was compiled is deleted as well
    unavailable  the bucket answers 503 for 20 s
    full-disk    nothing can be written on the last worker for 20 s (root only: it mounts a tmpfs)

At the end the metrics must be those of one process on a local disk, to the bit: exit status 0.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cloud
from benchmarks.faults import read_metrics, write_data

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "rehearsal"
OUTAGE_SECONDS = 20
PATIENCE = 900  # seconds to wait for anything
ZONE = "us-central2-b"

CONFIG = {
    "checkpoint_every": 5,
    "log_every": 1,
    "batch_size": 4,
    "stall_seconds": 240,  # on a machine that does other work too
    "data.num_mels": 16,
    "data.num_buckets": 1,
    "data.augment.freq_masks": 1,
    "data.augment.time_masks": 0,
    "tokenizer.model_type": "word",
    "encoder.embed_dim": 16,
    "encoder.num_layers": 1,
    "encoder.num_heads": 2,
    "encoder.mlp_dim": 32,
    "encoder.max_positions": 64,
    "adapter.hidden_dim": 16,
    "llm.embed_dim": 16,
    "llm.num_layers": 1,
    "llm.num_heads": 2,
    "llm.head_dim": 8,
    "llm.num_kv_heads": 1,
    "llm.mlp_dim": 32,
    "otreg.num_iters": 10,
    "optim.warmup_steps": 2,
    "decode.max_tokens": 6,
}
COMPILE_FAST = dict(
    JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
)

REAL = """\
real:   launch/train_tpu.sh, tpu_worker.sh{setup}; git archive; one home directory a worker;
        JAX's detection of the cluster and its coordination service; Gloo between {count} processes;
        a Google Cloud Storage server (fake-gcs-server), spoken to by gcsfs and Orbax;
        training, checkpoints, evaluation and export, all in gs://{bucket}
played: gcloud, ssh, names of instances (benchmarks/played/gcloud.py); their metadata servers;
        the chips: a PCI bus that shows some, and a CPU device in place of each;
        the identity that the storage asks for{venv}"""


# ---------------------------------------------------------------- a run, anywhere


def flags(data: str, num_steps: int) -> list[str]:
    """Of otreg_jax.train: a small run on the manifest in a folder."""
    values = CONFIG | {"data.train": f"{data}/train.jsonl", "data.dev": f"{data}/train.jsonl"}
    values["num_steps"] = num_steps
    return ["--config=configs/manifest.py", *(f"--config.{k}={v}" for k, v in values.items())]


def plain_environment() -> dict[str, str]:
    """The variables of this process, without those of its own JAX and Python."""
    own = ("JAX_", "TPU_", "PYTHON", "OTREG_", "VIRTUAL_ENV", "XLA_")
    return {k: v for k, v in os.environ.items() if not k.startswith(own)}


def train_alone(folder: Path, data: Path, num_steps: int, devices: int) -> Path:
    """One process, as many devices, a local disk; returns the work directory."""
    workdir, log = folder / "alone", folder / "alone.log"
    env = plain_environment() | COMPILE_FAST
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "otreg_jax.train", f"--workdir={workdir}"]
    with open(log, "w") as file:
        done = subprocess.run(
            [*command, *flags(str(data), num_steps)], cwd=ROOT, env=env, stdout=file, stderr=file
        )
    if done.returncode:
        raise RuntimeError(f"training alone failed:\n{log.read_text()[-3000:]}")
    return workdir


def differences(workdir: Path, alone: Path) -> list[str]:
    """Between the metrics of two runs, but for what depends on the clock."""
    ours, theirs = read_metrics(workdir), read_metrics(alone)
    problems = [f"step {step} is in one run only" for step in sorted(ours.keys() ^ theirs.keys())]
    for step in sorted(ours.keys() & theirs.keys()):
        for key in sorted(ours[step].keys() | theirs[step].keys()):
            one, other = ours[step].get(key), theirs[step].get(key)
            if one != other:
                problems.append(f"step {step}: {key} is {one} instead of {other}")
    return problems


def wait_for(what: str, happened, process=None) -> Any:
    """What `happened` returns once that is true, while `process` runs."""
    deadline = time.monotonic() + PATIENCE
    while not (result := happened()):
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise TimeoutError(f"it did not come: {what}")
        time.sleep(0.1)
    return result


def link_venv(venv: Path, into: Path, accelerator: str) -> None:
    """Makes a folder .venv that launch/setup.sh takes for installed."""
    (into / "bin").mkdir(parents=True)
    python = into / "bin" / "python"
    python.write_text(
        '#!/bin/sh\n[ "$2" != pip ] || { echo "not installing into a link" >&2; exit 1; }\n'
        f'exec {venv.absolute()}/bin/python "$@"\n'
    )
    python.chmod(0o755)
    of = "cat requirements*.txt pyproject.toml | cksum"  # as in setup.sh: the shell orders them
    with tempfile.TemporaryDirectory() as copy:
        command = f"git archive HEAD | tar -xC {copy} && cd {copy} && {of}"
        checksum = subprocess.check_output(command, shell=True, cwd=ROOT, text=True).strip()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stamp = f"{version} {accelerator} {checksum}\n"
    (into / ".installed-requirements.txt").write_text(stamp)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# ---------------------------------------------------------------- the played cloud


class Stage(NamedTuple):
    """Where the rehearsal takes place."""

    args: argparse.Namespace
    folder: Path
    cloud: Path  # what the played gcloud keeps, the homes of the workers among it
    storage: dict[str, str]  # variables for the clients of the storage
    outage: cloud.Outage
    files: Any  # the storage, by gcsfs
    starts: list[float]  # when training was started, Unix times

    @property
    def num_steps(self) -> int:
        return 10 * (2 + len(self.args.faults))

    @property
    def slices(self) -> list[str]:
        several = [f"run-{i}" for i in range(self.args.slices)]
        return several if self.args.slices > 1 else ["run"]

    @property
    def homes(self) -> list[Path]:
        return [self.cloud / f"{n}-{w}" for n in self.slices for w in range(self.args.workers)]


def set_stage(args, folder: Path, stack: contextlib.ExitStack) -> Stage:
    """Starts the storage and a metadata server for each worker; installs the played gcloud."""
    outage = cloud.Outage()
    storage = stack.enter_context(cloud.storage_server(outage))
    os.environ.update(storage)
    import gcsfs  # reads these variables

    files = gcsfs.GCSFileSystem(use_listings_cache=False)
    files.mkdir(BUCKET)
    stage = Stage(args, folder, folder / "cloud", storage, outage, files, [])
    stack.callback(end, stage.homes)
    (stage.cloud / "environment").mkdir(parents=True)
    (stage.cloud / "workers").write_text(str(args.workers))
    (folder / "bin").mkdir()
    cloud.install_gcloud(folder / "bin")
    port = cloud.free_port()
    for index in range(len(stage.homes)):
        # Instance groups know nothing of each other: the launcher says which slice they are.
        slices = 1 if args.group else args.slices
        said = cloud.attributes(slices, args.workers, *divmod(index, args.workers))
        address = stack.enter_context(cloud.metadata_server(said))
        variables = cloud.machine(folder / "machines" / str(index), address, port) | storage
        variables |= COMPILE_FAST | {"JAX_NUM_CPU_DEVICES": "1"}
        (stage.cloud / "environment" / f"{index}.json").write_text(json.dumps(variables))
    if args.group:  # an instance is called like its home
        (folder / "bin" / "hostname").write_text('#!/bin/sh\nbasename "$HOME"\n')
        (folder / "bin" / "hostname").chmod(0o755)
    if args.venv:
        link_venv(args.venv, stage.cloud / "skeleton" / "otreg_jax" / ".venv", "tpu")
    if "full-disk" in args.faults:
        home = stage.homes[-1]
        home.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", home], check=True)
        stack.callback(subprocess.run, ["umount", "-l", home])
    return stage


def environment(stage: Stage) -> dict[str, str]:
    """Of the user's own machine."""
    own = {
        "PATH": f"{stage.folder / 'bin'}:{os.environ['PATH']}",
        "PLAYED_CLOUD": str(stage.cloud),
        "OTREG_POLL_SECONDS": "1",
        "OTREG_FINISH_SECONDS": "120",
    }
    return plain_environment() | stage.storage | own


def end(homes: list[Path], word: str = "") -> None:
    """kill -9 of the processes of these homes that have the word in their command."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (path / "environ").read_bytes().split(b"\0")
            if any(f"HOME={home}".encode() in variables for home in homes):
                if word.encode() in (path / "cmdline").read_bytes():
                    os.kill(int(path.name), signal.SIGKILL)


def checkpoints(stage: Stage) -> list[int]:
    """The steps that are saved, wholly."""
    found = stage.files.glob(f"{BUCKET}/run/checkpoints/*/commit_success.txt")
    return sorted(int(Path(name).parent.name) for name in found)


def watch_starts(stage: Stage) -> None:
    """Notes when training starts on the first worker."""
    last = None
    while True:
        with contextlib.suppress(OSError):
            now = (stage.homes[0] / "otreg_jax" / "train.pid").stat().st_mtime_ns
            if now != last:
                last = now
                stage.starts.append(now / 1e9)
        time.sleep(0.05)


# ---------------------------------------------------------------- faults


def preempt(stage: Stage) -> None:
    (stage.cloud / "request").write_text("SUSPENDED")
    end(stage.homes)
    for home in stage.homes:
        shutil.rmtree(home, ignore_errors=True)


def kill(stage: Stage) -> None:
    stage.files.rm(f"{BUCKET}/run/compiled", recursive=True)
    end(stage.homes[-1:], "otreg_jax.train")


def unavailable(stage: Stage) -> None:
    stage.outage.begin(OUTAGE_SECONDS)


def full_disk(stage: Stage) -> None:
    filler = stage.homes[-1] / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    time.sleep(OUTAGE_SECONDS)
    filler.unlink()


FAULTS = {"preempt": preempt, "kill": kill, "unavailable": unavailable, "full-disk": full_disk}


# ---------------------------------------------------------------- the acts


def train(stage: Stage) -> None:
    """launch/train_tpu.sh, with the faults."""
    group = [f"--type=tpu7x-{8 * stage.args.workers}", "--project=p"]  # four chips a worker
    command = [
        "bash",
        "launch/train_tpu.sh",
        "--name=run",
        f"--zone={ZONE}",
        "--spot",
        "--keep",
        *(group if stage.args.group else ["--type=v4-16"]),
        f"--node-count={stage.args.slices}",
        f"--workdir=gs://{BUCKET}/run",
        *flags(f"gs://{BUCKET}/data", stage.num_steps),
    ]
    log = stage.folder / "train_tpu.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(stage), stdout=file, stderr=file
        )
    threading.Thread(target=watch_starts, args=(stage,), daemon=True).start()
    try:
        step = 0
        for fault in stage.args.faults:
            later = lambda step=step: [s for s in checkpoints(stage) if s > step]
            step = wait_for(f"a checkpoint before {fault}", later, process)[-1]
            say(f"step {step} is saved; {fault}")
            started = len(stage.starts)
            FAULTS[fault](stage)
            if fault in ("preempt", "kill"):
                again = lambda started=started: len(stage.starts) > started
                wait_for(f"a restart after {fault}", again, process)
        status = process.wait(PATIENCE)
    finally:
        process.kill()
    printed = log.read_text()
    print(
        *(f"    {line}" for line in printed.splitlines() if line.startswith("train_tpu:")), sep="\n"
    )
    if status:
        raise RuntimeError(f"train_tpu.sh ended with {status}:\n{printed[-3000:]}")
    say(f"trained to step {checkpoints(stage)[-1]}")


def on_workers(stage: Stage, command: str, worker: str = "all") -> None:
    """What a user types next: a command on the workers, through gcloud."""
    command = f"cd otreg_jax && {command}"
    if stage.args.group:
        reach = [["compute", "ssh", home.name] for home in stage.homes]
    else:
        reach = [
            ["compute", "tpus", "tpu-vm", "ssh", name, f"--worker={worker}"]
            for name in stage.slices
        ]
    processes = [
        subprocess.Popen(
            ["gcloud", *words, f"--command={command}", f"--zone={ZONE}"],
            env=environment(stage),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in reach[: None if worker == "all" else 1]
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{command}:\n" + "\n".join(printed)[-3000:])


def evaluate_and_export(stage: Stage) -> None:
    python = ".venv/bin/python -m otreg_jax"
    on_workers(stage, f"{python}.evaluate --workdir=gs://{BUCKET}/run")
    report = stage.files.cat(f"{BUCKET}/run/eval/report.html")
    say(f"evaluated on all workers; the report has {len(report)} bytes")
    alone = f"JAX_NUM_PROCESSES=1 {python}.export"
    on_workers(stage, f"{alone} --workdir=gs://{BUCKET}/run --out=gs://{BUCKET}/exported", "0")
    names = [Path(path).name for path in stage.files.find(f"{BUCKET}/exported")]
    if not any(name.endswith(".safetensors") for name in names):
        raise RuntimeError(f"export wrote no weights to gs://{BUCKET}/exported, only {names}")
    say(f"exported: {', '.join(sorted(names))}")


def first_steps(starts: list[float], workdir: Path) -> list[float]:
    """Seconds from each start of training to its first step, if that is still in the log."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    times = [line["time"] for line in map(json.loads, lines) if "time" in line]
    found = []
    for start, stop in zip(starts, [*starts[1:], float("inf")], strict=True):
        inside = [moment for moment in times if start < moment < stop]
        found += [min(inside) - start] if inside else []
    return found


def rehearse(args: argparse.Namespace, folder: Path) -> list[str]:
    """Everything, in order; returns how the metrics differ from those of one process."""
    with contextlib.ExitStack() as stack:
        stage = set_stage(args, folder, stack)
        linked = f";\n        the installation: {args.venv} is linked" if args.venv else ""
        setup = "" if args.venv else ", setup.sh with pip"
        print(REAL.format(setup=setup, count=len(stage.homes), bucket=BUCKET, venv=linked))
        data = folder / "data"
        data.mkdir()
        write_data(data)
        stage.files.put(f"{data}/", f"{BUCKET}/data/", recursive=True)
        say("training alone, on a local disk")
        alone = train_alone(folder, data, stage.num_steps, len(stage.homes))
        say("launch/train_tpu.sh")
        train(stage)
        evaluate_and_export(stage)
        pod = folder / "pod"
        pod.mkdir()
        stage.files.get(f"{BUCKET}/run/metrics.jsonl", str(pod / "metrics.jsonl"))
        seconds = ", ".join(f"{s:.1f}" for s in first_steps(stage.starts, pod))
        say(
            f"seconds from a start of training to its first step: {seconds}. The first start "
            "compiled, and that after kill, as what was compiled was deleted; others loaded it"
        )
        return differences(pod, alone)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--venv", type=Path, help="use this environment, install nothing")
    add("--faults", default="preempt", help=f"of {','.join(FAULTS)} (default: %(default)s)")
    add("--workers", type=int, default=2, help="of a slice (default: 2)")
    add("--slices", type=int, default=1)
    add("--group", action="store_true", help="instance groups, as for Ironwood")
    add("--keep", type=Path, help="work here, and keep everything")
    args = parser.parse_args(argv)
    args.faults = [fault for fault in args.faults.split(",") if fault]
    unknown = set(args.faults) - set(FAULTS)
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; choose from {', '.join(FAULTS)}")
    if "full-disk" in args.faults and (os.geteuid() or not args.venv):
        parser.error("full-disk needs root, and --venv: the disk that fills up is a small one")
    return args


def run(rehearse, args: argparse.Namespace) -> int:
    """Runs a rehearsal in a folder, prints how it ended; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and cleans up
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="rehearsal-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    problems = rehearse(args, folder)
    print(f"metrics equal those of one process to the bit: {'no' if problems else 'yes'}")
    print(*(f"  - {problem}" for problem in problems[:20]), sep="\n")
    if not problems and not args.keep:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run(rehearse, parse_args(None)))
