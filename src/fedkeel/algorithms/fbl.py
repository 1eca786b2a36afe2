"""FBL: every client brings each class to its balance point, without growing its data.

Li, Xu et al.: Federated Balanced Learning. 2026, arXiv 2601.14042. Section and equation numbers below are the paper's;
F-01 to F-28 are our readings of what it leaves open, listed in docs/reading-the-papers.md.

Before training, a client cuts over-represented classes down to its mean class count, keeping the samples of highest
loss, and fills under-represented and absent classes up to it with images from its own generator. Each filled class has
a learnable offset, added to the features of its synthetic images and left out for a few of them (the drop), so that the
gap between synthetic and real is absorbed by the offset and not by the network. Every `period` rounds the kept samples
are chosen anew. The profile of a client decides: "constrained" as said; "unconstrained" fills every class up to its
largest and cuts nothing; "none" cannot generate and trains like FedAvg.

The record of a round in which clients choose by their losses has `method/kept_loss`, the mean loss of what they keep of
the classes they cut: where labels are wrong the highest losses are of wrong ones, and `skip_top` guards against that.

Departures: none by default; where a printed detail is missing the default is the recommended reading.

What crosses: the model, as FedAvg, with uniform weights. What stays: the offsets, the images, which samples are kept.
With `share = "fedavg_rows"` the offsets cross too, and which of them were trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedkeel.algorithms.base import Algorithm, Over
from fedkeel.balance.choose import Rule as Ranking
from fedkeel.balance.choose import choose
from fedkeel.balance.point import balance_point, balanced
from fedkeel.balance.replay import Shortage, replay
from fedkeel.errors import ConfigError
from fedkeel.local import in_mode, losses
from fedkeel.models.split import Split
from fedkeel.options import option
from fedkeel.records import Batch, Local, Plan, Samples, Server, Update
from fedkeel.reference import present, replaced
from fedkeel.registry import register
from fedkeel.weights import Rule, treat


@register("algorithms", "fbl")
@dataclass(frozen=True, kw_only=True)
class FBL(Over):
    """Algorithm 1, over FedAvg or, through the section [balance] of a configuration, over any other method."""

    paper: ClassVar[str] = "Li, Xu et al. 2026, arXiv 2601.14042"
    sums: ClassVar[bool] = True  # of changes, and of who trained which row
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {  # Table III
        "M1": {"sampling": "random", "align": False, "drop": 0, "carry": 0.0},
        "M2": {"sampling": "loss", "align": False, "drop": 0, "carry": 0.0},
        "M3": {"sampling": "loss", "align": True, "drop": 0, "carry": 0.0},
        "M4": {"sampling": "loss", "align": True, "drop": 2, "carry": 0.0},
        "M5": {"sampling": "loss", "align": True, "drop": 2, "carry": 0.9},
        "M6": {"sampling": "loss", "align": True, "drop": 2, "carry": 0.7},
        "M7": {"sampling": "loss", "align": True, "drop": 2, "carry": 0.1},
    }

    weights: Literal["samples", "uniform", "trained"] = option(
        "uniform", "weight of a client in the average (F-04): all the same, its real samples, or its balanced samples"
    )
    # knowledge sampling (IV-C)
    cut: bool = option(True, "cut classes above the balance point; false keeps all real samples and only fills")
    sampling: Ranking = option(
        "loss", "which samples a cut class keeps (equation 7): highest loss, random, lowest loss"
    )
    scorer: Literal["global", "local_last", "running"] = option(
        "global",
        "whose losses rank samples (F-08): the received model's, this client's last trained one's, or those seen while "
        "training (the received model's for samples not yet trained on)",
    )
    scorer_mode: Literal["eval", "train"] = option("eval", "mode of the network while losses are measured (F-08)")
    skip_top: float = option(
        0.0,
        "share of a class with the highest losses never kept, as far as the others suffice: a guard against label "
        "noise",
        ge=0,
        lt=1,
    )
    period: int = option(50, "rounds between choices (m); 0 = chosen once", ge=0, grid=(10, 25, 50, 100, 0))
    carry: float = option(0.1, "share of the last choice that returns (gamma)", ge=0, le=1, grid=(0.0, 0.1, 0.7, 0.9))
    clock: Literal["global", "participation"] = option(
        "global", "what `period` counts (F-09): rounds, or this client's"
    )
    replay_old: Ranking = option("loss", "which of the last choice return (g of equation 8, F-12)")
    replay_new: Ranking | None = option(None, "which of the others come in (F-12); as `sampling` when not set")
    shortage: Shortage = option("fill_from_old", "what to do when the others are too few (F-11)")
    # knowledge filling (IV-A, IV-B)
    rounding: Literal["floor", "nearest", "distribute_remainder"] = option(
        "floor",
        "rounding of the balance point (F-05); of no effect where `zero_policy` decides; with nearest a client can "
        "train on more than it has, by up to half a sample per class",
    )
    zero_policy: Literal["fedavg", "min_one", "skip"] = option(
        "fedavg",
        "a client with fewer samples than classes (F-07): trains on its own data, on one of each, or not at all",
    )
    refresh: Literal["once", "every_cycle"] = option("once", "when synthetic images are renewed (F-21)")
    # alignment and drop (IV-B)
    align: bool = option(True, "add the class's offset to the features of synthetic samples (equation 4)")
    drop: int = option(
        2, "synthetic samples of a full batch that go without their offset (zeta B)", ge=0, grid=(0, 2, 8, 16, 32)
    )
    drop_rate: float | None = option(None, "the same as a share of the batch (zeta), instead of `drop`", ge=0, le=1)
    drop_scope: Literal["synthetic", "batch"] = option("synthetic", "what the dropped are drawn from (F-18)")
    drop_kind: Literal["exact", "bernoulli"] = option("exact", "an exact number, or each with that probability (F-18)")
    share: Literal["local", "fedavg_rows"] = option(
        "local", "offsets stay, or are averaged by those who trained them (F-14)"
    )
    offset_std: float = option(0.0, "standard deviation of the offsets' initial values (F-15)", ge=0)
    offset_lr: float = option(
        1.0, "learning rate of the offsets as a factor of the model's (F-15)", ge=0, grid=(1.0, 10.0, 100.0)
    )
    offset_persist: bool = option(True, "offsets last from round to round (F-15)")
    bn: Literal["shared", "dual"] = option(
        "shared", "BatchNorm sees real and synthetic together, or apart with only the real ones' statistics kept"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share == "fedavg_rows" and not self.offset_persist:
            allowed = "offsets that start anew are no change of those received, so averages of them grow without bound"
            raise ConfigError("offset_persist", False, f"{allowed}: must be true with share = 'fedavg_rows'")
        kind = type(self.base)
        if self.share == "fedavg_rows" and (kind.correct, kind.aggregate) != (Algorithm.correct, Algorithm.aggregate):
            allowed = f"rows are averaged as FedAvg does, and {kind.__name__} corrects or averages in a way of its own"
            raise ConfigError("share", self.share, f"{allowed}: must be 'local' over it")

    # once -------------------------------------------------------------------------------------------------------------

    def build(self, model: Split) -> Split:
        below = self.base.build(model)
        if type(below) is not Split:  # offsets go between features and head, which this network joins in its own way
            name = type(self.base).__name__
            raise ConfigError("balance.name", "fbl", f"cannot work over {name}, which changes the network; ReGL can")
        return Aligned(below, self.offset_std, Rule(lr=self.offset_lr, decay=False, rows=True))

    def personal(self, name: str, module: nn.Module) -> bool:
        return (name == "offset.weight" and self.share == "local") or self.base.personal(name, module)

    def only_sums(self) -> bool:
        if self.share != "local":
            allowed = "says in whole numbers which rows were trained, which cannot be summed: must be 'local'"
            raise ConfigError("share", self.share, allowed)
        return super().only_sums()

    def sends(self) -> tuple[str, ...]:
        return (*self.base.sends(), *(("rows",) if self.share == "fedavg_rows" else ()))

    def client_state(self, params: Tensor) -> dict[str, Tensor]:
        nothing = torch.empty(0, dtype=torch.int64)
        state = {"kept": nothing, "cycle": torch.tensor(-1), "visits": torch.tensor(0)}
        if self.scorer == "local_last":
            state["last"] = torch.empty(0)
        if self.scorer == "running":
            state["running"] = torch.empty(0)
        return {**self.base.client_state(params), **state}

    # on a client ------------------------------------------------------------------------------------------------------

    def plan(self, counts: Tensor, profile: str) -> Plan:
        """Real samples kept and synthetic ones added per class (IV-A; unconstrained: IV-D)."""
        if profile == "none" or self.falls_back(counts, profile):
            return Plan(counts, torch.zeros_like(counts))
        points = balance_point(counts, "max" if profile == "unconstrained" else "mean", self.rounding)
        if profile == "constrained" and _fewer_than_classes(counts):
            points = torch.full_like(points, 1 if self.zero_policy == "min_one" else 0)
        plan = balanced(counts, points)
        return plan if self.cut else Plan(counts, plan.fake)

    def falls_back(self, counts: Tensor, profile: str) -> bool:
        """Its point is 0, however rounded (F-07)."""
        return profile == "constrained" and self.zero_policy == "fedavg" and _fewer_than_classes(counts)

    def prepare(self, local: Local) -> Samples:
        counts = local.data.counts(local.classes)
        plan = self.plan(counts, local.profile)
        if not self.offset_persist and isinstance(local.model, Aligned):
            local.model.reset(self.offset_std, local.rng("offset"))
        kept = self.kept(local, counts, plan)
        first = int(plan.fake.max()) * self.cycle(local) if self.refresh == "every_cycle" else 0
        fakes = local.generate(plan.fake, first) if int(plan.fake.sum()) else local.data.take(kept[:0])
        return local.data.take(kept) + fakes

    def kept(self, local: Local, counts: Tensor, plan: Plan) -> Tensor:
        """[M] ascending numbers of the real samples to train on; chosen anew when a new cycle has begun (F-09)."""
        excessive = counts > plan.real
        if not bool(excessive.any()):
            return torch.arange(len(local.data))
        last, last_cycle = local.mine["kept"], int(local.mine["cycle"])
        if last_cycle == self.cycle(local):
            return last
        mine = excessive[local.data.y]
        parts = [torch.nonzero(~mine)[:, 0]]
        numbers = torch.nonzero(mine)[:, 0]
        new = self.replay_new or self.sampling
        # without carry the old only fill up (F-11), and what is random there needs no losses
        old = new if new == "random" and not self.carry else self.replay_old
        rules = {self.sampling} if last_cycle < 0 else {new, old}
        measured = rules != {"random"} or self.skip_top > 0
        scores = self.scores(local, numbers) if measured else torch.zeros(len(numbers))
        for c in torch.nonzero(excessive)[:, 0].tolist():
            here = local.data.y[numbers] == c
            pool, score, point, rng = numbers[here], scores[here], int(plan.real[c]), local.rng("select", c)
            guarded = min(int(self.skip_top * len(pool)), len(pool) - point)
            if guarded:
                calm = score.argsort(stable=True)[: len(pool) - guarded].sort().values
                pool, score = pool[calm], score[calm]
            if last_cycle < 0:
                parts.append(choose(pool, score, point, self.sampling, rng))  # equation 7
            else:  # equations 8 and 9
                before = last[torch.isin(last, pool)]
                parts.append(
                    replay(
                        pool,
                        before,
                        score,
                        point,
                        self.carry,
                        old=old,
                        new=new,
                        shortage=self.shortage,
                        rng=rng,
                    )
                )
        kept = torch.cat(parts).sort().values
        if measured:
            local.scratch["kept_loss"] = scores[torch.isin(numbers, kept)].mean()
        return kept

    def cycle(self, local: Local) -> int:
        """The number of the present replay cycle."""
        if self.period == 0:
            return 0
        return (local.round if self.clock == "global" else int(local.mine["visits"])) // self.period

    def scores(self, local: Local, numbers: Tensor) -> Tensor:
        """Losses of the real samples `numbers`, never of augmented images, never while training (F-08). Those of scorer
        "running" are of the batches trained on, augmented as these are."""
        samples = local.data.take(numbers)
        if self.scorer == "local_last" and len(local.mine["last"]):
            with replaced(local, local.mine["last"]):
                return losses(local, samples, self.scorer_mode)
        scores = losses(local, samples, self.scorer_mode)
        if self.scorer == "running" and len(local.mine["running"]):
            seen = local.mine["running"][numbers]
            return torch.where(seen < 0, scores, seen)
        return scores

    def loss(self, local: Local, batch: Batch) -> Tensor:
        model = local.model
        assert isinstance(model, Aligned)
        shown = self.shown(local, batch)
        if self.scorer == "running":
            self.watch(local, batch)
        with model.aligned(batch.y, shown, batch.fake if self.bn == "dual" else None):
            return self.base.loss(local, batch)

    def shown(self, local: Local, batch: Batch) -> Tensor:
        """[B] bool: the synthetic samples that get their offset, all but the dropped ones (equation 5)."""
        if not self.align:
            return torch.zeros_like(batch.fake)
        rate = self.drop_rate if self.drop_rate is not None else min(1.0, self.drop / local.batch_size)
        rng = local.rng("drop")
        candidates = batch.fake if self.drop_scope == "synthetic" else torch.ones_like(batch.fake)
        draw = torch.rand(len(batch), generator=rng)
        if self.drop_kind == "bernoulli":
            return batch.fake & ~(candidates & (draw < rate))
        count = int(rate * len(batch) + 0.5)
        order = torch.where(candidates, draw, 2.0).argsort()  # candidates first, in random order
        dropped = torch.zeros_like(batch.fake)
        dropped[order[:count]] = True
        return batch.fake & ~dropped

    def watch(self, local: Local, batch: Batch) -> None:
        """Notes the training losses of real samples (scorer "running")."""
        if "running" not in local.scratch:
            known = local.mine["running"]
            fresh = torch.full((len(local.data),), -1.0)  # a loss is never negative: not seen yet
            local.scratch["running"] = known.clone() if len(known) else fresh
        with torch.no_grad():
            real = torch.nonzero(~batch.fake)[:, 0]
            if len(real):
                with in_mode(local.model, "eval"):  # BatchNorm's statistics stay as they are
                    logits = local.model(batch.x[real.to(batch.x.device)])
                value = cross_entropy(logits, batch.y[real.to(batch.y.device)], reduction="none").cpu()
                local.scratch["running"][batch.index[real]] = value

    def upload(self, local: Local) -> Update:
        update = self.inner.upload(local)
        keep = {**update.keep, "visits": local.mine["visits"] + 1}
        kept = local.samples.real.index
        if len(kept) < len(local.data):  # some class was cut
            keep |= {"kept": kept, "cycle": torch.tensor(self.cycle(local))}
        if self.scorer == "local_last":
            keep["last"] = present(local)
        if "running" in local.scratch:
            keep["running"] = local.scratch["running"]
        extra = dict(update.extra)
        if self.share == "fedavg_rows":
            filled = local.samples.take(local.samples.fake).counts(local.classes)
            extra["rows"] = filled > 0
        metrics = dict(update.metrics)
        if "kept_loss" in local.scratch:
            metrics["kept_loss"] = float(local.scratch["kept_loss"])
        return replace(update, extra=extra, keep=keep, metrics=metrics)

    # on the server ----------------------------------------------------------------------------------------------------

    def aggregate(self, server: Server, updates: Iterable[Update]) -> Server:
        if self.share == "local":
            return self.inner.aggregate(server, updates)
        total, trained = 0.0, torch.zeros(0)

        def counted() -> Iterator[Update]:
            nonlocal total, trained
            for update in updates:
                rows = update.extra["rows"].to(server.params.device, torch.float32) * update.weight
                total, trained = total + update.weight, rows if len(trained) == 0 else trained + rows
                yield update

        after = self.inner.aggregate(server, counted())
        # F-14: a row is averaged over those who trained it, the others' change of it being zero
        assert server.layout is not None
        place = server.layout.by_name["offset.weight"]
        old, new = place.view(server.params), place.view(after.params)
        new.copy_(old + (new - old) * torch.where(trained > 0, total / trained.clamp(min=1e-12), 1.0)[:, None])
        return after


class Aligned(Split):
    """A network with one learnable offset per class, added to features where asked (equation 4); never at test time."""

    def __init__(self, model: Split, std: float, rule: Rule) -> None:
        super().__init__(model.features, model.head, model.width)
        classes = _outputs(model.head)
        self.offset = nn.Embedding(classes, model.width)
        nn.init.normal_(self.offset.weight, std=std) if std else nn.init.zeros_(self.offset.weight)
        treat(self.offset, "weight", rule)
        self._shift: Tensor | None = None
        self._apart: Tensor | None = None

    def embed(self, x: Tensor) -> Tensor:
        z = super().embed(x) if self._apart is None else self._two_passes(x, self._apart.to(x.device))
        if self._shift is None:
            return z
        assert self.training, "class offsets are never used at test time (F-19)"
        return z + self._shift

    @contextmanager
    def aligned(self, y: Tensor, shown: Tensor, apart: Tensor | None) -> Iterator[None]:
        """Within this context, samples where `shown` ([B] bool) get the offset of their class `y`; those where `apart`
        is true go through the features on their own and leave no trace in BatchNorm's statistics."""
        if bool(shown.any()):
            self._shift = self.offset(y) * shown.to(y.device)[:, None]
        self._apart = apart if apart is not None and bool(apart.any()) else None
        try:
            yield
        finally:
            self._shift = self._apart = None

    def _two_passes(self, x: Tensor, fake: Tensor) -> Tensor:
        z_fake = self._without_trace(x[fake])
        z = z_fake.new_zeros(len(x), self.width)
        z = z.masked_scatter(fake[:, None], z_fake)
        return z if bool(fake.all()) else z.masked_scatter(~fake[:, None], super().embed(x[~fake]))

    def _without_trace(self, x: Tensor) -> Tensor:
        layers = [module for module in self.features.modules() if isinstance(module, _BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 0.0
        try:
            return super().embed(x)
        finally:  # the network serves other clients after one that failed
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum

    def reset(self, std: float, rng: torch.Generator) -> None:
        """Offsets as they were at first."""
        with torch.no_grad():
            values = torch.randn(self.offset.weight.shape, generator=rng) * std
            self.offset.weight.copy_(values)


def _outputs(head: nn.Module) -> int:
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    return layers[-1].out_features


def _fewer_than_classes(counts: Tensor) -> bool:
    """Of a client's samples: its mean class count, and so its balance point, is below 1."""
    return int(counts.sum()) < len(counts)
