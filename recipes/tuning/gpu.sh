#!/usr/bin/env bash
# An ordinary checkpoint trained from scratch, then tuned in several ways, side by side on one GPU.
#   DATA=DIR OUT=DIR [DEADLINE=110] [TOKENS=4e6] [MODEL=DIR] bash recipes/tuning/gpu.sh
# DATA: corpus files, as recipes/reference takes them. MODEL: tune this folder instead of training one. DEADLINE:
# seconds for the training. Leaves OUT/transformer-ordinary, OUT/{lora,full}/model.safetensors and OUT/records.tar.gz
# (tuning.json, model card and log of every way).
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?folder with the corpus files}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
work=/tmp/dynamax-tuning
mkdir -p $work/tuned "$OUT"
OUT=$(realpath "$OUT")
if [ -z "${MODEL:-}" ]; then
    KINDS=transformer OBJECTIVE=ordinary DEADLINE=${DEADLINE:-110} bash recipes/reference/gpu.sh || exit 1
    $PYTHON recipes/reference/finish.py "$OUT" $work || exit 1
    MODEL=$work/transformer-ordinary
fi
status=0
declare -A running=()
for name in lora lora-rotating lora-text full full-rotating full-text; do
    OMP_NUM_THREADS=2 $PYTHON recipes/tuning/study.py run "$MODEL" --data "$DATA" --out $work/tuned --names $name \
        --tokens "${TOKENS:-4e6}" --device "${DEVICE:-cuda}" ${EXTRA:-} >$work/$name.log 2>&1 &
    running[$name]=$!
done
for name in "${!running[@]}"; do
    wait "${running[$name]}" || { status=1; tail -n 5 $work/$name.log; }
    tail -n 1 $work/$name.log
done
$PYTHON recipes/tuning/study.py table $work/tuned || status=1
(cd $work && tar -czf "$OUT/records.tar.gz" ./*.log tuned/*/tuning.json tuned/*/README.md)
for name in lora full; do
    mkdir -p "$OUT/$name" && cp $work/tuned/$name/model.safetensors "$OUT/$name/" || status=1
done
exit $status
