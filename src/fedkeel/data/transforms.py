"""From stored uint8 images to what the network sees: augmentation and normalisation of a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkeel.data.noise import gaussian
from fedkeel.options import option


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The `[augment]` section."""

    crop: int = option(0, "random crop after padding with this many zero pixels on each side; 0 = off", ge=0, off=0)
    flip: bool = option(False, "horizontal flip of every second image")
    synthetic: bool = option(False, "augment synthetic images like real ones")


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Random crop, flip, noise and normalisation.

    mean, std: [C] in [0, 1] pixel units. crop: zero pixels of padding on each side (black, as it comes before
    normalisation). fresh_noise: standard deviation of Gaussian noise in [0, 1] units, drawn anew for each batch and
    added before the crop, rounded to 256 levels as noise drawn once is. augment_synthetic: crop and flip all rows,
    not only those marked.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 0
    flip: bool = False
    augment_synthetic: bool = False
    fresh_noise: float = 0.0

    @property
    def random(self) -> bool:
        """Whether anything is drawn in training."""
        return bool(self.crop or self.flip or self.fresh_noise)

    def __call__(
        self,
        x: Tensor,
        *,
        rng: torch.Generator | None,
        augment: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """x: [B, C, H, W] uint8. Returns [B, C, H, W] float32 on `device`, in channels_last memory format.

        rng: a CPU generator; None = evaluation, nothing random. augment: [B] bool, the rows to augment, that is the
        real ones; None = all. As many numbers are drawn for a row whether it is augmented or not, and whichever of
        crop, flip and noise are on, so none of these changes what another row or step gets.
        """
        x = x.to(device, non_blocking=True)
        if rng is not None and self.random:
            x = self._augmented(x, rng, augment)
        out = x.to(torch.float32)
        mean, std = scale(self.mean, self.std, out.device)
        # the format is changed last: broadcasting over channels is several times slower in channels_last
        return out.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def _augmented(self, x: Tensor, rng: torch.Generator, augment: Tensor | None) -> Tensor:
        b = len(x)
        draws = torch.rand(3, b, generator=rng, dtype=torch.float64)
        noise_seed = int(torch.randint(2**62, (), generator=rng))
        marked = torch.ones(b, dtype=torch.bool) if augment is None else augment.cpu()
        if self.fresh_noise > 0:
            noisy = gaussian(x, self.fresh_noise, torch.Generator().manual_seed(noise_seed))
            x = torch.where(marked.to(x.device)[:, None, None, None], noisy, x)
        if not (self.crop or self.flip):
            return x
        on = torch.ones_like(marked) if self.augment_synthetic else marked
        # a row that is not augmented is cropped from the middle, which is the image itself
        shift = torch.where(on, (draws[:2] * (2 * self.crop + 1)).long(), self.crop)
        mirrored = on & (draws[2] < 0.5) & self.flip
        return _cropped(x, shift.to(x.device), mirrored.to(x.device), self.crop)


@lru_cache(maxsize=16)
def scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as [1, C, 1, 1] in units of 255 levels."""
    both = torch.tensor([mean, std], device=device)[:, None, :, None, None] * 255
    return both[0], both[1]


def _cropped(x: Tensor, shift: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """One gather: pixel (i, j) comes from padded (i + shift[0], j + shift[1]), columns reversed where mirrored."""
    b, c, h, w = x.shape
    padded = F.pad(x, (padding,) * 4)
    columns = torch.arange(w, device=x.device).expand(b, w)
    columns = torch.where(mirrored[:, None], w - 1 - columns, columns) + shift[1][:, None]
    rows = torch.arange(h, device=x.device) + shift[0][:, None]
    places = rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]
    return padded.flatten(2).gather(2, places.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)
