#!/bin/bash
# Everything that needs one GPU, in order of value, in a given number of seconds, of which so many
# at most beside each other (a quarter, but 200 at most; all of side_by_side.py or some of it):
#
#     OUT=results bash experiments/gpu_runtime/device_session.sh 590 [150 [NAMES]]
#
# PARTS: of the step throughput, in their order; SL_LIMIT_S: with less than some 80 the padded batch
# has fewer than 50 steps, and the run is not reportable; MEMORY_TASKS, MEMORY_S, JOINS_S, RATIO_S.
#
# In two calls: WORK=a folder for both, first `side_by_side.py --work`, then this with 0 seconds for it.
# First what needs no quiet GPU (side_by_side.py), which compiles all kernels into the caches. Then,
# alone: the step throughput, the memory curve, joins, the kernel ratio, each as far as the time goes;
# what is done is in $OUT at any time, in at most eight files.
set -u
budget=${1:?seconds}
out=${OUT:?a folder for results}
python=${PYTHON:-python3}
here=$(dirname "$0")
work=${WORK:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONPATH=.:sim:kernels${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=1
export PYTHONFAULTHANDLER=1 PYTHONDONTWRITEBYTECODE=1
exec > >(tee "$out/session.log") 2>&1

left() { echo $((budget - SECONDS)); }

# seconds to keep for what follows, then a command: stopped in time, so that it says what it knows
alone() {
  local keep=$1 limit
  shift
  limit=$(($(left) - keep))
  [ "$limit" -ge 15 ] || { echo "left out for want of time: $*"; return; }
  timeout -s INT -k 5 "$limit" "$@"
  echo "==== exit $?, $(left) s left"
}

# Results of parts into one file, of one kind (with a list of results) into one list: DESTINATION
# SOURCE...
merge() {
  "$python" - "$@" <<'END'
import json, pathlib, sys
target = pathlib.Path(sys.argv[1])
found = json.loads(target.read_text()) if target.exists() else {}
for path in map(pathlib.Path, sys.argv[2:]):
    part = json.loads(path.read_text()) if path.exists() else {}
    if "results" in part:
        found = part | {"results": found.get("results", []) + part["results"]}
    elif part:
        found[path.stem] = part
target.write_text(json.dumps(found, indent=1) + "\n")
END
}

side_limit=${2:-$((budget / 4 > 200 ? 200 : budget / 4))}
[ "$side_limit" -eq 0 ] || "$python" "$here/side_by_side.py" --out "$out" --work "$work" \
  --seconds "$side_limit" ${3:+--only "$3"}
echo "==== $(left) s left"

# Of what is left, beyond the step throughput: memory, joins, kernel ratio.
memory_s=${MEMORY_S:-72} joins_s=${JOINS_S:-24} ratio_s=${RATIO_S:-60}
checked=()
[ -s "$work/steps/main.json" ] && checked=(--checked "$work/steps/main.json")
keep=$((memory_s + joins_s + ratio_s))
# HF PEFT, which waits for the host, first, and again while it has fallen short.
parts=hf_peft,check,lora_8,bound,sl_peft,ledger,lora_32,hf_peft_again,all_methods,lora_1,lora_4
parts=${PARTS:-$parts,mixed_methods,mixed_ranks,llama_3_1_8b,lora_16,hf_peft_again}
[ "${#checked[@]}" -eq 0 ] || parts=${parts/check,/}
alone $((keep + 3)) "$python" experiments/step_throughput/run.py --out "$out/step_throughput.json" \
  --only "$parts" --seconds $(($(left) - keep - 8)) --sl-limit-s "${SL_LIMIT_S:-90}" "${checked[@]}"

run="$here/run.py --out $work/alone --hf-instances ${HF_INSTANCES:-99}"
alone $((joins_s + ratio_s + 3)) "$python" $run --parts memory --memory-tasks "${MEMORY_TASKS:-}" \
  --memory-seconds $(($(left) - joins_s - ratio_s - 18))
merge "$out/gpu_runtime.json" "$work/alone/memory.json"
alone $((ratio_s + 3)) "$python" $run --parts joins
merge "$out/gpu_runtime.json" "$work/alone/joins.json"
[ "$ratio_s" -eq 0 ] || for tokens in 8192 2048 16384; do
  alone 3 "$python" experiments/kernel_ratio/run.py --repeats 5 --steps 4 --tokens $tokens \
    --out "$work/kernel_ratio_$tokens.json"
  merge "$out/kernel_ratio.json" "$work/kernel_ratio_$tokens.json"
done
