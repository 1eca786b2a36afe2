"""What docs/evidence.md says of partitions, counted from them; nothing is trained.

python benchmarks/evidence/counted.py --data FOLDER     writes counted.json beside the cells: how much FBL's balance
                                                        point keeps and fills and how large its clients' pool is, by
                                                        column of fbl-t1; how often a client's most frequent class is
                                                        right, by column of regl-t4
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from judged import COUNTED, PROFILE

from fedkeel.config import Config
from fedkeel.files import write_json
from fedkeel.job import Job
from fedkeel.reproduce.cells import loaded
from fedkeel.reproduce.command import plan

ROWS, COLUMNS = ("fbl-shared", "fbl-25", "fbl-50"), ("c10-01", "c10-03", "c10-05", "c100-01", "tiny-01", "eurosat-01")
PERSONAL = ("fruit-001", "fruit-05", "eurosat-001", "eurosat-05")
DRAWS = 500


def balanced(config: Config) -> dict[str, float]:
    """Shares of clients' real images that are kept and of their samples that are synthetic, and the largest need of any
    client of a class, averaged over classes: so many images a class are in a pool that all share."""
    job = Job(config, loaded(config))
    real, fake = job.plan.real, job.plan.fake
    return {
        "kept": float(real.sum() / job.counts.sum()),
        "synthetic": float(fake.sum() / (real.sum() + fake.sum())),
        "pool": float(fake.amax(0).float().mean()),
    }


def majority(config: Config) -> float:
    """How often a client is right that always names its most frequent class, over draws of the partition: personal
    models are measured in the client's own class ratio."""
    counts = [Job(replace(config, seed=seed), loaded(config)).counts for seed in range(1, DRAWS + 1)]
    return fmean(float((each.amax(1) / each.sum(1)).mean()) for each in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder above the data sets' folders")
    data = parser.parse_args().data
    shares: dict[str, dict[str, list[dict[str, float]]]] = {}
    for cell in plan(["fbl-t1"], PROFILE, ROWS, COLUMNS):
        found = {name: round(value, 4) for name, value in balanced(cell.placed(data, Path("counted"))).items()}
        shares.setdefault(cell.column.key, {}).setdefault(cell.row.key, []).append(found)
    often = {
        cell.column.key: round(majority(cell.placed(data, Path("counted"))), 4)
        for cell in plan(["regl-t4"], PROFILE, ["fedavg"], PERSONAL, [1])
    }
    write_json(COUNTED, {"fbl-t1": shares, "regl-t4": {"draws": DRAWS, "majority": often}})


if __name__ == "__main__":
    main()
