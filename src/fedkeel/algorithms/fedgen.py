"""FedGen: the server learns to generate features of each class from the clients' heads; they regularise the heads.

Zhu, Hong, Zhou: Data-Free Knowledge Distillation for Heterogeneous Federated Learning. ICML 2021, arXiv 2105.10056.

Departures, and what the paper's code does where the paper is silent: heads are weighted for each label by their
clients' shares of its samples, as in the code, instead of averaging their logits (`ensemble = "avg_logits"`, as the
paper prints). The code's product of that weight and the cross-entropy mixes samples (a column times a row); here each
sample has its own weight. Its label counts start at one and count the batches drawn; here they are those of the
client's training samples, so that labels no participant has are not generated. Its noise is uniform and so are its
labels, over those there are; the paper's Gaussian noise and empirical label distribution are the defaults (`noise`,
`labels`). Its adversarial student term has strength zero and is left out. As in the code, clients have a second term
beside the paper's: their predictions should agree with the head's on features generated for the same labels.

What crosses: beside the model, the generator and the label counts of all down, (1 + G / d) times FedAvg's traffic, and
a client's C label counts up. Nothing stays on clients; the server keeps each client's last label counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import batch_norm, cross_entropy, kl_div, linear, log_softmax, one_hot, relu, softmax

from fedkeel.algorithms.base import Algorithm
from fedkeel.options import option
from fedkeel.records import Batch, Lab, Local, Server, Update
from fedkeel.registry import register


@register("algorithms", "fedgen")
@dataclass(frozen=True, kw_only=True)
class FedGen(Algorithm):
    """Algorithm 1. The first round is FedAvg's: there is no generator yet."""

    paper: ClassVar[str] = "Zhu, Hong, Zhou 2021, arXiv 2105.10056"
    sums: ClassVar[bool] = False  # learns from clients' heads and label counts
    trial: ClassVar[Mapping[str, object]] = {"generator_steps": 1}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {  # of the paper's code
        "mnist": {"noise_size": 32, "hidden": 256, "noise": "uniform", "labels": "uniform"},
        "emnist": {
            "noise_size": 32,
            "hidden": 256,
            "noise": "uniform",
            "labels": "uniform",
            "generator_lr": 1e-4,
            "beta": 1.0,
        },
    }

    # on clients
    alpha: float = option(10.0, "strength of the cross-entropy on generated features", ge=0, grid=(0.1, 1.0, 10.0))
    beta: float = option(10.0, "strength of agreeing with generated features of the batch", ge=0, grid=(0.1, 1.0, 10.0))
    decay: float = option(0.98, "factor on alpha and beta after each round", gt=0, le=1)
    floor: float = option(1e-4, "alpha and beta do not decay below this", ge=0)
    gen_batch: int = option(32, "generated features in a batch, on clients and on the server", ge=2, grid=(32, 64))
    # the generator
    noise_size: int = option(64, "length of the noise vector: 32 for MNIST, 64 for CIFAR", ge=1, grid=(32, 64))
    hidden: int = option(512, "units of the generator's hidden layer: 256 for MNIST, 512 for CIFAR", ge=1)
    noise: Literal["normal", "uniform"] = option("normal", "the noise: Gaussian (paper) or on [0, 1) (its code)")
    labels: Literal["empirical", "uniform"] = option(
        "empirical", "labels to generate: as often as samples have them (paper), or each equally often (its code)"
    )
    # its training on the server
    generator_lr: float = option(3e-4, "learning rate of Adam", gt=0, grid=(1e-4, 3e-4, 1e-3))
    generator_decay: float = option(0.98, "factor on it after each round", gt=0, le=1)
    generator_weight_decay: float = option(1e-2, "weight decay of Adam, added to the gradient", ge=0)
    generator_steps: int = option(50, "steps of Adam in a round", ge=0, grid=(20, 50, 100))
    diversity: float = option(1.0, "strength of the term that keeps features of different noise apart", ge=0)
    ensemble: Literal["weighted_ce", "avg_logits"] = option(
        "weighted_ce", "cross-entropies weighted by label shares (code), or that of the mean logits (paper)"
    )

    def sends(self) -> tuple[str, ...]:
        return ("labels",)

    def server_state(self, params: Tensor) -> dict[str, Tensor]:
        # both are empty until the server has trained a generator; labels: [C] samples by label, of all clients seen
        return {"generator": torch.empty(0), "labels": torch.empty(0, dtype=torch.int64)}

    def off(self, rounds: int | None = None) -> Mapping[str, object]:
        return {"alpha": 0.0, "beta": 0.0} if self.alpha == 0 and self.beta == 0 else {}

    # on a client ------------------------------------------------------------------------------------------------------

    def loss(self, local: Local, batch: Batch) -> Tensor:
        alpha, beta = (self.strength(value, local.round) for value in (self.alpha, self.beta))
        if len(local.shared["generator"]) == 0 or (alpha == 0 and beta == 0):
            return super().loss(local, batch)
        predicted, head = local.model(batch.x), local.model.head
        loss = cross_entropy(predicted, batch.y)
        if alpha:
            y = self.draw(local.shared["labels"], local.rng("generator", "labels")).to(local.device)
            share = self.gen_batch / local.batch_size
            loss = loss + alpha * share * cross_entropy(head(self.generated(local, y)), y)
        if beta:
            with torch.no_grad():
                target = softmax(head(self.generated(local, batch.y)), dim=1)
            loss = loss + beta * kl_div(log_softmax(predicted, dim=1), target, reduction="batchmean")
        return loss

    def strength(self, value: float, number: int) -> float:
        """alpha or beta in round `number` (from 0)."""
        return max(self.floor, value * self.decay**number) if value else 0.0

    def generated(self, local: Local, y: Tensor) -> Tensor:
        """[B, D] features for labels `y` ([B]), by the generator in evaluation mode."""
        generator = Generator(local.classes, self.noise_size, self.hidden, local.model.width)
        weights, statistics = generator.parts(local.shared["generator"].to(local.device))
        with torch.no_grad():
            return generator(weights, statistics, y, self.noisy(len(y), local.rng("generator", "noise"), local.device))

    def upload(self, local: Local) -> Update:
        labels = local.samples.counts(local.classes)
        return replace(super().upload(local), extra={"labels": labels})

    # on both ----------------------------------------------------------------------------------------------------------

    def draw(self, counts: Tensor, rng: torch.Generator) -> Tensor:
        """[gen_batch] int64 labels on the CPU, of those with samples. counts: [C]."""
        chances = counts.cpu().float() if self.labels == "empirical" else (counts.cpu() > 0).float()
        return torch.multinomial(chances, self.gen_batch, replacement=True, generator=rng)

    def noisy(self, n: int, rng: torch.Generator, device: torch.device) -> Tensor:
        """[n, noise_size] noise."""
        sample = torch.randn if self.noise == "normal" else torch.rand
        return sample(n, self.noise_size, generator=rng).to(device)

    # on the server ----------------------------------------------------------------------------------------------------

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        lab, layout = server.lab, server.layout
        assert lab is not None and layout is not None
        entries = [entry for entry in layout.entries if entry.trained and entry.name.startswith("head.")]
        assert not any(entry.own for entry in entries), "FedGen needs the clients' heads"
        heads: list[dict[str, Tensor]] = []
        labels: list[Tensor] = []
        nobody = torch.zeros(server.clients, lab.classes, dtype=torch.int64)
        known = server.private.get("labels", nobody).cpu().clone()

        def noted() -> Iterator[Update]:  # heads only: memory must not grow by a model for each participant
            for update in updates:
                heads.append(
                    {entry.name[5:]: entry.view(server.params) + entry.view(update.delta) for entry in entries}
                )
                labels.append(update.extra["labels"].cpu().clamp_min(0))  # whatever a client may send
                known[update.client] = labels[-1]
                yield update

        after = super().aggregate(server, noted())
        generator, adam = self.trained(server, lab, heads, torch.stack(labels))
        return replace(
            after,
            shared={"generator": generator, "labels": known.sum(0)},
            private={**server.private, **adam, "labels": known},
        )

    def trained(
        self, server: Server, lab: Lab, heads: list[dict[str, Tensor]], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator after this round's steps ([G]) and the state of Adam. labels: [K, C] counts of participants,
        in the order of `heads`."""
        generator = Generator(lab.classes, self.noise_size, self.hidden, lab.model.width)
        flat = server.shared["generator"]
        if len(flat) == 0:
            flat = generator.first(lab.streams("generator", "first"))
        weights, statistics = (part.to(lab.device, copy=True) for part in generator.parts(flat))
        weights.requires_grad_()
        nothing = torch.zeros_like(weights)
        adam = {name: server.private.get(f"adam.{name}", nothing).clone() for name in ("first", "second")}
        count = int(server.private.get("adam.steps", torch.tensor(0)))
        lr = self.generator_lr * self.generator_decay**server.round
        together = {name: torch.stack([head[name] for head in heads]) for name in heads[0]}
        shares = labels / labels.sum(0).clamp(min=1)  # alpha_k^y, [K, C]: sums to 1 over k for every label there is
        draws, noises = lab.streams("generator", "labels"), lab.streams("generator", "noise")
        for _ in range(self.generator_steps):
            y = self.draw(labels.sum(0), draws)
            noise = self.noisy(len(y), noises, lab.device)
            share, y = shares[:, y].to(lab.device), y.to(lab.device)
            z = generator(weights, statistics, y, noise, train=True)
            loss = self.distilled(lab.model.head, together, z, y, share) + self.diversity * closeness(noise, z)
            (grad,) = torch.autograd.grad(loss, weights)
            count += 1
            adam_step(weights, grad, adam, count, lr, self.generator_weight_decay)
        state = {"adam.first": adam["first"], "adam.second": adam["second"], "adam.steps": torch.tensor(count)}
        return torch.cat([weights.detach(), statistics]), state

    def distilled(self, head: nn.Module, heads: Mapping[str, Tensor], z: Tensor, y: Tensor, shares: Tensor) -> Tensor:
        """How badly the clients' heads recognise features z ([B, D]) as labels y ([B]).

        heads: their weights by name, [K, ...] each. shares: [K, B] weights of the heads for each sample.
        """
        logits: Tensor = vmap(lambda weights: functional_call(head, weights, (z,)))(heads)  # [K, B, C]
        if self.ensemble == "avg_logits":
            return cross_entropy(logits.mean(0), y)
        wrong = -log_softmax(logits, dim=2).gather(2, y.expand(len(logits), -1)[..., None])[..., 0]  # [K, B]
        return (shares * wrong).sum(0).mean()


@dataclass(frozen=True)
class Generator:
    """G(z | y): linear - BatchNorm - ReLU - linear on noise and one-hot label, its weights in one vector, [G].

    The vector ends with BatchNorm's running mean and variance.
    """

    classes: int
    noise: int
    hidden: int
    width: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of weight and bias of the first layer, scale and shift of BatchNorm, weight and bias of the second layer."""
        inputs, hidden, width = self.noise + self.classes, self.hidden, self.width
        return (hidden, inputs), (hidden,), (hidden,), (hidden,), (width, hidden), (width,)

    def first(self, rng: torch.Generator) -> Tensor:
        """[G] initial weights: PyTorch's for linear layers, uniform within 1 / sqrt(inputs)."""

        def layer(inputs: int, outputs: int) -> Tensor:
            return (2 * torch.rand((inputs + 1) * outputs, generator=rng) - 1) / math.sqrt(inputs)

        one, zero = torch.ones(self.hidden), torch.zeros(self.hidden)
        inner, outer = layer(self.noise + self.classes, self.hidden), layer(self.hidden, self.width)
        return torch.cat([inner, one, zero, outer, zero, one])

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The trained weights and BatchNorm's statistics ([2 hidden]) in [G]."""
        return flat[: -2 * self.hidden], flat[-2 * self.hidden :]

    def __call__(self, weights: Tensor, statistics: Tensor, y: Tensor, noise: Tensor, train: bool = False) -> Tensor:
        """[B, width] features for labels `y` ([B]); in training mode `statistics` move."""
        parts = torch.split(weights, [math.prod(shape) for shape in self.shapes])
        w1, b1, scale, shift, w2, b2 = (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
        mean, variance = torch.split(statistics, self.hidden)
        inputs = torch.cat([noise, one_hot(y, self.classes).to(noise.dtype)], dim=1)
        hidden = batch_norm(linear(inputs, w1, b1), mean, variance, scale, shift, training=train)
        return linear(relu(hidden), w2, b2)


def closeness(noise: Tensor, z: Tensor) -> Tensor:
    """exp(-mean over pairs of squared distance of noise times distance of features), both per element; at most 1.

    noise: [B, n]. z: [B, D].
    """
    apart = (noise[:, None] - noise[None]).square().mean(2) * (z[:, None] - z[None]).abs().mean(2)
    return torch.exp(-apart.mean())


def adam_step(
    weights: Tensor, grad: Tensor, moments: Mapping[str, Tensor], count: int, lr: float, weight_decay: float
) -> None:
    """Step number `count` (from 1) of Adam with decay in the gradient; changes `weights` and both `moments`.

    As torch.optim.Adam, whose first use costs two seconds of imports.
    """
    with torch.no_grad():
        grad = grad + weight_decay * weights
        moments["first"].lerp_(grad, 0.1)
        moments["second"].mul_(0.999).addcmul_(grad, grad, value=0.001)
        root = (moments["second"] / (1 - 0.999**count)).sqrt_().add_(1e-8)
        weights.addcdiv_(moments["first"], root, value=-lr / (1 - 0.9**count))
