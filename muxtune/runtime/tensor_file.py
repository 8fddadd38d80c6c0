"""A safetensors file of tensors that lie on a GPU, through a small buffer of pinned host memory.

The library's own writer wants all tensors in host memory at once. Where that is fresh, getting it
takes longer than anything else at the end of a task (1.1 of 1.7 s for 640 MB on one H100's host),
and everybody who trains beside waits. The format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_BUFFER_BYTES = 16 << 20
_ALIGNMENT = 8  # of what follows the header
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """What ``safetensors.torch.load_file`` reads: the values of each tensor, of a floating type
    and any strides. Raises OSError."""
    with path.open("wb") as file:
        file.write(_header(tensors))
        for piece in _pieces(tensors):
            file.write(piece)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(fields, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """All bytes in order; each piece is to be used before the next one is asked for."""
    used = 0
    buffer = torch.empty(0)
    for tensor in tensors.values():
        buffer = _buffer(tensor.device)
        left = tensor.detach().contiguous().view(-1).view(torch.uint8)
        while left.numel():
            count = min(left.numel(), buffer.numel() - used)
            buffer[used : used + count].copy_(left[:count], non_blocking=True)
            left, used = left[count:], used + count
            if used == buffer.numel():
                yield _arrived(buffer, used, tensor.device)
                used = 0
    if used:
        yield _arrived(buffer, used, next(iter(tensors.values())).device)


def _arrived(buffer: Tensor, count: int, device: torch.device) -> memoryview:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return buffer.numpy().data[:count]


@functools.cache
def _buffer(device: torch.device) -> Tensor:
    return torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


__all__ = ["write_tensors"]
