"""Worker processes of the section [ray]: what travels to one and back, and what it does with that.

Tensors travel as bytes with their type beside them, bit-exact in any type, which Ray moves without copying.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkeel.errors import ConfigError
from fedkeel.records import Samples, Server
from fedkeel.registry import register
from fedkeel.runtimes.boxes import Box, boxed, unboxed
from fedkeel.runtimes.crew import Answer, Hand

if TYPE_CHECKING:
    from fedkeel.config import Config
    from fedkeel.job import Job


@dataclass(frozen=True)
class Setup:
    """What a worker process is made from. data: where its data set lies in the object store, boxed. counts: as in
    `Job`. things: what the user registered, by room and name. folder: the working directory. adapters: as in `Job`."""

    config: Config
    things: Mapping[tuple[str, str], type]
    folder: str
    driver: str
    data: Any
    counts: Box
    adapters: Mapping[int, dict[str, object]]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """What a worker process is asked to do for a client. `server` and `samples` lie in the object store; state, mail
    and more: as in `Hand.fit` and `Hand.curve`, boxed."""

    client: int
    server: Any
    samples: Any
    state: Mapping[str, Box] | None
    mail: Mapping[str, Box]
    more: Any


def versions() -> dict[str, str]:
    """Of what has to be the same in all processes, whatever device PyTorch was built for."""
    return {package: version(package).partition("+")[0] for package in ("fedkeel", "torch")}


class Actor:
    """A worker process: one job, made at the first call, and a bounded share of clients' samples."""

    def __init__(self, paths: Sequence[str], setup: Sequence[Any]) -> None:
        """paths: where the server's process finds modules, needed for what is the user's own in `setup`, which lies in
        the object store."""
        self._paths, self._ref = paths, setup[0]
        self.hand = Hand(self._job)
        self._share: OrderedDict[int, tuple[Box, Box]] = OrderedDict()  # the client that ran last stands last
        self._server: tuple[str, Server] | None = None

    def hello(self) -> Answer:
        """Makes the job."""

        def work() -> None:
            for package, wanted in self._setup.versions.items():
                if (here := versions()[package]) != wanted:
                    where = f"{package} {here} on {platform.node()}, {wanted} where the run was started"
                    raise ConfigError("ray.address", self._setup.config.ray.address, where)
            _ = self.hand.job

        return self.hand.answer(work)

    def fit(self, call: Call) -> Answer:
        """A `Reply`, boxed."""
        return self.hand.answer(lambda: boxed(self.hand.fit(*self._open(call), call.more)))

    def curve(self, call: Call) -> Answer:
        """A `Curve`."""
        return self.hand.answer(lambda: self.hand.curve(*self._open(call), call.more.tensor(torch.device("cpu"))))

    def generate(self, clients: Sequence[int], samples: Mapping[int, Any]) -> Answer:
        """How many images, and what was tuned. samples: of clients that tune."""
        for client, ref in samples.items():
            self._hold(client, ref)
        return self.hand.answer(lambda: self.hand.generate(clients, tuple(samples)))

    def settle(self, adapters: Mapping[int, dict[str, object]]) -> None:
        """See `Hand`."""
        self.hand.settle(adapters)

    @cached_property
    def _setup(self) -> Setup:
        import ray

        sys.path.extend(path for path in self._paths if path not in sys.path)
        setup: Setup = ray.get(self._ref)
        return setup

    def _job(self) -> Job:
        import ray

        from fedkeel.job import Holdings, Job
        from fedkeel.partition.manifest import Partition

        setup = self._setup
        with suppress(OSError):  # relative paths of the configuration, where this is the same machine
            os.chdir(setup.folder)
        torch.set_num_threads(setup.config.threads)
        for (where, name), thing in setup.things.items():
            register(where, name)(thing)
        cpu = torch.device("cpu")
        data = unboxed(ray.get(setup.data), cpu, copy=False)
        counts = setup.counts.tensor(cpu)
        nothing = (torch.empty(0, dtype=torch.int64),) * setup.config.clients
        partition = Partition("ray", {}, setup.config.seed, "", nothing, counts)
        job = Job(setup.config, holdings=Holdings(data, partition, self._samples))
        job.adapters.update(setup.adapters)
        return job

    def _open(self, call: Call) -> tuple[Server, int, Mapping[str, Tensor] | None, Mapping[str, Tensor]]:
        import ray

        self._hold(call.client, call.samples)
        if self._server is None or self._server[0] != call.server.hex():
            server = self._place(ray.get(call.server))
            self._server = call.server.hex(), replace(server, layout=self.hand.job.worker.weights.layout)
        return self._server[1], call.client, self._place(call.state), self._place(call.mail)

    def _place(self, thing: Any) -> Any:
        """What the server's process sent. Where that has no GPU and this one does, everything goes to it."""
        device = self.hand.job.device
        return unboxed(thing, device, everything=self._setup.driver == "cpu" and device.type != "cpu")

    def _hold(self, client: int, ref: Any) -> None:
        import ray

        if client not in self._share:
            self._share[client] = ray.get(ref)
        self._share.move_to_end(client)
        held = sum(x.bytes.nbytes for x, _ in self._share.values())
        while held > self._setup.config.memory * 2**30 and len(self._share) > 1:
            held -= self._share.popitem(last=False)[1][0].bytes.nbytes

    def _samples(self, client: int) -> Samples:
        x, y = (box.tensor(torch.device("cpu")) for box in self._share[client])
        return Samples.real_ones(x, y)
