"""Generators tuned on a client's own images: each by itself, and in runs of ReGL (FT)."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fedkeel.config import Config
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, PoolError, StorageError
from fedkeel.generators import flow_tuning
from fedkeel.generators.base import Tunable
from fedkeel.generators.flow import Bundled, FlowConfig, FlowNet, save
from fedkeel.generators.flow_tuning import with_replay
from fedkeel.generators.gaussian import Fitted, Gaussian, blend, components
from fedkeel.job import Job, spent
from fedkeel.loop import resume, run
from fedkeel.record import Silent, numbers
from fedkeel.records import Samples
from fedkeel.rng import isolated

CPU = torch.device("cpu")
CLASSES, SHAPE = ("cat", "dog", "cow"), (1, 8, 8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow of three classes, hardly trained: its images are noise about grey."""
    path = tmp_path_factory.mktemp("flow") / "flow-tiny.safetensors"
    config = FlowConfig(CLASSES, SHAPE, widths=(8, 16), condition=16)
    with isolated(torch.Generator().manual_seed(3)):
        net = FlowNet(config)
        torch.nn.init.normal_(net.last.weight, std=0.02)
        save(net, config, path, "hardly trained")
    return path


@pytest.fixture
def bundled(weights: Path) -> Callable[..., Tunable]:
    def load(**options: object) -> Tunable:
        few = {
            "tune_steps": 12,
            "tune_lr": 5e-3,
            "tune_batch": 8,
            "tune_replay": 6,
            "tune_serve": 2,
            "path": str(weights),
        }
        return Bundled(**{**few, **options}).load(CLASSES, SHAPE, CPU)  # type: ignore[arg-type]

    return load


def client(bright: int = 230, labels: tuple[int, ...] = (0,) * 12 + (1,) * 4) -> Samples:
    """Bright images with some texture."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(bright - 20, bright + 20, (len(labels), *SHAPE), generator=rng).to(torch.uint8)
    return Samples.real_ones(x, torch.tensor(labels, dtype=torch.int64))


def made(source: object, label: int = 0, count: int = 8) -> torch.Tensor:
    images: torch.Tensor = source.generate([label] * count, list(range(count)))  # type: ignore[attr-defined]
    return images


# the bundled flow -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_it_learns_what_the_client_has(mode: str, bundled: Callable[..., Tunable]) -> None:
    base = bundled(tune_mode=mode, tune_steps=40)
    before, images = base.fingerprint(), made(base)
    tuned = base.tune(client(), 0)
    assert made(tuned).float().mean() > images.float().mean() + 20
    assert torch.equal(made(base), images) and base.fingerprint() == before  # the one it came from stays as it is
    assert tuned.classes == CLASSES and tuned.shape == SHAPE
    # the change is part of the weights, and there is a network for the class that the client lacks
    assert sum(tuned.memory_bytes().values()) == 2 * sum(base.memory_bytes().values())
    assert torch.equal(made(tuned, 2), made(base, 2))
    labels, indices = [0, 2, 1, 2, 0], [5, 1, 0, 0, 6]
    alone = [tuned.generate([label], [index]) for label, index in zip(labels, indices, strict=True)]
    assert torch.equal(tuned.generate(labels, indices), torch.cat(alone))
    assert tuned.generate([], []).shape == (0, *SHAPE)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_scale_of_zero_is_the_generator_as_it_was(mode: str, bundled: Callable[..., Tunable]) -> None:
    base = bundled(tune_mode=mode, tune_scale=0.0)
    assert torch.equal(made(base.tune(client(), 0)), made(base))
    half, whole = (made(bundled(tune_mode=mode, tune_scale=s).tune(client(), 0)).float() for s in (0.5, 1.0))
    shift, more = ((x - made(base).float()).abs().mean() for x in (half, whole))
    assert 0 < shift < more


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_where_nothing_was_learned_it_is_the_generator_as_it_was(mode: str, bundled: Callable[..., Tunable]) -> None:
    base = bundled(tune_mode=mode, tune_steps=0, tune_missing="tuned")
    assert torch.equal(made(base.tune(client(), 0)), made(base))
    once = bundled(tune_mode=mode, tune_steps=1, tune_missing="tuned")
    assert not torch.equal(made(once.tune(client(), 0)), made(base))  # served in two steps


def test_what_the_fingerprint_follows(bundled: Callable[..., Tunable]) -> None:
    prints = [
        bundled().fingerprint(),
        bundled().tune(client(), 0).fingerprint(),
        bundled().tune(client(), 1).fingerprint(),
        bundled().tune(client(120), 0).fingerprint(),
        bundled(tune_scale=0.5).tune(client(), 0).fingerprint(),
        bundled(tune_mode="lora").tune(client(), 0).fingerprint(),
        bundled(tune_missing="tuned").tune(client(), 0).fingerprint(),
        bundled(tune_serve=3).tune(client(), 0).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert bundled().tune(client(), 0).fingerprint() == prints[1]


def test_replay_keeps_the_classes_that_the_client_lacks(bundled: Callable[..., Tunable]) -> None:
    """Class 2 follows the client's bright images less when the generator's own images of it are trained on too."""
    lost, kept = (
        made(bundled(tune_steps=40, tune_replay=replay, tune_missing="tuned").tune(client(), 0), 2).float().mean()
        for replay in (0, 32)
    )
    start = made(bundled(), 2).float().mean()
    assert lost > start + 15
    assert abs(kept - start) < 0.6 * (lost - start)


def test_global_randomness_is_left_alone(bundled: Callable[..., Tunable]) -> None:
    before = torch.get_rng_state()
    bundled(tune_mode="lora").tune(client(), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_killed_tuning_goes_on_and_ends_with_the_same_bits(
    mode: str, bundled: Callable[..., Tunable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_tuning, "EVERY", 5)
    keep, source, steps = tmp_path / "deep" / "adapter", bundled(tune_mode=mode), list[int]()

    def killed(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.tune(client(), 0, keep, progress=killed)
    assert [path.name for path in keep.parent.iterdir()] == ["adapter.part.safetensors"]
    again = source.tune(client(), 0, keep, progress=lambda done, total: steps.append(done))
    assert steps == list(range(6, 13))
    assert [path.name for path in keep.parent.iterdir()] == ["adapter.safetensors"]
    whole = source.tune(client(), 0)
    assert again.fingerprint() == whole.fingerprint() and torch.equal(made(again), made(whole))
    read = source.tune(client(), 0, keep, progress=lambda done, total: steps.append(-1))
    assert read.fingerprint() == whole.fingerprint() and -1 not in steps
    # the scale is no part of what is kept
    assert torch.equal(made(bundled(tune_mode=mode, tune_scale=0.0).tune(client(), 0, keep)), made(source))


def test_adapters_of_something_else_and_damaged_ones(bundled: Callable[..., Tunable], tmp_path: Path) -> None:
    keep = tmp_path / "adapter"
    first = bundled().tune(client(), 0, keep)
    for other, samples, seed in (
        (bundled(tune_steps=3), client(), 0),
        (bundled(), client(90), 0),
        (bundled(), client(), 1),
    ):
        with pytest.raises(PoolError, match=r"adapter\.safetensors was tuned from another generator"):
            other.tune(samples, seed, keep)
    path = keep.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"adapter\.safetensors is damaged .* begins again"):
        again = bundled().tune(client(), 0, keep)
    assert again.fingerprint() == first.fingerprint()


def test_a_budget_of_time(bundled: Callable[..., Tunable], tmp_path: Path) -> None:
    """What is learned by then is kept: here nothing."""
    with pytest.warns(UserWarning, match=r"tuning stopped after 0 of 12 steps: its 1e-09 s are over"):
        tuned = bundled().tune(client(), 0, tmp_path / "adapter", budget=1e-9)
    assert torch.equal(made(tuned), made(bundled()))  # and so in the steps of the untuned one
    assert (tmp_path / "adapter.safetensors").exists()
    bundled().tune(client(), 0, tmp_path / "other", budget=1e9)


@pytest.mark.full
def test_a_tuning_that_was_stopped_goes_on_when_there_is_time(bundled: Callable[..., Tunable], tmp_path: Path) -> None:
    keep, whole = tmp_path / "adapter", bundled().tune(client(), 0).fingerprint()
    began, steps = time.perf_counter(), list[int]()

    def slow(done: int, total: int) -> None:
        steps.append(done)
        while done == 5 and time.perf_counter() - began < 3:
            time.sleep(0.1)

    for budget in (1e-9, 2.5):  # from nothing, and from five steps
        with pytest.warns(UserWarning, match=r"stopped after (0|5) of 12 steps"):
            short = bundled().tune(client(), 0, keep, budget, progress=slow)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors", "adapter.part.safetensors"}
    assert steps == [1, 2, 3, 4, 5] and short.fingerprint() != whole
    with pytest.warns(UserWarning, match=r"stopped after 5 of 12 steps: its 2 s are over"):  # at each use
        again = bundled().tune(client(), 0, keep, 2, progress=slow)
    assert again.fingerprint() == short.fingerprint() and len(steps) == 5
    done = bundled().tune(client(), 0, keep, progress=slow)
    assert steps == list(range(1, 13)) and done.fingerprint() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert bundled().tune(client(), 0, keep, 1e-9).fingerprint() == whole  # all steps are done: no warning
    kept = spent(keep)
    assert (kept["steps"], kept["of"]) == (12, 12) and float(str(kept["seconds"])) >= 2.5


def test_time_already_spent_counts(
    bundled: Callable[..., Tunable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_tuning, "EVERY", 5)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(flow_tuning.time, "perf_counter", lambda: next(clock))  # ten seconds a look

    def killed(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundled().tune(client(), 0, tmp_path / "a", budget=100, progress=killed)
    with pytest.warns(UserWarning, match=r"stopped after (7|8) of 12 steps"):
        bundled().tune(client(), 0, tmp_path / "a", budget=100)


def test_numbers_that_are_none_are_refused(bundled: Callable[..., Tunable], tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"not finite; lower generator\.tune_lr = 1e\+12"):
        bundled(tune_lr=1e12).tune(client(), 0, tmp_path / "adapter")
    assert not (tmp_path / "adapter.safetensors").exists()


def test_replay_tops_up_by_hand() -> None:
    """Client: 3 of class 0, 1 of class 2. With 2 a class: one made of class 2, two of class 5, none of class 0."""
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 2, 0, 0])
    asked: list[list[int]] = []

    def make(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids.tolist())
        return torch.ones_like(z)

    images, labels = with_replay(make, x, y, {0: "cat", 2: "dog", 5: "cow"}, 2, 0)
    assert asked == [[2], [5, 5]]
    assert labels.tolist() == [0, 2, 0, 0, 2, 5, 5] and images.mean((1, 2, 3)).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert len(with_replay(make, x, y, {0: "cat", 2: "dog", 5: "cow"}, 0, 0)[0]) == 4


def test_no_images_are_refused(bundled: Callable[..., Tunable]) -> None:
    with pytest.raises(PoolError, match="there are no images to tune on"):
        bundled().tune(client(labels=()), 0)


# gaussian -------------------------------------------------------------------------------------------------------------


def test_a_blend_of_gaussians_by_hand() -> None:
    """Mean and covariance of a mixture: (1-w) S0 + w S1 + w (1-w) d d', where nothing is cut off."""
    rng = torch.Generator().manual_seed(0)
    one, other = (components(torch.randint(0, 256, (30, 1, 2, 2), generator=rng).to(torch.uint8), 6) for _ in range(2))
    mean, basis = (part.double() for part in blend(one, other, 0.25))
    (m0, b0), (m1, b1) = ([part.double() for part in pair] for pair in (one, other))
    apart = m1 - m0
    covariance = 0.75 * b0.T @ b0 + 0.25 * b1.T @ b1 + 0.75 * 0.25 * torch.outer(apart, apart)
    assert torch.allclose(mean, 0.75 * m0 + 0.25 * m1, rtol=1e-3)
    assert torch.allclose(basis.T @ basis, covariance, rtol=1e-2, atol=20)
    assert torch.allclose(components(torch.full((1, 1, 2, 2), 7).to(torch.uint8), 6)[0].float(), torch.tensor(7.0))


def test_gaussian_tuned(tmp_path: Path) -> None:
    """At as many images as the prior counts for, half of the way; a class the client lacks stays bit for bit."""
    rng = torch.Generator().manual_seed(0)
    mean, basis = torch.full((3, 64), 100.0).half(), torch.randn(3, 5, 64, generator=rng).half()
    Fitted(CLASSES, SHAPE, mean, basis).save(tmp_path / "own.safetensors")
    load = lambda **options: Gaussian(path=str(tmp_path / "own.safetensors"), **options).load(CLASSES, SHAPE, CPU)  # noqa: E731
    samples = Samples.real_ones(torch.full((10, *SHAPE), 200, dtype=torch.uint8), torch.tensor([0] * 9 + [1]))
    source, seen = load(tune_prior=9), list[tuple[int, int]]()
    assert isinstance(source, Tunable)
    tuned = source.tune(samples, 0, progress=lambda done, total: seen.append((done, total)))
    assert tuned.mean[0].float().mean() == pytest.approx(150)
    assert tuned.mean[1].float().mean() == pytest.approx(110, abs=0.1)
    assert seen == [(1, 2), (2, 2)]
    assert torch.equal(made(tuned, 2), made(source, 2)) and not torch.equal(made(tuned, 0), made(source, 0))
    assert tuned.fingerprint() != source.fingerprint()
    half = load(tune_prior=9, tune_scale=0.5).tune(samples, 0)  # a quarter of the way, and a twentieth
    assert [half.mean[label].float().mean().item() for label in range(3)] == pytest.approx([125, 105, 100], abs=0.1)
    still = load(tune_scale=0.0)
    assert torch.equal(made(still.tune(samples, 0)), made(still))


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow that makes images of the classes of `tiny.data`."""
    path = tmp_path_factory.mktemp("flow") / "flow-quarters.safetensors"
    config = FlowConfig(tiny.data().classes, (1, 16, 16), widths=(8,), condition=8)
    with isolated(torch.Generator().manual_seed(3)):
        net = FlowNet(config)
        torch.nn.init.normal_(net.last.weight, std=0.02)
        save(net, config, path, "hardly trained")
    return path


def tuning(flow: Path, pools: Path, *overrides: str) -> Config:
    """Two rounds of ReGL (FT) with skewed clients."""
    table = {
        "rounds": 2,
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 10},
        "algorithm": {"name": "regl", "preset": "FT", "volume": 3},
        "generator": {
            "name": "bundled",
            "path": str(flow),
            "tune_steps": 4,
            "tune_batch": 4,
            "tune_replay": 4,
            "tune_serve": 2,
        },
        "pool": {"dir": str(pools)},
    }
    return tiny.config(*overrides, table=table)


def test_every_client_has_a_generator_and_images_of_its_own(data: Dataset, flow: Path, tmp_path: Path) -> None:
    result = run(tuning(flow, tmp_path / "pools"), data=data, folder=tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "adapters.json").read_text())
    assert [entry["client"] for entry in kept] == [0, 1, 2, 3]
    assert len({entry["fingerprint"] for entry in kept}) == 4
    assert len(list((tmp_path / "pools" / "adapters").glob("*.safetensors"))) == 4
    for entry in kept:
        parts = (tmp_path / "pools" / entry["fingerprint"][:16]).glob("part-*.safetensors")
        assert sum(len(load_file(part)["labels"]) for part in parts) == 12
    assert len(result.rounds) == 2 and not any(record["failed"] for record in result.rounds)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["generator"]["fingerprint"] not in {entry["fingerprint"] for entry in kept}


def test_each_client_tunes_by_draws_of_its_own(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """Also where all have the same images."""
    job = Job(tuning(flow, tmp_path, "partition.name=global_share", "partition.share=1.0"), data)
    assert torch.equal(job.samples(0).x, job.samples(1).x)
    assert job.source_of(0).fingerprint() != job.source_of(1).fingerprint()


def test_what_was_tuned_never_crosses(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """Check 11 for FT: bytes, names and what the server holds are FedAvg's."""
    config = tuning(flow, tmp_path)
    job, plain = Job(config, data), Job(tiny.config(), data)
    server, start = job.first_server(), plain.first_server()
    assert job.method.sends() == () and set(server.shared) == set(start.shared) == set()
    ours, theirs = (each.worker.fit(first, 0, None) for each, first in ((job, server), (plain, start)))
    assert not ours.failure and job.adapters[0]["client"] == 0
    assert (ours.bytes_up, ours.bytes_down) == (theirs.bytes_up, theirs.bytes_down)
    assert ours.update is not None and not ours.update.extra and ours.state.keys() == theirs.state.keys()


def test_scale_zero_is_training_free_bit_for_bit(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """Check 10: images of FT equal images of TF, so the runs are equal too."""
    tuned = tuning(flow, tmp_path / "a", "generator.tune_scale=0.0")
    free = tuning(flow, tmp_path / "b", "algorithm.tune=false")
    counts = torch.tensor([2, 0, 3, 1])
    x, y = (Job(config, data).images(2, counts, 0).x for config in (tuned, free))
    assert torch.equal(x, y)
    one, other = (run(config, data=data) for config in (tuned, free))
    assert [numbers(a) for a in one.rounds] == [numbers(b) for b in other.rounds]
    moved = Job(tuning(flow, tmp_path / "c", "generator.tune_lr=0.05"), data).images(2, counts, 0).x
    assert not torch.equal(moved, x)


def test_the_same_seed_makes_the_same_manifests_and_images(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """Check 12. Another seed tunes otherwise."""

    def once(name: str, *overrides: str) -> tuple[object, ...]:
        folder = tmp_path / name
        run(tuning(flow, folder / "pools", *overrides), data=data, folder=folder / "run")
        manifest = json.loads((folder / "run" / "manifest.json").read_text())
        for changing in ("started", "resumed"):
            manifest.pop(changing)
        adapters = json.loads((folder / "run" / "adapters.json").read_text())
        parts = sorted(str(path.relative_to(folder)) for path in folder.glob("pools/*/part-*"))
        assert parts  # named by the hash of their content
        sums = [(path.name, path.read_bytes()) for path in sorted(folder.glob("pools/*/pool.json"))]
        return manifest, [entry["fingerprint"] for entry in adapters], parts, sums

    first = once("one")
    assert once("two") == first
    assert once("three", "seed=2")[1] != first[1]


def test_a_run_killed_while_tuning_or_generating_goes_on(
    data: Dataset, flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_tuning, "EVERY", 1)
    whole = run(tuning(flow, tmp_path / "whole"), data=data)
    config, told = tuning(flow, tmp_path / "pools"), list[tuple[int, int]]()

    class Killed(Silent):
        def tuning(self, client: int, done: int, total: int) -> None:
            if (client, done) == (2, 3):
                raise KeyboardInterrupt

        def generating(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

    class Told(Silent):
        def tuning(self, client: int, done: int, total: int) -> None:
            told.append((client, done))

    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, folder=tmp_path / "run", listener=Killed())
    first = Job(config, data)
    with pytest.raises(KeyboardInterrupt):  # what `fedkeel generate` does
        first.generate(Killed().generating, lambda client, done, total: told.append((client, done)))
    assert told == [(2, 4), (3, 1), (3, 2), (3, 3), (3, 4)]
    told.clear()
    seen: list[tuple[int, int]] = []
    assert Job(config, data).generate(lambda done, total: seen.append((done, total))) == 48
    assert seen == [(24, 48), (36, 48), (48, 48)]  # the first client's were there
    again = resume(tmp_path / "run", data=data, listener=Told())
    assert not told
    assert [numbers(record) for record in again.rounds] == [numbers(record) for record in whole.rounds]


def test_who_tunes(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """R-17: not a client with too few images, nor one that cannot generate or needs no image."""
    job = Job(tuning(flow, tmp_path), data)
    sizes = job.counts.sum(1)
    assert all(job.adapts(k) for k in range(4)) and sizes.min() >= 10
    most = int(sizes.max())
    few = Job(tuning(flow, tmp_path, f"algorithm.min_images={most}"), data)
    assert [few.adapts(k) for k in range(4)] == [int(size) == most for size in sizes]
    few.generate()
    assert set(few.adapters) == {int(sizes.argmax())}
    assert few.source_of(int(sizes.argmin())) is few.source
    none = Job(tuning(flow, tmp_path, "profiles.none_ids=[1]"), data)
    assert [none.adapts(k) for k in range(4)] == [True, False, True, True]
    assert not any(map(Job(tuning(flow, tmp_path, "algorithm.volume=0"), data).adapts, range(4)))
    assert not any(map(Job(tuning(flow, tmp_path, "algorithm.tune=false"), data).adapts, range(4)))
    assert job.source_of(4) is job.source  # the server's


def test_tuning_as_balancing_under_another_method(data: Dataset, flow: Path, tmp_path: Path) -> None:
    config = tuning(
        flow, tmp_path, "algorithm.name=scaffold", "balance.name=regl", "balance.preset=FT", "balance.volume=2"
    )
    job = Job(config, data)
    assert job.generate() == 32 and len(job.adapters) == 4


def test_what_cannot_be_tuned_is_said(data: Dataset, flow: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pool\.sharing = 'shared': a generator that a client has tuned is its own"):
        Job(tuning(flow, tmp_path, "pool.sharing=shared"), data)
    Job(tuning(flow, tmp_path, "pool.sharing=shared", "algorithm.tune=false"), data)
    public = Samples.real_ones(data.train_x, data.train_y)
    from dataclasses import replace

    config = tuning(flow, tmp_path, "generator.name=public", "generator.repeat=true")
    with pytest.raises(ConfigError, match=r"algorithm\.tune = True: generator 'public' does not learn; bundled"):
        run(config, data=replace(data, public=public))


def test_the_budget_of_a_client_is_told_to_the_run(data: Dataset, flow: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Told(Silent):
        def warned(self, text: str) -> None:
            said.append(text)

    config = tuning(flow, tmp_path, "pool.tuning_budget=1e-9", "rounds=1")
    assert config.key() == tuning(flow, tmp_path, "rounds=1").key()
    run(config, data=data, listener=Told())
    wanted = [
        f"generator of client {k}: tuning stopped after 0 of 4 steps: its 1e-09 s are over; nothing was learned"
        for k in range(4)
    ]
    assert [text for text in said if "generator" in text] == wanted
    said.clear()
    run(config, data=data, listener=Told())
    assert [text for text in said if "generator" in text] == wanted  # once more


def test_how_images_are_made_needs_no_new_adapter(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """R-07: one tuning for all scales."""
    ways = [("tune_scale", s) for s in (1.0, 0.0, 0.5)] + [("tune_serve", 3), ("tune_missing", "tuned"), ("seed", 4)]
    prints, steps = set[str](), list[tuple[int, int, int]]()
    for key, value in ways:
        job = Job(tuning(flow, tmp_path, f"generator.{key}={value}"), data)
        prints.add(job.source_of(0, lambda *done: steps.append(done)).fingerprint())
    assert len(prints) == len(ways) and steps == [(0, done, 4) for done in (1, 2, 3, 4)]
    for other in ("generator.tune_lr=0.01", "generator.steps=2", "generator.tune_replay=5", "seed=2"):
        Job(tuning(flow, tmp_path, other), data).source_of(0)
    assert len(list((tmp_path / "adapters").iterdir())) == 5


def test_what_is_on_record_about_an_adapter_stays(data: Dataset, flow: Path, tmp_path: Path) -> None:
    one, other = Job(tuning(flow, tmp_path), data), Job(tuning(flow, tmp_path), data)
    one.source_of(1, lambda client, done, total: time.sleep(0.1))
    other.source_of(1)
    assert one.adapters == other.adapters and float(str(one.adapters[1]["seconds"])) >= 0.4
    assert (one.adapters[1]["steps"], one.adapters[1]["of"]) == (4, 4)


def test_tuning_that_nobody_sees_is_said(data: Dataset, flow: Path, tmp_path: Path) -> None:
    def said(*overrides: str) -> list[str]:
        job = Job(tuning(flow, tmp_path, "partition.name=single_class", *overrides), data)
        return [text for text in job.idle() if "nothing of the tuning is seen" in text]

    rare = "algorithm.mode=missing_only"
    assert len(said(rare)) == 1 and not said()
    assert not said(rare, "generator.tune_missing=tuned") and not said(rare, "algorithm.tune=false")
    assert len(said(rare, "generator.name=gaussian")) == 1


def test_a_full_disk_while_tuning(data: Dataset, flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    job = Job(tuning(flow, tmp_path), data)
    job.source_of(0)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            job.generate()
    assert len(list((tmp_path / "adapters").iterdir())) == 1
    assert job.generate() == 48


def test_no_warning_is_lost(data: Dataset, flow: Path, tmp_path: Path) -> None:
    """Without a listener they are Python's."""
    with pytest.warns(UserWarning, match="generator of client 0"):
        Job(tuning(flow, tmp_path, "pool.tuning_budget=1e-9"), data).source_of(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Job(tuning(flow, tmp_path / "more"), data).source_of(0)
