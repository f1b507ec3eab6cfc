"""The command line: every command in a real process, and every error in the input."""

import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from lm import checkpoint, config, run
from lm.cli import main
from lm.lock import Lock
from lm.model import LanguageModel
from lm.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
_SMALL = "model.hidden_size=8 train.batch_size=3 train.window=8"
_STEADY = "train.optimizer=sgd train.lr=0.5 train.clip=0.5 train.schedule=constant train.log_every=1"
QUICK = [word for setting in f"{_SMALL} {_STEADY}".split() for word in ("--set", setting)]


@pytest.fixture
def corpus(tmp_path, lines):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines(count, seed=count)))
    return folder


@pytest.fixture
def process(tmp_path):
    """`process("train", …, code=0)`: runs `python -m lm` in an empty folder; returns stdout and stderr."""

    def make(*arguments, code=0, program=("-m", "lm")):
        found = subprocess.run(
            [sys.executable, *program, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
            timeout=120,
        )
        assert found.returncode == code, found.stdout + found.stderr
        assert "Traceback" not in found.stderr
        assert "Warning" not in found.stderr
        return found.stdout, found.stderr

    return make


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The same without the seconds that a process takes to start."""
    monkeypatch.chdir(tmp_path)

    def make(*arguments, code=0):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        return capsys.readouterr()

    return make


@pytest.fixture
def trained(call, corpus, tmp_path):
    call("train", "--data", corpus, "--run", "run", "--set", "train.epochs=1", *QUICK)
    return tmp_path / "run"


def fault(call, *arguments, code=2):
    """The one line that a fault of the input prints."""
    out, err = call(*arguments, code=code)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_train_eval_sample(process, corpus):
    out, err = process("train", "--data", "text", "--set", "train.epochs=2", *QUICK)
    assert re.search(r"epoch 1/2: train ppl [\d.,]+, valid ppl [\d.,]+ \(columns, best so far\), [\d,]+ tokens/s", err)
    assert "data text:" in err
    assert re.search(r"^runs/default-text: \d+ steps, [\d,]+ tokens/s$", out, re.MULTILINE)
    valid = float(re.search(r"valid perplexity ([\d.,]+) \(exact, best checkpoint\)", out)[1])
    assert "tensorboard --logdir runs/default-text/tensorboard" in out
    out, _ = process("eval", "runs/default-text", "--json")
    record = json.loads(out)
    assert round(record["ppl"], 2) == valid
    assert (record["split"], record["protocol"]) == ("valid", "exact")
    assert {"nll", "tokens", "words", "eos", "unk", "ppl_without_eos", "bits_per_byte", "unigram_ppl"} <= set(record)
    assert len(record["data_sha256"]) == len(record["vocabulary_sha256"]) == 64
    out, _ = process("eval", "runs/default-text", "--split", "test", "--protocol", "chunk-mean")
    assert out.startswith("test perplexity ")
    assert "(chunk-mean, " in out
    first, _ = process("sample", "runs/default-text", "--prompt", "the cat", "--length", "12", "--seed", "3")
    again, _ = process("sample", "runs/default-text", "--prompt", "the cat", "--length", "12", "--seed", "3")
    assert first == again
    assert first.startswith("the cat")


def test_a_dry_run(call, corpus, tmp_path):
    out, _ = call("train", "--data", "text", "--dry-run", *QUICK)
    assert "1x8 lstm" in out
    assert "one step: " in out
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_run_resumes_from_its_folder_alone(call, trained):
    _, err = call("train", "--run", trained, "--set", "train.epochs=2")
    assert re.search(r"resuming after step \d+", err)
    assert "epoch 2/2" in err
    assert "epoch 1/2" not in err


def test_ctrl_c_saves_and_says_how_to_resume(call, corpus, tmp_path):
    for number, (name, code) in enumerate((("SIGINT", 130), ("SIGTERM", 143))):
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lm",
                "train",
                "--data",
                corpus,
                "--run",
                "run",
                "--set",
                "train.epochs=5000",
                *QUICK,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
        log = tmp_path / "run/metrics.jsonl"
        enough = 60 * (number + 1)
        deadline = time.monotonic() + 100
        while not (log.exists() and log.read_text().count("\n") > enough) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert re.search(rf"stopped by {name} after step \d+; saved; resume with: rnnlm train --run run\n", err)
        assert "Traceback" not in err
        assert out == ""
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, len(steps) + 1)), "no gap and no double after the resumed run"


@pytest.mark.parametrize("broken", [("stderr",), ("stdout",), ("stdout", "stderr")])
def test_nobody_needs_to_watch(corpus, tmp_path, broken):
    """A reader that has gone, as `head` has: the run is trained and saved to its end, and ends as if it were there."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as gone:
        command = ("train", "--data", corpus, "--run", "run", "--set", "train.epochs=2", *QUICK)
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | dict.fromkeys(broken, gone)
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run([sys.executable, "-m", "lm", *command], **streams, cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")["trainer"]["epoch"] == 2
    assert '"final"' in (tmp_path / "run/metrics.jsonl").read_text()


def test_commands_that_are_printed_can_be_given_to_a_shell(call, corpus, tmp_path, monkeypatch):
    def given(said, before):
        return shlex.split(next(line for line in said.splitlines() if before in line).partition(before)[2])

    out, _ = call("train", "--data", corpus, "--run", "my run", "--set", "train.max_steps=1", *QUICK)
    assert given(out, "TensorBoard: ") == ["tensorboard", "--logdir", "my run/tensorboard"]
    (tmp_path / "it's.txt").write_text("the cat sat\n" * 90)
    assert given(call("data", "prepare", "it's.txt", "--out", "$it's").out, "; train with ") == ["--data", "$it's"]
    call("train", "--data", "it's.txt", "--run", "other", "--set", "train.max_steps=1", *QUICK)
    (tmp_path / "it's.txt").write_text("the dog sat\n" * 90)
    told = given(call("eval", "other", code=2).err, "as another text, by ")
    assert told == ["--data", str(tmp_path / "it's.txt")]
    monkeypatch.setattr("lm.run.train", lambda *_, **__: run.Outcome("SIGTERM", 3, None, ""))
    command = given(call("train", "--data", corpus, "--run", "my run", code=143).err, "resume with: ")
    assert command == ["rnnlm", "train", "--run", "my run"]


def test_a_run_that_diverges_exits_with_one(call, corpus, tmp_path):
    err = call("train", "--data", corpus, "--run", "run", *QUICK, "--set", "train.lr=1e38", code=1)[1]
    assert re.search(
        r"error: the \S+.* is not finite after \d+ steps.*the last good checkpoint is run/checkpoints", err
    )
    assert (tmp_path / "run/checkpoints/last.safetensors").is_file()


def test_eval_in_bands_and_by_several_protocols(call, trained):
    out, _ = call("eval", trained, "--by-frequency", "--by-position")
    assert re.search(r"place 1 +[\d,]+ +[\d.]+% +[\d,.]+\n", out)
    assert re.search(r"10-99 times +[\d,]+ +[\d.]+% +[\d,.]+\n", out)
    both = ("--protocol", "exact", "--protocol", "chunk-mean", "--split", "valid", "--split", "test")
    records = json.loads(call("eval", trained, "--json", "--by-position", *both)[0])
    assert [(each["split"], each["protocol"], "by_position" in each, "by_frequency" in each) for each in records] == [
        *[("valid", "exact", True, False), ("valid", "chunk-mean", False, False)],
        *[("test", "exact", True, False), ("test", "chunk-mean", False, False)],
    ]
    message = "bands must be of the protocol exact; got chunk-mean"
    assert message in fault(call, "eval", trained, "--by-position", "--protocol", "chunk-mean")


def test_data_verbs(process, call, corpus):
    assert "python-docs" in process("data", "list")[0]
    assert "entropy" in call("data", "get", "markov")[0]
    assert "train" in call("data", "check", "text")[0]
    assert "got 'nowhere'" in fault(call, "data", "check", "nowhere")


def test_one_file_and_the_standard_input(process, call, corpus, tmp_path, monkeypatch):
    text = b"".join((corpus / f"{split}.txt").read_bytes() for split in ("train", "valid", "test"))
    (tmp_path / "my book.txt").write_bytes(text)
    _, err = call("train", "--data", "my book.txt", "--set", "train.max_steps=2", *QUICK)
    assert "my book.txt is split 90/5/5 by lines" in err
    assert (tmp_path / "runs/default-my-book.txt/config.toml").is_file()

    def pipe(*arguments, code=0):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        return call("train", "--data", "-", *arguments, *QUICK, code=code)

    pipe("--run", "piped", "--set", "train.max_steps=2")
    assert (tmp_path / "piped/text.txt").read_bytes() == text
    assert "resuming after step 2" in call("train", "--run", "piped", "--set", "train.max_steps=4")[1]
    assert "must be for a new run; got piped, which holds a run" in pipe("--run", "piped", code=2)[1]
    assert "at least 3 pieces" in pipe("--run", "other", "--set", "data.vocab_size=1", code=2)[1]
    assert not (tmp_path / "other").exists()
    first = call("eval", "piped", "--split", "test").out
    (tmp_path / "piped").rename(tmp_path / "moved")  # and its text with it
    assert call("eval", "moved", "--split", "test").out == first
    assert "resuming after step 4" in call("train", "--run", "moved", "--set", "train.max_steps=6")[1]


def test_the_standard_input_of_another_run_in_the_old_place_is_not_read(call, corpus, tmp_path, monkeypatch):
    def pipe(split):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((corpus / f"{split}.txt").read_bytes() * 3)))
        call("train", "--data", "-", "--run", "mine", "--set", "train.max_steps=2", *QUICK)

    pipe("train")
    first = call("eval", "mine", "--split", "test").out
    (tmp_path / "mine").rename(tmp_path / "old")
    call("train", "--init-from", "old", "--run", "new", "--set", "train.max_steps=1")
    assert f'source = "{tmp_path}/old/text.txt"' in (tmp_path / "new/config.toml").read_text()
    pipe("valid")
    assert call("eval", "old", "--split", "test").out == first
    assert "resuming after step 2" in call("train", "--run", "old", "--set", "train.max_steps=3")[1]
    call("train", "--init-from", "old", "--run", "other", "--set", "train.max_steps=1")
    assert f'source = "{tmp_path}/old/text.txt"' in (tmp_path / "other/config.toml").read_text()


@pytest.mark.parametrize("is_old", [False, True])
def test_no_part_of_a_split_text_that_has_changed_is_scored(call, corpus, tmp_path, is_old):
    """A part of it would hold what was trained on."""
    for number, split in enumerate(("train", "valid", "test")):
        (tmp_path / f"{number}.txt").write_bytes((corpus / f"{split}.txt").read_bytes())
    call("train", "--data", "*.txt", "--run", "run", "--set", "train.max_steps=2", *QUICK)
    if is_old:  # an older version kept no checksum of the test text
        path = tmp_path / "run/checkpoints/best.safetensors"
        saved = checkpoint.load(path)
        del saved["data_sha256"]["test"]
        checkpoint.save(path, saved)
    call("eval", "run", "--split", "test")
    (tmp_path / "run/scores.jsonl").unlink()
    (tmp_path / "2.txt").unlink()
    assert "a run must be evaluated with its own " in fault(call, "eval", "run", "--split", "test")


def test_an_empty_configuration_is_not_one_of_defaults(call, trained, tmp_path):
    first = call("eval", trained, "--split", "test").out
    (trained / "config.toml").write_text("")
    assert call("eval", trained, "--split", "test").out == first
    assert "must have the tables [data], [model] and [train]; got " in fault(call, "train", "--run", trained)


def test_a_run_over_another_has_the_settings_of_the_one_that_it_begins_with(call, trained, corpus, tmp_path):
    corpus.rename(tmp_path / "elsewhere")
    call("train", "--data", "elsewhere", "--run", "b", "--set", "train.max_steps=1", *QUICK, "--set", "train.lr=0.25")
    call("train", "--run", "run", "--overwrite", "--init-from", "b")
    made = config.build(config.read_toml(tmp_path / "run/config.toml", "a run"))
    assert (made.train.lr, made.data.source) == (0.25, str(tmp_path / "elsewhere"))


def test_a_run_that_was_told_where_its_text_has_moved_is_evaluated_there(call, trained, corpus, tmp_path):
    first = call("eval", trained, "--split", "test").out
    corpus.rename(tmp_path / "elsewhere")
    assert "give --data NEW" in fault(call, "eval", trained)
    call("train", "--run", trained, "--data", "elsewhere")  # finished: no new best is written
    assert call("eval", trained, "--split", "test").out == first
    (trained / "config.toml").write_text("=")  # then as the checkpoint tells
    assert "give --data NEW" in fault(call, "eval", trained)


def test_the_standard_input_replaces_no_file_but_its_own(call, corpus, tmp_path, monkeypatch):
    text = (corpus / "train.txt").read_bytes() * 3

    def pipe(*arguments, code=0):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        return call(
            "train", "--data", "-", "--run", "notes", "--set", "train.max_steps=2", *arguments, *QUICK, code=code
        )

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text.txt").write_text("my only copy")
    assert "one step" in pipe("--dry-run")[1] + pipe("--dry-run")[0]
    assert "which is neither" in pipe(code=2)[1]
    (tmp_path / "notes/other.txt").write_text("x")
    assert "which is neither" in pipe(code=2)[1]
    assert {path.name: path.read_text() for path in (tmp_path / "notes").iterdir()} == {
        "text.txt": "my only copy",
        "other.txt": "x",
    }
    for path in (tmp_path / "notes").iterdir():
        path.unlink()
    for left in (".lock", "text.txt", ".text.txt.4711", ".config.toml.4711", ".tokenizer.json.4711"):
        (tmp_path / "notes" / left).write_text("of a process that was killed before its run began")
    pipe()
    assert (tmp_path / "notes/text.txt").read_bytes() == text
    assert not [*(tmp_path / "notes").glob(".*.4711")]
    with Lock() as lock:
        (tmp_path / "busy").mkdir()
        lock.take(tmp_path / "busy")
        (tmp_path / "busy/text.txt").write_text("what another process has just read")
        assert "in use by process" in pipe("--run", "busy", code=2)[1]
        assert (tmp_path / "busy/text.txt").read_text() == "what another process has just read"


def test_a_run_that_is_moved_aside_leaves_its_standard_input(call, corpus, tmp_path, monkeypatch):
    text = (corpus / "train.txt").read_bytes() * 3
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    steps = ("--set", "train.max_steps=2")
    call("train", "--data", "-", "--run", "run", *steps, *QUICK)
    call("train", "--run", "run", "--overwrite", *steps, "--set", "model.hidden_size=9")
    assert (tmp_path / "run/text.txt").read_bytes() == (tmp_path / "run.old1/text.txt").read_bytes() == text
    call("eval", "run")
    (tmp_path / "run/my.txt").write_bytes(text)
    err = fault(call, "train", "--run", "run", "--overwrite", "--data", "run/my.txt", *steps)
    assert "must not hold what the new one reads; got " in err
    assert (tmp_path / "run/my.txt").read_bytes() == text


def test_a_pipe_is_scored_and_not_trained_on(call, trained, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "got pipe, a pipe; give --data - and pipe the text in" in fault(call, "train", "--data", "pipe", *QUICK)
    for command in (["data", "stats", "pipe"], ["tokenizer", "train", "--data", "pipe", "--out", "new.json"]):
        assert "got pipe, a pipe; write the text to a file first" in fault(call, *command)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("the cat\n",))
    writer.start()
    assert json.loads(call("score", trained, "pipe", "--json")[0].splitlines()[0])["count"] == 3
    writer.join()


def test_eval_of_one_file_says_which_part_it_scores(call, trained, corpus, tmp_path):
    (tmp_path / "book.txt").write_bytes((corpus / "train.txt").read_bytes() * 3)
    _, err = call("eval", trained, "--data", "book.txt")
    assert "book.txt is split 90/5/5 by lines: train " in err
    assert "only valid is scored: to score a whole text, give a folder with it as valid.txt" in err


def test_a_pattern_is_of_the_working_folder_whatever_its_name(call, corpus, tmp_path, monkeypatch):
    (tmp_path / "one[1]*/src").mkdir(parents=True)
    (tmp_path / "one[1]*/src/a.txt").write_bytes((corpus / "train.txt").read_bytes() * 3)
    monkeypatch.chdir(tmp_path / "one[1]*")
    _, err = call("train", "--data", "src/*.txt", "--run", "run", "--set", "train.max_steps=2", *QUICK)
    assert "src/*.txt is split 90/5/5 by lines" in err
    monkeypatch.chdir(tmp_path)
    assert "perplexity" in call("eval", "one[1]*/run")[0], "from another folder too"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("the c\u00e4t\n".encode("utf-16-le") * 9, "must be UTF-8 text; got bad.txt"),
        (b"the cat\n\xff\n" * 9, "must be UTF-8 text; got bad.txt, line 2, with byte 0xff at byte offset 8"),
        (b"the cat\0\n" * 9, "must be text; got a NUL in bad.txt, line 1"),
        (b"the cat\rsat\r" * 9, "must end with line feeds; got carriage returns alone in bad.txt"),
        (b"the cat\nsat <eos>\n" * 9, "must not hold the word <eos>, .*; got it in bad.txt, line 2"),
    ],
)
def test_eval_refuses_what_train_refuses(call, trained, tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for options in ((), ("--protocol", "chunk-mean"), ("--cache",)):
        err = fault(call, "eval", trained, "--data", "bad.txt", "--split", "train", *options)
        assert re.search(message, err)
        assert "--set" not in err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_eval_warns_of_what_train_warns_of(call, trained, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/test.txt").write_text("nothing\ufeff known\nhere \ufeffat all\n" * 9)
    _, err = call(
        "eval", trained, "--data", "odd", "--split", "test", "--protocol", "exact", "--protocol", "chunk-mean"
    )
    assert err.count("warning: 100.0% of the test text is <unk>, not in the vocabulary of ") == 1
    assert err.count("odd/test.txt, line 1 holds U+FEFF") == 1


def test_a_run_without_a_test_text_says_how_to_give_one(call, corpus, tmp_path):
    text = b"".join((corpus / f"{split}.txt").read_bytes() for split in ("train", "valid", "test")) * 3
    (tmp_path / "book.txt").write_bytes(text)
    given = ("train", "--data", "book.txt", "--set", "train.max_steps=2", *QUICK)
    for form in ("100/0/0", "95/0/5"):
        message = f"must have a share for valid; got data.split={form}, which leaves no valid text"
        for options in ((), ("--dry-run",)):
            assert message in fault(call, *given, "--set", f"data.split={form}", "--run", "run", *options)
        assert not (tmp_path / "run").exists()
    call(*given, "--set", "data.split=95/5/0", "--run", "run")
    call("eval", "run")
    err = fault(call, "eval", "run", "--split", "test")
    assert "must have a share for test; got data.split=95/5/0, which leaves no test text; " in err
    assert "give as --data a folder with test.txt" in err
    call("eval", "run", "--split", "test", "--data", corpus)


def test_score_next_and_sample_say_what_they_do_not_know(call, trained, tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_text("the zebra sat\n\na mat\n")
    out, _ = call("score", trained, "lines.txt")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[2] for row in rows[1:6]] == ["the", "<unk>", "sat", "<eos>", "4 tokens"]
    (tmp_path / "only").mkdir()
    (tmp_path / "lines.txt").rename(tmp_path / "only/test.txt")
    total = call("score", trained, "only/test.txt", "--stream")[0].splitlines()[-1].split("\t")
    record = json.loads(call("eval", trained, "--data", "only", "--split", "test", "--json")[0])
    assert float(total[3]) == pytest.approx(-record["nll"], rel=1e-12)
    assert float(total[5]) == pytest.approx(record["ppl"], rel=1e-9)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n")))
    assert json.loads(call("score", trained, "--json")[0].splitlines()[0])["count"] == 3
    assert "must not hold the word <eos>" in fault_of(call, trained, tmp_path, b"a\nb <eos>\n")
    assert "must be a file; got nowhere" in fault(call, "score", trained, "nowhere")
    out, err = call("next", trained, "the zebra", "--count", "3")
    assert len(out.splitlines()) == 3
    assert "warning: not in the vocabulary, and so read as <unk>: 'zebra'" in err
    whole, err = call("sample", trained, "--prompt", "the zebra", "--length", "20", "--no-unk")
    assert "'zebra'" in err
    assert whole.count("<unk>") == 1
    assert call("sample", trained, "--prompt", "the zebra", "--length", "20", "--no-unk", "--stream")[0] == whole
    assert call("next", trained, "the cat")[1] == ""


def fault_of(call, trained, tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    return fault(call, "score", trained, "bad.txt")


def test_eval_shows_counts_and_units(call, trained, corpus):
    out, _ = call("eval", trained)
    assert re.search(r"^  unit +words and ends of lines$", out, re.MULTILINE)
    assert re.search(r"^  ends of lines +20$", out, re.MULTILINE)
    assert re.search(r"^  <unk> +0  0\.00%$", out, re.MULTILINE)
    call("train", "--data", corpus, "--run", "char", "--set", "data.tokenizer=char", "--set", "train.epochs=1", *QUICK)
    out, _ = call("eval", "char")
    assert re.match(r"valid \d\.\d{3} bits per character \(exact, \d+ tokens\)\n  unit +characters", out)


def test_a_report_shows_what_eval_has_scored(call, trained, tmp_path):
    record = json.loads(call("eval", trained, "--split", "test", "--json")[0])
    call("eval", trained, "--split", "test", "--data", "text")
    assert len((trained / "scores.jsonl").read_text().splitlines()) == 1, "of its own text alone"
    call("report", trained, "--out", "page")
    assert f"{record['ppl']:,.2f}" in (tmp_path / "page/table.md").read_text()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_text_that_was_replaced_is_not_scored_as_the_runs_own(call, trained, corpus, split):
    first = call("eval", trained, "--split", split, "--json").out
    path = corpus / f"{split}.txt"
    before = path.read_bytes()
    path.write_bytes(before + b"the mat\n")
    kept = (trained / "scores.jsonl").read_text()
    for options in ((), ("--cache",), ("--protocol", "chunk-mean"), ("--checkpoint", "last")):
        err = fault(call, "eval", trained, "--split", split, *options)
        assert f"a run must be evaluated with its own {split} text; got another in {corpus}; restore that, or " in err
        assert f"score this as another text, by --data {corpus}" in err
    others = {"train", "valid", "test"} - {split}
    call("eval", trained, *(word for other in others for word in ("--split", other)))
    assert json.loads(call("eval", trained, "--split", split, "--data", corpus, "--json").out) != json.loads(first)
    path.write_bytes(before)
    assert call("eval", trained, "--split", split, "--json").out == first
    assert {json.loads(line)["data_sha256"] for line in kept.splitlines()} == {json.loads(first)["data_sha256"]}


def test_constants_are_tuned_on_the_runs_own_valid_text(call, trained, corpus):
    with (corpus / "valid.txt").open("a") as file:
        file.write("more\n")
    assert "with its own valid text; got another" in call("eval", trained, "--tune", "--split", "test", code=2).err


def test_a_report_shows_scores_of_one_test_text(call, trained, tmp_path):
    """Also where an older version has kept scores of two."""
    call("eval", trained, "--split", "test", "--protocol", "exact", "--protocol", "chunk-mean")
    exact, mean = map(json.loads, (trained / "scores.jsonl").read_text().splitlines())
    rows = [{**mean, "ppl": 123456.0, "data_sha256": "of-two-texts"}, exact]
    (trained / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("report", trained, "--out", "page")
    page = (tmp_path / "page/index.html").read_text()
    assert f"{exact['ppl']:,.2f}" in page
    assert "of-two-texts" not in page


def test_data_prepare_and_stats(process, call, tmp_path):
    raw = (
        "It's a <unk> day, isn't it? In 1,234 Cases. We saw him. Then he left.\n" * 150
        + "Seen once\n"
        + "Never again\n" * 20
    )
    (tmp_path / "raw.txt").write_text(raw)
    out, _ = call("data", "prepare", "raw.txt", "--lower", "--numbers", "--split", "8/1/1")
    assert "train with --data raw-words" in out
    train = (tmp_path / "raw-words/train.txt").read_text().splitlines()
    assert train[0] == "it 's a <unk> day , isn 't it ? in N cases . we saw him . then he left ."
    assert "must go into a new folder; got raw-words" in fault(call, "data", "prepare", "raw.txt")
    out, err = call("data", "stats", "raw.txt")
    assert "raw.txt is split 90/5/5 by lines" in err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert list(rows) == ["split", "train", "valid", "test"]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "train.txt").write_text("a a b b c\n\n")
    (folder / "valid.txt").write_text("a c d\nlonger line <unk>\n")
    out, _ = call("data", "stats", "own")
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["train", "2", "5", "3", "100.00%", "9", "20.00%"],
        ["valid", "2", "6", "6", "33.33%", "17", "83.33%"],
    ]
    assert call("data", "stats", "own", "--min-count", "1")[0].splitlines()[1].split()[-1] == "0.00%"


def test_a_score_after_a_torn_one_is_kept_whole(call, trained):
    call("eval", trained)
    kept = trained / "scores.jsonl"
    for torn in ("", '{"step": 2, "spl'):
        before = kept.read_text()
        kept.write_text(before + torn)
        call("eval", trained, "--split", "test")
        rows = RunFolder(trained).scores()
        assert rows[-1]["split"] == "test"
        assert len(rows) == 2 + bool(torn)
    assert "\n\n" not in kept.read_text()


def test_a_damaged_tokenizer_beside_a_checkpoint_can_be_removed(call, trained):
    whole = (trained / "tokenizer.json").read_bytes()
    (trained / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    for command in ("train", "--run", trained), ("eval", trained):
        assert f"or remove {trained / 'tokenizer.json'}, since the checkpoint holds" in fault(call, *command)
    (trained / "tokenizer.json").unlink()
    call("train", "--run", trained)
    assert (trained / "tokenizer.json").read_bytes() == whole


def test_what_to_do_about_unknown_words_is_what_the_run_allows(call, trained, corpus, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "train.txt").write_text("nothing known here\n" * 30)
    (folder / "valid.txt").write_text("zebras and bees\n" * 30)
    steps = ("--data", folder, "--set", "train.max_steps=1")
    _, err = call("train", *steps, "--run", "fresh", *QUICK)
    assert "raise data.vocab_size, or use --set data.tokenizer=bpe" in err
    _, err = call("train", *steps, "--run", "tuned", "--init-from", trained)
    assert "check that the text, its language and its encoding are those that the tokenizer was made for" in err
    assert "data.vocab_size" not in err


@pytest.mark.parametrize(
    "command",
    [
        ("data", "stats"),
        ("data", "prepare", "--out", "out"),
        ("tokenizer", "train", "--kind", "char", "--out", "out", "--data"),
        ("score", "run"),
    ],
)
def test_hints_name_options_that_the_command_has(call, trained, tmp_path, command):
    text = "caf\u00e9 mat\n" * 300
    (tmp_path / "latin.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "utf.txt").write_text(text, "utf-8")
    err = call(*command, "latin.txt", code=2).err
    assert "name its encoding, as by --encoding latin-1" in err
    assert "--set" not in err
    assert ("--kind byte" in err) == (command[0] == "tokenizer")
    (tmp_path / "wide.txt").write_bytes(text.replace("\u00e9", "e").encode("utf-16-le"))
    assert "give --encoding utf-16-le" in call(*command, "wide.txt", code=2).err
    out = call(*command, "latin.txt", "--encoding", "latin-1").out
    if "--out" in command:
        made = [path for path in (*tmp_path.glob("out"), *tmp_path.glob("out/*")) if path.is_file()]
        assert all("\u00e9" in path.read_text("utf-8") for path in made)
        assert made
    else:
        assert out == call(*command, "utf.txt").out


def test_a_table_s_column_is_named_by_an_option_of_the_command(call, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a b"] * 300, "id": ["1"] * 300}), tmp_path / "t.parquet")
    assert "by --column NAME" in fault(call, "data", "stats", "t.parquet")
    assert call("data", "stats", "t.parquet", "--column", "body").out.count(" 2 ") == 3


def test_another_text_to_evaluate_on_is_read_in_its_own_way(call, corpus, tmp_path):
    """Else as the run's own text, which is said where that is not UTF-8."""
    for path in corpus.iterdir():
        path.write_bytes(path.read_text().replace("a", "\u00e9").encode("latin-1"))
    options = ("--set", "data.encoding=latin-1", "--set", "data.tokenizer=char", "--set", "train.epochs=1")
    call("train", "--data", corpus, "--run", "run", *options, *QUICK)
    lines = [line.removesuffix("\n") for line in (corpus / "test.txt").read_text("latin-1").splitlines()]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/test.txt").write_text("\n".join(lines) + "\n", "utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"body": lines, "id": lines}), tmp_path / "t.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": lines}), tmp_path / "only.parquet")

    def score(*options):
        out, err = call("eval", "run", "--split", "test", "--json", *options)
        return json.loads(out)["nll"], err

    own, err = score()
    assert err == ""
    same, err = score("--data", "other", "--encoding", "utf-8")
    assert (same, err) == (own, "")
    wrong, err = score("--data", "other")
    assert wrong != own
    assert "other is read in the encoding of the run's own text, latin-1; name another by --encoding\n" in err
    _, err = call("eval", "run", "--data", "t.parquet", code=2)
    assert "by --column NAME elsewhere" in err
    table = ("--data", "t.parquet", "--column", "body", "--encoding", "utf-8", "--split", "test")
    assert json.loads(call("eval", "run", *table, "--json").out)["tokens"] > 0
    for option in (("--encoding", "utf-8"), ("--column", "body")):
        assert "must be of another text; got them without --data" in fault(call, "eval", "run", *option)


def test_tokenizer_train(process, call, corpus):
    out, _ = process("tokenizer", "train", "--kind", "bpe", "--size", "300", "--data", "text", "--out", "bpe.json")
    assert "bpe vocabulary of 300" in out
    assert "exists" in fault(call, "tokenizer", "train", "--data", "text", "--out", "bpe.json")
    arguments = ("--run", "run", "--set", "data.tokenizer_file=bpe.json", "--set", "train.max_steps=2", *QUICK)
    call("train", "--data", "text", *arguments)
    assert json.loads(call("eval", "run", "--json")[0])["ppl_per_token"] > 1
    assert "(chunk-mean, " in call("eval", "run", "--protocol", "chunk-mean")[0]
    call("sample", "run", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--length", "5")


def test_a_run_that_begins_with_another_has_its_settings(call, trained, tmp_path):
    finetune = ("--set", "train.optimizer=asgd", "--set", "train.average_patience=none")
    _, err = call("train", "--init-from", trained, "--run", "tuned", *finetune)
    assert f"a new run, from the best weights of {trained}" in err
    ours, theirs = ((tmp_path / name / "config.toml").read_text().splitlines() for name in ("tuned", "run"))
    different = {line.partition(" = ")[0] for line, other in zip(ours, theirs, strict=True) if line != other}
    assert different == {"init_from", "optimizer", "average_patience"}


def test_a_run_that_begins_with_another_is_where_this_machine_can_be(call, trained, tmp_path):
    text = (trained / "config.toml").read_text()
    assert 'device = "cpu"' in text
    (trained / "config.toml").write_text(text.replace('device = "cpu"', 'device = "cuda:7"'))  # begun on a GPU
    call("train", "--init-from", trained, "--run", "tuned")
    assert 'device = "cpu"' in (tmp_path / "tuned/config.toml").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.tokenizer=word", "got data.tokenizer=word, and char in "),
        ("data.tokenizer_file=pieces.json", "pieces.json, and none in "),
        ("data.vocab_size=9", "got data.vocab_size=9, and none in "),
        ("data.min_count=7", "got data.min_count=7, and none in "),
    ],
)
def test_a_run_that_begins_with_another_has_its_tokenizer(call, corpus, tmp_path, given, message):
    options = ("--data", corpus, "--set", "train.max_steps=1", *QUICK)
    call("train", *options, "--run", "run", "--set", "data.tokenizer=char")
    begun = ("train", *options, "--init-from", "run", "--run", "tuned")
    for preset in ((), ("--preset", "default")):
        err = fault(call, *begun, "--set", given, *preset)
        assert "a tokenizer that is there must be taken as it is; got " in err
        assert message in err
        assert err.endswith(f"whose tokenizer the run begins with; leave {given.partition('=')[0]} out\n")
    assert not (tmp_path / "tuned").exists()
    for _ in range(2):
        call(*begun, "--preset", "default", "--set", "data.tokenizer=char")
        (tmp_path / "run").rename(tmp_path / "gone")  # it resumes without that run
        call(*begun, "--preset", "default")
        (tmp_path / "gone").rename(tmp_path / "run")
        kept = config.read_toml(tmp_path / "tuned/config.toml", "it")["data"]
        assert (kept["tokenizer"], json.loads(call("eval", "tuned", "--json").out)["unit"]) == ("char", "character")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.tokenizer=char", "got data.tokenizer=char, and bpe in "),
        ("data.vocab_size=9", "got data.vocab_size=9, and 300 in "),
        ("data.min_count=2", "got data.min_count=2, and none in "),
        ("data.tokenizer_sample=99", "got data.tokenizer_sample=99, and 20000000 in "),
    ],
)
def test_a_tokenizer_of_a_file_is_taken_as_it_is(call, corpus, tmp_path, given, message):
    call("tokenizer", "train", "--kind", "bpe", "--size", "300", "--data", corpus, "--out", "bpe.json")
    options = ("train", "--data", corpus, "--run", "run", "--set", "data.tokenizer_file=bpe.json", *QUICK)
    err = fault(call, *options, "--set", given)
    assert message in err
    assert err.endswith(f"bpe.json; leave {given.partition('=')[0]} out\n")
    name, value = given.removeprefix("data.").split("=")
    (tmp_path / "mine.toml").write_text(f"[data]\n{name} = {value if value.isdecimal() else repr(value)}\n")
    assert fault(call, *options, "--preset", "mine.toml") == err
    assert not (tmp_path / "run").exists()
    call(*options, "--set", "train.max_steps=1", "--set", "data.vocab_size=300")
    assert config.read_toml(tmp_path / "run/config.toml", "it")["data"]["tokenizer"] == "bpe"
    (tmp_path / "bpe.json").unlink()
    call(*options, "--set", "train.max_steps=2", "--set", "data.vocab_size=300")
    call("train", "--run", "run", "--set", "train.max_steps=3")


def test_evaluation_that_adapts_is_tuned_on_valid_and_named(call, trained):
    options = ("eval", trained, "--split", "test", "--json")
    means = ("--dynamic", "--cache", "--set", "eval.dynamic_lr=0.002", "--set", "eval.cache_window=9")
    out, err = call(*options, *means, "--tune", "--tune-tokens", "60")
    tuned = json.loads(out)
    for part in ("exact + temperature(", "dynamic(lr ", "segment 5)", "cache(weight "):
        assert part in tuned["protocol"]
    (again,) = re.findall("tuned on valid; the same again: (.*)", err)
    repeated = json.loads(call(*options, *again.split())[0])
    assert repeated["protocol"] == tuned["protocol"]
    assert repeated["nll"] == pytest.approx(tuned["nll"], rel=1e-9)
    plain = json.loads(call(*options)[0])
    assert plain["protocol"] == "exact"
    assert plain["nll"] != tuned["nll"]
    assert plain.keys() == tuned.keys()
    cooled, _ = call("eval", trained, "--temperature", "2")
    assert re.match(r"valid perplexity .* \(exact \+ temperature\(2\), ", cooled)


def test_what_has_no_effect_is_warned_of(call, trained):
    warning = "warning: train.momentum has no effect without train.optimizer=sgd or asgd\n"
    options = ("train", "--data", "text", "--dry-run", *QUICK, "--set", "train.momentum=0.9", "--set")
    assert warning in call(*options, "train.optimizer=adam")[1]
    assert "warning" not in call(*options, "train.optimizer=sgd")[1]
    kept = ("eval", trained, "--set", "eval.cache_window=9", "--set", "eval.dynamic_lr=0.1", "--set", "eval.chunk=8")
    lines = call(*kept, "--cache")[1].splitlines()
    assert lines == ["warning: eval.dynamic_lr has no effect without --dynamic"]
    assert len(call(*kept)[1].splitlines()) == 2
    unused = ("eval", trained, "--set", "eval.protocol=chunk-mean", "--tune-tokens", "99")
    assert call(*unused)[1].splitlines() == ["warning: --tune-tokens has no effect without --tune"]
    (line,) = call(*unused[:4], "--temperature", "1")[1].splitlines()
    assert line.startswith("warning: eval.protocol has no effect where the model adapts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--cache", "--protocol", "chunk-mean"),
            "a model that adapts must be scored by the protocol exact; got chunk",
        ),
        (("--set", "train.lr=1"), "eval --set must be of the section eval; got train.lr=1"),
        (("--cache", "--set", "eval.cache_window=0"), "eval.cache_window must be greater than or equal to 1; got 0"),
        (("--temperature", "0"), "a temperature of evaluation must be above 0 and finite; got 0.0; 1 is"),
        (("--temperature", "nan"), "a temperature of evaluation must be above 0 and finite; got nan"),
        (("--temperature", "inf", "--tune"), "a temperature of evaluation must be above 0 and finite; got inf"),
        (("--temperature", "1e-300"), "a temperature of evaluation must be above 0 and finite; got 1e-300; 1 is"),
        (("--temperature", "1e-9"), "the perplexity of valid must be a number; got inf by exact + temperature"),
    ],
)
def test_adaptation_that_cannot_be(call, trained, options, message):
    assert message in fault(call, "eval", trained, *options)
    assert not (trained / "scores.jsonl").exists()


def test_a_score_that_is_no_number_is_not_kept(call, trained, monkeypatch):
    monkeypatch.setattr(LanguageModel, "token_nll", lambda _, hidden, targets: targets.double() * math.nan)
    assert "the perplexity of test must be a number; got nan by exact; " in fault(
        call, "eval", trained, "--split", "test"
    )
    assert not (trained / "scores.jsonl").exists()


def test_an_empty_text_has_no_score(call, trained, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    message = "a text to score must hold something; got empty.txt, which is empty"
    for options in ((), ("--stream",), ("--json",), ("--encoding", "latin-1")):
        assert message in fault(call, "score", trained, "empty.txt", *options)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "got the standard input, which is empty" in fault(call, "score", trained)


def test_a_closed_standard_input_is_an_empty_text(call, trained, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", None)
    assert "got the standard input, which is empty" in fault(call, "score", trained)
    assert "got the standard input, which is empty" in fault(call, "train", "--data", "-", "--run", "other", *QUICK)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**58, dtype=torch.uint8), lambda: bytearray(2**58)])
def test_memory_that_is_lacking_is_told(call, monkeypatch, allocate):
    monkeypatch.setattr("lm.run.train", lambda *_, **__: allocate())
    err = fault(call, "train", "--data", "markov")
    assert re.match(
        r"error: the memory must hold the model and a step; .+; raise train\.accumulate, lower train\.", err
    )
    assert "cpp" not in err


def test_memory_that_is_lacking_is_no_fault_of_the_checkpoint(call, trained, monkeypatch):
    monkeypatch.setattr("lm.model.LanguageModel.load_state_dict", lambda *_, **__: torch.empty(2**58))
    options = ("train", "--run", trained, "--set", "train.epochs=2")
    assert fault(call, *options).startswith("error: the memory must hold the model and a step; ")


def test_another_fault_is_not_taken_for_it(call, monkeypatch):
    monkeypatch.setattr("lm.run.train", lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        call("train", "--data", "markov")


_INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.{before})
sys.meta_path.insert(0, Finder())
from lm.__main__ import main
sys.argv[1:] = ["config", "--list"]
code = main()
assert signal.getsignal(signal.SIGINT) is signal.{before}
sys.exit(code)
"""


@pytest.mark.parametrize(("before", "code"), [("default_int_handler", 130), ("SIG_IGN", 0)])
def test_ctrl_c_while_the_program_is_imported(process, before, code):
    out, err = process(program=("-c", _INTERRUPTED.replace("{before}", before)), code=code)
    assert err == ""
    assert bool(out) == (code == 0)


def test_dynamic_evaluation_needs_the_text_of_training(call, trained, corpus):
    with (corpus / "train.txt").open("a") as file:
        file.write("more\n")
    _, err = call("eval", trained, "--dynamic", code=2)
    assert "a run must be evaluated with its own train text; got another in " in err


def test_config_prints_a_preset_that_can_be_given_back(call, corpus, tmp_path):
    assert "zaremba-large" in call("config", "--list")[0]
    out, _ = call("config", "--preset", "gru-online", "--set", "train.epochs=1")
    assert "# recurrent cell" in out
    (tmp_path / "mine.toml").write_text(out)
    _, err = call("train", "--preset", "mine.toml", "--data", "text", *QUICK)
    assert "1x8 gru, norm online" in err


def test_help_names_every_option_and_key(process, call):
    assert {"train", "eval", "sample", "data", "tokenizer", "config"} <= set(process("--help")[0].split())
    out, _ = call("train", "--help")
    for word in ("--preset", "--resume", "[default: auto]", "--backend", "train.lr=0.004", "model.alpha_fwd="):
        assert word in out
    keys = out.partition("Every key of --set")[2]
    assert re.search(r"^  \[train\]$", keys, re.MULTILINE)
    assert {"train.epochs=4", 'train.schedule="cosine"'} <= {*keys.split()}, "those of a plain train"
    assert max(map(len, out.splitlines())) <= 110
    assert {line.split(".")[1].split("=")[0] for line in keys.splitlines() if re.match(r"    train\.", line)} == {
        *config.TrainConfig.model_fields
    }
    assert "[default: 1.0]" in call("sample", "--help")[0]
    assert "0.1.0" in call("--version")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--preset", "papr"), "a preset must be one of awd-ptb, awd-wt2, default, "),
        (("train", "--data", "nowhere"), "got 'nowhere'"),
        (("train", "--data", ""), "got ''"),
        (("train", "--set", "train.lrr=1"), "train.lrr must be a known key of [train]"),
        (("train", "--set", "train.lr=fast"), "train.lr must be a valid number; got 'fast'"),
        (("train", "--set", "train.lr"), "--set must be section.key=value"),
        (("train", "--set", "model.norm=batch"), "model.norm must be 'none', 'online', 'layer' or 'rms'"),
        (("train", "--set", "model.guard=no"), "model.guard must be 'scale', 'clamp' or 'none'"),
        (("train", "--set", "model.alpha_fwd=0"), "model.alpha_fwd must be greater than 0"),
        (("train", "--set", "model.layer_sizes=[9, 9]"), "model.layer_sizes must have a size for each of the layers"),
        (("train", "--set", "train.window=uniform"), "train.window: a window must be"),
        (("train", "--backend", "fast"), "a backend must be one of auto, "),
        (("train", "--device", "cuda:99"), "got 'cuda:99'"),
        (("train", "--seed", "x"), "'x' is not a valid integer"),
        (("train", "--resume", "maybe"), "'maybe' is not one of 'auto', 'never'"),
        (("eval", "run"), "a run must be a folder that `train` made; got run, which is not"),
        (("sample", "run"), "a run must be a folder that `train` made; got run, which is not"),
        (("tokenizer", "train", "--kind", "syllable", "--out", "x"), "'syllable' is not one of 'word', 'char'"),
        (("data", "stats", "a.txt", "--encoding", "nonsense"), "an encoding of text that Python knows; got 'nonsense'"),
        (("data", "prepare", "a.txt", "--encoding", "base64"), "an encoding of text that Python knows; got 'base64'"),
        (("report", "run", "--out", ""), "a path must not be empty; got ''; write . for the working folder"),
        (("train", "--data", "markov", "--run", ""), "a path must not be empty; got ''"),
        (
            ("train", "--data", "markov", "--run", "a\udcff"),
            r"a path must be UTF-8 text; got 'a\udcff', whose character 2",
        ),
        (("study", "a.toml", "--run", "a\udcff"), "is not UTF-8; rename the file or folder"),
        (("data", "prepare", "a.txt", "--out", ""), "a path must not be empty; got ''"),
        (("data", "prepare", "a.txt", "--language", "german"), "cs, de, el, en, es, "),
        (("train", "--data", "hf:"), "a data set of the hub must have a name, hf:NAME or hf:NAME:CONFIG; got 'hf:'"),
        (("fly",), "No such command 'fly'"),
        (("export", "run", "file"), "Missing option '--to'. Choose from: torchscript, torch-export"),
        (("train", "--hidden-size", "9"), "'--hidden-size'. Give this setting as --set model.hidden_size=VALUE."),
        (("eval", "run", "--cache-theta", "1"), "Give this setting as --set eval.cache_theta=VALUE."),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(call, tmp_path, arguments, message):
    assert message in fault(call, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["train = 3", "[[train]]", "data = 'x'\n[[train]]"])
@pytest.mark.parametrize("options", [("--seed", 1), ("--set", "train.lr=1"), ("--data", "text", "--seed", 1)])
def test_a_section_that_is_no_table(call, tmp_path, content, options):
    (tmp_path / "mine.toml").write_text(content)
    assert "must be a table of settings; " in fault(call, "train", "--preset", "mine.toml", *options)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "valid"), (b"", "valid"), (b"the cat\n\xff\n", "byte offset 8")]
)
def test_a_split_that_is_missing_empty_or_not_text(call, corpus, tmp_path, content, message):
    (corpus / "valid.txt").unlink()
    if content is not None:
        (corpus / "valid.txt").write_bytes(content)
    err = fault(call, "train", "--data", "text", "--run", "run")
    assert message in err
    assert "valid.txt" in err or "valid" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_named_after_a_preset_s_file(call, corpus, tmp_path):
    (tmp_path / "a\udcff.toml").write_text("")
    assert "a path must be UTF-8 text" in fault(call, "train", "--data", "text", "--preset", "a\udcff.toml", *QUICK)
    assert not (tmp_path / "runs").exists()


def test_bad_input_to_a_real_process(process, tmp_path):
    assert "unknown" not in fault(process, "train", "--set", "model.cell=lstn")
    assert not list(tmp_path.iterdir())


def test_bad_input_on_a_run(call, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for arguments, message in (
        (("eval", trained, "--split", "dev"), "'dev' is not one of 'train', 'valid', 'test'"),
        (("eval", trained, "--protocol", "fast"), "'fast' is not one of 'exact', 'chunk-mean'"),
        (("sample", trained, "--temperature", "-1"), "temperature must be at least 0"),
        (("sample", trained, "--top-p", "2"), "top-p must be above 0 and at most 1"),
        (("sample", trained, "--length", "0"), "length must be from 1 to 1,000,000"),
        (("sample", trained, "--length", 10**9), "length must be from 1 to 1,000,000"),
        (("sample", trained, "--seed", "-1"), "-1 is not in the range 0<=x<=9223372036854775807"),
        (("sample", trained, "--seed", 2**63), "is not in the range"),
        (("sample", trained, "--prompt", "\udcff"), "a prompt must be UTF-8 text"),
        (("eval", trained, "--data", ""), "got ''"),
        (("train", "--run", trained, "--set", "train.lr=2"), "train.lr is 0.5 there and 2.0 here"),
        (("train", "--run", trained, "--resume", "never"), "must have an empty folder"),
        (("train", "--run", trained, "--preset", "gru-online"), "got others than "),
    ):
        assert message in fault(call, *arguments)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    best = trained / "checkpoints/best.safetensors"
    best.write_bytes(best.read_bytes()[:500])
    assert "a checkpoint must be a whole file" in fault(call, "eval", trained)
    best.unlink()
    assert "a checkpoint must be a file" in fault(call, "sample", trained)


def test_checkpoint_show(call, trained):
    out, err = call("checkpoint", "show", trained / "checkpoints/last.safetensors")
    assert "checksum good" in out
    assert re.search(r"^trainer\.step = \d+$", out, re.MULTILINE)
    assert re.search(r"^decoder\.weight +float32 +\[12, 8\] +384 bytes$", out, re.MULTILINE)
    assert err == ""
    assert "must be one that `train` wrote" not in fault(call, "checkpoint", "show", trained / "nowhere.safetensors")
    (trained / "checkpoints/last.safetensors").write_bytes(b"")
    err = fault(call, "checkpoint", "show", trained / "checkpoints/last.safetensors")
    assert "last.safetensors, which is damaged" in err


def test_a_folder_that_cannot_be_written(call, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = call("train", "--data", "text", "--run", "file/run", *QUICK, code=2)
    assert "error: file/run must be a folder that can be written; Not a directory" in err


def test_the_papers_scripts(process, corpus):
    _, err = process(
        *("--cell", "rnn", "--norm", "layer", "--data", "text", "--run", "run", "--set", "train.max_steps=2"),
        *QUICK,
        program=(str(ROOT / "scripts/train_ptb.py"),),
    )
    assert "1x8 rnn_tanh, norm layer, tied" in err
    script = (str(ROOT / "scripts/evaluate.py"),)
    out, _ = process("run", "--split", "valid", program=script)
    assert re.search(r"exact +chunk-mean +unigram +run \(valid\)\n( +[\d.,]+){3}  run\n", out)
    assert "error: a run must be" in process("nowhere", program=script, code=2)[1]


def test_scores_that_cannot_be_kept_are_told_and_warned_of(call, trained):
    (trained / "scores.jsonl").symlink_to(trained / "nowhere/scores.jsonl")
    out, err = call("eval", trained, "--split", "test")
    assert out.startswith("test perplexity ")
    assert "warning: the scores are not kept for a report: " in err
