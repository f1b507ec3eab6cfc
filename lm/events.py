"""What a training run reports to its listeners. A listener is any function that takes one event."""

from collections.abc import Callable
from dataclasses import dataclass

from lm.evaluator import Score


@dataclass(frozen=True)
class Event:
    """Epochs count from 1, steps from 0: `step` is the number of optimizer steps done so far."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Started(Event):
    """The run begins, or resumes from a checkpoint.

    Attributes:
        epochs: as many as there will be at most.
        tokens: predictions in one epoch; `epoch_tokens` of them are done in the present one.
    """

    epochs: int
    tokens: int
    epoch_tokens: int


@dataclass(frozen=True)
class Stepped(Event):
    """An optimizer step is done.

    Attributes:
        position, length: time steps of the epoch done, and in all.
        nll: mean nats per token of this step; `tokens` of them.
        epoch_nll, epoch_tokens: sums over the epoch so far.
        seconds: duration of the step; on a GPU, where the numbers of several are read together, its share by tokens.
        following: steps that are done too, whose events follow at once; 0 unless on a GPU.
    """

    position: int
    length: int
    nll: float
    tokens: int
    epoch_nll: float
    epoch_tokens: int
    lr: float
    grad_norm: float
    seconds: float
    following: int = 0


@dataclass(frozen=True)
class Validated(Event):
    """The validation after an epoch. While listeners run, the model holds the weights that were scored."""

    score: Score
    best: bool


@dataclass(frozen=True)
class EpochEnded(Event):
    """An epoch and its validation are over; `nll` nats over `tokens` tokens, in `seconds` of this process."""

    nll: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Interrupted(Event):
    """The run pauses inside an epoch, at a step that a checkpoint may keep."""

    reason: str


@dataclass(frozen=True)
class EndedEarly(Event):
    """`max_steps` has ended the run inside an epoch, and the weights that it ended with were validated.

    While listeners run, the model holds the weights that were scored, at `nats` per token.
    """

    nats: float


@dataclass(frozen=True)
class Diverged(Event):
    """The loss, gradient or validation is not finite. The model is no longer worth keeping."""

    what: str


@dataclass(frozen=True)
class Scored(Event):
    """A final score by one of the protocols, of the best checkpoint."""

    split: str
    score: Score


Listener = Callable[[Event], None]
