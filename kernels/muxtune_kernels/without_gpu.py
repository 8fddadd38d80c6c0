"""Kernels compiled on a machine without the GPU that they are for.

What calls them runs on tensors that have a shape, a type and an alignment but no memory (torch's
FakeTensorMode), as if they lay on the GPU; every launch ends where Triton has compiled the kernel
(`compiling_for`) or has been asked to (`asking_for`: what different programs ask for alike is then
compiled once, by any number of processes). So a kernel gets the very arguments that it gets in
training, and what Triton keeps on disk is found there by a machine with the same versions of Python
and Triton.
"""

# Triton makes its drivers and settings as it starts, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import atexit
import base64
import contextlib
import functools
import importlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import JITFunction, build, driver

from . import lasting
from .launching import Launcher
from .multi_lora import tuning

_ASKED = "asked for"  # in place of a kernel, which is not looked for a second time then
_LAUNCHED = (".cubin", ".json", ".so")
_ADDRESS = 1 << 20  # the GPU's allocator gives none that is less aligned than to 512 bytes


class Target(NamedTuple):
    """``capability``: 90 of 9.0. ``num_sms``: multiprocessors, by which tiles are chosen."""

    capability: int
    num_sms: int


TARGETS = {"h100": Target(90, 132), "h200": Target(90, 132)}


class Compiled:
    """``folders``: of the kernels that were launched, in Triton's cache, by the kernels' names."""

    def __init__(self) -> None:
        self.folders: dict[str, set[str]] = {}

    def add(self, kernel: Any) -> None:
        self.folders.setdefault(kernel.name, set()).add(_folder_of(kernel))

    @property
    def count(self) -> int:
        return sum(map(len, self.folders.values()))


class Wanted(NamedTuple):
    """A kernel with the kinds of its arguments, as Triton tells them. ``name``: within ``module``;
    ``data``: JSON."""

    module: str
    name: str
    data: str


class _Driver:
    """Of a GPU that is not there. The device is a name that no other has, for kernels that were
    compiled are kept by device."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget("cuda", target.capability, 32)
        self.device = f"without_gpu {target}"

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[Compiled]:
    """Within, tensors that are made are on that GPU in name, on no device in truth: an operator of
    torch gives shapes only, a launch compiles only. Nothing else of the process may use torch or
    Triton meanwhile. Afterwards all is as it was."""
    compiled = Compiled()
    with _without_gpu(target, compiled.add):
        yield compiled


@contextlib.contextmanager
def asking_for(target: Target) -> Iterator[set[Wanted]]:
    """The same, but a launch only adds to what is to be compiled by ``compile_wanted``."""
    wanted: set[Wanted] = set()

    def ask(*, key: str, fn: Any, compile: Any, **_: Any) -> bool:
        wanted.add(Wanted(fn.module, fn.name, compile["specialization_data"]))
        fn.jit_function.device_caches[compile["device"]][0][key] = _ASKED
        return True  # Triton need not go on

    with knobs.runtime.scope(), _without_gpu(target, lambda _kernel: None):
        knobs.runtime.jit_cache_hook = ask
        yield wanted


def compile_wanted(wanted: Wanted, target: Target) -> str:
    """Its folder in Triton's cache, which gets the C function that launches it, too."""
    found = importlib.import_module(wanted.module)
    for part in wanted.name.split("."):
        found = getattr(found, part)
    while not isinstance(found, JITFunction):
        found = found.fn
    at = _Driver(target)
    with mock.patch.object(driver, "_active", at):
        try:
            kernel = found.preload(wanted.data)
            _build_launcher(kernel)
            return _folder_of(kernel)
        finally:
            found.device_caches.pop(at.device, None)


def _build_launcher(kernel: Any) -> None:
    """Triton 3.6 has one for each signature, a second of the C compiler; where it is built anew, no
    harm is done."""
    if not hasattr(nvidia_driver, "make_launcher") or not shutil.which("gcc"):
        return
    folders = [nvidia_driver.libdevice_dir, _blank_libcuda()]
    # The blank library has nothing that is needed, and is to be loaded all the same.
    flag: Callable[[str], str] = lambda library: f"-Wl,--no-as-needed,-l:{library}"  # noqa: E731
    with (
        mock.patch.object(nvidia_driver, "library_dirs", lambda: folders),
        mock.patch.object(build, "_library_flag", flag),
        mock.patch.object(build, "_load_module_from_path", lambda *_: SimpleNamespace(launch=None)),
    ):
        nvidia_driver.CudaLauncher(kernel.src, kernel.metadata)
        source = (Path(nvidia_driver.dirname) / "driver.c").read_text()
        build.compile_module_from_src(
            source, "cuda_utils", folders, nvidia_driver.include_dirs, nvidia_driver.libraries
        )


@functools.cache
def _blank_libcuda() -> str:
    """A folder with a library of that name, to link against: it is found where it is used."""
    folder = tempfile.mkdtemp()
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
    subprocess.run([*command, "-o", f"{folder}/libcuda.so.1"], check=True)
    atexit.register(shutil.rmtree, folder, True)
    return folder


def _folder_of(kernel: Any) -> str:
    return base64.b32encode(bytes.fromhex(kernel.hash)).decode().rstrip("=")


@contextlib.contextmanager
def _without_gpu(target: Target, take: Callable[[Any], None]) -> Iterator[None]:
    """``take``: of each launch what there would be to launch."""
    at, launched = _Driver(target), set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched.add(self)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        take(kernel)
        return kernel

    patches = (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Launcher, "__call__", Launcher._plainly_only),
        mock.patch.object(FakeTensor, "data_ptr", _address),
        mock.patch.object(FakeTensor, "is_cuda", property(lambda _: True)),
        mock.patch.object(driver, "_active", at),
        # Tables outlive the context in caches.
        mock.patch.object(lasting, "around", unset_fake_temporarily),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(lambda: [kernel.device_caches.pop(at.device, None) for kernel in launched])
        stack.enter_context(tuning.counting_on(target.num_sms))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _address(tensor: torch.Tensor) -> int:
    """Of a view, as far from the allocation's as on the GPU."""
    return _ADDRESS + int(tensor.storage_offset()) * tensor.element_size()


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Within ``compiling_for``: tensors that are made have memory, for the host reads them."""
    return unset_fake_temporarily()


def move_cache(folder: Path, place: Path) -> None:
    """Triton's cache in ``folder`` is to be used as ``place``: the files of a kernel are told by
    their whole paths in it."""
    for group in folder.glob("*/__grp__*"):
        paths = json.loads(group.read_text())["child_paths"]
        moved = {name: str(place / group.parent.name / name) for name in paths}
        if moved != paths:
            group.write_text(json.dumps({"child_paths": moved}))


def slim_cache(folder: Path, slim: Path, place: Path) -> None:
    """Copies what a launch needs of Triton's cache in ``folder`` to ``slim``, to be used as
    ``place``: no sources and none of the languages between. ``folder`` stays as it is."""
    for kernel in folder.iterdir():
        files = [file for file in kernel.glob("*") if file.suffix in _LAUNCHED and file.is_file()]
        if files:
            (slim / kernel.name).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, slim / kernel.name / file.name)
    for group in slim.glob("*/__grp__*"):
        paths = json.loads(group.read_text())["child_paths"]
        kept = [name for name in paths if Path(name).suffix in _LAUNCHED]
        moved = {name: str(place / group.parent.name / name) for name in kept}
        group.write_text(json.dumps({"child_paths": moved}))


__all__ = [
    "TARGETS", "Compiled", "Target", "Wanted", "asking_for", "compile_wanted", "compiling_for",
    "move_cache", "on_host", "slim_cache",
]  # fmt: skip
