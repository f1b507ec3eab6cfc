"""Cells: one step of one layer, called as torch's. A step is a sequence of length 1 on the same operators."""

from typing import Any, Unpack

from torch import Tensor
from torch.fx import Proxy

from rnnorm import _check, ops
from rnnorm._cells import rnn
from rnnorm._module import Options, RecurrentModule


class CellModule(RecurrentModule):
    proj_size = 0
    single_step = True

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any,
        dtype: Any,
        options: Options,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, *_ = _check.sizes(input_size, hidden_size, 1, 0.0, 0)
        self.cell = cell
        self.bias = bool(bias)
        self._set_options(options)
        self._register("", self.input_size, device, dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *self._options_repr()])

    def forward(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None) -> Any:
        """Run one step and return the new state `h` or `(h, c)`.

        `input` is [N, I] or [I]; `hx` is `h` or `(h, c)`, [N, H] or [H] each, zeros if None; `reset` [N] bool ([] for
        one sequence) is true where a new sequence begins: its state before the step is zero. Dtypes and errors as in
        the layers; under autocast the states of LSTM and GRU keep the weights' dtype, as torch's cells do. Masks of
        dropout inside the recurrence are drawn at each call. In training mode every call updates the running
        statistics by one step; backward passes through several calls must run in reverse order of the calls, as
        autograd runs them.
        """
        if isinstance(input, Proxy):
            return self._traced(input, hx, **({} if reset is None else {"reset": reset}))
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
        begins = None if reset is None else _check.reset_tensor(reset, lead, f"({meaning})", x.device).reshape(1, -1)
        results = ops.run(self._operands(own, x.unsqueeze(0), state[0], c, None, begins), self._spec())
        for held, new in self._new_statistics(own, results):
            held.copy_(new)
        # In place, so that results are not views, which autograd refuses to detach in place.
        last = [s.squeeze_(0) if single else s for s in (results.h, results.c)]
        return (last[0], last[1]) if c is not None else last[0]


class LSTMCell(CellModule):
    """One step of `rnnorm.LSTM`, called as `torch.nn.LSTMCell`: `(h', c') = cell(x, (h, c))`. Options as in `LSTM`."""

    wide_states = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias, device, dtype, options)


class GRUCell(CellModule):
    """One step of `rnnorm.GRU`, called as `torch.nn.GRUCell`: `h' = cell(x, h)`. Options as in `GRU`."""

    wide_states = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__("gru", input_size, hidden_size, bias, device, dtype, options)


class RNNCell(CellModule):
    """One step of `rnnorm.RNN`, called as `torch.nn.RNNCell`: `h' = cell(x, h)`. Options as in `RNN`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Options],
    ) -> None:
        cell = rnn(nonlinearity)
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, options)
        self.nonlinearity = nonlinearity
