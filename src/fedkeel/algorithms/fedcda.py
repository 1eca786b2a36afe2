"""FedCDA: the server averages, for each client, that one of its last models which goes best with the others'.

Wang, Xu, Li, Xu, Li, Zhang: FedCDA: Federated Learning with Cross-round Divergence-aware Aggregation. ICLR 2024
(OpenReview nbPGqeH3lt).

What the paper leaves open is read as: a client that was never drawn is left out of the mean until it has a model; a
client with fewer than K models chooses among those; losses are those reported with a model, never measured anew; groups
differ by at most one in size; during warm-up aggregation is FedAvg's and a participant's newest model its chosen one.
The average of chosen models is a plain one, as printed: `weights` and `denominator` count during the warm-up only.

Departures: where a group would have more than 4096 combinations to try, there are more groups than asked for. BatchNorm
statistics are no part of the choice; they are averaged as the chosen models are (`local.bn_var` does not apply).

With unnormalised weights the variance outweighs the loss by far under the paper's L = 1. After the warm-up, records say
how much both are for the chosen models: `method/loss` and `method/variance` (with its factor L/2).

What crosses: as FedAvg, and one number up, the mean loss of the last local epoch. Nothing stays on clients; the server
keeps the last K models of each client (on the shelf, on disk past a budget).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedkeel.algorithms.base import Algorithm
from fedkeel.local import losses
from fedkeel.options import option
from fedkeel.records import Local, Server, Update
from fedkeel.registry import register
from fedkeel.weights import mean

MOST = 4096
"""Combinations tried for a group."""
CHUNK = 1 << 20
"""Elements of each model that are in double precision at a time."""


@dataclass(frozen=True)
class Model:
    """One model of a client on the shelf: the round it is from, the loss reported with it, whether it is the chosen."""

    client: int
    version: int
    loss: float
    chosen: bool


@register("algorithms", "fedcda")
@dataclass(frozen=True, kw_only=True)
class FedCDA(Algorithm):
    """Algorithm 1 with the approximate selection of section 3.3: chosen are the w_k that make
    mean F_k(w_k) + L/2 mean |w_k|^2 - L/2 |mean w_k|^2 least."""

    paper: ClassVar[str] = "Wang et al., ICLR 2024"
    sums: ClassVar[bool] = False  # chooses among clients' models

    kept: int = option(3, "models kept of each client (K)", ge=1, grid=(1, 2, 3, 4), off=1)
    groups: int = option(3, "groups of participants, whose models are chosen one group after another (b)", ge=1)
    smoothness: float = option(1.0, "weight of the models' variance against their mean loss (L)", ge=0)
    warmup: int = option(50, "first rounds, in which aggregation is FedAvg's", ge=0)

    def off(self, rounds: int | None = None) -> Mapping[str, object]:
        late = rounds is not None and self.warmup >= rounds
        return {**super().off(rounds), **({"warmup": self.warmup} if late else {})}

    def sends(self) -> tuple[str, ...]:
        return ("loss",)

    def upload(self, local: Local) -> Update:
        # without a step there was no epoch to have a loss
        loss = local.loss if local.steps else float(losses(local, local.samples).mean())
        return replace(super().upload(local), extra={"loss": torch.tensor(loss)})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        assert server.lab is not None
        shelf, models, waiting = server.lab.shelf, read(server), list[int]()

        def shelved() -> Iterator[Update]:
            for update in updates:
                assert update.buffers is not None
                state = {"params": (server.params + update.delta).cpu(), "buffers": update.buffers.cpu()}
                shelf.put(update.client, server.round, state)
                newest = Model(update.client, server.round, float(update.extra["loss"]), True)
                older = [replace(model, chosen=False) for model in models.get(update.client, [])]
                models[update.client] = [newest, *older[: self.kept - 1]]
                waiting.append(update.client)
                yield update

        if server.round < self.warmup:
            after = super().aggregate(server, shelved())
        else:
            for _ in shelved():
                pass
            for group in self.split(waiting, server.lab.streams("groups")):
                self.choose(server, models, group, waiting)
                waiting = [client for client in waiting if client not in group]
            after = averaged(server, models, self.smoothness)
        rows = [model for client in sorted(models) for model in models[client]]
        shelf.retain({(model.client, model.version) for model in rows})
        table = {
            "shelf": torch.tensor([[model.client, model.version] for model in rows]),
            "loss": torch.tensor([model.loss for model in rows], dtype=torch.float64),
            "chosen": torch.tensor([model.chosen for model in rows]),
        }
        return replace(after, private=table)

    def split(self, participants: list[int], rng: torch.Generator) -> list[list[int]]:
        """The participants in random groups of about the same size."""
        largest = len(participants)
        while largest > 1 and self.kept > 1 and self.kept**largest > MOST:
            largest -= 1
        number = min(len(participants), max(self.groups, -(-len(participants) // largest)))
        order = torch.randperm(len(participants), generator=rng)
        return [[participants[i] for i in part.tolist()] for part in torch.tensor_split(order, number)]

    def choose(self, server: Server, models: dict[int, list[Model]], group: list[int], waiting: list[int]) -> None:
        """Chooses a model of each client in `group`, given the chosen ones of all clients but those `waiting`."""
        candidates = [model for client in group for model in models[client]]
        if len(candidates) == len(group):
            return
        # the variance does not depend on the origin: seen from x, models are short and little is lost to rounding
        total, squares, fixed = torch.zeros_like(server.params), 0.0, []
        for client in sorted(models.keys() - set(waiting)):
            fixed.append(chosen(models[client]))
            moved = fetched(server, fixed[-1])[0]
            total += moved
            squares += float(gram([moved]))
        combinations = torch.cartesian_prod(
            *(torch.tensor([candidates.index(model) for model in models[client]]) for client in group)
        ).view(-1, len(group))
        values = objective(
            gram([total, *(fetched(server, model)[0] for model in candidates)]),
            torch.tensor([model.loss for model in candidates], dtype=torch.float64),
            combinations,
            (len(fixed), squares, sum(model.loss for model in fixed)),
            self.smoothness,
        )
        least = int((values == values.min()).nonzero()[0])  # the first, with the newest models, of equals
        best = {candidates[i] for i in combinations[least].tolist()}
        for client in group:
            models[client] = [replace(model, chosen=model in best) for model in models[client]]


def objective(
    products: Tensor, losses: Tensor, combinations: Tensor, fixed: tuple[int, float, float], smoothness: float
) -> Tensor:
    """[M] mean loss + L/2 variance of the fixed models together with each combination of candidates.

    products: [1 + C, 1 + C] inner products of the fixed models' sum (first) and the candidates. losses: [C].
    combinations: [M, G] numbers of candidates. fixed: how many there are, the sums of their squared norms and losses.
    """
    number, squares, loss = fixed
    n = number + combinations.shape[1]
    among = products[1:, 1:]
    length = among.diagonal()[combinations].sum(1)
    total = products[0, 0] + 2 * products[0, 1:][combinations].sum(1)
    total = total + among[combinations[:, :, None], combinations[:, None, :]].sum((1, 2))
    variance = (squares + length) / n - total / n**2
    return (loss + losses[combinations].sum(1)) / n + smoothness / 2 * variance


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """[V, V] inner products of the vectors, in double precision, on the CPU."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for parts in zip(*(torch.split(vector, CHUNK) for vector in vectors), strict=True):
        rows = torch.stack(parts).double()
        products += (rows @ rows.T).cpu()
    return products


def averaged(server: Server, models: Mapping[int, list[Model]], smoothness: float) -> Server:
    """The mean of all clients' chosen models, and of their statistics; the objective's two terms are in `metrics`."""
    squares, selection = 0.0, [chosen(models[client]) for client in sorted(models)]

    def moves() -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        nonlocal squares
        for model in selection:
            moved, buffers = fetched(server, model)
            squares += float(gram([moved])) / len(selection)
            yield 1.0, (moved, buffers)

    step, buffers = mean(moves())
    loss = sum(model.loss for model in selection) / len(selection)
    terms = {"loss": loss, "variance": smoothness / 2 * (squares - float(gram([step])))}
    return replace(server, params=server.params + step, buffers=buffers, metrics=terms)


def fetched(server: Server, model: Model) -> tuple[Tensor, Tensor]:
    """A model from the shelf: its parameters less the server's ([P]), and its BatchNorm statistics ([B])."""
    assert server.lab is not None
    state = server.lab.shelf.get(model.client, model.version)
    return state["params"].to(server.params.device) - server.params, state["buffers"].to(server.params.device)


def chosen(models: Sequence[Model]) -> Model:
    """The chosen one of a client's models."""
    return next(model for model in models if model.chosen)


def read(server: Server) -> dict[int, list[Model]]:
    """What the server has on the shelf: each client's models, the newest first."""
    models: dict[int, list[Model]] = {}
    if "shelf" in server.private:
        columns = (server.private[name].tolist() for name in ("shelf", "loss", "chosen"))
        for (client, version), loss, picked in zip(*columns, strict=True):
            models.setdefault(client, []).append(Model(client, version, loss, picked))
    return models
