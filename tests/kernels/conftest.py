"""Devices that Triton kernels are tested on: CUDA, or Triton's interpreter on the CPU.

The interpreter must be chosen before triton is first imported, so plain pytest reaches it through
the subprocess of test_interpreter.py.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                not INTERPRETED, reason="runs in test_interpreter.py's subprocess"
            ),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run; "cpu" is the interpreter, exact in float32 only."""
    return torch.device(request.param)
