"""FBL against the sixteen numeric checks of its reading and every option's own meaning (Li, Xu et al. 2026)."""

from dataclasses import replace
from math import log

import pytest
import torch
from bed import Bed, plain_transform
from torch import nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fbl import FBL, Aligned
from fedkeel.algorithms.feddbe import FedDBE
from fedkeel.algorithms.feddyn import FedDyn
from fedkeel.algorithms.fedprox import FedProx
from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.balance.choose import choose
from fedkeel.balance.point import balance_point, balanced
from fedkeel.balance.replay import carried, replay
from fedkeel.errors import ConfigError, EmptyClient
from fedkeel.local import Training
from fedkeel.models.split import Split
from fedkeel.options import build, options
from fedkeel.records import Batch, Samples
from fedkeel.rng import Streams, isolated
from fedkeel.weights import Rule

TRAINING = Training(epochs=2, batch=8, lr=0.1)


def net(classes: int = 4, norm: bool = False) -> Split:
    """A small network, always the same."""
    with isolated(Streams(5)("init")):
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)]
        if norm:
            layers.insert(1, nn.BatchNorm2d(4))
        return Split(nn.Sequential(*layers), nn.Linear(6, classes), 6)


def client(counts: list[int], seed: int = 0) -> Samples:
    """Random images, labels shuffled, with these counts."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=rng)]
    return Samples.real_ones(torch.randint(0, 2, (len(y), 1, 4, 4), generator=rng, dtype=torch.uint8), y)


def images(client: int, counts: torch.Tensor, first: int) -> Samples:
    """Synthetic images that say who asked and which number they are: [client, label, number, ...]."""
    y = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number = torch.cat([torch.arange(int(n)) for n in counts]) + first
    x = torch.zeros(len(y), 1, 4, 4, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1], x[:, 0, 0, 2] = client, y.to(torch.uint8), number.to(torch.uint8)
    return Samples.fake_ones(x, y)


def bed(method: Algorithm, counts: list[list[int]], norm: bool = False, **more) -> Bed:
    more = {"training": TRAINING, "images": images, **more}
    data = [client(each, seed) for seed, each in enumerate(counts)]
    return Bed(method, model=net(len(counts[0]), norm), data=data, classes=len(counts[0]), **more)


def prepared(one: Bed, k: int = 0, number: int = 0) -> Samples:
    """What client k trains on in round `number`."""
    local = one.worker.open(replace(one.server, round=number), k, one.states.get(k))
    return one.method.prepare(local)


def two_cycles(method: FBL, counts: list[int]) -> tuple[Bed, torch.Tensor, torch.Tensor]:
    """The real samples kept in rounds 0 and 1; the network is left as received in the latter."""
    one = bed(replace(method, period=1), [counts])
    one.round()
    return one, one.states[0]["mine.kept"], prepared(one, number=1).real.index


# the balance point, checks 1 to 5 and 13 ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "profile", "real", "fake"),
    [
        ([10, 0, 2, 0], "constrained", [3, 0, 2, 0], [0, 3, 1, 3]),  # check 1: B = 3
        ([9, 5, 3, 1], "constrained", [4, 4, 3, 1], [0, 0, 1, 3]),  # check 2: B = 4, total 16
        ([9, 5, 3, 1], "unconstrained", [9, 5, 3, 1], [0, 4, 6, 8]),  # check 3: B = 9, total 36
        ([5, 5, 5], "constrained", [5, 5, 5], [0, 0, 0]),  # check 4
        ([9, 5, 3, 1], "none", [9, 5, 3, 1], [0, 0, 0, 0]),
        ([2, 0, 1, 0], "constrained", [2, 0, 1, 0], [0, 0, 0, 0]),  # B = 0: like FedAvg (F-07)
    ],
)
def test_plan(counts, profile, real, fake):
    plan = FBL().plan(torch.tensor(counts), profile)
    assert (plan.real.tolist(), plan.fake.tolist()) == (real, fake)
    samples = prepared(bed(FBL(), [counts], profiles=[profile]))
    assert samples.real.counts(len(counts)).tolist() == real
    assert samples.take(samples.fake).counts(len(counts)).tolist() == fake


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_is_kept(seed):
    """Constrained: C * floor(N / C) samples, never more than before. Unconstrained: C * max n_c."""
    counts = torch.randint(0, 40, (7,), generator=torch.Generator().manual_seed(seed))
    mean, most = FBL().plan(counts, "constrained"), FBL().plan(counts, "unconstrained")
    assert int((mean.real + mean.fake).sum()) == 7 * (int(counts.sum()) // 7) <= int(counts.sum())
    assert int((most.real + most.fake).sum()) == 7 * int(counts.max())
    assert torch.equal(most.real, counts)


def test_more_classes_than_samples():
    """Check 5: C = 100, N = 60. Never an empty round."""
    counts = [1] * 60 + [0] * 40
    assert int(balance_point(torch.tensor(counts)).max()) == 0
    assert len(prepared(bed(FBL(), [counts]))) == 60
    one_each = prepared(bed(FBL(zero_policy="min_one"), [counts]))
    assert one_each.counts(100).tolist() == [1] * 100
    skipping = bed(FBL(zero_policy="skip"), [counts])
    assert skipping.worker.fit(skipping.server, 0, None).failure == "nothing to train on in this round"


@pytest.mark.parametrize("rounding", ["floor", "nearest", "distribute_remainder"])
@pytest.mark.parametrize(
    ("policy", "real", "fake"),
    [
        ("fedavg", [2, 0, 1, 0], [0, 0, 0, 0]),
        ("min_one", [1, 0, 1, 0], [0, 1, 0, 1]),
        ("skip", [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_rounding_does_not_override_the_policy(policy, real, fake, rounding):
    """N = 3, C = 4: 0.75 a class rounds to 1, which is more than there is; the policy is asked all the same (F-07)."""
    plan = FBL(zero_policy=policy, rounding=rounding).plan(torch.tensor([2, 0, 1, 0]), "constrained")
    assert (plan.real.tolist(), plan.fake.tolist()) == (real, fake)
    free = FBL(zero_policy=policy, rounding=rounding).plan(torch.tensor([2, 0, 1, 0]), "unconstrained")
    assert (free.real.tolist(), free.fake.tolist()) == ([2, 0, 1, 0], [0, 2, 1, 2])  # its point is the largest class


@pytest.mark.parametrize(
    ("rounding", "points"),
    [("floor", [4, 4, 4, 4]), ("nearest", [5, 5, 5, 5]), ("distribute_remainder", [5, 5, 4, 4])],
)
def test_rounding(rounding, points):
    """N = 18, C = 4: 4.5 a class (F-05). The remainder goes to the largest classes and the total is N."""
    assert balance_point(torch.tensor([9, 5, 3, 1]), rounding=rounding).tolist() == points


def test_no_samples_no_point():
    with pytest.raises(EmptyClient):
        balance_point(torch.tensor([0, 0]))


def test_fill_without_cutting():
    plan = FBL(cut=False).plan(torch.tensor([9, 5, 3, 1]), "constrained")
    assert (plan.real.tolist(), plan.fake.tolist()) == ([9, 5, 3, 1], [0, 0, 1, 3])


# knowledge sampling, checks 6 to 9 and 16 ---------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "expected"), [("loss", [3, 1]), ("low_loss", [0, 2])])
def test_ranking(rule, expected):
    """Check 6."""
    scores = torch.tensor([0.1, 0.5, 0.3, 0.9])
    assert choose(torch.arange(4), scores, 2, rule, torch.Generator()).tolist() == expected


def test_ties_go_by_number():
    assert choose(torch.tensor([7, 2, 5]), torch.ones(3), 2, "loss", torch.Generator()).tolist() == [2, 5]


@pytest.mark.parametrize(
    ("n", "gamma", "shortage", "size", "common"),
    [
        (250, 0.1, "fill_from_old", 100, 10),  # check 7
        (120, 0.1, "fill_from_old", 100, 80),  # check 8
        (120, 0.1, "shrink", 30, 10),
        (120, 0.1, "with_replacement", 100, 10),
        (100, 0.1, "with_replacement", 100, 100),  # no new ones at all
        (250, 1.0, "fill_from_old", 100, 100),  # check 9
        (250, 0.0, "fill_from_old", 100, 0),
    ],
)
def test_replay(n, gamma, shortage, size, common):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(3))
    last = torch.arange(0, 100)
    rng = torch.Generator().manual_seed(4)
    kept = replay(torch.arange(n), last, scores, 100, gamma, shortage=shortage, rng=rng)
    assert len(kept) == size
    assert int(torch.isin(kept, last).sum()) == common
    assert shortage == "with_replacement" or len(kept.unique()) == size


def test_replay_takes_the_highest_losses_of_both_parts():
    scores = torch.arange(10.0)
    kept = replay(torch.arange(10), torch.arange(4), scores, 4, 0.25, rng=torch.Generator())
    assert kept.tolist() == [3, 9, 8, 7]


@pytest.mark.parametrize(("gamma", "point", "old"), [(0.1, 4, 0), (0.1, 5, 1), (0.5, 5, 3), (0.7, 45, 32), (1.0, 7, 7)])
def test_halves_are_rounded_up(gamma, point, old):
    """F-13. 0.7 * 45 is 31.5, which no floating-point product comes to."""
    assert carried(gamma, point) == old


@pytest.mark.parametrize(("shortage", "size", "common"), [("fill_from_old", 100, 90), ("shrink", 90, 90)])
def test_what_replay_may_no_longer_keep_is_replaced(shortage, size, common):
    """n = 150, B = 100, gamma = 1: ten of the old are among fifteen that a guard has since taken out of the pool."""
    pool, last = torch.arange(10, 145), torch.arange(100)
    kept = replay(pool, last, torch.rand(135), 100, 1.0, shortage=shortage, rng=torch.Generator())
    assert len(kept.unique()) == len(kept) == size
    assert int(torch.isin(kept, last).sum()) == common


@pytest.mark.parametrize(("gamma", "common"), [(0.1, 1), (0.7, 7), (0.9, 9)])
def test_gamma_of_each_class_returns(gamma, common):
    """B = 10 of 30 in each of two classes, so there are new ones enough."""
    one, first, second = two_cycles(FBL(carry=gamma), [30, 30, 0, 0, 0, 0])
    returned = second[torch.isin(second, first)]
    assert one.data[0].y[second].bincount().tolist() == [10, 10]
    assert one.data[0].y[returned].bincount().tolist() == [common, common]


@pytest.mark.parametrize(
    ("shortage", "size", "common"), [("fill_from_old", 8, 4), ("shrink", 5, 1), ("with_replacement", 8, 1)]
)
def test_shortage(shortage, size, common):
    """B = 8 of 12: one returns, and of the seven that should come in there are four."""
    one, first, second = two_cycles(FBL(carry=0.1, shortage=shortage), [12, 6, 6])
    first, second = (kept[one.data[0].y[kept] == 0] for kept in (first, second))
    assert (len(second), int(torch.isin(second, first).sum())) == (size, common)


@pytest.mark.parametrize(
    ("sampling", "old", "new"), [("loss", "loss", "low_loss"), ("loss", "low_loss", "loss"), ("low_loss", "loss", None)]
)
def test_each_part_has_its_own_ranking(sampling, old, new):
    """F-12: of B = 10 five return by one rule and five come in by the other, which by default is that of sampling."""
    method = FBL(sampling=sampling, replay_old=old, replay_new=new, carry=0.5)
    one, first, second = two_cycles(method, [40, 0, 0, 0])
    with torch.no_grad():
        logits = one.worker.model.eval()(one.data[0].x.float())
        loss = nn.functional.cross_entropy(logits, one.data[0].y, reduction="none")
    others, goal = torch.tensor(sorted(set(range(40)) - set(first.tolist()))), []
    for pool, rule in ((first, old), (others, new or sampling)):
        goal += pool[loss[pool].argsort(descending=rule == "loss", stable=True)[:5]].tolist()
    assert second.tolist() == sorted(goal)


def test_random_choices_without_carry_pass_nobody_over():
    """Counts (30, 30, 12, 0), B = 18: 12 of a class are unused and come in, 6 return by lot. So each sample is kept in
    18 of 30 rounds, and none in all of them."""
    one = bed(FBL(sampling="random", carry=0.0, period=1), [[30, 30, 12, 0]])
    kept = torch.zeros(72)
    for _ in range(60):
        one.round()
        kept[one.states[0]["mine.kept"]] += 1
    for label in (0, 1):
        often = kept[one.data[0].y == label]
        assert often.sum() == 60 * 18
        assert 26 <= often.min() <= often.max() <= 46  # 36 on average
    assert kept[one.data[0].y == 2].tolist() == [60] * 12


def test_the_kept_have_the_highest_losses():
    """Equation 7, on the network's own losses, in evaluation mode and without augmentation."""
    one = bed(FBL(), [[20, 2, 2, 0]], norm=True)
    kept = prepared(one).real.index
    data, model = one.data[0], one.worker.model.eval()
    with torch.no_grad():
        logits = model(plain_transform(data.x, rng=None, augment=None, device="cpu"))
        loss = nn.functional.cross_entropy(logits, data.y, reduction="none")
    mine = torch.nonzero(data.y == 0)[:, 0]
    best = mine[loss[mine].argsort(descending=True)[:6]]
    assert set(kept[data.y[kept] == 0].tolist()) == set(best.tolist())
    assert kept.tolist() == sorted(kept.tolist())


def test_the_mean_loss_of_the_kept_is_on_record():
    """Of 20 the six of highest loss, in the round of the choice only; nobody measures losses for a random one."""
    one = bed(FBL(period=2), [[20, 2, 2, 0]])
    data, model = one.data[0], one.worker.model.eval()
    mine = data.y == 0
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(data.x[mine].float()), data.y[mine], reduction="none")
    found = []
    for _ in range(3):
        one.round()
        found.append(one.replies[0].metrics)
    assert found[0]["method/kept_loss"] == pytest.approx(loss.sort().values[-6:].mean().item(), abs=1e-6)
    assert ["method/kept_loss" in each for each in found] == [True, False, True]
    random = bed(FBL(sampling="random"), [[20, 2, 2, 0]])
    random.round()
    assert not random.replies[0].metrics


def test_the_guard_against_noise_leaves_out_the_highest():
    top = prepared(bed(FBL(), [[20, 2, 2, 0]])).real
    calm = prepared(bed(FBL(skip_top=0.1), [[20, 2, 2, 0]])).real
    lost = set(top.index.tolist()) - set(calm.index.tolist())
    assert len(lost) == 2
    assert len(calm) == len(top)


@pytest.mark.parametrize("share", [0.7, 0.75, 0.99])
def test_the_guard_takes_no_more_than_the_point_leaves(share):
    """20 samples, B = 6: at most 14 are guarded, and the six of lowest loss are kept."""
    calm = prepared(bed(FBL(skip_top=share), [[20, 2, 2, 0]])).real
    lowest = prepared(bed(FBL(sampling="low_loss"), [[20, 2, 2, 0]])).real
    assert torch.equal(calm.index, lowest.index)


def test_the_guard_shrinks_no_class_at_replay():
    """Whom the guard takes out of the last choice is replaced: always B = 21 of 60."""
    one = bed(FBL(skip_top=0.4, carry=1.0, period=1, drop=0), [[60, 2, 2, 20]])
    for _ in range(4):
        one.round()
        assert int((one.data[0].y[one.states[0]["mine.kept"]] == 0).sum()) == 21


def test_when_choices_are_made():
    """Check 16: m = 50, the client takes part in rounds 3, 48, 51, 99, 160: chosen at 3, 51 and 160."""
    one, chosen, last = bed(FBL(period=50), [[30, 2, 0, 0]]), [], None
    for number in (3, 48, 51, 99, 160):
        one.server = replace(one.server, round=number)
        one.round()
        kept = one.states[0]["mine.kept"]
        chosen += [number] if last is None or not torch.equal(kept, last) else []
        last = kept
    assert chosen == [3, 51, 160]


def test_the_clock_can_count_participations():
    """Chosen anew at the first, third and fifth visit, and kept in between, however many rounds pass."""
    one, cycles, chosen, last = bed(FBL(period=2, clock="participation"), [[30, 2, 0, 0]]), [], [], None
    for number in (3, 48, 51, 99, 160):
        one.server = replace(one.server, round=number)
        one.round()
        cycles.append(int(one.states[0]["mine.cycle"]))
        kept = one.states[0]["mine.kept"]
        chosen += [number] if last is None or not torch.equal(kept, last) else []
        last = kept
    assert cycles == [0, 0, 1, 1, 2]
    assert chosen == [3, 51, 160]


def test_period_zero_chooses_once():
    one = bed(FBL(period=0), [[30, 2, 0, 0]])
    first = prepared(one).real.index
    one.round()
    assert torch.equal(prepared(one, number=500).real.index, first)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scorer", ["global", "local_last", "running"])
def test_scorers_differ_in_whose_losses_they_use(scorer, norm):
    """The second choice is made by the received model, by the last local one with its statistics, or by the losses seen
    meanwhile."""
    one = bed(FBL(period=1, carry=0.0, scorer=scorer), [[40, 2, 2, 0]], norm=norm)
    one.round()
    state, x, y = one.states[0], one.data[0].x[:10].float(), one.data[0].y[:10]
    with torch.no_grad():
        local_scores = nn.functional.cross_entropy(one.worker.model.eval()(x), y, reduction="none")
    zeros, buffers = torch.zeros_like(one.server.params), one.server.buffers + 1.0
    one.server = replace(one.server, params=zeros, buffers=buffers)  # the received one ranks nothing
    local = one.worker.open(one.server, 0, state)
    before = one.worker.weights.flat.clone()
    scores = one.method.scores(local, torch.arange(10))
    assert torch.equal(before, one.worker.weights.flat)
    if scorer == "global":
        assert torch.allclose(scores, torch.full((10,), 4.0).log())
    elif scorer == "local_last":
        assert torch.allclose(scores, local_scores, atol=1e-6)
    else:
        seen = state["mine.running"][:10]
        assert torch.equal(scores[seen >= 0], seen[seen >= 0])
        assert torch.allclose(scores[seen < 0], torch.tensor(4.0).log())
        assert 0 < int((seen < 0).sum()) < 10  # only the kept were trained on


def test_measuring_losses_disturbs_nothing():
    """Selection touches neither BatchNorm's statistics nor the weights, in either mode."""
    for mode in ("eval", "train"):
        one = bed(FBL(scorer_mode=mode), [[20, 2, 2, 0]], norm=True)
        before = one.worker.weights.flat.clone()
        prepared(one)
        assert torch.equal(before, one.worker.weights.flat)


# filling, alignment and drop, checks 10 to 12 -----------------------------------------------------------------------


def trained(method: FBL, counts=([20, 2, 0, 6],), rounds: int = 2, **more) -> Bed:
    one = bed(method, list(counts), **more)
    for _ in range(rounds):
        one.round()
    return one


def test_dropping_everything_is_no_alignment():
    """Check 10: same weights bit for bit, and no offset ever moved."""
    full, off = trained(FBL(drop_rate=1.0)), trained(FBL(align=False))
    assert torch.equal(full.server.params, off.server.params)
    assert not full.states[0]["own"].any()


def test_the_first_step_without_drop():
    """Check 11: with P = 0 the forward pass is as without alignment, and dL/dP_i is the mean over the batch of the
    feature gradients of the synthetic samples of class i."""
    one = bed(FBL(drop=0), [[6, 2, 0, 0]])
    local = one.worker.open(one.server, 0, None)
    local.samples = one.method.prepare(local)
    x, y, fake = local.samples.x.float(), local.samples.y, local.samples.fake
    batch = Batch(x, y, fake, local.samples.index)
    loss = one.method.loss(local, batch)
    z = local.model.features(x)
    z.retain_grad()
    plain = nn.functional.cross_entropy(local.model.head(z), y)
    assert torch.equal(loss, plain)
    one.worker.weights.grad.zero_()
    loss.backward()
    plain.backward()
    for label in range(4):
        expected = z.grad[fake & (y == label)].sum(0)  # the loss is already a mean over the batch
        assert torch.allclose(local.model.offset.weight.grad[label], expected, atol=1e-7)


@pytest.mark.parametrize(("start", "step"), [(0.0, 1 / 2), (log(3) / 2, 1 / 4)])
def test_an_offset_step_by_hand(start, step):
    """Check 12: H = identity on R^2, f = 0, y = 0: softmax (1/2, 1/2), dL/dP = (-1/2, 1/2), P = (1/2, -1/2).

    A round of one step: the client has two samples of class 1, keeps one and fills class 0 with one, so the loss is a
    mean over two and the learning rate is 2 where the check has 1. Class 1 has no synthetic sample and no step.
    From P = (log 3 / 2, -log 3 / 2): softmax (3/4, 1/4), and P grows by (1/4, -1/4). Weight decay is not for offsets.
    """
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
        head.bias.zero_()
    features = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    nn.init.zeros_(features[1].weight)
    one = Bed(
        FBL(drop=0),
        model=Split(features, head, 2),
        data=[client([0, 2])],
        classes=2,
        training=Training(epochs=1, batch=2, lr=2.0, weight_decay=0.1),
        images=images,
    )
    one.worker.initial_own = torch.tensor([start, -start, 0.0, 0.0])
    one.round()
    assert one.replies[0].steps == 1
    assert one.states[0]["own"].tolist() == pytest.approx([start + step, -start - step, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["exact", "bernoulli"])
@pytest.mark.parametrize("scope", ["synthetic", "batch"])
def test_how_many_are_dropped(kind, scope):
    """Of a full batch of eight with six synthetic samples: two of these; or a quarter of the whole batch, of which only
    the synthetic ones count; or each with probability 1/4. In the last three cases 1.5 on average, and at most two
    where the number drawn is exact."""
    one = bed(FBL(drop=2, drop_kind=kind, drop_scope=scope), [[4, 4, 4, 4]])
    local = one.worker.open(one.server, 0, None)
    fake = torch.tensor([True] * 6 + [False] * 2)
    batch = Batch(torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64), fake, torch.arange(8))
    dropped = torch.tensor([int(fake.sum() - one.method.shown(local, batch).sum()) for _ in range(2000)]).float()
    assert not one.method.shown(local, batch)[6:].any()
    if kind == "exact" and scope == "synthetic":
        assert dropped.unique().tolist() == [2.0]
    else:
        assert dropped.mean().item() == pytest.approx(1.5, abs=0.1)
        assert dropped.min() == 0
        assert (dropped.max() == 2) == (kind == "exact")


@pytest.mark.parametrize(("size", "count"), [(8, 2), (4, 1), (2, 1), (1, 0)])
def test_a_smaller_last_batch_drops_its_share(size, count):
    """round(zeta * length), with zeta = 2 / 8 (F-18)."""
    one = bed(FBL(drop=2), [[4, 4, 4, 4]])
    local = one.worker.open(one.server, 0, None)
    batch = Batch(torch.zeros(size, 1, 4, 4), torch.zeros(size).long(), torch.ones(size).bool(), torch.arange(size))
    assert size - int(one.method.shown(local, batch).sum()) == count


def test_only_filled_classes_have_an_offset_that_moves():
    """Class 0 is cut, so it has no synthetic sample; momentum and decay leave its row alone."""
    one = trained(FBL(drop=0), training=replace(TRAINING, momentum=0.9, weight_decay=0.1))
    rows = one.states[0]["own"].view(4, 6)
    assert not rows[0].any()
    assert rows[1].any()
    assert rows[2].any()


def test_offsets_are_never_used_at_test_time():
    model = Aligned(net(), 1.0, Rule())
    model.eval()
    with pytest.raises(AssertionError), model.aligned(torch.tensor([1]), torch.tensor([True]), None):
        model(torch.zeros(1, 1, 4, 4))


def test_offsets_learn_at_their_own_rate():
    slow, fast = (trained(FBL(drop=0, offset_lr=rate), rounds=1).states[0]["own"] for rate in (1.0, 10.0))
    assert fast.norm() > 5 * slow.norm() > 0


def test_offsets_last_or_start_anew():
    method = FBL(offset_std=0.5, offset_persist=False, drop_rate=1.0)
    one = trained(method, rounds=1)
    first = one.states[0]["own"].clone()
    one.round()
    assert first.any()
    assert not torch.equal(first, one.states[0]["own"])
    kept = trained(replace(method, offset_persist=True), rounds=1)
    before = kept.states[0]["own"].clone()
    kept.round()
    assert torch.equal(before, kept.states[0]["own"])


def test_co_adaptation_without_drop():
    """Pitfall 6: with no drop and a fast offset the training loss falls while the loss without offset stays high."""
    one = bed(FBL(drop=0, offset_lr=400.0), [[8, 0, 0, 0]], training=Training(epochs=400, batch=8, lr=0.001))
    one.round()
    local = one.worker.open(one.server, 0, one.states[0])
    fakes = images(0, torch.tensor([0, 2, 2, 2]), 0)
    batch = Batch(fakes.x.float(), fakes.y, fakes.fake, fakes.index)
    with torch.no_grad():
        local.model.train()
        with_offset = one.method.loss(local, batch)
        without = nn.functional.cross_entropy(local.model(batch.x), batch.y)
    assert with_offset < 0.1 < 0.5 < without


def test_shared_offsets_are_averaged_by_those_who_trained_them():
    """F-14: client 0 fills class 1 only, client 1 class 0 only; each row is its owner's, not half of it."""
    one = bed(FBL(share="fedavg_rows", drop=0), [[8, 2], [2, 8]], training=Training(epochs=1, batch=16, lr=0.5))
    assert one.method.sends() == ("rows",)
    one.round()
    place = one.server.layout.by_name["offset.weight"]
    rows = place.view(one.server.params)
    assert rows[0].any()
    assert rows[1].any()
    for k, label in ((0, 1), (1, 0)):
        own = place.view(one.replies[k].update.delta)
        assert torch.allclose(rows[label], own[label], atol=1e-6)
        assert not own[1 - label].any()


@pytest.mark.parametrize("base", [Scaffold(), FedDyn()])
def test_shared_offsets_need_a_plain_average(base):
    """A correction moves rows that a client has not trained, and what is not a mean cannot be scaled by who trained."""
    with pytest.raises(ConfigError, match=r"share = 'fedavg_rows': .* in a way of its own: must be 'local' over it"):
        FBL(share="fedavg_rows", base=base)
    FBL(base=base)


def test_shared_offsets_cannot_start_anew():
    """What a client adds to them would be added to what it never had."""
    with pytest.raises(ConfigError, match=r"offset_persist = False: .* must be true with share = 'fedavg_rows'"):
        FBL(share="fedavg_rows", offset_persist=False)


def test_generated_images_stay_the_same_or_are_renewed():
    """Two of each class, which say their numbers: in the next cycle the same two, or the two that follow."""
    once, renewed = (bed(FBL(refresh=how, period=10), [[8, 0, 0, 0]]) for how in ("once", "every_cycle"))
    for one, same in ((once, True), (renewed, False)):
        first, later = prepared(one, number=0), prepared(one, number=10)
        assert torch.equal(first.x[first.fake], later.x[later.fake]) == same
        numbers = [set(each.x[each.fake, 0, 0, 2].tolist()) for each in (first, later)]
        assert numbers == [{0, 1}, {0, 1} if same else {2, 3}]


def test_batchnorm_apart_keeps_only_the_statistics_of_real_samples():
    """bn = "dual": the running mean after a round is that of a client that has the real samples only."""
    one = bed(
        FBL(bn="dual", cut=False, drop_rate=1.0),
        [[8, 0, 0, 0]],
        norm=True,
        training=Training(epochs=1, batch=99, lr=1e-9),
    )
    alone = bed(FBL(), [[8, 0, 0, 0]], norm=True, profiles=["none"], training=Training(epochs=1, batch=99, lr=1e-9))
    together = bed(
        FBL(cut=False, drop_rate=1.0), [[8, 0, 0, 0]], norm=True, training=Training(epochs=1, batch=99, lr=1e-9)
    )
    for each in (one, alone, together):
        each.round()
    assert torch.allclose(one.replies[0].buffers, alone.replies[0].buffers, atol=1e-6)
    assert not torch.allclose(together.replies[0].buffers, alone.replies[0].buffers, atol=1e-3)


# identities, checks 4, 14 and 15, and work over other methods -------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("counts", "profiles"), [([[5, 5, 5], [7, 7, 7]], None), ([[9, 1, 0], [0, 4, 6]], ["none", "none"])]
)
def test_balanced_or_incapable_clients_are_fedavg_bit_for_bit(counts, profiles, norm):
    """Checks 4 and 14: uniform weights; no choice, no image, no offset."""
    fbl = bed(FBL(), counts, norm=norm, profiles=profiles)
    avg = bed(Algorithm(weights="uniform"), counts, norm=norm)
    for _ in range(3):
        assert torch.equal(fbl.round().params, avg.round().params)
    assert not any(state["own"].any() for state in fbl.states.values())


def test_traffic_is_fedavgs():
    """Check 15: offsets, images and choices stay."""
    fbl, avg = bed(FBL(), [[9, 1, 0], [0, 4, 6]]), bed(Algorithm(), [[9, 1, 0], [0, 4, 6]])
    fbl.round()
    avg.round()
    assert [(r.bytes_up, r.bytes_down) for r in fbl.replies] == [(r.bytes_up, r.bytes_down) for r in avg.replies]


@pytest.mark.parametrize(
    ("weights", "expected"), [("uniform", [1.0, 1.0]), ("samples", [10.0, 11.0]), ("trained", [9.0, 18.0])]
)
def test_weights(weights, expected):
    """Uniform (FBL-REQ-17), by real samples, or by balanced samples (F-04)."""
    one = bed(FBL(weights=weights), [[9, 1, 0], [1, 4, 6]], profiles=["constrained", "unconstrained"])
    one.round()
    assert [reply.update.weight for reply in one.replies] == expected


def test_over_fedprox_without_term_it_is_fbl():
    prox, plain = (bed(FBL(base=base), [[9, 1, 0], [0, 4, 6]]) for base in (FedProx(mu=0.0), Algorithm()))
    for _ in range(2):
        assert torch.equal(prox.round().params, plain.round().params)


def test_over_scaffold_both_keep_their_state():
    one = bed(FBL(base=Scaffold()), [[20, 2, 0], [0, 4, 20]])
    for clients in ([0], [1], [0, 1]):
        one.round(clients)
    mean = (one.states[0]["mine.c"] + one.states[1]["mine.c"]) / 2
    assert torch.allclose(one.server.shared["c"], mean, atol=1e-6)
    assert len(one.states[0]["mine.kept"])
    assert one.server.shared["c"].numel() == one.worker.weights.layout.shared  # no variate for offsets


def test_presets_are_the_rows_of_the_ablation():
    """Table III: what M1 to M7 change."""
    m = {name: build(FBL, preset) for name, preset in FBL.presets.items()}
    assert list(m) == ["M1", "M2", "M3", "M4", "M5", "M6", "M7"]
    assert m["M7"] == FBL()
    assert m["M1"].sampling == "random"
    assert not m["M1"].align
    assert not m["M2"].align
    assert m["M3"].align
    assert m["M3"].drop == 0
    assert m["M4"].drop == 2
    assert [m[name].carry for name in m] == [0.0, 0.0, 0.0, 0.0, 0.9, 0.7, 0.1]


def test_options_are_documented():
    assert all(item.meaning.doc for item in options(FBL))
    with pytest.raises(ConfigError, match="carry"):
        build(FBL, {"carry": 1.5})


def test_balanced_clips_nothing_below_zero():
    plan = balanced(torch.tensor([0, 9]), torch.tensor([4, 4]))
    assert (plan.real.tolist(), plan.fake.tolist()) == ([0, 4], [4, 0])


def test_it_refuses_to_work_over_a_network_it_would_take_apart():
    with pytest.raises(ConfigError, match="FedDBE, which changes the network"):
        bed(FBL(base=FedDBE()), [[9, 1, 0]])
