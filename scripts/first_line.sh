#!/usr/bin/env bash
# The measurements of docs/results/first-line.md: error feedback alone at 2 and 3 bits, the whole method
# for some seeds, and the packed runtime's perplexity beside torch's. Prints one line a figure.
set -Eeuo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/first_line.sh --model GGUF --train TEXT --test TEXT [options]

  --rabit FILE    the program (default build/release/bin/rabit; build/cuda/bin/rabit for a GPU)
  --device NAME   cpu or cuda (default cuda); on a CPU only error feedback is measured
  --seeds LIST    seeds of the whole method (default "1 2 3")
  --out DIR       where everything goes (default out/first-line)
TEXT
}

rabit=build/release/bin/rabit device=cuda seeds="1 2 3" out=out/first-line model="" train="" test=""
while (($#)); do
  case $1 in
    --rabit | --device | --seeds | --out | --model | --train | --test)
      (($# >= 2)) || { echo "first_line: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    *) echo "first_line: unknown option '$1' (see --help)" >&2; exit 2 ;;
  esac
done
[[ -n $model && -n $train && -n $test ]] || { usage >&2; exit 2; }
mkdir -p "$out"

trap 'echo "first_line: failed; the last log in $out says why:" >&2
  tail -n 2 "$(ls -t "$out"/*.log | head -n 1)" >&2' ERR

quantize() {  # quantize NAME OPTION...
  local name=$1
  shift
  "$rabit" quantize "$model" -o "$out/$name.gguf" --data "$train" --eval "$test" "$@" \
    2>"$out/$name.log"
  echo "$name, torch: $(grep 'perplexity of the student' "$out/$name.log")"
}
evaluate() {  # evaluate NAME FILE
  "$rabit" eval -m "$2" --ppl "$test" --ctx 2048 --json >"$out/$1.eval.json" 2>"$out/$1.eval.log"
  echo "$1, packed runtime: $(grep -E '"perplexity(_stderr)?"' "$out/$1.eval.json" | tr -s ' \n' ' ')"
}

evaluate teacher "$model"
for bits in 2 3; do
  quantize "ef$bits" --device cpu --bits "$bits" --calib-tokens 131072 --warm-epochs 0 --tokens 0
  evaluate "ef$bits" "$out/ef$bits.gguf"
done
if [[ $device != cpu ]]; then
  for seed in $seeds; do
    quantize "seed$seed" --device "$device" --calib-tokens 262144 --warm-epochs 4 --tokens 4000000 --seed "$seed"
    evaluate "seed$seed" "$out/seed$seed.gguf"
  done
fi
