"""Clients in processes of a Ray cluster, from one machine to many: the section [ray].

A worker process ("actor") makes one `Job` and keeps it: a network, the method, no train images. What goes to it: the
configuration, how many samples of each class every client has, test images where clients measure, public images where
their generators need them; for each client it runs, that client's samples (put into Ray's object store once, kept by
the actor that runs it), what the server sends to all (put there once a round) and to this client, and what the client
kept. What it keeps comes back with its reply: states, checkpoints and the server's side are this process's, so that an
actor that dies takes nothing with it. Its clients run again elsewhere from the same state, to the same numbers.

Tensors travel as bytes with their type beside them, bit-exact in any type, which Ray moves without copying.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import sys
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedkeel import personal, registry
from fedkeel.errors import ConfigError, FedkeelError, MissingExtra, RunError
from fedkeel.generators.store import Spent, heard
from fedkeel.local import payload
from fedkeel.records import Reply, Samples, Server
from fedkeel.registry import register
from fedkeel.runtimes.base import Curve, Progress, Tuning

if TYPE_CHECKING:
    from fedkeel.config import Config
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


# what travels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A tensor as bytes. There, these are a read-only view of Ray's memory. off_cpu: whether it was on a GPU."""

    bytes: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: str
    shape: tuple[int, ...]
    off_cpu: bool

    @staticmethod
    def of(tensor: Tensor) -> Box:
        """No copy of a tensor that is contiguous and on the CPU."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Box(flat.view(torch.uint8).numpy(), dtype, tuple(tensor.shape), tensor.device.type != "cpu")

    def tensor(self, device: torch.device, copy: bool = True, everything: bool = False) -> Tensor:
        """The same bits: a copy, that may be written to, unless `copy` is false. On `device` when it was on a GPU, or
        when `everything` goes there."""
        dtype, to_device = getattr(torch, self.dtype), self.off_cpu or everything
        if self.bytes.size == 0:
            return torch.empty(self.shape, dtype=dtype, device=device if to_device else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of memory that must not be written to
            flat = torch.from_numpy(self.bytes.copy() if copy else self.bytes)
        tensor = flat.view(dtype).reshape(self.shape)
        return tensor.to(device) if to_device else tensor


def boxed(thing: Any) -> Any:
    """The same record, mapping or sequence with boxes for tensors."""
    return _mapped(thing, Tensor, Box.of)


def unboxed(thing: Any, device: torch.device, copy: bool = True, everything: bool = False) -> Any:
    """The reverse of `boxed`."""
    return _mapped(thing, Box, lambda box: box.tensor(device, copy, everything))


def _mapped(thing: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(thing, kind):
        return change(thing)
    if isinstance(thing, Mapping):
        return {key: _mapped(value, kind, change) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(_mapped(value, kind, change) for value in thing)
    if is_dataclass(thing) and not isinstance(thing, (type, Box)):
        names = [item.name for item in fields(thing) if item.init]
        return replace(thing, **{name: _mapped(getattr(thing, name), kind, change) for name in names})
    return thing


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
    """What a worker process is asked to do for a client. `server` and `samples` lie in the object store."""

    client: int
    server: Any
    samples: Any
    state: Mapping[str, Box] | None
    mail: Mapping[str, Box]
    measure: bool = False
    rows: Box | None = None


@dataclass(frozen=True)
class Answer:
    """What comes back. refusal: class, text and attributes of an error of ours; said: warnings; spent: on images."""

    value: Any = None
    refusal: tuple[type[FedkeelError], str, dict[str, Any]] | None = None
    said: tuple[str, ...] = ()
    spent: Mapping[str, Spent] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost:
    """Why there is no answer; trace: of an exception that no one expected."""

    reason: str
    trace: str = ""


# in a worker process --------------------------------------------------------------------------------------------------


class Actor:
    """A worker process: one job, made at the first call, and a bounded share of clients' samples."""

    def __init__(self, paths: Sequence[str], setup: Sequence[Any]) -> None:
        """paths: where the server's process finds modules, needed for what is the user's own in `setup`, which lies in
        the object store."""
        self._paths, self._ref = paths, setup[0]
        self._said: list[str] = []
        self._known: set[str] = set()
        self._share: OrderedDict[int, tuple[Box, Box]] = OrderedDict()  # the client that ran last stands last
        self._server: tuple[str, Server] | None = None

    def hello(self) -> Answer:
        """Makes the job."""

        def work() -> None:
            for package, wanted in self._setup.versions.items():
                if (here := _versions()[package]) != wanted:
                    where = f"{package} {here} on {platform.node()}, {wanted} where the run was started"
                    raise ConfigError("ray.address", self._setup.config.ray.address, where)
            _ = self.job

        return self._answer(work)

    def fit(self, call: Call) -> Answer:
        """A `Reply`, boxed, without what is in it twice."""

        def work() -> Any:
            server, state, mail = self._open(call)
            job = self.job
            reply = job.worker.fit(server, call.client, state, job.measure if call.measure else None, mail)
            update = None if reply.update is None else replace(reply.update, keep={})
            return boxed(replace(reply, update=update))

        return self._answer(work)

    def curve(self, call: Call) -> Answer:
        """A `Curve`."""

        def work() -> Curve:
            assert call.rows is not None
            server, state, mail = self._open(call)
            tests = [torch.empty(0, dtype=torch.int64)] * self.job.clients
            tests[call.client] = call.rows.tensor(torch.device("cpu"))
            self.job.personal_tests = tests
            return personal.curve_of(self.job, server, call.client, state, mail)

        return self._answer(work)

    def generate(self, clients: Sequence[int], samples: Mapping[int, Any]) -> Answer:
        """Tunes generators of these clients and makes their images: how many, and what was tuned. samples: of clients
        that tune."""

        def work() -> tuple[int, dict[int, dict[str, object]]]:
            for client, ref in samples.items():
                self._hold(client, ref)
            count = self.job.generate(clients=clients)
            return count, {client: self.job.adapters[client] for client in samples}

        return self._answer(work)

    def settle(self, adapters: Mapping[int, dict[str, object]]) -> None:
        """Images and adapters may have been made elsewhere: what is known of them is read again."""
        self.job.adapters.update(adapters)
        vars(self.job).pop("images", None)

    @cached_property
    def _setup(self) -> Setup:
        import ray

        sys.path.extend(path for path in self._paths if path not in sys.path)
        setup: Setup = ray.get(self._ref)
        return setup

    @cached_property
    def job(self) -> Job:
        """This process's."""
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
        job.warn = self._tell
        job.adapters.update(setup.adapters)
        return job

    def _answer(self, work: Callable[[], Any]) -> Answer:
        value, refusal = None, None
        try:
            with heard(self._tell, self._known):
                value = work()
        except FedkeelError as error:
            refusal = (type(error), str(error), {**vars(error)})
        said, self._said = tuple(self._said), []
        return Answer(value, refusal, said, self._spent())

    def _tell(self, text: str) -> None:
        self._said.append(text)

    def _spent(self) -> dict[str, Spent]:
        """What was spent on images since it was last asked for."""
        images = vars(self.job).get("images") if "job" in vars(self) else None
        out = {}
        for section, spent in (images.spent if images else {}).items():
            out[section] = replace(spent)
            spent.images, spent.seconds, spent.cpu_seconds, spent.peak = 0, 0.0, 0.0, None
        return out

    def _open(self, call: Call) -> tuple[Server, Mapping[str, Tensor] | None, Mapping[str, Tensor]]:
        import ray

        self._hold(call.client, call.samples)
        if self._server is None or self._server[0] != call.server.hex():
            server = self._place(ray.get(call.server))
            self._server = call.server.hex(), replace(server, layout=self.job.worker.weights.layout)
        return self._server[1], self._place(call.state), self._place(call.mail)

    def _place(self, thing: Any) -> Any:
        """What the server's process sent. Where that has no GPU and this one does, everything goes to it."""
        device = self.job.device
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


# in the server's process ----------------------------------------------------------------------------------------------


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
            versions=_versions(),
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
                            self._warn(f"a worker process died with client {tasks[i].client}: {answer.reason}")
                        else:
                            done[i] = Lost(f"its worker process died {PATIENCE} times: {answer.reason}")
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
        self._warn(f"a worker process cannot be started: {answer.reason}")
        if not any(other.alive or other.future is not None for other in self.slots):
            raise _lost("starting a worker process", answer)

    def _hire(self, slot: Slot) -> None:
        """A new process in this slot, in place of what is there."""
        self._dismiss(slot)
        setup = _ray().put(replace(self._setup, adapters=self.job.adapters))
        slot.handle = self._actor.remote(
            sys.path, [setup]
        )  # in a list: fetched by the process, when it knows the paths
        slot.future = slot.handle.hello.remote()

    def _dismiss(self, slot: Slot) -> None:
        if slot.handle is not None:
            _ray().kill(slot.handle)
        slot.handle = slot.future = slot.doing = None
        slot.alive = False


def _versions() -> dict[str, str]:
    """Of what has to be the same in all processes, whatever device PyTorch was built for."""
    from importlib.metadata import version

    return {package: version(package).partition("+")[0] for package in ("fedkeel", "torch")}


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
