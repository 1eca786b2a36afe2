"""A federation of real processes on this machine, with TLS and node keys: runs equal those in one process."""

from __future__ import annotations

import battery
import pytest
from safetensors.torch import load_file

pytest.importorskip("flwr")

from federation import Federation

from fedkeel.config import Config, parse
from fedkeel.loop import run
from fedkeel.record import RoundLog, numbers

pytestmark = pytest.mark.full


def config(method: str) -> Config:
    return parse(
        {
            "name": method,
            "rounds": 2,
            "clients": 2,
            "participation": 1.0,
            "min_replies": 2,
            "device": "cpu",
            "data": {"name": "fashion", "train_limit": 300, "test_limit": 100},
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 10},
            "model": {"name": "cnn", "width": 2, "hidden": 8, "norm": "batch"},
            "local": {"epochs": 1, "batch": 16, "lr": 0.05},
            "algorithm": {"name": method, **({"head_epochs": 1} if method == "fedrep" else {})},
            "evaluate": {"local_every": 1},
            **({"generator": {"name": "bundled", "steps": 2}} if method == "fbl" else {}),
        }
    )


# each message starts a process that imports torch, six seconds of CPU: two nodes, and one method in `make test`. FBL
# has a state of clients and images made on the nodes; the battery brings every method over Flower's messages
@pytest.mark.parametrize(
    "methods", [["fbl"], pytest.param(["scaffold", "fedrep"], marks=pytest.mark.slow)], ids=["balanced", "others"]
)
def test_runs_are_equal_to_those_in_one_process(methods, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path / "cache"))
    with Federation(tmp_path / "federation", ["0", "1"]) as federation:
        for method in methods:
            process, alone = federation.submit(config(method)), run(config(method))
            assert process.wait(600) == 0, process.log() + federation.log("server")
            folder = federation.runs / method
            battery.same_bits(load_file(folder / "model.safetensors"), alone.weights, f"{method}: ")
            records = RoundLog(folder / "rounds.jsonl").rewind(2)
            assert [numbers(record) for record in records] == [numbers(record) for record in alone.rounds]
            assert not any(record["failed"] for record in records)
