"""The records that methods read and return: samples and batches, what the server holds, what an update carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedkeel.clients import ClientStore
from fedkeel.models.split import Split
from fedkeel.rng import Streams
from fedkeel.weights import Layout, Weights

if TYPE_CHECKING:
    from fedkeel.algorithms.base import Algorithm


@dataclass(frozen=True)
class Samples:
    """Labelled samples of one client, undecorated: images are uint8, normalised only batch by batch.

    x: [N, C, H, W] uint8. y: [N] int64. fake: [N] bool, true for synthetic ones. index: [N] int64, the position among
    the client's own real samples, -1 for synthetic ones.
    """

    x: Tensor
    y: Tensor
    fake: Tensor
    index: Tensor

    @staticmethod
    def real_ones(x: Tensor, y: Tensor) -> Samples:
        """Samples of a client's own data, in the order given."""
        return Samples(x, y, torch.zeros(len(y), dtype=torch.bool), torch.arange(len(y)))

    @staticmethod
    def fake_ones(x: Tensor, y: Tensor) -> Samples:
        """Synthetic samples."""
        return Samples(x, y, torch.ones(len(y), dtype=torch.bool), torch.full((len(y),), -1))

    def __len__(self) -> int:
        return len(self.y)

    def __add__(self, other: Samples) -> Samples:
        if len(other) == 0:
            return self
        return Samples(
            torch.cat([self.x, other.x]),
            torch.cat([self.y, other.y]),
            torch.cat([self.fake, other.fake]),
            torch.cat([self.index, other.index]),
        )

    def take(self, rows: Tensor) -> Samples:
        """The samples at `rows` ([M] int64, or [N] bool), in that order."""
        return Samples(self.x[rows], self.y[rows], self.fake[rows], self.index[rows])

    @property
    def real(self) -> Samples:
        """The client's own samples among these."""
        return self.take(~self.fake)

    def counts(self, classes: int) -> Tensor:
        """[classes] int64: samples per label."""
        return torch.bincount(self.y, minlength=classes)


@dataclass(frozen=True)
class Batch:
    """One batch as the network sees it.

    x: [B, C, H, W] float32, normalised. y: [B] int64. On the CPU: fake, [B] bool, and index, [B] int64, as in Samples.
    """

    x: Tensor
    y: Tensor
    fake: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Lab:
    """What a server can compute with, for methods that do more than average.

    weights: a network of the run's kind, its tensors free to be overwritten. shape: channels, height, width of an
    image. streams: this round's. images(counts, first): synthetic images of the server's own, counts[c] of each class
    c, from number `first` on. shelf: models kept per client, on disk past a budget.
    """

    weights: Weights
    classes: int
    shape: tuple[int, int, int]
    rounds: int
    streams: Streams
    transform: Prepare
    images: Callable[[Tensor, int], Samples]
    shelf: ClientStore
    device: torch.device
    bn_var: str = "mean"
    """`local.bn_var`, for methods that average BatchNorm statistics themselves."""

    @property
    def model(self) -> Split:
        """The network of `weights`."""
        assert isinstance(self.weights.model, Split)
        return self.weights.model


@dataclass(frozen=True)
class Phase:
    """A part of a client's round. epochs or steps: how long (steps first), max_steps: never longer than this; shared,
    own: which parameters move. Layers all of whose parameters stand still are in evaluation mode, so that their
    statistics stand still too."""

    epochs: int = 1
    steps: int | None = None
    max_steps: int | None = None
    shared: bool = True
    own: bool = True


@dataclass(frozen=True)
class Server:
    """What the server holds between rounds.

    params: [P] the parameters that clients share. buffers: [B] floating-point buffers (BatchNorm statistics).
    counters: integer buffers by name. shared: sent to every client beside the model. private: never leaves the server.
    clients: how many clients are registered. samples: how many real samples they hold together. round: rounds finished.
    """

    params: Tensor
    buffers: Tensor
    clients: int
    samples: int
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    private: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0
    layout: Layout | None = None
    """Names and places of `params`; not part of what is saved."""
    lab: Lab | None = None
    """What the server computes with; never sent, not part of what is saved."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """A method's own numbers about the round just aggregated, recorded as `method/<name>`; never sent nor saved."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """[P] each: other models of that round, whose accuracy and loss are recorded beside the server's, as
    `method/<name>/accuracy` and `method/<name>/loss`; never sent nor saved."""


@dataclass(frozen=True)
class Update:
    """What a client returns. `weight`, `delta` ([P], trained minus received; [0] when no model crosses) and `extra`
    cross to the server; `keep` stays on the client and replaces its state once the server has accepted this update. The
    server knows whose it is (`client`) and has its BatchNorm statistics (`buffers`, [B]): both are filled in by the
    round loop. `metrics`: the method's own numbers about this client; their means over clients are in the round's
    record as `method/<name>`, `aggregate` never sees them."""

    weight: float
    delta: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    client: int = -1
    buffers: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How many samples of each class a client trains on: [C] int64 real ones and [C] int64 synthetic ones; of all
    clients [K, C]."""

    real: Tensor
    fake: Tensor


class Prepare(Protocol):
    """From stored samples to what the network sees: decoded, normalised, augmented where asked."""

    def __call__(
        self, x: Tensor, *, rng: torch.Generator | None, augment: Tensor | None, device: torch.device
    ) -> Tensor: ...


@dataclass
class Local:
    """One client in one round, as the hooks of a method see it.

    client, round (counted from 0), rounds (of the whole run), classes; profile: what the client can compute; clients:
    how many are registered.
    params: [P] live view of the shared parameters; anchor: [P] as received. model: the same weights as a network.
    shared: what the server sent to all beside the model; mail: what it sent to this client alone; mine: what this
    client kept. buffers: [B] BatchNorm statistics as received. data: its own samples; samples: what `prepare` made of
    them. lr: this round's learning rate; steps: optimiser steps done so far; gradient_weight: the sum
    of the weights that the optimiser gave to those steps' gradients, `steps` under plain SGD (FedNova's |a|_1).
    loss: mean training loss of the last epoch.
    """

    client: int
    round: int
    rounds: int
    classes: int
    profile: str
    model: Split
    layout: Layout
    params: Tensor
    anchor: Tensor
    buffers: Tensor
    shared: Mapping[str, Tensor]
    mail: Mapping[str, Tensor]
    mine: Mapping[str, Tensor]
    data: Samples
    samples: Samples
    lr: float
    batch_size: int
    streams: Streams
    transform: Prepare
    images: Callable[[Tensor, int], Samples]
    device: torch.device
    clients: int = 1
    method: Algorithm | None = None
    """Whose loss is descended: the run's method, under `[balance]` the one that balances. None at the server."""
    velocity: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] the optimiser's momentum, where it lasts from round to round; empty at first."""
    steps: int = 0
    gradient_weight: float = 0.0
    loss: float = float("nan")
    real_ratio: float | None = None
    """Share of real samples in a batch, where a method wants the two kinds apart; None: one pool."""
    scratch: dict[str, Tensor] = field(default_factory=dict)
    """For the hooks of one method within one round."""
    _open: dict[tuple[int | str, ...], torch.Generator] = field(default_factory=dict)

    def rng(self, purpose: str, *ids: int | str) -> torch.Generator:
        """The stream of that name for this client and round; asked for again, it goes on where it was."""
        key = (purpose, *ids)
        if key not in self._open:
            self._open[key] = self.streams(purpose, *ids)
        return self._open[key]

    def generate(self, counts: Tensor, first: int = 0) -> Samples:
        """Synthetic samples, counts[c] of each class c ([C] int64), this client's images number `first` and on."""
        return self.images(counts, first)


@dataclass(frozen=True)
class Reply:
    """What comes back from one client's round. `state` is what the client keeps (its `pending`); it never crosses.

    failure: "" or one line saying why there is no usable update; trace: the traceback of an exception.
    metrics: what was measured on the client, by full name. bytes_up, bytes_down: payload of tensors.
    """

    client: int
    update: Update | None = None
    buffers: Tensor | None = None
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float = float("nan")
    steps: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    trace: str = ""
