"""Files of images and labels, IDX and .npy, whatever is in them: an array, or InputError in little memory."""

from __future__ import annotations

import gzip
import math
import os
import warnings
import zlib
from pathlib import Path

import numpy as np

from mlp import InputError, one_line

SIDE = 28
PIXELS = SIDE * SIDE
IMAGES, LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"
MAGIC = {IMAGES: 0x803, LABELS: 0x801}  # IDX: 0x08 = unsigned byte, then the number of dimensions
DEFLATE = 1032  # bytes that a gzipped byte expands to at most (zlib's technical details)
BLOCK = 1 << 20


def read_idx(path: Path, kind: str) -> np.ndarray:
    """The uint8 array in an IDX file (big-endian magic, one uint32 per dimension, then the bytes)."""
    start = 4 * (1 + (MAGIC[kind] & 0xFF))
    try:
        _refuse_pipe(path)
        with path.open("rb") as stored:
            stored_size = os.fstat(stored.fileno()).st_size
            if path.suffix != ".gz":
                shape, size = _idx_header(path, kind, stored.read(start))
                if stored_size != size:
                    raise InputError(f"{path} holds {stored_size} bytes, expected {size}; copy or download it again")
                array = np.fromfile(stored, np.uint8, math.prod(shape))
            else:
                with gzip.GzipFile(fileobj=stored) as file:
                    shape, size = _idx_header(path, kind, file.read(start))
                    array = np.frombuffer(_inflate(path, file, start, size, stored_size), np.uint8)
        return array.reshape(shape)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}); copy or download it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _idx_header(path: Path, kind: str, header: bytes) -> tuple[list[int], int]:
    """The shape that the header promises, and the bytes of the whole file."""
    dimensions = MAGIC[kind] & 0xFF
    if len(header) < 4 * (1 + dimensions):
        raise InputError(f"{path} ends inside its header of {4 * (1 + dimensions)} bytes; copy or download it again")
    magic, *shape = np.frombuffer(header, ">u4").tolist()
    if magic != MAGIC[kind]:
        raise InputError(
            f"{path} begins with {magic:#010x}, expected {MAGIC[kind]:#010x} (IDX, {dimensions} dimensions); "
            "replace it with the file that its name promises"
        )
    return shape, len(header) + math.prod(shape)


def _inflate(path: Path, file: gzip.GzipFile, start: int, size: int, stored_size: int) -> bytearray:
    """The bytes from `start` to the end of a gzipped file of `size` bytes. No more than that is kept, however far it
    expands, and nothing is read where so few stored bytes cannot expand so far."""
    if size > DEFLATE * stored_size:
        raise InputError(
            f"{path} holds {stored_size} gzipped bytes, expected the {size} that its header promises, which are more "
            "than those can expand to; copy or download it again"
        )
    content = bytearray()
    while block := file.read(min(BLOCK, size + 1 - start - len(content))):  # past the end, where the checksum is
        content += block
    if start + len(content) != size:
        more = "more than " if start + len(content) > size else ""
        held = min(size, start + len(content))
        raise InputError(f"{path} holds {more}{held} bytes, expected {size}; copy or download it again")
    return content


def _refuse_pipe(path: Path) -> None:
    """InputError for a pipe, which one would wait for, and for a device, which may have no end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a pipe or a device, expected a file; copy what it gives into one")


def read_npy(image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 784) and integer labels (N,) from two .npy files."""
    arrays = []
    for path in (image_path, label_path):
        try:
            _refuse_pipe(path)
            # Mapped, so that a header which promises more than there is takes no memory. What is wrong with it raises.
            with warnings.catch_warnings(action="ignore"):
                arrays.append(np.lib.format.open_memmap(path, mode="r"))
        except FileNotFoundError:
            raise InputError(f"{path} is missing, expected beside its partner; add that file") from None
        except InputError:
            raise
        except Exception as error:  # damaged headers raise nearly anything in NumPy's parser
            reason = one_line(error)
            raise InputError(f"{path} is not a plain .npy array ({reason}); save it again") from None
    images, labels = arrays
    if images.dtype != np.uint8 or images.shape[1:] not in ((SIDE, SIDE), (PIXELS,)):
        raise InputError(
            f"{image_path} holds {images.dtype} {images.shape}, expected uint8 (N, 28, 28) or (N, 784); "
            "convert it"
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(
            f"{label_path} holds {labels.dtype} {labels.shape}, expected integers ({len(images)},), one for "
            f"each image of {image_path.name}; convert it"
        )
    return np.array(images), np.array(labels)
