"""ReGL against the numeric checks of its reading (Yao 2024).

Check 8 is in test_personal.py; 10 and 12, and 11 with tuned generators, are in test_tuning.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bed import Bed
from test_fbl import bed, images, prepared

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.moon import Moon
from fedkeel.algorithms.regl import ReGL
from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.errors import ConfigError
from fedkeel.local import Training, batches, mixed
from fedkeel.options import build
from fedkeel.partition.single_class import SingleClass
from fedkeel.personal import Personal, tuning_samples
from fedkeel.records import Batch, Update


@pytest.mark.parametrize(
    ("mode", "counts", "fake"),
    [
        ("top_up", [10, 3, 0], [0, 7, 10]),  # check 2
        ("uniform", [10, 3, 0], [10, 10, 10]),  # check 3
        ("missing_only", [10, 3, 0], [0, 0, 10]),  # check 4
        ("top_up", [14, 3, 0], [0, 7, 10]),  # check 5: real samples are never cut
    ],
)
def test_fill(mode, counts, fake):
    plan = ReGL(volume=10, mode=mode).plan(torch.tensor(counts), "constrained")
    assert (plan.real.tolist(), plan.fake.tolist()) == (counts, fake)
    samples = prepared(bed(ReGL(volume=10, mode=mode), [counts]))
    assert samples.counts(3).tolist() == [a + b for a, b in zip(counts, fake, strict=True)]


def test_no_volume_is_fedavg_bit_for_bit():
    """Check 1."""
    regl, avg = bed(ReGL(volume=0), [[9, 1, 0], [0, 4, 6]]), bed(Algorithm(), [[9, 1, 0], [0, 4, 6]])
    for _ in range(3):
        assert torch.equal(regl.round().params, avg.round().params)
    assert ReGL(volume=0).off() == {"volume": 0}


@pytest.mark.parametrize(("weights", "expected"), [("samples", 3.0), ("uniform", 2.0), ("trained", 52 / 24)])
def test_weights(weights, expected):
    """Check 6: N = (1, 3), local models 0 and 4, ten synthetic images each."""
    method = ReGL(weights=weights, volume=10, mode="uniform")
    one = Bed(method, sizes=(1, 3), classes=1, images=lambda k, counts, first: images(k, counts, first))
    sizes = {"samples": (1.0, 3.0), "uniform": (1.0, 1.0), "trained": (11.0, 13.0)}[weights]
    for k, size in enumerate(sizes):
        local = one.worker.open(one.server, k, None)
        fakes = images(k, torch.tensor([10]), 0)
        local.samples = local.data + type(fakes)(
            torch.zeros(10, 1, 1, 1, dtype=torch.uint8), fakes.y, fakes.fake, fakes.index
        )
        assert method.upload(local).weight == size
    moved = [Update(size, torch.tensor([goal - one.x])) for size, goal in zip(sizes, (0.0, 4.0), strict=True)]
    assert method.aggregate(one.server, moved).params.item() == pytest.approx(expected)


def test_a_client_without_generator_is_fedavg():
    regl = bed(ReGL(volume=4), [[9, 1, 0], [0, 4, 6]], profiles=["none", "none"])
    avg = bed(Algorithm(), [[9, 1, 0], [0, 4, 6]])
    assert torch.equal(regl.round().params, avg.round().params)


def test_traffic_is_fedavgs():
    """Check 11."""
    regl, avg = bed(ReGL(volume=4), [[9, 1, 0]]), bed(Algorithm(), [[9, 1, 0]])
    regl.round()
    avg.round()
    assert (regl.replies[0].bytes_up, regl.replies[0].bytes_down) == (
        avg.replies[0].bytes_up,
        avg.replies[0].bytes_down,
    )


def test_clients_get_images_of_their_own():
    one = bed(ReGL(volume=4), [[9, 1, 0], [0, 4, 6]])
    x = [prepared(one, k) for k in (0, 1)]
    assert [each.x[each.fake][0, 0, 0, 0].item() for each in x] == [0, 1]


def test_printed_objective():
    """Equation 3 is binary cross-entropy over one-hot labels: with zero logits log 2, not log C."""
    one = bed(ReGL(volume=0, objective="bce_onehot"), [[4, 4, 4]])
    local = one.worker.open(one.server, 0, None)
    local.params.zero_()
    batch = Batch(torch.zeros(3, 1, 4, 4), torch.arange(3), torch.zeros(3).bool(), torch.arange(3))
    assert one.method.loss(local, batch).item() == pytest.approx(0.6931472)
    plain = ReGL(volume=0).loss(local, batch).item()
    assert plain == pytest.approx(1.0986123)
    # personal models are tuned by the same loss (4.2)
    assert one.method.tuning().loss(local, batch).item() == pytest.approx(0.6931472)
    assert ReGL().tuning().loss(local, batch).item() == pytest.approx(1.0986123)


def test_printed_objective_over_a_loss_of_its_own():
    """It would take the place of the other method's whole loss."""
    with pytest.raises(ConfigError, match="objective = 'bce_onehot': Moon has a loss of its own: must be 'ce' over it"):
        ReGL(objective="bce_onehot", base=Moon())
    ReGL(objective="bce_onehot", base=Scaffold())  # whose term is of the gradient
    ReGL(base=Moon())


def test_over_scaffold():
    one = bed(
        ReGL(volume=3, base=Scaffold(), weights="uniform"), [[9, 1, 0], [0, 4, 6]], training=Training(epochs=1, lr=0.1)
    )
    one.round([0])
    one.round([0, 1])
    mean = (one.states[0]["mine.c"] + one.states[1]["mine.c"]) / 2
    assert torch.allclose(one.server.shared["c"], mean, atol=1e-6)


def test_the_two_forms():
    """Presets TF and FT; who tunes (R-17): enough images, and a generator."""
    free, tuned = (build(ReGL, ReGL.presets[name]) for name in ("TF", "FT"))
    assert free == ReGL() and tuned == ReGL(tune=True)
    counts = torch.tensor([9, 1, 0])
    assert not free.tunes_generator(counts, "constrained")
    assert tuned.tunes_generator(counts, "constrained") and tuned.tunes_generator(counts, "unconstrained")
    assert tuned.tunes_generator(torch.tensor([0, 10, 0]), "constrained")  # one class is enough
    assert not tuned.tunes_generator(torch.tensor([5, 4, 0]), "constrained")
    assert ReGL(tune=True, min_images=9).tunes_generator(torch.tensor([5, 4, 0]), "constrained")
    assert not tuned.tunes_generator(counts, "none")
    assert not Algorithm().tunes_generator(counts, "constrained")


@pytest.mark.parametrize(("ratio", "real"), [(0.25, 2), (0.75, 6), (0.01, 1), (0.99, 7)])
def test_a_share_of_real_samples_in_each_batch(ratio, real):
    """R-16. 12 real and 12 synthetic samples, batches of 8: as many steps as without, at least one of each kind."""
    one = bed(ReGL(volume=4, real_ratio=ratio), [[6, 4, 2]])
    local = one.worker.open(one.server, 0, None)
    local.samples = one.method.prepare(local)
    found = list(batches(local))
    assert [(int((~batch.fake).sum()), len(batch)) for batch in found] == [(real, 8)] * 3
    index = torch.cat([batch.index[~batch.fake] for batch in found])
    assert len(index.unique()) == min(3 * real, 12)  # none again before all have come
    plain = bed(ReGL(volume=4), [[6, 4, 2]])
    local = plain.worker.open(plain.server, 0, None)
    local.samples = plain.method.prepare(local)
    assert torch.cat([batch.index[~batch.fake] for batch in batches(local)]).sort().values.tolist() == list(range(12))


@pytest.mark.parametrize(("batch", "found"), [(64, [(12, 24)]), (20, [(10, 20), (2, 4)]), (23, [(12, 23), (1, 1)])])
def test_a_share_of_real_samples_in_smaller_batches(batch, found):
    """The last batch, or the only one, has its own share; one of a single sample has it of the nearer kind."""
    order, fake = torch.arange(24), torch.arange(24) >= 12
    parts = torch.split(mixed(order, fake, batch, 0.5), batch)
    assert [(int((~fake[part]).sum()), len(part)) for part in parts] == found


def test_no_share_where_there_is_one_kind_only():
    """Bit for bit the same as without."""
    shared, plain = (bed(ReGL(volume=0, real_ratio=ratio), [[9, 1, 0], [0, 4, 6]]) for ratio in (0.5, None))
    assert torch.equal(shared.round().params, plain.round().params)


def test_tuning_a_personal_model_takes_synthetic_images_of_owned_classes():
    """Check 7: counts (10, 3, 0), by appendix B (R-15)."""
    one = bed(ReGL(volume=5), [[10, 3, 0]])
    local = one.worker.open(one.server, 0, None)
    job = SimpleNamespace(method=one.method, config=SimpleNamespace(personal=Personal()))
    samples = tuning_samples(job, local)
    assert samples.take(samples.fake).counts(3).tolist() == [5, 5, 0]
    assert samples.take(~samples.fake).counts(3).tolist() == [10, 3, 0]


def test_single_class_clients():
    """Check 9: client k has one class and the union of all is the training set."""
    labels = torch.arange(60) % 5
    parts = SingleClass().split(labels, 5, 5, np.random.default_rng(0))
    assert [len(labels[rows].unique()) for rows in parts] == [1] * 5
    assert torch.cat(list(parts)).sort().values.tolist() == list(range(60))
    plan = ReGL(volume=4, mode="missing_only").plan(labels[parts[0]].bincount(minlength=5), "constrained")
    assert sorted(plan.fake.tolist()) == [0, 4, 4, 4, 4]
