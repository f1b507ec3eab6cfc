"""Error messages for gradients that cannot be computed, and the type of a reason that is worth a warning."""


class Failure(str):
    """Why a backend that should run here cannot; `"auto"` warns of it once, since the user may be able to fix it."""


SECOND_BACKWARD = (
    "an online-normalized graph can be run backward once: its control process moves u and v, so a second backward "
    "would give other gradients; run the forward again instead of passing retain_graph=True, or detach the state that "
    "you carry from an earlier call"
)
DOUBLE_BACKWARD = (
    "double backward through online normalization in training mode is not supported: its gradient is a control "
    "process, not a derivative; call backward without create_graph=True"
)
FUSED_DOUBLE_BACKWARD = (
    "double backward through a fused recurrent layer is not supported: its backward pass is not differentiable; call "
    "backward without create_graph=True, or construct the layer with backend='reference'"
)
TRANSFORM = (
    "transforms of torch.func (grad, vjp, jacrev, vmap ...), batches of gradients (is_grads_batched) and forward-mode "
    "derivatives (jvp) are not supported by rnnorm's operators; call autograd's backward for one gradient at a time, "
    "or use backend='reference' with another norm or in evaluation mode"
)
RECOMPUTATION = (
    "an online-normalized layer in training mode cannot be recomputed during backward (activation checkpointing): its "
    "statistics have changed since the first forward; checkpoint other layers, or use another norm or evaluation mode"
)
