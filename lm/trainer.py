"""The training loop. It emits events and reports nothing itself."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lm import optim, stream
from lm.averages import Averages, estimate_statistics
from lm.checkpoint import MOST_STEPS
from lm.config import TrainConfig
from lm.distributed import Team
from lm.evaluator import Score
from lm.events import Diverged, EndedEarly, EpochEnded, Event, Interrupted, Listener, Started, Stepped, Validated
from lm.machine import resolve_precision
from lm.model import LanguageModel, Objective, State, columns_of, detach, state_of, state_tensors
from lm.stream import Columns, parts

# How a run ends for good, rather than being stopped.
ENDS = ("epochs", "max_steps", "patience")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands; with the model, the optimizer and the carried state, all that a resumed run needs.

    Attributes:
        epoch, step: done so far.
        position: time steps done of the present epoch.
        nll, tokens: sums over the present epoch so far.
        valid: nats per token of the validation of each epoch so far.
        best: the least of them.
        stale: epochs since then.
        waited, falls: schedule plateau: epochs without a new best since the last fall; falls so far.
    """

    epoch: int = 0
    step: int = 0
    position: int = 0
    nll: float = 0.0
    tokens: int = 0
    valid: tuple[float, ...] = ()
    best: float = math.inf
    stale: int = 0
    waited: int = 0
    falls: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "valid", tuple(self.valid))  # a file may hold a list
        for field in fields(self):  # a checkpoint may hold anything
            if field.name == "valid":
                continue  # examined once, when a run is resumed
            value, most = getattr(self, field.name), math.inf if field.type is float else MOST_STEPS
            if type(value) is not field.type:
                raise TypeError(f"trainer.{field.name} must be {field.type}; got {value!r:.50}")
            if not 0 <= value <= most:
                raise ValueError(f"trainer.{field.name} must be from 0 to {most}; got {value!r:.50}")


class DivergedError(Exception):
    """A loss, gradient or validation is not finite."""


@dataclass(frozen=True)
class _Unread:
    """A step that is done, and its numbers [2] on the device: nats of all processes, and the gradient's norm."""

    before: TrainerState
    found: Tensor
    stop: int
    tokens: int
    rate: float
    began: float


class Trainer:
    """Truncated back-propagation through time over columns.

    All randomness follows from (seed, step, process) and (seed, epoch): none is kept from step to step, so a run
    that is loaded resumes bit for bit, as if it had not stopped.

    The columns are shared out over the processes of a team, and each share over `accumulate` parts computed one after
    another. The gradient is that of the mean over all of them, so both are the same as one computation, to rounding,
    but for two things: each part draws its own dropout masks, those of words and weights too; and online normalization
    sees its samples in another order, part by part, and in each process only its own, the running statistics averaged
    after the step. The carried state is kept whole on each process.

    On a GPU the host waits for the device only at each `log_every`-th step and at the end of an epoch: then the losses
    and gradient norms since the last time are read together, and their events emitted. A step that is not finite
    changes no weight, nor does any after it, and the run ends where it was.

    Arguments:
        model: trained in place.
        config: optimizer, schedule, window policy and so on.
        data: the training columns of all processes.
        validate: scores the model as it is; called by all processes.
        listeners: called with each event, in this order.
        team: the processes that train together.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        data: Columns,
        validate: Callable[[], Score],
        listeners: Sequence[Listener] = (),
        team: Team = Team(),  # noqa: B008
    ) -> None:
        self.model, self.config, self.data, self.team = model, config, data, team
        self.device = next(model.parameters()).device
        first, stop = team.share(config.batch_size)
        cuts = [(first + start, first + end) for start, end in parts(stop - first, config.accumulate)]
        self.parts = [(cut, data.part(*cut).to(self.device)) for cut in cuts]
        precision = resolve_precision(config.precision, str(self.device))
        self.objective = team.data_parallel(Objective(model, config.ar, config.tar, precision))
        self.validate = validate
        self.listeners = list(listeners)
        self.optimizer = optim.build(model, config)
        self.state = TrainerState()
        self.averages = Averages(model) if optim.averaging(config, ()) else None
        self.carried: State | None = None
        self.deferred = self.device.type == "cuda"  # on the CPU there is nothing to wait for
        self._unread: list[_Unread] = []
        self._sound = torch.ones((), dtype=torch.bool, device=self.device)  # all steps so far are finite
        self._before: list[Tensor] = []  # the weights, where they must be put back
        self._stop: str | None = None

    def stop(self, reason: str) -> None:
        """Asks the loop to end after the present step, on all processes. Safe to call from a signal handler."""
        self._stop = reason

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the model's own state: plain values and tensors.

        Raises:
            DivergedError: a step whose loss was not read back yet is not finite.
        """
        self._read_back()
        return {
            "trainer": asdict(self.state),
            "optimizer": self.optimizer.state_dict(),
            "averages": {} if self.averages is None else self.averages.state_dict(),
            "carried": state_tensors(self.carried),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; load the model's own state first.

        Raises:
            AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError: it is of another model or run.
        """
        self.state = TrainerState(**saved["trainer"])
        self._unread, self._sound = [], torch.ones_like(self._sound)
        self._check()
        optim.load(self.optimizer, saved["optimizer"])
        self.averages = Averages(self.model) if optim.averaging(self.config, self.state.valid) else None
        if self.averages is not None:
            self.averages.load_state_dict(saved["averages"], self.state.step)
        found = [tuple(tensor.shape) if tensor.is_floating_point() else tensor.dtype for tensor in saved["carried"]]
        if found not in ([], wanted := self.model.state_shapes(self.config.batch_size)):
            raise ValueError(f"the carried state must have shapes {wanted}; got {found}")
        self.carried = state_of([tensor.to(self.device) for tensor in saved["carried"]])

    def fit(self) -> str:
        """Trains until the configuration's end, or until asked to stop; returns why it ended.

        Where that is the end, inside an epoch, the weights are validated there too, at each call.

        Raises:
            DivergedError: the loss, the gradient or a validation is not finite; the event is emitted before.
        """
        reason = self._train()
        if reason in ENDS and self.state.position:
            with self.averaged():
                _, nats = self._validated()
                self._emit(EndedEarly(*self._place(), nats))
        return reason

    def _train(self) -> str:
        tokens = self.data.active(0, self.data.steps)
        self._emit(Started(*self._place(), self.config.epochs, tokens, self.state.tokens))
        while (reason := self._ended()) is None:
            began = time.perf_counter()
            for start, stop in self._windows():
                self._step(start, stop)
                if self.state.position < self.data.steps and (reason := self._paused()):
                    self._emit(Interrupted(*self._place(), reason))
                    return reason
            self._end_epoch(time.perf_counter() - began)
        return reason

    def _validated(self) -> tuple[Score, float]:
        """The score of the model as it is, and its nats per token."""
        score = self.validate()
        nats = score.nll / score.tokens
        if not math.isfinite(nats):
            self._diverge("validation")
        return score, nats

    def _diverge(self, what: str) -> NoReturn:
        """Ends a run in which something is not finite, after notifying the listeners."""
        self._emit(Diverged(*self._place(), what=what))
        raise DivergedError(
            f"the {what} is not finite after {self.state.step} steps (epoch {self.state.epoch + 1}, "
            f"learning rate {self._rate(self.state.position):g})"
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds what is validated, kept and tested: once averaging has begun the averages, with
        separate running statistics. Each process estimates these on the columns of all, so they are equal."""
        if self.averages is None:
            return nullcontext()
        return self.averages.swapped_into(
            self.model, lambda model: estimate_statistics(model, self.data, self.config.window)
        )

    def _check(self) -> None:
        """Raises ValueError unless a run of this configuration can stand where this one does."""
        state = self.state
        if state.step < state.epoch + (state.position > 0):
            raise ValueError(f"trainer.step must reach epoch {state.epoch + 1}; got {state.step}")
        if wrong := [nats for nats in state.valid if type(nats) is not float or not nats >= 0]:
            raise ValueError(f"trainer.valid must be numbers from 0 up; got {wrong[0]!r:.50}")
        by_validations = self.config.averaging or self.config.stop_patience is not None
        if by_validations and len(state.valid) != state.epoch:  # older checkpoints may lack them
            raise ValueError(f"trainer.valid must be of {state.epoch} epochs; got {len(state.valid)}")
        starts = [start for start, _ in self._windows()]
        if state.position not in starts:
            raise ValueError(
                f"trainer.position must be between two windows of epoch {state.epoch + 1}; got {state.position}"
            )

    def _windows(self) -> list[tuple[int, int]]:
        config, state = self.config, self.state
        windows = stream.plan(config.window, self.data.steps, config.seed, state.epoch)
        return [window for window in windows if window[0] >= state.position]

    def _paused(self) -> str | None:
        asked = self.team.agree(self._stop)
        if asked is None and self.state.step == self.config.max_steps:
            return "max_steps"
        return asked

    def _ended(self) -> str | None:
        return self.ended() or self.team.agree(self._stop)

    def ended(self) -> str | None:
        """Returns why the run is over for good, one of `ENDS`; None where it can go on."""
        config, state = self.config, self.state
        if state.epoch >= config.epochs:
            return "epochs"
        if config.max_steps is not None and state.step >= config.max_steps:
            return "max_steps"
        if config.patience is not None and state.stale >= config.patience:
            return "patience"
        if config.stop_patience is not None and optim.worsened(state.valid, config.stop_patience):
            return "patience"
        return None

    def _step(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        config, state = self.config, self.state
        _seed(self.device, _derive(config.seed, state.step, self.team.rank))
        count = self.data.active(start, stop)
        rate = self._rate(start) * stream.policy(config.window).rate_scale(stop - start)
        optim.set_learning_rate(self.optimizer, rate)
        self.model.train()
        self.optimizer.zero_grad()
        own, carried = self._backward(start, stop, count)
        self.team.average_statistics(self.model)
        found = torch.stack((self.team.sum(own), self._clip().double()))
        self._update(found)
        if self.averages is not None:
            self.averages.update(self.model)
        self.carried = carried
        self.state = replace(state, step=state.step + 1, position=stop, tokens=state.tokens + count)
        self._unread.append(_Unread(state, found, stop, count, rate, began))
        if not self.deferred or self.state.step % config.log_every == 0 or stop == self.data.steps:
            self._read_back()

    @torch.no_grad()
    def _update(self, found: Tensor) -> None:
        """Takes the optimizer's step, unless this step or one before it is not finite."""
        if not self.deferred:
            if all(map(math.isfinite, found.tolist())):
                self.optimizer.step()
            return
        weights: list[Tensor] = list(self.model.parameters())
        self._before = self._before or [torch.empty_like(weight) for weight in weights]
        for before, weight in zip(self._before, weights, strict=True):
            before.copy_(weight)
        self.optimizer.step()
        # put back rather than multiplied by zero, which would leave NaN, and whatever the optimizer
        self._sound = self._sound & found.isfinite().all()
        for weight, before in zip(weights, self._before, strict=True):
            torch.where(self._sound, weight, before, out=weight)

    def _read_back(self) -> None:
        """Reads what the steps since the last time left on the device, in one wait, and emits their events."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        values = torch.stack([step.found for step in unread]).tolist()
        seconds_per_token = (time.perf_counter() - unread[0].began) / sum(step.tokens for step in unread)
        events: list[Stepped] = []
        total, wrong = self.state.nll, None
        for step, (nats, norm) in zip(unread, values, strict=True):
            if not (math.isfinite(nats) and math.isfinite(norm)):
                wrong = "loss" if not math.isfinite(nats) else "gradient's norm"
                self.state = step.before
                break
            total += nats
            events.append(
                Stepped(
                    step.before.epoch + 1,
                    step.before.step + 1,
                    position=step.stop,
                    length=self.data.steps,
                    nll=nats / step.tokens,
                    tokens=step.tokens,
                    epoch_nll=total,
                    epoch_tokens=step.before.tokens + step.tokens,
                    lr=step.rate,
                    grad_norm=norm,
                    seconds=step.tokens * seconds_per_token,
                    following=len(unread) - len(events) - 1,
                )
            )
        self.state = replace(self.state, nll=total)  # before the events: a listener may save it
        for event in events:
            self._emit(event)
        if wrong is not None:
            self._diverge(wrong)

    def _backward(self, start: int, stop: int, count: int) -> tuple[Tensor, State | None]:
        """Makes the gradient of the mean nats of a window's `count` targets; returns the sum of this process's in
        float64, and the state of all columns after the window."""
        per_change = count / max(self.data.active(start + 1, stop), 1)
        nats, states = [], []
        for number, (cut, data) in enumerate(self.parts, 1):
            with self.team.apart(self.objective) if number < len(self.parts) else nullcontext():
                window, carried = data.window(start, stop), columns_of(self.carried, *cut)
                loss, summed, state = self.objective(window, carried, per_change)
                # the team averages over its processes what is here a sum over them
                loss.backward(torch.full_like(loss, self.team.size / count))
            nats.append(summed.double())
            states.append(state_tensors(detach(state)))
        own = states[0] if len(states) == 1 else [torch.cat(tensors, 1) for tensors in zip(*states, strict=True)]
        return sum(nats[1:], nats[0]), state_of([self.team.join(tensor, 1, self.config.batch_size) for tensor in own])

    def _end_epoch(self, seconds: float) -> None:
        done = self.state
        with self.averaged():
            score, nats = self._validated()
            self._emit(Validated(*self._place(), score=score, best=nats < done.best))
        self.state = _next_epoch(self.config, done, nats)
        self.carried = None
        if self.averages is None and optim.averaging(self.config, self.state.valid):
            self.averages = Averages(self.model)
        ended = EpochEnded(done.epoch + 1, done.step, nll=done.nll, tokens=done.tokens, seconds=seconds)
        self._emit(ended)

    def _rate(self, start: int) -> float:
        state = self.state
        epoch = state.epoch + start / self.data.steps
        return optim.learning_rate(self.config, epoch=epoch, step=state.step, falls=state.falls)

    def _clip(self) -> Tensor:
        """Clips the gradient where asked to, and returns its norm before."""
        held = [_with_dense_gradient(p) for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in held if p.grad is not None])
        if self.config.clip is not None:
            clip_grads_with_norm_(held, self.config.clip, norm)
        return norm

    def _place(self) -> tuple[int, int]:
        return self.state.epoch + 1, self.state.step

    def _emit(self, event: Event) -> None:
        self._read_back()  # in order: the steps before this event first
        for listener in self.listeners:
            listener(event)


def _with_dense_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter; of one with a sparse gradient, a tensor whose gradient is the rows that it has."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()  # a row that the window has twice is there once
    rows = parameter.grad._values()
    holder = rows.detach()
    holder.grad = rows
    return holder


def _next_epoch(config: TrainConfig, done: TrainerState, nats: float) -> TrainerState:
    """Where the run stands after an epoch with this validation."""
    now = TrainerState(done.epoch + 1, done.step, valid=(*done.valid, nats), best=done.best, falls=done.falls)
    if nats < done.best:
        return replace(now, best=nats)
    waited = done.waited + 1
    fall = waited > config.schedule_patience
    return replace(now, stale=done.stale + 1, waited=0 if fall else waited, falls=done.falls + fall)


def _seed(device: torch.device, seed: int) -> None:
    """Seeds what a step draws from. `torch.manual_seed` does so for every kind of device, and for each one that is not
    in use it keeps how it was called, which costs more than many a kernel."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def _derive(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
