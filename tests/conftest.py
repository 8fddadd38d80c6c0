"""Options that all tests share."""

from __future__ import annotations

import os

import pytest

# Files that take longest come first, so that no process works alone at the end (Makefile: unit).
LONGEST = (
    "test_interpreter.py",
    "test_runtime_smollm2.py",
    "test_distributed.py",
    "test_distributed_command.py",
    "test_capacity_command.py",
    "test_kill_and_resume.py",
    "test_cli_commands.py",
    "test_near_optimum_iteration.py",
)


def pytest_configure() -> None:
    # Only a power failure could tell the difference, and no test causes one: a killed process
    # leaves what it wrote to the system. Thousands of waits for the disk are minutes.
    os.fsync = lambda _: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden decision logs"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
