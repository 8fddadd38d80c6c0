from __future__ import annotations

import functools
import threading

import pytest
import torch

from muxtune_kernels.lasting import lasting


def test_beside_a_capture_tables_are_made_by_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_by: list[int] = []

    @functools.cache
    @lasting
    def table(count: int) -> torch.Tensor:
        made_by.append(threading.get_ident())
        return torch.arange(count)

    assert table(3).tolist() == [0, 1, 2]
    assert made_by == [threading.get_ident()]
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    assert table(4) is table(4)
    assert len(made_by) == 2 and made_by[1] != threading.get_ident()
    assert devices == [1]
    with pytest.raises(RuntimeError):
        table(-1)
