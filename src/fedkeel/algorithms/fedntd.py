"""FedNTD: distils from the global model what it says of the classes that a sample is not.

Lee, Jeong, Shin, Bae, Yun: Preservation of the Global Knowledge by Not-True Distillation in Federated Learning.
NeurIPS 2022, arXiv 2106.03097.

Departure: the teacher, which is the model received, is in evaluation mode, with the BatchNorm statistics received; the
paper's code leaves it in whatever mode the model was.

What crosses: as FedAvg. Nothing stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fedkeel.algorithms.base import Algorithm
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.records import Batch, Local
from fedkeel.reference import logits, received
from fedkeel.registry import register


@register("algorithms", "fedntd")
@dataclass(frozen=True, kw_only=True)
class FedNTD(Algorithm):
    """Local objective cross-entropy + beta L_NTD."""

    paper: ClassVar[str] = "Lee et al. 2022, arXiv 2106.03097"

    beta: float = option(1.0, "strength of the distillation (beta)", ge=0, grid=(0.1, 0.3, 1.0, 3.0), off=0.0)
    temperature: float = option(1.0, "temperature of the distillation (tau)", gt=0, grid=(1.0, 2.0, 3.0, 5.0))

    def idle(self, model: Split, classes: int) -> str:
        alone = f"with {classes} classes there is nothing to distil, as a sample has one other class at most"
        return f"{alone}, so this is FedAvg" if classes <= 2 else ""

    def loss(self, local: Local, batch: Batch) -> Tensor:
        if self.beta == 0:
            return super().loss(local, batch)
        teacher = logits(local, received(local), batch.x)
        student = local.model(batch.x)
        distance = not_true(student, teacher, batch.y, self.temperature)
        return cross_entropy(student, batch.y) + self.beta * distance


def not_true(student: Tensor, teacher: Tensor, y: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(teacher || student) over the classes other than the true one, the mean over the batch.

    student, teacher: [B, C] logits. y: [B] true classes. The true logit is left out, not set to zero; zero if C = 2.
    """
    others = torch.arange(student.shape[1] - 1, device=y.device)
    others = others + (others >= y[:, None])  # [B, C - 1]: 0 .. C - 1 without y
    mine = log_softmax(student.gather(1, others) / temperature, dim=1)
    theirs = log_softmax(teacher.gather(1, others) / temperature, dim=1)
    return temperature**2 * kl_div(mine, theirs, log_target=True, reduction="batchmean")
