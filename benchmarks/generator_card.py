"""The numbers of docs/generator-card.md: how good the bundled generators are, and how fast.

    python benchmarks/generator_card.py fashion [FOLDER] [--seeds 3]      about 10 minutes on one core
    python benchmarks/generator_card.py cifar10 FOLDER [--seeds 3]        about 25 minutes
    python benchmarks/generator_card.py eurosat FOLDER [--seeds 3]        about 70 minutes

Quality is the accuracy on real test images of one small CNN (conv 3x3 of 16 and 32 channels, each with ReLU and 2x2 max
pooling, fully connected 128; Adam at 1e-3, 1,500 steps of 64, no augmentation) that was trained on nothing but the
images in question, 10,000 of them (12,000 private ones of `fashion`; 2,000 of EuroSAT, which has no more public ones).
FOLDER holds the original Fashion-MNIST, for the row of the public part (without it that row is left out), or CIFAR-10
or EuroSAT as parquet files.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fedkeel.data.dataset import Dataset
from fedkeel.data.fashion import Fashion
from fedkeel.data.sources import Parquet
from fedkeel.generators.base import Source
from fedkeel.generators.flow import BUNDLED, Bundled
from fedkeel.generators.gaussian import Gaussian
from fedkeel.rng import Streams, isolated

ROOT = Path(__file__).parents[1]
RESULTS = {
    "fashion": ROOT / "benchmarks/results/generator-card.json",
    "cifar10": ROOT / "benchmarks/results/generator-card-cifar10.json",
    "eurosat": ROOT / "benchmarks/results/generator-card-eurosat.json",
}
STEPS_OF = {"fashion": (1, 2), "cifar10": (4, 8), "eurosat": (4, 8)}
STEPS, BATCH, RATE = 1_500, 64, 1e-3
PER_CLASS = {"fashion": 1_000, "cifar10": 1_000, "eurosat": 200}
PARTS = {"cifar10": "private part, 10,000 of 40,000", "eurosat": "private part, 2,000 of 6,000"}


def accuracy(x: Tensor, y: Tensor, data: Dataset, seed: int) -> float:
    """Share of the real test images that a CNN trained on x [N, C, H, W] uint8, y [N] gets right."""
    rng = Streams(seed)
    channels, height, _ = data.shape
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    with isolated(rng("init")):
        net = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * (height // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10)),
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    batches = rng("batch")

    def unit(images: Tensor) -> Tensor:
        return (images.float() / 255 - mean) / std

    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=batches)
        loss = nn.functional.cross_entropy(net(unit(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        right = [(net(unit(a)).argmax(1) == b).float().mean() for a, b in zip(*parts(data), strict=True)]
    return torch.stack(right).mean().item()


def parts(data: Dataset) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return data.test_x.split(500), data.test_y.split(500)


def made(source: Source, count: int) -> tuple[Tensor, Tensor, float]:
    """`count` images of each class, their labels, and images per second."""
    labels = [label for label in range(10) for _ in range(count)]
    indices = list(range(count)) * 10
    source.generate(labels[:128], indices[:128])  # warm up
    start, out = time.process_time(), []
    for i in range(0, len(labels), 256):
        out.append(source.generate(labels[i : i + 256], indices[i : i + 256]))
    return torch.cat(out), torch.tensor(labels), len(labels) / (time.process_time() - start)


def picture(columns: list[Tensor], path: Path) -> None:
    """A contact sheet: per class one row, six images of each kind ([10, 6, C, H, W]) side by side."""
    from PIL import Image

    strips = [x.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1) for x in columns]  # [10 H, 6 W, C]
    gap = torch.full((len(strips[0]), 8, strips[0].shape[2]), 255, dtype=torch.uint8)
    whole = torch.cat([piece for strip in strips for piece in (strip, gap)][:-1], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(whole.squeeze(2).numpy())
    if columns[0].shape[3] < 64:
        image = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    else:  # a megabyte otherwise
        image = image.quantize(256)
    image.save(path, optimize=True)


def real(name: str, folder: Path | None) -> tuple[Dataset, dict[str, tuple[Tensor, Tensor]]]:
    """The data set, and its real images to train on."""
    if name == "fashion":
        data = Fashion().load()
        sets = {"private part, shipped": (data.train_x, data.train_y)}
        if folder:
            sys.path.insert(0, str(ROOT / "tools"))
            from build_fashion import public_images

            sets["public part"] = public_images(folder)
        return data, sets
    count = 10 * PER_CLASS[name]
    data = Parquet(dir=str(folder), public_limit=count, train_limit=count).load()
    assert data.public is not None
    return data, {
        PARTS[name]: (data.train_x, data.train_y),
        "public part": (data.public.x, data.public.y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RESULTS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, there = real(args.name, args.folder)
    cpu = torch.device("cpu")
    sets: dict[str, tuple[Tensor, Tensor, float | None]] = {name: (*pair, None) for name, pair in there.items()}
    count = PER_CLASS[args.name]
    for steps in STEPS_OF[args.name]:
        source = Bundled(steps=steps).load(data.classes, data.shape, cpu)
        sets[f"bundled, {steps} step{'s' * (steps > 1)}"] = made(source, count)
    sets["gaussian"] = made(Gaussian().load(data.classes, data.shape, cpu, data.public), count)
    rows = []
    for name, (x, y, speed) in sets.items():
        scores = [accuracy(x, y, data, seed) for seed in range(args.seeds)]
        rows.append({"trained on": name, "images": len(x), "accuracy": scores, "images per second": speed})
        print(rows[-1], flush=True)
    sizes = {path.name: path.stat().st_size for path in sorted(BUNDLED.glob(f"*-{args.name}.safetensors"))}
    facts = {
        "test images": len(data.test_x),
        "classifier": f"conv 16/32, fc 128, Adam {RATE}, {STEPS} steps of {BATCH}",
        "rows": rows,
        "bytes": sizes,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "hardware": f"{platform.machine()}, one thread, {torch.backends.cpu.get_cpu_capability()}",
    }
    result = RESULTS[args.name]
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(facts, indent=1) + "\n")
    default = f"bundled, {Bundled().load(data.classes, data.shape, cpu).steps} step"
    served = next(x for name, (x, _, _) in sets.items() if name.startswith(default))
    first = torch.stack([data.train_x[data.train_y == label][:6] for label in range(10)])
    rest = [x.reshape(10, count, *data.shape)[:, :6] for x in (served, sets["gaussian"][0])]
    picture([first, *rest], ROOT / f"docs/images/generator-{args.name}.png")


if __name__ == "__main__":
    main()
