"""The public ops: check the arguments, pick the back end by the kind of array, launch.

Every op takes NumPy, CuPy or torch arrays (torch without a copy, through DLPack), C-contiguous, float32
unless said otherwise, all of one kind and on the current device. Results go into `out=` where it is given. Nothing
synchronises with the GPU. A wrong kind or dtype raises TypeError, a wrong shape or layout ValueError; both
name the argument and what was expected. BackendError says that the compiled kernels are missing.

Letters: B rows of the batch, N columns or elements, C classes, P parameters. Ops on data sets are in batch_ops.py.
"""

import math

from .arguments import (
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    UINT16,
    check,
    check_activation,
    check_number,
    check_output,
    check_scalar,
    check_whole,
)
from .dispatch import backend_of, output
from .interop import accepts_torch


@accepts_torch
def bias_act(z, bias, activation="relu", out=None):
    """act(z + bias): z (B, N), bias (N,) -> (B, N). `out` may be z.

    activation: identity, relu, leaky_relu (slope 0.01), silu, gelu (erf) or gelu_tanh (tanh approximation),
    as in torch.nn.functional.
    """
    backend = backend_of("z", z)
    check("z", z, z, FLOAT32, None, None)
    check("bias", bias, z, FLOAT32, z.shape[1])
    check_activation(activation)
    out = output(backend, "out", out, z, FLOAT32, *z.shape)
    backend.bias_act(z, bias, activation, out)
    return out


@accepts_torch
def bias_act_backward(dy, saved, activation="relu", bias=None, out=None, bias_grad=None):
    """The gradients of bias_act: dy, saved (B, N) -> dz (B, N), dbias (N,), in one pass over dy and saved.

    saved: the pre-activation z + bias, or z where `bias` (N,) is given too; for relu, leaky_relu and identity
    bias_act's output serves as well. dbias = dz.sum(0), added in a fixed order. `out` may be dy.
    """
    backend = backend_of("dy", dy)
    check("dy", dy, dy, FLOAT32, None, None)
    check("saved", saved, dy, FLOAT32, *dy.shape)
    check_activation(activation)
    if bias is not None:
        check("bias", bias, dy, FLOAT32, dy.shape[1])
    out = output(backend, "out", out, dy, FLOAT32, *dy.shape)
    bias_grad = output(backend, "bias_grad", bias_grad, dy, FLOAT32, dy.shape[1])
    backend.bias_act_backward(dy, saved, bias, activation, out, bias_grad)
    return out, bias_grad


@accepts_torch
def softmax_cross_entropy(
    logits, labels, scale=None, out=None, totals=None, confusion=None, classes=None, label_smoothing=0.0,
    class_weights=None,
):  # fmt: skip
    """Loss and gradient: logits (B, N), labels int32 (B,) -> loss (0-d), dlogits (B, N).

    loss = scale * sum of the row losses -log softmax(logits)[label]; scale defaults to 1 / B, which makes it
    the mean; an explicit scale lets chunks of a larger batch add up. dlogits is its gradient. A label outside
    [0, C) or a NaN logit makes the loss and that row of dlogits NaN. `out` may be logits.
    label_smoothing: e in [0, 1); the target is then 1 - e at the label and e / C at every class, as in
    torch.nn.functional.cross_entropy. class_weights: float32 (C,); a row's loss, smoothed or not, is multiplied by
    the weight of its label. The scale stays what it is: weights of mean 1 over the rows keep the loss a mean.
    totals: float64 (2,), to which the sum of the row losses and the number of rows whose label is the first
    largest logit are added: an epoch's loss and accuracy without leaving the device.
    confusion: int64 (C, C), to which each row with a label in [0, C) adds 1 at [label, prediction]: the first
    largest logit, NaN passed over, or class 0 where all logits are NaN.
    classes: C, by default N. The columns from C on are padding: never read, and 0 in dlogits.
    """
    backend = backend_of("logits", logits)
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
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    if class_weights is not None:
        check("class_weights", class_weights, logits, FLOAT32, C)
    out = output(backend, "out", out, logits, FLOAT32, B, N)
    if totals is not None:
        check_output("totals", totals, logits, FLOAT64, 2)
    if confusion is not None:
        check_output("confusion", confusion, logits, INT64, C, C)
    loss = backend.empty(())
    backend.softmax_cross_entropy(
        logits, labels, C, scale, label_smoothing, class_weights, out, loss, totals, confusion
    )
    return loss, out


@accepts_torch
def adam_step(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    """One Adam step on flat arrays (P,), in place on p, m and v, in one launch (Kingma & Ba 2015).

    As torch.optim.Adam: weight_decay * p is added to the gradient g, or with decoupled=True as
    torch.optim.AdamW: p shrinks by lr * weight_decay. step counts from 1; step and lr may also be float32
    arrays of one element on the device of p. Returns None.
    """
    backend = backend_of("p", p)
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
    backend = backend_of("p", p)
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
def average_step(average, p, *, decay, step):
    """Moves the exponential moving average of parameters on, flat arrays (P,), in place on average, in one launch.

    average += (1 - d) * (p - average) with d = min(decay, (1 + step) / (10 + step)): the first parameters, which are
    random, are soon forgotten (TensorFlow's ExponentialMovingAverage with num_updates). step counts from 1; it may
    also be a float32 array of one element on the device of p, as in adam_step. Returns None.
    """
    backend = backend_of("average", average)
    check_output("average", average, average, FLOAT32, None)
    check("p", p, average, FLOAT32, average.size)
    check_number("decay", decay, 0.0, 1.0)
    check_scalar("step", step, average, 1)
    backend.average_step(average, p, decay, step)


@accepts_torch
def to_bfloat16(x, out=None):
    """x float32, of any shape -> the bits of its bfloat16, uint16 of that shape, rounded to nearest, ties to even.

    NaN stays NaN, with its sign; infinities, zeros and their signs are exact, and denormals are rounded like other
    numbers. For torch, result.view(torch.bfloat16) are the numbers themselves.
    """
    backend = backend_of("x", x)
    check("x", x, x, FLOAT32, *x.shape)
    out = output(backend, "out", out, x, UINT16, *x.shape)
    backend.to_bfloat16(x, out)
    return out
