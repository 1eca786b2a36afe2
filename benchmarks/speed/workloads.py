"""What is timed: how many clients, what they hold, what they train, and the same arrays for every contender.

Only torch is imported here, as peers in environments of their own read this file too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Workload:
    """One federated workload. samples: of a client; cohort: clients a round; test: images evaluated each round."""

    clients: int
    samples: int
    cohort: int
    epochs: int
    batch: int
    lr: float
    test: int
    model: str = "cnn"
    shape: tuple[int, int, int] = (1, 28, 28)

    @property
    def steps(self) -> int:
        """SGD steps of all clients in a round."""
        return self.cohort * self.epochs * -(-self.samples // self.batch)


WORKLOADS = {
    "W1": Workload(clients=100, samples=100, cohort=10, epochs=5, batch=20, lr=0.1, test=2000),
    "W2": Workload(20, 640, 10, 1, 64, 0.05, 500, model="resnet18", shape=(3, 32, 32)),
    "W0": Workload(clients=100, samples=20, cohort=100, epochs=1, batch=20, lr=0.1, test=20),
}
# A tenth of a round of W2: each of its clients does the same work, so ratios are those of the whole round, except that
# what is done once a round, the evaluation apart, weighs ten times as much.
WORKLOADS["W2/10"] = replace(WORKLOADS["W2"], cohort=1, test=50)
# Ten clients of W1 that take part in every round: what methods keep on clients is there from the second round on.
WORKLOADS["W1/10"] = replace(WORKLOADS["W1"], clients=10)
# One epoch of it, 50 clients: the cohort of the measurements that let the registered clients grow.
WORKLOADS["W1/50"] = replace(WORKLOADS["W1"], cohort=50, epochs=1)
CLASSES = 10
EVALUATED = 500
"""Images in a batch of evaluation."""


def tiny(work: Workload) -> Workload:
    """As little of it as shows that a contender works."""
    return replace(work, clients=4, samples=16, cohort=2, epochs=1, batch=8, test=20)


class Arrays(NamedTuple):
    """Images uint8 [N, C, H, W], labels int64 [N]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def arrays(work: Workload) -> Arrays:
    """Random images around a mean image per class, from a fixed seed."""
    rng = torch.Generator().manual_seed(1)
    means = 64 + 128 * torch.rand(CLASSES, *work.shape, generator=rng)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % CLASSES
        y = y[torch.randperm(count, generator=rng)]
        x = means[y] + 48 * torch.randn(count, *work.shape, generator=rng)
        return x.round_().clamp_(0, 255).byte(), y

    return Arrays(*draw(work.clients * work.samples), *draw(work.test))


def normalised(work: Workload) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """What a plain loop keeps: float32 images and labels of each client, and the test images with theirs."""
    data = arrays(work)
    pixels = data.train_x.float() / 255
    dims = (0, 2, 3)
    mean, std = pixels.mean(dims)[:, None, None], pixels.std(dims)[:, None, None]
    x = ((pixels - mean) / std).split(work.samples)
    return list(x), list(data.train_y.split(work.samples)), (data.test_x.float() / 255 - mean) / std, data.test_y


def network(work: Workload) -> nn.Module:
    """The network of the workload in plain torch, the same as fedkeel's of that name."""
    torch.manual_seed(1)
    if work.model == "resnet18":
        return ResNet18(work.shape[0])
    side = ((work.shape[1] - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(work.shape[0], 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * side * side, 360), nn.ReLU(), nn.Linear(360, CLASSES)),
    )


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.skip = nn.Sequential()
        if stride != 1 or inner != outer:
            self.skip = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + self.skip(x), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem: 11,173,962 parameters for ten classes and three channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.body = nn.Sequential(*(nn.Sequential(Block(a, b, s), Block(b, b, 1)) for a, b, s in sizes))
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.norm(self.stem(x)), inplace=True)).mean((2, 3)))
