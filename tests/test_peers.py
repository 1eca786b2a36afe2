"""Flower's simulation as a contender of the speed benchmarks: it takes turns, and all of its processes are counted."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_modules import BENCHMARKS, modules_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("flwr", "ray")), reason="needs the extras flower and ray"
    ),
]
SPEED = BENCHMARKS / "speed"


@pytest.fixture
def harness() -> Iterator[ModuleType]:
    with modules_of(SPEED, "harness") as found:
        yield found["harness"]


def commands() -> dict[int, str]:
    """The command lines of all processes here, by number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
    return found


def marked(mark: str) -> set[int]:
    """Processes that were started with this variable, where they did not write their title over it."""
    found = set()
    for pid in commands():
        try:
            if f"{mark}=".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.add(pid)
        except OSError:
            continue
    return found


def test_flower_simulation_takes_turns_and_all_its_processes_count(harness: ModuleType) -> None:
    mark = f"FEDKEEL_TEST_{os.getpid()}"
    command = [sys.executable, str(SPEED / "adapters/flower_simulation.py"), "tiny:W1", "2"]
    contender = harness.Contender(command, {mark: "1"})
    try:
        process = contender._process.pid
        for _ in range(2):
            timing = contender.round()
            assert timing.steps == 4, "two clients, two batches each, none of which failed"
        tree, titles = set(harness.tree(process)), commands()
        for part, count in (("ray::ClientAppActor", 2), ("/raylet/raylet ", 1), ("/gcs/gcs_server ", 1)):
            assert sum(part in titles.get(pid, "") for pid in tree) == count, f"{part} is not among the descendants"
        assert not marked(mark) - tree, "a process of Ray that is not counted"
        used = harness.tree_seconds(process)
        answer = contender.ask("go")
        assert set(answer) == {"steps", "accuracy"} and harness.tree_seconds(process) > used
    finally:
        contender.close()
    assert contender._process.returncode == 0, "it ends by itself when its input does"
