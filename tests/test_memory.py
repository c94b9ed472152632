"""--memory-limit: what is given up first, that the limit is kept to, and that streamed data changes nothing."""

import numpy as np
import pytest

from mlp import InputError, configs, flags, memory
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.scratch import ScratchLearner

from .checks import assert_same_bits
from .simulated_gpu import Gpu
from .training import BACKENDS, cpu, easy_dataset

SIZES, IMAGES = (784, 400, 240, 120, 47), 814_255
DATA = easy_dataset(700, 5)
SPLIT = stratified_split(DATA.labels)
SMALL = (784, 16, 5)


def config(**changes):
    return configs.preset("m1", **({"hidden": (16,), "batch_size": 64, "epochs": 2} | changes))


def budget(limit, batch=512, chunk_rows=2048, sizes=SIZES, images=IMAGES, **changes):
    return memory.fit(config(memory_limit=limit, **changes), cpu("plain", chunk_rows), sizes, images, batch)


def test_without_a_limit_a_cpu_keeps_all():
    chosen = budget(None)
    assert (chosen.rows, chosen.window) == (2048, 0)
    assert chosen.needed > IMAGES * 788


def test_the_limit_decides_what_is_given_up_first():
    """Rows of the buffers down to a batch, then the data set, then rows below a batch."""
    kinds, limit = [], budget(None).needed
    while limit > 0:
        try:
            chosen = budget(limit)
        except InputError:
            break
        assert chosen.needed <= limit
        kinds.append((chosen.rows >= 512, bool(chosen.window)))
        limit = int(limit * 0.97)
    assert list(dict.fromkeys(kinds)) == [(True, False), (True, True), (False, True)]


def test_a_full_batch_keeps_its_data_before_it_keeps_its_rows():
    plenty = budget(None, batch=570_000, batch_size="full")
    less = budget(plenty.needed - 1, batch=570_000, batch_size="full")
    assert less.rows < plenty.rows and not less.window
    least = budget(60_000_000, batch=570_000, batch_size="full")
    assert least.window >= least.rows and least.needed <= 60_000_000


def test_bytes_count_what_is_allocated():
    """The arrays of a learner are no larger than what the budget says, and the budget is not far from them."""
    images = easy_dataset(20_000, 5)
    for limit in (None, 30_000_000, 25_000_000):
        ours = ScratchLearner(config(memory_limit=limit, fused=True), images, cpu("fused", 512), 14_000)
        model, source = ours.model, ours.source
        slots = [(s.images, s.labels) for s in getattr(source, "_slots", [])] or [(source.images, source.labels)]
        arrays = [model.parameters, model.gradients, ours._x, ours._y, ours.dlogits, ours._results]
        arrays += [*model._z, *model._dy, *ours.optimizer.moments.values(), *(array for pair in slots for array in pair)]
        used = sum(array.nbytes for array in arrays)
        assert used <= ours.budget.needed - memory.SLACK
        assert ours.budget.needed - memory.SLACK <= 1.5 * used
        assert limit is None or ours.budget.needed <= limit


@pytest.mark.parametrize("changes", [{}, {"batch_size": "full"}])
def test_too_little_is_refused_with_the_bytes_needed(changes):
    with pytest.raises(InputError, match=r"needs at least ([\d,]+) bytes \([\d.]+ MB\).*limit is 1,000,000") as error:
        budget(1_000_000, **changes)
    least = int(str(error.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert budget(least, **changes).needed <= least
    with pytest.raises(InputError):
        budget(least - 1, **changes)


def test_a_gpu_without_a_limit_uses_most_of_what_is_free(monkeypatch):
    gpu = Gpu(monkeypatch)
    gpu.free = 500_000_000
    chosen = memory.fit(config(fused=True), gpu.device, SIZES, IMAGES, 512)
    assert chosen.window and chosen.needed <= 450_000_000
    gpu.free = 10**10
    assert not memory.fit(config(fused=True), gpu.device, SIZES, IMAGES, 512).window
    gpu.free = 1000
    with pytest.raises(InputError, match="90% of the free memory of simulated is 900"):
        memory.fit(config(fused=True), gpu.device, SIZES, IMAGES, 512)


def streamed(monkeypatch, rows, window):
    """Let every learner have such a budget."""
    monkeypatch.setattr(memory, "fit", lambda *args: memory.Budget(rows, window, 0))


def trained(learner):
    rows = fit(learner, SPLIT, learner.config).rows
    judged = learner.evaluate(SPLIT.test, 0.3)
    return [np.array([[r.train_loss, r.train_accuracy, r.val_loss] for r in rows]), learner.model.parameters,
            judged.confusion, np.array(judged.cross_entropy)]  # fmt: skip


@pytest.mark.parametrize("where", [*BACKENDS, "gpu"])
@pytest.mark.parametrize("batch, rows, window", [
    (64, 64, 64),  # a window is one batch
    (64, 64, 192),
    (64, 100, 200),  # not a multiple of the batch: windows hold whole batches
    (150, 40, 40),  # chunks of 40, 40, 40, 30
    (150, 40, 120),
    ("full", 64, 128),
    (64, 64, 1000),  # more than there is
])  # fmt: skip
def test_streaming_changes_no_bit(monkeypatch, where, batch, rows, window):
    changes = config(batch_size=batch)
    results = []
    for wide in (0, window):
        streamed(monkeypatch, rows, wide)
        if where == "gpu":
            gpu = Gpu(monkeypatch)
            device, products = gpu.device, gpu.products
        else:
            device, products = cpu(where), None
        results.append(trained(ScratchLearner(changes, DATA, device, len(SPLIT.train), products)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_a_window_is_copied_once_while_the_one_before_it_is_read(monkeypatch):
    streamed(monkeypatch, 64, 128)
    gpu = Gpu(monkeypatch)
    learner = ScratchLearner(config(), DATA, gpu.device, len(SPLIT.train), gpu.products)
    learner.begin_epoch(SPLIT.train, 1)
    learner.train(0, 128, 0.01)
    gathered = [slot.begin for slot in learner.source._slots]
    assert gathered == [0, 128]  # the second before anyone asked for it
    fills, fill = [], learner.source._fill
    monkeypatch.setattr(learner.source, "_fill", lambda *args: fills.append(args[1]) or fill(*args))
    learner.train(128, len(SPLIT.train), 0.01)
    assert fills == [256, 384]
    assert len(SPLIT.train) == 490


@pytest.mark.parametrize("event", ["copied", "synchronize"])
def test_a_missing_wait_is_noticed(monkeypatch, event):
    """The simulated copies happen when someone waits for them: who does not wait reads what was there before."""
    from . import simulated_gpu

    streamed(monkeypatch, 64, 128)
    expected = trained(ScratchLearner(config(), DATA, cpu("fused"), len(SPLIT.train)))
    if event == "copied":
        monkeypatch.setattr(simulated_gpu.Stream, "wait_event", lambda self, event: None)
        monkeypatch.setattr(Gpu, "check_joined", lambda self: None)
    else:
        monkeypatch.setattr(simulated_gpu.Event, "synchronize", lambda self: None)
    gpu = Gpu(monkeypatch)
    found = trained(ScratchLearner(config(), DATA, gpu.device, len(SPLIT.train), gpu.products))
    assert any(a.tobytes() != np.asarray(b).tobytes() for a, b in zip(expected, found))


@pytest.mark.parametrize("text, value", [
    ("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1000", 1000), ("1.5k", 1500), ("2gib", 2**31),
])  # fmt: skip
def test_amounts_of_memory(text, value):
    assert flags.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-", "1e999GB", "nanGB"])
def test_amounts_of_memory_that_are_none(text):
    with pytest.raises(InputError, match="--memory-limit"):
        flags.parse_bytes(text)


@pytest.mark.parametrize("count, text", [(999, "999 B"), (1000, "1 KB"), (1_234_567, "1.24 MB"), (4 * 10**9, "4 GB")])
def test_amounts_are_written_rounded_up(count, text):
    assert flags.format_bytes(count) == text
