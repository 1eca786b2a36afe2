"""Differential privacy of clients: clipping and noise by hand, epsilon against closed forms, and what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from math import comb
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fedkeel import privacy
from fedkeel.algorithms.base import Algorithm
from fedkeel.checkpoint import Checkpoints
from fedkeel.config import Config, parse
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, MissingExtra
from fedkeel.job import Job
from fedkeel.loop import Result, resume, run
from fedkeel.privacy import Accountant
from fedkeel.record import Console, Silent, epsilon, numbers, spent
from fedkeel.records import Local, Reply, Server, Update
from fedkeel.registry import register
from fedkeel.report.page import page
from fedkeel.report.runs import read_run
from fedkeel.report.table import as_markdown, summarise
from fedkeel.rng import Streams

UNIFORM = "algorithm.weights=uniform"
PRIVATE = (UNIFORM, "privacy.clip=0.5", "privacy.noise_multiplier=0.02", "privacy.randomness=seed")
NO_NOISE = (UNIFORM, "privacy.noise_multiplier=0.0")


def same(one: Result, other: Result) -> bool:
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


# clipping -------------------------------------------------------------------------------------------------------------


def test_clip_is_joint_over_all_that_crosses() -> None:
    """|(3, 0, 4), (12)| = 13: clipped to 6.5 all halve, what stays on the client does not; below the limit nothing
    changes, and clipping twice is clipping once."""
    update = Update(7.0, torch.tensor([3.0, 0.0, 4.0]), {"c": torch.tensor([[12.0]])}, {"own": torch.tensor([9.0])})
    assert privacy.norm(update) == pytest.approx(13)
    short = privacy.clipped(update, 6.5)
    assert short.delta.tolist() == pytest.approx([1.5, 0, 2], rel=1e-5)
    assert short.extra["c"].tolist() == [[pytest.approx(6, rel=1e-5)]]
    assert short.keep["own"].tolist() == [9] and short.weight == 7
    assert 6.5 * (1 - 2e-6) < privacy.norm(short) <= 6.5
    assert privacy.clipped(short, 6.5) is short
    assert privacy.clipped(update, 13.0) is update


def test_whole_numbers_are_refused() -> None:
    update = Update(1.0, torch.zeros(2), {"labels": torch.tensor([3, 4])})
    with pytest.raises(ConfigError, match=r"'labels'.*neither clipped nor noised"):
        privacy.norm(update)


def test_what_crosses_is_clipped_on_the_client(data: Dataset) -> None:
    """In the reply of the worker, before any server sees it."""
    options = (UNIFORM, "local.lr=0.5")
    replies = {}
    for limit in (1e6, 0.25):
        job = Job(tiny.config(*options, f"privacy.clip={limit}"), data)
        replies[limit] = job.worker.fit(job.first_server(), 0, None).update
    long, short = replies[1e6], replies[0.25]
    assert long is not None and short is not None
    assert float(long.delta.norm()) > 0.5
    assert float(short.delta.norm()) == pytest.approx(0.25, rel=1e-5)
    assert torch.allclose(short.delta, long.delta * (0.25 / long.delta.norm()), rtol=1e-4)


# the server's part ----------------------------------------------------------------------------------------------------


def replies(*deltas: list[float], weight: float = 1.0) -> Iterator[Reply]:
    for client, delta in enumerate(deltas):
        yield Reply(
            client, Update(weight, torch.tensor(delta)), torch.ones(2), {"n": torch.tensor(5)}, loss=1.0, steps=3,
            metrics={"local_after/accuracy": 0.5},
        )  # fmt: skip


def counted(drawn: list[int]) -> privacy.Normal:
    """Noise 1 everywhere; `drawn` notes how much was asked for."""

    def normal(n: int) -> Tensor:
        drawn.append(n)
        return torch.ones(n, dtype=torch.float64)

    return normal


def test_noise_is_drawn_once_and_on_the_sum() -> None:
    """Three clients, C = 5, z = 0.2: the first is noised by 1, the third, of norm 10 and weight 9, is clipped by a
    server that does not trust it and weighs as much as others; what they measured, counted and normalised is gone."""
    server, drawn = Server(torch.zeros(2), torch.zeros(2), clients=3, samples=9), list[int]()
    options = privacy.Privacy(clip=5.0, noise_multiplier=0.2)
    out = list(
        privacy.guarded(replies([3.0, 4.0], [0.0, 1.0], [6.0, 8.0], weight=9.0), server, options, counted(drawn))
    )
    found = [reply.update for reply in out if reply.update is not None]
    assert drawn == [2]
    expected = torch.tensor([[4.0, 5.0], [0.0, 1.0], [3.0, 4.0]])
    assert torch.allclose(torch.stack([update.delta for update in found]), expected, rtol=1e-5)
    assert [update.weight for update in found] == [1.0, 1.0, 1.0]
    for reply in out:
        assert reply.steps == 0 and math.isnan(reply.loss) and not reply.metrics and not reply.counters
        assert reply.buffers is not None and len(reply.buffers) == 0


def test_what_noise_does_not_cover_is_refused() -> None:
    """An update with one tensor more than the first, of another length, in whole numbers, or not finite."""
    server = Server(torch.zeros(2), torch.zeros(0), clients=9, samples=9)
    more, zero = {"more": torch.ones(1)}, torch.zeros(0)
    updates = [
        Update(1.0, torch.ones(3)),
        Update(1.0, torch.ones(2, dtype=torch.int64)),
        Update(1.0, torch.tensor([1.0, math.inf])),
        Update(1.0, torch.ones(2)),
        Update(1.0, torch.ones(2), more),
        Update(1.0, torch.ones(2)),
    ]
    sent = (Reply(client, update, zero) for client, update in enumerate(updates))
    drawn: list[int] = []
    out = list(privacy.guarded(sent, server, privacy.Privacy(), counted(drawn)))
    assert [reply.client for reply in out if reply.update is not None] == [3, 5]
    assert all("other names, shapes or types" in reply.failure for reply in out if reply.update is None)
    assert drawn == [2], "noise is on the first that is usable"


@pytest.mark.parametrize("randomness", ["seed", "system"])
def test_noise_has_the_deviation_that_is_accounted_for(randomness: str) -> None:
    """z C = 3 over a million draws; delta and extra alike; the share within one deviation is 68.3 %."""
    options = privacy.Privacy(clip=2.0, noise_multiplier=1.5, randomness=randomness)  # type: ignore[arg-type]
    server = Server(torch.zeros(500_001), torch.zeros(0), clients=1, samples=1)
    update = Update(1.0, torch.zeros(500_001), {"c": torch.zeros(5, 100_000)})
    (reply,) = privacy.guarded(iter([Reply(0, update, torch.zeros(0))]), server, options, options.normal(Streams(1), 0))
    assert reply.update is not None
    both = torch.cat([reply.update.delta, reply.update.extra["c"].flatten()])
    for part in (reply.update.delta, reply.update.extra["c"].flatten()):
        assert float(part.std()) == pytest.approx(3, abs=0.015)
    assert float(both.mean()) == pytest.approx(0, abs=0.015)
    assert float((both.abs() < 3).double().mean()) == pytest.approx(0.6827, abs=0.002)
    assert len(both.unique()) > 900_000


def test_noise_of_the_system_is_another_each_time_and_that_of_the_seed_each_round() -> None:
    assert not torch.equal(privacy.from_system(9), privacy.from_system(9))
    assert [len(privacy.from_system(n)) for n in (0, 1, 2, 5)] == [0, 1, 2, 5]
    seeded = privacy.Privacy(randomness="seed")
    first, second = (seeded.normal(Streams(1), number)(9) for number in (0, 1))
    assert torch.equal(first, seeded.normal(Streams(1), 0)(9)) and not torch.equal(first, second)


# runs -----------------------------------------------------------------------------------------------------------------


def test_without_noise_and_under_a_wide_limit_it_is_the_plain_run(data: Dataset) -> None:
    """Bit for bit, and no epsilon is promised."""
    plain = run(tiny.config(UNIFORM), data=data)
    wide = run(tiny.config(*NO_NOISE, "privacy.clip=1e6"), data=data)
    assert same(plain, wide)
    assert [record["global/loss"] for record in plain.rounds] == [record["global/loss"] for record in wide.rounds]
    assert {record["privacy/epsilon"] for record in wide.rounds} == {None}
    assert not same(plain, run(tiny.config(*NO_NOISE, "privacy.clip=0.1"), data=data))


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedadam", "feddbe"])
def test_one_draw_moves_the_average_by_its_share(data: Dataset, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one round of four clients the mean of the updates is off by a fourth of the noise of the sum."""
    monkeypatch.setattr(privacy.Accountant, "release", lambda self, number: {})
    seen: list[Tensor] = []

    def means(overrides: tuple[str, ...]) -> Server:
        job = Job(tiny.config(f"algorithm.name={method}", UNIFORM, *overrides), data)
        server = replace(job.first_server(), layout=job.worker.weights.layout)
        sent = (job.worker.fit(server, client, None) for client in range(4))
        assert job.config.privacy is not None
        guarded = privacy.guarded(sent, server, job.config.privacy, job.config.privacy.normal(job.streams, 0))
        updates = [reply.update for reply in guarded if reply.update is not None]
        seen.append(torch.stack([torch.cat([u.delta, *(t.flatten() for t in u.extra.values())]) for u in updates]))
        return job.method.aggregate(replace(server, lab=job.lab(0)), iter(updates))

    quiet = means(("privacy.clip=2.0", "privacy.noise_multiplier=0.0"))
    loud = means(("privacy.clip=2.0", "privacy.noise_multiplier=0.05", "privacy.randomness=seed"))
    noise = (seen[1] - seen[0]).sum(0)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(seen[1][1:], seen[0][1:])
    if method == "fedadam":  # its step is no average
        assert not torch.equal(loud.params, quiet.params)
    else:
        assert torch.allclose(loud.params - quiet.params, noise[: len(quiet.params)] / 4, atol=1e-6)


def test_nothing_that_clients_measured_is_in_the_record(data: Dataset) -> None:
    options = ("evaluate.local_every=1", "evaluate.local_rounds=[1]", "rounds=1", "algorithm.name=moon", UNIFORM)
    open_ = run(tiny.config(*options), data=data).rounds[0]
    private = run(tiny.config(*options, *NO_NOISE), data=data).rounds[0]
    gone = set(open_) - set(private)
    assert {"train/loss", "train/steps", "local_before/accuracy", "local_after/accuracy", "local/classes"} <= gone
    assert not [name for name in private if name.startswith(("train/", "local", "method/"))]
    assert private["global/accuracy"] == open_["global/accuracy"]


class Stop(Silent):
    """Ends a run after its second round."""

    def finished_round(self, record) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt


def test_resume_equals_no_stop(data: Dataset, tmp_path: Path) -> None:
    """Noise from the seed, weights and epsilon alike."""
    pytest.importorskip("dp_accounting")
    options = (*PRIVATE, "participation=0.5")
    whole = run(tiny.config(*options), data=data)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(*options), data=data, folder=tmp_path / "run", listener=Stop())
    halved = resume(tmp_path / "run", data=data)
    assert same(whole, halved)
    assert [numbers(record) for record in whole.rounds] == [numbers(record) for record in halved.rounds]
    values = [record["privacy/epsilon"] for record in whole.rounds]
    assert values == sorted(values) and values[0] > 0


def test_each_round_has_noise_of_its_own(data: Dataset) -> None:
    """Also under "seed": the same noise in every round would cancel out between two models. Clients that do not move
    leave nothing but the noise."""
    pytest.importorskip("dp_accounting")
    still = tiny.config(*PRIVATE, "local.lr=1e-30")
    start, one, two = (run(replace(still, rounds=rounds), data=data).weights for rounds in (1, 2, 3))
    for name in start:
        first, second = one[name] - start[name], two[name] - one[name]
        assert first.norm() > 0 and second.norm() > 0
        assert not torch.allclose(first, second, rtol=0.1)


def test_epsilon_is_shown(tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """On the console after each round, in the table, and with delta on the page."""
    pytest.importorskip("dp_accounting")
    console = Console()
    run(tiny.config(*PRIVATE, "rounds=2"), data=data, folder=tmp_path / "run", listener=console)
    found = read_run(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])
    last = record["privacy/epsilon"]
    assert spent(record) == epsilon(last) == spent({**record, "privacy/epsilon": last - 1e-9})
    assert spent({"privacy/epsilon": 9.298, "privacy/epsilon_known": 14.393}) == "9.30 (cohorts known: 14.40)"
    assert console.bars.tasks[-1].fields["note"].endswith(f"ε {epsilon(last)}")
    capsys.readouterr()
    text = as_markdown(summarise([found]))
    assert "| ε |" in text and f"| {epsilon(last)} |" in text, "the last value, no mean over rounds"
    shown = page([found])
    assert f"epsilon {epsilon(last)} ({epsilon(last)} where it is known who took part) at delta 0.218" in shown
    assert "after 2 rounds; clip 0.5, noise multiplier 0.02, noise from the seed" in shown
    assert "Privacy spent: epsilon" in shown


def test_epsilon_is_rounded_up() -> None:
    assert [epsilon(value) for value in (1.001, 2.0, None)] == ["1.01", "2.00", "∞"]


# accounting -----------------------------------------------------------------------------------------------------------


def by_theorem_27(q: float, sigma: float, alpha: int) -> float:
    """Rényi divergence of order alpha of the Gaussian mechanism under sampling without replacement (Wang et al. 2019,
    Theorems 9 and 27), in 100 digits:

    1/(alpha-1) log(1 + q^2 C(alpha, 2) min(4 (e^eps(2) - 1), 2 e^eps(2))
                      + sum_{j>2} q^j C(alpha, j) min(4 sqrt(B(2 floor(j/2)) B(2 ceil(j/2))), 2 e^((j-1) eps(j))))

    with eps(j) = j / (2 sigma^2) and B(l) = sum_i (-1)^i C(l, i) e^((i-1) eps(i)).
    """
    with localcontext() as context:
        context.prec = 100
        share, double = Decimal(q), 2 * Decimal(sigma) ** 2

        def power(j: int) -> Decimal:
            return (Decimal(j * (j - 1)) / double).exp()

        def b(length: int) -> Decimal:
            return sum((Decimal((-1) ** i * comb(length, i)) * power(i) for i in range(length + 1)), Decimal(0))

        total = 1 + share**2 * comb(alpha, 2) * min(4 * (power(2) - 1), 2 * power(2))
        for j in range(3, alpha + 1):
            most = min(4 * (b(2 * (j // 2)) * b(2 * -(-j // 2))).sqrt(), 2 * power(j))
            total += share**j * comb(alpha, j) * most
        return float(total.ln()) / (alpha - 1)


@pytest.mark.parametrize(("z", "size", "clients"), [(2.0, 10, 100), (8.0, 1, 4)])
def test_a_sampled_round_costs_what_the_theorem_says(z: float, size: int, clients: int) -> None:
    """Noise of z C on a sum that one client moves by 2 C: sigma = z / 2."""
    pytest.importorskip("dp_accounting")
    orders, each = privacy.curve(z, size, clients)
    found = dict(zip(orders.tolist(), each.tolist(), strict=True))
    for alpha in (2, 3, 4, 5, 8, 16):
        assert found[alpha] == pytest.approx(by_theorem_27(size / clients, z / 2, alpha), rel=1e-6), alpha


def test_epsilon_of_a_client_that_is_always_there() -> None:
    """sigma = z / 2 = 1, one round, delta = 1e-5: the exact value is 4.377 (Dong, Roth and Su 2022, Gaussian privacy
    with mu = 1), Mironov's closed form 1 / (2 sigma^2) + sqrt(2 ln(1 / delta)) / sigma = 5.299 (2017, Proposition 3
    with the best order); the accountant must lie between. T rounds with z sqrt(T) cost what one with z does."""
    pytest.importorskip("dp_accounting")
    once = privacy.gaussian(2.0, 1, 1e-5)
    assert 4.377 <= once <= 0.5 + math.sqrt(2 * math.log(1e5))
    assert privacy.gaussian(2.0 * math.sqrt(50), 50, 1e-5) == pytest.approx(once)
    # eight rounds of sigma = 2 are one of mu = sqrt(8) / 2: exact by mu-GDP's delta(eps)
    mu, many = math.sqrt(8) / 2, privacy.gaussian(4.0, 8, 1e-5)

    def cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta(eps: float) -> float:
        return cdf(-eps / mu + mu / 2) - math.exp(eps) * cdf(-eps / mu - mu / 2)

    assert delta(many) <= 1e-5 < delta(many * 0.9), "an upper bound, and not a loose one"


def test_rounds_add_up_by_who_was_drawn() -> None:
    """Of cohorts (0, 1), (0, 2), (0, 1) client 0 has three rounds: that is what those who know it go by; for others no
    more than that. Without sampling both are the same."""
    pytest.importorskip("dp_accounting")
    cohorts = [[0, 1], [0, 2], [0, 1]]
    accountant = accounting(4.0, 40, cohorts)
    found = [accountant.release(number) for number in range(3)]
    assert [each["privacy/epsilon_known"] for each in found] == [privacy.gaussian(4.0, n, 1e-3) for n in (1, 2, 3)]
    values = [each["privacy/epsilon"] for each in found]
    assert values == sorted(values) and values[2] < found[2]["privacy/epsilon_known"] / 2
    resumed = accounting(4.0, 40, cohorts)
    resumed.recall({}, 2)
    assert resumed.release(2) == found[2]
    everybody = accounting(4.0, 2, [[0, 1]] * 3)
    everybody.recall({}, 2)
    always = everybody.release(2)
    assert always["privacy/epsilon"] == always["privacy/epsilon_known"] == privacy.gaussian(4.0, 3, 1e-3)


def test_the_epsilons_of_the_page() -> None:
    """Of each row of its table, by a run's own accountant."""
    pytest.importorskip("dp_accounting")
    text = (Path(__file__).parent.parent / "docs" / "privacy-and-robustness.md").read_text()
    numbers = r"^\| ([\d ]+) \| (\d+) \| (\d+) \| (\d+) \| (\S+).* \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(numbers, text, re.M)
    assert len(rows) == 5
    for wide, cohort, z, rounds, delta, *said in rows:
        clients, last = wide.replace(" ", ""), int(rounds) - 1
        given = [] if "^" in delta else [f"privacy.delta={delta}"]  # else the default
        size = (f"clients={clients}", f"participation={cohort}", f"rounds={rounds}")
        config = tiny.config(UNIFORM, *size, f"privacy.noise_multiplier={z}", *given)
        accountant = Job(config, tiny.data(train=int(clients))).accountant
        assert accountant is not None
        accountant.recall({}, last)
        assert [epsilon(value) for value in accountant.release(last).values()] == said, wide


def accounting(z: float, clients: int, cohorts: list[list[int]], samples: list[list[int]] | None = None) -> Accountant:
    return Accountant(
        privacy.Privacy(noise_multiplier=z, delta=1e-3), clients, cohorts.__getitem__, (samples or cohorts).__getitem__
    )


def test_a_loose_bound_for_samples_is_not_used() -> None:
    """With little noise the theorem for samples of one half has more than four rounds of everybody cost, which hold for
    whatever is drawn. That halves took turns, two rounds for each client, is known to those alone who know the draw:
    composed numerically, what others learn is at least 45.6, and two rounds cost 35.4."""
    pytest.importorskip("dp_accounting")
    accountant = accounting(0.5, 4, [[2, 3], [0, 1]] * 2)
    accountant.recall({}, 3)
    known, all_rounds = (privacy.gaussian(0.5, rounds, 1e-3) for rounds in (2, 4))
    assert accountant.sampled({2: 4}) > all_rounds > 45.62 > known
    assert accountant.release(3) == {"privacy/epsilon": all_rounds, "privacy/epsilon_known": known}


def test_who_was_not_drawn_gains_nothing_by_the_draw() -> None:
    """FedDBE takes all clients in its first round, whoever was drawn: for that one both numbers are the same, and the
    rounds that follow add to it. A round that the method fills by a rule of its own counts for all, too."""
    pytest.importorskip("dp_accounting")
    config = tiny.config("algorithm.name=feddbe", *PRIVATE, "clients=10", "participation=2", "privacy.delta=1e-3")
    accountant = Job(config, tiny.data()).accountant
    assert accountant is not None
    first = accountant.release(0)
    once = privacy.gaussian(0.02, 1, 1e-3)
    assert first == {"privacy/epsilon": once, "privacy/epsilon_known": once}
    drawn = [[0, 1], [0, 2], [0, 3]]
    free, bound = accounting(4.0, 40, [list(range(40)), *drawn[1:]], drawn), accounting(4.0, 40, drawn)
    for number in range(3):
        more, less = (each.release(number)["privacy/epsilon"] for each in (free, bound))
    assert more > privacy.gaussian(4.0, 1, 1e-3) > less
    orders, one = privacy.curve(4.0, 2, 40)
    assert more == pytest.approx(epsilon_of(orders, 2 * one + privacy.curve(4.0, 40, 40)[1]))


def epsilon_of(orders: Any, total: Any) -> float:
    """Proposition 12 of Canonne, Kamath and Steinke (2020), the conversion that the accountant is to use, at 1e-3."""
    values = [
        rdp + math.log1p(-1 / a) - math.log(1e-3 * a) / (a - 1)
        for a, rdp in zip(orders, total, strict=True)
        if a > 1.01
    ]
    return min(values)


@pytest.mark.parametrize(("randomness", "times"), [("system", 2), ("seed", 1)])
def test_a_round_that_is_done_again_counts_again(
    randomness: str, times: int, tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model was there to be seen when the run was killed before the checkpoint; new noise on the same updates tells
    more of them, the same noise does not."""
    pytest.importorskip("dp_accounting")
    config = tiny.config(*PRIVATE, f"privacy.randomness={randomness}", "rounds=3", "evaluate.every=1")
    monkeypatch.setattr(Checkpoints, "save", killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, folder=tmp_path / "run")
    monkeypatch.undo()
    assert json.loads((tmp_path / "run/released.json").read_text()) == {"0": 1, "1": 1}
    result = resume(tmp_path / "run", data=data)
    assert json.loads((tmp_path / "run/released.json").read_text()) == {"0": 1, "1": times, "2": 1}
    z, delta = config.privacy.noise_multiplier, config.privacy.delta_of(config.clients)  # type: ignore[union-attr]
    assert result.rounds[-1]["privacy/epsilon_known"] == privacy.gaussian(z, 2 + times, delta)


def killed_at(number: int) -> Callable[..., None]:
    """A checkpoint that a kill comes before."""
    whole = Checkpoints.save

    def save(self: Checkpoints, server: Server, accepted: Mapping[int, int]) -> None:
        if server.round == number:
            raise KeyboardInterrupt
        whole(self, server, accepted)

    return save


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, data: Dataset) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtra, match=r"fedkeel\[dp\]"):
        run(tiny.config(*PRIVATE), data=data)
    run(tiny.config(*NO_NOISE, "rounds=1"), data=data)  # nothing to account for


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (("algorithm.weights=samples",), "algorithm.weights", "'uniform'"),
        (("algorithm.weights=trained",), "algorithm.weights", "'uniform'"),
        (("balance.name=fbl", "balance.weights=samples"), "balance.weights", "'uniform'"),
        (("algorithm.name=fedamp",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=fedcac",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=fedcda",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=fednova",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=fedgen",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=fgl",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=separate",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=centralized",), "algorithm.name", "sums of updates alone"),
        (("algorithm.name=fednova", "balance.name=fbl"), "algorithm.name", "sums of updates alone"),
        ((UNIFORM, "checkpoint_every=2"), "checkpoint_every", "must be 1"),
        (("algorithm.name=fbl", "algorithm.share=fedavg_rows"), "algorithm.share", "must be 'local'"),
        ((UNIFORM, "balance.name=fbl", "balance.share=fedavg_rows"), "balance.share", "must be 'local'"),
        ((UNIFORM, "robust.name=median"), "robust.name", "not with [privacy]"),
        ((UNIFORM, "clients=1", "participation=1"), "privacy.delta", "must be given"),
        ((UNIFORM, "privacy.clip=0"), "privacy.clip", "must be > 0"),
        ((UNIFORM, "privacy.noise_multiplier=-1.0"), "privacy.noise_multiplier", "must be >= 0"),
        ((UNIFORM, "privacy.delta=1.0"), "privacy.delta", "must be > 0 and < 1"),
        ((UNIFORM, "privacy.nois=1.0"), "privacy.nois", "noise_multiplier"),
    ],
)
def test_refused_before_anything_runs(overrides: tuple[str, ...], key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.config("privacy.clip=1.0", *overrides)
    assert caught.value.key == key and said in str(caught.value)


@pytest.mark.parametrize(
    "way", [(), ("local.buffers=local",), ("model.norm=group", "model.groups=2"), ("algorithm.name=fedbn",)]
)
def test_batchnorm_statistics_must_not_cross(data: Dataset, way: tuple[str, ...]) -> None:
    """Refused when the job is made; each way out that the error names works, and FedBN."""
    config = tiny.config(*tiny.BATCHNORM, *NO_NOISE, *way, UNIFORM, "rounds=1")
    if way:
        run(config, data=data)
        return
    with pytest.raises(ConfigError, match=r"BatchNorm.*model.norm = 'group'.*local.buffers = 'local'"):
        Job(config, data)


def test_a_method_that_says_nothing_of_its_server_is_refused(room: str) -> None:
    """One that overrides `aggregate`, and whatever is derived from it; one that does not, or says `sums`, is taken."""

    @dataclass(frozen=True, kw_only=True)
    class Silent_(Algorithm):
        def aggregate(self, server, updates):
            return super().aggregate(server, updates)

    @dataclass(frozen=True, kw_only=True)
    class Child(Silent_):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Local_(Algorithm):
        def upload(self, local: Local) -> Update:
            return super().upload(local)

    @dataclass(frozen=True, kw_only=True)
    class Says(Silent_):
        sums = True

        def aggregate(self, server, updates):
            return super().aggregate(server, updates)

    for name, cls in (("silent", Silent_), ("child", Child), ("local", Local_), ("says", Says)):
        register("algorithms", name)(cls)
    for name in ("silent", "child"):
        with pytest.raises(ConfigError, match="sums of updates alone"):
            tiny.config(f"algorithm.name={name}", *NO_NOISE)
    for name in ("local", "says"):
        assert tiny.config(f"algorithm.name={name}", *NO_NOISE).method.only_sums()


def test_the_key_of_runs_without_it_stays_and_with_it_changes() -> None:
    plain: Config = tiny.config(UNIFORM)
    keys = {tiny.config(UNIFORM, text).key() for text in ("privacy.clip=1.0", "privacy.clip=2.0", "robust.name=median")}
    assert len(keys | {plain.key()}) == 4
    assert "privacy" not in plain.table() and "robust" not in plain.table()
    config = tiny.config(*PRIVATE)
    assert parse(config.table()) == config
