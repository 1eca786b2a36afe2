"""FedAMP against closed forms (Huang et al. 2021)."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedamp import FedAMP, by_cosine, by_distance
from fedkeel.errors import ConfigError
from fedkeel.job import Job
from fedkeel.local import Training
from fedkeel.loop import one_round, run
from fedkeel.models.mlp import MLP
from fedkeel.runtimes.inprocess import InProcessRuntime

FedAMPQ, FedAvgQ = on_quadratic(FedAMP), on_quadratic(Algorithm)


def squared(w):
    return (w[:, None] - w[None, :]).square().sum(-1)


def models(bed):
    return [bed.states[k]["mine.w"].item() for k in sorted(bed.states)]


def test_the_cards_numbers():
    """w = (0, 1), alpha = 0.5, sigma = 1: xi_12 = 0.5 / e."""
    weights = by_distance(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1.0, 0.5, 0.5)
    assert weights[0].tolist() == pytest.approx([0.8160603, 0.1839397], abs=1e-7)
    assert (weights @ torch.tensor([0.0, 1.0]).double()).tolist() == pytest.approx([0.1839397, 0.8160603], abs=1e-7)


@pytest.mark.parametrize("alpha", [None, 0.01, 3.0, 1e6])
def test_rows_sum_to_one_and_the_sum_of_models_is_conserved(alpha):
    """However large alpha is, no weight is negative and the weights stay symmetric."""
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    weights = by_distance(squared(w), 4.0, alpha, 0.5)
    assert torch.allclose(weights.sum(1), torch.ones(6).double())
    assert torch.allclose(weights, weights.T) and float(weights.min()) >= -1e-12
    assert torch.allclose((weights @ w).sum(0), w.sum(0))
    if alpha == 0.01:
        assert float(weights[0, 1]) == pytest.approx(0.01 / 4 * math.exp(-float(squared(w)[0, 1]) / 4))


def test_alpha_is_found_from_the_own_weight():
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    for goal in (0.5, 0.7):
        weights = by_distance(squared(w), float(squared(w).median()), None, goal)
        assert float(weights.diagonal().mean()) == pytest.approx(goal)


def test_limits():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    mean = by_distance(squared(w), 1e9, 1e9 / 4, 0.5) @ w
    assert torch.allclose(mean, w.mean(0).expand(4, 3), atol=1e-6)
    same = torch.ones(4, 3).double()
    assert torch.allclose(by_distance(squared(same), 1.0, 0.2, 0.5) @ same, same)
    assert torch.equal(by_distance(squared(w), 1.0, 0.0, 0.5), torch.eye(4).double())
    assert torch.equal(by_distance(squared(w * 1e6), 1.0, None, 0.5), torch.eye(4).double())


def test_cosine_weights():
    """xi_ii fixed, the others in proportion to exp(sigma cos)."""
    cosine = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, -0.5], [0.0, -0.5, 1.0]])
    weights = by_cosine(cosine, 2.0, 0.4)
    assert weights[0].tolist() == pytest.approx([0.4, 0.6 * math.e / (math.e + 1), 0.6 / (math.e + 1)])
    assert torch.allclose(weights.sum(1), torch.ones(3).double())


def test_two_rounds_by_hand():
    """alpha = 0.5, sigma = 1, lambda = 0.1, so lambda/alpha = 0.2; in round 1 both mixtures are the first model, 1.

    y_1: 1 - 0.1 * 1 = 0.9, then 0.9 - 0.1 (0.9 + 0.2 (0.9 - 1)) = 0.812;
    y_2: 1 - 0.1 * -4 = 1.4, then 1.4 - 0.1 (-3.2 + 0.2 * 0.4) = 1.712.
    Round 2: xi = 0.5 exp(-0.9^2), u = (0.812 + 0.9 xi, 1.712 - 0.9 xi), each starting from its own model.
    """
    bed = Bed(FedAMPQ(alpha=0.5, sigma=1.0, lam=0.1))
    bed.round()
    assert models(bed) == pytest.approx([0.812, 1.712])
    xi = 0.5 * math.exp(-0.81)
    u = [0.812 + 0.9 * xi, 1.712 - 0.9 * xi]
    for k in (0, 1):
        mail = bed.method.mail(bed.server, k)
        assert mail["params"].item() == pytest.approx(u[k]) and mail["alpha"].item() == 0.5
    expected = []
    for k, (a, b) in enumerate([(1, 0), (2, 3)]):
        w = [0.812, 1.712][k]
        for _ in range(2):
            w -= 0.1 * (a * (w - b) + 0.2 * (w - u[k]))
        expected.append(w)
    bed.round()
    assert models(bed) == pytest.approx(expected)
    assert bed.x == pytest.approx(0.25 * expected[0] + 0.75 * expected[1])  # the average, for whoever wants one model
    assert [bed.server.lab.shelf.get(k, 1)["w"].item() for k in (0, 1)] == pytest.approx(expected)


def test_without_mixture_and_term_it_is_separate_bit_for_bit(data):
    """With partial participation and a late joiner, who starts from the first model."""
    kept = []
    for method in (("fedamp", "algorithm.alpha=0", "algorithm.lam=0"), ("separate", "algorithm.train_all=false")):
        name, *options = method
        shared = ("participation=0.5", "local.optimiser=keep", "local.momentum=0.9")
        job = Job(tiny.config(f"algorithm.name={name}", *options, *shared), data)
        server, accepted, rounds = job.first_server(), {}, []
        for _ in range(4):
            server, record = one_round(job, InProcessRuntime(job), server, accepted)
            states = [job.store.get(k, accepted[k]) for k in record["clients"]]
            rounds.append([state["mine.w" if name == "fedamp" else "own"] for state in states])
        assert len(accepted) > len(rounds[0])  # somebody came later
        kept.append(rounds)
    for amp, alone in zip(*kept, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(amp, alone, strict=True))


def test_the_mixture_reaches_the_training():
    """Not detached: the others' models change a client's."""
    amp, alone = (Bed(FedAMPQ(alpha=1.0, sigma=1.0, lam=lam)) for lam in (1.0, 0.0))
    for _ in range(2):
        amp.round()
        alone.round()
    assert models(amp)[0] - models(alone)[0] > 0.01


@pytest.mark.parametrize("distance", [1.0, 2.0])
def test_the_gradient_is_lambda_over_alpha_times_the_distance(distance):
    bed = Bed(FedAMPQ(alpha=4.0, lam=2.0))
    local = bed.worker.open(bed.server, 0, None, bed.method.mail(bed.server, 0))
    local.params.copy_(local.anchor + distance)
    assert bed.method.correct(local, torch.zeros(1)).item() == pytest.approx(0.5 * distance)


def test_a_step_never_goes_beyond_the_mixture():
    """alpha = 0.001: lambda/alpha = 1000 is cut to 1/eta = 10, with which the step is the whole way to u."""
    bed = Bed(FedAMPQ(alpha=1e-3))
    local = bed.worker.open(bed.server, 0, None, bed.method.mail(bed.server, 0))
    local.params.copy_(local.anchor + 3.0)
    assert local.lr * bed.method.correct(local, torch.zeros(1)).item() == pytest.approx(3.0)


@pytest.mark.parametrize("options", [{"alpha": 1.0, "form": "heuristic"}, {"form": "heuristic"}])
@pytest.mark.parametrize("number", [1600, 30_000])
def test_an_alpha_that_has_vanished_lands_on_the_mixture(options, number):
    """10^-50 is no float32, 10^-1000 no float64: lambda/alpha is above 1/eta, and the step is the whole way to u."""
    bed = Bed(FedAMPQ(**options))
    server = replace(bed.server, round=number)
    local = bed.worker.open(server, 0, None, bed.method.mail(server, 0))
    local.params.copy_(local.anchor + 3.0)
    assert local.mail["alpha"].item() == 0.0
    assert local.lr * bed.method.correct(local, torch.zeros(1)).item() == pytest.approx(3.0)


def test_partial_participation():
    """An absent client counts with its last model; one that has never sent any is in no mixture."""
    bed = Bed(FedAMPQ(alpha=0.5, sigma=1.0, lam=0.1))
    bed.round([0])
    assert bed.server.private["shelf"].tolist() == [[0, 0]]
    assert bed.method.mail(bed.server, 0)["params"].item() == models(bed)[0]  # nobody to mix with
    assert bed.method.mail(bed.server, 1)["params"].item() == 1.0  # the first model, not the average
    bed.round([1])
    bed.round([1])
    assert bed.server.private["shelf"].tolist() == [[0, 0], [1, 2]]
    w = models(bed)
    assert bed.server.private["likeness"][0, 1].item() == pytest.approx((w[0] - w[1]) ** 2)
    xi = 0.5 * math.exp(-((w[0] - w[1]) ** 2))
    assert bed.method.mail(bed.server, 0)["params"].item() == pytest.approx(w[0] + xi * (w[1] - w[0]))
    assert bed.server.lab.shelf._held.keys() == {(0, 0), (1, 2)}  # no more than one model a client


def test_distances_of_absent_clients_are_not_measured_again():
    data = [tiny.samples(8, seed=k) for k in range(4)]
    model = MLP(hidden=(3,)).build((1, 16, 16), 4)
    bed = Bed(FedAMP(), model=model, data=data, classes=4, training=Training(epochs=1, batch=8, lr=0.1))
    for clients in ([0, 2], [1, 2], [0, 1, 2], [3]):
        bed.round(clients)
    w = torch.stack([bed.server.lab.shelf.get(k, v)["w"] for k, v in bed.server.private["shelf"].tolist()])
    assert torch.allclose(bed.server.private["likeness"], squared(w), rtol=1e-4, atol=1e-7)
    weights = bed.method.mixture(bed.server.private["likeness"], 4)
    assert float(weights.diagonal().mean()) == pytest.approx(0.5)  # sigma and alpha were found
    mixed = torch.stack([bed.method.mail(bed.server, k)["params"] for k in range(4)])
    assert torch.allclose(mixed.sum(0), w.sum(0), atol=1e-5)


def test_models_are_not_tied_to_mixtures_by_the_alpha_that_was_found():
    """The alpha that gives a client's model half of the weight is a fraction of the squared distances; in the proximal
    term it would leave no distance between models, and so be smaller still. There, an alpha not given is 1; a given one
    counts whole, also where the mixture takes less."""
    assert FedAMP().step(0) == FedAMP().step(60) == 1.0
    for given, pull in ((None, 1.0), (100.0, 0.01)):
        bed = Bed(FedAMPQ(alpha=given))
        for _ in range(2):
            bed.round()
        local = bed.worker.open(bed.server, 0, bed.states[0], bed.method.mail(bed.server, 0))
        local.params.copy_(local.anchor + 2.0)
        assert bed.method.correct(local, torch.zeros(1)).item() == pytest.approx(2.0 * pull)


def test_start_at_the_mixture():
    bed = Bed(FedAMPQ(alpha=0.5, sigma=1.0, lam=0.0, begin="mixture"))
    bed.round()
    w, u = models(bed), [bed.method.mail(bed.server, k)["params"].item() for k in (0, 1)]
    bed.round()
    assert models(bed)[0] == pytest.approx(0.81 * u[0])  # f_1: two steps of 0.9
    local = bed.worker.open(bed.server, 0, bed.states[0], bed.method.mail(bed.server, 0))
    bed.method.personalise(local)
    assert local.params.item() == models(bed)[0] != w[0]


def test_heuristic_form():
    """alpha, for the pull alone, falls tenfold every 30 rounds."""
    method = FedAMP(form="heuristic", self_weight=0.25)
    assert [method.step(t) for t in (0, 29, 30, 65)] == pytest.approx([1e4, 1e4, 1e3, 1e2])
    assert FedAMP(alpha=2.0, alpha_decay=0.5).step(60) == 2.0  # a given alpha of the exact form stays
    assert FedAMP(alpha=2.0, alpha_decay=0.5, form="heuristic").step(60) == 0.5
    one = torch.tensor([1.0, 0.0, 1.0])
    assert method.compare(one, torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(math.sqrt(0.5))
    weights = method.mixture(torch.tensor([[1.0, 0.3], [0.3, 1.0]]), 0)
    assert weights.tolist() == [[0.25, 0.75], [0.75, 0.25]]


def test_traffic_is_fedavgs():
    """The mixture comes in place of the model; one number, alpha, comes with it."""
    amp, avg = Bed(FedAMPQ(alpha=0.5, sigma=1.0)), Bed(FedAvgQ())
    for _ in range(2):
        amp.round()
        avg.round()
        for one, other in zip(amp.replies, avg.replies, strict=True):
            assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down + 4)


def test_options():
    assert FedAMP().off() == {}
    with pytest.raises(ConfigError, match="alpha"):
        FedAMP(alpha=0.0)


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({"lam": 0.0}, {"lam": 0.0}),
        ({"lam": 0.0, "begin": "mixture"}, {}),  # clients start from their mixtures
        ({"self_weight": 1.0}, {"self_weight": 1.0}),
        ({"self_weight": 1.0, "form": "heuristic", "alpha": 2.0}, {"self_weight": 1.0}),
        ({"self_weight": 1.0, "alpha": 2.0}, {}),  # the mixture is found from alpha
        ({"alpha": 0.0, "lam": 0.0, "begin": "mixture"}, {"alpha": 0.0}),
        ({"alpha": 0.0, "lam": 0.0, "begin": "mixture", "form": "heuristic"}, {}),  # alpha has no part in the mixture
    ],
)
def test_switching_off_is_noticed_where_mixtures_play_no_part(options, off):
    """Where it is off, mixtures are the clients' own models or have no part in training; else they are neither."""
    method = FedAMP(**options)
    assert method.off() == off
    likeness = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    itself = torch.equal(method.mixture(likeness, 0).float(), torch.eye(2))
    assert bool(off) == (itself or (method.lam == 0 and method.begin == "own"))


@pytest.mark.parametrize("form", ["exact", "heuristic"])
def test_whole_run(data, form):
    small = ("rounds=3", "participation=0.5", "personal.every=1", f"algorithm.form={form}")
    result = run(tiny.config("algorithm.name=fedamp", *tiny.BATCHNORM, *small), data=data)
    assert "global/accuracy" not in result.rounds[-1] and result.rounds[-1]["personal/accuracy_last"] > 0
    assert not any("running" in name for name in result.weights)  # statistics stay
