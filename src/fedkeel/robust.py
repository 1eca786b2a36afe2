"""Robust aggregation: a consensus of a round's updates that a few lying clients cannot move far.

Median and trimmed mean of each coordinate: Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning:
Towards Optimal Statistical Rates. ICML 2018, arXiv 1803.01498, definitions 1 and 2. Krum and multi-Krum: Blanchard,
El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017,
arXiv 1703.02757.

A method is given all updates of the round with the consensus in place of what each client sent: of the change of the
model, of each `extra` and of BatchNorm statistics. Any weighted mean of them is then the consensus, so this works for
methods that look at sums of updates only. The rules know no weights, as in the papers: every client counts the same,
and has the median of the round's weights, since a method that divides by all clients' weights (SCAFFOLD, FedDyn) would
be moved by a liar's.

Departures: Krum chooses by the change of the model, and the chosen clients' `extra` and statistics come with it;
multi-Krum averages the best n - f - 2 by default (the papers: m; authors' experiments: n - f).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedkeel.errors import ConfigError
from fedkeel.options import option
from fedkeel.privacy import kinds
from fedkeel.records import Reply, Update

AT_ONCE = 1 << 22
"""Numbers looked at together, of all clients: memory stays at the updates and a few of these."""
USED = {"trim": ("trimmed_mean",), "byzantine": ("krum", "multi_krum"), "best": ("multi_krum",)}
"""Options, and the rules that use them."""


@dataclass(frozen=True, kw_only=True)
class Robust:
    """A consensus in place of the average: the section [robust]; absent = the method's own average."""

    name: Literal["median", "trimmed_mean", "krum", "multi_krum"] = option("median", "the rule")
    trim: float | None = option(
        None,
        "trimmed mean: share of updates cut off at either end of each coordinate (beta); absent: 0.2",
        ge=0,
        lt=0.5,
    )
    byzantine: int | None = option(
        None, "Krum: clients of a round that may lie (f), which takes 2 f + 3 updates; absent: 1", ge=0
    )
    best: int | None = option(
        None, "multi-Krum: how many of the best updates are averaged (m); absent: those of a round - f - 2", ge=1
    )

    def __post_init__(self) -> None:
        for key, rules in USED.items():
            if getattr(self, key) is not None and self.name not in rules:
                raise ConfigError(key, getattr(self, key), f"is an option of {' and '.join(rules)}, not of {self.name}")

    @property
    def cut(self) -> float:
        """The share to trim."""
        return 0.2 if self.trim is None else self.trim

    @property
    def liars(self) -> int:
        """f."""
        return 1 if self.byzantine is None else self.byzantine

    def trimmed_of(self, updates: int) -> int:
        """How many are cut off at either end."""
        return int(self.cut * updates + 1e-9)  # 0.29 of 100 are 29

    def too_few(self, updates: int) -> str:
        """Why so many updates are too few for the rule, "" where they are not."""
        if self.name == "trimmed_mean" and self.cut > 0 and self.trimmed_of(updates) == 0:
            return f"of {updates} updates, a share of {self.cut:g} trims none"
        if self.name in ("krum", "multi_krum") and updates < 2 * self.liars + 3:
            return f"{updates} updates are fewer than the 2 f + 3 = {2 * self.liars + 3} that f = {self.liars} takes"
        if self.name == "multi_krum" and (self.best or 0) > updates - self.liars:
            return f"best = {self.best} of {updates} updates leaves out fewer than f = {self.liars}"
        if self.name == "median" and updates < 3:
            return f"{updates} updates are fewer than the 3 that a median takes"
        return ""

    def rule(self, deltas: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
        """What makes the consensus of n tensors, one of each client whose changes ([P]) are given."""
        if self.name == "median":
            return lambda tensors: by_coordinate(tensors, median)
        if self.name == "trimmed_mean":
            cut = self.trimmed_of(len(deltas))
            return lambda tensors: by_coordinate(tensors, lambda rows: trimmed(rows, cut))
        many = 1 if self.name == "krum" else self.best or len(deltas) - self.liars - 2
        chosen = krum(deltas, self.liars)[:many]
        if many == 1:
            return lambda tensors: tensors[chosen[0]]
        return lambda tensors: by_coordinate([tensors[at] for at in chosen], lambda rows: rows.mean(0))


def agreed(replies: Iterator[Reply], options: Robust) -> Iterator[Reply]:
    """A round's replies with the consensus in place of what each client sent. All of them are waited for.

    None is used when there are too few for the rule. Raises ConfigError for a method that sends whole numbers.
    """
    held = list(replies)
    updates = [reply.update for reply in held if reply.update is not None]
    if not updates:
        yield from held
        return
    # what most clients send; a liar must not be able to stop the round by sending something of another shape
    usual = Counter(_kind(update) for update in updates).most_common(1)[0][0]
    other = "it sends other names, shapes or types than most clients of the round"
    held = [
        replace(reply, update=None, failure=other) if reply.update and _kind(reply.update) != usual else reply
        for reply in held
    ]
    usable = [(reply, reply.update) for reply in held if reply.update is not None]
    whole = [name for name, (_, dtype) in usual if not dtype.is_floating_point]
    if whole:
        raise ConfigError("robust", options.name, f"the method sends {whole[0]!r} in whole numbers, which have no mean")
    if reason := options.too_few(len(usable)):
        unused = f"its update is not used: robust.name = {options.name!r}: {reason}"
        yield from (replace(reply, update=None, failure=unused) if reply.update else reply for reply in held)
        return
    weight = statistics.median(update.weight for _, update in usable)
    rule = options.rule([update.delta for _, update in usable])
    delta = rule([update.delta for _, update in usable])
    extra = {name: rule([update.extra[name] for _, update in usable]) for name in usable[0][1].extra}
    buffers = rule([reply.buffers for reply, _ in usable if reply.buffers is not None])
    names = usable[0][0].counters
    counters = {name: torch.stack([reply.counters[name] for reply, _ in usable]).median(0).values for name in names}
    for reply in held:
        if reply.update is not None:
            update = replace(reply.update, delta=delta, extra=extra, weight=weight)
            reply = replace(reply, update=update, buffers=buffers, counters=counters)
        yield reply


def by_coordinate(tensors: Sequence[Tensor], rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`rule`, from [n, c] float64 to [c], for every coordinate of n tensors of one shape."""
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    flat, rows = out.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for span in spans(len(flat), len(rows)):
        flat[span] = rule(torch.stack([row[span] for row in rows]).double()).to(flat.dtype)
    return out


def spans(length: int, rows: int) -> Iterator[slice]:
    """Parts of `length` coordinates, so long that `rows` of them are AT_ONCE numbers."""
    step = max(1, AT_ONCE // rows)
    for start in range(0, length, step):
        yield slice(start, start + step)


def median(rows: Tensor) -> Tensor:
    """[c] of [n, c]; the mean of the two in the middle for an even n."""
    order, half = rows.sort(0).values, len(rows) // 2
    return order[half] if len(rows) % 2 else (order[half - 1] + order[half]) / 2


def trimmed(rows: Tensor, cut: int) -> Tensor:
    """[c] of [n, c]: the mean without the `cut` smallest and the `cut` largest."""
    return rows.sort(0).values[cut : len(rows) - cut].mean(0)


def krum(deltas: Sequence[Tensor], liars: int) -> list[int]:
    """Places of the updates by their score, the best first: the sum of the squared distances to the n - f - 2 nearest
    others. Of equal ones the client with the smaller number is first."""
    squared = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for span in spans(len(deltas[0]), len(deltas)):
        rows = torch.stack([delta[span] for delta in deltas]).double()
        # differences, not inner products: a huge update would take all digits from the distances of the others
        squared += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    squared.fill_diagonal_(torch.inf)
    nearest = squared.sort(1).values[:, : len(deltas) - liars - 2]
    return nearest.sum(1).argsort(stable=True).tolist()


def _kind(update: Update) -> tuple[tuple[str, tuple[torch.Size, torch.dtype]], ...]:
    return tuple(sorted(kinds(update).items(), key=lambda item: item[0]))
