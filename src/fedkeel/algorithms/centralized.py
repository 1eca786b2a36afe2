"""Centralized: ordinary SGD on the data of all clients, brought to one place; the upper bound of the global methods.

Nothing to cite: it is training without federation.

A "round" is a part of the training, so that its curve can be laid beside federated ones. With `budget = "equal"` as
many samples pass through the network as in a round of the federated run: participation x local epochs passes over all
data or, where [local] counts steps, those of all clients in a round together. Passes are whole: where the product is
not, rounds have one more or less, so that the sum is right. With `budget = "given"` a round is what [local] says, on
all data. With `epochs` the run has that many passes, spread evenly over its rounds. Report the budget and the schedule
beside the result.

Departure: the optimiser's momentum always lasts from round to round, whatever `local.optimiser` says.

What crosses: the data themselves, before the first round, which is what federated learning is there to avoid; in the
records 0 bytes. What stays: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from fedkeel.algorithms.base import Algorithm
from fedkeel.options import option
from fedkeel.records import Local, Phase
from fedkeel.registry import register

if TYPE_CHECKING:
    from fedkeel.local import Training


@register("algorithms", "centralized")
@dataclass(frozen=True, kw_only=True)
class Centralized(Algorithm):
    """One client that holds everything and keeps its optimiser."""

    paper: ClassVar[str] = "none: pooled training"
    pooled: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ("weights", "denominator")  # of one client
    sums: ClassVar[bool] = False  # the data cross

    budget: Literal["equal", "given"] = option(
        "equal", "work in a round: as much as the clients of a round do together, or what [local] says"
    )
    epochs: int | None = option(
        None, "passes over all data in the whole run, instead of the budget (R-19; 200 is a usual cap)", ge=1
    )
    schedule: Literal["constant", "cosine"] = option(
        "constant",
        "learning rate: [local]'s, or that annealed round by round from its full value towards 0 in the last round",
    )

    def training(self, training: Training, cohort: int) -> Training:
        training = replace(training, optimiser="keep")
        if self.epochs is not None:
            return replace(training, steps=None, max_steps=None)
        if self.budget == "given":
            return training
        return replace(
            training,
            steps=None if training.steps is None else training.steps * cohort,
            max_steps=None if training.max_steps is None else training.max_steps * cohort,
            epochs=training.epochs * cohort,  # of single clients: a `local.clients`-th of them are passes over all
        )

    def phases(self, local: Local, training: Training) -> Sequence[Phase]:
        if self.schedule == "cosine":
            local.lr *= (1 + math.cos(math.pi * local.round / local.rounds)) / 2
        passes = Fraction(training.epochs, local.clients if self.budget == "equal" else 1)
        if self.epochs is not None:
            passes = Fraction(self.epochs, local.rounds)
        epochs = math.floor((local.round + 1) * passes) - math.floor(local.round * passes)
        return (Phase(epochs, training.steps),)
