"""What a runtime is: it takes a round's clients and gives their replies, in the order of the clients' ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from fedkeel.records import Reply, Server

if TYPE_CHECKING:
    from fedkeel.job import Job

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""
Tuning = Callable[[int, int, int], None]
"""Called with a client, and the same of what it does."""
Curve = tuple[Sequence[float], int]
"""Accuracies of a client's own model, the present one last, and on how many test images; none without any."""


class Engine(Protocol):
    """The options of a runtime: a registered frozen dataclass (room "runtimes")."""

    remote: ClassVar[bool]
    """Whether what clients keep lies on other machines: checkpoints then have no copy of it."""

    def start(self, job: Job) -> Runtime:
        """A runtime for this job."""
        ...


@runtime_checkable
class Choosing(Protocol):
    """An engine that runs nothing itself but chooses another, as `auto` does.

    The round loop calls `choose` once, before `start`, and starts what it gave instead; the registered name of that
    is "runtime" in the run's manifest.json, and `before` when the run is resumed.
    """

    def choose(self, job: Job, before: str) -> Engine:
        """The engine for this job, whose processes are not started yet.

        before: the name of the one that the run had when it was stopped, to be kept where it can still run here (and is
        one that this engine may choose), without a new trial: numbers then go on as they began; "" for a new run, and
        for one whose manifest does not say.
        """
        ...


class Runtime(Protocol):
    """Runs clients. Made once for a run with its Job; the same methods, the same numbers on every runtime."""

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        """One reply for each of `clients` (ascending ids), in that order.

        accepted: the last round the server accepted from each client that it has accepted anything from. measure:
        those of the clients that report accuracies before and after training.
        """
        ...

    def prepare(self, generating: Progress, tuning: Tuning) -> int:
        """Before the first round: clients tune their generators and make the images they need. How many images were
        made, or found, on this machine."""
        ...

    def personal(self, server: Server, accepted: Mapping[int, int]) -> list[Curve]:
        """How each client's own model does on its test images (see `personal.curve_of`)."""
        ...

    def close(self) -> None:
        """Ends processes and frees what was held."""
        ...
