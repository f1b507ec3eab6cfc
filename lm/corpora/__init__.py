"""Texts by name or by folder: train, valid and test as lines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.corpora import folder, hub, markov, python_docs
from lm.corpora.folder import SPLITS, Known, Split
from lm.errors import UserError
from lm.text import Text

__all__ = ["CORPORA", "SPLITS", "Corpus", "Split", "check", "get", "listing", "load"]

Splits = Mapping[str, Text]


@dataclass(frozen=True)
class Corpus:
    """A text.

    Attributes:
        name: a name of `CORPORA`, or the folder's own.
        splits: "train" | "valid" | "test" to texts. A blank line is a line.
    """

    name: str
    splits: Splits

    def sha256(self, split: str) -> str:
        """Returns the sha256 of the UTF-8 bytes of each line and a line feed."""
        return self.splits[split].facts.lines_sha256


@dataclass(frozen=True)
class Row:
    """One corpus by name: how it is loaded from its own folder, what it is, what it must be."""

    load: Callable[[Path], Splits]
    description: str
    known: Mapping[str, Known]


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
}


def load(source: str, data_dir: Path) -> Corpus:
    """Returns a corpus by its name in `CORPORA`, kept under `data_dir`, or from a folder's path.

    A folder holds `train.txt`, `ptb.train.txt` or `wiki.train.tokens`, valid and test likewise; it takes the
    name of a published corpus when it is that corpus, otherwise its own.

    Raises:
        UserError: neither a name nor a folder; a split that is missing, empty or not UTF-8; a published
            corpus that cannot be had or is not what it must be.
    """
    if source in CORPORA:
        return Corpus(source, CORPORA[source].load(Path(data_dir) / source))
    place = Path(source)
    if not source or not place.is_dir():
        raise UserError(
            f"data must be one of {', '.join(CORPORA)}, or a folder of text; got {source!r}, which is "
            "neither; check the name or the path"
        )
    splits = folder.read(place)
    return Corpus(_published(splits) or place.resolve().name, splits)


def _published(splits: Splits) -> str | None:
    for name, row in CORPORA.items():
        if row.known and not folder.faults(splits, row.known):
            return name
    return None


def get(source: str, data_dir: Path) -> str:
    """Fetches or makes a corpus, keeps it under `data_dir`, and says what it holds."""
    return _describe(load(source, data_dir), data_dir)


def check(source: str, data_dir: Path) -> str:
    """Says what a corpus that is already here holds; never fetches nor makes one.

    Raises:
        UserError: it is not here, or is not what it must be.
    """
    if source in CORPORA and source != "markov" and not _is_here(source, data_dir):
        raise UserError(
            f"{source} must be in {Path(data_dir) / source} to be checked; got no text there; run `data get {source}`"
        )
    return _describe(load(source, data_dir), data_dir)


def listing(data_dir: Path) -> str:
    """Says which corpora there are by name, and which are here."""
    width = max(map(len, CORPORA))
    return "\n".join(
        f"{name:{width}}  {'here' if _is_here(name, data_dir) else '-':4}  {row.description}"
        for name, row in CORPORA.items()
    )


def _is_here(name: str, data_dir: Path) -> bool:
    place = Path(data_dir) / name
    return name == "markov" or any((place / f.format("train")).exists() for f in folder.FAMILIES)


def _describe(corpus: Corpus, data_dir: Path) -> str:
    lines = [f"{corpus.name}"]
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
