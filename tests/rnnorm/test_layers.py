"""Layers: names and shapes, call forms, running statistics and modes. Numbers are compared elsewhere."""

import copy
import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

import rnnorm
from rnnorm import norms

_GOLDEN = Path(__file__).with_name("golden.json")


def _described() -> dict[str, str]:
    """Names and shapes for every cell, of one layer and, normalized online, of two bidirectional ones."""
    chosen = [case for case in cases.PRODUCT if case.id.endswith(("-plain", "-online-scale-deep"))]
    kinds = ("-online-scale-", "-online-bare-", "-layer-", "-none-")
    return {
        case.id: ", ".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in case.build("auto").state_dict().items())
        for case in chosen
        if any(kind in case.id for kind in kinds)
    }


def test_names_and_shapes_are_those_on_disk() -> None:
    """Old checkpoints must load. After an intended change, `python tests/rnnorm/test_layers.py` rewrites the file."""
    assert _described() == json.loads(_GOLDEN.read_text())


def test_parameters_and_buffers_are_named_as_promised() -> None:
    layer = rnnorm.LSTM(3, 4, cell_norm=True, bidirectional=True)
    parameters = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm_scale", "norm_shift", "cell_norm_scale"]
    parameters += ["cell_norm_shift"]
    streams = [f"{prefix}_{stream}" for prefix in ("norm", "cell_norm") for stream in ("mean", "var", "u", "v")]
    for suffix in ("_l0", "_l0_reverse"):
        assert {name + suffix for name in parameters} <= dict(layer.named_parameters()).keys()
        for name in streams:
            assert layer.get_buffer(name + suffix).shape == ((16,) if name.startswith("norm") else (4,))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_batch_first_swaps_input_and_output_alone(cell: str) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    steps = getattr(rnnorm, cell)(3, 4, **options)
    torch.manual_seed(0)
    batch = getattr(rnnorm, cell)(3, 4, **options, batch_first=True)
    x = torch.randn(5, 2, 3)
    y, last = steps(x, lengths=[5, 3])
    found, other = batch(x.transpose(0, 1), lengths=[5, 3])
    torch.testing.assert_close(found, y.transpose(0, 1))
    torch.testing.assert_close(other, last)
    torch.testing.assert_close(batch.state_dict(), steps.state_dict())


@pytest.mark.parametrize("norm", ["online", "layer"])
def test_one_sequence_is_a_batch_of_one(norm: str) -> None:
    layer = rnnorm.LSTM(3, 4, norm=norm, bidirectional=True)
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 3)
    y, (h, c) = layer(x)
    expected, (expected_h, expected_c) = twin(x[:, None])
    torch.testing.assert_close((y, h, c), (expected[:, 0], expected_h[:, 0], expected_c[:, 0]))
    for lengths in (3, [3], torch.tensor(3)):
        short, _ = layer.eval()(x, lengths=lengths)
        assert short[3:].eq(0).all()
        torch.testing.assert_close(short[:3], layer(x[:3])[0])


@pytest.mark.parametrize("lengths", [[4, 1, 5], (4, 1, 5), torch.tensor([4, 1, 5]), torch.tensor([4, 1, 5]).int()])
def test_forms_of_lengths(lengths: Any) -> None:
    layer = rnnorm.GRU(3, 4, norm="layer", bidirectional=True)
    x = torch.randn(5, 3, 3)
    y, h = layer(x, lengths=lengths)
    for n, length in enumerate([4, 1, 5]):
        alone, h_alone = layer(x[:length, n])
        torch.testing.assert_close(y[:length, n], alone)
        torch.testing.assert_close(h[:, n], h_alone)
        assert y[length:, n].eq(0).all()


def test_what_lies_in_the_padding_does_not_matter() -> None:
    layer = rnnorm.LSTM(3, 4, bidirectional=True)
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 2, 3)
    filled = x.clone()
    filled[2:, 0] = float("nan")
    y, last = layer(x, lengths=[2, 5])
    found, other = twin(filled, lengths=[2, 5])
    torch.testing.assert_close((found, other), (y, last))
    found.sum().backward()
    y.sum().backward()
    torch.testing.assert_close(twin.weight_ih_l0.grad, layer.weight_ih_l0.grad)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())


def test_statistics_move_in_training_and_rest_in_evaluation() -> None:
    layer = rnnorm.GRU(3, 4)
    fresh = copy.deepcopy(layer.state_dict())
    layer.eval()
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    torch.testing.assert_close(layer.state_dict(), fresh, rtol=0, atol=0)
    layer.train()
    y, _ = layer(torch.randn(5, 2, 3))
    assert not torch.equal(layer.norm_mean_l0, fresh["norm_mean_l0"])
    assert layer.norm_u_l0.eq(0).all()
    y.sum().backward()
    assert (layer.norm_u_l0 != 0).all()


def test_reset_running_stats_leaves_parameters() -> None:
    layer = rnnorm.LSTM(3, 4, 2, cell_norm=True, bidirectional=True)
    fresh = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    layer(torch.randn(5, 2, 3))[0].square().sum().backward()
    layer.reset_running_stats()
    for name, value in layer.named_buffers():
        assert torch.equal(value, fresh[name]), name
    assert torch.equal(layer.weight_hh_l0, fresh["weight_hh_l0"] + 1)


@pytest.mark.parametrize("name", ["lstm-online-scale-deep", "gru-online-clamp-deep"])
def test_each_layer_and_direction_has_its_own_statistics(name: str) -> None:
    layer = cases.BY_ID[name].build("auto")
    layer.reset_running_stats()
    layer(torch.randn(5, 2, 4, dtype=torch.float64))
    means = torch.stack([value for key, value in layer.named_buffers() if key.startswith("norm_mean")])
    assert len(means) == 4
    assert torch.pdist(means).min() > 1e-3


def test_reverse_direction_is_the_forward_one_on_reversed_input() -> None:
    layer = rnnorm.LSTM(3, 4, bidirectional=True)
    single = rnnorm.LSTM(3, 4)
    own = {name: value for name, value in layer.state_dict().items() if name.endswith("_reverse")}
    single.load_state_dict({name.removesuffix("_reverse"): value for name, value in own.items()})
    x = torch.randn(5, 2, 3)
    y, (h, _) = layer(x)
    expected, (expected_h, _) = single(x.flip(0))
    torch.testing.assert_close(y[:, :, 4:], expected.flip(0))
    torch.testing.assert_close(h[1:], expected_h)
    torch.testing.assert_close(layer.norm_var_l0_reverse, single.norm_var_l0)


def test_normalization_is_on() -> None:
    """With any norm but "none", large weights do not saturate a layer, as they do torch's."""
    x = 50 * torch.randn(200, 8, 3)
    for norm in ("online", "layer", "rms"):
        torch.manual_seed(0)
        layer = rnnorm.RNN(3, 32, norm=norm)
        for _ in range(3):
            y, _ = layer(x)
        assert (y.abs() > 0.99).float().mean() < 0.25, norm
    assert (rnnorm.RNN(3, 32, norm="none")(x)[0].abs() > 0.99).float().mean() > 0.7


def test_affine_off_and_defaults() -> None:
    bare = rnnorm.LSTM(3, 4, norm=norms.Online(affine=False))
    assert not [name for name, _ in bare.named_parameters() if "norm" in name]
    assert bare.norm_mean_l0.shape == (16,)
    assert rnnorm.LSTM(3, 4).norm == norms.Online(8191 / 8192, 31 / 32, 1e-5, True, "scale")


def test_repr_says_what_differs_from_the_default() -> None:
    text = repr(rnnorm.LSTM(3, 4, 2, dropout=0.1, norm="layer", cell_norm=True, backend="scripted"))
    assert text == (
        "LSTM(3, 4, num_layers=2, dropout=0.1, cell_norm=True, backend='scripted', norm=Layer(eps=1e-05, affine=True))"
    )
    assert repr(rnnorm.RNN(3, 4, norm="none", nonlinearity="relu")) == "RNN(3, 4, nonlinearity='relu', norm=Identity())"


def test_flatten_parameters_does_nothing() -> None:
    layer = rnnorm.GRU(3, 4)
    before = copy.deepcopy(layer.state_dict())
    assert layer.flatten_parameters() is None
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_deterministic() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = rnnorm.LSTM(3, 4, 2, dropout=0.3)
        layer(torch.randn(5, 2, 3))[0].sum().backward()
        runs.append([*layer.state_dict().values(), *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


if __name__ == "__main__":
    _GOLDEN.write_text(json.dumps(_described(), indent=1) + "\n")


@pytest.mark.parametrize(
    ("old", "new"), [("layer", "rms"), ("online", norms.Online(0.5, 0.25, guard="clamp")), ("none", "none")], ids=str
)
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_a_norm_that_is_set_later_acts(kind: str, old: Any, new: Any) -> None:
    x = torch.randn(5, 2, 3) if kind == "LSTM" else torch.randn(2, 3)
    layers = []
    for norm in (old, new):
        torch.manual_seed(1)
        layers.append(getattr(rnnorm, kind)(3, 4, norm=norm))
    layers[0].norm = new
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=0, atol=0)
    assert repr(layers[0]) == repr(layers[1])
