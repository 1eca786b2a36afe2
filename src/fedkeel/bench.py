"""What methods use that train at the server, on the network of its Lab."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from fedkeel.local import Training
from fedkeel.records import Local, Samples, Server, Update
from fedkeel.weights import Statistics


def with_statistics(
    aggregate: Callable[[Server, Iterable[Update]], Server], server: Server, updates: Iterable[Update]
) -> Server:
    """What `aggregate` makes of the updates, with the average of their BatchNorm statistics by the same weights, for a
    method that goes on from there. (For all others the round loop averages them afterwards.)"""
    assert server.lab is not None
    statistics = Statistics(server.lab.weights.layout, server.lab.bn_var)

    def watched() -> Iterator[Update]:
        for update in updates:
            assert update.buffers is not None
            statistics.add(update.buffers, update.weight)
            yield update

    after, average = aggregate(server, watched()), statistics.average()
    return after if average is None else replace(after, buffers=average)


def at_server(server: Server, samples: Samples, training: Training) -> Local:
    """The server as a client of its own, for `train` on the Lab's network, which must hold what to start from."""
    lab = server.lab
    assert lab is not None
    return Local(
        client=server.clients,
        round=server.round,
        rounds=lab.rounds,
        clients=server.clients,
        classes=lab.classes,
        profile="none",
        model=lab.model,
        layout=lab.weights.layout,
        params=lab.weights.params,
        anchor=server.params,
        buffers=server.buffers,
        shared={},
        mail={},
        mine={},
        data=samples,
        samples=samples,
        lr=training.lr,
        batch_size=training.batch,
        streams=lab.streams,
        transform=lab.transform,
        images=lab.images,
        device=lab.device,
    )
