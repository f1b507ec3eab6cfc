"""Every backend equals the reference: all outputs, gradients and states, over the whole product of `cases`."""

import functools

import cases
import pytest
import torch
from torch import Tensor


@functools.cache
def _expected(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return cases.run(cases.BY_ID[name], "reference", dtype)


@pytest.mark.parametrize("name", cases.BY_ID)
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_equals_reference(backend: str, name: str) -> None:
    cases.skip_unless_runs(backend)
    found = cases.run(cases.BY_ID[name], backend)
    cases.assert_close(found, _expected(name, torch.float64), cases.TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", [case.id for case in cases.PRODUCT if case.id.endswith("-lengths")])
@pytest.mark.parametrize("backend", cases.CANDIDATES)
def test_equals_reference_in_float32(backend: str, name: str) -> None:
    cases.skip_unless_runs(backend)
    found = cases.run(cases.BY_ID[name], backend, torch.float32)
    cases.assert_close(found, _expected(name, torch.float32), cases.TOLERANCE[torch.float32])
