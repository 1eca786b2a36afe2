"""Robust aggregation: by hand, against Flower's strategies, and against clients that send the opposite."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fedkeel import robust
from fedkeel.algorithms.base import Algorithm
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, TooFewClients
from fedkeel.job import Job
from fedkeel.loop import one_round, run
from fedkeel.options import option
from fedkeel.records import Local, Reply, Server, Update
from fedkeel.registry import register
from fedkeel.robust import Robust, agreed
from fedkeel.runtimes.inprocess import InProcess, InProcessRuntime

RULES: list[tuple[str, ...]] = [
    ("robust.name=median",),
    ("robust.name=trimmed_mean", "robust.trim=0.25"),
    ("robust.name=krum", "robust.byzantine=3"),
    ("robust.name=multi_krum", "robust.byzantine=3"),
]


def replies(rows: list[list[float]], **extra: list[list[float]]) -> Iterator[Reply]:
    """One a client, with weights 1, 2, ...; statistics are ten times the change."""
    for client, row in enumerate(rows):
        sent = {name: torch.tensor(values[client]) for name, values in extra.items()}
        update = Update(client + 1.0, torch.tensor(row), sent, {"own": torch.tensor([1.0])})
        yield Reply(client, update, torch.tensor(row) * 10, {"n": torch.tensor(client)})


def consensus(options: Robust, rows: list[list[float]]) -> list[float]:
    deltas = [reply.update.delta for reply in agreed(replies(rows), options) if reply.update is not None]
    assert all(torch.equal(delta, deltas[0]) for delta in deltas) and len(deltas) == len(rows)
    return deltas[0].tolist()


# by hand --------------------------------------------------------------------------------------------------------------

FIVE = [[1.0, -5.0], [2.0, 0.0], [3.0, 1.0], [4.0, 2.0], [1000.0, 3.0]]


def test_median_by_hand() -> None:
    """The middle of each coordinate; of an even number the mean of the two in the middle."""
    assert consensus(Robust(name="median"), FIVE) == [3.0, 1.0]
    assert consensus(Robust(name="median"), FIVE[:4]) == [2.5, 0.5]


def test_trimmed_mean_by_hand() -> None:
    """0.2 of five cuts one at either end: (2 + 3 + 4) / 3 and (0 + 1 + 2) / 3; 0.4 leaves the median."""
    assert consensus(Robust(name="trimmed_mean"), FIVE) == [3.0, 1.0]
    assert consensus(Robust(name="trimmed_mean", trim=0.4), FIVE) == [3.0, 1.0]
    assert consensus(Robust(name="trimmed_mean", trim=0.0), FIVE) == pytest.approx([202.0, 0.2])
    assert consensus(Robust(name="trimmed_mean", trim=0.25), [[0.0], [1.0], [3.0], [50.0]]) == [2.0]


def test_krum_by_hand() -> None:
    """On a line at 0, 1, 3, 7, 100 with f = 1 the scores go by the two nearest others, squared:
    0: 1 + 9, 1: 1 + 4, 3: 4 + 9, 7: 16 + 36, 100: 93^2 + 97^2. The best is at 1, then 0, then 3."""
    line = [[0.0], [1.0], [3.0], [7.0], [100.0]]
    assert robust.krum([torch.tensor(row) for row in line], 1) == [1, 0, 2, 3, 4]
    assert consensus(Robust(name="krum"), line) == [1.0]
    assert consensus(Robust(name="multi_krum", best=3), line) == pytest.approx([4 / 3])
    assert consensus(Robust(name="multi_krum"), line) == pytest.approx([0.5])  # m = n - f - 2 = 2


def test_krum_goes_by_squares() -> None:
    """At 0, 1, 6, 9, 13 with f = 1 the one at 9 has 3^2 + 4^2 = 25, that at 1 has 1^2 + 5^2 = 26; by distances that are
    not squared they have 7 and 6."""
    assert robust.krum([torch.tensor([at]) for at in (0.0, 1.0, 6.0, 9.0, 13.0)], 1) == [3, 1, 2, 0, 4]


def test_krum_of_equal_scores_is_the_first() -> None:
    assert robust.krum([torch.ones(3) for _ in range(5)], 1) == [0, 1, 2, 3, 4]


def test_krum_is_not_blinded_by_huge_values() -> None:
    """Float32 inner products of 1e30 would leave no digit of the others' distances."""
    honest = [torch.full((4,), 1.0 + 0.01 * at) for at in range(5)]
    order = robust.krum([torch.full((4,), 1e30), *honest, torch.full((4,), -3e38)], 1)
    assert order[0] == 3 and set(order[:5]) == {1, 2, 3, 4, 5}


def test_all_that_crosses_agrees_and_the_rest_stays() -> None:
    """Extra and statistics by the same rule, under Krum those of the chosen client; counters by their median; weights,
    what stays on clients, and replies without an update are as they were."""
    line, c = [[0.0], [1.0], [3.0], [7.0], [100.0]], [[9.0, 1.0], [8.0, 2.0], [7.0, 3.0], [6.0, 4.0], [5.0, 5.0]]
    for name, delta, extra in (("krum", 1.0, [8.0, 2.0]), ("median", 3.0, [7.0, 3.0])):
        held = [*replies(line, c=c)]
        held.insert(2, Reply(9, failure="away"))
        out = list(agreed(iter(held), Robust(name=name)))  # type: ignore[arg-type]
        assert [reply.client for reply in out] == [0, 1, 9, 2, 3, 4] and out[2].failure == "away"
        for reply, before in zip(out, held, strict=True):
            if reply.update is None or before.update is None:
                continue
            assert reply.update.delta.tolist() == [delta] and reply.update.extra["c"].tolist() == extra
            assert reply.buffers is not None and reply.buffers.tolist() == [10 * delta]
            assert reply.counters["n"].item() == 2
            assert reply.update.weight == 3.0, "the median of 1 to 5"
            assert reply.update.keep == before.update.keep


@pytest.mark.parametrize("rule", [option[0].partition("=")[2] for option in RULES])
def test_parts_looked_at_together_make_no_difference(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three coordinates at a time or all."""
    rows = [torch.randn(50, generator=torch.Generator().manual_seed(at)) for at in range(7)]
    options = Robust(name=rule)  # type: ignore[arg-type]
    whole = options.rule(rows)(rows)
    monkeypatch.setattr(robust, "AT_ONCE", 21)
    assert torch.equal(options.rule(rows)(rows), whole)


def test_a_share_is_cut_as_it_is_said() -> None:
    """29 of 100, which 0.29 * 100 falls just short of in binary."""
    assert Robust(name="trimmed_mean", trim=0.29).trimmed_of(100) == 29
    assert Robust(name="trimmed_mean", trim=0.25).trimmed_of(7) == 1


def test_a_method_gets_the_consensus_whatever_it_weighs(data: Dataset) -> None:
    """FedAvg weighs clients by samples, and makes exactly the step of the median of its clients' changes."""
    config = tiny.config(
        "robust.name=median", "partition.name=dirichlet", "partition.alpha=1.0", "partition.min_size=4"
    )
    job = Job(config, data)
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    updates = [job.worker.fit(server, client, None).update for client in range(4)]
    assert len({update.weight for update in updates if update}) > 1
    expected = np.median(torch.stack([update.delta for update in updates if update]).numpy(), axis=0)
    after, _ = one_round(job, InProcess().start(job), server, {})
    assert np.allclose((after.params - server.params).numpy(), expected, atol=1e-6)


# Flower's -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # flwr's own
@pytest.mark.parametrize("clients", [7, 10])
@pytest.mark.parametrize(
    ("strategy", "settings", "ours"),
    [
        ("FedMedian", {}, Robust(name="median")),
        ("FedTrimmedAvg", {"beta": 0.2}, Robust(name="trimmed_mean")),
        ("FedTrimmedAvg", {"beta": 0.4}, Robust(name="trimmed_mean", trim=0.4)),
        ("Krum", {"num_malicious_nodes": 2}, Robust(name="krum", byzantine=2)),
        (
            "MultiKrum",
            {"num_malicious_nodes": 2, "num_nodes_to_select": 3},
            Robust(name="multi_krum", byzantine=2, best=3),
        ),
    ],
)
def test_agrees_with_flowers_strategies(
    strategy: str, settings: Mapping[str, Any], ours: Robust, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On models of two tensors and equal weights, one client far off."""
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")
    strategies = pytest.importorskip("flwr.serverapp.strategy")
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    rng = np.random.default_rng(clients)
    models = [{"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)} for _ in range(clients)]
    models[3] = {name: 50 * value for name, value in models[3].items()}
    models = [{name: value.astype(np.float32) for name, value in model.items()} for model in models]
    sent = []
    for node, model in enumerate(models):
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: torch.from_numpy(value) for name, value in model.items()}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        # a message of Flower's own needs a run
        sent.append(
            SimpleNamespace(has_error=lambda: False, content=content, metadata=SimpleNamespace(src_node_id=node))
        )
    flower = getattr(strategies, strategy)(**settings)
    arrays, _ = flower.aggregate_train(1, sent)
    assert arrays is not None
    theirs = np.concatenate([array.numpy().ravel() for array in arrays.values()])
    deltas = [torch.from_numpy(np.concatenate([value.ravel() for value in model.values()])) for model in models]
    assert np.allclose(ours.rule(deltas)(deltas).numpy(), theirs, atol=1e-5)


# liars ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def liars(room: str) -> None:
    """FedAvg of which some clients send ten times the opposite of what they learnt."""

    @register("algorithms", "liars")
    @dataclass(frozen=True, kw_only=True)
    class Liars(Algorithm):
        many: int = option(0, "how many lie")

        def upload(self, local: Local) -> Update:
            update = super().upload(local)
            return replace(update, delta=-10 * update.delta) if local.client < self.many else update


def accuracy(*overrides: str) -> float:
    result = run(
        tiny.config("algorithm.name=liars", "clients=12", "rounds=5", *overrides), data=tiny.data(train=240, test=100)
    )
    return float(result.rounds[-1]["global/accuracy"])


def test_an_average_does_not_withstand_liars(liars: None) -> None:
    """The setting of the next test: without them all is learnt, with three of twelve nothing."""
    assert accuracy() > 0.95
    assert accuracy("algorithm.many=3") < 0.3


@pytest.mark.parametrize("rule", RULES, ids=[rule[0] for rule in RULES])
def test_a_consensus_withstands_liars(liars: None, rule: tuple[str, ...]) -> None:
    assert accuracy("algorithm.many=3", *rule) > 0.95


# too few, and what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (("robust.name=krum",), "robust.name", "4 updates are fewer than the 2 f + 3 = 5 that f = 1 takes"),
        (("robust.name=multi_krum", "clients=9", "robust.byzantine=4"), "robust.name", "2 f + 3 = 11"),
        (("robust.name=multi_krum", "clients=9", "robust.best=9"), "robust.name", "fewer than f = 1"),
        (("robust.name=trimmed_mean",), "robust.name", "of 4 updates, a share of 0.2 trims none"),
        (("robust.name=median", "participation=2"), "robust.name", "2 updates are fewer than the 3"),
        (("robust.name=median", "robust.trim=0.1"), "robust.trim", "is an option of trimmed_mean, not of median"),
        (("robust.name=krum", "robust.best=1"), "robust.best", "is an option of multi_krum"),
        (("robust.name=trimmed_mean", "robust.trim=0.5"), "robust.trim", "must be >= 0 and < 0.5"),
        (("robust.name=medain",), "robust.name", "'median'"),
        (("robust.name=median", "algorithm.name=fedamp"), "algorithm.name", "which [robust] needs"),
        (("robust.name=median", "algorithm.name=fednova"), "algorithm.name", "which [robust] needs"),
        (
            ("robust.name=median", "algorithm.name=fbl", "algorithm.share=fedavg_rows"),
            "algorithm.share",
            "under [robust] says in whole numbers",
        ),
    ],
)
def test_refused_before_anything_runs(overrides: tuple[str, ...], key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.config(*overrides)
    assert caught.value.key == key and said in str(caught.value)


def test_too_few_updates_end_the_round(data: Dataset) -> None:
    """Five are asked, one is away: Krum with f = 1 cannot choose. Nothing is used; the reasons of all are said
    and stand in the record of the failed round, as for any round without updates."""
    held = [*replies([[float(at)] for at in range(4)]), Reply(4, failure="gone fishing")]
    out = list(agreed(iter(held), Robust(name="krum")))
    assert all(reply.update is None for reply in out) and out[4] is held[4]
    assert "4 updates are fewer than the 2 f + 3 = 5" in out[0].failure
    config = tiny.config("clients=5", "robust.name=krum")
    job = Job(config, data)
    engine = Away(job)
    with pytest.raises(TooFewClients, match=r"0 usable updates.*fewer than the 2 f.*client 4: gone fishing") as caught:
        one_round(job, engine, replace(job.first_server(), layout=job.worker.weights.layout), {})
    assert caught.value.record is not None and len(caught.value.record["failed"]) == 5


class Away(InProcessRuntime):
    """Client 4 is."""

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        yield from super().run(server, [client for client in clients if client != 4], accepted, measure)
        yield Reply(4, failure="gone fishing")


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_a_liars_weight_moves_nothing(method: str, data: Dataset) -> None:
    """Their servers divide by the weights of all clients: one that claims a million samples, or 1e39, changes nothing
    that one with the usual weight would not."""
    config = tiny.config(f"algorithm.name={method}", "algorithm.weights=samples", "robust.name=median")

    def after(weight: float) -> Server:
        job = Job(config, data)
        server = replace(job.first_server(), layout=job.worker.weights.layout)
        held = [job.worker.fit(server, client, None) for client in range(4)]
        first = held[0].update
        assert first is not None
        held[0] = replace(held[0], update=replace(first, weight=weight * first.weight))
        return job.method.aggregate(server, (r.update for r in agreed(iter(held), config.robust) if r.update))

    assert config.robust is not None
    usual = after(1.0)
    for weight in (1e6, 1e39):
        moved = after(weight)
        parts = {**moved.shared, **moved.private, "params": moved.params}
        for name, tensor in {**usual.shared, **usual.private, "params": usual.params}.items():
            assert torch.allclose(parts[name], tensor, rtol=0.2, atol=1e-6), name


def test_a_round_without_updates_is_left_to_the_loop() -> None:
    held = [Reply(0, failure="away")]
    assert list(agreed(iter(held), Robust(name="krum"))) == held


def test_an_update_of_another_shape_is_refused_and_the_rest_goes_on() -> None:
    """Even when it comes first: what most clients send is what the round has."""
    held = [Reply(9, Update(1.0, torch.ones(7)), torch.ones(1)), *replies(FIVE)]
    out = list(agreed(iter(held), Robust(name="median")))
    assert out[0].update is None and "most clients" in out[0].failure
    assert [reply.update.delta.tolist() for reply in out[1:] if reply.update] == [[3.0, 1.0]] * 5


def test_whole_numbers_have_no_consensus() -> None:
    held = [
        Reply(k, Update(1.0, torch.ones(1), {"rows": torch.ones(2, dtype=torch.bool)}), torch.ones(1))
        for k in (0, 1, 2)
    ]
    with pytest.raises(ConfigError, match="'rows' in whole numbers"):
        list(agreed(iter(held), Robust(name="median")))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scaffold", "feddyn", "fedadam", "dynafed", "feddbe", "fedbn", "fbl"])
def test_methods_go_with_it(method: str, generator: tuple[str, ...], data: Dataset) -> None:
    """On a network with BatchNorm statistics, in which three of four clients agree on something finite."""
    small = ("algorithm.snapshots=2", "algorithm.iterations=2", "algorithm.per_class=1", "algorithm.tune_epochs=1")
    options = (*tiny.BATCHNORM, *(small if method == "dynafed" else ()), *generator, "rounds=2")
    result = run(tiny.config(f"algorithm.name={method}", "robust.name=median", *options), data=data)
    assert len(result.rounds) == 2 and all(bool(torch.isfinite(t.double()).all()) for t in result.weights.values())
