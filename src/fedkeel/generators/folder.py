"""Images that are already there: real public ones as the honest control, or the output of any other program.

Two layouts: `<dir>/<class name>/` with pictures, or `train-*.parquet` or `train.parquet` as on the Hugging Face hub, in
`<dir>` or its folder `data`. Image number i of a class is its i-th file in the order of names, or its i-th row. Files
are decoded, converted and resized as those of a data set with data.channels and data.size are: one file has the same
pixels here and there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.columns import find_image, find_label, labelled
from fedkeel.data.pictures import checked, pixels
from fedkeel.data.sources import Parquet, pictures_in, split_files
from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.generators.names import digest, knows, match, plain_name
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.registry import register

DECODED = 2
"""How files become pixels: 2 is the data room's way. Pools of another way are made anew."""


class FolderSource:
    """The images of a folder as a `Source`. images: per class, the encoded bytes or the path of each image."""

    def __init__(
        self,
        images: list[list[bytes | Path]],
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        resize: bool,
        repeat: bool = False,
    ) -> None:
        self.images, self.classes, self.shape, self.resize, self.repeat = images, classes, shape, resize, repeat

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8. Raises PoolError when a class has too few images, DataError for a damaged one."""
        out = torch.empty((len(labels), *self.shape), dtype=torch.uint8)
        for row, (label, index) in enumerate(zip(labels, indices, strict=True)):
            if self.repeat:
                index %= len(self.images[label])
            if index >= len(self.images[label]):
                raise PoolError(
                    f"class {self.classes[label]!r}: image {index + 1} is wanted, there are {len(self.images[label])}"
                )
            out[row] = self._decode(self.images[label][index], f"class {self.classes[label]!r}, image {index + 1}")
        return out

    def _decode(self, image: bytes | Path, which: str) -> Tensor:
        channels, height, width = self.shape
        if isinstance(image, Path):
            try:
                image = image.read_bytes()
            except OSError as error:
                raise DataError(f"{which}: cannot be read: {error}") from error
        size = (height, width) if self.resize else None
        found = pixels(which, image, size, cast(Literal[1, 3], channels)).transpose(2, 0, 1)
        if found.shape[1:] != (height, width):
            here = "x".join(map(str, found.shape[1:]))
            raise PoolError(f"{which}: {here}, wanted {height}x{width}; set generator.resize = true")
        return torch.from_numpy(np.array(found))

    def available(self, label: int) -> int:
        """How many images of a class there are."""
        return len(self.images[label])

    def prompt(self, label: int) -> str:
        """Nothing is asked for."""
        return ""

    def memory_bytes(self) -> dict[str, int]:
        """Encoded images held in memory; those in files count nothing."""
        return {"images": sum(len(image) for each in self.images for image in each if isinstance(image, bytes))}

    def fingerprint(self) -> str:
        """Over the content of every image, the classes in their order, size and options, and how they are decoded."""
        return digest("folder", DECODED, self._content, *self.shape, *self.classes, str(self.resize), str(self.repeat))

    @cached_property
    def _content(self) -> str:
        whole = hashlib.sha256()
        for each in self.images:
            whole.update(len(each).to_bytes(8, "little"))
            for image in each:
                whole.update(hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).digest())
        return whole.hexdigest()


@register("generators", "folder")
@dataclass(frozen=True, kw_only=True)
class Folder:
    """Images from your disk instead of a model: real public ones (the honest control), or another program's output."""

    dir: str = option(
        "",
        "a folder with one folder of images per class, or with train-*.parquet from the hub; pictures are converted to "
        "what the data are, grey or RGB, without alpha, as data.channels does",
    )
    resize: bool = option(
        False, "bring images of other sizes to the size of the data (bicubic, as by data.size) instead of refusing"
    )

    repeat: bool = option(False, "begin again when all images of a class are used, instead of an error")

    def load(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        device: torch.device,
        public: Samples | None = None,
    ) -> FolderSource:
        """The folder's images of these classes (by name).

        Raises ConfigError without `dir`, DataError when it has neither layout, PoolError for a class without images.
        """
        if not self.dir:
            raise ConfigError("generator.dir", self.dir, "must name a folder with images")
        root = Path(self.dir).expanduser()
        found = from_tables(root) if split_files(root, "train") else from_folders(root)
        if not found:
            raise DataError(f"{root} has neither train-*.parquet nor a folder per class")
        names = list(found)
        if not knows(classes, names) and (root / "train").is_dir():
            problem = f"must hold a folder per class, and holds {', '.join(names)}"
            raise ConfigError("generator.dir", self.dir, problem, str(root / "train"))
        images = [found[names[i]] for i in match(classes, names)]
        empty = [name for name, each in zip(classes, images, strict=True) if not each]
        if empty:
            raise PoolError(f"{root}: no images of {', '.join(empty)}")
        return FolderSource(images, classes, shape, self.resize, self.repeat)


def from_folders(root: Path) -> dict[str, list[bytes | Path]]:
    """Image files by class, sorted by name."""
    folders = sorted(path for path in root.glob("*") if path.is_dir() and plain_name(path.name))
    return {each.name: list(pictures_in(each)) for each in folders}


def from_tables(root: Path) -> dict[str, list[bytes | Path]]:
    """Encoded images by class, in the order of the rows of train-*.parquet.

    Raises DataError as the data room does: for damaged files, and for a row without image or class.
    """
    table = Parquet(dir=str(root)).table("train")
    assert table is not None, "there are no files"

    def first(kind: str) -> str | None:  # of several (coarse and fine classes); there is no option that names it
        return next((name for name in table.schema.names if table.features.get(name, {}).get("_type") == kind), None)

    image, label = find_image(table, first("Image")), find_label(table, first("ClassLabel"))
    split, names = labelled(table, image, label)
    checked(split.labels, len(names), split.where)
    found: dict[str, list[bytes | Path]] = {name: [] for name in names}
    rows = np.arange(len(split.labels), dtype=np.int64)
    for number, (_, encoded) in zip(split.labels.tolist(), split.pictures(rows), strict=True):
        found[names[number]].append(encoded)
    return found
