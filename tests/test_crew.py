"""Who does what, and when: clients in worker processes that only a clock stands for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedkeel.records import Reply, Update
from fedkeel.runtimes import crew
from fedkeel.runtimes.boxes import boxed, weighed
from fedkeel.runtimes.crew import AHEAD, Answer, Crew, Lost, Queue, Slot, quota

MIB = 1 << 20


@dataclass
class Work:
    """A task that counts how often anybody asks how long it takes."""

    client: int
    length: int
    what: str = "fit"
    looks: int = 0

    @property
    def cost(self) -> int:
        self.looks += 1
        return self.length

    def args(self) -> tuple[Any, ...]:
        return ()


@dataclass
class Clock(Crew):
    """Workers that take as long as a task costs. held: the most tasks begun whose answer nobody has taken yet."""

    workers: int
    memory: float = 2.0
    size: int = 0
    """Bytes of an answer."""
    now: float = 0.0
    held: int = 0
    hired: int = 0
    taken: int = 0
    begun: list[Slot] = field(default_factory=list)
    until: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = SimpleNamespace(total=1000)
        job: Any = SimpleNamespace(
            plan=SimpleNamespace(real=torch.zeros(1, 1), fake=torch.zeros(1, 1)),
            worker=SimpleNamespace(weights=SimpleNamespace(layout=layout)),
            config=SimpleNamespace(memory=self.memory),
        )
        super().__init__(job)
        self.slots = [Slot() for _ in range(self.workers)]

    def hire(self, slot: Slot) -> None:
        slot.handle, slot.alive = self.slots.index(slot), True
        self.hired += 1

    def dismiss(self, slot: Slot) -> None:
        slot.handle, slot.alive, slot.doing = None, False, None

    def ask(self, handle: Any, what: str, *args: Any) -> Any:
        slot = self.slots[handle]
        self.begun.append(slot)
        self.held = max(self.held, len(self.begun) - self.taken)
        assert slot.doing is not None
        self.until[handle] = self.now + self.tasks[slot.doing].length

    def wait(self) -> list[tuple[Slot, Answer | Lost]]:
        busy = [slot for slot in self.slots if slot.doing is not None]
        first = min(busy, key=lambda slot: self.until[slot.handle])
        self.now = self.until[first.handle]
        value = Reply(0, update=Update(1.0, torch.empty(self.size // 2, dtype=torch.uint8)), state=self.kept())
        return [(first, Answer(value))]

    def kept(self) -> dict[str, torch.Tensor]:
        return {"mine.c": torch.empty(self.size - self.size // 2, dtype=torch.uint8)}

    def round(self, lengths: Sequence[int]) -> float:
        """How long it takes."""
        began, self.taken, self.begun = self.now, 0, []
        self.tasks = [Work(client, length) for client, length in enumerate(lengths)]
        answers: Iterator[Any] = self._each(self.tasks)  # type: ignore[arg-type]
        for _ in answers:
            self.taken += 1
        assert self.taken == len(lengths)
        return self.now - began


def skewed(count: int, seed: int) -> list[int]:
    """Lengths of clients whose labels are dealt out with Dirichlet weights of 0.1."""
    draw = random.Random(seed)
    weights = torch.tensor([[draw.gammavariate(0.1, 1) for _ in range(count)] for _ in range(10)])
    return (1 + (25 * count * weights / weights.sum(1, keepdim=True)).sum(0).int()).tolist()


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_replies_that_wait_do_not_grow_with_the_cohort(workers: int) -> None:
    """Also where the last clients take longest, which go first as far as that goes."""
    most = []
    for count in (100, 1000):
        run = Clock(workers)
        run.round([100 + client for client in range(count)])
        most.append(run.held)
    assert most[1] <= AHEAD * workers, most
    run = Clock(workers)
    run.round(skewed(1000, 1))
    assert run.held <= 2 * AHEAD * workers  # the very long are asked for early, and are few


@pytest.mark.parametrize(("workers", "count", "most"), [(2, 10, 1.03), (2, 300, 1.01), (8, 100, 1.05), (64, 300, 1.1)])
def test_a_round_takes_hardly_longer_than_its_work_does(workers: int, count: int, most: float) -> None:
    """On a clock, four partitions: no shorter than a worker's share, or than the longest client."""
    took = best = 0.0
    for seed in range(4):
        lengths = skewed(count, seed)
        took += Clock(workers).round(lengths)
        best += max(sum(lengths) / workers, max(lengths))
    assert best <= took < most * best


def test_replies_that_wait_find_room_in_memory() -> None:
    """By the size that they turn out to have, whatever the number of weights says; each worker may have one."""
    for memory, most in ((8 / 1024, 8), (5 / 1024, 5), (1e-9, 4)):
        run = Clock(4, memory=memory, size=MIB)
        for _ in range(2):  # what was learnt in one round is known in the next
            run.held = 0
            run.round([100 + client for client in range(200)])
        assert most - 1 <= run.held <= most
    unequal = Clock(4, memory=12 / 1024, size=MIB)
    for _ in range(2):
        unequal.held = 0
        unequal.round([1] * 190 + [1000] * 10)  # however long those are that come last
    assert unequal.held <= 12


def test_the_size_of_a_reply() -> None:
    reply = Reply(3, update=Update(1.0, torch.ones(10), extra={"c": torch.ones(5, dtype=torch.float64)}))
    reply = Reply(3, update=reply.update, state={"h": torch.ones(3, dtype=torch.bool)}, metrics={"a": 1.0})
    assert weighed(reply) == weighed(boxed(reply)) == 40 + 40 + 3
    assert weighed(([0.5], 3)) == 0


def test_choosing_among_many_takes_little() -> None:
    """How long tasks take is looked at a few times for each, however many there are and workers are busy."""
    run = Clock(32)
    run.round([100] * 1000)
    assert sum(task.looks for task in run.tasks) < 10 * 1000
    run.round([100] * 1000)  # when each has a worker that it ran on
    assert sum(task.looks for task in run.tasks) < 100 * 1000


def test_only_free_workers_look_for_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, calls = Clock._ahead, list[int]()

    def counting(self: Clock, *given: Any) -> Sequence[int]:
        calls.append(0)
        return ahead(self, *given)

    monkeypatch.setattr(Clock, "_ahead", counting)
    Clock(16).round([100] * 500)
    assert len(calls) < 2 * 500


def test_no_more_workers_start_than_there_are_tasks() -> None:
    run = Clock(64)
    run.round([100] * 10)
    assert run.hired == 10
    run.round([100] * 10)
    assert run.hired == 10
    run.round([100] * 30)
    assert run.hired == 30


def test_what_is_taken_back_comes_again() -> None:
    queue = Queue([1, 9, 5], 1)
    assert list(queue.near(0, 3, 0)) == [1, 2, 0]
    queue.take(1)
    assert list(queue.near(0, 3, 1)) == [2, 0]
    queue.back(1)
    assert list(queue.near(0, 3, 0)) == [1, 2, 0]


# cores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"a/b/cpu.max": "max 100000\n"}, 16),
        ({"a/b/cpu.max": "250000 100000\n"}, 3),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 200000\n", "cpu.max": "600000 100000\n"}, 2),
        ({"a/b/cpu.max": "20000 100000\n"}, 1),
        ({"a/b/cpu.max": "3200000 100000\n"}, 16),
        ({"cpu.max": "400000 100000\n"}, 4),
    ],
)
def test_cores_are_those_of_the_control_group(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this process's and of those around it, the least; a part of one counts as one."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("4:memory:/elsewhere\n0::/a/b\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "cpu.max").write_text("1 100000\n")  # not within
    monkeypatch.setattr(crew, "quota", lambda: quota(tmp_path / "self", tmp_path / "fs"))
    monkeypatch.setattr(crew, "os", SimpleNamespace(sched_getaffinity=lambda pid: range(16)))
    assert crew.cores() == cores


def test_cores_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path) == float("inf")
    (tmp_path / "cgroup").write_text("1:cpu:/\n")
    assert quota(tmp_path, tmp_path) == float("inf")
    assert crew.cores() >= 1
