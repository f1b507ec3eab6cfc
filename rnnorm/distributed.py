"""Online normalization in several processes: each normalizes its own samples, and running statistics are averaged."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnnorm._module import STATISTICS, RecurrentModule, RunningStatsModule
from rnnorm._online_norm import OnlineNorm


@torch.no_grad()
def average_running_stats(module: nn.Module, group: "dist.ProcessGroup | None" = None) -> None:
    r"""Replace the running statistics in `module` by their averages over the K processes of `group`, in one all-reduce.

    `mean = E[mean_k]`, `var = E[var_k] + E[mean_k^2] - E[mean_k]^2` (the variance of all processes' samples together),
    `u = E[u_k]`, `v = E[v_k]`, where E averages over k = 1..K. Call it on all processes, with the same modules, once
    per step after the backward pass. With DistributedDataParallel set `forward_sync_buffers=False` (before torch 2.13
    `broadcast_buffers=False`); otherwise it overwrites all processes' statistics with those of the first.

    Arguments:
        module: holds layers, cells or `OnlineNorm` at any depth; without any, nothing is done.
        group: process group; the default group if None.

    Sums are float64; results keep the dtypes of the statistics and are bitwise equal on all processes. Without a
    process group, or in one of size 1, nothing is done.
    Raises `ValueError` if this process is not in `group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    size = dist.get_world_size(group)
    if size < 0:
        raise ValueError("average_running_stats must be called by processes of its group; got a process outside it")
    statistics = _running_stats(module)
    if size == 1 or not statistics["mean"]:
        return
    means, var, u, v = (_flat(statistics[kind]) for kind in ("mean", "var", "u", "v"))
    sums = torch.stack((means, var + means.square(), u, v))
    dist.all_reduce(sums, group=group)
    mean, square, u, v = sums / size
    # Rounding may leave the variance just below zero.
    averages = {"mean": mean, "var": square - mean.square(), "u": u, "v": v}
    averages["var"].clamp_(min=0)
    for name, buffers in statistics.items():
        parts = averages[name].split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part)


average_streams = average_running_stats  # its name in version 0.1


def _running_stats(module: nn.Module) -> dict[str, list[Tensor]]:
    """The module's running statistics by kind, in the same order for each kind."""
    found: dict[str, list[Tensor]] = {"mean": [], "var": [], "u": [], "v": []}
    for part in module.modules():
        for kind, buffers in _of_part(part).items():
            found[kind] += buffers
    return found


def _of_part(part: nn.Module) -> Mapping[str, list[Tensor]]:
    """The same of one module, which TorchScript may have compiled: it has the buffers then, and not the class."""
    if isinstance(part, RunningStatsModule):
        return part._statistics_by_kind()
    if not isinstance(part, torch.jit.ScriptModule):
        return {}
    buffers = dict(part.named_buffers(recurse=False))
    kinds: list[type[RunningStatsModule]] = [
        RecurrentModule,
        *([OnlineNorm] if STATISTICS.keys() <= buffers.keys() else []),
    ]
    return next((found for kind in kinds if (found := kind.by_kind(buffers))["mean"]), {})


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.double() for buffer in buffers])
