"""Embedding, normalized recurrent layers, decoder."""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnorm
from lm.config import ModelConfig
from lm.loss import linear_cross_entropy, token_nll
from lm.stream import Window

State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    """Predicts the next token: `softmax(decoder(dropout(layers(dropout(embedding(inputs))))))`.

    Arguments:
        config: cell, norm, sizes, dropouts, tying.
        vocabulary: V.
        backend: what runs the recurrence, by `rnnorm`'s names.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, backend: str = "auto") -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        # on `meta`, torch's own initialization would load its decompositions, which takes seconds
        given = torch.empty(vocabulary, width) if torch.get_default_device().type == "meta" else None
        self.embedding = nn.Embedding(vocabulary, width, _weight=given)
        self.layers = _layers(config, width, backend)
        self.decoder = nn.Linear(config.hidden_size, vocabulary)
        if config.tied:
            self.decoder.weight = self.embedding.weight
        self.word_dropout = config.embedding_dropout
        self.input_dropout = nn.Dropout(_first(config.input_dropout, config.dropout))
        self.output_dropout = nn.Dropout(_first(config.output_dropout, config.dropout))
        self._initialize(config.init_range, config.embedding_range)

    @torch.no_grad()
    def _initialize(self, init_range: float | None, embedding_range: float) -> None:
        # Where the recurrence outweighs the words, a norm amplifies it at every step and gradients grow along the
        # window: online normalization at large rates without clipping needs words as large as the state.
        for parameter, width in ((self.decoder.weight, 0.1), (self.embedding.weight, embedding_range)):
            nn.init.uniform_(parameter, -(init_range or width), init_range or width)
        nn.init.zeros_(self.decoder.bias)
        if init_range is not None:
            # A normalization's scale starts at one and its shift at zero whatever the weights' range.
            own = (p for name, p in self.layers.named_parameters() if "norm" not in name)
            for parameter in (*own, self.decoder.bias):
                nn.init.uniform_(parameter, -init_range, init_range)

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Runs T steps of N columns.

        Arguments:
            inputs: [T, N] int64, the token before each prediction.
            state: what the call before returned (detach it for truncated BPTT), or None for zeros.
            lengths: [N] int64 in 1 … T, or None when all columns have T steps.

        Returns:
            The decoder's input [T, N, H], and the state after the last step. Dropout never enters the state.
        """
        embedded = self.embedding(inputs)
        if self.training and self.word_dropout:
            keep = torch.rand(self.embedding.num_embeddings, device=inputs.device) >= self.word_dropout
            embedded = embedded * (keep.to(embedded.dtype) / (1 - self.word_dropout))[inputs].unsqueeze(-1)
        hidden, state = self.layers(self.input_dropout(embedded), state, lengths=lengths)
        return self.output_dropout(hidden), state

    def state_shapes(self, columns: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the tensors of the state of so many columns."""
        shape = (self.layers.num_layers, columns, self.layers.hidden_size)
        return [shape, shape] if isinstance(self.layers, rnnorm.LSTM) else [shape]

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Returns the summed nats of `targets` [T, N] under `hidden` [T, N, H], and how many counted."""
        rows = None if mask is None else mask.flatten()
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.decoder.weight, self.decoder.bias, targets.flatten(), rows
        )

    def token_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Returns the nats of each target, [T, N], without gradient."""
        rows = token_nll(hidden.flatten(0, 1), self.decoder.weight, self.decoder.bias, targets.flatten())
        return rows.view(targets.shape)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Returns the log-probabilities [..., V] in float32 or wider."""
        logits = self.decoder(hidden)
        return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def sketch(config: ModelConfig, vocabulary: int) -> LanguageModel:
    """Returns a model on the device `meta`: names, shapes and sizes of its tensors, without memory for them."""
    with torch.device("meta"):
        return LanguageModel(config, vocabulary)


class Objective(nn.Module):
    """What training minimizes, as one forward: DistributedDataParallel prepares the gradients of what that returns.

    Arguments:
        model: shared, not copied.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: Window, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Returns what to differentiate, the nats to report, and the state after the window.

        The first two are sums over the window's targets; a penalty is added to the first alone, times the number of
        targets, as the trainer divides by that.
        """
        hidden, state = self.model(window.inputs, state, window.lengths)
        nats, _ = self.model.loss(hidden, window.targets, window.mask)
        return nats, nats.detach(), state


def _layers(config: ModelConfig, width: int, backend: str) -> rnnorm.LSTM | rnnorm.GRU | rnnorm.RNN:
    floor = -math.inf if config.control_floor is None else config.control_floor
    online = rnnorm.norms.Online(config.alpha_fwd, config.alpha_bwd, guard=config.guard, control_floor=floor)
    norm = online if config.norm == "online" else config.norm
    size = (width, config.hidden_size, config.num_layers)
    # torch warns of dropout on a single layer, which has nothing between layers to drop
    between = config.dropout if config.num_layers > 1 else 0.0
    options: rnnorm.Options = {
        "norm": norm,
        "cell_norm": config.cell_norm,
        "backend": backend,
        "weight_dropout": config.weight_dropout,
        "recurrent_dropout": config.recurrent_dropout,
        "zoneout": config.zoneout,
    }
    if config.zoneout_c is not None:
        options["zoneout"] = (config.zoneout, config.zoneout_c)
    if config.cell == "lstm":
        return rnnorm.LSTM(*size, dropout=between, **options)
    if config.cell == "gru":
        return rnnorm.GRU(*size, dropout=between, **options)
    return rnnorm.RNN(*size, nonlinearity=config.cell.removeprefix("rnn_"), dropout=between, **options)


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def detach(state: State) -> State:
    """Returns the state cut from its graph, as truncated BPTT carries it on."""
    return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())


def columns_of(state: State | None, first: int, stop: int) -> State | None:
    """Returns the state of the columns first … stop - 1."""
    return state_of([tensor[:, first:stop] for tensor in state_tensors(state)])


def state_tensors(state: State | None) -> list[Tensor]:
    """Returns the state as a plain list of tensors, as a checkpoint keeps it; [] for None."""
    if state is None:
        return []
    return [state] if isinstance(state, Tensor) else list(state)


def state_of(tensors: list[Tensor]) -> State | None:
    """Returns the state that `state_tensors` took apart."""
    if not tensors:
        return None
    return tensors[0] if len(tensors) == 1 else (tensors[0], tensors[1])
