"""Clients trained at once, against clients one after another: the same numbers but for the last bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import battery
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkeel import registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.config import Config
from fedkeel.errors import ConfigError, EmptyClient
from fedkeel.job import Job
from fedkeel.local import Absent
from fedkeel.loop import Result, resume, run
from fedkeel.options import option
from fedkeel.records import Local, Phase, Samples
from fedkeel.runtimes import auto
from fedkeel.runtimes.base import Engine
from fedkeel.runtimes.batched import Batched
from fedkeel.runtimes.inprocess import InProcess
from fedkeel.weights import Weights

MOMENTUM = ("local.momentum=0.9", "local.weight_decay=0.01", "local.clip=0.5")


def config(method: str, *overrides: str, net: str = "group") -> Config:
    """All four clients in each of three rounds, their numbers of samples unequal."""
    return battery.config(method, "runtime=batched", "participation=1.0", *overrides, net=net)


def plain(wanted: Config, folder: Path | None = None) -> Result:
    """The same configuration, clients one after another."""
    return run(replace(wanted, runtime="inprocess"), data=battery.data(), folder=folder)


def close(one: Result, other: Result) -> None:
    """Weights, what clients keep and all numbers on record within 1e-5; what is counted and bytes the same."""
    alike(one.weights, other.weights)
    assert len(one.rounds) == len(other.rounds)
    for there, here in zip(one.rounds, other.rounds, strict=True):
        for key in there.keys() | here.keys():
            if not key.startswith("seconds/"):
                assert here[key] == (pytest.approx(there[key], abs=1e-5) if is_float(there[key]) else there[key]), key
    if one.folder is not None and other.folder is not None:
        kept, again = (
            {path.name: load_file(path) for path in (folder / "clients").glob("*.safetensors")}
            for folder in (one.folder, other.folder)
        )
        assert kept.keys() == again.keys()
        for name, tensors in kept.items():
            alike(tensors, again[name])


def is_float(value: object) -> bool:
    return isinstance(value, float)


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


# the same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedavg", ("lanes=1",)),
        ("fedavg", (*MOMENTUM, "lanes=3", "local.epochs=2")),
        ("fedavg", ("local.momentum=0.9", "local.nesterov=true", "local.max_steps=3", "local.epochs=2")),
        ("fedavg", ("local.steps=5", "evaluate.local_every=2")),
        ("scaffold", ("local.epochs=2",)),
        ("scaffold", (*MOMENTUM, "lanes=3", "algorithm.variate=gradient")),
        ("feddyn", (*MOMENTUM, "local.max_steps=2")),
        ("fedprox", ("algorithm.mu=0.5", "algorithm.straggler_fraction=0.7", "local.epochs=3", "lanes=3")),
        ("fednova", (*MOMENTUM, "local.epochs=2")),
        ("fedavgm", ("lanes=1", *MOMENTUM)),
        ("fedamp", ("participation=0.5",)),
        ("regl", ("lanes=3",)),
        ("scaffold", ("balance.name=regl", "balance.volume=4")),
    ],
)
def test_the_same_numbers(method: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    wanted = config(method, *overrides)
    here = run(wanted, data=battery.data(), folder=tmp_path / "batched")
    close(plain(wanted, tmp_path / "one"), here)
    assert not any(record["failed"] for record in here.rounds)


def test_without_convolutions() -> None:
    wanted = config("fedavg", "model.name=mlp", "model.hidden=[8]")
    close(plain(wanted), run(wanted, data=battery.data()))


def test_a_run_goes_on_under_it(tmp_path: Path) -> None:
    """Lanes and runtime do not belong to what a checkpoint must agree with."""
    wanted = config("scaffold")
    assert wanted.key() == replace(wanted, lanes=3, runtime="inprocess").key()
    with pytest.raises(KeyboardInterrupt):
        run(
            replace(wanted, runtime="inprocess"), data=battery.data(), folder=tmp_path / "run", listener=battery.Stop(1)
        )
    text = (tmp_path / "run/config.toml").read_text()
    (tmp_path / "run/config.toml").write_text(text.replace('runtime = "inprocess"', 'runtime = "batched"'))
    close(plain(wanted, tmp_path / "one"), resume(tmp_path / "run", data=battery.data()))


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides", "net", "why"),
    [
        ("moon", (), "group", "the loss of Moon is more than cross-entropy of what the network says"),
        ("fbl", (), "group", "the loss of FBL is more than"),
        ("regl", ("algorithm.objective=bce_onehot",), "group", "the loss of ReGL is more than"),
        ("fedrep", (), "group", "under FedRep clients have parameters of their own"),
        ("fedavg", (), "batch", r"the network keeps statistics \(BatchNorm\), .*model.norm = 'group' goes"),
        ("fedavg", ("local.optimiser=keep",), "group", r"momentum that lasts .*\(local.optimiser = 'keep'\)"),
        ("fedavg", ("local.precision=bfloat16",), "group", "local.precision = 'bfloat16' is not for"),
    ],
)
def test_what_is_refused(method: str, overrides: tuple[str, ...], net: str, why: str, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=rf"^runtime = 'batched': {why}.*: use inprocess\.$"):
        run(config(method, *overrides, net=net), data=battery.data(), folder=tmp_path / "run")
    assert not (tmp_path / "run/config.toml").exists()
    with pytest.raises(ConfigError, match=r"^lanes = 0: must be >= 1"):
        config("fedavg", "lanes=0")


def test_what_is_refused_without_a_run() -> None:
    job = Job(config("fedavg"), battery.data())
    job.worker.training = replace(job.worker.training, compile=True)
    with pytest.raises(ConfigError, match=r"^runtime = 'batched': local.compile = true is not for clients at once"):
        Batched().start(job)
    job = Job(config("fedavg"), battery.data())
    job.worker.model.features.append(nn.Dropout(0.5))
    with pytest.raises(ConfigError, match=r"^runtime = 'batched': torch.func cannot map over this network \(vmap: "):
        Batched().start(job)


def test_a_network_of_which_a_part_stands_still() -> None:
    job = Job(config("fedavg"), battery.data())
    next(job.worker.model.parameters()).requires_grad_(False)
    job.worker.weights = Weights(job.worker.model)
    with pytest.raises(ConfigError, match=r"^runtime = 'batched': the network has parameters without requires_grad"):
        Batched().start(job)


@dataclass(frozen=True, kw_only=True)
class Looking(Algorithm):
    """Looks at the network where there is none."""

    def correct(self, local: Local, grad: Tensor) -> Tensor:
        return grad * float(local.model(local.data.x[:1].float()).isfinite().all())


def test_a_correction_that_reads_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._things["algorithms"], "looking", Looking)
    with pytest.raises(ConfigError, match=r"^runtime = 'batched': the method reads `local.model` between steps"):
        run(config("looking"), data=battery.data())
    assert auto.faster(Job(config("looking"), battery.data())) == InProcess()


# clients that fail ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failing(Algorithm):
    """Client 1 fails in round 2, at the place named."""

    place: str = option("", "which")

    def fails(self, local: Local, place: str) -> None:
        if local.client == 1 and local.round == 1 and self.place == place:
            raise ValueError(f"in {place}")

    def prepare(self, local: Local) -> Samples:
        self.fails(local, "prepare")
        if local.client == 1 and local.round == 1 and self.place == "absent":
            raise Absent("not today")
        if local.client == 1 and local.round == 1 and self.place == "labels":
            return replace(local.data, y=local.data.y + 100)
        return local.data

    def phases(self, local: Local, training: Any) -> tuple[Phase, ...]:
        self.fails(local, "phases")
        return (Phase(1), Phase(1))

    def correct(self, local: Local, grad: Tensor) -> Tensor:
        self.fails(local, "correct")
        infinite = local.client == 1 and local.round == 1 and self.place == "infinite"
        return grad * float("inf") if infinite else grad * 1.0

    def upload(self, local: Local) -> Any:
        self.fails(local, "upload")
        return super().upload(local)


@pytest.mark.parametrize("place", ["", "prepare", "absent", "labels", "phases", "correct", "infinite", "upload"])
def test_a_client_that_fails_leaves_the_others(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._things["algorithms"], "failing", Failing)
    wanted = config("failing", f"algorithm.place={place}", "lanes=3", *MOMENTUM)
    there, here = plain(wanted), run(wanted, data=battery.data())
    assert [len(record["failed"]) for record in here.rounds] == [0, int(bool(place)), 0]
    for one, other in zip(there.rounds, here.rounds, strict=True):
        for failed in (*one["failed"], *other["failed"]):
            assert ("trace" in failed) == (place not in ("absent", "infinite"))
            failed.pop("trace", None)
            if place == "labels":  # PyTorch's words differ
                assert "out of bounds" in failed.pop("reason")
    close(there, here)


def test_a_client_without_samples_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Callable[[Job, int], Samples] = Job.samples
    nobody = torch.zeros(0, dtype=torch.int64)
    monkeypatch.setattr(Job, "samples", lambda job, k: taken(job, k).take(nobody) if k == 2 else taken(job, k))
    with pytest.raises(EmptyClient, match="client 2 has no samples"):
        run(config("fedavg"), data=battery.data())


# auto -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "slow", "chosen"),
    [
        ((), "fit", Batched()),
        ((), "fitted", InProcess()),
        (("lanes=1",), "fit", InProcess()),
        (("local.optimiser=keep",), "fit", InProcess()),
    ],
)
def test_auto_on_a_gpu(overrides: tuple[str, ...], slow: str, chosen: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor were one, on a clock; the trial changes nothing."""
    job = Job(config("scaffold", *overrides), battery.data())
    owner = type(job.worker) if slow == "fit" else auto
    quick = getattr(owner, slow)

    now = [0.0]

    def slowly(*given: Any, **more: Any) -> Any:
        now[0] += 1.0
        return quick(*given, **more)

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(owner, slow, slowly)
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=clock))
    before = job.worker.weights.state_dict()
    assert auto.faster(job) == chosen
    battery.same_bits(before, job.worker.weights.state_dict(), "")
