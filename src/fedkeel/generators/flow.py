"""A small class-conditional rectified flow on patchified pixels: the generator that comes with fedkeel.

X. Liu, C. Gong and Q. Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
ICLR 2023 (arXiv 2209.03003). An image x is reached from noise z along dx/dt = v(x, t, class), t from 0 to 1. `FlowNet`
is v, a U-Net with adaptive group norm. The weights served were straightened once (the paper's reflow), so that one
Euler step suffices; `tools/train_flow.py` makes them from public images only, docs/generator-card.md says how good
they are.

The class is general: a weights file names its own classes, size and widths, and `bundled` serves whichever file in the
package knows the classes asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as pack
from torch import Tensor, nn
from torch.nn import functional as F

from fedkeel.errors import DataError, PoolError
from fedkeel.files import write
from fedkeel.generators.flow_tuning import Tuning, merged, tune
from fedkeel.generators.names import BUNDLED, beside, digest, knows, marks, match, plain_name
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.registry import register
from fedkeel.rng import isolated, stream_seed

MARKS = "trained_on"
"""The tensor of a weights file that holds the marks of the images it was trained on."""
NEAREST = 0.05
"""How near t = 1 the velocity is still worked out from a predicted image: there it is divided by 1 - t."""
CHUNK = 64
"""Images per pass through the network, always: short batches are padded, so that the batch size changes no image."""


@dataclass(frozen=True)
class FlowConfig:
    """What a weights file says about itself. shape: channels, height, width; patch: side of the square of pixels folded
    into channels before the first convolution; widths: channels per level, each half the size of the one before; steps:
    Euler steps that it is served with unless told otherwise; predicts: what comes out of the last convolution.

    With large patches it should be the image (T. Li and K. He, "Back to Basics: Let Denoising Generative Models
    Denoise", arXiv 2511.13720): a velocity has all of the noise in it, for which widths of no more channels than a
    patch has values leave no room, and what is lost stays in the picture as noise.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    patch: int = 2
    widths: tuple[int, ...] = (48, 96)
    condition: int = 128
    steps: int = 1
    predicts: Literal["velocity", "image"] = "velocity"


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the condition ([B, E]) scales and shifts what goes into the second (AdaGN)."""

    def __init__(self, inner: int, outer: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.adapt = nn.Linear(condition, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.adapt(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """Self-attention over all positions of [B, C, H, W], heads of 32 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm = nn.GroupNorm(8, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)
        out: Tensor = x + self.out(mixed)
        return out


class FlowNet(nn.Module):
    """The velocity v(x, t, class). x: [B, C, H, W], pixels in [-1, 1]; t: [B] in [0, 1]; labels: [B] int64."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        channels, widths, condition = config.shape[0] * config.patch**2, config.widths, config.condition
        self.patch, self.predicts = config.patch, config.predicts
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(0, 3, condition // 2) * 2, persistent=False)
        self.time = nn.Sequential(nn.Linear(condition, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.label = nn.Embedding(len(config.classes), condition)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ResBlock(w, w, condition) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.attention = Attention(widths[-1])
        self.middle = ResBlock(widths[-1], widths[-1], condition)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(ResBlock(w, w, condition) for w in widths[:-1])
        self.norm = nn.GroupNorm(8, widths[0])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        condition = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.label(labels))
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = []
        for i, block in enumerate(self.down):
            h = block(h, condition)
            if i < len(self.shrink):
                skips.append(h)
                h = self.shrink[i](h)
        h = self.middle(self.attention(h), condition)
        for i in reversed(range(len(self.up))):
            h = self.grow[i](F.interpolate(h, size=skips[i].shape[-2:]))
            h = self.up[i](h + skips[i], condition)
        out = F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.patch)
        if self.predicts == "velocity":
            return out
        return (out - x) / (1 - t).clamp(min=NEAREST)[:, None, None, None]


def euler(net: nn.Module, z: Tensor, labels: Tensor, steps: int) -> Tensor:
    """x(1) from x(0) = z by `steps` equal Euler steps. z: [B, C, H, W]."""
    x = z
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device, dtype=x.dtype)
        x = x + net(x, t, labels) / steps
    return x


class FlowSource:
    """A flow that is ready to make images; see `Source`.

    An image is decided by the seed, the class's name and the index: its noise comes from a stream of its own, drawn on
    the CPU, and every pass through the network holds CHUNK images.
    """

    def __init__(
        self,
        net: FlowNet,
        config: FlowConfig,
        weights: str,
        classes: tuple[str, ...],
        seed: int,
        steps: int,
        tuning: Tuning | None = None,
        trained_on: Tensor | None = None,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.classes, self.shape, self.seed, self.steps = classes, config.shape, seed, steps
        self.config, self.tuning, self.trained_on = config, tuning or Tuning(), trained_on
        self.weights = weights
        """SHA-256 hex of the weights file, and of what was tuned."""
        self._ids = match(classes, config.classes)
        self._names = [plain_name(name) for name in classes]

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8 on the CPU. Raises PoolError when the network returns something that is not a number."""
        asked = list(zip(labels, indices, strict=True))
        parts = [self._chunk(asked[i : i + CHUNK]) for i in range(0, len(asked), CHUNK)]
        return torch.cat(parts) if parts else torch.empty((0, *self.shape), dtype=torch.uint8)

    @torch.inference_mode()
    def _chunk(self, asked: list[tuple[int, int]]) -> Tensor:
        device = next(self.net.parameters()).device
        z, ids = torch.zeros(CHUNK, *self.shape), torch.zeros(CHUNK, dtype=torch.int64)
        for row, (label, index) in enumerate(asked):
            stream = torch.Generator().manual_seed(stream_seed(self.seed, "generate", self._names[label], index))
            z[row], ids[row] = torch.randn(self.shape, generator=stream), self._ids[label]
        x = euler(self.net, z.to(device), ids.to(device), self.steps)[: len(asked)].cpu()
        for row in (~x.isfinite().flatten(1).all(1)).nonzero()[:1, 0].tolist():
            label, index = asked[row]
            raise PoolError(
                f"the flow made no valid image {index} of class {self.classes[label]!r}: numbers are not finite"
            )
        return ((x + 1) * 127.5).round().clamp(0, 255).byte()

    def tune(
        self,
        samples: Samples,
        seed: int,
        keep: Path | None = None,
        budget: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> FlowSource | TunedFlow:
        """A source tuned on these images ([N, C, H, W] uint8, labels as `classes`); see `Tunable` and flow_tuning.

        It is served in more steps, and only if anything was learned: not with no steps done. Raises PoolError when
        `keep` holds an adapter of something else or the tuning comes to numbers that are not finite.
        """
        device, ids = next(self.net.parameters()).device, torch.tensor(self._ids)
        adapter = tune(
            self.net,
            self._made,
            samples.x.to(device).float() / 127.5 - 1,
            ids[samples.y].to(device),
            {number: plain_name(self.config.classes[number]) for number in self._ids},
            self.tuning,
            seed,
            recipe=self.recipe(samples, seed),
            keep=keep,
            budget=budget,
            progress=progress,
        )
        net, scale = copy.deepcopy(self.net), self.tuning.scale
        net.load_state_dict(merged(self.net.state_dict(), adapter, scale))
        parts = (part for name in sorted(adapter) for part in (name, adapter[name].cpu().numpy().tobytes()))
        weights = digest(self.weights, *parts, str(scale))
        learned = scale > 0 and any(bool(part.any()) for name, part in adapter.items() if not name.endswith(".a"))
        steps = self.tuning.serve if learned else self.steps
        tuned = FlowSource(net, self.config, weights, self.classes, self.seed, steps, self.tuning, self.trained_on)
        owned = frozenset(samples.y.tolist())
        return tuned if scale == 0 or self.tuning.missing == "tuned" else TunedFlow(tuned, self, owned)

    def recipe(self, samples: Samples, seed: int) -> str:
        """See `Tunable`. The steps and the classes are those of replay."""
        how = repr(replace(self.tuning, scale=1.0, serve=1, missing="tuned"))
        images = (part.contiguous().numpy().tobytes() for part in (samples.x, samples.y))
        return digest("tuned flow", self.weights, self.steps, *self._names, how, *images, seed)

    @torch.inference_mode()
    def _made(self, z: Tensor, ids: Tensor) -> Tensor:
        parts = zip(torch.split(z, CHUNK), torch.split(ids, CHUNK), strict=True)
        return torch.cat([euler(self.net, a, b, self.steps) for a, b in parts]).clamp(-1, 1)

    def prompt(self, label: int) -> str:
        """It takes only the class number."""
        return ""

    def memory_bytes(self) -> dict[str, int]:
        """The network's weights."""
        return {"network": sum(p.numel() * p.element_size() for p in self.net.parameters())}

    def fingerprint(self) -> str:
        """Over the weights, the classes in their order, seed and steps."""
        return digest("flow", self.weights, *self.classes, self.seed, self.steps)


class TunedFlow:
    """A tuned flow for the classes that the client has images of, and the flow as it was for the others."""

    def __init__(self, tuned: FlowSource, untuned: FlowSource, owned: frozenset[int]) -> None:
        self.tuned, self.untuned, self.owned = tuned, untuned, owned
        self.classes, self.shape = tuned.classes, tuned.shape

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8 on the CPU."""
        out = torch.empty((len(labels), *self.shape), dtype=torch.uint8)
        for source, here in ((self.tuned, True), (self.untuned, False)):
            rows = [row for row, label in enumerate(labels) if (label in self.owned) == here]
            out[rows] = source.generate([labels[row] for row in rows], [indices[row] for row in rows])
        return out

    def prompt(self, label: int) -> str:
        """It takes only the class number."""
        return ""

    def memory_bytes(self) -> dict[str, int]:
        """Both networks' weights; all clients share the untuned one."""
        return {**self.tuned.memory_bytes(), "untuned network": self.untuned.memory_bytes()["network"]}

    def fingerprint(self) -> str:
        """Over both, and which classes are whose."""
        return digest("tuned flow", self.tuned.fingerprint(), self.untuned.fingerprint(), *sorted(self.owned))


@register("generators", "bundled")
@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A rectified flow trained by this project on public images that its data sets leave out; no download."""

    seed: int = option(0, "another seed, other images", ge=0)
    steps: int | None = option(
        None, "Euler steps per image; absent: as many as the weights were trained for", ge=1, le=64, keyed=1
    )
    path: str = option("", "a weights file of your own, from tools/train_flow.py; empty = one from the package")
    tune_mode: Literal["full", "lora"] = option(
        "full",
        "what tuning on a client's images changes: every weight, or each layer by a matrix of low rank",
        keyed=None,
    )
    tune_steps: int = option(Tuning.steps, "steps of tuning", ge=0, keyed=None)
    tune_lr: float = option(
        Tuning.lr, "learning rate of tuning (Adam; annealed to 0)", gt=0, grid=(2e-4, 5e-4, 1e-3, 2e-3), keyed=None
    )
    tune_batch: int = option(Tuning.batch, "images in a batch of tuning, half of them replay", ge=2, keyed=None)
    tune_rank: int = option(
        Tuning.rank, 'rank of the change, for tune_mode = "lora"', ge=1, grid=(4, 8, 16), keyed=None
    )
    tune_scale: float = option(
        Tuning.scale, "how much of what was tuned is added; 0 = the generator as it was (R-07)", ge=0, le=2, keyed=None
    )
    tune_replay: int = option(
        Tuning.replay,
        "classes of which the client has fewer images are topped up to as many with the generator's own while it is "
        "tuned, so that they are not forgotten; 0 = none",
        ge=0,
        keyed=None,
    )
    tune_missing: Literal["untuned", "tuned"] = option(
        "untuned",
        "what makes the classes that the client has no image of: the generator as it was, or as tuned",
        keyed=None,
    )
    tune_serve: int = option(
        Tuning.serve,
        "Euler steps per image of a tuned generator: tuning bends the lines that made few enough",
        ge=1,
        le=64,
        keyed=None,
    )

    def load(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        device: torch.device,
        public: Samples | None = None,
    ) -> FlowSource:
        """The flow that knows these classes (by name) at this size; it was trained already and ignores `public`.

        Raises PoolError, naming what there is, when none does; DataError when a weights file is missing or damaged.
        """
        paths = [Path(self.path).expanduser()] if self.path else sorted(BUNDLED.glob("flow-*.safetensors"))
        known = []
        for path in paths:
            config = read_config(path)
            if config.shape == shape and knows(classes, config.classes):
                net, config, weights = load(path)
                steps, images = self.steps or config.steps, trained_on(path)
                return FlowSource(
                    net.to(device), config, weights, classes, self.seed, steps, self.tuning, trained_on=images
                )
            c, h, w = config.shape
            known.append(f"{path.stem} ({h}x{w}x{c}: {', '.join(config.classes)})")
        c, h, w = shape
        raise PoolError(
            f"generator 'bundled' cannot make {h}x{w}x{c} images of {', '.join(classes)}; it has {'; '.join(known)}"
        )

    @property
    def tunes_missing(self) -> bool:
        """Whether classes that the client has no image of are tuned too."""
        return self.tune_missing == "tuned"

    @property
    def tuning(self) -> Tuning:
        """How its sources are tuned."""
        return Tuning(**{item.name: getattr(self, f"tune_{item.name}") for item in fields(Tuning)})


def save(net: FlowNet, config: FlowConfig, path: Path, note: str, images: Tensor | None = None) -> None:
    """The weights in half precision; config and note (the recipe) go into the file's metadata.

    images: [N, C, H, W] uint8, those it was trained on: their marks go into the file, so that a run in which clients
    hold some of them can say so.
    """
    tensors = {name: value.half().contiguous() for name, value in net.state_dict().items()}
    if images is not None:
        tensors[MARKS] = marks(images)
    write(path, pack(tensors, {"config": json.dumps(asdict(config)), "note": note}))


def amend(path: Path, images: Tensor | None = None, steps: int | None = None) -> None:
    """Adds to a weights file what `save` was not told: the images trained on ([N, C, H, W] uint8), the steps to serve.

    The weights stay; the file's SHA-256, and with it the fingerprint, does not.
    """
    config = read_config(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    if images is not None:
        tensors[MARKS] = marks(images)
    if steps is not None:
        config = replace(config, steps=steps)
    write(path, pack(tensors, {**note, "config": json.dumps(asdict(config))}))


def trained_on(path: Path) -> Tensor | None:
    """[N] int64 marks of the images that a flow was trained on; None where its file does not say.

    Of the flow for `fashion` the package holds them beside the data.
    """
    with safe_open(path, framework="pt") as file:
        if MARKS in file.keys():  # noqa: SIM118 - it is no dict
            found: Tensor = file.get_tensor(MARKS)
            return found
    return beside(path)


def read_config(path: Path) -> FlowConfig:
    """What the file can make. Raises DataError when it is missing or no flow."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["config"])
        c, h, w = values["shape"]
        return FlowConfig(
            tuple(values["classes"]),
            (c, h, w),
            values["patch"],
            tuple(values["widths"]),
            values["condition"],
            values.get("steps", 1),
            values.get("predicts", "velocity"),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a weights file of a flow ({type(error).__name__}: {error})") from error


def load(path: Path) -> tuple[FlowNet, FlowConfig, str]:
    """The network in float32 on the CPU, its config, and the SHA-256 hex of the file."""
    config = read_config(path)
    with isolated(torch.Generator()):  # its first weights, thrown away at once, are drawn at random
        net = FlowNet(config)
    try:
        net.load_state_dict({name: value.float() for name, value in load_file(path).items() if name != MARKS})
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: the weights are damaged: {error}") from error
    return net, config, hashlib.sha256(path.read_bytes()).hexdigest()
