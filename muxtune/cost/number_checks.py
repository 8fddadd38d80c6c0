"""What is a number: in a file that somebody wrote, anything may stand in its place."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """One that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any, least: int = 0) -> bool:
    """A whole number, ``least`` or more."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and is_number(value) and value >= least
