#!/usr/bin/env bash
# Trains on a Cloud TPU slice: requests it (queued resource), copies the committed code, sets it up,
# trains on all workers, resumes after a preemption, collects the logs and deletes the TPU at the end.
#
#   bash launch/train_tpu.sh --name run1 --zone us-east5-a --type v5p-64 \
#       --config configs/X.py --workdir gs://BUCKET/run1 [--config.key=value ...]
#
#   --name      of the queued resource and of its TPU node; the same command finds them again
#   --type      v4-8, v5litepod-16, v5p-64, v6e-16, ... (v4 and v5p count cores, two a chip)
#   --workdir   a gs:// directory; the TPU's own disk is deleted with it
#   --project   default: gcloud's
#   --runtime   TPU software version; default: the one for --type
#   --spot      cheaper, may be preempted at any time
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

say() { echo "train_tpu: $*" >&2; }
die() {
  say "$@"
  exit 1
}

name='' zone='' type='' config='' workdir='' project='' runtime=''
spot='' existing='' keep='' dry_run=''
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
  case $1 in
    --spot | --existing | --keep) printf -v "${1#--}" yes ;;
    --dry-run) dry_run=yes ;;
    --name | --zone | --type | --config | --workdir | --project | --runtime | --max-restarts)
      option=${1#--}
      printf -v "${option//-/_}" %s "${2:-}"
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
case $type in
  v2-* | v3-* | v4-*) default_runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) default_runtime=v2-alpha-tpuv5 ;;
  v6e-*) default_runtime=v2-alpha-tpuv6e ;;
  v5e-*) problems+=("--type $type: Cloud TPU calls v5e 'v5litepod', so --type v5litepod-${type#v5e-}") ;;
  "") ;;
  *) [[ $runtime ]] || problems+=("--type $type is not known here; add --runtime (TPU7x: docs/launch.md)") ;;
esac
runtime=${runtime:-${default_runtime:-}}
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  problems+=("gcloud is not installed: https://cloud.google.com/sdk/docs/install")
if ((${#problems[@]})); then
  say "nothing was started:"
  printf '  - %s\n' "${problems[@]}" >&2
  exit 2
fi

# ---------------------------------------------------------------- gcloud
poll=${OTREG_POLL_SECONDS:-30}
tmp=$(mktemp -d)
logs=runs/logs/$name
restarts=0
failed=''     # set once a worker has ended with an error of its own
touched=''    # set once there may be a TPU that costs money
requested=''  # set while the TPU is one that this script has requested or found
scope=(--zone="$zone" ${project:+--project="$project"} --quiet)
if [[ $existing ]]; then
  delete=(gcloud compute tpus tpu-vm delete "$name" "${scope[@]}")
else
  delete=(gcloud compute tpus queued-resources delete "$name" --force "${scope[@]}")
fi
[[ ! $dry_run ]] || exec 3>&1

show() {  # prints a command as it can be pasted into a shell
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

run() {
  if [[ $dry_run ]]; then show "$@" >&3; else "$@"; fi
}

tpus() {
  run gcloud compute tpus "$@" "${scope[@]}"
}

on_workers() {  # all|INDEX COMMAND
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

describe() {  # queued-resources|tpu-vm FIELD; MISSING if there is none, UNKNOWN if gcloud failed
  if tpus "$1" describe "$name" --format="value($2)" 2>"$tmp/describe"; then
    return
  elif grep -qiE 'not.?found' "$tmp/describe"; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

tpu_state() {
  if [[ $dry_run ]]; then
    echo READY
  elif [[ $existing ]]; then
    describe tpu-vm state
  else
    local state
    state=$(describe queued-resources state.state)
    if [[ $state == ACTIVE ]]; then  # its node can be preempted, or gone, all the same
      state=$(describe tpu-vm state)
      state=${state/MISSING/PREEMPTED}
    fi
    echo "$state"
  fi
}

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
      say "  delete it:       $(show "${delete[@]}")"
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
request_tpu() {
  say "requesting $name: $type in $zone${spot:+, spot}"
  if tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${spot:+--spot} 2>"$tmp/create"; then
    requested=yes
    return
  fi
  cat "$tmp/create" >&2
  give_up_on_quota "$tmp/create"
  ! grep -qE 'PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|UNAUTHENTICATED' "$tmp/create" ||
    die "giving up: gcloud refused the request (its message is above)"
  count_restart "requesting $name failed"
}

get_tpu() {  # returns when the TPU is ready
  local state last='' unknown=0
  touched=yes
  [[ ! $dry_run || $existing ]] || request_tpu
  while true; do
    state=$(tpu_state)
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    [[ $state == UNKNOWN ]] || unknown=0
    case $state in
      READY)
        requested=yes
        return
        ;;
      UNKNOWN)
        ((++unknown < 10)) || die "giving up: gcloud cannot describe $name: $(cat "$tmp/describe")"
        sleep "$poll"
        ;;
      MISSING | SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPED)
        [[ ! $existing ]] || die "$name is $state; --existing takes a running TPU VM and makes none"
        if [[ $state == MISSING ]]; then
          [[ ! $requested ]] || die "$name was deleted from outside; not requesting it again"
          request_tpu
        else
          describe queued-resources state.failedData.error.message >"$tmp/failed"
          give_up_on_quota "$tmp/failed"
          count_restart "$name is $state $(cat "$tmp/failed")"
          requested=''
          run "${delete[@]}" || say "could not delete $name yet"
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
  tpus tpu-vm scp "$tmp/otreg_jax.tar.gz" "$name:" --worker=all &&
    on_workers all "$unpack && $worker stop && $worker setup"
}

collect_logs() {
  [[ ! $dry_run ]] || logs=$tmp
  mkdir -p "$logs"
  on_workers all "$worker log" >"$logs/$restarts.log" &&
    say "the logs of all workers are in $logs/$restarts.log"
}

[[ -z $(git status --porcelain) ]] ||
  say "WARNING: uncommitted changes are not copied to the TPU; it trains the last commit"
[[ ! $dry_run ]] || say() { :; }
run git archive --format=tar.gz --output="$tmp/otreg_jax.tar.gz" HEAD

while true; do
  get_tpu
  if [[ ! $dry_run ]] && on_workers 0 "$worker running" 2>/dev/null; then
    say "training is already running on $name; following it"
  elif ! { prepare && on_workers all "$start"; }; then
    count_restart "setting up $name failed"
    continue
  fi
  on_workers 0 "$worker follow" || say "lost the connection to worker 0"

  [[ $(tpu_state) == READY ]] || continue
  codes=$(on_workers all "$worker finish" | sed -n 's/^exit=//p' | sort -u | tr '\n' ' ') || codes=''
  [[ ! $dry_run ]] || codes='0 '
  collect_logs || say "could not collect the logs"
  case " $codes" in
    ' 0 ') break ;;
    ' ' | *' running '*)  # follow again, unless worker 0 has ended without the others
      on_workers 0 "$worker running" || count_restart "not all workers have ended"
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
  run "${delete[@]}" && touched=''
fi
