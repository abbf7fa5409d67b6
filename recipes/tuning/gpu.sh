#!/usr/bin/env bash
# An ordinary checkpoint trained from scratch, then tuned in several ways, side by side on one GPU.
#   DATA=DIR OUT=DIR [DEADLINE=110] [TOKENS=4M] [MODEL=DIR] bash recipes/tuning/gpu.sh
# DATA: corpus files, as recipes/reference takes them. MODEL: tune this folder instead of training one. DEADLINE:
# seconds for the training. Leaves OUT/transformer-ordinary, OUT/{lora,full}/model.safetensors and OUT/records.tar.gz
# (tuning.json, model card and log of every way).
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?folder with the corpus files}" "${OUT:?folder for results}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
mkdir -p $work/tuned "$OUT"
OUT=$(realpath "$OUT")
if [ -z "${MODEL:-}" ]; then
    KINDS=transformer OBJECTIVE=ordinary DEADLINE=${DEADLINE:-110} bash recipes/reference/gpu.sh || exit 1
    $PYTHON recipes/reference/finish.py "$OUT" $work || exit 1
    MODEL=$work/transformer-ordinary
fi
status=0 text="--teacher current --distill 0.7" # the reference backbones' loss
declare -A running=() ways=(
    [lora]="" [lora-rotating]="--schedule rotating" [lora-text]="$text" [full]="--method full --lr 1e-3"
    [full-rotating]="--method full --lr 1e-3 --schedule rotating" [full-text]="--method full --lr 1e-3 $text"
)
for name in "${!ways[@]}"; do
    # shellcheck disable=SC2086  # several words each
    OMP_NUM_THREADS=2 $PYTHON -m dynamax_llm.cli tune "$MODEL" --data "$DATA" --out "$work/tuned/$name" ${ways[$name]} \
        --tokens "${TOKENS:-4M}" --batch 16384 --eval-tokens 50k --dtype float32 --device "${DEVICE:-cuda}" ${EXTRA:-} \
        >"$work/$name.log" 2>&1 &
    running[$name]=$!
done
for name in "${!running[@]}"; do
    wait "${running[$name]}" || { status=1; tail -n 5 $work/$name.log; }
    tail -n 1 $work/$name.log
done
$PYTHON recipes/tuning/study.py $work/tuned || status=1
(cd $work && tar -czf "$OUT/records.tar.gz" ./*.log tuned/*/tuning.json tuned/*/README.md)
for name in lora full; do
    mkdir -p "$OUT/$name" && cp $work/tuned/$name/model.safetensors "$OUT/$name/" || status=1
done
exit $status
