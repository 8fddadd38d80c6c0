#!/bin/bash
# Everything that needs one GPU, in order of value, in a given number of seconds:
#
#     OUT=results bash experiments/gpu_runtime/device_session.sh 240
#
# First what needs no quiet GPU, side by side: the tests marked gpu, isolation, and a rehearsal of
# the measurements with one layer, which compiles their kernels into the caches. Then, alone, the
# step throughput, then the memory curve, each as far as the time goes. Results are in $OUT.
set -u
budget=${1:?seconds}
out=${OUT:?a folder for results}
python=${PYTHON:-python3}
here=$(dirname "$0")
work=$(mktemp -d)
mkdir -p "$out" "$work/parts"
export PYTHONPATH=.:sim:kernels${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false
exec > >(tee "$out/session.log") 2>&1
jobs_started=()

left() { echo $((budget - SECONDS)); }

# name, then a command: in the background, its output in a log of its own
beside() {
  local name=$1
  shift
  (
    begun=$SECONDS
    timeout -k 5 "$side_limit" "$@" >"$work/$name.log" 2>&1
    echo "[$name] exit $? after $((SECONDS - begun)) s"
    tail -n 3 "$work/$name.log" | cut -c -600
  ) &
  jobs_started+=($!)
}

tests() {
  local name=$1
  shift
  beside "tests_$name" "$python" -m pytest -m gpu --no-header -q --maxfail=6 --tb=short \
    -p no:cacheprovider --durations=5 "$@"
}

rehearse() {
  beside "rehearse_$1" "$python" experiments/step_throughput/run.py --rehearse --only "$2" \
    --out "$work/rehearse_$1.json"
}

part() {
  beside "$1" "$python" "$here/run.py" --parts "$1" --out "$work/parts"
}

gather() {
  for log in "$work"/tests_*.log; do
    echo "==== $(basename "$log")"
    tail -c 60000 "$log"
  done >"$out/tests.log"
  for log in "$work"/rehearse_*.log; do
    echo "==== $(basename "$log")"
    tail -c 20000 "$log"
  done >"$out/rehearsal.log"
  "$python" - "$work/parts" "$out/gpu_runtime.json" <<'END'
import json, pathlib, sys
found = {path.stem: json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob("*.json")}
pathlib.Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
END
}

# Two fifths of the time at most, and not more than they take.
side_limit=$((budget * 2 / 5 > 170 ? 170 : budget * 2 / 5))
echo "beside each other, at most $side_limit s of $budget"
rehearse main check,lora_8,bound,hf_peft,sl_peft
rehearse mixed mixed_methods,mixed_ranks
rehearse many lora_32
[ "$budget" -ge 400 ] && rehearse others llama_3_1_8b,lora_16,lora_4,lora_1,lora_8_planned
tests static tests/runtime/test_static_step_methods.py tests/runtime/test_shared_attention.py \
  tests/gpu/test_static_step_cuda.py
tests runtime tests/gpu/test_gpu_runtime.py
# Uncaptured with blocking launches, so that an error is told by the launch that made it.
beside tests_many_uncaptured env CUDA_LAUNCH_BLOCKING=1 "$python" -m pytest -m gpu --no-header -q \
  --tb=long -p no:cacheprovider tests/gpu/test_many_slots.py -k "any_number and False"
beside tests_many_captured "$python" -m pytest -m gpu --no-header -q --tb=short \
  -p no:cacheprovider tests/gpu/test_many_slots.py -k "share or True"
tests kernels -n 6 --dist worksteal tests/kernels/test_triton_linear.py \
  tests/kernels/test_triton_row_scaling.py tests/kernels
part isolation_mixed
part isolation_fast
if [ "$budget" -ge 400 ]; then
  part isolation_lora
  part isolation_faults
  part kill
fi
wait "${jobs_started[@]}"
gather
echo "$(left) s left"

parts=lora_8,bound,hf_peft,ledger,mixed_methods,sl_peft,lora_32,mixed_ranks,llama_3_1_8b
[ "$budget" -ge 400 ] && parts=$parts,lora_1,lora_4,lora_16,lora_8_planned
# The memory curve gets a quarter of a long session.
keep=$((budget >= 400 ? budget / 4 : 5))
checked=()
[ -s "$work/rehearse_main.json" ] && checked=(--checked "$work/rehearse_main.json")
timeout -k 5 $(($(left) - 3)) "$python" experiments/step_throughput/run.py \
  --out "$out/step_throughput.json" --only $parts --seconds $(($(left) - keep - 10)) --sl-limit-s 20 \
  "${checked[@]}"
echo "$(left) s left"

if [ "$(left)" -ge 40 ]; then
  timeout -k 5 $(($(left) - 3)) "$python" "$here/run.py" --parts memory --out "$out" \
    --memory-seconds $(($(left) - 45))
fi
if [ "$(left)" -ge 60 ]; then
  timeout -k 5 $(($(left) - 3)) "$python" "$here/run.py" --parts joins --out "$work/parts"
  gather
fi
echo "$(left) s left"
