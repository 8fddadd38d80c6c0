"""The Triton form of the multi-task low-rank linear against the float64 reference."""

# Tests read gradients and optional fields that they have just filled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false

from typing import NamedTuple

import pytest
import torch

from muxtune_kernels import RowDropout, row_keys, slot_rows
from muxtune_kernels.multi_lora import multi_lora_linear_reference
from muxtune_kernels.rows import spans_of


class Problem(NamedTuple):
    ranks: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]
    num_rows: int
    width: int
    out: tuple[int, ...]
    bias: bool = False
    rate: float = 0.0


SMALL = {
    "odd sizes": Problem((4, 0, 17, 2), ((0, 0, 40), (2, 45, 90), (1, 90, 101)), 103, 70, (51,)),
    "bias and dropout": Problem((4, 5, 3), ((1, 1, 30), (2, 30, 50)), 53, 72, (56,), True, 0.3),
    "one task": Problem((16,), ((0, 0, 64),), 64, 64, (64,)),
    "no task": Problem((4, 8), (), 20, 32, (24,), True),
    "scattered rows": Problem((4, 8), tuple((i % 2, 3 * i, 3 * i + 2) for i in range(20)), 61, 40,
                              (48,)),
    "slots out of order": Problem((2, 6, 3), ((2, 0, 7), (0, 7, 25), (1, 26, 47)), 47, 128, (64,)),
    "group": Problem((4, 3), ((0, 0, 33), (1, 35, 70)), 75, 72, (56, 32, 8), True),
    "wide group, ranks over 16": Problem((4, 40), ((0, 0, 33), (1, 33, 70)), 70, 64, (256, 128)),
    "split reduction": Problem((4, 8), ((0, 0, 33), (1, 33, 60)), 60, 1096, (1032,)),
    "split rows": Problem((4,), ((0, 3, 560),), 570, 40, (24,)),
}  # fmt: skip
LARGE = {
    "8 tasks": Problem((16,) * 8, tuple((s, s * 256, s * 256 + 256) for s in range(8)), 2048, 1024,
                       (2048,)),
    "mixed ranks": Problem((8, 64, 16, 0, 32), ((4, 0, 700), (1, 750, 1400), (0, 1400, 2000)), 2048,
                           1024, (1024, 256, 256), True),
    "ragged, dropout": Problem((16,) * 3, ((0, 3, 900), (1, 901, 1500), (2, 1500, 1998)), 2000,
                               512, (1536,), False, 0.1),
    "rank 128": Problem((128, 8), ((0, 0, 500), (1, 500, 1000)), 1000, 512, (512,)),
}  # fmt: skip


class Tensors(NamedTuple):
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    dy: torch.Tensor


def tensors_of(problem: Problem, device, dtype, factor_dtype) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.25).to(device, to)

    rank, out = sum(problem.ranks), sum(problem.out)
    return Tensors(
        normal(problem.num_rows, problem.width),
        normal(len(problem.out) * rank, problem.width, to=factor_dtype),
        normal(rank, out, to=factor_dtype).t(),
        normal(out, problem.width),
        normal(out) if problem.bias else None,
        torch.rand(len(problem.ranks), generator=generator).to(device) + 0.5,
        normal(problem.num_rows, out),
    )


def dropout_of(problem: Problem, device) -> RowDropout | None:
    if not problem.rate:
        return None
    rate = torch.full((len(problem.ranks),), problem.rate, device=device)
    return RowDropout(row_keys(3, 1, 2, torch.arange(problem.num_rows)).to(device), rate)


def triton_form(problem: Problem, t: Tensors, rows=None, deterministic: bool = False):
    """(y, dx, dA, dB), outputs poisoned by what the allocator had in them."""
    from muxtune_kernels.multi_lora.autograd import multi_lora_linear_cuda
    from muxtune_kernels.multi_lora.launch import Adapters

    device = t.x.device
    rows = rows or slot_rows(problem.spans, problem.num_rows, len(problem.ranks), device)
    leaves = [tensor.detach().requires_grad_() for tensor in (t.x, t.a, t.b)]
    adapters = Adapters(problem.ranks, problem.out, 5, deterministic)
    y = multi_lora_linear_cuda(
        leaves[0], t.weight, t.bias, leaves[1], leaves[2], t.scale, rows,
        dropout_of(problem, device), adapters,
    )  # fmt: skip
    return y, *torch.autograd.grad(y, leaves, t.dy)


def reference(problem: Problem, t: Tensors):
    host = Tensors(*(None if v is None else v.detach().double().cpu() for v in t))
    leaves = [tensor.requires_grad_() for tensor in (host.x, host.a, host.b)]
    rows = slot_rows(problem.spans, problem.num_rows, len(problem.ranks))
    y = multi_lora_linear_reference(
        leaves[0], host.weight, host.bias, leaves[1], leaves[2], problem.ranks, host.scale, rows,
        dropout_of(problem, "cpu"), 5, False, problem.out,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, host.dy, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    return y, *(z if g is None else g for g, z in zip(grads, zeros, strict=True))


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double().cpu(), wanted.detach()
    scale = wanted.norm()
    return float((got - wanted).norm() / scale) if scale > 0 else float(got.abs().max())


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output starts as NaN, so that an element nobody writes shows."""
    from muxtune_kernels import launching
    from muxtune_kernels.multi_lora import autograd

    autograd._plans.clear()  # they keep the tuning, which a test may change
    plain_empty = torch.empty

    class Poisoned:
        def __getattr__(self, name: str):
            return getattr(torch, name)

        @staticmethod
        def empty(*args, **kwargs):
            return plain_empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(launching, "torch", Poisoned())


@pytest.fixture
def own_shrink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products make their own low-rank h."""
    from muxtune_kernels.multi_lora import autograd

    tuning_of = autograd.tuning_of
    monkeypatch.setattr(
        autograd, "tuning_of", lambda *key: tuning_of(*key)._replace(own_shrink=request.param)
    )
    return request.param


def forms(*names: str) -> pytest.MarkDecorator:
    """Each problem with products that make their own h, and these without."""
    cases = [(name, True) for name in SMALL] + [(name, False) for name in names]
    return pytest.mark.parametrize(("name", "own_shrink"), cases, indirect=["own_shrink"])


@forms("bias and dropout", "no task", "group", "split reduction")
def test_small(name: str, own_shrink: bool, device: torch.device) -> None:
    problem = SMALL[name]
    t = tensors_of(problem, device, torch.float32, torch.float32)
    for got, wanted in zip(triton_form(problem, t), reference(problem, t), strict=True):
        assert error(got, wanted) < 2e-6


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "own_shrink"),
    [(name, True) for name in (*SMALL, *LARGE)] + [(name, False) for name in LARGE],
    indirect=["own_shrink"],
)
def test_bfloat16(
    name: str, own_shrink: bool, factor_dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    problem = (SMALL | LARGE)[name]
    t = tensors_of(problem, device, torch.bfloat16, factor_dtype)
    for got, wanted in zip(triton_form(problem, t), reference(problem, t), strict=True):
        assert error(got, wanted) < 8e-3


@pytest.mark.parametrize("own_shrink", [False], indirect=True)
@pytest.mark.parametrize("programs", [11, 14])
def test_small_tiles_in_the_fused_product(
    programs: int, own_shrink: bool, device: torch.device, monkeypatch
) -> None:
    """Many tiles, mixed ones and a last wave of halves among them, at affordable sizes. Products
    that make their own h are one program here, so they have no last wave."""
    if device.type == "cuda":
        pytest.skip("the large problems cover it")
    from muxtune_kernels.multi_lora import launch, tuning

    blocks = tuning.GemmBlocks(16, 8, 64, 4, 2, True, 1.0)
    monkeypatch.setattr(tuning, "_GEMM_BLOCKS", (blocks,))
    for module in (launch, tuning):
        monkeypatch.setattr(module, "num_sms", lambda: programs)
    tails = []
    half = tuning.has_half_tail
    monkeypatch.setattr(launch, "has_half_tail", lambda *a: tails.append(half(*a)) or tails[-1])
    for name in ("bias and dropout", "slots out of order"):
        problem = SMALL[name]._replace(rate=0.0)
        t = tensors_of(problem, device, torch.float32, torch.float32)
        for got, wanted in zip(triton_form(problem, t), reference(problem, t), strict=True):
            assert error(got, wanted) < 2e-6
    assert any(tails)


@pytest.mark.parametrize("own_shrink", [True, False], indirect=True)
@pytest.mark.parametrize("where", ["rows", "a", "b", "scale"])
def test_nan_stays_in_its_slot(where: str, own_shrink: bool, device: torch.device) -> None:
    problem = Problem((4, 3, 8), ((0, 0, 21), (1, 21, 40), (2, 40, 60)), 64, 72, (128,), True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def run(poisoned: bool):
        t = tensors_of(problem, device, dtype, dtype)
        if poisoned:
            target = {"rows": t.x[21:40], "a": t.a[4:7], "b": t.b[:, 4:7], "scale": t.scale[1:2]}
            target[where][..., -1:] = float("nan")
            if where == "rows":
                t.dy[30] = float("nan")
        y, dx, da, db = triton_form(problem, t)
        own = torch.ones(64, dtype=torch.bool)
        own[21:40] = False
        return [y[own], dx[own], da[[0, 1, 2, 3, *range(7, 15)]], db[:, [0, 1, 2, 3, 7, 14]]], y

    (clean, _), (dirty, y) = run(False), run(True)
    assert all(torch.equal(p, q) for p, q in zip(clean, dirty, strict=True))
    assert not y[21:40].isfinite().all(1).any() if where != "b" else not y[21:40].isfinite().all()


@pytest.mark.parametrize("rate", [0.2, 0.0])
@pytest.mark.parametrize("own_shrink", [True], indirect=True)
def test_a_slot_does_not_notice_its_place_or_its_neighbours(
    rate: float, own_shrink: bool, device: torch.device
) -> None:
    """Deterministic mode: one contiguous span, the same micro-batch shape, another place. Dropout
    takes the forms in which the product does not make its own h."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    ranks, own = (4, 6, 3), 37
    base = Problem(ranks, ((1, 0, own),), 96, 72, (64,), True, rate)
    t = tensors_of(base, device, dtype, dtype)
    keys = row_keys(9, 9, 9, torch.arange(96)).to(device)

    def run(start: int, others: tuple[tuple[int, int, int], ...]):
        from muxtune_kernels.multi_lora.autograd import multi_lora_linear_cuda
        from muxtune_kernels.multi_lora.launch import Adapters

        rows = slot_rows(((1, start, start + own), *others), 96, 3, device)
        order = torch.roll(torch.arange(96), start).to(device)
        leaves = [v.detach().requires_grad_() for v in (t.x[order], t.a, t.b)]
        rates = torch.tensor([0.5, rate, 0.0], device=device)
        dropout = RowDropout(keys[order], rates) if rate else None
        adapters = Adapters(ranks, (64,), 5, True)
        y = multi_lora_linear_cuda(
            leaves[0], t.weight, t.bias, leaves[1], leaves[2], t.scale, rows, dropout, adapters
        )
        dx, da, db = torch.autograd.grad(y, leaves, t.dy[order])
        place = slice(start, start + own)
        return y[place], dx[place], da[4:10], db[:, 4:10]

    alone, together = run(0, ()), run(41, ((0, 2, 30), (2, 30, 41)))
    assert all(torch.equal(p, q) for p, q in zip(alone, together, strict=True))


def test_bounds_are_computed_where_none_are_given(device: torch.device) -> None:
    problem = SMALL["slots out of order"]
    t = tensors_of(problem, device, torch.float32, torch.float32)
    rows = slot_rows(problem.spans, problem.num_rows, 3, device)
    assert spans_of(rows.slot_of_row_T) == tuple(sorted(problem.spans, key=lambda s: s[1]))
    given, computed = triton_form(problem, t), triton_form(problem, t, rows._replace(
        slot_bounds_S3=None, spans=()))  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(given, computed, strict=True))


def test_one_graph_serves_every_layout_of_the_rows(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("CUDA graphs need CUDA")
    problem = LARGE["8 tasks"]
    t = tensors_of(problem, device, torch.bfloat16, torch.float32)
    rows = slot_rows(problem.spans, problem.num_rows, 8, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        triton_form(problem, t, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_form(problem, t, rows)
    other = problem._replace(spans=((5, 0, 100), (2, 111, 1500), (0, 1500, 2047)))
    fresh = slot_rows(other.spans, problem.num_rows, 8, device)
    rows.slot_of_row_T.copy_(fresh.slot_of_row_T)
    rows.slot_bounds_S3.copy_(fresh.slot_bounds_S3)
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, reference(other, t), strict=True):
        assert error(got, wanted) < 8e-3


@pytest.mark.parametrize("name", ["8 tasks", "mixed ranks", "ragged, dropout"])
def test_repeated_launches_give_the_same_bits(name: str, device: torch.device) -> None:
    """The first call compiles, the second is recorded, the others are repeated from the record."""
    if device.type == "cpu":
        pytest.skip("nothing is recorded under the interpreter")
    problem = LARGE[name]
    t = tensors_of(problem, device, torch.bfloat16, torch.float32)
    wanted = triton_form(problem, t)
    for _ in range(3):
        moved = t._replace(x=t.x.clone(), a=t.a.clone(), dy=t.dy.clone())
        found = triton_form(problem, moved)
        assert all(torch.equal(p, q) for p, q in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["split rows", "slots out of order"])
def test_gradients_are_added_to_what_a_slot_keeps(name: str, device: torch.device) -> None:
    from muxtune_kernels.multi_lora import launch
    from muxtune_kernels.multi_lora.tuning import tuning_of

    problem = SMALL[name]
    t = tensors_of(problem, device, torch.float32, torch.float32)
    slots = slot_rows(problem.spans, problem.num_rows, len(problem.ranks), device)
    rows = launch.RowTensors(slots.slot_of_row_T, slots.slot_bounds_S3, t.scale, None)
    adapters = launch.Adapters(problem.ranks, problem.out, 5)
    tuning = tuning_of(problem.num_rows, problem.width, problem.out, len(problem.ranks), 16, 4,
                       False)._replace(da_splits=2, db_splits=2)  # fmt: skip
    _, h_TJ = launch.lora_forward(t.x, t.weight, None, t.a, t.b, rows, adapters, tuning)
    keep_S = torch.zeros(len(problem.ranks), dtype=torch.int32, device=device)
    keep_S[0] = 1
    targets = launch.GradTargets(torch.ones_like(t.a), torch.ones_like(t.b.t()).contiguous(),
                                 keep_S)  # fmt: skip
    _, dh_TJ = launch.lora_input_grad(t.dy, tuple(t.x.shape), h_TJ, t.weight, t.a, t.b, rows,
                                      adapters, tuning, targets, True)  # fmt: skip
    layout = launch.layout_of(adapters, t.x.device)
    launch.outer(dh_TJ, t.x, t.a, rows, adapters, layout, tuning, targets)
    _, _, da, db = reference(problem, t)
    kept = problem.ranks[0]
    da[:kept] += 1
    db[:, :kept] += 1
    assert error(targets.da_RD, da) < 2e-6 and error(targets.db_RO.t(), db) < 2e-6
