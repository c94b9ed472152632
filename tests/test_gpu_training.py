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


def gradients(ours):
    """The first batch's, by layer from the last to the first: weight and bias."""
    ours.begin_epoch(SPLIT.train, 1)
    ours.train(0, ours.batch_size, ours.config.lr)
    model, classes = ours.model, ours.model.sizes[-1]
    layers = [[g.get() for g in pair] for pair in zip(model.weight_grads, model.bias_grads)]
    layers[-1] = [g[..., :classes] for g in layers[-1]]
    return layers[::-1]


def assert_close_gradients(ours, precision):
    """Against fp32. Rounding moves a few of the pre-activations across relu's 0 (of TF32's 2e-4 of them), and the error
    of the hidden layers is the square root of how many. After some steps of Adam even fp32 with inputs rounded in
    their last bit is 4e-4 away, so that losses say less."""
    last, hidden = {"tf32": (2e-3, 3e-2), "bf16": (2e-2, 6e-2)}[precision]
    pairs = zip(gradients(ours), gradients(learner(gemm="cupy")), strict=True)
    for layer, (actual, expected) in enumerate(pairs):
        for a, e in zip(actual, expected, strict=True):
            error = np.linalg.norm(a - e) / np.linalg.norm(e)
            assert error <= (hidden if layer else last), f"layer {layer} from the end: {error}"


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("gemm", ["cublaslt", "own"])
def test_lower_precision_trains_as_well(gemm, precision):
    if gemm == "cublaslt":
        needs_cublaslt()
    assert_close_gradients(learner(gemm=gemm, precision=precision), precision)
    exact, rounded = (trained(learner(**how))[0] for how in (dict(gemm="cupy"), dict(gemm=gemm, precision=precision)))
    assert abs(rounded[0].train_loss - exact[0].train_loss) <= 2e-3 * exact[0].train_loss
    assert rounded[-1].train_loss < 0.9 * rounded[0].train_loss


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
    assert_close_gradients(learner(both, plan, precision="tf32"), "tf32")
    rows = trained(learner(both, plan, precision="tf32"))[0]
    assert rows[-1].train_loss < 0.9 * rows[0].train_loss


def streaming_limit(ours):
    """The first amount of memory, going down, with which the data set is streamed."""
    limit, rest = ours.budget.needed, (ours.device, ours.sizes, len(DATA.labels), ours.batch_size)
    while not memory.fit(replace(ours.config, memory_limit=limit), *rest).window:
        limit = int(0.99 * limit)
    return limit


@pytest.mark.parametrize("batch", [512, "full"])
def test_streamed_data_trains_the_same(batch):
    whole = learner(batch_size=batch, gemm="cupy")
    streamed = learner(batch_size=batch, gemm="cupy", memory_limit=streaming_limit(whole))
    assert streamed.budget.window and not whole.budget.window
    (one, arrays), (other, streamed_arrays) = trained(whole), trained(streamed)
    for a, b in zip(one, other, strict=True):  # smaller chunks, of the validation images always, add in another order
        assert abs(a.val_loss - b.val_loss) <= 1e-6 * a.val_loss
        assert abs(a.train_loss - b.train_loss) <= (0 if batch == 512 else 1e-4) * a.train_loss
    if batch == 512:
        for a, b in zip(arrays[:-2], streamed_arrays[:-2], strict=True):  # without those of the evaluation
            assert_same_bits(a, b)


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
    assert_close_gradients(run.make_learner(config, DATA, device, len(SPLIT.train))[0], precision)


def test_too_little_memory_is_refused():
    with pytest.raises(InputError, match="needs at least"):
        learner(memory_limit=1_000_000)


@pytest.mark.parametrize("arguments", [(), ("--precision", "tf32", "--gemm", "own"), ("--memory-limit", "80MB")])
def test_the_command(tmp_path, arguments):
    result = train("--model", "m1", "--fused", "--device", "cuda", "--data", "glyphs:4000", "--epochs", 2,
                   "--out", tmp_path / "run", *arguments, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "metrics.json").exists()
