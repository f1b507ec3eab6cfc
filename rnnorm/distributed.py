"""Online normalization over many processes: each normalizes its own samples, and their streams are averaged."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnnorm._module import RunningStatsModule


@torch.no_grad()
def average_running_stats(module: nn.Module, group: "dist.ProcessGroup | None" = None) -> None:
    r"""Replace every stream in `module` by its average over the K processes of `group`, in one all-reduce.

    `mean = E[mean_k]`, `var = E[var_k] + E[mean_k^2] - E[mean_k]^2` (that of the K streams' samples taken together),
    `u = E[u_k]`, `v = E[v_k]`, where E averages over k = 1..K. Call it on all processes, with the same modules, once
    per step after the backward pass. With DistributedDataParallel give that `forward_sync_buffers=False` (before torch
    2.13 `broadcast_buffers=False`): it would copy the first process's streams over the others'.

    Arguments: `module` holds layers, cells or `OnlineNorm` at any depth (none: nothing to do); `group` is a process
    group, the default one if None. Sums are float64, results have the streams' dtypes and the same bits on all
    processes. A process alone (no process group, or one of size 1) is its own average: nothing happens.
    Raises `ValueError` if this process is not in `group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    size = dist.get_world_size(group)
    if size < 0:
        raise ValueError("average_running_stats must be called by the processes of its group; this one is not in it")
    streams = _streams(module)
    if size == 1 or not streams["mean"]:
        return
    means = _flat(streams["mean"])
    sums = torch.stack((means, _flat(streams["var"]) + means.square(), _flat(streams["u"]), _flat(streams["v"])))
    dist.all_reduce(sums, group=group)
    mean, square, u, v = sums / size
    # Rounding may leave the means' variance just below zero.
    averages = {"mean": mean, "var": square - mean.square(), "u": u, "v": v}
    averages["var"].clamp_(min=0)
    for name, buffers in streams.items():
        parts = averages[name].split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part)


def _streams(module: nn.Module) -> dict[str, list[Tensor]]:
    """The module's streams by kind, in the same order for each kind."""
    found: dict[str, list[Tensor]] = {"mean": [], "var": [], "u": [], "v": []}
    for part in module.modules():
        if isinstance(part, RunningStatsModule):
            for kind, buffers in part._statistics_by_kind().items():
                found[kind] += buffers
    return found


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.double() for buffer in buffers])
