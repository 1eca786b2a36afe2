"""FBL, ReGL (TF) and ReGL (FT) beside FedAvg, on the bundled images and on CIFAR-10, with controls for the generator.

    python benchmarks/generators.py [--cifar10 FOLDER] [--workers 2]      about an hour on two cores; goes on where it
                                                                          stopped

FOLDER holds CIFAR-10 as parquet files; without it those rows are left out. Clients hold no image that the generators
were trained on: of CIFAR-10 they get images of the 40,000 that `data.public_limit = 10000` leaves. The same partition,
network and settings for all methods, tuned for none; three seeds. The figure is the accuracy on the test images, mean
over the last ten rounds. Writes benchmarks/results/generators.json and docs/generators-compared.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedkeel.comparison import Cell, cells
from fedkeel.data.dataset import Dataset
from fedkeel.loop import run

ROOT = Path(__file__).parents[1]
OUT, RUNS = ROOT / "benchmarks/results/generators.json", ROOT / "runs/generators"
PAGE = ROOT / "docs/generators-compared.md"
SEEDS = (1, 2, 3)
COMMON: dict[str, object] = {
    "clients": 20,
    "participation": 0.5,
    "rounds": 30,
    "device": "cpu",
    "checkpoint_every": 10,
    "partition": {"name": "dirichlet", "alpha": 0.1},
    "local": {"epochs": 2, "batch": 32, "lr": 0.01, "momentum": 0.9},
    "methods": {"regl": {"volume": 25}},  # on average as many synthetic images as a client has real ones
}
DATA: dict[str, dict[str, object]] = {
    "fashion": {
        "data": {"name": "fashion", "train_limit": 5000},
        "model": {"name": "cnn", "width": 8, "hidden": 128},
    },
    "cifar10": {
        "data": {"name": "parquet", "train_limit": 5000, "test_limit": 5000, "public_limit": 10_000},
        "model": {"name": "cnn", "width": 16, "hidden": 128},
        "augment": {"flip": True},
    },
}
TUNING: dict[str, dict[str, object]] = {  # less than the defaults, for time
    "fashion": {"tune_steps": 60},
    "cifar10": {"tune_steps": 40, "tune_replay": 8, "tune_serve": 4},
}
ROWS: dict[str, tuple[str, dict[str, object] | None]] = {
    "FedAvg": ("fedavg", None),
    "FBL, bundled": ("fbl", {"name": "bundled"}),
    "FBL, gaussian": ("fbl", {"name": "gaussian"}),
    "FBL, real public images": ("fbl", {"name": "public", "repeat": True}),
    "ReGL (TF), bundled": ("regl:TF", {"name": "bundled"}),
    "ReGL (FT), bundled": ("regl:FT", {"name": "bundled"}),
}
CIFAR_ONLY = {"FBL, real public images"}  # those of `fashion` do not come with the package
_LOADED: dict[str, Dataset] = {}


def planned(cifar10: Path | None) -> dict[str, Cell]:
    """All runs, seed by seed, by "data | row | seed"."""
    out = {}
    for seed in SEEDS:
        for name, base in DATA.items():
            if name == "cifar10" and cifar10 is None:
                continue
            for row, (spec, generator) in ROWS.items():
                if row in CIFAR_ONLY and name == "fashion":
                    continue
                table: dict[str, object] = {**COMMON, **base}
                if name == "cifar10":
                    table["data"] = {**base["data"], "dir": str(cifar10)}  # type: ignore[dict-item]
                if generator is not None:
                    table["generator"] = {**generator, **(TUNING[name] if spec == "regl:FT" else {})}
                folder = RUNS / name / row.replace(", ", "-").replace(" ", "-")
                (out[f"{name} | {row} | seed {seed}"],) = cells(table, [spec], [seed], folder)
    last = [key for key in out if key.startswith("cifar10 | ReGL (FT)")]  # they take longest
    return {key: cell for key, cell in out.items() if key not in last} | {key: out[key] for key in last}


def one(cell: Cell) -> dict[str, Any]:
    """Runs a cell, or reads it when it is done."""
    config = cell.config
    key = json.dumps(config.table()["data"], sort_keys=True)
    if key not in _LOADED:
        _LOADED[key] = config.data.load()
    result = run(config, data=_LOADED[key], folder=cell.folder, resume=True, label=cell.spec)
    curve = [round(record["global/accuracy"], 4) for record in result.rounds]
    return {
        "accuracy": round(result.headline(), 4),
        "best": max(curve),
        "last": curve[-1],
        "curve": curve,
        "steps": sum(record["train/steps"] for record in result.rounds),
    }


def write(done: dict[str, dict[str, Any]]) -> None:
    """All runs, and mean and deviation over seeds."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for data in DATA:
        for row in ROWS:
            runs = [done[key] for seed in SEEDS if (key := f"{data} | {row} | seed {seed}") in done]
            if runs:
                scores = [one["accuracy"] for one in runs]
                table.setdefault(data, {})[row] = {
                    "seeds": len(runs),
                    "accuracy": round(statistics.mean(scores), 4),
                    "deviation": round(statistics.stdev(scores), 4) if len(scores) > 1 else None,
                    "steps": round(statistics.mean(one["steps"] for one in runs)),
                }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    settings = {"common": COMMON, "data": DATA, "tuning": TUNING, "rows": ROWS}
    OUT.write_text(json.dumps({"settings": settings, "table": table, "runs": done}, indent=1) + "\n")
    PAGE.write_text(page(table))


def page(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The tables for the docs."""
    lines = [
        "# Generators compared",
        "",
        "20 clients, Dirichlet 0.1, 5,000 train images in all, half of the clients a round, 30 rounds of 2 epochs,",
        "batch 32, lr 0.01, momentum 0.9, a small CNN. Accuracy on the test images in per cent, mean of the last",
        "ten rounds, mean ± deviation over seeds. ReGL: 25 synthetic images of every class for each client. The",
        "settings are the same for all methods and were chosen for none of them. FT tunes each client's generator",
        "for 60 steps on `fashion`; on CIFAR-10 for 40, with 8 images of replay a class, and makes an image in 4",
        "steps: less than the defaults, for time. No client holds an image that a generator was trained on, and",
        "each client has synthetic images of its own. `python benchmarks/generators.py` makes it; every run is in",
        "`benchmarks/results/generators.json`.",
        "",
        "Under FBL a Gaussian per class, or real public images, fill about as well as the flow. ReGL is above FBL",
        "here, with twice the steps; what more steps alone do is [measured elsewhere](evidence.md#claim-steps).",
        "",
    ]
    for data, rows in table.items():
        lines += [f"## {data}", "", "| | seeds | accuracy | steps |", "|---" * 4 + "|"]
        for name, row in rows.items():
            spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
            accuracy = f"{100 * row['accuracy']:.1f}{spread}"
            lines.append(f"| {name} | {row['seeds']} | {accuracy} | {row['steps']:,} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    done: dict[str, dict[str, Any]] = json.loads(OUT.read_text())["runs"] if OUT.exists() else {}
    waiting = {key: cell for key, cell in planned(args.cifar10).items() if key not in done}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(one, cell): key for key, cell in waiting.items()}
        for future in as_completed(futures):
            key = futures[future]
            done[key] = future.result()
            write(done)
            print(key, done[key]["accuracy"], flush=True)
    write(done)


if __name__ == "__main__":
    main()
