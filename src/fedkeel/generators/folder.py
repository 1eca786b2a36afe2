"""Images that are already there: real public ones as the honest control, or the output of any other program.

Two layouts: `<dir>/<class name>/` with pictures, or `train-*.parquet` or `train.parquet` as on the Hugging Face hub, in
`<dir>` or its folder `data`. Image number i of a class is its i-th file in the order of names, or its i-th row.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.pictures import reason
from fedkeel.data.sources import pictures_in, split_files
from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.generators.names import digest, knows, match, plain_name
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.registry import register


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
        from PIL import Image  # slow to import

        channels, height, width = self.shape
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                picture = opened.convert("L" if channels == 1 else "RGB")
        except OSError as error:
            raise DataError(f"{which}: cannot be read: {reason(error)}") from error
        if picture.size != (width, height):
            if not self.resize:
                raise PoolError(
                    f"{which}: {picture.height}x{picture.width}, wanted {height}x{width}; set generator.resize = true"
                )
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)  # Pillow always filters when shrinking
        return torch.from_numpy(np.array(picture)).reshape(height, width, channels).permute(2, 0, 1)

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
        """Over the content of every image, the classes in their order, size and option."""
        return digest("folder", self._content, *self.shape, *self.classes, str(self.resize), str(self.repeat))

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

    dir: str = option("", "a folder with one folder of images per class, or with train-*.parquet from the hub")
    resize: bool = option(
        False, "bring images of other sizes to the size of the data (antialiased) instead of refusing"
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
        tables = split_files(root, "train")
        found = from_tables(tables) if tables else from_folders(root)
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


def from_tables(paths: Sequence[Path]) -> dict[str, list[bytes | Path]]:
    """Encoded images by class, in the order of the rows.

    Raises DataError when there is no image or class column, or a row has no image or no class.
    """
    from pyarrow import ArrowException, parquet  # slow to import

    found: dict[str, list[bytes | Path]] = {}
    for path in paths:
        try:
            table = parquet.read_table(path)
            features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
            image = next(name for name, kind in features.items() if kind["_type"] == "Image")
            label = next(name for name, kind in features.items() if kind["_type"] == "ClassLabel")
        except (OSError, ArrowException, KeyError, TypeError, ValueError, StopIteration) as error:
            raise DataError(f"{path}: not a table of images with class names, as on the hub: {error}") from error
        names = features[label]["names"]
        for name in names:
            found.setdefault(name, [])
        # the column of bytes without building a dictionary per row
        data = table[image].combine_chunks().field("bytes")
        for row, (number, encoded) in enumerate(zip(table[label].to_pylist(), data.to_pylist(), strict=True)):
            if number is None or not 0 <= number < len(names):  # -1 is the hub's word for a row without a label
                raise DataError(f"{path}, row {row}: label {number}, must be 0 to {len(names) - 1}")
            if encoded is None:
                raise DataError(f"{path}, row {row}: there is no picture")
            found[names[number]].append(encoded)
    return found
