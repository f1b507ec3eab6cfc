"""Embedding, normalized recurrent layers, decoder."""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnorm
from lm.config import ModelConfig
from lm.decoders import AdaptiveSoftmax, Decoder, MixtureOfSoftmaxes, Softmax
from lm.stream import Window

State: TypeAlias = Tensor | tuple[Tensor, ...]
Layer: TypeAlias = rnnorm.LSTM | rnnorm.GRU | rnnorm.RNN


class LockedDropout(nn.Dropout):
    """Dropout with one mask [1, N, C] for all steps of a window [T, N, C].

    Source: Gal and Ghahramani, NeurIPS 2016 (arXiv 1512.05287); so named in Merity et al. 2017 (arXiv 1708.02182).
    """

    def forward(self, input: Tensor) -> Tensor:
        return locked_dropout(input, self.p, self.training)


def locked_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Returns `x` [T, N, C] with the entries of one mask [1, N, C] dropped at every step."""
    return x * F.dropout(torch.ones_like(x[:1]), rate) if training and rate else x


class Stack(nn.ModuleList):
    """Recurrent layers of any sizes, one module each, with dropout between them.

    Arguments:
        layers: of one recurrent layer each.
        dropout: rate between layers.
        locked: one mask for all steps.
        summed: the output is the sum of all layers' outputs, not the last one's.

    The state is one flat tuple, `h` or `h, c` of the first layer, then of the second, …, [1, N, H] each.
    """

    def __init__(self, layers: Iterable[Layer], dropout: float, locked: bool, summed: bool) -> None:
        super().__init__(layers)
        self.dropout, self.locked, self.summed = dropout, locked, summed

    def forward(
        self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        given = state_tensors(state)
        each, after, outputs = len(given) // len(self), [], []
        for number, layer in enumerate(self):
            if number and self.locked:
                x = locked_dropout(x, self.dropout, self.training)
            elif number:
                x = F.dropout(x, self.dropout, self.training)
            x, last = layer(x, state_of(given[number * each :][:each]), lengths=lengths)
            after += state_tensors(last)
            outputs.append(x)
        return torch.stack(outputs).sum(0) if self.summed else x, state_of(after)


def by_layer(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields a model's layers' tensors by names such as `norm_mean_l1`, also those of a `Stack`, `1.norm_mean_l0`."""
    for name, tensor in named:
        yield re.sub(r"^(\d+)\.(.*)_l0$", r"\2_l\1", name), tensor


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
        self.embedding = nn.Embedding(vocabulary, width, _weight=given, sparse=config.sparse_embedding)
        self.layers = _layers(config, width, backend)
        self.decoder = _decoder(config, width, vocabulary)
        if config.tied:
            self.decoder.weight = self.embedding.weight
        self.word_dropout = config.embedding_dropout
        dropout = LockedDropout if config.locked_dropout else nn.Dropout
        self.input_dropout = dropout(_first(config.input_dropout, config.dropout))
        self.output_dropout = dropout(_first(config.output_dropout, config.dropout))
        self._initialize(config.init_range, config.embedding_range)

    @torch.no_grad()
    def _initialize(self, init_range: float | None, embedding_range: float) -> None:
        # Where the recurrence outweighs the words, a norm amplifies it at every step and gradients grow along the
        # window: online normalization at large rates without clipping needs words as large as the state.
        if not isinstance(self.decoder, AdaptiveSoftmax):  # which has torch's own
            nn.init.uniform_(self.decoder.weight, -(init_range or 0.1), init_range or 0.1)
            nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.embedding.weight, -(init_range or embedding_range), init_range or embedding_range)
        if init_range is not None:
            # A normalization's scale starts at one and its shift at zero whatever the weights' range.
            own = (p for name, p in self.layers.named_parameters() if "norm" not in name)
            decoder = (p for name, p in self.decoder.named_parameters() if name != "weight")
            for parameter in (*own, *decoder):
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
            The last layer's output after dropout [T, N, H], and the state after the last step. Dropout never enters
            the state.
        """
        _, hidden, state = self.outputs(inputs, state, lengths)
        return hidden, state

    def outputs(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Returns the last layer's output [T, N, H] before dropout and after it, and the state; as `forward`."""
        embedded = self.embedding(inputs)
        if self.training and self.word_dropout:
            keep = torch.rand(self.embedding.num_embeddings, device=inputs.device) >= self.word_dropout
            embedded = embedded * (keep.to(embedded.dtype) / (1 - self.word_dropout))[inputs].unsqueeze(-1)
        hidden, state = self.layers(self.input_dropout(embedded), state, lengths=lengths)
        return hidden, self.output_dropout(hidden), state

    @property
    def recurrent(self) -> list[Layer]:
        """The modules of the recurrent layers: one that holds all, or one each."""
        return [*self.layers] if isinstance(self.layers, Stack) else [self.layers]

    def state_shapes(self, columns: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the tensors of the state of so many columns."""
        return [
            (layer.num_layers, columns, layer.hidden_size)
            for layer in self.recurrent
            for _ in rnnorm.CELLS[layer.cell].states
        ]

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Returns the summed nats of `targets` [T, N] under `hidden` [T, N, H], and how many counted."""
        return self.decoder.loss(hidden, targets, mask)

    def token_nll(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Returns the nats of each target, [T, N], without gradient; the temperature divides the logits."""
        return self.decoder.token_nll(hidden, targets, temperature)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Returns the log-probabilities [..., V] in float32 or wider."""
        return self.decoder.log_probs(hidden)


def sketch(config: ModelConfig, vocabulary: int) -> LanguageModel:
    """Returns a model on the device `meta`: names, shapes and sizes of its tensors, without memory for them."""
    with torch.device("meta"):
        return LanguageModel(config, vocabulary)


class Objective(nn.Module):
    """What training minimizes, as one forward: DistributedDataParallel prepares the gradients of what that returns.

    `mean(nats) + ar * mean(dropped^2) + tar * mean((raw[t + 1] - raw[t])^2)`, of the last layer's output after and
    before dropout; the last term is 0 for one step. Padding does not count.

    Arguments:
        model: shared, not copied.
        ar, tar: factors of activation regularization and temporal activation regularization.
        precision: of matrix products: float32, bfloat16, or bfloat16-decoder for those of the decoder alone.

    Source: Merity et al. 2017 (arXiv 1708.01009).
    """

    def __init__(self, model: LanguageModel, ar: float = 0.0, tar: float = 0.0, precision: str = "float32") -> None:
        super().__init__()
        self.model, self.ar, self.tar, self.precision = model, ar, tar, precision

    def forward(self, window: Window, state: State | None, per_change: float) -> tuple[Tensor, Tensor, State]:
        """Returns what to differentiate, the nats to report, and the state after the window.

        The first two are sums over the window's targets; a penalty is added to the first alone, times the number of
        targets, as the trainer divides by that.

        Arguments:
            per_change: targets of all columns in the window for each change from a step to the next; by it the parts of
                a window add up to what the whole has, however short a column of one is.
        """
        half = partial(torch.autocast, window.inputs.device.type, torch.bfloat16)
        with half() if self.precision == "bfloat16" else nullcontext():
            raw, dropped, state = self.model.outputs(window.inputs, state, window.lengths)
        with half() if self.precision != "float32" else nullcontext():
            nats, _ = self.model.loss(dropped, window.targets, window.mask)
        loss = nats
        if self.ar:
            loss = loss + self.ar * _squares(dropped, window.mask)
        if self.tar and len(raw) > 1:
            mask = None if window.mask is None else window.mask[1:]
            loss = loss + per_change * self.tar * _squares(raw[1:] - raw[:-1], mask)
        return loss, nats.detach(), state


def _squares(values: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over the rows [T, N] that count of each one's mean square, in the dtype of the running sums."""
    kept = values if mask is None else values[mask]
    return (kept if kept.dtype == torch.float64 else kept.float()).square().sum() / values.shape[-1]


def _decoder(config: ModelConfig, width: int, vocabulary: int) -> Decoder:
    units = config.sizes[-1]
    if config.decoder == "mixture":
        dropout = LockedDropout if config.locked_dropout else nn.Dropout
        latents = dropout(_first(config.latent_dropout, config.dropout))
        return MixtureOfSoftmaxes(units, vocabulary, width, config.experts, latents)
    if config.decoder == "adaptive":
        return AdaptiveSoftmax(units, vocabulary, config.cutoffs)
    return Softmax(units, vocabulary, width if config.tied else None)


def _layers(config: ModelConfig, width: int, backend: str) -> Layer | Stack:
    sizes = config.sizes
    if len({*sizes}) == 1 and (len(sizes) == 1 or not (config.locked_dropout or config.sum_layers)):
        return _layer(config, width, sizes[0], len(sizes), backend)
    inputs = [width, *sizes[:-1]]
    each = (_layer(config, before, units, 1, backend) for before, units in zip(inputs, sizes, strict=True))
    return Stack(each, config.dropout, config.locked_dropout, config.sum_layers)


def _layer(config: ModelConfig, inputs: int, units: int, count: int, backend: str) -> Layer:
    floor = -math.inf if config.control_floor is None else config.control_floor
    online = rnnorm.norms.Online(config.alpha_fwd, config.alpha_bwd, guard=config.guard, control_floor=floor)
    norm = online if config.norm == "online" else config.norm
    # torch warns of dropout on a single layer, which has nothing between layers to drop
    between = config.dropout if count > 1 else 0.0
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
    if config.mogrifier_rounds:
        options |= {"mogrifier_rounds": config.mogrifier_rounds, "mogrifier_rank": config.mogrifier_rank}
    if config.cap_input_gate:
        options["cap_input_gate"] = True
    if config.cell == "lstm":
        return rnnorm.LSTM(inputs, units, count, dropout=between, **options)
    if config.cell == "gru":
        return rnnorm.GRU(inputs, units, count, dropout=between, **options)
    nonlinearity = config.cell.removeprefix("rnn_")
    return rnnorm.RNN(inputs, units, count, nonlinearity=nonlinearity, dropout=between, **options)


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def detach(state: State) -> State:
    """Returns the state cut from its graph, as truncated BPTT carries it on."""
    return state.detach() if isinstance(state, Tensor) else tuple(tensor.detach() for tensor in state)


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
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
