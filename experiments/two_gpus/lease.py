"""Everything that two GPUs are needed for, in one call that may be cut off at any moment.

python -m experiments.two_gpus.lease --output FOLDER --budget 560             # on two GPUs
python -m experiments.two_gpus.lease --output FOLDER --device cpu --rounds 1  # does it work

Each phase is a run of its own, because NCCL reads its limits once; rows are on the disk as soon as
they are measured, and the report at the end is made of those that are there. With ``--compile-s``
kernels are compiled before, in as many processes as there are kinds of hTasks.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.two_gpus.cases import KNOWN_ROUNDS, SETS

ROWS = "rows.jsonl"
GRACE_S = 8.0


class Phase(NamedTuple):
    """``label``: the link, and how messages go. ``share``: of the budget that is left, the most
    that it may take. ``spared``: multiprocessors that products leave to NCCL."""

    label: str
    sets: str
    environment: Mapping[str, str]
    share: float
    messages: str = "nccl"
    spared: int = 0


# As few multiprocessors as NCCL can do with, and as many left to it.
LIMITED = {
    "NCCL_MAX_P2P_NCHANNELS": "1", "NCCL_NCHANNELS_PER_PEER": "1", "NCCL_MAX_CTAS": "4"
}  # fmt: skip
SPARED = 4
SLOW = {"NCCL_P2P_DISABLE": "1"}
PHASES = (
    Phase("NVLink, copies", "one,pp,tp", {}, 0.75, "copies"),
    Phase("slow, copies", "tp-slow,pp-slow", SLOW, 0.6, "host"),
    Phase("slow, NCCL limited", "tp-three,pp-slow", {**SLOW, **LIMITED}, 1.0, spared=SPARED),
    Phase("NVLink, NCCL limited", "tp-two,pp-late", LIMITED, 0.5, spared=SPARED),
    Phase("NVLink, NCCL", "tp-two", {}, 0.6),
    Phase("slow, NCCL", "tp-three", SLOW, 0.8),
    Phase("NVLink, copies", "pp-more,tp-three", {}, 1.0, "copies"),
)


def expected_s(phase: Phase, args: Any) -> float:
    return sum(
        config.expected_s(args.rounds, number == 0, args.layers)
        for name in phase.sets.split(",")
        for number, config in enumerate(SETS[name])
    )


class Started(NamedTuple):
    """A phase whose processes have loaded what they need and wait."""

    process: subprocess.Popen[bytes]
    gate: Path

    def run(self, left_s: float) -> int:
        """The exit status; a phase that outlasts its time is ended with all of its ranks."""
        ready = self.gate.with_suffix(".new")
        ready.write_text(str(time.time() + left_s))
        ready.rename(self.gate)
        try:
            return self.process.wait(left_s + GRACE_S)
        except subprocess.TimeoutExpired:
            return self.end()

    def end(self) -> int:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def started(number: int, phase: Phase, args: Any, folder: Path) -> Started:
    gate = folder / f"gate-{number}"
    command = [
        *(sys.executable, "-m", "experiments.two_gpus.run", "--only", phase.sets),
        *("--label", phase.label, "--out", str(args.output / ROWS), "--shape", args.shape),
        *("--rounds", str(args.rounds), "--device", args.device, "--gate", str(gate)),
        *("--layers", str(args.layers), "--messages", phase.messages),
        *("--spared", str(phase.spared), *(["--plain"] if args.plain else [])),
    ]
    environment = {**os.environ, **phase.environment}
    return Started(subprocess.Popen(command, env=environment, start_new_session=True), gate)


def warm(args: Any) -> None:
    """Compile what the phases need, side by side."""
    command = [
        *(sys.executable, "-m", "experiments.two_gpus.warm", "--shape", args.shape),
        *("--device", args.device, "--limit-s", str(args.compile_s)),
    ]
    begin_s = time.monotonic()
    code = subprocess.run(command).returncode
    print(f"compiled in {time.monotonic() - begin_s:.1f} s, status {code}", flush=True)


def chosen(names: str, sets: str = "") -> Sequence[Phase]:
    """By numbers, from 0; with other ``sets`` if any are given, and then all of the time. Of
    several phases in turn, parted by ``;``, or the same for all."""
    phases = PHASES if not names else [PHASES[int(number)] for number in names.split(",")]
    if not sets:
        return phases
    own = sets.split(";") if ";" in sets else [sets] * len(phases)
    return [p._replace(sets=s, share=1.0) for p, s in zip(phases, own, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=1e5, help="seconds for all of it")
    parser.add_argument("--phases", default="", help="numbers, to go on where a run was cut off")
    parser.add_argument("--only", default="", help="other sets of configurations; by phase: a;b,c")
    parser.add_argument("--rounds", type=int, default=KNOWN_ROUNDS)
    parser.add_argument("--layers", type=int, default=0, help="of the model, 0: all of them")
    parser.add_argument("--compile-s", type=float, default=0.0, help="for compiling before, 0: not")
    parser.add_argument("--plain", action="store_true", help="see ``run``")
    parser.add_argument("--shape", default="llama-2-13b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    end_s, failed = time.monotonic() + args.budget - GRACE_S, []
    # Who is ended from outside ends its ranks, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.compile_s:
        warm(args)
    phases = chosen(args.phases, args.only)
    with tempfile.TemporaryDirectory() as place:
        waiting = [started(*item, args, Path(place)) for item in enumerate(phases)]
        try:
            for phase, ready in zip(phases, waiting, strict=True):
                left_s = phase.share * (end_s - time.monotonic())
                wanted_s = expected_s(phase, args)
                print(
                    f"== {phase.label}: {wanted_s:.0f} s expected, {left_s:.0f} s given", flush=True
                )
                if left_s <= 0 or ready.run(left_s):
                    failed.append(phase.label)
        finally:
            for ready in waiting:
                ready.end()
    report = [sys.executable, "-m", "experiments.two_gpus.report", str(args.output / ROWS)]
    code = subprocess.run([*report, "--output", str(args.output)]).returncode
    if failed:
        print(f"not whole: {'; '.join(failed)}", flush=True)
    sys.exit(code or bool(failed))


if __name__ == "__main__":
    main()
