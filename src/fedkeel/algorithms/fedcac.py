"""FedCAC: uncritical parameters are shared by all, critical ones with clients that hold the same positions critical.

Wu, Liu, Niu, Zhu, Tang: Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through
Cautiously Aggressive Collaboration. ICCV 2023, arXiv 2309.11103.

After training, a client marks in each tensor the share tau of its parameters that matter most, |change x value|. The
server averages all models, and for each client those of clients whose marks overlap with its own more than a threshold
that rises with the rounds. A client starts from the latter where it marked and from the former elsewhere. After round
beta the marked parameters are private.

The paper has all clients in every round. Here an absent client counts with its last model and marks in overlaps and in
its collaborators' averages only; the average of all models is over the round's participants.

Departures: after round beta nobody collaborates even where all overlaps are equal (printed, the threshold then is their
common value: with two clients collaboration would never end). Exactly floor(tau n) parameters of a tensor of n are
marked, fewer where the rest have not changed (authors' code: ties and, at very small values, more). The authors measure
models both before and after averaging; `measured` says which, by default what the client would start from.

What crosses: the model down, and for each marked parameter its collaborators' average (the authors send a second model;
nothing after round beta); up the model's change and the marks, one bit each: (1 + tau) and (1 + 1/32) of FedAvg's
traffic. What stays: the client's last model, its marks, BatchNorm's statistics. There is no global model that could be
used without those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedkeel.algorithms.base import Algorithm
from fedkeel.options import option
from fedkeel.records import Local, Server, Update
from fedkeel.registry import register
from fedkeel.weights import Layout

ROWS, READ, AT_ONCE = 64, 1 << 15, 1 << 12
"""Tiles in which marks are compared: clients, bytes that are read of each, bytes unpacked at a time."""


@register("algorithms", "fedcac")
@dataclass(frozen=True, kw_only=True)
class FedCAC(Algorithm):
    """Algorithm 1; its round t counts from 1."""

    paper: ClassVar[str] = "Wu et al. 2023, arXiv 2309.11103"
    kind: ClassVar[Literal["global", "personal"]] = "personal"
    has_global: ClassVar[bool] = False
    sums: ClassVar[bool] = False  # keeps clients' models and marks
    trial: ClassVar[Mapping[str, object]] = {"beta": 9}

    tau: float = option(
        0.5, "share of critical parameters in each tensor (tau)", ge=0, le=1, grid=(0.3, 0.5, 0.7), off=0.0
    )
    beta: int | None = option(
        None, "last round with collaboration on critical parameters (beta); not set: half of the run's", ge=1,
        grid=(50, 100, 170),
    )  # fmt: skip
    measured: Literal["start", "trained"] = option(
        "start", "the personal model: what the client's next round would start from, or what its last one came to"
    )

    # once -------------------------------------------------------------------------------------------------------------

    def sends(self) -> tuple[str, ...]:
        return ("marks",)

    def personal(self, name: str, module: nn.Module) -> bool:
        return name.rpartition(".")[2] in module._buffers

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        nothing = torch.zeros(len(params), dtype=torch.bool, device=params.device)
        return {"w": params.clone(), "marks": packed(nothing)}

    # on a client ------------------------------------------------------------------------------------------------------

    def start(self, local: Local) -> None:  # M * customised + (1 - M) * global
        marks = unpacked(local.mine["marks"], len(local.params))
        if "critical" in local.mail:
            local.params[marks] = local.mail["critical"]
        elif local.round > self.last(local.rounds):
            local.params[marks] = local.mine["w"][marks]
        local.scratch["start"] = local.params.clone()

    def personalise(self, local: Local) -> None:
        if self.measured == "start":
            self.start(local)
        else:
            local.params.copy_(local.mine["w"])

    def upload(self, local: Local) -> Update:
        w = local.params.clone()
        marks = packed(critical(w - local.scratch["start"], w, local.layout, self.tau))
        return Update(self.weight(local), w - local.anchor, extra={"marks": marks}, keep={"w": w, "marks": marks})

    def last(self, rounds: int) -> int:
        """beta in a run of so many rounds."""
        return max(1, rounds // 2) if self.beta is None else self.beta

    # on the server ----------------------------------------------------------------------------------------------------

    def mail(self, server: Server, client: int) -> Mapping[str, Tensor]:
        """What the client's collaborators hold on average where it marked."""
        assert server.lab is not None
        table = server.private.get("shelf", torch.empty(0, 2)).long().tolist()
        known = [k for k, _ in table]
        if client not in known:
            return {}
        near = collaborators(server.private["overlap"].cpu(), server.round, self.last(server.lab.rounds))
        total, one = torch.zeros_like(server.params), known.index(client)
        for k, version in (row for row, together in zip(table, near[one].tolist(), strict=True) if together):
            total.add_(server.lab.shelf.get(k, version)["w"].to(total.device))
        marks = server.lab.shelf.get(*table[one])["marks"].to(total.device)
        return {"critical": (total / int(near[one].sum()))[unpacked(marks, len(total))]}

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        lab = server.lab
        assert lab is not None
        if self.tau == 0 or server.round + 1 > self.last(lab.rounds):  # nothing will be asked for any more
            after = super().aggregate(server, updates)
            lab.shelf.retain(set())  # not before: while updates arrive, clients of this round still get their mail
            return replace(after, private={})
        versions = {int(k): int(v) for k, v in server.private.get("shelf", torch.empty(0, 2)).tolist()}
        former, changed = sorted(versions), set()

        def kept() -> Iterator[Update]:
            for update in updates:
                state = {"w": server.params + update.delta, "marks": update.extra["marks"]}
                lab.shelf.put(update.client, server.round, state)
                versions[update.client] = server.round
                changed.add(update.client)
                yield update

        after = super().aggregate(server, kept())
        table = sorted(versions.items())
        lab.shelf.retain(set(table))
        known = {client: at for at, (client, _) in enumerate(table)}
        shared = torch.zeros(len(table), len(table), dtype=torch.float64)
        if former:
            places = torch.tensor([known[client] for client in former])
            shared[places[:, None], places] = server.private["overlap"].cpu()
        renew(
            shared,
            sorted(known[client] for client in changed),
            lambda at, span: lab.shelf.part(*table[at], "marks", span).cpu(),
            -(-len(server.params) // 8),
        )
        return replace(after, private={"shelf": torch.tensor(table), "overlap": shared})


def critical(change: Tensor, w: Tensor, layout: Layout, tau: float) -> Tensor:
    """[P] bool: of each tensor the floor(tau n) parameters of largest |change * w| above zero."""
    marks = torch.zeros(len(w), dtype=torch.bool, device=w.device)
    sensitivity = (change * w).abs()
    for entry in layout.entries:
        if entry.trained and not entry.own:
            span = slice(entry.start, entry.start + entry.size)
            top = sensitivity[span].topk(int(tau * entry.size))
            marks[span][top.indices] = top.values > 0
    return marks


def renew(overlap: Tensor, stale: Sequence[int], marks: Callable[[int, slice], Tensor], length: int) -> None:
    """Brings rows and columns `stale` of `overlap` ([M, M] float64) up to date, in place.

    O_ij = 1 - |M_i - M_j|_1 / (2 |M_i|_1); 0 for a client without marks. marks(i, span): those bytes of client i's
    packed marks, which are `length` bytes. Whatever M and `length` are, few tiles of marks are in memory at a time.
    """
    order = torch.tensor([*stale, *sorted(set(range(len(overlap))) - set(stale))])
    number, fresh = len(order), slice(0, len(stale))  # from here on, clients are counted in this order
    both, size = torch.zeros(number, number, dtype=torch.float64), torch.zeros(number, dtype=torch.float64)
    for start in range(0, length, READ):
        span = slice(start, min(start + READ, length))
        for first in range(0, len(stale), ROWS):
            one = slice(first, min(first + ROWS, len(stale)))
            mine = torch.stack([marks(at, span) for at in order[one].tolist()])
            for begin in (first, *range(one.stop, number, ROWS)):
                other = one if begin == first else slice(begin, min(begin + ROWS, number))
                theirs = mine if begin == first else torch.stack([marks(at, span) for at in order[other].tolist()])
                common, marked = products(mine, theirs)
                both[one, other] += common
                if begin != first:
                    both[other, one] += common.T
                if first == 0:
                    size[other] += marked
    apart = size[:, None] + size[None, :] - 2 * both
    found = torch.where(size[:, None] > 0, 1 - apart / (2 * size[:, None]).clamp(min=1), 0.0)
    overlap[order[fresh, None], order] = found[fresh]
    overlap[order[:, None], order[fresh]] = found[:, fresh]


def products(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """[A, B] how many marks two clients have in common, and [B] how many those of `theirs` have, from packed marks
    [A, L] and [B, L]."""
    common, marked = torch.zeros(len(mine), len(theirs), dtype=torch.float64), torch.zeros(len(theirs)).double()
    bits = unpacked(torch.arange(256, dtype=torch.uint8), 8 * 256).view(256, 8).float()  # of each byte
    for one, other in zip(torch.split(mine, AT_ONCE, 1), torch.split(theirs, AT_ONCE, 1), strict=True):
        a = bits.index_select(0, one.flatten().int()).view(len(one), -1)
        b = a if mine is theirs else bits.index_select(0, other.flatten().int()).view(len(other), -1)
        common += a @ b.T  # whole numbers below 2^24: exact
        marked += b.sum(1)
    return common, marked


def collaborators(overlap: Tensor, number: int, last: int) -> Tensor:
    """[M, M] bool: j helps i after `number` rounds, when O_ij is at least the threshold, which goes from the mean of
    all overlaps (over i != j) to their maximum at round `last`. A client always helps itself."""
    itself = torch.eye(len(overlap), dtype=torch.bool)
    others = overlap[~itself]
    if len(others) == 0 or number > last:
        return itself
    threshold = others.mean() + number / last * (others.max() - others.mean())
    return itself | (overlap >= threshold - 1e-9)


def packed(marks: Tensor) -> Tensor:
    """[ceil(P / 8)] uint8 of [P] bool: one bit for each."""
    rows = torch.nn.functional.pad(marks.to(torch.uint8), (0, -len(marks) % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8, device=marks.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, length: int) -> Tensor:
    """[length] bool, the reverse of `packed`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).bool().view(-1)[:length]
