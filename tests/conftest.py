"""For every test: one thread, since small tensors are slower on many, and the machine may be shared."""

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
