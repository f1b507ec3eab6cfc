"""The command line's part on texts: `data` and `tokenizer`."""

import shlex
from dataclasses import replace
from pathlib import Path

import click

from lm import corpora, files, tokenizers
from lm.corpora import Reading
from lm.corpora.checks import Ways
from lm.errors import UserError

_data_dir = click.option(
    "--dir", "data_dir", type=files.path, default=Path("data"), help="Folder where corpora are kept."
)
_split = click.option(
    "--split", default=Reading.split, help="Shares of train, valid and test of a text that is one file."
)
encoding_option = click.option("--encoding", default=Reading.encoding, help="Encoding of text files.")
_column = click.option("--column", default=Reading.column, help="Column of a table that holds the text.")
_WAYS = Ways(encoding="--encoding ", kind="")


@click.group()
def data() -> None:
    """List, fetch, verify and prepare texts."""


@data.command("list")
@_data_dir
def list_data(data_dir: Path) -> None:
    """List the corpora, and which are on this machine."""
    click.echo(corpora.listing(data_dir))


@data.command("get")
@click.argument("name")
@_data_dir
def get_data(name: str, data_dir: Path) -> None:
    """Make or fetch a corpus and keep it."""
    click.echo(corpora.get(name, data_dir))


@data.command("check")
@click.argument("name")
@_data_dir
def check_data(name: str, data_dir: Path) -> None:
    """Verify a corpus on this machine, or a folder: sizes, checksums."""
    click.echo(corpora.check(name, data_dir))


@data.command("stats")
@click.argument("source")
@click.option("--min-count", type=click.IntRange(1), help="As data.min_count.  [default: the text's own]")
@_split
@encoding_option
@_column
@_data_dir
def show_stats(source: str, min_count: int | None, data_dir: Path, **reading: str) -> None:
    """Count what a text holds: a corpus by name, a folder, a file, a pattern.

    Coverage is the share of words that the training text holds; <unk> the share of those that a word tokenizer of
    the training text does not know. Words are separated by white space.
    """
    from lm.corpora import stats

    corpus = corpora.load(source, data_dir, (), Reading(**reading))
    for line in [corpus.note, *corpus.require("word", _WAYS)]:
        if line:
            click.echo(line, err=True)
    click.echo(stats.table(stats.stats(corpus, min_count)))


@data.command("prepare")
@click.argument("source")
@click.option(
    "--out", type=files.path, help="New folder to write train.txt, valid.txt and test.txt to.  [default: NAME-words]"
)
@click.option("--language", default="en", help="Language whose abbreviations and apostrophes are known: de, fr …")
@click.option("--lower", is_flag=True, help="Lower case.")
@click.option("--numbers", is_flag=True, help="Write each number as N.")
@_split
@encoding_option
@_column
@_data_dir
def prepare_data(
    source: str, out: Path | None, language: str, lower: bool, numbers: bool, data_dir: Path, **reading: str
) -> None:
    """Separate words and punctuation of a raw text, so that a word tokenizer can read it.

    SOURCE is a file, which is split, a folder, or a pattern of files. Words that are rare need no care:
    training makes them <unk>, see data.min_count.
    """
    from lm.corpora import prepare

    words = prepare.splitter(language, lower=lower, numbers=numbers)
    corpus = corpora.load(source, data_dir, (), Reading(**reading))
    out = out or Path(f"{corpus.name}-words")
    for warning in corpus.require("word", _WAYS):
        click.echo(f"warning: {warning}", err=True)
    prepare.prepare(corpus, out, words)
    splits = ", ".join(f"{name}.txt" for name in corpus.splits)
    click.echo(f"{out}: {splits}; train with --data {shlex.quote(str(out))}")


@click.group("tokenizer")
def tokenizer_group() -> None:
    """Make tokenizers."""


@tokenizer_group.command("train")
@click.option("--kind", type=click.Choice(tokenizers.KINDS), default="bpe", help="Kind of tokens.")
@click.option("--size", type=int, help="Maximum vocabulary size.  [default: the kind's own]")
@click.option("--data", "source", default="python-docs", help="Corpus by name or folder; its training text is read.")
@click.option("--out", type=files.path, required=True, help="JSON file to write, for `--set data.tokenizer_file=FILE`.")
@encoding_option
@_column
@_data_dir
def train_tokenizer(kind: str, size: int | None, source: str, out: Path, data_dir: Path, **reading: str) -> None:
    """Train a tokenizer on a corpus and keep it in a file."""
    if out.exists():
        raise UserError(
            f"a tokenizer must be written to a new file; got {out}, which exists; choose another, or move it away"
        )
    corpus = corpora.load(source, data_dir, ["train"], Reading(**reading))
    for warning in corpus.require(kind, replace(_WAYS, kind="--kind ")):
        click.echo(f"warning: {warning}", err=True)
    tokenizer = tokenizers.train(kind, corpus.splits["train"], size, min_count=corpus.min_count(kind))
    tokenizers.save(tokenizer, out)
    click.echo(f"{out}: {kind} vocabulary of {tokenizer.size:,}, sha256 {tokenizer.sha256}")
