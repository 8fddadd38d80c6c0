#!/bin/bash
# Does everything run that two GPUs are needed for? In a given number of seconds, about 180:
#
#     OUT=results bash experiments/two_gpus/rehearse.sh 180
#
# The tests of ranks on GPUs, what ranks exchange, and every phase of the measurement with a model
# of four layers. Nothing that is timed here is of use. Results are in $OUT, with what the compiler
# made (compiled.tar.gz): unpacked into a folder of the same name, and that given to the measurement
# as TRITON_CACHE_DIR, it spares that time.
set -u
budget=${1:?seconds}
out=${OUT:?a folder for results}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
layers=${LAYERS:-4}
work=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH=.:sim:kernels${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false MUXTUNE_TEST_DEVICE=$device
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/muxtune-compiled}  # the same there, see below
export TORCH_NCCL_DUMP_ON_TIMEOUT=0
exec > >(tee "$out/session.log") 2>&1
left() { echo $((budget - SECONDS)); }

# name, seconds, then a command: in the background, its output in a log of its own
beside() {
  local name=$1 limit=$2
  shift 2
  (
    begun=$SECONDS
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1
    echo "[$name] exit $? after $((SECONDS - begun)) s"
  ) &
  jobs_started+=($!)
}

jobs_started=()
"$python" - <<'END'
import torch
print(torch.__version__, torch.cuda.device_count(), "GPUs", torch.cuda.nccl.version() if torch.cuda.is_available() else "")
END
[ "$device" = cuda ] && nvidia-smi topo -m
beside tests $((budget - 25)) "$python" -m pytest -m gpu -q -rA --tb=short \
  -p no:cacheprovider -n 4 tests/gpu/test_ranks_cuda.py
beside exchanges 60 "$python" -m experiments.two_gpus.exchanges --device "$device" \
  --out "$work/exchanges.jsonl" --limit-s 55
timeout -k 5 $((budget / 2)) "$python" -m experiments.two_gpus.warm --device "$device" \
  --limit-s $((budget / 2 - 5)) >"$work/warm.log" 2>&1
echo "[warm] exit $? after $SECONDS s"
tail -n 12 "$work/warm.log"
beside slow_exchanges 50 env NCCL_P2P_DISABLE=1 "$python" -m experiments.two_gpus.exchanges \
  --device "$device" --out "$work/exchanges.jsonl" --limit-s 45
timeout -k 5 $(($(left) - 12)) "$python" -m experiments.two_gpus.lease --output "$work/phases" \
  --device "$device" --layers "$layers" --rounds 2 --budget $(($(left) - 17)) 2>&1
echo "[phases] exit $? after $SECONDS s"
wait "${jobs_started[@]}"
for log in "$work"/*.log; do
  echo "==== $(basename "$log")"
  tail -c 30000 "$log"
done >"$out/logs.txt"
cp "$work/exchanges.jsonl" "$work/phases/rows.jsonl" "$out/" 2>/dev/null
tar czf "$out/phases.tar.gz" -C "$work" phases 2>/dev/null
mkdir -p "$TRITON_CACHE_DIR"
tar czf "$out/compiled.tar.gz" --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' \
  --exclude='*.ptx' -C "$TRITON_CACHE_DIR" . 2>/dev/null
ls -la "$out"
echo "$(left) s left"
