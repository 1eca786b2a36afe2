"""All clients in this process, one after another, on one network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkeel.records import Reply, Server
from fedkeel.registry import register

if TYPE_CHECKING:
    from fedkeel.job import Job


@register("runtimes", "inprocess")
@dataclass(frozen=True, kw_only=True)
class InProcess:
    """One process, one client at a time: the reference that the other runtimes are held against."""

    def start(self, job: Job) -> InProcessRuntime:
        """A runtime for this job."""
        return InProcessRuntime(job)


class InProcessRuntime:
    """See runtimes/base.py."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        for client in clients:
            state = self.job.store.open(client, accepted.get(client))
            mail = self.job.mail(server, client)
            reply = self.job.worker.fit(server, client, state, self.job.measure if client in measure else None, mail)
            if not reply.failure:
                self.job.store.put(client, server.round, reply.state)
            yield reply

    def close(self) -> None:
        """Nothing is held."""
