"""What only a CUDA device can show of the Triton backend: the kernels compiled and run, graphs, streams, capture.

In this order on the day a device is at hand:

    RNNORM_RECORDED=FOLDER python -m pytest -m gpu tests/rnnorm
    compute-sanitizer --tool memcheck python -m pytest tests/rnnorm/test_cuda.py -k equals_reference
    compute-sanitizer --tool racecheck python -m pytest tests/rnnorm/test_cuda.py -k equals_reference
    python scripts/benchmark.py --device cuda
"""

import threading
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import rnnorm
from rnnorm import norms
from rnnorm.ops import graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KINDS = [("LSTM", "online"), ("LSTM", "layer"), ("GRU", "online"), ("RNN", "none")]


def _compare(case: cases.Case, dtype: torch.dtype) -> None:
    expected = cases.run(case, "reference", dtype, "cuda")
    cases.assert_close(cases.run(case, "triton", dtype, "cuda"), expected, cases.CHOSEN_TOLERANCE[dtype])


@pytest.mark.parametrize("name", cases.CHOSEN)
def test_equals_reference(name: str) -> None:
    _compare(cases.CHOSEN[name], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(cases.CHOSEN)[::6])
def test_equals_reference_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    _compare(cases.CHOSEN[name], dtype)


@pytest.mark.parametrize("H", [7, 40, 200, 650, 1150, 2048])
@pytest.mark.parametrize("norm", ["online-scale-masked", "online-scale-eval", "layer-plain"])
@pytest.mark.parametrize("cell", ["lstm", "lstm-cell_norm", "gru"])
def test_equals_scripted_at_the_sizes_of_use(cell: str, norm: str, H: int) -> None:
    case = replace(cases.BY_ID[f"{cell}-{norm}"], N=20, H=H, I=64, lengths=(5,) * 10 + (3,) * 10)
    expected = cases.run(case, "scripted", torch.float64, "cuda")
    cases.assert_close(cases.run(case, "triton", torch.float64, "cuda"), expected, cases.TOLERANCE[torch.float64])


def test_auto_takes_the_kernels() -> None:
    assert rnnorm.backends("cuda")["triton"] is None
    from rnnorm.ops import choose

    spec = rnnorm.LSTM(3, 4)._spec()
    assert choose("auto", torch.device("cuda"), torch.float32, spec).name == "triton"


def _layer(kind: str, norm: str, **options: Any) -> Any:
    torch.manual_seed(1)
    spec = norms.Online(0.99, 0.9) if norm == "online" else norm
    return getattr(rnnorm, kind)(24, 32, 2, norm=spec, backend="triton", device="cuda", **options)


def _step(layer: Any, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    y, _ = layer(x)
    y.square().sum().backward()
    return [
        y.detach().clone(),
        *(value.grad.clone() for value in layer.parameters()),
        *map(torch.clone, layer.buffers()),
    ]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_graphs_change_no_bit(monkeypatch: pytest.MonkeyPatch, kind: str, norm: str) -> None:
    """Launched one by one, recorded, replayed: the same, with any window lengths."""
    from rnnorm.ops import triton_steps

    xs = [torch.randn(T, 5, 24, device="cuda") for T in (35, 35, 41, 7, 64, 33, 35)]
    replayed = _layer(kind, norm)
    found = [_step(replayed, x) for x in xs]
    monkeypatch.setattr(triton_steps, "_recorder", lambda device: None)
    launched = _layer(kind, norm)
    for x, step in zip(xs, found, strict=True):
        assert _same(_step(launched, x), step)


def test_loops_and_graphs_are_bounded() -> None:
    from rnnorm.ops import triton_steps

    layer = _layer("LSTM", "online")
    for N in range(1, graphs.BOUND + 9):
        _step(layer, torch.randn(3, N, 24, device="cuda"))
    assert len(triton_steps._LOOPS) <= graphs.BOUND


def test_graphs_are_recorded_after_the_last_one_is_gone() -> None:
    """The pool that they share outlives them; else torch refuses, and before 2.13 draws no random numbers then."""
    from rnnorm.ops import triton_steps

    layer = _layer("LSTM", "layer").eval()

    def call(N: int) -> None:
        with torch.no_grad():
            layer(torch.zeros(8, N, 24, device="cuda"))

    for _ in range(2):
        call(40)
    for N in range(1, graphs.BOUND + 1):  # each once, so that none is recorded
        call(N)
    for _ in range(2):
        call(40)
    assert triton_steps._LOOPS.values()[-1].runner._replays, "the last loop was recorded"
    torch.rand(3, device="cuda")


def test_threads_record_one_after_another() -> None:
    xs = [torch.randn(35, N, 24, device="cuda") for N in (3, 4, 5, 6)]
    expected = [_step(_layer("LSTM", "layer"), x) for x in xs]
    found: dict[int, list[list[Tensor]]] = {}
    layers = [_layer("LSTM", "layer") for _ in xs]

    def work(number: int) -> None:
        found[number] = [_step(layers[number], xs[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(_same(step, expected[number]) for number, steps in found.items() for step in steps)
    assert len(found) == len(xs)


def test_a_warm_call_waits_for_nothing(waiting_for_nothing: Any) -> None:
    layer, x = _layer("LSTM", "online"), torch.randn(41, 5, 24, device="cuda")
    for _ in range(3):
        _step(layer, x)
    with waiting_for_nothing():
        _step(layer, x)


@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_a_graph_of_the_user(kind: str, norm: str) -> None:
    layer, x = _layer(kind, norm), torch.randn(9, 5, 24, device="cuda")
    eager = _layer(kind, norm)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    eager.load_state_dict(layer.state_dict())
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    with torch.cuda.graph(graph):
        y, _ = layer(x)
        y.square().sum().backward()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        found = [y.clone(), *(value.grad.clone() for value in layer.parameters()), *map(torch.clone, layer.buffers())]
        assert _same(found, _step(eager, x))


def test_the_first_call_is_not_captured() -> None:
    layer, x = rnnorm.GRU(3, 19, backend="triton", device="cuda"), torch.randn(2, 3, 3, device="cuda")
    refused = pytest.raises(RuntimeError, match="run the layer once, forward and backward, before the capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)


def test_streams_do_not_share_a_loop() -> None:
    xs = [torch.randn(64, 20, 24, device="cuda") for _ in range(4)]
    expected = [_step(_layer("LSTM", "online"), x) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(3):
        layers, found = [_layer("LSTM", "online") for _ in xs], []
        torch.cuda.synchronize()
        for layer, x, stream in zip(layers, xs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(_step(layer, x))
        torch.cuda.synchronize()
        assert all(map(_same, found, expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:The CUDA Graph is empty")  # both by torch's compiler itself
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_compiled(kind: str, norm: str, mode: str | None) -> None:
    layer, x = _layer(kind, norm), torch.randn(9, 5, 24, device="cuda")
    eager = _layer(kind, norm)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):
        layer.zero_grad()
        y, _ = compiled(x)
        y.square().sum().backward()
        expected = _step(eager, x)
        assert torch.equal(y, expected[0])
        assert _same([value.grad for value in layer.parameters()], expected[1 : 1 + len(list(layer.parameters()))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [1, 200])
@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_the_check_of_itself_passes(kind: str, norm: str, H: int, dtype: torch.dtype) -> None:
    from rnnorm.ops import triton_check

    spec = getattr(rnnorm, kind)(3, 4, norm=norm)._spec()
    assert triton_check.compare(torch.device("cuda"), dtype, spec, H) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    layer, x = _layer("LSTM", "online"), torch.randn(9, 5, 24, device="cuda")
    other = _layer("LSTM", "online").to("cuda:1")
    for _ in range(3):
        found, expected = _step(other, x.to("cuda:1")), _step(layer, x)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))
