#!/bin/bash
# The whole measurement on two GPUs, in a given number of seconds, about 220:
#
#     OUT=results bash experiments/two_gpus/session.sh 220
#
# TRITON_CACHE_DIR: what was compiled before (experiments/gpu_runtime/compile_ahead.py, --cases
# two_gpus); what it lacks is compiled meanwhile, told at the end and brought back. With COMPILE_S=55
# kernels are compiled first, side by side; the first of these processes also compares the two forms
# of a stage, and where they do not agree the plain one is measured. Then come the phases of
# ``lease``, alone on the machine.
set -u
budget=${1:?seconds}
out=${OUT:?a folder for results}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
compile_s=${COMPILE_S:-0}
mkdir -p "$out"
export PYTHONPATH=.:sim:kernels${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false TORCH_NCCL_DUMP_ON_TIMEOUT=0
work=$(mktemp -d)
left() { echo $((budget - SECONDS)); }

if [ -n "${TRITON_CACHE_DIR:-}" ]; then mkdir -p "$TRITON_CACHE_DIR"; fi
touch "$work/begun"

plain=""
if [ "$compile_s" -gt 0 ]; then
  timeout -k 5 $((compile_s + 5)) "$python" -m experiments.two_gpus.warm --device "$device" \
    --limit-s "$compile_s" ${WARM:-} >"$work/warm.log" 2>&1
  echo "[warm] exit $? after $SECONDS s"
  grep -E '^\[|differ by|Error' "$work/warm.log"
  grep -q 'both forms of a stage differ' "$work/warm.log" &&
    ! grep -q 'stages differ by' "$work/warm.log" || plain=--plain
  cp "$work/warm.log" "$out/"
fi
echo "stages: ${plain:-as the whole step}"
timeout -k 5 $(($(left) - 8)) "$python" -m experiments.two_gpus.lease --output "$work/measured" \
  --device "$device" --budget $(($(left) - 14)) $plain ${LEASE:-} 2>&1 | tee "$work/lease.log" |
  grep -v Warning | cut -c1-600
cp "$work/measured/table.md" "$work/measured/results.json" "$out/" 2>/dev/null
tail -c 300000 "$work/lease.log" >"$out/lease.log"
gzip -c "$work/measured/rows.jsonl" >"$out/rows.jsonl.gz"
tar czf "$out/traces.tar.gz" -C "$work" --wildcards --exclude=rows.jsonl measured 2>/dev/null
if [ -n "${TRITON_CACHE_DIR:-}" ]; then
  (cd "$TRITON_CACHE_DIR" && find . -name '*.cubin' -newer "$work/begun" -printf '%h\n') |
    sort -u >"$work/new"
  echo "compiled here: $(wc -l <"$work/new") kernels"
  tar cJf "$out/compiled_here.tar.xz" --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' \
    --exclude='*.ptx' -C "$TRITON_CACHE_DIR" -T "$work/new" 2>/dev/null
fi
ls -la "$out"
echo "$(left) s left"
