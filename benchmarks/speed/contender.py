"""One contender of the speed benchmarks, as a process: see harness.py for what it says and hears.

    python benchmarks/speed/contender.py WORKLOAD bare|limit|limit_bf16|fedkeel [KEY=VALUE ...]
    python benchmarks/speed/contender.py WORKLOAD limit METHOD          with what this method needs: see needs.py

WORKLOAD is a name of workloads.py, with "tiny:" before it for as little of it as runs. Beside `go` fedkeel answers
`count` (a round with its forward and backward passes counted) and `profile` (a round with its seconds by part).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from workloads import CLASSES, WORKLOADS, Workload, arrays, tiny

Answers = dict[str, Callable[[], dict[str, Any]]]


def workload(name: str) -> Workload:
    """By its name."""
    word, _, rest = name.rpartition(":")
    return tiny(WORKLOADS[rest]) if word else WORKLOADS[rest]


def main() -> None:
    work, kind, *overrides = sys.argv[1:]
    try:
        answers = contender(workload(work), kind, overrides)
        say({"ready": True})
        for line in sys.stdin:
            say(answers[line.strip()]())
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def contender(work: Workload, kind: str, overrides: list[str]) -> Answers:
    """What it answers to which word."""
    torch.set_num_threads(1)
    if kind == "fedkeel":
        return fedkeel(work, overrides)
    import loops
    from needs import NEEDS

    needs = NEEDS[overrides[0]] if overrides else None
    one = loops.bare(work) if kind == "bare" else loops.limit(work, kind == "limit_bf16", needs)
    return {"go": lambda: {"steps": one()}}


def table(work: Workload) -> dict[str, Any]:
    """The configuration of fedkeel; `rounds` is far away, as the last one is not like the others."""
    return {
        "rounds": 1_000_000,
        "clients": work.clients,
        "participation": work.cohort,
        "device": "cpu",
        "partition": {"name": "iid"},
        "model": {"name": work.model},
        "local": {"epochs": work.epochs, "batch": work.batch, "lr": work.lr},
    }


def dataset(work: Workload) -> Any:
    """The arrays of the workload; classes are named as those that the bundled generators know."""
    from fedkeel.data.dataset import Dataset
    from fedkeel.data.pictures import statistics
    from fedkeel.generators.gaussian import BUNDLED, read

    data = arrays(work)
    names = read(BUNDLED / "gaussian-fashion.safetensors").classes
    assert len(names) == CLASSES
    return Dataset("speed", names, *data, *statistics(data.train_x))


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A partition of any number of clients on few images: each holds 100 of them, and so do others."""

    def split(self, labels: Tensor, clients: int, classes: int, rng: object) -> list[Tensor]:
        """Rows of each client."""
        rows = torch.arange(len(labels)).split(100)
        return [rows[client % len(rows)] for client in range(clients)]


def fedkeel(work: Workload, overrides: list[str]) -> Answers:
    """The parts of `loop.run`, round by round, the evaluation of each round included, nothing written."""
    from fedkeel import parse, registry
    from fedkeel.job import Job
    from fedkeel.loop import one_round

    registry.register("partitions", "repeated")(Repeated)
    job = Job(parse(table(work), overrides), dataset(work))
    runtime = registry.get("runtimes", job.config.runtime)().start(job)
    runtime.prepare(lambda done, total: None, lambda client, done, total: None)
    server, accepted = replace(job.first_server(), layout=job.worker.weights.layout), {}

    def go() -> dict[str, Any]:
        nonlocal server
        server, record = one_round(job, runtime, server, accepted)
        return {"steps": record["train/steps"], "failed": record["failed"]}

    def counted() -> dict[str, Any]:
        from parts import passes

        with passes(job.worker.model.features) as found:
            go()
        return found

    def profiled() -> dict[str, Any]:
        from parts import seconds

        with seconds() as found:
            go()
        return found

    return {"go": go, "count": counted, "profile": profiled}


if __name__ == "__main__":
    main()
