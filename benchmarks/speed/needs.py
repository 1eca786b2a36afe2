"""What the equations of each method need beside plain training, and nothing else: `limit` of loops.py with its passes.

For the `cnn`. Values do not matter here, only what is computed, in the fewest operations that we know of; these are no
implementations of the methods. A method that is not here needs what FedAvg does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from workloads import CLASSES, Workload, network

STAGE = slice(3, 6)
"""The last stage of the `cnn` as FedAlign sees it: convolution, ReLU, pooling; before it 16 channels, after it 32."""
WIDTH = 360
"""Length of its feature vector."""


@dataclass(frozen=True)
class Need:
    """What a round is made of. loss: the scalar to descend, of images [B, C, H, W] and labels [B]; own: what is trained
    beside the network; server: what the server does after averaging; evaluated: how many models a round evaluates."""

    loss: Callable[[Tensor, Tensor], Tensor]
    own: nn.Module | None = None
    server: Callable[[], None] = lambda: None
    evaluated: int = 1


Needs = Callable[[nn.Module, Workload], Need]
"""Of a network and its workload."""


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FedAvg's loss."""
    return F.cross_entropy(model(x), y)


def frozen(work: Workload) -> nn.Sequential:
    """Another network of the workload, standing still."""
    model = network(work)
    assert isinstance(model, nn.Sequential)
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def moon(model: nn.Module, work: Workload) -> Need:
    """Two forward passes of other bodies, the cosine of their features with the network's."""
    others = [frozen(work)[:-1], frozen(work)[:-1]]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = model[:-1](x)
        near = torch.stack([F.cosine_similarity(z, other(x)) for other in others], 1)
        return F.cross_entropy(model[-1](z), y) - F.log_softmax(near / 0.5, 1)[:, 0].mean()

    return Need(loss)


def fedntd(model: nn.Module, work: Workload) -> Need:
    """A forward pass of another network, the divergence of all classes but one."""
    teacher = frozen(work)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        student, others = model(x), (y[:, None] + torch.arange(1, CLASSES)) % CLASSES
        mine, theirs = (F.log_softmax(each.gather(1, others), 1) for each in (student, teacher(x)))
        return F.cross_entropy(student, y) + F.kl_div(mine, theirs, log_target=True, reduction="batchmean")

    return Need(loss)


def fedalign(model: nn.Module, work: Workload) -> Need:
    """The last stage forward and back at a quarter of its width, ten power iterations of both widths' matrices."""
    convolution = model[STAGE.start]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide_in = model[: STAGE.start](x)
        wide_out = model[STAGE](wide_in)
        narrow_in = wide_in.detach()[:, : wide_in.shape[1] // 4]
        weight, bias = convolution.weight[: 32 // 4, : narrow_in.shape[1]], convolution.bias[: 32 // 4]
        narrow_out = F.max_pool2d(F.relu(F.conv2d(narrow_in, weight, bias)), 2)
        wide = spectral(wide_in.detach(), wide_out.detach())
        second = F.mse_loss(spectral(narrow_in, narrow_out), wide)
        first = F.cross_entropy(model[STAGE.stop :](wide_out), y)
        return first + 0.45 * (first / (second + 1e-12)).detach() * second

    return Need(loss)


def spectral(inputs: Tensor, outputs: Tensor) -> Tensor:
    """[B] square roots of the largest eigenvalues of X X^T, which is multiplied out once."""
    a, b = F.adaptive_avg_pool2d(inputs, outputs.shape[2:]).flatten(2), outputs.flatten(2)
    x = a @ b.transpose(1, 2) / a.shape[2]
    square, v = x @ x.transpose(1, 2), x.new_ones(len(x), x.shape[1], 1)
    for _ in range(10):
        v = square @ v
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-12)
        v = v / length
    return length[:, 0, 0].sqrt()


def fedgen(model: nn.Module, work: Workload) -> Need:
    """52 generated features a step, through the head for two terms; on the server 50 steps of the generator."""
    generator = nn.Sequential(nn.Linear(64 + CLASSES, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, WIDTH))
    heads, adam = network(work)[-1], torch.optim.Adam(generator.parameters(), 3e-4)
    weight = heads.weight.detach().expand(work.cohort, -1, -1).flatten(0, 1).clone()

    def inputs(y: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(y), 64)
        return torch.cat([noise, F.one_hot(y, CLASSES)], 1), noise

    def loss(x: Tensor, y: Tensor) -> Tensor:
        drawn, student, head = torch.randint(CLASSES, (32,)), model(x), model[-1]
        with torch.no_grad():
            z = generator.eval()(inputs(torch.cat([drawn, y]))[0])
            target = head(z[32:]).softmax(1)
        near = F.kl_div(F.log_softmax(student, 1), target, reduction="batchmean")
        return F.cross_entropy(student, y) + F.cross_entropy(head(z[:32]), drawn) + near

    def server() -> None:
        generator.train()
        for _ in range(50):
            y = torch.randint(CLASSES, (32,))
            given, noise = inputs(y)
            z = generator(given)
            logits = F.linear(z, weight).view(len(y) * work.cohort, CLASSES)
            apart = (noise[:, None] - noise).square().mean(2) * (z[:, None] - z).abs().mean(2)
            adam.zero_grad()
            (F.cross_entropy(logits, y.repeat_interleave(work.cohort)) + torch.exp(-apart.mean())).backward()
            adam.step()

    return Need(loss, server=server)


class Gate(nn.Module):
    """Scores of five blocks of each of the network's eight tensors, for a batch."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(pixels, 40), nn.BatchNorm1d(40), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        scores = self.scores((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).mean(0).clamp(min=0.2)
        taken = (scores >= scores.median()).to(x.dtype)
        return scores * (taken + scores - scores.detach())


def pfedgate(model: nn.Module, work: Workload) -> Need:
    """The gate forward and back; each parameter times the factors of its blocks."""
    gate, named = Gate(work.shape[1] * work.shape[2]), dict(model.named_parameters())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        gated = {}
        for (name, parameter), factors in zip(named.items(), gate(x).view(8, 5), strict=True):
            blocks = 5 if parameter.numel() % 5 == 0 else 2  # of a short vector fewer: what it costs is the same
            stored = parameter.permute(0, 2, 3, 1) if parameter.dim() == 4 else parameter
            times = (stored.reshape(blocks, -1) * factors[:blocks, None]).view(stored.shape)
            gated[name] = times.permute(0, 3, 1, 2) if parameter.dim() == 4 else times
        return F.cross_entropy(functional_call(model, gated, (x,)), y)

    return Need(loss, own=gate, evaluated=0)


def dynafed(model: nn.Module, work: Workload) -> Need:
    """On the server 20 steps on all of 150 images."""
    adam = torch.optim.Adam(model.parameters(), 1e-4)
    x = torch.randn(15 * CLASSES, *work.shape).contiguous(memory_format=torch.channels_last)
    target = torch.full((len(x), CLASSES), 1 / CLASSES)

    def server() -> None:
        for _ in range(20):
            adam.zero_grad(set_to_none=False)  # they are views
            F.cross_entropy(model(x), target).backward()
            adam.step()

    return Need(partial(plain, model), server=server)


def feddyn(model: nn.Module, work: Workload) -> Need:
    """Its own model and the mean of the participants' are evaluated."""
    return Need(partial(plain, model), evaluated=2)


def fedrep(model: nn.Module, work: Workload) -> Need:
    """Four epochs on the head, one on the body; no model of all."""
    steps, done = work.steps // work.cohort, count()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(next(done) % steps * work.epochs >= 4 * steps):
            z = model[:-1](x)
        return F.cross_entropy(model[-1](z), y)

    return Need(loss, evaluated=0)


def unevaluated(model: nn.Module, work: Workload) -> Need:
    """No model of all."""
    return Need(partial(plain, model), evaluated=0)


NEEDS: dict[str, Needs] = {
    **dict.fromkeys(("fedamp", "fedbn", "fedcac", "separate"), unevaluated),
    **{each.__name__: each for each in (dynafed, fedalign, feddyn, fedgen, fedntd, fedrep, moon, pfedgate)},
}
"""By the method's name."""
