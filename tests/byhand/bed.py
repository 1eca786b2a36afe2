"""Test bed Q: one scalar parameter, quadratic losses, closed forms.

f_1(w) = 1/2 * 1 * (w - 0)^2 with one sample, f_2(w) = 1/2 * 2 * (w - 3)^2 with three, w_0 = 1, eta = 0.1, two plain
full-batch gradient steps a round. One step maps w - b to (1 - eta a)(w - b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.clients import ClientStore
from fedkeel.local import Training, Worker
from fedkeel.models.split import Split
from fedkeel.records import Batch, Lab, Local, Reply, Samples, Server
from fedkeel.rng import Streams
from fedkeel.weights import Statistics

CURVATURE, OPTIMUM, SIZES = (1.0, 2.0), (0.0, 3.0), (1, 3)


class Scalar(Split):
    """A network that is its one parameter."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__(nn.Identity(), nn.Linear(1, 1, bias=False), 1)
        nn.init.constant_(self.head.weight, start)


class Quadratic:
    """The loss of the bed; mixed in front of a method."""

    def loss(self, local: Local, batch: Batch) -> Tensor:
        a, b = CURVATURE[local.client], OPTIMUM[local.client]
        w = next(local.model.parameters()).sum()
        return 0.5 * a * (w - b) ** 2


def on_quadratic(method: type[Algorithm]) -> type[Algorithm]:
    """`method` with the bed's loss."""
    return dataclass(frozen=True, kw_only=True)(type(method.__name__, (Quadratic, method), {}))


class Bed:
    """A server and its clients, driven round by round, through the library's own worker."""

    def __init__(
        self,
        method: Algorithm,
        *,
        model: Split | None = None,
        sizes: Sequence[int] = SIZES,
        training: Training | None = None,
        data: Sequence[Samples] | None = None,
        classes: int = 2,
        profiles: Sequence[str] | None = None,
        images: object = None,
        streams: Streams | None = None,
    ) -> None:
        self.method = method
        self.data = data or [
            Samples.real_ones(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))
            for n in sizes
        ]
        self.worker = Worker(
            model or Scalar(),
            method,
            training or Training(epochs=2, batch=8, lr=0.1),
            classes=classes,
            rounds=10,
            streams=streams or Streams(1),
            transform=plain_transform,
            data=self.data.__getitem__,
            profile=(profiles or ["constrained"] * len(self.data)).__getitem__,
            images=images or no_images,
            device=torch.device("cpu"),
        )
        first = self.worker.first_server(len(self.data), sum(len(part) for part in self.data))
        lab = Lab(
            weights=self.worker.weights,
            classes=classes,
            shape=tuple(self.data[0].x.shape[1:]),
            rounds=10,
            streams=(streams or Streams(1)).at("server"),
            transform=plain_transform,
            images=lambda counts, first: (images or no_images)(len(self.data), counts, first),
            shelf=ClientStore(),
            device=torch.device("cpu"),
        )
        self.server: Server = replace(first, layout=self.worker.weights.layout, lab=lab)
        self.states: dict[int, dict[str, Tensor]] = {}
        self.replies: list[Reply] = []

    def round(self, clients: Sequence[int] | None = None) -> Server:
        """One round with these clients (all by default)."""
        self.replies, self.sent = [], self.server.params[0].item()
        for client in range(len(self.data)) if clients is None else clients:
            mail = self.method.mail(self.server, client)
            reply = self.worker.fit(self.server, client, self.states.get(client), mail=mail)
            assert not reply.failure, reply.trace or reply.failure
            self.replies.append(reply)
        updates = [replace(reply.update, client=reply.client, buffers=reply.buffers) for reply in self.replies]
        after = self.method.aggregate(self.server, iter(updates))
        if after.buffers is self.server.buffers:  # as a run does: no method has said otherwise
            statistics = Statistics(self.server.layout, "mean")
            for update in updates:
                statistics.add(update.buffers, update.weight)
            average = statistics.average()
            after = after if average is None else replace(after, buffers=average)
        self.server = replace(after, round=self.server.round + 1)
        for reply in self.replies:
            self.states[reply.client] = dict(reply.state)
        return self.server

    @property
    def x(self) -> float:
        """The global scalar."""
        return self.server.params.item()

    def y(self, client: int) -> float:
        """The local model of the last round, for a client that took part."""
        reply = next(reply for reply in self.replies if reply.client == client)
        return self.sent + reply.update.delta.item()


def plain_transform(x: Tensor, *, rng: object, augment: object, device: torch.device) -> Tensor:
    """Pixels as they are."""
    return x.float().to(device)


def no_images(client: int, counts: Tensor, first: int) -> Samples:
    """For methods that must not generate."""
    raise AssertionError(f"client {client} asked for {counts.tolist()} images")
