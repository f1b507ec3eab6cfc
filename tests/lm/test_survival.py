"""Real processes that are killed, and disks that fail: what was saved stays, and the end is the same to the byte."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lm import checkpoint, run
from lm.cli import main
from lm.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = "model.hidden_size=8 model.dropout=0.2 train.batch_size=3 train.window=uniform{2..9} train.log_every=1"
SMALL += " train.schedule=constant"


class Nursery:
    """See nursery.py; `start` begins a process, `end` returns its exit code."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, Path(__file__).with_name("nursery.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments, log, **options):
        task = {"arguments": [str(argument) for argument in arguments], "log": str(log), **options}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        return int(self.process.stdout.readline())

    def call(self, *arguments, log, **options):
        self.start(*arguments, log=log, **options)
        return self.end()


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    with made.process:
        made.process.stdin.close()


@pytest.fixture
def command(tmp_path, lines):
    """`command("section.key=value", …, run=folder)`: the arguments of a small training."""
    text = tmp_path / "text"
    text.mkdir()
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        (text / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines(count, seed=count)))

    def make(*assignments, run):
        settings = (word for setting in (*SMALL.split(), *assignments) for word in ("--set", setting))
        return ["train", "--data", text, "--run", run, *settings]

    return make


def logged(folder):
    """Every line of metrics.jsonl, but the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


ALL = {"scalars": 0, "histograms": 0, "text": 0}


def names_in(folder):
    """The names of its files and folders, but TensorBoard's files and their folder, which has the run's name."""
    found = {path.name for path in folder.rglob("*") if not path.name.startswith("events.")}
    return found - {folder.name}


def scalars(folder):
    """Every scalar that TensorBoard shows, but the times."""
    found = EventAccumulator(str(folder / "tensorboard" / folder.name), tensor_size_guidance=ALL)
    found.Reload()
    numbers = [tag for tag in found.PluginTagToContent("scalars") if "per_second" not in tag]
    shown = {tag: [(e.step, e.tensor_proto.float_val[0]) for e in found.Tensors(tag)] for tag in numbers}
    assert "perplexity/epoch" in shown
    others = {*found.Tags()["tensors"]} - {*found.PluginTagToContent("scalars")}
    return shown | {tag: [e.step for e in found.Tensors(tag)] for tag in others}


def bytes_of(folder):
    """The checkpoints that count, as bytes."""
    return {name: (folder / "checkpoints" / name).read_bytes() for name in ("last.safetensors", "best.safetensors")}


# each has its own cell, norm, schedule, optimizer; all have dropout, random windows and saves inside the epochs
PRODUCT = {
    "sgd": "model.norm=online train.momentum=0.5 train.lr=0.2 train.schedule=plateau train.patience=9",
    "asgd": "model.cell=gru model.norm=online train.lr=0.5 train.average_patience=none train.schedule=exponential",
    "adam": "model.cell=rnn model.norm=rms train.lr=0.01 train.schedule=cosine train.warmup_steps=9 model.num_layers=2",
    "adamw": "model.norm=online model.cell_norm=true train.lr=0.01 train.window=awd{6} model.embedding_dropout=0.1 "
    "model.weight_dropout=0.3 model.recurrent_dropout=0.2 model.zoneout=0.1 model.zoneout_c=0.2",
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", PRODUCT)
def test_killed_many_times_it_ends_with_the_same_bytes(nursery, command, tmp_path, optimizer):
    settings = (
        f"train.optimizer={optimizer}",
        "train.epochs=4",
        "checkpoint.every_steps=7",
        *PRODUCT[optimizer].split(),
    )
    assert nursery.call(*command(*settings, run=tmp_path / "whole"), log=tmp_path / "log") == 0
    steps = checkpoint.load(tmp_path / "whole/checkpoints/last.safetensors")["trainer"]["step"]
    draw = random.Random(optimizer)
    folder, kills = tmp_path / "run", []
    for at in sorted(draw.sample(range(steps), 4)):
        number = nursery.start(*command(*settings, run=folder), log=tmp_path / "log")
        wait_for_step(folder, at)
        time.sleep(draw.uniform(0, 0.01))  # so that writes are hit too
        os.kill(number, signal.SIGKILL)
        if nursery.end() == -signal.SIGKILL:
            kills.append(at)
    assert len(kills) >= 3, "the processes ended before they were killed"
    assert nursery.call(*command(*settings, run=folder), log=tmp_path / "log") == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")
    assert logged(folder) == logged(tmp_path / "whole")
    assert scalars(folder) == scalars(tmp_path / "whole")
    assert names_in(folder) == names_in(tmp_path / "whole")


def wait_for_step(folder, step):
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline:
        last = log.read_text().rstrip().rpartition("\n")[2] if log.exists() else ""
        found = re.search(r'"step": (\d+)', last)
        if step == 0 or (found and int(found[1]) >= step):
            return
        time.sleep(0.001)
    raise AssertionError(f"step {step} was never logged")


def test_a_limit_on_file_size_is_a_full_disk(nursery, command, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = command("train.max_steps=20", run=folder)
    assert nursery.call(*arguments, log=log) == 0
    before = bytes_of(folder)
    limit = len(before["last.safetensors"]) - 1000
    arguments = command("train.max_steps=40", run=folder)
    assert nursery.call(*arguments, log=log, file_limit=limit) == 2
    told = r"\nerror: \S+last\.safetensors must be writable; File too large; .*good checkpoint is \S+ \(step 20\)\n"
    assert re.search(told, log.read_text())
    assert bytes_of(folder) == before
    assert nursery.call(*arguments, log=log) == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def disk(tmp_path):
    """A small separate file system; `disk("ro")` makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)

    done = mount("size=400k")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place, lambda: mount("remount,ro")
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_full(nursery, command, disk, tmp_path):
    place, _ = disk
    folder, log = place / "run", tmp_path / "log"
    arguments = command("train.epochs=400", "checkpoint.every_steps=5", run=folder)
    assert nursery.call(*arguments, log=log) == 2
    told = log.read_text()
    assert "Traceback" not in told
    found = re.search(
        r"\nerror: (\S+) must be writable; No space left on device; .*the last good checkpoint is "
        r"(\S+) \(step (\d+)\)\n",
        told,
    )
    assert found, told
    assert Path(found[1]).is_relative_to(folder)
    assert checkpoint.load(Path(found[2]))["trainer"]["step"] == int(found[3])
    # without space no run can resume, and trying loses nothing
    assert nursery.call(*arguments, log=log) == 2
    assert checkpoint.load(Path(found[2]))["trainer"]["step"] == int(found[3])
    # elsewhere it can
    shutil.copytree(folder, tmp_path / "moved")
    more = command(f"train.max_steps={int(found[3]) + 3}", "train.epochs=400", run=tmp_path / "moved")
    assert nursery.call(*more, log=log) == 0
    assert "Traceback" not in log.read_text()


def test_a_folder_that_turns_read_only(nursery, command, disk, tmp_path):
    place, read_only = disk
    folder, log = place / "run", tmp_path / "log"
    assert nursery.call(*command("train.max_steps=20", run=folder), log=log) == 0
    assert read_only().returncode == 0
    before = bytes_of(folder)
    assert nursery.call(*command("train.max_steps=40", run=folder), log=log) == 2
    assert re.search(
        r"error: \S+run must be a folder that can be written; Read-only file system; check", log.read_text()
    )
    assert nursery.call("eval", folder, log=log) == 0, "evaluating writes nothing"
    assert nursery.call("sample", folder, "--length", "3", log=log) == 0
    assert bytes_of(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root; the test above stands for it")
def test_a_folder_without_permission(nursery, command, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert nursery.call(*command("train.max_steps=20", run=folder), log=log) == 0
    folder.chmod(0o555)
    (folder / ".lock").chmod(0o444)
    assert nursery.call(*command("train.max_steps=40", run=folder), log=log) == 2
    assert "must be a folder that can be written; Permission denied" in log.read_text()
    folder.chmod(0o755)


@pytest.mark.parametrize(
    ("settings", "at", "told"),
    [
        ((), 5, "metrics.jsonl"),
        (("train.log_every=1000",), 25, "last.safetensors"),
    ],  # the first 20 steps are always logged
)
def test_a_folder_removed_under_the_run(command, tmp_path, monkeypatch, capsys, settings, at, told):
    fit = run.Trainer.fit

    def losing(self):
        self.listeners.insert(0, lambda event: shutil.rmtree(tmp_path / "run") if event.step == at else None)
        return fit(self)

    monkeypatch.setattr(run.Trainer, "fit", losing)
    assert main([str(word) for word in command(f"checkpoint.every_steps={at}", *settings, run=tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"^error: .*{told} must be writable; No such file or dir.*; .*no good checkpoint is left$", error)
    assert not (tmp_path / "run").exists()


def test_a_lost_checkpoint_folder_is_not_made_again(command, tmp_path):
    keeper = checkpoint.Checkpoints(tmp_path / "checkpoints", dict, dict, None)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"last\.safetensors must be writable; No such file"):
        keeper.save_last()
