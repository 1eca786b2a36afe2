"""ReGL: every client generates images of all global classes and trains on real and synthetic ones together.

Yao: Recovering Global Data Distribution Locally in Federated Learning. 2024, arXiv 2409.14063. Section and equation
numbers below are the paper's; R-01 to R-23 are our readings of what it leaves open (docs/reading-the-papers.md).

Training-free (TF), the generator is used as it is; fine-tuned (FT), each client first tunes it on its own images, for
which the generator has options (what is tuned, for how long, on what condition, how much of it is used). A client whose
profile is "none" cannot generate and trains like FedAvg; ReGL makes no difference between the others.

Departures: none by default.

What crosses: as FedAvg, weighted by real samples. What stays: the images, and what the generator learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from fedkeel.algorithms.base import Algorithm, Over
from fedkeel.balance.point import filled
from fedkeel.errors import ConfigError
from fedkeel.options import option
from fedkeel.records import Batch, Local, Plan, Samples
from fedkeel.registry import register


@register("algorithms", "regl")
@dataclass(frozen=True, kw_only=True)
class ReGL(Over):
    """Algorithm 1, generalisation, over FedAvg or, through the section [balance], over any other method."""

    paper: ClassVar[str] = "Yao 2024, arXiv 2409.14063"
    tunes: ClassVar[bool] = True
    trial: ClassVar[Mapping[str, object]] = {"volume": 1}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"TF": {"tune": False}, "FT": {"tune": True}}

    weights: Literal["samples", "uniform", "trained"] = option(
        "samples", "weight of a client (R-04): its real samples, the same for all, or real and synthetic together"
    )
    volume: int = option(1300, "synthetic images per class (V, R-01)", ge=0, grid=(500, 1000, 2000, 4000), off=0)
    mode: Literal["uniform", "top_up", "missing_only"] = option(
        "uniform", "V images of every class; up to V in all; or V of each class the client has none of (R-02)"
    )
    objective: Literal["ce", "bce_onehot"] = option("ce", "softmax cross-entropy, or equation 3 as printed (R-03)")
    tune: bool = option(
        False,
        "each client tunes the generator on its own images first (FT, 4.1.2); false: it is used as it is (TF)",
        keyed=None,
    )
    min_images: int = option(
        10, "a client with fewer real images uses the generator as it is (R-17); one class is enough", ge=1, keyed=None
    )
    real_ratio: float | None = option(
        None, "share of real samples in each batch (R-16); absent: all in one pool, shuffled", gt=0, lt=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective != "ce" and self.base.looks_inside:
            name = type(self.base).__name__
            raise ConfigError("objective", self.objective, f"{name} has a loss of its own: must be 'ce' over it")

    def plan(self, counts: Tensor, profile: str) -> Plan:
        """All real samples, and `volume` synthetic ones by `mode` (4.1.1)."""
        if profile == "none":
            return Plan(counts, torch.zeros_like(counts))
        return filled(counts, self.volume, self.mode)

    def tunes_generator(self, counts: Tensor, profile: str) -> bool:
        return self.tune and profile != "none" and int(counts.sum()) >= self.min_images

    def prepare(self, local: Local) -> Samples:
        local.real_ratio = self.real_ratio
        fake = self.plan(local.data.counts(local.classes), local.profile).fake
        return local.data + local.generate(fake) if int(fake.sum()) else local.data

    def tuning(self) -> Algorithm:
        """The loss of training, for the personal models (4.2) too."""
        return replace(self, base=Algorithm()) if self.objective != "ce" else Algorithm()

    @property
    def looks_inside(self) -> bool:
        return self.objective != "ce" or self.base.looks_inside

    def loss(self, local: Local, batch: Batch) -> Tensor:
        if self.objective == "ce":
            return self.base.loss(local, batch)
        target = one_hot(batch.y, local.classes).float()
        return binary_cross_entropy_with_logits(local.model(batch.x), target)
