"""Kernels compiled without the GPU that they are for: what they are, and that nothing stays."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muxtune.cost.shapes import ModelShape
from muxtune.profiling.step_cases import plan_of, task_name
from muxtune.types import AdapterSlot, AdapterSpec, DataSpec, HTask, Plan, ShapeKey, TaskSpec
from muxtune.workload.random_texts import RandomTexts

without_gpu = pytest.importorskip("muxtune_kernels.without_gpu", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

H100 = without_gpu.TARGETS["h100"]
ALL = ("all-linear",)
METHODS = {
    "lora": ALL, "dora": ("q_proj",), "ia3": ("k_proj",), "bottleneck": ("o_proj",),
    "prefix": ("self_attn",), "prompt": ("embed_tokens",),
}  # fmt: skip
# Of a step of LoRA alone, of the sites with other methods and of attention with prefixes.
PLAIN = {
    "_add_rms_norm_kernel", "_rms_norm_backward_kernel", "_swiglu_kernel",
    "_swiglu_backward_kernel", "_row_loss_kernel", "_slot_sum_kernel", "linear_kernel",
    "dh_db_kernel", "sum_parts_kernel", "outer_kernel", "_square_sums_kernel", "_slot_kernel",
    "_update_kernel",
}  # fmt: skip
PACKED = {"_forward_kernel", "_backward_long_kernel", "_backward_short_kernel"}
ROTATED = {"_rotate_kernel", "_rotate_backward_kernel"}
OTHERS = {"_backward_kernel", "expand_kernel", "shrink_kernel", "biases_kernel"}


def tiny() -> ModelShape:
    return ModelShape("tiny", 2, 256, 4, 2, 64, 512, 512)


def plan_for(methods: Mapping[str, tuple[str, ...]]) -> tuple[Plan, dict[str, TaskSpec]]:
    slots = tuple(AdapterSlot(method, 16, targets) for method, targets in methods.items())
    tasks = {
        task_name(i): TaskSpec(
            task_name(i), "tiny", adapter=AdapterSpec(slot.method, 16, 16.0, 0.0, slot.targets),
            data=DataSpec(histogram="sst2", max_length_tokens=64), batch_size=4, num_steps=9,
        )
        for i, slot in enumerate(slots)
    }  # fmt: skip
    slot_of = {task_id: slot for slot, task_id in enumerate(tasks)}
    shape = ShapeKey(64, 2 * len(slots), slots)
    return plan_of([HTask((shape,), slot_of, dict.fromkeys(slot_of, 2))]), tasks


def compiled(methods: Mapping[str, tuple[str, ...]], deterministic: bool = True) -> Any:
    from muxtune.profiling.ahead import compile_plan

    plan, tasks = plan_for(methods)
    texts = RandomTexts(tiny().vocab)
    for task in tasks.values():
        texts.add(task)
    return compile_plan(tiny(), plan, tasks, texts, H100, deterministic)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything but the compiler runs; what it was asked for."""
    from triton.runtime import JITFunction

    asked: list[Any] = []

    def compile_none(self: Any, key: Any, *_: Any) -> Any:
        asked.append(key)
        kernel = SimpleNamespace(name=self.__name__, hash=f"{len(asked):02x}")
        next(iter(self.device_caches.values()))[0][key] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compile_none)
    return asked


def norm(rows: int) -> None:
    from muxtune_kernels.block import add_rms_norm

    x_TD = torch.zeros((rows, 64), dtype=torch.bfloat16)
    add_rms_norm(x_TD, None, torch.ones(64, dtype=torch.bfloat16), 1e-6)


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        with without_gpu.compiling_for(H100) as done:
            norm(32)
        found.append(done.folders)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
        found.append(files)
    assert found[:2] == found[2:]
    (folder,) = found[0]["_add_rms_norm_kernel"]
    assert (tmp_path / folder / "_add_rms_norm_kernel.cubin").stat().st_size > 0


def test_what_is_asked_for_is_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by another process: what is wanted is plain text."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with without_gpu.asking_for(H100) as wanted:
        for rows in (32, 48, 32):  # one kernel: their number is not compiled in
            norm(rows)
    assert not list(tmp_path.glob("*/*.cubin"))
    (kernel,) = wanted
    folder = without_gpu.compile_wanted(type(kernel)(*map(str, kernel)), H100)
    assert (tmp_path / folder / "_add_rms_norm_kernel.cubin").stat().st_size > 0
    if hasattr(without_gpu.nvidia_driver, "make_launcher") and shutil.which("gcc"):
        (launcher,) = tmp_path.glob("*/__triton_launcher*.so")
        assert b"libcuda.so.1" in launcher.read_bytes()  # loaded with it
    with without_gpu.compiling_for(H100) as done:
        norm(32)
    assert done.folders == {"_add_rms_norm_kernel": {folder}}


@pytest.mark.parametrize("recompute", [0, 1, 4])
@pytest.mark.parametrize(
    ("methods", "windows"),
    [({"lora": ALL}, False), (METHODS, False), ({"lora": ALL}, True)],
    ids=["lora", "mixed", "windows"],
)
def test_a_few_blocks_ask_for_what_all_do(
    methods: Mapping[str, tuple[str, ...]], windows: bool, recompute: int
) -> None:
    """By which a size is tried out before it is captured: nothing may be compiled in a capture."""
    from muxtune.profiling.ahead import _steps, blank_static_model
    from muxtune.runtime.captured_runner import capacity_of

    plan, tasks = plan_for(methods)
    asked = []
    for form in ("compute", "compute_few"):
        with without_gpu.asking_for(H100) as wanted:
            model = blank_static_model(tiny()._replace(num_layers=4))
            capacity = capacity_of(plan.htasks[0], tasks.values(), 512)
            capacity = capacity._replace(blocks=dict.fromkeys(capacity.blocks, recompute))
            steps = _steps(model, plan.htasks[0], capacity, not windows, windows)
            getattr(steps, form)(max(capacity.blocks))
        asked.append(wanted)
    assert asked[0] == asked[1] and len(asked[0]) > 10


def test_steps_ask_for_what_they_compile(request: pytest.FixtureRequest) -> None:
    from muxtune.profiling.ahead import asked_by
    from muxtune.profiling.compiling import OpJob, step_jobs

    plan, tasks = plan_for({"lora": ALL})
    steps = step_jobs(tiny(), plan, tasks)
    wanted = asked_by(steps, H100)
    assert {kernel.name for kernel in wanted} >= PLAIN | PACKED
    assert asked_by([*steps, OpJob(tiny(), "sites", (1, 64, 4096))], H100) > wanted
    request.getfixturevalue("not_compiled")
    assert len(wanted) == compiled({"lora": ALL}).count


def test_a_moved_cache_tells_its_new_place(tmp_path: Path) -> None:
    group = tmp_path / "HASH" / "__grp__k.json"
    group.parent.mkdir()
    group.write_text('{"child_paths": {"k.cubin": "/elsewhere/HASH/k.cubin"}}')
    without_gpu.move_cache(tmp_path, Path("/there"))
    assert group.read_text() == '{"child_paths": {"k.cubin": "/there/HASH/k.cubin"}}'


def fake_kernel(folder: Path) -> None:
    """As Triton leaves one: every language that it went through."""
    folder.mkdir(parents=True)
    names = [f"k.{kind}" for kind in ("source", "ttir", "ttgir", "llir", "ptx", "cubin", "json")]
    for name in names:
        (folder / name).write_text(f"{name} of {folder.name}")
    group = {"child_paths": {name: f"{folder}/{name}" for name in names}}
    (folder / "__grp__k.json").write_text(json.dumps(group))


def test_a_slim_copy_has_what_launches_need_and_tells_its_new_place(tmp_path: Path) -> None:
    full, slim = tmp_path / "full", tmp_path / "slim"
    for name in ("ONE", "TWO"):
        fake_kernel(full / name)
    (full / "LAUNCHER").mkdir()
    (full / "LAUNCHER" / "__triton_launcher.cpython-312.so").write_bytes(b"\x7fELF")
    (full / "UNFINISHED" / "tmp.pid_1").mkdir(parents=True)
    (full / "UNFINISHED" / "k.ptx").write_text("")
    (full / "lock").write_text("")
    before = {path: path.read_bytes() for path in full.rglob("*") if path.is_file()}
    without_gpu.slim_cache(full, slim, Path("/there"))
    assert before == {path: path.read_bytes() for path in full.rglob("*") if path.is_file()}
    fake_kernel(full / "LATER")
    without_gpu.slim_cache(full, slim, Path("/there"))
    kernels = {"ONE", "TWO", "LATER"}
    assert {path.name for path in slim.iterdir()} == kernels | {"LAUNCHER"}
    assert [path.name for path in (slim / "LAUNCHER").iterdir()] == [
        "__triton_launcher.cpython-312.so"
    ]
    for name in kernels:
        assert {path.name for path in (slim / name).iterdir()} == {
            "k.cubin", "k.json", "__grp__k.json",
        }  # fmt: skip
        assert (slim / name / "k.cubin").read_text() == f"k.cubin of {name}"
        paths = json.loads((slim / name / "__grp__k.json").read_text())["child_paths"]
        assert paths == {part: f"/there/{name}/{part}" for part in ("k.cubin", "k.json")}


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        (("lora",), PLAIN | PACKED),
        (("lora", "dora", "ia3", "bottleneck"), PLAIN | PACKED | OTHERS),
        (tuple(METHODS), PLAIN | ROTATED | OTHERS),
    ],
)
def test_all_kernels_of_a_step(methods: tuple[str, ...], names: set[str], not_compiled) -> None:
    done = compiled({method: METHODS[method] for method in methods})
    assert set(done.folders) >= names
    assert done.count == len(not_compiled)


def test_all_kernels_of_a_profile(not_compiled) -> None:
    from muxtune.profiling.ahead import compile_ops
    from muxtune.profiling.captured_profile import op_jobs

    done = compile_ops(tiny(), op_jobs(tiny(), (64, 256), (1, 4), (16,)), H100)
    assert set(done.folders) >= PLAIN | PACKED | ROTATED | OTHERS


@pytest.mark.parametrize("layout", ["PIPELINE", "TENSOR"])
def test_all_kernels_of_stages(layout: str, not_compiled) -> None:
    """As a whole step has them; the last stage has the loss."""
    from experiments.two_gpus import cases
    from experiments.two_gpus.ahead import compile_stages
    from muxtune_kernels.multi_lora import tuning

    config = cases.Config(getattr(cases, layout), "2", 1, "interleaved")
    done = compile_stages(config, 4, H100, tiny())
    assert set(done.folders) >= PLAIN | PACKED
    assert tuning._spared == 0


def test_sizes_and_addresses_are_those_of_training(not_compiled) -> None:
    """What a size rounds up to and where a view begins decide the kernels."""
    lora = {"lora": ALL}
    exact = compiled(lora).count
    several = compiled(lora, deterministic=False)
    assert several.count != exact
    buffer = torch.zeros(64, dtype=torch.int32)
    with without_gpu.compiling_for(H100):
        inner = torch.zeros(64, dtype=torch.int32)
        assert [inner[at:].data_ptr() % 16 for at in (0, 1, 2, 4)] == [0, 4, 8, 0]
        assert inner.is_cuda
    assert not buffer.is_cuda


def test_nothing_stays(not_compiled) -> None:
    from torch._subclasses.fake_tensor import FakeTensor
    from triton.runtime import JITFunction, driver

    from muxtune_kernels import block, lasting
    from muxtune_kernels.block import kernels
    from muxtune_kernels.launching import Launcher
    from muxtune_kernels.multi_lora import tuning

    def state() -> list[Any]:
        own = vars(FakeTensor)
        return [
            JITFunction.run, Launcher.__call__, own.get("data_ptr"), own.get("is_cuda"),
            driver._active, lasting.around, tuning._told, tuning.tuning_of.cache_info().currsize,
        ]  # fmt: skip

    tuning.tuning_of.cache_clear()
    before = state()
    with pytest.raises(RuntimeError, match="inside"), without_gpu.compiling_for(H100):
        norm(32)
        assert state() != before
        raise RuntimeError("inside")
    assert state() == before
    assert not kernels._add_rms_norm_kernel.device_caches
    x_TD = torch.ones((2, 64))
    assert block.add_rms_norm(x_TD, None, torch.ones(64), 0.0)[1].sum() == 128


@pytest.mark.slow
def test_a_second_pass_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = compiled({"lora": ALL})
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    assert compiled({"lora": ALL}).folders == first.folders
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == files
