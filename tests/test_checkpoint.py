"""A run that is stopped, killed, damaged or out of disk ends, once resumed, as if nothing had happened."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from fedkeel import checkpoint
from fedkeel.checkpoint import Checkpoints
from fedkeel.clients import ClientStore
from fedkeel.config import Config
from fedkeel.errors import CheckpointError, PartitionError, StorageError
from fedkeel.files import write
from fedkeel.job import Job
from fedkeel.loop import resume, run, run_key
from fedkeel.models.mlp import MLP
from fedkeel.record import Record, RoundLog, Silent, numbers
from fedkeel.records import Server

METHODS = {
    "fedavg": tiny.BATCHNORM,
    "scaffold": ("algorithm.name=scaffold", "participation=2"),
    "fbl": (
        "algorithm.name=fbl",
        "algorithm.period=2",
        "algorithm.scorer=local_last",
        "partition.name=dirichlet",
        "partition.alpha=0.4",
        "participation=3",
    ),
}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here cuts the power: waiting for the disk would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Stopped(BaseException):
    """Stands for the end of the process: no handler of the library may catch it."""


class StopAfter(Silent):
    """Ends the run after a round; collects warnings."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.warnings, self.went_on_from = number, [], -1

    def started(self, label: str, rounds: int, done: int) -> None:
        self.went_on_from = done

    def finished_round(self, record: Record) -> None:
        if record["round"] == self.number:
            raise Stopped

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def ends(folder: Path) -> tuple[bytes, list[dict]]:
    """What must be equal: the model's bytes and the records without their times."""
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return (folder / "model.safetensors").read_bytes(), [numbers(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def never_stopped(data, generator, tmp_path_factory) -> Callable[[str], tuple[Config, tuple[bytes, list[dict]]]]:
    """The configuration of a method, and how its run ends when nothing happens."""
    known: dict[str, tuple[Config, tuple[bytes, list[dict]]]] = {}

    def find(name: str) -> tuple[Config, tuple[bytes, list[dict]]]:
        if name not in known:
            config = tiny.config(*METHODS[name], *(generator if name == "fbl" else ()))
            folder = tmp_path_factory.mktemp("reference") / name
            run(config, data=data, folder=folder)
            known[name] = config, ends(folder)
        return known[name]

    return find


def stopped(config: Config, data, folder: Path, number: int) -> None:
    with pytest.raises(Stopped):
        run(config, data=data, folder=folder, listener=StopAfter(number))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_resuming_equals_never_stopping(name, number, never_stopped, data, tmp_path):
    config, expected = never_stopped(name)
    stopped(config, data, tmp_path / "run", number)
    listener = StopAfter()
    result = resume(tmp_path / "run", data=data, listener=listener)
    assert listener.went_on_from == number and not listener.warnings
    assert ends(tmp_path / "run") == expected
    assert [numbers(record) for record in result.rounds] == expected[1]


def test_stopping_in_every_round(never_stopped, data, tmp_path):
    config, expected = never_stopped("fbl")
    for number in (1, 2, 3):
        with pytest.raises(Stopped):
            run(config, data=data, folder=tmp_path / "run", resume=True, listener=StopAfter(number))
    resume(tmp_path / "run", data=data)
    assert ends(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [1, 2, 3])
def test_seldom_checkpoints(number, never_stopped, data, tmp_path):
    """Checkpoints every second round: what came after the last one is done again."""
    _, expected = never_stopped("scaffold")
    config = tiny.config(*METHODS["scaffold"], "checkpoint_every=2")
    stopped(config, data, tmp_path / "run", number)
    listener = StopAfter()
    resume(tmp_path / "run", data=data, listener=listener)
    assert listener.went_on_from == number // 2 * 2
    assert ends(tmp_path / "run") == expected


def test_a_finished_run_is_left_as_it_is(never_stopped, data, tmp_path):
    config, expected = never_stopped("fedavg")
    run(config, data=data, folder=tmp_path / "run")
    assert len(resume(tmp_path / "run", data=data).rounds) == 4
    assert ends(tmp_path / "run") == expected
    shutil.rmtree(tmp_path / "run" / "checkpoint")  # from nothing it would begin anew, and its log be lost
    with pytest.raises(CheckpointError, match="is done and has no checkpoint"):
        resume(tmp_path / "run", data=data)
    assert ends(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("method", [("scaffold",), ("fedcda", "algorithm.warmup=1")], ids=["clients", "server"])
def test_states_on_disk_only(method, number, data, tmp_path):
    """Past the budget, with rounds between checkpoints: what is dropped there is not what the last one names."""
    config = tiny.config(f"algorithm.name={method[0]}", *method[1:], "rounds=6")
    run(config, data=data, folder=tmp_path / "reference")
    stopped(replace(config, memory=1e-9, checkpoint_every=3), data, tmp_path / "run", number)
    listener = StopAfter()
    resume(tmp_path / "run", data=data, listener=listener)
    assert listener.went_on_from == number // 3 * 3 and not listener.warnings
    assert ends(tmp_path / "run") == ends(tmp_path / "reference")


def test_a_run_that_an_earlier_version_began(never_stopped, data, tmp_path):
    """It wrote state.json in another order, on many lines, and no runtime into the manifest."""
    config, expected = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 3)
    for path in folder.glob("checkpoint/*/state.json"):
        state = json.loads(path.read_text())
        state = {key: state[key] for key in ("key", "round", "kept", "files")}
        total = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**state, "sum": total}, indent=1) + "\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["runtime"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    listener = StopAfter()
    resume(folder, data=data, listener=listener)
    assert listener.went_on_from == 3 and not listener.warnings
    assert ends(folder) == expected


# what a checkpoint costs ----------------------------------------------------------------------------------------------


class Id(int):
    """A client's number that counts how often it is looked at."""

    looks = 0

    def __hash__(self) -> int:
        Id.looks += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Id.looks += 1
        return super().__eq__(other)


class Kept:
    """Clients that have all kept something, and the checkpoints of their run."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.store = ClientStore(folder / "clients")
        self.checkpoints = Checkpoints(folder, "key", self.store, ClientStore(folder / "shelf"))
        self.server = Server(torch.zeros(4), torch.zeros(0), clients, clients)
        self.accepted: dict[int, int] = {}
        self.ids = [Id(client) for client in range(clients)]
        for _ in range(2):  # both generations know all of them
            self.round(self.ids)

    def round(self, clients: list[Id]) -> None:
        """One in which these clients take part, and its checkpoint."""
        number = self.server.round
        for client in clients:
            self.store.open(client, self.accepted.get(client))
            self.store.put(client, number, {"own": torch.full((4,), float(number))})
            self.accepted[client] = number
        self.server = replace(self.server, round=number + 1)
        self.checkpoints.save(self.server, self.accepted)


def test_a_checkpoint_does_not_grow_with_the_square_of_the_clients(tmp_path):
    def looks(clients: int) -> int:
        kept = Kept(tmp_path / str(clients), clients)
        before = Id.looks
        kept.round(kept.ids[:1])
        return Id.looks - before

    few, many = looks(30), looks(240)
    assert 0 < many <= 9 * few


def test_a_checkpoint_reads_and_writes_what_changed(tmp_path, monkeypatch):
    """Of the states; both state.json name all clients, but are not taken apart again, and no folder is listed."""
    kept, did = Kept(tmp_path, 20), list[str]()

    def watched(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **more: did.append(name) or call(*args, **more)

    for name, owner, attribute in (
        ("summed", checkpoint, "checksum"),
        ("taken apart", json, "loads"),
        ("listed", Path, "glob"),
        ("written", Path, "replace"),
        ("deleted", Path, "unlink"),
    ):
        monkeypatch.setattr(owner, attribute, watched(name, getattr(owner, attribute)))
    for _ in range(3):
        did.clear()
        kept.round(kept.ids[3:5])
        assert sorted(did) == ["deleted"] * 2 + ["summed"] * 2 + ["written"] * (2 + 2)
    monkeypatch.undo()
    assert len(list((tmp_path / "clients").iterdir())) <= 2 * 20
    found = Checkpoints(tmp_path, "key", ClientStore(tmp_path / "clients"), ClientStore(tmp_path / "shelf"))
    assert found.load(kept.server).accepted == kept.accepted


def test_a_generation_that_is_damaged_while_the_run_goes_on_is_the_next_to_be_written_over(tmp_path):
    kept = Kept(tmp_path, 2)
    cut(newest(tmp_path) / "state.json")
    kept.round(kept.ids)
    rounds = sorted(json.loads(path.read_text())["round"] for path in tmp_path.glob("checkpoint/*/state.json"))
    assert rounds == [1, 3]


def test_a_state_that_is_gone_makes_no_checkpoint(tmp_path):
    """A generation that lacks one would be taken for whole, and the one before it be written over."""
    kept = Kept(tmp_path, 3)
    kept.round(kept.ids[:1])
    before = newest(tmp_path).name
    for path in (tmp_path / "clients").glob("*.safetensors"):
        path.unlink()
    kept.checkpoints._sums["clients"].clear()
    with pytest.raises(StorageError, match=r"clients/.*\.safetensors is gone"):
        kept.checkpoints.save(kept.server, kept.accepted)
    assert newest(tmp_path).name == before


def test_which_states_checkpoints_need(tmp_path):
    kept = Kept(tmp_path, 3)
    assert [kept.checkpoints.versions(client) for client in (0, 2, 5)] == [{0, 1}, {0, 1}, set()]
    kept.round(kept.ids[:1])
    assert [kept.checkpoints.versions(client) for client in (0, 2, 5)] == [{1, 2}, {1}, set()]


def newest(folder: Path) -> Path:
    return max(
        (path.parent for path in folder.glob("checkpoint/*/state.json")),
        key=lambda path: json.loads((path / "state.json").read_text())["round"],
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def client_file(place: Path, round_of: Callable[[list[int]], int] = max) -> Path:
    """A client's state that this generation names, and the other does not."""
    clients = json.loads((place / "state.json").read_text())["kept"]["clients"]
    version = round_of([version for _, version, _ in clients])
    client = next(client for client, v, _ in clients if v == version)
    return place.parents[1] / "clients" / f"{client}-{version}.safetensors"


def edited(path: Path, **change: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "server cut off": lambda place: cut(place / "server.safetensors"),
    "server with a bit flipped": lambda place: flip(place / "server.safetensors"),
    "server gone": lambda place: (place / "server.safetensors").unlink(),
    "state is garbage": lambda place: (place / "state.json").write_bytes(b"\x00\xffgarbage"),
    "state is a list": lambda place: (place / "state.json").write_text("[1, 2]"),
    "state is empty": lambda place: (place / "state.json").write_text(""),
    "state was edited": lambda place: edited(place / "state.json", round=1),
    "state gone": lambda place: (place / "state.json").unlink(),
    "client cut off": lambda place: cut(client_file(place)),
    "client with a bit flipped": lambda place: flip(client_file(place)),
    "client gone": lambda place: client_file(place).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["scaffold", "fbl"])
def test_a_damaged_generation_is_passed_over(name, damage, never_stopped, data, tmp_path):
    """With a warning, for the one before; the run ends the same, and so does one that is stopped and resumed again."""
    config, expected = never_stopped(name)
    folder = tmp_path / "run"
    stopped(config, data, folder, 3)
    DAMAGES[damage](newest(folder))
    listener = StopAfter(3)
    with pytest.raises(Stopped):
        resume(folder, data=data, listener=listener)
    assert listener.went_on_from == 2
    assert len(listener.warnings) == 1 and "damaged" in listener.warnings[0]
    again = StopAfter()
    resume(folder, data=data, listener=again)
    assert again.went_on_from == 3 and not again.warnings
    assert ends(folder) == expected


def test_no_generation_is_whole(never_stopped, data, tmp_path):
    config, _ = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 3)
    for place in (folder / "checkpoint").iterdir():
        cut(place / "server.safetensors")
    with pytest.raises(CheckpointError, match=r"round 3.*round 2.*start the run again"):
        resume(folder, data=data)


def test_another_configuration_is_refused_and_changes_nothing(never_stopped, data, tmp_path):
    config, expected = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for other in (("local.lr=0.2",), ("model.hidden=[9]",), ("algorithm.name=fedavg",)):
        with pytest.raises(CheckpointError, match="another configuration"):
            run(tiny.config(*METHODS["scaffold"], *other), data=data, folder=folder, resume=True)
    with pytest.raises(PartitionError, match="seed"):
        run(tiny.config(*METHODS["scaffold"], "seed=2"), data=data, folder=folder, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    resume(folder, data=data)
    assert ends(folder) == expected


def test_a_checkpoint_goes_by_more_than_the_configuration(data, monkeypatch):
    """By who holds what, and by the network as this version builds it."""
    config, build = tiny.config(), MLP.build
    keys = {run_key(Job(config, each)) for each in (data, data, tiny.data(seed=5))}
    monkeypatch.setattr(MLP, "build", lambda mlp, shape, classes: build(replace(mlp, hidden=(9,)), shape, classes))
    assert len(keys) == 2 and len(keys | {run_key(Job(config, data))}) == 3


def test_other_data_are_refused(never_stopped, data, tmp_path):
    config, _ = never_stopped("scaffold")
    stopped(config, data, tmp_path / "run", 2)
    with pytest.raises(PartitionError, match="data"):
        resume(tmp_path / "run", data=tiny.data(seed=5))


def test_what_decides_no_numbers_may_change(never_stopped, data, tmp_path):
    config, expected = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 2)
    run(tiny.config(*METHODS["scaffold"], "checkpoint_every=3", "name=other"), data=data, folder=folder, resume=True)
    assert ends(folder) == expected


# the log --------------------------------------------------------------------------------------------------------------


def test_a_line_cut_off_is_dropped(never_stopped, data, tmp_path):
    """The process died while it wrote the line of round 3, whose checkpoint does not exist yet."""
    config, expected = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 2)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "global/acc')
    resume(folder, data=data)
    assert ends(folder) == expected


def test_a_line_without_its_checkpoint_is_written_again(never_stopped, data, tmp_path):
    config, expected = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 2)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "global/accuracy": 0.99}\n')
    resume(folder, data=data)
    assert ends(folder) == expected


@pytest.mark.parametrize("left", ["", '{"round": 1}\n', '{"round": 1}\n{"rou', '{"round": 1}\nnonsense\n'])
def test_a_log_that_lacks_finished_rounds(left, never_stopped, data, tmp_path):
    config, _ = never_stopped("scaffold")
    folder = tmp_path / "run"
    stopped(config, data, folder, 2)
    (folder / "rounds.jsonl").write_text(left)
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl"):
        resume(folder, data=data)


def test_rewind_and_append(tmp_path):
    log = RoundLog(tmp_path / "rounds.jsonl")
    assert log.rewind(0) == []
    for number in (1, 2, 3):
        log.append({"round": number})
    assert log.rewind(2) == [{"round": 1}, {"round": 2}]
    log.append({"round": 30})
    assert log.path.read_text() == '{"round": 1}\n{"round": 2}\n{"round": 30}\n'


# the disk -------------------------------------------------------------------------------------------------------------


def test_content_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    did: list[str] = []
    replaced = Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: did.append("fsync"))
    monkeypatch.setattr(Path, "replace", lambda path, to: did.append("replace") or replaced(path, to))
    write(tmp_path / "deep" / "file", b"one")
    assert did == ["fsync", "replace", "fsync"], "the second one is of the folder"
    assert write(tmp_path / "deep" / "file", b"two") == hashlib.sha256(b"two").hexdigest()
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"
    RoundLog(tmp_path / "log").append({"round": 1})
    assert did[-1] == "fsync" and len(did) == 7


SMALL = ("algorithm.name=scaffold", "clients=2", "participation=1", "local.steps=1")


def small() -> Config:
    """As few writes as a run with client state can have: two rounds, one client each."""
    return tiny.config(*SMALL, "rounds=2")


class Disk:
    """Counts what is done to the disk and lets the n-th thing go wrong."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.error, self.left, self.done = error, -1, 0
        for owner, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "mkdir"),
            *(((shutil, "rmtree"), (Path, "unlink")) if isinstance(error, Stopped) else ()),
        ):
            patch.setattr(owner, name, self._watched(getattr(owner, name)))
        opened = Path.open

        def writing(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
            if set(mode) & set("wa"):
                self._step()
            return opened(path, mode, *args, **kwargs)

        patch.setattr(Path, "open", writing)

    def _watched(self, call: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **kwargs: object) -> object:
            self._step()
            return call(*args, **kwargs)

        return watched

    def _step(self) -> None:
        self.done += 1
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StorageError), (Stopped(), Stopped)],
    ids=["disk full", "killed"],
)
def test_failing_at_each_write_in_turn(error, seen, stride, data, tmp_path, monkeypatch):
    """The n-th thing done to the disk fails: the run says so, and resumed it ends as if nothing had happened.

    Every fifth in the quick suite, counted from the end, so that the writes of the last checkpoint are among them.
    """
    run(small(), data=data, folder=tmp_path / "reference")
    expected = ends(tmp_path / "reference")
    disk = Disk(monkeypatch, error)
    run(small(), data=data, folder=tmp_path / "counted")
    total = disk.done
    assert total > 40
    for n in range(total, 0, -stride):
        folder = tmp_path / str(n)
        disk.left = n
        with pytest.raises(seen) as caught:
            run(small(), data=data, folder=folder)
        assert seen is Stopped or "No space left on device" in str(caught.value)
        disk.left = -1
        run(small(), data=data, folder=folder, resume=True)
        assert ends(folder) == expected, n
        assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.tmp"))
        assert json.loads((folder / "manifest.json").read_text())["label"] == "scaffold"
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["server cut off", "client gone"])
@pytest.mark.parametrize("number", [2, 3], ids=["odd", "even"])
def test_dying_at_each_write_after_a_fallback(number, damage, data, tmp_path, monkeypatch):
    """The newest generation is damaged, the run goes on from the other, and dies at the n-th thing done to the disk,
    up to the end of the round done again: the good generation is still there, until a newer one is."""
    config = tiny.config(*SMALL, f"rounds={number + 1}")
    run(config, data=data, folder=tmp_path / "reference")
    expected = ends(tmp_path / "reference")
    stopped(config, data, tmp_path / "damaged", number)
    DAMAGES[damage](newest(tmp_path / "damaged"))

    def again(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "damaged", tmp_path / name))

    disk = Disk(monkeypatch, Stopped())
    with pytest.raises(Stopped):
        resume(again("counted"), data=data, listener=StopAfter(number))
    total = disk.done
    for n in range(total, total - 20, -1):  # the whole checkpoint and the line before it
        folder = again(str(n))
        disk.left = n
        with pytest.raises(Stopped):
            resume(folder, data=data, listener=StopAfter(number))
        disk.left = -1
        listener = StopAfter()
        resume(folder, data=data, listener=listener)
        assert listener.went_on_from in (number - 1, number)
        assert ends(folder) == expected, n


def test_a_full_disk_while_states_are_spilled(tmp_path, monkeypatch):
    store = ClientStore(tmp_path / "clients", budget=1)
    store.put(0, 0, {"own": torch.ones(3)})
    Disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device")).left = 1
    with pytest.raises(StorageError, match=r"clients/0-0\.safetensors: No space left on device"):
        store.put(1, 0, {"own": torch.ones(3)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(data, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        run(small(), data=data, folder=tmp_path / "run")
    tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(data, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="run"):
        run(small(), data=data, folder=tmp_path / "run")


# other processes ------------------------------------------------------------------------------------------------------

LONG = METHODS["scaffold"]


def forked(folder: Path, *overrides: str) -> multiprocessing.Process:
    """A process that has torch imported already, so that it starts in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedkeel.loop", "fedkeel.config"])
    process = context.Process(target=tiny.go, args=(str(folder), *overrides))
    process.start()
    return process


class Fresh:
    """A process of its own from the start, with the same handles."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.process = subprocess.Popen([sys.executable, tiny.__file__, str(folder), *overrides])
        self.kill = self.process.kill

    def join(self) -> None:
        self.process.wait()

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()


def lines(folder: Path) -> int:
    log = folder / "rounds.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def killed_often(
    start: Callable[..., Fresh | multiprocessing.Process], folder: Path, kills: int, moments: random.Random
) -> int:
    """Starts the run again and again, and kills it at a random moment after it got on by a round."""
    done = 0
    while True:
        before = lines(folder)
        process = start(folder, *LONG, f"rounds={kills + 4}")
        while done < kills and process.exitcode is None and lines(folder) <= before:
            time.sleep(0.001)
        if done < kills and process.exitcode is None:
            time.sleep(moments.random() * 0.05)
            process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        if process.exitcode == 0:
            return done
        done += 1


@pytest.mark.full
def test_kill_9(data, tmp_path):
    run(tiny.config(*LONG, "rounds=7"), data=data, folder=tmp_path / "reference")
    assert killed_often(forked, tmp_path / "run", 3, random.Random(1)) >= 2
    assert ends(tmp_path / "run") == ends(tmp_path / "reference")
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.slow
def test_kill_9_twenty_times(data, tmp_path):
    """Processes of their own, started from nothing each time."""
    run(tiny.config(*LONG, "rounds=24"), data=data, folder=tmp_path / "reference")
    assert killed_often(Fresh, tmp_path / "run", 20, random.Random(2)) >= 15
    assert ends(tmp_path / "run") == ends(tmp_path / "reference")


def test_a_second_process_is_refused(data, tmp_path):
    folder = tmp_path / "run"
    process = forked(folder, "rounds=100000")
    try:
        while lines(folder) < 2:
            time.sleep(0.005)
        for attempt in (resume, lambda place, data: run(tiny.config(), data=data, folder=place, resume=True)):
            with pytest.raises(CheckpointError, match="another process"):
                attempt(folder, data=data)
        assert process.exitcode is None
    finally:
        process.kill()
        process.join()
    with pytest.raises(CheckpointError, match="another configuration"):  # the lock went with the process
        run(tiny.config("rounds=5"), data=data, folder=folder, resume=True)
