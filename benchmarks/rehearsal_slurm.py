"""Rehearses launch/train_slurm.sh under a SLURM of its own on this machine.

    python -m benchmarks.rehearsal_slurm                 # installs: minutes
    python -m benchmarks.rehearsal_slurm --venv=.venv    # takes what is installed here

Needs slurmctld, slurmd and munged (Debian, Ubuntu: apt install slurm-wlm munge). They run from a
folder, on loopback; nothing of this machine's own SLURM is touched. The last commit trains on two
nodes. Once it is told to stop as SLURM does before a time limit or a preemption, once one process
is killed: each time the job must put itself back into the queue and go on. At the end the metrics
must be those of one process, to the bit: exit status 0.
"""

import argparse
import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import cloud, rehearsal

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("127.0.0.1", "127.0.0.2")  # JAX meets at the name of the first: it must be an address
NUM_STEPS = 40

REAL = """\
real:   launch/train_slurm.sh{setup}; SLURM {version} (sbatch, srun, scancel, requeue); JAX's
        detection of the cluster; Gloo between two processes; training and checkpoints
played: two nodes are two slurmd on one machine; CPU devices stand in for GPUs{venv}"""

CONF = """\
ClusterName=rehearsal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that a rehearsal needs and this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


@contextlib.contextmanager
def slurm(folder: Path):
    """A cluster of two nodes; gives the variables with which its commands find it."""
    host = socket.gethostname().split(".")[0]
    ports = [cloud.free_port() for _ in range(3)]
    conf = folder / "slurm.conf"
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    conf.write_text(
        CONF.format(folder=folder, host=host, user=getpass.getuser(), ports=ports, nodes=NODES)
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munge = ("socket", "pid-file", "seed-file", "log-file")
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}"]
        + [f"--{name}={folder / 'munge'}.{name.split('-')[0]}" for name in munge],
        ["slurmctld", "-D", "-f", conf],
        *(["slurmd", "-D", "-N", node, "-f", conf] for node in NODES),
    ]
    env = rehearsal.plain_environment() | {"PATH": PATH, "SLURM_CONF": str(conf)}
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "a") as out:
                daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
            time.sleep(1)  # each needs the one before
        idle = lambda: ask(env, "sinfo", "-h", "-o", "%D %t").strip() == "2 idle"
        rehearsal.wait_for("two idle nodes", idle)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def ask(env: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.stdout


def kill_second_process(workdir: Path) -> None:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            second = b"SLURM_PROCID=1" in (path / "environ").read_bytes().split(b"\0")
            if second and b"otreg_jax.train" in words and f"--workdir={workdir}".encode() in words:
                os.kill(int(path.name), signal.SIGKILL)


def rehearse(args: argparse.Namespace, folder: Path) -> list[str]:
    """Everything, in order; returns how the metrics differ from those of one process."""
    repository, data, workdir = folder / "repository", folder / "data", folder / "run"
    data.mkdir()
    repository.mkdir()
    rehearsal.write_data(data)
    archive = f"git archive HEAD | tar -x -C '{repository}'"
    subprocess.run(archive, shell=True, cwd=rehearsal.ROOT, check=True)
    if args.venv:
        rehearsal.link_venv(args.venv, repository / ".venv", "cpu")
    with slurm(folder / "slurm") as env:
        linked = f";\n        the installation: {args.venv} is linked" if args.venv else ""
        setup = "" if args.venv else " and setup.sh with pip"
        version = ask(env, "sinfo", "--version").split()[-1]
        print(REAL.format(setup=setup, version=version, venv=linked))
        rehearsal.say("training alone")
        alone = rehearsal.train_alone(folder, data, NUM_STEPS, len(NODES))
        env |= rehearsal.COMPILE_FAST | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "OTREG_ACCELERATOR": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        log = folder / "slurm.log"
        submit = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", "launch/train_slurm.sh"]
        flags = [f"--workdir={workdir}", *rehearsal.flags(str(data), NUM_STEPS)]
        job = subprocess.check_output([*submit, *flags], cwd=repository, env=env, text=True).strip()
        describe = lambda: ask(env, "scontrol", "show", "job", job)
        restarts = lambda: int(re.search(r"Restarts=(\d+)", describe())[1])
        saved = lambda: [
            int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
        ]
        faults = {
            "told to stop": lambda: ask(env, "scancel", "--signal=TERM", job),
            "kill -9 of one process": lambda: kill_second_process(workdir),
        }
        step = 0
        for number, (name, strike) in enumerate(faults.items(), 1):
            later = lambda step=step: max(saved(), default=0) > step and max(saved())
            step = rehearsal.wait_for(f"a checkpoint before: {name}", later)
            rehearsal.say(f"step {step} is saved; {name}")
            strike()
            rehearsal.wait_for(f"a requeue after: {name}", lambda n=number: restarts() == n)
            rehearsal.say(f"job {job} is back in the queue")
            step = max(saved())
        ended = lambda: re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|NODE_FAIL)", describe())
        state = rehearsal.wait_for("the end of the job", ended)[1]
        rehearsal.say(f"job {job} is {state} after {restarts()} restarts; step {max(saved())}")
        if state != "COMPLETED":
            raise RuntimeError(log.read_text()[-3000:])
        return rehearsal.differences(workdir, alone)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, help="use this environment, install nothing")
    parser.add_argument("--keep", type=Path, help="work here, and keep everything")
    args = parser.parse_args(argv)
    if missing():
        sys.exit(f"not installed: {', '.join(missing())} (apt install slurm-wlm munge)")
    return rehearsal.run(rehearse, args)


if __name__ == "__main__":
    sys.exit(main())
