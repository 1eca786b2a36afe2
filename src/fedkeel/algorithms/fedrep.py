"""FedRep: clients share the body of the network and each has a head of its own.

Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021, arXiv 2102.07078.

In each round a client first trains its head for many epochs on the received body, then the body for few epochs under
its new head. The part that stands still is in evaluation mode, so that BatchNorm's statistics stand still with it, and
neither momentum nor weight decay moves it. With `local.steps` instead of epochs, the steps are dealt to the two parts
in the ratio of their epochs; so are those of `local.max_steps`.

Departures: each part has an optimiser of its own (in the authors' code one serves both, and its momentum crosses over);
weight decay is on all tensors; heads are not tuned once more after the last round.

What crosses: the body, less than FedAvg's traffic. What stays: the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.records import Local, Phase
from fedkeel.registry import register

if TYPE_CHECKING:
    from fedkeel.local import Training


@register("algorithms", "fedrep")
@dataclass(frozen=True, kw_only=True)
class FedRep(Algorithm):
    """Algorithm 1; a personal model is the new body under the client's own head, as old as that may be."""

    paper: ClassVar[str] = "Collins et al. 2021, arXiv 2102.07078"
    kind: ClassVar[Literal["global", "personal"]] = "personal"
    has_global: ClassVar[bool] = False

    weights: Literal["samples", "uniform", "trained"] = option(
        "uniform", "weight of a client in the average of bodies; the paper's is the same for all"
    )
    head_epochs: int = option(
        10, "epochs on the head, the body standing still (instead of local.epochs)", ge=0, grid=(1, 5, 10)
    )
    body_epochs: int = option(1, "epochs on the body after that, the head standing still", ge=0, grid=(1, 5), off=0)
    last_block: bool = option(False, "the last block of the body is a client's own too")

    def build(self, model: Split) -> Split:
        if self.last_block:
            for module in last(model.features).modules():
                vars(module)["own"] = True
        return model

    def personal(self, name: str, module: nn.Module) -> bool:
        return name.startswith("head.") or vars(module).get("own", False)

    def phases(self, local: Local, training: Training) -> Sequence[Phase]:  # first the head, then the body
        head, body = self.head_epochs, self.body_epochs
        most = training.max_steps
        if training.steps is None:
            first = None if most is None else most * head // max(head + body, 1)
            return Phase(head, max_steps=first, shared=False), Phase(body, own=False)
        steps = training.steps if most is None else min(training.steps, most)
        first = steps * head // max(head + body, 1)
        return Phase(steps=first, shared=False), Phase(steps=steps - first if body else 0, own=False)


def last(body: nn.Module) -> nn.Module:
    """The last of the body's blocks that has parameters: a residual block, or a single layer of a plain network."""
    trained = [child for child in body.children() if next(child.parameters(), None) is not None]
    if not trained:
        return body
    return last(trained[-1]) if isinstance(trained[-1], nn.Sequential) else trained[-1]
