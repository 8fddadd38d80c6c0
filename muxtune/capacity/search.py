"""The smallest fleet that meets a service level, by doubling and halving of the interval.

A fleet with more GPUs should serve no worse. That is an assumption of the search, not a law: a
planner may fuse differently when tasks spread differently. So it is checked: every size that was
looked at is kept, and the next larger ones beyond the answer are looked at too. Where a larger
fleet fails, the search goes on above it, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

NUM_CHECKED_ABOVE = 1


class Found(NamedTuple):
    """``num_gpus``: None when no size up to the largest one allowed meets the target.

    ``shares``: of tasks served well, by every size that was looked at. ``monotone``: no size
    that meets the target is smaller than one that does not.
    """

    num_gpus: int | None
    shares: Mapping[int, float]
    monotone: bool

    @property
    def best(self) -> tuple[int, float]:
        """The smallest fleet of the largest share seen."""
        share = max(self.shares.values())
        return min(size for size, value in self.shares.items() if value == share), share


def smallest_fleet(
    share_at: Callable[[int], float],
    target: float,
    first: int,
    largest: int,
    step: int = 1,
    jump: int = 1,
) -> Found:
    """The least multiple of ``step`` at which ``share_at`` reaches ``target``.

    ``first``: a guess, and ``jump``: how far off it may be, in steps; they cost nothing but time
    when they are wrong. Each size is asked for once. A share below the target may be a bound.
    Raises ValueError for a step below 1 or no multiple of it up to ``largest``.
    """
    if step < 1 or largest < step:
        raise ValueError(f"no multiple of {step} from 1 to {largest}")
    asked = _Asked(share_at, target, step, largest // step)
    low, high = asked.bracket(min(max(1, round(first / step)), asked.last), max(1, jump))
    while high is not None:
        low, high = asked.halve(low, high)
        broken = asked.first_broken(high)
        if broken is None:
            break
        low, high = broken, asked.next_meeting(broken)
    return Found(None if high is None else high * step, asked.by_size(), asked.monotone())


class _Asked:
    """Shares by number of steps, each asked for once."""

    def __init__(
        self, share_at: Callable[[int], float], target: float, step: int, last: int
    ) -> None:
        self._share_at, self._target, self._step, self.last = share_at, target, step, last
        self._shares: dict[int, float] = {}

    def meets(self, count: int) -> bool:
        if count not in self._shares:
            self._shares[count] = self._share_at(count * self._step)
        return self._shares[count] >= self._target

    def bracket(self, first: int, jump: int) -> tuple[int, int | None]:
        """(too small or 0, large enough), by jumps that double, down by at most a half."""
        if self.meets(first):
            high = first
            while high > 1:
                low = max(1, high // 2, high - jump)
                if not self.meets(low):
                    return low, high
                high, jump = low, jump * 2
            return 0, high
        return first, self.next_meeting(first, jump)

    def next_meeting(self, low: int, jump: int = 1) -> int | None:
        """A size above ``low`` that meets the target, in jumps that double."""
        while low < self.last:
            high = min(self.last, low + jump)
            if self.meets(high):
                return high
            low, jump = high, jump * 2
        return None

    def halve(self, low: int, high: int) -> tuple[int, int]:
        # Nearer sizes may have been seen to fail on the way up.
        low = max((c for c in self._shares if c < high and not self.meets(c)), default=low)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.meets(middle) else (middle, high)
        return low, high

    def first_broken(self, answer: int) -> int | None:
        """The largest size above the answer that fails after all."""
        for above in range(answer + 1, min(self.last, answer + NUM_CHECKED_ABOVE) + 1):
            self.meets(above)
        failed = [c for c in self._shares if c > answer and not self.meets(c)]
        return max(failed, default=None)

    def monotone(self) -> bool:
        good = [count for count in self._shares if self.meets(count)]
        return all(count < min(good, default=count + 1) for count in self._failed())

    def _failed(self) -> Iterator[int]:
        return (count for count in self._shares if not self.meets(count))

    def by_size(self) -> dict[int, float]:
        return {count * self._step: share for count, share in sorted(self._shares.items())}
