"""launch/train_tpu.sh and tpu_worker.sh against a played gcloud and a fake python."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import calls, launch

TPU = (
    "--name=run --zone=us-east5-a --type=v5p-16 --config=configs/x.py --workdir=gs://b/run".split()
)
ATTEMPT = ["scp", "ssh setup", "ssh start", "ssh follow", "ssh finish", "ssh log"]


def verbs(fake):
    """What was asked of gcloud that changes something, e.g. ["create", "scp", "ssh start"]."""
    found = []
    for call in calls(fake, "gcloud"):
        verb = next(word for word in call if word in VERBS)
        command = re.search(r".*tpu_worker.sh (\w+)", " ".join(call))
        found.append(f"{verb} {command[1]}" if command else verb)
    return [verb for verb in found if verb not in ("describe", "list-instances", "ssh running")]


GCLOUD = shutil.which("gcloud")  # the real one, before a played one is put on PATH
VERBS = ("create", "delete", "describe", "list-instances", "list-errors", "scp", "ssh")


def test_tpu_provisions_trains_on_all_workers_and_deletes(fake):
    printed = launch("train_tpu.sh", *TPU, "--spot", "--config.a=it's a test")
    assert verbs(fake) == ["create", *ATTEMPT, "delete"]
    create = calls(fake, "gcloud")[1]
    assert (
        create
        == (
            "compute tpus queued-resources create run --node-id=run --accelerator-type=v5p-16 "
            "--runtime-version=v2-alpha-tpuv5 --spot --zone=us-east5-a --quiet"
        ).split()
    )
    flags = ["--config=configs/x.py", "--workdir=gs://b/run", "--config.a=it's a test"]
    assert calls(fake, "train") == [flags, flags]
    assert "STILL EXISTS" not in printed
    assert not (fake / "request").exists()
    log = Path("runs/logs/run/0.log").read_text()
    assert len(re.findall(r"^\S+: step 1 of -m otreg_jax.train", log, re.M)) == 2


def test_tpu_resumes_after_training_saved_and_left(fake):
    (fake / "train").write_text("75\n75\n")
    launch("train_tpu.sh", *TPU)
    assert verbs(fake) == ["create", *ATTEMPT, *ATTEMPT, "delete"]
    assert len(calls(fake, "train")) == 4


def test_tpu_is_requested_again_after_a_preemption(fake):
    (fake / "train").write_text("preempt\npreempt\n")
    printed = launch("train_tpu.sh", *TPU, "--spot")
    assert "run is SUSPENDED" in printed
    assert verbs(fake) == ["create", *ATTEMPT[:4], "delete", "create", *ATTEMPT, "delete"]


def test_tpu_restarts_are_bounded(fake):
    (fake / "train").write_text("75\n" * 20)
    printed = launch("train_tpu.sh", *TPU, "--max-restarts=1", code=1)
    assert "giving up after 1 restart(s); the last reason: training was interrupted" in printed
    assert "run (READY) STILL EXISTS in us-east5-a" in printed
    delete = re.search(r"delete it: +(.*)", printed)[1]
    subprocess.run(["bash", "-c", delete], check=True)
    assert not (fake / "request").exists()


def test_tpu_failed_training_is_not_repeated_and_announced(fake):
    (fake / "train").write_text("1\n1\n")
    printed = launch("train_tpu.sh", *TPU, code=1)
    assert "training failed (exit codes: 1 ); see runs/logs/run/0.log" in printed
    assert "run (READY) STILL EXISTS" in printed
    assert verbs(fake) == ["create", *ATTEMPT]


@pytest.mark.parametrize("where", ["create", "failed"])
def test_tpu_gives_up_on_quota(fake, where):
    message = "Quota limit 'TPUV5PPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
    (fake / where).write_text(f"{message}\n")
    if where == "failed":
        (fake / "create").write_text("FAILED\n")
    printed = launch("train_tpu.sh", *TPU, code=1)
    assert "giving up: the quota for v5p-16 in us-east5-a does not allow this" in printed
    assert message in printed
    assert verbs(fake) == ["create"]
    assert ("nothing is left running" in printed) == (where == "create")


def test_tpu_request_is_repeated_without_capacity_but_not_without_permission(fake):
    (fake / "create").write_text("UNAVAILABLE: no more capacity in the zone\nFAILED\nACTIVE\n")
    launch("train_tpu.sh", *TPU)
    assert verbs(fake) == ["create", "create", "delete", "create", *ATTEMPT, "delete"]
    (fake / "create").write_text("PERMISSION_DENIED: no access\n")
    assert "gcloud refused the request" in launch("train_tpu.sh", *TPU, code=1)


def test_tpu_worker_left_behind_is_stopped_before_the_restart(fake, monkeypatch):
    monkeypatch.setenv("OTREG_FINISH_SECONDS", "0.5")
    (fake / "train.run-0").write_text("75\n")
    (fake / "train.run-1").write_text("wait\n")
    printed = launch("train_tpu.sh", *TPU)
    assert "not all workers have ended; restart 1 of 20" in printed
    assert len(calls(fake, "train")) == 4
    assert verbs(fake) == ["create", *ATTEMPT, *ATTEMPT, "delete"]


def test_tpu_run_killed_with_its_shell_is_started_again(fake):
    (fake / "train").write_text("killed\n")
    printed = launch("train_tpu.sh", *TPU)
    assert "training was interrupted (exit codes: 0 lost )" in printed
    assert len(calls(fake, "train")) == 4


def test_tpu_death_of_a_process_is_told_from_a_failure(fake):
    (fake / "train").write_text("137\n134\n")  # one is killed, JAX ends the other
    printed = launch("train_tpu.sh", *TPU)
    assert "training was interrupted (exit codes: 134 137 ); restart 1 of 20" in printed
    (fake / "train").write_text("1\n134\n")
    assert "training failed (exit codes: 1 134 )" in launch("train_tpu.sh", *TPU, code=1)


def test_tpu_copy_that_fails_is_repeated(fake):
    (fake / "scp").write_text("fail\n")
    launch("train_tpu.sh", *TPU)
    assert verbs(fake) == ["create", "scp", *ATTEMPT, "delete"]


def test_tpu_ctrl_c_leaves_training_and_the_same_command_follows_it_again(fake):
    (fake / "train").write_text("wait\nwait\n")
    command = ["bash", "launch/train_tpu.sh", *TPU]

    def start_and_wait_for_follow(count):
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A job started in the background ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while verbs(fake).count("ssh follow") < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return process

    first = start_and_wait_for_follow(1)
    os.killpg(first.pid, signal.SIGINT)
    printed = first.communicate(timeout=240)[1]
    assert first.returncode == 130
    assert "run (READY) STILL EXISTS" in printed
    assert f"follow it again: {' '.join(command)}" in printed

    second = start_and_wait_for_follow(2)
    (fake / "go").touch()
    printed = second.communicate(timeout=240)[1]
    assert second.returncode == 0, printed
    assert "training is already running on run; following it" in printed
    assert len(calls(fake, "train")) == 2
    assert verbs(fake).count("scp") == 1
    assert verbs(fake)[-1] == "delete"


def test_tpu_existing_is_neither_created_nor_deleted(fake):
    printed = launch("train_tpu.sh", *TPU, "--existing", code=1)
    assert "run is MISSING; --existing takes a running TPU VM and makes none" in printed
    (fake / "request").write_text("ACTIVE\n")
    printed = launch("train_tpu.sh", *TPU, "--existing")
    assert verbs(fake) == ATTEMPT
    assert "gcloud compute tpus tpu-vm delete run --zone=us-east5-a" in printed


def test_tpu_keep_announces_what_it_keeps(fake):
    printed = launch("train_tpu.sh", *TPU, "--keep")
    assert verbs(fake) == ["create", *ATTEMPT]
    assert "run (READY) STILL EXISTS" in printed


def test_tpu_dry_run_prints_every_command_and_runs_none(fake):
    printed = launch("train_tpu.sh", *TPU, "--dry-run", "--project=p", "--config.a=it's")
    assert not (fake / "calls").exists()
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud ")]
    assert [command[4] for command in commands] == (
        ["create", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]
    )
    assert all({"--project=p", "--zone=us-east5-a"} <= set(command) for command in commands)
    assert any("--config.a=it's" in shlex.split(" ".join(command)) for command in commands)


OPTIONS = {
    "v5p": ["--type=v5p-64"],
    "v6e spot": ["--type=v6e-64", "--spot", "--network=n", "--subnetwork=s", "--internal-ips"],
    "v6e flex": ["--type=v6e-64", "--provisioning-model=flex-start", "--max-run-duration=24h"],
    "v5p reserved": ["--type=v5p-64", "--reservation=r", "--service-account=a@p"],
    "ironwood": ["--type=tpu7x-64", "--project=p"],
    "ironwood spot": ["--type=tpu7x-8", "--project=p", "--spot"],
    "ironwood flex": ["--type=tpu7x-64", "--project=p", *"--provisioning-model=flex-start".split()]
    + ["--max-run-duration=24h"],
    "v6e group": ["--type=v6e-64", "--project=p", "--group", "--reservation=r", "--subnetwork=s"],
    "v6e host": ["--type=v6e-8", "--project=p", "--group", "--network=n", "--internal-ips"],
}
QUEUED = "gcloud compute tpus queued-resources create run "
GROUP = "gcloud compute instance-groups managed create run"
TEMPLATE = "gcloud compute instance-templates create run "
EXPECTED = {  # how the commands that ask for it begin, or what they hold
    "v5p": [QUEUED + "--node-id=run --accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 "],
    "v6e spot": [
        "--runtime-version=v2-alpha-tpuv6e --spot --network=n --subnetwork=s --internal-ips",
        "gcloud alpha compute tpus tpu-vm ssh run --worker=0",
    ],
    "v6e flex": [
        QUEUED.replace("gcloud", "gcloud alpha"),
        "--provisioning-model=flex-start --max-run-duration=24h ",
    ],
    "v5p reserved": [
        QUEUED.replace("gcloud", "gcloud alpha"),
        "--reservation=r --service-account=a@p",
    ],
    "ironwood": [
        TEMPLATE + "--machine-type=tpu7x-standard-4t --image-family=ubuntu-accel-2404-amd64-tpu-tp",
        "create workload-policy run --type=HIGH_THROUGHPUT --accelerator-topology=2x4x4 ",
        GROUP + " --size=8 --template=run --default-action-on-vm-failure=do-nothing "
        "--target-size-policy-mode=bulk --workload-policy=projects/p/regions/us-east5/resourcePo",
    ],
    "ironwood spot": ["--provisioning-model=SPOT", GROUP + " --size=1 "],
    "ironwood flex": ["--provisioning-model=FLEX_START --max-run-duration=24h "],
    "v6e group": [
        TEMPLATE + "--machine-type=ct6e-standard-4t ",
        "--subnet=s --region=us-east5",
        "--accelerator-topology=8x8 ",
        GROUP + " --size=16 ",
        "--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE "
        "--reservation-affinity=specific --reservation=r",
    ],
    "v6e host": ["--machine-type=ct6e-standard-8t", "--no-address", "compute ssh run-INSTANCE"],
}


def dry_run(options) -> list[str]:
    printed = launch("train_tpu.sh", *TPU, *options, "--dry-run")
    return [line for line in printed.splitlines() if line.startswith("gcloud ")]


@pytest.mark.parametrize("kind", OPTIONS)
def test_tpu_dry_run_shows_how_each_kind_is_had(fake, kind):
    commands = dry_run(OPTIONS[kind])
    for expected in EXPECTED[kind]:
        assert any(expected in command for command in commands), (expected, commands)
    assert not (fake / "calls").exists()


def test_tpu_dry_run_of_several_slices(fake):
    commands = "\n".join(dry_run(["--type=v5p-64", "--node-count=2"]))
    assert QUEUED + "--node-count=2 --node-prefix=run --accelerator-type=v5p-64" in commands
    assert re.search("ssh run-0 --worker=all .* start", commands)
    assert re.search("ssh run-1 --worker=all .* start", commands)
    assert "ssh run-0 --worker=0" in commands and "ssh run-1 --worker=0" not in commands
    commands = "\n".join(dry_run(["--type=tpu7x-64", "--node-count=2", "--project=p"]))
    assert GROUP + "-0 --size=8" in commands and GROUP + "-1 --size=8" in commands
    slices = "MEGASCALE_NUM_SLICES=2 MEGASCALE_SLICE_ID={} MEGASCALE_COORDINATOR_ADDRESS=run-0"
    for index in range(2):
        assert re.search(rf"ssh run-{index}-.*{slices.format(index)}.* start", commands)
    assert "managed delete run-0 run-1 --zone" in commands


@pytest.mark.slow
@pytest.mark.skipif(not GCLOUD, reason="no gcloud here to check the commands with")
def test_tpu_commands_are_understood_by_the_real_gcloud(fake):
    """Its own parser reads them. That of SDK 528 does not know --target-size-policy-mode yet."""
    commands = [c for kind in ("v6e spot", "v6e flex", "v6e group") for c in dry_run(OPTIONS[kind])]
    for command in {command.split(" --")[0]: command for command in commands}.values():
        command = command.replace("--target-size-policy-mode=bulk ", "")
        lint = [GCLOUD, "meta", "lint-gcloud-commands", "--command-string", command]
        done = subprocess.run(lint, capture_output=True, text=True)
        assert '"success": true' in done.stdout, (command, done.stdout)


def test_tpu_slices_of_a_queued_resource_train_together(fake):
    (fake / "workers").write_text("1")
    launch("train_tpu.sh", *TPU, "--node-count=2")
    assert verbs(fake) == [
        "create",
        *(verb for step in ATTEMPT for verb in [step] * (1 if step == "ssh follow" else 2)),
        "delete",
    ]
    assert len(calls(fake, "train")) == 2


@pytest.fixture
def instances():
    """Says each instance's name, and that worker 0 is the second one, not the first of the list."""
    bin = Path(shutil.which("srun")).parent
    (bin / "curl").write_text("#!/bin/sh\ncase $HOME in *-1) echo 0 ;; *) echo 1 ;; esac\n")
    (bin / "hostname").write_text('#!/bin/sh\nbasename "$HOME"\n')
    for name in ("curl", "hostname"):
        (bin / name).chmod(0o755)


def test_tpu_groups_of_instances_train_together_and_are_requested_again(fake, instances):
    (fake / "train").write_text("preempt\n" * 4)
    options = ["--type=tpu7x-16", "--project=p", "--node-count=2", "--spot"]
    printed = launch("train_tpu.sh", *TPU, *options)
    assert "run is PREEMPTED; restart 1 of 20" in printed.replace(" ; ", "; ")
    requests = ["create"] * 4  # a template, a policy, and two groups
    assert verbs(fake)[:4] == requests and verbs(fake).count("create") == 8
    assert len(calls(fake, "train")) == 8
    commands = [" ".join(call) for call in calls(fake, "gcloud")]
    assert any("ssh run-0-1" in c and "follow" in c for c in commands)
    assert not any("ssh run-0-0" in c and "follow" in c for c in commands)
    assert any("MEGASCALE_SLICE_ID=1 MEGASCALE_COORDINATOR_ADDRESS=run-0-1" in c for c in commands)


def test_tpu_group_that_was_only_half_made_is_deleted(fake, instances):
    (fake / "create").write_text("UNAVAILABLE: try again\n")
    launch("train_tpu.sh", *TPU, "--type=tpu7x-16", "--project=p", code=0)
    assert verbs(fake)[:6] == ["create", "create", "create", "delete", "delete", "delete"]


def test_worker_frees_the_chips_that_a_lost_training_holds(fake, tmp_path, monkeypatch):
    chip = tmp_path / "vfio/0"
    chip.parent.mkdir()
    chip.touch()
    monkeypatch.setenv("OTREG_CHIPS", f"{tmp_path}/vfio/[0-9]*")
    holder = subprocess.Popen(["tail", "-f", str(chip)])
    while not any(Path(f"/proc/{holder.pid}/fd").glob("3")):
        time.sleep(0.01)
    try:
        printed = launch("tpu_worker.sh", "stop")
        assert f"ending what holds the chips of this TPU: {holder.pid}" in printed
        assert holder.wait(10) == -signal.SIGTERM
    finally:
        holder.kill()
    assert launch("tpu_worker.sh", "stop") == ""


def test_tpu_lists_every_problem_at_once(fake):
    flags = ["--type=v5e-16", "--config=configs/none.py", "--workdir=runs/x", "--sopt"]
    flags += ["--node-count=no", "--provisioning-model=flex-start", "--reservation=r"]
    printed = launch("train_tpu.sh", *flags, code=2)
    for problem in (
        "unknown option --sopt",
        "--name is missing",
        "--zone is missing",
        "there is no config file configs/none.py",
        "--workdir must be a gs:// directory",
        "--type v5litepod-16",
        "--node-count must be a number, not 'no'",
        "flex-start needs --max-run-duration",
        "--reservation and --provisioning-model flex-start exclude each other",
    ):
        assert problem in printed
    assert not (fake / "calls").exists()


def test_tpu_warns_of_uncommitted_changes(fake):
    Path("configs/x.py").write_text("changed\n")
    assert "uncommitted changes are not copied" in launch("train_tpu.sh", *TPU)
