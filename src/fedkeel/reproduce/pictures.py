"""The pictures of a table, as its paper draws them: each a PNG file with the numbers behind it in JSON beside it.

    <folder>/<profile>/<table>/<kind>[-<column>].png and .json

An experiment file lists them under `pictures`. Some are drawn from the table's numbers (`curve`, `bars`), some from a
configuration alone (`histogram`, `partition`, `sheet`: data, partition and generator; nothing is trained), some from
runs that are done (`classes`, `update`, `images`, `aligned`). The last name one `column`, so that the cells they need
keep their checkpoints. What was drawn from the same cells before is not drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedkeel.errors import CheckpointError, FedkeelError
from fedkeel.files import write_json
from fedkeel.report.plots import save
from fedkeel.reproduce.asked import OF_RUNS, OF_TABLE, Picture, asked
from fedkeel.reproduce.cells import Outcome
from fedkeel.reproduce.drawings import DRAW
from fedkeel.reproduce.shown import Drawn, Shown
from fedkeel.reproduce.tables import Cell, Experiment, cells

ALT = {
    "curve": "Line chart of accuracy, with the spread over seeds; printed values as hollow marks",
    "bars": "Bar chart of accuracy, with the spread over seeds; printed values as hollow marks",
    "histogram": "Bar charts of one client's samples of each class, before and after synthetic ones are added",
    "partition": "Classes down, clients across, a disc for the samples in each place",
    "sheet": "Rows of classes, with real and synthetic images side by side",
    "classes": "Bar charts of the accuracy of each class before and after a local update, a panel for each method",
    "update": "t-SNE of test images before and after a local update, with marks for held and missing classes",
    "images": "t-SNE of one client's real images and of synthetic ones",
    "aligned": "t-SNE of real features, of synthetic ones, and of these with their class's offset",
}


@dataclass(frozen=True)
class Source:
    """What pictures of a table are drawn from. outcomes: of all its cells. folder, data, pools: as in `reproduce`.
    make: images may be made and generators tuned."""

    found: Experiment
    whole: Shown
    outcomes: Sequence[Outcome]
    folder: Path
    data: Path | None = None
    pools: Path | None = None
    make: bool = True

    def shows(self, picture: Picture) -> list[Outcome]:
        """The outcomes that a picture of the table shows."""
        columns = {column for line in (picture.lines or {}).values() for column in line}
        return [
            each
            for each in self.outcomes
            if (not picture.rows or each.cell.row.key in picture.rows)
            and (not columns or each.cell.column.key in columns)
        ]

    def printed(self, cell: Cell) -> object:
        """What the experiment's file has in the cell's place: labels, the paper's numbers, why they are doubtful."""
        return (cell.row.label, cell.column.label, *self.found.printed_at(cell.row.key, cell.column.key))

    def needs(self, picture: Picture) -> list[Cell]:
        """The cells of a picture of one column, in the order of its rows."""
        found = cells(self.found, self.whole.profile, picture.rows, [picture.column], [picture.seed])
        rows = picture.rows or tuple(self.found.rows)
        return sorted(found, key=lambda cell: rows.index(cell.row.key))


def draw(source: Source) -> tuple[Drawn, ...]:
    """The pictures of a table, drawn and written where they are not there yet. One that cannot be drawn says why, and
    which command makes what it needs."""
    return tuple(_drawn(picture, source) for picture in asked(source.found, source.whole.profile))


def _drawn(picture: Picture, source: Source) -> Drawn:
    profile, name = source.whole.profile, source.found.name
    path = source.folder / profile / name / f"{picture.name}.png"
    column = source.found.columns[picture.column].label if picture.column else ""
    title = f"{picture.title}: {column}" if column else picture.title
    drawn = Drawn(picture.kind, title, "", ALT[picture.kind])
    try:
        own, missing = _cells(picture, source)
        if missing:
            return replace(drawn, missing=missing)
        stands_on = {"picture": asdict(picture), "cells": own}
        before = _before(path, stands_on)
        if before is None:
            if picture.kind == "sheet" and not source.make:
                return replace(drawn, missing=f"images are not there: {command(picture, source)}")
            figure, caption, numbers = DRAW[picture.kind](picture, source)
            save(figure, path)
            before = {"title": title, "caption": caption, "numbers": numbers, **stands_on}
            write_json(path.with_suffix(".json"), before)
        return replace(drawn, file=path.name, caption=before["caption"], png=path.read_bytes())
    except FedkeelError as error:
        mends = isinstance(error, CheckpointError) or getattr(error, "key", "") == "--data"
        return replace(drawn, missing=f"{error}; to make it: {command(picture, source)}" if mends else str(error))


def _before(path: Path, stands_on: Mapping[str, object]) -> dict[str, Any] | None:
    """What stands beside a picture that was drawn from the same."""
    try:
        found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        same = {key: found[key] for key in stands_on} == json.loads(json.dumps(stands_on))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same and path.is_file() else None


def _cells(picture: Picture, source: Source) -> tuple[dict[str, object], str]:
    """What a picture stands on, by the names of its cells; and what it lacks."""
    if picture.kind in OF_TABLE:
        done = {
            each.cell.name: (each.cell.key, value, source.printed(each.cell))
            for each in source.shows(picture)
            if (value := each.headline()) is not None
        }
        return dict(done), "" if done else f"none of its cells is done: {command(picture, source)}"
    wanted = source.needs(picture)
    if picture.kind in OF_RUNS:
        outcomes = {each.cell.name: each for each in source.outcomes}
        states = {cell.row.key: outcomes[cell.name].state if cell.name in outcomes else "missing" for cell in wanted}
        lacking = [f"{row} ({state})" for row, state in states.items() if state != "done"]
        if lacking:
            return {}, f"it needs the runs of {', '.join(lacking)}: {command(picture, source)}"
    return {cell.name: cell.key for cell in wanted}, ""


def command(picture: Picture, source: Source) -> str:
    """The command that makes what a picture needs."""
    words = ["fedkeel reproduce", source.found.name, "--profile", source.whole.profile]
    if picture.kind in OF_RUNS:
        words += ["--rows", ",".join(picture.rows), "--columns", picture.column, "--seeds", str(picture.seed)]
    if source.whole.profile != "smoke":
        words += ["--data", "FOLDER"]
    if source.folder != Path("runs/reproduce"):
        words += ["--dir", str(source.folder)]
    return " ".join(word for word in words if word)
