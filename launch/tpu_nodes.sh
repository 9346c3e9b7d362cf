# TPU VMs by the Cloud TPU API: a queued resource with one node a slice, or, with --existing, a
# TPU VM that was made otherwise. Sourced by train_tpu.sh.
# shellcheck shell=bash disable=SC2154 # the variables are set by train_tpu.sh

mapfile -t machines < <(names)  # nodes, of one or more workers each

default_runtime() {  # the software version for --type
  case $type in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

request_tpu() {
  local command=(compute tpus queued-resources create "$name")
  # The flags of flex-start and of a named reservation are not in the general release.
  [[ ! $reservation && $provisioning_model != flex-start ]] || command=(alpha "${command[@]}")
  if ((node_count > 1)); then
    command+=(--node-count="$node_count" --node-prefix="$name")
  else
    command+=(--node-id="$name")
  fi
  command+=(--accelerator-type="$type" --runtime-version="$runtime")
  case $provisioning_model in
    spot) command+=(--spot) ;;
    flex-start) command+=(--provisioning-model=flex-start --max-run-duration="$max_run_duration") ;;
  esac
  command+=(${reservation:+--reservation="$reservation"} ${network:+--network="$network"}
    ${subnetwork:+--subnetwork="$subnetwork"} ${internal_ips:+--internal-ips}
    ${service_account:+--service-account="$service_account"})
  run gcloud "${command[@]}" "${scope[@]}"
}

tpu_state() {
  local state=ACTIVE node
  [[ $existing ]] || state=$(ask gcloud compute tpus queued-resources describe "$name" \
    --format="value(state.state)" "${scope[@]}")
  if [[ $state == ACTIVE ]]; then  # a node of it can be preempted, or gone, all the same
    for node in "${machines[@]}"; do
      state=$(ask gcloud compute tpus tpu-vm describe "$node" --format="value(state)" "${scope[@]}")
      [[ $existing ]] || state=${state/MISSING/PREEMPTED}
      [[ $state == READY ]] || break
    done
  fi
  echo "$state"
}

failure() {  # why there is no TPU
  ask gcloud compute tpus queued-resources describe "$name" \
    --format="value(state.failedData.error.message)" "${scope[@]}"
}

delete_tpu() {  # run|show
  if [[ $existing ]]; then
    "$1" gcloud compute tpus tpu-vm delete "$name" "${scope[@]}"
  else
    "$1" gcloud compute tpus queued-resources delete "$name" --force "${scope[@]}"
  fi
}

find_machines() { :; }

# Without external addresses the way in is Google's proxy, which the general release cannot take.
ssh_to() {  # NODE WORKER|all COMMAND
  run gcloud ${internal_ips:+alpha} compute tpus tpu-vm ssh "$1" --worker="$2" --command="$3" \
    ${internal_ips:+--tunnel-through-iap} "${scope[@]}"
}

copy_to() {  # NODE FILE
  run gcloud ${internal_ips:+alpha} compute tpus tpu-vm scp "$2" "$1:" --worker=all \
    ${internal_ips:+--tunnel-through-iap} "${scope[@]}"
}

on_workers() {  # COMMAND
  at_once ssh_to all "$1"
}

on_lead() {  # COMMAND: on worker 0, which prints the progress
  ssh_to "${machines[0]}" 0 "$1"
}
