"""Named ranges: which there are, and that they nest and balance; test_nvtx.py hears the same through NVTX itself."""

import functools
import operator
import signal
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

import kernels
from mlp import configs, ranges
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.scratch import ScratchLearner

from .training import BACKENDS, cpu, easy_dataset

LEARNERS = (*BACKENDS, "torch")
CHANGES = dict(hidden=(32, 16), batch_size=64, epochs=2)
LAYERS, ROWS = 3, 210  # of the 300 easy images: four batches, the last of 18
DATA = easy_dataset(300, 5)
SPLIT = stratified_split(DATA.labels)


def make(kind, chunk_rows=2048, compile=False):
    """A learner for the training images of DATA."""
    assert len(SPLIT.train) == ROWS
    if kind in BACKENDS:
        return ScratchLearner(configs.preset("m1", **CHANGES), DATA, cpu(kind, chunk_rows), ROWS)
    from mlp.torch_models import TorchLearner  # takes seconds, and subprocesses of test_nvtx.py do without

    learner = TorchLearner(configs.preset("m2", compile=compile, **CHANGES), DATA, "cpu", ROWS)
    learner.chunk_rows = chunk_rows
    return learner


class Recorder:
    """An `annotate` that keeps (depth, name) of every range and those that are open."""

    def __init__(self):
        self.heard, self.open = [], []

    @contextmanager
    def __call__(self, name):
        self.heard.append((len(self.open), name))
        self.open.append(name)
        thread = threading.get_ident()
        try:
            yield
        finally:
            assert self.open.pop() == name and threading.get_ident() == thread


def forward(depth):
    return [(depth, name) for name in ("gather", *(f"forward/layer{i}" for i in range(LAYERS)), "loss")]


def a_step(kind, chunks=1):
    backward = [(2, f"backward/layer{i}") for i in reversed(range(LAYERS))]
    loss_gradient = [(2, "loss")] if kind == "torch" else []
    return [(1, "step"), *(forward(2) + loss_gradient + backward) * chunks, (2, "optimizer")]


def an_epoch(kind):
    return [(0, "epoch"), *a_step(kind) * 4, (1, "validation"), *forward(2)]


def watched_fit(learner, recorder):
    ranges.attach(learner, recorder)
    return fit(learner, SPLIT, learner.config, annotate=recorder)


@pytest.mark.parametrize("kind", LEARNERS)
def test_ranges_nest_and_balance_and_change_no_result(kind):
    recorder, watched, alone = Recorder(), make(kind), make(kind)
    losses = [row.train_loss for row in watched_fit(watched, recorder).rows]
    assert recorder.heard == 2 * an_epoch(kind) and recorder.open == []
    assert losses == [row.train_loss for row in fit(alone, SPLIT, alone.config).rows]
    ours, theirs = watched.arrays(), alone.arrays()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_phases_repeat_for_every_chunk(kind):
    learner, recorder = make(kind, chunk_rows=30), Recorder()
    ranges.attach(learner, recorder)
    learner.begin_epoch(SPLIT.train)
    learner.train_step(0, 64, 0.001)
    assert recorder.heard == [(depth - 1, name) for depth, name in a_step(kind, chunks=3)]
    recorder.heard.clear()
    learner.evaluate(SPLIT.test[:60])
    assert recorder.heard == [(0, "validation"), *forward(1) * 2]


def shadowed(learner):
    """The methods that attributes of an instance hide: of the learner, its optimizer, its model and torch's layers."""
    owners = [learner, learner.optimizer, learner.model, *getattr(learner.model, "children", list)()]
    return {name for owner in owners for name in vars(owner) if callable(getattr(type(owner), name, None))}


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_learner_without_ranges_is_untouched(kind):
    learner = make(kind)
    assert shadowed(learner) == set()
    ranges.attach(learner, Recorder())
    hidden = {"train_step", "gather", "loss", "evaluate", "step", "forward"}
    assert shadowed(learner) == (hidden if kind == "torch" else set())
    assert shadowed(make(kind)) == set()  # another of the same class
    if kind != "torch":
        assert make(kind).replay.annotate is None


def test_the_range_of_a_layer_contains_its_gradients_in_torch():
    """When it opens no gradient of the layer is there, and when it closes they all are, and none of the next layer."""
    learner, seen = make("torch"), []

    def complete():
        return [[parameter.grad is not None for parameter in layer.parameters()] for layer in learner.model]

    @contextmanager
    def watching(name):
        seen.append((name, complete()))
        yield
        seen.append((name, complete()))

    ranges.attach(learner, watching)
    learner.begin_epoch(SPLIT.train)
    learner.train_step(0, 64, 0.001)
    none, both = [False, False], [True, True]
    assert [entry for entry in seen if entry[0].startswith("backward")] == [
        ("backward/layer2", [none, none, none]), ("backward/layer2", [none, none, both]),
        ("backward/layer1", [none, none, both]), ("backward/layer1", [none, both, both]),
        ("backward/layer0", [none, both, both]), ("backward/layer0", [both, both, both]),
    ]  # fmt: skip


def test_a_compiled_model_has_no_layers(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    learner, recorder = make("torch", compile=True), Recorder()
    ranges.attach(learner, recorder)
    learner.begin_epoch(SPLIT.train)
    learner.train_step(0, 64, 0.001)
    assert recorder.heard == [(0, "step"), (1, "gather"), (1, "loss"), (1, "optimizer")]


def spoil(owner, method, act):
    """Let `act(result)` follow the third call of owner.method."""
    inner, calls = getattr(owner, method), []

    def spoilt(*args, **kwargs):
        calls.append(None)
        result = inner(*args, **kwargs)
        if len(calls) == 3:
            act(result)
        return result

    setattr(owner, method, spoilt)


def fail(*_):
    raise RuntimeError("planted")


def fail_in_backward(tensor):
    tensor.register_hook(fail)


def spoil_op(learner, name, act):
    """Let `act(result)` follow the third execution of an op of a from-scratch learner."""
    for ops in (learner.ops, learner.model.ops):
        owner = ops.owner
        ops.owner = SimpleNamespace(**{n: getattr(owner, n) for n in kernels.__all__ if hasattr(owner, n)})
        spoil(ops.owner, name, act)


@pytest.mark.parametrize("kind, owner, method, act", [
    *(("torch", *place, fail) for place in (("", "gather"), ("", "loss"), ("optimizer", "step"))),
    *((kind, "ops", op, fail) for kind in BACKENDS
      for op in ("gather_batch", "bias_act", "softmax_cross_entropy", "bias_act_backward", "adam_step")),
    ("torch", "model.1", "forward", fail),
    ("torch", "model.1", "forward", fail_in_backward),
])  # fmt: skip
def test_an_exception_closes_what_it_passes(kind, owner, method, act):
    learner, recorder = make(kind), Recorder()
    if owner == "ops":
        spoil_op(learner, method, act)
    else:
        spoil(operator.attrgetter(owner)(learner) if owner else learner, method, act)
    with pytest.raises(RuntimeError, match="planted"):
        watched_fit(learner, recorder)
    assert recorder.open == [] and recorder.heard[0] == (0, "epoch")


def test_ranges_balance_on_a_thread_of_autograds_own(monkeypatch):
    """As on a GPU: the backward passes on one other thread. The third fails, and leaves a range open until the next."""
    import torch

    learner, recorders, backward = make("torch"), defaultdict(Recorder), torch.Tensor.backward
    spoil(learner.model[1], "forward", fail_in_backward)
    ranges.attach(learner, lambda name: recorders[threading.get_ident()](name))
    learner.begin_epoch(SPLIT.train)
    with ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(torch.Tensor, "backward", lambda *inputs: thread.submit(backward, *inputs).result())
        for number in (1, 2, 3, 4):
            with pytest.raises(RuntimeError, match="planted") if number == 3 else nullcontext():
                learner.train_step(0, 64, 0.001)
    here = recorders.pop(threading.get_ident())
    (there,) = recorders.values()
    whole = [(0, "loss"), *((0, f"backward/layer{i}") for i in reversed(range(LAYERS)))]
    assert there.heard == 2 * whole + whole[:2] + whole and there.open == []
    step = [(0, "step"), *forward(1), (1, "optimizer")]
    assert here.heard == 2 * step + step[:-1] + step and here.open == []


@pytest.mark.parametrize("kind", LEARNERS)
def test_ctrl_c_ends_the_step_and_closes_the_epoch(kind):
    learner, recorder = make(kind), Recorder()
    place = (spoil, learner, "gather") if kind == "torch" else (spoil_op, learner, "gather_batch")
    place[0](*place[1:], lambda _: signal.raise_signal(signal.SIGINT))
    assert watched_fit(learner, recorder).outcome == "interrupted"
    assert recorder.heard == [(0, "epoch"), *a_step(kind) * 3] and recorder.open == []
