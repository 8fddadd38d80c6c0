#!/bin/bash
# Does everything run that two GPUs are needed for? In a given number of seconds, about 110:
#
#     OUT=results bash experiments/two_gpus/rehearse.sh 110
#
# The tests of ranks on GPUs, and every phase of the measurement with a model of four layers, all
# beside each other and each with an end of its own. Nothing that is timed here is of use. Results
# are in $OUT, with what the compiler made (compiled.tar.gz): unpacked into a folder of the same
# name, and that given to the measurement as TRITON_CACHE_DIR, it spares that time.
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
export MUXTUNE_TEST_TIMEOUT_S=$((budget - 35))
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
beside warm $((budget - 30)) "$python" -m experiments.two_gpus.warm --device "$device" \
  --limit-s $((budget - 35))
beside tests $((budget - 12)) "$python" -m pytest -m gpu -q -rA --tb=short \
  -p no:cacheprovider -n 4 tests/gpu/test_ranks_cuda.py
for phase in 0 1 2 3 4; do  # the others differ in their configurations only
  beside "phase$phase" $((budget - 15)) "$python" -m experiments.two_gpus.lease \
    --output "$work/phases/$phase" --device "$device" --layers "$layers" --rounds 2 \
    --phases "$phase" --only tp-rehearsal,pp-rehearsal --budget $((budget - 20))
done
wait "${jobs_started[@]}"
for log in "$work"/phase*.log "$work/warm.log"; do
  echo "==== $(basename "$log")"
  grep -E '^\[|begins|left out|ended|Error' "$log" | grep -v Warning | cut -c1-200 | tail -n 14
done
grep -E '^(FAILED|PASSED|ERROR|[0-9]+ passed)|passed|failed|differ by' "$work/tests.log" | cut -c1-250
for log in "$work"/*.log; do
  echo "==== $(basename "$log")"
  tail -c 60000 "$log"
done >"$out/logs.txt"
tar czf "$out/phases.tar.gz" -C "$work" phases 2>/dev/null
mkdir -p "$TRITON_CACHE_DIR"
tar czf "$out/compiled.tar.gz" --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' \
  --exclude='*.ptx' -C "$TRITON_CACHE_DIR" . 2>/dev/null
ls -la "$out"
echo "$(left) s left"
