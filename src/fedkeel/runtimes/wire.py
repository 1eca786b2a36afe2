"""What crosses between server and clients on other machines: flat records of named tensors and plain values.

Tensors go as raw little-endian bytes with the name of their type, so that every bit arrives; values as one JSON text.
Nothing is pickled. What a client sends is checked here before anything else looks at it.

Down go the public part of the server (`params`, `buffers`, counters, `shared`) and what a method sends to this client
alone (`mail`); up go `delta`, `buffers`, counters, the declared `extra`, and a few numbers.
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fedkeel.local import size_of
from fedkeel.records import Reply, Server, Update

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
        "uint64", "uint32", "uint16", "uint8", "bool", "complex128", "complex64",
    )
}  # fmt: skip
MIB = 2**20
HEAVIEST = 2.0**53
"""Largest weight of an update; but for zero, the smallest one is its inverse."""
LARGEST = 1e9
"""Largest value in a tensor: so small that even weight * value ** 2, summed over ten thousand clients, is a float32."""
LOSS = torch.finfo(torch.float32).max
"""Largest training loss: means over clients stay finite."""
MOST_METRICS = 64
"""Numbers of a method's own in one reply."""
LONGEST = {"failure": 2_000, "trace": 20_000, "warnings": 2_000}
"""Characters of these texts; the rest is cut off."""
METRIC = re.compile(r"method/[\w .,:+/()%-]{1,100}")
FACTS = {
    "client", "round", "weight", "loss", "steps", "seconds", "metrics", "failure", "trace", "warnings", "versions",
}  # fmt: skip
"""What a reply may say beside its tensors."""


class Malformed(ValueError):
    """What a message holds cannot be read, or is not what it should be; the text says why."""


@dataclass
class Raw:
    """A tensor as bytes: the name of its type, its shape, its elements in C order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    made: Any = field(default=None, compare=False, repr=False)
    """What a sender made of it, once for all that it is sent to."""


@dataclass(frozen=True)
class Packet:
    """The content of a message: tensors by name, and a JSON object as text."""

    tensors: Mapping[str, Raw] = field(default_factory=dict)
    text: str = "{}"

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(raw.data) for raw in self.tensors.values()) + len(self.text)


@dataclass(frozen=True)
class Kind:
    """What is known beforehand of a tensor that is to come, and where it is to lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device


def raw(tensor: Tensor) -> Raw:
    """A tensor as bytes; any layout, any device."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    assert dtype in DTYPES and sys.byteorder == "little", f"cannot send {dtype}"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Raw(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def tensor_of(raw: Raw) -> Tensor:
    """The tensor, in memory of its own on the CPU. Raises Malformed."""
    if raw.dtype not in DTYPES:
        raise Malformed(f"there is no type {raw.dtype[:40]!r} of tensors")
    dtype, shape = DTYPES[raw.dtype], raw.shape
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(raw.data):
        raise Malformed(f"{len(raw.data)} bytes are no {raw.dtype} tensor of shape {short(list(shape)[:8], 100)}")
    if not raw.data:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and any(raw.data.translate(None, b"\0\1")):  # other bytes are undefined behaviour
        raise Malformed("a bool tensor holds other bytes than 0 and 1")
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(shape)


def dumps(facts: Mapping[str, object]) -> str:
    """Plain values as JSON; numbers that JSON has no word for must be None."""
    return json.dumps(facts, allow_nan=False)


def loads(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises Malformed."""

    def refuse(word: str) -> None:
        raise Malformed(f"JSON has no number {word}")

    try:
        found = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"its values cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise Malformed("its values are no JSON object")
    return found


def number(value: float) -> float | None:
    """A number as JSON has it: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


@cache
def versions() -> dict[str, str]:
    """What must be the same on all machines. Local labels of versions ("+cpu") may differ."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "byte order": sys.byteorder}
    for package in ("fedkeel", "torch", "flwr", "numpy"):
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "none"
    return found


def differing(theirs: object, ours: Mapping[str, str], who: str = "the server") -> str:
    """In words, how versions differ, "" where they do not: "torch 2.11.0, the server has 2.13.0"."""
    if not isinstance(theirs, Mapping):
        return "it does not say which versions it has"
    off = [(name, short(theirs.get(name, "none"), 40), own) for name, own in ours.items() if theirs.get(name) != own]
    return "; ".join(f"{name} {found}, {who} has {own}" for name, found, own in off)


# down -----------------------------------------------------------------------------------------------------------------


def public(server: Server) -> dict[str, Tensor]:
    """What every client gets, by the names it has in a message."""
    return {
        "params": server.params,
        "buffers": server.buffers,
        **{f"counter.{name}": tensor for name, tensor in server.counters.items()},
        **{f"shared.{name}": tensor for name, tensor in server.shared.items()},
    }


def down(shared: Mapping[str, Raw], mail: Mapping[str, Tensor], facts: Mapping[str, object]) -> Packet:
    """The message to one client. shared: `public` as bytes; its params stay out where `mail` has others."""
    own = {f"mail.{name}": raw(tensor) for name, tensor in mail.items()}
    kept = {name: each for name, each in shared.items() if name != "params" or "params" not in mail}
    return Packet({**kept, **own}, dumps(facts))


def received(packet: Packet, first: Server, round_: int) -> tuple[Server, dict[str, Tensor]]:
    """The server as a client sees it, and its mail. first: the server before the first round, as this client would make
    it: tensors go to the devices that it has them on, mail to that of the model. Raises Malformed."""
    device = first.params.device
    parts: dict[str, dict[str, Tensor]] = {"": {}, "counter": {}, "shared": {}, "mail": {}}
    for name, each in packet.tensors.items():
        part, dot, leaf = name.partition(".")
        home = first.shared[leaf].device if part == "shared" and leaf in first.shared else device
        place, key = (part, leaf) if dot else ("", name)
        if place not in parts:
            raise Malformed(f"the server sent {name!r}, which is not known here")
        parts[place][key] = tensor_of(each).to(home)
    mail, top = parts["mail"], parts[""]
    server = replace(
        first,
        params=mail.get("params", top.get("params", first.params)),
        buffers=top["buffers"],
        counters=parts["counter"],
        shared=parts["shared"],
        round=round_,
    )
    return server, mail


# up -------------------------------------------------------------------------------------------------------------------


def sent(reply: Reply) -> dict[str, Tensor]:
    """The tensors of a usable reply, by the names they have in a message."""
    update = reply.update
    if update is None:
        return {}
    assert reply.buffers is not None
    return {
        "delta": update.delta,
        "buffers": reply.buffers,
        **{f"counter.{name}": tensor for name, tensor in reply.counters.items()},
        **{f"extra.{name}": tensor for name, tensor in update.extra.items()},
    }


def up(reply: Reply, round_: int, warnings: Sequence[str] = ()) -> Packet:
    """A client's answer: `state` and `keep` stay behind."""
    facts = {
        "client": reply.client,
        "round": round_,
        "weight": None if reply.update is None else number(reply.update.weight),
        "loss": number(reply.loss),
        "steps": reply.steps,
        "seconds": round(reply.seconds, 4),
        "metrics": {name: number(value) for name, value in reply.metrics.items()},
        "failure": reply.failure,
        "trace": reply.trace,
        "warnings": list(warnings),
        "versions": versions(),
    }
    return Packet({name: raw(tensor) for name, tensor in sent(reply).items()}, dumps(facts))


def kinds(reply: Reply) -> dict[str, Kind]:
    """Of the tensors of a reply."""
    return {name: Kind(t.dtype, tuple(t.shape), t.device) for name, t in sent(reply).items()}


def assumed(packet: Packet, server: Server, sends: Collection[str]) -> dict[str, Kind]:
    """What replies of a round must look like where nothing but the first of them tells: the model's own parts have the
    server's shapes, what is declared beside them (`sends`) those of that reply."""
    known = {"delta": server.params, "buffers": server.buffers}
    known |= {f"counter.{name}": tensor for name, tensor in server.counters.items()}
    device = server.params.device
    extra = {name: each for name, each in packet.tensors.items() if name.startswith("extra.") and name[6:] in sends}
    return {name: Kind(t.dtype, tuple(t.shape), t.device) for name, t in known.items()} | {
        name: Kind(DTYPES.get(each.dtype, torch.float32), tuple(each.shape), device) for name, each in extra.items()
    }


@dataclass(frozen=True)
class Gate:
    """What the server takes from a client in one round.

    expected: the tensors that the method sends in this round (it sends the same ones for every client). metrics: what
    clients were asked to measure. limit: bytes of a reply. pooled: whether all data are in one place, so that none of
    this counts as traffic.
    """

    round: int
    expected: Mapping[str, Kind]
    metrics: Collection[str]
    limit: float
    pooled: bool = False

    def reply(self, packet: Packet, client: int) -> Reply:
        """A client's reply; with `failure` where anything is not as it should be. Never raises."""
        try:
            if fault := too_large(packet, self.limit):
                raise Malformed(fault)
            return self._reply(packet, loads(packet.text), client)
        except Malformed as fault:
            return Reply(client, failure=f"refused: {fault}")
        except Exception as error:  # whatever a client may think of
            return Reply(client, failure=f"refused: {type(error).__name__}: {short(error, 300)}")

    def _reply(self, packet: Packet, facts: Mapping[str, Any], client: int) -> Reply:
        if unlike := differing(facts.get("versions"), versions()):
            raise Malformed(unlike)
        if unknown := sorted(set(facts) - FACTS):
            raise Malformed(f"undeclared field {short(unknown[0], 60)!r}")
        if failure := facts.get("failure"):
            return Reply(client, failure=said(failure, "failure"), trace=said(facts.get("trace", ""), "trace"))
        for key, asked in (("client", client), ("round", self.round)):
            if facts.get(key) != asked or type(facts.get(key)) is not int:
                raise Malformed(f"it is of {key} {short(facts.get(key), 20)}, not {asked}")
        weight, steps, loss = facts.get("weight"), facts.get("steps"), facts.get("loss")
        if not _finite(weight) or not (weight == 0 or 1 / HEAVIEST <= weight <= HEAVIEST):
            raise Malformed(f"its weight is {short(weight, 30)}, not 0 or a number from 2^-53 to 2^53")
        if type(steps) is not int or not 0 <= steps < 2**53:
            raise Malformed(f"its number of steps is {short(steps, 30)}")
        if steps and not (_finite(loss) and abs(loss) <= LOSS):
            raise Malformed(f"its training loss is {short(loss, 30)} after {steps} steps")
        metrics, seconds = self._metrics(facts.get("metrics", {})), facts.get("seconds", 0.0)
        tensors = self._tensors(packet.tensors)
        extra = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("extra.")}
        counters = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("counter.")}
        return Reply(
            client,
            update=Update(float(weight), tensors["delta"], extra),
            buffers=tensors["buffers"],
            counters=counters,
            loss=float(loss) if _finite(loss) else math.nan,
            steps=steps,
            seconds=float(seconds) if _finite(seconds) else 0.0,
            bytes_up=0 if self.pooled else size_of(tuple(tensors.values())),
            metrics=metrics,
        )

    def _tensors(self, found: Mapping[str, Raw]) -> dict[str, Tensor]:
        """What came, all of it and nothing else, each on its device."""
        if unknown := sorted(set(found) - set(self.expected)):
            raise Malformed(f"undeclared field {short(unknown[0], 60)!r}")
        out = {}
        for name, kind in self.expected.items():
            if name not in found:
                raise Malformed(f"{name!r} is missing")
            each = found[name]
            if tuple(each.shape) != kind.shape or DTYPES.get(each.dtype) != kind.dtype:
                is_, want = (f"{short(d, 20)} {short(list(s)[:8], 100)}" for d, s in _pair(each, kind))
                raise Malformed(f"{name!r} is {is_}, not {want}")
            tensor = tensor_of(each)
            if fault := beyond(tensor):
                raise Malformed(f"{name!r} {fault}")
            out[name] = tensor.to(kind.device)
        return out

    def _metrics(self, found: object) -> dict[str, float]:
        if not isinstance(found, dict):
            raise Malformed("its metrics are no JSON object")
        own = [name for name in found if name not in self.metrics]
        for name in own:
            if not METRIC.fullmatch(name):
                raise Malformed(f"undeclared metric {short(name, 60)!r}")
        if len(own) > MOST_METRICS:
            raise Malformed(f"{len(own)} metrics of the method's own, at most {MOST_METRICS} are taken")
        for name, value in found.items():  # a loss that overflowed is None
            per_class = name in self.metrics and "/class/" in name
            if (value is not None or per_class) and not _finite(value):
                raise Malformed(f"metric {short(name, 60)!r} is {short(value, 30)}, not a number")
        return {name: math.nan if value is None else float(value) for name, value in found.items()}


def too_large(packet: Packet, limit: float) -> str:
    """What is wrong with a reply of more bytes than `limit`, "" for a smaller one."""
    if packet.size <= limit:
        return ""
    return f"a reply of {packet.size / MIB:.1f} MiB, federation.max_reply is {limit / MIB:.1f}"


def beyond(tensor: Tensor) -> str:
    """What is wrong with a tensor whose numbers no sum could take, "" where nothing is. Whole numbers are all fine."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return ""
    if tensor.element_size() == 1:  # float8 cannot be compared
        tensor = tensor.float()
    low, high = (float(value) for value in tensor.aminmax())  # a single NaN makes both NaN
    most = max(-low, high)
    if not math.isfinite(most):
        return "is not finite"
    return f"holds {most:.3g}, {LARGEST:g} is the most that is taken" if most > LARGEST else ""


def said(text: object, kind: str) -> str:
    """A text of a client's, fit to be printed: one line, cut off where it is too long. Of a traceback ("trace") there
    are several, indented so that none can be taken for a line of the log's own."""
    if kind != "trace":
        return short(text, LONGEST[kind])
    return "\n    ".join(short(line, LONGEST[kind]) for line in str(text)[: LONGEST[kind]].split("\n"))


def _pair(each: Raw, kind: Kind) -> list[tuple[str, Sequence[int]]]:
    return [(each.dtype, each.shape), (str(kind.dtype).removeprefix("torch."), kind.shape)]


def _finite(value: object) -> TypeGuard[float]:
    """Whether this is a finite number, as JSON has them."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:
        return False


def short(value: object, length: int) -> str:
    """What another machine sent, as a piece of one line: cut off, a space for what is not printable (line breaks,
    control characters, halves of characters, which a terminal would obey or a file refuse)."""
    text = str(value)
    shown = "".join(char if char.isprintable() else " " for char in text[:length])
    return shown if len(text) <= length else f"{shown}..."
