"""The runtime of Ray without Ray: what it sends to processes, whom it asks for what, and what it does when they end."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import battery
import pytest
import tiny
import torch

from fedkeel.config import Config
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, RunError
from fedkeel.federation import Cluster
from fedkeel.job import Job
from fedkeel.loop import Result, run
from fedkeel.record import Record, Silent
from fedkeel.records import Samples, Server
from fedkeel.runtimes.boxes import unboxed
from fedkeel.runtimes.crew import Slot, Task
from fedkeel.runtimes.ray import RayRuntime
from fedkeel.runtimes.ray_worker import Setup

pytestmark = pytest.mark.full


class Failed(Exception):
    """A method that raised, as Ray has it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Died(Exception):
    """A process that ended."""


@dataclass(frozen=True)
class Ref:
    """Of something that was put, or is asked for."""

    number: int

    def hex(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class Asked:
    """What a process is asked to do."""

    process: int
    name: str
    args: tuple[Any, ...]


class Handle:
    """A process, that does what it is asked when that is waited for."""

    def __init__(self, ray: InOneProcess, number: int, make: Callable[[], Any]) -> None:
        self.ray, self.number, self.make, self.actor = ray, number, make, None

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.ray.ask(self, name, args))


class InOneProcess:
    """In place of the package `ray`. All that travels is pickled; what is asked first is done first; `ends` says when a
    process does so; `cache` is that of the machine of all but the server's process, None for the same machine."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RayTaskError=Failed, RayError=Died)
        self.ends: Callable[[Asked], bool] = lambda asked: False
        self.cache: Path | None = None
        self.asked: list[Asked] = []
        self.gone: set[int] = set()
        self.processes = 0
        self._there: dict[Ref, bytes] = {}
        self._open: dict[Ref, tuple[Handle, bytes]] = {}
        self._refs = 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, kind: type) -> Any:
        def start(*args: Any) -> Handle:
            self.processes += 1
            sent = pickle.dumps(args)
            return Handle(self, self.processes, lambda: kind(*pickle.loads(sent)))  # noqa: S301

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=start))

    def kill(self, handle: Handle) -> None:
        self.gone.add(handle.number)

    def put(self, thing: Any) -> Ref:
        ref = self._ref()
        self._there[ref] = pickle.dumps(thing)
        return ref

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        first = min(refs, key=lambda ref: ref.number)
        return [first], [ref for ref in refs if ref != first]

    def get(self, ref: Ref) -> Any:
        if ref in self._there:
            return pickle.loads(self._there[ref])  # noqa: S301
        handle, sent = self._open.pop(ref)
        name, args = pickle.loads(sent)  # noqa: S301
        if handle.number in self.gone or self.ends(Asked(handle.number, name, args)):
            self.gone.add(handle.number)
            raise Died("its end came")
        with pytest.MonkeyPatch.context() as patch:
            if self.cache is not None:
                patch.setenv("FEDKEEL_CACHE", str(self.cache))
            try:
                handle.actor = handle.actor or handle.make()
                return pickle.loads(pickle.dumps(getattr(handle.actor, name)(*args)))  # noqa: S301
            except Exception as error:
                raise Failed(error) from error

    def ask(self, handle: Handle, name: str, args: tuple[Any, ...]) -> Ref:
        self.asked.append(Asked(handle.number, name, args))
        ref = self._ref()
        self._open[ref] = handle, pickle.dumps((name, args))
        return ref

    def put_of(self, kind: type) -> list[Any]:
        """What was put, of that type."""
        return [thing for thing in map(self.get, self._there) if isinstance(thing, kind)]

    def sent(self) -> list[bytes]:
        """All that has been put, and all that processes were asked."""
        return [*self._there.values(), *(pickle.dumps(each.args) for each in self.asked)]

    def fits(self) -> list[Any]:
        """Calls to train a client, as they were made."""
        return [each.args[0] for each in self.asked if each.name == "fit"]

    def _ref(self) -> Ref:
        self._refs += 1
        return Ref(self._refs)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> InOneProcess:
    """Ray, as the runtime and its processes import it."""
    ours = InOneProcess()
    monkeypatch.setitem(sys.modules, "ray", ours)
    return ours


class Heard(Silent):
    """Keeps warnings; calls `after` with the number of each round that ends."""

    def __init__(self, after: Callable[[int], None] = lambda number: None) -> None:
        self.warnings: list[str] = []
        self.after = after

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def finished_round(self, record: Record) -> None:
        self.after(record["round"])


def config(method: str, *overrides: str, actors: int = 2, net: str = "batch") -> Config:
    """All four clients in each of three rounds, on Ray."""
    return battery.config(method, "runtime=ray", f"ray.actors={actors}", "participation=1.0", *overrides, net=net)


def in_process(wanted: Config, data: Dataset | None = None) -> Result:
    return run(replace(wanted, runtime="inprocess"), data=data or battery.data())


# what travels ---------------------------------------------------------------------------------------------------------


def test_only_what_is_needed_travels(ray: InOneProcess) -> None:
    """No image of anyone's but in a client's own samples, which go once; no test images where nobody measures; of the
    server what all get, once a round."""
    images, wanted = battery.data(), config("feddyn")
    battery.same(in_process(wanted), run(wanted, data=images))
    (data,) = ray.put_of(Dataset)
    data = unboxed(data, torch.device("cpu"))
    assert data.train_x.shape == data.test_x.shape == (0, *images.train_x.shape[1:]) and data.public is None
    assert len(ray.put_of(Setup)) == 2 and all(setup.config.data is None for setup in ray.put_of(Setup))
    assert len(ray.put_of(Server)) == wanted.rounds
    assert len(ray.put_of(tuple)) == wanted.clients
    samples = {pickle.dumps(each) for each in ray.put_of(tuple)}
    elsewhere = b"".join(each for each in ray.sent() if each not in samples)
    assert samples < set(ray.sent()) and len(elsewhere) > 10_000
    for image in (*images.train_x, *images.test_x):
        assert image.numpy().tobytes() not in elsewhere
    held, job = b"".join(samples), Job(wanted, images)
    assert all(image.numpy().tobytes() in held for image in images.train_x)
    for call in ray.fits():
        x, y = unboxed(ray.get(call.samples), torch.device("cpu"))
        own = job.samples(call.client)
        battery.same_bits({"x": x, "y": y}, {"x": own.x, "y": own.y}, f"client {call.client}: ")


@pytest.mark.parametrize(
    ("method", "overrides", "tests", "public"),
    [
        ("fedavg", (), 0, False),
        ("fedavg", ("evaluate.local_every=3",), 40, False),
        ("fedavg", ("evaluate.local_rounds=[2]",), 40, False),
        ("fedrep", (), 40, False),  # its personal models are measured
        ("regl", ("personal.measure=never",), 0, True),
    ],
)
def test_test_images_and_public_ones_go_where_they_are_needed(
    method: str, overrides: tuple[str, ...], tests: int, public: bool, ray: InOneProcess
) -> None:
    other = tiny.data(seed=2)
    images = replace(battery.data(), public=Samples.real_ones(other.train_x, other.train_y))
    runtime = RayRuntime(Job(config(method, *overrides), images), Cluster(actors=2), ours=False)
    (data,) = ray.put_of(Dataset)
    assert runtime.slots and len(unboxed(data.train_y, torch.device("cpu"))) == 0
    assert len(unboxed(data.test_x, torch.device("cpu"))) == len(unboxed(data.test_y, torch.device("cpu"))) == tests
    assert (data.public is not None) is public


def test_the_servers_own_stays_with_it(ray: InOneProcess) -> None:
    wanted = config("scaffold")
    job = Job(wanted, battery.data())
    runtime = RayRuntime(job, Cluster(actors=2), ours=False)
    secret = torch.full((3,), 1.7251)
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    whole = replace(server, private={"h": secret}, beside={"other": secret}, metrics={"of": 1.0}, lab=job.lab(0))
    sent = unboxed(ray.get(runtime._sent(whole)), torch.device("cpu"))
    assert not sent.private and not sent.beside and not sent.metrics and sent.lab is None
    battery.same_bits({"params": sent.params, **sent.shared}, {"params": server.params, **server.shared}, "sent: ")
    assert "c" in sent.shared and secret.numpy().tobytes() not in b"".join(ray.sent())


def test_what_all_get_is_put_once_a_round(ray: InOneProcess) -> None:
    """And once for each measurement of personal models."""
    run(config("fedrep", "personal.every=2"), data=battery.data())
    by_round = [ray.fits()[start : start + 4] for start in range(0, 12, 4)]
    curves = [each.args[0] for each in ray.asked if each.name == "curve"]
    refs = [{call.server for call in calls} for calls in (*by_round, curves[:4], curves[4:])]
    assert [len(each) for each in refs] == [1] * 5 and len(set.union(*refs)) == 5
    assert len(ray.put_of(Server)) == 5
    assert [ray.get(next(iter(each))).round for each in refs] == [0, 1, 2, 2, 3]


# who does what --------------------------------------------------------------------------------------------------------


def test_the_longest_go_first_and_replies_come_in_order(ray: InOneProcess) -> None:
    wanted = config("fedavg", actors=1)
    costs = Job(wanted, battery.data()).plan.real.sum(1).tolist()
    longest = sorted(range(4), key=lambda client: -costs[client])
    assert len(set(costs)) == 4 and longest != [0, 1, 2, 3]
    battery.same(in_process(wanted), run(wanted, data=battery.data()))
    assert [call.client for call in ray.fits()] == longest * 3


def test_no_more_are_run_ahead_than_find_room(ray: InOneProcess) -> None:
    """Each process one: with one of them, a client is asked when it is the one that is averaged next."""
    wanted = config("fedavg", "clients=8", "partition.min_size=2", "memory=1e-9", actors=1)
    battery.same(in_process(wanted), run(wanted, data=battery.data()))
    assert [call.client for call in ray.fits()] == list(range(8)) * wanted.rounds


def test_a_client_stays_where_it_ran_unless_a_long_one_waits(ray: InOneProcess) -> None:
    runtime = RayRuntime(Job(config("fedavg"), battery.data()), Cluster(actors=2), ours=False)
    one, other = runtime.slots

    def chosen(slot: Slot, *costs: int) -> int:
        near = sorted(range(3), key=lambda k: -costs[k])
        return runtime._choose(slot, [Task(k, cost, "fit", tuple) for k, cost in enumerate(costs)], near)

    assert [chosen(one, 5, 9, 5), chosen(other, 7, 0, 6)] == [1, 0]  # new ones are anybody's
    assert chosen(other, 5, 10, 1) == 0  # 1 is longer, by no more than twice
    assert chosen(other, 5, 11, 1) == 1
    assert chosen(other, 5, 9, 1) == 1  # where it stays from now on
    assert chosen(one, 3, 9, 5) == 2


# processes that end ---------------------------------------------------------------------------------------------------


def test_a_place_whose_processes_do_not_start_is_tried_again(ray: InOneProcess) -> None:
    """In the next round: three times no, then yes."""
    starts = Counter[str]()

    def ends(asked: Asked) -> bool:
        if asked.name != "hello" or asked.process == 1:
            return False
        starts["failed" if starts["failed"] < 3 else "done"] += 1
        return starts["done"] == 0

    ray.ends = ends
    heard, wanted = Heard(), config("fedavg")
    battery.same(in_process(wanted), run(wanted, data=battery.data(), listener=heard))
    assert heard.warnings == ["a worker process cannot be started: its end came"]
    assert starts == {"failed": 3, "done": 1} and ray.processes == 5
    assert {each.process for each in ray.asked if each.name == "fit"} == {1, 5}


def test_no_process_starts(ray: InOneProcess) -> None:
    ray.ends = lambda asked: asked.name == "hello"
    with pytest.raises(RunError, match=r"^starting a worker process: its end came$"):
        run(config("fedavg"), data=battery.data())
    assert ray.processes == 6 and ray.gone == set(range(1, 7))


def test_a_process_that_ends_between_rounds(ray: InOneProcess) -> None:
    """It is not the client's doing that is next on it, and is not said to be."""

    def after(number: int) -> None:
        if number == 1:
            ray.gone.add(1)

    heard, wanted = Heard(after), config("scaffold")
    battery.same(in_process(wanted), run(wanted, data=battery.data(), listener=heard))
    (text,) = heard.warnings
    assert text.startswith("a worker process died before or during client ")
    assert text.endswith("'s turn: its end came") and ray.processes == 3


def test_a_client_that_ends_its_process_three_times_has_failed(ray: InOneProcess) -> None:
    def ends(asked: Asked) -> bool:
        if asked.name != "fit":
            return False
        return asked.args[0].client == 2 and ray.get(asked.args[0].server).round == 1

    ray.ends = ends
    result = run(config("fedavg"), data=battery.data())
    assert [record["clients"] for record in result.rounds] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    reason = "a worker process died 3 times before or during its turn: its end came"
    assert result.rounds[1]["failed"] == [{"client": 2, "reason": reason}] and ray.processes == 5


def test_a_client_without_its_images_stops_the_run(ray: InOneProcess, tmp_path: Path) -> None:
    ray.ends = lambda asked: asked.name == "generate" and 1 in asked.args[0]
    died = "^making images for client 1: a worker process died 3 times before or during its turn: its end"
    with pytest.raises(RunError, match=died):
        run(config("regl", f"pool.dir={tmp_path}"), data=battery.data())


def test_a_client_whose_model_cannot_be_measured_does_not(ray: InOneProcess) -> None:
    ray.ends = lambda asked: asked.name == "curve" and asked.args[0].client == 1
    heard = Heard(lambda number: None)
    result = run(config("fedrep"), data=battery.data(), listener=heard)
    assert [value is None for value in result.rounds[-1]["personal/clients"]] == [False, True, False, False]
    reason = "a worker process died 3 times before or during its turn: its end came"
    assert f"client 1: its own model could not be measured: {reason}" in heard.warnings


# several machines -----------------------------------------------------------------------------------------------------


def test_images_on_other_machines_are_not_made_for_the_contact_sheet(
    ray: InOneProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder that all see, the server's process has none: it makes none and tunes nothing, and there is no
    sheet."""
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setenv("FEDKEEL_CACHE", str(here))
    ray.cache = there
    tune, places = Job._tune, list[str]()

    def noting(self: Job, *args: Any) -> Any:
        places.append(os.environ["FEDKEEL_CACHE"])
        return tune(self, *args)

    monkeypatch.setattr(Job, "_tune", noting)
    wanted = config("regl", "algorithm.tune=true", "algorithm.min_images=1", "pool.dir=", "rounds=1")
    result = run(wanted, data=battery.data(), folder=tmp_path / "ray")
    assert list(there.rglob("part-*")) and not list(here.rglob("part-*"))
    assert set(places) == {str(there)}
    assert not (tmp_path / "ray" / "contact.safetensors").exists()
    ray.cache = None
    shared = replace(wanted, pool=replace(wanted.pool, dir=str(tmp_path / "pool")))
    battery.same(result, run(shared, data=battery.data(), folder=tmp_path / "shared"))
    assert (tmp_path / "shared" / "contact.safetensors").exists()


# the same numbers -----------------------------------------------------------------------------------------------------

PRIVATE = (
    "algorithm.weights=uniform",
    "privacy.clip=0.5",
    "privacy.noise_multiplier=0.02",
    "privacy.randomness=seed",
)


@pytest.mark.parametrize("overrides", [PRIVATE, ("robust.name=median",)])
def test_the_same_bits_under_privacy_and_a_robust_rule(overrides: tuple[str, ...], ray: InOneProcess) -> None:
    if overrides is PRIVATE:
        pytest.importorskip("dp_accounting")
    wanted = config("scaffold", *overrides, net="group")
    battery.same(in_process(wanted), run(wanted, data=battery.data()))


# the section ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("ray.cpus=0.00001", "ray.cpus = 1e-05: must be >= 0.0001"),
        ("ray.cpus=0", "ray.cpus = 0.0: must be >= 0.0001"),
        ("ray.gpus=0.00005", "ray.gpus = 5e-05: must be 0 or >= 0.0001"),
        ("ray.gpus=-1", "ray.gpus = -1.0: must be >= 0"),
    ],
)
def test_shares_that_are_too_small(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        tiny.config(override)


def test_the_smallest_shares() -> None:
    assert tiny.config("ray.cpus=0.0001", "ray.gpus=0.0001").ray == Cluster(cpus=0.0001, gpus=0.0001)
    assert tiny.config("ray.gpus=0").ray.gpus == 0
