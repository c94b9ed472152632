"""softmax_cross_entropy against a float64 formula and against torch's F.cross_entropy and its gradient."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kernels
from kernels import plain

from . import case
from .backends import simt_backend
from .checks import ELEMENTWISE, EPS, OFFSETS, REDUCTION, assert_close, assert_same_bits, to_numpy
from .references import confusion as count
from .references import dlogits_check, logits_and_labels, loss_check, weights_and_targets
from .references import softmax_cross_entropy as reference

MORE_CLASSES = [(3, 1024), (3, 1025), (2, 5000)]  # around the most classes that a GPU row keeps in registers


def _assert_dlogits(*args):
    dlogits_check(*args).verify()


def _assert_sum(actual, losses, scale=1.0):
    loss_check("sum", actual, losses, scale).verify()


def test_awkward_shapes(form, rng):
    for B, C in form.shapes + MORE_CLASSES:
        logits, labels = logits_and_labels(rng, B, C)
        scale = 1.0 / B if B else np.nan
        losses, expected, softmax, right = reference(logits, labels, scale)
        for offset in OFFSETS:
            out, intact = form.outputs(B, C, offset=offset)
            totals = form.array([0.0, 0.0], np.float64)
            args = form.array(logits, offset=offset), form.array(labels, np.int32, offset)
            loss, dlogits = form.ops.softmax_cross_entropy(*args, out=out, totals=totals)
            assert dlogits is out and loss.shape == () and loss.dtype == np.float32
            _assert_dlogits(form, out, expected, softmax, scale)
            intact()
            _assert_sum(totals[0], losses)
            assert int(totals[1]) == right
            if B:
                _assert_sum(loss, losses, scale)
            else:
                assert np.isnan(float(loss)), "the mean of no losses is NaN, as in torch"


def test_in_place(form, rng):
    for B, C in [(1, 1), (513, 47), (7, 1023), (3, 2000)]:
        logits, labels = logits_and_labels(rng, B, C)
        losses, expected, softmax, _ = reference(logits, labels, 1.0 / B)
        array = form.array(logits)
        loss, dlogits = form.ops.softmax_cross_entropy(array, form.array(labels, np.int32), out=array)
        assert dlogits is array
        _assert_sum(loss, losses, 1.0 / B)
        _assert_dlogits(form, dlogits, expected, softmax, 1.0 / B)


def test_simt_more_blocks_than_the_last_one_has_threads():
    """258 blocks: two of the last block's threads add two partial sums each."""
    for check in case.softmax_cross_entropy(8 * 257 + 1, 2, multiprocessors=33).run(simt_backend()):
        check.verify()


@pytest.mark.parametrize("shape", [(20_000, 47), (3000, 400)])
def test_large_batch(backend, rng, shape):
    """Enough work for the CPU to share among threads, and for several waves of blocks on a GPU."""
    logits, labels = logits_and_labels(rng, *shape)
    losses, expected, softmax, right = reference(logits, labels, 1.0 / shape[0])
    out, intact = backend.outputs(*shape)
    totals = backend.array([0.0, 0.0], np.float64)
    args = backend.array(logits), backend.array(labels, np.int32)
    loss, _ = backend.ops.softmax_cross_entropy(*args, out=out, totals=totals)
    _assert_sum(loss, losses, 1.0 / shape[0])
    _assert_dlogits(backend, out, expected, softmax, 1.0 / shape[0])
    _assert_sum(totals[0], losses)
    assert int(totals[1]) == right
    intact()


def test_logits_of_ten_thousand_are_exact(form):
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]], np.float32)
    labels = np.array([0, 1, 2, 1], np.int32)
    totals = form.array([0.0, 0.0], np.float64)
    loss, dlogits = form.ops.softmax_cross_entropy(
        form.array(logits), form.array(labels, np.int32), scale=1.0, totals=totals
    )
    third = 1.0 / 3.0
    expected = [[0, 0, 0], [1, -1, 0], [third, third, third - 1], [0.5, -0.5, 0]]
    assert_close(dlogits, expected, 2 * EPS)
    exact = 20_000.0 + np.log(3.0) + np.log(2.0)
    assert_close(loss, exact, 2 * EPS)
    assert_close(totals, [exact, 1.0], 2 * EPS)


@pytest.mark.parametrize("value", [1e4, -1e4, 3e7])
def test_equal_logits_have_the_loss_of_a_guess(form, value):
    """log 3, to the last digit: log(sum) + 1e4 - 1e4 would keep three digits of it."""
    loss, _ = form.ops.softmax_cross_entropy(form.array([[value] * 3]), form.array([1], np.int32))
    assert_close(loss, np.log(3.0), 2 * EPS)


def test_probabilities_far_from_1_are_exact(form):
    """exp(-x) / (1 + 2e-9), where CUDA promises 2 units in the last place of exp."""
    x = np.linspace(20.0, 80.0, 501 if form.name == "simt" else 5001, dtype=np.float32)
    logits, labels = np.stack([0 * x, -x], axis=1), np.zeros(x.size)
    _, dlogits = form.ops.softmax_cross_entropy(form.array(logits), form.array(labels, np.int32), scale=1.0)
    exact = 1.0 / (1.0 + np.exp(x.astype(np.float64)))
    assert_close(to_numpy(dlogits)[:, 1], exact, 4 * EPS)


def test_a_million_equal_losses(backend):
    """Equal terms are the worst case of a running float32 sum: its roundings all point the same way."""
    B = 1_000_000
    logits, totals = np.tile(np.array([0.3, 0.0], np.float32), (B, 1)), backend.array([0.0, 0.0], np.float64)
    labels = backend.array(np.zeros(B), np.int32)
    loss, _ = backend.ops.softmax_cross_entropy(backend.array(logits), labels, totals=totals)
    exact = np.log1p(np.exp(-float(np.float32(0.3))))
    assert_close(loss, exact, REDUCTION)
    assert_close(totals[0], B * exact, REDUCTION)
    assert int(totals[1]) == B


@pytest.mark.parametrize("bad", [-1, 5, 6, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_spoils_its_own_row_and_the_loss(form, rng, bad):
    """logits[row, +-2**31] is 8 GB away: reading it would end the process."""
    logits, labels = logits_and_labels(rng, 40, 5)
    _, expected, softmax, _ = reference(logits, labels, 1.0)
    labels[17], expected[17] = bad, np.nan
    others = np.arange(40) != 17
    right = np.count_nonzero((logits.argmax(axis=1) == labels) & others)
    totals = form.array([0.0, 0.0], np.float64)
    args = form.array(logits), form.array(labels, np.int32)
    loss, dlogits = form.ops.softmax_cross_entropy(*args, scale=1.0, totals=totals)
    assert np.isnan(float(loss)) and np.isnan(float(totals[0])) and int(totals[1]) == right
    assert bool(form.xp.isnan(dlogits[17]).all())
    _assert_dlogits(form, to_numpy(dlogits)[others], expected[others], softmax[others], 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at_label", [True, False])
def test_nan_and_infinity_spoil_their_own_row_and_the_loss(form, rng, value, at_label):
    for C in (2, 47, 1500):
        logits, labels = logits_and_labels(rng, 9, C)
        logits[4, labels[4] if at_label else labels[4] - 1] = value
        totals = form.array([0.0, 0.0], np.float64)
        _, expected, softmax, right = reference(logits, labels, 1.0)
        args = form.array(logits), form.array(labels, np.int32)
        loss, dlogits = form.ops.softmax_cross_entropy(*args, scale=1.0, totals=totals)
        assert np.isnan(float(loss)) and int(totals[1]) == right
        assert bool(form.xp.isnan(dlogits[4]).all())
        _assert_dlogits(form, dlogits, expected, np.nan_to_num(softmax), 1.0)


def test_minus_infinity_is_a_class_of_probability_zero(form):
    logits = form.array([[-np.inf, 1.0, 1.0], [-np.inf, 1.0, 1.0]])
    with np.errstate(invalid="ignore"):
        args = logits, form.array([1, 0], np.int32)
        loss, dlogits = form.ops.softmax_cross_entropy(*args, scale=1.0)
    assert float(loss) == np.inf
    assert_close(dlogits, [[0.0, -0.5, 0.5], [-1.0, 0.5, 0.5]], 2 * EPS)


def test_of_equal_largest_logits_the_first_is_the_answer(form):
    for C in (2, 3, 33, 1100):
        logits = np.zeros((4, C), np.float32)
        logits[2:, C - 2 :] = 1.0
        labels = np.array([0, 1, C - 2, C - 1], np.int32)
        totals = form.array([0.0, 0.0], np.float64)
        form.ops.softmax_cross_entropy(form.array(logits), form.array(labels, np.int32), totals=totals)
        assert int(totals[1]) == 2


def test_totals_add_up_over_calls(form, rng):
    totals = form.array([10.0, 3.0], np.float64)
    losses, right = [np.array([10.0])], 3
    for B in (5, 64, 1):
        logits, labels = logits_and_labels(rng, B, 11)
        form.ops.softmax_cross_entropy(
            form.array(logits), form.array(labels, np.int32), scale=0.1, totals=totals
        )
        losses.append(reference(logits, labels, 1.0)[0])
        right += reference(logits, labels, 1.0)[3]
    _assert_sum(totals[0], np.concatenate(losses))
    assert float(totals[1]) == right


def _counted(form, logits, labels, classes=None, start=0):
    """The counts that one call adds to (C, C) counts of `start`."""
    C = classes or logits.shape[1]
    counts, intact = form.outputs(C, C, dtype=np.int64)
    counts[...] = start
    args = form.array(logits), form.array(labels, np.int32)
    form.ops.softmax_cross_entropy(*args, confusion=counts, classes=classes)
    intact()
    return to_numpy(counts) - start


def test_confusion(form, rng):
    for B, C in form.shapes + MORE_CLASSES[:2]:
        logits, labels = logits_and_labels(rng, B, C)
        logits[::3] = np.round(logits[::3])  # with equal largest logits
        labels[1::5] = np.resize([*case.OUT_OF_RANGE, C], labels[1::5].size)
        assert_same_bits(_counted(form, logits, labels, start=3), count(logits, labels))


def test_the_prediction_is_the_first_largest_logit_that_is_not_nan(form):
    nan, inf = np.nan, np.inf
    rows = {
        (0.0, 1.0, 1.0): 1, (2.0, 2.0, 2.0): 0, (-1.0, -2.0, 0.0): 2, (nan, 1.0, 1.0): 1, (nan, nan, -5.0): 2,
        (nan, nan, nan): 0, (-inf, -inf, -inf): 0, (nan, -inf, -inf): 1, (inf, nan, inf): 0, (0.0, inf, nan): 1,
        (nan, -inf, -1e30): 2, (0.0, -0.0, -1.0): 0, (-0.0, 0.0, -1.0): 0,
    }  # fmt: skip
    for more in (0, 29, 30, 80, 1200):  # columns of NaN in between: beyond a lane's own, and beyond registers
        logits = np.array([[*row[:2], *[nan] * more, row[2]] for row in rows], np.float32)
        predictions = np.array([p if p < 2 else p + more for p in rows.values()])
        labels = np.arange(len(rows)) % 3
        expected = np.zeros((3 + more,) * 2, np.int64)
        np.add.at(expected, (labels, predictions), 1)
        assert_same_bits(_counted(form, logits, labels), expected)


def test_confusion_of_a_large_batch(backend, rng):
    """Counts of all threads and blocks meet."""
    logits, labels = logits_and_labels(rng, 30_000, 3)
    logits[:20_000] = [0.0, 1.0, 0.0]
    assert_same_bits(_counted(backend, logits, labels, start=2**40), count(logits, labels))


def test_padding(form, rng):
    """It is not read, and 0 in dlogits; all else is as without, to the bit where the ops are fused."""
    shapes = [(0, 3, 5), (4, 1, 2), (9, 47, 48), (33, 47, 64), (5, 32, 33), (3, 130, 200), (2, 1025, 1028), (6, 7, 7)]
    for (B, C, N), in_place, offset in [(s, k % 2 == 1, k // 2 % 2) for s in shapes for k in range(4)]:
        logits, labels = logits_and_labels(rng, B, C)
        labels[2::4] = -1
        padded = np.pad(logits, ((0, 0), (0, N - C)), constant_values=np.nan)
        out, intact = form.outputs(B, N, offset=offset)
        out[...] = form.array(padded)
        x = out if in_place else form.array(padded, offset=offset)
        totals, reference_totals = (form.array([0.0, 0.0], np.float64) for _ in range(2))
        y = form.array(labels, np.int32)
        loss, dlogits = form.ops.softmax_cross_entropy(x, y, 0.1, out=out, totals=totals, classes=C)
        assert dlogits is out
        intact()
        expected = form.ops.softmax_cross_entropy(form.array(logits), y, 0.1, totals=reference_totals)
        if form.ops is plain:  # NumPy may add the columns of a slice in another order
            assert_close(dlogits[:, :C], expected[1], 2 * ELEMENTWISE)
        else:
            for a, b in ((loss, expected[0]), (dlogits[:, :C], expected[1]), (totals, reference_totals)):
                assert_same_bits(a, b)
        assert_same_bits(to_numpy(dlogits)[:, C:], np.zeros((B, N - C), np.float32))
        assert_same_bits(_counted(form, padded, labels, classes=C), count(logits, labels))


def test_confusion_changes_nothing_else(form, rng):
    for C in (47, 1100):
        logits, labels = logits_and_labels(rng, 20, C)
        labels[3] = C
        args, counts = (form.array(logits), form.array(labels, np.int32)), form.array(np.zeros((C, C)), np.int64)
        for a, b in zip(
            form.ops.softmax_cross_entropy(*args, 1.0),
            form.ops.softmax_cross_entropy(*args, 1.0, confusion=counts), strict=True,
        ):  # fmt: skip
            assert_same_bits(a, b)


def test_chunks_with_the_batch_scale_add_up_to_the_batch(backend, rng):
    logits, labels = logits_and_labels(rng, 100, 47)
    loss, dlogits = backend.ops.softmax_cross_entropy(backend.array(logits), backend.array(labels, np.int32))
    parts = [
        backend.ops.softmax_cross_entropy(
            backend.array(logits[rows]), backend.array(labels[rows], np.int32), scale=0.01
        )
        for rows in (slice(0, 33), slice(33, 100))
    ]
    assert_same_bits(np.concatenate([to_numpy(d) for _, d in parts]), dlogits)
    assert_close(float(parts[0][0]) + float(parts[1][0]), loss, ELEMENTWISE)


def test_against_torch(form, rng):
    torch = pytest.importorskip("torch")
    for B, C in [(1, 1), (64, 47), (33, 1023)]:
        logits, labels = logits_and_labels(rng, B, C)
        x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        expected = torch.nn.functional.cross_entropy(x, torch.tensor(labels, dtype=torch.int64))
        expected.backward()
        loss, dlogits = form.ops.softmax_cross_entropy(form.array(logits), form.array(labels, np.int32))
        assert_close(loss, expected.detach(), REDUCTION, magnitude=1.0 + expected.item())
        _assert_dlogits(form, dlogits, x.grad.numpy(), torch.softmax(x, 1).detach().numpy(), 1.0 / B)


VARIANTS = pytest.mark.parametrize("smoothing, weighted", [(0.1, False), (0.0, True), (0.9, True)])


def _weights(rng, C, weighted):
    return rng.uniform(0.1, 4.0, C).astype(np.float32) if weighted else None


@VARIANTS
def test_smoothing_and_weights(form, rng, smoothing, weighted):
    for B, C in form.shapes + MORE_CLASSES:
        logits, labels = logits_and_labels(rng, B, C)
        labels[1::5] = np.resize([*case.OUT_OF_RANGE, C], labels[1::5].size)
        weights, scale = _weights(rng, C, weighted), 1.0 / B if B else np.nan
        losses, expected, softmax, right = reference(logits, labels, scale, smoothing, weights)
        of_rows, targets = weights_and_targets(labels, C, smoothing, weights)
        settings = dict(label_smoothing=smoothing, class_weights=None if weights is None else form.array(weights))
        for rows in (slice(None), labels >= 0):  # with labels out of range, and without
            rows = np.arange(B)[rows]
            rows = rows if len(rows) == B else rows[labels[rows] < C]
            totals, part = form.array([0.0, 0.0], np.float64), 1.0 / len(rows) if len(rows) else np.nan
            args = form.array(logits[rows]), form.array(labels[rows], np.int32)
            loss, dlogits = form.ops.softmax_cross_entropy(*args, totals=totals, **settings)
            _assert_dlogits(form, dlogits, expected[rows] * (part / scale), softmax[rows], part * of_rows[rows, None],
                            targets[rows])  # fmt: skip
            if B:
                loss_check("loss", loss, losses[rows], part, of_rows[rows]).verify()
            loss_check("total", totals[0], losses[rows], weights=of_rows[rows]).verify()
            assert int(totals[1]) == right


@VARIANTS
def test_smoothing_and_weights_in_padded_logits(form, rng, smoothing, weighted):
    """Also the mean of the logits passes over the padding."""
    for B, C, N in ((4, 1, 2), (33, 47, 64), (2, 1025, 1028)):
        logits, labels = logits_and_labels(rng, B, C)
        weights = _weights(rng, C, weighted)
        settings = dict(label_smoothing=smoothing, class_weights=None if weights is None else form.array(weights))
        padded = form.array(np.pad(logits, ((0, 0), (0, N - C)), constant_values=np.nan))
        y = form.array(labels, np.int32)
        loss, dlogits = form.ops.softmax_cross_entropy(padded, y, out=padded, classes=C, **settings)
        expected_loss, expected = form.ops.softmax_cross_entropy(form.array(logits), y, **settings)
        assert_close(loss, expected_loss, 2 * ELEMENTWISE, magnitude=10 + to_numpy(expected_loss))
        assert_close(dlogits[:, :C], expected, 2 * ELEMENTWISE, magnitude=4.0 / B)
        assert_same_bits(to_numpy(dlogits)[:, C:], np.zeros((B, N - C), np.float32))


def test_no_smoothing_and_weights_of_1_change_no_bit(backend, rng):
    for C in (47, 1100):
        logits, labels = logits_and_labels(rng, 20, C)
        labels[3], logits[5, 2] = C, -np.inf
        args = backend.array(logits), backend.array(labels, np.int32)
        ones = backend.array(np.ones(C))
        expected = backend.ops.softmax_cross_entropy(*args)
        for more in (dict(label_smoothing=0.0), dict(class_weights=ones)):
            for a, b in zip(backend.ops.softmax_cross_entropy(*args, **more), expected, strict=True):
                assert_same_bits(a, b)


def test_smoothed_losses_of_ten_thousand_are_exact(form):
    """(1 - e) 20000 at the label, and e times the mean of 0, 20000 and 10000."""
    args = form.array([[1e4, -1e4, 0.0]]), form.array([1], np.int32)
    loss, dlogits = form.ops.softmax_cross_entropy(*args, label_smoothing=0.25)
    assert_close(loss, 0.75 * 20_000 + 0.25 * 10_000, 4 * EPS)
    assert_close(dlogits, [[1 - 0.25 / 3, -0.75 - 0.25 / 3, -0.25 / 3]], 4 * EPS)


def test_smoothing_finds_the_class_of_probability_zero(form):
    """As torch: without smoothing, a logit of -inf beside the label costs nothing, and with it without limit."""
    args = form.array([[-np.inf, 1.0, 1.0]]), form.array([1], np.int32)
    with np.errstate(invalid="ignore"):
        for smoothing, expected in ((0.0, np.log(2.0)), (0.1, np.inf)):
            loss, _ = form.ops.softmax_cross_entropy(*args, label_smoothing=smoothing)
            assert_close(loss, expected, 2 * EPS)


@VARIANTS
def test_smoothing_and_weights_against_torch(form, rng, smoothing, weighted):
    """torch weights by class what it smooths, and divides by the sum of the weights: one at a time, and the sum."""
    torch = pytest.importorskip("torch")
    for B, C in [(1, 1), (64, 47), (33, 1023)]:
        logits, labels = logits_and_labels(rng, B, C)
        weights = _weights(rng, C, weighted)
        x, y = torch.tensor(logits, dtype=torch.float64, requires_grad=True), torch.tensor(labels, dtype=torch.int64)
        losses = torch.nn.functional.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
        of_rows, targets = weights_and_targets(labels, C, smoothing, weights)
        if smoothing == 0.0:
            w = torch.tensor(weights, dtype=torch.float64)
            losses = torch.nn.functional.cross_entropy(x, y, w, reduction="none")
        elif weighted:
            losses = losses * torch.tensor(of_rows)
        losses.sum().backward()
        settings = dict(label_smoothing=smoothing, class_weights=None if weights is None else form.array(weights))
        args = form.array(logits), form.array(labels, np.int32)
        loss, dlogits = form.ops.softmax_cross_entropy(*args, scale=1.0, **settings)
        loss_check("loss", loss, losses.detach().numpy(), weights=of_rows).verify()
        softmax = torch.softmax(x, 1).detach().numpy()
        _assert_dlogits(form, dlogits, x.grad.numpy(), softmax, of_rows[:, None], targets)


_LOGITS = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([np.nan, np.inf, -np.inf]))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_logits(data):
    B, C = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    fill = st.floats(-100, 100, width=32)
    logits = data.draw(hnp.arrays(np.float32, (B, C), elements=_LOGITS, fill=fill))
    labels = data.draw(hnp.arrays(np.int32, B, elements=st.integers(0, C - 1)))
    losses, expected, softmax, right = reference(logits, labels, 1.0 / B)
    bound = (REDUCTION * softmax + ELEMENTWISE) / B
    for ops in (kernels, plain):
        totals = np.zeros(2)
        loss, dlogits = ops.softmax_cross_entropy(logits, labels, totals=totals)
        assert_close(
            loss, np.float64(losses.sum() / B), REDUCTION, magnitude=(1.0 + np.abs(losses)).sum() / B
        )
        assert_close(dlogits, expected, 1.0, magnitude=bound)
        assert totals[1] == right
