"""Folders, published corpora (with small stand-ins), the Markov source by hand, and Python's documentation."""

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from lm import corpora, tokenizers
from lm.corpora import folder, hub, markov, python_docs
from lm.errors import UserError
from lm.text import Text


def _place(where: Path, family: str = "{}.txt", **splits: bytes) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    for split, content in ({"train": b"a b\n", "valid": b"a\n", "test": b"b\n"} | splits).items():
        (where / family.format(split)).write_bytes(content)
    return where


def lines_of(corpus: corpora.Corpus) -> dict[str, list[str]]:
    return {split: list(text) for split, text in corpus.splits.items()}


# Folders


@pytest.mark.parametrize("family", folder.FAMILIES)
def test_a_folder_under_each_of_its_names(tmp_path: Path, family: str):
    found = corpora.load(str(_place(tmp_path / "mine", family)), tmp_path)
    assert found.name == "mine"
    assert lines_of(found) == {"train": ["a b"], "valid": ["a"], "test": ["b"]}
    # of `printf 'a b\n' | sha256sum`
    assert found.sha256("train") == "01186fcf04b4b447f393e552964c08c7b419c1ad7a25c342a0b631b1967d3a27"


def test_lines_end_at_line_feeds_alone(tmp_path: Path):
    text = "\ufeffa\r\n\nb\u2028c\x0bd\x85e\rf\n g "
    found = corpora.load(str(_place(tmp_path, train=text.encode())), tmp_path)
    assert lines_of(found)["train"] == ["a", "", "b\u2028c\x0bd\x85e\rf", " g "]


def test_blank_lines_are_text_and_nothing_is_not(tmp_path: Path):
    assert lines_of(corpora.load(str(_place(tmp_path, test=b"\n\n")), tmp_path))["test"] == ["", ""]
    with pytest.raises(UserError, match=r"the test split must hold text; .*test.txt, which is empty; put at least one"):
        corpora.load(str(_place(tmp_path, test=b"")), tmp_path)


def test_faults_of_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"one of python-docs, markov, ptb, .*, or a folder .*got 'nowhere'"):
        corpora.load("nowhere", tmp_path)
    with pytest.raises(UserError, match=r"or a folder .*got ''"):
        corpora.load("", tmp_path)
    with pytest.raises(UserError, match=r"must hold \{train,valid,test\}.txt or ptb\..* holds none of these"):
        corpora.load(str(tmp_path), tmp_path)
    _place(tmp_path, valid=b"ok\nab\xffc")
    with pytest.raises(
        UserError, match=r"the valid split must be UTF-8 text; .*valid.txt, line 2, with byte 0xff at .* 5;"
    ):
        corpora.load(str(tmp_path), tmp_path).require("word")
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"the valid split must be a file; .*valid.txt, which does not exist"):
        corpora.load(str(tmp_path), tmp_path)


# Published corpora, with a small text in the place of the published one

SMALL = {"train": [" a <unk> ", " b "], "valid": [" a "], "test": [" b b "]}
TOKENS = {"train": 5, "valid": 2, "test": 3}


@pytest.fixture
def small_ptb(monkeypatch: pytest.MonkeyPatch) -> hub.Source:
    known = {s: folder.Known(len(x), TOKENS[s], folder.digest(x, "md5")) for s, x in SMALL.items()}
    source = replace(hub.SOURCES["ptb"], known=known)
    monkeypatch.setitem(hub.SOURCES, "ptb", source)
    monkeypatch.setitem(corpora.CORPORA, "ptb", replace(corpora.CORPORA["ptb"], known=known))
    return source


class _Hub:
    """Stands for the hub: answers with rows, or not at all, and counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[str]] | None) -> None:
        import datasets
        import huggingface_hub

        self.rows = rows
        self.asked: list[str] = []
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self._info)
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def _info(self, repository: str, timeout: float) -> None:
        self.asked.append(repository)
        assert timeout <= 10
        if self.rows is None:
            raise ConnectionError("no route\nto the hub")

    def _load(self, repository: str, **options: str) -> dict[str, dict[str, list[str]]]:
        assert repository == self.asked[-1]
        assert self.rows is not None
        return {
            key: {"sentence": self.rows[split]}
            for split, key in zip(folder.SPLITS, ("train", "validation", "test"), strict=True)
        }


def test_the_hub_is_asked_once_and_its_text_kept(tmp_path: Path, small_ptb, monkeypatch: pytest.MonkeyPatch):
    asked = _Hub(monkeypatch, {split: [line.strip() for line in lines] for split, lines in SMALL.items()})
    first = corpora.load("ptb", tmp_path)
    second = corpora.load("ptb", tmp_path)
    assert first.name == second.name == "ptb"
    assert lines_of(first) == lines_of(second) == SMALL
    assert asked.asked == ["ptb-text-only/ptb_text_only"]
    names = sorted(path.name for path in (tmp_path / "ptb").iterdir())
    assert names == ["ptb.test.txt", "ptb.train.txt", "ptb.valid.txt"]
    assert "verified: it is the published corpus" in corpora.check("ptb", tmp_path)


def test_another_text_from_the_hub_is_refused_and_not_kept(tmp_path, small_ptb, monkeypatch):
    _Hub(monkeypatch, SMALL | {"test": ["b c"]})
    with pytest.raises(UserError, match=r"got another text from the hub's ptb-text-only/ptb_text_only \(.*test: "):
        corpora.load("ptb", tmp_path)
    assert not (tmp_path / "ptb").exists()


def test_without_a_network_the_error_says_how_to_place_the_files(tmp_path, small_ptb, monkeypatch):
    _Hub(monkeypatch, None)
    expected = (
        r"ptb must be on the hub or in .*ptb; got no answer from the hub \(ConnectionError: no route\); "
        r"put ptb.train.txt, ptb.valid.txt, ptb.test.txt into .*ptb, or give as the data a folder"
    )
    with pytest.raises(UserError, match=expected):
        corpora.load("ptb", tmp_path)
    assert not (tmp_path / "ptb").exists()


@pytest.mark.parametrize("family", ["ptb.{}.txt", "{}.txt"])
def test_placed_files_need_no_network(tmp_path: Path, small_ptb, monkeypatch, family: str):
    asked = _Hub(monkeypatch, None)
    texts = {split: "".join(f"{line}\n" for line in lines).encode() for split, lines in SMALL.items()}
    _place(tmp_path / "ptb", family, **texts)
    assert lines_of(corpora.load("ptb", tmp_path)) == SMALL
    assert asked.asked == []
    by_path = corpora.load(str(tmp_path / "ptb"), tmp_path / "elsewhere")
    assert by_path.name == "ptb"


def test_a_placed_text_that_is_not_the_published_one(tmp_path: Path, small_ptb):
    place = _place(tmp_path / "ptb", "ptb.{}.txt")
    with pytest.raises(UserError, match=r"ptb must be the published corpus; got another text from .*ptb \(train: "):
        corpora.load("ptb", tmp_path)
    named = _place(tmp_path / "mine", "ptb.{}.txt")
    assert corpora.load(str(named), tmp_path).name == "mine"  # by path it is just a text
    (place / "ptb.test.txt").unlink()
    with pytest.raises(UserError, match=r"the test split must be a file; .*ptb.test.txt, which does not exist"):
        corpora.load("ptb", tmp_path)


def test_counts_are_verified_where_no_hash_is_known():
    known = {"train": folder.Known(3, 5)}
    assert folder.faults({"train": Text.of(["a b", "", " "])}, known) == []
    assert folder.faults({"train": Text.of(["a", "", ""])}, known) == ["train: must be 3 lines of 5 tokens; got 3 of 4"]


def test_what_is_published_stands_here():
    """The counts in print, tokens being words and one <eos> a line."""
    known = hub.SOURCES["ptb"].known
    assert [(k.lines, k.tokens) for k in known.values()] == [(42068, 929589), (3370, 73760), (3761, 82430)]
    wikitext = hub.SOURCES["wikitext-2"].known
    assert [hub.SOURCES["wikitext-2"].line(row) for row in ("", " = a = ")] == [" ", " = a = "]
    assert (wikitext["valid"].tokens, wikitext["test"].tokens) == (217646, 245569)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_machine_without_network_fails_in_seconds(tmp_path: Path, setting: dict[str, str]):
    script = "import sys; from pathlib import Path; from lm import corpora; corpora.load('ptb', Path(sys.argv[1]))"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")} | setting
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "data")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "UserError: ptb must be on the hub or in" in done.stderr
    assert time.monotonic() - begin < 20  # of which the imports take most
    assert not (tmp_path / "data").exists()


# The Markov source

TWO = markov.Source(np.array([[0.0, 0.5, 0.5], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]))


def test_the_entropy_of_a_small_source_by_hand():
    # p P = p: p = (3, 2, 2.5) / 7.5 -> state 0 is entered from 1 (2 * .25) and from the end of line (2.5 * 1).
    assert TWO.stationary == pytest.approx([3 / 7.5, 2 / 7.5, 2.5 / 7.5], rel=1e-12)
    by_hand = 3 / 7.5 * np.log(2) + 2 / 7.5 * (0.5 * np.log(4) + 0.5 * np.log(2)) + 0
    assert TWO.entropy == pytest.approx(by_hand, rel=1e-12)


def test_the_probability_of_a_text_by_hand():
    assert TWO.log_probability(["w0 w1", "w0"]) == pytest.approx(np.log(1 * 0.5 * 0.5 * 1 * 0.5), rel=1e-12)
    assert TWO.log_probability(["w1"]) == -np.inf
    with pytest.raises(UserError, match=r"must hold the words w0 … w1; got 'w2'"):
        TWO.log_probability(["w2"])


def test_a_text_follows_its_source():
    lines = TWO.generate(20_000, seed=3)
    assert lines == TWO.generate(20_000, seed=3)
    assert lines != TWO.generate(20_000, seed=4)
    assert len(lines) == 20_000
    pairs = Counter()
    for line in lines:
        path = [2, *(int(word[1:]) for word in line.split()), 2]
        pairs.update(itertools.pairwise(path))
    counts = np.array([[pairs[i, j] for j in range(3)] for i in range(3)])
    shares = counts / counts.sum(1, keepdims=True)
    error = 5 * np.sqrt(TWO.transition * (1 - TWO.transition) / counts.sum(1, keepdims=True))
    assert (np.abs(shares - TWO.transition) <= error).all()
    assert -TWO.log_probability(lines) / counts.sum() == pytest.approx(TWO.entropy, rel=0.01)


def test_the_markov_corpus_is_its_source(tmp_path: Path):
    found = corpora.load("markov", tmp_path)
    assert list(tmp_path.iterdir()) == []
    # The very text: pins the generator, so that numbers measured on it stay comparable.
    assert found.sha256("train") == "7b12432098cb5019e63f3c343b3abd7ac61de63d828982f695fa3827153c4426"
    assert found.sha256("valid") == "0627bfa86387169b484bb5e1c5518772db3c16a110030e7c7fce5383f317f1b5"
    assert found.sha256("test") == "1a0e41cdb66bffa494a147bb1e6df616d0030ec7cecc8686f895239c0c9168fb"
    source = markov.source()
    assert source.transition.sum(1) == pytest.approx(1, rel=1e-12)
    assert tokenizers.train("word", found.splits["train"]).size == markov.WORDS + 2
    for split in ("train", "valid", "test"):
        lines = lines_of(found)[split]
        tokens = len(lines) + sum(len(line.split()) for line in lines)
        # The mean of n surprisals strays from the entropy by their spread over sqrt(n); their spread is about 1 nat.
        assert -source.log_probability(lines) / tokens == pytest.approx(source.entropy, abs=5 / np.sqrt(tokens))


# Python's documentation


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("It doesn't return 3.14, or 1,000; it's None.", "it does n't return N , or N ; it 's none ."),
        ("Call run_module() from os.path (see PEP 8).", "call run module from os path ( see pep N ) ."),
        ("Built-in sha256 of UTF-8 text, e.g. `x`:", "built-in sha256 of utf-8 text , e.g. x :"),
        ("). Write to tim@python.org or http://x.org/y now", "write to or now"),
        ("We\u2019ll \u201cquote\u201d the caf\u00e9", "we 'll quote the caf\u00e9"),
        ("...", ""),
    ],
)
def test_the_treebanks_way_with_words(sentence: str, words: str):
    assert " ".join(python_docs.tokens(sentence)) == words


def test_sentences_leave_code_out():
    passage = """Return the answer to it.  The answer
    is always known, see below.

    >>> answer() and some more words here
    42

    Heading of words here too
    =========================

    * first item of the list
    * second item of a list, e.g. This one.
      grammar ::= rules of words go out
    x = f(y)[1] * {z} -> q + r
    """
    assert [" ".join(found) for found in python_docs.sentences(passage)] == [
        "return the answer to it .",
        "the answer is always known , see below .",
        "first item of the list",
    ]


def test_passages_are_docstrings_then_comments(tmp_path: Path):
    source = '"""Module."""\n# one\n# two\n# ---\n# three\nx = 1  # trailing\ndef f():\n    "F."\n    # four\n'
    (tmp_path / "m.py").write_text(source)
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Test."""')
    found = {name: text for name, text in python_docs.documents(tmp_path) if not name.startswith("topic ")}
    assert found == {"bad.py": [], "m.py": ["Module.", "F.", "one\ntwo\n\nthree", "four"]}


def _raw(count: int) -> list[tuple[str, list[str]]]:
    """Documents of two sentences out of twenty words, one rare word, and one sentence that they share."""
    generator = np.random.default_rng(0)
    names = ["".join(generator.choice(list("abcdefgh"), 5)) for _ in range(20)]
    shared = "The same line in every document."
    return [
        (
            f"d{i}",
            [
                ". ".join(" ".join(generator.choice(names, 8)).capitalize() for _ in range(2)),
                shared,
                f"The rare w{i}o here",
            ],
        )
        for i in range(count)
    ]


def test_a_built_corpus_shares_no_line_between_splits():
    splits = python_docs.build(_raw(60))
    sizes = {split: sum(len(line.split()) + 1 for line in lines) for split, lines in splits.items()}
    assert sizes["test"] / sum(sizes.values()) == pytest.approx(0.1, abs=0.04)
    assert sizes["valid"] / sum(sizes.values()) == pytest.approx(0.1, abs=0.04)
    train = set(splits["train"])
    assert train.isdisjoint(splits["valid"])
    assert train.isdisjoint(splits["test"])
    everywhere = [line for lines in splits.values() for line in lines]
    assert everywhere.count("the same line in every document .") <= 1
    counts = Counter(word for line in splits["train"] for word in line.split())
    assert counts["<unk>"] > 0
    assert min(counts.values()) >= python_docs.RAREST
    assert set(" ".join(everywhere).split()) <= set(counts)
    assert python_docs.build(_raw(60)) == splits


def test_the_vocabulary_has_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(python_docs, "VOCABULARY", 15)
    splits = python_docs.build(_raw(60))
    assert tokenizers.train("word", splits["train"]).size == 15


def test_a_python_without_sources_says_so():
    with pytest.raises(UserError, match=r"made from the sources of Python's standard library .* use a complete Python"):
        python_docs.build([("topic x", ["Four words are here."])])


def test_python_docs_are_made_once_and_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(python_docs, "documents", lambda library: _raw(60))
    first = corpora.load("python-docs", tmp_path / "data")
    place = tmp_path / "data" / "python-docs"
    assert sorted(path.name for path in place.parent.iterdir()) == ["python-docs"]
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "test.txt", "train.txt", "valid.txt"]
    monkeypatch.setattr(python_docs, "build", None)  # the second time nothing is built
    assert corpora.load("python-docs", tmp_path / "data") == first
    assert f"made from Python {sys.version.split()[0]}" in corpora.check("python-docs", tmp_path / "data")

    (place / "valid.txt").write_text("mine\n")
    with pytest.raises(
        UserError, match=r"must hold python-docs as it was made; got another: valid.txt is another text; move"
    ):
        corpora.load("python-docs", tmp_path / "data")
    assert (place / "valid.txt").read_text() == "mine\n"
    (place / "manifest.json").write_text('{"builder": 0}')
    with pytest.raises(UserError, match=r"its manifest.json is of another version"):
        corpora.load("python-docs", tmp_path / "data")
    for broken in ("{", "[" * 100000, "9" * 5000):
        (place / "manifest.json").write_text(broken)
        with pytest.raises(UserError, match=r"its manifest.json cannot be read"):
            corpora.load("python-docs", tmp_path / "data")


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(python_docs, "documents", lambda library: _raw(60))
    monkeypatch.setattr(python_docs.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpora.load("python-docs", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_python_docs(tmp_path: Path):
    splits = lines_of(corpora.load("python-docs", tmp_path))
    sizes = {split: sum(len(line.split()) + 1 for line in lines) for split, lines in splits.items()}
    assert sizes["train"] > 250_000
    assert 0.08 < sizes["valid"] / sum(sizes.values()) < 0.13
    assert 0.08 < sizes["test"] / sum(sizes.values()) < 0.13
    table = tokenizers.train("word", splits["train"])
    assert 3000 < table.size <= 10_000
    train = set(splits["train"])
    for split in ("valid", "test"):
        assert train.isdisjoint(splits[split])
        found = [word for line in splits[split] for word in line.split()]
        assert 0.01 < found.count("<unk>") / len(found) < 0.08


# What `data list|get|check` print


def test_listing_and_check(tmp_path: Path, small_ptb, monkeypatch: pytest.MonkeyPatch):
    _Hub(monkeypatch, SMALL)
    before = {line.split()[0]: line.split()[1] for line in corpora.listing(tmp_path).splitlines()}
    assert before == dict.fromkeys(corpora.CORPORA, "-") | {"markov": "here"}
    with pytest.raises(UserError, match=r"ptb must be in .*ptb to be checked; got no text there; run `data get ptb`"):
        corpora.check("ptb", tmp_path)
    _place(tmp_path / "ptb", **{s: "".join(f"{x}\n" for x in lines).encode() for s, lines in SMALL.items()})
    assert "here  Penn Treebank" in corpora.listing(tmp_path)
    assert corpora.get("ptb", tmp_path) == corpora.check("ptb", tmp_path)
    report = corpora.check("markov", tmp_path)
    assert "5,000 lines    106,471 tokens" in report
    assert "entropy 3.136786 nats per token" in report
    assert corpora.check(str(_place(tmp_path / "own")), tmp_path).startswith("own\n")


def test_a_corpus_takes_any_mapping():
    frozen = MappingProxyType({split: Text.of([split]) for split in folder.SPLITS})
    assert len({corpora.Corpus("x", frozen).sha256(split) for split in frozen}) == 3
