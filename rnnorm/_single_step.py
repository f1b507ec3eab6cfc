"""Cells: one step of one layer, with torch's call forms. A step is a sequence of length 1 on the same operators."""

from typing import Any

import torch
from torch import Tensor

from rnnorm import _check, norms, ops
from rnnorm._cells import CELLS
from rnnorm._layers import rnn_cell
from rnnorm._module import RecurrentModule, autocast_dtype


class CellModule(RecurrentModule):
    proj_size = 0
    weight_ih: Tensor

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        norm: "str | norms.Spec",
        cell_norm: bool,
        backend: str,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        _check.sizes(input_size, hidden_size, 1, 0.0, 0)
        self.cell = cell
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self._set_options(norm, cell_norm, backend)
        self._register("", input_size, device, dtype)
        self.reset_parameters()

    def _suffixes(self) -> list[list[str]]:
        return [[""]]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, norm={self.norm}"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: `input` [N, I] or [I], `hx` `h` or `(h, c)` [N, H] or [H], zero if None; returns the new state.

        In training mode every call is one step of the streams; backward through several calls must run in reverse order
        of the calls, as autograd does. Errors as in the layers.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"input must have shape (N, I) or (I,); got {tuple(input.shape)}")
        single = input.dim() == 1
        x = input.unsqueeze(0) if single else input
        weight = self.weight_ih
        if x.size(1) != self.input_size:
            raise ValueError(f"input's last dimension must be input_size = {self.input_size}; got {x.size(1)}")
        wanted = autocast_dtype(x)
        if wanted is None:
            _check.like_weights("input", x, weight)
        x = x if wanted is None else x.to(wanted)
        names = CELLS[self.cell].states
        if hx is None:
            state = [x.new_zeros(x.size(0), self.hidden_size) for _ in names]
        else:
            given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
            if len(given) != len(names):
                raise ValueError(f"hx must hold {' and '.join(names)}; got {len(given)} tensor(s)")
            state = []
            for name, value in zip(names, given, strict=True):
                expected = (self.hidden_size,) if single else (x.size(0), self.hidden_size)
                _check.shape(name, value, expected, "(H,)" if single else "(N, H)")
                if wanted is None:
                    _check.like_weights(name, value, weight)
                value = value if wanted is None else value.to(wanted)
                state.append(value.unsqueeze(0) if single else value)
        c = state[1] if len(state) == 2 else None
        results = ops.run(self._operands("", x.unsqueeze(0), state[0], c, None), self._spec())
        self._move_streams("", results)
        last = [s.squeeze(0) if single else s for s in (results.h, results.c)]
        return (last[0], last[1]) if c is not None else last[0]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        from rnnorm._torchscript import scriptable

        return scriptable(self)


class LSTMCell(CellModule):
    """One step of `rnnorm.LSTM`, called as `torch.nn.LSTMCell`: `(h', c') = cell(x, (h, c))`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        norm: "str | norms.Spec" = "online",
        cell_norm: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias, norm, cell_norm, backend, device, dtype)


class GRUCell(CellModule):
    """One step of `rnnorm.GRU`, called as `torch.nn.GRUCell`: `h' = cell(x, h)`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        norm: "str | norms.Spec" = "online",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__("gru", input_size, hidden_size, bias, norm, False, backend, device, dtype)


class RNNCell(CellModule):
    """One step of `rnnorm.RNN`, called as `torch.nn.RNNCell`: `h' = cell(x, h)`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        norm: "str | norms.Spec" = "online",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        cell = rnn_cell(nonlinearity)
        super().__init__(cell, input_size, hidden_size, bias, norm, False, backend, device, dtype)
        self.nonlinearity = nonlinearity
