#!/usr/bin/env bash
# The whole comparison, a process per backbone, on a GPU each if there are two.
#   TEXT=DIR OUT=DIR [TOKENS=12e6] [SECONDS_A_RUN=140] [SECONDS_MOST=560] [RUNS="seed0 seed1 seed2"] [HEADS="mlp mamba"] \
#       bash recipes/heads/gpu.sh
# SECONDS_A_RUN: how long one seed may train; fewer tokens where that is too short. SECONDS_MOST: when all is cut off;
# runs evaluated by then are recorded. Leaves OUT/MODEL.json, OUT/exits.tar.gz (the first run's) and logs.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${TEXT:?folder that recipes/texts.py heads wrote}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python3} work=${WORK:-$(mktemp -d)} gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
mkdir -p "$work" "$OUT"
gpu=0
for model in transformer-ee mamba-ee; do
    # shellcheck disable=SC2086  # several words each
    CUDA_VISIBLE_DEVICES=$gpu timeout "${SECONDS_MOST:-560}" "$PYTHON" recipes/heads/compare.py both $model \
        --text "$TEXT" --out "$work" --tokens "${TOKENS:-12e6}" ${SECONDS_A_RUN:+--seconds $SECONDS_A_RUN} \
        --eval-tokens "${EVAL_TOKENS:-6e4}" --device "${DEVICE:-cuda}" --runs ${RUNS:-seed0 seed1 seed2 fourteen paper} \
        ${HEADS:+--heads $HEADS} ${MORE:-} >"$work/$model.log" 2>&1 &
    [ "$gpus" -lt 2 ] || gpu=1
done
wait
cp "$work"/*.json "$OUT/" 2>/dev/null || echo "nothing was evaluated in time"
# Of all runs the archive would be too large for some ways back; the first one's heads are those that may ship.
first=${RUNS:-seed0}
tar -C "$work" --exclude=.checkpoint -czf "$OUT/exits.tar.gz" "transformer-ee/${first%% *}" "mamba-ee/${first%% *}"
tar -C "$work" -czf "$OUT/logs.tar.gz" $(cd "$work" && ls ./*.log)
for log in "$work"/*.log; do echo "== $log" && grep -v -e Loading -e falling "$log" | tail -n 14; done
