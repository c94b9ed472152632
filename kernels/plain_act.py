"""act(z + bias) and its gradients in ordinary array code: see plain.py."""

import math

import numpy as np

from .plain_random import array_module

LEAKY_SLOPE = 0.01
_ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def _erf(x):
    if array_module(x) is np:
        from scipy.special import erf
    else:
        from cupyx.scipy.special import erf
    return erf(x)


def _sigmoid(xp, u):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + xp.exp(-u))


def _gelu_cdf(u):
    return 0.5 * (1.0 + _erf(u * math.sqrt(0.5)))


def _gelu_tanh_argument(u):
    return _ROOT_2_OVER_PI * (u + 0.044715 * u * u * u)


def _gelu_tanh_cdf(xp, u):
    return 0.5 * (1.0 + xp.tanh(_gelu_tanh_argument(u)))


_FORWARD = {
    "leaky_relu": lambda xp, u: xp.maximum(u, LEAKY_SLOPE * u),
    "silu": lambda xp, u: u * _sigmoid(xp, u),
    "gelu": lambda xp, u: u * _gelu_cdf(u),
    "gelu_tanh": lambda xp, u: u * _gelu_tanh_cdf(xp, u),
}


def _logistic(xp, u):
    """sigmoid(u) and its derivative, which 1 - sigmoid(u) would give with a large error for u >> 0."""
    e = xp.exp(-xp.abs(u))
    r = 1.0 / (1.0 + e)
    return xp.where(u < 0, e * r, r), e * r * r


def _silu_slope(xp, u):
    value, slope = _logistic(xp, u)
    return value + u * slope


def _gelu_tanh_slope(xp, u):
    value, slope = _logistic(xp, 2.0 * _gelu_tanh_argument(u))
    return value + u * slope * (2.0 * _ROOT_2_OVER_PI) * (1.0 + 3 * 0.044715 * u * u)


_SLOPE = {
    "relu": lambda xp, u: ~(u <= 0),  # 1 where u is NaN, as in torch
    "leaky_relu": lambda xp, u: xp.where(u > 0, 1.0, LEAKY_SLOPE).astype(u.dtype),
    "silu": _silu_slope,
    "gelu": lambda xp, u: _gelu_cdf(u) + u * xp.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi),
    "gelu_tanh": _gelu_tanh_slope,
}


def bias_act(z, bias, activation="relu", out=None):
    xp = array_module(z)
    out = xp.add(z, bias, out=out)
    if activation == "relu":
        xp.maximum(out, 0, out=out)
    elif activation != "identity":
        out[...] = _FORWARD[activation](xp, out)
    return out


def bias_act_backward(dy, saved, activation="relu", bias=None, out=None, bias_grad=None):
    xp = array_module(dy)
    out = xp.empty_like(dy) if out is None else out
    u = saved if bias is None else saved + bias
    if activation == "identity":
        if out is not dy:
            out[...] = dy
    else:
        xp.multiply(dy, _SLOPE[activation](xp, u), out=out)
    return out, out.sum(axis=0, out=bias_grad)
