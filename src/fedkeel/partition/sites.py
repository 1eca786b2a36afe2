"""No partition at all: each client has data of its own, on a machine of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkeel.errors import PartitionError
from fedkeel.registry import register


@register("partitions", "sites")
@dataclass(frozen=True, kw_only=True)
class Sites:
    """Each client's own data on its own machine (runtime "flower"); [data] gives classes, shape and test images."""

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        raise PartitionError(
            "partition 'sites': the data lie on the clients' machines; submit this run to a federation with "
            "`fedkeel deploy submit`, or choose another partition"
        )
