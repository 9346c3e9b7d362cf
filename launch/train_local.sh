#!/usr/bin/env bash
# Trains on this machine, after setting it up.
#
#   bash launch/train_local.sh [--workdir=DIR]       the quickstart: the same small model trained with
#                                                    OTReg, with cross-entropy alone, and with a plan
#                                                    from positions alone, compared in one report
#   bash launch/train_local.sh --config=configs/X.py --workdir=DIR [--config.key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

bash "$root/launch/setup.sh"

for arg in "$@"; do
  case $arg in --config | --config=* | --help) exec "$python" -m otreg_jax.train "$@" ;; esac
done

workdir=runs/quickstart
previous=
for arg in "$@"; do  # take --workdir out of the arguments, leave the others
  shift
  if [[ $previous == --workdir ]]; then
    workdir=$arg
  elif [[ $arg == --workdir=* ]]; then
    workdir=${arg#*=}
  elif [[ $arg != --workdir ]]; then
    set -- "$@" "$arg"
  fi
  previous=$arg
done
workdir=${workdir%/}

train() {  # ARM DIRECTORY [FLAG ...]
  "$python" -m otreg_jax.train --config="$root/configs/quickstart.py:$1" --workdir="$2" "${@:3}"
}

# The two controls share the data and the language model that the first run makes.
train otreg "$workdir" "$@"
for arm in ce position; do
  train "$arm" "$workdir-$arm" \
    --config.data.cache="$workdir/data" --config.llm.path="$workdir/llm" "$@"
done
"$python" -m otreg_jax.evaluate --workdir="$workdir" \
  --compare="$workdir-ce" --compare="$workdir-position"
