"""fedkeel's Flower app with nodes and a server that do on command what machines do by themselves: stop at a certain
moment, hang, or send nonsense. For tests of reliability.

A command is a file in the folder FEDKEEL_DEEDS, named `<run>.<client>.<round>` (or `<run>.server.<round>`), rounds
counted from 1; its text is the deed. It is renamed to `....reached` at the moment in question, so it is done once.
"""

from __future__ import annotations

import os
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedkeel.algorithms.scaffold import Scaffold
from fedkeel.checkpoint import Checkpoints
from fedkeel.clients import ClientStore
from fedkeel.errors import RunError
from fedkeel.runtimes import flower, wire
from fedkeel.runtimes.flower_client import ACTIONS
from fedkeel.runtimes.wire import Packet

HERE = "unruly:server_app", "unruly:client_app"
"""The app's components."""
HUGE = 48 << 20
"""Bytes of a huge payload."""

server_app = ServerApp()
client_app = ClientApp()


def deeds() -> Path:
    """Where the commands lie."""
    return Path(os.environ["FEDKEEL_DEEDS"])


def stop(deed: Path) -> None:
    """Says that the moment has come, and waits to be killed, or until `....go` is there."""
    deed.rename(f"{deed}.reached")
    while not Path(f"{deed}.go").exists():
        time.sleep(0.05)


def hang(deed: Path, hard: bool) -> None:
    """Says so and does nothing more for an hour; hard: also when it is asked to end."""
    deed.rename(f"{deed}.reached")
    until = time.monotonic() + 3600
    while time.monotonic() < until:
        try:
            time.sleep(1)
        except RunError:
            if not hard:
                raise


# the server -----------------------------------------------------------------------------------------------------------


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Stops after the checkpoint of a round where it is told to."""
    saved = Checkpoints.save

    def save(self: Checkpoints, server: Any, accepted: Any) -> None:
        saved(self, server, accepted)
        deed = deeds() / f"{self.folder.parent.name}.server.{server.round}"
        if deed.exists():
            stop(deed)

    Checkpoints.save = save  # type: ignore[method-assign]
    flower.server_app(grid, context)


# a node ---------------------------------------------------------------------------------------------------------------


def handler(action: str) -> Callable[[Message, Context], Message]:
    """What the node does with such messages."""

    def handle(message: Message, context: Context) -> Message:
        deed = deed_of(message, context) if action == "train.fit" else None
        if deed is None:
            return flower.client_app(message, context)
        word, _, moment = deed.read_text().partition(" ")
        if word == "stop":
            arrange(deed, moment)
        elif word in ("hang", "hang-hard"):
            in_training(lambda: hang(deed, word == "hang-hard"))
        elif word == "raise":
            deed.rename(f"{deed}.reached")
            raise RuntimeError("this node's disk is on fire")
        reply = flower.client_app(message, context)
        if word in NONSENSE:
            deed.rename(f"{deed}.reached")
            packet = NONSENSE[word](flower.packet_of(reply.content))
            return Message(flower.record_of(packet), reply_to=message)
        return reply

    return handle


def deed_of(message: Message, context: Context) -> Path | None:
    """The command for this client in this round, None where there is none."""
    facts = wire.loads(flower.packet_of(message.content).text)
    run, client = tomllib.loads(facts["config"])["name"], context.node_config["client"]
    deed = deeds() / f"{run}.{client}.{facts['round'] + 1}"
    return deed if deed.exists() else None


def arrange(deed: Path, moment: str) -> None:
    """Stops before or in training, after it (its state is on disk, the server has heard nothing), or in the upload."""
    if moment == "before":
        stop(deed)
    elif moment == "during":
        in_training(lambda: stop(deed))
    elif moment == "after":
        flush = ClientStore.flush

        def after(self: ClientStore, keys: Any) -> None:
            flush(self, keys)
            stop(deed)

        ClientStore.flush = after  # type: ignore[method-assign]
    else:
        assert moment == "upload"
        module: Any = sys.modules["flwr.supernode.runtime.run_clientapp"]
        push = module.push_objects

        def upload(objects: dict[str, Any], send: Callable[[str, bytes], None], **rest: Any) -> None:
            """The server knows that a reply comes, and gets all of it but its last part."""
            wanted = set(rest["object_ids_to_push"])
            push(dict(objects), send, object_ids_to_push=wanted - {max(wanted)})
            stop(deed)

        module.push_objects = upload


def in_training(act: Callable[[], None]) -> None:
    """Once, after the second step's gradient."""
    correct, steps = Scaffold.correct, 0

    def second(self: Scaffold, local: Any, grad: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 2:
            act()
        return correct(self, local, grad)

    Scaffold.correct = second  # type: ignore[method-assign]


def nan(packet: Packet) -> Packet:
    """One weight is not a number."""
    delta = wire.tensor_of(packet.tensors["delta"])
    delta[3] = torch.nan
    return replace(packet, tensors={**packet.tensors, "delta": wire.raw(delta)})


def shapes(packet: Packet) -> Packet:
    """One weight too few."""
    return replace(packet, tensors={**packet.tensors, "delta": wire.raw(wire.tensor_of(packet.tensors["delta"])[1:])})


def huge(packet: Packet) -> Packet:
    """More than the server takes, in a field of the right name."""
    return replace(packet, tensors={**packet.tensors, "delta": wire.raw(torch.zeros(HUGE // 4))})


def undeclared(packet: Packet) -> Packet:
    """A field that the method does not declare."""
    return replace(packet, tensors={**packet.tensors, "extra.images": wire.raw(torch.zeros(8, dtype=torch.uint8))})


def old(packet: Packet) -> Packet:
    """The reply of another version of the library."""
    facts = wire.loads(packet.text)
    return replace(packet, text=wire.dumps({**facts, "versions": {**facts["versions"], "fedkeel": "0.0.1"}}))


def vast(packet: Packet) -> Packet:
    """Numbers that are finite, and whose sum with others is not."""
    delta = torch.full_like(wire.tensor_of(packet.tensors["delta"]), 3e38)
    return replace(packet, tensors={**packet.tensors, "delta": wire.raw(delta)})


def heavy(packet: Packet) -> Packet:
    """A weight against which all others are nothing."""
    return replace(packet, text=wire.dumps({**wire.loads(packet.text), "weight": 1e300}))


NONSENSE = {
    "nan": nan, "shapes": shapes, "huge": huge, "undeclared": undeclared, "old": old, "vast": vast, "heavy": heavy,
}  # fmt: skip

for each in ACTIONS:
    category, _, name = each.partition(".")
    getattr(client_app, category)(name)(handler(each))
