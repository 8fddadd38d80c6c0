"""What is written is what safetensors reads, in pieces as in one."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from muxtune.runtime import tensor_file
from muxtune.runtime.tensor_file import write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"wide": (3, 70), "tall.B": (41, 2), "one": (1,), "nothing": (0, 4), "scalar": ()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["turned"] = made["wide"].T
    made["rows"] = made["tall.B"][3:9]
    made["half"] = made["wide"].to(torch.bfloat16)
    made["exact"] = made["wide"].double()
    return made


@pytest.mark.parametrize("buffer_bytes", [8, 24, 640, 1 << 20])
def test_it_reads_back_whatever_the_buffer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    small = torch.empty(buffer_bytes, dtype=torch.uint8)
    monkeypatch.setattr(tensor_file, "_buffer", lambda _device: small)
    made = tensors()
    write_tensors(made, tmp_path / "own.safetensors")
    found = load_file(tmp_path / "own.safetensors")
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_it_tells_what_the_librarys_own_file_tells(tmp_path: Path) -> None:
    made = {name: tensor.contiguous() for name, tensor in tensors().items()}
    write_tensors(made, tmp_path / "own.safetensors")
    copies = {name: tensor.clone() for name, tensor in made.items()}
    save_file(copies, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    told = []
    for name in ("own", "theirs"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            told.append((file.metadata(), sorted(file.keys())))
    assert told[0] == told[1]
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("own", "theirs")]
    assert abs(sizes[0] - sizes[1]) < 16  # numbers of the header in another order


def test_an_empty_adapter_is_a_file(tmp_path: Path) -> None:
    write_tensors({}, tmp_path / "none.safetensors")
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_tensors(tensors(), tmp_path / "missing" / "own.safetensors")
