"""Real public images in place of a generator: the honest control.

Whoever trains a generator on public images could hand out the images themselves. A generator is worth its name where it
does better than that, or where there may be no such hand-out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.data.pictures import stratified
from fedkeel.errors import ConfigError, PoolError
from fedkeel.generators.names import digest
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.registry import register


class PublicSource:
    """Public images as a `Source`. images: per class [N, C, H, W] uint8, at least one."""

    def __init__(self, images: list[Tensor], classes: tuple[str, ...], repeat: bool) -> None:
        c, h, w = images[0].shape[1:]
        self.images, self.classes, self.repeat = images, classes, repeat
        self.shape: tuple[int, int, int] = (int(c), int(h), int(w))

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8. Raises PoolError when a class has too few images."""
        out = torch.empty((len(labels), *self.shape), dtype=torch.uint8)
        for row, (label, index) in enumerate(zip(labels, indices, strict=True)):
            there = len(self.images[label])
            if index >= there and not self.repeat:
                raise PoolError(
                    f"class {self.classes[label]!r}: public image {index + 1} is wanted, there are {there}; raise "
                    f"data.public_limit, or set generator.repeat = true"
                )
            out[row] = self.images[label][index % there]
        return out

    def available(self, label: int) -> int:
        """How many images of a class there are."""
        return len(self.images[label])

    def prompt(self, label: int) -> str:
        """Nothing is asked for."""
        return ""

    def memory_bytes(self) -> dict[str, int]:
        """The images."""
        return {"images": sum(each.numel() for each in self.images)}

    def fingerprint(self) -> str:
        """Over the images, the classes in their order and the option."""
        return digest("public", *(x.numpy().tobytes() for x in self.images), *self.classes, str(self.repeat))


@register("generators", "public")
@dataclass(frozen=True, kw_only=True)
class Public:
    """The real public images that data.public_limit sets aside, as they are: the honest control of every generator."""

    limit: int | None = option(
        None, "only this many of them, in the class proportions, the first of each class; absent: all", ge=1
    )
    repeat: bool = option(False, "begin again when all images of a class are used, instead of an error")

    def load(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        device: torch.device,
        public: Samples | None = None,
    ) -> PublicSource:
        """The public images. Raises ConfigError when there are none, PoolError for a class without any."""
        if public is None:
            raise ConfigError(
                "data.public_limit", 0, "generator 'public' needs public images: say how many train images to set aside"
            )
        chosen = public.take(torch.from_numpy(stratified(public.y.numpy(), self.limit)))
        images = [chosen.x[chosen.y == label] for label in range(len(classes))]
        empty = [name for name, each in zip(classes, images, strict=True) if len(each) == 0]
        if empty:
            raise PoolError(f"generator 'public': no images of {', '.join(empty)}; raise data.public_limit or limit")
        return PublicSource(images, classes, self.repeat)
