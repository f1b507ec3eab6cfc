"""A run folder from settings to scores: what `train`, `eval` and `sample` do, without the command line.

config.toml  tokenizer.json  metrics.jsonl  tensorboard/  checkpoints/{last,previous,best}.safetensors
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rnnorm
from lm import checkpoint, config, corpora, distributed, files, stream, tokenizers
from lm.checkpoint import Checkpoints
from lm.config import Config, TrainConfig
from lm.distributed import Team
from lm.errors import UserError
from lm.evaluator import Score, evaluate
from lm.events import Scored
from lm.internals import Internals
from lm.lock import NAME as LOCK
from lm.lock import Lock
from lm.model import LanguageModel
from lm.progress import Progress as Display
from lm.stream import Stream
from lm.tokenizers import Tokenizer
from lm.tracking import JsonLines, TensorBoard
from lm.trainer import DivergedError, Progress, Trainer

Say = Callable[[str], None]

# What a run may be continued with another value of: nothing that its past steps depended on.
_MAY_CHANGE = {
    *("data.source", "data.dir"),  # the text itself is known by its checksum
    *("train.epochs", "train.max_steps", "train.patience", "train.backend", "train.device", "train.log_every"),
    *("checkpoint.every_steps", "checkpoint.every_minutes", "eval.protocol", "eval.chunk"),
}
_WAYS = "choose another with --run, or give --overwrite, which moves the folder aside"
# How a run ends for good, rather than being stopped.
ENDS = ("epochs", "max_steps", "patience")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: why, after how many steps, its exact score on valid, and its speed as text."""

    reason: str
    step: int
    score: Score | None
    speed: str


@dataclass(frozen=True)
class Trained:
    """A model out of a run folder, ready to be evaluated or sampled from."""

    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    train_counts: Tensor
    data_sha256: Mapping[str, str]
    step: int


@dataclass(frozen=True)
class _Text:
    """The training text and all that follows from it, but the text."""

    name: str
    tokenizer: Tokenizer
    train: Stream
    valid: Stream
    counts: Tensor
    sha256: dict[str, str]

    @property
    def pieces_per_word(self) -> float:
        return len(self.train.ids) / (self.train.words + self.train.eos)


def train(
    settings: Config, folder: Path, *, resume: str = "auto", overwrite: bool = False, say: Say = print
) -> Outcome:
    """Trains in a run folder, from its last checkpoint where it has one.

    Arguments:
        resume: `auto` goes on where the folder's run stopped; `never` only starts in an empty folder.
        overwrite: move a folder that holds another run out of the way, to a name beside it.
        say: receives lines for a person.

    Raises:
        UserError: settings that cannot work here; a folder that holds another run; a damaged checkpoint; a
            text that changed. Nothing is written then.
        DivergedError: see `Trainer.fit`; the last good checkpoint stays.
    """
    if overwrite:
        folder = Path(os.path.realpath(folder))  # of a link, what it leads to is moved, and the link stays
    with distributed.joined() as team, Lock() as lock:

        def opened() -> tuple[Config, Path | None, dict[str, Any] | None, _Text]:
            _require(settings.train, team)
            aside = _claim(folder, resume, overwrite, lock)
            saved = None if aside else _last(folder, say)
            if not aside:
                _same_run(folder, settings, saved)
            return settings, aside, saved, _text(settings, saved)

        # the settings too: those of a run that goes on are in its folder, which other machines need not see
        settings, aside, saved, text = team.of_first(opened)
        require_backend(settings.train.backend)  # on each process: the first step waits for no one's compiler
        device = require_device(team.place(settings.train.device))
        model = _model(settings, text.tokenizer, device)
        trainer = _trainer(model, settings, text, team)
        if saved is not None:
            _resume(trainer, settings, saved, folder)
        team.of_first(lambda: _occupy(folder, settings, text.tokenizer, lock, aside))
        if not team.first:
            return _follow(trainer)
        if aside:
            say(f"{folder}: what was there is now in {aside}")
        _describe(say, settings, text, model)
        where = f"goes on after step {saved['progress']['step']}" if saved else "a new run"
        say(f"run folder {folder}: {where}" + (f", {team.size} processes" if team.size > 1 else ""))
        return _fit(trainer, settings, folder, text)


def _require(options: TrainConfig, team: Team) -> None:
    require_backend(options.backend)
    require_device(team.place(options.device))
    if options.batch_size < team.size * options.accumulate:
        raise UserError(
            f"train.batch_size must have a column for each of train.accumulate parts in each process; "
            f"{options.batch_size} came for {options.accumulate} parts in {team.size}; raise it, or lower the others"
        )


def load(folder: Path, *, which: str = "best", backend: str = "auto", device: str = "cpu", say: Say = print) -> Trained:
    """Returns the model of a run folder.

    Arguments:
        which: the checkpoint, `best` (on the validation text) or `last`. Of the last the averages are taken once a
            whole epoch is done, with the running statistics of the last validation.
        say: receives a warning where `last` is damaged and the one before it is taken.

    Raises:
        UserError: no such run; a damaged checkpoint, or one of another vocabulary or model.
    """
    require_backend(backend)
    place = require_device(device)
    if not (folder / "config.toml").is_file():
        raise UserError(f"a run must be a folder that `train` made; {folder} is not; check the path")
    saved = _saved(folder / "checkpoints", which, say)
    settings = config.build(saved["config"])
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"backend": backend})})
    tokenizer = tokenizers.from_state(saved["tokenizer"])
    _same_vocabulary(folder, tokenizer)
    model = _model(settings, tokenizer, place)
    with _fitting(folder, "progress and counts"):
        progress = Progress(**saved["progress"])
        counts = saved["train_counts"]
        if len(counts) != tokenizer.size or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError(f"the counts of the training text must be {tokenizer.size} whole numbers")
    averages = saved.get("averages") if progress.epoch else None
    _restore(model, averages or saved, folder)
    return Trained(settings, tokenizer, model, torch.tensor(counts), saved["data_sha256"], progress.step)


def _saved(place: Path, which: str, say: Say) -> dict[str, Any]:
    if which == "last" and (saved := checkpoint.load_last(place, say)):
        return saved
    try:
        return checkpoint.load(place / f"{which}.safetensors")
    except checkpoint.DamagedCheckpointError as fault:
        if which == "best" and checkpoint.is_whole(place / checkpoint.LAST):
            raise UserError(f"{fault}; the last one is whole: give --checkpoint last") from None
        raise


def score(
    trained: Trained,
    split: str,
    *,
    protocol: str | None = None,
    chunk: int | None = None,
    data: str | None = None,
    groups: bool = False,
) -> Score:
    """Returns the score of a run's model on a split of its own corpus, or of another with the same tokenizer.

    Arguments:
        groups: by frequency and by position too, where the protocol is `exact`.
    """
    settings = trained.config
    corpus = corpora.load(settings.data.source if data is None else data, Path(settings.data.dir))
    return evaluate(
        trained.model,
        stream.encode(corpus.splits[split], trained.tokenizer),
        trained.tokenizer,
        protocol=protocol or settings.eval.protocol,
        chunk=chunk or settings.eval.chunk,
        train_counts=trained.train_counts,
        data_sha256=corpus.sha256(split),
        groups=groups,
    )


def require_backend(name: str) -> None:
    """Raises UserError unless the recurrence can run by this name here."""
    known = rnnorm.backends()
    if name != "auto" and name not in known:
        raise UserError(f"a backend must be one of auto, {', '.join(known)}; {name!r} came; choose one of these")
    if name != "auto" and known[name] is not None:
        raise UserError(f"backend {name} must be able to run here; {known[name]}; choose another, or auto")


def require_device(name: str) -> torch.device:
    """Returns the device of this name, or raises UserError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as fault:  # ImportError: hpu
        why = str(fault).strip().splitlines()[0]
        raise UserError(f"a device must be one that torch can use here; {name!r} came ({why}); use cpu") from None
    return device


def _claim(folder: Path, resume: str, overwrite: bool, lock: Lock) -> Path | None:
    """Refuses a folder that is not for a run, and locks one that holds a run; returns where to move it aside to, if
    that was asked for."""
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}):
        return None
    if not (folder / "config.toml").is_file():
        raise UserError(f"a run folder must be empty or a run's own; {folder} is neither; choose another with --run")
    if overwrite and Path.cwd().is_relative_to(folder):
        raise UserError(
            f"a run that is moved aside must not hold the working folder; {folder} does; change to another folder first"
        )
    lock.take(folder)
    if overwrite:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
            number += 1
        return aside
    if resume == "never":
        raise UserError(f"a run that never resumes needs an empty folder; {folder} holds a run; {_WAYS}")
    return None


def _occupy(folder: Path, settings: Config, tokenizer: Tokenizer, lock: Lock, aside: Path | None) -> None:
    """Makes the folder this run's, and removes what a process that was killed while it wrote has left there."""
    if aside:
        folder.rename(aside)
    if not lock.holds(folder):
        lock.take(folder)
        if (folder / "config.toml").exists():
            raise UserError(f"a new run needs a folder of its own; another began in {folder} just now; {_WAYS}")
    for place in (folder, folder / "checkpoints"):
        for name in ("config.toml", "tokenizer.json", "metrics.jsonl", checkpoint.LAST, checkpoint.BEST):
            files.remove_leftovers(place / name)
    files.write_whole(folder / "config.toml", config.to_toml(settings).encode())
    tokenizers.save(tokenizer, folder / "tokenizer.json")


def _same_run(folder: Path, settings: Config, saved: Mapping[str, Any] | None) -> None:
    """Refuses a folder whose run has other settings."""
    if not (folder / "config.toml").is_file():
        return
    # the checkpoint's configuration where there is one, since the file may have been edited
    held = config.build(saved["config"] if saved else config.read_toml(folder / "config.toml", "a run's configuration"))
    names = {
        name
        for name, value in config.flatten(held).items()
        if value != config.flatten(settings)[name] and not _may_change(name, settings)
    }
    if names:
        ours, theirs = config.flatten(settings), config.flatten(held)
        told = "; ".join(f"{name} is {theirs[name]} there and {ours[name]} here" for name in sorted(names))
        raise UserError(f"a run goes on with its own configuration; {folder} holds another: {told}; {_WAYS}")


def _may_change(name: str, settings: Config) -> bool:
    if name == "train.average_patience":
        return settings.train.optimizer != "asgd"  # the others do not look at it
    ends = name in ("train.epochs", "train.max_steps")
    return name in _MAY_CHANGE and not (ends and settings.train.schedule == "cosine")


def _last(folder: Path, say: Say) -> dict[str, Any] | None:
    place = folder / "checkpoints"
    saved = checkpoint.load_last(place, say)
    if saved is not None:
        _same_vocabulary(folder, tokenizers.from_state(saved["tokenizer"]))
    elif (place / checkpoint.BEST).exists():
        raise UserError(
            f"a run must have {place / checkpoint.LAST} to resume from; got {checkpoint.BEST} alone; choose another "
            "folder with --run"
        )
    return saved


def _same_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    path = folder / "tokenizer.json"
    if path.exists() and tokenizers.load(path).sha256 != tokenizer.sha256:
        raise UserError(
            f"a checkpoint must be of its folder's vocabulary; the one in {folder} has another than {path.name}; "
            "put each checkpoint back into its own run folder"
        )


def _text(settings: Config, saved: Mapping[str, Any] | None) -> _Text:
    """The corpus and its tokenizer: a saved run's own, or one trained on the training text."""
    data = settings.data
    corpus = corpora.load(data.source, Path(data.dir))
    sha256 = {split: corpus.sha256(split) for split in ("train", "valid")}
    if saved is not None:
        for split, value in sha256.items():
            if saved["data_sha256"].get(split) != value:
                raise UserError(
                    f"a run goes on with the text it began with; the {split} text of {data.source} is another; "
                    "restore it, or begin another run with --run"
                )
        tokenizer = tokenizers.from_state(saved["tokenizer"])
    elif data.tokenizer_file is not None:
        tokenizer = tokenizers.load(Path(data.tokenizer_file))
    else:
        tokenizer = tokenizers.train(data.tokenizer, corpus.splits["train"], data.vocab_size)
    ids, valid = (stream.encode(corpus.splits[split], tokenizer) for split in ("train", "valid"))
    if len(valid.ids) < 2:
        raise UserError(
            f"the valid text of {data.source} must hold at least 2 tokens, its ends of lines counted; 1 came; "
            "give more text"
        )
    counts = torch.bincount(torch.from_numpy(ids.ids), minlength=tokenizer.size)
    return _Text(corpus.name, tokenizer, ids, valid, counts, sha256)


def _model(settings: Config, tokenizer: Tokenizer, device: torch.device) -> LanguageModel:
    _require_memory(settings, tokenizer)
    torch.manual_seed(settings.train.seed)
    return LanguageModel(settings.model, tokenizer.size, settings.train.backend).to(device)


def _require_memory(settings: Config, tokenizer: Tokenizer) -> None:
    """Refuses a model that cannot be held here, before any memory is taken: a checkpoint may ask for one too."""
    shape, gates = settings.model, {"lstm": 4, "gru": 3}
    width = shape.embedding_size or shape.hidden_size
    rows = gates.get(shape.cell, 1) * shape.hidden_size
    words = tokenizer.size * (width + (0 if shape.tied else shape.hidden_size))
    size = 4 * (words + rows * (width + shape.hidden_size * (2 * shape.num_layers - 1)))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > there:
        raise UserError(
            f"a model must fit into memory; its weights take {size / 2**30:,.0f} GiB of {there / 2**30:,.0f} GiB; "
            "lower model.hidden_size or model.num_layers"
        )


def _restore(model: LanguageModel, saved: Mapping[str, Any], folder: Path) -> None:
    with _fitting(folder, "model"):
        for name, value in model.state_dict().items():
            found = saved["model"].get(name, value)
            if not isinstance(found, Tensor):
                raise ValueError(f"{name} is {found!r:.50} and must be a tensor")
            if found.dtype != value.dtype:  # copying would convert it silently
                raise ValueError(f"{name} has dtype {found.dtype} and must have {value.dtype}")
        model.load_state_dict(saved["model"])


def _resume(trainer: Trainer, settings: Config, saved: Mapping[str, Any], folder: Path) -> None:
    _restore(trainer.model, saved, folder)
    shape = settings.model
    state = [(shape.num_layers, settings.train.batch_size, shape.hidden_size)] * (2 if shape.cell == "lstm" else 1)
    with _fitting(folder, "training state"):
        if [tuple(tensor.shape) for tensor in saved["state"] if tensor.is_floating_point()] not in ([], state):
            raise ValueError(f"the carried state must be of shapes {state}")
        trainer.load_state_dict(dict(saved))


@contextmanager
def _fitting(folder: Path, what: str) -> Iterator[None]:
    """Inside, whatever torch raises on values that do not fit is a fault of the checkpoint."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        why = " ".join(str(fault).split())[:200]
        raise UserError(
            f"a checkpoint must hold the {what} of its configuration; the one in {folder} does not ({why}); "
            "take another checkpoint"
        ) from None


def _trainer(model: LanguageModel, settings: Config, text: _Text, team: Team) -> Trainer:
    options = settings.train
    width = _valid_width(settings, text)

    def validate() -> Score:
        return evaluate(
            model,
            text.valid,
            text.tokenizer,
            protocol="columns",
            batch_size=width,
            chunk=settings.eval.chunk,
            train_counts=text.counts,
            data_sha256=text.sha256["valid"],
            team=team,
        )

    data = stream.columns(text.train.ids, options.batch_size, text.tokenizer.eos)
    return Trainer(model, options, data, validate, team=team)


def _valid_width(settings: Config, text: _Text) -> int:
    """Columns of the validation: fewer where the text is short."""
    return min(settings.train.valid_batch_size, max(1, len(text.valid.ids) // 2))


def _describe(say: Say, settings: Config, text: _Text, model: LanguageModel) -> None:
    shape, tokenizer = settings.model, text.tokenizer
    size = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"data {text.name}: {len(text.train.ids):,} tokens to train on, {len(text.valid.ids):,} to validate, "
        f"{tokenizer.kind} vocabulary of {tokenizer.size:,}"
    )
    say(
        f"model {shape.num_layers}x{shape.hidden_size} {shape.cell}, norm {shape.norm}, "
        f"{'tied' if shape.tied else 'untied'}, {size:,} parameters"
    )


def _follow(trainer: Trainer) -> Outcome:
    """What a process does that is not the first: trains and validates with it, and neither writes nor speaks."""
    with _signals(trainer):
        reason = trainer.fit()
    if reason in ENDS:
        _validate_rest(trainer)
    return Outcome(reason, trainer.progress.step, None, "")


def _fit(trainer: Trainer, settings: Config, folder: Path, text: _Text) -> Outcome:
    step, options = trainer.progress.step, settings.train
    shared = (step, options.log_every)
    columns = stream.columns(text.valid.ids, _valid_width(settings, text), text.tokenizer.eos)
    internals = Internals(trainer.model, columns.inputs)
    json_lines = JsonLines(folder / "metrics.jsonl", *shared, text.pieces_per_word, internals)
    tensorboard = TensorBoard(
        folder / "tensorboard",
        *shared,
        trainer.model,
        text.tokenizer,
        config.flatten(settings),
        text.pieces_per_word,
        internals,
    )
    progress = Display(text.pieces_per_word)
    saves = _checkpoints(trainer, settings, folder, text)
    trainer.listeners += [json_lines, tensorboard, progress, saves]
    try:
        with _signals(trainer):
            reason = trainer.fit()
        score = None
        if reason in ENDS:
            progress.close()
            score = _final(trainer, settings, folder, text, saves)
            event = Scored(trainer.progress.epoch, trainer.progress.step, "valid", score)
            json_lines(event)
            tensorboard(event)
        return Outcome(reason, trainer.progress.step, score, progress.speed)
    except (DivergedError, UserError) as fault:
        raise type(fault)(f"{fault}; {_kept(folder)}") from None
    finally:
        progress.close()
        tensorboard.close()


def _kept(folder: Path) -> str:
    """Names the last good checkpoint: one whose weights are numbers, which a run that diverged may not have saved."""
    for path in (folder / "checkpoints" / name for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)):
        try:
            saved = checkpoint.load(path)
        except UserError:
            continue
        if all(isinstance(value, Tensor) and value.isfinite().all() for value in saved["model"].values()):
            return f"the last good checkpoint is {path} (step {saved['progress']['step']})"
    return "no good checkpoint is left"


def _checkpoints(trainer: Trainer, settings: Config, folder: Path, text: _Text) -> Checkpoints:
    def weights() -> dict[str, Any]:
        return {
            "config": settings.model_dump(),
            "tokenizer": text.tokenizer.state(),
            "data_sha256": text.sha256,
            "train_counts": text.counts.tolist(),
            "model": trainer.model.state_dict(),
            "progress": trainer.state_dict()["progress"],
        }

    return Checkpoints(
        folder / "checkpoints",
        lambda: {**weights(), **trainer.state_dict()},
        weights,
        settings.checkpoint.every_steps,
        settings.checkpoint.every_minutes,
        _kept_nats(folder / "checkpoints" / checkpoint.BEST, trainer),
    )


def _kept_nats(best: Path, trainer: Trainer) -> float:
    """Nats per token of the best weights that are kept; infinity where there are none, or none that fit the model."""
    try:
        saved = checkpoint.load(best)
    except UserError:
        return math.inf
    nats = saved.get("nats")
    fits = {k: getattr(v, "shape", None) for k, v in saved["model"].items()} == {
        k: v.shape for k, v in trainer.model.state_dict().items()
    }
    return nats if fits and type(nats) is float and nats >= 0 else math.inf


def _final(trainer: Trainer, settings: Config, folder: Path, text: _Text, saves: Checkpoints) -> Score:
    """The exact score of the best weights on the validation text; they are then in the model."""
    _validate_rest(trainer, saves.save_best)
    best = saves.folder / checkpoint.BEST
    _restore(trainer.model, checkpoint.load(best), folder)
    return evaluate(
        trainer.model,
        text.valid,
        text.tokenizer,
        chunk=settings.eval.chunk,
        train_counts=text.counts,
        data_sha256=text.sha256["valid"],
    )


def _validate_rest(trainer: Trainer, keep: Callable[[float], None] = lambda nats: None) -> None:
    """The validation of an epoch that max_steps ended before its own; on all processes. What was scored is in the
    model while `keep` is called with its nats per token."""
    if not trainer.progress.position:
        return
    with trainer.averaged():
        now = trainer.validate()
        if not math.isfinite(now.nll):
            trainer.diverge("validation")
        keep(now.nll / now.tokens)


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the run after its present step; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        trainer.stop(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
