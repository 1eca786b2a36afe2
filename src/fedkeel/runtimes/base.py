"""What a runtime is: it takes a round's clients and gives their replies, in the order of the clients' ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from fedkeel.records import Reply, Server


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

    def close(self) -> None:
        """Ends processes and frees what was held."""
        ...
