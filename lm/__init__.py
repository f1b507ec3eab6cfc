"""Language models on `rnnorm`'s layers: corpora, tokenizers, training, exact evaluation, sampling.

`python -m lm --help` is the way in; the modules are plain functions and classes for use from Python.
"""
