"""What `fedkeel generate --inspect` and `--profile` found, as PNG sheets, JSON, Markdown and one HTML page.

Blue is real and orange synthetic, as in every picture of fedkeel; what fails a rule is red and says so in words.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedkeel.files import write, write_json
from fedkeel.report.html import opening
from fedkeel.report.plots import INK, REAL, as_rgb, save, shorten, words
from fedkeel.report.table import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from fedkeel.generators.cost import Cost
    from fedkeel.generators.quality import ClassQuality, Pair, Quality

BAD = "#B00020"
PAGE = 20
"""Classes on one sheet."""
WIDEST = 96
"""Pixels of one image on a sheet; larger ones are shrunk."""
NAME = 16
"""Letters of a class above its image."""
_SYNTHETIC = "#9A6700"  # the orange of the pictures is too pale for letters
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
NOTES = (
    "Accuracy: of a classifier trained on the clients' real images, on synthetic and on real test images. "
    "CAS: accuracy on real test images of a classifier trained on the synthetic images, and of one trained on as many "
    "real ones. KID: distance between synthetic and real test images in the classifier's features, its standard error, "
    "and the distance between real images of the class and of the class most like it. Copies: synthetic images that "
    "nearly repeat a train image of a client, or a public one. Diversity: mean distance of two synthetic images by "
    "that of two real ones. Repeats: synthetic images equal to an earlier one."
)


# what was found, in words ---------------------------------------------------------------------------------------------


def table(quality: Quality) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and a row a class."""
    public = any(each.public is not None for each in quality.classes)
    heads = (
        "Class", "Images", "Accuracy %", "real", "CAS %", "real", "KID", "± error", "nearest class", "Copies %",
        *(("of public %",) if public else ()), "Diversity", "Repeats %", "Verdict",
    )  # fmt: skip
    rows = [
        (
            each.name,
            str(each.images),
            _percent(each.accuracy),
            _percent(each.accuracy_real),
            _percent(each.cas),
            _percent(each.cas_real),
            _number(each.kid),
            _number(each.kid_error),
            f"{_number(each.kid_other)} {each.other}".strip(),
            _percent(each.copies),
            *((_percent(each.public),) if public else ()),
            _number(each.diversity),
            _percent(each.repeats),
            "fails: " + ", ".join(each.failed) if each.failed else "passes",
        )
        for each in quality.classes
    ]
    return heads, rows


def summary(quality: Quality) -> list[str]:
    """The whole in sentences."""
    real, made, some = quality.trained_on
    lines = [
        f"The reference classifier, trained on the {real:,} train images of all clients together, is right in "
        f"{quality.reference:.1%} of the test images and in {quality.accuracy:.1%} of the synthetic ones.",
        f"Trained on {made:,} synthetic images it is right in {quality.cas:.1%} of the test images, trained on "
        f"{some:,} real ones in {quality.cas_real:.1%}.",
    ]
    if quality.reference < 2 / max(len(quality.classes), 1):
        lines.append("The reference classifier is hardly better than chance: its judgement is worth little.")
    if not quality.failed:
        lines.append("No class fails.")
    for each in quality.failed:
        reasons = "; ".join(f"{rule}: {text}" for rule, text in each.failed.items())
        lines.append(f"{each.name} fails: {reasons}.")
    return lines


def as_json(quality: Quality) -> dict[str, object]:
    """quality.json: plain values."""
    return {
        "fingerprint": quality.fingerprint,
        "reference/accuracy": quality.reference,
        "accuracy": quality.accuracy,
        "cas": quality.cas,
        "cas_real": quality.cas_real,
        "trained_on": dict(zip(("reference", "synthetic", "as_many_real"), quality.trained_on, strict=True)),
        "recipe": vars(quality.recipe),
        "limits": vars(quality.limits),
        "failed": [each.name for each in quality.failed],
        "classes": {each.name: {k: v for k, v in vars(each).items() if k != "name"} for each in quality.classes},
        "pairs": [
            {
                "class": quality.classes[pair.label].name,
                "index": pair.index,
                "distance": pair.distance,
                "copy": pair.copy,
                "exact": pair.exact,
            }
            for pair in quality.pairs
        ],
    }


def as_markdown(quality: Quality) -> str:
    """The summary and the table."""
    heads, rows = table(quality)
    lines = [*summary(quality), "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", NOTES, ""])


def write_quality(quality: Quality, folder: Path) -> dict[str, str]:
    """quality.json, quality.md, quality.html and the sheets (sheet-*.png, pairs.png) in `folder`; returns the path of
    each. Raises StorageError."""
    pictures = {f"sheet-{at + 1}": picture for at, picture in enumerate(contact(quality))}
    if quality.pairs:
        pictures["pairs"] = pairs(quality.pairs, [each.name for each in quality.classes])
    found: dict[str, str] = {}
    images: list[tuple[str, bytes]] = []
    for name, figure in pictures.items():
        path = folder / f"{name}.png"
        images.append((name, save(figure, path)))
        found[name] = str(path)
    for path, text in ((folder / "quality.md", as_markdown(quality)), (folder / "quality.html", page(quality, images))):
        write(path, text.encode())
        found[path.suffix[1:]] = str(path)
    write_json(folder / "quality.json", as_json(quality))
    return {**found, "json": str(folder / "quality.json")}


def page(quality: Quality, images: Sequence[tuple[str, bytes]]) -> str:
    """The HTML page with its pictures inside; it loads nothing."""
    heads, rows = table(quality)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = []
    for each, row in zip(quality.classes, rows, strict=True):
        mark = f' style="color:{BAD};font-weight:600"' if each.failed else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:-1])
        body.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}<td{mark}>{escape(row[-1])}</td></tr>')
    said = "".join(f"<p>{escape(line)}</p>" for line in summary(quality))
    shown = "".join(_picture(name, data) for name, data in images)
    return f"""{opening("Quality of synthetic images", _POLICY)}
<header><div><h1>Quality of synthetic images</h1><p>Generator {escape(quality.fingerprint[:16])}</p></div></header>
<main>
<section><h2>Class by class</h2>{said}
<div class="scroll" role="region" aria-label="Table of quality" tabindex="0"><table class="results">
<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div><p>{escape(NOTES)}</p></section>
{shown}</main>
<footer>Written by fedkeel. Everything shown is inside this file.</footer>
</body>
</html>
"""


def _picture(name: str, data: bytes) -> str:
    heading = "Nearest to train images" if name == "pairs" else "Real above synthetic"
    alt = "Synthetic images above the train images nearest to them" if name == "pairs" else f"Contact sheet: {heading}"
    return (
        f'<section><h2>{heading}</h2><img alt="{alt}" style="max-width:100%;background:#fff" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></section>\n'
    )


# sheets ---------------------------------------------------------------------------------------------------------------


def contact(quality: Quality) -> list[Figure]:
    """A block a class, real images above synthetic ones; PAGE classes a sheet."""
    order = range(len(quality.classes))
    return [_contact(quality, order[at : at + PAGE]) for at in range(0, len(order), PAGE)]


def _contact(quality: Quality, labels: Sequence[int]) -> Figure:
    across = max(1, *(len(part) for label in labels for part in (quality.real[label], quality.fake[label])))
    tile = 0.52  # inches
    figure = _figure(across * tile + 3.1, len(labels) * (2 * tile + 0.16) + 0.45)
    for axes, label in zip(_blocks(figure, len(labels)), labels, strict=True):
        both = [strip(part, across, quality.real[label]) for part in (quality.real[label], quality.fake[label])]
        high = both[0].shape[0]
        axes.imshow(np.concatenate(both), interpolation="nearest" if high <= 64 else "antialiased")
        _clear(axes)
        _mark(axes, "real", 0.5 * high, REAL)
        _mark(axes, "synthetic", 1.5 * high, _SYNTHETIC)
        _about(axes, quality.classes[label])
    return figure


def _about(axes: Axes, each: ClassQuality) -> None:
    """Name and numbers beside a class."""
    lines = [
        f"accuracy {_percent(each.accuracy)} % (real {_percent(each.accuracy_real)})",
        f"CAS {_percent(each.cas)} % (real {_percent(each.cas_real)})",
        f"KID {_number(each.kid)}, diversity {_number(each.diversity)}",
    ]
    if each.failed:
        lines = [*(lines[:2] if each.images else ()), f"fails: {', '.join(each.failed)}"]
    _beside(axes, each.name, 0, BAD if each.failed else INK, size=9, weight="bold")
    for at, line in enumerate(lines):
        _beside(axes, line, 15 + 12 * at, BAD if line.startswith("fails") else INK)


def _beside(axes: Axes, text: str, down: float, face: str, size: float = 7.5, weight: str = "normal") -> None:
    """A line on the right of a panel, `down` points below its top."""
    axes.annotate(
        words(text), (1, 1), (8, -down), xycoords="axes fraction", textcoords="offset points", va="top",
        fontsize=size, fontweight=weight, color=face, annotation_clip=False,
    )  # fmt: skip


def pairs(found: Sequence[Pair], classes: Sequence[str]) -> Figure:
    """Synthetic images above the train images nearest to them, the worst first; what counts as a copy in red."""
    tile, across = 1.05, min(6, len(found))
    deep = math.ceil(len(found) / across)
    figure = _figure(max(across * (tile + 0.12), 4.6) + 0.5, deep * (2 * tile + 0.62) + 0.55)
    high = 1 - 0.5 / figure.get_figheight()
    top = high - 0.3 / figure.get_figheight()
    grid = figure.add_gridspec(deep, across, left=0.02, right=0.98, bottom=0.01, top=top, hspace=0.22, wspace=0.12)
    for at, pair in enumerate(found):
        axes = figure.add_subplot(grid[at // across, at % across])
        upper, lower = (strip(part[None], 1, part[None]) for part in (pair.fake, pair.real))
        axes.imshow(np.concatenate([upper, lower]), interpolation="nearest" if len(upper) <= 64 else "antialiased")
        _clear(axes)
        what = "equal" if pair.exact else f"{pair.distance:.2f}" + (" near" if pair.copy else "")
        axes.set_title(words(f"{shorten(classes[pair.label], NAME)} {pair.index}\n{what}"), fontsize=7.5, pad=3,
                       color=BAD if pair.copy else INK)  # fmt: skip
    figure.text(0.02, high + 0.25 / figure.get_figheight(), "Synthetic image above, nearest train image below",
                fontsize=9, fontweight="bold", color=INK, va="center")  # fmt: skip
    figure.text(0.02, high + 0.05 / figure.get_figheight(), "distance by the limit under which an image counts as near",
                fontsize=8, color=INK, va="center")  # fmt: skip
    return figure


def _figure(wide: float, high: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _blocks(figure: Figure, count: int) -> list[Axes]:
    """Panels one above the other, with room for words on both sides (inches)."""
    wide, high = figure.get_figwidth(), figure.get_figheight()
    grid = figure.add_gridspec(
        count, 1, left=0.8 / wide, right=1 - 2.25 / wide, bottom=0.1 / high, top=1 - 0.1 / high, hspace=0.12
    )
    return [figure.add_subplot(grid[at, 0]) for at in range(count)]


def _mark(axes: Axes, text: str, at: float, face: str) -> None:
    axes.annotate(text, (0, at), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  va="center", fontsize=8, fontweight="bold", color=face, annotation_clip=False)  # fmt: skip


def _clear(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def strip(images: Tensor, across: int, like: Tensor) -> NDArray[np.uint8]:
    """[n, C, H, W] side by side, white where there are fewer than `across`: [H + 2, across * (W + 2), 3]."""
    shown = as_rgb(images.numpy()) if len(images) else np.zeros((0, *like.shape[2:], 3), np.uint8)
    shown = shown.copy()
    step = -(-max(shown.shape[1:3]) // WIDEST)
    if step > 1:
        shown = _shrunk(shown, step)
    framed = np.pad(shown, ((0, across - len(shown)), (1, 1), (1, 1), (0, 0)), constant_values=255)
    framed[len(shown) :] = 255
    return np.concatenate(list(framed), axis=1)


def _shrunk(images: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Smaller by a whole factor, antialiased."""
    from PIL import Image

    _, high, wide, _ = images.shape
    small = (max(1, wide // step), max(1, high // step))
    return np.stack([np.asarray(Image.fromarray(image).resize(small, Image.Resampling.LANCZOS)) for image in images])


# costs ----------------------------------------------------------------------------------------------------------------

COST_HEADS = (
    "Precision", "Held", "By component", "s/image", "Images/s a core", "Peak", "Load", "Accuracy %", "Off fp32",
)  # fmt: skip
COST_NOTES = (
    "Held: bytes of weights. s/image: wall time, median over batches after the first. Images/s a core: by CPU time. "
    "Peak: growth of memory while loading and generating. Accuracy: of a classifier trained on the clients' real "
    "images, on these. Off fp32: mean absolute difference from the fp32 images of the same seeds, in levels of 255."
)


def cost_rows(costs: Sequence[Cost]) -> list[tuple[str, ...]]:
    """The table, a row a precision under COST_HEADS; a failure says why in the third column."""
    return [
        (each.precision or "–", *(["–"] + [f"failed: {each.error}"] + ["–"] * 6))
        if each.error
        else (
            each.precision or "–",
            size(sum(each.bytes.values())),
            ", ".join(f"{name} {size(count)}" for name, count in each.bytes.items()),
            f"{each.seconds:.3g}",
            "–" if each.per_core is None else f"{each.per_core:.3g}",
            "–" if each.peak is None else size(each.peak),
            duration(each.load),
            _percent(each.accuracy),
            _number(each.difference),
        )
        for each in costs
    ]


def costs_markdown(costs: Sequence[Cost], machine: dict[str, object]) -> str:
    """The table, and what it was measured on."""
    on = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = ["| " + " | ".join(COST_HEADS) + " |", "|---|---:|---|" + "---:|" * (len(COST_HEADS) - 3)]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cost_rows(costs)]
    return "\n".join([*lines, "", COST_NOTES, "", f"Measured on: {on}.", ""])


def write_costs(costs: Sequence[Cost], machine: dict[str, object], folder: Path) -> dict[str, str]:
    """profile.json and profile.md in `folder`; returns the path of each. Raises StorageError."""
    write_json(folder / "profile.json", {"machine": machine, "precisions": [each.as_json() for each in costs]})
    write(folder / "profile.md", costs_markdown(costs, machine).encode())
    return {"json": str(folder / "profile.json"), "md": str(folder / "profile.md")}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero
