"""What a federation withstands, how long a round takes on each engine, and that it all gives the same model.

    make reliability                                   all of it: about an hour on two quiet cores
    PYTHONPATH=tests python benchmarks/reliability.py tests --only "killed_node" --trials 3 --add

tests: tests/test_reliability.py and those of tests/test_deploy.py about strangers and restarts, with real processes on
this machine. rounds: one small workload on each engine. fbl: three nodes with TLS and keys, by `fedkeel deploy`, and
one process. Each part writes its own section of benchmarks/results/reliability.json, and docs/reliability.md anew; with
--add trials are added to those that are there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from federation import FEDKEEL, SERVER, Federation, Process

from fedkeel.config import Config, parse
from fedkeel.deploy.flower import QUIET, free_port, program
from fedkeel.deploy.submit import app
from fedkeel.files import checksum
from fedkeel.loop import commit, processor, run

ROOT = Path(__file__).parents[1]
OUT, PAGE = ROOT / "benchmarks/results/reliability.json", ROOT / "docs/reliability.md"
HERE = "tests/test_reliability.py::"
SUITE: dict[str, str] = {
    HERE + "test_a_killed_node": "nodes that are killed",
    HERE + "test_misbehaving_nodes": "nodes that misbehave",
    HERE + "test_a_killed_server": "a server that is killed",
    HERE + "test_fifty_rounds_of_chaos": "chaos",
    HERE + "test_a_message_of_500_mb": "a large model",
    "tests/test_deploy.py::test_strangers_are_refused": "strangers",
    "tests/test_deploy.py::test_a_killed_supernode_comes_back_by_itself": "comings and goings",
    "tests/test_deploy.py::test_sites_come_and_go_while_the_server_runs": "comings and goings",
}
"""The tests, and what stands over them on the page."""
ONCE = ("chaos", "a large model")
"""Of these one trial is made, unless --only names them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="which; all when none is named")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="of the tests: as pytest's -k")
    parser.add_argument("--trials", type=int, default=3, help="of each test but the longest (default 3)")
    parser.add_argument("--page", action="store_true", help="only write the page anew, from the figures that are there")
    parser.add_argument("--add", action="store_true", help="keep the trials that are there")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if given.page:
        found = known()
        for name, entry in found["tests"].items():
            entry["shows"] = shows(name)
        save(found)
        return
    for part in given.parts or PARTS:
        PARTS[part](given)
    failed = sum(each["trials"] - each["survived"] for each in known().get("tests", {}).values())
    sys.exit(f"{failed} trials failed" if failed else 0)


def known() -> dict[str, Any]:
    """The figures so far."""
    return json.loads(OUT.read_text()) if OUT.exists() else {}


def save(results: dict[str, Any]) -> None:
    """Writes the figures, and the page."""
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(results))


def where() -> dict[str, Any]:
    """What the figures were taken on, and when."""
    return {
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("fedkeel", "torch", "flwr", "ray", "numpy")},
    }


# tests ----------------------------------------------------------------------------------------------------------------


def tests(given: argparse.Namespace) -> None:
    """Runs them; a trial of all is one call of pytest, whose tests share a federation."""
    begun: set[str] = set()
    order = [test.partition("::")[2] for test in SUITE]
    for trial in range(given.trials):
        wanted = [test for test, group in SUITE.items() if given.only or trial == 0 or group not in ONCE]
        found = list(outcomes(wanted, given.only))
        results = known()
        kept: dict[str, Any] = results.get("tests", {})
        for name, group, outcome in found:
            if name not in begun and not given.add:
                kept.pop(name, None)
            begun.add(name)
            entry = kept.setdefault(name, {"group": group, "shows": "", "trials": 0, "survived": 0, "runs": []})
            entry["runs"].append(outcome)
            entry["shows"], entry["trials"] = shows(name), len(entry["runs"])
            entry["survived"] = sum(each["survived"] for each in entry["runs"])
            word = "ok" if outcome["survived"] else "FAILED"
            print(f"{word:6} {outcome['seconds']:7.1f} s  {name}", flush=True)
        kept = dict(sorted(kept.items(), key=lambda each: order.index(each[0].partition(" [")[0])))
        save(results | {"tests": kept, "machine": where()})


def outcomes(wanted: Sequence[str], only: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, group and outcome of each test."""
    with tempfile.TemporaryDirectory(prefix="fedkeel-") as place:
        report = Path(place) / "report.xml"
        words = [sys.executable, "-m", "pytest", *wanted, "-m", "slow", "-p", "no:cacheprovider"]
        words += [
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            f"--basetemp={place}/tests",
            *(["-k", only] if only else []),
        ]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if done.returncode not in (0, 1) or not report.exists():
            sys.exit(f"pytest ended with code {done.returncode}")
        load = max(os.getloadavg())  # of the last 1, 5 and 15 minutes
        for case in ET.parse(report).getroot().iter("testcase"):
            test, _, parameter = str(case.get("name")).partition("[")
            if case.find("skipped") is not None:
                continue
            fault = next((each for kind in ("failure", "error") for each in case.iter(kind)), None)
            figures = {str(each.get("name")): plain(str(each.get("value"))) for each in case.iter("property")}
            outcome: dict[str, Any] = {
                "survived": fault is None,
                "seconds": round(float(case.get("time", 0)), 1),
                "load": round(load, 1),
                "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            }
            if fault is not None:
                outcome["fault"] = str(fault.get("message"))[:300]
            if figures:
                outcome["figures"] = figures
            group = next(group for name, group in SUITE.items() if name.endswith(f"::{test}"))
            yield test + (f" [{parameter}" if parameter else ""), group, outcome


def plain(text: str) -> object:
    """A figure as a number or a list where it is one."""
    try:
        return json.loads(text.replace("'", '"'))
    except ValueError:
        return text


def shows(name: str) -> str:
    """What a test shows, in the words of its docstring."""
    test = name.partition(" [")[0]
    module = next(each.partition("::")[0] for each in SUITE if each.endswith(f"::{test}"))
    found = getattr(importlib.import_module(Path(module).stem), test).__doc__ or ""
    return " ".join(found.split())


# rounds ---------------------------------------------------------------------------------------------------------------


def small(**more: object) -> Config:
    """FedAvg with a small CNN: three clients of 1,000 images each, one epoch, seven rounds."""
    return parse(
        {
            "name": "small",
            "rounds": 7,
            "clients": 3,
            "participation": 1.0,
            "min_replies": 3,
            "device": "cpu",
            "data": {"name": "fashion", "train_limit": 3000, "test_limit": 500},
            "partition": {"name": "iid"},
            "model": {"name": "cnn", "width": 8, "hidden": 64},
            "local": {"epochs": 1, "batch": 32, "lr": 0.01},
            **more,
        }
    )


def rounds(given: argparse.Namespace) -> None:
    """Seconds of a round on each engine."""
    found: dict[str, Any] = {"workload": " ".join((small.__doc__ or "").split()), "engines": {}}
    for name, engine in {"inprocess": alone, "ray": ray, "simulation": simulated, "federation": federated}.items():
        with tempfile.TemporaryDirectory(prefix="fedkeel-") as place:
            load, began = os.getloadavg()[0], time.monotonic()
            try:
                folder = engine(Path(place))
            except (subprocess.SubprocessError, AssertionError, RuntimeError) as error:
                print(f"{name}: {error}"[-3000:], flush=True)
                continue
            whole = time.monotonic() - began
            records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
            seconds = [record["seconds/train"] for record in records]
            found["engines"][name] = {
                "seconds_a_round": round(statistics.median(seconds[1:]), 3),  # the first also starts things up
                "seconds_of_rounds": seconds,
                "seconds_in_all": round(whole, 1),
                "model_sha256": checksum(folder / "model.safetensors"),
                "load": round(load, 1),
            }
            print(name, found["engines"][name], flush=True)
    save(known() | {"rounds": {**found, "machine": where()}})


def alone(place: Path) -> Path:
    """One process."""
    return fedkeel_run(place, small())


def ray(place: Path) -> Path:
    """Ray, two actors."""
    return fedkeel_run(place, small(runtime="ray", ray={"actors": 2}))


def fedkeel_run(place: Path, config: Config) -> Path:
    """`fedkeel run`; the run's folder."""
    (place / "small.toml").write_text(config.toml())
    env = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1"}
    subprocess.run([*FEDKEEL, "run", "small.toml"], cwd=place, env=env, check=True, stdout=subprocess.DEVNULL)
    return place / "runs/small"


def federated(place: Path) -> Path:
    """A server and three nodes on this machine, with TLS and keys, polling as by default."""
    with Federation(place / "federation", ["0", "1", "2"], env={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}) as made:
        process = made.submit(small())
        assert process.wait(1800) == 0, process.log()
        return kept(made.runs / "small", place)


def simulated(place: Path) -> Path:
    """Flower's own simulation, of three supernodes."""
    (place / "app").mkdir()
    (place / "app/pyproject.toml").write_text(tomli_w.dumps(app(small(), runs_dir=str(place / "runs"))))
    port = free_port()
    links = {"default": "here", "here": {"address": f"127.0.0.1:{port}", "insecure": True}}
    (place / "home").mkdir()
    (place / "home/config.toml").write_text(tomli_w.dumps({"superlink": links}))
    env = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "FLWR_HOME": str(place / "home")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env["RAY_TMPDIR"] = str(place / "ray")  # what another cluster on this machine left behind would be taken for one
    words = [program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with ended(Process([*words, "--disable-runtime-dependency-installation"], place / "link.log", env, place)):
        until(lambda: answers(port), 120)
        sizes = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
        words = [program("flwr"), "run", str(place / "app"), "here", "--stream", "--federation-config", sizes]
        done = subprocess.run(words, env=env, cwd=place, check=False, timeout=1200, capture_output=True, text=True)
        if not (place / "runs/small/model.safetensors").exists():
            raise RuntimeError(done.stdout + done.stderr + (place / "link.log").read_text())
    return place / "runs/small"


def answers(port: int) -> bool:
    """Whether something listens there."""
    import socket

    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(true: Callable[[], bool], seconds: float) -> None:
    """Waits. Raises RuntimeError."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError("it takes too long")
        time.sleep(0.2)


@contextmanager
def ended(process: Process) -> Iterator[Process]:
    """A process that ends with the block."""
    try:
        yield process
    finally:
        process.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def kept(folder: Path, place: Path) -> Path:
    """The folder, elsewhere, before its federation goes."""
    return folder.rename(place / "kept")


# FBL ------------------------------------------------------------------------------------------------------------------


FBL: dict[str, object] = {
    "name": "fbl",
    "rounds": 5,
    "clients": 3,
    "participation": 1.0,
    "min_replies": 3,
    "device": "cpu",
    "data": {"name": "fashion", "train_limit": 900, "test_limit": 500},
    "partition": {"name": "dirichlet", "alpha": 0.1, "min_size": 10},
    "model": {"name": "cnn", "width": 4, "hidden": 32},
    "local": {"epochs": 2, "batch": 32, "lr": 0.05},
    "algorithm": {"name": "fbl"},
    "generator": {"name": "bundled", "steps": 4},
}


def fbl(given: argparse.Namespace) -> None:
    """FBL by `fedkeel deploy` against the same in one process."""
    config = parse(FBL)
    with tempfile.TemporaryDirectory(prefix="fedkeel-") as name:
        place, began = Path(name), time.monotonic()
        os.environ["FEDKEEL_CACHE"] = str(place / "cache")
        with Federation(place / "federation", ["0", "1", "2"]) as made:
            (place / "fbl.toml").write_text(config.toml())
            words = [*FEDKEEL, "deploy", "submit", "fbl.toml", "--server", made.where, "--keys", str(made.keys)]
            process = Process(words, place / "submit.log", made.env, place)
            assert process.wait(1800) == 0, process.log() + made.log(SERVER)
            seconds, log, folder = time.monotonic() - began, process.log(), made.runs / "fbl"
            there = checksum(folder / "model.safetensors")
            records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        here = run(config, folder=place / "alone").folder
        assert here is not None
        result = {
            "config": tomli_w.dumps(FBL),
            "log": [line for line in log.splitlines() if told(line)],
            "accuracy": records[-1]["global/accuracy"],
            "failed": sum(len(record["failed"]) for record in records),
            "sha256_federation": there,
            "sha256_one_process": checksum(here / "model.safetensors"),
            "equal": there == checksum(here / "model.safetensors"),
            "seconds": round(seconds, 1),
            "machine": where(),
        }
    print(json.dumps({key: result[key] for key in ("log", "equal", "seconds")}, indent=1), flush=True)
    save(known() | {"fbl": result})
    assert result["equal"], "the federation's model differs from that of one process"


def told(line: str) -> bool:
    """Whether a line of a run's log is fedkeel's."""
    words = line.split()
    return bool(words) and (words[0] in ("run", "round", "fbl:", "warning:") or "made their images" in line)


# the page -------------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    """docs/reliability.md."""
    out = [
        "# What a federation withstands",
        "",
        "Real processes on one machine: `fedkeel deploy server` and three `fedkeel deploy node`, with TLS and node "
        "keys. They are killed with SIGKILL, whole process trees at once, as a power cut would; nodes hang and lie on "
        "command (`tests/unruly.py`). The measure is a run in one process in which the same clients' replies were lost "
        "in the same rounds: the final model, the server's state and each client's state on its node's disk must be "
        "equal to it bit by bit. `make reliability` makes these figures (`benchmarks/results/reliability.json` has all "
        "of them); only runs that happened are shown.",
    ]
    if "tests" in results:
        out += ["", f"{taken(results['machine'])}", *table(results["tests"]), *figures(results["tests"])]
    if "rounds" in results:
        out += rounds_of(results["rounds"])
    if "fbl" in results:
        out += evidence(results["fbl"])
    return "\n".join(out) + "\n"


def taken(machine: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"Taken on {machine['when']} at commit {machine['commit'][:7]}: {machine['processor']}, {machine['cores']} "
        f"cores, {machine['memory_gib']} GiB, load average {machine['load']} at the end; {versions}. All processes "
        "share these cores, and each message starts a Python process that imports PyTorch, so times are upper bounds."
    )


def table(tests: Mapping[str, Any]) -> list[str]:
    """Trials by test."""
    out = ["", "| what happens | trials | survived | seconds | load | what it shows |", "|---|---:|---:|---:|---:|---|"]
    before = ""
    for name, entry in tests.items():
        seconds = [each["seconds"] for each in entry["runs"]]
        span = f"{min(seconds):.0f}" + (f" to {max(seconds):.0f}" if len(seconds) > 1 else "")
        load = f"{max(each['load'] for each in entry['runs']):.0f}"
        test, _, parameter = name.partition(" [")
        shown = '"' if test == before else entry["shows"]
        what = entry["group"] + (f": {parameter.rstrip(']')}" if parameter else "")
        out.append(f"| {what} | {entry['trials']} | {entry['survived']} | {span} | {load} | {shown} |")
        before = test
    return out


def figures(tests: Mapping[str, Any]) -> list[str]:
    """What the tests measured, of each one's last trial."""
    out = []
    for name, entry in tests.items():
        found = next((each["figures"] for each in reversed(entry["runs"]) if "figures" in each), None)
        if found:
            out.append(f"- `{name}`: " + "; ".join(f"{key}: {worded(value)}" for key, value in found.items()))
    return ["", "## Measured on the way", "", "Of the last trial of each.", "", *out] if out else []


def worded(value: object) -> str:
    """A figure in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"`{value}`" if isinstance(value, str) else f"{value:,}"


def rounds_of(found: Mapping[str, Any]) -> list[str]:
    """Seconds by engine."""
    names = {
        "inprocess": "one process",
        "ray": "Ray, 2 actors",
        "simulation": "Flower's simulation, 3 supernodes",
        "federation": "federation on this machine: TLS, keys, 3 nodes",
    }
    out = ["", "## Seconds a round", "", f"{found['workload']} {taken(found['machine'])}", ""]
    out += ["| engine | seconds a round (median, the first left out) | seconds in all | load | model's SHA-256 |"]
    out += ["|---|---:|---:|---:|---|"]
    for name, each in found["engines"].items():
        out.append(
            f"| {names[name]} | {each['seconds_a_round']} | {each['seconds_in_all']} | {each['load']:.0f} "
            f"| `{each['model_sha256'][:16]}` |"
        )
    missing = [names[name] for name in names if name not in found["engines"]]
    return out + (["", f"Not measured: {'; '.join(missing)}."] if missing else [])


def evidence(found: Mapping[str, Any]) -> list[str]:
    """The federation that trains FBL."""
    return [
        "",
        "## The same model: FBL on three nodes",
        "",
        f"`fedkeel deploy keys`, `server`, three `node`s and `submit`, TLS and node keys, {found['seconds']:.0f} "
        "seconds from making the keys to the end of the run (load average "
        f"{found['machine']['load']}). What `submit` printed:",
        "",
        "```",
        *found["log"],
        "```",
        "",
        "| model.safetensors of | SHA-256 |",
        "|---|---|",
        f"| the federation | `{found['sha256_federation']}` |",
        f"| one process | `{found['sha256_one_process']}` |",
        "",
        "The configuration:",
        "",
        "```toml",
        found["config"].strip(),
        "```",
    ]


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"tests": tests, "rounds": rounds, "fbl": fbl}

if __name__ == "__main__":
    main()
