"""Flat weights: all tensors of a model live in one contiguous float32 vector with named views.

Equations are then written on whole vectors, as the papers do, and run as a handful of fused operations. The vector of a
client is laid out as

    [ shared parameters | own parameters | shared buffers | own buffers ]

where "own" is what never leaves the client (the method's `personal`). Integer buffers ("counters", such as BatchNorm's
`num_batches_tracked`) are beside it, own ones apart from those that travel. Convolution kernels are stored
channels_last, which convolutions and pooling on a CPU run fastest in; a view by name has the usual shape either way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedkeel.errors import ConfigError, RunError

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Rule:
    """How the SGD loop treats a parameter that is not like the others (see `treat`).

    lr: factor on the client's learning rate. decay: whether weight decay applies. rows: a row (first dimension) without
    gradient in a step does not move, neither by momentum nor by decay. still: it never moves, as the model has it
    without `requires_grad`; it crosses with the others.
    """

    lr: float = 1.0
    decay: bool = True
    rows: bool = False
    still: bool = False


def treat(module: nn.Module, name: str, rule: Rule) -> None:
    """Puts the parameter `name` of `module` under a rule of its own."""
    vars(module._parameters[name])["rule"] = rule


@dataclass(frozen=True)
class Entry:
    """One named tensor of the vector, at [start, start + size). `kind` is the type of the module that owns it."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    trained: bool
    own: bool
    kind: str
    rule: Rule

    def view(self, flat: Tensor, offset: int = 0) -> Tensor:
        """This tensor as a view into a vector whose element 0 is element `offset` of the full one."""
        part = flat[self.start - offset : self.start - offset + self.size]
        if len(self.shape) == 4:
            out, inside, height, width = self.shape
            return part.view(out, height, width, inside).permute(0, 3, 1, 2)
        return part.view(self.shape)

    def flat(self, value: Tensor) -> Tensor:
        """[size] the elements of a tensor of this shape as they stand in the vector: the way back from `view`."""
        return (value.permute(0, 2, 3, 1) if len(self.shape) == 4 else value).reshape(-1)


class Layout:
    """Names, shapes and places of a model's tensors; equal models have equal layouts, whatever machine they are on."""

    def __init__(self, model: nn.Module, personal: Predicate | None = None) -> None:
        """`personal(name, module)` says which parameters and buffers stay on the client, module being their owner."""
        owner = {
            f"{path}.{leaf}" if path else leaf: module
            for path, module in model.named_modules()
            for leaf in (*module._parameters, *module._buffers)
        }
        personal = personal or (lambda name, module: False)
        tensors: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {
            (trained, own): [] for trained in (True, False) for own in (False, True)
        }
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise ConfigError("model", str(parameter.dtype), f"parameter {name} must be float32")
            tensors[True, personal(name, owner[name])].append((name, parameter))
        self.counters: tuple[str, ...] = ()
        self.own_counters: tuple[str, ...] = ()
        for name, buffer in model.named_buffers():
            if buffer.is_complex() or (buffer.is_floating_point() and buffer.dtype != torch.float32):
                raise ConfigError("model", str(buffer.dtype), f"buffer {name} must be float32 or of whole numbers")
            if buffer.is_floating_point():
                tensors[False, personal(name, owner[name])].append((name, buffer))
            elif personal(name, owner[name]):
                self.own_counters += (name,)
            else:
                self.counters += (name,)
        entries, start, sizes = [], 0, []
        for (trained, own), group in tensors.items():
            begin = start
            for name, tensor in group:
                rule = getattr(tensor, "rule", Rule())
                if trained and not tensor.requires_grad:
                    rule = replace(rule, still=True)
                kind = type(owner[name]).__name__
                entries.append(Entry(name, tuple(tensor.shape), start, tensor.numel(), trained, own, kind, rule))
                start += tensor.numel()
            sizes.append(start - begin)
        self.entries = tuple(entries)
        self.shared, self.own, self.buffers, self.own_buffers = sizes
        self.trained = self.shared + self.own
        self.total = start
        self.by_name = {entry.name: entry for entry in entries}

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views by name into a full vector ([total]) or into one of its leading parts ([shared] or [trained])."""
        return {entry.name: entry.view(flat) for entry in self.entries if entry.start + entry.size <= len(flat)}

    def mask(self, model: nn.Module, where: Predicate) -> Tensor:
        """[shared] bool: true for the elements of parameters for which `where(name, owning module)` holds."""
        owner = dict(model.named_modules())
        mask = torch.zeros(self.shared, dtype=torch.bool)
        for entry in self.entries:
            if entry.trained and not entry.own:
                mask[entry.start : entry.start + entry.size] = where(entry.name, owner[entry.name.rpartition(".")[0]])
        return mask

    def spans(self) -> list[tuple[slice, Rule, int]]:
        """Runs of neighbouring parameters that move, under one rule, with their rows (1 unless it goes by rows)."""
        spans: list[tuple[slice, Rule, int]] = []
        for entry in self.entries:
            if not entry.trained:
                break
            if entry.rule.still:
                continue
            stop, last = entry.start + entry.size, spans[-1] if spans else (slice(0, 0), None, 1)
            if last[1] == entry.rule and not entry.rule.rows and last[0].stop == entry.start != self.shared:
                spans[-1] = (slice(spans[-1][0].start, stop), entry.rule, 1)
            else:
                spans.append((slice(entry.start, stop), entry.rule, entry.shape[0] if entry.rule.rows else 1))
        return spans

    def variance_pairs(self) -> list[tuple[slice, slice]]:
        """(mean, variance) slices into the shared-buffer vector, for every layer that keeps both."""
        pairs = []
        for entry in self.entries:
            twin = self.by_name.get(entry.name.replace("running_var", "running_mean"))
            if entry.name.endswith("running_var") and twin is not None and not entry.own:
                mean, var = twin.start - self.trained, entry.start - self.trained
                pairs.append((slice(mean, mean + twin.size), slice(var, var + entry.size)))
        return pairs

    def key(self) -> str:
        """SHA-256 over names, shapes and places: two vectors may be combined only when their layouts' keys agree."""
        text = "\n".join(f"{e.name} {e.shape} {e.start} {e.trained} {e.own}" for e in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()


class Weights:
    """A model whose parameters, gradients and floating-point buffers are views into two vectors, `flat` and `grad`."""

    def __init__(self, model: nn.Module, personal: Predicate | None = None) -> None:
        """Moves the model's tensors into fresh vectors on the model's device; values stay as they are."""
        self.model = model
        self.layout = layout = Layout(model, personal)
        device = next(model.parameters()).device
        self.flat = torch.empty(layout.total, device=device)
        self.grad = torch.zeros(layout.trained, device=device)
        parameters = dict(model.named_parameters())
        for entry in layout.entries:
            view = entry.view(self.flat)
            if entry.trained:
                parameter = parameters[entry.name]
                view.copy_(parameter.data)
                parameter.data = view
                parameter.grad = entry.view(self.grad)
            else:
                path, _, leaf = entry.name.rpartition(".")
                module = model.get_submodule(path)
                buffer = module._buffers[leaf]
                assert buffer is not None
                view.copy_(buffer)
                module._buffers[leaf] = view
        named = dict(model.named_buffers())
        self._counters = {name: named[name] for name in layout.counters}
        self._own_counters = {name: named[name] for name in layout.own_counters}
        own = slice(layout.shared, layout.trained)
        own_buffers = slice(layout.trained + layout.buffers, layout.total)
        self.params = self.flat[: layout.shared]
        """[shared]: live view of what clients share."""
        self.buffers = self.flat[layout.trained : layout.trained + layout.buffers]
        """[buffers]: live view of the shared floating-point buffers."""
        self._own = (self.flat[own], self.flat[own_buffers])

    @property
    def own(self) -> Tensor:
        """[own + own_buffers]: a copy of what never leaves the client."""
        return torch.cat(self._own)

    @own.setter
    def own(self, values: Tensor) -> None:
        self._own[0].copy_(values[: self.layout.own])
        self._own[1].copy_(values[self.layout.own :])

    @property
    def counters(self) -> dict[str, Tensor]:
        """Copies of the integer buffers that are shared."""
        return {name: tensor.clone() for name, tensor in self._counters.items()}

    @counters.setter
    def counters(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._counters.items():
            tensor.copy_(values[name])

    @property
    def own_counters(self) -> dict[str, Tensor]:
        """Copies of the integer buffers that never leave the client."""
        return {name: tensor.clone() for name, tensor in self._own_counters.items()}

    @own_counters.setter
    def own_counters(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._own_counters.items():
            tensor.copy_(values[name])

    def load(self, params: Tensor, buffers: Tensor, counters: Mapping[str, Tensor]) -> None:
        """Copies the shared part in."""
        self.params.copy_(params)
        self.buffers.copy_(buffers)
        self.counters = counters

    def apart(self, tensor: Tensor) -> Tensor:
        """The same numbers in memory of their own, where they are a view of this model, which trains on."""
        mine = {each.untyped_storage().data_ptr() for each in (self.flat, self.grad)}
        return tensor.clone() if tensor.untyped_storage().data_ptr() in mine else tensor

    def all_apart(self, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`apart` for each."""
        return {name: self.apart(tensor) for name, tensor in table.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name in the usual memory order, on the CPU, for writing to disk."""
        named = {**self.layout.named(self.flat), **self._counters, **self._own_counters}
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of a floating-point tensor are finite."""
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN passes through; isfinite takes 20 times


class Statistics:
    """The average of clients' BatchNorm statistics by the weights of their updates, taken as they arrive.

    bn_var: as in [local]: of variances the mean, or ("pooled") the variance that the samples of all have together.
    """

    def __init__(self, layout: Layout | None, bn_var: str) -> None:
        self._layout, self._pooled = layout, bn_var == "pooled"
        self._sum: tuple[Tensor, Tensor] | None = None
        self._total = 0.0

    def add(self, buffers: Tensor, weight: float) -> None:
        """One client's, [B]; [0] where none crossed."""
        if len(buffers):
            parts = (buffers * weight, buffers**2 * weight)
            self._sum = parts if self._sum is None else (self._sum[0] + parts[0], self._sum[1] + parts[1])
            self._total += weight

    def average(self) -> Tensor | None:
        """[B]; None when no client sent any."""
        if self._sum is None or self._total == 0:
            return None
        average, square = (part / self._total for part in self._sum)
        if self._pooled:
            assert self._layout is not None
            for means, variances in self._layout.variance_pairs():
                # sum p (v + m^2) - (sum p m)^2
                average[variances] += square[means] - average[means] ** 2
        return average


def mean(terms: Iterable[tuple[float, tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
    """The means of `mean_and_total`."""
    return mean_and_total(terms)[0]


def mean_and_total(terms: Iterable[tuple[float, tuple[Tensor, ...]]]) -> tuple[tuple[Tensor, ...], float]:
    """Weighted means of several tensors in one pass, sum(w v) / sum(w), in the order given; and sum(w).

    One pass, so that updates can be added as they arrive and memory does not grow with their number.
    Raises RunError when there is nothing to average.
    """
    sums: list[Tensor] = []
    total = 0.0
    for weight, values in terms:
        total += weight
        if not sums:
            sums = [value * weight for value in values]
        else:
            for kept, value in zip(sums, values, strict=True):
                kept.add_(value, alpha=weight)
    if not sums or total <= 0:
        raise RunError("nothing to average: there is no update, or the weights of all are zero")
    return tuple(kept.div_(total) for kept in sums), total
