"""rnnorm: drop-in replacements for torch's recurrent layers, with online, layer, RMS or no normalization."""

from rnnorm import distributed, functional, norms
from rnnorm._cells import CELLS
from rnnorm._convert import convert_batchnorm
from rnnorm._gates import gates
from rnnorm._layers import GRU, LSTM, RNN
from rnnorm._module import Options
from rnnorm._online_norm import OnlineNorm
from rnnorm._single_step import GRUCell, LSTMCell, RNNCell
from rnnorm.ops import BackendUnavailable, backends, why_not_bfloat16

__version__ = "0.1.0"
__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "BackendUnavailable",
    "GRUCell",
    "LSTMCell",
    "OnlineNorm",
    "Options",
    "RNNCell",
    "backends",
    "convert_batchnorm",
    "distributed",
    "functional",
    "gates",
    "norms",
    "why_not_bfloat16",
]
