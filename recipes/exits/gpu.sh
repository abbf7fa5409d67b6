#!/usr/bin/env bash
# Heads for both shipped backbones and their comparison, one GPU each if there are two (one after the other if not).
#   TEXT=DIR OUT=DIR [TOKENS=4e6] [EVAL=100000] bash recipes/exits/gpu.sh
# Leaves OUT/MODEL.tar.gz (heads, comparison.json) and OUT/MODEL.log.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TEXT:?folder that recipes/exits/text.py wrote}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
GPUS=$(nvidia-smi -L | wc -l)

build() { # model, GPU
    local folder=/tmp/exits/$1
    mkdir -p "$folder"
    [ -z "${START:-}" ] || cp -r "$START/$1/." "$folder" # heads trained earlier
    for stage in train compare; do
        CUDA_VISIBLE_DEVICES=$2 $PYTHON recipes/exits/build.py $stage "$1" --text "$TEXT" --out "$folder" --device cuda \
            --tokens "${TOKENS:-5e6}" --eval-tokens "${EVAL:-100000}" --names "${NAMES:-}" || return 1
    done
    tar -C "$folder" --exclude=.checkpoint -czf "$OUT/$1.tar.gz" .
}

status=0
if [ "$GPUS" -gt 1 ]; then
    build transformer-ee 0 >"$OUT/transformer-ee.log" 2>&1 &
    one=$!
    build mamba-ee 1 >"$OUT/mamba-ee.log" 2>&1 &
    two=$!
    wait $one || status=1
    wait $two || status=1
else
    for model in transformer-ee mamba-ee; do build $model 0 >"$OUT/$model.log" 2>&1 || status=1; done
fi
for model in transformer-ee mamba-ee; do echo "=== $model"; tail -c 5000 "$OUT/$model.log"; done
exit $status
