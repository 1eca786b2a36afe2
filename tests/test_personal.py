"""Personal models: their test sets (R-10), and the numbers measured on them (R-11)."""

from __future__ import annotations

import pytest
import tiny
import torch

from fedkeel import personal
from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedavg_ft import FedAvgFT
from fedkeel.job import Job
from fedkeel.loop import resume, run
from fedkeel.personal import Personal, curve_of, measure, tuning_samples
from fedkeel.personal import test_sets as sets_of
from fedkeel.record import Silent, numbers
from fedkeel.records import Samples
from fedkeel.report.finished import open_run


def sets(counts, tests, seed=0, **options):
    """Test sets of clients with these train counts, and how many images of each class they hold."""
    y = torch.arange(len(tests)).repeat_interleave(torch.tensor(tests))
    held = torch.tensor(counts)
    found = sets_of(held, held.sum(0), y, Personal(**options), torch.Generator().manual_seed(seed))
    return found, [torch.bincount(y[rows], minlength=len(tests)).tolist() for rows in found]


# test sets ------------------------------------------------------------------------------------------------------------


def test_the_ratio_of_train_and_test_images_is_kept():
    """Check 8 of ReGL's reading: k_train : k_test = 1300 : 50 and 130 train images are 5 test images."""
    _, counts = sets([[130], [1170]], [50])
    assert counts == [[5], [45]]


def test_classes_a_client_does_not_own_are_not_tested():
    _, counts = sets([[30, 0, 10], [10, 20, 30]], [8, 4, 8])
    assert counts == [[6, 0, 2], [2, 4, 6]]


def test_without_replacement_across_clients_while_there_are_any():
    found, _ = sets([[30, 0, 10], [10, 20, 30]], [8, 4, 8])
    together = torch.cat(found)
    assert len(together.unique()) == len(together) == 20
    assert all(torch.equal(rows, rows.sort().values) for rows in found)


def test_then_with_overlap_but_never_twice_for_one_client():
    """Ten clients with one tenth of a class of 4 test images each: at least one image each, 4 of them different."""
    found, counts = sets([[1]] * 10, [4])
    assert counts == [[1]] * 10 and len(torch.cat(found).unique()) == 4
    found, counts = sets([[3], [3], [3]], [4], min_per_class=3)
    assert counts == [[3]] * 3 and all(len(rows.unique()) == 3 for rows in found)


def test_without_overlap_those_who_come_late_get_none():
    found, counts = sets([[1]] * 10, [4], overlap=False)
    assert counts == [[1]] * 4 + [[0]] * 6 and len(found[9]) == 0


def test_images_held_in_common_count_once(data):
    """ReGL, Table 1: all clients hold the same half of each class (12 of 24 train images) beside their own, and there
    are 10 test images of it: a client with n images is tested on round(10 n / 24), whatever the others hold."""
    job = Job(tiny.config("partition.name=global_share", "partition.share=0.5", "partition.alpha=0.3"), data)
    assert int(job.partition.counts.sum()) > len(data.train_y) == 96
    for counts, rows in zip(job.partition.counts, job.personal_tests, strict=True):
        found = torch.bincount(data.test_y[rows], minlength=4)
        assert found.tolist() == [int(10 * n / 24 + 0.5) for n in counts.tolist()]


def test_least_number_of_images():
    _, counts = sets([[1, 99], [99, 1]], [10, 10], min_per_class=2)
    assert counts == [[2, 10], [10, 2]]
    _, counts = sets([[1, 99], [99, 1]], [10, 10], min_per_class=0)
    assert counts == [[0, 10], [10, 0]]
    _, counts = sets([[5]], [2], min_per_class=7)
    assert counts == [[2]]  # there are no more


def test_a_class_without_test_images_or_owners():
    found, counts = sets([[5, 0, 5]], [0, 3, 2])
    assert counts == [[0, 0, 2]] and found[0].tolist() == [3, 4]


def test_the_same_seed_draws_the_same_sets():
    counts = [[30, 10], [10, 30]]
    one, other, third = (sets(counts, [20, 20], seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, third, strict=True))


# measures -------------------------------------------------------------------------------------------------------------


def measured(data, curves, sizes, before=(), method="fedavg_ft"):
    """`measure`, with these curves for the clients' models and test sets of these sizes."""
    job = Job(tiny.config(f"algorithm.name={method}"), data)
    return measure(job, [(curves.get(client, []), size) for client, size in enumerate(sizes)], list(before))


def test_means_by_hand(data):
    """Client 2 has no test images: it counts nowhere. Last: (0.5 + 0.2 + 0.6) / 3, by images (5 + 6 + 12) / 60."""
    curves = {0: [0.1, 0.9, 0.5], 1: [0.4, 0.3, 0.2], 3: [0.0, 0.0, 0.6]}
    found = measured(data, curves, (10, 30, 0, 20))
    assert found["personal/clients"] == [0.5, 0.2, None, 0.6]
    assert found["personal/accuracy_last"] == pytest.approx(1.3 / 3)
    assert found["personal/accuracy_best"] == pytest.approx((0.9 + 0.4 + 0.6) / 3)
    assert found["personal/accuracy_last_weighted"] == pytest.approx((5 + 6 + 12) / 60)
    assert found["personal/accuracy_best_weighted"] == pytest.approx((9 + 12 + 12) / 60)


def test_nobody_has_test_images(data):
    found = measured(data, {}, (0, 0, 0, 0))
    assert found["personal/clients"] == [None] * 4 and found["personal/accuracy_last"] is None


def test_the_best_of_a_method_that_does_not_tune_is_over_rounds(data):
    """Each client's own best round, not the best round of their mean."""
    before = [
        {"personal/clients": [0.9, 0.1, 0.0, 0.0]},
        {"train/loss": 1.0},
        {"personal/clients": [0.0, 0.7, 0.0, 0.0]},
    ]
    curves = {k: [0.2] for k in range(4)}
    found = measured(data, curves, (1, 1, 1, 1), before, "fedrep")
    assert found["personal/accuracy_best"] == pytest.approx((0.9 + 0.7 + 0.2 + 0.2) / 4)
    assert found["personal/accuracy_last"] == pytest.approx(0.2)
    assert found["personal/evaluations"] == 3
    found = measured(data, curves, (1, 1, 1, 1), before, "fedavg_ft")
    assert found["personal/accuracy_best"] == pytest.approx(0.2)  # there over the epochs of this tuning


@pytest.mark.parametrize("method", ["fedavg_ft", "fedrep", "fedamp"])
def test_best_is_at_least_last(data, method):
    small = ("personal.every=1", "personal.epochs=2", "personal.batch=8", "partition.name=dirichlet")
    result = run(tiny.config(f"algorithm.name={method}", *small), data=data)
    for record in result.rounds:
        for kind in ("", "_weighted"):
            assert 0 <= record[f"personal/accuracy_last{kind}"] <= record[f"personal/accuracy_best{kind}"] <= 1
    bests = [record["personal/accuracy_best"] for record in result.rounds]
    assert method == "fedavg_ft" or bests == sorted(bests)
    of = [record["personal/evaluations"] for record in result.rounds]
    assert of == ([3] * 4 if method == "fedavg_ft" else [1, 2, 3, 4])  # two epochs of tuning, and before them


class Stop(Silent):
    """Ends a run after its second round."""

    def finished_round(self, record) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_keeps_the_best(data, tmp_path):
    config = tiny.config("algorithm.name=fedrep", "personal.every=1", "partition.name=dirichlet", "participation=0.5")
    whole = run(config, data=data)
    with pytest.raises(KeyboardInterrupt):
        run(config, data=data, folder=tmp_path / "run", listener=Stop())
    again = resume(tmp_path / "run", data=data)
    assert [numbers(record) for record in again.rounds] == [numbers(record) for record in whole.rounds]
    assert "personal/accuracy_best" in again.rounds[-1]


def test_when_they_are_measured(data):
    """Every so many rounds and after the last; "auto" is for personal methods, under balancing too."""

    def rounds(*overrides):
        job = Job(tiny.config(*overrides), data)
        return [number for number in range(1, 5) if job.personal_round(number)]

    assert rounds("algorithm.name=fedrep") == [4]
    assert rounds("algorithm.name=fedrep", "personal.every=2") == [2, 4]
    assert rounds("algorithm.name=fedrep", "personal.every=3") == [3, 4]
    assert rounds("algorithm.name=fedrep", "personal.measure=never") == []
    assert rounds("algorithm.name=fedavg") == []
    assert rounds("algorithm.name=fedavg", "personal.measure=always") == [4]
    assert rounds("algorithm.name=fedrep", "balance.name=regl", "balance.volume=0") == [4]
    assert Job(tiny.config("algorithm.name=fedavg_ft", "balance.name=fbl"), data).tunes
    assert not Job(tiny.config("algorithm.name=fedrep", "balance.name=regl", "balance.volume=0"), data).tunes
    assert Job(tiny.config("balance.name=regl", "balance.volume=0"), data).tunes


def test_global_metrics_are_those_of_a_global_model(data):
    """A method without one has none, whatever balances it."""
    personal_only = run(tiny.config("algorithm.name=fedrep", "rounds=1"), data=data)
    assert not any(key.startswith("global/") for key in personal_only.rounds[-1])
    balanced = run(tiny.config("algorithm.name=fedrep", "balance.name=regl", "balance.volume=0", "rounds=1"), data=data)
    assert not any(key.startswith("global/") for key in balanced.rounds[-1])
    tuned = run(tiny.config("algorithm.name=fedavg_ft", "rounds=1", "personal.epochs=0"), data=data)
    assert "global/accuracy" in tuned.rounds[-1]
    assert tuned.rounds[-1]["personal/accuracy_last"] == tuned.rounds[-1]["personal/accuracy_best"]


@pytest.mark.parametrize(("method", "rest"), [("fedavg", ()), ("fedavg_ft", ("personal.epochs=1",))])
def test_statistics_that_stay_leave_no_global_model(data, method, rest, tmp_path):
    """As under FedBN: no global metrics, and each client's model is measured with the statistics that it kept."""
    normed = (f"algorithm.name={method}", *rest, *tiny.BATCHNORM, "rounds=2")
    config = tiny.config(*normed, "local.buffers=local")
    job, result = Job(config, data), run(config, data=data, folder=tmp_path / "run")
    assert not job.has_global and not any(key.startswith("global/") for record in result.rounds for key in record)
    assert result.rounds[-1]["personal/accuracy_last"] > 0 and "personal/clients" not in result.rounds[0]
    assert not any("running" in name for name in result.weights)

    finished = open_run(tmp_path / "run", data=data)
    model, kept = finished.model(0), finished.job.store.open(0, 1)["own"]
    own = torch.cat([buffer for name, buffer in model.named_buffers() if "running" in name])
    assert torch.equal(own.sort().values, kept.sort().values) and bool((own != 1).all())
    if method == "fedavg":  # without tuning, the number on record is this model's
        rows = finished.job.personal_tests[0]
        with torch.no_grad():
            logits = model.eval()(finished.job.transform(data.test_x[rows], rng=None, augment=None, device=own.device))
        right = (logits.argmax(1) == data.test_y[rows]).float().mean().item()
        assert result.rounds[-1]["personal/clients"][0] == pytest.approx(right)

    silent = run(tiny.config(*normed, "local.buffers=local", "personal.measure=never"), data=data)
    assert not any(key.startswith(("global/", "personal/")) for key in silent.rounds[-1])
    for other in (("local.buffers=average",), ("local.buffers=local", "model.norm=group", "model.groups=2")):
        assert Job(tiny.config(*normed, *other), data).has_global


def test_tuning_begins_without_the_momentum_of_training(data):
    """Bit for bit as from a state that has none, and not as from one that goes on."""
    kept = ("local.optimiser=keep", "local.momentum=0.9", "personal.epochs=2")
    job = Job(tiny.config("algorithm.name=fedavg_ft", *kept), data)
    server = job.first_server()
    state = job.worker.fit(server, 0, None).state
    assert state["velocity"].any()
    tuned = []
    for each in (state, {**state, "velocity": 100 * state["velocity"]}, {**state, "velocity": torch.empty(0)}):
        curve_of(job, server, 0, each, {})
        tuned.append(job.worker.weights.params.clone())
    assert torch.equal(tuned[0], tuned[1]) and torch.equal(tuned[0], tuned[2])
    assert not torch.equal(tuned[0], server.params)


@pytest.mark.parametrize("runtime", ["inprocess", "pool"])
def test_a_client_whose_model_cannot_be_measured(data, runtime, monkeypatch, tmp_path):
    """Is left out with a warning, and the run ends; the others are as without it."""
    options = ("algorithm.name=fedavg_ft", "personal.epochs=1", "rounds=1", f"runtime={runtime}", "workers=2")
    whole = run(tiny.config(*options), data=data)

    def fails(self, local):
        if local.client == 1:
            raise ValueError("one value per channel")

    monkeypatch.setattr(Algorithm, "personalise", fails)
    told = tiny.Told()
    result = run(tiny.config(*options), data=data, folder=tmp_path / "run", listener=told)
    found, before = (each.rounds[-1]["personal/clients"] for each in (result, whole))
    assert found == [before[0], None, *before[2:]]
    assert (tmp_path / "run/model.safetensors").is_file()
    assert [text for text in told.said if "own model" in text] == [
        "client 1: its own model could not be measured: ValueError: one value per channel"
    ]


def test_an_epoch_of_tuning_is_a_pass_over_all(data, generator, monkeypatch):
    """Whatever share of real samples the batches of training have."""
    shares = []
    monkeypatch.setattr(personal, "descend", lambda local, *rest: shares.append(local.real_ratio))
    named = ("algorithm.name=regl", "algorithm.volume=2", "algorithm.real_ratio=0.25", "personal.measure=always")
    run(tiny.config(*named, *generator, "rounds=1", "personal.epochs=1"), data=data)
    assert shares == [None] * 4


@pytest.mark.parametrize(("how", "count"), [("owned", 5), ("all", 8), ("none", 3)])
def test_what_models_are_tuned_on(data, how, count):
    """Real samples of classes 0 and 1; synthetic ones of classes 0, 1, 2, 2 and 3 (R-15)."""
    job = Job(tiny.config("algorithm.name=fedavg_ft", f"personal.synthetic={how}"), data)
    local = job.worker.open(job.first_server(), 0, None)
    real = Samples.real_ones(torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 1]))
    fake = Samples.fake_ones(torch.zeros(5, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 2, 2, 3]))
    local.data = real

    class Filled(FedAvgFT):
        def prepare(self, local):
            return local.data.take(torch.tensor([0])) + fake  # a method that cuts real samples: they come back

    job.method = Filled()
    samples = tuning_samples(job, local)
    assert len(samples) == count and int((~samples.fake).sum()) == 3
