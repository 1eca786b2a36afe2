"""Contenders as processes of their own, timed round by round in turns.

A contender says `{"ready": true}` on a line, and then for each line `go` that it reads does one round and says
`{"steps": n}`. The driver reads the clocks of the contender's whole process tree before and after. Repetition by
repetition all contenders do one round each, in an order drawn anew, and a figure is the median over repetitions of the
ratio to another contender in the same one: what else the machine does falls on both.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# One thread a process, and none that spins while it waits: contenders take turns on two cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Unavailable(Exception):
    """A contender that cannot run here, and why."""


@dataclass(frozen=True)
class Timing:
    """One round. cpu: seconds of the contender and all its children, user and system."""

    wall: float
    cpu: float
    steps: int


class Contender:
    """A running one. command: what starts it; told it may run, it answers line by line."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Raises Unavailable when it does not become ready."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  `close` closes it
        began = time.perf_counter()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - began

    def ask(self, word: str) -> dict[str, Any]:
        """Its answer to another word than `go`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it died of is in its answer
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        return self._answer()

    def round(self) -> Timing:
        """One round. Raises Unavailable when it died or a client of it failed."""
        cpu, began = tree_seconds(self._process.pid), time.perf_counter()
        answer = self.ask("go")
        wall = time.perf_counter() - began
        if answer.get("failed"):  # a round of fewer clients is another round
            raise Unavailable(f"clients failed: {answer['failed'][0]['reason']}")
        return Timing(wall, tree_seconds(self._process.pid) - cpu, answer["steps"])

    def peak_mb(self) -> float:
        """The most memory that it has held, and its living children: of each for itself."""
        return round(sum(map(high_water_mb, tree(self._process.pid))), 1)

    def close(self) -> None:
        """Ends it by closing its input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # some peers write to stdout too
                found: dict[str, Any] = json.loads(line)
                if "error" in found:
                    raise Unavailable(found["error"])
                return found
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise Unavailable(lines[-1] if lines else f"it ended with status {self._process.returncode}")


def tree_seconds(pid: int) -> float:
    """CPU seconds of a process, its living descendants, and those of theirs that ended; 0 when it is gone."""
    total = 0.0
    for one in tree(pid):
        with suppress(OSError):
            # the kernel's clock of another process, in nanoseconds (clock_getcpuclockid)
            total += time.clock_gettime(~one << 3 | 2)
            ended = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[13:15]
            total += sum(map(int, ended)) * TICK
    return total


def tree(pid: int) -> list[int]:
    """A process and its living descendants."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def high_water_mb(pid: int) -> float:
    """The most memory that a process has held; 0 for one that is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0


def fedkeel(work: str, *overrides: str) -> list[str]:
    """The command of fedkeel on a workload, with options such as "algorithm.name=scaffold"."""
    return ours(work, "fedkeel", *overrides)


def ours(work: str, kind: str, *words: str) -> list[str]:
    """The command of one of contender.py."""
    return [sys.executable, str(HERE / "contender.py"), work, kind, *words]


@dataclass(frozen=True)
class Race:
    """What came of it. rounds: repetition by repetition, by contender; failed: those that could not run, and why;
    start_s: seconds from nothing to ready; first: the round that does not count; answers: to the last word."""

    rounds: list[dict[str, Timing]]
    failed: dict[str, str]
    start_s: dict[str, float]
    first: dict[str, Timing]
    peak_mb: dict[str, float]
    answers: dict[str, dict[str, Any]]
    load: tuple[float, float]
    """Load average over a minute, before and after."""

    def ratio(self, name: str, to: str, of: str = "cpu", bound: float | None = None) -> dict[str, Any]:
        """Median and quartiles of the ratio, pair by pair, per step of SGD (steps are the same where nothing else is
        said)."""
        if why := [f"{one}: {self.failed[one]}" for one in (name, to) if one in self.failed]:
            return unavailable("; ".join(why), bound)
        pairs = [(each[name], each[to]) for each in self.rounds]
        values = [getattr(a, of) / a.steps / (getattr(b, of) / b.steps) for a, b in pairs]
        found = {"value": round(statistics.median(values), 4), "bound": bound, "spread": quartiles(values)}
        if [a.steps for a, _ in pairs] != [b.steps for _, b in pairs]:
            found["per"] = "step: the numbers of steps differ"
        return {**found, "repetitions": len(values), "load": self.load, "of": f"{of} seconds of {name} / {to}"}

    def table(self) -> dict[str, dict[str, Any]]:
        """By contender: median seconds of a round, those of the first, and those to get ready."""
        found: dict[str, dict[str, Any]] = {name: {"why": why} for name, why in self.failed.items()}
        for name in (name for name in self.start_s if name not in self.failed):
            mine = [each[name] for each in self.rounds]
            found[name] = {
                "cpu_s": round(statistics.median(each.cpu for each in mine), 4),
                "wall_s": round(statistics.median(each.wall for each in mine), 4),
                "steps": mine[-1].steps,
                "first_round_s": round(self.first[name].wall, 3),
                "start_s": round(self.start_s[name], 3),
                "peak_mb": self.peak_mb[name],
            }
        return found


def race(commands: Mapping[str, Sequence[str]], repetitions: int, last: str = "", seed: int = 1) -> Race:
    """All contenders by name, each first one round that does not count, then in turns. last: a word that each is asked
    at the end."""
    before, draw = os.getloadavg()[0], random.Random(seed)
    rounds: list[dict[str, Timing]] = []
    failed: dict[str, str] = {}
    start_s: dict[str, float] = {}
    first: dict[str, Timing] = {}
    running: dict[str, Contender] = {}
    with ExitStack() as closing:
        for name, command in commands.items():
            try:
                running[name] = Contender(command)
                closing.callback(running[name].close)
                first[name] = running[name].round()
                start_s[name] = running[name].start_s
            except Unavailable as why:
                failed[name] = str(why)
                running.pop(name, None)
        for _ in range(repetitions):
            done: dict[str, Timing] = {}
            for name in draw.sample(list(running), len(running)):
                try:
                    done[name] = running[name].round()
                except Unavailable as why:  # the others go on
                    failed[name] = str(why)
                    running.pop(name)
            rounds.append({name: done[name] for name in running})
        peak_mb = {name: contender.peak_mb() for name, contender in running.items()}
        answers = {name: contender.ask(last) for name, contender in running.items()} if last else {}
    return Race(rounds, failed, start_s, first, peak_mb, answers, (round(before, 2), round(os.getloadavg()[0], 2)))


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower and upper quartile; of a single value that value twice."""
    if len(values) < 2:
        return [round(values[0], 4)] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]


def unavailable(why: str, bound: float | None = None) -> dict[str, Any]:
    """The record of what could not be measured."""
    return {"value": None, "bound": bound, "why": why}
