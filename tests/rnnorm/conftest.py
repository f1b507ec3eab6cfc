"""Makes the shared cases importable (`import cases`), and sets the initial state of each test."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cases

from rnnorm.ops import registry


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _backend(item: Any) -> str | None:
    """The backend that a test is about, if it has it as a parameter."""
    name = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    return name if name in registry.names() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests here of a backend that cannot run on this machine, one is skipped with the reason, no other kept."""
    missing = {name for name in registry.names() if cases.why_not(name) is not None}
    told: set[str] = set()
    left: list[pytest.Item] = []
    for item in items:
        name = _backend(item)
        if name in missing and Path(__file__).parent in item.path.parents:
            if name in told:
                left.append(item)
            told.add(name)
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def _runs(request: pytest.FixtureRequest) -> None:
    """Skips a test of a backend that this machine cannot run."""
    if backend := _backend(request.node):
        cases.skip_unless_runs(backend)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
