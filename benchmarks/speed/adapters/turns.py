"""The contender's side of harness.py for libraries whose round loop is their own: called between its rounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from workloads import WORKLOADS, Workload, tiny

_spoken = sys.stdout
sys.stdout = sys.stderr  # what the library prints is not for the driver


def workload(name: str = "") -> Workload:
    """The one of that name, "tiny:" before it for as little of it as runs; else the one on the command line."""
    word, _, rest = (name or sys.argv[1]).rpartition(":")
    return tiny(WORKLOADS[rest]) if word else WORKLOADS[rest]


def wait(answer: dict[str, object]) -> bool:
    """Says `answer` and waits to be told to go on; False when it is over."""
    print(json.dumps(answer), file=_spoken, flush=True)
    return bool(sys.stdin.readline())
