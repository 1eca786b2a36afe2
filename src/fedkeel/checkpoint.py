"""The whole state of a run on disk: a run that is stopped and resumed ends as if it had never stopped.

Two generations alternate in `checkpoint/`, each with the checksums of its files; a damaged one is passed over for the
other. What clients keep lies in `clients/`, one file per client and round, and a generation names the ones it needs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from fedkeel.clients import ClientStore
from fedkeel.errors import CheckpointError, StorageError
from fedkeel.files import checksum, write_json, write_tensors
from fedkeel.records import Server

GENERATIONS = ("a", "b")
ELSEWHERE = ""
"""In place of the checksum of a state that lies on another machine."""


@dataclass(frozen=True)
class Checkpoint:
    """The server after a round, and the last round accepted from each client."""

    server: Server
    accepted: Mapping[int, int]
    warnings: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run. `key` stands for its configuration and layout: another's are refused."""

    def __init__(self, folder: Path, key: str, clients: ClientStore, shelf: ClientStore, remote: bool = False) -> None:
        """`clients` holds what clients keep, unless `remote`; `shelf` what a method's server keeps per client."""
        self.folder, self.key = folder / "checkpoint", key
        self._stores = {"clients": clients, "shelf": shelf}
        self.remote = remote
        self._sums: dict[tuple[str, int, int], str] = {}
        self._damaged: set[str] = set()
        self._needed: set[tuple[int, int]] | None = None  # of clients' states, once read

    def save(self, server: Server, accepted: Mapping[int, int]) -> None:
        """Writes a generation over the older of the two, or over one that `load` found damaged: a whole one is on disk
        all the time. Raises StorageError; the other generation stays."""
        kept = {
            "clients": self._elsewhere(accepted) if self.remote else self._flushed("clients", list(accepted.items())),
            "shelf": self._flushed("shelf", on_shelf(server)),
        }
        fresh = self.folder / "new"
        shutil.rmtree(fresh, ignore_errors=True)
        tensors = {"params": server.params, "buffers": server.buffers}
        for part in ("counters", "shared", "private"):
            tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(server, part).items()}
        sums = {"server.safetensors": write_tensors(fresh / "server.safetensors", tensors)}
        state = {"key": self.key, "round": server.round, "kept": kept, "files": sums}
        write_json(fresh / "state.json", {**state, "sum": _sum(state)})
        found = {name: None if name in self._damaged else self._state(name) for name in GENERATIONS}
        older = min(GENERATIONS, key=lambda name: -1 if (held := found[name]) is None else int(str(held["round"])))
        try:
            shutil.rmtree(self.folder / older, ignore_errors=True)
            fresh.rename(self.folder / older)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder / older}: {error.strerror or error}") from error
        self._damaged.discard(older)
        self._needed = None
        self._collect()

    def load(self, first: Server) -> Checkpoint | None:
        """The newest generation that is whole, None when there was none yet; `first` gives clients and layout.

        Raises CheckpointError when the newest belongs to another configuration, or when none is whole.
        """
        states = {name: self._state(name) for name in GENERATIONS if (self.folder / name).is_dir()}
        damaged = [f"checkpoint {name} is damaged (state.json)" for name, state in states.items() if state is None]
        whole = sorted((s["round"], name) for name, s in states.items() if s is not None)
        for _, name in reversed(whole):
            state = states[name]
            assert state is not None
            if state["key"] != self.key:
                raise CheckpointError(
                    f"{self.folder / name} was written by another configuration; resume it with its own config.toml, "
                    "or start again under another name"
                )
            fault = self._fault(name, state)
            if fault:
                damaged.append(f"checkpoint {name} (round {state['round']}) is damaged: {fault}")
                self._damaged.add(name)
                continue
            return self._read(name, state, first, tuple(damaged))
        if damaged:
            raise CheckpointError("; ".join(damaged) + "; no other is left: start the run again")
        return None

    def versions(self, client: int) -> set[int]:
        """The rounds of this client's states that generations on disk need."""
        if self._needed is None:
            self._needed = {(owner, version) for store, owner, version in self._named() if store == "clients"}
        return {version for owner, version in self._needed if owner == client}

    def _read(self, name: str, state: Mapping[str, object], first: Server, warnings: tuple[str, ...]) -> Checkpoint:
        tensors = load_file(self.folder / name / "server.safetensors")
        device = first.params.device
        parts: dict[str, dict[str, object]] = {"counters": {}, "shared": {}, "private": {}}
        for key, tensor in tensors.items():
            part, _, leaf = key.partition(".")
            if leaf:
                parts[part][leaf] = tensor.to(device)
        server = Server(
            params=tensors["params"].to(device),
            buffers=tensors["buffers"].to(device),
            clients=first.clients,
            samples=first.samples,
            round=int(str(state["round"])),
            layout=first.layout,
            **parts,  # type: ignore[arg-type]
        )
        self._sums = _sums(state)
        accepted = {client: version for store, client, version in self._sums if store == "clients"}
        return Checkpoint(server, accepted, warnings)

    def _state(self, name: str) -> dict[str, object] | None:
        """A generation's state.json, None when it is missing or damaged."""
        try:
            state = json.loads((self.folder / name / "state.json").read_bytes())
            total = state.pop("sum")
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        return state if total == _sum(state) else None

    def _fault(self, name: str, state: Mapping[str, object]) -> str:
        files = state["files"]
        assert isinstance(files, dict)
        for file, total in files.items():
            if checksum(self.folder / name / file) != total:
                return f"{file} does not match its checksum"
        for (store, client, version), total in _sums(state).items():
            if total != ELSEWHERE and checksum(self._stores[store].file(client, version)) != total:
                return f"the state of client {client} does not match its checksum"
        return ""

    def _flushed(self, store: str, keys: list[tuple[int, int]]) -> list[list[object]]:
        """The states of these (client, round), on disk, with their checksums."""
        self._stores[store].flush(keys)
        for client, version in keys:
            if (store, client, version) not in self._sums:
                self._sums[store, client, version] = checksum(self._stores[store].file(client, version))
        return [[client, version, self._sums[store, client, version]] for client, version in keys]

    def _elsewhere(self, accepted: Mapping[int, int]) -> list[list[object]]:
        """The same for states on other machines, which keep them themselves."""
        self._sums = {key: total for key, total in self._sums.items() if key[0] != "clients"}
        return [[client, version, ELSEWHERE] for client, version in accepted.items()]

    def _named(self) -> list[tuple[str, int, int]]:
        """The states, by (store, client, round), that generations on disk name."""
        return [key for name in GENERATIONS for key in _sums(self._state(name) or {})]

    def _collect(self) -> None:
        """Deletes the states that no generation needs."""
        needed = self._named()
        self._sums = {key: total for key, total in self._sums.items() if key in needed}
        for name, store in self._stores.items():
            store.collect({(client, version) for owner, client, version in needed if owner == name})


def on_shelf(server: Server) -> list[tuple[int, int]]:
    """(client, round) of what the method has on its shelf: `private["shelf"]`, [M, 2] int64."""
    table = server.private.get("shelf")
    return [] if table is None else [(int(client), int(version)) for client, version in table.tolist()]


def _sums(state: Mapping[str, object]) -> dict[tuple[str, int, int], str]:
    """Checksums of the states that a generation names, by (store, client, round)."""
    kept = state.get("kept", {})
    assert isinstance(kept, dict)
    return {(name, int(c), int(v)): total for name, rows in kept.items() for c, v, total in rows}


def _sum(state: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
