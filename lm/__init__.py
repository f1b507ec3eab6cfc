"""Language models on `rnnorm`'s layers: corpora, tokenizers, training, exact evaluation, sampling.

`python -m lm --help` is the command line. From Python:

    >>> import lm
    >>> model = lm.load("runs/mine")
    >>> model.score("the cat sat on the mat\\n").ppl
    >>> model.next_words("the cat", 5)
    >>> model.sample("the cat", length=20)

The other modules are plain functions and classes, for use from Python too.
"""

from typing import TYPE_CHECKING

from lm.errors import UserError, missing_package

if TYPE_CHECKING:
    from lm.evaluator import Score
    from lm.trained import Token, TrainedModel, load

__all__ = ["Score", "Token", "TrainedModel", "UserError", "load"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports the toolkit when it is used: the command line must start without its packages, to name them."""
        if name not in __all__:
            raise AttributeError(f"module 'lm' has no attribute {name!r}")
        try:
            from lm import trained
        except ModuleNotFoundError as fault:
            raise ImportError(missing_package(fault)) from fault
        return getattr(trained, name)
