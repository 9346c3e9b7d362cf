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

from benchmarks import cloud
from benchmarks.faults import read_metrics, write_data

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("preempt", "kill", "unavailable", "full-disk")
BUCKET = "rehearsal"
OUTAGE_SECONDS = 20
PATIENCE = 900  # seconds to wait for anything

CONFIG = {
    "checkpoint_every": 5, "log_every": 1, "batch_size": 4, "stall_seconds": 60,
    "data.num_mels": 16, "data.num_buckets": 1,
    "data.augment.freq_masks": 1, "data.augment.time_masks": 0, "tokenizer.model_type": "word",
    "encoder.embed_dim": 16, "encoder.num_layers": 1, "encoder.num_heads": 2,
    "encoder.mlp_dim": 32, "encoder.max_positions": 64, "adapter.hidden_dim": 16,
    "llm.embed_dim": 16, "llm.num_layers": 1, "llm.num_heads": 2, "llm.head_dim": 8,
    "llm.num_kv_heads": 1, "llm.mlp_dim": 32, "otreg.num_iters": 10, "optim.warmup_steps": 2,
    "decode.max_tokens": 6,
}  # fmt: skip

COMPILE_FAST = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}  # fmt: skip

REAL = """\
real:   launch/train_tpu.sh, tpu_worker.sh{setup}; git archive; one home directory a worker;
        JAX's detection of the cluster and its coordination service; Gloo between {count} processes;
        a Google Cloud Storage server (fake-gcs-server), spoken to by gcsfs and Orbax;
        training, checkpoints, evaluation and export, all in gs://{bucket}
played: gcloud and ssh (benchmarks/played/gcloud.py); the metadata server of each TPU VM;
        the chips: a PCI bus that shows some, and a CPU device in place of each;
        the identity that the storage asks for{venv}"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, help="use this environment, install nothing")
    parser.add_argument(
        "--faults", default="preempt", help=f"of {','.join(FAULTS)} (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="of a slice (default: 2)")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--group", action="store_true", help="instance groups (Ironwood)")
    parser.add_argument("--keep", type=Path, help="work here, and keep everything")
    args = parser.parse_args(argv)
    args.faults = [fault for fault in args.faults.split(",") if fault]
    unknown = set(args.faults) - set(FAULTS)
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; choose from {', '.join(FAULTS)}")
    if "full-disk" in args.faults and (os.geteuid() or not args.venv):
        parser.error("full-disk needs root, and --venv: the disk that fills up is a small one")
    return args


class Rehearsal:
    """The played cloud in a folder, and what is done to it."""

    def __init__(self, args, folder: Path, storage: dict, outage: cloud.Outage, stack):
        self.args, self.folder, self.storage, self.outage = args, folder, storage, outage
        self.count = args.slices * args.workers
        self.cloud = folder / "cloud"
        self.bin = folder / "bin"
        self.begun = time.monotonic()
        self.starts: list[float] = []  # when training was started, Unix times
        (self.cloud / "environment").mkdir(parents=True)
        self.bin.mkdir()
        cloud.install_gcloud(self.bin)
        (self.cloud / "workers").write_text(str(args.workers))
        port = cloud.free_port()
        for index in range(self.count):
            # Instance groups know nothing of each other: the launcher says which slice they are.
            slices = 1 if args.group else args.slices
            said = cloud.attributes(slices, args.workers, *divmod(index, args.workers))
            address = stack.enter_context(cloud.metadata_server(said))
            variables = cloud.machine(folder / "machines" / str(index), address, port) | storage
            variables |= COMPILE_FAST | {"JAX_NUM_CPU_DEVICES": "1"}
            (self.cloud / "environment" / f"{index}.json").write_text(json.dumps(variables))
        if args.venv:
            self.link_venv()

    def link_venv(self) -> None:
        """What a new home directory holds: an environment that looks installed."""
        venv = self.cloud / "skeleton" / "otreg_jax" / ".venv"
        (venv / "bin").mkdir(parents=True)
        python = venv / "bin" / "python"
        python.write_text(
            '#!/bin/sh\n[ "$2" != pip ] || { echo "not installing into a link" >&2; exit 1; }\n'
            f'exec {self.args.venv.absolute()}/bin/python "$@"\n'
        )
        python.chmod(0o755)
        requirements = "git archive HEAD | tar -xO --wildcards 'requirements*.txt' setup.py | cksum"
        checksum = subprocess.check_output(requirements, shell=True, cwd=ROOT, text=True).strip()
        version = "{}.{}".format(*sys.version_info)
        (venv / ".installed-requirements.txt").write_text(f"{version} tpu {checksum}\n")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", flush=True)

    def environment(self) -> dict[str, str]:
        """Of the user's own machine, without what belongs to this process's JAX."""
        own = ("JAX_", "TPU_", "PYTHON", "OTREG_", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        return kept | self.storage | {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PLAYED_CLOUD": str(self.cloud),
            "OTREG_POLL_SECONDS": "1", "OTREG_FINISH_SECONDS": "120",
        }  # fmt: skip

    # ---------------------------------------------------------------- what is on the cloud

    def names(self) -> list[str]:
        return ["run"] if self.args.slices == 1 else [f"run-{i}" for i in range(self.args.slices)]

    def homes(self) -> list[Path]:
        return [self.cloud / f"{n}-{w}" for n in self.names() for w in range(self.args.workers)]

    def processes(self, homes: list[Path], word: str = "") -> list[int]:
        """Processes of these homes whose command has the word."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (path / "environ").read_bytes().split(b"\0")
                if any(f"HOME={home}".encode() in variables for home in homes):
                    if word.encode() in (path / "cmdline").read_bytes():
                        found.append(int(path.name))
        return found

    def end(self, homes: list[Path], word: str = "") -> None:
        for pid in self.processes(homes, word):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def checkpoints(self) -> list[int]:
        """Steps whose save is complete."""
        self.files.invalidate_cache()
        folder = f"{BUCKET}/run/checkpoints"
        names = [Path(p).name for p in self.files.ls(folder)] if self.files.exists(folder) else []
        return sorted(int(name) for name in names if name.isdigit())

    def wait_for(self, what: str, happened, process=None):
        deadline = time.monotonic() + PATIENCE
        while not (result := happened()):
            if time.monotonic() > deadline or process and process.poll() is not None:
                raise TimeoutError(f"{what}: it did not come")
            time.sleep(0.1)
        return result

    def watch_starts(self) -> None:
        """Notes when training starts on the first worker."""
        pid_file, last = self.homes()[0] / "otreg_jax" / "train.pid", None
        while True:
            with contextlib.suppress(OSError):
                if (now := pid_file.stat().st_mtime_ns) != last:
                    last = now
                    self.starts.append(now / 1e9)
            time.sleep(0.05)

    # ---------------------------------------------------------------- faults

    def preempt(self) -> None:
        self.end(self.homes())
        for home in self.homes():
            shutil.rmtree(home, ignore_errors=True)
        (self.cloud / "request").write_text("SUSPENDED")

    def kill(self) -> None:
        self.files.rm(f"{BUCKET}/run/compiled", recursive=True)
        self.end(self.homes()[-1:], "otreg_jax.train")

    def unavailable(self) -> None:
        self.outage.begin(OUTAGE_SECONDS)

    def full_disk(self) -> None:
        filler = self.homes()[-1] / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(OUTAGE_SECONDS)
        filler.unlink()

    # ---------------------------------------------------------------- the run

    def launch_command(self) -> list[str]:
        kind = (
            ["--type=tpu7x-16", "--group", "--project=p"] if self.args.group else ["--type=v4-16"]
        )
        return [
            "bash", "launch/train_tpu.sh", "--name=run", "--zone=us-central2-b", *kind, "--spot",
            f"--node-count={self.args.slices}", "--config=configs/manifest.py",
            f"--workdir=gs://{BUCKET}/run", "--keep", *self.flags(f"gs://{BUCKET}/data"),
        ]  # fmt: skip

    def flags(self, data: str) -> list[str]:
        values = CONFIG | {"data.train": f"{data}/train.jsonl", "data.dev": f"{data}/train.jsonl"}
        values["num_steps"] = 10 * (2 + len(self.args.faults))
        return [f"--config.{key}={value}" for key, value in values.items()]

    def train(self) -> None:
        """launch/train_tpu.sh, with the faults."""
        with open(self.folder / "train_tpu.log", "w") as log:
            process = subprocess.Popen(
                self.launch_command(), cwd=ROOT, env=self.environment(), stdout=log, stderr=log
            )
        threading.Thread(target=self.watch_starts, daemon=True).start()
        try:
            last = 0
            for fault in self.args.faults:
                reached = lambda last=last: [s for s in self.checkpoints() if s > last]
                last = self.wait_for(f"a checkpoint before {fault}", reached, process)[-1]
                self.say(f"step {last} is saved; {fault}")
                started = len(self.starts)
                getattr(self, fault.replace("-", "_"))()
                if fault in ("preempt", "kill"):
                    again = lambda started=started: len(self.starts) > started
                    self.wait_for(f"a restart after {fault}", again, process)
            status = process.wait(PATIENCE)
        finally:
            process.kill()
        printed = (self.folder / "train_tpu.log").read_text()
        for line in printed.splitlines():
            if line.startswith("train_tpu:"):
                print("         ", line)
        if status:
            raise RuntimeError(f"train_tpu.sh ended with {status}:\n{printed[-3000:]}")
        self.say(f"trained to step {self.checkpoints()[-1]}")

    def on_workers(self, command: str, worker: str = "all") -> str:
        """What a user types next: a command on the workers, through gcloud."""
        tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
        flags = [f"--worker={worker}", f"--command=cd otreg_jax && {command}"]
        running = [
            subprocess.Popen(
                [*tpu_vm, name, *flags, "--zone=us-central2-b"], env=self.environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for name in self.names()[: None if worker == "all" else 1]
        ]  # fmt: skip
        printed = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError(f"{command}:\n" + "\n".join(printed)[-3000:])
        return "\n".join(printed)

    def evaluate_and_export(self) -> None:
        python = ".venv/bin/python -m otreg_jax"
        self.on_workers(f"{python}.evaluate --workdir=gs://{BUCKET}/run")
        report = self.files.cat(f"{BUCKET}/run/eval/report.html")
        self.say(f"evaluated on all workers; the report has {len(report)} bytes")
        alone = f"JAX_NUM_PROCESSES=1 {python}.export"
        self.on_workers(f"{alone} --workdir=gs://{BUCKET}/run --out=gs://{BUCKET}/exported", "0")
        self.say(
            f"exported: {' '.join(Path(p).name for p in self.files.find(f'{BUCKET}/exported'))}"
        )

    def reference(self, data: Path) -> Path:
        """One process, as many devices, a local disk."""
        workdir = self.folder / "alone"
        env = {k: v for k, v in self.environment().items() if k not in self.storage}
        env |= COMPILE_FAST | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.count)}
        command = [
            sys.executable, "-m", "otreg_jax.train", "--config=configs/manifest.py",
            f"--workdir={workdir}", *self.flags(str(data)),
        ]  # fmt: skip
        with open(self.folder / "alone.log", "w") as log:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        if done.returncode:
            raise RuntimeError((self.folder / "alone.log").read_text()[-3000:])
        return workdir

    def compare(self, alone: Path) -> list[str]:
        """Differences between the metrics of the two runs."""
        target = self.folder / "pod"
        target.mkdir()
        self.files.get(f"{BUCKET}/run/metrics.jsonl", str(target / "metrics.jsonl"))
        pod, reference = read_metrics(target), read_metrics(alone)
        problems = [f"steps {sorted(pod.keys() ^ reference.keys())} in one run only"]
        problems = problems if pod.keys() != reference.keys() else []
        for step in sorted(pod.keys() & reference.keys()):
            for key in sorted(pod[step].keys() | reference[step].keys()):
                one, other = pod[step].get(key), reference[step].get(key)
                if one != other:
                    problems.append(f"step {step}: {key} is {one} instead of {other}")
        return problems

    def first_steps(self) -> list[float]:
        """Seconds from each start of training to its first step, if that is still in the log."""
        lines = (self.folder / "pod" / "metrics.jsonl").read_text().splitlines()
        times = [line["time"] for line in map(json.loads, lines) if "time" in line]
        ends = [*self.starts[1:], float("inf")]
        found = []
        for start, end in zip(self.starts, ends, strict=True):
            inside = [moment for moment in times if start < moment < end]
            found += [min(inside) - start] if inside else []
        return found


def rehearse(args, folder: Path) -> list[str]:
    """Everything, in order; returns what is wrong."""
    outage = cloud.Outage()
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(cloud.storage_server(outage))
        os.environ.update(storage)
        import gcsfs  # reads them

        self = Rehearsal(args, folder, storage, outage, stack)
        print(
            REAL.format(
                setup="" if args.venv else ", setup.sh with pip", count=self.count, bucket=BUCKET,
                venv=f";\n        the installation: {args.venv} is linked" if args.venv else "",
            )
        )  # fmt: skip
        self.files = gcsfs.GCSFileSystem()
        self.files.mkdir(BUCKET)
        data = folder / "data"
        data.mkdir()
        write_data(data)
        self.files.put(f"{data}/", f"{BUCKET}/data/", recursive=True)
        if "full-disk" in args.faults:
            home = self.homes()[-1]
            home.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", home], check=True)
            stack.callback(subprocess.run, ["umount", "-l", home])
        stack.callback(
            lambda: [os.kill(pid, signal.SIGKILL) for pid in self.processes(self.homes())]
        )
        self.say("training alone, on a local disk")
        alone = self.reference(data)
        self.say("launch/train_tpu.sh")
        self.train()
        self.evaluate_and_export()
        problems = self.compare(alone)
        seconds = self.first_steps()
        self.say(
            "seconds from the start of training to its first step: "
            + ", ".join(f"{s:.1f}" for s in seconds)
            + f" (the first compiled; after {' and '.join(args.faults)} it restarted: what was "
            "compiled is in the bucket, unless the fault deleted it)"
        )
    return problems


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    folder = args.keep or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    folder.mkdir(parents=True, exist_ok=True)
    problems = rehearse(args, folder)
    print(
        f"metrics of the pod equal those of one process to the bit: {'no' if problems else 'yes'}"
    )
    for problem in problems[:20]:
        print("  -", problem)
    if not problems and not args.keep:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
