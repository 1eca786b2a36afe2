"""The SGD loop against torch.optim.SGD and against counts and numbers by hand."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.data.transforms import Transform
from fedkeel.errors import ConfigError, UndeclaredField
from fedkeel.local import Training, batches, descend, frozen, full_gradient, losses, train
from fedkeel.models.cnn import CNN
from fedkeel.models.mlp import MLP
from fedkeel.models.split import Split
from fedkeel.records import Phase, Update
from fedkeel.rng import Streams, isolated
from fedkeel.weights import Rule, treat

CPU = torch.device("cpu")


def network(norm: str = "none") -> Split:
    with isolated(Streams(5)("init")):
        return CNN(width=2, hidden=6, norm=norm).build((1, 16, 16), tiny.CLASSES)


def perceptron() -> Split:
    with isolated(Streams(5)("init")):
        return MLP(hidden=(4,)).build((1, 16, 16), tiny.CLASSES)


def opened(model: Split, n: int, training: Training, method: Algorithm | None = None, **more):
    """A worker with one client of n samples and that client's round, ready to train."""
    worker, server = tiny.worker(model, [tiny.samples(n)], training, method, **more)
    return worker, worker.open(server, 0, None)


OPTIMISERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.05},
    "nesterov and decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
    "clip": {"clip": 0.05},
    "clip and momentum": {"clip": 0.05, "momentum": 0.9},
}


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_equals_torch_step_for_step(name, norm):
    """Eight steps on the same batches: bit for bit without clipping, whose norm is summed in another order."""
    chosen = OPTIMISERS[name]
    model = network(norm)
    reference = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    training = Training(epochs=2, batch=5, lr=0.1, **chosen)
    worker, local = opened(model, 20, training)

    clip = chosen.get("clip")
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, **{k: v for k, v in chosen.items() if k != "clip"})
    stream = Streams(1)("batch", 0, 0)
    for _ in range(2):
        for rows in torch.split(torch.randperm(20, generator=stream), 5):
            x = tiny.scaled(local.data.x[rows], rng=None, augment=None, device=CPU)
            sgd.zero_grad()
            cross_entropy(reference(x), local.data.y[rows]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(reference.parameters(), clip)
            sgd.step()

    train(local, worker.algorithm, training, worker.weights)
    assert local.steps == 8
    for key, value in reference.state_dict().items():
        mine = model.state_dict()[key]
        same = torch.allclose(mine, value, rtol=1e-5, atol=1e-6) if clip is not None else torch.equal(mine, value)
        assert same, (key, (mine - value).abs().max())
    assert not torch.equal(local.params, local.anchor)


@pytest.mark.parametrize(
    ("n", "batch", "options", "steps"),
    [
        (20, 5, {"epochs": 3}, 12),
        (22, 5, {"epochs": 2}, 10),  # the last batch of two counts
        (21, 5, {"epochs": 2}, 8),  # the last batch of one does not
        (21, 5, {"steps": 7}, 7),
        (21, 5, {"steps": 0}, 0),
        (20, 5, {"epochs": 0}, 0),
        (20, 5, {"epochs": 3, "max_steps": 5}, 5),
        (20, 5, {"epochs": 1, "max_steps": 50}, 4),
        (20, 5, {"steps": 9, "max_steps": 3}, 3),
        (1, 5, {"epochs": 3}, 3),  # one sample is all there is
        (3, 1, {"epochs": 2}, 6),  # batches of one on purpose
        (5, 64, {"epochs": 2}, 2),
    ],
)
def test_number_of_steps(n, batch, options, steps):
    """Epochs are passes, steps are batches; what is counted is what was done."""
    seen: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Counting(Algorithm):
        def correct(self, local, grad):
            seen.append(local.steps)
            return grad

    training = Training(batch=batch, lr=0.01, **options)
    worker, server = tiny.worker(perceptron(), [tiny.samples(n)], training, Counting())
    reply = worker.fit(server, 0, None)
    assert not reply.failure
    assert reply.steps == steps
    assert seen == list(range(steps))
    assert bool(reply.update.delta.any()) == (steps > 0)


def test_every_sample_once_an_epoch_but_a_last_one_alone():
    _, local = opened(perceptron(), 11, Training(batch=5))
    one, two = ([batch.index.tolist() for batch in batches(local)] for _ in range(2))
    for epoch in (one, two):
        assert [len(rows) for rows in epoch] == [5, 5]
        assert len({index for rows in epoch for index in rows}) == 10
    assert one != two  # shuffled anew


@pytest.mark.parametrize("size", [1, 3, 5, 16])
@pytest.mark.parametrize("room", [1, 700, 1 << 23])  # a batch, a few, or all of an epoch together
def test_images_prepared_together_are_those_prepared_batch_by_batch(size, room, monkeypatch):
    transform = Transform(mean=(0.4,), std=(0.3,))
    assert not transform.random
    monkeypatch.setattr("fedkeel.local.AT_ONCE", room)
    _, local = opened(perceptron(), 16, Training(batch=size), transform=transform)
    _, other = opened(perceptron(), 16, Training(batch=size), transform=lambda x, **how: transform(x, **how))
    for one, two in zip(batches(local), batches(other), strict=True):
        for part in ("x", "y", "fake", "index"):
            assert torch.equal(getattr(one, part), getattr(two, part))
        assert one.x.stride() == two.x.stride()


def test_bfloat16_is_of_the_passes_only():
    """Weights and loss stay float32 and near those of float32, and are not the same; so does what is measured."""
    ends = {}
    for precision in ("float32", "bfloat16"):
        worker, local = opened(network("batch"), 40, Training(epochs=2, batch=8, lr=0.05, precision=precision))
        kinds = set()
        hook = worker.model.head.register_forward_hook(lambda module, args, out, kinds=kinds: kinds.add(out.dtype))
        train(local, worker.algorithm, worker.training, worker.weights)
        hook.remove()
        assert kinds == {getattr(torch, precision)}
        assert worker.weights.flat.dtype == torch.float32 == losses(local, local.samples).dtype
        ends[precision] = local.params.clone()
    moved = (ends["float32"] - local.anchor).norm()
    apart = (ends["float32"] - ends["bfloat16"]).norm()
    assert 0 < apart < 0.25 * moved  # 0.14 on a processor that has bfloat16


@pytest.mark.parametrize(
    ("options", "method", "keeps"),
    [({}, None, False), ({"optimiser": "keep", "momentum": 0.9}, None, True), ({}, Scaffold(), True)],
)
def test_what_keeps_nothing_is_known(options, method, keeps):
    worker, _ = opened(perceptron(), 5, Training(**options), method)
    assert worker.keeps is keeps


@pytest.mark.parametrize(
    ("momentum", "nesterov", "steps", "weight"),
    [
        (0.0, False, 4, 4.0),
        (0.9, False, 4, 9.049),
        (0.9, False, 1, 1.0),
        (0.5, False, 3, 4.25),
        (0.9, True, 4, 12.1441),
    ],
)
def test_weight_of_the_gradients(momentum, nesterov, steps, weight):
    """FedNova's a: 1 + 1.9 + 2.71 + 3.439 = 9.049; Nesterov's steps are 1 + 0.9 times those.

    It is what the optimiser really does: under a constant gradient of one the parameters move by -lr a.
    """

    @dataclass(frozen=True, kw_only=True)
    class Constant(Algorithm):
        def correct(self, local, grad):
            return torch.ones_like(grad)

    training = Training(steps=steps, batch=4, lr=0.01, momentum=momentum, nesterov=nesterov)
    worker, local = opened(perceptron(), 8, training, Constant())
    train(local, worker.algorithm, training, worker.weights)
    assert local.gradient_weight == pytest.approx(weight, rel=1e-12)
    moved = local.params - local.anchor
    assert torch.allclose(moved, torch.full_like(moved, -0.01 * weight), rtol=1e-4)


def test_learning_rate_decays_round_by_round():
    worker, server = tiny.worker(perceptron(), [tiny.samples(8)], Training(lr=0.2, lr_decay=0.5))
    rates = [worker.open(replace(server, round=number), 0, None).lr for number in range(3)]
    assert rates == [0.2, 0.1, 0.05]


def test_optimiser_starts_afresh_each_round():
    """Momentum does not cross rounds: the same round twice gives the same numbers."""
    worker, server = tiny.worker(perceptron(), [tiny.samples(8)], Training(momentum=0.9, lr=0.1))
    first = worker.fit(server, 0, None)
    again = worker.fit(server, 0, first.state)
    assert torch.equal(first.update.delta, again.update.delta)


class Rows(Split):
    """A network with an embedding of which only rows of labels in the batch get a gradient."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(nn.Flatten(), nn.Linear(256, tiny.CLASSES), 256)
        self.table = nn.Embedding(tiny.CLASSES, 2)
        treat(self.table, "weight", rule)


@dataclass(frozen=True, kw_only=True)
class Scripted(Algorithm):
    """Gradients of the table by hand: row 0 in the first step, row 1 in the second, none in the third, row 0 again."""

    script = ((0, 1.0), (1, 2.0), (None, 0.0), (0, 1.0))

    def loss(self, local, batch):
        row, size = self.script[local.steps]
        used = 0.0 if row is None else size * local.model.table.weight[row].sum()
        return used + 0 * sum(p.sum() for p in local.model.parameters())


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_without_gradient_do_not_move(momentum, nesterov, decay):
    """Row by row the same as torch.optim.SGD that only ever sees the steps in which this row has a gradient."""
    training = Training(steps=4, batch=4, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    model = Rows(Rule(rows=True))
    start = model.table.weight.detach().clone()
    worker, local = opened(model, 16, training, Scripted())
    train(local, worker.algorithm, training, worker.weights)
    for row in range(tiny.CLASSES):
        alone = nn.Parameter(start[row].clone())
        sgd = torch.optim.SGD([alone], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        for hit, size in Scripted.script:
            if hit == row:
                alone.grad = torch.full((2,), size)
                sgd.step()
        assert torch.allclose(model.table.weight[row], alone, atol=1e-7), row
    assert torch.equal(model.table.weight[2:], start[2:])


def test_rules_of_a_parameter():
    """lr is a factor on the rate, decay = False leaves weight decay out."""
    training = Training(steps=1, batch=4, lr=0.1, weight_decay=0.5)
    model = Rows(Rule(lr=3.0, decay=False))
    start, body = model.table.weight.detach().clone(), model.head.weight.detach().clone()
    worker, local = opened(model, 16, training, Scripted())
    train(local, worker.algorithm, training, worker.weights)
    assert torch.allclose(model.table.weight[0], start[0] - 0.1 * 3.0 * 1.0)
    assert torch.equal(model.table.weight[1:], start[1:])
    assert torch.allclose(model.head.weight, body * (1 - 0.1 * 0.5))  # no gradient, decay alone


def test_decay_and_clip_come_after_the_correction():
    """clip bounds the corrected gradient; decay is added to it afterwards, as torch.optim.SGD does."""

    @dataclass(frozen=True, kw_only=True)
    class Large(Algorithm):
        def correct(self, local, grad):
            return torch.full_like(grad, 100.0)

    training = Training(steps=1, batch=4, lr=0.1, weight_decay=0.5, clip=2.0)
    worker, local = opened(perceptron(), 4, training, Large())
    train(local, worker.algorithm, training, worker.weights)
    each = 2.0 / len(local.params) ** 0.5
    assert torch.allclose(local.params, local.anchor - 0.1 * (each + 0.5 * local.anchor), atol=1e-6)


def test_clip_is_of_all_that_moves():
    """Of shared and own parameters together where both move, to the last bit; of none where none does."""

    @dataclass(frozen=True, kw_only=True)
    class Headless(Algorithm):
        def personal(self, name, module):
            return name.startswith("head.")

    training = Training(steps=1, batch=4, lr=0.1, clip=1e-3)
    worker, local = opened(perceptron(), 4, training, Headless())
    weights, start = worker.weights, worker.weights.flat.clone()
    worker.algorithm.loss(local, next(batches(replace(local, _open={})))).backward()
    grad = weights.grad * torch.clamp(1e-3 / (weights.grad.norm() + 1e-6), max=1.0)
    descend(local, worker.algorithm, training, weights, Phase(steps=1))
    assert 0 < local.layout.shared < local.layout.trained
    assert torch.equal(weights.flat, start.add(grad, alpha=-0.1))
    still = weights.flat.clone()
    descend(local, worker.algorithm, training, weights, Phase(steps=1, shared=False, own=False))
    assert torch.equal(weights.flat, still)


def test_what_stands_still_has_no_gradient_computed():
    """In a phase of the head alone the body is left out of the backward pass, and takes part again after it, even after
    a failure; what was never to be trained is not."""

    @dataclass(frozen=True, kw_only=True)
    class Heads(Algorithm):
        def personal(self, name, module):
            return name.startswith("head")

        def loss(self, local, batch):
            seen.append([parameter.requires_grad for parameter in local.model.parameters()])
            if len(seen) == 2:
                raise ZeroDivisionError
            return super().loss(local, batch)

    seen: list[list[bool]] = []
    model = perceptron()
    next(model.parameters()).requires_grad_(False)
    worker, local = opened(model, 10, Training(batch=10), Heads())
    phase = Phase(shared=False)
    for _ in range(2):
        with suppress(ZeroDivisionError), frozen(local.model, worker.weights, phase):
            descend(local, worker.algorithm, worker.training, worker.weights, phase)
        assert [parameter.requires_grad for parameter in local.model.parameters()] == [False, True, True, True]
    assert seen == [[False, False, True, True]] * 2


@pytest.mark.parametrize("options", OPTIMISERS.values(), ids=OPTIMISERS)
def test_parameters_without_gradient_never_move(options):
    """Neither by decay nor by momentum, as in torch.optim.SGD; those around them do."""

    class Pulls(Algorithm):
        def correct(self, local, grad):
            return grad.add_(1.0)

    model = perceptron()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != "features.1.bias" and not name.startswith("head.w"))
    names = [name for name, _ in model.named_parameters()]
    worker, server = tiny.worker(model, [tiny.samples(8)], Training(lr=0.05, epochs=2, **options), Pulls())
    delta = worker.weights.layout.named(worker.fit(server, 0, None).update.delta)
    still = [name for name in names if not delta[name].any()]
    assert still == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(still) == 2 and len(names) == 4


def test_scaffolds_gradient_leaves_out_what_is_not_trained():
    """The full gradient over a network of which a part has none."""
    model = perceptron()
    next(model.parameters()).requires_grad_(False)
    worker, local = opened(model, 8, Training())
    found = worker.weights.layout.named(full_gradient(local, worker.algorithm))
    assert [bool(each.any()) for each in found.values()] == [False, True, True, True]


def test_what_a_method_returns_shares_no_memory_with_the_network():
    """Which the next client trains, before the server or a state has been looked at."""

    @dataclass(frozen=True, kw_only=True)
    class Live(Algorithm):
        def sends(self):
            return {"w": "as the delta"}

        def client_state(self, params):
            return {"mine": params}

        def upload(self, local):
            return Update(1.0, local.params, extra={"w": local.params[:3]}, keep={"mine": local.params})

    worker, server = tiny.worker(perceptron(), [tiny.samples(8), tiny.samples(8)], Training(lr=0.05), Live())
    reply = worker.fit(server, 0, None)
    trained = worker.weights.params.clone()
    worker.fit(server, 1, None)
    worker.weights.flat.zero_()
    assert torch.equal(reply.update.delta, trained) and torch.equal(reply.update.extra["w"], trained[:3])
    assert torch.equal(reply.state["mine.mine"], trained)


def test_momentum_that_was_kept_moves_to_the_device():
    """As a state that was read from a file: it lies on the CPU, wherever training is."""
    training = Training(momentum=0.9, optimiser="keep")
    worker, server = tiny.worker(perceptron(), [tiny.samples(8)], training)
    state = worker.fit(server, 0, None).state
    assert state["velocity"].any() and torch.equal(worker.open(server, 0, state).velocity, state["velocity"])
    worker.device = torch.device("meta")  # one that every machine has
    assert worker.open(server, 0, state).velocity.device == worker.device


def test_loss_is_the_mean_over_samples_of_the_last_epoch():
    """Batches of 4, 4 and 2 whose losses are the numbers of their samples: (4 4 + 4 4 + 2 2) / 10; one more later."""

    @dataclass(frozen=True, kw_only=True)
    class Numbered(Algorithm):
        def loss(self, local, batch):
            return 0 * local.params.sum() + local.model.head.bias.sum() * 0 + len(batch) + (local.steps >= 3)

    training = Training(epochs=2, batch=4)
    worker, local = opened(perceptron(), 10, training, Numbered())
    train(local, worker.algorithm, training, worker.weights)
    assert local.loss == pytest.approx(3.6 + 1.0)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_leave_no_trace(mode):
    _, local = opened(network("batch"), 300, Training(batch=8))
    local.model.train()
    local.model(tiny.scaled(local.data.x[:20], rng=None, augment=None, device=CPU))  # statistics that are not the first
    before = {key: value.clone() for key, value in local.model.state_dict().items()}
    state = torch.get_rng_state()
    found = losses(local, local.data, mode)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(local._open) == ({("measure",)} if mode == "train" else set())  # for the order, which nothing else has
    assert local.model.training
    assert all(torch.equal(value, before[key]) for key, value in local.model.state_dict().items())
    if mode == "eval":
        with torch.no_grad():
            logits = local.model.eval()(tiny.scaled(local.data.x, rng=None, augment=None, device=CPU))
        expected = torch.log_softmax(logits, 1)[torch.arange(300), local.data.y]
        assert torch.allclose(found, -expected, atol=1e-5)
    assert found.shape == (300,)


def test_full_gradient_is_taken_at_the_weights_received():
    """In batches of 5, 5 and 3, weighted by their size: the gradient of the mean loss of all 13."""
    training = Training(epochs=2, batch=5, lr=0.1)
    model = network()
    reference = copy.deepcopy(model)
    worker, local = opened(model, 13, training)
    train(local, worker.algorithm, training, worker.weights)
    trained = local.params.clone()
    found = full_gradient(local, worker.algorithm)
    assert torch.equal(local.params, trained)
    x = tiny.scaled(local.data.x, rng=None, augment=None, device=CPU)
    cross_entropy(reference(x), local.data.y).backward()
    views = local.layout.named(found)
    for key, parameter in reference.named_parameters():
        assert torch.allclose(views[key], parameter.grad, atol=1e-6), key


def test_what_a_loss_notes_is_of_training_alone():
    """A loss that counts its batches: three of training, none of those that the full gradient is measured with."""

    @dataclass(frozen=True, kw_only=True)
    class Counting(Algorithm):
        def loss(self, local, batch):
            local.scratch.setdefault("seen", torch.zeros(1)).add_(1)
            return super().loss(local, batch)

    worker, local = opened(perceptron(), 13, Training(batch=5), Counting())
    train(local, worker.algorithm, worker.training, worker.weights)
    full_gradient(local, worker.algorithm)
    assert local.method is worker.algorithm and local.scratch["seen"].item() == 3


def test_augmentation_does_not_change_the_batches():
    """Nor does another transform, another method's draws, or a metric: each has a stream of its own."""
    orders = []
    for crop, flip, noise in ((0, False, 0.0), (2, True, 0.0), (0, False, 0.1)):
        transform = Transform(mean=(0.0,), std=(1.0,), crop=crop, flip=flip, fresh_noise=noise)
        _, local = opened(perceptron(), 20, Training(batch=6), transform=transform)
        local.rng("drop").manual_seed(3)
        orders.append([batch.index.tolist() for _ in range(2) for batch in batches(local)])
    assert orders[0] == orders[1] == orders[2]
    stream = Streams(1)("batch", 0, 0)  # nothing but the orders of the two epochs is drawn from it
    expected = [rows.tolist() for _ in range(2) for rows in torch.split(torch.randperm(20, generator=stream), 6)]
    assert orders[0] == expected


def test_round_and_client_have_batches_of_their_own():
    worker, server = tiny.worker(perceptron(), [tiny.samples(20), tiny.samples(20)], Training(batch=20))
    orders = {
        tuple(next(iter(batches(worker.open(replace(server, round=number), client, None)))).index.tolist())
        for number in (0, 1)
        for client in (0, 1)
    }
    assert len(orders) == 4


def test_synthetic_samples_are_marked_in_the_batch():
    """augment marks the real ones; index is the number among the client's own, -1 for synthetic ones."""
    _, local = opened(perceptron(), 6, Training(batch=10))
    marks = []

    def watching(x, *, rng, augment, device):
        marks.append(augment)
        return x.float()

    local.transform = watching
    fake = tiny.samples(4, seed=9)
    local.samples = local.data + type(fake).fake_ones(fake.x, fake.y)
    (batch,) = batches(local)
    assert torch.equal(marks[0], ~batch.fake)
    assert sorted(batch.index.tolist()) == [-1] * 4 + list(range(6))
    assert torch.equal(batch.fake, batch.index < 0)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda local: Update(1.0, local.params - local.anchor, extra={"labels": local.data.y}), "labels"),
        (lambda local: Update(1.0, local.params - local.anchor, keep={"secret": local.data.y}), "secret"),
    ],
)
def test_undeclared_fields_are_refused(update, said):
    method = dataclass(frozen=True)(type("Leaky", (Algorithm,), {"upload": lambda self, local: update(local)}))()
    worker, server = tiny.worker(perceptron(), [tiny.samples(8)], Training(), method)
    with pytest.raises(UndeclaredField, match=said):
        worker.fit(server, 0, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": -1.0}, "weight is -1"),
        ({"delta": torch.full((1048,), float("inf"))}, "delta is not finite"),
        ({"extra": {"c": torch.tensor([0.0, float("nan")])}}, "c is not finite"),
        ({"keep": {"m": torch.tensor(float("inf"))}}, "m is not finite"),
    ],
)
def test_updates_that_are_not_finite_are_refused(change, reason):
    @dataclass(frozen=True, kw_only=True)
    class Broken(Algorithm):
        def sends(self):
            return ("c",)

        def client_state(self, params):
            return {"m": torch.zeros(())}

        def upload(self, local):
            return replace(super().upload(local), **change)

    worker, server = tiny.worker(perceptron(), [tiny.samples(8)], Training(), Broken())
    reply = worker.fit(server, 0, None)
    assert reason in reply.failure and reply.update is None and not reply.trace


def test_one_failing_client_leaves_no_trace_on_the_next():
    """An exception in the middle of anything: the next client's numbers are those it has alone."""

    @dataclass(frozen=True, kw_only=True)
    class Falls(Algorithm):
        def upload(self, local):
            if local.client == 0:
                raise RuntimeError("fell")
            return super().upload(local)

    for buffers in ("average", "recalibrate"):
        training = Training(batch=4, lr=0.1, momentum=0.9, buffers=buffers)
        clients = [tiny.samples(12), tiny.samples(12, seed=1)]
        worker, server = tiny.worker(network("batch"), clients, training, Falls())
        alone = worker.fit(server, 1, None)
        assert worker.fit(server, 0, None).failure == "RuntimeError: fell"
        after = worker.fit(server, 1, None)
        assert torch.equal(alone.update.delta, after.update.delta)
        assert torch.equal(alone.buffers, after.buffers)


@pytest.mark.parametrize("refused", [False, True])
def test_what_a_client_kept_is_as_it_was_after_a_method_wrote_into_it(refused):
    """The server may not accept what comes of it; and what a client starts with may be the server's own tensor."""

    @dataclass(frozen=True, kw_only=True)
    class Writes(Algorithm):
        def client_state(self, params):
            return {"w": params, "rounds": torch.zeros(1)}

        def prepare(self, local):
            local.mine["w"].mul_(2)
            local.mine["rounds"].add_(1)
            if refused and local.round:
                raise ValueError("no")
            return local.data

    worker, server = tiny.worker(perceptron(), [tiny.samples(8)], Training(lr=0.05), Writes())
    first = server.params.clone()
    reply = worker.fit(server, 0, None)
    assert torch.equal(server.params, first) and torch.equal(reply.state["mine.w"], 2 * first)
    before = {name: tensor.clone() for name, tensor in reply.state.items()}
    after = worker.fit(replace(server, round=1), 0, reply.state)
    assert bool(after.failure) == refused
    assert all(torch.equal(tensor, before[name]) for name, tensor in reply.state.items())
    if not refused:
        assert torch.equal(after.state["mine.w"], 4 * first) and after.state["mine.rounds"].item() == 2


def test_a_failing_recalibration_leaves_the_momentum_of_batchnorm():
    worker, server = tiny.worker(network("batch"), [tiny.samples(12)], Training(buffers="recalibrate"))
    calls = 0

    def fails_late(x, *, rng, augment, device):
        nonlocal calls
        calls += 1
        if rng is None:
            raise OSError("no such image")
        return tiny.scaled(x, rng=rng, augment=augment, device=device)

    worker.transform = fails_late
    assert "no such image" in worker.fit(server, 0, None).trace
    assert calls > 1
    assert [module.momentum for module in worker._normal] == [0.1, 0.1]


def test_bytes_by_hand():
    """float32 model and statistics, two int64 counters, down and up; extra comes on top."""

    @dataclass(frozen=True, kw_only=True)
    class Sending(Algorithm):
        def sends(self):
            return ("rows",)

        def server_state(self, params):
            return {"c": torch.zeros(10, dtype=torch.float64)}

        def upload(self, local):
            return replace(super().upload(local), extra={"rows": torch.ones(3, dtype=torch.bool)})

    worker, server = tiny.worker(network("batch"), [tiny.samples(8)], Training(), Sending())
    parameters = sum(p.numel() for p in network("batch").parameters())
    reply = worker.fit(server, 0, None)
    model = 4 * (parameters + 2 * (2 + 4)) + 2 * 8
    assert (reply.bytes_down, reply.bytes_up) == (model + 80, model + 3)


def test_options():
    with pytest.raises(ConfigError, match="nesterov"):
        Training(nesterov=True)
    assert np.isfinite(Training().lr)
