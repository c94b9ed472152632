"""A GPU with streams, events and graphs, simulated on NumPy: for what the learner does with a captured step.

The array module is stand_in_gpu's. Ops and products run at once on the host, or while a stream is being captured are
noted as the graph's nodes, each after what its stream has waited for. A launch executes the nodes in an order that the
edges allow and the seed picks, so that an edge that is missing shows.
"""

import contextlib
import random
import sys
from types import SimpleNamespace

import numpy as np

import kernels
from mlp.device import Device
from mlp.gemm import ArrayGemm
from mlp.products import Products

from . import stand_in_gpu


class Event:
    """What a stream had been given when it was recorded: nodes of a capture, or copies, which happen only when
    someone waits for them."""

    def __init__(self, after, copies):
        self.after, self.copies = tuple(after), copies

    def synchronize(self):
        while self.copies:
            self.copies.pop(0)()


class Graph:
    def __init__(self, gpu, nodes):
        self.gpu, self.nodes, self.launches = gpu, nodes, 0

    def upload(self, stream):
        pass

    def launch(self, stream):
        assert stream is self.gpu.main and not self.gpu.capturing
        self.launches += 1
        done, waiting = set(), list(range(len(self.nodes)))
        while waiting:
            ready = [k for k in waiting if done.issuperset(self.nodes[k].after)]
            k = self.gpu.random.choice(ready)
            waiting.remove(k)
            done.add(k)
            self.nodes[k].call()


class Stream:
    def __init__(self, gpu):
        self.gpu, self.after, self.copies = gpu, (), []
        gpu.streams.append(self)

    def __enter__(self):
        self.gpu.current.append(self)

    def __exit__(self, *_):
        assert self.gpu.current.pop() is self

    def record(self):
        return Event(self.after, self.copies)

    def wait_event(self, event):
        event.synchronize()
        if self.gpu.capturing:
            self.after = tuple({*self.after, *event.after})

    def begin_capture(self):
        assert not self.gpu.capturing and self.gpu.current[-1] is self
        self.gpu.capturing, self.gpu.main = True, self
        self.gpu.nodes = []
        for stream in self.gpu.streams:
            stream.after = ()

    def end_capture(self):
        assert self.gpu.capturing and self.gpu.main is self
        self.gpu.capturing = False
        self.gpu.check_joined()
        return Graph(self.gpu, self.gpu.nodes)

    def synchronize(self):
        assert not self.gpu.capturing


class Gpu:
    """device: what the learner computes on. products: what it multiplies with, NumPy's. graphs: all that were made."""

    def __init__(self, monkeypatch, seed=0, chunk_rows=2048):
        self.random, self.capturing, self.current, self.main = random.Random(seed), False, [], None
        self.streams, self.nodes, self.calls, self.free = [], [], 0, 2**40
        cupy = stand_in_gpu.install(monkeypatch)
        self.null = Stream(self)
        self.current.append(self.null)
        cupy.cuda.Stream = lambda non_blocking=False: Stream(self)
        cupy.cuda.get_current_stream = lambda: self.current[-1]
        cupy.cuda.runtime = SimpleNamespace(memGetInfo=lambda: (self.free, self.free))
        monkeypatch.setattr(sys.modules["cupyx"], "empty_pinned", np.empty, raising=False)
        cupy.copyto, cupy.add = self.deferred(np.copyto), self.deferred(np.add)
        self.ops = SimpleNamespace(**{n: self.deferred(getattr(kernels, n)) for n in kernels.__all__
                                      if callable(getattr(kernels, n)) and n != "BackendError"})  # fmt: skip
        self.device = _Device("cuda", "simulated", cupy, self.ops, chunk_rows)
        gemm = ArrayGemm(np)
        library = SimpleNamespace(captures=True, workspace_bytes=1000, **{
            name: self.deferred(getattr(gemm, name)) for name in ("forward", "input_gradient", "weight_gradient")
        })  # fmt: skip
        self.products = Products(library)

    def deferred(self, function):
        """`function`, which becomes a node while a stream is captured."""

        def call(*args, **kwargs):
            if not self.capturing:
                self.calls += 1
                return function(*args, **kwargs)
            stream = self.current[-1]
            self.nodes.append(SimpleNamespace(after=stream.after, call=lambda: function(*args, **kwargs)))
            stream.after = (len(self.nodes) - 1,)

        call.__name__ = getattr(function, "__name__", "call")
        return call

    def check_joined(self):
        unjoined = set(range(len(self.nodes))) - self.ancestors(self.main.after)
        assert not unjoined, "a branch of the graph was not joined"

    def ancestors(self, after) -> set:
        found, open_ = set(), list(after)
        while open_:
            k = open_.pop()
            if k not in found:
                found.add(k)
                open_ += self.nodes[k].after
        return found


class _Device(Device):
    @property
    def fused(self):
        return True

    def synchronize(self):
        pass

    def numpy(self, array):
        return np.array(array)


@contextlib.contextmanager
def nothing_runs(gpu):
    """That only graphs are launched in this block."""
    before = gpu.calls
    yield
    assert gpu.calls == before
