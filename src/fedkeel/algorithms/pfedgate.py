"""pFedGate: a gate on each client chooses, batch by batch, which blocks of the shared network it uses and how much.

Chen, Yao, Gao, Ding, Li: Efficient Personalized Federated Learning via Sparse Model-Adaptation. ICML 2023,
arXiv 2305.02776.

Each parameter tensor is cut into `split` blocks. The gate maps a batch of images to one score for each block; blocks
are taken by falling score while they fit into a budget, for linear layers and for all others apart, and each block
taken is multiplied by its score. The first block of a tensor is always taken, so that nothing is cut through: the share
of the parameters that are used is 1 / `split` at least. The gate is trained together with the network, by the same
optimiser.

A client's model at test time is the network under its own gate. A score is the mean over the batch: results depend on
`evaluate.batch`, which belongs beside them. Scores begin near 1/2 and halve the weights, so the method wants larger
learning rates than others; the authors' grid goes up to 0.5.

Departures: images reach the gate averaged to `input_size` squared pixels, since its first layer grows with them (the
authors' are all 28 or 32); for a network without convolutions, flattened as they are. Score and factor are the same
clipped number (authors' code: the factor is not clipped), and straight-through gradients reach blocks that were not
taken, which otherwise could not come back. A batch of one image uses the gate's running statistics. Gate and network
always step together (the authors' `bi_level = 0`), with one schedule; `local.clip = 10` clips both gradients jointly,
where the authors clip each at 10. Beside the first blocks, a share s - 1 / split of all parameters may be taken, so
that s of them are used at most, less by what no block fits into (with 5 blocks a large tensor's is a fifth of it: 0.41
of the network `cnn` at s = 0.5); in the authors' code it is a share of the other blocks only (0.3 * 0.8 + 0.2 = 0.44).
Their averages are over all clients by default (here `denominator = "all"`, with absent ones unchanged).

What crosses: as FedAvg; an update is dense here, though a client that always takes the same blocks would change a share
`sparsity` of it only. What stays: the gate. The network without a gate is no model of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d, batch_norm

from fedkeel.algorithms.base import Algorithm
from fedkeel.errors import ConfigError
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.registry import register
from fedkeel.weights import Rule, treat

LEAST = 0.1
"""No score is below this, nor below 1 / split, unless the sparsity is."""
STEPS = 10
"""Blocks are compared by scores rounded to this many steps; among equals the first comes first."""


@register("algorithms", "pfedgate")
@dataclass(frozen=True, kw_only=True)
class PFedGate(Algorithm):
    """Algorithm 1: min f_k(M(g(x)) * theta) over the shared theta and the client's gate, |M| within the budget."""

    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2305.02776"
    kind: ClassVar[Literal["global", "personal"]] = "personal"
    has_global: ClassVar[bool] = False

    sparsity: float = option(
        0.5,
        "share of the parameters that a client uses at most (s), at least 1 / split",
        gt=0,
        le=1,
        grid=(0.3, 0.5, 1.0),
    )
    split: int = option(5, "blocks of each parameter tensor", ge=2)
    gate_lr: float = option(1.0, "learning rate of the gate as a factor of the model's", ge=0, grid=(0.3, 1.0, 3.0))
    input_size: int = option(32, "side of the images that the gate sees, in pixels", ge=1, grid=(8, 16, 32))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity < 1 / self.split:
            allowed = f"must be at least 1 / split = {1 / self.split:.4g}, since first blocks are always taken"
            raise ConfigError("sparsity", self.sparsity, allowed)

    def build(self, model: Split) -> Split:
        return Gated(model, self.sparsity, self.split, self.input_size, Rule(lr=self.gate_lr))

    def personal(self, name: str, module: nn.Module) -> bool:
        return name.startswith("gate.")


class Gated(Split):
    """A network whose parameters are multiplied by a mask and factors that depend on the batch."""

    def __init__(self, model: Split, sparsity: float, split: int, size: int, rule: Rule) -> None:
        super().__init__(model.features, model.head, model.width)
        self.sparsity, self.first = sparsity, 1 / split
        self.least = min(max(1 / split, LEAST), sparsity)
        parts = (("features", model.features), ("head", model.head))
        tensors = [
            (f"{part}.{name}", parameter.numel(), isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear))
            for part, module in parts
            for name, parameter in module.named_parameters()
        ]
        self.blocks = {name: sizes(numel, split) for name, numel, _ in tensors}
        """Sizes of the blocks of each parameter."""
        self.groups = [[name for name, _, linear in tensors if linear == group] for group in (True, False)]
        """Names of the parameters that share a budget: those of linear layers, and all others."""
        self.gate = Gate(first_layer(model), size, sum(len(part) for part in self.blocks.values()))
        for module in self.gate.modules():
            for name, _ in module.named_parameters(recurse=False):
                treat(module, name, rule)

    def embed(self, x: Tensor) -> Tensor:
        return self._features(x, self.factors(x))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        logits: Tensor = functional_call(self.head, self._gated("head", factors), (self._features(x, factors),))
        return logits

    def factors(self, x: Tensor) -> Tensor:
        """[L] what each block is multiplied by: its score for this batch, or 0 where it is not taken."""
        scores: Tensor = self.gate(x).mean(0).clamp(min=self.least)
        if self.sparsity == 1:
            return scores
        taken = self.taken(scores.detach())
        through = taken + (scores - scores.detach())  # straight through: the mask's gradient is the score's
        return scores * through

    def taken(self, scores: Tensor) -> Tensor:
        """[L] 1 for the blocks that are used, 0 for the others."""
        values, mask, start = (scores * STEPS).round().tolist(), [1.0] * len(scores), {}
        place = 0
        for name, part in self.blocks.items():
            start[name], place = place, place + len(part)
        for group in self.groups:
            total = sum(sum(self.blocks[name]) for name in group)
            budget = round((self.sparsity - self.first) * total)
            rest = [(start[name] + i, size) for name in group for i, size in enumerate(self.blocks[name]) if i > 0]
            for block, size in sorted(rest, key=lambda item: -values[item[0]]):
                if size <= budget:
                    budget -= size
                else:
                    mask[block] = 0.0
        return torch.tensor(mask, device=scores.device)

    def _features(self, x: Tensor, factors: Tensor) -> Tensor:
        z: Tensor = functional_call(self.features, self._gated("features", factors), (x,))
        return z

    def _gated(self, part: str, factors: Tensor) -> dict[str, Tensor]:
        """The parameters of a part, each times its factors."""
        named, place, gated = dict(self.get_submodule(part).named_parameters()), 0, {}
        for name, blocks in self.blocks.items():
            if name.startswith(f"{part}."):
                own = name[len(part) + 1 :]
                gated[own] = times(named[own], factors[place : place + len(blocks)], blocks[0])
            place += len(blocks)
        return gated


class Gate(nn.Module):
    """Scores of the blocks: images [B, C, H, W] to (0, 1), [B, L]."""

    def __init__(self, first: nn.Conv2d | nn.Linear, size: int, blocks: int) -> None:
        super().__init__()
        self.size = size if isinstance(first, nn.Conv2d) else None
        self.norm = SwitchNorm(first.in_channels if isinstance(first, nn.Conv2d) else 1)
        inputs = first.in_channels * size**2 if isinstance(first, nn.Conv2d) else first.in_features
        self.linear = nn.Linear(inputs, blocks)
        self.spread = nn.BatchNorm1d(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, None, None] if self.size is None else adaptive_avg_pool2d(x, self.size)
        z = self.linear(self.norm(x).flatten(1))
        one = self.spread
        if self.training and len(x) == 1:  # one value has no variance
            return torch.sigmoid(batch_norm(z, one.running_mean, one.running_var, one.weight, one.bias, eps=one.eps))
        return torch.sigmoid(one(z))


class SwitchNorm(nn.Module):
    """Normalisation of images [B, C, H, W] by learnt mixtures of the means and variances of instance, layer and batch.

    Luo, Ren, Peng, Zhang, Li: Differentiable Learning-to-Normalize via Switchable Normalization. ICLR 2019,
    arXiv 1806.10779. Running variances begin at 1, not at 0.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.momentum, self.eps = channels, momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, square = x.mean((2, 3)), x.square().mean((2, 3))  # [B, C], of each image and channel
        over_layer = mean.mean(1, keepdim=True)
        layer = square.mean(1, keepdim=True) - over_layer**2
        if self.training:
            over_batch = mean.mean(0)
            batch = square.mean(0) - over_batch**2
            with torch.no_grad():
                self.running_mean.lerp_(over_batch, self.momentum)
                self.running_var.lerp_(batch, self.momentum)
        else:
            over_batch, batch = self.running_mean, self.running_var
        a, b = (weight.softmax(0).unbind() for weight in (self.mean_weight, self.var_weight))
        centre = a[0] * mean + a[1] * over_layer + a[2] * over_batch
        var = (b[0] * (square - mean**2) + b[1] * layer + b[2] * batch).clamp(min=0)
        scale = self.weight / (var + self.eps).sqrt()
        return x * scale[:, :, None, None] + (self.bias - centre * scale)[:, :, None, None]


def times(parameter: Tensor, factors: Tensor, each: int) -> Tensor:
    """`parameter` with each block of `each` elements (the last of what is left) multiplied by its factor, stored in the
    order of `weights`, which for convolutions is channels last: another order would be convolved by other kernels, with
    other rounding."""
    if parameter.dim() != 4 and parameter.numel() == len(factors) * each:
        return (parameter.view(-1, each) * factors[:, None]).view(parameter.shape)
    # expanded, not repeated by index, whose gradient on CUDA is not exact
    factors = factors[:, None].expand(-1, each).reshape(-1)[: parameter.numel()].view(parameter.shape)
    if parameter.dim() != 4:
        return parameter * factors
    return (parameter.permute(0, 2, 3, 1) * factors.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def sizes(numel: int, split: int) -> list[int]:
    """Sizes of at most `split` neighbouring blocks of a tensor: equal ones, the last with what is left."""
    each = math.ceil(numel / min(split, numel))
    count = math.ceil(numel / each)
    return [each] * (count - 1) + [numel - each * (count - 1)]


def first_layer(model: nn.Module) -> nn.Conv2d | nn.Linear:
    """The layer that sees the images."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
