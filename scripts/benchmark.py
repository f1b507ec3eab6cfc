"""Measure rnnorm against torch: each row in a separate process, its two sides in turn, medians and ratios.

    python scripts/benchmark.py                  # every row, about ten minutes on 2 cores
    python scripts/benchmark.py --quick          # few rounds, small sizes only
    python scripts/benchmark.py --json FILE      # also write the results as JSON
    python scripts/benchmark.py --only LSTM      # only rows whose name contains TEXT
    python scripts/benchmark.py --train FOLDER   # tokens/s of `lm train` on FOLDER/train.txt and of torch's parts
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
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
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


def _autocast(half: bool, device: str = "cpu") -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16, enabled=half)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _layer_work(layer: nn.Module, T: int, N: int, size: int, half: bool = False, **call: Any) -> Work:
    """Forward and backward of a layer, the input's gradient included, on the device and in the dtype of its weights, or
    with `half` under autocast in bfloat16."""
    like = next(layer.parameters())
    x = torch.randn(T, N, size).to(like).requires_grad_()
    grad = torch.randn(T, N, size).to(torch.bfloat16 if half else like.dtype).to(like.device)

    def work() -> None:
        layer.zero_grad()
        with _autocast(half):
            y = layer(x, **call)[0]
        y.backward(grad)
        _finish(like.device.type)

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

    def __init__(self, vocabulary: int, size: int, num_layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.layers = nn.LSTM(size, size, num_layers, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def loss(self, inputs: Tensor, targets: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.layers(self.dropout(self.embedding(inputs)), state)
        logits = F.linear(self.dropout(hidden), self.embedding.weight, self.bias)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), state


def _step_work(model: nn.Module, loss: Callable[[], Tensor], half: bool, device: str) -> Work:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def work() -> None:
        optimizer.zero_grad()
        with _autocast(half, device):
            found = loss()
        found.backward()
        optimizer.step()
        _finish(device)

    return work


def _decoder_works(
    M: int, E: int, V: int, half: bool = False, their_half: bool = False, device: str = "cpu"
) -> tuple[Work, Work]:
    hidden = torch.randn(M, E, device=device, requires_grad=True)
    weight = (0.1 * torch.randn(V, E, device=device)).requires_grad_()
    bias = torch.zeros(V, device=device, requires_grad=True)
    targets = torch.randint(V, (M,), device=device)

    def fresh() -> None:
        hidden.grad = weight.grad = bias.grad = None

    def ours() -> None:
        fresh()
        with _autocast(half, device):
            nats, count = linear_cross_entropy(hidden, weight, bias, targets)
        (nats / count).backward()
        _finish(device)

    def torchs() -> None:
        fresh()
        with _autocast(their_half, device):
            loss = F.cross_entropy(F.linear(hidden, weight, bias), targets)
        loss.backward()
        _finish(device)

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


def _step_works(
    V: int, size: int, T: int, N: int, half: bool = False, their_half: bool = False, device: str = "cpu", **options: Any
) -> tuple[Work, Work]:
    # as frequent as the words of a text
    inputs, targets = ((V ** torch.rand(T, N, device=device)).long() - 1 for _ in range(2))
    ours = LanguageModel(ModelConfig(hidden_size=size, **options), V).to(device)
    plain = TorchLanguageModel(V, size).to(device)

    def our_loss() -> Tensor:
        nats, count = ours.loss(ours(inputs)[0], targets)
        return nats / count

    def their_loss() -> Tensor:
        return plain.loss(inputs, targets)[0]

    return _step_work(ours, our_loss, half, device), _step_work(plain, their_loss, their_half, device)


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


def _pair(
    ours: Callable[[int], nn.Module],
    torchs: Callable[[int], nn.Module],
    size: tuple[int, int, int],
    half: bool = False,
    their_half: bool = False,
) -> Any:
    T, N, H = size
    return lambda: (_layer_work(ours(H), T, N, H, half), _layer_work(torchs(H), T, N, H, their_half))


def _lstm(**options: Any) -> Callable[[int], nn.Module]:
    return lambda H: rnnorm.LSTM(H, H, **options)


def _torchs(kind: str) -> Callable[[int], nn.Module]:
    return lambda H: getattr(nn, kind)(H, H)


def _bfloat16_rows(sizes: Sequence[tuple[int, int, int]], decoder: Any, step: Any) -> Iterator[Row]:
    """In bfloat16, to torch's time in float32 and in bfloat16."""
    small, at = sizes[0], ",".join(map(str, sizes[0]))
    wide, narrow = {"half": True}, {"half": True, "their_half": True}
    goals16 = {
        "none": ((0.60, 0.85), (0.50, 0.55), (0.43, 0.38)),
        **dict.fromkeys(("online", "layer"), ((0.65, 0.90), (0.55, 0.60), (0.45, 0.40))),
    }
    for norm, both in goals16.items():
        for size, (to_wide, to_narrow) in zip(sizes, both, strict=False):
            where = ",".join(map(str, size))
            works = functools.partial(_pair, _lstm(norm=norm), _torchs("LSTM"), size)
            yield Row(f"LSTM {norm}, bfloat16 / nn.LSTM, float32", where, works(**wide), to_wide)
            yield Row(f"LSTM {norm}, bfloat16 / nn.LSTM, bfloat16", where, works(**narrow), to_narrow)
    for size, goal in zip(sizes, (0.35, 0.32, 0.25), strict=False):
        works = _pair(lambda H: rnnorm.GRU(H, H), _torchs("GRU"), size, **wide)
        yield Row("GRU online, bfloat16 / nn.GRU, float32", ",".join(map(str, size)), works, goal)
    works = _pair(lambda H: rnnorm.RNN(H, H), _torchs("RNN"), small, **wide)
    yield Row("RNN tanh online, bfloat16 / nn.RNN, float32", at, works, 0.38)
    for name, works, to_wide, to_narrow in (
        ("linear_cross_entropy, bfloat16 / torch's pair", decoder, 0.30, 0.60),
        ("training step, 1x200 tied, bfloat16 / torch's parts", step, 0.33, 0.60),
    ):
        where = "1280,200,10000" if works is decoder else at
        yield Row(f"{name}, float32", where, functools.partial(works, **wide), to_wide)
        yield Row(f"{name}, bfloat16", where, functools.partial(works, **narrow), to_narrow)


def rows(quick: bool) -> Iterator[Row]:
    """Every row; nothing is made before its `works` is called."""
    sizes = [(64, 20, 200), (35, 20, 650), (35, 20, 1500)][: 1 if quick else None]
    small = T, N, H = sizes[0]
    at = f"{T},{N},{H}"

    goals = {"none": (1.00, 0.97, 0.79), "online": (1.05, 0.98, 0.80), "layer": (1.05, 0.98, 0.80)}
    for norm, each in goals.items():
        for size, goal in zip(sizes, each, strict=False):
            works = _pair(_lstm(norm=norm), _torchs("LSTM"), size)
            yield Row(f"LSTM {norm} / nn.LSTM", ",".join(map(str, size)), works, goal)
    for size, goal in zip(sizes, (0.56, 0.56, 0.42), strict=False):
        works = _pair(lambda H: rnnorm.GRU(H, H), _torchs("GRU"), size)
        yield Row("GRU online / nn.GRU", ",".join(map(str, size)), works, goal)
    yield Row("RNN tanh online / nn.RNN", at, _pair(lambda H: rnnorm.RNN(H, H), _torchs("RNN"), small), 0.55)
    evaluation = lambda: (_evaluation_work(_lstm()(H), 512, H), _evaluation_work(nn.LSTM(H, H), 512, H))  # noqa: E731
    yield Row("LSTM online, evaluation / nn.LSTM", f"512,1,{H}", evaluation, 1.0)
    reference, scripted = _lstm(backend="reference"), _lstm(backend="scripted")
    yield Row("LSTM online / eager per step (reference)", at, _pair(_lstm(), reference, small), 0.03)
    yield Row("LSTM online / TorchScript (scripted)", at, _pair(_lstm(), scripted, small))
    yield Row("LSTM online, scripted / reference", at, _pair(scripted, reference, small), 0.20)
    yield Row("LSTM layer / eager per step", at, _pair(_lstm(norm="layer"), EagerLayerNormLSTM, small))
    decoder = functools.partial(_decoder_works, 1280, 200, 10000)
    step = functools.partial(_step_works, 10000, 200, T, N)
    yield Row("linear_cross_entropy / torch's pair", "1280,200,10000", decoder, 0.52)
    yield Row("training step, 1x200 tied / torch's parts", at, step, 0.57)
    if not quick:
        large: dict[str, Any] = {"decoder": "adaptive", "tied": False, "sparse_embedding": True}
        works = functools.partial(_step_works, 300_000, H, 35, N, **large)
        yield Row("training step, 300,000 words, adaptive softmax / torch's parts", f"35,{N},{H}", works, 0.06)
    yield from _bfloat16_rows(sizes, decoder, step)
    lengths, begins = torch.randint(1, T + 1, (N,)), torch.rand(T, N) < 1 / 32
    padded = lambda: _layer_work(_lstm()(H), T, N, H)  # noqa: E731
    yield Row(
        "lengths uniform in 1..64 / padded, ours",
        at,
        lambda: (_layer_work(_lstm()(H), T, N, H, lengths=lengths), padded()),
        1.0,
    )
    yield Row("dropout inside the loop / without, ours", at, lambda: _masked_works(T, N, H), 1.05)
    # The goal at 128,64 is 0.05 ms more than the yardstick.
    shapes = {(128, 64): None, (1280, 800): 1.3, (32, 64, 32, 32): 1.1, (64, 128, 16, 16): 1.1}
    for shape, aim in list(shapes.items())[: 1 if quick else None]:
        works = lambda shape=shape: _norm_works(shape)  # noqa: E731
        yield Row("OnlineNorm / nn.BatchNorm", ",".join(map(str, shape)), works, aim)
    yield Row("reset / without, ours", at, lambda: (_layer_work(_lstm()(H), T, N, H, reset=begins), padded()), 1.03)


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


def _plain_products(works: Callable[..., tuple[Work, Work]], *size: int, **options: Any) -> tuple[Work, Work]:
    """As a program has it that sets nothing: graphs, and products of float32 without TF32."""
    os.environ.pop("RNNORM_CUDA_GRAPHS", None)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return works(*size, **options)


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
    used = [(1280, 200, 10_000), (700, 650, 10_000), (2800, 400, 33_278), (4200, 1500, 50_257)]
    decoders = [(6, 5, 11)] if tiny else used
    steps = [(11, 5, 2, 2)] if tiny else [(10_000, 200, 64, 20), (10_000, 650, 35, 20)]
    for half in (False, True):
        options: dict[str, Any] = {"half": half, "their_half": half, "device": device}
        ours, theirs = ("bfloat16", ", bfloat16") if half else ("float32", "")
        for size in decoders:
            works = functools.partial(_plain_products, _decoder_works, *size, **options)
            yield Row(f"linear_cross_entropy, {ours} / torch's pair{theirs}", ",".join(map(str, size)), works)
        for V, H, T, N in steps:
            works = functools.partial(_plain_products, _step_works, V, H, T, N, **options)
            yield Row(f"training step, online, tied, {ours} / torch's parts{theirs}", f"{T},{N},{H}", works)


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


class Program(NamedTuple):
    """A whole training program: dropout on words, between layers and on the output; SGD; the gradient clipped."""

    num_layers: int
    size: int
    dropout: float
    N: int
    T: int
    lr: float
    clip: float


PROGRAMS = {
    "1x200 tied, batch 20, window 64": Program(1, 200, 0.0, 20, 64, 1.0, 5.0),
    "2x200 tied, dropout 0.2, batch 20, window 35": Program(2, 200, 0.2, 20, 35, 20.0, 0.25),
}


def _train_text(folder: str) -> Path:
    found = sorted(Path(folder).glob("*train.txt"))
    if not found:
        sys.exit(f"error: --train must name a folder that holds train.txt or NAME.train.txt; got {folder}")
    return found[0]


def plain_program(folder: str, form: list[Any], steps: int, half: bool) -> None:
    """The usual word-level script of torch's parts: vocabulary, columns, windows, a state that is carried on."""
    program = Program(*form)
    ids: dict[str, int] = {}
    words = (word for line in _train_text(folder).open() for word in [*line.split(), "<eos>"])
    text = torch.tensor([ids.setdefault(word, len(ids)) for word in words])
    columns = text[: len(text) // program.N * program.N].view(program.N, -1).t().contiguous()
    model = TorchLanguageModel(len(ids), program.size, program.num_layers, program.dropout)
    optimizer, state = torch.optim.SGD(model.parameters(), lr=program.lr), None
    for step in range(steps):
        start = step * program.T % (len(columns) - program.T)
        window = columns[start : start + program.T + 1]
        optimizer.zero_grad()
        with _autocast(half):
            loss, state = model.loss(window[:-1], window[1:], state)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), program.clip)
        optimizer.step()
        state = tuple(part.detach() for part in state)
        loss.item()


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} must end; got exit code {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - start


def programs(folder: str, quick: bool, threads: int) -> Iterator[dict[str, Any]]:
    """Tokens/s of whole programs: from the time that more steps take, so that start and end cancel."""
    few, many, rounds = (5, 15, 1) if quick else (20, 120, 2)

    def ours(program: Program, norm: str, precision: str, steps: int) -> float:
        settings = {
            **({"model.control_floor": 1e-5} if norm == "online" else {}),  # without it the first steps may diverge
            **{"model.norm": norm, "model.num_layers": program.num_layers, "model.hidden_size": program.size},
            **{
                "model.tied": "true",
                "model.dropout": program.dropout,
                "train.optimizer": "sgd",
                "train.lr": program.lr,
            },
            **{"train.clip": program.clip, "train.batch_size": program.N, "train.window": program.T},
            **{"train.schedule": "constant", "train.precision": precision, "train.max_steps": steps},
        }
        assignments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        with tempfile.TemporaryDirectory() as run:
            return _seconds(
                [sys.executable, "-m", "lm", "train", "--data", folder, *assignments, "--run", f"{run}/run"]
            )

    def theirs(program: Program, half: bool, steps: int) -> float:
        task = f"loop:{json.dumps([folder, program, steps, half])}"
        return _seconds([sys.executable, __file__, "--one", task, "--threads", str(threads)])

    def rate(program: Program, seconds: Callable[[int], float]) -> float:
        return (many - few) * program.N * program.T / (seconds(many) - seconds(few))

    for (name, program), norm in itertools.product(PROGRAMS.items(), ("none", "online")):
        sides = {
            "ours": functools.partial(ours, program, norm, "float32"),
            "ours_bfloat16": functools.partial(ours, program, norm, "bfloat16"),
            "torch": functools.partial(theirs, program, False),
            "torch_bfloat16": functools.partial(theirs, program, True),
        }
        found: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, seconds in sides.items():
                found[side].append(rate(program, seconds))
        yield {"name": name, "norm": norm, **{side: statistics.median(rates) for side, rates in found.items()}}


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
    kind, number = task.split(":", 1)
    if kind == "growth":
        return growth(*GROWTH[int(number)], 3 if quick else 15)
    if kind == "loop":
        plain_program(*json.loads(number))
        return {}
    row = list(rows(quick))[int(number)]
    slow = "1500" in row.size or "reference" in row.name
    return measure(row, 3 if quick else 5 if slow else 15)


def apart(task: str, chosen: argparse.Namespace, threads: int | None = None) -> dict[str, Any]:
    """`one` in a separate process."""
    command = [sys.executable, __file__, "--one", task, "--threads", str(threads or chosen.threads)]
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
    parser.add_argument(
        "--train",
        metavar="FOLDER",
        help="only tokens/s of whole programs on FOLDER/train.txt: `lm train`, torch's parts",
    )
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one, chosen.quick, chosen.threads)))
        return
    here = machine(chosen.device) | {"threads": chosen.threads}
    print(f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, Python {here['python']}\n")
    if chosen.train:
        _train_text(chosen.train)
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
        print(
            "| program | norm | ours | bfloat16 | torch's parts | bfloat16 |  ratios |\n|---|---|---|---|---|---|---|"
        )
        for found in programs(chosen.train, chosen.quick, chosen.threads):
            rates = [found[side] for side in ("ours", "ours_bfloat16", "torch", "torch_bfloat16")]
            ratios = f"{rates[0] / rates[2]:.2f}, {rates[1] / rates[2]:.2f}"
            cells = [found["name"], found["norm"], *(f"{rate:,.0f}" for rate in rates), ratios]
            print(f"| {' | '.join(cells)} |", flush=True)
        return
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
    counts = [] if chosen.only or on_device else sorted({1, chosen.threads})
    sizes = [
        apart(f"growth:{number}", chosen, threads) | {"threads": threads}
        for number in range(len(GROWTH))
        for threads in counts
    ]
    if sizes:
        print("\n| online LSTM: T | N | H | threads | ms |\n|---|---|---|---|---|")
        for size in sizes:
            print(f"| {size['T']} | {size['N']} | {size['H']} | {size['threads']} | {size['ms']:.2f} |")
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": here, "rows": figures, "growth": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
