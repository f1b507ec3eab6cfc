"""For all tests: one thread, since small tensors are slower on several and the machine may be shared; `processes`."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


@pytest.fixture
def waiting_for_nothing() -> Callable[[], AbstractContextManager[None]]:
    """`with waiting_for_nothing():` a call that waits for the GPU raises, as far as torch can tell."""

    def switch(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode(mode)

    @contextmanager
    def watched() -> Iterator[None]:
        switch("error")
        try:
            yield
        finally:
            switch("default")

    return watched
