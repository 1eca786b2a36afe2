"""The battery: every method through every check, on tiny data.

As tests: tests/test_battery.py. As a table:

    make battery        writes benchmarks/results/battery.json and docs/battery.md

A method's own numbers are proven in tests/byhand; here is what all methods must have in common.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import sys
import tempfile
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import tiny
import torch

from fedkeel import registry
from fedkeel.config import Config
from fedkeel.data.dataset import Dataset
from fedkeel.generators.gaussian import fit
from fedkeel.job import Job
from fedkeel.loop import Result, one_round, resume, run
from fedkeel.record import Record, Silent, numbers
from fedkeel.records import Reply, Samples, Server
from fedkeel.runtimes.inprocess import InProcessRuntime

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "benchmarks/results/battery.json", ROOT / "docs/battery.md"
SMALL: dict[str, tuple[str, ...]] = {
    "dynafed": (
        "algorithm.snapshots=2",
        "algorithm.iterations=2",
        "algorithm.syn_steps=2",
        "algorithm.per_class=1",
        "algorithm.tune_epochs=1",
    ),
    "fedavg_ft": ("personal.epochs=1",),
    "fedcda": ("algorithm.warmup=1",),
    "fedgen": ("algorithm.hidden=8", "algorithm.noise_size=4", "algorithm.generator_steps=2"),
    "fedrep": ("algorithm.head_epochs=1",),
    "fgl": ("algorithm.volume=4", "algorithm.epochs=1"),
    "regl": ("algorithm.volume=4", "personal.epochs=1"),
}
"""Options that make a method small enough; all others are as the method has them."""
NETS = {
    "batch": ('model={name="cnn",width=2,hidden=6,norm="batch"}',),
    "group": ('model={name="cnn",width=2,hidden=6,norm="group",groups=2}',),
}
SKEWED = ('partition={name="dirichlet",alpha=0.3,min_size=4}',)  # a section as a whole goes before the names of tests


class NotApplicable(Exception):
    """A check that says nothing about this method, and why."""


class Stop(Silent):
    """Ends a run after a round, as a crash would."""

    def __init__(self, number: int) -> None:
        self.number = number

    def finished_round(self, record: Record) -> None:
        if record["round"] == self.number:
            raise KeyboardInterrupt


@cache
def data() -> Dataset:
    """96 train and 40 test images."""
    return tiny.data()


@cache
def generator() -> tuple[str, ...]:
    """Overrides naming a generator of such images."""
    folder = Path(tempfile.mkdtemp(prefix="fedkeel-battery-"))
    public = tiny.data(seed=1)
    fit(Samples.real_ones(public.train_x, public.train_y), data().classes, 4).save(folder / "tiny.safetensors")
    return ("generator.name=gaussian", f"generator.path={folder}/tiny.safetensors", f"pool.dir={folder}/pool")


def config(method: str, *overrides: str, net: str = "batch") -> Config:
    """Three rounds of two out of four skewed clients."""
    return tiny.config(
        f"algorithm.name={method}",
        *SMALL.get(method, ()),
        *NETS[net],
        *SKEWED,
        *generator(),
        "rounds=3",
        "participation=0.5",
        "local.epochs=1",
        *overrides,
    )


def finite(result: Result) -> None:
    """Weights and metrics are numbers, and no client failed."""
    assert all(bool(torch.isfinite(t).all()) for t in result.weights.values() if t.is_floating_point())
    for record in result.rounds:
        assert not record["failed"], record["failed"]
        assert all(value == value for value in record.values() if isinstance(value, float)), record


def same(one: Result, other: Result) -> None:
    """Bit for bit."""
    assert [numbers(r) for r in one.rounds] == [numbers(r) for r in other.rounds]
    assert one.weights.keys() == other.weights.keys()
    for name, tensor in one.weights.items():
        assert identical(tensor, other.weights[name]), name


@cache
def plain(method: str) -> Result:
    """The run that others are compared with."""
    return run(config(method), data=data())


Tensors = dict[str, torch.Tensor]


class Watched(InProcessRuntime):
    """Notes what goes down to each client and what comes back."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.seen: list[tuple[Server, Mapping[str, torch.Tensor], Reply]] = []

    def run(
        self, server: Server, clients: Sequence[int], accepted: Mapping[int, int], measure: Collection[int]
    ) -> Iterator[Reply]:
        for reply in super().run(server, clients, accepted, measure):
            self.seen.append((server, self.job.mail(server, reply.client), reply))
            yield reply


@dataclass(frozen=True)
class Driven:
    """Some rounds of a method, with all that crossed: the server before, the client's mail and its reply."""

    job: Job
    server: Server
    accepted: Mapping[int, int]
    seen: Sequence[tuple[Server, Mapping[str, torch.Tensor], Reply]]


@cache
def driven(method: str, rounds: int) -> Driven:
    """The first rounds of a run."""
    job = Job(config(method), data())
    job.generate()
    runtime, accepted = Watched(job), dict[int, int]()
    server = replace(job.first_server(), layout=job.worker.weights.layout)
    for _ in range(rounds):
        server, record = one_round(job, runtime, server, accepted)
        assert not record["failed"], record["failed"]
    return Driven(job, server, accepted, runtime.seen)


def learns(method: str) -> None:
    """It runs, and parameters have moved: of those that clients share, and of those that are a client's own."""
    result = plain(method)
    finite(result)
    assert len(result.rounds) == 3
    assert sum(record["train/steps"] for record in result.rounds) > 0
    found = driven(method, 3)
    worker = found.job.worker
    layout, first = worker.weights.layout, found.seen[0][0]
    assert layout.shared + layout.own > 0
    assert layout.shared == 0 or not torch.equal(found.server.params, first.params), "nothing shared has moved"
    own = [reply.state["own"][: layout.own] for _, _, reply in found.seen]
    still = all(torch.equal(each, worker.initial_own[: layout.own]) for each in own)
    assert layout.own == 0 or not still, "nothing of a client's own has moved"


def repeats(method: str) -> None:
    """The same configuration gives the same bits, and PyTorch's own generator is neither read nor moved."""
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = run(config(method), data=data())
    assert torch.equal(before, torch.get_rng_state())
    same(plain(method), again)


def resumes(method: str) -> None:
    """Stopped after each round and resumed, it ends as if it had never stopped."""
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "run"
            try:
                run(config(method), data=data(), folder=place, listener=Stop(number))
            except KeyboardInterrupt:
                same(plain(method), resume(place, data=data()))
            else:
                raise AssertionError("the run was not stopped")


def declares(method: str) -> None:
    """In three rounds there cross the model down (or what `mail` has in its place) and its change up (or none),
    BatchNorm's statistics both ways, `mail`, and exactly what is declared: nothing else in any round, and each declared
    name in some round. The bytes on record are those of these tensors."""
    found = driven(method, 3)
    method_, (first, _, _) = found.job.method, found.seen[0]
    sends, shares = set(method_.sends()), set(method_.server_state(first.params))
    up, down = set[str](), {name for name, tensor in found.server.shared.items() if tensor.numel()}
    assert set(found.server.shared) == shares
    for server, mail, reply in found.seen:
        assert reply.update is not None and reply.buffers is not None
        assert set(server.shared) == shares
        assert set(reply.update.extra) <= sends
        up |= {name for name, tensor in reply.update.extra.items() if tensor.numel()}
        down |= {name for name, tensor in server.shared.items() if tensor.numel()}
        whole = {"params": server.params, **mail}
        received = [*whole.values(), server.buffers, *server.counters.values(), *server.shared.values()]
        returned = [reply.update.delta, reply.buffers, *reply.counters.values(), *reply.update.extra.values()]
        if method_.pooled:  # the data move instead, once, which is no traffic of a round
            received = returned = []
        assert (reply.bytes_down, reply.bytes_up) == (size(received), size(returned))
        assert whole["params"].shape == server.params.shape
        assert reply.update.delta.shape in (server.params.shape, (0,))  # none, where no model crosses
        assert len(reply.buffers) in (len(server.buffers), 0)
    assert up == sends, f"declared and never sent: {sorted(sends - up)}"
    assert down == shares, f"declared and never shared: {sorted(shares - down)}"


def size(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def apart(method: str) -> None:
    """After two rounds: training changes no bit of what clients receive or have kept, nor of what another client
    returned; and in reversed order each client returns and keeps the same bits."""
    found = driven(method, 2)
    job, server = found.job, found.server
    whole = {f"server {name}": getattr(server, name) for name in ("params", "buffers")}
    for name in ("counters", "shared", "private"):
        whole |= {f"server {name} {key}": tensor for key, tensor in getattr(server, name).items()}

    def returned(clients: Sequence[int]) -> dict[int, Tensors]:
        out: dict[int, Tensors] = {}
        held: list[tuple[Tensors, Tensors]] = []
        for client in clients:
            state, mail = job.store.open(client, found.accepted.get(client)), job.mail(server, client)
            given = whole | {f"mail {name}": tensor for name, tensor in mail.items()}
            given |= {f"state {name}": tensor for name, tensor in (state or {}).items()}
            held.append((given, copied(given)))
            reply = job.worker.fit(server, client, state, None, mail)
            assert reply.update is not None and reply.buffers is not None, reply.trace
            back = {"delta": reply.update.delta, "buffers": reply.buffers, "weight": torch.tensor(reply.update.weight)}
            for part, tensors in (("counter", reply.counters), ("sent", reply.update.extra), ("kept", reply.state)):
                back |= {f"{part} {name}": tensor for name, tensor in tensors.items()}
            out[client] = copied(back)
            held.append((back, out[client]))
            for now, then in held:
                same_bits(now, then, f"changed by client {client}: ")
        return out

    forward, backward = (returned(range(job.clients)[::step]) for step in (1, -1))
    for client, tensors in forward.items():
        same_bits(tensors, backward[client], f"depends on the order of the clients: client {client}'s ")


def copied(tensors: Tensors) -> Tensors:
    """Copies of the tensors."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(one: Tensors, other: Tensors, words: str) -> None:
    """Asserts that tensors are equal by name; `words` stand before a name that is not."""
    assert one.keys() == other.keys(), f"{words}{sorted(one.keys() ^ other.keys())}"
    for name, tensor in one.items():
        assert identical(tensor, other[name]), words + name


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether type, shape and every bit agree: to torch.equal 0.0 is -0.0, and a type is as good as another."""

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def group_norm(method: str) -> None:
    """It works with GroupNorm, which keeps no statistics."""
    finite(run(config(method, net="group"), data=data()))


def statistics(method: str) -> None:
    """BatchNorm's variances stay positive, and its counters stay integers."""
    weights = plain(method).weights
    variances = [t for name, t in weights.items() if name.endswith("running_var")]
    counters = [t for name, t in weights.items() if name.endswith("num_batches_tracked")]
    if not variances:
        raise NotApplicable("its statistics do not leave the clients")
    assert all(bool((t >= 0).all()) for t in variances)
    assert all(t.dtype == torch.int64 for t in counters)


def one_client(method: str) -> None:
    """One client, holding everything."""
    finite(run(config(method, "clients=1", "participation=1", "partition.name=iid"), data=data()))


def one_sample(method: str) -> None:
    """A client with a single sample beside an ordinary one."""
    images = tiny.data()
    rows = torch.arange(33)
    few = Dataset(**{**vars_of(images), "train_x": images.train_x[rows], "train_y": images.train_y[rows]})
    registry._things["partitions"]["lopsided"] = Lopsided
    try:
        finite(run(config(method, "clients=2", "participation=1.0", "partition.name=lopsided"), data=few))
    finally:
        del registry._things["partitions"]["lopsided"]


def everyone(method: str) -> None:
    """All clients in each round."""
    result = run(config(method, "participation=1.0"), data=data())
    finite(result)
    if not registry.get("algorithms", method).pooled:
        assert all(len(record["clients"]) == 4 for record in result.rounds)


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        learns, repeats, resumes, declares, apart, group_norm, statistics, one_client, one_sample, everyone,
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lopsided:
    """Client 0 has one sample, client 1 all others."""

    def split(self, labels: torch.Tensor, clients: int, classes: int, rng: object) -> list[torch.Tensor]:
        return [torch.tensor([0]), torch.arange(1, len(labels))]


def vars_of(images: Dataset) -> dict[str, object]:
    """The fields of a data set."""
    return {name: getattr(images, name) for name in images.__dataclass_fields__}


def methods() -> list[str]:
    """All registered methods."""
    return registry.names("algorithms")


def judge(method: str, check: str) -> str:
    """ "pass", "fail: why" or "n/a: why"."""
    try:
        CHECKS[check](method)
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:
        return f"fail: {type(error).__name__}: {error}".splitlines()[0][:200]
    return "pass"


def main(names: Sequence[str]) -> int:
    """Judges all (or the named) methods, writes the table, and fails when any check does. --page: writes the page of
    the last table, for files whose lengths have changed."""
    if names == ["--page"]:
        PAGE.write_text(markdown(json.loads(TABLE.read_text())))
        return 0
    torch.set_num_threads(1)
    table = {method: {check: judge(method, check) for check in CHECKS} for method in names or methods()}
    if not names:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        PAGE.write_text(markdown(table))
    sys.stdout.write(markdown(table))
    return int(any(word.startswith("fail") for row in table.values() for word in row.values()))


def markdown(table: dict[str, dict[str, str]]) -> str:
    """The table for the docs."""
    lines = ["# The battery", "", "Every method through every check (`make battery`); what each asks:", ""]
    about = {name.replace("_", " "): " ".join((check.__doc__ or "").split()) for name, check in CHECKS.items()}
    lines += [f"- **{name}**: {text}" for name, text in about.items()]
    lines += [
        "",
        "Code and lines are those of the method's file in `fedkeel/algorithms`: lines of code, without blank ones, "
        "comments and docstrings; and all lines.",
        "",
        "| method | " + " | ".join(about) + " | file | code | lines |",
        "|---" * (len(CHECKS) + 2) + "|---:|---:|",
    ]
    for method, row in table.items():
        path = Path(inspect.getfile(registry.get("algorithms", method)))
        code, every = lengths(path.read_text())
        lines.append(f"| `{method}` | " + " | ".join(row.values()) + f" | {path.name} | {code} | {every} |")
    return "\n".join(lines) + "\n"


def lengths(source: str) -> tuple[int, int]:
    """Lines of code in a Python file, without blank ones, comments and docstrings (of options too); and all lines."""
    texts = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    prose = {number for node in texts for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose), len(source.splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
