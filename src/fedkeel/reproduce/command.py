"""What `fedkeel reproduce` does: which cells its words mean, what is said meanwhile, which files are written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedkeel.errors import ConfigError, nearest
from fedkeel.files import write
from fedkeel.report.table import duration, percent
from fedkeel.reproduce.cells import Outcome, path_of, read
from fedkeel.reproduce.pictures import Source, draw
from fedkeel.reproduce.shown import Shown, as_html, as_json, as_markdown, show
from fedkeel.reproduce.tables import PROFILES, Cell, cells, experiment, names

FORMATS = ("text", "markdown", "html")


def overview(folder: Path) -> list[dict[str, object]]:
    """Every table: name, paper, title, and by profile the number of its cells and of those done in `folder`."""
    out: list[dict[str, object]] = []
    for name in names():
        found = experiment(name)
        counts = {}
        for profile in PROFILES:
            rows, columns = found.lines(profile)
            there = sum(column.has(row, profile) for row in rows for column in columns) if found.runs else 0
            done = 0
            if (folder / profile / name).is_dir():
                done = sum(read(cell, folder).state == "done" for cell in cells(found, profile))
            counts[profile] = {"cells": there * len(found.protocol(profile).seeds), "done": done}
        out.append({"name": name, "paper": found.paper, "title": found.title, "cells": counts})
    return out


def plan(
    tables: Sequence[str],
    profile: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[Cell]:
    """The cells of these tables; empty = all rows, columns, seeds. With several tables each takes the rows and columns
    that it has. Figures that need no runs have none.

    Raises UnknownName for a table, ConfigError for a profile, a row or a column that none of them has.
    """
    found = [experiment(name) for name in dict.fromkeys(tables)]
    lines = [each.lines(profile) for each in found if each.protocol(profile)]
    picked: list[list[list[str]]] = [[], []]
    for at, (key, wanted) in enumerate((("--rows", rows), ("--columns", columns))):
        known = [[line.key for line in each[at]] for each in lines]
        every = list(dict.fromkeys(name for each in known for name in each))
        for one in wanted:
            if one not in every:
                whose = f"{', '.join(each.name for each in found)} in profile {profile}"
                raise ConfigError(key, one, f"{whose} has {', '.join(every)}", nearest(one, every))
        picked[at] = [[name for name in each if name in wanted] for each in known]
    out = []
    for table, own_rows, own_columns in zip(found, *picked, strict=True):
        if bool(own_rows) == bool(rows) and bool(own_columns) == bool(columns):
            out += cells(table, profile, own_rows, own_columns, seeds) if table.runs else []
    if not out and all(table.runs for table in found):
        raise ConfigError("TABLE", ", ".join(tables), f"has no such cells in profile {profile}")
    return out


class Progress:
    """A line for each cell as it is done: how many are, how long it took, how long the others may take."""

    def __init__(self, planned: Sequence[Cell], say: Callable[[str], None]) -> None:
        self.total, self.say = len(planned), say
        self.keys = {cell.key for cell in planned}
        self.done = self.ran = 0
        self.began = time.monotonic()

    def __call__(self, outcome: Outcome) -> None:
        cell, found = outcome.cell, outcome.found or {}
        self.done += 1
        self.keys.discard(cell.key)
        if not outcome.fresh:
            return
        told = f"{percent(outcome.headline())} %  {duration(found.get('seconds', 0.0))}"
        if outcome.error:
            told = f"failed: {outcome.error}"
        elif "same_as" in found:
            told = f"{percent(outcome.headline())} %  the run of {found['same_as']}"
        else:
            self.ran += 1
        left = ""
        if self.keys and self.ran:
            left = f"  about {duration((time.monotonic() - self.began) / self.ran * len(self.keys))} left"
        share = f"{100 * self.done // self.total:3d} %"
        self.say(f"{self.done:>{len(str(self.total))}}/{self.total} {share}  {cell.table} {cell.name}  {told}{left}")


def publish(
    tables: Sequence[str],
    profile: str,
    outcomes: Sequence[Outcome],
    folder: Path,
    data: Path | None = None,
    pools: Path | None = None,
    make: bool = True,
) -> list[Shown]:
    """The tables of these outcomes, of those named. Into <folder>/<profile>/<table>/ goes table.md, table.html and
    table.json, which have all rows and columns of the profile, whichever were asked for, and the table's pictures.

    data, pools: as in `reproduce`, for pictures. make: images that these need may be made; otherwise only drawn.
    """
    known = {path_of(each.cell, folder): each for each in outcomes}
    out = []
    for name in dict.fromkeys(tables):
        found, own = experiment(name), [each.cell for each in outcomes if each.cell.table == name]
        if found.runs and not own:
            continue
        seeds = sorted({*found.protocol(profile).seeds, *(cell.seed for cell in own)})
        all_cells = cells(found, profile, seeds=seeds) if found.runs else []
        every = [known.get(path_of(cell, folder)) or read(cell, folder) for cell in all_cells]
        whole = show(found, profile, every)
        pictures = draw(Source(found, whole, every, folder, data, pools, make))
        whole = replace(whole, pictures=pictures)
        files: Mapping[str, str] = {
            "table.md": as_markdown(whole),
            "table.html": as_html(whole),
            "table.json": json.dumps(as_json(whole), indent=1, ensure_ascii=False) + "\n",
        }
        for file, text in files.items():
            write(folder / profile / name / file, text.encode())
        out.append(replace(show(found, profile, [known[path_of(cell, folder)] for cell in own]), pictures=pictures))
    return out
