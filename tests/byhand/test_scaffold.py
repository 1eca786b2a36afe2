"""SCAFFOLD against closed forms (Karimireddy et al. 2020)."""

from dataclasses import replace

import pytest
import small
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.regl import ReGL
from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.errors import ConfigError
from fedkeel.local import Training

ScaffoldQ, FedAvgQ = on_quadratic(Scaffold), on_quadratic(Algorithm)


def variates(bed: Bed) -> list[float]:
    return [bed.states[k]["mine.c"].item() if k in bed.states else 0.0 for k in range(len(bed.data))]


def test_three_rounds_by_hand():
    """Round 1 has no correction: y = (0.81, 1.72), so c_1 = 0.19 / 0.2 = 0.95, c_2 = -0.72 / 0.2 = -3.6."""
    bed = Bed(ScaffoldQ())
    bed.round()
    assert bed.x == pytest.approx(1.265)
    assert variates(bed) == pytest.approx([0.95, -3.6])
    assert bed.server.shared["c"].item() == pytest.approx(-1.325)
    bed.round()
    assert (bed.x, bed.server.shared["c"].item()) == pytest.approx((1.4685, -1.0175))
    bed.round()
    assert (bed.x, bed.server.shared["c"].item()) == pytest.approx((1.6163275, -0.7391375))


def test_the_limit_is_the_true_optimum():
    """FedAvg stops at 1.9636."""
    bed = Bed(ScaffoldQ())
    for _ in range(200):
        bed.round()
    assert bed.x == pytest.approx(2.0, abs=1e-5)


def test_the_servers_learning_rate():
    """1 + 0.5 (1.265 - 1); c does not depend on it."""
    bed = Bed(ScaffoldQ(server_lr=0.5))
    bed.round()
    assert (bed.x, bed.server.shared["c"].item()) == pytest.approx((1.1325, -1.325))


@pytest.mark.parametrize(("denominator", "x"), [("participants", 0.81), ("all", 0.905)])
def test_partial_participation_divides_c_by_all_clients(denominator, x):
    """The step of -0.19 only where it is asked for: 1 - 0.19 / 2."""
    bed = Bed(ScaffoldQ(denominator=denominator))
    bed.round([0])
    assert (bed.x, bed.server.shared["c"].item()) == pytest.approx((x, 0.475))
    assert variates(bed) == pytest.approx([0.95, 0.0])


@pytest.mark.parametrize("pattern", [[[0], [1], [0, 1]], [[1], [1], [0]], [[0, 1], [0], [0, 1], [1]]])
def test_c_stays_the_mean_of_the_clients(pattern):
    bed = Bed(ScaffoldQ())
    for clients in pattern:
        bed.round(clients)
        assert bed.server.shared["c"].item() == pytest.approx(sum(variates(bed)) / 2, abs=1e-6)


@pytest.mark.parametrize("pattern", [[[0], [1], [0, 1]], [[1], [0], [1]]])
def test_by_size_c_stays_the_weighted_mean(pattern):
    bed = Bed(ScaffoldQ(weights="samples"))
    for clients in pattern:
        bed.round(clients)
        c = variates(bed)
        assert bed.server.shared["c"].item() == pytest.approx(0.25 * c[0] + 0.75 * c[1], abs=1e-6)


def test_one_client_is_gradient_descent():
    """Six steps from 1: 0.9^6 = 0.531441; c equals c_1, so nothing is corrected."""
    bed = Bed(ScaffoldQ(), sizes=(1,))
    for _ in range(3):
        bed.round()
    assert bed.x == pytest.approx(0.531441, rel=1e-6)


def test_a_late_joiner_is_corrected_by_c_alone():
    """c and all c_k start at zero: the newcomer's first step is -(g - 0 + c)."""
    bed = Bed(ScaffoldQ())
    bed.round([0])
    local = bed.worker.open(bed.server, 1, None)
    assert bed.method.correct(local, torch.zeros(1)).item() == pytest.approx(0.475)


def test_without_correction_it_is_uniform_fedavg():
    """The first round has none; the same step, bit for bit."""
    scaffold, fedavg = Bed(ScaffoldQ()), Bed(FedAvgQ(weights="uniform"))
    assert torch.equal(scaffold.round().params, fedavg.round().params)


def test_full_gradient_variate():
    """Option I: c_k = f_k'(x) = a (x - b) at x = 1: 1 and -4."""
    bed = Bed(ScaffoldQ(variate="gradient"))
    bed.round()
    assert variates(bed) == pytest.approx([1.0, -4.0])
    assert bed.y(0) == pytest.approx(0.81)  # measuring it does not disturb the trained weights


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_under_momentum_the_variate_is_an_average_gradient(momentum):
    """With a constant gradient g the variate must be g, not g / (1 - rho): divide by FedNova's a(K, rho)."""

    class Constant:
        def loss(self, local, batch):
            return 3.0 * next(local.model.parameters()).sum()

    from dataclasses import dataclass

    method = dataclass(frozen=True, kw_only=True)(type("S", (Constant, Scaffold), {}))()
    bed = Bed(method, training=Training(epochs=5, batch=8, lr=0.1, momentum=momentum))
    bed.round()
    assert variates(bed) == pytest.approx([3.0, 3.0], rel=1e-5)


def test_momentum_that_lasts_goes_with_option_one_only():
    """With a gradient of 2 and lr 0.1, one step a round and momentum 0.9: the second round's step has a velocity of
    2 + 0.9 * 2 = 3.8, of which option II would make its variate. Option I measures 1 at 0.9, where it is 0.9."""
    kept = Training(epochs=1, batch=8, lr=0.1, momentum=0.9, optimiser="keep")
    for method in (Scaffold(), ReGL(volume=0, weights="uniform", base=Scaffold())):
        with pytest.raises(ConfigError, match=r"local.optimiser = 'keep': must be 'reset'.*'gradient'"):
            Bed(method, training=kept)
    Bed(Scaffold(), training=replace(kept, momentum=0.0))
    bed = Bed(ScaffoldQ(variate="gradient"), training=kept)
    bed.round([0])
    assert (bed.x, variates(bed)[0]) == pytest.approx((0.9, 1.0))
    bed.round([0])
    assert variates(bed)[0] == pytest.approx(0.9)


def test_under_a_balancing_method_option_one_is_of_its_loss():
    """One full batch from zero variates: the step is -lr times the gradient that option I then measures."""
    method = ReGL(volume=0, objective="bce_onehot", weights="uniform", base=Scaffold(variate="gradient"))
    one = small.bed(method, norm="none", epochs=1, batch=16)
    start = one.server.params.clone()
    one.round()
    for k, reply in enumerate(one.replies):
        assert reply.steps == 1
        assert torch.allclose(one.states[k]["mine.c"], -reply.update.delta / 0.1, atol=1e-5)
    plain = small.bed(Scaffold(variate="gradient"), norm="none", epochs=1, batch=16)
    assert torch.equal(plain.server.params, start)
    plain.round()
    assert not torch.allclose(one.states[0]["mine.c"], plain.states[0]["mine.c"], atol=1e-2)  # of cross-entropy


def test_learning_rate_decay_is_in_the_divisor():
    """c_k of a constant gradient does not depend on eta; a round at a quarter of the rate gives the same."""
    bed = Bed(ScaffoldQ(), training=Training(epochs=1, batch=8, lr=0.1, lr_decay=0.25))
    bed.round([0])
    first = bed.states[0]["mine.c"].item()
    assert first == pytest.approx(1.0)  # f_1'(1)
    bed.round([0])  # from x = 0.9 with corrections c_1 = 1, c = 0.5: the gradient itself is 0.9
    assert bed.states[0]["mine.c"].item() == pytest.approx(0.9, rel=1e-5)


def test_state_is_written_back():
    bed = Bed(ScaffoldQ())
    bed.round([0])
    once = bed.states[0]["mine.c"].clone()
    bed.round([0])
    assert not torch.equal(once, bed.states[0]["mine.c"])


def test_weights_it_cannot_have():
    with pytest.raises(ConfigError, match="weights"):
        Scaffold(weights="trained")
