#!/usr/bin/env bash
# The whole quality study on a machine with a GPU: batches on the GPU, verify and the passes of defer on its CPU cores,
# one process per model, estimator and part (the batches, then each window of verify).
#   OUT=DIR DATA=prompts.jsonl.xz [WORKERS=16] bash recipes/policies/gpu.sh [options of study.py run]
# Leaves OUT/cells.tar.gz (unpack, then `study.py collect --out`) and OUT/log. OUT/cells.tar.gz of an interrupted run,
# given as START=FILE, is continued.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}" "${DATA:?what recipes/texts.py policies wrote}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
cells=$(mktemp -d)
[ -z "${START:-}" ] || tar -C "$cells" -xzf "$START"
pack() { tar -C "$cells" -czf "$OUT/cells.tar.gz" .; }
trap pack EXIT
options="$*"
stage() { # policies of one process each: WORKERS processes at a time, the slower model first
    for model in mamba-ee transformer-ee; do
        for estimator in linear mlp transformer mamba softmax_margin static; do
            for policies in "$@"; do echo "--models $model --estimators $estimator --policies $policies $options"; done
        done
    done | timeout "${LIMIT:-270}" xargs -P "${WORKERS:-16}" -L 1 "${PYTHON:-python3}" recipes/policies/study.py run \
        --data "$DATA" --out "$cells" --device cuda 2>&1 | tee -a "$OUT/log"
}
# verify comes last: it takes the thresholds that the batches have found by then.
stage "propagate copy stale defer"
stage verify verify-4
