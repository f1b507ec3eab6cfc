"""The command line: `python -m lm` and `rnnlm`. Options and output only; the work is in the other modules."""

import codecs
import functools
import itertools
import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import click
from click.core import ParameterSource
from torch import Tensor

import rnnorm
from lm import checkpoint, cli_data, config, corpora, distributed, files, report, run, scoring, study
from lm.adaptation import Adaptation, given, of_settings
from lm.config import Config, DataConfig
from lm.corpora import Reading, Split
from lm.corpora.checks import Ways
from lm.errors import UserError
from lm.evaluator import PROTOCOLS, Group, ProtocolName, Score, headline, record
from lm.lock import Lock
from lm.machine import out_of_memory
from lm.output import Lenient, standard_streams
from lm.run_folder import TEXT, RunFolder, Say, Which
from lm.sample import LONGEST
from lm.trained import TrainedModel, load
from lm.trainer import ENDS, DivergedError

_SETTINGS = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}
_STOPPED = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGTERM": 143}

_backend = click.option("--backend", help="Backend for the recurrent layers; `python -m rnnorm` lists them.")
_device = click.option("--device", help="Device: cpu, cuda, cuda:0 or auto.")
_which = click.option(
    "--checkpoint", "which", type=click.Choice(["best", "last"]), default="best", help="Checkpoint to load."
)
_run_argument = click.argument("folder", metavar="RUN", type=files.path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2 for a fault of the input, 1 for a run that diverged."""
    with standard_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        result = cli.main(arguments, prog_name="rnnlm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as fault:
        click.echo(fault.format_message(), err=True)
        return 2
    except click.ClickException as fault:
        return _fail(re.sub(r"\s*\n\s*", " ", fault.format_message()) + _as_setting(fault), 2)
    except (UserError, rnnorm.BackendUnavailable) as fault:
        return _fail(str(fault), 2)
    except OSError as fault:
        return _fail(f"{fault.filename or 'a file'}: {fault.strerror or fault}", 2)
    except distributed.ElsewhereError:
        return 2
    except distributed.ProcessError as fault:
        click.echo(f"error: {fault}", err=True)
        return 1
    except DivergedError as fault:
        return _fail(f"{fault}; lower train.lr or set train.clip, in another run folder", 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail("stopped; what was not saved before is lost", 130)
    except (MemoryError, RuntimeError) as fault:
        if (lacking := out_of_memory(fault)) is None:
            raise
        click.echo(f"error: {lacking}", err=True)  # of this process alone, even among several
        return 2


def _as_setting(fault: click.ClickException) -> str:
    """Where an option that is not there is a setting, such as `--epochs`: how to give it, as the end of a sentence."""
    if not (isinstance(fault, click.NoSuchOption) and fault.ctx is not None):
        return ""
    key = fault.option_name.strip("-").replace("-", "_")
    names = [name for name in config.flatten(Config()) if name.partition(".")[2] == key]
    takes_settings = any(option.name == "assignments" for option in fault.ctx.command.params)
    return f" Give this setting as --set {names[0]}=VALUE." if names and takes_settings else ""


def _fail(message: str, code: int) -> int:
    _say(f"error: {message}")
    return code


def _say(line: str) -> None:
    if distributed.is_first():  # the others would report the same
        click.echo(line, err=True)


def _conclude(line: str) -> None:
    """Prints how training has ended; that nobody can read it is no fault of what was trained."""
    click.echo(line, file=cast(TextIO, Lenient(sys.stdout)))


@click.group(context_settings=_SETTINGS)
@click.version_option(rnnorm.__version__)
def cli() -> None:
    """Train, evaluate and sample recurrent language models with normalization inside the recurrence."""


class _WithKeys(click.Command):
    """A command whose help ends with every key of --set."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\nEvery key of --set, by section, with its default and meaning:\n\n")
        for line in config.describe():
            formatter.write(f"  {line}".rstrip() + "\n")


@cli.command(cls=_WithKeys)
@click.option("--preset", help="Preset by name, or a TOML file; `rnnlm config --list` lists them.  [default: default]")
@click.option(
    "--data",
    help="Text: a file (-: the standard input), a folder of splits, a pattern of files, hf:NAME, or a corpus by name "
    "(`rnnlm data list`).",
)
@click.option("--run", "--folder", "folder", type=files.path, help="Run folder.  [default: runs/PRESET-DATA]")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    help="Resume the folder's run, or require an empty folder.",
)
@click.option(
    "--init-from",
    metavar="RUN",
    type=files.path,
    help="Begin with this run's best weights and tokenizer, and with its settings unless --preset is given.",
)
@click.option("--overwrite", is_flag=True, help="Move a folder that holds a run aside, and start a new run.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one setting, such as train.lr=0.5; repeatable.",
)
@_backend
@_device
@click.option("--seed", type=int, help="Random seed.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, its size and speed, and write no run.")
def train(
    preset: str | None,
    data: str | None,
    folder: Path | None,
    resume: str,
    init_from: Path | None,
    overwrite: bool,
    assignments: tuple[str, ...],
    dry_run: bool,
    **options: Any,
) -> int:
    """Train a model, or resume a run that was stopped.

    A run folder that already holds a run is resumed with its own settings, so `rnnlm train --run FOLDER` is
    enough. Ctrl-C finishes the step, saves, and stops; so do SIGTERM, SIGHUP and SIGUSR1.
    """
    given = {f"train.{name}": value for name, value in options.items() if value is not None}
    if init_from is not None:
        given["train.init_from"] = str(init_from.resolve())
    with _input(data, folder or Path("runs") / f"{_stem(preset)}-input", dry_run) as (kept, lock):
        if kept is not None:
            data, folder = str(kept), kept.parent
        settings = compose(preset, data, folder, assignments, given, begins=overwrite)
        for warning in config.without_effect(settings, config.assigned(assignments)):
            _say(warning)
        folder = folder or Path("runs") / f"{_stem(preset)}-{_name(settings.data.source)}"
        if dry_run:
            run.rehearse(settings, None if overwrite else folder, say=click.echo)
            return 0
        outcome = run.train(settings, folder, resume=resume, overwrite=overwrite, lock=lock, say=_say)
    if outcome.reason not in ENDS:
        again = shlex.join(["rnnlm", "train", "--run", f"{folder}"])
        _say(f"stopped by {outcome.reason} after step {outcome.step}; saved; resume with: {again}")
        return _STOPPED.get(outcome.reason, 1)
    if outcome.score is None:
        return 0  # a process that is not the first
    _conclude(f"{folder}: {outcome.step:,} steps, {outcome.speed}")
    _conclude(f"valid {headline(outcome.score)} (exact, best checkpoint)")
    _conclude(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}")
    return 0


def _stem(preset: str | None) -> str:
    return Path(preset or "default").stem


def _name(source: str) -> str:
    """What a folder of a source may be called: the last part of a path, without what a shell would read."""
    return re.sub(r"[^\w.-]+", "-", Path(source).name).strip("-") or "text"


@contextmanager
def _input(data: str | None, folder: Path, dry_run: bool) -> Iterator[tuple[Path | None, Lock | None]]:
    """Inside, with `--data -`: the file that keeps the standard input in a new run's folder, and the folder's lock; it
    goes again where no run begins."""
    if data != "-":
        yield None, None
        return
    if dry_run:
        with tempfile.TemporaryDirectory() as made:
            files.write_chunks(kept := Path(made) / TEXT, _standard_input())
            yield kept, None
        return
    if (folder / "config.toml").exists():
        raise UserError(
            f"a text from the standard input must be for a new run; got {folder}, which holds a run and its text; "
            "leave out --data to resume it, or choose another folder with --run"
        )
    if not distributed.is_first():
        yield folder / TEXT, None
        return
    with RunFolder(folder).with_text(_standard_input()) as lock:
        yield folder / TEXT, lock


def _standard_input() -> Iterator[bytes]:
    """Yields the standard input, block by block as it is needed.

    Raises:
        UserError: it is empty.
    """
    size = 0
    while block := sys.stdin.buffer.read(2**20):
        size += len(block)
        yield block
    if not size:
        raise UserError("a text must hold something; got the standard input, which is empty; pipe a text in")


def compose(
    preset: str | None,
    data: str | None,
    folder: Path | None,
    assignments: Sequence[str],
    given: dict[str, Any],
    begins: bool = False,
) -> Config:
    """Returns the settings: of the preset, else of the run that the folder holds, else of the run to begin with, else
    the default ones; changed by the options, and by the assignments last. Those of a tokenizer that is there already
    are the tokenizer's. A run that `begins` in the folder of another looks at the run to begin with first."""
    runs = [folder, Path(given["train.init_from"]) if "train.init_from" in given else None]
    runs = runs[::-1] if begins else runs
    held = next((path for place in runs if place is not None and (path := place / "config.toml").is_file()), None)
    if preset is None and held is not None:
        tables = config.read_toml(held, "a run's configuration")
        if not {"data", "model", "train"} <= tables.keys():
            raise UserError(
                f"a run's configuration must have the tables [data], [model] and [train]; got {held}, which has "
                f"{', '.join(tables) or 'none'}; restore it, or choose another folder with --run"
            )
        if held.parent != folder:  # where that run was says nothing of where this one is
            config.put(tables, "train", "device", "auto")
    else:
        tables = config.preset(preset or "default")
    tables = config.override(tables, [])
    chosen = set() if held is not None and preset is None else config.unusual(tables, "data")
    for name, value in given.items():
        section, key = name.split(".")
        config.put(tables, section, key, value)
    if data is not None:
        config.put(tables, "data", "source", data)
        if data in corpora.CORPORA and (kind := corpora.CORPORA[data].tokenizer) != "word":
            config.put(tables, "data", "tokenizer", kind)
            chosen.discard("data.tokenizer")
    chosen |= config.assigned(assignments)
    settings = config.build(config.override(tables, assignments))
    placed = settings.data
    if held is not None and preset is None and data is None and "data.source" not in chosen:
        placed = RunFolder(held.parent).moved(placed)
    settings = settings.model_copy(update={"data": config.absolute(placed)})
    return _with_tokenizer(settings, folder, chosen)


def _with_tokenizer(settings: Config, folder: Path | None, chosen: Collection[str]) -> Config:
    """The settings with those of the tokenizer that the run takes from another run or from a file; those of a run that
    the folder holds, which may outlive both, where it took the same."""
    start, file = settings.train.init_from, settings.data.tokenizer_file
    if start is None and file is None:
        return settings
    for place in (folder, None if start is None else Path(start)):
        if place is None or not (path := place / "config.toml").is_file():
            continue
        theirs = config.build(config.read_toml(path, "a run's configuration"))
        same = theirs.train.init_from == start and (start is not None or theirs.data.tokenizer_file == file)
        if same or place is not folder:
            return config.with_tokenizer_of_run(settings, theirs.data, place, chosen)
    # a run to begin with that is not there is refused where its weights are looked for
    return settings if file is None or start is not None else config.with_tokenizer_of_file(settings, file, chosen)


@cli.command("eval")
@_run_argument
@click.option(
    "--split",
    "splits",
    type=click.Choice(corpora.SPLITS),
    multiple=True,
    default=["valid"],
    help="Split to evaluate; repeatable.",
)
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(["exact", "chunk-mean"]),
    multiple=True,
    help="Evaluation protocol; repeatable.  [default: the run's]",
)
@click.option("--data", help="Corpus to evaluate on, by name or folder.  [default: the run's]")
@click.option("--encoding", help="Encoding of the text files of --data.  [default: the run's]")
@click.option("--column", help="Column of a table of --data that holds the text.  [default: the run's]")
@click.option("--temperature", type=float, help="Divides the logits.  [default: 1]")
@click.option("--dynamic", is_flag=True, help="Dynamic evaluation: the weights move after each segment is scored.")
@click.option("--cache", is_flag=True, help="Neural cache over the last tokens.")
@click.option(
    "--tune", is_flag=True, help="First choose the temperature and the constants of --dynamic and --cache on valid."
)
@click.option(
    "--tune-tokens", type=click.IntRange(2), default=20000, show_default=True, help="Tokens of valid to tune on."
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one setting of evaluation, such as eval.cache_window=1000; repeatable.",
)
@click.option("--by-frequency", is_flag=True, help="Also show bands by how often the training text holds a word.")
@click.option("--by-position", is_flag=True, help="Also show bands by position in the line.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON.")
@_which
@_backend
@_device
def evaluate(
    folder: Path,
    splits: tuple[Split, ...],
    protocols: tuple[ProtocolName, ...],
    data: str | None,
    encoding: str | None,
    column: str | None,
    by_frequency: bool,
    by_position: bool,
    as_json: bool,
    which: Which,
    backend: str | None,
    device: str | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure the perplexity of a run's model.

    Repeat --split and --protocol to score every combination. With --temperature, --dynamic, --cache or --tune the
    model adapts to what it has scored; the protocol says how, and such numbers compare only with their own kind.
    """
    once = functools.cache(_say)  # a warning of a text is the same for each protocol
    trained = load(folder, which=which, backend=backend or "auto", device=device or "auto", say=once)
    trained = replace(trained, config=_of_evaluation(trained.config, assignments))
    _warn_of_unused(assignments, options)
    reading = _reading(trained.config.data, data, encoding, column, once)
    groups = by_frequency or by_position
    methods = protocols or (trained.config.eval.protocol,)
    means, rms = None, None
    if _adapts(options):
        if {*protocols} - {"exact"}:
            raise UserError(
                f"a model that adapts must be scored by the protocol exact; got {', '.join(protocols)}; leave it out"
            )
        methods = ("exact",)
        means, rms = _adapting(trained, **options)
    if groups and "exact" not in methods:
        raise UserError(f"bands must be of the protocol exact; got {', '.join(methods)}; add --protocol exact")
    scores = []
    for split, protocol in itertools.product(splits, methods):
        if means is None:
            score = trained.score_split(split, protocol=protocol, data=data, reading=reading, groups=groups)
        else:
            score = trained.score_adapted(split, means, rms=rms, data=data, reading=reading, groups=groups)
        _require_number(split, score)
        frequency, position = by_frequency and score.by_frequency, by_position and score.by_position
        scores.append((split, replace(score, by_frequency=frequency or None, by_position=position or None)))
    if data is None and which == "best":
        try:
            RunFolder(folder).keep_scores(trained.step, [(split, record(score)) for split, score in scores])
        except OSError as fault:
            _say(f"warning: the scores are not kept for a report: {fault}")
    if as_json:
        records = [{"split": split, **record(score)} for split, score in scores]
        click.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2))
    else:
        click.echo("\n".join(shown(split, score) for split, score in scores))


def _reading(own: DataConfig, data: str | None, encoding: str | None, column: str | None, say: Say) -> Reading:
    """How the text to evaluate on is read: as the run's own where nothing else is named."""
    if data is None and (encoding is not None or column is not None):
        raise UserError(
            "--encoding and --column must be of another text; got them without --data; leave them out, or give --data"
        )
    is_file = data is not None and Path(data).exists() and data not in corpora.CORPORA and not data.endswith(".parquet")
    if is_file and encoding is None and codecs.lookup(own.encoding).name != "utf-8":
        say(f"{data} is read in the encoding of the run's own text, {own.encoding}; name another by --encoding")
    given = {name: value for name, value in (("encoding", encoding), ("column", column)) if value is not None}
    return replace(own.reading, **given)


def _adapts(options: Mapping[str, Any]) -> bool:
    return options["temperature"] is not None or any(options[name] for name in ("dynamic", "cache", "tune"))


def _warn_of_unused(assignments: Sequence[str], options: Mapping[str, Any]) -> None:
    for name in sorted(config.assigned(assignments)):
        option = name.removeprefix("eval.").partition("_")[0]
        if option in ("dynamic", "cache") and not options[option]:
            _say(f"warning: {name} has no effect without --{option}")
        if name == "eval.protocol" and _adapts(options):
            _say(f"warning: {name} has no effect where the model adapts: it is scored by the protocol exact")
    given = click.get_current_context().get_parameter_source("tune_tokens")
    if given is ParameterSource.COMMANDLINE and not options["tune"]:
        _say("warning: --tune-tokens has no effect without --tune")


def _require_number(split: str, score: Score) -> None:
    """Refuses a perplexity that is no number, and an infinite one where the model adapts: it is no result then."""
    if math.isnan(score.ppl) or (math.isinf(score.ppl) and score.protocol not in PROTOCOLS):
        raise UserError(
            f"the perplexity of {split} must be a number; got {score.ppl} by {score.protocol}; take other "
            "constants, or another checkpoint"
        )


def _of_evaluation(settings: Config, assignments: Sequence[str]) -> Config:
    """The settings with assignments of the section eval."""
    if other := [given for given in assignments if not given.startswith("eval.")]:
        raise UserError(f"eval --set must be of the section eval; got {other[0]}; the others belong to training")
    return config.build(config.override(settings.model_dump(), assignments))


def _adapting(
    trained: TrainedModel, temperature: float | None, dynamic: bool, cache: bool, tune: bool, tune_tokens: int
) -> tuple[Adaptation, list[Tensor] | None]:
    """What to evaluate with, tuned where asked to, and the gradients' statistics that it needs."""
    means = of_settings(
        trained.config.eval, temperature=1.0 if temperature is None else temperature, dynamic=dynamic, cache=cache
    )
    rms = None
    if means.dynamic is not None:
        _say("reading the training text for the gradients' statistics")
        rms = trained.gradient_rms(means.dynamic.segment)
    if tune:
        means = trained.tune(means, rms=rms, tokens=tune_tokens, temperature=temperature is None, say=_say)
        _say(f"tuned on valid; the same again: {' '.join(given(means))}")
    return means, rms


def shown(split: str, score: Score) -> str:
    """Returns a score as lines for a person."""
    lines = [f"{split} {headline(score)} ({score.protocol}, {score.tokens:,} tokens)"]
    lines.append(f"  {'unit':18} {_UNITS[score.unit]}")
    counts = {"words": score.words, "ends of lines": score.eos, "<unk>": score.unk}
    lines += [f"  {name:18} {number:12,}" for name, number in counts.items() if number is not None]
    if score.unk is not None and score.eos is not None:
        lines[-1] += f"  {score.unk / max(1, score.tokens - score.eos):.2%}"
    of_one = {"unigram model": score.unigram_ppl}
    of_one |= {"without <eos>": score.ppl_without_eos, "without <unk>": score.ppl_without_unk}
    if score.unit in ("character", "byte"):  # in bits, as the headline
        of_one = {name: ppl and math.log2(ppl) for name, ppl in of_one.items()}
    rows = {
        **of_one,
        "per token": score.ppl_per_token if score.ppl_per_token != score.ppl else None,
        "per word": score.ppl_per_word if score.unit == "token" else None,
        "bits per word": score.bits_per_word if score.unit in ("word", "token") else None,
        "bits per character": score.bits_per_character,
        "bits per byte": score.bits_per_byte,
    }
    lines += [f"  {name:18} {value:12,.3f}" for name, value in rows.items() if value is not None]
    for groups in (score.by_frequency, score.by_position):
        lines += bands(groups, score.nll) if groups else []
    return "\n".join(lines)


_UNITS = {
    "word": "words and ends of lines",
    "token": "tokens of the tokenizer, ends of lines among them",
    "character": "characters, line feeds among them",
    "byte": "bytes",
}


def bands(groups: Sequence[Group], nll: float) -> list[str]:
    """Returns a table of the bands of a score of so many nats."""
    rows = [f"  {group.name:20} {group.tokens:10,} {group.nll / nll:7.1%} {group.ppl:14,.2f}" for group in groups]
    return ["", f"  {'tokens':20} {'number':>10} {'nats':>7} {'perplexity':>14}", *rows]


@cli.command("study")
@click.argument("file", metavar="STUDY.toml", type=files.path)
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds per arm: 1, 2 …  [default: the study's]")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Number of runs at the same time.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads per run.")
@click.option("--run", "folder", type=files.path, help="Folder of the study.  [default: runs/STUDY]")
@click.option("--data", help="Corpus by name or folder, for every arm.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set one setting for every arm; repeatable."
)
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="Run only this arm; repeatable.  [default: all]")
@click.option("--seed", "only", multiple=True, type=int, help="Run only this seed; repeatable.  [default: all]")
@click.option(
    "--device", "devices", multiple=True, help="Device for one run at a time; repeatable.  [default: train.device]"
)
def run_study(
    file: Path,
    seeds: int | None,
    folder: Path | None,
    data: str | None,
    assignments: tuple[str, ...],
    only: tuple[int, ...],
    **options: Any,
) -> int:
    """Train every arm of a study with every seed, and compare them.

    Each run is an ordinary run folder under the study's; the test text is scored once, at the checkpoint
    that is best on valid. The same command resumes a study that was stopped or killed, or adds seeds.
    A run that diverged is a result, the worst one.
    """
    plan = study.read(file, seeds=seeds, data=data, assignments=assignments)
    folder = folder or Path("runs") / plan.name
    summary, stopped = study.run(plan, folder, seeds=only, say=_say, **options)
    if summary["runs"]:
        _conclude(study.table(summary))
    _conclude(f"{folder}: {summary['runs']} of {summary['runs_planned']} runs; runs.csv, arms.csv, summary.json")
    if stopped is None:
        return 0
    _say(f"stopped by {stopped}; every run is saved; resume with the same command")
    return _STOPPED.get(stopped, 1)


@cli.command("report")
@click.argument("folders", metavar="RUN_OR_STUDY…", type=files.path, nargs=-1, required=True)
@click.option("--out", type=files.path, help="Folder to write to.  [default: report/ in the first one]")
def write_report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Show runs and studies as one page, with its figures as PNG and SVG beside it.

    The page is one file that needs no other and no network: curves, final perplexities, statistics, gates,
    speed, tables, commands, versions and checksums.
    """
    page = report.write(report.load(folders, _say), out or folders[0] / "report")
    click.echo(f"{page}: open it in a browser; figures and tables lie beside it")


@cli.command()
@_run_argument
@click.argument("file", default="-")
@click.option("--stream", "one_stream", is_flag=True, help="Carry the state from line to line, as `eval` does.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each line instead.")
@cli_data.encoding_option
@_which
@_backend
@_device
def score(
    folder: Path,
    file: str,
    one_stream: bool,
    as_json: bool,
    encoding: str,
    which: Which,
    backend: str | None,
    device: str | None,
) -> None:
    """Print the log-probability of every token of a text.

    FILE is a file of text, - is the standard input. One row for each token with its log-probability (nats) and
    surprisal (bits), a row for each line with its total and perplexity per token, and one for all. Each line is scored
    by itself, from the zero state, unless --stream is given.
    """
    trained = load(folder, which=which, backend=backend or "auto", device=device or "auto", say=_say)
    content, name = (sys.stdin.buffer.read(), "the standard input") if file == "-" else (Path(file), file)
    text = corpora.files.given(content, name, encoding)
    if not text.size:
        raise UserError(f"a text to score must hold something; got {name}, which is empty; put at least one line there")
    ways = Ways(encoding="--encoding ", kind="", packed=False)
    for warning in corpora.checks.require({"scored": text}, trained.tokenizer.kind, ways):
        _say(f"warning: {warning}")
    found = scoring.lines(trained, text, one_stream=one_stream)
    for row in scoring.json_lines(found) if as_json else scoring.tsv(found):
        click.echo(row)


@cli.command("next")
@_run_argument
@click.argument("prompt", default="")
@click.option("--count", type=int, default=10, help="Number of tokens.")
@_which
@_backend
@_device
def next_words(folder: Path, prompt: str, count: int, which: Which, backend: str | None, device: str | None) -> None:
    """Print the most probable next words after a prompt, with their probabilities."""
    trained = load(folder, which=which, backend=backend or "auto", device=device or "auto", say=_say)
    found = trained.next_words(prompt, count)
    _warn_of_unknown(trained, prompt)
    for token in found:
        text = token.text if token.text.isprintable() and token.text.strip() else repr(token.text)
        click.echo(f"{token.prob:8.4f}  {text}")


def _warn_of_unknown(trained: TrainedModel, prompt: str) -> None:
    if unknown := trained.tokenizer.unknown(prompt):
        shown = ", ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        _say(f"warning: not in the vocabulary, and so read as <unk>: {shown}")


@cli.command()
@_run_argument
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--length", type=int, default=100, help=f"Number of tokens to draw, at most {LONGEST:,}.")
@click.option("--temperature", type=float, default=1.0, help="Divides the logits; 0 takes the most probable token.")
@click.option("--top-k", type=int, help="Draw among this many most probable tokens.")
@click.option("--top-p", type=float, help="Draw among the fewest most probable tokens that hold this probability.")
@click.option("--no-unk", is_flag=True, help="Never draw <unk>.")
@click.option("--stream", "as_drawn", is_flag=True, help="Print the text while it is drawn.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Random seed.")
@_which
@_backend
@_device
def sample(folder: Path, which: Which, backend: str | None, device: str | None, as_drawn: bool, **options: Any) -> None:
    """Print text drawn from a run's model."""
    trained = load(folder, which=which, backend=backend or "auto", device=device or "auto", say=_say)
    texts = trained.stream(**options) if as_drawn else iter([trained.sample(**options)])
    _warn_of_unknown(trained, options["prompt"])
    for text in texts:
        click.echo(text, nl=False)
    click.echo()


@cli.command("export")
@_run_argument
@click.argument("file", type=files.path)
@click.option(
    "--to",
    type=click.Choice(["torchscript", "torch-export", "onnx", "safetensors", "embeddings"]),
    required=True,
    help="Format of the file.",
)
@_which
def export_model(folder: Path, file: Path, to: str, which: Which) -> None:
    """Write a run's model to a file that other programs use without this one.

    \b
    torchscript, torch-export and onnx hold one function, in evaluation mode:
      (tokens [T, B] int64, h [L, B, H], and for an LSTM c [L, B, H]) -> (log-probabilities [T, B, V], h, c)
    T and B are free; where layers differ in size, each has its h and c. The file is run in a fresh process and
    compared before it gets its name.

    safetensors holds the weights under the model's names, with settings and tokenizer as metadata; embeddings is
    the text format of word2vec, a line for each token of the vocabulary.
    """
    from lm.export import FORMATS, export

    worst = export(load(folder, which=which, device="cpu"), to, file)
    found = "not checked: onnxruntime is not installed" if worst is None else f"largest difference {worst:.2g}"
    click.echo(f"{file}: {to}, {file.stat().st_size:,} bytes" + (f"; {found}" if to in FORMATS else ""))


@cli.command("config")
@click.option("--preset", default="default", help="Preset by name, or a TOML file.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one setting, such as train.lr=0.5; repeatable.",
)
@click.option("--list", "listing", is_flag=True, help="List the presets instead.")
def show_config(preset: str, assignments: tuple[str, ...], listing: bool) -> None:
    """Print settings as TOML with a description of each key; the output is a preset that --preset takes."""
    if listing:
        click.echo("\n".join(f"{name:24} {text}" for name, text in config.presets().items()))
    else:
        click.echo(config.to_toml(config.build(config.override(config.preset(preset), assignments))), nl=False)


@cli.group("checkpoint")
def checkpoint_group() -> None:
    """Look into checkpoints."""


@checkpoint_group.command("show")
@click.argument("file", type=files.path)
def show_checkpoint(file: Path) -> None:
    """Print what a checkpoint holds: state of the run, settings, tensors, and whether its checksum is good."""
    for line in checkpoint.describe(file):
        click.echo(line)


cli.add_command(cli_data.data)
cli.add_command(cli_data.tokenizer_group)
