"""Differential privacy of clients: what crosses is clipped, and the server adds noise to the sum of a round.

McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models. ICLR 2018, arXiv 1710.06963.
Accounting of cohorts of a fixed size: Wang, Balle, Kasiviswanathan: Subsampled Rényi Differential Privacy and
Analytical Moments Accountant. AISTATS 2019, arXiv 1808.00087, Theorem 27, as dp-accounting has it.

The server is trusted. Neighbours are federations in which all of one client's data are replaced by others; with S_k
what client k sends (the change of the model and every `extra`, as one vector), the server uses

    sum_k min(1, C / |S_k|) S_k + N(0, (z C)^2)

and nothing else that depends on clients. One client moves the sum by 2 C at most, so that the noise is z / 2 times the
sensitivity.

Departures: cohorts have a fixed size and all weights are 1, where the paper draws each client by itself and weighs by
samples.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedkeel.errors import ConfigError, MissingExtra
from fedkeel.options import option
from fedkeel.records import Reply, Server, Update
from fedkeel.rng import Streams
from fedkeel.weights import Layout

Normal = Callable[[int], Tensor]
"""[n] float64 draws of N(0, 1), new ones at each call."""
BELOW = 1 - 1e-6
"""What is clipped ends so much below the limit, so that rounding cannot take it over."""
AT_ONCE = 1 << 20
"""Pairs of numbers made from the system's randomness at a time."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Differential privacy of clients towards all but the server: the section [privacy]; absent = none.

    Each round costs some of it: epsilon so far is in the record, on the console and in the report. What it covers and
    what not is told in docs/privacy-and-robustness.md.
    """

    clip: float = option(1.0, "largest L2 norm of what one client sends in a round (C)", gt=0)
    noise_multiplier: float = option(
        1.0, "standard deviation of the noise on the sum of what clients send, as a multiple of clip (z)", ge=0, off=0.0
    )
    delta: float | None = option(
        None, "probability with which epsilon may be exceeded; absent: clients^-1.1", gt=0, lt=1
    )
    randomness: Literal["system", "seed"] = option(
        "system",
        "where noise comes from: the operating system, new in every run; or the run's seed, so that runs can be "
        "repeated, but who knows the seed (every client does) can take the noise off again",
    )

    def delta_of(self, clients: int) -> float:
        """Delta where so many clients are registered. Raises ConfigError for a single one, whose default is 1."""
        if self.delta is not None:
            return self.delta
        if clients < 2:
            raise ConfigError("privacy.delta", None, "must be given for a single client")
        return math.pow(clients, -1.1)

    def normal(self, streams: Streams, number: int) -> Normal:
        """The noise of round `number` (from 0), before it is scaled."""
        if self.randomness == "system":
            return from_system
        rng = streams("privacy", number)
        return lambda n: torch.randn(n, generator=rng, dtype=torch.float64)


def fits(layout: Layout) -> None:
    """Raises ConfigError when BatchNorm statistics cross, which are neither clipped nor noised."""
    if layout.buffers or layout.counters:
        ways = "model.norm = 'group' has none, local.buffers = 'local' keeps them on clients, without a global model"
        raise ConfigError("model", "BatchNorm", f"its statistics must not cross under [privacy]: {ways}")


def norm(update: Update) -> float:
    """L2 norm of all that an update carries to the server. Raises ConfigError for whole numbers, which cannot be
    clipped."""
    parts = []
    for name, tensor in (("delta", update.delta), *update.extra.items()):
        if not tensor.is_floating_point():
            allowed = f"the method sends {name!r} as {tensor.dtype}, which can be neither clipped nor noised"
            raise ConfigError("privacy", name, allowed)
        parts.append(torch.linalg.vector_norm(tensor, dtype=torch.float64).item())
    return math.hypot(*parts)


def clipped(update: Update, limit: float) -> Update:
    """The update, made shorter where its norm is above `limit`. Clipping twice is clipping once."""
    length = norm(update)
    if length <= limit:
        return update
    scale = limit / length * BELOW
    extra = {name: tensor * scale for name, tensor in update.extra.items()}
    return replace(update, delta=update.delta * scale, extra=extra)


def kinds(update: Update) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of what an update carries to the server."""
    sent = {"delta": update.delta, **update.extra}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in sent.items()}


def guarded(replies: Iterator[Reply], server: Server, options: Privacy, normal: Normal) -> Iterator[Reply]:
    """A round's replies as a method may see them: clipped (clients are not trusted to have done so), of equal weight,
    the first with the noise of the sum, and without anything else that a client measured or counted."""
    known: dict[str, tuple[torch.Size, torch.dtype]] | None = None
    for reply in replies:
        update = reply.update
        if update is None:
            yield reply
            continue
        found = kinds(update)
        floats = all(dtype.is_floating_point for _, dtype in found.values())
        alike = found == known if known is not None else update.delta.shape == server.params.shape
        if not (floats and alike and math.isfinite(norm(update))):  # noise is on what the first one sends
            yield replace(reply, update=None, failure="it sends other names, shapes or types than the round has")
            continue
        update = replace(clipped(update, options.clip), weight=1.0, metrics={})
        if known is None and options.noise_multiplier:
            update = noised(update, options.noise_multiplier * options.clip, normal)
        known = found
        assert reply.buffers is not None
        yield replace(reply, update=update, buffers=reply.buffers[:0], counters={}, loss=math.nan, steps=0, metrics={})


def noised(update: Update, std: float, normal: Normal) -> Update:
    """The update with N(0, std^2) on every number that it carries to the server."""

    def noisy(tensor: Tensor) -> Tensor:
        noise = (normal(tensor.numel()) * std).view(tensor.shape)
        return tensor + noise.to(tensor.device, tensor.dtype)

    return replace(update, delta=noisy(update.delta), extra={name: noisy(t) for name, t in update.extra.items()})


def from_system(n: int) -> Tensor:
    """[n] float64 of N(0, 1) from the operating system's random bytes (Box and Muller 1958).

    PyTorch's CPU generator takes 32 bits of a seed only: whoever has a guess at the sum could try all of them.
    """
    parts = []
    for start in range(0, n, 2 * AT_ONCE):
        pairs = (min(n - start, 2 * AT_ONCE) + 1) // 2
        bits = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64)
        one, other = (((bits >> 11) & (2**53 - 1)).double().add_(0.5) / 2**53).view(2, pairs)  # (0, 1]
        radius, angle = torch.sqrt(-2 * torch.log(one)), 2 * math.pi * other
        parts += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])[:n]


class Accountant:
    """Epsilon of all rounds that were released, in two readings.

    `privacy/epsilon` holds against those who do not know who took part in which round (the sample is their doubt),
    `privacy/epsilon_known` against those who do: it counts the rounds of the client that was in most of them. The
    second may be the smaller one after few rounds: it is of the draw that happened, the first of all that could have.

    A round counts as often as it was finished: one that is done again with other noise is a second release.
    """

    def __init__(
        self,
        options: Privacy,
        clients: int,
        cohort: Callable[[int], Sequence[int]],
        sample: Callable[[int], Sequence[int]],
    ) -> None:
        """clients: registered ones. cohort(number): those of round `number` (from 0). sample(number): those that were
        drawn for it, uniformly without replacement; where the method takes others, nothing is gained by the draw.

        Raises MissingExtra without dp-accounting.
        """
        self.options, self.clients, self._cohort, self._sample = options, clients, cohort, sample
        self.delta = options.delta_of(clients)
        self.released: Counter[int] = Counter()
        """How often each round was finished; kept on disk beside the run."""
        self._rounds: Counter[int] = Counter()  # by client
        self._sizes: Counter[int] = Counter()  # rounds by how many were drawn
        self._curves: dict[int, Any] = {}
        if options.noise_multiplier:
            _dp()

    def recall(self, released: Mapping[int, int], rounds: int) -> None:
        """At a resume: what is on record, and at least the `rounds` that the run goes on from."""
        for number, times in (Counter(released) | Counter(range(rounds))).items():
            self._count(number, times)

    def release(self, number: int) -> dict[str, float]:
        """Round `number` is finished; metrics of its record, infinite without noise."""
        if self.options.randomness == "system" or not self.released[number]:  # the same noise again tells nothing new
            self._count(number, 1)
        if not self.options.noise_multiplier:
            return {"privacy/epsilon": math.inf, "privacy/epsilon_known": math.inf}
        noise = self.options.noise_multiplier
        known = gaussian(noise, max(self._rounds.values()), self.delta)
        # The bound for samples is at times wider than that of a client that took part in all rounds, which holds for
        # every draw. `known` holds for the draw that happened: who does not know it has to reckon with all of them.
        secret = min(gaussian(noise, sum(self._sizes.values()), self.delta), self.sampled(self._sizes))
        return {"privacy/epsilon": secret, "privacy/epsilon_known": known}

    def _count(self, number: int, times: int) -> None:
        cohort, sample = list(self._cohort(number)), list(self._sample(number))
        self.released[number] += times
        self._rounds.update(dict.fromkeys(cohort, times))
        self._sizes[len(sample) if cohort == sample else self.clients] += times

    def sampled(self, rounds: Mapping[int, int]) -> float:
        """Epsilon with secret cohorts: so many rounds by the number of clients drawn."""
        for size in rounds:
            if size not in self._curves:
                self._curves[size] = curve(self.options.noise_multiplier, size, self.clients)
        orders = next(iter(self._curves.values()))[0]
        total = sum(times * self._curves[size][1] for size, times in rounds.items())
        return float(_dp().rdp.rdp_privacy_accountant.compute_epsilon(orders, total, self.delta)[0])


def gaussian(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Epsilon of a client that took part in so many rounds."""
    dp = _dp()
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp.GaussianDpEvent(noise_multiplier / 2), rounds)
    return float(accountant.get_epsilon(delta))


def curve(noise_multiplier: float, size: int, clients: int) -> tuple[Any, Any]:
    """Orders and the Rényi divergence at each, of one round with `size` of `clients` drawn without replacement; those
    of several rounds add up. Takes a second or two."""
    dp = _dp()
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.GaussianDpEvent(noise_multiplier / 2)
    if size < clients:  # the bound for samples is the wider one where all are drawn
        event = dp.SampledWithoutReplacementDpEvent(clients, size, event)
    accountant.compose(event)
    return accountant._orders, accountant._rdp  # no public name gives them


def _dp() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError:
        raise MissingExtra("[privacy]", "dp") from None
    return dp_accounting
