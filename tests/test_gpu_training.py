"""Training on a GPU: the captured step against the same calls one by one, precisions, streamed data, the command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mlp import InputError, configs, memory, run, tuning
from mlp.data import stratified_split
from mlp.device import select
from mlp.forms import EPILOGUE, MASKED, OWN, SEPARATE, Form, Plan
from mlp.loop import fit
from mlp.products import Products
from mlp.products import select as select_products
from mlp.scratch import ScratchLearner

from .checks import assert_same_bits
from .training import easy_dataset, train

pytestmark = pytest.mark.gpu
DATA = easy_dataset(6000, 47)
SPLIT = stratified_split(DATA.labels)  # 4200 to train: 8 batches of 512 and 104 images
RELU = dict(model="m1", device="cuda", fused=True, epochs=3)


def needs_cublaslt():
    pytest.importorskip("nvmath", reason="nvmath-python is not installed: no captured cuBLASLt products")


def learner(products=None, plan=None, **changes):
    changes = RELU | changes
    config = configs.preset(changes.pop("model"), **changes)
    return ScratchLearner(config, DATA, select("cuda", config.fused), len(SPLIT.train), products, plan)


def op_by_op(ours):
    """The same learner without graphs: its products, its streams' order, call by call."""
    ours.replay.graphs, ours.steps_per_launch = None, 1
    return ours


def trained(ours):
    rows = [replace(r, seconds=0, images_per_second=0) for r in fit(ours, SPLIT, ours.config).rows]
    judged = ours.evaluate(SPLIT.test, 0.2)
    return rows, [*ours.arrays().values(), judged.confusion, np.array(judged.cross_entropy)]


def assert_equal_runs(one, other):
    assert one[0] == other[0]
    for a, b in zip(one[1], other[1], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("changes", [
    {}, dict(model="m0"), dict(activation="gelu"), dict(batch_size=333), dict(optimizer="sgd", momentum=0.9),
    dict(batch_size="full"), dict(precision="tf32"), dict(precision="bf16"),
])  # fmt: skip
def test_the_captured_run_equals_the_eager_one_bit_for_bit(changes):
    needs_cublaslt()
    captured = learner(**changes)
    assert captured.captures
    result = trained(captured)
    assert_equal_runs(result, trained(op_by_op(learner(**changes))))
    assert_equal_runs(result, trained(learner(**changes)))  # and is repeated
    assert captured.replay._captured


@pytest.mark.parametrize("precision, tolerance", [("tf32", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("gemm", ["cublaslt", "own"])
def test_lower_precision_trains_as_well(gemm, precision, tolerance):
    if gemm == "cublaslt":
        needs_cublaslt()
    exact = trained(learner(gemm="cupy"))[0]
    rounded = trained(learner(gemm=gemm, precision=precision))[0]
    for a, b in zip(exact, rounded, strict=True):
        assert abs(a.train_loss - b.train_loss) <= tolerance * a.train_loss
        assert not np.isnan(b.val_loss)


def test_our_own_products_are_captured_without_any_library():
    captured = learner(gemm="own", precision="tf32")
    assert captured.captures and captured.products.library is None
    assert_equal_runs(trained(captured), trained(op_by_op(learner(gemm="own", precision="tf32"))))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", [EPILOGUE, OWN])
def test_every_form_trains_alike(form, padded):
    """Epilogues of the library, and our kernel beside the library."""
    needs_cublaslt()
    from kernels import cuda
    from kernels.gemm import Gemm

    chosen = select_products(configs.preset("m1", device="cuda", fused=True, precision="tf32"), select("cuda", True))
    both = Products(chosen.library, Gemm(cuda, "tf32"), "tf32", epilogues=True)
    forward, weight = (MASKED, SEPARATE) if form == EPILOGUE else (OWN, OWN)
    hidden = Form(forward, weight, form)
    plan = Plan((Form(forward, weight), hidden, hidden, Form(form, form, form)), padded)
    plain = trained(learner(chosen, precision="tf32"))[0]
    other = trained(learner(both, plan, precision="tf32"))[0]
    for a, b in zip(plain, other, strict=True):
        assert abs(a.train_loss - b.train_loss) <= 2e-3 * a.train_loss


def streaming_limit(ours):
    """The first amount of memory, going down, with which the data set is streamed."""
    limit, rest = ours.budget.needed, (ours.device, ours.sizes, len(DATA.labels), ours.batch_size)
    while not memory.fit(replace(ours.config, memory_limit=limit), *rest).window:
        limit = int(0.99 * limit)
    return limit


@pytest.mark.parametrize("batch", [512, "full"])
def test_streamed_data_changes_no_bit(batch):
    whole = learner(batch_size=batch, gemm="cupy")
    streamed = learner(batch_size=batch, gemm="cupy", memory_limit=streaming_limit(whole))
    assert streamed.budget.window and not whole.budget.window
    one, other = trained(whole), trained(streamed)
    if batch == 512:
        assert_equal_runs(one, other)
    for a, b in zip(one[0], other[0], strict=True):  # smaller chunks add in another order
        assert abs(a.train_loss - b.train_loss) <= 1e-4 * a.train_loss


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("gemm", ["auto", "cublaslt"])
def test_tuning_is_remembered(monkeypatch, tmp_path, gemm, precision):
    """And the plan that is read again trains to the same bits, captured or not; the library's algorithms are real."""
    needs_cublaslt()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = select("cuda", fused=True)
    config = configs.preset("m1", device="cuda", fused=True, epochs=3, gemm=gemm, precision=precision)
    ours, entry = run.make_learner(config, DATA, device, len(SPLIT.train))
    assert tuning.cache_file().exists() and len(entry["forms"]) == len(entry["algorithms"]) == 4
    timed = {form for layer in entry["us"] for forms in layer.values() for form in forms}
    assert SEPARATE in timed and (OWN in timed) == (gemm == "auto")
    (key,) = json.loads(tuning.cache_file().read_text())
    assert f"cuBLASLt {ours.products.library.version}" in key
    monkeypatch.setattr(tuning, "measure", None)
    again, same = run.make_learner(config, DATA, device, len(SPLIT.train))
    assert same == entry and again.model.plan == ours.model.plan
    result = trained(ours)
    assert_equal_runs(result, trained(op_by_op(again)))
    plain = trained(learner(gemm="cublaslt", precision=precision))[0]
    for a, b in zip(plain, result[0], strict=True):
        assert abs(a.train_loss - b.train_loss) <= (2e-3 if precision == "tf32" else 2e-2) * a.train_loss


def test_too_little_memory_is_refused():
    with pytest.raises(InputError, match="needs at least"):
        learner(memory_limit=1_000_000)


@pytest.mark.parametrize("arguments", [(), ("--precision", "tf32", "--gemm", "own"), ("--memory-limit", "80MB")])
def test_the_command(tmp_path, arguments):
    result = train("--model", "m1", "--fused", "--device", "cuda", "--data", "glyphs:4000", "--epochs", 2,
                   "--out", tmp_path / "run", *arguments, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "metrics.json").exists()
