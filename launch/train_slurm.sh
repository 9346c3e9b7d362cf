#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster: one process a node, all its GPUs. JAX finds the processes
# from SLURM's variables. A run that was preempted, or came to its time limit, saves and is requeued.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/train_slurm.sh \
#       --config=configs/X.py --workdir=/shared/run1 [--config.key=value ...]
#
# from the repository root. Outside a job, `bash launch/train_slurm.sh --config=...` submits itself
# and waits; SBATCH_ARGS="--nodes=4 --gpus-per-node=8" then holds sbatch's options. Inside an
# allocation (salloc) it runs at once.
#SBATCH --job-name=otreg_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@180
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -f $root/launch/setup.sh ]]; then  # sbatch runs a copy of this script from its spool directory
  root=${SLURM_SUBMIT_DIR:-$PWD}
fi
if [[ ! -f $root/launch/setup.sh ]]; then
  echo "train_slurm: call sbatch from the root of the repository (now: $root)" >&2
  exit 2
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  command -v sbatch >/dev/null || { echo "train_slurm: there is no sbatch on this machine" >&2 && exit 2; }
  # shellcheck disable=SC2086 # SBATCH_ARGS is a list of options
  exec sbatch --wait --chdir="$root" ${SBATCH_ARGS:-} "$root/launch/train_slurm.sh" "$@"
fi

max_restarts=100
trap : TERM  # the tasks save at SIGTERM; this shell waits for them and then decides

# Once, on the first node: the nodes share the file system. The others may have its GPUs only.
bash "$root/launch/setup.sh"

# By default JAX gives each SLURM task one GPU; one process a node takes all of them.
# A task that ends early is not a reason to kill the others while they save: JAX itself ends the
# peers of a lost process, and --wait bounds it all.
# shellcheck disable=SC2016 # expanded on each node
task='
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
((gpus == 0)) || export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
trap : TERM  # training gets the signal too, and saves
code=0
"$0" -m otreg_jax.train "$@" || code=$?
case $code in
  0 | 75) exit "$code" ;;
  134 | 137) exit 75 ;;  # killed, or ended by JAX because another process was
  *) exit 101 ;;  # srun returns the highest code: a failure must be above what it does to others
esac'
status=0
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300 \
  bash -c "$task" "$root/.venv/bin/python" "$@" || status=$?
((status != 101)) || status=1

if ((status == 75)); then  # EX_TEMPFAIL: training was interrupted
  if ((${SLURM_RESTART_COUNT:-0} < max_restarts)); then
    echo "train_slurm: interrupted; requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
  echo "train_slurm: interrupted, and not requeued (restart ${SLURM_RESTART_COUNT:-0}" \
    "of $max_restarts); submit it again to go on" >&2
fi
exit "$status"
