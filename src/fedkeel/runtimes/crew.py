"""Clients in worker processes: who does what, and what comes of it, whatever carries it to them and back.

What clients keep comes back with their replies: states, checkpoints and all of the server's side are of the process
that was started, so that a worker process that dies takes nothing with it. Its clients run again in another one from
the same state, to the same numbers.
"""

from __future__ import annotations

import math
import os
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkeel import personal
from fedkeel.errors import FedkeelError, RunError
from fedkeel.generators.store import Spent, heard
from fedkeel.local import payload
from fedkeel.records import Reply, Server
from fedkeel.runtimes.base import Curve, Progress, Tuning
from fedkeel.runtimes.boxes import weighed

if TYPE_CHECKING:
    from fedkeel.job import Job

PATIENCE = 3
"""How often a client may take its process with it before it counts as failed; how often a process is started that does
not come up."""

AHEAD = 8
"""Tasks for each worker process that it may be ahead of the one whose answer is next. Four would cost two workers 7 %
of a round of ten clients of unequal size (simulated), as the longest of ten is not always among the first eight."""


def cores() -> int:
    """Those that this process may use, by its affinity and by the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(allowed, max(quota(), 1)))


def quota(process: Path = Path("/proc/self"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """How many cores' time this process's control group and those around it leave it, infinite without a limit: the
    least of their `cpu.max`, "$MAX $PERIOD" in microseconds (Linux, Documentation/admin-guide/cgroup-v2.rst)."""
    least = math.inf
    with suppress(OSError, StopIteration):
        lines = (process / "cgroup").read_text().splitlines()
        group = mounted / next(line for line in lines if line.startswith("0::/"))[4:]
        for folder in (group, *group.parents):
            if folder.is_relative_to(mounted):
                with suppress(OSError, ValueError):  # the outermost has none, and "max" is no number
                    most, period = map(int, (folder / "cpu.max").read_text().split())
                    least = min(least, most / period)
    return least


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


@dataclass(frozen=True)
class Task:
    """Something to be done for a client. cost: how long it takes compared with others. what: of a `Hand`; args: made
    when a process is asked, and again when that process died."""

    client: int
    cost: int
    what: str
    args: Callable[[], tuple[Any, ...]]


@dataclass
class Slot:
    """A place for a worker process. handle: of the process; future: of what it does; doing: which task that is, None
    while it starts."""

    handle: Any = None
    future: Any = None
    doing: int | None = None
    failures: int = 0
    alive: bool = False


class Crew:
    """A runtime over worker processes (see runtimes/base.py). The methods that raise NotImplementedError are its
    carrier's."""

    def __init__(self, job: Job) -> None:
        self.job, self.slots = job, list[Slot]()
        self._costs = (job.plan.real + job.plan.fake).sum(1).tolist()
        self._fakes = job.plan.fake.sum(1).tolist()
        self._homes: dict[int, Slot] = {}
        self._largest: dict[str, int] = {}  # bytes of an answer, by what was asked for
        self._said: set[str] = set()

    # of the carrier ---------------------------------------------------------------------------------------------------

    def hire(self, slot: Slot) -> None:
        """A new process in this slot, in place of what is there. Where that takes time, `slot.future` is of its
        start; else the slot is alive."""
        raise NotImplementedError

    def dismiss(self, slot: Slot) -> None:
        """Ends the process of this slot, if there is one."""
        raise NotImplementedError

    def ask(self, handle: Any, what: str, *args: Any) -> Any:
        """Asks a process for what a `Hand` does; what its answer is waited for by. The server in `args` is that of
        `broadcast`."""
        raise NotImplementedError

    def wait(self) -> list[tuple[Slot, Answer | Lost]]:
        """Waits until a slot has an answer or lost its process."""
        raise NotImplementedError

    def broadcast(self, public: Server) -> Any:
        """Brings to all processes what the server sends to all; by what they find it."""
        raise NotImplementedError

    def settle(self, slot: Slot) -> None:
        """`Hand.settle` in this slot's process; nobody waits for it."""
        raise NotImplementedError

    def opened(self, value: Any) -> Any:
        """An answer's value as it was."""
        return value

    # the runtime ------------------------------------------------------------------------------------------------------

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        job, place = self.job, self._sent(server)
        tasks = [self._task("fit", place, server, client, accepted, client in measure) for client in clients]
        for client, answer in zip(clients, self._each(tasks), strict=True):
            if isinstance(answer, Lost):
                down = 0 if job.method.pooled else payload(server, job.mail(server, client))
                reply = Reply(client, failure=answer.reason, trace=answer.trace, bytes_down=down)
            else:
                reply = self.opened(answer.value)
            if not reply.failure and job.worker.keeps:
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
            tasks.append(Task(share[0], size, "generate", partial(tuple, (share, tuned))))
        for task, answer in zip(tasks, self._each(tasks), strict=True):
            if isinstance(answer, Lost):
                raise lost(f"making images for client {task.client}", answer)
            _, adapters = answer.value
            job.adapters.update(adapters)
            for client, record in adapters.items():
                tuning(client, int(record.get("steps", 1)), int(record.get("of", 1)))
            done += task.cost
            generating(done, sum(sizes))
        for slot in self.slots:
            if slot.handle is not None:
                self.settle(slot)
        return sum(sizes)

    def personal(self, server: Server, accepted: Mapping[int, int]) -> list[Curve]:
        place, tasks = self._sent(server), []
        curves: list[Curve] = [([], 0)] * self.job.clients
        for client, rows in enumerate(self.job.personal_tests):
            if len(rows):
                tasks.append(self._task("curve", place, server, client, accepted, rows))
        for task, answer in zip(tasks, self._each(tasks), strict=True):
            if isinstance(answer, Lost):
                curves[task.client] = personal.unmeasured(self.job, f"client {task.client}", answer.reason)
            else:
                curves[task.client] = answer.value
        return curves

    def close(self) -> None:
        for slot in self.slots:
            self.dismiss(slot)

    def _sent(self, server: Server) -> Any:
        return self.broadcast(replace(server, private={}, layout=None, lab=None, metrics={}, beside={}))

    def _task(self, what: str, place: Any, server: Server, client: int, accepted: Mapping[int, int], more: Any) -> Task:
        def args() -> tuple[Any, ...]:
            state, mail = self.job.store.open(client, accepted.get(client)), self.job.mail(server, client)
            return place, client, state, mail, more

        return Task(client, self._costs[client], what, args)

    # who does it ------------------------------------------------------------------------------------------------------

    def _each(self, tasks: Sequence[Task]) -> Iterator[Answer | Lost]:
        """The answers in the order of `tasks`, the longest asked for first as far as `_ahead` lets them. An error of
        ours is raised when its turn comes."""
        done, losses, turn = dict[int, Answer | Lost](), Counter[int](), 0
        queue = Queue([task.cost for task in tasks], min(len(self.slots), len(tasks)))
        for slot in self.slots[: len(tasks)]:
            if slot.handle is None:
                self.hire(slot)
        try:
            while turn < len(tasks):
                for slot in self.slots:
                    if slot.alive and slot.doing is None and (near := self._ahead(queue, tasks[turn], turn, len(done))):
                        slot.doing = self._choose(slot, tasks, near)
                        queue.take(slot.doing)
                        task = tasks[slot.doing]
                        slot.future = self.ask(slot.handle, task.what, *task.args())
                if turn in done:
                    answer = done.pop(turn)
                    if isinstance(answer, Answer):
                        self._take(answer)
                    yield answer
                    turn += 1
                    continue
                for slot, answer in self.wait():
                    i, slot.doing, slot.future = slot.doing, None, None
                    if i is None:
                        self._started(slot, answer)
                    elif isinstance(answer, Lost) and not answer.trace:  # the process, not what it did
                        losses[i] += 1
                        self.hire(slot)
                        if losses[i] < PATIENCE:
                            queue.back(i)
                            turn_of = f"before or during client {tasks[i].client}'s turn"
                            self._warn(f"a worker process died {turn_of}: {answer.reason}")
                        else:
                            before = f"a worker process died {PATIENCE} times before or during its turn"
                            done[i] = Lost(f"{before}: {answer.reason}")
                    else:
                        done[i] = answer
                        if isinstance(answer, Answer):
                            known = self._largest.get(tasks[i].what, 0)
                            self._largest[tasks[i].what] = max(known, weighed(answer.value))
        finally:
            for slot in self.slots:  # of a round that is given up
                if slot.doing is not None:
                    self.dismiss(slot)

    def _ahead(self, queue: Queue, task: Task, turn: int, waiting: int) -> Sequence[int]:
        """The tasks that a worker may be asked for now, the longest first. `task` is the one whose turn it is; so many
        answers are waiting for theirs, of which no more should be than fit into `memory`."""
        size = self._largest.get(task.what, 12 * self.job.worker.weights.layout.total)  # a guess: update, extra, state
        room = int(self.job.config.memory * 2**30) // max(size, 1)
        held = waiting + sum(slot.doing is not None for slot in self.slots)
        return queue.near(turn, room, held)

    def _choose(self, slot: Slot, tasks: Sequence[Task], near: Sequence[int]) -> int:
        """Of `near`, the longest first, the first; a client that this slot ran before goes before one that is less than
        twice as long."""
        chosen, longest = near[0], tasks[near[0]].cost
        for i in near:
            if 2 * tasks[i].cost < longest:
                break
            if self._homes.get(tasks[i].client, slot) is slot:
                chosen = i
                break
        self._homes[tasks[chosen].client] = slot
        return chosen

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
            self.hire(slot)
            return
        self.dismiss(slot)  # the next round tries again
        self._warn(f"a worker process cannot be started: {answer.reason}")
        if not any(other.alive or other.future is not None for other in self.slots):
            raise lost("starting a worker process", answer)


class Queue:
    """Tasks that nobody does yet, by number. Those of the next few numbers may be asked for, and those so long that a
    round would wait for them at its end: longer than 1 / `AHEAD` of a worker's share, which are few."""

    def __init__(self, costs: Sequence[int], workers: int) -> None:
        """costs: of the tasks 0, 1, ..."""
        self._costs, self._workers, self._next = costs, workers, 0
        share = sum(costs) / max(workers, 1)
        self._long = {i for i, cost in enumerate(costs) if cost * AHEAD > share}
        self._open = sorted((-costs[i], i) for i in self._long)

    def near(self, turn: int, room: int, held: int) -> Sequence[int]:
        """Those that may be asked for, the longest first, when it is task `turn`'s turn. room: how many answers may be
        held, but each worker may always be at work on one; held: how many are, or will be when the workers are done."""
        window = max(self._workers, min(AHEAD * self._workers, room))
        end = min(turn + window, len(self._costs))
        for i in range(self._next, end):
            if i not in self._long:
                self.back(i)
        self._next = max(self._next, end)
        far = held + window < room
        return [i for _, i in self._open if far or i < end]

    def take(self, i: int) -> None:
        """Somebody does it."""
        self._open.remove((-self._costs[i], i))

    def back(self, i: int) -> None:
        """Nobody does it any more."""
        insort(self._open, (-self._costs[i], i))


class Hand:
    """What a worker process does, with a job of its own, which is made when it is first needed."""

    def __init__(self, make: Callable[[], Job]) -> None:
        self._make = make
        self._said: list[str] = []
        self._known: set[str] = set()

    @cached_property
    def job(self) -> Job:
        """This process's."""
        job = self._make()
        job.warn = self._said.append
        return job

    def fit(
        self, server: Server, client: int, state: Mapping[str, Tensor] | None, mail: Mapping[str, Tensor], measure: bool
    ) -> Reply:
        """A client's round, as `Worker.fit`; what stays on the client is in `Reply.state` alone."""
        job = self.job
        reply = job.worker.fit(server, client, state, job.measure if measure else None, mail)
        return reply if reply.update is None else replace(reply, update=replace(reply.update, keep={}))

    def curve(
        self, server: Server, client: int, state: Mapping[str, Tensor] | None, mail: Mapping[str, Tensor], rows: Tensor
    ) -> Curve:
        """A client's own model on the test images of these numbers."""
        tests = [torch.empty(0, dtype=torch.int64)] * self.job.clients
        tests[client] = rows
        self.job.personal_tests = tests
        return personal.curve_of(self.job, server, client, state, mail)

    def generate(self, clients: Sequence[int], tuned: Sequence[int]) -> tuple[int, dict[int, dict[str, object]]]:
        """Makes images for these clients and tunes the generators of some: how many, and what was tuned."""
        count = self.job.generate(clients=clients)
        return count, {client: self.job.adapters[client] for client in tuned}

    def settle(self, adapters: Mapping[int, dict[str, object]]) -> None:
        """Images and adapters may have been made elsewhere: what is known of them is read again."""
        self.job.adapters.update(adapters)
        vars(self.job).pop("images", None)

    def answer(self, work: Callable[[], Any]) -> Answer:
        """What this work comes to, an error of ours included."""
        value, refusal = None, None
        try:
            with heard(self._said.append, self._known):
                value = work()
        except FedkeelError as error:
            refusal = (type(error), str(error), {**vars(error)})
        said = tuple(self._said)
        self._said.clear()
        return Answer(value, refusal, said, self._spent())

    def _spent(self) -> dict[str, Spent]:
        """What was spent on images since it was last asked for."""
        images = vars(self.job).get("images") if "job" in vars(self) else None
        out = {}
        for section, spent in (images.spent if images else {}).items():
            out[section] = replace(spent)
            spent.images, spent.seconds, spent.cpu_seconds, spent.peak = 0, 0.0, 0.0, None
        return out


def lost(what: str, why: Lost) -> RunError:
    """The error of a run that cannot do without this."""
    error = RunError(f"{what}: {why.reason}")
    if why.trace:
        error.add_note(why.trace)
    return error
