"""Pictures and labels in Arrow tables, in the layout of the Hugging Face hub.

A picture is a struct of `bytes` and `path` (or plain binary), a label an integer whose names, where there are any, are
in the features of the table. The two columns are found by type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkeel.data.pictures import Rows, Split, twice
from fedkeel.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Features = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Block:
    """Some rows of a split. where: the file. first: its number of the first row. column(name): an Arrow column."""

    where: str
    first: int
    rows: int
    column: Callable[[str], pa.ChunkedArray]


@dataclass(frozen=True)
class Table:
    """A split as blocks of rows. root: folder that relative picture paths start from."""

    where: str
    schema: pa.Schema
    features: Features
    blocks: tuple[Block, ...]
    root: Path

    def labels(self, name: str) -> Rows | None:
        """[N] int64, or None when no row has a label (missing column, nulls, or -1 as the hub writes it)."""
        if name not in self.schema.names:
            return None
        columns = [(block, block.column(name)) for block in self.blocks]
        missing = sum(column.null_count for _, column in columns)
        if missing and missing == sum(block.rows for block in self.blocks):
            return None
        for block, column in columns:
            if column.null_count:
                row = int(np.flatnonzero(column.is_null().to_numpy())[0])
                raise DataError(f"{block.where}, row {block.first + row}: the label is missing")
        values = np.concatenate([np.empty(0, np.int64), *(column.to_numpy().astype(np.int64) for _, column in columns)])
        return None if len(values) and (values == -1).all() else values

    def split(self, labels: Rows, image: str) -> Split:
        """The split with its pictures in column `image`."""
        return Split(self.where, labels, lambda rows: self._pictures(rows, image))

    def _pictures(self, rows: Rows, image: str) -> Iterator[tuple[str, bytes]]:
        start = 0
        for block in self.blocks:
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + block.rows)] - start
            start += block.rows
            if len(inside) == 0:
                continue
            column = block.column(image)
            for row, value in zip(inside, column.take(inside).to_pylist(), strict=True):
                where = f"{block.where}, row {block.first + row}"
                yield where, self._bytes(where, value)

    def _bytes(self, where: str, value: object) -> bytes:
        if isinstance(value, dict):
            blob, path = value.get("bytes"), value.get("path")
            if blob is None and path:
                try:
                    return (self.root / str(path)).read_bytes()
                except OSError as error:
                    raise DataError(f"{where}: cannot read {path} ({error.strerror})") from error
            value = blob
        if not isinstance(value, bytes):
            raise DataError(f"{where}: there is no picture")
        return value


def find_image(table: Table, given: str | None) -> str:
    """The name of the picture column: `given`, else the only one of that type. Raises DataError."""
    return _find(table, given, "image", _is_image)


def find_label(table: Table, given: str | None) -> str:
    """The name of the label column: `given`, else the only ClassLabel, else the only integers.

    Raises DataError, also where labels by their name are no integers: others are something else.
    """
    named = [name for name in table.schema.names if table.features.get(name, {}).get("_type") == "ClassLabel"]
    if given is None and len(named) != 1:
        fields = {name: table.schema.field(name).type for name in table.schema.names}
        for name in ("label", "labels"):
            if name in fields and not _is_integer(fields[name]):
                others = ", ".join(other for other, kind in fields.items() if _is_integer(kind)) or "there is none"
                problem = f"column {name!r} is {fields[name]}, labels must be whole numbers"
                raise DataError(f"{table.where}: {problem}; set data.label to a column of them: {others}")
    return _find(table, given or (named[0] if len(named) == 1 else None), "label", _is_integer)


def class_names(table: Table, label: str, labels: Rows) -> tuple[str, ...]:
    """The names of the classes; "0", "1", ... up to the largest label when the table has none.

    Raises DataError for a name that two classes have.
    """
    names = table.features.get(label, {}).get("names")
    if names and (doubled := twice(names)) is not None:
        raise DataError(f"{table.where}: column {label!r} names the class {doubled!r} twice")
    return tuple(names) if names else tuple(str(i) for i in range(int(labels.max(initial=0)) + 1))


def check_numbers(table: Table, label: str, labels: Rows) -> None:
    """Raises DataError for labels without names that exceed the number of rows of a whole data set: those are no
    classes but numbers of something else."""
    largest = int(labels.max(initial=0))
    if not table.features.get(label, {}).get("names") and largest > len(labels):
        problem = f"column {label!r} has numbers up to {largest} in {len(labels)} rows, which are no classes"
        raise DataError(f"{table.where}: {problem}; set data.label to the column of the labels")


def labelled(table: Table, image: str, label: str) -> tuple[Split, tuple[str, ...]]:
    """A split with its pictures and labels from these columns, and the names of the classes.

    Raises DataError when no row has a label, and for labels that are numbers of something else.
    """
    labels = table.labels(label)
    if labels is None:
        raise DataError(f"{table.where}: no row has a label")
    check_numbers(table, label, labels)
    return table.split(labels, image), class_names(table, label, labels)


def embedded_features(schema: pa.Schema, where: str | Path) -> Features:
    """The features that `datasets` writes into the metadata of a parquet file; {} without any.

    where: the file, for messages. Raises DataError when they are damaged.
    """
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise DataError(f"{where}: the names of its classes (metadata 'huggingface') are no JSON ({error})") from error
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return described(found)


def described(features: object) -> Features:
    """Those of the features that are tables of words; a column of lists has a list, and says nothing that is read."""
    found = features.items() if isinstance(features, Mapping) else ()
    return {name: feature for name, feature in found if isinstance(feature, Mapping)}


def _find(table: Table, given: str | None, what: str, fits: Callable[[pa.DataType], bool]) -> str:
    names = table.schema.names
    if given is not None:
        if given not in names:
            raise DataError(f"{table.where}: there is no column {given!r}; columns: {', '.join(names)}")
        if not fits(table.schema.field(given).type):
            kind = table.schema.field(given).type
            raise DataError(
                f"{table.where}: column {given!r} is {kind}, which is no {what}; columns: {', '.join(names)}"
            )
        return given
    found = [name for name in names if fits(table.schema.field(name).type)]
    if len(found) != 1:
        problem = f"several columns could be the {what} ({', '.join(found)})" if found else f"no {what} column"
        raise DataError(f"{table.where}: {problem}; set data.{what} to one of: {', '.join(found or names)}")
    return str(found[0])


def _is_image(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(kind.get_field_index("bytes") >= 0) if types.is_struct(kind) else bool(types.is_binary(kind))


def _is_integer(kind: pa.DataType) -> bool:
    return str(kind).removeprefix("u").startswith("int")
