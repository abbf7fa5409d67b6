#!/usr/bin/env bash
# The bars of the GPU engine at one 7B shape, on one GPU: OUT=DIR bash recipes/speed/gpu.sh SHAPE [PART ...]
#   SHAPE  mistral-7b or codestral-mamba-7b
#   PART   short  batch 1, 64 + 256 tokens: depths, policies, checks by heads on h; and default-head
#          default-head  the same with checks by heads on all inputs
#          stock  the same beside the eager engine and transformers, plain and compiled
#          batch  batch 8: rows that leave by themselves
#          spread  of that, rows that never leave together, and four default heads that are asked
#          long   2,000 + 2,000 tokens
#          exact  2,000 + 2,000 tokens of a tiny float32 model of the family: the same tokens as the eager engine
# Leaves OUT/SHAPE-PART.json, written as it goes, plots beside them, and OUT/SHAPE.md with the bars. One call per shape
# takes minutes. PYTHON names the interpreter; packages it lacks may lie in bench-packages (README.md).
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}"
shape=${1:?mistral-7b or codestral-mamba-7b}
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(short batch long exact stock)
tiny=tiny-transformer
[ "$shape" = mistral-7b ] || tiny=tiny-mamba
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 COLUMNS=160
"${PYTHON:-python3}" -c "import pydantic, typer; typer.TyperException" 2>/dev/null || export PYTHONPATH="$PWD/bench-packages:$PYTHONPATH"
mkdir -p "$OUT"
deadline=$((SECONDS + ${LIMIT:-570}))

bench() { # PART OPTIONS ...
    local left=$((deadline - SECONDS)) part=$1
    shift
    [ "$left" -gt 10 ] || { echo "$part: no time left"; return; }
    echo "== $shape, $part, $left s left"
    timeout -s INT "$left" "${PYTHON:-python3}" -m dynamax_llm.cli bench "$@" --device "${DEVICE:-cuda}" \
        --out "$OUT/$shape-$part.json" || echo "$part ended with $?"
}

default_head() {
    bench default-head --shape "$shape" --batch-size 1 --policy propagate --checks 4 --max-new-tokens 128 --no-baselines \
        --no-parity --repeats 3 --dtype bfloat16
}

for part in "${parts[@]}"; do
    case $part in
    short)
        bench short --shape "$shape" --batch-size 1 --checks 4 --inputs hidden --no-baselines --baseline-tokens 48 --dtype bfloat16
        default_head ;;
    default-head) default_head ;;
    spread) bench spread --shape "$shape" --batch-size 8 --policy propagate --spread 0 --checks 4 --max-new-tokens 128 \
        --repeats 3 --no-baselines --no-parity --dtype bfloat16 ;;
    stock) bench stock --shape "$shape" --batch-size 1 --policy propagate --max-new-tokens 128 --baseline-tokens 32 --repeats 2 \
        --no-parity --dtype bfloat16 ;;
    batch) bench batch --shape "$shape" --batch-size 8 --policy propagate,defer --window 8 --spread 0,0.5,1 --max-new-tokens 128 \
        --repeats 2 --no-baselines --no-parity --dtype bfloat16 ;;
    long) bench long --shape "$shape" --batch-size 1 --policy propagate --prompt-tokens 2000 --max-new-tokens 2000 --repeats 1 \
        --no-baselines --no-parity --dtype bfloat16 ;;
    exact) bench exact --shape "$tiny" --batch-size 1 --policy propagate,verify --window 16 --prompt-tokens 2000 --max-new-tokens 2000 \
        --baseline-tokens 2000 --repeats 1 --no-baselines --dtype float32 ;;
    *) echo "no part $part: short, default-head, batch, spread, long, exact, stock" >&2; exit 2 ;;
    esac
done
"${PYTHON:-python3}" recipes/speed/bars.py "$OUT" --shape "$shape" | tee "$OUT/$shape.md"
