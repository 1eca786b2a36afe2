"""How the pictures of a table are drawn: each a figure, its numbers in words, and the same as plain values.

Clients, where a picture shows one and names none, are chosen by what they hold: `skewed` and `filling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkeel.errors import CheckpointError, DataError
from fedkeel.reproduce.cells import loaded, path_of, run_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedkeel.report.finished import Finished
    from fedkeel.reproduce.asked import Picture
    from fedkeel.reproduce.pictures import Source
    from fedkeel.reproduce.shown import Shown
    from fedkeel.reproduce.tables import Cell

    Made = tuple[Figure, str, object]

SHOWN = 5
"""Images of a class in each group of a sheet."""


# of the table ---------------------------------------------------------------------------------------------------------


def _curve(picture: Picture, source: Source) -> Made:
    """Rows over columns: mean and deviation over seeds, printed values as hollow marks."""
    from fedkeel.report.plots import FAINT, colour, paper, words

    whole, there = source.whole, {each.cell.name: each.cell for each in source.shows(picture)}
    ticks = {(cell.row.key, cell.column.key): _tick(picture, cell) for cell in there.values()}
    heads = [column.key for column in whole.columns]
    rows = [row for row in whole.rows if not picture.rows or row.key in picture.rows]
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, keys in (picture.lines or {"": heads}).items():
        for row in rows:
            label = ", ".join(filter(None, [row.label if len(rows) > 1 or not name else "", name]))
            points = [_point(whole, row.key, key, ticks[row.key, key]) for key in keys if (row.key, key) in ticks]
            if any(point["mean"] is not None for point in points):
                lines[label] = points
    names = list(dict.fromkeys(point["at"] for points in lines.values() for point in points))
    figure, (axes,) = paper(7.2, 4.2, 1)
    for at, (label, points) in enumerate(lines.items()):
        where = [names.index(point["at"]) for point in points]
        _marks(axes, where, points, colour(at), {"ls": "-", "lw": 2, "ms": 5, "label": words(label)})
    axes.set_xticks(range(len(names)), [words(name) for name in names])
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_xlabel(picture.axis)
    axes.set_ylabel("Accuracy (%)")
    axes.grid(axis="y", color=FAINT, lw=0.8)
    _legend(figure, axes)
    said = [f"{label}: {', '.join(_said(point) for point in points)}" for label, points in lines.items()]
    return figure, _in_words(said), {"lines": lines}


def _tick(picture: Picture, cell: Cell) -> str:
    if not picture.option:
        return cell.column.label
    value = getattr(cell.config.method, picture.option)
    return picture.zero if value == 0 else f"{value:,}"


def _bars(picture: Picture, source: Source) -> Made:
    """Columns side by side, a bar a row: mean and deviation over seeds, printed values as hollow marks."""
    from fedkeel.report.plots import FAINT, INK, colour, paper, words

    whole = source.whole
    rows = [row for row in whole.rows if not picture.rows or row.key in picture.rows]
    points = {row.label: [_point(whole, row.key, each.key, each.label) for each in whole.columns] for row in rows}
    wide = 0.8 / len(rows)
    figure, (axes,) = paper(max(5.2, 1.6 * len(whole.columns) + 1.2), 4.2, 1)
    for at, (label, each) in enumerate(points.items()):
        where = [place + (at - (len(rows) - 1) / 2) * wide for place in range(len(each))]
        axes.bar(where, [point["mean"] or 0.0 for point in each], wide * 0.9, color=colour(at), label=words(label))
        _marks(axes, where, each, INK, {"ls": "", "ms": 0})
        for place, point in zip(where, each, strict=True):
            if point["mean"] is not None:
                axes.annotate(f"{point['mean']:.1f}", (place, 0), (0, 4), textcoords="offset points", ha="center",
                              color="white", fontsize=8, fontweight="bold")  # fmt: skip
    axes.set_xticks(range(len(whole.columns)), [words(each.label.replace(" ", "\n", 1)) for each in whole.columns])
    axes.set_ylim(0, 100)
    axes.set_ylabel("Accuracy (%)")
    axes.grid(axis="y", color=FAINT, lw=0.8)
    _legend(figure, axes)
    said = [f"{label}: {', '.join(_said(point) for point in each)}" for label, each in points.items()]
    return figure, _in_words(said), {"bars": points}


def _point(whole: Shown, row: str, column: str, at: str) -> dict[str, Any]:
    """A cell's numbers in per cent: as the table has them."""
    spot = whole.spots[row, column]
    return {
        "column": column,
        "at": at,
        "mean": spot.mean,
        "std": spot.std,
        "seeds": {str(seed): value for seed, value in spot.ours.items()},
        "printed": spot.printed[0] if spot.printed else None,
    }


def _marks(
    axes: Axes, where: Sequence[float], points: Sequence[Mapping[str, Any]], face: str, style: Mapping[str, Any]
) -> None:
    """Means with their deviations, and the printed values."""
    ours = [(x, point) for x, point in zip(where, points, strict=True) if point["mean"] is not None]
    if ours:
        mean, std = ([point[key] or 0.0 for _, point in ours] for key in ("mean", "std"))
        caps = 3 * any(std)
        axes.errorbar([x for x, _ in ours], mean, std, color=face, marker="o", capsize=caps, **style)
    printed = [(x, point["printed"]) for x, point in zip(where, points, strict=True) if point["printed"] is not None]
    if printed:
        axes.plot(*zip(*printed, strict=True), ls="", marker="D", ms=7, mfc="white", mec=face, mew=1.4)


def _legend(figure: Figure, axes: Axes) -> None:
    """Rows by their colours, and what hollow marks are where there are any."""
    from matplotlib.lines import Line2D

    from fedkeel.report.plots import INK

    handles, labels = axes.get_legend_handles_labels()
    if any(line.get_marker() == "D" for line in axes.get_lines()):
        handles.append(Line2D([], [], ls="", marker="D", ms=7, mfc="none", mec=INK, mew=1.4))
        labels.append("printed")
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK)


def _said(point: Mapping[str, Any]) -> str:
    if point["mean"] is None:
        return f"missing at {point['at']}"
    std = "" if point["std"] is None else f" ± {point['std']:.2f}"
    printed = "" if point["printed"] is None else f" (printed {point['printed']})"
    return f"{point['mean']:.2f}{std} at {point['at']}{printed}"


# of a configuration ---------------------------------------------------------------------------------------------------


def _histogram(picture: Picture, source: Source) -> Made:
    """Samples of each class at one client: real ones, then with the synthetic ones."""
    from fedkeel.report.plots import FAINT, FAKE, INK, REAL, heading, paper, shorten, words

    run = _job(picture, source)
    client = _client(picture, run)
    real, fake = run.job.plan.real[client], run.job.plan.fake[client]
    before = run.held(client)
    names = [words(shorten(name, 12)) for name in run.classes]
    figure, panels = paper(8.0, 3.4, 1, 2)
    panels[1].sharey(panels[0])
    for axes, title, below, above in (
        (panels[0], "before", before, torch.zeros_like(fake)),
        (panels[1], f"after, by {run.label}", real, fake),
    ):
        axes.bar(range(len(names)), below.tolist(), color=REAL, label="real")
        axes.bar(range(len(names)), above.tolist(), bottom=below.tolist(), color=FAKE, label="synthetic")
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=35, ha="right", rotation_mode="anchor")
        axes.grid(axis="y", color=FAINT, lw=0.8)
        heading(axes, f"Client {client} {title}")
        for tick, count in zip(axes.get_xticklabels(), below + above, strict=True):
            tick.set_color(INK if count else "#B00020")
    panels[0].set_ylabel("Samples")
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, frameon=False, labelcolor=INK)
    numbers = {"client": client, "classes": list(run.classes)}
    numbers |= {key: value.tolist() for key, value in (("before", before), ("real", real), ("synthetic", fake))}
    first, then = before, real + fake
    caption = (
        f"Client {client}{_why(picture)} holds {int(first.sum()):,} samples of {int((first > 0).sum())} of "
        f"{len(first)} classes, {_largest(first):.0%} of them of one; then {int(then.sum()):,} of "
        f"{int((then > 0).sum())}, {_largest(then):.0%} of one."
    )
    return figure, caption, numbers


def _largest(counts: Tensor) -> float:
    """The share of the largest class."""
    return float(counts.max()) / max(int(counts.sum()), 1)


def _partition(picture: Picture, source: Source) -> Made:
    """Who holds what."""
    from fedkeel.report.plots import bubbles

    run = _job(picture, source)
    counts = run.job.counts
    held = (counts > 0).sum(1).double().mean()
    share = sum(map(_largest, counts)) / len(counts)
    figure = bubbles(counts.numpy(), run.classes)
    numbers = {"classes": list(run.classes), "counts": counts.tolist(), "held": float(held), "largest": share}
    caption = (
        f"{len(counts)} clients hold {int(counts.sum()):,} samples; a client holds {held:.1f} of {counts.shape[1]} "
        f"classes on average, and {share:.0%} of its samples are of one."
    )
    return figure, caption, numbers


def _sheet(picture: Picture, source: Source) -> Made:
    """Real and synthetic images, a row a class."""
    from fedkeel.report.figures import sheet

    run = _job(picture, source)
    client = _client(picture, run)
    found = sheet(run, client, SHOWN)
    if set(found.groups) == {"real", "vanilla"}:  # nobody tunes: there is only one kind of them
        found = replace(
            found,
            groups={"real": found.groups["real"], "synthetic": found.groups["vanilla"]},
            numbers={"real": found.numbers["real"], "synthetic": found.numbers["vanilla"]},
        )
    first, *others = found.draw()
    cut = f" The first of {len(others) + 1} pages." if others else ""
    made = " and ".join(name for name in found.groups if name != "real")
    same = ", in one place with the same noise" if "adapted" in found.groups else ""
    caption = (
        f"Client {client}{_why(picture)}: real images, its own first, beside {made} ones{same}; classes that it misses "
        f"are red.{cut}"
    )
    return first, caption, found.as_json()


# of runs --------------------------------------------------------------------------------------------------------------


def _classes(picture: Picture, source: Source) -> Made:
    """Accuracy of each class before and after a local update."""
    from fedkeel.report.classes import change, draw, measured

    runs = _runs(picture, source)
    client = _client(picture, runs[0])
    found = [change(run, client) for run in runs]
    if len({(each.recorded, each.round) for each in found}) > 1:  # a run of another table may have no record
        found = [measured(run, client) for run in runs]
    said = [
        f"{run.label}: of classes held {_change(each.mean(True), 100)} %, of missing ones "
        f"{_change(each.mean(False), 100)} %"
        for run, each in zip(runs, found, strict=True)
    ]
    caption = f"Mean accuracy before and after a local update of client {client}{_why(picture)}. {_in_words(said)}"
    return draw(found), caption, [each.as_json() for each in found]


def _update(picture: Picture, source: Source) -> Made:
    """Test images in the features before and after a local update."""
    from fedkeel.report import embedding

    runs = _runs(picture, source)
    client = _client(picture, runs[0])
    pairs = [embedding.update_clouds(run, client) for run in runs]
    said = [
        f"{run.label}: "
        + ", ".join(
            f"{name} {_change([cloud.scores[f'silhouette/{name}'] for cloud in pair])}" for name in pair[0].names
        )
        for run, pair in zip(runs, pairs, strict=True)
    ]
    caption = (
        f"Silhouette of the classes that client {client}{_why(picture)} holds or misses, in the features before and "
        f"after its update. {_in_words(said)}"
    )
    clouds = [cloud for pair in pairs for cloud in pair]
    return embedding.draw(clouds, runs[0].classes, 2), caption, [cloud.as_json() for cloud in clouds]


def _images(picture: Picture, source: Source) -> Made:
    """Real, vanilla and tuned images."""
    from fedkeel.report import embedding
    from fedkeel.report.figures import images

    (run,) = _runs(picture, source)
    client = _client(picture, run)
    cloud = images(run, client)
    if cloud is None:
        raise DataError(f"client {client} has fewer than three images")
    said = [f"{name.partition('/')[2]} {value:.3f}" for name, value in cloud.scores.items() if value is not None]
    caption = f"Squared MMD to the real images of client {client}{_why(picture)}, smaller is nearer: {', '.join(said)}."
    return embedding.draw([cloud], run.classes), caption, cloud.as_json()


def _aligned(picture: Picture, source: Source) -> Made:
    """Real features, synthetic ones, and those with their offsets."""
    from fedkeel.report import embedding

    (run,) = _runs(picture, source)
    client = filling(run.job.counts, run.job.plan.fake) if picture.client is None else picture.client
    cloud, apart = embedding.aligned_cloud(run, client)
    said = [f"{run.classes[c]} {before:.3f} to {after:.3f}" for c, (before, after) in apart.items()]
    why = "" if picture.client is not None else ", which has most real images of classes that it fills"
    caption = (
        f"Distance of the means of real and synthetic features of client {client}{why}, without the offset and with "
        f"it, over the root mean square length of real ones. {_in_words(said)}"
    )
    by_class = {run.classes[c]: pair for c, pair in apart.items()}
    return embedding.draw([cloud], run.classes), caption, {**cloud.as_json(), "client": client, "distances": by_class}


DRAW: Mapping[str, Callable[[Picture, Source], Made]] = {
    "curve": _curve,
    "bars": _bars,
    "histogram": _histogram,
    "partition": _partition,
    "sheet": _sheet,
    "classes": _classes,
    "update": _update,
    "images": _images,
    "aligned": _aligned,
}


def _job(picture: Picture, source: Source) -> Finished:
    """A run that was never begun: data, partition and generator of a configuration."""
    from fedkeel.job import Job

    (cell,) = source.needs(picture)
    config = cell.placed(source.data, source.folder, source.pools)
    job = Job(config, loaded(config))
    return _titled(cell)(Path(cell.row.label), cell.row.label, job, job.first_server(), {})


def _runs(picture: Picture, source: Source) -> list[Finished]:
    """The runs of a picture, put together again. Raises CheckpointError where one is gone."""
    from fedkeel.config import read
    from fedkeel.report.finished import open_run

    out = []
    for cell in source.needs(picture):
        place = run_of(cell, source.folder)
        try:
            if not (place / "config.toml").is_file():
                raise CheckpointError(f"{place} is gone")
            found = open_run(place, cell.row.label, loaded(read(place / "config.toml")))
        except CheckpointError as error:
            raise CheckpointError(f"{error}: remove {path_of(cell, source.folder)}") from None
        out.append(_titled(cell)(**vars(found)))
    return out


def _titled(cell: Cell) -> type[Finished]:
    """Runs whose titles are their labels: the name of a cell's folder says nothing more."""
    from fedkeel.report.finished import Finished

    class Titled(Finished):
        @property
        def title(self) -> str:
            return f"{self.label}, {cell.column.label}"

    return Titled


def _client(picture: Picture, run: Finished) -> int:
    if picture.client is None:
        return skewed(run.job.counts)
    run.held(picture.client)
    return picture.client


def _why(picture: Picture) -> str:
    """Why it is this client."""
    return "" if picture.client is not None else " (with most samples of those that miss a class)"


def skewed(counts: Tensor) -> int:
    """The client with most samples of those that miss a class; of all, where none does. counts: [K, C]."""
    missing = (counts == 0).any(1)
    return int((counts.sum(1) * (missing if missing.any() else True)).argmax())


def filling(counts: Tensor, fake: Tensor) -> int:
    """The client with most real images of classes that it fills, no more of each than it fills in. Both: [K, C]."""
    return int(torch.minimum(counts, fake).sum(1).argmax())


def _change(pair: Iterable[float | None], scale: float = 1) -> str:
    return " to ".join("none" if value is None else f"{scale * value:.{0 if scale > 1 else 2}f}" for value in pair)


def _in_words(said: Sequence[str]) -> str:
    return "; ".join(said) + "." if said else ""
