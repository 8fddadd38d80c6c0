"""Rules that hold for the source of the core."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import muxtune

ROOT = Path(muxtune.__file__).parent
CORE = [
    *(ROOT / f"{name}.py" for name in ("types", "protocols", "codec", "registry", "errors")),
    *(ROOT / f"{name}.py" for name in ("engine", "deciding", "fleet")),
    *(
        path
        for folder in ("cost", "planning", "planners", "cluster_policies", "workload")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
    *sorted((ROOT.parent / "sim" / "muxtune_sim").rglob("*.py")),
]
CLOCKS = {"time", "datetime", "timeit"}
CLOCK_CALLS = {"perf_counter", "monotonic", "time_ns", "process_time", "now", "utcnow", "today"}


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", CORE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_core_reads_no_wall_clock(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported(tree) & CLOCKS
    calls = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not calls & CLOCK_CALLS


def test_the_list_of_core_files_is_not_empty():
    assert len(CORE) > 20 and all(path.exists() for path in CORE)
