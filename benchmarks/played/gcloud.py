"""Plays gcloud: keeps what was requested in files, and runs what is sent to the TPU VMs in one home
directory for each. In $PLAYED_CLOUD:

    calls         every call, one a line, arguments quoted as in a shell
    request       the state of the request; it is there while the request is
    create, scp   what the next requests and copies come to, a line each: a state of the request,
                  or an error message if it has a space
    failed        why a request failed
    workers       the number of workers of a slice; 2 if it is not there
    slices        the names of the slices, a line each
    environment/N.json   further variables of worker N, counted over all slices
    skeleton/     what a new home holds, if anything
    NAME-N/       the home of worker N of slice NAME
"""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

HOME = pathlib.Path(os.environ["PLAYED_CLOUD"])


def read(name: str, default: str = "") -> str:
    path = HOME / name
    return path.read_text().strip() if path.exists() else default


def pop(name: str) -> str:
    """Takes the first line of a file."""
    lines = read(name).splitlines()
    if lines:
        (HOME / name).write_text("".join(line + "\n" for line in lines[1:]))
    return lines[0] if lines else ""


def fail(message: str) -> None:
    sys.exit(f"ERROR: (gcloud) {message}")


def homes(slice_name: str, worker: str) -> list[pathlib.Path]:
    count = int(read("workers", "2"))
    chosen = range(count) if worker == "all" else [int(worker)]
    return [HOME / f"{slice_name}-{index}" for index in chosen]


def environment(home: pathlib.Path) -> dict[str, str]:
    name, _, worker = home.name.rpartition("-")
    slices = read("slices", name).splitlines()
    index = slices.index(name) * int(read("workers", "2")) + int(worker)
    return os.environ | {"HOME": str(home)} | json.loads(read(f"environment/{index}.json", "{}"))


def reach(machine: str, worker: str | None) -> list[pathlib.Path]:
    """The homes of a node's worker(s), or the one of an instance, which is named after it."""
    if read("request") != "ACTIVE":
        fail("the node is not READY")
    found = [HOME / machine] if worker is None else homes(machine, worker)
    for home in found:
        if (HOME / "skeleton").exists() and not (home / "otreg_jax").exists():
            shutil.copytree(HOME / "skeleton", home, dirs_exist_ok=True)
        home.mkdir(exist_ok=True)
    return found


def run(found: list[pathlib.Path], command: str) -> int:
    # Plays the name service of the cloud: all instances are on this machine.
    command = re.sub(r"(?<=MEGASCALE_COORDINATOR_ADDRESS=)[\w-]+", "127.0.0.1", command)
    running = [
        subprocess.Popen(["bash", "-c", command], cwd=home, env=environment(home)) for home in found
    ]
    return max(process.wait() for process in running)


def create(name: str, flags: dict[str, str]) -> None:
    outcome = pop("create") or "ACTIVE"
    if " " in outcome:
        fail(outcome)
    (HOME / "request").write_text(outcome)
    prefix, count = flags.get("--node-prefix", name), int(flags.get("--node-count", "0"))
    slices = [f"{prefix}-{index}" for index in range(count)] or [name]
    if "--size" in flags:  # an instance group; the next slice has one of its own
        slices = read("slices").splitlines() + [name]
        (HOME / "workers").write_text(flags["--size"])
    (HOME / "slices").write_text("\n".join(slices))


def delete() -> None:
    for slice_name in read("slices").splitlines():
        for home in HOME.glob(f"{slice_name}-[0-9]*"):
            shutil.rmtree(home, ignore_errors=True)  # it may be a mount point
    for name in ("request", "slices"):
        (HOME / name).unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    with open(HOME / "calls", "a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)  # nodes are reached at the same time
        calls.write(shlex.join(["gcloud", *argv]) + "\n")
        calls.flush()
        refused = "scp" in argv and pop("scp")
    words = [word for word in argv if not word.startswith("--") and word != "alpha"]
    flags = dict(word.split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    if "ssh" in words:
        return run(reach(words[-1], flags.get("--worker")), flags["--command"])
    if "scp" in words:
        for home in reach(words[-1].rstrip(":"), flags.get("--worker")):
            if not refused:
                shutil.copy(words[-2], home)
        return 1 if refused else 0
    if words[1] in ("instance-templates", "resource-policies"):
        return 0
    verb, name = next((w, words[i + 1]) for i, w in enumerate(words) if w in VERBS)
    if verb == "create":
        create(name, flags)
    elif not read("request"):
        fail("NOT_FOUND: Resource was not found")
    elif verb == "delete":
        delete()
    elif "message" in flags["--format"]:
        print(read("failed"))
    elif verb == "list-instances":
        found = homes(name, "all")
        status = read("request").replace("ACTIVE", "RUNNING")
        print(*(home.name if "name" in flags["--format"] else status for home in found), sep="\n")
    else:
        state = read("request")
        print(state.replace("ACTIVE", "READY") if "tpu-vm" in words else state)
    return 0


VERBS = ("create", "delete", "describe", "list-instances", "list-errors")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
