"""One class per client (ReGL, Table 3; arXiv 2409.14063): the extreme of label skew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkeel.errors import PartitionError
from fedkeel.partition.deal import deal
from fedkeel.registry import register


@register("partitions", "single_class")
@dataclass(frozen=True, kw_only=True)
class SingleClass:
    """Client k holds all samples of class k and nothing else; there must be as many clients as classes."""

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        if clients != classes:
            raise PartitionError(f"single_class needs a client per class: set clients = {classes} (it is {clients})")
        return deal(labels.numpy(), clients)
