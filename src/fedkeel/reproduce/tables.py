"""The tables and figures of both papers, read from `experiments/<name>.toml`, and the runs that they are made of.

A file holds rows (methods), columns (data and settings) and the printed numbers. What a row and a column set is laid
over a protocol, which is an ordinary configuration: `protocols.toml` says which one each profile takes, how many seeds,
where it departs from the paper, and what `data = "cifar10"` means in it. A cell is one row, one column and one seed,
hence one run.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from fedkeel.config import Config, Table, parse, with_method
from fedkeel.errors import ConfigError, UnknownName, nearest

PROFILES = ("paper", "reduced", "smoke")
PROTOCOLS = "protocols"
HEADLINE = "global/accuracy"


@dataclass(frozen=True)
class Line:
    """A row or a column. label: as the paper writes it. only: the profiles that have it. settings: what it sets in a
    configuration, by profile, "" for all of them. note: what a reader of the table has to know of it."""

    key: str
    label: str
    only: tuple[str, ...] = PROFILES
    settings: Mapping[str, Table] = field(default_factory=dict)
    note: str = ""

    def over(self, table: Table, profile: str) -> dict[str, object]:
        """`table` with what this line sets in this profile."""
        return laid(laid(table, self.settings.get("", {})), self.settings.get(profile, {}))


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Row(Line):
    """method: as `fedkeel compare` reads it, such as "fbl(25%)". metric: what the row shows. group: only rows of one
    group are compared with each other, such as those of equal local epochs. rate: the row that was tuned for its
    learning rate; its own key unless named. columns: where it has a cell; everywhere where none are named."""

    method: str = ""
    metric: str = HEADLINE
    group: str = ""
    rate: str = ""
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Column(Line):
    """data: a data set of `protocols.toml`. rows: by profile, the rows that it has there; all where none are named.
    like: the column that it is another reading of: what it does not say itself is that one's, and so are the printed
    numbers and marks."""

    data: str = ""
    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    like: str = ""

    def has(self, row: Row, profile: str) -> bool:
        """Whether this row has a cell here."""
        if row.columns and self.key not in row.columns and self.like not in row.columns:
            return False
        return profile not in self.rows or row.key in self.rows[profile]


@dataclass(frozen=True)
class Protocol:
    """What a family of tables runs by in one profile. base: a configuration of `experiments/`. departures: from the
    paper, in words; training: those of how models are trained, which figures without runs do not have. rates: learning
    rates by row, chosen on a validation part of the train images."""

    base: str
    seeds: tuple[int, ...]
    departures: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A table or figure. printed: [mean, deviation] or [mean] in per cent by row and column, as the paper has them.
    marks: by "row.column", "row" or "column", why a printed number cannot be relied on; "" where a column that is like
    another does not share its mark. runs: false for a figure that
    is drawn from data or images alone. pictures: as in `pictures.Picture`. best: where the highest number is marked, in
    each column or in each row."""

    name: str
    title: str
    paper: str
    family: str
    rows: Mapping[str, Row]
    columns: Mapping[str, Column]
    printed: Mapping[str, Mapping[str, Sequence[float]]]
    marks: Mapping[str, str]
    notes: tuple[str, ...]
    seeds: Mapping[str, tuple[int, ...]]
    runs: bool
    pictures: Sequence[Mapping[str, Any]]
    best: str = "column"

    def protocol(self, profile: str) -> Protocol:
        """Of this table's family. Raises ConfigError for an unknown profile."""
        if profile not in PROFILES:
            raise ConfigError("--profile", profile, f"must be one of {', '.join(PROFILES)}", nearest(profile, PROFILES))
        found = protocols()[self.family][profile]
        return replace(found, seeds=self.seeds[profile]) if profile in self.seeds else found

    def departures(self, profile: str) -> tuple[str, ...]:
        """Those of the whole table, in words."""
        protocol = self.protocol(profile)
        return (*(protocol.training if self.runs else ()), *protocol.departures)

    def lines(self, profile: str) -> tuple[list[Row], list[Column]]:
        """The rows and columns that this profile has."""
        return (
            [row for row in self.rows.values() if profile in row.only],
            [column for column in self.columns.values() if profile in column.only],
        )

    def head(self, column: str, profile: str) -> str:
        """A column as its table is headed: its label, and what of its data set this profile has."""
        found = self.columns[column]
        part = _tables(_tables(_files()[PROTOCOLS], "parts"), profile).get(found.data)
        return f"{found.label} ({part})" if part else found.label

    def printed_at(self, row: str, column: str) -> tuple[tuple[float, ...], str]:
        """What the paper prints in this place, in per cent, and why it cannot be relied on; "" where it can."""
        numbers = tuple(self.printed.get(row, {}).get(column, ()))
        if not numbers:
            return (), ""
        like = self.columns[column].like or column
        own = self.marks.get(f"{row}.{column}", self.marks.get(f"{row}.{like}", ""))
        return numbers, "; ".join(filter(None, (own, self.marks.get(row), self.marks.get(like))))


@dataclass(frozen=True)
class Cell:
    """One run of a table. config: as it stands in the package: folders of data are relative, so that its key is the
    same on every machine."""

    table: str
    profile: str
    row: Row
    column: Column
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.row.key}--{self.column.key}--seed{self.seed}"

    @cached_property
    def key(self) -> str:
        """What decides its numbers."""
        return self.config.key()

    def placed(self, data: Path | None, folder: Path, pools: Path | None = None) -> Config:
        """The configuration to run: data and pretrained weights below `data`, the run in `folder`. Raises ConfigError
        where that is needed and not given."""
        config = replace(self.config, name=folder.name, runs_dir=str(folder.parent))
        if pools is not None:
            config = replace(config, pool=replace(config.pool, dir=str(pools)))
        if part := folder_of(config):
            config = replace(config, data=replace(config.data, dir=_below(data, part)))
        model: Any = config.model
        if weights := getattr(model, "pretrained", ""):
            config = replace(config, model=replace(model, pretrained=_below(data, weights)))
        return config


def _below(data: Path | None, part: str) -> str:
    if data is None or not (data / part).exists():
        value = None if data is None else str(data)
        raise ConfigError("--data", value, f"must be a folder with {part} in it (docs/reproducing.md)")
    return str(data / part)


def folder_of(config: Config) -> str | None:
    """The folder below `--data` that a configuration of the package reads."""
    part = getattr(config.data, "dir", None)
    return str(part) if part and not Path(part).is_absolute() else None


def names() -> list[str]:
    """All tables and figures that can be reproduced."""
    return sorted(name for name, table in _files().items() if "rows" in table)


@cache
def experiment(name: str) -> Experiment:
    """A table by its name. Raises UnknownName, or ConfigError where its file is wrong."""
    if name not in names():
        raise UnknownName("experiments", name, names())
    table = dict(_files()[name])
    family = str(table["family"])
    rows = {key: _line(Row, name, key, each) for key, each in _tables(table, "rows").items()}
    columns = {key: _line(Column, name, key, each) for key, each in _columns(table).items()}
    printed = _tables(table, "printed")
    if (best := table.get("best", "column")) not in ("column", "row"):
        raise ConfigError(f"{name}: best", best, "must be 'column' or 'row'")
    for column in columns.values():
        if column.like:
            printed = {row: {**each, **_under(column, each)} for row, each in printed.items()}
    return Experiment(
        name,
        str(table["title"]),
        str(table["paper"]),
        family,
        rows,
        columns,
        printed,
        _tables(table, "marks"),
        tuple(table.get("notes", ())),
        {profile: tuple(seeds) for profile, seeds in _tables(table, "seeds").items()},
        bool(table.get("runs", True)),
        tuple(table.get("pictures", ())),
        str(best),
    )


@cache
def protocols() -> dict[str, dict[str, Protocol]]:
    """By family and profile."""
    out: dict[str, dict[str, Protocol]] = {}
    for family, profiles in _tables(_files()[PROTOCOLS], "families").items():
        for profile, each in profiles.items():
            out.setdefault(family, {})[profile] = Protocol(
                each["base"],
                tuple(each["seeds"]),
                tuple(each.get("departures", ())),
                tuple(each.get("training", ())),
                each.get("rates", {}),
            )
    return out


def cells(
    found: Experiment,
    profile: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[Cell]:
    """The runs of a table, seed by seed, so that one cut short has all methods; empty = all rows, columns, seeds.

    Raises ConfigError for a row or column that the table does not have in this profile.
    """
    protocol = found.protocol(profile)
    all_rows, all_columns = found.lines(profile)
    chosen_rows = _chosen("--rows", all_rows, rows, found.name, profile)
    chosen_columns = _chosen("--columns", all_columns, columns, found.name, profile)
    return [
        Cell(found.name, profile, row, column, seed, _config(found, profile, protocol, row, column, seed))
        for seed in seeds or protocol.seeds
        for column in chosen_columns
        for row in chosen_rows
        if column.has(row, profile)
    ]


def _config(found: Experiment, profile: str, protocol: Protocol, row: Row, column: Column, seed: int) -> Config:
    base = _files()[protocol.base]
    table = laid(base, _data(column, profile))
    rate = protocol.rates.get(row.rate or row.key)
    if rate is not None:
        table = laid(table, {"local": {"lr": rate}})
    table = row.over(column.over(table, profile), profile)
    try:
        return parse({**with_method(table, row.method), "seed": seed, "name": "cell", "runs_dir": "runs"})
    except ConfigError as error:
        where = f"{found.name}, profile {profile}, row {row.key}, column {column.key}: "
        raise error.under(where) from None


def _data(column: Column, profile: str) -> Table:
    """What a data set sets in this profile."""
    sets = _tables(_files()[PROTOCOLS], "data")
    if column.data not in sets:
        raise ConfigError("data", column.data, f"must be one of {', '.join(sets)}", nearest(column.data, sets))
    found: Table = sets[column.data][profile]
    return found


def laid(table: Table, over: Table) -> dict[str, object]:
    """`table` with the keys of `over`, section by section, as a table of its own; sections that it leaves as they are
    it shares with them. A section that is named otherwise there is replaced: options of another thing do not carry
    over."""
    out = dict(table)
    for key, value in over.items():
        before = out.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            other = "name" in value and value["name"] != before.get("name")
            out[key] = value if other else laid(before, value)
        else:
            out[key] = value
    return out


def _chosen(key: str, lines: Sequence[L], wanted: Sequence[str], table: str, profile: str) -> list[L]:
    known = {line.key: line for line in lines}
    for one in wanted:
        if one not in known:
            allowed = f"{table} has, in profile {profile}: {', '.join(known)}"
            raise ConfigError(key, one, allowed, nearest(one, known))
    return [line for line in lines if not wanted or line.key in wanted]


def _line(kind: type[L], name: str, key: str, table: Mapping[str, Any]) -> L:
    """A row or column from its table: words by their names, `set` for all profiles, tables by profile."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", key) or "--" in key:
        raise ConfigError(f"{name}: {kind.__name__.lower()}", key, "must be lower case, digits and single dashes")
    words = {item.name for item in fields(kind)} - {"key", "settings"}
    settings = {"" if part == "set" else part: value for part, value in table.items() if part in ("set", *PROFILES)}
    rest = {part: value for part, value in table.items() if part not in ("set", *PROFILES)}
    for part in rest:
        if part not in words:
            raise ConfigError(f"{name}: {key}.{part}", rest[part], "no such key", nearest(part, words))
    if "only" in rest:
        rest["only"] = tuple(rest["only"])
    return kind(key=key, settings=settings, **rest)


def _columns(table: Table) -> dict[str, Table]:
    """The columns of a file, each with what the file sets for all of them and with what it is `like`."""
    common, columns = _tables(table, "set"), _tables(table, "columns")
    whole = {key: laid(columns[each["like"]], each) if "like" in each else each for key, each in columns.items()}
    return {key: laid({"set": common}, each) for key, each in whole.items()}


def _under(column: Column, printed: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """What a row has printed in the column that this one is like, under its own key."""
    return {column.key: printed[column.like]} if column.like in printed else {}


def _tables(table: Table, key: str) -> dict[str, Any]:
    found = table.get(key, {})
    assert isinstance(found, Mapping), key
    return dict(found)


@cache
def _files() -> dict[str, dict[str, Any]]:
    """Every file of `experiments/`, by its name."""
    folder = files("fedkeel.experiments")
    found = (place for place in folder.iterdir() if place.name.endswith(".toml"))
    return {place.name.removesuffix(".toml"): tomllib.loads(place.read_text("utf-8")) for place in found}
