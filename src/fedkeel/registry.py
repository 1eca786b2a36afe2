"""Names of things: rooms x names.

A room is a package of fedkeel whose modules register what they define; it is scanned on the first look-up, so adding
a method, partition, generator, model or runtime is adding a file. Other packages register through entry points in the
groups `fedkeel.<room>`, for example `fedkeel.algorithms`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from fedkeel.errors import UnknownName, UserError

PACKAGES = {
    "algorithms": "fedkeel.algorithms",
    "datasets": "fedkeel.data",
    "partitions": "fedkeel.partition",
    "models": "fedkeel.models",
    "generators": "fedkeel.generators",
    "runtimes": "fedkeel.runtimes",
}

T = TypeVar("T", bound=type)

_things: dict[str, dict[str, type]] = {room: {} for room in PACKAGES}
_scanned: set[str] = set()


def register(room: str, name: str) -> Callable[[T], T]:
    """Class decorator: the class is known as `name` in `room`. Raises UnknownName for a room that there is not, and
    UserError when another class has that name."""
    if room not in PACKAGES:
        raise UnknownName("rooms", room, PACKAGES)

    def decorate(cls: T) -> T:
        known = _things[room].get(name)
        # the same class again (a module imported twice, as notebooks do) replaces itself
        if known is not None and _origin(known) != _origin(cls):
            both = " and ".join(f"{each.__module__}.{each.__qualname__}" for each in (known, cls))
            raise UserError(f"{room}: {name!r} is the name of two classes, {both}; register yours by another")
        _things[room][name] = cls
        return cls

    return decorate


def _origin(cls: type) -> tuple[str, str]:
    """Where a class comes from: its file, as a script and as a module alike, and its name there."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) or cls.__module__, cls.__qualname__


def get(room: str, name: str) -> type:
    """The class registered as `name`. Raises UnknownName, and UserError when another package's cannot be loaded."""
    _scan(room)
    if name not in _things[room]:
        raise UnknownName(room, name, _things[room])
    return _things[room][name]


def names(room: str) -> list[str]:
    """All names of a room, sorted."""
    if room not in PACKAGES:
        raise UnknownName("rooms", room, PACKAGES)
    _scan(room)
    return sorted(_things[room])


def name_of(room: str, thing: type) -> str:
    """The name under which a class is registered. Raises UserError for one that is not."""
    _scan(room)
    found = next((name for name, cls in _things[room].items() if cls is thing), None)
    if found is None:
        raise UserError(f"{room}: {thing.__qualname__} has no name; give it one by fedkeel.register({room!r}, name)")
    return found


def _scan(room: str) -> None:
    if room in _scanned:
        return
    _scanned.add(room)  # at once: what is imported here may look names up
    try:
        package = importlib.import_module(PACKAGES[room])
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        for point in entry_points(group=f"fedkeel.{room}"):
            _load(room, point)
    except BaseException:
        _scanned.remove(room)  # the next look-up says the same, and does not pass over what was not reached
        raise


def _load(room: str, point: EntryPoint) -> None:
    """Imports what another package registers. Raises UserError naming it when that fails."""
    try:
        point.load()
    except Exception as error:  # other people's code raises anything
        owner = "" if point.dist is None else f" of the package {point.dist.name}"
        raise UserError(
            f"entry point {point.name} = {point.value!r} (fedkeel.{room}){owner} cannot be loaded: "
            f"{type(error).__name__}: {error}; mend or uninstall it"
        ) from error
