#!/usr/bin/env bash
# What train_tpu.sh runs on each worker of a TPU slice.
#
#   tpu_worker.sh setup           make the environment
#   tpu_worker.sh stop            end a training that still runs, giving it time to save, and wait
#                                 until nothing holds the chips
#   tpu_worker.sh running         succeeds while training runs here
#   tpu_worker.sh start [FLAG …]  start otreg_jax.train detached, unless it runs already
#   tpu_worker.sh follow          print train.log until training ends
#   tpu_worker.sh finish          wait for the end and print exit=STATUS; "running" if it does not
#                                 end in time, "lost" if it was killed together with its shell
#   tpu_worker.sh log             print train.log, each line after this worker's name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

running() {
  [[ -f train.pid ]] && kill -0 "$(cat train.pid)" 2>/dev/null
}

run() {
  local status=0
  .venv/bin/python -m otreg_jax.train "$@" || status=$?
  echo "$status" >train.exit
}

wait_for_end() {
  timeout "$1" tail -f -s 0.1 --pid="$(cat train.pid)" /dev/null
}

holders() {  # the processes that hold a chip open; find fails where one ends meanwhile
  { find /proc/[0-9]*/fd -lname "${OTREG_CHIPS:-/dev/vfio/[0-9]*}" -o -lname '/dev/accel[0-9]*' \
    2>/dev/null || true; } | cut -d/ -f3 | sort -u | tr '\n' ' '
}

free_chips() {
  # The next training would end with "Device or resource busy" while a lost one still has them.
  local seconds=0 processes
  while processes=$(holders) && [[ $processes ]]; do
    ((seconds > 0)) || echo "ending what holds the chips of this TPU: $processes"
    # shellcheck disable=SC2086 # a list of numbers
    kill "-$( ((seconds < 10)) && echo TERM || echo KILL)" $processes 2>/dev/null || true
    ((++seconds < 60)) || { echo "the chips are still held by $processes" && return 1; }
    sleep 1
  done
}

case $1 in
  setup)
    # Ubuntu 22.04 images come with Python 3.10; uv brings a newer one without root.
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python3 -m pip install --quiet --user uv
      PATH=$HOME/.local/bin:$PATH
      uv python install --quiet 3.12
      PYTHON=$(uv python find --system 3.12)
      export PYTHON
    fi
    OTREG_ACCELERATOR=tpu bash launch/setup.sh
    ;;
  stop)
    if running; then
      pkill -TERM -P "$(cat train.pid)" || true
      wait_for_end 120 || pkill -KILL -P "$(cat train.pid)" || true
    fi
    free_chips
    ;;
  running) running ;;
  start)
    # Detached, because training must outlive the ssh connection; and only once, because gcloud
    # repeats a command whose connection broke.
    running && exit
    rm -f train.exit
    nohup bash launch/tpu_worker.sh run "${@:2}" >train.log 2>&1 </dev/null &
    echo $! >train.pid
    ;;
  run) run "${@:2}" ;;
  follow) tail -n +1 -F -s 0.1 --pid="$(cat train.pid)" train.log ;;
  finish)
    wait_for_end "${OTREG_FINISH_SECONDS:-300}" || true
    if running; then echo exit=running; else echo "exit=$(cat train.exit 2>/dev/null || echo lost)"; fi
    ;;
  log) sed "s/^/$(hostname): /" train.log ;;
esac
