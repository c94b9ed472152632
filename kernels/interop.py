"""torch tensors in the ops: as NumPy or CuPy views of their memory, on torch's device and stream."""

import functools
import inspect
import sys

import numpy as np

from . import BackendError
from .arguments import is_cupy, kind


def _is_torch(x) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _from_torch(name, tensor):
    """A NumPy or CuPy view of a tensor's memory."""
    if tensor.requires_grad:
        raise TypeError(f"{name} must not be a tensor that requires grad; pass {name}.detach()")
    if tensor.device.type == "cpu":
        try:
            return tensor.numpy()
        except (TypeError, RuntimeError) as error:  # bfloat16, sparse, ...
            raise TypeError(f"{name} has no NumPy view: {error}") from None
    if tensor.device.type != "cuda":
        raise TypeError(f"{name} must be a tensor on cpu or cuda, got one on {tensor.device}")
    try:
        import cupy
    except ImportError:
        raise BackendError("ops on CUDA tensors need CuPy; run `pip install 'cupy-cuda12x[ctk]'`") from None
    return cupy.from_dlpack(tensor)


class _Protocol:
    """A torch stream by the CUDA stream protocol, which not every version of torch speaks."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self):
        return 0, self.stream.cuda_stream


def _cupy_stream(cupy, stream):
    """torch's stream as one of CuPy's."""
    if hasattr(cupy.cuda.Stream, "from_external"):  # since CuPy 14
        return cupy.cuda.Stream.from_external(_Protocol(stream))
    return cupy.cuda.ExternalStream(stream.cuda_stream)


def accepts_torch(op):
    """Let `op` take and return torch tensors, on torch's current device and stream."""
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def wrapped(*args, **kwargs):
        first = args[0] if args else kwargs.get(names[0])
        if type(first) is np.ndarray or not _is_torch(first):
            return op(*args, **kwargs)
        import torch

        views = {}

        def convert(name, x):
            if not _is_torch(x):
                if isinstance(x, np.ndarray) or is_cupy(x):
                    raise TypeError(f"{name} must be a torch tensor like the others, got {kind(x)}")
                return x
            if x.device != first.device:
                raise ValueError(f"{name} must be on {first.device} like the others, got a tensor on {x.device}")
            for view, tensor in views.values():
                if tensor is x:  # the same array twice must stay the same array: out=dy, say
                    return view
            view = _from_torch(name, x)
            views[id(view)] = (view, x)
            return view

        def restore(x):
            if isinstance(x, tuple):
                return tuple(map(restore, x))
            return views[id(x)][1] if id(x) in views else None if x is None else torch.from_dlpack(x)

        def call():
            positional = [convert(name, x) for name, x in zip(names, args)] + list(args[len(names) :])
            return restore(op(*positional, **{name: convert(name, x) for name, x in kwargs.items()}))

        if first.device.type != "cuda":
            return call()
        import cupy

        with cupy.cuda.Device(first.device.index), _cupy_stream(cupy, torch.cuda.current_stream(first.device)):
            return call()

    return wrapped
