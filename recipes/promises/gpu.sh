#!/usr/bin/env bash
# Losses of both shipped backbones, one GPU each if there are two (side by side on one if not).
#   OUT=DIR [DATA=.carry/promises/texts.jsonl.xz] [LIMIT=480] bash recipes/promises/gpu.sh [options of study.py harvest]
# Carry .carry/promises. Leaves OUT/MODEL.jsonl.gz (unpack; then `study.py pool --out`) and OUT/MODEL.log; what a run
# that was cut off had finished is there too.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}"
DATA=${DATA:-.carry/promises/texts.jsonl.xz}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
GPUS=$(nvidia-smi -L | wc -l)
mkdir -p /tmp/promises

harvest() { # model, number
    CUDA_VISIBLE_DEVICES=$(($2 % GPUS)) timeout "${LIMIT:-480}" "${PYTHON:-python3}" recipes/promises/study.py harvest \
        --model "$1" --data "$DATA" --out /tmp/promises --device cuda --rows 128 "${@:3}" >"$OUT/$1.log" 2>&1
    local status=$?
    gzip -9 -c "/tmp/promises/$1.jsonl" >"$OUT/$1.jsonl.gz"
    tail -n 3 "$OUT/$1.log"
    return $status
}

harvest transformer-ee 0 "$@" &
one=$!
harvest mamba-ee 1 "$@" &
two=$!
status=0
wait $one || status=1
wait $two || status=1
exit $status
