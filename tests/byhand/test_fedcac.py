"""FedCAC against its equations (Wu et al. 2023)."""

from itertools import accumulate

import pytest
import tiny
import torch
from bed import Bed, on_quadratic
from torch.profiler import ProfilerActivity, profile

from fedkeel.algorithms import fedcac
from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedcac import FedCAC, collaborators, critical, packed, renew, unpacked
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.mlp import MLP


def bed(method, clients=3, **training):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP(hidden=(3,)).build((1, 16, 16), 4)
    data = [tiny.samples(8 + 4 * k, seed=k) for k in range(clients)]
    settings = {"epochs": 2, "batch": 8, "lr": 1e-5, **training}  # pixels are 0..255: larger steps end units
    return Bed(method, model=model, data=data, classes=4, training=Training(**settings))


def bits(*rows):
    return [packed(torch.tensor(row).bool()) for row in rows]


def overlap(marks):
    """Of all clients, from nothing known."""
    found = torch.full((len(marks), len(marks)), torch.nan, dtype=torch.float64)
    renew(found, range(len(marks)), lambda at, span: marks[at][span], len(marks[0]))
    return found


def marks(one, k):
    return unpacked(one.states[k]["mine.marks"], len(one.server.params))


def begins(one, k):
    """Where client k's next round starts."""
    local = one.worker.open(one.server, k, one.states.get(k), one.method.mail(one.server, k))
    one.method.start(local)
    return local.params.clone()


def test_the_cards_overlaps():
    """(1,1,0,0) and (1,0,1,0): 1 - 2 / 4; with (0,0,0,1), of another size, it depends on who asks."""
    o = overlap(bits([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]))
    assert o[0].tolist() == [1.0, 0.5, 1.0, 0.0, 0.5, 0.75]
    assert torch.equal(o[:4, :4], o[:4, :4].T)  # equal sizes
    assert o[5, 0] == 0.5 and o[0, 5] == 0.75
    assert o[4].tolist() == [0.0] * 6  # a client without marks overlaps with nobody, and nothing is divided by zero


def plainly(marks):
    """The overlaps of all clients at once: N x P bits in memory."""
    bits = torch.stack([unpacked(each, 8 * len(each)) for each in marks]).double()
    both = bits @ bits.T
    size = both.diagonal()
    apart = size[:, None] + size[None, :] - 2 * both
    return torch.where(size[:, None] > 0, 1 - apart / (2 * size[:, None]).clamp(min=1), 0.0)


def random_marks(clients, size, seed=0):
    rng = torch.Generator().manual_seed(seed)
    found = [packed(torch.rand(size, generator=rng) < share / clients) for share in range(clients)]
    return [found[at] for at in torch.randperm(clients, generator=rng).tolist()]  # the one without marks anywhere


@pytest.mark.parametrize(
    ("clients", "tiles"),
    [(1, None), (7, None), (70, None), (1, (3, 20, 7)), (2, (1, 1, 1)), (7, (3, 20, 7)), (7, (2, 7, 20))],
)
def test_overlaps_in_tiles_are_those_of_the_formula(clients, tiles, monkeypatch):
    """To the last bit, whatever the tiles."""
    for name, value in zip(("ROWS", "READ", "AT_ONCE"), tiles or (), strict=False):
        monkeypatch.setattr(f"fedkeel.algorithms.fedcac.{name}", value)
    marks = random_marks(clients, 403)
    assert torch.equal(overlap(marks), plainly(marks))


@pytest.mark.parametrize("stale", [[], [0], [6], [2, 3, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_only_what_changed_is_compared_again(stale, monkeypatch):
    monkeypatch.setattr("fedkeel.algorithms.fedcac.ROWS", 2)
    before, later = random_marks(7, 403), random_marks(7, 403, seed=1)
    marks = [later[k] if k in stale else before[k] for k in range(7)]
    found, pairs = plainly(before), []

    def products(mine, theirs):
        pairs.append(len(mine) * len(theirs))
        return real(mine, theirs)

    real = fedcac.products
    monkeypatch.setattr(fedcac, "products", products)
    renew(found, stale, lambda at, span: marks[at][span], len(marks[0]))
    assert torch.equal(found, plainly(marks))
    assert sum(pairs) <= 7 * len(stale)


def peak_of(clients, size):
    """Bytes that PyTorch held at most while it compared so many clients' marks, as its own allocator tells them."""
    row = torch.arange(size, dtype=torch.int64).mul_(37).remainder_(251).to(torch.uint8)
    found = torch.zeros(clients, clients, dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        renew(found, range(clients), lambda at, span: row[span], size)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(held) > 2**20  # it does tell
    return max(accumulate(held))


def test_memory_does_not_grow_with_clients_or_parameters():
    """192 clients' marks on 262,144 parameters are 201 MB as float32 numbers, those of 128 on twice as many 268 MB."""
    few, many, large = peak_of(128, 2**15), peak_of(192, 2**15), peak_of(128, 2**16)
    assert max(few, many, large) < 40e6
    assert many < 1.1 * few and large < 1.1 * few


def test_bits():
    marks = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.5
    assert packed(marks).dtype == torch.uint8 and len(packed(marks)) == 126
    assert torch.equal(unpacked(packed(marks), 1003), marks)
    assert packed(torch.tensor([True, False, False, True])).tolist() == [9]


def test_critical_parameters_are_the_largest_products_of_each_tensor():
    """One of 4 is 0.25 of a tensor; of a tensor of one, floor(0.25) is none."""
    one = bed(FedCAC())
    layout = one.worker.weights.layout
    w = torch.linspace(-1, 1, len(one.server.params))
    change = torch.randn(len(w), generator=torch.Generator().manual_seed(0))
    found = critical(change, w, layout, 0.25)
    for entry in layout.entries:
        span = slice(entry.start, entry.start + entry.size)
        value, here = (change * w).abs()[span], found[span]
        assert int(here.sum()) == int(0.25 * entry.size)
        assert not here.any() or value[here].min() >= value[~here].max()
    assert not critical(torch.zeros(len(w)), w, layout, 0.5).any()  # what did not change is not critical
    assert int(critical(torch.ones(len(w)), torch.ones(len(w)), layout, 0.5).sum()) == sum(
        int(0.5 * entry.size) for entry in layout.entries
    )  # ties do not make them more


def test_the_threshold_rises_from_the_mean_to_the_maximum():
    """Overlaps 0.2, 0.4 and 0.9 (mean 0.5): after 1 of 4 rounds 0.6, after 4 of 4 exactly the maximum, 0.9."""
    o = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]])
    only = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()
    assert torch.equal(collaborators(o, 1, 4), only) and torch.equal(collaborators(o, 4, 4), only)
    assert torch.equal(collaborators(o, 5, 4), torch.eye(3).bool())
    low = o.clone()
    low[0, 2] = low[2, 0] = 0.8
    assert collaborators(low, 1, 100).sum() == 7


def test_equal_overlaps_end_too():
    """With two clients mean and maximum agree: printed, they would collaborate for ever."""
    o = torch.tensor([[1.0, 0.7], [0.7, 1.0]])
    assert collaborators(o, 3, 3).all()
    assert torch.equal(collaborators(o, 4, 3), torch.eye(2).bool())


def test_the_next_start_is_merged_from_both_models():
    """M * (mean of collaborators) + (1 - M) * (mean of all by size), by hand from what the clients sent."""
    one = bed(FedCAC(tau=0.5, beta=5))
    first = one.server.params.clone()
    one.round()
    w = torch.stack([first + reply.update.delta for reply in one.replies])
    mean = (w * torch.tensor([8.0, 12.0, 16.0])[:, None]).sum(0) / 36
    assert torch.allclose(one.server.params, mean, atol=1e-6)
    near = collaborators(overlap([one.states[k]["mine.marks"] for k in range(3)]), 1, 5)
    assert near.any() and not near.all()
    for k in range(3):
        goal = torch.where(marks(one, k), w[near[k]].mean(0), one.server.params)
        assert torch.allclose(begins(one, k), goal, atol=1e-6)


def test_after_the_first_round_nothing_is_reset_to_the_first_model():
    """PFLlib's customised model is the first one in round 0."""
    one = bed(FedCAC(beta=5), lr=0.05)
    first = one.server.params.clone()
    one.round()
    for k in range(3):
        assert (begins(one, k) != first)[marks(one, k)].all()


def test_after_beta_critical_parameters_are_private():
    one = bed(FedCAC(beta=1))
    one.round()
    assert "critical" in one.method.mail(one.server, 0)
    one.round()
    assert not one.server.private and not one.server.lab.shelf._held  # the server lets the models go
    for k in range(3):
        assert not one.method.mail(one.server, k)
        mine, own = marks(one, k), one.states[k]["mine.w"]
        start = begins(one, k)
        assert torch.equal(start[mine], own[mine]) and torch.equal(start[~mine], one.server.params[~mine])
    one.round([1])


def test_changes_are_counted_from_the_clients_own_start():
    """Round 2 starts from a merged model, not from the one received: marked is the upper half of |(w - start) w|."""
    one = bed(FedCAC(beta=5))
    one.round()
    for k in range(3):
        local = one.worker.open(one.server, k, one.states[k], one.method.mail(one.server, k))
        one.method.start(local)
        start = local.params.clone()
        assert not torch.equal(start, one.server.params)
        local.params.add_(torch.randn(len(start), generator=torch.Generator().manual_seed(k)))  # what training does
        found = unpacked(one.method.upload(local).extra["marks"], len(start))
        value = ((local.params - start) * local.params).abs()
        for entry in local.layout.entries:
            span = slice(entry.start, entry.start + entry.size)
            best = value[span].argsort(descending=True)[: entry.size // 2]
            assert torch.nonzero(found[span])[:, 0].tolist() == best.sort().values.tolist()


@pytest.mark.parametrize("beta", [1, 5])
def test_without_critical_parameters_it_is_fedavg_bit_for_bit(beta):
    cac, avg = bed(FedCAC(tau=0.0, beta=beta)), bed(Algorithm())
    for clients in ([0, 1, 2], [1], [0, 2]):
        assert torch.equal(cac.round(clients).params, avg.round(clients).params)
    assert FedCAC(tau=0.0).off() == {"tau": 0.0} and FedCAC().off() == {}


def test_absent_clients_count_with_their_last_model():
    one = bed(FedCAC(beta=8))
    one.round()
    one.round([1])
    one.round([1, 2])
    assert one.server.private["shelf"].tolist() == [[0, 0], [1, 2], [2, 2]]
    assert one.server.lab.shelf._held.keys() == {(0, 0), (1, 2), (2, 2)}
    assert torch.equal(one.server.private["overlap"], overlap([one.states[k]["mine.marks"] for k in range(3)]))


def test_a_newcomer_starts_from_the_average():
    one = bed(FedCAC(beta=5))
    one.round([0, 1])
    assert not one.method.mail(one.server, 2) and torch.equal(begins(one, 2), one.server.params)


def test_one_client_is_on_its_own():
    one = bed(FedCAC(beta=5), clients=1)
    one.round()
    assert torch.allclose(begins(one, 0), one.server.params)


def test_what_crosses():
    """Up: a bit for each parameter; down: the marked ones' average once more, and nothing beside the model at last."""
    cac, avg = bed(FedCAC(tau=0.5, beta=1)), bed(Algorithm())
    size = len(cac.server.params)
    down = []
    for _ in range(3):
        cac.round()
        avg.round()
        down.append(cac.replies[0].bytes_down - avg.replies[0].bytes_down)
        assert cac.replies[0].bytes_up - avg.replies[0].bytes_up == -(-size // 8)
    assert down[0] == 0 and down[1] == 4 * sum(int(0.5 * e.size) for e in cac.worker.weights.layout.entries)
    assert down[2] == 0


def test_which_model_is_measured():
    one = bed(FedCAC(beta=5))
    one.round()
    for measured in ("start", "trained"):
        method = FedCAC(beta=5, measured=measured)
        local = one.worker.open(one.server, 0, one.states[0], method.mail(one.server, 0))
        method.personalise(local)
        goal = begins(one, 0) if measured == "start" else one.states[0]["mine.w"]
        local = one.worker.open(one.server, 0, one.states[0], method.mail(one.server, 0))
        method.personalise(local)
        assert torch.equal(local.params, goal)


def test_beta_by_default_is_half_of_the_run():
    assert (FedCAC().last(100), FedCAC().last(1), FedCAC(beta=7).last(100)) == (50, 1, 7)


def test_a_tensor_of_one_parameter_is_never_critical():
    """On bed Q it is FedAvg."""
    cac, avg = Bed(on_quadratic(FedCAC)()), Bed(on_quadratic(Algorithm)())
    for _ in range(3):
        assert torch.equal(cac.round().params, avg.round().params)


def test_whole_run(data):
    small = ("rounds=4", "participation=0.5", "personal.every=1")
    result = run(tiny.config("algorithm.name=fedcac", *tiny.BATCHNORM, *small), data=data)
    assert "global/accuracy" not in result.rounds[-1] and result.rounds[-1]["personal/accuracy_last"] > 0
