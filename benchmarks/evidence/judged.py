"""Differences between cells, seed by seed, and what they say about a claim.

Methods of one seed have the same clients, the same first weights and the same cohorts, so differences are taken seed by
seed. One counts as seen when all seeds have its sign, their mean is a point or more and more than two standard errors
from zero; as contradicted when all of that holds the other way; else as open. A claim holds when all of its
differences are seen, and fails when one is contradicted and none is seen; between these it holds in part. A run that
diverged counts as chance. What was not run is said, never guessed.

The same arithmetic reads three numbers of a cell: its headline, which is judged; the end of its run, as many runs still
rise; and what the paper printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from fedkeel.record import headline
from fedkeel.reproduce.asked import Picture, asked
from fedkeel.reproduce.cells import Outcome, of_one_make, read
from fedkeel.reproduce.pictures import Source
from fedkeel.reproduce.shown import show
from fedkeel.reproduce.tables import Cell, cells, experiment

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "benchmarks/results/reproduce"
PROFILE = "reduced"
LEAST, SEEDS = 2, 3
"""Seeds below which a difference is not judged, and seeds of which a claim says that it was run."""
POINTS, ERRORS = 1.0, 2.0
"""A difference is seen that is as large and so many standard errors away from zero."""

END = 3
"""Rounds that are the end of a run."""
LAST = {"personal/accuracy_best": "personal/accuracy_last"}
"""Metrics that look back over the whole run, and those that its end is read from."""

MEASURED = "measured.json"
"""What figures show in numbers, beside their cells: written by measured.py."""
COUNTED = CELLS / PROFILE / "counted.json"
"""What notes say of partitions: written by counted.py."""

Values = dict[int, float]
"""By seed, in points (per cent of the test images)."""
Place = tuple[str, str, str]
"""Table, row and column."""
Reading = Literal["headline", "end", "printed"]
"""Which number of a cell: its headline as in the tables, the mean of its last three measurements, or the paper's (as
seed 0)."""


@dataclass(frozen=True)
class Part:
    """A number by seed: an accuracy, or what is made of several. places: the cells. reads: the numbers, by reading.
    above: what a claim says that it is more than; with such a bound, which is ours, it does not matter how large the
    rest is. figure: whose numbers it is made of, rather than cells. whose: which row a best one is, by reading."""

    label: str
    places: tuple[Place, ...]
    reads: Callable[[Reading], Values]
    above: float | None = None
    figure: str = ""
    whose: Callable[[Reading], str] = lambda way: ""

    def __sub__(self, other: Part) -> Part:
        label = f"{self.label} − {other.label}"
        places = (*self.places, *other.places)
        return Part(label, places, lambda way: minus(self.values(way), other.values(way)), figure=self.figure)

    def __rmul__(self, factor: float) -> Part:
        label = f"{factor:g} × {self.label}"
        return replace(self, label=label, reads=lambda way: {seed: factor * v for seed, v in self.values(way).items()})

    def called(self, label: str = "", above: float | None = None) -> Part:
        """The same under another name, or with a bound."""
        return replace(self, label=label or self.label, above=above)

    def values(self, reading: Reading = "headline") -> Values:
        """By seed."""
        return self.reads(reading)

    def verdict(self, reading: Reading = "headline") -> str:
        """seen, contradicted, open, or missing with fewer than two seeds."""
        found = [value - (self.above or 0.0) for value in self.values(reading).values()]
        if len(found) < LEAST:
            return "missing"
        mean, error = fmean(found), stdev(found) / len(found) ** 0.5
        if abs(mean) <= ERRORS * error or (self.above is None and abs(mean) < POINTS):
            return "open"
        return "seen" if min(found) > 0 else "contradicted" if max(found) < 0 else "open"

    def words(self) -> str:
        """The mean, and each seed's; beside it what the paper printed, and the end of the runs."""
        found, best = self.values(), self.whose("headline")

        def beside(way: Reading) -> str:
            other = self.whose(way)
            return f" ({other})" if other not in ("", best) else ""

        printed = [f"printed {signed(value)}{beside('printed')}" for value in self.values("printed").values()]
        if not found:
            return "; ".join([f"{self.label}: not run", *printed])
        asked = "" if self.above is None else f", to be above {signed(self.above)}"
        each = ", ".join(signed(value) for _, value in sorted(found.items()))
        few = "; one seed, not judged" if len(found) < LEAST else ""
        label = f"{self.label}, {best}" if best else self.label
        mean = f"{label}: **{signed(fmean(found.values()))}** ({each}{asked}{few})"
        end = self.values("end").values()
        return "; ".join([mean, *printed, *([f"at the end {signed(fmean(end))}{beside('end')}"] if end else [])])


@dataclass(frozen=True)
class Claim:
    """text: as the paper has it. printed: its figures. untestable: why nothing here can tell. note: what we make of
    it. key: of its anchor, where others point to it."""

    paper: str
    text: str
    printed: str
    parts: Sequence[Part] = ()
    untestable: str = ""
    note: str = ""
    key: str = ""

    def outcome(self, reading: Reading = "headline") -> str:
        """In a few words, the same for all claims."""
        if self.untestable:
            return "cannot be tested here"
        judged = self._judged(reading)
        if not judged:
            return "one seed, not judged" if any(part.values(reading) for part in self.parts) else "not run yet"
        if "seen" in judged:
            return "holds" if set(judged) == {"seen"} else "holds in part"
        return "does not hold" if "contradicted" in judged else "no clear difference"

    def verdict(self, reading: Reading = "headline") -> str:
        """The same with how many differences are seen, and whether some of them or a seed are missing."""
        outcome, judged = self.outcome(reading), self._judged(reading)
        if outcome == "holds in part":
            turned = judged.count("contradicted")
            otherwise = f", {turned} the other way round" if turned else ""
            outcome += f" ({judged.count('seen')} of {len(judged)}{otherwise})"
        whole = not judged or self.untestable or all(len(part.values()) >= SEEDS for part in self.parts)
        return outcome + ("" if whole else ", as far as it was run")

    def _judged(self, reading: Reading) -> list[str]:
        return [found for part in self.parts if (found := part.verdict(reading)) != "missing"]

    def differences(self) -> str:
        """Their means; of more than three the lowest and the highest."""
        means = [fmean(values.values()) for part in self.parts if (values := part.values())]
        if len(means) > 3:
            return f"{signed(min(means))} to {signed(max(means))}"
        return ", ".join(map(signed, means))

    def commands(self) -> list[str]:
        """What runs its cells: a command a table."""
        tables = dict.fromkeys(table for part in self.parts for table, _, _ in part.places)
        figures = dict.fromkeys(part.figure for part in self.parts if part.figure)
        return [
            *(self._command(table) for table in tables),
            *(f"python benchmarks/evidence/measured.py {figure} --data FOLDER" for figure in figures),
        ]

    def _command(self, table: str) -> str:
        found = [place for part in self.parts for place in part.places if place[0] == table]
        rows, columns = (",".join(dict.fromkeys(place[at] for place in found)) for at in (1, 2))
        return f"fedkeel reproduce {table} --rows {rows} --columns {columns} --data FOLDER"


def signed(value: float) -> str:
    """One decimal, with a sign; halves away from zero, whatever their binary digits."""
    rounded = Decimal(f"{value:.6f}").quantize(Decimal("0.1"), ROUND_HALF_UP)
    return f"{rounded + 0:+.1f}".replace("-", "−")  # no minus before a zero


@cache
def outcomes(table: str) -> dict[tuple[str, str, int], Outcome]:
    """Every cell of a table, by row, column and seed."""
    found = of_one_make([read(cell, CELLS) for cell in cells(experiment(table), PROFILE)])
    return {(each.cell.row.key, each.cell.column.key, each.cell.seed): each for each in found}


def of(table: str, row: str, column: str, reading: Reading = "headline") -> Values:
    """What a method reached; chance where its run diverged."""
    found = outcomes(table)
    assert (row, column) in {key[:2] for key in found}, f"{table} has no {row} in {column}"
    if reading == "printed":
        return dict(enumerate(experiment(table).printed.get(row, {}).get(column, ())[:1]))
    here = {seed: outcome for (r, c, seed), outcome in found.items() if (r, c) == (row, column)}
    values = {seed: reached(outcome, reading) for seed, outcome in here.items()}
    chance = {seed: 1 / classes(table, column) for seed, outcome in here.items() if diverged(outcome)}
    return {seed: 100 * value for seed, value in {**values, **chance}.items() if value is not None}


def reached(outcome: Outcome, reading: Reading) -> float | None:
    """In [0, 1]; None where the cell is not done."""
    value, metric = outcome.headline(), outcome.cell.row.metric
    if value is None or outcome.found is None or reading == "headline":
        return value
    metric = LAST.get(metric, metric)
    return headline(metric, [each for each in outcome.found["rounds"][metric] if each is not None][-END:])


def diverged(outcome: Outcome) -> bool:
    """Whether a run stopped because numbers were no numbers any more."""
    return outcome.state == "failed" and ("loss is nan" in outcome.error or "loss is inf" in outcome.error)


def classes(table: str, column: str) -> int:
    """Of a column's data."""
    found = [each.found for (_, c, _), each in outcomes(table).items() if c == column and each.state == "done"]
    return len(next(each["classes"] for each in found if each is not None))


@cache
def measured(table: str) -> dict[str, Any]:
    """What was measured for a figure's pictures."""
    path = CELLS / PROFILE / table / MEASURED
    return json.loads(path.read_text()) if path.is_file() else {}


@cache
def picture_of(table: str, name: str) -> Picture:
    """A picture of a figure by its name."""
    (found,) = [each for each in asked(experiment(table), PROFILE) if each.name == name]
    return found


def cells_of(table: str, picture: Picture) -> list[Cell]:
    """What a picture of one column is drawn from."""
    found = experiment(table)
    return Source(found, show(found, PROFILE, []), [], ROOT).needs(picture)


def stands_on(table: str, picture: Picture) -> dict[str, object]:
    """By what a picture that was drawn before is known to be the same."""
    asked_for = {"picture": asdict(picture), "cells": [cell.key for cell in cells_of(table, picture)]}
    found: dict[str, object] = json.loads(json.dumps(asked_for))
    return found


def names_of(picture: Picture) -> list[str]:
    """Of the numbers that a picture of runs measures."""
    if picture.kind in ("update", "classes"):
        ends = [f"{which}/{when}" for which in ("held", "missing") for when in ("before", "after")]
        return [f"{row}/{end}" for row in picture.rows for end in ends]
    return {"aligned": ["distance/synthetic", "distance/with offset"], "images": ["mmd2/vanilla", "mmd2/adapted"]}[
        picture.kind
    ]


@cache
def kept_of(table: str, name: str) -> dict[int, dict[str, Any]]:
    """What was measured for a picture, by seed; nothing of cells or pictures that have changed since."""
    picture = picture_of(table, name)
    out = {}
    for key, one in measured(table).get(name, {"seeds": {}})["seeds"].items():
        same = stands_on(table, replace(picture, seed=int(key)))
        if {each: one[each] for each in same} == same:
            out[int(key)] = one["numbers"]
    return out


def figure(table: str, name: str, number: str, label: str = "") -> Part:
    """A number that was measured for a picture, times 100, by seed."""
    assert number in names_of(picture_of(table, name)), f"{table} {name} has no {number}"

    def values(reading: Reading) -> Values:
        kept = kept_of(table, name) if reading == "headline" else {}
        found = {seed: numbers.get(number) for seed, numbers in kept.items()}
        return {seed: 100 * value for seed, value in found.items() if value is not None}

    return Part(label or number, (), values, figure=table)


def at(table: str, row: str, column: str) -> Part:
    """What a method reached."""
    label = f"{name(table, row)}, {head(table, column)}"
    return Part(label, ((table, row, column),), lambda way: of(table, row, column, way))


def gap(table: str, a: str, b: str, column: str, above: float | None = None) -> Part:
    """How far row `a` is above row `b`."""
    label = f"{name(table, a)} − {name(table, b)}, {head(table, column)}"
    return (at(table, a, column) - at(table, b, column)).called(label, above)


def rise(table: str, row: str, after: str, before: str, above: float | None = None) -> Part:
    """How far column `after` is above column `before` in one row."""
    label = f"{name(table, row)}, {head(table, after)} − {head(table, before)}"
    return (at(table, row, after) - at(table, row, before)).called(label, above)


def best_of(table: str, row: str, others: Sequence[str], column: str, called: str = "") -> Part:
    """How far a row is above the best of the others by its mean over seeds; nothing before all of them were run."""

    def best(reading: Reading) -> str:
        each = {other: of(table, other, column, reading) for other in others}
        if reading == "printed":
            each = {other: values for other, values in each.items() if values}  # not every table prints every method
        seeds = set.intersection(*(set(values) for values in each.values())) if each else set()
        return max(each, key=lambda other: fmean(each[other][seed] for seed in seeds)) if seeds else ""

    def values(reading: Reading) -> Values:
        found = best(reading)
        return minus(of(table, row, column, reading), of(table, found, column, reading)) if found else {}

    label = f"{name(table, row)} − the best of {called or f'{len(others)} baselines'}, {head(table, column)}"
    places = tuple((table, each, column) for each in (row, *others))
    return Part(label, places, values, whose=lambda way: name(table, found) if (found := best(way)) else "")


def relative(a: Part, b: Part, label: str) -> Part:
    """How far the first is above the second, in per cent of the second."""

    def values(reading: Reading) -> Values:
        base = b.values(reading)
        return {seed: 100 * each / base[seed] for seed, each in (a - b).values(reading).items()}

    return Part(label, (*a.places, *b.places), values, figure=a.figure)


def minus(a: Values, b: Values) -> Values:
    """Seed by seed."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def name(table: str, row: str) -> str:
    """A row as its table calls it."""
    return experiment(table).rows[row].label


def head(table: str, column: str) -> str:
    """A column as its table is headed."""
    return experiment(table).head(column, PROFILE)
