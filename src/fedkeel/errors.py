"""Every exception fedkeel raises.

FedkeelError
├── UserError                the input or the machine is not fit; the command line exits with 2
│   ├── ConfigError          an unknown key, a wrong type, a value out of range
│   ├── UnknownName          no such algorithm, dataset, partition, model, generator or runtime
│   ├── DataError            missing or damaged file, wrong image size, labels out of range
│   ├── PartitionError       a partition that cannot be made, or a manifest that does not match
│   │   └── EmptyClient      a client without samples
│   ├── PoolError            images made by another generator, or a generator that returns garbage
│   ├── CheckpointError      no usable checkpoint, or one of another configuration
│   ├── DeviceError          a device that is not on this machine
│   ├── StorageError         a disk that is full or cannot be written; what was there is kept
│   └── MissingExtra         an optional dependency is not installed
└── RunError                 the run failed; the command line exits with 1
    ├── TooFewClients        fewer usable updates in a round than `min_replies`
    └── UndeclaredField      a method sent something it did not declare

RunWarning is what a run that nobody listens to warns with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class FedkeelError(Exception):
    """Root of the tree."""

    def __reduce__(self) -> tuple[object, ...]:
        """From a worker to the process that started it: as text and attributes, whatever it was made of."""
        return _again, (type(self), str(self), self.__dict__)


def _again(kind: type[FedkeelError], text: str, attributes: dict[str, object]) -> FedkeelError:
    error = kind.__new__(kind, text)
    error.__dict__.update(attributes)
    return error


class UserError(FedkeelError):
    """The user's input is wrong."""


class ConfigError(UserError):
    """A key or value of the configuration is wrong."""

    def __init__(self, key: str, value: object, allowed: str, near: str | None = None) -> None:
        self.key, self.value, self.allowed, self.near = key, value, allowed, near
        hint = f" Did you mean {near!r}?" if near else ""
        super().__init__(f"{key} = {value!r}: {allowed}.{hint}")

    def under(self, prefix: str) -> ConfigError:
        """The same mistake, where the key is part of something longer: `prefix` stands before it."""
        return ConfigError(prefix + self.key, self.value, self.allowed, self.near)


class UnknownName(UserError):
    """A name that no room knows."""

    def __init__(self, room: str, name: str, names: Iterable[str]) -> None:
        self.room, self.name = room, name
        known = sorted(names)
        near = nearest(name, known)
        hint = f" Did you mean {near!r}?" if near else ""
        super().__init__(f"{room}: there is no {name!r}; known: {', '.join(known)}.{hint}")


class DataError(UserError):
    """Data that is missing, damaged or does not fit."""


class PartitionError(UserError):
    """A partition that cannot be made or does not match its manifest."""


class EmptyClient(PartitionError):
    """A client without samples."""


class PoolError(UserError):
    """A pool of synthetic images that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class DeviceError(UserError):
    """A device that this machine does not have."""


class StorageError(UserError):
    """A disk that is full or cannot be written."""


class MissingExtra(UserError):
    """An optional dependency that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an extra: pip install 'fedkeel[{extra}]'")


class RunError(FedkeelError):
    """The run failed. record: what is known of the round in which it did."""

    record: Mapping[str, object] | None = None


class TooFewClients(RunError):
    """Fewer usable updates in a round than `min_replies`."""


class RunWarning(UserWarning):
    """What one should know of a run that goes on: an option that switches its method off, a client that failed."""


class UndeclaredField(RunError):
    """A method sent something it did not declare."""


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The known word closest in spelling, or None when nothing is close."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return found[0] if found else None
