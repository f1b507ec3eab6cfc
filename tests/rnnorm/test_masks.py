"""Dropout inside the recurrence and resets, against a separate loop in the tests; what they do not affect."""

import copy
import itertools
from typing import Any

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnorm
from rnnorm import _masks, norms
from rnnorm.ops import registry

pytestmark = pytest.mark.usefixtures("double")
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
A_F, A_B, EPS = 0.93, 0.85, 1e-5
UNSORTED = [3, 5, 1, 4]
NORMS: dict[str, Any] = {
    "online": norms.Online(A_F, A_B, EPS, guard="none"),
    "layer": "layer",
    "rms": "rms",
    "none": "none",
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm-proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
}
RATES: dict[str, dict[str, Any]] = {
    "recurrent": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "weight": {"weight_dropout": 0.5},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "weight_dropout": 0.5},
}


class _Step(torch.autograd.Function):
    """Section 1 of the algorithm for the samples of one step, one by one; states [4, C] are mean, var, u, v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, states: Tensor) -> Tensor:
        y, s = torch.empty_like(x), torch.empty_like(x)
        for n in range(len(x)):
            mean, var = states[0].clone(), states[1].clone()
            s[n] = (var + EPS).sqrt()
            d = x[n] - mean
            y[n] = d / s[n]
            states[1] = A_F * var + A_F * (1 - A_F) * d * d
            states[0] = mean + (1 - A_F) * d
        ctx.kept = y, s, states
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        y, s, states = ctx.kept
        dx = torch.empty_like(g)
        for n in range(len(g)):
            e = g[n] - (1 - A_B) * states[3] * y[n]
            states[3] += e * y[n]
            dx[n] = e / s[n] - (1 - A_B) * states[2]
            states[2] += dx[n]
        return dx, None


class _Definition:
    """One direction of a layer, step by step, from the parameters of `layer` and the masks of a call."""

    def __init__(self, layer: Any, suffix: str) -> None:
        self.layer, self.cell, self.kind = layer, layer.cell, layer.norm.kind
        self.p = {n.removesuffix(suffix): p for n, p in layer.named_parameters() if n.endswith(suffix)}
        held = {n.removesuffix(suffix): b.clone() for n, b in layer.named_buffers() if n.endswith(suffix)}
        if self.kind == "online":
            self.states = torch.stack([held[f"norm_{name}"] for name in ("mean", "var", "u", "v")])

    def normalize(self, pre: Tensor, left: int) -> Tensor:
        if self.kind == "none":
            return pre
        span = slice(left, left + pre.size(1))
        if self.kind == "online":
            if self.layer.training:
                y = _Step.apply(pre, self.states[:, span])
            else:
                y = (pre - self.states[0, span]) / (self.states[1, span] + EPS).sqrt()
        else:
            H = self.layer.hidden_size
            gates = pre.unflatten(1, (-1, H))
            y = (F.layer_norm(gates, (H,)) if self.kind == "layer" else F.rms_norm(gates, (H,), eps=EPS)).flatten(1)
        return y * self.p["norm_scale"][span] + self.p["norm_shift"][span]

    def step(self, x: Tensor, entering: Tensor, h: Tensor, c: Any, weight: Tensor) -> tuple[Tensor, Any]:
        px = F.linear(x, self.p["weight_ih"], self.p["bias_ih"])
        ph = F.linear(entering, weight, self.p["bias_hh"])
        H = self.layer.hidden_size
        if self.cell == "lstm":
            i, f, g, o = self.normalize(px + ph, 0).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.cell == "gru":
            r, z = self.normalize(px[:, : 2 * H] + ph[:, : 2 * H], 0).sigmoid().chunk(2, 1)
            n = self.normalize(px[:, 2 * H :] + r * ph[:, 2 * H :], 2 * H).tanh()
            return (1 - z) * n + z * h, None
        q = self.normalize(px + ph, 0)
        return q.tanh() if self.cell == "rnn_tanh" else q.relu(), None

    def run(self, x: Tensor, h: Tensor, c: Any, lengths: Any, order: Any, starts: Any, masks: dict[str, Any]) -> Any:
        """`order` are the steps in processing order, `starts(t, n)` says where the state before step t is zero."""
        y = [torch.zeros_like(h) for _ in range(len(x))]
        for t in order:
            rows = [n for n in range(x.size(1)) if lengths is None or lengths[n] > t]
            old_h = torch.stack([torch.zeros_like(h[n]) if starts(t, n) else h[n] for n in rows])
            old_c = None
            if c is not None:
                old_c = torch.stack([torch.zeros_like(c[n]) if starts(t, n) else c[n] for n in rows])
            mask = masks["recurrent"]
            entering = old_h if mask is None else old_h * mask[rows]
            weight = self.p["weight_hh"] if masks["weight"] is None else self.p["weight_hh"] * masks["weight"]
            new_h, new_c = self.step(x[t, rows], entering, old_h, old_c, weight)
            if "weight_hr" in self.p:
                new_h = F.linear(new_h, self.p["weight_hr"])
            if masks["zoneout_h"] is not None:
                share = masks["zoneout_h"][t, rows].double()
                new_h = share * old_h + (1 - share) * new_h
            if masks["zoneout_c"] is not None and new_c is not None:
                share = masks["zoneout_c"][t, rows].double()
                new_c = share * old_c + (1 - share) * new_c
            h = h.index_copy(0, torch.tensor(rows), new_h)
            y[t] = y[t].index_copy(0, torch.tensor(rows), new_h)
            c = None if c is None else c.index_copy(0, torch.tensor(rows), new_c)
        return torch.stack(y), h, c


class _Recorder:
    """Keeps the masks that a call draws, for each direction in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: dict[str, list[Any]] = {"dropped": [], "recurrent": [], "zoneout": []}
        for name, found in self.drawn.items():
            own = getattr(_masks, name)
            monkeypatch.setattr(
                _masks, name, lambda *args, own=own, found=found: (found.append(own(*args)), found[-1])[1]
            )

    def take(self, layer: Any) -> dict[str, Any]:
        """Those of the next direction."""
        weight = None
        if layer.weight_dropout and layer.training:
            weight = (self.drawn["dropped"].pop(0).detach() != 0) / (1 - layer.weight_dropout)
        recurrent = self.drawn["recurrent"].pop(0)
        zoneout = [self.drawn["zoneout"].pop(0) for _ in range(2 if layer.cell == "lstm" else 1)]
        return {"weight": weight, "recurrent": recurrent, "zoneout_h": zoneout[0], "zoneout_c": zoneout[-1]}


def _build(kind: str, norm: str, backend: str, **options: Any) -> Any:
    torch.manual_seed(1)
    name, own = LAYERS[kind]
    layer = getattr(rnnorm, name)(3, 6, bidirectional=True, norm=NORMS[norm], backend=backend, **own, **options)
    with torch.no_grad():
        for key, value in layer.state_dict().items():
            if "norm" in key:
                value.add_(0.3 * torch.rand_like(value))
    return layer


def _record(outputs: list[Tensor], inputs: list[Tensor], layer: Any) -> dict[str, Tensor]:
    """Gradients of a random projection of `outputs`, by name."""
    generator = torch.Generator().manual_seed(9)
    total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in outputs)
    names = [*(str(k) for k in range(len(inputs))), *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad(total, [*inputs, *layer.parameters()])  # type: ignore[arg-type]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_layer_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, backend: str, norm: str, kind: str, rates: str, training: bool
) -> None:
    """Lengths, resets, both directions, gradients and running statistics."""
    cases.skip_unless_runs(backend)
    layer = _build(kind, norm, backend, **RATES[rates]).train(training)
    T, N = 5, 4
    lengths = UNSORTED if kind in ("lstm", "gru", "rnn") else None
    generator = torch.Generator().manual_seed(2)
    reset = torch.rand(T, N, generator=generator) < 0.3
    x = torch.randn(T, N, 3, generator=generator, requires_grad=True)
    widths = [layer.proj_size or 6, 6][: 2 if kind.startswith("lstm") else 1]
    states = [torch.randn(2, N, width, generator=generator, requires_grad=True) for width in widths]
    definitions = [_Definition(layer, suffix) for suffix in ("_l0", "_l0_reverse")]
    recorder = _Recorder(monkeypatch)
    y, last = layer(x, tuple(states) if len(states) == 2 else states[0], lengths=lengths, reset=reset)
    lasts = list(last) if isinstance(last, tuple) else [last]
    found = _record([y, *lasts], [x, *states], layer)

    def forwards(t: int, n: int) -> bool:
        return bool(reset[t, n])

    def backwards(t: int, n: int) -> bool:
        return t + 1 < (T if lengths is None else lengths[n]) and bool(reset[t + 1, n])

    ys, ends = [], []
    for d, (definition, starts) in enumerate(zip(definitions, (forwards, backwards), strict=True)):
        c = states[1][d] if len(states) == 2 else None
        order = range(T)[:: -1 if d else 1]
        one, *end = definition.run(x, states[0][d], c, lengths, order, starts, recorder.take(layer))
        ys.append(one)
        ends.append([value for value in end if value is not None])
    expected_y = torch.cat(ys, 2)
    torch.testing.assert_close(y, expected_y, **CLOSE)
    expected_lasts = [torch.stack(values) for values in zip(*ends, strict=True)]
    torch.testing.assert_close(lasts, expected_lasts, **CLOSE)
    expected = _record([expected_y, *expected_lasts], [x, *states], layer)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    if norm == "online":
        for definition, suffix in zip(definitions, ("_l0", "_l0_reverse"), strict=True):
            for row, name in enumerate(("mean", "var", "u", "v")):
                torch.testing.assert_close(layer.get_buffer(f"norm_{name}{suffix}"), definition.states[row], **CLOSE)


@pytest.mark.parametrize("cell_norm", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("backend", registry.names())
def test_reset_equals_separate_calls(backend: str, norm: str, kind: str, cell_norm: bool) -> None:
    cases.skip_unless_runs(backend)
    if cell_norm and (norm == "none" or not kind.startswith("lstm")):
        pytest.skip("no cell norm")
    layer = _build(kind, norm, backend, **({"cell_norm": True} if cell_norm else {}))
    x = torch.randn(7, 2, 3)
    borders = [(0, 3, 7), (0, 1, 5, 7)]  # of the two sequences of each row
    reset = torch.zeros(7, 2, dtype=torch.bool)
    for n, starts in enumerate(borders):
        reset[list(starts[:-1]), n] = True
    y, last = layer(x, reset=reset)
    for n, starts in enumerate(borders):
        pieces = [layer(x[a:b, n]) for a, b in itertools.pairwise(starts)]
        torch.testing.assert_close(y[:, n], torch.cat([piece[0] for piece in pieces]), rtol=1e-12, atol=1e-12)
        first, end = pieces[0][1], pieces[-1][1]
        for found, ends, begins in zip(
            *((value if isinstance(value, tuple) else (value,)) for value in (last, end, first)), strict=True
        ):
            torch.testing.assert_close(found[0, n], ends[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[1, n], begins[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", registry.names())
def test_reset_of_equal_borders_equals_separate_calls_of_an_online_layer(backend: str) -> None:
    """If all rows begin at the same steps, the statistics see the same order of samples."""
    cases.skip_unless_runs(backend)
    torch.manual_seed(1)
    layer = rnnorm.LSTM(3, 6, norm=norms.Online(A_F, A_B), backend=backend)
    twin = copy.deepcopy(layer)
    x = torch.randn(7, 2, 3)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[[0, 3]] = True
    y, _ = layer(x, reset=reset)
    parts = [twin(part)[0] for part in (x[:3], x[3:])]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    torch.cat(parts).backward(g)
    for (name, found), expected in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-11, msg=name)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_reset_of_packed_and_batch_first_and_single_sequences(kind: str, backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _build(kind, "layer", backend, num_layers=2)
    x, reset = torch.randn(5, 4, 3), torch.rand(5, 4) < 0.4
    y, last = layer(x, lengths=UNSORTED, reset=reset)
    packed = pack_padded_sequence(x, torch.tensor(UNSORTED), enforce_sorted=False)
    out, packed_last = layer(packed, reset=reset)
    torch.testing.assert_close(pad_packed_sequence(out, total_length=5)[0], y)
    torch.testing.assert_close(packed_last, last)
    layer.batch_first = True
    torch.testing.assert_close(layer(x.transpose(0, 1), lengths=UNSORTED, reset=reset.t())[0].transpose(0, 1), y)
    one, _ = layer(x[:, 1], reset=reset[:, 1])
    torch.testing.assert_close(one, y[:, 1])


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("kind", LAYERS)
def test_rates_of_zero_change_no_bit_and_evaluation_drops_nothing(kind: str, backend: str) -> None:
    cases.skip_unless_runs(backend)
    plain = _build(kind, "online", backend)
    made = _build(kind, "online", backend, recurrent_dropout=0.0, zoneout=0.0, weight_dropout=0.0)
    dropping = _build(kind, "online", backend, recurrent_dropout=0.5, weight_dropout=0.5).eval()
    x = torch.randn(5, 4, 3)
    none = torch.zeros(5, 4, dtype=torch.bool)
    assert torch.equal(dropping(x)[0], copy.deepcopy(plain).eval()(x)[0])
    expected = plain(x)[0]
    expected.sum().backward()
    state = torch.random.get_rng_state()
    y = made(x)[0]
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn"
    y.sum().backward()
    assert torch.equal(y, expected)
    for one, other in zip(made.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    again = _build(kind, "online", backend)
    assert torch.equal(again(x, reset=none)[0], expected)


@pytest.mark.parametrize("rate", ["weight_dropout", "recurrent_dropout", "zoneout"])
def test_one_seed_gives_one_result_on_every_backend(rate: str) -> None:
    results = []
    for backend in registry.names():
        cases.skip_unless_runs(backend)
        layer = _build("lstm", "layer", backend, **{rate: 0.4})
        torch.manual_seed(7)
        results.append(layer(torch.ones(5, 4, 3))[0])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])
    torch.manual_seed(8)
    assert not torch.allclose(layer(torch.ones(5, 4, 3))[0], results[-1])


def test_one_mask_serves_all_steps_and_weights_are_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _build("lstm", "none", "auto", weight_dropout=0.5, recurrent_dropout=0.5)
    before = copy.deepcopy(layer.state_dict())
    recorder = _Recorder(monkeypatch)
    layer(torch.randn(50, 4, 3))[0].sum().backward()
    assert [mask.shape for mask in recorder.drawn["recurrent"]] == [(4, 6)] * 2
    assert [weight.shape for weight in recorder.drawn["dropped"]] == [(24, 6)] * 2
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_masks_have_their_expectation(rate: float) -> None:
    torch.manual_seed(3)
    h, n = torch.zeros(200, 50), 200 * 50
    mask = _masks.recurrent(rate, True, h, torch.float64)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - rate)}
    deviation = (rate / (1 - rate) / n) ** 0.5
    assert abs(mask.mean().item() - 1) < 5 * deviation
    stays = _masks.zoneout(rate, True, 20, h, torch.float64)
    assert stays.dtype == torch.bool
    assert abs(stays.double().mean().item() - rate) < 5 * (rate * (1 - rate) / (20 * n)) ** 0.5
    assert torch.equal(_masks.zoneout(rate, False, 20, h, torch.float64), torch.full((20, 200, 50), rate))
    weight = _masks.dropped(torch.ones(200, 50), rate, True)
    assert abs(weight.mean().item() - 1) < 5 * deviation


@pytest.mark.parametrize("backend", registry.names())
def test_zoneout_in_evaluation_is_the_mean_over_masks_of_a_step(backend: str) -> None:
    """Of one step from a given state: later ones are not linear in their masks."""
    cases.skip_unless_runs(backend)
    layer = rnnorm.LSTM(3, 6, norm="layer", backend=backend, zoneout=(0.3, 0.1))
    N = 20_000
    x, h, c = torch.randn(1, 1, 3), torch.randn(1, 1, 6), torch.randn(1, 1, 6)
    with torch.no_grad():
        expected = layer.eval()(x, (h, c))[1]
        torch.manual_seed(0)
        found = layer.train()(x.expand(1, N, 3), (h.expand(1, N, 6).contiguous(), c.expand(1, N, 6).contiguous()))[1]
    for one, mean, old in zip(found, expected, (h, c), strict=True):
        spread = (one[0] - old[0]).abs().max().item()
        assert (one.mean(1) - mean[0]).abs().max().item() < 5 * spread * (0.25 / N) ** 0.5


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("backend", registry.names())
def test_gradcheck_with_fixed_masks(kind: str, backend: str) -> None:
    cases.skip_unless_runs(backend)
    layer = _build(kind, "layer", backend, recurrent_dropout=0.4, zoneout=0.3, weight_dropout=0.3)
    x = torch.randn(3, 2, 3, requires_grad=True)
    reset = torch.tensor([[False, True], [True, False], [False, True]])

    def call(x: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(5)
        changed = {"weight_hh_l0": weight}
        return torch.func.functional_call(layer, changed, (x,), {"reset": reset})[0]

    weight = layer.weight_hh_l0.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight))


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("backend", registry.names())
def test_cells_equal_layers_of_one_step(cell: str, backend: str) -> None:
    cases.skip_unless_runs(backend)
    rates = {"recurrent_dropout": 0.4, "zoneout": 0.3, "weight_dropout": 0.5}
    torch.manual_seed(1)
    layer = getattr(rnnorm, cell.removesuffix("Cell"))(3, 6, norm="layer", backend=backend, **rates)
    torch.manual_seed(1)
    single = getattr(rnnorm, cell)(3, 6, norm="layer", backend=backend, **rates)
    x, reset = torch.randn(4, 3), torch.tensor([True, False, True, False])
    states = [torch.randn(4, 6) for _ in range(2 if cell == "LSTMCell" else 1)]
    torch.manual_seed(2)
    expected = layer(
        x[None], tuple(s[None] for s in states) if len(states) == 2 else states[0][None], reset=reset[None]
    )[1]
    torch.manual_seed(2)
    found = single(x, tuple(states) if len(states) == 2 else states[0], reset=reset)
    for one, other in zip(
        found if isinstance(found, tuple) else (found,),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        torch.testing.assert_close(one, other[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("form", ["compiled", "scripted", "exported"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_compiled_scripted_and_exported_layers_do_the_same(kind: str, form: str) -> None:
    layer = _build(kind, "layer", "auto", recurrent_dropout=0.4, zoneout=0.3, weight_dropout=0.5)
    x, reset = torch.randn(5, 4, 3), torch.rand(5, 4) < 0.3
    if form == "exported":
        layer.eval()
        program = torch.export.export(layer, (x,), {"reset": reset}).module()
        torch.testing.assert_close(program(x, reset=reset)[0], layer(x, reset=reset)[0])
        return
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if form == "compiled" else torch.jit.script(layer)
    torch.manual_seed(4)
    found = call(x, reset=reset)[0]
    torch.manual_seed(4)
    torch.testing.assert_close(found, layer(x, reset=reset)[0])


@pytest.mark.parametrize("norm", ["online", "layer", "rms"])
def test_norm_init_is_the_scale_of_every_norm(norm: str) -> None:
    layer = rnnorm.LSTM(3, 4, num_layers=2, norm=norm, cell_norm=True, norm_init=0.1)
    scales = {name: p for name, p in layer.named_parameters() if "norm_scale" in name}
    assert len(scales) == 4
    assert all(torch.equal(p, torch.full_like(p, 0.1)) for p in scales.values())
    plain = rnnorm.LSTM(3, 4, norm=norm)
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in plain.named_parameters() if "norm_scale" in name)
    assert "norm_init=0.1" in repr(layer)


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("LSTM", {"weight_dropout": 1.5}, r"weight_dropout must be a probability in \[0, 1\]; got 1.5"),
        ("GRU", {"recurrent_dropout": -0.1}, r"recurrent_dropout must be a probability in \[0, 1\]; got -0.1"),
        ("LSTM", {"zoneout": (0.1, 0.2, 0.3)}, r"zoneout must be a probability in \[0, 1\], or a pair"),
        ("GRU", {"zoneout": (0.1, 0.2)}, r"zoneout must be one probability .* without a state c; got \(0.1, 0.2\)"),
        ("RNN", {"norm": "none", "norm_init": 0.1}, "norm_init must be 1 for a norm without affine"),
        ("RNN", {"norm_init": float("nan")}, "norm_init must be a finite number; got nan"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(kind: str, options: dict[str, Any], error: str) -> None:
    for name in (kind, f"{kind}Cell"):
        with pytest.raises(ValueError, match=error):
            getattr(rnnorm, name)(3, 4, **options)


def test_invalid_resets_are_refused() -> None:
    layer, x = rnnorm.LSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"reset must have shape \(T, N\) = \(5, 2\); got \(2, 5\)"):
        layer(x, reset=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reset must have dtype torch.bool; got torch.float64"):
        layer(x, reset=torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"reset must be on the input's device cpu; got meta; move it"):
        layer(x, reset=torch.zeros(5, 2, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"reset must be on the input's device cpu; got meta; move it"):
        rnnorm.GRUCell(3, 4)(x[0], reset=torch.zeros(2, dtype=torch.bool, device="meta"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_statistics_move_without_drawing_masks() -> None:
    layer = _build("lstm", "online", "auto", recurrent_dropout=0.4, zoneout=0.3, weight_dropout=0.5)
    twin = _build("lstm", "online", "auto", zoneout=0.3)
    layer.draws_masks = twin.draws_masks = False
    x = torch.randn(5, 4, 3)
    for call in (layer, torch.jit.script(layer)):
        before, state = layer.norm_mean_l0.clone(), torch.random.get_rng_state()
        assert torch.equal(call(x)[0], twin(x)[0])
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not torch.equal(layer.norm_mean_l0, before)


def test_numpy_rates_are_taken() -> None:
    layer = rnnorm.LSTM(3, 4, zoneout=np.float32(0.5), weight_dropout=np.float64(0.25))
    assert (layer.zoneout, layer.weight_dropout) == (0.5, 0.25)


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2, 3])], ids=["dense", "lengths"])
def test_bool_masks_and_shares_of_one_or_zero_are_the_same(
    backend: str, lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.skip_unless_runs(backend)
    x, drawn, found = torch.randn(4, 3, 3), _masks.zoneout, []
    for share in (lambda *args: drawn(*args), lambda *args: drawn(*args).to(args[-1])):
        monkeypatch.setattr(_masks, "zoneout", share)
        torch.manual_seed(1)
        layer = rnnorm.LSTM(3, 7, backend=backend, zoneout=0.5)
        y, _ = layer(x, lengths=lengths)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
