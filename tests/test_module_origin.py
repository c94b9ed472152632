"""The GPU kernels compiled ahead of time or at run time: never an old binary for new sources."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import BackendError, cuda

from .stub_cupy import (  # noqa: F401  (cupy is a fixture)
    DriverError,
    assert_compiled_now,
    assert_fatbin,
    cupy,
    edit_header,
    record,
    write_fatbin,
)

ROOT = Path(__file__).parents[1]


def test_without_a_fatbin(cupy):
    assert_compiled_now(cupy)


def test_of_these_sources(cupy):
    write_fatbin()
    assert_fatbin(cupy)


def test_dynamic_shared_memory_is_allowed_once_on_each_device(cupy):
    """A driver allows a kernel more than 48 KiB only after it was asked to, device by device."""
    cupy.load()
    for cupy.device in (0, 1, 1, 0):
        launch = cuda.function("gemm", 98304)
        assert launch((1,), (256,), ()) == (((1,), (256,), ()), {"shared_mem": 98304})
    assert cuda.function("gemm").limits == [98304, 98304]
    assert cuda.function("gemm")((1,), (256,), ()) == (((1,), (256,), ()), {})


@pytest.mark.parametrize("change", [{"sources": "0" * 64}, {"options": ["-std=c++17", "--use_fast_math"]}])
def test_of_others(cupy, change):
    write_fatbin(**change)
    assert_compiled_now(cupy)


def test_an_edit_is_compiled(cupy):
    write_fatbin()
    assert_fatbin(cupy)
    edit_header()
    assert_compiled_now(cupy, contains="slope = 0.03f")


@pytest.mark.parametrize("capability, origin", [
    ("75", "fatbin"), ("87", "fatbin"), ("90", "fatbin"), ("103", "fatbin"), ("121", "fatbin"), ("130", "fatbin"),
    ("70", "nvrtc"), ("110", "nvrtc"),
])  # fmt: skip
def test_only_where_it_has_code_for_the_gpu(cupy, capability, origin):
    write_fatbin()
    cupy.capability = capability
    assert cuda.module_origin() == origin
    assert ("path" if origin == "fatbin" else "code") in cupy.load()


def _assert_refused(cupy, pattern):
    for _ in range(2):
        with pytest.raises(BackendError, match=pattern) as caught:
            cupy.load()
        assert str(cuda.FATBIN) in str(caught.value) and "`make cuda`" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"machine", b"machine cod\0"])
def test_damaged(cupy, content):
    write_fatbin()
    cuda.FATBIN.write_bytes(content)
    _assert_refused(cupy, "damaged")


@pytest.mark.parametrize("content", [None, "", '{"sources": ', "[]", "{}"])
def test_without_a_record_of_what_it_was_built_from(cupy, content):
    write_fatbin()
    record().unlink() if content is None else record().write_text(content)
    _assert_refused(cupy, r"no readable module\.fatbin\.json")


def test_refused_by_the_driver(cupy):
    write_fatbin()
    cupy.error = DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
    _assert_refused(cupy, "driver cannot load .*INVALID_IMAGE")


_CACHE_SCRIPT = """
import hashlib, sys
from types import SimpleNamespace
from cupy.cuda import compiler
from kernels import cuda

class Module:  # a module that no driver loads
    def load(self, cubin): print(hashlib.sha256(cubin).hexdigest())
    def _set_mapping(self, mapping): pass

compiler.function = SimpleNamespace(Module=Module)
compiler._get_arch_for_options_for_nvrtc = lambda arch: ("-arch=sm_" + arch, "cubin")  # which asks the driver
compile = compiler._compile_using_nvrtc_no_warning
def counted(*args):
    print("compiled")
    return compile(*args)
compiler._compile_using_nvrtc_no_warning = counted
compiler._compile_module_with_cache(sys.stdin.read(), cuda.OPTIONS + cuda.CUPY_OPTIONS[1:], arch="90")
"""


def _run_cache_script(text, folder):
    environment = os.environ | {"CUPY_CACHE_DIR": str(folder), "CUPY_CACHE_IN_MEMORY": "0"}
    result = subprocess.run([sys.executable, "-c", _CACHE_SCRIPT], input=text, cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def _without_products(text):
    """The module without the kernels that take half of the time to compile."""
    shorter = re.sub(r"^GEMM\(.*", "", text, flags=re.MULTILINE)
    assert len(shorter) < len(text)
    return shorter


def test_cupys_disk_cache_does_not_answer_for_an_edited_header(cupy, tmp_path):
    """CuPy's own cache and key, on text that cuda.py hands it; a process each, like a user's."""
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    if not hasattr(compiler, "_compile_using_nvrtc_no_warning"):
        pytest.skip("this CuPy keeps its cache in another way; the test knows that of CuPy 14")
    text = _without_products(cupy.load()["code"])
    first = _run_cache_script(text, tmp_path / "cache")
    edit_header()
    edited = _without_products(cupy.load()["code"])
    second = _run_cache_script(edited, tmp_path / "cache")
    assert first[0] == second[0] == "compiled" and first[1] != second[1], "the edit changed no machine code"
    assert _run_cache_script(text, tmp_path / "cache") == first[1:], "each text has its own entry"
