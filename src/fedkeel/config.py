"""The configuration of a run: frozen dataclasses, from TOML with dotted overrides, and back.

Sections that name a registered thing (`[algorithm] name = "fedprox"`) take that thing's options as their other keys;
`fedkeel show NAME` prints them. Unknown keys are errors.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fedkeel import registry
from fedkeel.algorithms.base import Algorithm, Over
from fedkeel.data.noise import Noise
from fedkeel.data.sources import resolve
from fedkeel.data.transforms import Augment
from fedkeel.errors import ConfigError, nearest
from fedkeel.federation import Cluster, Federation
from fedkeel.generators.base import Generator
from fedkeel.local import Training
from fedkeel.models.split import Model
from fedkeel.options import build, keyed, option, plain
from fedkeel.partition.base import Partitioner
from fedkeel.personal import Personal
from fedkeel.privacy import Privacy
from fedkeel.robust import Robust

Table = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """What clients can compute: the section [profiles]. A client in neither group is "constrained".

    "unconstrained" ones may train on more data than they have (FBL, IV-D), "none" cannot generate at all (FBL, V-E).
    Groups are drawn once per seed, unless they are listed by id.
    """

    unconstrained: float = option(0.0, "share of clients that are unconstrained (lambda)", ge=0, le=1)
    none: float = option(0.0, "share of clients that cannot generate", ge=0, le=1)
    unconstrained_ids: tuple[int, ...] = option((), "the unconstrained clients by id, instead of a share", ge=0)
    none_ids: tuple[int, ...] = option((), "the clients that cannot generate by id, instead of a share", ge=0)

    def __post_init__(self) -> None:
        if self.unconstrained + self.none > 1:
            raise ConfigError("none", self.none, f"must be at most {1 - self.unconstrained:g}: the two shares overlap")
        for group, share, ids in (
            ("unconstrained", self.unconstrained, self.unconstrained_ids),
            ("none", self.none, self.none_ids),
        ):
            if share and ids:
                allowed = f"cannot go with {group} = {share:g}: give a share or list clients"
                raise ConfigError(f"{group}_ids", list(ids), allowed)
        both = sorted(set(self.unconstrained_ids) & set(self.none_ids))
        if both:
            raise ConfigError("none_ids", both, "these clients are listed as unconstrained too")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured and when: the section [evaluate]."""

    every: int = option(
        1,
        "rounds between evaluations of the global model (the last round is always evaluated); above 1 the headline, "
        "the mean over the last 10 evaluations, is of more than the last 10 rounds and another number",
        ge=1,
    )
    local_every: int = option(0, "rounds between evaluations of clients before and after training; 0 = never", ge=0)
    local_rounds: tuple[int, ...] = option(
        (), "rounds in which every client's accuracy per class before and after training is kept (ReGL, Fig. 7)", ge=1
    )
    local_clients: tuple[int, ...] = option(
        (), "the clients of whom it is kept; empty = all that take part in such a round", ge=0
    )
    batch: int = option(500, "images in a batch of evaluation", ge=1)
    validation: float = option(
        0.0,
        "share of the train images, stratified, set aside before they are partitioned and measured on in place of the "
        "test images (R-18)",
        ge=0,
        lt=1,
        keyed=None,
    )


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Where synthetic images are kept and who shares them: the section [pool]."""

    dir: str = option("", "folder of image pools; empty = the user's cache folder")
    sharing: Literal["per_client", "shared"] = option(
        "per_client", "each client has images of its own, or all draw from one pool per class (F-21)"
    )
    tuning_budget: float | None = option(
        None, "seconds that tuning the generator on one client may take; absent: as long as it takes", gt=0
    )
    tuning_budget_unconstrained: float | None = option(
        None, "the same for a client that is unconstrained (section [profiles]); absent: tuning_budget", gt=0
    )


@dataclass(frozen=True, kw_only=True)
class ByProfile:
    """Generators of clients whose profile is not served by [generator]: the sections [generators.<profile>]."""

    constrained: Generator | None = None
    unconstrained: Generator | None = None

    def items(self) -> list[tuple[str, Generator]]:
        """Profiles and generators, where there are any."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return [(profile, generator) for profile, generator in found.items() if generator is not None]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    name: str = option("run", "the run's folder is runs_dir/name")
    seed: int = option(1, "one seed for all streams of randomness", ge=0)
    rounds: int = option(200, "rounds of communication", ge=1)
    clients: int = option(20, "registered clients", ge=1)
    participation: int | float = option(
        0.5, "share (a number up to 1.0) or count (a whole number) of clients a round", gt=0
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int = option(1, "threads of one PyTorch operation on a CPU", ge=1)
    workers: int | None = option(
        None, "worker processes of runtime = 'pool', at most; absent: as many as this process may use cores", ge=1
    )
    lanes: int = option(16, "clients that runtime = 'batched' trains at once", ge=1)
    runtime: str = option("inprocess", "what runs the clients")
    runs_dir: str = option("runs", "folder of all runs")
    min_replies: int = option(1, "usable updates without which a round fails the run", ge=1)
    on_failure: Literal["continue", "stop"] = option("continue", "what a client without usable update does to the run")
    checkpoint_every: int = option(1, "rounds between checkpoints", ge=1)
    memory: float = option(
        2.0,
        "gigabytes held in memory, of client states and again of tuned generators; the rest lies on disk",
        gt=0,
        le=1e6,
    )
    tensorboard: bool = option(False, "write TensorBoard events beside rounds.jsonl (extra `track`)")
    mlflow: str = option("", "MLflow tracking address, as http://localhost:5000; empty = none (extra `track`)")
    data: Any
    partition: Partitioner
    model: Model
    local: Training = field(default_factory=Training)
    algorithm: Algorithm = field(default_factory=Algorithm)
    balance: Over | None = None
    generator: Generator | None = None
    generators: ByProfile | None = None
    pool: PoolOptions = field(default_factory=PoolOptions)
    profiles: Profiles = field(default_factory=Profiles)
    augment: Augment = field(default_factory=Augment)
    noise: Noise = field(default_factory=Noise)
    evaluate: Evaluation = field(default_factory=Evaluation)
    personal: Personal = field(default_factory=Personal)
    federation: Federation = field(default_factory=Federation)
    ray: Cluster = field(default_factory=Cluster)
    privacy: Privacy | None = None
    robust: Robust | None = None

    def __post_init__(self) -> None:
        if isinstance(self.participation, float) and self.participation > 1:
            raise ConfigError("participation", self.participation, "a share is at most 1.0; a count is a whole number")
        if isinstance(self.participation, int) and self.participation > self.clients:
            raise ConfigError("participation", self.participation, f"there are {self.clients} clients only")
        if self.min_replies > self.cohort:
            allowed = f"at most {self.cohort}, the clients of a round (participation)"
            raise ConfigError("min_replies", self.min_replies, allowed)
        listed = {
            "profiles.unconstrained_ids": self.profiles.unconstrained_ids,
            "profiles.none_ids": self.profiles.none_ids,
            "evaluate.local_clients": self.evaluate.local_clients,
        }
        for key, ids in listed.items():
            outside = [client for client in ids if client >= self.clients]
            if outside:
                raise ConfigError(key, outside, f"clients are numbered 0 to {self.clients - 1}")
        late = [number for number in self.evaluate.local_rounds if number > self.rounds]
        if late:
            raise ConfigError("evaluate.local_rounds", late, f"rounds are numbered 1 to {self.rounds}")
        if self.federation.sites and len(self.federation.sites) != self.clients:
            raise ConfigError(
                "federation.sites", list(self.federation.sites), f"names {len(self.federation.sites)} of {self.clients}"
            )
        plain = self.name.strip() and "/" not in self.name and not self.name.startswith(".") and self.name.isprintable()
        if not plain or len(self.name.encode()) > LONGEST:
            raise ConfigError("name", self.name, f"must be a plain folder name of at most {LONGEST} bytes")
        if self.balance is not None and isinstance(self.algorithm, Over):
            names = [registry.name_of("algorithms", type(thing)) for thing in (self.balance, self.algorithm)]
            raise ConfigError("balance.name", names[0], f"cannot work over {names[1]}, which balances data itself")
        if self.balance is not None:
            self._check_weights(self.balance)
            try:
                _ = replace(self.balance, base=self.algorithm).inner  # made here for the checks of its options
            except ConfigError as error:
                raise error.under("balance.") from None
        if self.privacy is not None or self.robust is not None:
            self._check_sums()

    def _check_weights(self, balance: Over) -> None:
        """Raises ConfigError where the algorithm was given weights that those of [balance] stand in for."""
        for item in fields(self.algorithm):
            mine = getattr(self.algorithm, item.name)
            if item.name in ("weights", "denominator") and mine not in (item.default, getattr(balance, item.name)):
                allowed = f"the weights of [balance] hold: set balance.{item.name} instead"
                raise ConfigError(f"algorithm.{item.name}", mine, allowed)

    def _check_sums(self) -> None:
        """Raises ConfigError where [privacy] or [robust] cannot do what they are there for."""
        section = "privacy" if self.privacy is not None else "robust"
        owner = "algorithm" if self.balance is None else "balance"
        for key, method in (("algorithm", self.algorithm), ("balance", self.balance)):
            try:
                if method is None or method.only_sums():
                    continue
            except ConfigError as error:
                raise ConfigError(f"{key}.{error.key}", error.value, f"under [{section}] {error.allowed}") from None
            known = [name for name in registry.names("algorithms") if _sums(name)]
            why = f"its server does not work on sums of updates alone, which [{section}] needs; {', '.join(known)} do"
            raise ConfigError(f"{key}.name", registry.name_of("algorithms", type(method)), why)
        if self.robust is not None:
            if self.privacy is not None:
                raise ConfigError("robust.name", self.robust.name, "not with [privacy], whose noise is on a plain sum")
            if reason := self.robust.too_few(self.cohort):
                raise ConfigError("robust.name", self.robust.name, reason)
        if self.privacy is not None:
            self.privacy.delta_of(self.clients)
            if self.method.weights != "uniform":
                allowed = "sample counts must not cross under [privacy]: must be 'uniform'"
                raise ConfigError(f"{owner}.weights", self.method.weights, allowed)
            if self.checkpoint_every != 1:
                allowed = "must be 1 under [privacy]: a round that is done again releases more than is counted"
                raise ConfigError("checkpoint_every", self.checkpoint_every, allowed)

    @property
    def method(self) -> Algorithm:
        """The algorithm, under the balancing method of [balance] where there is one."""
        return self.algorithm if self.balance is None else replace(self.balance, base=self.algorithm)

    def generator_of(self, profile: str) -> Generator | None:
        """The generator of clients with this profile."""
        own = None if self.generators is None else dict(self.generators.items()).get(profile)
        return own or self.generator

    def tuning_budget_of(self, profile: str) -> float | None:
        """Seconds that a client with this profile may tune its generator for; None: as many as it takes."""
        own = self.pool.tuning_budget_unconstrained if profile == "unconstrained" else None
        return self.pool.tuning_budget if own is None else own

    @property
    def cohort(self) -> int:
        """Clients a round: max(1, round(q N))."""
        if isinstance(self.participation, int):
            return self.participation
        return max(1, int(self.participation * self.clients + 0.5))

    def enough(self, asked: int) -> int:
        """Usable updates that do where so many clients are asked: a pooled method has one."""
        return min(self.min_replies, asked)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name

    def table(self) -> dict[str, object]:
        """Plain values: as TOML this is the run's config.toml, from which the run can be made again."""
        return self._table(plain)

    def _table(self, values: Callable[[object], dict[str, object]]) -> dict[str, object]:
        """Sections by name; `values` says what stands in each."""
        sections = [item.name for item in fields(self) if is_dataclass(getattr(self, item.name))]
        out = plain(self, leave_out=sections)
        for key in sections:
            thing = getattr(self, key)
            if isinstance(thing, ByProfile):
                out[key] = {profile: _with_name("generators", one, values) for profile, one in thing.items()}
            else:
                out[key] = _with_name(NAMED[key], thing, values) if key in NAMED else values(thing)
        return {key: value for key, value in out.items() if value != {}}

    def toml(self) -> str:
        """The same as text."""
        return tomli_w.dumps(self.table())

    def key(self) -> str:
        """SHA-256 over all that decides the numbers of the run (not its name, folder, runtime or what it writes)."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()

    def decisive(self) -> dict[str, object]:
        """What the key is made of."""
        table = {key: value for key, value in self._table(keyed).items() if key not in NO_NUMBERS}
        table["pool"] = self.pool.sharing
        table["evaluate"] = {key: value for key, value in keyed(self.evaluate).items() if key not in NO_NUMBERS}
        return table


NAMED = {
    "data": "datasets",
    "partition": "partitions",
    "model": "models",
    "algorithm": "algorithms",
    "balance": "algorithms",
    "generator": "generators",
}
"""Sections that name a thing, and its room; the keys of all others are fixed."""
LONGEST = 200
"""Of a run's name, in bytes: file systems take 255, and files beside the folder are named after it."""
NO_NUMBERS = {
    "name", "runs_dir", "runtime", "workers", "lanes", "checkpoint_every",
    "memory", "tensorboard", "mlflow", "pool", "device", "on_failure", "federation", "ray",
    "min_replies", "local_rounds", "local_clients",
}  # fmt: skip
"""Keys that have no say in a run's numbers."""
_DEFAULTS: dict[str, dict[str, object]] = {
    "data": {"name": "fashion"},
    "partition": {"name": "dirichlet"},
    "model": {"name": "resnet18"},
}


def _sums(name: str) -> bool:
    cls: type[Algorithm] = registry.get("algorithms", name)
    return cls.sums


def parse(table: Table, overrides: Sequence[str] = ()) -> Config:
    """A configuration from nested tables (as TOML gives them) and overrides such as "local.lr=0.1".

    Raises ConfigError naming the dotted key.
    """
    merged = override(table, overrides)
    _check_methods(merged)
    merged.pop("methods", None)
    values = dict(merged)
    for key, room in NAMED.items():
        section = merged.get(key, _DEFAULTS.get(key))
        if isinstance(section, Mapping):
            section = {**_DEFAULTS.get(key, {}), **section}
        if section is not None:
            values[key] = _named(key, room, section)
    _profiled(values, merged)
    config = build(Config, values)
    if config.balance is not None and config.algorithm.pooled:
        name = registry.name_of("algorithms", type(config.algorithm))
        raise ConfigError("balance", name, "there are no clients to balance under a method that pools all data")
    return config


def override(table: Table, texts: Sequence[str]) -> dict[str, object]:
    """A copy of `table` with overrides such as "local.lr=0.1", whatever their order; of one key the last stands.

    A section's name goes before its other keys: options of another thing do not carry over, those given here are of the
    thing named here. Raises ConfigError.
    """
    if not isinstance(table, Mapping):
        raise ConfigError("table", table, "must be a table of tables; fedkeel.read takes a file's name")
    out: dict[str, Any] = copy.deepcopy(dict(table))
    for text in sorted(texts, key=_turn):
        _override(out, text, table)
    return out


def read(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a TOML file; `name` is the file's when it gives none.

    Options of its method in [methods.<name>] hold as they do in a comparison; overrides of [algorithm] go before them.
    Raises ConfigError.
    """
    table = override(load(path), overrides)
    section, methods = table.get("algorithm", {}), table.get("methods", {})
    name = section.get("name", "fedavg") if isinstance(section, Mapping) else None
    if not isinstance(name, str) or not isinstance(methods, Mapping) or name not in methods:
        return parse(table)
    table["algorithm"] = _of_method(table, name)
    return parse(table, [text for text in overrides if _path(text)[0] == "algorithm"])


def load(path: Path | str) -> dict[str, object]:
    """The tables of a TOML file. Raises ConfigError."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError("CONFIG", str(path), "there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("CONFIG", str(path), f"cannot be read as TOML: {error}") from None
    table.setdefault("name", path.stem)
    return table


def with_method(table: Table, spec: str) -> dict[str, object]:
    """`table` with another method: "fedprox", "fbl:M3" (a preset), "fbl(25%)" (a quarter of clients unconstrained),
    "fbl:M3(25%)".

    Options for each method are taken from `[methods.<name>]`; those of `[algorithm]` go with its own name only. A
    preset named here goes before both.
    """
    name, preset, percent = spec_parts(spec)
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    section = _of_method(out, name)
    if preset is not None:  # what it sets is asked for here, the rest of the table for any of the method's forms
        presets = getattr(registry.get("algorithms", name), "presets", {})
        section = {key: value for key, value in section.items() if key not in presets.get(preset, {})}
        section["preset"] = preset
    out["algorithm"] = section
    if percent is not None:
        profiles = out.get("profiles", {})
        if not isinstance(profiles, dict):
            raise ConfigError("profiles", profiles, "must be a table of keys")
        if profiles.get("unconstrained_ids"):  # those listed would stand, and the share would mean nothing
            allowed = f"cannot go with {spec}: give a share or list clients"
            raise ConfigError("profiles.unconstrained_ids", profiles["unconstrained_ids"], allowed)
        out["profiles"] = {**profiles, "unconstrained": float(percent) / 100}
    return out


def spec_parts(spec: str) -> tuple[str, str | None, str | None]:
    """Name, preset and per cent of a method as `with_method` reads it. Raises ConfigError."""
    parts = re.fullmatch(r"([^:()]*)(?::([^:()]+))?(?:\((\d+(?:\.\d+)?)%\))?", spec)
    if parts is None:
        raise ConfigError("algorithms", spec, "must look like fbl(25%), fbl:M3 or fbl:M3(25%)")
    name, preset, percent = parts.groups()
    return name, preset, percent


def _of_method(table: Table, name: str) -> dict[str, object]:
    """What `table` says of one method: in [algorithm], where that is its own, and in [methods.<name>]."""
    own, methods = table.get("algorithm"), table.get("methods", {})
    if not isinstance(methods, Mapping) or not isinstance(methods.get(name, {}), Mapping):
        raise ConfigError("methods", methods, f"must hold one table a method, such as [methods.{name}]")
    section = dict(own) if isinstance(own, Mapping) and own.get("name", "fedavg") == name else {}
    return {**section, **methods.get(name, {}), "name": name}


def _check_methods(table: Table) -> None:
    """Makes each method of [methods] once, used or not: a misspelt name or option would be dropped without a word."""
    methods = table.get("methods", {})
    if not isinstance(methods, Mapping):
        raise ConfigError("methods", methods, "must hold one table a method, such as [methods.fbl]")
    for name in methods:
        if name not in registry.names("algorithms"):
            near = nearest(name, registry.names("algorithms"))
            raise ConfigError(f"methods.{name}", methods[name], "there is no such method", near)
        _named(f"methods.{name}", "algorithms", _of_method(table, name))


def check_algorithm(table: Table, methods: Collection[str], overrides: Sequence[str]) -> None:
    """Raises ConfigError for an [algorithm] that cannot be, and for overrides of it when it is none of `methods`, those
    that are compared: they would be dropped without a word."""
    section = table.get("algorithm", {})
    _named("algorithm", "algorithms", section)
    name = section.get("name", "fedavg") if isinstance(section, Mapping) else None
    for text in overrides:
        key, _, value = text.partition("=")
        if _path(text)[0] == "algorithm" and name not in methods:
            allowed = f"[algorithm] is {name}, which is not compared; options of a method are set as methods.NAME.KEY"
            raise ConfigError(key.strip(), value, allowed)


def _profiled(values: dict[str, object], table: Table) -> None:
    """Builds [generators.<profile>], each over [generator] unless it names another one."""
    given = table.get("generators")
    if given is None:
        return
    base, profiles = table.get("generator"), [item.name for item in fields(ByProfile)]
    if not isinstance(given, Mapping):
        raise ConfigError("generators", given, f"must hold tables: {', '.join(profiles)}")
    built: dict[str, Any] = {}
    for profile, section in given.items():
        key = f"generators.{profile}"
        if profile == "none":
            raise ConfigError(key, section, "clients of this profile cannot generate")
        if profile not in profiles:
            known = f"no such profile with a generator; known here: {', '.join(profiles)}"
            raise ConfigError(key, section, known, nearest(profile, profiles))
        if isinstance(section, Mapping) and isinstance(base, Mapping) and section.get("name") in (None, base["name"]):
            section = {**base, **section}
        built[profile] = _named(key, "generators", section)
    values["generators"] = ByProfile(**built)


def _with_name(room: str, thing: object, values: Callable[[object], dict[str, object]]) -> dict[str, object]:
    return {"name": registry.name_of(room, type(thing)), **values(thing)}


def _known(key: str, room: str) -> list[str]:
    """Names that a section may have."""
    names = registry.names(room)
    return [name for name in names if issubclass(registry.get(room, name), Over)] if key == "balance" else names


def _named(key: str, room: str, section: object) -> object:
    if not isinstance(section, Mapping):
        raise ConfigError(key, section, 'must be a table with a name, such as { name = "..." }')
    if key == "data":
        return resolve(section)
    options = dict(section)
    name = options.pop("name", "fedavg" if key == "algorithm" else None)
    if not isinstance(name, str):
        raise ConfigError(f"{key}.name", name, f"must be one of {', '.join(_known(key, room))}")
    if key == "balance" and name not in (known := _known(key, room)):
        allowed = f"must be a method that works over another: {', '.join(known)}"
        raise ConfigError("balance.name", name, allowed, nearest(name, known))
    cls = registry.get(room, name)
    presets = getattr(cls, "presets", {})
    preset = options.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in presets:
            allowed = ", ".join(presets) or "none"
            raise ConfigError(f"{key}.preset", preset, f"presets of {name}: {allowed}", nearest(str(preset), presets))
        options = {**presets[preset], **options}
    return build(cls, options, key)


def _path(text: str) -> list[str]:
    """Section and key of an override: ["local", "lr"] of "local.lr=0.1"."""
    return text.partition("=")[0].strip().split(".")


def _turn(text: str) -> tuple[int, bool]:
    """Whole sections go before their keys, and names before other keys."""
    path = _path(text)
    return len(path), path[-1] != "name"


def _chosen(section: Sequence[str], table: Table) -> object:
    """The name that stands for a section of `table` without one; None where no thing is chosen or none is known."""
    if section[0] == "generators":  # a profile's is over [generator]
        base = table.get("generator")
        return base.get("name") if isinstance(base, Mapping) else None
    return "fedavg" if section[0] == "algorithm" else _DEFAULTS.get(section[0], {}).get("name")


def _override(table: dict[str, Any], text: str, before: Table) -> None:
    """Sets one key; `before` is the table without overrides."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise ConfigError("override", text, "must look like local.lr=0.1")
    *path, leaf = dotted.strip().split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(dotted, value, f"{part} is not a table")
    parsed: object
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word
    chooses = path[:-1] == ["generators"] or (len(path) == 1 and path[0] in NAMED)
    if leaf == "name" and chooses and table.get("name", _chosen(path, before)) not in (None, parsed):
        table.clear()  # options of another thing do not carry over
    table[leaf] = parsed
