import numpy as np
import pytest
import torch
from torch import nn

from lm import optim
from lm.config import TrainConfig


def rates(config, points):
    return [optim.learning_rate(config, epoch=epoch, step=step, falls=falls) for epoch, step, falls in points]


def test_constant_and_warm_up():
    config = TrainConfig(lr=2.0, warmup_steps=4)
    assert rates(config, [(0, 0, 0), (0, 1, 0), (0, 3, 0), (9, 99, 3)]) == [0.5, 1.0, 2.0, 2.0]


def test_exponential_holds_then_falls_each_epoch():
    config = TrainConfig(lr=1.0, schedule="exponential", schedule_factor=0.5, schedule_hold=4)
    # Zaremba et al.: rate 1 for four epochs, then halved at each
    assert rates(config, [(e, 0, 0) for e in (0, 3.9, 4, 4.5, 5, 12)]) == [1, 1, 0.5, 0.5, 0.25, 0.5**9]


def test_plateau_falls_by_its_factor():
    config = TrainConfig(lr=20.0, schedule="plateau", schedule_factor=0.25)
    assert rates(config, [(3, 9, 0), (4, 12, 1), (9, 30, 2)]) == [20.0, 5.0, 1.25]


def test_cosine_ends_at_zero_by_epochs_or_steps():
    config = TrainConfig(lr=1.0, schedule="cosine", epochs=4)
    assert rates(config, [(0, 0, 0), (2, 7, 0), (4, 9, 0)]) == pytest.approx([1.0, 0.5, 0.0])
    config = TrainConfig(lr=1.0, schedule="cosine", epochs=1000, max_steps=10)
    assert rates(config, [(0, 5, 0), (0, 10, 0)]) == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("name", ["sgd", "asgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = optim.build(model, TrainConfig(optimizer=name, lr=0.05, weight_decay=1e-6))
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_sgd_is_the_papers_update():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = optim.build(model, TrainConfig(optimizer="sgd", lr=0.5, weight_decay=0.1))
    model.weight.grad = torch.tensor([[1.0, -2.0]])
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * (model.weight.grad + 0.1 * before))


def test_rmsprop_is_lambs_update():
    """Adam with beta1 = 0: the gradient over the root of its mean square, corrected for the mean's start at zero."""
    weight = nn.Linear(2, 1, bias=False).weight
    optimizer = optim.build(nn.ParameterList([weight]), TrainConfig(optimizer="rmsprop", lr=0.1))
    mean, expected = torch.zeros(1, 2), weight.detach().clone()
    for step, grad in enumerate(torch.tensor([[[1.0, -2.0]], [[3.0, 0.5]], [[-1.0, 0.0]]]), 1):
        weight.grad = grad
        optimizer.step()
        mean = 0.999 * mean + 0.001 * grad.square()
        expected -= 0.1 * grad / ((mean / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["sgd", "asgd"])
def test_each_step_takes_the_rate_asked_for_it(name):
    weight = nn.Linear(1, 1, bias=False).double().weight
    optimizer = optim.build(nn.ParameterList([weight]), TrainConfig(optimizer=name, lr=20.0))
    taken = []
    for rate in (plan := [1.0, 0.5, 1.0, 1.14, 0.07]):
        torch.nn.init.zeros_(weight)
        weight.grad = torch.ones_like(weight)
        optim.set_learning_rate(optimizer, rate)
        optimizer.step()
        taken.append(-weight.item())
    assert taken == plan


@pytest.mark.parametrize("patience", [0, 1, 5])
def test_averaging_begins_by_the_law_on_random_curves(patience):
    config, generator = TrainConfig(optimizer="asgd", average_patience=patience), np.random.default_rng(patience)
    begun = set()
    for curve in np.cumsum(generator.normal(-0.5, 1, (300, 30)), axis=1):
        curve = [50 + float(nats) for nats in curve.round()]  # ties too
        expected = None
        for epoch, nats in enumerate(curve):
            before = curve[:epoch]
            if len(before) > patience and nats > min(before[: len(before) - patience]) and expected is None:
                expected = epoch
        found = [optim.averaging(config, curve[: epoch + 1]) for epoch in range(len(curve))]
        assert found == [expected is not None and epoch >= expected for epoch in range(len(curve))]
        begun.add(expected)
    assert {None, patience + 1, patience + 2} <= begun


def test_averaging_begins_at_once_or_never():
    curve = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert not optim.averaging(TrainConfig(optimizer="asgd"), curve[:6])
    assert optim.averaging(TrainConfig(optimizer="asgd"), curve)
    for valid in ([], curve):
        assert optim.averaging(TrainConfig(optimizer="asgd", average_patience=None), valid)
        assert not optim.averaging(TrainConfig(optimizer="sgd", average_patience=None), valid)
        assert not optim.averaging(TrainConfig(optimizer="adam", average_patience=0), valid)
        assert optim.averaging(TrainConfig(optimizer="rmsprop", average=True, average_patience=None), valid)
    assert optim.averaging(TrainConfig(optimizer="rmsprop", average=True), curve)
    assert not optim.averaging(TrainConfig(optimizer="rmsprop", average=True), curve[:6])
