"""The torch custom ops: registration, gradients and values against torch's own, and FusedAdam against torch.optim."""

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kernels import ACTIVATIONS, host

from .checks import ELEMENTWISE, EPS, REDUCTION, assert_close, assert_same_bits

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from kernels import torch_ops  # noqa: E402
from kernels.torch_ops import FusedAdam, bias_act, softmax_cross_entropy  # noqa: E402

OPS = torch.ops.fused_mlp
TORCH = {
    "identity": lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
SHAPES = [(0, 3), (1, 1), (2, 33), (65, 47)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this build of torch finds no GPU")
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(2024)


def _double(*tensors):
    """Copies in float64 that require grad where the tensors do."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def _labels(B, C, device="cpu", dtype=torch.int64):
    return torch.randint(C, (B,), device=device, dtype=dtype)


# What torch can check about an op by itself


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_bias_act(device, activation):
    for (B, N), grads in [((4, 6), (True, True)), ((0, 3), (True, True)), ((3, 1), (False, True)), ((2, 5), (0, 0))]:
        z = torch.randn(B, N, device=device, requires_grad=bool(grads[0]))
        bias = torch.randn(N, device=device, requires_grad=bool(grads[1]))
        torch.library.opcheck(OPS.bias_act.default, (z, bias, activation))


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_opcheck_bias_act_backward(device, activation):
    for B, N in [(4, 6), (0, 3)]:
        dy, saved, bias = (torch.randn(s, device=device) for s in ((B, N), (B, N), (N,)))
        for last in (None, bias):
            torch.library.opcheck(OPS.bias_act_backward.default, (dy, saved, activation, last))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (0, 3)])
def test_opcheck_softmax_cross_entropy(device, shape, grad):
    logits = torch.randn(shape, device=device, requires_grad=grad)
    for dtype in (torch.int32, torch.int64):
        args = logits, _labels(*shape, device, dtype)
        if shape[0]:
            torch.library.opcheck(OPS.softmax_cross_entropy.default, args)
        else:  # the loss is NaN, which the comparison with itself in the last test utility does not accept
            utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(OPS.softmax_cross_entropy.default, args, test_utils=utilities)


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_softmax_cross_entropy_smoothed_and_weighted(device, grad):
    logits, labels = torch.randn(4, 6, device=device, requires_grad=grad), _labels(4, 6, device)
    for more in ((0.1,), (0.1, torch.rand(6, device=device)), (0.0, torch.rand(6, device=device))):
        torch.library.opcheck(OPS.softmax_cross_entropy.default, (logits, labels, *more))


@pytest.mark.parametrize("shape", [(4, 6), (0, 3)])
def test_opcheck_softmax_cross_entropy_backward(device, shape):
    args = torch.randn(shape, device=device), torch.tensor(2.0, device=device), torch.tensor(1.0, device=device)
    torch.library.opcheck(OPS.softmax_cross_entropy_backward.default, args)


@pytest.mark.parametrize("size", [7, 0])
def test_opcheck_adam_step(device, size):
    p, g, m, v = (torch.rand(size, device=device) for _ in range(4))
    step, lr = torch.tensor(3.0, device=device), torch.tensor(0.1, device=device)
    numbers = 0.9, 0.999, 1e-8, 0.1
    torch.library.opcheck(OPS.adam_step.default, (p, g, m, v, None, None, 3, 0.1, *numbers, False))
    torch.library.opcheck(OPS.adam_step.default, (p, g, m, v, step, lr, 1, 0.0, *numbers, True))


# Central differences f(x + h) - f(x - h) over 2 h in float32. They are off by h^2 / 6 times the third derivative,
# and by the error of f over h. The inputs are multiples of 1/16 and h a power of 2, so that x + h is exact.


def _gradcheck(f, inputs, h, third_derivative, error):
    """torch.autograd.gradcheck with what float32 allows, and a proof that it then refuses a gradient 1 % off."""
    atol = h * h / 6 * third_derivative + error / h + ELEMENTWISE

    def wrong(x):
        x = x.view_as(x)
        x.register_hook(lambda gradient: 1.01 * gradient)
        return x

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*double precision.*")
        check = functools.partial(torch.autograd.gradcheck, eps=h, atol=atol, rtol=0.0)
        assert check(f, inputs)
        for k, x in enumerate(inputs):
            if x.requires_grad:
                assert not check(
                    lambda *args, k=k: f(*args[:k], wrong(args[k]), *args[k + 1 :]), inputs, raise_exception=False
                )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_bias_act(device, activation):
    """|gelu'''| < 0.8, and silu's is smaller. z + bias is an odd multiple of 1/16: h does not reach the kink at 0."""
    z = torch.arange(-13, 11, 2, device=device).reshape(4, 3) / 16.0
    bias = torch.tensor([-0.5, 0.125, 1.25], device=device)
    largest = (z + bias).abs().max().item()
    for grads in ((True, True), (True, False), (False, True)):
        inputs = [x.clone().requires_grad_(grad) for x, grad in zip((z, bias), grads)]
        _gradcheck(lambda z, bias: bias_act(z, bias, activation), inputs, 2.0**-6, 0.8, ELEMENTWISE * largest)


def test_gradcheck_softmax_cross_entropy(device):
    """The third derivative of a row's loss is p (1 - p) (1 - 2 p) < 0.1; the losses here are below 4."""
    logits = (torch.randint(-16, 17, (2, 5), device=device) / 16.0).requires_grad_()
    labels = torch.tensor([4, 0], device=device)
    assert F.cross_entropy(logits, labels) < 4
    _gradcheck(lambda x: softmax_cross_entropy(x, labels), [logits], 2.0**-4, 0.1 / 2, 4 * ELEMENTWISE)
    smoothed = functools.partial(softmax_cross_entropy, label_smoothing=0.25, class_weights=torch.ones_like(logits[0]))
    _gradcheck(lambda x: smoothed(x, labels), [logits], 2.0**-4, 0.1 / 2, 4 * ELEMENTWISE)


# Values and gradients against torch's


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act_is_torchs(device, activation):
    for B, N in SHAPES:
        z, bias, dy = (torch.randn(s, device=device).mul_(3) for s in ((B, N), (N,), (B, N)))
        z[::7] = -bias  # exactly 0 where the kink is
        inputs = z.requires_grad_(), bias.requires_grad_()
        y = bias_act(*inputs, activation)
        expected_inputs = _double(*inputs)
        u = expected_inputs[0] + expected_inputs[1]
        expected = TORCH[activation](u)
        assert_close(y.detach(), expected.detach(), ELEMENTWISE, magnitude=u.detach().abs())
        dz, dbias = torch.autograd.grad(y, inputs, dy)
        expected_dz, expected_dbias = torch.autograd.grad(expected, expected_inputs, dy.double())
        assert_close(dz, expected_dz, ELEMENTWISE, magnitude=dy.abs())
        assert_close(dbias, expected_dbias, REDUCTION, magnitude=dy.abs().sum(0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_softmax_cross_entropy_is_torchs(device, dtype):
    for B, C in [*SHAPES[1:], (4, 1), (3, 1500)]:
        logits = torch.randn(B, C, device=device).mul_(3).requires_grad_()
        labels = _labels(B, C, device, dtype)
        loss = softmax_cross_entropy(logits, labels)
        (reference,) = _double(logits)
        expected = F.cross_entropy(reference, labels.long())
        assert loss.shape == () and loss.dtype == torch.float32
        assert_close(loss.detach(), expected.detach(), REDUCTION, magnitude=1 + expected.detach())
        (dlogits,), (expected,) = (torch.autograd.grad(x, y) for x, y in ((loss, logits), (expected, reference)))
        assert_close(dlogits, expected, REDUCTION, magnitude=torch.full_like(expected, 1 / B))
        assert_same_bits(softmax_cross_entropy(logits.detach(), labels), loss.detach())


@pytest.mark.parametrize("weighted", [False, True], ids=["smoothed", "weighted"])
def test_softmax_cross_entropy_smoothed_or_weighted_is_torchs(device, weighted):
    """torch divides by the sum of the weights instead of the rows, and what it smooths it weights by class."""
    for B, C in [*SHAPES[1:], (3, 1500)]:
        logits, labels = torch.randn(B, C, device=device).mul_(3).requires_grad_(), _labels(B, C, device)
        (reference,) = _double(logits)
        if weighted:
            weights = torch.rand(C, device=device)
            loss = softmax_cross_entropy(logits, labels, class_weights=weights)
            expected = F.cross_entropy(reference, labels, weights.double(), reduction="sum") / B
        else:
            loss = softmax_cross_entropy(logits, labels, label_smoothing=0.1)
            expected = F.cross_entropy(reference, labels, label_smoothing=0.1)
        assert_close(loss.detach(), expected.detach(), REDUCTION, magnitude=1 + expected.detach())
        (dlogits,), (expected,) = (torch.autograd.grad(x, y) for x, y in ((loss, logits), (expected, reference)))
        assert_close(dlogits, expected, REDUCTION, magnitude=torch.full_like(expected, 1 / B))


def test_the_batch_may_be_empty(device):
    logits = torch.randn(0, 3, device=device, requires_grad=True)
    loss = softmax_cross_entropy(logits, _labels(0, 3, device))
    loss.backward()
    assert loss.isnan() and logits.grad.shape == (0, 3)


@pytest.mark.parametrize("label", [-1, 5, -100, 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_a_label_out_of_range_makes_the_loss_nan(device, label):
    """Also one that would be in range with its upper 32 bits cut off."""
    assert softmax_cross_entropy(torch.randn(2, 5, device=device), torch.tensor([1, label], device=device)).isnan()


def test_labels_may_be_a_column(device):
    table = torch.stack([_labels(6, 5, device), _labels(6, 5, device)], 1)
    logits = torch.randn(6, 5, device=device)
    assert_same_bits(softmax_cross_entropy(logits, table[:, 0]), softmax_cross_entropy(logits, table[:, 0].int()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_any_layout(device, activation):
    """Expanded and transposed gradients give what their contiguous copies give."""
    z, bias = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(8, device=device, requires_grad=True)
    y = bias_act(z, bias, activation)
    for dy in (torch.ones((), device=device).expand(6, 8), torch.randn(8, 6, device=device).T):
        results = torch.autograd.grad(y, (z, bias), dy, retain_graph=True)
        expected = torch.autograd.grad(y, (z, bias), dy.contiguous(), retain_graph=True)
        for a, b in zip(results, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_gradient_alone(device, activation, grads):
    inputs = [torch.randn(s, device=device) for s in ((4, 6), (6,))]
    both, one = ([x.clone() for x in inputs] for _ in range(2))
    bias_act(*(x.requires_grad_() for x in both), activation).square().sum().backward()
    bias_act(*(x.requires_grad_(grad) for x, grad in zip(one, grads)), activation).square().sum().backward()
    for a, b, grad in zip(one, both, grads, strict=True):
        if grad:
            assert_same_bits(a.grad, b.grad)
        else:
            assert a.grad is None


def test_a_loss_may_be_scaled_and_used_twice(device):
    logits, labels = torch.randn(4, 6, device=device, requires_grad=True), _labels(4, 6, device)
    loss = softmax_cross_entropy(logits, labels)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(3.0 * loss, logits, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss + loss, logits)
    assert_same_bits(again, once)
    assert_same_bits(twice, 2 * once)
    assert_close(scaled, 3.0 * once, EPS)


class _Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "profiler":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_backward_pass_is_one_op_each():
    z, bias, labels = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True), _labels(4, 6)
    for output, inputs in ((bias_act(z, bias), (z, bias)), (softmax_cross_entropy(z, labels), (z,))):
        with _Recorder() as recorder:
            torch.autograd.grad(output, inputs, output.detach())
        (name,) = (name for name in recorder.names if name != "aten.detach.default")  # a view, of saved tensors
        assert re.fullmatch(r"fused_mlp\.\w+_backward\.default", name)


@pytest.mark.parametrize(("activation", "count"), [("identity", 0), ("relu", 0), ("leaky_relu", 0), ("gelu", 1)])
def test_memory_that_is_kept(activation, count):
    """Beside the result, which the next layer keeps, and the bias, one tensor at most."""
    z, bias, kept = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        y = bias_act(z, bias, activation)
    assert len(set(kept) - {y.data_ptr(), bias.data_ptr()}) == count
    assert len(kept) <= 2


# What is refused


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_second_derivative_of_bias_act(device, activation):
    """An error, wherever the second derivative comes from; identity's gradient is constant, and may be used."""
    for grads in ((True, True), (True, False), (False, True)):
        z = torch.randn(4, 6, device=device, requires_grad=grads[0])
        bias = torch.randn(6, device=device, requires_grad=grads[1])
        wanted = z if grads[0] else bias
        y = bias_act(z, bias, activation)
        (first,) = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(first.sum(), wanted)
        (first,) = torch.autograd.grad(bias_act(z, bias, activation).sum(), wanted, create_graph=True)
        if activation != "identity":  # the gradient that comes in does not depend on z, but the slope does
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                (first.square().sum() + wanted.sum()).backward()


def test_no_second_derivative_of_softmax_cross_entropy(device):
    logits, labels = torch.randn(4, 6, device=device, requires_grad=True), _labels(4, 6, device)
    for function in (lambda x: x, torch.square):
        loss = softmax_cross_entropy(logits, labels)
        (first,) = torch.autograd.grad(function(loss), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (first.square().sum() + loss).backward()


def test_wrong_arguments_are_named(device):
    def f(*shape, **options):
        return torch.ones(shape, device=device, **options)

    labels = torch.zeros(4, dtype=torch.int32, device=device)
    for error, name, call in [
        (TypeError, "z", lambda: bias_act(f(4, 6).double(), f(6))),
        (TypeError, "bias", lambda: bias_act(f(4, 6), f(6).half())),
        (ValueError, "bias", lambda: bias_act(f(4, 6, requires_grad=True), f(5))),
        (ValueError, "z", lambda: bias_act(f(6, 4).T, f(6))),
        (ValueError, "activation", lambda: bias_act(f(4, 6), f(6), "tanh")),
        (ValueError, "logits", lambda: softmax_cross_entropy(f(6), labels)),
        (ValueError, "logits", lambda: softmax_cross_entropy(f(4, 0, requires_grad=True), labels)),
        (ValueError, "labels", lambda: softmax_cross_entropy(f(5, 6), labels)),
        (TypeError, "labels", lambda: softmax_cross_entropy(f(4, 6), labels.short())),
        (RuntimeError, "labels", lambda: softmax_cross_entropy(f(4, 6), [0, 1, 2, 3])),
        (ValueError, "label_smoothing", lambda: softmax_cross_entropy(f(4, 6), labels, 1.0)),
        (ValueError, "class_weights", lambda: softmax_cross_entropy(f(4, 6), labels, class_weights=f(5))),
        (TypeError, "class_weights", lambda: softmax_cross_entropy(f(4, 6), labels, 0.0, f(6, requires_grad=True))),
        (TypeError, "p", lambda: torch_ops.adam_step(f(3, requires_grad=True), f(3), f(3), f(3), step=1, lr=0.1)),
        (ValueError, "g", lambda: torch_ops.adam_step(f(3), f(4), f(3), f(3), step=1, lr=0.1)),
        (ValueError, "step", lambda: torch_ops.adam_step(f(3), f(3), f(3), f(3), step=0, lr=0.1)),
        (TypeError, "lr", lambda: torch_ops.adam_step(f(3), f(3), f(3), f(3), step=1, lr=f(1).double())),
        (ValueError, "lr", lambda: FusedAdam([torch.nn.Parameter(f(3))], lr=-1.0)),
        (ValueError, "beta2", lambda: FusedAdam([torch.nn.Parameter(f(3))], betas=(0.9, 1.0))),
        (TypeError, "params", lambda: FusedAdam([torch.nn.Parameter(f(3)), torch.nn.Parameter(f(3).double())])),
    ]:
        with pytest.raises(error, match=rf"\b{name}\b"):
            call()


# torch.compile


def _step(x, w1, b1, w2, b2, labels):
    hidden = bias_act(x @ w1, b1, "gelu")
    logits = bias_act(bias_act(hidden @ w2, b2, "relu"), b2, "identity")
    weighted = softmax_cross_entropy(logits, labels, label_smoothing=0.1, class_weights=b2.detach().abs())
    return softmax_cross_entropy(logits, labels) + weighted


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_model(device, backend):
    """One graph, forward and backward, that gives what eager mode gives; the matrix products may add otherwise."""
    shapes = (9, 8), (8,), (8, 5), (5,)
    parameters = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    x, labels = torch.randn(4, 9, device=device), _labels(4, 5, device)

    def results(step):
        loss = step(x, *parameters, labels)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    compiled = torch.compile(_step, backend=backend, fullgraph=True)
    for actual, expected in zip(results(compiled), results(_step), strict=True):
        assert_close(actual, expected, REDUCTION, magnitude=torch.full_like(expected, expected.abs().max().item()))


def test_compiled_adam_step(device):
    """In place, in one graph that serves for every step and learning rate that come as tensors."""

    def update(p, g, m, v, step, lr):
        step.add_(1)
        torch_ops.adam_step(p, 2 * g, m, v, step=step, lr=lr, weight_decay=0.1)

    eager, compiled = (
        [torch.ones(5, device=device) for _ in range(4)] + [torch.zeros((), device=device)] for _ in "ab"
    )
    function = torch.compile(update, backend="aot_eager", fullgraph=True)
    for lr in (0.1, 0.2, 0.3):
        update(*eager, torch.tensor(lr, device=device))
        with torch.compiler.set_stance("fail_on_recompile" if lr > 0.1 else "default"):
            function(*compiled, torch.tensor(lr, device=device))
    for a, b in zip(compiled, eager, strict=True):
        assert_same_bits(a, b)


def test_compiled_training(device):
    """The optimizer's step runs as it is inside a compiled function, which is not compiled again for each step."""

    def train(wrap):
        torch.manual_seed(5)
        weight, bias = (torch.nn.Parameter(torch.randn(s, device=device)) for s in ((9, 5), (5,)))
        optimizer, x, labels = FusedAdam([weight, bias]), torch.randn(4, 9, device=device), _labels(4, 5, device)

        def step():
            optimizer.zero_grad()
            softmax_cross_entropy(bias_act(x @ weight, bias), labels).backward()
            optimizer.step()

        step = wrap(step)
        for k in range(4):
            with torch.compiler.set_stance("fail_on_recompile" if k > 1 else "default"):
                step()
        return weight.detach(), bias.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its own zero_grad splits the graph
        results = train(functools.partial(torch.compile, backend="aot_eager"))
    for a, b in zip(results, train(lambda step: step), strict=True):
        assert_same_bits(a, b)


# FusedAdam


CASES = {
    "defaults": {},
    "l2": dict(lr=1e-2, weight_decay=0.1),
    "decoupled": dict(lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "betas and eps": dict(lr=1e-2, betas=(0.5, 0.95), eps=1e-3),
}
PARAMETERS = [(5, 3), (3,), (), (0,), (33,), (2, 3, 4, 5)]
STEPS = 12


def _torch_adam(params, decoupled_weight_decay=False, **settings):
    return (torch.optim.AdamW if decoupled_weight_decay else torch.optim.Adam)(params, **settings)


def _parameters(device="cpu", dtype=torch.float32):
    """Parameters of awkward shapes, always with the same values; the last one is channels_last."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(s, generator=generator) for s in PARAMETERS]
    values[-1] = values[-1].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(x.to(device, dtype)) for x in values]


def _backward(params, step, without=()):
    """Give each parameter a gradient that depends on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    loss = 0.0
    for k, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p)
        loss = loss + (p * g).sum() if k not in without else loss
    loss.backward()
    return loss


def _train(params, optimizer, steps=range(STEPS), set_to_none=True, missing=lambda step: ()):
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        _backward(params, step, missing(step))
        optimizer.step()


def _assert_trained_alike(params, references, lr, steps=STEPS):
    """Every step adds up to three roundings of p and a few millionths of a move, which is a few lr."""
    for p, reference in zip(params, references, strict=True):
        assert p.stride() == reference.stride()
        assert_close(p.detach(), reference.detach(), 3 * EPS * steps, atol=steps * lr * 1e-5)


@pytest.fixture
def launches(monkeypatch):
    """The sizes of the launches of adam_step that have been made on the CPU; those on nothing do not count."""
    sizes, launch = [], host.adam_step
    monkeypatch.setattr(host, "adam_step", lambda p, *rest: (p.size and sizes.append(p.size), launch(p, *rest)))
    return sizes


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_adam_is_torchs(device, case, set_to_none):
    params, references = _parameters(device), _parameters(dtype=torch.float64)
    settings = CASES[case]
    _train(params, FusedAdam(params, **settings), set_to_none=set_to_none)
    _train(references, _torch_adam(references, **settings), set_to_none=set_to_none)
    _assert_trained_alike(params, references, settings.get("lr", 1e-3))


def test_groups_and_schedulers(device):
    """Each group with settings of its own, and one of them empty; the scheduler's rate is read in every step."""

    def train(params, make, **settings):
        groups = [dict(params=params[:2]), dict(params=params[2:4], lr=0.02, weight_decay=0.1), dict(params=[])]
        optimizer = make(groups, lr=0.01, **settings)
        optimizer.add_param_group(dict(params=params[4:], betas=(0.8, 0.9)))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        for step in range(STEPS):
            _train(params, optimizer, [step])
            scheduler.step()

    params, references = _parameters(device), _parameters(dtype=torch.float64)
    train(params, FusedAdam)
    train(references, torch.optim.Adam)
    _assert_trained_alike(params, references, 0.02)


def test_the_learning_rate_may_be_a_tensor(device):
    for dtype, where in ((torch.float32, device), (torch.float32, "cpu"), (torch.float64, "cpu")):
        params, references = _parameters(device), _parameters(device)
        lr = torch.tensor(0.25, dtype=dtype, device=where)
        optimizers = FusedAdam(params, lr=lr), FusedAdam(references, lr=0.25)
        for optimizer, tensors in zip(optimizers, (params, references), strict=True):
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            _train(tensors, optimizer, [0])
            scheduler.step()
            _train(tensors, optimizer, [1])
        for a, b in zip(params, references, strict=True):
            assert_same_bits(a.detach(), b.detach())


def test_missing_gradients_skip_their_parameters(device):
    """p, the moments and the step count stay, as in torch, also with momentum and weight decay."""

    def missing(step):
        return {0: (1,), 1: (), 2: (0, 1, 2, 3, 4), 3: (5,)}.get(step % 5, ())

    params, references = _parameters(device), _parameters(dtype=torch.float64)
    settings = dict(lr=0.01, weight_decay=0.1)
    optimizer, reference = FusedAdam(params, **settings), torch.optim.Adam(references, **settings)
    _train(params, optimizer, missing=missing)
    _train(references, reference, missing=missing)
    _assert_trained_alike(params, references, 0.01)
    for p, q in zip(params, references, strict=True):
        assert optimizer.state[p]["step"] == reference.state[q]["step"]


def test_gradients_may_be_replaced(device):
    """By tensors of any layout; those that the caller keeps stay what they were."""
    params, references = _parameters(device), _parameters(dtype=torch.float64)
    optimizer, reference = FusedAdam(params), torch.optim.Adam(references)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        for p, q in zip(params, references, strict=True):
            p.grad = torch.full((1,) * p.dim(), 1.0 + step, device=device).expand(p.shape)
            q.grad = torch.full_like(q, 1.0 + step)
        kept = [p.grad for p in params]
        optimizer.step()
        reference.step()
        assert all(bool((g == 1.0 + step).all()) for g in kept)
    _assert_trained_alike(params, references, 1e-3)


def test_gradients_accumulate(device):
    params, references = _parameters(device), _parameters(dtype=torch.float64)
    for tensors, optimizer in ((params, FusedAdam(params)), (references, torch.optim.Adam(references))):
        for step in range(6):
            _backward(tensors, step)
            optimizer.step()
            if step == 3:
                optimizer.zero_grad(set_to_none=False)
    _assert_trained_alike(params, references, 1e-3)


def test_zeroed_gradients_lie_in_one_tensor():
    params = _parameters()
    optimizer = FusedAdam(params)
    _train(params[:-1], optimizer, [0])
    optimizer.zero_grad(set_to_none=False)
    assert params[-1].grad is None, "as in torch"
    grads = [p.grad for p in params[:-1]]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == 1 and not any(g.any() for g in grads)
    _backward(params, 1)
    assert all(p.grad is g for p, g in zip(params, grads)), "autograd adds in place"


def test_one_launch_per_group(launches):
    """And nothing but it, or one copy of all gradients where autograd made new ones."""
    params = _parameters()
    optimizer = FusedAdam([dict(params=params[:3]), dict(params=params[3:])])
    for set_to_none in (True, False):
        _train(params, optimizer, [0], set_to_none)
        optimizer.zero_grad(set_to_none)
        _backward(params, 1)
        launches.clear()
        with _Recorder() as recorder:
            optimizer.step()
        assert launches == [3 * 32, 2 * 32 + 4 * 32]
        copy_first = ["aten._foreach_copy_.default"] if set_to_none else []
        assert recorder.names == 2 * [*copy_first, "fused_mlp.adam_step.default"]


def test_a_skipped_parameter_splits_the_launch(launches):
    params = _parameters()
    optimizer = FusedAdam(params)
    _train(params, optimizer, [0], missing=lambda step: (2,))
    assert launches == [2 * 32, 6 * 32]
    launches.clear()
    _train(params, optimizer, [1])
    assert launches == [2 * 32, 32, 6 * 32], "its step count is another one"


def _assert_same_state(state, reference):
    """Two state_dicts have the same entries of the same kinds, and close values."""
    assert state["state"].keys() == reference["state"].keys()
    for key, values in state["state"].items():
        assert values.keys() == reference["state"][key].keys()
        for name, value in values.items():
            expected = reference["state"][key][name]
            assert value.shape == expected.shape and value.dtype == expected.dtype and value.device == expected.device
            assert_close(value, expected, STEPS * ELEMENTWISE, atol=STEPS * ELEMENTWISE)


@pytest.mark.parametrize("case", ["l2", "decoupled"])
def test_state_is_exchanged_with_torch(device, case):
    """FusedAdam, torch's Adam and FusedAdam again train the same parameters in turns, through saved state_dicts."""
    params, references = _parameters(device), _parameters(dtype=torch.float64)
    _train(references, _torch_adam(references, **CASES[case]), range(15))
    state, same = None, _parameters(device)
    for start, make in ((0, FusedAdam), (5, _torch_adam), (10, FusedAdam)):
        params = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = make(params, **CASES[case])
        if state:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        _train(params, optimizer, range(start, start + 5))
        state = optimizer.state_dict()
        if start == 0:
            reference = _torch_adam(same, **CASES[case])
            _train(same, reference, range(5))
            _assert_same_state(state, reference.state_dict())
    _assert_trained_alike(params, references, 1e-2, 15)


def test_a_fresh_state_dict_loads(device):
    """Before the first step, too, and without the entries that older versions of torch lack."""
    params, references = _parameters(device), _parameters(dtype=torch.float64)
    torchs = torch.optim.Adam(_parameters(device), lr=0.01)
    torchs.load_state_dict(FusedAdam(_parameters(device), lr=0.01).state_dict())
    _train(torchs.param_groups[0]["params"], torchs)
    optimizer = FusedAdam(params, decoupled_weight_decay=True)
    state = torch.optim.AdamW(_parameters(device), lr=0.01).state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    optimizer.load_state_dict(state)
    _train(params, optimizer)
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    _train(references, torch.optim.AdamW(references, lr=0.01))
    _assert_trained_alike(params, references, 0.01)
    plain = _parameters(dtype=torch.float64)
    _train(plain, torch.optim.Adam(plain, lr=0.01))
    _assert_trained_alike(torchs.param_groups[0]["params"], plain, 0.01)


def test_options_that_are_not_there():
    for name in ("amsgrad", "maximize"):
        optimizer = FusedAdam(_parameters())
        other = torch.optim.Adam(_parameters(), **{name: True})
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match=name):
            FusedAdam([dict(params=_parameters(), **{name: True})])


def test_replaced_parameters_and_state():
    """p.data, as module.to() does it, and the moments: the next step uses what is there."""
    params, references = _parameters(), _parameters(dtype=torch.float64)
    optimizer, reference = FusedAdam(params), torch.optim.Adam(references)
    for tensors, adam in ((params, optimizer), (references, reference)):
        _train(tensors, adam, [0, 1])
        tensors[0].data = 2 * tensors[0].data
        _train(tensors, adam, [2])
        for name in ("exp_avg", "exp_avg_sq"):  # one at a time: a change that is seen would bring in another
            adam.state[tensors[1]][name] = adam.state[tensors[1]][name] + 1
            _train(tensors, adam, [3])
        adam.state[tensors[4]]["exp_avg_sq"].zero_()
        _train(tensors, adam, [4])
        adam.state.clear()
        _train(tensors, adam, [5, 6])
    _assert_trained_alike(params, references, 1e-3)
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_a_model_that_moves():
    """Through another dtype and back, each time in new memory."""
    model = torch.nn.Linear(3, 2)
    optimizer = FusedAdam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.double()
    with pytest.raises(TypeError, match=r"params must have dtype float32, got torch.float64"):
        optimizer.step()
    model.float()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before) and optimizer.state[model.weight]["step"] == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how):
    params = _parameters()
    optimizer = FusedAdam(params)
    _train(params, optimizer, range(3))
    before = [p.detach().clone() for p in params]
    copies, other = (copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x)))(
        (params, optimizer)
    )
    _train(copies, other, range(3, 6))
    for p, value in zip(params, before, strict=True):
        assert_same_bits(p.detach(), value)
    _train(params, optimizer, range(3, 6))
    for p, q in zip(params, copies, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_parameters_must_not_share_memory():
    """Views of one memory would become two; torch steps twice on them. Tied modules have one parameter, which is fine."""
    p = torch.nn.Parameter(torch.ones(3))
    tied = torch.nn.Parameter(p.data)
    for groups in ([p, tied], [dict(params=[p]), dict(params=[tied])], [p, p]):
        with warnings.catch_warnings(), pytest.raises(ValueError, match="params must not share memory"):
            warnings.simplefilter("ignore")  # torch warns of [p, p]
            FusedAdam(groups)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    FusedAdam(model.parameters())
    assert model[1].weight is model[0].weight


def test_devices_do_not_mix():
    with pytest.raises(ValueError, match=r"params of a group must be on one device, got cpu and meta"):
        FusedAdam([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))])


def test_closure_hooks_and_no_grad():
    params = _parameters()
    optimizer, calls = FusedAdam(params), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        return _backward(params, 0)

    before = params[0].detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad and calls and not torch.equal(params[0], before)
    assert optimizer.step() is None


def test_autograd_sees_that_parameters_change():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([p])
    (p * 1).sum().backward()
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    tensors = [torch.ones(3) for _ in range(4)]
    loss = (p * tensors[0]).sum()
    torch_ops.adam_step(*tensors, step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_fails_changes_nothing():
    params = _parameters()
    optimizer = FusedAdam(params)
    _train(params, optimizer, [0])
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match=r"\blr\b"):
        optimizer.step()
    for p, value in zip(params, before[0], strict=True):
        assert_same_bits(p.detach(), value.detach())
    assert optimizer.state_dict()["state"][0]["step"] == before[1][0]["step"] == 1


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = FusedAdam(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="[Ss]parse"):
        optimizer.step()


# All of it together


def test_training_is_torchs(device):
    """Eager float64 torch against everything fused: 30 steps of a two-layer model.

    eps = 0.01 makes the step a smooth function of the gradient, with a slope of at most lr / eps = 1 where bias
    correction is done; a gradient is off by REDUCTION times at most 1, and the errors of 30 steps add up.
    """

    def parameters(dtype, device):
        generator = torch.Generator().manual_seed(3)
        shapes = (9, 16), (16,), (16, 5), (5,)
        return [torch.nn.Parameter((torch.randn(s, generator=generator) / 4).to(device, dtype)) for s in shapes]

    generator = torch.Generator().manual_seed(4)
    x, labels = torch.randn(32, 9, generator=generator), torch.randint(5, (32,), generator=generator)
    losses = {}
    for dtype in (torch.float32, torch.float64):
        fused = dtype == torch.float32
        w1, b1, w2, b2 = params = parameters(dtype, device if fused else "cpu")
        optimizer = (FusedAdam if fused else torch.optim.Adam)(params, lr=0.01, eps=0.01)
        inputs, targets, losses[dtype] = x.to(w1), labels.to(w1.device), []
        for _ in range(30):
            optimizer.zero_grad()
            if fused:
                loss = softmax_cross_entropy(bias_act(bias_act(inputs @ w1, b1, "silu") @ w2, b2, "identity"), targets)
            else:
                loss = F.cross_entropy(F.silu(inputs @ w1 + b1) @ w2 + b2, targets)
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
    assert losses[torch.float64][-1] < 0.9 * losses[torch.float64][0], "the comparison is of a model that learns"
    assert_close(losses[torch.float32], losses[torch.float64], 30 * REDUCTION)


def test_kernels_does_not_import_torch():
    code = "import sys, kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# What only a GPU shows


@pytest.mark.gpu
def test_no_synchronisation_on_a_side_stream():
    """Forward, backward and step wait for nothing, and run in the order of torch's current stream."""
    if not torch.cuda.is_available():
        pytest.skip("this build of torch finds no GPU")
    params = _parameters("cuda")[:2]
    weight, bias = params
    x, labels = torch.ones(4, 5, device="cuda"), _labels(4, 3, "cuda")
    lr = torch.tensor(0.01, device="cuda")
    optimizer = FusedAdam(params, lr=lr)

    def step():
        optimizer.zero_grad()
        softmax_cross_entropy(bias_act(x @ weight, bias, "gelu"), labels).backward()
        optimizer.step()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    expected = copy.deepcopy((params, optimizer))
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            inputs = x.clone()
            x.fill_(float("nan"))
            torch.cuda._sleep(10_000_000)  # some milliseconds: work on another stream would overtake the copy
            x.copy_(inputs)
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    (weight, bias), optimizer = expected
    lr = optimizer.param_groups[0]["lr"]
    optimizer.zero_grad()
    softmax_cross_entropy(bias_act(x @ weight, bias, "gelu"), labels).backward()
    optimizer.step()
    for a, b in zip(params, (weight, bias), strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.gpu
def test_a_step_is_not_captured():
    if not torch.cuda.is_available():
        pytest.skip("this build of torch finds no GPU")
    params = _parameters("cuda")
    optimizer = FusedAdam(params)
    _train(params, optimizer, [0])
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
