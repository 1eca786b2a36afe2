"""FedAvg, and with it the contract that every method fulfils.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from Decentralized
Data. AISTATS 2017, arXiv 1602.05629.

Departure: early versions of the paper divide by the samples of all clients; like the corrected text we divide by those
of the participants (`denominator = "all"` is the former).

What crosses: the model down, its change and the number of samples up. Nothing stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkeel.errors import ConfigError
from fedkeel.models.split import Split
from fedkeel.options import option, options
from fedkeel.records import Batch, Local, Phase, Plan, Samples, Server, Update
from fedkeel.registry import register
from fedkeel.weights import mean_and_total

if TYPE_CHECKING:
    from fedkeel.local import Training


@register("algorithms", "fedavg")
@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """FedAvg (Algorithm 1). A method overrides the hooks in which it differs; its fields are its options.

    Methods read `self` and their arguments and return; they store nothing. Weights, gradients and control variates are
    flat vectors of the parameters that clients share, [P].
    """

    paper: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629"
    kind: ClassVar[Literal["global", "personal"]] = "global"
    pooled: ClassVar[bool] = False
    """Whether all data are brought to one place: not a federated method, but a bound for them."""
    tunes: ClassVar[bool] = False
    """Whether a personal model is the final one tuned on the client's samples (section [personal])."""
    has_global: ClassVar[bool] = True
    """Whether the server's weights are a model by themselves; without one, `global/...` metrics are left out."""
    sums: ClassVar[bool] = True
    """Whether `aggregate` looks at weighted sums of updates only (and at what it makes of them), never at single ones.
    [privacy] and [robust] take no other methods. A subclass with an `aggregate` of its own has to say so itself."""
    generates: ClassVar[bool] = False
    """Whether the server trains on synthetic images, which no client's `plan` shows."""
    trial: ClassVar[Mapping[str, object]] = {}
    """Options under which a round takes no time, for measuring what crosses."""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Named settings of the options, chosen by `preset = "..."` in the configuration."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Options of every method that make no difference to this one: `fedkeel show` leaves them out."""

    weights: Literal["samples", "uniform", "trained"] = option(
        "samples",
        "weight of a client in the average: its real samples, the same for all, or the samples it trained on",
    )
    denominator: Literal["participants", "all"] = option(
        "participants",
        "average over the participants, or over all clients with the absent ones unchanged; BatchNorm statistics are "
        "the participants' own mean in either case",
    )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "aggregate" in vars(cls) and "sums" not in vars(cls):
            cls.sums = False

    def __post_init__(self) -> None:
        if self.weights == "trained" and self.denominator == "all":
            raise ConfigError("denominator", "all", "the server does not know how many samples absent clients train on")

    def sends(self) -> tuple[str, ...]:
        """Names of what `upload` puts into `extra`: the runtime refuses any other."""
        return ()

    # once -------------------------------------------------------------------------------------------------------------

    def build(self, model: Split) -> Split:
        """The network this method trains, from the one the configuration asks for."""
        return model

    def personal(self, name: str, module: nn.Module) -> bool:
        """Whether the parameter or buffer `name`, owned by `module`, never leaves the client."""
        return False

    def server_state(self, params: Tensor) -> dict[str, Tensor]:
        """What is sent to every client beside the model, as it is before the first round."""
        return {}

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        """What stays on a client between rounds, as it is before its first one."""
        return {}

    def cohort(self, drawn: list[int], clients: int, number: int) -> list[int]:
        """The clients of round `number` (from 0), from those drawn for it."""
        return drawn

    def mail(self, server: Server, client: int) -> Mapping[str, Tensor]:
        """What the server sends to this client alone, beside what all get; `params` ([P]) stands in for the model."""
        return {}

    # on a client ------------------------------------------------------------------------------------------------------

    def start(self, local: Local) -> None:
        """Where the round's training starts: may overwrite `local.params`, which are as received."""

    def training(self, training: Training, cohort: int) -> Training:
        """How clients train, from the section [local] and the number of clients in a round."""
        return training

    def prepare(self, local: Local) -> Samples:
        """The samples of this round."""
        return local.data

    def phases(self, local: Local, training: Training) -> Sequence[Phase]:
        """The parts of the round's training, one after another, each with a fresh optimiser."""
        return (Phase(training.epochs, training.steps),)

    def loss(self, local: Local, batch: Batch) -> Tensor:
        """The scalar to descend."""
        return cross_entropy(local.model(batch.x), batch.y)

    def correct(self, local: Local, grad: Tensor) -> Tensor:
        """The gradient to step with, [P], between backward and step. May be changed in place and returned."""
        return grad

    def upload(self, local: Local) -> Update:
        """What crosses to the server (`weight`, `delta`, `extra`) and what stays (`keep`)."""
        return Update(self.weight(local), local.params - local.anchor)

    def weight(self, local: Local) -> float:
        """This client's weight in the average, by the option `weights`."""
        return {"uniform": 1.0, "samples": float(len(local.data)), "trained": float(len(local.samples))}[self.weights]

    def personalise(self, local: Local) -> None:
        """Makes `local.model`, which holds the server's weights and what the client keeps, the client's own model."""

    def tuning(self) -> Algorithm:
        """The method whose loss personal models are tuned by, without anything of a round: cross-entropy's."""
        return Algorithm()

    # on the server ----------------------------------------------------------------------------------------------------

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        """The next state of the server.

        `updates` come once, in the order of the clients' ids, and as they are trained: what clients are still to be
        sent (`mail`, the shelf) must stay as it is until the last of them is taken.
        """
        (step,), total = mean_and_total((update.weight, (update.delta,)) for update in updates)
        if self.denominator == "all":
            step = step * self.part_of_all(server, total)
        return replace(server, params=server.params + step)

    @property
    def looks_inside(self) -> bool:
        """Whether the loss is more than cross-entropy of what the network says."""
        return type(self).loss is not Algorithm.loss

    def only_sums(self) -> bool:
        """`sums`, of this method and of what it works over. Raises ConfigError for an option that is against it."""
        return self.sums

    def part_of_all(self, server: Server, total: float) -> float:
        """Part of all clients' weights that updates of weight `total` stand for: |S| / N, or sum n_k / n by size."""
        return total / (server.samples if self.weights == "samples" else server.clients)

    # for reports and for filling the pool ahead of a run, in simulation only -----------------------------------------

    def plan(self, counts: Tensor, profile: str) -> Plan:
        """How many real and synthetic samples of each class a client with `counts` ([C]) trains on."""
        return Plan(real=counts, fake=counts.new_zeros(counts.shape))

    def falls_back(self, counts: Tensor, profile: str) -> bool:
        """Whether a client with `counts` ([C]) has too few samples for the method and trains like FedAvg's instead: a
        run warns of it."""
        return False

    def tunes_generator(self, counts: Tensor, profile: str) -> bool:
        """Whether a client with `counts` ([C]) first tunes its generator on its own samples; what it learns stays."""
        return False

    def off(self, rounds: int | None = None) -> Mapping[str, object]:
        """Options whose present value switches the method off, in a run of so many rounds; a run warns about them."""
        meanings = {item.name: item.meaning for item in options(type(self)) if item.meaning.off is not None}
        return {name: getattr(self, name) for name, m in meanings.items() if getattr(self, name) == m.off}

    def idle(self, model: Split, classes: int) -> str:
        """Why the method can do nothing with this network (from `build`) and so many classes, "" where it can; a run
        warns about it."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Over(Algorithm):
    """A method that works over another one: every hook it does not override is the other's."""

    sums: ClassVar[bool] = True  # see `only_sums`

    base: Algorithm = field(default_factory=Algorithm, metadata={"hidden": True})

    @property
    def inner(self) -> Algorithm:
        """The method underneath, with this one's weights."""
        return replace(self.base, weights=self.weights, denominator=self.denominator)

    def sends(self) -> tuple[str, ...]:
        return self.base.sends()

    def build(self, model: Split) -> Split:
        return self.base.build(model)

    def personal(self, name: str, module: nn.Module) -> bool:
        return self.base.personal(name, module)

    def server_state(self, params: Tensor) -> dict[str, Tensor]:
        return self.base.server_state(params)

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        return self.base.client_state(params)

    def cohort(self, drawn: list[int], clients: int, number: int) -> list[int]:
        return self.base.cohort(drawn, clients, number)

    def mail(self, server: Server, client: int) -> Mapping[str, Tensor]:
        return self.base.mail(server, client)

    def training(self, training: Training, cohort: int) -> Training:
        return self.base.training(training, cohort)

    def start(self, local: Local) -> None:
        self.base.start(local)

    def prepare(self, local: Local) -> Samples:
        return self.base.prepare(local)

    def phases(self, local: Local, training: Training) -> Sequence[Phase]:
        return self.base.phases(local, training)

    def loss(self, local: Local, batch: Batch) -> Tensor:
        return self.base.loss(local, batch)

    def correct(self, local: Local, grad: Tensor) -> Tensor:
        return self.base.correct(local, grad)

    def upload(self, local: Local) -> Update:
        return self.inner.upload(local)

    def personalise(self, local: Local) -> None:
        self.base.personalise(local)

    def tuning(self) -> Algorithm:
        return self.base.tuning()

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        return self.inner.aggregate(server, updates)

    def only_sums(self) -> bool:
        return self.sums and self.base.only_sums()
