"""DynaFed: the server distils the first global models into a few images, and tunes every later model on them.

Pi, Zhang, Xie, Gao, Wang, Kim, Chen: DynaFed: Tackling Client Data Heterogeneity with Global Dynamics. CVPR 2023,
arXiv 2211.10878. Its augmentation is that of Zhao, Bilen: Dataset Condensation with Differentiable Siamese
Augmentation. ICML 2021, arXiv 2102.08259.

The first L global models (with the initial one) are kept; then, once, images, soft labels and a learning rate are found
such that a few steps of SGD on them lead from one of these models to the mean of some that followed it. From then on
the server trains each new average on the images before it sends it out.

Where the paper is silent we do as the authors' code: the soft-label loss is a mean over samples and classes, that is
1/C of the usual one; the mean of the target is drawn with replacement; before tuning, BatchNorm statistics take in the
images in three passes; in tuning they are those of the images.

Departures: clients keep no optimiser and run SGD, as everywhere here (the code has Adam, kept across rounds).
`proxy_resolution` makes the images smaller than the clients', for networks that take any size: unrolling at 224 pixels
is out of reach. They go through the network as they are, so that it is tuned at one size and measured at another: such
a row is a lower bound, and the size must be reported with it. On CUDA the gradients of the augmentation (`grid_sample`
and `gather`) add up in any order: a run repeats its numbers on the CPU only.

What crosses: as FedAvg. Nothing stays on clients; the server keeps L models until it has the images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedkeel.algorithms.base import Algorithm
from fedkeel.bench import with_statistics
from fedkeel.errors import ConfigError
from fedkeel.options import option
from fedkeel.records import Lab, Server, Update
from fedkeel.registry import register

PASSES = 3
"""Passes over the images by which BatchNorm statistics are renewed."""


@register("algorithms", "dynafed")
@dataclass(frozen=True, kw_only=True)
class DynaFed(Algorithm):
    """Algorithm 1, with the objective of equation 4; defaults are those of the authors' script for CIFAR-10."""

    paper: ClassVar[str] = "Pi et al. 2023, arXiv 2211.10878"
    sums: ClassVar[bool] = True  # it learns from averages

    weights: Literal["samples", "uniform", "trained"] = option(
        "uniform", "weight of a client in the average: the same for all as in the authors' code, or its samples"
    )
    snapshots: int = option(25, "global models, the initial one among them, whose path is distilled (L)", ge=2)
    reach: int = option(3, "how many models on the target lies, at most (s)", ge=1, grid=(2, 3, 5))
    least: int = option(2, "fewest models that a target is the mean of", ge=1)
    syn_steps: int = option(20, "steps of the student", ge=1, grid=(10, 20, 30))
    syn_batch: int | None = option(None, "images in a step of the student; None = all", ge=1)
    per_class: int = option(15, "images per class", ge=1, grid=(5, 15, 50))
    iterations: int = option(3000, "steps by which images, labels and student's learning rate are found", ge=1)
    image_lr: float = option(0.05, "learning rate of the images (Adam)", gt=0)
    label_lr: float = option(0.01, "learning rate of the soft labels (Adam)", ge=0)
    student_lr: float = option(0.04, "the student's learning rate at first", ge=0, grid=(0.01, 0.04, 0.1))
    student_lr_lr: float = option(1e-5, "learning rate of the student's learning rate (Adam)", ge=0)
    tune_epochs: int = option(
        20, "the server's passes over the images after each average; the paper has 8 for CIFAR-100", ge=0, off=0
    )
    tune_lr: float = option(1e-4, "learning rate of these (Adam)", gt=0, grid=(3e-5, 1e-4, 3e-4))
    tune_batch: int = option(256, "images in a batch of these", ge=1)
    augment: bool = option(True, "differentiable augmentation, in distilling and in tuning")
    recalibrate: bool = option(True, "renew BatchNorm statistics on the images before tuning")
    proxy_resolution: int | None = option(None, "side of the images in pixels; None = that of the clients'", ge=1)

    def off(self, rounds: int | None = None) -> Mapping[str, object]:
        # snapshot L is there in round L: images are found, and tuned on, in the last round of L
        late = rounds is not None and self.snapshots > rounds
        return {**super().off(rounds), **({"snapshots": self.snapshots} if late else {})}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.reach:
            raise ConfigError("least", self.least, f"must be at most reach = {self.reach}")

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        if self.tune_epochs == 0:
            return super().aggregate(server, updates)
        known = server.round + 1  # global models there have been
        if known < self.snapshots:
            return self.remembered(server, super().aggregate(server, updates))
        after = with_statistics(super().aggregate, server, updates)
        if "images" not in server.private:
            images, labels = self.distilled(server)
            after = replace(after, private={"images": images, "labels": labels})
        return self.tuned(after)

    # phase 1 ----------------------------------------------------------------------------------------------------------

    def remembered(self, server: Server, after: Server) -> Server:
        """`after`, with the server's present model on the shelf (as version `round` of "client" 0)."""
        lab_of(server).shelf.put(0, server.round, {"params": server.params.cpu()})
        there = torch.tensor([[0, version] for version in range(server.round + 1)])
        return replace(after, private={"shelf": there})

    # phase 2 ----------------------------------------------------------------------------------------------------------

    def distilled(self, server: Server) -> tuple[Tensor, Tensor]:
        """Images [per_class * classes, C, H, W] as the network sees them, and their soft labels before the softmax
        ([.., classes]), by matching the path of the global models (equation 4)."""
        lab = lab_of(server)
        rng = lab.streams("distil")
        path = [*(lab.shelf.get(0, version)["params"] for version in range(server.round)), server.params.cpu()]
        lab.weights.load(server.params, server.buffers, server.counters)
        lab.model.train()
        number, side = self.per_class * lab.classes, self.proxy_resolution
        shape = (lab.shape[0], side, side) if side else lab.shape
        images = torch.randn(number, *shape, generator=rng).to(lab.device).requires_grad_()
        labels = torch.zeros(number, lab.classes, device=lab.device, requires_grad=True)
        lr = torch.tensor(self.student_lr, device=lab.device, requires_grad=True)
        self.try_size(lab, images)
        rates = ((images, self.image_lr), (labels, self.label_lr), (lr, self.student_lr_lr))
        adam = torch.optim.Adam([{"params": [tensor], "lr": rate} for tensor, rate in rates])
        for _ in range(self.iterations):
            start, target = (each.to(lab.device) for each in self.drawn(path, rng))
            if torch.equal(start, target):  # a model that did not move: there is no way to learn
                continue
            loss = self.mismatch(lab, images, labels, lr, start, target, rng)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        lab.shelf.retain(set())
        return images.detach(), labels.detach()

    def drawn(self, path: list[Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A model of the path, and the mean of some of those that follow it."""
        reach = min(self.reach, len(path) - 1)
        start = randint(0, len(path) - reach, rng)
        count = randint(min(self.least, reach), reach + 1, rng)
        target = torch.stack([path[start + randint(1, reach + 1, rng)] for _ in range(count)]).mean(0)
        return path[start], target

    def mismatch(
        self, lab: Lab, images: Tensor, labels: Tensor, lr: Tensor, start: Tensor, target: Tensor, rng: torch.Generator
    ) -> Tensor:
        """|student - target|^2 / |start - target|^2, the student having made its steps from the start: a function of
        images, labels and learning rate."""
        student = start.detach().requires_grad_()
        for rows in self.batches(len(images), rng):
            x = augmented(images[rows], rng) if self.augment else images[rows]
            logits = functional_call(lab.model, lab.weights.layout.named(student), (x,))
            (grad,) = torch.autograd.grad(soft_loss(logits, labels[rows]), student, create_graph=True)
            student = student - lr * grad
        return (student - target).square().sum() / (start - target).square().sum()

    def batches(self, number: int, rng: torch.Generator) -> Iterator[Tensor]:
        """Numbers of the images of each step of the student: shuffled passes."""
        done = 0
        while done < self.syn_steps:
            for rows in shuffled(number, self.syn_batch or number, rng)[: self.syn_steps - done]:
                done += 1
                yield rows

    def try_size(self, lab: Lab, images: Tensor) -> None:
        """Raises ConfigError when the network does not take images of the proxy's size."""
        if self.proxy_resolution is None:
            return
        try:
            with torch.no_grad():
                lab.model(images[:2])
        except RuntimeError as error:
            text = f"the network takes images of {lab.shape[1]} x {lab.shape[2]} pixels only ({error})"
            raise ConfigError("algorithm.proxy_resolution", self.proxy_resolution, text) from None

    # phase 3 ----------------------------------------------------------------------------------------------------------

    def tuned(self, server: Server) -> Server:
        """The server after some epochs on its images, with a fresh Adam."""
        lab = lab_of(server)
        rng = lab.streams("tune")
        images, labels = server.private["images"], server.private["labels"]
        weights = lab.weights
        weights.load(server.params, server.buffers, server.counters)
        lab.model.train()
        if self.recalibrate:
            statistics = weights.layout.total > weights.layout.trained
            with torch.no_grad():
                for _ in range(PASSES):
                    for rows in shuffled(len(images), self.tune_batch, rng):
                        if statistics:  # else there is nothing to renew; what follows draws on from here all the same
                            lab.model(images[rows])
        params = nn.Parameter(weights.params)  # the network's own memory, as one parameter
        params.grad = weights.grad[: len(params)]
        adam = torch.optim.Adam([params], lr=self.tune_lr)
        for _ in range(self.tune_epochs):
            for rows in shuffled(len(images), self.tune_batch, rng):
                x = augmented(images[rows], rng) if self.augment else images[rows]
                weights.grad.zero_()
                soft_loss(lab.model(x), labels[rows]).backward()  # type: ignore[no-untyped-call]
                adam.step()
        return replace(
            server, params=weights.params.clone(), buffers=weights.buffers.clone(), counters=weights.counters
        )


def lab_of(server: Server) -> Lab:
    """What the server computes with."""
    assert server.lab is not None
    return server.lab


def soft_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against soft labels ([B, C], before the softmax), averaged over samples and classes."""
    return -(labels.softmax(1) * logits.log_softmax(1)).mean()


def shuffled(number: int, batch: int, rng: torch.Generator) -> tuple[Tensor, ...]:
    """The numbers below `number` in batches, in random order."""
    return torch.split(torch.randperm(number, generator=rng), batch)


def randint(low: int, high: int, rng: torch.Generator) -> int:
    """A whole number in [low, high)."""
    return int(torch.randint(low, high, (), generator=rng))


# differentiable augmentation ------------------------------------------------------------------------------------------


def augmented(x: Tensor, rng: torch.Generator) -> Tensor:
    """x [B, C, H, W] under one of DSA's six operations, drawn for the batch, with a strength of each image's own."""
    ways = (colour, crop, cutout, flip, scale, rotate)
    return ways[randint(0, len(ways), rng)](x, rng)


def colour(x: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness up to 0.5 off, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    bright, saturated, contrast = uniform(3, x, rng)[:, :, None, None, None]
    x = x + (bright - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturated) + grey
    middle = x.mean((1, 2, 3), keepdim=True)
    out: Tensor = (x - middle) * (contrast + 0.5) + middle
    return out


def crop(x: Tensor, rng: torch.Generator) -> Tensor:
    """Moved by up to an eighth of each side, zeros coming in."""
    ways = [int(side * 0.125 + 0.5) for side in x.shape[2:]]
    down, right = ((part * (2 * way + 1)).long() - way for part, way in zip(uniform(2, x, rng), ways, strict=True))
    return moved(x, down, right)


def moved(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Image i moved by down[i] rows and right[i] columns."""
    b, c, h, w = x.shape
    rows = torch.arange(h, device=x.device) - down[:, None]
    columns = torch.arange(w, device=x.device) - right[:, None]
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    places = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    out = x.reshape(b, c, h * w).gather(2, places.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)
    return out * inside[:, None]


def cutout(x: Tensor, rng: torch.Generator) -> Tensor:
    """A rectangle of half the sides is zero, its middle anywhere in the image."""
    inside = []
    for part, side in zip(uniform(2, x, rng), x.shape[2:], strict=True):
        size = int(side * 0.5 + 0.5)
        first = (part * (side + (1 - size % 2))).long() - size // 2
        places = torch.arange(side, device=x.device)
        inside.append((places >= first[:, None]) & (places < first[:, None] + size))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return x.masked_fill(hole[:, None], 0.0)


def flip(x: Tensor, rng: torch.Generator) -> Tensor:
    """Every second image mirrored."""
    return torch.where(uniform(1, x, rng)[0][:, None, None, None] < 0.5, x.flip(3), x)


def scale(x: Tensor, rng: torch.Generator) -> Tensor:
    """Height and width each by a factor of their own, 1/1.2 to 1.2."""
    down, right = uniform(2, x, rng) * (1.2 - 1 / 1.2) + 1 / 1.2
    none = torch.zeros_like(down)
    return warped(x, torch.stack([right, none, none, none, down, none], 1))


def rotate(x: Tensor, rng: torch.Generator) -> Tensor:
    """Turned by up to 15 degrees."""
    angle = (2 * uniform(1, x, rng)[0] - 1) * math.radians(15)
    none = torch.zeros_like(angle)
    return warped(x, torch.stack([angle.cos(), -angle.sin(), none, angle.sin(), angle.cos(), none], 1))


def warped(x: Tensor, theta: Tensor) -> Tensor:
    """x with each pixel taken from where the affine map theta [B, 6] sends it."""
    grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def uniform(number: int, x: Tensor, rng: torch.Generator) -> Tensor:
    """[number, B] random numbers in [0, 1), on the device of x."""
    return torch.rand(number, len(x), generator=rng).to(x.device)
