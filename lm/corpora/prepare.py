"""Raw text made ready for a word tokenizer: words and punctuation apart, as machine translation's Moses does it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lm.corpora import Corpus
from lm.errors import UserError
from lm.files import write_chunks
from lm.text import Text, watched
from lm.tokenizers import UNK

_NUMBER = re.compile(r"[+-]?\d+(?:[.,:/]\d+)*%?")


def splitter(language: str = "en", *, lower: bool = False, numbers: bool = False) -> Callable[[str], str]:
    """Returns a function of a line to its words with one space between them: `It's 3.5.` is `It 's 3.5 .`

    Arguments:
        language: whose abbreviations and apostrophes are known, as `en`, `de`, `fr`.
        lower: in lower case.
        numbers: a word that is a number is `N`.

    Raises:
        UserError: a language that the tokenizer does not know; it would take it for English.

    Source: the tokenizer of Moses (Koehn et al. 2007), by sacremoses.
    """
    from sacremoses import MosesTokenizer
    from sacremoses.corpus import NonbreakingPrefixes

    known = {*NonbreakingPrefixes().available_langs.values(), "ja", "ko"}  # the last two have rules only
    if language not in known:
        raise UserError(
            f"a language must be the code of one whose abbreviations are known: {', '.join(sorted(known))}; "
            f"got {language!r}; en is the nearest for others in Latin letters"
        )
    moses = MosesTokenizer(language)

    def words(line: str) -> str:
        found = moses.tokenize(line, escape=False, protected_patterns=[UNK])
        # lower case comes last: a capital letter tells Moses that a sentence has ended before it
        cased = (word.lower() if lower else word for word in found)
        return " ".join("N" if numbers and _NUMBER.fullmatch(word) else word for word in cased)

    return words


def prepare(corpus: Corpus, out: Path, words: Callable[[str], str]) -> dict[str, Path]:
    """Writes each split of a corpus to a new folder, line by line as `words` gives them; returns the files.

    Raises:
        UserError: the folder holds something; text that is not UTF-8, or holds what words cannot.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"prepared text must go into a new folder; got {out}, which is not empty; give another --out")
    corpus.require("word")
    files = {split: out / f"{split}.txt" for split in corpus.splits}
    for split, text in corpus.splits.items():
        with watched(text, "preparing") as read:
            write_chunks(files[split], _lines(read, words))
    return files


def _lines(text: Text, words: Callable[[str], str]) -> Iterator[bytes]:
    for line in text:
        yield f"{words(line)}\n".encode()
