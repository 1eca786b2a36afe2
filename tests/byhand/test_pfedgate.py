"""pFedGate: blocks, budget, gradients of the gate (Chen et al. 2023)."""

from itertools import chain

import pytest
import tiny
import torch
from bed import Bed, Scalar
from torch import nn
from torch.func import functional_call

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.pfedgate import Gate, Gated, PFedGate, SwitchNorm, sizes
from fedkeel.errors import ConfigError
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.cnn import CNN
from fedkeel.models.mlp import MLP


def cnn(norm="none"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CNN(width=2, hidden=4, norm=norm).build((1, 16, 16), 4)


def gated(**options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return PFedGate(input_size=8, **options).build(cnn())


def images(n=6, seed=0):
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def blocks(model):
    """(name, number within its parameter, slice) of each block."""
    out = []
    for name, part in model.blocks.items():
        ends = torch.tensor(part).cumsum(0).tolist()
        out += [(name, i, slice(end - size, end)) for i, (size, end) in enumerate(zip(part, ends, strict=True))]
    return out


class Open(nn.Module):
    """A gate that is open whatever comes."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return torch.ones(len(x), self.number)


class Ungated:
    """Mixed in front of pFedGate: every gate is forced to 1."""

    def build(self, model):
        model = super().build(model)
        model.gate = Open(sum(len(part) for part in model.blocks.values()))
        return model


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_all_blocks_and_a_gate_of_one_is_fedavg_bit_for_bit(norm):
    method = type("Forced", (Ungated, PFedGate), {})(sparsity=1.0)
    data = [tiny.samples(8, seed=1), tiny.samples(12, seed=2)]
    training = Training(epochs=2, batch=4, lr=1e-4, momentum=0.9, weight_decay=0.01)
    beds = [Bed(m, model=cnn(norm), data=data, classes=4, training=training) for m in (method, Algorithm())]
    for clients in ([0, 1], [1], [0, 1]):
        one, other = (each.round(clients) for each in beds)
        assert torch.equal(one.params, other.params)


def test_sizes_of_blocks():
    """25 in at most 10 blocks are 8 of 3 and one of 1; a tensor smaller than that has a block for each element."""
    assert sizes(25, 10) == [3] * 8 + [1] and sizes(10, 5) == [2] * 5
    assert sizes(3, 5) == [1, 1, 1] and sizes(1, 5) == [1] and sizes(11, 5) == [3, 3, 3, 2]


@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.5, 0.8, 1.0])
def test_what_is_kept_is_within_the_budget(sparsity):
    """At most (s - s_min) d beside the first blocks, which are always kept; as much as fits of the best."""
    model = gated(sparsity=sparsity)
    least = 0.2
    for seed in range(3):
        scores = torch.rand(len(blocks(model)), generator=torch.Generator().manual_seed(seed)).clamp(min=least)
        taken = model.taken(scores).bool() if sparsity < 1 else torch.ones(len(scores)).bool()
        for group in model.groups:
            mine = [(b, taken[i], scores[i]) for i, b in enumerate(blocks(model)) if b[0] in group]
            total = sum(b[2].stop - b[2].start for b, _, _ in mine)
            assert all(kept for (_, number, _), kept, _ in mine if number == 0)
            beside = sum(b[2].stop - b[2].start for b, kept, _ in mine if kept and b[1] > 0)
            if sparsity < 1:
                assert beside <= round((sparsity - least) * total)
    if sparsity == 0.5:
        kept = sum(b[2].stop - b[2].start for i, b in enumerate(blocks(model)) if taken[i])
        assert kept / sum(map(sum, model.blocks.values())) == pytest.approx(0.5, abs=0.06)


def test_many_blocks_fill_the_same_share():
    """The first of 25 blocks is a 25th; scores have a tenth as their least, which is no part of the budget."""
    model = PFedGate(input_size=8, split=25).build(MLP(hidden=(50,)).build((1, 10, 10), 4))
    taken = model.taken(torch.rand(len(blocks(model)), generator=torch.Generator().manual_seed(0)).clamp(min=0.1))
    kept = sum(size for size, on in zip(chain(*model.blocks.values()), taken.tolist(), strict=True) if on)
    assert kept / sum(map(sum, model.blocks.values())) == pytest.approx(0.5, abs=0.03)


def test_greedy_choice_by_hand():
    """One linear layer of 10 in five blocks of 2, s = 0.5, s_min = 0.2: beside the first, 0.3 * 10 = 3, so one block;
    0.74 and 0.66 both round to 7: the earlier one is taken."""
    model = PFedGate().build(Scalar())
    model.blocks, model.groups = {"w": sizes(10, 5)}, [["w"]]
    assert model.taken(torch.tensor([0.2, 0.3, 0.66, 0.74, 0.2])).tolist() == [1, 0, 1, 0, 0]
    assert model.taken(torch.tensor([0.2, 0.3, 0.66, 0.76, 0.2])).tolist() == [1, 0, 0, 1, 0]


def test_linear_layers_have_a_budget_of_their_own():
    model = gated()
    linear, other = model.groups
    assert linear == ["features.7.weight", "features.7.bias", "head.weight", "head.bias"]
    assert other == ["features.0.weight", "features.0.bias", "features.3.weight", "features.3.bias"]


def test_the_network_is_the_one_with_masked_and_scaled_parameters():
    """Negative logits survive (authors' code has a ReLU on them), and blocks left out do not matter, nor do their
    scores."""
    model = gated().eval()
    nn.init.constant_(model.head.bias, -0.5)
    x, named = images(), dict(model.named_parameters())
    factors = model.factors(x)
    by_hand = {name: parameter.detach().clone() for name, parameter in named.items() if not name.startswith("gate.")}
    for (name, _, span), factor in zip(blocks(model), factors.tolist(), strict=True):
        by_hand[name].view(-1)[span] *= factor
    logits = functional_call(cnn(), by_hand, (x,))
    assert torch.allclose(model(x), logits, atol=1e-6) and float(logits.min()) < 0

    out = {i for i, factor in enumerate(factors.tolist()) if factor == 0}
    assert out
    with torch.no_grad():
        for i in out:
            name, _, span = blocks(model)[i]
            named[name].view(-1)[span] += 100.0
            model.gate.spread.bias[i] -= 1.0
    assert torch.allclose(model(x), logits, atol=1e-6)


def test_scores_are_clipped_from_below():
    model = gated(sparsity=1.0).eval()
    with torch.no_grad():
        model.gate.spread.bias -= 50.0
    assert model.factors(images()).tolist() == pytest.approx([0.2] * len(blocks(model)))
    assert gated(split=20).least == 0.1 and gated(split=20, sparsity=0.06).least == 0.06


@pytest.mark.parametrize(("sparsity", "split"), [(0.19, 5), (0.3, 3), (0.4, 2)])
def test_no_smaller_share_than_first_blocks_are(sparsity, split):
    """They are always taken: 1 / split of all parameters."""
    with pytest.raises(ConfigError, match=f"sparsity = {sparsity}: must be at least 1 / split = {1 / split:.4g}"):
        PFedGate(sparsity=sparsity, split=split)
    PFedGate(sparsity=1 / split, split=split)


def test_gradients():
    """A block left out has none; the gate's are straight through: d(m g) = m + g, for blocks left out too."""
    model = gated().train()
    model(images()).square().sum().backward()
    taken = model.factors(images()) != 0
    for (name, _, span), kept in zip(blocks(model), taken.tolist(), strict=True):
        assert kept or not dict(model.named_parameters())[name].grad.reshape(-1)[span].any()
    assert model.gate.linear.weight.grad.any() and model.gate.norm.mean_weight.grad.any()

    scores = torch.full((1, len(taken)), 0.3, requires_grad=True)
    model.gate.forward = lambda x: scores
    factors = model.factors(images())
    factors.sum().backward()
    mask = (factors != 0).float()
    assert 0 < mask.mean() < 1
    assert torch.allclose(scores.grad[0], mask + 0.3)


def test_switchable_normalisation_by_hand():
    """Equal weights of instance, layer and batch; biased variances; running statistics at test time."""
    norm = SwitchNorm(2)
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    means = (x.mean((2, 3)), x.mean((1, 2, 3))[:, None], x.mean((0, 2, 3))[None])
    variances = (
        x.var((2, 3), unbiased=False), x.var((1, 2, 3), unbiased=False)[:, None],
        x.var((0, 2, 3), unbiased=False)[None],
    )  # fmt: skip
    centre, var = (sum(part.expand(3, 2) for part in parts) / 3 for parts in (means, variances))
    goal = (x - centre[..., None, None]) / (var[..., None, None] + 1e-5).sqrt()
    assert torch.allclose(norm(x), goal, atol=1e-5)
    assert torch.allclose(norm.running_mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3), unbiased=False), atol=1e-5)
    norm.eval()
    before = norm.running_mean.clone()
    norm(x)
    assert torch.equal(norm.running_mean, before)


def test_size_of_the_gate():
    """It sees images of input_size pixels, or those of a network without convolutions as they are."""
    assert gated().gate.linear.in_features == 64
    wide = PFedGate().build(CNN(width=1, hidden=2).build((3, 64, 64), 4))
    assert wide.gate.linear.in_features == 3 * 32 * 32
    assert wide.gate.linear.out_features == sum(len(part) for part in wide.blocks.values())
    flat = PFedGate().build(MLP(hidden=(5,)).build((1, 16, 16), 4))
    assert flat.gate.linear.in_features == 256 and flat(images()).shape == (6, 4)


def test_one_image():
    """A batch of one has no variance: running statistics stand in, and stay."""
    gate = Gate(nn.Conv2d(1, 1, 3), 8, 5).train()
    before = gate.spread.running_mean.clone()
    assert torch.isfinite(gate(images(1))).all() and torch.equal(gate.spread.running_mean, before)


def test_the_gate_stays_and_is_trained():
    data = [tiny.samples(8, seed=1), tiny.samples(12, seed=2)]
    one = Bed(PFedGate(input_size=8), model=cnn(), data=data, classes=4, training=Training(epochs=2, batch=4, lr=0.1))
    plain = Bed(Algorithm(), model=cnn(), data=data, classes=4, training=Training(epochs=2, batch=4, lr=0.1))
    first = one.worker.initial_own.clone()
    one.round()
    plain.round()
    own = [reply.state["own"] for reply in one.replies]
    assert not torch.equal(own[0], own[1]) and not torch.equal(own[0], first)
    assert len(one.server.params) == len(plain.server.params)
    assert one.replies[0].bytes_up == plain.replies[0].bytes_up
    one.worker.open(one.server, 0, one.states[0])
    one.worker.model.eval()
    x = images()
    mine = one.worker.model(x)
    one.worker.open(one.server, 1, one.states[1])
    assert isinstance(one.worker.model, Gated) and not torch.equal(one.worker.model(x), mine)  # the gate is used


def test_learning_rate_of_the_gate():
    """With a factor of 0 it stands still."""
    data = [tiny.samples(8, seed=1)]
    one = Bed(PFedGate(input_size=8, gate_lr=0.0), model=cnn(), data=data, classes=4)
    before = one.worker.initial_own[: one.worker.weights.layout.own].clone()
    one.round()
    assert torch.equal(one.replies[0].state["own"][: len(before)], before)


def test_whole_run(data):
    small = ("rounds=2", "participation=0.5", "personal.every=1", "algorithm.input_size=8")
    result = run(tiny.config("algorithm.name=pfedgate", *tiny.BATCHNORM, *small), data=data)
    assert "global/accuracy" not in result.rounds[-1] and result.rounds[-1]["personal/accuracy_last"] > 0
    assert not any(name.startswith("gate.") for name in result.weights)
