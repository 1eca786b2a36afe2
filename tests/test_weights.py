"""Flat weights: nothing is lost on the way in and out, and everything in the network is a live view."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkeel import registry
from fedkeel.errors import ConfigError, RunError
from fedkeel.models.cnn import CNN
from fedkeel.models.resnet import ResNet18
from fedkeel.models.split import Split
from fedkeel.options import build
from fedkeel.rng import Streams, isolated
from fedkeel.weights import Layout, Rule, Weights, finite, mean, treat

SHAPE, BATCH = (3, 16, 16), 5


# every registered model as it is by default, and two that are small with the other normalisations
VARIANTS = [(name, {}) for name in registry.names("models")]
VARIANTS += [("cnn", {"norm": "batch"}), ("cnn", {"norm": "group"})]


def made(name: str, options: dict[str, str]) -> Split:
    with isolated(Streams(3)("init")):
        model = build(registry.get("models", name), options).build(SHAPE, 7)
    for buffer in model.buffers():  # not the values that every network starts with
        buffer.add_(1)
    return model


def images() -> Tensor:
    x = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def small() -> Split:
    with isolated(Streams(3)("init")):
        return CNN(width=2, hidden=6, norm="batch").build(SHAPE, 4)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_nothing_changes_on_the_way_in_and_out(name, options):
    """Same values, same outputs as the network in channels_last, bit for bit."""
    model = made(name, options)
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model).to(memory_format=torch.channels_last)
    weights = Weights(model)
    x = images()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), reference.eval()(x))
    out = weights.state_dict()
    assert out.keys() == before.keys() == model.state_dict().keys()
    for key, value in before.items():
        assert torch.equal(out[key], value), key
        assert torch.equal(model.state_dict()[key], value), key
        assert out[key].dtype == value.dtype and out[key].is_contiguous()
    assert weights.layout.total == sum(value.numel() for value in before.values() if value.is_floating_point())

    weights.flat.zero_()
    again = Weights(reference)
    weights.load(again.params, again.buffers, again.counters)
    assert all(torch.equal(value, before[key]) for key, value in weights.state_dict().items())


@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[0] != "resnet34"])
def test_gradients_land_in_the_vector(name, options):
    model = made(name, options)
    reference = copy.deepcopy(model).to(memory_format=torch.channels_last)
    weights = Weights(model)
    for _ in range(2):  # also when it is used again
        weights.grad.zero_()
        model(images()).square().sum().backward()
    for _ in range(2):
        reference.zero_grad()
        reference(images()).square().sum().backward()
    views = weights.layout.named(weights.grad)
    for key, parameter in reference.named_parameters():
        assert torch.equal(views[key], parameter.grad), key
    assert all(p.grad.data_ptr() == views[n].data_ptr() for n, p in model.named_parameters())


def test_views_are_live_both_ways():
    model = small()
    weights = Weights(model)
    weights.params.add_(1.0)
    assert torch.equal(model.head.bias, weights.params[-4:])
    with torch.no_grad():
        model.head.bias.fill_(7.0)
    assert weights.params[-4:].tolist() == [7.0] * 4
    kernel = model.features[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    model.train()(images())  # moves the running statistics, which are views too
    assert torch.equal(weights.layout.named(weights.flat)["features.1.running_mean"], model.features[1].running_mean)
    assert weights.buffers.data_ptr() == model.features[1].running_mean.data_ptr()
    assert float(weights.buffers.abs().sum()) > 0


def test_an_optimiser_on_the_vector_trains_the_module():
    model = small()
    weights = Weights(model)
    reference = copy.deepcopy(model)
    vector = nn.Parameter(weights.params)
    vector.grad = weights.grad
    one, other = torch.optim.SGD([vector], lr=0.1, momentum=0.9), torch.optim.SGD(reference.parameters(), 0.1, 0.9)
    for _ in range(3):
        weights.grad.zero_()
        model(images()).square().mean().backward()
        one.step()
        other.zero_grad()
        reference(images()).square().mean().backward()
        other.step()
    for key, parameter in reference.named_parameters():
        assert torch.allclose(weights.layout.named(weights.params)[key], parameter, atol=1e-6), key


def test_what_is_personal_lies_apart():
    """[shared parameters | own parameters | shared buffers | own buffers], as FedBN and FedPer at once have it."""
    model = small()
    plain = Layout(model)

    def personal(name: str, module: nn.Module) -> bool:
        return isinstance(module, _BatchNorm) or name.startswith("head.")

    weights = Weights(model, personal)
    layout = weights.layout
    own = {entry.name for entry in layout.entries if entry.own}
    assert own == {
        *(f"features.{i}.{leaf}" for i in (1, 5) for leaf in ("weight", "bias", "running_mean", "running_var")),
        "head.weight",
        "head.bias",
    }
    assert (layout.shared + layout.own, layout.buffers) == (plain.trained, 0)
    assert layout.own_buffers == plain.buffers == 2 * (2 + 4)
    assert layout.key() != plain.key() == Layout(small()).key()
    assert set(layout.named(weights.params)) == {name for name, _ in model.named_parameters()} - own

    kept = weights.own
    assert kept.numel() == layout.own + layout.own_buffers
    weights.params.zero_()
    weights.own = kept * 2
    assert torch.equal(weights.own, kept * 2)
    assert torch.equal(model.head.weight.flatten(), (kept * 2)[layout.own - 24 - 4 : layout.own - 4])
    assert not weights.params.any()
    kept.zero_()  # a copy, not a view
    assert weights.own.any()


def test_buffers_by_name():
    model = small()
    weights = Weights(model)
    named = {name: view for name, view in weights.layout.named(weights.flat).items() if "running" in name}
    assert [name for name in named if name.endswith("running_var")] == [
        "features.1.running_var",
        "features.5.running_var",
    ]
    named["features.5.running_var"].fill_(5.0)
    assert model.features[5].running_var.tolist() == [5.0] * 4
    pairs = weights.layout.variance_pairs()
    assert [weights.buffers[variance].tolist() for _, variance in pairs] == [[1.0] * 2, [5.0] * 4]
    assert [weights.buffers[means].tolist() for means, _ in pairs] == [[0.0] * 2, [0.0] * 4]


def test_counters_are_copies_beside_the_vector():
    model = small()
    weights = Weights(model)
    model.train()(images())
    counters = weights.counters
    assert {name: int(value) for name, value in counters.items()} == {
        "features.1.num_batches_tracked": 1,
        "features.5.num_batches_tracked": 1,
    }
    model(images())
    assert int(counters["features.1.num_batches_tracked"]) == 1
    assert int(model.features[1].num_batches_tracked) == 2
    weights.counters = counters
    assert int(model.features[1].num_batches_tracked) == 1
    assert all(value.dtype == torch.int64 for value in counters.values())


def test_mask_goes_by_the_type_of_the_module():
    """ResNet-18 has 20 BatchNorm layers; three sit in shortcuts and have no "bn" in their name."""
    model = ResNet18().build((3, 32, 32), 10)
    layout = Layout(model)
    mask = layout.mask(model, lambda name, module: isinstance(module, _BatchNorm))
    assert int(mask.sum()) == 2 * sum(m.num_features for m in model.modules() if isinstance(m, _BatchNorm)) == 9600
    for layer in (2, 3, 4):
        entry = layout.by_name[f"features.layer{layer}.0.downsample.1.weight"]
        assert "bn" not in entry.name and entry.kind == "BatchNorm2d"
        assert bool(mask[entry.start : entry.start + entry.size].all())
    assert not bool(layout.mask(model, lambda name, module: False).any())
    head = layout.mask(model, lambda name, module: name == "head.bias")
    assert head.nonzero()[:, 0].tolist() == list(range(layout.shared - 10, layout.shared))


def test_spans_follow_the_rules():
    """Neighbours under one rule are one span; a rule by rows stands alone; own parameters begin a span of their own."""
    model = Split(nn.Linear(2, 3), nn.Linear(3, 2), 3)
    rows, slow = Rule(rows=True), Rule(lr=0.5, decay=False)
    treat(model.features, "bias", rows)
    treat(model.head, "weight", slow)
    treat(model.head, "bias", slow)
    assert Layout(model).spans() == [(slice(0, 6), Rule(), 1), (slice(6, 9), rows, 3), (slice(9, 17), slow, 1)]
    assert Layout(model, lambda name, module: name == "head.bias").spans() == [
        (slice(0, 6), Rule(), 1),
        (slice(6, 9), rows, 3),
        (slice(9, 15), slow, 1),
        (slice(15, 17), slow, 1),
    ]
    assert Layout(Split(nn.Linear(2, 3), nn.Linear(3, 2), 3)).spans() == [(slice(0, 17), Rule(), 1)]


def test_only_single_precision():
    with pytest.raises(ConfigError, match=r"float64.*features\.weight"):
        Weights(Split(nn.Linear(2, 2).double(), nn.Linear(2, 2), 2))


def test_mean_by_hand():
    """(1 (1, 2) + 3 (5, -2)) / 4 = (4, -1), and a second tensor of another shape with it."""
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    a, b = mean([(1.0, (first, torch.tensor([[8.0]]))), (3.0, (second, torch.tensor([[0.0]])))])
    assert (a.tolist(), b.tolist()) == ([4.0, -1.0], [[2.0]])
    assert first.tolist() == [1.0, 2.0]  # the terms are not changed


def test_mean_takes_terms_as_they_come():
    """In one pass and in the order given: the same additions as a plain loop in float32, bit for bit."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 50)).astype(np.float32)
    numbers = [int(n) for n in rng.integers(1, 30, 7)]
    alive = 0

    def terms():
        nonlocal alive
        for n, vector in zip(numbers, vectors, strict=True):
            alive += 1
            yield float(n), (torch.from_numpy(vector.copy()),)

    (result,) = mean(terms())
    sums = vectors[0] * np.float32(numbers[0])
    for n, vector in zip(numbers[1:], vectors[1:], strict=True):
        sums = sums + vector * np.float32(n)
    assert np.allclose(result.numpy(), sums / np.float32(sum(numbers)), rtol=1e-6)
    assert alive == 7


@pytest.mark.parametrize("terms", [[], [(0.0, (torch.ones(2),))]])
def test_mean_of_nothing(terms):
    with pytest.raises(RunError, match="nothing to average"):
        mean(terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite(dtype: torch.dtype) -> None:
    good = torch.tensor([-3e38, 0.0, 3e38]).to(dtype) if dtype != torch.bfloat16 else torch.tensor([1.0], dtype=dtype)
    assert finite(good) and finite(good[:0]) and finite(good[0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in range(3):
            values = torch.ones(3, dtype=dtype)
            values[place] = bad
            assert not finite(values)
