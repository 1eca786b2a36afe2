"""The only round loop."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkeel import personal, registry
from fedkeel.checkpoint import Checkpoints
from fedkeel.config import Config, read
from fedkeel.contact import write_sheet
from fedkeel.data.dataset import Dataset
from fedkeel.errors import CheckpointError, ConfigError, RunError, StorageError, TooFewClients, UndeclaredField
from fedkeel.files import locked, sweep, write, write_json, write_tensors
from fedkeel.job import Holdings, Job
from fedkeel.partition.manifest import listed
from fedkeel.privacy import guarded
from fedkeel.record import Listener, MLflow, OnlyWarns, RoundLog, Several, TensorBoard, headline
from fedkeel.records import Reply, Server, Update
from fedkeel.rng import isolated
from fedkeel.robust import agreed
from fedkeel.runtimes.base import Choosing, Engine, Runtime
from fedkeel.weights import Layout, Statistics, Weights, finite

NEEDED = ("fedkeel", "torch", "numpy", "safetensors")
EXTRAS = ("diffusers", "transformers", "peft", "accelerate", "sdnq", "bitsandbytes")
"""Whose versions a run's manifest has; those of extras as far as they are installed."""


@dataclass(frozen=True)
class Result:
    """What a run came to. rounds: the records as in rounds.jsonl. weights: the model by tensor name, on the CPU."""

    rounds: list[dict[str, Any]]
    weights: dict[str, Tensor]
    folder: Path | None

    def headline(self, metric: str = "global/accuracy") -> float:
        """Mean of a metric over the last 10 evaluations, or the last value of one that looks back over all rounds so
        far; NaN when it was never measured."""
        return headline(metric, [record[metric] for record in self.rounds if record.get(metric) is not None])


@contextmanager
def _as_before() -> Iterator[None]:
    """What a run switches in PyTorch, for the whole process, is as before when it ends."""
    cudnn, matmul, threads = torch.backends.cudnn, torch.backends.cuda.matmul, torch.get_num_threads()
    switches = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = switches


@_as_before()
def run(
    config: Config,
    *,
    data: Dataset | None = None,
    folder: Path | str | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    label: str = "",
    engine: Engine | None = None,
    holdings: Holdings | None = None,
) -> Result:
    """Runs a configuration to its end.

    data: stands in for [data], for arrays from Python. folder: where the run is written (None: nothing is written).
    listener: is told how it goes; without one warnings are Python's (RunWarning).
    resume: goes on from the last checkpoint in `folder`, or starts when there is none yet. engine: the runtime, in
    place of the one that the configuration names. holdings: stand in for data and partition, at the server of sites.
    Raises UserError for wrong input, RunError when the run fails; a folder then holds all that was done. PyTorch's
    threads and switches are as before afterwards.
    """
    for what, value, kind, wanted in (
        ("config", config, Config, "a Config: fedkeel.read of a file, fedkeel.parse of tables"),
        ("data", data, Dataset | None, "a Dataset: fedkeel.arrays of arrays"),
    ):
        if not isinstance(value, kind):
            raise ConfigError(what, type(value).__name__, f"must be {wanted}")
    torch.set_num_threads(config.threads)
    if folder is None:
        for key in ("mlflow", "tensorboard"):
            if getattr(config, key):
                raise ConfigError(key, getattr(config, key), "needs a folder: run(config, folder=config.folder)")
        return _rounds(Job(config, data, None, holdings), None, listener or OnlyWarns(), label, False, engine)
    folder = Path(folder)
    if not resume and (folder / "config.toml").exists():
        raise ConfigError("name", folder.name, f"{folder} holds a run: resume it, or choose another name")
    if not resume and any(folder.glob("*/config.toml")):
        raise ConfigError("name", folder.name, f"{folder} holds a comparison, or other runs: choose another name")
    with _locked(folder):
        sweep(folder)
        job = Job(config, data, folder, holdings)
        return _rounds(job, folder, _trackers(config, folder, listener), label, resume, engine)


def resume(folder: Path | str, *, data: Dataset | None = None, listener: Listener | None = None) -> Result:
    """Goes on with a run where it stopped. Raises CheckpointError when there is none, or one that is done and whose
    checkpoint was removed: it would begin anew, and what is there be lost."""
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder} holds no run (no config.toml)")
    if (folder / "model.safetensors").is_file() and not (folder / "checkpoint").is_dir():
        raise CheckpointError(
            f"{folder} holds a run that is done and has no checkpoint: there is nothing to go on with"
        )
    config = read(folder / "config.toml")
    label = str(_manifest(folder).get("label", ""))
    return run(config, data=data, folder=folder, listener=listener, resume=True, label=label)


def _rounds(
    job: Job, folder: Path | None, listener: Listener, label: str, resume: bool, engine: Engine | None
) -> Result:
    config, server = job.config, replace(job.first_server(), layout=job.worker.weights.layout)
    engine = engine or registry.get("runtimes", config.runtime)()  # an unknown name is refused before any writing
    assert engine is not None
    job.warn = listener.warned
    accountant = job.accountant  # without its extra the run is refused here, before any work
    if isinstance(engine, Choosing):
        before = str(_manifest(folder).get("runtime", "")) if folder is not None and resume else ""
        engine = engine.choose(job, before)
    accepted: dict[int, int] = {}
    records: list[dict[str, Any]] = []
    spent: dict[str, Any] = {}
    log = checkpoints = None
    label = label or name(config)
    if folder is not None:
        log = RoundLog(folder / "rounds.jsonl")
        checkpoints = Checkpoints(folder, run_key(job), job.store, job.shelf, engine.remote)
        job.checkpointed = checkpoints.versions
        found = checkpoints.load(server) if resume else None
        if found is not None:
            server, accepted = found.server, dict(found.accepted)
            for text in found.warnings:
                listener.warned(text)
        records = log.rewind(server.round)
        spent = _table(folder / "generators.json") if resume else {}
        if accountant is not None and resume:
            released = _table(folder / "released.json").items()
            accountant.recall({int(number): int(times) for number, times in released}, server.round)
    for text in job.idle():
        listener.warned(text)
    with closing(engine.start(job)) as runtime, _told(listener, label, config.rounds, server.round):
        if folder is not None:  # all is known to be right: from here on it holds a run
            describe(job, folder, label, engine, resume)
            write(folder / "config.toml", config.toml().encode())
        seconds = 0.0
        if server.round < config.rounds:
            began = time.perf_counter()
            try:
                count = runtime.prepare(listener.generating, listener.tuning)
            finally:
                _note_spent(job, folder, spent)
            if count and folder is not None:
                write_sheet(job, folder / "contact.safetensors")
                if job.adapters:
                    write_json(folder / "adapters.json", list(job.adapters.values()))
            seconds = time.perf_counter() - began
        while server.round < config.rounds:
            with _noted(folder):
                server, record = one_round(job, runtime, server, accepted)
            if accountant is not None and folder is not None:  # before anybody is sent the new model
                write_json(folder / "released.json", dict(accountant.released))
            if job.personal_round(server.round):
                began = time.perf_counter()
                record |= personal.measure(job, runtime.personal(server, accepted), records)
                record["seconds/personal"] = round(time.perf_counter() - began, 4)
            record["seconds/generate"] = round(seconds, 4)
            seconds = 0.0
            records.append(record)
            if log is not None and checkpoints is not None:
                log.append(record)
                if server.round % config.checkpoint_every == 0 or server.round == config.rounds:
                    checkpoints.save(server, accepted)
                    _note_spent(job, folder, spent)
            listener.finished_round(record)
    job.worker.load(server)
    weights = job.worker.weights.state_dict()
    weights = {key: value for key, value in weights.items() if key not in _own(job.worker.weights.layout)}
    if folder is not None:
        write_tensors(folder / "model.safetensors", weights)
    return Result(records, weights, folder)


def run_key(job: Job) -> str:
    """What a checkpoint must agree with: the configuration, who holds what, the layout of the weights."""
    return f"{job.config.key()}-{job.partition.hash}-{job.worker.weights.layout.key()}"


def one_round(job: Job, runtime: Runtime, server: Server, accepted: dict[int, int]) -> tuple[Server, dict[str, Any]]:
    """Draws clients, trains them, averages, evaluates. `accepted` is brought up to date.

    Raises TooFewClients when fewer than `min_replies` updates are usable; `server` is still the state to go on from.
    """
    config, number, began = job.config, server.round, time.perf_counter()
    cohort = job.cohort(number)
    options, accountant = config.evaluate, job.accountant
    means = options.local_every > 0 and (number + 1) % options.local_every == 0
    kept = (options.local_clients or cohort) if number + 1 in options.local_rounds else ()
    replies = runtime.run(server, cohort, accepted, measure=cohort if means else kept)
    if config.privacy is not None:
        replies = guarded(replies, server, config.privacy, config.privacy.normal(job.streams, number))
    elif config.robust is not None:
        replies = agreed(replies, config.robust)
    round_ = Incoming(replies, config.local.bn_var, server, means, private=config.privacy is not None)
    after = server
    if round_.wait():
        lab = job.lab(number)
        with isolated(lab.streams("layers")):  # a method may train on the server
            after = job.method.aggregate(replace(server, lab=lab, samples=job.total), round_)
        after = _apart(after, job.worker.weights)
    round_.drain()
    _enough(config, number, len(cohort), round_)
    if set(after.shared) != set(server.shared):
        raise UndeclaredField(
            f"aggregate shares {sorted(after.shared)}; `server_state` declares {sorted(server.shared)}"
        )
    if not (finite(after.params) and finite(after.buffers)):
        raise RunError(f"round {number + 1}: the averaged model is not finite")
    if after.buffers is server.buffers:  # a method that trains at the server, or averages other models, has its own
        after = replace(after, buffers=round_.buffers())
    counters = {name: torch.maximum(value, after.counters[name]) for name, value in round_.counters.items()}
    beside = {name: replace(after, params=params, counters=counters) for name, params in after.beside.items()}
    own = {f"method/{name}": value for name, value in after.metrics.items()}
    after = replace(after, counters=counters, round=number + 1, metrics={}, beside={})
    if job.worker.keeps:
        accepted |= dict.fromkeys(round_.done, number)
    trained = time.perf_counter()
    metrics: dict[str, float] = {}
    due = (number + 1) % config.evaluate.every == 0 or number + 1 == config.rounds
    if due and job.has_global:
        metrics = job.evaluate(after)
    for name, other in beside.items() if due and job.has_global else ():
        found = job.evaluate(other)
        own |= {f"method/{name}/{key}": found[f"global/{key}"] for key in ("accuracy", "loss")}
    record = {
        "round": number + 1,
        **_writable(metrics),
        **round_.record(),
        **_writable(own),
        **({"local/classes": round_.by_class(job.data.classes, kept)} if kept and accountant is None else {}),
        **(_writable(accountant.release(number)) if accountant is not None else {}),
        "seconds/train": round(trained - began, 4),
        "seconds/evaluate": round(time.perf_counter() - trained, 4),
    }
    return after, record


def _apart(server: Server, weights: Weights) -> Server:
    """The same, sharing no memory with the network that the server lent to `aggregate` and clients train."""
    return replace(
        server,
        params=weights.apart(server.params),
        buffers=weights.apart(server.buffers),
        shared=weights.all_apart(server.shared),
        private=weights.all_apart(server.private),
        beside=weights.all_apart(server.beside),
    )


class Incoming:
    """The updates of a round as they arrive, in the order of the clients' ids; replies without usable update are noted
    and passed over. BatchNorm statistics are averaged on the way, with the weights of the updates."""

    def __init__(
        self, replies: Iterator[Reply], bn_var: str, server: Server, means: bool = False, private: bool = False
    ) -> None:
        """means: whether the record has the means of what clients measured; private: nothing of it is in there."""
        self._replies, self._server, self._means, self._private = replies, server, means, private
        self._first: Reply | None = None
        self._statistics = Statistics(server.layout, bn_var)
        self._losses: list[float] = []
        self._metrics: dict[int, dict[str, float]] = {}
        self.counters = dict(server.counters)
        self.done: list[int] = []
        self.failed: list[dict[str, Any]] = []
        self.up = self.down = self.steps = 0
        self.weight = 0.0

    def wait(self) -> bool:
        """Whether there is any usable update (the first one is then at hand)."""
        self._first = self._next()
        return self._first is not None

    def __iter__(self) -> Iterator[Update]:
        reply, self._first = self._first or self._next(), None
        while reply is not None:
            assert reply.update is not None
            self._take(reply, reply.update)
            yield replace(reply.update, client=reply.client, buffers=reply.buffers, keep={}, metrics={})
            reply = self._next()
        if self.done and not self.weight:  # before any method divides by it; a federation tries the round again
            number = self._server.round + 1
            error = TooFewClients(f"round {number}: the weights of all usable updates are zero")
            error.record = {"round": number, **self.record()}
            raise error

    def drain(self) -> None:
        """Takes what a method that does not look at all updates has left."""
        for _ in self:
            pass

    def buffers(self) -> Tensor:
        """[B] the averaged statistics (the pooled variance on demand); the server's own when no client sent any."""
        average = self._statistics.average()
        return self._server.buffers if average is None else average

    def loss(self) -> float | None:
        """Mean training loss of the usable clients' last epochs."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def metrics(self) -> dict[str, float | None]:
        """Means over clients of what they measured, and of the method's own numbers over those that have them."""
        found: dict[str, list[float]] = {}
        for metrics in self._metrics.values():
            for name, value in metrics.items():
                if self._means or name.startswith("method/"):
                    found.setdefault(name, []).append(value)
        return _writable({name: sum(values) / len(values) for name, values in found.items()})

    def by_class(self, classes: Sequence[str], clients: Collection[int]) -> list[dict[str, Any]]:
        """Accuracy of each class before and after training, of each of `clients` with a usable update; None for a class
        without test images."""
        return [
            {
                "client": client,
                **{when: [found.get(f"local_{when}/class/{name}") for name in classes] for when in ("before", "after")},
            }
            for client, found in self._metrics.items()
            if client in clients
        ]

    def record(self) -> dict[str, Any]:
        """What the round's record says about its clients."""
        measured = {**self.metrics(), "train/loss": self.loss(), "train/steps": self.steps}
        return {
            **({} if self._private else measured),
            "bytes/up": self.up,
            "bytes/down": self.down,
            "clients": self.done,
            "failed": self.failed,
        }

    def _next(self) -> Reply | None:
        for reply in self._replies:
            self.down += reply.bytes_down
            if reply.update is not None:
                return reply
            note = {"client": reply.client, "reason": reply.failure}
            self.failed.append(note | ({"trace": reply.trace} if reply.trace else {}))
        return None

    def _take(self, reply: Reply, update: Update) -> None:
        assert reply.buffers is not None
        self._statistics.add(reply.buffers, update.weight)
        for name, value in reply.counters.items():
            value = value.to(self.counters[name].device)
            self.counters[name] = torch.maximum(self.counters[name], value)
        self.done.append(reply.client)
        self.weight += update.weight
        self.up += reply.bytes_up
        self.steps += reply.steps
        if reply.steps:
            self._losses.append(reply.loss)
        if reply.metrics:
            self._metrics[reply.client] = dict(reply.metrics)


def _writable(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers that JSON has words for: None for a loss that overflowed."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _enough(config: Config, number: int, asked: int, incoming: Incoming) -> None:
    reasons = "; ".join(f"client {entry['client']}: {entry['reason']}" for entry in incoming.failed)
    error: RunError | None = None
    if incoming.failed and config.on_failure == "stop":
        error = RunError(f"round {number + 1}: {reasons} (on_failure = 'stop')")
    elif len(incoming.done) < config.enough(asked):
        told = f"round {number + 1}: {len(incoming.done)} usable updates, min_replies = {config.min_replies}"
        error = TooFewClients(": ".join(filter(None, [told, reasons])))
    if error is None:
        return
    error.record = {"round": number + 1, **incoming.record()}
    for entry in incoming.failed:
        if "trace" in entry:
            error.add_note(f"client {entry['client']}: {entry['trace']}")
            break  # the others are most often the same; they stand in failure.json
    raise error


@contextmanager
def _noted(folder: Path | None) -> Iterator[None]:
    """A round that fails leaves failure.json: the error and, with every client's traceback, what would have been the
    round's record. It goes when a round succeeds."""
    if folder is None:
        yield
        return
    note = folder / "failure.json"
    try:
        yield
    except RunError as error:
        with suppress(StorageError):  # what failed is the round
            write_json(note, {"error": str(error), **(error.record or {})})
        raise
    note.unlink(missing_ok=True)


@contextmanager
def _told(listener: Listener, label: str, rounds: int, done: int) -> Iterator[None]:
    """A run whose begin and end the listener is told of."""
    try:
        listener.started(label, rounds, done)
        yield
    finally:
        listener.ended()


def describe(job: Job, folder: Path, label: str, engine: Engine, resume: bool = False) -> None:
    """Writes manifest.json, partition.json and balanced.json. engine: what runs the clients, as `auto` chose it.

    resume: the manifest keeps the time when the run began and adds this one to those when it was resumed.
    """
    config = job.config
    earlier, now = _manifest(folder) if resume else {}, datetime.now(UTC).isoformat(timespec="seconds")
    before = begun_with(folder) if resume else {}
    manifest = {
        "label": label,
        "runtime": _runtime(engine),
        "algorithm": registry.name_of("algorithms", type(config.algorithm)),
        "seed": config.seed,
        "classes": list(job.data.classes),
        "data": {
            "name": job.data.name,
            "fingerprint": job.fingerprint,
            "shape": list(job.data.shape),
            "mean": list(job.data.mean),
            "std": list(job.data.std),
        },
        "partition": job.partition.hash,
        "generator": None,
        "profiles": job.profiles,
        "config": config.key(),
        "versions": _versions(),
        "commit": commit(),
        "hardware": {
            "device": str(job.device),
            "machine": platform.machine(),
            "processor": processor(),
            "gpu": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None,
            "threads": config.threads,
        },
        "started": earlier.get("started", now),
        "resumed": [*earlier.get("resumed", []), now] if earlier else [],
    }
    if job.generates:
        used = job.untuned()
        for key, each in used.items():
            if before.get(key, each["fingerprint"]) != each["fingerprint"]:
                job.warn(f"{key} is not the one this run began with: its images are made anew, and numbers will differ")
        manifest["generator"] = used.pop("generator", None)
        if used:
            manifest["generators"] = used
    write_json(folder / "manifest.json", manifest)
    if bool(job.partition.counts.any()):  # what sites hold is theirs to know
        job.partition.save(folder / "partition.json")
        parts = ", ".join(f'"{name}": {listed(rows)}' for name, rows in vars(job.plan).items())
        write(folder / "balanced.json", f"{{{parts}}}\n".encode())


def begun_with(folder: Path) -> dict[str, str]:
    """Fingerprints of the data and of the generators that a run began with, by section: "data", "generator",
    "unconstrained", ...; {} where its manifest cannot be read."""
    then = _manifest(folder)
    try:
        sections = {"data": then["data"], "generator": then["generator"], **then.get("generators", {})}
        return {key: str(each["fingerprint"]) for key, each in sections.items() if each}
    except (KeyError, TypeError):
        return {}


@cache
def _versions() -> dict[str, str]:
    """Of what numbers and images depend on, as far as it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in NEEDED + EXTRAS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _note_spent(job: Job, folder: Path | None, earlier: Mapping[str, Any]) -> None:
    """Writes generators.json: what making images took, by the section of the generator, `earlier` processes added."""
    if folder is None or not job.images.spent:
        return
    whose = "tensors on the GPU while images were made" if job.device.type == "cuda" else "the process since its start"
    now = {key: each.after(earlier.get(key, {})).as_json() for key, each in job.images.spent.items()}
    noted = {key: {**each, "peak_memory_of": whose} for key, each in now.items()}
    with suppress(StorageError):  # no reason to end a run; a full disk is noticed elsewhere
        write_json(folder / "generators.json", {**earlier, **noted})


def name(config: Config) -> str:
    """What a run is called in tables: the method, what balances it, the share of unconstrained clients."""
    label = registry.name_of("algorithms", type(config.algorithm))
    if config.balance is not None:
        label += " + " + registry.name_of("algorithms", type(config.balance))
    share = config.profiles.unconstrained
    return f"{label}({share:.0%})" if share else label


@cache
def commit() -> str | None:
    """The git commit that fedkeel itself runs from, None where it is installed or git is missing."""
    here = Path(__file__)

    def git(*words: str) -> str:
        asked = ["git", "-C", str(here.parent), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # it may lie in a repository of something else
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def processor() -> str:
    """What the processor calls itself; "" where that is not known."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _runtime(engine: Engine) -> str:
    """The name of a runtime; of one that is not registered, the name of its class."""
    names = {registry.get("runtimes", known): known for known in registry.names("runtimes")}
    return names.get(type(engine), type(engine).__name__)


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run that has begun, {} where it cannot be read."""
    return _table(folder / "manifest.json")


def _table(path: Path) -> dict[str, Any]:
    """A JSON object, {} where it cannot be read."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _own(layout: Layout) -> set[str]:
    """Names that stay on clients, which the global model does not have."""
    return {*layout.own_counters, *(entry.name for entry in layout.entries if entry.own)}


def _trackers(config: Config, folder: Path, listener: Listener | None) -> Listener:
    listeners: list[Listener] = [listener or OnlyWarns()]
    if config.mlflow:  # first: it may refuse, and then nothing is written
        listeners.append(MLflow(config, folder, listeners[0].warned))
    if config.tensorboard:
        listeners.append(TensorBoard(folder))
    return Several(*listeners)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two processes must not write one run.

    A run that is refused before it began leaves no folder behind, unless something else is in it.
    """
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    with locked(folder, CheckpointError(f"{folder} is being written by another process")):
        try:
            yield
        except Exception:
            if not (folder / "config.toml").exists():
                _clear(folder, made)
            raise


def _clear(folder: Path, made: Sequence[Path]) -> None:
    """Removes the lock, an empty log and, while they are empty, the folders in `made`."""
    with suppress(OSError):
        log = folder / "rounds.jsonl"
        if log.exists() and log.stat().st_size == 0:
            log.unlink()
        (folder / ".lock").unlink()
        for place in made:
            place.rmdir()
