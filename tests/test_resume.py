"""A run that is cut short goes on from its checkpoint as if it had not been: every bit, from every place."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mlp import InputError, archive, checkpoint, configs
from mlp.data import stratified_split
from mlp.flags import Interval, parse_interval
from mlp.loop import fit
from mlp.progress import STATE, Keeper
from mlp.scratch import ScratchLearner
from mlp.torch_models import TorchLearner

from .training import BACKENDS, cpu, easy_dataset

DATA = easy_dataset(300, 6)
SPLIT = stratified_split(DATA.labels)
SMALL = dict(hidden=(24, 12), batch_size=32, epochs=3)
SCRATCH = {
    "m0": dict(model="m0"),
    "momentum": dict(model="m1", optimizer="sgd", momentum=0.9, lr=0.05),
    "m1": dict(model="m1", schedule="cosine", warmup=1, l2=1e-3, decoupled=True),
    "robust": dict(model="robust", dropout=0.3, ema=0.9, label_smoothing=0.1, class_balance=0.9),
    "full batch": dict(model="m1", batch_size="full"),
    "early stopping": dict(model="m1", lr=0.03, patience=1, epochs=30),
}
TORCH = {
    "m2": dict(model="m2"),
    "m2 fused": dict(model="m2", fused=True),
    "momentum": dict(model="m2", optimizer="sgd", momentum=0.9, lr=0.05),
    "m3": dict(model="m3", ema=0.9),
}


def make(kind: str, chunk_rows=2048, **changes):
    changes = SMALL | changes
    config = configs.preset(changes.pop("model"), **changes)
    if kind == "torch":
        return TorchLearner(config, DATA, "cpu", len(SPLIT.train))
    return ScratchLearner(config, DATA, cpu(kind, chunk_rows), len(SPLIT.train))


class Copying(Keeper):
    """Keeps a copy of every checkpoint."""

    def save(self, progress, learner):
        super().save(progress, learner)
        self.copies = [*getattr(self, "copies", []), self.path.with_name(f"{len(getattr(self, 'copies', []))}.npz")]
        shutil.copy(self.path, self.copies[-1])


def keeper_of(learner, folder, every=Interval(0.0)):  # noqa: B008
    return Copying(folder, learner.config, DATA.checksum, every)


def results(learner, history):
    """All bits of a run but its times."""
    rows = [dataclasses.replace(row, seconds=0.0, images_per_second=0.0) for row in history.rows]
    arrays = {name: array.tobytes() for name, array in learner.arrays().items()}
    return arrays, rows, history.best_epoch, history.outcome


def check_every_place(tmp_path, places, kind, **changes):
    learner = make(kind, **changes)
    keeper = keeper_of(learner, tmp_path)
    undisturbed = results(learner, fit(learner, SPLIT, learner.config, keeper=keeper))
    again = make(kind, **changes)
    assert results(again, fit(again, SPLIT, again.config)) == undisturbed  # to keep it changes nothing
    for path in keeper.copies[::-1][:: max(1, len(keeper.copies) // places)]:
        shutil.copy(path, tmp_path / STATE)
        fresh = make(kind, **changes)
        progress = keeper.load(fresh)
        assert results(fresh, fit(fresh, SPLIT, fresh.config, progress=progress)) == undisturbed, path.name
    return undisturbed, keeper


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SCRATCH)
def test_from_every_place_the_same_bits(tmp_path, backend, case):
    (_, rows, _, outcome), keeper = check_every_place(tmp_path, 7, backend, **SCRATCH[case])
    assert outcome == ("stopped early" if case == "early stopping" else "finished")
    steps = 1 if case == "full batch" else 7
    assert len(keeper.copies) == steps * len(rows)


def test_a_batch_in_chunks(tmp_path):
    check_every_place(tmp_path, 3, "fused", model="m1", batch_size=100, chunk_rows=32, dropout=0.2)


@pytest.mark.parametrize("case", TORCH)
def test_from_every_place_the_same_bits_in_torch(tmp_path, case):
    check_every_place(tmp_path, 4, "torch", **TORCH[case])


def test_a_checkpoint_twice_is_the_same_bytes_of_arrays(tmp_path):
    learner = make("fused", model="m1")
    keeper = keeper_of(learner, tmp_path)
    fit(learner, SPLIT, learner.config, keeper=keeper)
    progress = keeper.load(make("fused", model="m1"))
    fresh = make("fused", model="m1")
    before = archive.read(keeper.path)
    keeper.save(dataclasses.replace(progress, state=fresh.from_host(learner.to_host(progress.state))), fresh)
    after = archive.read(keeper.path)
    assert before[0] == after[0] and all(np.array_equal(before[1][name], x) for name, x in after[1].items())


@pytest.mark.parametrize("every, expected", [
    ("0.0001s", [(e, d) for e in (1, 2, 3) for d in (0, 32, 64, 96, 128, 160, 192)]),
    ("1", [(2, 0), (3, 0)]), ("2", [(3, 0)]), ("3", []), ("1h", []), ("never", []),
])  # fmt: skip
def test_how_often(tmp_path, every, expected):
    learner = make("plain", model="m0")
    keeper = keeper_of(learner, tmp_path, parse_interval(every))
    places = []
    save = keeper.save
    keeper.save = lambda progress, learner: places.append((progress.epoch, progress.done)) or save(progress, learner)
    fit(learner, SPLIT, learner.config, keeper=keeper)
    assert places == expected


# ---- what is no checkpoint of this run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the checkpoint of m1 after its first epoch."""
    folder = tmp_path_factory.mktemp("kept")
    learner = make("fused", model="m1")
    keeper = Keeper(folder, learner.config, DATA.checksum, Interval(None, 1))
    fit(learner, SPLIT, learner.config, keeper=keeper)
    return folder


def content(path):
    """What archive.write() was given for the file."""
    about, arrays = archive.read(path)
    return {name: x for name, x in about.items() if name not in ("format", "kind", "arrays")}, arrays


def rewritten(path, **changes):
    """Write the file again, with its checksum, and other values in its text."""
    about, arrays = content(path)
    archive.write(path, "state", about | changes, arrays)


def altered(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is not a readable checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "is not a readable checkpoint"),
    "altered": (altered, "is not a readable checkpoint"),
    "foreign": (lambda path: np.savez(path, x=np.zeros(3)), "is not a readable checkpoint"),
    "a pickle": (lambda path: np.savez(path, about=np.array([{}], dtype=object)), "is not a readable checkpoint"),
    "a model": (
        lambda path: checkpoint.save(path, {}, configs.PRESETS["m1"], ()), "it is a model, expected the state of a run",
    ),
    "newer": (lambda path: rewritten(path, format=3), "has checkpoint format 3, and this version reads format 2"),
    "other rows": (lambda path: rewritten(path, rows=[{"epoch": 1}]), "is not a readable checkpoint"),
    "other data": (lambda path: rewritten(path, data_sha256="0" * 64), "belongs to another run (what differs: data)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_its_checkpoint_is_refused(kept, tmp_path, case):
    damage, expected = DAMAGE[case]
    path = shutil.copy(kept / STATE, tmp_path / STATE)
    damage(path)
    learner = make("fused", model="m1")
    with pytest.raises(InputError) as error:
        Keeper(tmp_path, learner.config, DATA.checksum, Interval()).load(learner)
    message = str(error.value)
    assert message.startswith(str(path)) and expected in message and "\n" not in message and message[-1] not in ".!"


@pytest.mark.parametrize("changes, named", [
    (dict(lr=0.5), "lr"), (dict(hidden=(24, 13)), "hidden"), (dict(seed=1), "seed"), (dict(fused=True), "fused"),
    (dict(batch_norm=True), "batch_norm"), (dict(epochs=4), "epochs"),
])  # fmt: skip
def test_the_checkpoint_of_another_model_is_refused(kept, changes, named):
    learner = make("fused", model="m1", **changes)
    with pytest.raises(InputError, match=rf"belongs to another run \(what differs: {named}\)"):
        Keeper(kept, learner.config, DATA.checksum, Interval()).load(learner)


@pytest.mark.parametrize("name, array", [
    ("state/m/weight0", np.zeros((784, 25), np.float32)), ("state/m/weight0", np.zeros((784, 24))),
    ("state/optimizer/0/exp_avg", np.zeros(3)), ("best/extra", np.zeros(3)), ("state/v/bias1", None),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(kept, tmp_path, name, array):
    about, arrays = content(kept / STATE)
    arrays = {key: x for key, x in (arrays | {name: array}).items() if x is not None}
    archive.write(tmp_path / STATE, "state", about, arrays)
    learner = make("fused", model="m1")
    with pytest.raises(InputError, match=r"belongs to another run \(what differs: arrays\)"):
        Keeper(tmp_path, learner.config, DATA.checksum, Interval()).load(learner)


def test_a_checkpoint_holds_only_plain_arrays_and_json(kept):
    with np.load(kept / STATE, allow_pickle=False) as file:
        assert {file[name].dtype.kind for name in file.files} == {"U", "f"}
        about = json.loads(str(file["about"]))
    assert about["kind"] == "state" and about["format"] == 2 and len(about["sha256"]) == 64
    assert {"rows", "best_epoch", "best_loss", "epoch", "done", "seconds", "config", "data_sha256"} <= about.keys()


def test_where_nothing_was_kept_there_is_nothing(tmp_path):
    learner = make("plain", model="m0")
    assert Keeper(tmp_path, learner.config, DATA.checksum, Interval()).load(learner) is None


def test_the_model_reader_does_not_take_a_state(kept):
    with pytest.raises(InputError, match="is the state of a run, expected a model; give its checkpoint.npz"):
        checkpoint.read(kept / STATE)
