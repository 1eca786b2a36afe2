"""FedRep against its algorithm (Collins et al. 2021)."""

import pytest
import tiny
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedrep import FedRep, last
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.cnn import CNN
from fedkeel.models.mlp import MLP
from fedkeel.models.resnet import ResNet18
from fedkeel.records import Phase


class AllShared:
    """Mixed in front of FedRep: no tensor is private."""

    def personal(self, name, module):
        return False


def net(norm="none"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CNN(width=2, hidden=4, norm=norm).build((1, 16, 16), 4)


def bed(method, *, norm="none", **training):
    settings = {"epochs": 3, "batch": 4, "lr": 0.1, **training}
    data = [tiny.samples(8, seed=1), tiny.samples(12, seed=2)]
    return Bed(method, model=net(norm), data=data, classes=4, training=Training(**settings))


def parts(one, reply):
    """The state of a client: its head before and after the round (own), the change of its body."""
    return one.worker.initial_own, reply.state["own"], reply.update.delta


def test_without_body_epochs_the_body_stands_still():
    """Nothing that could move it is on: momentum, weight decay, BatchNorm in training mode."""
    one = bed(FedRep(head_epochs=2, body_epochs=0), norm="batch", momentum=0.9, weight_decay=0.1)
    first, statistics = one.server.params.clone(), one.server.buffers.clone()
    for _ in range(2):
        one.round()
        for reply in one.replies:
            head, trained, body = parts(one, reply)
            assert not body.any() and torch.equal(reply.buffers, statistics)
            assert not torch.equal(head, trained)
    assert torch.equal(one.server.params, first)


def test_without_head_epochs_the_heads_stand_still():
    one = bed(FedRep(head_epochs=0, body_epochs=2), norm="batch", momentum=0.9, weight_decay=0.1)
    one.round()
    for reply in one.replies:
        head, trained, body = parts(one, reply)
        assert torch.equal(head, trained) and body.any()
        assert not torch.equal(reply.buffers, one.server.buffers)  # the body's statistics move with it


def test_the_head_comes_first():
    """One epoch of each is two rounds, of the head and of the body, with the same batches; not both together."""
    both = bed(FedRep(head_epochs=1, body_epochs=1), batch=12)
    both.round([1])
    head = bed(FedRep(head_epochs=1, body_epochs=0), batch=12)
    head.round([1])
    assert torch.equal(both.states[1]["own"], head.states[1]["own"])
    body = bed(FedRep(head_epochs=0, body_epochs=1), batch=12)
    body.states[1] = head.states[1]
    body.round([1])
    assert torch.allclose(both.server.params, body.server.params, atol=1e-7)


def test_no_private_tensors_and_no_head_epochs_is_uniform_fedavg_bit_for_bit():
    method = type("Shared", (AllShared, FedRep), {})(head_epochs=0, body_epochs=3)
    rep, avg = bed(method, norm="batch", momentum=0.5), bed(Algorithm(weights="uniform"), norm="batch", momentum=0.5)
    for _ in range(3):
        assert torch.equal(rep.round().params, avg.round().params)


def test_uniform_average_of_bodies():
    one = bed(FedRep(head_epochs=1, body_epochs=1))
    first = one.server.params.clone()
    one.round()
    mean = (one.replies[0].update.delta + one.replies[1].update.delta) / 2
    assert torch.allclose(one.server.params, first + mean)


def test_heads_never_mix():
    """Client 0's head does not depend on client 1's data, and is not taken from the server in later rounds."""
    alone, beside = (bed(FedRep(head_epochs=2, body_epochs=0)) for _ in range(2))
    for number in range(3):
        alone.round([0])
        beside.round([1, 0] if number else [0])
        assert torch.equal(alone.states[0]["own"], beside.states[0]["own"])
    local = beside.worker.open(beside.server, 0, beside.states[0])
    assert torch.equal(beside.worker.weights.own, beside.states[0]["own"])
    assert not torch.equal(beside.worker.weights.own, beside.states[1]["own"])
    assert torch.equal(local.params, beside.server.params)  # the personal model: new body, own head


def test_what_crosses():
    """d - |head|, 4 x 4 + 4 of it."""
    rep, avg = bed(FedRep(head_epochs=1)), bed(Algorithm())
    rep.round()
    avg.round()
    assert avg.replies[0].bytes_up - rep.replies[0].bytes_up == 20 * 4
    assert avg.replies[0].bytes_down - rep.replies[0].bytes_down == 20 * 4


def test_phases_by_epochs_and_by_steps():
    method, training = FedRep(head_epochs=3, body_epochs=1), Training(epochs=7)
    assert method.phases(None, training) == (Phase(3, shared=False), Phase(1, own=False))
    head, body = method.phases(None, Training(steps=10))
    assert (head.steps, head.shared, body.steps, body.own) == (7, False, 3, False)
    one = bed(method, batch=4)
    one.round([0])
    assert one.replies[0].steps == 3 * 2 + 1 * 2


@pytest.mark.parametrize(
    ("head", "body", "training", "steps"),
    [
        (10, 1, {"max_steps": 20}, 20),  # 18 of the head's 20, and both of the body's
        (10, 1, {"max_steps": 11}, 11),
        (10, 1, {"steps": 40, "max_steps": 20}, 20),
        (10, 0, {"max_steps": 11}, 11),
        (0, 10, {"max_steps": 11}, 11),
    ],
)
def test_a_limit_is_dealt_out_as_steps_are(head, body, training, steps):
    """Epochs of two batches: the same bits as with so many steps, and the body has its share."""
    limited, given = (
        bed(FedRep(head_epochs=head, body_epochs=body), batch=4, **each) for each in (training, {"steps": steps})
    )
    for one in (limited, given):
        one.round([0])
        assert one.replies[0].steps == steps and bool(one.replies[0].update.delta.any()) == (body > 0)
    assert torch.equal(limited.server.params, given.server.params)
    assert torch.equal(limited.states[0]["own"], given.states[0]["own"])


def test_a_limit_above_all_steps_changes_nothing():
    """Ten epochs of two batches, and one: 22 steps. A limit of 30 leaves both parts as many as they have."""
    limited, free = (bed(FedRep(), batch=4, **each) for each in ({"max_steps": 30}, {}))
    for one in (limited, free):
        one.round([0])
        assert one.replies[0].steps == 22
    assert torch.equal(limited.server.params, free.server.params)


@pytest.mark.parametrize("phase", [{"head_epochs": 1, "body_epochs": 0}, {"head_epochs": 0, "body_epochs": 1}])
def test_clipping_is_of_what_moves(phase):
    """One step under a small clip is lr * clip long, however large the gradient of the part that stands still is."""
    one = bed(FedRep(**phase), lr=0.1, clip=1e-3, batch=16)
    one.round([0])
    head, trained, body = parts(one, one.replies[0])
    assert one.replies[0].steps == 1
    assert (trained - head if phase["head_epochs"] else body).norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_the_last_block():
    assert isinstance(last(net("batch").features), torch.nn.Linear)
    resnet = ResNet18().build((3, 16, 16), 4)
    assert last(resnet.features) is resnet.features.layer4[1]
    model = FedRep(last_block=True).build(resnet)
    own = {n for n, m in owners(model) if FedRep(last_block=True).personal(n, m)}
    assert own == {n for n, _ in owners(model) if n.startswith(("head.", "features.layer4.1."))}
    assert not any(FedRep().personal(n, m) for n, m in owners(net()) if n.startswith("features."))
    FedRep(last_block=True).build(MLP(hidden=()).build((1, 4, 4), 2))  # no block: the head alone


def owners(model):
    return [(f"{path}.{leaf}", m) for path, m in model.named_modules() for leaf in (*m._parameters, *m._buffers)]


def test_a_body_that_never_moves_is_said():
    assert FedRep(body_epochs=0).off() == {"body_epochs": 0} and FedRep(head_epochs=0).off() == FedRep().off() == {}
    one = bed(FedRep(body_epochs=0))
    one.round([0])
    assert not one.replies[0].update.delta.any()


def test_scalar_bed_has_no_body():
    """The bed's network is all head: nothing is shared, and nothing moves but the heads."""
    one = Bed(on_quadratic(FedRep)(head_epochs=2, body_epochs=1))
    local = one.worker.open(one.server, 0, None)
    assert len(local.params) == 0 and len(one.worker.weights.own) == 1


@pytest.mark.parametrize("block", ["true", "false"])
def test_whole_run(data, block):
    small = ("algorithm.head_epochs=2", f"algorithm.last_block={block}", "rounds=3", "personal.every=1")
    result = run(tiny.config("algorithm.name=fedrep", *tiny.BATCHNORM, *small), data=data)
    assert "global/accuracy" not in result.rounds[-1]  # a body alone is no model
    assert result.rounds[-1]["personal/accuracy_last"] > 0
    assert not any(name.startswith("head.") for name in result.weights)
