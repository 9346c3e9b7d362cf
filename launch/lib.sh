# What train_tpu.sh and its two ways to get TPUs share; sourced, not run.
# shellcheck shell=bash disable=SC2154 # the variables are set by train_tpu.sh

say() { echo "train_tpu: $*" >&2; }

die() {
  say "$@"
  exit 1
}

show() {  # prints a command as it can be pasted into a shell
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

run() {  # a command, or with --dry-run prints it
  if [[ $dry_run ]]; then show "$@" >&3; else "$@"; fi
}

at_once() {  # FUNCTION [ARGUMENT …]: FUNCTION MACHINE ARGUMENT … for all $machines at the same time
  local machine process processes=() status=0
  for machine in "${machines[@]}"; do
    if [[ $dry_run ]]; then
      "$1" "$machine" "${@:2}"
    else
      "$1" "$machine" "${@:2}" &
      processes+=($!)
    fi
  done
  for process in ${processes[@]+"${processes[@]}"}; do
    wait "$process" || status=$?
  done
  return "$status"
}

ask() {  # COMMAND …: what it prints; MISSING if the thing is not there, UNKNOWN if gcloud failed
  if run "$@" 2>"$tmp/describe"; then
    return
  elif grep -qiE 'not.?found' "$tmp/describe"; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

names() {  # of the slices: NAME, or NAME-0 NAME-1 …
  if ((node_count == 1)); then
    echo "$name"
  else
    seq -f "$name-%g" 0 $((node_count - 1))
  fi
}
