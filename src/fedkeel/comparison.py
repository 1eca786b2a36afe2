"""Several methods on the same data with the same seeds, one run (a cell) for each method and seed.

Every cell is a run's folder of its own, so a comparison that was stopped goes on where it stopped: finished cells are
read, unfinished ones resumed, and a cell of another configuration is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedkeel.algorithms.base import Algorithm
from fedkeel.config import NO_NUMBERS, Config, Table, check_algorithm, override, parse, read, spec_parts, with_method
from fedkeel.data.dataset import Dataset
from fedkeel.errors import CheckpointError, ConfigError, FedkeelError, RunError, UserError
from fedkeel.files import locked, write_json
from fedkeel.job import Job, validating
from fedkeel.loop import Result, begun_with, run
from fedkeel.options import flat
from fedkeel.record import Listener, OnlyWarns, Several

_MARK = ".again"
"""A run's folder with this file in it may be removed by a comparison that starts afresh."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: a method as the user wrote it, a seed, and the run's whole configuration."""

    spec: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.folder


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to. summary: the table as in summary.json, by the methods as the user wrote them. report:
    the page, None when it could not be made."""

    folder: Path
    results: Mapping[tuple[str, int], Result]
    summary: dict[str, Any]
    report: Path | None


def compare(
    table: Table,
    specs: Sequence[str],
    seeds: Sequence[int],
    folder: Path | str,
    *,
    overrides: Sequence[str] = (),
    data: Dataset | None = None,
    listener: Listener | None = None,
    again: bool = False,
) -> Comparison:
    """Runs every method with every seed in `folder`, and writes summary.json, report.html and pictures there.

    specs: methods as `with_method` reads them, such as "fedprox", "fbl:M3" or "fbl(25%)". data: stands in for [data].
    again: starts afresh, where only runs that began so are removed from `folder` (the demo's; never a user's).
    Raises UserError before anything runs. From then on a run that fails, for whatever reason, does not keep the others
    from running: RunError at the end names those that failed.
    """
    folder, listener = Path(folder), _Held(listener or OnlyWarns())
    planned = cells(table, specs, seeds, folder, overrides)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--dir", str(folder), "must be a folder")
    if (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder} holds a run, whose report would be replaced: choose --dir, or another name")
    if again:
        for mark in folder.glob(f"*/{_MARK}"):
            with locked(mark.parent, CheckpointError(f"{mark.parent} is being written by another process")):
                shutil.rmtree(mark.parent)
    fresh = {cell.folder for cell in planned if not _finished(cell)}
    if data is None:
        data = planned[0].config.data.load()  # the same for all cells, loaded once
    if len(fresh) < len(planned):
        _check_data([cell.folder for cell in planned if cell.folder not in fresh], planned[0].config, data)
    _check_generators([cell.config for cell in planned if cell.folder in fresh], data)
    if again:
        for place in fresh:
            place.mkdir(parents=True, exist_ok=True)
            (place / _MARK).touch()
    results: dict[tuple[str, int], Result] = {}
    failed: list[str] = []
    try:
        for cell in planned:
            if cell.folder not in fresh:
                results[cell.spec, cell.seed] = _read(cell.folder)
                continue
            try:
                results[cell.spec, cell.seed] = run(
                    cell.config, data=data, folder=cell.folder, listener=listener, resume=True, label=cell.spec
                )
            except FedkeelError as error:  # a user's mistake too, that only this run could find
                failed.append(f"{cell.folder.name}: {error}")
                listener.warned(failed[-1])
    finally:
        listener.end()
    summary = _summary(planned, results)
    write_json(folder / "summary.json", summary)
    page = None
    if results:
        page = publish([cell.folder for cell in planned if (cell.spec, cell.seed) in results], folder, listener)
    if failed:
        raise RunError(f"{len(failed)} of {len(planned)} runs failed: {'; '.join(failed)}")
    return Comparison(folder, results, summary, page)


def cells(
    table: Table, specs: Sequence[str], seeds: Sequence[int], folder: Path, overrides: Sequence[str] = ()
) -> list[Cell]:
    """The runs of a comparison, seed by seed.

    Raises ConfigError for a method that is unknown or named twice, for two that would share a folder, without seeds,
    and for options that are none of its methods'.
    """
    if isinstance(specs, str):
        raise ConfigError("algorithms", specs, "must be a list of methods")
    places = [slug(spec) for spec in specs]
    doubled = next((spec for at, spec in enumerate(specs) if places[at] in places[:at]), None)
    if not specs or doubled is not None:
        raise ConfigError("algorithms", doubled or "", "must name methods, each of them once, by names of their own")
    unnamed = next((spec for spec, place in zip(specs, places, strict=True) if not place), None)
    if unnamed is not None:
        raise ConfigError("algorithms", unnamed, "needs a letter from a to z or a digit: folders are named by it")
    if isinstance(seeds, int) or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError("seeds", seeds, "must be a list of numbers, each of them once, and one at least")
    chosen = override(table, overrides)
    check_algorithm(chosen, [spec_parts(spec)[0] for spec in specs], overrides)
    planned = []
    for seed in seeds:
        for spec in specs:
            own = {"seed": seed, "name": f"{slug(spec)}-seed{seed}", "runs_dir": str(folder)}
            planned.append(Cell(spec, seed, parse({**with_method(chosen, spec), **own})))
    return planned


def slug(spec: str) -> str:
    """A method as part of a folder's name: "fbl(25%)" is "fbl-25", "fbl:M3" is "fbl-m3"."""
    return re.sub(r"[^a-z0-9._]+", "-", spec.lower()).strip("-")


def publish(runs: Sequence[Path | str], out: Path, listener: Listener | None = None) -> Path | None:
    """Writes report.html, and its charts as pictures/*.png, into `out`; returns the page.

    With a listener a report that fails is a warning, and None is returned: it must not cost the run that it shows.
    """
    page = out / "report.html"
    try:
        from fedkeel.report.page import write_page
        from fedkeel.report.plots import write_pngs
        from fedkeel.report.runs import read_runs

        shown = read_runs(runs)
        write_page(shown, page)
        write_pngs(shown, out / "pictures")
    except Exception as error:
        if listener is None:
            raise
        listener.warned(f"no report: {type(error).__name__}: {error}")
        return None
    return page


def _finished(cell: Cell) -> bool:
    """Whether a cell has run to its end. Raises CheckpointError when its folder holds another run."""
    path = cell.folder / "config.toml"
    if not path.is_file():
        return False
    try:
        there = read(path)
    except UserError as error:
        raise CheckpointError(f"{cell.folder} holds a run that cannot be read ({error}); remove it") from None
    if there.key() != cell.config.key():
        differ = differing(cell.config, there.table())
        shown = ", ".join(f"{key} = {theirs!r} there, {mine!r} here" for key, mine, theirs in differ[:3])
        raise CheckpointError(f"{cell.folder} holds a run of another configuration: {shown}; remove it or choose --dir")
    log = cell.folder / "rounds.jsonl"
    lines = log.read_bytes().count(b"\n") if log.is_file() else 0
    return lines >= cell.config.rounds and (cell.folder / "model.safetensors").is_file()


def _check_data(folders: Sequence[Path], config: Config, data: Dataset) -> None:
    """Raises CheckpointError when a run that is done was made on other data, or does not say on which."""
    now = validating(data, config.evaluate.validation).fingerprint
    for folder in folders:
        then = begun_with(folder).get("data", "unknown")
        if then != now:
            fingerprints = f"data fingerprint {then[:12]} there, {now[:12]} here"
            raise CheckpointError(f"{folder} holds a run on other data: {fingerprints}; remove it or choose --dir")


def _check_generators(configs: Sequence[Config], data: Dataset) -> None:
    """Raises ConfigError when a run needs synthetic images and names no generator. Where a method may need some, who
    holds what decides: a client that is balanced by itself needs none."""
    for config in configs:
        fills = type(config.method).plan is not Algorithm.plan
        if config.generator is None and (fills or config.algorithm.generates):
            Job(config, data).check_generators()


def _read(folder: Path) -> Result:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return Result([json.loads(line) for line in lines], load_file(folder / "model.safetensors"), folder)


def _summary(planned: Sequence[Cell], results: Mapping[tuple[str, int], Result]) -> dict[str, Any]:
    """The report's own numbers, under the methods as the user wrote them."""
    from fedkeel.report.runs import read_runs
    from fedkeel.report.table import as_json, summarise

    methods: dict[str, object] = {}
    for spec in dict.fromkeys(spec for spec, _ in results):
        runs = read_runs([cell.folder for cell in planned if cell.spec == spec and (spec, cell.seed) in results])
        table = as_json(summarise(runs))["methods"]
        assert isinstance(table, dict) and len(table) == 1, "seeds of one method are one row"
        (methods[spec],) = table.values()
    return {"methods": methods}


def differing(mine: Config, theirs: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """The dotted keys in which a configuration differs from the table of another, as far as they decide numbers, with
    both values; None for a key that is not there."""
    tables: list[Mapping[str, object]]
    try:
        tables = [mine.decisive(), parse(theirs).decisive()]
    except UserError:  # of another version, or of methods that are not installed here
        tables = [{key: each[key] for key in each if key not in NO_NUMBERS} for each in (mine.table(), theirs)]
    here, there = (flat(json.loads(json.dumps(each))) for each in tables)  # tuples are lists there
    return [(key, here.get(key), there.get(key)) for key in {**here, **there} if here.get(key) != there.get(key)]


class _Held(Several):
    """Hands on all that runs tell, but the end only once: the bars of a comparison stay together."""

    def ended(self) -> None: ...

    def end(self) -> None:
        super().ended()
