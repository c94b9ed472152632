"""Fused kernels for training a classifier: the same ops on NumPy, CuPy and torch arrays.

    from kernels import bias_act, bias_act_backward, softmax_cross_entropy, adam_step, sgd_step
    from kernels import gather_batch, shuffle, advance, to_bfloat16
    from kernels import batch_norm_stats, norm_act, norm_act_backward

`kernels.plain` holds the same ops in ordinary array code: the baseline and the reference.
"""


class BackendError(RuntimeError):
    """The compiled kernels for this kind of array cannot be used; the message says what to run."""


from .norm_ops import batch_norm_stats, norm_act, norm_act_backward  # noqa: E402  (ops needs BackendError)
from .ops import (  # noqa: E402
    ACTIVATIONS,
    adam_step,
    advance,
    bias_act,
    bias_act_backward,
    gather_batch,
    sgd_step,
    shuffle,
    softmax_cross_entropy,
    to_bfloat16,
)

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "adam_step",
    "advance",
    "batch_norm_stats",
    "bias_act",
    "bias_act_backward",
    "gather_batch",
    "norm_act",
    "norm_act_backward",
    "sgd_step",
    "shuffle",
    "softmax_cross_entropy",
    "to_bfloat16",
]
