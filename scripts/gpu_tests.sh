#!/usr/bin/env bash
# Builds preset `cuda` and runs every test with the label `gpu` on this machine's GPU, then those of
# the runtime's kernels under compute-sanitizer (memcheck, racecheck), where that is installed. Ends
# with a summary on stdout, a line for each, and fails if any failed or there is no GPU. Arguments go
# on to cmake: -DRABIT_TRAIN=OFF leaves out training and needs no libtorch,
# -DCMAKE_CUDA_ARCHITECTURES=native builds for this GPU alone. RABIT_MODEL names the model for tests
# of a real one (default: that in .cache/).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
exec </dev/null

if ! gpus=$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader) || [[ -z $gpus ]]; then
  echo "gpu_tests.sh: no NVIDIA GPU can be used here" >&2
  exit 1
fi

build=build/cuda
cmake --preset cuda "$@"
targets=(rabit gpu_kernels_test gpu_decode_test gpu_engine_test)
if grep -q '^RABIT_TRAIN:BOOL=\(ON\|1\|TRUE\|YES\)$' "$build/CMakeCache.txt"; then
  targets+=(train_cuda_test)
fi
cmake --build --preset cuda -j "$(nproc)" --target "${targets[@]}"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
summary=()
failed=0

# check NAME COMMAND...: runs it, its output to the log and the terminal.
check() {
  local name=$1 state=passed skipped
  shift
  echo "== $name"
  if ! "$@" 2>&1 | tee "$log"; then
    state=FAILED
    failed=1
  fi
  # ctest lists each skipped test once more at its end, as gtest does.
  skipped=$(grep -cE '\*\*\*Skipped|^\[  SKIPPED \].*ms\)$' "$log" || true)
  if ((skipped > 0)); then
    state+=", $skipped skipped"
  fi
  summary+=("$name: $state")
}

check "tests" ctest --preset cuda -L gpu --no-tests=error
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
for tool in memcheck racecheck; do
  for test in gpu_decode_test gpu_kernels_test; do
    if [[ -n $sanitizer ]]; then
      check "$tool of $test" "$sanitizer" --tool "$tool" --error-exitcode 9 "$build/bin/$test"
    else
      summary+=("$tool of $test: compute-sanitizer is not installed")
    fi
  done
done

echo "== summary, on ${gpus//$'\n'/; }"
printf '%s\n' "${summary[@]}"
exit "$failed"
