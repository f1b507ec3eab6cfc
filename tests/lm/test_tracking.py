import json
import math
import subprocess
import sys

import pytest
import torch
from tensorboard.util import tensor_util

from lm.evaluator import Score
from lm.events import Diverged, EpochEnded, Scored, Started, Stepped, Validated
from lm.internals import Internals
from lm.tracking import JsonLines, TensorBoard

SCORE = Score("columns", 50.0, 50.0, 40.0, 10, unk=0)


def stepped(step, nll=2.0):
    return Stepped(1, step, 5, 9, nll, 10, 20.0, 10, 0.1, 1.5, 0.5)


def epoch(step):
    return [Validated(1, step, SCORE, best=True), EpochEnded(1, step, 25.0, 10, 3.0)]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_event_is_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0, log_every=2, tokens_per_unit=2.0)
    events = [*map(stepped, (1, 2, 3, 4)), *epoch(4), Scored(1, 4, "valid", SCORE), Diverged(2, 4, "loss")]
    for event in events:
        log(event)
    found = rows(path)
    starts = [row for row in found if row["kind"] == "start"]
    found = [row for row in found if row["kind"] != "start"]
    assert [(row["kind"], row["step"]) for row in found] == [
        *[("train", 2), ("train", 4), ("valid", 4), ("epoch", 4), ("final", 4), ("diverged", 4)]
    ]
    assert [row["step"] for row in starts] == [1, 2, 3, 4]
    assert starts[0] == {"kind": "start", "step": 1, "epoch": 1, "position": 5, "loss": 2.0, "grad_norm": 1.5}
    assert found[0] == {
        "kind": "train",
        "step": 2,
        "epoch": 1,
        "loss": 2.0,
        "ppl": math.exp(4.0),
        "lr": 0.1,
        "grad_norm": 1.5,
        "tokens_per_second": 20.0,
    }
    assert (found[2]["ppl"], found[2]["protocol"], found[2]["best"]) == (50.0, "columns", True)
    assert (found[3]["loss"], found[3]["ppl"]) == (2.5, math.exp(5.0))


def test_the_first_steps_and_the_first_overflow_are_logged_once(tmp_path):
    """A run that is killed and continued anywhere has the same record."""
    nats = dict.fromkeys(range(1, 31), 2.0) | {7: 709.0, 24: 709.1, 25: 800.0}
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    log = JsonLines(whole, 0, log_every=100)
    for step, loss in nats.items():
        log(stepped(step, loss))
    assert [(row["kind"], row["step"]) for row in rows(whole)] == [
        *[("start", step) for step in range(1, 21)],
        ("overflow", 24),
    ]
    for saved in (0, 1, 7, 20, 23, 24, 25):
        log = JsonLines(stopped, 0, log_every=100)
        for step, loss in nats.items():
            log(stepped(step, loss))  # all of it was logged, but only `saved` steps were saved
        log = JsonLines(stopped, saved, log_every=100)
        for step in range(saved + 1, 31):
            log(stepped(step, nats[step]))
        assert stopped.read_text() == whole.read_text()


def test_internals_are_logged_with_each_validation(tmp_path, model):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0, 1, internals=Internals(model(), torch.ones(3, 2, dtype=torch.int64)))
    for event in epoch(4):
        log(event)
    found = rows(path)
    assert [row["kind"] for row in found] == ["valid", "internals", "epoch"]
    assert found[1]["statistics"]["norm_var_l0"] == [1.0] * 5
    assert sum(found[1]["gates"]["f_l0"]["counts"]) == 3 * 2 * 12
    JsonLines(path, 4, 1)
    assert rows(path) == found


def test_what_json_cannot_hold_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path, 0, log_every=1)(stepped(1, nll=1e4))
    assert "Infinity" not in path.read_text()
    assert rows(path)[-1]["ppl"] is None


def test_a_resumed_log_continues_without_gap_or_double(tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    events = [*map(stepped, (1, 2, 3)), *epoch(3), *map(stepped, (4, 5, 6)), *epoch(6), Scored(2, 6, "valid", SCORE)]
    log = JsonLines(whole, 0, log_every=1)
    for event in events:
        log(event)
    for saved in (2, 3, 4, 6):
        stopped.unlink(missing_ok=True)
        log = JsonLines(stopped, 0, log_every=1)
        for event in events:
            log(event)  # all of it was logged, but only `saved` steps were saved
        with stopped.open("a") as file:
            file.write("[" * 100_000 + '\n{"kind": "train", "st')  # what no run has logged; and the last line is torn
        log = JsonLines(stopped, saved, log_every=1)
        for event in events:
            if event.step > saved or isinstance(event, Scored):
                log(event)
        assert stopped.read_text() == whole.read_text()


def test_a_new_log_drops_what_an_unsaved_run_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path, 0, log_every=1)(stepped(1))
    JsonLines(path, 0, log_every=1)
    assert path.read_text() == ""


def test_versions_are_logged_where_a_run_begins_and_where_they_change(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def trained(start, stop, torch):
        log = JsonLines(path, start, log_every=1, versions={"torch": torch})
        for event in [Started(1, start, 2, 50, 0), *map(stepped, range(start + 1, stop + 1))]:
            log(event)
        assert [row["step"] for row in rows(path) if row["kind"] == "train"] == list(range(1, stop + 1))
        return [(row["step"], row["versions"]["torch"]) for row in rows(path) if row["kind"] == "versions"]

    assert trained(0, 2, "2.11") == [(0, "2.11")]
    assert trained(2, 4, "2.11") == [(0, "2.11")]
    assert trained(4, 5, "2.12") == [(0, "2.11"), (4, "2.12")]
    assert trained(4, 6, "2.11") == [(0, "2.11")], "what 2.12 has trained was not saved"
    assert trained(6, 8, "2.12") == [(0, "2.11"), (6, "2.12")]
    assert trained(7, 8, "2.12") == [(0, "2.11"), (6, "2.12")]
    assert trained(0, 1, "2.12") == [(0, "2.12")]


@pytest.fixture
def board(tmp_path, model, tokenizer):
    """`board(step)`: a sink into one folder, for a run that stands at this step."""
    return lambda step: TensorBoard(tmp_path, step, 1, model(), tokenizer, {"train.lr": 0.1, "model.cell": "lstm"})


def read(folder):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "histograms": 0, "text": 0})
    accumulator.Reload()
    return accumulator


def scalars(found, tag=None):
    """The tags of scalars, or (step, value) of one."""
    if tag is None:
        return {*found.PluginTagToContent("scalars")}
    return [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors(tag)]


def test_tensorboard_files_are_read_back(tmp_path, board):
    sink = board(0)
    for event in [*map(stepped, (1, 2)), *epoch(2), Scored(1, 2, "valid", SCORE)]:
        sink(event)
    sink.close()
    found = read(tmp_path)
    assert {"train/loss", "train/ppl", "train/lr", "train/grad_norm", "train/tokens_per_second"} <= scalars(found)
    assert {"valid/loss", "valid/ppl", "perplexity/epoch", "score/valid_ppl_columns"} <= scalars(found)
    assert min(scalars(found)) == "perplexity/epoch", "the first chart"
    valid = read(tmp_path / "valid")
    assert scalars(valid, "perplexity/epoch") == [(2, 50.0)]
    assert scalars(valid) == {"perplexity/epoch"}
    for tag in scalars(found):
        assert len(found.SummaryMetadata(tag).summary_description) > 10, tag
    assert [step for step, _ in scalars(found, "train/loss")] == [1, 2]
    assert scalars(found, "valid/ppl")[0][1] == 50.0
    statistics = {f"statistics/norm_{name}_l0" for name in ("mean", "var", "u", "v")}
    assert statistics <= {*found.PluginTagToContent("histograms")}
    bins = tensor_util.make_ndarray(found.Tensors("statistics/norm_var_l0")[0].tensor_proto)
    assert bins[:, 2].sum() == 48
    assert any(tag.startswith("sample") for tag in found.PluginTagToContent("text"))
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"train.lr" in content
    assert b"lstm" in content


def test_tensorboard_continues_without_double(tmp_path, board):
    first = board(0)
    for event in [*map(stepped, (1, 2, 3, 4)), *epoch(4), Scored(1, 4, "valid", SCORE)]:
        first(event)
    first.close()
    again = board(2)
    for event in [*map(stepped, (3, 4)), *epoch(4), Scored(1, 4, "valid", SCORE)]:
        again(event)
    again.close()
    finished = board(4)
    finished(Scored(1, 4, "valid", SCORE))
    finished.close()
    found = read(tmp_path)
    assert [step for step, _ in scalars(found, "train/loss")] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(found, "valid/ppl")] == [4]
    assert [step for step, _ in scalars(read(tmp_path / "valid"), "perplexity/epoch")] == [4]
    assert len(scalars(found, "score/valid_ppl_columns")) == 1


def test_importing_the_toolkit_loads_no_sink_and_no_corpus_library():
    heavy = ("tensorboard", "torch.utils.tensorboard", "datasets", "sentencepiece", "pyarrow")
    code = f"import lm.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
