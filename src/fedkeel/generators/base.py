"""What a generator is: labels and image indices in, uint8 images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedkeel.records import Samples


class Source(Protocol):
    """A generator that is loaded and ready to make images of one data set's classes.

    An image is determined by (fingerprint, class, index): the noise of each image comes from its own stream
    `stream_seed(seed, "generate", class, index)`, so the batch size changes no image.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Channels, height and width of what it makes."""

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8: image number indices[i] of class labels[i]."""
        ...

    def prompt(self, label: int) -> str:
        """What the generator is asked for ("" where it takes only the class number)."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes really held, by component."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 hex over all that decides an image: weights, prompts, seed, steps, guidance, size, precision."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A source that can learn from a client's own images; how is among the options of its generator."""

    def tune(
        self,
        samples: Samples,
        seed: int,
        keep: Path | None = None,
        budget: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Source:
        """A new source; this one stays as it is.

        keep: a path without suffix. When finished, what was learned lies in `<keep>.safetensors`, which is read instead
        of learning it again; `<keep>.part.safetensors` is there while the tuning is under way, for a killed one to go
        on from. Without it nothing is kept. budget: seconds this may take, those before a kill counted; what is learned
        by then is kept and used, with a warning each time, and gone on from when the budget is longer than it took. The
        file's metadata say so: "steps" (done), "of" (wanted), "seconds". progress: called with steps done and in all.

        The fingerprint is that of the generator and of what was learned; with a scale of 0 the images are the untuned
        ones. Raises PoolError when `keep` holds something else, StorageError for a full disk.
        """
        ...

    def recipe(self, samples: Samples, seed: int) -> str:
        """SHA-256 hex over what decides the result of a tuning with all its steps, and nothing else: weights, images,
        seed, how it is tuned; not how images are made of it. Two tunings with one recipe may share `keep`."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A source that knows which images it was trained on: [N] int64 `names.marks`, None where it does not."""

    trained_on: Tensor | None


@runtime_checkable
class Finite(Protocol):
    """A source of images that are there, not made: image number i of a class is number i modulo how many there are,
    where it begins again at all."""

    def available(self, label: int) -> int:
        """How many images of a class there are."""
        ...


@runtime_checkable
class Worded(Protocol):
    """A source whose prompts have phrases in them."""

    def origin(self) -> dict[str, str]:
        """Where the phrases come from: "table", "source" and "departure", as `prompts.origin` gives them."""
        ...


class Generator(Protocol):
    """The options of a generator: a registered frozen dataclass (room "generators").

    One whose tuning leaves classes that the client has no image of as they are says so by `tunes_missing = False`.
    """

    def load(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        device: torch.device,
        public: Samples | None = None,
    ) -> Source:
        """A ready source for these classes and this image size (channels, height, width).

        public: images that no client has (section [data], `public_limit`), for a generator that learns from such.
        Raises PoolError or DataError when the generator cannot serve them, naming what it can.
        """
        ...
