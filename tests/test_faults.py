"""Runs that diverge: the step, the layer and the last good checkpoint are named, and nothing is looked at before."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import kernels
import train as command
from kernels import plain
from mlp import configs, faults, flags, run
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.progress import Keeper, Progress
from mlp.scratch import ScratchLearner

from .simulated_gpu import Gpu
from .training import cpu, easy_dataset, graphs_of_torch, write_npy
from .training import train as process

DATA = easy_dataset(300, 5)
SPLIT = stratified_split(DATA.labels)
ROWS, BATCH = len(SPLIT.train), 20
STEPS = -(-ROWS // BATCH)  # of an epoch
WHERE = {
    "plain": {}, "fused": {"fused": True}, "m2": {"backend": "torch"}, "m2 fused": {"backend": "torch", "fused": True},
}  # fmt: skip
NORM = {"batch_norm": True, "activation": "silu", "dropout": 0.1}
assert ROWS == 210 and STEPS == 11


def config(**changes):
    return configs.preset("m1", **({"hidden": (16, 12), "batch_size": BATCH, "epochs": 3, "device": "cpu"} | changes))


def make(**changes):
    settings = config(**changes)
    return run.make_learner(settings, DATA, run.select_device(settings), ROWS)[0]


def weight(learner, layer):
    """The layer's weight, to be changed in place: ours (in, out), torch's (out, in)."""
    return learner.model.weights[layer] if hasattr(learner.model, "weights") else learner.model[layer][0].weight.data


def bias(learner, layer):
    return learner.model.biases[layer] if hasattr(learner.model, "biases") else learner.model[layer][0].bias.data


def plant(learner, step, spoil):
    """Let spoil(learner) happen just before this step, whenever that is made."""
    epoch, place = (step - 1) // STEPS + 1, (step - 1) % STEPS * BATCH
    begin, now = learner.begin_epoch, []

    def begin_epoch(index, epoch=None):
        now[:] = [epoch]
        begin(index, epoch)

    learner.begin_epoch = begin_epoch

    def spoiled(inner):
        def step(start, stop, lr):
            assert stop - start <= BATCH
            if (*now, start) == (epoch, place):
                spoil(learner)
            inner(start, stop, lr)

        return step

    learner.train, learner.train_step = spoiled(learner.train), spoiled(learner.train_step)
    return learner


def diverged(learner, **how):
    """The fault of the run, which ends with the parameters of its best epoch."""
    with np.errstate(all="ignore"):
        history = fit(learner, SPLIT, learner.config, **how)
    assert history.outcome == "diverged"
    assert all(np.isfinite(array).all() for array in learner.arrays().values())
    return history.fault


def bad_weight(value, layer):
    def spoil(learner):
        weight(learner, layer)[0, 0] = value

    return spoil


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("value, step, layer", [
    (math.nan, 7, 1), (math.inf, STEPS, 0), (math.inf, STEPS + 1, 2), (math.nan, 2 * STEPS + 4, 1),
])  # fmt: skip
def test_a_bad_weight_is_noticed_in_the_output_of_its_layer(where, value, step, layer):
    fault = diverged(plant(make(**WHERE[where]), step, bad_weight(value, layer)))
    assert fault == f"step {step} (epoch {(step - 1) // STEPS + 1}): the output of layer {layer + 1} of 3"


@pytest.mark.parametrize("where", WHERE)
def test_batch_normalisation_and_dropout(where):
    fault = diverged(plant(make(**WHERE[where], **NORM, ema=0.9), STEPS + 2, bad_weight(math.nan, 1)))
    assert fault == "step 13 (epoch 2): the output of layer 2 of 3"


def test_the_running_statistics_are_looked_at():
    """An infinite mean that the batches do not show: only validation reads it."""
    def ours(learner):
        learner.model.running[0] = math.inf

    def theirs(learner):
        learner.model[0][1].running_mean[0] = math.inf

    expected = "step 5 (epoch 1): the running means of layer 1 of 3 after the update"
    assert diverged(plant(make(batch_norm=True), 5, ours)) == expected
    assert diverged(plant(make(batch_norm=True, backend="torch"), 5, theirs)) == expected


@pytest.mark.parametrize("where", WHERE)
def test_an_output_that_overflows(where):
    """Of the last layer alone: each of two numbers is finite, and their sum is not."""
    def spoil(learner):
        bias(learner, 2)[1] = 3e38
        weight(learner, 2)[...] = 3e38
        weight(learner, 1)[...] = 0
        bias(learner, 1)[...] = 0.5

    assert diverged(plant(make(**WHERE[where]), 3, spoil)) == "step 3 (epoch 1): the output of layer 3 of 3"


@pytest.mark.parametrize("where", WHERE)
def test_the_loss_overflows(where):
    """Two logits that are further apart than the largest number."""
    def spoil(learner):
        bias(learner, 2)[0], bias(learner, 2)[1] = 3e38, -3e38

    assert diverged(plant(make(**WHERE[where]), 3, spoil)) == "step 3 (epoch 1): the loss"


@pytest.mark.parametrize("where", WHERE)
def test_a_gradient_overflows_where_the_loss_is_finite(where):
    """silu(0) is 0, so that the logits are 0 whatever the last weights are; its slope there is 1/2, and the gradient is
    the sum of 4/5 and 4 times 1/5 of the largest numbers."""
    def spoil(learner):
        weight(learner, 0)[...] = 0
        w = weight(learner, 1)
        w = w if hasattr(learner.model, "weights") else w.T
        w[...] = 3e38
        w[:, DATA.labels[first]] = -3e38
        bias(learner, 0)[...] = bias(learner, 1)[...] = 0

    settings = dict(hidden=(16,), activation="silu", batch_size=1, **WHERE[where])
    learner, index = make(**settings), SPLIT.train[:2]
    order = make()
    order.begin_epoch(index, 1)
    first = int(order._training.order[0])
    spoil(learner)
    progress = Progress(learner.state(), learner.snapshot())
    with np.errstate(all="ignore"):
        fault = faults.locate(learner, index, learner.config, progress)
        assert fault == "step 1 (epoch 1): the gradient of layer 1 of 2"
        learner.begin_epoch(index, 1)
        learner.load_state(progress.state)
        learner.train_step(0, 1, 0.001)
    assert math.isfinite(learner.totals()[0])


@pytest.mark.parametrize("where", WHERE)
def test_an_infinite_parameter_behind_a_dead_relu(where):
    """Neither outputs nor gradients show it, and the loss goes on as before."""
    def spoil(learner):
        bias(learner, 0)[3] = -math.inf

    learner = plant(make(**WHERE[where], optimizer="sgd", lr=0.01), STEPS + 3, spoil)
    fault = diverged(learner)
    assert fault == "step 14 (epoch 2): the biases of layer 1 of 3 after the update"


@pytest.mark.parametrize("where", WHERE)
def test_the_learning_rate_is_too_large(where):
    fault = diverged(make(**WHERE[where], optimizer="sgd", lr=1e30))
    assert fault == "step 2 (epoch 1): the output of layer 2 of 3"
    # Adam's steps are as large as the rate, whatever the gradient.
    assert diverged(make(**WHERE[where], lr=1e37)) == "step 2 (epoch 1): the output of layer 1 of 3"


def test_the_moments_are_named():
    def first(learner):
        learner.optimizer.m[0] = math.inf
        learner.model.parameters[0] = 0

    def momentum(learner):
        for name, kept in learner._moments().items():
            if name == "optimizer/3/momentum_buffer":
                kept[0] = math.inf

    fault = diverged(plant(make(optimizer="adam"), 2, first))
    assert fault == "step 2 (epoch 1): the weights of layer 1 of 3 after the update"
    fault = diverged(plant(make(optimizer="sgd", momentum=0.9, backend="torch"), 2, momentum))
    assert fault == "step 2 (epoch 1): the biases of layer 2 of 3 after the update"


@pytest.mark.parametrize("state, where, name", [
    ("second moments", "plain", "v"), ("second moments", "m2", "optimizer/2/exp_avg_sq"),
    ("second moments", "m2 fused", "optimizer/2/exp_avg_sq"), ("average", "plain", "average_parameters"),
    ("average", "m2", "average/1.0.weight"),
])  # fmt: skip
def test_what_no_parameter_shows_is_named_as_well(state, where, name):
    """An infinite second moment stops its parameter, and an average is read by the validation alone."""
    def spoil(learner):
        if hasattr(learner, "states"):
            flat = learner.states.arrays[name]
            dict(learner.states.views(name, flat))["weight1"][0, 0] = math.inf
        elif state == "average":
            learner.averages["1.0.weight"][0, 0] = math.inf
        else:
            learner._moments()[name][0, 0] = math.inf

    fault = diverged(plant(make(**WHERE[where], ema=0.5), 4, spoil))
    assert fault == f"step 4 (epoch 1): the {state} of the weights of layer 2 of 3 after the update"


def test_a_compiled_model_is_looked_at_layer_by_layer(monkeypatch):
    graphs = graphs_of_torch(monkeypatch)
    learner = make(backend="torch", compile=True)
    compiled = learner.forward_loss
    fault = diverged(plant(learner, 7, bad_weight(math.nan, 1)))
    assert fault == "step 7 (epoch 1): the output of layer 2 of 3" and graphs
    assert learner.forward_loss == compiled


def test_the_validation_alone_may_overflow():
    """Every step is well, so there is none to name."""
    learner = make()
    evaluate = learner.evaluate
    learner.evaluate = lambda index: replace(evaluate(index), cross_entropy=math.inf)
    assert diverged(learner) == "the validation loss of epoch 1"


# ---- ops that go wrong by themselves, in a certain step: in chunks, on a GPU


def spoiled_ops(ops, step, width, value=math.nan):
    """`ops`, of which bias_act writes `value` into a layer of this width in this step, whose number it reads from the
    device, so that a captured one does so, too."""
    counter = []

    def advance(offset, rows, steps=None):
        if steps is not None:
            counter[:] = [steps]
        ops.advance(offset, rows, steps)

    def bias_act(z, bias, activation="relu", out=None):
        ops.bias_act(z, bias, activation, out=out)
        if counter and float(counter[0][0]) == step and out.shape[1] == width:
            out[-1, 0] = value

    names = {name: getattr(ops, name) for name in kernels.__all__ if hasattr(ops, name)}
    return SimpleNamespace(**names | {"advance": advance, "bias_act": bias_act})


@pytest.mark.parametrize("ops", [plain, kernels], ids=["plain", "fused"])
@pytest.mark.parametrize("batch, step", [(100, 4), ("full", 2)])
def test_a_batch_of_several_chunks(ops, batch, step):
    settings = config(batch_size=batch)
    device = replace(cpu("plain", chunk_rows=32), ops=spoiled_ops(ops, step, width=12))
    steps = -(-ROWS // settings.batch_of(ROWS))
    fault = diverged(ScratchLearner(settings, DATA, device, ROWS))
    assert fault == f"step {step} (epoch {-(-step // steps)}): the output of layer 2 of 3"


@pytest.mark.parametrize("batch, chunk, step", [(4, 2048, 39), (4, 2048, 53), (4, 2048, 106), (100, 32, 4)])
def test_a_captured_step(monkeypatch, batch, chunk, step):
    """Also where a launch makes 16 steps of 4 images; there are 53 in an epoch, the last of which is half a batch."""
    gpu = Gpu(monkeypatch, chunk_rows=chunk)
    spoiled = spoiled_ops(kernels, step, width=12)
    for name in ("advance", "bias_act"):
        setattr(gpu.ops, name, gpu.deferred(getattr(spoiled, name)))
    settings = config(batch_size=batch, fused=True, device="cuda")
    learner = ScratchLearner(settings, DATA, gpu.device, ROWS, gpu.products)
    assert learner.captures and learner.steps_per_launch == 16
    fault = diverged(learner)
    assert fault == f"step {step} (epoch {-(-step // -(-ROWS // batch))}): the output of layer 2 of 3"


@pytest.mark.parametrize("gemm", ["cublaslt", "own"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_other_products_and_forms_on_a_gpu(monkeypatch, gemm, precision):
    gpu = Gpu(monkeypatch)
    settings = config(fused=True, device="cuda", gemm=gemm, precision=precision, optimizer="sgd", lr=1e30)
    learner = ScratchLearner(settings, DATA, gpu.device, ROWS)
    assert learner.captures
    assert diverged(learner) == "step 2 (epoch 1): the output of layer 2 of 3"


@pytest.mark.parametrize("batch", [20, 100])
def test_streamed_images(monkeypatch, batch):
    """What has been read is fetched again when the steps are made once more."""
    gpu = Gpu(monkeypatch, chunk_rows=64)
    steps = -(-ROWS // batch)
    spoiled = spoiled_ops(kernels, 2 * steps, width=12)
    for name in ("advance", "bias_act"):
        setattr(gpu.ops, name, gpu.deferred(getattr(spoiled, name)))
    settings = config(batch_size=batch, fused=True, device="cuda")
    resident = ScratchLearner(settings, DATA, gpu.device, ROWS, gpu.products)
    limit = resident.budget.needed
    learner = resident
    while not learner.budget.window:
        limit = int(0.999 * limit)
        limited = replace(settings, memory_limit=limit)
        learner = ScratchLearner(limited, DATA, gpu.device, ROWS, gpu.products)
    assert learner.budget.window < ROWS
    assert diverged(learner) == f"step {2 * steps} (epoch 2): the output of layer 2 of 3"


# ---- what a fault costs while there is none


@pytest.mark.parametrize("where", ["plain", "m2"])
@pytest.mark.parametrize("batch", [10, 105])
def test_nothing_is_looked_at_in_a_step(monkeypatch, where, batch):
    """Per epoch one look at the state, one at the totals and one copy of the state, however many steps there are."""
    learner, seen = make(**WHERE[where], batch_size=batch), []

    def counted(name, inner):
        return lambda *args: seen.append(name) or inner(*args)

    for name in ("is_finite", "totals", "state", "synchronize", "first_fault"):
        setattr(learner, name, counted(name, getattr(learner, name)))
    fit(learner, SPLIT, learner.config)
    counts = {name: seen.count(name) for name in set(seen)}
    assert counts == {"is_finite": 3, "totals": 3, "synchronize": 3, "state": 1 + 3}


@pytest.mark.parametrize("batch", [2, 100])
def test_no_copy_from_the_gpu_is_added_per_step(monkeypatch, batch):
    """An epoch copies its results, and tells whether the state is finite: two waits."""
    gpu = Gpu(monkeypatch)
    settings = config(fused=True, device="cuda", batch_size=batch)
    learner = ScratchLearner(settings, DATA, gpu.device, ROWS, gpu.products)
    copies, looks, numpy, finite = [], [], type(gpu.device).numpy, learner.is_finite
    monkeypatch.setattr(type(gpu.device), "numpy", lambda self, array: copies.append(array.shape) or numpy(self, array))
    learner.is_finite = lambda: looks.append(1) or finite()
    fit(learner, SPLIT, settings)
    assert copies == [(4 + 5 * 5,)] * settings.epochs and len(looks) == settings.epochs


# ---- after a resume; the command


@pytest.mark.parametrize("where", WHERE)
def test_after_a_resume_in_the_middle_of_an_epoch(tmp_path, where):
    """The steps before the checkpoint are not made again, and the number is that of the whole run."""
    progress = interrupted(make(**WHERE[where], **NORM), 15, tmp_path)
    assert (progress.epoch, progress.done) == (2, 4 * BATCH)
    learner = plant(make(**WHERE[where], **NORM), 18, bad_weight(math.nan, 2))
    made, first_fault = [], learner.first_fault
    learner.first_fault = lambda *args: made.append(args[:2]) or first_fault(*args)
    fault = diverged(learner, progress=keeper_of(learner, tmp_path).load(learner))
    assert fault == "step 18 (epoch 2): the output of layer 3 of 3" and made == [(6 * BATCH, 7 * BATCH)]


def keeper_of(learner, folder, interval=flags.Interval(None)):  # noqa: B008
    return Keeper(folder, learner.config, DATA.checksum, interval)


def interrupted(learner, steps, folder):
    """Train so many steps, and leave a checkpoint."""
    keeper, done = keeper_of(learner, folder), []
    train = learner.train

    def counted(*args):
        train(*args)
        done.append(1)

    class Stop(Exception):
        pass

    def due(epoch):
        return len(done) == steps

    def save(progress, ours):
        Keeper.save(keeper, progress, ours)
        raise Stop

    learner.train, keeper.due, keeper.save = counted, due, save
    with pytest.raises(Stop):
        fit(learner, SPLIT, learner.config, keeper=keeper)
    return keeper.load(learner)


def test_a_checkpoint_of_a_state_that_is_not_finite_is_not_written(tmp_path):
    """Where one is due after the fault, the run ends, and the one that is left is good."""
    learner = plant(make(), STEPS + 3, bad_weight(math.nan, 1))
    keeper, places = keeper_of(learner, tmp_path, flags.Interval(seconds=0.0)), []
    save = keeper.save
    keeper.save = lambda progress, ours: places.append((progress.epoch, progress.done)) or save(progress, ours)
    assert diverged(learner, keeper=keeper) == "step 14 (epoch 2): the output of layer 2 of 3"
    assert places[-2:] == [(2, 2 * BATCH)] * 2 and len(places) == STEPS + 3 + 1
    kept = keeper.load(make())
    assert all(np.isfinite(np.asarray(x)).all() for part in (kept.state, kept.best) for x in part.values())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_npy(tmp_path_factory.mktemp("data") / "easy", rows=600)


def main(capsys, *arguments):
    """The command in this process: exit status, what it printed, the lines of its errors."""
    status = command.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


ADAM, SGD = "--lr 1e6", "--optimizer sgd --lr 1e30"


@pytest.mark.parametrize("model, rate", [
    ("m1", ADAM), ("m1 --fused", ADAM), ("m2", ADAM), ("m0", "--lr 1e6"),
    ("m1", SGD), ("m1 --fused", SGD), ("m2 --fused", SGD), ("m3", SGD), ("m3 --backend scratch --fused", SGD),
])  # fmt: skip
def test_the_command_says_what_and_where_in_one_line(capsys, tmp_path, images, model, rate):
    """Adam's rate of 1e6 is too much for m1, but not for m3: what is normalised may be as large as one likes."""
    out = tmp_path / "run"
    options = f"--model {model} --device cpu --hidden 16,12,8 --batch-size 50 {rate} --epochs 60".split()
    status, _, errors = main(capsys, *options, "--data", images, "--out", out)
    assert (status, len(errors)) == (1, 1)
    line = errors[0]
    assert line.startswith("error: step ") and (" of layer " in line or "the loss" in line)
    assert f"the last good checkpoint is {out / 'state.npz'}" in line and "--lr" in line and line[-1] != "."
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["outcome"] == "diverged"
    for name in ("config.json", "history.csv", "confusion.csv", "checkpoint.npz", "training.png", "state.npz"):
        assert (out / name).stat().st_size, name
    arrays, _ = run.checkpoint.load(out / "checkpoint.npz")[:2]
    assert all(np.isfinite(x).all() for x in arrays.values())
    _, content = run.run_folder.read_config(out)
    settings, dataset = run.run_folder.read_config(out)[0], run.data.load(str(images))
    split = stratified_split(dataset.labels)
    learner, _ = run.make_learner(settings, dataset, run.select_device(settings), len(split.train))
    kept = Keeper(out, settings, content["data_sha256"], flags.Interval()).load(learner)
    assert all(np.isfinite(np.asarray(x)).all() for x in kept.state.values())
    status, _, errors = main(capsys, "--resume", out)
    assert (status, len(errors)) == (2, 1) and "diverged" in errors[0] and "--lr" in errors[0]


def test_warnings_do_not_hide_the_line(tmp_path, images):
    """In a process of its own, with the warnings of NumPy and torch as its user has them."""
    options = ("--model", "m1", "--lr", "1e6", "--hidden", "16,12,8", "--batch-size", 50, "--device", "cpu")
    result = process(*options, "--data", images, "--out", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: step 2 (epoch 1): the second moments of the weights of layer 2 of 4")
