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


@pytest.mark.parametrize("name", ["sgd", "asgd", "adam", "adamw"])
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


def test_averages_start_when_told_and_are_lent_only():
    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.build(model, TrainConfig(optimizer="asgd", lr=1.0))
    seen = []
    for step in range(6):
        if step >= 3:
            optim.start_averaging(optimizer, step)  # a second call changes nothing
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        seen.append(model.weight.item())
        own = model.weight.item()
        with optim.averaged(optimizer):
            # from step 3 on: the mean of the weights after the steps 3, 4, …, and before that the weights
            expected = sum(seen[3:]) / len(seen[3:]) if step >= 3 else own
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == own


def test_other_optimizers_average_nothing():
    model = nn.Linear(1, 1)
    optimizer = optim.build(model, TrainConfig(optimizer="adam", lr=1.0))
    optim.start_averaging(optimizer, 0)
    before = model.weight.item()
    with optim.averaged(optimizer):
        assert model.weight.item() == before
