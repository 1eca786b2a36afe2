"""All that one run needs, made from its configuration: data, partition, network, method, images, streams."""

from __future__ import annotations

import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedkeel import personal, registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.clients import ClientStore
from fedkeel.config import Config, Profiles
from fedkeel.data.dataset import Dataset
from fedkeel.data.pictures import set_aside, statistics
from fedkeel.data.transforms import Transform
from fedkeel.errors import ConfigError, DeviceError, PoolError
from fedkeel.evaluate import evaluate
from fedkeel.generators.base import Finite, Generator, Remembers, Source, Tunable, Worded
from fedkeel.generators.names import marks
from fedkeel.generators.store import Pool, Spent, default_root, folder_of, heard
from fedkeel.local import Worker
from fedkeel.models.split import Split
from fedkeel.partition import manifest
from fedkeel.partition.manifest import Partition, counted
from fedkeel.privacy import Accountant
from fedkeel.records import Lab, Plan, Samples, Server
from fedkeel.rng import Streams, isolated, stream_seed
from fedkeel.runtimes.base import Progress, Tuning


class Adapted:
    """What one client tuned, as a `Source`: its network is in memory only while the job keeps it."""

    def __init__(self, job: Job, client: int) -> None:
        """Tunes it, unless it is on record what came out: no more is needed to find images that are there."""
        source = job._load(job.generator_of(client))
        self._job, self._client = job, client
        self.classes, self.shape = source.classes, source.shape
        if client not in job.adapters:
            job.source_of(client)
        self._fingerprint = str(job.adapters[client]["fingerprint"])

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8."""
        return self._job.source_of(self._client).generate(labels, indices)

    def prompt(self, label: int) -> str:
        """What the generator is asked for."""
        return self._job.source_of(self._client).prompt(label)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held while images are made."""
        return self._job.source_of(self._client).memory_bytes()

    def fingerprint(self) -> str:
        """Of what was tuned."""
        return self._fingerprint


class Images:
    """Synthetic images for clients, from pools on disk: one for each generator, and for each that a client tuned."""

    def __init__(self, job: Job) -> None:
        self.job, self.shared = job, job.config.pool.sharing == "shared"
        self._pools: dict[str, Pool] = {}  # by fingerprint
        self._adapted: dict[int, Adapted] = {}
        self._prints: dict[Generator | None, str] = {}
        self.spent: dict[str, Spent] = {}
        """What making images took, by the section of the generator: "generator", "unconstrained", ..."""
        self._most: dict[Generator | None, Tensor] = {}

    def __call__(self, client: int, counts: Tensor, first: int) -> Samples:
        """counts[c] images of each class c, this client's number `first` and on."""
        x, y = [torch.empty((0, *self.job.data.shape), dtype=torch.uint8)], [torch.empty(0, dtype=torch.int64)]
        pool = self.of(client)
        most = self.most(client) if self.shared else counts
        for label, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            if self.shared:  # the client's own order: all of a block in some order, then those of the next
                block, stream = max(count, int(most[label])), self.job.streams("pool", client, label)
                starts = range(0, first + count, block)
                order = torch.cat([start + torch.randperm(block, generator=stream) for start in starts])
                x.append(pool.take(label, 0, len(order))[order[first : first + count]])
            else:
                x.append(pool.take(label, client, first + count)[first:])
            y.append(torch.full((count,), label))
        return Samples.fake_ones(torch.cat(x), torch.cat(y))

    @property
    def pool(self) -> Pool:
        """That of the generator in the section [generator]; the server's."""
        return self.of(self.job.config.clients)

    def of(self, client: int, tuned: bool = True) -> Pool:
        """The pool of this client's generator, tuned where it tunes and `tuned` is true."""
        job = self.job
        generator = job.generator_of(client)
        source = job._load(generator)
        # a slow generator's few images at a time are kept as they come: a killed run loses no more than those
        batch = max(8, getattr(source, "batch", 256))
        if tuned and job.adapts(client):
            if client not in self._adapted:
                self._adapted[client] = Adapted(job, client)
            source = self._adapted[client]
            fingerprint = source.fingerprint()
        else:
            fingerprint = self._prints.get(generator) or self._prints.setdefault(generator, source.fingerprint())
        if fingerprint not in self._pools:
            folder = folder_of(job.pools, fingerprint)
            # one for the server; what all share of the images that are there is taken from the first on
            lanes = 1 if self.shared and isinstance(source, Finite) else job.config.clients + 1
            spent = self.spent.setdefault(job.section_of(client), Spent())
            self._pools[fingerprint] = Pool(
                source, folder, lanes, batch, job.tell, among=job.makers, spent=spent, device=job.device
            )
        return self._pools[fingerprint]

    def most(self, client: int) -> Tensor:
        """[C] most images of a class that any client with this one's generator needs; the server may need more."""
        generator = self.job.generator_of(client)
        if generator not in self._most:
            needs = [k for k in range(self.job.clients) if self.job.generator_of(k) == generator]
            nothing = torch.zeros(1, len(self.job.data.classes), dtype=torch.int64)
            self._most[generator] = torch.cat([nothing, self.job.plan.fake[needs]]).amax(0)
        return self._most[generator]

    def kept(self, label: int, client: int, count: int) -> Tensor | None:
        """[count, C, H, W] uint8: a client's first images of a class. None where some are not on this machine, or what
        the client tuned is not on record: nothing is made and nothing tuned."""
        if self.job.adapts(client) and client not in self.job.adapters:
            return None
        return self.of(client).kept(label, 0 if self.shared else client, count)


@dataclass(frozen=True)
class Holdings:
    """What a process knows of clients' data where it does not hold all of them: at a site, at the server of sites, in
    a worker that gets each client's samples when it trains.

    data: as clients see them, noise included; its train images are those that this process holds. partition: rows of
    these, none for a client whose samples are elsewhere; `counts` may know of those too. samples: where they come from,
    None = from `data`. total: how many samples all clients have together as far as is known by now, None = as many as
    `counts` says.
    """

    data: Dataset
    partition: Partition
    samples: Callable[[int], Samples] | None = None
    total: Callable[[], int] | None = None


class Job:
    """One run's parts. Making a job loads data and builds the network; nothing is trained and nothing generated yet."""

    def __init__(
        self,
        config: Config,
        data: Dataset | None = None,
        folder: Path | None = None,
        holdings: Holdings | None = None,
    ) -> None:
        """`data` stands in for the configuration's [data]; `folder` is where client states may be kept; `holdings`
        stand in for data and partition."""
        self.config = config
        self.streams = Streams(config.seed)
        self.device = find_device(config.device)
        if self.device.type == "cuda":
            steady()
        self._samples = None if holdings is None else holdings.samples
        self._total = None if holdings is None else holdings.total
        if holdings is None:
            clean = validating(config.data.load() if data is None else data, config.evaluate.validation)
            self.partition = self._partition(clean, folder)
            self.data = config.noise.apply(clean, self.streams)
        else:
            clean = self.data = holdings.data
            self.partition = holdings.partition
        self._clean = clean.train_x
        self.fingerprint = clean.fingerprint
        """Of the data before noise, as the partition is: who holds which images is the same at every level of it."""
        self._rows = self.partition.held(len(clean.train_y))
        self._held = torch.bincount(clean.train_y[self._rows], minlength=len(clean.classes))  # before noise
        self.warn: Callable[[str], None] = warnings.warn
        """Told of damage that was made good; a run sets it to its listener's."""
        self.checkpointed: Callable[[int], Collection[int]] = lambda client: ()
        """Rounds of a client's states that checkpoints on disk need; a run that writes any sets it."""
        self.method = config.method
        self.clients = 1 if self.method.pooled else config.clients
        """How many take part: all data are one client's for a pooled method."""
        self.profiles = assign(config.profiles, config.clients, self.streams)
        augment = config.augment
        self.transform = Transform(
            mean=self.data.mean,
            std=self.data.std,
            crop=augment.crop,
            flip=augment.flip,
            augment_synthetic=augment.synthetic,
            fresh_noise=config.noise.fresh,
        )
        budget = int(config.memory * 2**30)
        if config.pool.sharing == "shared" and any(map(self.adapts, range(self.clients))):
            own = "a generator that a client has tuned is its own, and so are its images: use per_client"
            raise ConfigError("pool.sharing", "shared", own)
        self.adapters: dict[int, dict[str, object]] = {}
        """What is on record about each client's own generator."""
        self._loaded: dict[Generator, Source] = {}
        self._tuned: OrderedDict[int, Source] = OrderedDict()  # the one used last stands last
        self._said: set[str] = set()
        self.store = ClientStore(None if folder is None else folder / "clients", budget)
        self.shelf = ClientStore(None if folder is None else folder / "shelf", budget)
        model = initial(config, self.data)
        self.worker = Worker(
            model,
            self.method,
            config.local,
            classes=len(self.data.classes),
            rounds=config.rounds,
            streams=self.streams,
            transform=self.transform,
            data=self.samples,
            profile=self.profiles.__getitem__,
            images=lambda client, counts, first: self.images(client, counts, first),
            device=self.device,
            clients=config.clients,
            cohort=config.cohort,
            privacy=config.privacy,
        )

    def tell(self, text: str) -> None:
        """Warns by whatever way there is by then."""
        self.warn(text)

    def idle(self) -> Iterator[str]:
        """What switches a method of this run off: an option, the network or the classes. A run warns about it."""
        config = self.config
        for section, method in (("algorithm", config.algorithm), ("balance", config.balance)):
            if method is None:
                continue
            for option, value in method.off(config.rounds).items():
                yield f"{section}.{option} = {value}: this switches the method off"
            if why := method.idle(self.worker.model, len(self.data.classes)):
                yield f"{section}.name = {registry.name_of('algorithms', type(method))}: {why}"
        if config.local.precision == "bfloat16" and self.device.type == "cpu" and not _has_bfloat16():
            yield "local.precision = 'bfloat16': this processor does not have it, float32 is faster by far"
        if config.privacy is not None and config.privacy.noise_multiplier == 0:
            yield "privacy.noise_multiplier = 0.0: without noise nothing is private, and epsilon is infinite"
        if config.robust is not None and config.robust.name == "trimmed_mean" and config.robust.cut == 0:
            yield "robust.trim = 0.0: nothing is cut off, one lying client moves the mean as far as it likes"
        if config.algorithm.tunes and config.algorithm.kind == "personal" and config.personal.epochs == 0:
            yield "personal.epochs = 0: this switches the method off"
        there = self.counts.any(1).nonzero()[:, 0].tolist()
        if few := [k for k in there if self.method.falls_back(self.counts[k], self.profiles[k])]:
            key = "algorithm" if config.balance is None else "balance"
            yield (
                f"{len(few)} of {self.clients} clients have fewer samples than there are classes, so they cannot be "
                f"balanced and train like FedAvg's; {key}.zero_policy says what they do instead"
            )
        tuning = [k for k in range(self.clients) if self.adapts(k)]
        if tuning and all(map(self._tunes_in_vain, tuning)):
            yield (
                "clients tune their generators, but only need images of classes that they have none of, and those are "
                "made by the generator as it was: nothing of the tuning is seen; of bundled, generator.tune_missing = "
                "'tuned' changes that"
            )

    def _tunes_in_vain(self, client: int) -> bool:
        """Whether this client, which tunes, needs no image of a class for which its generator is tuned."""
        fake = self.plan.fake[client]
        tunes_missing = getattr(self.generator_of(client), "tunes_missing", True)
        return not tunes_missing and int(fake[self.counts[client] > 0].sum()) == 0

    def _partition(self, data: Dataset, folder: Path | None) -> Partition:
        config = self.config
        if folder is None or not (folder / "partition.json").is_file():
            return manifest.make(config.partition, data, config.clients, self.streams)
        partition = manifest.load(folder / "partition.json")
        partition.verify(config.partition, data, config.clients, self.streams)
        return partition

    @cached_property
    def counts(self) -> Tensor:
        """[K, C] real samples per client and class, by the labels that clients see: the noisy ones. Zero for clients of
        whom this process knows nothing."""
        if self._samples is not None:
            return self.partition.counts
        if self.method.pooled:
            return self.samples(0).counts(len(self.data.classes))[None]
        return counted(self.partition.clients, self.data.train_y, len(self.data.classes))

    def samples(self, client: int) -> Samples:
        """A client's own samples."""
        if self._samples is not None:
            return self._samples(client)
        rows = self._rows if self.method.pooled else self.partition.clients[client]
        return Samples.real_ones(self.data.train_x[rows], self.data.train_y[rows])

    def lab(self, number: int) -> Lab:
        """What the server computes with in round `number`. It borrows the network of this process's worker, which is
        loaded anew for each client."""
        config = self.config
        return Lab(
            weights=self.worker.weights,
            classes=len(self.data.classes),
            shape=self.data.shape,
            rounds=config.rounds,
            streams=self.streams.at("server", number),
            transform=self.transform,
            images=lambda counts, first: self.images(config.clients, counts, first),
            shelf=self.shelf,
            device=self.device,
            bn_var=config.local.bn_var,
        )

    def mail(self, server: Server, client: int) -> Mapping[str, Tensor]:
        """What the server sends to this client alone."""
        return self.method.mail(replace(server, lab=self.lab(server.round), samples=self.total), client)

    @property
    def total(self) -> int:
        """Samples of all clients together; of sites, of those that have joined by now."""
        return self._counted if self._total is None else self._total()

    @cached_property
    def _counted(self) -> int:
        return int(self.counts.sum())

    def first_server(self) -> Server:
        """The server before the first round."""
        return self.worker.first_server(self.clients, self.total)

    def cohort(self, number: int) -> list[int]:
        """The clients of round `number` (from 0), ascending."""
        if self.method.pooled:
            return [0]
        return self.method.cohort(self.sample(number), self.config.clients, number)

    def sample(self, number: int) -> list[int]:
        """The clients that are drawn for round `number`, ascending: uniformly without replacement. The method may take
        others."""
        order = torch.randperm(self.config.clients, generator=self.streams("clients", number))
        return sorted(order[: self.config.cohort].tolist())

    @cached_property
    def accountant(self) -> Accountant | None:
        """What privacy this run has cost so far; None where [privacy] is absent. Raises MissingExtra."""
        privacy, config = self.config.privacy, self.config
        return None if privacy is None else Accountant(privacy, config.clients, self.cohort, self.sample)

    @cached_property
    def plan(self) -> Plan:
        """What all clients train on, [K, C] each, from their counts and profiles (known in simulation only)."""
        plan = Plan(self.counts, torch.zeros_like(self.counts))
        if type(self.method).plan is Algorithm.plan:  # nothing is cut or filled
            return plan
        plan = Plan(plan.real.clone(), plan.fake)
        for k in self.counts.any(1).nonzero()[:, 0].tolist():  # samples of the others are elsewhere
            each = self.method.plan(self.counts[k], self.profiles[k])
            plan.real[k], plan.fake[k] = each.real, each.fake
        return plan

    @property
    def filled(self) -> list[int]:
        """The clients that train on synthetic images."""
        return self.plan.fake.any(1).nonzero()[:, 0].tolist()

    # what makes images ------------------------------------------------------------------------------------------------

    def generator_of(self, client: int) -> Generator | None:
        """The options of a client's generator; the server, number `config.clients`, has those of [generator]."""
        if client >= self.clients:
            return self.config.generator
        return self.config.generator_of(self.profiles[client])

    def section_of(self, client: int) -> str:
        """Where the generator of a client stands in the configuration: "generator", or the profile that has its own."""
        own = {profile for profile, _ in self.config.generators.items()} if self.config.generators else set()
        profile = self.profiles[client] if client < len(self.profiles) else ""
        return profile if profile in own else "generator"

    def adapts(self, client: int) -> bool:
        """Whether this client tunes its generator on its own samples."""
        if client >= self.clients:
            return False
        tunes = self.method.tunes_generator(self.counts[client], self.profiles[client])
        return tunes and bool(self.plan.fake[client].any())

    @cached_property
    def makers(self) -> int:
        """How many generators there are, at most, tuned ones counted."""
        return 1 + sum(map(self.adapts, range(self.clients)))

    @property
    def pools(self) -> Path:
        """Where pools of images lie, each in a folder of its own, and what clients tuned, in `adapters`."""
        return Path(self.config.pool.dir).expanduser() if self.config.pool.dir else default_root()

    @property
    def needing(self) -> list[int]:
        """Who needs a generator: the clients that train on synthetic images, and the server, number `config.clients`,
        where it does."""
        return self.filled + ([self.config.clients] if self.config.algorithm.generates else [])

    def check_generators(self) -> None:
        """Raises ConfigError when images are needed and no generator is named; none is loaded."""
        for client in self.needing:
            _named(self.generator_of(client))

    def untuned(self) -> dict[str, dict[str, object]]:
        """What is to be known of the generators that this run uses, by section: "generator", "unconstrained", ...

        Raises ConfigError when one is missing.
        """
        out: dict[str, dict[str, object]] = {}
        for client in self.needing:
            key, generator = self.section_of(client), self.generator_of(client)
            if key not in out:
                source = self._load(generator)
                out[key] = {
                    "name": registry.name_of("generators", type(generator)),
                    "fingerprint": source.fingerprint(),
                    "prompts": [source.prompt(label) for label in range(len(self.data.classes))],
                    "memory_bytes": source.memory_bytes(),
                }
                if isinstance(source, Worded):
                    out[key]["phrases"] = source.origin()
        return out

    @property
    def source(self) -> Source:
        """The generator of the section [generator], loaded. Raises ConfigError when the configuration names none."""
        return self._load(self.config.generator)

    def source_of(self, client: int, progress: Tuning | None = None) -> Source:
        """The generator of a client, tuned on its samples where it tunes; what was tuned is kept beside the pools.

        As many tuned ones as fit into `memory` stay in memory, at least one; others are made again from what was kept.

        Raises ConfigError when there is none, or none that can be tuned; PoolError when what was kept is gone.
        """
        generator = self.generator_of(client)
        base = self._load(generator)
        if not self.adapts(client):
            return base
        if client not in self._tuned:
            assert generator is not None
            first = self.adapters.get(client)
            tuned = self._tune(client, generator, base, progress)
            if first is not None:  # made again from what it kept: what is on record is how it was tuned
                self.adapters[client] = first
                if tuned.fingerprint() != first["fingerprint"]:
                    changed = f"what client {client} tuned was removed or changed in {self.pools / 'adapters'}"
                    raise PoolError(f"{changed} while the run went on: resume it")
            self._tuned[client] = tuned
        self._tuned.move_to_end(client)
        held = sum(sum(source.memory_bytes().values()) for source in self._tuned.values())
        while held > self.config.memory * 2**30 and len(self._tuned) > 1:
            held -= sum(self._tuned.popitem(last=False)[1].memory_bytes().values())
        return self._tuned[client]

    def _load(self, generator: Generator | None) -> Source:
        generator = _named(generator)
        if generator not in self._loaded:
            data = self.data
            try:
                with heard(self.tell, self._said):
                    source = generator.load(data.classes, data.shape, self.device, data.public)
            except ConfigError as error:  # generators do not know of which section they are
                if not error.key.startswith("generator"):
                    raise
                profiles = [] if self.config.generators is None else self.config.generators.items()
                section = next((f"generators.{name}" for name, own in profiles if own == generator), "generator")
                key = section + error.key.removeprefix("generator")
                raise ConfigError(key, error.value, error.allowed, error.near) from error
            self._warn_of_leaks(source)
            self._loaded[generator] = source
        return self._loaded[generator]

    def _warn_of_leaks(self, source: Source) -> None:
        known = source.trained_on if isinstance(source, Remembers) else None
        if known is None:
            return
        held = self._clean[self._rows]
        count = int(torch.isin(marks(held), known).sum())
        if count:
            self.warn(
                f"clients hold {count} of the {len(known)} images that the generator was trained on: what it makes "
                f"tells others of them, and results with it are too good; set data.public_limit = {len(known)}, if "
                f"those are the images that it sets aside, or use other data"
            )

    def _tune(self, client: int, generator: Generator, base: Source, progress: Tuning | None) -> Source:
        name = registry.name_of("generators", type(generator))
        if not isinstance(base, Tunable):
            key = "algorithm.tune" if self.config.balance is None else "balance.tune"
            raise ConfigError(
                key, True, f"generator {name!r} does not learn; bundled, gaussian and stable-diffusion do"
            )
        samples, seed = self.samples(client), stream_seed(self.config.seed, "tune", client)
        keep = self.pools / "adapters" / base.recipe(samples, seed)[:32]
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tuned = base.tune(
                samples,
                seed,
                keep,
                self.config.tuning_budget_of(self.profiles[client]),
                None if progress is None else partial(progress, client),
            )
        for text in dict.fromkeys(f"generator of client {client}: {each.message}" for each in said):
            if text not in self._said:  # one that is made again from what it kept says it again
                self._said.add(text)
                self.warn(text)
        self.adapters[client] = {
            "client": client,
            "generator": name,
            "images": len(samples),
            "fingerprint": tuned.fingerprint(),
            **(spent(keep) or {"seconds": round(time.perf_counter() - began, 3)}),
        }
        return tuned

    @cached_property
    def images(self) -> Images:
        """Synthetic images by client."""
        return Images(self)

    def generate(
        self,
        progress: Progress | None = None,
        tuning: Tuning | None = None,
        clients: Collection[int] | None = None,
    ) -> int:
        """Tunes the generators of clients that do so, and fills the pools with every image that clients (all, or these)
        need in their first cycle; returns how many. A call that was stopped is gone on with by the next.

        progress: called with images there and wanted; tuning: with the client, steps done and steps in all.
        """
        filled = [client for client in self.filled if clients is None or client in clients]
        for client in filled:
            self.source_of(client, tuning)
        needs: dict[Pool, dict[tuple[int, int], int]] = {}
        for client in filled:
            wanted, lane = (self.images.most(client), 0) if self.images.shared else (self.plan.fake[client], client)
            each = needs.setdefault(self.images.of(client), {})
            each |= {(label, lane): int(count) for label, count in enumerate(wanted.tolist()) if count}
        total, done = sum(sum(each.values()) for each in needs.values()), 0
        for pool, each in needs.items():
            report = None if progress is None else partial(_from, progress, done, total)
            pool.fill([(*place, count) for place, count in each.items()], report)
            done += sum(each.values())
        return total

    @cached_property
    def personal_tests(self) -> list[Tensor]:
        """Test images of each client (R-10)."""
        rng = self.streams("personal")
        counts, total = self.partition.counts, self._held  # test images have no noisy labels
        if self.method.pooled:
            counts, total = self.counts, self.counts.sum(0)
        return personal.test_sets(counts, total, self.data.test_y, self.config.personal, rng)

    @property
    def generates(self) -> bool:
        """Whether clients or the server train on synthetic images."""
        return self.config.algorithm.generates or bool(self.plan.fake.any())

    @property
    def tunes(self) -> bool:
        """Whether personal models are the final one tuned on each client; a personal method says so itself, whatever
        balances it."""
        deciding = self.config.algorithm if self.config.algorithm.kind == "personal" else self.method
        return deciding.tunes

    @property
    def has_global(self) -> bool:
        """Whether the server's weights are a model by themselves: by the method itself, whatever balances it; and not
        where BatchNorm's statistics stay with the clients."""
        apart = self.config.local.buffers == "local" and self.worker.weights.layout.own_buffers > 0
        return self.config.algorithm.has_global and not apart

    def personal_round(self, number: int) -> bool:
        """Whether personal models are measured after round `number` (from 1)."""
        options = self.config.personal
        asked = self.config.algorithm.kind == "personal" or not self.has_global
        if options.measure == "never" or (options.measure == "auto" and not asked):
            return False
        return number == self.config.rounds or (options.every > 0 and number % options.every == 0)

    def measure(self, model: Split) -> Mapping[str, float]:
        """Accuracies on the test images, by name; none without any."""
        if len(self.data.test_y) == 0:
            return {}
        return evaluate(
            model,
            self.data.test_x,
            self.data.test_y,
            self.data.classes,
            self.transform,
            self.device,
            self.config.evaluate.batch,
        )

    def evaluate(self, server: Server) -> dict[str, float]:
        """`global/...` metrics of the server's model; none without test images."""
        if len(self.data.test_y) == 0:
            return {}
        self.worker.load(server)
        return {f"global/{name}": value for name, value in self.measure(self.worker.model).items()}


def spent(keep: Path) -> dict[str, object]:
    """Steps done and wanted, and the seconds they took, of the adapter kept there; empty where none is."""
    path = keep.with_name(f"{keep.name}.safetensors")
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        note = dict(file.metadata() or {})
    return {"steps": int(note["steps"]), "of": int(note["of"]), "seconds": round(float(note["seconds"]), 3)}


def _named(generator: Generator | None) -> Generator:
    """The generator. Raises ConfigError when the configuration names none."""
    if generator is None:
        raise ConfigError(
            "generator", None, "this run needs synthetic images: name a generator (fedkeel list generators)"
        )
    return generator


def _from(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    """Progress within one pool as a part of all."""
    progress(before + done, total)


def validating(data: Dataset, share: float) -> Dataset:
    """The data with a `share` of the train images, stratified, the last of each class, in place of the test images."""
    if share == 0:
        return data
    train, held = set_aside(data.train_y.numpy(), int(share * len(data.train_y) + 0.5))
    if len(held) == 0 or len(train) == 0:
        allowed = f"leaves no image to {'train on' if len(held) else 'measure on'}, of {len(data.train_y)}"
        raise ConfigError("evaluate.validation", share, allowed)
    mean, std = statistics(data.train_x[train])
    return replace(
        data,
        train_x=data.train_x[train],
        train_y=data.train_y[train],
        test_x=data.train_x[held],
        test_y=data.train_y[held],
        mean=mean,
        std=std,
    )


def initial(config: Config, data: Dataset) -> Split:
    """The network as first initialised; the same for every method of a comparison."""
    with isolated(Streams(config.seed)("init")):
        return config.model.build(data.shape, len(data.classes))


def assign(profiles: Profiles, clients: int, streams: Streams) -> list[str]:
    """The profile of each client, drawn once per seed (F-17) or as listed."""
    order = torch.randperm(clients, generator=streams("profile")).tolist()
    free, none = set(profiles.unconstrained_ids), set(profiles.none_ids)
    rest = [client for client in order if client not in free | none]
    free |= set(rest[: int(profiles.unconstrained * clients + 0.5)])  # a share of 0 where they are listed
    rest = [client for client in reversed(order) if client not in free | none]
    none |= set(rest[: int(profiles.none * clients + 0.5)])
    return ["unconstrained" if k in free else "none" if k in none else "constrained" for k in range(clients)]


def steady() -> None:
    """Convolutions on CUDA by algorithms that give the same numbers again, in float32 where that was asked for: cuDNN
    would choose the fastest, some of which add up in any order, and multiply in TF32, of 10 bits."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU. Raises DeviceError, or ConfigError for nonsense."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", name, "must be auto, cpu, cuda, cuda:<number> or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceError(f"device = {name!r}: this machine has no such device")
    return device


def _has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16; builds of PyTorch without oneDNN (macOS) cannot say, and emulate."""
    supported: Callable[[], bool] | None = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def quiet() -> None:
    """Telemetry of dependencies off, before any of them is imported."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
