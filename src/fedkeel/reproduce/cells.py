"""The runs of a table, cell by cell: what is done is read, what was stopped goes on, what changed is run anew.

    <folder>/<profile>/<table>/<row>--<column>--seed<n>.json    one cell: what it came to, and what it was made with
    <folder>/<profile>/<table>/runs/<the same>-<key>/           its run, as `fedkeel run` leaves it

A cell has the key of its configuration. A JSON file with another key than the table asks for now is stale: it is shown
as such, counts for nothing, and is replaced when the cell is run again. Cells of several tables that have one key are
one run, but one that was begun on other data or with another generator than there are now does not go on: it is run
from the start. A cell that failed leaves failed.json in its run's folder, with the reason, until it succeeds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from fedkeel.config import Config
from fedkeel.data.dataset import Dataset
from fedkeel.errors import FedkeelError, RunError
from fedkeel.files import locked, write, write_json
from fedkeel.job import Job
from fedkeel.loop import Result, begun_with, run
from fedkeel.record import Record, Silent, headline
from fedkeel.reproduce.asked import OF_RUNS, asked
from fedkeel.reproduce.tables import Cell, experiment

HELD = 2
"""Data sets that a worker keeps in memory."""
KEPT = ("global/", "local_before/", "local_after/", "personal/", "train/loss")
"""Metrics whose curves are kept, but for classes and clients."""
NEEDED = {"key": str, "headline": dict, "rounds": dict, "data": dict, "config": dict, "failed": int}
"""What a cell's file must have to be read, and of which kind."""
PATIENCE = 3
"""How often workers may die without that a cell is done in between."""
FAILED = "failed.json"
SPENT = "cpu_seconds"
"""Files in a run's folder, until its cell is done."""

Tell = Callable[["Outcome"], None]
"""Called as cells are done."""


@dataclass(frozen=True)
class Outcome:
    """A cell and what its JSON file says; None where there is none. error: why it failed when it was run last. fresh:
    it came to be just now. apart: "data" or "generator", where it was run with another than the cells beside it."""

    cell: Cell
    found: Mapping[str, Any] | None
    error: str = ""
    fresh: bool = False
    apart: str = ""

    @property
    def state(self) -> str:
        """done, stale, failed or missing."""
        if self.error:
            return "failed"
        if self.found is None:
            return "missing"
        return "done" if self.found["key"] == self.cell.key and not self.apart else "stale"

    def headline(self) -> float | None:
        """The row's metric, in [0, 1]; None where it is not done."""
        if self.state != "done" or self.found is None:
            return None
        value: float | None = self.found["headline"].get(self.cell.row.metric)
        return value


def path_of(cell: Cell, folder: Path) -> Path:
    """The cell's JSON file."""
    return folder / cell.profile / cell.table / f"{cell.name}.json"


def read(cell: Cell, folder: Path) -> Outcome:
    """What there is of a cell. Raises RunError for a file that is no such."""
    path = path_of(cell, folder)
    found = None
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            for key, kind in NEEDED.items():
                if not isinstance(found[key], kind):
                    raise TypeError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} cannot be read ({type(error).__name__}): remove it, and its cell is run again"
            ) from None
    failed = _place(cell, folder) / FAILED
    if (found is None or found["key"] != cell.key) and failed.is_file():
        try:
            return Outcome(cell, found, str(json.loads(failed.read_text())["error"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Outcome(cell, found, f"{failed} cannot be read")
    return Outcome(cell, found)


def of_one_make(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same, where a cell is stale that was run on other data than most cells of its column, or with another
    generator than most seeds of its row there: the key has no images and no weights, only what they are called."""
    prints: dict[tuple[str, ...], Counter[str]] = {}
    for each in outcomes:
        for place, fingerprint in _made_of(each):
            prints.setdefault(place, Counter())[fingerprint] += 1
    most = {place: found.most_common(1)[0][0] for place, found in prints.items()}
    return [
        replace(each, apart=next((place[0] for place, mine in _made_of(each) if mine != most[place]), ""))
        for each in outcomes
    ]


def _made_of(outcome: Outcome) -> Iterator[tuple[tuple[str, ...], str]]:
    """Fingerprints of what a cell that is done was made of, each by what it is of and where it must be the same."""
    if outcome.state == "done" and outcome.found is not None:
        column, row = outcome.cell.column.key, outcome.cell.row.key
        yield ("data", column), outcome.found["data"]["fingerprint"]
        if generator := outcome.found["generator"]:
            yield ("generator", column, row), generator.get("fingerprint", "")


def reproduce(
    planned: Sequence[Cell],
    folder: Path,
    *,
    data: Path | None = None,
    pools: Path | None = None,
    workers: int = 1,
    keep: bool = False,
    tell: Tell = lambda _: None,
) -> list[Outcome]:
    """Runs the cells that are not done, and returns all in their order.

    data: folder above the data sets' folders. pools: where synthetic images are kept; None: as configured. workers:
    processes of one thread each. keep: leaves checkpoints and client states in the runs' folders, which take most of
    the space and which pictures of a run need; a cell that another table has without them is then run again. A table's
    own pictures keep theirs anyway. tell: called for each cell that was done before, then for each as it is done. A
    cell that fails does not stop the others.

    Raises UserError before anything runs, for data that is not there; RunError when another process is at it.
    """
    planned = list({path_of(cell, folder): cell for cell in planned}.values())
    outcomes = {path_of(cell, folder): read(cell, folder) for cell in planned}
    for cell in planned:
        if outcomes[path_of(cell, folder)].state != "done":
            cell.placed(data, folder, pools)
    if any(outcome.state != "done" or _told(outcome) != outcome for outcome in outcomes.values()):
        with locked(folder, RunError(f"another process works in {folder}: wait for it, or choose another --dir")):
            outcomes = {path_of(cell, folder): read(cell, folder) for cell in planned}  # it may have done some
            for path, outcome in outcomes.items():
                if outcome.state == "done":
                    outcomes[path] = told = _told(outcome)
                    if told.found is not None and told != outcome:
                        _write(path, told.found)
                    tell(told)
            data = data and data.absolute()  # a run that was stopped goes on with data at the same path only
            open_ = [outcome.cell for outcome in outcomes.values() if outcome.state != "done"]
            for cell, error in _results(open_, folder, data, pools, workers, keep):
                outcome = Outcome(cell, read(cell, folder).found, error, fresh=True)
                outcomes[path_of(cell, folder)] = outcome
                tell(outcome)
    else:
        for outcome in outcomes.values():
            tell(outcome)
    return list(outcomes.values())


def _results(
    cells: Sequence[Cell], folder: Path, data: Path | None, pools: Path | None, workers: int, keep: bool
) -> Iterator[tuple[Cell, str]]:
    """Each cell once it is done, with why it failed; one run for all cells of a key."""
    known = _known(folder)
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(cell.key, []).append(cell)
    for key in list(alike):
        # what is to be kept, other runs may have dropped
        if key in known and (_whole(known[key], key) or not (keep or any(map(pictured, alike[key])))):
            for cell in alike.pop(key):
                _copy(known[key], cell, folder)
                yield cell, ""
    for group in alike.values():
        group.sort(key=pictured, reverse=True)
    for key, error in _runs({key: group[0] for key, group in alike.items()}, folder, data, pools, workers, keep):
        first, *others = alike[key]
        yield first, error
        for cell in others:
            if error:
                write_json(_place(cell, folder) / FAILED, {"error": error})
            else:
                _copy(path_of(first, folder), cell, folder)
            yield cell, error


def _runs(
    tasks: Mapping[str, Cell], folder: Path, data: Path | None, pools: Path | None, workers: int, keep: bool
) -> Iterator[tuple[str, str]]:
    """Runs cells, by their keys; each key once it is done, with why it failed. A worker that is killed takes nothing
    with it but the round it was in: another one goes on."""
    if workers == 1:
        for key, cell in tasks.items():
            yield key, _one(cell, folder, data, pools, keep)
        return
    left, patience = dict(tasks), PATIENCE
    while left:
        crew = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
        try:
            waiting = {crew.submit(_one, cell, folder, data, pools, keep): key for key, cell in left.items()}
            for future in as_completed(waiting):
                error = future.result()
                patience = PATIENCE
                del left[waiting[future]]
                yield waiting[future], error
        except BrokenProcessPool:
            patience -= 1
            if not patience:
                raise RunError(
                    f"workers died {PATIENCE} times in a row (out of memory?): the same command goes on, with fewer "
                    "--workers"
                ) from None
        finally:
            processes = list((crew._processes or {}).values())  # shutdown forgets them
            crew.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()


def _begin() -> None:
    """In a worker: one thread, Ctrl-C is the parent's business, and no life without it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _place(cell: Cell, folder: Path) -> Path:
    """The folder of a cell's own run."""
    return folder / cell.profile / cell.table / "runs" / f"{cell.name}-{cell.key[:8]}"


def _one(cell: Cell, folder: Path, data: Path | None, pools: Path | None, keep: bool) -> str:
    """Runs a cell and writes its JSON file; returns why it failed, or nothing."""
    place = _place(cell, folder)
    try:
        config = cell.placed(data, place, pools)
        if _begun_with_others(place, config):
            shutil.rmtree(place)
        heard = _Heard(place / SPENT)
        result = run(config, data=loaded(config), folder=place, listener=heard, resume=True, label=cell.row.label)
    except Exception as error:  # one cell's failure is a gap in a table, not the end of the others
        if isinstance(error, FedkeelError):  # a user's mistake or a run that diverged: the words say it all
            write_json(place / FAILED, {"error": str(error)})
            return str(error)
        text = f"{type(error).__name__}: {error}"
        write_json(place / FAILED, {"error": text, "trace": traceback.format_exc()})
        return text
    _write(path_of(cell, folder), _came_to(cell, result, heard))
    for name in (FAILED, SPENT):
        (place / name).unlink(missing_ok=True)
    if not (keep or pictured(cell)):
        for name in ("checkpoint", "clients", "shelf"):
            shutil.rmtree(place / name, ignore_errors=True)
    return ""


def _begun_with_others(place: Path, config: Config) -> bool:
    """Whether there is a run that was begun on other data or with another generator, of the same names."""
    try:
        (place / "manifest.json").read_bytes()  # a disk that fails now is no reason to begin anew
    except FileNotFoundError:
        return False
    job = Job(config, loaded(config))
    generators = job.untuned() if job.generates else {}
    now = {"data": job.fingerprint, **{key: each["fingerprint"] for key, each in generators.items()}}
    return begun_with(place) != now  # where it cannot be known, too


class _Heard(Silent):
    """What a run warned of, and its CPU seconds, with those before it was stopped: kept in its folder by the round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: dict[str, None] = {}
        self.before = float(path.read_text()) if path.is_file() else 0.0
        self.began = time.process_time()

    def seconds(self) -> float:
        return self.before + time.process_time() - self.began

    def warned(self, text: str) -> None:
        self.warnings[text] = None

    def finished_round(self, record: Record) -> None:
        write(self.path, f"{self.seconds():.2f}\n".encode())


def pictured(cell: Cell) -> bool:
    """Whether a picture of the table is drawn from this cell's run."""
    return any(
        one.kind in OF_RUNS
        and (one.column, one.seed) == (cell.column.key, cell.seed)
        and (not one.rows or cell.row.key in one.rows)
        for one in asked(experiment(cell.table), cell.profile)
    )


def run_of(cell: Cell, folder: Path) -> Path:
    """The folder of the run that a cell stands on, which may be another table's."""
    found = read(cell, folder).found or {}
    if "same_as" not in found:
        return _place(cell, folder)
    profile, table, name = str(found["same_as"]).split("/")
    return folder / profile / table / "runs" / f"{name}-{cell.key[:8]}"


def _came_to(cell: Cell, result: Result, heard: _Heard) -> dict[str, Any]:
    """What is kept of a run: enough for any table, and to make it again."""
    assert result.folder is not None
    manifest = json.loads((result.folder / "manifest.json").read_text())
    rounds = result.rounds
    names = sorted({name for each in rounds for name, value in each.items() if _shown(name, value)})
    curves = {name: [_short(each.get(name)) for each in rounds] for name in names}
    series = {name: [value for value in curve if value is not None] for name, curve in curves.items()}
    series = {name: values for name, values in series.items() if values}
    generator = manifest.get("generator") or {}
    classes = sorted({name for each in rounds for name in each if name.startswith("global/class/")})
    return {
        "table": cell.table,
        "profile": cell.profile,
        "row": cell.row.key,
        "column": cell.column.key,
        "seed": cell.seed,
        "key": cell.key,
        "method": cell.row.method,
        "headline": {name: _short(headline(name, values)) for name, values in series.items()},
        "best": {
            name: min(values) if name.endswith("/loss") else max(values)
            for name, values in series.items()
            if name != "train/loss"
        },
        "last": {name: values[-1] for name, values in series.items()},
        "classes": {
            name.removeprefix("global/class/"): _short(headline(name, values))
            for name in classes
            if (values := [each[name] for each in rounds if each.get(name) is not None])
        },
        "rounds": curves,
        "failed": sum(len(each.get("failed", ())) for each in rounds),
        "steps": sum(each.get("train/steps", 0) for each in rounds),
        "bytes": {way: sum(each.get(f"bytes/{way}", 0) for each in rounds) for way in ("up", "down")},
        "seconds": round(sum(v for each in rounds for name, v in each.items() if name.startswith("seconds/")), 1),
        "cpu_seconds": round(heard.seconds(), 1),
        "warnings": list(heard.warnings),
        **_words(cell),
        "generator": {part: generator[part] for part in ("name", "fingerprint") if part in generator} or None,
        "partition": manifest["partition"],
        "data": manifest["data"],
        "versions": manifest["versions"],
        "commit": manifest["commit"],
        "hardware": manifest["hardware"],
        "started": manifest["started"],
        "config": cell.config.table(),
    }


def _shown(name: str, value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and name.startswith(KEPT) and not name.startswith("global/class/")


def _short(value: object) -> float | None:
    """Five digits are more than any test set tells apart."""
    return round(float(value), 5) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _known(folder: Path) -> dict[str, Path]:
    """Files of cells that are done, by their keys; where there are several, one whose run has kept all."""
    out: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*/*--*--seed*.json")):
        try:
            found = json.loads(path.read_text())
            key = str(found["key"])
            if "same_as" not in found and not (key in out and _whole(out[key], key)):
                out[key] = path
        except (ValueError, KeyError, TypeError):
            continue
    return out


def _whole(path: Path, key: str) -> bool:
    """Whether the run of a cell's file is there with its checkpoint."""
    return (path.parent / "runs" / f"{path.stem}-{key[:8]}" / "checkpoint").is_dir()


def _copy(path: Path, cell: Cell, folder: Path) -> None:
    """The same run as a cell of another table or profile."""
    found = json.loads(path.read_text())
    own = {"table": cell.table, "profile": cell.profile, "row": cell.row.key, "column": cell.column.key}
    same = f"{path.parent.parent.name}/{path.parent.name}/{path.stem}"
    _write(path_of(cell, folder), {**found, **own, **_words(cell), "same_as": same})


def _words(cell: Cell) -> dict[str, Any]:
    """What the table's files say of a cell beside its configuration: where it departs from the paper, what the paper
    prints in its place (in per cent) and why that cannot be relied on."""
    found = experiment(cell.table)
    printed, mark = found.printed_at(cell.row.key, cell.column.key)
    return {
        "departures": [*found.departures(cell.profile), *filter(None, [cell.row.note, cell.column.note])],
        "printed": list(printed),
        "mark": mark,
    }


def _told(outcome: Outcome) -> Outcome:
    """A cell that is done with what is said of it now: words are mended, and its numbers hold."""
    return replace(outcome, found={**(outcome.found or {}), **_words(outcome.cell)})


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """A line a key: curves stay on one."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    write(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def loaded(config: Config) -> Dataset:
    """The data of a configuration, held in memory for the next call."""
    return _loaded(config.data)


@lru_cache(HELD)
def _loaded(source: Any) -> Dataset:
    loaded: Dataset = source.load()
    return loaded
