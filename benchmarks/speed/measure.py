"""The measurements, by the keys that they write into benchmarks/results/speed.json."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ENVIRONMENT, HERE, Contender, Race, Unavailable, fedkeel, ours, quartiles, race, unavailable

BOUNDS = {
    "W1_float32": 0.66,
    "W2_float32": 0.88,
    "W2_bf16": 0.52,
    "W0_float32": 0.88,
    "loop_overhead": 1.05,
    "FBL_over_FedAvg": 1.15,
    "SCAFFOLD_over_FedAvg": 1.08,
    "FedProx_over_FedAvg": 1.08,
    "FedDyn_over_FedAvg": 1.08,
    "import_s": 1.0,
    "help_s": 0.5,
    "memory_100k_over_100": 1.2,
    "round_100k_over_100": 1.1,
    "two_workers_wall": 0.66,
    "two_workers_cpu": 1.15,
}
BF16 = ("local.precision=bfloat16",)
TWO_WORKERS = ("runtime=pool", "workers=2")
"""Options of fedkeel that these measurements are about."""
METHODS: dict[str, tuple[str, ...]] = {
    "centralized": ("local.steps=250",),  # all data are one client's: as many steps as ten clients do
    "dynafed": ("algorithm.snapshots=3", "algorithm.iterations=2"),  # distils once, in the warm-up
    "fbl": ("generator.name=gaussian", "partition.name=shards"),
    "fedcda": ("algorithm.warmup=0",),
    "fedrep": ("algorithm.head_epochs=4",),  # and one on the body: five, as the others
    "fgl": ("algorithm.volume=50", "algorithm.epochs=1", "generator.name=gaussian"),
    "regl": ("algorithm.volume=10", "generator.name=gaussian"),  # as many synthetic images as real ones
}
"""What a method needs to be itself on W1 within a few rounds."""
NAMES = {"scaffold": "SCAFFOLD", "fedprox": "FedProx", "feddyn": "FedDyn"}
"""Methods that have a bound of their own."""


@dataclass(frozen=True)
class Setting:
    """tiny: one repetition of next to nothing, to see that it works. full: whole rounds of W2. pools: a folder. only:
    the methods that are measured, all where none is named."""

    tiny: bool
    full: bool
    pools: Path
    only: tuple[str, ...] = ()

    def work(self, name: str) -> str:
        return f"tiny:{name}" if self.tiny else name

    def times(self, repetitions: int) -> int:
        return 1 if self.tiny else repetitions


Measurement = Callable[[Setting], dict[str, Any]]
MEASUREMENTS: dict[str, tuple[Measurement, tuple[str, ...]]] = {}
"""By name: the function, and the keys that it writes."""


def measures(*keys: str) -> Callable[[Measurement], Measurement]:
    """Registers a measurement, by its function's name."""

    def decorate(function: Measurement) -> Measurement:
        MEASUREMENTS[function.__name__] = (function, keys)
        return function

    return decorate


def bounded(found: Race, key: str, name: str, to: str, of: str = "cpu") -> dict[str, Any]:
    return {key: found.ratio(name, to, of, BOUNDS[key])}


# the workloads --------------------------------------------------------------------------------------------------------


@measures("W1_float32", "loop_overhead", "W1")
def w1(setting: Setting) -> dict[str, Any]:
    """Small CNN, 10 clients of 25 steps."""
    found = contest("W1", setting, {"fedkeel": ()}, ("bare", "limit"), 20)
    overhead = bounded(found, "loop_overhead", "fedkeel", "limit")
    return bounded(found, "W1_float32", "fedkeel", "bare") | overhead | {"W1": found.table()}


@measures("W0_float32", "W0")
def w0(setting: Setting) -> dict[str, Any]:
    """100 clients of one step: what the runtime itself costs."""
    found = contest("W0", setting, {"fedkeel": ()}, ("bare", "limit"), 20)
    return bounded(found, "W0_float32", "fedkeel", "bare") | {"W0": found.table()}


@measures("W2_float32", "W2_bf16", "W2")
def w2(setting: Setting) -> dict[str, Any]:
    """ResNet-18, steps of 64; in bf16 where the processor computes in it: elsewhere it is many times slower."""
    fast = has_bf16()
    ways = {"fedkeel": (), **({"fedkeel bf16": BF16} if fast else {})}
    loops = ("bare", "limit", *(("limit_bf16",) if fast else ()))
    found = contest("W2" if setting.full else "W2/10", setting, ways, loops, 3)
    bf16 = bounded(found, "W2_bf16", "fedkeel bf16", "bare") if fast else {}
    if not fast:
        why = "this processor has no bf16 instructions (avx512_bf16, amx_bf16)"
        bf16 = {"W2_bf16": unavailable(why, BOUNDS["W2_bf16"])}
    return bounded(found, "W2_float32", "fedkeel", "bare") | bf16 | {"W2": found.table() | {"whole": setting.full}}


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@measures("two_workers_wall", "two_workers_cpu", "two_workers")
def two_workers(setting: Setting) -> dict[str, Any]:
    """Two worker processes against one process, on W1."""
    found = contest("W1", setting, {"one": (), "two": TWO_WORKERS}, (), 15)
    wall = bounded(found, "two_workers_wall", "two", "one", "wall")
    return wall | bounded(found, "two_workers_cpu", "two", "one") | {"two_workers": found.table()}


def contest(
    work: str, setting: Setting, ways: Mapping[str, Sequence[str]], loops: Sequence[str], repetitions: int
) -> Race:
    """Plain loops and ways of fedkeel on one workload, in turns."""
    name = setting.work(work)
    commands = {loop: ours(name, loop) for loop in loops}
    commands |= {way: fedkeel(name, f"pool.dir={setting.pools}", *options) for way, options in ways.items()}
    return race(commands, setting.times(repetitions))


# methods --------------------------------------------------------------------------------------------------------------


@measures("FBL_over_FedAvg", "FBL")
def fbl(setting: Setting) -> dict[str, Any]:
    """FBL on as many samples as FedAvg: clients of two classes, all of whose budget is dealt out to ten.

    Every client cuts 80 of its 100 images and takes 80 from the pool, which is warm. The first rounds are timed, in
    which most clients choose what they keep: later ones choose once in 50 rounds.
    """
    skewed = ("partition.name=shards",)
    balanced = ("algorithm.name=fbl", "algorithm.rounding=distribute_remainder", "generator.name=gaussian")
    found = contest("W1", setting, {"fedavg": skewed, "fbl": (*skewed, *balanced)}, (), 15)
    return bounded(found, "FBL_over_FedAvg", "fbl", "fedavg") | {"FBL": found.table()}


@measures("SCAFFOLD_over_FedAvg", "FedProx_over_FedAvg", "FedDyn_over_FedAvg", "methods")
def methods(setting: Setting) -> dict[str, Any]:
    """Every method against FedAvg, beside the images that go forward and back through its network for a step.

    Ten clients take part in every round: what methods keep on clients is there from the second round on.
    """
    from fedkeel import registry

    others = [name for name in registry.names("algorithms") if name not in (*NAMES, "fedavg")]
    groups = [(list(NAMES), 15), *((others[i : i + 4], 3) for i in range(0, len(others), 4))]
    if setting.only:
        groups = [(list(setting.only), 5)]
    found: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for names, repetitions in groups:
        ways = {name: (f"algorithm.name={name}", *METHODS.get(name, ())) for name in ("fedavg", *names)}
        base = fedkeel(setting.work("W1/10"), f"pool.dir={setting.pools}")
        commands = {name: [*base, *options] for name, options in ways.items()}
        together = race(commands, setting.times(repetitions), "count")
        for name in names:
            own = together.ratio(name, "fedavg", bound=BOUNDS.get(f"{NAMES.get(name)}_over_FedAvg"))
            if name in NAMES:
                found[f"{NAMES[name]}_over_FedAvg"] = own
            table[name] = {"cpu": own, "options": METHODS.get(name, ()), **passes(together, name)}
    return found | {"methods": table}


@measures("needed")
def needed(setting: Setting) -> dict[str, Any]:
    """What each method needs, by the best bare loop that does that and nothing else (needs.py) against the same loop
    as it is for FedAvg; of the methods that are not here that is 1."""
    from needs import NEEDS

    work, names = setting.work("W1/10"), ("", *NEEDS)
    found = race({name: ours(work, "limit", *filter(None, [name])) for name in names}, setting.times(5))
    return {"needed": {name: found.ratio(name, "") for name in NEEDS}}


def passes(together: Race, name: str) -> dict[str, float]:
    """Images that go forward and back through the network for a step, relative to FedAvg."""
    if name not in together.answers:
        return {}
    one, plain = ({**together.answers[each], "steps": together.rounds[-1][each].steps} for each in (name, "fedavg"))
    ways = ("forward", "backward")
    return {way: round(one[way] / one["steps"] / (plain[way] / plain["steps"]), 3) for way in ways}


@measures("profile")
def profile(setting: Setting) -> dict[str, Any]:
    """Where the CPU seconds of a round of W1 and of W0 go."""
    return {"profile": {name: profiled(fedkeel(setting.work(name)), setting.times(10)) for name in ("W1", "W0")}}


def profiled(command: Sequence[str], rounds: int) -> dict[str, Any]:
    """Median seconds of a round, and the median share of each part."""
    contender = Contender(command)
    try:
        contender.round()
        found = [contender.ask("profile") for _ in range(rounds)]
    finally:
        contender.close()
    whole = [sum(each.values()) for each in found]
    shares = {
        part: statistics.median(each[part] / total for each, total in zip(found, whole, strict=True))
        for part in found[0]
    }
    return {
        "cpu_s": round(statistics.median(whole), 4),
        "shares": {part: round(share, 4) for part, share in shares.items()},
    }


# start ----------------------------------------------------------------------------------------------------------------


@measures("import_s", "help_s", "first_round_s")
def start(setting: Setting) -> dict[str, Any]:
    """Importing, help, and from nothing to the end of the first round of W1, in fresh processes."""
    timer = "import time, torch; t = time.perf_counter(); import fedkeel; {}; print(time.perf_counter() - t)"
    names = "[getattr(fedkeel, name) for name in fedkeel.__all__]"
    times = setting.times(9)
    program = str(Path(sys.executable).with_name("fedkeel"))
    listed = run([sys.executable, "-X", "importtime", "-c", "from fedkeel.cli import main; main()", "--help"]).stderr
    torch = any(line.rpartition("|")[2].strip() == "torch" for line in listed.splitlines())
    helped = seconds("help_s", [seconds_of([program, "--help"]) for _ in range(times)])
    if torch:
        helped |= {"value": None, "why": "it imports torch"}
    return {
        "import_s": seconds(
            "import_s", [float(run([sys.executable, "-c", timer.format(names)]).stdout) for _ in range(times)]
        )
        | {"of": "importing fedkeel after torch, and all its public names"},
        "help_s": helped,
        "first_round_s": {
            kind: seconds("", [first(ours(setting.work("W1"), kind)) for _ in range(setting.times(3))])
            for kind in ("bare", "fedkeel")
        },
    }


def first(command: Sequence[str]) -> float:
    began = time.perf_counter()
    contender = Contender(command)
    try:
        contender.round()
        return time.perf_counter() - began
    finally:
        contender.close()


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Raises Unavailable with its last word when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return done


def seconds_of(command: Sequence[str]) -> float:
    began = time.perf_counter()
    run(command)
    return time.perf_counter() - began


def seconds(key: str, values: Sequence[float]) -> dict[str, Any]:
    """Wall seconds: median and quartiles."""
    return {
        "value": round(statistics.median(values), 4),
        "bound": BOUNDS.get(key),
        "spread": quartiles(values),
        "repetitions": len(values),
        "load": round(os.getloadavg()[0], 2),
    }


# scale ----------------------------------------------------------------------------------------------------------------


@measures("memory_100k_over_100", "round_100k_over_100", "registered")
def registered(setting: Setting) -> dict[str, Any]:
    """100 to 100,000 registered clients, 50 a round, each of 100 images out of the same 10,000."""
    sizes = (10, 20) if setting.tiny else (100, 1_000, 10_000, 100_000)
    few, many = str(sizes[0]), str(sizes[-1])
    found = race({str(size): many_clients(setting, size) for size in sizes}, setting.times(10))
    memory = unavailable("; ".join(found.failed.values()), BOUNDS["memory_100k_over_100"])
    if not found.failed:
        memory |= {"value": round(found.peak_mb[many] / found.peak_mb[few], 4), "load": found.load, "spread": []}
        del memory["why"]
    time_ = bounded(found, "round_100k_over_100", many, few)
    return {"memory_100k_over_100": memory, **time_, "registered": found.table()}


@measures("cohort")
def cohort(setting: Setting) -> dict[str, Any]:
    """1,000 clients in one round against 50."""
    sizes = (2, 4) if setting.tiny else (50, 1_000)
    found = race({str(size): many_clients(setting, size, size) for size in sizes}, setting.times(1))
    return {"cohort": found.table() | {"per_step": found.ratio(str(sizes[1]), str(sizes[0]))}}


def many_clients(setting: Setting, clients: int, participation: int | None = None) -> list[str]:
    words = [f"clients={clients}", "partition.name=repeated"]
    return fedkeel(setting.work("W1/50"), *words, *([f"participation={participation}"] if participation else []))


@measures("large_model")
def large_model(setting: Setting) -> dict[str, Any]:
    """One step of one client with 300 million parameters: peak memory in copies of the parameters."""
    return {"large_model": apart("model", 300_000 if setting.tiny else 300_000_000)}


@measures("large_pool")
def large_pool(setting: Setting) -> dict[str, Any]:
    """A pool of 100,000 images of 32x32x3: images a second written, found again and read."""
    with tempfile.TemporaryDirectory() as folder:
        count = 1_000 if setting.tiny else 100_000
        return {"large_pool": {word: apart("pool", word, folder, count) for word in ("write", "read")}}


@measures("generation")
def generation(setting: Setting) -> dict[str, Any]:
    """Images a second of one core, by generator, and what filling the pool of a run with CIFAR-10 would take."""
    found = {}
    for name, pixels in (("gaussian", 28), ("bundled", 28), ("bundled", 32)):
        found[f"{name} {pixels}x{pixels}"] = apart("generator", name, pixels, 4 if setting.tiny else 512)
    return {"generation": found}


def apart(*words: object) -> dict[str, Any]:
    """What a part of scale.py says in a fresh process."""
    try:
        return json.loads(run([sys.executable, str(HERE / "scale.py"), *map(str, words)]).stdout.splitlines()[-1])
    except Unavailable as why:
        return unavailable(str(why))
