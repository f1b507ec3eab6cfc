import io
import os
import pickle
import re

import pytest
import torch

from lm import checkpoint
from lm.checkpoint import Checkpoints, DamagedCheckpointError
from lm.errors import UserError
from lm.evaluator import Score
from lm.events import EpochEnded, Interrupted, Started, Stepped, Validated

PAYLOAD = {
    "config": {"train": {"lr": 1.0}},
    "tokenizer": {"kind": "word"},
    "data_sha256": {"train": "0"},
    "train_counts": torch.arange(3),
    "model": {"weight": torch.randn(2, 3)},
    "progress": {"step": 7},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, PAYLOAD)
    return path


def test_what_is_saved_is_loaded(saved):
    loaded = checkpoint.load(saved)
    assert loaded["config"] == PAYLOAD["config"]
    assert torch.equal(loaded["model"]["weight"], PAYLOAD["model"]["weight"])
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(saved, {**PAYLOAD, "progress": {"step": 8}})
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"must be a file; .*last\.pt does not exist; train first"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"a checkpoint must .*last\.pt"):
        checkpoint.load(saved)


def test_a_file_of_something_else(saved):
    saved.write_bytes(b"no checkpoint at all " * 100)
    with pytest.raises(UserError, match=r"a checkpoint must"):
        checkpoint.load(saved)
    torch.save({"weight": torch.zeros(2)}, saved)
    with pytest.raises(UserError, match="must be one that `train` wrote"):
        checkpoint.load(saved)
    torch.save([1, 2], saved)
    with pytest.raises(UserError, match="must be one that `train` wrote"):
        checkpoint.load(saved)


def test_a_newer_format(saved):
    torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "version": 99}, saved)
    with pytest.raises(UserError, match=r"format must be 2 or older; .* has 99; install a newer version"):
        checkpoint.load(saved)


def test_a_checkpoint_without_its_tokenizer(saved):
    payload = {key: value for key, value in PAYLOAD.items() if key != "tokenizer"}
    checkpoint.save(saved, payload)
    with pytest.raises(UserError, match="must hold tokenizer"):
        checkpoint.load(saved)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["torch", "sealed", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(saved, form):
    trace = saved.parent / "trace"
    if form == "torch":
        torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "model": Hostile(trace)}, saved)
    elif form == "sealed":
        checkpoint.save(saved, {**PAYLOAD, "model": Hostile(trace)})
    else:
        saved.write_bytes(pickle.dumps(Hostile(trace)))
    told = "must be a whole file" if form == "pickle" else r"tensors and plain values only; .*nothing of it was run"
    with pytest.raises(UserError, match=told):
        checkpoint.load(saved)
    assert not trace.exists()


def test_every_bit_counts(saved):
    content = saved.read_bytes()
    for place in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(
            DamagedCheckpointError, match=r"must be a whole file; .*last\.pt is damaged \(.*take another"
        ):
            checkpoint.load(saved)
        assert not checkpoint.is_whole(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(saved)


def test_a_file_without_checksum_is_of_format_1(saved):
    torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "version": 1}, saved)
    assert checkpoint.load(saved)["progress"] == PAYLOAD["progress"]
    assert checkpoint.is_whole(saved)
    torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "version": 2}, saved)
    with pytest.raises(DamagedCheckpointError, match="its checksum is missing"):
        checkpoint.load(saved)


@pytest.mark.parametrize("key", [*PAYLOAD, "format"])
@pytest.mark.parametrize("value", [None, [], 3, "text", {"step": "7"}])
def test_values_of_another_kind(saved, key, value):
    if isinstance(value, dict) and key not in ("train_counts", "progress"):
        value = torch.zeros(2)
    torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "version": 1, key: value}, saved)
    with pytest.raises(UserError, match=r"a checkpoint must (hold|be one that)"):
        checkpoint.load(saved)


def test_previous_is_what_last_was(tmp_path):
    steps = iter((3, 7, 9))
    keeper = Checkpoints(tmp_path, lambda: {**PAYLOAD, "progress": {"step": next(steps)}}, dict, None)
    for expected in ((3, None), (7, 3), (9, 7)):
        keeper(EpochEnded(1, 3, 1.0, 10, 1.0))
        found = (tmp_path / name for name in ("last.pt", "previous.pt"))
        assert tuple(checkpoint.load(f)["progress"]["step"] if f.exists() else None for f in found) == expected


@pytest.mark.parametrize("call", range(4))
def test_a_process_that_ends_anywhere_in_a_save_leaves_a_good_file(saved, monkeypatch, call):
    """The calls that change the folder are two renames and the syncs of the file and of the folder."""
    checkpoint.save(saved, {**PAYLOAD, "progress": {"step": 8}}, previous=saved.with_name("previous.pt"))
    calls = iter(range(9))

    def ending(function):
        def wrapper(*arguments):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapper

    monkeypatch.setattr("os.fsync", ending(os.fsync))
    monkeypatch.setattr(type(saved), "replace", ending(type(saved).replace))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, {**PAYLOAD, "progress": {"step": 9}}, previous=saved.with_name("previous.pt"))
    said = []
    assert checkpoint.load_last(saved.parent, said.append)["progress"]["step"] == (9 if call == 3 else 8)
    assert bool(said) == (call == 2)


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"torn": content[:-100] + bytes(100), "cut": content[:500], "empty": b""}[how])


@pytest.mark.parametrize("how", ["torn", "cut", "empty", "missing"])
def test_the_one_before_a_damaged_one_is_taken(saved, how):
    checkpoint.save(saved, {**PAYLOAD, "progress": {"step": 8}}, previous=saved.with_name("previous.pt"))
    if how == "missing":
        saved.unlink()
    else:
        damage(saved, how)
    said = []
    assert checkpoint.load_last(saved.parent, said.append)["progress"]["step"] == 7
    assert re.search(r"^warning: .*last\.pt .*; going on from the one before it, previous\.pt, of step 7$", said[0])
    before = saved.read_bytes() if saved.exists() else None
    listener(saved.parent)(EpochEnded(1, 3, 1.0, 10, 1.0))
    assert checkpoint.load(saved)["from"] == "all"
    assert checkpoint.load(saved.with_name("previous.pt"))["progress"]["step"] == 7, "the good one was not lost"
    if before is not None:
        assert saved.with_name("damaged.pt").read_bytes() == before
    damage(saved, "cut")
    damage(saved.with_name("previous.pt"), "empty")
    with pytest.raises(UserError, match=r"last\.pt is damaged .*And the one before it: .*previous\.pt is damaged"):
        checkpoint.load_last(saved.parent)


def test_what_is_inside_is_shown(saved):
    hostile = {"\x1b[2J": "\x1b]0;title\x07\n" * 99, "huge": 10**5000, "absent": None}
    checkpoint.save(saved, {**PAYLOAD, "config": {"train": {"lr": 1.0}, **hostile}})
    lines = list(checkpoint.describe(saved))
    assert lines[0] == f"{saved}: {saved.stat().st_size:,} bytes, checksum good"
    assert {"version = 2", "config.train.lr = 1.0", "progress.step = 7", "config.absent = none"} <= set(lines)
    assert "config.huge = a huge number" in lines
    assert lines[-1].split() == ["model.weight", "float32", "[2,", "3]", "24", "bytes"]
    assert lines[-3] == "2 tensors, 48 bytes:"
    assert all(line.isprintable() and len(line) < 300 for line in lines)
    torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "version": 1}, saved)
    assert next(checkpoint.describe(saved)).endswith("bytes, no checksum")


def test_what_is_left_of_a_damaged_file_is_shown(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    lines = []
    with pytest.raises(UserError, match=r"last\.pt is damaged \(its checksum does not match\)"):
        lines.extend(lines.append(line) for line in checkpoint.describe(saved))
    assert lines[0].endswith("bytes, checksum WRONG")
    assert "progress.step = 7" in lines


def test_equal_states_are_equal_bytes(saved):
    first = saved.read_bytes()
    again = checkpoint.load(saved)
    checkpoint.save(saved, {key: again[key] for key in PAYLOAD})
    assert saved.read_bytes() == first
    one, other = ("".join(["o", "ne"]) for _ in range(2))
    made = []
    for pair in ([one, one], [one, other]):
        checkpoint.save(saved, {**PAYLOAD, "more": pair})
        made.append(saved.read_bytes())
    assert made[0] == made[1]


def test_nothing_saved_yet(tmp_path):
    assert checkpoint.load_last(tmp_path) is None


def listener(folder, every_steps=None, every_minutes=None):
    folder.mkdir(exist_ok=True)
    payloads = [lambda name=name: {**PAYLOAD, "from": name} for name in ("all", "best")]
    return Checkpoints(folder, *payloads, every_steps, every_minutes)


def stepped(step, position=5):
    return Stepped(1, step, position, 9, 1.0, 10, 10.0, 10, 0.1, 1.0, 0.1)


def test_which_event_saves_what(tmp_path):
    score = Score("columns", 2.0, 2.0, 3.0, 4)
    cases = [
        (Validated(1, 3, score, best=True), {"best.pt"}),
        (Validated(1, 3, score, best=False), set()),
        (Started(1, 0, 5, 100, 0), {"last.pt"}),
        (EpochEnded(1, 3, 1.0, 10, 1.0), {"last.pt"}),
        (Interrupted(1, 3, "SIGINT"), {"last.pt"}),
        (stepped(4), {"last.pt"}),
        (stepped(5), set()),
        (stepped(4, position=9), set()),  # the end of the epoch: its validation comes first
    ]
    for number, (event, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        listener(folder, every_steps=2)(event)
        assert {file.name for file in folder.iterdir()} == expected, event
        for file in folder.iterdir():
            kind = "best" if file.name == "best.pt" else "all"
            assert checkpoint.load(file)["from"] == kind


def test_better_weights_are_never_replaced_by_worse(tmp_path):
    listener(tmp_path).save_best(2.0)
    keeper = Checkpoints(tmp_path, dict, lambda: {**PAYLOAD, "from": "later"}, None, best=2.0)
    for nats, left in ((2.5, 2.0), (2.0, 2.0), (1.5, 1.5)):
        keeper.save_best(nats)
        assert checkpoint.load(tmp_path / "best.pt")["nats"] == left


def test_without_every_steps_no_step_is_saved(tmp_path):
    listener(tmp_path)(stepped(4))
    assert not list(tmp_path.iterdir())


def test_every_minutes(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    keeper = listener(tmp_path, every_minutes=0.5)
    keeper(Started(1, 0, 5, 100, 0))
    saved = []
    for step in range(1, 9):
        (tmp_path / "last.pt").unlink(missing_ok=True)
        now += 12
        keeper(stepped(step))
        if (tmp_path / "last.pt").exists():
            saved.append(step)
    assert saved == [3, 6]


def test_a_folder_that_went_away_is_not_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    keeper = listener(folder)
    folder.rmdir()
    with pytest.raises(UserError, match=r"last\.pt must be writable; No such file or directory"):
        keeper(EpochEnded(1, 3, 1.0, 10, 1.0))
    assert not folder.exists()


def test_nothing_but_plain_values_is_inside(saved):
    assert torch.load(io.BytesIO(saved.read_bytes()), weights_only=True)["format"] == checkpoint.FORMAT
