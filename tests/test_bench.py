"""The measuring scripts: every contender computes the op, the CPU's runs are whole, and the GPU's paths execute."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from mlp import products, scratch, tuning

from . import stand_in_gpu
from .training import ROOT

torch = pytest.importorskip("torch")
FAST = ["--passes", "1", "--rounds", "1", "--blocks", "1", "--settle", "0", "--block", "1e-4"]


@pytest.fixture(autouse=True)
def small_data_set(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profile"))
    import kernel_ops

    monkeypatch.setattr(kernel_ops, "IMAGES", 1000)


@pytest.fixture
def gpu(monkeypatch):
    """The stand-in for CuPy, and select() giving its device."""
    import bench_kernels
    import bench_step
    import step_contenders

    cupy = stand_in_gpu.install(monkeypatch)
    monkeypatch.setattr(products, "select", stand_in_gpu.select_products)
    monkeypatch.setattr(tuning, "GraphTimer", lambda device: lambda body, recorder: 1.0)
    for module in (bench_kernels, bench_step, step_contenders):
        monkeypatch.setattr(module, "select", lambda kind, fused: stand_in_gpu.device(cupy, fused))
    return cupy


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def all_ops(xp=np):
    import kernel_ops

    rng = xp.random.default_rng(0)
    return [op for make in kernel_ops.OPS.values() for op in make(xp, rng, torch)]


def test_every_contender_computes_the_op(gpu, monkeypatch):
    """fuse() and torch.compile stand for their formulas here; ElementwiseKernel has tests of its own."""
    import bench_kernels
    import kernel_ops

    monkeypatch.setattr(torch, "compile", lambda formula: formula)
    checked = set()
    for op in all_ops(gpu):
        arrays = op.arrays(37)
        pristine = {name: arrays[name].copy() for name in op.mutable}
        reference = op.reference(arrays)
        for name, method in bench_kernels.methods(op, "cuda").items():
            if name != "ElementwiseKernel":
                argument = op.tensors(arrays) if name.startswith("torch") else arrays
                bench_kernels.check(op, method, argument, arrays, pristine, reference)
                checked.add(name)
    assert checked == set(kernel_ops.METHODS) - {"ElementwiseKernel"}


@pytest.mark.parametrize("fault", [lambda x: x * 1.01, lambda x: x * np.nan, lambda x: x[:-1]])
def test_a_wrong_contender_is_not_timed(fault, capsys):
    import bench_kernels
    import measure

    for op in all_ops():
        fused = op.fused
        op.fused = lambda a, fused=fused: [fault(np.array(x, np.float64, ndmin=1)) for x in fused(a)]
        builders = bench_kernels.builders(op, 2**14, bench_kernels.select("cpu", True), None)
        table, failed = measure.built({"fused": builders["fused"]}, op.name)
        assert not table and list(failed) == ["fused"]
    assert "error: bias_act relu, fused: " in capsys.readouterr().err


def test_arrays_differ_and_are_whole():
    import op_base

    op = op_base.Op(np, np.random.default_rng(0))
    a, b = op.normal(5, 7), op.normal(3, op_base.BLOCK)
    assert not np.array_equal(a.ravel(), b.ravel()[:35]) and np.array_equal(b[0], b[2])
    for array in (a, b[1]):
        assert abs(float(array.std()) - 1.0) < 0.5 and np.isfinite(array).all()
    assert len(np.unique(b[1])) > 0.9 * op_base.BLOCK


def test_an_output_that_is_not_written_is_noticed():
    import bench_kernels

    op = all_ops()[0]
    arrays = op.arrays(8)
    with pytest.raises(ArithmeticError, match="wrong result"):
        bench_kernels.check(op, lambda a: [a["y"]], arrays, arrays, {}, op.reference(arrays))


def test_kernels_on_this_cpu(tmp_path):
    import bench_kernels
    import kernel_ops

    assert bench_kernels.main(["--device", "cpu", "--sizes", "16KB,64KB", *FAST, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "kernels.csv")
    assert {row["op"].split()[0] for row in rows} == set(kernel_ops.OPS)
    assert {row["contender"] for row in rows} == {"plain", "fused", "torch eager", "torch fused optimizer", "copy"}
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert int(row["bytes"]) <= int(row["size"]) and float(row["speedup"]) >= 0 and row["revision"]
    assert all(row["share_of_copy"] == "1" for row in rows if row["contender"] == "copy")


def test_kernels_on_a_gpu_are_graphs_of_launches_beyond_the_cache(gpu, tmp_path, capsys):
    """A contender that fails, as torch and ElementwiseKernel do here, is named and costs no other its row."""
    import bench_kernels

    assert bench_kernels.main(["--device", "cuda", "--sizes", "16KB", *FAST, "--out", str(tmp_path)]) == 1
    rows = rows_of(tmp_path / "kernels.csv")
    for op in {row["op"] for row in rows}:
        timed = {row["contender"] for row in rows if row["op"] == op and row["p50_us"]}
        assert {"plain", "fused", "copy"} <= timed
        failed = {row["contender"] for row in rows if row["op"] == op and row["note"] and not row["p50_us"]}
        assert "torch eager" in failed
    (stream,) = gpu.streams
    assert len(stream.graphs) > 20 and all(graph.launches for graph in stream.graphs)
    assert rows[0]["driver"] == "CUDA 12.8"
    assert "ElementwiseKernel: AttributeError" in capsys.readouterr().err


def test_more_sets_than_fit_into_the_cache(gpu):
    import bench_kernels

    (op, *_) = all_ops(gpu)
    sets = bench_kernels.sets_of(op, 16384, stand_in_gpu.device(gpu, True))
    assert sum(a["z"].nbytes + a["y"].nbytes for a in sets) > 150_000
    assert len({id(a["z"]) for a in sets}) == len(sets)


STEP_FAST = ["--images", "1024", "--passes", "1", "--rounds", "1", "--epochs", "1", "--settle", "0", "--block", "1e-3"]


@pytest.fixture
def small_sweeps(monkeypatch):
    import bench_step
    import step_contenders

    monkeypatch.setattr(bench_step, "BATCHES", (64, 256))
    monkeypatch.setattr(bench_step, "WIDTHS", (64,))
    monkeypatch.setattr(step_contenders, "CEILINGS", dict.fromkeys(step_contenders.CEILINGS, (64, 1)))


def test_steps_on_this_cpu(tmp_path, small_sweeps):
    import bench_step

    assert bench_step.main(["--device", "cpu", *STEP_FAST, "--out", str(tmp_path)]) == 0
    assert len(rows_of(tmp_path / "ceilings.csv")) == 3
    step = rows_of(tmp_path / "step.csv")
    assert {"plain", "fused", "fused, NVTX ranges attached", "torch eager, fused optimizer", "GEMMs alone"} <= {
        row["contender"] for row in step
    }
    for row in step:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) and float(row["to_gemm"]) > 0
    assert {(row["model"], row["layers"], row["batch"]) for row in step} == {
        ("m0", "784-128-64-47", "256"), ("m1", "784-400-240-120-47", "512"),
    }  # fmt: skip
    phases = rows_of(tmp_path / "phases.csv")
    assert {row["phase"] for row in phases} == {"gather", "forward", "loss", "backward", "optimizer", "rest"}
    assert all(float(row["p50_ms"]) > 0 for row in phases)
    sweep = rows_of(tmp_path / "sweep.csv")
    assert {(row["sweep"], row["batch"], row["width"]) for row in sweep} == {
        ("batch", "64", ""), ("batch", "256", ""), ("width", "512", "64"),
    }  # fmt: skip
    epoch = rows_of(tmp_path / "epoch.csv")
    assert {row["data"] for row in epoch} == {"synthetic bytes"} and {row["images"] for row in epoch} == {"1024"}


def test_steps_on_a_gpu_are_measured_in_both_precisions(gpu, tmp_path, small_sweeps, monkeypatch):
    """By the learners' own precision, and torch's; a graph has no phases. Plans of this run are not the user's."""
    import bench_step
    import step_contenders

    cache, torch_precisions, chosen = tmp_path / "cache", [], set()
    select = products.select
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(step_contenders, "set_torch_precision", lambda device, to: torch_precisions.append(to))
    monkeypatch.setattr(products, "select", lambda config, device: chosen.add(
        (config.fused, config.gemm, config.precision)) or select(config, device))  # fmt: skip
    monkeypatch.setattr(scratch, "select", products.select)
    assert bench_step.main(["--device", "cuda", *STEP_FAST, "--out", str(tmp_path)]) == 0
    for part in ("ceilings", "step", "phases", "sweep", "epoch"):
        rows = rows_of(tmp_path / f"{part}.csv")
        assert {row["precision"] for row in rows} == {"float32", "tf32"}, part
        if part != "ceilings":
            names = {"plain", "fused"} | ({"fused, CUDA graph"} if part != "phases" else set())
            assert names <= {row["contender"] for row in rows} and (part != "phases" or len(rows) == 2 * 2 * 2 * 6)
    assert torch_precisions == ["float32", "tf32"] * 5 and not cache.exists()
    learners = ((False, "cupy"), (True, "cupy"), (True, "auto"))
    assert chosen == {(*which, precision) for which in learners for precision in ("fp32", "tf32")}


def test_a_graph_that_cannot_be_captured_costs_no_other_its_row(gpu, tmp_path, small_sweeps, monkeypatch, capsys):
    import bench_step

    monkeypatch.setattr(products, "select", lambda config, device: products.Products(
        stand_in_gpu.ArrayGemm(device.xp), precision=config.precision, notice="there is no nvmath"))  # fmt: skip
    arguments = ["--device", "cuda", "--models", "m0", "--parts", "step,epoch", *STEP_FAST, "--out", str(tmp_path)]
    assert bench_step.main(arguments) == 1
    for part in ("step", "epoch"):
        names = {row["contender"] for row in rows_of(tmp_path / f"{part}.csv")}
        assert {"plain", "fused"} <= names and "fused, CUDA graph" not in names
    errors = capsys.readouterr().err
    assert errors.count("fused, CUDA graph: InputError: there is no nvmath") == 4


class Learner:
    """Notes what it is asked for."""

    device, config, steps_per_launch, batch_size = None, SimpleNamespace(lr=0.5), 4, 10

    def __init__(self):
        self.calls = []

    def begin_epoch(self, index, epoch=None):
        self.calls.append(("begin", len(index), epoch))

    def train(self, start, stop, lr):
        assert lr == 0.5
        self.calls.append((start, stop))

    def totals(self):
        self.calls.append("totals")


CPU = SimpleNamespace(kind="cpu")


def test_a_step_is_timed_by_whole_launches():
    import step_contenders

    learner = Learner()
    contender = step_contenders.stepping(learner, 109, CPU)
    for k in range(4):
        contender.run(k)
    assert contender.repeats == 4 and not contender.shared
    assert learner.calls == [("begin", 109, None), (0, 40), (40, 80), (0, 40), (40, 80)]
    one = step_contenders.stepping(learner, 109, CPU, steps=1)
    few = step_contenders.stepping(Learner(), 29, CPU)
    assert one.repeats == 1 and few.repeats == 2  # no more than there are
    contender.run(0)
    assert learner.steps_per_launch == 4
    one.run(9)
    assert learner.steps_per_launch == 1 and learner.calls[-1] == (90, 100)
    learner.device = SimpleNamespace(fused=True)
    assert step_contenders.stepping(learner, 109, CPU).shared


@pytest.mark.parametrize("images, steps", [(1234, 4), (25, 4), (1234, 1), (10 * 40 * 3, 4)])
def test_an_epoch_in_parts_is_an_epoch(images, steps):
    """It begins with the order and ends with the totals; but for its end it is made of whole launches."""
    import bench_step

    learner, index = Learner(), np.arange(images)
    learner.steps_per_launch = steps
    for part in range(bench_step.EPOCH_PARTS):
        bench_step.part_of_epoch(learner, index, 7, part)()
    (begin, *trained, totals) = learner.calls
    assert begin == ("begin", images, 7) and totals == "totals" and len(trained) == bench_step.EPOCH_PARTS
    assert trained[0][0] == 0 and trained[-1][1] == images
    assert all(a[1] == b[0] and b[0] % (10 * steps) == 0 for a, b in zip(trained, trained[1:]))
    whole = images // (10 * steps)
    assert {(b - a) // (10 * steps) for a, b in trained} <= {whole // 10, whole // 10 + 1}


def test_a_warm_up_has_every_shape_of_an_epoch():
    import bench_step

    learner = Learner()
    bench_step.warm_up(learner, np.arange(1234))
    assert learner.calls == [("begin", 54, 0), (0, 54), "totals"]  # a launch of 4 steps, a step, 4 images


def test_the_work_of_a_step():
    """Counted by hand for 784-2-47, batch 3: forward and weight gradients 2*3*(784*2 + 2*47) each, input gradient
    2*3*2*47; sgd moves 8 bytes per parameter."""
    import bench_step
    from mlp import configs

    flops, moved = bench_step.work(configs.preset("m0", hidden=(2,), batch_size=3))
    assert flops == 2 * 2 * 3 * (784 * 2 + 2 * 47) + 2 * 3 * 2 * 47
    assert moved == 8 * (784 * 2 + 2 * 47 + 2 + 47) + 3 * (784 + 8 * (2 + 47))


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("bench_kernels", ["--ops", "nothing"]),
        ("bench_kernels", ["--sizes", "64"]),
        ("bench_kernels", ["--sizes", "0KB"]),
        ("bench_kernels", ["--rounds", "0"]),
        ("bench_kernels", ["--device", "cuda"]),
        ("bench_step", ["--models", "nothing"]),
        ("bench_step", ["--parts", "nothing"]),
        ("bench_step", ["--images", "1"]),
        ("bench_step", ["--epochs", "0"]),
    ],
)
def test_refuses_in_one_sentence(script, arguments, tmp_path, capsys):
    if arguments == ["--device", "cuda"]:
        try:
            from kernels import BackendError, cuda

            cuda.check()
            pytest.skip("this machine has a GPU")
        except BackendError:
            pass
    module = __import__(script)
    assert module.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_ratio_is_that_of_quiet_times():
    """A machine that is busy for half of the time says nothing about the contenders."""
    import measure

    a, b = np.array([2.0, 2.0, 9.0, 2.0, 9.0]), np.array([1.0, 5.0, 1.0, 1.0, 7.0])
    assert measure.ratio(a, b) == "2"


def test_passes_add_up():
    import measure

    collected = {}
    for times in ([1.0, 2.0], [3.0]):
        measure.merge(collected, {"plain": np.array(times)})
    assert measure.percentiles(collected["plain"], "ms") == {
        "samples": 3, "p20_ms": "1400", "p50_ms": "2000", "p80_ms": "2600",
    }  # fmt: skip


def test_turns_give_every_contender_each_round(monkeypatch):
    import measure

    calls = []
    table = {name: measure.Contender(lambda k, name=name: calls.append(name), repeats=4) for name in "ab"}
    clock = lambda run, first, n: [run(k) for k in range(first, first + n)] and 1.0 * n  # noqa: E731
    samples = measure.in_turns(table, clock, rounds=3, blocks=2, block=5.0, settle=2.0)
    assert samples["a"].shape == (6,) and np.all(samples["a"] == 0.25)
    assert "".join(calls) == 12 * "a" + 24 * "b" + 24 * "a" + 12 * "b"  # 2 to settle, 2 blocks of 5


def test_the_revision_of_a_copy_without_history(monkeypatch):
    import machine

    monkeypatch.setenv("REVISION", "0123456789ab")
    assert machine.facts("cpu", "cpu")["revision"] == "0123456789ab"
