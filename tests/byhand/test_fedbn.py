"""FedBN: which tensors stay, and that the others are FedAvg's (Li et al. 2021)."""

import tiny
import torch
from bed import Bed
from torch import nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedbn import FedBN
from fedkeel.job import Job
from fedkeel.local import Training
from fedkeel.loop import run
from fedkeel.models.cnn import CNN
from fedkeel.models.resnet import ResNet18
from fedkeel.weights import Layout


def bed(method, norm="batch"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CNN(width=2, hidden=4, norm=norm, groups=2).build((1, 16, 16), 4)
    data = [tiny.samples(8, seed=1), tiny.samples(12, seed=2)]
    return Bed(method, model=model, data=data, classes=4, training=Training(epochs=2, batch=4, lr=0.1))


def test_without_batchnorm_it_is_fedavg_bit_for_bit():
    bn, avg = bed(FedBN(), "group"), bed(Algorithm(), "group")
    for clients in ([0, 1], [1], [0, 1]):
        assert torch.equal(bn.round(clients).params, avg.round(clients).params)
    assert bn.replies[0].bytes_up == avg.replies[0].bytes_up


def test_every_batchnorm_of_a_resnet_stays_those_on_shortcuts_too():
    """20 layers of 2 parameters, 2 statistics and a counter; three of them are called downsample.1."""
    with torch.device("meta"):
        model = ResNet18().build((3, 32, 32), 10)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == 20 and sum("downsample" in name for name in layers) == 3
    layout = Layout(model, FedBN().personal)
    own = {entry.name.rpartition(".")[0] for entry in layout.entries if entry.own}
    assert own == set(layers)
    assert sum(entry.own for entry in layout.entries) == 4 * 20
    assert layout.buffers == 0 and not any("num_batches" in name for name in layout.counters)
    share = layout.shared / (layout.shared + layout.own + layout.own_buffers)
    assert 0.997 < share < 0.9995  # of FedAvg's traffic


def test_own_tensors_are_neither_sent_nor_overwritten():
    """After aggregation clients agree in all shared tensors, and each has the BatchNorm of its own last round."""
    one = bed(FedBN())
    one.round()
    assert all(len(reply.buffers) == 0 for reply in one.replies)
    kept = {k: one.states[k]["own"].clone() for k in (0, 1)}
    assert not torch.equal(kept[0], kept[1])
    shared = []
    for k in (0, 1):
        local = one.worker.open(one.server, k, one.states[k])
        assert torch.equal(one.worker.weights.own, kept[k])
        shared.append(local.params.clone())
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], one.server.params)


def test_a_newcomer_has_the_first_models_batchnorm():
    one = bed(FedBN())
    first = one.worker.initial_own.clone()
    one.round([0])
    one.worker.open(one.server, 1, None)
    assert torch.equal(one.worker.weights.own, first)


def test_an_absent_client_keeps_its_batchnorm():
    one = bed(FedBN())
    one.round()
    before = one.states[1]["own"].clone()
    one.round([0])
    assert torch.equal(one.states[1]["own"], before)
    one.worker.open(one.server, 1, one.states[1], {})
    assert torch.equal(one.worker.weights.own, before)


def test_without_batchnorm_it_says_so(data):
    (said,) = Job(tiny.config("algorithm.name=fedbn"), data).idle()
    assert said.startswith("algorithm.name = fedbn: the network has no BatchNorm")
    balanced = Job(tiny.config("algorithm.name=fedbn", "balance.name=regl", "balance.volume=4"), data)
    assert list(balanced.idle()) == [said]
    assert not list(Job(tiny.config("algorithm.name=fedbn", *tiny.BATCHNORM), data).idle())


def test_whole_run(data):
    result = run(tiny.config("algorithm.name=fedbn", *tiny.BATCHNORM, "rounds=2"), data=data)
    assert "global/accuracy" not in result.rounds[-1] and "personal/accuracy_last" in result.rounds[-1]
