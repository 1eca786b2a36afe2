"""FedAMP: every client is pulled towards a mixture of all clients' models, in which those like its own weigh more.

Huang, Chu, Zhou, Wang, Liu, Pei, Zhang: Personalized Cross-Silo Federated Learning on Non-IID Data. AAAI 2021,
arXiv 2007.03797. Both the exact form and the heuristic one by cosines (HeurFedAMP).

The paper has all clients in every round. Here the server mixes the last model of each client that has ever sent one;
a client that has not yet holds the first model, which is its own mixture.

Departures: alpha and sigma depend on the scale of the weights, so the default finds them for the mixture: sigma is the
median squared distance between two clients' models, and alpha such that a client's own model weighs `self_weight` on
average. The proximal term does not take that alpha but 1: it would be a fraction of the squared distances, lambda/alpha
would tie each model to its mixture, the distances would shrink, and alpha with them (the authors' 10,000 to 10 make
lambda/alpha 0.0001 to 0.1). A given alpha counts in both, but in the mixture no larger than keeps every weight from
being negative: one alpha for all, since row by row the weights would no longer be symmetric and the models' sum no
longer conserved. The pull is at most 1 / learning rate, with which a step would land on the mixture. Mixtures and
distances are of trainable parameters; BatchNorm's statistics stay on the clients.

What crosses: the mixture down in place of a model, the change of the client's model up: FedAvg's traffic. What stays:
the client's model. There is no global one: the server's weights, the average of a round's models, are sent to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fedkeel.algorithms.base import Algorithm
from fedkeel.errors import ConfigError
from fedkeel.options import option
from fedkeel.records import Local, Server, Update
from fedkeel.registry import register
from fedkeel.weights import mean

HEURISTIC = (1e4, 25.0)
"""alpha and sigma of the heuristic form where none is given, of a public re-implementation."""


@register("algorithms", "fedamp")
@dataclass(frozen=True, kw_only=True)
class FedAMP(Algorithm):
    """Algorithm 1 with A(s) = 1 - exp(-s / sigma): u_i = sum_j xi_ij w_j, then w_i = argmin f_i(w) + lam/(2 alpha)
    |w - u_i|^2 by SGD."""

    paper: ClassVar[str] = "Huang et al. 2021, arXiv 2007.03797"
    kind: ClassVar[Literal["global", "personal"]] = "personal"
    has_global: ClassVar[bool] = False
    sums: ClassVar[bool] = False  # compares clients' models
    unused: ClassVar[tuple[str, ...]] = ("weights", "denominator")  # of an average that nobody is sent

    form: Literal["exact", "heuristic"] = option("exact", "weights by distance, or by cosine (HeurFedAMP)")
    lam: float = option(1.0, "strength of the proximal term, with alpha (lambda)", ge=0, grid=(0.01, 0.1, 1.0), off=0.0)
    alpha: float | None = option(
        None,
        "step of the mixture (alpha); not set: found from self_weight, and 1 in the proximal term, or 10,000 in the "
        "heuristic form",
        ge=0,
    )
    alpha_decay: float = option(0.1, "factor on alpha after every 30 rounds, in the heuristic form", gt=0, le=1)
    sigma: float | None = option(
        None,
        "scale of squared distances, or factor on cosines (sigma); not set: the median distance, or 25",
        gt=0,
        grid=(1.0, 25.0, 100.0),
    )
    self_weight: float = option(
        0.5, "weight of a client's own model: on average where alpha is not given, in the heuristic form for all",
        ge=0, le=1, grid=(0.3, 0.5, 0.7),
    )  # fmt: skip
    begin: Literal["own", "mixture"] = option("own", "where local training starts: the client's model, or the mixture")

    def __post_init__(self) -> None:
        if self.alpha == 0 and self.lam > 0:
            raise ConfigError("alpha", self.alpha, "an alpha of 0 makes the proximal term infinite: needs lam = 0")

    def off(self, rounds: int | None = None) -> Mapping[str, object]:
        if self.lam == 0 and self.begin == "own":  # else clients still start from their mixtures
            return {"lam": self.lam}
        if self.alpha == 0 and self.form == "exact":  # each mixture is the client's own model, as by a self_weight of 1
            return {"alpha": self.alpha}
        found = self.self_weight == 1 and (self.alpha is None or self.form == "heuristic")
        return {"self_weight": self.self_weight} if found else {}

    # once -------------------------------------------------------------------------------------------------------------

    def personal(self, name: str, module: nn.Module) -> bool:
        return name.rpartition(".")[2] in module._buffers

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        return {"w": params.clone()}

    # on a client ------------------------------------------------------------------------------------------------------

    def start(self, local: Local) -> None:
        if self.begin == "own":
            self.personalise(local)

    def personalise(self, local: Local) -> None:
        local.params.copy_(local.mine["w"])

    def correct(self, local: Local, grad: Tensor) -> Tensor:
        """Adds lam/alpha (w - u)."""
        if self.lam == 0:
            return grad
        alpha = float(local.mail["alpha"])  # 0 after so many rounds that it is too small for a float
        pull = 1 / local.lr if alpha <= self.lam * local.lr else self.lam / alpha
        return grad.add_(local.params - local.anchor, alpha=pull)

    def upload(self, local: Local) -> Update:
        own = local.params.clone()
        return Update(self.weight(local), own - local.mine["w"], keep={"w": own})

    # on the server ----------------------------------------------------------------------------------------------------

    def mail(self, server: Server, client: int) -> Mapping[str, Tensor]:
        assert server.lab is not None
        table = server.private.get("shelf", torch.empty(0, 2, dtype=torch.int64)).tolist()
        alpha = torch.tensor(self.step(server.round))
        known = [k for k, _ in table]
        if client not in known:  # its mixture is what it holds: the first model
            return {"params": server.private.get("first", server.params), "alpha": alpha}
        weights = self.mixture(server.private["likeness"].cpu(), server.round)
        mixed = torch.zeros_like(server.params)
        for (k, version), weight in zip(table, weights[known.index(client)].tolist(), strict=True):
            mixed.add_(server.lab.shelf.get(k, version)["w"].to(mixed.device), alpha=weight)
        return {"params": mixed, "alpha": alpha}

    def step(self, number: int) -> float:
        """alpha of the proximal term in round `number`."""
        if self.form == "exact":
            return 1.0 if self.alpha is None else self.alpha
        return (HEURISTIC[0] if self.alpha is None else self.alpha) * self.alpha_decay ** (number // 30)

    def mixture(self, likeness: Tensor, number: int) -> Tensor:
        """[M, M] the weights xi, rows summing to 1, from squared distances or cosines, [M, M], in round `number`."""
        if len(likeness) == 1:
            return torch.ones(1, 1)
        if self.form == "heuristic":
            return by_cosine(likeness, self.sigma or HEURISTIC[1], self.self_weight)
        others = likeness[~torch.eye(len(likeness), dtype=torch.bool)]
        sigma = self.sigma or float(others.median()) or 1.0  # all models equal: any scale will do
        return by_distance(likeness, sigma, None if self.alpha is None else self.step(number), self.self_weight)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        assert server.lab is not None
        shelf, device = server.lab.shelf, server.params.device
        versions = {int(k): int(v) for k, v in server.private.get("shelf", torch.empty(0, 2)).tolist()}
        former, changed = sorted(versions), set()
        first = server.private.get("first", server.params)

        def models() -> Iterator[tuple[float, tuple[Tensor, ...]]]:
            for update in updates:
                k = update.client
                before = shelf.get(k, versions[k])["w"].to(device) if k in versions else first
                w = before + update.delta
                shelf.put(k, server.round, {"w": w})
                versions[k] = server.round
                changed.add(k)
                yield update.weight, (w,)

        (average,) = mean(models())
        table = sorted(versions.items())
        shelf.retain(set(table))
        place = {k: at for at, (k, _) in enumerate(table)}
        likeness = torch.zeros(len(table), len(table))
        if former:
            places = torch.tensor([place[k] for k in former])
            likeness[places[:, None], places] = server.private["likeness"].cpu()
        for pair in combinations(place, 2):
            if not changed.isdisjoint(pair):
                two, one = (shelf.get(k, versions[k])["w"].to(device) for k in pair)
                i, j = (place[k] for k in pair)
                likeness[i, j] = likeness[j, i] = self.compare(one, two)
        private = {"shelf": torch.tensor(table), "likeness": likeness, "first": first}
        return replace(server, params=average, private=private)

    def compare(self, one: Tensor, other: Tensor) -> float:
        """Squared distance of two models, or their cosine in the heuristic form."""
        if self.form == "heuristic":
            return float(cosine_similarity(one, other, dim=0))
        return float((one - other).square().sum())


def by_distance(squared: Tensor, sigma: float, alpha: float | None, self_weight: float) -> Tensor:
    """xi_ij = alpha/sigma exp(-|w_i - w_j|^2 / sigma) off the diagonal, the rest of each row on it.

    squared: [M, M], M > 1. alpha: not given, it is such that the diagonal's mean is `self_weight`. In either case no
    larger than keeps the diagonal from being negative.
    """
    kernel = torch.exp(-squared.double() / sigma)
    kernel.fill_diagonal_(0.0)
    sums = kernel.sum(1)
    if float(sums.max()) == 0:  # all are infinitely far from each other
        return torch.eye(len(squared), dtype=kernel.dtype)
    alpha = (1 - self_weight) * sigma / float(sums.mean()) if alpha is None else alpha
    alpha = min(alpha, sigma / float(sums.max()))
    weights = kernel * (alpha / sigma)
    return weights + torch.diag(1 - weights.sum(1))


def by_cosine(cosine: Tensor, sigma: float, self_weight: float) -> Tensor:
    """xi_ii = `self_weight`, xi_ij in proportion to exp(sigma cos(w_i, w_j)) and summing to the rest ."""
    apart = (sigma * cosine.double()).masked_fill(torch.eye(len(cosine), dtype=torch.bool), -math.inf)
    return (1 - self_weight) * torch.softmax(apart, 1) + self_weight * torch.eye(len(cosine), dtype=apart.dtype)
