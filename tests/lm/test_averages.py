import contextlib
import copy

import pytest
import torch

from lm.averages import Averages


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("tied", [True, False])
def test_the_mean_of_the_weights_after_each_step(model, tied):
    net = model(tied=tied)
    averages, seen = Averages(net), []
    for step in range(7):
        move(net, step)
        averages.update(net)
        seen.append(weights(net))
        expected = {name: torch.stack([past[name].double() for past in seen]).mean(0) for name in seen[0]}
        for name, mean in averages.model.named_parameters():
            torch.testing.assert_close(mean.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert averages.steps == 7
    assert (averages.model.decoder.weight is averages.model.embedding.weight) == tied


def test_averages_are_lent_only(model):
    net = model(cell_norm=True)
    averages = Averages(net)
    averages.update(net)
    move(net, 1)
    averages.update(net)
    own = copy.deepcopy(net.state_dict())
    with contextlib.suppress(ZeroDivisionError), averages.lent(net):
        for name, mean in averages.model.named_parameters():
            assert torch.equal(net.get_parameter(name), mean)
        assert not torch.equal(net.decoder.weight, own["decoder.weight"])
        raise ZeroDivisionError
    for name, value in net.state_dict().items():
        assert torch.equal(value, own[name]), name
