"""How good a generator's images are, class by class, seen through a classifier of the run's own kind.

A small classifier (the run's [model]) is trained on the train images that the clients hold together, which only a
simulation can do. It answers four questions about the images of each class. Are they of their class: its accuracy on
them. Are they distributed like real ones: the kernel inception distance of M. Binkowski et al., "Demystifying MMD
GANs", ICLR 2018 (arXiv 1801.01401), on the classifier's features instead of Inception's. Are they copies: the distance
to the nearest train image. Do they differ: the mean distance of two of them. A second classifier, trained on nothing
but the synthetic images, says what they teach (the classification accuracy score of S. Ravuri and O. Vinyals,
NeurIPS 2019, arXiv 1905.10887). docs/generator-quality.md says how each number is computed and why the limits are what
they are.

Real images to compare with are the test images: the classifier has seen the train images, and its features of those
lie closer together than those of any new image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.evaluate import evaluate
from fedkeel.generators.base import Source
from fedkeel.generators.store import Pool
from fedkeel.models.split import Split
from fedkeel.rng import Streams, isolated

if TYPE_CHECKING:
    from fedkeel.job import Job

Stages = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is."""
BLOCKS = 5
"""Parts of the images from which the standard error of a KID is estimated."""
NEIGHBOURS = 10
"""Train images beyond the nearest that its distance is compared with."""
SHOWN = 12
"""Images of a class on the contact sheet, and pairs on the sheet of the closest, at most."""
CHUNK = 500
"""Images in a pass through the classifier, and rows in a block of distances."""


@dataclass(frozen=True)
class Recipe:
    """How each classifier is trained: Adam, learning rate annealed to 0 along a cosine, the run's own augmentation."""

    steps: int = 600
    batch: int = 64
    lr: float = 1e-3


@dataclass(frozen=True)
class Limits:
    """What a class's images must keep to.

    accuracy: least share of the classifier's accuracy on real images of the class. kid: most, as a multiple of the KID
    between real images of the class and of the class most like it. diversity: least mean distance of two images, as a
    share of that of real ones. copies: largest share that nearly repeat a train image. repeats: largest share that are
    equal to an earlier image of the class. quantile, apart: an image nearly repeats a train image when it is nearer to
    it than this share of the class's test images are to theirs, and nearer than this share of its mean distance to the
    train images that come next (N. Carlini et al., "Extracting Training Data from Diffusion Models", USENIX Security
    2023, arXiv 2301.13188, for the second).

    A KID counts less two standard errors and a share of copies less two of its own (but those equal pixel by pixel
    count in full), so that a class does not fail by chance.
    """

    accuracy: float = 0.5
    kid: float = 1.0
    diversity: float = 0.5
    copies: float = 0.01
    repeats: float = 0.01
    quantile: float = 0.01
    apart: float = 0.5


@dataclass(frozen=True)
class ClassQuality:
    """One class. Shares in [0, 1]; None where there is nothing to measure with.

    images: synthetic ones. accuracy, accuracy_real: of the reference classifier on synthetic and on test images. cas,
    cas_real: accuracy on test images of classifiers trained on the synthetic images, and on as many real ones. kid,
    kid_error: distance to the test images and its standard error. kid_other, other: the smallest distance between test
    images of this and of another class, and its name. copies: share that nearly repeat a train image; exact: how many
    are equal to one, pixel by pixel. public: share that nearly repeat an image of data.public. diversity: mean distance
    of two images by that of two test images. repeats: share equal to an earlier one. failed: for each rule that they
    broke, how.
    """

    name: str
    prompt: str
    images: int
    accuracy: float | None = None
    accuracy_real: float | None = None
    cas: float | None = None
    cas_real: float | None = None
    kid: float | None = None
    kid_error: float | None = None
    kid_other: float | None = None
    other: str = ""
    copies: float | None = None
    exact: int = 0
    public: float | None = None
    diversity: float | None = None
    repeats: float | None = None
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A synthetic image and the train image nearest to it. distance: by the limit below which an image counts as near.
    fake, real: [C, H, W] uint8."""

    label: int
    index: int
    distance: float
    copy: bool
    exact: bool
    fake: Tensor
    real: Tensor


@dataclass(frozen=True)
class Quality:
    """All classes, the whole, and what the sheets show.

    reference, cas, cas_real: accuracy on all test images of classifiers trained on all train images, on the synthetic
    ones, and on as many real ones as there are synthetic. accuracy: of the first on all synthetic images. trained_on:
    images that each of the three was trained on. real, fake: per class [n, C, H, W] uint8, n <= SHOWN. pairs: the
    closest, the worst first.
    """

    classes: tuple[ClassQuality, ...]
    reference: float
    accuracy: float
    cas: float
    cas_real: float
    trained_on: tuple[int, int, int]
    recipe: Recipe
    limits: Limits
    fingerprint: str
    real: tuple[Tensor, ...]
    fake: tuple[Tensor, ...]
    pairs: tuple[Pair, ...]

    @property
    def failed(self) -> list[ClassQuality]:
        """The classes whose images break a rule."""
        return [each for each in self.classes if each.failed]


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def inspect(
    job: Job,
    each: int = 100,
    recipe: Recipe | None = None,
    limits: Limits | None = None,
    source: Source | None = None,
    progress: Stages = _silent,
) -> Quality:
    """The quality of the run's generator, or of `source` (that of one client, say), on `each` images of every class.

    Images number 0 to each - 1 are taken from the generator's pool, where a run finds them again. A class that the
    generator cannot make is reported as failed; when it can make none, its PoolError is raised. Raises ConfigError when
    the configuration names no generator, DataError without test images.
    """
    recipe, limits = recipe or Recipe(), limits or Limits()
    source = job.source if source is None else source
    data, streams = job.data, job.streams.at("inspect")
    if len(data.test_y) == 0:
        raise DataError("there are no test images: nothing to compare synthetic images with")
    # the pool in which a run keeps them; of one lane, so that they are images 0, 1, 2, ... whoever they are for
    pool = Pool(source, job.pools / source.fingerprint()[:16], warn=job.tell)
    fakes, broken = _images(source, pool, each, progress)
    rows = job.partition.held(len(job.data.train_y))
    train_x, train_y = data.train_x[rows], data.train_y[rows]
    fake_x, fake_y = torch.cat(fakes), _labels(fakes)
    some = _some(train_y, [len(part) for part in fakes], streams)

    def trained(name: str, x: Tensor, y: Tensor) -> Split:
        return train(job, x, y, recipe, streams, lambda done: progress(f"classifier of {name}", done, recipe.steps))

    def scores(model: Split, x: Tensor, y: Tensor) -> dict[str, float]:
        return evaluate(model, x, y, data.classes, job.transform, job.device, CHUNK)

    judge = trained("all real images", train_x, train_y)
    on_real, on_fake = scores(judge, data.test_x, data.test_y), scores(judge, fake_x, fake_y)
    taught = scores(trained("synthetic images", fake_x, fake_y), data.test_x, data.test_y)
    control = scores(trained("as many real images", train_x[some], train_y[some]), data.test_x, data.test_y)

    parts = {"seen": train_x, "new": data.test_x, "made": fake_x}
    if data.public is not None:
        parts["public"] = data.public.x
    sights: dict[str, Tensor] = {}
    for name, x in parts.items():
        progress("features", len(sights), len(parts))
        sights[name] = features(job, judge, x)
    progress("features", len(parts), len(parts))
    # one factor for all, so that the kernel does not depend on the scale at which the classifier happens to work
    scale = sights["new"].square().mean().sqrt().clamp(min=1e-12)
    new, made = sights["new"] / scale, sights["made"] / scale
    real_by_class = [new[data.test_y == label] for label in range(len(data.classes))]
    fake_by_class = torch.split(made, [len(part) for part in fakes])

    def near(name: str) -> Near:
        known = sights[name] / scale
        return _near(made, fake_x, fake_y, known, parts[name], new, data.test_y, len(data.classes), limits)

    copies, public = near("seen"), None if data.public is None else near("public")
    others = _others(real_by_class)

    found = []
    for label, name in enumerate(data.classes):
        mine = fake_y == label
        if label in broken or not mine.any():
            reason = broken.get(label, "there are none")
            found.append(ClassQuality(name, source.prompt(label), 0, failed={"images": reason}))
            continue
        real, fake = real_by_class[label], fake_by_class[label]
        value, error = kid(fake, real)
        other, apart = others[label]
        key = f"class/{name}"
        found.append(
            judged(
                ClassQuality(
                    name,
                    source.prompt(label),
                    images=int(mine.sum()),
                    accuracy=on_fake[key],
                    accuracy_real=on_real.get(key),
                    cas=taught.get(key),
                    cas_real=control.get(key),
                    kid=value,
                    kid_error=error,
                    kid_other=apart,
                    other="" if other is None else data.classes[other],
                    copies=_share(copies.copy[mine]),
                    exact=int(copies.exact[mine].sum()),
                    public=None if public is None else _share(public.copy[mine]),
                    diversity=_ratio(spread(fake), spread(real)),
                    repeats=repeats(fakes[label]),
                ),
                limits,
            )
        )
    # copies first, the rest by distance
    worst = torch.argsort(copies.distance - 1e6 * copies.copy)[:SHOWN].tolist()
    starts = torch.tensor([0, *(len(part) for part in fakes)]).cumsum(0)
    pairs = [
        Pair(
            label=int(fake_y[row]),
            index=row - int(starts[fake_y[row]]),
            distance=float(copies.distance[row]),
            copy=bool(copies.copy[row]),
            exact=bool(copies.exact[row]),
            fake=fake_x[row],
            real=train_x[copies.place[row]],
        )
        for row in worst
    ]
    return Quality(
        classes=tuple(found),
        reference=on_real["accuracy"],
        accuracy=on_fake["accuracy"],
        cas=taught["accuracy"],
        cas_real=control["accuracy"],
        trained_on=(len(train_y), len(fake_y), len(some)),
        recipe=recipe,
        limits=limits,
        fingerprint=source.fingerprint(),
        real=tuple(train_x[train_y == label][:SHOWN] for label in range(len(data.classes))),
        fake=tuple(part[:SHOWN] for part in fakes),
        pairs=tuple(pairs),
    )


def judged(measured: ClassQuality, limits: Limits) -> ClassQuality:
    """The same with the rules that it breaks."""
    failed: dict[str, str] = {}
    m = measured
    if m.accuracy is not None and m.accuracy_real and m.accuracy < limits.accuracy * m.accuracy_real:
        failed["accuracy"] = (
            f"the reference classifier takes {m.accuracy:.0%} of them for {m.name}, {m.accuracy_real:.0%} of real ones"
        )
    if m.kid is not None and m.kid_other is not None:
        sure = m.kid - 2 * (m.kid_error or 0.0)
        if sure > limits.kid * m.kid_other:
            failed["kid"] = f"KID to real {m.name} is {m.kid:.2f}; real {m.other} stands at {m.kid_other:.2f}"
    if m.diversity is not None and m.diversity < limits.diversity:
        failed["diversity"] = f"two of them differ {m.diversity:.2f} times as much as two real ones"
    if m.copies is not None:
        sure = m.copies - 2 * math.sqrt(m.copies * (1 - m.copies) / m.images)  # pixel by pixel nothing is chance
        if max(sure, m.exact / m.images) > limits.copies:
            failed["copies"] = f"{m.copies:.1%} nearly repeat a train image ({m.exact} of them pixel by pixel)"
    if m.repeats is not None and m.repeats > limits.repeats:
        failed["repeats"] = f"{m.repeats:.1%} are equal to an earlier one"
    return ClassQuality(**{**vars(measured), "failed": failed})


def reference(job: Job, recipe: Recipe | None = None, progress: Stages = _silent) -> Split:
    """The classifier trained on all train images that clients hold, as `inspect` trains it."""
    recipe = recipe or Recipe()
    rows = job.partition.held(len(job.data.train_y))
    return train(
        job,
        job.data.train_x[rows],
        job.data.train_y[rows],
        recipe,
        job.streams.at("inspect"),
        lambda done: progress("classifier of all real images", done, recipe.steps),
    )


def train(job: Job, x: Tensor, y: Tensor, recipe: Recipe, streams: Streams, progress: Callable[[int], None]) -> Split:
    """A network of the run's kind, trained on images x [N, C, H, W] uint8 with labels y. Every classifier starts from
    the same weights. Raises DataError with fewer than two images."""
    if len(y) < 2:
        raise DataError(f"a classifier cannot be trained on {len(y)} images")
    with isolated(streams("init")):
        model = job.config.model.build(job.data.shape, len(job.data.classes)).to(job.device)
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), recipe.lr)
    size = min(recipe.batch, len(y))
    order, start = torch.empty(0, dtype=torch.int64), 0
    for step in range(recipe.steps):
        if start + size > len(order):  # whole batches only: BatchNorm fails on one image
            order, start = torch.randperm(len(y), generator=streams("batch", step)), 0
        rows = order[start : start + size]
        start += size
        optimiser.param_groups[0]["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        batch = job.transform(x[rows], rng=streams("augment", step), device=job.device)
        loss = nn.functional.cross_entropy(model(batch), y[rows].to(job.device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if (step + 1) % 10 == 0 or step + 1 == recipe.steps:
            progress(step + 1)
    return model.eval()


@torch.inference_mode()
def features(job: Job, model: Split, x: Tensor) -> Tensor:
    """[N, D] float32 on the CPU: what the head of the classifier sees of images x [N, C, H, W] uint8."""
    parts = (job.transform(part, rng=None, device=job.device) for part in torch.split(x, CHUNK))
    return torch.cat([model.embed(part).float().cpu() for part in parts])


def kid(x: Tensor, y: Tensor) -> tuple[float | None, float | None]:
    """Squared MMD between features x [m, D] and y [n, D] from all of them, and its standard error from BLOCKS disjoint
    parts; None where there are too few."""
    if min(len(x), len(y)) < 2:
        return None, None
    blocks = min(BLOCKS, min(len(x), len(y)) // 4)
    if blocks < 2:
        return mmd2(x, y), None
    parts = torch.tensor([mmd2(x[at::blocks], y[at::blocks]) for at in range(blocks)])
    return mmd2(x, y), float(parts.std()) / math.sqrt(blocks)


def mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3; it can be
    negative (Binkowski et al., section 4 and equation 4)."""
    x, y = x.double(), y.double()
    return _within(x) + _within(y) - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor) -> float:
    """The mean of the kernel over pairs of different rows."""
    values = _kernel(x, x)
    return float(values.sum() - values.trace()) / (len(x) * (len(x) - 1))


def _others(by_class: list[Tensor]) -> list[tuple[int | None, float | None]]:
    """For each class the one most like it, and their KID. At most 200 images of each are compared."""
    parts = [part[:200].double() for part in by_class]
    within = [_within(part) if len(part) > 1 else None for part in parts]
    table = torch.full((len(parts), len(parts)), torch.inf, dtype=torch.float64)
    for a, one in enumerate(within):
        for b, two in enumerate(within[:a]):
            if one is not None and two is not None:
                table[a, b] = table[b, a] = one + two - 2 * float(_kernel(parts[a], parts[b]).mean())
    best = [row.min(0) for row in table]
    return [(int(at), float(value)) if value.isfinite() else (None, None) for value, at in best]


def nearest(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of x [N, D] the distance to the nearest row of `train`, the mean distance to the NEIGHBOURS next
    ones (infinite where there are none), and which row is the nearest."""
    count = min(NEIGHBOURS + 1, len(train))
    gaps, after, places = [], [], []
    centre = train.mean(0)  # what all rows have in common would take digits from their differences
    for part in torch.split(x, CHUNK):
        # matrix products find the neighbours; they are too coarse for distances near zero, which are then taken exactly
        rows = torch.cdist(part - centre, train - centre).topk(count, largest=False).indices
        exact, order = (part[:, None] - train[rows]).norm(dim=2).sort(dim=1)
        gaps.append(exact[:, 0])
        after.append(exact[:, 1:].mean(1) if count > 1 else torch.full((len(part),), torch.inf))
        places.append(rows.gather(1, order)[:, 0])
    return torch.cat(gaps), torch.cat(after), torch.cat(places)


@dataclass(frozen=True)
class Near:
    """For each synthetic image the nearest of the known ones. distance: [N] by the limit under which it counts as near.
    place: [N] which it is. exact, copy: [N] bool, equal pixel by pixel; equal or nearly so."""

    distance: Tensor
    place: Tensor
    exact: Tensor
    copy: Tensor


def _near(
    made: Tensor,
    made_x: Tensor,
    made_y: Tensor,
    known: Tensor,
    known_x: Tensor,
    new: Tensor,
    new_y: Tensor,
    classes: int,
    limits: Limits,
) -> Near:
    """Features, images and labels of synthetic images; features and images of known ones; features and labels of new
    real ones, which cannot be copies and say how near is near."""
    gaps, after, place = nearest(made, known)
    near = _thresholds(nearest(new, known)[0], new_y, classes, limits.quantile)[made_y]
    exact = (made_x == known_x[place]).flatten(1).all(1)
    distance = torch.where(exact, 0.0, gaps / near.clamp(min=1e-12))
    return Near(distance, place, exact, exact | ((distance <= 1) & (gaps < limits.apart * after)))


def spread(x: Tensor) -> float | None:
    """The mean distance of two different rows; None with fewer than two."""
    if len(x) < 2:
        return None
    x = x[:1000].double()
    return float(torch.cdist(x, x).sum()) / (len(x) * (len(x) - 1))


def repeats(images: Tensor) -> float:
    """The share of images [N, C, H, W] that are equal to an earlier one."""
    return 1 - len({image.numpy().tobytes() for image in images}) / len(images)


def _images(source: Source, pool: Pool, each: int, progress: Stages) -> tuple[list[Tensor], dict[int, str]]:
    """`each` images of every class, and for a class that could not be made the reason."""
    if each < 2:
        raise ConfigError("--images", each, "must be at least 2: nothing can be said about less")
    fakes, broken, first = [], {}, None
    classes = len(source.classes)
    for label in range(classes):

        def show(done: int, _: int, before: int = label * each) -> None:
            progress("images", before + done, classes * each)

        try:
            pool.fill([(label, 0, each)], show)
            fakes.append(pool.take(label, 0, each))
        except PoolError as error:
            first, broken[label] = first or error, str(error)
            fakes.append(torch.empty((0, *source.shape), dtype=torch.uint8))
    progress("images", classes * each, classes * each)
    if first is not None and len(broken) == classes:
        raise first
    return fakes, broken


def _labels(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])


def _some(y: Tensor, counts: list[int], streams: Streams) -> Tensor:
    """As many rows of each class, or all there are."""
    rows = []
    for label, count in enumerate(counts):
        mine = (y == label).nonzero()[:, 0]
        rows.append(mine[torch.randperm(len(mine), generator=streams("some", label))[:count]])
    return torch.cat(rows)


def _thresholds(gaps: Tensor, y: Tensor, classes: int, quantile: float) -> Tensor:
    """[classes] the distance to a train image below which that share of real images of the class stand; of all real
    images for a class without any."""
    whole = gaps.quantile(quantile)
    return torch.stack([gaps[y == c].quantile(quantile) if (y == c).any() else whole for c in range(classes)])


def _share(marked: Tensor) -> float:
    return float(marked.double().mean())


def _ratio(one: float | None, two: float | None) -> float | None:
    return None if one is None or not two else one / two
