#!/usr/bin/env bash
# Speed beside llama.cpp's, at the same shape, in turn: builds its llama-bench and llama-quantize from
# the source in the PyPI package llama-cpp-python (or takes --llama FOLDER, which holds the two), then runs
# compare_llamacpp.py with the other options.
#   bench/compare_llamacpp.sh --vocabulary model.gguf
#   bench/compare_llamacpp.sh --llama ~/llama.cpp/build/bin --vocabulary model.gguf --threads 1,2,8
# CC and CXX choose its compiler: clang 19, where it is installed, is faster than GCC.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${RABIT_LLAMA_BUILD:-$here/../out/llamacpp}
case " $* " in
*" --llama "* | *" --llama="* | *" -h "* | *" --help "*) exec python3 "$here/compare_llamacpp.py" "$@" ;;
esac
python3 "$here/compare_llamacpp.py" --check "$@"
if [ ! -x "$build/build/bin/llama-bench" ] || [ ! -x "$build/build/bin/llama-quantize" ]; then
  mkdir -p "$build/source"
  rm -f "$build"/llama_cpp_python-*.tar.gz
  python3 -m pip download --quiet --no-deps --no-binary :all: llama-cpp-python==0.3.36 -d "$build"
  tar xzf "$build"/llama_cpp_python-*.tar.gz -C "$build/source" --strip-components=1
  if [ -z "${CXX:-}" ] && command -v clang++-19 >/dev/null; then
    export CC=clang-19 CXX=clang++-19
  fi
  cmake -S "$build/source/vendor/llama.cpp" -B "$build/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF >"$build/cmake.log"
  ninja -C "$build/build" llama-bench llama-quantize >"$build/build.log" || {
    tail -n 20 "$build/build.log" >&2
    exit 1
  }
fi
exec python3 "$here/compare_llamacpp.py" --llama "$build/build/bin" "$@"
