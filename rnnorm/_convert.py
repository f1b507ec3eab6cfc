"""Replacing the batch normalization of a model by online normalization."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from rnnorm import _check
from rnnorm._online_norm import OnlineNorm

_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
_OWN = {"num_features", "alpha_fwd", "affine", "device", "dtype"}


class Replaced(NamedTuple):
    """A layer that `convert_batchnorm` has replaced.

    Attributes:
        name: of the layer in the model; empty for the model itself.
        kind: its former class.
        channels: C.
        alpha_fwd: decay factor of the new layer's running statistics.
        statistics: True if running statistics were carried over; else they start at mean 0 and variance 1.
    """

    name: str
    kind: str
    channels: int
    alpha_fwd: float
    statistics: bool


def convert_batchnorm(
    module: nn.Module,
    *,
    batch_size: int | None = None,
    horizon: float | None = None,
    replaced: list[Replaced] | None = None,
    **options: Any,
) -> nn.Module:
    r"""Replace every batch normalization in a model by `OnlineNorm`, as `SyncBatchNorm.convert_sync_batchnorm` does.

    Affine parameters (the same objects), running statistics, `eps` and the mode are carried over. In evaluation mode
    the model computes what it did but for the guard; with `guard="none"` all of it, to rounding. The running statistics
    of the new layers decay by the sample as those of the old ones by the batch:
    `alpha_fwd = (1 - momentum) ** (1 / batch_size)`; or by a horizon in samples: `alpha_fwd = 1 - 1 / horizon`.

    Arguments:
        module: changed in place; if it is a batch normalization itself, only the returned module is new.
        batch_size: samples of the batches for which the momentums were chosen.
        horizon: samples that the running statistics remember. Together with `batch_size` it is for layers of
            `momentum=None` alone, which average over all batches.
        replaced: a list that gets an entry for each replaced layer.
        options: of `OnlineNorm`, such as `alpha_bwd`, `guard`, `control_floor`, `backend`.

    Returns the module. A layer without running statistics, which normalizes by the batch in evaluation mode too, gets
    new ones: train before you evaluate. A layer that stands in several places stays one layer.
    Raises `ValueError` without `batch_size` and `horizon`, for values out of range, for a layer of `momentum=None`
    without `horizon`, for a lazy layer before its first call, and for a layer that computes something else than torch's
    (a subclass with its own `forward`, a pruned or parametrized one, a scripted model); nothing is changed then.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("horizon", horizon, 2)):
        if value is not None and not (_check.is_number(value) and least <= value < math.inf):
            raise ValueError(f"{name} must be a number of samples of at least {least}; got {value!r}")
    if own := options.keys() & _OWN:
        raise TypeError(f"options must not be what the layers themselves decide; got {min(own)}; leave it out")
    for name, layer in module.named_modules():
        _refuse_unusual(name or "the module", layer)
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    otherwise = next(module.parameters(), torch.empty(0))
    made: dict[nn.Module, OnlineNorm] = {}
    for name, layer in found.items():
        alpha = _alpha(name, layer, batch_size, horizon)
        made[layer] = _converted(name, layer, otherwise, {"eps": layer.eps, **options, "alpha_fwd": alpha})
    if replaced is not None:
        for name, layer in found.items():
            kept = layer.running_mean is not None
            replaced.append(Replaced(name, type(layer).__name__, layer.num_features, made[layer].alpha_fwd, kept))
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return made.get(module, module)


def _refuse_unusual(name: str, layer: nn.Module) -> None:
    """Raises for a batch normalization whose output an `OnlineNorm` with its parameters would not give."""
    if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in str(layer.original_name):
        raise ValueError(f"{name} must be a module; got a scripted {layer.original_name}; convert before scripting")
    if not isinstance(layer, _BatchNorm) or isinstance(layer, LazyModuleMixin):
        return
    computed = [held for held in ("weight", "bias") if held not in layer._parameters]
    if computed or torch.nn.utils.parametrize.is_parametrized(layer):
        raise ValueError(
            f"{name} must have ordinary parameters; got a computed {' and '.join(computed) or 'value'}; remove what "
            "computes it before (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
        )
    kind = type(layer)
    if kind.forward not in _FORWARDS:
        raise ValueError(
            f"{name} must be one of torch's batch normalizations; got a {kind.__name__}, whose forward is its own; "
            "replace it by torch's layer and what it adds to that"
        )


def _alpha(name: str, layer: _BatchNorm, batch_size: int | None, horizon: float | None) -> float:
    if batch_size is not None and layer.momentum is not None:
        if not 0 <= layer.momentum < 1:
            raise ValueError(
                f"the momentum of {name or 'the module'} must lie in [0, 1); got {layer.momentum}; give horizon instead"
            )
        return (1 - layer.momentum) ** (1 / batch_size)
    if horizon is None:
        what = "batch_size or horizon" if batch_size is None else "horizon"
        raise ValueError(
            f"{what} must be given for {name or 'the module'}, whose momentum is {layer.momentum}; got None; "
            "give the number of samples that its running statistics should remember"
        )
    return 1 - 1 / horizon


def _converted(name: str, layer: _BatchNorm, otherwise: Tensor, options: dict[str, Any]) -> OnlineNorm:
    weight, bias, mean, var = layer.weight, layer.bias, layer.running_mean, layer.running_var
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(f"{name or 'the module'} must know its channels; got a lazy layer; call the model once before")
    like = next(held for held in (weight, mean, otherwise) if held is not None)
    affine = weight is not None
    norm = OnlineNorm(layer.num_features, affine=affine, device=like.device, dtype=like.dtype, **options)
    if affine:
        norm.weight = weight
        # a layer may be made without a bias
        norm.bias = nn.Parameter(torch.zeros_like(weight), requires_grad=False) if bias is None else bias
    if mean is not None and var is not None:
        norm.mean.copy_(mean)
        norm.var.copy_(var)
    return norm.train(layer.training)
