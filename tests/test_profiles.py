"""Clients that differ in what they can compute, generators that go wrong, and images that must be kept apart."""

from __future__ import annotations

import errno
import gc
import json
import os
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from fedkeel import registry
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, PoolError, StorageError
from fedkeel.generators.flow import FlowConfig, FlowNet, save
from fedkeel.generators.gaussian import fit
from fedkeel.generators.names import marks
from fedkeel.job import Job, validating
from fedkeel.loop import begun_with, resume, run
from fedkeel.options import option
from fedkeel.record import Silent, numbers
from fedkeel.records import Samples
from fedkeel.rng import isolated

SKEWED = ("partition.name=dirichlet", "partition.alpha=0.3")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A Gaussian for all clients and a flow for the unconstrained ones, of the classes of `tiny.data`."""
    folder = tmp_path_factory.mktemp("two")
    public, config = tiny.data(seed=1), FlowConfig(tiny.data().classes, (1, 16, 16), widths=(8,), condition=8)
    fit(Samples.real_ones(public.train_x, public.train_y), public.classes, 4).save(folder / "gaussian.safetensors")
    with isolated(torch.Generator().manual_seed(3)):
        net = FlowNet(config)
        torch.nn.init.normal_(net.last.weight, std=0.02)
        save(net, config, folder / "flow.safetensors", "hardly trained", public.train_x[:7])
    return {
        "generator": {"name": "gaussian", "path": str(folder / "gaussian.safetensors")},
        "generators": {"unconstrained": {"name": "bundled", "path": str(folder / "flow.safetensors"), "tune_steps": 2}},
    }


# clients that differ --------------------------------------------------------------------------------------------------


MIXED = ("profiles.unconstrained_ids=[1]", "profiles.none_ids=[2]", *SKEWED)


@pytest.mark.parametrize(
    "method",
    [("algorithm.name=fbl",), ("algorithm.name=regl", "algorithm.preset=FT", "algorithm.volume=2"),
     ("algorithm.name=fedprox", "balance.name=regl", "balance.volume=2")],
)  # fmt: skip
def test_one_run_of_clients_with_different_methods(
    method: tuple[str, ...], data: Dataset, two: dict[str, object], tmp_path: Path
) -> None:
    """Client 1 has a generator of its own, client 2 none and is FedAvg's, bit for bit (FBL-X1)."""
    config = tiny.config(*MIXED, *method, "rounds=2", f"pool.dir={tmp_path}/pools", table=two)
    result = run(config, data=data, folder=tmp_path / "run")
    assert all(record["clients"] == [0, 1, 2, 3] and not record["failed"] for record in result.rounds)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    names = [manifest["generator"]["name"], manifest["generators"]["unconstrained"]["name"]]
    assert names == ["gaussian", "bundled"] and list(manifest["generators"]) == ["unconstrained"]
    job = Job(config, data, tmp_path / "run")
    own = {k: job.source_of(k).fingerprint() for k in range(4)}
    assert own[0] != own[1]
    if "algorithm.name=fbl" in method:
        assert own[0] == own[3] == manifest["generator"]["fingerprint"]
        assert own[1] == manifest["generators"]["unconstrained"]["fingerprint"]
    fake = job.plan.fake
    assert int(fake[2].sum()) == 0
    x = job.images(1, fake[1], 0).x
    wanted = torch.cat([job.images.of(1).take(c, 1, int(n)) for c, n in enumerate(fake[1])])
    assert torch.equal(x, wanted)
    if method[0] != "algorithm.name=fedprox":
        avg = Job(tiny.config(*MIXED, "rounds=2"), data)
        same, other = (each.worker.fit(each.first_server(), 2, None) for each in (job, avg))
        assert torch.equal(same.update.delta[: len(other.update.delta)], other.update.delta)


def test_a_run_of_mixed_clients_is_resumed(data: Dataset, two: dict[str, object], tmp_path: Path) -> None:
    config = tiny.config(*MIXED, "algorithm.name=fbl", f"pool.dir={tmp_path}/pools", table=two)
    whole = run(config, data=data)

    class Stop(Silent):
        def finished_round(self, record: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, folder=tmp_path / "run", listener=Stop())
    told = tiny.Told()
    again = resume(tmp_path / "run", data=data, listener=told)
    assert [numbers(record) for record in again.rounds] == [numbers(record) for record in whole.rounds]
    assert told.said == []


def test_clients_with_fewer_samples_than_classes_are_told_of(data: Dataset, two: dict[str, object]) -> None:
    """F-07. Ten images of four classes, 3 or 2 a client. An unconstrained one has a point, one cannot generate."""
    few = replace(data, train_x=data.train_x[:10], train_y=data.train_y[:10])
    common = ("clients=4", "profiles.unconstrained_ids=[2]", "profiles.none_ids=[3]")
    for method, key in ((("algorithm.name=fbl",), "algorithm"), (("balance.name=fbl",), "balance")):
        job = Job(tiny.config(*method, *common, table=two), few)
        sizes = job.counts.sum(1).tolist()
        assert sizes == [3, 3, 2, 2]
        assert list(job.idle()) == [
            "2 of 4 clients have fewer samples than there are classes, so they cannot be balanced and train like "
            f"FedAvg's; {key}.zero_policy says what they do instead"
        ]
    fbl = ("algorithm.name=fbl", *common)
    assert not list(Job(tiny.config(*fbl, "algorithm.zero_policy=min_one", table=two), few).idle())
    assert not list(Job(tiny.config(*fbl, table=two), data).idle())


def test_a_processor_that_cannot_say_whether_it_has_bfloat16(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch without oneDNN, as on macOS, has no such question: only those who asked for bfloat16 are told."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not list(Job(tiny.config(), data).idle())
    (said,) = Job(tiny.config("local.precision=bfloat16"), data).idle()
    assert said.startswith("local.precision = 'bfloat16': this processor does not have it")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True))
    assert not list(Job(tiny.config("local.precision=bfloat16"), data).idle())


@pytest.mark.parametrize("section", ["generator", "unconstrained"])
def test_another_generator_than_at_the_start_is_said(
    data: Dataset, two: dict[str, object], tmp_path: Path, section: str
) -> None:
    set_ = ("algorithm.name=fbl", "profiles.unconstrained_ids=[0, 1]", f"pool.dir={tmp_path}/pools")
    run(tiny.config(*SKEWED, *set_, table=two), data=data, folder=tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    assert set(begun_with(tmp_path / "run")) == {"data", "generator", "unconstrained"}
    told = tiny.Told()
    resume(tmp_path / "run", data=data, listener=told)
    assert not told.said
    manifest = json.loads(path.read_text())
    place = manifest if section == "generator" else manifest["generators"]
    place[section]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert begun_with(tmp_path / "run")[section] == "0" * 64
    resume(tmp_path / "run", data=data, listener=told)
    assert told.said == [
        f"{section} is not the one this run began with: its images are made anew, and numbers will differ"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": 1, "generator": null}'])
def test_a_manifest_that_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    assert begun_with(tmp_path) == {}
    (tmp_path / "manifest.json").write_text(text)
    assert begun_with(tmp_path) == {}


def test_time_to_tune_by_profile(data: Dataset, two: dict[str, object], tmp_path: Path) -> None:
    """Client 1, unconstrained, has time for nothing here, and the others for all."""
    table = {"generator": two["generators"]["unconstrained"]}  # type: ignore[index]
    regl = (*MIXED, "algorithm.name=regl", "algorithm.preset=FT", "algorithm.volume=2", f"pool.dir={tmp_path}")
    job = Job(tiny.config(*regl, "pool.tuning_budget_unconstrained=1e-9", table=table), data)
    told = list[str]()
    job.warn = told.append
    job.generate()
    assert {client: each["steps"] for client, each in job.adapters.items()} == {0: 2, 1: 0, 3: 2}
    assert [text.split(":")[0] for text in told] == ["generator of client 1"]
    both = Job(tiny.config(*regl, "pool.tuning_budget=1e-9", "pool.tuning_budget_unconstrained=99", table=table), data)
    both.warn = told.append
    both.generate()
    assert {client: each["steps"] for client, each in both.adapters.items()} == {0: 2, 1: 2, 3: 2}
    assert both.config.key() == job.config.key()


def test_generators_of_profiles_alone(data: Dataset, two: dict[str, object], tmp_path: Path) -> None:
    """Without [generator] it is enough when every client that generates has one."""
    table = {"generators": two["generators"], "pool": {"dir": str(tmp_path)}}
    job = Job(tiny.config("algorithm.name=regl", "algorithm.volume=2", "profiles.unconstrained=1.0", table=table), data)
    assert job.generate() == 32 and list(job.untuned()) == ["unconstrained"]
    lacking = tiny.config("algorithm.name=regl", "algorithm.volume=2", *MIXED, table=table)
    with pytest.raises(ConfigError, match=r"generator = None: this run needs synthetic images"):
        run(lacking, data=data, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shared_pools_are_shared_by_those_with_one_generator(
    data: Dataset, two: dict[str, object], tmp_path: Path
) -> None:
    fbl = ("algorithm.name=fbl", "pool.sharing=shared", f"pool.dir={tmp_path}")
    job = Job(tiny.config(*fbl, *MIXED, table=two), data)
    wanted = job.plan.fake
    count = job.generate()
    assert count == int(torch.maximum(wanted[0], wanted[3]).sum() + wanted[1].sum())
    sizes = [len(job.images.of(k)) for k in (0, 1, 3)]
    assert sizes[0] == sizes[2] and sizes[0] + sizes[1] == count
    for client in (0, 1, 3):
        assert job.images(client, wanted[client], 0).counts(4).tolist() == wanted[client].tolist()
    assert [len(job.images.of(k)) for k in (0, 1, 3)] == sizes  # nothing more was made


def test_later_images_of_a_shared_pool_are_others(data: Dataset, two: dict[str, object], tmp_path: Path) -> None:
    """Cycle by cycle, as with images of one's own: none comes again, in whatever order a client has them."""
    job = Job(
        tiny.config("algorithm.name=fbl", "pool.sharing=shared", f"pool.dir={tmp_path}", *SKEWED, table=two), data
    )
    job.generate()
    wanted = job.plan.fake[0]
    label = int(wanted.argmax())
    count = int(wanted[label])
    assert count > 2
    pool, size = job.images.of(0), max(count, int(job.images.most(0)[label]))
    one = torch.zeros_like(wanted)
    one[label] = count
    cycles = [job.images(0, one, count * cycle).x for cycle in range(4)]
    images = pool.take(label, 0, 4 * size)
    places = [[int((images == image).flatten(1).all(1).nonzero()[0, 0]) for image in cycle] for cycle in cycles]
    assert len({place for cycle in places for place in cycle}) == 4 * count
    assert max(places[0]) < size and torch.equal(cycles[0], job.images(0, one, 0).x)


def test_each_client_has_an_order_of_its_own_in_a_shared_pool(data: Dataset, generator: tuple[str, ...]) -> None:
    """And another for each class."""
    job = Job(tiny.config(*generator, "algorithm.name=regl", "algorithm.volume=12", "pool.sharing=shared"), data)

    def order(client: int, label: int) -> tuple[int, ...]:
        """Places in the pool."""
        there = marks(job.images.of(client).take(label, 0, 12)).tolist()
        images = job.images(client, torch.full((4,), 12), 0)
        return tuple(there.index(mark) for mark in marks(images.x[images.y == label]).tolist())

    orders = [order(client, label) for client in (0, 1) for label in range(4)]
    assert all(sorted(each) == list(range(12)) for each in orders) and len(set(orders)) == 8


def test_a_mistake_in_a_profiles_generator_names_its_section(
    data: Dataset, two: dict[str, object], tmp_path: Path
) -> None:
    fbl = ("algorithm.name=fbl", "profiles.unconstrained_ids=[1]", f"pool.dir={tmp_path}", *SKEWED)
    table = {**two, "generators": {"unconstrained": {"name": "folder"}}}
    with pytest.raises(ConfigError, match=r"^generators\.unconstrained\.dir = ''"):
        Job(tiny.config(*fbl, table=table), data).generate()
    with pytest.raises(ConfigError, match=r"^generator\.dir = ''"):
        Job(tiny.config(*fbl, table={"generator": {"name": "folder"}}), data).generate()


# what generators take, and say ----------------------------------------------------------------------------------------


def test_a_run_notes_what_making_images_took(data: Dataset, two: dict[str, object], tmp_path: Path) -> None:
    """By generator; a process that goes on with the run adds to it, and images that were there count for nothing."""
    config = tiny.config(*MIXED, "algorithm.name=fbl", f"pool.dir={tmp_path}/pools", table=two)
    made = [0]

    class Stop(Silent):
        def generating(self, done: int, total: int) -> None:
            made[0] = done
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, folder=tmp_path / "run", listener=Stop())
    first = json.loads((tmp_path / "run" / "generators.json").read_text())
    assert made[0] == sum(each["images"] for each in first.values()) > 0
    resume(tmp_path / "run", data=data)
    noted = json.loads((tmp_path / "run" / "generators.json").read_text())
    job = Job(config, data)
    sizes = {"generator": len(job.images.of(0)), "unconstrained": len(job.images.of(1))}
    assert {key: each["images"] for key, each in noted.items()} == sizes and sum(sizes.values()) > made[0]
    for each in noted.values():
        assert each["seconds"] > 0 and each["cpu_seconds"] > 0 and each["peak_memory_bytes"] > 50e6
        assert each["seconds_per_image"] == pytest.approx(each["seconds"] / each["images"], abs=1e-4)
        assert each["peak_memory_of"] == "the process since its start"
    resume(tmp_path / "run", data=data)
    assert json.loads((tmp_path / "run" / "generators.json").read_text()) == noted
    run(config, data=data, folder=tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generators.json").read_text())
    assert {(each["images"], each["seconds_per_image"]) for each in again.values()} == {(0, None)}


@pytest.mark.parametrize("kind", ["gaussian", "bundled"])
def test_many_clients_that_tune_do_not_hold_many_networks(
    kind: str, data: Dataset, two: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that do not fit are made again from what they kept; images stay as they are, bit for bit."""
    generator = two["generator"] if kind == "gaussian" else two["generators"]["unconstrained"]  # type: ignore[index]
    ft = ("algorithm.name=regl", "algorithm.preset=FT", "algorithm.min_images=1", *SKEWED)
    tuned: list[weakref.ref[object]] = []
    tune = Job._tune

    def counting(self: Job, *args: object) -> object:
        source = tune(self, *args)  # type: ignore[arg-type]
        tuned.append(weakref.ref(source))
        return source

    monkeypatch.setattr(Job, "_tune", counting)

    def made(folder: str, volume: int, *more: str) -> tuple[Job, Tensor, int]:
        pools = f"pool.dir={tmp_path / folder}"
        table = {"generator": generator}
        job = Job(tiny.config(*ft, f"algorithm.volume={volume}", pools, *more, table=table), data)
        tuned.clear()
        job.generate()
        noted = {client: dict(each) for client, each in job.adapters.items()}
        x = torch.cat([job.images.of(k).take(c, k, 3) for c in range(4) for k in range(4)])
        gc.collect()
        assert job.adapters == noted
        return job, x, sum(each() is not None for each in tuned)

    roomy, wanted, held = made("roomy", 2)
    assert held == len(roomy._tuned) == len(tuned) == 4
    tight, x, held = made("tight", 2, "memory=1e-9")
    assert held == len(tight._tuned) == 1 and len(tuned) > 4
    assert torch.equal(x, wanted)
    assert [tight.source_of(k).fingerprint() for k in range(4)] == [roomy.source_of(k).fingerprint() for k in range(4)]
    if kind == "bundled":
        for path in (tmp_path / "tight" / "adapters").iterdir():
            path.unlink()
        tight.adapters[0]["fingerprint"] = "0" * 64  # as if it had come out otherwise
        tight.source_of(3)
        with pytest.raises(PoolError, match="what client 0 tuned was removed or changed"):
            tight.source_of(0)


def test_warnings_and_the_origin_of_prompts_reach_the_run(data: Dataset, wrong: None, tmp_path: Path) -> None:
    """Through its listener, each once, and its manifest."""
    regl = ("algorithm.name=regl", "algorithm.volume=3", "generator.name=wrong", "generator.how=warns", "rounds=1")
    told = tiny.Told()
    run(tiny.config(*regl, f"pool.dir={tmp_path}"), data=data, folder=tmp_path / "run", listener=told)
    assert told.said == ["a word is unknown", "memory is short"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["generator"]["phrases"] == {"table": "eurosat", "source": "here", "departure": "from above"}


# generators that go wrong ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Goes wrong at image 2 of class 1."""

    how: str = option("black", "in which way")

    def load(self, classes: tuple[str, ...], shape: tuple[int, int, int], device: object, public: object) -> Wrong:
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "shape", shape)
        if self.how == "warns":
            warnings.warn("a word is unknown", stacklevel=2)
        return self

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (len(labels), *self.shape), generator=rng).to(torch.uint8)  # type: ignore[attr-defined]
        if self.how == "black":
            x[[label == 1 and index == 2 for label, index in zip(labels, indices, strict=True)]] = 0
        if self.how == "warns":
            warnings.warn("memory is short", stacklevel=2)
        if self.how == "infinite":
            return x.float() * float("nan")
        return {"small": x[:, :, :8], "few": x[1:], "colour": x.expand(-1, 3, -1, -1)}.get(self.how, x)

    def prompt(self, label: int) -> str:
        return ""

    def origin(self) -> dict[str, str]:
        return {"table": "eurosat", "source": "here", "departure": "from above"}

    def memory_bytes(self) -> dict[str, int]:
        return {}

    def fingerprint(self) -> str:
        return f"{self.how:0<64}"


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names("generators")
    monkeypatch.setitem(registry._things, "generators", {**registry._things["generators"], "wrong": Wrong})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("black", r"class 'north-east': image 2 has one colour all over"),
        ("infinite", r"returned torch\.float32 \(16, 1, 16, 16\), wanted uint8"),
        ("small", r"returned torch\.uint8 \(16, 1, 8, 16\), wanted uint8 \(16, 1, 16, 16\)"),
        ("few", r"returned torch\.uint8 \(15, 1, 16, 16\)"),
        ("colour", r"returned torch\.uint8 \(16, 3, 16, 16\)"),
    ],
)
def test_a_generator_that_goes_wrong_is_refused_and_named(
    how: str, said: str, data: Dataset, wrong: None, tmp_path: Path
) -> None:
    """Before the first round, and nothing of it is kept."""
    regl = ("algorithm.name=regl", "algorithm.volume=1", "generator.name=wrong", f"generator.how={how}")
    with pytest.raises(PoolError, match=said):
        run(tiny.config(*regl, f"pool.dir={tmp_path}"), data=data, folder=tmp_path / "run")
    assert not list(tmp_path.rglob("part-*"))
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == b""


def test_a_disk_that_fills_while_the_pool_grows(
    data: Dataset, two: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there stays, and the next call goes on from it."""
    config = tiny.config("algorithm.name=regl", "algorithm.volume=5", f"pool.dir={tmp_path}", table=two)
    job, sync, left = Job(config, data), os.fsync, [6]  # two for each part: the file and its folder
    job.images.pool.batch = 16

    def full(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left .*already there are kept"):
            job.generate()
    again, seen = Job(config, data), list[int]()
    assert len(again.images.pool) == 48
    again.generate(lambda done, total: seen.append(done))
    assert seen == [80] and len(again.images.pool) == 80


# images that must be kept apart ---------------------------------------------------------------------------------------


def test_clients_that_hold_what_the_generator_was_trained_on(
    data: Dataset, two: dict[str, object], tmp_path: Path
) -> None:
    """Seven images of tiny.data(seed=1); one of them is given to a client here."""
    table = {"generator": two["generators"]["unconstrained"], "pool": {"dir": str(tmp_path)}}  # type: ignore[index]
    config, told = tiny.config("algorithm.name=regl", "algorithm.volume=1", "rounds=1", table=table), tiny.Told()
    run(config, data=data, listener=told)
    assert told.said == []
    x = data.train_x.clone()
    x[5] = tiny.data(seed=1).train_x[3]
    leaking = replace(data, train_x=x)
    for noisy in ((), ("noise.std=0.1",)):
        told = tiny.Told()
        run(
            tiny.config("algorithm.name=regl", "algorithm.volume=1", "rounds=1", *noisy, table=table),
            data=leaking,
            listener=told,
        )
        assert told.said == [
            "clients hold 1 of the 7 images that the generator was trained on: what it makes tells others of them, and "
            "results with it are too good; set data.public_limit = 7, if those are the images that it sets aside, or "
            "use other data"
        ]
    public = replace(data, public=Samples.real_ones(x[5:6], data.train_y[5:6]))
    with pytest.warns(UserWarning, match="clients hold 1 of the 7"):
        _ = Job(config, leaking).source
    _ = Job(config, public).source  # public ones are nobody's


@pytest.mark.parametrize("section", ["generator", "generators.constrained"])
def test_the_key_of_public_images_is_the_datas(section: str, data: Dataset) -> None:
    """In whichever section the generator is that lacks them."""
    job = Job(tiny.config("algorithm.name=regl", "algorithm.volume=1", f"{section}.name=public"), data)
    with pytest.raises(ConfigError, match=r"^data\.public_limit = 0: "):
        job.generate()


def test_public_images_and_a_gaussian_of_them(data: Dataset, tmp_path: Path) -> None:
    """A run whose data set has a public part can use it, or what is fitted to it."""
    public = replace(data, public=Samples.real_ones(tiny.data(seed=1).train_x, tiny.data(seed=1).train_y))
    common = ("algorithm.name=regl", "algorithm.volume=2", "rounds=1", f"pool.dir={tmp_path}")
    run(tiny.config(*common, "generator.name=public"), data=public)
    run(tiny.config(*common, "generator.name=gaussian"), data=public)
    with pytest.raises(PoolError, match=r"public image \d+ is wanted, there are 24; raise data\.public_limit"):
        run(tiny.config(*common, "generator.name=public", "algorithm.volume=9"), data=public)
    with pytest.raises(PoolError, match=r"set data\.public_limit"):
        run(tiny.config(*common, "generator.name=gaussian"), data=data)


def test_shared_images_that_are_there_are_used_from_the_first_on(data: Dataset, tmp_path: Path) -> None:
    """24 of a class: 20 for all four clients are enough. Sources without end keep a lane for each client and one for
    the server, and where nothing is shared so does this one."""
    public = replace(data, public=Samples.real_ones(tiny.data(seed=1).train_x, tiny.data(seed=1).train_y))
    common = ("algorithm.name=regl", "algorithm.volume=20", f"pool.dir={tmp_path}")
    shared = (*common, "generator.name=public", "pool.sharing=shared")
    job = Job(tiny.config(*shared), public)
    assert job.generate() == 80
    assert job.images.pool.lanes == 1
    twenty = job.images(2, torch.tensor([20, 0, 0, 0]), 0).x
    first = public.public.x[public.public.y == 0][:20]
    assert sorted(marks(twenty).tolist()) == sorted(marks(first).tolist())
    with pytest.raises(PoolError, match="public image 25 is wanted, there are 24"):
        Job(tiny.config(*shared, "algorithm.volume=25"), public).generate()
    others = ("generator.name=gaussian", "pool.sharing=shared"), ("generator.name=public",)
    assert [Job(tiny.config(*common, *each), public).images.pool.lanes for each in others] == [5, 5]


def test_a_validation_split_stands_in_for_the_test_images(data: Dataset) -> None:
    """R-18: a tenth of each class, before partitioning; nobody trains on it."""
    job = Job(tiny.config("evaluate.validation=0.25"), data)
    assert (len(job.data.train_y), len(job.data.test_y)) == (72, 24)
    assert job.data.test_y.bincount().tolist() == [6] * 4
    assert torch.equal(job.data.test_x, data.train_x[72:])  # the last of each class
    assert int(job.counts.sum()) == 72
    assert np.allclose(job.data.mean[0], data.train_x[:72].float().mean() / 255)
    assert validating(data, 0.0) is data
    for share, lacking in ((1e-4, "measure on"), (0.9999, "train on")):
        with pytest.raises(ConfigError, match=rf"evaluate\.validation = .* leaves no image to {lacking}, of 96"):
            Job(tiny.config(f"evaluate.validation={share}"), data)
