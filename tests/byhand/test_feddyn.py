"""FedDyn against closed forms (Acar et al. 2021)."""

from dataclasses import replace

import pytest
import tiny
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.feddyn import FedDyn
from fedkeel.errors import ConfigError
from fedkeel.job import Job
from fedkeel.local import Training
from fedkeel.loop import run

FedDynQ, FedAvgQ = on_quadratic(FedDyn), on_quadratic(Algorithm)
EXACT = Training(epochs=20, batch=8, lr=0.45)  # every local problem here contracts to 0.35 or less in a step


def duals(bed: Bed) -> list[float]:
    return [bed.states[k]["mine.g"].item() if k in bed.states else 0.0 for k in range(len(bed.data))]


def h(bed: Bed) -> float:
    return bed.server.private["h"].item()


def test_two_rounds_and_the_limit():
    """Exact local solves, alpha = 1: theta_k = (a b + g + theta) / (a + 1) = (0.5, 7/3), g = (0.5, -4/3).

    h = -(1/2) (-0.5 + 4/3), theta = 17/12 - h = 1.8333333, then 1.9166667. The limit is the optimum, 2.
    """
    bed = Bed(FedDynQ(alpha=1.0), training=EXACT)
    bed.round()
    assert (bed.y(0), bed.y(1)) == pytest.approx((0.5, 7 / 3))
    assert duals(bed) == pytest.approx([0.5, -4 / 3])
    assert h(bed) == pytest.approx(-0.4166667)
    assert bed.x == pytest.approx(1.8333333)
    bed.round()
    assert bed.x == pytest.approx(1.9166667)
    for _ in range(20):
        bed.round()
    assert bed.x == pytest.approx(2.0, abs=1e-5)


def test_solved_exactly_the_dual_is_the_gradient():
    """g_k = f_k'(theta_k) = a (theta_k - b)."""
    bed = Bed(FedDynQ(alpha=1.0), training=EXACT)
    for _ in range(3):
        bed.round()
    assert duals(bed) == pytest.approx([bed.y(0), 2 * (bed.y(1) - 3)], abs=1e-5)


@pytest.mark.parametrize(("denominator", "x"), [("participants", 0.25), ("all", 0.5)])
def test_partial_participation_divides_h_by_all_clients(denominator, x):
    """theta_1 = 0.5, a step of -0.5, and h = 0.5 / 2. theta = 0.5 - h, or with half of the step 1 - 0.25 - h."""
    bed = Bed(FedDynQ(alpha=1.0, denominator=denominator), training=EXACT)
    bed.round([0])
    assert duals(bed) == pytest.approx([0.5, 0.0])
    assert (h(bed), bed.x) == pytest.approx((0.25, x))


PATTERNS = [[[0], [1], [0, 1]], [[1], [1], [0]], [[0, 1], [0], [0, 1], [1]]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_h_stays_the_mean_of_the_clients(pattern):
    bed = Bed(FedDynQ(alpha=0.5))
    for clients in pattern:
        bed.round(clients)
        assert h(bed) == pytest.approx(sum(duals(bed)) / 2, abs=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_by_size_h_stays_the_weighted_mean(pattern):
    bed = Bed(FedDynQ(alpha=0.5, weights="samples"))
    for clients in pattern:
        bed.round(clients)
        g = duals(bed)
        assert h(bed) == pytest.approx(0.25 * g[0] + 0.75 * g[1], abs=1e-6)


@pytest.mark.parametrize(("weights", "limit"), [("uniform", 2.0), ("samples", 18 / 7)])
def test_the_limit_minimises_the_objective_of_its_weights(weights, limit):
    bed = Bed(FedDynQ(alpha=1.0, weights=weights), training=EXACT)
    for _ in range(30):
        bed.round()
    assert bed.x == pytest.approx(limit, abs=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alpha_scaled_by_size(pattern):
    """alpha_k = alpha * 2 / n_k = (2 alpha, 2/3 alpha); h = (1/N) sum (alpha / alpha_k) g_k."""
    bed = Bed(FedDynQ(alpha=0.5, alpha_scaling="inverse_size"))
    for clients in pattern:
        before = duals(bed)
        bed.round(clients)
        for reply in bed.replies:
            k = reply.client
            strength = (1.0, 1 / 3)[k]
            assert duals(bed)[k] == pytest.approx(before[k] - strength * reply.update.delta.item(), abs=1e-6)
        g = duals(bed)
        assert h(bed) == pytest.approx((0.5 / 1.0 * g[0] + 0.5 * 3 * g[1]) / 2, abs=1e-6)


def test_scaled_alpha_is_in_the_local_problem():
    """alpha = 1: theta_1 = (0 + 2 * 1) / (1 + 2) = 2/3, theta_2 = (6 + 2/3) / (2 + 2/3) = 2.5."""
    bed = Bed(FedDynQ(alpha=1.0, alpha_scaling="inverse_size"), training=EXACT)
    bed.round()
    assert (bed.y(0), bed.y(1)) == pytest.approx((2 / 3, 2.5))


@pytest.mark.parametrize("alpha", [1e-3, 1e-5])
def test_a_small_alpha_is_not_fedavg(alpha):
    """theta = 2 mean - theta_0 = 2 * 1.265 - 1, since h / alpha does not depend on alpha's scale."""
    bed = Bed(FedDynQ(alpha=alpha))
    bed.round()
    assert bed.x == pytest.approx(1.53, abs=1e-3)


def test_without_alpha_and_h_it_is_uniform_fedavg_bit_for_bit():
    feddyn, fedavg = Bed(FedDynQ(alpha=0.0, server_correction=False)), Bed(FedAvgQ(weights="uniform"))
    for clients in ([0, 1], [1], [0, 1]):
        assert torch.equal(feddyn.round(clients).params, fedavg.round(clients).params)


def test_the_mean_of_the_participants_is_reported_too():
    """(0.5 + 7/3) / 2, from which h / alpha is not subtracted; client 0 alone in the next round."""
    bed = Bed(FedDynQ(alpha=1.0), training=EXACT)
    bed.round()
    assert bed.server.beside["participants"].item() == pytest.approx(17 / 12)
    bed.round([0])
    assert bed.server.beside["participants"].item() == pytest.approx(bed.y(0))
    bed = Bed(FedDynQ(alpha=1.0, server_correction=False))
    bed.round()
    assert bed.server.beside == {}  # it is the server's model


def test_records_have_the_accuracy_of_the_participants_mean(data):
    """In the first round, in which g_k = 0, it is FedAvg's model as long as alpha and clipping do nothing."""
    table = {"algorithm": {"name": "feddyn", "alpha": 1e-7, "clip": 0.0}}
    dyn = run(tiny.config("rounds=3", "evaluate.every=2", table=table), data=data)
    avg = run(tiny.config("rounds=1", "algorithm.name=fedavg", "algorithm.weights=uniform"), data=data)
    first = run(tiny.config("rounds=1", table=table), data=data)
    for name in ("accuracy", "loss"):
        found = first.rounds[0][f"method/participants/{name}"]
        assert found == pytest.approx(avg.rounds[0][f"global/{name}"], rel=1e-4)
    assert first.rounds[0]["global/loss"] != pytest.approx(avg.rounds[0]["global/loss"], rel=1e-3)
    assert ["method/participants/accuracy" in record for record in dyn.rounds] == [False, True, True]


def test_without_h_the_server_only_averages():
    bed = Bed(FedDynQ(alpha=1.0, server_correction=False), training=EXACT)
    bed.round()
    assert bed.x == pytest.approx(17 / 12)
    assert bed.server.private == {}
    assert duals(bed) == pytest.approx([0.5, -4 / 3])  # the local problems are as before


@pytest.mark.parametrize("distance", [1.0, 2.0])
def test_the_gradient_of_the_regulariser(distance):
    """alpha (w - theta) - g_k: squared, so twice as strong at twice the distance; and never detached."""
    bed = Bed(FedDynQ(alpha=0.5))
    local = bed.worker.open(bed.server, 0, None)
    local.mine = {"g": torch.tensor([0.125])}
    local.params.add_(distance)
    assert bed.method.correct(local, torch.zeros(1)).item() == pytest.approx(0.5 * distance - 0.125)


@pytest.mark.parametrize(("clip", "norm"), [(10.0, 10.0), (0.0, 30.0), (50.0, 30.0)])
def test_clipping(clip, norm):
    bed = Bed(FedDynQ(clip=clip))
    local = bed.worker.open(bed.server, 0, None)
    assert bed.method.correct(local, torch.tensor([30.0])).item() == pytest.approx(norm)


def test_clipping_is_of_the_whole_regularised_gradient():
    """f' = 4, alpha (w - theta) = 20, clip 12: 12, not 4 + 12."""
    bed = Bed(FedDynQ(alpha=10.0, clip=12.0))
    local = bed.worker.open(bed.server, 0, None)
    local.params.add_(2.0)
    assert bed.method.correct(local, torch.tensor([4.0])).item() == pytest.approx(12.0)


def test_state_is_written_back():
    bed = Bed(FedDynQ())
    bed.round([0])
    once = bed.states[0]["mine.g"].clone()
    bed.round([0])
    assert not torch.equal(once, bed.states[0]["mine.g"])


def test_a_late_joiner_starts_without_dual():
    bed = Bed(FedDynQ())
    bed.round([0])
    assert bed.worker.open(bed.server, 1, None).mine["g"].item() == 0.0


def test_what_crosses():
    """The model and its change; h stays on the server, g_k on the client."""
    bed = Bed(FedDynQ())
    bed.round()
    assert bed.server.shared == {} and all(reply.update.extra == {} for reply in bed.replies)
    assert bed.method.mail(bed.server, 0) == {}
    scaled = FedDynQ(alpha_scaling="inverse_size")
    assert {name: tensor.item() for name, tensor in scaled.mail(bed.server, 0).items()} == {"mean_size": 2.0}


def test_options():
    assert FedDyn().off() == {}
    assert FedDyn(alpha=0.0, server_correction=False).off() == {"alpha": 0.0}
    with pytest.raises(ConfigError, match="alpha"):
        FedDyn(alpha=0.0)
    with pytest.raises(ConfigError, match="weights"):
        FedDyn(weights="trained")


def test_buffers_are_averaged_uniformly(data):
    """Without a correction it is FedAvg bit by bit. With h the weights are others, and statistics, after a round whose
    local steps were the same, still the plain average."""
    table = {"partition": {"name": "dirichlet", "alpha": 0.5}}
    off = {"name": "feddyn", "alpha": 0.0, "server_correction": False, "clip": 0.0}
    fedavg = run(tiny.config(*tiny.BATCHNORM, "algorithm.weights=uniform", table=table), data=data)
    feddyn = run(tiny.config(*tiny.BATCHNORM, table={**table, "algorithm": off}), data=data)
    assert all(torch.equal(fedavg.weights[name], feddyn.weights[name]) for name in fedavg.weights)
    # one local step: its gradient is taken at w = theta with g = 0, where nothing is corrected
    once = (*tiny.BATCHNORM, "rounds=1", "local.epochs=1", "local.max_steps=1")
    fedavg = run(tiny.config(*once, "algorithm.weights=uniform", table=table), data=data)
    with_h = {"name": "feddyn", "alpha": 0.1, "clip": 0.0}
    feddyn = run(tiny.config(*once, table={**table, "algorithm": with_h}), data=data)
    others = [name for name in fedavg.weights if not torch.equal(fedavg.weights[name], feddyn.weights[name])]
    assert others and not any("running_" in name for name in others)


def test_the_mean_size_is_of_all_who_have_joined(data):
    """Of sites not all are known when the run begins."""
    job = Job(tiny.config("algorithm.name=feddyn", "algorithm.alpha_scaling=inverse_size"), data)
    server = replace(job.first_server(), samples=4)
    assert job.mail(server, 0)["mean_size"].item() == pytest.approx(job.total / job.clients) != 4 / job.clients


@pytest.mark.parametrize("scaling", ["none", "inverse_size"])
def test_a_run_with_batchnorm(data, scaling):
    table = {"algorithm": {"name": "feddyn", "alpha_scaling": scaling}}
    result = run(tiny.config(*tiny.BATCHNORM, "rounds=8", "participation=0.5", table=table), data=data)
    assert all(record["global/loss"] is not None for record in result.rounds)
    assert all(bool((t > 0).all()) for name, t in result.weights.items() if name.endswith("running_var"))
