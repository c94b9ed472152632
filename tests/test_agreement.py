"""The same numbers from every execution: host library, SIMT, plain arrays and torch, each in float32, against torch in
float64, on shapes and values that hypothesis makes up.

Bounds are derived: a chain of n roundings is off by at most gamma(n) times the sum of the magnitudes, whatever
the order of the additions (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, lemma 3.1 and section
4.2). An elementary function counts as 8 roundings: 4 units in the last place, the worst of those in use.
"""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import ACTIVATIONS, Augment, plain, simt

from .backends import SimtOps, simt_backend
from .checks import EPS, assert_close, assert_same_bits
from .references import NOISE, TINY, WARP, adam, bfloat16, confusion, gather_checks, permutation, positions, sgd

torch = pytest.importorskip("torch")

FUNCTION = 8
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.2e-38, 1e4, -1e4, np.inf, -np.inf, np.nan)

examples = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def gamma(n):
    """The relative error of n roundings in a chain."""
    return n * EPS / (1.0 - n * EPS)


@st.composite
def floats(draw, *shape, scale=3.0, special=SPECIAL):
    """A float32 array of normal numbers in which a few elements, anywhere, are special ones."""
    array = np.random.default_rng(draw(seeds)).normal(0, scale, shape).astype(np.float32)
    if array.size:
        place = st.integers(0, array.size - 1)
        for where, value in draw(st.lists(st.tuples(place, st.sampled_from(special)), max_size=6)):
            array.flat[where] = value
    return array


@st.composite
def devices(draw):
    """Two SIMT devices that must agree to the last bit: the same launch shapes, another order of blocks and threads
    and other contents of uninitialised memory."""
    runner, count = simt_backend().ops.device.runner, draw(st.sampled_from([1, 2, 5]))
    orders = draw(st.tuples(seeds, seeds))
    patterns = draw(st.permutations([0x00, 0x7F, 0xFF]))
    return [simt.Device(runner, count, *each) for each in zip(orders, patterns, strict=False)]


def run(call, devices):
    """`call(ops)` by every execution -> name: results; host library and SIMT twice, with equal bits."""
    first, second = map(SimtOps, devices)
    with np.errstate(all="ignore"):
        results = {"host": call(kernels), "simt": call(first), "plain": call(plain)}
        for name, ops in (("host", kernels), ("simt", second)):
            for result, again in zip(results[name], call(ops), strict=True):
                assert_same_bits(result, again)
    return results


@contextlib.contextmanager
def naming(name):
    """Says in a failure whose results are wrong."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in the results of {name}")
        raise


TORCH_ACTIVATION = {
    "identity": lambda u: u * 1,
    "relu": torch.nn.functional.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda u: torch.nn.functional.gelu(u, approximate="tanh"),
}
# z + bias; then slope and product (piecewise linear), or argument, function, and three more operations.
VALUE_ROUNDINGS = {a: 3 if a in ("identity", "relu", "leaky_relu") else 5 + FUNCTION for a in ACTIVATIONS}


def torch_bias_act(z, bias, dy, activation, dtype):
    """y, dz, dbias by autograd."""
    z, bias = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (z, bias))
    y = TORCH_ACTIVATION[activation](z + bias)
    y.backward(torch.tensor(dy, dtype=dtype))
    return y.detach().numpy(), z.grad.numpy(), bias.grad.numpy()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@examples
@given(st.data())
def test_bias_act(activation, data):
    B, N = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 140))
    z, bias = data.draw(floats(B, N)), data.draw(floats(N))
    dy = data.draw(floats(B, N, special=SPECIAL[:-3]))  # inf x 0 is NaN in plain, and 0 elsewhere: see below
    exact = torch_bias_act(z, bias, dy, activation, torch.float64)

    def call(ops):
        y = ops.bias_act(z, bias, activation)
        return y, *ops.bias_act_backward(dy, z, activation, bias)

    results = run(call, data.draw(devices()))
    results["torch"] = torch_bias_act(z, bias, dy, activation, torch.float32)
    n = VALUE_ROUNDINGS[activation]
    with np.errstate(invalid="ignore"):
        u, size = np.abs(z.astype(np.float64) + bias), np.abs(dy.astype(np.float64))
    for name, (y, dz, dbias) in results.items():
        # The slope, at most 1.13, is a function of a sum: its argument's rounding moves it by less than 2 EPS.
        # torch takes 1 - sigmoid(u) or 1 - tanh(a)^2, off by EPS, times u a'(u), which is below 36 where it counts;
        # and it multiplies dy first by what may make it a denormal.
        amplified = 36 if name == "torch" and activation in ("silu", "gelu_tanh") else 1
        m, least = n + 4 + amplified, 2 * TINY * amplified
        finite = np.isfinite(u) if name == "torch" else np.full(z.shape, True)  # its gelu(inf) is NaN
        with naming(name):
            assert_close(y[finite], exact[0][finite], gamma(n), 2 * TINY, u[finite])
            assert_close(dz[finite], exact[1][finite], gamma(m), least, size[finite])
            assert_close(dbias, exact[2], gamma(m + B), least * (B + 1), size.sum(0))


@pytest.mark.parametrize("dy", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_where_relu_is_flat(dy):
    """torch and the kernels mask; plain multiplies by 0, which is faster in NumPy and gives NaN."""
    dy, z = np.full((1, 1), dy, np.float32), np.full((1, 1), -1, np.float32)
    masked = torch_bias_act(z, np.zeros(1, np.float32), dy, "relu", torch.float32)[1]
    assert masked == 0.0
    for ops in (kernels, simt_backend().ops):
        assert_same_bits(ops.bias_act_backward(dy, z)[0], masked)
    with np.errstate(invalid="ignore"):
        assert np.isnan(plain.bias_act_backward(dy, z)[0])


def cross_entropy_bounds(logits, labels, scale):
    """Bounds of the loss and of dlogits, from the exact softmax.

    exp(x - max) carries the rounding of its argument, |x - max| EPS, and a function; their sum C - 1 additions;
    then come a division, a product and the subtraction of the one-hot scale.
    """
    x = logits.astype(np.float64)
    C = x.shape[1]
    with np.errstate(all="ignore"):
        below = x.max(1, keepdims=True) - x
        softmax = np.exp(-below) / np.exp(-below).sum(1, keepdims=True)
        argument = np.where(softmax > 0, below, 0.0)
        total = (softmax * argument).sum(1, keepdims=True) * EPS + gamma(FUNCTION + C)
        onehot = np.arange(C) == labels[:, None]
        gradient = scale * (softmax * (argument * EPS + gamma(FUNCTION + 4) + total) + 2 * EPS * onehot)
        own = np.take_along_axis(below, labels[:, None], 1)
        row = total + (FUNCTION + 2) * EPS * np.log(np.exp(-below).sum(1, keepdims=True)) + 3 * EPS * own
    return scale * (row.sum() + gamma(len(x) + 4) * (np.abs(own) + np.log(C) + 1).sum()), gradient


def torch_cross_entropy(logits, labels, dtype):
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    return loss.detach().numpy(), x.grad.numpy()


@examples
@given(st.data())
def test_softmax_cross_entropy(data):
    B, C = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([1, 2, 31, 32, 33, 47, 100, 300, 1025]))
    logits = data.draw(floats(B, C, scale=data.draw(st.sampled_from([0.01, 3.0, 100.0]))))
    labels = np.random.default_rng(data.draw(seeds)).integers(0, C, B).astype(np.int32)
    exact = torch_cross_entropy(logits, labels, torch.float64)
    results = run(lambda ops: ops.softmax_cross_entropy(logits, labels), data.draw(devices()))
    results["torch"] = torch_cross_entropy(logits, labels, torch.float32)
    loss_bound, bound = cross_entropy_bounds(logits, labels, 1.0 / B) if B else (0.0, np.zeros((0, C)))
    for name, (loss, dlogits) in results.items():
        with naming(name):
            assert_close(loss, exact[0], 1.0, magnitude=loss_bound)
            assert_close(dlogits, exact[1], 1.0, 2 * TINY, bound)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_confusion_and_padding(data):
    """Whole numbers: the same from every execution."""
    B, C = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([1, 2, 31, 32, 33, 47, 130]))
    N = C + data.draw(st.integers(0, 40))
    logits = data.draw(floats(B, N))
    logits[:, C:] = np.nan
    labels = np.random.default_rng(data.draw(seeds)).integers(-1, C + 1, B).astype(np.int32)

    def call(ops):
        counts, totals = np.ones((C, C), np.int64), np.zeros(2)
        ops.softmax_cross_entropy(logits, labels, 1.0, totals=totals, confusion=counts, classes=C)
        return counts, totals[1:]

    results = run(call, data.draw(devices()))
    for name, (counts, right) in results.items():
        with naming(name):
            assert_same_bits(counts, 1 + confusion(logits[:, :C], labels))
            assert right[0] <= np.trace(counts - 1)  # rows with a NaN are predicted, yet not right


OPTIMIZER_SPECIAL = (0.0, -0.0, 1e-45, 1e-40, 1e4, -1e4)


@examples
@given(st.data())
def test_adam_step(data):
    P = data.draw(st.integers(0, 3000))
    p, g, m = (data.draw(floats(P, special=OPTIMIZER_SPECIAL)) for _ in range(3))
    state = p, g, m, np.abs(data.draw(floats(P, special=OPTIMIZER_SPECIAL)))
    chosen = dict(step=data.draw(st.integers(1, 10**6)), lr=data.draw(st.sampled_from([0.0, 1e-3, 1.0])))
    chosen |= dict(weight_decay=data.draw(st.sampled_from([0.0, 0.1])), decoupled=data.draw(st.booleans()))

    def call(ops):
        p, g, m, v = (x.copy() for x in state)
        ops.adam_step(p, g, m, v, **chosen)
        return p, m, v

    results = run(call, data.draw(devices()))
    results["torch"] = torch_adam(*state, **chosen)
    exact, bounds = adam(*state, **chosen)
    for name, result in results.items():
        for actual, expected, bound in zip(result, exact, bounds, strict=True):
            with naming(name):
                assert_close(actual, expected, 1.0, 4 * TINY, bound)


def torch_adam(p, g, m, v, *, step, lr, weight_decay, decoupled):
    parameter = torch.nn.Parameter(torch.tensor(p))
    parameter.grad = torch.tensor(g)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=lr, weight_decay=weight_decay)
    state = {"step": torch.tensor(step - 1.0), "exp_avg": torch.tensor(m), "exp_avg_sq": torch.tensor(v)}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.detach().numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()


@examples
@given(st.data())
def test_sgd_step(data):
    P = data.draw(st.integers(0, 3000))
    state = [data.draw(floats(P, special=OPTIMIZER_SPECIAL)) for _ in range(3)]
    chosen = dict(lr=data.draw(st.sampled_from([0.0, 0.1])), momentum=data.draw(st.sampled_from([0.0, 0.9])))
    chosen |= dict(weight_decay=data.draw(st.sampled_from([0.0, 0.01])))

    def call(ops):
        p, g, velocity = (x.copy() for x in state)
        ops.sgd_step(p, g, velocity, **chosen)
        return p, velocity

    results = run(call, data.draw(devices()))
    parameter = torch.nn.Parameter(torch.tensor(state[0]))
    parameter.grad = torch.tensor(state[1])
    optimizer = torch.optim.SGD([parameter], **chosen)
    optimizer.state[parameter]["momentum_buffer"] = velocity = torch.tensor(state[2])
    optimizer.step()
    exact, bounds = sgd(*state, **chosen)
    # Without momentum torch keeps no velocity.
    results["torch"] = parameter.detach().numpy(), velocity.numpy() if chosen["momentum"] else results["host"][1]
    for name, result in results.items():
        for actual, expected, bound in zip(result, exact, bounds, strict=True):
            with naming(name):
                assert_close(actual, expected, 1.0, 4 * TINY, bound)


def torch_gather(images, labels, index, affine, mean, scale):
    """By indexing, affine_grid and grid_sample in float64."""
    side = int(np.sqrt(images.shape[1]))
    pixels = torch.tensor(images[index], dtype=torch.float64).reshape(len(index), 1, side, side) / 255.0
    if affine is not None and len(index) and side > 1:
        theta = torch.tensor(affine / np.float64([1, 1, (side - 1) / 2]))
        grid = torch.nn.functional.affine_grid(theta, pixels.shape, align_corners=True)
        pixels = torch.nn.functional.grid_sample(pixels, grid, padding_mode="zeros", align_corners=True)
    return ((pixels - mean) * scale).reshape(len(index), side * side).numpy(), labels[index]


@examples
@given(st.data())
def test_gather_batch(data):
    M, B, side = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 30)), data.draw(st.sampled_from([2, 3, 8, 28]))
    rng = np.random.default_rng(data.draw(seeds))
    images, labels = rng.integers(0, 256, (M, side * side), np.uint8), rng.integers(0, 47, M).astype(np.int32)
    index = rng.integers(0, M, B).astype(np.int32)
    affine = (np.eye(2, 3) + rng.normal(0, 0.2, (B, 2, 3))).astype(np.float32) if data.draw(st.booleans()) else None
    mean, scale = data.draw(st.sampled_from([(0.0, 1.0), (0.17, 3.0)]))
    chosen = dict(mean=mean, scale=scale, affine=affine)
    clean = run(lambda ops: ops.gather_batch(images, labels, index, **chosen), data.draw(devices()))
    exact = torch_gather(images, labels, index, affine, mean, scale)
    for name, (x, y) in clean.items():
        with naming(name):
            assert_close(x, exact[0], gamma(4), scale * (gamma(2) + (WARP if affine is not None else 0.0)))
            assert_same_bits(y, exact[1])
    # torch has no such generator: the other three agree on the noise.
    chosen |= dict(noise_sigma=0.5, seed=data.draw(st.integers(0, 2**64 - 1)))
    noisy = run(lambda ops: ops.gather_batch(images, labels, index, **chosen), data.draw(devices()))
    noisy_and_clean_plain = noisy["plain"][0], clean["plain"][0]
    for name, (x, _) in noisy.items():
        noise, expected = (a.astype(np.float64) - b for a, b in ((x, clean[name][0]), noisy_and_clean_plain))
        with naming(name):
            assert_close(noise, expected, 0.0, 2 * scale * NOISE)


@examples
@given(st.data())
def test_augmented_batches(data):
    """What is drawn; torch has no such generator, and the reference is in float64."""
    M, B, side = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 20)), data.draw(st.sampled_from([1, 2, 8, 28]))
    rng = np.random.default_rng(data.draw(seeds))
    images, labels = rng.integers(0, 256, (M, side * side), np.uint8), rng.integers(0, 47, M).astype(np.int32)
    index, numbers = rng.integers(-1, M + 1, B).astype(np.int32), rng.permutation(2**20)[:M].astype(np.int32)
    fractions = st.floats(0.0, 0.99)
    augment = Augment(*(data.draw(each) for each in (st.floats(0.0, 45.0), fractions, fractions, st.floats(0.0, 30.0))))
    chosen = dict(augment=data.draw(st.sampled_from([augment, None])))
    chosen |= dict(noise_sigma=data.draw(st.sampled_from([0.0, 0.5])))
    chosen |= dict(noise_uniform=data.draw(st.booleans()), seed=data.draw(st.integers(0, 2**64 - 1)), numbers=numbers)
    draw = data.draw(st.integers(-(2**63), 2**63 - 1))

    def call(ops):
        return ops.gather_batch(images, labels, index, draw=np.array([draw]), **chosen)

    for name, (x, y) in run(call, data.draw(devices())).items():
        with naming(name):
            for check in gather_checks(x, y, images, labels, index, draw=draw, **chosen):
                check.verify()


@examples
@given(st.data())
def test_gather_batch_at_an_offset(data):
    rng = np.random.default_rng(data.draw(seeds))
    M, B, N = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 40))
    begin = data.draw(st.one_of(st.integers(-25, 45), st.integers(-(2**63), 2**63 - 1)))
    images, labels = rng.integers(0, 256, (M, 12), np.uint8), rng.integers(0, 47, M).astype(np.int32)
    index, offset = rng.integers(0, M, N).astype(np.int32), np.array([begin])

    def call(ops):
        return ops.gather_batch(images, labels, index, offset=offset, out_x=np.zeros((B, 12), np.float32))

    rows = positions(index, begin, B)
    for name, (x, y) in run(call, data.draw(devices())).items():
        with naming(name):
            assert_same_bits(y, np.where(rows < 0, -1, labels[rows]).astype(np.int32))
            assert_close(x, np.where(rows[:, None] < 0, np.nan, images[rows] / 255.0), gamma(2))


@examples
@given(st.data())
def test_shuffle(data):
    N, seed, epoch = data.draw(st.integers(0, 400)), data.draw(st.integers(0, 2**64 - 1)), data.draw(seeds)
    index = np.random.default_rng(data.draw(seeds)).integers(-(2**31), 2**31, N).astype(np.int32)
    results = run(lambda ops: (ops.shuffle(index, seed=seed, epoch=epoch),), data.draw(devices()))
    results["torch"] = (plain.shuffle(torch.tensor(index), seed=seed, epoch=epoch).numpy(),)
    for name, (result,) in results.items():
        with naming(name):
            assert_same_bits(result, index[permutation(N, seed, epoch)])


@examples
@given(st.data())
def test_to_bfloat16(data):
    shape = data.draw(st.lists(st.integers(0, 12), max_size=3))
    x = data.draw(floats(*shape))
    exact = torch.tensor(x).to(torch.bfloat16).view(torch.uint16).numpy()
    for name, (result,) in run(lambda ops: (ops.to_bfloat16(x),), data.draw(devices())).items():
        with naming(name):
            assert_same_bits(result, bfloat16(x))
            assert_same_bits(result[~np.isnan(x)], exact[~np.isnan(x)])
