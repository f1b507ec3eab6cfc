"""Cells: one step of one layer, with torch's call forms. A step is a sequence of length 1 on the same operators."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from rnnorm import _check, norms, ops
from rnnorm._layers import rnn_cell
from rnnorm._module import RecurrentModule


class CellModule(RecurrentModule):
    proj_size = 0

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
        self.input_size, self.hidden_size, *_ = _check.sizes(input_size, hidden_size, 1, 0.0, 0)
        self.cell = cell
        self.bias = bool(bias)
        self._set_options(norm, cell_norm, backend)
        self._register("", self.input_size, device, dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, norm={self.norm}"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: `input` [N, I] or [I], `hx` `h` or `(h, c)` [N, H] or [H], zero if None; returns the new state.

        In training mode every call is one step of the streams; backward through several calls must run in reverse order
        of the calls, as autograd does. Errors as in the layers.
        """
        if isinstance(input, Proxy):
            return self._traced(input, hx)
        _check.is_tensor("input", input)
        if input.dim() not in (1, 2):
            raise ValueError(f"input must have shape (N, I) or (I,); got {tuple(input.shape)}")
        single = input.dim() == 1
        own = self._own("")
        weight = own["weight_ih"]
        x = self._suited_input(input.unsqueeze(0) if single else input, weight)
        lead, meaning = ((), "") if single else ((x.size(0),), "N, ")
        state = [value.unsqueeze(0) if single else value for value in self._first_states(x, hx, lead, meaning, weight)]
        c = state[1] if len(state) == 2 else None
        results = ops.run(self._operands(own, x.unsqueeze(0), state[0], c, None), self._spec())
        self._move_streams(own, results)
        # In place, so that what is returned is no view: autograd refuses to detach a view in place.
        last = [s.squeeze_(0) if single else s for s in (results.h, results.c)]
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
        device: Any = None,
        dtype: Any = None,
        *,
        norm: "str | norms.Spec" = "online",
        cell_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias, norm, cell_norm, backend, device, dtype)


class GRUCell(CellModule):
    """One step of `rnnorm.GRU`, called as `torch.nn.GRUCell`: `h' = cell(x, h)`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        norm: "str | norms.Spec" = "online",
        backend: str = "auto",
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
        device: Any = None,
        dtype: Any = None,
        *,
        norm: "str | norms.Spec" = "online",
        backend: str = "auto",
    ) -> None:
        cell = rnn_cell(nonlinearity)
        super().__init__(cell, input_size, hidden_size, bias, norm, False, backend, device, dtype)
        self.nonlinearity = nonlinearity
