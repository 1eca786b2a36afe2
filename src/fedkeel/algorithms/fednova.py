"""FedNova: each client's change is divided by the work behind it, so that unequal work does not tilt the objective.

Wang, Liu, Liang, Joshi, Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization.
NeurIPS 2020, arXiv 2007.07481.

Departures: |a_k|_1 of a proximal term together with momentum is found by running that very optimiser on a constant
gradient; the authors' recursion for the two together counts a step twice (1.9 instead of 1 after one step), and their
code lets the term slip into the momentum. Server momentum works on the step itself, not on the step over the client's
learning rate: the same while that rate is constant, and the server need not know it. Gradient clipping and momentum
that lasts from round to round are not linear in the round's gradients: a_k takes no account of them.

What crosses: as FedAvg, and two numbers up: a_k and the number of steps. Nothing stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fedkeel.algorithms.fedprox import FedProx
from fedkeel.options import option
from fedkeel.records import Local, Phase, Server, Update
from fedkeel.registry import register
from fedkeel.weights import mean_and_total

if TYPE_CHECKING:
    from fedkeel.local import Training


@register("algorithms", "fednova")
@dataclass(frozen=True, kw_only=True)
class FedNova(FedProx):
    """x <- x + tau_eff sum p_k Delta_k / a_k, p_k over the participants.

    The local solver is FedProx's: with mu = 0, as by default, plain SGD or SGD with momentum.
    """

    paper: ClassVar[str] = "Wang et al. 2020, arXiv 2007.07481"
    sums: ClassVar[bool] = False  # divides each change by that client's work

    mu: float = option(0.0, "strength of the local solver's proximal term (mu)", ge=0, grid=(0.0, 1e-3, 1e-2, 1e-1))
    effective: Literal["gradients", "steps"] = option(
        "gradients",
        "tau_eff: mean over participants of a_k, or of their steps, as the authors' code has it when mu is not 0",
    )
    server_momentum: float = option(0.0, "momentum of the server's step (gamma)", ge=0, lt=1, grid=(0.0, 0.5, 0.9))

    def sends(self) -> tuple[str, ...]:
        return ("work",)

    def phases(self, local: Local, training: Training) -> Sequence[Phase]:
        local.scratch["momentum"] = torch.tensor([training.momentum, training.nesterov], dtype=torch.float64)
        return super().phases(local, training)

    def upload(self, local: Local) -> Update:
        a = local.gradient_weight
        if self.mu > 0:
            momentum, nesterov = local.scratch["momentum"].tolist()
            a = gradients(local.steps, local.lr * self.mu, momentum, bool(nesterov))
        work = torch.tensor([a, local.steps], dtype=torch.float64)
        return Update(self.weight(local), local.params - local.anchor, extra={"work": work})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        def terms() -> Iterable[tuple[float, tuple[Tensor, ...]]]:
            for update in updates:
                a = float(update.extra["work"][0])
                yield update.weight, (update.delta / (a or 1.0), update.extra["work"])  # 0 only without a step

        (direction, work), total = mean_and_total(terms())
        share = self.part_of_all(server, total) if self.denominator == "all" else 1.0
        step = direction * (share * float(work[0 if self.effective == "gradients" else 1]))  # tau_eff
        if self.server_momentum == 0:
            return replace(server, params=server.params + step)
        step = step + self.server_momentum * server.private.get("step", torch.zeros_like(step))
        return replace(server, params=server.params + step, private={**server.private, "step": step})


def gradients(steps: int, pull: float, momentum: float, nesterov: bool) -> float:
    """|a|_1, how many gradients are in the displacement: minus the displacement over eta of this optimiser after
    `steps` gradients of 1. pull: eta mu, the share of the way back that the proximal term makes in a step."""
    moved = velocity = 0.0
    for _ in range(steps):
        gradient = 1.0 - pull * moved
        velocity = momentum * velocity + gradient
        moved += gradient + momentum * velocity if nesterov else velocity
    return moved
