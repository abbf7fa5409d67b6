#!/usr/bin/env bash
# SmolLM2 from the GGUF file to trained exits and their measurement, on one GPU.
#   OUT=DIR GGUF=FILE PROMPTS=DIR [TEXT=FILE] bash recipes/smollm2/gpu.sh [options of train.py]
# PACKAGES: folders with packages that the machine lacks. WORK: where the model and the answers are kept.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}" "${GGUF:?the GGUF file}" "${PROMPTS:?folder with train.jsonl and heldout.jsonl}"
python=${PYTHON:-python3} work=${WORK:-/tmp/smollm2}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src:$PWD:${PACKAGES:-}"
mkdir -p "$OUT" "$work"
start=$(date +%s)
[ -d "$work/model" ] || "$python" recipes/smollm2/backbone.py --out "$work/model" --gguf "$GGUF" || exit
"$python" -m recipes.smollm2.train "$work/model" --prompts "$PROMPTS/train.jsonl" --out "$work/exits" \
    --answers "$work/answers" --device cuda ${TEXT:+--text "$TEXT"} "$@" || exit
echo "from the GGUF file to exits: $(($(date +%s) - start)) s"
"$python" -m recipes.smollm2.measure "$work/model" --exits "$work/exits" --prompts "$PROMPTS/heldout.jsonl" \
    --out "$work/measured/measured.json" --device cuda || exit
mkdir -p "$OUT/block" "$OUT/draft"
cp "$work/exits/training.json" "$work/measured/measured.json" "$OUT"
cp "$work"/exits/draft/exits.* "$OUT/draft"
split -b 14M -d "$work/exits/block/exits.safetensors" "$OUT/block/part."
cp "$work/exits/block/exits.json" "$OUT/block"
ls -la "$OUT" "$OUT"/*
