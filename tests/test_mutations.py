"""The mutation check: its list fits the sources, its last result is complete, and its verdicts mean what they say."""

import csv
import shutil

import pytest

from . import mutations
from .mutations import BROKEN, CAUGHT, FIRST, LATE, RESULTS, ROOT, SURVIVED, UNSEEN, Mutation, Verdict

ONE_TEST = "tests/test_bias_act.py::test_special_values"


def test_every_mutation_applies_to_the_sources():
    listed = mutations.mutations()
    assert sum(not m.unseen for m in listed) >= 60
    assert {m.file for m in listed if not m.unseen} == set(FIRST)
    for m in listed:
        text = (ROOT / m.file).read_text()
        assert m.apply(text) != text and m.breaks
        assert (ROOT / m.tests.split("::")[0]).exists(), f"{m.name}: {m.tests}"


def test_a_mutation_that_does_not_apply_is_an_error():
    for text in ("", "twice twice"):
        with pytest.raises(ValueError, match="'twice' occurs . times, expected 1"):
            Mutation("file", "name", "twice", "", "", "", "").apply(text)


def test_all_that_were_tried_are_caught():
    """Where this fails, a test for each that survived is missing. `python -m tests.mutations --new` tries the rest."""
    with open(RESULTS, newline="") as file:
        assert file.readline().startswith("# 20")
        found = {(row["file"], row["name"]): row for row in csv.DictReader(file)}
    listed = {(m.file, m.name): m for m in mutations.mutations()}
    assert set(found) <= set(listed) and len(found) >= 300
    for place, row in found.items():
        m = listed[place]
        assert row["verdict"] == (UNSEEN if m.unseen else CAUGHT), m.name
        assert row["fault"] == m.fault and len(row["sources"]) == 12, m.name
        assert bool(row["test"]) == (not m.unseen), m.name
    if untried := len(listed) - len(found):
        pytest.skip(f"{untried} of {len(listed)} faults have not been tried; run `python -m tests.mutations --new`")


def test_a_verdict_is_kept_until_the_fault_is_another(monkeypatch, tmp_path):
    monkeypatch.setattr(mutations, "RESULTS", tmp_path / "mutations.csv")
    first, second = (Mutation("file", name, "a", "b", "", "", "") for name in ("first", "second"))
    monkeypatch.setattr(mutations, "mutations", lambda: [first, second])
    shutil.copy(RESULTS, mutations.RESULTS)
    mutations.write({("file", "first"): ("file", "first", CAUGHT, "a test", 1.0, "0" * 12, first.fault)})
    assert mutations.chosen(["--new"]) == [second] and mutations.chosen(["first"]) == [first]
    mutations.write({("file", "second"): ("file", "second", CAUGHT, "a test", 1.0, "0" * 12, second.fault)})
    assert mutations.chosen(["--new"]) == [] and list(mutations.known()) == [("file", "first"), ("file", "second")]
    other = Mutation("file", "first", "a", "c", "", "", "")
    monkeypatch.setattr(mutations, "mutations", lambda: [other, second])
    assert mutations.chosen(["--new"]) == [other]


def _relu(replace):
    return Mutation("kernels/src/bias_act.cuh", "", "0.0f > u ? 0.0f : u", replace, "", ONE_TEST, "simt")


def test_verdicts(every_case, tmp_path):
    """On a copy without a mutation the test passes, so that it does not fail for another reason with one."""
    if not every_case:
        pytest.skip("builds for minutes: give --every-case")
    tree = mutations.Tree(tmp_path)
    tree.build("simt")
    tree.test([ONE_TEST], "fused-simt-relu")
    for replace, verdict, test in [
        ("u > 0.0f ? u : 0.0f", CAUGHT, f"{ONE_TEST}[fused-simt-relu]"),
        ("0.0f > u ? 0.0f + 0.0f : u", SURVIVED, ""),
        ("0.0f > u ? 0.0f : unknown", BROKEN, ""),
    ]:
        found = tree.judge(_relu(replace), [ONE_TEST])
        assert (found.verdict, found.test) == (verdict, test)
    original = (ROOT / "kernels/src/bias_act.cuh").read_text()
    assert (tmp_path / "kernels/src/bias_act.cuh").read_text() == original


def test_what_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "SECONDS", 0.1)
    with pytest.raises(Verdict, match=LATE):
        mutations._run(tmp_path, ["sleep", "60"])
