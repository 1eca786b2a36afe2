"""Feature vectors in two dimensions: t-SNE pictures of what a local update does, of real and synthetic images, and of
what class offsets do to these.

Yao: Recovering Global Data Distribution Locally in Federated Learning. 2024, arXiv 2409.14063, Figs. 4 and 6. Li, Xu et
al.: Federated Balanced Learning. 2026, arXiv 2601.14042, Fig. 4a. The
projection is scikit-learn's (van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 9, 2008), with a seed of
its own and started from the first two principal components. A picture proves little, so each comes with numbers taken
in the features themselves: the silhouette of held and of missing classes for Fig. 4, the squared MMD to the real images
for Fig. 6 (generators/quality.py says which), the distance of class means for Fig. 4a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.errors import DataError
from fedkeel.generators.quality import features, mmd2
from fedkeel.local import in_mode
from fedkeel.models.split import Split
from fedkeel.report.finished import Finished
from fedkeel.report.plots import INK, heading, paper, shorten, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 10
"""Classes in a picture: more colours cannot be told apart."""
COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933",
           "#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777")  # Tol's muted  # fmt: skip
DEEP = 50
"""Principal components that t-SNE looks at."""
SEED = 0
"""Of t-SNE."""
Encode = Callable[[Tensor], Tensor]
"""uint8 images [N, C, H, W] to features [N, D] on the CPU."""


@dataclass(frozen=True)
class Cloud:
    """Points of one panel. places: [N, 2]. labels: [N] classes. kinds: [N] positions in `names`. scores: what was
    measured in the features, by name; None where there is too little to measure with."""

    title: str
    places: NDArray[np.float64]
    labels: NDArray[np.int64]
    kinds: NDArray[np.int64]
    names: tuple[str, ...]
    scores: Mapping[str, float | None]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        arrays = {"places": self.places.round(4), "labels": self.labels, "kinds": self.kinds}
        return {
            "title": self.title,
            "names": list(self.names),
            "scores": dict(self.scores),
            **{name: array.tolist() for name, array in arrays.items()},
        }


def tsne(x: Tensor) -> NDArray[np.float64]:
    """[N, 2] places for features x [N, D], always the same ones. Raises DataError for fewer than 5 or equal ones."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(x) < 5:
        raise DataError(f"t-SNE needs at least 5 images, there are {len(x)}")
    points = x.double().numpy()
    points = points - points.mean(0)
    spread = float(np.sqrt((points**2).mean()))
    if spread < 1e-9:
        raise DataError("t-SNE: the features of all images are the same")
    points = points / spread
    if points.shape[1] > DEEP and len(points) > DEEP:
        points = PCA(DEEP, svd_solver="full").fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    start = "pca" if points.shape[1] > 1 else "random"
    found = TSNE(2, perplexity=perplexity, init=start, random_state=SEED, n_jobs=1).fit_transform(points)
    return np.asarray(found, np.float64)


def silhouette(x: Tensor, labels: Tensor) -> Tensor:
    """[N] how much nearer each sample is to its own class than to the next one, in [-1, 1]; NaN with one class only."""
    from sklearn.metrics import silhouette_samples

    if not 2 <= len(set(labels.tolist())) < len(labels):
        return torch.full((len(labels),), torch.nan)
    return torch.from_numpy(np.asarray(silhouette_samples(x.double().numpy(), labels.numpy()), np.float64))


def chosen(held: Tensor, most: int = MOST) -> list[int]:
    """Classes to show, ascending: all, or when they are too many the largest that the client holds and the first that
    it misses, half and half where there are enough of both. held: [C]."""
    order = torch.argsort(held, descending=True, stable=True).tolist()
    mine, missing = [c for c in order if held[c] > 0], [c for c in order if held[c] == 0]
    ours = max(most - len(missing), min(len(mine), -(-most // 2)))
    return sorted(mine[:ours] + missing[: most - min(ours, len(mine))])


def update_clouds(run: Finished, client: int, each: int = 40) -> tuple[Cloud, Cloud]:
    """Test images, `each` of every class shown, in the features of the network before and after a local update (Fig.
    4). Scores: mean silhouette of held and of missing classes."""
    held = run.held(client)
    rows = torch.cat([torch.nonzero(run.job.data.test_y == c)[:each, 0] for c in chosen(held)])
    images, labels = run.job.data.test_x[rows], run.job.data.test_y[rows]
    missing = held[labels] == 0
    seen: list[Tensor] = []
    run.update(client, lambda model: seen.append(encoder(run, model)(images)))
    clouds = []
    for what, x in zip(("before", "after"), seen, strict=True):
        apart = silhouette(x, labels)
        scores = {f"silhouette/{name}": _mean(apart[rows]) for name, rows in (("held", ~missing), ("missing", missing))}
        clouds.append(
            Cloud(
                f"{run.title}: client {client}\n{what} a local update",
                tsne(x),
                labels.numpy(),
                missing.long().numpy(),
                ("held", "missing"),
                scores,
            )
        )
    return clouds[0], clouds[1]


def image_cloud(title: str, groups: Mapping[str, tuple[Tensor, Tensor]], encode: Encode) -> Cloud:
    """Real images and those of each generator in one space (Fig. 6).

    groups: images [n, C, H, W] and labels [n] by name, the real ones first. Scores: squared MMD of each other group to
    the real ones, in features divided by the root mean square of the real ones'.
    """
    x = [encode(images) for images, _ in groups.values()]
    scale = x[0].square().mean().sqrt().clamp(min=1e-12)
    names = tuple(groups)
    scores = {
        f"mmd2/{name}": mmd2(x[0] / scale, part / scale) if min(len(x[0]), len(part)) > 1 else None
        for name, part in zip(names[1:], x[1:], strict=True)
    }
    kinds = np.repeat(np.arange(len(names)), [len(part) for part in x])
    labels = torch.cat([labels for _, labels in groups.values()]).numpy()
    return Cloud(title, tsne(torch.cat(x)), labels, kinds, names, scores)


ALIGNED = 3
"""Classes in a picture of offsets."""


def aligned_cloud(run: Finished, client: int, each: int = 40) -> tuple[Cloud, dict[int, tuple[float, float]]]:
    """A client's real images of classes that it fills, its synthetic ones, and these with their class's offset, in the
    features of the network after a local update (FBL, Fig. 4a); and `distances` of each class, whose means are the
    scores.

    Shown are the ALIGNED classes of which the client has most of both, at least two. Raises DataError for a method
    without offsets, and where there is no such class.
    """
    job = run.job
    counts = torch.minimum(run.held(client), job.plan.fake[client])
    labels = [c for c in torch.argsort(counts, descending=True, stable=True)[:ALIGNED].tolist() if counts[c] > 1]
    if not labels:
        raise DataError(f"client {client} has no two real and two synthetic images of one class")
    own = job.samples(client)
    rows = torch.cat([torch.nonzero(own.y == c)[:each, 0] for c in sorted(labels)])
    wanted = torch.zeros_like(counts)
    wanted[labels] = job.plan.fake[client][labels].clamp(max=each)
    made = job.images(client, wanted, 0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def measure(model: Split) -> None:
        offset = getattr(model, "offset", None)
        if offset is None:
            raise DataError(f"{run.label} has no class offsets")
        encode = encoder(run, model)
        seen.append((encode(own.x[rows]), encode(made.x), offset.weight.detach().cpu()[made.y].clone()))

    run.update(client, measure)
    real, fake, shift = seen[-1]
    apart = distances(real, own.y[rows], fake, made.y, shift)
    names = ("real", "synthetic", "with offset")
    means = np.mean(list(apart.values()), axis=0)
    kinds = np.repeat(np.arange(3), [len(real), len(fake), len(fake)])
    cloud = Cloud(
        f"{run.title}: client {client}\nafter a local update",
        tsne(torch.cat([real, fake, fake + shift])),
        torch.cat([own.y[rows], made.y, made.y]).numpy(),
        kinds,
        names,
        {f"distance/{name}": float(mean) for name, mean in zip(names[1:], means, strict=True)},
    )
    return cloud, apart


def distances(
    real: Tensor, real_y: Tensor, fake: Tensor, fake_y: Tensor, shift: Tensor
) -> dict[int, tuple[float, float]]:
    """By class, the Euclidean distance of the mean of its synthetic features to that of its real ones, without and with
    their offsets, over the root mean square length of the real ones. real: [m, D]; fake, shift: [n, D]."""
    scale = real.square().sum(1).mean().sqrt().clamp(min=1e-12)
    out = {}
    for c in sorted(set(real_y.tolist()) & set(fake_y.tolist())):
        here, there = real_y == c, fake_y == c
        gap = real[here].mean(0) - fake[there].mean(0)
        out[c] = (float(gap.norm() / scale), float((gap - shift[there].mean(0)).norm() / scale))
    return out


def encoder(run: Finished, model: Split) -> Encode:
    """The feature vectors that the head of this network sees, in evaluation mode."""

    def encode(images: Tensor) -> Tensor:
        with in_mode(model, "eval"):
            return features(run.job, model, images).clone()

    return encode


def draw(clouds: Sequence[Cloud], classes: Sequence[str], across: int = 1) -> Figure:
    """A panel for each cloud, `across` beside one another: colours for classes, marks for kinds, scores below."""
    from matplotlib.lines import Line2D

    deep = -(-len(clouds) // across)
    figure, each = paper(4.3 * across + 1.7, 4.3 * deep, deep, across)
    shown = sorted({int(label) for cloud in clouds for label in cloud.labels})
    face = {label: COLOURS[at % len(COLOURS)] for at, label in enumerate(shown)}
    for axes, cloud in zip(each, clouds, strict=False):
        for kind in range(len(cloud.names)):
            for label in shown:
                here = (cloud.kinds == kind) & (cloud.labels == label)
                if here.any():
                    axes.plot(*cloud.places[here].T, ls="", **_mark(kind, face[label]))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.margins(0.04)
        heading(axes, cloud.title)
        axes.title.set_fontsize(9.5)
        axes.set_xlabel(_said(cloud), fontsize=8.5)
    for axes in each[len(clouds) :]:
        axes.set_axis_off()
    kinds = clouds[0].names
    handles = [Line2D([], [], ls="", label=name, **_mark(kind, INK)) for kind, name in enumerate(kinds)]
    handles += [Line2D([], [], ls="", marker="s", ms=7, color=face[c], label=words(shorten(classes[c]))) for c in shown]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _mark(kind: int, face: str) -> dict[str, Any]:
    """Real or held: discs; the next kinds: crosses and open triangles."""
    marks: tuple[dict[str, Any], ...] = (
        {"marker": "o", "ms": 4.5, "mew": 0, "alpha": 0.85},
        {"marker": "x", "ms": 5, "mew": 1.2},
        {"marker": "^", "ms": 5.5, "mew": 1.1, "mfc": "none"},
    )
    return {"color": face, "mfc": face, "mec": face, **marks[kind]}


def _said(cloud: Cloud) -> str:
    """The scores in a line."""
    shown = [f"{name.partition('/')[2]} {value:.2f}" for name, value in cloud.scores.items() if value is not None]
    heads = {"silhouette": "Silhouette", "mmd2": "MMD² to real", "distance": "Distance of class means to real"}
    room = next(iter(cloud.scores), "").partition("/")[0]
    return f"{heads[room]}: {', '.join(shown)}" if shown else ""


def _mean(values: Tensor) -> float | None:
    there = values[~values.isnan()]
    return float(there.mean()) if len(there) else None
