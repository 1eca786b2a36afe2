"""FedAvg against closed forms (McMahan et al. 2017)."""

from dataclasses import replace

import pytest
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.errors import ConfigError
from fedkeel.local import Training

FedAvgQ = on_quadratic(Algorithm)


@pytest.mark.parametrize(("weights", "expected"), [("samples", 1.4925), ("uniform", 1.265)])
def test_one_round(weights, expected):
    """y_1 = 0.9^2 * 1 = 0.81, y_2 = 3 - 0.8^2 * 2 = 1.72; 1/4 and 3/4 of them, or half and half."""
    bed = Bed(FedAvgQ(weights=weights))
    bed.round()
    assert (bed.y(0), bed.y(1)) == pytest.approx((0.81, 1.72))
    assert bed.x == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "steps", "limit"),
    [("uniform", 2, 27 / 13.75), ("samples", 2, 2.551181), ("uniform", 1, 2.0), ("samples", 1, 18 / 7)],
)
def test_fixed_point(weights, steps, limit):
    """With one step a round the fixed point is the minimiser; with two, clients drift (uniform: 27 / 13.75, not 2)."""
    bed = Bed(FedAvgQ(weights=weights), training=Training(epochs=steps, batch=8, lr=0.1))
    for _ in range(120):
        bed.round()
    assert bed.x == pytest.approx(limit, abs=1e-5)


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_equal_clients_are_centralised_gradient_descent(weights, monkeypatch):
    """Both with f_1: two steps of 1 - 0.1 a round, as one of them alone makes."""
    monkeypatch.setattr("bed.CURVATURE", (1.0, 1.0))
    monkeypatch.setattr("bed.OPTIMUM", (0.0, 0.0))
    bed = Bed(FedAvgQ(weights=weights), sizes=(2, 6))
    for number in (1, 2):
        bed.round()
        assert bed.x == pytest.approx(0.81**number)


@pytest.mark.parametrize(("weights", "expected"), [("samples", 1 - 0.19 / 4), ("uniform", 1 - 0.19 / 2)])
def test_absent_clients_count_as_unchanged(weights, expected):
    """x + sum over the participants of (n_k / n) delta_k, or of delta_k / N."""
    bed = Bed(FedAvgQ(weights=weights, denominator="all"))
    bed.round([0])
    assert bed.x == pytest.approx(expected)


@pytest.mark.parametrize("denominator", ["participants", "all"])
def test_a_constant_shift_of_all_models_shifts_the_average_by_it(denominator):
    """Weights sum to one; with all clients in the denominator, to the participants' share."""
    method = FedAvgQ(denominator=denominator)
    bed = Bed(method)
    bed.round([1])
    update = bed.replies[0].update
    shifted = method.aggregate(bed.server, [replace(update, delta=update.delta + 2.0)]).params
    plain = method.aggregate(bed.server, [update]).params
    assert (shifted - plain).item() == pytest.approx(2.0 if denominator == "participants" else 2.0 * 3 / 4)


def test_the_order_of_updates_does_not_matter():
    bed = Bed(FedAvgQ())
    before = bed.server
    bed.round()
    updates = [reply.update for reply in bed.replies]
    turned = bed.method.aggregate(before, updates[::-1])
    assert torch.allclose(turned.params, bed.server.params, rtol=1e-6)


def test_nothing_remembers_an_earlier_round():
    """A server that has the same weights does the same, whatever it did before."""
    bed, fresh = Bed(FedAvgQ()), Bed(FedAvgQ())
    bed.round([1])
    fresh.server = replace(fresh.server, params=bed.server.params.clone(), round=bed.server.round)
    bed.round()
    fresh.round()
    assert torch.equal(bed.server.params, fresh.server.params)


def test_unknown_total():
    with pytest.raises(ConfigError, match="denominator"):
        Algorithm(weights="trained", denominator="all")
