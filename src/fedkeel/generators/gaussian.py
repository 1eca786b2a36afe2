"""A normal distribution per class over pixels, along its leading principal components: the control for every generator.

Fitted in a second. On Fashion-MNIST it fills almost as well as a diffusion model, so a claim that a generator's quality
matters has to beat it. An image is mean + z @ basis with z normal; row r of `basis` is the r-th component times its
standard deviation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor

from fedkeel.errors import DataError, PoolError
from fedkeel.files import write
from fedkeel.generators.names import BUNDLED, beside, digest, knows, match, plain_name
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.registry import register
from fedkeel.rng import stream_seed

RANK, PRIOR = 100, 50


@dataclass(frozen=True)
class Fitted:
    """The parameters. mean: [classes, C * H * W]; basis: [classes, rank, C * H * W]; in grey levels, half precision."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: Tensor
    basis: Tensor

    def save(self, path: Path) -> None:
        """As one safetensors file, for the option `path`."""
        note = {"classes": json.dumps(self.classes), "shape": json.dumps(self.shape)}
        write(path, pack({"mean": self.mean, "basis": self.basis}, note))


def fit(samples: Samples, classes: tuple[str, ...], rank: int = RANK) -> Fitted:
    """Mean and leading components per class. Raises PoolError for a class with fewer than two images."""
    parts = []
    for label, name in enumerate(classes):
        x = samples.x[samples.y == label]
        if len(x) < 2:
            raise PoolError(f"a Gaussian needs two images of each class; {name!r} has {len(x)}")
        parts.append(components(x, rank))
    _, c, h, w = samples.x.shape
    return Fitted(classes, (c, h, w), torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))


def components(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and basis [rank, D] of images [N, C, H, W]; components beyond N - 1 are zero."""
    rows = x.flatten(1).double()
    mean = rows.mean(0)
    rows = rows - mean
    n, d = rows.shape
    # the eigenvectors of the smaller of the two products give the same components
    if d <= n:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        axes = vectors.T
    else:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        axes = torch.nn.functional.normalize(vectors.T @ rows)
    keep = min(rank, n - 1, d)
    basis = torch.zeros(rank, d, dtype=torch.float64)
    basis[:keep] = (axes * (values.clamp(min=0) / max(n - 1, 1)).sqrt()[:, None]).flip(0)[:keep]
    return mean.half(), basis.half()


def blend(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
    """Mean [D] and leading components [rank, D] of a mixture of two Gaussians, `share` of it the other."""
    (mean, basis), (mean2, basis2) = ((m.double(), b.double()) for m, b in (one, other))
    apart = math.sqrt(share * (1 - share)) * (mean2 - mean)
    rows = torch.cat([math.sqrt(1 - share) * basis, math.sqrt(share) * basis2, apart[None]])
    _, vectors = torch.linalg.eigh(rows @ rows.T)  # the covariance is rows' rows; this has the same spectrum
    leading = (vectors.T @ rows).flip(0)[: len(basis)]
    return ((1 - share) * mean + share * mean2).half(), leading.half()


class GaussianSource:
    """Fitted Gaussians ready to draw from; see `Source`. Always on the CPU, one image at a time."""

    def __init__(
        self,
        fitted: Fitted,
        classes: tuple[str, ...],
        seed: int,
        prior: int = PRIOR,
        scale: float = 1.0,
        trained_on: Tensor | None = None,
    ) -> None:
        self.classes, self.shape, self.seed = classes, fitted.shape, seed
        self.prior, self.scale, self.trained_on = prior, scale, trained_on
        rows = match(classes, fitted.classes)
        self.mean, self.basis = fitted.mean[rows], fitted.basis[rows]
        self._names = [plain_name(name) for name in classes]

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8."""
        out = torch.empty(len(labels), self.mean.shape[1])
        ready = {label: (self.mean[label].float(), self.basis[label].float()) for label in set(labels)}
        for row, (label, index) in enumerate(zip(labels, indices, strict=True)):
            mean, basis = ready[label]
            stream = torch.Generator().manual_seed(stream_seed(self.seed, "generate", self._names[label], index))
            out[row] = mean + torch.randn(len(basis), generator=stream) @ basis
        return out.round().clamp(0, 255).byte().reshape(-1, *self.shape)

    def tune(
        self,
        samples: Samples,
        seed: int,
        keep: Path | None = None,
        budget: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> GaussianSource:
        """Each class the client owns n images of becomes a blend of this Gaussian and theirs, n / (n + `prior`) of it
        theirs, `scale` times; the others stay. It takes no draws and, as it takes a moment, keeps nothing; see
        `Tunable`."""
        mean, basis = self.mean.clone(), self.basis.clone()
        owned = [label for label in range(len(self.classes)) if bool((samples.y == label).any())]
        for done, label in enumerate(owned if self.scale > 0 else (), 1):
            x = samples.x[samples.y == label]
            share = self.scale * len(x) / (len(x) + self.prior)
            mean[label], basis[label] = blend((mean[label], basis[label]), components(x, basis.shape[1]), share)
            if progress is not None:
                progress(done, len(owned))
        return GaussianSource(Fitted(self.classes, self.shape, mean, basis), self.classes, self.seed)

    def recipe(self, samples: Samples, seed: int) -> str:
        """See `Tunable`."""
        images = (part.contiguous().numpy().tobytes() for part in (samples.x, samples.y))
        return digest("tuned gaussian", self.fingerprint(), self.prior, *images)

    def prompt(self, label: int) -> str:
        """It takes only the class number."""
        return ""

    def memory_bytes(self) -> dict[str, int]:
        """Means and components."""
        return {"parameters": 2 * (self.mean.numel() + self.basis.numel())}

    def fingerprint(self) -> str:
        """Over the parameters, the classes in their order and the seed."""
        numbers = (part.numpy().tobytes() for part in (self.mean, self.basis))
        return digest("gaussian", *numbers, *self.shape, *self.classes, self.seed)


@register("generators", "gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """One Gaussian per class over the pixels of public images: the control that any generator has to beat."""

    tunes_missing: ClassVar[bool] = False
    seed: int = option(0, "another seed, other images", ge=0)
    path: str = option(
        "", "a file saved by fedkeel.generators.gaussian; empty = one from the package, else fitted to public images"
    )
    tune_prior: int = option(
        PRIOR, "a client's images of a class at which tuning goes half of the way to them", ge=1, keyed=None
    )
    tune_scale: float = option(1.0, "how far tuning goes; 0 = not at all", ge=0, le=1, keyed=None)

    def load(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        device: torch.device,
        public: Samples | None = None,
    ) -> GaussianSource:
        """The Gaussians of these classes (by name), or those fitted to the public images.

        Raises PoolError, naming what there is, when there are neither.
        """
        paths = [Path(self.path).expanduser()] if self.path else sorted(BUNDLED.glob("gaussian-*"))
        fitted = {path: read(path) for path in paths}
        how = (self.seed, self.tune_prior, self.tune_scale)
        for path, one in fitted.items():
            if one.shape == shape and knows(classes, one.classes):
                return GaussianSource(one, classes, *how, trained_on=beside(path))
        if public is not None and not self.path:
            return GaussianSource(fit(public, classes), classes, *how)
        sizes = [
            f"{'x'.join(map(str, (*one.shape[1:], one.shape[0])))}: {', '.join(one.classes)}" for one in fitted.values()
        ]
        c, h, w = shape
        raise PoolError(
            f"generator 'gaussian' cannot make {h}x{w}x{c} images of {', '.join(classes)}; it has {'; '.join(sizes)}; "
            f"set data.public_limit to have it fitted to train images set aside"
        )


def read(path: Path) -> Fitted:
    """A saved fit. Raises DataError when the file is missing or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata()
            c, h, w = json.loads(note["shape"])
            classes = tuple(json.loads(note["classes"]))
            return Fitted(classes, (c, h, w), file.get_tensor("mean"), file.get_tensor("basis"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds no fitted Gaussians: {error}") from error
