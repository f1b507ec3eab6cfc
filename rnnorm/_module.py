"""What layers and cells share: parameters, running statistics and options, and the operands of a call."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rnnorm import _check, _masks, _torchscript, norms, ops
from rnnorm._cells import CELLS
from rnnorm._torch import autocast_dtype

State = Tensor | tuple[Tensor, Tensor]
Own = dict[str, Any]  # the weights and statistics of one layer and direction by operand name; None where absent
STATISTICS = {"mean": 0.0, "var": 1.0, "u": 0.0, "v": 0.0}
# The start of the name of a norm's affine parameters in older state dicts, also pruned or parametrized.
_OLD_NAME = re.compile(r"^((?:parametrizations\.)?(?:cell_)?norm)_(weight|bias)(?=[._]|$)")
_NEW_NAMES = {"weight": "scale", "bias": "shift"}
# The fused loops need both operands of a pair, or neither.
_PAIRS = (("bias_ih", "bias_hh"), ("norm_scale", "norm_shift"), ("cell_norm_scale", "cell_norm_shift"))


class RunningStatsModule(nn.Module):
    """A module whose running statistics stay at least float32, also after `.half()`."""

    _statistic_name: ClassVar[re.Pattern[str]]  # of a whole buffer name; its group 1 is the kind

    def _statistic_buffers(self) -> dict[str, Tensor]:
        """The module's own buffers of running statistics, by name."""
        return {name: b for name, b in self._buffers.items() if b is not None and self._statistic_name.fullmatch(name)}

    def _statistics_by_kind(self) -> dict[str, list[Tensor]]:
        """The module's own running statistics `mean`, `var`, `u`, `v`, in the same order for each."""
        return self.by_kind(self._buffers)

    @classmethod
    def by_kind(cls, buffers: Mapping[str, Tensor | None]) -> dict[str, list[Tensor]]:
        """The running statistics among a module's buffers, as `_statistics_by_kind`."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in STATISTICS}
        for name, buffer in buffers.items():
            if buffer is not None and (match := cls._statistic_name.fullmatch(name)):
                found[match[1]].append(buffer)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._statistic_buffers()
        super()._apply(fn, recurse)
        for name, after in self._statistic_buffers().items():
            wide = ops.statistics_dtype(after.dtype)
            if after.dtype != wide:
                self._buffers[name] = before[name].to(after.device, wide)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # With `assign=True` the buffers are those of the file, in its dtype.
        for name, buffer in self._statistic_buffers().items():
            self._buffers[name] = buffer.to(ops.statistics_dtype(buffer.dtype))

    def _traced(self, input: Proxy, *args: Any, **kwargs: Any) -> Any:
        """Record a call as one node of `torch.fx`, as it does for torch's own layers, which it does not trace into."""
        tracer: Any = input.tracer
        if tracer.root is self:
            raise TypeError(
                f"torch.fx must be given a module that holds the {type(self).__name__}; got the {type(self).__name__} "
                "itself; make it a member"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Reset the running statistics in place: mean 0, variance 1, control states u and v 0."""
        for kind, buffers in self._statistics_by_kind().items():
            for buffer in buffers:
                buffer.fill_(STATISTICS[kind])

    reset_streams = reset_running_stats  # its name in version 0.1


class Options(TypedDict, total=False):
    """The keyword arguments that layers and cells share. `LSTM` documents them."""

    norm: norms.Name | norms.Spec
    cell_norm: bool
    backend: str
    weight_dropout: float
    recurrent_dropout: float
    zoneout: float | tuple[float, float]
    norm_init: float
    mogrifier_rounds: int
    mogrifier_rank: int
    cap_input_gate: bool


_DEFAULTS: Options = {
    "norm": "online",
    "cell_norm": False,
    "backend": "auto",
    "weight_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "norm_init": 1.0,
    "mogrifier_rounds": 0,
    "mogrifier_rank": 0,
    "cap_input_gate": False,
}


class RecurrentModule(RunningStatsModule):
    """Base of layers and cells. A suffix such as `_l0_reverse` names one layer and direction; cells use none."""

    _statistic_name = re.compile(r"(?:cell_)?norm_(mean|var|u|v)(?:_l\d+(?:_reverse)?)?")

    single_step: ClassVar[bool] = False
    wide_states: ClassVar[bool] = False  # states remain in the weights' dtype under autocast
    cell: str
    norm: norms.Spec
    input_size: int
    hidden_size: int
    proj_size: int
    bias: bool
    cell_norm: bool
    backend: str
    weight_dropout: float
    recurrent_dropout: float
    zoneout: float | tuple[float, float]
    norm_init: float
    mogrifier_rounds: int
    mogrifier_rank: int
    cap_input_gate: bool
    draws_masks: bool  # False: dropout inside the recurrence acts as in evaluation mode, also in training

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        held = *self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)
        own = {prefix + name for name, _ in held}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            new = prefix + _OLD_NAME.sub(lambda old: f"{old[1]}_{_NEW_NAMES[old[2]]}", key.removeprefix(prefix))
            # A subclass may have a parameter of the old name.
            if key not in own and new in own:
                state_dict[new] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "norm":
            value = self._suited_norm(value)
        super().__setattr__(name, value)

    def _suited_norm(self, value: norms.Name | norms.Spec) -> norms.Spec:
        """The specification of that norm, for which the layer has all parameters and statistics."""
        norm = norms.resolve(value)
        held = self.__dict__.get("norm", norm)
        if any((norm.kind == kind) != (held.kind == kind) for kind in ("none", "online")) or norm.affine != held.affine:
            raise ValueError(
                f"norm must have the parameters and statistics of the layer's {held}; got {norm}; make a new layer"
            )
        return norm

    def _set_options(self, options: "Options") -> None:
        if unknown := options.keys() - Options.__annotations__:
            known = ", ".join(_DEFAULTS)
            raise TypeError(f"options of {type(self).__name__} must be among {known}; got {min(unknown)!r}")
        found: Options = {**_DEFAULTS, **options}
        states = CELLS[self.cell].states
        self.norm = found["norm"]  # type: ignore[assignment]  # resolved where it is set
        self.cell_norm = _check.cell_norm(found["cell_norm"], self.norm.kind, states)
        self.backend = found["backend"]
        if self.backend != "auto":
            ops.by_name(self.backend)
        self.weight_dropout = _check.probability("weight_dropout", found["weight_dropout"])
        self.recurrent_dropout = _check.probability("recurrent_dropout", found["recurrent_dropout"])
        self.zoneout = _check.zoneout(found["zoneout"], states)
        self.draws_masks = True
        self.norm_init = _check.norm_init(found["norm_init"], self.norm.affine)
        self.mogrifier_rounds = _check.count("mogrifier_rounds", found["mogrifier_rounds"])
        self.mogrifier_rank = _check.count("mogrifier_rank", found["mogrifier_rank"])
        self.cap_input_gate = bool(found["cap_input_gate"])
        if CELLS[self.cell].capped is None and (self.mogrifier_rounds or self.cap_input_gate):
            raise TypeError(
                f"mogrifier_rounds and cap_input_gate must be 0 and False for a {type(self).__name__}; "
                f"got {self.mogrifier_rounds} and {self.cap_input_gate}; leave them out, or use an LSTM"
            )

    def _register(self, suffix: str, input_size: int, device: Any, dtype: Any) -> None:
        """Create the parameters and running statistics of one layer and direction, uninitialized."""
        C = len(CELLS[self.cell].gates) * self.hidden_size
        out = self.proj_size or self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (C, input_size), "weight_hh": (C, out)}
        if self.bias:
            shapes |= {"bias_ih": (C,), "bias_hh": (C,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        if self.norm.affine:
            shapes |= {"norm_scale": (C,), "norm_shift": (C,)}
            if self.cell_norm:
                shapes |= {"cell_norm_scale": (self.hidden_size,), "cell_norm_shift": (self.hidden_size,)}
        if self.mogrifier_rounds:
            shapes["weight_mogrify"] = (sum(map(math.prod, self._mogrifier_shapes(input_size))),)
        for name, size in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        if self.norm.kind == "online":
            wide = ops.statistics_dtype(dtype or torch.get_default_dtype())
            for prefix, channels in (("norm", C), ("cell_norm", self.hidden_size))[: 1 + self.cell_norm]:
                for statistic in STATISTICS:
                    buffer = torch.empty(channels, device=device, dtype=wide)
                    self.register_buffer(f"{prefix}_{statistic}{suffix}", buffer)

    def _mogrifier_shapes(self, input_size: int) -> list[tuple[int, ...]]:
        out = self.proj_size or self.hidden_size
        return ops.mogrifier_shapes(input_size, out, self.mogrifier_rounds, self.mogrifier_rank)

    def __prepare_scriptable__(self) -> nn.Module:
        return _torchscript.scriptable(self)

    def _mask_rates(self) -> _masks.Rates:
        zoneout = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        return _masks.Rates(self.weight_dropout, self.recurrent_dropout, *zoneout)

    def _options_repr(self) -> list[str]:
        """The shared options that differ from their defaults, and the norm."""
        held = {name: getattr(self, name) for name in _DEFAULTS if name != "norm"}
        changed = [f"{name}={value!r}" for name, value in held.items() if value != _DEFAULTS[name]]  # type: ignore[literal-required]
        return [*changed, f"norm={self.norm}"]

    def _suffixes(self) -> list[list[str]]:
        """For each layer, the suffix of each direction's parameters."""
        return [[""]]

    def _own(self, suffix: str) -> Own:
        """The weights and statistics of one layer and direction. Computed weights are computed here, once per call."""
        own = {name: self._held(name + suffix) for name in ops.HELD}
        for one, other in _PAIRS:
            if (own[one] is None) != (own[other] is None):
                raise ValueError(
                    f"{one + suffix} and {other + suffix} must both be tensors or both None; got one of each"
                )
        if not self.training:
            # No control process runs, and torch.compile checks every buffer that a backward pass might update.
            own |= dict.fromkeys(("norm_u", "norm_v", "cell_norm_u", "cell_norm_v"))
        return own

    def _held(self, name: str) -> Any:
        """The parameter, buffer or computed weight of this name, or None. Faster than `getattr`, above all for None."""
        for members in (self._parameters, self._buffers, self.__dict__):
            if name in members:
                return members[name]
        return getattr(self, name) if hasattr(type(self), name) else None

    def _suited_input(self, x: Tensor, weight: Tensor) -> Tensor:
        """The input [..., I], checked against `weight`, in autocast's dtype where that is on."""
        if x.size(-1) != self.input_size:
            raise ValueError(f"input's last dimension must be input_size = {self.input_size}; got {x.size(-1)}")
        wanted = autocast_dtype(x)
        # Autocast leaves float64 alone.
        autocast = wanted is not None and weight.dtype != torch.float64
        _check.like_weights("input", x, weight, autocast)
        return x if wanted is None else x.to(wanted)

    def reset_parameters(self) -> None:
        """Draw the weights as torch does, uniformly within 1/sqrt(H), and reset norms and running statistics."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for path, parameter in self.named_parameters():
            # What a parametrization computes a weight from is drawn as the weight, as torch's layers do.
            name = path.split(".")[1] if path.startswith("parametrizations.") else path
            if "norm_scale" in name:
                nn.init.constant_(parameter, self.norm_init)
            elif "norm_shift" in name:
                nn.init.zeros_(parameter)
            elif path.startswith("weight_mogrify"):
                self._reset_mogrifier(name, parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)
        self.reset_running_stats()

    @torch.no_grad()
    def _reset_mogrifier(self, name: str, parameter: Tensor) -> None:
        shapes = self._mogrifier_shapes(getattr(self, name.replace("mogrify", "ih")).size(1))
        for part, shape in zip(parameter.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
            if len(shape) == 1:
                part.zero_()
            else:
                part.uniform_(-1.0 / math.sqrt(self.hidden_size), 1.0 / math.sqrt(self.hidden_size))

    def _refuse_special(self, what: str) -> None:
        if self._spec().special:
            raise ValueError(
                f"mogrifier_rounds must be 0 and cap_input_gate False for {what}; got {self.mogrifier_rounds} and "
                f"{self.cap_input_gate}"
            )

    def _spec(self, reverse: bool = False) -> ops.CallSpec:
        return ops.CallSpec(
            cell=self.cell,
            norm=self.norm.kind,
            guard=self.norm.guard,
            constants=self.norm.constants,
            cell_norm=self.cell_norm,
            training=self.training,
            reverse=reverse,
            wanted=self.backend,
            rounds=self.mogrifier_rounds,
            rank=self.mogrifier_rank,
            cap=self.cap_input_gate,
        )

    def _first_states(
        self, x: Tensor, hx: State | None, lead: tuple[int, ...], meaning: str, weight: Tensor
    ) -> list[Tensor]:
        """The initial states `(*lead, units)`, one for each of the cell's; zeros if `hx` is None. Checked.

        In the dtype of the checked input `x`, or under autocast with `wide_states` of `weight`: if a state were rounded
        at each call, small changes would be lost.
        """
        names, autocast = CELLS[self.cell].states, autocast_dtype(x) is not None
        dtype = weight.dtype if autocast and self.wide_states else x.dtype
        widths = {"h": self.proj_size or self.hidden_size, "c": self.hidden_size}
        if hx is None:
            return [torch.zeros(*lead, widths[name], dtype=dtype, device=x.device) for name in names]
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx) if isinstance(hx, tuple | list) else ()
        tensors = all(isinstance(value, Tensor) for value in given)
        if not tensors or len(given) != len(names) or (len(names) == 1) != isinstance(hx, Tensor):
            form = "one tensor h_0" if len(names) == 1 else "a pair (h_0, c_0)"
            kinds = ", ".join(type(value).__name__ for value in given)
            found = "one tensor" if isinstance(hx, Tensor) else f"a {type(hx).__name__} of {len(given)} ({kinds})"
            raise ValueError(f"the state hx must be {form}; got {found}")
        for name, value in zip(names, given, strict=True):
            units = "P" if name == "h" and self.proj_size else "H"
            _check.shape(f"{name}_0", value, (*lead, widths[name]), f"({meaning}{units})")
            _check.like_weights(f"{name}_0", value, weight, autocast)
        return [value.to(dtype) for value in given]

    def _operands(
        self, own: Own, x: Tensor, h: Tensor, c: Tensor | None, lengths: Tensor | None, reset: Tensor | None = None
    ) -> ops.Operands:
        """The operands of one call. Draws the masks of dropout inside the recurrence."""
        T, rates, wide = x.size(0), self._mask_rates(), ops.statistics_dtype(x.dtype)
        training = self.training and self.draws_masks
        if rates.weight and training:
            own = {**own, "weight_hh": _masks.dropped(own["weight_hh"], rates.weight, training)}
        return ops.Operands(
            x,
            h,
            c,
            **own,
            lengths=lengths,
            reset=reset,
            recurrent_mask=_masks.recurrent(rates.recurrent, training, h, wide),
            zoneout_h=_masks.zoneout(rates.zoneout_h, training, T, h, wide),
            zoneout_c=None if c is None else _masks.zoneout(rates.zoneout_c, training, T, c, wide),
        )

    def _new_statistics(self, own: Own, results: ops.Results) -> list[tuple[Tensor, Tensor]]:
        """Each running statistic that a call moves, with its new value."""
        if not self.training or self.norm.kind != "online":
            return []
        names = ("norm_mean", "norm_var", "cell_norm_mean", "cell_norm_var")[: 2 + 2 * self.cell_norm]
        return [(own[name], getattr(results, name).detach()) for name in names]


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Context in which `module` is in evaluation mode and its computed weights are up to date.

    Runs torch's forward pre-hooks that compute weights (pruning, weight and spectral norm); parametrizations are
    computed when they are read. In evaluation mode neither has side effects.
    """
    from torch.nn.utils.prune import BasePruningMethod  # here, since torch does not import it itself

    training = {part: part.training for part in module.modules()}
    try:
        for part in training:
            part.training = False
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
                hook(module, ())
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
