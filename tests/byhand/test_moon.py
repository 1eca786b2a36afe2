"""MOON against closed forms and a plain copy of its loss (Li, He, Song 2021)."""

import copy
import math

import pytest
import torch
from small import bed, gradient, network, opened, same_training
from torch.nn.functional import cosine_similarity, cross_entropy

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.moon import Moon, contrast
from fedkeel.reference import features, present, received


def vectors(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def test_the_term_of_orthogonal_features():
    """z = z_g = (1, 0), z_p = (0, 1), tau = 0.5: -log(e^2 / (e^2 + 1)) = log(1 + e^-2)."""
    z, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert contrast(z, [z, other], 0.5).item() == pytest.approx(0.1269280, abs=1e-6)


def test_two_previous_models_are_two_negatives():
    """log(1 + e^-2 + e^-4): the second points the other way."""
    z = torch.tensor([[1.0, 0.0]])
    value = contrast(z, [z, torch.tensor([[0.0, 1.0]]), -z], 0.5)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-4)))


def test_the_global_model_as_previous_one_gives_log_2_and_no_gradient():
    z, other = vectors(4, 0).requires_grad_(), vectors(4, 1)
    value = contrast(z, [other, other], 0.5)
    value.backward()
    assert value.item() == pytest.approx(0.6931472)
    assert z.grad.abs().max() < 1e-7


def test_the_length_of_features_does_not_matter():
    z, others = vectors(4, 0), [vectors(4, 1), vectors(4, 2)]
    assert contrast(7 * z, others, 0.5).item() == pytest.approx(contrast(z, others, 0.5).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 1.0])
def test_the_term_lies_between_its_bounds(temperature):
    z = vectors(1, 0)
    least = math.log1p(math.exp(-2 / temperature))
    most = 2 / temperature + least  # log(1 + e^(2/tau)), which exp and log would overflow
    values = [contrast(vectors(1, i), [vectors(1, i + 50), vectors(1, i + 99)], temperature).item() for i in range(9)]
    assert all(least - 1e-5 <= value <= most + 1e-4 for value in values)
    assert contrast(z, [z, -z], temperature).item() == pytest.approx(least, abs=1e-6)
    assert contrast(z, [-z, z], temperature).item() == pytest.approx(most, rel=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_without_the_term_it_is_fedavg_bit_for_bit(norm):
    same_training(bed(Moon(mu=0.0), norm=norm), bed(Algorithm(), norm=norm))


def test_the_first_round_is_fedavgs():
    same_training(bed(Moon(mu=5.0)), bed(Algorithm()), rounds=1)


def test_previous_is_global_trains_like_fedavg():
    """In the first round all clients contrast with the model received: a constant."""
    moon, fedavg = bed(Moon(first="global"), norm="none"), bed(Algorithm(), norm="none")
    moon.round(), fedavg.round()
    assert torch.allclose(moon.server.params, fedavg.server.params, atol=1e-6)
    assert moon.replies[0].loss == pytest.approx(fedavg.replies[0].loss + math.log(2), rel=1e-5)


def test_the_loss_is_that_of_three_networks_side_by_side():
    """Copies of the network: the one that trains, the one received in evaluation mode with the averaged statistics,
    the previous one in evaluation mode with its own."""
    it = bed(Moon(mu=2.0, temperature=0.3))
    it.round()
    it.round()
    previous = it.states[1]["mine.previous"][0]
    local, batch = opened(it, 1)
    local.params.add_(0.1)  # as after some steps

    def made(params, buffers) -> torch.nn.Module:
        it.worker.weights.load(params, buffers, it.server.counters)
        return copy.deepcopy(it.worker.model)

    now, layout = local.params.clone(), local.layout
    glob = made(it.server.params, it.server.buffers).eval()
    prev = made(previous[: layout.shared], previous[layout.trained :]).eval()
    me = made(now, it.server.buffers).train()
    z, z_g, z_p = (net.features(batch.x) for net in (me, glob, prev))
    up, down = (torch.exp(cosine_similarity(z, other) / 0.3) for other in (z_g, z_p))
    expected = cross_entropy(me.head(z), batch.y) - 2.0 * torch.log(up / (up + down)).mean()
    expected.backward()
    it.worker.weights.load(now, it.server.buffers, it.server.counters)
    it.worker.weights.grad.zero_()
    value = it.method.loss(local, batch)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), theirs in zip(local.model.named_parameters(), me.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5), name
    # BatchNorm's statistics moved by one forward pass, that of the network that trains
    for mine, theirs in zip(local.model.buffers(), me.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_what_the_modes_alone_put_apart_is_reported(norm):
    """1 - the cosine of one network's features in the two modes, on a client's first batch; nothing without term."""
    it = bed(Moon(mu=2.0), norm=norm)
    it.round([0, 1])
    assert all(reply.metrics == {} for reply in it.replies)
    local, batch = opened(it, 1)
    trained, standing = (copy.deepcopy(local.model).train(mode).features(batch.x) for mode in (True, False))
    expected = 1 - cosine_similarity(trained, standing).mean().item()
    it.round([1, 2])
    found = [reply.metrics.get("method/mode_mismatch") for reply in it.replies]
    assert found == [pytest.approx(expected, abs=1e-6), None]
    assert expected > 1e-3 if norm == "batch" else abs(expected) < 1e-6


def test_the_term_has_a_gradient_proportional_to_mu():
    grads = []
    for mu in (0.0, 1.0, 2.0):
        it = bed(Moon(mu=1.0))
        it.round()
        it.method = Moon(mu=mu)
        grads.append(gradient(it, *opened(it)))
    first, second = grads[1] - grads[0], grads[2] - grads[0]
    assert first.norm() > 1e-3
    assert torch.allclose(second, 2 * first, atol=1e-5)


def test_what_stays_is_the_local_model_not_the_average():
    it = bed(Moon())
    sent = it.server.params.clone()
    it.round()
    for reply in it.replies:
        (previous,) = it.states[reply.client]["mine.previous"]
        layout = it.worker.weights.layout
        assert torch.allclose(previous[: layout.shared], sent + reply.update.delta, atol=1e-6)
        assert torch.equal(previous[layout.trained :], reply.buffers)
        assert not torch.allclose(previous[: layout.shared], it.server.params)
        assert not reply.update.extra


def test_an_absent_client_keeps_its_last_and_a_newcomer_has_none():
    it = bed(Moon())
    it.round([0])
    kept = it.states[0]["mine.previous"]
    as_it_was = kept.clone()
    it.round([1])
    assert torch.equal(it.states[0]["mine.previous"], as_it_was)
    assert torch.equal(opened(it, 0)[0].mine["previous"], as_it_was)
    assert len(it.method.others(opened(it, 0)[0])) == 2
    assert len(it.method.others(opened(it, 2)[0])) == 0
    before = kept.clone()
    it.round([0])
    assert not torch.equal(it.states[0]["mine.previous"], kept)
    assert torch.equal(kept, before)  # the state of an earlier round is not written into


def test_the_oldest_leaves_first():
    it, models = bed(Moon(buffer=3)), []
    for number in range(5):
        it.round()
        kept = it.states[0]["mine.previous"]
        models.append(kept[-1].clone())
        assert torch.equal(kept, torch.stack(models[-3:]))
        assert len(kept) == min(3, number + 1)
    assert it.method.others(opened(it)[0]).shape == (4, it.worker.weights.layout.total)


def test_modes_and_the_model_received_are_as_before():
    it = bed(Moon())
    it.round()
    sent = it.server.params.clone()
    local, batch = opened(it)
    local.model.features[2].eval()  # as in a phase in which it stands still
    it.method.loss(local, batch)
    assert local.model.training and not local.model.features[2].training and local.model.features[1].training
    assert torch.equal(it.server.params, sent)


@pytest.mark.parametrize("buffers", ["average", "local", "reset"])
def test_the_reference_has_the_statistics_of_the_rounds_start(buffers):
    it = bed(Moon(), buffers=buffers)
    it.round()
    assert buffers == "local" or not torch.equal(it.server.buffers, it.worker.initial_buffers)
    local, batch = opened(it)
    kept = it.states[0]["own"] if buffers == "local" else it.server.buffers
    if buffers == "reset":
        it.worker.weights.buffers.copy_(it.worker.initial_buffers)
    flat = received(local)
    with torch.no_grad():
        local.model(batch.x)
    assert received(local) is flat
    assert torch.equal(flat[local.layout.trained :], kept)
    assert not torch.equal(present(local)[local.layout.trained :], kept)
    assert not features(local, flat, batch.x).requires_grad


def test_the_official_projection_lies_before_the_head():
    """Linear(6, 6) - ReLU - Linear(6, 4) - head: 42 + 28 + 15 parameters beside the body's."""
    model = Moon(projection_head="official", projection=4).build(network("none"))
    assert model.width == 4 and model.head.weight.shape == (3, 4)
    body = network("none").features
    assert sum(p.numel() for p in model.parameters()) == 42 + 28 + 15 + sum(p.numel() for p in body.parameters())
    x = torch.rand(2, 1, 2, 2)
    first, _, last = model.features.projection
    z = last(torch.relu(first(model.features.body(x))))
    assert torch.equal(model.embed(x), z) and torch.equal(model(x), model.head(z))


def test_the_projections_first_weights_come_from_the_runs_seed():
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(bed(Moon(projection_head="official")).server.params)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(*made)


def test_a_client_of_one_sample():
    it = bed(Moon(), norm="none", sizes=(1, 3))
    it.round()
    it.round()
    assert all(math.isfinite(reply.loss) for reply in it.replies)


def test_switching_off_is_noticed():
    assert Moon(mu=0.0).off() == {"mu": 0.0}
    assert Moon().off() == {}
