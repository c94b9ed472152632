"""The step as a list of calls: executed, captured and launched, it equals the same code called directly, bit by bit."""

import numpy as np
import pytest

from mlp import configs
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.scratch import ScratchLearner
from mlp.step_graph import Program, Recorded, Recorder

from .checks import assert_same_bits
from .simulated_gpu import Gpu, nothing_runs
from .training import BACKENDS, all_rows, cpu, easy_dataset

DATA = easy_dataset(300, 5)
SPLIT = stratified_split(DATA.labels)
ROWS = len(SPLIT.train)
CHANGES = [
    dict(),
    dict(optimizer="sgd", momentum=0.9, lr=0.05),
    dict(activation="gelu", l2=0.01),
    dict(batch_size="full"),
    dict(batch_size=100),  # chunks of 64 and a rest
    dict(batch_norm=True, dropout=0.3, activation="silu", ema=0.9, label_smoothing=0.1, class_balance=0.9),
    dict(batch_size=100, dropout=0.3, ema=0.9, optimizer="sgd"),
    dict(train_noise=0.3, augment=1.0, schedule="cosine", warmup=1),
]
IDS = ["adam", "momentum", "gelu", "full", "chunks", "m3", "dropped chunks", "altered images"]


class Eager(ScratchLearner):
    """Calls what others record: `replay` has no program."""

    def _allocate(self, data, plan):
        super()._allocate(data, plan)
        self.replay = lambda key, body, repeats=1: [body() for _ in range(repeats)] and None
        self.replay.forget = lambda: None


def config(**changes):
    return configs.preset("m1", **({"hidden": (32, 16), "batch_size": 64, "epochs": 2, "lr": 0.01} | changes))


def trained(learner):
    """The history of a run and everything that is left of it."""
    rows = fit(learner, SPLIT, learner.config).rows
    numbers = [[row.train_loss, row.train_accuracy, row.val_loss, row.val_accuracy] for row in rows]
    judged = learner.evaluate(SPLIT.test, 0.3)
    return [np.array(numbers), *learner.states.arrays.values(), judged.confusion, np.array(judged.cross_entropy)]


def assert_equal_runs(one, other):
    for a, b in zip(one, other, strict=True):
        assert_same_bits(np.array(a), np.array(b))


@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_recorded_step_equals_the_eager_one(backend, changes):
    runs = [trained(cls(config(**changes), DATA, cpu(backend, 64), ROWS)) for cls in (ScratchLearner, Eager)]
    assert_equal_runs(*runs)
    assert np.isfinite(runs[0][0]).all() and len(np.unique(runs[0][0][:, 0])) == 2


@pytest.mark.parametrize("seed, steps", [(0, 16), (1, 3), (2, 2)])
@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_the_captured_step_equals_the_eager_one(monkeypatch, changes, seed, steps):
    """In any order of execution that the graph's edges allow; an epoch has 3 steps of 64, or fewer than one launch."""
    expected = trained(Eager(config(**changes), DATA, cpu("fused", 64), ROWS))
    gpu = Gpu(monkeypatch, seed, chunk_rows=64)
    learner = ScratchLearner(config(**changes), DATA, gpu.device, ROWS, gpu.products)
    learner.steps_per_launch = steps
    assert learner.captures
    assert_equal_runs(trained(learner), expected)


def test_several_steps_are_one_launch_and_the_ragged_one_is_its_own(monkeypatch):
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(batch_size=20), DATA, gpu.device, ROWS, gpu.products)
    learner.steps_per_launch = 4
    learner.begin_epoch(SPLIT.train, 1)
    assert ROWS == 210
    learner.train(0, ROWS, 0.01)  # 2 x 4 steps, 2 steps, 10 images
    captured = learner.replay._captured
    assert {(key[1], repeats): graph.launches for (key, repeats), graph in captured.items()} == {
        (20, 4): 2, (20, 1): 2, (10, 1): 1,
    }  # fmt: skip
    assert len(captured[("step", 20, 0), 4].nodes) == 4 * len(captured[("step", 20, 0), 1].nodes)
    assert learner.totals()[1] <= ROWS and float(learner.optimizer.steps[0]) == 11


def test_nothing_but_graphs_runs_in_an_epoch_once_they_are_there(monkeypatch):
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
    for epoch in (1, 2):
        learner.begin_epoch(SPLIT.train, epoch)
        if epoch == 2:
            with nothing_runs(gpu):
                learner.train(0, ROWS, 0.01)
                learner.evaluate(SPLIT.val)
        learner.train(0, ROWS, 0.01)
        learner.evaluate(SPLIT.val)


def test_an_epoch_copies_its_results_once(monkeypatch):
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
    copies, numpy = [], type(gpu.device).numpy
    monkeypatch.setattr(type(gpu.device), "numpy", lambda self, array: copies.append(array.shape) or numpy(self, array))
    fit(learner, SPLIT, learner.config)
    assert copies == [(4 + 5 * 5,)] * 2


def test_another_shape_is_captured_anew(monkeypatch):
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
    learner.begin_epoch(SPLIT.train)
    for stop in (64, 64, 30, 64):
        learner.train_step(0, stop, 0.01)
    assert [key[1] for key, _ in learner.replay._captured] == [64, 30]
    longer = np.resize(SPLIT.train, 1000)  # another array, which the graphs do not know
    learner.begin_epoch(longer)
    assert not learner.replay._captured
    learner.train(0, 1000, 0.01)


def test_the_next_batch_is_gathered_beside_the_optimizer(monkeypatch):
    """Neither waits for the other, and both wait for what read the batch before: the gradients of the weights."""
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
    learner.begin_epoch(SPLIT.train, 1)
    (program,) = learner.programs().values()
    nodes = learner.replay.graphs.capture(program, 3).nodes
    names = [node.name for node in nodes]
    gathers, updates = ([k for k, n in enumerate(names) if n == name] for name in ("gather_batch", "adam_step"))
    assert len(gathers) == len(updates) == 3
    gradients = [k for k, n in enumerate(names) if n == "weight_gradient"]
    for step, (update, gather) in enumerate(zip(updates, gathers[1:])):
        before_update, before_gather = (gpu.ancestors(nodes[k].after) for k in (update, gather))
        assert update not in before_gather and gather not in before_update
        assert before_update & before_gather >= set(gradients[3 * step : 3 * step + 3])
        assert {update, gather} <= gpu.ancestors(nodes[gradients[3 * step + 3]].after)


def test_a_capture_leaves_the_state_as_it_was(monkeypatch):
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
    learner.begin_epoch(SPLIT.train, 1)
    learner.train(0, 64, 0.01)
    state = [learner.model.parameters, learner._results, learner._offset, *learner.optimizer.moments.values()]
    before = [np.array(array) for array in state]
    program = next(iter(learner.programs().values()))
    learner.replay.graphs.capture(program, 3)
    for a, b in zip(state, before, strict=True):
        assert_same_bits(np.array(a), b)


def test_a_failed_capture_leaves_a_stream_that_works(monkeypatch):
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
    learner.begin_epoch(SPLIT.train, 1)

    def fails():
        if gpu.capturing:
            raise RuntimeError("no")

    recorder = learner.recorder
    with pytest.raises(RuntimeError, match="no"):
        learner.replay.graphs.capture(Program.of(recorder, lambda: recorder(fails)), 1)
    learner.train(0, 64, 0.01)


@pytest.mark.parametrize("missing", ["join", "beside"])
def test_a_missing_edge_is_noticed(monkeypatch, missing):
    """The simulation tells: without the join the optimizer may run before the gradients are there."""
    if missing == "join":
        monkeypatch.setattr(Recorder, "join", lambda self: None)
        gpu = Gpu(monkeypatch, chunk_rows=64)
        expected = trained(Eager(config(), DATA, cpu("fused", 64), ROWS))
        runs = []
        for seed in range(3):
            gpu = Gpu(monkeypatch, seed, chunk_rows=64)
            learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
            learner.steps_per_launch = 3
            runs.append(trained(learner))
        assert any((run[1] != expected[1]).any() for run in runs)
    else:
        gpu = Gpu(monkeypatch)
        learner = ScratchLearner(config(), DATA, gpu.device, ROWS, gpu.products)
        learner.begin_epoch(SPLIT.train)
        (program,) = learner.programs().values()
        assert sum(call.beside for call in program.calls) == 1 + 3 + 1  # advance, a weight gradient per layer, a bias gradient


def test_a_recorder_calls_or_notes_down():
    heard = []
    recorder = Recorder()
    owner = Recorded(type("Owner", (), {"say": staticmethod(lambda *args, **kwargs: heard.append((args, kwargs)))}), recorder)
    owner.say(1, to="you")
    assert heard == [((1,), {"to": "you"})]
    with recorder.recording() as calls, recorder.phase("loss"), recorder.beside():
        owner.say(2)
    assert len(heard) == 1 and calls[0].phase == "loss" and calls[0].beside
    Program(calls).run()
    owner.say(3)
    assert heard[1:] == [((2,), {}), ((3,), {})]


def test_the_order_of_an_epoch_follows_from_seed_and_epoch():
    orders = {}
    for seed, epoch, backend in [(0, 1, "plain"), (0, 1, "fused"), (0, 2, "fused"), (1, 1, "fused")]:
        learner = ScratchLearner(config(seed=seed), DATA, cpu(backend), ROWS)
        learner.begin_epoch(SPLIT.train, epoch)
        order = learner._training.order[:ROWS].copy()
        assert np.array_equal(np.sort(order), SPLIT.train)
        orders[seed, epoch, backend] = order.tolist()
    assert orders[0, 1, "plain"] == orders[0, 1, "fused"]
    assert orders[0, 1, "fused"] != orders[0, 2, "fused"] != orders[1, 1, "fused"] != orders[0, 1, "fused"]


def test_all_rows_of_an_epoch_are_visited_once():
    learner = ScratchLearner(config(), DATA, cpu("fused"), ROWS)
    learner.begin_epoch(all_rows(DATA), 1)
    learner.train(0, 300, 0.0001)
    assert learner._at == 300 and int(learner._offset[0]) == 300
