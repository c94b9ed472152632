"""The Python that README.md shows runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_example(block, tmp_path):
    """In a process and a folder of its own."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    for folder in (ROOT / "build" / "simt").glob("row_max-*"):  # another one for each folder it is run in
        shutil.rmtree(folder)
    if "kernels.simt.MissingSanitizer" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stderr
