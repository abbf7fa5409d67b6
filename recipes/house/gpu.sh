#!/usr/bin/env bash
# This tree on a GPU, after a change of the house: the engines' tests with the real kernels, then decoding at both 7B
# shapes against the tree before, in turn in one run.
#   OUT=DIR bash recipes/house/gpu.sh BEFORE        BEFORE: a folder with the src/ of the tree before
# PACKAGES: a folder with packages that the machine lacks. TESTS=0 or SHAPES="" leaves a part out.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?folder for results}"
before=${1:?folder with the tree before}
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 EXTRA_PATH="${PACKAGES:-}"
mkdir -p "$OUT"
if [ "${TESTS:-1}" = 1 ]; then
    PYTHONPATH="$PWD/src:$PWD:$EXTRA_PATH" timeout "${TEST_SECONDS:-240}" "$python" -m pytest -q -p no:cacheprovider \
        -p no:xdist tests/engines 2>&1 | tail -40 | tee "$OUT/tests.txt"
fi
[ -z "${SHAPES-mistral-7b codestral-mamba-7b}" ] || PYTHONPATH="$PWD/src:$EXTRA_PATH" timeout "${BENCH_SECONDS:-420}" "$python" recipes/house/before_after.py \
    "$before" --gpu --models --shapes ${SHAPES-mistral-7b codestral-mamba-7b} --rounds "${ROUNDS:-3}" \
    --tokens "${TOKENS:-128}" --out "$OUT"
