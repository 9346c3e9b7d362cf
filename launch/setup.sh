#!/usr/bin/env bash
# Makes .venv at the repository root and installs the pinned requirements into it; returns at once
# when that is already done.
#
#   bash launch/setup.sh [requirements.txt | requirements-dev.txt]
#
# PYTHON=python3.12            the interpreter to build .venv with (default: the first one >= 3.11)
# OTREG_ACCELERATOR=cpu|cuda|tpu   which JAX to install (default: what this machine has)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=${1:-requirements.txt}
installing=.venv/.installing  # there while pip runs: its presence means that pip was interrupted
stamp=.venv/.installed-$requirements

die() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

python_version() {  # of the interpreter $1, as 3.12; fails if it is too old or not there
  "$1" -c 'import sys
assert sys.version_info >= (3, 11)
print(*sys.version_info[:2], sep=".")' 2>/dev/null
}

find_python() {  # sets python and version
  local candidates=(python3 python3.13 python3.12 python3.11 python)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    version=$(python_version "$python") && return
  done
  die "Python 3.11 or newer is needed; tried: ${candidates[*]}." \
    "Install one (Ubuntu: sudo apt install python3.12 python3.12-venv; without root: uv python" \
    "install 3.12); if it is not on PATH, name it: PYTHON=/path/to/python3.12 bash $0"
}

find_accelerator() {
  if nvidia-smi >/dev/null 2>&1; then
    echo cuda
  elif grep -qsi google /sys/class/dmi/id/sys_vendor &&
    { compgen -G '/dev/accel[0-9]*' || compgen -G '/dev/vfio/[0-9]*'; } >/dev/null; then
    echo tpu
  else
    echo cpu
  fi
}

[[ -f $requirements ]] || die "there is no $requirements; there are: $(echo requirements*.txt)"
accelerator=${OTREG_ACCELERATOR:-$(find_accelerator)}
also=''  # further requirements
case $accelerator in
  cpu) jax_extra= ;;
  tpu) jax_extra=tpu also=requirements-tpu.txt ;;
  cuda) # CUDA 13 needs driver 580 or newer; older drivers take the CUDA 12 build.
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
    jax_extra=cuda13
    [[ ${driver%%.*} =~ ^[0-9]+$ && ${driver%%.*} -lt 580 ]] && jax_extra=cuda12
    ;;
  *) die "OTREG_ACCELERATOR is '$accelerator'; use cpu, cuda or tpu" ;;
esac

find_python
key="$version ${jax_extra:-cpu} $(cat requirements*.txt pyproject.toml | cksum)"

if command -v flock >/dev/null; then  # two launches at once must not install over each other
  mkdir -p .cache
  exec 9>.cache/setup.lock
  flock 9
fi
if [[ ! -e $installing && $(cat "$stamp" 2>/dev/null) == "$key" ]]; then
  exit 0
fi

if [[ -e $installing || $(python_version .venv/bin/python) != "$version" ]]; then
  echo "setup: creating .venv with Python $version" >&2
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "this Python has no venv module; on Debian or Ubuntu: sudo apt install python$version-venv"
  "$python" -m venv --clear .venv
fi

echo "setup: installing $requirements${jax_extra:+ and jax[$jax_extra]} (minutes the first time)" >&2
touch "$installing"
trap 'exit 130' INT  # before the message below: what Ctrl-C left behind stays marked
jax_pin=$(grep -m 1 '^jax==' requirements.txt || true)
pip=(.venv/bin/python -m pip install --quiet)
if ! "${pip[@]}" -r "$requirements" ${also:+-r "$also"} ${jax_extra:+"jax[$jax_extra]${jax_pin#jax}"} ||
  ! "${pip[@]}" --no-deps -e .; then
  rm "$installing"  # pip stopped by itself and left whole packages
  die "pip could not install the requirements (its message is above). Without a network, point pip at" \
    "the wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels bash $0 $requirements"
fi
echo "$key" >"$stamp"
rm "$installing"
