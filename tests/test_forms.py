"""Every form of a layer gives the same model: fused epilogues, padding and bfloat16, by the code that a GPU runs.

cuBLASLt is fake_nvmath's stand-in on the simulated GPU: it multiplies what it is given the addresses of.
"""

import dataclasses
import sys

import numpy as np
import pytest
import torch

import kernels
from kernels import cuda, simt
from kernels.gemm import Gemm
from mlp import configs, products, run, tuning
from mlp.cublaslt import Unsupported
from mlp.data import stratified_split
from mlp.forms import EPILOGUE, MASKED, OWN, SEPARATE, Form, Plan
from mlp.loop import fit
from mlp.model import MLP
from mlp.scratch import ScratchLearner
from mlp.step_graph import Program, Recorder
from mlp.tuning import cache_file

from .checks import assert_same_bits
from .simulated_gpu import Gpu
from .training import close, cpu, easy_dataset

DATA = easy_dataset(300, 7)
SPLIT = stratified_split(DATA.labels)
ROWS = len(SPLIT.train)  # 210: three batches of 64, and 18
EPILOGUES = (Form(MASKED), Form(MASKED, SEPARATE, EPILOGUE), Form(EPILOGUE, EPILOGUE, EPILOGUE))
PLANS = {
    "separate": Plan((Form(),) * 3),
    "padded": Plan((Form(),) * 3, padded=True),
    "epilogues": Plan(EPILOGUES),
    "padded epilogues": Plan(EPILOGUES, padded=True),
    "forward epilogues": Plan((Form(EPILOGUE), Form(EPILOGUE), Form(EPILOGUE))),
    "one boundary": Plan((Form(), Form(MASKED), Form(SEPARATE, SEPARATE, EPILOGUE))),
    "bias gradient": Plan((Form(), Form(), Form(SEPARATE, EPILOGUE))),
}


def config(**changes):
    given = {"hidden": (33, 16), "batch_size": 64, "epochs": 2, "fused": True, "device": "cuda", "lr": 0.01}
    return configs.preset("m1", **(given | changes))


def on_gpu(gpu, plan=None, graphs=True, **changes):
    chosen = products.select(config(**changes), gpu.device)
    learner = ScratchLearner(config(**changes), DATA, gpu.device, ROWS, chosen, plan)
    assert learner.captures
    if not graphs:
        learner.replay.graphs, learner.steps_per_launch = None, 1
    return learner


def trained(learner):
    rows = fit(learner, SPLIT, learner.config).rows
    judged = learner.evaluate(SPLIT.test, 0.3)
    losses = [[r.train_loss, r.val_loss] for r in rows]
    return {**learner.arrays(), "losses": np.array(losses), "confusion": judged.confusion}


def assert_close_runs(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in set(one) - {"confusion"}:
        assert close(one[name], other[name], tolerance), name
    assert np.abs(one["confusion"] - other["confusion"]).sum() <= 4 and one["confusion"].sum() == len(SPLIT.test)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_trains_the_same_model(monkeypatch, name):
    expected = trained(ScratchLearner(config(device="cpu"), DATA, cpu("fused"), ROWS))
    assert_close_runs(trained(on_gpu(Gpu(monkeypatch), PLANS[name])), expected, 1e-4)


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_other_activations_take_separate_hidden_layers(monkeypatch, activation):
    plan = Plan((Form(), Form(), Form(EPILOGUE, EPILOGUE)), padded=True)
    expected = trained(ScratchLearner(config(device="cpu", activation=activation), DATA, cpu("fused"), ROWS))
    assert_close_runs(trained(on_gpu(Gpu(monkeypatch), plan, activation=activation)), expected, 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", PLANS)
def test_the_captured_run_equals_the_eager_one(monkeypatch, name, precision):
    runs = [trained(on_gpu(Gpu(monkeypatch, seed), PLANS[name], graphs, precision=precision))
            for seed, graphs in ((1, True), (2, True), (0, False))]  # fmt: skip
    for other in runs[1:]:
        for key, array in runs[0].items():
            assert_same_bits(array, other[key])


class Rounding:
    """Products of float32 arrays whose factors are rounded to bfloat16, by torch."""

    captures, workspace_bytes = False, 0

    @staticmethod
    def _rounded(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16).float().numpy()

    def forward(self, x, weight, out):
        out[...] = self._rounded(x) @ self._rounded(weight)

    def input_gradient(self, dz, weight, out):
        out[...] = self._rounded(dz) @ self._rounded(weight).T

    def weight_gradient(self, x, dz, out):
        out[...] = self._rounded(x).T @ self._rounded(dz)


@pytest.mark.parametrize("name", ["separate", "padded epilogues"])
def test_bfloat16_rounds_the_factors_and_nothing_else(monkeypatch, name):
    """Against products that round by themselves; the parameters stay float32."""
    settings = config(device="cpu")
    expected = trained(ScratchLearner(settings, DATA, cpu("fused"), ROWS, products.Products(Rounding())))
    found = trained(on_gpu(Gpu(monkeypatch), PLANS[name], precision="bf16"))
    assert_close_runs(found, expected, 2e-3)  # a sum in another order may round to the neighbour in the next layer
    exact = trained(ScratchLearner(settings, DATA, cpu("fused"), ROWS))
    distance = [np.abs(run["weight0"] - expected["weight0"]).max() for run in (found, exact)]
    assert distance[0] < 0.2 * distance[1]
    bits = found["weight0"].view(np.uint32)
    assert np.count_nonzero(bits & 0xFFFF) > 0.9 * bits.size  # more digits than bfloat16 has


def test_padding_stays_zero_and_out_of_sight(monkeypatch):
    learner = on_gpu(Gpu(monkeypatch), PLANS["padded epilogues"], l2=0.01)
    trained(learner)
    assert learner.model.weights[-1].shape == (16, 8) and learner.arrays()["weight2"].shape == (16, 7)
    assert not learner.model.weights[-1][:, 7:].any() and not learner.model.biases[-1][7:].any()
    assert learner.model.parameter_count == 784 * 33 + 33 + 33 * 16 + 16 + 16 * 7 + 7


def test_a_gpu_without_nvmath_says_so_and_captures_nothing(monkeypatch):
    import sys

    gpu = Gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    chosen = products.select(config(), gpu.device)
    assert not chosen.captures and "nvmath-python" in chosen.notice and "op by op" in chosen.notice
    for changes in ({"gemm": "cublaslt"}, {"precision": "bf16"}):
        with pytest.raises(products.InputError, match="nvmath-python"):
            products.select(config(**changes), gpu.device)
    assert not products.select(config(gemm="cupy"), gpu.device).notice


@pytest.mark.parametrize("changes, word", [
    ({"gemm": "own"}, "--precision tf32 or bf16"), ({"gemm": "own", "precision": "tf32", "fused": False}, "--fused"),
])  # fmt: skip
def test_products_that_cannot_be_had_on_a_gpu(monkeypatch, changes, word):
    gpu = Gpu(monkeypatch)
    device = gpu.device if changes.get("fused", True) else dataclasses.replace(gpu.device, ops=None)
    if not changes.get("fused", True):
        monkeypatch.setattr(type(device), "fused", False)
    with pytest.raises(products.InputError, match=word):
        products.select(config(**changes), device)


def test_our_products_on_a_gpu_without_the_instructions_are_refused(monkeypatch):
    """When they are chosen, not in the middle of the first step."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(cuda, "compute_capability", lambda: 75)
    with pytest.raises(products.InputError, match="^--gemm own is not possible: .* this GPU has 7.5"):
        products.select(config(gemm="own", precision="tf32"), gpu.device)


@pytest.mark.parametrize("gemm, own", [("auto", {OWN}), ("cublaslt", set())])
def test_a_run_tunes_itself_and_remembers(monkeypatch, tmp_path, gemm, own):
    """The whole path of tf32 on a GPU: time every form in graphs, choose, train with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "REPEATS", 2)  # and two algorithms: the simulated GPU is slow
    monkeypatch.setattr(tuning, "WARM_UP", 1)
    gpu, tf32 = Gpu(monkeypatch), config(precision="tf32", gemm=gemm)
    gpu.nvmath.answers = 2
    gpu.nvmath.refused["DRELU_BGRAD"] = 0  # the library finds no algorithm
    learner, entry = run.make_learner(tf32, DATA, gpu.device, ROWS)
    assert cache_file().exists() and learner.model.plan.forms == tuple(Form(*form) for form in entry["forms"])
    assert set(entry["us"][1]["input"]) == {SEPARATE} | own
    assert set(entry["us"][1]["forward"]) == {SEPARATE, EPILOGUE, MASKED} | own
    assert_close_runs(trained(learner), trained(on_gpu(Gpu(monkeypatch), precision="tf32")), 5e-3)
    calls = gpu.nvmath.calls.copy()
    again, same = run.make_learner(tf32, DATA, gpu.device, ROWS)
    assert same == entry and gpu.nvmath.calls["heuristic"] == calls["heuristic"]


def test_the_fastest_launch_counts_after_a_warm_up(monkeypatch):
    gpu, recorder = Gpu(monkeypatch), Recorder()
    timer, work = tuning.GraphTimer(gpu.device), gpu.deferred(list)
    for launches in ([0.1] * tuning.WARM_UP + [4.0, 3.0, 5.0, 6.0], [0.1, 5.0, 5.0, 5.0, 2.0]):
        milliseconds = iter(launches)
        gpu.cupy.cuda.get_elapsed_time = lambda begin, end: next(milliseconds)  # noqa: B023
        assert timer(lambda: recorder(work), recorder) == pytest.approx(min(launches[-4:]) * 1e-3 / tuning.REPEATS)
        assert next(milliseconds, None) is None and len(gpu.nodes) == tuning.REPEATS


class Timer:
    """In the place of GraphTimer: executes a body once. Our products take `own` seconds, and the library's the more the
    farther the number of their algorithm is from `fastest`."""

    fastest, own, used = 1, 9.0, 0

    def __init__(self, device):
        self._launches = sys.modules["nvmath.bindings.cublasLt"].launches

    def __call__(self, body, recorder):
        Timer.used += 1
        before = len(self._launches)
        try:
            Program.of(recorder, body).run()
        except Unsupported:
            return None
        numbers = [launch.number for launch in self._launches[before:]]
        return 1.0 + abs(numbers[0] - self.fastest) if numbers else self.own


@pytest.fixture(name="tuned")
def tuned_fixture(monkeypatch, tmp_path):
    """tuned(gpu, **changes): a learner of a run that is tuned with Timer, and whether anything was timed for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "GraphTimer", Timer)
    for name in ("fastest", "own", "used"):
        monkeypatch.setattr(Timer, name, getattr(Timer, name))

    def make(gpu, tune=False, **changes):
        before = Timer.used
        learner, _ = run.make_learner(config(**{"precision": "tf32"} | changes), DATA, gpu.device, ROWS, tune)
        return learner, Timer.used > before

    return make


def numbers_of_steps(gpu, learner):
    """The algorithms of a step's products on a batch, on a smaller one, and in evaluation."""
    learner.begin_epoch(SPLIT.train)
    result, launches = [], gpu.nvmath.launches
    for work in (lambda: learner.train(0, 64, 0.01), lambda: learner.train(64, 82, 0.01),
                 lambda: learner.evaluate(SPLIT.test)):  # fmt: skip
        launches.clear()
        work()
        result.append({launch.number for launch in launches})
    return result


@pytest.mark.parametrize("what, expected", [
    ({}, 1), ({"answers": 1}, 0), ({"failed": {1}}, 0), ({"failed": {0, 1}}, 2), ({"broken": {1: 15, 0: 7}}, 2),
])  # fmt: skip
def test_the_fastest_algorithm_is_remembered_and_used(monkeypatch, tuned, what, expected):
    """Where its batch is computed: for others its number means nothing."""
    for timed in (True, False):
        gpu = Gpu(monkeypatch)
        vars(gpu.nvmath).update(what)
        learner, now = tuned(gpu)
        assert now == timed and {n for of in learner.model.plan.algorithms for n in of[:2]} == {expected}
        gpu.nvmath.failed, gpu.nvmath.broken = set(), {}  # which of those that may fail is taken for other batches
        assert numbers_of_steps(gpu, learner) == [{expected}, {0}, {0}]


def test_another_version_of_the_library_is_timed_anew(monkeypatch, tuned):
    gpu = Gpu(monkeypatch)
    assert tuned(gpu)[1] and not tuned(gpu)[1]
    gpu.nvmath.version, Timer.fastest = 130001, 2
    learner, now = tuned(gpu)
    assert now and numbers_of_steps(gpu, learner)[0] == {2}
    gpu.nvmath.version = 120903
    learner, now = tuned(gpu)
    assert not now and numbers_of_steps(gpu, learner)[0] == {1}


def test_fp32_takes_the_first_algorithms_unless_it_is_tuned(monkeypatch, tuned):
    gpu = Gpu(monkeypatch)
    learner, now = tuned(gpu, precision="fp32")
    assert not now and numbers_of_steps(gpu, learner) == [{0}] * 3
    assert all(launch.asked == 1 for launch in gpu.nvmath.launches)
    assert tuned(gpu, precision="fp32", tune=True)[1]
    learner, now = tuned(gpu, precision="fp32")
    assert not now and numbers_of_steps(gpu, learner)[0] == {1}


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_our_products_are_chosen_where_they_are_faster(monkeypatch, tuned, precision):
    expected = trained(on_gpu(Gpu(monkeypatch)))  # in fp32, as our products' stand-in
    monkeypatch.setattr(Timer, "own", 0.5)
    gpu = Gpu(monkeypatch)
    learner, _ = tuned(gpu, precision=precision)
    plan = learner.model.plan.forms
    assert {form.weight for form in plan} == {form.forward for form in plan} == {OWN}
    assert {form.input for form in plan[1:]} == {OWN}
    assert numbers_of_steps(gpu, learner) == [set()] * 3
    assert_close_runs(trained(tuned(gpu, precision=precision)[0]), expected, 1e-4)
    learner, now = tuned(gpu, precision=precision, gemm="cublaslt")
    assert now and numbers_of_steps(gpu, learner)[0] == {1}


def test_whose_products_may_be_chosen(monkeypatch):
    gpu = Gpu(monkeypatch)
    select = lambda **changes: products.select(config(**changes), gpu.device)  # noqa: E731
    for precision in ("tf32", "bf16"):
        assert isinstance(select(precision=precision).own, Gemm) and select(precision=precision).epilogues
        assert select(precision=precision).own.precision == precision
        assert select(precision=precision, gemm="cublaslt").own is None
        assert select(precision=precision, gemm="own").library is None
    assert select().own is None and select(precision="tf32", gemm="cupy").own is None
    monkeypatch.setattr(cuda, "compute_capability", lambda: 75)
    assert select(precision="tf32").own is None and select(precision="tf32").epilogues


@pytest.mark.parametrize("activation, precision, bound", [("relu", "tf32", 3e-3), ("gelu", "bf16", 3e-2)])
def test_our_own_products_compute_the_same_layers(activation, precision, bound):
    """The whole network on the tensor-core kernels, thread by thread, against NumPy's products."""
    sizes, rng = (36, 20, 33, 7), np.random.default_rng(0)
    x, dlogits = rng.random((19, 36), np.float32), rng.standard_normal((19, 8)).astype(np.float32)
    device = simt.Device(simt.Runner())
    own = products.Products(None, Gemm(device, precision), precision)
    results = []
    for chosen, plan in ((None, None), (own, Plan((Form(OWN, OWN, OWN),) * 3))):
        model = MLP(sizes, activation, rows=19, ops=kernels, products=chosen, plan=plan)
        logits = model.forward(x).copy()
        model.backward(x, np.ascontiguousarray(dlogits[:, :7]))
        results.append([logits, *model.weight_grads, *model.bias_grads])
    device.runner.close()
    kinds = "forward", "input_gradient", "weight_gradient"
    assert device.launched == {f"gemm_{kind}_{precision}_64" for kind in kinds}
    assert not np.array_equal(results[0][0], results[1][0])  # the factors were rounded
    for exact, rounded in zip(*results, strict=True):
        assert close(rounded, exact, bound)
