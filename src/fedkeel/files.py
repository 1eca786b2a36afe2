"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from fedkeel.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")


def write(path: Path, content: bytes) -> str:
    """Replaces `path` by `content` in one step and returns its SHA-256.

    Raises StorageError when the disk is full or cannot be written; what was at `path` is then as before, or the new
    content when only its name could not be put on disk.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # containers that share a disk share process numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        settle(path.parent)
    except OSError as error:
        with suppress(OSError):  # it may never have been there
            partial.unlink()
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return hashlib.sha256(content).hexdigest()


def settle(folder: Path) -> None:
    """Puts on disk which files a folder has: until then a power cut may undo a renaming. Raises OSError."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(number)


@contextmanager
def locked(folder: Path, refusal: Exception) -> Iterator[None]:
    """Keeps other processes out of a folder; where one is in it `refusal` is raised. The lock is the system's and ends
    with the process, however it ends. Raises StorageError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        except OSError as error:  # not every network file system has locks
            raise StorageError(f"cannot lock {folder}: {error.strerror or error}") from error
        if not _is(folder / ".lock", file.fileno()):  # its holder removed the folder, and another may hold the new one
            raise refusal
        yield


def _is(path: Path, number: int) -> bool:
    """Whether an open file is what stands at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:
        return False


def sweep(folder: Path) -> None:
    """Removes what `write` left below a folder when its process was killed."""
    for left in folder.rglob("*.partial"):
        if _PARTIAL.search(left.name):
            left.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> str:
    """The same for a value as JSON."""
    return write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The same for tensors by name, as safetensors; they are copied to the CPU."""
    from safetensors.torch import save  # brings torch, which a report can do without

    content: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        content[name] = tensor.clone() if place in places else tensor  # the format refuses tensors that overlap
        places.add(place)
    return write(path, save(content))


def checksum(path: Path) -> str:
    """SHA-256 of a file, "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def cache() -> Path:
    """Where fetched data and pools of images are kept: $FEDKEEL_CACHE, else fedkeel in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FEDKEEL_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedkeel").expanduser()
