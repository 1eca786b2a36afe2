"""The pictures of docs/evidence.md: every method and control of FBL's Table I, and the papers' figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from claims import BASELINES
from judged import PROFILE, ROOT, Values, head, kept_of, measured, name, of, outcomes, picture_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedkeel.report.plots import FAINT, INK, PALETTE, heading, paper
from fedkeel.reproduce.asked import OF_TABLE, Picture
from fedkeel.reproduce.drawings import DRAW
from fedkeel.reproduce.pictures import Source
from fedkeel.reproduce.shown import show
from fedkeel.reproduce.tables import experiment

PICTURE = ROOT / "docs/images/evidence.png"
TABLE, COLUMNS = "fbl-t1", ("c10-01", "c10-03", "c10-05")
BALANCED = ("fbl", "fbl-25", "fbl-50", "regl")
CONTROLS = (
    "fedavg-e4",
    "fedavg-uniform",
    "scaffold-samples",
    "feddyn-samples",
    "moon-mu1",
    "fbl-samples",
    "fbl-shared",
    "fbl-fresh",
    "fbl-loss1",
    "fbl-e3",
    "fbl-gaussian",
    "fbl-public500",
    "fbl-public",
    "fbl-nocut",
    "regl-gaussian",
    "fedavg-public32",
    "fedavg-public",
)
GROUPS = ((BASELINES, "#555555"), (BALANCED, PALETTE[0]), (CONTROLS, PALETTE[1]))
"""Each with its colour, from top to bottom."""
ROWS = [row for group, _ in GROUPS for row in group]
FIGURES = (
    ("fbl-f4a", "aligned-c10-03"),
    ("fbl-f4b", "curve"),
    ("fbl-f5", "sheet-eurosat-03"),
    ("regl-f1", "histogram-eurosat-001"),
    ("regl-f1", "bars"),
    ("regl-f3", "partition-fruit-001"),
    ("regl-f4", "update-eurosat-001"),
    ("regl-f5", "curve"),
    ("regl-f6", "images-eurosat-001"),
    ("regl-f7", "classes-fruit-001"),
    ("regl-f8", "sheet-eurosat-001"),
)
"""Table and picture: those of the page. What is not drawn from cells alone, `measured.py` draws."""


def there() -> list[str]:
    """The columns in which every method was run."""
    return [column for column in COLUMNS if all(of(TABLE, row, column) for row in (*BASELINES, *BALANCED))]


def draw() -> None:
    """Writes the picture of the columns that were run."""
    columns = there()
    if not columns:
        return
    figure, panels = paper(2.6 + 2.6 * len(columns), 6.3, 1, len(columns))
    for axes in panels[1:]:
        axes.sharex(panels[0])
    for axes, column in zip(panels, columns, strict=True):
        _panel(axes, [_values(row, column) for row in ROWS])
        heading(axes, head(TABLE, column))
        axes.set_xlabel("Accuracy (%)")
        axes.set_yticks(range(len(ROWS)), [""] * len(ROWS))
    panels[0].set_yticks(range(len(ROWS)), [name(TABLE, row) for row in ROWS])
    figure.savefig(PICTURE, dpi=150, format="png")


def image(table: str, picture: str) -> Path:
    """The file of a figure's picture."""
    return PICTURE.with_name(f"evidence-{table}-{picture}.png")


@dataclass(frozen=True)
class Drawn:
    """A figure that can be shown. figure: where it is drawn from cells alone."""

    table: str
    picture: Picture
    caption: str
    figure: Figure | None = None

    @property
    def title(self) -> str:
        """With its column."""
        column = experiment(self.table).columns[self.picture.column].label if self.picture.column else ""
        return ": ".join(filter(None, [self.picture.title, column]))


@cache
def figures() -> tuple[Drawn, ...]:
    """Those whose cells are done, or which were drawn from what they would be drawn from now."""
    out = []
    for table, wanted in FIGURES:
        picture, found = picture_of(table, wanted), list(outcomes(table).values())
        if picture.kind not in OF_TABLE:
            if picture.seed in kept_of(table, wanted):
                out.append(Drawn(table, picture, measured(table)[wanted]["caption"]))
        elif any(each.state == "done" for each in found):
            whole = experiment(table)
            figure, caption, _ = DRAW[picture.kind](picture, Source(whole, show(whole, PROFILE, found), found, ROOT))
            out.append(Drawn(table, picture, caption, figure))
    return tuple(out)


def draw_figures() -> None:
    """Writes those that are drawn from the cells."""
    for each in figures():
        if each.figure is not None:
            each.figure.savefig(image(each.table, each.picture.name), dpi=110, format="png")


def _panel(axes: Axes, found: Sequence[Values]) -> None:
    """A column: a dot a seed, a tick for their mean; the groups told apart by colour and a line."""
    at = 0
    for group, colour in GROUPS:
        for _ in group:
            values = list(found[at].values())
            if values:
                axes.plot([fmean(values)] * 2, [at - 0.36, at + 0.36], color=colour, lw=2.4, solid_capstyle="butt")
                axes.plot(values, [at] * len(values), ls="", marker="o", ms=4.5, color=colour, alpha=0.55, mew=0)
            at += 1
        if at < len(found):
            axes.axhline(at - 0.5, color=INK, lw=0.6)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="both", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)


def _values(row: str, column: str) -> Values:
    """By seed; nothing where the table has no such cell: some controls stand in one column only."""
    only = experiment(TABLE).rows[row].columns
    return of(TABLE, row, column) if not only or column in only else {}
