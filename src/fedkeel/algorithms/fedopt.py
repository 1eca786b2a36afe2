"""FedOpt: the clients' average change is a gradient for an optimiser on the server.

FedAdagrad, FedAdam, FedYogi: Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated
Optimization. ICLR 2021, arXiv 2003.00295.
FedAvgM: Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification.
2019, arXiv 1909.06335.

Departures: the average is weighted by samples, as in the papers' experiments; Algorithm 2 has it uniform
(`weights = "uniform"`). As printed there, v starts at tau^2 and nothing is corrected for the start at zero; the
experiments' code starts it at 0 and corrects (`v_init`, `bias_correction`). BatchNorm's statistics are averaged and
never go through the optimiser, which would turn variances negative.

What crosses: as FedAvg. The optimiser's state stays on the server.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedkeel.algorithms.base import Algorithm
from fedkeel.options import option
from fedkeel.records import Server, Update
from fedkeel.registry import register


@dataclass(frozen=True, kw_only=True)
class FedOpt(Algorithm):
    """What the family has in common."""

    paper: ClassVar[str] = "Reddi et al. 2021, arXiv 2003.00295"

    def change(self, server: Server, updates: Iterable[Update]) -> Tensor:
        """[P] Delta, the step that FedAvg would make: where FedAvg gets to from 0."""
        start = replace(server, params=torch.zeros_like(server.params))
        return super().aggregate(start, updates).params


@register("algorithms", "fedavgm")
@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedOpt):
    """m <- beta m + Delta, x <- x + eta_g m: no factor 1 - beta."""

    paper: ClassVar[str] = "Hsu et al. 2019, arXiv 1909.06335"
    sums: ClassVar[bool] = True  # momentum is of the average

    beta: float = option(0.9, "server momentum (beta)", ge=0, lt=1, grid=(0.7, 0.9, 0.97, 0.99), off=0.0)
    nesterov: bool = option(False, "Nesterov momentum: the step is Delta + beta m")
    server_lr: float = option(1.0, "server learning rate (eta_g)", gt=0, grid=(0.1, 0.3, 1.0))

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        change = self.change(server, updates)
        m = self.beta * server.private.get("m", torch.zeros_like(change)) + change
        step = change + self.beta * m if self.nesterov else m
        return replace(server, params=server.params + self.server_lr * step, private={**server.private, "m": m})


@dataclass(frozen=True, kw_only=True)
class Adaptive(FedOpt, ABC):
    """Algorithm 2, up to the rule for v."""

    sums: ClassVar[bool] = True  # so are both moments

    beta1: float = option(0.9, "decay of the mean of changes (beta_1)", ge=0, lt=1)
    tau: float = option(1e-3, "degree of adaptivity (tau)", gt=0, grid=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    server_lr: float = option(0.01, "server learning rate (eta_g)", gt=0, grid=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0))
    v_init: Literal["tau2", "zero"] = option("tau2", "v before the first round: tau^2 as printed, or 0")

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """[P] the next v, from the last one and the square of Delta."""

    def rate(self, updates: int) -> float:
        """The server learning rate of update number `updates`, counted from 1."""
        return self.server_lr

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        change, last = self.change(server, updates), server.private
        start = torch.full_like(change, self.tau**2 if self.v_init == "tau2" else 0.0)
        m = self.beta1 * last.get("m", torch.zeros_like(change)) + (1 - self.beta1) * change
        v = self.second(last.get("v", start), change**2)
        t = last.get("t", torch.tensor(0)) + 1
        step = self.rate(int(t)) * m / (v.sqrt() + self.tau)
        return replace(server, params=server.params + step, private={**last, "m": m, "v": v, "t": t})


@register("algorithms", "fedadagrad")
@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """v <- v + Delta^2."""

    beta1: float = option(0.0, "decay of the mean of changes (beta_1)", ge=0, lt=1)
    server_lr: float = option(0.1, "server learning rate (eta_g)", gt=0, grid=(1e-2, 3e-2, 0.1, 0.3, 1.0))

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@register("algorithms", "fedadam")
@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """v <- beta_2 v + (1 - beta_2) Delta^2."""

    beta2: float = option(0.99, "decay of the mean of squares (beta_2)", ge=0, lt=1)
    bias_correction: Literal["none", "adam"] = option(
        "none", "correction for m and v that start at zero: none as printed, or on the learning rate as in Adam"
    )

    def rate(self, updates: int) -> float:
        if self.bias_correction == "none":
            return self.server_lr
        return self.server_lr * math.sqrt(1 - self.beta2**updates) / (1 - self.beta1**updates)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@register("algorithms", "fedyogi")
@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)
