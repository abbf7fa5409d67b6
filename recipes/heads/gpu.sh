#!/usr/bin/env bash
# The whole contest on one GPU, every seed of both backbones in a process of its own:
#   TEXT=DIR OUT=DIR [TOKENS=4e6] [TRAIN=260] [JUDGE=150] bash recipes/heads/gpu.sh
# TRAIN, JUDGE: seconds after which the two are cut off. Leaves OUT/MODEL.json, logs, and OUT/exits-SEED.tar.gz.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${TEXT:?folder that recipes/exits/text.py wrote}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python3} work=${WORK:-/tmp/dynamax-heads}
mkdir -p "$work" "$OUT"
part() { # model, name, runs
    local how=("$1" --text "$TEXT" --out "$work/$2" --tokens "${TOKENS:-4e6}" --device "${DEVICE:-cuda}" --runs $3)
    timeout "${TRAIN:-260}" "$PYTHON" recipes/heads/contest.py train "${how[@]}"
    timeout "${JUDGE:-150}" "$PYTHON" recipes/heads/contest.py judge "${how[@]}"
}
for model in transformer-ee mamba-ee; do
    for seed in 0 1 2; do part $model seed$seed seed$seed >"$work/$model-seed$seed.log" 2>&1 & done
    part $model more "paper twelve again" >"$work/$model-more.log" 2>&1 &
done
wait
for model in transformer-ee mamba-ee; do $PYTHON recipes/heads/contest.py merge $model --out "$work" && cp "$work/$model.json" "$OUT/"; done
tar -C "$work" --exclude=.checkpoint -czf "$OUT/exits-seed0.tar.gz" seed0
tar -C "$work" -czf "$OUT/logs.tar.gz" $(cd "$work" && ls ./*.log)
for log in "$work"/*.log; do echo "== $log" && grep -v -e Loading -e falling "$log" | tail -n 14; done
