"""Replacing batch normalization in a model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import rnnorm
from rnnorm._convert import Replaced


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels, momentum=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def _model() -> nn.Sequential:
    """Trained a little, so that statistics and affine maps are of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(inplace=True), Block(6)),
        *(nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False)),
    )
    model(torch.randn(2, 3, 6, 6))  # the lazy layer gets its size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (model(2 + torch.randn(8, 3, 6, 6)) - torch.arange(5)).square().mean().backward()
        optimizer.step()
    return model


def test_evaluation_gives_the_same_numbers() -> None:
    model = _model().eval()
    x = 2 + torch.randn(4, 3, 6, 6)
    expected, keys = model(x), [name for name, _ in model.named_parameters()]
    replaced: list[Replaced] = []
    converted = rnnorm.convert_batchnorm(model, batch_size=8, guard="none", replaced=replaced)
    assert converted is model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == keys
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    assert replaced == [
        Replaced("1", "BatchNorm2d", 6, 0.9 ** (1 / 8), True),
        Replaced("3.norm", "BatchNorm2d", 6, 0.8 ** (1 / 8), True),
        Replaced("6", "BatchNorm1d", 5, 0.9 ** (1 / 8), True),
    ]
    assert (model[1].eps, model[1].guard, model[1].training, model[6].affine) == (1e-3, "none", False, False)
    rnnorm.convert_batchnorm(other := _model().eval(), batch_size=8)
    assert other[1].guard == "clamp"
    assert not torch.equal(other(50 * x), model(50 * x))


def test_a_converted_model_trains() -> None:
    model = rnnorm.convert_batchnorm(_model(), horizon=100, control_floor=1e-5, alpha_bwd=0.9)
    assert (model[1].alpha_fwd, model[3].norm.alpha_bwd, model[6].control_floor) == (0.99, 0.9, 1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model(2 + torch.randn(1, 3, 6, 6)).square().mean().backward()  # one sample a batch
        optimizer.step()
    for name, value in model.state_dict().items():
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), name


def test_parameters_are_the_same_objects_in_every_place() -> None:
    shared = nn.BatchNorm1d(3)
    shared.weight.requires_grad_(False)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), shared), shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced: list[Replaced] = []
    rnnorm.convert_batchnorm(model, horizon=10, replaced=replaced)
    assert model[0] is model[1][1] is model[2]
    assert model[0].weight is shared.weight
    assert any(model[0].bias is parameter for parameter in optimizer.param_groups[0]["params"])
    assert [entry.name for entry in replaced] == ["0"]
    assert isinstance(shared, nn.BatchNorm1d)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_a_layer_alone(kind: Any) -> None:
    layer = kind(3, dtype=torch.float64).eval()
    norm = rnnorm.convert_batchnorm(layer, horizon=4)
    assert isinstance(norm, rnnorm.OnlineNorm)
    assert (norm.alpha_fwd, norm.training, norm.mean.dtype) == (0.75, False, torch.float64)
    other = nn.InstanceNorm2d(3)
    assert rnnorm.convert_batchnorm(other, horizon=4) is other


def test_momentum_none_and_no_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="horizon must be given for 0, whose momentum is None; got None"):
        rnnorm.convert_batchnorm(model, batch_size=4)
    assert isinstance(model[1], nn.BatchNorm1d), "nothing is changed"
    replaced: list[Replaced] = []
    rnnorm.convert_batchnorm(model, batch_size=4, horizon=50, replaced=replaced)
    assert [(entry.alpha_fwd, entry.statistics) for entry in replaced] == [(0.98, True), (0.9**0.25, False)]
    assert model[1].var.tolist() == [1, 1, 1]


def test_a_layer_without_a_bias() -> None:
    try:
        layer = nn.BatchNorm1d(3, bias=False)
    except TypeError:
        pytest.skip("this torch has no batch normalization without a bias")
    norm = rnnorm.convert_batchnorm(layer.eval(), horizon=4, guard="none")
    x = torch.randn(5, 3)
    torch.testing.assert_close(norm(x), layer(x))
    assert not norm.bias.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "batch_size or horizon must be given for 0, whose momentum is 0.1; got None"),
        ({"batch_size": 0}, ValueError, "batch_size must be a number of samples of at least 1; got 0"),
        ({"horizon": 1}, ValueError, "horizon must be a number of samples of at least 2; got 1"),
        ({"horizon": float("nan")}, ValueError, "horizon must be a number of samples of at least 2; got nan"),
        (
            {"horizon": 9, "affine": False},
            TypeError,
            "options must not be what the layers themselves decide; got affine",
        ),
        ({"horizon": 9, "guard": "wall"}, ValueError, "guard must be one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with pytest.raises(error, match=message):
        rnnorm.convert_batchnorm(model, **options)
    assert isinstance(model[0], nn.BatchNorm1d)


def test_layers_that_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="0 must know its channels; got a lazy layer; call the model once before"):
        rnnorm.convert_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()), horizon=9)
    with pytest.raises(ValueError, match=r"the momentum of the module must lie in \[0, 1\); got 1.0"):
        rnnorm.convert_batchnorm(nn.BatchNorm1d(3, momentum=1.0), batch_size=9)


class _Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _pruned() -> nn.Module:
    return prune.l1_unstructured(nn.BatchNorm1d(3), "weight", 1)


def _parametrized() -> nn.Module:
    layer = nn.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _Activated(3), "1 must be one of torch's batch normalizations; got a _Activated, whose forward is"),
        (_pruned, "1 must have ordinary parameters; got a computed weight; remove"),
        (_parametrized, "1 must have ordinary parameters; got a computed bias; remove"),
        (lambda: torch.jit.script(nn.BatchNorm1d(3)), "1 must be a module; got a scripted BatchNorm1d; convert before"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_layers_that_compute_something_else_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), make())
    with pytest.raises(ValueError, match=message):
        rnnorm.convert_batchnorm(model, batch_size=9)
    assert isinstance(model[0], nn.BatchNorm1d), "nothing is changed"
