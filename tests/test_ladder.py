"""profile/ladder.py: the naive trainer trains the model, launches and bytes are those made, and every rung runs."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kernels import plain
from mlp import configs, products, tuning
from mlp.forms import EPILOGUE, SEPARATE, Form, Plan
from mlp.scratch import ScratchLearner

from . import stand_in_gpu
from .test_bench import rows_of
from .training import ROOT, all_rows, close, cpu, easy_dataset

FAST = ["--images", "8192", "--passes", "1", "--rounds", "1", "--settle", "0", "--block", "1e-3"]
DATA = easy_dataset(300, 5)
CONFIG = configs.preset("m1", hidden=(32, 16), batch_size=50, fused=True)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profile"))
    import step_contenders
    import step_costs

    monkeypatch.setattr(step_contenders, "CEILINGS", dict.fromkeys(step_contenders.CEILINGS, (64, 1)))
    monkeypatch.setattr(step_costs, "CALLS", 10)
    monkeypatch.setattr(step_costs, "UPLOADED", 1)


@pytest.mark.parametrize("how", [{}, {"one_adam": True}, {"one_adam": True, "resident": True}])
def test_the_naive_trainer_trains_the_same_model(how):
    from array_trainer import ArrayTrainer

    ours = ScratchLearner(CONFIG, DATA, cpu("fused"), 300)
    naive = ArrayTrainer(CONFIG, DATA, cpu("plain"), **how)
    before = naive.parameters.copy()
    for learner in (ours, naive):
        learner.begin_epoch(all_rows(DATA), 3)
        learner.train(0, 300, 0.01)
    moved = naive.parameters - before
    assert close(moved, np.asarray(ours.model.parameters) - before, 1e-3) and np.abs(moved).max() > 0.02
    assert close(naive.totals, ours.totals(), 1e-5) and naive.steps == 6
    assert len(naive.adams) == (1 if how else 6)


class Counted(np.ndarray):
    """An array that counts what is done with it: array operations, and the bytes that they read and write."""

    launches = moved = 0

    def _note(self, inputs, result):
        Counted.launches += 1
        Counted.moved += sum({id(a): a.nbytes for a in inputs if isinstance(a, np.ndarray)}.values()) + result.nbytes

    def _apply(self, function, inputs, out=(), **kwargs):
        if out:
            kwargs["out"] = tuple(map(_bare, out))
        result = np.asarray(function(*map(_bare, inputs), **kwargs))
        self._note(inputs, result)
        return out[0] if out else result.view(Counted)

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        return self._apply(getattr(ufunc, method), inputs, out, **kwargs)

    def __array_function__(self, function, types, args, kwargs):
        if function.__name__ == "empty_like":
            return function(*map(_bare, args), **kwargs).view(Counted)
        return self._apply(function, args, **kwargs)

    def argmax(self, **kwargs):
        return self._apply(np.ndarray.argmax, [self], **kwargs)

    def astype(self, dtype):
        return self._apply(np.ndarray.astype, [self], dtype=dtype)

    def __getitem__(self, index):
        result = np.asarray(super().__getitem__(index)).view(Counted)
        if any(isinstance(part, np.ndarray) for part in (index if isinstance(index, tuple) else (index,))):
            self._note([result], result)  # a view takes no launch
        return result

    def __setitem__(self, index, value):
        super().__setitem__(index, value)
        Counted.launches += 1


def _bare(array):
    return array.view(np.ndarray) if isinstance(array, Counted) else array


def counted(*shape, dtype=np.float32):
    return np.ones(shape, dtype).view(Counted)


def test_array_ops_are_counted_as_they_are_made():
    import step_costs

    B, N = 500, 300
    dy, labels, x = counted(B, N), counted(B, dtype=np.int32), counted(B, 784)
    saved, out, bias, arena = counted(B, N), counted(B, N), counted(N), [counted(B * N) for _ in range(4)]
    totals = counted(2, dtype=np.float64)
    calls = {
        "softmax_cross_entropy": lambda: plain.softmax_cross_entropy(dy, labels, out=out, totals=totals),
        "adam_step": lambda: plain.adam_step(*arena, step=1, lr=0.1),
        "gather_batch": lambda: plain.gather_batch(x.astype(np.uint8), labels, labels, out_x=x, out_y=labels.copy()),
    }
    for activation in ("relu", "identity"):
        calls[f"bias_act {activation}"] = lambda a=activation: plain.bias_act(dy, bias, a, out=dy)
        calls[f"bias_act_backward {activation}"] = (
            lambda a=activation: plain.bias_act_backward(dy, saved, a, out=dy, bias_grad=bias)
        )
    assert calls.keys() == step_costs.ARRAY_OPS.keys()
    for name, call in calls.items():
        Counted.launches = Counted.moved = 0
        call()
        elements = x.size if name == "gather_batch" else dy.size
        if name == "gather_batch":  # the cast of x is the test's
            Counted.launches, Counted.moved = Counted.launches - 1, Counted.moved - 5 * x.size
        launches, moved = step_costs.ARRAY_OPS[name]
        assert Counted.launches == launches, name
        assert moved <= Counted.moved / elements <= 1.03 * moved, name  # beside the large arrays there are some per row


def test_the_work_of_a_naive_step():
    """Counted by hand for 784-2-5, batch 3."""
    import step_costs
    from array_trainer import ArrayTrainer

    config = replace(CONFIG, hidden=(2,), batch_size=3)
    products_of = 2 * (2 * 3 * 784 * 2) + 3 * (2 * 3 * 2 * 5)
    moved = 4 * (2 * (3 * 784 + 784 * 2 + 3 * 2) + 3 * (3 * 2 + 2 * 5 + 3 * 5))
    moved += (16 + 20) * 6 + (8 + 4) * 15 + 36 * 15
    for how, launches in (({}, 5 + 8 + 33 + 4 * 13 + 3), ({"one_adam": True}, 5 + 8 + 33 + 13 + 3),
                          ({"one_adam": True, "resident": True}, 5 + 8 + 33 + 13 + 11)):  # fmt: skip
        trainer = ArrayTrainer(config, DATA, cpu("plain"), **how)
        adam = 120 * sum(p.size for p, *_ in trainer.adams)
        assert step_costs.of_trainer(trainer) == (launches, moved + adam + 7 * 3 * 784, products_of, 0)
    trainer = ArrayTrainer(config, DATA, cpu("plain"))
    trainer.device = SimpleNamespace(kind="cuda")
    assert step_costs.of_trainer(trainer)[0] == 5 + 8 + 33 + 4 * 13 + 2  # the copies of images and labels
    assert step_costs.of_trainer(trainer).uploaded == 4 * 3 * 785


def test_the_work_of_a_program():
    """Counted by hand for 784-2-5, batch 3; arenas begin on 16 bytes."""
    import step_costs

    learner = ScratchLearner(replace(CONFIG, hidden=(2,), batch_size=3), DATA, cpu("fused"), 300)
    learner.begin_epoch(all_rows(DATA), 1)
    (program,) = learner.programs().values()
    by_name = {}
    for call in program.calls:
        by_name.setdefault(call.function.__name__, []).append(step_costs.of_call(call))
    arena = 4 * learner.model.parameters.size
    assert by_name["gather_batch"] == [(1, 3 * 784 + 3 * 4 + 3 * 4 + 8 + 3 * 784 * 4 + 3 * 4, 0, 0)]
    assert by_name["forward"] == [(1, 4 * (3 * k + k * n + 3 * n), 2 * 3 * k * n, 0) for k, n in ((784, 2), (2, 5))]
    assert by_name["weight_gradient"] == by_name["forward"][::-1]
    assert by_name["input_gradient"] == [(1, 4 * (3 * 5 + 2 * 5 + 3 * 2), 2 * 3 * 2 * 5, 0)]
    assert by_name["bias_act"] == [(1, 4 * (2 * 3 * n + n), 0, 0) for n in (2, 5)]
    assert by_name["bias_act_backward"] == [(1, 4 * (2 * 15 + 15 + 5), 0, 0), (1, 4 * (2 * 6 + 6 + 2), 0, 0)]
    assert by_name["adam_step"] == [(1, 7 * arena + 4 + 4, 0, 0)]
    total = step_costs.of_program(program)
    assert total.launches == len(program.calls) == 1 + 1 + 2 + 2 + 1 + 2 + 2 + 1 + 1
    assert total == step_costs.Work.total(work for works in by_name.values() for work in works)


@pytest.mark.parametrize("work, steps, expected", [
    ((10, 100, 1000, 0), 0, (10 * 5.0, "launches")),  # the host is the slower one
    ((10, 100, 1000, 0), 1, (100 * 0.1 + 1000 * 0.02 + 10 * 1.0 + 5.0, "flops")),
    ((10, 100, 1000, 0), 5, (100 * 0.1 + 1000 * 0.02 + 10 * 1.0 + 1.0, "flops")),
    ((1, 900, 1000, 0), 0, (900 * 0.1 + 1000 * 0.02 + 1.0, "bytes")),
    ((30, 10, 10, 0), 1, (10 * 0.1 + 10 * 0.02 + 30 * 1.0 + 5.0, "nodes")),
    ((2, 10, 10, 0), 1, (10 * 0.1 + 10 * 0.02 + 2 * 1.0 + 5.0, "launches")),
    ((1, 10, 10, 100), 0, (5.0 + 100 * 0.5, "launches")),
])  # fmt: skip
def test_a_prediction_is_the_sum_of_its_terms(work, steps, expected):
    import step_costs

    costs = step_costs.Costs(launch=5.0, node=1.0, byte=0.1, upload=0.5, flop={"tf32": 0.02})
    seconds, bound = costs.predict(step_costs.Work(*work), "tf32", steps)
    assert (seconds, bound) == (pytest.approx(expected[0]), expected[1])
    row = costs.predicted(step_costs.Work(*work), "tf32", steps)
    assert float(row["predicted_us"]) == pytest.approx(1e6 * seconds, rel=1e-3)
    assert "bf16" in costs.predicted(step_costs.Work(*work), "bf16")["note"]


def test_costs_are_those_of_the_quiet_samples():
    import step_costs

    samples = {"launch": [2e-6, 2e-6, 9e-6], "matrix product 64, float32": [1e-3] * 3, "copy 1 MB": [2e-3] * 3,
               "copy 1 MB, torch": [1e-3] * 3}  # fmt: skip
    arrays = {name: np.array(times) for name, times in samples.items()}
    costs, rows = step_costs.measured(arrays, cpu("fused"))
    assert costs.launch == costs.node == pytest.approx(2e-6) and costs.upload == 0  # a CPU calls and computes in turns
    assert costs.byte == pytest.approx(1e-3 / 2**21) and costs.flop == {"float32": pytest.approx(1e-3 / (2 * 64**3))}
    assert {row["name"]: row["unit"] for row in rows} == {
        "launch": "us", "matrix product 64, float32": "GFLOP/s", "copy 1 MB": "GB/s", "copy 1 MB, torch": "GB/s",
    }  # fmt: skip
    arrays |= {"node": np.array([1e-6]), "upload": np.array([4e-3])}
    costs, _ = step_costs.measured(arrays, SimpleNamespace(kind="cuda"))
    assert (costs.node, costs.upload) == (1e-6, pytest.approx(4e-3 / 2**20))


def assert_plausible(rows):
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) and float(row["speedup"]) > 0
        if row["launches"]:
            assert float(row["predicted_us"]) > 0 and row["bound"] in ("launches", "bytes", "flops", "nodes")
        else:
            assert row["note"]
    assert rows[0]["speedup"] == rows[0]["gain"] == "1"


def test_the_ladder_of_this_cpu(tmp_path):
    import ladder
    import result_files

    assert ladder.main(["--device", "cpu", *FAST, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.csv", "ladder.csv"]
    rows = result_files.read(tmp_path)["ladder.csv"]
    assert_plausible(rows)
    assert [row["rung"] for row in rows[:3]] == ["plain", "arena Adam", "fused ops"]
    assert [int(row["launches"]) for row in rows[:3]] == [171, 171 - 7 * 13, 23]
    assert {row["rung"] for row in rows[3:]} <= {"torch eager, fused optimizer"}
    weights = 2 * 784 * 400 + 3 * (400 * 240 + 240 * 120 + 120 * 47)
    assert {row["flops"] for row in rows[:3]} == {str(2 * 512 * weights)}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The stand-in for CuPy, in which torch sees a GPU, too; plans are kept in tmp_path."""
    import ladder
    import step_contenders

    cupy = stand_in_gpu.install(monkeypatch)
    for module in (ladder, step_contenders):
        monkeypatch.setattr(module, "select", lambda kind, fused: stand_in_gpu.device(cupy, fused))
    monkeypatch.setattr(products, "select", stand_in_gpu.select_products)
    monkeypatch.setattr(tuning, "GraphTimer", Timer)
    monkeypatch.setattr(step_contenders, "torch_can", lambda kind: True)
    monkeypatch.setattr(step_contenders, "torch_captured", lambda config, data, stream: lambda k: None)
    learner = step_contenders.learner
    monkeypatch.setattr(step_contenders, "learner", lambda name, config, data, device: learner(
        "plain" if name == step_contenders.EAGER else name, config, data, device))  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cupy


class Timer:
    """Finds the epilogues of forward products the fastest, and nothing else."""

    def __init__(self, device):
        pass

    def __call__(self, body, recorder):
        with recorder.recording() as calls:
            body()
        return 1.0 if "forward_act" in [call.function.__name__ for call in calls] else 2.0


def test_every_rung_of_a_gpu(gpu, monkeypatch, tmp_path):
    import ladder
    import result_files
    import step_contenders

    precisions = []
    monkeypatch.setattr(step_contenders, "set_torch_precision", lambda device, precision: precisions.append(precision))
    out = tmp_path / "out"
    assert ladder.main(["--device", "cuda", *FAST, "--out", str(out)]) == 0
    rows = result_files.read(out)["ladder.csv"]
    assert_plausible(rows)
    assert [(row["rung"], row["precision"]) for row in rows] == [
        ("plain", "float32"), ("arena Adam", "float32"), ("resident data", "float32"), ("fused ops", "float32"),
        ("graph", "float32"), ("graph, 16 steps per launch", "float32"), ("tuned", "float32"), ("TF32", "tf32"),
        ("epilogues", "tf32"), ("own GEMM", "tf32"), ("bf16", "bf16"),
        *((name, precision) for precision in ("float32", "tf32") for name in
          ("torch eager, fused optimizer", "torch CUDA graph, fused optimizer")),
    ]  # fmt: skip
    by_rung = {row["rung"]: row for row in rows}
    assert "forward of layers 0, 1, 2, 3: epilogue" in by_rung["epilogues"]["note"] and not by_rung["TF32"]["note"]
    launches = {name: int(row["launches"]) for name, row in by_rung.items() if row["launches"]}
    assert launches["plain"] == 171 - 1 and launches["resident data"] == 171 - 3 - 7 * 13 + 11
    assert launches["fused ops"] == launches["graph"] == launches["TF32"] == 23
    assert launches["epilogues"] == 23 - 4 and launches["own GEMM"] == 23 - 4 - 3
    assert launches["bf16"] == launches["epilogues"] + 1 + 4 + 4  # the parameters, inputs and gradients, rounded
    assert {"float32", "tf32"} == set(precisions)
    costs = {row["name"]: row["unit"] for row in result_files.read(out)["costs.csv"]}
    assert costs == {"launch": "us", "node": "us", "upload": "GB/s", "copy 1 MB": "GB/s"} | {
        f"matrix product{n}": "GFLOP/s" for n in (" 64, float32", " 64, tf32", ", bf16")
    }
    steps = result_files.read(out)["launches.csv"]
    assert [(row["contender"], row["precision"], row["steps"]) for row in steps] == [
        (*which, str(n)) for which in (("graph", "float32"), ("epilogues", "tf32")) for n in (1, 2, 4, 8, 16)
    ]
    assert not (tmp_path / "cache").exists() and os.environ["XDG_CACHE_HOME"] == str(tmp_path / "cache")


def test_a_gain_is_over_the_rung_that_is_changed():
    import ladder
    import step_costs

    rung = lambda name, gains=True: ladder.Rung(name, "what", "float32", None, gains)  # noqa: E731
    climb = object.__new__(ladder.Ladder)
    rungs = [rung("a"), rung("b"), rung("failed"), rung("c"), rung("d", False), rung("e", False)]
    beside = [rung("t", False)]
    climb.known = {r.key: ladder.Known(work=step_costs.Work(1, 1, 1)) for r in rungs} | {beside[0].key: ladder.Known()}
    times = {"a": 12.0, "b": 6.0, "c": 2.0, "d": 4.0, "e": 1.0, "t": 3.0}
    climb.samples = {f"{name}, float32": np.array([t, t]) for name, t in times.items()}
    costs = step_costs.Costs(1.0, 1.0, 1.0, 0.0, {"float32": 1.0})
    rows = list(climb.rows(rungs, beside, costs))
    assert {row["rung"]: row.get("gain") for row in rows} == {
        "a": "1", "b": "2", "c": "3", "d": "0.5", "e": "2", "t": None,
    }  # fmt: skip
    assert {row["rung"]: row["speedup"] for row in rows} == {
        "a": "1", "b": "2", "c": "6", "d": "3", "e": "12", "t": "4",
    }  # fmt: skip


def test_rungs_that_fail_are_named_and_cost_no_other_its_row(gpu, monkeypatch, tmp_path, capsys):
    import ladder

    from mlp import InputError

    def select(config, device):
        if config.gemm == "cublaslt":
            raise InputError("no nvmath here")
        if config.gemm == "auto":
            return replace(stand_in_gpu.select_products(replace(config, gemm="cupy"), device), notice="no nvmath here")
        return stand_in_gpu.select_products(config, device)

    monkeypatch.setattr(products, "select", select)
    assert ladder.main(["--device", "cuda", *FAST, "--out", str(tmp_path / "out")]) == 1
    rows = rows_of(tmp_path / "out" / "ladder.csv")
    assert [row["rung"] for row in rows if row["launches"]] == [
        "plain", "arena Adam", "resident data", "fused ops", "own GEMM",
    ]  # fmt: skip
    assert not (tmp_path / "out" / "launches.csv").exists()
    errors = capsys.readouterr().err
    for rung in ("graph, float32", "tuned, float32", "TF32, tf32", "epilogues, tf32", "bf16, bf16",
                 "matrix product, bf16"):  # fmt: skip
        assert f"error: the ladder, {rung}: InputError: " in errors and "no nvmath here" in errors


def test_the_forms_of_a_plan_in_words():
    import ladder

    plan = Plan((Form(EPILOGUE, SEPARATE), Form(EPILOGUE, SEPARATE, EPILOGUE), Form(SEPARATE, EPILOGUE, "own")), True)
    assert ladder.forms(plan) == (
        "forward of layers 0, 1: epilogue; input of layers 1: epilogue; weight of layers 2: epilogue; "
        "input of layers 2: own; last layer padded"
    )
    assert ladder.forms(Plan((Form(),) * 3)) == "all separate"


@pytest.mark.parametrize("arguments", [["--model", "m0"], ["--model", "m1c"], ["--model", "nothing"],
                                       ["--images", "4096"], ["--rounds", "0"], ["--settle", "-1"]])  # fmt: skip
def test_refuses_in_one_sentence(arguments, tmp_path, capsys):
    import ladder

    assert ladder.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [None, "somewhere"])
def test_the_private_cache_is_gone_afterwards(before, monkeypatch):
    import step_contenders

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if before:
        monkeypatch.setenv("XDG_CACHE_HOME", before)
    with pytest.raises(RuntimeError), step_contenders.private_cache():
        folder = tuning.cache_file().parents[1]
        assert folder.is_dir() and str(folder) == os.environ["XDG_CACHE_HOME"] != before
        raise RuntimeError
    assert os.environ.get("XDG_CACHE_HOME") == before and not folder.exists()
