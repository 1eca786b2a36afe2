"""MOON: contrasts a client's features with those of the global model and of its own previous one.

Li, He, Song: Model-Contrastive Federated Learning. CVPR 2021, arXiv 2103.16257.

Departures: the features are by default those that the model's head sees, for comparisons on one network; the paper's
network, for all methods it compares, has a two-layer projection before the head (`projection_head = "official"`). A
client without previous model has no contrastive term until it has one; the paper's code skips only its first round and
then contrasts clients that never took part with their random initial network. Both reference networks are in evaluation
mode, as in the paper's code; so with BatchNorm they use running statistics where the network that trains uses those of
the batch: the received ones for the global model, its own for a previous model. How far apart the modes alone put the
features is in the records: `method/mode_mismatch`, 1 - cos(z, z_global) in a client's first batch, where both networks
have the same weights; the mean over clients with a contrastive term, about 0 without BatchNorm.

What crosses: as FedAvg. What stays: the client's last models with their BatchNorm statistics, one by default.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from fedkeel.algorithms.base import Algorithm
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.records import Batch, Local, Update
from fedkeel.reference import features, present, received
from fedkeel.registry import register


@register("algorithms", "moon")
@dataclass(frozen=True, kw_only=True)
class Moon(Algorithm):
    """Algorithm 1: local objective cross-entropy + mu l_con."""

    paper: ClassVar[str] = "Li, He, Song 2021, arXiv 2103.16257"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {  # of the paper
        "cifar10": {"projection_head": "official", "mu": 5.0},
        "cifar100": {"projection_head": "official", "mu": 1.0},
        "tiny-imagenet": {"projection_head": "official", "mu": 1.0},
    }

    mu: float = option(
        1.0,
        "strength of the contrastive term (mu); the paper's best: 5 on CIFAR-10, 1 on CIFAR-100 and Tiny-ImageNet",
        ge=0,
        grid=(0.001, 0.01, 0.1, 1.0, 5.0, 10.0),
        off=0.0,
    )
    temperature: float = option(0.5, "temperature of the contrastive term (tau)", gt=0, grid=(0.1, 0.5, 1.0))
    projection_head: Literal["none", "official"] = option(
        "none", "what lies between features and head: nothing, or the paper's linear - ReLU - linear"
    )
    projection: int = option(256, "outputs of the official projection head", ge=1, grid=(64, 128, 256))
    buffer: int = option(1, "previous models that a client keeps, the oldest leaving first", ge=1, grid=(1, 2, 5))
    first: Literal["skip", "global"] = option(
        "skip", "a client without previous model: no contrastive term, or the global model in its place (a constant)"
    )

    def build(self, model: Split) -> Split:
        if self.projection_head == "none":
            return model
        width = model.width
        layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.projection))
        body = nn.Sequential(OrderedDict(body=model.features, projection=nn.Sequential(*layers)))
        return Split(body, nn.Linear(self.projection, _outputs(model)), self.projection)

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        return {"previous": params.new_empty(0)}

    def loss(self, local: Local, batch: Batch) -> Tensor:
        others = self.others(local)  # ahead of the forward pass, which moves BatchNorm's statistics
        z = local.model.embed(batch.x)
        loss = cross_entropy(local.model.head(z), batch.y)
        if len(others) == 0:
            return loss
        near = [features(local, other, batch.x) for other in others]
        if "mismatch" not in local.scratch:
            local.scratch["mismatch"] = 1 - cosine_similarity(z.detach(), near[0]).mean()
        return loss + self.mu * contrast(z, near, self.temperature)

    def others(self, local: Local) -> Tensor:
        """[1 + k, T] the global model and the k previous ones; none of them ([0]) without contrastive term."""
        if "others" not in local.scratch:
            previous = local.mine["previous"]
            if len(previous) == 0 and self.first == "global":
                previous = received(local)[None]
            off = self.mu == 0 or len(previous) == 0
            local.scratch["others"] = torch.empty(0) if off else torch.cat([received(local)[None], previous])
        return local.scratch["others"]

    def upload(self, local: Local) -> Update:
        kept, new = local.mine["previous"], present(local)[None]
        previous = torch.cat([kept, new])[-self.buffer :].clone() if len(kept) else new
        moved, seen = local.params - local.anchor, local.scratch.get("mismatch")
        metrics = {} if seen is None else {"mode_mismatch": float(seen)}
        return Update(self.weight(local), moved, keep={"previous": previous}, metrics=metrics)


def contrast(z: Tensor, others: list[Tensor], temperature: float) -> Tensor:
    """The contrastive term l_con, the mean over the batch. z: [B, D]. others: [B, D] each, the global model's first."""
    near = torch.stack([cosine_similarity(z, other) for other in others], dim=1)  # [B, 1 + k]
    return -log_softmax(near / temperature, dim=1)[:, 0].mean()


def _outputs(model: Split) -> int:
    return [layer for layer in model.head.modules() if isinstance(layer, nn.Linear)][-1].out_features
