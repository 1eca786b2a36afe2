"""What happens on a client in one round, with the only SGD loop of the library."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkeel.errors import ConfigError, EmptyClient, FedkeelError, UndeclaredField
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.privacy import Privacy, clipped, fits
from fedkeel.records import Batch, Local, Phase, Prepare, Reply, Samples, Server, Update
from fedkeel.rng import Streams, isolated
from fedkeel.weights import Rule, Weights, finite

if TYPE_CHECKING:
    from fedkeel.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a client trains: the section [local] of the configuration. The optimiser is SGD, new in each round."""

    epochs: int = option(1, "passes over the client's samples in a round", ge=0)
    steps: int | None = option(None, "optimiser steps in a round, instead of epochs", ge=0)
    max_steps: int | None = option(None, "never more steps than this in a round, whatever the epochs", ge=1)
    batch: int = option(64, "samples in a batch", ge=1)
    lr: float = option(0.01, "learning rate", gt=0, grid=(1e-3, 3e-3, 1e-2, 3e-2, 0.1))
    lr_decay: float = option(1.0, "factor on the learning rate after each round", gt=0, le=1)
    momentum: float = option(0.0, "momentum of SGD", ge=0, lt=1)
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(0.0, "weight decay of SGD", ge=0)
    clip: float | None = option(None, "largest norm of the gradient of what moves, after the method's correction", gt=0)
    buffers: Literal["average", "local", "reset", "recalibrate", "recalibrate_real"] = option(
        "average",
        "BatchNorm statistics: averaged with the round's weights; never leaving the client, so that there is no global "
        "model; or averaged after being reset at the start of each round, or measured anew at its end on the client's "
        "samples, or on its real ones",
    )
    optimiser: Literal["reset", "keep"] = option(
        "reset", "momentum starts at zero in each round, or lasts on the client (as training alone would have it)"
    )
    precision: Literal["float32", "bfloat16"] = option(
        "float32",
        "of the forward and backward pass of training; weights, their averages and all measurements stay float32. "
        "bfloat16 (autocast) pays on processors and GPUs that have it, for networks larger than a small CNN",
        keyed=None,
    )
    compile: bool = option(
        False,
        "compile the network with torch.compile, in the first steps of a run: pays for large networks only; numbers "
        "differ in the last bits. For methods whose loss is plain cross-entropy",
        keyed=None,
    )
    bn_var: Literal["mean", "pooled"] = option(
        "mean", "average of running variances: their mean, or the variance of the pooled samples"
    )

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov", True, "needs momentum above 0")


AT_ONCE = 1 << 23
"""Numbers of the images that are prepared together."""


Done = TypeVar("Done")
Measure = Callable[[Split], Mapping[str, float]]
"""What a client's network is measured with, before and after training."""


class Absent(Exception):
    """Raised by a method's hook: this client takes no part in this round, for the reason said."""


def tried(client: int, work: Callable[[], Done]) -> Done | Reply:
    """What `work` returns, or the reply of a client that failed in it. What is the user's to mend is raised."""
    try:
        return work()
    except FedkeelError:
        raise
    except Absent as absent:
        return Reply(client, failure=str(absent))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip()
        return Reply(client, failure=reason, trace=traceback.format_exc())


class Worker:
    """One network on one device, used for one client after another. Makes no copy of the model."""

    def __init__(
        self,
        model: Split,
        algorithm: Algorithm,
        training: Training,
        *,
        classes: int,
        rounds: int,
        streams: Streams,
        transform: Prepare,
        data: Callable[[int], Samples],
        profile: Callable[[int], str],
        images: Callable[[int, Tensor, int], Samples],
        device: torch.device,
        clients: int = 1,
        cohort: int = 1,
        privacy: Privacy | None = None,
    ) -> None:
        """`model` is as the configuration asks for, freshly initialised; `data(client)` gives a client's samples,
        `images(client, counts, first)` synthetic ones for it. Of `clients`, `cohort` take part in a round. Raises
        ConfigError for a network that does not go with `privacy`."""
        self.privacy = privacy
        self.algorithm, self.training = algorithm, algorithm.training(training, cohort)
        self.clients = clients
        self.classes, self.rounds, self.streams, self.transform = classes, rounds, streams, transform
        self.data, self.profile, self.images, self.device = data, profile, images, device
        with isolated(streams("build")):  # what a method adds to the network
            self.model = algorithm.build(model).to(device)
        self.weights = Weights(self.model, self._personal)
        if self.training.compile:
            if type(self.model) is not Split or algorithm.looks_inside:
                why = "its loss looks into the network, or changes it, which a compiled one does not follow"
                raise ConfigError("local.compile", True, f"not with {type(algorithm).__name__}: {why}")
            torch.compiler.reset()  # what earlier runs of this process have compiled counts towards a limit
            self.model.compile()  # in place: calls of the whole network, whose parts keep their names
        if privacy is not None:
            fits(self.weights.layout)
        self.initial_own, self.initial_own_counters = self.weights.own, self.weights.own_counters
        self._homes: dict[str, torch.device] = {}
        self.initial_buffers = self.weights.buffers.clone()
        self._normal = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def _personal(self, name: str, module: nn.Module) -> bool:
        if self.training.buffers == "local" and name.rpartition(".")[2] in module._buffers:
            return True
        return self.algorithm.personal(name, module)

    def first_server(self, clients: int, samples: int) -> Server:
        """The server before the first round."""
        params = self.weights.params.clone()
        return Server(
            params=params,
            buffers=self.weights.buffers.clone(),
            clients=clients,
            samples=samples,
            counters=self.weights.counters,
            shared=self.algorithm.server_state(params),
        )

    @cached_property
    def keeps(self) -> bool:
        """Whether clients keep anything from round to round."""
        own = len(self.initial_own) or self.initial_own_counters or self.training.optimiser == "keep"
        return bool(own) or bool(self.algorithm.client_state(self.weights.params))

    def load(self, server: Server) -> None:
        """The network becomes the server's; what is a client's own in it is as at first."""
        self.weights.load(server.params, server.buffers, server.counters)
        self.weights.own, self.weights.own_counters = self.initial_own, self.initial_own_counters

    def fit(
        self,
        server: Server,
        client: int,
        state: Mapping[str, Tensor] | None,
        measure: Measure | None = None,
        mail: Mapping[str, Tensor] | None = None,
    ) -> Reply:
        """One client's round: from what the server sent to all and to this client alone (`mail`), and what the client
        kept (`None` in its first round), to the reply. `measure` is called on the network before and after training.

        An exception of the method or a value that is not finite becomes a reply with `failure`; a mistake of the user
        or a field that was not declared is raised.
        """
        started, mail = time.perf_counter(), mail or {}
        received = payload(server, mail)
        reply = tried(client, lambda: self._fit(server, client, state, measure, mail))
        return self.charged(reply, time.perf_counter() - started, received)

    def charged(self, reply: Reply, seconds: float, received: int) -> Reply:
        """`reply` with what it took: time, and the bytes that the client received."""
        if self.algorithm.pooled:  # the data moved instead, once
            return replace(reply, seconds=seconds, bytes_up=0)
        return replace(reply, seconds=seconds, bytes_down=received)

    def _fit(
        self,
        server: Server,
        client: int,
        state: Mapping[str, Tensor] | None,
        measure: Measure | None,
        mail: Mapping[str, Tensor],
    ) -> Reply:
        with isolated(self.streams.at(server.round, client)("layers")):  # a network may have Dropout
            local, metrics = self.begin(server, client, state, measure, mail)
            train(local, self.algorithm, self.training, self.weights)
            return self.finish(local, measure, metrics)

    def begin(
        self,
        server: Server,
        client: int,
        state: Mapping[str, Tensor] | None,
        measure: Measure | None,
        mail: Mapping[str, Tensor],
    ) -> tuple[Local, Mapping[str, float]]:
        """A client's round up to its first step: the network is where training starts, the samples are prepared. And
        what was measured before."""
        local = self.open(server, client, state, mail)
        self.algorithm.start(local)
        metrics: dict[str, float] = {}
        if measure is not None:
            metrics |= {f"local_before/{name}": value for name, value in measure(self.model).items()}
        local.samples = self.algorithm.prepare(local)  # may look at the model as received
        if len(local.samples) == 0:
            raise Absent("nothing to train on in this round")
        if self.training.buffers == "reset":
            self.weights.buffers.copy_(self.initial_buffers)
            for norm in self._normal:  # with momentum = None a layer's mean is over as many batches as it has counted
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.zero_()
        return local, metrics

    def finish(self, local: Local, measure: Measure | None, before: Mapping[str, float]) -> Reply:
        """A client's round from its last step on, the network being as trained: what crosses and what stays."""
        client, metrics = local.client, dict(before)
        if self.training.buffers.startswith("recalibrate"):
            only_real = self.training.buffers == "recalibrate_real"
            self._recalibrate(local, local.samples.real if only_real else local.samples)
        if measure is not None:
            metrics |= {f"local_after/{name}": value for name, value in measure(self.model).items()}
        update = self.algorithm.upload(local)
        self._check(update, local)
        update = self._apart(update)
        own = self.weights.own
        reason = not_finite(update, self.weights.buffers, own, local)
        if reason:
            return Reply(client, failure=reason, steps=local.steps, loss=local.loss)
        if self.privacy is not None:
            update = clipped(update, self.privacy.clip)
        buffers, counters = self.weights.buffers.clone(), self.weights.counters
        if len(update.delta) < len(local.params):  # no model crosses, and its statistics do not either
            buffers, counters = buffers[:0], {}
        kept = {**local.mine, **update.keep}
        return Reply(
            client,
            update=update,
            buffers=buffers,
            counters=counters,
            state={
                "own": own,
                **{f"counter.{name}": tensor for name, tensor in self.weights.own_counters.items()},
                **{f"mine.{name}": tensor for name, tensor in kept.items()},
                **({"velocity": local.velocity} if self.training.optimiser == "keep" else {}),
            },
            loss=local.loss,
            steps=local.steps,
            bytes_up=size_of((update.delta, buffers, *counters.values(), *update.extra.values())),
            metrics=metrics | {f"method/{name}": value for name, value in update.metrics.items()},
        )

    def open(
        self,
        server: Server,
        client: int,
        state: Mapping[str, Tensor] | None,
        mail: Mapping[str, Tensor] | None = None,
    ) -> Local:
        """The network becomes this client's at the start of the round that follows `server.round`."""
        if mail is not None and "params" in mail:
            server = replace(server, params=mail["params"])
        self.load(server)
        if state is None:
            mine = {name: tensor.clone() for name, tensor in self.algorithm.client_state(server.params).items()}
        else:
            self.weights.own = state["own"]
            self.weights.own_counters = {name[8:]: t for name, t in state.items() if name.startswith("counter.")}
            mine = {name[5:]: tensor for name, tensor in state.items() if name.startswith("mine.")}
            # what was read from a file is on the CPU; what a method keeps there on purpose stays there. Copies: it may
            # write into them, and the state is needed as it was when the server refuses what comes of it
            mine = {name: tensor.to(self._home(name, server), copy=True) for name, tensor in mine.items()}
        data = self.data(client)
        if len(data) == 0:
            raise EmptyClient(f"client {client} has no samples")
        return Local(
            client=client,
            round=server.round,
            rounds=self.rounds,
            clients=self.clients,
            classes=self.classes,
            profile=self.profile(client),
            model=self.model,
            layout=self.weights.layout,
            params=self.weights.params,
            anchor=server.params,
            buffers=server.buffers,
            shared=server.shared,
            mail=mail or {},
            mine=mine,
            data=data,
            samples=data,
            lr=self.training.lr * self.training.lr_decay**server.round,
            batch_size=self.training.batch,
            streams=self.streams.at(server.round, client),
            transform=self.transform,
            images=lambda counts, first: self.images(client, counts, first),
            device=self.device,
            velocity=torch.empty(0) if state is None or "velocity" not in state else state["velocity"].to(self.device),
            method=self.algorithm,
        )

    def _home(self, name: str, server: Server) -> torch.device:
        """The device on which the method keeps this part of a client's state."""
        if name not in self._homes:
            self._homes |= {key: tensor.device for key, tensor in self.algorithm.client_state(server.params).items()}
        return self._homes[name]

    def _apart(self, update: Update) -> Update:
        """The update, sharing no memory with the network: a method may return `local.params`, and the network is the
        next client's before the server has looked."""
        each = self.weights.all_apart
        return replace(update, delta=self.weights.apart(update.delta), extra=each(update.extra), keep=each(update.keep))

    def _check(self, update: Update, local: Local) -> None:
        undeclared = sorted(set(update.extra) - set(self.algorithm.sends()))
        if undeclared:
            raise UndeclaredField(f"{type(self.algorithm).__name__}.upload sends {undeclared}, which is not in `sends`")
        unknown = sorted(set(update.keep) - set(local.mine))
        if unknown:
            raise UndeclaredField(
                f"{type(self.algorithm).__name__}.upload keeps {unknown}, which `client_state` does not have"
            )

    def _recalibrate(self, local: Local, samples: Samples) -> None:
        """BatchNorm statistics measured anew: the plain average over batches of `samples`, weights as trained."""
        if not self._normal or len(samples) == 0:
            return
        momenta = [module.momentum for module in self._normal]
        for module in self._normal:
            module.reset_running_stats()
            module.momentum = None  # None is PyTorch's word for the cumulative average
        self.model.train()
        try:
            with torch.no_grad():
                for rows in shuffled(local, len(samples), self.training.batch):
                    self.model(plain_batch(local, samples, rows).x)
        finally:  # the network serves other clients after one that failed
            for module, momentum in zip(self._normal, momenta, strict=True):
                module.momentum = momentum


def train(local: Local, algorithm: Algorithm, training: Training, weights: Weights) -> None:
    """The SGD loop: batches of `local.samples`, the method's loss and correction, momentum, weight decay, the step.

    As in torch.optim.SGD, decay is added to the (corrected) gradient and momentum starts at the first gradient.
    """
    for phase in algorithm.phases(local, training):
        with frozen(local.model, weights, phase):
            descend(local, algorithm, training, weights, phase)
        if local.steps and not math.isfinite(local.loss):
            return  # nothing that follows could be used


def descend(local: Local, algorithm: Algorithm, training: Training, weights: Weights, phase: Phase) -> None:
    """One phase of the SGD loop."""
    grad, shared = weights.grad, weights.layout.shared
    moves = {True: phase.shared, False: phase.own}
    moving = grad[0 if phase.shared else shared : None if phase.own else shared]
    spans = [entry for entry in weights.layout.spans() if moves[entry[0].stop <= shared]]
    params = weights.flat[: weights.layout.trained]
    velocity = torch.zeros_like(grad) if training.momentum > 0 else None
    if velocity is not None and training.optimiser == "keep":
        local.velocity = velocity = local.velocity.clone() if len(local.velocity) else velocity
    half = torch.autocast(local.device.type, torch.bfloat16)
    cast = half if training.precision == "bfloat16" else nullcontext()
    total = torch.zeros((), device=local.device)
    for batch in scheduled(local, training, phase, total):
        grad.zero_()
        with cast:
            loss = algorithm.loss(local, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            corrected = algorithm.correct(local, grad[:shared])
            if corrected.data_ptr() != grad.data_ptr():
                grad[:shared].copy_(corrected)
            if training.clip is not None:
                moving.mul_(torch.clamp(training.clip / (moving.norm() + 1e-6), max=1.0))
            for span, rule, rows in spans:
                part = None if velocity is None else velocity[span]
                step(params[span], grad[span], part, training, local.lr, rule, rows)
        total += loss.detach() * len(batch)


def scheduled(local: Local, training: Training, phase: Phase, total: Tensor) -> Iterator[Batch]:
    """The batches of one phase, a step each, which are counted here. Into `total`, a scalar, belongs each batch's loss
    times its samples: each pass starts with zero, and a pass whose mean is not finite is the last."""
    whole = None if training.max_steps is None else training.max_steps - local.steps
    limit = local.steps + min(math.inf if most is None else most for most in (phase.steps, phase.max_steps, whole))
    pull, epoch = 0.0, 0  # pull: what momentum would hold under a constant gradient of 1
    while local.steps < limit and (phase.steps is not None or epoch < phase.epochs):
        total.zero_()
        seen = 0
        for batch in batches(local):
            yield batch
            seen += len(batch)
            pull = training.momentum * pull + 1.0
            local.steps += 1
            local.gradient_weight += 1.0 + training.momentum * pull if training.nesterov else pull
            if local.steps >= limit:
                break
        local.loss = float(total) / seen
        if not math.isfinite(local.loss):
            return
        epoch += 1


@contextmanager
def frozen(model: nn.Module, weights: Weights, phase: Phase) -> Iterator[None]:
    """The network in training mode, except that layers of which nothing moves in this phase are in evaluation mode; no
    gradient is computed of what stands still."""
    model.train()
    moving = {True: phase.own, False: phase.shared}
    owners: dict[str, bool] = {}
    for entry in weights.layout.entries:
        owner = entry.name.rpartition(".")[0]
        if entry.trained:
            owners[owner] = owners.get(owner, False) or moving[entry.own]
    for owner, moves in owners.items():
        if not moves:
            model.get_submodule(owner).training = False  # this layer only, not what is inside it
    if not any(owners.values()):
        model.eval()
    named = dict(model.named_parameters()) if any(owners.values()) else {}
    found = [named[entry.name] for entry in weights.layout.entries if entry.name in named and not moving[entry.own]]
    still = [parameter for parameter in found if parameter.requires_grad]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:  # the network serves other clients after one that failed
        for parameter in still:
            parameter.requires_grad_(True)
        model.train()


def step(
    params: Tensor, grad: Tensor, velocity: Tensor | None, training: Training, lr: float, rule: Rule, rows: int
) -> None:
    """One SGD step on a span of parameters, in place; `grad` is used up."""
    alive = (grad.view(rows, -1) != 0).any(1, keepdim=True) if rule.rows else None
    if training.weight_decay and rule.decay:
        grad.add_(params, alpha=training.weight_decay)
    if velocity is not None:
        moved = (
            velocity * training.momentum + grad if alive is not None else velocity.mul_(training.momentum).add_(grad)
        )
        if alive is not None:
            velocity.view(rows, -1).copy_(torch.where(alive, moved.view(rows, -1), velocity.view(rows, -1)))
        grad = grad.add_(moved, alpha=training.momentum) if training.nesterov else moved
    if alive is not None:
        grad = (grad.view(rows, -1) * alive).view(-1)
    params.add_(grad, alpha=-lr * rule.lr)


def batches(local: Local) -> Iterator[Batch]:
    """One shuffled pass over `local.samples`.

    A last batch of one sample is left out (BatchNorm cannot train on it, and it counts as no step), unless it is all
    there is.
    """
    samples, size = local.samples, local.batch_size
    order = torch.randperm(len(samples), generator=local.rng("batch"))
    if local.real_ratio is not None and bool(samples.fake.any()) and not bool(samples.fake.all()):
        order = mixed(order, samples.fake, size, local.real_ratio)
    if len(order) % size == 1 and len(samples) > 1 and size > 1:
        order = order[:-1]
    at_once = size
    if not getattr(local.transform, "random", True):  # many at a time are the same, and faster
        at_once *= max(1, AT_ONCE // max(1, size * samples.x[0].numel()))
    for rows in torch.split(order, at_once):
        part = samples.take(rows)
        x = local.transform(part.x, rng=local.rng("augment"), augment=~part.fake, device=local.device)
        parts = (x, part.y.to(local.device), part.fake, part.index)
        yield from map(Batch, *(torch.split(tensor, size) for tensor in parts))


def mixed(order: Tensor, fake: Tensor, size: int, ratio: float) -> Tensor:
    """`order` ([N] sample numbers) changed so that every batch of `size`, and a smaller last one, has a share `ratio`
    of real samples, and one of each kind at least where it has two. It is as long as before: samples of the one kind
    come again, some of the other not at all."""
    real, made = order[~fake[order]], order[fake[order]]
    is_real = torch.cat([_first(len(part), ratio) for part in torch.split(order, size)])
    number = torch.where(is_real, is_real.cumsum(0), (~is_real).cumsum(0)) - 1
    return torch.where(is_real, real[number % len(real)], made[number % len(made)])


def _first(size: int, ratio: float) -> Tensor:
    """[size] bool: true for the first share of a batch, of which neither part is empty where it has two samples."""
    share = math.floor(ratio * size + 0.5)
    return torch.arange(size) < (min(max(share, 1), size - 1) if size > 1 else share)


def shuffled(local: Local, number: int, size: int) -> Sequence[Tensor]:
    """Rows of so many samples in batches for BatchNorm to look at: in random order, as samples may lie class by class
    (synthetic ones do), and none alone at the end, which has no variance. The order is a stream of its own."""
    parts = list(torch.split(torch.randperm(number, generator=local.rng("measure")), size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def plain_batch(local: Local, samples: Samples, rows: Tensor) -> Batch:
    """These of the samples, without augmentation."""
    part = samples.take(rows)
    x = local.transform(part.x, rng=None, augment=None, device=local.device)
    return Batch(x, part.y.to(local.device), part.fake, part.index)


@contextmanager
def in_mode(module: nn.Module, mode: Literal["eval", "train"]) -> Iterator[None]:
    """`module` in this mode; each of its layers is as before afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.train(mode == "train")
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within this context, forward passes in training mode leave no trace in BatchNorm's statistics."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


def losses(local: Local, samples: Samples, mode: Literal["eval", "train"] = "eval") -> Tensor:
    """[N] cross-entropy of each sample under the present weights, without augmentation, on the CPU.

    Leaves BatchNorm's statistics alone, in either mode; draws nothing but the order of batches in training mode.
    """
    size = max(local.batch_size, 256)
    order = torch.split(torch.arange(len(samples)), size) if mode == "eval" else shuffled(local, len(samples), size)
    out = torch.empty(len(samples))
    with torch.no_grad(), statistics_kept(local.model), in_mode(local.model, mode):
        for rows in order:
            batch = plain_batch(local, samples, rows)
            out[rows] = nn.functional.cross_entropy(local.model(batch.x), batch.y, reduction="none").float().cpu()
    return out


def full_gradient(local: Local, algorithm: Algorithm) -> Tensor:
    """[P] gradient of the method's loss over all of `local.samples`, at the weights received (`local.anchor`)."""
    trained = local.params.clone()
    # a loss may note there what it saw in training, which this is not
    aside = replace(local, scratch={name: tensor.clone() for name, tensor in local.scratch.items()})
    parameters = [entry for entry in local.layout.entries if entry.trained and not entry.own and not entry.rule.still]
    named = dict(local.model.named_parameters())
    total = torch.zeros_like(trained)
    with statistics_kept(local.model):
        local.params.copy_(local.anchor)
        for rows in shuffled(local, len(local.samples), local.batch_size):
            batch = plain_batch(local, local.samples, rows)
            loss = algorithm.loss(aside, batch) * (len(batch) / len(local.samples))
            grads = torch.autograd.grad(loss, [named[entry.name] for entry in parameters], allow_unused=True)
            for entry, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    entry.view(total).add_(grad)
        local.params.copy_(trained)
    return total


def payload(server: Server, mail: Mapping[str, Tensor]) -> int:
    """Bytes that a client receives at the start of a round: what all get and what it alone does, whose `params` are
    sent instead of the server's."""
    whole = {"params": server.params, **mail}
    return size_of((*whole.values(), server.buffers, *server.counters.values(), *server.shared.values()))


def size_of(tensors: tuple[Tensor, ...]) -> int:
    """Bytes of these tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def not_finite(update: Update, buffers: Tensor, own: Tensor, local: Local) -> str:
    """Why an update must be refused, "" when it is fine."""
    if local.steps and not math.isfinite(local.loss):
        return f"the training loss is {local.loss} after {local.steps} steps"
    if not math.isfinite(update.weight) or update.weight < 0:
        return f"the update's weight is {update.weight}"
    model = {"delta": update.delta, "buffers": buffers, "own": own}
    for name, tensor in (*model.items(), *update.extra.items(), *update.keep.items()):
        if tensor.is_floating_point() and not finite(tensor):
            return f"{name} is not finite after {local.steps} steps"
    return ""
