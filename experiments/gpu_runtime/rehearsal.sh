#!/bin/bash
# What needs a GPU but no quiet one, in a given number of seconds; see side_by_side.py:
#
#     OUT=results bash experiments/gpu_runtime/rehearsal.sh 200
set -u
export PYTHONPATH=.:sim:kernels${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=1
export PYTHONFAULTHANDLER=1 PYTHONDONTWRITEBYTECODE=1
set -o pipefail
"${PYTHON:-python3}" "$(dirname "$0")/side_by_side.py" --out "${OUT:?a folder for results}" \
  --seconds "${1:?seconds}" "${@:2}" 2>&1 | tee "$OUT/session.log"
