"""The fuzzer's readers on their seeds and on changes of them, what it takes for a failure, and what it reports."""

import importlib.util
import json
import math
import warnings

import numpy as np
import pytest

from mlp import InputError, data_files

from . import fuzz

ROUNDS = 150  # changed inputs for each reader
PIECES = (b"\0", b"\xff", b"\x80\0\0\0", b"\xff" * 8, b"(", b"]", b"'", b"-1", b"9" * 20, b"\n", b"PK\1\2", b"{}")


def changed(rng, content: bytes) -> bytes:
    """`content` with one to three changes, as libFuzzer makes them; the first byte stays."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, length = sorted(int(k) for k in rng.integers(1, len(content) + 1, 2))
        piece = PIECES[rng.integers(len(PIECES))]
        how = rng.integers(6)
        if how == 0 and at < len(content):
            content[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            content[at : at + len(piece)] = piece
        elif how == 2:
            content[at:at] = piece
        elif how == 3:
            del content[at : at + min(length - at, 40)]
        elif how == 4:
            del content[at:]
        else:
            content[at:at] = content[at : min(length, at + 40)]
    return bytes(content)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_seeds_are_sound_and_changes_of_them_end_in_a_sentence(tmp_path, name):
    rng, reader = np.random.default_rng(2024), fuzz.READERS[name]()
    for seed in reader.seeds:
        reader.read(tmp_path, seed)
        assert fuzz.failure(reader, tmp_path, seed) is None
    refused = 0
    for k in range(ROUNDS):
        content = changed(rng, reader.seeds[k % len(reader.seeds)])
        assert fuzz.failure(reader, tmp_path, content) is None, content
        try:
            reader.read(tmp_path, content)
        except InputError:
            refused += 1
        for path in tmp_path.iterdir():
            path.unlink()
    assert refused > ROUNDS // 3, "the changes reach the checks"
    for content in (b"", *(bytes([k]) for k in range(len(reader.seeds)))):
        assert fuzz.failure(reader, tmp_path, content) is None


def planted(read):
    def to_folder(folder, content):
        (folder / "file").write_bytes(content)
        return read(folder / "file", content)

    return fuzz.Reader(to_folder, [b"\0"])


def warn(path, content):
    warnings.warn(f"{path} is odd", UserWarning, stacklevel=1)


def refuse(message):
    def read(path, content):
        raise InputError(message.format(path=path))

    return read


@pytest.mark.parametrize("read, what", [
    (lambda path, content: content[7], "IndexError in test_fuzz.py:"),
    (lambda path, content: json.loads(content[:1] + b"]"), "JSONDecodeError in decoder.py:"),
    (lambda path, content: np.empty(2**60, np.uint8), "MemoryError in test_fuzz.py:"),
    (lambda path, content: path.with_name("else").read_bytes(), "FileNotFoundError in pathlib.py:"),
    (warn, "UserWarning in test_fuzz.py:"),
    (refuse("it cannot be read; give another"), "a sentence that is not one line or names no file:"),
])  # fmt: skip
def test_a_planted_bug_is_a_failure(tmp_path, read, what):
    found = fuzz.failure(planted(read), tmp_path, b"\0\1\2")
    assert found and found.startswith(what), found
    assert not list(tmp_path.iterdir())


def test_a_sentence_that_names_the_file_is_none(tmp_path):
    assert fuzz.failure(planted(refuse("{path} cannot be read; give another")), tmp_path, b"\0") is None


def test_a_planted_bug_in_a_reader_of_ours_is_found_and_kept(tmp_path, monkeypatch):
    """One that only some changes reach: a header is used whether it is whole or not."""

    def unchecked(path, kind, header):
        magic, *shape = np.frombuffer(header, ">u4").tolist()
        return shape, len(header) + math.prod(shape)

    monkeypatch.setattr(data_files, "_idx_header", unchecked)
    rng, reader, (files, kept) = np.random.default_rng(0), fuzz.idx_reader(), (tmp_path / "files", tmp_path / "kept")
    files.mkdir()
    failures = fuzz.Failures(kept, "idx")
    for k in range(60):
        content = changed(rng, reader.seeds[k % len(reader.seeds)])[: 8 + k]
        failures.note(fuzz.failure(reader, files, content), content)
    assert failures.found
    for what, file in failures.found.items():
        assert fuzz.failure(reader, files, file.read_bytes()) == what == file.with_suffix(".txt").read_text()


LOG = """#2 INITED cov: 100 ft: 120 corp: 2/12b exec/s: 0 rss: 99Mb
#900 DONE   cov: 187 ft: 308 corp: 47/12Kb lim: 4096 exec/s: 1077 rss: 104Mb
stat::number_of_executed_units: 900
"""


def test_the_report_has_what_libfuzzer_says(tmp_path):
    assert fuzz.report("idx", 0, LOG, tmp_path, tmp_path / "keep") == {
        "reader": "idx", "executions": 900, "edges": 187, "features": 308, "corpus": 47, "failures": [],
    }  # fmt: skip
    assert not (tmp_path / "keep").exists()


@pytest.mark.parametrize("left, what", [
    ("failures/idx-0", "IndexError in data.py:1"), ("timeout-ab", "takes more than 10 s"),
    ("oom-ab", "takes more than 2048 MB"), ("crash-ab", "ends the process"),
])  # fmt: skip
def test_the_report_has_every_failure_and_keeps_its_input(tmp_path, left, what):
    file, keep = tmp_path / "work" / left, tmp_path / "keep"
    fuzz.Failures(file.parent, "idx").note(what, b"input") if "failures" in left else (
        file.parent.mkdir(), file.write_bytes(b"input"))  # fmt: skip
    (failure,) = fuzz.report("idx", 77, LOG, tmp_path / "work", keep)["failures"]
    assert failure["what"] == what
    (kept,) = keep.iterdir()
    assert failure["input"] == str(kept) and kept.read_bytes() == b"input"


@pytest.mark.parametrize("status, log", [(1, LOG), (0, "no module named numpy")])
def test_a_fuzzer_that_did_not_run_is_a_failure(tmp_path, status, log):
    (failure,) = fuzz.report("idx", status, log, tmp_path, tmp_path / "keep")["failures"]
    assert failure["what"].startswith(f"the fuzzer ended with status {status}: ") and failure["input"] is None


@pytest.mark.parametrize("failures", [[], [{"what": "IndexError in data.py:1", "input": "fuzz-failures/idx-0"}]])
def test_the_exit_status_and_the_file_say_whether_something_failed(tmp_path, monkeypatch, capsys, failures):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    asked = []

    def run(name, seconds, seed, keep):
        asked.append((seconds, seed, keep))
        return {"reader": name, "executions": 5, "failures": failures if name == "npy" else []}

    monkeypatch.setattr(fuzz, "run", run)
    out = tmp_path / "fuzz.json"
    assert fuzz.main(["--seconds", "60", "--seed", "7", "--out", str(out)]) == bool(failures)
    assert asked == [(60 // len(fuzz.READERS), 7, tmp_path / "fuzz-failures")] * len(fuzz.READERS)
    assert [row["reader"] for row in json.loads(out.read_text())] == list(fuzz.READERS)
    assert ("FAILED: IndexError in data.py:1: fuzz-failures/idx-0" in capsys.readouterr().out) == bool(failures)


def test_without_atheris_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fuzz.main(["--seconds", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: Atheris is not installed, expected ") and err.count("\n") == 1


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="Atheris is not installed")
def test_atheris_fuzzes_a_reader(tmp_path):
    row = fuzz.run("idx", 1, 1, tmp_path / "keep")
    assert row["failures"] == [] and row["executions"] > 100 and row["edges"] > 20 and row["corpus"] > 2
