"""Measure rnnorm against torch: each row in a separate process, its two sides in turn, medians and ratios.

    python scripts/benchmark.py                  # every row, about ten minutes on 2 cores
    python scripts/benchmark.py --quick          # few rounds, small sizes only
    python scripts/benchmark.py --json FILE      # also write the results as JSON
    python scripts/benchmark.py --only LSTM      # only rows whose name contains TEXT
    python scripts/benchmark.py --device cuda    # the rows for a GPU, against cuDNN, in one process
    TRITON_INTERPRET=1 python scripts/benchmark.py --tiny    # those rows on the CPU: that they run, not how fast

A ratio is time of ours / time of the yardstick, forward and backward, the median over rounds; below 1 we are
faster. "goal" is what the project set itself for 2 threads. A process for each row, because what ran before decides
whether malloc keeps large blocks for torch's layers.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnorm
from lm.config import ModelConfig
from lm.loss import linear_cross_entropy
from lm.model import LanguageModel

Work = Callable[[], Any]


class Row(NamedTuple):
    name: str
    size: str
    works: Callable[[], tuple[Work, Work]]  # makes ours and the yardstick
    goal: float | None = None


def _layer_work(layer: nn.Module, T: int, N: int, size: int, **call: Any) -> Work:
    """Forward and backward of a layer, the input's gradient included, on the device and in the dtype of its weights."""
    like = next(layer.parameters())
    x = torch.randn(T, N, size).to(like).requires_grad_()
    grad = torch.randn(T, N, size).to(like)

    def work() -> None:
        layer.zero_grad()
        layer(x, **call)[0].backward(grad)
        if like.is_cuda:
            torch.cuda.synchronize()

    return work


def _evaluation_work(layer: nn.Module, T: int, size: int) -> Work:
    x = torch.randn(T, 1, size)
    layer.eval()

    def work() -> None:
        with torch.no_grad():
            layer(x)

    return work


class EagerLayerNormLSTM(nn.Module):
    """The usual hand-written layer: a Python loop over steps, torch's LayerNorm on every gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(size, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cell = self.cell
        parts = F.linear(x, cell.weight_ih, cell.bias_ih)
        h = c = x.new_zeros(x.size(1), cell.hidden_size)
        ys = []
        for part in parts.unbind(0):
            gates = (part + F.linear(h, cell.weight_hh, cell.bias_hh)).chunk(4, 1)
            i, f, g, o = (norm(gate) for norm, gate in zip(self.norms, gates, strict=True))
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            ys.append(h)
        return torch.stack(ys), h


class TorchLanguageModel(nn.Module):
    """The usual word-level model of torch's modules: tied weights, one LSTM, full logits."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.layers = nn.LSTM(size, size)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = self.layers(self.embedding(inputs))
        logits = F.linear(hidden, self.embedding.weight, self.bias)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _step_work(model: nn.Module, loss: Callable[[], Tensor]) -> Work:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def work() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return work


def _decoder_works(M: int, E: int, V: int) -> tuple[Work, Work]:
    hidden = torch.randn(M, E, requires_grad=True)
    weight = (0.1 * torch.randn(V, E)).requires_grad_()
    bias = torch.zeros(V, requires_grad=True)
    targets = torch.randint(V, (M,))

    def fresh() -> None:
        hidden.grad = weight.grad = bias.grad = None

    def ours() -> None:
        fresh()
        nats, count = linear_cross_entropy(hidden, weight, bias, targets)
        (nats / count).backward()

    def torchs() -> None:
        fresh()
        F.cross_entropy(F.linear(hidden, weight, bias), targets).backward()

    return ours, torchs


def _norm_works(shape: tuple[int, ...]) -> tuple[Work, Work]:
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def work_of(norm: nn.Module) -> Work:
        def work() -> None:
            x.grad = None
            norm.zero_grad()
            norm(x).backward(grad)

        return work

    torchs = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    return work_of(rnnorm.OnlineNorm(shape[1])), work_of(torchs(shape[1]))


def _step_works(V: int, size: int, T: int, N: int) -> tuple[Work, Work]:
    inputs, targets = torch.randint(V, (T, N)), torch.randint(V, (T, N))
    ours = LanguageModel(ModelConfig(hidden_size=size), V)
    plain = TorchLanguageModel(V, size)

    def our_loss() -> Tensor:
        nats, count = ours.loss(ours(inputs)[0], targets)
        return nats / count

    return _step_work(ours, our_loss), _step_work(plain, lambda: plain.loss(inputs, targets))


def _masked_works(T: int, N: int, H: int) -> tuple[Work, Work]:
    """With dropout inside the recurrence, and without it but with as many random numbers drawn."""
    masked = _layer_work(rnnorm.LSTM(H, H, weight_dropout=0.5, recurrent_dropout=0.25, zoneout=0.1), T, N, H)
    plain = _layer_work(rnnorm.LSTM(H, H), T, N, H)
    weight = torch.randn(4 * H, H)

    def drawn() -> None:
        F.dropout(weight, 0.5)
        for shape in ((N, H), (T, N, H), (T, N, H)):
            torch.rand(shape).lt(0.1)
        plain()

    return masked, drawn


def rows(quick: bool) -> Iterator[Row]:
    """Every row; nothing is made before its `works` is called."""
    sizes = [(64, 20, 200), (35, 20, 650), (35, 20, 1500)][: 1 if quick else None]
    small = T, N, H = sizes[0]
    at = f"{T},{N},{H}"

    def pair(ours: Callable[[int], nn.Module], torchs: Callable[[int], nn.Module], size: tuple[int, int, int]) -> Any:
        T, N, H = size
        return lambda: (_layer_work(ours(H), T, N, H), _layer_work(torchs(H), T, N, H))

    def lstm(**options: Any) -> Callable[[int], nn.Module]:
        return lambda H: rnnorm.LSTM(H, H, **options)

    def torchs(kind: str) -> Callable[[int], nn.Module]:
        return lambda H: getattr(nn, kind)(H, H)

    goals = {"none": (1.00, 0.97, 0.79), "online": (1.05, 0.98, 0.80), "layer": (1.05, 0.98, 0.80)}
    for norm, each in goals.items():
        for size, goal in zip(sizes, each, strict=False):
            works = pair(lstm(norm=norm), torchs("LSTM"), size)
            yield Row(f"LSTM {norm} / nn.LSTM", ",".join(map(str, size)), works, goal)
    for size, goal in zip(sizes, (0.56, 0.56, 0.42), strict=False):
        works = pair(lambda H: rnnorm.GRU(H, H), torchs("GRU"), size)
        yield Row("GRU online / nn.GRU", ",".join(map(str, size)), works, goal)
    yield Row("RNN tanh online / nn.RNN", at, pair(lambda H: rnnorm.RNN(H, H), torchs("RNN"), small), 0.55)
    evaluation = lambda: (_evaluation_work(lstm()(H), 512, H), _evaluation_work(nn.LSTM(H, H), 512, H))  # noqa: E731
    yield Row("LSTM online, evaluation / nn.LSTM", f"512,1,{H}", evaluation, 1.0)
    reference, scripted = lstm(backend="reference"), lstm(backend="scripted")
    yield Row("LSTM online / eager per step (reference)", at, pair(lstm(), reference, small), 0.03)
    yield Row("LSTM online / TorchScript (scripted)", at, pair(lstm(), scripted, small))
    yield Row("LSTM online, scripted / reference", at, pair(scripted, reference, small), 0.20)
    yield Row("LSTM layer / eager per step", at, pair(lstm(norm="layer"), EagerLayerNormLSTM, small))
    yield Row("linear_cross_entropy / torch's pair", "1280,200,10000", lambda: _decoder_works(1280, 200, 10000), 0.52)
    yield Row("training step, 1x200 tied / torch's parts", at, lambda: _step_works(10000, 200, T, N), 0.57)
    lengths, begins = torch.randint(1, T + 1, (N,)), torch.rand(T, N) < 1 / 32
    padded = lambda: _layer_work(lstm()(H), T, N, H)  # noqa: E731
    yield Row(
        "lengths uniform in 1..64 / padded, ours",
        at,
        lambda: (_layer_work(lstm()(H), T, N, H, lengths=lengths), padded()),
        1.0,
    )
    yield Row("dropout inside the loop / without, ours", at, lambda: _masked_works(T, N, H), 1.05)
    # The goal at 128,64 is 0.05 ms more than the yardstick.
    shapes = {(128, 64): None, (1280, 800): 1.3, (32, 64, 32, 32): 1.1, (64, 128, 16, 16): 1.1}
    for shape, aim in list(shapes.items())[: 1 if quick else None]:
        works = lambda shape=shape: _norm_works(shape)  # noqa: E731
        yield Row("OnlineNorm / nn.BatchNorm", ",".join(map(str, shape)), works, aim)
    yield Row("reset / without, ours", at, lambda: (_layer_work(lstm()(H), T, N, H, reset=begins), padded()), 1.03)


# Of cuDNN's time, for kernels that are launched for each step.
DEVICE_GOAL = 1.5
# The dtype of the layers, and whether products of float32 may be of lower precision.
PRECISIONS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, True)}


def _device_works(
    kind: str, norm: Any, device: str, precision: str, graphs: bool, size: tuple[int, int, int]
) -> tuple[Work, Work]:
    """Ours and torch's layer. `graphs`: ours replays CUDA graphs."""
    T, N, H = size
    os.environ["RNNORM_CUDA_GRAPHS"] = "1" if graphs else "0"
    dtype, lower = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = lower
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    ours, torchs = getattr(rnnorm, kind)(H, H, norm=norm, backend="triton", **where), getattr(nn, kind)(H, H, **where)
    return _layer_work(ours, T, N, H), _layer_work(torchs, T, N, H)


def device_rows(device: str, tiny: bool) -> Iterator[Row]:
    """Every row for a GPU."""
    sizes = [(2, 2, 5)] if tiny else [(64, 20, 200), (35, 20, 650), (70, 40, 1150)]
    online = {"online": rnnorm.norms.Online(), "online clamp": rnnorm.norms.Online(guard="clamp")}
    for kind in ("LSTM", "GRU"):
        for label, norm in {**online, "layer": "layer", "none": "none"}.items():
            for size, precision, graphs in itertools.product(sizes, PRECISIONS, (True, False)):
                name = f"{kind} {label}, {precision}, {'graphs' if graphs else 'launches'} / nn.{kind}"
                works = functools.partial(_device_works, kind, norm, device, precision, graphs, size)
                yield Row(name, ",".join(map(str, size)), works, DEVICE_GOAL)


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Both sides in turn, after a warm-up of two rounds."""
    times: list[tuple[float, float]] = []
    works = row.works()
    for _ in range(rounds + 2):
        pair = []
        for work in works:
            start = time.perf_counter()
            work()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    times = times[2:]
    ours, yardstick = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    return {
        **{"name": row.name, "size": row.size, "ours_ms": ours, "yardstick_ms": yardstick, "ratio": ratio},
        **{"best_ratio": min(a for a, _ in times) / min(b for _, b in times), "goal": row.goal},
    }


GROWTH = [(32, 20, 200), (64, 20, 200), (128, 20, 200), (64, 10, 200), (64, 40, 200), (64, 20, 100), (64, 20, 400)]


def growth(T: int, N: int, H: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the online LSTM of a size."""
    work = _layer_work(rnnorm.LSTM(H, H), T, N, H)
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return {"T": T, "N": N, "H": H, "ms": statistics.median(times[2:]) * 1e3}


def machine(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {
            **{"processor": torch.cuda.get_device_name(), "threads": torch.get_num_threads()},
            **{"torch": torch.__version__, "python": platform.python_version(), "backends": rnnorm.backends(device)},
        }
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        **{"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__},
        **{"python": platform.python_version(), "backends": rnnorm.backends()},
    }


def one(task: str, quick: bool, threads: int) -> dict[str, Any]:
    """What a separate process measures: a row by its number, or a size of the growth table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind, number = task.split(":")
    if kind == "growth":
        return growth(*GROWTH[int(number)], 3 if quick else 15)
    row = list(rows(quick))[int(number)]
    slow = "1500" in row.size or "reference" in row.name
    return measure(row, 3 if quick else 5 if slow else 15)


def apart(task: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """`one` in a separate process."""
    command = [sys.executable, __file__, "--one", task, "--threads", str(chosen.threads)]
    done = subprocess.run(
        [*command, *(["--quick"] if chosen.quick else [])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {task} must end; got exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument("--threads", type=int, default=2, help="number of torch's threads (default: 2)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the rows for a GPU, not the CPU"
    )
    parser.add_argument("--tiny", action="store_true", help="the rows for a GPU at a tiny size, one round")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one, chosen.quick, chosen.threads)))
        return
    here = machine(chosen.device) | {"threads": chosen.threads}
    print(f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, Python {here['python']}\n")
    print("| what | T,N,H or M,E,V | ours ms | yardstick ms | ratio | goal |\n|---|---|---|---|---|---|")
    figures = []
    on_device = chosen.device == "cuda" or chosen.tiny
    for number, row in enumerate(device_rows(chosen.device, chosen.tiny) if on_device else rows(chosen.quick)):
        if chosen.only not in row.name:
            continue
        rounds = 1 if chosen.tiny else 3 if chosen.quick else 15
        figure = measure(row, rounds) if on_device else apart(f"row:{number}", chosen)
        figures.append(figure)
        goal = "" if row.goal is None else f"{row.goal:.2f}"
        print(
            f"| {row.name} | {row.size} | {figure['ours_ms']:.2f} | {figure['yardstick_ms']:.2f} "
            f"| {figure['ratio']:.2f} | {goal} |",
            flush=True,
        )
    sizes = [] if chosen.only or on_device else [apart(f"growth:{number}", chosen) for number in range(len(GROWTH))]
    if sizes:
        print("\n| online LSTM: T | N | H | ms |\n|---|---|---|---|")
        for size in sizes:
            print(f"| {size['T']} | {size['N']} | {size['H']} | {size['ms']:.2f} |")
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": here, "rows": figures, "growth": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
