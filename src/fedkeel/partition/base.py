"""What a partition is: labels in, the indices of each client out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor


class Rows(Sequence[Tensor]):
    """The rows of each client, one tensor behind them all: with a tensor each, 100,000 clients would take 120 MB."""

    def __init__(self, flat: Tensor, starts: Tensor, sizes: Tensor) -> None:
        """Client k holds flat[starts[k] : starts[k] + sizes[k]]."""
        self._flat, self._starts, self._sizes = flat, starts, sizes

    @staticmethod
    def of(parts: Iterable[Tensor]) -> Rows:
        """Those of a tensor for each client; clients with the very same one share it."""
        places: dict[int, int] = {}
        distinct: list[Tensor] = []
        which = []
        for part in parts:
            if id(part) not in places:
                places[id(part)] = len(distinct)
                distinct.append(part)
            which.append(places[id(part)])
        sizes = torch.tensor([len(part) for part in distinct], dtype=torch.int64)
        order = torch.tensor(which, dtype=torch.int64)
        flat = torch.cat([torch.empty(0, dtype=torch.int64), *distinct])
        return Rows(flat, (sizes.cumsum(0) - sizes)[order], sizes[order])

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, k: int) -> Tensor: ...
    @overload
    def __getitem__(self, k: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, k: int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(k, slice):
            return tuple(self[i] for i in range(*k.indices(len(self))))
        start = int(self._starts[k])
        return self._flat[start : start + int(self._sizes[k])]


class Partitioner(Protocol):
    """The options of a partition: a registered frozen dataclass (room "partitions")."""

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        """Indices into `labels` ([N] int64) for each client, each sorted ascending, [n_k] int64.

        Raises PartitionError (EmptyClient for a client without samples) when it cannot be made; never loops for ever.
        """
        ...
