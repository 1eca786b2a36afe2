"""Which runtime `auto` chooses, and that its trial changes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import battery
import pytest
import torch

from fedkeel.job import Job
from fedkeel.loop import run
from fedkeel.runtimes import auto
from fedkeel.runtimes.auto import Auto, idle
from fedkeel.runtimes.inprocess import InProcessRuntime
from fedkeel.runtimes.pool import PoolRuntime


def chosen(monkeypatch: pytest.MonkeyPatch, seconds: float, load: float, *overrides: str) -> type:
    monkeypatch.setattr(auto, "seconds", lambda job: seconds)
    monkeypatch.setattr(auto, "cores", lambda: 2)
    monkeypatch.setattr(auto, "os", SimpleNamespace(getloadavg=lambda: (load, load, load)))
    runtime = Auto().start(Job(battery.config("fedavg", "runtime=auto", *overrides), battery.data()))
    runtime.close()
    return type(runtime)


def test_workers_where_rounds_are_long_and_cores_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 1.0, 0.8) is PoolRuntime
    assert chosen(monkeypatch, 0.01, 0.8) is InProcessRuntime  # too short
    assert chosen(monkeypatch, 1.0, 2.5) is InProcessRuntime  # the other core is taken
    assert chosen(monkeypatch, 1.0, 0.8, "participation=1") is InProcessRuntime  # one client a round
    assert chosen(monkeypatch, 1.0, 0.8, "workers=1") is InProcessRuntime


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
