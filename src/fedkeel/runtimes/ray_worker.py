"""Worker processes of the section [ray]: what travels to one and back, and what it does with that.

Tensors travel as bytes with their type beside them, bit-exact in any type, which Ray moves without copying.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedkeel import personal
from fedkeel.errors import ConfigError, FedkeelError
from fedkeel.generators.store import Spent, heard
from fedkeel.records import Samples, Server
from fedkeel.registry import register
from fedkeel.runtimes.base import Curve

if TYPE_CHECKING:
    from fedkeel.config import Config
    from fedkeel.job import Job


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


def versions() -> dict[str, str]:
    """Of what has to be the same in all processes, whatever device PyTorch was built for."""
    return {package: version(package).partition("+")[0] for package in ("fedkeel", "torch")}


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
                if (here := versions()[package]) != wanted:
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
