#!/usr/bin/env bash
# Installs what is missing, builds preset `release` and runs all tests; the exit code is ctest's and
# its closing lines are the last thing printed. Arguments go on to ctest (-R NAME, -L LABEL, ...).
# RABIT_DATA_DIR names the folder of evaluation texts (default: ../shared/data beside the checkout);
# tests whose model or texts are missing are shown as skipped.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${RABIT_DATA_DIR:-$root/../shared/data}
if [[ -d $data ]]; then
  data=$(cd "$data" && pwd)
fi
cd "$root"
exec </dev/null

bash scripts/setup.sh --arm
jobs=$(nproc)
cmake --preset release -DRABIT_TRAIN=ON -DRABIT_DATA_DIR="$data"
cmake --build --preset release -j "$jobs"

# As many at once as there are cores, but for the tests that ask to run alone.
exec ctest --preset release --output-on-failure -j "$jobs" "$@"
