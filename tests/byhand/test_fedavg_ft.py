"""FedAvg with fine-tuning: FedAvg's rounds, and personal models tuned from its last model (R-20)."""

import tiny
import torch

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedavg_ft import FedAvgFT
from fedkeel.job import Job
from fedkeel.loop import run
from fedkeel.personal import curve_of
from fedkeel.record import numbers

TUNED = ("personal.epochs=3", "personal.batch=8", "rounds=2")


def test_the_rounds_are_fedavgs_bit_for_bit(data):
    tuned = run(tiny.config("algorithm.name=fedavg_ft", *tiny.BATCHNORM, *TUNED, "personal.every=1"), data=data)
    plain = run(tiny.config("algorithm.name=fedavg", *tiny.BATCHNORM, *TUNED), data=data)
    assert all(torch.equal(tensor, tuned.weights[name]) for name, tensor in plain.weights.items())
    for one, other in zip(tuned.rounds, plain.rounds, strict=True):
        assert {key: value for key, value in numbers(one).items() if "personal" not in key} == numbers(other)
    assert "personal/accuracy_last" in tuned.rounds[0] and "personal/accuracy_last" not in plain.rounds[-1]


def test_tuning_starts_at_the_global_model_and_is_sgd(data):
    """Three epochs of one batch each, by torch's own optimiser."""
    job = Job(tiny.config("algorithm.name=fedavg_ft", *TUNED, "personal.batch=24", "personal.lr=0.1"), data)
    server = job.first_server()
    before = job.measure(job.worker.model)
    curve, images = curve_of(job, server, 1, None, {})
    after = job.worker.weights.params.clone()
    assert len(curve) == 4 and images == len(job.personal_tests[1])

    job.worker.load(server)
    assert job.measure(job.worker.model) == before  # the global model is as it was
    model, own = job.worker.model, job.samples(1)
    x = job.transform(own.x, rng=None, augment=None, device=job.device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        job.worker.weights.grad.zero_()
        torch.nn.functional.cross_entropy(model(x), own.y).backward()
        optimiser.step()
    assert torch.allclose(after, job.worker.weights.params, atol=1e-6)


def test_without_tuning_it_is_fedavg_and_says_so(data):
    def said(*overrides):
        return list(Job(tiny.config(*overrides), data).idle())

    assert said("algorithm.name=fedavg_ft", "personal.epochs=0") == [
        "personal.epochs = 0: this switches the method off"
    ]
    assert not said("algorithm.name=fedavg_ft")
    assert not said("algorithm.name=regl", "personal.epochs=0")  # which is more than tuning


def test_what_it_is():
    assert (FedAvgFT.kind, FedAvgFT.tunes, FedAvgFT.has_global) == ("personal", True, True)
    assert (Algorithm.kind, Algorithm.tunes) == ("global", False)
