"""A data set in memory: uint8 images held once, integer labels, class names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fedkeel.records import Samples


@dataclass(frozen=True)
class Dataset:
    """Train and test split of a labelled image set. The two are never merged.

    train_x, test_x: [N, C, H, W] uint8. train_y, test_y: [N] int64 in [0, len(classes)).
    mean, std: [C] per channel over the train images, in [0, 1] pixel units. public: train images set aside, which are
    not among train_x.
    """

    name: str
    classes: tuple[str, ...]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    public: Samples | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.train_x.shape[1:]
        return int(c), int(h), int(w)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over images, labels and class names: equal exactly when the data are."""
        digest = hashlib.sha256("\x1f".join(self.classes).encode())
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()
