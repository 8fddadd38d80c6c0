"""Zeros that the programs of one product count in, to tell each other what is ready."""

import torch
from torch import Tensor


class ReadyFlags:
    """Zeros for the products that make their own h to count in: int32, a number a tile of rows.

    Every call takes some of them that no other has had since `clear`, which is one launch, be the
    calls ever so many. Room for `count` numbers."""

    def __init__(self, count: int, device: torch.device | str) -> None:
        self._flags = torch.zeros(count, dtype=torch.int32, device=device)
        self._taken = 0

    def clear(self) -> None:
        self._flags.zero_()
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """Raises ValueError where more are asked for than there are."""
        start, self._taken = self._taken, self._taken + count
        if self._taken > self._flags.numel():
            raise ValueError(f"{self._flags.numel()} flags are too few: make more of them")
        return self._flags[start : self._taken]
