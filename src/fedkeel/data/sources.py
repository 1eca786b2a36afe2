"""Where data come from: parquet files, folders of pictures, the Hugging Face hub, arrays.

Only `hub` may touch the network, and only for what is not in its cache yet.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fedkeel import registry
from fedkeel.data.columns import (
    Block,
    Table,
    described,
    embedded_features,
    find_image,
    find_label,
    labelled,
)
from fedkeel.data.dataset import Dataset
from fedkeel.data.pictures import Raw, Rows, Source, Split, assembled, checked, twice
from fedkeel.errors import ConfigError, DataError
from fedkeel.options import build, convert, option
from fedkeel.registry import register

if TYPE_CHECKING:
    import pyarrow as pa

PATIENCE = 10.0
"""Seconds until the hub counts as out of reach."""
STAND_INS = ("validation", "val", "valid")  # for a test split that is missing or has no labels
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm"}

Array = np.ndarray[Any, np.dtype[Any]] | Tensor


@dataclass(frozen=True, kw_only=True)
class Tabular(Source):
    """A source whose splits are tables."""

    image: str | None = option(None, "column of the pictures; absent: the only one of that type")
    label: str | None = option(None, "column of the labels; absent: the only ClassLabel, else the only integers")
    train: str = option("train", "name of the train split")
    test: str = option("test", "name of the test split; validation, val or valid where there is none with labels")

    @abstractmethod
    def table(self, split: str) -> Table | None:
        """A split, or None when there is none of that name. Raises DataError."""

    @abstractmethod
    def title(self) -> str:
        """The name of the data set."""

    def read(self) -> Raw:
        table = self.table(self.train)
        if table is None:
            raise DataError(f"{self.title()}: there is no split {self.train!r}")
        image, label = find_image(table, self.image), find_label(table, self.label)
        train, classes = labelled(table, image, label)
        return Raw(self.title(), classes, train, self._test(image, label, classes))

    def _test(self, image: str, label: str, classes: tuple[str, ...]) -> Split:
        tried = (self.test, *(STAND_INS if self.test == "test" else ()))
        for name in tried:
            table = self.table(name)
            labels = None if table is None else table.labels(label)
            if table is None or labels is None:
                continue
            names = table.features.get(label, {}).get("names")
            if names and tuple(names) != classes:
                raise DataError(f"{table.where}: its class names are not those of the split {self.train!r}")
            return table.split(labels, find_image(table, image))
        raise DataError(f"{self.title()}: no split with labels to test on; tried {', '.join(tried)}")


@register("datasets", "parquet")
@dataclass(frozen=True, kw_only=True)
class Parquet(Tabular):
    """A folder of parquet files in the layout of the Hugging Face hub: `train-*.parquet`, `test-*.parquet`."""

    dir: str = option("", "folder of the parquet files, or the folder above a folder `data` with them")

    def __post_init__(self) -> None:
        _required("dir", self.dir)

    def title(self) -> str:
        return self.place().resolve().name

    def place(self) -> Path:
        """The folder to read. Raises DataError when there is none."""
        return folder(self.dir)

    def table(self, split: str) -> Table | None:
        files = split_files(self.place(), split)
        return _parquet_table(split, files) if files else None


@register("datasets", "imagefolder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """Folders of pictures: `train/<class>/*.png` and `test/<class>/*`; classes in alphabetical order."""

    dir: str = option("", "folder with the folders train and test")
    train: str = option("train", "folder of the train split")
    test: str = option("test", "folder of the test split; validation, val or valid where there is none")

    def __post_init__(self) -> None:
        _required("dir", self.dir)

    def read(self) -> Raw:
        root = folder(self.dir)
        classes = class_folders(folder(root / self.train))
        if not classes:
            raise DataError(f"{root / self.train}: there is no folder per class")
        tried = (self.test, *(STAND_INS if self.test == "test" else ()))
        found = next((root / name for name in tried if (root / name).is_dir()), None)
        if found is None:
            raise DataError(f"{root}: no folder to test on; tried {', '.join(tried)}")
        train = folder_split(root / self.train, classes)
        for name, count in zip(classes, np.bincount(train.labels, minlength=len(classes)), strict=True):
            if count == 0:
                place = root / self.train / name
                raise DataError(f"{place}: no pictures in the folder of this class; add some or remove the folder")
        return Raw(root.resolve().name, classes, train, folder_split(found, classes))


@register("datasets", "hub")
@dataclass(frozen=True, kw_only=True)
class Hub(Tabular):
    """A data set of pictures on the Hugging Face hub, from the local cache when it is there."""

    id: str = option("", "the data set's id, owner/name")
    config: str | None = option(None, "the data set's configuration, where it has several")
    revision: str | None = option(None, "branch, tag or commit; absent: what is cached, else the newest")

    def __post_init__(self) -> None:
        _required("id", self.id)

    def title(self) -> str:
        return self.id

    def table(self, split: str) -> Table | None:
        if split not in self._splits:
            return None
        data = self._splits[split].with_format("arrow")
        step = 1000
        blocks = tuple(
            # the columns are read block by block, so that one block of pictures is in memory at a time
            Block(f"{self.id}, split {split}", start, min(step, len(data) - start), _rows_of(data, start, step))
            for start in range(0, len(data), step)
        )
        return Table(f"{self.id}, split {split}", data.data.schema, described(data.features.to_dict()), blocks, Path())

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        import datasets
        import huggingface_hub

        def load() -> Mapping[str, Any]:
            return cast(Mapping[str, Any], datasets.load_dataset(self.id, self.config, revision=self.revision))

        offline = datasets.config.HF_HUB_OFFLINE
        with _muted("datasets", "huggingface_hub"):
            if self.revision is None:  # the cache does not say which revision it holds
                datasets.config.HF_HUB_OFFLINE = True
                try:
                    return load()
                except Exception:  # not cached; whatever is wrong besides shows again below
                    pass
                finally:
                    datasets.config.HF_HUB_OFFLINE = offline
            try:
                if not offline and not Path(self.id).exists():
                    # asked once: `datasets` asks again and again, which takes most of a minute without network
                    huggingface_hub.HfApi().dataset_info(self.id, revision=self.revision, timeout=PATIENCE)
                return load()
            except Exception as error:  # the hub, the network and the file formats raise dozens of kinds
                said = str(error).strip().splitlines() or [type(error).__name__]
                if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
                    said = ["the hub has none of this name, or it is private"]
                raise DataError(
                    f"hub data set {self.id!r} cannot be loaded ({said[0]}); fetch it on a machine with network with "
                    f"`hf download --repo-type dataset {self.id} --local-dir DIR` and use data.name=parquet "
                    f"data.dir=DIR"
                ) from error


@contextmanager
def _muted(*names: str) -> Iterator[None]:
    """Within this context the loggers of these libraries speak of errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def arrays(
    *,
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    classes: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """A data set from NumPy or torch arrays, given as (images, labels) for each split.

    Images: uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] with C = 1 or 3. Channels come first wherever the second
    dimension is 1 or 3, and last otherwise. Labels: [N] integers. classes: names; None = "0", "1", ... up to the
    largest label. Raises DataError for anything else.
    """
    train_x, train_y = _images(train[0], "train"), _labels(train[1], "train")
    test_x, test_y = _images(test[0], "test"), _labels(test[1], "test")
    names = tuple(classes) if classes is not None else tuple(str(i) for i in range(int(train_y.max(initial=0)) + 1))
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise DataError(f"classes: {wrong[0]!r} is no word; names are wanted, such as {str(wrong[0])!r}")
    if (doubled := twice(names)) is not None:
        raise DataError(f"classes: {doubled!r} is named twice")
    for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y):
            raise DataError(f"{split}: {len(x)} images but {len(y)} labels")
        checked(y, len(names), split)
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(
            f"test: images are {_size(test_x)} (channels x height x width), those of train are {_size(train_x)}"
        )
    return assembled(name, names, train_x, torch.from_numpy(train_y), test_x, torch.from_numpy(test_y))


def resolve(table: Mapping[str, object]) -> object:
    """The options named by the `[data]` table: a registered name, else, with a "/" in it, an id on the hub.

    Raises UnknownName, or ConfigError naming the dotted key.
    """
    if "name" not in table:
        raise ConfigError("data.name", None, "this key is required")
    name = str(convert(str, table["name"], "data.name"))
    rest = {key: value for key, value in table.items() if key != "name"}
    if "/" in name and name not in registry.names("datasets"):
        return build(Hub, {"id": name, **rest}, "data")
    return build(registry.get("datasets", name), rest, "data")


def folder(path: str | Path) -> Path:
    """The folder, `~` expanded. Raises DataError when there is none."""
    place = Path(path).expanduser()
    if not place.is_dir():
        raise DataError(f"{place}: there is no such folder")
    return place


def _required(key: str, value: str) -> None:
    if not value:
        raise ConfigError(key, value, "this key is required")


def _visible_folder(place: Path) -> bool:
    return place.is_dir() and not place.name.startswith(".")


def split_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, in a folder or in its folder `data`, by name; none where there are none."""
    for place in (root, root / "data"):
        if files := sorted([*place.glob(f"{split}-*.parquet"), *place.glob(f"{split}.parquet")]):
            return files
    return []


def pictures_in(place: Path) -> list[Path]:
    """The pictures of a folder, by name; hidden files are none."""
    return sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders in a folder of pictures, sorted."""
    return tuple(sorted(place.name for place in root.iterdir() if _visible_folder(place)))


def folder_split(root: Path, classes: tuple[str, ...]) -> Split:
    """A folder of pictures, in folders named after their classes. Raises DataError for a folder of none of these."""
    files: list[Path] = []
    labels: list[int] = []
    for place in sorted(filter(_visible_folder, root.iterdir())):
        if place.name not in classes:
            raise DataError(f"{place}: the train split has no class {place.name!r}")
        found = pictures_in(place)
        files += found
        labels += [classes.index(place.name)] * len(found)

    def pictures(rows: Rows) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            try:
                yield str(files[row]), files[row].read_bytes()
            except OSError as error:
                raise DataError(f"{files[row]}: cannot be read ({error.strerror})") from error

    return Split(str(root), np.array(labels, dtype=np.int64), pictures)


def _parquet_table(split: str, files: list[Path]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    blocks: list[Block] = []
    schema: pa.Schema | None = None
    for file in files:
        try:
            reader = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file ({error})") from error
        if schema is not None and not schema.equals(reader.schema_arrow):
            raise DataError(f"{file}: its columns are not those of {files[0].name}")
        schema, first = reader.schema_arrow, 0
        for group in range(reader.num_row_groups):
            rows = reader.metadata.row_group(group).num_rows
            blocks.append(Block(str(file), first, rows, _group_of(file, reader, group)))
            first += rows
    assert schema is not None
    features = embedded_features(schema, files[0])
    return Table(f"{files[0].parent}, split {split}", schema, features, tuple(blocks), files[0].parent)


def _group_of(file: Path, reader: Any, group: int) -> Any:
    import pyarrow as pa

    def column(name: str) -> pa.ChunkedArray:
        try:
            return reader.read_row_group(group, columns=[name]).column(name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: damaged in row group {group} ({error})") from error

    return column


def _rows_of(data: Any, start: int, step: int) -> Any:
    return lambda name: data.select_columns([name])[start : start + step].column(name)


def _tensor(values: Array, split: str, what: str) -> Tensor:
    """The numbers of an array, in its memory where it can be. Raises DataError for an array of anything else."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.asarray(values)
        own = min(array.strides, default=0) < 0 or not array.flags.writeable  # a flipped view; bytes of a file
        return torch.as_tensor(array.copy() if own else array)
    except (TypeError, ValueError) as error:  # words, objects, rows of unequal length
        raise DataError(f"{split}: {what} must be an array of numbers ({error})") from None


def _images(values: Array, split: str) -> Tensor:
    x = _tensor(values, split, "images")
    if x.dtype != torch.uint8:
        raise DataError(f"{split}: images must be uint8 in 0..255, not {str(x.dtype).removeprefix('torch.')}")
    if x.dim() == 3:
        x = x[:, None]
    if x.dim() != 4 or 0 in x.shape[1:] or not {x.shape[1], x.shape[3]} & {1, 3}:
        raise DataError(
            f"{split}: images of shape {tuple(x.shape)}; [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels"
        )
    return (x if x.shape[1] in (1, 3) else x.permute(0, 3, 1, 2)).contiguous()


def _labels(values: Array, split: str) -> Rows:
    y = _tensor(values, split, "labels")
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DataError(f"{split}: labels must be whole numbers of shape [N], not {y.dtype} of shape {tuple(y.shape)}")
    return y.numpy().astype(np.int64)


def _size(x: Tensor) -> str:
    return "x".join(str(n) for n in x.shape[1:])
