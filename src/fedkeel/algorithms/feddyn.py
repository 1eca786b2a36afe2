"""FedDyn: a dynamic regulariser makes the clients' stationary points those of the global objective.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama: Federated Learning Based on Dynamic Regularization.
ICLR 2021, arXiv 2111.04263.

Departures: local problems are solved by some steps of SGD, so that g_k is what Algorithm 1 writes, not exactly the
gradient at theta_k. Gradients are clipped, as in the authors' code (the text has no clipping), whole: there the
quadratic term, which comes by weight decay, escapes it. Averages are uniform as printed; with `weights = "samples"`
clients count by size in both the mean and h, which then is the weighted mean of the g_k.

The server's model is reported, and beside it, as by the authors, the mean of the participants' models, from which h is
not subtracted: `method/participants/accuracy` and `.../loss` in the records.

What crosses: as FedAvg, uniform weights; with `alpha_scaling` also one number down. What stays: g_k on the client, h on
the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedkeel.algorithms.base import Algorithm
from fedkeel.errors import ConfigError
from fedkeel.options import option
from fedkeel.records import Local, Server, Update
from fedkeel.registry import register
from fedkeel.weights import mean_and_total


@register("algorithms", "feddyn")
@dataclass(frozen=True, kw_only=True)
class FedDyn(Algorithm):
    """Algorithm 1. Local objective f_k(w) - <g_k, w> + alpha/2 |w - theta|^2, over trainable parameters only.

    Small alpha does not make it FedAvg: h / alpha does not depend on its scale. FedAvg is alpha = 0 without h.
    """

    paper: ClassVar[str] = "Acar et al. 2021, arXiv 2111.04263"
    sums: ClassVar[bool] = True  # h is a sum, too

    weights: Literal["samples", "uniform"] = option(
        "uniform", "the paper averages uniformly; samples weighs clients by size, in the mean and in h"
    )
    alpha: float = option(0.01, "strength of the regulariser (alpha)", ge=0, grid=(1e-3, 1e-2, 1e-1), off=0.0)
    clip: float = option(10.0, "largest norm of the regularised gradient; 0 = as large as it is", ge=0)
    alpha_scaling: Literal["none", "inverse_size"] = option(
        "none", "one alpha for all, or alpha (mean n) / n_k on client k as in the authors' code"
    )
    server_correction: bool = option(True, "subtract h / alpha from the mean of the local models")

    def __post_init__(self) -> None:
        if self.weights not in ("samples", "uniform"):  # as under [balance], which has a wider choice
            raise ConfigError("weights", self.weights, "h is a mean over all clients: must be 'uniform' or 'samples'")
        if self.alpha == 0 and self.server_correction:
            raise ConfigError("alpha", self.alpha, "must be > 0, since h is divided by it (server_correction)")

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        return {"g": torch.zeros_like(params)}

    def mail(self, server: Server, client: int) -> Mapping[str, Tensor]:
        if self.alpha_scaling == "none":
            return {}
        return {"mean_size": torch.tensor(server.samples / server.clients)}

    def strength(self, local: Local) -> float:
        """This client's alpha."""
        if self.alpha_scaling == "none":
            return self.alpha
        return self.alpha * float(local.mail["mean_size"]) / len(local.data)

    def correct(self, local: Local, grad: Tensor) -> Tensor:
        grad.add_(local.params - local.anchor, alpha=self.strength(local)).sub_(local.mine["g"])
        if self.clip > 0:
            scale = self.clip / (grad.norm() + 1e-6)
            if scale.is_cuda or scale < 1:  # to look at it would stop a GPU
                grad.mul_(torch.clamp(scale, max=1.0))
        return grad

    def upload(self, local: Local) -> Update:
        moved = local.params - local.anchor
        return Update(self.weight(local), moved, keep={"g": local.mine["g"] - self.strength(local) * moved})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        (moved,), total = mean_and_total((update.weight, (update.delta,)) for update in updates)
        share = self.part_of_all(server, total)  # so h stays the mean of all clients' g_k, the absent ones included
        params = server.params + (share if self.denominator == "all" else 1.0) * moved
        if not self.server_correction:
            return replace(server, params=params)
        h = server.private.get("h", torch.zeros_like(moved)) - self.alpha * share * moved
        after = replace(server, params=params - h / self.alpha, private={**server.private, "h": h})
        return replace(after, beside={"participants": server.params + moved})
