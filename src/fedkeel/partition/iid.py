"""A random equal split: the control without label skew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkeel.partition.deal import deal, enough
from fedkeel.registry import register


@register("partitions", "iid")
@dataclass(frozen=True, kw_only=True)
class IID:
    """Random clients of equal size; the sizes differ by one where the number of clients does not divide."""

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        enough(len(labels), clients)
        owner = np.empty(len(labels), dtype=np.int64)
        owner[rng.permutation(len(labels))] = np.arange(len(labels)) % clients
        return deal(owner, clients)
