import hashlib
import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from lm import checkpoint
from lm.checkpoint import Checkpoints, DamagedCheckpointError
from lm.errors import UserError
from lm.evaluator import Score
from lm.events import EpochEnded, Interrupted, Started, Stepped, Validated

PAYLOAD = {
    "config": {"train": {"lr": 1.0}},
    "tokenizer": {"kind": "word"},
    "data_sha256": {"train": "0"},
    "train_counts": [0, 1, 2],
    "model": {"weight": torch.randn(2, 3)},
    "trainer": {"step": 7},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, PAYLOAD)
    return path


def test_what_is_saved_is_loaded(saved):
    loaded = checkpoint.load(saved)
    assert loaded["config"] == PAYLOAD["config"]
    assert torch.equal(loaded["model"]["weight"], PAYLOAD["model"]["weight"])
    assert [file.name for file in saved.parent.iterdir()] == ["last.safetensors"]


def test_what_is_loaded_is_not_the_file_any_more(saved):
    loaded = checkpoint.load(saved)
    with saved.open("r+b") as file:  # the same file, where a save would make another of its name
        file.write(bytes(saved.stat().st_size))
    assert torch.equal(loaded["model"]["weight"], PAYLOAD["model"]["weight"])


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(saved, {**PAYLOAD, "trainer": {"step": 8}})
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["last.safetensors"]


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"must be a file; .*last\.safetensors, which does not exist; train first"):
        checkpoint.load(tmp_path / "last.safetensors")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"a checkpoint must .*last\.safetensors"):
        checkpoint.load(saved)


def test_a_file_of_something_else(saved):
    saved.write_bytes(b"no checkpoint at all " * 100)
    with pytest.raises(DamagedCheckpointError, match=r"which is damaged \(its header is too large\)"):
        checkpoint.load(saved)
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(UserError, match=r"must be one that `train` wrote; got .*which holds something else"):
        checkpoint.load(saved)
    saved.unlink()
    saved.mkdir()
    with pytest.raises(UserError, match=r"must be readable; got .*: Is a directory"):
        checkpoint.load(saved)


@pytest.mark.parametrize("value", [99, 2, "3", None])
def test_another_version(saved, value):
    checkpoint.save(saved, {**PAYLOAD, "version": value})
    with pytest.raises(UserError, match=rf"version must be 3; got .* has '?{str(value).lower()}'?; use the version of"):
        checkpoint.load(saved)


def test_an_older_versions_file_gets_one_refusal(saved, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    torch.save(PAYLOAD, old / "last.pt")
    torch.save(PAYLOAD, old / "best.pt")
    told = r"must be a safetensors file; got \S+\.pt, which an older version of this program wrote; use that version"
    for read in (
        lambda: checkpoint.load(old / "last.pt"),
        lambda: checkpoint.load(old / "best.safetensors"),
        lambda: checkpoint.load_last(old),
        lambda: list(checkpoint.describe(old / "best.pt")),
    ):
        with pytest.raises(UserError, match=told):
            read()


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


def test_no_code_is_run(saved):
    trace = saved.parent / "trace"
    saved.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(saved)
    torch.save({**PAYLOAD, "model": Hostile(trace)}, saved)
    with pytest.raises(UserError, match="which an older version of this program wrote"):
        checkpoint.load(saved)
    assert not trace.exists()
    with pytest.raises(TypeError, match="must hold tensors and plain values"):
        checkpoint.save(saved, {**PAYLOAD, "model": Hostile(trace)})


def parts(path):
    """The header and the tensors' bytes of a file."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:size]), content[size:]


def write(path, header, data, size=None):
    """Writes a file of any header, a table or text, with the checksum that it must have."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    content = (len(text) if size is None else size).to_bytes(8, "little") + text + data
    if stated := re.search(rb'sha256\\":\\"(\w{64})', content):
        cleared = content.replace(stated[1], b"0" * 64)
        content = content.replace(stated[1], hashlib.sha256(cleared).hexdigest().encode())
    path.write_bytes(content)


def table(**changes):
    """A change of one tensor's row in the header."""
    return lambda header: {**header, "weight": {**header["weight"], **changes}}


HOSTILE = {
    "tensors that overlap": (table(data_offsets=[8, 32]), "invalid offset for tensor `weight`"),
    "a gap": (table(data_offsets=[24, 48]), "invalid offset"),
    "offsets beyond the file": (table(data_offsets=[0, 2**40], shape=[2**38]), "file not fully covered"),
    "offsets that go back": (table(data_offsets=[24, 0]), "invalid offset"),
    "a shape beyond its bytes": (table(shape=[2, 2**40]), "TensorInvalidInfo|invalid shape"),
    "a shape that overflows": (table(shape=[2**40, 2**40]), "overflow"),
    "a negative shape": (table(shape=[-2, -3]), "expected usize"),
    "an unknown dtype": (table(dtype="F31"), "unknown variant `F31`"),
    "another name": (lambda h: {**{k: v for k, v in h.items() if k != "weight"}, "w": h["weight"]}, "lacks 'weight'"),
    "a name twice": (
        lambda h: json.dumps(h)[:-1] + ', "weight": {"dtype": "I32", "shape": [6], "data_offsets": [0, 24]}}',
        "names something twice",
    ),
    "metadata twice": (lambda h: json.dumps(h)[:-1] + ', "__metadata__": {}}', "names something twice"),
    "metadata that is no text": (lambda h: {**h, "__metadata__": {checkpoint.FORMAT: 3}}, "must be str"),
    "no table": (lambda h: "[1, 2]", "no attribute"),
    "nested deep": (lambda h: "[" * 100_000, "recursion"),
    "an endless number": (lambda h: '{"a": ' + "9" * 5000 + "}", "digits"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(saved, case):
    change, message = HOSTILE[case]
    header, data = parts(saved)
    write(saved, header, data)
    checkpoint.load(saved)  # so the faults below are found, not the rewriting
    write(saved, change(header), data)
    with pytest.raises(DamagedCheckpointError, match=rf"which is damaged \(.*({message})"):
        checkpoint.load(saved)
    with pytest.raises(DamagedCheckpointError):
        list(checkpoint.describe(saved))


@pytest.mark.parametrize("size", [0, 1, 2**20, 10**8 + 1, 2**63, 2**64 - 1])
def test_hostile_header_sizes(saved, size):
    header, data = parts(saved)
    write(saved, header, data, size=size)
    with pytest.raises(DamagedCheckpointError, match=r"which is damaged \("):
        checkpoint.load(saved)


TEXTS = {
    "a key twice": (lambda text: text.replace('"step":7', '"step":7,"step":7'), "not canonical JSON"),
    "spaces": (lambda text: text.replace('"step":7', '"step": 7'), "not canonical JSON"),
    "another order": (lambda text: text.replace('"tokenizer"', '"zebra"'), "not canonical JSON"),
    "NaN": (lambda text: text.replace('"step":7', '"step":NaN'), "Out of range float"),
    "an infinity": (lambda text: text.replace('"step":7', '"step":1e400'), "Out of range float"),
    "no JSON": (lambda text: text[:-1], "delimiter"),
    "no table": (lambda text: "[]", "pop"),
    "nested deep": (lambda text: "[" * 50_000 + "]" * 50_000, "recursion"),
    "an endless number": (lambda text: text.replace('"step":7', '"step":' + "9" * 5000), "digits"),
    "no checksum": (lambda text: re.sub(r'"sha256":"\w{64}",', "", text), "states no checksum"),
    "an empty checksum": (lambda text: re.sub(r'"sha256":"\w{64}"', '"sha256":""', text), "states no checksum"),
    "another checksum": (lambda text: re.sub(r'"sha256":"\w{4}', '"sha256":"----', text), "checksum does not match"),
    "a tensor that is not there": (lambda text: text.replace('{"$tensor":"weight"}', '{"$tensor":"w"}'), "lacks 'w'"),
    "a tensor of no name": (lambda text: text.replace('{"$tensor":"weight"}', '{"$tensor":[]}'), "unhashable"),
    "a tuple of nothing": (lambda text: text.replace('{"$tensor":"weight"}', '{"$tuple":3}'), "not iterable"),
    "no number": (lambda text: text.replace('{"$tensor":"weight"}', '{"$float":"x"}'), "could not convert"),
    "no pairs": (lambda text: text.replace('{"$tensor":"weight"}', '{"$items":[3]}'), "unpack"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_texts(saved, case):
    change, message = TEXTS[case]
    header, data = parts(saved)
    text = header["__metadata__"][checkpoint.FORMAT]
    assert change(text) != text
    write(saved, {**header, "__metadata__": {checkpoint.FORMAT: change(text)}}, data)
    with pytest.raises(DamagedCheckpointError, match=rf"which is damaged \(.*{message}"):
        checkpoint.load(saved)


def test_nothing_is_allocated_for_what_is_refused(saved):
    """A file that is mostly a hole takes no room on the disk and must take none in memory."""
    resource = pytest.importorskip("resource")
    size = 2**29
    write(saved, table(shape=[size // 4], data_offsets=[0, size])(parts(saved)[0]), b"")
    with saved.open("r+b") as file:
        file.truncate(saved.stat().st_size + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedCheckpointError, match="checksum does not match"):
        checkpoint.load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(3))


def test_other_readers_of_the_format(saved):
    """`best` holds the model under its own names and tied weights once; in `last`, the rest has a prefix."""
    model, other = Tied(), Tied()
    checkpoint.save(saved, {**PAYLOAD, "model": model.state_dict()})
    assert load_file(saved).keys() == {"decoder.weight", "decoder.bias", "count"}
    load_model(other, saved)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.decoder.weight is other.embedding.weight
    optimizer = torch.optim.Adam(model.parameters())
    model.decoder(model.embedding(torch.tensor([1]))).sum().backward()
    optimizer.step()
    state = [torch.ones(2, 3), model.decoder.weight.detach()[:2]]  # of which one is a part of another
    checkpoint.save(
        saved, {**PAYLOAD, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    )
    with safe_open(saved, "pt") as file:
        assert file.metadata().keys() == {checkpoint.FORMAT}
        names = set(file.keys())
    assert {name for name in names if not name.startswith("training.")} == load_file(saved).keys() - {
        *("training.state.0", "training.state.1"),
        *(f"training.optimizer.state.{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")),
    }
    loaded = checkpoint.load(saved)
    assert loaded["model"]["embedding.weight"] is loaded["model"]["decoder.weight"]
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert torch.equal(loaded["state"][1], model.decoder.weight[:2])


VALUES = [
    {"a": [1, 2.5, "x", None, True, (1, (2,), [])], "empty": {}},
    {0: "zero", 10: "ten", 9: "nine"},
    {"$tensor": 1, "$": 2},
    {"$tuple": [1]},
    [float("inf"), -float("inf"), 1e300, 5e-324, -0.0, 0.1, 2**62],
    "\u00e9\udc80\x00\u2028\U0001f600",
]


@pytest.mark.parametrize("value", VALUES)
def test_every_plain_value_comes_back(saved, value):
    checkpoint.save(saved, {**PAYLOAD, "more": value})
    loaded = checkpoint.load(saved)["more"]
    assert loaded == value
    assert repr(loaded) == repr(value) or isinstance(value, dict)
    checkpoint.save(saved, {**PAYLOAD, "more": [float("nan")]})
    assert repr(checkpoint.load(saved)["more"]) == "[nan]"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5)])
def test_every_tensor_comes_back(saved, dtype, shape):
    value = (100 * torch.randn(shape)).to(dtype)
    checkpoint.save(saved, {**PAYLOAD, "more": [value, value.repeat_interleave(2, -1)[..., ::2] if shape else value]})
    for loaded in checkpoint.load(saved)["more"]:
        assert (loaded.dtype, loaded.shape) == (dtype, value.shape)
        assert torch.equal(loaded, value)
        assert loaded.is_contiguous()


def test_a_text_too_long_for_the_format_is_not_written(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint, "_LONGEST_HEADER", 1000)
    checkpoint.save(saved, PAYLOAD)
    with pytest.raises(UserError, match=r"must take at most 1,000 bytes; got [\d,]+; lower data.vocab_size"):
        checkpoint.save(saved, {**PAYLOAD, "tokenizer": {"pieces": ["x"] * 1000}})
    assert saved.read_bytes() == before


def test_every_bit_counts(saved):
    content = saved.read_bytes()
    for place in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(
            DamagedCheckpointError, match=r"a checkpoint must .*; got \S+last\.safetensors, which .*take another"
        ):
            checkpoint.load(saved)
        assert not checkpoint.is_whole(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(saved)


@pytest.mark.parametrize("key", PAYLOAD)
@pytest.mark.parametrize("value", [None, 3, "text", {"step": "7"}])
def test_values_of_another_kind(saved, key, value):
    if isinstance(value, dict) and key not in ("train_counts", "trainer"):
        value = torch.zeros(2)
    checkpoint.save(saved, {**PAYLOAD, key: value})
    with pytest.raises(UserError, match=r"a checkpoint must hold"):
        checkpoint.load(saved)


def test_previous_is_what_last_was(tmp_path):
    steps = iter((3, 7, 9))
    keeper = Checkpoints(tmp_path, lambda: {**PAYLOAD, "trainer": {"step": next(steps)}}, dict, None)
    for expected in ((3, None), (7, 3), (9, 7)):
        keeper(EpochEnded(1, 3, 1.0, 10, 1.0))
        found = (tmp_path / name for name in ("last.safetensors", "previous.safetensors"))
        assert tuple(checkpoint.load(f)["trainer"]["step"] if f.exists() else None for f in found) == expected


@pytest.mark.parametrize("call", range(4))
def test_a_process_that_ends_anywhere_in_a_save_leaves_a_good_file(saved, monkeypatch, call):
    """The calls that change the folder are two renames and the syncs of the file and of the folder."""
    checkpoint.save(saved, {**PAYLOAD, "trainer": {"step": 8}}, previous=saved.with_name("previous.safetensors"))
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
        checkpoint.save(saved, {**PAYLOAD, "trainer": {"step": 9}}, previous=saved.with_name("previous.safetensors"))
    said = []
    assert checkpoint.load_last(saved.parent, said.append)["trainer"]["step"] == (9 if call == 3 else 8)
    assert bool(said) == (call == 2)


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"torn": content[:-10] + bytes(10), "cut": content[:200], "empty": b""}[how])


@pytest.mark.parametrize("how", ["torn", "cut", "empty", "missing"])
def test_the_one_before_a_damaged_one_is_taken(saved, how):
    checkpoint.save(saved, {**PAYLOAD, "trainer": {"step": 8}}, previous=saved.with_name("previous.safetensors"))
    if how == "missing":
        saved.unlink()
    else:
        damage(saved, how)
    said = []
    assert checkpoint.load_last(saved.parent, said.append)["trainer"]["step"] == 7
    assert re.search(
        r"^warning: .*last\.safetensors, which .*; resuming from the one before it, previous\.safetensors, of step 7$",
        said[0],
    )
    before = saved.read_bytes() if saved.exists() else None
    listener(saved.parent)(EpochEnded(1, 3, 1.0, 10, 1.0))
    assert checkpoint.load(saved)["from"] == "all"
    kept = checkpoint.load(saved.with_name("previous.safetensors"))
    assert kept["trainer"]["step"] == 7, "the good one was not lost"
    if before is not None:
        assert saved.with_name("damaged.safetensors").read_bytes() == before
    damage(saved, "cut")
    damage(saved.with_name("previous.safetensors"), "empty")
    with pytest.raises(
        UserError,
        match=r"last\.safetensors, which is damaged .*And the one before it: .*previous\.safetensors, which is damaged",
    ):
        checkpoint.load_last(saved.parent)


def test_what_is_inside_is_shown(saved):
    hostile = {"\x1b[2J": "\x1b]0;title\x07\n" * 99, "absent": None}
    checkpoint.save(saved, {**PAYLOAD, "config": {"train": {"lr": 1.0}, **hostile}})
    lines = list(checkpoint.describe(saved))
    assert lines[0] == f"{saved}: {saved.stat().st_size:,} bytes, checksum good"
    assert {
        "version = 3",
        "train_counts: 3 numbers",
        "config.train.lr = 1.0",
        "trainer.step = 7",
        "config.absent = none",
    } <= set(lines)
    assert lines[-1].split() == ["weight", "float32", "[2,", "3]", "24", "bytes"]
    assert lines[-2] == "tensors: 1, 24 bytes:"
    assert all(line.isprintable() and len(line) < 300 for line in lines)


def test_what_is_left_of_a_damaged_file_is_shown(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    lines = []
    with pytest.raises(UserError, match=r"last\.safetensors, which is damaged \(its checksum does not match\)"):
        lines.extend(lines.append(line) for line in checkpoint.describe(saved))
    assert lines[0].endswith("bytes, checksum WRONG")
    assert "trainer.step = 7" in lines


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
        (Validated(1, 3, score, best=True), {"best.safetensors"}),
        (Validated(1, 3, score, best=False), {"best.safetensors"}),  # what was better is lost
        (Started(1, 0, 5, 100, 0), {"last.safetensors"}),
        (EpochEnded(1, 3, 1.0, 10, 1.0), {"last.safetensors"}),
        (Interrupted(1, 3, "SIGINT"), {"last.safetensors"}),
        (stepped(4), {"last.safetensors"}),
        (stepped(5), set()),
        (stepped(4, position=9), set()),  # the end of the epoch: its validation comes first
    ]
    for number, (event, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        listener(folder, every_steps=2)(event)
        assert {file.name for file in folder.iterdir()} == expected, event
        for file in folder.iterdir():
            kind = "best" if file.name == "best.safetensors" else "all"
            assert checkpoint.load(file)["from"] == kind


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """As by a run that trains on: never the numbers of one with the weights of the other."""
    old, new = (
        {**PAYLOAD, "from": name, "model": {"w": torch.full((3,), v)}} for name, v in (("old", 1.0), ("new", 2.0))
    )
    checkpoint.save(tmp_path / "x.safetensors", old)
    checkpoint.save(tmp_path / "new.safetensors", new)

    def replaced(path, *rest):
        if (tmp_path / "new.safetensors").exists():
            (tmp_path / "new.safetensors").replace(path)
        return safe_open(path, *rest)

    monkeypatch.setattr(checkpoint, "safe_open", replaced)
    found = checkpoint.load(tmp_path / "x.safetensors")
    assert (found["from"], found["model"]["w"].tolist()) == ("new", [2.0] * 3)


def test_better_weights_are_never_replaced_by_worse(tmp_path):
    listener(tmp_path).save_best(2.0)
    keeper = Checkpoints(tmp_path, dict, lambda: {**PAYLOAD, "from": "later"}, None, best=2.0)
    for nats, left in ((2.5, 2.0), (2.0, 2.0), (1.5, 1.5)):
        keeper.save_best(nats)
        assert checkpoint.load(tmp_path / "best.safetensors")["nats"] == left


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
        (tmp_path / "last.safetensors").unlink(missing_ok=True)
        now += 12
        keeper(stepped(step))
        if (tmp_path / "last.safetensors").exists():
            saved.append(step)
    assert saved == [3, 6]


def test_steps_that_are_reported_together_are_saved_once_all_are_logged(tmp_path):
    keeper, last = listener(tmp_path, every_steps=3), tmp_path / "last.safetensors"
    for step in range(1, 4):
        keeper(replace(stepped(step), following=4 - step))
    assert not last.exists()
    keeper(stepped(4))
    assert last.exists()
    last.unlink()
    keeper(stepped(5))
    assert not last.exists()


def test_a_folder_that_went_away_is_not_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    keeper = listener(folder)
    folder.rmdir()
    with pytest.raises(UserError, match=r"last\.safetensors must be writable; No such file or directory"):
        keeper(EpochEnded(1, 3, 1.0, 10, 1.0))
    assert not folder.exists()
