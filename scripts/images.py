"""Image classification and segmentation by norm and batch size, from one sample a batch.

    pip install '.[images]'
    python scripts/images.py --task classify --norm online --batch-size 1 --seeds 1    # one arm
    python scripts/images.py --task classify --json runs/classify.json  # the whole table; again: continues it
    python scripts/images.py --task segment --json runs/segment.json

`classify` trains a residual network on 300 of scikit-learn's 1,797 digits (8 x 8; no network needed), or with
`--data cifar10` on CIFAR-10 from the Hugging Face hub; `segment` a U-Net on 300 generated images of disks, squares and
crosses in noise, whose masks are known. Each arm (norm and batch size) takes the learning rate of the grid that is best
on validation images, by the median of two seeds that are not those of the table; where that is an end of the grid, it
is extended. Then the arm trains with each seed of the table and is tested on the rest. All else is the same for all
arms: SGD with momentum 0.9, a cosine schedule, epochs.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnorm

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    # Horizons of 100 samples, a third of the images, and of 10 for the backward pass, chosen on tuning seeds: at 1,000
    # the statistics lag behind.
    "online": lambda channels: rnnorm.OnlineNorm(channels, alpha_fwd=0.99, alpha_bwd=0.9),
    "group": lambda channels: nn.GroupNorm(4, channels),
    "none": lambda channels: nn.Identity(),
}
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
MOST_ADDED = 4  # to the grid, for an arm whose best rate is an end of it
TUNING_SEEDS = (101, 102)
MOMENTUM = 0.9
TRAIN, VALID = 300, 200  # images of digits and of generated shapes


class Images(NamedTuple):
    """Images [N, C, H, W], and a class for each [N] or for each pixel [N, H, W]."""

    inputs: Tensor
    targets: Tensor

    def part(self, index: Any) -> "Images":
        return Images(self.inputs[index], self.targets[index])


class Data(NamedTuple):
    train: Images
    valid: Images
    test: Images
    classes: int


def digits(seed: int) -> Data:
    """300 images to train on, 200 to validate, 1,297 to test, drawn by the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    whole = Images(torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target))
    return _split(whole, seed, 10)


def cifar10(seed: int) -> Data:
    """CIFAR-10: 45,000 images to train on, 5,000 to validate, drawn by the seed, and its 10,000 to test."""
    from datasets import load_dataset

    def images(split: str) -> Images:
        rows = load_dataset("cifar10", split=split).with_format("torch")
        return Images(rows["img"][:].float() / 255 - 0.5, rows["label"][:])

    whole = images("train")
    order = torch.randperm(len(whole.targets), generator=torch.Generator().manual_seed(seed))
    return Data(whole.part(order[5000:]), whole.part(order[:5000]), images("test"), 10)


def shapes(seed: int, size: int = 32, count: int = 1000) -> Data:
    """Disks (1), squares (2) and crosses (3) on a background (0), in noise, brighter than it, overlapping."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inputs = 0.3 * torch.randn(count, 1, size, size, generator=draw)
    targets = torch.zeros(count, size, size, dtype=torch.int64)
    for image, mask in zip(inputs, targets, strict=True):
        for _ in range(int(torch.randint(1, 4, (), generator=draw))):
            kind = int(torch.randint(1, 4, (), generator=draw))
            radius = int(torch.randint(4, 8, (), generator=draw))
            dy, dx = ((axis - torch.randint(size, (), generator=draw)).abs() for axis in (y, x))
            inside = {
                1: dx.square() + dy.square() <= radius**2,
                2: torch.maximum(dx, dy) <= 0.8 * radius,
                3: (torch.minimum(dx, dy) <= 1) & (torch.maximum(dx, dy) <= radius),
            }[kind]
            image[0, inside] += 1 + torch.rand((), generator=draw)
            mask[inside] = kind
    return _split(Images(inputs, targets), seed, 4)


def _split(whole: Images, seed: int, classes: int) -> Data:
    order = torch.randperm(len(whole.targets), generator=torch.Generator().manual_seed(seed))
    parts = order[:TRAIN], order[TRAIN : TRAIN + VALID], order[TRAIN + VALID :]
    return Data(*(whole.part(part) for part in parts), classes)


def _layer(norm: str, before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=norm == "none"), NORMS[norm](after))


class Residual(nn.Module):
    """A residual network: a convolution, three blocks of 16, 32 and 64 channels, the mean over the image, a decoder."""

    def __init__(self, norm: str, channels: int, classes: int) -> None:
        super().__init__()
        self.first = _layer(norm, channels, 16)
        sizes = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.blocks = nn.ModuleList(
            nn.Sequential(_layer(norm, before, after, stride), nn.ReLU(), _layer(norm, after, after))
            for before, after, stride in sizes
        )
        self.around = nn.ModuleList(nn.Conv2d(before, after, 1, stride) for before, after, stride in sizes)
        self.decoder = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block, around in zip(self.blocks, self.around, strict=True):
            x = (block(x) + around(x)).relu()
        return self.decoder(x.mean((2, 3)))


class UNet(nn.Module):
    """A U-Net: three levels of 8, 16 and 32 channels down, and up again beside what each level was on the way down."""

    def __init__(self, norm: str, channels: int, classes: int) -> None:
        super().__init__()
        widths = (8, 16, 32)
        self.down = nn.ModuleList(
            nn.Sequential(_layer(norm, before, after), nn.ReLU(), _layer(norm, after, after), nn.ReLU())
            for before, after in zip((channels, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.Sequential(_layer(norm, below + after, after), nn.ReLU()) for below, after in ((32, 16), (16, 8))
        )
        self.decoder = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for number, down in enumerate(self.down):
            x = down(x if number == 0 else F.max_pool2d(x, 2))
            levels.append(x)
        for up, beside in zip(self.up, reversed(levels[:-1]), strict=True):
            x = up(torch.cat((F.interpolate(x, scale_factor=2), beside), 1))
        return self.decoder(x)


def accuracy(logits: Tensor, targets: Tensor, classes: int) -> float:
    """Part of the images whose class is right."""
    return (logits.argmax(1) == targets).double().mean().item()


def intersection_over_union(logits: Tensor, targets: Tensor, classes: int) -> float:
    """Mean over the classes of common pixels / pixels of either."""
    found = logits.argmax(1)
    each = [((found == k) & (targets == k)).sum() / ((found == k) | (targets == k)).sum() for k in range(classes)]
    return torch.stack(each).double().nan_to_num(1.0).mean().item()


# What loads the data: its module, and the package's name.
PACKAGES = {"digits": ("sklearn", "scikit-learn"), "cifar10": ("datasets", "datasets")}


class Task(NamedTuple):
    data: dict[str, Callable[[int], Data]]
    model: type[nn.Module]
    score: Callable[[Tensor, Tensor, int], float]
    epochs: int


TASKS = {
    "classify": Task({"digits": digits, "cifar10": cifar10}, Residual, accuracy, 15),
    "segment": Task({"shapes": shapes}, UNet, intersection_over_union, 20),
}


class Run(NamedTuple):
    """One training; `loss` is that of the last epoch. Of a run that diverged it is None, and the scores are 0."""

    norm: str
    batch_size: int
    lr: float
    seed: int
    loss: float | None
    valid: float
    test: float
    seconds: float
    diverged: bool


def train(
    task: Task, data: Data, norm: str, batch_size: int, lr: float, seed: int, epochs: int, writer: Any, tick: Any
) -> Run:
    """Trains and tests one model."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = task.model(norm, data.train.inputs.size(1), data.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    count = len(data.train.targets)
    steps, step, total, diverged = epochs * math.ceil(count / batch_size), 0, 0.0, False
    for epoch in range(epochs):
        total = 0.0
        for batch in map(data.train.part, torch.randperm(count).split(batch_size)):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            total, step = total + loss.item() * len(batch.targets), step + 1
        tick(1)
        diverged = not math.isfinite(total)
        if writer is not None:
            writer.add_scalar("train/loss", total / count, epoch + 1)
            writer.add_scalar("valid/score", _score(task, model, data.valid, data.classes), epoch + 1)
        if diverged:
            tick(epochs - epoch - 1)
            break
    valid, test = (0.0 if diverged else _score(task, model, part, data.classes) for part in (data.valid, data.test))
    loss_or_none = None if diverged else total / count
    return Run(norm, batch_size, lr, seed, loss_or_none, valid, test, time.perf_counter() - began, diverged)


@torch.no_grad()
def _score(task: Task, model: nn.Module, images: Images, classes: int) -> float:
    model.eval()
    logits = torch.cat([model(part) for part in images.inputs.split(256)])
    model.train()
    return task.score(logits, images.targets, classes)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(runs: list[Run]) -> dict[str, Any]:
    """An arm's row of the table."""
    low, middle, high = quartiles([run.test for run in runs])
    first = runs[0]
    return {
        **{"norm": first.norm, "batch_size": first.batch_size, "lr": first.lr, "seeds": len(runs)},
        **{"median": middle, "quartiles": [low, high], "diverged": sum(run.diverged for run in runs)},
    }


def claim(runs: list[Run]) -> str:
    """Whether online normalization at batch size 1 is within the seeds' spread of batch normalization at 32."""
    tests = {(norm, size): [r.test for r in runs if (r.norm, r.batch_size) == (norm, size)] for norm, size in _ARMS}
    online, batch = (tests[arm] for arm in _ARMS)
    if not online or not batch:
        return ""
    middle, low, high = statistics.median(online), min(batch), max(batch)
    verdict = "at least" if middle >= low else "below"
    return (
        f"online at batch size 1: median {middle:.4f}, {verdict} the least of batch at 32, whose {len(batch)} seeds "
        f"lie in {low:.4f} to {high:.4f}"
    )


_ARMS = (("online", 1), ("batch", 32))


class Table:
    """What is done of a table, in a file that is whole at any time; a file of the same settings is continued."""

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        self.runs: list[Run] = []
        self.tuning: list[Run] = []
        self._began = time.perf_counter()
        if file is None or not file.exists():
            return
        try:
            record = json.loads(file.read_text())
            self.runs, self.tuning = ([Run(**run) for run in record[name]] for name in ("runs", "tuning"))
            self._began -= 60 * record["minutes"]
        except (ValueError, TypeError, KeyError) as fault:
            raise SystemExit(f"--json must name a new file or a table of this script; got {file}: {fault!r}") from None
        for name, value in settings.items():
            if record.get(name) != value:
                raise SystemExit(
                    f"--json must name a new file or a table of the same settings; got {file}, whose {name} is "
                    f"{record.get(name)}, not {value}; name another"
                )
        print(f"{len(self.done)} arms are in {file} and are not trained again", file=sys.stderr)

    @property
    def done(self) -> list[tuple[str, int]]:
        """The arms, in the order of a table."""
        found = {(run.norm, run.batch_size) for run in self.runs}
        return sorted(found, key=lambda arm: ([*NORMS].index(arm[0]), arm[1]))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [summary([run for run in self.runs if (run.norm, run.batch_size) == arm]) for arm in self.done]

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self._began) / 60

    def add(self, tuning: list[Run], runs: list[Run]) -> None:
        self.tuning += tuning
        self.runs += runs
        if self._file is None:
            return
        record = {
            **self._settings,
            **{"minutes": self.minutes, "torch": torch.__version__, "rnnorm": rnnorm.__version__},
            **{"claim": claim(self.runs), "table": self.rows, "runs": [run._asdict() for run in self.runs]},
            "tuning": [run._asdict() for run in self.tuning],
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_name(f".{self._file.name}.new")
        new.write_text(json.dumps(record, indent=1) + "\n")
        new.replace(self._file)


def arms(chosen: argparse.Namespace, done: list[tuple[str, int]], bar: Any) -> Iterator[tuple[list[Run], list[Run]]]:
    """Each arm's runs to tune its learning rate, and those of the table; without the arms that are done."""
    task = TASKS[chosen.task]
    make = task.data[chosen.data]
    for norm in chosen.norm:
        for size in chosen.batch_size:
            if (norm, size) in done:
                continue

            def run(lr: float, seed: int, norm: str = norm, size: int = size) -> Run:
                bar.set_description(f"{norm}, batch size {size}, lr {lr:g}, seed {seed}")
                name = f"{chosen.task}-{norm}-{size}-{lr:g}-{seed}"
                with _writer(chosen.tensorboard, name) as writer:
                    return train(task, make(seed), norm, size, lr, seed, chosen.epochs, writer, bar.update)

            tuning: list[Run] = []

            def score(lr: float, run: Callable[[float, int], Run] = run, tuning: list[Run] = tuning) -> float:
                if lr not in chosen.lr:
                    bar.total += len(TUNING_SEEDS) * chosen.epochs
                found = [run(lr, seed) for seed in TUNING_SEEDS]
                tuning += found
                return statistics.median(r.valid for r in found)

            best = tuned(sorted(set(chosen.lr)), score)
            yield tuning, [run(best, seed) for seed in range(1, chosen.seeds + 1)]


def tuned(rates: list[float], score: Callable[[float], float]) -> float:
    """The best of ascending rates, the least of equals. While it is an end of the grid, the grid grows there."""
    if len(rates) == 1:
        return rates[0]
    scores = {lr: score(lr) for lr in rates}
    for _ in range(MOST_ADDED):
        best = max(rates, key=lambda lr: scores[lr])
        if best not in (rates[0], rates[-1]):
            break
        towards = rates[:3] if best == rates[0] else rates[:-4:-1]
        # 1, 3, 10 … go on as 0.3, 0.1 and 30, 100
        added = float(f"{towards[-2] * towards[0] / towards[-1]:.3g}")
        scores[added] = score(added)
        rates = sorted(scores)
    return max(rates, key=lambda lr: scores[lr])


def _writer(folder: Path | None, name: str) -> Any:
    if folder is None:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / name)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True, help="what to train")
    parser.add_argument("--data", help="digits (default) or cifar10; shapes")
    parser.add_argument("--norm", nargs="+", choices=NORMS, default=list(NORMS), help="norms (default: all)")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 4, 32], help="batch sizes (default: 1 4 32)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 … K of each arm (default: 5)")
    parser.add_argument(
        "--lr", nargs="+", type=float, default=list(GRID), help=f"learning rates to try (default: {GRID})"
    )
    parser.add_argument("--epochs", type=int, help="epochs (default: 15; of segment 20)")
    parser.add_argument("--threads", type=int, default=1, help="number of torch's threads (default: 1)")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write TensorBoard files, a folder a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run and the table, after each arm")
    chosen = parser.parse_args(given)
    known = TASKS[chosen.task].data
    if chosen.data is not None and chosen.data not in known:
        parser.error(f"--data of {chosen.task} must be one of {', '.join(known)}; got {chosen.data}")
    module, package = PACKAGES.get(chosen.data or next(iter(known)), ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        parser.error(f"these images need the package {package}, which is not installed; pip install '.[images]'")
    if min(*chosen.batch_size, chosen.seeds, *(chosen.lr or [0]), chosen.epochs or 1) <= 0:
        parser.error("--batch-size, --seeds, --lr and --epochs must be greater than 0")
    chosen.epochs = chosen.epochs or TASKS[chosen.task].epochs
    chosen.data = chosen.data or next(iter(known))
    torch.set_num_threads(chosen.threads)

    from tqdm import tqdm

    settings = {
        **{"task": chosen.task, "data": chosen.data, "epochs": chosen.epochs, "seeds": chosen.seeds},
        **{"grid": chosen.lr, "tuning_seeds": [*TUNING_SEEDS], "momentum": MOMENTUM, "threads": chosen.threads},
    }
    table = Table(chosen.json, settings)
    each = chosen.seeds + (len(chosen.lr) * len(TUNING_SEEDS) if len(chosen.lr) > 1 else 0)
    left = {*itertools.product(chosen.norm, chosen.batch_size)} - {*table.done}
    count = len(left) * each * chosen.epochs
    with tqdm(total=count, unit=" epochs", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for tuning, found in arms(chosen, table.done, bar):
            table.add(tuning, found)
    score = "accuracy" if chosen.task == "classify" else "mean IoU"
    print(f"| norm | batch size | learning rate | {score}, median | quartiles | diverged |\n|---|---|---|---|---|---|")
    for row in table.rows:
        low, high = row["quartiles"]
        print(
            f"| {row['norm']} | {row['batch_size']} | {row['lr']:g} | {row['median']:.4f} | {low:.4f} to {high:.4f} "
            f"| {row['diverged']} of {row['seeds']} |"
        )
    print(f"\n{claim(table.runs)}\n{table.minutes:.1f} minutes, {chosen.threads} threads".lstrip())


if __name__ == "__main__":
    main()
