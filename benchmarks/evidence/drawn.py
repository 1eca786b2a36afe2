"""docs/images/evidence.png: every method and control of FBL's Table I on CIFAR-10, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from judged import ROOT, Values, head, name, of
from matplotlib.axes import Axes

from fedkeel.report.plots import FAINT, INK, PALETTE, heading, paper

PICTURE = ROOT / "docs/images/evidence.png"
TABLE, COLUMNS = "fbl-t1", ("c10-01", "c10-03", "c10-05")
BASELINES = ("fedgen", "moon", "fedprox", "fedavg", "scaffold", "fedcda", "feddyn", "fedntd")
BALANCED = ("fbl", "fbl-25", "fbl-50", "regl")
CONTROLS = (
    "scaffold-samples",
    "fbl-fresh",
    "fbl-e3",
    "fbl-gaussian",
    "fbl-public500",
    "fbl-public",
    "fbl-nocut",
    "fedavg-public",
)
GROUPS = ((BASELINES, "#555555"), (BALANCED, PALETTE[0]), (CONTROLS, PALETTE[1]))
"""Each with its colour, from top to bottom."""
ROWS = [row for group, _ in GROUPS for row in group]


def there() -> list[str]:
    """The columns in which every method was run."""
    return [column for column in COLUMNS if all(of(TABLE, row, column) for row in (*BASELINES, *BALANCED))]


def said() -> list[str]:
    """What the picture shows, in words."""
    return [f"{head(TABLE, column)}: {', '.join(_said(row, column) for row in ROWS)}" for column in there()]


def draw() -> None:
    """Writes the picture of the columns that were run."""
    columns = there()
    if not columns:
        return
    figure, panels = paper(2.6 + 2.6 * len(columns), 5.4, 1, len(columns))
    for axes, column in zip(panels, columns, strict=True):
        _panel(axes, [of(TABLE, row, column) for row in ROWS])
        heading(axes, head(TABLE, column))
        axes.set_xlabel("Accuracy (%)")
        axes.set_yticks(range(len(ROWS)), [""] * len(ROWS))
    panels[0].set_yticks(range(len(ROWS)), [name(TABLE, row) for row in ROWS])
    figure.savefig(PICTURE, dpi=150, format="png")


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


def _said(row: str, column: str) -> str:
    values = of(TABLE, row, column).values()
    return f"{name(TABLE, row)} {fmean(values):.1f}" if values else f"{name(TABLE, row)} not run"
