"""Shards of sorted labels (McMahan et al. 2017, arXiv 1602.05629, section 3; FBL's Shards(S) has S a client)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkeel.errors import PartitionError
from fedkeel.options import option
from fedkeel.partition.deal import deal, enough
from fedkeel.registry import register


@register("partitions", "shards")
@dataclass(frozen=True, kw_only=True)
class Shards:
    """Samples sorted by label are cut into clients x shards equal runs, dealt at random without replacement.

    Where that does not divide, the first shards have one sample more.
    """

    shards: int = option(2, "shards per client (S)", ge=1, grid=(2, 4, 8))

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        enough(len(labels), clients)
        count = clients * self.shards
        if count > len(labels):
            raise PartitionError(
                f"{len(labels)} samples cannot be cut into {count} shards ({clients} clients x shards = {self.shards})"
            )
        each, rest = divmod(len(labels), count)
        shard = np.repeat(np.arange(count), each + (np.arange(count) < rest))
        owner = np.empty(len(labels), dtype=np.int64)
        owner[np.argsort(labels.numpy(), kind="stable")] = (rng.permutation(count) // self.shards)[shard]
        return deal(owner, clients)
