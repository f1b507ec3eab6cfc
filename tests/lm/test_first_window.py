"""How the first gradient of a run grows with T0, the length of its first window.

The models of the paper's presets at their initial scale, against a loop in numpy with its backward pass by hand, which
shares no code with the package.
"""

import numpy as np
import pytest
import torch

from lm import config
from lm.model import LanguageModel

V, H, N = 50, 200, 4
LENGTHS = 19, 124
EPS, FLOOR = 1e-5, 1e-5
DECAYS = {"rnn": (1 - 2**-14, 1 - 2**-7), "lstm": (1 - 2**-13, 1 - 2**-5)}  # forward, backward
GATES = {"rnn": 1, "lstm": 4}


class Identity:
    """`forward` returns q [N, G, H] and what `backward` needs; `backward` the gradient of the pre-activations, that of
    the affine map's output, and the affine map's input. The affine map itself is the identity at the start."""

    def forward(self, a):
        return a, a

    def backward(self, dq, y):
        return dq, dq, y


class RMS:
    def forward(self, a):
        k = 1 / np.sqrt((a * a).mean(-1, keepdims=True) + EPS)
        return a * k, (a * k, k)

    def backward(self, dq, kept):
        y, k = kept
        return k * (dq - y * (dq * y).mean(-1, keepdims=True)), dq, y


class Layer(RMS):
    def forward(self, a):
        return super().forward(a - a.mean(-1, keepdims=True))

    def backward(self, dq, kept):
        da, dz, y = super().backward(dq, kept)
        return da - da.mean(-1, keepdims=True), dz, y


class Online:
    """The paper's statistics and control process, one sample after another, then its layer scaling."""

    def __init__(self, cell):
        self.forward_decay, self.backward_decay = DECAYS[cell]
        self.mean, self.var, self.u, self.v = (np.full((GATES[cell], H), start) for start in (0.0, 1.0, 0.0, 0.0))

    def forward(self, a):
        decay, y, s = self.forward_decay, np.empty_like(a), np.empty_like(a)
        for n in range(N):
            d = a[n] - self.mean
            s[n] = np.sqrt(self.var + EPS)
            y[n] = d / s[n]
            self.var = decay * self.var + decay * (1 - decay) * d * d
            self.mean = self.mean + (1 - decay) * d
        q, scaled = RMS().forward(y)
        return q, (y, s, scaled)

    def backward(self, dq, kept):
        (y, s, scaled), rest = kept, 1 - self.backward_decay
        g, _, _ = RMS().backward(dq, scaled)
        da = np.empty_like(g)
        for n in range(N):
            da[n] = (g[n] - rest * self.v * y[n]) / s[n] - rest * self.u
            self.v = np.maximum(1 - rest * y[n] ** 2, FLOOR) * self.v + g[n] * y[n]
            self.u = self.u + da[n]
        return da, g, y


NORMS = {"online": Online, "layer": lambda _: Layer(), "rms": lambda _: RMS(), "none": lambda _: Identity()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(cell, q, c):
    """From normalized pre-activations q [N, G, H] to h, c, and what `step_backward` needs."""
    if cell == "rnn":
        h = np.tanh(q[:, 0])
        return h, c, (h,)
    i, f, g, o = sigmoid(q[:, 0]), sigmoid(q[:, 1]), np.tanh(q[:, 2]), sigmoid(q[:, 3])
    new = f * c + i * g
    return o * np.tanh(new), new, (i, f, g, o, c, np.tanh(new))


def step_backward(cell, dh, dc, kept):
    """The gradients of q and of the c before."""
    if cell == "rnn":
        (h,) = kept
        return (dh * (1 - h * h))[:, None], dc
    i, f, g, o, c, squashed = kept
    dc = dc + dh * o * (1 - squashed**2)
    dq = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o)
    return np.stack(dq, 1), dc * f


def gradients(cell, norm, p, inputs, targets):
    """The gradient of a window's mean loss in nats, by parameter; `inputs` and `targets` are [T, N]."""
    G, T = GATES[cell], len(inputs)
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    h, c, kept = np.zeros((N, H)), np.zeros((N, H)), []
    for t in range(T):
        x, before = p["embedding"][inputs[t]], h
        a = x @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]
        q, of_norm = norm.forward(a.reshape(N, G, H))
        h, c, of_step = step(cell, q, c)
        odds = np.exp(h @ p["embedding"].T + p["decoder_bias"])
        kept.append((x, before, h, of_norm, of_step, odds / odds.sum(1, keepdims=True)))
    dh, dc = np.zeros((N, H)), np.zeros((N, H))
    for t in reversed(range(T)):
        x, before, h, of_norm, of_step, probability = kept[t]
        dlogits = (probability - np.eye(V)[targets[t]]) / (T * N)
        dq, dc = step_backward(cell, dh + dlogits @ p["embedding"], dc, of_step)
        da, dz, y = norm.backward(dq, of_norm)
        da = da.reshape(N, G * H)
        grads["embedding"] += dlogits.T @ h
        np.add.at(grads["embedding"], inputs[t], da @ p["weight_ih"])
        grads["decoder_bias"] += dlogits.sum(0)
        grads["weight_ih"] += da.T @ x
        grads["weight_hh"] += da.T @ before
        grads["bias_ih"] += da.sum(0)
        grads["bias_hh"] += da.sum(0)
        if "norm_scale" in p:
            grads["norm_scale"] += (dz * y).sum(0).ravel()
            grads["norm_shift"] += dz.sum(0).ravel()
        dh = da @ p["weight_hh"]
    return grads


def initial(cell, norm):
    """Weights at the scale where the paper's recipe starts, by the names that the loop uses."""
    draw, C, k = np.random.default_rng(0).uniform, GATES[cell] * H, H**-0.5
    p = {"embedding": draw(-0.1, 0.1, (V, H)), "decoder_bias": np.zeros(V)}
    p |= {name: draw(-k, k, (C, H)) for name in ("weight_ih", "weight_hh")}
    p |= {name: draw(-k, k, C) for name in ("bias_ih", "bias_hh")}
    return p if norm == "none" else p | {"norm_scale": np.ones(C), "norm_shift": np.zeros(C)}


def preset_model(cell, norm):
    """The model of the paper's preset, with the initial weights and fresh statistics; RMS is the layer preset's."""
    tables = config.preset(f"paper-{cell}-{'layer' if norm == 'rms' else norm}")
    model = LanguageModel(config.build(config.override(tables, [f"model.norm={norm}"])).model, V).double()
    ours = {"embedding": model.embedding.weight, "decoder_bias": model.decoder.bias}
    ours |= {name.removesuffix("_l0"): parameter for name, parameter in model.layers.named_parameters()}
    with torch.no_grad():
        for name, value in initial(cell, norm).items():
            ours[name].copy_(torch.from_numpy(value))
    return model, ours


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cell", GATES)
def test_the_first_gradient_grows_with_the_first_window(cell, norm):
    """By 3 to 6 % a step where a norm stands before the nonlinearity, whichever it is; without one it falls."""
    totals = []
    for T in LENGTHS:
        ids = np.random.default_rng(1).integers(V, size=(T + 1, N))
        expected = gradients(cell, NORMS[norm](cell), initial(cell, norm), ids[:-1], ids[1:])
        model, ours = preset_model(cell, norm)
        assert ours.keys() == expected.keys()
        hidden, _ = model(torch.from_numpy(ids[:-1]))
        total, count = model.loss(hidden, torch.from_numpy(ids[1:]))
        (total / count).backward()
        found = {name: np.linalg.norm(parameter.grad) for name, parameter in ours.items()}
        assert found == pytest.approx({name: np.linalg.norm(grad) for name, grad in expected.items()}, rel=1e-9)
        totals.append(np.hypot.reduce([*found.values()]))
    short, long = totals
    rate = (long / short) ** (1 / (LENGTHS[1] - LENGTHS[0]))
    assert rate < 1 if norm == "none" else 1.03 < rate < 1.06
