"""Models kept per client lie on disk past a budget, on the server and on clients."""

import pytest
import tiny

from fedkeel.data.sources import arrays
from fedkeel.job import Job
from fedkeel.loop import run

pytestmark = pytest.mark.full
CLIENTS, ROUNDS, COHORT = 1000, 6, 60
BUDGET = 256 * 2**10
"""Bytes; the models of the clients that take part are four times as much and more."""


@pytest.fixture(scope="module")
def crowd():
    """Two images for each of 1,000 clients."""
    few = tiny.data(train=2 * CLIENTS)
    return arrays(train=(few.train_x, few.train_y), test=(few.test_x, few.test_y), classes=list(few.classes))


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        ("fedcda", "shelf"),
        pytest.param("fedamp", "shelf", marks=pytest.mark.slow),
        ("fedcac", "shelf"),
        ("moon", "store"),
    ],
)
def test_a_thousand_clients_stay_under_the_budget(method, kept, crowd, monkeypatch, tmp_path):
    config = tiny.config(
        f"algorithm.name={method}",
        f"clients={CLIENTS}",
        f"participation={COHORT}",
        f"rounds={ROUNDS}",
        f"memory={BUDGET / 2**30}",
        "model.hidden=[4]",
        "local.epochs=1",
        f"checkpoint_every={ROUNDS}",
        "evaluate.every=6",
        "personal.measure=never",
        *(["algorithm.beta=6"] if method == "fedcac" else []),  # the shelf is used to the end
    )
    jobs: list[Job] = []
    monkeypatch.setattr("fedkeel.loop.Job", lambda *args, **more: jobs.append(Job(*args, **more)) or jobs[0])
    peak = 0

    class Watch:
        def finished_round(self, record):
            nonlocal peak
            peak = max(peak, getattr(jobs[0], kept)._bytes)

        def __getattr__(self, name):
            return lambda *args: None

    result = run(config, data=crowd, folder=tmp_path / "run", listener=Watch())
    files = list((tmp_path / "run" / ("shelf" if kept == "shelf" else "clients")).glob("*.safetensors"))
    assert not any(record["failed"] for record in result.rounds)
    assert 0 < peak <= BUDGET
    assert sum(path.stat().st_size for path in files) > 3 * BUDGET  # what memory could not hold
