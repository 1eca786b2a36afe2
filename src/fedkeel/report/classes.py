"""What one local update does to each class: accuracy on the global test images before and after it.

Yao: Recovering Global Data Distribution Locally in Federated Learning. 2024, arXiv 2409.14063, Fig. 7 (REQ-23). A run
records it in the rounds and for the clients that the section [evaluate] names (`local_rounds`, `local_clients`). For a
run that did not, it is measured on the update with which the client would answer the final model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fedkeel.errors import DataError
from fedkeel.models.split import Split
from fedkeel.report.finished import Finished
from fedkeel.report.plots import FAINT, INK, heading, paper, shorten, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER = "#B7C1CB", "#0072B2"
MANY = 24
"""Classes beyond which their names stand upright."""


@dataclass(frozen=True)
class Change:
    """One client's local update. held: its real samples of each class. before, after: accuracy of each class in
    [0, 1], None for a class without test images. round: from 1; recorded: during the run, not afterwards."""

    title: str
    client: int
    round: int
    recorded: bool
    classes: tuple[str, ...]
    held: tuple[int, ...]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]

    def mean(self, held: bool) -> tuple[float | None, float | None]:
        """Mean accuracy before and after over the classes that the client holds, or over those that it misses."""
        rows = [at for at, count in enumerate(self.held) if (count > 0) == held]
        means = []
        for values in (self.before, self.after):
            there = [value for at in rows if (value := values[at]) is not None]
            means.append(fmean(there) if there else None)
        return means[0], means[1]

    def as_json(self) -> dict[str, object]:
        """Plain values, the two means among them."""
        means = {name: dict(zip(("before", "after"), self.mean(held), strict=True))
                 for name, held in (("held", True), ("missing", False))}  # fmt: skip
        return {**vars(self), "mean": means}


def change(run: Finished, client: int, number: int | None = None) -> Change:
    """What a local update of a client did, as recorded in round `number` (None: the last round with a record of this
    client; where there is none, it is measured on the update that would follow the last round).

    Raises ConfigError for a client that there is not, DataError for a round without a record.
    """
    held = tuple(run.held(client).tolist())
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["round"]: line["local/classes"] for line in lines if "local/classes" in line}
    mine = {at: entry for at, entries in found.items() for entry in entries if entry["client"] == client}
    if number is not None and number not in mine:
        there = "; ".join(f"round {at}: clients {', '.join(str(e['client']) for e in found[at])}" for at in found)
        raise DataError(
            f"{run.folder}: round {number} has no record of client {client}; recorded are: {there or 'none'} (a run "
            "records what evaluate.local_rounds and evaluate.local_clients ask for)"
        )
    if number is None and mine:
        number = max(mine)
    if number is not None:
        entry = mine[number]
        before, after = tuple(entry["before"]), tuple(entry["after"])
        return Change(run.title, client, number, True, run.classes, held, before, after)
    return measured(run, client)


def measured(run: Finished, client: int) -> Change:
    """What the local update does with which the client would answer the final model."""
    held = tuple(run.held(client).tolist())
    seen: list[tuple[float | None, ...]] = []

    def measure(model: Split) -> None:
        found = run.job.measure(model)
        seen.append(tuple(found.get(f"class/{name}") for name in run.classes))

    run.update(client, measure)
    before, after = seen
    return Change(run.title, client, run.server.round + 1, False, run.classes, held, before, after)


def draw(changes: Sequence[Change]) -> Figure:
    """Grouped bars of each class, a panel for each update; below a class's name how many samples the client holds."""
    classes = changes[0].classes
    many = len(classes) > MANY
    wide = min(max(0.9 * len(classes), 7.5), 10.5) if not many else min(0.16 * len(classes) + 1.5, 24)
    figure, each = paper(wide, 2.7 * len(changes) + (1.1 if many else 0.5), len(changes))
    for axes, one in zip(each, changes, strict=True):
        for shift, values, face, name in ((-0.2, one.before, BEFORE, "before"), (0.2, one.after, AFTER, "after")):
            there = [(at, value) for at, value in enumerate(values) if value is not None]
            axes.bar(
                [at + shift for at, _ in there],
                [100 * value for _, value in there],
                width=0.38,
                color=face,
                label=f"{name} the local update",
            )
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.7, len(classes) - 0.3)
        axes.set_ylabel("Accuracy (%)")
        axes.grid(axis="y", color=FAINT, lw=0.8)
        when = f"round {one.round}" if one.recorded else f"after the last round, {one.round - 1}"
        heading(axes, f"{one.title}: client {one.client}, {when}")
        names = [words(shorten(name, 12)) for name in classes]
        if many:
            axes.set_xticks(range(len(classes)), names, fontsize=6.5, rotation=90)
        else:
            held = [f"{count:,} held" if count else "missing" for count in one.held]
            axes.set_xticks(range(len(classes)), [f"{a}\n{b}" for a, b in zip(names, held, strict=True)], fontsize=7.5)
        for tick, count in zip(axes.get_xticklabels(), one.held, strict=True):
            tick.set_color(INK if count else "#B00020")
    figure.legend(
        *each[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, labelcolor=INK
    )
    return figure
