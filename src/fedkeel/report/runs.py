"""Run folders, read for tables and pictures: finished or still running, alone or inside a comparison's folder."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedkeel.errors import DataError, UserError
from fedkeel.options import flat
from fedkeel.record import headline

PHASES = ("generate", "train", "evaluate", "personal")
_CLASS = "global/class/"


@dataclass(frozen=True)
class Failure:
    """A client whose update was not used."""

    round: int
    client: str
    reason: str


@dataclass(frozen=True, eq=False)
class RunData:
    """What one run's folder says.

    rounds: [R] increasing. columns: metric name -> [R], NaN in rounds without it. counts: [K, C] samples per client
    and class; real, fake: [K, C] what each client trains on once balanced. None where the folder does not say: the
    server of a real federation does not know its clients' counts.
    """

    folder: Path
    manifest: Mapping[str, object]
    config: Mapping[str, object]
    classes: tuple[str, ...]
    rounds: tuple[int, ...]
    columns: Mapping[str, NDArray[np.float64]]
    failed: tuple[Failure, ...] = ()
    partition: Mapping[str, object] | None = None
    counts: NDArray[np.int64] | None = None
    real: NDArray[np.int64] | None = None
    fake: NDArray[np.int64] | None = None

    @property
    def algorithm(self) -> str:
        return str(self.manifest.get("algorithm") or self.folder.name)

    @property
    def label(self) -> str:
        """The name to show, such as "FBL (25%)"."""
        return str(self.manifest.get("label") or self.algorithm)

    @property
    def seed(self) -> int:
        return cast(int, self.manifest.get("seed", 0))

    @cached_property
    def settings(self) -> dict[str, object]:
        """Dotted key -> value of all that decides numbers but the seed, with the data that there were: equal for
        repetitions of one another."""
        from fedkeel.config import NO_NUMBERS, parse

        try:
            table = parse(self.config).decisive()
        except UserError:  # of another version, or with methods that are not installed here
            table = {key: value for key, value in self.config.items() if key not in NO_NUMBERS}
        data = self.manifest.get("data")
        fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
        table = {key: value for key, value in table.items() if key != "seed"}
        return flat(table) | {"data.fingerprint": str(fingerprint)[:12]}

    @property
    def planned(self) -> int | None:
        """How many rounds the configuration asks for."""
        rounds = self.config.get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def hash(self) -> str:
        """Which partition this is; "" where unknown."""
        return str((self.partition or {}).get("hash") or self.manifest.get("partition") or "")

    @property
    def balanced(self) -> bool:
        """Whether clients train on anything but what the partition gave them."""
        if self.real is None or self.fake is None:
            return False
        # by their sum: label noise moves samples from class to class and takes none away
        return bool(self.fake.any()) or (self.counts is not None and self.real.sum() != self.counts.sum())

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """The rounds in which a metric was recorded, and its values there."""
        column = self.columns.get(metric)
        if column is None:
            return [], []
        rows = np.flatnonzero(np.isfinite(column))
        return [self.rounds[row] for row in rows], [float(column[row]) for row in rows]

    def headline(self, metric: str = "global/accuracy") -> float | None:
        """The mean over the last ten rounds in which the metric was recorded; None without any. Of one that looks back
        over all rounds so far it is the last value."""
        values = self.series(metric)[1]
        return headline(metric, values) if values else None

    def total(self, metric: str) -> float:
        """The sum over all rounds, zero where never recorded."""
        return math.fsum(self.series(metric)[1])

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds over the whole run, the phases of the loop first."""
        names = (name.removeprefix("seconds/") for name in self.columns if name.startswith("seconds/"))
        return {phase: self.total(f"seconds/{phase}") for phase in in_order(names)}

    def pictures(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """Real and synthetic samples, each [C, n, channels, H, W]; None where the run kept none."""
        path = self.folder / "contact.safetensors"
        if not path.exists():
            return None
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
            real, fake = tensors["real"], tensors["fake"]
        except (SafetensorError, OSError, KeyError) as error:
            raise DataError(f"{path}: not a contact sheet ({error})") from error
        if any(sheet.ndim != 5 or sheet.dtype != np.uint8 or len(sheet) != len(self.classes) for sheet in (real, fake)):
            raise DataError(f"{path}: must hold uint8 images [{len(self.classes)} classes, n, channels, height, width]")
        return real, fake


@dataclass(frozen=True, eq=False)
class Method:
    """The runs of one method, one for each seed. key: its name in summary.json. label: its name in tables."""

    key: str
    label: str
    runs: tuple[RunData, ...]

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Every recorded column, in the order of its first appearance."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.columns))

    def headlines(self, metric: str = "global/accuracy") -> list[float]:
        """The headline of each seed that has one."""
        return [value for run in self.runs if (value := run.headline(metric)) is not None]

    def mean(self, metric: str = "global/accuracy") -> float | None:
        """The mean of the headlines over seeds."""
        values = self.headlines(metric)
        return fmean(values) if values else None

    def curve(self, metric: str) -> tuple[list[int], list[float], list[float]]:
        """Rounds, mean over the seeds that reached each, and sample standard deviation (0 with one seed)."""
        at: dict[int, list[float]] = {}
        for run in self.runs:
            for index, value in zip(*run.series(metric), strict=True):
                at.setdefault(index, []).append(value)
        rounds = sorted(at)
        return rounds, [fmean(at[r]) for r in rounds], [stdev(at[r]) if len(at[r]) > 1 else 0.0 for r in rounds]

    def per_class(self) -> dict[str, float]:
        """Class name -> accuracy, headlines averaged over seeds."""
        names = dict.fromkeys(name for run in self.runs for name in run.classes)
        return {name: value for name in names if (value := self.mean(_CLASS + name)) is not None}

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of a run, averaged over seeds."""
        phases = in_order(phase for run in self.runs for phase in run.seconds())
        return {phase: fmean(run.total(f"seconds/{phase}") for run in self.runs) for phase in phases}

    def bytes(self, way: str) -> float:
        """Bytes "up" or "down" of a run, averaged over seeds."""
        return fmean(run.total(f"bytes/{way}") for run in self.runs)


def in_order(phases: Iterable[str]) -> list[str]:
    """Phases once each: those of the loop in its order, then others by name."""
    found = set(phases)
    return [phase for phase in PHASES if phase in found] + sorted(found.difference(PHASES))


def is_class(metric: str) -> bool:
    """Whether a metric is the accuracy of one class."""
    return metric.startswith(_CLASS)


def read_runs(folders: Iterable[Path | str]) -> list[RunData]:
    """Every run in the folders given; a folder of runs stands for all the runs inside it, in the order they started.

    Raises DataError for a folder without runs and for damaged files. A torn last line of rounds.jsonl is a run being
    written, not damage.
    """
    found: dict[Path, RunData] = {}
    for folder in map(Path, folders):
        inside = _expand(folder)
        if not inside:
            what = "holds no run (no manifest.json)" if folder.is_dir() else "there is no such folder"
            raise DataError(f"{folder}: {what}")
        runs = [read_run(path) for path in inside]
        runs.sort(key=lambda run: str(run.manifest.get("started", "")))
        found.update({run.folder.resolve(): run for run in runs})
    return list(found.values())


def read_run(folder: Path) -> RunData:
    """One run's folder. Raises DataError for missing or damaged files."""
    manifest = _table(folder / "manifest.json")
    classes = manifest.get("classes")
    if not isinstance(classes, list):
        raise DataError(f"{folder / 'manifest.json'}: 'classes' must be a list of names")
    seed = manifest.get("seed", 0)
    if not isinstance(seed, int):
        raise DataError(f"{folder / 'manifest.json'}: seed = {seed!r} must be a whole number")
    names = tuple(map(str, classes))
    rounds, columns, failed = _rounds(folder / "rounds.jsonl")
    partition = balanced = counts = real = fake = None
    if (path := folder / "partition.json").exists():
        partition = _table(path)
        counts = _counts(path, partition, "counts", len(names))
        partition = {key: value for key, value in partition.items() if key not in ("counts", "clients")}
    if (path := folder / "balanced.json").exists():
        balanced = _table(path)
        real, fake = (_counts(path, balanced, key, len(names)) for key in ("real", "fake"))
        if real.shape != fake.shape:
            raise DataError(f"{path}: 'real' and 'fake' must have one row for each client")
    return RunData(
        folder, manifest, _config(folder / "config.toml"), names, rounds, columns, failed, partition, counts, real, fake
    )


def methods(runs: Sequence[RunData]) -> list[Method]:
    """Runs gathered into methods, in order of appearance, seeds in order.

    Runs are repetitions of one another when label and settings agree, seed apart; of several with one seed that stands
    which got furthest. Where a label alone would be ambiguous, the settings that differ are added to it. A method's key
    is its algorithm's name, or its label's when several methods share the algorithm.
    """
    groups: dict[tuple[str, str, str], list[RunData]] = {}
    for run in runs:
        settings = json.dumps(run.settings, sort_keys=True, default=str)
        groups.setdefault((run.algorithm, run.label, settings), []).append(run)
    out: list[Method] = []
    for (algorithm, label, _), group in groups.items():
        rivals = [other[0] for key, other in groups.items() if key[1] == label]
        label = ", ".join([label, *_differences(group[0], rivals)])
        alone = sum(key[0] == algorithm for key in groups) == 1
        key = algorithm if alone else re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-") or algorithm
        taken = {method.key for method in out}
        key = next(name for name in [key, *(f"{key}-{n}" for n in range(2, len(groups) + 2))] if name not in taken)
        out.append(Method(key, label, tuple(_by_seed(group))))
    return out


def _by_seed(runs: Sequence[RunData]) -> list[RunData]:
    """One run a seed: the first of those with the most rounds. The same run twice is no repetition."""
    found: dict[int, RunData] = {}
    for run in runs:
        if run.seed not in found or len(run.rounds) > len(found[run.seed].rounds):
            found[run.seed] = run
    return [found[seed] for seed in sorted(found)]


def _differences(run: RunData, rivals: Sequence[RunData]) -> list[str]:
    """The settings, as key=value, in which a run differs from others of the same label."""
    mine, others = run.settings, [rival.settings for rival in rivals]
    keys = dict.fromkeys(key for settings in [mine, *others] for key in settings)
    return [f"{key}={mine.get(key)}" for key in keys if any(mine.get(key) != other.get(key) for other in others)]


def _expand(folder: Path) -> list[Path]:
    if (folder / "manifest.json").is_file():
        return [folder]
    if not folder.is_dir():
        return []
    children = sorted((child for child in folder.iterdir() if child.is_dir()), key=lambda child: _natural(child.name))
    return [run for child in children for run in _expand(child)]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which seed2 comes before seed10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _table(path: Path) -> dict[str, object]:
    try:
        table = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return table


def _config(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(_read(path)) if path.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not TOML ({error})") from error


def _counts(path: Path, table: Mapping[str, object], key: str, classes: int) -> NDArray[np.int64]:
    """[K, C] counts, checked."""
    try:
        counts = np.asarray(table[key], dtype=np.int64)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: {key!r} must hold whole numbers, one row for each client ({error})") from error
    if counts.ndim != 2 or counts.shape[1] != classes or (counts < 0).any():
        raise DataError(f"{path}: {key!r} must hold {classes} counts (one for each class) for each client")
    return counts


def _rounds(path: Path) -> tuple[tuple[int, ...], dict[str, NDArray[np.float64]], tuple[Failure, ...]]:
    rows: list[dict[str, Any]] = []
    lines = _read(path).splitlines() if path.exists() else []  # absent before the first round
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("round"), int):
            raise DataError(f"{path}, line {number}: must be an object with a whole 'round'")
        while rows and rows[-1]["round"] >= row["round"]:  # the run went back to a checkpoint: what followed is undone
            rows.pop()
        rows.append(row)
    columns: dict[str, NDArray[np.float64]] = {}
    for at, row in enumerate(rows):
        for key, value in row.items():
            if key != "round" and isinstance(value, (int, float)) and not isinstance(value, bool):
                columns.setdefault(key, np.full(len(rows), np.nan))[at] = value
    failed = [
        Failure(row["round"], str(entry.get("client", "?")), str(entry.get("reason", "")))
        for row in rows
        for entry in row.get("failed") or ()
        if isinstance(entry, dict)
    ]
    return tuple(row["round"] for row in rows), columns, tuple(failed)
