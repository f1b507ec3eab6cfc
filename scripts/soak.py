"""Train for some minutes under repeated kills; check that nothing is lost and memory does not grow.

For half of the time a run trains undisturbed, while its memory and open files are sampled each second. For the
other half the same run, in another folder, is killed (SIGKILL) at random moments and started again, until it stands at
the same step. Then every byte of the checkpoints, every logged value and every TensorBoard scalar must be equal, times
aside.

Growth: the least-squares slope of resident memory over the second half of the undisturbed run; more than 100 KiB a
minute is a fault, and so is a smallest number of open files that is larger in the second half than before it (the
first fifth of the time left out).

python scripts/soak.py --minutes 20
"""

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lm import checkpoint

ROOT = Path(__file__).parents[1]
MOST_GROWTH = 100.0
SETTINGS = (
    "model.hidden_size=64 model.dropout=0.2 model.embedding_range=1 train.window=uniform{2..64} train.epochs=100000 "
    "train.optimizer=adam train.schedule=constant checkpoint.every_steps=50 checkpoint.every_minutes=0.1"
)
Sample = tuple[float, float, int]


def main() -> int:
    """Runs both halves and reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="total duration (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the kills (default: 1)")
    parser.add_argument("--keep", type=Path, help="empty folder for both runs (default: a temporary one)")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (known.keep or Path(temporary)).resolve()
        whole, killed = place / "undisturbed", place / "killed"
        samples = undisturbed(whole, 30 * known.minutes)
        steps = checkpoint.load(whole / "checkpoints/last.safetensors")["trainer"]["step"]
        print(f"undisturbed: {steps:,} steps in {30 * known.minutes:.0f} s", flush=True)
        finish(whole, steps)
        kills = disturbed(killed, steps, known.seed)
        print(f"killed {kills} times", flush=True)
        return report(whole, killed, samples)


def start(folder: Path, *assignments: str) -> "subprocess.Popen[bytes]":
    """Starts or resumes training in a separate process."""
    settings = [word for setting in (*SETTINGS.split(), *assignments) for word in ("--set", setting)]
    command = [sys.executable, "-m", "lm", "train", "--data", "markov", "--run", str(folder), *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def undisturbed(folder: Path, seconds: float) -> list[Sample]:
    """Trains for this long, and returns samples of (seconds, KiB of memory, open files)."""
    process = start(folder)
    began, samples = time.monotonic(), []
    while (now := time.monotonic() - began) < seconds and process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
            samples.append((now, memory, len(os.listdir(f"/proc/{process.pid}/fd"))))
        except (OSError, StopIteration):
            break  # it has just ended; reported below
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 143:
        sys.exit(f"error: the undisturbed run ended with code {process.returncode}; train in {folder} to see why")
    return samples


def finish(folder: Path, steps: int) -> None:
    """Resumes a run up to this step."""
    if code := start(folder, f"train.max_steps={steps}").wait():
        sys.exit(f"error: the resumed run ended with code {code}; train in {folder} to see why")


def disturbed(folder: Path, steps: int, seed: int) -> int:
    """Trains to this step under kills; returns the number of kills."""
    draw, kills = random.Random(seed), 0
    while True:
        process = start(folder, f"train.max_steps={steps}")
        try:
            code = process.wait(timeout=draw.uniform(5, 60))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if code:
            sys.exit(f"error: the resumed run ended with code {code}; train in {folder} to see why")
        return kills


def report(whole: Path, killed: Path, samples: list[Sample]) -> int:
    """Prints what differs and what grows; returns the exit code."""
    same = {
        "checkpoints": [
            state(folder / "checkpoints" / name)
            for folder in (whole, killed)
            for name in (checkpoint.LAST, checkpoint.BEST)
        ],
        "metrics.jsonl": [*map(logged, (whole, killed))],
        "TensorBoard": [*map(shown, (whole, killed))],
    }
    good = True
    for name, values in same.items():
        half = len(values) // 2
        equal = values[:half] == values[half:]
        good = good and equal
        print(f"{name:14} {'equal' if equal else 'DIFFERENT'} ({sum(map(len, values[:half])):,} bytes or values)")
    seconds, memory, opened = (np.array(column) for column in zip(*samples, strict=True))
    late, early = seconds > seconds[-1] / 2, (seconds > seconds[-1] / 5) & (seconds <= seconds[-1] / 2)
    slope = float(np.polyfit(seconds[late] / 60, memory[late], 1)[0])
    print(f"memory         {memory[late].mean() / 1024:,.1f} MiB, {slope:+.1f} KiB a minute ({late.sum()} samples)")
    print(f"open files     at least {opened[early].min()} in the first half, {opened[late].min()} in the second")
    return 0 if good and slope < MOST_GROWTH and opened[late].min() <= opened[early].min() else 1


def state(path: Path) -> bytes:
    """Returns the bytes of a checkpoint without the step to stop at, which differs between the runs."""
    saved = checkpoint.load(path)
    del saved["config"]["train"]["max_steps"]
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy.safetensors"
        checkpoint.save(copy, saved)
        return copy.read_bytes()


def logged(folder: Path) -> list[dict[str, Any]]:
    """Returns all logged values except times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def shown(folder: Path) -> list[tuple[str, int, float]]:
    """Returns every scalar in TensorBoard except times."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every restart
    found = EventAccumulator(str(folder / "tensorboard" / folder.name), tensor_size_guidance={"scalars": 0})
    found.Reload()
    tags = [tag for tag in found.PluginTagToContent("scalars") if not tag.endswith("per_second")]
    return [(tag, event.step, event.tensor_proto.float_val[0]) for tag in tags for event in found.Tensors(tag)]


if __name__ == "__main__":
    sys.exit(main())
