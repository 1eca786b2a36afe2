"""What the tests of the core share: a tiny learnable image set, tiny configurations, one worker on given samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkeel.algorithms.base import Algorithm
from fedkeel.config import Config, parse
from fedkeel.data.dataset import Dataset
from fedkeel.data.sources import arrays
from fedkeel.local import Training, Worker
from fedkeel.loop import run
from fedkeel.models.split import Split
from fedkeel.record import Listener, Silent
from fedkeel.records import Samples, Server
from fedkeel.rng import Streams

CLASSES, SIDE = 4, 16


def data(train: int = 96, test: int = 40, seed: int = 0) -> Dataset:
    """16x16 grey images of four classes, equally many of each; the class says which quarter of the image is bright."""
    rng = np.random.default_rng(seed)

    def part(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(n) % CLASSES
        x = rng.integers(0, 120, (n, SIDE, SIDE), dtype=np.uint8)
        for image, label in zip(x, y, strict=True):
            top, left = divmod(int(label), 2)
            image[top * 8 : top * 8 + 8, left * 8 : left * 8 + 8] += 100
        return x, y

    return arrays(train=part(train), test=part(test), classes=["north-west", "north-east", "south-west", "south-east"])


def config(*overrides: str, table: Mapping[str, object] | None = None) -> Config:
    """Four rounds of four clients, a small perceptron, two epochs: a run of a fraction of a second."""
    small: dict[str, object] = {
        "name": "tiny",
        "rounds": 4,
        "clients": 4,
        "participation": 1.0,
        "device": "cpu",
        "data": {"name": "fashion"},
        "partition": {"name": "iid"},
        "model": {"name": "mlp", "hidden": [8]},
        "local": {"epochs": 2, "batch": 8, "lr": 0.05},
    }
    return parse({**small, **(table or {})}, overrides)


BATCHNORM = ("model.name=cnn", "model.width=2", "model.hidden=6", "model.norm=batch")


def worker(
    model: Split,
    samples: Sequence[Samples],
    training: Training,
    method: Algorithm | None = None,
    *,
    transform: object = None,
    seed: int = 1,
) -> tuple[Worker, Server]:
    """A worker whose client k holds samples[k], and the server before the first round."""
    made = Worker(
        model,
        method or Algorithm(),
        training,
        classes=CLASSES,
        rounds=10,
        streams=Streams(seed),
        transform=transform or scaled,
        data=samples.__getitem__,
        profile=lambda client: "constrained",
        images=no_images,
        device=torch.device("cpu"),
    )
    return made, made.first_server(len(samples), sum(map(len, samples)))


def scaled(x: Tensor, *, rng: object, augment: object, device: torch.device) -> Tensor:
    """Pixels in [0, 1]."""
    return x.float().div(255).to(device)


def no_images(client: int, counts: Tensor, first: int) -> Samples:
    """For methods that must not generate."""
    raise AssertionError(f"client {client} asked for {counts.tolist()} images")


def samples(n: int, *, seed: int = 0, classes: int = CLASSES, shape: tuple[int, int, int] = (1, 16, 16)) -> Samples:
    """Random images with labels in turn."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 256, (n, *shape), dtype=np.uint8))
    return Samples.real_ones(x, torch.arange(n) % classes)


class Told(Silent):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warned(self, text: str) -> None:
        self.said.append(text)


def go(folder: str, *overrides: str, listener: Listener | None = None) -> None:
    """Starts the run in `folder`, or goes on with it; what another process does."""
    torch.set_num_threads(1)
    run(config(*overrides), data=data(), folder=Path(folder), resume=True, listener=listener)


if __name__ == "__main__":
    go(*sys.argv[1:])
