#!/usr/bin/env bash
# The whole contest on one GPU, a process per backbone: more of them only take turns on it.
#   TEXT=DIR OUT=DIR [TOKENS=4e6] [SECONDS_MOST=500] [RUNS="seed0 fourteen seed1 seed2"] [HEADS="mlp mamba"] \
#       bash recipes/heads/gpu.sh
# SECONDS_MOST: when both are cut off; runs judged by then are recorded. Leaves OUT/MODEL.json, logs, OUT/exits.tar.gz.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${TEXT:?folder that recipes/exits/text.py wrote}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python3} work=${WORK:-/tmp/dynamax-heads}
mkdir -p "$work" "$OUT"
for model in transformer-ee mamba-ee; do
    # shellcheck disable=SC2086  # several words each
    timeout "${SECONDS_MOST:-500}" "$PYTHON" recipes/heads/contest.py both $model --text "$TEXT" --out "$work" \
        --tokens "${TOKENS:-4e6}" --eval-tokens "${EVAL_TOKENS:-8e4}" --device "${DEVICE:-cuda}" \
        --runs ${RUNS:-seed0 fourteen seed1 seed2 paper again} ${HEADS:+--heads $HEADS} ${MORE:-} >"$work/$model.log" 2>&1 &
done
wait
cp "$work"/*.json "$OUT/" 2>/dev/null || echo "nothing was judged in time"
tar -C "$work" --exclude=.checkpoint -czf "$OUT/exits.tar.gz" transformer-ee mamba-ee
tar -C "$work" -czf "$OUT/logs.tar.gz" $(cd "$work" && ls ./*.log)
for log in "$work"/*.log; do echo "== $log" && grep -v -e Loading -e falling "$log" | tail -n 14; done
