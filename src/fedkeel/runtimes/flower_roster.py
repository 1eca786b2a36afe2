"""Who the clients of a federation are at present, and messages to them with a deadline.

Nothing here knows of Flower: a `Post` takes messages to nodes and brings answers. Clients are known by the name or
number that their node gives; a node is only where they are at present. Each answer is waited for by a thread of its
own, so that one that comes slowly, or half, holds up nobody; one that comes too late is never looked at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from fedkeel.config import Config
from fedkeel.errors import TooFewClients
from fedkeel.runtimes import wire
from fedkeel.runtimes.flower_client import name_of
from fedkeel.runtimes.wire import Malformed, Packet

NEWCOMERS = 60.0
"""Seconds that a round waits for new nodes to say who they are; who takes longer is admitted later."""
AGAIN = 60.0
"""Seconds until a node that was refused is asked again."""
AT_ONCE = 8
"""Messages handed to the post together."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Letter:
    """A message: to a node, what it is to do, with what, and seconds until the answer is no longer wanted."""

    node: int
    action: str
    packet: Packet
    seconds: float


@dataclass(frozen=True)
class Lost:
    """In place of an answer: why there is none."""

    reason: str


class Post(Protocol):
    """Takes messages to nodes and brings their answers."""

    def nodes(self) -> set[int]:
        """Those that are connected."""
        ...

    def send(self, letters: Sequence[Letter]) -> list[str]:
        """Sends them; a number for each to ask for its answer by, "" for one that could not be sent."""
        ...

    def take(self, number: str) -> Packet | Lost | None:
        """The answer to a message, None while there is none. May raise, and may take long."""
        ...


class Awaited:
    """The answer to one message, fetched by a thread of its own until its deadline has passed."""

    def __init__(self, post: Post, number: str, seconds: float, slow: float, unsent: str = "") -> None:
        """slow: the longest pause between two looks. unsent: why there is no `number`, as far as that is known."""
        self._post, self._number, self._seconds, self._slow = post, number, seconds, slow
        self._until = time.monotonic() + seconds
        self._came = threading.Event()
        self._answer: Packet | Lost = Lost(": ".join(filter(None, ["it could not be sent", unsent])))
        self._trouble = ""  # why the last look failed
        if number:
            threading.Thread(target=self._fetch, daemon=True).start()
        else:
            self._came.set()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._came.is_set() or time.monotonic() >= self._until

    def wait(self) -> Packet | Lost:
        """The answer, once it is there or too late for it."""
        if self._came.wait(max(0.0, self._until - time.monotonic())):
            return self._answer
        return Lost("; ".join(filter(None, [f"no reply within {self._seconds:g} seconds", self._trouble])))

    def _fetch(self) -> None:
        pause = 0.02
        while time.monotonic() < self._until:
            try:
                found, self._trouble = self._post.take(self._number), ""
            except Exception as error:  # the post's connection may break off and come back
                found, self._trouble = None, _words(error)
            if found is not None:
                self._answer = found
                self._came.set()
                return
            time.sleep(pause)
            pause = min(1.5 * pause, self._slow)


def send(post: Post, letters: Iterator[Letter], count: int) -> list[Awaited]:
    """Sends `count` messages, made one after another, and waits for all their answers from then on. Those that the post
    fails to take are lost, like any other: it may be away for a moment."""
    out: list[Awaited] = []
    slow = max(0.3, 0.02 * count)
    while batch := list(islice(letters, AT_ONCE)):
        unsent = ""
        try:
            numbers = post.send(batch)
        except Exception as error:
            numbers, unsent = [""] * len(batch), _words(error)
        out += [Awaited(post, no, each.seconds, slow, unsent) for no, each in zip(numbers, batch, strict=True)]
    return out


@dataclass(frozen=True)
class Member:
    """A node that may work for a client. samples: how many its client has. partition: hash, "" at a site."""

    node: int
    client: int
    samples: int
    partition: str


class Roster:
    """Which node works for which client at present."""

    def __init__(self, post: Post, config: Config, facts: Mapping[str, object], say: Say) -> None:
        """facts: what every message says."""
        self.post, self.config, self.say = post, config, say
        self.facts: dict[str, object] = dict(facts)
        self.partition: str | None = None
        """Hash of the server's partition, once it is known."""
        self.samples: dict[int, int] = {}
        """How many samples each client has that has ever joined."""
        self._claims: dict[int, list[Member]] = {}  # by client; the first one works, the others were too late
        self._asked: dict[int, Awaited] = {}
        self._refused: dict[int, tuple[str, float]] = {}  # why, and when it is asked again

    def node_of(self, client: int) -> int | None:
        """The node that works for this client."""
        members = self._claims.get(client)
        return members[0].node if members else None

    @property
    def clients(self) -> list[int]:
        """Those that a node works for."""
        return sorted(self._claims)

    def name(self, client: int) -> str:
        """As messages call it."""
        return f"client {name_of(client, self.config)}"

    def wait(self, clients: Collection[int], wanted: int, seconds: float) -> int:
        """Waits until so many of these clients have nodes, at most so long; how many have in the end."""
        until = time.monotonic() + seconds
        self.admit(0)
        while (there := sum(client in self._claims for client in clients)) < wanted and time.monotonic() < until:
            time.sleep(0.1)
            self.admit(0)
        return there

    def admit(self, seconds: float) -> None:
        """Forgets nodes that are gone and asks new ones who they are, for whose answers it waits at most so long; those
        that were refused are asked again now and then, and not waited for."""
        try:
            there = self.post.nodes()
        except Exception as error:
            self.say(f"the nodes cannot be listed now: {_words(error)}")
            return
        self._forget(there)
        known = {member.node for members in self._claims.values() for member in members} | set(self._asked)
        now = time.monotonic()
        new = sorted(n for n in there - known if n not in self._refused or self._refused[n][1] <= now)
        first = [node for node in new if node not in self._refused]
        load = self.config.federation.load_deadline
        packet = Packet({}, wire.dumps({**self.facts, "deadline": load}))
        answers = send(self.post, (Letter(node, "query.info", packet, load) for node in new), len(new))
        self._asked |= dict(zip(new, answers, strict=True))
        until = now + seconds
        while any(not self._asked[node].done for node in first) and time.monotonic() < until:
            time.sleep(0.05)
        for node in [node for node in self._asked if self._asked[node].done]:
            self._hear(node, self._asked.pop(node).wait())

    def check(self, partition: str) -> None:
        """From now on nodes must have this partition, those that have joined already too."""
        self.partition = partition
        for members in list(self._claims.values()):
            for member in members:
                if why := self._unlike(member):
                    self.leave(member.node)
                    self._refuse(member.node, f"{self.name(member.client)}: {why}")

    def leave(self, node: int) -> None:
        """This node works for nobody any more, until it has said again who it is."""
        for client, members in list(self._claims.items()):
            if left := [member for member in members if member.node != node]:
                self._claims[client] = left
            else:
                del self._claims[client]

    def _forget(self, there: set[int]) -> None:
        for client in self.clients:
            first = self._claims[client][0]
            for member in [member for member in self._claims[client] if member.node not in there]:
                self.leave(member.node)
            if first.node not in there:
                node = self.node_of(client)
                what = "its node has left" if node is None else f"its node has left; node {node} takes its place"
                self.say(f"{self.name(client)}: {what}")
        for nodes in (self._asked, self._refused):
            for node in [node for node in nodes if node not in there]:
                del nodes[node]

    def _hear(self, node: int, answer: Packet | Lost) -> None:
        """Takes a node's answer to who it is."""
        if isinstance(answer, Lost):
            return self._refuse(node, f"node {node} does not say who it is: {answer.reason}")
        try:
            member, facts = self._member(node, answer)
        except Malformed as error:
            return self._refuse(node, str(error))
        for text in warnings_of(facts):
            self.say(f"{self.name(member.client)}: {text}")
        members = self._claims.setdefault(member.client, [])
        members.append(member)
        self.samples.setdefault(member.client, member.samples)
        self._refused.pop(node, None)
        if len(members) > 1:
            self.say(
                f"{self.name(member.client)}: node {node} says that it is this client, and so does node "
                f"{members[0].node}, which was there before: node {node} is refused while that one is connected"
            )

    def _member(self, node: int, answer: Packet) -> tuple[Member, Mapping[str, Any]]:
        """Raises Malformed for a node that must not take part, saying why."""
        if answer.size > wire.MIB:
            raise Malformed(f"node {node}: {answer.size} bytes are no answer to who it is")
        facts = wire.loads(answer.text)
        number = facts.get("client")
        known = type(number) is int and 0 <= number < self.config.clients
        who = self.name(int(str(number))) if known else f"node {node}"
        if unlike := wire.differing(facts.get("versions"), wire.versions()):
            raise Malformed(f"{who}: {unlike}")
        if failure := facts.get("failure"):
            raise Malformed(f"{who}: {wire.said(failure, 'failure')}")
        samples, partition = facts.get("samples"), facts.get("partition")
        counted = type(samples) is int and 0 <= samples < wire.HEAVIEST  # it becomes a weight
        if not known or not counted or not isinstance(partition, str) or answer.tensors:
            raise Malformed(f"{who}: its answer is no answer")
        assert isinstance(number, int) and isinstance(samples, int)
        member = Member(node, number, samples, partition)
        if facts.get("key") != self.config.key():
            raise Malformed(f"{who}: it reads the configuration in another way than the server")
        if why := self._unlike(member):
            raise Malformed(f"{who}: {why}")
        return member, facts

    def _unlike(self, member: Member) -> str:
        if self.partition is None or member.partition in ("", self.partition):
            return ""
        return "its data, or their partition, are not the server's"

    def _refuse(self, node: int, reason: str) -> None:
        if self._refused.get(node, ("", 0.0))[0] != reason:
            self.say(f"refused: {reason}")
        self._refused[node] = (reason, time.monotonic() + AGAIN)


def gather(roster: Roster, clients: Collection[int], config: Config, everyone: bool = True) -> None:
    """Waits for these clients, for all of them (everyone) or for min_replies, and says who is missing where all were
    waited for. Raises TooFewClients when fewer than min_replies come."""
    enough, seconds = config.enough(len(clients)), config.federation.join_wait
    there = roster.wait(clients, len(clients) if everyone else enough, seconds)
    if there < enough:
        raise TooFewClients(
            f"{there} of {len(clients)} clients are connected after {seconds:g} seconds (federation.join_wait); "
            f"min_replies = {config.min_replies}"
        )
    absent = [roster.name(client) for client in clients if roster.node_of(client) is None]
    if absent and everyone:
        roster.say(f"going on without {', '.join(absent)}")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {wire.short(error, 300)}"


def warnings_of(facts: Mapping[str, Any]) -> list[str]:
    """What a client warns of, fit to be printed."""
    found = facts.get("warnings")
    return [wire.said(text, "warnings") for text in found[:20]] if isinstance(found, list) else []
