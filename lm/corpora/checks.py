"""What a tokenizer cannot take, found in every split before training starts, with its file and line."""

from collections.abc import Mapping

from lm.errors import UserError
from lm.text import Text
from lm.tokenizers import EOS


def require(splits: Mapping[str, Text], kind: str) -> list[str]:
    """Returns warnings of what is taken as it is, in any split.

    Arguments:
        kind: of the tokenizer. Bytes take everything.

    Raises:
        UserError: text that is not UTF-8 or holds NUL; for words, the word `<eos>`, or lines that end with carriage
            returns alone.
    """
    return (
        [] if kind == "byte" else [warning for split, text in splits.items() for warning in _checked(split, text, kind)]
    )


def _checked(split: str, text: Text, kind: str) -> list[str]:
    found = text.facts.found
    if "utf8" in found:
        offset = found["utf8"]
        byte = next(text.part(offset, offset + 1).blocks())[0]
        raise UserError(
            f"the {split} split must be UTF-8 text; got {text.place(offset)}, with byte 0x{byte:02x} at byte offset "
            f"{text.start + offset}; convert the file to UTF-8, name its encoding, as by --set data.encoding=latin-1, "
            "or take bytes: --set data.tokenizer=byte"
        )
    if "nul" in found:
        raise UserError(
            f"the {split} split must be text; got a NUL in {text.place(found['nul'])}, as in UTF-16 and binary files; "
            "give --set data.encoding=utf-16, or take bytes: --set data.tokenizer=byte"
        )
    if kind != "word":
        return []
    if "eos" in found:
        raise UserError(
            f"the {split} split must not hold the word {EOS}, which marks the end of a line; got it in "
            f"{text.place(found['eos'])}; replace the word, or use another tokenizer, such as --set data.tokenizer=bpe"
        )
    if "cr" in found and not text.facts.line_feeds:
        raise UserError(
            f"the lines of the {split} split must end with line feeds; got carriage returns alone in {text.name}; "
            "convert it, as by tr '\\r' '\\n'"
        )
    if "bom" in found:
        return [f"{text.place(found['bom'])} holds U+FEFF, a byte order mark inside the text: it is part of its word"]
    return []
