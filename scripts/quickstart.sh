#!/usr/bin/env bash
# From nothing to a 2-bit model: installs, builds, makes text from Debian documentation, quantizes
# SmolLM2-135M-Instruct on the CPU in a bounded time, measures it beside its teacher and lets it write.
# What is there already is reused. Everything it makes lies in out/.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/quickstart.sh [options]

  --minutes N   time for quantization, in minutes (default 9)
  --windows N   windows of 1024 held-out tokens to measure perplexity on (default 40)
  --threads N   threads (default: all that this process may use)
  --prompt TEXT what the 2-bit model is to continue
  --force       make texts, model and measurements again
  -h, --help    this text
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
minutes=9
windows=40
threads=0
prompt="A good system administrator"
force=0

bad_usage() { echo "quickstart: $1 (see scripts/quickstart.sh --help)" >&2; exit 2; }
need_number() {  # need_number OPTION VALUE
  [[ $2 =~ ^[0-9]{1,5}(\.[0-9]{1,3})?$ ]] || bad_usage "$1 '$2' is not a number"
}
while (($#)); do
  case $1 in
    --minutes | --windows | --threads | --prompt)
      (($# >= 2)) || bad_usage "$1 needs a value"
      [[ $1 == --prompt ]] || need_number "$1" "$2"
      [[ $1 == --prompt || $1 == --minutes || $2 != *.* ]] || bad_usage "$1 '$2' is not whole"
      declare "${1#--}=$2"
      shift 2
      ;;
    --force) force=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) bad_usage "unknown option '$1'" ;;
  esac
done
[[ $minutes =~ [1-9] ]] || bad_usage "--minutes must be more than 0"
((10#$windows > 0)) || bad_usage "--windows must be more than 0"
[[ -n $prompt ]] || bad_usage "--prompt is empty"

cd "$root"
exec </dev/null
out=out
log=$out/quickstart.log
settings=.cache/quickstart  # which command made each result
rabit=build/release/bin/rabit
teacher=.cache/SmolLM2-135M-Instruct.Q4_1.gguf
student=$out/SmolLM2-135M-Instruct.rabit-2bit.gguf
train_text=$out/docs.train.txt
held_out=$out/docs.heldout.txt
mkdir -p "$out" "$settings"

step=starting
trap 'code=$?; ((code == 0)) || echo "quickstart: stopped while $step (exit code $code); the log is $root/$log" >&2' EXIT

say() { echo "quickstart: $*" | tee -a "$log" >&2; }
# Runs a command with its messages on stderr and in the log. tee outlives Ctrl-C to take the last ones.
logged() {
  printf '$ %s\n' "$(printf '%q ' "$@")" >>"$log"
  "$@" 2>&1 | tee -ai "$log" >&2
}
# result NAME DEPENDENCY... -- COMMAND...: stdout of the command into out/NAME, unless it is there, made
# by this very command, and newer than what it depends on.
result() {
  local name=$1 file=$out/$1 fresh=1 dependency
  shift
  local dependencies=()
  while [[ $1 != -- ]]; do
    dependencies+=("$1")
    shift
  done
  shift
  local command
  command=$(printf '%q ' "$@")
  for dependency in "${dependencies[@]}"; do
    [[ $file -nt $dependency ]] || fresh=0
  done
  if ((fresh && !force)) && [[ -s $file && $(cat "$settings/$name.command" 2>/dev/null) == "$command" ]]; then
    say "reusing $file"
    return
  fi
  printf '$ %s> %s\n' "$command" "$file" >>"$log"
  rm -f "$file" "$settings/$name.command"
  { "$@" >"$file.partial"; } 2>&1 | tee -ai "$log" >&2
  mv "$file.partial" "$file"
  echo "$command" >"$settings/$name.command"
}

{
  echo
  echo "=== quickstart $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  echo "machine: $(nproc) CPUs, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(awk '/^MemTotal/ {printf "%.0f MiB", $2 / 1024}' /proc/meminfo)"
  echo "settings: minutes=$minutes windows=$windows threads=$threads force=$force"
  echo "prompt: $prompt"
} >>"$log"

step="installing (scripts/setup.sh)"
logged bash scripts/setup.sh

step="building"
logged cmake --preset release -DRABIT_TRAIN=ON
logged cmake --build --preset release --target rabit

step="making texts (tools/docs_text.py)"
result docs.json tools/docs_text.py -- python3 tools/docs_text.py --out "$out"
if [[ ! -s $train_text || ! -s $held_out ]]; then
  rm -f "$out/docs.json"
  result docs.json -- python3 tools/docs_text.py --out "$out"
fi
sha256sum "$teacher" "$train_text" "$held_out" >>"$log"

step="quantizing"
arguments=(quantize "$teacher" -o "$student" --data "$train_text" --bits 2 --minutes "$minutes"
  --threads "$threads" --ef-rounds 1 --warm-blocks 1 --warm-epochs 1 --report "$out/report.html")
made_by=$settings/student.command
command="$(printf '%q ' "${arguments[@]}") $(sha256sum "$train_text" | cut -d' ' -f1)"
if [[ -s $student && $(cat "$made_by" 2>/dev/null) == "$command" ]] && ((!force)); then
  say "reusing $student (--force makes it again)"
else
  if ((force)); then
    rm -f "$student.ckpt"
  elif [[ -e $student.ckpt && $(cat "$made_by.begun" 2>/dev/null) == "$command" ]]; then
    say "going on from $student.ckpt, which an interrupted run left (--force starts again)"
    arguments+=(--resume)
  elif [[ -e $student.ckpt ]]; then
    say "$student.ckpt is what a run with other settings left: remove it, or start again with --force"
    exit 1
  fi
  echo "$command" >"$made_by.begun"
  rm -f "$made_by"
  logged "$rabit" "${arguments[@]}"
  if [[ -e $student.ckpt ]]; then  # ended by SIGTERM
    say "the quantization was stopped; the same command goes on"
    exit 1
  fi
  echo "$command" >"$made_by"
fi
for file in "$student.json" "$out/docs.json"; do
  [[ -f $file ]] && { echo "--- $file"; cat "$file"; } >>"$log"
done

step="measuring"
for name in teacher 2bit; do
  [[ $name == teacher ]] && model=$teacher || model=$student
  result "eval.$name.json" "$model" "$held_out" -- \
    "$rabit" eval -m "$model" --ppl "$held_out" --ctx 1024 --windows "$windows" -t "$threads" --json
  result "bench.$name.json" "$model" -- \
    "$rabit" bench -m "$model" -p 512 -n 64 -r 3 -t "$threads" -o json
done

step="generating"
result continuation.json "$student" -- \
  "$rabit" run -m "$student" -p "$prompt" -n 96 -s 1 --temp 0.7 -t "$threads" --json

step="printing the table"
python3 tools/quickstart_table.py --eval "$out/eval.teacher.json" "$out/eval.2bit.json" \
  --bench "$out/bench.teacher.json" "$out/bench.2bit.json" \
  --names "SmolLM2-135M-Instruct (teacher)" "rabit 2-bit" >"$out/table.md"
{
  cat "$out/table.md"
  echo
  echo "The 2-bit model continues:"
  python3 -c 'import json, sys; told = json.load(open(sys.argv[1])); print(told["prompt"] + told["text"])' \
    "$out/continuation.json"
} | tee -a "$log"
say "the packed model is $student, its report $out/report.html, the log $log"
