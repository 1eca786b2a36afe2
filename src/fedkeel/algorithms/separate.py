"""Separate: every client trains alone; the lower reference for personal models.

Nothing to cite: it is what each client can do without the others.

All clients start from the same weights. A round is a client's local training, so that the work is that of the federated
methods; with `train_all = false` only those drawn train, so that it is that of the same clients.

Departure: the optimiser's momentum always lasts from round to round, whatever `local.optimiser` says, as there is
nothing between two rounds of a client that could end it.

What crosses: nothing. What stays: the model, its BatchNorm statistics, the momentum. There is no global model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.options import option
from fedkeel.registry import register

if TYPE_CHECKING:
    from fedkeel.local import Training


@register("algorithms", "separate")
@dataclass(frozen=True, kw_only=True)
class Separate(Algorithm):
    """FedAvg of which every tensor is the client's own."""

    paper: ClassVar[str] = "none: local training only"
    kind: ClassVar[Literal["global", "personal"]] = "personal"
    has_global: ClassVar[bool] = False
    sums: ClassVar[bool] = False  # nothing crosses
    unused: ClassVar[tuple[str, ...]] = ("weights", "denominator")  # there is no average

    train_all: bool = option(True, "all clients train in every round, not only those drawn for it")

    def personal(self, name: str, module: nn.Module) -> bool:
        return True

    def cohort(self, drawn: list[int], clients: int, number: int) -> list[int]:
        return list(range(clients)) if self.train_all else drawn

    def training(self, training: Training, cohort: int) -> Training:
        return replace(training, optimiser="keep")
