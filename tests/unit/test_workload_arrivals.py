"""Bursts, tenants and deadlines of drawn tasks; a run's log as a trace again."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from muxtune.cli import main
from muxtune.errors import ConfigError, DataError
from muxtune.report.exporting import export_trace
from muxtune.types import NS_PER_S
from muxtune.workload.arrivals import Bursts, People, bursty_arrivals_s
from muxtune.workload.mix import task_mix
from muxtune.workload.synthetic import histogram, inline_histogram_name
from muxtune.workload.traces import poisson_tasks, read_trace, trace_tasks


def rate(task: object) -> float:
    return 1_000.0


def dispersion(arrival_s: np.ndarray, window_s: float) -> float:
    """Variance over mean of the arrivals a window: 1 for a Poisson process."""
    counts = np.bincount((arrival_s / window_s).astype(int))
    return float(counts.var() / counts.mean())


def test_bursts_have_the_mean_rate_and_come_in_clumps():
    bursts = Bursts(peak_factor=5.0, burst_share=0.1, tasks_per_burst=40.0)
    arrival_s = bursty_arrivals_s(np.random.default_rng(1), 60_000, 2.0, bursts)
    assert len(arrival_s) == 60_000 and arrival_s[0] == 0.0
    assert (np.diff(arrival_s) >= 0).all()
    assert arrival_s[-1] / 60_000 == pytest.approx(2.0, rel=0.05)
    plain = np.cumsum(np.random.default_rng(1).exponential(2.0, 60_000))
    assert dispersion(plain, 60.0) == pytest.approx(1.0, abs=0.1)
    assert dispersion(arrival_s, 60.0) > 5.0


@pytest.mark.parametrize(
    "wrong", [{"peak_factor": 0.5}, {"burst_share": 1.0}, {"peak_factor": 20.0}]
)
def test_bursts_that_cannot_be_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="workload"):
        Bursts()._replace(**wrong).checked()


def test_a_load_is_reached_with_bursts_too():
    tasks = poisson_tasks(
        task_mix(model="llama-2-7b"), rate, num_tasks=300, load=0.7, num_gpus=4, bursts=Bursts()
    )
    assert tasks.offered_load == pytest.approx(0.7)
    assert [task.arrival_ns for task in tasks] == sorted(task.arrival_ns for task in tasks)


def test_tenants_are_skewed_and_deadlines_follow_durations():
    people = People(num_tenants=5, tenant_skew=1.0, deadline_share=0.4, deadline_factor=2.0)
    durations_s = np.full(20_000, 100.0)
    tenants, slack_s = people.draw(durations_s, seed=3)
    assert tenants is not None
    counts = [count for _, count in Counter(tenants).most_common()]
    harmonic = sum(1 / rank for rank in range(1, 6))
    for place, count in enumerate(counts, start=1):
        assert count / 20_000 == pytest.approx(1 / place / harmonic, rel=0.1)
    assert np.mean(~np.isnan(slack_s)) == pytest.approx(0.4, abs=0.02)
    assert set(slack_s[~np.isnan(slack_s)]) == {200.0}
    assert People().draw(durations_s, 3)[0] is None


def test_who_asks_changes_neither_arrivals_nor_work():
    def draw(people: People) -> list[tuple[int, int | None]]:
        mix = task_mix(model="llama-2-7b")
        tasks = poisson_tasks(mix, rate, num_tasks=50, tasks_per_hour=10.0, people=people)
        return [(task.arrival_ns, task.num_steps) for task in tasks]

    assert draw(People()) == draw(People(num_tenants=7, deadline_share=1.0))


def test_base_models_are_drawn_by_popularity():
    mix = task_mix(model={"llama-2-7b": 3.0, "mistral-7b": 1.0})
    tasks = list(poisson_tasks(mix, rate, num_tasks=4_000, tasks_per_hour=10.0))
    share = sum(task.model == "llama-2-7b" for task in tasks) / len(tasks)
    assert share == pytest.approx(0.75, abs=0.03)


def test_lengths_written_out_as_quantiles():
    table = histogram(inline_histogram_name([10, 20, 40]))
    assert table.mean_tokens(1_000) == pytest.approx((15 + 30) / 2, rel=0.01)
    assert table.lengths_tokens.min() >= 10 and table.lengths_tokens.max() <= 40
    for wrong in ("lengths:", "lengths:5/x", "lengths:9/3", "lengths:0/3"):
        with pytest.raises(ConfigError, match="no list of lengths"):
            histogram(wrong)


# ----------------------------------------------------------------------------------- there and back


def simulate(folder: Path, *words: str) -> None:
    common = ["cluster=h100_x1", "cluster.num_gpus=2", "plan_samples=0", f"output_dir={folder}"]
    assert main(["simulate", *common, *words]) == 0


def test_a_simulated_run_exported_and_asked_again_is_the_same_run(tmp_path: Path):
    words = ["workload=bursty", "workload.limit=25", "workload.num_tenants=3"]
    simulate(tmp_path / "a", *words, "workload.deadline_share=0.5", "journal=true")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "trace.csv")]) == 0
    simulate(tmp_path / "b", "workload=trace", f"workload.trace={tmp_path / 'trace.csv'}")
    first, second = ((tmp_path / name / "tasks.csv").read_text() for name in "ab")
    assert first == second


def test_a_real_log_keeps_what_a_fleet_must_know(tmp_path: Path):
    """Of a real run on real text: lengths, settings and times; not the text."""
    lines = (json.dumps({"text": f"{number} " * (3 + number % 40)}) for number in range(120))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        "defaults: {model: tiny, targets: [q_proj, v_proj], batch_size: 4, steps: 27}\n"
        "tasks:\n"
        f"  - {{id: a, data: {tmp_path / 'text.jsonl'}, rank: 8, tenant: red}}\n"
        f"  - {{id: b, data: {tmp_path / 'text.jsonl'}, rank: 4, arrival_s: 0.25, priority: 2}}\n"
    )
    words = [f"workload.tasks_file={tasks}", "model=tiny", f"output_dir={tmp_path / 'run'}"]
    assert main(["train", *words]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "trace.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "trace.csv").open()))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["tenant"] == "red" and rows[1]["priority"] == "2"
    assert rows[0]["targets"] == "q_proj|v_proj" and rows[0]["steps"] == "27"
    assert float(rows[1]["arrival_s"]) == 0.25
    again = list(trace_tasks(read_trace(tmp_path / "trace.csv"), task_mix(model="tiny"), rate))
    assert [task.task_id for task in again] == ["a", "b"]
    assert again[0].adapter.rank == 8 and again[0].adapter.targets == ("q_proj", "v_proj")
    assert again[1].arrival_ns == NS_PER_S // 4 and again[1].priority == 2
    assert again[0].num_steps == 27 and again[0].batch_size == 4
    # The lengths that are drawn tomorrow are those of today.
    simulate(tmp_path / "what_if", "workload=trace", f"workload.trace={tmp_path / 'trace.csv'}",
             "model=tiny")  # fmt: skip
    tokens = {
        name: sum(
            int(row["effective_tokens"])
            for row in csv.DictReader((tmp_path / name / "tasks.csv").open())
        )
        for name in ("run", "what_if")
    }
    assert tokens["what_if"] == pytest.approx(tokens["run"], rel=0.05)


def test_a_run_without_a_journal_cannot_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(DataError, match="journal=true"):
        export_trace(tmp_path)
    assert main(["export", str(tmp_path)]) == 2
    assert "usage: muxtune export" in capsys.readouterr().out
