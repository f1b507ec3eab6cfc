"""Arbitrary bytes where files are read: the command line answers, or says what is wrong in one line, and loses nothing.

`RNNORM_FUZZ=N` tries N cases a test instead of a few, other ones each time.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import tomllib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm import checkpoint, tokenizers
from lm.cli import main

CASES = int(os.environ.get("RNNORM_FUZZ", "0"))
LONGEST = 60  # seconds: more is a hang
QUICK = "model.hidden_size=8 train.batch_size=2 train.window=8 train.optimizer=adam train.max_steps=1"
TEXT = b"the cat sat on the mat\na dog ran\n\nthe end of <unk> it all\n" * 2

fuzzed = settings(
    max_examples=CASES or 12,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def damaged(draw, content):
    """The bytes of a good file after some accidents; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([1, 4, 100, 10**9])))))
        match draw(st.sampled_from(["cut", "drop", "flip", "put", "repeat", "zero"])):
            case "cut":
                del data[start:]
            case "drop":
                del data[start:stop]
            case "flip" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "put":
                data[start:stop] = draw(st.binary(max_size=20) | st.text(max_size=9).map(str.encode) | BITS)
            case "repeat":
                data[start:start] = data[start:stop] * draw(st.sampled_from([1, 50]))
            case "zero":
                data[start:stop] = bytes(stop - start)
    return bytes(data)


BITS = st.sampled_from(
    [
        b"<eos>",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n\n",
        b"-1",
        b"1e400",
        b"nan",
        b"9" * 5000,
        b"[" * 5000,
        b'"',
        b"\0",
    ]
)


def answer(*arguments):
    """Runs a command line; returns its exit code. Anything but an answer or a clear error fails."""
    output, errors = io.StringIO(), io.StringIO()

    def late(*_):
        raise AssertionError(f"{arguments} took more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main([str(argument) for argument in arguments])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    told = errors.getvalue()
    assert "Traceback" not in told
    assert code in (0, 1, 2), told
    assert (code == 0) == ("error: " not in told), told
    if code:
        last = told.rstrip("\n").split("\n")[-1]
        assert last.startswith("error: "), told
        assert len(last) < 2000, told
    return code


def train(source, run, *assignments):
    words = (word for setting in (*QUICK.split(), *assignments) for word in ("--set", setting))
    return answer("train", "--data", source, "--run", run, *words)


def files_of(folder):
    """All files but the scores that `eval` adds."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "scores.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, a run on it, and tokenizers."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "text").mkdir()
    for split in ("train", "valid", "test"):
        (place / "text" / f"{split}.txt").write_bytes(TEXT)
    assert train(place / "text", place / "run") == 0
    for kind in ("word", "char", "bpe"):
        lines = (TEXT * 40).decode().splitlines()
        tokenizers.save(tokenizers.train(kind, lines, 280 if kind == "bpe" else None), place / f"{kind}.json")
    return place


@pytest.fixture
def fresh(made, tmp_path):
    """`fresh()`: a copy of it all, in the place of the one before."""

    def copy():
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        return shutil.copytree(made, tmp_path / "case")

    return copy


@fuzzed
@given(content=damaged(TEXT), split=st.sampled_from(["train", "valid", "test"]), kind=st.sampled_from(tokenizers.KINDS))
def test_text(fresh, content, split, kind):
    place = fresh()
    (place / f"text/{split}.txt").write_bytes(content)
    before = files_of(place)
    answer("data", "check", place / "text")
    answer("tokenizer", "train", "--kind", kind, "--data", place / "text", "--out", place / "new.json")
    (place / "new.json").unlink(missing_ok=True)
    code = train(place / "text", place / "new", f"data.tokenizer={kind}")
    assert code or (place / "new/checkpoints/best.safetensors").is_file()
    assert code != 2 or not (place / "new").exists(), "a fault of the input writes nothing"
    shutil.rmtree(place / "new", ignore_errors=True)
    assert files_of(place) == before


VALUES = st.one_of(
    st.integers(),
    st.sampled_from([10**30, 10**5000, -1, 0, 2**63, 2**64]),
    st.floats(),
    st.booleans(),
    st.text(max_size=9),
    st.sampled_from(["none", "lstm", "online", "uniform{2..9}", "awd{70}", "sgd", "cuda", "meta", "\x1b[2J", "../x"]),
    st.lists(st.integers(), max_size=3),
    st.just({}),
)
TOML = b"""description = "mine"
[data]
source = "text"
[model]
cell = "lstm"
hidden_size = 8
dropout = 0.5
[train]
window = "uniform{2..9}"
lr = 1e-3
clip = "none"
"""


@fuzzed
@given(
    content=damaged(TOML), section=st.sampled_from(["data", "model", "train", "checkpoint", "eval", "x"]), value=VALUES
)
def test_settings(fresh, content, section, value):
    place = fresh()
    (place / "mine.toml").write_bytes(content)
    answer("config", "--preset", place / "mine.toml")
    for key in ("source", "hidden_size", "lr", "window", "every_minutes", "protocol", "seed"):
        try:
            answer("config", "--set", f"{section}.{key}={json.dumps(value)}")
        except ValueError:
            assert value == 10**5000  # Python does not write it
    before = files_of(place / "run")
    (place / "run/config.toml").write_bytes(content)
    code = answer("train", "--run", place / "run", "--data", place / "text", "--set", "train.max_steps=1")
    after = files_of(place / "run")
    assert after.keys() >= before.keys()
    assert after["checkpoints/best.safetensors"] == before["checkpoints/best.safetensors"]
    if code:
        assert after == {**before, "config.toml": content}
    answer("eval", place / "run")


@fuzzed
@given(data=st.data(), kind=st.sampled_from(["word", "char", "bpe"]))
def test_tokenizer_files(fresh, data, kind):
    place = fresh()
    path = place / f"{kind}.json"
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    before = files_of(place)
    code = train(place / "text", place / "new", f"data.tokenizer_file={path}")
    assert code != 2 or not (place / "new").exists()
    shutil.rmtree(place / "new", ignore_errors=True)
    assert files_of(place) == before
    shutil.copy(path, place / "run/tokenizer.json")
    answer("eval", place / "run")


def commands(place):
    """Every command that reads checkpoints, on a run whose checkpoint may be anything; nothing there is lost."""
    before = files_of(place / "run")
    for name in ("last", "best"):
        answer("checkpoint", "show", place / f"run/checkpoints/{name}.safetensors")
        answer("eval", place / "run", "--checkpoint", name)
        answer("sample", place / "run", "--checkpoint", name, "--length", "2")
    assert files_of(place / "run") == before
    code = answer("train", "--run", place / "run", "--set", "train.max_steps=2")
    after = files_of(place / "run")
    assert after.keys() >= before.keys()
    if code == 2:
        assert {name: after[name] for name in before} == before
    elif after["checkpoints/previous.safetensors"] != before["checkpoints/last.safetensors"]:
        assert "checkpoints/damaged.safetensors" in after or before["checkpoints/last.safetensors"] in after.values()


@fuzzed
@given(data=st.data(), name=st.sampled_from(["last", "best", "previous"]))
def test_checkpoints_of_other_bytes(fresh, data, name):
    place = fresh()
    path = place / f"run/checkpoints/{name}.safetensors"
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    commands(place)


@fuzzed
@given(data=st.data(), value=VALUES | st.just("drop") | st.sampled_from([(), (2,), (12, 8), (0, 3)]))
def test_whole_checkpoints_of_other_values(fresh, data, value):
    """The checksum is right, so that the values themselves have to be looked at."""
    place = fresh()
    path = place / f"run/checkpoints/{data.draw(st.sampled_from(['last', 'best']))}.safetensors"
    saved = checkpoint.load(path)
    inner = saved
    while True:
        key = data.draw(st.sampled_from(sorted(inner, key=str) if isinstance(inner, dict) else range(len(inner))))
        if not (isinstance(inner[key], dict | list) and inner[key]) or data.draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    if value == "drop":
        del inner[key]
    else:
        inner[key] = torch.full(value, data.draw(st.floats(width=32))) if isinstance(value, tuple) else value
    with contextlib.suppress(ValueError):  # of a number that Python cannot write
        saved.pop("format", None), saved.pop("version", None)
        checkpoint.save(path, saved)
    commands(place)


def test_the_settings_that_are_damaged_are_good():
    assert tomllib.loads(TOML.decode())["model"]["dropout"] == 0.5
