"""Decoders: from the layers' output to probabilities over the vocabulary, and their losses.

Each has `loss`, `token_nll` and `log_probs`, exact over the whole vocabulary: none approximates the normalization.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.errors import UserError
from lm.loss import linear_cross_entropy, summed_nll, token_nll

_MOST_LOG_PROBS = 2**24  # computed at once where all of a row are needed for one


class Softmax(nn.Linear):
    """`softmax(W P h + b)`; without `P` where the widths are equal.

    Arguments:
        units: of the last layer, H.
        vocabulary: V.
        width: E of the weight [V, E], so that it can be tied to an embedding; None: H.
    """

    def __init__(self, units: int, vocabulary: int, width: int | None = None) -> None:
        super().__init__(width or units, vocabulary)
        self.projection = nn.Linear(units, width, bias=False) if width and width != units else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the logits [..., V] of `hidden` [..., H]."""
        return super().forward(self._projected(hidden))

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Returns the summed nats of `targets` [T, N] under `hidden` [T, N, H], and how many counted."""
        rows = None if mask is None else mask.flatten()
        return linear_cross_entropy(*self._operands(hidden, targets), rows)

    def token_nll(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Returns the nats of each target, [T, N] float64, without gradient; the temperature divides the logits."""
        rows, weight, bias, wanted = self._operands(hidden, targets)
        if temperature != 1:
            rows, bias = rows / temperature, bias / temperature
        return token_nll(rows, weight, bias, wanted).view(targets.shape)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Returns the log-probabilities [..., V] in float32 or wider."""
        return _log_softmax(self(hidden))

    def _projected(self, hidden: Tensor) -> Tensor:
        return hidden if self.projection is None else self.projection(hidden)

    def _operands(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._projected(hidden).flatten(0, 1), self.weight, self.bias, targets.flatten()


class MixtureOfSoftmaxes(nn.Linear):
    """`sum_k pi_k softmax(W l_k + b)` with `l_k = dropout(tanh(L_k h + a_k))` and `pi = softmax(R h)`.

    The gradient of `-log sum_k pi_k p_k` is that of `-sum_k r_k log(pi_k p_k)` with `r_k = pi_k p_k / sum_j pi_j p_j`
    held fixed. So a row of `h` is K weighted rows of a plain softmax, of which no more logits than of that are stored.

    Arguments:
        units: of the last layer, H.
        vocabulary: V.
        width: E of the weight [V, E] and of each latent, so that it can be tied to an embedding.
        experts: K.
        dropout: of the latents [T, N, K * E].

    Source: Yang et al., ICLR 2018 (arXiv 1711.03953).
    """

    def __init__(self, units: int, vocabulary: int, width: int, experts: int, dropout: nn.Module) -> None:
        super().__init__(width, vocabulary)
        self.experts = experts
        self.latent = nn.Linear(units, experts * width)
        self.prior = nn.Linear(units, experts, bias=False)
        self.dropout = dropout

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Returns the summed nats of `targets` [T, N] under `hidden` [T, N, H], and how many counted."""
        latents, log_prior = self._parts(hidden)
        nats, shares = self._scored(latents.detach(), log_prior.detach(), targets)
        if mask is not None:
            nats, shares = nats[mask], shares * mask[..., None]
        rows = (latents.flatten(0, 2), self.weight, self.bias, self._repeated(targets))
        bound = summed_nll(*rows, shares.flatten()) - (shares * log_prior).sum()
        return nats.sum() + (bound - bound.detach()), nats.numel()

    def token_nll(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Returns the nats of each target, [T, N] float64, without gradient; the temperature divides the mixture's
        log-probabilities."""
        with torch.no_grad():
            if temperature != 1:
                return _tempered(self.log_probs, hidden, targets, temperature, self.out_features)
            return self._scored(*self._parts(hidden), targets)[0]

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Returns the log-probabilities [..., V] in float32 or wider."""
        latents, log_prior = self._parts(hidden)
        total: Tensor | None = None
        for k in range(self.experts):
            own = _log_softmax(F.linear(latents[..., k, :], self.weight, self.bias)) + log_prior[..., k : k + 1]
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None
        return total

    def _parts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [..., K, E] and the logarithms of the prior [..., K]."""
        latents = self.dropout(self.latent(hidden).tanh())
        return latents.unflatten(-1, (self.experts, -1)), _log_softmax(self.prior(hidden))

    def _scored(self, latents: Tensor, log_prior: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The nats of each target [T, N] float64, and each expert's share in its probability [T, N, K]."""
        nats = token_nll(latents.flatten(0, 2), self.weight, self.bias, self._repeated(targets))
        joint = log_prior.double() - nats.view(log_prior.shape)
        return -joint.logsumexp(-1), joint.softmax(-1).to(log_prior.dtype)

    def _repeated(self, targets: Tensor) -> Tensor:
        return targets.flatten().repeat_interleave(self.experts)


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's adaptive softmax: frequent words in one softmax, rarer ones in clusters of smaller width.

    Probabilities are exact and sum to one over the whole vocabulary. Ids must be in the order of falling frequency.
    The loss is computed by `linear_cross_entropy`, cluster by cluster, which stores no logits.

    Arguments:
        units: of the last layer, H.
        vocabulary: V.
        cutoffs: the first id of each cluster; None: V / 100 and V / 10.

    Raises:
        UserError: cutoffs that do not rise within 1 … V - 1.

    Source: Grave et al., ICML 2017 (arXiv 1609.04309).
    """

    _starts: Tensor

    def __init__(self, units: int, vocabulary: int, cutoffs: Sequence[int] | None = None) -> None:
        if cutoffs is None:
            cutoffs = sorted({max(1, vocabulary // 100), max(1, vocabulary // 10)})[: 1 + (units >= 16)]
        if not cutoffs or [*cutoffs] != sorted({*cutoffs}) or not 1 <= cutoffs[0] <= cutoffs[-1] < vocabulary:
            raise UserError(
                f"model.cutoffs must rise within 1 … {vocabulary - 1}, the vocabulary less one; got {[*cutoffs]}; "
                "correct them, or set model.cutoffs=none"
            )
        if units < 4 ** len(cutoffs):  # each cluster has a quarter of the width of the one before
            raise UserError(
                f"the last layer must have at least {4 ** len(cutoffs)} units for {len(cutoffs)} clusters; "
                f"got {units}; raise model.hidden_size, or set fewer model.cutoffs"
            )
        super().__init__(units, vocabulary, [*cutoffs])
        self.register_buffer("_starts", torch.tensor(cutoffs), persistent=False)  # of the clusters, on the device

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Returns the summed nats of `targets` [T, N] under `hidden` [T, N, H], and how many counted."""
        rows, wanted = (hidden.flatten(0, 1), targets.flatten()) if mask is None else (hidden[mask], targets[mask])
        parts = [summed_nll(*operands) for _, operands in self._clusters(rows, wanted)]
        return torch.stack(parts).sum(), len(rows)

    def token_nll(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Returns the nats of each target, [T, N] float64, without gradient; the temperature divides the
        log-probabilities."""
        with torch.no_grad():
            if temperature != 1:
                return _tempered(self.log_probs, hidden, targets, temperature, self.n_classes)
            nats = hidden.new_zeros(targets.numel(), dtype=torch.float64)
            for held, operands in self._clusters(hidden.flatten(0, 1), targets.flatten()):
                nats[held] += token_nll(*operands)
            return nats.view(targets.shape)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Returns the log-probabilities [..., V] in float32 or wider."""
        found = self.log_prob(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)
        return found if found.dtype == torch.float64 else found.float()

    def _clusters(
        self, rows: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor | slice, tuple[Tensor, Tensor, Tensor | None, Tensor]]]:
        """Yields rows and what their nats are the sum of: first all in the head, where a cluster is one more class,
        then those of each cluster that has any."""
        starts = self.cutoffs[:-1]
        cluster = torch.bucketize(targets, self._starts, right=True)
        in_head = torch.where(cluster == 0, targets, starts[0] - 1 + cluster)
        yield slice(None), (rows, self.head.weight, self.head.bias, in_head)
        for number, start in enumerate(starts):
            pair: Any = self.tail[number]
            narrow, decoder = pair
            held = (cluster == number + 1).nonzero()[:, 0]  # perhaps none: gradients are then zero, not absent
            yield held, (narrow(rows[held]), decoder.weight, None, targets[held] - start)


Decoder = Softmax | MixtureOfSoftmaxes | AdaptiveSoftmax


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _tempered(
    log_probs: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float, vocabulary: int
) -> Tensor:
    """The nats of each target [T, N] float64 where the log-probabilities are divided by a temperature."""
    count = max(1, _MOST_LOG_PROBS // vocabulary)
    rows = zip(hidden.flatten(0, 1).split(count), targets.flatten().split(count), strict=True)
    found = [-(log_probs(h).double() / temperature).log_softmax(1).gather(1, t[:, None]) for h, t in rows]
    return torch.cat(found).view(targets.shape)
