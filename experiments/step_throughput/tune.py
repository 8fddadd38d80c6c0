"""Times of the small kernels at the step's shapes, one setting at a time, to choose from.

    PYTHONPATH=.:sim:kernels python3 experiments/step_throughput/tune.py

Rows as a round of the measured workload lays them out. Each line: kernel, setting, microseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from frozen import cut
from workload import Workload

from muxtune.runtime.static_step.inputs import HostBuffer, StepLayout
from muxtune_kernels.block import Heads
from muxtune_kernels.multi_lora import launch
from muxtune_kernels.multi_lora.tuning import tuning_of
from muxtune_kernels.packed_attention import kernels as attention

RANKS = (16,) * 8
LINEARS = {
    "qkv": (4096, (4096, 4096, 4096)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (11008, 11008)),
    "down": (11008, (4096,)),
}


def microseconds(run: Callable[[], object], calls: int = 10, repeats: int = 5) -> float:
    """Per call, replayed from a graph; inputs of a case stay in the L2 where they fit."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / calls)
    return sorted(times)[len(times) // 2]


class Bench:
    def __init__(self, num_rows: int) -> None:
        work = Workload(8, RANKS, 32000)
        layout = StepLayout(num_rows, 8, 96, 512)
        host = HostBuffer(layout, False)
        round_ = next(work.rounds(7))
        host.fill(num_rows, cut(round_, num_rows), round_[0].slots)
        self.fields = layout.split(host.buffer.cuda())
        self.num_rows, self.results = num_rows, []
        self.rows = launch.RowTensors(
            self.fields["slot_of_row"], self.fields["slot_bounds"], self.fields["scale"], None
        )

    def report(self, kernel: str, setting: str, run: Callable[[], object]) -> None:
        try:
            us = microseconds(run)
        except Exception as error:
            print(f"{kernel:24} {setting:40} FAILED {str(error)[:100]}", flush=True)
            return
        self.results.append((kernel, setting, us))
        print(f"{kernel:24} {setting:40} {us:8.1f}", flush=True)

    def attention(self) -> None:
        heads = Heads(32, 32, 128)
        qkv = torch.randn(self.num_rows, heads.qkv_features, device="cuda").bfloat16()
        dout = torch.randn(self.num_rows, 4096, device="cuda").bfloat16()
        angle = torch.arange(512)[:, None] * torch.linspace(0.01, 1, 64)[None]
        cos, sin = angle.cos().cuda(), angle.sin().cuda()
        args = (cos, sin, self.fields["positions"], self.fields["tiles"])
        self.report(
            "attention forward", "packed", lambda: attention.forward_cuda(qkv, *args, heads)
        )
        out, lse = attention.forward_cuda(qkv, *args, heads)
        for short, long in ((4, 8), (8, 8), (4, 4)):
            self.report(
                "attention backward",
                f"warps {short}, {long}",
                lambda s=short, n=long: attention.backward_cuda(
                    dout, qkv, out, lse, *args, heads, s, n
                ),
            )

    def lora(self, name: str) -> None:
        width, widths = LINEARS[name]
        x = torch.randn(self.num_rows, width, device="cuda").bfloat16()
        dy = torch.randn(self.num_rows, sum(widths), device="cuda").bfloat16()
        a = torch.randn(128 * len(widths), width, device="cuda")
        b = torch.randn(128, sum(widths), device="cuda")
        adapters = launch.Adapters(RANKS, widths)
        layout = launch.layout_of(adapters, x.device)
        base = tuning_of(self.num_rows, width, widths, 8, layout.rank_pad, 2, False)
        targets = launch.GradTargets(
            torch.zeros_like(a), torch.zeros_like(b), torch.zeros(8, dtype=torch.int32).cuda()
        )
        for options in ({}, {"shrink_splits": 4}, {"shrink_splits": 8}, {"shrink_t": 32},
                        {"shrink_t": 32, "shrink_splits": 4}):  # fmt: skip
            tuning = base._replace(**options)
            self.report(f"shrink {name}", str(options or base.shrink_splits),
                        lambda t=tuning: launch.shrink(x, a, self.rows, layout, t))  # fmt: skip
        h = launch.shrink(x, a, self.rows, layout, base._replace(shrink_splits=1))
        for options in ({}, {"db_splits": 2}, {"db_splits": 4}, {"db_n": 64}, {"db_n": 128},
                        {"db_n": 256}, {"db_t": 32}, {"db_n": 128, "db_t": 128}):  # fmt: skip
            tuning = base._replace(**options)
            self.report(f"dh_db {name}", str(options or (base.db_n, base.db_t)),
                        lambda t=tuning: launch.dh_db(dy, h, b.t(), self.rows, adapters, layout, t,
                                                      targets))  # fmt: skip
        for options in ({}, {"da_n": 64}, {"da_n": 32}, {"da_n": 64, "da_t": 128},
                        {"da_splits": 2}, {"da_n": 32, "da_t": 128}):  # fmt: skip
            tuning = base._replace(**options)
            self.report(f"outer {name}", str(options or (base.da_n, base.da_t)),
                        lambda t=tuning: launch.outer(h, x, a, self.rows, adapters, layout, t,
                                                      targets))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3584)
    parser.add_argument("--only", default="attention,o,qkv,gate_up,down")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args.rows)
    for name in args.only.split(","):
        bench.attention() if name == "attention" else bench.lora(name)
    if args.out:
        args.out.write_text(json.dumps(bench.results, indent=1))


if __name__ == "__main__":
    main()
