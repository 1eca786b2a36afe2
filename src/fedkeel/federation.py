"""How a run over many machines goes: the sections [federation] (runtime "flower") and [ray] (runtime "ray")."""

from __future__ import annotations

from dataclasses import dataclass

from fedkeel.errors import ConfigError
from fedkeel.options import option

FINEST = 0.0001
"""The smallest part of a CPU or GPU that Ray can give."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who the machines are, and how long the server waits for them."""

    sites: tuple[str, ...] = option(
        (), "the clients' names, in the order of their numbers; empty = they are known by number, from 0"
    )
    deadline: float = option(3600.0, "seconds until a round closes without the clients that have not replied", gt=0)
    generation_deadline: float = option(
        86400.0, "seconds that clients may take to tune generators and make images, before the first round", gt=0
    )
    join_wait: float = option(
        300.0, "seconds to wait for all clients before the first round; then min_replies of them suffice", ge=0
    )
    load_deadline: float = option(
        3600.0, "seconds that a client may take to load its data and say who it is; then it is asked again", gt=0
    )
    max_reply: float | None = option(
        None, "largest reply of a client in MiB; absent: 16 times the model and 64 MiB beside it", gt=0
    )

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.sites if self.sites.count(name) > 1})
        if twice:
            raise ConfigError("sites", twice, "these names stand there twice")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where clients run under Ray, and on what."""

    address: str = option("", 'a running cluster ("auto", "ray://host:10001", ...); empty = Ray starts on this machine')
    actors: int | None = option(None, "worker processes; absent: as many as the cluster has room for", ge=1)
    cpus: float = option(1.0, "CPUs of a worker process", ge=FINEST)
    gpus: float = option(0.0, "GPUs of a worker process, also a fraction of one", ge=0)

    def __post_init__(self) -> None:
        if 0 < self.gpus < FINEST:
            raise ConfigError("gpus", self.gpus, f"must be 0 or >= {FINEST:g}")
