"""A recurrent layer in evaluation mode in ordinary torch operators, for files that run without rnnorm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnorm import _torch, ops
from rnnorm._cells import CELLS
from rnnorm._module import STATISTICS, RecurrentModule

# Turns a step into a module that maps the input parts [T, N, G*H] and an initial state [N, S] to the state after each
# step [T, N, S].
MakeLoop = Callable[["PlainStep"], nn.Module]


class _Copies(nn.Module):
    """A module with copies of some of a layer's parameters and statistics, under their names without suffix."""

    def _copy(self, layer: RecurrentModule, suffix: str, *names: str) -> None:
        for name in names:
            value = getattr(layer, name + suffix, None)
            self.register_buffer(name, None if value is None else value.detach().clone())


class PlainStep(_Copies):
    """One step of one layer and direction: the next state from the input part [N, G*H] and the state [N, S].

    The state is `h` [N, P] and, for an LSTM, `c` [N, H], concatenated.
    """

    def __init__(self, layer: RecurrentModule, suffix: str, spec: ops.CallSpec) -> None:
        super().__init__()
        self.spec, self.units, self.width = spec, layer.hidden_size, layer.proj_size or layer.hidden_size
        self.rates = layer._mask_rates()
        self._copy(layer, suffix, "weight_hh", "bias_hh", "weight_hr")
        for prefix in ("norm", "cell_norm"):
            self._copy(layer, suffix, *(f"{prefix}_{name}" for name in ("scale", "shift", *STATISTICS)))

    def forward(self, x_part: Tensor, state: Tensor) -> Tensor:
        h, c = state[:, : self.width], state[:, self.width :]
        h_part = F.linear(h, self.weight_hh, self.bias_hh)  # type: ignore[arg-type]
        normalize, cell = self._normalizer("norm"), self._normalizer("cell_norm")
        new_h, new_c = CELLS[self.spec.cell].step(
            x_part, h_part, h, c, normalize, (lambda c: cell(c, 0)) if self.spec.cell_norm else (lambda c: c)
        )
        if self.weight_hr is not None:
            new_h = F.linear(new_h.to(state.dtype), self.weight_hr)  # type: ignore[arg-type]
        # Zoneout's expectation; without zoneout no operation for it is exported.
        new_h = _stayed(self.rates.zoneout_h, h, new_h)
        new_c = None if new_c is None else _stayed(self.rates.zoneout_c, c, new_c)
        # Normalized values have the dtype of the statistics, at least float32; the state has the weights' dtype.
        return (new_h if new_c is None else torch.cat((new_h, new_c), 1)).to(state.dtype)

    def _normalizer(self, prefix: str) -> Callable[[Tensor, int], Tensor]:
        scale, shift, mean, *others = (getattr(self, f"{prefix}_{name}") for name in ("scale", "shift", *STATISTICS))
        var, u, v = others
        return ops.normalizer(self.spec, self.units, scale, shift, None if mean is None else (mean, var, u, v))


def _stayed(rate: float, old: Tensor, new: Tensor) -> Tensor:
    return new if rate == 0 else rate * old + (1 - rate) * new


class Scan(nn.Module):
    """The loop that `torch.export` and `torch.onnx` keep as one operator, for any number of steps."""

    def __init__(self, step: PlainStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        def combine(before: Tensor, x_part: Tensor) -> tuple[Tensor, Tensor]:
            after = self.step(x_part, before)
            return after, after.clone()

        return _torch.scan()(combine, state, inputs)[1]


class _Direction(_Copies):
    def __init__(self, layer: RecurrentModule, suffix: str, reverse: bool, make_loop: MakeLoop) -> None:
        super().__init__()
        self.reverse, self.width = reverse, layer.proj_size or layer.hidden_size
        self._copy(layer, suffix, "weight_ih", "bias_ih")
        self.loop = make_loop(PlainStep(layer, suffix, layer._spec(reverse)))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output [T, N, P] and the last state [N, S]."""
        inputs = F.linear(x, self.weight_ih, self.bias_ih)  # type: ignore[arg-type]
        after = self.loop(inputs.flip(0) if self.reverse else inputs, state)
        y = after[:, :, : self.width]
        return y.flip(0) if self.reverse else y, after[-1]


class Plain(nn.Module):
    """The module that a layer's `to_plain` returns."""

    def __init__(self, layer: RecurrentModule, make_loop: MakeLoop) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                _Direction(layer, suffix, direction == 1, make_loop) for direction, suffix in enumerate(suffixes)
            )
            for suffixes in layer._suffixes()
        )

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Run T steps of N sequences: `x` [T, N, I] and the states [L*D, N, *]; returns the output and last states."""
        firsts = torch.cat(states, 2).unbind(0)
        lasts: list[Tensor] = []
        for layer in self.layers:
            outputs = []
            for direction in layer:  # type: ignore[attr-defined]
                y, last = direction(x, firsts[len(lasts)])
                outputs.append(y)
                lasts.append(last)
            x = torch.cat(outputs, 2)
        return x, *torch.stack(lasts).split([state.size(2) for state in states], 2)
