"""Errors between processes, and locks."""

from __future__ import annotations

import errno
import fcntl
import pickle
from pathlib import Path

import pytest

from fedkeel import errors
from fedkeel.files import locked


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("local.lr", -1, "must be > 0", "lr"),
        errors.UnknownName("algorithms", "fedavgg", ["fedavg", "fedprox"]),
        errors.MissingExtra("the runtime flower", "flower"),
        errors.DataError("there is no such folder"),
        errors.RunError("the loss is nan"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_worker_is_the_same_for_its_parent(error: errors.FedkeelError) -> None:
    """Processes of one run hand exceptions on so: one that could not be would look like a worker that died."""
    there = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was just written
    assert (type(there), str(there), there.__dict__) == (type(error), str(error), error.__dict__)


def test_a_folder_without_locks_is_not_told_as_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(errors.StorageError, match=r"cannot lock .*: No locks available"),
        locked(tmp_path, errors.RunError("another process is here")),
    ):
        raise AssertionError
