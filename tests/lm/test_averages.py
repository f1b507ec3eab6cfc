import contextlib
import copy
import math

import pytest
import torch

from lm import stream
from lm.averages import Averages, estimate_statistics


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


def test_the_model_gets_its_own_weights_back(model):
    net = model(cell_norm=True)
    averages = Averages(net)
    averages.update(net)
    move(net, 1)
    averages.update(net)
    own = copy.deepcopy(net.state_dict())
    with (
        contextlib.suppress(ZeroDivisionError),
        averages.swapped_into(net, lambda given: given.layers.norm_mean_l0.fill_(7)),
    ):
        assert averages.model.layers.norm_mean_l0.tolist() == net.layers.norm_mean_l0.tolist() == [7] * 48
        for name, mean in averages.model.named_parameters():
            assert torch.equal(net.get_parameter(name), mean)
        assert not torch.equal(net.decoder.weight, own["decoder.weight"])
        raise ZeroDivisionError
    for name, value in net.state_dict().items():
        assert torch.equal(value, own[name]), name


@pytest.fixture
def data(text, tokenizer):
    """Three columns that end raggedly."""
    found = stream.columns(text(60).ids, 3, tokenizer.eos)
    assert found.last < 3
    return found


DROPPING = {"dropout": 0.5, "embedding_dropout": 0.5, "num_layers": 2}
DROPPING |= {"weight_dropout": 0.5, "recurrent_dropout": 0.5}  # zoneout is expected in evaluation, so it is not here


@pytest.mark.parametrize("settings", [{"cell": "lstm", "cell_norm": True}, {"cell": "gru"}, {"cell": "rnn_tanh"}])
@pytest.mark.parametrize("horizon", [1, 4.5, 8, 1000, math.inf])
def test_statistics_are_estimated_over_eight_horizons_or_all_of_the_text(model, data, settings, horizon):
    settings = {**settings, "alpha_fwd": 1 - 1 / horizon} if horizon > 1 else {**settings, "alpha_fwd": 1e-9}
    net, plain = model(**DROPPING, **settings), model(**settings, num_layers=2)
    assert horizon == math.inf or data.steps * data.width < 8 * 1000
    for buffer in net.buffers():
        torch.nn.init.uniform_(buffer, 0.5, 1.5)
    plain.load_state_dict(net.state_dict())
    rows = {1: 3, 4.5: 12, 8: 22}.get(horizon, data.steps)
    window = data.window(0, rows)
    plain.train()
    with torch.no_grad():
        plain(window.inputs, None, window.lengths)
    before = copy.deepcopy(net.state_dict())
    estimate_statistics(net, data, "uniform{2..9}")
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    kinds = ("mean", "var") if horizon < math.inf else ()
    norms = ("norm", "cell_norm") if "cell_norm" in settings else ("norm",)
    assert moved == {f"layers.{norm}_{kind}_l{layer}" for norm in norms for kind in kinds for layer in (0, 1)}
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["online", "layer", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_estimating_draws_nothing_and_leaves_everything_else(model, data, norm, training):
    net = model(norm=norm, **DROPPING).train(training)
    net.input_dropout.eval()
    modes, layer = [m.training for m in net.modules()], net.layers.dropout
    random = torch.get_rng_state()
    estimate_statistics(net, data, "7")
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == modes
    assert net.layers.dropout == layer == 0.5
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
