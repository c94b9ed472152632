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
from kernels import cuda, gemm
from mlp.device import Device
from mlp.gemm import ArrayGemm
from mlp.products import Products

from . import fake_nvmath, stand_in_gpu


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
        self.ptr = len(gpu.streams)

    def is_capturing(self):
        return self.gpu.capturing

    def do(self, work, name=""):
        """Work at once, or as a node of the graph that is being captured."""
        if not self.gpu.capturing:
            self.gpu.calls += 1
            return work()
        self.gpu.nodes.append(SimpleNamespace(after=self.after, call=work, name=name))
        self.after = (len(self.gpu.nodes) - 1,)

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
    """device: what the learner computes on. products: by NumPy, captured; there are stand-ins for nvmath and for our
    own products as well."""

    def __init__(self, monkeypatch, seed=0, chunk_rows=2048):
        self.random, self.capturing, self.current, self.main = random.Random(seed), False, [], None
        self.streams, self.nodes, self.calls, self.free = [], [], 0, 2**40
        self.cupy = cupy = stand_in_gpu.install(monkeypatch)
        self.nvmath = fake_nvmath.install(monkeypatch, cupy)
        self.current.append(Stream(self))
        cupy.cuda.Stream = lambda non_blocking=False: Stream(self)
        cupy.cuda.get_current_stream = lambda: self.current[-1]
        cupy.cuda.Event = lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
        cupy.cuda.get_elapsed_time = lambda begin, end: 1.0
        cupy.cuda.Device = lambda: SimpleNamespace(id=0, compute_capability="90")
        cupy.cuda.runtime = SimpleNamespace(memGetInfo=lambda: (self.free, self.free))
        monkeypatch.setattr(sys.modules["cupyx"], "empty_pinned", np.empty, raising=False)
        cupy.copyto, cupy.add = self.deferred(np.copyto), self.deferred(np.add)
        self.ops = SimpleNamespace(**{n: self.deferred(getattr(kernels, n)) for n in kernels.__all__
                                      if callable(getattr(kernels, n)) and n != "BackendError"})  # fmt: skip
        self.device = _Device("cuda", "simulated", cupy, self.ops, chunk_rows)
        monkeypatch.setattr(cuda, "compute_capability", lambda: 90)
        for name in ("forward", "input_gradient", "weight_gradient"):
            monkeypatch.setattr(gemm.Gemm, name, staticmethod(self.deferred(getattr(Own, name))))
        arrays = ArrayGemm(np)
        self.products = Products(SimpleNamespace(captures=True, workspace_bytes=1000, **{
            name: self.deferred(getattr(arrays, name)) for name in ("forward", "input_gradient", "weight_gradient")
        }))  # fmt: skip

    def deferred(self, function):
        """`function`, as work of the current stream."""

        def call(*args, **kwargs):
            return self.current[-1].do(lambda: function(*args, **kwargs), call.__name__)

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


class Own:
    """kernels.gemm.Gemm by NumPy, in float32."""

    @staticmethod
    def forward(x, w, out, *, bias, activation, z=None):
        z = np.matmul(x, w, out=out if z is None else z)
        kernels.bias_act(z, bias, activation, out=out)

    @staticmethod
    def input_gradient(dz, w, out, *, saved, activation, bias, bias_grad):
        np.matmul(dz, w.T, out=out)
        kernels.bias_act_backward(out, saved, activation, out=out, bias=bias, bias_grad=bias_grad)

    @staticmethod
    def weight_gradient(x, dz, out):
        np.matmul(x.T, dz, out=out)


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
