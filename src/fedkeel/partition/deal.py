"""What every partition shares: from "who owns this sample" to each client's indices."""

from __future__ import annotations

import numpy as np
import torch

from fedkeel.errors import EmptyClient, PartitionError
from fedkeel.partition.base import Rows

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


def deal(owner: Ints, clients: int) -> Rows:
    """Each client's indices, ascending. owner: [N], the client of each sample. Raises EmptyClient."""
    sizes = np.bincount(owner, minlength=clients)
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise EmptyClient(f"client {empty[0]}{others} of {clients} would have no samples ({len(owner)} in all)")
    return Rows(
        torch.from_numpy(np.argsort(owner, kind="stable")),
        torch.from_numpy(np.cumsum(sizes) - sizes),
        torch.from_numpy(sizes),
    )


def enough(samples: int, clients: int, each: int = 1) -> None:
    """Raises EmptyClient when there are fewer samples than clients, PartitionError when fewer than `each` a client."""
    if samples < clients:
        raise EmptyClient(f"{samples} samples are too few for {clients} clients")
    if samples < clients * each:
        raise PartitionError(f"{samples} samples are too few for {clients} clients with at least {each} each")
