"""Modules of a folder of benchmarks, for tests: they are no package and import their neighbours by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def modules_of(folder: Path, *names: str) -> Iterator[dict[str, ModuleType]]:
    """Within this context these modules can be imported, by their names; afterwards nothing of them is left."""
    sys.path.insert(0, str(folder))
    yield {name: import_module(name) for name in names}
    sys.path.remove(str(folder))
    for name in names:
        del sys.modules[name]
