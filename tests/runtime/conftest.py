"""Models for the runtime's tests."""

from __future__ import annotations

import pytest
import torch

from muxtune.runtime.backbone import BackboneStore
from tests.runtime.runtime_helpers import make_store

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store() -> BackboneStore:
    """The tiny model, shared: a backbone keeps nothing of the tasks that it served."""
    return make_store()
