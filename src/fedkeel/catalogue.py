"""What there is: the things of every room with their documentation and options, and what each method sends."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, get_type_hints

import torch

from fedkeel import registry
from fedkeel.config import NAMED, Config, parse
from fedkeel.data.sources import arrays
from fedkeel.errors import ConfigError, UnknownName, nearest
from fedkeel.job import Job
from fedkeel.loop import one_round
from fedkeel.options import Option, options
from fedkeel.privacy import Privacy
from fedkeel.records import Samples
from fedkeel.robust import Robust

SECTIONS: dict[str, type] = (
    {"run": Config}
    | {
        key: kind
        for key, kind in get_type_hints(Config).items()
        if key not in NAMED and isinstance(kind, type) and is_dataclass(kind)
    }
    | {"privacy": Privacy, "robust": Robust}
)
"""Sections of a configuration whose keys are fixed; "run" stands for the keys outside any section."""


@dataclass(frozen=True)
class Thing:
    """Something that a configuration can name, or one of its sections (room "sections")."""

    room: str
    name: str
    cls: type

    def doc(self) -> str:
        """Its first line of documentation: the class's own, else the module's."""
        return self.about().split("\n\n")[0].replace("\n", " ")

    def about(self) -> str:
        """All of its documentation."""
        text = self.cls.__doc__ or ""
        if not text or text.startswith(f"{self.cls.__name__}("):  # the signature that `dataclass` writes
            module = inspect.getmodule(self.cls)
            text = (module.__doc__ if module is not None else "") or ""
        return inspect.cleandoc(text)

    def parts(self) -> dict[str, str]:
        """What a method's module says of its departures from the paper and of what crosses, a paragraph each."""
        module = inspect.getmodule(self.cls) if self.room == "algorithms" else None
        paragraphs = inspect.cleandoc((module and module.__doc__) or "").split("\n\n")
        heads = {"departures": "Departure", "crosses": "What crosses"}
        found = {name: [text for text in paragraphs if text.startswith(head)] for name, head in heads.items()}
        return {name: texts[0] for name, texts in found.items() if texts}

    def options(self) -> list[Option]:
        """Its options, but those of all methods that it has no use for."""
        return [option for option in options(self.cls) if option.name not in getattr(self.cls, "unused", ())]

    def as_json(self) -> dict[str, object]:
        """Plain values, for scripts."""
        out: dict[str, Any] = {"room": self.room, "name": self.name, "doc": self.doc()}
        out["options"] = [
            {
                "name": option.name,
                "type": option.kind,
                "default": option.default,
                "allowed": option.meaning.allowed(),
                "doc": option.meaning.doc,
                "grid": list(option.meaning.grid),
                "off": option.meaning.off,
            }
            for option in self.options()
        ]
        for fact in ("kind", "paper", "presets"):
            if self.room == "algorithms" and (value := getattr(self.cls, fact, None)):
                out[fact] = value
        return out | {name: text.replace("\n", " ") for name, text in self.parts().items()}


@dataclass(frozen=True)
class Traffic:
    """What crosses beside the model, by name; all bytes of a round as a factor of FedAvg's, down to the clients and up
    to the server; and what a client keeps between rounds, as a factor of the model's bytes. The factors are NaN for a
    method that cannot be measured with its default options."""

    down: tuple[str, ...]
    up: tuple[str, ...]
    times_down: float
    times_up: float
    times_kept: float

    def from_server(self) -> list[str]:
        """All that the server sends, the model or the weights that stand in for it first."""
        return ["params" if "params" in self.down else "model", *(name for name in self.down if name != "params")]

    def beside(self) -> str:
        """In words, what crosses beside the model."""
        down = [f"{name} down" + " in place of the model" * (name == "params") for name in self.down]
        return ", ".join(down + [f"{name} up" for name in self.up])


def things(room: str) -> list[Thing]:
    """All things of a room by name. Raises UnknownName."""
    return [Thing(room, name, registry.get(room, name)) for name in registry.names(room)]


def find(name: str) -> Thing:
    """The thing or section of that name: a section before others, "room/name" where rooms share one.

    Raises UnknownName for a room that is not there, ConfigError for a name that is not there or not the only one.
    """
    room, slash, leaf = name.partition("/")
    everything = [Thing("sections", key, cls) for key, cls in SECTIONS.items()]
    everything += [thing for each in registry.PACKAGES for thing in things(each)]
    if slash and room not in (rooms := ["sections", *registry.PACKAGES]):
        raise UnknownName("rooms", room, rooms)
    if slash:
        name, everything = leaf, [thing for thing in everything if thing.room == room]
    found = [thing for thing in everything if thing.name == name]
    if not found and name in NAMED:
        known = f"this section has the options of the thing it names (fedkeel list {NAMED[name]})"
        raise ConfigError("NAME", name, known)
    if not found:
        near = nearest(name, [thing.name for thing in everything])
        raise ConfigError("NAME", name, "there is no such thing (fedkeel list shows all)", near)
    if len(found) > 1 and found[0].room != "sections":
        known = " or ".join(f"{thing.room}/{thing.name}" for thing in found)
        raise ConfigError("NAME", name, f"several things have this name: say {known}")
    return found[0]


def traffic(names: list[str]) -> dict[str, Traffic]:
    """What each method sends and keeps, measured in the third round of two clients, on the small CNN and random images
    (by then a method that starts with something else has settled). Bytes are averages of a client."""
    base = _measure("fedavg")
    out = {}
    for name in names:
        try:
            found = _measure(name)
        except Exception:  # a method that needs options of its own, or someone else's that does not work
            out[name] = Traffic((), (), math.nan, math.nan, math.nan)
            continue
        down, up, kept = (
            part / whole for part, whole in zip(found.bytes, base.bytes[:2] + base.bytes[:1], strict=True)
        )
        out[name] = Traffic(found.down, found.up, down, up, kept)
    return out


@dataclass(frozen=True)
class _Measured:
    down: tuple[str, ...]
    up: tuple[str, ...]
    bytes: tuple[float, float, float]


def _measure(name: str) -> _Measured:
    """Names of what goes down and up beside the model; bytes down, up and kept, of a client, in the third round."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8, generator=rng), torch.arange(40) % 10
    table = {
        "clients": 2,
        "participation": 2,
        "rounds": 3,
        "device": "cpu",
        "partition": {"name": "iid"},
        "model": {"name": "cnn", "norm": "batch"},
        "local": {"batch": 10, "max_steps": 1},
        "algorithm": {"name": name, **getattr(registry.get("algorithms", name), "trial", {})},
    }
    job = Job(parse(table), arrays(train=(x, y), test=(x[:10], y[:10])))

    def noise(client: int, counts: torch.Tensor, first: int) -> Samples:
        labels = torch.repeat_interleave(torch.arange(10), counts)
        return Samples.fake_ones(torch.zeros((len(labels), 1, 28, 28), dtype=torch.uint8), labels)

    job.__dict__["images"] = noise  # in place of a generator: only sizes matter here
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    runtime = registry.get("runtimes", "inprocess")().start(job)
    accepted: dict[int, int] = {}
    for _ in range(3):
        server, record = one_round(job, runtime, server, accepted)
    clients = record["clients"]
    states = [job.store.get(client, accepted[client]) for client in clients if client in accepted]
    kept = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
    sizes = (record["bytes/down"], record["bytes/up"], kept)
    down, up, kept_each = (size / len(clients) for size in sizes)
    mail = tuple(job.method.mail(replace(server, lab=job.lab(3)), clients[0]))
    return _Measured((*server.shared, *mail), job.method.sends(), (down, up, kept_each))
