"""The same seed gives the same bytes, whatever the number of threads; and a run notes down what it was made with."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kernels import host
from mlp import blas, checkpoint, data, provenance, verify
from mlp.device import cpu_name
from mlp.torch_layers import BatchNorm

from .checks import assert_same_bits
from .training import ROOT, SCRIPT, environment, train, write_npy

THREADS = (1, 2, 3)
RUNS = {
    "plain": "--model m1", "fused": "--model m1 --fused", "m2": "--model m2", "m3": "--model m3",
    "m3 fused": "--model m3 --fused",
}  # fmt: skip
# All of them in one process, to import torch once; and a control: a product as large as the first layer's.
SCRIPT_OF_RUNS = f"""
import hashlib, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
import train
from mlp import plots
plots.training = plots.confusion = plots.noise = lambda *args: None  # they take most of the time
for name, options in {RUNS!r}.items():
    fixed = "--device cpu --hidden 400,400 --batch-size 512 --epochs 2 --data images --seed 5".split()
    assert train.main([*options.split(), *fixed, "--out", sys.argv[1] + "/" + name]) == 0
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for m, k, n in ((512, 784, 400), (784, 512, 400), (512, 400, 400)):
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n)))
    digest.update(a @ b)
open(sys.argv[1] + "/control", "w").write(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the results of all runs by each number of threads, as threads-1/plain, ..."""
    folder = tmp_path_factory.mktemp("threads")
    write_npy(folder / "images", rows=900, classes=20)
    processes = []
    for threads in THREADS:
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KERNELS_NUM_THREADS")
        settings = environment() | {name: str(threads) for name in names}
        (folder / f"threads-{threads}").mkdir()
        command = [sys.executable, "-c", SCRIPT_OF_RUNS, f"threads-{threads}"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=folder, env=settings, **pipes))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert (process.returncode, errors) == (0, "")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("threads", THREADS[1:])
@pytest.mark.parametrize("name", RUNS)
def test_the_number_of_threads_changes_no_byte(place, name, threads):
    one, other = (place / f"threads-{n}" / name for n in (1, threads))
    assert verify.differences(one, other) == []
    for file in ("checkpoint.npz", "confusion.csv"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    history = verify._read(one)[verify.HISTORY]
    assert len(history) == 2 and all(len(row) == 6 for row in history.values())


def test_the_runs_are_not_all_alike(place):
    digests = {hashlib.sha256((place / "threads-1" / name / "checkpoint.npz").read_bytes()).digest() for name in RUNS}
    assert len(digests) == len(RUNS)


def test_products_by_numpy_alone_would_not_be_the_same(place):
    digests = {(place / f"threads-{n}" / "control").read_text() for n in THREADS}
    if len(digests) == 1:
        pytest.skip("this BLAS computes these products alike by any number of threads")


# ---- blas.py


@pytest.fixture
def blas_threads():
    """Sets the number of threads of NumPy's BLAS, as far as this machine has cores in what blas.py sees."""
    controllers = blas._libraries()
    before = [controller.get_num_threads() for controller in controllers]

    def set_threads(number):
        for controller in controllers:
            controller.set_num_threads(number)

    yield set_threads
    for controller, number in zip(controllers, before):
        controller.set_num_threads(number)


@pytest.fixture
def four_cores(monkeypatch):
    """As many helpers as a machine with four cores has."""
    monkeypatch.setattr(blas, "cores", lambda: 4)
    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(blas, "_pool", lambda: pool)
        yield pool


SHAPES = [(512, 784, 400), (513, 301, 47), (129, 1000, 129), (1, 784, 400), (2000, 3, 5), (300, 1, 300), (257, 400, 1),
          (0, 4, 4), (127, 400, 400)]  # fmt: skip


def factors(shape, dtype=np.float32, form="plain", seed=0):
    m, k, n = shape
    rng = np.random.default_rng(seed)
    if form == "transposed":
        return rng.standard_normal((k, m)).astype(dtype).T, rng.standard_normal((n, k)).astype(dtype).T
    if form == "strided":
        return rng.standard_normal((2 * m, k)).astype(dtype)[::2], rng.standard_normal((k, 3 * n)).astype(dtype)[:, ::3]
    return rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)


def product(a, b):
    out = np.full((len(a), b.shape[1]), np.nan, a.dtype)
    blas.multiply(a, b, out)
    return out


@pytest.mark.parametrize("form", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_matmuls_with_the_same_bits_for_any_threads(four_cores, blas_threads, shape, dtype, form):
    a, b = factors(shape, dtype, form)
    results = []
    for threads in (1, 2, 3, 4):
        blas_threads(threads)
        results.append(product(a, b))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = shape[1] * np.finfo(dtype).eps * (np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)))
    assert (np.abs(results[0] - exact) <= bound).all()


def test_out_may_be_a_part_of_another_array(four_cores, blas_threads):
    blas_threads(4)
    a, b = factors((600, 300, 40))
    whole = np.zeros((600, 100), np.float32)
    blas.multiply(a, b, whole[:, 10:50])
    assert_same_bits(np.ascontiguousarray(whole[:, 10:50]), product(a, b))
    assert not whole[:, :10].any() and not whole[:, 50:].any()


def test_the_work_is_shared(monkeypatch, four_cores, blas_threads):
    blas_threads(4)
    if not any(controller.get_num_threads() > 1 for controller in blas._libraries()):
        pytest.skip("this BLAS has one thread only")
    submitted, submit = [], four_cores.submit
    monkeypatch.setattr(four_cores, "submit", lambda *args: submitted.append(args) or submit(*args))
    product(*factors((512, 784, 400)))
    assert submitted
    submitted.clear()
    product(*factors((64, 784, 40)))
    assert not submitted


@pytest.mark.parametrize("bad_tile", [0, 3])
def test_an_exception_in_a_tile_reaches_the_caller(monkeypatch, four_cores, blas_threads, bad_tile):
    """Whichever thread it is in; no thread writes any more then, and BLAS has its threads back."""
    blas_threads(2)
    numbers = [controller.get_num_threads() for controller in blas._libraries()]
    a, b = factors((1024, 300, 64))
    out, matmul, running = np.zeros((1024, 64), np.float32), np.matmul, []

    def failing(x, y, out):
        running.append(1)
        try:
            if x.ctypes.data == a[blas.TILE_ROWS * bad_tile :].ctypes.data:
                raise ArithmeticError("in a tile")
            matmul(x, y, out=out)
        finally:
            running.pop()

    monkeypatch.setattr(np, "matmul", failing)
    with pytest.raises(ArithmeticError, match="in a tile"):
        blas.multiply(a, b, out)
    assert not running
    assert [controller.get_num_threads() for controller in blas._libraries()] == numbers
    monkeypatch.undo()
    assert_same_bits(product(a, b), product(a, b))


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_its_threads_back(blas_threads, threads):
    blas_threads(threads)
    before = [controller.get_num_threads() for controller in blas._libraries()]
    product(*factors((512, 784, 400)))
    product(*factors((5, 7, 4)))
    assert [controller.get_num_threads() for controller in blas._libraries()] == before


class Library:
    """A BLAS that remembers how many threads it was told to use."""

    def __init__(self, threads):
        self.threads, self.told = threads, []

    def get_num_threads(self):
        return self.threads

    def set_num_threads(self, number):
        self.threads = number
        self.told.append(number)


def test_several_python_threads_at_once(monkeypatch, four_cores):
    """BLAS has one thread until the last of them is done, or a product that still runs could be divided."""
    library, seen, matmul = Library(3), set(), np.matmul
    monkeypatch.setattr(blas, "_libraries", lambda: [library])

    def watched(a, b, out):
        seen.add(library.threads)
        matmul(a, b, out=out)
        seen.add(library.threads)

    monkeypatch.setattr(np, "matmul", watched)
    pairs = [factors((300 + 70 * n, 200, 150), seed=n) for n in range(6)]
    expected = [product(*pair) for pair in pairs]
    results, barrier = [[] for _ in pairs], threading.Barrier(len(pairs))

    def work(number):
        barrier.wait()
        for _ in range(20):
            results[number].append(product(*pairs[number]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == {1} and library.threads == 3
    for of_thread, right in zip(results, expected):
        assert len(of_thread) == 20
        for result in of_thread:
            assert_same_bits(result, right)


def test_a_product_while_another_one_is_computed(monkeypatch):
    """The inner one ends first and leaves BLAS its one thread."""
    library, matmul = Library(2), np.matmul
    monkeypatch.setattr(blas, "_libraries", lambda: [library])
    monkeypatch.setattr(blas, "cores", lambda: 1)
    after = []

    def nested(a, b, out):
        if len(a) > 2:
            product(*factors((2, 2, 2)))
            after.append(library.threads)
        matmul(a, b, out=out)

    monkeypatch.setattr(np, "matmul", nested)
    product(*factors((300, 200, 150)))
    assert after == [1, 1, 1] and library.told == [1, 2]


def test_a_blas_that_nobody_knows(monkeypatch):
    """Nothing can be told, and the product is computed all the same."""
    monkeypatch.setattr(blas, "_libraries", lambda: [])
    a, b = factors((512, 784, 400))
    assert np.abs(product(a, b) - a @ b).max() <= 1e-3


def test_what_overflows_is_silent_in_helpers_too(four_cores, blas_threads, recwarn):
    """np.errstate holds for one thread."""
    blas_threads(4)
    a, b = factors((2048, 300, 64))
    a[:], b[:] = 3e38, 3e38
    with np.errstate(all="ignore"):
        assert np.isinf(product(a, b)).all()
    assert not recwarn.list


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_has_helpers_of_its_own(tmp_path):
    code = f"""
import os, signal, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from mlp import blas
class Two:
    def get_num_threads(self): return 2
    def set_num_threads(self, number): pass
blas._libraries, blas.cores = lambda: [Two()], lambda: 2
a, out = np.ones((512, 512), np.float32), np.empty((512, 512), np.float32)
warnings.simplefilter("ignore")
blas.multiply(a, a, out)
child = os.fork()
if not child:
    signal.alarm(20)  # its parent may be gone
    blas.multiply(a, a, out)
    os._exit(7 if (out == 512).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=30)
    assert result.stdout == "7\n", result.stderr


# ---- torch


@pytest.mark.parametrize("shape", [(512, 400), (130, 47), (2, 3)])
def test_batch_normalisation_is_torchs_by_one_thread_whatever_there_are(shape):
    rng, results, threads = np.random.default_rng(1), [], torch.get_num_threads()
    x, dy = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))

    def trained(norm):
        given = x.clone().requires_grad_()
        y = norm(given)
        y.backward(dy)
        norm.eval()
        return [y.detach(), given.grad, norm.weight.grad, norm.bias.grad, norm(x).detach(), *norm.buffers()]

    try:
        for number, kind in ((1, nn.BatchNorm1d), (1, BatchNorm), (2, BatchNorm), (4, BatchNorm)):
            torch.set_num_threads(number)
            results.append(trained(kind(shape[1])))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


# ---- config.json


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """A run by the command: its folder, its arguments and its config.json."""
    folder = tmp_path_factory.mktemp("noted")
    write_npy(folder / "images", rows=200)
    options = "--model m2 --device cpu --data images --epochs 1 --hidden 8 --out run".split()
    result = train(*options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, options, json.loads((folder / "run" / "config.json").read_text())


def test_the_whole_command_is_noted(noted):
    _, options, config = noted
    assert config["command"] == [sys.executable, SCRIPT, *options]


def test_versions_and_device_are_noted(noted):
    _, _, config = noted
    expected = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    assert config["versions"] == expected
    assert config["device_name"] == cpu_name() and config["processes"] == 1 and config["threads"] >= 1


def test_the_data_are_noted_by_their_checksum(noted):
    folder, _, config = noted
    assert config["data_sha256"] == data.load(str(folder / "images")).checksum and len(config["data_sha256"]) == 64
    other = write_npy(folder / "other", rows=200)
    assert data.load(str(other)).checksum == config["data_sha256"]
    images = np.load(other / "X_images.npy")
    images[17, 3, 5] ^= 1
    np.save(other / "X_images.npy", images)
    assert data.load(str(other)).checksum != config["data_sha256"]
    labels = np.load(other / "y_images.npy")
    images[17, 3, 5] ^= 1
    labels[0], labels[1] = labels[1], labels[0]
    np.save(other / "X_images.npy", images)
    np.save(other / "y_images.npy", labels)
    assert data.load(str(other)).checksum != config["data_sha256"]


def test_the_seed_and_every_other_setting_are_noted(noted):
    folder, _, config = noted
    _, kept, names = checkpoint.load(folder / "run" / "checkpoint.npz")
    for name, value in vars(kept).items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)
    assert config["class_names"] == list(names) and config["data_name"] == "images"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one file and one commit, in the place of this one."""
    def git(*arguments):
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
        result = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=20)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    git("init")
    (tmp_path / "source.py").write_text("x = 1\n")
    git("add", "source.py")
    git("commit", "-m", "one")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path, git("rev-parse", "HEAD")


def test_the_revision(repository, monkeypatch):
    folder, head = repository
    assert provenance.revision() == head and len(head) == 40
    (folder / "notes.txt").write_text("not of the source")
    assert provenance.revision() == head
    (folder / "source.py").write_text("x = 2\n")
    assert provenance.revision() == head + "+"
    monkeypatch.setattr(provenance, "ROOT", folder / "elsewhere")
    assert provenance.revision() == ""


def test_without_git_there_is_no_revision(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.revision() == ""


def test_the_noted_revision_is_this_ones(noted):
    assert noted[2]["revision"] == provenance.revision()


def test_the_library_is_built():
    """Or the fused runs above would have failed for another reason."""
    host.check()


def test_blas_has_one_thread_as_long_as_a_learner_lives(monkeypatch):
    """And products by the kernels' threads have the same bits as by Python's."""
    set_to = []
    library = SimpleNamespace(get_num_threads=lambda: 3, set_num_threads=set_to.append)
    monkeypatch.setattr(blas, "_libraries", lambda: [library])
    monkeypatch.setattr(blas, "_one_thread", blas._OneThread())
    held = blas.Held()
    rng = np.random.default_rng(0)
    a, b = rng.random((500, 300), np.float32), rng.random((300, 200), np.float32)
    outs = [np.empty((500, 200), np.float32) for _ in range(2)]
    blas.multiply(a, b, outs[0])
    blas.multiply(a, b, outs[1], host.together)
    assert set_to == [1] and outs[0].tobytes() == outs[1].tobytes()
    del held
    assert set_to == [1, 3]
