"""The pictures that an experiment file asks for, under `pictures`.

Some are drawn from the table's numbers, some from a configuration alone (data, partition and generator; nothing is
trained), some from runs that are done, whose checkpoints are kept for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkeel.errors import ConfigError, nearest
from fedkeel.reproduce.tables import Experiment

OF_TABLE = ("curve", "bars")
OF_CONFIG = ("histogram", "partition", "sheet")
OF_RUNS = ("classes", "update", "images", "aligned")
KINDS = (*OF_TABLE, *OF_CONFIG, *OF_RUNS)


@dataclass(frozen=True)
class Picture:
    """One picture that an experiment file asks for.

    rows: of the table; all where none are named. column: "" for kinds that show several. lines: of a curve, columns by
    the name of a line. axis, option, zero: of a curve, the axis' name, the method's option that it shows, and the word
    for the value 0 there. client: None = by `skewed` or `filling`.
    """

    kind: str
    title: str
    rows: tuple[str, ...] = ()
    column: str = ""
    seed: int = 1
    client: int | None = None
    lines: Mapping[str, Sequence[str]] | None = None
    axis: str = ""
    option: str = ""
    zero: str = "0"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.kind}-{self.column}" if self.column else self.kind


def asked(found: Experiment, profile: str) -> list[Picture]:
    """The pictures of a table in this profile. Raises ConfigError where the experiment's file is wrong."""
    out = []
    rows, columns = ({line.key for line in lines} for lines in found.lines(profile))
    for entry in found.pictures:
        where = f"{found.name}: pictures"
        if entry.get("kind") not in KINDS:
            kind = str(entry.get("kind"))
            raise ConfigError(f"{where}.kind", kind, f"must be one of {', '.join(KINDS)}", nearest(kind, KINDS))
        table: dict[str, Any] = dict(entry)
        several = table.pop("columns", None)
        for column in several if several is not None else [table.pop("column", "")]:
            try:
                picture = Picture(**{**table, "column": column, "rows": tuple(table.get("rows", ()))})
            except TypeError:
                raise ConfigError(where, sorted(entry), f"must be some of {sorted(Picture.__annotations__)}") from None
            for key, value, known in (
                *(("rows", row, found.rows) for row in picture.rows),
                *(("column", column, found.columns) for _ in range(bool(column))),
            ):
                if value not in known:
                    raise ConfigError(f"{where}.{key}", value, f"must be one of {', '.join(known)}")
            if (not column or column in columns) and set(picture.rows) <= rows:
                out.append(picture)
    return out
