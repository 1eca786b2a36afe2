"""Small experiment files in place of the package's, for tests of `fedkeel reproduce`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedkeel.reproduce import tables

Files = dict[str, dict[str, Any]]


@contextmanager
def of_package(files: Files) -> Iterator[Files]:
    """Within this context the package has these files, by their names. Who changes them calls `anew`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_files", lambda: files)
        anew()
        yield files
    anew()


def anew() -> None:
    """Tables are read again."""
    tables.experiment.cache_clear()
    tables.protocols.cache_clear()
