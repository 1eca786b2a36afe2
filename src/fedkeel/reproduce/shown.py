"""A table as it is shown: our mean and deviation beside the printed ones, and below it why the two may differ.

`show` makes plain values of the cells; `as_text`, `as_markdown`, `as_html` and `as_json` write them.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from itertools import combinations
from statistics import fmean, stdev
from string import ascii_lowercase
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fedkeel.comparison import differing
from fedkeel.report.table import duration
from fedkeel.reproduce.cells import Outcome, of_one_make
from fedkeel.reproduce.tables import HEADLINE, Column, Experiment, L, Row

if TYPE_CHECKING:
    from rich.table import Table

Place = tuple[str, str]
"""A row and a column, by their keys."""
_NAMED = ("fedkeel", "torch")
"""Whose versions stand below a table; all others stand in the cells."""
_FEW = 3
"""Keys named of a configuration that changed; commits named of several."""
_LONG = 34
"""Characters after which a terminal's label goes on in the next line."""


@dataclass(frozen=True)
class Spot:
    """A row in a column. ours: what seeds came to; printed: mean and deviation, or mean alone, as the paper has them:
    both in per cent. wanted: seeds; none where the profile does not run it. stale, failed: which of these. mark: the
    letter of the printed number's footnote. best, printed_best: of its column, or of its row (`Experiment.best`)."""

    wanted: tuple[int, ...] = ()
    ours: Mapping[int, float] = field(default_factory=dict)
    printed: tuple[float, ...] = ()
    stale: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    mark: str = ""
    best: bool = False
    printed_best: bool = False

    @property
    def mean(self) -> float | None:
        """Over the seeds that are done."""
        return fmean(self.ours.values()) if self.ours else None

    @property
    def std(self) -> float | None:
        """The sample standard deviation; None with fewer than two seeds."""
        return stdev(self.ours.values()) if len(self.ours) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less the printed one, in points."""
        return None if self.mean is None or not self.printed else self.mean - self.printed[0]

    @property
    def state(self) -> str:
        """What is to be said beside the number, or in its place: "2/3" for two of three seeds, "stale", "failed",
        "missing", "not run"; "" where all is done."""
        if not self.wanted:
            return "not run"
        if not self.ours:
            return "failed" if self.failed else "stale" if self.stale else "missing"
        return "" if len(self.ours) == len(self.wanted) else f"{len(self.ours)}/{len(self.wanted)}"


@dataclass(frozen=True)
class Head:
    """A row or a column. own: the paper does not have it. metric: what a row shows."""

    key: str
    label: str
    own: bool = False
    metric: str = HEADLINE


@dataclass(frozen=True)
class Reason:
    """Why numbers differ from the printed ones, or what runs warned of. where: the rows and columns that it holds for;
    "" for all."""

    text: str
    where: str = ""


@dataclass(frozen=True)
class Drawn:
    """A picture of a table. kind, title: as its experiment file has them. file: its name beside table.html, "" where
    there is none, which `missing` explains; png: what is in it. alt: what it shows, in words; caption: its numbers."""

    kind: str
    title: str
    file: str
    alt: str
    caption: str = ""
    png: bytes = field(default=b"", repr=False)
    missing: str = ""


@dataclass(frozen=True)
class Shown:
    """A table. order: by column, how many pairs of methods stand in the paper's order, and of how many. absent: what
    the profile leaves out. footnotes: by letter. done, wanted: cells; borrowed: those that are runs of other cells.
    stale, failed: cells, and what differs or went wrong. warnings: of runs, and of which. cpu_hours: of this table's
    own runs; gpu_hours: of the clock, for those on a GPU. dates: first and last day on which a run was started."""

    name: str
    title: str
    paper: str
    profile: str
    seeds: tuple[int, ...]
    rows: tuple[Head, ...]
    columns: tuple[Head, ...]
    spots: Mapping[Place, Spot]
    digits: int
    order: Mapping[str, tuple[int, int]]
    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]
    footnotes: Mapping[str, str]
    absent: tuple[str, ...]
    stale: tuple[str, ...]
    failed: tuple[str, ...]
    warnings: tuple[Reason, ...]
    done: int
    wanted: int
    borrowed: int
    generators: tuple[str, ...]
    versions: tuple[str, ...]
    hardware: tuple[str, ...]
    cpu_hours: float
    gpu_hours: float
    dates: tuple[str, ...]
    pictures: tuple[Drawn, ...] = ()

    @property
    def comparable(self) -> bool:
        """Whether ours may be compared with the printed numbers."""
        return self.profile == "paper"

    @property
    def printed(self) -> bool:
        """Whether the paper has a number of any of it."""
        return any(spot.printed for spot in self.spots.values())

    @property
    def warning(self) -> str:
        """What a reader has to know first."""
        if self.comparable:
            return ""
        return (
            f"Profile {self.profile}: only the profile paper may be compared with the printed numbers. "
            "They stand here for the order of the methods."
        )


def show(found: Experiment, profile: str, outcomes: Sequence[Outcome]) -> Shown:
    """The table of these cells, at least one: rows, columns and seeds are those that they have."""
    outcomes = of_one_make(outcomes)
    rows = _in_order(found.rows, {each.cell.row.key for each in outcomes})
    columns = _in_order(found.columns, {each.cell.column.key for each in outcomes})
    by_place: dict[Place, list[Outcome]] = {}
    for each in outcomes:
        by_place.setdefault((each.cell.row.key, each.cell.column.key), []).append(each)
    letters: dict[str, str] = {}
    places = [(row, column) for row in rows for column in columns]
    spots = {(r.key, c.key): _spot(found, r, c, by_place.get((r.key, c.key), []), letters) for r, c in places}
    done = [each.found for each in outcomes if each.state == "done" and each.found is not None]
    own = [each for each in done if "same_as" not in each]
    numbers = [number for line in found.printed.values() for printed in line.values() for number in printed]
    days = sorted(str(each["started"])[:10] for each in done)
    return Shown(
        name=found.name,
        title=found.title,
        paper=found.paper,
        profile=profile,
        seeds=tuple(sorted({each.cell.seed for each in outcomes})),
        rows=tuple(Head(r.key, r.label, bool(numbers) and not found.printed.get(r.key), r.metric) for r in rows),
        columns=tuple(Head(column.key, found.head(column.key, profile)) for column in columns),
        spots=_with_best(_compared(found, rows, columns), spots),
        digits=max((len(repr(number).partition(".")[2]) for number in numbers), default=2),
        order={column.key: pairs for column in columns if (pairs := _order(rows, column, spots))[1]},
        reasons=_reasons(found, profile, rows, columns, by_place),
        notes=found.notes,
        footnotes={letter: text for text, letter in letters.items()},
        absent=_absent(found, profile),
        stale=tuple(f"{_called(each)}: {_differs(each)}" for each in outcomes if each.state == "stale"),
        failed=tuple(f"{_called(each)}: {each.error}" for each in outcomes if each.state == "failed"),
        warnings=_warnings(rows, columns, by_place),
        done=len(done),
        wanted=len(outcomes),
        borrowed=len(done) - len(own),
        generators=_once(f"{g['name']} {g['fingerprint'][:12]}" for each in done if (g := each["generator"])),
        versions=_versions(done),
        hardware=_once(each["hardware"]["gpu"] or each["hardware"]["processor"] for each in done),
        cpu_hours=sum(each["cpu_seconds"] for each in own) / 3600,
        gpu_hours=sum(each["seconds"] for each in own if each["hardware"]["gpu"]) / 3600,
        dates=tuple(dict.fromkeys((days[0], days[-1]))) if days else (),
    )


# what is collected ----------------------------------------------------------------------------------------------------


def _in_order(lines: Mapping[str, L], keys: Collection[str]) -> list[L]:
    return [line for key, line in lines.items() if key in keys]


def _spot(found: Experiment, row: Row, column: Column, outcomes: Sequence[Outcome], letters: dict[str, str]) -> Spot:
    """letters: of footnotes, by their texts; a new text gets the next one."""
    values = {each.cell.seed: each.headline() for each in outcomes}
    printed, text = found.printed_at(row.key, column.key)
    return Spot(
        wanted=tuple(values),
        ours={seed: 100 * value for seed, value in values.items() if value is not None},
        printed=printed,
        stale=tuple(each.cell.seed for each in outcomes if each.state == "stale"),
        failed=tuple(each.cell.seed for each in outcomes if each.state == "failed"),
        mark=letters.setdefault(text, _letter(len(letters))) if text else "",
    )


def _letter(number: int) -> str:
    """a to z, then aa to az, ba ..."""
    before, last = divmod(number, len(ascii_lowercase))
    return (_letter(before - 1) if before else "") + ascii_lowercase[last]


def _with_best(compared: Sequence[Sequence[Place]], spots: Mapping[Place, Spot]) -> dict[Place, Spot]:
    """The same, where the highest of those that are compared with one another are marked."""
    out = dict(spots)
    for places in compared:
        ours = {place: round(mean, 2) for place in places if (mean := spots[place].mean) is not None}
        printed = {place: spots[place].printed[0] for place in places if spots[place].printed}
        for place in places:
            best, printed_best = (
                len(values) > 1 and values.get(place) == max(values.values()) for values in (ours, printed)
            )
            out[place] = replace(spots[place], best=best, printed_best=printed_best)
    return out


def _compared(found: Experiment, rows: Sequence[Row], columns: Sequence[Column]) -> list[list[Place]]:
    """The places of each column, of one metric and group where rows have several; those of each row where it chooses
    among columns."""
    if found.best == "row":
        return [[(row.key, column.key) for column in columns] for row in rows]
    kinds = {(row.metric, row.group) for row in rows}
    return [
        [(row.key, column.key) for row in rows if (row.metric, row.group) == kind]
        for column in columns
        for kind in kinds
    ]


def _order(rows: Sequence[Row], column: Column, spots: Mapping[Place, Spot]) -> tuple[int, int]:
    """Pairs of rows of one metric and group in the paper's order, and of how many, on the seeds that both have; printed
    numbers with a mark are left out."""
    known = [(row, spot) for row in rows if (spot := spots[row.key, column.key]).difference is not None]
    gaps = [
        (first.printed[0] - second.printed[0], sum(first.ours[seed] - second.ours[seed] for seed in common))
        for (one, first), (other, second) in combinations(known, 2)
        if (one.metric, one.group) == (other.metric, other.group)
        and not (first.mark or second.mark)
        and first.printed[0] != second.printed[0]
        and (common := sorted(first.ours.keys() & second.ours.keys()))
    ]
    return sum(printed * ours > 0 for printed, ours in gaps), len(gaps)


def _reasons(
    found: Experiment,
    profile: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    outcomes: Mapping[Place, Sequence[Outcome]],
) -> tuple[Reason, ...]:
    """What departs from the paper, each text once, as the table's files have it now: a cell that is done has their
    configuration, whatever words were kept with it. Then updates of clients that were lost."""
    holds: dict[str, dict[Place, None]] = {}
    for text in found.departures(profile):
        holds.setdefault(text, {}).update(dict.fromkeys(outcomes))
    for at, lines in enumerate((rows, columns)):
        for line in lines:
            if line.note:
                holds.setdefault(line.note, {}).update({place: None for place in outcomes if place[at] == line.key})
    for place, each in outcomes.items():
        lost = [(o.cell.seed, o.found["failed"]) for o in each if o.state == "done" and o.found and o.found["failed"]]
        if lost:
            counts = ", ".join(f"{count} (seed {seed})" for seed, count in sorted(lost))
            holds.setdefault(f"client updates that failed, and were left out of their rounds: {counts}", {})[place] = (
                None
            )
    return _by_place(holds, rows, columns, outcomes)


def _warnings(
    rows: Sequence[Row], columns: Sequence[Column], outcomes: Mapping[Place, Sequence[Outcome]]
) -> tuple[Reason, ...]:
    """What runs warned of, each text once."""
    holds: dict[str, dict[Place, None]] = {}
    for place, each in outcomes.items():
        done = [o.found for o in each if o.state == "done" and o.found]
        for found in done:
            for text in found.get("warnings", ()):  # earlier versions kept none
                holds.setdefault(text, {})[place] = None
    return _by_place(holds, rows, columns, outcomes)


def _by_place(
    holds: Mapping[str, Mapping[Place, None]], rows: Sequence[Row], columns: Sequence[Column], places: Collection[Place]
) -> tuple[Reason, ...]:
    labels = {line.key: line.label for line in (*rows, *columns)}
    return tuple(Reason(text, _where(list(there), list(places), labels)) for text, there in holds.items())


def _where(places: Sequence[Place], all_places: Sequence[Place], labels: Mapping[str, str]) -> str:
    """In words: whole rows or columns where it can be said so; "" for everything."""
    if len(places) == len(all_places):
        return ""
    for at in (0, 1):
        keys = dict.fromkeys(place[at] for place in places)
        if len(places) == sum(place[at] in keys for place in all_places):
            return "; ".join(labels[key] for key in keys)
    return "; ".join(f"{labels[row]} in {labels[column]}" for row, column in places)


def _absent(found: Experiment, profile: str) -> tuple[str, ...]:
    """What of the table this profile does not have."""
    rows, columns = found.lines(profile)
    there = [row for row in rows if any(column.has(row, profile) for column in columns)]
    left = {
        "rows": [row.label for row in found.rows.values() if row not in there],
        "columns": [column.label for column in found.columns.values() if column not in columns],
    }
    return tuple(f"{what} that this profile leaves out: {'; '.join(labels)}" for what, labels in left.items() if labels)


def _differs(outcome: Outcome) -> str:
    """The first keys of the configuration that a stale cell was run with otherwise."""
    assert outcome.found is not None
    if outcome.apart:
        most = {"data": "other data than most cells of its column", "generator": "another generator than most seeds"}
        other = outcome.found[outcome.apart]["fingerprint"][:12]
        file = outcome.found.get("same_as", "")
        told = f"its file and that of {file}, the same run" if file else "its file"
        return f"run with {most[outcome.apart]}, {other}: remove {told}, and it is run again"
    found = differing(outcome.cell.config, outcome.found["config"])
    texts = [f"{key} = {_toml(after)}, run with {_toml(before)}" for key, after, before in found[:_FEW]]
    more = f" and {len(found) - _FEW} more" if len(found) > _FEW else ""
    return "; ".join(texts) + more or "run by another version, to which the same keys meant something else"


def _toml(value: object) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _called(outcome: Outcome) -> str:
    cell = outcome.cell
    return f"{cell.row.label}, {cell.column.label}, seed {cell.seed}"


def _versions(done: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Of the packages that decide most, and the commits."""
    versions = [f"{name} {each['versions'][name]}" for each in done for name in _NAMED if name in each["versions"]]
    commits = _once(str(each["commit"])[:9] for each in done if each["commit"])
    more = f" and {len(commits) - _FEW} more" if len(commits) > _FEW else ""
    unknown = sum(not each["commit"] for each in done)
    return (
        *_once(versions),
        *([f"commit {', '.join(commits[:_FEW])}{more}"] if commits else []),
        *([f"{unknown} cells without a commit"] if unknown and commits else []),
    )


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


# in words -------------------------------------------------------------------------------------------------------------


def _ours(spot: Spot) -> str:
    if spot.mean is None:
        return spot.state
    text = f"{spot.mean:.2f}" if spot.std is None else f"{spot.mean:.2f} ± {spot.std:.2f}"
    return f"{text} ({spot.state})" if spot.state else text


def _printed(spot: Spot, digits: int) -> str:
    return " ± ".join(f"{number:.{digits}f}" for number in spot.printed)


def _difference(spot: Spot) -> str:
    return "" if spot.difference is None else f"{spot.difference:+.2f}".replace("-", "−")


def _label(row: Head) -> str:
    return f"{row.label} (ours)" if row.own else row.label


LEGEND = (
    "Accuracy in per cent: of a run the mean over the last 10 evaluated rounds (of personal models' best so far the "
    "last one), of seeds mean ± sample standard deviation. Bold: the highest of a column, in tables "
    "of learning rates of a row."
)


def _placed(reason: Reason) -> str:
    return f"{reason.where}: {reason.text}" if reason.where else reason.text


def below(shown: Shown) -> list[tuple[str, list[str]]]:
    """What stands below the table: headings and lines. Those without lines are left out."""
    order = [
        f"{column.label}: {shown.order[column.key][0]} of {shown.order[column.key][1]} pairs"
        for column in shown.columns
        if column.key in shown.order
    ]
    reasons = [_placed(each) for each in shown.reasons]
    rows = [row.label for row in shown.rows if row.own]
    notes = [*shown.notes, *([f"not in the paper, hence marked as ours: {'; '.join(rows)}"] if rows else [])]
    marks = [f"[{letter}] {text}" for letter, text in shown.footnotes.items()]
    parts = [
        ("Departures from the paper", [*reasons, *shown.absent]),
        ("Pictures", [f"{each.title}: {each.missing or f'{each.caption} ({each.file})'}" for each in shown.pictures]),
        ("Printed numbers", marks),
        ("Notes", notes),
        ("Methods in the paper's order", order),
        ("Stale: counted nowhere", list(shown.stale)),
        ("Failed", list(shown.failed)),
        ("Warnings", [_placed(each) for each in shown.warnings]),
        ("Made with", [f"{name}: {text}" for name, text in facts(shown)]),
    ]
    return [(heading, lines) for heading, lines in parts if lines]


def facts(shown: Shown) -> list[tuple[str, str]]:
    """Where the numbers come from, by name."""
    spent = ", ".join(
        f"{duration(3600 * hours)} of {what}"
        for hours, what in ((shown.cpu_hours, "CPU time"), (shown.gpu_hours, "a GPU"))
        if hours
    )
    borrowed = f" ({shown.borrowed} of them are runs of other cells, of the same configuration)"
    found = [
        ("Profile", shown.profile),
        ("Cells", f"{shown.done} of {shown.wanted} done" + borrowed * bool(shown.borrowed) if shown.wanted else ""),
        ("Seeds", ", ".join(map(str, shown.seeds))),
        ("Spent", spent),
        ("Generator", "; ".join(shown.generators)),
        ("Hardware", "; ".join(shown.hardware)),
        ("Versions", ", ".join(shown.versions)),
        ("Run", " to ".join(shown.dates)),
    ]
    return [(name, text) for name, text in found if text]


# writers --------------------------------------------------------------------------------------------------------------


def as_text(shown: Shown, width: int) -> list[Table]:
    """For a terminal of that many columns: as many tables as are needed side by side; print them with rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def lines(row: Head, spot: Spot) -> Text:
        ours = Text(_ours(spot), "bold" if spot.best else "")
        if row.own or not shown.printed:
            return ours
        mark = f"[{spot.mark}]" if spot.mark else ""
        printed = Text(_printed(spot, shown.digits) + mark, "bold dim" if spot.printed_best else "dim")
        apart = [Text(_difference(spot), "dim")] if shown.comparable else []
        return Text("\n").join([ours, printed, *apart])

    beside = ("\n  printed" + "\n  difference" * shown.comparable) * shown.printed
    labels = [
        Text(fill(_label(row), _LONG) if row.own else row.label).append("" if row.own else beside, "dim")
        for row in shown.rows
    ]
    room = width - 4 - max(len(line) for label in labels for line in label.plain.split("\n"))
    blocks: list[list[tuple[Text, list[Text]]]] = [[]]
    left = room
    for column in shown.columns:
        head = Text(column.label.replace(" (", "\n("))
        cells = [lines(row, shown.spots[row.key, column.key]) for row in shown.rows]
        wide = 3 + max(len(line) for text in (*cells, head) for line in text.plain.split("\n"))
        if wide > left and blocks[-1]:
            blocks.append([])
            left = room
        blocks[-1].append((head, cells))
        left -= wide
    out = []
    for block in blocks:
        table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, padding=(0, 2, 0, 0))
        table.add_column("", no_wrap=True)
        for head, _ in block:
            table.add_column(head, justify="right", no_wrap=True)
        for at, label in enumerate(labels):
            table.add_row(label, *(cells[at] for _, cells in block))
        out.append(table)
    return out


def as_markdown(shown: Shown) -> str:
    """A page in Markdown."""
    legend = f" {LEGEND} In italics: as printed." if shown.rows else ""
    lines = [f"# {shown.title}", "", f"{shown.paper}.{legend}", ""]
    lines += [f"**{shown.warning}**", ""] if shown.warning else []
    lines += matrix(shown)
    for each in shown.pictures:
        image = f"![{each.alt}]({each.file})\n\n{each.caption}" if each.file else f"Not drawn: {each.missing}"
        lines += ["", f"## {each.title}", "", image]
    for heading, texts in below(shown):
        if heading != "Pictures":
            lines += ["", f"## {heading}", "", *(f"- {text}" for text in texts)]
    return "\n".join([*lines, ""])


def matrix(shown: Shown) -> list[str]:
    """The table itself in Markdown: ours in the first line of a cell, the printed number in italics below it; no line
    of a table without rows."""

    def cell(spot: Spot) -> str:
        mark = f" [{spot.mark}]" if spot.mark else ""
        stars = "***" if spot.printed_best else "*"
        printed = f"<br>{stars}{_printed(spot, shown.digits)}{stars}{mark}" if spot.printed else ""
        apart = f"<br>{_difference(spot)}" if shown.comparable and spot.difference is not None else ""
        return (f"**{_ours(spot)}**" if spot.best else _ours(spot)) + printed + apart

    def plain(text: str) -> str:
        return text.replace("|", r"\|").replace("\n", " ")

    if not shown.rows:
        return []
    lines = ["| " + " | ".join(["", *(plain(column.label) for column in shown.columns)]) + " |"]
    lines.append("|---" + "|---:" * len(shown.columns) + "|")
    for row in shown.rows:
        cells = [plain(_label(row)), *(cell(shown.spots[row.key, column.key]) for column in shown.columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
_STYLE = """.results td { vertical-align: top; }
.results th:first-child { position: sticky; left: 0; background: var(--card); white-space: normal; }
.results tbody th { min-width: 7em; max-width: 16em; }
.results tbody th.own { background: var(--mark); }
.results small { display: block; color: var(--soft); font-size: 0.84rem; font-weight: 400; }
.results i { font-style: normal; font-size: 0.78rem; color: var(--warn-ink); background: var(--warn); }
.results i { border-radius: 6px; padding: 1px 6px; margin-left: 4px; }
.results sup { line-height: 0; }
li { margin: 3px 0; overflow-wrap: anywhere; }
figure { margin: 8px 0 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; display: block; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 8px; max-width: 90ch; overflow-wrap: anywhere; }
ul { padding-left: 1.2em; margin: 6px 0 0; max-width: 90ch; }
"""


def as_html(shown: Shown) -> str:
    """A page of its own that opens offline and may load nothing."""
    from fedkeel.report.html import opening

    def cell(spot: Spot) -> str:
        ours = "" if spot.mean is None else escape(_ours(replace(spot, wanted=tuple(spot.ours))))
        state = f"<i>{escape(spot.state)}</i>" if spot.state else ""
        mark = f"<sup>{spot.mark}</sup>" if spot.mark else ""
        printed = f"{_bold(_printed(spot, shown.digits), spot.printed_best)}{mark}" if spot.printed else ""
        apart = f"<small>{_difference(spot)}</small>" if shown.comparable and spot.difference is not None else ""
        return f"<td>{_bold(ours, spot.best)}{state}<small>{printed}</small>{apart}</td>"

    def label(row: Head) -> str:
        beside = "ours" if row.own else ("printed" + "<br>difference" * shown.comparable) * shown.printed
        return f'<th scope="row"{" class=own" * row.own}>{escape(row.label)}<small>{beside}</small></th>'

    head = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in shown.columns)
    body = "".join(
        f"<tr>{label(row)}{''.join(cell(shown.spots[row.key, column.key]) for column in shown.columns)}</tr>"
        for row in shown.rows
    )
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts(shown))
    note = f'<p class="note" role="status">{escape(shown.warning)}</p>' if shown.warning else ""
    sections = "".join(
        f"<section><h2>{heading}</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul></section>\n"
        for heading, texts in below(shown)
        if heading not in ("Made with", "Pictures")
    )
    table = f"""<section><h2>{escape(shown.name)}</h2><p>{LEGEND}</p>
<div class="scroll" role="region" aria-label="{escape(shown.title)}" tabindex="0"><table class="results">
<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></section>
"""
    pictures = "".join(map(_figure, shown.pictures))
    return f"""{opening(shown.name, _POLICY).replace("</style>", _STYLE + "</style>")}
<header><div>
<h1>{escape(shown.title)}</h1>
<p>{escape(shown.paper)}</p>
{note}
<dl class="facts">{listed}</dl>
</div></header>
<main>
{table if shown.rows else ""}{pictures}{sections}</main>
<footer>Written by fedkeel reproduce. Everything shown is inside this file.</footer>
</body>
</html>
"""


def as_json(shown: Shown) -> dict[str, object]:
    """Plain values: everything of the table, its cells by row and column."""
    table = asdict(shown)
    table["spots"] = {
        row.key: {
            column.key: {
                **asdict(spot := shown.spots[row.key, column.key]),
                **{name: getattr(spot, name) for name in ("mean", "std", "difference", "state")},
            }
            for column in shown.columns
        }
        for row in shown.rows
    }
    table["pictures"] = [{key: value for key, value in each.items() if key != "png"} for each in table["pictures"]]
    return {**table, "comparable": shown.comparable}


def _figure(drawn: Drawn) -> str:
    """A picture on a page, inside it."""
    if not drawn.file:
        return f"<section><h2>{escape(drawn.title)}</h2><p>Not drawn: {escape(drawn.missing)}</p></section>\n"
    return (
        f'<section><h2>{escape(drawn.title)}</h2><figure><img alt="{escape(drawn.alt)}" '
        f'src="data:image/png;base64,{b64encode(drawn.png).decode()}">'
        f"<figcaption>{escape(drawn.caption)}</figcaption></figure></section>\n"
    )


def _bold(text: str, yes: bool) -> str:
    return f"<b>{text}</b>" if yes else text
