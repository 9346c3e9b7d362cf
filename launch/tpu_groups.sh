# TPU VMs as Compute Engine instances: a managed instance group a slice. The only way to TPU7x
# (Ironwood), and one way to v5p and v6e. Sourced by train_tpu.sh.
# shellcheck shell=bash disable=SC2154 # the variables are set by train_tpu.sh

mapfile -t groups < <(names)
region=${zone%-*}
machines=()  # INSTANCE:SLICE
lead=''      # the INSTANCE that is worker 0 of slice 0

default_runtime() {  # the image family for --type
  case $type in
    v5p-* | v6e-*) echo ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    tpu7x-*) echo ubuntu-accel-2404-amd64-tpu-tpu7x ;;
  esac
}

shape() {  # sets machine_type, size (instances a slice) and topology from --type
  local chips=${type#*-} dimensions=(2 2 1) count doubled=1 axis
  case $type in
    v6e-*) dimensions=(2 2) machine_type=ct6e-standard-4t ;;
    v5p-*) machine_type=ct5p-hightpu-4t chips=$((chips / 2)) ;;  # named after its cores, two a chip
    tpu7x-*) machine_type=tpu7x-standard-4t chips=$((chips / 2)) ;;
  esac
  count=${#dimensions[@]} axis=$((count - 1))
  while ((doubled * 4 < chips)); do  # 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, …: the last axis first
    ((dimensions[axis] *= 2, doubled *= 2))
    ((doubled == 2 && count == 3)) || axis=$(((axis + count - 1) % count))
  done
  topology=$(IFS=x && echo "${dimensions[*]}")
  size=$((chips / 4))
  if [[ $type == v6e-[18] ]]; then machine_type=ct6e-standard-${chips}t size=1; fi
  ((size == 1 || doubled * 4 == chips)) ||
    problems+=("--type $type: a group's slice has 4, 8, 16, 32, … chips, not $chips")
}
shape

create() {
  local group template=(--machine-type="$machine_type" --image-family="$runtime"
    --image-project=ubuntu-os-accelerator-images --boot-disk-size=200GB
    --maintenance-policy=TERMINATE --scopes=cloud-platform
    ${service_account:+--service-account="$service_account"} ${network:+--network="$network"}
    ${subnetwork:+--subnet="$subnetwork" --region="$region"} ${internal_ips:+--no-address})
  [[ $type != tpu7x-* ]] || template+=(--boot-disk-type=hyperdisk-balanced)
  case $provisioning_model in
    spot) template+=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    flex-start) template+=(--provisioning-model=FLEX_START --max-run-duration="$max_run_duration"
      --instance-termination-action=DELETE) ;;
  esac
  [[ ! $reservation ]] || template+=(--provisioning-model=RESERVATION_BOUND
    --instance-termination-action=DELETE --reservation-affinity=specific --reservation="$reservation")
  run gcloud compute instance-templates create "$name" "${template[@]}" "${everywhere[@]}" || return
  if ((size > 1)); then  # the instances are wired to one slice, and come all together or not at all
    run gcloud compute resource-policies create workload-policy "$name" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$topology" --region="$region" "${everywhere[@]}" || return
  fi
  local together=()
  ((size == 1)) || together=(--target-size-policy-mode=bulk
    --workload-policy="projects/$project/regions/$region/resourcePolicies/$name")
  for group in "${groups[@]}"; do
    run gcloud compute instance-groups managed create "$group" --size="$size" --template="$name" \
      --default-action-on-vm-failure=do-nothing ${together[@]+"${together[@]}"} "${scope[@]}" || return
  done
}

instances() {  # GROUP FIELD
  ask gcloud compute instance-groups managed list-instances "$1" --format="value($2)" "${scope[@]}"
}

tpu_state() {
  local group states state=READY
  for group in "${groups[@]}"; do
    states=$(instances "$group" instanceStatus)
    case $states in
      MISSING | UNKNOWN) state=$states && break ;;
      *STOP* | *TERMINATED* | *SUSPEND*) state=PREEMPTED && break ;;
    esac
    if (($(grep -cx RUNNING <<<"$states") < size)); then
      # Spot instances are deleted when they are preempted, and the group does not replace them.
      state=WAITING_FOR_RESOURCES
      [[ ! $ready ]] || state=PREEMPTED
    fi
  done
  echo "$state"
}

failure() {  # why there is no TPU
  local group
  for group in "${groups[@]}"; do
    ask gcloud compute instance-groups managed list-errors "$group" \
      --format="value(error.message)" --limit=1 "${scope[@]}"
  done
}

delete_tpu() {  # run|show; goes on where one of them is not there
  local status=0
  "$1" gcloud compute instance-groups managed delete "${groups[@]}" "${scope[@]}" || status=$?
  "$1" gcloud compute instance-templates delete "$name" "${everywhere[@]}" || status=$?
  ((size == 1)) || "$1" gcloud compute resource-policies delete "$name" --region="$region" \
    "${everywhere[@]}" || status=$?
  return "$status"
}

request_tpu() {
  create && return
  delete_tpu run 2>/dev/null || true  # what there is of it would stand in the way of the next request
  return 1
}

find_machines() {  # sets machines and lead
  local group slice=0 number
  machines=() lead=${groups[0]}-INSTANCE
  for group in "${groups[@]}"; do
    if [[ $dry_run ]]; then
      machines+=("$group-INSTANCE:$slice")
    else
      mapfile -t -O "${#machines[@]}" machines < \
        <(instances "$group" 'instance.basename()' | sed "s/$/:$slice/")
    fi
    ((++slice))
  done
  # The metadata server numbers the workers of a slice; JAX takes the first one for its coordinator.
  number="http://\${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes"
  number="echo \$(curl -s -H Metadata-Flavor:Google $number/agent-worker-number) \$(hostname)"
  [[ $dry_run ]] || lead=$(at_once ssh_to "$number" | awk "/^0 ${groups[0]}-/ { print \$2 }")
  [[ $lead ]]
}

ssh_to() {  # INSTANCE:SLICE COMMAND
  # JAX and the TPU learn from these which slice of how many they are; nothing else tells them.
  local slices="MEGASCALE_NUM_SLICES=$node_count MEGASCALE_SLICE_ID=${1#*:}"
  slices="export $slices MEGASCALE_COORDINATOR_ADDRESS=$lead; "
  ((node_count > 1)) || slices=''
  run gcloud compute ssh "${1%:*}" --command="$slices$2" ${internal_ips:+--tunnel-through-iap} \
    "${scope[@]}"
}

copy_to() {  # INSTANCE:SLICE FILE
  run gcloud compute scp "$2" "${1%:*}:" ${internal_ips:+--tunnel-through-iap} "${scope[@]}"
}

on_workers() {  # COMMAND
  at_once ssh_to "$1"
}

on_lead() {  # COMMAND: on worker 0, which prints the progress
  ssh_to "$lead:0" "$1"
}
