"""The Mogrifier and the capped input gate: their definition, and equality of the backends that run them."""

from dataclasses import replace

import pytest
import torch
from cases import NORMS, OPTIONS, TOLERANCE, Case, assert_close, run

import rnnorm
from rnnorm import ops

KINDS = {
    "low rank": {"mogrifier_rounds": 5, "mogrifier_rank": 2},
    "full": {"mogrifier_rounds": 4, "cap_input_gate": True},
    "one": {"mogrifier_rounds": 1, "proj_size": 3},
    "capped": {"cap_input_gate": True},
}


def case(kind, norm, option):
    more = dict(OPTIONS[option])
    fields = {name: more.pop(name) for name in ("lengths", "training", "reset") if name in more}
    return Case(f"{kind}-{norm}-{option}", "LSTM", NORMS[norm], {**KINDS[kind], **more}, **fields)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("norm", ["online-scale", "layer", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_scripted_equals_reference(kind, norm, option):
    each = case(kind, norm, option)
    assert_close(run(each, "scripted"), run(each, "reference"), TOLERANCE[torch.float64])


@pytest.mark.parametrize("sizes", [{"T": 1}, {"N": 1}, {"I": 1, "H": 1}, {"H": 7, "I": 9}])
def test_sizes(sizes):
    each = replace(case("low rank", "layer", "plain"), **sizes)
    assert_close(run(each, "scripted"), run(each, "reference"), TOLERANCE[torch.float64])


def test_float32_and_cell_norm():
    each = case("low rank", "online-scale", "lengths")
    each = replace(each, options={**each.options, "cell_norm": True})
    assert_close(run(each, "scripted", torch.float32), run(each, "reference", torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "scripted"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("cap", [False, True])
def test_the_definition(backend, rank, rounds, cap):
    """A step by hand, from the named parts of the flat weight."""
    torch.manual_seed(0)
    options = {"mogrifier_rounds": rounds, "mogrifier_rank": rank, "cap_input_gate": cap}
    layer = rnnorm.LSTM(4, 3, norm="none", backend=backend, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.weight_mogrify_l0)
    x, h, c = (torch.randn(1, 2, size, dtype=torch.float64) for size in (4, 3, 3))
    y, (_, last) = layer(x, (h, c))
    x, h, c, flat = x[0], h[0], c[0], layer.weight_mogrify_l0
    for number in range(rounds):
        to, of = (4, 3) if number % 2 == 0 else (3, 4)
        if rank:
            down, up, bias, flat = flat.split([rank * of, to * rank, to, flat.numel() - rank * (of + to) - to])
            weight = up.view(to, rank) @ down.view(rank, of)
        else:
            weight, bias, flat = flat.split([to * of, to, flat.numel() - to * of - to])
            weight = weight.view(to, of)
        if number % 2 == 0:
            x = 2 * torch.sigmoid(h @ weight.T + bias) * x
        else:
            h = 2 * torch.sigmoid(x @ weight.T + bias) * h
    assert not flat.numel()
    pre = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
    i, f, g, o = pre.chunk(4, 1)
    i, f = i.sigmoid(), f.sigmoid()
    c = f * c + (torch.minimum(i, 1 - f) if cap else i) * g.tanh()
    torch.testing.assert_close(last[0], c)
    torch.testing.assert_close(y[0], o.sigmoid() * c.tanh())


def test_a_new_layer_gates_by_about_one_and_its_biases_are_zero():
    layer = rnnorm.LSTM(40, 30, mogrifier_rounds=3, mogrifier_rank=7)
    shapes = ops.mogrifier_shapes(40, 30, 3, 7)
    parts = layer.weight_mogrify_l0.split([torch.Size(shape).numel() for shape in shapes])
    for part, shape in zip(parts, shapes, strict=True):
        assert part.any() == (len(shape) == 2)
        assert part.abs().max() <= 30**-0.5
    assert rnnorm.LSTM(4, 3, mogrifier_rounds=0).state_dict().keys() == rnnorm.LSTM(4, 3).state_dict().keys()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_auto_takes_a_backend_that_can_and_the_others_say_why_not(options):
    x = torch.randn(2, 3, 4)
    ours, theirs = (rnnorm.LSTM(4, 6, backend=name, **options) for name in ("auto", "scripted"))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x)[0], theirs(x)[0])
    with pytest.raises(rnnorm.BackendUnavailable, match="does not run mogrifier_rounds and cap_input_gate"):
        rnnorm.LSTM(4, 6, backend="cpu", **options)(x)


@pytest.mark.parametrize("training", [True, False])
def test_the_operators_schema_holds(training):
    layer = rnnorm.LSTM(4, 6, **KINDS["low rank"], backend="scripted").train(training)
    x, h, c = torch.randn(5, 3, 4), torch.zeros(3, 6), torch.zeros(3, 6)
    operands = layer._operands(layer._own("_l0"), x, h, c, None)
    result = torch.library.opcheck(torch.ops.rnnorm.sequence.default, (*operands, *layer._spec()))
    assert set(result.values()) == {"SUCCESS"}


def test_under_autocast_products_run_in_its_dtype():
    layer = rnnorm.LSTM(8, 6, norm="layer", mogrifier_rounds=3, mogrifier_rank=2)
    x, found = torch.randn(5, 3, 8), []
    for backend in ("scripted", "reference"):
        layer.backend = backend
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        found.append([y.float(), *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("state", [0.0, 0.5])
def test_a_capped_gate_at_a_tie_has_the_gradient_of_the_minimum(state):
    """The gates of weights 0 are 1/2 each: i = 1 - f."""
    found = []
    for backend in ("reference", "scripted"):
        layer = rnnorm.LSTM(2, 3, norm="none", cap_input_gate=True, backend=backend)
        torch.nn.init.zeros_(layer.weight_hh_l0)
        for parameter in (layer.weight_ih_l0, layer.bias_ih_l0, layer.bias_hh_l0):
            torch.nn.init.zeros_(parameter)
        torch.nn.init.ones_(layer.bias_hh_l0[6:9])  # of g
        _, (_, c) = layer(torch.ones(1, 2, 2), (torch.zeros(1, 2, 3), torch.full((1, 2, 3), state)))
        c.sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*found)


def test_a_capped_gate_bounds_the_cell_state():
    layer = rnnorm.LSTM(4, 6, norm="none", cap_input_gate=True)
    _, (_, c) = layer(100 * torch.randn(50, 3, 4))
    assert c.abs().max() <= 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_cell_is_a_step_and_torchscript_compiles_it():
    options = {"mogrifier_rounds": 3, "mogrifier_rank": 2, "norm": "layer"}
    layer, cell = rnnorm.LSTM(4, 6, **options), rnnorm.LSTMCell(4, 6, **options)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(5, 3, 4)
    expected, (h, c) = layer(x)
    state = None
    for step in x:
        state = cell(step, state)
    torch.testing.assert_close(state, (h[0], c[0]))
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x)[0], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rnnorm.GRU(4, 6, mogrifier_rounds=2), "must be 0 and False for a GRU; got 2 and False"),
        (lambda: rnnorm.RNN(4, 6, cap_input_gate=True), "must be 0 and False for a RNN; got 0 and True"),
        (lambda: rnnorm.LSTM(4, 6, mogrifier_rounds=-1), "mogrifier_rounds must be an int of at least 0; got -1"),
        (lambda: rnnorm.LSTM(4, 6, mogrifier_rank=1.5), "mogrifier_rank must be an int of at least 0; got 1.5"),
        (lambda: rnnorm.LSTM(4, 6, norm="none", mogrifier_rounds=1).to_torch(), "for to_torch; got 1 and False"),
        (lambda: rnnorm.LSTM(4, 6, cap_input_gate=True).to_plain(), "for to_plain; got 0 and True"),
    ],
)
def test_what_cannot_be(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
