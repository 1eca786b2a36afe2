"""Clients in a few processes on the cores of this machine, with weights and updates in memory that they share.

Worker processes are forked from the one that was started, when there is first something for them to do, and stay until
the end: each has the run's data, network and method from the start, without a copy. What the server sends to all is
written into shared memory once a round, a reply into that of its worker. Numbers are those of `inprocess`, bit for bit:
updates are averaged in the order of the clients' ids, whoever is ready first.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedkeel.errors import ConfigError
from fedkeel.local import size_of
from fedkeel.options import option
from fedkeel.records import Server
from fedkeel.registry import register
from fedkeel.runtimes.base import Progress, Tuning
from fedkeel.runtimes.boxes import Box, flat, mapped
from fedkeel.runtimes.crew import Answer, Crew, Hand, Lost, Slot, cores, lost

if TYPE_CHECKING:
    from fedkeel.job import Job

SPARE = 1 << 20
"""Bytes of shared memory beside what is foreseen."""
ALIGNED = 64


@register("runtimes", "pool")
@dataclass(frozen=True, kw_only=True)
class Pool:
    """Processes on the cores of this machine, `workers` many, each with `threads` threads. Linux, without a GPU."""

    remote: ClassVar[bool] = False
    cores: int | None = option(None, "workers where `workers` does not say; absent: a worker for each core", ge=1)

    def start(self, job: Job) -> PoolRuntime:
        """A runtime for this job. Raises ConfigError on a GPU and where processes cannot be forked."""
        if job.device.type != "cpu":
            allowed = f"the run is on {job.device}, which processes cannot share by forking: use ray or inprocess"
            raise ConfigError("runtime", "pool", allowed)
        if sys.platform != "linux":
            raise ConfigError("runtime", "pool", f"needs Linux, this is {sys.platform}: use ray or inprocess")
        return PoolRuntime(job, min(job.config.workers or self.cores or cores(), job.clients))


@dataclass(frozen=True)
class Placed:
    """A tensor in shared memory, from byte `start` on."""

    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


class Area:
    """Memory that a process shares with those it forks. It takes up room as it is written to only."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)

    def put(self, thing: Any) -> Any:
        """The record with its tensors here, over what was here before; those that find no room are in it as boxes."""
        end = 0

        def place(tensor: Tensor) -> Placed | Box:
            nonlocal end
            content = flat(tensor)
            start, size = end, len(content)
            if start + size > len(self.bytes):
                return Box.of(tensor)
            self.bytes[start : start + size] = content
            end = -(-(start + size) // ALIGNED) * ALIGNED
            return Placed(start, size, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

        return mapped(thing, Tensor, place)

    def take(self, thing: Any, copy: bool = True) -> Any:
        """The record as it was: its tensors copies, or views of this memory."""

        def tensor(place: Placed | Box) -> Tensor:
            if isinstance(place, Box):
                return place.tensor(torch.device("cpu"))
            dtype: torch.dtype = getattr(torch, place.dtype)
            if place.size == 0:
                return torch.empty(place.shape, dtype=dtype)
            found = self.bytes[place.start : place.start + place.size].view(dtype).view(place.shape)
            return found.clone() if copy else found

        return mapped(thing, (Placed, Box), tensor)


@dataclass
class Link:
    """Between this process and one that it forked: a pipe for what is asked and answered, and memory for the tensors in
    it, `down` to the worker and `up` from it."""

    ours: Connection
    theirs: Connection
    down: Area
    up: Area
    process: Any = None


class PoolRuntime(Crew):
    """See runtimes/base.py."""

    def __init__(self, job: Job, workers: int) -> None:
        """workers: how many there are at most."""
        super().__init__(job)
        first = job.first_server()
        public = size_of((first.params, first.buffers, *first.counters.values(), *first.shared.values()))
        self._area = Area(2 * public + SPARE)  # of what the server sends to all
        self._room = 6 * job.worker.weights.flat.nbytes + SPARE  # of a client's update and state
        self._number = 0
        self.slots = [Slot() for _ in range(workers)]

    def prepare(self, generating: Progress, tuning: Tuning) -> int:
        count = super().prepare(generating, tuning)
        for slot in self.slots[self.job.config.cohort :]:  # all make images, but a round has no clients for these
            self.dismiss(slot)
        return count

    def hire(self, slot: Slot) -> None:
        self.dismiss(slot)
        context = get_context("fork")
        try:
            ours, theirs = context.Pipe()
            link = Link(ours, theirs, Area(self._room), Area(self._room))
            link.process = context.Process(target=serve, args=(self.job, link, self._area), daemon=True)
            slot.handle = link  # from here on it is ended with the others, whatever comes while it starts
            with warnings.catch_warnings():
                # a progress bar's thread may be there; the worker uses nothing that it could hold
                warnings.simplefilter("ignore", DeprecationWarning)
                link.process.start()
        except OSError as error:  # too many processes or open files, too little memory
            self.dismiss(slot)
            raise lost("starting a worker process", Lost(error.strerror or str(error))) from error
        theirs.close()
        slot.alive = True

    def dismiss(self, slot: Slot) -> None:
        link: Link | None = slot.handle
        if link is not None:
            link.ours.close()
            link.theirs.close()
            if link.process.pid is not None:
                link.process.kill()
                link.process.join()
            link.process.close()
        slot.handle = slot.future = slot.doing = None
        slot.alive = False

    def broadcast(self, public: Server) -> Any:
        self._number += 1
        return self._number, self._area.put(public)

    def ask(self, handle: Any, what: str, *args: Any) -> Any:
        link: Link = handle
        place, rest = (None, args) if what in ("generate", "settle") else (args[0], args[1:])
        with suppress(OSError):  # it died meanwhile: `wait` finds out
            link.ours.send((what, place, link.down.put(rest)))
        return link

    def settle(self, slot: Slot) -> None:
        self.ask(slot.handle, "settle", self.job.adapters)

    def wait(self) -> list[tuple[Slot, Answer | Lost]]:
        busy = {slot.handle.ours: slot for slot in self.slots if slot.doing is not None}
        ready = connection.wait(list(busy))
        return [(busy[each], self._result(busy[each].handle)) for each in ready]

    def _result(self, link: Link) -> Answer | Lost:
        try:
            answer: Answer | Lost = link.up.take(link.ours.recv())
        except (EOFError, OSError):
            link.process.join()
            code = link.process.exitcode
            name = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            return Lost(f"it ended with {name}")
        return answer


def serve(job: Job, link: Link, area: Area) -> None:
    """A worker process: does what is asked until the process that was started ends it, or itself.

    The work has a thread of its own: threads that PyTorch had before the fork are not there any more, and the thread
    that they belong to would wait for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that was started ends this one
    link.ours.close()
    vars(job).pop("images", None)  # with what was spent on them before
    threading.Thread(target=work, args=(job, link, area), daemon=True).start()
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def work(job: Job, link: Link, area: Area) -> None:
    """Does what is asked. With it ends the process."""
    try:
        torch.set_num_threads(job.config.threads)
        hand, known = Hand(lambda: job), (0, None)
        layout = job.worker.weights.layout
        while True:
            what, place, args = link.theirs.recv()
            args = link.down.take(args)
            if what == "settle":
                hand.settle(*args)
                continue
            if place is not None:
                if place[0] != known[0]:
                    known = place[0], replace(area.take(place[1], copy=False), layout=layout)
                args = (known[1], *args)
            link.theirs.send_bytes(done(hand, what, args, link.up))
    except (EOFError, OSError):  # nobody asks any more
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def done(hand: Hand, what: str, args: tuple[Any, ...], up: Area) -> Any:
    """What a hand answers, as it is sent. An exception that nobody expected is told and costs the client only this
    turn."""
    act: Callable[..., Any] = getattr(hand, what)
    try:
        return ForkingPickler.dumps(up.put(hand.answer(lambda: act(*args))))
    except Exception as error:
        return ForkingPickler.dumps(Lost(f"{type(error).__name__}: {error}".strip(), traceback.format_exc()))
