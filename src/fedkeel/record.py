"""What a run writes as it goes: one JSON line a round, and the same for trackers that the user asked for."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from fedkeel.errors import CheckpointError, ConfigError, MissingExtra, RunWarning, StorageError
from fedkeel.files import write, write_json
from fedkeel.options import flat

if TYPE_CHECKING:
    from fedkeel.config import Config

Record = Mapping[str, Any]

TAIL = 10
"""The headline of a run is the mean over this many last evaluations (of rounds further back where not each round is
evaluated)."""
EXPERIMENT = "fedkeel"
"""Under which MLflow lists our runs."""
_SO_FAR = ("personal/accuracy_best", "personal/evaluations", "privacy/")
"""Metrics that look back over all rounds so far: their headline is the last value."""


def headline(metric: str, values: Sequence[float]) -> float:
    """What a run came to in a metric, from its values in the rounds in which it was measured; NaN without any."""
    return fmean(values[-1 if metric.startswith(_SO_FAR) else -TAIL :]) if values else math.nan


def numbers(record: Record) -> dict[str, Any]:
    """A record without its times: what must be equal between two runs of one configuration."""
    return {key: value for key, value in record.items() if not key.startswith("seconds/")}


def epsilon(value: float | None) -> str:
    """Epsilon of a round's record in words, rounded up; None stands for infinity there."""
    return "∞" if value is None else f"{math.ceil(100 * value) / 100:.2f}"


def spent(record: Record) -> str:
    """What privacy has cost by a round's record: epsilon, then what it is where the cohorts are known if that is more;
    "" without [privacy]."""
    if "privacy/epsilon" not in record:
        return ""
    secret, known = (epsilon(record[f"privacy/{name}"]) for name in ("epsilon", "epsilon_known"))
    return secret if secret == known else f"{secret} (cohorts known: {known})"


class RoundLog:
    """rounds.jsonl: appended line by line. A line cut off by a crash is dropped when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, rounds: int) -> list[dict[str, Any]]:
        """Keeps the first `rounds` lines, which a checkpoint stands for, and returns them.

        Raises CheckpointError when they are not all there.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1][:rounds] if self.path.is_file() else []
        try:
            kept: list[dict[str, Any]] = [json.loads(line) for line in lines]
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged ({error}): start the run again") from error
        if len(kept) < rounds:
            raise CheckpointError(
                f"{self.path} has {len(kept)} of the {rounds} rounds that were finished: start the run again"
            )
        write(self.path, b"".join(line + b"\n" for line in lines))
        return kept

    def append(self, record: Record) -> None:
        """One line, on disk when this returns. Raises StorageError."""
        try:
            with self.path.open("ab") as file:
                file.write((json.dumps(record) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error


class Listener(Protocol):
    """Told how a run goes; the console is one, the trackers are others."""

    def started(self, label: str, rounds: int, done: int) -> None: ...
    def generating(self, done: int, total: int) -> None: ...
    def tuning(self, client: int, done: int, total: int) -> None: ...
    def finished_round(self, record: Record) -> None: ...
    def warned(self, text: str) -> None: ...
    def ended(self) -> None: ...


class Silent:
    """Says nothing."""

    def started(self, label: str, rounds: int, done: int) -> None: ...
    def generating(self, done: int, total: int) -> None: ...
    def tuning(self, client: int, done: int, total: int) -> None: ...
    def finished_round(self, record: Record) -> None: ...
    def warned(self, text: str) -> None: ...
    def ended(self) -> None: ...


class OnlyWarns(Silent):
    """Says nothing but warnings, as Python's: the listener of a run from Python that names none."""

    def warned(self, text: str) -> None:
        warnings.warn(text, RunWarning, stacklevel=2)


class Console:
    """A progress bar with live accuracy and the time left; `bars` shared by the runs of a comparison."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.terminal = Terminal(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]:<24}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.terminal,
        )
        self._making: Any = None
        self._round: Any = None
        self._tuning: Any = None

    def started(self, label: str, rounds: int, done: int) -> None:
        self.bars.start()
        self._making = self._tuning = None
        self._note = ""
        self._round = self.bars.add_task(label, total=rounds, completed=done, note="")

    def generating(self, done: int, total: int) -> None:
        if self._making is None:
            self._making = self.bars.add_task("  images", total=total, note="")
        self.bars.update(self._making, completed=done)

    def tuning(self, client: int, done: int, total: int) -> None:
        if self._tuning is None:
            self._tuning = self.bars.add_task("", total=total, note="")
        self.bars.update(self._tuning, description=f"  tuning for client {client}", completed=done, total=total)

    def finished_round(self, record: Record) -> None:
        accuracy = record.get("global/accuracy")
        self.bars.update(self._round, completed=record["round"])
        if accuracy is not None:
            self._note = f"accuracy {accuracy:.1%}"
        cost = f"ε {spent(record)}" if spent(record) else ""
        self.bars.update(self._round, note=", ".join(filter(None, [self._note, cost])))

    def warned(self, text: str) -> None:
        self.bars.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def ended(self) -> None:
        self.bars.stop()


class TensorBoard(Silent):
    """Events for TensorBoard, in the run's folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard = true", "track") from None
        self.begin: Callable[..., Any] = partial(SummaryWriter, str(folder / "tensorboard"))
        self.writer: Any = None

    def started(self, label: str, rounds: int, done: int) -> None:
        self.writer = self.begin(purge_step=done + 1)  # what a stopped run wrote after its checkpoint goes

    def finished_round(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record["round"])

    def ended(self) -> None:
        if self.writer is not None:
            self.writer.close()


class MLflow(Silent):
    """Metrics and configuration for MLflow, at the tracking address the user gave; nothing is sent elsewhere.

    A run that is resumed goes on in the same MLflow run, which `mlflow.json` in its folder names. A tracker that cannot
    be reached when the run begins is a ConfigError; one that fails later is a warning.
    """

    def __init__(self, config: Config, folder: Path, warn: Callable[[str], None]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its seven take minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            import mlflow
        except ImportError:
            raise MissingExtra("mlflow", "track") from None
        self.mlflow = mlflow
        self.config, self.note, self.warn = config, folder / "mlflow.json", warn
        self.client: Any = None
        self.run, self.rounds, self.done, self.failing = "", 0, 0, False

    def started(self, label: str, rounds: int, done: int) -> None:
        self.rounds, self.done = rounds, done
        try:
            self.client = self.mlflow.MlflowClient(tracking_uri=self.config.mlflow)
            self._begin(label, done)
        except Exception as error:  # of MLflow, of its HTTP client, of its database
            raise ConfigError("mlflow", self.config.mlflow, f"an address that can be written to: {error}") from error

    def _begin(self, label: str, done: int) -> None:
        client = self.client
        if done and self.note.is_file():
            self.run = str(json.loads(self.note.read_bytes())["run_id"])
            client.update_run(self.run, status="RUNNING")
            return
        found = client.get_experiment_by_name(EXPERIMENT)
        number = client.create_experiment(EXPERIMENT) if found is None else found.experiment_id
        self.run = client.create_run(number, run_name=self.config.name, tags={"label": label}).info.run_id
        options = [
            self.mlflow.entities.Param(name, str(value))
            for name, value in flat(self.config.table()).items()
            if name != "mlflow"
        ]
        for first in range(0, len(options), 100):  # as many as it takes at once
            client.log_batch(self.run, params=options[first : first + 100])
        write_json(self.note, {"run_id": self.run})

    def finished_round(self, record: Record) -> None:
        self.done, now = record["round"], int(1000 * time.time())
        values = [self.mlflow.entities.Metric(name, value, now, self.done) for name, value in _scalars(record).items()]
        self._try(lambda: self.client.log_batch(self.run, metrics=values))

    def ended(self) -> None:
        if self.run:
            status = "FINISHED" if self.done == self.rounds else "FAILED"
            self._try(lambda: self.client.set_terminated(self.run, status))

    def _try(self, write: Callable[[], None]) -> None:
        """A tracker is no reason to end a run; the first of its failures in a row is told."""
        try:
            write()
            self.failing = False
        except Exception as error:
            if not self.failing:
                self.warn(f"round {self.done} is not in MLflow ({error}); rounds.jsonl has all")
            self.failing = True


class Several:
    """Several listeners as one."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def started(self, label: str, rounds: int, done: int) -> None:
        for listener in self.listeners:
            listener.started(label, rounds, done)

    def generating(self, done: int, total: int) -> None:
        for listener in self.listeners:
            listener.generating(done, total)

    def tuning(self, client: int, done: int, total: int) -> None:
        for listener in self.listeners:
            listener.tuning(client, done, total)

    def finished_round(self, record: Record) -> None:
        for listener in self.listeners:
            listener.finished_round(record)

    def warned(self, text: str) -> None:
        for listener in self.listeners:
            listener.warned(text)

    def ended(self) -> None:
        for listener in self.listeners:
            listener.ended()


def _scalars(record: Record) -> dict[str, float]:
    return {key: float(value) for key, value in record.items() if isinstance(value, (int, float)) and key != "round"}
