"""All clients in this process, one after another, on one network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkeel import personal
from fedkeel.records import Reply, Server
from fedkeel.registry import register
from fedkeel.runtimes.base import Curve, Progress, Tuning

if TYPE_CHECKING:
    from fedkeel.job import Job


@register("runtimes", "inprocess")
@dataclass(frozen=True, kw_only=True)
class InProcess:
    """One process, one client at a time: the reference that the other runtimes are held against."""

    remote: ClassVar[bool] = False

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
            yield self.kept(server, reply)

    def kept(self, server: Server, reply: Reply) -> Reply:
        """`reply`, whose state is in the store until the server accepts it."""
        if not reply.failure and self.job.worker.keeps:
            self.job.store.put(reply.client, server.round, reply.state)
        return reply

    def prepare(self, generating: Progress, tuning: Tuning) -> int:
        return self.job.generate(generating, tuning)

    def personal(self, server: Server, accepted: Mapping[int, int]) -> list[Curve]:
        return personal.curves(self.job, server, accepted)

    def close(self) -> None:
        """Nothing is held."""
