"""Federations of real machines with Flower (extra `flower`): its messages, and the two halves of the app.

`server_app` runs the ordinary round loop, `client_app` is a client; a Flower app is these two and a configuration:

    [tool.flwr.app.components]
    serverapp = "fedkeel.runtimes.flower:server_app"
    clientapp = "fedkeel.runtimes.flower:client_app"

run-config: `config` (a whole configuration as TOML), `resume`, `runs-dir`. node-config: `client` (name or number; else
Flower's `partition-id` counts), `data` (a site's own), `state-dir`. One client per node.

Of Flower, messages and the list of nodes are used, nothing else: its strategies hold no state of clients and cannot be
resumed, and its `send_and_receive` lets one broken upload hold up a whole round. What a client keeps is in files of its
own, since Flower loses larger states of clients, keeps those of clients that failed, and none over a restart.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedkeel.errors import ConfigError, MissingExtra, RunError
from fedkeel.registry import register
from fedkeel.runtimes import wire
from fedkeel.runtimes.base import Runtime
from fedkeel.runtimes.wire import Packet, Raw

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from fedkeel.job import Job
    from fedkeel.runtimes.flower_roster import Letter, Lost

__all__ = ["Flower", "client_app", "server_app"]  # noqa: F822  (see `__getattr__`; Flower looks for the names here)

KIND = "fedkeel.raw"
"""What our arrays call the way in which they are written."""
TENSORS, VALUES, TEXT = "tensors", "values", "json"
GRACE = 30.0
"""Seconds by which a message outlives its deadline: it ends when nobody waits for it any more."""
STUCK = 15.0
"""Seconds after its deadline until a client that does not even notice it is ended."""


@register("runtimes", "flower")
@dataclass(frozen=True, kw_only=True)
class Flower:
    """Clients on machines of their own, by Flower: for runs that are submitted to a federation (fedkeel deploy)."""

    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        flwr()
        submit = "runs on a federation: fedkeel deploy server, fedkeel deploy node, then fedkeel deploy submit CONFIG"
        raise ConfigError("runtime", "flower", submit)

    def start(self, job: Job) -> Runtime:
        """Never called: a federation's server brings its own engine (flower_server.py)."""
        raise NotImplementedError


def flwr() -> None:
    """Imports Flower, quiet. Raises MissingExtra."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        import flwr.app
        import flwr.clientapp
        import flwr.serverapp  # noqa: F401
    except ImportError:
        raise MissingExtra("runtime 'flower'", "flower") from None


def __getattr__(name: str) -> Any:
    """`client_app` and `server_app`, made when they are asked for: Flower is imported by nothing else."""
    if name not in ("client_app", "server_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    flwr()
    made = _client_app() if name == "client_app" else _server_app()
    globals()[name] = made
    return made


# messages -------------------------------------------------------------------------------------------------------------


def record_of(packet: Packet) -> RecordDict:
    """A packet as the content of a message."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    for raw in packet.tensors.values():
        if raw.made is None:  # with its hash, which Flower computes once for each object
            raw.made = Array(raw.dtype, raw.shape, KIND, raw.data)
    arrays = ArrayRecord({name: raw.made for name, raw in packet.tensors.items()})
    return RecordDict({TENSORS: arrays, VALUES: ConfigRecord({TEXT: packet.text})})


def packet_of(content: RecordDict) -> Packet:
    """The packet in a message. Raises Malformed."""
    if set(content) != {TENSORS, VALUES}:
        raise wire.Malformed(f"a message with the records {wire.short(sorted(map(str, content))[:4], 200)}")
    arrays, values = content.array_records.get(TENSORS), content.config_records.get(VALUES)
    text = None if values is None else values.get(TEXT)
    if arrays is None or not isinstance(text, str):
        raise wire.Malformed("a message without tensors or values")
    for name, array in arrays.items():
        if array.stype != KIND:
            raise wire.Malformed(f"{name[:40]!r} is written as {array.stype[:40]!r}")
    return Packet({name: Raw(each.dtype, tuple(each.shape), each.data) for name, each in arrays.items()}, text)


# the server's side ----------------------------------------------------------------------------------------------------


class GridPost:
    """A Flower grid as the server's post (see flower_roster.Post)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def nodes(self) -> set[int]:
        """Those that Flower takes for connected."""
        return set(self.grid.get_node_ids())

    def send(self, letters: Sequence[Letter]) -> list[str]:
        """Pushes messages; "" for one that Flower did not take."""
        from flwr.app import Message

        messages = [
            Message(record_of(each.packet), each.node, each.action, ttl=each.seconds + GRACE) for each in letters
        ]
        numbers = [number or "" for number in self.grid.push_messages(messages)]
        return numbers if len(numbers) == len(messages) else [""] * len(messages)

    def take(self, number: str) -> Packet | Lost | None:
        """Pulls one answer."""
        from fedkeel.runtimes.flower_roster import Lost

        for message in self.grid.pull_messages([number]):
            if message.has_error():
                return Lost(f"Flower, code {message.error.code}: {wire.said(message.error.reason, 'failure')}")
            try:
                return packet_of(message.content)
            except wire.Malformed as fault:
                return Lost(f"refused: {fault}")
        return None


def _server_app() -> ServerApp:
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        from fedkeel.runtimes.flower_server import serve

        if "config" not in context.run_config:
            raise ConfigError("config", None, "the app's run-config needs a configuration, as TOML in one text")
        serve(GridPost(grid), context.run_config, os.environ.get("FEDKEEL_RUNS_DIR", ""))

    app.main()(main)
    return app


# a client's side ------------------------------------------------------------------------------------------------------


def _client_app() -> ClientApp:
    from flwr.clientapp import ClientApp

    from fedkeel.runtimes.flower_client import ACTIONS

    app = ClientApp()
    for action in ACTIONS:
        category, _, name = action.partition(".")
        getattr(app, category)(name)(_handler(action))
    return app


def _handler(action: str) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        from flwr.app import Message

        from fedkeel.runtimes.flower_client import answer

        node = cast(Mapping[str, object], context.node_config)
        with watched(message.metadata.created_at + seconds_of(message) - time.time()):
            packet = answer(action, packet_of(message.content), node)
        return Message(record_of(packet), reply_to=message)

    return handle


def seconds_of(message: Message) -> float:
    """How long the server waits for the answer."""
    found = wire.loads(packet_of(message.content).text).get("deadline")
    return float(found) if isinstance(found, (int, float)) else message.metadata.ttl


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Ends what is inside when so many seconds have passed: a client that hangs is free for the next round.

    First by a RunError, which becomes an answer (a TimeoutError is an OSError: it would be taken for a broken file);
    what does not notice that is ended with its process. Only where the process is a node's own (FEDKEEL_NODE=1), not
    one that it shares with others, as in a simulation.
    """
    if os.environ.get("FEDKEEL_NODE") != "1" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise RunError("the round's deadline has passed")

    seconds = max(seconds, 0.01)
    last = threading.Timer(seconds + STUCK, os._exit, [1])
    last.daemon = True
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    last.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        last.cancel()
