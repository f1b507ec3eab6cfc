"""Training in a run folder, from settings to the exact score of the best weights: what `train` does, without the
command line."""

import os
import resource
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rnnorm
from lm import checkpoint, config, corpora, distributed, files, provenance, store, stream, tokenizers
from lm.checkpoint import Checkpoints
from lm.config import Config, DataConfig, TrainConfig
from lm.corpora.checks import Ways
from lm.distributed import Team
from lm.errors import UserError
from lm.evaluator import Score, evaluate
from lm.events import Event, Scored, Stepped
from lm.internals import STEPS, Internals
from lm.lock import Lock
from lm.machine import require_backend, require_device, require_memory, resolve_device, resolve_precision
from lm.model import LanguageModel
from lm.progress import ProgressBar
from lm.run_folder import RunFolder, Say
from lm.stream import Stream
from lm.tokenizers import Tokenizer
from lm.tracking import JsonLines, TensorBoard
from lm.trainer import ENDS, DivergedError, Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended: why, after how many steps, its exact score on valid, and its speed as text."""

    reason: str
    step: int
    score: Score | None
    speed: str


_OTHER_TOKENS = (
    "lower data.min_count, raise data.vocab_size, or use --set data.tokenizer=bpe (or char; a text that puts no spaces "
    "between words needs one of these)"
)
_OTHER_TEXT = "check that the text, its language and its encoding are those that the tokenizer was made for"
_ANOTHER = "name another run, since a run begins with the best one"


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
    def tokens_per_unit(self) -> float:
        return len(self.train.ids) / self.train.units(self.tokenizer.unit)


def train(
    settings: Config,
    path: Path,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    lock: Lock | None = None,
    say: Say = print,
) -> Outcome:
    """Trains in a run folder, from its last checkpoint where it has one.

    Arguments:
        path: of the run folder; made where it does not exist.
        resume: `auto` resumes the run of the folder; `never` only starts in an empty folder.
        overwrite: move a folder that holds another run out of the way, to a name beside it.
        lock: what the folder was reserved with, if it was.
        say: receives lines for a person.

    Raises:
        UserError: settings that cannot work here; a folder that holds another run; a damaged checkpoint; a
            text that changed. Nothing is written then.
        DivergedError: see `Trainer.fit`; the last good checkpoint stays.
    """
    # of a link, what it leads to is moved, and the link stays
    folder = RunFolder(files.path(os.path.realpath(path) if overwrite else path))
    with distributed.joined() as team, nullcontext(lock) if lock else Lock() as lock:

        def opened() -> tuple[Config, Path | None, dict[str, Any] | None, dict[str, Any] | None, _Text]:
            _require(settings, team)
            aside = folder.claim(resume, overwrite, lock, settings.data)
            saved = None if aside else folder.last(say)
            if not aside:
                folder.require_same_run(settings, saved)
            placed = _placed(settings, saved, team, say)
            start = None if saved else _start(placed.train, say)
            return placed, aside, saved, start, _text(placed, saved, start, say)

        # the settings too: those of a run that is resumed are in its folder, which other machines need not see
        settings, aside, saved, start, text = team.of_first(opened)
        device = require_device(team.place(settings.train.device))
        require_backend(settings.train.backend, device)  # on each process: the first step waits for no one's compiler
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # or the context of each process would also take memory of the first GPU
        require_memory(settings.model, text.tokenizer.size)
        torch.manual_seed(settings.train.seed)
        model = LanguageModel(settings.model, text.tokenizer.size, settings.train.backend).to(device)
        if start is not None:
            _begin_with(model, start)
        trainer = _trainer(model, settings, text, team)
        if saved is not None:
            folder.restore(model, saved)
            with folder.fitting("training state"):
                trainer.load_state_dict(saved)
        team.of_first(lambda: folder.occupy(settings, text.tokenizer, lock, aside))
        if not team.first:  # trains and validates with the first, and neither writes nor speaks
            return Outcome(_fit(trainer), trainer.state.step, None, "")
        if aside:
            say(f"{folder}: what was there is now in {aside}")
        _describe(say, settings, text, model)
        where = f"resuming after step {trainer.state.step}" if saved else "a new run"
        where += "" if start is None else f", from the best weights of {settings.train.init_from}"
        if saved and (ended := trainer.ended()):
            where = f"finished after step {trainer.state.step} {_finished(trainer, ended, folder)}"
        say(f"run folder {folder}: {where}" + (f", {team.size} processes" if team.size > 1 else ""))
        return _run(trainer, settings, folder, text)


def _finished(trainer: Trainer, ended: str, folder: RunFolder) -> str:
    """What ended a run for good, and what can be done to train on."""
    options = trainer.config
    if ended == "patience" and (options.patience is None or trainer.state.stale < options.patience):
        ended = "stop_patience"
    shown = "all epochs" if ended == "epochs" else f"train.{ended}={getattr(options, ended)}"
    more = f"begin another run with its weights: {shlex.join(['--init-from', str(folder)])}"
    if ended.endswith("patience") or options.schedule != "cosine":  # which is planned for so many epochs
        more = f"raise what ended it, as by --set train.{ended}=N, or {more}"
    return f"({shown}): nothing is left to train; {more}"


def _placed(settings: Config, saved: Mapping[str, Any] | None, team: Team, say: Say) -> Config:
    """The settings with the device that `auto` stands for, as the run keeps them."""
    theirs = None if saved is None else config.build(saved["config"]).train
    before = None if theirs is None else theirs.device
    device = resolve_device(settings.train.device, before)
    require_backend(settings.train.backend, require_device(team.place(device)))
    if before is not None and before.partition(":")[0] != device.partition(":")[0]:
        say(f"the run was on {before} and is now on {device}: its bits will differ from a run on {before} alone")
    precision = resolve_precision(settings.train.precision, device)
    if theirs is not None and settings.train.precision == "auto":
        precision = theirs.precision
    slow = rnnorm.why_not_bfloat16(device) if precision != "float32" else None
    if slow is not None:
        say(f"products in bfloat16 are slower here than in float32: {slow}")
    placed = settings.train.model_copy(update={"device": device, "precision": precision})
    return settings.model_copy(update={"train": placed})


def _require(settings: Config, team: Team) -> None:
    options = settings.train
    if settings.model.sparse_embedding and team.size > 1:
        raise UserError(
            f"model.sparse_embedding must be trained by one process; got {team.size}; set model.sparse_embedding=false"
        )
    if options.batch_size < team.size * options.accumulate:
        raise UserError(
            f"train.batch_size must have a column for each of train.accumulate parts in each process; "
            f"got {options.batch_size} for {options.accumulate} parts in {team.size}; raise it, or lower the others"
        )


def _start(options: TrainConfig, say: Say) -> dict[str, Any] | None:
    """The best checkpoint of the run that a new one begins with."""
    return None if options.init_from is None else RunFolder(Path(options.init_from)).saved("best", say, _ANOTHER)


def _begin_with(model: LanguageModel, start: Mapping[str, Any]) -> None:
    try:
        checkpoint.require_tensors(start["model"], model.state_dict())
    except ValueError as fault:
        raise UserError(
            f"a run that begins with the weights of another must have its model; got one that differs: {fault}; "
            "begin with its settings"
        ) from None
    model.load_state_dict(start["model"])


def _text(settings: Config, saved: Mapping[str, Any] | None, start: Mapping[str, Any] | None, say: Say) -> _Text:
    """The corpus and its tokenizer: a saved run's own, that of the run it begins with, or one trained on the text."""
    data = settings.data
    corpus = corpora.load(data.source, Path(data.dir), options=data.reading)
    tokenizer = _tokenizer(data, saved or start)
    tokenizer_is_given = tokenizer is not None
    ways = Ways(kind="") if tokenizer_is_given else Ways()  # the kind of one that is there is fixed
    for warning in corpus.require(tokenizer.kind if tokenizer else data.tokenizer, ways):
        say(f"warning: {warning}")
    if corpus.note:
        say(corpus.note)
    if tokenizer is None:
        least = corpus.min_count(data.tokenizer) if data.min_count is None else data.min_count
        tokenizer = store.tokenizer(
            data.tokenizer, corpus.splits["train"], data.vocab_size, least, data.tokenizer_sample
        )
    sha256 = {split: text.facts.digest(tokenizer.lossless) for split, text in corpus.splits.items()}
    before = {} if saved is None else saved["data_sha256"]
    for split in ("train", "valid"):
        if saved is not None and before.get(split) != sha256[split]:
            raise UserError(
                f"a run must be resumed with the text it began with; got another {split} text in {data.source}; "
                "restore it, or begin another run with --run"
            )
    ids, valid = (store.encoded(corpus.splits[split], tokenizer) for split in ("train", "valid"))
    if len(valid.ids) < 2:
        raise UserError(
            f"the valid text of {data.source} must hold at least 2 tokens, its ends of lines counted; got 1; "
            "give more text"
        )
    if unknown := stream.many_unknown(valid, tokenizer, "valid"):
        say(f"{unknown}; {_OTHER_TEXT if tokenizer_is_given else _OTHER_TOKENS}")
    counts = torch.from_numpy(ids.counts(tokenizer.size))
    return _Text(corpus.name, tokenizer, ids, valid, counts, {**sha256, **before})


def _tokenizer(data: DataConfig, saved: Mapping[str, Any] | None) -> Tokenizer | None:
    """The tokenizer of a saved run, or of the one to begin with, or of a file; None where one is to be trained."""
    if saved is not None:
        return tokenizers.from_state(saved["tokenizer"])
    return None if data.tokenizer_file is None else tokenizers.load(Path(data.tokenizer_file))


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

    data = stream.columns(text.train.ids, options.batch_size, text.tokenizer.eos, "the training text")
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
        f"model {_sizes(shape.sizes)} {shape.cell}, norm {shape.norm}, "
        f"{'tied' if shape.tied else 'untied'}, {size:,} parameters"
    )


def _sizes(sizes: list[int]) -> str:
    return f"{len(sizes)}x{sizes[0]}" if len({*sizes}) == 1 else "-".join(map(str, sizes))


def _fit(trainer: Trainer) -> str:
    with _signals(trainer):
        return trainer.fit()


def _run(trainer: Trainer, settings: Config, folder: RunFolder, text: _Text) -> Outcome:
    """What the first process does: trains, keeps the record of it, and scores the best weights at the end."""
    step, options = trainer.state.step, settings.train
    shared = (step, options.log_every)
    columns = stream.columns(text.valid.ids, _valid_width(settings, text), text.tokenizer.eos)
    internals = Internals(trainer.model, columns.gather(0, min(STEPS, columns.steps))[0])
    versions = provenance.versions(settings.train.device)
    json_lines = JsonLines(folder.metrics, *shared, text.tokens_per_unit, internals, versions)
    tensorboard = TensorBoard(
        folder.events,
        *shared,
        trainer.model,
        text.tokenizer,
        config.telling(settings),
        text.tokens_per_unit,
        internals,
    )
    progress = ProgressBar(text.tokens_per_unit, unit=text.tokenizer.unit)
    # what is shown comes after what is kept, which the run can resume from whatever happens then
    trainer.listeners += [json_lines, tensorboard, _checkpoints(trainer, settings, folder, text), progress]
    try:
        reason, score = _fit(trainer), None
        if reason in ENDS:
            progress.close()
            score = _score_best(trainer.model, settings, folder, text)
            event = Scored(trainer.state.epoch, trainer.state.step, "valid", score)
            json_lines(event)
            tensorboard(event)
        return Outcome(reason, trainer.state.step, score, progress.speed)
    except (DivergedError, UserError) as fault:
        raise type(fault)(f"{fault}; {folder.last_good()}") from None
    finally:
        progress.close()
        tensorboard.close()


def _checkpoints(trainer: Trainer, settings: Config, folder: RunFolder, text: _Text) -> Checkpoints:
    def weights() -> dict[str, Any]:
        return {
            "config": settings.model_dump(),
            "tokenizer": text.tokenizer.state(),
            "data_sha256": text.sha256,
            "train_counts": text.counts.tolist(),
            "model": trainer.model.state_dict(),
            "trainer": trainer.state_dict()["trainer"],
        }

    return Checkpoints(
        folder.checkpoints,
        lambda: {**weights(), **trainer.state_dict()},
        weights,
        settings.checkpoint.every_steps,
        settings.checkpoint.every_minutes,
        folder.best_nats(trainer.model),
    )


def _score_best(model: LanguageModel, settings: Config, folder: RunFolder, text: _Text) -> Score:
    """The exact score of the best weights on the validation text; they are then in the model."""
    folder.restore(model, checkpoint.load(folder.best))
    return evaluate(
        model,
        text.valid,
        text.tokenizer,
        chunk=settings.eval.chunk,
        train_counts=text.counts,
        data_sha256=text.sha256["valid"],
    )


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Inside, Ctrl-C and the signals of schedulers end the run after its present step; a second one ends it at once.
    SIGHUP and SIGUSR1 stay ignored where they were, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}
    ignored = [number for number in _OF_SCHEDULERS if before[number] is signal.SIG_IGN]
    before = {number: handler for number, handler in before.items() if number not in ignored}

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


_OF_SCHEDULERS = (signal.SIGHUP, signal.SIGUSR1)
_STOPPING = (signal.SIGINT, signal.SIGTERM, *_OF_SCHEDULERS)


def rehearse(settings: Config, folder: str | Path | None = None, say: Say = print) -> None:
    """Says what `train` would train, and how large and fast it is by one timed step. No run is written, none resumed;
    the tokenizer is that of `folder` where a run is there.

    The step is the second, the first one compiles and allocates; on a GPU the fifth, whose loops are graphs by then.

    Raises:
        UserError: settings or a text that cannot work here.
    """
    _require(settings, Team())
    settings = _placed(settings, None, Team(), say)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"log_every": 1})})
    text = _text(settings, None, _rehearsed(settings, folder, say), say)
    require_memory(settings.model, text.tokenizer.size)
    torch.manual_seed(settings.train.seed)
    device = require_device(settings.train.device)
    model = LanguageModel(settings.model, text.tokenizer.size, settings.train.backend).to(device)
    trainer = _trainer(model, settings, text, Team())
    steps: list[Stepped] = []

    def watch(event: Event) -> None:
        if isinstance(event, Stepped):
            steps.append(event)
            if len(steps) >= (5 if device.type == "cuda" else 2):
                trainer.stop("rehearsal")

    trainer.listeners.append(watch)
    trainer.fit()
    _describe(say, settings, text, model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept = [value for state in trainer.optimizer.state.values() for value in state.values()]
    state = sum(value.nbytes for value in kept if isinstance(value, Tensor))
    say(f"memory: weights {_mib(weights)}, gradients {_mib(weights)}, optimizer {_mib(state)}; {_used(device)} at most")
    last, options = steps[-1], settings.train
    rate = last.tokens / last.seconds
    epoch = trainer.data.active(0, trainer.data.steps)
    steps_of_epoch = len(stream.plan(options.window, trainer.data.steps, options.seed, 0))
    epochs, named = float(options.epochs), f"{options.epochs} epochs"
    if options.max_steps is not None and options.max_steps < options.epochs * steps_of_epoch:
        epochs, named = options.max_steps / steps_of_epoch, f"{options.max_steps:,} steps"
    say(
        f"one step: {last.seconds:.3f} s for {last.tokens:,} tokens, {rate:,.0f} tokens/s; an epoch of {epoch:,} "
        f"tokens takes about {_duration(epoch / rate)}, {named} {_duration(epochs * epoch / rate)}, validations not "
        "counted"
    )


def _rehearsed(settings: Config, folder: str | Path | None, say: Say) -> Mapping[str, Any] | None:
    """What holds the tokenizer of the run that is rehearsed, where it is made already."""
    if folder is not None and (kept := RunFolder(Path(folder)).tokenizer).is_file():
        return {"tokenizer": tokenizers.load(kept).state()}
    return _start(settings.train, say)


def _used(device: torch.device) -> str:
    """What used how much memory where the model is."""
    if device.type == "cuda":
        return f"tensors on the GPU used {_mib(torch.cuda.max_memory_allocated(device))}"
    return f"this process used {_mib(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} minutes" if seconds < 6000 else f"{seconds / 3600:,.1f} hours"
