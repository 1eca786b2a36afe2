"""Trains a bundled generator on public images only: a teacher and, where few steps shall do, its straightened student.

    python tools/train_flow.py fashion [FOLDER]   about 35 minutes on one core; FOLDER holds the four original .gz files
    python tools/train_flow.py cifar10 FOLDER     about 95 minutes on one core; FOLDER holds CIFAR-10 as parquet
    python tools/train_flow.py eurosat FOLDER     about 30 minutes on one core; FOLDER holds EuroSAT as parquet

    python tools/train_flow.py cifar10 FOLDER --amend FILE [--steps N]   adds to a finished file what it was trained on

--teacher, --student: read when they exist, otherwise trained and written; training goes on from FILE.part when it was
stopped. The recipes are below; docs/generator-card.md has the numbers.

Teacher: a rectified flow (arXiv 2209.03003) on straight lines between noise and image, t logit-normal (arXiv
2403.03206), exponential average of the weights. Student: the paper's reflow; it starts from the teacher and learns the
lines between noise and what the teacher makes of it, mostly at t = 0 and 1/2, where one and two steps ask for it. Last
stage: t = 0 only, on new pairs too, so that one step is enough.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from build_fashion import CLASSES, ORIGINAL, public_images
from safetensors import safe_open
from safetensors.torch import save as pack
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedkeel.data.sources import Parquet
from fedkeel.files import write
from fedkeel.generators.flow import BUNDLED, FlowConfig, FlowNet, amend, euler, load, save

BATCH, WARM_UP = 96, 50


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and for how long; student and last stage start from pairs that the teacher made."""

    config: FlowConfig
    source: str
    public: Callable[[Path], tuple[Tensor, Tensor]]
    teacher_steps: int
    teacher_rate: float
    average: float
    flips: tuple[int, ...]
    """Axes of [B, C, H, W] along which images are turned round, half of the time."""
    serve: int
    """Euler steps that the result is served with unless told otherwise."""
    t_mean: float = 0.0
    """Of the logit of t, whose deviation is 1; below 0 for more noise."""
    pairs: int = 0
    pair_steps: int = 10
    student_steps: int = 0
    """None: the teacher is served."""
    student_times: tuple[float, ...] = (0.0,)
    """Where on the lines the student is trained, four fifths of the time; uniform otherwise."""
    student_rate: float = 1e-3
    last_pairs: int = 0
    last_steps: int = 0
    last_rate: float = 1e-3


def of_parquet(limit: int) -> Callable[[Path], tuple[Tensor, Tensor]]:
    """The last train images of each class, `limit` in all, which `data.public_limit` keeps from the clients."""

    def public(folder: Path) -> tuple[Tensor, Tensor]:
        found = Parquet(dir=str(folder), train_limit=10, test_limit=10, public_limit=limit).load().public
        assert found is not None
        return found.x, found.y

    return public


FASHION = Recipe(
    FlowConfig(classes=CLASSES, shape=(1, 28, 28)),
    "public part of Fashion-MNIST",
    public_images,
    teacher_steps=1_600,
    teacher_rate=2e-3,
    average=0.995,
    flips=(),
    serve=1,
    pairs=8_000,
    student_steps=450,
    student_times=(0.0, 0.5),
    last_pairs=16_000,
    last_steps=900,
)
CIFAR10 = Recipe(
    FlowConfig(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        shape=(3, 32, 32),
        widths=(64, 128, 192),
    ),
    "public part of CIFAR-10: the last 1,000 train images of each class",
    of_parquet(10_000),
    teacher_steps=4_500,
    teacher_rate=1e-3,
    average=0.998,
    flips=(3,),
    serve=8,
)
EUROSAT = Recipe(
    FlowConfig(
        classes=(
            "AnnualCrop",
            "Forest",
            "HerbaceousVegetation",
            "Highway",
            "Industrial",
            "Pasture",
            "PermanentCrop",
            "Residential",
            "River",
            "SeaLake",
        ),
        shape=(3, 64, 64),
        patch=4,
        widths=(48, 96, 144),
        predicts="image",
    ),
    "public part of EuroSAT (RGB): 200 train images of each class",
    of_parquet(2_000),
    teacher_steps=2_000,
    teacher_rate=1e-3,
    average=0.998,
    flips=(2, 3),
    serve=8,
    t_mean=-0.8,  # as in arXiv 2511.13720, for networks that predict the image
)
RECIPES = {"fashion": FASHION, "cifar10": CIFAR10, "eurosat": EUROSAT}

Line = tuple[Tensor, Tensor, Tensor, Tensor]
"""Noise and image [B, C, H, W], t [B], labels [B]."""


def train(net: FlowNet, line: Callable[[], Line], steps: int, rate: float, decay: float, part: Path) -> FlowNet:
    """Minimises the squared error of the velocity along lines; returns the exponential average of the weights.

    `part` holds all there is to go on from, every 100 steps; its batches are drawn anew after a stop.
    """
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    first, total, start = 1, 0.0, time.process_time()
    if part.exists():
        first = go_on(part, net, average, optimizer) + 1
    for step in range(first, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / WARM_UP) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        z, x, t, labels = line()
        at = t[:, None, None, None]
        loss = (net((1 - at) * z + at * x, t, labels) - (x - z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step} loss {total / 50:.4f} cpu {time.process_time() - start:.0f} s", flush=True)
            total = 0.0
        if step % 100 == 0:
            write(part, pack(state(net, average, optimizer), {"step": str(step)}))
    part.unlink(missing_ok=True)
    assert isinstance(average.module, FlowNet)
    return average.module


def state(net: FlowNet, average: AveragedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that training goes on from."""
    moments = {
        f"optimizer {name} {kind}": value
        for name, parameter in net.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }
    modules = {"net": net, "average": average}
    weights = {f"{key} {name}": value for key, module in modules.items() for name, value in module.state_dict().items()}
    return {name: value.contiguous() for name, value in {**weights, **moments}.items()}


def go_on(part: Path, net: FlowNet, average: AveragedModel, optimizer: torch.optim.Optimizer) -> int:
    """Puts what `state` gave back in place; how many steps are done."""
    with safe_open(part, framework="pt") as file:
        step = int(file.metadata()["step"])
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    for key, module in {"net": net, "average": average}.items():
        module.load_state_dict({name: saved[f"{key} {name}"] for name in module.state_dict()})
    for name, parameter in net.named_parameters():
        head = f"optimizer {name} "
        optimizer.state[parameter] = {key.removeprefix(head): saved[key] for key in saved if key.startswith(head)}
    return step


def teach(recipe: Recipe, images: Tensor, labels: Tensor, part: Path) -> FlowNet:
    """The teacher, from images [N, C, H, W] uint8."""

    def line() -> Line:
        rows = torch.randint(len(images), (BATCH,))
        x = images[rows].float() / 127.5 - 1
        for axis in recipe.flips:
            x = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x.flip(axis), x)
        return torch.randn_like(x), x, (torch.randn(BATCH) + recipe.t_mean).sigmoid(), labels[rows]

    return train(FlowNet(recipe.config), line, recipe.teacher_steps, recipe.teacher_rate, recipe.average, part)


@torch.inference_mode()
def pairs(recipe: Recipe, teacher: FlowNet, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` pairs of noise and what the teacher makes of it, and the labels; classes in equal numbers."""
    start = time.process_time()
    z, labels = torch.randn(count, *recipe.config.shape), torch.arange(count) % len(recipe.config.classes)
    made = [euler(teacher, a, b, recipe.pair_steps) for a, b in zip(z.split(100), labels.split(100), strict=True)]
    print(f"{count} pairs, cpu {time.process_time() - start:.0f} s", flush=True)
    return z, torch.cat(made).clamp(-1, 1), labels


def straighten(recipe: Recipe, teacher: FlowNet, part: Path) -> FlowNet:
    """The student."""
    noise, images, labels = pairs(recipe, teacher, recipe.pairs)
    times = torch.tensor(recipe.student_times)

    def line() -> Line:
        rows = torch.randint(len(noise), (BATCH,))
        chosen = times[torch.randint(len(times), (BATCH,))]
        t = torch.where(torch.rand(BATCH) < 0.8, chosen, torch.rand(BATCH))
        return noise[rows], images[rows], t, labels[rows]

    student = FlowNet(recipe.config)
    student.load_state_dict(teacher.state_dict())
    return train(student, line, recipe.student_steps, recipe.student_rate, 0.995, part)


def one_step(recipe: Recipe, teacher: FlowNet, student: FlowNet, part: Path) -> FlowNet:
    """The student, trained on for a single step from noise to image."""
    noise, images, labels = pairs(recipe, teacher, recipe.last_pairs)

    def line() -> Line:
        rows = torch.randint(len(noise), (BATCH,))
        return noise[rows], images[rows], torch.zeros(BATCH), labels[rows]

    return train(student, line, recipe.last_steps, recipe.last_rate, 0.995, part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("folder", nargs="?", type=Path, default=ORIGINAL)
    for stage in ("teacher", "student", "out"):
        parser.add_argument(f"--{stage}", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amend", type=Path, help="only add to this file which images it was trained on")
    parser.add_argument("--steps", type=int, help="and the Euler steps to serve it with")
    args = parser.parse_args()
    recipe = RECIPES[args.name]
    if args.amend:
        amend(args.amend, recipe.public(args.folder)[0], args.steps)
        return
    teacher_path = args.teacher or Path(f"flow-{args.name}-teacher.safetensors")
    student_path = args.student or Path(f"flow-{args.name}-student.safetensors")
    out = args.out or BUNDLED / f"flow-{args.name}.safetensors"
    torch.set_num_threads(args.threads)
    if not teacher_path.exists():
        torch.manual_seed(0)
        trained = teach(recipe, *recipe.public(args.folder), teacher_path.with_suffix(".part"))
        save(trained, recipe.config, teacher_path, f"teacher; {recipe.source}; tools/train_flow.py")
    teacher = load(teacher_path)[0]
    if recipe.student_steps and not student_path.exists():
        torch.manual_seed(0)
        trained = straighten(recipe, teacher, student_path.with_suffix(".part"))
        save(trained, recipe.config, student_path, f"straightened; {recipe.source}; tools/train_flow.py")
    images = recipe.public(args.folder)[0]
    final, note = (load(student_path)[0], "straightened") if recipe.student_steps else (teacher, "teacher")
    if recipe.last_steps:
        torch.manual_seed(1)
        final = one_step(recipe, teacher, final, out.with_suffix(".part"))
        note = "straightened, one step"
    config = replace(recipe.config, steps=recipe.serve)
    save(final, config, out, f"{note}; {recipe.source}; tools/train_flow.py", images)


if __name__ == "__main__":
    main()
