"""TensorBoard and MLflow, as far as the extra `track` is installed."""

from __future__ import annotations

import pytest
import tiny

from fedkeel.errors import ConfigError
from fedkeel.loop import resume, run


class Stopped(Exception):
    pass


class Until:
    """Stops a run after a round."""

    def __init__(self, last=99):
        self.last, self.warnings = last, []

    def finished_round(self, record):
        if record["round"] == self.last:
            raise Stopped

    def warned(self, text):
        self.warnings.append(text)

    def started(self, *_): ...
    def generating(self, *_): ...
    def tuning(self, *_): ...
    def ended(self): ...


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its own servers and databases are not installed here
    return pytest.importorskip("mlflow")


def stopped_and_resumed(config, folder):
    """A run of four rounds that is stopped after the third, one round behind its last checkpoint's end."""
    with pytest.raises(Stopped):
        run(config, data=tiny.data(), folder=folder, listener=Until(3))
    return resume(folder, data=tiny.data())


def test_mlflow_has_the_rounds_and_the_options(mlflow, tmp_path):
    config = tiny.config(
        "rounds=4", "checkpoint_every=2", f"mlflow=file:{tmp_path}/tracked", "local.lr=0.05", "name=one"
    )
    result = stopped_and_resumed(config, tmp_path / "run")
    client = mlflow.MlflowClient(tracking_uri=config.mlflow)
    (found,) = client.search_runs([client.get_experiment_by_name("fedkeel").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.tags["label"]) == ("one", "FINISHED", "fedavg")
    assert found.data.params["local.lr"] == "0.05" and "mlflow" not in found.data.params
    history = {each.step: each.value for each in client.get_metric_history(found.info.run_id, "global/accuracy")}
    assert history == {record["round"]: record["global/accuracy"] for record in result.rounds}


def test_an_address_without_mlflow_is_refused_and_leaves_nothing(mlflow, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = tiny.config("rounds=1", "tensorboard=true", "mlflow=http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="an address that can be written to") as caught:
        run(config, data=tiny.data(), folder=tmp_path / "run")
    assert (caught.value.key, caught.value.value) == ("mlflow", "http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_a_warning(mlflow, monkeypatch, tmp_path):
    config, heard = tiny.config("rounds=3", f"mlflow=file:{tmp_path}/tracked"), Until()
    log = mlflow.MlflowClient.log_batch

    def failing(self, number, metrics=(), **more):
        if metrics:
            raise mlflow.exceptions.MlflowException("the tracker is gone")
        return log(self, number, metrics=metrics, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", failing)
    assert len(run(config, data=tiny.data(), folder=tmp_path / "run", listener=heard).rounds) == 3
    assert heard.warnings == ["round 1 is not in MLflow (the tracker is gone); rounds.jsonl has all"]


def test_tensorboard_has_each_round_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = stopped_and_resumed(tiny.config("rounds=4", "checkpoint_every=2", "tensorboard=true"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("global/accuracy")
    assert [each.step for each in events] == [1, 2, 3, 4]
    assert [each.value for each in events] == pytest.approx([record["global/accuracy"] for record in result.rounds])
