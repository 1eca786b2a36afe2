"""Large things and generators, one part a process, so that each has a peak memory of its own: a line of JSON on stdout.

python benchmarks/speed/scale.py model PARAMETERS
python benchmarks/speed/scale.py pool write|read FOLDER IMAGES
python benchmarks/speed/scale.py generator NAME PIXELS IMAGES
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contender import dataset, fedkeel
from torch import Tensor
from workloads import WORKLOADS

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def peak_mb() -> float:
    """The most memory that this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def model(parameters: str) -> dict[str, Any]:
    """One client, one step, a perceptron of so many parameters."""
    work = replace(WORKLOADS["W1"], clients=1, cohort=1, samples=20, epochs=1, test=20)
    width, before = int(parameters) // (28 * 28 + 11), peak_mb()
    began, cpu = time.perf_counter(), time.process_time()
    go = fedkeel(work, ["model.name=mlp", f"model.hidden=[{width}]"])["go"]
    memory = peak_mb()
    go()
    go()  # what is held between rounds is there too
    vector = int(parameters) * 4 / 2**20
    return {
        "parameters_mb": round(vector),
        "copies_when_ready": round((memory - before) / vector, 2),
        "copies_at_peak": round((peak_mb() - before) / vector, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }


class Noise:
    """Images that cost next to nothing, as a generator's `Source`."""

    classes, shape = CIFAR, (3, 32, 32)

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        rng = torch.Generator().manual_seed(int(sum(indices)))
        return torch.randint(256, (len(labels), *self.shape), generator=rng, dtype=torch.uint8)

    def prompt(self, label: int) -> str:
        return ""

    def memory_bytes(self) -> dict[str, int]:
        return {}

    def fingerprint(self) -> str:
        return "speed"


def pool(word: str, folder: str, images: str) -> dict[str, Any]:
    """A pool of 20 lanes filled, or opened again and read twice, the second time from memory."""
    from fedkeel.generators.store import Pool

    began, lanes, before = time.perf_counter(), 20, peak_mb()
    found = Pool(Noise(), Path(folder), lanes)
    opened = time.perf_counter() - began
    each = int(images) // lanes // len(CIFAR)
    needs = [(label, lane, each) for lane in range(lanes) for label in range(len(CIFAR))]
    if word == "write":
        found.fill(needs)
        return {"images_per_s": round(int(images) / (time.perf_counter() - began)), "peak_mb": peak_mb() - before}
    speeds = []
    for _ in range(2):
        began = time.perf_counter()
        for need in needs:
            found.take(*need)
        speeds.append(round(int(images) / (time.perf_counter() - began)))
    first, again = speeds
    return {
        "open_s": round(opened, 3),
        "images_per_s": first,
        "again_per_s": again,
        "peak_mb": round(peak_mb() - before, 1),
    }


def generator(name: str, pixels: str, images: str) -> dict[str, Any]:
    """Images a CPU second of one core; for CIFAR-10 also how long the pool of a run would take at that speed."""
    from fedkeel.options import build
    from fedkeel.registry import get

    torch.set_num_threads(1)
    shape = (1, 28, 28) if pixels == "28" else (3, 32, 32)
    classes = dataset(replace(WORKLOADS["W1"], clients=1)).classes if pixels == "28" else CIFAR
    source = build(get("generators", name), {}, "generator").load(classes, shape, torch.device("cpu"))
    count = int(images)
    labels = [i % len(classes) for i in range(count)]
    source.generate(labels[:8], list(range(count))[:8])
    cpu, wall = time.process_time(), time.perf_counter()
    source.generate(labels, list(range(count)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    found = {"images": count, "per_core_s": round(count / cpu, 2), "per_wall_s": round(count / wall, 2)}
    if pixels == "32":
        need = missing()
        found |= {"pool_images": need, "pool_core_hours": round(need * cpu / count / 3600, 2)}
        found["how"] = f"extrapolated from {count} images; 50,000 images, 20 clients, Dirichlet 0.1, FBL, seed 1"
    return found


def missing() -> int:
    """Synthetic images that FBL's clients need for CIFAR-10: class counts decide it, no pictures."""
    from fedkeel.algorithms.fbl import FBL
    from fedkeel.partition.dirichlet import Dirichlet
    from fedkeel.rng import Streams

    labels = torch.arange(50_000) % 10
    parts = Dirichlet(alpha=0.1).split(labels, 20, 10, Streams(1).numpy("partition"))
    counts = [labels[rows].bincount(minlength=10) for rows in parts]
    return sum(int(FBL().plan(each, "constrained").fake.sum()) for each in counts)


if __name__ == "__main__":
    PARTS = {"model": model, "pool": pool, "generator": generator}
    print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
