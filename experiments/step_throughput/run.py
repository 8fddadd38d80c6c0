"""Step throughput of ``muxtune train`` on one GPU, beside the frozen backbone alone, HF PEFT one
task at a time and one padded batch of all tasks, in one process.

    PYTHONPATH=.:sim:kernels python3 experiments/step_throughput/run.py --out step_throughput.json
    python3 experiments/step_throughput/plot.py step_throughput.json step_throughput.png

``--list`` shows the parts with their seconds; ``--only`` chooses among them and gives their order;
``--seconds`` leaves out what would not end in time. Each part is caught on its own and written as
it comes. ``verdict.reportable`` is true only when the correctness check passed and the bound and
HF PEFT reached 90% of ``KNOWN``; HF PEFT, which waits for the host, in the better one of its
measurements. Steps are whole: fresh data from the host, forward, backward, optimizer, metrics read.

``--rehearse``: one layer and two rounds of everything, to compile kernels ahead and to see that
each part works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import baselines
import check
import frozen
import product
from workload import Workload

from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.report.kernel_cache import kernels_there
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.random_models import random_model
from muxtune.runtime.static_step import StaticModel
from muxtune_kernels import multi_task_adamw_

# Reference values, one H100, Llama-2-7B shape: effective tokens/s.
KNOWN = {"bound": 21_329.0, "hf_peft": 1_943.0, "sl_peft": 2_709.0}
LEAST_SHARE = 0.9  # that the bound and HF PEFT must reach of it
LEAST_STEPS = 50  # of a baseline that is compared with
COUNTS = (
    "the fastest of its measurements, all told in 'measured': it can only make less of what is "
    "compared with it"
)
PEFT_LIMIT_S = 25.0  # for its steps, where --sl-limit-s ends the padded batch
LORA: dict[str, Any] = {"targets": "all-linear", "rank": 16, "alpha": 32}
SCALED = ["k_proj", "v_proj", "down_proj"]
METHODS = (
    LORA,
    {"method": "ia3", "targets": SCALED, "rank": 1, "alpha": 1},
    {"method": "bottleneck", "targets": ["o_proj", "down_proj"], "rank": 16, "alpha": 1},
    {"method": "prefix", "rank": 16, "alpha": 1},
)
RANKS = tuple(LORA | {"rank": rank} for rank in (8, 16, 32, 64))
SPATIAL = ("planner.fusion=all_spatial",)
WINDOWS = (*SPATIAL, "backend.lora_products=windows")
ALL_METHODS = (
    *METHODS, LORA | {"method": "dora", "dropout": 0.0},
    {"method": "prompt", "rank": 16, "alpha": 1},
)  # fmt: skip
CASES = {
    "lora_8": product.Case(8, (LORA,), 25, overrides=SPATIAL),
    "lora_8_windows": product.Case(8, (LORA,), 18, overrides=WINDOWS),
    "mixed_methods": product.Case(8, METHODS, 24, overrides=SPATIAL),
    "lora_32": product.Case(
        32, (LORA,), 62, overrides=("+cluster_policy.max_tasks_per_instance=32",)
    ),
    "mixed_ranks": product.Case(8, RANKS, 26, overrides=SPATIAL),
    "llama_3_1_8b": product.Case(8, (LORA,), 21, "llama-3.1-8b", SPATIAL),
    "lora_16": product.Case(16, (LORA,), 36),
    "lora_4": product.Case(4, (LORA,), 12),
    "lora_1": product.Case(1, (LORA,), 10),
    "lora_8_planned": product.Case(8, (LORA,), 30),
    # SL-PEFT's batches by the kernels and captured steps that its planner gets from this project
    "lora_8_padded": product.Case(8, (LORA,), 40, planner=("planner=batched",)),
    "all_methods": product.Case(8, ALL_METHODS, 26),  # with DoRA too large for one hTask
}
AGAIN = "hf_peft_again"
OTHERS = {"check": 15, "bound": 20, "hf_peft": 19, "ledger": 0, AGAIN: 19}
SL_STEP_S, SL_AROUND_S = 1.45, 7  # of the padded batch; its model and its warm-up
ORDER = (
    "check", "lora_8", "bound", "hf_peft", "sl_peft", "ledger",
    *(n for n in CASES if n != "lora_8"), AGAIN,
)  # fmt: skip


class Report:
    """Parts by name, on disk as they come."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self.path, self.start_s, self.limit_s = path, time.perf_counter(), limit_s
        self.data: dict[str, Any] = {"skipped": {}, "part_s": {}, "errors": {}, "compiled": {}}
        self.data["left_bytes"] = {}  # on the GPU when a part has ended

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.perf_counter() - self.start_s)

    def part(self, name: str, seconds: float, run: Callable[[], Any]) -> None:
        if seconds > self.left_s:
            self.data["skipped"][name] = f"needs {seconds} s of {self.left_s:.0f} s left"
            print(f"[{name}] left out: {self.data['skipped'][name]}", flush=True)
            self.write()
            return
        start_s, kernels = time.perf_counter(), kernels_there()
        try:
            self.data[name] = run()
        except Exception as error:
            text = "".join(traceback.format_exception(error)).replace(f"{Path.cwd()}/", "")
            self.data["errors"][name] = text[-3000:]
            print(f"[{name}] FAILED: {self.data['errors'][name]}", flush=True)
        product.free()
        if torch.cuda.is_available():
            self.data["left_bytes"][name] = torch.cuda.memory_allocated()
        took_s = self.data["part_s"][name] = round(time.perf_counter() - start_s, 1)
        new = self.data["compiled"][name] = kernels_there() - kernels
        shown = json.dumps(self.data.get(name), default=str)[:1000]
        print(f"[{name}] {took_s} s of {seconds}, {new} kernels compiled: {shown}", flush=True)
        self.write()

    def write(self) -> None:
        self.data["verdict"] = verdict(self.data)
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.data, indent=1, default=str) + "\n")
        draft.replace(self.path)


def environment(device: str) -> dict[str, Any]:
    import peft
    import transformers
    import triton

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__,
    }  # fmt: skip


def verdict(data: dict[str, Any]) -> dict[str, Any]:
    """Whether the figures may be told, and why not."""
    reasons = []
    if data.get("rehearsal"):
        reasons.append("a rehearsal")
    if not data.get("check", {}).get("passed"):
        reasons.append("the correctness check is red or did not run")
    reached = {
        "bound": data.get("bound", {}).get("best_tokens_per_s", 0.0) / KNOWN["bound"],
        **{name: _baseline(data, name) / KNOWN[name] for name in ("hf_peft", "sl_peft")},
    }
    for name in ("bound", "hf_peft"):
        if reached[name] < LEAST_SHARE:
            reasons.append(f"{name} is at {reached[name]:.0%} of its reference value")
        reasons += _too_few_steps(data, name)
    reasons += _too_few_steps(data, "sl_peft")
    if not data.get("lora_8"):
        reasons.append("no measurement")
    hf_peft = {"measured": _measured(data, "hf_peft"), "counts": COUNTS}
    return {
        "reportable": not reasons, "reasons": reasons, "baselines_reached": reached,
        "hf_peft": hf_peft,
    }  # fmt: skip


def _too_few_steps(data: dict[str, Any], name: str) -> list[str]:
    """Where its limit in seconds ended what was measured of a baseline."""
    steps = (data.get(name) or {}).get("steps", LEAST_STEPS)
    return [f"{name} has {steps} steps of {LEAST_STEPS}"] if steps < LEAST_STEPS else []


def _baseline(data: dict[str, Any], name: str) -> float:
    """Tokens/s of the fastest of its measurements, 0 without any."""
    return max(_measured(data, name), default=0.0)


def _measured(data: dict[str, Any], name: str) -> list[float]:
    """Tokens/s, in the order of the measurements."""
    again = (data.get(f"{name}_again") or {}).get("runs", [])
    rows = [data.get(name) or {}, *again]
    return [row["effective_tokens_per_s"] for row in rows if "effective_tokens_per_s" in row]


class Bench:
    """One model's store at a time, shared by all parts that can use it."""

    def __init__(self, args: Any, report: Report) -> None:
        self.args, self.report = args, report
        self._store: tuple[str, BackboneStore] | None = None

    def shape(self, name: str) -> ModelShape:
        shape = model_shape(name)
        return shape._replace(num_layers=1) if self.args.rehearse else shape

    def store(self, name: str) -> BackboneStore:
        if self._store is None or self._store[0] != name:
            self._store = None
            product.free()
            store = product.store_of(name, self.shape(name), self.args.device)
            self._store = (name, store)
        return self._store[1]

    def case(self, name: str) -> dict[str, Any]:
        case = CASES[name]
        done = product.run(case, self.store(case.model), self.args.device, self.args.rounds)
        times = device_times(done) if self.args.device == "cuda" else {}
        if times and name == "lora_8":
            counts = done.replays[0]
            size = max(counts, key=lambda rows: counts[rows])
            times["kernels"] = frozen.profile_kernels(done.runners[0].steps, size)
        return done.row | times

    def workload(self) -> Workload:
        return Workload(8, (LORA["rank"],) * 8, model_shape("llama-2-7b").vocab)

    def bound(self) -> dict[str, Any]:
        """At 2048 rows, and at the sizes that the eight tasks took most often; each as long as it
        takes the GPU to come down to the clock that it keeps under steady work."""
        model = self.store("llama-2-7b").get("llama-2-7b").model
        static, work = StaticModel.of(model, 4096), self.workload()
        sizes = sorted({2048, *self._common_sizes(3)})
        out: dict[str, Any] = {"frozen": frozen.frozen(static, work, sizes)}
        product.free()
        out["compiled"] = frozen.compiled_bound(static, work, [2048])
        rates = [rate for part in out.values() for rate in part["tokens_per_s"].values()]
        return out | {"best_tokens_per_s": max(rates)}

    def _common_sizes(self, count: int) -> list[int]:
        htasks = self.report.data.get("lora_8", {}).get("htasks", [])
        replays = {int(n): times for htask in htasks for n, times in htask["replays"].items()}
        return sorted(replays, key=lambda size: -replays[size])[:count]

    def peft(self, name: str) -> dict[str, Any]:
        """One adapter at a time, the tasks taking turns, as instances of their own would at best;
        or all rows of a round, padded to the longest, as one batch with one shared adapter, which
        is less work than eight: with checkpointing the largest micro-batch that fits is all 64."""
        args, whole = self.args, name == "sl_peft"
        device = torch.device(args.device)
        model, _ = random_model(self.shape("llama-2-7b"), 0, device, torch.bfloat16)
        model.requires_grad_(False).to(device, torch.bfloat16)
        wrapped, optimizer = baselines.peft_model(model, LORA["rank"])
        if whole:
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        warm_up = 2 if args.rehearse else 3 if whole else 16
        steps = 2 if args.rehearse else args.sl_steps if whole else args.peft_steps
        batches = batches_of(self.workload(), not whole)
        limit_s = args.sl_limit_s if whole else PEFT_LIMIT_S
        try:
            return baselines.time_steps(wrapped, optimizer, batches, warm_up, steps, limit_s)
        finally:
            wrapped.to("meta")  # its weights go, whatever of its steps still refers to it

    def peft_again(self) -> dict[str, Any]:
        """Where HF PEFT fell short so far, which waits for the host most of the time: once more."""
        data = self.report.data
        runs = (data.get(AGAIN) or {}).get("runs", [])
        if verdict(data)["baselines_reached"]["hf_peft"] < LEAST_SHARE:
            runs = [*runs, self.peft("hf_peft")]
        data[AGAIN] = {"runs": runs}
        if "ledger" in data:
            data["ledger"] = ledger(data)
        return data[AGAIN]


def batches_of(work: Workload, one_task: bool, seed: int = 3) -> Iterator[list[Any]]:
    """Sequences of one task's step after another, or of a whole round at once."""
    for micro_batches in work.rounds(seed):
        everything = [item for part in micro_batches for item in part.sequences]
        if not one_task:
            yield [item.tokens_n for item in everything]
            continue
        for slot in range(len(work.ranks)):
            yield [item.tokens_n for item in everything if item.slot == slot]


def device_times(done: product.Run) -> dict[str, Any]:
    """Milliseconds of each size that ran (the median, as it ran), of a round, and of the
    optimizers in it."""
    optimizer_ms = device_ms = 0.0
    for index, sizes in done.device_ms.items():
        passes = sum(done.replays[index].values()) / done.rounds
        device_ms += sum(sum(times) for times in sizes.values()) / done.rounds
        optimizer_ms += passes * _optimizer_ms(done.runners[index].steps)
    medians = {
        index: {n: statistics.median(times) for n, times in sizes.items()}
        for index, sizes in done.device_ms.items()
    }
    return {
        "device_ms": medians, "device_round_ms": device_ms, "optimizer_round_ms": optimizer_ms
    }  # fmt: skip


def _optimizer_ms(steps: Any) -> float:
    program = steps.program

    def run() -> None:
        multi_task_adamw_(program._optimizer_pools, program._settings, zero_grads=False)

    with torch.no_grad(), torch.cuda.stream(steps.stream):
        return 1e3 * sorted(baselines.gpu_seconds(run, 9))[4]


def ledger(data: dict[str, Any]) -> dict[str, Any]:
    """Where a round's time goes beyond the bound, in ms a round."""
    main, rate = data["lora_8"], data["bound"]["best_tokens_per_s"]
    rounds = main["rounds"]
    effective, rows = main["effective_tokens"] / rounds, main["rows"] / rounds
    known = {int(n): ms for n, ms in data["bound"]["frozen"]["device_ms"].items()}
    pairs = [
        (int(n), ms, main["htasks"][int(index)]["replays"])
        for index, sizes in main["device_ms"].items()
        for n, ms in sizes.items()
        if int(n) in known
    ]
    # The frozen program was timed at the commonest sizes: its share of their time holds for all.
    weighed = [(known[n], ms, counts.get(n, counts.get(str(n), 0))) for n, ms, counts in pairs]
    share = sum(a * count for a, _, count in weighed) / sum(b * count for _, b, count in weighed)
    device_ms, optimizer_ms = main["device_round_ms"], main["optimizer_round_ms"]
    frozen_ms, bound_ms = share * device_ms, 1e3 * effective / rate
    filler_ms = 1e3 * (rows - effective) / rate
    return {
        "effective_tokens_per_round": effective, "rows_per_round": rows, "bound_ms": bound_ms,
        "filler_ms": filler_ms, "frozen_at_this_size_ms": frozen_ms - bound_ms - filler_ms,
        "adapters_ms": device_ms - optimizer_ms - frozen_ms, "optimizer_ms": optimizer_ms,
        "host_and_launch_ms": main["round_ms"] - device_ms, "round_ms": main["round_ms"],
        "share_of_bound": main["effective_tokens_per_s"] / rate,
        "over_hf_peft": _over(main, _baseline(data, "hf_peft")),
        "over_sl_peft": _over(main, _baseline(data, "sl_peft")),
    }  # fmt: skip


def _over(main: dict[str, Any], tokens_per_s: float) -> float | None:
    return main["effective_tokens_per_s"] / tokens_per_s if tokens_per_s else None


def main() -> None:
    args = arguments()
    names = args.only.split(",") if args.only else list(ORDER)
    known = {name: case.seconds for name, case in CASES.items()} | OTHERS
    known["sl_peft"] = round(SL_AROUND_S + min(args.sl_limit_s, SL_STEP_S * args.sl_steps))
    seconds = {name: known[name] for name in names}
    for name in names:
        print(f"{name:16} about {seconds[name]} s")
    if args.list:
        return
    report = Report(args.out, args.seconds)
    report.data |= {"environment": environment(args.device), "rehearsal": args.rehearse}
    report.data["arguments"] = {
        key: value.name if isinstance(value, Path) else str(value)
        for key, value in vars(args).items()
    }
    if args.checked:
        checked = json.loads(args.checked.read_text()).get("check")
        report.data |= {"check": checked} if checked else {}
        names = names if checked else ["check", *names]
    bench = Bench(args, report)
    parts: dict[str, Callable[[], Any]] = {
        "check": lambda: check.run(check.LLAMA_2_7B), "bound": bench.bound,
        "ledger": lambda: ledger(report.data), AGAIN: bench.peft_again,
        **{name: lambda name=name: bench.peft(name) for name in ("hf_peft", "sl_peft")},
        **{name: lambda name=name: bench.case(name) for name in CASES},
    }  # fmt: skip
    for name in names:
        report.part(name, 0 if args.rehearse else seconds.get(name, 0), parts[name])
    print(json.dumps(report.data["verdict"]), flush=True)
    sys.exit(1 if report.data["errors"] else 0)


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("step_throughput.json"))
    parser.add_argument("--only", default="", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--peft-steps", type=int, default=50)
    parser.add_argument("--sl-steps", type=int, default=50)
    parser.add_argument("--sl-limit-s", type=float, default=90)
    parser.add_argument("--rehearse", action="store_true", help="one layer, two rounds")
    parser.add_argument("--checked", type=Path, help="what --only check wrote on this machine")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.rehearse:
        args.rounds = 2
    return args


if __name__ == "__main__":
    main()
