"""One self-contained HTML page of runs: it opens offline, and its content policy forbids it to load anything.

Text from files is escaped wherever it lands: in HTML, in the JSON that the page's script reads, and in plotly's labels,
which understand a few tags. Sections without data (no balancing, no pictures, no evaluated round yet) are left out.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

import fedkeel.report.plots as plots
from fedkeel.files import write
from fedkeel.options import build
from fedkeel.record import epsilon
from fedkeel.report.html import opening, own
from fedkeel.report.runs import Method, RunData, in_order, is_class, methods
from fedkeel.report.table import columns, duration, leader, percent, size, summarise

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_POLICY += "; form-action 'none'; base-uri 'none'"
_DASHES = ("solid", "dash", "dot")
_WIDEST = 96  # pixels of one picture on a contact sheet
_MOST = 240  # real pictures on a contact sheet, so that a hundred classes do not make a page of twenty megabytes

Figure = dict[str, object]


def write_page(runs: Sequence[RunData], path: Path | str, title: str | None = None) -> Path:
    """Write the page of these runs (finished or running) to `path`, whole or not at all.

    Raises StorageError when the file cannot be written.
    """
    path = Path(path)
    write(path, page(runs, title).encode())
    return path


def page(runs: Sequence[RunData], title: str | None = None) -> str:
    """The page as text, plotly.js included (about 5 MB)."""
    from plotly.offline import get_plotlyjs

    found = methods(runs)
    figures: dict[str, Figure] = {}
    sections = [
        _results(runs, found),
        _curves(found, figures),
        _classes(found, figures),
        _holdings(found, figures),
        _pictures(found),
        _cost(found, figures),
        _origins(runs),
    ]
    title = title or " · ".join(dict.fromkeys(method.label for method in found))
    return f"""{opening(title, _POLICY)}
{_header(runs, title)}
<main>
<noscript><p class="note">The charts of this page need JavaScript; the tables do not.</p></noscript>
{"".join(sections)}</main>
<footer>Written by fedkeel. Everything shown is inside this file.</footer>
<script type="application/json" id="figures">{_script_json(figures)}</script>
<script>{get_plotlyjs()}</script>
<script>
{own("page.js")}</script>
</body>
</html>
"""


def _header(runs: Sequence[RunData], title: str) -> str:
    facts = [
        ("Data", _each(_phrase(run.manifest.get("data")) for run in runs)),
        ("Clients", _each(str(_clients(run) or "") for run in runs)),
        ("Partition", _each(_partition(run) for run in runs)),
        ("Partition hash", _each(run.hash[:12] for run in runs)),
        ("Seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))),
        ("Generator", _each(_phrase(run.manifest.get("generator")) for run in runs)),
        ("Model", _each(_phrase(run.config.get("model")) for run in runs)),
        ("Privacy", _each(_privacy(run) for run in runs)),
        ("Robust", _each(_phrase(run.config.get("robust")) for run in runs)),
        ("Hardware", _each(_phrase(run.manifest.get("hardware")) for run in runs)),
        ("Versions", _each(_versions(run) for run in runs)),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts if text)
    behind = [run for run in runs if run.planned and (run.rounds[-1] if run.rounds else 0) < run.planned]
    note = ""
    if behind:
        where = "; ".join(
            f"{run.label}, seed {run.seed}: round {run.rounds[-1] if run.rounds else 0} of {run.planned}"
            for run in behind
        )
        note = f'<p class="note" role="status">Not finished, numbers so far. {escape(where)}</p>'
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"""<header><div>
<h1>{escape(title)}</h1>
<p>Federated learning on label-skewed data: {what}</p>
{note}
<dl class="facts">{listed}</dl>
</div></header>"""


def _results(runs: Sequence[RunData], found: Sequence[Method]) -> str:
    rows = summarise(runs)
    shown, winner = columns(rows), leader(rows)
    head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in shown)
    body = []
    for at, row in enumerate(rows):
        swatch = f'<span class="swatch" style="background:{plots.colour(at)}"></span>'
        cells = "".join(f"<td>{escape(column.show(row))}</td>" for column in shown[1:])
        mark = ' class="best"' if row is winner else ""
        body.append(f'<tr{mark}><th scope="row">{swatch}{escape(row.label)}</th>{cells}</tr>')
    spread = " ± the sample standard deviation over seeds" if any(row.std is not None for row in rows) else ""
    about = f"Accuracy is the mean over the last 10 evaluated rounds{spread}; traffic and time are those of one run."
    return _section(
        "Results",
        about,
        f'<div class="scroll" role="region" aria-label="Table of results" tabindex="0"><table class="results">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>",
    )


def _curves(found: Sequence[Method], figures: dict[str, Figure]) -> str:
    recorded = dict.fromkeys(name for method in found for name in method.metrics if not is_class(name))
    offered = [name for name in plots.NAMES if name in recorded]
    offered += [name for name in recorded if name not in plots.NAMES and not name.startswith(("bytes/", "seconds/"))]
    offered = [name for name in offered if any(run.series(name)[0] for method in found for run in method.runs)]
    if not offered:
        return ""
    for name in offered:
        figures[f"curve {name}"] = _curve(found, name)
    options = "".join(
        f'<option value="{escape("curve " + name)}">{escape(plots.NAMES.get(name, name))}</option>' for name in offered
    )
    ends = ", ".join(f"{method.label} {percent(method.mean())} %" for method in found if method.headlines())
    return _section(
        "Over rounds",
        "Lines are means over seeds, bands one standard deviation. Click a name to hide it, twice to see it alone.",
        f'<label for="metric">Show</label> <select id="metric">{options}</select>'
        + _chart(f"curve {offered[0]}", f"Line chart over rounds. Accuracy at the end: {ends}", "curve"),
    )


def _curve(found: Sequence[Method], metric: str) -> Figure:
    scale = 100 if plots.is_share(metric) else 1
    unit = " %" if scale == 100 else ""
    data: list[Figure] = []
    for at, method in enumerate(found):
        rounds, mean, std = method.curve(metric)
        if not rounds:
            continue
        face, name = plots.colour(at), _label(method.label)
        low = [round(scale * (m - s), 4) for m, s in zip(mean, std, strict=True)]
        high = [round(scale * (m + s), 4) for m, s in zip(mean, std, strict=True)]
        if any(std):
            data.append(
                {
                    "type": "scatter", "mode": "lines", "x": rounds + rounds[::-1], "y": high + low[::-1],
                    "fill": "toself", "fillcolor": _faint(face), "line": {"width": 0}, "hoverinfo": "skip",
                    "showlegend": False, "legendgroup": method.key, "name": name, "uid": f"band {method.key}",
                }
            )  # fmt: skip
        spread = f" ± %{{customdata:.2f}}{unit}" if any(std) else unit
        data.append(
            {
                "type": "scatter", "mode": "lines" if len(rounds) > 2 else "lines+markers", "x": rounds,
                "y": [round(scale * value, 4) for value in mean], "name": name, "legendgroup": method.key,
                "customdata": [round(scale * value, 4) for value in std], "uid": f"line {method.key}",
                "line": {"color": face, "width": 2.5, "dash": _DASHES[at // len(plots.PALETTE) % len(_DASHES)]},
                "hovertemplate": "%{y:.2f}" + spread,
            }
        )  # fmt: skip
    layout = _layout(430, "Round", plots.NAMES.get(metric, _label(metric)) + unit.replace(" %", " (%)"))
    if all(run.rounds[-1] <= 10 for method in found for run in method.runs if run.rounds):
        cast(Figure, layout["xaxis"])["dtick"] = 1
    return {"data": data, "layout": layout | {"hovermode": "x unified", "uirevision": "kept"}}


def _classes(found: Sequence[Method], figures: dict[str, Figure]) -> str:
    tables = [(at, method, values) for at, method in enumerate(found) if (values := method.per_class())]
    names = list(dict.fromkeys(name for _, _, values in tables for name in values))
    if not names:
        return ""
    data: list[object] = [
        {
            "type": "bar", "name": _label(method.label), "marker": {"color": plots.colour(at)},
            "x": [names.index(name) for name in values], "y": [round(100 * value, 2) for value in values.values()],
            "hovertemplate": "%{y:.2f} %",
        }
        for at, method, values in tables
    ]  # fmt: skip
    layout = _layout(400, "", "Accuracy (%)")
    layout["xaxis"] = {**_ticks(names), "automargin": True, "showgrid": False, "autotickangles": [0, -90]}
    layout |= {"barmode": "group", "bargap": 0.22, "hovermode": "x unified"}
    cast(Figure, layout["yaxis"])["range"] = [0, 100]
    figures["classes"] = {"data": data, "layout": layout}
    wide = len(names) * max(12, 4 * len(tables)) if len(names) > 24 else 0
    chart = _chart("classes", f"Bar chart of the accuracy of each of {len(names)} classes, by method")
    if wide:
        chart = (
            f'<div class="scroll" role="region" aria-label="Accuracy per class" tabindex="0">'
            f'<div style="min-width:{wide}px">{chart}</div></div>'
        )
    return _section("Per class", "Mean over the last 10 evaluated rounds and over seeds.", chart)


def _holdings(found: Sequence[Method], figures: dict[str, Figure]) -> str:
    panels: list[tuple[str, RunData, NDArray[np.int64], NDArray[np.int64] | None]] = []
    for run in plots.distinct(found):
        assert run.counts is not None
        panels.append((f"As partitioned, seed {run.seed}", run, run.counts, None))
    for method in found:
        run = method.runs[0]
        if run.balanced and run.real is not None:
            panels.append((f"Balanced by {method.label}, seed {run.seed}", run, run.real, run.fake))
    if not panels:
        return ""
    drawn = []
    for at, (heading, run, real, fake) in enumerate(panels):
        largest = int((real if fake is None else real + fake).max(initial=1))
        figures[f"holding {at}"] = _bubbles(real, fake, run.classes, largest)
        clients, classes = real.shape
        total = f"{real.sum():,} real" + ("" if fake is None else f" and {fake.sum():,} synthetic") + " samples"
        total += f"; the largest disc is {largest:,}"
        alt = f"{heading}: bubble chart of {clients} clients and {classes} classes, {total}"
        drawn.append(f"<div><h3>{escape(heading)}</h3><p>{total}</p>{_chart(f'holding {at}', alt)}</div>")
    many = any(real.shape[0] > 40 for _, _, real, _ in panels)
    return _section(
        "Who holds what",
        "Each disc is one client's samples of one class, its area their number.",
        f'<div class="pair{" large" if many else ""}">{"".join(drawn)}</div>',
    )


def _bubbles(real: NDArray[np.int64], fake: NDArray[np.int64] | None, classes: Sequence[str], largest: int) -> Figure:
    data: list[Figure] = []

    def trace(values: NDArray[np.int64], name: str, face: str) -> None:
        client, kind = np.nonzero(values)
        own, made = real[client, kind], np.zeros_like(client) if fake is None else fake[client, kind]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": name, "x": client.tolist(), "y": kind.tolist(),
                "customdata": np.stack([own, made], axis=1).tolist(), "legendrank": 2 if name == "synthetic" else 1,
                "hovertemplate": "client %{x}, %{y}<br>%{customdata[0]} real"
                + ("" if fake is None else ", %{customdata[1]} synthetic")
                + "<extra></extra>",
                "marker": {
                    "color": face, "opacity": 1, "size": values[client, kind].tolist(), "sizemode": "area",
                    "line": {"width": 0},
                },
            }
        )  # fmt: skip

    if fake is not None:
        trace(np.where(fake > 0, real + fake, 0), "synthetic", plots.FAKE)
    trace(real, "real", plots.REAL)
    clients, labels = real.shape
    longest = max((len(name) for name in classes), default=0)
    margin = {"l": 24 + 7 * min(longest, 18), "r": 10, "t": 34, "b": 48}
    layout = _layout((24 if labels <= 30 else 11) * labels + margin["t"] + margin["b"], "Client", "")
    layout["margin"] = margin
    layout["xaxis"] = {
        "title": {"text": "Client"},
        "range": [-0.7, clients - 0.3],
        "zeroline": False,
        "tickformat": "d",
    }
    if clients <= 12:
        cast(Figure, layout["xaxis"])["dtick"] = 1
    layout["yaxis"] = {**_ticks(classes), "range": [labels - 0.3, -0.7]}
    if labels > 30:
        cast(Figure, layout["yaxis"])["tickfont"] = {"size": 9}
    layout["hovermode"] = "closest"
    cells = {"clients": clients, "classes": labels, "largest": largest}
    return {"data": data, "layout": layout, "cells": cells}


def _pictures(found: Sequence[Method]) -> str:
    sheets: dict[str, list[str]] = {}  # methods that share a generator share a sheet
    for method in found:
        run = method.runs[0]
        if pair := run.pictures():
            sheets.setdefault(_sheet(*pair, run.classes), []).append(f"{method.label}, seed {run.seed}")
    if not sheets:
        return ""
    shown = "".join(f"<h3>{escape('; '.join(names))}</h3>{sheet}" for sheet, names in sheets.items())
    return _section(
        "Real beside synthetic",
        "",
        f'<p class="key"><span><i class="swatch" style="background:{plots.REAL}"></i>real</span>'
        f'<span><i class="swatch" style="background:{plots.FAKE}"></i>synthetic</span></p>{shown}',
    )


def _sheet(real: NDArray[np.uint8], fake: NDArray[np.uint8], classes: Sequence[str]) -> str:
    cards = []
    most = max(3, _MOST // max(len(classes), 1))
    for name, mine, made in zip(classes, real[:, :most], fake[:, :most], strict=True):
        word = escape(name)
        strips = _strip(mine, f"{len(mine)} real samples of {name}", "real") + _strip(
            made, f"{len(made)} synthetic samples of {name}", "fake"
        )
        cards.append(f"<figure><figcaption>{word}</figcaption><div>{strips}</div></figure>")
    sheet = f'<div class="sheet">{"".join(cards)}</div>'
    return sheet if len(classes) <= 20 else f"<details><summary>{len(classes)} classes</summary>{sheet}</details>"


def _strip(images: NDArray[np.uint8], alt: str, kind: str) -> str:
    """Images side by side as one PNG inside the page, with clear gaps; large ones are made smaller."""
    from PIL import Image

    if not len(images):
        return f'<div class="{kind}">none</div>'
    shown = plots.as_rgb(images)
    high, wide = shown.shape[1:3]
    shrink = min(1.0, _WIDEST / max(high, wide))
    tile = (max(round(wide * shrink), 1), max(round(high * shrink), 1))
    gap = max(tile[0] // 14, 1)
    strip = Image.new("RGBA", (len(shown) * (tile[0] + gap) - gap, tile[1]))
    for at, pixels in enumerate(shown):
        picture = Image.fromarray(pixels)
        strip.paste(
            picture if shrink == 1.0 else picture.resize(tile, Image.Resampling.LANCZOS), (at * (tile[0] + gap), 0)
        )
    file = io.BytesIO()
    strip.save(file, "PNG", optimize=True)
    coded = base64.b64encode(file.getvalue()).decode()
    coarse = ' class="coarse"' if max(tile) <= 40 else ""
    return (
        f'<div class="{kind}"><img{coarse} alt="{escape(alt)}" src="data:image/png;base64,{coded}" '
        f'width="{strip.width}" height="{strip.height}" style="height:auto"></div>'
    )


def _cost(found: Sequence[Method], figures: dict[str, Figure]) -> str:
    parts = []
    labels = [method.label for method in found]
    if any(name.startswith("bytes/") for method in found for name in method.metrics):
        data: list[object] = []
        for way, name, face in (("up", "clients to server", plots.UP), ("down", "to clients", plots.DOWN)):
            values = [method.bytes(way) for method in found]
            data.append(_bar(values, name, face, [size(value) for value in values], show=True))
        layout = _bars(labels, 74) | {"barmode": "group"}
        layout["xaxis"] = {"tickformat": "~s", "ticksuffix": "B", "nticks": 5, "rangemode": "tozero"}
        figures["bytes"] = {"data": data, "layout": layout}
        each = "; ".join(f"{m.label} {size(m.bytes('up'))} up, {size(m.bytes('down'))} down" for m in found)
        parts.append(f"<div><h3>Bytes sent</h3>{_chart('bytes', f'Bar chart of bytes: {each}')}</div>")
    times = [method.seconds() for method in found]
    if any(times):
        data = []
        for at, phase in enumerate(in_order(phase for table in times for phase in table)):
            values = [table.get(phase, 0.0) for table in times]
            face = plots.STAGES[at % len(plots.STAGES)]
            data.append(_bar(values, _label(phase), face, [duration(value) for value in values], show=False))
        layout = _bars(labels, 56) | {"barmode": "stack"}
        layout["xaxis"] = {"ticksuffix": " s", "nticks": 6, "rangemode": "tozero"}
        figures["seconds"] = {"data": data, "layout": layout}
        each = "; ".join(f"{m.label} {duration(sum(table.values()))}" for m, table in zip(found, times, strict=True))
        parts.append(f"<div><h3>Time by phase</h3>{_chart('seconds', f'Bar chart of seconds by phase: {each}')}</div>")
    if not parts:
        return ""
    return _section("What it cost", "One run, averaged over seeds.", f'<div class="pair">{"".join(parts)}</div>')


def _bar(values: Sequence[float], name: str, face: str, text: Sequence[str], show: bool) -> Figure:
    """Horizontal bars, one a method; `show` writes the text beside them, else it appears on hover."""
    bar: Figure = {
        "type": "bar", "orientation": "h", "x": [round(value, 3) for value in values], "y": list(range(len(values))),
        "name": name, "marker": {"color": face}, "hovertext": list(text), "hovertemplate": "%{hovertext}",
    }  # fmt: skip
    if show:
        bar |= {"text": list(text), "textposition": "auto", "insidetextanchor": "end", "textangle": 0}
    return bar


def _bars(labels: Sequence[str], each: int) -> Figure:
    layout = _layout(each * len(labels) + 110, "", "")
    layout["yaxis"] = {**_ticks(labels), "range": [len(labels) - 0.5, -0.5], "automargin": True}
    return layout | {"hovermode": "closest", "bargap": 0.3}


def _origins(runs: Sequence[RunData]) -> str:
    """Where every number comes from, and what failed."""
    heads = ("Method", "Seed", "Rounds", "Partition hash", "Started", "Folder", "Versions")
    lines = [
        (
            run.label,
            str(run.seed),
            f"{len(run.rounds)}" + (f" of {run.planned}" if run.planned else ""),
            run.hash[:12] or "–",
            str(run.manifest.get("started", "–")),
            run.folder.name,
            _versions(run),
        )
        for run in runs
    ]
    parts = _words_table("Runs", heads, lines)
    failed = [
        (run.label, str(run.seed), str(failure.round), failure.client, failure.reason)
        for run in runs
        for failure in run.failed
    ]
    if failed:
        table = _words_table("Failed updates", ("Method", "Seed", "Round", "Client", "Reason"), failed[:200])
        more = f"<p>and {len(failed) - 200} more</p>" if len(failed) > 200 else ""
        many = "1 update was" if len(failed) == 1 else f"{len(failed)} updates were"
        parts += f"<details><summary>{many} lost</summary>{table}{more}</details>"
    return _section(
        "Runs", "Each line is a folder with its configuration; run that again and get the same numbers.", parts
    )


def _words_table(name: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table class="words">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _section(heading: str, about: str, content: str) -> str:
    text = f"<p>{about}</p>" if about else ""
    return f"<section><h2>{heading}</h2>{text}{content}</section>\n"


def _chart(figure: str, alt: str, key: str = "") -> str:
    name = f' id="{key}"' if key else ""
    return f'<div class="chart"{name} data-figure="{escape(figure)}" role="figure" aria-label="{escape(alt)}"></div>'


def _layout(height: int, x: str, y: str) -> Figure:
    return {
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 34, "b": 48},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.0,
            "yanchor": "bottom",
            "itemsizing": "constant",
            "traceorder": "normal",
        },
        "showlegend": True,
        "xaxis": {"title": {"text": x}, "zeroline": False, "showgrid": False},
        "yaxis": {"title": {"text": y}, "zeroline": False, "automargin": True},
    }


def _ticks(names: Sequence[str]) -> Figure:
    """Positions 0, 1, ... with names: two classes of one name stay two."""
    short = [_label(name if len(name) <= 18 else name[:17] + "…") for name in names]
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": short, "zeroline": False}


def _label(text: str) -> str:
    """Text for plotly, which reads a few tags and entities."""
    return escape(text, quote=False)


def _faint(face: str) -> str:
    red, green, blue = (int(face[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def _script_json(value: object) -> str:
    """JSON that cannot end its script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _each(texts: Iterable[str]) -> str:
    """What the runs say, once each."""
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _phrase(value: object) -> str:
    """A table of a manifest in words, its name first; hashes are cut, tables, lists and blanks inside it left out."""
    if isinstance(value, Mapping):
        table = {str(key): _phrase(item) for key, item in value.items() if not isinstance(item, Mapping)}
        rest = [f"{key} {text}" for key, text in table.items() if text and key != "name"]
        return ", ".join(text for text in (table.get("name"), *rest) if text)
    if value is None or value is False or isinstance(value, list):
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{20,}", text) else text


def _versions(run: RunData) -> str:
    commit = {"commit": run.manifest.get("commit")}
    return ", ".join(text for text in (_phrase(run.manifest.get("versions")), _phrase(commit)) if text)


def _clients(run: RunData) -> int | None:
    clients = run.config.get("clients")
    return clients if isinstance(clients, int) else None if run.counts is None else len(run.counts)


def _privacy(run: RunData) -> str:
    """What clients were promised and what it came to; "" without [privacy]."""
    table, clients = run.config.get("privacy"), _clients(run)
    if not isinstance(table, Mapping) or clients is None:
        return ""
    from fedkeel.privacy import Privacy  # brings torch, which a page needs for nothing else

    options = build(Privacy, table, "privacy")
    text = f"clip {options.clip:g}, noise multiplier {options.noise_multiplier:g}"
    rounds, values = run.series("privacy/epsilon")
    known = run.series("privacy/epsilon_known")[1]
    if not values or not known:
        return f"{text}: no bound on epsilon"
    far = f"epsilon {epsilon(values[-1])} ({epsilon(known[-1])} where it is known who took part)"
    seeded = ", noise from the seed" if options.randomness == "seed" else ""
    return f"{far} at delta {options.delta_of(clients):.3g} after {rounds[-1]} rounds; {text}{seeded}"


def _partition(run: RunData) -> str:
    table = run.config.get("partition") or run.partition or {}
    assert isinstance(table, Mapping)
    return _phrase({key: value for key, value in table.items() if key not in ("hash", "seed", "data", "format")})
