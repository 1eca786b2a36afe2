"""Processes that know of some clients' data only: sites, the server of sites, workers that are sent samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from fedkeel import options
from fedkeel.data.described import Described
from fedkeel.errors import ConfigError, PartitionError
from fedkeel.job import Holdings, Job
from fedkeel.loop import run
from fedkeel.partition.manifest import Partition

SKEWED = ("partition.name=dirichlet", "partition.alpha=0.5")


def at_site(job: Job, client: int) -> Holdings:
    """What the machine of this client knows."""
    rows = job.partition.clients[client]
    own = replace(job.data, train_x=job.data.train_x[rows], train_y=job.data.train_y[rows])
    nothing = torch.empty(0, dtype=torch.int64)
    held = tuple(torch.arange(len(rows)) if k == client else nothing for k in range(job.clients))
    counts = torch.zeros_like(job.counts)
    counts[client] = job.counts[client]
    return Holdings(own, Partition("sites", {}, job.config.seed, own.fingerprint, held, counts))


def in_worker(job: Job) -> Holdings:
    """What a process knows that is sent samples when it trains."""
    none = replace(job.data, train_x=job.data.train_x[:0], train_y=job.data.train_y[:0])
    nothing = tuple(torch.empty(0, dtype=torch.int64) for _ in range(job.clients))
    return Holdings(none, Partition("elsewhere", {}, job.config.seed, "", nothing, job.counts), job.samples)


@pytest.mark.parametrize("method", ["scaffold", "fbl"])
@pytest.mark.parametrize("where", ["site", "worker"])
def test_a_client_trains_the_same_wherever_its_data_are(data, generator, where, method):
    config = tiny.config(f"algorithm.name={method}", *SKEWED, *generator)
    whole = Job(config, data)
    server = whole.first_server()
    for client in (0, 2):
        part = Job(config, holdings=at_site(whole, client) if where == "site" else in_worker(whole))
        assert part.counts[client].equal(whole.counts[client])
        one, other = (job.worker.fit(server, client, None) for job in (whole, part))
        assert one.update is not None and other.update is not None, one.failure or other.failure
        assert torch.equal(one.update.delta, other.update.delta) and one.update.weight == other.update.weight
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def test_a_site_makes_its_own_images_only(data, generator):
    config = tiny.config("algorithm.name=fbl", *SKEWED, *generator)
    whole = Job(config, data)
    part = Job(config, holdings=at_site(whole, 1))
    assert part.generate() == int(whole.plan.fake[1].sum()) == whole.generate(clients=[1]) > 0
    assert part.filled == [1] and len(whole.filled) > 1


def test_the_server_of_sites_knows_classes_and_shape_only():
    described = Described(classes=("cat", "dog"), size=8, channels=1, mean=(0.4,)).load()
    assert described.shape == (1, 8, 8) and described.mean == (0.4,) and described.std == (0.5,)
    config = tiny.config("partition.name=sites")
    nothing = tuple(torch.empty(0, dtype=torch.int64) for _ in range(config.clients))
    counts = torch.zeros(config.clients, 2, dtype=torch.int64)
    job = Job(config, holdings=Holdings(described, Partition("sites", {}, 1, "", nothing, counts)))
    assert job.first_server().samples == 0
    assert job.evaluate(job.first_server()) == {} and not job.generates


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"size": 8}, "classes"),
        ({"classes": ("a",), "size": 8}, "classes"),
        ({"classes": ("a", "b", "a"), "size": 8}, "classes"),
        ({"classes": ("a", "b")}, "size"),
        ({"classes": ("a", "b"), "size": 8, "mean": (0.5,)}, "mean"),
    ],
)
def test_data_that_are_not_here_must_be_described(wrong, key):
    with pytest.raises(ConfigError) as caught:
        options.build(Described, wrong, "data")
    assert caught.value.key == f"data.{key}"


def test_sites_run_in_a_federation_only(data):
    with pytest.raises(PartitionError, match="fedkeel deploy submit"):
        run(tiny.config("partition.name=sites"), data=data)


def test_sites_are_named_once_and_all():
    with pytest.raises(ConfigError, match=r"federation\.sites.*names 2 of 4"):
        tiny.config('federation.sites=["a", "b"]')
    with pytest.raises(ConfigError, match="twice"):
        tiny.config('federation.sites=["a", "b", "a", "c"]')
