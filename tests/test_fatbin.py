"""The GPU kernels built ahead of time through CMake, by nvcc and by a stand-in for it where there is none."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kernels import cuda, source

from . import resources
from .stub_cupy import assert_compiled_now, assert_fatbin, cupy, edit_header, record  # noqa: F401
from .test_budget import assert_within_budget

ROOT = Path(__file__).parents[1]
needs_cmake = pytest.mark.skipif(not resources.cmake(), reason="CMake is not installed; run `pip install cmake`")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the PATH: no CUDA toolkit")


def skip_minutes(every_case):
    """nvcc takes minutes, and NVRTC compiles the same sources in test_budget.py."""
    if not every_case:
        pytest.skip("nvcc takes minutes: give --every-case")


# A compiler that knows two architectures and whose machine code is the text of the sources. As the real one,
# it takes its time: where `edit_meanwhile` lies beside it, somebody edits a header before it is done.
_STAND_IN = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then printf 'sm_80\\nsm_90\\n'; exit; fi
for argument; do [ "$before" = -o ] && out="$argument"; before="$argument"; done
cat "${before%/*}"/*.cuh "$before" > "$out"
if [ -e "${0%/*}/edit_meanwhile" ]; then echo '// edited meanwhile' >> "$(cat "${0%/*}/edit_meanwhile")"; fi
"""


@pytest.fixture(params=["stand-in", pytest.param("nvcc", marks=needs_nvcc)])
def build(request, cupy, tmp_path, every_case):
    """A function that builds the fatbin of the copy in tmp_path through CMake, by a stand-in and by nvcc."""
    nvcc = shutil.which("nvcc")
    if request.param == "nvcc":
        skip_minutes(every_case)
    else:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(_STAND_IN)
        nvcc.chmod(0o755)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)

    def run(*arguments):
        result = subprocess.run([resources.cmake(), *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    run("-S.", "-Bbuild", "-DMLP_CUDA=ON", f"-DMLP_NVCC={nvcc}", "-DMLP_CUDA_ARCHITECTURES=90;100000")
    return lambda: run("--build", "build", "--target", "kernels_cuda")


@needs_cmake
def test_build_use_edit_rebuild(build, cupy):
    """The sources are edited between configuring and building, too."""
    source.DIRECTORY.joinpath("adam.cuh").open("a").write("// edited after configuring\n")
    build()
    assert_fatbin(cupy)
    assert json.loads(record().read_text())["architectures"] == [90], "what nvcc does not know is left out"
    before = cuda.FATBIN.read_bytes()
    edit_header()
    assert_compiled_now(cupy, contains="slope = 0.03f")
    build()
    assert_fatbin(cupy)
    assert cuda.FATBIN.read_bytes() != before


@needs_cmake
@pytest.mark.parametrize("build", ["stand-in"], indirect=True)
def test_an_edit_during_the_build_is_not_taken_for_built(build, cupy, tmp_path):
    (tmp_path / "edit_meanwhile").write_text(str(source.DIRECTORY / "common.cuh"))
    build()
    assert_compiled_now(cupy, contains="// edited meanwhile")
    (tmp_path / "edit_meanwhile").unlink()
    build()
    assert_fatbin(cupy)


@needs_cmake
def test_asking_for_it_without_nvcc(tmp_path):
    command = [resources.cmake(), "-S", str(ROOT), "-B", str(tmp_path), "-DMLP_CUDA=ON", "-DMLP_NVCC=/absent/nvcc"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "MLP_CUDA=ON needs nvcc, which was not found" in " ".join(result.stderr.split())


def test_the_numbers_shared_with_cmake_agree():
    text = (source.DIRECTORY / "fatbin.cmake").read_text()
    assert f"set(ARCHITECTURES {' '.join(map(str, cuda.ARCHITECTURES))})" in text
    assert f"set(options {' '.join(cuda.FATBIN_OPTIONS)})" in text
    assert set(cuda.FATBIN_OPTIONS) <= {*cuda.OPTIONS, *cuda.CUPY_OPTIONS}, "NVRTC gets the same"


def _images(fatbin: bytes) -> dict:
    """(kind, architecture) -> contents, of an uncompressed fatbin; kind 1 is PTX, 2 a cubin."""
    magic, _, start, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50 and start + size == len(fatbin)
    images = {}
    while start < len(fatbin):
        kind, _, header, size = struct.unpack_from("<HHIQ", fatbin, start)
        (architecture,) = struct.unpack_from("<I", fatbin, start + 28)
        images[kind, architecture] = fatbin[start + header : start + header + size]
        start += header + size
    return images


@needs_cmake
@needs_nvcc
def test_nvcc_compiles_every_kernel_for_every_architecture_within_budget(every_case, tmp_path):
    skip_minutes(every_case)
    log = resources.nvcc_log(tmp_path)
    assert resources.warnings(log) == ""
    built = json.loads((tmp_path / "module.fatbin.json").read_text())
    assert built["sources"] == source.digest() and built["options"] == list(cuda.FATBIN_OPTIONS)
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    assert built["architectures"] == [a for a in cuda.ARCHITECTURES if f"sm_{a}" in known]
    kernels = assert_within_budget(log, built["architectures"])
    images = _images((tmp_path / "module.fatbin").read_bytes())
    assert set(images) == {(2, a) for a in built["architectures"]} | {(1, max(built["architectures"]))}
    for (kind, architecture), image in images.items():
        for kernel in kernels:
            entry = f".entry {kernel}(" if kind == 1 else f"\0.text.{kernel}\0"
            assert entry.encode() in image, f"{kernel} for {architecture}"
