"""LobRA's published measurements, read from the folder that the reader brings.

They have no licence, so they are not part of this repository: the public repository
ccchengff/LobRA holds them (appendix and exp_result/).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from muxtune.errors import ConfigError, DataError, MuxTuneError
from muxtune.planning.lobra import Configuration, HomogeneousStep, LayerSample, SequenceBatch
from muxtune.types import ReplicaShape

NUM_LAYERS = 32  # Llama-2-7B
GLOBAL_BATCH = 64  # of the homogeneous steps
SOURCE = "the public repository ccchengff/LobRA (PVLDB 18(8), 2025; arXiv 2509.01193)"
REMEDY = f"Give lobra_data=<folder> with the CSV files made from {SOURCE}"
COLUMNS = {
    "profile_time_llama2_7b.csv": ("tp", "seq_len", "mbs", "time"),
    "max_tokens_llama2_7b.csv": ("tp", "pp", "max_tokens"),
    "datasets.csv": (
        "dataset",
        "mean_len",
        "skewness",
        "excess_kurtosis",
        "batch_size",
        "max_len_7b_experiment",
        "in_7b_experiment",
    ),
    "homogeneous_iteration_times.csv": (
        "tp",
        "pp",
        "replicas",
        "max_seq_len",
        "num_microbatches",
        "lobra_s",
        "nemo_s",
    ),
}


class Dataset(NamedTuple):
    """Moments of the lengths in tokens, sequences per step, and the cap of the experiment."""

    name: str
    mean_tokens: float
    skewness: float
    excess_kurtosis: float
    batch_size: int
    cap_tokens: int


class Published(NamedTuple):
    """``steps``: the homogeneous ones, with measured seconds by system."""

    layer_samples: tuple[LayerSample, ...]
    configurations: tuple[Configuration, ...]
    datasets: tuple[Dataset, ...]
    steps: tuple[HomogeneousStep, ...]
    measured_s: Mapping[str, tuple[float, ...]]


def arguments(given: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """``name=value`` arguments over the defaults. Raises ConfigError for an unknown name."""
    chosen = dict(known)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ConfigError(text, "is no known argument", f"choose of {', '.join(known)}")
        chosen[name] = value
    return chosen


def read(folder: str) -> Published:
    """Raises ConfigError without a folder and DataError for what is missing or not positive."""
    if not folder:
        raise ConfigError("lobra_data", "is not given", REMEDY)
    if not Path(folder).is_dir():
        raise ConfigError("lobra_data", f"'{folder}' is no folder", REMEDY)
    tables = {name: _table(Path(folder) / name, columns) for name, columns in COLUMNS.items()}
    return Published(
        _layer_samples(tables["profile_time_llama2_7b.csv"]),
        _configurations(tables["max_tokens_llama2_7b.csv"]),
        _datasets(tables["datasets.csv"]),
        _steps(tables["homogeneous_iteration_times.csv"]),
        {
            system: tuple(tables["homogeneous_iteration_times.csv"][f"{system}_s"].astype(float))
            for system in ("lobra", "nemo")
        },
    )


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(str(path), "is missing", REMEDY)
    try:
        table = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"is no CSV file ({error})", REMEDY) from error
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(str(path), f"has no column {missing[0]}", REMEDY)
    if not len(table):
        raise DataError(str(path), "has no rows", REMEDY)
    for column in (c for c in columns if c not in ("dataset", "max_len_7b_experiment")):
        numbers = np.array(pd.to_numeric(table[column], errors="coerce"), float)
        wrong = np.flatnonzero(~(numbers >= 0))  # not-a-number is wrong too
        if len(wrong):
            line = int(wrong[0]) + 2  # the header is line 1
            raise DataError(str(path), f"{column} is not a number of 0 or more", REMEDY, line)
    return table


def _layer_samples(table: pd.DataFrame) -> tuple[LayerSample, ...]:
    rows = zip(table.tp, table.mbs, table.seq_len, table.time, strict=True)
    return tuple(LayerSample(int(t), int(b), int(s), float(ms) / 1e3) for t, b, s, ms in rows)


def _configurations(table: pd.DataFrame) -> tuple[Configuration, ...]:
    rows = zip(table.tp, table.pp, table.max_tokens, strict=True)
    return tuple(Configuration(ReplicaShape(int(t), int(p)), int(most)) for t, p, most in rows)


def _datasets(table: pd.DataFrame) -> tuple[Dataset, ...]:
    chosen = table[table.in_7b_experiment == 1]
    columns = [chosen[name] for name in COLUMNS["datasets.csv"][:-1]]
    return tuple(
        Dataset(str(name), float(mean), float(skew), float(kurtosis), int(batch), int(cap))
        for name, mean, skew, kurtosis, batch, cap in zip(*columns, strict=True)
    )


def _steps(table: pd.DataFrame) -> tuple[HomogeneousStep, ...]:
    names = COLUMNS["homogeneous_iteration_times.csv"][:5]
    steps = []
    for tp, pp, replicas, length, count in zip(*(table[name] for name in names), strict=True):
        batch = GLOBAL_BATCH // (int(replicas) * int(count))
        micro_batch = SequenceBatch(batch, int(length))
        shape = ReplicaShape(int(tp), int(pp))
        steps.append(HomogeneousStep(shape, int(replicas), micro_batch, int(count)))
    return tuple(steps)


def exit_on_error(main) -> None:
    """Runs it; an error that the reader can act on ends the program without a traceback."""
    try:
        main(sys.argv[1:])
    except MuxTuneError as error:
        sys.exit(str(error))
