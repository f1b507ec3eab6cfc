import json

import pytest
import torch

from lm.internals import BINS, Internals, look


@pytest.mark.parametrize(
    ("cell", "gates"), [("lstm", "ifgo"), ("gru", "rzn"), ("rnn_tanh", "h"), ("rnn_relu", "")], ids=str
)
def test_statistics_and_gates_of_every_layer(model, cell, gates):
    net = model(cell=cell, num_layers=2)
    net.train()
    torch.manual_seed(0)
    net(torch.randint(0, 5, (9, 4)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = look(net, torch.randint(0, 5, (7, 3)))
    json.dumps(found)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found["gates"].keys() == {f"{gate}_l{layer}" for gate in gates for layer in (0, 1)}
    for gate in found["gates"].values():
        assert (len(gate["counts"]), sum(gate["counts"])) == (BINS, 7 * 3 * 12)
    assert found["recurrent"].keys() == {"weight_hh_l0", "weight_hh_l1"}
    for name, norm in found["recurrent"].items():
        assert norm == pytest.approx(before[f"layers.{name}"].square().sum().sqrt().item(), rel=1e-5)
    mean = before["layers.norm_mean_l1"]
    low, *_, high = found["statistics"]["norm_mean_l1"]
    assert (low, high) == pytest.approx((mean.min().item(), mean.max().item()), rel=1e-5)
    assert found["statistics"].keys() == {
        f"norm_{name}_l{layer}" for name in ("mean", "var", "u", "v") for layer in (0, 1)
    }


def test_layers_that_are_modules_of_their_own_are_named_alike(model):
    settings = {"num_layers": 2, "layer_sizes": [7, 12]}
    found = look(net := model(**settings), inputs := torch.randint(0, 5, (7, 3)))
    assert found["gates"].keys() == {f"{gate}_l{layer}" for gate in "ifgo" for layer in (0, 1)}
    assert found["recurrent"].keys() == {"weight_hh_l0", "weight_hh_l1"}
    assert {"norm_mean_l0", "norm_mean_l1"} <= found["statistics"].keys()
    assert [sum(found["gates"][f"i_l{layer}"]["counts"]) for layer in (0, 1)] == [7 * 3 * 7, 7 * 3 * 12]
    assert found == look(net, inputs), "the statistics have not moved"


def test_a_gate_that_is_shut_is_saturated(model):
    net = model(norm="none")
    with torch.no_grad():
        net.layers.bias_ih_l0[:12] = -100.0  # the input gate
        net.layers.bias_ih_l0[12:24] = 0.0
    found = look(net, torch.ones(4, 2, dtype=torch.int64))["gates"]
    assert found["i_l0"]["saturated"] == 1.0
    assert found["i_l0"]["counts"] == [4 * 2 * 12] + [0] * (BINS - 1)
    assert found["f_l0"]["saturated"] < 0.5


def test_a_step_is_looked_at_once(model):
    inputs = torch.ones(400, 2, dtype=torch.int64)
    internals = Internals(model(), inputs)
    assert len(internals.inputs) == 64
    assert internals.at(3) is internals.at(3)
    assert internals.at(3) is not internals.at(4)
