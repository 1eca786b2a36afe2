"""The policy for BatchNorm statistics: averaged with the round's weights, never touched by anything else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.bench import with_statistics
from fedkeel.local import Training, full_gradient, losses, shuffled
from fedkeel.loop import Incoming, run
from fedkeel.models.split import Split
from fedkeel.records import Reply, Samples, Server, Update
from fedkeel.rng import Streams, isolated
from fedkeel.weights import Weights


class Normed(Split):
    """BatchNorm over the pixels themselves, then a linear layer: its statistics are those of the images."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), nn.Linear(4, 2), 4)


def shifted(n: int, level: int) -> Samples:
    """2x2 images of which half the pixels are level - 1 and half level + 1: mean `level`, variance 1."""
    x = torch.full((n, 1, 2, 2), level, dtype=torch.uint8)
    x[:, :, 0] -= 1
    x[:, :, 1] += 1
    return Samples.real_ones(x, torch.arange(n) % 2)


def raw(x, *, rng, augment, device):
    return x.float()


def bed(sizes: tuple[int, ...], levels: tuple[int, ...], method: Algorithm | None = None, **training: object):
    with isolated(Streams(2)("init")):
        model = Normed()
    parts = [shifted(n, level) for n, level in zip(sizes, levels, strict=True)]
    worker, server = tiny.worker(model, parts, Training(**{"batch": 64, "lr": 1e-3, **training}), method, transform=raw)
    return worker, replace(server, layout=worker.weights.layout)


def averaged(worker, server, clients: list[int], bn_var: str = "mean", states=None) -> Server:
    """One round of these clients, in this order."""
    replies = [worker.fit(server, client, (states or {}).get(client)) for client in clients]
    assert not any(reply.failure for reply in replies)
    incoming = Incoming(iter(replies), bn_var, server)
    after = worker.algorithm.aggregate(server, incoming)
    return replace(after, buffers=incoming.buffers(), counters=incoming.counters, round=server.round + 1)


def statistics(server: Server) -> tuple[float, float]:
    mean, variance = server.buffers.tolist()
    return mean, variance


def test_running_mean_is_the_weighted_mean():
    """Momentum 0.1 from 0: client means 2 and 6 become 0.2 and 0.6; sizes 2 and 6 weigh them 1/4 and 3/4: 0.5.

    Variances: 0.9 * 1 + 0.1 * n / (n - 1), with n = 8 and 24 pixels (PyTorch keeps the unbiased one).
    """
    worker, server = bed((2, 6), (2, 6))
    after = averaged(worker, server, [0, 1])
    v = [0.9 + 0.1 * n / (n - 1) for n in (8, 24)]
    assert statistics(after) == pytest.approx((0.25 * 0.2 + 0.75 * 0.6, 0.25 * v[0] + 0.75 * v[1]), rel=1e-5)


def test_order_and_company_of_clients_are_irrelevant():
    """Nothing leaks from a client to the next: each reply is what it would be alone."""
    worker, server = bed((2, 6, 3), (2, 6, 9), momentum=0.9)
    alone = {client: worker.fit(server, client, None) for client in (2, 0, 1)}
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        for client in order:
            reply = worker.fit(server, client, None)
            assert torch.equal(reply.buffers, alone[client].buffers)
            assert torch.equal(reply.update.delta, alone[client].update.delta)
        assert statistics(averaged(worker, server, order)) == pytest.approx(
            statistics(averaged(worker, server, [0, 1, 2])), rel=1e-6
        )


@pytest.mark.parametrize(("bn_var", "variance"), [("mean", 1.0), ("pooled", 2.0)])
def test_pooled_variance(bn_var, variance):
    """Two equal clients with means 0 and 2 and variances 1 and 1: mean 1; the pooled samples have variance 2."""
    weights = Weights(Normed())
    n = weights.layout.shared
    server = Server(torch.zeros(n), weights.buffers.clone(), 2, 2, weights.counters, layout=weights.layout)
    replies = [
        Reply(k, Update(1.0, torch.zeros(n)), buffers=torch.tensor([mean, 1.0]), counters=weights.counters)
        for k, mean in enumerate((0.0, 2.0))
    ]
    incoming = Incoming(iter(replies), bn_var, server)
    Algorithm().aggregate(server, incoming)
    assert incoming.buffers().tolist() == pytest.approx([1.0, variance])


def test_pooled_variance_is_that_of_all_samples():
    """With weights 1 and 3: 1/4 (1 + 0) + 3/4 (4 + 4) - 1.5^2 = 4."""
    weights = Weights(Normed())
    n = weights.layout.shared
    server = Server(torch.zeros(n), weights.buffers.clone(), 2, 2, weights.counters, layout=weights.layout)
    replies = [
        Reply(k, Update(w, torch.zeros(n)), buffers=torch.tensor(stats), counters=weights.counters)
        for k, (w, stats) in enumerate([(1.0, (0.0, 1.0)), (3.0, (2.0, 4.0))])
    ]
    incoming = Incoming(iter(replies), "pooled", server)
    incoming.drain()
    assert incoming.buffers().tolist() == pytest.approx([1.5, 4.0])


@pytest.mark.parametrize(("bn_var", "variance"), [("mean", 3.25), ("pooled", 4.0)])
def test_a_method_that_goes_on_from_the_average_has_the_same(bn_var, variance):
    """Bit for bit that of the round loop, of numbers as above; without statistics the server's stay."""
    worker, server = bed((1, 3), (2, 6))
    lab = SimpleNamespace(weights=worker.weights, bn_var=bn_var)
    updates = [
        Update(w, torch.zeros_like(server.params), buffers=torch.tensor(stats))
        for w, stats in [(1.0, (0.0, 1.0)), (3.0, (2.0, 4.0))]
    ]
    incoming = Incoming(iter(Reply(0, each, buffers=each.buffers) for each in updates), bn_var, server)
    incoming.drain()
    after = with_statistics(Algorithm().aggregate, replace(server, lab=lab), iter(updates))
    assert after.buffers.tolist() == pytest.approx([1.5, variance])
    assert torch.equal(after.buffers, incoming.buffers())
    bare = [replace(each, buffers=each.buffers[:0]) for each in updates]
    after = with_statistics(Algorithm().aggregate, replace(server, lab=lab), iter(bare))
    assert after.buffers is server.buffers


def test_pooling_reaches_methods_that_train_at_the_server(data, generator):
    fgl = ("algorithm.name=fgl", "algorithm.volume=4", "algorithm.epochs=1", "algorithm.server_epochs=1")
    config = (*fgl, *generator, *tiny.BATCHNORM, "partition.name=shards", "rounds=2")
    mean, pooled = (run(tiny.config(*config, f"local.bn_var={how}"), data=data).weights for how in ("mean", "pooled"))
    name = next(name for name in mean if name.endswith("running_var"))
    assert (pooled[name] > mean[name]).all()


def test_number_of_batches_is_the_maximum():
    worker, server = bed((4, 12), (2, 6), batch=4, epochs=2)
    after = averaged(worker, server, [0, 1])
    (count,) = after.counters.values()
    assert (int(count), count.dtype) == (6, torch.int64)
    assert int(*averaged(worker, after, [0]).counters.values()) == 8


def test_local_statistics_never_leave():
    """They are the client's own, last from round to round, and the global model has none to send."""
    worker, server = bed((4, 4), (2, 6), buffers="local")
    assert server.buffers.numel() == 0
    first = worker.fit(server, 0, None)
    assert first.buffers.numel() == 0
    assert first.state["own"].tolist() == pytest.approx([0.2, 0.9 + 0.1 * 16 / 15], rel=1e-5)
    second = worker.fit(server, 0, first.state)
    assert second.state["own"][0].item() == pytest.approx(0.9 * 0.2 + 0.2, rel=1e-5)
    other = worker.fit(server, 1, None)  # starts as every client does, not where client 0 stopped
    assert other.state["own"][0].item() == pytest.approx(0.6, rel=1e-5)


def test_reset_statistics_start_as_at_first():
    """In the second round too, so the average has no memory of the first."""
    worker, server = bed((4, 4), (2, 6), buffers="reset")
    once = averaged(worker, server, [0, 1])
    twice = averaged(worker, once, [0, 1])
    assert statistics(once) == pytest.approx((0.4, 0.9 + 0.1 * 16 / 15), rel=1e-5)
    assert statistics(twice) == pytest.approx(statistics(once), rel=1e-5)
    plain_worker, plain_server = bed((4, 4), (2, 6))
    plain = averaged(plain_worker, averaged(plain_worker, plain_server, [0, 1]), [0, 1])
    assert statistics(plain)[0] == pytest.approx(0.9 * 0.4 + 0.4, rel=1e-5)


def test_reset_statistics_start_to_count_again():
    """With momentum = None they are means over the batches counted: of this round's alone."""
    worker, server = bed((4,), (2,), buffers="reset")
    worker.model.features[0].momentum = None
    once = averaged(worker, server, [0])
    assert statistics(averaged(worker, once, [0])) == pytest.approx(statistics(once), rel=1e-5)


class Filled(Algorithm):
    """Real samples at one level, then as many synthetic ones at 10."""

    def prepare(self, local):
        fake = shifted(len(local.data), 10)
        return local.data + Samples.fake_ones(fake.x, fake.y)


@pytest.mark.parametrize(
    ("policy", "level", "variance"),
    [("recalibrate", (4 * 2 + 4 * 10) / 8, 17 * 32 / 31), ("recalibrate_real", 2.0, 16 / 15)],
)
def test_recalibrated_statistics_are_those_of_the_samples(policy, level, variance):
    """Measured anew after training, of all samples or of the real ones: 1 within a level, 16 between 2 and 10."""
    worker, server = bed((4,), (2,), Filled(), buffers=policy, batch=8)
    after = averaged(worker, server, [0])
    assert statistics(after) == pytest.approx((level, variance), rel=1e-5)
    assert [module.momentum for module in worker._normal] == [0.1]


def test_recalibration_does_not_look_at_one_kind_of_samples_at_a_time():
    """64 samples at 2, then 64 at 10, in batches of 8: in their order no batch would have the variance between them."""
    worker, server = bed((64,), (2,), Filled(), buffers="recalibrate", batch=8)
    level, variance = statistics(averaged(worker, server, [0]))
    assert level == pytest.approx(6.0) and 12 < variance < 18


def test_what_is_prepared_sees_the_model_as_received():
    """Statistics that start anew do so after a method has ranked its samples."""
    seen = []

    class Ranks(Algorithm):
        def prepare(self, local):
            seen.append(worker.weights.buffers.clone())
            return local.data

    worker, server = bed((4,), (2,), Ranks(), buffers="reset")
    server = replace(server, buffers=server.buffers + 0.5)
    averaged(worker, server, [0])
    assert torch.equal(seen[0], server.buffers) and not torch.equal(server.buffers, worker.initial_buffers)


def test_measuring_passes_go_over_mixed_batches():
    """Each sample once, none left alone at the end; losses stay in place and the gradient is of all."""
    model, part = Split(nn.Flatten(), nn.Linear(4, 2), 4), shifted(17, 2)
    worker, server = tiny.worker(model, [part], Training(batch=8, lr=0.1), Filled(), transform=raw)
    local = worker.open(replace(server, layout=worker.weights.layout), 0, None, {})
    local.samples = Filled().prepare(local)
    parts = shuffled(local, 33, 8)
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(33)) and [len(each) for each in parts] == [8, 8, 8, 9]
    assert all(0 < int(local.samples.fake[each].sum()) < len(each) for each in shuffled(local, 34, 8)[:4])
    measured = losses(local, local.samples, "eval")
    assert (
        torch.allclose(losses(local, local.samples, "train"), measured) and measured[17:].min() != measured[:17].min()
    )
    x = worker.transform(local.samples.x, rng=None, augment=None, device=torch.device("cpu"))
    loss = nn.functional.cross_entropy(model(x), local.samples.y)
    (weight, bias) = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
    expected = torch.cat([weight.flatten(), bias])
    assert torch.allclose(full_gradient(local, Algorithm()), expected, atol=1e-5)


def test_statistics_are_averaged_even_when_the_server_step_is_not_an_average():
    """Control variates and server steps see parameters only: buffers are the plain average."""
    fast, plain = Scaffold(server_lr=1.5), Algorithm(weights="uniform")
    results = []
    for method in (fast, plain):
        worker, server = bed((2, 6), (2, 6), method)
        results.append(averaged(worker, server, [0, 1]))
    assert torch.equal(results[0].buffers, results[1].buffers)
    assert not torch.equal(results[0].params, results[1].params)
    assert results[0].shared["c"].shape == results[0].params.shape  # no variates for statistics


@pytest.mark.parametrize("algorithm", ["scaffold", "fedprox", "fedavg"])
def test_variances_stay_positive(data, algorithm):
    """Twenty rounds at half participation: corrections never reach the running variances."""
    result = run(
        tiny.config(
            *tiny.BATCHNORM,
            f"algorithm.name={algorithm}",
            "rounds=20",
            "participation=2",
            "local.lr=0.1",
            "evaluate.every=20",
        ),
        data=data,
    )
    variances = {name: value for name, value in result.weights.items() if name.endswith("running_var")}
    assert len(variances) == 2
    assert all(bool((value > 0).all()) for value in variances.values())
    assert all(bool((value != 1).all()) for value in variances.values())


def test_a_method_that_stops_reading_early_still_gets_all_statistics():
    """Incoming.drain: the updates that aggregate did not look at count for buffers, bytes and who took part."""

    class First(Algorithm):
        def aggregate(self, server, updates):
            return replace(server, params=server.params + next(iter(updates)).delta)

    worker, server = bed((2, 6), (2, 6), First())
    replies = [worker.fit(server, client, None) for client in (0, 1)]
    incoming = Incoming(iter(replies), "mean", server)
    assert incoming.wait()
    worker.algorithm.aggregate(server, incoming)
    incoming.drain()
    assert incoming.done == [0, 1]
    assert incoming.buffers()[0].item() == pytest.approx(0.25 * 0.2 + 0.75 * 0.6, rel=1e-5)
    assert incoming.up == sum(reply.bytes_up for reply in replies)
