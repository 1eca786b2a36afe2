"""Pictures of runs, as matplotlib figures on a light ground and as PNG files.

Every function returns a Figure of its own: nothing touches pyplot or global settings. Colours are those of Okabe and
Ito, told apart by colour-blind readers. In every picture of samples blue is real and orange synthetic.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedkeel.errors import StorageError
from fedkeel.files import write
from fedkeel.report.runs import Method, RunData, in_order, methods
from fedkeel.report.table import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STAGES = ("#332288", "#44AA99", "#DDCC77", "#CC6677", "#88CCEE", "#AA4499")  # phases: Tol's, so as not to say a method
UP, DOWN = "#4A5A6A", "#A9B8C6"
REAL, FAKE = "#0072B2", "#E69F00"
INK, FAINT = "#222831", "#DDE1E6"
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # a second and third round through the palette
NAMES = {
    "global/accuracy": "Accuracy of the global model",
    "global/balanced_accuracy": "Balanced accuracy of the global model",
    "global/loss": "Loss of the global model",
    "local_before/accuracy": "Accuracy on clients, before local training",
    "local_after/accuracy": "Accuracy on clients, after local training",
    "personal/accuracy_last": "Accuracy of personal models, last",
    "personal/accuracy_best": "Accuracy of personal models, best",
    "train/loss": "Training loss",
    "train/steps": "Local steps a round, all clients",
    "privacy/epsilon": "Privacy spent: epsilon",
    "privacy/epsilon_known": "Privacy spent: epsilon where it is known who took part",
    "method/participants/accuracy": "FedDyn: accuracy of the participants' mean model",
    "method/participants/loss": "FedDyn: loss of the participants' mean model",
    "method/loss": "FedCDA: mean loss of the chosen models",
    "method/variance": "FedCDA: variance of the chosen models, times L/2",
    "method/kept_loss": "FBL: mean loss of the samples kept of cut classes, when chosen",
    "method/mode_mismatch": "MOON: features apart by BatchNorm's modes alone, 1 - cosine",
}


def colour(at: int) -> str:
    """The colour of the at-th method."""
    return PALETTE[at % len(PALETTE)]


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return "accuracy" in metric or metric.startswith("global/class/")


def distinct(found: Sequence[Method]) -> list[RunData]:
    """The first run of each partition among the methods' first seeds."""
    runs = [method.runs[0] for method in found if method.runs[0].counts is not None]
    return list({run.hash or str(run.counts): run for run in reversed(runs)}.values())[::-1]


def accuracy(runs: Sequence[RunData], metric: str = "global/accuracy") -> Figure:
    """A metric over rounds: the mean over seeds as a line, one standard deviation as a band."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(8.4, 4.6)
    scale = 100 if is_share(metric) else 1
    drawn = 0
    for at, method in enumerate(methods(runs)):
        rounds, mean, std = (np.asarray(part) for part in method.curve(metric))
        if not len(rounds):
            continue
        drawn += 1
        style = _DASHES[at // len(PALETTE) % len(_DASHES)]
        marker = "o" if len(rounds) < 3 else None  # a line of one point would not show
        axes.plot(
            rounds, scale * mean, color=colour(at), ls=style, lw=2, marker=marker, ms=5, label=words(method.label)
        )
        if std.any():
            low, high = scale * (mean - std), scale * (mean + std)
            axes.fill_between(rounds, low, high, color=colour(at), alpha=0.16, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("Round")
    axes.set_ylabel(NAMES.get(metric, metric) + (" (%)" if scale == 100 else ""))
    axes.grid(axis="y", color=FAINT, lw=0.8)
    if drawn:
        figure.legend(loc="outside upper left", ncols=min(drawn, 4), frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no evaluated round yet", ha="center", transform=axes.transAxes, color=INK)
    return figure


def bubbles(
    counts: NDArray[np.int64],
    classes: Sequence[str],
    fake: NDArray[np.int64] | None = None,
    title: str = "",
) -> Figure:
    """Who holds what: clients across, classes down, area for the number of samples.

    counts, fake: [K, C]. Synthetic samples are the outer part of a disc whose whole area is real and synthetic
    together. The largest disc fills a cell.
    """
    clients, labels = counts.shape
    both = counts if fake is None else counts + fake
    largest = int(both.max(initial=1))
    cell = float(np.clip(8.0 / max(clients, 1), 0.115, 0.36))  # inches
    height = max(cell, 0.12) * labels
    margin = 0.085 * max(len(name) for name in classes) if labels else 0.0
    figure, axes = _figure(max(cell * clients + margin + 1.4, 4.2), height + (1.5 if fake is not None else 1.2))
    points = 72 * min(cell, height / max(labels, 1)) * 0.95

    def draw(values: NDArray[np.int64], face: str, label: str) -> None:
        client, kind = np.nonzero(values)
        area = values[client, kind] / largest * points**2
        axes.scatter(client, kind, s=area, c=face, lw=0, label=label)

    if fake is not None:
        draw(np.where(fake > 0, both, 0), FAKE, "synthetic")
    draw(counts, REAL, "real")
    axes.set_xlim(-0.7, clients - 0.3)
    axes.set_ylim(labels - 0.3, -0.7)
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**9) if clients / n <= 26)
    axes.set_xticks(range(0, clients, step))
    small = 9 if labels <= 30 else 6.5
    axes.set_yticks(range(labels), [words(shorten(name)) for name in classes], fontsize=small)
    axes.set_xlabel("Client")
    axes.grid(color=FAINT, lw=0.5 if labels <= 30 and clients <= 30 else 0.25)
    heading(axes, title)
    axes.set_title(f"largest disc: {largest:,} samples", loc="right", fontsize=8, color=INK)
    if fake is not None:
        legend = figure.legend(reverse=True, loc="outside lower left", ncols=2, frameon=False, labelcolor=INK)
        for handle in legend.legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([60])
    return figure


def per_class(runs: Sequence[RunData]) -> Figure:
    """Accuracy per class: grouped bars, or one strip per method where there are many classes."""
    found = [(at, method, values) for at, method in enumerate(methods(runs)) if (values := method.per_class())]
    classes = list(dict.fromkeys(name for _, _, values in found for name in values))
    place = {name: at for at, name in enumerate(classes)}
    strips = len(classes) > 24
    rows = max(len(found), 1) if strips else 1
    wide = float(np.clip(0.3 * len(classes) * max(len(found), 1) ** 0.5, 7.5, 15))
    figure, panels = paper(wide, 1.9 * rows + 1.4 if strips else 4.4, rows)
    for order, (at, method, values) in enumerate(found):
        axes = panels[order if strips else 0]
        bar = 0.82 if strips else 0.82 / len(found)
        shift = 0.0 if strips else (order - (len(found) - 1) / 2) * bar
        where = [place[name] + shift for name in values]
        heights = [100 * value for value in values.values()]
        axes.bar(where, heights, width=bar * 0.92, color=colour(at), label=words(method.label))
        if strips:
            heading(axes, method.label)
    long = max((len(name) for name in classes), default=0) > 5
    for axes in panels:
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.7, len(classes) - 0.3)
        axes.set_ylabel("Accuracy (%)")
        axes.grid(axis="y", color=FAINT, lw=0.8)
        axes.set_xticks([])
    turn = 90 if strips else 35 if long else 0
    axes = panels[-1]
    axes.set_xticks(range(len(classes)), [words(shorten(name)) for name in classes], fontsize=7 if strips else 9)
    for tick in axes.get_xticklabels():
        tick.set(rotation=turn, ha="right" if turn == 35 else "center", rotation_mode="anchor" if turn == 35 else None)
    if not strips and found:
        figure.legend(loc="outside upper left", ncols=min(len(found), 4), frameon=False, labelcolor=INK)
    return figure


def contact(real: NDArray[np.uint8], fake: NDArray[np.uint8], classes: Sequence[str], title: str = "") -> Figure:
    """Real samples beside synthetic ones, a row a class; in several columns where there are many classes."""
    bands = 1 if len(classes) <= 12 else 2 if len(classes) <= 40 else 4
    deep = -(-len(classes) // bands)
    tile = 0.55 if bands == 1 else 0.36  # inches
    across = real.shape[1] + fake.shape[1] + 0.5
    figure, panels = paper(
        bands * (across * tile + 1.3), deep * tile * real.shape[3] / real.shape[4] + 0.9, 1, across=bands
    )
    for band, axes in enumerate(panels):
        mine = range(band * deep, min((band + 1) * deep, len(classes)))
        if not mine:
            axes.set_axis_off()
            continue
        left = np.concatenate([_mosaic(real[kind]) for kind in mine])
        right = np.concatenate([_mosaic(fake[kind]) for kind in mine])
        gap = np.full((len(left), real.shape[4] // 2, 3), 255, np.uint8)
        picture = np.concatenate([left, gap, right], axis=1)
        axes.imshow(picture, interpolation="nearest" if real.shape[4] <= 64 else "antialiased")
        high = left.shape[0] / len(mine)
        names = [words(shorten(classes[kind])) for kind in mine]
        axes.set_yticks([high * (row + 0.5) for row in range(len(mine))], names, fontsize=9 if bands == 1 else 7)
        middle = left.shape[1] + gap.shape[1] + right.shape[1] / 2
        axes.set_xticks([left.shape[1] / 2, middle], ["real", "synthetic"])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for tick, face in zip(axes.get_xticklabels(), (REAL, "#9A6700"), strict=True):
            tick.set(color=face, fontweight="bold")
        axes.spines[:].set_visible(False)
    if title:
        figure.suptitle(words(title), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def traffic(runs: Sequence[RunData]) -> Figure:
    """Bytes of a run, to the server and to the clients, averaged over seeds."""
    from matplotlib.ticker import FuncFormatter

    found = methods(runs)
    figure, axes = _figure(8.4, 0.62 * len(found) + 1.5)
    for shift, way, face in ((-0.19, "up", UP), (0.19, "down", DOWN)):
        values = [method.bytes(way) for method in found]
        where = [at + shift for at in range(len(found))]
        axes.barh(where, values, height=0.36, color=face, label="clients to server" if way == "up" else "to clients")
        for at, value in zip(where, values, strict=True):
            axes.annotate(
                size(value), (value, at), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
            )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    _rows(figure, axes, found, max(max(method.bytes("up"), method.bytes("down")) for method in found))
    return figure


def seconds(runs: Sequence[RunData]) -> Figure:
    """Seconds of a run by phase, averaged over seeds."""
    from matplotlib.ticker import FuncFormatter

    found = methods(runs)
    figure, axes = _figure(8.4, 0.5 * len(found) + 1.6)
    times = [method.seconds() for method in found]
    start = np.zeros(len(found))
    for at, phase in enumerate(in_order(phase for table in times for phase in table)):
        values = np.array([table.get(phase, 0.0) for table in times])
        face = STAGES[at % len(STAGES)]
        axes.barh(range(len(found)), values, left=start, height=0.6, color=face, label=words(phase))
        start += values
    for row, total in enumerate(start):
        axes.annotate(
            duration(total), (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    _rows(figure, axes, found, start.max())
    return figure


def write_pngs(runs: Sequence[RunData], folder: Path | str) -> list[Path]:
    """Every picture that these runs have data for, as PNG files in `folder`; returns what was written."""
    folder = Path(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in _all(runs):
            save(figure, folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    except OSError as error:
        raise StorageError(f"{folder}: cannot write pictures ({error})") from error
    return written


def _all(runs: Sequence[RunData]) -> Iterator[tuple[str, Figure]]:
    found = methods(runs)
    if any(method.headlines() for method in found):
        yield "accuracy", accuracy(runs)
    if any(method.per_class() for method in found):
        yield "classes", per_class(runs)
    for at, run in enumerate(distinct(found)):
        if run.counts is not None:
            yield f"partition-{at + 1}" if at else "partition", bubbles(run.counts, run.classes, title="As partitioned")
    for method in found:
        run = method.runs[0]
        if run.balanced and run.real is not None:
            yield f"balanced-{method.key}", bubbles(run.real, run.classes, run.fake, f"{method.label}: balanced")
    for method in found:
        if sheets := method.runs[0].pictures():
            yield f"contact-{method.key}", contact(*sheets, method.runs[0].classes, method.label)
    if any("bytes/up" in method.metrics for method in found):
        yield "bytes", traffic(runs)
    if any(method.seconds() for method in found):
        yield "seconds", seconds(runs)


def save(figure: Figure, path: Path) -> bytes:
    """Writes a figure as PNG, all or nothing; returns what is in the file. Raises StorageError."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write(path, content.getvalue())
    return content.getvalue()


def paper(wide: float, high: float, rows: int, across: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches with its panels, in the house style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(rows, across, squeeze=False).flat)
    for axes in panels:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color("#9AA3AE")
        axes.tick_params(colors=INK, labelsize=9, color="#9AA3AE")
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, panels


def _figure(wide: float, high: float) -> tuple[Figure, Axes]:
    figure, panels = paper(wide, high, 1)
    return figure, panels[0]


def _rows(figure: Figure, axes: Axes, found: Sequence[Method], longest: float) -> None:
    """A row a method, the first at the top, with room for a number after the longest bar."""
    axes.set_yticks(range(len(found)), [words(shorten(method.label, 32)) for method in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * longest or 1)
    axes.grid(axis="x", color=FAINT, lw=0.8)
    figure.legend(loc="outside upper left", ncols=5, frameon=False, labelcolor=INK)


def heading(axes: Axes, text: str) -> None:
    """A panel's title."""
    axes.set_title(words(text), loc="left", fontsize=11, fontweight="bold", color=INK)


def _mosaic(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, channels, H, W] side by side with a thin white line round each: [H + 2, n * (W + 2), 3]."""
    shown = as_rgb(images)
    framed = np.pad(shown, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    return np.concatenate(list(framed), axis=1)


def as_rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, channels, H, W] as [n, H, W, 3]; anything but three channels is shown by its first."""
    shown = images if images.shape[1] == 3 else np.repeat(images[:, :1], 3, axis=1)
    return shown.transpose(0, 2, 3, 1)


def shorten(text: str, most: int = 18) -> str:
    """At most so many letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def words(text: str) -> str:
    """Text for matplotlib: dollars are not mathematics."""
    return text.replace("$", r"\$")
