"""The table of a comparison: one row a method, mean and sample standard deviation over seeds.

The headline of a run is its accuracy averaged over the last ten evaluated rounds, never its best round; best and last
stand beside it. Written for the terminal, as Markdown, as the plain values of summary.json, and (by page.py) as HTML
from the same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from fedkeel.record import spent
from fedkeel.report.runs import Method, RunData, is_class, methods

if TYPE_CHECKING:
    from rich.table import Table

_ROOMS = ("global/", "local_before/", "local_after/", "personal/", "privacy/")


@dataclass(frozen=True)
class Row:
    """One method. Accuracies in [0, 1]; None where nothing was evaluated.

    mean, std: of the headlines over seeds (std None with fewer than two). best, last, up, down (bytes) and seconds: of
    a whole run, averaged over seeds. rounds: finished by the slowest seed. metrics: headline, averaged over seeds, of
    every evaluated metric by its name in rounds.jsonl. failed: updates lost over all runs.
    """

    key: str
    label: str
    seeds: tuple[int, ...]
    rounds: int
    headlines: tuple[float, ...]
    mean: float | None
    std: float | None
    best: float | None
    last: float | None
    metrics: Mapping[str, float]
    up: float
    down: float
    seconds: Mapping[str, float]
    failed: int

    @property
    def balanced_accuracy(self) -> float | None:
        return self.metrics.get("global/balanced_accuracy")


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading and what it shows of a row. Those not `brief` do not fit a terminal."""

    heading: str
    show: Callable[[Row], str]
    right: bool = True
    brief: bool = True


def summarise(runs: Sequence[RunData]) -> list[Row]:
    """One row a method, in order of appearance."""
    return [_row(method) for method in methods(runs)]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns worth showing for these rows: what no row has is left out."""
    optional = [
        ("Balanced", "global/balanced_accuracy"),
        ("Clients, before", "local_before/accuracy"),
        ("Clients, after", "local_after/accuracy"),
        ("Personal, last", "personal/accuracy_last"),
        ("Personal, best", "personal/accuracy_best"),
    ]
    return [
        Column("Method", lambda row: row.label, right=False),
        Column("Seeds", lambda row: str(len(row.seeds))),
        Column("Rounds", lambda row: str(row.rounds), brief=False),
        Column("Accuracy %", _headline),
        Column("Best", lambda row: percent(row.best)),
        Column("Last", lambda row: percent(row.last)),
        *(
            Column(heading, lambda row, metric=metric: percent(row.metrics.get(metric)), brief=False)  # type: ignore[misc]
            for heading, metric in optional
            if any(metric in row.metrics for row in rows)
        ),
        *([Column("ε", _epsilon)] if any("privacy/epsilon" in row.metrics for row in rows) else []),
        Column("Up", lambda row: size(row.up)),
        Column("Down", lambda row: size(row.down)),
        Column("Time", lambda row: duration(sum(row.seconds.values()))),
        *([Column("Failed", lambda row: str(row.failed))] if any(row.failed for row in rows) else []),
    ]


def as_text(rows: Sequence[Row]) -> Table:
    """The table for a terminal; print it with a rich Console."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, caption_justify="left", caption=_caption(rows))
    shown, winner = [column for column in columns(rows) if column.brief], leader(rows)
    for column in shown:
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=column.right, min_width=5)
    for row in rows:
        # Text, not a string: a label with brackets is not markup
        table.add_row(*(Text(column.show(row)) for column in shown), style="bold" if row is winner else "")
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, the highest accuracy in bold, what the numbers mean below it."""
    shown, winner = columns(rows), leader(rows)
    lines = [
        "| " + " | ".join(column.heading for column in shown) + " |",
        "|" + "|".join("---:" if column.right else "---" for column in shown) + "|",
    ]
    for row in rows:
        cells = [column.show(row).replace("|", r"\|").replace("\n", " ") for column in shown]
        if row is winner:
            cells = [f"**{cell}**" if shown[at].show is _headline else cell for at, cell in enumerate(cells)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _caption(rows), ""])


def as_json(rows: Sequence[Row]) -> dict[str, object]:
    """summary.json: plain values under "methods", metrics by their names in rounds.jsonl."""
    return {
        "methods": {
            row.key: {
                "label": row.label,
                "seeds": list(row.seeds),
                "rounds": row.rounds,
                "global/accuracy": row.mean,
                "std": row.std,
                "best": row.best,
                "last": row.last,
                "headlines": list(row.headlines),
                **{metric: value for metric, value in row.metrics.items() if metric != "global/accuracy"},
                "bytes/up": round(row.up),
                "bytes/down": round(row.down),
                "seconds": sum(row.seconds.values()),
                **{f"seconds/{phase}": value for phase, value in row.seconds.items()},
                "failed": row.failed,
            }
            for row in rows
        }
    }


def leader(rows: Sequence[Row]) -> Row | None:
    """The row with the highest headline, when there is something to compare."""
    ranked = [row for row in rows if row.mean is not None]
    return max(ranked, key=lambda row: row.mean or 0.0) if len(ranked) > 1 else None


def percent(value: float | None) -> str:
    """A share as a percentage, a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def size(count: float) -> str:
    """Bytes in words: 1.5 MB is 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds in words: 4.2 s, 3m 20s, 2h 05m."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours}h {left:02d}m" if hours else f"{minutes}m {rest:02d}s"


def _row(method: Method) -> Row:
    accuracies = [values for run in method.runs if (values := run.series("global/accuracy")[1])]
    heads = method.headlines()
    evaluated = [name for name in method.metrics if name.startswith(_ROOMS)]
    means = {name: value for name in evaluated if not is_class(name) and (value := method.mean(name)) is not None}
    return Row(
        key=method.key,
        label=method.label,
        seeds=tuple(run.seed for run in method.runs),
        rounds=min(len(run.rounds) for run in method.runs),
        headlines=tuple(heads),
        mean=fmean(heads) if heads else None,
        std=stdev(heads) if len(heads) > 1 else None,
        best=fmean(max(values) for values in accuracies) if accuracies else None,
        last=fmean(values[-1] for values in accuracies) if accuracies else None,
        metrics=means,
        up=method.bytes("up"),
        down=method.bytes("down"),
        seconds=method.seconds(),
        failed=sum(len(run.failed) for run in method.runs),
    )


def _epsilon(row: Row) -> str:
    """What the run cost its clients in privacy; a dash without [privacy] and for what has no bound."""
    return spent(row.metrics) or "–"


def _headline(row: Row) -> str:
    return percent(row.mean) if row.std is None else f"{percent(row.mean)} ± {percent(row.std)}"


def _caption(rows: Sequence[Row]) -> str:
    spread = ", ± sample standard deviation over seeds" if any(row.std is not None for row in rows) else ""
    return f"Accuracy: mean over the last 10 evaluated rounds{spread}. Traffic and time: one run, mean over seeds."
