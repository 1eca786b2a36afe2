"""SCAFFOLD: control variates cancel client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
ICML 2020, arXiv 1910.06378.

Departure: option II divides the displacement by the weight that the optimiser gave to the gradients, K under plain SGD
as printed, a(K, momentum) of FedNova under momentum; dividing by K there overestimates c_k by up to 1 / (1 - momentum).
Momentum that lasts from round to round brings gradients of earlier ones into the displacement: refused with option II.
`local.clip` biases option II, since what was clipped off is missing in the displacement.

What crosses: c down beside the model, the change of c_k up beside the model's: twice FedAvg's traffic both ways.
What stays: c_k.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedkeel.algorithms.base import Algorithm
from fedkeel.errors import ConfigError
from fedkeel.local import Training, full_gradient
from fedkeel.options import option
from fedkeel.records import Local, Server, Update
from fedkeel.registry import register
from fedkeel.weights import mean_and_total


@register("algorithms", "scaffold")
@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """Algorithm 1. Control variates cover trainable parameters only and start at zero, on every client."""

    paper: ClassVar[str] = "Karimireddy et al. 2020, arXiv 1910.06378"
    sums: ClassVar[bool] = True  # of changes and of control variates

    weights: Literal["samples", "uniform"] = option(
        "uniform", "the paper averages uniformly; samples weighs clients by size and c by n_k / n"
    )
    server_lr: float = option(1.0, "server learning rate (eta_g)", gt=0, grid=(0.1, 0.5, 1.0, 1.5))
    variate: Literal["displacement", "gradient"] = option(
        "displacement", "new c_k from the displacement (option II) or from the full gradient at x (option I)"
    )

    def __post_init__(self) -> None:
        if self.weights not in ("samples", "uniform"):  # as under [balance], which has a wider choice
            raise ConfigError("weights", self.weights, "c is the mean over all clients: must be 'uniform' or 'samples'")

    def sends(self) -> tuple[str, ...]:
        return ("c",)

    def server_state(self, params: Tensor) -> dict[str, Tensor]:
        return {"c": torch.zeros_like(params)}

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        return {"c": torch.zeros_like(params)}

    def training(self, training: Training, cohort: int) -> Training:
        if self.variate == "displacement" and training.optimiser == "keep" and training.momentum > 0:
            allowed = "must be 'reset' under momentum, unless algorithm.variate = 'gradient'"
            raise ConfigError("local.optimiser", "keep", f"{allowed}: gradients of earlier rounds would be in c_k")
        return training

    def correct(self, local: Local, grad: Tensor) -> Tensor:  # line 10
        return grad.sub_(local.mine["c"]).add_(local.shared["c"])

    def upload(self, local: Local) -> Update:  # lines 12 and 13
        c, c_k, moved = local.shared["c"], local.mine["c"], local.params - local.anchor
        if self.variate == "gradient":
            assert local.method is not None
            new = full_gradient(local, local.method)  # not self: what balances the data may have a loss of its own
        elif local.gradient_weight == 0:  # no step was made: nothing was learnt about the gradient
            new = c_k
        else:
            new = c_k - c - moved / (local.gradient_weight * local.lr)
        return Update(self.weight(local), moved, extra={"c": new - c_k}, keep={"c": new})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:  # lines 16 and 17
        (dx, dc), total = mean_and_total((update.weight, (update.delta, update.extra["c"])) for update in updates)
        share = self.part_of_all(server, total)  # so c stays the mean of all clients' c_k, the absent ones included
        step = self.server_lr * (share if self.denominator == "all" else 1.0)
        return replace(
            server,
            params=server.params + step * dx,
            shared={"c": server.shared["c"] + share * dc},
        )
