#!/usr/bin/env bash
# The comparison of block kinds on both shipped backbones, on one GPU: a process per backbone and kind, seed after seed.
#   DATA=FILE OUT=DIR [TOKENS=3e6] [SEEDS="0 1 2"] [SECONDS_MOST=535] [WORK=DIR] bash recipes/blocks/gpu.sh [options]
# DATA: plain text, as compare.py takes it. SECONDS_MOST: when all is cut off; runs measured by then are in the file, and
# the same WORK goes on from there. Leaves OUT/blocks.json and OUT/blocks.md. The processes share the GPU, so seconds of
# training are no measure of a kind's speed.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?file of plain text}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1
python=${PYTHON:-python3} work=${WORK:-$(mktemp -d)}
mkdir -p "$work" "$OUT"
start=$(date +%s)
kinds=("transformer-ee transformer --warm-start" "transformer-ee transformer --no-warm-start" "transformer-ee mamba"
    "mamba-ee transformer" "mamba-ee mamba")
for each in "${kinds[@]}"; do
    read -r model kind start_from <<<"$each"
    # shellcheck disable=SC2086  # several words each
    timeout "${SECONDS_MOST:-535}" "$python" -m recipes.blocks.compare "$model" --kinds "$kind" $start_from \
        --data "$DATA" --out "$work/blocks.json" --work "$work/runs" --tokens "${TOKENS:-3e6}" \
        --seeds ${SEEDS:-0 1 2} --device "${DEVICE:-cuda}" "$@" >"$work/${each// /_}.log" 2>&1 &
done
wait
echo "$(($(date +%s) - start)) s"
for log in "$work"/*.log; do echo "== ${log##*/}" && grep -v -e Loading -e Warning "$log" | tail -n 6; done
[ -s "$work/blocks.json" ] || { echo "no run was measured in time"; exit 1; }
"$python" -m recipes.blocks.compare --render "$work/blocks.json" >"$work/blocks.md" || exit
cp "$work/blocks.json" "$work/blocks.md" "$OUT/"
cat "$work/blocks.md"
