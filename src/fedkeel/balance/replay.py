"""Periodic knowledge replay: the next kept subset of a class from the last one.

FBL (Li, Xu et al. 2026, arXiv 2601.14042), section IV-C, equations 8 and 9.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedkeel.balance.choose import Rule, choose

Shortage = Literal["fill_from_old", "shrink", "with_replacement"]


def carried(gamma: float, point: int) -> int:
    """How many samples of the last subset return: gamma * B_k, halves rounded up."""
    return min(point, int(gamma * point + 0.5 + 1e-9))  # 0.7 * 45 is a little less than 31.5 in floating point


def replay(
    pool: Tensor,
    last: Tensor,
    scores: Tensor,
    point: int,
    gamma: float,
    *,
    old: Rule = "loss",
    new: Rule = "loss",
    shortage: Shortage = "fill_from_old",
    rng: torch.Generator,
) -> Tensor:
    """R^{t+1} = g(R^t, gamma B) + g(S \\ R^t, (1 - gamma) B), sample numbers, [B] int64.

    pool: [n] all sample numbers of the class (S); last: the subset kept so far (R^t); scores: [n] the losses of `pool`.
    When S \\ R^t is too small: "fill_from_old" takes more of the old, so that exactly B are kept, and where too few of
    the old are left in S, more of the new; "shrink" keeps fewer; "with_replacement" repeats new samples, or where there
    are none fills from the old.
    """
    in_last = torch.isin(pool, last)
    kept = choose(pool[in_last], scores[in_last], len(pool), old, rng)
    fresh = choose(pool[~in_last], scores[~in_last], len(pool), new, rng)
    take_old = carried(gamma, point)
    if shortage == "fill_from_old":
        take_old = min(take_old, len(kept))
    take_new = point - take_old
    missing = take_new - len(fresh)
    if missing > 0 and (shortage == "fill_from_old" or (shortage == "with_replacement" and len(fresh) == 0)):
        take_old = min(take_old + missing, len(kept))
    elif missing > 0 and shortage == "with_replacement":
        again = torch.randint(len(fresh), (missing,), generator=rng)
        fresh = torch.cat([fresh, fresh[again]])
    return torch.cat([kept[:take_old], fresh[:take_new]])
