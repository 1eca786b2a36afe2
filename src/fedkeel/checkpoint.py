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
from fedkeel.files import checksum, settle, write, write_tensors
from fedkeel.records import Server

GENERATIONS = ("a", "b")
STORES = ("clients", "shelf")
ELSEWHERE = ""
"""In place of the checksum of a state that lies on another machine."""
Sums = dict[tuple[int, int], str]
"""Checksums of states by (client, round)."""


@dataclass(frozen=True)
class Checkpoint:
    """The server after a round, and the last round accepted from each client."""

    server: Server
    accepted: Mapping[int, int]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """What a state.json says. digest: of that file; files: checksums by name; kept: those of states, by store."""

    digest: str
    key: str
    round: int
    files: Mapping[str, str]
    kept: Mapping[str, Sums]


class Checkpoints:
    """The checkpoints of one run. `key` stands for its configuration and layout: another's are refused."""

    def __init__(self, folder: Path, key: str, clients: ClientStore, shelf: ClientStore, remote: bool = False) -> None:
        """`clients` holds what clients keep, unless `remote`; `shelf` what a method's server keeps per client."""
        self.folder, self.key = folder / "checkpoint", key
        self._stores = dict(zip(STORES, (clients, shelf), strict=True))
        self.remote = remote
        self._sums: dict[str, Sums] = {name: {} for name in STORES}
        self._known: dict[str, Generation] = {}  # as last read or written
        self._damaged: set[str] = set()
        self._rounds: dict[int, set[int]] | None = None  # of each client's states, once asked for
        for name, named in self._named().items():
            self._stores[name].named = named

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
        rows = {name: [[*key, total] for key, total in each.items()] for name, each in kept.items()}
        content = _sealed({"key": self.key, "round": server.round, "kept": rows, "files": sums})
        digest = write(fresh / "state.json", content)
        found = {name: None if name in self._damaged else self._state(name) for name in GENERATIONS}
        older = min(GENERATIONS, key=lambda name: -1 if (held := found[name]) is None else held.round)
        try:
            shutil.rmtree(self.folder / older, ignore_errors=True)
            fresh.rename(self.folder / older)
            settle(self.folder)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder / older}: {error.strerror or error}") from error
        self._known[older] = Generation(digest, self.key, server.round, sums, kept)
        self._damaged.discard(older)
        self._collect()

    def load(self, first: Server) -> Checkpoint | None:
        """The newest generation that is whole, None when there was none yet; `first` gives clients and layout.

        Raises CheckpointError when the newest belongs to another configuration, or when none is whole.
        """
        states = {name: self._state(name) for name in GENERATIONS if (self.folder / name).is_dir()}
        damaged = [f"checkpoint {name} is damaged (state.json)" for name, state in states.items() if state is None]
        whole = sorted((state.round, name) for name, state in states.items() if state is not None)
        for _, name in reversed(whole):
            state = states[name]
            assert state is not None
            if state.key != self.key:
                raise CheckpointError(
                    f"{self.folder / name} was written by another configuration; resume it with its own config.toml, "
                    "or start again under another name"
                )
            fault = self._fault(name, state)
            if fault:
                damaged.append(f"checkpoint {name} (round {state.round}) is damaged: {fault}")
                self._damaged.add(name)
                continue
            return self._read(name, state, first, tuple(damaged))
        if damaged:
            raise CheckpointError("; ".join(damaged) + "; no other is left: start the run again")
        return None

    def versions(self, client: int) -> set[int]:
        """The rounds of this client's states that generations on disk need."""
        if self._rounds is None:
            self._rounds = {}
            for owner, version in self._named()["clients"]:
                self._rounds.setdefault(owner, set()).add(version)
        return self._rounds.get(client, set())

    def _read(self, name: str, state: Generation, first: Server, warnings: tuple[str, ...]) -> Checkpoint:
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
            round=state.round,
            layout=first.layout,
            **parts,  # type: ignore[arg-type]
        )
        self._sums = {store: dict(sums) for store, sums in state.kept.items()}
        return Checkpoint(server, dict(state.kept["clients"].keys()), warnings)

    def _state(self, name: str) -> Generation | None:
        """A generation's state.json, None when it is missing or damaged."""
        try:
            content = (self.folder / name / "state.json").read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            known = self._known.get(name)
            if known is None or known.digest != digest:  # with many clients, reading it takes long
                known = self._known[name] = _opened(content, digest)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        return known

    def _fault(self, name: str, state: Generation) -> str:
        for file, total in state.files.items():
            if checksum(self.folder / name / file) != total:
                return f"{file} does not match its checksum"
        for store, sums in state.kept.items():
            for (client, version), total in sums.items():
                if total != ELSEWHERE and checksum(self._stores[store].file(client, version)) != total:
                    return f"the state of client {client} does not match its checksum"
        return ""

    def _flushed(self, store: str, keys: list[tuple[int, int]]) -> Sums:
        """The states of these (client, round), on disk, with their checksums. Raises StorageError where one is gone."""
        self._stores[store].flush(keys)
        known = self._sums[store]
        for key in keys:
            if key not in known:
                file = self._stores[store].file(*key)
                known[key] = checksum(file)
                if not known[key]:
                    raise StorageError(f"{file} is gone: no checkpoint can be made of round {key[1] + 1}")
        return {key: known[key] for key in keys}

    def _elsewhere(self, accepted: Mapping[int, int]) -> Sums:
        """The same for states on other machines, which keep them themselves."""
        self._sums["clients"] = {}
        return dict.fromkeys(accepted.items(), ELSEWHERE)

    def _named(self) -> dict[str, set[tuple[int, int]]]:
        """The states, by (client, round), that generations on disk name, of each store."""
        found = [state for name in GENERATIONS if (state := self._state(name)) is not None]
        return {store: {key for state in found for key in state.kept[store]} for store in STORES}

    def _collect(self) -> None:
        """Deletes the states that no generation needs."""
        self._rounds = None
        for name, named in self._named().items():
            self._sums[name] = {key: total for key, total in self._sums[name].items() if key in named}
            self._stores[name].collect(named)


def on_shelf(server: Server) -> list[tuple[int, int]]:
    """(client, round) of what the method has on its shelf: `private["shelf"]`, [M, 2] int64."""
    table = server.private.get("shelf")
    return [] if table is None else [(int(client), int(version)) for client, version in table.tolist()]


def _sealed(state: Mapping[str, object]) -> bytes:
    """A state.json: with the checksum of all that it says."""
    text = json.dumps(state, sort_keys=True)
    return f'{text[:-1]}, "sum": "{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()


def _opened(content: bytes, digest: str) -> Generation:
    """What `_sealed` wrote. Raises ValueError and others for all else."""
    state = json.loads(content)
    total = state.pop("sum")
    if total != hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest():
        raise ValueError("not as it was written")
    kept = state.get("kept", {})
    sums = {name: {(int(client), int(version)): s for client, version, s in kept.get(name, ())} for name in STORES}
    return Generation(digest, state["key"], int(state["round"]), state["files"], sums)
