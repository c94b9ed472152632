"""Fused kernels for training a classifier: the same ops on NumPy, CuPy and torch arrays.

    from kernels import bias_act, bias_act_backward, softmax_cross_entropy, adam_step, sgd_step, average_step
    from kernels import gather_batch, Augment, shuffle, advance, to_bfloat16
    from kernels import batch_norm_stats, norm_act, norm_act_backward

`kernels.plain` holds the same ops in ordinary array code: the baseline and the reference.
"""


class BackendError(RuntimeError):
    """The compiled kernels for this kind of array cannot be used; the message says what to run."""


from .arguments import ACTIVATIONS  # noqa: E402  (what follows needs BackendError)
from .batch_ops import Augment, advance, gather_batch, shuffle  # noqa: E402
from .norm_ops import batch_norm_stats, norm_act, norm_act_backward  # noqa: E402
from .ops import (  # noqa: E402
    adam_step,
    average_step,
    bias_act,
    bias_act_backward,
    sgd_step,
    softmax_cross_entropy,
    to_bfloat16,
)

__all__ = [
    "ACTIVATIONS",
    "Augment",
    "BackendError",
    "adam_step",
    "advance",
    "average_step",
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
