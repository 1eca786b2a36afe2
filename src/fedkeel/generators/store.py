"""The pool: synthetic images made once, kept on disk, shared by all runs that ask the same generator.

An image is known by its class and its index at the source. Image j of lane k (a lane is a client) has index
i = `j * lanes + k`, `lanes` being the number of clients: lanes never share an image however many each takes, and a
source with few images (`folder`) is used from its start without gaps. The files do not depend on `lanes`.

A source with n images of a class that begins again after the last would give a lane the same n / gcd(n, lanes) of them
in each lap. So where n and lanes have a common divisor one index is left out at every common multiple of them: the
index is i + i // lcm(n, lanes), and a lane gets all n before any comes again.

On disk a pool is one folder: `pool.json` says whose images these are, each `part-<hash>.safetensors` holds one batch.
Parts are written to a temporary name and renamed, are never rewritten, and are named by the SHA-256 of their content,
so that several processes may fill one folder, a killed one loses at most its last batch, and damage is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from fedkeel.errors import PoolError, StorageError
from fedkeel.files import cache, write
from fedkeel.generators.base import Finite, Source

Key = tuple[int, int]
"""Class and index of an image."""
STALE = 24 * 3600.0
"""Seconds after which nobody is still writing a file."""
MEMORY = 512 * 2**20
"""Bytes of images kept in memory beside those on disk."""


def default_root() -> Path:
    """Where pools live unless the user says otherwise: in the user's cache (files.cache)."""
    return cache() / "pools"


def folder_of(root: Path, fingerprint: str) -> Path:
    """One folder for each generator, so that a folder of pools can be named for runs of many generators."""
    return root / fingerprint[:16]


@dataclass
class Spent:
    """What making images took: those that were there already took nothing. seconds: wall time; cpu_seconds: of all
    cores; peak: bytes, on CUDA of the tensors while images were made, elsewhere the most that the whole process has
    held since its start, None before any was made."""

    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int | None = None

    @contextmanager
    def counted(self, images: int, device: torch.device) -> Iterator[None]:
        """What is done inside makes so many images on this device."""
        from fedkeel.generators.cost import most

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.images += images
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most()
        self.peak = max(peak, self.peak or 0)

    def after(self, earlier: Mapping[str, Any]) -> Spent:
        """This and what `as_json` once gave, summed; of the peaks the higher."""
        return Spent(
            self.images + int(earlier.get("images") or 0),
            self.seconds + float(earlier.get("seconds") or 0),
            self.cpu_seconds + float(earlier.get("cpu_seconds") or 0),
            max((each for each in (self.peak, earlier.get("peak_memory_bytes")) if each is not None), default=None),
        )

    def as_json(self) -> dict[str, object]:
        """Plain values; None for what is not known."""
        return {
            "images": self.images,
            "seconds": round(self.seconds, 4),
            "cpu_seconds": round(self.cpu_seconds, 4),
            "seconds_per_image": round(self.seconds / self.images, 6) if self.images else None,
            "peak_memory_bytes": self.peak,
        }


@contextmanager
def heard(tell: Callable[[str], None], known: set[str]) -> Iterator[None]:
    """What is warned of inside is told instead, also when that fails; not again what is `known`, which grows."""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        for text in dict.fromkeys(str(each.message) for each in said):
            if text not in known:
                known.add(text)
                tell(text)


class Pool:
    """Images of one source. dir: where they are kept, None for memory only; batch: images asked for at once; warn: told
    of damage that is made good and of what the source warns of (a Python warning unless the caller has a better way);
    among: how many pools of one run share the memory; spent: where it is added up what making images takes, which
    happens on `device`.

    Raises PoolError when `dir` holds images of another source, StorageError when it cannot be written.
    """

    def __init__(
        self,
        source: Source,
        dir: Path | None,
        lanes: int = 1,
        batch: int = 256,
        warn: Callable[[str], None] = warnings.warn,
        among: int = 1,
        spent: Spent | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source, self.dir, self.lanes, self.batch, self.warn, self.among = source, dir, lanes, batch, warn, among
        self.spent, self.device = Spent() if spent is None else spent, device or torch.device("cpu")
        self.fingerprint = source.fingerprint()
        self._said: set[str] = set()
        self._where: dict[Key, tuple[str, int]] = {}  # in which part, which row
        self._memory: OrderedDict[str, Tensor] = OrderedDict()  # the part used last stands last
        if dir is not None:
            self._open(dir)

    def __len__(self) -> int:
        """Images there are."""
        return len(self._where)

    def take(self, label: int, lane: int, count: int) -> Tensor:
        """[count, C, H, W] uint8: the first `count` images of a class in a lane, made now if they are not there.

        Raises PoolError when the source cannot make them or makes garbage, StorageError when the disk is full.
        """
        keys = self._keys(label, lane, count)
        out = torch.empty((count, *self.source.shape), dtype=torch.uint8)
        rows = dict.fromkeys(keys)
        while rows:  # again only when a part turns out to be damaged
            self._make(list(rows), None)
            for row, key in enumerate(keys):
                if key in rows and self._read(key, out[row]):
                    del rows[key]
        return out

    def kept(self, label: int, lane: int, count: int) -> Tensor | None:
        """The images that `take` gives; None where some of them are not there: nothing is made."""
        keys = self._keys(label, lane, count)
        out = torch.empty((count, *self.source.shape), dtype=torch.uint8)
        return out if all(self._read(key, out[row]) for row, key in enumerate(keys)) else None

    def fill(self, needs: Iterable[tuple[int, int, int]], progress: Callable[[int, int], None] | None = None) -> None:
        """Makes what is missing for all (label, lane, count), in full batches across classes and lanes.

        progress: called with how many images are there and how many are wanted, after each batch. Raises as `take`.
        """
        self._make([key for need in needs for key in self._keys(*need)], progress)

    def numbers(self, label: int, lane: int, count: int) -> list[int]:
        """The indices at the source of the first `count` images of a class in a lane."""
        assert 0 <= lane < self.lanes, f"lane {lane} of {self.lanes}"
        numbers = range(lane, lane + count * self.lanes, self.lanes)
        there = self.source.available(label) if isinstance(self.source, Finite) else 1
        if math.gcd(there, self.lanes) == 1:
            return list(numbers)
        return [i + i // math.lcm(there, self.lanes) for i in numbers]

    def _keys(self, label: int, lane: int, count: int) -> list[Key]:
        return [(label, number) for number in self.numbers(label, lane, count)]

    def _make(self, keys: Sequence[Key], progress: Callable[[int, int], None] | None) -> None:
        wanted = dict.fromkeys(keys)
        missing = [key for key in wanted if key not in self._where]
        done = len(wanted) - len(missing)
        for start in range(0, len(missing), self.batch):
            part = missing[start : start + self.batch]
            with heard(self.warn, self._said), self.spent.counted(len(part), self.device):
                images = self.source.generate([label for label, _ in part], [index for _, index in part])
            self._check(part, images)
            self._add(part, images)
            done += len(part)
            if progress is not None:
                progress(done, len(wanted))

    def _check(self, keys: Sequence[Key], images: Tensor) -> None:
        """A generator that went wrong must not poison a federation."""
        wanted = (len(keys), *self.source.shape)
        if images.dtype != torch.uint8 or tuple(images.shape) != wanted:
            name = self.source.classes[keys[0][0]]
            raise PoolError(
                f"class {name!r}: the generator returned {images.dtype} {tuple(images.shape)}, wanted uint8 {wanted}"
            )
        if isinstance(self.source, Finite):  # real pictures: a blank one is data
            return
        flat = images.flatten(1)
        for row in (flat.amin(1) == flat.amax(1)).nonzero()[:1, 0].tolist():
            label, index = keys[row]
            raise PoolError(f"class {self.source.classes[label]!r}: image {index} has one colour all over")

    def _add(self, keys: Sequence[Key], images: Tensor) -> None:
        labels, indices = torch.tensor(keys).unbind(1)
        data = pack({"labels": labels.contiguous(), "indices": indices.contiguous(), "images": images.contiguous()})
        name = f"part-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        if self.dir is not None:
            _keep(self.dir / name, data)
        self._remember(name, images)
        self._where.update((key, (name, row)) for row, key in enumerate(keys))

    def _read(self, key: Key, out: Tensor) -> bool:
        """Copies one image; False when its part is damaged, which is then forgotten."""
        name, row = self._where.get(key, ("", 0))
        if name not in self._memory and (self.dir is None or not name or not self._fetch(self.dir / name)):
            return False
        self._memory.move_to_end(name)
        out.copy_(self._memory[name][row])
        return True

    def _fetch(self, path: Path) -> bool:
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # removed by hand, or by another process that found it damaged
            self._forget(path)
            return False
        if hashlib.sha256(data).hexdigest()[:32] != path.stem.removeprefix("part-"):
            self._discard(path)
            return False
        self._remember(path.name, unpack(data)["images"])
        return True

    def _remember(self, name: str, images: Tensor) -> None:
        self._memory[name] = images
        held = sum(part.numel() for part in self._memory.values())
        while self.dir is not None and held > MEMORY // self.among and len(self._memory) > 1:
            held -= self._memory.popitem(last=False)[1].numel()

    def _discard(self, path: Path) -> None:
        self.warn(f"{path} is damaged: its images are made again")
        with suppress(OSError):  # a pool that may only be read
            path.unlink()
        self._forget(path)

    def _forget(self, path: Path) -> None:
        self._where = {key: place for key, place in self._where.items() if place[0] != path.name}

    def _open(self, dir: Path) -> None:
        """Reads which images are there; their pixels are read and checked when they are taken."""
        try:
            dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{dir}: cannot make this folder for synthetic images: {error.strerror}") from error
        for path in dir.glob("*.partial"):  # of processes that were killed; another one may be writing its own
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
        self._compare(dir / "pool.json")
        for path in sorted(dir.glob("part-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    keys = torch.stack([file.get_tensor("labels"), file.get_tensor("indices")], dim=1).tolist()
            except FileNotFoundError:
                continue
            except (SafetensorError, RuntimeError):
                self._discard(path)
                continue
            self._where.update(((label, index), (path.name, row)) for row, (label, index) in enumerate(keys))

    def _compare(self, path: Path) -> None:
        mine = {"fingerprint": self.fingerprint, "shape": list(self.source.shape), "classes": list(self.source.classes)}
        if not path.exists():
            _keep(path, json.dumps(mine, indent=1).encode())
            return
        try:
            theirs = json.loads(path.read_text())
            other = theirs["fingerprint"]
        except (ValueError, TypeError, KeyError) as error:
            raise PoolError(f"{path} is damaged: delete the folder, its images will be made again") from error
        if theirs != mine:
            raise PoolError(
                f"{path.parent} holds images of another generator: fingerprint {other}, wanted {self.fingerprint}; "
                f"delete the folder or name another one"
            )


def _keep(path: Path, data: bytes) -> None:
    """All or nothing, also beside other processes. Raises StorageError when the disk is full or not writable."""
    try:
        write(path, data)
    except StorageError as error:
        raise StorageError(f"{error}; the images already there are kept") from error.__cause__
