"""For all tests: one thread, since small tensors are slower on several and the machine may be shared; `processes`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU of tests marked `gpu`, which are skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    return torch.device("cuda")
