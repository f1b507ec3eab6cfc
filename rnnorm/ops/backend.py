"""The interface of a backend, with the answers of most."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnorm.ops.call import CallSpec, Operands, Results
from rnnorm.ops.errors import Failure


class Backend(ABC):
    """A row of the registry. `differentiable` backends run under autograd, without operators.

    A backend with `losses` also has `linear_cross_entropy`, with the arguments of the function in `rnnorm.ops.chunked`.
    `online_norm` and `online_norm_backward` have the arguments of those in `rnnorm.ops.channels`; where autograd
    differentiates the backend, `online_norm` takes u and v after `var`, and there is no backward function.
    """

    name: str
    differentiable = False
    wide_weights = False  # rounds weights that are wider than x itself, and returns their gradients unrounded
    runs_special = False  # a Mogrifier and a capped input gate
    keeps_finite = False  # leaves all new statistics, and all control states, as they were if one is not finite
    linear_cross_entropy: Any
    online_norm: Any
    online_norm_backward: Any
    # `online_norm` for calls that only autograd observes, which it records: it has u and v after `var`, moves mean and
    # var, and returns the output. None: recorded in Python.
    online_norm_recorded: Any = None

    @property
    def losses(self) -> tuple[torch.dtype, ...]:
        """The dtypes of products that its `linear_cross_entropy` supports."""
        return ()

    @abstractmethod
    def why_not(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None) -> str | None:
        """None if it can run such a call, else the reason. Without a spec: if it can run on this machine at all."""

    def fault(self, device: torch.device, dtype: torch.dtype, spec: CallSpec | None, units: int) -> Failure | None:
        """Why the kernels of a call that it can run are not to be trusted on this device. `units`: H, or C of
        `online_norm`, for which there is no spec."""
        return None

    @abstractmethod
    def saved_like(self, operands: Operands, spec: CallSpec) -> list[Tensor]:
        """Uninitialized tensors of the shapes that `forward` saves."""

    @abstractmethod
    def forward(self, operands: Operands, spec: CallSpec, save: bool) -> tuple[Results, list[Tensor]]:
        """The results and, if `save`, the tensors that `backward` needs."""

    @abstractmethod
    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        operands: Operands,
        saved: Sequence[Tensor],
        spec: CallSpec,
        need_input: bool,
        need_weights: bool,
    ) -> list[Tensor | None]:
        """Gradients of the differentiable operands from those of `y`, `h`, `c`; updates u and v in place."""
