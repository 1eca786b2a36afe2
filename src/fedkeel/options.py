"""Options: the fields of frozen dataclasses, with their documentation, ranges and checks.

Every registered thing (method, partition, model, generator, dataset) and every section of the configuration is a
frozen dataclass whose fields are its options. `option` declares one, `build` makes an instance from a table of plain
values (a TOML table) and refuses what does not fit with one ConfigError that names the dotted key.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast

from fedkeel.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Meaning:
    """What an option means: documentation, bounds (inclusive `ge`/`le`, exclusive `gt`/`lt`), a sensible grid to tune
    over, a value that switches the method off (allowed, with a warning), and what stands for the default in the key of
    a run (`...`: the default itself)."""

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    grid: tuple[object, ...] = ()
    off: object = None
    keyed: object = ...

    def allowed(self) -> str:
        """The bounds in words, "" without any."""
        parts = [(">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)]
        return " and ".join(f"{sign} {bound:g}" for sign, bound in parts if bound is not None)

    def admits(self, value: float) -> bool:
        """Whether a finite number is within the bounds."""
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def option(
    default: T,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    grid: tuple[object, ...] = (),
    off: object = None,
    keyed: object = ...,
) -> T:
    """A dataclass field with documentation and bounds.

    keyed: for an option that is younger than runs that are to go on: what the key of a run holds when it has its
    default (None: nothing), that is what those runs were made with.
    """
    meaning = Meaning(doc, ge, gt, le, lt, grid, off, keyed)
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Option:
    """One option of a class, as `fedkeel show` prints it."""

    name: str
    kind: str
    default: object
    meaning: Meaning


def options(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass in the order of its fields (nested sections excluded)."""
    return _options(cls)


@cache
def _options(cls: type) -> tuple[Option, ...]:
    hints = _hints(cls)
    return tuple(
        Option(field.name, _kind(hints[field.name]), field.default, field.metadata["meaning"])
        for field in dataclasses.fields(cls)
        if "meaning" in field.metadata
    )


def build(cls: type[T], table: Mapping[str, object], path: str = "") -> T:
    """An instance of a frozen dataclass from a table of plain values.

    Raises ConfigError, naming the dotted key, for an unknown key, a missing one, a wrong type or a value out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    hints = _hints(cast(type, cls))
    values: dict[str, object] = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key not in fields:
            known = sorted(name for name in fields if "hidden" not in fields[name].metadata)
            raise ConfigError(
                where, value, f"no such key; known here: {', '.join(known) or 'none'}", nearest(key, known)
            )
        meaning = fields[key].metadata.get("meaning")
        values[key] = convert(hints[key], value, where, meaning)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}" if path else name, None, "this key is required")
    try:
        return cls(**values)
    except ConfigError as error:  # a check across fields, raised in __post_init__ with the bare field name
        raise error.under(f"{path}." if path else "") from None


def plain(thing: object, leave_out: Container[str] = ()) -> dict[str, object]:
    """The fields of a dataclass as plain values, the reverse of `build`; None is left out (TOML has no word for it)."""
    out: dict[str, object] = {}
    for field in dataclasses.fields(cast(Any, thing)):
        value = getattr(thing, field.name)
        if value is None or field.name in leave_out or "hidden" in field.metadata:
            continue
        if dataclasses.is_dataclass(value):
            value = plain(value)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted key -> value of nested tables."""
    out: dict[str, object] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def keyed(thing: object) -> dict[str, object]:
    """`plain`, where options younger than recorded runs stand as they did in those when they have their defaults."""
    out = plain(thing)
    for item in options(type(thing)):
        if item.meaning.keyed is not ... and getattr(thing, item.name) == item.default:
            out.pop(item.name, None)
            if item.meaning.keyed is not None:
                out[item.name] = item.meaning.keyed
    return out


def convert(kind: object, value: object, where: str, meaning: Meaning | None = None) -> object:
    """`value` as the annotated type `kind`, or a ConfigError naming `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [arg for arg in args if arg is not type(None)]
        # an int stays an int where both int and float are allowed (a count against a share)
        choices.sort(key=lambda arg: (arg is str, arg is float and isinstance(value, int)))
        for choice in choices:
            try:
                return convert(choice, value, where, meaning)
            except ConfigError as error:
                last = error
                right = isinstance(choice, type) and isinstance(value, choice) and not isinstance(value, bool)
                if len(choices) > 1 and right:
                    raise
        if len(choices) == 1:
            raise last
        raise ConfigError(where, value, f"must be {_kind(kind)}")
    if origin is Literal:
        for arg in args:
            if type(value) is type(arg) and value == arg:  # neither true nor 1.0 is 1
                return arg
        words = ", ".join(repr(arg) for arg in args)
        raise ConfigError(where, value, f"must be one of {words}", nearest(str(value), [str(arg) for arg in args]))
    if kind is Any or getattr(kind, "_is_protocol", False):
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(where, value, f"must be a list of {_kind(args[0])}")
        return tuple(convert(args[0], item, f"{where}[{i}]", meaning) for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if isinstance(value, cast(type, kind)):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(where, value, "must be a table of keys")
        return build(cast(type, kind), value, where)
    return _number_or_word(kind, value, where, meaning)


def _number_or_word(kind: object, value: object, where: str, meaning: Meaning | None) -> object:
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ConfigError(where, value, f"must be within ±{sys.float_info.max:.1e}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, cast(type, kind)) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise ConfigError(where, value, f"must be {_kind(kind)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if meaning is not None and number and not meaning.admits(cast(float, value)):
        words = [] if math.isfinite(cast(float, value)) else ["finite"]
        raise ConfigError(where, value, "must be " + " and ".join([*words, *filter(None, [meaning.allowed()])]))
    return value


@cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls)


def _kind(kind: object) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"list of {_kind(args[0])}"
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
    return words.get(cast(Any, kind), getattr(kind, "__name__", str(kind)))
