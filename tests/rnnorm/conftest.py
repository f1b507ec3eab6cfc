"""Makes the shared cases importable (`import cases`), and sets the initial state of each test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cases

from rnnorm.ops import registry


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _runs(request: pytest.FixtureRequest) -> None:
    """Skips a test of a backend that this machine cannot run."""
    backend = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if backend in registry.names():
        cases.skip_unless_runs(backend)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
