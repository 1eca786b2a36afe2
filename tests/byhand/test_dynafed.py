"""DynaFed against closed forms and ordinary training (Pi et al. 2023)."""

import copy
import math
from dataclasses import replace

import pytest
import tiny
import torch
from bed import Bed
from torch import nn

from fedkeel.algorithms import dynafed
from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.dynafed import DynaFed, augmented, soft_loss
from fedkeel.errors import ConfigError
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.cnn import CNN
from fedkeel.models.mlp import MLP
from fedkeel.models.split import Split
from fedkeel.rng import Streams, isolated

SMALL = {"snapshots": 3, "iterations": 2, "syn_steps": 2, "per_class": 2, "tune_epochs": 2}


def network(norm=None):
    with isolated(Streams(5)("init")):
        kind = MLP(hidden=(4,)) if norm is None else CNN(width=2, hidden=6, norm=norm, groups=2)
        return kind.build((1, 16, 16), 4)


def bed_of(method, norm=None, **training):
    data = [tiny.samples(n, seed=n) for n in (5, 9)]
    how = Training(**{"epochs": 1, "batch": 4, "lr": 1e-4, **training})
    return Bed(method, model=network(norm), data=data, classes=4, training=how)


def puzzle(method, norm=None):
    """Images, labels, a start, a direction and a stream, for `mismatch`."""
    bed, rng = bed_of(method, norm), Streams(2)("test")
    bed.worker.model.train()
    images = torch.randn(8, 1, 16, 16, generator=rng)
    labels = torch.randn(8, 4, generator=rng)
    start = bed.server.params.clone()
    return bed.server.lab, images, labels, start, torch.randn(len(start), generator=rng), rng


def student(lab, images, labels, start, lr, steps):
    """Where plain SGD with a full batch ends."""
    model = copy.deepcopy(lab.model)
    nn.utils.vector_to_parameters(start.clone(), model.parameters())  # it makes views
    for _ in range(steps):
        grads = torch.autograd.grad(soft_loss(model(images), labels), list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.sub_(lr * grad)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_soft_loss_is_a_mean_over_classes_too():
    """Two equal logits against even labels: ln 2 in the usual cross-entropy, half of it here."""
    assert soft_loss(torch.zeros(3, 2), torch.zeros(3, 2)).item() == pytest.approx(math.log(2) / 2)
    hard = torch.tensor([[100.0, 0.0]])
    assert soft_loss(torch.zeros(1, 2), hard).item() == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("augment", [True, False])
def test_a_student_that_stands_still_is_off_by_exactly_one(augment):
    lab, images, labels, start, way, rng = puzzle(DynaFed(augment=augment, syn_steps=3))
    loss = DynaFed(augment=augment, syn_steps=3).mismatch(
        lab, images, labels, torch.tensor(0.0), start, start + way, rng
    )
    assert loss.item() == 1.0


def test_a_student_that_arrives_is_off_by_zero():
    method = DynaFed(augment=False, syn_steps=3)
    lab, images, labels, start, _, rng = puzzle(method)
    end = student(lab, images, labels, start, 0.5, 3)
    loss = method.mismatch(lab, images, labels, torch.tensor(0.5), start, end, rng)
    assert loss.item() == pytest.approx(0.0, abs=1e-8)


def test_mismatch_of_one_step_by_hand():
    """|start - lr g - target|^2 / |start - target|^2."""
    method = DynaFed(augment=False, syn_steps=1)
    lab, images, labels, start, way, rng = puzzle(method)
    end = student(lab, images, labels, start, 2.0, 1)
    loss = method.mismatch(lab, images, labels, torch.tensor(2.0), start, start + way, rng)
    expected = (end - start - way).square().sum() / way.square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != 1.0


@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_gradients_reach_images_labels_and_rate(norm):
    """Through both steps of the student: as central differences along each of the three."""
    method = DynaFed(augment=False, syn_steps=2)
    lab, images, labels, start, way, _ = puzzle(method, norm)
    lr = torch.tensor(1.0)
    target = start + 0.05 * way
    for number, thing in enumerate((images, labels, lr)):
        args = [images, labels, lr]
        args[number] = thing.clone().requires_grad_()
        method.mismatch(lab, *args, start, target, Streams(3)("test")).backward()
        grad = args[number].grad
        along = grad / grad.norm()
        step, values = 1e-3, []  # between two kinks of ReLU and max-pool
        for sign in (1, -1):
            args[number] = thing + sign * step * along
            values.append(method.mismatch(lab, *args, start, target, Streams(3)("test")).item())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(grad.norm().item(), rel=0.02), number
        assert grad.norm() > 0


def test_distilling_finds_a_shorter_way():
    """On a path of true training, images from noise come to match it better than they did."""
    method = DynaFed(
        snapshots=4, iterations=60, syn_steps=5, per_class=2, image_lr=0.1, label_lr=0.1, student_lr=0.5, augment=False
    )
    bed = bed_of(method, lr=1e-5)
    for _ in range(3):
        bed.round()
    lab, losses = bed.server.lab, []
    path = [lab.shelf.get(0, v)["params"] for v in range(3)] + [bed.server.params]

    def off(images, labels):
        rng = Streams(4)("test")
        pairs = [method.drawn(path, rng) for _ in range(5)]
        return sum(method.mismatch(lab, images, labels, torch.tensor(0.5), *p, rng).item() for p in pairs) / 5

    shape = (8, 1, 16, 16)
    noise = torch.randn(shape, generator=lab.streams("distil"))
    losses.append(off(noise, torch.zeros(8, 4)))
    losses.append(off(*method.distilled(bed.server)))
    assert losses[1] < 0.9 * losses[0]


def test_targets_lie_ahead_within_reach():
    """On the path 0, 1, 2, ... the target is a mean of two or three of the next three."""
    path = [torch.tensor([float(i)]) for i in range(6)]
    rng, method = Streams(1)("test"), DynaFed()
    draws = [tuple(t.item() for t in method.drawn(path, rng)) for _ in range(400)]
    assert {start for start, _ in draws} == {0.0, 1.0, 2.0}
    ahead = {round(6 * (target - start)) for start, target in draws}
    assert min(ahead) == 6 and max(ahead) == 18
    assert {6 * ahead % 2 for ahead in ahead} == {0}
    assert 15 in ahead and 8 in ahead  # means of two, and of three (1 + 1 + 2) / 3


@pytest.mark.parametrize("length", [2, 3])
def test_a_short_path_is_used_as_far_as_it_goes(length):
    path = [torch.tensor([float(i)]) for i in range(length)]
    rng = Streams(1)("test")
    for _ in range(20):
        start, target = DynaFed(reach=5, least=2).drawn(path, rng)
        assert start.item() == 0.0
        assert 1.0 <= target.item() <= length - 1


def test_before_it_has_its_models_it_is_uniform_fedavg():
    """L = 3 with the initial model: two rounds bit for bit, then no longer."""
    fed, avg = bed_of(DynaFed(**SMALL)), bed_of(Algorithm(weights="uniform"))
    for number in range(3):
        same = torch.equal(fed.round().params, avg.round().params)
        assert same == (number < 2)
    assert set(fed.server.private) == {"images", "labels"}
    assert fed.server.private["images"].shape == (8, 1, 16, 16)
    assert not any(fed.server.lab.shelf._versions.values())
    images = fed.server.private["images"]
    fed.round()
    assert fed.server.private["images"] is images  # found once


def test_the_path_is_that_of_the_global_models():
    bed, models = bed_of(DynaFed(**{**SMALL, "snapshots": 9})), []
    for _ in range(4):
        models.append(bed.server.params)
        bed.round()
    assert bed.server.private["shelf"].tolist() == [[0, v] for v in range(4)]
    for version, model in enumerate(models):
        assert torch.equal(bed.server.lab.shelf.get(0, version)["params"], model)


@pytest.mark.parametrize("model", [(), tiny.BATCHNORM])
def test_without_tuning_it_is_uniform_fedavg(data, model):
    """Whole runs, statistics and counters included."""
    off = run(tiny.config(*model, "algorithm.name=dynafed", "algorithm.tune_epochs=0"), data=data)
    avg = run(tiny.config(*model, "algorithm.name=fedavg", "algorithm.weights=uniform"), data=data)
    assert all(torch.equal(tensor, avg.weights[name]) for name, tensor in off.weights.items())
    assert DynaFed(tune_epochs=0).off() == {"tune_epochs": 0}
    assert DynaFed(snapshots=5).off(4) == {"snapshots": 5}
    assert DynaFed(snapshots=4).off(4) == {}  # the last round has the path, and tunes on what is distilled from it


@pytest.mark.parametrize(("recalibrate", "bn_var"), [(True, "mean"), (False, "mean"), (False, "pooled")])
def test_tuning_is_ordinary_training_with_adam(recalibrate, bn_var):
    """Three passes that renew the statistics, two epochs of torch.optim.Adam, from this round's average of both."""
    method = DynaFed(**SMALL, augment=False, recalibrate=recalibrate, tune_lr=1e-2, tune_batch=3)
    bed = bed_of(method, "batch")
    bed.server = replace(bed.server, lab=replace(bed.server.lab, bn_var=bn_var))
    for _ in range(3):
        bed.round()
    plain = bed_of(Algorithm(weights="uniform"), "batch")
    plain.server = replace(bed.server, lab=plain.server.lab, private={})
    average = plain.round().params
    each = torch.stack([reply.buffers for reply in plain.replies])
    statistics = each.mean(0)
    for means, variances in bed.server.layout.variance_pairs():
        if bn_var == "pooled":
            statistics[variances] += each[:, means].var(0, unbiased=False)

    after = bed.round()
    plain.worker.weights.load(average, statistics, plain.server.counters)
    model, rng = plain.worker.model.train(), bed.server.lab.streams("tune")
    images, labels = (bed.server.private[name] for name in ("images", "labels"))
    if recalibrate:
        with torch.no_grad():
            for _ in range(3):
                for rows in torch.split(torch.randperm(8, generator=rng), 3):
                    model(images[rows])
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        for rows in torch.split(torch.randperm(8, generator=rng), 3):
            adam.zero_grad()
            soft_loss(model(images[rows]), labels[rows]).backward()
            adam.step()
    bed.worker.load(after)
    for name, value in model.state_dict().items():
        assert torch.allclose(bed.worker.model.state_dict()[name], value, rtol=1e-4, atol=1e-5), name
    assert not torch.allclose(after.params, average, atol=1e-3)


class Anywhere(Split):
    """Takes images of any size."""

    def __init__(self):
        features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(features, nn.Linear(3, 4), 3)


def test_proxy_resolution():
    """Smaller images for a network that takes any size; a clear no from one that does not."""
    with isolated(Streams(5)("init")):
        model = Anywhere()
    method = DynaFed(**{**SMALL, "snapshots": 2}, proxy_resolution=7)
    bed = Bed(method, model=model, data=[tiny.samples(6)], classes=4, training=Training(batch=4, lr=1e-4))
    bed.round()
    bed.round()
    assert bed.server.private["images"].shape == (8, 1, 7, 7)
    bed = bed_of(method)
    bed.round()
    with pytest.raises(ConfigError, match=r"algorithm\.proxy_resolution = 7.*16 x 16"):
        bed.round()


def test_fewer_than_least_cannot_be():
    with pytest.raises(ConfigError, match="least"):
        DynaFed(reach=1, least=2)


OPERATIONS = {name: getattr(dynafed, name) for name in ("colour", "crop", "cutout", "flip", "scale", "rotate")}


@pytest.mark.parametrize("name", OPERATIONS)
def test_augmentation_is_differentiable_and_of_each_image_its_own(name):
    x = torch.rand(64, 3, 16, 16, generator=Streams(1)("x")).requires_grad_()
    before = torch.get_rng_state()
    out = OPERATIONS[name](x, Streams(2)("test"))
    out.square().sum().backward()
    assert out.shape == x.shape
    assert bool(torch.isfinite(x.grad).all()) and int((x.grad.flatten(1) != 0).any(1).sum()) == 64
    assert not torch.equal(out, x)
    assert torch.equal(out, OPERATIONS[name](x, Streams(2)("test")))
    assert torch.equal(torch.get_rng_state(), before)
    one = x.detach()[:1].expand(8, -1, -1, -1)
    assert len({tuple(image.flatten().tolist()) for image in OPERATIONS[name](one, Streams(3)("test"))}) > 1


def test_what_the_operations_do():
    x = torch.rand(256, 2, 16, 8, generator=Streams(1)("x")) + 0.1
    rng = Streams(2)("test")
    mirrored = dynafed.flip(x, rng)
    flips = [torch.equal(a, b.flip(2)) for a, b in zip(mirrored, x, strict=True)]
    assert all(f or torch.equal(a, b) for f, a, b in zip(flips, mirrored, x, strict=True))
    assert 0.4 < sum(flips) / 256 < 0.6

    moves = torch.tensor([-2, 2, 0]), torch.tensor([1, -1, 0])
    shifted = dynafed.moved(x[:3], *moves)
    assert torch.equal(shifted[0, :, :14, 1:], x[0, :, 2:, :7]) and not shifted[0, :, 14:].any()
    assert torch.equal(shifted[1, :, 2:, :7], x[1, :, :14, 1:]) and not shifted[1, :, :, 7:].any()
    assert torch.equal(shifted[2], x[2])
    lost = (dynafed.crop(x, rng) == 0).all(1)
    assert set(lost.all(2).sum(1).tolist()) == {0, 1, 2} and set(lost.all(1).sum(1).tolist()) == {0, 1}

    holes = (dynafed.cutout(x, rng) == 0).all(1)
    assert int(holes.flatten(1).sum(1).max()) == 8 * 4
    assert holes.any(0).all()  # everywhere

    plain = torch.ones(64, 1, 16, 16)
    assert float(dynafed.colour(plain, rng).min()) >= 0.5 and float(dynafed.colour(plain, rng).max()) <= 1.5
    assert torch.allclose(dynafed.rotate(plain, rng)[:, :, 6:10, 6:10], plain[:, :, 6:10, 6:10])
    assert torch.allclose(dynafed.scale(plain, rng)[:, :, 3:13, 3:13], plain[:, :, 3:13, 3:13])


def test_each_operation_is_drawn(monkeypatch):
    drawn = []
    for name in OPERATIONS:
        monkeypatch.setattr(dynafed, name, lambda x, rng, name=name: drawn.append(name) or x)
    rng = Streams(1)("test")
    for _ in range(100):
        augmented(torch.ones(1, 1, 4, 4), rng)
    assert set(drawn) == set(OPERATIONS)
