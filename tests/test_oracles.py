"""Methods against the same methods in other libraries, where those are installed.

FedAvgM, FedAdagrad, FedAdam and FedYogi against Flower's strategies, SCAFFOLD against FedLab's: the known differences
are in the docstrings of the tests.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from fedkeel.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.local import Training
from fedkeel.models.mlp import MLP
from fedkeel.records import Batch, Local, Server, Update
from fedkeel.rng import Streams, isolated

SHAPES = {"weight": (3, 4), "bias": (3,)}
SIZES = (1, 3, 6)
ROUNDS = 3

CASES = [
    ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}, FedAvgM(beta=0.9, server_lr=0.5)),
    ("FedAdagrad", {"eta": 0.1, "tau": 1e-3}, FedAdagrad(server_lr=0.1, v_init="zero")),
    ("FedAdam", {"eta": 0.1, "tau": 1e-3}, FedAdam(server_lr=0.1, v_init="zero", bias_correction="adam")),
    ("FedYogi", {"eta": 0.01, "tau": 1e-3}, FedYogi(server_lr=0.01, v_init="zero")),
]

COHORTS = ((0, 1), (1, 2), (0, 3))  # one client comes again at once, one after a pause, two come late


def named(flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: part.reshape(shape).clone() for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # flwr's own
@pytest.mark.parametrize(("name", "settings", "method"), CASES, ids=[case[0] for case in CASES])
def test_server_optimisers_agree_with_flowers(
    name: str, settings: dict[str, float], method: FedOpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds of three clients of unequal size on a model of two tensors, the same trained models given to both.

    Known differences, all reachable by options:

    - v starts at 0 in Flower, at tau^2 in the paper and here: `v_init = "zero"`.
    - Flower's FedAdam corrects the learning rate for the start at zero, always, and counts rounds from 2 (its exponent
      is `server_round + 1`); here `bias_correction = "adam"` counts from 1. The test starts our count one round later.
      Its FedAdagrad and FedYogi correct nothing.
    - Flower's FedAdagrad has beta_1 = 0, as here.

    Flower puts whatever tensors it is given through the optimiser, BatchNorm's statistics included; this model has
    none.
    """
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    strategies = pytest.importorskip(
        "flwr.serverapp.strategy", reason="needs Flower: pip install 'flwr>=1.41,<1.43'", exc_type=ImportError
    )
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    logging.getLogger("flwr").setLevel(logging.ERROR)

    strategy = getattr(strategies, name)(**settings, fraction_train=0.0)  # no nodes to ask: the replies are below
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(15, generator=rng)
    # a coordinate that never changes, and one that changes little
    scale = torch.cat([torch.tensor([0.0, 1e-4]), torch.ones(13)])
    theirs = ArrayRecord(named(start))
    counter = {"t": torch.tensor(1)} if name == "FedAdam" else {}  # Flower's first round is number 2
    server = Server(params=start, buffers=torch.empty(0), clients=3, samples=sum(SIZES), private=counter)
    for number in range(1, ROUNDS + 1):
        before = flat(theirs.to_torch_state_dict())
        deltas = [torch.randn(15, generator=rng) * scale * 0.3 for _ in SIZES]
        assert strategy.configure_train(number, theirs, ConfigRecord(), None) == []
        replies = []
        for delta, size in zip(deltas, SIZES, strict=True):
            content = {"arrays": ArrayRecord(named(before + delta)), "metrics": MetricRecord({"num-examples": size})}
            replies.append(SimpleNamespace(content=RecordDict(content), has_error=lambda: False))
        theirs, _ = strategy.aggregate_train(number, replies)
        updates = [Update(float(size), delta) for size, delta in zip(SIZES, deltas, strict=True)]
        server = replace(method.aggregate(server, iter(updates)), round=number)
        after = flat(theirs.to_torch_state_dict())
        moved = (after - before).abs().max()
        assert moved > 1e-3
        # trained models cross as weights there and as changes here: a rounding of 1e-7, times up to eta_g / tau
        torch.testing.assert_close(server.params, after.float(), rtol=1e-4, atol=1e-4 * float(moved))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # FedLab's own
def test_scaffold_agrees_with_fedlabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of two out of four clients of unequal size and skewed labels; the batches drawn here are replayed
    there, the training is each library's own. The model, c and every c_k are compared after each round.

    The same in both: all variates start at zero, the gradient g - c_k + c, option II, uniform weights whatever the
    sizes, eta_g on the model only, and c moves by |S| / N times the mean change of the c_k.

    Known differences, none of them in this case:

    - FedLab has neither option I nor weights by size: `variate = "displacement"`, `weights = "uniform"`, as by default.
    - FedLab divides the displacement by batches times epochs times the learning rate of its start. It has no momentum,
      no weight decay and no decay of the learning rate; here the divisor follows momentum and the round's rate.
    - FedLab sends parameters only: buffers never reach its server. This model has none.
    - A last batch of one sample is left out here and counts as no step. Replayed, it is missing there too.

    pfl-research's SCAFFOLD (pfl 0.6.0) is no oracle: it adds the displacement to c_k where the paper subtracts it, but
    corrects the gradient as the paper does. On the quadratics of `byhand/bed.py` option II diverges there.
    """
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)  # FedLab would print all that anybody logs
    monkeypatch.setattr(logging.root, "setLevel", lambda level: None)
    for unused in ("pynvml", "torchvision"):  # for its GPUs and data sets: not used here
        monkeypatch.setitem(sys.modules, unused, SimpleNamespace(transforms=None))
    fedlab = pytest.importorskip(
        "fedlab.contrib.algorithm.scaffold",
        reason="needs FedLab: pip install --no-deps 'fedlab>=1.3,<1.4'",
        exc_type=ImportError,
    )
    batches: defaultdict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    class Noted(Scaffold):
        def loss(self, local: Local, batch: Batch) -> Tensor:
            batches[local.client].append((batch.x, batch.y))
            return super().loss(local, batch)

    with isolated(Streams(1)("init")):
        model = MLP(hidden=(8,)).build((1, 16, 16), tiny.CLASSES)
    handler = fedlab.ScaffoldServerHandler(deepcopy(model), global_round=len(COHORTS), sample_ratio=0.5)
    handler.num_clients = 4
    handler.setup_optim(lr=0.5)
    trainer = fedlab.ScaffoldSerialClientTrainer(deepcopy(model), num_clients=4)
    trainer.setup_dataset(SimpleNamespace(get_dataloader=lambda client, size: batches[client]))
    trainer.setup_optim(epochs=1, batch_size=4, lr=0.1)  # both epochs are in `batches`

    method = Noted(server_lr=0.5)
    parts = [tiny.samples(size, seed=size, classes=client + 1) for client, size in enumerate((5, 8, 11, 14))]
    worker, server = tiny.worker(model, parts, Training(epochs=2, batch=4, lr=0.1), method)
    assert torch.equal(server.params, parameters_to_vector(handler.model.parameters()))  # the same order
    states: dict[int, dict[str, Tensor]] = {}
    for cohort in COHORTS:
        before = server
        batches.clear()
        replies = [worker.fit(server, client, states.get(client)) for client in cohort]
        server = replace(method.aggregate(server, iter([reply.update for reply in replies])), round=server.round + 1)
        states |= {reply.client: dict(reply.state) for reply in replies}

        trainer.local_process(handler.downlink_package, cohort)
        finished = [handler.load(package) for package in trainer.uplink_package]
        assert finished == [False, True]

        assert (server.params - before.params).abs().max() > 1e-2
        assert (server.shared["c"] - before.shared["c"]).abs().max() > 1e-2
        torch.testing.assert_close(server.params, handler.model_parameters, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(server.shared["c"], handler.global_c, rtol=1e-5, atol=1e-6)
        for client, state in states.items():
            torch.testing.assert_close(state["mine.c"], trainer.cs[client], rtol=1e-5, atol=1e-6)
