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
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=1
exec > >(tee "$out/session.log") 2>&1

left() { echo $((budget - SECONDS)); }

# A third of the time at most, and not more than they take.
side_limit=$((budget / 3 > 190 ? 190 : budget / 3))
"$python" "$here/side_by_side.py" --out "$out" --work "$work" --seconds "$side_limit"
echo "$(left) s left"

parts=lora_8,bound,hf_peft,sl_peft,ledger,lora_32,mixed_methods,mixed_ranks,llama_3_1_8b
[ "$budget" -ge 400 ] && parts=$parts,lora_1,lora_4,lora_16,lora_8_planned
# The memory curve gets a quarter of a long session.
keep=$((budget >= 400 ? budget / 4 : 5))
checked=()
[ -s "$work/steps/main.json" ] && checked=(--checked "$work/steps/main.json")
timeout -k 5 $(($(left) - 3)) "$python" experiments/step_throughput/run.py \
  --out "$out/step_throughput.json" --only $parts --seconds $(($(left) - keep - 10)) --sl-limit-s 20 \
  "${checked[@]}"
echo "$(left) s left"

if [ "$(left)" -ge 40 ]; then
  timeout -k 5 $(($(left) - 3)) "$python" "$here/run.py" --parts memory --out "$out" \
    --memory-seconds $(($(left) - 45))
fi
if [ "$(left)" -ge 60 ]; then
  timeout -k 5 $(($(left) - 3)) "$python" "$here/run.py" --parts joins --out "$out"
fi
echo "$(left) s left"
