"""FGL: clients say which classes they have, the server generates images of these and trains on them.

Zhang, Qi, Zhao: Federated Generative Learning with Foundation Models. 2023, arXiv 2306.16064 (first version).

Round 0: no client trains; all of them, drawn or not, send the classes they own, and the server trains the model on
`volume` synthetic images of each. With `mode = "multi"` the other rounds are FedAvg from there; with "one_shot" nothing
more happens in them.

Departures: prompts are class names (the paper's class level), in the words of the run's generator; captions of single
images are left out, since any generator may be used here. The paper crops at random sizes and flips; here synthetic
images are augmented as [augment] says for real ones. It reports the best epoch on the test images; we the last.

What crosses: the model down; up, in round 0, one byte a class and no model (the privacy cost that FBL points out: the
server learns the label set of each client), afterwards as FedAvg, or nothing in "one_shot". Nothing stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fedkeel.algorithms.base import Algorithm
from fedkeel.bench import at_server, with_statistics
from fedkeel.local import Training, train
from fedkeel.options import option
from fedkeel.records import Local, Phase, Samples, Server, Update
from fedkeel.registry import register


@register("algorithms", "fgl")
@dataclass(frozen=True, kw_only=True)
class FGL(Algorithm):
    """Class-level prompts (section 3.2), one-shot and multi-round training (section 3.4)."""

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.16064"
    generates: ClassVar[bool] = True
    trial: ClassVar[Mapping[str, object]] = {"volume": 1, "epochs": 1}
    sums: ClassVar[bool] = False  # counts who has which class

    mode: Literal["one_shot", "multi"] = option(
        "multi", "the model of round 0 is the result, or what FedAvg starts from in the other rounds"
    )
    volume: int = option(1300, "synthetic images of a class", ge=1, grid=(500, 1300, 2600))
    per: Literal["class", "client"] = option(
        "class", "a class's images are made once, or `volume` for each client that owns it"
    )
    epochs: int = option(120, "the server's passes over the synthetic images in round 0", ge=1, grid=(60, 120))
    lr: float = option(0.01, "learning rate at the server", gt=0, grid=(3e-3, 0.01, 0.03))
    momentum: float = option(0.9, "momentum at the server", ge=0, lt=1)
    weight_decay: float = option(2e-4, "weight decay at the server", ge=0)
    batch: int = option(128, "samples in a batch at the server", ge=1)
    server_epochs: int = option(
        0, "the server's passes over the synthetic images after each later round; the paper also has 5", ge=0
    )
    augment: bool = option(True, "augment the synthetic images as [augment] says for real ones")

    def sends(self) -> tuple[str, ...]:
        return ("owned",)

    def cohort(self, drawn: list[int], clients: int, number: int) -> list[int]:
        return list(range(clients)) if number == 0 else drawn

    # on a client ------------------------------------------------------------------------------------------------------

    def phases(self, local: Local, training: Training) -> Sequence[Phase]:
        return super().phases(local, training) if self.trains(local.round) else ()

    def upload(self, local: Local) -> Update:
        if self.trains(local.round):
            return super().upload(local)
        owned = {"owned": local.data.counts(local.classes) > 0} if local.round == 0 else {}
        return Update(self.weight(local), local.params[:0].clone(), extra=owned)

    def trains(self, number: int) -> bool:
        """Whether clients train in round `number` (from 0)."""
        return number > 0 and self.mode == "multi"

    # on the server ----------------------------------------------------------------------------------------------------

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        assert server.lab is not None
        if server.round == 0:
            owners = torch.stack([update.extra["owned"].cpu() for update in updates]).sum(0)
            wanted = self.volume * (owners if self.per == "client" else owners.clamp(max=1))
            return self.trained(replace(server, private={"wanted": wanted}), self.epochs)
        if self.mode == "one_shot":
            return server
        if self.server_epochs == 0:
            return super().aggregate(server, updates)
        return self.trained(with_statistics(super().aggregate, server, updates), self.server_epochs)

    def trained(self, server: Server, epochs: int) -> Server:
        """The server after so many passes over its synthetic images, the same ones each time."""
        lab = server.lab
        assert lab is not None
        lab.weights.load(server.params, server.buffers, server.counters)
        images = lab.images(server.private["wanted"], 0)
        how = Training(
            epochs=epochs, batch=self.batch, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        samples = Samples.real_ones(images.x, images.y) if self.augment else images
        train(at_server(server, samples, how), Algorithm(), how, lab.weights)
        return replace(
            server,
            params=lab.weights.params.clone(),
            buffers=lab.weights.buffers.clone(),
            counters=lab.weights.counters,
        )
