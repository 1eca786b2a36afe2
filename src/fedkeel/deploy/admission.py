"""Who may join: the nodes whose public keys lie in a folder, and no others.

What Flower lists is the measure, not a note of ours that may be lost: it has every node's key, and it never forgets
those that were shut out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from fedkeel.deploy.flower import Server, control
from fedkeel.deploy.keys import public, public_key
from fedkeel.errors import ConfigError, RunError

SHUT = "unregistered"
"""Flower's status of a node that was shut out."""

Say = Callable[[str], None]


class Admission:
    """Brings Flower's list of nodes in line with a folder of keys. The same warning is said once until that changes."""

    def __init__(self, server: Server, keys: Path, say: Say) -> None:
        self.server, self.keys, self.say = server, keys, say
        self._seen: tuple[Mapping[str, str], Mapping[str, str]] | None = None
        self._done = False
        self._said: set[str] = set()

    def look(self) -> None:
        """Looks at the folder; acts when it is not as before, or not all went well then."""
        there, faults = dict[str, str](), dict[str, str]()
        for name, path in public(self.keys).items():
            try:
                there[name] = public_key(path)
            except ConfigError as error:
                faults[name] = str(error)
        if (there, faults) != self._seen:
            self._seen, self._done, self._said = (there, faults), False, set()
        if self._done:
            return
        for text in faults.values():
            self._warn(text)
        if not there and not faults:  # a disk that is not there yet must not cost all nodes their keys
            self._warn(f"there is no NAME.pub in {self.keys}: no new node may join, and none is shut out")
            self._done = True
            return
        try:
            self._done = self._settle(there, faults)
        except (RunError, ConfigError, OSError) as error:
            self._warn(f"nodes are not registered yet: {error}")

    def _settle(self, there: Mapping[str, str], faulty: Collection[str]) -> bool:
        """Shuts out, then lets in; whether all that went. there: keys by name. faulty: names with a file of no use."""
        names, done = {key: name for name, key in there.items()}, True
        with control(self.server) as flower:
            nodes = flower.nodes()
            for node in nodes:
                # a file that cannot be read now may still be this node's key
                if node["status"] == SHUT or node["key"] in names or node["name"] in faulty:
                    continue
                label = node["name"] or node["node"]
                try:
                    flower("supernode", "unregister", node["node"])
                    self.say(f"node {label} is shut out: its key is gone from {self.keys}")
                except RunError as error:
                    done = False
                    self._warn(f"node {label} is not shut out yet: {error}")
            known = {node["key"]: node["status"] for node in nodes}
            for key, name in names.items():
                path = self.keys / f"{name}.pub"
                if known.get(key) == SHUT:
                    again = "this key was shut out before, which is for good: make a new one under a new name"
                    self._warn(f"node {name} may not join: {path}: {again}")
                elif key not in known:
                    try:
                        flower("supernode", "register", str(path), "--name", name)
                        self.say(f"node {name} may join")
                    except RunError as error:
                        done = False
                        self._warn(f"node {name} may not join yet: {path}: {error}")
        return done

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(f"warning: {text}")
