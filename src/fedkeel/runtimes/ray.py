"""Clients in processes of a Ray cluster, from one machine to many: the section [ray]. Here is the server's side.

A worker process ("actor", in ray_worker.py) makes one `Job` and keeps it: a network, the method, no train images. What
goes to it: the configuration, how many samples of each class every client has, test images where clients measure,
public images where their generators need them; for each client it runs, that client's samples (put into Ray's object
store once, kept by the actor that runs it), what the server sends to all (put there once a round) and to this client,
and what the client kept. What it keeps comes back with its reply: states, checkpoints and the server's side are this
process's, so that an actor that dies takes nothing with it. Its clients run again elsewhere from the same state, to the
same numbers.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fedkeel import registry
from fedkeel.errors import ConfigError, MissingExtra, RunError
from fedkeel.records import Server
from fedkeel.registry import register
from fedkeel.runtimes.boxes import Box, boxed, unboxed
from fedkeel.runtimes.crew import PATIENCE, Answer, Crew, Lost, Slot, cores
from fedkeel.runtimes.ray_worker import Actor, Call, Setup, versions

if TYPE_CHECKING:
    from fedkeel.federation import Cluster
    from fedkeel.job import Job

START = 300.0
"""Seconds without any worker process after which a run gives up."""


@register("runtimes", "ray")
@dataclass(frozen=True, kw_only=True)
class Ray:
    """Processes of a Ray cluster, on this machine or many, GPUs by fraction: section [ray] (extra `ray`)."""

    remote: ClassVar[bool] = False

    def start(self, job: Job) -> RayRuntime:
        """A runtime for this job; raises MissingExtra, and ConfigError for a cluster that is not there or too small."""
        cluster = job.config.ray
        _fits(cluster, job.device)
        ours = join(cluster)
        try:
            return RayRuntime(job, cluster, ours)
        except BaseException:
            if ours:
                _ray().shutdown()
            raise


def join(cluster: Cluster) -> bool:
    """Connects this process to a cluster: `cluster.address`, else one that is started for it on this machine. False
    where the process is connected already, which it then stays.

    Raises MissingExtra, ConfigError for a cluster that cannot be reached or has another version of Ray or Python, and
    RunError when none can be started.
    """
    if not cluster.address:  # Ray then listens on 127.0.0.1 only: it asks nobody who connects who they are
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray = _ray()
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "address": cluster.address or "local"}
    if not cluster.address:
        wanted = math.ceil((cluster.actors or 0) * cluster.cpus)  # as many processes as asked for, whatever the cores
        options |= {"include_dashboard": False, "num_cpus": max(wanted, cores())}
    _reach(cluster.address)
    for trial in range(PATIENCE):
        try:
            ray.init(**options)
            break
        except Exception as error:  # Ray raises what it likes here
            ray.shutdown()  # what had started already
            reason = " ".join(str(error).split())[:300]
            if cluster.address:
                raise ConfigError("ray.address", cluster.address, f"no such cluster can be used: {reason}") from error
            if "timed out" not in reason or trial == PATIENCE - 1:  # its own limit of 30 seconds, on a busy machine
                raise RunError(f"Ray cannot be started on this machine: {reason}") from error
    return True


def _reach(address: str) -> None:
    """Raises ConfigError where nothing listens at host:port or ray://host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            reason = f"no such cluster can be used: {error.strerror or error}"
            raise ConfigError("ray.address", address, reason) from error


def _ray() -> Any:
    """The package, quiet. Raises MissingExtra."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns; the device is ours to choose
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")  # on stdout; we say it ourselves
    try:
        import ray
    except ImportError:
        raise MissingExtra("runtime = 'ray'", "ray") from None
    return ray


def _fits(cluster: Cluster, device: torch.device) -> None:
    """Raises ConfigError for shares that Ray cannot give, and for a GPU that workers are given no part of."""
    for key in ("cpus", "gpus"):
        share = getattr(cluster, key)
        if share > 1 and share != int(share):
            raise ConfigError(f"ray.{key}", share, "must be a whole number when it is above 1")
    if device.type == "cuda" and cluster.gpus == 0:
        allowed = f"the run is on {device}: give each worker process a part of a GPU (0.25), or set device = 'cpu'"
        raise ConfigError("ray.gpus", cluster.gpus, allowed)


def room(cluster: Cluster, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Worker processes that find room on these machines (as `ray.nodes()` lists them), all else on them ignored."""
    total = 0
    for node in nodes:
        has = node["Resources"] if node.get("Alive", node.get("alive")) else {}
        count = has.get("CPU", 0.0) / cluster.cpus
        if cluster.gpus:  # a process has its part from one GPU
            each = math.floor(1 / cluster.gpus) if cluster.gpus < 1 else 1 / cluster.gpus
            count = min(count, has.get("GPU", 0.0) * each)
        total += math.floor(count)
    return total


# the runtime ----------------------------------------------------------------------------------------------------------


class RayRuntime(Crew):
    """See runtimes/base.py."""

    def __init__(self, job: Job, cluster: Cluster, ours: bool) -> None:
        """ours: whether the connection to the cluster ends with this runtime."""
        ray = _ray()
        super().__init__(job)
        self.ours = ours
        free, asked = room(cluster, ray.nodes()), cluster.actors
        if free == 0 or (asked or 0) > free:
            share = f"{cluster.cpus:g} CPUs" + (f" and {cluster.gpus:g} GPUs" if cluster.gpus else "")
            key = "actors" if asked else "gpus" if cluster.gpus else "cpus"
            allowed = f"the cluster has room for {free} worker processes of {share} each"
            raise ConfigError(f"ray.{key}", getattr(cluster, key), allowed)
        self._actor = ray.remote(Actor).options(
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
            max_restarts=0,  # what was asked of it is this runtime's to know
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        config = job.config
        pool = replace(config.pool, dir=str(job.pools.absolute()) if config.pool.dir else "")
        device = "cpu" if not cluster.gpus and config.device == "auto" else config.device
        if cluster.gpus and config.device.startswith("cuda"):
            device = "cuda"  # which one is Ray's to say
        self._setup = Setup(
            config=replace(config, data=None, pool=pool, device=device),
            things=_registered(),
            folder=str(Path.cwd()),
            driver=job.device.type,
            data=ray.put(boxed(self._needed())),
            counts=Box.of(job.counts),
            adapters=job.adapters,
            versions=versions(),
        )
        self._refs: dict[int, Any] = {}
        self.slots = [Slot() for _ in range(min(asked or free, job.clients))]
        for slot in self.slots:
            self.hire(slot)

    def close(self) -> None:
        super().close()
        self._refs.clear()
        if self.ours:
            _ray().shutdown()

    # what is sent -----------------------------------------------------------------------------------------------------

    def _needed(self) -> Any:
        """The data set without train images; test images where clients measure, public ones where they generate."""
        job = self.job
        data, options = job.data, job.config.evaluate
        measured = (
            options.local_every > 0
            or options.local_rounds
            or any(job.personal_round(number + 1) for number in range(job.config.rounds))
        )
        test = slice(None if measured else 0)
        fakes = bool(job.plan.fake.any())
        return replace(
            data,
            train_x=data.train_x[:0],
            train_y=data.train_y[:0],
            test_x=data.test_x[test],
            test_y=data.test_y[test],
            public=data.public if fakes else None,
        )

    def broadcast(self, public: Server) -> Any:
        return _ray().put(boxed(public))

    def ask(self, handle: Any, what: str, *args: Any) -> Any:
        if what == "generate":
            clients, tuned = args
            return handle.generate.remote(clients, {client: self._sample_ref(client) for client in tuned})
        server, client, state, mail, more = args
        call = Call(client, server, self._sample_ref(client), boxed(state), boxed(mail), boxed(more))
        return getattr(handle, what).remote(call)

    def settle(self, slot: Slot) -> None:
        slot.handle.settle.remote(self.job.adapters)

    def opened(self, value: Any) -> Any:
        return unboxed(value, self.job.device)

    def _sample_ref(self, client: int) -> Any:
        """Where a client's samples lie in the object store, from its first use on."""
        if client not in self._refs:
            samples = self.job.samples(client)
            self._refs[client] = _ray().put((Box.of(samples.x), Box.of(samples.y)))
        return self._refs[client]

    # its processes ---------------------------------------------------------------------------------------------------

    def wait(self) -> list[tuple[Slot, Answer | Lost]]:
        ray = _ray()
        busy = {slot.future: slot for slot in self.slots if slot.future is not None}
        if not busy:
            raise RunError("no worker process of Ray can be started")
        began = time.monotonic()
        while True:
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=START)
            if ready:
                return [(busy[ref], self._result(ref)) for ref in ready]
            if not any(slot.alive for slot in self.slots) and time.monotonic() - began >= START:
                raise RunError(f"no worker process of Ray has started in {START:.0f} seconds: is the cluster busy?")

    def _result(self, ref: Any) -> Answer | Lost:
        errors = _ray().exceptions
        try:
            answer: Answer = _ray().get(ref)
        except errors.RayTaskError as error:
            cause = error.cause
            return Lost(f"{type(cause).__name__}: {cause}".strip(), str(error))
        except errors.RayError as error:
            return Lost(_words(error))
        return answer

    def hire(self, slot: Slot) -> None:
        self.dismiss(slot)
        setup = _ray().put(replace(self._setup, adapters=self.job.adapters))
        slot.handle = self._actor.remote(sys.path, [setup])  # in a list: fetched when the process knows the paths
        slot.future = slot.handle.hello.remote()

    def dismiss(self, slot: Slot) -> None:
        if slot.handle is not None:
            _ray().kill(slot.handle)
        slot.handle = slot.future = slot.doing = None
        slot.alive = False


def _registered() -> dict[tuple[str, str], type]:
    """What is registered from outside this package: a worker process knows it under the same names."""
    found = {(where, name): registry.get(where, name) for where in registry.PACKAGES for name in registry.names(where)}
    return {key: thing for key, thing in found.items() if not thing.__module__.startswith("fedkeel.")}


def _words(error: Exception) -> str:
    """What Ray says about a process that ended, without its ids and addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return " ".join(told)[:300] or type(error).__name__
