"""Dirichlet skew plus a share of global data for everybody (ReGL, Table 1; arXiv 2409.14063).

After the Dirichlet split a set with the same fraction of every class is drawn once from all data, and every client
additionally receives this one set. A sample that a client already owns is not held twice by it, so a client's size is
that of the union; the set itself is held by all clients, so the clients' indices are not disjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkeel.options import option
from fedkeel.partition.dirichlet import Dirichlet
from fedkeel.registry import register


@register("partitions", "global_share")
@dataclass(frozen=True, kw_only=True)
class GlobalShare(Dirichlet):
    """A Dirichlet split in which every client additionally holds the same share of each class."""

    share: float = option(
        0.1, "fraction of every class that all clients receive", ge=0, le=1, grid=(0.05, 0.1, 0.2, 0.3)
    )

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        own = super().split(labels, clients, classes, rng)
        shuffled = (rng.permutation(np.flatnonzero(labels.numpy() == c)) for c in range(classes))
        shared = np.concatenate([rows[: round(self.share * len(rows))] for rows in shuffled])
        return [torch.from_numpy(np.union1d(rows.numpy(), shared)) for rows in own]
