"""A GPU's tensors in a safetensors file, whatever stream made them and however they lie."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muxtune.runtime import tensor_file
from muxtune.runtime.tensor_file import write_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("buffer_bytes", [4096, 16 << 20])
def test_what_a_stream_has_made_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    buffer = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True)
    monkeypatch.setattr(tensor_file, "_buffer", lambda _device: buffer)
    with torch.cuda.stream(torch.cuda.Stream()):
        left = torch.randn(2048, 2048, device="cuda")
        product = left @ left  # still runs when it is asked for
        made = {"product": product, "turned": product.T[:5], "row": left[7]}
        write_tensors(made, tmp_path / "it.safetensors")
        found = load_file(tmp_path / "it.safetensors")
        assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in made.items())
