"""One seed, many named streams of randomness.

Every random draw of a run comes from `Streams(seed)("purpose", ...)`. Streams of different names are independent, so
switching one thing off (augmentation, the drop, a metric) changes no other draw, and identities between methods hold
bit for bit. Nothing in fedkeel reads a global generator; networks that do (Dropout) see one of their own in each round
of each client.

Purposes in use: init, build, partition, clients, profile, personal, batch, augment, noise, select, drop, offset, pool,
layers and what single methods add. Generators draw one stream per (seed, class, index) of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *ids: int | str) -> int:
    """A 63-bit number that depends on every argument and nothing else (SHA-256, so the same on every machine).

    PyTorch's generator on the CPU takes its lower 32 bits only: among 100,000 of its streams one pair is expected to
    be the same. NumPy's takes all.
    """
    text = "\x1f".join(str(part) for part in (seed, purpose, *ids))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Streams:
    """The named streams of one seed; `at` binds leading ids, for example the round and the client."""

    seed: int
    bound: tuple[int | str, ...] = ()

    def __call__(self, purpose: str, *ids: int | str) -> torch.Generator:
        """A fresh CPU generator. Draws are made on the CPU, so that a GPU run draws the same numbers."""
        generator = torch.Generator()
        generator.manual_seed(stream_seed(self.seed, purpose, *self.bound, *ids))
        return generator

    def numpy(self, purpose: str, *ids: int | str) -> np.random.Generator:
        """The same for NumPy; another stream than the torch one of that name."""
        return np.random.default_rng(stream_seed(self.seed, purpose, *self.bound, *ids))

    def at(self, *ids: int | str) -> Streams:
        """These streams with more ids bound."""
        return Streams(self.seed, (*self.bound, *ids))


@contextmanager
def isolated(generator: torch.Generator) -> Iterator[None]:
    """For code of others that draws from the global generators (constructors of layers, Dropout): it sees ones seeded
    by `generator`, and the global states, also those of GPUs in use, are as before afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if used else ()
    with torch.random.fork_rng(devices=list(devices)):
        # not torch.manual_seed: for kinds of accelerators that are not in use it keeps the seed for later, with the
        # place of the call, which takes ten times as long
        torch.default_generator.manual_seed(seed)
        if used:
            torch.cuda.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        yield
