"""What cannot be used ends in one sentence, and nothing is written: an overview by kind.

A row says what is done and the whole sentence; "…" in it stands for what the system, NumPy or Pillow have to say.
"""

import functools
import gzip
import hashlib
import io
import json
import os
import re
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import kernels
import train
from kernels import cuda
from kernels.gemm import Gemm
from mlp import InputError, checkpoint, configs, data, emnist
from mlp.__main__ import main
from mlp.cublaslt import CublasLt

from .simulated_gpu import Gpu
from .stub_cupy import StubCuPy
from .test_compare import write_run
from .training import tree

EVERY = range(10)  # the classes of these data sets


@dataclass
class Kind:
    """prepare(place) makes the files, and returns the arguments of a command or a function to be called."""

    category: str
    name: str
    prepare: object
    sentence: str
    error: object = 2  # the exit status of the command, or what the function raises


class Place:
    """An empty working directory, and what kinds of input are made of."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.patch = folder, monkeypatch

    def idx(self, images=None, labels=None, suffix="", folder="data"):
        """A folder with a pair of IDX files; `images` and `labels` are the bytes of one that is not sound."""
        (self.folder / folder).mkdir()
        for kind, given, sound in ((data.IMAGES, images, idx(np.zeros((20, 28, 28)))),
                                   (data.LABELS, labels, idx(np.arange(20) % 10))):  # fmt: skip
            content = sound if given is None else given
            packed = gzip.compress(content, 1) if suffix and given is None else content
            (self.folder / folder / f"toy{kind}{suffix}").write_bytes(packed)
        return ["train", "--data", folder]

    def npy(self, images=None, labels=None, folder="data"):
        """A folder with X_images.npy and y_images.npy; arrays, or the bytes of files."""
        (self.folder / folder).mkdir()
        sound = np.zeros((60, 28, 28), np.uint8), np.arange(60) % 10
        for name, given, usual in zip(("X_images.npy", "y_images.npy"), (images, labels), sound):
            content = given if isinstance(given, bytes) else npy(usual if given is None else given)
            (self.folder / folder / name).write_bytes(content)
        return ["train", "--data", folder]

    def picture(self, content, name="picture.png"):
        """A file to predict."""
        (self.folder / name).write_bytes(content)
        self.checkpoint()
        return ["mlp", "predict", "--checkpoint", "c.npz", name]

    def checkpoint(self, change=bytes):
        """Writes c.npz, of a model that knows nothing, with its bytes changed; returns a function that reads it."""
        path = Path("c.npz")
        arrays = {"weight0": np.ones((784, 10), np.float32), "bias0": np.zeros(10, np.float32)}
        checkpoint.save(path, arrays, configs.preset("m1", hidden=()), tuple("0123456789"), "mnist")
        path.write_bytes(change(path.read_bytes()))
        return lambda: checkpoint.read(path)

    def file(self, name, content, *arguments):
        (self.folder / name).write_bytes(content)
        return list(arguments)

    def archive(self, *members, content=None, md5=None):
        """A mirror of EMNIST's archive on this machine: a function that loads it. members: (name or ZipInfo, bytes)."""
        path = self.folder / "emnist.zip"
        path.write_bytes(zipped(members) if content is None else content)
        self.patch.setenv("EMNIST_URL", path.as_uri())
        self.patch.setenv("EMNIST_MD5", md5 or hashlib.md5(path.read_bytes()).hexdigest())
        return lambda: data.load("emnist", self.folder / "root")

    def run(self, file="config.json", **changes):
        """A finished run with fields changed."""
        folder = write_run(self.folder / "run")
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))
        return ["mlp", "compare", "run", "--out", "compared"]

    def stream(self, capturing):
        """CuPy with a stream that somebody captures, or does not."""
        cupy = StubCuPy()
        cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=id(self), is_capturing=lambda: capturing)
        cupy.zeros = np.zeros
        self.patch.setattr(cuda, "_cupy", lambda: cupy)
        return cupy


def idx(array, *shape):
    shape = shape or array.shape
    return np.array([0x800 | len(shape), *shape], ">u4").tobytes() + array.astype(np.uint8).tobytes()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(text: str) -> bytes:
    """A .npy file that is a header alone."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


def picture(pixels, form) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def with_pixel(value) -> bytes:
    """A picture in floats with a stroke and one other pixel."""
    pixels = np.full((60, 60), 0.9, np.float32)
    pixels[20:40, 28:32] = 0
    pixels[3, 3] = value
    return picture(pixels, "TIFF")


def png(width, height, *others) -> bytes:
    """A PNG of one bit per pixel with few of its pixels, and other chunks before them."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), *others,
              (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]  # fmt: skip
    packed = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bomb(head: bytes, megabytes: int) -> bytes:
    """A gzip file, `head` and so many megabytes of zeros, in members of a kilobyte each."""
    return gzip.compress(head) + megabytes * gzip.compress(bytes(1 << 20))


def zipped(members) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def misplaced(archive: bytes) -> bytes:
    """A zip file whose members lie before its first byte, by where its table of contents is said to be."""
    at = archive.index(b"PK\5\6") + 16
    return archive[:at] + struct.pack("<I", 2**30) + archive[at + 4 :]


def weights(name="weight0.npy", content=None):
    """A change of a checkpoint: its weights under another name, or other bytes for them."""

    def change(whole):
        with zipfile.ZipFile(io.BytesIO(whole)) as file:
            members = {member: file.read(member) for member in file.namelist()}
        sound = members.pop("weight0.npy")
        return zipped([*members.items(), (name, content or sound)])

    return change


def symlink(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info, target


def pipe(place):
    command = place.npy()
    (place.folder / "data" / "X_images.npy").unlink()
    os.mkfifo(place.folder / "data" / "X_images.npy")
    return command


def device_file(place):
    command = place.idx()
    (place.folder / "data" / f"toy{data.LABELS}").unlink()
    (place.folder / "data" / f"toy{data.LABELS}").symlink_to("/dev/zero")
    return command


def f(*shape):
    return np.full(shape, 0.5, np.float32)


def call(op, *args, **kwargs):
    """A call whose arguments are made before anything is watched."""
    return lambda place: functools.partial(getattr(kernels, op), *args, **kwargs)


class CuPyArray:
    """What the checks ask of an array of CuPy's."""

    def __init__(self, *shape, gpu=0, dtype=np.float32):
        self.shape, self.ndim, self.dtype, self.device = shape, len(shape), np.dtype(dtype), SimpleNamespace(id=gpu)
        self.flags = SimpleNamespace(c_contiguous=True)


CuPyArray.__module__, CuPyArray.__name__ = "cupy", "ndarray"


def with_cupy(op, *args, current=0):
    def prepare(place):
        place.stream(capturing=False).device = current
        return functools.partial(getattr(kernels, op), *args)

    return prepare


def with_torch(op, *make):
    """An op on what functions of torch return."""

    def prepare(place):
        torch = pytest.importorskip("torch")
        return functools.partial(getattr(kernels, op), *(one(torch) for one in make))

    return prepare


def tensor_on_gpu(torch, *shape):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 1)

    return torch.zeros(shape).as_subclass(OnGpu)


def fused_adam(*devices):
    def prepare(place):
        torch = pytest.importorskip("torch")
        from kernels.torch_ops import FusedAdam

        parameters = [torch.nn.Parameter(torch.zeros(3, device=device)) for device in devices]
        return lambda: FusedAdam(parameters)

    return prepare


def captured_product(place):
    gpu = Gpu(place.patch)
    library, x, out = CublasLt("fp32", 1 << 20), gpu.cupy.ones((4, 4), np.float32), gpu.cupy.ones((4, 4), np.float32)
    gpu.current[-1].begin_capture()
    return lambda: library.forward(x, x, out)


def train_with(*words):
    return lambda place: ["train", "--data", "nowhere", *words]


def mlp_with(*words):
    return lambda place: ["mlp", *words]


def config_file(text, name="c.json"):
    return lambda place: place.file(name, text, "train", "--data", "nowhere", "--config", name)


GIVE_PICTURE, AGAIN = "give a PNG, a JPEG or the like", "copy or download it again"
NOT_NPY = "data/X_images.npy is not a plain .npy array (…); save it again"
NO_CHECKPOINT = "c.npz is not a readable checkpoint (…); give …"
IMAGES, LABELS = f"data/toy{data.IMAGES}", f"data/toy{data.LABELS}"
X_SHAPES = "expected uint8 (N, 28, 28) or (N, 784); convert it"
Y_LIKE = "one for each image of X_images.npy; convert it"
UNREADABLE = "picture.png is not a readable picture (…); " + GIVE_PICTURE
NO_RUN = "run is damaged or not a run of this program"
TRAIN_IMAGES, TRAIN_LABELS = emnist.FILES[0]
HUGE = 2**32 - 1

KINDS = [
    # ---- flags
    Kind("flags", "an unknown option", train_with("--turbo"), "unrecognized arguments: --turbo (see --help)"),
    Kind("flags", "an option without its value", train_with("--lr"),
         "argument --lr: expected one argument (see --help)"),
    Kind("flags", "a word for a number", train_with("--epochs", "many"),
         "argument --epochs: invalid int value: 'many' (see --help)"),
    Kind("flags", "NaN for a number", train_with("--lr", "nan"),
         "--lr nan is not possible; give a finite number above 0"),
    Kind("flags", "a number too large for a float", train_with("--l2", "1e999"),
         "--l2 inf is not possible; give a finite number of at least 0"),
    Kind("flags", "a number out of its range", train_with("--dropout", "1"),
         "--dropout 1.0 is not possible; give a finite number of at least 0 and below 1"),
    Kind("flags", "a preset that is none", train_with("--model", "m9"),
         "--model m9 is unknown; choose one of … (see --list)"),
    Kind("flags", "an option that nothing would read", train_with("--gamma", "0.9"),
         "--gamma belongs to --schedule exponential; the schedule is constant"),
    Kind("flags", "two that exclude each other", train_with("--model", "m2", "--precision", "bf16"),
         "--precision belongs to --backend scratch; leave it out"),
    Kind("flags", "no amount of memory", train_with("--memory-limit", "4 apples"),
         "--memory-limit 4 apples is no amount of memory; give bytes such as 4GB or 512MiB"),
    Kind("flags", "a command that is none", mlp_with("dance"),
         "argument command: invalid choice: 'dance' (choose from …) (see --help)"),
    Kind("flags", "no command", mlp_with(), "the following arguments are required: command (see --help)"),
    Kind("flags", "no pictures", mlp_with("predict", "--checkpoint", "c.npz"),
         "the following arguments are required: picture (see --help)"),
    # ---- files
    Kind("files", "a folder that is not there", train_with(),
         "nowhere is not a readable folder (…), expected a folder of images or one of auto, emnist, glyphs and "
         "glyphs:N; correct the name"),
    Kind("files", "a name of two lines", mlp_with("explore", "--data", "no\nwhere"),
         "no\\nwhere is not a readable folder (…), expected a folder of images or one of auto, emnist, glyphs and "
         "glyphs:N; correct the name"),
    Kind("files", "a name that is no text", lambda place: place.checkpoint() and [
        "mlp", "predict", "--checkpoint", "c.npz", os.fsdecode(b"\xff.png")],
         "\\udcff.png does not exist; give the name of a picture"),
    Kind("files", "an empty folder", lambda place: place.folder.joinpath("data").mkdir() or ["train", "--data", "data"],
         f"data holds no images, expected *{data.IMAGES}[.gz] with *{data.LABELS}[.gz], or X_images.npy with "
         "y_images.npy; give another folder"),
    Kind("files", "a folder in the place of a file", lambda place: (
        place.npy(), os.remove("data/y_images.npy"), os.mkdir("data/y_images.npy"))[0],
         "data/y_images.npy is not a plain .npy array (…); save it again"),
    Kind("files", "half of a pair", lambda place: (place.idx(), os.remove(LABELS))[0],
         f"{IMAGES} is alone, expected toy{data.LABELS}[.gz] beside it; add that"),
    Kind("files", "a pipe, which one would wait for", pipe,
         "data/X_images.npy is a pipe or a device, expected a file; copy what it gives into one"),
    Kind("files", "a device that has no end", device_file,
         f"{LABELS} is a pipe or a device, expected a file; copy what it gives into one"),
    Kind("files", "results into a file", lambda place: (
        place.npy(), place.file("out", b"in the way", "mlp", "explore", "--data", "data", "--out", "out"))[1],
         "--out out cannot be written (…); give another folder"),
    Kind("files", "a configuration that is no JSON", config_file(b"lr = 3"),
         '--config c.json is not a configuration (…), expected JSON such as {"config": {"lr": 0.002}}; give the '
         "best.json of a search"),
    Kind("files", "a configuration nested too deep", config_file(b'{"config":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
         '--config c.json is not a configuration (…), expected JSON such as {"config": {"lr": 0.002}}; give the '
         "best.json of a search"),
    Kind("files", "a run without its results", lambda place: (place.run(), os.remove("run/metrics.json"))[0],
         "run is not a finished run: it has no metrics.json; let it end, or leave it out"),
    Kind("files", "a picture that is text", lambda place: place.picture(b"a letter"), UNREADABLE),
    Kind("files", "a picture cut short", lambda place: place.picture(png(300, 300)), UNREADABLE),
    Kind("files", "a picture of nothing", lambda place: place.picture(picture(np.full((60, 60), 255, np.uint8), "PNG")),
         "picture.png is blank, expected a character that stands out from its background; give another"),
    # ---- shapes
    Kind("shapes", "images of another size", lambda place: place.idx(idx(np.zeros((20, 32, 30)))),
         f"{IMAGES} holds 32x30 images, expected 28x28; convert them"),
    Kind("shapes", "npy images of another size", lambda place: place.npy(np.zeros((60, 28, 27), np.uint8)),
         "data/X_images.npy holds uint8 (60, 28, 27), " + X_SHAPES),
    Kind("shapes", "fewer labels than images", lambda place: place.npy(labels=np.arange(59) % 10),
         "data/y_images.npy holds int64 (59,), expected integers (60,), " + Y_LIKE),
    Kind("shapes", "a bias of other columns", call("bias_act", f(4, 6), f(5)),
         "bias must have shape (6,), got (5,)", ValueError),
    Kind("shapes", "a vector for a matrix", call("bias_act", f(6), f(6)),
         "z must have shape (any, any), got (6,)", ValueError),
    Kind("shapes", "images that are not square, mapped", call(
        "gather_batch", np.zeros((5, 8), np.uint8), np.zeros(5, np.int32), np.zeros(2, np.int32),
        augment=kernels.Augment(rotation=5.0)),
         "augment needs square images, got 8 pixels", ValueError),
    # ---- types
    Kind("types", "a list for an array", call("bias_act", [[0.5]], f(1)),
         "z must be a NumPy, CuPy or torch array, got list", TypeError),
    Kind("types", "a list among arrays", call("bias_act", f(4, 6), [0.5] * 6),
         "bias must be a numpy array like the others, got list", TypeError),
    Kind("types", "text for a number", call("sgd_step", f(6), f(6), lr="0.1"),
         "lr must be a number, got str", TypeError),
    Kind("types", "a fraction for a whole number", call("advance", np.zeros(1, np.int64), 0.5),
         "by must be a whole number, got float", TypeError),
    Kind("types", "an activation that is none", call("bias_act", f(4, 6), f(6), "ReLU"),
         "activation must be one of identity, relu, leaky_relu, silu, gelu, gelu_tanh, got 'ReLU'", ValueError),
    Kind("types", "a field of another type", config_file(b'{"config": {"lr": "fast"}}'),
         "--config c.json has 'fast' for lr, expected float; correct it"),
    Kind("types", "a run whose classes are a number", lambda place: place.run(class_names=10),
         f"{NO_RUN} (class_names is no list); leave it out"),
    Kind("types", "a run whose versions are a number", lambda place: place.run(versions=3),
         f"{NO_RUN} (versions is no dict); leave it out"),
    Kind("types", "a run with noise of no sigma", lambda place: place.run("metrics.json", noise={"x": 0.5}),
         f"{NO_RUN} (…); leave it out"),
    # ---- dtypes
    Kind("dtypes", "float images", lambda place: place.npy(np.zeros((60, 28, 28), np.float32)),
         "data/X_images.npy holds float32 (60, 28, 28), " + X_SHAPES),
    Kind("dtypes", "float labels", lambda place: place.npy(labels=np.arange(60) % 10.0),
         "data/y_images.npy holds float64 (60,), expected integers (60,), " + Y_LIKE),
    Kind("dtypes", "pickled objects", lambda place: place.npy(np.array([None] * 60, object)), NOT_NPY),
    Kind("dtypes", "records", lambda place: place.npy(np.zeros(60, [("pixel", "u1")])),
         "data/X_images.npy holds [('pixel', 'u1')] (60,), " + X_SHAPES),
    Kind("dtypes", "doubles", call("bias_act", np.zeros((4, 6)), f(6)),
         "z must have dtype float32, got float64 with shape (4, 6)", TypeError),
    Kind("dtypes", "the other byte order", call("bias_act", f(4, 6).astype(">f4"), f(6)),
         "z must have dtype float32, got >f4 with shape (4, 6)", TypeError),
    Kind("dtypes", "labels of 64 bits", call("softmax_cross_entropy", f(4, 6), np.zeros(4, np.int64)),
         "labels must have dtype int32, got int64 with shape (4,)", TypeError),
    Kind("dtypes", "bfloat16 tensors", with_torch("bias_act", lambda t: t.zeros(4, 6, dtype=t.bfloat16),
                                                  lambda t: t.zeros(6)),
         "z has no NumPy view: …", TypeError),
    Kind("dtypes", "a tensor that requires grad", with_torch("bias_act", lambda t: t.zeros(4, 6, requires_grad=True),
                                                             lambda t: t.zeros(6)),
         "z must not be a tensor that requires grad; pass z.detach()", TypeError),
    # ---- layout
    Kind("not contiguous", "a transposed view", call("bias_act", f(6, 4).T, f(6)),
         "z must be C-contiguous, got shape (4, 6) with strides (4, 16)", ValueError),
    Kind("not contiguous", "every second element", call("bias_act", f(4, 6), f(12)[::2]),
         "bias must be C-contiguous, got shape (6,) with strides (8,)", ValueError),
    Kind("not contiguous", "a tensor of every second", with_torch("bias_act", lambda t: t.zeros(4, 12)[:, ::2],
                                                                  lambda t: t.zeros(6)),
         "z must be C-contiguous, got shape (4, 6) with strides (48, 8)", ValueError),
    Kind("not contiguous", "a scalar that looks like a matrix", call(
        "bias_act", np.broadcast_to(np.float32(0), (1 << 40, 6)), f(6)),
         "z must be C-contiguous, got shape (1099511627776, 6) with strides (0, 0)", ValueError),
    Kind("not contiguous", "floats that begin between two", call(
        "bias_act", np.zeros(25, np.uint8)[1:].view(np.float32).reshape(1, 6), f(6)),
         "z must start at a multiple of 4 bytes; pass z.copy()", ValueError),
    Kind("not contiguous", "a read-only output", call("bias_act", f(1, 2), f(2), out=np.broadcast_to(f(1, 2), (1, 2))),
         "out must be writeable, got a read-only array of shape (1, 2)", ValueError),
    # ---- zero size
    Kind("zero size", "no images at all", lambda place: place.idx(idx(np.zeros((0, 28, 28))), idx(np.zeros(0))),
         f"{LABELS} and its images are empty, expected at least one; give another data set"),
    Kind("zero size", "a file of no bytes", lambda place: place.idx(b""),
         f"{IMAGES} ends inside its header of 16 bytes; {AGAIN}"),
    Kind("zero size", "an npy file of no bytes", lambda place: place.npy(b""), NOT_NPY),
    Kind("zero size", "images of no pixels", lambda place: place.idx(idx(np.zeros((20, 0, 28)))),
         f"{IMAGES} holds 0x28 images, expected 28x28; convert them"),
    Kind("zero size", "a checkpoint of no bytes", lambda place: place.checkpoint(lambda whole: b""), NO_CHECKPOINT,
         InputError),
    Kind("zero size", "logits of no class", call("softmax_cross_entropy", f(4, 0), np.zeros(4, np.int32)),
         "logits must have at least one class, got shape (4, 0)", ValueError),
    Kind("zero size", "images of no pixel", call("gather_batch", np.zeros((3, 0), np.uint8), np.zeros(3, np.int32),
                                                 np.zeros(2, np.int32)),
         "images must have at least one pixel, got shape (3, 0)", ValueError),
    Kind("zero size", "no hidden width", train_with("--hidden", ""),
         "--hidden  is not a list of widths; give whole numbers such as 400,240,120"),
    Kind("zero size", "a run of no classes", lambda place: place.run(class_names=[]),
         f"{NO_RUN} (class_names is empty); leave it out"),
    # ---- huge sizes
    Kind("huge sizes", "an IDX header that promises 10^28 bytes", lambda place: place.idx(idx(f(9), HUGE, HUGE, HUGE)),
         f"{IMAGES} holds 25 bytes, expected {16 + HUGE**3}; {AGAIN}"),
    Kind("huge sizes", "a gzipped one that promises terabytes", lambda place: place.idx(
        gzip.compress(idx(f(9), HUGE, 28, 28), mtime=0), suffix=".gz"),
         f"{IMAGES}.gz holds … gzipped bytes, expected the {16 + HUGE * 784} that its header promises, which are "
         f"more than those can expand to; {AGAIN}"),
    Kind("huge sizes", "a gzip file of a megabyte that expands to a gigabyte", lambda place: place.idx(
        labels=bomb(idx(np.arange(20) % 10), 1024), suffix=".gz"),
         f"{LABELS}.gz holds more than 28 bytes, expected 28; {AGAIN}"),
    Kind("huge sizes", "an npy header that promises terabytes", lambda place: place.npy(
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4294967295, 28, 28)}")), NOT_NPY),
    Kind("huge sizes", "an npy header whose size overflows", lambda place: place.npy(
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 28, 28)}")), NOT_NPY),
    Kind("huge sizes", "a PNG of 2.5 gigapixels", lambda place: place.picture(png(50_000, 50_000)), UNREADABLE),
    Kind("huge sizes", "a PNG whose text expands to 64 MB", lambda place: place.picture(
        png(60, 60, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26))))), UNREADABLE),
    Kind("huge sizes", "more glyphs than can be", train_with("--data", "glyphs:" + "9" * 12),
         "a glyph set of 999999999999 images cannot be made, expected 1000 to …; use for example glyphs:100000"),
    Kind("huge sizes", "a whole number beyond floats in a file", config_file(
        b'{"config": {"l2": 1' + b"0" * 400 + b"}}"),
         "--config c.json cannot be used: --l2 1…0 is not possible; give a finite number of at least 0"),
    Kind("huge sizes", "a whole number beyond floats", call("sgd_step", f(6), f(6), lr=10**400),
         "lr must be a finite number in [0, inf), got 1…0", ValueError),
    Kind("huge sizes", "a seed of 65 bits", call("shuffle", np.zeros(6, np.int32), seed=2**64),
         "seed must be a finite number in [0, 1.84467e+19), got 18446744073709551616", ValueError),
    # ---- corrupt archives
    Kind("corrupt archives", "a gzip file cut short", lambda place: place.idx(
        gzip.compress(idx(np.zeros((20, 28, 28))))[:-9], suffix=".gz"),
         f"{IMAGES}.gz is not a whole gzip file (…); {AGAIN}"),
    Kind("corrupt archives", "a gzip file with another checksum", lambda place: place.idx(
        gzip.compress(idx(np.zeros((20, 28, 28))))[:-8] + bytes(8), suffix=".gz"),
         f"{IMAGES}.gz is not a whole gzip file (…); {AGAIN}"),
    Kind("corrupt archives", "a plain file under the name of a gzipped one", lambda place: place.idx(
        idx(np.zeros((20, 28, 28))), suffix=".gz"),
         f"{IMAGES}.gz is not a whole gzip file (…); {AGAIN}"),
    Kind("corrupt archives", "images and labels swapped", lambda place: place.idx(
        idx(np.zeros(20)), idx(np.zeros((20, 28, 28)))),
         f"{IMAGES} begins with 0x00000801, expected 0x00000803 (IDX, 3 dimensions); replace it with the file that its "
         "name promises"),
    Kind("corrupt archives", "bytes behind the end", lambda place: place.idx(labels=idx(np.arange(20) % 10) + b"!"),
         f"{LABELS} holds 29 bytes, expected 28; {AGAIN}"),
    Kind("corrupt archives", "an npy header that is not closed", lambda place: place.npy(
        npy_header("{'descr': ('|u1'")), NOT_NPY),
    Kind("corrupt archives", "an npy header nested too deep", lambda place: place.npy(
        npy_header("-" * 9000 + "1")), NOT_NPY),
    Kind("corrupt archives", "an npz file under the name of an npy one", lambda place: place.npy(
        zipped([("arr_0.npy", npy(np.zeros((60, 28, 28), np.uint8)))])), NOT_NPY),
    Kind("corrupt archives", "a checkpoint cut in half", lambda place: (
        place.checkpoint(lambda whole: whole[:9000]), ["mlp", "predict", "--checkpoint", "c.npz", "x.png"])[1],
         NO_CHECKPOINT),
    Kind("corrupt archives", "a member that is no array", lambda place: place.checkpoint(weights(content=b"nonsense")),
         NO_CHECKPOINT, InputError),
    Kind("corrupt archives", "a member whose header promises terabytes", lambda place: place.checkpoint(weights(
        content=npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 47)}"))),
         NO_CHECKPOINT, InputError),
    Kind("corrupt archives", "EMNIST's archive is no archive", lambda place: place.archive(content=b"<html>log in"),
         "the EMNIST archive from … cannot be unpacked (…); set EMNIST_URL to another mirror", InputError),
    Kind("corrupt archives", "EMNIST's archive points before its beginning", lambda place: place.archive(
        content=misplaced(zipped([(f"gzip/{TRAIN_IMAGES}.gz", b"x")]))),
         "the EMNIST archive from … cannot be unpacked (…); set EMNIST_URL to another mirror", InputError),
    Kind("corrupt archives", "EMNIST's archive has a member whose name is no text", lambda place: place.archive(
        content=zipped([("gzip/é.gz", b"x")]).replace("é".encode(), b"\xff\xff")),
         "the EMNIST archive from … cannot be unpacked (…); set EMNIST_URL to another mirror", InputError),
    Kind("corrupt archives", "EMNIST's archive is another", lambda place: place.archive(md5="0" * 32),
         f"the EMNIST archive from … has MD5 … but {'0' * 32} was expected; try again, or set EMNIST_MD5 if your "
         "mirror holds another archive", InputError),
    # ---- path tricks
    Kind("path tricks", "a member above the folder", lambda place: place.archive(("../../x.gz", gzip.compress(b"x"))),
         f"the EMNIST archive from … does not hold {TRAIN_IMAGES}.gz; set EMNIST_URL to another mirror", InputError),
    Kind("path tricks", "a member at an absolute path", lambda place: place.archive(
        (f"{place.folder}/x.gz", gzip.compress(b"x"))),
         f"the EMNIST archive from … does not hold {TRAIN_IMAGES}.gz; set EMNIST_URL to another mirror", InputError),
    Kind("path tricks", "images above the folder", lambda place: place.archive(
        (f"../../{TRAIN_IMAGES}.gz", gzip.compress(b"x"))),
         f"the EMNIST archive from … does not hold {TRAIN_LABELS}.gz; set EMNIST_URL to another mirror", InputError),
    Kind("path tricks", "a symbolic link", lambda place: place.archive(
        symlink(f"gzip/{TRAIN_IMAGES}.gz", "../../../secret")),
         "the EMNIST archive from … cannot be unpacked (…); set EMNIST_URL to another mirror", InputError),
    Kind("path tricks", "an array of a checkpoint above the folder", lambda place: place.checkpoint(
        weights("../../weight0.npy")), NO_CHECKPOINT, InputError),
    Kind("path tricks", "an array of a checkpoint at an absolute path", lambda place: place.checkpoint(
        weights(f"{place.folder}/weight0.npy")), NO_CHECKPOINT, InputError),
    # ---- mixed devices
    Kind("mixed devices", "a NumPy array among tensors", with_torch(
        "bias_act", lambda t: t.zeros(4, 6), lambda t: f(6)),
         "bias must be a torch tensor like the others, got numpy.ndarray", TypeError),
    Kind("mixed devices", "a tensor among NumPy arrays", with_torch(
        "bias_act", lambda t: f(4, 6), lambda t: t.zeros(6)),
         "bias must be a numpy array like the others, got torch.Tensor", TypeError),
    Kind("mixed devices", "tensors without memory", with_torch(
        "bias_act", lambda t: t.zeros(4, 6, device="meta"), lambda t: t.zeros(6, device="meta")),
         "z must be a tensor on cpu or cuda, got one on meta", TypeError),
    Kind("mixed devices", "one tensor without memory", with_torch(
        "bias_act", lambda t: t.zeros(4, 6), lambda t: t.zeros(6, device="meta")),
         "bias must be on cpu like the others, got a tensor on meta", ValueError),
    Kind("mixed devices", "one tensor on a GPU", with_torch(
        "bias_act", lambda t: t.zeros(4, 6), lambda t: tensor_on_gpu(t, 6)),
         "bias must be on cpu like the others, got a tensor on cuda:1", ValueError),
    Kind("mixed devices", "a CuPy array among NumPy arrays", with_cupy("bias_act", f(4, 6), CuPyArray(6)),
         "bias must be a numpy array like the others, got cupy.ndarray", TypeError),
    Kind("mixed devices", "a NumPy array among CuPy arrays", with_cupy("bias_act", CuPyArray(4, 6), f(6)),
         "bias must be a cupy array like the others, got numpy.ndarray", TypeError),
    Kind("mixed devices", "CuPy arrays of two GPUs", with_cupy("bias_act", CuPyArray(4, 6), CuPyArray(6, gpu=1)),
         "bias must be on GPU 0 like the others, got GPU 1", ValueError),
    Kind("mixed devices", "CuPy arrays of a GPU that is not the current one", with_cupy(
        "bias_act", CuPyArray(4, 6), CuPyArray(6), current=1),
         "z must be on the current device, GPU 1, got GPU 0; use `with cupy.cuda.Device(0):`", ValueError),
    Kind("mixed devices", "parameters on two devices", fused_adam("cpu", "meta"),
         "params of a group must be on one device, got cpu and meta", ValueError),
    Kind("mixed devices", "NumPy arrays for the GPU's products", lambda place: functools.partial(
        Gemm(SimpleNamespace(is_array=lambda x: False, compute_capability=lambda: 90), "tf32").weight_gradient,
        f(4, 4), f(4, 4), f(4, 4)),
         "x must be an array of the device, got numpy.ndarray", TypeError),
    # ---- wrong streams
    Kind("wrong streams", "an op's first call while somebody captures its stream", lambda place: (
        place.stream(capturing=True), functools.partial(cuda.counters, 1))[1],
         "the current stream is being captured, and this op has not run on it before, expected its scratch memory to "
         "be there; run the op once on this stream before capturing", RuntimeError),
    Kind("wrong streams", "a product's first call while somebody captures its stream", captured_product,
         "cuBLASLt has no plan or no workspace for this product on this stream, and making them would allocate during "
         "the capture; run the step once on this stream, with the same arrays, before capturing it", RuntimeError),
    # ---- labels out of range
    Kind("labels out of range", "a negative label", lambda place: place.npy(labels=np.arange(60) % 10 - 1),
         "data/y_images.npy holds label -1, expected 0 to 999; correct the labels"),
    Kind("labels out of range", "a label of 33 bits", lambda place: place.npy(labels=np.r_[EVERY, np.full(50, 2**32)]),
         "data/y_images.npy holds label 4294967296, expected 0 to 999; correct the labels"),
    Kind("labels out of range", "a label of 64 bits", lambda place: place.npy(labels=np.full(60, 2**64 - 1, np.uint64)),
         "data/y_images.npy holds label 18446744073709551615, expected 0 to 999; correct the labels"),
    Kind("labels out of range", "a class without an image", lambda place: place.idx(labels=idx(np.full(20, 3))),
         f"{LABELS} has no label 0, expected every class from 0 to 3; renumber the labels or add images"),
    Kind("labels out of range", "a class of two images", lambda place: place.idx(),
         "class 0 has 2 image(s), expected at least 3 (for train, validation and test); add images or leave the "
         "class out"),
    Kind("labels out of range", "more classes than logits", call(
        "softmax_cross_entropy", f(4, 6), np.zeros(4, np.int32), classes=7),
         "classes must be from 1 to the number of columns of logits, 6, got 7", ValueError),
    # ---- NaN images
    Kind("NaN images", "NaN in npy images", lambda place: place.npy(np.full((60, 784), np.nan)),
         "data/X_images.npy holds float64 (60, 784), " + X_SHAPES),
    Kind("NaN images", "a picture with a NaN", lambda place: place.picture(with_pixel(np.nan), "picture.tiff"),
         f"picture.tiff is not a readable picture (it has NaN or infinite pixels); {GIVE_PICTURE}"),
    Kind("NaN images", "a picture with an infinite pixel", lambda place: place.picture(
        with_pixel(np.inf), "picture.tiff"),
         f"picture.tiff is not a readable picture (it has NaN or infinite pixels); {GIVE_PICTURE}"),
    Kind("NaN images", "a strength of noise that is NaN", call(
        "gather_batch", np.zeros((5, 9), np.uint8), np.zeros(5, np.int32), np.zeros(2, np.int32), noise_sigma=np.nan),
         "noise_sigma must be a finite number in [0, inf), got nan", ValueError),
]  # fmt: skip


def pattern(sentence: str) -> re.Pattern:
    return re.compile(".+".join(map(re.escape, sentence.split("…"))))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMNIST_URL", "http://127.0.0.1:1/")
    return Place(tmp_path, monkeypatch)


def files(folder) -> dict:
    return {name: about for name, about in tree(folder).items() if not (folder / name).is_dir()}


@pytest.mark.parametrize("kind", KINDS, ids=[f"{kind.category}: {kind.name}" for kind in KINDS])
def test_a_kind_of_bad_input_is_one_sentence_and_nothing_is_written(place, capsys, kind):
    action = kind.prepare(place)
    before = tree(place.folder) if kind.error == 2 else files(place.folder)
    if kind.error == 2:
        status = {"train": train.main, "mlp": main}[action[0]](action[1:])
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("error: ") and err.endswith("\n")
        sentence = err[len("error: ") : -1]
    else:
        with pytest.raises(kind.error) as caught:
            action()
        assert type(caught.value) is kind.error
        sentence = str(caught.value)
    assert pattern(kind.sentence).fullmatch(sentence), sentence
    assert not sentence.endswith(".")
    assert (tree(place.folder) if kind.error == 2 else files(place.folder)) == before


def test_every_category_has_its_kinds():
    assert len(KINDS) >= 45
    assert {kind.category for kind in KINDS} == {
        "flags", "files", "shapes", "types", "dtypes", "not contiguous", "zero size", "huge sizes", "corrupt archives",
        "path tricks", "mixed devices", "wrong streams", "labels out of range", "NaN images",
    }  # fmt: skip


def test_archives_with_names_above_the_folder_are_unpacked_inside_it(place):
    """The names say which member is which, and not where it goes."""
    members = []
    for images, labels in emnist.FILES:
        for name, array in ((images, np.zeros((47, 28, 28))), (labels, np.arange(47))):
            members.append((f"/../../{name}.gz", gzip.compress(idx(array), 1)))
    load, before = place.archive(*members), files(place.folder)
    outside = set(os.listdir(place.folder.parent))
    assert len(load().labels) == 94
    written = set(files(place.folder)) - set(before)
    assert written == {f"root/EMNIST/raw/{name}" for pair in emnist.FILES for name in pair}
    assert set(os.listdir(place.folder.parent)) == outside


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_expands_is_not_held_in_memory(place, suffix):
    labels = idx(np.arange(20) % 10)
    place.idx(labels=bomb(labels, 1024) if suffix else labels + bytes(1 << 26), suffix=suffix)
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            data.load("data")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_a_stream_may_be_captured_after_a_first_call(place):
    cupy = place.stream(capturing=False)
    first = cuda.counters(1)
    cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=id(place), is_capturing=lambda: True)
    assert cuda.counters(1) is first


def test_names_that_are_no_text_are_printed(place, capsys):
    """As on a terminal that has no such character; the picture is read."""
    name = os.fsdecode(b"\xff.png")
    try:
        command = place.picture(picture(np.pad(np.zeros((20, 4), np.uint8), 20, constant_values=255), "PNG"), name)
    except OSError:
        pytest.skip("this file system has no such names")
    assert main(command[1:]) == 0
    assert capsys.readouterr().out.startswith("\\udcff.png  0")


@pytest.mark.parametrize("label", [-1, 6, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_gives_a_nan_loss_and_gradient_of_its_row(label):
    """Not refused, because to look would wait for the GPU; nothing is read out of bounds."""
    loss, gradient = kernels.softmax_cross_entropy(f(2, 6), np.array([label, 1], np.int32))
    assert np.isnan(loss) and np.isnan(gradient[0]).all() and np.isfinite(gradient[1]).all()


def test_a_nan_logit_gives_a_nan_loss_and_gradient_of_its_row():
    logits = f(2, 6)
    logits[0, 3] = np.nan
    loss, gradient = kernels.softmax_cross_entropy(logits, np.zeros(2, np.int32))
    assert np.isnan(loss) and np.isnan(gradient[0]).all() and np.isfinite(gradient[1]).all()


@pytest.mark.parametrize("index", [-1, 5, 2**31 - 1])
def test_an_index_out_of_range_gives_a_nan_image_and_no_label(index):
    images, labels = np.zeros((5, 9), np.uint8), np.zeros(5, np.int32)
    x, y = kernels.gather_batch(images, labels, np.array([index, 0], np.int32))
    assert np.isnan(x[0]).all() and np.isfinite(x[1]).all() and y.tolist() == [-1, 0]
