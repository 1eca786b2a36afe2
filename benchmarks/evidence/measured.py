"""What figures of the papers show, as numbers and over seeds, and the pictures of the first of them.

python benchmarks/evidence/measured.py --data FOLDER     runs what is missing, writes measured.json of each figure and
                                                         its cells into benchmarks/results/reproduce, and the pictures
                                                         of docs/evidence.md into docs/images

A picture is drawn from one run and proves little. What stands below it is measured here in the runs of three seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drawn import FIGURES, image
from judged import CELLS, MEASURED, PROFILE, SEEDS, cells_of, stands_on

from fedkeel.errors import DataError, FedkeelError
from fedkeel.files import write, write_json
from fedkeel.reproduce.asked import OF_CONFIG, OF_RUNS, OF_TABLE, Picture, asked
from fedkeel.reproduce.cells import path_of, reproduce
from fedkeel.reproduce.drawings import DRAW
from fedkeel.reproduce.pictures import Source
from fedkeel.reproduce.shown import show
from fedkeel.reproduce.tables import experiment


def numbers(picture: Picture, found: Any) -> dict[str, float | None]:
    """What a picture of runs measured, by the names of `judged.names_of`. found: what stands beside it in JSON.

    Raises DataError where an update was not recorded in the run but made after it, which gives other numbers.
    """
    if picture.kind == "update":
        clouds = dict(zip([(row, when) for row in picture.rows for when in ("before", "after")], found, strict=True))
        return {
            f"{row}/{which}/{when}": cloud["scores"][f"silhouette/{which}"]
            for (row, when), cloud in clouds.items()
            for which in ("held", "missing")
        }
    if picture.kind == "classes":
        if not all(each["recorded"] for each in found):
            raise DataError("its runs are those of another table, which records no updates: measure it first")
        return {
            f"{row}/{which}/{when}": value
            for row, each in zip(picture.rows, found, strict=True)
            for which, pair in each["mean"].items()
            for when, value in pair.items()
        }
    return dict(found["scores"])


def measure(name: str, data: Path, folder: Path, seeds: Sequence[int], workers: int) -> None:
    """One figure: its numbers by picture and seed. What cannot be measured is told and left out."""
    found = experiment(name)
    pictures = asked(found, PROFILE)
    wanted = [replace(each, seed=seed) for each in pictures if each.kind in OF_RUNS for seed in seeds]
    planned = [cell for each in wanted for cell in cells_of(name, each)]
    outcomes = reproduce(planned, folder, data=data, workers=workers, keep=True)
    for outcome in outcomes:
        if outcome.state == "done":
            write(path_of(outcome.cell, CELLS), path_of(outcome.cell, folder).read_bytes())
    source = Source(found, show(found, PROFILE, outcomes), outcomes, folder, data)
    path = CELLS / PROFILE / name / MEASURED
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for picture in [*wanted, *(each for each in pictures if each.kind in OF_CONFIG)]:
        try:
            drawn, caption, values = DRAW[picture.kind](picture, source)
            measured = numbers(picture, values) if picture.kind in OF_RUNS else {}
        except FedkeelError as error:
            print(f"{name} {picture.name} seed {picture.seed}: not measured: {error}", flush=True)
            continue
        one = kept.setdefault(picture.name, {"seeds": {}})
        one["seeds"][str(picture.seed)] = {**stands_on(name, picture), "numbers": measured}
        if picture.seed == 1:
            one["caption"] = caption
            if (name, picture.name) in FIGURES:
                drawn.savefig(image(name, picture.name), dpi=110, format="png")
        write_json(path, kept)
        print(f"{name} {picture.name} seed {picture.seed}: {caption}", flush=True)


def figures() -> list[str]:
    """Those that are not drawn from cells alone. First the one that records more of runs which others share."""
    kinds = {name: {each.kind for each in asked(experiment(name), PROFILE)} for name, _ in FIGURES}
    return sorted((name for name in kinds if kinds[name] - set(OF_TABLE)), key=lambda name: name != "regl-f7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=figures(), help="as fbl-f4a; all of them")
    parser.add_argument("--data", type=Path, required=True, help="folder above the data sets' folders")
    parser.add_argument("--dir", type=Path, default=Path("runs/evidence"), help="where runs are kept")
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=range(1, SEEDS + 1))
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    for name in args.figures:
        measure(name, args.data, args.dir, args.seeds, args.workers)


if __name__ == "__main__":
    main()
