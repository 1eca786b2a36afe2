"""What a federation withstands: real processes on this machine are killed, hang and lie, and the numbers stay right.

The measure is always a run in one process in which the same clients' replies were lost in the same rounds: the final
model, the server's control variate and what each client keeps are equal to it bit by bit. All runs are of SCAFFOLD,
whose clients keep a state that a reply too many or too few would move.

Nothing here waits for a time but for a round's deadline, so a busy machine makes it slower, not different: a client
that is too late for a round because of that is one more whose reply is lost. `make reliability` runs it, several times,
with the tests of strangers in test_deploy.py, and writes benchmarks/results/reliability.json.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import battery
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="needs the extra `flower`")

import unruly
from federation import SERVER, Federation, Process

from fedkeel.config import Config, parse
from fedkeel.job import Job
from fedkeel.loop import Result, run
from fedkeel.records import Reply, Server
from fedkeel.runtimes.inprocess import InProcessRuntime

pytestmark = pytest.mark.slow
LONG = 900.0
"""Seconds until a test gives up; what it waits for comes much earlier."""
DEADLINE = float(os.environ.get("RELIABILITY_DEADLINE", "60"))
"""Seconds of a round: on a very busy machine more are needed, for all three clients to start Python and train."""
SLACK = 10.0
"""Seconds by which a round may outlast its deadline."""
Note = Callable[[str, object], None]


def config(name: str, rounds: int, **federation: object) -> Config:
    """SCAFFOLD with three clients on 300 images: all but the exchange costs next to nothing."""
    return parse(
        {
            "name": name,
            "rounds": rounds,
            "clients": 3,
            "participation": 1.0,
            "device": "cpu",
            "data": {"name": "fashion", "train_limit": 300, "test_limit": 100},
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 10},
            "model": {"name": "mlp", "hidden": [16]},
            "local": {"epochs": 1, "batch": 16, "lr": 0.05},
            "algorithm": {"name": "scaffold"},
            "federation": {"deadline": DEADLINE, "join_wait": LONG, **federation},
        }
    )


# the measure ----------------------------------------------------------------------------------------------------------


@dataclass
class Losing:
    """All clients in this process, and replies that are lost on their way: (client, round), rounds counted from 0.

    The client has trained and has put its state, as a node has whose reply does not arrive.
    """

    remote: ClassVar[bool] = False

    lost: Collection[tuple[int, int]]
    jobs: list[Job] = field(default_factory=list)

    def start(self, job: Job) -> LosingRuntime:
        """A runtime for this job, which is kept to look at."""
        self.jobs.append(job)
        return LosingRuntime(job, self.lost)


class LosingRuntime(InProcessRuntime):
    """See Losing."""

    def __init__(self, job: Job, lost: Collection[tuple[int, int]]) -> None:
        super().__init__(job)
        self.lost = lost

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        for reply in super().run(server, clients, accepted, measure):
            lost = (reply.client, server.round) in self.lost
            yield Reply(reply.client, failure="lost") if lost else reply


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's rounds.jsonl, which may be in the making."""
    path = folder / "rounds.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def checkpoint(folder: Path) -> tuple[int, Path, dict[int, int]]:
    """The newest: its round, its folder, and the last round accepted from each client."""
    states = [(json.loads(path.read_text()), path.parent) for path in (folder / "checkpoint").glob("[ab]/state.json")]
    state, place = max(states, key=lambda each: each[0]["round"])
    return state["round"], place, {client: version for client, version, _ in state["kept"]["clients"]}


def equal_to_one_process(federation: Federation, config: Config) -> tuple[list[dict[str, Any]], Result]:
    """Asserts that a finished run's model, control variate and clients' states are those of one process in which the
    same replies were lost. Its records, and the other run."""
    folder = federation.runs / config.name
    records = records_of(folder)
    assert [record["round"] for record in records] == list(range(1, config.rounds + 1)), "a round is lost"
    for record in records:
        took_part = {*record["clients"], *(note["client"] for note in record["failed"])}
        assert len(took_part) == config.cohort, "a client is neither accepted nor failed"
    engine = Losing({(note["client"], record["round"] - 1) for record in records for note in record["failed"]})
    alone = run(config, engine=engine, folder=federation.folder / "alone" / config.name)
    assert alone.folder is not None
    battery.same_bits(load_file(folder / "model.safetensors"), alone.weights, "the model: ")
    for record, other in zip(records, alone.rounds, strict=True):
        assert record["clients"] == other["clients"]
        assert record.get("global/accuracy") == other.get("global/accuracy"), record["round"]
    round_, place, accepted = checkpoint(folder)
    _, beside, others = checkpoint(alone.folder)
    assert round_ == config.rounds and accepted == others
    battery.same_bits(load_file(place / "server.safetensors"), load_file(beside / "server.safetensors"), "the server: ")
    variates = torch.zeros_like(load_file(place / "server.safetensors")["shared.c"])
    for client, version in accepted.items():
        state = state_of(federation, config, client, version)
        battery.same_bits(state, dict(engine.jobs[-1].store.get(client, version)), f"client {client}: ")
        variates += state["mine.c"] / config.clients
    torch.testing.assert_close(variates, load_file(place / "server.safetensors")["shared.c"], rtol=1e-3, atol=1e-5)
    return records, alone


def state_of(federation: Federation, config: Config, client: int, version: int) -> dict[str, torch.Tensor]:
    """What a node has on disk of a client's state of a round."""
    experiment = json.loads((federation.runs / config.name / "federation.json").read_text())["experiment"]
    place = federation.folder / f"node-{client}" / experiment / f"client-{client}" / f"{client}-{version}.safetensors"
    return load_file(place)


# the federation -------------------------------------------------------------------------------------------------------


class Town:
    """A federation of three nodes with TLS and keys, whose processes do on command what unruly.py says."""

    def __init__(self, folder: Path) -> None:
        self.deeds = folder / "deeds"
        self.deeds.mkdir(parents=True)
        self.federation = Federation(
            folder, ["0", "1", "2"], env={"FEDKEEL_DEEDS": str(self.deeds)}, components=unruly.HERE
        )

    def tell(self, config: Config, who: int | str, round_: int, what: str) -> Path:
        """A command; `<it>.reached` appears when it is obeyed."""
        deed = self.deeds / f"{config.name}.{who}.{round_}"
        deed.write_text(what)
        return deed

    def obeyed(self, deed: Path) -> None:
        """Waits until it is."""
        self.federation.until(Path(f"{deed}.reached").exists, LONG, f"obedience to {deed.name}")

    def go(self, deed: Path) -> None:
        """Lets who has stopped there go on."""
        Path(f"{deed}.go").touch()

    def mend(self) -> None:
        """Starts whatever an earlier test has left dead."""
        for name in (SERVER, *self.federation.nodes):
            if not self.federation.processes[name].alive:
                self.restart(name)

    def restart(self, name: str) -> None:
        """Starts the server or a node and waits until it takes part."""
        federation = self.federation
        if name == SERVER:
            before = federation.log(SERVER).count("the server answers")
            federation.start(SERVER)
            federation.until(lambda: federation.log(SERVER).count("the server answers") > before, LONG, "server")
            return
        joined = federation.joined(name)
        federation.start(name)
        federation.until(lambda: federation.joined(name) > joined, LONG, f"node {name}")

    def finish(self, process: Process) -> None:
        """Waits for a run's end, which must be a good one."""
        try:
            assert process.wait(LONG) == 0, process.log()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end\n{process.log()}\n{self.federation.log(SERVER)}") from None


@pytest.fixture(scope="module")
def whole_town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    town = Town(tmp_path_factory.mktemp("town"))
    with town.federation:
        yield town


@pytest.fixture
def town(whole_town: Town) -> Town:
    """With all its processes."""
    whole_town.mend()
    return whole_town


# nodes that are killed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "during", "after", "upload", "crash"])
def test_a_killed_node(town: Town, moment: str, record_property: Note) -> None:
    """A node is killed before, during or after training (its new state is on disk, the server has heard nothing) or
    half-way through its upload, or only Flower's processes on it die (crash). Its round closes within the deadline plus
    ten seconds; started again with the same key it takes part again, with the state that the server accepted last."""
    federation, asked = town.federation, config(f"killed-{moment}", 5)
    deed = town.tell(asked, 1, 2, f"stop {'during' if moment == 'crash' else moment}")
    held = town.tell(asked, SERVER, 2, "stop")  # the third round waits until the node is back
    process, joined = federation.submit(asked), federation.joined("1")
    town.obeyed(deed)
    killed = time.monotonic()
    if moment == "crash":
        federation.crash("1")
    else:
        federation.kill("1")
        federation.start("1")
    town.obeyed(held)
    federation.until(lambda: federation.joined("1") > joined, LONG, "node 1")
    record_property("seconds until it is back", round(time.monotonic() - killed, 1))
    town.go(held)
    town.finish(process)
    records, _ = equal_to_one_process(federation, asked)
    assert 1 in records[0]["clients"], "there was no state to go on from"
    assert 1 in {note["client"] for note in records[1]["failed"]}
    assert any(1 in record["clients"] for record in records[2:]), "it never took part again"
    reason = next(note["reason"] for note in records[1]["failed"] if note["client"] == 1)
    record_property("reason in the record", reason)
    record_property("its round, seconds", records[1]["seconds/train"])
    record_property("deadline, seconds", DEADLINE)
    assert records[1]["seconds/train"] <= DEADLINE + SLACK


# a server that is killed ----------------------------------------------------------------------------------------------


def test_a_killed_server(town: Town, record_property: Note) -> None:
    """The server and the run are killed within round 2, while clients train, and right after the checkpoint of round 4;
    both times the server is started again and the run submitted with --resume. No reply is lost, and the final model is
    identical to that of an uninterrupted run."""
    federation = town.federation
    asked = replace(config("server-killed", 6, deadline=LONG), min_replies=3)
    within, between = town.tell(asked, 1, 2, "stop during"), town.tell(asked, SERVER, 4, "stop")
    process, gaps = federation.submit(asked), []
    for deed in (within, between):
        town.obeyed(deed)
        federation.kill(SERVER)
        done, killed = len(records_of(federation.runs / asked.name)), time.monotonic()
        assert done == (1 if deed is within else 4)
        process.kill()
        town.go(deed)  # the client of before is let go, and finds nobody who waits for it
        town.restart(SERVER)
        process = federation.submit(asked, resume=True)
        federation.until(lambda n=done: len(records_of(federation.runs / asked.name)) > n, LONG, "next round")  # type: ignore[misc]
        gaps.append(round(time.monotonic() - killed, 1))
    town.finish(process)
    records, alone = equal_to_one_process(federation, asked)
    assert not any(record["failed"] for record in records)
    plain = run(asked, folder=None)
    battery.same_bits(alone.weights, plain.weights, "uninterrupted: ")
    record_property("seconds from the kill to the next finished round", gaps)


# nodes that misbehave -------------------------------------------------------------------------------------------------

MISDEEDS = {
    2: {1: ("raise", r"this node's disk is on fire"), 2: ("nan", r"refused: 'delta' is not finite")},
    3: {
        1: ("shapes", r"refused: 'delta' is float32 \[\d+\], not float32 \[\d+\]"),
        2: ("huge", r"federation.max_reply is 8"),
    },
    4: {
        1: ("undeclared", r"refused: undeclared field 'extra.images'"),
        2: ("old", r"refused: fedkeel 0\.0\.1, the server has"),
    },
    5: {
        1: ("vast", r"refused: 'delta' holds 3e\+38, 1e\+09 is the most that is taken"),
        2: ("heavy", r"refused: its weight is 1e\+300"),
    },
    6: {
        1: ("hang", rf"no reply within {DEADLINE:g} seconds"),
        2: ("hang-hard", rf"no reply within {DEADLINE:g} seconds|Flower, code"),
    },
}
"""By round and client: what it does, and what the round's record says of it."""


def test_misbehaving_nodes(town: Town, record_property: Note) -> None:
    """Nodes that raise, send NaN, wrong shapes, 48 MiB where 8 are allowed, an undeclared field, the reply of an old
    version, or numbers that no sum could take, that hang, and that hang and do not let themselves be ended: each is
    refused and named in its round's record, the round goes on with the others, and afterwards the node takes part as if
    nothing had been."""
    federation, asked = town.federation, config("misbehaving", 9, max_reply=8.0)
    for round_, clients in MISDEEDS.items():
        for client, (what, _) in clients.items():
            town.tell(asked, client, round_, what)
    process = federation.submit(asked)
    town.finish(process)
    records, _ = equal_to_one_process(federation, asked)
    for round_, clients in MISDEEDS.items():
        record = records[round_ - 1]
        notes = {note["client"]: note["reason"] for note in record["failed"]}
        for client, (what, reason) in clients.items():
            assert re.search(reason, notes[client]), (what, notes)
            record_property(what, notes[client])
        assert record["seconds/train"] <= DEADLINE + SLACK
    for client in range(3):
        assert any(client in record["clients"] for record in records[6:]), f"client {client} is not back"
    log = process.log()
    assert "client 2: refused: fedkeel 0.0.1" in log, "the run's log does not name it"


# chaos ----------------------------------------------------------------------------------------------------------------

ROUNDS, SEED = 50, 20261121


def plan(seed: int) -> list[tuple[int, str, str, float]]:
    """(round after which, who, how, seconds into the next one), in the order of rounds: 5 nodes and 3 servers die."""
    draw = random.Random(seed)
    rounds = sorted(draw.sample(range(2, ROUNDS - 4, 5), 8))
    servers = set(draw.sample(range(8), 3))
    return [
        (
            number,
            SERVER if place in servers else draw.choice("012"),
            draw.choice(["kill", "crash"]),
            round(draw.uniform(0, 8), 2),
        )
        for place, number in enumerate(rounds)
    ]


def test_fifty_rounds_of_chaos(town: Town, record_property: Note) -> None:
    """50 rounds of two clients each, in which nodes and the server are killed at random (seeded) and started again at
    once, the run resumed: the final model, the server's and every client's state are identical to those of one process
    in which the same clients failed in the same rounds; no round is lost, no client's state is a step ahead."""
    federation, asked = town.federation, replace(config("chaos", ROUNDS, deadline=45.0), participation=2)
    folder, runs, killed = federation.runs / asked.name, [federation.submit(asked)], list[str]()

    def reached(number: int) -> bool:
        """A run that gave up, since nobody was left who could train, is resumed as its owner would."""
        if not runs[-1].alive and runs[-1].wait(1) != 0:
            assert len(runs) < 10, runs[-1].log()
            runs.append(federation.submit(asked, resume=True))
        return len(records_of(folder)) >= number

    for number, who, how, seconds in plan(SEED):
        federation.until(lambda n=number: reached(n), 4 * LONG, f"round {number}")  # type: ignore[misc]
        time.sleep(seconds)
        killed.append(f"{who} after round {len(records_of(folder))}")
        if who == SERVER:
            federation.kill(SERVER)
            runs[-1].kill()
            town.restart(SERVER)
            runs.append(federation.submit(asked, resume=True))
        elif how == "crash":
            federation.crash(who)
        else:
            federation.kill(who)
            federation.start(who)
    federation.until(lambda: reached(ROUNDS) and not runs[-1].alive, 4 * LONG, "end")
    records, _ = equal_to_one_process(federation, asked)
    failed = sum(len(record["failed"]) for record in records)
    assert failed, "nobody failed: this shows nothing"
    record_property("killed", killed)
    record_property("rounds", len(records))
    record_property("runs", len(runs))
    record_property("replies lost", failed)


# a large model --------------------------------------------------------------------------------------------------------


def test_a_message_of_500_mb(tmp_path: Path, record_property: Note) -> None:
    """A model of 500 MB goes to a node and comes back, in one round of one step, and is identical to that of one
    process."""
    width = 157_300
    asked = parse(
        {
            "name": "large",
            "rounds": 1,
            "clients": 1,
            "participation": 1.0,
            "device": "cpu",
            "data": {"name": "fashion", "train_limit": 100, "test_limit": 20},
            "partition": {"name": "iid"},
            "model": {"name": "mlp", "hidden": [width]},
            "local": {"epochs": 1, "batch": 4, "lr": 0.01, "max_steps": 1},
            "federation": {"deadline": LONG, "join_wait": LONG},
        }
    )
    with Federation(tmp_path, ["0"]) as federation:
        with Peaks({"server": federation.processes[SERVER], "node": federation.processes["0"]}) as peaks:
            process = federation.submit(asked)
            try:
                assert process.wait(2 * LONG) == 0, process.log()
            except subprocess.TimeoutExpired:
                raise AssertionError(process.log() + federation.log(SERVER)) from None
        (record,) = records_of(federation.runs / "large")
        found = load_file(federation.runs / "large" / "model.safetensors")
    assert record["clients"] == [0] and record["bytes/up"] >= 500e6 and record["bytes/down"] >= 500e6
    record_property("MB each way", round(record["bytes/up"] / 1e6))
    record_property("seconds of the round", record["seconds/train"])
    for name, peak in peaks.found.items():
        record_property(f"peak memory of {name}, MiB", peak)
    battery.same_bits(found, run(asked).weights, "")


class Peaks:
    """The largest memory (VmHWM) that each program under some processes has had, in MiB, by "who program"."""

    def __init__(self, processes: Mapping[str, Process]) -> None:
        self.roots = {name: process.process.pid for name, process in processes.items()}
        self.found: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.2):
            parents = {}
            for path in Path("/proc").glob("[0-9]*/stat"):
                try:
                    parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
                except (OSError, IndexError):
                    continue
            for name, root in self.roots.items():
                family, size = {root}, 0
                while len(family) > size:
                    size = len(family)
                    family |= {pid for pid, parent in parents.items() if parent in family}
                for pid in family:
                    self._note(name, Path("/proc") / str(pid))

    def _note(self, who: str, process: Path) -> None:
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            peak = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
        except OSError:
            return
        program = next(
            (Path(word).name for word in words if re.search(r"flwr-|flower-|superlink$|superexec", word)), ""
        )
        if peak and program:
            key = f"{who}: {program}"
            self.found[key] = max(self.found.get(key, 0), int(peak[1]) // 1024)
