"""Traces: reading, offered load, and the tasks they become."""

import gzip
import itertools
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.errors import ConfigError, DataError, MuxTuneError
from muxtune.types import NS_PER_S, TaskSpec
from muxtune.workload.mix import task_mix
from muxtune.workload.synthetic import histogram
from muxtune.workload.traces import TaskStream, make_trace, poisson_tasks, read_trace, trace_tasks

MIX = task_mix(model="tiny")
ONE_KIND = task_mix({"histogram": "sst2", "max_length_tokens": 64}, model="tiny")
TOKENS_PER_STEP = 8 * histogram("sst2").mean_tokens(64)


def rate(task: TaskSpec) -> float:
    return 1000.0 + task.adapter.rank


def write(folder: Path, content: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(content, "utf-8")
    return path


def tasks_of(path: Path, **options) -> list[TaskSpec]:
    return list(trace_tasks(read_trace(path), ONE_KIND, lambda task: 1000.0, **options))


def recomputed_load(stream: TaskStream) -> float:
    """From the tasks alone, by the definition of rho."""
    tasks = list(stream)
    seconds = sum(
        task.num_steps
        * task.sequences_per_step
        * histogram(task.data.histogram).mean_tokens(task.data.max_length_tokens)
        / rate(task)
        for task in tasks
        if task.num_steps
    )
    return seconds / (stream.num_gpus * (tasks[-1].arrival_ns - tasks[0].arrival_ns) / NS_PER_S)


def test_philly_is_whole() -> None:
    trace = read_trace("philly")
    assert len(trace.arrival_s) == 82_247 and len(set(trace.tenants)) == 15
    assert (trace.arrival_s[0], trace.arrival_s[-1]) == (0, 9_408_690)
    assert trace.duration_s.sum() == 1_080_390_950
    assert (trace.num_gpus == 1).sum() == 76_627
    assert trace.ignored == ()


def test_philly_reports_its_own_load_and_reaches_a_wanted_one() -> None:
    trace = read_trace("philly")
    own = trace_tasks(trace, MIX, rate, num_gpus=64)
    # Durations are solo GPU-seconds; rounding to steps moves the sum by much less than a percent.
    assert own.offered_load == pytest.approx(1_080_390_950 / (64 * 9_408_690), rel=1e-3)
    assert own.overloaded and own.horizon_s == 9_408_690
    scaled = trace_tasks(trace, MIX, rate, num_gpus=64, load=0.5)
    assert scaled.offered_load == pytest.approx(0.5) and not scaled.overloaded
    assert recomputed_load(scaled) == pytest.approx(0.5, rel=1e-6)
    assert any("multiplied by" in note for note in scaled.notes)
    assert any("GPU counts are ignored" in note for note in scaled.notes)


def test_whole_philly_as_tasks() -> None:
    stream = trace_tasks(read_trace("philly"), MIX, rate, num_gpus=64, load=1.0)
    tasks = list(stream)
    assert len(tasks) == len(stream) == 82_247
    assert len({task.task_id for task in tasks}) == 82_247
    arrivals = [task.arrival_ns for task in tasks]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
    assert min(task.num_steps or 0 for task in tasks) == 1
    assert {type(value) for value in (arrivals[5], tasks[5].num_steps, tasks[5].seed)} == {int}
    assert tasks == list(stream)  # each iteration starts anew
    assert list(itertools.islice(stream, 3)) == tasks[:3]


def test_rate_and_resolve_are_asked_once_a_kind() -> None:
    asked: list[TaskSpec] = []

    def solo(task: TaskSpec) -> float:
        asked.append(task)
        return rate(task)

    def resolve(task: TaskSpec) -> TaskSpec:
        return task._replace(adapter=task.adapter._replace(targets=("q", "v")))

    tasks = list(trace_tasks(read_trace("philly"), MIX, solo, limit=5000, resolve=resolve))
    assert len(asked) == len(set(map(repr, asked))) == 5 * 3 * 3
    assert {task.adapter.targets for task in tasks} == {("q", "v")}
    assert all(task.adapter.alpha == 2 * task.adapter.rank for task in tasks)


def test_limit_takes_the_first() -> None:
    trace = read_trace("philly")
    stream = trace_tasks(trace, MIX, rate, limit=100)
    assert len(stream) == 100 and stream.horizon_s == trace.arrival_s[99]
    assert [task.tenant for task in stream] == list(trace.tenants[:100])


def test_seed_decides_draws_not_arrivals() -> None:
    trace = read_trace("philly").head(300)
    first, again, other = (list(trace_tasks(trace, MIX, rate, seed=seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert [task.arrival_ns for task in first] == [task.arrival_ns for task in other]


def test_generic_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path,
        "id,arrival_s,steps,tokens,duration_s,tenant,model,histogram,batch_size,rank,"
        "max_slowdown,deadline_s,colour\n"
        "a,10,7,,,acme,big,rte,2,64,1.5,40,red\n"
        '"b",10.5,,6000,99,,,,,,,,blue\n'
        "\n"
        "c,12,,,30,,,,,,,,\n",
    )
    with caplog.at_level(logging.WARNING):
        trace = read_trace(path)
        read_trace(path)
    assert trace.ignored == ("colour",)
    (warning,) = caplog.messages
    assert "not used: colour." in warning and "max_slowdown" in warning and str(path) in warning
    stream = trace_tasks(trace, ONE_KIND, lambda task: 1000.0)
    first, second, third = stream
    assert "columns not used: colour" in stream.notes
    assert (first.task_id, first.model, first.tenant) == ("a", "big", "acme")
    assert (first.data.histogram, first.batch_size, first.adapter.rank) == ("rte", 2, 64)
    assert (first.num_steps, first.max_slowdown) == (7, 1.5)
    assert (first.arrival_ns, first.deadline_ns) == (0, 30 * NS_PER_S)
    assert (second.model, second.data.histogram, second.tenant) == ("tiny", "sst2", "default")
    assert second.arrival_ns == NS_PER_S // 2 and second.deadline_ns is None
    assert second.num_steps == round(6000 / TOKENS_PER_STEP)
    assert third.num_steps == round(30 * 1000 / TOKENS_PER_STEP)


def test_gzip_and_column_names_of_philly(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"submit_s,duration_s,num_gpus,vc\n5,60,4,x\n6,60,1,\n"))
    tasks = tasks_of(path)
    assert [task.tenant for task in tasks] == ["x", "default"]
    assert tasks[0].num_steps == tasks[1].num_steps == round(60_000 / TOKENS_PER_STEP)
    counted = tasks_of(path, count_gpus=True)
    assert counted[0].num_steps == round(240_000 / TOKENS_PER_STEP)
    assert counted[1].num_steps == tasks[1].num_steps


def test_a_deadline_keeps_its_distance_when_scaled(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,steps,deadline_s\n100,50,130\n200,50,205\n")
    for task, slack_s in zip(tasks_of(path, load=0.01), (30, 5), strict=True):
        assert task.deadline_ns == task.arrival_ns + slack_s * NS_PER_S


HEADER = "arrival_s,duration_s\n"


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("arrival_s\n1\n", 1, "missing columns: one of steps, tokens, duration_s; the header has"),
        (
            "duration_s\n1\n",
            1,
            "missing columns: arrival_s (or submit_s); the header has: duration",
        ),
        ("a,b\n1,2\n", 1, "missing columns: arrival_s (or submit_s) and one of steps"),
        (HEADER, None, "no task below the header"),
        ("", None, "the file is empty"),
        (HEADER + "1,2\n5,2\n4,2\n", 4, "arrives before the line above it"),
        (HEADER + "1,2\n\n2,-1\n", 4, "duration_s is -1, not a number from 0"),
        (HEADER + "-1,2\n", 2, "arrival_s is -1, not a number from 0"),
        (HEADER + "1,2\nsoon,2\n", 3, "arrival_s is 'soon', not a number"),
        (HEADER + "1,2\n,2\n", 3, "arrival_s is '', not a number"),
        (HEADER + "1,nan\n", 2, "duration_s is 'nan', not a number"),
        (HEADER + "inf,1\n", 2, "arrival_s is 'inf', not a number"),
        (HEADER + "1,1e13\n", 2, "duration_s is 1e13, not a number from 0 to 1e+12"),
        (HEADER + "1,\n", 2, "gives none of steps, tokens, duration_s"),
        (HEADER + "1,2,3\n", 2, "the line has 3 cells, the header 2"),
        ("arrival_s,arrival_s,steps\n1,1,1\n", 1, "names a column twice"),
        ("submit_s,arrival_s,steps\n1,1,1\n", 1, "names a column twice"),
        ("arrival_s,steps\n1,2.5\n", 2, "steps is 2.5, not a whole number"),
        ("arrival_s,steps\n1,0\n", 2, "steps is 0, not a whole number from 1"),
        ("arrival_s,steps,num_gpus\n1,2,0\n", 2, "num_gpus is 0"),
        ("arrival_s,steps,deadline_s\n5,2,4\n", 2, "has a deadline before its arrival"),
        ("id,arrival_s,steps\na,1,1\nb,1,1\nA,2,1\n", 4, "task id 'A' is already on line 2"),
    ],
)
def test_bad_traces_name_the_line(
    tmp_path: Path, content: str, line: int | None, words: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert words in message and message.partition(". ")[2]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("id\na.b", "PEFT takes no name with a dot"),
        ("rank\n0", "rank: '0' is out of range"),
        ("histogram\nsst3", "histogram: 'sst3' is not a histogram"),
        ("max_slowdown\n0.5", "max_slowdown: '0.5' is out of range"),
    ],
)
def test_bad_cells_name_the_line(tmp_path: Path, cells: str, words: str) -> None:
    column, cell = cells.split("\n")
    path = write(tmp_path, f"arrival_s,steps,{column}\n1,1,{cell}\n")
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert f"{path}:2: {column}: " in str(caught.value) and words in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read .*'philly' for the shipped"):
        read_trace(tmp_path / "none.csv")
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"arrival_s,steps\n1,1\n" * 99)[:-20])
    with pytest.raises(DataError, match="is not a CSV file"):
        read_trace(path)
    path.write_bytes(b"arrival_s,steps\n\xff,1\n")
    with pytest.raises(DataError, match="is not a CSV file"):
        read_trace(path)


@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_trace_or_an_error_for_people(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t.csv"
    path.write_bytes(b"arrival_s,steps,tenant\n1,2,x\n" + content)
    try:
        trace = read_trace(path)
    except MuxTuneError:
        return
    assert np.all(np.diff(trace.arrival_s) >= 0) and not np.isnan(trace.steps).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load": 0.0}, "load: 0.0 is out of range"),
        ({"load": -1.0}, "load: -1.0 is out of range"),
        ({"load": math.nan}, "load: nan is out of range"),
        ({"load": 1e-30}, "load: 1e-30 spreads arrivals over centuries"),
        ({"num_gpus": 0}, "num_gpus: 0 is out of range"),
        ({"limit": 0}, "limit: 0 is out of range"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trace_tasks(read_trace("philly"), MIX, rate, **options)


@pytest.mark.parametrize("bad_rate", [0.0, -1.0, math.nan, math.inf])
def test_bad_rates(bad_rate: float) -> None:
    with pytest.raises(ConfigError, match="solo rate of model 'tiny'"):
        trace_tasks(read_trace("philly"), MIX, lambda task: bad_rate, limit=5)


def test_all_at_once() -> None:
    trace = make_trace("burst", np.array([3.0, 3.0]), np.array([10.0, 20.0]))
    stream = trace_tasks(trace, MIX, rate)
    assert stream.offered_load == math.inf and [task.arrival_ns for task in stream] == [0, 0]
    with pytest.raises(ConfigError, match="cannot be reached: all tasks of burst arrive at once"):
        trace_tasks(trace, MIX, rate, load=1.0)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e6)), min_size=2, max_size=30).filter(
        lambda rows: max(rows)[0] - min(rows)[0] > 1
    ),
    st.floats(0.01, 100),
    st.integers(1, 64),
)
def test_any_trace_reaches_any_load(rows, load: float, num_gpus: int) -> None:
    arrivals, durations = np.array(sorted(rows)).T
    trace = make_trace("any", arrivals, durations)
    stream = trace_tasks(trace, MIX, rate, load=load, num_gpus=num_gpus)
    assert stream.offered_load == pytest.approx(load)
    assert recomputed_load(stream) == pytest.approx(load, rel=1e-3)


def test_poisson_at_a_rate() -> None:
    stream = poisson_tasks(
        MIX, rate, num_tasks=4000, tasks_per_hour=120, mean_duration_s=900, seed=3
    )
    tasks = list(stream)
    gaps_s = np.diff([task.arrival_ns for task in tasks]) / NS_PER_S
    assert len(tasks) == 4000 and tasks[0].arrival_ns == 0
    assert gaps_s.mean() == pytest.approx(30, rel=0.06)
    assert gaps_s.std() == pytest.approx(30, rel=0.08)  # exponential: as wide as its mean
    assert stream.solo_gpu_s / 4000 == pytest.approx(900, rel=0.1)
    again = poisson_tasks(
        MIX, rate, num_tasks=4000, tasks_per_hour=120, mean_duration_s=900, seed=3
    )
    assert tasks == list(again)


def test_poisson_at_a_load() -> None:
    stream = poisson_tasks(MIX, rate, num_tasks=200, load=0.7, num_gpus=3, duration_sigma=0)
    assert stream.offered_load == pytest.approx(0.7)
    assert recomputed_load(stream) == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "load, tasks_per_hour: both or neither"),
        ({"load": 1.0, "tasks_per_hour": 3.0}, "load, tasks_per_hour: both or neither"),
        ({"load": 1.0, "num_tasks": 0}, "num_tasks: 0 is out of range"),
        ({"tasks_per_hour": 0.0}, "tasks_per_hour: 0.0 is out of range"),
        ({"load": 1.0, "mean_duration_s": -1.0}, "mean_duration_s: -1.0 is out of range"),
        ({"load": 1.0, "duration_sigma": math.nan}, "duration_sigma: nan is out of range"),
    ],
)
def test_bad_poisson_options(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        poisson_tasks(MIX, rate, **{"num_tasks": 5, **options})
