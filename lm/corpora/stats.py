"""What a text holds, as a table: what one needs to know before a model is trained on it."""

from collections import Counter
from dataclasses import dataclass

from lm.corpora import Corpus
from lm.text import Text
from lm.tokenizers import UNK, plain_blocks

HEADS = ("split", "lines", "words", "types", "coverage", "longest line", "<unk>")


@dataclass(frozen=True)
class Stats:
    """One split.

    Attributes:
        lines, words: of it; `types` of its words are different.
        covered: words that the training text holds.
        longest: characters of its longest line.
        unknown: words that are `<unk>` to a word tokenizer of the training text, the literal `<unk>` among them.
    """

    split: str
    lines: int
    words: int
    types: int
    covered: int
    longest: int
    unknown: int


def stats(corpus: Corpus, min_count: int | None = None) -> list[Stats]:
    """Returns what each split holds.

    Arguments:
        min_count: as `data.min_count`.
    """
    train = corpus.splits.get("train")
    least = min_count or (corpus.min_count("word") if train else 1)
    held = _counts(train) if train else Counter()
    return [_of(split, text, held, least) for split, text in corpus.splits.items()]


def _of(split: str, text: Text, held: Counter[bytes], least: int) -> Stats:
    counts = held if split == "train" else _counts(text)
    covered = sum(count for word, count in counts.items() if word in held)
    known = sum(count for word, count in counts.items() if held[word] >= least and word != UNK.encode())
    longest = max((len(line) for line in text), default=0)
    return Stats(split, text.facts.lines, counts.total(), len(counts), covered, longest, counts.total() - known)


def _counts(text: Text) -> Counter[bytes]:
    counts: Counter[bytes] = Counter()
    for block in plain_blocks(text):
        counts.update(block.split())
    return counts


def table(found: list[Stats]) -> str:
    """Returns it as a table for a person."""
    rows: list[tuple[str, ...]] = [HEADS]
    for one in found:
        shares = [f"{part / max(1, one.words):.2%}" for part in (one.covered, one.unknown)]
        numbers = [f"{number:,}" for number in (one.lines, one.words, one.types)]
        rows.append((one.split, *numbers, shares[0], f"{one.longest:,}", shares[1]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )
