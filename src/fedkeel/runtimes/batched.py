"""Several clients at a time in this process, their steps one operation each: for small networks on a GPU.

The clients of a group stand as the rows of one matrix, [clients, parameters], and torch.func maps the gradient over its
rows. Hooks of the method are called client by client, as everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from fedkeel.algorithms.base import Algorithm
from fedkeel.errors import ConfigError
from fedkeel.local import Measure, Worker, payload, scheduled, step, tried
from fedkeel.models.split import Split
from fedkeel.records import Batch, Local, Reply, Server
from fedkeel.registry import register
from fedkeel.runtimes.inprocess import InProcessRuntime

if TYPE_CHECKING:
    from fedkeel.job import Job


@register("runtimes", "batched")
@dataclass(frozen=True, kw_only=True)
class Batched:
    """One process, up to `lanes` clients at once. Numbers are those of `inprocess` but for the last bits."""

    remote: ClassVar[bool] = False

    def start(self, job: Job) -> BatchedRuntime:
        """A runtime for this job. Raises ConfigError where clients cannot train together."""
        if why := refused(job):
            raise ConfigError("runtime", "batched", f"{why}: use inprocess")
        return BatchedRuntime(job)


def refused(job: Job) -> str:
    """Why clients of this job cannot train together, "" when they can."""
    worker, training = job.worker, job.worker.training
    name, layout = type(job.method).__name__, worker.weights.layout
    if job.method.looks_inside:
        return f"the loss of {name} is more than cross-entropy of what the network says"
    if layout.own:
        return f"under {name} clients have parameters of their own"
    if layout.total > layout.trained or layout.counters or layout.own_counters:
        return "the network keeps statistics (BatchNorm), which clients at once cannot; model.norm = 'group' goes"
    if any(entry.rule.still for entry in layout.entries):
        return "the network has parameters without requires_grad"
    if training.optimiser == "keep":
        return "momentum that lasts on the client (local.optimiser = 'keep') is not kept here"
    if training.precision != "float32":
        return f"local.precision = {training.precision!r} is not for clients at once"
    if training.compile:
        return "local.compile = true is not for clients at once"
    x = torch.zeros(2, 2, *job.data.shape, device=job.device)
    try:
        gradients(worker, worker.weights.flat.repeat(2, 1), x, torch.zeros(2, 2, dtype=torch.int64, device=job.device))
    except RuntimeError as error:
        return f"torch.func cannot map over this network ({str(error).strip().splitlines()[0]})"
    return ""


class BatchedRuntime(InProcessRuntime):
    """See runtimes/base.py."""

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        job, lanes = self.job, self.job.config.lanes
        for first in range(0, len(clients), lanes):
            calls = (
                Call(
                    client,
                    job.store.open(client, accepted.get(client)),
                    job.mail(server, client),
                    job.measure if client in measure else None,
                )
                for client in clients[first : first + lanes]
            )
            for reply in fitted(job.worker, server, calls):
                yield self.kept(server, reply)


@dataclass(frozen=True)
class Call:
    """What a client's round starts from, beside what the server sent to all (see `Worker.fit`)."""

    client: int
    state: Mapping[str, Tensor] | None
    mail: Mapping[str, Tensor]
    measure: Measure | None = None


def fitted(worker: Worker, server: Server, calls: Iterable[Call]) -> Iterator[Reply]:
    """The replies of a group, each as `Worker.fit` makes it, but that a group's seconds are shared out evenly."""
    began, received = time.perf_counter(), []
    lanes: list[Lane | Reply] = []
    for call in calls:
        received.append(payload(server, call.mail))
        lanes.append(tried(call.client, partial(opened, worker, server, call)))
    group = Group(worker, [lane for lane in lanes if isinstance(lane, Lane)])
    group.train()
    each = (time.perf_counter() - began) / len(lanes)
    for lane, size in zip(lanes, received, strict=True):
        began = time.perf_counter()
        reply = lane if isinstance(lane, Reply) else group.reply(lane)
        yield worker.charged(reply, each + time.perf_counter() - began, size)


@dataclass
class Lane:
    """A client whose round has begun. before: what was measured then. params: [P] live, once it is in a group a row of
    the group's. failed: its reply, once it has failed."""

    local: Local
    measure: Measure | None
    before: Mapping[str, float]
    params: Tensor
    failed: Reply | None = None


def opened(worker: Worker, server: Server, call: Call) -> Lane:
    """This client, ready to train."""
    local, before = worker.begin(server, call.client, call.state, call.measure, call.mail)
    return Lane(local, call.measure, before, worker.weights.flat.clone())


class Elsewhere(Split):
    """Stands for the network of a client while it trains in a group, where it is but a row of numbers."""

    def __init__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> NoReturn:
        why = "the method reads `local.model` between steps, where clients at once have none: use inprocess"
        raise ConfigError("runtime", "batched", why)

    def __call__(self, *inputs: object) -> NoReturn:
        self.__getattribute__("__call__")


class Group:
    """Clients that train at once."""

    def __init__(self, worker: Worker, lanes: Sequence[Lane]) -> None:
        self.worker, self.lanes, count = worker, lanes, len(lanes)
        layout, device = worker.weights.layout, worker.device
        self.params = torch.stack([lane.params for lane in lanes]) if lanes else torch.empty(0, layout.total)
        self.velocity = torch.zeros_like(self.params) if worker.training.momentum > 0 else None
        self.totals = torch.zeros(count, device=device)
        self.spans = layout.spans()
        for lane, row in zip(lanes, self.params, strict=True):
            lane.params = lane.local.params = row
            lane.local.model = Elsewhere()

    def reply(self, lane: Lane) -> Reply:
        """Of a client that has trained. The network becomes this client's only now: what the server does with the reply
        before this one may use it."""
        if lane.failed is not None:
            return lane.failed
        self.worker.weights.flat.copy_(lane.params)
        lane.local.model, lane.local.params = self.worker.model, self.worker.weights.params
        return tried(lane.local.client, lambda: self.worker.finish(lane.local, lane.measure, lane.before))

    def train(self) -> None:
        """The SGD loop of `local.train`; a client that has fewer batches than others stops earlier."""
        self.worker.model.train()
        left = {number: self.batches(number) for number in range(len(self.lanes))}
        while left:
            together: dict[tuple[int, float], list[tuple[int, Batch]]] = {}
            for number, stream in list(left.items()):
                lane = self.lanes[number]
                batch = None if lane.failed else tried(lane.local.client, partial(next, stream, None))
                if isinstance(batch, Reply):
                    lane.failed = batch
                if isinstance(batch, Batch):
                    together.setdefault((len(batch), lane.local.lr), []).append((number, batch))
                else:
                    del left[number]
            for rows in together.values():
                self.step(rows)

    def batches(self, number: int) -> Iterator[Batch]:
        """All of this client's round, a step each."""
        local, training = self.lanes[number].local, self.worker.training
        for phase in self.worker.algorithm.phases(local, training):
            if not phase.shared:
                raise ValueError("nothing moves in this phase: the client has no parameters of its own")
            if self.velocity is not None:
                self.velocity[number].zero_()
            yield from scheduled(local, training, phase, self.totals[number])
            if local.steps and not math.isfinite(local.loss):
                return

    @torch.no_grad()
    def step(self, rows: Sequence[tuple[int, Batch]]) -> None:
        """One step of these clients, whose batches are equally large and whose learning rates are the same."""
        training, numbers, batches = self.worker.training, *zip(*rows, strict=True)
        index = slice(None) if len(rows) == len(self.lanes) else list(numbers)  # the former copies nothing
        params, lanes = self.params[index], [self.lanes[number] for number in numbers]
        velocity = None if self.velocity is None else self.velocity[index]
        x, y = torch.stack([batch.x for batch in batches]), torch.stack([batch.y for batch in batches])
        found = tried(-1, partial(gradients, self.worker, params, x, y))
        if isinstance(found, Reply):
            if len(rows) == 1:
                lanes[0].failed = replace(found, client=lanes[0].local.client)
            else:
                for row in rows:  # whose mistake is it?
                    self.step([row])
            return
        grads, losses = found
        self.correct(lanes, grads)
        if training.clip is not None:
            grads.mul_(torch.clamp(training.clip / (grads.norm(dim=1, keepdim=True) + 1e-6), max=1.0))
        for span, rule, count in self.spans:
            for one in range(len(rows)) if rule.rows else (slice(None),):
                part = None if velocity is None else velocity[one, span]
                step(params[one, span], grads[one, span], part, training, lanes[0].local.lr, rule, count)
        if isinstance(index, list):
            self.params[index] = params
            if self.velocity is not None and velocity is not None:
                self.velocity[index] = velocity
        self.totals[index] += losses * len(batches[0])

    def correct(self, lanes: Sequence[Lane], grads: Tensor) -> None:
        """The method's corrections, in place; [S, P]."""
        algorithm = self.worker.algorithm
        if type(algorithm).correct is Algorithm.correct:
            return
        for lane, grad in zip(lanes, grads, strict=True):
            corrected = tried(lane.local.client, partial(algorithm.correct, lane.local, grad))
            if isinstance(corrected, Reply):
                lane.failed = corrected
            elif corrected.data_ptr() != grad.data_ptr():
                grad.copy_(corrected)


def gradients(worker: Worker, params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[S, P] gradients and [S] losses of S clients' networks ([S, P]), each on its own batch ([S, B, ...], [S, B])."""
    layout = worker.weights.layout

    def loss(named: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(worker.model, named, (x,)), y)

    def gradient(flat: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        grads, value = grad_and_value(loss)(layout.named(flat), x, y)
        return torch.cat([entry.flat(grads[entry.name]) for entry in layout.entries]), value

    grads, losses = vmap(gradient)(params, x, y)
    return grads, losses
