"""A site's own data, on its machine: parquet files, a folder of pictures, or a function.

    parquet      PLACE/train-*.parquet and, where there are any, PLACE/test-*.parquet (or in PLACE/data)
    pictures     PLACE/train/<class>/* and PLACE/test/<class>/*, or PLACE/<class>/*
    a function   "module:function", which returns a `Dataset`, or images and labels: uint8 [N, H, W], [N, C, H, W] or
                 [N, H, W, C], and class names or whole numbers ([N]; the numbers of the federation's classes)

Classes are matched by name to those of the federation; a site may have some of them only. Pictures are converted to the
federation's size and number of channels, and normalised as everywhere: a site's own mean and deviation stay unknown.
Test images are a site's own, for what is measured there; without any, nothing is.

A node has a new process for each message. Pictures that were decoded are therefore kept beside its state, as they are
in memory, for as long as their files stay the same; what a function returns is not.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast
from unicodedata import normalize

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedkeel.data.columns import class_names, find_image, find_label
from fedkeel.data.dataset import Dataset
from fedkeel.data.pictures import Rows, Split, checked, decode
from fedkeel.data.sources import STAND_INS, Parquet, arrays, class_folders, folder_split
from fedkeel.errors import ConfigError, DataError, EmptyClient, StorageError, nearest
from fedkeel.files import write_json, write_tensors

AT_ONCE = 256 << 20
"""Bytes of pictures in one file of a copy: what is written or read has to be in memory once more."""

Part = tuple[Tensor, Tensor]
"""[N, C, H, W] uint8 and [N] int64."""


@dataclass(frozen=True)
class Target:
    """What the federation says of its images. shape: channels, height, width. mean, std: [C], pixels from 0 to 1."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(place: str, federation: Target, copies: Path | None = None) -> Dataset:
    """The data at `place` as this federation has them. copies: a folder for decoded pictures, None to keep none.

    Raises ConfigError for a place that is none of the three, DataError for data that do not fit, EmptyClient for none.
    """
    module, colon, function = place.partition(":")
    folder = Path(place).expanduser()
    if folder.is_dir():
        train, test = _read(folder, federation) if copies is None else _kept(folder, federation, copies)
    elif colon and module.replace(".", "").isidentifier() and function.isidentifier():
        train, test = _called(place, module, function, federation)
    else:
        raise ConfigError("data", place, "there is no such folder on this machine, and it is no module:function")
    if len(train[1]) == 0:
        raise EmptyClient(f"{place}: there are no samples to train on")
    return Dataset("site", federation.classes, train[0], train[1], test[0], test[1], federation.mean, federation.std)


def _read(folder: Path, federation: Target) -> tuple[Part, Part]:
    parquet = any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))
    return (_parquet if parquet else _pictures)(folder, federation)


def _kept(folder: Path, federation: Target, copies: Path) -> tuple[Part, Part]:
    """The same from a copy in memory's own form, if there is one of these very files; else there is one afterwards."""
    asked = [str(folder.resolve()), federation.classes, federation.shape, version("fedkeel"), version("pillow")]
    place = copies / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    files = _listing(folder, copies.parent)
    if (found := _copy(place, files, federation)) is not None:
        return found
    parts = _read(folder, federation)
    if _listing(folder, copies.parent) == files:  # nobody has changed them meanwhile
        _put(place, files, parts)
    return parts


def _listing(folder: Path, without: Path) -> str:
    """SHA-256 over all files in a folder: names, sizes, times of the last change. without: a folder that may lie in it
    and is written to all the time."""
    found, seen = hashlib.sha256(), {os.path.realpath(without)} - {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:  # links may go round in circles
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders.sort()
        for name in sorted(names):
            with suppress(OSError):  # one that is gone, or a link to nowhere, which decoding will name if it matters
                status = Path(here, name).stat()
                found.update(json.dumps([here, name, status.st_size, status.st_mtime_ns]).encode())
    return found.hexdigest()


def _copy(place: Path, files: str, federation: Target) -> tuple[Part, Part] | None:
    """What `_put` has written for these files; None where that is missing, of others, or damaged."""
    try:
        index = json.loads((place / "index.json").read_bytes())
        if index["files"] != files:
            return None
        parts = []
        for split in ("train", "test"):
            count, done = index[split]["samples"], 0
            x, y = torch.empty((count, *federation.shape), dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
            for name, digest in index[split]["parts"].items():
                content = (place / name).read_bytes()
                if hashlib.sha256(content).hexdigest() != digest:
                    return None
                some = safetensors.torch.load(content)
                rows = slice(done, done + len(some["y"]))
                x[rows], y[rows], done = some["x"], some["y"], rows.stop
            if done != count:
                return None
            parts.append((x, y))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError):
        return None
    return parts[0], parts[1]


def _put(place: Path, files: str, parts: tuple[Part, Part]) -> None:
    """Writes a copy, which counts once its index is there. A disk that is full is no reason to do without the data."""
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir(parents=True, mode=0o700)  # the pictures themselves may be hidden from other users
        index: dict[str, object] = {"files": files}
        for split, (x, y) in zip(("train", "test"), parts, strict=True):
            written, step = dict[str, str](), max(1, AT_ONCE // math.prod(x.shape[1:]))
            for start in range(0, len(y), step):
                name, rows = f"{split}-{start}.safetensors", slice(start, start + step)
                written[name] = write_tensors(place / name, {"x": x[rows], "y": y[rows]})
            index[split] = {"samples": len(y), "parts": written}
        write_json(place / "index.json", index)
    except (StorageError, OSError):
        shutil.rmtree(place, ignore_errors=True)


def _parquet(folder: Path, federation: Target) -> tuple[Part, Part]:
    source = Parquet(dir=str(folder))
    table = source.table("train")
    if table is None:
        raise DataError(f"{folder}: there is no train-*.parquet and no train.parquet")
    image, label = find_image(table, None), find_label(table, None)

    def part(split: str) -> Part | None:
        table = source.table(split)
        labels = None if table is None else table.labels(label)
        if table is None or labels is None:
            return None
        names = class_names(table, label, labels)
        checked(labels, len(names), table.where)
        return _decoded(table.split(labels, find_image(table, image)), names, federation)

    train = part("train")
    if train is None:
        raise DataError(f"{table.where}: no row has a label")
    return train, next((found for name in ("test", *STAND_INS) if (found := part(name))), _nothing(federation))


def _pictures(folder: Path, federation: Target) -> tuple[Part, Part]:
    root = folder / "train" if (folder / "train").is_dir() else folder

    def part(root: Path) -> Part:
        names = class_folders(root)
        return _decoded(folder_split(root, names), names, federation)

    tests = [folder / name for name in ("test", *STAND_INS)] if root != folder else []
    found = next((place for place in tests if place.is_dir()), None)
    return part(root), part(found) if found else _nothing(federation)


def _called(place: str, module: str, function: str, federation: Target) -> tuple[Part, Part]:
    try:
        call: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError("data", place, f"cannot be imported on this machine: {error}") from None
    found = call()
    if isinstance(found, Dataset):
        parts = [(found.train_x, found.train_y), (found.test_x, found.test_y)]
        numbers = [(x, _matched(y.numpy(), found.classes, place, federation)) for x, y in parts]
    elif isinstance(found, tuple) and len(found) == 2:
        numbers = [(_uint8(found[0], place), _numbered(found[1], place, federation))]
    else:
        raise DataError(f"{place} returned {type(found).__name__}: a Dataset, or images and labels")
    for x, y in numbers:
        if len(x) != len(y):
            raise DataError(f"{place}: {len(x)} images but {len(y)} labels")
        if len(y) and tuple(x.shape[1:]) != federation.shape:
            here, there = ("x".join(map(str, shape)) for shape in (tuple(x.shape[1:]), federation.shape))
            raise DataError(f"{place}: images are {here} (channels x height x width), the federation's are {there}")
    return numbers[0], numbers[1] if len(numbers) > 1 else _nothing(federation)


def _uint8(images: object, place: str) -> Tensor:
    """[N, C, H, W] of whatever `arrays` takes."""
    x = cast(Any, images)
    try:
        zeros = np.zeros(len(x), dtype=np.int64)
        return arrays(train=(x, zeros), test=(x[:1], zeros[:1])).train_x
    except (DataError, TypeError, IndexError, RuntimeError) as error:
        raise DataError(f"{place}: {error}") from None


def _numbered(labels: Sequence[object], place: str, federation: Target) -> Tensor:
    """[N] int64 from class names, or from the federation's own numbers."""
    values = np.asarray(labels)
    if values.dtype.kind in "iu" and values.ndim == 1:
        checked(values.astype(np.int64), len(federation.classes), place)
        return torch.from_numpy(values.astype(np.int64))
    if values.dtype.kind not in "UO" or values.ndim != 1 or not all(isinstance(name, str) for name in values.tolist()):
        raise DataError(f"{place}: labels must be class names or whole numbers, [N], not {values.dtype}")
    names = tuple(dict.fromkeys(values.tolist()))
    return _matched(np.array([names.index(name) for name in values.tolist()], dtype=np.int64), names, place, federation)


def _decoded(split: Split, names: tuple[str, ...], federation: Target) -> Part:
    y = _matched(split.labels, names, split.where, federation)
    if len(y) == 0:
        return _nothing(federation)
    channels, height, width = federation.shape
    rows = np.arange(len(y), dtype=np.int64)
    size = height if height == width else None
    return decode(split.pictures(rows), len(y), size, cast(Literal[1, 3], channels), federation.shape), y


def _matched(labels: Rows, names: Sequence[str], where: str, federation: Target) -> Tensor:
    """[N] int64: the federation's numbers for these. Raises DataError for a class it does not have."""
    known = [normalize("NFC", name) for name in federation.classes]  # folders of macOS have the other form of é
    names = [normalize("NFC", name) for name in names]
    for number in np.unique(labels).tolist():
        if names[number] not in known:
            near = nearest(names[number], known)
            hint = f" Did you mean {near!r}?" if near else ""
            raise DataError(
                f"{where}: class {names[number]!r} is none of the federation's, which are {', '.join(known)}.{hint}"
            )
    place = np.array([known.index(name) if name in known else -1 for name in names] or [-1], dtype=np.int64)
    return torch.from_numpy(place[labels])


def _nothing(federation: Target) -> Part:
    return torch.empty((0, *federation.shape), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
