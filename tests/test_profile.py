"""The folder profile/ does no harm, and README.md's make targets exist."""

import re
import subprocess
import sys

from .training import ROOT

README = (ROOT / "README.md").read_text()


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_profile_does_not_hide_the_standard_library():
    assert not (ROOT / "profile" / "__init__.py").exists()
    assert run("-c", "import cProfile").returncode == 0


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (?:CUPY=\S* )?([a-z-]+)", README, re.MULTILINE))
    assert {"train", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
