"""Tensors within records, as something else: for records that travel between processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A tensor as bytes, in every type without a change of a bit. off_cpu: whether it was on a GPU."""

    bytes: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: str
    shape: tuple[int, ...]
    off_cpu: bool

    @staticmethod
    def of(tensor: Tensor) -> Box:
        """No copy of a tensor that is contiguous and on the CPU."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Box(flat(tensor).numpy(), dtype, tuple(tensor.shape), tensor.device.type != "cpu")

    def tensor(self, device: torch.device, copy: bool = True, everything: bool = False) -> Tensor:
        """The same bits: a copy, that may be written to, unless `copy` is false. On `device` when it was on a GPU, or
        when `everything` goes there."""
        dtype, to_device = getattr(torch, self.dtype), self.off_cpu or everything
        if self.bytes.size == 0:
            return torch.empty(self.shape, dtype=dtype, device=device if to_device else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of memory that must not be written to
            content = torch.from_numpy(self.bytes.copy() if copy else self.bytes)
        tensor = content.view(dtype).reshape(self.shape)
        return tensor.to(device) if to_device else tensor


def flat(tensor: Tensor) -> Tensor:
    """[n] uint8: its bytes, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def boxed(thing: Any) -> Any:
    """The same record, mapping or sequence with boxes for tensors."""
    return mapped(thing, Tensor, Box.of)


def unboxed(thing: Any, device: torch.device, copy: bool = True, everything: bool = False) -> Any:
    """The reverse of `boxed`."""
    return mapped(thing, Box, lambda box: box.tensor(device, copy, everything))


def weighed(thing: Any) -> int:
    """Bytes of the tensors in a record, mapping or sequence, boxed or not."""
    if isinstance(thing, Tensor):
        return thing.nbytes
    if isinstance(thing, Box):
        return thing.bytes.nbytes
    if isinstance(thing, dict):
        return sum(map(weighed, thing.values()))
    if isinstance(thing, (list, tuple)):
        return sum(map(weighed, thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return sum(weighed(getattr(thing, item.name)) for item in fields(thing))
    return 0


def mapped(thing: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """The same record, mapping or sequence with `change(each)` for each `kind` in it."""
    if isinstance(thing, kind):
        return change(thing)
    if isinstance(thing, Mapping):
        return {key: mapped(value, kind, change) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(mapped(value, kind, change) for value in thing)
    if is_dataclass(thing) and not isinstance(thing, (type, Box)):
        names = [item.name for item in fields(thing) if item.init]
        return replace(thing, **{name: mapped(getattr(thing, name), kind, change) for name in names})
    return thing
