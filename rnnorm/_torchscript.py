"""The adapter to TorchScript: what `torch.jit.script` compiles in place of a layer or cell (`__prepare_scriptable__`).

A substitute is the same layer as an instance of a subclass: it shares parameters, buffers and their names, behaves the
same in eager mode (`torch.jit.script` leaves substitutes inside the eager parent), and has a `forward` that TorchScript
can compile. Differences when scripted: no `PackedSequence` (pass `lengths`, a tensor); autocast does not apply to the
layer, so half-precision input is converted to the weights' dtype.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rnnorm import _check, _masks, ops
from rnnorm._cells import CELLS


class _Options(NamedTuple):
    cell: str
    norm: str
    guard: str
    constants: list[float]
    cell_norm: bool
    wanted: str
    rounds: int
    rank: int
    cap: bool


def _suited(name: str, value: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32 and (value.dtype == torch.bfloat16 or value.dtype == torch.float16):
        value = value.to(weight.dtype)
    if value.dtype != weight.dtype:
        raise ValueError(f"{name} must have the weights' dtype {weight.dtype}; got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on the weights' device {weight.device}; got {value.device}")
    return value


def _suited_states(names: list[str], given: list[Tensor], shapes: list[list[int]], weight: Tensor) -> list[Tensor]:
    """The initial states, zeros if none is given."""
    if len(given) == 0:
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes]
    states: list[Tensor] = []
    for k, value in enumerate(given):
        if value.size() != shapes[k]:
            raise ValueError(f"the state {names[k]} must have shape {shapes[k]}; got {value.size()}")
        states.append(_suited("the state", value, weight))
    return states


def _suited_lengths(lengths: Tensor, T: int, N: int) -> Tensor:
    if lengths.is_floating_point() or lengths.dim() != 1 or lengths.size(0) != N:
        raise ValueError(f"lengths must hold one integer for each of the N = {N} sequences; got {lengths}")
    if N > 0 and (int(lengths.min()) < 1 or int(lengths.max()) > T):
        raise ValueError(f"lengths must lie in 1..T = 1..{T}; got {lengths}")
    return lengths.to(torch.device("cpu"), torch.int64, copy=True)  # the caller may write into it before the backward


def _suited_reset(reset: Tensor, shape: list[int]) -> Tensor:
    if reset.dtype != torch.bool or reset.size() != shape:
        raise ValueError(f"reset must be bool of shape {shape}; got {reset.dtype} of shape {reset.size()}")
    return reset.clone()


class _Scriptable(nn.Module):
    """What the substitutes share. TorchScript reads the annotations of one class only, so all are here."""

    original: Any  # the layer's or cell's own class
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    proj_size: int
    options: _Options
    rates: _masks.Rates
    draws_masks: bool
    state_names: list[str]
    suffixes: list[str]
    weights: list[dict[str, Tensor]]  # for each suffix, the parameters by operand name

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _substituted, (self.original, _form(self)), self.__dict__

    def _sequence(
        self,
        row: int,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, o, suffix, rates, training = (
            self.weights[row],
            self.options,
            self.suffixes[row],
            self.rates,
            self.training and self.draws_masks,
        )
        T, weight_hh = x.size(0), w["weight_hh"]
        if rates.weight > 0.0 and training:
            weight_hh = _masks.dropped(weight_hh, rates.weight, training)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        recurrent_mask = _masks.recurrent(rates.recurrent, training, h, wide)
        zoneout_h = _masks.zoneout(rates.zoneout_h, training, T, h, wide)
        zoneout_c: Tensor | None = None
        if c is not None:
            zoneout_c = _masks.zoneout(rates.zoneout_c, training, T, c, wide)
        buffers: dict[str, Tensor] = {}
        for name, buffer in self.named_buffers():
            buffers[name] = buffer
        if self.training and o.norm == "online":
            _check.statistics_are_wide(buffers["norm_var" + suffix])
        y, last_h, last_c, mean, var, cell_mean, cell_var = torch.ops.rnnorm.sequence(
            *(x, h, c, w["weight_ih"], weight_hh, w.get("bias_ih"), w.get("bias_hh"), w.get("weight_hr")),
            *(w.get("norm_scale"), w.get("norm_shift"), w.get("cell_norm_scale"), w.get("cell_norm_shift")),
            *(w.get("weight_mogrify"), lengths, reset, recurrent_mask, zoneout_h, zoneout_c),
            *(buffers.get("norm_mean" + suffix), buffers.get("norm_var" + suffix)),
            *(buffers.get("norm_u" + suffix), buffers.get("norm_v" + suffix)),
            *(buffers.get("cell_norm_mean" + suffix), buffers.get("cell_norm_var" + suffix)),
            *(buffers.get("cell_norm_u" + suffix), buffers.get("cell_norm_v" + suffix)),
            *(o.cell, o.norm, o.guard, o.constants, o.cell_norm),
            *(self.training, reverse, o.wanted, o.rounds, o.rank, o.cap),
        )
        if self.training and o.norm == "online":
            buffers["norm_mean" + suffix].copy_(mean.detach())
            buffers["norm_var" + suffix].copy_(var.detach())
            if o.cell_norm:
                buffers["cell_norm_mean" + suffix].copy_(cell_mean.detach())
                buffers["cell_norm_var" + suffix].copy_(cell_var.detach())
        return y, last_h, last_c


class _ScriptableLayer(_Scriptable):
    def _layers(
        self, input: Tensor, hx: list[Tensor], lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"input must have 3 dimensions, or 2 for one sequence; got shape {input.size()}")
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input
        if self.batch_first and not single:
            x = x.transpose(0, 1)
        T, N, width = x.size()
        if width != self.input_size or T == 0:
            raise ValueError(f"input must have T > 0 steps of input_size = {self.input_size}; got shape {input.size()}")
        weight = self.weights[0]["weight_ih"]
        x = _suited("input", x, weight)
        rows, units = len(self.suffixes), self.hidden_size
        shapes = [[rows, N, self.proj_size if self.proj_size > 0 else units], [rows, N, units]]
        given = [state.unsqueeze(1) for state in hx] if single else hx
        states = _suited_states(self.state_names, given, shapes[: len(self.state_names)], weight)
        if lengths is not None:
            lengths = _suited_lengths(lengths, T, N)
        reversed_reset: Tensor | None = None
        if reset is not None:
            reset = reset.unsqueeze(1) if single else reset.t() if self.batch_first else reset
            reset = _suited_reset(reset, [T, N])
            reversed_reset = _masks.reversed_reset(reset, lengths)
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(directions):
                row = layer * directions + direction
                c = states[1][row] if len(states) == 2 else None
                begins = reversed_reset if direction == 1 else reset
                y, last_h, last_c = self._sequence(row, x, states[0][row], c, lengths, begins, direction == 1)
                outputs.append(y)
                hs.append(last_h)
                cs.append(last_c)
            x = torch.cat(outputs, 2)
            if layer + 1 < self.num_layers and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
        last = [torch.stack(hs)]
        if len(states) == 2:
            last.append(torch.stack(cs))
        if single:
            return x.squeeze_(1), [state.squeeze_(1) for state in last]
        return (x.transpose_(0, 1) if self.batch_first else x), last


class _ScriptableCell(_Scriptable):
    def _step(self, input: Tensor, hx: list[Tensor], reset: Tensor | None) -> list[Tensor]:
        if input.dim() != 1 and input.dim() != 2:
            raise ValueError(f"input must have shape (N, I) or (I,); got {input.size()}")
        single = input.dim() == 1
        x = input.unsqueeze(0) if single else input
        if x.size(1) != self.input_size:
            raise ValueError(f"input's last dimension must be input_size = {self.input_size}; got {x.size(1)}")
        weight = self.weights[0]["weight_ih"]
        x = _suited("input", x, weight)
        shape = [x.size(0), self.hidden_size]
        given = [state.unsqueeze(0) for state in hx] if single else hx
        states = _suited_states(self.state_names, given, [shape] * len(self.state_names), weight)
        c = states[1] if len(states) == 2 else None
        if reset is not None:
            reset = _suited_reset(reset.reshape(1, -1), [1, x.size(0)])
        _, last_h, last_c = self._sequence(0, x.unsqueeze(0), states[0], c, None, reset, False)
        last = [last_h, last_c] if len(states) == 2 else [last_h]
        return [state.squeeze_(0) for state in last] if single else last


class _TwoStateLayer(_ScriptableLayer):
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if torch.jit.is_scripting():
            given: list[Tensor] = []
            if hx is not None:
                given = [hx[0], hx[1]]
            y, last = self._layers(input, given, lengths, reset)
            return y, (last[0], last[1])
        else:
            return self.original.forward(self, input, hx, lengths=lengths, reset=reset)


class _OneStateLayer(_ScriptableLayer):
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            given: list[Tensor] = []
            if hx is not None:
                given = [hx]
            y, last = self._layers(input, given, lengths, reset)
            return y, last[0]
        else:
            return self.original.forward(self, input, hx, lengths=lengths, reset=reset)


class _TwoStateCell(_ScriptableCell):
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            given: list[Tensor] = []
            if hx is not None:
                given = [hx[0], hx[1]]
            last = self._step(input, given, reset)
            return last[0], last[1]
        else:
            return self.original.forward(self, input, hx, reset=reset)


class _OneStateCell(_ScriptableCell):
    def forward(self, input: Tensor, hx: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():
            given: list[Tensor] = []
            if hx is not None:
                given = [hx]
            return self._step(input, given, reset)[0]
        else:
            return self.original.forward(self, input, hx, reset=reset)


_FORMS: dict[str, type[_Scriptable]] = {
    form.__name__: form for form in (_TwoStateLayer, _OneStateLayer, _TwoStateCell, _OneStateCell)
}


def _form(module: Any) -> str:
    """The name of the substitute class for a layer or cell."""
    states = "Two" if len(CELLS[module.cell].states) == 2 else "One"
    return f"_{states}State{'Cell' if module.single_step else 'Layer'}"


@functools.cache
def _substitute(original: Any, form: str) -> Any:
    return type(original.__name__, (_FORMS[form], original), {"original": original, "__module__": __name__})


def _substituted(original: Any, form: str) -> Any:
    """An empty substitute, for unpickling and copying."""
    kind = _substitute(original, form)
    return kind.__new__(kind)


def scriptable(module: Any) -> Any:
    """The substitute that TorchScript compiles for a layer or cell.

    Raises `TypeError` for a subclass that overrides `forward` and for computed weights, `BackendUnavailable` for a
    backend that is not an operator or cannot run on the weights' device and dtype.
    """
    original = module.original if isinstance(module, _Scriptable) else type(module)
    if not original.forward.__module__.startswith("rnnorm."):
        raise TypeError(
            f"forward must be rnnorm's own under torch.jit.script; got {original.__name__}, which overrides it; "
            "hold the layer as a member instead"
        )
    suffixes = [suffix for layer in module._suffixes() for suffix in layer]
    for name in (name + suffix for suffix in suffixes for name in ops.DIFFERENTIABLE[3:]):
        # Not read: computing a weight may have side effects, as with spectral norm.
        if name in module.__dict__ or is_parametrized(module, name):
            raise TypeError(
                f"{name} must be a parameter under torch.jit.script; got a computed weight; "
                "remove its parametrization or hook"
            )
    weights = [
        {name: p for name in ops.DIFFERENTIABLE if (p := module._parameters.get(name + suffix)) is not None}
        for suffix in suffixes
    ]
    first = weights[0]["weight_ih"]
    spec = module._spec()
    backend = ops.choose(spec.wanted, first.device, first.dtype, spec)
    if backend.differentiable:
        raise ops.BackendUnavailable(
            f"backend {backend.name!r} cannot run under TorchScript: it is not an operator; choose another backend"
        )
    new = _substituted(original, _form(module))
    new.__dict__ = dict(module.__dict__)
    new.state_names = list(CELLS[module.cell].states)
    new.suffixes, new.weights, new.rates = suffixes, weights, module._mask_rates()
    options = {**spec._asdict(), "constants": [*spec.constants]}
    new.options = _Options(**{name: options[name] for name in _Options._fields})
    return new
