"""The contender's side of harness.py for libraries whose round loop is their own: called between its rounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from workloads import WORKLOADS, Workload, tiny

_spoken = sys.stdout
sys.stdout = sys.stderr  # what the library prints is not for the driver


def workload() -> Workload:
    """The one on the command line."""
    word, _, name = sys.argv[1].rpartition(":")
    return tiny(WORKLOADS[name]) if word else WORKLOADS[name]


def wait(answer: dict[str, object]) -> bool:
    """Says `answer` and waits to be told to go on; False when it is over."""
    print(json.dumps(answer), file=_spoken, flush=True)
    return bool(sys.stdin.readline())
