"""A partition on record: who holds what, how it was made, and a hash that says whether it is still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from fedkeel import options, registry
from fedkeel.data.dataset import Dataset
from fedkeel.errors import EmptyClient, PartitionError
from fedkeel.files import write
from fedkeel.partition.base import Partitioner, Rows
from fedkeel.rng import Streams

FORMAT = 1


@dataclass(frozen=True)
class Partition:
    """What each client holds of the train split, and where that comes from.

    name, options: the partitioner. seed: of the run. data: the data set's fingerprint. clients: ascending indices,
    [n_k] int64 each. counts: [K, C] int64 samples per client and class.
    """

    name: str
    options: Mapping[str, object]
    seed: int
    data: str
    clients: Sequence[Tensor]
    counts: Tensor

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all of the above."""
        digest = hashlib.sha256(_dumps([FORMAT, self.name, dict(self.options), self.seed, self.data]).encode())
        for part in chain(self.clients, (self.counts,)):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def held(self, total: int) -> Tensor:
        """The rows, of `total`, that any client holds; ascending."""
        mine = torch.zeros(total, dtype=torch.bool)
        for rows in self.clients:
            mine[rows] = True
        return mine.nonzero()[:, 0]

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all. Raises StorageError; what was there is kept then."""
        table = {
            "format": FORMAT,
            "name": self.name,
            "options": dict(self.options),
            "seed": self.seed,
            "data": self.data,
            "hash": self.hash,
        }
        rows = f'{{"clients":{listed(self.clients)},"counts":{listed(self.counts)},'
        write(path, f"{rows}{_dumps(table)[1:]}\n".encode())

    def verify(self, partitioner: Partitioner, dataset: Dataset, clients: int, streams: Streams) -> None:
        """Raises PartitionError, naming what differs, unless these arguments would `make` this partition."""
        name, chosen = _named(partitioner)
        differences = [
            f"{what} is {now!r}, in the manifest {then!r}"
            for what, now, then in (
                ("partition.name", name, self.name),
                *((f"partition.{key}", chosen.get(key), self.options.get(key)) for key in {**chosen, **self.options}),
                ("seed", streams.seed, self.seed),
                ("clients", clients, len(self.clients)),
                ("data fingerprint", dataset.fingerprint[:12], self.data[:12]),
            )
            if now != then
        ]
        if differences:
            raise PartitionError(f"the partition does not fit this run: {'; '.join(differences)}")


def make(partitioner: Partitioner, dataset: Dataset, clients: int, streams: Streams) -> Partition:
    """Splits the train images among `clients` with the stream "partition". Raises PartitionError."""
    classes = len(dataset.classes)
    parts = partitioner.split(dataset.train_y, clients, classes, streams.numpy("partition"))
    name, chosen = _named(partitioner)
    _check(parts, clients, len(dataset.train_y), f"partition {name!r}")
    parts = parts if isinstance(parts, Rows) else Rows.of(parts)
    counts = counted(parts, dataset.train_y, classes)
    return Partition(name, chosen, streams.seed, dataset.fingerprint, parts, counts)


def _check(parts: Sequence[Tensor], clients: int, total: int, where: str) -> None:
    """Raises PartitionError, naming the client, for what a partitioner from elsewhere may have let through."""
    if len(parts) != clients:
        raise PartitionError(f"{where}: made for {len(parts)} clients, there are {clients}")
    own = isinstance(parts, Rows)  # made by a partitioner of the package: only an empty client is possible
    for k, rows in enumerate(parts):
        if own and len(rows):
            continue
        if not isinstance(rows, Tensor) or rows.dim() != 1:
            raise PartitionError(f"{where}: client {k} must have its row numbers in a tensor of shape [n]")
        if len(rows) == 0:
            raise EmptyClient(f"{where}: client {k} has no samples")
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise PartitionError(f"{where}: client {k} has row numbers of {rows.dtype}, must be whole numbers")
        if not bool((rows[1:] > rows[:-1]).all()):
            raise PartitionError(f"{where}: the row numbers of client {k} must ascend, each of them once")
        if int(rows[0]) < 0 or int(rows[-1]) >= total:
            raise PartitionError(f"{where}: client {k} has rows {int(rows[0])} to {int(rows[-1])}, there are {total}")


def counted(clients: Sequence[Tensor], labels: Tensor, classes: int) -> Tensor:
    """[K, C] int64 samples per client and class."""
    counts = torch.zeros(len(clients), classes, dtype=torch.int64)
    for k, rows in enumerate(clients):
        counts[k] = labels[rows].bincount(minlength=classes)
    return counts


def load(path: Path) -> Partition:
    """Reads what `save` wrote. Raises PartitionError for a file that is missing, damaged or changed."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise PartitionError(f"{path}: format {table['format']}, this version of fedkeel reads {FORMAT}")
        clients = Rows.of([torch.tensor(rows, dtype=torch.int64) for rows in table["clients"]])
        counts = torch.tensor(table["counts"], dtype=torch.int64)
        found = Partition(table["name"], table["options"], table["seed"], table["data"], clients, counts)
        written = table["hash"]
    except OSError as error:
        raise PartitionError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PartitionError(f"{path}: not a partition's manifest ({type(error).__name__}: {error})") from error
    if found.hash != written:
        raise PartitionError(f"{path}: its contents have hash {found.hash[:12]}, it was saved with {written[:12]}")
    return found


def listed(rows: Iterable[Tensor]) -> str:
    """JSON of rows of whole numbers, one after another: all of them as Python's numbers take ten times the memory."""
    return f"[{','.join(_dumps(row.tolist()) for row in rows)}]"


def _named(partitioner: Partitioner) -> tuple[str, dict[str, object]]:
    return registry.name_of("partitions", type(partitioner)), options.plain(partitioner)


def _dumps(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
