"""FedDBE against its definitions (Zhang et al. 2023)."""

import pytest
import tiny
import torch
from bed import Bed
from torch.nn.functional import cross_entropy

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.feddbe import FedDBE, Shifted, apart
from fedkeel.local import Training, plain_batch
from fedkeel.loop import run
from fedkeel.models.cnn import CNN
from fedkeel.weights import Rule


def bed(method, norm="none", **training):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CNN(width=2, hidden=4, norm=norm).build((1, 16, 16), 4)
    data = [tiny.samples(8, seed=1), tiny.samples(16, seed=2)]
    return Bed(method, model=model, data=data, classes=4, training=Training(**{"epochs": 1, "batch": 4, **training}))


def whole(local):
    """All of a client's samples as one batch."""
    return plain_batch(local, local.data, torch.arange(len(local.data)))


def test_the_cards_number():
    assert apart(torch.full((2,), 0.5), torch.zeros(2)).item() == 0.125
    assert apart(torch.full((9,), 0.5), torch.zeros(9)).item() == 0.125  # the mean over dimensions


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_without_regulariser_and_vector_it_is_fedavg_bit_for_bit(norm):
    dbe, avg = bed(FedDBE(kappa=0.0, vector_lr=0.0), norm, momentum=0.9), bed(Algorithm(), norm, momentum=0.9)
    for clients in (None, [1], None):
        assert torch.equal(dbe.round(clients).params, avg.round(clients).params)


def test_the_start_round_is_fedavgs_and_finds_the_consensus():
    """All clients, no vector, no regulariser; mu = 1: the mean features of each one's last batch, 8 : 16."""
    dbe, avg = bed(FedDBE(), batch=16), bed(Algorithm(), batch=16)
    means = []
    for k in (0, 1):
        local = avg.worker.open(avg.server, k, None)
        means.append(local.model.embed(whole(local).x).mean(0).detach())
    dbe.round()
    avg.round()
    assert torch.equal(dbe.server.params, avg.server.params)
    goal = (8 * means[0] + 16 * means[1]) / 24
    assert torch.allclose(dbe.server.shared["consensus"], goal, atol=1e-6)
    assert all(not reply.state["own"].any() for reply in dbe.replies)
    assert FedDBE().cohort([3], 5, 0) == [0, 1, 2, 3, 4] and FedDBE().cohort([3], 5, 1) == [3]


def test_the_consensus_stays():
    one = bed(FedDBE())
    one.round()
    first = one.server.shared["consensus"].clone()
    one.round([1])
    one.round()
    assert torch.equal(one.server.shared["consensus"], first)
    assert all(not reply.update.extra for reply in one.replies)


def test_the_running_mean_and_its_gradient():
    """r = (1 - mu) r + mu m, from 0 in each round. Through the present batch alone, the regulariser's gradient for each
    feature is kappa mu (r - z) / (D B)."""
    one, off = bed(FedDBE(kappa=3.0, mu=0.25)), FedDBE(kappa=0.0, mu=0.25)
    one.round()
    local = one.worker.open(one.server, 0, one.states[0])
    batch, z, seen = whole(local), local.shared["consensus"], []
    local.model.features.register_forward_hook(lambda module, x, f: (f.retain_grad(), seen.append(f))[0])
    plain = off.loss(local, batch)
    plain.backward()
    m, without = seen[0].detach().mean(0), seen[0].grad
    assert without.any()
    local.scratch.clear()
    for r in (0.25 * m, (0.75 * 0.25 + 0.25) * m):
        value = one.method.loss(local, batch)
        assert torch.allclose(local.scratch["mean"], r) and not local.scratch["mean"].requires_grad
        assert value.item() == pytest.approx((plain + 3.0 * 0.5 * (r - z).square().mean()).item(), rel=1e-5)
        value.backward()
        each = 3.0 * 0.25 * (r - z) / len(z) / len(batch)
        assert each.any() and torch.allclose(seen[-1].grad - without, each.expand(len(batch), -1), atol=1e-6)


def test_the_regulariser_pulls_features_to_the_consensus():
    """It is on by default, and moves the mean features of clients towards each other."""
    spread = {}
    for kappa in (0.0, 50.0):
        one = bed(FedDBE(kappa=kappa), lr=0.02, epochs=5)
        for _ in range(4):
            one.round()
        local = one.worker.open(one.server, 0, one.states[0])
        f = local.model.features(whole(local).x).mean(0).detach()
        spread[kappa] = float((f - one.server.shared["consensus"]).norm())
    assert spread[50.0] < spread[0.0]


def test_the_vector_is_trained_and_used_but_never_sent():
    one = bed(FedDBE(), lr=0.1)
    size = len(one.server.params)
    one.round()
    one.round()
    vectors = [reply.state["own"] for reply in one.replies]
    assert all(vector.shape == (4,) and vector.any() for vector in vectors)
    assert not torch.equal(*vectors)
    assert all(len(reply.update.delta) == size for reply in one.replies)
    assert size == len(bed(Algorithm()).server.params)
    local = one.worker.open(one.server, 0, one.states[0])  # the personal model
    x = whole(local).x
    assert torch.equal(local.model.embed(x), local.model.features(x) + vectors[0])
    one.worker.load(one.server)  # the global model
    assert torch.equal(one.worker.model.embed(x), one.worker.model.features(x))


def test_the_vectors_step_is_plain_sgd_without_decay():
    """v' = v - lr * dCE/dv, from zero and from where that led: the regulariser is on features before the vector."""
    one = bed(FedDBE(kappa=50.0), lr=0.1, batch=8, weight_decay=0.5)
    one.round()
    for start in (False, True):
        local, vector = one.worker.open(one.server, 0, one.states[0]), one.states[0]["own"].clone().requires_grad_()
        batch = whole(local)
        cross_entropy(local.model.head(local.model.features(batch.x) + vector), batch.y).backward()
        one.round([0])
        assert torch.allclose(one.replies[0].state["own"], vector.detach() - 0.1 * vector.grad, atol=1e-6)
        assert vector.any() == start and vector.grad.any()


def test_traffic():
    """FedAvg's, and a mean feature of 4 numbers: up at first, down from then on."""
    dbe, avg = bed(FedDBE()), bed(Algorithm())
    for up, down in ((16, 0), (0, 16), (0, 16)):
        dbe.round()
        avg.round()
        one, other = dbe.replies[1], avg.replies[1]
        assert (one.bytes_up - other.bytes_up, one.bytes_down - other.bytes_down) == (up, down)


def test_switching_off_is_noticed():
    """With either of the two it is not FedAvg: a vector that is trained, or features drawn to the consensus."""
    assert FedDBE(kappa=0.0, vector_lr=0.0).off() == {"kappa": 0.0, "vector_lr": 0.0}
    assert FedDBE(kappa=0.0).off() == FedDBE(vector_lr=0.0).off() == FedDBE().off() == {}
    assert isinstance(FedDBE().build(CNN(width=2).build((1, 16, 16), 4)), Shifted)
    assert Shifted(CNN(width=2).build((1, 16, 16), 4), Rule()).width == 360


def test_whole_run(data):
    small = ("rounds=3", "participation=0.5", "personal.every=1")
    result = run(tiny.config("algorithm.name=feddbe", *tiny.BATCHNORM, *small), data=data)
    assert [len(record["clients"]) for record in result.rounds] == [4, 2, 2]
    assert not any("shift" in name for name in result.weights) and "global/accuracy" in result.rounds[-1]
