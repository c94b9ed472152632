"""What is installed and downloaded is known beforehand."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mlp import InputError, emnist

from .training import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(line) for line in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])]
PINNED = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
}
UNPINNED = ("nvidia-", "nvmath-python")  # by the wheels of torch and CuPy; on a GPU only


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_every_requirement_is_pinned_within_bounds(requirement):
    name, operators = canonicalize_name(requirement.name), {s.operator for s in requirement.specifier}
    assert operators & {"==", "<"}, "an upper bound"
    if not name.startswith(UNPINNED):
        assert PINNED[name] in requirement.specifier


def test_every_line_of_the_constraints_is_one_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINNED) > 40


def test_everything_that_is_installed_is_in_the_constraints():
    """What requires what, as the installed packages say it, from the requirements down."""
    from importlib.metadata import PackageNotFoundError, requires

    seen, waiting = set(), [canonicalize_name(r.name) for r in REQUIRED]
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(("nvidia-", "nvmath", "cuda-")):
            continue
        seen.add(name)
        try:
            further = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue  # not on this machine
        assert name in PINNED, name
        waiting += [canonicalize_name(r.name) for r in further if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"numpy", "sqlalchemy", "kiwisolver", "filelock"} <= seen


def test_make_installs_what_is_pinned():
    text = (ROOT / "Makefile").read_text()
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert len(installs) == 1 and "--constraint constraints.txt" in installs[0]
    assert re.search(r"^\$\(INSTALLED\): .*constraints\.txt", text, re.M)


def test_the_download_is_encrypted_and_its_digest_known():
    assert emnist.URL.startswith("https://") and re.fullmatch("[0-9a-f]{32}", emnist.MD5)


@pytest.mark.parametrize("url", ["http://example.com/emnist.zip", "ftp://example.com/emnist.zip"])
def test_a_mirror_that_anyone_could_alter_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.setenv("EMNIST_URL", url)
    with pytest.raises(InputError, match=r"EMNIST_URL .* is not https, expected an address that nobody can alter"):
        emnist.download(tmp_path)
    assert not any(tmp_path.iterdir())
