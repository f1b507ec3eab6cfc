"""What is said when a backend cannot give a gradient, and the kind of reason that is worth a warning."""


class Failure(str):
    """Why a backend that should run here cannot: `"auto"` says it once, since the user may want to mend it."""


SECOND_BACKWARD = (
    "an online-normalized graph can be run backward once: its control process moves u and v, so a second backward "
    "would give other gradients; run the forward again instead of passing retain_graph=True"
)
DOUBLE_BACKWARD = (
    "double backward through a recurrent layer of rnnorm is not supported: the gradient of online normalization is a "
    "control process, and the fused backward is not differentiable; call backward without create_graph=True"
)
RECOMPUTATION = (
    "an online-normalized layer in training mode cannot be recomputed during backward (activation checkpointing): its "
    "statistics have moved since the first forward; checkpoint other layers, or use another norm or evaluation mode"
)
