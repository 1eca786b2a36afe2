"""The server of a federation: the ordinary round loop over clients on other machines (see flower_roster.py)."""

from __future__ import annotations

import json
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from fedkeel import loop, personal
from fedkeel.config import Config, parse
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, FedkeelError, RunError, TooFewClients
from fedkeel.files import write_json
from fedkeel.job import Holdings, Job
from fedkeel.local import payload, size_of
from fedkeel.partition.manifest import Partition
from fedkeel.partition.sites import Sites
from fedkeel.record import Record, spent
from fedkeel.records import Reply, Server
from fedkeel.rehearsal import rehearsed
from fedkeel.rng import Streams
from fedkeel.runtimes import wire
from fedkeel.runtimes.base import Curve, Progress, Tuning
from fedkeel.runtimes.flower_client import name_of
from fedkeel.runtimes.flower_roster import NEWCOMERS, Awaited, Letter, Lost, Post, Roster, gather, send, warnings_of
from fedkeel.runtimes.wire import Gate, Malformed, Packet

RETRIES = 5
"""Times that a round is tried again before too few usable updates fail the run."""
PAUSE = 5.0
"""Seconds before a round is tried again."""
ATTEMPTS = 3
"""Times that a client is asked to make its images before a round goes on without it."""
NOTE = "federation.json"
"""In the run's folder."""


@dataclass(frozen=True)
class Federated:
    """The engine of a run on a federation. folder: the run's. everyone: whether to wait for all clients at first."""

    remote: ClassVar[bool] = True

    roster: Roster
    folder: Path | None
    everyone: bool = True

    def start(self, job: Job) -> FlowerRuntime:
        """Waits for the clients. Raises TooFewClients when fewer than min_replies have come in the end."""
        config, roster = job.config, self.roster
        roster.facts["experiment"] = experiment(self.folder, roster.samples, config.federation.sites)
        if not isinstance(config.partition, Sites):
            roster.check(job.partition.hash)
        gather(roster, range(job.clients), config, self.everyone)
        return FlowerRuntime(job, roster, self.folder)


class FlowerRuntime:
    """See runtimes/base.py."""

    def __init__(self, job: Job, roster: Roster, folder: Path | None) -> None:
        self.job, self.roster, self.post, self.folder = job, roster, roster.post, folder
        self.options = job.config.federation
        limit = self.options.max_reply
        model = size_of((job.worker.weights.flat,))
        self.limit = 16 * model + 64 * wire.MIB if limit is None else limit * wire.MIB
        self._preparing: dict[int, tuple[int, Awaited]] = {}  # node and answer, by client
        self._prepared: set[int] = set()  # nodes
        self._unprepared: dict[int, list[str]] = {}  # why there was no answer to that, by client, since the round began
        self._said: set[str] = set()
        self._down: dict[int, int] = {}  # bytes of the last letter, by client

    # rounds -----------------------------------------------------------------------------------------------------------

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        roster, job = self.roster, self.job
        roster.admit(NEWCOMERS)
        remember(self.folder, roster.samples)
        wanted = job.config.enough(len(clients))
        if sum(roster.node_of(client) is not None for client in clients) < wanted:
            missing = ", ".join(roster.name(client) for client in clients if roster.node_of(client) is None)
            roster.say(f"round {server.round + 1}: waiting for {missing}")
            roster.wait(clients, wanted, self.options.join_wait)
        ready = self._prepared_of(clients, wanted)
        answers = self._send("train.fit", server, ready, accepted, self.options.deadline, measure)
        expected = expected_of(job, server, clients[0], self._warn)  # while clients train
        for client in clients:
            if client not in answers:
                yield Reply(client, failure=self._absent(client))
                continue
            answer = answers.pop(client).wait()
            if isinstance(answer, Lost):
                reply = Reply(client, failure=answer.reason)
            else:
                likely = expected or wire.assumed(answer, server, job.method.sends())
                reply = self._gate(server, likely).reply(answer, client)
                if not reply.failure:
                    expected = likely
                self._heed(client, answer)
            yield replace(reply, bytes_down=0 if job.method.pooled else self._down[client])

    def _prepared_of(self, clients: Sequence[int], wanted: int) -> list[int]:
        """Those who can train, so many of them if there is a way: clients that have yet to make their images are waited
        for, and asked again a few times when no answer comes."""
        self._unprepared.clear()
        until = time.monotonic() + self.options.generation_deadline
        self._prepare_late()
        while len(ready := [client for client in clients if self._ready(client)]) < wanted:
            if not self._preparing.keys() & set(clients) or time.monotonic() > until:
                break
            time.sleep(0.2)
            self.roster.admit(0)
            self._prepare_late()
        return ready

    def _absent(self, client: int) -> str:
        """Why a client was not asked to train."""
        if client in self._preparing:
            return "its images are still being made"
        if client in self._unprepared and self.roster.node_of(client) is not None:
            return f"it has not made its images: {self._unprepared[client][-1]}"
        return NO_NODE

    def _gate(self, server: Server, expected: Mapping[str, wire.Kind]) -> Gate:
        job = self.job
        return Gate(server.round, expected, metric_names(job.data.classes), self.limit, job.method.pooled)

    def _heed(self, client: int, answer: Packet) -> None:
        """Passes on what a client warns of; a node that is another client by now has to join again."""
        if wire.too_large(answer, self.limit):
            return
        try:
            facts = wire.loads(answer.text)
        except Malformed:
            return
        for text in warnings_of(facts):
            self._warn(f"{self.roster.name(client)}: {text}")
        node = self.roster.node_of(client)
        if node is not None and facts.get("client", client) != client:
            self.roster.leave(node)

    def _warn(self, text: str) -> None:
        """Once: a client has a new process for each message, which warns of the same again."""
        if text not in self._said:
            self._said.add(text)
            self.job.warn(text)

    def _send(
        self,
        action: str,
        server: Server,
        clients: Sequence[int],
        accepted: Mapping[int, int],
        seconds: float,
        measure: Collection[int] = (),
    ) -> dict[int, Awaited]:
        """Sends the server's state to clients that have nodes."""
        shared = {name: wire.raw(tensor) for name, tensor in wire.public(server).items()}
        there = {client: node for client in clients if (node := self.roster.node_of(client)) is not None}

        def letters() -> Iterator[Letter]:
            for client, node in there.items():
                facts = {
                    **self.roster.facts,
                    "client": client,
                    "round": server.round,
                    "accepted": accepted.get(client),
                    "needed": sorted(self.job.checkpointed(client)),
                    "measure": client in measure,
                    "deadline": seconds,
                }
                mail = self.job.mail(server, client)
                self._down[client] = payload(server, mail)
                yield Letter(node, action, wire.down(shared, mail, facts), seconds)

        return dict(zip(there, send(self.post, letters(), len(there)), strict=True))

    # before and after rounds ------------------------------------------------------------------------------------------

    def prepare(self, generating: Progress, tuning: Tuning) -> int:
        """Clients make their images where they are: none of them is on this machine."""
        clients = [client for client in self.roster.clients if self._makes_images(client)]
        self._ask_to_prepare(clients)
        for done, client in enumerate(clients):
            generating(done, len(clients))
            self._preparing[client][1].wait()
            self._note_prepared(client)
        if clients:
            generating(len(clients), len(clients))
        return 0

    def _makes_images(self, client: int) -> bool:
        """Whether this client trains on images of its own making; of a site as far as the method tells."""
        job = self.job
        if client >= job.clients or job.generator_of(client) is None:
            return False
        counts = job.counts[client]
        if isinstance(job.config.partition, Sites):  # what it holds is not known here: say, a single class
            counts = torch.zeros_like(counts)
            counts[0] = 100
        return int(job.method.plan(counts, job.profiles[client]).fake.sum()) > 0

    def _ask_to_prepare(self, clients: Sequence[int]) -> None:
        seconds, facts = self.options.generation_deadline, self.roster.facts
        there = [(k, node) for k in clients if (node := self.roster.node_of(k)) is not None]
        packets = (Packet({}, wire.dumps({**facts, "client": k, "deadline": seconds})) for k, _ in there)
        letters = (Letter(node, "train.prepare", each, seconds) for (_, node), each in zip(there, packets, strict=True))
        answers = send(self.post, letters, len(there))
        self._preparing |= {k: (node, answer) for (k, node), answer in zip(there, answers, strict=True)}

    def _prepare_late(self) -> None:
        """Has clients that joined since make their images, beside the rounds."""
        for client, (node, answer) in list(self._preparing.items()):
            if answer.done or node != self.roster.node_of(client):
                self._note_prepared(client)
        missing = [k for k in self.roster.clients if k not in self._preparing and not self._ready(k)]
        self._ask_to_prepare([k for k in missing if len(self._unprepared.get(k, ())) < ATTEMPTS])

    def _ready(self, client: int) -> bool:
        """Whether this client can train in a round."""
        return not self._makes_images(client) or self.roster.node_of(client) in self._prepared

    def _note_prepared(self, client: int) -> None:
        """What came of a client's preparing; one that failed makes its images when it trains, or says why not."""
        node, answer = self._preparing.pop(client)
        if not answer.done:  # its node has left
            return
        found, name = answer.wait(), self.roster.name(client)
        if isinstance(found, Lost):  # it is asked again
            self._unprepared.setdefault(client, []).append(found.reason)
            self._warn(f"{name} has not made its images: {found.reason}")
            return
        self._prepared.add(node)
        try:
            facts = wire.loads(found.text) if not wire.too_large(found, self.limit) else {"failure": "too large"}
        except Malformed as error:
            facts = {"failure": str(error)}
        if failure := facts.get("failure"):
            self._warn(f"{name} has not made its images: {wire.said(failure, 'failure')}")
        for text in warnings_of(facts):
            self._warn(f"{name}: {text}")

    def personal(self, server: Server, accepted: Mapping[int, int]) -> list[Curve]:
        roster, clients = self.roster, range(self.job.clients)
        roster.admit(NEWCOMERS)
        answers = self._send("evaluate.personal", server, clients, accepted, self.options.deadline)
        out: list[Curve] = []
        for client in clients:
            try:
                if client not in answers:
                    raise Malformed(NO_NODE)
                out.append(curve(answers.pop(client).wait(), client, self.limit))
            except Malformed as error:
                out.append(personal.unmeasured(self.job, roster.name(client), str(error)))
        return out

    def close(self) -> None:
        """Nothing is held: threads that still wait end with their deadlines, or with the process."""


NO_NODE = "no node is connected for this client"


def curve(answer: Packet | Lost, client: int, limit: float) -> Curve:
    """A client's measured curve. Raises Malformed."""
    if isinstance(answer, Lost):
        raise Malformed(answer.reason)
    if fault := wire.too_large(answer, limit):
        raise Malformed(fault)
    facts = wire.loads(answer.text)
    if unlike := wire.differing(facts.get("versions"), wire.versions()):
        raise Malformed(unlike)
    if failure := facts.get("failure"):
        raise Malformed(wire.said(failure, "failure"))
    values, size = facts.get("curve"), facts.get("size")
    right = isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    if not right or type(size) is not int or size < 0 or bool(values) != (size > 0) or facts.get("client") != client:
        raise Malformed("its answer is no answer")
    assert isinstance(values, list)
    return values, size


def expected_of(job: Job, server: Server, client: int, warn: Callable[[str], None]) -> dict[str, wire.Kind] | None:
    """What a client sends in this round, by a step that the server trains for itself on noise; None where the method
    cannot do that. The method's declaration has names only; what comes must have the right shapes too."""
    reply = rehearsed(job, server, client, 2 * len(job.data.classes), 1)
    if reply.update is None:
        warn(f"the server cannot try what clients send: {reply.failure}")
        return None
    return wire.kinds(reply)


def metric_names(classes: Sequence[str]) -> set[str]:
    """What clients may be asked to measure."""
    names = ["accuracy", "balanced_accuracy", "loss", *(f"class/{name}" for name in classes)]
    return {f"local_{when}/{name}" for when in ("before", "after") for name in names}


# the server's process -------------------------------------------------------------------------------------------------


class Lines:
    """Tells how a run goes, in lines on stdout: they are the run's log."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.done = 0

    def say(self, text: str) -> None:
        """One line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def started(self, label: str, rounds: int, done: int) -> None:
        self.done = done
        self.say(f"{label}: {rounds} rounds" + (f", {done} of them are done" if done else ""))

    def generating(self, done: int, total: int) -> None:
        self.say(f"{done} of {total} clients have made their images")

    def tuning(self, client: int, done: int, total: int) -> None: ...

    def finished_round(self, record: Record) -> None:
        self.done = int(record["round"])
        parts = [f"round {record['round']}/{self.config.rounds}"]
        if (accuracy := record.get("global/accuracy")) is not None:
            parts.append(f"accuracy {accuracy:.1%}")
        if (accuracy := record.get("personal/accuracy_last")) is not None:
            parts.append(f"personal accuracy {accuracy:.1%}")
        if cost := spent(record):
            parts.append(f"ε {cost}")
        parts += [f"{len(record['clients'])} clients", f"{record['seconds/train']:.1f} s"]
        self.say(", ".join(parts))
        for note in record["failed"]:
            self.say(f"  client {name_of(note['client'], self.config)}: {note['reason']}")

    def warned(self, text: str) -> None:
        self.say(f"warning: {text}")

    def ended(self) -> None: ...


def serve(post: Post, settings: Mapping[str, object], runs_dir: str = "") -> loop.Result:
    """Runs what the app's run-config asks for to its end: `config` (TOML), `resume`, `runs-dir`.

    runs_dir: where runs lie that name no folder, "" = as in the configuration. A round with too few usable updates is
    tried again a few times. Raises as `loop.run` does.
    """
    config = parse(tomllib.loads(str(settings["config"])))
    place = str(settings.get("runs-dir") or "") or runs_dir or config.runs_dir
    config = replace(config, runtime="flower", runs_dir=place)
    lines, again = Lines(config), bool(settings.get("resume", False))
    try:
        check(config, again)
        same_sites(config)
        told = replace(config, mlflow="", tensorboard=False, runs_dir="runs")  # a tracker's address may hold a password
        facts: dict[str, object] = {"config": told.toml(), "versions": wire.versions(), "experiment": "joining"}
        data = config.data.load() if isinstance(config.partition, Sites) else None
        if data is not None:
            facts["images"] = {"classes": data.classes, "shape": data.shape, "mean": data.mean, "std": data.std}
        roster = Roster(post, config, facts, lambda text: lines.warned(text))
        holdings = None if data is None else held(config, data, roster)
        return persisted(config, roster, holdings, lines, again)
    except FedkeelError as error:
        lines.say(f"error: {error}")
        raise


def check(config: Config, again: bool) -> None:
    """Raises ConfigError for what cannot be done on a federation, before anybody is waited for."""
    if not again and (config.folder / "config.toml").exists():
        raise ConfigError("name", config.name, f"{config.folder} holds a run: resume it, or choose another name")
    if not isinstance(config.partition, Sites):
        return
    if config.method.pooled:
        raise ConfigError("algorithm.name", "pooled", "brings all data to one place, which sites do not allow")
    if config.evaluate.validation:
        own = "there are no train images on the server of sites to set aside"
        raise ConfigError("evaluate.validation", config.evaluate.validation, own)


def same_sites(config: Config) -> None:
    """Raises ConfigError where a run that has begun had other names, or these in another order: by their places clients
    are told from each other, and each node has the state of its own client only."""
    note, now = noted(config.folder), list(config.federation.sites)
    if note is not None and note.sites is not None and note.sites != now:
        began = f"must be as when this run began: {', '.join(note.sites) or 'empty'}"
        raise ConfigError("federation.sites", now, began)


def held(config: Config, data: Dataset, roster: Roster) -> Holdings:
    """What the server knows of sites: their classes and shape, and how many samples those have that have joined, in
    this process or, as its note says, before the run was resumed."""
    note = noted(config.folder)
    roster.samples |= note.samples if note is not None else {}
    gather(roster, range(config.clients), config)
    x, y = data.train_x[:0], data.train_y[:0]
    noise = replace(config.noise, label_fraction=0.0)  # there are test images only
    kept = noise.apply(replace(data, train_x=x, train_y=y), Streams(config.seed))
    counts = torch.zeros((config.clients, len(data.classes)), dtype=torch.int64)
    partition = Partition("sites", {}, config.seed, kept.fingerprint, (y,) * config.clients, counts)
    return Holdings(kept, partition, total=lambda: sum(roster.samples.values()))


def persisted(config: Config, roster: Roster, holdings: Holdings | None, lines: Lines, again: bool) -> loop.Result:
    """`loop.run`, gone on with after a round with too few usable updates until it fails too often."""
    tries, before = 0, -1
    while True:
        everyone = tries == 0 and holdings is None  # sites have been waited for
        engine = Federated(roster, config.folder, everyone)
        try:
            return loop.run(
                config, folder=config.folder, listener=lines, resume=again, engine=engine, holdings=holdings
            )
        except TooFewClients as error:
            tries, before = tries + 1 if lines.done == before else 1, lines.done
            if tries > RETRIES:
                raise
            lines.warned(f"{error}; trying again ({tries} of {RETRIES})")
            again = True
            time.sleep(PAUSE)


@dataclass(frozen=True)
class Note:
    """What a run has noted of its federation: the name by which nodes keep what belongs to it; the samples of those who
    have joined so far; the clients' names in order (None: noted by a version that did not do so)."""

    experiment: str
    samples: Mapping[int, int]
    sites: list[str] | None


def noted(folder: Path | None) -> Note | None:
    """A run's note, None where it has not begun. Raises RunError when it cannot be read."""
    path = None if folder is None else folder / NOTE
    if path is None or not path.exists():
        return None
    try:
        table = json.loads(path.read_bytes())
        samples = {int(client): int(count) for client, count in table["samples"].items()}
        return Note(str(table["experiment"]), samples, table.get("sites"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}): clients' states cannot be told from other runs'") from error


def experiment(folder: Path | None, samples: Mapping[int, int], sites: Sequence[str] = ()) -> str:
    """The name by which nodes keep what belongs to this run: made when it begins, the same when it is resumed."""
    note = noted(folder)
    if note is not None:
        return note.experiment
    found = uuid.uuid4().hex
    _note(folder, Note(found, samples, list(sites)))
    return found


def remember(folder: Path | None, samples: Mapping[int, int]) -> None:
    """Adds to the note the samples of those who have joined since: when the run is resumed they may be away."""
    note = noted(folder)
    if note is not None and not note.samples.keys() >= samples.keys():
        _note(folder, replace(note, samples={**note.samples, **samples}))


def _note(folder: Path | None, note: Note) -> None:
    if folder is not None:
        counts = {str(client): count for client, count in sorted(note.samples.items())}
        write_json(folder / NOTE, {"experiment": note.experiment, "samples": counts, "sites": note.sites})
