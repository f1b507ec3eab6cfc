import io
import pickle

import pytest
import torch

from lm import checkpoint
from lm.checkpoint import Checkpoints
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
    with pytest.raises(UserError, match=r"format must be 1 or older; .* has 99; install a newer version"):
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


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(saved, form):
    trace = saved.parent / "trace"
    if form == "torch":
        torch.save({**PAYLOAD, "format": checkpoint.FORMAT, "model": Hostile(trace)}, saved)
    else:
        saved.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(UserError, match=r"tensors and plain values only; .*nothing of it was run"):
        checkpoint.load(saved)
    assert not trace.exists()


def listener(folder, every_steps=None):
    folder.mkdir(exist_ok=True)
    return Checkpoints(folder, lambda: {**PAYLOAD, "from": "all"}, lambda: {**PAYLOAD, "from": "best"}, every_steps)


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


def test_without_every_steps_no_step_is_saved(tmp_path):
    listener(tmp_path)(stepped(4))
    assert not list(tmp_path.iterdir())


def test_nothing_but_plain_values_is_inside(saved):
    torch.load(io.BytesIO(saved.read_bytes()), weights_only=True)
