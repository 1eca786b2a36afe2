"""Every method on the bundled images: 20 clients, Dirichlet 0.1 and 0.5, three seeds, a small CNN.

    python benchmarks/baselines.py [--workers 2] [METHOD ...]      two hours on two cores; goes on where it stopped

The settings are the same for all methods and tuned for none. Where a method's own default cannot be meant for a run of
this length (a warm-up of 50 rounds, a distillation of 3,000 unrolled iterations) METHODS says what stands in its place.
The figure of a global method is the accuracy on the 3,000 test images, mean over the last ten rounds; of a personal one
the clients' mean accuracy on test sets of their own class ratio, last and best. Writes
benchmarks/results/baselines-fashion.json; the runs themselves stay in runs/baselines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedkeel import registry
from fedkeel.comparison import Cell, cells
from fedkeel.loop import run

ROOT = Path(__file__).parents[1]
OUT, RUNS = ROOT / "benchmarks/results/baselines-fashion.json", ROOT / "runs/baselines"
PAGE = ROOT / "docs/baselines.md"
ALPHAS, SEEDS = (0.1, 0.5), (1, 2, 3)
METHODS: dict[str, dict[str, object]] = {
    "dynafed": {"iterations": 100},  # 3,000 unrolled iterations take hours on a CPU
    "fedcda": {"warmup": 20},  # half of the rounds; 50 would leave FedAvg
    "fedrep": {"head_epochs": 1, "body_epochs": 1},  # the two local epochs that the others have
    "fgl": {"volume": 500, "epochs": 20},  # as many synthetic images as there are real ones
    "regl": {"volume": 25},  # on average as many synthetic images as a client has real ones
}
WHY = {
    "fedbn": "the network has no BatchNorm, so this is FedAvg, measured on the clients' own test sets",
    "fedadagrad": "its first step moves every weight by up to its rate, 0.1, which killed one network (checked)",
    "fedamp": "a client trains in half of the rounds, with `separate` in all",
    "fedavgm": "momentum 0.9 multiplies the server's step by up to ten: it swings when clients differ much",
    "fedalign": "made for deep networks and 20 local epochs; the last stage of this CNN is one convolution",
    "fednova": "divides by each client's work, so clients with few samples, hence few steps, count for more",
    "moon": "contrasts from a client's second round on: with half of the clients a round, 40 rounds give 20 of them",
    "fedgen": "its strengths, 10, come from 20 steps of plain SGD; with momentum they killed one network (checked)",
    "pfedgate": "its gates begin near 1/2 and halve every layer's weights: this rate is too small (checked)",
    "scaffold": "clients weigh the same, however few samples they hold, and their corrections are rounds old",
    "separate": "no global model; clients hold few classes, which is easy on their own test sets",
}
"""What may hold a method back here, from how it is defined; tested where CHECKS has a run for it. Shown where it is
below FedAvg, or has no global model."""
CHECKS: dict[str, tuple[str, dict[str, object], dict[str, object], float, int]] = {
    "fedadagrad, tau = 0.1": ("fedadagrad", {"tau": 0.1}, {}, 0.1, 2),
    "fedadagrad, server_lr = 0.01": ("fedadagrad", {"server_lr": 0.01}, {}, 0.1, 2),
    "fedgen, alpha = beta = 1": ("fedgen", {"alpha": 1.0, "beta": 1.0}, {}, 0.5, 1),
    "fedgen, local.momentum = 0": ("fedgen", {}, {"momentum": 0.0}, 0.5, 1),
    "pfedgate, local.lr = 0.1": ("pfedgate", {}, {"lr": 0.1}, 0.5, 1),
}
"""Runs that test a remark: method, its options, those of local training, the Dirichlet parameter, the seed."""
TABLE: dict[str, object] = {
    "rounds": 40,
    "clients": 20,
    "participation": 0.5,
    "device": "cpu",
    "checkpoint_every": 10,
    "data": {"name": "fashion", "train_limit": 5000},
    "model": {"name": "cnn", "width": 8, "hidden": 128},
    "local": {"epochs": 2, "batch": 32, "lr": 0.01, "momentum": 0.9},
    "generator": {"name": "bundled"},
    "personal": {"epochs": 10},
    "methods": METHODS,
}


def one(cell: Cell) -> dict[str, Any]:
    """Runs a cell, or reads it when it is done."""
    began = time.process_time()
    result = run(cell.config, folder=cell.folder, resume=True, label=cell.spec)
    rounds = result.rounds
    out: dict[str, Any] = {"rounds": len(rounds), "cpu_s": round(time.process_time() - began, 1)}
    for key in ("global/accuracy", "global/balanced_accuracy"):
        values = [record[key] for record in rounds if key in record]
        if values:
            out |= {
                key: round(result.headline(key), 4),
                f"{key}/best": round(max(values), 4),
                f"{key}/last": values[-1],
            }
    out |= {key: value for key, value in rounds[-1].items() if key.startswith("personal/accuracy")}
    out["bytes/up"] = sum(record["bytes/up"] for record in rounds)
    out["bytes/down"] = sum(record["bytes/down"] for record in rounds)
    out["steps"] = sum(record["train/steps"] for record in rounds)
    out["failed"] = sum(len(record["failed"]) for record in rounds)
    return out


def checks() -> dict[str, Cell]:
    """The runs of CHECKS, by a key like those of the others."""
    out = {}
    for name, (method, options, local, alpha, seed) in CHECKS.items():
        table = {
            **TABLE,
            "partition": {"name": "dirichlet", "alpha": alpha},
            "local": {**TABLE["local"], **local},  # type: ignore[dict-item]
            "methods": {method: options},
        }
        folder = RUNS / "checks" / name.replace(" = ", "").replace(", ", "-")
        (cell,) = cells(table, [method], [seed], folder)
        out[f"{name} | alpha {alpha:g} | seed {seed}"] = cell
    return out


def write(done: dict[str, dict[str, Any]]) -> None:
    """All runs, and mean and deviation over seeds per method and alpha."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in done.items():
        method, alpha, _ = key.split(" | ")
        if method in CHECKS:
            continue
        groups.setdefault(alpha, {}).setdefault(method, {}).setdefault("rows", []).append(row)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for alpha, methods in sorted(groups.items()):
        for method, group in sorted(methods.items()):
            rows = [row for row in group["rows"] if "error" not in row]
            cell: dict[str, Any] = {"seeds": len(rows)}
            for name in ("global/accuracy", "personal/accuracy_last", "personal/accuracy_best", "cpu_s", "steps"):
                values = [row[name] for row in rows if row.get(name) is not None]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cell[name] = [round(statistics.mean(values), 4), round(spread, 4)]
            table.setdefault(alpha, {})[method] = cell
    settings = {key: value for key, value in TABLE.items() if key != "methods"}
    OUT.parent.mkdir(exist_ok=True)
    text = json.dumps({"settings": settings, "methods": METHODS, "table": table, "runs": done}, indent=1)
    OUT.write_text(text + "\n")
    PAGE.write_text(page(table, done))


def page(table: dict[str, dict[str, dict[str, Any]]], done: dict[str, dict[str, Any]]) -> str:
    """The tables for the docs."""
    checks = {key: row for key, row in done.items() if key.split(" | ")[0] in CHECKS and "error" not in row}
    lines = [
        "# Every method on the bundled images",
        "",
        "20 clients, half of them a round, 40 rounds of 2 epochs, batch 32, lr 0.01, momentum 0.9, 5,000 images of",
        "`fashion`, `cnn` of width 8 and hidden 128. Global: accuracy on the 3,000 test images, mean of the last ten",
        "rounds. Personal: the clients' mean accuracy on test sets of their own class ratio, measured after the last",
        "round; the best differs from the last for methods that tune. Mean ± deviation over seeds, in per cent. The",
        "settings are the same for all methods and tuned for none. `python benchmarks/baselines.py` makes it and",
        "goes on where it stopped; every run is in `benchmarks/results/baselines-fashion.json`. A remark says what may",
        "hold a method back, from how it is defined; where it says so, a run at the end of this page tests it.",
        "",
    ]
    if METHODS:
        changed = "; ".join(
            f"`{name}` {', '.join(f'{k} = {v}' for k, v in row.items())}" for name, row in METHODS.items()
        )
        lines += [f"Not at their defaults, for the length of the runs: {changed}.", ""]
    for alpha, methods in sorted(table.items()):
        lines += [f"## Dirichlet, {alpha}", ""]
        lines += ["| method | seeds | global | personal, last | personal, best | CPU s | remark |", "|---" * 7 + "|"]
        order = sorted(methods, key=lambda name: -methods[name].get("global/accuracy", [0.0])[0])
        for name in order:
            row = methods[name]
            cells = [
                percent(row.get(key), row["seeds"])
                for key in ("global/accuracy", "personal/accuracy_last", "personal/accuracy_best")
            ]
            seconds = f"{row['cpu_s'][0]:.0f}" if "cpu_s" in row else "–"
            below = row.get("global/accuracy", [0.0])[0] < methods.get("fedavg", {}).get("global/accuracy", [1.0])[0]
            remark = WHY.get(name, "") if below else ""
            lines.append(f"| `{name}` | {row['seeds']} | {' | '.join(cells)} | {seconds} | {remark} |")
        lines.append("")
    if checks:
        lines += ["## Remarks, tested", "", "| with another setting | run | accuracy | as above |", "|---" * 4 + "|"]
        for key, row in sorted(checks.items()):
            name, alpha, seed = key.split(" | ")
            metric = "global/accuracy" if "global/accuracy" in row else "personal/accuracy_last"
            before = done.get(f"{name.split(', ')[0]} | {alpha} | {seed}", {}).get(metric)
            cells = [percent([row[metric], 0.0], 1), percent(None if before is None else [before, 0.0], 1)]
            lines.append(f"| {name} | {alpha}, {seed} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def percent(value: list[float] | None, seeds: int) -> str:
    """[mean, deviation] as words; one seed has no deviation."""
    if value is None:
        return "–"
    return f"{100 * value[0]:.1f}" + (f" ± {100 * value[1]:.1f}" if seeds > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("methods", nargs="*")
    args = parser.parse_args()
    names = args.methods or registry.names("algorithms")
    done: dict[str, dict[str, Any]] = json.loads(OUT.read_text())["runs"] if OUT.exists() else {}
    planned = {}
    for seed in SEEDS:  # seed by seed, so that a run cut short has all methods
        for alpha in ALPHAS:
            table = {**TABLE, "partition": {"name": "dirichlet", "alpha": alpha}}
            for cell in cells(table, names, [seed], RUNS / f"alpha{alpha:g}"):
                planned[f"{cell.spec} | alpha {alpha:g} | seed {seed}"] = cell
    if not args.methods:
        planned |= checks()
    if done:
        write(done)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(one, cell): key for key, cell in planned.items() if key not in done or "error" in done[key]
        }
        for future in as_completed(waiting):
            key = waiting[future]
            try:
                done[key] = future.result()
            except Exception as error:  # one method's failure is a row of the table, not the end of the others
                done[key] = {"error": f"{type(error).__name__}: {error}"}
            if OUT.exists():  # another call for other methods may be running
                done = json.loads(OUT.read_text())["runs"] | done
            write(done)
            print(key, {k: v for k, v in done[key].items() if "accuracy" in k or k in ("cpu_s", "error")}, flush=True)
    sys.exit(any("error" in row for row in done.values()))


if __name__ == "__main__":
    main()
