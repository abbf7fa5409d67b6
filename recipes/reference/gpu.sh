#!/usr/bin/env bash
# Train both reference backbones at once, one GPU each (with 4 GPUs: two each).
#   DATA=DIR OUT=DIR T_TOKENS=800e6 M_TOKENS=500e6 DEADLINE=520 bash recipes/reference/gpu.sh
#   KINDS=transformer OBJECTIVE=ordinary DATA=DIR OUT=DIR DEADLINE=110 bash recipes/reference/gpu.sh
# KINDS: which of the two. OBJECTIVE=ordinary: the last layer alone, as checkpoints usually are trained. DEADLINE:
# seconds, tokenising included. Extra options for one model: T_EXTRA="--batch 128", M_EXTRA=... . At most 8 files in OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?folder with the corpus files}" "${OUT:?folder for results}"
CACHE=${CACHE:-build/reference}
PYTHON=${PYTHON:-python3}
GPUS=$(nvidia-smi -L | wc -l)
EACH=$((GPUS >= 4 ? 2 : 1))
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=8 TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
mkdir -p "$OUT"
nvidia-smi -L
begun=$SECONDS
$PYTHON recipes/reference/train.py prepare --data "$DATA" --cache "$CACHE"
DEADLINE=$((${DEADLINE:-520} - (SECONDS - begun)))
KINDS=${KINDS:-transformer mamba}

launch() { # kind, GPUs, tokens, extra options
    local runner=("$PYTHON")
    [ "$EACH" = 2 ] &&
        runner=("$PYTHON" -m torch.distributed.run --nproc_per_node=2 --master_port=$((29500 + ${2%%,*})))
    # separate compile caches: two fresh compilers never wait for each other
    CUDA_VISIBLE_DEVICES=$2 TORCHINDUCTOR_CACHE_DIR=$PWD/build/inductor-$1 "${runner[@]}" recipes/reference/train.py "$1" \
        --data "$DATA" --cache "$CACHE" --out "$OUT" --tokens "$3" --deadline "$DEADLINE" \
        --objective "${OBJECTIVE:-multi-exit}" $4 \
        >"$OUT/$1.log" 2>&1
}

if [ "$EACH" = 2 ]; then first=0,1 second=2,3; else first=0 second=$((GPUS > 1 ? 1 : 0)); fi
declare -A gpu=([transformer]=$first [mamba]=$second) extra=([transformer]=${T_EXTRA:-} [mamba]=${M_EXTRA:-})
declare -A tokens=([transformer]=${T_TOKENS:-800e6} [mamba]=${M_TOKENS:-500e6}) running=()
for kind in $KINDS; do
    launch "$kind" "${gpu[$kind]}" "${tokens[$kind]}" "${extra[$kind]}" &
    running[$kind]=$!
done
status=0
for kind in $KINDS; do wait "${running[$kind]}" || status=1; done
for kind in $KINDS; do
    echo "=== $kind"
    head -c 1500 "$OUT/$kind.log"
    echo "..."
    tail -c 4000 "$OUT/$kind.log"
done
exit $status
