"""The decoder's loss: `rnnorm.functional`'s, under the name that `lm` documents."""

from rnnorm import functional

linear_cross_entropy = functional.linear_cross_entropy
summed_nll = functional.summed_nll
token_nll = functional.token_nll
