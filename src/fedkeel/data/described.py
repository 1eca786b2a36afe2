"""Data that this machine does not have: the server of a federation knows their classes and shape only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedkeel.data.dataset import Dataset
from fedkeel.data.pictures import twice
from fedkeel.errors import ConfigError
from fedkeel.options import option
from fedkeel.registry import register


@register("datasets", "described")
@dataclass(frozen=True, kw_only=True)
class Described:
    """Classes, size and normalisation of images that lie at the sites (partition "sites"); no image is here."""

    classes: tuple[str, ...] = option((), "the classes by name; a site may have images of some of them only")
    size: int | None = option(None, "side of the square images in pixels; sites resize theirs to it (bicubic)", ge=1)
    channels: Literal[1, 3] = option(3, "1 = grey, 3 = RGB; sites convert theirs")
    mean: tuple[float, ...] = option((), "mean of each channel, pixels from 0 to 1; empty = 0.5", ge=0, le=1)
    std: tuple[float, ...] = option((), "standard deviation of each channel; empty = 0.5", gt=0)

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ConfigError("classes", list(self.classes), "name two classes at least")
        if (doubled := twice(self.classes)) is not None:
            raise ConfigError("classes", list(self.classes), f"{doubled!r} is named twice")
        if self.size is None:
            raise ConfigError("size", None, "this key is required")
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (0, self.channels):
                raise ConfigError(key, list(getattr(self, key)), f"must have one number per channel, {self.channels}")

    def load(self) -> Dataset:
        """A data set without images."""
        assert self.size is not None
        x, y = torch.empty((0, self.channels, self.size, self.size), dtype=torch.uint8), torch.empty(0).long()
        mean, std = ((values or (0.5,) * self.channels) for values in (self.mean, self.std))
        return Dataset("described", self.classes, x, y, x, y, tuple(mean), tuple(std))
