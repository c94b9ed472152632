"""Fetching EMNIST ByMerge: one archive of all EMNIST splits, of which the four ByMerge files are kept.

The files end up where torchvision.datasets.EMNIST puts them, so either can use what the other fetched.
torchvision itself is not used: it cannot be imported beside some builds of torch.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.client
import os
import shutil
import struct
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mlp import InputError

# As in torchvision.datasets.EMNIST.
URL = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
MD5 = "58c8d27c78d21e728a6bc7b3cc06412e"

# (images, labels) of both parts, as named by the archive and by torchvision.
FILES = tuple(
    (f"emnist-bymerge-{part}-images-idx3-ubyte", f"emnist-bymerge-{part}-labels-idx1-ubyte")
    for part in ("train", "test")
)
TIMEOUT = 15.0  # seconds without an answer or without a byte
BLOCK = 1 << 20
ADVICE = "check the network, set EMNIST_URL to a mirror, or use the glyphs instead"


def raw_folder(root: Path) -> Path:
    """Where the ByMerge files belong under the data root."""
    return Path(root) / "EMNIST" / "raw"


def find(root: Path) -> list[tuple[Path, Path]] | None:
    """The (images, labels) paths of the two parts, plain before gzipped; None if any is missing."""
    folder = raw_folder(root)

    def present(name: str) -> Path | None:
        return next((p for p in (folder / name, folder / f"{name}.gz") if os.path.isfile(p)), None)

    pairs = [(present(images), present(labels)) for images, labels in FILES]
    return pairs if all(all(pair) for pair in pairs) else None


def ensure(root: Path) -> list[tuple[Path, Path]]:
    """The paths that find gives, after a download if need be; InputError as download."""
    return find(root) or download(root)


def download(root: Path) -> list[tuple[Path, Path]]:
    """Fetch the archive, leave the four ByMerge files, uncompressed, in raw_folder(root) and return them.

    The environment variable EMNIST_URL replaces the address (a mirror), and EMNIST_MD5 the expected MD5 of a
    mirror's archive.  Everything is written under a temporary name and renamed when it is complete, so an
    interrupted download leaves nothing that looks like data.  Raises InputError when the address does not
    answer, the archive is not the expected one, or the folder cannot be written.
    """
    mirror = os.environ.get("EMNIST_URL")
    url = mirror or URL
    md5 = (os.environ.get("EMNIST_MD5") if mirror else None) or MD5
    _refuse_open(url)
    folder = raw_folder(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            archive = Path(scratch) / "emnist.zip"
            _fetch(url, archive, md5.strip().lower())
            _extract(archive, Path(scratch), folder, url)
        return [(folder / images, folder / labels) for images, labels in FILES]
    except OSError as error:
        raise InputError(
            f"EMNIST cannot be stored in {folder} ({error.strerror or error}), expected a folder that can be "
            "written and has 2 GB free; make room or choose another"
        ) from None


def _refuse_open(url: str) -> None:
    """InputError for an address whose answer others on the way could replace. A file and this machine have no way."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("http", "ftp") and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(
            f"EMNIST_URL {url} is not https, expected an address that nobody can alter on the way; set it to one that "
            "begins with https:// or file://"
        )


def _fetch(url: str, archive: Path, md5: str) -> None:
    """Copy url to the file archive; InputError unless its MD5 is md5 (hex)."""
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("wb") as file:
        for block in _blocks(url):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != md5:
        raise InputError(
            f"the EMNIST archive from {url} has MD5 {digest.hexdigest()} but {md5} was expected; "
            "try again, or set EMNIST_MD5 if your mirror holds another archive"
        )


def _blocks(url: str) -> Iterator[bytes]:
    """The body of url in blocks, with a progress bar; every network failure as an InputError."""
    from tqdm import tqdm

    with _network(f"EMNIST cannot be fetched from {url}"):
        reply = urllib.request.urlopen(url, timeout=TIMEOUT)
    size = getattr(reply, "length", None)
    with reply, tqdm(total=size, unit="B", unit_scale=True, desc="EMNIST", disable=None) as bar:
        received = 0
        while True:
            with _network(f"the download from {url} broke off"):
                block = reply.read(BLOCK)
            if not block:
                break
            received += len(block)
            bar.update(len(block))
            yield block
    # A server that hangs up early looks like the end of the file to a block-wise read.
    if size is not None and received < size:
        raise InputError(f"the download from {url} broke off after {received} of {size} bytes; {ADVICE}")


@contextlib.contextmanager
def _network(what: str) -> Iterator[None]:
    """Turn what can go wrong in urllib into an InputError that begins with `what`."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address at all
        reason = " ".join(str(error).strip("<>").split()) or type(error).__name__
        raise InputError(f"{what} ({reason}); {ADVICE}") from None


def _extract(archive: Path, scratch: Path, folder: Path, url: str) -> None:
    """Unpack the four ByMerge members of archive into folder."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = {Path(name).name: name for name in file.namelist()}
            names = [name for pair in FILES for name in pair]
            for name in names:
                with file.open(members[name + ".gz"]) as packed, gzip.open(packed) as plain:
                    with (scratch / name).open("wb") as target:
                        shutil.copyfileobj(plain, target, BLOCK)
    except KeyError as error:
        raise InputError(
            f"the EMNIST archive from {url} does not hold {error.args[0]}; set EMNIST_URL to another mirror"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error, OSError) as error:
        # Of the operating system's errors, those of a damaged archive: it names places that no file has.
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno != errno.EINVAL:
            raise
        raise InputError(
            f"the EMNIST archive from {url} cannot be unpacked ({error}); set EMNIST_URL to another mirror"
        ) from None
    for name in names:
        os.replace(scratch / name, folder / name)
