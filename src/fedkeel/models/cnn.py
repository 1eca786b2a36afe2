"""A small convolutional network: two 5x5 convolutions, each with max-pool, and one hidden layer.

The layout McMahan et al. 2017 (arXiv 1602.05629, section 3) use for MNIST, narrower and without padding. With the
defaults it has 201,538 parameters on 28x28x1 images of ten classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedkeel.models.layers import check_groups, check_size, normalise
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.registry import register

KERNEL = 5
SMALLEST = 16


@register("models", "cnn")
@dataclass(frozen=True, kw_only=True)
class CNN:
    """conv(width) - pool - conv(2 width) - pool - linear(hidden) = F, linear = H; ReLU after each but the last."""

    width: int = option(16, "channels of the first convolution, half those of the second", ge=1, grid=(8, 16, 32))
    hidden: int = option(360, "D, length of the feature vector", ge=1, grid=(128, 360, 512))
    norm: Literal["none", "batch", "group"] = option("none", "normalisation after each convolution")
    groups: int = option(4, "groups of channels, for norm = group; a divisor of width", ge=1, grid=(2, 4, 8))
    stride: int = option(1, "of the first convolution; 2 for 64 pixels at the cost of 32", ge=1, le=4, keyed=None)

    def __post_init__(self) -> None:
        if self.norm == "group":
            check_groups(self.groups, self.width)

    def build(self, shape: tuple[int, int, int], classes: int) -> Split:
        """A freshly initialised network with PyTorch's default initialisation. Raises ConfigError below 16 pixels."""
        channels, *sides = shape
        check_size("cnn", shape, SMALLEST * self.stride)
        tall, wide = (_pooled(_pooled(side, self.stride)) for side in sides)
        features = nn.Sequential(
            *self._layer(channels, self.width, self.stride),
            *self._layer(self.width, 2 * self.width),
            nn.Flatten(),
            nn.Linear(2 * self.width * tall * wide, self.hidden),
            nn.ReLU(),
        )
        return Split(features, nn.Linear(self.hidden, classes), self.hidden)

    def _layer(self, inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        norm = [] if self.norm == "none" else [normalise(self.norm, outputs, self.groups)]
        return [nn.Conv2d(inputs, outputs, KERNEL, stride), *norm, nn.ReLU(), nn.MaxPool2d(2)]


def _pooled(side: int, stride: int = 1) -> int:
    return ((side - KERNEL) // stride + 1) // 2
