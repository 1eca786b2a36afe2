"""From encoded pictures to one uint8 tensor, and from two splits to a `Dataset`.

What every source has in common: choosing a stratified part before anything is decoded, decoding, resizing, checking,
and the mean and standard deviation of the channels. Pictures are grey or RGB, all of them alike, and without alpha
channel: others are refused unless `channels` says what to make of them. EXIF rotation is not applied.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, DataError, nearest
from fedkeel.options import option
from fedkeel.records import Samples

if TYPE_CHECKING:
    from PIL.Image import Image

# first bytes -> Pillow's name: left to guess, Pillow tries one format after another, which takes longer than decoding
FORMATS = {b"\x89PNG": "PNG", b"\xff\xd8": "JPEG", b"RIFF": "WEBP", b"P6": "PPM", b"P5": "PPM"}

COLOURS = {1: "grey", 3: "RGB"}

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Split:
    """One split before decoding.

    where: names it in messages. labels: [N] int64. pictures(rows) yields, for ascending rows, where the picture is
    (for messages) and its encoded bytes.
    """

    where: str
    labels: Rows
    pictures: Callable[[Rows], Iterator[tuple[str, bytes]]]


@dataclass(frozen=True)
class Raw:
    """What a source reads: names and two splits."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Options that every source of pictures has; a source says how to `read`."""

    size: int | None = option(
        None, "resize all pictures to this square size in pixels (bicubic); absent: they must share one size", ge=1
    )
    channels: Literal[1, 3] | None = option(
        None,
        "convert all pictures: 1 = to grey, 3 = to RGB, without alpha; absent: they must be all grey or all RGB "
        "(set 3 for tiny-ImageNet, where some are grey)",
    )
    classes: tuple[str, ...] = option(
        (), "use only these classes, in this order, by their names in the data; empty = all (R-14)", keyed=None
    )
    public_limit: int = option(
        0,
        "set this many train images aside as public, stratified, the last of each class: no client gets them, and a "
        "generator may be fitted to them",
        ge=0,
    )
    train_limit: int | None = option(None, "keep this many train images, stratified, the first of each class", ge=1)
    test_limit: int | None = option(None, "keep this many test images, stratified, the first of each class", ge=1)

    @abstractmethod
    def read(self) -> Raw:
        """The undecoded data. Raises DataError."""

    def load(self) -> Dataset:
        """The data in memory. Raises DataError, naming the file and row, for anything that does not fit."""
        raw = self.read()
        for split in (raw.train, raw.test):
            checked(split.labels, len(raw.classes), split.where)
        if self.classes:
            raw = only(raw, self.classes)
        private, public = set_aside(raw.train.labels, self.public_limit)
        if len(private) == 0:
            raise DataError(
                f"data.public_limit = {self.public_limit}: {raw.train.where} has {len(public)} images, none are left"
            )
        rows = private[stratified(raw.train.labels[private], self.train_limit)]
        train_x, train_y = self._decoded(raw.train, rows)
        channels, height, width = (int(n) for n in train_x.shape[1:])
        shape = (channels, height, width)
        test_x, test_y = self._decoded(raw.test, stratified(raw.test.labels, self.test_limit), shape)
        data = assembled(raw.name, raw.classes, train_x, train_y, test_x, test_y)
        if len(public) == 0:
            return data
        public_x, public_y = self._decoded(raw.train, public, shape)
        return replace(data, public=Samples.real_ones(public_x, public_y))

    def _decoded(self, split: Split, rows: Rows, shape: tuple[int, int, int] | None = None) -> tuple[Tensor, Tensor]:
        x = decode(split.pictures(rows), len(rows), self.size, self.channels, shape)
        return x, torch.from_numpy(split.labels[rows])


def assembled(
    name: str, classes: tuple[str, ...], train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor
) -> Dataset:
    """A `Dataset` with the statistics of its train images."""
    mean, std = statistics(train_x)
    return Dataset(name, classes, train_x, train_y, test_x, test_y, mean, std)


def only(raw: Raw, names: Sequence[str]) -> Raw:
    """The samples of these classes, numbered in this order. Raises ConfigError for a name that is not there or twice,
    DataError for a split without any."""
    for at, name in enumerate(names):
        if name not in raw.classes:
            known = f"the data have no such class; there are {', '.join(raw.classes)}"
            raise ConfigError(f"data.classes[{at}]", name, known, nearest(name, raw.classes))
        if name in names[:at]:
            raise ConfigError(f"data.classes[{at}]", name, "is named twice")
    number = np.full(len(raw.classes), -1, dtype=np.int64)
    number[[raw.classes.index(name) for name in names]] = np.arange(len(names))

    def part(split: Split) -> Split:
        rows = np.flatnonzero(number[split.labels] >= 0)
        labels = number[split.labels[rows]]
        checked(labels, len(names), f"{split.where}, classes {', '.join(names)}")
        return Split(split.where, labels, lambda asked: split.pictures(rows[asked]))

    return Raw(raw.name, tuple(names), part(raw.train), part(raw.test))


def twice(names: Sequence[str]) -> str | None:
    """The first class that is named again; None where each is named once."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def set_aside(labels: Rows, limit: int) -> tuple[Rows, Rows]:
    """Ascending rows of the private and of the public part: `limit` in the class proportions, the last of each class.

    A limit on the private part takes the first of each class, so that the two parts stay the same whatever it is.
    """
    if limit == 0:
        return np.arange(len(labels), dtype=np.int64), np.arange(0, dtype=np.int64)
    public = (len(labels) - 1 - stratified(labels[::-1], limit))[::-1]
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), public), public.copy()


def checked(labels: Rows, classes: int, where: str) -> None:
    """Raises DataError for a split without samples or with a label outside [0, classes)."""
    if len(labels) == 0:
        raise DataError(f"{where}: there are no pictures")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{where}, row {row}: label {labels[row]} is not in 0..{classes - 1} ({classes} classes)")


def stratified(labels: Rows, limit: int | None) -> Rows:
    """Ascending rows of `limit` samples in the class proportions of `labels` (largest remainders), the first of each
    class in their order; all rows when there are no more than that."""
    total = len(labels)
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    counts = np.bincount(labels)
    quota, rest = np.divmod(limit * counts, total)
    quota[np.argsort(-rest, kind="stable")[: limit - quota.sum()]] += 1
    order = np.argsort(labels, kind="stable")
    rank = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)  # place within its class
    return np.sort(order[rank < quota[labels[order]]])


def decode(
    pictures: Iterator[tuple[str, bytes]],
    count: int,
    size: int | None,
    channels: Literal[1, 3] | None,
    shape: tuple[int, int, int] | None = None,
) -> Tensor:
    """[N, C, H, W] uint8 of `count` encoded pictures (whatever Pillow reads: PNG, JPEG, WebP, ...).

    shape: channels, height and width they must have; None = those of the first.
    Raises DataError for a picture that cannot be decoded, has more than 8 bits a channel, or another size; and where
    `channels` is None for one with an alpha channel, or with another number of channels.
    """
    out: np.ndarray | None = None
    for i, (where, blob) in enumerate(pictures):
        found = pixels(where, blob, None if size is None else (size, size), channels).transpose(2, 0, 1)
        depth, height, width = found.shape
        if shape is None:
            shape = (depth, height, width)
        if depth != shape[0]:
            raise DataError(
                f"{where}: {COLOURS[depth]} where {COLOURS[shape[0]]} was expected; set data.channels = 3 to convert "
                f"all pictures to RGB, or 1 to grey"
            )
        if (height, width) != shape[1:]:
            raise DataError(
                f"{where}: {width}x{height} pixels where {shape[2]}x{shape[1]} was expected; "
                f"give data.size to resize all pictures"
            )
        if out is None:
            out = np.empty((count, *shape), dtype=np.uint8)
        out[i] = found
    assert out is not None, "an empty split was let through"
    return torch.from_numpy(out)


def pixels(where: str, blob: bytes, size: tuple[int, int] | None, channels: Literal[1, 3] | None) -> np.ndarray:
    """[H, W, 1 or 3] uint8. size: height and width to resize to. channels: None = those of the picture.

    Of 16 bits a channel of a coloured PNG the decoder takes the upper 8. Raises DataError for a picture that cannot be
    decoded, or whose one channel has more than 8 bits (not all of which may be used); and where `channels` is None for
    one with an alpha channel.
    """
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(blob), formats=_formats(blob))
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{where}: more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
        if channels is None and image.has_transparency_data:
            raise DataError(f"{where}: a picture with an alpha channel; set data.channels = 3 to convert all to RGB")
        grey = channels == 1 if channels is not None else image.mode in ("L", "1")
        image = _plain(image, "L" if grey else "RGB")
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        out = np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise DataError(f"{where}: not a readable picture ({_reason(error)})") from error
    return out.reshape(*out.shape[:2], -1)


def _reason(error: Exception) -> str:
    """What Pillow says, without the address in memory by which it calls bytes that came from no file."""
    return re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))


def _formats(blob: bytes) -> list[str] | None:
    return next(([name] for start, name in FORMATS.items() if blob.startswith(start)), None)


def _plain(image: Image, mode: str) -> Image:
    if image.mode == mode:
        return image
    # a palette with transparency has to go through RGBA, else Pillow warns
    return (image.convert("RGBA") if image.mode == "P" else image).convert(mode)


def statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1] pixel units, [C] each, over uint8 [N, C, H, W].

    Exact: the sums are whole numbers below 2^53, so neither chunks nor their order matter. A channel of one value gets
    1 as its standard deviation, so that dividing by it is harmless.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    chunk = max(1, 2**21 // x[0].numel())
    for start in range(0, len(x), chunk):
        values = x[start : start + chunk].transpose(0, 1).flatten(1).double()
        total += values.sum(1)
        squares += values.square_().sum(1)
    mean = total / (x.numel() // x.shape[1])
    variance = squares / (x.numel() // x.shape[1]) - mean.square()
    std = variance.clamp(min=0).sqrt() / 255
    return tuple((mean / 255).tolist()), tuple(value if value > 1e-9 else 1.0 for value in std.tolist())
