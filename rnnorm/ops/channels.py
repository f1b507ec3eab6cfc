"""Online normalization of channels with the affine map and the guard, in torch's own operations, on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnorm.norms import Constants
from rnnorm.ops import library, running_stats


def like(x: Tensor) -> Tensor:
    """An uninitialized result for `x` [N, C, *]: with its strides if channels are neighbours in memory, else dense."""
    channels_last = x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x, memory_format=torch.preserve_format if channels_last else torch.contiguous_format)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [N, C, *] as [N, C, D]."""
    return x.reshape(x.size(0), x.size(1), -1).to(dtype)


def _back(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` [N, C, D] with the shape, dtype and order in memory of `x`."""
    return like(x).copy_(rows.view(x.shape))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return y if weight is None or bias is None else torch.addcmul(bias[:, None], weight[:, None], y)


def _scale(z: Tensor, constants: Constants) -> Tensor:
    """What the guard `scale` multiplies each sample by, [N, 1, 1]."""
    return (z.square().mean((1, 2), keepdim=True) + constants.scale_eps).rsqrt()


def online_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    guard: str,
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the new mean and var: those before the call if any would not be finite."""
    values = Constants(*constants)
    with torch.no_grad(), library.without_autocast(x.device.type):
        y, _, *after = running_stats.online_norm(_rows(x, mean.dtype), mean, var, values)
        z = _affine(y, weight, bias)
        if guard == "scale":
            z = z * _scale(z, values)
        elif guard == "clamp":
            z = z.clamp(-values.clamp_limit, values.clamp_limit)
        new_mean, new_var = library.finite_or([mean, var], after)
        return _back(z, x), new_mean, new_var


def online_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    v: Tensor,
    guard: str,
    constants: Sequence[float],
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight` and `bias`, empty if absent; updates u and v unless they would not be finite."""
    values = Constants(*constants)
    with torch.no_grad(), library.without_autocast(x.device.type):
        y, rstd, _, _ = running_stats.online_norm(_rows(x, mean.dtype), mean, var, values)
        z, g = _affine(y, weight, bias), _rows(grad, mean.dtype)
        if guard == "scale":
            factor = _scale(z, values)
            g = factor * (g - z * (factor.square() * (g * z).mean((1, 2), keepdim=True)))
        elif guard == "clamp":
            g = torch.where(z.abs() <= values.clamp_limit, g, 0.0)
        grad_weight, grad_bias = mean.new_empty(0), mean.new_empty(0)
        if weight is not None:
            grad_weight, grad_bias = (g * y).sum((0, 2)), g.sum((0, 2))
            g = g * weight[:, None]
        if not need_input:
            return x.new_empty(0), grad_weight, grad_bias
        with library.kept_finite((u, v)):
            dx = running_stats.online_norm_backward(g, y, rstd, u, v, values)
        return _back(dx, x), grad_weight, grad_bias
