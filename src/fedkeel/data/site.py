"""A site's own data, on its machine: parquet files, a folder of pictures, or a function.

    parquet      PLACE/train-*.parquet and, where there are any, PLACE/test-*.parquet (or in PLACE/data)
    pictures     PLACE/train/<class>/* and PLACE/test/<class>/*, or PLACE/<class>/*
    a function   "module:function", which returns a `Dataset`, or images and labels: uint8 [N, H, W], [N, C, H, W] or
                 [N, H, W, C], and class names or whole numbers ([N]; the numbers of the federation's classes)

Classes are matched by name to those of the federation; a site may have some of them only. Pictures are converted to the
federation's size and number of channels, and normalised as everywhere: a site's own mean and deviation stay unknown.
Test images are a site's own, for what is measured there; without any, nothing is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.columns import class_names, find_image, find_label
from fedkeel.data.dataset import Dataset
from fedkeel.data.pictures import Rows, Split, checked, decode
from fedkeel.data.sources import STAND_INS, Parquet, arrays, class_folders, folder_split
from fedkeel.errors import ConfigError, DataError, EmptyClient, nearest

Part = tuple[Tensor, Tensor]
"""[N, C, H, W] uint8 and [N] int64."""


@dataclass(frozen=True)
class Target:
    """What the federation says of its images. shape: channels, height, width. mean, std: [C], pixels from 0 to 1."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(place: str, federation: Target) -> Dataset:
    """The data at `place` as this federation has them.

    Raises ConfigError for a place that is none of the three, DataError for data that do not fit, EmptyClient for none.
    """
    module, colon, function = place.partition(":")
    folder = Path(place).expanduser()
    if folder.is_dir():
        parquet = any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))
        train, test = (_parquet if parquet else _pictures)(folder, federation)
    elif colon and module.replace(".", "").isidentifier() and function.isidentifier():
        train, test = _called(place, module, function, federation)
    else:
        raise ConfigError("data", place, "there is no such folder on this machine, and it is no module:function")
    if len(train[1]) == 0:
        raise EmptyClient(f"{place}: there are no samples to train on")
    return Dataset("site", federation.classes, train[0], train[1], test[0], test[1], federation.mean, federation.std)


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
    known = federation.classes
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
