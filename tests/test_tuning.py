"""The choice of forms: what is timed, what is chosen, what is remembered, and what --explain says of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import kernels
from mlp import InputError, configs, explain, forms, tuning
from mlp.data import stratified_split
from mlp.forms import EPILOGUE, OWN, SEPARATE, Form, Plan
from mlp.products import Products
from mlp.scratch import ScratchLearner
from mlp.step_graph import Program

from .stand_in_gpu import Library
from .training import cpu, easy_dataset

SIZES = (30, 16, 12, 7)
DEVICE = SimpleNamespace(name="a GPU", kind="cuda", xp=np, ops=kernels, chunk_rows=64, fused=True)


def config(**changes):
    return configs.preset("m1", **({"fused": True, "precision": "tf32"} | changes))


def products(own=None):
    return Products(Library(), own, "tf32", epilogues=True)


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


@pytest.mark.parametrize("saved, pair", [(0.5, (SEPARATE, SEPARATE)), (1.5, (EPILOGUE, EPILOGUE))])
def test_a_backward_epilogue_pays_for_the_forward_one_that_it_needs(saved, pair):
    chosen, _ = tuning.choose([
        times({SEPARATE: 1.0, EPILOGUE: 2.0}, {SEPARATE: 1.0}),
        times({SEPARATE: 1.0}, {SEPARATE: 1.0}, {SEPARATE: 3.0, EPILOGUE: 3.0 - saved}),
    ])  # fmt: skip
    assert (chosen[0].forward, chosen[1].input) == pair


def calls_of(body, recorder):
    return [call.function.__name__ for call in Program.of(recorder, body).calls]


def test_every_form_is_timed_with_what_it_replaces():
    seen = []

    def timer(body, recorder):
        seen.append(calls_of(body, recorder))
        return float(len(seen[-1]))

    entry = tuning.measure(config(), DEVICE, products(), SIZES, 8, timer)
    assert seen.count(["forward", "bias_act"]) == 2 * 3 and seen.count(["forward_act"]) == 2 * 3
    assert seen.count(["input_gradient", "bias_act_backward"]) == 2 * 2 == seen.count(["input_gradient_relu"])
    assert seen.count(["bias_act_backward", "weight_gradient"]) == 2 == seen.count(["weight_gradient_bias"])
    assert seen.count(["weight_gradient"]) == 2 * 2
    assert len(seen) == 2 * (3 * 2 + 2 * 2 + 2 + 2)
    assert entry["forms"] == [
        [EPILOGUE, SEPARATE, SEPARATE], [EPILOGUE, SEPARATE, EPILOGUE], [EPILOGUE, EPILOGUE, EPILOGUE],
    ]  # fmt: skip
    assert entry["padded"] is False  # nothing gained: fewer columns


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
    assert len(widths) == 2 + 1 + 2 + 2 + 2  # there is nothing to pad


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
    assert set(of["forward"]) == set(of["input"]) == expected
    assert EPILOGUE not in of["weight"]
    assert EPILOGUE in forms.candidates(2, 3, activation, True, own)["forward"]  # the last has no activation
    assert "input" not in forms.candidates(0, 3, activation, True, own)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The calls of tuning.measure, which is replaced; plans are kept in tmp_path."""
    calls = []
    entry = {"total": 3.0, "padded": True, "forms": [[OWN, SEPARATE, SEPARATE]] * 3, "us": []}
    monkeypatch.setattr(tuning, "measure", lambda *args: calls.append(args) or dict(entry))
    monkeypatch.setattr(tuning, "GraphTimer", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def test_a_plan_is_measured_once_and_remembered(measured):
    plan, entry = tuning.plan(config(), DEVICE, products(), SIZES, 8)
    assert plan == Plan((Form(OWN),) * 3, padded=True) and len(measured) == 1
    assert tuning.plan(config(), DEVICE, products(), SIZES, 8) == (plan, entry) and len(measured) == 1
    assert json.loads(tuning.cache_file().read_text()).keys() == {"a GPU, tf32, 30-16-12-7, relu, batch 8"}
    tuning.plan(config(), DEVICE, products(), SIZES, 16)
    tuning.plan(config(activation="silu"), DEVICE, products(), SIZES, 8)
    tuning.plan(config(), DEVICE, products(), SIZES, 8, tune=True)
    assert len(measured) == 4


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


@pytest.mark.parametrize("text", ["{", "[]", '{"a GPU, tf32, 30-16-12-7, relu, batch 8": {"forms": 3}}'])
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
    assert ("update after the last chunk: 2 calls" in text) == (batch == "full")


def test_explain_shows_what_was_measured():
    data = easy_dataset(300, 7)
    split = stratified_split(data.labels)
    learner = ScratchLearner(configs.preset("m1", hidden=(16, 12)), data, cpu("fused"), len(split.train),
                             plan=Plan((Form(),) * 3, padded=True))  # fmt: skip
    learner.begin_epoch(split.train)
    us = [{kind: {SEPARATE: 7.5, EPILOGUE: 6.25} for kind in forms.KINDS}] * 3
    text = explain.explain(learner, {"us": us})
    assert "tuned; last layer padded to 8 columns" in text
    assert "layer1: forward separate (separate 7.5 us, epilogue 6.25 us); weight" in text
