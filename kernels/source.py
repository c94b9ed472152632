"""The kernel sources as text: what NVRTC compiles, and the hash that tells a stale binary."""

import hashlib
import re
from pathlib import Path

DIRECTORY = Path(__file__).parent / "src"
_INCLUDE = re.compile(r'#include "([\w/]+\.cuh)"')


def inlined(name: str) -> str:
    """`src/name` with every .cuh it includes in place, each once.

    CuPy's disk cache is keyed by the text and the options and knows nothing of included files, so the
    text must hold them.
    """
    seen = set()

    def expand(file: str) -> str:
        lines = []
        for line in (DIRECTORY / file).read_text().splitlines():
            include = _INCLUDE.match(line)
            if not include:
                if line != "#pragma once":
                    lines.append(line)
            elif include[1] not in seen:
                seen.add(include[1])
                lines.append(expand(include[1]))
        return "\n".join(lines)

    return expand(name)


def digest() -> str:
    """SHA-256 over the SHA-256 of every source file in the order of their paths, as CMakeLists.txt computes it."""
    files = [p for p in DIRECTORY.rglob("*") if p.suffix in {".cu", ".cuh", ".h", ".cpp"}]
    files.sort(key=lambda p: p.relative_to(DIRECTORY).as_posix())
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
