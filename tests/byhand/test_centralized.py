"""Centralized: pooled training."""

import pytest
import tiny
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.centralized import Centralized
from fedkeel.job import Job
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.mlp import MLP
from fedkeel.records import Samples
from fedkeel.rng import Streams, isolated

HALF = ("clients=4", "participation=0.5", "local.momentum=0.9", "local.epochs=4")


def steps(data, *overrides):
    """Optimiser steps of each round; the 96 images are 12 batches of 8."""
    result = run(tiny.config("algorithm.name=centralized", "clients=4", *overrides), data=data)
    return [record["train/steps"] for record in result.rounds]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("participation=0.5", "local.epochs=4"), [24, 24, 24, 24]),  # half of four epochs
        (("participation=0.5", "local.epochs=4", "algorithm.budget=given"), [48, 48, 48, 48]),
        (("participation=1.0", "local.epochs=1"), [12, 12, 12, 12]),
        (("participation=0.25", "local.epochs=1"), [0, 0, 0, 12]),  # a quarter of a pass a round
        (("participation=0.25", "local.epochs=6"), [12, 24, 12, 24]),  # one and a half
        (("participation=0.5", "local.steps=3"), [6, 6, 6, 6]),  # two clients, three steps each
        (("participation=0.5", "local.steps=3", "algorithm.budget=given"), [3, 3, 3, 3]),
        (("participation=0.5", "local.epochs=4", "local.max_steps=5"), [10, 10, 10, 10]),
        (("local.epochs=9", "algorithm.epochs=6"), [12, 24, 12, 24]),  # six passes in four rounds
        (("local.steps=3", "algorithm.epochs=4", "algorithm.budget=given"), [12, 12, 12, 12]),
    ],
)
def test_budget(data, options, expected):
    assert steps(data, *options) == expected


def test_as_much_work_as_the_federated_run(data):
    federated = run(tiny.config(*HALF, "algorithm.name=fedavg"), data=data)
    assert [r["train/steps"] for r in federated.rounds] == steps(data, *HALF[1:])


def test_all_samples_are_seen_and_no_byte_crosses(data):
    job = Job(tiny.config("algorithm.name=centralized", "clients=4", "participation=1"), data)
    assert len(job.samples(0)) == 96
    assert job.cohort(3) == [0]
    result = run(job.config, data=data)
    assert all(record["bytes/up"] == record["bytes/down"] == 0 for record in result.rounds)


def test_one_client_of_fedavg_that_keeps_its_optimiser(data):
    """Bit for bit: the same batches, the same averages of one model."""
    common = ("clients=1", "participation=1.0", "local.momentum=0.9", *tiny.BATCHNORM)
    one = run(tiny.config(*common, "algorithm.name=centralized"), data=data)
    other = run(tiny.config(*common, "algorithm.name=fedavg", "local.optimiser=keep"), data=data)
    reset = run(tiny.config(*common, "algorithm.name=fedavg"), data=data)
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())
    assert any(not torch.equal(tensor, reset.weights[name]) for name, tensor in one.weights.items())


def test_one_full_step_a_round_is_fedavg_over_any_partition():
    """Gradient descent on the pooled data, up to rounding, weighted by samples."""
    parts = [tiny.samples(n, seed=n) for n in (3, 9, 5)]
    pooled = Samples.real_ones(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
    ends = []
    for method, data in ((Algorithm(), parts), (Centralized(), [pooled])):
        with isolated(Streams(5)("init")):
            model = MLP(hidden=(4,)).build((1, 16, 16), tiny.CLASSES)
        bed = Bed(method, model=model, data=data, classes=4, training=Training(steps=1, batch=32, lr=1e-3))
        for _ in range(4):
            bed.round()
        ends.append(bed.server.params)
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6)


def test_cosine_by_hand():
    """Q, client 0: ten rounds of one step at 0.05 (1 + cos(pi t / 10)); each takes the scalar times 1 - eta."""
    method = on_quadratic(Centralized)(schedule="cosine")
    bed, expected = Bed(method, sizes=(4,), training=Training(epochs=1, batch=8, lr=0.1)), 1.0
    for eta in (0.1, 0.0975528, 0.0904508, 0.0793893):
        bed.round()
        expected *= 1 - eta
        assert bed.x == pytest.approx(expected, rel=1e-5)


def test_constant_is_what_local_says():
    bed = Bed(on_quadratic(Centralized)(), sizes=(4,), training=Training(epochs=2, batch=8, lr=0.1))
    for _ in range(3):
        bed.round()
    assert bed.x == pytest.approx(0.9**6, rel=1e-6)
