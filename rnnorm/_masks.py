"""Dropout inside the recurrence: the masks of one call, drawn before the loop from torch's random generator.

So equal seeds give equal masks on every backend. Every function is also valid TorchScript.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rates(NamedTuple):
    """Probabilities that an entry is dropped, and that a unit of a state keeps its old value."""

    weight: float
    recurrent: float
    zoneout_h: float
    zoneout_c: float


def dropped(weight: Tensor, rate: float, training: bool) -> Tensor:
    """`weight` with each entry zeroed with probability `rate` and the others scaled by 1 / (1 - rate); unchanged in
    evaluation mode. Source: Wan et al., ICML 2013 (DropConnect); Merity et al., 2017 (arXiv 1708.02182)."""
    return F.dropout(weight, rate, training)


def recurrent(rate: float, training: bool, h: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The factors [N, P] of h in the recurrent product, the same at all steps; None if nothing is dropped.

    Source: Gal and Ghahramani, NeurIPS 2016 (arXiv 1512.05287).
    """
    if rate == 0.0 or not training:
        return None
    if rate == 1.0:
        return torch.zeros(h.size(), dtype=dtype, device=h.device)
    kept = torch.rand(h.size(), dtype=torch.float32, device=h.device) >= rate
    return kept.to(dtype).div_(1.0 - rate)


def zoneout(rate: float, training: bool, T: int, state: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The share of the old state [N, *] that is kept, [T, N, *]: in training mode bool, true with probability `rate`;
    in evaluation mode its expectation in `dtype`. None if `rate` is 0.

    Source: Krueger et al., ICLR 2017 (arXiv 1606.01305).
    """
    if rate == 0.0:
        return None
    shape = [T, state.size(0), state.size(1)]
    if not training:
        return torch.full([1, 1, 1], rate, dtype=dtype, device=state.device).expand(shape)
    return torch.rand(shape, dtype=torch.float32, device=state.device) < rate


def reversed_reset(reset: Tensor, lengths: Tensor | None) -> Tensor:
    """Where the state of a reverse direction is reset: at the last step of each sequence that another one follows.

    `reset` [T, N] marks the first steps. The first step that the direction takes has the initial state.
    """
    T = reset.size(0)
    after = torch.cat((reset[1:], torch.zeros_like(reset[:1])))
    if lengths is not None:
        steps = torch.arange(1, T + 1, device=reset.device)
        after = after & (steps.unsqueeze(1) < lengths.to(reset.device).unsqueeze(0))
    return after
