"""Personal models: a test set for each client, and how its own model does on it.

ReGL (Yao 2024, arXiv 2409.14063), section 5.1 and appendix B: a client's test images keep the class ratio of its train
images (R-10); the global model is tuned on each client and the best epoch reported, beside which we give the last one
(R-11), which has not looked at test data.

Departure: our best includes the model before tuning; the paper's is that of its 50 epochs. Methods that do not tune
have the best of the rounds measured, of which there are as many as `every` makes: the best of one is the last. A best
of many is higher than one of few, whatever the method, so their number stands beside it (`personal/evaluations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fedkeel.evaluate import evaluate
from fedkeel.local import Training, descend, tried
from fedkeel.options import option
from fedkeel.records import Local, Phase, Reply, Samples, Server
from fedkeel.rng import isolated

if TYPE_CHECKING:
    from fedkeel.job import Job
    from fedkeel.runtimes.base import Curve


@dataclass(frozen=True, kw_only=True)
class Personal:
    """How personal models are made and measured: the section [personal]."""

    every: int = option(
        0, "rounds between evaluations of personal models, tuned anew for each; 0 = after the last round only", ge=0
    )
    measure: Literal["auto", "always", "never"] = option(
        "auto", "whether personal models are measured; auto = for personal methods, and without a global model"
    )
    epochs: int = option(50, "epochs of tuning the model on each client, for methods that do", ge=0)
    lr: float = option(0.01, "learning rate of the tuning", gt=0)
    momentum: float = option(0.9, "momentum of the tuning", ge=0, lt=1)
    weight_decay: float = option(1e-4, "weight decay of the tuning", ge=0)
    batch: int = option(128, "samples in a batch of the tuning", ge=1)
    synthetic: Literal["owned", "all", "none"] = option(
        "owned", "synthetic images in the tuning (R-15): of classes the client owns, of all, or none"
    )
    overlap: bool = option(True, "a test image may serve several clients when a class has too few (R-10)")
    min_per_class: int = option(1, "least test images of a class that a client owns (R-10)", ge=0)


def test_sets(counts: Tensor, total: Tensor, test_y: Tensor, options: Personal, rng: torch.Generator) -> list[Tensor]:
    """Test images of each client, [m_k] int64 ascending: round(n_k^c * test_c / train_c) of each class c, drawn without
    replacement across clients while there are any, then anew (R-10).

    counts: [K, C] train samples per client and class. total: [C] train_c, of all clients together; less than the sum of
    `counts` where they hold images in common (partition `global_share`). test_y: [M] labels of the test images.
    """
    clients, classes = counts.shape
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for c in range(classes):
        there = torch.nonzero(test_y == c)[:, 0]
        if len(there) == 0 or int(total[c]) == 0:
            continue
        stock = there[torch.randperm(len(there), generator=rng)]
        for k in range(clients):
            owned = int(counts[k, c])
            if owned == 0:
                continue
            wanted = max(options.min_per_class, int(owned * len(there) / int(total[c]) + 0.5))
            part, stock = stock[:wanted], stock[wanted:]
            if len(part) < wanted and options.overlap:
                rest = there[~torch.isin(there, part)]
                again = rest[torch.randperm(len(rest), generator=rng)[: wanted - len(part)]]
                part = torch.cat([part, again])
            parts[k].append(part)
    nothing = torch.empty(0, dtype=torch.int64)
    return [torch.cat(part).sort().values if part else nothing for part in parts]


def measure(job: Job, curves: Sequence[Curve], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Personal metrics after a round, by full name, from each client's `curve_of`.

    `personal/clients` is each client's accuracy with its model as it is now (None without test images), after tuning
    where the method tunes; the others are means over clients, and over test images under `_weighted`. The best is each
    client's best over the epochs of tuning, or over the rounds measured so far (`before` holds their records);
    `personal/evaluations` says of how many models that is, those before tuning and of this round included.
    """
    rounds = [record["personal/clients"] for record in before if "personal/clients" in record]
    final: list[float | None] = []
    best: list[float | None] = []
    for client, (curve, _) in enumerate(curves):
        final.append(curve[-1] if curve else None)
        earlier = [then for record in rounds if (then := record[client]) is not None]
        best.append(max(curve if job.tunes else [curve[-1], *earlier]) if curve else None)
    sizes = [size for _, size in curves]
    return {
        "personal/accuracy_last": _mean(final, [1] * len(sizes)),
        "personal/accuracy_best": _mean(best, [1] * len(sizes)),
        "personal/accuracy_last_weighted": _mean(final, sizes),
        "personal/accuracy_best_weighted": _mean(best, sizes),
        "personal/evaluations": 1 + (job.config.personal.epochs if job.tunes else len(rounds)),
        "personal/clients": final,
    }


def curves(job: Job, server: Server, accepted: Mapping[int, int]) -> list[Curve]:
    """`curve_of` for each client, one after another; of one that fails, `unmeasured`."""

    def one(client: int) -> Curve:
        state = job.store.open(client, accepted.get(client))
        return curve_of(job, server, client, state, job.mail(server, client))

    out: list[Curve] = []
    for client in range(job.clients):
        found = tried(client, partial(one, client))
        out.append(unmeasured(job, f"client {client}", found.failure) if isinstance(found, Reply) else found)
    return out


def unmeasured(job: Job, who: str, why: str) -> Curve:
    """In place of the curve of a client whose model could not be measured: the others' count, and the run goes on."""
    job.warn(f"{who}: its own model could not be measured: {why}")
    return [], 0


def curve_of(
    job: Job, server: Server, client: int, state: Mapping[str, Tensor] | None, mail: Mapping[str, Tensor]
) -> Curve:
    """Accuracies of a client's own model on its test set, before tuning and, where the method tunes, after each epoch
    of SGD on its samples (ReGL, section 4.2 and appendix B); none, where it has no test images. state: what it kept."""
    rows = job.personal_tests[client]
    if len(rows) == 0:
        return [], 0
    options = job.config.personal
    local = job.worker.open(server, client, state, mail)
    job.method.personalise(local)
    x, y = job.data.test_x[rows], job.data.test_y[rows]

    def accuracy() -> float:
        model = job.worker.model
        return evaluate(model, x, y, job.data.classes, job.transform, job.device, job.config.evaluate.batch)["accuracy"]

    curve = [accuracy()]
    if job.tunes:
        local.samples = tuning_samples(job, local)
        local.lr, local.batch_size = options.lr, options.batch
        local.real_ratio = None  # of training's batches: an epoch of tuning is a pass over all
        local.velocity = torch.empty(0)  # the tuning's own begins at zero, also where that of training lasts
        training = Training(
            lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, optimiser="keep"
        )
        with isolated(local.rng("layers", "tune")):
            for _ in range(options.epochs):
                local.model.train()
                descend(local, job.method.tuning(), training, job.worker.weights, Phase(1))
                curve.append(accuracy())
    return curve, len(rows)


def tuning_samples(job: Job, local: Local) -> Samples:
    """What a client's own model is tuned on: its real samples, and synthetic ones by the option `synthetic` (R-15)."""
    samples, how = job.method.prepare(local), job.config.personal.synthetic
    owned = local.data.counts(local.classes) > 0
    wanted = {"all": samples.fake, "none": samples.fake & False, "owned": samples.fake & owned[samples.y]}[how]
    return local.data + samples.take(wanted)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
