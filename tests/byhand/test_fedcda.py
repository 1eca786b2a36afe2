"""FedCDA against numbers by hand (Wang et al., ICLR 2024)."""

from dataclasses import replace

import pytest
import tiny
import torch
from bed import Bed, on_quadratic

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedcda import FedCDA, gram, objective
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.cnn import CNN
from fedkeel.records import Samples, Update
from fedkeel.rng import Streams, isolated

FedCDAQ, FedAvgQ = on_quadratic(FedCDA), on_quadratic(Algorithm)


def fed(bed: Bed, models: dict[int, tuple[float, float]]) -> float:
    """A round in which these clients send these scalars, with these losses; the global scalar after it."""
    server = bed.server
    updates = [
        Update(
            1.0,
            torch.tensor([value]) - server.params,
            extra={"loss": torch.tensor(loss)},
            client=client,
            buffers=server.buffers,
        )
        for client, (value, loss) in models.items()
    ]
    bed.server = replace(bed.method.aggregate(server, iter(updates)), round=server.round + 1)
    return bed.x


def chosen(bed: Bed) -> list[float]:
    """The chosen models in the order of clients."""
    rows = bed.server.private["shelf"][bed.server.private["chosen"]].tolist()
    return [bed.server.lab.shelf.get(client, version)["params"].item() for client, version in rows]


def bed_of(method: FedCDA, clients: int = 2, start: float = 0.0) -> Bed:
    bed = Bed(method, sizes=(1,) * clients)
    bed.server = replace(bed.server, params=torch.tensor([start]))
    return bed


@pytest.mark.parametrize("origin", [0.0, 100.0])
def test_objective_by_hand(origin):
    """Caches {0, 2} and {2.5, 10}: half the variances are 0.78125, 12.5, 0.03125 and 8, wherever the origin is."""
    vectors = [torch.zeros(1), *(torch.tensor([w + origin]) for w in (0.0, 2.0, 2.5, 10.0))]
    pairs = torch.tensor([[0, 2], [0, 3], [1, 2], [1, 3]])
    values = objective(gram(vectors), torch.zeros(4, dtype=torch.float64), pairs, (0, 0.0, 0.0), 1.0)
    assert values.tolist() == pytest.approx([0.78125, 12.5, 0.03125, 8.0])


def test_objective_with_fixed_models():
    """Fixed 1 (loss 4) and 3 (loss 0), candidates 5 (loss 2) or -1 (loss 5), L = 3: means 3 and 1.

    (4 + 0 + 2) / 3 + 1.5 * (4 + 0 + 4) / 3 = 6 and (4 + 0 + 5) / 3 + 1.5 * (0 + 4 + 4) / 3 = 7.
    """
    products = gram([torch.tensor([4.0]), torch.tensor([5.0]), torch.tensor([-1.0])])
    losses = torch.tensor([2.0, 5.0], dtype=torch.float64)
    values = objective(products, losses, torch.tensor([[0], [1]]), (2, 10.0, 4.0), 3.0)
    assert values.tolist() == pytest.approx([6.0, 7.0])


def test_inner_products_in_chunks(monkeypatch):
    monkeypatch.setattr("fedkeel.algorithms.fedcda.CHUNK", 3)
    vectors = torch.randn(4, 10, generator=Streams(1)("test"))
    assert torch.allclose(gram(list(vectors)), vectors.double() @ vectors.double().T)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_the_pair_that_lies_closest(shift):
    """(2, 2.5) is chosen, though it is one client's older model and the other's newer: x = 2.25."""
    bed = bed_of(FedCDA(kept=2, groups=1, warmup=1), start=shift)
    fed(bed, {0: (0.0 + shift, 0.0), 1: (10.0 + shift, 0.0)})
    assert fed(bed, {0: (2.0 + shift, 0.0), 1: (2.5 + shift, 0.0)}) == pytest.approx(2.25 + shift)
    bed = bed_of(FedCDA(kept=2, groups=1, warmup=1), start=shift)
    fed(bed, {0: (2.0 + shift, 0.0), 1: (10.0 + shift, 0.0)})
    assert fed(bed, {0: (0.0 + shift, 0.0), 1: (2.5 + shift, 0.0)}) == pytest.approx(2.25 + shift)
    assert chosen(bed) == pytest.approx([2.0 + shift, 2.5 + shift])
    assert bed.server.metrics == pytest.approx({"loss": 0.0, "variance": 0.0625 / 2})


@pytest.mark.parametrize("constant", [0.0, 50.0])
def test_losses_decide_and_a_constant_in_them_does_not(constant):
    """From (2, 2.5) to (0, 2.5) the objective grows by 0.75; a loss of 2 more for model 2 outweighs it by 0.25."""
    for extra, first in ((1.0, 2.0), (2.0, 0.0)):
        bed = bed_of(FedCDA(kept=2, groups=1, warmup=1))
        fed(bed, {0: (2.0, extra + constant), 1: (10.0, constant)})
        fed(bed, {0: (0.0, constant), 1: (2.5, constant)})
        assert chosen(bed) == pytest.approx([first, 2.5])


def test_without_variance_the_losses_alone_decide():
    bed = bed_of(FedCDA(kept=2, groups=1, warmup=1, smoothness=0.0))
    fed(bed, {0: (2.0, 1.0), 1: (10.0, 1.0)})
    assert fed(bed, {0: (0.0, 2.0), 1: (2.5, 2.0)}) == pytest.approx(6.0)


def test_absent_clients_keep_their_choice():
    """Client 1 stays at 10: client 0 chooses 9 over 0, and x is the mean of both although one took part."""
    bed = bed_of(FedCDA(kept=2, groups=3, warmup=0))
    assert fed(bed, {0: (9.0, 0.0), 1: (10.0, 0.0)}) == pytest.approx(9.5)
    assert fed(bed, {0: (0.0, 0.0)}) == pytest.approx(9.5)
    assert fed(bed, {0: (0.5, 0.0)}) == pytest.approx(5.25)  # 9 has left the cache of two


def test_clients_never_drawn_are_left_out():
    bed = bed_of(FedCDA(warmup=0), clients=3)
    assert fed(bed, {0: (4.0, 0.0)}) == pytest.approx(4.0)
    assert fed(bed, {2: (8.0, 0.0)}) == pytest.approx(6.0)


def test_the_cache_is_bounded_and_first_in_first_out():
    bed = bed_of(FedCDA(kept=3, warmup=0))
    for number in range(6):
        fed(bed, {0: (float(number), 0.0), 1: (1.0, 0.0)})
    assert bed.server.private["shelf"].tolist() == [[k, v] for k in (0, 1) for v in (5, 4, 3)]
    assert bed.server.private["chosen"].sum() == 2
    assert sum(len(versions) for versions in bed.server.lab.shelf._versions.values()) == 6


def test_groups_are_near_equal_and_bounded():
    rng = Streams(1)("test")
    sizes = [len(group) for group in FedCDA().split(list(range(10)), rng)]
    assert sorted(sizes) == [3, 3, 4]
    groups = FedCDA(groups=1).split(list(range(100)), rng)
    assert all(3 ** len(group) <= 4096 for group in groups)
    assert sorted(client for group in groups for client in group) == list(range(100))
    assert [len(group) for group in FedCDA(groups=5).split([3, 7], rng)] == [1, 1]
    assert [len(group) for group in FedCDA(kept=1, groups=1).split(list(range(100)), rng)] == [100]


def test_later_groups_are_not_looked_at():
    """One group at a time: the first of two singles sees nobody, so it takes its lowest loss, 3. If it saw the second's
    newest model, far beyond its older one, it would take that."""
    bed = bed_of(FedCDA(kept=2, groups=2, warmup=1))
    fed(bed, {0: (5.0, 1.0), 1: (0.0, 1.0)})
    order = [group[0] for group in bed.method.split([0, 1], bed.server.lab.streams("groups"))]
    first, second = order
    old = {0: 5.0, 1: 0.0}
    far = 100.0 if old[first] > 3 else -100.0
    fed(bed, {k: (3.0, 0.5) if k == first else (far, 0.0) for k in (0, 1)})
    picked = dict(enumerate(chosen(bed)))
    assert picked[first] == pytest.approx(3.0)  # lower loss, nothing else counts
    assert picked[second] == pytest.approx(old[second])  # far nearer to 3 than +-100 is


def test_both_terms_are_reported():
    """Chosen are 9 and 10, with losses 1 and 2: their mean 1.5 and L/2 times the variance, 1.5 * 0.25."""
    bed = bed_of(FedCDA(kept=2, groups=1, warmup=1, smoothness=3.0))
    fed(bed, {0: (9.0, 1.0), 1: (10.0, 2.0)})
    assert bed.server.metrics == {}  # nothing is chosen in the warm-up
    fed(bed, {0: (0.0, 1.0), 1: (40.0, 2.0)})
    assert chosen(bed) == pytest.approx([9.0, 10.0])
    assert bed.server.metrics == pytest.approx({"loss": 1.5, "variance": 1.5 * 0.25})
    assert set(bed.server.private) == {"shelf", "loss", "chosen"}


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_warmup_is_fedavg_bit_for_bit(weights):
    cda, avg = Bed(FedCDAQ(weights=weights)), Bed(FedAvgQ(weights=weights))
    for clients in (None, [1], [0], None):
        assert torch.equal(cda.round(clients).params, avg.round(clients).params)
    assert len(cda.server.private["shelf"]) == 6  # caches are filled meanwhile


def test_one_model_each_and_everyone_is_uniform_fedavg():
    cda, avg = Bed(FedCDAQ(kept=1, warmup=0)), Bed(FedAvgQ(weights="uniform"))
    for _ in range(3):
        cda.round()
        avg.round()
        assert cda.x == pytest.approx(avg.x, rel=1e-6)


def test_one_model_each_and_some_is_the_mean_of_the_latest():
    """Round 1: 0.81 and 1.72 make 1.265; client 0 alone makes 1.02465 of it, and x is its mean with 1.72."""
    bed = Bed(FedCDAQ(kept=1, warmup=0))
    bed.round()
    bed.round([0])
    assert bed.x == pytest.approx((1.265 * 0.81 + 1.72) / 2)


def test_the_loss_is_that_of_the_last_epoch():
    """Client 0 from 1, two epochs of one step: at the second the loss is 0.5 * 0.9^2."""
    bed = Bed(FedCDAQ())
    bed.round([0])
    assert bed.replies[0].update.extra["loss"].item() == pytest.approx(0.405)


def bed_of_images(method: FedCDA, epochs: int) -> Bed:
    rng = Streams(3)
    with isolated(rng("init")):
        model = CNN(width=2, hidden=4, norm="batch").build((1, 16, 16), 2)
    data = [
        Samples.real_ones(
            torch.randint(50 * k, 50 * k + 50, (6, 1, 16, 16), generator=rng("x", k), dtype=torch.uint8),
            torch.arange(6) % 2,
        )
        for k in range(3)
    ]
    return Bed(method, model=model, data=data, training=Training(epochs=epochs, batch=4, lr=0.1))


def test_without_a_step_there_is_a_loss_too():
    """Measured, as there was no epoch that could have one."""
    bed = bed_of_images(FedCDA(), epochs=0)
    bed.round([0])
    assert 0 < bed.replies[0].update.extra["loss"].item() < 100


def test_switching_off_is_noticed():
    """One model of each client leaves no choice; nor does a warm-up that lasts as long as the run."""
    assert FedCDA(kept=1).off(100) == {"kept": 1}
    assert FedCDA(warmup=100).off(100) == {"warmup": 100}
    assert FedCDA(warmup=99).off(100) == FedCDA(kept=2).off() == {}


def test_statistics_are_those_of_the_chosen_models():
    bed = bed_of_images(FedCDA(kept=2, warmup=1), epochs=1)
    for clients in (None, [0, 1], [2]):
        bed.round(clients)
    picked = bed.server.private["shelf"][bed.server.private["chosen"]].tolist()
    states = [bed.server.lab.shelf.get(client, version) for client, version in picked]
    for name in ("params", "buffers"):
        mean = torch.stack([state[name] for state in states]).mean(0)
        assert torch.allclose(getattr(bed.server, name), mean, rtol=1e-5, atol=1e-5)
    assert [client for client, _ in picked] == [0, 1, 2]


def test_the_round_loop_keeps_the_statistics_of_the_chosen(data):
    """K = 1 and everyone: uniform FedAvg, statistics and counters included, up to rounding."""
    cda = run(
        tiny.config(*tiny.BATCHNORM, "algorithm.name=fedcda", "algorithm.kept=1", "algorithm.warmup=0"), data=data
    )
    avg = run(tiny.config(*tiny.BATCHNORM, "algorithm.name=fedavg", "algorithm.weights=uniform"), data=data)
    for name, tensor in cda.weights.items():
        assert torch.allclose(tensor.float(), avg.weights[name].float(), rtol=1e-4, atol=1e-5), name
