"""The round loop: equal numbers for equal configurations, and a run that goes on when clients do not."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import tomllib
import traceback
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedkeel import loop, registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.config import parse, read
from fedkeel.errors import (
    CheckpointError,
    ConfigError,
    RunError,
    RunWarning,
    TooFewClients,
    UndeclaredField,
    UnknownName,
    UserError,
)
from fedkeel.job import Job, assign, steady
from fedkeel.loop import Result, one_round, resume, run
from fedkeel.models.split import Split
from fedkeel.record import Silent, numbers
from fedkeel.registry import register
from fedkeel.rng import Streams
from fedkeel.runtimes.inprocess import InProcess, InProcessRuntime


def comparable(result: Result) -> list[dict]:
    return [numbers(record) for record in result.rounds]


def same(one: Result, other: Result) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items()
    )


class Heard(Silent):
    """Remembers what a run said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.rounds: list[int] = []
        self.ends = 0

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def finished_round(self, record) -> None:
        self.rounds.append(record["round"])

    def ended(self) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("participation=2",),
        ("algorithm.name=scaffold", "participation=0.5"),
        (*tiny.BATCHNORM, "augment.flip=true", "augment.crop=2", "local.momentum=0.9"),
    ],
)
def test_equal_configurations_give_equal_numbers(data, overrides):
    """Bit for bit, whatever was drawn from global generators in between; another seed gives others."""
    one = run(tiny.config(*overrides), data=data)
    torch.manual_seed(12345)
    two = run(tiny.config(*overrides), data=data)
    other = run(tiny.config(*overrides, "seed=2"), data=data)
    assert same(one, two) and comparable(one) == comparable(two)
    assert not same(one, other)


@pytest.mark.parametrize("overrides", [(), ("algorithm.name=fedavg_ft", "personal.epochs=2")])
def test_layers_that_draw_at_random_give_equal_numbers(data, tmp_path, monkeypatch, overrides):
    """Dropout draws from the global generator: again, after a stop, and in other processes the same."""
    registry.names("models")
    monkeypatch.setitem(registry._things, "models", dict(registry._things["models"]))

    @register("models", "forgetful")
    @dataclass(frozen=True)
    class Forgetful:
        def build(self, shape: tuple[int, int, int], classes: int) -> Split:
            body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), 8), torch.nn.Dropout(0.5))
            return Split(body, torch.nn.Linear(8, classes), 8)

    options = (*overrides, f"runs_dir={tmp_path}")
    table = {"model": {"name": "forgetful"}}
    one = run(tiny.config(*options, "name=one", table=table), data=data, folder=tmp_path / "one")
    torch.manual_seed(12345)
    two = run(tiny.config(*options, "name=two", "runtime=pool", "workers=2", table=table), data=data)
    assert same(one, two) and comparable(one) == comparable(two)

    class Stop(Silent):
        def finished_round(self, record) -> None:
            if record["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(*options, "name=three", table=table), data=data, listener=Stop(), folder=tmp_path / "three")
    three = resume(tmp_path / "three", data=data)
    assert same(one, three) and comparable(one) == comparable(three)


def test_it_learns(data):
    result = run(tiny.config("rounds=8"), data=data)
    losses = [record["global/loss"] for record in result.rounds]
    assert result.rounds[-1]["global/accuracy"] > 0.9
    assert losses[-1] < 0.5 * losses[0]
    assert result.headline() == pytest.approx(sum(record["global/accuracy"] for record in result.rounds) / 8)


def test_headline():
    """The mean of the last ten evaluations; rounds without one do not count."""
    records = [
        {"round": i, "a": float(i)} if i % 2 else {"round": i, "a": None} if i == 30 else {"round": i}
        for i in range(40)
    ]
    assert Result(records, {}, None).headline("a") == pytest.approx(sum(range(21, 40, 2)) / 10)
    assert math.isnan(Result(records, {}, None).headline("b"))


def test_headline_of_what_looks_back():
    """The best of personal models so far, and what privacy has cost, are what they are at the end; what personal models
    reach in a round is like any other metric."""
    names = ("personal/accuracy_best", "personal/accuracy_best_weighted", "privacy/epsilon", "personal/accuracy_last")
    result = Result([dict.fromkeys(names, float(i)) for i in range(20)], {}, None)
    assert [result.headline(name) for name in names] == [19, 19, 19, 14.5]


def test_evaluation_changes_no_numbers_of_training(data):
    often = run(tiny.config(*tiny.BATCHNORM, "evaluate.local_every=1"), data=data)
    seldom = run(tiny.config(*tiny.BATCHNORM, "evaluate.every=4", "evaluate.batch=7"), data=data)
    assert same(often, seldom)
    assert [r["train/loss"] for r in often.rounds] == [r["train/loss"] for r in seldom.rounds]


def test_cadence_of_evaluation(data):
    """Global every third round and at the end; on clients every second."""
    result = run(tiny.config("rounds=5", "evaluate.every=3", "evaluate.local_every=2"), data=data)
    assert [r["round"] for r in result.rounds if "global/accuracy" in r] == [3, 5]
    assert [r["round"] for r in result.rounds if "local_after/accuracy" in r] == [2, 4]
    assert [r["round"] for r in result.rounds if "local_before/balanced_accuracy" in r] == [2, 4]
    silent = run(tiny.config(), data=data)
    assert not any(key.startswith("local") for record in silent.rounds for key in record)


def test_clients_are_measured_before_and_after_training(data):
    """Before: the received model, the same for all, that is the global model of the round before."""
    result = run(tiny.config("rounds=3", "evaluate.local_every=1"), data=data)
    for before, after in zip(result.rounds, result.rounds[1:], strict=False):
        assert after["local_before/accuracy"] == pytest.approx(before["global/accuracy"])
        assert after["local_before/loss"] == pytest.approx(before["global/loss"])
    assert result.rounds[0]["local_after/loss"] < result.rounds[0]["local_before/loss"]


@pytest.mark.parametrize(
    ("participation", "expected"), [("1", 1), ("3", 3), ("0.3", 3), ("1.0", 10), ("0.01", 1), ("0.25", 3)]
)
def test_participation_as_share_and_count(data, participation, expected):
    job = Job(tiny.config("clients=10", f"participation={participation}"), data)
    cohorts = [job.cohort(number) for number in range(200)]
    assert {len(cohort) for cohort in cohorts} == {expected}
    assert all(cohort == sorted(set(cohort)) and set(cohort) <= set(range(10)) for cohort in cohorts)  # no replacement
    assert set().union(*cohorts) == set(range(10))  # everybody's turn comes
    assert expected == 10 or len({tuple(cohort) for cohort in cohorts}) > 5


def test_who_takes_part_is_drawn_uniformly(data):
    """2 of 10 in 1500 rounds: 300 each, standard deviation 15.5; and pairs are not favoured."""
    job = Job(tiny.config("clients=10", "participation=2"), data)
    cohorts = [tuple(job.cohort(number)) for number in range(1500)]
    counts = [sum(k in cohort for cohort in cohorts) for k in range(10)]
    assert all(abs(count - 300) < 70 for count in counts)
    assert len(set(cohorts)) == 45


def test_what_seed_1_draws(data):
    """Recorded: another draw is other numbers in every run there is."""
    skewed = ("partition.name=dirichlet", "partition.alpha=0.5", "partition.min_size=2")
    job = Job(
        tiny.config(
            "clients=10", "participation=3", *skewed, "profiles.unconstrained=0.3", "model.hidden=[4]", "augment.crop=2"
        ),
        data,
    )
    assert [job.cohort(number) for number in range(4)] == [[0, 4, 8], [0, 3, 9], [2, 4, 8], [1, 5, 7]]
    assert [rows.tolist()[:3] for rows in job.partition.clients] == [
        [3, 8, 12], [24, 60], [0, 6, 9], [11, 23, 27], [10, 14, 30],
        [4, 28, 75], [16, 47, 53], [2, 26, 34], [5, 7, 15], [1, 18, 20],
    ]  # fmt: skip
    assert [client for client, profile in enumerate(job.profiles) if profile == "unconstrained"] == [1, 4, 5]
    assert [rows.tolist()[:2] for rows in job.personal_tests] == [
        [8, 13], [28], [6, 7], [3, 11], [2, 5], [4, 9], [19, 22], [1, 14], [23, 25], [0, 12],
    ]  # fmt: skip
    server = job.first_server()
    assert server.params[:4].tolist() == pytest.approx([-0.053805, 0.05433, 0.051291, 0.018324], abs=1e-6)
    assert job.worker.fit(server, 0, None).loss == pytest.approx(1.42408, abs=1e-4)  # by the order of batches


def test_methods_of_one_comparison_share_cohorts_data_and_first_weights(data):
    jobs = [Job(tiny.config("clients=6", f"algorithm.name={name}"), data) for name in ("fedavg", "scaffold", "fedprox")]
    assert len({tuple(job.cohort(3)) for job in jobs}) == 1
    assert len({job.partition.hash for job in jobs}) == 1
    assert all(torch.equal(job.first_server().params, jobs[0].first_server().params) for job in jobs)


def test_conservation(data):
    """Weights sum to one: if every client's model is shifted by one, so is the average."""
    job = Job(tiny.config(), data)
    server = job.first_server()
    updates = [job.worker.fit(server, k, None).update for k in range(4)]
    plain = job.method.aggregate(server, updates)
    shifted = job.method.aggregate(server, [replace(update, delta=update.delta + 1) for update in updates])
    assert torch.allclose(shifted.params, plain.params + 1, atol=1e-6)


def test_all_samples_are_dealt_and_weigh_what_they_are(data):
    job = Job(tiny.config("partition.name=dirichlet", "partition.alpha=0.5"), data)
    rows = torch.cat(list(job.partition.clients)).sort().values
    assert torch.equal(rows, torch.arange(96))
    replies = [job.worker.fit(job.first_server(), k, None) for k in range(4)]
    assert [reply.update.weight for reply in replies] == [float(len(part)) for part in job.partition.clients]


def test_the_global_model_stands_still_until_it_is_aggregated(data, room):
    """No client trains on the broadcast vector itself: its hash is the same before and after every client."""
    seen: set[tuple[int, str]] = set()

    def mark(server_round: int, x: Tensor) -> None:
        seen.add((server_round, hashlib.sha256(x.numpy().tobytes()).hexdigest()))

    @register("algorithms", "watching")
    @dataclass(frozen=True, kw_only=True)
    class Watching(Algorithm):
        def prepare(self, local):
            mark(local.round, local.anchor)
            assert torch.equal(local.params, local.anchor)
            return local.data

        def upload(self, local):
            mark(local.round, local.anchor)
            assert not torch.equal(local.params, local.anchor)
            return super().upload(local)

        def aggregate(self, server, updates):
            after = super().aggregate(server, updates)
            mark(server.round, server.params)
            return after

    result = run(tiny.config("algorithm.name=watching"), data=data)
    assert not any(record["failed"] for record in result.rounds)
    assert sorted(number for number, _ in seen) == [0, 1, 2, 3]


def test_a_server_that_returns_its_network(data, room):
    """It is lent for the time of `aggregate`: clients train it afterwards. As a copy of it gives."""

    @register("algorithms", "lent")
    @dataclass(frozen=True, kw_only=True)
    class Lent(Algorithm):
        copied: bool = False

        def aggregate(self, server, updates):
            after = super().aggregate(server, updates)
            weights = server.lab.weights
            weights.params.copy_(after.params)
            return replace(after, params=weights.params.clone() if self.copied else weights.params)

    live, copied = (run(tiny.config("algorithm.name=lent", f"algorithm.copied={each}"), data=data)
                    for each in ("false", "true"))  # fmt: skip
    assert comparable(live) == comparable(copied)
    assert all(torch.equal(live.weights[name], copied.weights[name]) for name in live.weights)


def test_cuda_is_asked_for_the_same_numbers_again(monkeypatch):
    """A job on CUDA does this; here without one, that the names are PyTorch's."""
    flags = {"deterministic": True, "benchmark": False, "allow_tf32": False}
    for name, value in flags.items():
        monkeypatch.setattr(torch.backends.cudnn, name, not value)
    steady()
    assert {name: getattr(torch.backends.cudnn, name) for name in flags} == flags


def failing(room: str, clients: dict[int, tuple[int, ...]], how: str) -> None:
    """Registers "failing": FedAvg whose clients fail in given rounds (from 0)."""

    @register("algorithms", "failing")
    @dataclass(frozen=True, kw_only=True)
    class Failing(Algorithm):
        def loss(self, local, batch):
            loss = super().loss(local, batch)
            if local.round not in clients.get(local.client, ()):
                return loss
            if how == "raises":
                raise IndexError("image 7 of 6")
            return loss * float("nan")


def test_a_loss_that_is_not_a_number_is_refused_and_the_round_goes_on(data, room):
    failing(room, {1: (0, 2), 3: (2,)}, "nan")
    result = run(tiny.config("algorithm.name=failing"), data=data)
    assert [record["clients"] for record in result.rounds] == [[0, 2, 3], [0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]
    assert [[note["client"] for note in record["failed"]] for record in result.rounds] == [[1], [], [1, 3], []]
    assert result.rounds[0]["round"] == 1
    assert result.rounds[0]["failed"] == [{"client": 1, "reason": "the training loss is nan after 3 steps"}]
    assert all(math.isfinite(record["train/loss"]) for record in result.rounds)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.weights.values())


def test_the_loss_of_a_round_is_the_mean_of_its_clients(data):
    job = Job(tiny.config(), data)
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    losses = [job.worker.fit(server, client, None).loss for client in range(4)]
    _, record = one_round(job, InProcess().start(job), server, {})
    assert len(set(losses)) == 4 and record["train/loss"] == pytest.approx(sum(losses) / 4)


def test_a_client_that_fails_counts_as_absent(data, room):
    """The round is what it would be without it: weights over those that answered."""
    failing(room, {1: (0,), 3: (0,)}, "nan")
    with_failures = Job(tiny.config("algorithm.name=failing", "rounds=1"), data)
    result = run(with_failures.config, data=data)
    plain = Job(tiny.config("rounds=1"), data)
    server = plain.first_server()
    after = plain.method.aggregate(server, [plain.worker.fit(server, k, None).update for k in (0, 2)])
    plain.worker.load(after)
    expected = plain.worker.weights.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.weights.items())


def test_an_exception_is_recorded_with_its_traceback(data, room):
    failing(room, {0: (1,)}, "raises")
    (note,) = run(tiny.config("algorithm.name=failing"), data=data).rounds[1]["failed"]
    assert note["client"] == 0 and note["reason"] == "IndexError: image 7 of 6"
    assert note["trace"].startswith("Traceback") and "test_loop.py" in note["trace"]


def test_too_few_clients(data, room, tmp_path):
    """The run fails with everybody's reason; what was done stays, and the run can go on once the cause is gone."""
    failing(room, {1: (2,), 3: (2,)}, "nan")
    config = tiny.config("algorithm.name=failing", "min_replies=3", "runs_dir=" + str(tmp_path))
    heard = Heard()
    with pytest.raises(TooFewClients, match=r"round 3: 2 usable updates, min_replies = 3: client 1: .*; client 3: "):
        run(config, data=data, folder=tmp_path / "run", listener=heard)
    assert heard.rounds == [1, 2] and heard.ends == 1
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2
    with pytest.raises(TooFewClients):
        resume(tmp_path / "run", data=data)
    # the bound decides no numbers, so the run goes on with a lower one, and ends as if it had had it all along
    lower = replace(config, min_replies=2)
    assert same(run(lower, data=data, folder=tmp_path / "run", resume=True), run(lower, data=data))


def test_a_pooled_method_has_one_client_whatever_the_least(data):
    """Of a comparison under min_replies = 3 the centralised bound is a run too."""
    assert len(run(tiny.config("algorithm.name=centralized", "min_replies=3", "rounds=1"), data=data).rounds) == 1


def test_a_run_leaves_pytorch_as_it_was(data):
    torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = True
    run(tiny.config("rounds=1", "threads=1"), data=data)
    assert torch.get_num_threads() == 2 and torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


def test_a_method_without_a_name_is_refused(data):
    class Mine(Algorithm):
        pass

    with pytest.raises(UserError, match=r"algorithms: .*Mine has no name; give it one by fedkeel.register"):
        run(replace(tiny.config(), algorithm=Mine()), data=data)


def test_what_is_no_configuration_or_data_is_refused_by_name(data):
    with pytest.raises(ConfigError, match=r"config = 'str': must be a Config: fedkeel.read"):
        run("exp.toml")
    with pytest.raises(ConfigError, match=r"data = 'tuple': must be a Dataset: fedkeel.arrays"):
        run(tiny.config(), data=(data.train_x, data.train_y))
    with pytest.raises(ConfigError, match=r"table = 'exp.toml': must be a table of tables; fedkeel.read"):
        parse("exp.toml")
    with pytest.raises(UnknownName, match=r"rooms: there is no 'algoritms'.* Did you mean 'algorithms'"):
        register("algoritms", "mine")


def test_images_of_no_class_are_none(data, generator):
    """A method that asks for nothing gets nothing, as in its rehearsal."""
    job = Job(tiny.config("algorithm.name=regl", "algorithm.volume=2", *generator), data)
    found = job.images(0, torch.zeros(4, dtype=torch.int64), 0)
    assert found.x.shape == (0, 1, 16, 16) and len(found) == 0 and found.fake.dtype == torch.bool


def test_trackers_need_a_folder(data):
    for key, value in (("tensorboard", "true"), ("mlflow", "http://127.0.0.1:9")):
        with pytest.raises(ConfigError, match=rf"^{key} = .*: needs a folder: "):
            run(tiny.config(f"{key}={value}"), data=data)


def test_only_files_that_were_left_half_written_go(data, tmp_path):
    """And a folder may be named by a word."""
    (tmp_path / "run").mkdir()
    mine = tmp_path / "run/movie.mkv.partial"
    left = tmp_path / f"run/rounds.jsonl.{'0' * 32}.partial"
    for path in (mine, left):
        path.touch()
    run(tiny.config("rounds=1"), data=data, folder=str(tmp_path / "run"))
    assert mine.exists() and not left.exists()
    assert len(resume(str(tmp_path / "run"), data=data).rounds) == 1


def test_a_round_that_fails_leaves_a_note(data, room, tmp_path):
    """The error and what would have been the round's record, with tracebacks; gone once the run goes on."""
    failing(room, {1: (2,), 2: (2,)}, "raises")
    config, folder = tiny.config("algorithm.name=failing", "min_replies=3"), tmp_path / "run"
    with pytest.raises(TooFewClients) as caught:
        run(config, data=data, folder=folder)
    note = json.loads((folder / "failure.json").read_text())
    assert note["error"] == str(caught.value) and note["round"] == 3 and note["clients"] == [0, 3]
    assert [entry["client"] for entry in note["failed"]] == [1, 2]
    assert all("test_loop.py" in entry["trace"] and "IndexError" in entry["trace"] for entry in note["failed"])
    # --debug prints the exception as Python does: with the first client's traceback below it
    shown = "".join(traceback.format_exception(caught.value))
    assert "client 1: Traceback" in shown and "image 7 of 6" in shown and "client 2: Traceback" not in shown
    with pytest.raises(RunError):
        resume(folder, data=data)
    assert (folder / "failure.json").exists()
    run(replace(config, min_replies=1), data=data, folder=folder, resume=True)
    assert not (folder / "failure.json").exists()


def test_an_error_of_the_method_leaves_a_note(data, room, tmp_path):
    @register("algorithms", "explodes")
    @dataclass(frozen=True, kw_only=True)
    class Explodes(Algorithm):
        def aggregate(self, server, updates):
            return replace(super().aggregate(server, updates), params=server.params * float("inf"))

    with pytest.raises(RunError):
        run(tiny.config("algorithm.name=explodes"), data=data, folder=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "failure.json").read_text()) == {
        "error": "round 1: the averaged model is not finite"
    }


def test_nobody_answers(data, room):
    failing(room, dict.fromkeys(range(4), (0,)), "raises")
    with pytest.raises(TooFewClients, match="round 1: 0 usable updates"):
        run(tiny.config("algorithm.name=failing"), data=data)


def test_on_failure_stop(data, room):
    failing(room, {2: (1,)}, "raises")
    with pytest.raises(RunError, match=r"round 2: client 2: IndexError: image 7 of 6 \(on_failure = 'stop'\)"):
        run(tiny.config("algorithm.name=failing", "on_failure=stop"), data=data)


@pytest.mark.parametrize("where", ["extra", "keep", "shared"])
def test_undeclared_fields_stop_the_run(data, room, where):
    @register("algorithms", "leaky")
    @dataclass(frozen=True, kw_only=True)
    class Leaky(Algorithm):
        def upload(self, local):
            return replace(super().upload(local), **({where: {"labels": local.data.y}} if where != "shared" else {}))

        def aggregate(self, server, updates):
            after = super().aggregate(server, updates)
            return replace(after, shared={"labels": server.params}) if where == "shared" else after

    with pytest.raises(UndeclaredField, match="labels"):
        run(tiny.config("algorithm.name=leaky"), data=data)


def test_a_methods_own_numbers_are_in_the_records(data, room, tmp_path):
    """The server's for their round alone, clients' as means over those that have them; none is sent or saved."""
    seen = []

    @register("algorithms", "tells")
    @dataclass(frozen=True, kw_only=True)
    class Tells(Algorithm):
        def upload(self, local):
            told = {"client": float(local.client)} if local.client else {}
            return replace(super().upload(local), metrics=told if local.round != 2 else {})

        def aggregate(self, server, updates):
            kept = list(updates)
            seen.extend([server.metrics, server.beside, *(update.metrics for update in kept)])
            after = super().aggregate(server, iter(kept))
            if server.round == 1:
                return after
            numbers = {"length": float(after.params.norm()), "endless": math.inf}
            return replace(after, metrics=numbers, beside={"first": server.params})

    config = ("evaluate.every=3", "rounds=4", "checkpoint_every=4")
    told = run(tiny.config("algorithm.name=tells", *config), data=data, folder=tmp_path / "told")
    plain = run(tiny.config(*config), data=data, folder=tmp_path / "plain")
    assert same(told, plain) and seen == [{}] * 4 * (2 + 4)
    lines = [json.loads(line) for line in (tmp_path / "told" / "rounds.jsonl").read_text().splitlines()]
    own = [{key: value for key, value in line.items() if key.startswith("method/")} for line in lines]
    length = float(torch.cat([tensor.flatten() for tensor in told.weights.values()]).norm())
    assert own[3].pop("method/length") == pytest.approx(length)
    assert own[0].pop("method/length") > 0 and own[2].pop("method/length") > 0
    for at in (2, 3):
        assert own[at].pop("method/first/accuracy") >= 0 and own[at].pop("method/first/loss") > 0
    assert own == [
        {"method/client": 2.0, "method/endless": None},
        {"method/client": 2.0},
        {"method/endless": None},
        {"method/client": 2.0, "method/endless": None},
    ]
    rest = [{key: value for key, value in numbers(line).items() if not key.startswith("method/")} for line in lines]
    assert rest == comparable(plain)  # what crossed, too
    one, other = (next((tmp_path / name / "checkpoint").glob("*/server.safetensors")) for name in ("told", "plain"))
    assert load_file(one).keys() == load_file(other).keys()


def test_a_model_beside_the_servers_is_measured(data, room):
    """What the server had before, beside what it has: this round's numbers are those of the round before."""

    @register("algorithms", "looks_back")
    @dataclass(frozen=True, kw_only=True)
    class LooksBack(Algorithm):
        def aggregate(self, server, updates):
            return replace(super().aggregate(server, updates), beside={"before": server.params})

    rounds = run(tiny.config("algorithm.name=looks_back"), data=data).rounds
    for before, now in pairwise(rounds):
        for name in ("accuracy", "loss"):
            assert now[f"method/before/{name}"] == before[f"global/{name}"]


def test_an_averaged_model_that_is_not_finite_stops_the_run(data, room):
    @register("algorithms", "explodes")
    @dataclass(frozen=True, kw_only=True)
    class Explodes(Algorithm):
        def aggregate(self, server, updates):
            return replace(super().aggregate(server, updates), params=server.params * float("inf"))

    with pytest.raises(RunError, match="round 1: the averaged model is not finite"):
        run(tiny.config("algorithm.name=explodes"), data=data)


def test_bytes_by_hand(data):
    """16x16 pixels to 8 units to 4 classes: 8 256 + 8 + 4 8 + 4 = 2092 numbers of 4 bytes, to and from each client.

    SCAFFOLD sends and receives a control variate of the same size: twice that.
    """
    fedavg = run(tiny.config("participation=3"), data=data)
    scaffold = run(tiny.config("participation=3", "algorithm.name=scaffold"), data=data)
    assert {(r["bytes/up"], r["bytes/down"]) for r in fedavg.rounds} == {(3 * 4 * 2092, 3 * 4 * 2092)}
    assert {(r["bytes/up"], r["bytes/down"]) for r in scaffold.rounds} == {(6 * 4 * 2092, 6 * 4 * 2092)}
    assert {r["train/steps"] for r in fedavg.rounds} == {3 * 2 * 3}  # 3 clients, 2 epochs of 24 samples in batches of 8


def test_bytes_of_a_client_that_failed(data, room):
    """It received the model; nothing usable came back."""
    failing(room, {1: (0,)}, "nan")
    record = run(tiny.config("algorithm.name=failing", "rounds=1"), data=data).rounds[0]
    assert (record["bytes/up"], record["bytes/down"]) == (3 * 4 * 2092, 4 * 4 * 2092)


def test_no_training_is_no_number(data):
    """epochs = 0: nothing was trained, so there is no loss; JSON has no word for NaN."""
    result = run(tiny.config("local.epochs=0", "rounds=2"), data=data)
    assert [record["train/loss"] for record in result.rounds] == [None, None]
    assert [record["train/steps"] for record in result.rounds] == [0, 0]


def test_switching_a_method_off_is_said(data):
    heard = Heard()
    run(tiny.config("algorithm.name=fedprox", "algorithm.mu=0"), data=data, listener=heard)
    assert heard.warnings == ["algorithm.mu = 0.0: this switches the method off"]
    assert heard.rounds == [1, 2, 3, 4] and heard.ends == 1


def test_without_a_listener_warnings_are_pythons(data):
    with pytest.warns(RunWarning, match=r"^algorithm.mu = 0.0: this switches the method off$"):
        run(tiny.config("algorithm.name=fedprox", "algorithm.mu=0", "rounds=1"), data=data)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("algorithm.weights=uniform", "privacy.noise_multiplier=0"), "privacy.noise_multiplier = 0.0: without noise"),
        (("robust.name=trimmed_mean", "robust.trim=0"), "robust.trim = 0.0: nothing is cut off"),
    ],
)
def test_privacy_without_noise_and_a_rule_that_trims_nothing_are_said(data, overrides, said):
    heard = Heard()
    run(tiny.config(*overrides, "rounds=1"), data=data, listener=heard)
    assert [text[: len(said)] for text in heard.warnings] == [said]


@pytest.mark.parametrize("keys", [["algorithm.mu", "balance.volume"], ["balance.volume"]])
def test_the_method_and_what_balances_it_are_switched_off_apart(data, keys):
    """Each under its own section; neither speaks for the other."""
    heard, off = Heard(), [f"{key}=0" for key in keys]
    named = ("algorithm.name=fedprox", "balance.name=regl", "rounds=1")
    run(tiny.config(*named, *off), data=data, listener=heard)
    assert [text.partition(" = 0")[0] for text in heard.warnings] == keys


def test_identities(data):
    """FedProx without its term is FedAvg; SCAFFOLD's first round is uniform FedAvg: bit for bit, the whole loop."""
    avg = run(tiny.config("participation=0.5"), data=data)
    prox = run(tiny.config("participation=0.5", "algorithm.name=fedprox", "algorithm.mu=0"), data=data)
    assert same(avg, prox)
    uniform = run(tiny.config("rounds=1", "algorithm.weights=uniform"), data=data)
    scaffold = run(tiny.config("rounds=1", "algorithm.name=scaffold"), data=data)
    assert same(uniform, scaffold)


def test_the_folder_of_a_run(data, tmp_path):
    folder = tmp_path / "run"
    result = run(tiny.config("partition.name=dirichlet"), data=data, folder=folder)
    assert {path.name for path in folder.iterdir()} >= {
        "config.toml",
        "manifest.json",
        "partition.json",
        "balanced.json",
        "rounds.jsonl",
        "checkpoint",
        "model.safetensors",
    }
    assert [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()] == result.rounds
    assert tomllib.loads((folder / "config.toml").read_text())["partition"]["name"] == "dirichlet"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["fingerprint"] == data.fingerprint
    assert manifest["partition"] == json.loads((folder / "partition.json").read_text())["hash"]
    assert not list(folder.rglob("*.partial"))
    assert set(manifest["hardware"]) == {"device", "machine", "processor", "gpu", "threads"}
    assert manifest["hardware"]["gpu"] is None
    assert manifest["versions"]["fedkeel"] and manifest["resumed"] == []
    for extra in ("diffusers", "transformers", "peft", "accelerate", "sdnq"):
        assert (extra in manifest["versions"]) == (importlib.util.find_spec(extra) is not None)

    again = run(read(folder / "config.toml"), data=data)
    assert same(result, again)  # run config.toml again and get the same numbers
    with pytest.raises(ConfigError, match="holds a run"):
        run(tiny.config(), data=data, folder=folder)


def test_a_runtime_that_cannot_start_leaves_no_run(data, tmp_path):
    """The mistake can be mended under the same name."""

    class Missing:
        remote = False

        def start(self, job):
            raise ConfigError("ray.address", "", "no such cluster")

    for _ in range(2):
        with pytest.raises(ConfigError, match="no such cluster"):
            run(tiny.config(), data=data, folder=tmp_path / "run", engine=Missing())
    run(tiny.config(), data=data, folder=tmp_path / "run")


class Picks:
    """Chooses `inprocess`; remembers what it was told of an earlier choice."""

    remote = False

    def __init__(self) -> None:
        self.before: list[str] = []

    def choose(self, job, before):
        self.before.append(before)
        return InProcess()

    def start(self, job):
        raise AssertionError("what was chosen is started")


def test_the_manifest_names_the_runtime(data, tmp_path):
    """The one that ran, which an engine that chooses is told when the run is resumed."""

    class Own:
        remote = False

        def start(self, job):
            return InProcessRuntime(job)

    def manifest(name: str) -> dict:
        return json.loads((tmp_path / name / "manifest.json").read_text())

    picks = Picks()
    chosen = run(tiny.config(), data=data, folder=tmp_path / "run", engine=picks)
    assert picks.before == [""] and manifest("run")["runtime"] == "inprocess"
    run(tiny.config(), data=data, engine=picks)
    run(tiny.config(), data=data, folder=tmp_path / "run", engine=picks, resume=True)
    assert picks.before == ["", "", "inprocess"] and manifest("run")["runtime"] == "inprocess"
    left = {key: value for key, value in manifest("run").items() if key != "runtime"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(left))  # as an earlier version wrote it
    run(tiny.config(), data=data, folder=tmp_path / "run", engine=picks, resume=True)
    assert picks.before[-1] == "" and manifest("run")["runtime"] == "inprocess"

    plain = run(tiny.config("runtime=batched"), data=data, folder=tmp_path / "batched")
    assert manifest("batched")["runtime"] == "batched" and len(plain.rounds) == len(chosen.rounds)
    run(tiny.config(), data=data, folder=tmp_path / "own", engine=Own())
    assert manifest("own")["runtime"] == "Own"


@pytest.mark.parametrize("when", ["started", "finished_round", "ended"])
def test_a_runtime_is_closed_whatever_the_listener_raises(when, data):
    """Ctrl-C while workers start, or a tracker that cannot be reached at the end: no process is left behind."""
    closed = []

    class Engine:
        remote = False

        def start(self, job):
            runtime = InProcessRuntime(job)
            runtime.close = lambda: closed.append(heard.ends)
            return runtime

    class Breaks(Heard):
        pass

    def breaks(self, *args):
        if when == "ended":
            Heard.ended(self)
        raise KeyboardInterrupt

    setattr(Breaks, when, breaks)
    heard = Breaks()
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config("rounds=1"), data=data, listener=heard, engine=Engine())
    assert closed == [1]  # once, after the listener was told of the end


def test_the_manifest_keeps_when_a_run_began(data, tmp_path):
    folder = tmp_path / "run"
    run(tiny.config(), data=data, folder=folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": "2026-01-01T00:00:00+00:00"}))
    for times in (1, 2):
        resume(folder, data=data)
        manifest = json.loads(path.read_text())
        assert manifest["started"].startswith("2026-01-01") and len(manifest["resumed"]) == times
    path.write_text("{")  # a manifest that is damaged is written anew
    resume(folder, data=data)
    assert json.loads(path.read_text())["label"] == "fedavg"


def test_a_run_that_is_resumed_keeps_its_label(data, tmp_path):
    run(tiny.config("rounds=1"), data=data, folder=tmp_path / "run", label="as in the paper")
    resume(tmp_path / "run", data=data)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["label"] == "as in the paper"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit(tmp_path, monkeypatch):
    """Of the repository that the package is part of: not of one around it, and none without git."""
    inside = subprocess.run(["git", "-C", Path(loop.__file__).parent, "ls-files", "loop.py"], capture_output=True)
    found = loop.commit.__wrapped__()
    assert bool(re.fullmatch("[0-9a-f]{40}", found or "")) == (inside.stdout == b"loop.py\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "loop.py").touch()
    monkeypatch.setattr(loop, "__file__", str(tmp_path / "loop.py"))
    assert loop.commit.__wrapped__() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert loop.commit.__wrapped__() is None


@pytest.mark.parametrize("method", ["fbl", "fgl", "fedavg"])
def test_the_generator_is_on_record(method, data, generator, tmp_path):
    """Whoever uses it: clients, the server, nobody."""
    options = {"fgl": ("algorithm.volume=2", "algorithm.epochs=1"), "fbl": ("partition.name=dirichlet",)}
    config = tiny.config(f"algorithm.name={method}", "rounds=1", *generator, *options.get(method, ()))
    run(config, data=data, folder=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "manifest.json").read_text())["generator"]
    assert found is None if method == "fedavg" else found["name"] == "gaussian" and len(found["fingerprint"]) == 64


@pytest.mark.parametrize(
    "overrides",
    [("algorithm.name=fbl", "partition.name=dirichlet"), ("algorithm.name=fgl",), ("runtime=none",), ("device=tpu",)],
)
def test_a_refused_run_leaves_nothing(overrides, data, tmp_path):
    """No generator, no such runtime, no such device: nothing has begun, so nothing is there."""
    with pytest.raises(UserError):
        run(tiny.config(*overrides), data=data, folder=tmp_path / "runs" / "one")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        run(tiny.config(*overrides), data=data, folder=tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["notes.txt"]


def test_a_damaged_pool_is_a_warning_of_the_run(data, generator, tmp_path):
    config = tiny.config(
        "algorithm.name=fbl", "partition.name=dirichlet", "rounds=1", *generator, f"pool.dir={tmp_path}/pool"
    )
    first, heard = run(config, data=data), Heard()
    for part in (tmp_path / "pool").rglob("part-*"):
        part.write_bytes(part.read_bytes()[:-7])
    assert same(first, run(config, data=data, listener=heard))
    assert heard.warnings and all("is damaged: its images are made again" in text for text in heard.warnings)


def test_resuming_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        resume(tmp_path)


def test_profiles_are_shares_of_the_clients():
    config = tiny.config("clients=10", "profiles.unconstrained=0.25", "profiles.none=0.3")
    drawn = [assign(config.profiles, 10, Streams(seed)) for seed in range(5)]
    for profiles in drawn:
        assert [profiles.count(name) for name in ("unconstrained", "none", "constrained")] == [3, 3, 4]
    assert len({tuple(profiles) for profiles in drawn}) > 1
    assert assign(config.profiles, 10, Streams(1)) == drawn[1]
    listed = tiny.config("profiles.unconstrained_ids=[2]", "profiles.none_ids=[0,3]")
    assert assign(listed.profiles, 4, Streams(1)) == ["none", "constrained", "unconstrained", "none"]
    # a larger share adds clients to the group and moves none
    few, more = (
        assign(tiny.config(f"profiles.unconstrained={share}").profiles, 20, Streams(3)) for share in (0.25, 0.5)
    )
    assert (few.count("unconstrained"), more.count("unconstrained")) == (5, 10)
    assert all(after == "unconstrained" for before, after in zip(few, more, strict=True) if before == "unconstrained")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_network_learns_the_same(data):
    """To the last bits, in which fused operations round differently, and so it does in a second run of the process."""
    options = ("algorithm.name=scaffold", "model.name=cnn", "rounds=2")
    plain = run(tiny.config(*options), data=data)
    for _ in range(2):
        compiled = run(tiny.config(*options, "local.compile=true"), data=data)
        for name, tensor in plain.weights.items():
            assert torch.allclose(compiled.weights[name].float(), tensor.float(), atol=1e-5), name


@pytest.mark.parametrize("method", ["fbl", "moon", "feddbe", "pfedgate", "fedalign"])
def test_what_cannot_be_compiled_is_refused(method, data, generator):
    """A loss that looks at features, or a network that the method has changed, would not see what the method does."""
    config = tiny.config(f"algorithm.name={method}", "local.compile=true", "model.name=cnn", *generator)
    with pytest.raises(ConfigError, match=r"local.compile = True: not with \w+: its loss looks into"):
        Job(config, data)
