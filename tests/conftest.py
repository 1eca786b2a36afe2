"""Fixtures for all tests; what they are made of is in tiny.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch

from fedkeel import registry
from fedkeel.data.dataset import Dataset
from fedkeel.generators.gaussian import fit
from fedkeel.records import Samples

LONGEST = ("test_federation", "test_docs", "test_ray", "test_workers", "test_flower", "test_reproduce", "test_battery")
"""Files that take longest. Each is one worker's (--dist loadfile): begun last, the other would wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the report is not what is tested: it takes longer than a tiny run."""
    monkeypatch.setattr("fedkeel.report.page.write_page", lambda runs, path: path)
    monkeypatch.setattr("fedkeel.report.plots.write_pngs", lambda runs, folder: [])


@pytest.fixture(scope="session")
def data() -> Dataset:
    """96 train and 40 test images that a small network learns in a few steps."""
    return tiny.data()


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> str:
    """The room "algorithms", in which a test may register methods of its own: they are gone afterwards."""
    registry.names("algorithms")
    monkeypatch.setitem(registry._things, "algorithms", dict(registry._things["algorithms"]))
    return "algorithms"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's pools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDKEEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> tuple[str, ...]:
    """Overrides that name a generator of images like those of `data`: a Gaussian per class, and a pool for it."""
    folder = tmp_path_factory.mktemp("generator")
    public = tiny.data(seed=1)
    fit(Samples.real_ones(public.train_x, public.train_y), data.classes, 4).save(folder / "tiny.safetensors")
    return ("generator.name=gaussian", f"generator.path={folder}/tiny.safetensors", f"pool.dir={folder}/pool")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Runs are compared bit by bit."""
    torch.set_num_threads(1)
