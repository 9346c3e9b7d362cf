#!/usr/bin/env bash
# The first minutes with an NVIDIA GPU: does it compute what it should, how fast, and beside whom?
#
#   bash benchmarks/gpu.sh [OUT]           # nine minutes at most; OUT: benchmarks/results/gpu
#   bash benchmarks/gpu.sh OUT --rehearse  # the same parts in tiny sizes, on any machine
#   bash benchmarks/gpu.sh OUT --study=FOLDER  # not these: the study on real parts, as far as it gets;
#                   FOLDER: what `python -m benchmarks.carry unpack` made. OUT/study.jsonl
#
# PYTHON=python3    an interpreter >= 3.11 that has jax (0.10 to 0.12) and torch for the device
# WHEELS=wheels     folder of wheels: of what is imported, those that this Python lacks are installed
#                   into OUT/site; docs/performance.md says which they may be and how to get them
# MINUTES=9         for all parts together
# JOBS=8            runs of the study at a time
# RUNS=             of the study; default: all of them, in their order
#
# The most valuable part comes first. Each has a time limit of its own, writes OUT/PART.json and
# OUT/PART.log, and may fail without harm to the next; OUT/parts.jsonl says how each one ended.
# Nothing is fetched: weights are made at random there. Exit status: 0 if all parts ended well.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out=${1:-benchmarks/results/gpu} size=${2:-}
python=${PYTHON:-python3}
deadline=$((SECONDS + 60 * ${MINUTES:-9}))
mkdir -p "$out"
: >"$out/parts.jsonl"

missing_wheels() {  # those in the folder $1 whose package this Python does not have
  "$python" - "$1" <<'PYTHON'
import importlib.metadata, pathlib, re, sys

canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
there = {canonical(d.metadata["Name"]) for d in importlib.metadata.distributions()}
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    if canonical(wheel.name.split("-")[0]) not in there:
        print(wheel)
PYTHON
}

part() {  # name, seconds at most, module and its flags; suffix=json: of its results
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS code=0
  ((limit < left)) || limit=$left
  if ((limit <= 5)); then
    code=124
  else
    timeout -k 5 "$limit" "$python" -m "${@:3}" --out="$out/$name.${suffix:-json}" \
      >"$out/$name.log" 2>&1
    code=$?
  fi
  case $code in
    0) echo "== $name: done in $((SECONDS - start)) s" ;;
    124 | 137) echo "== $name: stopped after its $limit s" ;;
    *) echo "== $name: failed with $code" ;;
  esac
  tail -n 40 "$out/$name.log" 2>/dev/null
  printf '{"part": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$code" $((SECONDS - start)) "$limit" >>"$out/parts.jsonl"
  ((code == 0)) || failed=1
}

wheels=${WHEELS:-wheels} failed=0
if [[ -d $wheels ]]; then
  mapfile -t missing < <(missing_wheels "$wheels")
  if ((${#missing[@]})); then
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" --upgrade \
      "${missing[@]}" || exit
  fi
  PYTHONPATH=$(cd "$out" && pwd)/site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch shares the device

if [[ $size == --rehearse ]]; then
  nano=(--encoder=whisper-nano --llm=qwen2-nano)
  part correct 300 benchmarks.correct
  part step 300 benchmarks.step --size=nano --repeats=1
  part peer_step 300 benchmarks.peer_step "${nano[@]}" --batch_size=2 --seconds=1 --tokens=8 \
    --repeats=1 --nocompile
  part decode 300 benchmarks.decode --size=tiny --batch_size=2 --tokens=4 --alone=1 --repeats=1
  part sinkhorn 300 benchmarks.sinkhorn --size=B2xS24xT6 --repeats=1
  part epoch 300 benchmarks.epoch "${nano[@]}" --made_up=8 --batch_size=4 --nocompile
elif [[ $size == --study=* ]]; then
  folder=${size#*=} minutes=${MINUTES:-9}
  read -ra runs <<<"${RUNS:-}"
  corpora=''
  for list in "$folder"/*/train.jsonl; do
    name=$(basename "$(dirname "$list")")
    corpora+=${corpora:+,}$name=$folder/$name
  done
  # No run starts in the last two minutes: it would hardly end.
  suffix=jsonl part study $((60 * minutes)) benchmarks.study_real --size="${SIZE:-gpu}" --rough=24 \
    --encoder="$folder/encoder" --llm="$folder/llm" --corpora="$corpora" --jobs="${JOBS:-8}" \
    --folder="$folder/runs" --minutes=$((minutes - 2)) \
    --set='compute_dtype="bfloat16"' --set=packing=true "${runs[@]}"
else
  large=(--encoder=whisper-large-v3 --llm=qwen2.5-1.5b)
  part correct 150 benchmarks.correct
  part step 90 benchmarks.step --size=1.5b --repeats=7
  part peer_step 100 benchmarks.peer_step "${large[@]}" --batch_size=16 --seconds=15 --tokens=64 \
    --repeats=7 --nocompile
  part decode 60 benchmarks.decode --size=500m --repeats=3
  part sinkhorn 60 benchmarks.sinkhorn --size=B16xS375xT64 --size=B16xS1500xT128 --repeats=5
  part epoch 80 benchmarks.epoch --made_up=256 --batch_size=32 --nocompile
fi
exit $failed
