"""Running statistics averaged over real processes, against the definition."""

import inspect
import math
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rnnorm
from rnnorm.distributed import average_running_stats


def _net() -> nn.Module:
    lstm = rnnorm.LSTM(3, 4, num_layers=2, bidirectional=True, cell_norm=True)
    norms = nn.ModuleDict({"maps": rnnorm.OnlineNorm(5), "wide": rnnorm.OnlineNorm(2, dtype=torch.float64)})
    return nn.ModuleList([lstm, nn.Sequential(rnnorm.GRUCell(2, 2), nn.BatchNorm1d(3)), norms])


def _moved(rank: int) -> nn.Module:
    """A net with running statistics that differ from those of other ranks."""
    net, generator = _net(), torch.Generator().manual_seed(rank)
    for name, buffer in net.named_buffers():
        if "running" not in name and "tracked" not in name:
            buffer.copy_(0.5 + 3 * torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return net


def _buffers(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_buffers())


def _average() -> Any:
    net = _moved(dist.get_rank())
    average_running_stats(nn.Sequential(net))
    return _buffers(net)


def _average_scripted() -> Any:
    net = torch.jit.script(_moved(dist.get_rank()))
    average_running_stats(net)
    return _buffers(net)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_modules_are_averaged_as_others_are(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "plain").mkdir()
    scripted = processes.run(2, _average_scripted, tmp_path / "scripted")
    plain = processes.run(2, _average, tmp_path / "plain")
    assert scripted[0].keys() == plain[0].keys()
    for name, value in plain[0].items():
        assert torch.equal(scripted[0][name], value), name


@pytest.mark.parametrize("count", [2, 4])
def test_statistics_are_averaged_by_the_definition(count: int, tmp_path: Path) -> None:
    found = processes.run(count, _average, tmp_path)
    ranks = [_buffers(_moved(rank)) for rank in range(count)]
    checked = 0
    for name, got in found[0].items():
        values = torch.stack([streams[name] for streams in ranks]).double()
        expected = values.mean(0)
        if "var" in name and "running" not in name:
            means = torch.stack([streams[name.replace("var", "mean")] for streams in ranks]).double()
            expected += means.var(0, correction=0)
            checked += 1
        assert got.dtype == ranks[0][name].dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-12, msg=name)
        for other in found[1:]:
            assert torch.equal(got, other[name]), name
    assert checked == 4 + 4 + 1 + 2


def _one_pair() -> Any:
    pair = dist.new_group([1, 2])
    net = rnnorm.OnlineNorm(1)
    net.mean.fill_(float(dist.get_rank()))
    said = ""
    try:
        average_running_stats(net, pair)
    except ValueError as fault:
        said = str(fault)
    return [net.mean.item(), net.var.item(), said]


def test_a_group_is_averaged_alone(tmp_path: Path) -> None:
    outside, *pair = processes.run(3, _one_pair, tmp_path)
    assert pair == [[1.5, 1.25, ""]] * 2
    assert outside == [
        0.0,
        1.0,
        "average_running_stats must be called by processes of its group; got a process outside it",
    ]


def _train(count: int) -> Any:
    """A step of data parallel training."""
    torch.manual_seed(0)
    layer = rnnorm.LSTM(3, 4, backend="reference")
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters  # torch 2.13 has another name for it
    name = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)
    data = nn.parallel.DistributedDataParallel(layer, **{name: False})
    x = torch.randn(5, 4, 3).tensor_split(count, 1)[dist.get_rank()]
    for _ in range(2):
        data.zero_grad()
        data(x)[0].square().sum().backward()
        average_running_stats(data)
    return {**_buffers(layer), **{name: p.grad for name, p in layer.named_parameters()}}


def test_statistics_stay_equal_in_training(tmp_path: Path) -> None:
    first, second = processes.run(2, _train, tmp_path, 2)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not math.isclose(first["norm_v_l0"].abs().max().item(), 0)


def _far() -> Any:
    """Equal means far from zero, whose variance is only rounding."""
    net = rnnorm.OnlineNorm(2, dtype=torch.float64)
    net.mean.fill_(1e9 / 3)
    net.var.fill_(1e-30)
    average_running_stats(net)
    return net.var


def test_variances_never_fall_below_zero(tmp_path: Path) -> None:
    for var in processes.run(2, _far, tmp_path):
        assert (var >= 0).all()


def test_a_process_alone_is_its_own_average() -> None:
    net = _moved(1)
    before = {name: value.clone() for name, value in _buffers(net).items()}
    average_running_stats(net)
    torch.testing.assert_close(_buffers(net), before, rtol=0, atol=0)
