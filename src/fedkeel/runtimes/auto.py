"""The runtime that is likely to be fastest here: clients one after another, in worker processes on idle cores, or on a
GPU several at once."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedkeel.errors import ConfigError
from fedkeel.registry import register
from fedkeel.rehearsal import rehearsed, rehearsing
from fedkeel.runtimes.base import Engine, Runtime
from fedkeel.runtimes.batched import Batched, Call, fitted
from fedkeel.runtimes.crew import cores
from fedkeel.runtimes.inprocess import InProcess
from fedkeel.runtimes.pool import Pool

if TYPE_CHECKING:
    from fedkeel.job import Job
    from fedkeel.local import Worker

STEPS = 3
"""Of the trial, after one that is not timed."""
WORTH = 0.1
"""Seconds of a round in one process below which workers do not pay for what they are sent and start with."""


@register("runtimes", "auto")
@dataclass(frozen=True, kw_only=True)
class Auto:
    """`pool` where a short trial says that a round is long enough and cores are idle, `batched` where one on a GPU says
    that it is faster, else `inprocess`. A run that is resumed keeps what it had."""

    remote: ClassVar[bool] = False

    def choose(self, job: Job, before: str) -> Engine:
        """What runs this job: what did `before` (a registered name, "" for none), where that can be here; else what is
        likely to be fastest."""
        if before == "inprocess":
            return InProcess()
        if job.device.type == "cuda":
            return faster(job, known=before == "batched")
        free = idle(cores(), os.getloadavg())
        if before == "pool" and can_fork(job):
            return staffed(free)
        pays = job.config.cohort > 1 and can_fork(job) and free > 1 and seconds(job) >= WORTH
        return staffed(free) if pays else InProcess()

    def start(self, job: Job) -> Runtime:
        """A runtime for this job."""
        return self.choose(job, "").start(job)


def can_fork(job: Job) -> bool:
    """Whether `pool` runs here at all."""
    return job.device.type == "cpu" and sys.platform == "linux" and min(job.config.workers or cores(), job.clients) > 1


def staffed(free: float) -> Pool:
    """Workers for so many idle cores; one core that is idle half of the time is one."""
    return Pool(cores=max(math.ceil(free), 2))


def idle(cores: int, load: Sequence[float]) -> float:
    """Cores with nothing to do; this process is not counted as busy. Two workers on one core are no faster than one."""
    return cores - max(load[0] - 1, 0)


def seconds(job: Job) -> float:
    """Of a round's training in one process, by a few steps on random images."""
    training = job.worker.training
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    rehearsed(job, server, 0, training.batch, 1)  # the first one also loads what is needed
    reply = rehearsed(job, server, 0, training.batch * STEPS, STEPS)
    job.worker.load(server)
    if reply.steps == 0:
        return 0.0
    held = float((job.plan.real + job.plan.fake).sum(1).double().mean())  # samples of a client
    steps = training.steps if training.steps is not None else training.epochs * held / training.batch
    limit = steps if training.max_steps is None else min(steps, training.max_steps)
    return job.config.cohort * limit * reply.seconds / reply.steps


def faster(job: Job, known: bool = False) -> Engine:
    """`batched` where it works, there are clients to train together and they take less time so, by a trial unless that
    is known; else `inprocess`."""
    try:
        several = min(job.config.cohort, job.config.lanes) > 1 and Batched().start(job)
        gains = several and (known or gain(job) > 1)
    except ConfigError:  # not with this method or network
        gains = False
    return Batched() if gains else InProcess()


def gain(job: Job) -> float:
    """How many times as long a few clients' few steps take one after another as at once, on random images; 0 where a
    client fails at once that does not fail alone. Raises ConfigError for a method that cannot be used so."""
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    clients = range(min(job.config.cohort, job.config.lanes))
    calls = [Call(client, None, job.mail(server, client)) for client in clients]
    samples = job.worker.training.batch * STEPS
    warm, timed = rehearsing(job, samples, 1), rehearsing(job, samples, STEPS)

    def apart(worker: Worker) -> set[int]:
        replies = (worker.fit(server, call.client, None, None, call.mail) for call in calls)
        return {reply.client for reply in replies if reply.failure}

    def together(worker: Worker) -> set[int]:
        return {reply.client for reply in fitted(worker, server, calls) if reply.failure}

    took, failed = list[float](), list[set[int]]()
    for way in (apart, together):
        before = way(warm)
        began = time.perf_counter()
        failed.append(before | way(timed))
        took.append(time.perf_counter() - began)
    job.worker.load(server)
    return 0.0 if failed[1] - failed[0] else took[0] / took[1]
