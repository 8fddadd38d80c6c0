"""Direct launches of compiled kernels: when, and with what."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

launching = pytest.importorskip("muxtune_kernels.launching", reason="triton is not installed")


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


class Kernel:
    """Stands for a Triton kernel: every ordinary call compiles anew."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.calls: list[tuple[Any, ...]] = []
        self.pre_run_hooks: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def call(*arguments: Any, **options: Any) -> Compiled:
            self.calls.append((grid, arguments, options))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return call


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    made = launching.Launcher(Kernel())
    made._is_known = True
    return made


def launch(launcher: Any, tensor: torch.Tensor, number: int = 5, **more: Any) -> None:
    launcher((2, 1, 1), (tensor,), (number,), (True, 16), 4, 2, **more)


def test_the_second_launch_goes_to_what_the_first_compiled(launcher: Any) -> None:
    first, second = torch.zeros(8), torch.ones(8)
    launch(launcher, first)
    launch(launcher, second)
    kernel = launcher._kernel
    options = {"num_warps": 4, "num_stages": 2}
    assert kernel.calls == [((2, 1, 1), (first, 5, True, 16), options)]
    wanted = (2, 1, 1, 7, "function", "metadata", None, None, None, second.data_ptr(), 5, True, 16)
    assert kernel.compiled[0].runs == [wanted]


def test_what_triton_would_compile_anew_is_not_taken_for_known(launcher: Any) -> None:
    aligned = torch.zeros(9)
    launch(launcher, aligned)
    launch(launcher, aligned, number=16)
    launch(launcher, aligned.bfloat16())
    launch(launcher, aligned[1:])
    assert len(launcher._kernel.calls) == 4
    assert not any(compiled.runs for compiled in launcher._kernel.compiled)


def test_tiles_keep_their_shape_and_take_the_new_tensor(launcher: Any) -> None:
    first, second, other = torch.zeros(4, 8), torch.ones(4, 8), torch.ones(2, 8)
    for tensor in (first, second, other):
        launch(launcher, first, tiles=(launching.Tiles(tensor, 2, 4),))
    assert len(launcher._kernel.calls) == 2
    descriptor = launcher._kernel.compiled[0].runs[0][9]
    assert descriptor.base is second
    assert list(descriptor.shape) == [4, 8] and list(descriptor.block_shape) == [2, 4]
    assert launcher._known[next(iter(launcher._known))].descriptors[0]["base"] is None


def test_hooks_see_every_launch(launcher: Any) -> None:
    launch(launcher, torch.zeros(8))
    launcher._kernel.pre_run_hooks.append(print)
    launch(launcher, torch.zeros(8))
    assert len(launcher._kernel.calls) == 2


def test_kept_launches_are_bounded(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MOST_KEPT", 3)
    for number in range(10):
        launch(launcher, torch.zeros(8), number)
    assert len(launcher._known) <= 3
