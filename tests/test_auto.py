"""Which runtime `auto` chooses, and that its trial changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import battery
import pytest
import torch

from fedkeel import registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.job import Job
from fedkeel.loop import run
from fedkeel.records import Local
from fedkeel.runtimes import auto
from fedkeel.runtimes.auto import Auto, idle
from fedkeel.runtimes.base import Choosing, Engine
from fedkeel.runtimes.batched import Batched
from fedkeel.runtimes.inprocess import InProcess
from fedkeel.runtimes.pool import Pool


def chosen(
    monkeypatch: pytest.MonkeyPatch, seconds: float, load: float, *overrides: str, cores: int = 2, before: str = ""
) -> Engine:
    monkeypatch.setattr(auto, "seconds", lambda job: seconds)
    monkeypatch.setattr(auto, "cores", lambda: cores)
    monkeypatch.setattr(auto, "os", SimpleNamespace(getloadavg=lambda: (load, load, load)))
    job = Job(battery.config("fedavg", "runtime=auto", *overrides), battery.data())
    engine = Auto().choose(job, before)
    assert isinstance(Auto(), Choosing)
    runtime = engine.start(job)
    assert type(Auto().start(job)) is type(runtime) or before
    runtime.close()
    return engine


def test_workers_where_rounds_are_long_and_cores_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 1.0, 0.8) == Pool(cores=2)
    assert chosen(monkeypatch, 0.01, 0.8) == InProcess()  # too short
    assert chosen(monkeypatch, 1.0, 2.5) == InProcess()  # the other core is taken
    assert chosen(monkeypatch, 1.0, 0.8, "participation=1") == InProcess()  # one client a round
    assert chosen(monkeypatch, 1.0, 0.8, "workers=1") == InProcess()


def test_workers_for_idle_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of one, idle, counts as one."""
    assert chosen(monkeypatch, 1.0, 59.0, cores=64) == Pool(cores=6)
    assert chosen(monkeypatch, 1.0, 62.5, cores=64) == Pool(cores=3)
    assert chosen(monkeypatch, 1.0, 64.0, cores=64) == InProcess()


def test_a_run_that_goes_on_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a trial would say; where it can be."""
    assert chosen(monkeypatch, 1.0, 0.8, before="inprocess") == InProcess()
    assert chosen(monkeypatch, 0.01, 2.5, before="pool") == Pool(cores=2)
    assert chosen(monkeypatch, 1.0, 0.8, before="batched") == Pool(cores=2)  # begun on a GPU
    assert chosen(monkeypatch, 1.0, 0.8, "workers=1", before="pool") == InProcess()


@pytest.mark.parametrize(
    ("before", "gain", "overrides", "engine"),
    [
        ("", 0.9, (), InProcess()),
        ("", 1.1, (), Batched()),
        ("batched", None, (), Batched()),
        ("inprocess", None, (), InProcess()),
        ("pool", 1.1, (), Batched()),
        ("batched", None, ("lanes=1",), InProcess()),
        ("batched", None, ("local.optimiser=keep",), InProcess()),
    ],
)
def test_what_it_keeps_on_a_gpu(
    before: str, gain: float | None, overrides: tuple[str, ...], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this processor were one. None: there is no trial."""

    def tried(job: Job) -> float:
        assert gain is not None
        return gain

    monkeypatch.setattr(auto, "gain", tried)
    job = Job(battery.config("fedavg", "participation=1.0", *overrides, net="group"), battery.data())
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), config=job.config)
    start = Batched.start
    monkeypatch.setattr(Batched, "start", lambda self, given: start(self, job))
    assert Auto().choose(on_gpu, before) == engine


@dataclass(frozen=True, kw_only=True)
class Named(Algorithm):
    """Cannot train where the network is not one of the usual ones, and says so by an error of its own."""

    everywhere: bool = False

    def correct(self, local: Local, grad: torch.Tensor) -> torch.Tensor:
        if self.everywhere or type(local.model).__name__ == "Elsewhere":
            raise ValueError("no such network")
        return grad


@pytest.mark.parametrize("everywhere", [False, True])
def test_clients_that_fail_at_once_are_not_fast(everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are done very soon. Those that fail alone too say nothing about how they are run."""
    monkeypatch.setitem(registry._things["algorithms"], "named", Named)
    overrides = (f"algorithm.everywhere={str(everywhere).lower()}", "participation=1.0")
    job = Job(battery.config("named", *overrides, net="group"), battery.data())
    assert (auto.gain(job) > 0) is everywhere
    if not everywhere:
        assert auto.faster(job) == InProcess()


def test_where_workers_cannot_be() -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert not auto.can_fork(on_gpu)


def test_idle_cores() -> None:
    assert [idle(2, (load, 0, 0)) for load in (0.0, 1.0, 1.5, 3.0)] == [2, 2, 1.5, 0]


def test_a_round_is_estimated_from_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the epochs take ten times as long; steps in place of epochs, and the most of them, are heeded."""
    reply = SimpleNamespace(steps=3, seconds=0.3)
    monkeypatch.setattr(auto, "rehearsed", lambda *args: reply)

    def seconds(*overrides: str) -> float:
        sizes = ("local.batch=8", "partition.name=iid", "clients=4", "participation=2", *overrides)
        return auto.seconds(Job(battery.config("fedavg", *sizes), battery.data()))

    held = len(battery.data().train_y) / 4 / 8
    assert seconds("local.epochs=1") == pytest.approx(2 * held * 0.1)
    assert seconds("local.epochs=10") == pytest.approx(20 * held * 0.1)
    assert seconds("local.epochs=10", "local.max_steps=4") == pytest.approx(2 * 4 * 0.1)
    assert seconds("local.steps=7") == pytest.approx(2 * 7 * 0.1)


@pytest.mark.parametrize("method", battery.methods())
def test_the_trial_makes_no_images_and_leaves_no_trace(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(battery.config(method), battery.data())
    monkeypatch.setattr(Job, "images", property(lambda job: pytest.fail("asked for images")))
    before = job.worker.weights.state_dict()
    assert auto.seconds(job) > 0 or method in ("fgl", "centralized"), "which train nothing in such a round"
    battery.same_bits(before, job.worker.weights.state_dict(), method)


def test_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = battery.config("scaffold", "runtime=auto")
    monkeypatch.setattr(auto, "WORTH", 0.0)
    battery.same(run(battery.config("scaffold"), data=battery.data()), run(wanted, data=battery.data()))
