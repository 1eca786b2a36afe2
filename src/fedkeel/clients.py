"""What clients keep between rounds."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedkeel.errors import CheckpointError
from fedkeel.files import write_tensors

State = Mapping[str, Tensor]


class ClientStore:
    """States of clients by (client, round).

    A client puts the state of a round before the server has decided about its update (`pending`). At its next round the
    server names the last round that it accepted from this client: that version is promoted, all others are dropped.
    This one rule covers a late exception, a timeout, a killed client, a killed server and resume.

    States are held in memory; past `budget` bytes the least recently used ones live in files only. A file goes with its
    version, unless a checkpoint names it.
    """

    def __init__(self, folder: Path | None = None, budget: int = 2 << 30) -> None:
        self._folder = folder
        self.budget = budget
        self._held: OrderedDict[tuple[int, int], State] = OrderedDict()
        self._filed: set[tuple[int, int]] = set()  # held ones whose file is known to say the same
        self._files: set[tuple[int, int]] = set()  # those that have a file; of a run that was stopped, after `collect`
        self._listed = False
        self.named: Set[tuple[int, int]] = frozenset()
        """Versions that a checkpoint on disk may ask for: their files stay."""
        self._bytes = 0
        self._versions: dict[int, set[int]] = {}

    @cached_property
    def folder(self) -> Path:
        """Where states are written: the run's, or a temporary one that goes with this object."""
        if self._folder is not None:
            return self._folder
        folder = tempfile.mkdtemp(prefix="fedkeel-clients-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def get(self, client: int, version: int) -> State:
        """The state that `put` was given. Raises CheckpointError when its file is missing or damaged."""
        key = (client, version)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        try:
            state = load_file(self.file(client, version))
        except (OSError, SafetensorError) as error:
            raise _unreadable(client, version, error) from error
        self._versions.setdefault(client, set()).add(version)
        self._filed.add(key)
        self._files.add(key)
        self._hold(key, state)
        return state

    def part(self, client: int, version: int, name: str, span: slice) -> Tensor:
        """Elements `span` of one tensor of a state, the rest of which is not brought into memory. Raises as `get`."""
        if (client, version) in self._held:
            return self._held[client, version][name][span]
        try:
            with safe_open(self.file(client, version), framework="pt") as file:
                part: Tensor = file.get_slice(name)[span]
        except (OSError, SafetensorError) as error:
            raise _unreadable(client, version, error) from error
        return part

    def open(self, client: int, accepted: int | None) -> State | None:
        """The state of `client` as of round `accepted`, None when the server has accepted nothing from it yet."""
        for version in self._versions.get(client, set()) - {accepted}:
            self._drop(client, version)
        self._versions[client] = set() if accepted is None else {accepted}
        if accepted is None:
            return None
        return self.get(client, accepted)

    def put(self, client: int, version: int, state: State) -> None:
        """Keeps what the update of round `version` would make the client's state."""
        self._forget(client, version)
        self._versions.setdefault(client, set()).add(version)
        self._hold((client, version), state)

    def flush(self, keys: Iterable[tuple[int, int]]) -> None:
        """Writes those of these (client, round) that are in memory only."""
        for key in keys:
            if key in self._held:
                self._write(key)

    def retain(self, keys: set[tuple[int, int]]) -> None:
        """Forgets all versions but these; files that a checkpoint names stay until `collect`."""
        for client, versions in self._versions.items():
            for version in {each for each in versions if (client, each) not in keys}:
                versions.discard(version)
                self._drop(client, version)

    def collect(self, needed: Set[tuple[int, int]]) -> None:
        """Deletes the files of all versions but `needed`, which checkpoints name from now on, and those in use."""
        if not self._listed:  # the only process that writes here: later on it knows what is there
            self._files |= {key for path in self.folder.glob("*.safetensors") if (key := key_of(path)) is not None}
            self._listed = True
        self.named = needed
        for client, version in self._files - needed:
            if version not in self._versions.get(client, ()):
                self._delete(client, version)

    def file(self, client: int, version: int) -> Path:
        """Where a state is kept on disk."""
        return self.folder / f"{client}-{version}.safetensors"

    def _hold(self, key: tuple[int, int], state: State) -> None:
        self._held[key] = state
        self._bytes += _size(state)
        while self._bytes > self.budget and len(self._held) > 1:
            oldest = next(iter(self._held))
            self._write(oldest)
            self._forget(*oldest)

    def _write(self, key: tuple[int, int]) -> None:
        # a file of that name may be there, damaged or of a run that was stopped: it is written over
        if key not in self._filed:
            write_tensors(self.file(*key), self._held[key])
            self._filed.add(key)
            self._files.add(key)

    def _drop(self, client: int, version: int) -> None:
        self._forget(client, version)
        key = (client, version)
        if key in self._files and key not in self.named:
            self._delete(client, version)

    def _delete(self, client: int, version: int) -> None:
        self.file(client, version).unlink(missing_ok=True)
        self._files.discard((client, version))

    def _forget(self, client: int, version: int) -> None:
        self._filed.discard((client, version))
        state = self._held.pop((client, version), None)
        if state is not None:
            self._bytes -= _size(state)


def key_of(path: Path) -> tuple[int, int] | None:
    """(client, round) of a file that `ClientStore.file` named; None for one that it did not."""
    found = re.fullmatch(r"(\d+)-(\d+)", path.stem)
    return (int(found[1]), int(found[2])) if found else None


def _unreadable(client: int, version: int, error: Exception) -> CheckpointError:
    """What is said about a state whose file is missing or damaged."""
    return CheckpointError(f"client {client}: its state of round {version} cannot be read: {error}")


def _size(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
