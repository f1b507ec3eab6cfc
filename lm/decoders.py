"""Decoders: from the last layer's output to probabilities over the vocabulary, and their losses.

Each has `loss`, `token_nll` and `log_probs`, exact over the whole vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.loss import linear_cross_entropy, token_nll


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
        logits = self(hidden)
        return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)

    def _projected(self, hidden: Tensor) -> Tensor:
        return hidden if self.projection is None else self.projection(hidden)

    def _operands(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._projected(hidden).flatten(0, 1), self.weight, self.bias, targets.flatten()
