"""A client of a federation, on its own machine: one message in, one out; all it keeps lies in files.

What a client keeps between rounds is in `state-dir/<experiment>/client-<number>`: the state that the server accepted,
and the one of the last round (`pending`), which is there before the server hears of it. A client that was killed at any
moment therefore goes on from what the server says it accepted.
"""

from __future__ import annotations

import re
import time
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedkeel import personal
from fedkeel.clients import ClientStore, State, key_of
from fedkeel.config import Config, parse
from fedkeel.data import site
from fedkeel.errors import ConfigError, FedkeelError, RunError, nearest
from fedkeel.files import cache, sweep
from fedkeel.job import Holdings, Job
from fedkeel.partition.manifest import Partition
from fedkeel.partition.sites import Sites
from fedkeel.records import Reply
from fedkeel.rng import Streams
from fedkeel.runtimes import wire
from fedkeel.runtimes.wire import Packet

WARNINGS = 20
"""Most warnings in one reply."""


def answer(action: str, packet: Packet, node: Mapping[str, object]) -> Packet:
    """What this node replies. node: its node-config: `client` (or `partition-id`), `data`, `state-dir`.

    Whatever goes wrong is in the reply.
    """
    number: int | None = None
    try:
        facts = wire.loads(packet.text)
        if unlike := wire.differing(facts.get("versions"), wire.versions()):
            raise RunError(unlike)
        config = parse(tomllib.loads(facts["config"]))
        number = number_of(node, config)
        if facts.get("client", number) != number:
            raise RunError(f"this node is client {name_of(number, config)}")
        torch.set_num_threads(config.threads)
        return ACTIONS[action](Client(config, number, node, facts, packet))
    except Exception as error:
        known = isinstance(error, FedkeelError)
        reason = str(error) if known else f"{type(error).__name__}: {error}".strip()
        trace = "" if known else traceback.format_exc()
        return _values(client=number, failure=reason or "?", trace=trace)


def number_of(node: Mapping[str, object], config: Config) -> int:
    """The number of this node's client: by its name in `federation.sites`, or its number. Raises ConfigError."""
    sites = config.federation.sites
    key = "client" if "client" in node else "partition-id"
    text = str(node.get(key, ""))
    if key == "client" and text in sites:
        return sites.index(text)
    if text.isdecimal() and not (sites and key == "client") and int(text) < config.clients:
        return int(text)
    if sites and key == "client":
        known = f"this run's clients are {', '.join(sites)}"
    else:
        known = f"this run's clients are numbered 0 to {config.clients - 1}"
        if text and not text.isdecimal():
            known += "; names are given by federation.sites"
    raise ConfigError(key, text, known, nearest(text, sites))


def name_of(number: int, config: Config) -> str:
    """What a client is called: by federation.sites, or by its number."""
    return config.federation.sites[number] if config.federation.sites else str(number)


@dataclass(frozen=True)
class Client:
    """This node's client, and the message that it was sent."""

    config: Config
    number: int
    node: Mapping[str, object]
    facts: Mapping[str, Any]
    packet: Packet

    @property
    def state(self) -> Path:
        """The node's folder."""
        given = str(self.node.get("state-dir", ""))
        return Path(given).expanduser() if given else cache() / "federation"

    @property
    def folder(self) -> Path:
        """For what this client keeps between rounds. Raises RunError for an experiment that is no plain name."""
        experiment = str(self.facts["experiment"])
        if not re.fullmatch(r"[\w-]{1,64}", experiment):
            raise RunError("the server's name for this experiment is no plain name")
        return self.state / experiment / f"client-{self.number}"

    @cached_property
    def warnings(self) -> list[str]:
        """What the job warned of."""
        return []

    @cached_property
    def job(self) -> Job:
        """This client's part of the run."""
        config = self.config
        if not config.pool.dir:
            config = replace(config, pool=replace(config.pool, dir=str(self.state / "pools")))
        job = Job(config, holdings=self._holdings())
        job.warn = self._warned
        return job

    def _warned(self, text: str) -> None:
        if len(self.warnings) < WARNINGS and text not in self.warnings:
            self.warnings.append(text)

    def _holdings(self) -> Holdings | None:
        """A site's own data; None where the client's are its part of the configuration's. Raises ConfigError."""
        config, place = self.config, str(self.node.get("data", ""))
        there = isinstance(config.partition, Sites)
        if there and not place:
            needs = "partition 'sites' takes each client's data from its own machine: start this node with --data"
            raise ConfigError("data", place, needs)
        if place and not there:
            own = "this node has data of its own, which the run does not ask for: partition.name must be 'sites'"
            raise ConfigError("data", place, own)
        if not place:
            return None
        told = self.facts["images"]
        described = site.Target(tuple(told["classes"]), tuple(told["shape"]), tuple(told["mean"]), tuple(told["std"]))
        found = site.load(place, described, self.state / "decoded")
        # noise would be the same at all sites, were it drawn from the run's own streams
        found = config.noise.apply(found, Streams(config.seed).at("site", self.number))
        nobody, everything = torch.empty(0, dtype=torch.int64), torch.arange(len(found.train_y))
        rows = tuple(everything if k == self.number else nobody for k in range(config.clients))
        counts = torch.stack([torch.bincount(found.train_y[each], minlength=len(found.classes)) for each in rows])
        return Holdings(found, Partition("sites", {}, config.seed, "", rows, counts))

    def kept(self, store: ClientStore) -> State | None:
        """What the client kept as of the round that the server names. Raises CheckpointError when that is gone."""
        accepted = self.facts["accepted"]
        if accepted is not None and not store.file(self.number, accepted).is_file() and not self.job.worker.keeps:
            return None  # as good as the one that is gone: there is nothing in it
        return store.open(self.number, accepted)

    def tidy(self, store: ClientStore) -> None:
        """Deletes states that the server will not ask for again."""
        round_, needed = self.facts["round"], {self.facts["accepted"], *self.facts["needed"]}
        for path in store.folder.glob(f"{self.number}-*.safetensors"):
            key = key_of(path)
            if key is not None and key[1] < round_ and key[1] not in needed:
                path.unlink(missing_ok=True)
        sweep(store.folder)


def info(client: Client) -> Packet:
    """Who this is, and whether it could take part."""
    job = client.job
    return _values(
        client=client.number,
        samples=int(job.counts[client.number].sum()) if client.number < job.clients else 0,
        partition="" if isinstance(client.config.partition, Sites) else job.partition.hash,
        key=client.config.key(),
        warnings=client.warnings,
    )


def prepare(client: Client) -> Packet:
    """Tunes this client's generator and makes the images it needs; they stay here."""
    began = time.perf_counter()
    count = client.job.generate(clients=[client.number])
    return _values(
        client=client.number,
        images=count,
        seconds=round(time.perf_counter() - began, 3),
        warnings=client.warnings,
    )


def fit(client: Client) -> Packet:
    """One round. What the client would keep is on disk before the server hears of it."""
    job, number, round_ = client.job, client.number, int(client.facts["round"])
    server, mail = wire.received(client.packet, job.first_server(), round_)
    store = ClientStore(client.folder)
    state = client.kept(store)
    client.tidy(store)
    reply: Reply = job.worker.fit(server, number, state, job.measure if client.facts["measure"] else None, mail)
    if not reply.failure:
        store.put(number, round_, reply.state)
        store.flush([(number, round_)])
    return wire.up(reply, round_, client.warnings)


def measure(client: Client) -> Packet:
    """How the client's own model does on its test images."""
    job, number = client.job, client.number
    server, mail = wire.received(client.packet, job.first_server(), int(client.facts["round"]))
    curve, size = personal.curve_of(job, server, number, client.kept(ClientStore(client.folder)), mail)
    return _values(client=number, curve=list(curve), size=size, warnings=client.warnings)


ACTIONS = {"query.info": info, "train.prepare": prepare, "train.fit": fit, "evaluate.personal": measure}


def _values(**facts: object) -> Packet:
    return Packet({}, wire.dumps({"versions": wire.versions(), **facts}))
