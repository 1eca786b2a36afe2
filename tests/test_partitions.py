"""Every registered partition: each index in exactly one client, the same seed the same split, stop or raise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel import registry
from fedkeel.data.dataset import Dataset
from fedkeel.data.sources import arrays
from fedkeel.errors import EmptyClient, PartitionError
from fedkeel.options import build
from fedkeel.partition import dirichlet, manifest
from fedkeel.partition.base import Rows
from fedkeel.partition.dirichlet import Dirichlet
from fedkeel.partition.global_share import GlobalShare
from fedkeel.partition.iid import IID
from fedkeel.partition.shards import Shards
from fedkeel.partition.single_class import SingleClass
from fedkeel.rng import Streams

ALL = [name for name in registry.names("partitions") if name != "sites"]  # which are no partition
SHARED = {"global_share"}  # those whose clients overlap on purpose


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(counts: list[int]) -> Tensor:
    """Labels with these counts, in a random order."""
    y = np.repeat(np.arange(len(counts)), counts)
    return torch.from_numpy(rng(9).permutation(y))


def counts_of(parts: list[Tensor], y: Tensor, classes: int) -> np.ndarray:
    return np.stack([np.bincount(y[rows].numpy(), minlength=classes) for rows in parts])


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None)  # a busy machine is no failure
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_covers_or_raises(name: str, counts: list[int], clients: int, seed: int) -> None:
    """Sorted, in range, covering, disjoint (but for shared data), repeatable; else a PartitionError."""
    y, cls = labels_of(counts), registry.get("partitions", name)
    some = {"tries": 20, "min_size": 2} if issubclass(cls, Dirichlet) else {}
    partitioner = build(cls, some)
    try:
        parts = partitioner.split(y, clients, len(counts), rng(seed))
    except PartitionError:
        return
    assert len(parts) == clients
    assert all(len(rows) and rows.dtype == torch.int64 and (rows.diff() > 0).all() for rows in parts)
    held = torch.cat(list(parts))
    assert torch.equal(held.unique(), torch.arange(len(y)))
    assert name in SHARED or len(held) == len(y)
    again = partitioner.split(y, clients, len(counts), rng(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", [name for name in ALL if name != "single_class"])
def test_another_seed_is_another_split(name: str) -> None:
    y = labels_of([100] * 5)
    one, two = (registry.get("partitions", name)().split(y, 5, 5, rng(seed)) for seed in (1, 2))
    assert any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_more_clients_than_samples(name: str) -> None:
    with pytest.raises(EmptyClient):
        registry.get("partitions", name)().split(torch.arange(4), 5, 5, rng())


def test_iid_sizes_differ_by_one() -> None:
    parts = IID().split(labels_of([50, 53]), 10, 2, rng())
    assert sorted(map(len, parts)) == [10] * 7 + [11] * 3


def test_single_class_is_one_class_each() -> None:
    y = labels_of([3, 7, 5])
    assert np.array_equal(counts_of(SingleClass().split(y, 3, 3, rng()), y, 3), np.diag([3, 7, 5]))
    with pytest.raises(PartitionError, match=r"set clients = 3 \(it is 2\)"):
        SingleClass().split(y, 2, 3, rng())
    with pytest.raises(EmptyClient, match="client 1 of 3"):
        SingleClass().split(labels_of([3, 0, 5]), 3, 3, rng())


def test_shards_are_runs_of_sorted_labels() -> None:
    """23 samples, 2 clients x 3 shards: five shards of 4, one of 3; each client holds three whole shards."""
    y = labels_of([5, 10, 8])
    order = torch.from_numpy(np.argsort(y.numpy(), kind="stable"))
    shards = [set(part.tolist()) for part in torch.split(order, [4, 4, 4, 4, 4, 3])]
    for rows in Shards(shards=3).split(y, 2, 3, rng()):
        inside = [shard for shard in shards if shard <= set(rows.tolist())]
        assert len(inside) == 3
        assert sum(map(len, inside)) == len(rows)
    with pytest.raises(PartitionError, match="24 shards"):
        Shards(shards=12).split(y, 2, 3, rng())


@pytest.mark.parametrize(("shards", "sizes"), [(4, {625}), (8, {312, 313})])
def test_shards_of_cifar10(shards: int, sizes: set[int]) -> None:
    """The shard sizes of FBL's Table II: 50,000 samples, 20 clients."""
    y = torch.arange(50_000) % 10
    parts = Shards(shards=shards).split(y, 20, 10, rng())
    assert all(shards * min(sizes) <= len(rows) <= shards * max(sizes) for rows in parts)
    assert counts_of(parts, y, 10).astype(bool).sum(1).max() <= 2 * shards


def test_dirichlet_by_hand() -> None:
    """The definition with the same draws: cut points are the floor of the cumulative share times the count."""
    counts, clients = [200, 301, 97], 4
    y = labels_of(counts)
    parts = Dirichlet(alpha=1.0, min_size=0).split(y, clients, 3, rng(3))
    shares = rng(3).dirichlet([1.0] * clients, size=3)
    for c, n in enumerate(counts):
        cuts = [0, *(int(np.floor(shares[c][: k + 1].sum() * n)) for k in range(clients - 1)), n]
        assert counts_of(parts, y, 3)[:, c].tolist() == np.diff(cuts).tolist()


def test_dirichlet_draws_who_of_a_class_goes_where() -> None:
    """No client has neighbours only, which of one class are 4 rows apart here."""
    y = torch.arange(400) % 4
    for rows in Dirichlet(alpha=100.0).split(y, 4, 4, rng()):
        first = rows[y[rows] == 0]
        assert int(first[-1] - first[0]) > 4 * len(first)


def test_dirichlet_alpha_is_the_skew() -> None:
    y = labels_of([2000] * 10)
    largest = [
        (c := counts_of(Dirichlet(alpha=a, top_up=True).split(y, 10, 10, rng()), y, 10)).max(1).sum() / c.sum()
        for a in (0.05, 0.5, 1000.0)
    ]
    assert largest[0] > 0.5 > largest[1] > 0.2 > 0.12 > largest[2]


def test_dirichlet_draws_again_until_large_enough() -> None:
    y = labels_of([100] * 10)
    for seed in range(5):
        assert min(map(len, Dirichlet(alpha=0.1).split(y, 10, 10, rng(seed)))) >= 10


def test_dirichlet_gives_up_and_says_why() -> None:
    y = labels_of([30, 30])
    with pytest.raises(PartitionError, match=r"alpha = 0.01: in 25 draws .* 6 clients had 0 samples .*min_size = 10"):
        Dirichlet(alpha=0.01, tries=25).split(y, 6, 2, rng())
    with pytest.raises(PartitionError, match="too few for 7 clients with at least 10 each"):
        Dirichlet().split(y, 7, 2, rng())
    with pytest.raises(EmptyClient, match="would have no samples"):
        Dirichlet(alpha=0.01, min_size=0).split(y, 20, 2, rng())


@pytest.mark.parametrize("balance_cap", [False, True])
def test_dirichlet_top_up_fills_the_small(balance_cap: bool) -> None:
    y = labels_of([30, 30])
    partitioner = Dirichlet(alpha=1e-4, tries=3, top_up=True, balance_cap=balance_cap)
    assert [len(rows) for rows in partitioner.split(y, 6, 2, rng())] == [10] * 6


@pytest.mark.parametrize("tries", [5, 25])
def test_dirichlet_tops_up_the_best_draw(tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That whose smallest client has most, so that the fewest samples are moved."""
    y, given = torch.arange(400) % 4, list[np.ndarray]()
    partitioner, same = Dirichlet(alpha=0.5, min_size=90, tries=tries, top_up=True), rng(3)
    smallest = [int(partitioner._draw(np.full(4, 100), 4, same).sum(0).min()) for _ in range(tries)]  # type: ignore[union-attr]
    fill = dirichlet._fill

    def noted(owner: np.ndarray, *rest: Any) -> None:
        given.append(np.bincount(owner, minlength=4))
        fill(owner, *rest)

    monkeypatch.setattr(dirichlet, "_fill", noted)
    assert min(map(len, partitioner.split(y, 4, 4, rng(3)))) == 90
    assert [sizes.min() for sizes in given] == [max(smallest)]


def test_dirichlet_top_up_draws_who_moves() -> None:
    """Of 90 beside 10 not the first 40 go over."""
    owner = np.repeat([0, 1], [90, 10])
    dirichlet._fill(owner, 2, 50, rng())
    moved = np.flatnonzero(owner[:90] == 1)
    assert len(moved) == 40 and moved.max() > 40


def test_balance_cap_evens_the_sizes() -> None:
    """A client at n/N gets no more, so none exceeds the cap by more than one class."""
    y = labels_of([100] * 50)
    plain, capped = (
        [len(rows) for rows in Dirichlet(alpha=0.1, balance_cap=cap).split(y, 10, 50, rng(1))] for cap in (False, True)
    )
    assert max(capped) < 500 + 100
    assert np.std(capped) < np.std(plain)


def test_global_share() -> None:
    """No share: the Dirichlet split itself. Else its union with one set that holds the same part of each class."""
    y = labels_of([100, 50, 25])
    base = Dirichlet(alpha=0.3).split(y, 4, 3, rng(5))
    none = GlobalShare(alpha=0.3, share=0.0).split(y, 4, 3, rng(5))
    assert all(torch.equal(a, b) for a, b in zip(base, none, strict=True))
    some = GlobalShare(alpha=0.3, share=0.2).split(y, 4, 3, rng(5))
    common = set.intersection(*(set(rows.tolist()) for rows in some))
    assert torch.bincount(y[list(common)]).tolist() == [20, 10, 5]
    assert [set(rows.tolist()) for rows in some] == [set(rows.tolist()) | common for rows in base]
    less = GlobalShare(alpha=0.3, share=0.1).split(y, 4, 3, rng(5))  # the columns of Table 1 differ in nothing else
    assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(less, some, strict=True))
    everything = GlobalShare(alpha=0.3, share=1.0).split(y, 4, 3, rng(5))
    assert all(torch.equal(rows, torch.arange(175)) for rows in everything)


def test_what_is_shared_is_drawn() -> None:
    """Not the first tenth of each class."""
    parts = GlobalShare(alpha=100.0, share=0.1).split(torch.arange(400) % 4, 4, 4, rng())
    common = set.intersection(*(set(rows.tolist()) for rows in parts))
    assert len(common) == 40 and max(common) >= 40


def test_a_hundred_thousand_clients() -> None:
    y = torch.arange(100_000) % 10
    assert all(len(rows) == 1 for rows in Shards(shards=1).split(y, 100_000, 10, rng()))


@pytest.fixture
def data() -> Dataset:
    x = torch.randint(0, 256, (120, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return arrays(train=(x, labels_of([50, 40, 30])), test=(x, labels_of([50, 40, 30])))


def test_manifest_round_trip(data: Dataset, tmp_path: Path) -> None:
    partitioner = Dirichlet(alpha=0.3)
    made = manifest.make(partitioner, data, 5, Streams(7))
    assert made.counts.sum(0).tolist() == [50, 40, 30]
    assert made.counts.sum(1).tolist() == [len(rows) for rows in made.clients]
    made.save(tmp_path / "deep" / "partition.json")
    read = manifest.load(tmp_path / "deep" / "partition.json")
    read.verify(partitioner, data, 5, Streams(7))
    assert read.hash == made.hash == manifest.make(partitioner, data, 5, Streams(7)).hash
    assert all(torch.equal(a, b) for a, b in zip(made.clients, read.clients, strict=True))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["partition.json"]


def test_manifest_hash_depends_on_everything(data: Dataset) -> None:
    made = manifest.make(IID(), data, 4, Streams(1))
    changes = {
        "name": "shards",
        "options": {"alpha": 1},
        "seed": 2,
        "data": "x",
        "clients": made.clients[::-1],
        "counts": made.counts + 1,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(made)}
    others = {dataclasses.replace(made, **{key: value}).hash for key, value in changes.items()}  # type: ignore[arg-type]
    assert len(others | {made.hash}) == 7


def test_manifest_names_what_differs(data: Dataset) -> None:
    made = manifest.make(Dirichlet(alpha=0.3), data, 5, Streams(7))
    other = dataclasses.replace(data, train_x=data.train_x.flip(3))
    for arguments, message in (
        ((Dirichlet(alpha=0.4), data, 5, Streams(7)), "partition.alpha is 0.4, in the manifest 0.3"),
        ((IID(), data, 5, Streams(7)), "partition.name is 'iid', in the manifest 'dirichlet'"),
        ((Dirichlet(alpha=0.3), other, 5, Streams(7)), "data fingerprint"),
        ((Dirichlet(alpha=0.3), data, 6, Streams(7)), "clients is 6, in the manifest 5"),
        ((Dirichlet(alpha=0.3), data, 5, Streams(8)), "seed is 8, in the manifest 7"),
    ):
        with pytest.raises(PartitionError, match=message):
            made.verify(*arguments)


def test_manifest_damaged(data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(PartitionError, match="cannot be read"):
        manifest.load(path)
    manifest.make(IID(), data, 4, Streams(1)).save(path)
    table = json.loads(path.read_text())
    table["clients"][0][0], table["clients"][1][0] = table["clients"][1][0], table["clients"][0][0]
    for text, message in (
        (json.dumps(table), "its contents have hash"),
        (json.dumps({**table, "format": 99}), "format 99"),
        (path.read_text()[:100], "not a partition's manifest"),
        ("[]", "not a partition's manifest"),
    ):
        path.write_text(text)
        with pytest.raises(PartitionError, match=message):
            manifest.load(path)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([[0, 1], [2, 3]], "made for 2 clients, there are 3"),
        ([[0, 1], [2, 3], [4, 24]], "client 2 has rows 4 to 24, there are 24"),
        ([[0, 1], [-1, 3], [4]], "client 1 has rows -1 to 3"),
        ([[0, 1], [2], [5, 4]], "client 2 must ascend, each of them once"),
        ([[0, 0], [2], [4]], "client 0 must ascend, each of them once"),
        ([[0], [1.0], [2]], "client 1 has row numbers of torch.float32"),
        ([[True], [1], [2]], "client 0 has row numbers of torch.bool"),
        ([[0], [], [2]], "client 1 has no samples"),
        ([[0], [[1]], [2]], r"client 1 must have its row numbers in a tensor of shape \[n\]"),
    ],
)
def test_a_partition_from_elsewhere_is_checked(
    parts: list[list[float]], said: str, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IID, "split", lambda *_: [torch.tensor(rows) for rows in parts])
    few = dataclasses.replace(data, train_x=data.train_x[:24], train_y=data.train_y[:24])
    with pytest.raises(PartitionError, match=f"partition 'iid': .*{said}"):
        manifest.make(IID(), few, 3, Streams(1))


def test_rows_of_many_clients_are_one_tensor() -> None:
    """The same rows as tensors of their own; those that several clients share are there once."""
    shared, own, nothing = torch.tensor([1, 4, 7]), torch.tensor([2]), torch.empty(0, dtype=torch.int64)
    parts = [shared, own, nothing, shared]
    rows = Rows.of(parts)
    assert [part.tolist() for part in rows] == [part.tolist() for part in parts] and len(rows) == 4
    assert [part.tolist() for part in rows[1:]] == [part.tolist() for part in parts[1:]]
    assert rows[-1].data_ptr() == rows[0].data_ptr()
    with pytest.raises(IndexError):
        rows[4]
    assert len(Rows.of([])) == 0
