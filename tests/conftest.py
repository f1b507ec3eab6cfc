"""For all tests: one thread, since small tensors are slower on several and the machine may be shared; `processes`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure() -> None:
    torch.set_num_threads(1)
