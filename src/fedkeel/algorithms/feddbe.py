"""FedDBE: a private vector takes up the shift of a client's features, a mean regulariser keeps the rest at a consensus.

Zhang, Hua, Cao, Wang, Song, Xue, Ma, Guan: Eliminating Domain Bias for Federated Learning in Representation Space.
NeurIPS 2023, arXiv 2311.14975.

In the first round all clients take part, train without the vector and send the running mean of their features; its
average over clients is the consensus, and stays. From then on a client's vector, at first zero, is added to each
feature it computes, in training and at test time, and the running mean of its features is drawn to the consensus.

Departures: the first round's models are averaged like any other's (the paper throws them away and starts again from the
first weights), so that it is a round of training too and not lost in comparisons by rounds. The vector's optimiser is
the model's, so under momentum it has momentum; it has no weight decay.

What crosses: as FedAvg, and one mean feature: up in the first round, down in the others. What stays: the vector. The
global model is the network without any vector, which is what a newcomer would start with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkeel.algorithms.base import Algorithm
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.records import Batch, Local, Server, Update
from fedkeel.registry import register
from fedkeel.weights import Rule, treat


@register("algorithms", "feddbe")
@dataclass(frozen=True, kw_only=True)
class FedDBE(Algorithm):
    """Loss CE(H(f + v), y) + kappa mean_d 1/2 (r - z_g)^2, r being the running mean of the features f."""

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2311.14975"
    sums: ClassVar[bool] = True  # of changes and of mean features
    kind: ClassVar[Literal["global", "personal"]] = "personal"

    kappa: float = option(50.0, "strength of the mean regulariser (kappa)", ge=0, grid=(0.1, 1.0, 10.0, 50.0, 100.0))
    mu: float = option(
        1.0, "weight of the present batch in the running mean (mu); 1 = the batch alone", gt=0, le=1, grid=(0.1, 0.5, 1)
    )
    vector_lr: float = option(1.0, "learning rate of the vector as a factor of the model's; 0 = it stays zero", ge=0)

    def off(self, rounds: int | None = None) -> Mapping[str, object]:
        alone = self.kappa == 0 and self.vector_lr == 0  # with either of them it is not FedAvg
        return {"kappa": self.kappa, "vector_lr": self.vector_lr} if alone else {}

    # once -------------------------------------------------------------------------------------------------------------

    def sends(self) -> tuple[str, ...]:
        return ("mean",)

    def build(self, model: Split) -> Split:
        return Shifted(model, Rule(lr=self.vector_lr, decay=False))

    def personal(self, name: str, module: nn.Module) -> bool:
        return name.startswith("shift.")

    def server_state(self, params: Tensor) -> dict[str, Tensor]:
        return {"consensus": params.new_empty(0)}  # z_g: empty until the first round is over

    def cohort(self, drawn: list[int], clients: int, number: int) -> list[int]:
        return list(range(clients)) if number == 0 else drawn

    # on a client ------------------------------------------------------------------------------------------------------

    def loss(self, local: Local, batch: Batch) -> Tensor:
        model, consensus = local.model, local.shared["consensus"]
        assert isinstance(model, Shifted)
        f = model.features(batch.x)
        mean = self.mu * f.mean(0)
        if "mean" in local.scratch:  # before the first batch of a round it is zero
            mean = mean + (1 - self.mu) * local.scratch["mean"]
        local.scratch["mean"] = mean.detach()  # so that the gradient goes through the present batch only
        if len(consensus) == 0:
            return cross_entropy(model.head(f), batch.y)
        loss = cross_entropy(model.head(model.shift(f)), batch.y)
        return loss + self.kappa * apart(mean, consensus) if self.kappa else loss

    def upload(self, local: Local) -> Update:
        update = super().upload(local)
        if len(local.shared["consensus"]):
            return update
        return replace(update, extra={"mean": local.scratch.get("mean", local.params.new_zeros(local.model.width))})

    # on the server ----------------------------------------------------------------------------------------------------

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        if len(server.shared["consensus"]):
            return super().aggregate(server, updates)
        total, consensus = 0.0, torch.zeros(())

        def watched() -> Iterator[Update]:
            nonlocal total, consensus
            for update in updates:
                consensus = consensus.to(server.params.device) + update.extra["mean"] * update.weight
                total += update.weight
                yield update

        after = super().aggregate(server, watched())
        return replace(after, shared={"consensus": consensus / total})


def apart(mean: Tensor, consensus: Tensor) -> Tensor:
    """The regulariser before kappa: the mean over dimensions, not the sum, of half the squared differences."""
    return 0.5 * (mean - consensus).square().mean()


class Shift(nn.Module):
    """Adds one learnable vector, at first zero, to features [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.vector


class Shifted(Split):
    """A network whose head sees features plus a vector, H(F(x) + v)."""

    def __init__(self, model: Split, rule: Rule) -> None:
        super().__init__(model.features, model.head, model.width)
        self.shift = Shift(model.width)
        treat(self.shift, "vector", rule)

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.shift(super().embed(x))
        return z
