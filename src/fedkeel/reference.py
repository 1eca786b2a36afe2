"""Networks that a method compares with: the client's own network under other weights, standing still.

They are in evaluation mode, without gradient, and leave no trace in the network that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.local import in_mode
from fedkeel.records import Local

BODY, HEAD = "features.", "head."


def present(local: Local) -> Tensor:
    """[T] all the network's weights and BatchNorm statistics as they are now, in the layout's order."""
    named = {**dict(local.model.named_parameters()), **dict(local.model.named_buffers())}
    flat = torch.empty(local.layout.total, device=local.device)
    with torch.no_grad():
        for entry in local.layout.entries:
            entry.view(flat).copy_(named[entry.name])
    return flat


@contextmanager
def replaced(local: Local, flat: Tensor) -> Iterator[None]:
    """Within this context the network has the weights and statistics `flat` ([T]); afterwards its own again."""
    own = present(local)
    _load(local, flat)
    try:
        yield
    finally:
        _load(local, own)


def received(local: Local) -> Tensor:
    """[T] the same as the client received them; what never leaves the client is as it was when this is first called in
    a round, so call it ahead of the first forward pass, which moves statistics."""
    if "received" not in local.scratch:
        flat, layout = present(local), local.layout
        flat[: layout.shared] = local.anchor
        flat[layout.trained : layout.trained + layout.buffers] = local.buffers
        local.scratch["received"] = flat
    return local.scratch["received"]


def features(local: Local, flat: Tensor, x: Tensor) -> Tensor:
    """[B, D] feature vectors of images `x` by the network of weights `flat` ([T])."""
    return _out(local.model.features, _part(local, flat, BODY), x)


def logits(local: Local, flat: Tensor, x: Tensor) -> Tensor:
    """[B, classes] logits of images `x` by the network of weights `flat` ([T]), its head on its features: what a method
    puts between the two is for the network that trains."""
    return _out(local.model.head, _part(local, flat, HEAD), features(local, flat, x))


@torch.no_grad()
def _load(local: Local, flat: Tensor) -> None:
    named = {**dict(local.model.named_parameters()), **dict(local.model.named_buffers())}
    for entry in local.layout.entries:
        named[entry.name].copy_(entry.view(flat))


def _part(local: Local, flat: Tensor, part: str) -> dict[str, Tensor]:
    return {e.name.removeprefix(part): e.view(flat) for e in local.layout.entries if e.name.startswith(part)}


def _out(module: nn.Module, named: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad(), in_mode(module, "eval"):
        out: Tensor = functional_call(module, named, (x,))
    return out
