"""The recorded cases of the authors' own code: outputs, gradients and statistics after every call or window.

The environment variable RNNORM_RECORDED names their folder; without it these tests are skipped.
"""

import os
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

import rnnorm
from rnnorm.ops import registry

_FOLDER = os.environ.get("RNNORM_RECORDED")
_WHY = "RNNORM_RECORDED does not name the folder of recorded cases"
_FILES = sorted(Path(_FOLDER).glob("*.npz")) if _FOLDER else []
# The recordings are float32, up to 4e-5 from a float64 loop; comparing in float32 adds this side's own rounding.
_TOLERANCE = {torch.float64: 5e-5, torch.float32: 1e-4}


def _paths(norm: bool) -> Any:
    found = [pytest.param(path, id=path.stem) for path in _FILES if path.stem.startswith("norm_") == norm]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=_WHY))]


def _recorded(name: str) -> str:
    """The name in the recordings, where the affine parameters are called weight and bias."""
    return name.replace("norm_scale", "norm_weight").replace("norm_shift", "norm_bias")


class _Recording:
    def __init__(self, path: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        with np.load(path) as arrays:
            self.arrays = dict(arrays)
        self.dtype, self.device = dtype, device
        self.used: set[str] = set()

    def scalar(self, name: str) -> Any:
        return self.arrays[name].item()

    def tensor(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name]).to(self.device, self.dtype)

    def expect(self, name: str, found: Tensor | None) -> None:
        assert found is not None, name
        wanted = self.tensor(name)
        self.used.add(name)
        assert found.shape == wanted.shape, name
        error = (found.detach() - wanted).abs().max().item()
        bound = _TOLERANCE[self.dtype] * wanted.abs().max().item()
        assert error <= bound, f"{name}: off by {error:.3g}, more than {bound:.3g}"

    def assert_all_used(self, inputs: tuple[str, ...]) -> None:
        left = {n for n, a in self.arrays.items() if a.ndim} - self.used
        assert not {name for name in left if not name.startswith(inputs)}


def test_recordings_are_found() -> None:
    if not _FOLDER:
        pytest.skip(_WHY)
    assert len(_FILES) >= 24, f"{len(_FILES)} recordings in {_FOLDER}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("path", _paths(norm=True))
def test_online_norm(path: Path, backend: str, dtype: torch.dtype) -> None:
    cases.skip_unless_runs(backend)
    z = _Recording(path, dtype)
    constants = {name: z.scalar(name) for name in ("alpha_fwd", "alpha_bwd", "eps", "guard")}
    norm = rnnorm.OnlineNorm(z.tensor("weight").numel(), **constants, backend=backend, dtype=dtype)
    norm.load_state_dict({**norm.state_dict(), "weight": z.tensor("weight"), "bias": z.tensor("bias")})
    for i in range(8):
        norm.zero_grad()
        x = z.tensor(f"x{i}").requires_grad_()
        y = norm(x)
        y.backward(z.tensor(f"grad_y{i}"))
        z.expect(f"y{i}", y)
        z.expect(f"grad_x{i}", x.grad)
        z.expect(f"grad_weight{i}", norm.weight.grad)
        z.expect(f"grad_bias{i}", norm.bias.grad)
        for stream in ("mean", "var", "u", "v"):
            z.expect(f"{stream}{i}", getattr(norm, stream))
    z.expect("y_eval", norm.eval()(z.tensor("x0")))
    z.assert_all_used(("weight", "bias", "x", "grad_y"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("path", _paths(norm=False))
def test_layer(path: Path, backend: str, dtype: torch.dtype) -> None:
    _layer(path, backend, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", _paths(norm=False))
def test_layer_on_a_gpu(path: Path, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _layer(path, "triton", dtype, "cuda")


def _layer(path: Path, backend: str, dtype: torch.dtype, device: str) -> None:
    z = _Recording(path, dtype, device)
    kind, norm = z.scalar("kind"), z.scalar("norm")
    spec: Any = rnnorm.norms.resolve(norm)
    if norm == "online":
        spec = rnnorm.norms.Online(
            z.scalar("alpha_fwd"), z.scalar("alpha_bwd"), z.scalar("eps"), True, z.scalar("guard")
        )
    own = {"lstm": {"cell_norm": z.scalar("cell_norm")}, "rnn": {"nonlinearity": z.scalar("nonlinearity")}}.get(
        kind, {}
    )
    sizes = z.scalar("I"), z.scalar("H"), z.scalar("num_layers")
    layer = getattr(rnnorm, kind.upper())(*sizes, norm=spec, backend=backend, dtype=dtype, device=device, **own)
    given = {_recorded(name): z.tensor(_recorded(name)) for name, _ in layer.named_parameters()}
    layer.load_state_dict({**layer.state_dict(), **given})
    state = None
    for w in range(z.scalar("windows")):
        layer.zero_grad()
        x = z.tensor(f"x_{w}").requires_grad_()
        y, last = layer(x, state)
        y.backward(z.tensor(f"grad_y_{w}"))
        state = tuple(s.detach() for s in last) if kind == "lstm" else last.detach()
        z.expect(f"y_{w}", y)
        z.expect(f"grad_x_{w}", x.grad)
        z.expect(f"h_{w}", state[0] if kind == "lstm" else state)
        if kind == "lstm":
            z.expect(f"c_{w}", state[1])
        for name, parameter in layer.named_parameters():
            z.expect(f"grad_{w}_{_recorded(name)}", parameter.grad)
        for name, buffer in layer.named_buffers():
            z.expect(f"{name}_{w}", buffer)
    z.assert_all_used(("x_", "grad_y_", *given))
