"""FedBN: BatchNorm layers stay on the clients, all else is averaged.

Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch Normalization. ICLR 2021,
arXiv 2102.07623.

A layer is a BatchNorm by its type: going by "bn" in its name, as the authors' code and others do, shares those on the
shortcuts of a ResNet. A client that has not taken part yet has the layers of the first model.

Departure: clients are weighted by their samples; the paper averages uniformly, but over clients of equal size.

What crosses: all but BatchNorm's tensors, 0.998 of FedAvg's traffic for a ResNet-18. What stays: their scales, shifts
and statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkeel.algorithms.base import Algorithm
from fedkeel.models.split import Split
from fedkeel.registry import register


@register("algorithms", "fedbn")
@dataclass(frozen=True, kw_only=True)
class FedBN(Algorithm):
    """Algorithm 1. Without BatchNorm layers it is FedAvg."""

    paper: ClassVar[str] = "Li et al. 2021, arXiv 2102.07623"
    kind: ClassVar[Literal["global", "personal"]] = "personal"
    has_global: ClassVar[bool] = False

    def personal(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, _BatchNorm)

    def idle(self, model: Split, classes: int) -> str:
        found = any(isinstance(module, _BatchNorm) for module in model.modules())
        return "" if found else "the network has no BatchNorm layer that could stay on the clients, so this is FedAvg"
