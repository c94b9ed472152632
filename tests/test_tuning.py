"""The choice of forms: what is timed, what is chosen, what is remembered, and what --explain says of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import kernels
from mlp import InputError, configs, explain, forms, tuning
from mlp.data import stratified_split
from mlp.forms import EPILOGUE, MASKED, OWN, SEPARATE, Algorithms, Form, Plan
from mlp.products import Products
from mlp.scratch import ScratchLearner
from mlp.step_graph import Program
from mlp.tuning import ALGORITHMS

from .stand_in_gpu import Library
from .training import cpu, easy_dataset

SIZES = (30, 16, 12, 7)
KEY = "a GPU, tf32, 30-16-12-7, relu, batch 8, cuBLASLt 12.9.3, workspace 0"
DEVICE = SimpleNamespace(name="a GPU", kind="cuda", xp=np, ops=kernels, chunk_rows=64, fused=True)


def config(**changes):
    return configs.preset("m1", **({"fused": True, "precision": "tf32"} | changes))


def products(own=None, precision="tf32"):
    return Products(Library(), own, precision, epilogues=True)


def times(forward, weight, input=None):
    of = {"forward": forward, "weight": weight}
    return of | ({"input": input} if input else {})


def test_the_fastest_forms_are_chosen():
    chosen, total = tuning.choose([
        times({SEPARATE: 3.0, OWN: 2.0}, {SEPARATE: 1.0, OWN: 4.0}),
        times({SEPARATE: 5.0, EPILOGUE: 4.0}, {SEPARATE: 1.0}, {SEPARATE: 2.0, OWN: 1.5}),
    ])  # fmt: skip
    assert chosen == [Form(OWN, SEPARATE), Form(EPILOGUE, SEPARATE, OWN)]
    assert total == 2.0 + 1.0 + 4.0 + 1.0 + 1.5


@pytest.mark.parametrize("saved, pair", [(0.5, (SEPARATE, SEPARATE)), (1.5, (MASKED, EPILOGUE))])
def test_a_backward_epilogue_pays_for_the_forward_one_that_it_needs(saved, pair):
    chosen, _ = tuning.choose([
        times({SEPARATE: 1.0, EPILOGUE: 1.5, MASKED: 2.0}, {SEPARATE: 1.0}),
        times({SEPARATE: 1.0}, {SEPARATE: 1.0}, {SEPARATE: 3.0, EPILOGUE: 3.0 - saved}),
    ])  # fmt: skip
    assert (chosen[0].forward, chosen[1].input) == pair


def test_a_mask_is_left_only_for_an_epilogue_that_reads_it():
    chosen, total = tuning.choose([
        times({SEPARATE: 3.0, EPILOGUE: 2.0, MASKED: 1.0}, {SEPARATE: 1.0}),
        times({SEPARATE: 1.0}, {SEPARATE: 1.0}, {SEPARATE: 1.0, EPILOGUE: 3.0}),
    ])  # fmt: skip
    assert (chosen[0].forward, chosen[1].input, total) == (EPILOGUE, SEPARATE, 6.0)


def calls_of(body, recorder):
    return [call.function.__name__ for call in Program.of(recorder, body).calls]


def test_every_form_is_timed_with_what_it_replaces():
    seen = []

    def timer(body, recorder):
        seen.append(calls_of(body, recorder))
        return float(len(seen[-1]))

    entry = tuning.measure(config(), DEVICE, products(), SIZES, 8, timer)
    each = 2 * ALGORITHMS  # with padding and without
    assert seen.count(["forward", "bias_act"]) == 3 * each
    assert seen.count(["forward_act"]) == (2 + 2 + 1) * each  # two with a mask, too
    assert seen.count(["input_gradient", "bias_act_backward"]) == 2 * each == seen.count(["input_gradient_relu"])
    assert seen.count(["bias_act_backward", "weight_gradient"]) == each == seen.count(["weight_gradient_bias"])
    assert seen.count(["weight_gradient"]) == 2 * each
    assert len(seen) == (3 + 5 + 2 * 2 + 2 + 2) * each
    assert entry["forms"] == [
        [MASKED, SEPARATE, SEPARATE], [MASKED, SEPARATE, EPILOGUE], [EPILOGUE, EPILOGUE, EPILOGUE],
    ]  # fmt: skip
    assert entry["padded"] is False  # nothing gained: fewer columns
    assert entry["algorithms"] == [[0, 0, 0]] * 3  # nor by another than the first


def numbers_of(body, recorder):
    """The names of the library's products and the algorithms that they are told to take."""
    calls = Program.of(recorder, body).calls
    return {c.function.__name__: c.kwargs.get("algorithm", 0) for c in calls if "bias_act" not in c.function.__name__}


def test_the_fastest_algorithm_of_each_form_is_chosen():
    fastest = {"forward": 3, "forward_act": 5, "weight_gradient": 7, "weight_gradient_bias": 0, "input_gradient": 1,
               "input_gradient_relu": 2}  # fmt: skip

    def timer(body, recorder):
        ((name, number),) = numbers_of(body, recorder).items()
        return (10.0 if name in ("forward_act", "weight_gradient") else 20.0) + abs(number - fastest[name])

    entry = tuning.measure(config(), DEVICE, products(), SIZES, 8, timer)
    assert entry["forms"] == [[EPILOGUE, SEPARATE, SEPARATE]] + [[EPILOGUE, SEPARATE, SEPARATE]] * 2
    assert entry["algorithms"] == [[5, 7, 0], [5, 7, 1], [5, 7, 1]]
    assert entry["us"][1]["input"] == {SEPARATE: 20e6, EPILOGUE: 20e6} and entry["us"][2]["weight"][EPILOGUE] == 20e6
    assert entry["total"] == (3 * 20 + 2 * 20) * 1e6


def test_algorithms_that_the_library_lacks_are_passed_over():
    def timer(body, recorder):
        ((_, number),) = numbers_of(body, recorder).items()
        return 8.0 - number if number in (1, 2, 4) else None

    assert tuning.measure(config(), DEVICE, products(), SIZES, 8, timer)["algorithms"] == [[4, 4, 0]] + [[4, 4, 4]] * 2
    with pytest.raises(InputError, match="^nothing computes the forward product of layer 0 here; give --gemm cupy$"):
        tuning.measure(config(), DEVICE, products(), SIZES, 8, lambda body, recorder: None)


def test_our_products_are_timed_once_beside_the_library_s():
    own, seen = Library(), []

    def timer(body, recorder):
        calls = Program.of(recorder, body).calls
        ours = [call.function for call in calls if call.function in vars(own).values()]
        seen.extend(ours)
        return 1.0 if ours == [own.weight_gradient] else 2.0 + len(ours)

    for name in ("forward", "weight_gradient", "input_gradient"):
        setattr(own, name, getattr(own, name))
    entry = tuning.measure(config(), DEVICE, products(own), SIZES, 8, timer)
    assert [forms[1] for forms in entry["forms"]] == [OWN] * 3
    assert not any(OWN in (forward, back) for forward, _, back in entry["forms"])
    assert [seen.count(f) for f in (own.forward, own.weight_gradient, own.input_gradient)] == [2 * 3, 2 * 3, 2 * 2]
    assert all(numbers[1] == 0 for numbers in entry["algorithms"])


def test_each_rounding_to_bfloat16_is_counted_once_and_not_for_our_products():
    seen = {}

    def timer(body, recorder):
        (*before, last) = calls_of(body, recorder)
        last = before.pop() if last.startswith("bias_act") else last
        seen.setdefault(last, []).append(before.count("to_bfloat16"))
        return 1.0

    tuning.measure(config(precision="bf16"), DEVICE, products(Library(), "bf16"), SIZES, 8, timer)
    assert set(seen["forward_act"]) == {1} == set(seen["weight_gradient_bias"]) and set(seen["input_gradient"]) == {0}
    for name in ("forward", "weight_gradient"):
        assert seen[name].count(0) == 2 * 3 and seen[name].count(1) == 2 * 3 * ALGORITHMS


def test_padding_is_chosen_where_it_is_faster():
    widths = []

    def timer(body, recorder):
        (*_, last) = Program.of(recorder, body).calls
        arrays = [a for a in (*last.args, *last.kwargs.values()) if isinstance(a, np.ndarray)]
        widths.append({n for a in arrays for n in a.shape})
        return 1.0 if 8 in widths[-1] else 2.0

    assert tuning.measure(config(), DEVICE, products(), SIZES, 5, timer)["padded"] is True
    widths.clear()
    assert tuning.measure(config(), DEVICE, products(), (30, 16, 8), 5, timer)["padded"] is False
    assert len(widths) == ALGORITHMS * (3 + 1 + 2 + 2 + 2)  # there is nothing to pad


def test_forms_that_the_library_lacks_are_passed_over():
    def timer(body, recorder):
        return None if "forward_act" in calls_of(body, recorder) else 1.0

    entry = tuning.measure(config(), DEVICE, products(), SIZES, 8, timer)
    assert all(forward == SEPARATE for forward, _, _ in entry["forms"])
    assert entry["forms"][2] == [SEPARATE, SEPARATE, SEPARATE]


@pytest.mark.parametrize("activation, own, expected", [
    ("relu", False, {SEPARATE, EPILOGUE}), ("gelu", False, {SEPARATE}), ("gelu", True, {SEPARATE, OWN}),
])  # fmt: skip
def test_candidates_of_a_hidden_layer(activation, own, expected):
    of = forms.candidates(1, 3, activation, True, own)
    assert set(of["input"]) == expected == set(of["forward"]) - {MASKED}
    assert EPILOGUE not in of["weight"] and (MASKED in of["forward"]) == (EPILOGUE in of["input"])
    assert MASKED not in forms.candidates(2, 3, activation, True, own)["forward"]
    assert EPILOGUE in forms.candidates(2, 3, activation, True, own)["forward"]  # the last has no activation
    assert "input" not in forms.candidates(0, 3, activation, True, own)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The calls of tuning.measure, which is replaced; plans are kept in tmp_path."""
    calls = []
    entry = {"total": 3.0, "padded": True, "forms": [[OWN, SEPARATE, SEPARATE]] * 3, "us": [],
             "algorithms": [[0, 1, 2]] * 3}  # fmt: skip
    monkeypatch.setattr(tuning, "measure", lambda *args: calls.append(args) or dict(entry))
    monkeypatch.setattr(tuning, "GraphTimer", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def test_a_plan_is_measured_once_and_remembered(measured):
    plan, entry = tuning.plan(config(), DEVICE, products(), SIZES, 8)
    assert plan == Plan((Form(OWN),) * 3, True, (Algorithms(0, 1, 2),) * 3, rows=8) and len(measured) == 1
    assert tuning.plan(config(), DEVICE, products(), SIZES, 8) == (plan, entry) and len(measured) == 1
    assert json.loads(tuning.cache_file().read_text()).keys() == {KEY}
    tuning.plan(config(), DEVICE, products(), SIZES, 16)
    tuning.plan(config(activation="silu"), DEVICE, products(), SIZES, 8)
    tuning.plan(config(), DEVICE, products(), SIZES, 8, tune=True)
    assert len(measured) == 4


@pytest.mark.parametrize("changes", [{"version": "13.0.0"}, {"workspace_bytes": 1}])
def test_a_plan_is_for_one_version_and_workspace(measured, changes):
    other = products()
    vars(other.library).update(changes)
    for chosen in (products(), other, products(), other):
        tuning.plan(config(), DEVICE, chosen, SIZES, 8)
    assert len(measured) == 2 and len(json.loads(tuning.cache_file().read_text())) == 2
    fp32 = config(precision="fp32")
    tuning.plan(fp32, DEVICE, products(), SIZES, 8, tune=True)
    assert tuning.plan(fp32, DEVICE, other, SIZES, 8) == (forms.default(3), {})


def test_a_plan_with_our_products_is_for_runs_that_have_them(measured):
    """--gemm auto and --gemm cublaslt do not read each other's."""
    for chosen in (products(), products(Library())) * 2:
        tuning.plan(config(), DEVICE, chosen, SIZES, 8)
    assert len(measured) == 2


def test_a_file_of_before_there_were_algorithms(measured):
    """Its plans are of no version of cuBLASLt: they stay where they are, and are found anew."""
    old = {f"a GPU, {p}, 30-16-12-7, relu, batch 8": {"forms": [[EPILOGUE] * 3] * 3, "padded": True} for p in
           ("tf32", "fp32")}  # fmt: skip
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(json.dumps(old))
    assert tuning.plan(config(precision="fp32"), DEVICE, products(), SIZES, 8) == (forms.default(3), {})
    assert tuning.plan(config(), DEVICE, products(), SIZES, 8)[0].algorithms and len(measured) == 1
    assert json.loads(tuning.cache_file().read_text()).keys() == {KEY, *old}


def test_algorithms_are_for_the_batch_that_was_timed():
    plan = Plan((Form(),) * 2, False, (Algorithms(1, 2, 3), Algorithms(4, 5, 6)), rows=8)
    assert [plan.algorithm(1, kind, 8) for kind in forms.KINDS] == [4, 5, 6] and plan.algorithm(0, "input", 8) == 3
    assert plan.algorithm(1, "forward", 7) == 0 == forms.default(2).algorithm(1, "weight", 8)


def test_fp32_is_tuned_only_when_asked(measured):
    assert tuning.plan(config(precision="fp32"), DEVICE, products(), SIZES, 8) == (forms.default(3), {})
    assert not measured and not tuning.cache_file().exists()
    tuned, _ = tuning.plan(config(precision="fp32"), DEVICE, products(), SIZES, 8, tune=True)
    assert tuning.plan(config(precision="fp32"), DEVICE, products(), SIZES, 8)[0] == tuned != forms.default(3)


def test_there_is_nothing_to_tune_without_epilogues(measured):
    assert tuning.plan(config(), DEVICE, Products.arrays(), SIZES, 8) == (forms.default(3), {})
    own_only = Products(None, object(), "tf32")
    assert tuning.plan(config(), DEVICE, own_only, SIZES, 8) == (forms.default(3, own=True), {})
    with pytest.raises(InputError, match="^--tune "):
        tuning.plan(config(), DEVICE, Products.arrays(), SIZES, 8, tune=True)
    assert not measured


@pytest.mark.parametrize("entry", [
    None, [], {}, {"forms": 3}, {"forms": [["own"]], "padded": True}, {"forms": [["own"]], "algorithms": [[0]]},
    {"forms": [["own"]] * 2, "padded": True, "algorithms": [[0]]}, {"forms": [], "padded": True, "algorithms": []},
    {"forms": [["own"]], "padded": True, "algorithms": [["own"]]},
    {"forms": [["own"]], "padded": True, "algorithms": [[0, 0, 0, 0]]},
])  # fmt: skip
def test_a_damaged_plan_is_named(measured, entry):
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(json.dumps({KEY: entry}))
    with pytest.raises(InputError, match="tuning.json has no usable plan for a GPU, tf32.*delete it"):
        tuning.plan(config(), DEVICE, products(), SIZES, 8)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(measured, text):
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(text)
    with pytest.raises(InputError, match="tuning.json.*delete it"):
        tuning.plan(config(), DEVICE, products(), SIZES, 8)


def test_a_file_that_cannot_be_written_is_named(measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="tuning.json"):
        tuning.plan(config(), DEVICE, products(), SIZES, 8)


@pytest.mark.parametrize("batch", [64, "full"])
def test_explain_lists_every_call(batch):
    data = easy_dataset(300, 5)
    split = stratified_split(data.labels)
    learner = ScratchLearner(configs.preset("m1", batch_size=batch), data, cpu("fused", 64), len(split.train))
    learner.begin_epoch(split.train)
    text = explain.explain(learner, {})
    for program in learner.programs().values():
        for call in program.calls:
            assert f"{call.phase:17} {call.function.__name__}" in text
    assert "memory: " in text and "layer3: forward separate; weight separate; input separate" in text
    assert "executed one after another" in text and "beside" not in text
    assert ("update after the last chunk: 1 calls" in text) == (batch == "full")


def test_explain_shows_what_was_measured():
    data = easy_dataset(300, 7)
    split = stratified_split(data.labels)
    numbers = Algorithms(), Algorithms(0, 4, 2), Algorithms()
    learner = ScratchLearner(configs.preset("m1", hidden=(16, 12)), data, cpu("fused"), len(split.train),
                             plan=Plan((Form(),) * 3, True, numbers, rows=len(split.train)))  # fmt: skip
    learner.begin_epoch(split.train)
    us = [{kind: {SEPARATE: 7.5, EPILOGUE: 6.25} for kind in forms.KINDS}] * 3
    text = explain.explain(learner, {"us": us})
    assert "tuned; last layer padded to 8 columns" in text
    assert "layer1: forward separate (separate 7.5 us, epilogue 6.25 us); weight separate by algorithm 4 (sep" in text
    assert "counted from 0" in text and "input separate by algorithm 2 (separate 7.5" in text and text.count("by algorithm") == 2
