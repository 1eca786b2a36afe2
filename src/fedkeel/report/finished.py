"""A run that is done, put together again from its folder: its data, clients, network and images, and the server as it
was after the last round.

What is measured with it changes nothing in the folder but the pool of images, where images that a picture needs and
that no client has asked for yet are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedkeel.checkpoint import Checkpoints
from fedkeel.config import read
from fedkeel.data.dataset import Dataset
from fedkeel.errors import CheckpointError, ConfigError, DataError
from fedkeel.job import Job
from fedkeel.loop import run_key
from fedkeel.models.split import Split
from fedkeel.records import Server


@dataclass(frozen=True)
class Finished:
    """accepted: the last round that the server accepted from each client. label: the method's name in pictures."""

    folder: Path
    label: str
    job: Job
    server: Server
    accepted: Mapping[int, int]

    @property
    def title(self) -> str:
        """Method and run."""
        return self.label if self.folder.name == self.label else f"{self.label} ({self.folder.name})"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.job.data.classes)

    def held(self, client: int) -> Tensor:
        """[C] int64: the client's real samples of each class. Raises ConfigError for a client that there is not."""
        if not 0 <= client < self.job.clients:
            last = self.job.clients - 1
            raise ConfigError("client", client, f"{self.folder}: clients are numbered 0 to {last}")
        return self.job.counts[client]

    def update(self, client: int, measure: Callable[[Split], None]) -> None:
        """The local update with which the client would answer the final model; it is thrown away.

        measure: called with the network before and after. Raises DataError when there is no usable update.
        """
        self.held(client)

        def measured(model: Split) -> Mapping[str, float]:
            measure(model)
            return {}

        state = self.job.store.open(client, self.accepted.get(client))
        reply = self.job.worker.fit(self.server, client, state, measured, self.job.mail(self.server, client))
        if reply.failure:
            raise DataError(f"{self.folder}: client {client} has no usable update: {reply.failure}")

    def model(self, client: int) -> Split:
        """The final global network, or the client's own where the method has no global one."""
        job = self.job
        if job.has_global:
            job.worker.load(self.server)
        else:
            state, mail = job.store.open(client, self.accepted.get(client)), job.mail(self.server, client)
            job.method.personalise(job.worker.open(self.server, client, state, mail))
        return job.worker.model


def open_run(folder: Path | str, label: str = "", data: Dataset | None = None, device: str | None = None) -> Finished:
    """The run in `folder`. data: stands in for [data], as in `loop.run`; device: another one than the run's.

    Raises CheckpointError when there is no run, when it is not done, or when its checkpoint is gone.
    """
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder} holds no run (no config.toml)")
    config = read(folder / "config.toml", [] if device is None else [f'device="{device}"'])
    log = folder / "rounds.jsonl"
    done = log.read_bytes().count(b"\n") if log.is_file() else 0
    if done < config.rounds or not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder}: the run is not done ({done} of {config.rounds} rounds); fedkeel resume {folder} goes on with it"
        )
    torch.set_num_threads(config.threads)
    job = Job(config, data, folder)
    first = job.first_server()
    found = Checkpoints(folder, run_key(job), job.store, job.shelf).load(first)
    if found is None:
        raise CheckpointError(f"{folder}: its checkpoint is gone, which these pictures need")
    if found.server.round < config.rounds:
        raise CheckpointError(f"{folder}: its last whole checkpoint is of round {found.server.round}; resume it first")
    return Finished(folder, label or folder.name, job, found.server, found.accepted)
