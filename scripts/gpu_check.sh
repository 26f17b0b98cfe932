#!/usr/bin/env bash
# One command on a machine with a GPU, without a network, in 8 minutes at most: builds the library, checks every
# operation and model on the device against float64, runs compute-sanitizer over the CUDA C++ kernels if both are there
# (memory accesses of all, races in shared memory of those that share most), and races fasttune against its peers and
# its two GPU backends against each other.
#
#   scripts/gpu_check.sh [FOLDER]        default out/gpu; PYTHON chooses the interpreter, DEVICE=cpu rehearses it all
#
# FOLDER receives summary.md, summary.json, parity.json, benchmarks.json, benchmarks.md and a log of each stage. Every
# stage runs whatever became of the ones before, as long as there is time; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-out/gpu}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
: > "$OUT/stages.tsv"
DEADLINE=${DEADLINE:-465} # seconds from the start: what is left of eight minutes is the summary's

# stage NAME SECONDS COMMAND...: runs it with a time limit, logs it, notes name, outcome and seconds.
stage() {
  local name=$1 limit=$2 begun=$SECONDS outcome=passed left=$((DEADLINE - SECONDS))
  shift 2
  if [ "$left" -lt 10 ]; then
    printf '%s\tfailed (no time left)\t0\n' "$name" >> "$OUT/stages.tsv"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || outcome="failed ($?)"
  printf '%s\t%s\t%s\n' "$name" "$outcome" $((SECONDS - begun)) >> "$OUT/stages.tsv"
  tail -n 3 "$OUT/$name.log"
}
# sanitize TOOL LIMIT SECONDS CASES...: compute-sanitizer over the CUDA C++ cases whose names contain one of CASES.
sanitize() {
  local tool=$1 limit=$2 seconds=$3
  shift 3
  stage "$tool" "$limit" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" scripts/gpu_parity.py \
    --out "$OUT/$tool" --device cuda --backend cuda --seconds "$seconds" --only "$@"
}
skip() { printf '%s\tskipped: %s\t0\n' "$1" "$2" >> "$OUT/stages.tsv"; }

stage machine 30 "$PYTHON" -m fasttune doctor
if [ "$DEVICE" = cuda ]; then
  stage device 30 "$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no GPU is visible to torch'; \
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())"
fi
if [ "${BUILD:-1}" = 1 ]; then
  stage build 120 "$PYTHON" setup.py -q build_ext --inplace
else
  skip build "BUILD=0"
fi
stage parity 180 "$PYTHON" scripts/gpu_parity.py --out "$OUT" --device "$DEVICE" --seconds 160 ${PARITY_ARGS:-}
if ! command -v compute-sanitizer > /dev/null; then
  skip sanitizer "compute-sanitizer is not installed"
elif ! "$PYTHON" -c "import sys; from fasttune import ops; sys.exit('cuda' not in ops.available_backends('attention'))"; then
  skip sanitizer "no CUDA C++ backend here"
else
  sanitize memcheck 60 45 float16
  sanitize racecheck 40 30 "packed float16" "layer_norm C768 float16"
fi
stage benchmarks 150 "$PYTHON" benchmarks/gpu.py --out "$OUT" --device "$DEVICE" --seconds 90
"$PYTHON" scripts/gpu_summary.py "$OUT"
