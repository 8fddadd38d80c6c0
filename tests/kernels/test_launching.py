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


def recorded(launcher: Any, given: torch.Tensor) -> Any:
    """A plan of two launches and a product: given -> made -> out."""
    fixed = torch.full((4,), 3.0)
    for attempt in range(2):  # the first launches of all are Triton's own
        with launching.Tape((given, None), (fixed,)) as tape:
            made = launching.empty((4, 4), torch.float32, given.device)
            out = launching.empty((1, 4, 4), torch.float32, given.device)
            launcher((2, 1, 1), (given, fixed, made), (5,), (), 4)
            launcher((3, 1, 1), (made[2:], out[0]), (6,), (), 4)
            launching.add_product(made, given, given, True)
        plan = tape.plan((made, out[0], None))
        assert (plan is None) == (attempt == 0)
    return plan, fixed


def test_a_plan_repeats_launches_with_other_buffers(launcher: Any) -> None:
    first, second = torch.eye(4), 2 * torch.eye(4)
    plan, fixed = recorded(launcher, first)
    calls = len(launcher._kernel.calls)
    made, out, nothing = plan.run((second, None))
    assert len(launcher._kernel.calls) == calls and nothing is None
    one, two = (compiled.runs[-1] for compiled in launcher._kernel.compiled)
    assert one[:3] == (2, 1, 1) and one[9:] == (
        second.data_ptr(), fixed.data_ptr(), made.data_ptr(), 5
    )  # fmt: skip
    assert two[:3] == (3, 1, 1) and two[9:] == (made.data_ptr() + 32, out.data_ptr(), 6)
    assert made.data_ptr() != first.data_ptr() and out.shape == (4, 4)


def test_a_plan_multiplies_what_it_is_given(launcher: Any, monkeypatch: Any) -> None:
    plan, _ = recorded(launcher, torch.eye(4))
    monkeypatch.setattr(torch, "empty", lambda *a, dtype, device: torch.zeros(*a, dtype=dtype))
    second = torch.arange(16.0).reshape(4, 4)
    assert torch.equal(plan.run((second, None))[0], second @ second.t())


def test_a_plan_leaves_what_it_cannot_do(launcher: Any) -> None:
    plan, _ = recorded(launcher, torch.eye(4))
    assert plan.run((torch.zeros(17)[1:].view(4, 4), None)) is None  # not aligned


def test_no_plan_where_an_address_is_not_certain(launcher: Any) -> None:
    given, stranger = torch.eye(4), torch.eye(4)
    for inputs, used in (((given, given), given), ((given, None), stranger)):
        for _ in range(2):
            with launching.Tape(inputs, ()) as tape:
                launcher((2, 1, 1), (used,), (5,), (), 4)
        assert tape.plan(()) is None


def test_the_end_of_a_launch_is_called_as_triton_calls_it(monkeypatch: Any) -> None:
    """Triton's own launcher and the short way, with a stand-in for the C function at their end."""
    from triton.backends.nvidia import driver

    calls: list[Any] = []
    run = object.__new__(driver.CudaLauncher)
    for name in ("global_scratch", "profile_scratch"):
        setattr(run, f"{name}_size", 0)
        setattr(run, f"{name}_align", 1)
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, False
    if "arg_annotations" in driver.CudaLauncher.__init__.__code__.co_names:
        run.arg_annotations, run.kernel_signature = ["annotation"], b"signature"
    signature = {"x": "tensordesc<bf16[2,4]>", "p": "*fp32", "n": "i32", "c": "constexpr"}
    meta = [{"block_size": [2, 4]}]
    run.launch = driver.wrap_handle_tensordesc(lambda *a: calls.append(a), signature, meta)
    compiled = SimpleNamespace(run=run, function="f", packed_metadata="m")
    assert launching._entry_of(compiled, 1) is None  # a stand-in is not the C function
    wrapper, run.launch = run.launch, SimpleNamespace(__closure__=run.launch.__closure__)
    monkeypatch.setattr(launching, "BuiltinFunctionType", type(lambda: None))
    entry = launching._entry_of(compiled, 1)
    assert entry is not None and entry.metas == tuple(meta)
    run.launch = wrapper
    for module in (driver, launching):
        monkeypatch.setattr(module, "make_tensordesc_arg", lambda *a: ["map", 4, 8])
    tensor = torch.zeros(4, 8)
    descriptor = launching.TensorDescriptor.from_tensor(tensor, [2, 4])
    run(2, 1, 1, 7, "f", "m", None, None, None, descriptor, 16, 5, True)
    fields = {**vars(descriptor), "base": None}
    step = launching._Launch(compiled, (2, 1, 1), ((fields, 0, {}),), ((1, 0),), (5, True), entry)
    for _ in range(2):  # encoded, then known
        step.run(7, [tensor, None], [tensor.data_ptr(), 16])
    assert calls[0] == calls[1] == calls[2]
