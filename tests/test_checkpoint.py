"""Checkpoints: what is written comes back, never a pickle, and damage is one sentence."""

import dataclasses
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from kernels import plain
from mlp import InputError, archive, checkpoint, configs
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.model import MLP
from mlp.scratch import ScratchLearner

from .training import BACKENDS, cpu, easy_dataset

NAMES = ("0", "A", "é", "two words")
CONFIG = configs.preset("m1", hidden=(5, 3), batch_size="full", patience=7, lr=0.0123)


def some_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weight0": rng.standard_normal((6, 5)).astype(np.float32),
        "bias0": np.array([0.0, -0.0, np.inf, 1e-45, 3e38], np.float32),
    }


def bits(arrays):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.npz"
    checkpoint.save(path, some_arrays(), CONFIG, NAMES)
    return path


def assert_one_sentence(error, path):
    message = str(error.value)
    assert str(path) in message
    assert message and "\n" not in message and message[-1] not in ".!"


def rewrite(path, **changes):
    """Save again with members replaced, or left out where the value is None; the checksum is corrected."""
    with np.load(path, allow_pickle=False) as file:
        members = {name: file[name] for name in file.files} | changes
    members = {name: value for name, value in members.items() if value is not None}
    try:
        text = json.loads(str(members["about"]))
        text["sha256"] = archive._digest(
            {name: value for name, value in text.items() if name != "sha256"},
            {name: value for name, value in members.items() if name != "about"},
        )
        members["about"] = np.array(json.dumps(text))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # there is none to correct
    np.savez(path, **members)


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(path, **replaced):
    """Write the zip file again with the bytes of members replaced, their checksums correct."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name in members:
            file.writestr(name, replaced.get(name.removesuffix(".npy"), members[name]))


def about(path, **changes):
    with np.load(path, allow_pickle=False) as file:
        return np.array(json.dumps(json.loads(str(file["about"])) | changes))


def test_what_is_saved_comes_back(saved):
    arrays, config, names = checkpoint.load(saved)
    assert config == CONFIG and config.hidden == (5, 3) and names == NAMES
    assert bits(arrays) == bits(some_arrays())
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("name", configs.PRESETS)
def test_every_preset_survives(tmp_path, name):
    checkpoint.save(tmp_path / "c.npz", {}, configs.PRESETS[name], ())
    assert checkpoint.load(tmp_path / "c.npz") == ({}, configs.PRESETS[name], ())


def test_the_name_of_the_data_set_comes_back_where_it_was_recorded(saved):
    assert checkpoint.read(saved).data_name == ""
    checkpoint.save(saved, some_arrays(), CONFIG, NAMES, "glyphs-1000")
    assert checkpoint.read(saved).data_name == "glyphs-1000" and checkpoint.load(saved)[1:] == (CONFIG, NAMES)
    with np.load(saved, allow_pickle=False) as file:
        text = json.loads(str(file["about"]))
    del text["data_name"]  # as it was written before
    rewrite(saved, about=np.array(json.dumps(text)))
    assert checkpoint.read(saved).data_name == "" and checkpoint.load(saved)[1:] == (CONFIG, NAMES)


def test_a_checkpoint_holds_no_pickle(saved):
    with np.load(saved, allow_pickle=False) as file:
        kinds = {name: file[name].dtype.kind for name in file.files}
    assert kinds == {"about": "U", "weight0": "f", "bias0": "f"}


def test_a_pickle_is_never_opened(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    rewrite(saved, weight0=np.array([Trap()], dtype=object))
    with pytest.raises(InputError) as error:
        checkpoint.load(saved)
    assert_one_sentence(error, saved)
    saved.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError):
        checkpoint.load(saved)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path / "no" / "folder" / "c.npz"):
        with pytest.raises(InputError) as error:
            checkpoint.load(path)
        assert_one_sentence(error, path)
        assert "does not exist" in str(error.value)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(InputError) as error:
        checkpoint.load(tmp_path)
    assert_one_sentence(error, tmp_path)


def test_a_file_cut_off_anywhere(saved):
    whole = saved.read_bytes()
    for length in range(0, len(whole), 7):
        saved.write_bytes(whole[:length])
        with pytest.raises(InputError) as error:
            checkpoint.load(saved)
        assert_one_sentence(error, saved)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_byte_altered_anywhere(saved, mask):
    """Either one sentence, or, where the byte says nothing (a time, say), every array as it was."""
    whole, refused = saved.read_bytes(), 0
    for place in range(len(whole)):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            arrays, config, names = checkpoint.load(saved)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(saved) in str(error)
        else:
            assert (config, names) == (CONFIG, NAMES)
            assert bits(arrays) == bits(some_arrays())
    assert refused > 0.7 * len(whole)


@pytest.mark.parametrize("write", [
    lambda path: np.savez(path, a=np.zeros(3)),
    lambda path: path.write_bytes(b"not a checkpoint\n"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(npy(np.zeros(3))),
    lambda path: zipped(path, weight0=b"not an array"),
    lambda path: zipped(path, about=b"not an array"),
    lambda path: zipped(path, weight0=npy(np.zeros(3)).replace(b"(3,)", b"(3,(")),
    lambda path: rewrite(path, about=None),
    lambda path: rewrite(path, about=np.zeros(3)),
    lambda path: rewrite(path, about=np.array("[1, 2]")),
    lambda path: rewrite(path, about=np.array("null")),
    lambda path: rewrite(path, about=np.array("{}")),
    lambda path: rewrite(path, about=about(path, config=None)),
    lambda path: rewrite(path, about=about(path, config={"hidden": [3]})),
    lambda path: rewrite(path, about=about(path, config={"model": "m1", "hidden": 3})),
    lambda path: rewrite(path, about=about(path, config=dataclasses.asdict(CONFIG) | {"unheard_of": 1})),
    lambda path: rewrite(path, about=about(path, config=dataclasses.asdict(CONFIG) | {"lr": "fast"})),
    lambda path: rewrite(path, about=about(path, config=dataclasses.asdict(CONFIG) | {"lr": -1.0})),
    lambda path: rewrite(path, about=about(path, class_names=None)),
])  # fmt: skip
def test_a_foreign_file(saved, write):
    write(saved)
    with pytest.raises(InputError) as error:
        checkpoint.load(saved)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


@pytest.mark.parametrize("number", [0, 3, 99, "1", None])
def test_another_format_is_named(saved, number):
    rewrite(saved, about=about(saved, format=number, config={"of": "the future"}))
    with pytest.raises(InputError) as error:
        checkpoint.load(saved)
    assert_one_sentence(error, saved)
    assert f"format {number}" in str(error.value) and "format 2" in str(error.value)


def test_format_1_is_read(saved):
    """It had neither a kind nor a checksum."""
    with np.load(saved, allow_pickle=False) as file:
        members = {name: file[name] for name in file.files}
    text = json.loads(str(members["about"])) | {"format": 1}
    del text["kind"], text["sha256"]
    np.savez(saved, **members | {"about": np.array(json.dumps(text))})
    arrays, config, names = checkpoint.load(saved)
    assert bits(arrays) == bits(some_arrays()) and (config, names) == (CONFIG, NAMES)


def test_one_altered_number_is_noticed(saved):
    """Also where the archive itself, with its own checksums, is in order."""
    with np.load(saved, allow_pickle=False) as file:
        members = {name: file[name] for name in file.files}
    members["weight0"][0, 0] += 1
    np.savez(saved, **members)
    with pytest.raises(InputError, match="checksum"):
        checkpoint.load(saved)


def test_the_same_content_is_the_same_bytes(saved, tmp_path):
    checkpoint.save(tmp_path / "again.npz", some_arrays(), CONFIG, NAMES)
    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()


def test_what_is_compressed_is_not_unpacked(saved):
    with np.load(saved, allow_pickle=False) as file:
        members = {name: file[name] for name in file.files}
    np.savez_compressed(saved, **members)
    with pytest.raises(InputError, match="compressed"):
        checkpoint.load(saved)


@pytest.mark.parametrize("broken", ["write_array", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint(saved, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(np.lib.format if broken == "write_array" else os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(saved, some_arrays(1), CONFIG, NAMES)
    assert saved.read_bytes() == before
    monkeypatch.undo()
    checkpoint.save(saved, some_arrays(1), CONFIG, NAMES)
    assert np.array_equal(checkpoint.load(saved)[0]["weight0"], some_arrays(1)["weight0"])
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fresh_model_with_the_saved_arrays_is_as_good(tmp_path, backend):
    data = easy_dataset(400, 6)
    split = stratified_split(data.labels)
    config = configs.preset("m1", hidden=(24, 12), epochs=10, batch_size=32, activation="gelu")
    ours = ScratchLearner(config, data, cpu(backend), len(split.train))
    fit(ours, split, config)
    expected = ours.evaluate(split.test)
    checkpoint.save(tmp_path / "c.npz", ours.arrays(), config, data.class_names)

    arrays, loaded, names = checkpoint.load(tmp_path / "c.npz")
    sizes = (784, *loaded.hidden, len(names))
    model = MLP(sizes, loaded.activation, rows=len(split.test), ops=plain, seed=99)
    for layer, (weight, bias) in enumerate(zip(model.weights, model.biases)):
        weight[...], bias[...] = arrays[f"weight{layer}"], arrays[f"bias{layer}"]
    assert len(arrays) == 2 * len(model.weights)
    logits = model.forward(data.images[split.test] / np.float32(255))
    assert np.mean(logits.argmax(axis=1) == data.labels[split.test]) == expected.accuracy
    assert expected.accuracy > 2 / 6
