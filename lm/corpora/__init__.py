"""Texts by name, by file or by folder: train, valid and test."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.corpora import characters, checks, folder, hub, markov, python_docs
from lm.corpora.files import PLAIN, SPLITS, Reading, Split, divide, is_pattern, join, open_text, refuse_pipe, shares
from lm.corpora.folder import Known
from lm.errors import UserError
from lm.text import Text

__all__ = ["CORPORA", "SPLITS", "Corpus", "Reading", "Split", "check", "get", "is_here", "listing", "load"]

Splits = Mapping[str, Text]
CACHE = "cache"  # folder under `data_dir` of what is made from texts


@dataclass(frozen=True)
class Corpus:
    """A text.

    Attributes:
        name: a name of `CORPORA`, or the folder's or file's own.
        splits: "train" | "valid" | "test" to texts; those that there are. A blank line is a line.
        note: how one file was split, for a person; empty where none was.
        by_name: whether it was asked for by a name of `CORPORA`.
    """

    name: str
    splits: Splits
    note: str = ""
    by_name: bool = False

    def sha256(self, split: str) -> str:
        """Returns the sha256 of the UTF-8 bytes of each line and a line feed."""
        return self.splits[split].facts.lines_sha256

    def min_count(self, kind: str) -> int:
        """Returns how often the training text must hold a word of the vocabulary where nothing is set: twice, so that
        `<unk>` is trained; once in a text that has its own `<unk>`, and in a corpus by name."""
        raw = kind == "word" and not self.by_name and "unk" not in self.splits["train"].facts.found
        return 2 if raw else 1

    def require(self, kind: str, ways: checks.Ways = checks.OF_TRAINING) -> list[str]:
        """Raises UserError where any split is not what a tokenizer of this kind can take; returns warnings."""
        return checks.require(self.splits, kind, ways)


@dataclass(frozen=True)
class Row:
    """One corpus by name: how it is loaded from its own folder, what it is, what it must be."""

    load: Callable[[Path], Splits]
    description: str
    known: Mapping[str, Known]
    tokenizer: str = "word"  # by which it is measured


CORPORA: dict[str, Row] = {
    "python-docs": Row(python_docs.load, "the documentation inside CPython, words; made here, no network", {}),
    "markov": Row(lambda _: markov.load(), "a generated text of exactly known entropy; made here, kept nowhere", {}),
    "ptb": Row(
        lambda place: hub.load("ptb", place),
        "Penn Treebank, 10,000 words; your files or the hub (under the LDC's agreement)",
        hub.SOURCES["ptb"].known,
    ),
    "wikitext-2": Row(
        lambda place: hub.load("wikitext-2", place),
        "WikiText-2, tokenised; your files or the hub",
        hub.SOURCES["wikitext-2"].known,
    ),
    "ptb-char": Row(characters.ptb, "Penn Treebank, characters; made from the files of ptb", {}, "char"),
    "text8": Row(lambda place: characters.million(place, "text8"), "text8, characters; your file", {}, "char"),
    "enwik8": Row(lambda place: characters.million(place, "enwik8"), "enwik8, bytes; your file", {}, "byte"),
}


def load(
    source: str,
    data_dir: Path,
    needed: Iterable[str] = ("train", "valid"),
    options: Reading = PLAIN,
) -> Corpus:
    """Returns a corpus by its name in `CORPORA`, kept under `data_dir`, or from files.

    A folder holds `train.txt`, `ptb.train.txt` or `wiki.train.tokens`, valid (val, dev) and test likewise; it takes the
    name of a published corpus when it is that corpus, otherwise its own. One file, or all that a pattern such as
    `src/**/*.py` finds, is split. `hf:NAME` or `hf:NAME:CONFIG` is a data set of the hub.

    Arguments:
        needed: splits that must be there; of one text that is split and where none is named, all that have a share.
        options: how files are read.

    Raises:
        UserError: no such source; a needed split that is missing or has no share, a split that is empty; a published
            corpus that cannot be had or is not what it must be.
    """
    data_dir = Path(data_dir)
    found = _open(source, data_dir, tuple(needed), options)
    for name, text in found.splits.items():
        if not text.size:
            raise UserError(
                f"the {name} split must hold text; got {text.name}, which is empty; put at least one line there"
            )
    return found


def _open(source: str, data_dir: Path, needed: tuple[str, ...], options: Reading) -> Corpus:
    cache, place = data_dir / CACHE, Path(source)
    if source in CORPORA:
        return Corpus(source, CORPORA[source].load(data_dir / source), by_name=True)
    if source.startswith("hf:"):
        splits = hub.dataset(source.removeprefix("hf:"), data_dir, options)
        return _with_all(Corpus(source.removeprefix("hf:").replace(":", "-").split("/")[-1], splits), needed, options)
    if source and place.is_dir():
        splits = folder.read(place, needed, options, cache)
        return Corpus(_published(splits) or place.resolve().name, splits)
    if source and place.exists():
        refuse_pipe(place, "write the text to a file first")
        return _split(place.name.partition(".")[0], open_text(place, options, cache), needed, options)
    if is_pattern(source):
        name = Path(re.split(r"[*?\[]", source)[0]).name or "text"
        return _split(name, join(source, options, cache), needed, options)
    raise UserError(
        f"data must be one of {', '.join(CORPORA)}, or a folder or file of text, a pattern such as 'src/**/*.py', or "
        f"hf:NAME; got {source!r}, which is none of these; check it; where a run's text was moved, give --data NEW"
    )


def _split(name: str, text: Text, needed: tuple[str, ...], options: Reading) -> Corpus:
    parts = dict(zip(SPLITS, shares(options.split), strict=True))
    if lacking := [split for split in needed if not parts[split]]:
        raise UserError(
            f"{text.name}, one text that is split, must have a share for {lacking[0]}; got data.split={options.split}, "
            f"which leaves no {lacking[0]} text; begin a run with another, such as 90/5/5, or give as --data a folder "
            f"with {lacking[0]}.txt"
        )
    if not text.size:
        raise UserError(f"a text must hold something; got {text.name}, which is empty; check the path")
    return Corpus(name, *divide(text, options.split, needed or SPLITS))


def _with_all(corpus: Corpus, needed: tuple[str, ...], options: Reading) -> Corpus:
    """A data set that has train alone, split."""
    if set(corpus.splits) == {"train"} and set(needed) != {"train"}:
        return _split(corpus.name, corpus.splits["train"], needed, options)
    for name in needed:
        if name not in corpus.splits:
            raise UserError(
                f"{corpus.name} must have the splits {', '.join(needed)}; got {', '.join(corpus.splits)}; name another"
            )
    return corpus


def _published(splits: Splits) -> str | None:
    for name, row in CORPORA.items():
        if row.known and not folder.faults(splits, row.known):
            return name
    return None


def get(source: str, data_dir: Path) -> str:
    """Fetches or makes a corpus, keeps it under `data_dir`, and says what it holds."""
    return _describe(load(source, data_dir, ()), data_dir)


def check(source: str, data_dir: Path) -> str:
    """Says what a corpus that is already here holds; never fetches nor makes one.

    Raises:
        UserError: it is not here, or is not what it must be.
    """
    if source in CORPORA and source != "markov" and not is_here(source, data_dir):
        raise UserError(
            f"{source} must be in {Path(data_dir) / source} to be checked; got no text there; run `data get {source}`"
        )
    return _describe(load(source, data_dir, ()), data_dir)


def listing(data_dir: Path) -> str:
    """Says which corpora there are by name, and which are here."""
    width = max(map(len, CORPORA))
    return "\n".join(
        f"{name:{width}}  {'here' if is_here(name, data_dir) else '-':4}  {row.description}"
        for name, row in CORPORA.items()
    )


def is_here(name: str, data_dir: Path) -> bool:
    """Returns whether a corpus of `CORPORA` can be read without being fetched or made."""
    place = Path(data_dir) / name
    if name in ("text8", "enwik8"):
        return folder.find(place, [name]) is not None
    return name == "markov" or folder.holds_text(Path(data_dir) / "ptb" if name == "ptb-char" else place)


def _describe(corpus: Corpus, data_dir: Path) -> str:
    lines = [corpus.name, *([f"  {corpus.note}"] if corpus.note else [])]
    for split, text in corpus.splits.items():
        facts = text.facts
        tokens = facts.lines + facts.words
        lines.append(f"  {split:5}  {facts.lines:>7,} lines  {tokens:>9,} tokens  sha256 {facts.lines_sha256}")
    row = CORPORA.get(corpus.name)
    if row and row.known:
        lines.append("  verified: it is the published corpus")
    if corpus.name == "python-docs":
        lines.append(f"  made from Python {python_docs.python_version(Path(data_dir) / corpus.name)}")
    if corpus.name == "markov":
        lines.append(f"  entropy {markov.source().entropy:.6f} nats per token, end of lines counted")
    return "\n".join(lines)
