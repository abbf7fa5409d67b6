#!/usr/bin/env bash
# Losses of both shipped backbones, one GPU each if there are two (side by side on one if not).
#   OUT=DIR DATA=texts.jsonl.xz [LIMIT=480] bash recipes/promises/gpu.sh [options of study.py pool]
# Leaves OUT/pool-MODEL.json, which is written point after point, and OUT/MODEL.log.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}" "${DATA:?what recipes/texts.py promises wrote}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
gpus=$(nvidia-smi -L | wc -l) gpu=0 running=()
for model in transformer-ee mamba-ee; do
    CUDA_VISIBLE_DEVICES=$((gpu % gpus)) timeout "${LIMIT:-480}" "${PYTHON:-python3}" recipes/promises/study.py pool \
        --models $model --data "$DATA" --out "$OUT" --device cuda --rows 128 "$@" >"$OUT/$model.log" 2>&1 &
    running+=($!) gpu=$((gpu + 1))
done
status=0
for process in "${running[@]}"; do wait "$process" || status=1; done
tail -n 3 "$OUT"/*.log
exit $status
