"""The pool: images made once, kept whatever happens."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkeel.errors import PoolError, StorageError
from fedkeel.generators import store
from fedkeel.generators.store import Pool, Spent, default_root, folder_of


@dataclass
class Counting:
    """A source whose image shows its class and index, and that counts what it is asked for."""

    classes: tuple[str, ...] = ("cat", "dog")
    shape: tuple[int, int, int] = (1, 2, 2)
    name: str = "a"
    asked: list[tuple[int, int]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    dies_at: int = 10**9

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        if len(self.asked) + len(labels) > self.dies_at:
            raise KeyboardInterrupt
        self.asked += list(zip(labels, indices, strict=True))
        self.batches.append(len(labels))
        return torch.tensor(
            [[[[label, index % 256], [index // 256, 255]]] for label, index in self.asked[-len(labels) :]]
        ).byte()

    def prompt(self, label: int) -> str:
        return ""

    def memory_bytes(self) -> dict[str, int]:
        return {}

    def fingerprint(self) -> str:
        return (self.name * 64)[:64]


def indices(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 1].int() + 256 * x[:, 0, 1, 0].int()).tolist()


@pytest.mark.parametrize("on_disk", [False, True])
def test_lanes_share_no_image(on_disk: bool, tmp_path: Path) -> None:
    pool = Pool(Counting(), tmp_path if on_disk else None, lanes=3)
    taken = [pool.take(1, lane, 5 + lane) for lane in range(3)]
    assert [indices(x) for x in taken] == [list(range(lane, 3 * (5 + lane), 3)) for lane in range(3)]
    assert all((x[:, 0, 0, 0] == 1).all() for x in taken)
    assert pool.take(0, 0, 0).shape == (0, 1, 2, 2)


@dataclass
class Few(Counting):
    """One that has so many images of a class, and begins again after the last."""

    there: int = 30

    def available(self, label: int) -> int:
        return self.there

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        return super().generate(labels, [index % self.there for index in indices])


@pytest.mark.parametrize(("there", "lanes"), [(30, 6), (1000, 20), (7, 3), (4, 6), (4, 9), (5, 1)])
def test_a_lane_gets_all_images_before_one_comes_again(there: int, lanes: int) -> None:
    pool = Pool(Few(there=there), None, lanes=lanes)
    taken = [indices(pool.take(0, lane, 2 * there)) for lane in range(lanes)]
    for lane, x in enumerate(taken):
        assert sorted(x[:there]) == sorted(x[there:]) == list(range(there))
        first = range(lane, there, lanes)  # the first lap is that of a source without end
        assert x[: len(first)] == list(first)


def test_laps_by_hand() -> None:
    """30 images, 6 lanes: after each 30 one index is left out, so that a lane is one image further in the next lap."""
    pool = Pool(Few(), None, lanes=6)
    assert pool.numbers(0, 0, 11) == [0, 6, 12, 18, 24, 31, 37, 43, 49, 55, 62]
    assert indices(pool.take(0, 0, 11)) == [0, 6, 12, 18, 24, 1, 7, 13, 19, 25, 2]
    assert indices(pool.take(0, 5, 6)) == [5, 11, 17, 23, 29, 6]
    assert indices(Pool(Few(), None).take(0, 0, 32)) == [*range(30), 0, 1]


def test_more_keeps_what_was_there(tmp_path: Path) -> None:
    source = Counting()
    pool = Pool(source, tmp_path)
    few = pool.take(0, 0, 3)
    assert torch.equal(pool.take(0, 0, 9)[:3], few)
    assert sorted(source.asked) == [(0, i) for i in range(9)]


def test_fill_makes_full_batches_across_classes_and_lanes(tmp_path: Path) -> None:
    source, seen = Counting(), []
    pool = Pool(source, tmp_path, lanes=2, batch=8)
    needs = [(0, 0, 3), (1, 0, 5), (1, 1, 6), (0, 0, 2)]
    pool.fill(needs, lambda done, wanted: seen.append((done, wanted)))
    assert source.batches == [8, 6]
    assert seen == [(8, 14), (14, 14)]
    pool.fill(needs)
    pool.take(1, 1, 6)
    assert len(source.asked) == len(pool) == 14


def test_another_process_finds_them(tmp_path: Path) -> None:
    first = Pool(Counting(), tmp_path, lanes=2, batch=4).take(1, 1, 10)
    source = Counting()
    assert torch.equal(Pool(source, tmp_path, lanes=2).take(1, 1, 10), first)
    # the number of lanes is not part of what is on disk
    assert indices(Pool(source, tmp_path, lanes=1).take(1, 0, 2)) == [0, 1]
    assert source.asked == [(1, 0)]


def test_what_is_there_can_be_had_without_making_more(tmp_path: Path) -> None:
    source = Counting()
    pool = Pool(source, tmp_path, lanes=2, batch=4)
    made = pool.take(1, 1, 6)
    other = Pool(source, tmp_path, lanes=2)
    found = other.kept(1, 1, 6)
    assert found is not None and torch.equal(found, made)
    assert other.kept(1, 1, 7) is None and other.kept(0, 1, 1) is None and other.kept(1, 0, 1) is None
    next(tmp_path.glob("part-*")).unlink()
    assert Pool(source, tmp_path, lanes=2).kept(1, 1, 6) is None
    assert len(source.asked) == 6


def test_a_killed_fill_loses_at_most_a_batch(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Pool(Counting(dies_at=25), tmp_path, batch=10).fill([(0, 0, 40)])
    source = Counting()
    pool = Pool(source, tmp_path, batch=10)
    assert len(pool) == 20
    pool.fill([(0, 0, 40)])
    assert len(source.asked) == 20
    assert indices(pool.take(0, 0, 40)) == list(range(40))


def test_a_write_killed_half_way_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    pool = Pool(Counting(), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            pool.take(0, 0, 4)
    assert len(Pool(Counting(), tmp_path)) == 0


def test_images_of_another_generator_are_refused(tmp_path: Path) -> None:
    Pool(Counting(), tmp_path).take(0, 0, 1)
    with pytest.raises(PoolError, match=f"fingerprint {'a' * 64}, wanted {'b' * 64}"):
        Pool(Counting(name="b"), tmp_path)
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(PoolError, match=r"pool\.json is damaged"):
        Pool(Counting(), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_part_is_made_again(damage: str, tmp_path: Path) -> None:
    whole = Pool(Counting(), tmp_path, batch=10).take(0, 0, 30)
    path = sorted(tmp_path.glob("part-*"))[1]
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-7], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "emptied": b""}[damage])
    source, said = Counting(), list[str]()
    again = Pool(source, tmp_path, batch=10, warn=said.append).take(0, 0, 30)
    assert said == [f"{path} is damaged: its images are made again"]
    assert torch.equal(again, whole)
    assert len(source.asked) == 10
    assert torch.equal(Pool(Counting(dies_at=0), tmp_path).take(0, 0, 30), whole)


def test_a_part_removed_by_hand_is_made_again(tmp_path: Path) -> None:
    source = Counting()
    pool = Pool(source, tmp_path)
    whole = pool.take(0, 0, 5)
    for path in tmp_path.glob("part-*"):
        path.unlink()
    pool._memory.clear()
    assert torch.equal(pool.take(0, 0, 5), whole)
    assert len(source.asked) == 10


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(Counting(), tmp_path, batch=10)
    before = pool.take(0, 0, 20)
    names = sorted(tmp_path.iterdir())

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"part-\w+\.safetensors: No space left.*already there are kept"):
            pool.take(0, 0, 30)
    assert sorted(tmp_path.iterdir()) == names
    assert torch.equal(Pool(Counting(dies_at=0), tmp_path).take(0, 0, 20), before)
    assert indices(pool.take(0, 0, 30)) == list(range(30))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make"):
        Pool(Counting(), tmp_path / "file" / "pool")


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MEMORY", 100)
    pool = Pool(Counting(), tmp_path, batch=10)
    assert indices(pool.take(0, 0, 60)) == list(range(60))
    assert sum(part.numel() for part in pool._memory.values()) <= 100
    assert indices(Pool(Counting(), tmp_path, among=2).take(0, 0, 60)) == list(range(60))
    half = Pool(Counting(), tmp_path / "half", batch=10, among=2)
    assert indices(half.take(0, 0, 60)) == list(range(60))
    assert sum(part.numel() for part in half._memory.values()) <= 50
    monkeypatch.setattr(store, "MEMORY", 10)
    assert indices(Pool(Counting(), None, batch=10).take(0, 0, 60)) == list(range(60))


def test_what_making_images_takes_is_counted(tmp_path: Path) -> None:
    """Only what is made now: neither images that are there nor those of a call that failed."""

    class Slow(Counting):
        def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
            time.sleep(0.02)
            return super().generate(labels, indices)

    pool = Pool(Slow(), tmp_path, batch=4)
    assert pool.spent.as_json() == {
        "images": 0, "seconds": 0.0, "cpu_seconds": 0.0, "seconds_per_image": None, "peak_memory_bytes": None
    }  # fmt: skip
    pool.fill([(0, 0, 8)])
    spent = Spent(**vars(pool.spent))
    assert spent.images == 8 and 0.04 <= spent.seconds < 10 and spent.cpu_seconds < spent.seconds
    assert spent.as_json()["seconds_per_image"] == round(spent.seconds / 8, 6)
    assert spent.peak is not None and 50e6 < spent.peak < 50e9
    pool.take(0, 0, 8)
    assert pool.spent == spent
    both = Spent(2, 0.5, 0.25, 7).after(spent.as_json())
    assert (both.images, both.peak) == (10, spent.peak) and both.seconds == pytest.approx(0.5 + spent.seconds, abs=1e-4)
    assert Spent().after({}) == Spent()
    shared = Spent()
    for name in "ab":
        Pool(Counting(name=name), None, spent=shared).take(0, 0, 3)
    assert shared.images == 6
    with pytest.raises(KeyboardInterrupt):
        Pool(Slow(dies_at=0), None, spent=shared).take(0, 0, 3)
    assert shared.images == 6


def test_what_a_source_warns_of_is_told_once() -> None:
    """Not as a Python warning, and also when the source then fails."""

    class Warns(Counting):
        def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
            warnings.warn("out of memory: going on with 2 images at a time", stacklevel=2)
            return super().generate(labels, indices)

    said: list[str] = []
    Pool(Warns(), None, batch=2, warn=said.append).take(0, 0, 6)
    assert said == ["out of memory: going on with 2 images at a time"]
    with pytest.raises(KeyboardInterrupt):
        Pool(Warns(dies_at=0), None, warn=said.append).take(0, 0, 1)
    assert len(said) == 2


def test_garbage_is_refused(tmp_path: Path) -> None:
    class Broken(Counting):
        def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
            images = super().generate(labels, indices)
            return {"black": images * torch.tensor(indices != [2]).byte(), "float": images.float(), "few": images[:-1]}[
                self.name
            ]

    with pytest.raises(PoolError, match="'dog': image 2 has one colour"):
        Pool(Broken(name="black"), tmp_path, batch=1).take(1, 0, 4)
    assert len(Pool(Broken(name="black"), tmp_path)) == 2
    for name in ("float", "few"):
        with pytest.raises(PoolError, match="'cat': the generator returned"):
            Pool(Broken(name=name), None).take(0, 0, 4)


def test_a_blank_picture_of_real_data_is_no_garbage() -> None:
    class Blank(Counting):
        def available(self, label: int) -> int:
            return 4

        def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
            return torch.zeros_like(super().generate(labels, indices))

    assert not Pool(Blank(), None).take(0, 0, 4).any()


def test_two_processes_may_fill_one_folder(tmp_path: Path) -> None:
    """Both start empty and make the same images; equal parts have equal names, unequal ones overlap harmlessly."""
    one, two = Pool(Counting(), tmp_path, batch=4), Pool(Counting(), tmp_path, batch=5)
    one.fill([(0, 0, 8)])
    two.fill([(0, 0, 10)])
    assert indices(one.take(0, 0, 10)) == indices(two.take(0, 0, 10)) == list(range(10))
    assert indices(Pool(Counting(dies_at=0), tmp_path).take(0, 0, 10)) == list(range(10))


def test_where_pools_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "pools"
    monkeypatch.delenv("FEDKEEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path.home() / ".cache" / "fedkeel" / "pools"


def test_the_note_in_the_folder(tmp_path: Path) -> None:
    Pool(Counting(), tmp_path)
    note = json.loads((tmp_path / "pool.json").read_text())
    assert note == {"fingerprint": "a" * 64, "shape": [1, 2, 2], "classes": ["cat", "dog"]}


def test_pools_lie_where_doctor_looks_for_them(monkeypatch, tmp_path):
    """One cache for data and pools, the system's own place for caches included."""
    source = Counting()
    for variables, root in (
        ({"FEDKEEL_CACHE": tmp_path / "own"}, tmp_path / "own"),
        ({"XDG_CACHE_HOME": tmp_path / "xdg"}, tmp_path / "xdg" / "fedkeel"),
    ):
        for name in ("FEDKEEL_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, place in variables.items():
            monkeypatch.setenv(name, str(place))
        assert folder_of(default_root(), source.fingerprint()) == root / "pools" / source.fingerprint()[:16]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """Not what somebody may still be writing."""
    old, new = (tmp_path / f"part-{name}.safetensors.{name}.partial" for name in ("a", "b"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, times=(0, time.time() - 2 * store.STALE))
    Pool(Counting(), tmp_path)
    assert not old.exists() and new.exists()
