"""Fused kernels for training a classifier: the same five ops on NumPy, CuPy and torch arrays.

    from kernels import bias_act, bias_act_backward, softmax_cross_entropy, adam_step, sgd_step, gather_batch

`kernels.plain` holds the same ops in ordinary array code: the baseline and the reference.
"""


class BackendError(RuntimeError):
    """The compiled kernels for this kind of array cannot be used; the message says what to run."""


from .ops import (  # noqa: E402  (ops needs BackendError)
    ACTIVATIONS,
    adam_step,
    bias_act,
    bias_act_backward,
    gather_batch,
    sgd_step,
    softmax_cross_entropy,
)

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "adam_step",
    "bias_act",
    "bias_act_backward",
    "gather_batch",
    "sgd_step",
    "softmax_cross_entropy",
]
