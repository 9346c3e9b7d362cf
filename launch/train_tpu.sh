#!/usr/bin/env bash
# Trains on TPUs of Google Cloud: requests them, copies the committed code, sets it up, trains on all
# workers, resumes after a preemption, collects the logs and deletes the TPUs at the end.
#
#   bash launch/train_tpu.sh --name run1 --zone us-east5-a --type v5p-64 \
#       --config configs/X.py --workdir gs://BUCKET/run1 [--config.key=value ...]
#
#   --name      of what is requested; the same command finds it again
#   --type      v4-8, v5litepod-16, v5p-64, v6e-64, tpu7x-64, ... (v4, v5p and tpu7x count cores, two
#               a chip; v5litepod and v6e count chips)
#   --node-count 2      as many slices of this type, one run over all of them
#   --workdir   a gs:// directory; the TPU's own disk is deleted with it
#   --project   default: gcloud's
#   --group     Compute Engine instances in managed instance groups, instead of a queued resource of
#               the Cloud TPU API; for v5p and v6e; always so for tpu7x
#   --runtime   TPU software version (with --group: image family); default: the one for --type
#   --provisioning-model spot|flex-start     cheaper, may be preempted at any time | waits for
#               capacity and keeps it for --max-run-duration (12h, 7d)
#   --spot      --provisioning-model spot
#   --reservation NAME  takes what is reserved
#   --network, --subnetwork, --service-account   of the TPU VMs; default: the project's own
#   --internal-ips      no external addresses; ssh then goes through Identity-Aware Proxy
#   --existing  --name is a TPU VM that is there already: never created, never deleted
#   --keep      do not delete the TPU after a successful run
#   --max-restarts 20   how often to request the TPU or start training again
#   --dry-run   print every command, run none
#
# Training runs detached from this script: stop the script and the run goes on, call it again with
# the same arguments and it follows the run again. OTREG_POLL_SECONDS=30 sets how often it looks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command_line="bash launch/train_tpu.sh $*"
# shellcheck source=launch/lib.sh
source launch/lib.sh

name='' zone='' type='' config='' workdir='' project='' runtime='' node_count=1
provisioning_model='' max_run_duration='' reservation='' network='' subnetwork='' service_account=''
group='' internal_ips='' existing='' keep='' dry_run=''
max_restarts=20
train_flags=()
problems=()
while (($#)); do
  if [[ $1 == --config.* ]]; then
    train_flags+=("$1")
    shift
    continue
  fi
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  option=${1#--}
  option=${option//-/_}
  case $1 in
    --spot) provisioning_model=spot ;;
    --existing | --keep | --dry-run | --group | --internal-ips) printf -v "$option" yes ;;
    --name | --zone | --type | --node-count | --config | --workdir | --project | --runtime | \
      --provisioning-model | --max-run-duration | --reservation | --network | --subnetwork | \
      --service-account | --max-restarts)
      printf -v "$option" %s "${2:-}"
      (($# > 1)) && shift
      ;;
    *) problems+=("unknown option $1 (training flags are written --config.key=value)") ;;
  esac
  shift
done

# ---------------------------------------------------------------- check everything, say all at once
for option in name zone config workdir; do
  [[ ${!option} ]] || problems+=("--$option is missing")
done
[[ $type || $existing ]] || problems+=("--type is missing, for example --type v5p-64")
[[ ! $config || -f ${config%%:*} ]] || problems+=("there is no config file $config")
[[ ! $workdir || $workdir == gs://* || $existing || $keep ]] ||
  problems+=("--workdir must be a gs:// directory: $workdir would be deleted with the TPU")
[[ $max_restarts =~ ^[0-9]+$ ]] || problems+=("--max-restarts must be a number, not '$max_restarts'")
[[ $node_count =~ ^[1-9][0-9]?$ ]] || problems+=("--node-count must be a number, not '$node_count'")
case $provisioning_model in
  '' | spot) [[ ! $max_run_duration ]] ||
    problems+=("--max-run-duration goes with --provisioning-model flex-start") ;;
  flex-start) [[ $max_run_duration ]] ||
    problems+=("--provisioning-model flex-start needs --max-run-duration, for example 24h") ;;
  *) problems+=("--provisioning-model is spot or flex-start, not '$provisioning_model'") ;;
esac
[[ ! $reservation || ! $provisioning_model ]] ||
  problems+=("--reservation and --provisioning-model $provisioning_model exclude each other")
[[ $type != tpu7x-* ]] || group=yes
[[ ! $existing || $node_count == 1 ]] || problems+=("--existing takes one TPU VM, so one slice")
case $type in
  v5e-*) problems+=("--type $type: Cloud TPU calls v5e 'v5litepod', so --type v5litepod-${type#v5e-}") ;;
  '' | *-*[0-9]) ;;
  *) problems+=("--type $type lacks a size, for example v5p-64") ;;
esac
if [[ $group ]]; then
  [[ $project ]] || problems+=("--project is missing: the policy of an instance group is named by it")
  case $type in
    v5p-* | v6e-* | tpu7x-*) ;;
    '') [[ ! $existing ]] || problems+=("--type is missing, for example --type v5p-64") ;;
    *) problems+=("--type $type: managed instance groups are there for v5p, v6e and tpu7x") ;;
  esac
fi
if ((!${#problems[@]})); then
  if [[ $group ]]; then
    # shellcheck source=launch/tpu_groups.sh
    source launch/tpu_groups.sh
  else
    # shellcheck source=launch/tpu_nodes.sh
    source launch/tpu_nodes.sh
  fi
  runtime=${runtime:-$(default_runtime)}
  [[ $runtime || $existing ]] || problems+=("--type $type is not known here; add --runtime")
fi
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  problems+=("gcloud is not installed: https://cloud.google.com/sdk/docs/install")
if ((${#problems[@]})); then
  say "nothing was started:"
  printf '  - %s\n' "${problems[@]}" >&2
  exit 2
fi

# ---------------------------------------------------------------- the ways out
poll=${OTREG_POLL_SECONDS:-30}
tmp=$(mktemp -d)
logs=runs/logs/$name
restarts=0
failed=''     # set once a worker has ended with an error of its own
touched=''    # set once there may be a TPU that costs money
requested=''  # set while the TPU is one that this script has requested or found
ready=''      # set once it was ready
everywhere=(${project:+--project="$project"} --quiet)
scope=(--zone="$zone" "${everywhere[@]}")
exec 3>&1  # where --dry-run prints

announce() {  # on every way out: what still exists, and how to delete it
  local status=$? state
  trap '' INT TERM
  if [[ $touched && ! $dry_run ]]; then
    state=$(tpu_state)
    if [[ $state == MISSING ]]; then
      say "$name does not exist any more; nothing is left running."
    else
      say "$name ($state) STILL EXISTS in $zone and may be billed." \
        "Training on it, if started, goes on."
      say "  follow it again: $command_line"
      delete_tpu show | sed 's/^/train_tpu:   delete it:       /' >&2
    fi
  fi
  rm -rf "$tmp"
  exit "$status"
}
trap announce EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

count_restart() {  # REASON
  ((++restarts <= max_restarts)) ||
    die "giving up after $max_restarts restart(s); the last reason: $1. Logs: $logs"
  say "$1; restart $restarts of $max_restarts"
  sleep "$poll"
}

give_up_on_quota() {  # MESSAGE FILE
  if grep -qi 'quota' "$1"; then
    die "giving up: the quota for $type in $zone does not allow this (gcloud's message:" \
      "$(tr '\n' ' ' <"$1")). Ask for more at https://console.cloud.google.com/iam-admin/quotas," \
      "take a smaller --type or another --zone; requests in the FAILED or SUSPENDED state use" \
      "quota too: gcloud compute tpus queued-resources list --zone=$zone"
  fi
}

# ---------------------------------------------------------------- the TPU
ask_for_tpu() {
  say "requesting $name: $node_count x $type in $zone${provisioning_model:+, $provisioning_model}"
  if request_tpu 2>"$tmp/create"; then
    requested=yes ready=''
    return
  fi
  cat "$tmp/create" >&2
  give_up_on_quota "$tmp/create"
  local final='PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|UNAUTHENTICATED|already exists|permission'
  ! grep -qE "$final" "$tmp/create" ||
    die "giving up: gcloud refused the request (its message is above)"
  count_restart "requesting $name failed"
}

get_tpu() {  # returns when the TPU is ready
  local state last='' unknown=0
  touched=yes
  if [[ $dry_run ]]; then
    [[ $existing ]] || request_tpu
    find_machines
    return
  fi
  while true; do
    state=$(tpu_state)
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    [[ $state == UNKNOWN ]] || unknown=0
    case $state in
      READY)
        requested=yes ready=yes
        find_machines && return
        count_restart "cannot tell which instance is the first worker"
        ;;
      UNKNOWN)
        ((++unknown < 10)) || die "giving up: gcloud cannot describe $name: $(cat "$tmp/describe")"
        sleep "$poll"
        ;;
      MISSING | SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPED)
        [[ ! $existing ]] || die "$name is $state; --existing takes a running TPU VM and makes none"
        if [[ $state == MISSING ]]; then
          [[ ! $requested ]] || die "$name was deleted from outside; not requesting it again"
          ask_for_tpu
        else
          failure >"$tmp/failed"
          give_up_on_quota "$tmp/failed"
          count_restart "$name is $state $(cat "$tmp/failed")"
          requested='' ready=''
          delete_tpu run || say "could not delete $name yet"
        fi
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

# ---------------------------------------------------------------- training
worker="bash otreg_jax/launch/tpu_worker.sh"
unpack="mkdir -p otreg_jax && tar -xzf otreg_jax.tar.gz -C otreg_jax"
start="$worker start $(show --config="$config" --workdir="$workdir" \
  ${train_flags[@]+"${train_flags[@]}"})"

prepare() {
  at_once copy_to "$tmp/otreg_jax.tar.gz" && on_workers "$unpack && $worker stop && $worker setup"
}

collect_logs() {
  [[ ! $dry_run ]] || logs=$tmp
  mkdir -p "$logs"
  on_workers "$worker log" >"$logs/$restarts.log" &&
    say "the logs of all workers are in $logs/$restarts.log"
}

[[ -z $(git status --porcelain) ]] ||
  say "WARNING: uncommitted changes are not copied to the TPU; it trains the last commit"
[[ ! $dry_run ]] || say() { :; }
run git archive --format=tar.gz --output="$tmp/otreg_jax.tar.gz" HEAD

while true; do
  get_tpu
  if [[ ! $dry_run ]] && on_lead "$worker running" 2>/dev/null; then
    say "training is already running on $name; following it"
  elif ! { prepare && on_workers "$start"; }; then
    count_restart "setting up $name failed"
    continue
  fi
  on_lead "$worker follow" || say "lost the connection to worker 0"

  [[ $dry_run || $(tpu_state) == READY ]] || continue
  codes=$(on_workers "$worker finish" | sed -n 's/^exit=//p' | sort -u | tr '\n' ' ') || codes=''
  [[ ! $dry_run ]] || codes='0 '
  collect_logs || say "could not collect the logs"
  case " $codes" in
    ' 0 ') break ;;
    ' ' | *' running '*)  # follow again, unless worker 0 has ended without the others
      on_lead "$worker running" || count_restart "not all workers have ended"
      sleep "$poll"
      ;;
    *)
      # 75: told to stop, or it hung; 137, lost: killed; 134: ended by JAX because another one was.
      for code in $codes; do
        case $code in 0 | 75 | 134 | 137 | lost) ;; *) failed=yes ;; esac
      done
      [[ ! $failed ]] || die "training failed (exit codes: $codes); see $logs/$restarts.log"
      count_restart "training was interrupted (exit codes: $codes)"
      ;;
  esac
done

say "training has finished; its results are in $workdir"
if [[ ! $existing && ! $keep ]]; then
  delete_tpu run && touched=''
fi
