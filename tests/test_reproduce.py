"""The papers' tables: which cells are run, what is kept of them, how they are shown beside the printed numbers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from click.testing import Result
from small_tables import Files, anew, of_package
from typer.testing import CliRunner

from fedkeel import cli
from fedkeel.config import load, parse
from fedkeel.errors import ConfigError, RunError
from fedkeel.files import locked
from fedkeel.local import Worker
from fedkeel.reproduce import cells, command, shown, tables
from fedkeel.reproduce.cells import Outcome, path_of, read, reproduce
from fedkeel.reproduce.tables import Cell, experiment

BASE = {
    "rounds": 2,
    "clients": 3,
    "participation": 1.0,
    "device": "cpu",
    "data": {"name": "fashion", "train_limit": 60, "test_limit": 20},
    "partition": {"name": "iid"},
    "model": {"name": "mlp", "hidden": [4]},
    "local": {"epochs": 1, "batch": 16, "lr": 0.05},
}
TINY: dict[str, Any] = {
    "title": "Tiny <table>",
    "paper": "Nobody, Table 1",
    "family": "tiny",
    "columns": {
        "a": {"label": "A", "data": "some", "set": {"partition": {"name": "iid"}}},
        "b": {"label": "B", "data": "some", "set": {"local": {"epochs": 2}}, "note": "twice the epochs"},
    },
    "rows": {
        "avg": {"label": "FedAvg", "method": "fedavg"},
        "prox": {"label": "FedProx", "method": "fedprox"},
        "own": {"label": "Control", "method": "fedavg", "set": {"local": {"momentum": 0.5}}, "note": "a control"},
    },
    "printed": {"avg": {"a": [50.5, 1.25], "b": [60.0]}, "prox": {"a": [40.0, 0.5], "b": [70.0]}},
    "marks": {"prox.b": "above the bound"},
    "notes": ["alpha is inferred"],
}
PROTOCOLS = {
    "families": {
        "tiny": {
            "paper": {"base": "base", "seeds": [1, 2], "departures": []},
            "reduced": {"base": "base", "seeds": [1, 2], "departures": ["a small network"]},
            "smoke": {
                "base": "base",
                "seeds": [1],
                "departures": ["numbers mean nothing"],
                "training": ["hardly any"],
                "rates": {"prox": 0.1},
            },
        }
    },
    "data": {"some": {profile: {} for profile in tables.PROFILES}},
}


@pytest.fixture
def tiny() -> Iterator[Files]:
    """Small tables in place of the package's: a run takes a tenth of a second. A test may change them, and then calls
    `anew`."""
    with of_package(deepcopy({"base": BASE, "protocols": PROTOCOLS, "tiny": TINY})) as found:
        yield found


def plan(rows: Sequence[str] = (), columns: Sequence[str] = (), seeds: Sequence[int] = (), *names: str) -> list[Cell]:
    return command.plan(names or ["tiny"], "smoke", rows, columns, seeds)


def fedkeel_(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in ("reproduce", *words)], prog_name="fedkeel")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are begun."""
    names: list[str] = []
    run = cells.run

    def noted(config: Any, **options: Any) -> Any:
        names.append(re.sub("-[0-9a-f]{8}$", "", config.name))
        return run(config, **options)

    monkeypatch.setattr(cells, "run", noted)
    return names


def timeless(path: Path) -> dict[str, Any]:
    """A cell's JSON file but for times."""
    found: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "cpu_seconds", "started")}


# cells ----------------------------------------------------------------------------------------------------------------


def test_a_cell_has_all_that_a_table_and_a_repetition_need(tiny: Files, tmp_path: Path) -> None:
    tiny["base"] = {
        **BASE,
        "rounds": 12,
        "generator": {"name": "gaussian"},
        "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 2},
    }
    tiny["tiny"] = {**TINY, "rows": {"fbl": {"label": "FBL", "method": "fbl", "note": "balanced"}}}
    tiny["tiny"]["columns"] = {"b": {**TINY["columns"]["b"], "label": "B"}}
    anew()
    (outcome,) = reproduce(plan(), tmp_path)
    assert outcome.state == "done" and outcome.found is not None
    cell, found = outcome.cell, json.loads(path_of(outcome.cell, tmp_path).read_text())
    run = cells.run_of(cell, tmp_path)
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    accuracies = [each["global/accuracy"] for each in rounds]
    assert found["rounds"]["global/accuracy"] == pytest.approx(accuracies, abs=1e-5)
    assert found["headline"]["global/accuracy"] == pytest.approx(fmean(accuracies[-10:]), abs=1e-5)
    assert outcome.headline() == found["headline"]["global/accuracy"]
    assert found["best"]["global/accuracy"] == pytest.approx(max(accuracies), abs=1e-5)
    assert found["best"]["global/loss"] == pytest.approx(min(each["global/loss"] for each in rounds), abs=1e-5)
    assert found["last"]["global/accuracy"] == pytest.approx(accuracies[-1], abs=1e-5)
    assert set(found["classes"]) == set(json.loads((run / "manifest.json").read_text())["classes"])
    assert (found["table"], found["row"], found["column"], found["seed"]) == ("tiny", "fbl", "b", 1)
    assert found["versions"].keys() >= {"fedkeel", "torch"} and found["hardware"]["device"] == "cpu"
    assert found["key"] == cell.config.key() == cell.key
    assert found["generator"]["name"] == "gaussian" and len(found["generator"]["fingerprint"]) == 64
    assert found["departures"] == ["hardly any", "numbers mean nothing", "balanced", "twice the epochs"]
    assert (found["printed"], found["mark"]) == ([], "")
    assert found["cpu_seconds"] > 0 and found["seconds"] > 0 and found["steps"] > 0 and found["bytes"]["up"] > 0
    # the run can be made again from the file, wherever it was made
    assert parse({**found["config"], "name": "again"}).key() == found["key"]
    assert str(tmp_path) not in path_of(cell, tmp_path).read_text()
    # what takes most space is gone, what a later look needs is there
    left = {path.name for path in run.iterdir()}
    assert left >= {"config.toml", "manifest.json", "rounds.jsonl", "model.safetensors"}
    assert not left & {"checkpoint", "clients", "shelf", cells.SPENT, cells.FAILED}


def test_a_cell_adds_up_what_its_rounds_took(tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, bytes and lost updates of all rounds. The best of personal models is the last one, what they and classes
    reach in a round a mean."""
    tiny["base"] = {**BASE, "rounds": 3, "personal": {"every": 1, "measure": "always", "epochs": 0}}
    anew()
    fit = Worker.fit

    def loses(self: Worker, server: Any, client: int, *rest: Any, **more: Any) -> Any:
        reply = fit(self, server, client, *rest, **more)
        return replace(reply, update=None, failure="lost") if (server.round, client) == (1, 2) else reply

    monkeypatch.setattr(Worker, "fit", loses)
    (outcome,) = reproduce(plan(["avg"], ["a"]), tmp_path)
    lines = (cells.run_of(outcome.cell, tmp_path) / "rounds.jsonl").read_text().splitlines()
    rounds, found = [json.loads(line) for line in lines], outcome.found
    assert found is not None and found["failed"] == 1
    assert found["steps"] == sum(each["train/steps"] for each in rounds)
    assert found["bytes"] == {way: sum(each[f"bytes/{way}"] for each in rounds) for way in ("up", "down")}
    best, last = ([each[f"personal/accuracy_{which}"] for each in rounds] for which in ("best", "last"))
    assert len(set(best)) > 1 and len(set(last)) > 1, "else this shows nothing"
    assert found["headline"]["personal/accuracy_best"] == pytest.approx(best[-1], abs=1e-5)
    assert found["headline"]["personal/accuracy_last"] == pytest.approx(fmean(last), abs=1e-5)
    means = {name: fmean(each[f"global/class/{name}"] for each in rounds) for name in found["classes"]}
    assert found["classes"] == pytest.approx(means, abs=1e-5)


def test_only_missing_cells_are_run(tiny: Files, tmp_path: Path, ran: list[str]) -> None:
    told: list[str] = []
    reproduce(plan(["avg"]), tmp_path)
    assert ran == ["avg--a--seed1", "avg--b--seed1"]
    before = path_of(plan(["avg"])[0], tmp_path).read_bytes()
    outcomes = reproduce(plan(["avg", "prox"], ["a"]), tmp_path, tell=lambda each: told.append(each.cell.name))
    assert ran[2:] == ["prox--a--seed1"]
    assert told == ["avg--a--seed1", "prox--a--seed1"], "what was done is told of first"
    assert [each.fresh for each in outcomes] == [False, True]
    assert path_of(plan(["avg"])[0], tmp_path).read_bytes() == before
    twice = plan(["own"], ["a"])
    (outcome,) = reproduce([*twice, *twice], tmp_path)
    assert outcome.found is not None and "same_as" not in outcome.found, "not a copy of itself"


def test_a_stopped_cell_goes_on_from_its_checkpoint(
    tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    tiny["base"] = {**BASE, "rounds": 4}
    told = cells._Heard.finished_round
    rounds: list[tuple[str, int]] = []

    def stop(self: Any, record: Any) -> None:
        told(self, record)
        rounds.append((self.path.parent.name.split("--")[0], record["round"]))
        if rounds[-1] == ("prox", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(cells._Heard, "finished_round", stop)
    result = fedkeel_("tiny", "--profile", "smoke", "--columns", "a", "--dir", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped; to go on: the same command"
    assert not (tmp_path / "smoke/tiny/table.md").exists()
    (run,) = (tmp_path / "smoke/tiny/runs").glob("prox--*")
    (run / cells.SPENT).write_text("1000\n")
    before = len(rounds)
    assert fedkeel_("tiny", "--profile", "smoke", "--columns", "a", "--dir", tmp_path).exit_code == 0
    assert rounds[before:] == [("prox", 3), ("prox", 4), *(("own", number) for number in (1, 2, 3, 4))]
    assert ran == ["avg--a--seed1", "prox--a--seed1", "prox--a--seed1", "own--a--seed1"]
    (cell,) = plan(["prox"], ["a"])
    assert read(cell, tmp_path).found["cpu_seconds"] >= 1000  # type: ignore[index]
    # and it comes to what it had come to without a stop
    monkeypatch.setattr(cells._Heard, "finished_round", told)
    reproduce([cell], tmp_path / "whole")
    assert timeless(path_of(cell, tmp_path)) == timeless(path_of(cell, tmp_path / "whole"))


def test_a_changed_configuration_is_stale_and_never_mixed(tiny: Files, tmp_path: Path, ran: list[str]) -> None:
    reproduce(command.plan(["tiny"], "reduced", ["avg", "prox"], ["a"]), tmp_path)
    tiny["tiny"] = {**TINY, "rows": {**TINY["rows"], "avg": {**TINY["rows"]["avg"], "set": {"local": {"lr": 0.2}}}}}
    anew()
    planned = command.plan(["tiny"], "reduced", ["avg", "prox"], ["a"])
    outcomes = [read(cell, tmp_path) for cell in planned]
    assert [each.state for each in outcomes] == ["stale", "done"] * 2
    table = shown.show(experiment("tiny"), "reduced", outcomes)
    assert table.spots["avg", "a"].mean is None and table.spots["avg", "a"].state == "stale"
    assert table.stale[0] == "FedAvg, A, seed 1: local.lr = 0.2, run with 0.05"
    reproduce(planned[:1], tmp_path)
    assert ran[4:] == ["avg--a--seed1"]
    spot = shown.show(experiment("tiny"), "reduced", [read(cell, tmp_path) for cell in planned]).spots["avg", "a"]
    assert (list(spot.ours), spot.stale, spot.state) == ([1], (2,), "1/2")


@pytest.mark.parametrize("what", ["generator", "data"])
def test_a_run_that_was_begun_with_others_is_run_from_the_start(tiny: Files, tmp_path: Path, what: str) -> None:
    """Otherwise numbers made with another generator would stand under the name of this one."""
    filled = {"method": "regl", "set": {"generator": {"name": "gaussian"}, "methods": {"regl": {"volume": 2}}}}
    tiny["tiny"] = {**TINY, "rows": {"filled": {**filled, "label": "Filled"}}, "printed": {}, "marks": {}}
    (cell,) = plan(["filled"], ["a"])
    reproduce([cell], tmp_path, keep=True)
    first = timeless(path_of(cell, tmp_path))
    manifest, rounds = (cells.run_of(cell, tmp_path) / name for name in ("manifest.json", "rounds.jsonl"))

    def again(begun_with: str) -> dict[str, Any]:
        path_of(cell, tmp_path).unlink()
        rounds.write_text(re.sub('"train/loss": [0-9.]+', '"train/loss": 7.0', rounds.read_text()))
        then = json.loads(manifest.read_text())
        then[what]["fingerprint"] = begun_with
        manifest.write_text(json.dumps(then) if begun_with else "")
        reproduce([cell], tmp_path, keep=True)
        return timeless(path_of(cell, tmp_path))

    assert again(first[what]["fingerprint"])["rounds"]["train/loss"] == [7.0, 7.0], "with the same it goes on"
    assert again("0" * 64) == first
    assert again("") == first, "where it cannot be known"


def test_what_a_run_warned_of_stands_below_the_table(tiny: Files, tmp_path: Path) -> None:
    idle = {"label": "Idle", "method": "fedprox", "set": {"methods": {"fedprox": {"mu": 0.0}}}}
    tiny["tiny"] = {**TINY, "rows": {**TINY["rows"], "idle": idle}}
    found = shown.show(experiment("tiny"), "smoke", reproduce(plan(["avg", "idle"], ["a"]), tmp_path))
    text = "algorithm.mu = 0.0: this switches the method off"
    assert found.warnings == (shown.Reason(text, "Idle"),)
    assert ("Warnings", [f"Idle: {text}"]) in shown.below(found)


def test_cells_of_one_configuration_are_one_run(
    tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    rows = {"other": {**TINY["rows"]["avg"], "label": "The same", "note": "as the first table has it"}}
    tiny["tiny-2"] = {**TINY, "rows": rows, "printed": {}}
    tiny["tiny-3"] = {**TINY, "pictures": [{"kind": "classes", "title": "x", "rows": ["avg"], "column": "a"}]}
    reproduce(plan(["avg", "other"], ["a"], (), "tiny", "tiny-2"), tmp_path)
    assert ran == ["avg--a--seed1"]
    (copy,) = plan((), ["a"], (), "tiny-2")
    found = read(copy, tmp_path).found
    assert found is not None and found["same_as"] == "smoke/tiny/avg--a--seed1"
    assert (found["table"], found["row"]) == ("tiny-2", "other")
    assert found["departures"] == ["hardly any", "numbers mean nothing", "as the first table has it"]
    assert cells.run_of(copy, tmp_path) == cells.run_of(*plan(["avg"], ["a"]), tmp_path)
    # done earlier, in another call and profile
    path_of(copy, tmp_path).unlink()
    reproduce([copy, *command.plan(["tiny"], "paper", ["avg"], ["a"], [1])], tmp_path)
    assert ran == ["avg--a--seed1"]
    # one that a picture is drawn from has a run of its own, which keeps what other runs drop
    (drawn,) = plan(["avg"], ["a"], (), "tiny-3")
    reproduce([drawn], tmp_path)
    assert ran == ["avg--a--seed1"] * 2
    assert (cells.run_of(drawn, tmp_path) / "checkpoint").is_dir()
    assert not (cells.run_of(copy, tmp_path) / "checkpoint").exists()
    # or one whose checkpoint is to be kept
    path_of(copy, tmp_path).unlink()
    shutil.rmtree(cells.run_of(drawn, tmp_path) / "checkpoint")
    reproduce([copy], tmp_path, keep=True)
    assert ran == ["avg--a--seed1"] * 2 + ["other--a--seed1"]
    assert (cells.run_of(copy, tmp_path) / "checkpoint").is_dir()
    # and where nothing is done yet it is the run of the others too
    reproduce(plan(["avg"], ["a"], (), "tiny", "tiny-3"), tmp_path / "fresh")
    assert ran[3:] == ["avg--a--seed1"]
    assert (cells.run_of(*plan(["avg"], ["a"]), tmp_path / "fresh") / "checkpoint").is_dir()


def test_a_cell_that_fails_is_named_and_stops_no_other(
    tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"label": "Bad", "method": "fedavg", "set": {"local": {"lr": 1e30}}}
    tiny["tiny"] = {**TINY, "rows": {"bad": bad, **TINY["rows"]}}
    words = ("tiny", "--profile", "smoke", "--columns", "a", "--dir", tmp_path)
    result = fedkeel_(*words)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: 1 of 4 cells failed: tiny bad--a--seed1: round 1: .*", result.stderr.splitlines()[-1])
    assert "Control" in result.stdout, "the table is shown all the same"
    failed = json.loads(next((tmp_path / "smoke/tiny/runs").glob("bad--*/failed.json")).read_text())
    assert failed.keys() == {"error"} and failed["error"].startswith("round 1: "), "its words say it all"
    later = fedkeel_(*words, "--show")
    assert later.exit_code == 0, later.output
    assert re.search(r"Bad \(ours\) +failed", later.stdout)
    assert "Bad, A, seed 1: round 1: " in later.stdout
    # so is each table that has the same cell
    tiny["tiny-2"] = {**TINY, "rows": {"bad": bad}, "printed": {}, "marks": {}}
    both = [*plan(["bad"], ["b"]), *plan(["bad"], ["b"], (), "tiny-2")]
    reproduce(both, tmp_path)
    assert [read(cell, tmp_path).state for cell in both] == ["failed", "failed"]
    # a mistake of ours is a gap too; when it is mended the cell is done
    run = cells.run

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(cells, "run", broken)
    (outcome,) = reproduce(plan(["avg"], ["b"]), tmp_path)
    assert (outcome.state, outcome.error) == ("failed", "ZeroDivisionError: by hand")
    assert read(*plan(["avg"], ["b"]), tmp_path).state == "failed"
    monkeypatch.setattr(cells, "run", run)
    reproduce(plan(["avg"], ["b"]), tmp_path)
    assert read(*plan(["avg"], ["b"]), tmp_path).state == "done"


def test_two_processes_in_one_folder(tiny: Files, tmp_path: Path) -> None:
    words = ("tiny", "--profile", "smoke", "--rows", "avg", "--dir", tmp_path)
    with locked(tmp_path, RunError("")):
        result = fedkeel_(*words)
        assert result.exit_code == 1
        assert f"another process works in {tmp_path}" in result.stderr
        assert fedkeel_(*words, "--show").exit_code == 0, "to look is allowed"
    assert fedkeel_(*words).exit_code == 0
    with locked(tmp_path, RunError("")):
        assert fedkeel_(*words).exit_code == 0, "all is done: nothing is written but the table"


def test_what_another_process_did_meanwhile_is_not_done_again(
    tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    lock = cells.locked
    (cell,) = plan(["avg"], ["a"])

    def later(*words: Any) -> Any:
        monkeypatch.setattr(cells, "locked", lock)
        reproduce([cell], tmp_path)
        return lock(*words)

    monkeypatch.setattr(cells, "locked", later)
    (outcome,) = reproduce([cell], tmp_path)
    assert ran == ["avg--a--seed1"]
    assert outcome.found is not None and "same_as" not in outcome.found


def test_a_damaged_cell_is_one_clear_error(tiny: Files, tmp_path: Path) -> None:
    (cell,) = plan(["avg"], ["a"])
    path = path_of(cell, tmp_path)
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"row": "avg"}', '{"key": "x", "headline": 7}'):
        path.write_text(text)
        result = fedkeel_("tiny", "--profile", "smoke", "--dir", tmp_path, "--show")
        assert result.exit_code == 1
        assert f"error: {path} cannot be read" in result.stderr and "remove it" in result.stderr


# what is asked for ----------------------------------------------------------------------------------------------------


def test_rows_and_columns_pick(tiny: Files) -> None:
    assert [cell.name for cell in plan(["prox", "avg"], ["b"])] == ["avg--b--seed1", "prox--b--seed1"]
    assert [cell.seed for cell in plan(["avg"], ["a"], [3, 1])] == [3, 1]
    assert [cell.config.local.lr for cell in plan((), ["a"])] == [0.05, 0.1, 0.05]
    tiny["tiny-2"] = {**TINY, "rows": {"else": TINY["rows"]["avg"]}}
    both = plan(["avg", "else"], ["a"], (), "tiny", "tiny-2", "tiny")
    assert [(cell.table, cell.row.key) for cell in both] == [("tiny", "avg"), ("tiny-2", "else")]
    assert {cell.table for cell in plan(["else"], (), (), "tiny", "tiny-2")} == {"tiny-2"}
    tiny["tiny-4"] = {**TINY, "rows": {"avg": {**TINY["rows"]["avg"], "only": ["paper"]}}}
    with pytest.raises(ConfigError, match="no such cells in profile smoke"):
        plan((), (), (), "tiny-4")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fbl-t33"], ["'fbl-t33'", "Did you mean 'fbl-t3'?"]),
        (["fbl-t3", "--profile", "redcued"], ["--profile = 'redcued'", "paper, reduced, smoke", "'reduced'"]),
        (["fbl-t3", "--profile", "smoke", "--rows", "m1,m8"], ["--rows = 'm8'", "m1, m2"]),
        (["fbl-t3", "--profile", "smoke", "--columns", "c11"], ["--columns = 'c11'", "Did you mean 'c10'?"]),
        (["fbl-t3", "--profile", "smoke", "--seeds", "1,x"], ["--seeds = 'x'", "whole numbers"]),
        (["fbl-t3", "--profile", "smoke", "--format", "htm"], ["--format = 'htm'", "'html'"]),
        (["fbl-t3", "--profile", "smoke", "--workers", "0"], ["--workers", "0"]),
        (["fbl-t3", "--rows", "m1"], ["--data = None", "must be a folder with cifar10 in it", "docs/reproducing.md"]),
        (["fbl-t3", "--rows", "m1", "--data", "elsewhere"], ["--data = 'elsewhere'", "with cifar10 in it"]),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDKEEL_DATA", raising=False)
    result = fedkeel_(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and result.stdout == ""
    for part in named:
        assert part in line
    assert not list(tmp_path.iterdir()), "said before anything is written"


def test_data_are_found_below_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    """An empty folder is what the data set itself complains of, cell by cell."""
    (tmp_path / "data/cifar10").mkdir(parents=True)
    monkeypatch.setenv("FEDKEEL_DATA", str(tmp_path / "data"))
    result = fedkeel_("fbl-t3", "--rows", "m1", "--seeds", "1", "--dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 of 1 cells failed: fbl-t3 m1--c10--seed1: cifar10: there is no split 'train'" in result.stderr


def test_the_list_of_tables(tiny: Files, tmp_path: Path) -> None:
    reproduce(plan(["avg"]), tmp_path)
    (found,) = json.loads(fedkeel_("--json", "--dir", tmp_path).stdout)
    assert (found["name"], found["paper"], found["title"]) == ("tiny", "Nobody, Table 1", "Tiny <table>")
    counts = {profile: (each["cells"], each["done"]) for profile, each in found["cells"].items()}
    assert counts == {"paper": (12, 0), "reduced": (12, 0), "smoke": (6, 2)}
    assert re.search(r"tiny +12 +12 +2/6 +Tiny <table>", fedkeel_("--dir", tmp_path).stdout)


def test_a_line_for_each_cell_with_the_time_left(tiny: Files, tmp_path: Path) -> None:
    tiny["tiny"] = {**TINY, "columns": {**TINY["columns"], "c": {**TINY["columns"]["a"], "label": "C"}}}
    reproduce(plan(["avg"], ["b"]), tmp_path)
    result = fedkeel_("tiny", "--profile", "smoke", "--rows", "avg,prox", "--dir", tmp_path)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("table:")]
    assert len(lines) == 5, "none for what was done before"
    assert re.fullmatch(r"2/6  33 %  tiny avg--a--seed1  \d+\.\d\d %  \d\.\d s  about \d+\.\d s left", lines[0])
    assert re.fullmatch(r"3/6  50 %  tiny avg--c--seed1  \S+ %  the run of smoke/tiny/avg--a--seed1  .* left", lines[1])
    assert re.fullmatch(r"6/6 100 %  tiny prox--b--seed1  \S+ %  \d\.\d s", lines[-1])


def test_words_of_a_cell_are_mended_and_its_numbers_hold(tiny: Files, tmp_path: Path, ran: list[str]) -> None:
    (outcome,) = reproduce(plan(["prox"], ["b"]), tmp_path)
    path = path_of(outcome.cell, tmp_path)
    before = json.loads(path.read_text())
    assert (before["printed"], before["mark"]) == ([70.0], "above the bound")
    tiny["tiny"] = {**TINY, "marks": {"prox.b": "twice the bound"}}
    anew()
    reproduce(plan(["prox"], ["b"]), tmp_path)
    assert json.loads(path.read_text()) == {**before, "mark": "twice the bound"} and ran == ["prox--b--seed1"]


# how it is shown ------------------------------------------------------------------------------------------------------


def made(cell: Cell, accuracy: float, **over: object) -> Outcome:
    """A cell as if it had come to this."""
    found = {
        "key": cell.key,
        "headline": {"global/accuracy": accuracy},
        "departures": ["a small network", *filter(None, [cell.row.note, cell.column.note])],
        "generator": None,
        "data": {"name": "tiny", "fingerprint": "of the images"},
        "versions": {"fedkeel": "0.1.0", "torch": "2.13.0", "numpy": "2"},
        "commit": "0123456789abcdef",
        "hardware": {"processor": "A processor", "gpu": None},
        "failed": 0,
        "cpu_seconds": 1800.0,
        "seconds": 900.0,
        "started": "2026-01-02T03:04:05+00:00",
        "config": json.loads(json.dumps(cell.config.table())),
    }
    return Outcome(cell, {**found, **over})


@pytest.fixture
def table(tiny: Files) -> shown.Shown:
    """Two seeds of three rows in two columns: one cell has one seed, one has none, one is stale, one has failed."""
    values = {
        ("avg", "a"): (0.50, 0.52), ("prox", "a"): (0.55, 0.53), ("own", "a"): (0.60, None),
        ("avg", "b"): (None, None), ("prox", "b"): (0.7, 0.71), ("own", "b"): (0.1, 0.2),
    }  # fmt: skip
    outcomes = []
    for cell in command.plan(["tiny"], "reduced"):
        value = values[cell.row.key, cell.column.key][cell.seed - 1]
        outcomes.append(Outcome(cell, None) if value is None else made(cell, value))
    names = [outcome.cell.name for outcome in outcomes]
    at = names.index("own--b--seed1")
    config = {**outcomes[at].found["config"], "rounds": 7}  # type: ignore[index]
    outcomes[at] = made(outcomes[at].cell, 0.9, key="before", config=config)
    outcomes[names.index("own--a--seed2")] = Outcome(outcomes[names.index("own--a--seed2")].cell, None, "a < b")
    at = names.index("prox--b--seed1")
    outcomes[at] = made(outcomes[at].cell, 0.7, same_as="smoke/tiny/prox--b--seed1", departures=["in older words"])
    return shown.show(experiment("tiny"), "reduced", outcomes)


def test_footnotes_beyond_z() -> None:
    assert [shown._letter(at) for at in (0, 25, 26, 51, 52, 701)] == ["a", "z", "aa", "az", "ba", "zz"]


def test_updates_that_were_lost_are_told(tiny: Files) -> None:
    outcomes = [
        made(cell, 0.5, failed=7 * (cell.name == "prox--b--seed2")) for cell in command.plan(["tiny"], "reduced")
    ]
    found = shown.show(experiment("tiny"), "reduced", outcomes)
    lost = [each for each in found.reasons if "failed" in each.text]
    assert lost == [
        shown.Reason("client updates that failed, and were left out of their rounds: 7 (seed 2)", "FedProx in B")
    ]


def test_which_runs_keep_their_checkpoints_for_pictures(tiny: Files) -> None:
    tiny["tiny"] = {
        **TINY,
        "pictures": [
            {"kind": "classes", "title": "x", "columns": ["a"], "seed": 2},
            {"kind": "bars", "title": "y", "rows": ["avg"]},
            {"kind": "histogram", "title": "z", "rows": ["avg"], "column": "b"},
        ],
    }
    anew()
    kept = {cell.name for cell in command.plan(["tiny"], "reduced") if cells.pictured(cell)}
    assert kept == {"avg--a--seed2", "prox--a--seed2", "own--a--seed2"}


def test_cells_of_other_data_are_never_mixed_in(tiny: Files) -> None:
    """Most cells of a column decide; the key has no images."""
    outcomes = [made(cell, 0.5) for cell in command.plan(["tiny"], "reduced")]
    names = [outcome.cell.name for outcome in outcomes]
    for name in ("avg--a--seed1", "avg--a--seed2"):  # the first of its column, and another
        mixed, at = list(outcomes), names.index(name)
        mixed[at] = made(mixed[at].cell, 0.9, data={"name": "tiny", "fingerprint": "0123456789abcdef"})
        found = shown.show(experiment("tiny"), "reduced", mixed)
        assert found.spots["avg", "a"].stale == (mixed[at].cell.seed,) and found.spots["avg", "a"].mean == 50
        assert [text.partition(": ")[2] for text in found.stale] == [
            "run with other data than most cells of its column, 0123456789ab: remove its file, and it is run again"
        ]


def test_cells_of_another_generator_are_never_mixed_in(tiny: Files) -> None:
    """Most seeds of a row decide; another row may have a generator of its own."""
    outcomes = [
        made(cell, 0.5, generator={"name": "flow", "fingerprint": "b" * 16 if cell.row.key == "own" else "a" * 16})
        for cell in command.plan(["tiny"], "reduced", seeds=[1, 2, 3])
    ]
    at = [outcome.cell.name for outcome in outcomes].index("avg--a--seed2")
    other = {"name": "flow", "fingerprint": "0123456789abcdef"}
    outcomes[at] = made(outcomes[at].cell, 0.9, generator=other, same_as="reduced/first/avg--a--seed2")
    found = shown.show(experiment("tiny"), "reduced", outcomes)
    assert found.spots["avg", "a"].stale == (2,) and found.spots["avg", "a"].mean == 50
    assert [text.partition(": ")[2] for text in found.stale] == [
        "run with another generator than most seeds, 0123456789ab: remove its file and that of "
        "reduced/first/avg--a--seed2, the same run, and it is run again"
    ]


def test_our_numbers_beside_the_printed_ones(table: shown.Shown) -> None:
    spot = table.spots["avg", "a"]
    assert spot.mean == pytest.approx(51) and spot.std == pytest.approx(2**0.5)
    assert spot.printed == (50.5, 1.25) and spot.difference == pytest.approx(0.5) and spot.state == ""
    assert table.spots["own", "a"].state == "1/2" and table.spots["own", "a"].failed == (2,)
    assert table.spots["own", "a"].std is None
    assert table.spots["avg", "b"].state == "missing" and table.spots["avg", "b"].difference is None
    assert table.spots["own", "b"].stale == (1,) and table.spots["own", "b"].mean == pytest.approx(20)
    best = {place for place, spot in table.spots.items() if spot.best}
    assert best == {("own", "a"), ("prox", "b")}
    assert {place for place, spot in table.spots.items() if spot.printed_best} == {("avg", "a"), ("prox", "b")}
    assert [row.own for row in table.rows] == [False, False, True]
    assert table.order == {"a": (0, 1)}, "in b the printed number has a mark, and a row has no number"
    assert table.spots["prox", "b"].mark == "a" and table.footnotes == {"a": "above the bound"}


def test_rows_of_another_group_are_not_held_against_each_other(tiny: Files) -> None:
    """FedAvg with 1 epoch against FedProx with 5: neither a pair nor rivals for the highest."""
    for row, group in (("avg", "E = 1"), ("prox", "E = 5"), ("own", "E = 1")):
        tiny["tiny"]["rows"][row]["group"] = group
    tiny["tiny"]["printed"]["own"] = {"a": [60.0]}
    anew()
    values = {"avg": 0.7, "prox": 0.5, "own": 0.6}
    outcomes = [made(cell, values[cell.row.key]) for cell in command.plan(["tiny"], "reduced", columns=["a"])]
    found = shown.show(experiment("tiny"), "reduced", outcomes)
    assert found.order == {"a": (0, 1)}, "printed 50.5 below 60, ours 70 above 60"
    assert [place[0] for place, spot in found.spots.items() if spot.best] == ["avg"], "FedProx is alone in its group"


def test_the_highest_of_a_row_where_rows_choose_among_columns(tiny: Files) -> None:
    tiny["tiny"]["best"] = "row"
    anew()
    values = {"avg": {"a": 0.7, "b": 0.6}, "prox": {"a": 0.1, "b": 0.2}}
    outcomes = [
        made(cell, values[cell.row.key][cell.column.key])
        for cell in command.plan(["tiny"], "reduced", rows=["avg", "prox"])
    ]
    found = shown.show(experiment("tiny"), "reduced", outcomes)
    assert {place for place, spot in found.spots.items() if spot.best} == {("avg", "a"), ("prox", "b")}
    tiny["tiny"]["best"] = "rows"
    anew()
    with pytest.raises(ConfigError, match="tiny: best = 'rows': must be 'column' or 'row'"):
        experiment("tiny")


def test_pairs_are_counted_on_the_seeds_that_both_have(tiny: Files) -> None:
    """Over all seeds FedProx is above FedAvg, as it is not printed; on the one seed that both have it is below."""
    values = {("avg", 1): 0.6, ("avg", 2): 0.2, ("prox", 1): 0.5}
    outcomes = [
        made(cell, value) if (value := values.get((cell.row.key, cell.seed))) else Outcome(cell, None)
        for cell in command.plan(["tiny"], "reduced", rows=["avg", "prox"], columns=["a"])
    ]
    assert shown.show(experiment("tiny"), "reduced", outcomes).order == {"a": (1, 1)}
    none = [each for each in outcomes if (each.cell.row.key, each.cell.seed) != ("avg", 1)]
    assert shown.show(experiment("tiny"), "reduced", none).order == {}


@pytest.mark.parametrize("marked", ["avg", "prox"])
def test_a_marked_number_is_in_no_pair(tiny: Files, marked: str) -> None:
    tiny["tiny"]["marks"] = {f"{marked}.a": "beyond belief"}
    anew()
    values = {"avg": 0.5, "prox": 0.6, "own": 0.7}
    outcomes = [made(cell, values[cell.row.key]) for cell in command.plan(["tiny"], "reduced", columns=["a"])]
    assert shown.show(experiment("tiny"), "reduced", outcomes).order == {}


def test_a_column_like_another_need_not_share_its_mark(tiny: Files) -> None:
    tiny["tiny"]["columns"]["b+conv"] = {"label": "B, conventional", "like": "b"}
    anew()
    assert experiment("tiny").printed_at("prox", "b+conv") == ((70.0,), "above the bound")
    tiny["tiny"]["marks"]["prox.b+conv"] = ""
    anew()
    assert experiment("tiny").printed_at("prox", "b+conv") == ((70.0,), "")
    assert experiment("tiny").printed_at("prox", "b") == ((70.0,), "above the bound")


def test_what_stands_below_a_table(table: shown.Shown) -> None:
    assert [(each.text, each.where) for each in table.reasons] == [
        ("a small network", ""),
        ("a control", "Control"),
        ("twice the epochs", "B"),
    ]
    assert table.stale == ("Control, B, seed 1: rounds = 2, run with 7",)
    assert table.failed == ("Control, A, seed 2: a < b",)
    assert (table.done, table.wanted, table.borrowed) == (8, 12, 1)
    assert table.cpu_hours == pytest.approx(7 * 0.5) and table.gpu_hours == 0
    assert table.versions == ("fedkeel 0.1.0", "torch 2.13.0", "commit 012345678")
    assert (table.hardware, table.dates) == (("A processor",), ("2026-01-02",))
    below = dict(shown.below(table))
    assert below["Methods in the paper's order"] == ["A: 0 of 1 pairs"]
    assert "alpha is inferred" in below["Notes"]
    assert "Spent: 3h 30m of CPU time" in below["Made with"]


def test_a_figure_without_runs_does_not_say_how_models_are_trained(tiny: Files) -> None:
    assert experiment("tiny").departures("smoke") == ("hardly any", "numbers mean nothing")
    tiny["tiny"] = {**TINY, "runs": False}
    anew()
    assert experiment("tiny").departures("smoke") == ("numbers mean nothing",)


def test_what_the_profile_leaves_out_is_said(tiny: Files) -> None:
    only = {"prox": {**TINY["rows"]["prox"], "only": ["paper"]}}
    tiny["tiny"] = {**TINY, "rows": {**TINY["rows"], **only}}
    tiny["tiny"]["columns"] = {**TINY["columns"], "b": {**TINY["columns"]["b"], "rows": {"smoke": ["own"]}}}
    anew()
    table = shown.show(experiment("tiny"), "smoke", [made(cell, 0.5) for cell in plan()])
    assert table.absent == ("rows that this profile leaves out: FedProx",)
    tiny["tiny"]["columns"] = {
        name: {**line, "rows": {"smoke": ["own", "prox"]}} for name, line in TINY["columns"].items()
    }
    anew()
    nowhere = shown.show(experiment("tiny"), "smoke", [made(cell, 0.5) for cell in plan()])
    assert nowhere.absent == ("rows that this profile leaves out: FedAvg; FedProx",), "no column has FedAvg"
    assert table.spots["avg", "b"].state == "not run" and table.spots["avg", "b"].printed == (60.0,)


def test_the_terminal(table: shown.Shown) -> None:
    from rich.console import Console

    def text(width: int) -> list[list[str]]:
        console = Console(width=width, file=io.StringIO())
        for each in shown.as_text(table, console.width):
            console.print(each)
        assert isinstance(console.file, io.StringIO)
        return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]

    wide = text(100)
    assert ["FedAvg", "51.00", "±", "1.41", "missing"] in wide
    assert ["printed", "50.50", "±", "1.25", "60.00"] in wide
    assert ["printed", "40.00", "±", "0.50", "70.00[a]"] in wide
    assert ["Control", "(ours)", "60.00", "(1/2)", "20.00", "(1/2)"] in wide
    narrow = text(36)
    assert ["FedAvg", "51.00", "±", "1.41"] in narrow and ["FedAvg", "missing"] in narrow
    assert not any("…" in word for line in narrow for word in line)
    paper = replace(table, profile="paper")
    (written,) = shown.as_text(paper, 100)
    assert "difference" in str(written.columns[0]._cells[0]) and "+0.50" in str(written.columns[1]._cells[0])


def test_markdown(table: shown.Shown) -> None:
    text = shown.as_markdown(table)
    assert "| FedAvg | 51.00 ± 1.41<br>***50.50 ± 1.25*** | missing<br>*60.00* |" in text
    assert "| Control (ours) | **60.00 (1/2)** | 20.00 (1/2) |" in text
    assert "only the profile paper may be compared" in text
    paper = shown.as_markdown(replace(table, profile="paper"))
    assert "51.00 ± 1.41<br>***50.50 ± 1.25***<br>+0.50" in paper and "may be compared" not in paper


def test_the_page_loads_nothing_and_escapes_all(table: shown.Shown) -> None:
    page = shown.as_html(table)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert "Tiny &lt;table&gt;" in page and "<table>" not in page
    assert "a &lt; b" in page
    assert "<b>60.00</b><i>1/2</i>" in page and "<i>missing</i>" in page
    assert "<small>50.50 ± 1.25</small>" in page.replace("<b>", "").replace("</b>", "")
    assert "<sup>a</sup>" in page and 'role="status"' in page and 'class="scroll"' in page
    assert "+0.50" not in page and "+0.50" in shown.as_html(replace(table, profile="paper"))


@pytest.mark.full
def test_fbl_t3_in_the_profile_smoke(tmp_path: Path) -> None:
    """The whole way, with the package's own files: cells, the table in all forms, and again from what is there."""
    words = ("fbl-t3", "--profile", "smoke", "--dir", tmp_path)
    result = fedkeel_(*words)
    assert result.exit_code == 0, result.output
    assert re.search(r"M7: as M4, γ = 0\.1 \(FBL\) +\d+\.\d\d", result.stdout)
    assert re.search(r"printed +81\.62 ± 0\.30 +48\.65 ± 0\.20", result.stdout)
    assert "only the profile paper may be compared" in result.stdout
    folder = tmp_path / "smoke/fbl-t3"
    assert len(list(folder.glob("*--*--seed1.json"))) == 14
    assert {path.name for path in folder.glob("table.*")} == {"table.md", "table.html", "table.json"}
    value = json.loads((folder / "table.json").read_text())
    assert (value["done"], value["wanted"], value["borrowed"]) == (14, 14, 7)
    assert value["spots"]["m7"]["c10"]["printed"] == [81.62, 0.3]
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*--*.json")}
    part = fedkeel_(*words, "--rows", "m1,m7", "--columns", "c10", "--json")
    assert [list(each["spots"]) for each in json.loads(part.stdout)] == [["m1", "m7"]]
    assert json.loads((folder / "table.json").read_text()) == value, "files have the whole table"
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*--*.json")} == times
    assert (
        fedkeel_(*words, "--show", "--format", "html").stdout.rstrip() == (folder / "table.html").read_text().rstrip()
    )
    assert fedkeel_(*words, "--show", "--format", "markdown").stdout.startswith("# Ablation of FBL")


# with processes of their own ------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from fedkeel.reproduce import cells, command

told = cells._Heard.finished_round


def stop(self, record):
    told(self, record)
    if record["round"] == 1 and "m2--" in str(self.path) and not Path("reached").exists():
        Path("reaching").write_text(str(os.getpid()))
        Path("reaching").rename("reached")
        while True:
            time.sleep(1)


cells._Heard.finished_round = stop
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    cells.reproduce(command.plan(["fbl-t3"], "smoke", ["m1", "m2"]), Path("out"), workers=int(sys.argv[1]))
"""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Callable[[int], tuple[subprocess.Popen[bytes], int]]]:
    """Starts a process that reproduces two rows and gets stuck after a round of the second; it, and the process that
    is stuck."""
    started: list[subprocess.Popen[bytes]] = []

    def start(workers: int) -> tuple[subprocess.Popen[bytes], int]:
        (tmp_path / "script.py").write_text(SCRIPT)
        process = subprocess.Popen([sys.executable, "script.py", str(workers)], cwd=tmp_path)
        started.append(process)
        until(lambda: (tmp_path / "reached").exists() or process.poll() is not None)
        assert process.poll() is None
        return process, int((tmp_path / "reached").read_text())

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(done: Callable[[], bool]) -> None:
    for _ in range(6000):
        if done():
            return
        time.sleep(0.1)
    pytest.fail("it did not come to that in ten minutes")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_killed_goes_on(
    tmp_path: Path, stuck: Callable[[int], tuple[subprocess.Popen[bytes], int]], workers: int
) -> None:
    process, pid = stuck(workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: gone(pid))  # workers do not outlive it
    planned = command.plan(["fbl-t3"], "smoke", ["m1", "m2"])
    folder = tmp_path / "out"
    if workers == 1:
        assert [read(cell, folder).state for cell in planned] == ["done", "missing"] * 2
    (run,) = folder.glob("smoke/fbl-t3/runs/m2--c10--*")
    assert len((run / "rounds.jsonl").read_text().splitlines()) == 1
    reproduce(planned, folder)
    assert json.loads((run / "manifest.json").read_text())["resumed"], "from its checkpoint"
    reproduce(planned, tmp_path / "whole")
    for cell in planned:
        assert timeless(path_of(cell, folder)) == timeless(path_of(cell, tmp_path / "whole"))


@pytest.mark.full
def test_a_worker_that_is_killed_is_replaced(
    tmp_path: Path, stuck: Callable[[int], tuple[subprocess.Popen[bytes], int]]
) -> None:
    process, pid = stuck(2)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(600) == 0
    planned = command.plan(["fbl-t3"], "smoke", ["m1", "m2"])
    assert [read(cell, tmp_path / "out").state for cell in planned] == ["done"] * 4
    (run,) = (tmp_path / "out").glob("smoke/fbl-t3/runs/m2--c10--*")
    assert json.loads((run / "manifest.json").read_text())["resumed"]


@pytest.mark.full
def test_ctrl_c_ends_the_workers(tmp_path: Path, stuck: Callable[[int], tuple[subprocess.Popen[bytes], int]]) -> None:
    process, pid = stuck(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(600) != 0, "though its worker would sleep for ever"
    until(lambda: gone(pid))


@pytest.mark.full
def test_two_workers_make_what_one_makes(tmp_path: Path) -> None:
    planned = command.plan(["fbl-t3"], "smoke", ["m1", "m4", "m7"], seeds=[1, 2])
    for workers in (1, 2):
        outcomes = reproduce(planned, tmp_path / str(workers), workers=workers)
        assert [each.state for each in outcomes] == ["done"] * len(planned)
        assert [each.cell for each in outcomes] == planned
    for cell in planned:
        one, two = (timeless(path_of(cell, tmp_path / str(workers))) for workers in (1, 2))
        assert one == two


@pytest.mark.full
def test_the_page_in_the_docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its commands are understood, its example of a table can be run."""
    text = (Path(__file__).parent.parent / "docs/reproducing.md").read_text()
    commands = re.findall(r"^fedkeel reproduce ([^#\n]+)", text, re.MULTILINE)
    assert len(commands) == 5
    for line in commands:
        result = fedkeel_(*line.split(), *([] if "--show" in line else ["--show"]), "--dir", tmp_path)
        assert result.exit_code == 0, result.output
    (example,) = re.findall(r"```toml\n(title.*?)```", text, re.DOTALL)
    files = {**tables._files(), "mine": tomllib.loads(example)}
    monkeypatch.setattr(tables, "_files", lambda: files)
    anew()
    planned = command.plan(["mine"], "reduced")
    assert [cell.name for cell in planned] == [f"{row}--c10--seed{n}" for n in (1, 2) for row in ("fedavg", "plain")]
    assert {cell.config.local.momentum for cell in planned if cell.row.key == "plain"} == {0.0}
    assert [cell.row.key for cell in command.plan(["mine"], "paper", seeds=[1])] == ["fedavg"]
    anew()


def test_the_docs_list_every_table_with_its_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/reproducing.md").read_text()
    told = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \| (\d+|–) \| (\d+|–) \|$", text, re.MULTILINE)
    counts = {one["name"]: one["cells"] for one in command.overview(tmp_path)}
    there = {name: tuple(str(each[at]["cells"] or "–") for at in ("paper", "reduced")) for name, each in counts.items()}
    assert {name: (paper, reduced) for name, _, paper, reduced in told} == there


def test_protocols_are_configurations_of_the_package() -> None:
    """What `base` names can be loaded as any configuration."""
    from fedkeel import experiments

    folder = Path(experiments.__file__).parent
    for profiles in tables.protocols().values():
        assert profiles.keys() == set(tables.PROFILES)
        for protocol in profiles.values():
            assert load(folder / f"{protocol.base}.toml")["rounds"]
