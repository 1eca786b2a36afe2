"""Clients in worker processes of this machine: the same numbers as in one process, whatever becomes of the workers."""

from __future__ import annotations

import fcntl
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import battery
import pytest
import torch
from safetensors.torch import load_file

from fedkeel import registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.config import Config
from fedkeel.errors import ConfigError, RunError, TooFewClients, UndeclaredField
from fedkeel.files import write
from fedkeel.generators import store
from fedkeel.job import Job
from fedkeel.loop import Result, run
from fedkeel.options import option
from fedkeel.record import Console, Record, Silent, numbers
from fedkeel.records import Local, Reply, Samples, Server, Update
from fedkeel.runtimes import pool
from fedkeel.runtimes.boxes import Box
from fedkeel.runtimes.pool import Area, Placed, Pool

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only"),
]
TWO = ("runtime=pool", "workers=2")
UNIFORM = "algorithm.weights=uniform"
PRIVATE = (UNIFORM, "privacy.clip=0.5", "privacy.noise_multiplier=0.02", "privacy.randomness=seed")


class Heard(Silent):
    """Keeps warnings; calls `after` with the number of each round that ends."""

    def __init__(self, after: Callable[[int], None] = lambda number: None) -> None:
        self.warnings: list[str] = []
        self.after = after

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def finished_round(self, record: Record) -> None:
        self.after(record["round"])


STRANGERS: set[int] = set()
"""Processes that tests of other files have left: Ray leaves one that nobody has waited for."""


@pytest.fixture(autouse=True, scope="module")
def strangers() -> Iterator[None]:
    STRANGERS.update(children())
    yield
    STRANGERS.clear()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """However a run ends, its workers do, and no files and no shared memory stay open."""
    before = held()
    yield
    assert children() == []
    if held() - before:
        gc.collect()
    assert not held() - before


def held() -> Counter[str]:
    """What this process has open, and how many pieces of memory it shares with those it forks."""
    open_ = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    found = Counter(str(path) for path in open_ if not path.is_relative_to("/proc"))  # but what is read here
    found["shared"] = Path("/proc/self/maps").read_text().count("/dev/zero (deleted)")
    return found


def children() -> list[int]:
    """Processes that this one has started since these tests began, ended ones that nobody has waited for included."""
    found = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    return [int(pid) for each in found for pid in each if int(pid) not in STRANGERS]


def config(method: str, *overrides: str, net: str = "batch") -> Config:
    """All four clients in each of three rounds, in two workers."""
    return battery.config(method, *TWO, "participation=1.0", *overrides, net=net)


def plain(wanted: Config, folder: Path | None = None) -> Result:
    """The same configuration in one process."""
    return run(replace(wanted, runtime="inprocess"), data=battery.data(), folder=folder)


def forked(wanted: Config, folder: Path | None = None, listener: Silent | None = None) -> Result:
    """The run in worker processes."""
    return run(wanted, data=battery.data(), folder=folder, listener=listener)


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What clients keep, by file."""
    return {path.name: load_file(path) for path in sorted((folder / "clients").glob("*.safetensors"))}


def same(one: Result, other: Result) -> None:
    """Records, weights and what clients keep, bit for bit."""
    battery.same(one, other)
    assert one.folder is not None and other.folder is not None
    kept, again = states(one.folder), states(other.folder)
    assert kept.keys() == again.keys()
    for name, tensors in kept.items():
        battery.same_bits(tensors, again[name], name)


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without times."""
    return [numbers(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# the same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides", "net"),
    [
        ("scaffold", ("algorithm.variate=gradient", "local.optimiser=keep", "local.momentum=0.9"), "batch"),
        ("fedrep", ("evaluate.local_every=2", "participation=0.75", "personal.every=2"), "batch"),
        ("fedamp", (), "batch"),
        ("scaffold", PRIVATE, "group"),
        ("scaffold", (UNIFORM, "robust.name=median"), "group"),
    ],
    ids=["state", "personal", "mail", "privacy", "robust"],
)
def test_the_same_bits_as_in_process(method: str, overrides: tuple[str, ...], net: str, tmp_path: Path) -> None:
    if overrides is PRIVATE:
        pytest.importorskip("dp_accounting")
    wanted = config(method, *overrides, net=net)
    there = forked(wanted, tmp_path / "pool")
    assert states(tmp_path / "pool")
    same(plain(wanted, tmp_path / "one"), there)


def test_images_that_workers_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pool of their own; what it took is counted once, also when a worker that comes later finds it counted."""
    makers, add = tmp_path / "makers", store.Pool._add

    def noting(self: store.Pool, *args: Any) -> None:
        write(makers / f"{os.getpid()}", b"")
        add(self, *args)

    makers.mkdir()
    monkeypatch.setattr(store.Pool, "_add", noting)
    wanted, heard = config("fbl"), Heard(kill_idle)
    there = forked(replace(wanted, pool=replace(wanted.pool, dir=str(tmp_path / "images"))), tmp_path / "pool", heard)
    assert len(list(makers.iterdir())) == 2 and not (makers / f"{os.getpid()}").exists()
    assert list((tmp_path / "images").rglob("part-*")) and len(heard.warnings) == 1
    wanted = replace(wanted, pool=replace(wanted.pool, dir=str(tmp_path / "others")))
    same(plain(wanted, tmp_path / "one"), there)
    spent = [json.loads((tmp_path / name / "generators.json").read_text())["generator"] for name in ("pool", "one")]
    assert spent[0]["images"] == spent[1]["images"] > 0 and spent[0]["seconds"] > 0


def test_generators_that_workers_tune(tmp_path: Path) -> None:
    wanted = config("regl", "algorithm.tune=true", "algorithm.min_images=1")
    there, one = (replace(wanted, pool=replace(wanted.pool, dir=str(tmp_path / name))) for name in ("here", "there"))
    same(plain(one, tmp_path / "one"), forked(there, tmp_path / "pool"))
    adapters = [json.loads((tmp_path / name / "adapters.json").read_text()) for name in ("one", "pool")]
    prints = [{each["client"]: each["fingerprint"] for each in found} for found in adapters]
    assert prints[0] == prints[1] != {}
    battery.same_bits(
        *(load_file(tmp_path / name / "contact.safetensors") for name in ("one", "pool")), "contact sheet: "
    )


@pytest.mark.parametrize(("first", "then"), [("pool", "inprocess"), ("inprocess", "pool")])
def test_stopped_and_resumed_under_another_runtime(first: str, then: str, tmp_path: Path) -> None:
    wanted = config("scaffold")
    with pytest.raises(KeyboardInterrupt):
        run(replace(wanted, runtime=first), data=battery.data(), folder=tmp_path / "run", listener=battery.Stop(1))
    assert children() == []
    resumed = run(replace(wanted, runtime=then, workers=3), data=battery.data(), folder=tmp_path / "run", resume=True)
    same(plain(wanted, tmp_path / "whole"), resumed)


def test_runs_one_after_another_in_one_process() -> None:
    """Workers are forked from a process that has trained."""
    wanted = config("feddyn")
    one = plain(wanted)
    battery.same(one, forked(wanted))
    battery.same(one, forked(replace(wanted, workers=3)))


def test_progress_bars_do_not_disturb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They have a thread; from 3.12 on Python warns of a fork beside threads, and here warnings are errors."""
    fork, console, seen = os.fork, Console(), list[int]()

    def warning() -> int:
        seen.append(threading.active_count())
        warnings.warn("multi-threaded, use of fork() may lead to deadlocks", DeprecationWarning, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", warning)
    wanted = config("fedavg", "rounds=1")
    with console.bars:
        one = run(wanted, data=battery.data(), listener=console)
    assert len(seen) == 2 and min(seen) > 1
    battery.same(plain(wanted), one)
    assert "warning" not in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Wide(Algorithm):
    """Computes what PyTorch spreads over its threads, and sends how many these are."""

    def sends(self) -> tuple[str, ...]:
        return ("threads",)

    def prepare(self, local: Local) -> Samples:
        torch.ones(1_000_000).exp().sum()
        return local.data

    def upload(self, local: Local) -> Update:
        threads = torch.tensor([float(torch.get_num_threads())])
        return Update(1.0, local.params - local.anchor, extra={"threads": threads}, metrics={"threads": float(threads)})


def test_threads_of_the_process_that_was_started_are_no_hindrance(room: str) -> None:
    """PyTorch's threads do not survive a fork, and who has used them would wait for them for ever."""
    registry.register(room, "wide")(Wide)
    torch.set_num_threads(2)
    torch.ones(1_000_000).exp().sum()
    result = forked(config("wide", "threads=2", "rounds=1"))
    assert result.rounds[0]["method/threads"] == 2.0


# replies --------------------------------------------------------------------------------------------------------------


def test_what_finds_no_room_in_shared_memory_travels_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, boxes, put = config("scaffold"), Counter[bool](), Area.put

    def counting(self: Area, thing: Any) -> Any:
        out = put(self, thing)
        boxes[b"Box" in repr(out).encode()] += 1
        return out

    monkeypatch.setattr(pool, "Area", lambda size: Area(100))
    monkeypatch.setattr(Area, "put", counting)
    there = forked(wanted, tmp_path / "pool")
    assert boxes[True]
    same(plain(wanted, tmp_path / "one"), there)


def test_all_usual_replies_find_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tensor: torch.Tensor) -> Box:
        raise AssertionError(f"no room for {tensor.shape}")

    monkeypatch.setattr(Box, "of", staticmethod(refused))
    kept = ("algorithm.variate=gradient", "local.optimiser=keep", "local.momentum=0.9")
    assert not forked(config("scaffold", *kept)).rounds[-1]["failed"]


DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.complex64,
)  # fmt: skip


def test_an_area() -> None:
    """Every type, no dimensions, no elements, parts of others, in records; aligned; copies, or views of it."""
    grid = torch.arange(24).reshape(4, 6)
    tensors = {str(dtype): grid.to(dtype) for dtype in DTYPES}
    tensors |= {"none": torch.empty(0, 3), "scalar": torch.tensor(0.1), "part": grid[1:3, ::2], "turned": grid.T}
    tensors |= {"nan": torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32)}
    tensors |= {"odd": torch.ones(3, dtype=torch.bool), "minus": torch.tensor([-0.0])}
    area = Area(1 << 16)
    reply = Reply(3, update=Update(1.0, torch.ones(2), extra=tensors), state={"h": torch.ones(5)}, metrics={"a": 1.0})
    placed = area.put((reply, [None, "text", {1: torch.zeros(2)}], Reply))
    starts = [each.start for each in placed[0].update.extra.values()]
    assert all(start % pool.ALIGNED == 0 for start in starts)
    assert all(type(each) is Placed for each in placed[0].update.extra.values())
    for copy in (True, False):
        back, rest, kind = area.take(placed, copy)
        battery.same_bits(tensors, back.update.extra, f"extra, copy {copy}: ")
        assert back.metrics == {"a": 1.0} and kind is Reply
        assert rest[:2] == [None, "text"] and torch.equal(rest[2][1], torch.zeros(2))
    copied, view = (area.take(placed, copy)[0].state["h"] for copy in (True, False))
    area.put((torch.full((1 << 12,), 7, dtype=torch.uint8),))
    assert torch.equal(copied, torch.ones(5)) and not torch.equal(view, torch.ones(5))
    copied.add_(1)  # a copy is the taker's


def test_an_area_that_is_full() -> None:
    """To the last byte; what finds no room any more is a box, and what comes after may find some."""
    area = Area(128)
    first, large, last = torch.arange(8), torch.arange(9), torch.arange(8) + 1
    out = area.put([first, large, last])
    assert [type(each) for each in out] == [Placed, Box, Placed]
    assert all(map(torch.equal, area.take(out), (first, large, last)))
    nothing = Area(0)
    assert torch.equal(nothing.take(nothing.put(torch.ones(2))), torch.ones(2))


def test_what_all_get_is_written_once_a_round_and_nothing_of_the_servers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(config("scaffold"), battery.data())
    runtime = Pool().start(job)
    try:
        server = replace(job.first_server(), layout=job.worker.weights.layout)
        secret = torch.full((3,), 1.7251)
        whole = replace(server, private={"h": secret}, beside={"other": secret}, metrics={"of": 1.0}, lab=job.lab(0))
        sent, put = list[Server](), Area.put

        def noting(self: Area, thing: Any) -> Any:
            if self is runtime._area:
                sent.append(thing)
            return put(self, thing)

        monkeypatch.setattr(Area, "put", noting)
        replies = list(runtime.run(whole, [0, 1, 2, 3], {}, measure=()))
        assert [reply.client for reply in replies] == [0, 1, 2, 3] and not any(reply.failure for reply in replies)
        assert len(sent) == 1 and "c" in sent[0].shared
        assert not sent[0].private and not sent[0].beside and not sent[0].metrics and sent[0].lab is None
        assert secret.numpy().tobytes() not in runtime._area.bytes.numpy().tobytes()
    finally:
        runtime.close()


# workers that end -----------------------------------------------------------------------------------------------------


def kill_idle(number: int) -> None:
    """After the first round, one of the workers, until it is gone."""
    if number == 1:
        pid = children()[0]
        os.kill(pid, signal.SIGKILL)
        until(lambda: [pid] * lives(pid), lambda pids: not pids)


@dataclass(frozen=True, kw_only=True)
class Strange(Algorithm):
    """In round 1, client 0 raises; in round 2, client 1 kills its process once and client 3 always, or raises in a
    process that it must not kill."""

    folder: str = option("", "where it is noted who has died")

    def client_state(self, params: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"count": torch.zeros((), dtype=torch.bfloat16)}

    def prepare(self, local: Local) -> Samples:
        if local.round == 0 and local.client == 0:
            raise ValueError("no data today")
        dead = Path(self.folder) / f"{local.client}"
        if local.round == 1 and (local.client == 3 or (local.client == 1 and not dead.exists())):
            if not (Path(self.folder) / "spare").exists():
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if local.client == 3:
                raise ValueError("spared")
        return local.data

    def upload(self, local: Local) -> Update:
        return Update(1.0, local.params - local.anchor, keep={"count": local.mine["count"] + 1})


def test_workers_that_are_killed_while_they_train_and_methods_that_raise(room: str, tmp_path: Path) -> None:
    registry.register(room, "strange")(Strange)
    wanted, heard = config("strange", f"algorithm.folder={tmp_path}"), Heard()
    there = forked(wanted, tmp_path / "pool", heard)
    assert {(text.partition(":")[0], text.partition(": ")[2]) for text in heard.warnings} == {
        (f"a worker process died before or during client {k}'s turn", "it ended with SIGKILL") for k in (1, 3)
    }
    (tmp_path / "spare").touch()
    one = plain(wanted, tmp_path / "one")
    first, second = there.rounds[0]["failed"], there.rounds[1]["failed"]
    assert first[0]["reason"] == "ValueError: no data today" and "in prepare" in first[0]["trace"]
    reason = "a worker process died 3 times before or during its turn: it ended with SIGKILL"
    assert second == [{"client": 3, "reason": reason}]
    assert [record["clients"] for record in there.rounds] == [[1, 2, 3], [0, 1, 2], [0, 1, 2, 3]]
    there.rounds[1]["failed"] = one.rounds[1]["failed"]
    there.rounds[0]["failed"] = one.rounds[0]["failed"]  # the lines of a traceback differ
    same(one, there)


def test_what_a_failed_client_does_to_the_run(room: str, tmp_path: Path) -> None:
    registry.register(room, "strange")(Strange)
    wanted = config("strange", f"algorithm.folder={tmp_path}")
    with pytest.raises(RunError, match=r"^round 1: client 0: ValueError: no data today \(on_failure = 'stop'\)"):
        forked(replace(wanted, on_failure="stop"), tmp_path / "stop")
    assert "in prepare" in json.loads((tmp_path / "stop" / "failure.json").read_text())["failed"][0]["trace"]
    with pytest.raises(TooFewClients, match="3 usable updates, min_replies = 4: client 0: ValueError: no data today"):
        forked(replace(wanted, min_replies=4), tmp_path / "few")


def test_a_worker_that_is_killed_between_rounds() -> None:
    heard, wanted = Heard(kill_idle), config("scaffold")
    battery.same(plain(wanted), forked(wanted, listener=heard))
    (text,) = heard.warnings
    assert text.startswith("a worker process died before or during client ")
    assert text.endswith("'s turn: it ended with SIGKILL")


@dataclass(frozen=True, kw_only=True)
class Mistaken(Algorithm):
    """Client 1 makes a mistake in round 2; everyone warns in each round."""

    mistake: str = option("", "which")

    def prepare(self, local: Local) -> Samples:
        warnings.warn("strange weather", stacklevel=2)
        if local.client == 1 and local.round == 1 and self.mistake == "value":
            raise ConfigError("algorithm.mistake", self.mistake, "is none", "non")
        return local.data

    def upload(self, local: Local) -> Update:
        wrong = local.client == 1 and local.round == 1
        extra = {"secret": torch.ones(1)} if wrong and self.mistake == "field" else {}
        metrics: dict[str, Any] = {"call": lambda: 1.0} if wrong and self.mistake == "reply" else {}
        return Update(1.0, local.params - local.anchor, extra=extra, metrics=metrics)


def test_mistakes_and_warnings_in_workers(room: str, tmp_path: Path) -> None:
    registry.register(room, "mistaken")(Mistaken)
    with pytest.raises(ConfigError, match=r"^algorithm.mistake = 'value': is none. Did you mean 'non'\?$") as caught:
        forked(config("mistaken", "algorithm.mistake=value"), tmp_path / "value", heard := Heard())
    assert (caught.value.key, caught.value.value, caught.value.allowed) == ("algorithm.mistake", "value", "is none")
    assert len(rounds(tmp_path / "value")) == 1 and heard.warnings == ["strange weather"]
    with pytest.raises(UndeclaredField, match=r"^Mistaken.upload sends \['secret'\], which is not in `sends`$"):
        forked(config("mistaken", "algorithm.mistake=field"), listener=Heard())
    result = forked(config("mistaken", "algorithm.mistake=reply"), listener=Heard())
    (failed,) = result.rounds[1]["failed"]
    assert failed["client"] == 1 and "pickle" in failed["reason"] and "Traceback" in failed["trace"]


def test_a_run_that_is_interrupted_in_the_middle_of_a_round(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C, which reaches the workers too. `nothing_left` sees to the rest."""
    wait = pool.PoolRuntime.wait

    def interrupted(self: pool.PoolRuntime) -> Any:
        for pid in children():
            os.kill(pid, signal.SIGINT)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool.PoolRuntime, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forked(config("fedavg"))
    monkeypatch.setattr(pool.PoolRuntime, "wait", wait)
    runtime = Pool().start(Job(config("fedavg"), battery.data()))
    server = replace(runtime.job.first_server(), layout=runtime.job.worker.weights.layout)
    for _ in range(2):  # they ignore it once they are there
        assert not any(reply.failure for reply in runtime.run(server, [0, 1], {}, measure=()))
        assert len(multiprocessing.active_children()) == 2
        for pid in children():
            os.kill(pid, signal.SIGINT)
    runtime.close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_that_cannot_be_forked(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, and no worker is left: `nothing_left` sees to that."""
    start, forks = ForkProcess.start, list[int]()

    def failing(self: ForkProcess) -> None:
        forks.append(0)
        if len(forks) == number:  # as os.fork does, but that Python leaves pipes open then
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(self)

    monkeypatch.setattr(ForkProcess, "start", failing)
    runtime = Pool().start(Job(config("fedavg"), battery.data()))
    server = replace(runtime.job.first_server(), layout=runtime.job.worker.weights.layout)
    with pytest.raises(RunError, match=r"^starting a worker process: Resource temporarily unavailable$"):
        next(runtime.run(server, [0, 1], {}, measure=()))
    assert len(forks) == number
    runtime.close()
    forks.clear()
    with pytest.raises(RunError, match=r"^starting a worker process: "):
        forked(config("fedavg"))


def test_memory_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(size: int) -> Area:
        raise OSError(12, "Cannot allocate memory")

    runtime = Pool().start(Job(config("fedavg"), battery.data()))
    monkeypatch.setattr(pool, "Area", none)
    with pytest.raises(RunError, match=r"^starting a worker process: Cannot allocate memory$"):
        runtime.hire(runtime.slots[0])
    assert runtime.slots[0].handle is None and not runtime.slots[0].alive
    runtime.close()


def test_a_run_that_is_interrupted_while_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there already, and ends with the run."""
    start, started = ForkProcess.start, list[int]()

    def interrupted(self: ForkProcess) -> None:
        start(self)
        assert self.pid is not None
        started.append(self.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(ForkProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forked(config("fedavg"))
    assert len(started) == 1


SLOW = """
    import os, sys, time
    from dataclasses import dataclass
    from pathlib import Path
    import battery, tiny
    from fedkeel import registry
    from fedkeel.algorithms.base import Algorithm
    from fedkeel.loop import run

    class Slow(Algorithm):
        def prepare(self, local):
            (Path(sys.argv[1]) / f"{os.getpid()}").touch()
            time.sleep(600)

    registry.register("algorithms", "slow")(dataclass(frozen=True, kw_only=True)(Slow))
    config = tiny.config("algorithm.name=slow", "runtime=pool", "workers=3")
    run(config, data=battery.data(), folder=Path(sys.argv[1]) / "run")
"""


def test_workers_end_with_the_process_that_was_started(tmp_path: Path) -> None:
    """Also when that is killed while they train; nobody holds the run's folder then."""
    words = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path)]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as started:
        try:
            pids = until(lambda: [pid for pid in map(number, tmp_path.iterdir()) if pid], lambda pids: len(pids) == 3)
            assert all(map(lives, pids))
        finally:
            started.kill()
    try:
        until(lambda: [pid for pid in pids if lives(pid)], lambda pids: not pids, 10)
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)
    with (tmp_path / "run" / ".lock").open("w") as file:

        def locked() -> list[int]:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return [1]
            return []

        until(locked, lambda found: not found, 10)


def number(path: Path) -> int:
    return int(path.name) if path.name.isdigit() else 0


def lives(pid: int) -> bool:
    """Whether this process is there and not all of its threads have ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(look: Callable[[], list[int]], enough: Callable[[list[int]], bool], seconds: float = 120) -> list[int]:
    """What is seen once it is enough."""
    end = time.monotonic() + seconds
    while not enough(seen := look()):
        assert time.monotonic() < end, seen
        time.sleep(0.05)
    return seen


# how many, and where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "count"), [((), 3), (("workers=2",), 2), (("workers=64",), 4), (("clients=1",), 1)]
)
def test_how_many_workers(overrides: tuple[str, ...], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as cores, or as asked for; no more than clients."""
    monkeypatch.setattr(pool, "cores", lambda: 3)
    wanted = battery.config("fedavg", "runtime=pool", "participation=1.0", *overrides)
    runtime = Pool().start(Job(wanted, battery.data()))
    assert len(runtime.slots) == count and not children()
    server = replace(runtime.job.first_server(), layout=runtime.job.worker.weights.layout)
    assert len(list(runtime.run(server, range(wanted.clients), {}, measure=()))) == wanted.clients
    assert len(children()) == count
    runtime.close()


def test_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `workers` does not say how many."""
    monkeypatch.setattr(pool, "cores", lambda: 4)
    for overrides, count in (((), 2), (("workers=3",), 3)):
        job = Job(battery.config("fedavg", "runtime=pool", *overrides), battery.data())
        assert len(Pool(cores=2).start(job).slots) == count


def test_no_more_workers_than_have_something_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All make images and measure personal models, two clients train in a round: so many are there then."""
    fork, forks, there = os.fork, list[int](), list[int]()

    def counting() -> int:
        if (pid := fork()) != 0:
            forks.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", counting)
    wanted = config("fbl", "workers=64", "participation=2", "personal.measure=always", "personal.every=2", "rounds=4")
    wanted = replace(wanted, pool=replace(wanted.pool, dir=str(tmp_path)))
    result = forked(wanted, listener=Heard(lambda number: there.append(len(children()))))
    makers = int((Job(wanted, battery.data()).plan.fake.sum(1) > 0).sum())
    assert makers > 2 and len(forks) == makers + 2
    assert there == [2, 4, 4, 4] and not result.rounds[-1]["failed"]
    forks.clear()
    forked(config("fedavg", "workers=64", "participation=2"))
    assert len(forks) == 2


def test_fewer_clients_than_workers() -> None:
    wanted = config("scaffold", "clients=2", "workers=8", "partition.name=iid")
    battery.same(plain(wanted), forked(wanted))


def test_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 1))
    with pytest.raises(ConfigError, match=r"^runtime = 'pool': the run is on cuda:1, .*: use ray or inprocess"):
        Pool().start(on_gpu)
    monkeypatch.setattr(pool, "sys", SimpleNamespace(platform="darwin"))
    on_a_mac: Any = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^runtime = 'pool': needs Linux, this is darwin: use ray or inprocess"):
        Pool().start(on_a_mac)


def test_the_number_of_workers_is_above_zero_and_no_matter_of_results() -> None:
    with pytest.raises(ConfigError, match=r"^workers = 0: must be >= 1"):
        config("fedavg", "workers=0")
    assert config("fedavg").key() == battery.config("fedavg", "participation=1.0").key()


@pytest.mark.full
@pytest.mark.parametrize("method", battery.methods())
def test_every_method_in_workers(method: str, tmp_path: Path) -> None:
    """With images of the workers' own."""
    wanted = battery.config(method, *TWO)
    there = forked(replace(wanted, pool=replace(wanted.pool, dir=str(tmp_path / "images"))), tmp_path / "pool")
    same(plain(wanted, tmp_path / "one"), there)
