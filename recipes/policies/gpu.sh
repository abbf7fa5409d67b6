#!/usr/bin/env bash
# The whole quality study on a machine with a GPU: batches on the GPU, verify and the passes of defer on its CPU cores,
# one process per model, judge and part (the batches; each window of verify).
#   OUT=DIR [DATA=.carry/policies/prompts.jsonl.xz] [WORKERS=16] bash recipes/policies/gpu.sh [options of study.py run]
# Carry .carry/policies. Leaves OUT/cells.tar.gz (unpack, then `study.py collect --out`) and OUT/log.
# OUT/cells.tar.gz of an interrupted run, given as START=FILE, is continued.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}"
DATA=${DATA:-.carry/policies/prompts.jsonl.xz}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
cells=/tmp/policies/cells
mkdir -p "$cells"
[ -z "${START:-}" ] || tar -C "$cells" -xzf "$START"
pack() { tar -C "$cells" -czf "$OUT/cells.tar.gz" .; }
trap pack EXIT
# Ends in time to pack what is finished, should the machine be slower than thought.
timeout "${LIMIT:-540}" "${PYTHON:-python3}" recipes/policies/study.py run --data "$DATA" --out "$cells" \
    --device cuda --alone-device cpu --workers "${WORKERS:-16}" "$@" 2>&1 | tee "$OUT/log"
