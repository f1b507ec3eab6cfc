"""A separate float64 loop in plain numpy, with gradients by hand, for what the recordings lack:
GRU with lengths and packed input, forward and backward, and `OnlineNorm` on feature maps."""

import math
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnnorm
from rnnorm.ops import registry

pytestmark = pytest.mark.usefixtures("double")
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
A_F, A_B, EPS = 0.93, 0.85, 1e-5
FLOORS = {"scale": -math.inf, "clamp": 0.9, "none": 0.97}  # by guard


class Stream:
    """Section 1 of the algorithm, value by value and channel by channel."""

    def __init__(self, C: int, floor: float) -> None:
        self.floor = floor
        self.mean, self.var, self.u, self.v = np.zeros(C), np.ones(C), np.zeros(C), np.zeros(C)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, s = np.empty_like(x), np.empty(x.shape[:2])
        for n in range(x.shape[0]):
            for c in range(x.shape[1]):
                values = x[n, c]
                s[n, c] = math.sqrt(self.var[c] + EPS)
                y[n, c] = (values - self.mean[c]) / s[n, c]
                m, w = values.mean(), values.var()
                d = m - self.mean[c]
                self.var[c] = A_F * self.var[c] + (1 - A_F) * w + A_F * (1 - A_F) * d * d
                self.mean[c] = self.mean[c] + (1 - A_F) * d
        return y, s

    def backward(self, g: np.ndarray, y: np.ndarray, s: np.ndarray) -> np.ndarray:
        dx = np.empty_like(g)
        for n in range(g.shape[0]):
            for c in range(g.shape[1]):
                e = g[n, c] - (1 - A_B) * self.v[c] * y[n, c]
                if 1 - (1 - A_B) * (y[n, c] ** 2).mean() >= self.floor:
                    self.v[c] += (e * y[n, c]).mean()
                else:
                    self.v[c] = self.floor * self.v[c] + (g[n, c] * y[n, c]).mean()
                dx[n, c] = e / s[n, c] - (1 - A_B) * self.u[c]
                self.u[c] += dx[n, c].mean()
        return dx


def guarded(z: np.ndarray, guard: str, H: int) -> np.ndarray:
    if guard == "clamp":
        return np.clip(z, -5, 5)
    gates = z.reshape(len(z), z.shape[1] // H, H)
    return (gates / np.sqrt((gates**2).mean(2, keepdims=True) + 1e-5)).reshape(z.shape)


def guarded_backward(dq: np.ndarray, z: np.ndarray, guard: str, H: int) -> np.ndarray:
    if guard == "clamp":
        return dq * (np.abs(z) <= 5)
    gates, dgates = (a.reshape(len(z), z.shape[1] // H, H) for a in (z, dq))
    k = 1 / np.sqrt((gates**2).mean(2, keepdims=True) + 1e-5)
    return (k * dgates - k**3 * gates * (gates * dgates).mean(2, keepdims=True)).reshape(z.shape)


class GRU:
    """One direction of a GRU; `p` holds torch's parameters as arrays."""

    def __init__(self, p: dict[str, np.ndarray], guard: str) -> None:
        self.p, self.guard = p, guard
        self.H = p["weight_hh"].shape[1]
        self.stream = Stream(3 * self.H, FLOORS[guard])

    def _part(self, left: int, right: int) -> Stream:
        part = Stream(0, self.stream.floor)
        for name in ("mean", "var", "u", "v"):
            setattr(part, name, getattr(self.stream, name)[left:right])  # views: moved in place
        return part

    def _normalize(self, pre: np.ndarray, left: int) -> tuple[np.ndarray, Any]:
        span = slice(left, left + pre.shape[1])
        y, s = self._part(span.start, span.stop).forward(pre[:, :, None])
        z = self.p["norm_scale"][span] * y[:, :, 0] + self.p["norm_shift"][span]
        return guarded(z, self.guard, self.H), (span, y, s, z)

    def _normalize_backward(self, dq: np.ndarray, kept: Any, grads: dict[str, np.ndarray]) -> np.ndarray:
        span, y, s, z = kept
        dz = guarded_backward(dq, z, self.guard, self.H)
        grads["norm_scale"][span] += (dz * y[:, :, 0]).sum(0)
        grads["norm_shift"][span] += dz.sum(0)
        g = (dz * self.p["norm_scale"][span])[:, :, None]
        return self._part(span.start, span.stop).backward(g, y, s)[:, :, 0]

    def run(self, x: np.ndarray, h: np.ndarray, lengths: Any, reverse: bool, dy: np.ndarray, dh: np.ndarray) -> Any:
        """Outputs [T, N, H], last state, and gradients by name for those (`dy`, `dh`) of both."""
        p, H = self.p, self.H
        order = range(len(x))[:: -1 if reverse else 1]
        y, h, kept = np.zeros((*x.shape[:2], H)), h.copy(), {}
        for t in order:
            rows = [n for n in range(x.shape[1]) if lengths[n] > t]
            before = h[rows]
            px = x[t, rows] @ p["weight_ih"].T + p["bias_ih"]
            ph = before @ p["weight_hh"].T + p["bias_hh"]
            q, kept_rz = self._normalize(px[:, : 2 * H] + ph[:, : 2 * H], 0)
            rz = 1 / (1 + np.exp(-q))
            r, z = rz[:, :H], rz[:, H:]
            q, kept_n = self._normalize(px[:, 2 * H :] + r * ph[:, 2 * H :], 2 * H)
            n = np.tanh(q)
            h[rows] = y[t, rows] = (1 - z) * n + z * before
            kept[t] = rows, before, ph, r, z, n, kept_rz, kept_n
        grads = {name: np.zeros_like(value) for name, value in p.items()} | {"x": np.zeros_like(x)}
        dh = dh.copy()
        for t in reversed(order):
            rows, before, ph, r, z, n, kept_rz, kept_n = kept[t]
            d = dh[rows] + dy[t, rows]
            dn = self._normalize_backward(d * (1 - z) * (1 - n * n), kept_n, grads)
            drz = np.concatenate((dn * ph[:, 2 * H :] * r * (1 - r), d * (before - n) * z * (1 - z)), 1)
            drz = self._normalize_backward(drz, kept_rz, grads)
            dpx, dph = np.concatenate((drz, dn), 1), np.concatenate((drz, dn * r), 1)
            grads["weight_ih"] += dpx.T @ x[t, rows]
            grads["bias_ih"] += dpx.sum(0)
            grads["weight_hh"] += dph.T @ before
            grads["bias_hh"] += dph.sum(0)
            grads["x"][t, rows] += dpx @ p["weight_ih"]
            dh[rows] = d * z + dph @ p["weight_hh"]
        return y, h, grads | {"h": dh}


@pytest.mark.parametrize("guard", ["scale", "clamp"])
@pytest.mark.parametrize("form", ["lengths", "packed"])
@pytest.mark.parametrize("backend", registry.names())
def test_gru_over_windows(backend: str, form: str, guard: str) -> None:
    cases.skip_unless_runs(backend)
    T, N, I, H = 5, 4, 3, 6  # noqa: E741
    norm = rnnorm.norms.Online(A_F, A_B, EPS, guard=guard, control_floor=FLOORS[guard])
    layer = rnnorm.GRU(I, H, bidirectional=True, norm=norm, backend=backend)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if "norm" in name:
                value.add_(torch.randn_like(value).mul(2.0 if guard == "clamp" else 0.3))
    oracles = {
        suffix: GRU({name.removesuffix(suffix): p.detach().numpy().copy() for name, p in _own(layer, suffix)}, guard)
        for suffix in ("_l0", "_l0_reverse")
    }
    state = torch.zeros(2, N, H)
    for lengths in ([3, 5, 1, 4], [5, 5, 2, 2], [1, 2, 3, 1]):
        layer.zero_grad()
        x = torch.randn(T, N, I).requires_grad_()
        state = state.detach().requires_grad_()
        dy, dh = torch.randn(T, N, 2 * H), torch.randn(2, N, H)
        # A PackedSequence's samples come in its own order: the longest sequence first.
        order = sorted(range(N), key=lambda n: -lengths[n]) if form == "packed" else list(range(N))
        if form == "packed":
            packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
            out, last = layer(packed, state)
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(out, total_length=T)
            order = packed.sorted_indices.tolist()
        else:
            y, last = layer(x, state, lengths=lengths)
        torch.autograd.backward([y, last], [dy, dh])
        grad_x = np.zeros((T, N, I))
        for k, (suffix, oracle) in enumerate(oracles.items()):
            side = slice(k * H, (k + 1) * H)
            expected_y, expected_h, grads = oracle.run(
                x.detach().numpy()[:, order],
                state[k].detach().numpy()[order],
                [lengths[n] for n in order],
                k == 1,
                dy[:, order, side].numpy(),
                dh[k, order].numpy(),
            )
            np.testing.assert_allclose(y[:, order, side].detach(), expected_y, **CLOSE)
            np.testing.assert_allclose(last[k, order].detach(), expected_h, **CLOSE)
            np.testing.assert_allclose(state.grad[k, order], grads.pop("h"), **CLOSE)
            grad_x[:, order] += grads.pop("x")
            for name, expected in grads.items():
                np.testing.assert_allclose(layer.get_parameter(name + suffix).grad, expected, **CLOSE, err_msg=name)
            for name in ("mean", "var", "u", "v"):
                found = layer.get_buffer(f"norm_{name}{suffix}")
                np.testing.assert_allclose(found, getattr(oracle.stream, name), **CLOSE, err_msg=name)
        np.testing.assert_allclose(x.grad, grad_x, **CLOSE)
        state = last


def _own(layer: torch.nn.Module, suffix: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in layer.named_parameters() if name.endswith(suffix)]


@pytest.mark.parametrize("guard", ["clamp", "scale", "none"])
@pytest.mark.parametrize("shape", [(9, 3), (7, 3, 1), (6, 3, 4), (5, 3, 2, 3), (70, 2, 2)], ids=str)
@pytest.mark.parametrize("backend", registry.names())
def test_online_norm(backend: str, shape: tuple[int, ...], guard: str) -> None:
    cases.skip_unless_runs(backend)
    C = shape[1]
    options: dict[str, Any] = {"eps": EPS, "guard": guard, "control_floor": FLOORS[guard], "backend": backend}
    norm = rnnorm.OnlineNorm(C, alpha_fwd=A_F, alpha_bwd=A_B, **options)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    weight, bias = norm.weight.detach().numpy()[:, None], norm.bias.detach().numpy()[:, None]
    stream = Stream(C, FLOORS[guard])
    for _ in range(3):
        norm.zero_grad()
        x = (2 + 3 * torch.randn(shape)).requires_grad_()
        g = torch.randn(shape)
        q = norm(x)
        q.backward(g)
        y, s = stream.forward(x.detach().numpy().reshape(*shape[:2], -1))
        z = weight * y + bias
        dz = expected = z
        dq = g.numpy().reshape(z.shape)
        if guard == "scale":
            expected = guarded(z.reshape(shape[0], -1), guard, z[0].size)
            dz = guarded_backward(dq.reshape(shape[0], -1), z.reshape(shape[0], -1), guard, z[0].size).reshape(z.shape)
        else:
            expected = guarded(z, guard, 1) if guard == "clamp" else z
            dz = guarded_backward(dq, z, guard, 1) if guard == "clamp" else dq
        dx = stream.backward(dz * weight, y, s)
        np.testing.assert_allclose(q.detach(), expected.reshape(shape), **CLOSE)
        np.testing.assert_allclose(x.grad, dx.reshape(shape), **CLOSE)
        np.testing.assert_allclose(norm.weight.grad, (dz * y).sum((0, 2)), **CLOSE)
        np.testing.assert_allclose(norm.bias.grad, dz.sum((0, 2)), **CLOSE)
        for name in ("mean", "var", "u", "v"):
            np.testing.assert_allclose(getattr(norm, name), getattr(stream, name), **CLOSE, err_msg=name)


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_padded_batch_equals_its_sequences_without_padding(cell: str, backend: str) -> None:
    """One call with lengths equals a chain of calls with one step each, of the sequences still running alone."""
    cases.skip_unless_runs(backend)
    case = cases.BY_ID[f"{cell}-online-scale-plain"]
    lengths = torch.tensor([3, 5, 1, 4, 5])
    x, g = torch.randn(5, 5, case.I), torch.randn(5, 5, case.H)
    padded, chained = case.build(backend), case.build(backend)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, last = padded(left, lengths=lengths)
    y.backward(g)
    states = [torch.zeros(1, 5, case.H) for _ in ("h", "c")[: 1 + (cell == "lstm")]]
    loss = torch.zeros(())
    for t in range(5):
        rows = (lengths > t).nonzero()[:, 0]
        given = [s[:, rows] for s in states]
        out, new = chained(right[t : t + 1, rows], tuple(given) if cell == "lstm" else given[0])
        torch.testing.assert_close(out[0], y[t, rows], **CLOSE)
        loss = loss + (out[0] * g[t, rows]).sum()
        new = new if cell == "lstm" else (new,)
        states = [s.index_copy(1, rows, value) for s, value in zip(states, new, strict=True)]
    loss.backward()
    torch.testing.assert_close(tuple(states), last if cell == "lstm" else (last,), **CLOSE)
    torch.testing.assert_close(left.grad, right.grad, **CLOSE)
    for (name, a), b in zip(padded.named_parameters(), chained.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE, msg=name)
    for (name, a), b in zip(padded.named_buffers(), chained.buffers(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=name)
