import pytest
import torch

import rnnorm
from lm import config
from lm.model import LanguageModel, LockedDropout, Objective, by_layer, detach, sketch, state_of, state_tensors
from lm.stream import Window

IDS = torch.tensor([[1, 2], [3, 4], [5, 6], [1, 1]])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("norm", ["online", "layer", "rms", "none"])
def test_every_cell_and_norm_trains(model, cell, norm):
    net = model(cell=cell, norm=norm, num_layers=2, dropout=0.3)
    hidden, state = net(IDS)
    assert hidden.shape == (4, 2, 12)
    total, count = net.loss(hidden, IDS)
    assert count == 8
    total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    net(IDS, detach(state))


def test_the_norm_reaches_the_layers(model):
    net = model(alpha_fwd=0.75, alpha_bwd=0.5, guard="clamp")
    assert net.layers.norm == rnnorm.norms.Online(alpha_fwd=0.75, alpha_bwd=0.5, guard="clamp")
    assert net.layers.norm != model(alpha_fwd=0.75, alpha_bwd=0.5, guard="clamp", control_floor=0.0).layers.norm
    assert model(control_floor=1e-5).layers.norm == rnnorm.norms.Online(control_floor=1e-5)
    assert model(norm="none", cell="rnn_relu").layers.cell == "rnn_relu"
    assert model(cell_norm=True).layers.cell_norm


@pytest.mark.parametrize("stacked", [{}, {"sum_layers": True}])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"weight_dropout": 0.1}, {"weight_dropout": 0.1}),
        ({"recurrent_dropout": 0.2}, {"recurrent_dropout": 0.2}),
        ({"zoneout": 0.3}, {"zoneout": 0.3}),
        ({"zoneout": 0.3, "zoneout_c": 0.4}, {"zoneout": (0.3, 0.4)}),
        ({"cell_norm": True}, {"cell_norm": True}),
        ({"cap_input_gate": True}, {"cap_input_gate": True}),
        ({"mogrifier_rounds": 3}, {"mogrifier_rounds": 3, "mogrifier_rank": 0}),
        ({"mogrifier_rounds": 2, "mogrifier_rank": 4}, {"mogrifier_rounds": 2, "mogrifier_rank": 4}),
    ],
)
def test_every_option_reaches_every_layer(model, stacked, given, kept):
    def options(net):
        layers = [module for module in net.layers.modules() if isinstance(module, rnnorm.LSTM)]
        assert sum(layer.num_layers for layer in layers) == 2
        assert len(layers) == (2 if stacked else 1)
        return [{name: getattr(layer, name) for name in kept} for layer in layers]

    for found, plain in zip(*(options(model(num_layers=2, **stacked, **each)) for each in (given, {})), strict=True):
        assert found == kept
        assert found != plain


def test_windows_carry_the_state(model):
    net = model().eval()
    whole, _ = net(IDS)
    first, state = net(IDS[:1])
    rest, _ = net(IDS[1:], detach(state))
    torch.testing.assert_close(torch.cat([first, rest]), whole)


def test_tied_is_one_weight(model):
    tied, untied = model(tied=True), model(tied=False)
    assert tied.decoder.weight is tied.embedding.weight
    assert untied.decoder.weight is not untied.embedding.weight
    assert model(tied=False, embedding_size=5).embedding.embedding_dim == 5


def test_initial_ranges(model):
    default = model()
    assert 0.09 < default.embedding.weight.abs().max() <= 0.1
    wide = model(embedding_range=1.0, tied=False)
    assert 0.9 < wide.embedding.weight.abs().max() <= 1.0
    assert wide.decoder.weight.abs().max() <= 0.1
    assert not default.decoder.bias.any()
    ranged = model(init_range=0.03, tied=False, norm="layer")
    own = [p for name, p in ranged.named_parameters() if "norm" not in name]
    assert all(0 < p.abs().max() <= 0.03 for p in own)
    assert torch.equal(ranged.layers.norm_scale_l0, torch.ones(48))


def test_dropout_is_never_in_the_carried_state(model):
    net = model(norm="none", dropout=0.9)
    net.input_dropout.p = 0.0
    hidden, (h, _) = net(IDS)
    assert (hidden == 0).any()
    assert (h != 0).all()
    net.eval()
    _, (calm, _) = net(IDS)
    torch.testing.assert_close(h, calm)


def test_each_dropout_has_its_own_rate(model):
    net = model(dropout=0.5, input_dropout=0.1, num_layers=2)
    assert (net.input_dropout.p, net.layers.dropout, net.output_dropout.p) == (0.1, 0.5, 0.5)
    assert model(dropout=0.5).layers.dropout == 0


def test_embedding_dropout_drops_whole_words(model):
    net = model(norm="none", embedding_dropout=0.5)
    seen = []
    net.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.arange(10).repeat(2)[:, None]
    net(ids)
    rows = seen[0][:, 0]
    torch.testing.assert_close(rows[:10], rows[10:])
    dropped = (rows[:10] == 0).all(1)
    assert 0 < dropped.sum() < 10
    expected = 2 * net.embedding.weight[:10][~dropped]
    torch.testing.assert_close(rows[:10][~dropped], expected)


def test_padded_columns_equal_their_own_runs(model):
    net = model().eval()
    hidden, (h, c) = net(IDS, None, torch.tensor([4, 2]))
    alone, (own_h, own_c) = net(IDS[:2, 1:])
    torch.testing.assert_close(hidden[:2, 1:], alone)
    torch.testing.assert_close(h[:, 1:], own_h)
    torch.testing.assert_close(c[:, 1:], own_c)


def test_log_probs_and_nll_agree(model):
    net = model().eval()
    hidden, _ = net(IDS)
    chosen = -net.log_probs(hidden).gather(2, IDS[..., None])[..., 0]
    torch.testing.assert_close(net.token_nll(hidden, IDS), chosen.detach().double())


def test_state_is_taken_apart_and_put_together(model):
    for cell in ("lstm", "gru"):
        _, state = model(cell=cell)(IDS)
        again = state_of(state_tensors(state))
        assert type(again) in (type(state), tuple)
        assert all(torch.equal(a, b) for a, b in zip(state_tensors(again), state_tensors(state), strict=True))
        assert not any(t.requires_grad for t in state_tensors(detach(state)))
    assert state_of(state_tensors(None)) is None


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("norm", ["online", "layer", "none"])
def test_a_sketch_is_the_model_without_values(cell, norm):
    settings = config.build({"model": {"cell": cell, "norm": norm, "hidden_size": 12, "num_layers": 2}}).model
    before = torch.get_rng_state()
    drawn = sketch(settings, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.decoder.weight is drawn.embedding.weight
    real = LanguageModel(settings, 20)
    found, wanted = (
        {name: (value.shape, value.dtype) for name, value in each.state_dict().items()} for each in (drawn, real)
    )
    assert found == wanted
    assert {value.device.type for value in drawn.state_dict().values()} == {"meta"}
    _, state = real(IDS)
    assert real.state_shapes(2) == [tuple(tensor.shape) for tensor in state_tensors(state)]


SHAPES = {
    "mogrifier": {"mogrifier_rounds": 3, "mogrifier_rank": 2, "cap_input_gate": True, "num_layers": 2},
    "summed": {"sum_layers": True, "num_layers": 3, "mogrifier_rounds": 2, "embedding_size": 5},
    "mixture": {"decoder": "mixture", "experts": 3, "embedding_size": 5, "latent_dropout": 0.3},
    "untied mixture": {"decoder": "mixture", "experts": 2, "tied": False, "num_layers": 2},
    "adaptive": {"decoder": "adaptive", "tied": False, "cutoffs": [4]},
    "sizes": {"num_layers": 3, "layer_sizes": [7, 5, 12]},
    "locked": {"num_layers": 2, "locked_dropout": True, "dropout": 0.5},
    "projected": {"num_layers": 2, "embedding_size": 5},
    "one": {"layer_sizes": [9], "locked_dropout": True},
}


@pytest.mark.parametrize(
    ("cell", "shape"), [*(("lstm", shape) for shape in SHAPES), *(("gru", shape) for shape in ("sizes", "locked"))]
)
def test_layers_of_any_sizes_train_and_carry_their_states(model, cell, shape):
    net = model(cell=cell, **SHAPES[shape])
    hidden, state = net(IDS)
    assert hidden.shape == (4, 2, net.recurrent[-1].hidden_size)
    assert net.state_shapes(2) == [tuple(tensor.shape) for tensor in state_tensors(state)]
    net.loss(hidden, IDS)[0].backward()
    assert all(p.grad is not None and p.grad.any() for name, p in net.named_parameters() if "shift" not in name)
    net.eval()
    whole, last = net(IDS)
    first, state = net(IDS[:1])
    rest, again = net(IDS[1:], detach(state))
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(state_tensors(again), state_tensors(last))
    torch.testing.assert_close(
        net.token_nll(whole, IDS), -net.log_probs(whole).gather(2, IDS[..., None])[..., 0].detach().double()
    )


def test_locked_layers_compute_what_one_module_of_several_does(model):
    """In evaluation mode, and in training mode without dropout."""
    one, stack = model(num_layers=2), model(num_layers=2, locked_dropout=True)
    weights = one.state_dict()
    own = [name.removeprefix("layers.") for name in stack.state_dict() if name.startswith("layers.")]
    names = {
        f"layers.{mine}": f"layers.{theirs}"
        for mine, (theirs, _) in zip(own, by_layer((n, n) for n in own), strict=True)
    }
    assert {*names.values()} <= weights.keys()
    stack.load_state_dict({name: weights[names.get(name, name)] for name in stack.state_dict()})
    for training in (True, False):
        stack.train(training), one.train(training)
        ours, theirs = stack(IDS), one(IDS)
        torch.testing.assert_close(ours[0], theirs[0])
        h, c = theirs[1]
        torch.testing.assert_close(ours[1], (h[:1], c[:1], h[1:], c[1:]))


def test_a_locked_mask_is_one_for_all_steps_and_another_for_each_column(model):
    net = model(num_layers=2, locked_dropout=True, dropout=0.5, input_dropout=0.25)
    seen = []
    for layer in net.recurrent:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.ones(6, 40, dtype=torch.int64)
    raw, dropped, _ = net.outputs(ids)
    embedded, between = (x == 0 for x in seen)
    for zeros, rate in ((embedded, 0.25), (between, 0.5), (dropped == 0, 0.5)):
        assert torch.equal(zeros, zeros[:1].expand_as(zeros))
        assert zeros[0].float().mean() == pytest.approx(rate, abs=0.1)
        assert (zeros[0] != zeros[0, :1]).any(), "columns have masks of their own"
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], raw[kept] / 0.5)
    net.eval()
    raw, dropped, _ = net.outputs(ids)
    assert torch.equal(raw, dropped)


def test_summed_layers_add_up(model):
    net = model(num_layers=3, sum_layers=True).eval()
    seen = []
    for layer in net.recurrent:
        layer.register_forward_hook(lambda _, inputs, result: seen.append((inputs[0], result[0])))
    hidden, _ = net(IDS)
    assert torch.equal(seen[1][0], seen[0][1]), "a layer reads the one before it alone"
    torch.testing.assert_close(hidden, sum(output for _, output in seen))
    assert model(sum_layers=True).layers.num_layers == 1


def test_a_tied_weight_is_read_through_a_projection(model):
    net = model(embedding_size=5, init_range=0.03).eval()
    assert net.decoder.weight is net.embedding.weight
    assert 0 < net.decoder.projection.weight.abs().max() <= 0.03
    hidden, _ = net(IDS)
    logits = hidden @ net.decoder.projection.weight.T @ net.embedding.weight.T + net.decoder.bias
    torch.testing.assert_close(net.log_probs(hidden), logits.log_softmax(-1))
    assert model(embedding_size=5, tied=False).decoder.projection is None


def test_initial_ranges_of_other_decoders(model):
    mixed = model(decoder="mixture", init_range=0.03, embedding_size=5)
    assert mixed.decoder.weight is mixed.embedding.weight
    adaptive = model(decoder="adaptive", tied=False, init_range=0.03)
    for net in (mixed, adaptive):
        assert all(0 < p.abs().max() <= 0.03 for name, p in net.named_parameters() if "norm" not in name)
    assert model(decoder="mixture", dropout=0.4).decoder.dropout.p == 0.4
    assert isinstance(model(decoder="mixture", locked_dropout=True).decoder.dropout, LockedDropout)


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_a_sketch_of_any_shape(settings):
    built = config.build({"model": {"hidden_size": 12, **settings}}).model
    real, drawn = LanguageModel(built, 20).state_dict(), sketch(built, 20).state_dict()
    assert {n: (v.shape, v.dtype) for n, v in real.items()} == {n: (v.shape, v.dtype) for n, v in drawn.items()}


@pytest.mark.parametrize("padded", [False, True])
def test_activation_penalties(model, padded):
    net = model(dropout=0.5, norm="layer").double()
    lengths, mask = (
        (torch.tensor([4, 2]), torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]).bool())
        if padded
        else (
            None,
            None,
        )
    )
    window = Window(IDS, IDS, lengths, mask)
    real = torch.ones(4, 2, dtype=torch.bool) if mask is None else mask
    seed = lambda: torch.manual_seed(3)  # noqa: E731
    seed()
    raw, dropped = (value.detach() for value in net.outputs(IDS, None, lengths)[:2])
    count = int(real.sum())
    squares = [float(row.square().sum()) for row in dropped[real]]
    changes = [float((raw[t + 1, n] - raw[t, n]).square().sum()) for t in range(3) for n in range(2) if real[t + 1, n]]
    for ar, tar in ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0)):
        seed()
        loss, nats, _ = Objective(net, ar, tar)(window, None, count / len(changes))
        expected = count * (ar * sum(squares) / (12 * len(squares)) + tar * sum(changes) / (12 * len(changes)))
        assert (loss - nats).item() == pytest.approx(expected, rel=1e-9)
    one = Window(IDS[:1], IDS[:1], None, None)
    seed()
    loss, nats, _ = Objective(net, 0.0, 3.0)(one, None, 2.0)
    assert torch.equal(loss, nats), "the temporal one is 0 for one step"


@pytest.mark.parametrize("precision", ["float32", "bfloat16-decoder", "bfloat16"])
def test_precision_holds_for_all_products_or_the_decoders(precision):
    net = LanguageModel(config.ModelConfig(hidden_size=12, dropout=0.0, norm="layer"), 9).train()
    seen = {}
    net.layers.register_forward_hook(lambda module, given, result: seen.update(layers=result[0].dtype))
    net.decoder.loss = lambda hidden, *rest, loss=net.decoder.loss: (
        seen.update(decoder=torch.is_autocast_enabled("cpu")),
        loss(hidden, *rest),
    )[1]
    loss, nats, _ = Objective(net, ar=1.0, precision=precision)(Window(IDS, IDS, None, None), None, 1.0)
    assert seen == {
        "layers": torch.bfloat16 if precision == "bfloat16" else torch.float32,
        "decoder": precision != "float32",
    }
    assert (loss.dtype, nats.dtype) == (torch.float64, torch.float64)
