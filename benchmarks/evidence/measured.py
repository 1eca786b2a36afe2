"""What figures of the papers show, as numbers and over seeds, and the pictures of the first of them.

python benchmarks/evidence/measured.py --data FOLDER     runs what is missing, writes measured.json of each figure into
                                                         benchmarks/results/reproduce, pictures into docs/images

A picture is drawn from one run and proves little. What stands below it is measured here in the runs of three seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from drawn import FIGURES, MEASURED_IN, path_of
from judged import CELLS, MEASURED, PROFILE, SEEDS, keys_of

from fedkeel.files import write_json
from fedkeel.reproduce.cells import reproduce
from fedkeel.reproduce.drawings import DRAW
from fedkeel.reproduce.pictures import OF_CONFIG, OF_RUNS, Picture, Source, asked
from fedkeel.reproduce.shown import show
from fedkeel.reproduce.tables import experiment


def numbers(picture: Picture, found: Any) -> dict[str, float | None]:
    """What a picture measured, by name. found: the numbers that stand beside it."""
    if picture.kind == "aligned":
        pairs = found["distances"].values()
        return {when: sum(pair[at] for pair in pairs) / len(pairs) for at, when in enumerate(("before", "after"))}
    if picture.kind == "update":
        clouds = dict(zip([(row, when) for row in picture.rows for when in ("before", "after")], found, strict=True))
        return {
            f"{row}/{which}/{when}": cloud["scores"][f"silhouette/{which}"]
            for (row, when), cloud in clouds.items()
            for which in ("held", "missing")
        }
    if picture.kind == "classes":
        return {
            f"{row}/{which}/{when}": value
            for row, each in zip(picture.rows, found, strict=True)
            for which, pair in each["mean"].items()
            for when, value in pair.items()
        }
    scores: Mapping[str, float | None] = found["scores"] if picture.kind == "images" else {}
    return dict(scores)


def measure(name: str, args: argparse.Namespace) -> None:
    """One figure: its numbers by picture and seed."""
    found = experiment(name)
    wanted = [replace(each, seed=seed) for each in asked(found, PROFILE) if each.kind in OF_RUNS for seed in args.seeds]
    planned = [cell for each in wanted for cell in Source(found, show(found, PROFILE, []), [], args.dir).needs(each)]
    outcomes = reproduce(planned, args.dir, data=args.data, workers=args.workers, keep=True)
    source = Source(found, show(found, PROFILE, outcomes), outcomes, args.dir, args.data)
    wanted += [each for each in asked(found, PROFILE) if each.kind in OF_CONFIG]
    path = CELLS / PROFILE / name / MEASURED
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for picture in wanted:
        drawn, caption, values = DRAW[picture.kind](picture, source)
        one = kept.setdefault(picture.name, {"caption": "", "seeds": {}})
        if picture.kind in OF_RUNS:
            one["seeds"][str(picture.seed)] = {"cells": keys_of(name, picture), **numbers(picture, values)}
        if picture.seed == 1:
            one["caption"] = caption
            if (name, picture.name) in FIGURES:
                drawn.savefig(path_of(name, picture.name), dpi=110, format="png")
        print(f"{name} {picture.name} seed {picture.seed}: {caption}", flush=True)
    write_json(path, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=list(MEASURED_IN), help="as fbl-f4a")
    parser.add_argument("--data", type=Path, required=True, help="folder above the data sets' folders")
    parser.add_argument("--dir", type=Path, default=Path("runs/evidence"), help="where runs are kept")
    parser.add_argument(
        "--seeds", type=lambda text: [int(each) for each in text.split(",")], default=list(range(1, SEEDS + 1))
    )
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    for name in args.figures:
        measure(name, args)


if __name__ == "__main__":
    main()
