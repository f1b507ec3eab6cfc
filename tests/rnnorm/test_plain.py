"""Layers in ordinary operators: equal to the layers in evaluation mode, also when exported."""

from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import rnnorm
from rnnorm._plain import PlainStep


class _Loop(nn.Module):
    """The loop in Python, which makes the tests faster."""

    def __init__(self, step: PlainStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        after = []
        for x_part in inputs:
            state = self.step(x_part, state)
            after.append(state)
        return torch.stack(after)


def _arguments(case: cases.Case, layer: Any, T: int, N: int) -> tuple[Tensor, ...]:
    rows = layer.num_layers * (1 + layer.bidirectional)
    widths = (layer.proj_size or case.H, case.H)[: 1 + (case.layer == "LSTM")]
    states = (torch.randn(rows, N, width, dtype=torch.float64) for width in widths)
    return torch.randn(T, N, case.I, dtype=torch.float64), *states


def _expected(case: cases.Case, layer: Any, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    if case.layer == "LSTM":
        y, last = layer(x, states)
        return y, *last
    return layer(x, states[0])


@pytest.mark.parametrize(
    "case", [replace(c, training=False) for c in cases.PRODUCT if not c.lengths], ids=lambda c: c.id
)
def test_plain_layer_equals_the_layer_in_evaluation_mode(case: cases.Case) -> None:
    layer = case.build("reference")
    given = _arguments(case, layer, 4, 3)
    expected = _expected(case, layer, *given)
    plain = layer.train().to_plain(_Loop)  # whatever its mode
    torch.testing.assert_close(plain(*given), expected, rtol=1e-12, atol=1e-12)
    assert not list(plain.parameters())
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    torch.testing.assert_close(plain(*given), expected, rtol=1e-12, atol=1e-12)  # a copy


@pytest.mark.slow
def test_exported_program_has_free_sizes_and_no_operator_of_ours() -> None:
    case = replace(cases.BY_ID["lstm-proj-cell_norm-online-scale-deep"], training=False)
    layer = case.build("reference")
    given = _arguments(case, layer, 4, 3)
    N = torch.export.Dim("N", min=1)
    free = ({0: torch.export.Dim("T", min=1), 1: N}, tuple({1: N} for _ in given[1:]))
    program = torch.export.export(layer.to_plain(), given, dynamic_shapes=free)
    assert "ops.rnnorm" not in program.graph_module.print_readable(print_output=False)
    called = program.module()
    for T, N in ((1, 1), (7, 2)):
        given = _arguments(case, layer, T, N)
        torch.testing.assert_close(called(*given), _expected(case, layer, *given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["online", "layer"])
def test_plain_layer_in_half_precision(norm: str) -> None:
    layer = rnnorm.LSTM(3, 6, proj_size=4, norm=norm, dtype=torch.bfloat16).eval()
    x, states = torch.randn(5, 2, 3).bfloat16(), (torch.zeros(1, 2, 4).bfloat16(), torch.zeros(1, 2, 6).bfloat16())
    found, expected = layer.to_plain()(x, *states), layer(x, states)
    for ours, theirs in zip(found, (expected[0], *expected[1]), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
