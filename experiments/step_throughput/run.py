"""Step throughput of many LoRA tasks on one backbone, beside the frozen backbone alone, HF PEFT
one task at a time and one padded batch of all tasks.

    PYTHONPATH=.:sim:kernels python3 experiments/step_throughput/run.py --out step_throughput.json
    PYTHONPATH=.:sim:kernels python3 experiments/step_throughput/plot.py step_throughput.json a.png

Needs one CUDA device. Every part is caught on its own and written as it comes; ``reportable`` is
true only when the correctness check passed and the bound and HF PEFT reached 90% of DESIGN
section 6. Steps are whole: fresh data from the host, forward, backward, optimizer, metrics read.

Shape suffixes: T rows, D model features, S slots.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import baselines
import check
from workload import Workload

from muxtune.runtime.static_step import (
    AdapterPools,
    CapturedSteps,
    SlotSpec,
    StaticModel,
    StepLayout,
    StepProgram,
    attention,
)
from muxtune.runtime.static_step.adapters import LoraState
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune_kernels.multi_lora import launch

SHAPES = {
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip
# DESIGN section 6, one H100, Llama-2-7B shape: effective tokens/s.
KNOWN = {"bound": 21_329.0, "hf_peft": 1_943.0, "sl_peft": 2_709.0}
WARM_UP = 5


def random_model(name: str) -> Any:
    """Random bf16 weights made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096, tie_word_embeddings=False)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def steps_for(
    static: StaticModel, ranks: tuple[int, ...], row_counts: list[int], max_seqlen: int,
    max_bounds: int, **options: Any,
) -> CapturedSteps:  # fmt: skip
    pools = AdapterPools(static, tuple(SlotSpec(r) for r in ranks), False)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for slot, rank in enumerate(ranks if any(ranks) else ()):
        states = {}
        for name, a, b in pools.views(slot):
            value = torch.randn(a[0].shape, device="cuda", generator=generator)
            bound = value * a[0].shape[1] ** -0.5
            states[name] = LoraState((bound,), (torch.zeros_like(b[0]),))  # B starts at zero
        pools.load(slot, states, 0)
        assert rank > 0
    layout = StepLayout(max(row_counts), len(ranks), max_bounds, max_seqlen)
    inputs = StepInputs(layout, static.device)
    return CapturedSteps(StepProgram(static, pools, inputs, **options), row_counts)


def measure_rounds(steps: CapturedSteps, work: Workload, count: int) -> dict[str, Any]:
    """Wall-clock over ``count`` rounds after the warm-up, results read one round behind."""
    rounds = work.rounds()
    pending, tokens, padded, losses = None, 0, 0, []
    size_counts: dict[int, int] = {}
    start_s = host_s = 0.0
    for index in range(WARM_UP + count):
        if index == WARM_UP:
            torch.cuda.synchronize()
            start_s, host_s, tokens, padded = time.perf_counter(), 0.0, 0, 0
            size_counts.clear()
        began_s = time.perf_counter()
        micro_batches = next(rounds)
        host_s += time.perf_counter() - began_s
        for item in micro_batches:
            started = steps.step(item.sequences, item.slots)
            tokens += item.effective_tokens
            size = steps.size_for(item.effective_tokens)
            padded += size
            size_counts[size] = size_counts.get(size, 0) + 1
            if pending is not None:
                losses.append(pending.result().losses)
            pending = started
    last = pending.result() if pending is not None else None
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start_s
    assert last is not None
    assert np.isfinite(losses).all()
    assert not any(last.skipped)
    return {
        "rounds": count, "size_counts": size_counts, "seconds": seconds,
        "round_ms": 1e3 * seconds / count,
        "effective_tokens": tokens, "padded_rows": padded,
        "effective_tokens_per_s": tokens / seconds, "padded_rows_per_s": padded / seconds,
        "host_data_ms_per_round": 1e3 * host_s / count,
        "first_losses": losses[0], "last_losses": last.losses,
        "capture_s": sum(steps.capture_s.values()),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip


def replay_seconds(steps: CapturedSteps, work: Workload, num_rows: int, repeats: int = 7) -> float:
    """Device time of one size, rows filled by a round of the workload cut to fit."""
    steps.step(cut(next(work.rounds(7)), num_rows), slots_of(work), num_rows=num_rows).result()
    graph, stream = steps._graphs[num_rows], steps.stream
    assert stream is not None
    with torch.cuda.stream(stream):
        return statistics.median(baselines.gpu_seconds(graph.replay, repeats))


def slots_of(work: Workload) -> dict:
    return {slot: item for part in next(work.rounds(7)) for slot, item in part.slots.items()}


def cut(micro_batches: list, num_rows: int) -> list:
    """Sequences of the round that fit; the last one is cut, the first ones repeat if need be."""
    source = [item for part in micro_batches for item in part.sequences]
    left, out, i = num_rows, [], 0
    while left > 1:
        item = source[i % len(source)]
        tokens_n = item.tokens_n[:left]
        out.append(item._replace(tokens_n=tokens_n, is_target_n=item.is_target_n[: len(tokens_n)]))
        left, i = left - len(tokens_n), i + 1
    return out


def profile_kernels(steps: CapturedSteps, num_rows: int, top: int = 45) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    graph = steps._graphs[num_rows]
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        graph.replay()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in traced.events():
        entry = totals.setdefault(event.name[:90], [0, 0.0])
        entry[0] += 1
        entry[1] += event.device_time_total
    rows = sorted(totals.items(), key=lambda item: -item[1][1])[:top]
    return [{"kernel": name, "calls": calls, "ms": us / 1e3} for name, (calls, us) in rows]


class Report:
    """Parts by name, written to disk as they come."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.errors = path, {}, {}

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        start_s = time.perf_counter()
        try:
            value = run()
            self.data[name] = value
        except Exception as error:
            value = self.data[name] = None
            self.errors[name] = "".join(traceback.format_exception(error))[-3000:]
            print(f"[{name}] FAILED: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.data.setdefault("part_s", {})[name] = round(time.perf_counter() - start_s, 1)
        shown = {k: v for k, v in value.items() if not isinstance(v, list)} if isinstance(
            value, dict) else value  # fmt: skip
        print(f"[{name}] {time.perf_counter() - start_s:.1f} s: {str(shown)[:1500]}", flush=True)
        self.write()
        return value

    def write(self) -> None:
        self.path.write_text(json.dumps({**self.data, "errors": self.errors}, indent=1))


def environment() -> dict[str, Any]:
    import peft
    import transformers
    import triton

    return {
        "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip


def ours(static: StaticModel, work: Workload, args: Any, **options: Any) -> dict[str, Any]:
    sizes = work.row_counts(args.multiple)
    steps = steps_for(static, work.ranks, sizes, args.max_seqlen, args.max_bounds, **options)
    steps.capture()
    out = measure_rounds(steps, work, args.rounds)
    out["row_counts"] = sizes
    out["device_ms"] = {n: 1e3 * replay_seconds(steps, work, n) for n in sizes}
    if args.profile:
        out["kernels"] = profile_kernels(steps, sizes[len(sizes) // 2])
    return out


def frozen(static: StaticModel, work: Workload, args: Any, sizes: list[int]) -> dict[str, Any]:
    """The same program without any adapter: products by cuBLAS, no optimizer."""
    none = tuple(0 for _ in work.ranks)
    steps = steps_for(static, none, sizes, args.max_seqlen, args.max_bounds)
    steps.capture()
    ms = {n: 1e3 * replay_seconds(steps, work, n) for n in sizes}
    return {"device_ms": ms, "tokens_per_s": {n: 1e3 * n / t for n, t in ms.items()}}


def compiled_bound(
    static: StaticModel, work: Workload, args: Any, sizes: list[int]
) -> dict[str, Any]:
    ms = {}
    for num_rows in sizes:
        bounds = np.cumsum([0, *(len(s.tokens_n) for s in cut(next(work.rounds(7)), num_rows))])
        bounds[-1] = num_rows
        backbone = baselines.CompiledBackbone(static, bounds.tolist(), args.max_seqlen)
        times = baselines.gpu_seconds(backbone.graph.replay, 7)
        ms[num_rows] = 1e3 * statistics.median(times)
        del backbone
        torch.cuda.empty_cache()
    return {"device_ms": ms, "tokens_per_s": {n: 1e3 * n / t for n, t in ms.items()}}


def batches_of(work: Workload, one_task: bool, seed: int = 3):
    """Sequences of one task's step after another, or of a whole round at once."""
    for micro_batches in work.rounds(seed):
        everything = [item for part in micro_batches for item in part.sequences]
        if not one_task:
            yield [item.tokens_n for item in everything]
            continue
        for slot in range(len(work.ranks)):
            yield [item.tokens_n for item in everything if item.slot == slot]


def hf_peft(model: Any, work: Workload, args: Any) -> dict[str, float]:
    """One adapter at a time; the tasks take turns, as instances of their own would at best."""
    wrapped, optimizer = baselines.peft_model(model, work.ranks[0])
    try:
        return baselines.time_steps(
            wrapped, optimizer, batches_of(work, True), 16, args.peft_steps, 60
        )
    finally:
        wrapped.unload()


def sl_peft(model: Any, work: Workload, args: Any) -> dict[str, Any]:
    """All rows of a round padded to the longest, in the largest micro-batch that fits: with
    checkpointing, all 64 rows at once. One shared adapter, which is less work than eight."""
    wrapped, optimizer = baselines.peft_model(model, work.ranks[0])
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return baselines.time_steps(
            wrapped, optimizer, batches_of(work, False), 3, args.sl_steps, args.sl_limit_s
        )
    finally:
        wrapped.gradient_checkpointing_disable()
        wrapped.disable_input_require_grads()
        wrapped.unload()


def ledger(report: Report, work: Workload) -> dict[str, Any]:
    """Where a round's time goes beyond the bound, in ms a round."""
    data = report.data
    main, bound_tps = data["ours"], data["bound_tokens_per_s"]
    rounds = main["rounds"]
    e_mean, t_mean = main["effective_tokens"] / rounds, main["padded_rows"] / rounds
    full, base, no_step = (
        sum(data[part]["device_ms"][n] * count for n, count in main["size_counts"].items()) / rounds
        for part in ("ours", "frozen", "no_optimizer")
    )
    bound_ms = 1e3 * e_mean / bound_tps
    return {
        "effective_tokens_per_round": e_mean, "rows_per_round": t_mean, "bound_ms": bound_ms,
        "filler_ms": 1e3 * (t_mean - e_mean) / bound_tps,
        "frozen_at_this_size_ms": base - 1e3 * t_mean / bound_tps,
        "adapters_ms": no_step - base, "optimizer_ms": full - no_step,
        "host_and_launch_ms": main["round_ms"] - full, "round_ms": main["round_ms"],
        "share_of_bound": main["effective_tokens_per_s"] / bound_tps,
    }  # fmt: skip


def without_optimizer(static: StaticModel, work: Workload, args: Any, sizes: list[int]):
    steps = steps_for(static, work.ranks, sizes, args.max_seqlen, args.max_bounds)
    steps.program.optimizes = False
    steps.capture()
    return {"device_ms": {n: 1e3 * replay_seconds(steps, work, n) for n in sizes}}


def verdict(report: Report) -> dict[str, Any]:
    data = report.data
    reasons = []
    if not (data.get("check") or {}).get("passed"):
        reasons.append("the correctness check is red or did not run")
    if (data.get("bound_tokens_per_s") or 0) < 0.9 * KNOWN["bound"]:
        reasons.append("the bound is below 90% of DESIGN section 6")
    for name in ("hf_peft", "sl_peft"):
        if (data.get(name) or {}).get("effective_tokens_per_s", 0) < 0.9 * KNOWN[name]:
            reasons.append(f"{name} is below 90% of DESIGN section 6")
    if not data.get("ours"):
        reasons.append("no measurement")
    return {"reportable": not reasons, "reasons": reasons}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--multiple", type=int, default=128)
    parser.add_argument("--max-seqlen", type=int, default=512)
    parser.add_argument("--max-bounds", type=int, default=96)
    parser.add_argument("--peft-steps", type=int, default=80)
    parser.add_argument("--sl-steps", type=int, default=50)
    parser.add_argument("--sl-limit-s", type=float, default=90)
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--parts", default="check,ours,bound,ledger,peft,more")
    parser.add_argument("--no-half-tail", action="store_true", help="whole tiles only")
    parser.add_argument("--flash", action="store_true", help="flash attention, not ours")
    parser.add_argument("--stop-if-red", action="store_true", help="exit 3 where the step is red")
    args = parser.parse_args()
    parts = set(args.parts.split(","))
    if args.no_half_tail:
        launch.has_half_tail = lambda *_: False
    if args.flash:
        attention.fits_packed_attention = lambda *_: False
    report = Report(args.out)
    report.part("environment", environment)
    if "check" in parts:
        report.part("check", lambda: check.run(SHAPES["llama-2-7b"]))
    model = random_model(args.shape)
    vocab = SHAPES[args.shape]["vocab_size"]
    work = Workload(args.tasks, (args.rank,) * args.tasks, vocab)
    report.data["arguments"] = {k: str(v) for k, v in vars(args).items()}
    static = StaticModel.of(model, 4096)
    if "ours" in parts:
        report.part("ours", lambda: ours(static, work, args))
        red = not (report.data.get("check") or {}).get("passed") or report.data.get("ours") is None
        if args.stop_if_red and red:
            sys.exit(3)
    if "bound" in parts:
        _bounds(report, static, work, args)
    if "ledger" in parts and report.data.get("ours"):
        sizes = report.data["ours"]["row_counts"]
        report.part("no_optimizer", lambda: without_optimizer(static, work, args, sizes))
        report.part("ledger", lambda: ledger(report, work))
    if "peft" in parts:
        report.part("hf_peft", lambda: hf_peft(model, work, args))
        report.part("sl_peft", lambda: sl_peft(model, work, args))
    report.part("verdict", lambda: verdict(report))
    if "more" in parts:
        more(report, static, vocab, args)


def _bounds(report: Report, static: StaticModel, work: Workload, args: Any) -> None:
    sizes = work.row_counts(args.multiple)
    every = sorted({2048, *sizes, 4096})
    report.part("frozen", lambda: frozen(static, work, args, every))
    report.part("compiled", lambda: compiled_bound(static, work, args, [2048, 4096]))
    found = [
        rate
        for name in ("frozen", "compiled")
        for rate in (report.data.get(name) or {"tokens_per_s": {}})["tokens_per_s"].values()
    ]
    report.data["bound_tokens_per_s"] = max(found, default=0.0)
    print("bound", report.data["bound_tokens_per_s"], flush=True)


def more(report: Report, static: StaticModel, vocab: int, args: Any) -> None:
    """Other numbers of tasks, and mixed ranks."""
    short = copy.copy(args)
    short.rounds, short.profile, short.multiple = 50, False, 256
    for num_tasks in (1, 4, 16, 32):
        other = Workload(num_tasks, (args.rank,) * num_tasks, vocab)
        report.part(f"tasks_{num_tasks}", lambda other=other: ours(static, other, short))
    mixed = Workload(8, (8, 16, 32, 64, 8, 16, 32, 64), vocab)
    report.part("mixed_ranks", lambda: ours(static, mixed, short))


if __name__ == "__main__":
    main()
