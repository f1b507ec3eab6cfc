"""Lines scored by themselves and as one stream, against the definition and `eval`."""

import json
import math

import pytest
import torch

import lm
from lm import config, run, scoring
from lm.text import Text

TEXT = "the cat sat on a mat\na dog ran and slept\n\nthe dog sat\n" * 20
LINES = "the cat sat\n\n the  zebra\tran\na mat"


@pytest.fixture(scope="module", params=["word", "char", "byte"])
def trained(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("scored")
    (place / "text").mkdir()
    for split in ("train", "valid", "test"):
        (place / "text" / f"{split}.txt").write_text(TEXT)
    tables = {
        "data": {"source": str(place / "text"), "tokenizer": request.param},
        "model": {"hidden_size": 8},
        "train": {"batch_size": 3, "max_steps": 20, "lr": 0.05, "backend": "reference"},
    }
    run.train(config.build(tables), place / "run", say=lambda _: None)
    return lm.load(place / "run", backend="reference")


def by_hand(trained, text):
    """One token at a time from the zero state, after `<eos>`."""
    ids = [i for some in trained.tokenizer.encode_text(Text(text.encode())) for i in some.tolist()]
    state, before, found = None, trained.tokenizer.eos, []
    with torch.no_grad():
        for token in ids:
            hidden, state = trained.model(torch.tensor([[before]]), state)
            found.append(trained.model.log_probs(hidden)[0, 0, token].item())
            before = token
    return found


def test_each_line_is_scored_by_itself(trained, monkeypatch):
    lines = [*trained.score_lines(LINES)]
    assert [line.number for line in lines] == [1, 2, 3, 4]
    for line, text in zip(lines, LINES.splitlines(keepends=True), strict=True):
        assert [token.log_prob for token in line.tokens] == pytest.approx(by_hand(trained, text), rel=1e-4)
        assert line.log_prob == pytest.approx(sum(by_hand(trained, text)), rel=1e-5)
        assert line.perplexity == pytest.approx(math.exp(-line.log_prob / len(line.tokens)))
    monkeypatch.setattr(scoring, "_SHORT", 3)  # all the same where long lines are computed alone
    for ours, theirs in zip(trained.score_lines(LINES), lines, strict=True):
        assert ours.log_prob == pytest.approx(theirs.log_prob, rel=1e-5)


def test_one_stream_is_what_eval_scores(trained):
    text = Text((LINES + "\n" + TEXT).encode())
    lines = [*scoring.lines(trained, text, one_stream=True)]
    score = trained.score(LINES + "\n" + TEXT)
    assert sum(line.log_prob for line in lines) == pytest.approx(-score.nll, rel=1e-12)
    assert sum(len(line.tokens) for line in lines) == score.tokens
    assert [token.log_prob for token in lines[0].tokens] == pytest.approx(by_hand(trained, "the cat sat\n"), rel=1e-4)


def test_tables_add_up_and_no_token_breaks_them(trained):
    lines = [*trained.score_lines(LINES)]
    heads, *rows = [row.split("\t") for row in scoring.tsv(lines)]
    assert heads == [*scoring.HEADS]
    assert {len(row) for row in rows} == {6}
    of_tokens = [row for row in rows if row[1] != "total"]
    assert sum(float(row[3]) for row in of_tokens) == pytest.approx(float(rows[-1][3]), rel=1e-12)
    assert rows[-1][:3] == ["all", "total", f"{len(of_tokens)} tokens"]
    assert float(rows[0][4]) == pytest.approx(-float(rows[0][3]) / math.log(2))
    found = [json.loads(row) for row in scoring.json_lines(lines)]
    assert [one["line"] for one in found] == [1, 2, 3, 4, "all"]
    assert [one["log_prob"] for one in found] == [float(row[3]) for row in rows if row[1] == "total"]
    assert sum(one["count"] for one in found[:-1]) == found[-1]["count"] == len(of_tokens)


def test_a_text_without_a_token(trained):
    assert [*trained.score_lines("")] == []
    assert [*scoring.tsv([])][-1].startswith("all\ttotal\t0 tokens")
    assert json.loads([*scoring.json_lines([])][-1])["perplexity"] is None
