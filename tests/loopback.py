"""A Flower grid within this process: what crosses goes through Flower's own serialisation, what clients keep lies in
files, and every message is handled by `client_app` as if in a process of its own. And data that configurations name."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tiny
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedkeel.config import Config
from fedkeel.data.dataset import Dataset
from fedkeel.loop import Result
from fedkeel.registry import register
from fedkeel.runtimes import flower
from fedkeel.runtimes.flower_server import serve

Change = Callable[[str, Message, Callable[[], Message]], Message | None]
"""What happens to a message at a node: (action, message, answer) to the reply, None for none ever."""


@register("datasets", "tiny")
@dataclass(frozen=True, kw_only=True)
class Tiny:
    """The tests' images, which a configuration can name; decoded once."""

    held: ClassVar[dict[str, Dataset]] = {}

    def load(self) -> Dataset:
        return self.held.setdefault("tiny", tiny.data())


def over_the_wire(message: Message) -> Message:
    """A message as it arrives: deflated into bytes by Flower and made again from them."""
    objects = {number: each.deflate() for number, each in get_all_nested_objects(message).items()}
    found = inflate_object_from_contents(message.object_id, objects)
    assert isinstance(found, Message)
    found.metadata.__dict__["_message_id"] = message.object_id
    return found


class Loopback(Grid):
    """See the module. nodes: node-config by node's number; they take messages at once, or in threads of their own."""

    def __init__(self, nodes: Mapping[int, Mapping[str, object]], threads: bool = False) -> None:
        self.nodes: dict[int, dict[str, object]] = {number: dict(config) for number, config in nodes.items()}
        self.threads = threads
        self.change: dict[int, Change] = {}
        self.listing: Callable[[], None] = lambda: None
        self.log: list[tuple[int, str]] = []
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._counter = itertools.count()
        self._lock = threading.Lock()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        self.listing()
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            arrived, number = over_the_wire(message), f"message {next(self._counter)}"
            numbers.append(number)
            self.sent.append(arrived)
            node = message.metadata.dst_node_id
            self.log.append((node, message.metadata.message_type))
            if self.threads:
                threading.Thread(target=self._handle, args=(number, node, arrived), daemon=True).start()
            else:
                self._handle(number, node, arrived)
        return numbers

    def _handle(self, number: str, node: int, message: Message) -> None:
        def answer() -> Message:
            context = Context(1, node, dict(self.nodes[node]), RecordDict(), {})
            return flower.client_app(message, context)

        if node not in self.nodes:
            reply: Message | None = Message(Error(5, "Node Unavailable"), reply_to=message)
        else:
            try:
                act = self.change.get(node)
                reply = answer() if act is None else act(message.metadata.message_type, message, answer)
            except Exception as error:  # as Flower's own process for clients does
                reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        if reply is not None:
            with self._lock:
                self._replies[number] = over_the_wire(reply)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def grid(folder: Path, clients: int = 4, threads: bool = False) -> Loopback:
    """One node a client, number 100 and on."""
    return Loopback(
        {100 + k: {"client": str(k), "state-dir": str(folder / f"node{k}")} for k in range(clients)}, threads
    )


def federate(grid: Loopback, config: Config, resume: bool = False) -> Result:
    """A run over the grid, as the server's process makes it."""
    return serve(flower.GridPost(grid), {"config": config.toml(), "resume": resume, "runs-dir": ""})


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
