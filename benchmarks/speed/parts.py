"""Where a round of fedkeel goes: CPU seconds by part, and passes through the network.

A profiler that follows every call makes short steps look longer than they are, so only the few functions that the parts
of a round begin in are timed, each without what it calls of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

PARTS = {
    "batches and transform": ("fedkeel.local", "batches"),
    "forward and loss": ("fedkeel.algorithms.base", "Algorithm.loss"),
    "backward": ("torch", "Tensor.backward"),
    "correction": ("fedkeel.algorithms.base", "Algorithm.correct"),
    "step": ("fedkeel.local", "step"),
    "rest of the client": ("fedkeel.local", "Worker.fit"),
    "receiving the model": ("fedkeel.local", "Worker.open"),
    "checking the update": ("fedkeel.local", "not_finite"),
    "aggregation": ("fedkeel.algorithms.base", "Algorithm.aggregate"),
    "evaluation": ("fedkeel.job", "Job.evaluate"),
}
"""The part, and the function that does it; what is in none of them is the rest."""


class Clock:
    """CPU seconds by part; while an inner part runs the outer one stands still."""

    def __init__(self) -> None:
        self.seconds = {"rest": 0.0}
        self._open, self._since = ["rest"], time.process_time()

    def enter(self, part: str) -> None:
        self._turn()
        self._open.append(part)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        now, part = time.process_time(), self._open[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def around(self, part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed; of a generator each of its steps is."""

        def timed(*args: Any, **named: Any) -> Any:
            self.enter(part)
            try:
                found = inner(*args, **named)
            finally:
                self.leave()
            return self._each(part, found) if isinstance(found, Iterator) else found

        return timed

    def _each(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.enter(part)
            try:
                item = next(items, self)
            finally:
                self.leave()
            if item is self:
                return
            yield item


@contextmanager
def seconds() -> Iterator[dict[str, float]]:
    """CPU seconds by part of what runs inside. Parts that the library no longer has are left out."""
    clock, undo, found = Clock(), [], {}
    for part, (module, path) in PARTS.items():
        owner: Any = import_module(module)
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        if (inner := getattr(owner, name, None)) is not None:
            setattr(owner, name, clock.around(part, inner))
            undo.append((owner, name, inner))
    try:
        yield found
    finally:
        clock._turn()
        for owner, name, inner in undo:
            setattr(owner, name, inner)
        found |= {part: round(value, 5) for part, value in clock.seconds.items()}


@contextmanager
def passes(features: nn.Module) -> Iterator[dict[str, int]]:
    """Images that go forward through the body of the network inside, and those whose gradient comes back through it;
    `evaluated`: the forward ones in inference mode."""
    found = {"forward": 0, "backward": 0, "evaluated": 0}

    def forth(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["evaluated" if torch.is_inference_mode_enabled() else "forward"] += len(output)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(back)

    def back(grad: Tensor) -> None:
        found["backward"] += len(grad)

    hook = features.register_forward_hook(forth)
    try:
        yield found
    finally:
        hook.remove()
