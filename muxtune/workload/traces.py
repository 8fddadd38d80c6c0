"""Recorded or drawn arrivals to a lazy stream of tasks.

Trace files are CSV (also gzipped) with a header. One row is one task:

========================== ======================================================================
``arrival_s``              seconds on any clock, not decreasing; ``submit_s`` is taken too
``steps``                  optimizer steps; or
``tokens``                 effective tokens to train on; or
``duration_s``             seconds alone on one GPU under HF PEFT
``id``                     optional; else ids are made
``tenant``                 optional; ``vc`` is taken too
``num_gpus``               optional; not used unless ``count_gpus`` is set
``deadline_s``             optional; on the clock of ``arrival_s``
``model`` ``histogram`` ``tokenizer`` ``method`` ``rank`` ``batch_size`` ``accumulation``
``max_length_tokens`` ``priority`` ``max_slowdown`` ``targets``: optional; they replace the mix's
draws. ``targets`` are parted by ``|``; a ``histogram`` may be written out as quantiles,
``lengths:5/12/30/64``.
========================== ======================================================================

At least one of steps, tokens and duration_s is needed in each row; the first in that order counts.
Blank cells of optional columns mean "not given". Other columns are not used; a warning names them,
and ``Trace.ignored`` lists them. ``read_trace("philly")`` is the shipped Microsoft Philly trace;
its source and licence are in ``data/philly/SOURCE.md``. There is no public trace of LLM fine-tuning
arrivals: Philly gives arrivals and durations of other training jobs, the mix gives the rest.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from muxtune.errors import ConfigError, DataError
from muxtune.types import NS_PER_S, AdapterSpec, DataSpec, TaskSpec, new_tuple
from muxtune.workload.arrivals import ONE_TENANT, Bursts, People, bursty_arrivals_s
from muxtune.workload.fields import closest
from muxtune.workload.methods import own_targets
from muxtune.workload.mix import MIX_FIELDS, Draws, TaskMix
from muxtune.workload.synthetic import histogram, tokenizer_of
from muxtune.workload.tasks import check_id

_log = logging.getLogger(__name__)
PHILLY = "philly"
ROWS_AT_A_TIME = 8_192
DEFAULT_TENANT = "default"
_ALIASES = {"submit_s": "arrival_s", "vc": "tenant"}
_WORK = ("steps", "tokens", "duration_s")
_MIX_COLUMNS = tuple(MIX_FIELDS)
_LARGEST = 1e12  # seconds, tokens or steps; what lies beyond is a mistake
_COLUMNS = ("arrival_s", *_WORK, "id", "tenant", "num_gpus", "deadline_s", *_MIX_COLUMNS)


class Trace(NamedTuple):
    """Columns of a trace, each [num_tasks]. NaN means "not given" in the float columns.

    ``columns``: values that replace a mix's draws, None where not given.
    """

    path: str
    arrival_s: np.ndarray
    duration_s: np.ndarray
    tokens: np.ndarray
    steps: np.ndarray
    deadline_s: np.ndarray
    num_gpus: np.ndarray
    task_ids: tuple[str, ...]
    tenants: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]]
    ignored: tuple[str, ...] = ()

    def head(self, num_tasks: int | None) -> Trace:
        """The first tasks only; None: all."""
        if num_tasks is None or num_tasks >= len(self.arrival_s):
            return self
        fields = {
            name: value[:num_tasks]
            for name, value in self._asdict().items()
            if name not in ("path", "columns", "ignored")
        }
        columns = {name: cells[:num_tasks] for name, cells in self.columns.items()}
        return self._replace(**fields, columns=columns)


def make_trace(
    path: str,
    arrival_s: np.ndarray,
    duration_s: np.ndarray,
    prefix: str = "task",
    tenants: Sequence[str] | None = None,
    deadline_s: np.ndarray | None = None,
) -> Trace:
    """A trace of arrivals and durations, and what else was drawn."""
    size = len(arrival_s)
    unknown = np.full(size, np.nan)
    return Trace(
        path=path,
        arrival_s=arrival_s,
        duration_s=duration_s,
        tokens=unknown,
        steps=unknown,
        deadline_s=unknown if deadline_s is None else deadline_s,
        num_gpus=np.ones(size, dtype=np.int64),
        task_ids=_made_ids(size, prefix),
        tenants=tuple(tenants or (DEFAULT_TENANT,) * size),
        columns={},
    )


def _made_ids(size: int, prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}-{number:06d}" for number in range(size))


# --------------------------------------------------------------------------------------- reading


def read_trace(path: str | Path) -> Trace:
    """A trace file, or the shipped one for ``philly``.

    Raises DataError, naming the file and where there is one the line: missing columns, values
    that are not numbers, unsorted arrivals, negative work, duplicate ids. Raises ConfigError for
    an id that cannot be a task's.
    """
    source = resources.files("muxtune.workload") / "data" / "philly" / "philly_jobs.csv.gz"
    shipped = str(path) == PHILLY
    name = PHILLY if shipped else str(path)
    table = _read_table(name, source.read_bytes() if shipped else _read_bytes(name))
    table.check_columns()
    arrival_s = table.numbers("arrival_s", low=0.0, required=True)
    table.refuse(np.flatnonzero(np.diff(arrival_s) < 0) + 1, "arrives before the line above it")
    work = {
        "steps": table.numbers("steps", low=1.0, whole=True),
        "tokens": table.numbers("tokens", low=0.0),
        "duration_s": table.numbers("duration_s", low=0.0),
    }
    missing = np.all([np.isnan(values) for values in work.values()], axis=0)
    table.refuse(np.flatnonzero(missing), f"gives none of {', '.join(_WORK)}")
    num_gpus = table.numbers("num_gpus", low=1.0, whole=True)
    ignored = tuple(sorted(set(table.columns) - set(_COLUMNS)))
    if ignored:
        _warn_of(name, ignored)
    return Trace(
        path=name,
        arrival_s=arrival_s,
        deadline_s=_deadlines(table, arrival_s),
        num_gpus=np.where(np.isnan(num_gpus), 1, num_gpus).astype(np.int64),
        task_ids=_ids(table),
        tenants=_tenants(table),
        columns={column: table.values(column) for column in _MIX_COLUMNS if table.has(column)},
        ignored=ignored,
        **work,
    )


@functools.cache  # once, however often a sweep reads the file
def _warn_of(path: str, ignored: tuple[str, ...]) -> None:
    hints = "".join(closest(column, _COLUMNS) for column in ignored)
    known = ", ".join((*_COLUMNS, *_ALIASES))
    _log.warning(
        "%s: columns that are not used: %s. %sKnown are: %s",
        path, ", ".join(ignored), hints, known,
    )  # fmt: skip


class _Table(NamedTuple):
    """Text cells by column; ``lines``: the file's line of each row."""

    path: str
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]

    def has(self, column: str) -> bool:
        return column in self.columns

    def fail(self, row: int, problem: str) -> DataError:
        return DataError(self.path, problem, "Correct or remove the line", int(self.lines[row]))

    def refuse(self, rows: np.ndarray, problem: str) -> None:
        if len(rows):
            raise self.fail(int(rows[0]), f"the task {problem}")

    def check_columns(self) -> None:
        missing = [] if self.has("arrival_s") else ["arrival_s (or submit_s)"]
        if not any(self.has(column) for column in _WORK):
            missing.append(f"one of {', '.join(_WORK)}")
        if missing:
            problem = f"missing columns: {' and '.join(missing)}; the header has: "
            problem += ", ".join(self.columns) or "nothing"
            raise DataError(self.path, problem, "Name the columns in the first line", 1)
        if not self.lines:
            raise DataError(self.path, "there is no task below the header", "Add one line a task")

    def numbers(
        self, column: str, low: float, *, required: bool = False, whole: bool = False
    ) -> np.ndarray:
        """[num_rows] floats; NaN where the cell is blank, unless ``required``."""
        if not self.has(column):
            return np.full(len(self.lines), np.nan)
        cells = self.columns[column]
        try:
            numbers = np.array(cells, dtype=np.str_).astype(np.float64)
            exact = bool(np.isfinite(numbers).all())
        except ValueError:
            numbers, exact = np.empty(0), False
        if not exact:
            numbers = np.array([self._number(column, row, required) for row in range(len(cells))])
        bad = (numbers < low) | (numbers > _LARGEST) | (whole & (np.trunc(numbers) < numbers))
        for row in np.flatnonzero(bad)[:1]:
            kind = "a whole number" if whole else "a number"
            problem = f"{column} is {cells[row]}, not {kind} from {low:g} to {_LARGEST:g}"
            raise self.fail(int(row), problem)
        return numbers

    def _number(self, column: str, row: int, required: bool) -> float:
        cell = self.columns[column][row]
        if not cell.strip() and not required:
            return math.nan
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.fail(row, f"{column} is {cell!r}, not a number")
        return number

    def values(self, column: str) -> tuple[Any, ...]:
        """Checked cells of a column that replaces the mix's draws."""
        read: dict[str, Any] = {"": None}
        for row, cell in enumerate(self.columns[column]):
            if cell not in read:
                where = f"{self.path}:{self.lines[row]}: {column}"
                content = cell.split("|") if column == "targets" else cell
                read[cell] = MIX_FIELDS[column].read(where, content)
        return tuple(read[cell] for cell in self.columns[column])


def _read_bytes(path: str) -> bytes:
    remedy = f"Give the path of a CSV file, or '{PHILLY}' for the shipped trace"
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", remedy) from None


def _read_table(path: str, content: bytes) -> _Table:
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        rows, lines = [], []
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise DataError(path, f"is not a CSV file ({error})", "Save it as UTF-8 CSV") from None
    if not rows:
        raise DataError(path, "the file is empty", "Give a CSV file with a header")
    return _Table(path, _by_column(path, rows, lines), lines[1:])


def _by_column(path: str, rows: list[list[str]], lines: list[int]) -> Mapping[str, Sequence[str]]:
    header = [_ALIASES.get(name.strip(), name.strip()) for name in rows[0]]
    if len(set(header)) != len(header):
        problem = f"the header names a column twice: {', '.join(header)}"
        raise DataError(path, problem, "Rename one of them", lines[0])
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            problem = f"the line has {len(row)} cells, the header {len(header)}"
            raise DataError(path, problem, "Correct or remove the line", line)
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(header)
    return dict(zip(header, columns, strict=True))


def _deadlines(table: _Table, arrival_s: np.ndarray) -> np.ndarray:
    deadline_s = table.numbers("deadline_s", low=0.0)
    table.refuse(np.flatnonzero(deadline_s < arrival_s), "has a deadline before its arrival")
    return deadline_s


def _tenants(table: _Table) -> tuple[str, ...]:
    cells = table.columns.get("tenant", ("",) * len(table.lines))
    return tuple(cell or DEFAULT_TENANT for cell in cells)


def _ids(table: _Table) -> tuple[str, ...]:
    if not table.has("id"):
        return _made_ids(len(table.lines), "task")
    seen: dict[str, int] = {}
    for row, cell in enumerate(table.columns["id"]):
        line = table.lines[row]
        first = seen.setdefault(check_id(cell, f"{table.path}:{line}: id").casefold(), line)
        if first != line:
            raise table.fail(row, f"task id '{cell}' is already on line {first}")
    return tuple(table.columns["id"])


# ----------------------------------------------------------------------------------------- tasks


class TaskStream:
    """Tasks sorted by arrival, made while they are iterated; each ``iter`` starts anew.

    ``solo_gpu_s``: GPU-seconds that all tasks need when each runs alone under HF PEFT.
    ``horizon_s``: from the first to the last arrival, after scaling.
    ``offered_load``: rho = solo_gpu_s / (num_gpus * horizon_s); the same for every policy.
    ``notes``: what a reader of the results has to know.
    """

    def __init__(
        self, make: Callable[[], Iterator[TaskSpec]], num_tasks: int, solo_gpu_s: float,
        horizon_s: float, num_gpus: int, notes: Iterable[str],
    ) -> None:  # fmt: skip
        self._make, self.num_tasks, self.num_gpus = make, num_tasks, num_gpus
        self.solo_gpu_s, self.horizon_s, self.notes = solo_gpu_s, horizon_s, tuple(notes)
        self.offered_load = solo_gpu_s / (num_gpus * horizon_s) if horizon_s > 0 else math.inf

    def __iter__(self) -> Iterator[TaskSpec]:
        return self._make()

    def __len__(self) -> int:
        return self.num_tasks

    @property
    def overloaded(self) -> bool:
        """Steady-state means make no sense: the queue only grows until arrivals end."""
        return self.offered_load >= 1.0


def trace_tasks(
    trace: Trace,
    mix: TaskMix,
    solo_tokens_per_s: Callable[[TaskSpec], float],
    *,
    load: float | None = None,
    num_gpus: int = 1,
    seed: int = 0,
    limit: int | None = None,
    count_gpus: bool = False,
    resolve: Callable[[TaskSpec], TaskSpec] | None = None,
) -> TaskStream:
    """Tasks of a trace; what it does not tell is drawn from ``mix``.

    A duration becomes tokens by ``solo_tokens_per_s``: effective tokens/s of the task alone under
    HF PEFT. That and ``resolve`` (say, spelling out ``all-linear``) are called once for each kind
    of task, with a task that is alike in all but id, tenant, times and steps. ``load`` stretches
    or squeezes all arrival times so that rho equals it (``TaskStream``); None keeps them. The
    first task arrives at 0; a deadline keeps its distance from the arrival. ``limit``: the first
    tasks only. ``count_gpus``: multiply durations by the trace's GPU count, which is otherwise
    ignored because adapter tasks are small.

    Raises ConfigError for a load that cannot be reached, a task without a base model, and rates
    that are not positive.
    """
    _check_numbers(load, num_gpus, limit)
    trace = trace.head(limit)
    kinds = _kinds(_with_columns(mix.draw(len(trace.arrival_s), seed), trace), resolve)
    rates = np.array([_rate(task, solo_tokens_per_s) for task in kinds.templates])
    steps = _steps(trace, kinds, rates, count_gpus)
    solo_gpu_s = float((steps * kinds.tokens_per_step()[kinds.index] / rates[kinds.index]).sum())
    since_first_s = trace.arrival_s - trace.arrival_s[0]
    scale = _scale(trace, solo_gpu_s, float(since_first_s[-1]) * num_gpus, load)
    rows = _Rows(trace, kinds, steps, np.rint(since_first_s * scale * NS_PER_S).astype(np.int64))
    horizon_s = float(since_first_s[-1]) * scale
    notes = _describe(trace, count_gpus, scale)
    return TaskStream(rows.tasks, len(steps), solo_gpu_s, horizon_s, num_gpus, notes)


def poisson_tasks(
    mix: TaskMix,
    solo_tokens_per_s: Callable[[TaskSpec], float],
    *,
    num_tasks: int,
    load: float | None = None,
    tasks_per_hour: float | None = None,
    mean_duration_s: float = 1800.0,
    duration_sigma: float = 1.0,
    num_gpus: int = 1,
    seed: int = 0,
    resolve: Callable[[TaskSpec], TaskSpec] | None = None,
    bursts: Bursts | None = None,
    people: People = ONE_TENANT,
) -> TaskStream:
    """Arrivals, Poisson or in ``bursts``, of tasks with log-normal solo durations.

    Exactly one of ``load`` (rho of this very draw) and ``tasks_per_hour`` is given.
    ``duration_sigma``: standard deviation of the logarithm of the duration. Raises ConfigError.
    """
    if (load is None) == (tasks_per_hour is None):
        remedy = "Give exactly one of the two"
        raise ConfigError("load, tasks_per_hour", "both or neither are given", remedy)
    for field, value in (
        ("num_tasks", num_tasks),
        ("tasks_per_hour", 1.0 if tasks_per_hour is None else tasks_per_hour),
        ("mean_duration_s", mean_duration_s),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(field, f"{value} is out of range", "Give a number above 0")
    if not (math.isfinite(duration_sigma) and duration_sigma >= 0):
        problem = f"{duration_sigma} is out of range"
        raise ConfigError("duration_sigma", problem, "Give a number of at least 0")
    gaps, durations = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence([seed, 1]).spawn(2)
    )
    mean_gap_s = 3600.0 / (tasks_per_hour or 3600.0)
    if bursts is None:
        arrival_s = np.concatenate([[0.0], np.cumsum(gaps.exponential(mean_gap_s, num_tasks - 1))])
    else:
        arrival_s = bursty_arrivals_s(gaps, num_tasks, mean_gap_s, bursts)
    log_mean = math.log(mean_duration_s) - duration_sigma**2 / 2
    duration_s = durations.lognormal(log_mean, duration_sigma, num_tasks)
    tenants, slack_s = people.draw(duration_s, seed)
    trace = make_trace(
        "poisson" if bursts is None else "bursty", arrival_s, duration_s,
        tenants=tenants, deadline_s=arrival_s + slack_s,
    )  # fmt: skip
    return trace_tasks(
        trace, mix, solo_tokens_per_s, load=load, num_gpus=num_gpus, seed=seed, resolve=resolve
    )


class _Kinds(NamedTuple):
    """Tasks that differ in id, tenant, times and steps only: ``templates[index[row]]``."""

    templates: list[TaskSpec]
    index: np.ndarray

    def tokens_per_step(self) -> np.ndarray:
        """[num_kinds] mean effective tokens of an optimizer step."""
        return np.array([_tokens_per_step(task) for task in self.templates])


def _with_columns(draws: Draws, trace: Trace) -> Draws:
    for name, cells in trace.columns.items():
        values = draws.values[name]
        place = {value: len(values) + number for number, value in enumerate(dict.fromkeys(cells))}
        draws.values[name] = values + list(place)
        given = np.array([place[cell] for cell in cells])
        blank = np.array([cell is None for cell in cells])
        # A blank max_slowdown in the trace leaves the mix's draw, as with every other column.
        draws.index[name] = np.where(blank, draws.index[name], given)
    return draws


def _kinds(draws: Draws, resolve: Callable[[TaskSpec], TaskSpec] | None) -> _Kinds:
    names = list(draws.index)
    # Mixed radix: one number a combination, compacted after each field so that it stays small.
    code = np.zeros(len(draws.index[names[0]]), dtype=np.int64)
    for name in names:
        code = code * len(draws.values[name]) + draws.index[name]
        code = np.unique(code, return_inverse=True)[1]
    first_row, index = np.unique(code, return_index=True, return_inverse=True)[1:]
    templates = []
    for row in first_row.tolist():
        values = {name: draws.values[name][int(draws.index[name][row])] for name in names}
        template = _template(values)
        templates.append(resolve(template) if resolve else template)
    return _Kinds(templates, index)


def _template(values: Mapping[str, Any]) -> TaskSpec:
    rank, method = values["rank"], values["method"]
    targets = own_targets(method, values["targets"])
    tokenizer = tokenizer_of(values["histogram"], values["tokenizer"], "trace: tokenizer")
    data = DataSpec(
        max_length_tokens=values["max_length_tokens"],
        histogram=values["histogram"],
        tokenizer=tokenizer,
    )
    return TaskSpec(
        task_id="",
        model=values["model"],
        adapter=AdapterSpec(method, rank, 2.0 * rank, targets=targets),
        data=data,
        batch_size=values["batch_size"],
        accumulation=values["accumulation"],
        num_steps=1,
        priority=values["priority"],
        max_slowdown=values["max_slowdown"],
    )


def _tokens_per_step(task: TaskSpec) -> float:
    table = histogram(task.data.histogram, task.data.tokenizer)
    return task.sequences_per_step * table.mean_tokens(task.data.max_length_tokens)


def _rate(task: TaskSpec, solo_tokens_per_s: Callable[[TaskSpec], float]) -> float:
    rate = solo_tokens_per_s(task)
    if not (math.isfinite(rate) and rate > 0):
        problem = f"the solo rate of model '{task.model}' is {rate} tokens/s"
        raise ConfigError("cost", problem, "Check the device's and the model's figures")
    return rate


def _steps(trace: Trace, kinds: _Kinds, rates: np.ndarray, count_gpus: bool) -> np.ndarray:
    """[num_tasks] optimizer steps, at least 1."""
    tokens = np.where(np.isnan(trace.tokens), trace.duration_s * rates[kinds.index], trace.tokens)
    if count_gpus:
        tokens = np.where(np.isnan(trace.tokens), tokens * trace.num_gpus, tokens)
    steps = np.rint(tokens / kinds.tokens_per_step()[kinds.index])
    steps = np.where(np.isnan(trace.steps), steps, trace.steps)
    return np.maximum(steps, 1).astype(np.int64)


def _scale(trace: Trace, solo_gpu_s: float, gpu_horizon_s: float, load: float | None) -> float:
    if load is None:
        return 1.0
    if gpu_horizon_s <= 0:
        problem = f"{load} cannot be reached: all tasks of {trace.path} arrive at once"
        raise ConfigError("load", problem, "Leave load out, or take more tasks")
    scale = solo_gpu_s / (gpu_horizon_s * load)
    if gpu_horizon_s * scale * NS_PER_S > 2**62:
        remedy = "Give a larger load"
        raise ConfigError("load", f"{load} spreads arrivals over centuries", remedy)
    return scale


def _check_numbers(load: float | None, num_gpus: int, limit: int | None) -> None:
    if load is not None and not (math.isfinite(load) and load > 0):
        raise ConfigError("load", f"{load} is out of range", "Give a number above 0, or null")
    for field, value in (("num_gpus", num_gpus), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ConfigError(field, f"{value} is out of range", "Give a whole number from 1")


def _describe(trace: Trace, count_gpus: bool, scale: float) -> Iterable[str]:
    if not np.isnan(trace.duration_s).all():
        yield "durations became tokens by each base model's solo HF PEFT rate"
    if (trace.num_gpus > 1).any():
        how = "multiply the durations" if count_gpus else "are ignored: adapter tasks are small"
        yield f"the trace's GPU counts {how}"
    if scale != 1.0:
        yield f"arrival times are multiplied by {scale:.6g} to reach the load"
    if trace.ignored:
        yield f"columns not used: {', '.join(trace.ignored)}"


class _Rows(NamedTuple):
    trace: Trace
    kinds: _Kinds
    steps: np.ndarray
    arrival_ns: np.ndarray

    def tasks(self) -> Iterator[TaskSpec]:
        """Some thousand at a time, so that a million do not stand in memory as Python numbers."""
        for start in range(0, len(self.steps), ROWS_AT_A_TIME):
            yield from self._some_tasks(start, start + ROWS_AT_A_TIME)

    def _some_tasks(self, start: int, stop: int) -> Iterator[TaskSpec]:
        trace, part = self.trace, slice(start, stop)
        slack_ns = (trace.deadline_s[part] - trace.arrival_s[part]) * NS_PER_S
        slacks = [None if math.isnan(slack) else round(slack) for slack in slack_ns.tolist()]
        rows = zip(
            trace.task_ids[part],
            trace.tenants[part],
            self.kinds.index[part].tolist(),
            self.steps[part].tolist(),
            self.arrival_ns[part].tolist(),
            slacks,
            strict=True,
        )
        templates = self.kinds.templates
        for seed, (task_id, tenant, kind, steps, arrival_ns, slack) in enumerate(rows, start):
            like = templates[kind]
            deadline_ns = None if slack is None else arrival_ns + slack
            (
                _, model, _, adapter, data, optimizer, batch_size, accumulation, _, _, _, _,
                priority, _, max_slowdown, _,
            ) = like  # fmt: skip
            parts = (
                task_id, model, tenant, adapter, data, optimizer, batch_size, accumulation, steps,
                None, seed, arrival_ns, priority, deadline_ns, max_slowdown, None,
            )  # fmt: skip
            yield new_tuple(TaskSpec, parts)
