"""The public ops: check the arguments, pick the back end by the kind of array, launch.

Every op takes NumPy, CuPy or torch arrays (torch without a copy, through DLPack), C-contiguous, float32
unless said otherwise, all of one kind and on the current device. Results go into `out=` where it is given. Nothing
synchronises with the GPU. A wrong kind or dtype raises TypeError, a wrong shape or layout ValueError; both
name the argument and what was expected. BackendError says that the compiled kernels are missing.

Letters: B rows of the batch, N columns or elements, C classes, P parameters, M images, D pixels.
"""

import functools
import math

import numpy as np

from .arguments import (
    ACTIVATIONS,
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    UINT8,
    UINT16,
    check,
    check_activation,
    check_number,
    check_output,
    check_scalar,
    check_whole,
    is_cupy,
    one_element,
)
from .interop import accepts_torch


@functools.cache
def _host():
    from . import host

    return host


def _backend(name, array):
    """What holds the compiled ops for this kind of array."""
    if isinstance(array, np.ndarray):
        return _host()
    if is_cupy(array):
        from . import cuda

        cuda.check_device(name, array)
        return cuda.ops
    raise TypeError(f"{name} must be a NumPy, CuPy or torch array, got {type(array).__name__}")


def _output(backend, name, array, like, dtype, *shape):
    """The array to write a result into: the caller's, checked, or a new one."""
    if array is None:
        return backend.empty(shape, dtype)
    check_output(name, array, like, dtype, *shape)
    return array


@accepts_torch
def bias_act(z, bias, activation="relu", out=None):
    """act(z + bias): z (B, N), bias (N,) -> (B, N). `out` may be z.

    activation: identity, relu, leaky_relu (slope 0.01), silu, gelu (erf) or gelu_tanh (tanh approximation),
    as in torch.nn.functional.
    """
    backend = _backend("z", z)
    check("z", z, z, FLOAT32, None, None)
    check("bias", bias, z, FLOAT32, z.shape[1])
    check_activation(activation)
    out = _output(backend, "out", out, z, FLOAT32, *z.shape)
    backend.bias_act(z, bias, activation, out)
    return out


@accepts_torch
def bias_act_backward(dy, saved, activation="relu", bias=None, out=None, bias_grad=None):
    """The gradients of bias_act: dy, saved (B, N) -> dz (B, N), dbias (N,), in one pass over dy and saved.

    saved: the pre-activation z + bias, or z where `bias` (N,) is given too; for relu, leaky_relu and identity
    bias_act's output serves as well. dbias = dz.sum(0), added in a fixed order. `out` may be dy.
    """
    backend = _backend("dy", dy)
    check("dy", dy, dy, FLOAT32, None, None)
    check("saved", saved, dy, FLOAT32, *dy.shape)
    check_activation(activation)
    if bias is not None:
        check("bias", bias, dy, FLOAT32, dy.shape[1])
    out = _output(backend, "out", out, dy, FLOAT32, *dy.shape)
    bias_grad = _output(backend, "bias_grad", bias_grad, dy, FLOAT32, dy.shape[1])
    backend.bias_act_backward(dy, saved, bias, activation, out, bias_grad)
    return out, bias_grad


@accepts_torch
def softmax_cross_entropy(logits, labels, scale=None, out=None, totals=None, confusion=None, classes=None):
    """Loss and gradient: logits (B, N), labels int32 (B,) -> loss (0-d), dlogits (B, N).

    loss = scale * sum of the row losses -log softmax(logits)[label]; scale defaults to 1 / B, which makes it
    the mean; an explicit scale lets chunks of a larger batch add up. dlogits is its gradient. A label outside
    [0, C) or a NaN logit makes the loss and that row of dlogits NaN. `out` may be logits.
    totals: float64 (2,), to which the sum of the row losses and the number of rows whose label is the first
    largest logit are added: an epoch's loss and accuracy without leaving the device.
    confusion: int64 (C, C), to which each row with a label in [0, C) adds 1 at [label, prediction]: the first
    largest logit, NaN passed over, or class 0 where all logits are NaN.
    classes: C, by default N. The columns from C on are padding: never read, and 0 in dlogits.
    """
    backend = _backend("logits", logits)
    check("logits", logits, logits, FLOAT32, None, None)
    B, N = logits.shape
    if N < 1:
        raise ValueError(f"logits must have at least one class, got shape {logits.shape}")
    C = N
    if classes is not None:
        check_whole("classes", classes)
        if not 1 <= classes <= N:
            raise ValueError(f"classes must be from 1 to the number of columns of logits, {N}, got {classes}")
        C = int(classes)
    check("labels", labels, logits, INT32, B)
    if scale is None:
        scale = 1.0 / B if B else math.nan
    else:
        check_number("scale", scale)
    out = _output(backend, "out", out, logits, FLOAT32, B, N)
    if totals is not None:
        check_output("totals", totals, logits, FLOAT64, 2)
    if confusion is not None:
        check_output("confusion", confusion, logits, INT64, C, C)
    loss = backend.empty(())
    backend.softmax_cross_entropy(logits, labels, C, scale, out, loss, totals, confusion)
    return loss, out


@accepts_torch
def adam_step(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    """One Adam step on flat arrays (P,), in place on p, m and v, in one launch (Kingma & Ba 2015).

    As torch.optim.Adam: weight_decay * p is added to the gradient g, or with decoupled=True as
    torch.optim.AdamW: p shrinks by lr * weight_decay. step counts from 1; step and lr may also be float32
    arrays of one element on the device of p. Returns None.
    """
    backend = _backend("p", p)
    check_output("p", p, p, FLOAT32, None)
    check("g", g, p, FLOAT32, p.size)
    check_output("m", m, p, FLOAT32, p.size)
    check_output("v", v, p, FLOAT32, p.size)
    check_scalar("step", step, p, 1)
    check_scalar("lr", lr, p, 0.0)
    check_number("beta1", beta1, 0.0, 1.0)
    check_number("beta2", beta2, 0.0, 1.0)
    check_number("eps", eps, 0.0)
    check_number("weight_decay", weight_decay, 0.0)
    backend.adam_step(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, decoupled)


@accepts_torch
def sgd_step(p, g, velocity=None, *, lr, momentum=0.0, weight_decay=0.0):
    """One SGD step on flat arrays (P,), in place on p and velocity, in one launch, as torch.optim.SGD.

    velocity may be None where momentum is 0. lr may be a float32 array of one element on the device of p.
    Returns None.
    """
    backend = _backend("p", p)
    check_output("p", p, p, FLOAT32, None)
    check("g", g, p, FLOAT32, p.size)
    check_scalar("lr", lr, p, 0.0)
    check_number("momentum", momentum, 0.0)
    check_number("weight_decay", weight_decay, 0.0)
    if velocity is not None:
        check_output("velocity", velocity, p, FLOAT32, p.size)
    elif momentum:
        raise ValueError(f"velocity must be an array of shape {p.shape} where momentum is {momentum}, got None")
    backend.sgd_step(p, g, velocity, lr, momentum, weight_decay)


@accepts_torch
def gather_batch(
    images, labels, index, *, offset=None, out_x=None, out_y=None, mean=0.0, scale=1.0, noise_sigma=0.0, seed=0,
    numbers=None, affine=None,
):  # fmt: skip
    """A batch from a uint8 dataset: images (M, D) uint8, labels (M,) int32, index (B,) int32
    -> x (B, D) float32 = (pixel / 255 + noise_sigma * normal - mean) * scale, y (B,) int32.

    The noise depends on `seed` (64 bits), the image's index and the pixel alone, so it is the same for any
    batch size and order (Philox4x32-10, Salmon et al. 2011). numbers: int32 (M,), what counts as the images' indices
    then, where they are a part of a data set. affine: float32 (B, 2, 3), for square images:
    the matrix that takes an output pixel's (column, row, 1) from the centre to the source pixel's, sampled
    bilinearly, 0 outside. An index outside [0, M) gives a NaN row and label -1.
    offset: int64 array of one element, which is read when the kernel runs: the batch is then
    index[offset : offset + B] of an index of any length, where B is the number of rows of `out_x`, which must
    be given; a position outside the index gives a NaN row and label -1, too.
    """
    backend = _backend("images", images)
    check("images", images, images, UINT8, None, None)
    M, D = images.shape
    if D < 1:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    check("labels", labels, images, INT32, M)
    check("index", index, images, INT32, None)
    B, side = index.size, math.isqrt(D)
    if numbers is not None:
        check("numbers", numbers, images, INT32, M)
    if offset is not None:
        check("offset", offset, images, INT64, *one_element(offset))
        if out_x is None:
            raise ValueError("out_x must be given where offset is: its rows say how many images the batch has")
        check_output("out_x", out_x, images, FLOAT32, None, D)
        B = out_x.shape[0]
    if affine is not None:
        check("affine", affine, images, FLOAT32, B, 2, 3)
        if side * side != D:
            raise ValueError(f"affine needs square images, got {D} pixels")
    check_number("mean", mean)
    check_number("scale", scale)
    check_number("noise_sigma", noise_sigma, 0.0)
    check_whole("seed", seed, 0, 2**64)
    out_x = _output(backend, "out_x", out_x, images, FLOAT32, B, D)
    out_y = _output(backend, "out_y", out_y, images, INT32, B)
    backend.gather_batch(
        images, labels, numbers, index, offset, affine, out_x, out_y, side, mean, scale, noise_sigma, int(seed)
    )
    return out_x, out_y


@accepts_torch
def advance(offset, by, step=None):
    """offset (int64, one element) += by, a whole number from 0 on, and step (float32, one element) += 1, in place.

    In one launch, so that a captured training step moves on by itself: the offset is gather_batch's and the step
    adam_step's, which counts exactly up to 2^24. Returns None.
    """
    backend = _backend("offset", offset)
    check_output("offset", offset, offset, INT64, *one_element(offset))
    check_whole("by", by, 0, 2**63)
    if step is not None:
        check_output("step", step, offset, FLOAT32, *one_element(step))
    backend.advance(offset, int(by), step)


@accepts_torch
def shuffle(index, *, seed=0, epoch=0, out=None):
    """The elements of index, int32 (N,), in a random order -> int32 (N,); N is at most 2^31.

    The order depends on `seed` (64 bits), `epoch` (32 bits) and N alone: it is the same on every device. `out`
    must not share memory with index. A Feistel network with cycle walking permutes the positions (see
    src/shuffle.cuh; after Mitchell et al., "Bandwidth-optimal random shuffling for GPUs", 2021).
    """
    backend = _backend("index", index)
    check("index", index, index, INT32, None)
    if index.size > 2**31:
        raise ValueError(f"index must have at most 2^31 elements, got {index.size}")
    check_whole("seed", seed, 0, 2**64)
    check_whole("epoch", epoch, 0, 2**32)
    if out is index:
        raise ValueError("out must not be index, which is read in another order; pass another array")
    out = _output(backend, "out", out, index, INT32, index.size)
    backend.shuffle(index, out, int(seed), int(epoch))
    return out


@accepts_torch
def to_bfloat16(x, out=None):
    """x float32, of any shape -> the bits of its bfloat16, uint16 of that shape, rounded to nearest, ties to even.

    NaN stays NaN, with its sign; infinities, zeros and their signs are exact, and denormals are rounded like other
    numbers. For torch, result.view(torch.bfloat16) are the numbers themselves.
    """
    backend = _backend("x", x)
    check("x", x, x, FLOAT32, *x.shape)
    out = _output(backend, "out", out, x, UINT16, *x.shape)
    backend.to_bfloat16(x, out)
    return out
