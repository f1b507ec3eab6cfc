"""The choice of a backend, and what is reported about it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnorm
from rnnorm.ops import registry


def test_backends_say_what_can_run() -> None:
    found = rnnorm.backends()
    assert list(found) == registry.names()
    assert found["reference"] is None
    assert found["scripted"] is None
    assert all(reason is None or isinstance(reason, str) for reason in found.values())
    assert registry.names()[-1] == "reference", "the last resort never refuses"


def test_auto_is_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, spec = torch.device("cpu"), rnnorm.LSTM(3, 4)._spec()
    able = [row for row in registry.BACKENDS if row.why_not(cpu, torch.float32, spec) is None]
    assert registry.choose("auto", cpu, torch.float32, spec) is able[0]
    scripted = registry.by_name("scripted")
    monkeypatch.setattr(registry, "BACKENDS", [scripted, registry.by_name("reference")])
    assert registry.choose("auto", cpu, torch.float32, spec) is scripted
    monkeypatch.setattr(type(scripted), "why_not", lambda self, device, dtype, spec: "no")
    assert registry.choose("auto", cpu, torch.float32, spec).name == "reference"


@pytest.mark.parametrize("name", registry.names())
def test_a_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row = registry.by_name(name)
    if row.why_not(torch.device("cpu"), torch.float32, None):
        pytest.skip(f"backend {name!r} cannot run here")
    calls: list[str] = []

    def counted(own: Callable[..., Any], label: str) -> Callable[..., Any]:
        def forward(self: Any, operands: Any, spec: Any, save: bool) -> Any:
            calls.append(label)
            return own(self, operands, spec, save)

        return forward

    for other in registry.BACKENDS:
        monkeypatch.setattr(type(other), "forward", counted(type(other).forward, other.name))
    rnnorm.GRU(3, 4, 2, backend=name)(torch.randn(5, 2, 3))
    assert calls == [name, name]


def test_command_line_lists_them() -> None:
    root = str(Path(rnnorm.__file__).parents[1])
    done = subprocess.run([sys.executable, "-m", "rnnorm"], capture_output=True, text=True, check=True, cwd=root)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"rnnorm {re.escape(rnnorm.__version__)}, torch \S+, \d+ threads", lines[0])
    own = {line.split()[1]: line for line in lines[1:] if line.split()[0] == "cpu"}
    assert [*own] == [*registry.names(), "bfloat16"]
    assert all("runs" in own[name] or "cannot run: " in own[name] for name in registry.names())


def test_a_device_that_is_not_there_has_no_bfloat16_and_says_why() -> None:
    for device in ("xpu", "cuda:99"):
        assert str(rnnorm.why_not_bfloat16(device)).startswith(f"device {device} is not available: ")


def test_public_names() -> None:
    assert set(rnnorm.__all__) == {
        *("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "OnlineNorm", "norms", "backends"),
        *("BackendUnavailable", "distributed", "functional", "gates", "CELLS", "Options", "convert_batchnorm"),
        "why_not_bfloat16",
    }
    assert all(hasattr(rnnorm, name) for name in rnnorm.__all__)


def test_options_are_documented_in_lstm() -> None:
    for name in rnnorm.Options.__annotations__:
        assert f"\n        {name}: " in str(rnnorm.LSTM.__doc__)


def test_backends_for_an_unavailable_device() -> None:
    if not torch.cuda.is_available():
        assert all("device cuda is not available" in str(reason) for reason in rnnorm.backends("cuda").values())
    assert all(reason is not None for reason in rnnorm.backends(dtype=torch.int64).values())
