"""Differences between cells, seed by seed, and what they say about a claim.

Methods of one seed have the same clients, the same first weights and the same cohorts, so differences are taken seed by
seed. A difference counts as seen when all seeds have its sign, as contradicted when all have the other one, else as
open. A claim holds when all of its differences are seen, and fails when one is contradicted and none is seen; between
these it holds in part. What was not run is said, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from fedkeel.reproduce.cells import Outcome, read
from fedkeel.reproduce.tables import cells, experiment

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "benchmarks/results/reproduce"
PROFILE = "reduced"
LEAST, SEEDS = 2, 3
"""Seeds below which a difference is not judged, and seeds of which a claim says that it was run."""

Values = dict[int, float]
"""By seed, in points (per cent of the test images)."""
Place = tuple[str, str, str]
"""Table, row and column."""


@dataclass(frozen=True)
class Part:
    """One difference: what it is, the cells that it is made of, and its value by seed. at_least: what it must exceed;
    usually nothing."""

    label: str
    places: tuple[Place, ...]
    values: Callable[[], Values]
    at_least: float = 0.0

    def verdict(self) -> str:
        """seen, contradicted, open, or missing with fewer than two seeds."""
        found = [value - self.at_least for value in self.values().values()]
        if len(found) < LEAST:
            return "missing"
        return "seen" if min(found) > 0 else "contradicted" if max(found) < 0 else "open"

    def words(self) -> str:
        """The mean, and each seed's."""
        found = self.values()
        if not found:
            return f"{self.label}: not run"
        asked = f", to be above {signed(self.at_least)}" if self.at_least else ""
        each = ", ".join(signed(value) for _, value in sorted(found.items()))
        few = "; one seed, not judged" if len(found) < LEAST else ""
        return f"{self.label}: **{signed(fmean(found.values()))}** ({each}{asked}{few})"


@dataclass(frozen=True)
class Claim:
    """text: as the paper has it. printed: its figures. untestable: why nothing here can tell. note: what we make of
    it."""

    paper: str
    text: str
    printed: str
    parts: Sequence[Part] = ()
    untestable: str = ""
    note: str = ""

    def verdict(self) -> str:
        """In words."""
        if self.untestable:
            return "cannot be tested here"
        found = [part.verdict() for part in self.parts]
        judged = [each for each in found if each != "missing"]
        if not judged:
            return "not run yet"
        run = all(len(part.values()) >= SEEDS for part in self.parts)
        more = "" if run else ", as far as it was run"
        if all(each == "seen" for each in judged):
            return "holds" + more
        if "seen" in judged:
            return "holds in part" + more
        return ("does not hold" if "contradicted" in judged else "open") + more

    def commands(self) -> list[str]:
        """What runs its cells: a command a table."""
        tables = dict.fromkeys(table for part in self.parts for table, _, _ in part.places)
        return [self._command(table) for table in tables]

    def _command(self, table: str) -> str:
        found = [place for part in self.parts for place in part.places if place[0] == table]
        rows, columns = (",".join(dict.fromkeys(place[at] for place in found)) for at in (1, 2))
        return f"fedkeel reproduce {table} --rows {rows} --columns {columns} --data FOLDER"


def signed(value: float) -> str:
    """One decimal, with a sign."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # no minus before a zero


@cache
def outcomes(table: str) -> dict[tuple[str, str, int], Outcome]:
    """Every cell of a table, by row, column and seed."""
    planned = cells(experiment(table), PROFILE)
    return {(cell.row.key, cell.column.key, cell.seed): read(cell, CELLS) for cell in planned}


def of(table: str, row: str, column: str) -> Values:
    """What a method reached."""
    found = outcomes(table)
    assert (row, column) in {key[:2] for key in found}, f"{table} has no {row} in {column}"
    values = {seed: outcome.headline() for (r, c, seed), outcome in found.items() if (r, c) == (row, column)}
    return {seed: 100 * value for seed, value in values.items() if value is not None}


def failed(table: str, row: str, column: str) -> set[int]:
    """Seeds of which the run failed: it diverged."""
    return {
        seed for (r, c, seed), found in outcomes(table).items() if (r, c) == (row, column) and found.state == "failed"
    }


def gap(table: str, a: str, b: str, column: str, label: str = "", at_least: float = 0.0) -> Part:
    """How far row `a` is above row `b`."""
    label = label or f"{name(table, a)} − {name(table, b)}, {head(table, column)}"
    places = ((table, a, column), (table, b, column))
    return Part(label, places, lambda: minus(of(table, a, column), of(table, b, column)), at_least)


def rise(table: str, row: str, after: str, before: str, label: str = "", at_least: float = 0.0) -> Part:
    """How far column `after` is above column `before` in one row."""
    label = label or f"{name(table, row)}, {head(table, after)} − {head(table, before)}"
    places = ((table, row, after), (table, row, before))
    return Part(label, places, lambda: minus(of(table, row, after), of(table, row, before)), at_least)


def wider(table: str, a: str, b: str, one: str, other: str, label: str) -> Part:
    """How much the gap between rows `a` and `b` is wider in column `one` than in column `other`."""
    return smaller(gap(table, a, b, other), gap(table, a, b, one), label)


def best_of(table: str, row: str, others: Sequence[str], column: str) -> Part:
    """How far a row is above the best of the others, seed by seed; nothing before all of them were run. One that
    diverged is not the best."""

    def values() -> Values:
        each = [(of(table, other, column), failed(table, other, column)) for other in others]
        seeds = set.intersection(*(found.keys() | lost for found, lost in each))
        best = {seed: max(found[seed] for found, _ in each if seed in found) for seed in seeds}
        return minus(of(table, row, column), best)

    label = f"{name(table, row)} − the best of {len(others)} baselines, {head(table, column)}"
    return Part(label, tuple((table, each, column) for each in (row, *others)), values)


def smaller(first: Part, second: Part, label: str) -> Part:
    """How far the first difference is below the second."""
    return Part(label, (*first.places, *second.places), lambda: minus(second.values(), first.values()))


def within(part: Part, points: float) -> Part:
    """How much nearer than `points` two cells are."""
    label = f"{points:g} points − the distance of {part.label}"
    return Part(label, part.places, lambda: {seed: points - abs(value) for seed, value in part.values().items()})


def minus(a: Values, b: Values) -> Values:
    """Seed by seed."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def name(table: str, row: str) -> str:
    """A row as its table calls it."""
    return experiment(table).rows[row].label


def head(table: str, column: str) -> str:
    """A column as its table calls it."""
    return experiment(table).columns[column].label
