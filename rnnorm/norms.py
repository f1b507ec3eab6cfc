"""Specifications of the normalization before a recurrent layer's nonlinearities: frozen dataclasses, no tensors."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

Name = Literal["none", "online", "layer", "rms"]
KINDS: tuple[str, ...] = get_args(Name)
GUARDS = ("none", "scale", "clamp")


class Constants(NamedTuple):
    """The numbers of a normalization, as operators, backends and C++ take them, in this order.

    A norm that lacks a constant has its default.
    """

    eps: float = 1e-5
    alpha_fwd: float = 1.0
    alpha_bwd: float = 1.0
    scale_eps: float = 1e-5  # of the guard "scale"
    clamp_limit: float = 5.0  # of the guard "clamp"
    control_floor: float = -math.inf


class _Norm:
    """What the specifications share."""

    kind: ClassVar[str]

    def _number(self, name: str) -> Any:
        """The field's value, checked to be a number; the field itself becomes Python's own float."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}")
        object.__setattr__(self, name, float(value))
        return value

    def _check_eps(self) -> None:
        eps = self._number("eps")
        if not eps > 0:
            raise ValueError(f"eps must be greater than 0; got {eps}; the usual value is 1e-5")

    @property
    def constants(self) -> Constants:
        """The specification's numbers, with defaults for those it lacks."""
        own = {name: float(getattr(self, name)) for name in Constants._fields if hasattr(self, name)}
        return Constants(**own)


@dataclass(frozen=True)
class Online(_Norm):
    r"""Online normalization: running statistics in the forward pass, a control process in the backward pass.

    `y = (x - mean) / sqrt(var + eps)` with the running `mean` and `var` of the samples before `x`; then
    `scale * y + shift` (if `affine`), then the guard: `"scale"` divides by the root mean square over the
    H units of a gate, `"clamp"` clips to [-5, 5], `"none"` leaves the values as they are.

    `alpha_fwd`, `alpha_bwd` in (0, 1] are the decay factors of the statistics and of the control process.

    `control_floor` < 1 is a lower bound on the decay `1 - (1 - alpha_bwd) * y^2` of the control state v from one sample
    to the next. The paper has no bound (-inf, the default); v then diverges while |y| exceeds
    `sqrt(2 / (1 - alpha_bwd))`, as in the first steps at a large learning rate. 1e-5 is the bound in the authors'
    batched code from the time of their results.

    If a mean or variance of a layer and direction would not be finite after a call, none of them is updated; the NaN
    still reaches the output. If u or v would not be finite after a backward pass, as with too large a loss scale,
    neither is updated (except on backend `"reference"`, which follows the paper literally).

    Raises `ValueError` for values outside their range.
    Source: Chiley et al., NeurIPS 2019 (arXiv 1905.05894), eq. 8-12.
    """

    alpha_fwd: float = 8191 / 8192
    alpha_bwd: float = 31 / 32
    eps: float = 1e-5
    affine: bool = True
    guard: str = "scale"
    control_floor: float = Constants().control_floor
    kind: ClassVar[str] = "online"

    def __post_init__(self) -> None:
        for name in ("alpha_fwd", "alpha_bwd"):
            alpha = self._number(name)
            if not 0 < alpha <= 1:
                raise ValueError(
                    f"{name} must lie in (0, 1]; got {alpha}; the horizon is 1 / (1 - {name}) samples, e.g. 0.999"
                )
        self._check_eps()
        if self.guard not in GUARDS:
            raise ValueError(f"guard must be one of {', '.join(map(repr, GUARDS))}; got {self.guard!r}")
        floor = self._number("control_floor")
        if not floor < 1:
            raise ValueError(
                f"control_floor must be less than 1; got {floor}; -inf sets no bound, 1e-5 prevents divergence"
            )


@dataclass(frozen=True)
class _PerSample(_Norm):
    eps: float = 1e-5
    affine: bool = True
    guard: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        self._check_eps()


@dataclass(frozen=True)
class Layer(_PerSample):
    """Layer normalization over the H units of each gate: `(x - mean_H) / sqrt(var_H + eps)`, biased variance.

    Source: Ba, Kiros and Hinton, 2016 (arXiv 1607.06450).
    """

    kind: ClassVar[str] = "layer"


@dataclass(frozen=True)
class RMS(_PerSample):
    """Root-mean-square normalization over the H units of each gate: `x / sqrt(mean_H(x^2) + eps)`.

    Source: Zhang and Sennrich, NeurIPS 2019 (arXiv 1910.07467).
    """

    kind: ClassVar[str] = "rms"


@dataclass(frozen=True)
class Identity(_Norm):
    """No normalization: the layer computes what torch's does."""

    affine: ClassVar[bool] = False
    guard: ClassVar[str] = "none"
    kind: ClassVar[str] = "none"


Spec = Online | Layer | RMS | Identity
_BY_NAME: dict[str, type[Spec]] = {spec.kind: spec for spec in get_args(Spec)}


def resolve(norm: "str | Spec") -> Spec:
    """The specification of that name; a specification is returned as it is. Raises `ValueError` for anything else."""
    if isinstance(norm, Spec):
        return norm
    if isinstance(norm, str) and norm in _BY_NAME:
        return _BY_NAME[norm]()
    raise ValueError(
        f"norm must be one of {', '.join(map(repr, _BY_NAME))} or a specification of rnnorm.norms; got {norm!r}"
    )
