"""Tuning a flow on a client's own images.

It is trained as flows are from the start, on lines between any noise and any image of a class, all along the lines (X.
Liu et al., arXiv 2209.03003). That bends lines that were straightened so that one step is enough: after tuning more
steps are served, eight unless told otherwise. A way to keep one step, pairing each real image with the nearest of
several that the flow makes (K. Li and J. Malik, arXiv 1809.09087), blurred: with 500 images of all classes of `fashion`
a small CNN trained on generated images alone came to 0.724 after it, to 0.767 before, to 0.779 after what is done here
(two seeds of the CNN, about 0.015 apart).

A client mostly owns few classes, and a class that it does not train on is forgotten. Against that there is, first,
replay: classes with fewer than `replay` images of the client's are topped up with images of the flow as it was; they
make half of each batch. It is not enough: with 300 images of three classes of `fashion`, tested class by class as
above, the three rose by up to 0.11, the other seven fell by as much. So, second, classes that the client has no image
of are made by the flow as it was (`missing = "untuned"`): then the three rose from 0.708 to 0.737 and the others stayed
(0.787, 0.786). The look of a client's images is then not carried over to classes that it lacks. Beside the client's 300
real images the tuned ones were worth no more than the untuned ones there (0.774, 0.777): client and generator have the
same kind of images.

What is trained is either every weight ("full") or, for each convolution and linear layer, a change of low rank (E. Hu
et al., "LoRA", arXiv 2106.09685). It is kept as the change itself, in half precision; `scale` times that is added.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.errors import PoolError
from fedkeel.files import write
from fedkeel.rng import stream_seed

EVERY = 20
"""Steps between two savings of a tuning under way."""
WARM_UP = 10

Adapter = dict[str, Tensor]
"""What is trained, by name: changes of weights, or their two factors `<weight>.a` and `<weight>.b`."""
Make = Callable[[Tensor, Tensor], Tensor]
"""Images [N, C, H, W] in [-1, 1] from noise [N, C, H, W] and class numbers [N]."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tuning:
    """How a flow is tuned; see the options of the generator `bundled`."""

    mode: Literal["full", "lora"] = "full"
    steps: int = 150
    lr: float = 2e-4
    batch: int = 32
    rank: int = 8
    scale: float = 1.0
    replay: int = 64
    serve: int = 8
    missing: Literal["untuned", "tuned"] = "untuned"


def tune(
    net: nn.Module,
    make: Make,
    images: Tensor,
    labels: Tensor,
    classes: Mapping[int, str],
    tuning: Tuning,
    seed: int,
    *,
    recipe: str,
    keep: Path | None = None,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """The adapter of `net` for real images [N, C, H, W] in [-1, 1] of class numbers labels [N].

    make: images of the flow as it is. classes: names by number, of all classes that must not be forgotten. recipe: what
    decides the result, to know one's own files by. keep, budget, progress: see `Tunable`.
    """
    if len(images) == 0:
        raise PoolError("there are no images to tune on")
    began, device = time.perf_counter(), images.device
    done = None if keep is None else finished(keep.with_name(f"{keep.name}.safetensors"), recipe, budget)
    if done is not None:
        return {name: tensor.to(device) for name, tensor in done[0].items()}
    base = {name: value.detach() for name, value in net.state_dict().items()}
    adapter = fresh(net, tuning, seed)
    optimizer = torch.optim.Adam(adapter.values(), lr=tuning.lr, betas=(0.9, 0.99))
    part = None if keep is None else keep.with_name(f"{keep.name}.part.safetensors")
    under_way = None if part is None else read(part, recipe)
    step, spent = (0, 0.0) if under_way is None else _go_on(*under_way, adapter, optimizer)
    own = len(images)

    def note() -> dict[str, str]:
        seconds = spent + time.perf_counter() - began
        return {"recipe": recipe, "steps": str(step), "of": str(tuning.steps), "seconds": str(seconds)}

    images, labels = with_replay(make, images, labels, classes, tuning.replay, seed)
    while step < tuning.steps and (budget is None or spent + time.perf_counter() - began < budget):
        optimizer.param_groups[0]["lr"] = (
            tuning.lr * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / tuning.steps)) / 2
        )
        rng = torch.Generator().manual_seed(stream_seed(seed, "tune", "batch", step))
        rows = _rows(own, len(images) - own, tuning.batch, rng).to(device)
        x, t = images[rows], torch.rand(len(rows), generator=rng).to(device)
        z, at = torch.randn(x.shape, generator=rng).to(x), t[:, None, None, None]
        velocity = functional_call(net, merged(base, adapter, 1.0), ((1 - at) * z + at * x, t, labels[rows]))
        loss = (velocity - (x - z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.values(), 1.0)
        optimizer.step()
        step += 1
        if part is not None and step % EVERY == 0 and step < tuning.steps:
            write(part, save(_state(adapter, optimizer), note()))
        if progress is not None:
            progress(step, tuning.steps)
    if step < tuning.steps:
        warnings.warn(stopped(step, tuning.steps, budget), stacklevel=2)
    out = {name: tensor.detach().half() for name, tensor in adapter.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in out.values()):
        raise PoolError(f"tuning came to numbers that are not finite; lower generator.tune_lr = {tuning.lr:g}")
    if keep is not None and part is not None:
        if step < tuning.steps:  # to go on from when there is more time
            write(part, save(_state(adapter, optimizer), note()))
        write(keep.with_name(f"{keep.name}.safetensors"), save(_plain(out), note()))
        if step == tuning.steps:
            part.unlink(missing_ok=True)
    return out


def fresh(net: nn.Module, tuning: Tuning, seed: int) -> Adapter:
    """The adapter before the first step: no change."""
    weights = dict(net.named_parameters())
    if tuning.mode == "full":
        return {name: torch.zeros_like(weight).requires_grad_() for name, weight in weights.items()}
    out: Adapter = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach()
            outer, inner = weight.shape[0], weight[0].numel()
            rank = min(tuning.rank, outer, inner)
            rng = torch.Generator().manual_seed(stream_seed(seed, "tune", "rank", name))
            first = torch.randn(rank, inner, generator=rng) / math.sqrt(inner)
            out[f"{name}.weight.a"] = first.to(weight).requires_grad_()
            out[f"{name}.weight.b"] = weight.new_zeros(outer, rank).requires_grad_()
    return out


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights with `scale` times the change added; at 0 they are the base's, bit for bit."""
    out = dict(base)
    if scale == 0:
        return out
    for name, value in adapter.items():
        if name.endswith(".b"):
            continue
        low = name.endswith(".a")
        name = name.removesuffix(".a")
        change = adapter[f"{name}.b"].float() @ value.float() if low else value.float()
        out[name] = base[name] + scale * change.view_as(base[name])
    return out


@torch.no_grad()
def with_replay(
    make: Make, images: Tensor, labels: Tensor, classes: Mapping[int, str], least: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Images and labels, and after them made ones of each class with fewer than `least`."""
    parts = [(images, labels)]
    for number, name in classes.items():
        count = least - int((labels == number).sum())
        if count > 0:
            rng = torch.Generator().manual_seed(stream_seed(seed, "tune", "replay", name))
            ids = torch.full((count,), number, device=labels.device)
            parts.append((make(torch.randn(count, *images.shape[1:], generator=rng).to(images), ids), ids))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _rows(own: int, replay: int, batch: int, rng: torch.Generator) -> Tensor:
    """[batch] rows of `with_replay`: half of them the client's own, or all where there is no replay."""
    made = batch // 2 if replay else 0
    return torch.cat(
        [
            torch.randint(own, (batch - made,), generator=rng),
            own + torch.randint(max(replay, 1), (made,), generator=rng),
        ]
    )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _state(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All there is to go on from."""
    moments = {
        f"{kind} {name}": optimizer.state[value][kind]
        for name, value in adapter.items()
        for kind in ("exp_avg", "exp_avg_sq", "step")
        if kind in optimizer.state[value]  # before the first step there are none
    }
    return _plain({**adapter, **moments})


def _go_on(
    state: Mapping[str, Tensor], note: Mapping[str, str], adapter: Adapter, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Puts a saved state in place; how many steps are done and how many seconds they took."""
    for name, value in adapter.items():
        value.data.copy_(state[name])
        if f"step {name}" in state:
            moments = {kind: state[f"{kind} {name}"] for kind in ("exp_avg", "exp_avg_sq", "step")}
            optimizer.state[value] = {kind: m if kind == "step" else m.to(value) for kind, m in moments.items()}
    return int(note["steps"]), float(note["seconds"])


def stopped(steps: int, of: int, budget: float | None) -> str:
    """What is said of a tuning that was not finished."""
    nothing = "" if steps else "; nothing was learned"
    return f"tuning stopped after {steps} of {of} steps: its {budget:g} s are over{nothing}"


def finished(path: Path, recipe: str, budget: float | None) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """As `read`, but None also for a tuning that was stopped when there is more time now than it took."""
    found = read(path, recipe)
    if found is None:
        return None
    steps, of = int(found[1]["steps"]), int(found[1]["of"])
    if steps < of:
        if budget is None or budget > float(found[1]["seconds"]):
            return None
        warnings.warn(stopped(steps, of, budget), stacklevel=3)
    return found


def read(path: Path, recipe: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and note of a file; None when there is none, or a damaged one, which is said and made again.

    Raises PoolError for what another generator, client or set of options has left there.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            note = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError, RuntimeError) as error:
        warnings.warn(f"{path} is damaged ({error}): the tuning begins again", stacklevel=3)
        return None
    if note.get("recipe") != recipe:
        raise PoolError(f"{path} was tuned from another generator, with other options or images: remove it")
    return tensors, note
