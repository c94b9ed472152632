"""Every kernel thread by thread (kernels/simt.py): right, clean under each sanitizer, and the same bits in
any order of blocks and threads, whatever uninitialised memory holds.

    pytest tests/test_sanitizers.py --every-case       # all cases instead of the representative ones: minutes
"""

import functools
import re
from collections import Counter

import numpy as np
import pytest

from kernels import simt

from . import cases
from .backends import simt_backend
from .case import Case
from .checks import FEW_SHAPES, Check, to_numpy

SIZES = (0, 1, 2, 3, 4, 5, 31, 127, 1023)
# Sanitizer, order of blocks and threads, what uninitialised memory holds. AddressSanitizer comes with UBSan.
FLAVOURS = [("", 0, 0xFF), ("", 1, 0x00), ("thread", 3, 0xFF), ("address", 1, 0x7F)]
MORE = [("", 2, 0x7F), ("undefined", 4, 0x00)]  # with --every-case


@functools.cache
def _all(sanitizer: str, every: bool) -> list:
    """The cases; of the representative ones, of every kernel one after another goes to one sanitizer and to the other.
    """
    if every:
        return cases.every(FEW_SHAPES, SIZES, large=False)
    listed, seen = [], Counter()
    for case in cases.representative():
        number, seen[case.kernel] = seen[case.kernel], seen[case.kernel] + 1
        if not sanitizer or number == 0 or number % 2 == (sanitizer == "thread"):
            listed.append(case)
    return listed


@functools.cache
def _execute(sanitizer, seed, pattern, every):
    """By case: its results' bytes. What failed, one line each. The kernels that were launched."""
    backend = simt_backend(sanitizer, seed, pattern)
    bits, failures, launched = {}, [], set()
    for case in _all(sanitizer, every):
        backend.device.launched.clear()
        try:
            checks = case.run(backend)
            for check in checks:
                check.verify()
            assert backend.device.launched == {case.kernel, *case.also}
            bits[str(case)] = [(c.what, to_numpy(c.actual).tobytes()) for c in checks]
        except (AssertionError, simt.SimtError) as error:
            failures.append(f"{case}: {error}")
        launched |= backend.device.launched
    backend.device.runner.close()
    return bits, failures, launched


@pytest.mark.parametrize("flavour", FLAVOURS + MORE, ids=lambda f: f"{f[0] or 'plain'}-seed-{f[1]}-{f[2]:02x}")
def test_every_kernel_is_right_and_clean_and_gives_the_same_bits(flavour, every_case):
    if flavour in MORE and not every_case:
        pytest.skip("takes minutes: give --every-case")
    bits, failures, launched = _execute(*flavour, every_case)
    assert not failures, "\n".join(failures)
    table = (simt.build().parent / "simt_table.inc").read_text()
    names = re.findall(r"SIMT_ENTRY\(((?!gemm_)\w+)\)", table)  # test_gemm.py has those
    assert launched == set(names) and len(names) == 41
    first = _execute(*FLAVOURS[0], every_case)[0]
    assert [case for case in bits if bits[case] != first[case]] == []


def test_the_cases_have_names_of_their_own():
    listed = cases.every(FEW_SHAPES, SIZES, large=True)
    repeated = {str(case) for case in cases.representative()}  # a shape may be in both lists
    names = [str(case) for case in listed[len(repeated) :]]
    assert len(names) == len(set(names)) and len(repeated) == len(cases.representative())


def test_a_wrong_result_and_a_crash_are_measured_as_failures():
    backend = simt_backend()

    def nan(rng, backend):
        return [Check("y", np.array([0.5, np.nan]), np.ones(2), 0.5), Check("z", np.ones(1), np.ones(1), 0.0)]

    def crash(rng, backend):
        raise simt.SimtError("kernel x: wrote outside", "")

    wrong, crashed = (Case("kernel", "1", f).measure(backend) for f in (nan, crash))
    assert wrong == {"kernel": "kernel", "case": "1", "what": "y", "max_relative_error": float("inf"),
                     "tolerance": 0.5, "passed": False}  # fmt: skip
    assert crashed["passed"] is False and crashed["error"] == "SimtError: kernel x: wrote outside"
