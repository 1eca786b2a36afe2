"""FedNova against closed forms (Wang et al. 2020)."""

from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fednova import FedNova, gradients
from fedkeel.algorithms.fedprox import FedProx
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.records import Phase

FedNovaQ, FedAvgQ, FedProxQ = on_quadratic(FedNova), on_quadratic(Algorithm), on_quadratic(FedProx)


class Uneven:
    """Client 0 makes one step, client 1 four."""

    def phases(self, local, training):
        super().phases(local, training)
        return (Phase(steps=(1, 4)[local.client]),)


class Constant:
    """Every gradient is 3."""

    def loss(self, local, batch):
        return 3.0 * next(local.model.parameters()).sum()


def mixed(*classes: type) -> type:
    return dataclass(frozen=True, kw_only=True)(type("Mixed", classes, {}))


UnevenNova, UnevenAvg = mixed(Uneven, FedNovaQ), mixed(Uneven, FedAvgQ)


def test_one_round_of_unequal_work():
    """K = (1, 4), p = (1/4, 3/4): y = (0.9, 2.1808), d = (1, -2.952), tau_eff = 3.25.

    x = 1 - 0.1 * 3.25 * (1/4 * 1 - 3/4 * 2.952). FedAvg gives 1.8606. Where a framework divides by the sum of
    p_k tau_eff / a_k once more, tau_eff cancels and 1.448914 comes out.
    """
    bed = Bed(UnevenNova())
    bed.round()
    assert (bed.y(0), bed.y(1)) == pytest.approx((0.9, 2.1808))
    assert bed.x == pytest.approx(1.6383)
    fedavg = Bed(UnevenAvg())
    fedavg.round()
    assert fedavg.x == pytest.approx(1.8606)


def test_the_limit_is_near_the_minimiser_whatever_the_work():
    """x with sum p_k Delta_k / a_k = 0 at eta = 0.02, where Delta = -eta x and (1 - 0.96^4) (3 - x): 2.54883.

    It goes to the minimiser, 18/7 = 2.5714, with eta. FedAvg stops at 2.87288, near the minimiser with weights p_k K_k,
    18/6.25 = 2.88.
    """
    training = Training(batch=8, lr=0.02)
    nova, fedavg = Bed(UnevenNova(), training=training), Bed(UnevenAvg(), training=training)
    for _ in range(120):
        nova.round()
        fedavg.round()
    pull = 0.75 * (1 - 0.96**4)
    assert nova.x == pytest.approx(3 * (pull / 4) / (0.25 * 0.02 + pull / 4), abs=1e-4)
    assert fedavg.x == pytest.approx(3 * pull / (0.25 * 0.02 + pull), abs=1e-4)
    assert abs(nova.x - 18 / 7) < 0.03 < abs(fedavg.x - 18 / 7)


@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("clients", [[0, 1], [1]])
@pytest.mark.parametrize("denominator", ["participants", "all"])
def test_equal_work_is_fedavg(weights, clients, denominator):
    """For any p, and under partial participation: no factor N / |S| on top."""
    nova = Bed(FedNovaQ(weights=weights, denominator=denominator))
    fedavg = Bed(FedAvgQ(weights=weights, denominator=denominator))
    for _ in range(3):
        nova.round(clients)
        fedavg.round(clients)
    assert nova.x == pytest.approx(fedavg.x, rel=1e-6)


def test_a_by_hand():
    """Four steps: momentum 0.9, 1 + 1.9 + 2.71 + 3.439 = 9.049; proximal eta mu = 0.1, (1 - 0.9^4) / 0.1 = 3.439."""
    assert gradients(4, 0.0, 0.0, False) == 4
    assert gradients(4, 0.0, 0.9, False) == pytest.approx(9.049)
    assert gradients(4, 0.1, 0.0, False) == pytest.approx(3.439)
    assert gradients(2, 0.1, 0.9, False) == pytest.approx(1 + 0.9 + 0.9)  # the second gradient is 1 - 0.1
    assert gradients(0, 0.1, 0.9, True) == 0


@pytest.mark.parametrize("pull", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_step_is_one_gradient(pull, momentum):
    """The authors' recursion gives 1.9 for momentum 0.9 with eta mu = 0.1."""
    assert gradients(1, pull, momentum, False) == 1
    assert gradients(1, pull, momentum, momentum > 0) == 1 + momentum


@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_a_is_what_the_optimiser_did(mu, momentum, nesterov, decay):
    """Under constant gradients of 3 the displacement is -eta 3 a, in the second round of a decaying rate too."""
    training = Training(epochs=5, batch=8, lr=0.1, lr_decay=decay, momentum=momentum, nesterov=nesterov)
    bed = Bed(mixed(Constant, FedNova)(mu=mu), training=training)
    for lr in (0.1, 0.1 * decay):
        bed.round()
        for reply in bed.replies:
            a, steps = reply.update.extra["work"].tolist()
            assert steps == 5
            assert reply.update.delta.item() == pytest.approx(-lr * 3 * a, rel=1e-5)


def test_without_proximal_term_a_is_the_weight_of_the_gradients():
    training = Training(epochs=7, batch=8, lr=0.1, momentum=0.8, nesterov=True)
    bed = Bed(FedNovaQ(), training=training)
    bed.round()
    assert bed.replies[0].update.extra["work"][0].item() == pytest.approx(gradients(7, 0.0, 0.8, True))


def test_equal_unit_gradients_move_x_by_the_effective_steps():
    """sum p_k (tau_eff / a_k) a_k = tau_eff: x moves by -eta 3 tau_eff, tau_eff = 1/4 * 1 + 3/4 * 4 = 3.25."""
    bed = Bed(mixed(Uneven, Constant, FedNova)())
    bed.round()
    assert bed.x == pytest.approx(1 - 0.1 * 3 * 3.25)


def test_the_authors_effective_steps():
    """mu = 1, K = (1, 4): a = (1, 3.439) under constant gradients 3; tau_eff = 1/4 + 3/4 * 4 or 1/4 + 3/4 * 3.439."""
    for effective, tau in (("steps", 3.25), ("gradients", 0.25 + 0.75 * 3.439)):
        bed = Bed(mixed(Uneven, Constant, FedNova)(mu=1.0, effective=effective))
        bed.round()
        assert bed.x == pytest.approx(1 - 0.1 * 3 * tau)


@pytest.mark.parametrize("mu", [1.0, 15.0])
def test_the_proximal_solver_is_fedprox(mu):
    """Also where eta mu is more than 1, and there is less than one gradient in two steps: a = 1 - 0.5 = 0.5."""
    nova, fedprox = Bed(FedNovaQ(mu=mu)), Bed(FedProxQ(mu=mu))
    nova.round()
    fedprox.round()
    assert (nova.y(0), nova.y(1)) == (fedprox.y(0), fedprox.y(1))
    assert nova.x == pytest.approx(fedprox.x, rel=1e-6)


def test_server_momentum():
    """Equal work: steps as FedAvg's, s_1 and s_2, and gamma = 0.5: x_2 = x_1 + s_2 + 0.5 s_1."""
    bed = Bed(FedNovaQ(server_momentum=0.5))
    bed.round()
    assert bed.x == pytest.approx(1.4925)  # FedAvg's first round
    bed.round()
    mean = 0.25 * bed.y(0) + 0.75 * bed.y(1)
    assert bed.x == pytest.approx(mean + 0.5 * 0.4925, rel=1e-6)


def test_a_client_without_a_step_has_no_direction():
    bed = Bed(FedNovaQ(), training=Training(epochs=0, batch=8))
    bed.round()
    assert bed.x == 1.0


def test_work_crosses_and_is_declared():
    bed = Bed(UnevenNova())
    bed.round()
    assert [reply.update.extra["work"].tolist() for reply in bed.replies] == [[1, 1], [4, 4]]
    assert FedNova().sends() == ("work",)
    assert FedNova().off() == {}


def test_updates_are_taken_as_they_come():
    bed = Bed(UnevenNova())
    bed.round()
    first = Bed(UnevenNova()).server
    after = bed.method.aggregate(first, (replace(reply.update) for reply in bed.replies))
    assert after.params.item() == bed.x


def test_buffers_are_averaged_as_in_fedavg(data):
    """Not divided by a_k: after a round from the same model the statistics are FedAvg's, bit for bit."""
    options = (*tiny.BATCHNORM, "rounds=1", "local.momentum=0.5", "local.steps=3")
    fedavg = run(tiny.config(*options), data=data)
    nova = run(tiny.config(*options, "algorithm.name=fednova", "algorithm.straggler_fraction=0"), data=data)
    for name in fedavg.weights:
        if "running" in name or "tracked" in name:
            assert torch.equal(fedavg.weights[name], nova.weights[name])
        else:
            assert torch.allclose(fedavg.weights[name], nova.weights[name], atol=1e-6)


def test_a_run_of_stragglers(data):
    table = {"algorithm": {"name": "fednova", "straggler_fraction": 0.9, "mu": 0.01, "server_momentum": 0.5}}
    result = run(tiny.config(*tiny.BATCHNORM, "participation=0.5", "local.momentum=0.5", table=table), data=data)
    assert all(record["global/loss"] is not None for record in result.rounds)
    assert all(bool((t > 0).all()) for name, t in result.weights.items() if name.endswith("running_var"))
