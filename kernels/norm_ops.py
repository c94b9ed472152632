"""The public ops of batch normalisation and dropout, around the activation; see ops.py for what all ops share."""

from typing import NamedTuple

from .arguments import FLOAT32, check, check_activation, check_number, check_output, check_scalar, check_whole
from .dispatch import backend_of, output
from .interop import accepts_torch
from .plain_norm import dropout_threshold


class Norm(NamedTuple):
    """What normalises columns: arrays (N,), or None for all where there is no normalisation, and the number eps."""

    mean: object
    var: object
    weight: object
    eps: float


class Dropout(NamedTuple):
    """What decides which elements are dropped: those whose random word is below `threshold`; scale is 1 / (1 - p)."""

    threshold: int
    scale: float
    seed: int
    layer: int
    step: object
    row: int


@accepts_torch
def batch_norm_stats(z, *, mean=None, var=None, running_mean=None, running_var=None, momentum=0.1):
    """The statistics of a batch: z (B, N) -> mean (N,), var (N,) of its columns, var divided by B; in one pass.

    running_mean, running_var: float32 (N,), both or neither, updated in place as by torch.nn.BatchNorm1d in training:
    running += momentum * (batch's - running), with the variance divided by B - 1 there (by 1 where B is 1). momentum is
    from 0 to 1. For B = 0, mean and var are NaN, and the running ones stay as they are. A NaN in a column makes its
    statistics NaN, and an infinity makes them infinite or NaN.
    Welford's algorithm (1962), parts merged as by Chan et al. (1979) in an order that depends on the shape alone.
    """
    backend = backend_of("z", z)
    check("z", z, z, FLOAT32, None, None)
    N = z.shape[1]
    check_number("momentum", momentum, 0.0)
    if momentum > 1.0:
        raise ValueError(f"momentum must be at most 1, got {momentum!r}")
    mean = output(backend, "mean", mean, z, FLOAT32, N)
    var = output(backend, "var", var, z, FLOAT32, N)
    _check_together(running_mean=running_mean, running_var=running_var)
    if running_mean is not None:
        check_output("running_mean", running_mean, z, FLOAT32, N)
        check_output("running_var", running_var, z, FLOAT32, N)
    backend.batch_norm_stats(z, mean, var, running_mean, running_var, momentum)
    return mean, var


@accepts_torch
def norm_act(
    z, bias, activation="relu", *, mean=None, var=None, weight=None, eps=1e-5, dropout=0.0, seed=0, layer=0, step=None,
    row=0, out=None,
):  # fmt: skip
    """act(u), with dropout: z (B, N), bias (N,) -> (B, N). u = z + bias, or where mean, var and weight (N,) are given,
    all or none of them, u = (z - mean) / sqrt(var + eps) * weight + bias, which is batch normalisation (Ioffe & Szegedy
    2015). `out` may be z, if nobody needs the gradient.

    dropout: the probability p, from 0 to below 1, with which an element of act(u) becomes 0; the others are divided by
    1 - p (Srivastava et al. 2014). Which ones depends on seed (64 bits), layer (24 bits), step, the row's number in
    the whole batch, of which `row` is that of the first one here, and the column alone: on every device the same
    (Philox4x32-10, Salmon et al. 2011). step: a number from 0 on, or a float32 array of one element beside z, which is
    read when the kernel runs; it counts exactly up to 2^24. NaN stays NaN, dropped or not. See kernels.bias_act.
    """
    backend = backend_of("z", z)
    norm, settings = _settings(z, bias, activation, Norm(mean, var, weight, eps), dropout, seed, layer, step, row)
    out = output(backend, "out", out, z, FLOAT32, *z.shape)
    backend.norm_act(z, bias, activation, norm, settings, out)
    return out


@accepts_torch
def norm_act_backward(
    dy, z, bias, activation="relu", *, mean=None, var=None, weight=None, eps=1e-5, dropout=0.0, seed=0, layer=0,
    step=None, row=0, out=None, bias_grad=None, weight_grad=None,
):  # fmt: skip
    """The gradients of norm_act with the same z and settings: dy (B, N) -> dz (B, N), dbias (N,), dweight (N,) or None.

    Where mean, var and weight are given, mean and var must be those of this batch (batch_norm_stats): the gradient goes
    through them, too, as torch.nn.BatchNorm1d's in training. Otherwise there is no weight, and dweight is None. Sums
    are added in a fixed order. The dropout mask is computed again. `out` may be dy, and z is left as it is.
    """
    backend = backend_of("dy", dy)
    check("dy", dy, dy, FLOAT32, None, None)
    check("z", z, dy, FLOAT32, *dy.shape)
    norm, settings = _settings(z, bias, activation, Norm(mean, var, weight, eps), dropout, seed, layer, step, row)
    if out is z:
        raise ValueError("out must not be z, which is read again after it is written; pass dy or another array")
    if mean is None and weight_grad is not None:
        raise ValueError("weight_grad must be None where mean, var and weight are: there is no weight then")
    N = dy.shape[1]
    out = output(backend, "out", out, dy, FLOAT32, *dy.shape)
    bias_grad = output(backend, "bias_grad", bias_grad, dy, FLOAT32, N)
    if mean is not None:
        weight_grad = output(backend, "weight_grad", weight_grad, dy, FLOAT32, N)
    backend.norm_act_backward(dy, z, bias, activation, norm, settings, out, bias_grad, weight_grad)
    return out, bias_grad, weight_grad


def _check_together(**arrays):
    """Raise unless all of the arrays are given or none."""
    missing = [name for name, array in arrays.items() if array is None]
    if missing and len(missing) < len(arrays):
        raise ValueError(f"{missing[0]} must be given where one of {', '.join(arrays)} is, got None")


def _settings(z, bias, activation, norm, dropout, seed, layer, step, row):
    """What norm_act and its gradient share, checked: Norm and Dropout."""
    check("z", z, z, FLOAT32, None, None)
    B, N = z.shape
    check("bias", bias, z, FLOAT32, N)
    check_activation(activation)
    arrays = dict(mean=norm.mean, var=norm.var, weight=norm.weight)
    _check_together(**arrays)
    for name, array in arrays.items():
        if array is not None:
            check(name, array, z, FLOAT32, N)
    check_number("eps", norm.eps, 0.0)
    check_number("dropout", dropout, 0.0, 1.0)
    check_whole("seed", seed, 0, 2**64)
    check_whole("layer", layer, 0, 2**24)
    check_whole("row", row, 0, 2**32)
    if row + B > 2**32:
        raise ValueError(f"row must be at most 2^32 - {B}, the number of rows of z, got {row}")
    step = 0 if step is None else step
    check_scalar("step", step, z, 0)
    return norm, Dropout(dropout_threshold(dropout), 1.0 / (1.0 - dropout), int(seed), int(layer), step, int(row))
