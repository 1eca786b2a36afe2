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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fedkeel import registry
from fedkeel.errors import ConfigError, MissingExtra, RunError
from fedkeel.generators.store import Spent
from fedkeel.local import payload
from fedkeel.records import Reply, Server
from fedkeel.registry import register
from fedkeel.runtimes.base import Curve, Progress, Tuning
from fedkeel.runtimes.ray_worker import Actor, Answer, Box, Call, Lost, Setup, boxed, unboxed, versions

if TYPE_CHECKING:
    from fedkeel.federation import Cluster
    from fedkeel.job import Job

PATIENCE = 3
"""How often a client may take its process with it before it counts as failed; how often a process, or Ray, is started
that does not come up."""
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
    ray = _ray()
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "address": cluster.address or "local"}
    if not cluster.address:
        wanted = math.ceil((cluster.actors or 0) * cluster.cpus)  # as many processes as asked for, whatever the cores
        options |= {"include_dashboard": False, "num_cpus": max(wanted, _cores())}
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@dataclass(frozen=True)
class Task:
    """Something to be done for a client. cost: how long it takes compared with others; send: asks an actor to do it."""

    client: int
    cost: int
    send: Callable[[Any], Any]


@dataclass
class Slot:
    """A place for a worker process. future: of what it does; doing: which task that is, None while it starts."""

    handle: Any = None
    future: Any = None
    doing: int | None = None
    failures: int = 0
    alive: bool = False


class RayRuntime:
    """See runtimes/base.py."""

    def __init__(self, job: Job, cluster: Cluster, ours: bool) -> None:
        """ours: whether the connection to the cluster ends with this runtime."""
        ray = _ray()
        self.job, self.ours, self._said = job, ours, set[str]()
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
        self._homes: dict[int, Slot] = {}
        plans = job.plans()
        self._costs = [int(plan.real.sum() + plan.fake.sum()) for plan in plans]
        self._fakes = [int(plan.fake.sum()) for plan in plans]
        self.slots = [Slot() for _ in range(min(asked or free, job.clients))]
        for slot in self.slots:
            self._hire(slot)

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        job, tasks = self.job, []
        ref = self._broadcast(server)
        for client in clients:
            call = self._caller("fit", server, ref, client, accepted, measure=client in measure)
            tasks.append(Task(client, self._costs[client], call))
        for client, answer in zip(clients, self._each(tasks), strict=True):
            if isinstance(answer, Lost):
                down = 0 if job.method.pooled else payload(server, job.mail(server, client))
                reply = Reply(client, failure=answer.reason, trace=answer.trace, bytes_down=down)
            else:
                reply = unboxed(answer.value, job.device)
            if not reply.failure:
                job.store.put(client, server.round, reply.state)
            yield reply

    def prepare(self, generating: Progress, tuning: Tuning) -> int:
        job, done = self.job, 0
        needing = [client for client, count in enumerate(self._fakes) if count]
        if not needing:
            return 0
        job.untuned()  # says what is wrong with a generator before any process does
        groups: dict[object, list[int]] = {}
        for client in needing:  # one for each client, or for all who draw from one pool
            own = client if not job.images.shared else job.generator_of(client)
            groups.setdefault(own, []).append(client)
        shares = list(groups.values())
        sizes = [
            int(job.images.most(share[0]).sum()) if job.images.shared else self._fakes[share[0]] for share in shares
        ]
        tasks = []
        for share, size in zip(shares, sizes, strict=True):
            tuned = [client for client in share if job.adapts(client)]
            tasks.append(Task(share[0], size, self._maker(share, tuned)))
        for task, answer in zip(tasks, self._each(tasks), strict=True):
            if isinstance(answer, Lost):
                raise _lost(f"making images for client {task.client}", answer)
            _, adapters = answer.value
            job.adapters.update(adapters)
            for client, record in adapters.items():
                tuning(client, int(record.get("steps", 1)), int(record.get("of", 1)))
            done += task.cost
            generating(done, sum(sizes))
        for slot in self.slots:
            if slot.handle is not None:
                slot.handle.settle.remote(job.adapters)
        return sum(sizes)

    def personal(self, server: Server, accepted: Mapping[int, int]) -> list[Curve]:
        job, ref, tasks = self.job, self._broadcast(server), []
        curves: list[Curve] = [([], 0)] * job.clients
        for client, rows in enumerate(job.personal_tests):
            if len(rows):
                call = self._caller("curve", server, ref, client, accepted, rows=Box.of(rows))
                tasks.append(Task(client, self._costs[client], call))
        for task, answer in zip(tasks, self._each(tasks), strict=True):
            if isinstance(answer, Lost):
                raise _lost(f"the personal model of client {task.client}", answer)
            curves[task.client] = answer.value
        return curves

    def close(self) -> None:
        ray = _ray()
        for slot in self.slots:
            self._dismiss(slot)
        self._refs.clear()
        if self.ours:
            ray.shutdown()

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
        fakes = any(bool(plan.fake.any()) for plan in job.plans())
        return replace(
            data,
            train_x=data.train_x[:0],
            train_y=data.train_y[:0],
            test_x=data.test_x[test],
            test_y=data.test_y[test],
            public=data.public if fakes else None,
        )

    def _broadcast(self, server: Server) -> Any:
        """What the server sends to all, in the object store."""
        public = replace(server, private={}, layout=None, lab=None, metrics={}, beside={})
        return _ray().put(boxed(public))

    def _caller(
        self,
        what: str,
        server: Server,
        ref: Any,
        client: int,
        accepted: Mapping[int, int],
        measure: bool = False,
        rows: Box | None = None,
    ) -> Callable[[Any], Any]:
        def send(handle: Any) -> Any:
            state = boxed(self.job.store.open(client, accepted.get(client)))
            mail = boxed(self.job.mail(server, client))
            call = Call(client, ref, self._sample_ref(client), state, mail, measure, rows)
            return getattr(handle, what).remote(call)

        return send

    def _maker(self, share: Sequence[int], tuned: Sequence[int]) -> Callable[[Any], Any]:
        def send(handle: Any) -> Any:
            return handle.generate.remote(share, {client: self._sample_ref(client) for client in tuned})

        return send

    def _sample_ref(self, client: int) -> Any:
        """Where a client's samples lie in the object store, from its first use on."""
        if client not in self._refs:
            samples = self.job.samples(client)
            self._refs[client] = _ray().put((Box.of(samples.x), Box.of(samples.y)))
        return self._refs[client]

    # who does it ------------------------------------------------------------------------------------------------------

    def _each(self, tasks: Sequence[Task]) -> Iterator[Answer | Lost]:
        """The answers in the order of `tasks`. As many as fit into `memory` are asked for ahead of the one that is
        next; the longest of these first. An error of ours is raised when its turn comes."""
        size = 8 * self.job.worker.weights.layout.total  # of a reply with a state, in the rough
        ahead = max(2 * len(self.slots), int(self.job.config.memory * 2**30) // max(size, 1))
        waiting, done, losses, turn = set(range(len(tasks))), dict[int, Answer | Lost](), Counter[int](), 0
        for slot in self.slots:
            if slot.handle is None:
                self._hire(slot)
        try:
            while turn < len(tasks):
                for slot in self.slots:
                    near = [i for i in waiting if i < turn + ahead]
                    if slot.alive and slot.doing is None and near:
                        slot.doing = self._choose(slot, tasks, near)
                        waiting.remove(slot.doing)
                        slot.future = tasks[slot.doing].send(slot.handle)
                if turn in done:
                    answer = done.pop(turn)
                    if isinstance(answer, Answer):
                        self._take(answer)
                    yield answer
                    turn += 1
                    continue
                for slot, answer in self._wait():
                    i, slot.doing, slot.future = slot.doing, None, None
                    if i is None:
                        self._started(slot, answer)
                    elif isinstance(answer, Lost) and not answer.trace:  # the process, not what it did
                        losses[i] += 1
                        self._hire(slot)
                        if losses[i] < PATIENCE:
                            waiting.add(i)
                            turn_of = f"before or during client {tasks[i].client}'s turn"
                            self._warn(f"a worker process died {turn_of}: {answer.reason}")
                        else:
                            before = f"a worker process died {PATIENCE} times before or during its turn"
                            done[i] = Lost(f"{before}: {answer.reason}")
                    else:
                        done[i] = answer
        finally:
            for slot in self.slots:  # of a round that is given up
                if slot.doing is not None:
                    self._dismiss(slot)

    def _choose(self, slot: Slot, tasks: Sequence[Task], near: Sequence[int]) -> int:
        """The longest; a client that this slot ran before goes before one that is less than twice as long."""
        longest = max(near, key=lambda i: (tasks[i].cost, -i))
        own = [i for i in near if self._homes.get(tasks[i].client, slot) is slot]
        best = max(own, key=lambda i: (tasks[i].cost, -i), default=longest)
        chosen = best if 2 * tasks[best].cost >= tasks[longest].cost else longest
        self._homes[tasks[chosen].client] = slot
        return chosen

    def _wait(self) -> list[tuple[Slot, Answer | Lost]]:
        """Waits until a slot has an answer or lost its process."""
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

    def _take(self, answer: Answer) -> None:
        """Notes what an answer brings beside its value. Raises what was refused."""
        for text in answer.said:
            self._warn(text)
        for section, spent in answer.spent.items():
            known = self.job.images.spent.setdefault(section, Spent())
            total = known.after(spent.as_json())
            known.images, known.peak = total.images, total.peak
            known.seconds, known.cpu_seconds = total.seconds, total.cpu_seconds
        if answer.refusal is not None:
            kind, text, facts = answer.refusal
            error = kind.__new__(kind, text)
            vars(error).update(facts)
            raise error

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.job.warn(text)

    def _started(self, slot: Slot, answer: Answer | Lost) -> None:
        if isinstance(answer, Answer):
            self._take(answer)
            slot.alive, slot.failures = True, 0
            return
        slot.failures += 1
        if slot.failures < PATIENCE:
            self._hire(slot)
            return
        self._dismiss(slot)  # the next round tries again
        self._warn(f"a worker process cannot be started: {answer.reason}")
        if not any(other.alive or other.future is not None for other in self.slots):
            raise _lost("starting a worker process", answer)

    def _hire(self, slot: Slot) -> None:
        """A new process in this slot, in place of what is there."""
        self._dismiss(slot)
        setup = _ray().put(replace(self._setup, adapters=self.job.adapters))
        slot.handle = self._actor.remote(sys.path, [setup])  # in a list: fetched when the process knows the paths
        slot.future = slot.handle.hello.remote()

    def _dismiss(self, slot: Slot) -> None:
        if slot.handle is not None:
            _ray().kill(slot.handle)
        slot.handle = slot.future = slot.doing = None
        slot.alive = False


def _registered() -> dict[tuple[str, str], type]:
    """What is registered from outside this package: a worker process knows it under the same names."""
    found = {(where, name): registry.get(where, name) for where in registry.PACKAGES for name in registry.names(where)}
    return {key: thing for key, thing in found.items() if not thing.__module__.startswith("fedkeel.")}


def _lost(what: str, lost: Lost) -> RunError:
    error = RunError(f"{what}: {lost.reason}")
    if lost.trace:
        error.add_note(lost.trace)
    return error


def _words(error: Exception) -> str:
    """What Ray says about a process that ended, without its ids and addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return " ".join(told)[:300] or type(error).__name__
