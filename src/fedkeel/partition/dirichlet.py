"""Dirichlet label skew (Hsu et al. 2019, arXiv 1909.06335, class by class as in Yurochkin et al. 2019, 1905.12022).

For each class c draw p ~ Dir_N(alpha) and give client k the fraction p_k of it; draw everything again until no client
is too small. Tries are bounded, as a small alpha with few clients may never come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkeel.errors import PartitionError
from fedkeel.options import option
from fedkeel.partition.deal import Ints, deal, enough
from fedkeel.registry import register


@register("partitions", "dirichlet")
@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """A client's share of each class is Dirichlet distributed: the smaller alpha, the stronger the skew."""

    alpha: float = option(0.5, "concentration; 0.1 is strong skew, 100 hardly any", gt=0, grid=(0.01, 0.1, 0.3, 0.5))
    min_size: int = option(10, "draw again until every client has this many samples", ge=0)
    balance_cap: bool = option(
        False,
        "a client that has n/N samples already gets none of the next class (as NIID-Bench and MOON do); the last one "
        "may still get what is left by rounding",
    )
    tries: int = option(1000, "draws before giving up", ge=1)
    top_up: bool = option(
        False, "instead of giving up, take the best draw and fill small clients at random from the largest"
    )

    def split(self, labels: Tensor, clients: int, classes: int, rng: np.random.Generator) -> Sequence[Tensor]:
        enough(len(labels), clients, self.min_size)
        counts = np.bincount(labels.numpy(), minlength=classes)
        best, smallest = np.zeros((classes, clients), dtype=np.int64), -1
        for _ in range(self.tries):
            drawn = self._draw(counts, clients, rng)
            size = -1 if drawn is None else int(drawn.sum(0).min())
            if drawn is not None and size > smallest:
                best, smallest = drawn, size
            if smallest >= self.min_size:
                break
        if smallest < (0 if self.top_up else self.min_size):
            raise PartitionError(
                f"dirichlet with alpha = {self.alpha:g}: in {self.tries} draws the smallest of {clients} clients had "
                f"{max(smallest, 0)} samples at most, fewer than min_size = {self.min_size}; raise alpha, lower "
                f"min_size, use fewer clients, or set top_up"
            )
        owner = np.empty(len(labels), dtype=np.int64)
        for c, rows in enumerate(np.split(np.argsort(labels.numpy(), kind="stable"), np.cumsum(counts)[:-1])):
            owner[rng.permutation(rows)] = np.repeat(np.arange(clients), best[c])
        if smallest < self.min_size:
            _fill(owner, clients, self.min_size, rng)
        return deal(owner, clients)

    def _draw(self, counts: Ints, clients: int, rng: np.random.Generator) -> np.ndarray | None:
        """[C, K] samples per class and client; None when every client that could take a class is at its cap."""
        shares = rng.dirichlet(np.full(clients, self.alpha), size=len(counts))
        if not self.balance_cap:
            return _cut(shares, counts[:, None])
        drawn = np.zeros(shares.shape, dtype=np.int64)
        held, cap = np.zeros(clients, dtype=np.int64), counts.sum() / clients
        for c, share in enumerate(shares):
            share = np.where(held < cap, share, 0.0)
            if counts[c] and not share.sum() > 0:
                return None
            drawn[c] = _cut(share / max(share.sum(), np.finfo(float).tiny), counts[c])
            held += drawn[c]
        return drawn


def _cut(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers from shares along the last axis: cut points are floor(cumulative share x count)."""
    cuts = np.floor(np.cumsum(shares, axis=-1) * counts).astype(np.int64)
    cuts = np.minimum(cuts, counts)
    cuts[..., -1:] = counts
    return np.diff(cuts, axis=-1, prepend=0)


def _fill(owner: Ints, clients: int, least: int, rng: np.random.Generator) -> None:
    """Moves samples, in place, from the largest client to the smallest until all have `least`."""
    sizes = np.bincount(owner, minlength=clients)
    while sizes.min() < least:
        small, large = int(sizes.argmin()), int(sizes.argmax())
        number = min(least - sizes[small], sizes[large] - least)
        owner[rng.choice(np.flatnonzero(owner == large), number, replace=False)] = small
        sizes[small] += number
        sizes[large] -= number
