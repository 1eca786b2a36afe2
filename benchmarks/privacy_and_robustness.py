"""What privacy costs in accuracy, and what robust rules do against liars: the tables of docs/privacy-and-robustness.md.

    python benchmarks/privacy_and_robustness.py        a few minutes on one core

Bundled Fashion-MNIST, accuracy in percent after the last round, three seeds. Privacy: examples/private.toml with and
without its section [privacy]. Liars: 4 of 20 clients send -10 times what they learnt, `mlp` with 64 hidden units,
all clients in each of 10 rounds of at most 10 steps, 4,000 train and 1,000 test images.
Writes benchmarks/results/privacy-and-robustness.json.
"""

from __future__ import annotations

import json
import statistics
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedkeel.algorithms.base import Algorithm
from fedkeel.config import parse
from fedkeel.loop import run
from fedkeel.options import option
from fedkeel.records import Local, Update
from fedkeel.registry import register

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/privacy-and-robustness.json"
SEEDS = (1, 2, 3)
RULES: dict[str, dict[str, object] | None] = {
    "average": None,
    "median": {"name": "median"},
    "trimmed_mean": {"name": "trimmed_mean", "trim": 0.25},
    "krum": {"name": "krum", "byzantine": 4},
    "multi_krum": {"name": "multi_krum", "byzantine": 4},
}
SKEWS: dict[str, dict[str, object]] = {"iid": {"name": "iid"}, "dirichlet(0.1)": {"name": "dirichlet", "alpha": 0.1}}


@register("algorithms", "liars")
@dataclass(frozen=True, kw_only=True)
class Liars(Algorithm):
    """FedAvg whose first clients send ten times the opposite of what they learnt."""

    many: int = option(0, "how many lie", ge=0)

    def upload(self, local: Local) -> Update:
        update = super().upload(local)
        return replace(update, delta=-10 * update.delta) if local.client < self.many else update


def attacked(rule: str, skew: str, liars: int, seed: int) -> dict[str, object]:
    """The configuration of one run."""
    return {
        "rounds": 10,
        "clients": 20,
        "participation": 1.0,
        "seed": seed,
        "device": "cpu",
        "data": {"name": "fashion", "train_limit": 4000, "test_limit": 1000},
        "partition": SKEWS[skew],
        "model": {"name": "mlp", "hidden": [64]},
        "local": {"max_steps": 10, "lr": 0.1, "batch": 32},
        "algorithm": {"name": "liars", "many": liars, "weights": "samples"},
        **({} if RULES[rule] is None else {"robust": RULES[rule]}),
    }


def accuracies(configs: list[dict[str, object]]) -> dict[str, object]:
    """Of the same run with several seeds."""
    found = [100 * run(parse(config)).rounds[-1]["global/accuracy"] for config in configs]
    return {"mean": statistics.mean(found), "std": statistics.stdev(found), "seeds": found}


def main() -> None:
    torch.set_num_threads(1)
    private = tomllib.loads((ROOT / "examples/private.toml").read_text())
    plain = {key: value for key, value in private.items() if key != "privacy"}
    results: dict[str, dict[str, object]] = {
        "privacy": {
            "with": accuracies([private | {"seed": seed} for seed in SEEDS]),
            "without": accuracies([plain | {"seed": seed} for seed in SEEDS]),
            "record": {
                name: value for name, value in run(parse(private)).rounds[-1].items() if name.startswith("privacy/")
            },
        }
    }
    for rule in RULES:
        results[rule] = {}
        for skew in SKEWS:
            for liars in (0, 4):
                found = accuracies([attacked(rule, skew, liars, seed) for seed in SEEDS])
                results[rule][f"{skew}, {liars} liars"] = found
                print(f"{rule:14} {skew:15} {liars} liars: {found['mean']:.1f} ± {found['std']:.1f}", flush=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
