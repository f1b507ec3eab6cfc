"""`OnlineNorm`: online normalization as a module, for vectors and feature maps."""

import dataclasses
import math
import numbers
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from rnnorm import _check, norms, ops
from rnnorm._module import STATISTICS, RunningStatsModule

_SPECIFIED = frozenset(field.name for field in dataclasses.fields(norms.Online))


class OnlineNorm(RunningStatsModule):
    r"""Online normalization of C channels, sample by sample, without batch statistics.

    `y = (x - mean) / sqrt(var + eps)` with the running statistics of the samples before `x` (frozen in evaluation
    mode), `z = weight * y + bias`, then the guard: "clamp" clips to [-5, 5], "scale" divides each sample by its root
    mean square over all channels and positions, "none" leaves z as it is. The backward pass is the paper's control
    process; it can run once per forward pass. `control_floor` as in `norms.Online`, with the mean of `y^2` over a
    sample's positions; running statistics that would not be finite are not updated.
    Input and output are (N, C) or (N, C, *) and have the same dtype and memory format; running statistics are float32
    (float64 for float64). Parameters `weight`, `bias` and buffers `mean`, `var`, `u`, `v` are [C]. In training mode
    statistics, affine map and guard are one pass, and autograd keeps nothing of the input's size but the input.
    `backend`: as in the layers. The constants and the guard are attributes that may be changed; a TorchScript module
    keeps its constants.
    Raises `ValueError` for constants out of range and for input of a wrong shape, dtype or device, `TypeError` for
    constants that are no numbers and input that is no tensor.
    Source: Chiley et al., NeurIPS 2019 (arXiv 1905.05894), section 3.
    """

    _statistic_name = re.compile("(mean|var|u|v)")

    constants: norms.Constants  # declared for TorchScript

    def __init__(
        self,
        num_features: int,
        *,
        alpha_fwd: float = 0.999,
        alpha_bwd: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        guard: str = "clamp",
        control_floor: float = -math.inf,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not _check.is_number(num_features, numbers.Integral) or num_features <= 0:
            raise ValueError(f"num_features must be an int greater than 0; got {num_features!r}")
        self.num_features = num_features = int(num_features)
        self.alpha_fwd = alpha_fwd
        self.alpha_bwd = alpha_bwd
        self.eps = eps
        self.affine = affine
        self.guard = guard
        self.control_floor = control_floor
        self.backend = backend
        if backend != "auto":
            ops.by_name(backend)
        empty = torch.empty(num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty.clone()) if affine else None
        self.bias = nn.Parameter(empty.clone()) if affine else None
        for name in STATISTICS:
            self.register_buffer(name, torch.empty_like(empty, dtype=ops.statistics_dtype(empty.dtype)))
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Check what specifies the norm, and make it act from the next call on."""
        if name in _SPECIFIED:
            held = {other: self.__dict__[other] for other in _SPECIFIED & self.__dict__.keys()}
            norm = norms.Online(**{**held, name: value})
            value = getattr(norm, name)
            self.constants = norm.constants
            self._constants = [*norm.constants]  # the same, as TorchScript passes it to the operator
        super().__setattr__(name, value)

    mean: Tensor
    var: Tensor
    u: Tensor
    v: Tensor

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0, and reset the running statistics."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, alpha_fwd={self.alpha_fwd}, alpha_bwd={self.alpha_bwd}, eps={self.eps}, "
            f"affine={self.affine}, guard={self.guard!r}, control_floor={self.control_floor}"
            + (f", backend={self.backend!r}" if self.backend != "auto" else "")
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the samples of `input` (N, C) or (N, C, *) in order; the output has its shape and dtype."""
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):
                return self._traced(input)
            _check.is_tensor("input", input)
        mean, var, weight, bias = self.mean, self.var, self.weight, self.bias
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(f"input must have shape (N, C = {self.num_features}, *); got {list(input.shape)}")
        if torch.jit.is_scripting():
            if self.training:
                _check.statistics_are_wide(mean)
            wide = ops.statistics_dtype(mean.dtype)
            mean, var = mean.to(wide), var.to(wide)
        if not input.is_floating_point() or ops.statistics_dtype(input.dtype) != mean.dtype:
            raise ValueError(
                f"input must have a dtype for statistics in {mean.dtype}; got {input.dtype}; "
                "convert one with .to(dtype)"
            )
        if input.device != mean.device:
            raise ValueError(
                f"input must be on the module's device {mean.device}; got {input.device}; move one with .to(device)"
            )
        if input.numel() == 0:
            if weight is None or bias is None:
                return input.clone()
            # Gradients of zero, not None: distributed training needs them on all processes.
            return input + 0 * (weight.sum() + bias.sum()).to(input.dtype)
        if self.training:
            call = (input, weight, bias, mean, var, self.u, self.v, self.guard, self._constants, self.backend)
            if not torch.jit.is_scripting():
                return ops.run_online_norm(*call)
            y, new_mean, new_var, _, _ = torch.ops.rnnorm.online_norm(*call)
            mean.copy_(new_mean.detach())
            var.copy_(new_var.detach())
            return y
        channels = [self.num_features] + [1] * (input.dim() - 2)
        # Copies: autograd keeps them, and later training calls move the statistics.
        y = (input.to(mean.dtype) - mean.clone().view(channels)) * (var + self.constants.eps).rsqrt().view(channels)
        if weight is not None and bias is not None:
            y = y * weight.to(y.dtype).view(channels) + bias.to(y.dtype).view(channels)
        if self.guard == "scale":
            over = list(range(1, input.dim()))
            y = y * (y.square().mean(over, keepdim=True) + self.constants.scale_eps).rsqrt()
        elif self.guard == "clamp":
            y = y.clamp(-self.constants.clamp_limit, self.constants.clamp_limit)
        return y.to(input.dtype)
