"""Recurrent layers: parameters, options, stacking, directions and packing. Gate math and dispatch are elsewhere."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from rnnorm import _check, _masks, _plain, ops
from rnnorm._cells import rnn
from rnnorm._module import Options, Own, RecurrentModule, State, in_evaluation

# The text of torch's warning, which programs may filter by.
_NOTHING_DROPPED = (
    "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers greater "
    "than 1, but got dropout={} and num_layers={}"
)


class Recurrent(RecurrentModule):
    """Stacked recurrent layers, in one or both directions; subclasses choose the cell."""

    # TorchScript would compile them.
    __jit_unused_properties__: ClassVar[list[str]] = ["_all_weights", "all_weights", "mode"]
    _torch_layer: ClassVar[type[nn.RNNBase]]
    _torch_options: ClassVar[tuple[str, ...]] = (
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
    )

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Any,
        dtype: Any,
        options: Options,
    ) -> None:
        super().__init__()
        sizes = _check.sizes(input_size, hidden_size, num_layers, dropout, proj_size)
        self.input_size, self.hidden_size, self.num_layers, self.dropout, self.proj_size = sizes
        self.cell = cell
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.bidirectional = bool(bidirectional)
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(_NOTHING_DROPPED.format(dropout, num_layers), stacklevel=3)
        self._set_options(options)
        out = self.proj_size or self.hidden_size
        for layer, suffixes in enumerate(self._suffixes()):
            for suffix in suffixes:
                self._register(suffix, self.input_size if layer == 0 else out * len(suffixes), device, dtype)
        self.reset_parameters()

    def _suffixes(self) -> list[list[str]]:
        directions = ("", "_reverse")[: 1 + self.bidirectional]
        return [[f"_l{layer}{direction}" for direction in directions] for layer in range(self.num_layers)]

    @property
    def mode(self) -> str:
        """The name that torch's layer gives its kind: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"."""
        return self.cell.upper()

    @property
    def _all_weights(self) -> list[list[str]]:
        """For each layer and direction, the names of the parameters that torch's layer has too, in torch's order."""
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        names += ["weight_hr"] if self.proj_size else []
        return [[name + suffix for name in names] for suffixes in self._suffixes() for suffix in suffixes]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """For each layer and direction, the weights and biases that torch's layer has too, in torch's order."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self) -> None:
        """Does nothing; for compatibility with code written for torch's layers."""

    def extra_repr(self) -> str:
        options = [f"{self.input_size}, {self.hidden_size}"]
        defaults: dict[str, object] = {
            "num_layers": 1,
            "nonlinearity": "tanh",
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "proj_size": 0,
        }
        found = {name: getattr(self, name, default) for name, default in defaults.items()}
        options += [f"{name}={value!r}" for name, value in found.items() if value != defaults[name]]
        return ", ".join([*options, *self._options_repr()])

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: "Tensor | Sequence[int] | None" = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Run the layers over a sequence; call forms, shapes and returned states are those of torch's layers.

        Arguments, for T steps, N sequences, I inputs, H units, L layers and D directions:
            input: [T, N, I], [N, T, I] with `batch_first`, [T, I] for one sequence, or a `PackedSequence`.
            hx: initial state `h` or `(h, c)`, [L*D, N, H] each ([L*D, H] for one sequence); zeros if None. With
                `proj_size` P, `h` and the output have P units.
            lengths: [N] integers in 1..T, in any order, the lengths of padded sequences; all T if None. Outputs at
                padded positions are zero, the last state is that of each sequence's last step, and running statistics
                skip padding. Not with a `PackedSequence`.
            reset: [T, N] bool ([N, T] with `batch_first`, [T] for one sequence; with a `PackedSequence` in the
                caller's order of the sequences), true at the steps where a new sequence begins: the state before such a
                step is zero, and a reverse direction is reset at the same boundary. Running statistics are not reset.

        Returns the output [T, N, D*H] and the last state, in new memory.
        Products run in the input's dtype, or in autocast's; statistics, carried values and nonlinearities in float32
        (float64 for float64).
        Raises `TypeError` for an input that is no tensor, `ValueError` for a wrong shape, dtype, device or length,
        `BackendUnavailable` if the backend was chosen by name and cannot run the call, and `RuntimeError` in a second
        backward pass through online normalization in training mode.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset)
        if isinstance(input, Proxy):
            given = {"lengths": lengths, "reset": reset}
            return self._traced(input, hx, **{name: value for name, value in given.items() if value is not None})
        _check.is_tensor("input", input, "a tensor or a PackedSequence")
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 3 dimensions, or 2 for one sequence; got shape {tuple(input.shape)}")
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        if single and isinstance(lengths, int | Tensor) and torch.as_tensor(lengths, device="cpu").dim() == 0:
            lengths = torch.as_tensor(lengths, device="cpu").reshape(1)
        own = self._own_by_row()
        x, state = self._prepared(x, hx, single, own)
        found = None if lengths is None else _check.lengths_tensor(lengths, x.size(0), x.size(1))
        if reset is not None:
            shape, meaning = (
                ((x.size(0),), "(T,)") if single else (input.shape[:2], "(N, T)" if self.batch_first else "(T, N)")
            )
            reset = _check.reset_tensor(reset, shape, meaning, x.device)
            reset = reset.unsqueeze(1) if single else reset.t() if self.batch_first else reset
        y, last = self._run(x, state, found, own, reset, packed=False)
        # In place, so that results are not views, which autograd refuses to detach in place.
        if single:
            y.squeeze_(1)
            last = [value.squeeze_(1) for value in last]
        elif self.batch_first:
            y.transpose_(0, 1)
        return y, self._returned(last)

    def _forward_packed(
        self, packed: PackedSequence, hx: State | None, lengths: Any, reset: Tensor | None
    ) -> tuple[PackedSequence, State]:
        if lengths is not None:
            raise ValueError(
                "lengths must be None for a PackedSequence, which has its own; got lengths; leave them out"
            )
        data, sizes = packed.data, packed.batch_sizes
        if data.dim() != 2:
            raise ValueError(f"the data of a PackedSequence must have 2 dimensions; got shape {tuple(data.shape)}")
        N: Any = sizes[0] if torch.jit.is_tracing() else int(sizes[0])  # a trace is for any number of sequences
        active = torch.arange(N, device=sizes.device)[None, :] < sizes[:, None]  # [T, N]
        rows = active.flatten().nonzero()[:, 0].to(data.device)
        found = active.sum(0)
        padded = data.new_zeros(sizes.size(0) * N, data.size(1)).index_copy(0, rows, data)
        x = padded.view(sizes.size(0), N, data.size(1))
        own = self._own_by_row()
        x, state = self._prepared(x, hx, False, own)
        if reset is not None:
            shape, meaning = (sizes.size(0), N), "(T, N)"
            if self.batch_first:
                shape, meaning = shape[::-1], "(N, T)"
            reset = _check.reset_tensor(reset, shape, meaning, x.device)
            reset = reset.t() if self.batch_first else reset
        if packed.sorted_indices is not None:
            state = [s.index_select(1, packed.sorted_indices) for s in state]
            reset = None if reset is None else reset.index_select(1, packed.sorted_indices)
        y, last = self._run(x, state, found, own, reset, packed=True)
        if packed.unsorted_indices is not None:
            last = [s.index_select(1, packed.unsorted_indices) for s in last]
        data = y.flatten(0, 1).index_select(0, rows)
        return PackedSequence(data, sizes, packed.sorted_indices, packed.unsorted_indices), self._returned(last)

    def _own_by_row(self) -> list[Own]:
        """The weights and running statistics of each layer and direction, in the order of the states."""
        return [self._own(suffix) for suffixes in self._suffixes() for suffix in suffixes]

    def _prepared(self, x: Tensor, hx: State | None, single: bool, own: list[Own]) -> tuple[Tensor, list[Tensor]]:
        """The checked input [T, N, I] and initial states [L*D, N, *], in the dtype to compute in."""
        if x.size(0) == 0:
            raise ValueError("input must hold at least one step; got T = 0")
        weight = own[0]["weight_ih"]
        x = self._suited_input(x, weight)
        if single:
            states = self._first_states(x, hx, (len(own),), "layers * directions, ", weight)
            return x, [state.unsqueeze(1) for state in states]
        return x, self._first_states(x, hx, (len(own), x.size(1)), "layers * directions, N, ", weight)

    def _returned(self, last: list[Tensor]) -> State:
        return (last[0], last[1]) if len(last) == 2 else last[0]

    def _run(
        self,
        x: Tensor,
        state: list[Tensor],
        lengths: Tensor | None,
        own: list[Own],
        reset: Tensor | None,
        packed: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        last: list[list[Tensor]] = [[] for _ in state]
        moved: list[tuple[Tensor, Tensor]] = []
        directions = 1 + self.bidirectional
        resets = (reset, None if reset is None else _masks.reversed_reset(reset, lengths))
        for layer in range(self.num_layers):
            outputs = []
            for reverse in range(directions):
                row = layer * directions + reverse
                h, c = state[0][row], state[1][row] if len(state) == 2 else None
                results = ops.run(self._operands(own[row], x, h, c, lengths, resets[reverse]), self._spec(reverse == 1))
                moved += self._new_statistics(own[row], results)
                outputs.append(results.y)
                for kept, value in zip(last, (results.h, results.c), strict=False):
                    kept.append(value)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = self._dropped(x, lengths if packed else None)
        # Not before: a layer that raises must leave those below it as they were.
        for held, new in moved:
            held.copy_(new)
        return x, [torch.stack(values) for values in last]

    def _dropped(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Dropout between layers. For packed input it draws no numbers for padding: equal seeds give torch's masks."""
        if lengths is None:
            return F.dropout(x, self.dropout)
        active = torch.arange(x.size(0), device=lengths.device)[:, None] < lengths[None, :]
        real = active.flatten().nonzero()[:, 0].to(x.device)
        rows = x.flatten(0, 1)
        return torch.zeros_like(rows).index_copy(0, real, F.dropout(rows[real], self.dropout)).view_as(x)

    @classmethod
    def from_torch(cls, layer: nn.RNNBase, **options: Any) -> Any:
        """Returns a new layer with copies of the weights and the options of torch's `layer`.

        `options` are keyword arguments of the constructor, such as `norm`. Weights that `layer` computes (pruning,
        `weight_norm`, `spectral_norm`, any parametrization) are copied as they are in evaluation mode, and become
        ordinary parameters.
        Raises `TypeError` if `layer` is not torch's layer of this kind, `ValueError` for sizes other than its own.
        """
        if not isinstance(layer, cls._torch_layer):
            raise TypeError(
                f"layer must be a torch.nn.{cls._torch_layer.__name__} for {cls.__name__}.from_torch; "
                f"got {type(layer).__name__}"
            )
        same = {name: getattr(layer, name) for name in cls._torch_options}
        for name in _SIZES:
            if name in same and options.get(name, same[name]) != same[name]:
                raise ValueError(
                    f"{name} must be the given layer's, {same[name]!r}; got {options[name]!r}; leave it out"
                )
        return _with_weights_of(layer, cls, {**same, **options})

    def to_torch(self) -> nn.RNNBase:
        """Returns torch's layer with copies of the weights; computed weights as in `from_torch`.

        Dropout between layers is kept; `weight_dropout` and `recurrent_dropout`, which act in training mode alone, are
        not.
        Raises `ValueError` if the norm is not "none", and for zoneout, which torch's layers do not have.
        """
        self._refuse_special("to_torch")
        rates = self._mask_rates()
        if rates.zoneout_h or rates.zoneout_c:
            raise ValueError(
                f"zoneout must be 0 for to_torch, since it acts in evaluation mode too; got {self.zoneout}; set it to 0"
            )
        if self.norm.kind != "none":
            raise ValueError(
                f"norm must be 'none' for to_torch: torch.nn.{self._torch_layer.__name__} has no norms; got {self.norm}"
            )
        return _with_weights_of(self, self._torch_layer, {name: getattr(self, name) for name in self._torch_options})

    def to_plain(self, make_loop: _plain.MakeLoop = _plain.Scan) -> _plain.Plain:
        """Returns the layer in evaluation mode, on copies of its weights and statistics, in torch's own operators only.

        For export to other programs: `torch.export` and `torch.onnx` keep its loop over the steps as one operator, for
        any T and N. Call it with the input [T, N, I] and the initial states [L*D, N, *]; it returns the output and the
        last states as one flat tuple. `make_loop` makes the module that runs the loop.
        """
        self._refuse_special("to_plain")
        with in_evaluation(self):
            return _plain.Plain(self, make_loop)


# Options that determine the number and shapes of the weights.
_SIZES = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")


def _with_weights_of(layer: Any, kind: type[nn.Module], options: dict[str, Any]) -> Any:
    """A new layer of class `kind`, ours or torch's, with copies of the weights of `layer`, torch's or ours."""
    with in_evaluation(layer), torch.enable_grad():
        weights: dict[str, Tensor] = {name: getattr(layer, name) for names in layer._all_weights for name in names}
    for name in layer.state_dict():
        if not any(weight in name for weight in weights):
            raise ValueError(
                f"parameters and buffers of a {type(layer).__name__} must be those of its class; got {name}; remove it"
            )
    if absent := [name for name, weight in weights.items() if weight is None]:
        raise ValueError(f"{absent[0]} must be a tensor to be copied; got None; make the layer with bias=False")
    first = next(iter(weights.values()))
    new = kind(**{"device": first.device, "dtype": first.dtype, **options})
    for name, weight in weights.items():
        with torch.no_grad():
            new.get_parameter(name).copy_(weight)
        new.get_parameter(name).requires_grad_(weight.requires_grad)
    return new.train(layer.training)


class LSTM(Recurrent):
    r"""Long short-term memory with every pre-activation normalized just before its nonlinearity.

    `i, f, o = sigmoid(norm(W x + b + R h + b'))`, `g = tanh(norm(.))`, `c' = f*c + i*g`, `h' = o * tanh(c')`; with
    `cell_norm`, c' is replaced by norm(c'). With `proj_size` P, `h' = W_hr (o * tanh(c'))`. With `norm="none"` it
    computes what `torch.nn.LSTM` does. Arguments up to `proj_size`, `device` and `dtype` are torch's.

    Options, keyword arguments that all layers and cells share, of type `rnnorm.Options`:
        norm: "online" (default), "layer", "rms", "none" or a specification of `rnnorm.norms`.
        cell_norm: LSTM only; True to normalize the new c too (default False).
        backend: "auto" (default) or a name from `rnnorm.backends()`.
        weight_dropout: probability that an entry of `weight_hh` is zero during a call (DropConnect), in training mode
            (default 0).
        recurrent_dropout: probability that a unit of h is zero in the recurrent product, the same units at all steps
            of a call, in training mode (default 0).
        zoneout: probability that a unit of a state keeps its old value in a step, in training mode; in evaluation mode
            the new state is the expectation. One value for all states, or a pair for h and c (default 0).
        norm_init: initial scale of the norms' affine map (default 1).
        mogrifier_rounds: LSTM only; rounds in which x and h gate each other before each step, alternately
            `x = 2 sigmoid(Q h + b) x` and `h = 2 sigmoid(R x + b) h`, each with separate weights (default 0).
        mogrifier_rank: rank of those weights, 0 for full rank (default 0).
        cap_input_gate: LSTM only; True for `c' = f*c + min(i, 1 - f)*g` (default False).

    Parameters besides torch's: `norm_scale_l{k}`, `norm_shift_l{k}` [4H]. Buffers, for online normalization:
    `norm_mean_l{k}`, `norm_var_l{k}`, `norm_u_l{k}`, `norm_v_l{k}` [4H], at least float32. With `cell_norm`, the same
    as `cell_norm_*` [H]. With a Mogrifier, `weight_mogrify_l{k}`: down [rank, from] (if of low rank), up [to, rank] and
    bias [to] of each round, flat, one after another. The suffix of a reverse direction is `_l{k}_reverse`.
    `torch.fx` records a call as one node, as it does for torch's layers. `quantize_dynamic` for `torch.nn.LSTM` skips
    this layer, which is not an instance of it: without a norm, quantize `to_torch()`.
    Raises `ValueError` or `TypeError` for invalid arguments; warns as torch does of dropout with one layer.
    Source: Chiley et al., NeurIPS 2019 (arXiv 1905.05894), section 4; Mogrifier: Melis et al., ICLR 2020 (arXiv
    1909.01792).
    """

    _torch_layer = nn.LSTM
    _torch_options = (*Recurrent._torch_options, "proj_size")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            *(
                "lstm",
                input_size,
                hidden_size,
                num_layers,
                bias,
                batch_first,
                dropout,
                bidirectional,
                proj_size,
            ),
            *(device, dtype, options),
        )


class GRU(Recurrent):
    r"""Gated recurrent unit with every pre-activation normalized just before its nonlinearity.

    `r, z = sigmoid(norm(W x + b + R h + b'))`, `n = tanh(norm(W_n x + b_n + r * (R_n h + b'_n)))`,
    `h' = (1-z)*n + z*h`. With `norm="none"` it computes what `torch.nn.GRU` does. Arguments, options, names and errors
    as in `LSTM`, without `proj_size` and `cell_norm`; norm parameters and running statistics are [3H].
    """

    _torch_layer = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            *("gru", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0),
            *(device, dtype, options),
        )


class RNN(Recurrent):
    r"""Elman network with the pre-activation normalized: `h' = tanh|relu(norm(W x + b + R h + b'))`.

    With `norm="none"` it computes what `torch.nn.RNN` does. Arguments, options, names and errors as in `GRU`, and
    `nonlinearity`, "tanh" or "relu", as in torch; norm parameters and running statistics are [H].
    """

    _torch_layer = nn.RNN
    _torch_options = (*Recurrent._torch_options, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[Options],
    ) -> None:
        cell = rnn(nonlinearity)
        super().__init__(
            *(cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0),
            *(device, dtype, options),
        )
        self.nonlinearity = nonlinearity
