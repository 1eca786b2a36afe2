"""Runs on a federation: started, followed, listed and stopped through Flower's commands."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import tomli_w

from fedkeel.config import Config
from fedkeel.deploy.admission import SHUT
from fedkeel.deploy.flower import Control, Server, control
from fedkeel.deploy.server import finish
from fedkeel.errors import ConfigError, RunError

COMPONENTS = ("fedkeel.runtimes.flower:server_app", "fedkeel.runtimes.flower:client_app")
"""The two halves of the app, by import path: they are installed on the server and on every node."""

Say = Callable[[str], None]


def app(
    config: Config, resume: bool = False, runs_dir: str = "", components: tuple[str, str] = COMPONENTS
) -> dict[str, object]:
    """The pyproject.toml of a Flower app that is nothing but a configuration, which Flower hands to every node.

    Raises ConfigError for a tracker's address with a password.
    """
    address = urlsplit(config.mlflow)
    if address.username is not None:
        known = f"{address.scheme}://...@{address.hostname}"
        instead = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the server's environment"
        raise ConfigError("mlflow", known, f"every site would get the password; put it into {instead}")
    name = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    return {
        "project": {
            "name": f"run-{name}"[:60].rstrip("-"),
            "version": version("fedkeel"),
            "description": "A fedkeel run",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedkeel",
                    "components": dict(zip(("serverapp", "clientapp"), components, strict=True)),
                    "config": {"config": config.toml(), "resume": resume, "runs-dir": runs_dir},
                }
            }
        },
    }


def submit(
    config: Config,
    server: Server,
    resume: bool = False,
    runs_dir: str = "",
    detach: bool = False,
    components: tuple[str, str] = COMPONENTS,
    say: Say = print,
) -> int:
    """Starts a run and follows its log (to stdout) until it ends; the exit code: 0 done, 1 failed, 130 left.

    Ctrl-C leaves the run alone. detach: does not follow it.
    """
    with control(server) as flower:
        folder = Path(flower.env["FLWR_HOME"]) / "app"
        folder.mkdir()
        (folder / "pyproject.toml").write_bytes(tomli_w.dumps(app(config, resume, runs_dir, components)).encode())
        number = str(flower("run", str(folder))["run-id"])
        place = f"in {runs_dir}/{config.name}" if runs_dir else f"in {config.name} in its folder of runs"
        say(f"run {number} has started; its results will lie on the server, {place}")
        if detach:
            return 0
        try:
            _follow(flower, number)
            status, details = _state(flower, number)
        except KeyboardInterrupt:
            say(f"\nrun {number} goes on; to stop it: fedkeel deploy stop {number} --server {server.where} ...")
            return 130
    if status == "finished:completed":
        say(f"run {number} is done")
        return 0
    # a run that failed is no mistake of the user's
    say(f"run {number}: {status}{': ' if details else ''}{details}")
    return 1


def status(server: Server) -> dict[str, object]:
    """`nodes`: name, node (Flower's number), status. `runs`: run, name, status, details, elapsed, the newest first."""
    with control(server) as flower:
        nodes, runs = flower.nodes(), flower("list").get("runs")
    assert isinstance(runs, list)
    return {
        "nodes": [
            {"name": node["name"], "node": node["node"], "status": node["status"]}
            for node in nodes
            if node["status"] != SHUT
        ],
        "runs": [
            {
                "run": str(row["run-id"]),
                "name": str(row["fab-name"]).removeprefix("run-"),
                "status": row["status"],
                "details": _details(row),
                "elapsed": f"{row['elapsed']:.0f} s" if isinstance(row["elapsed"], float) else str(row["elapsed"]),
            }
            for row in runs
        ],
    }


def stop(server: Server, run: str) -> None:
    """Stops a run. Raises ConfigError when it is not a number, RunError with Flower's message."""
    if not run.isdecimal():
        raise ConfigError("RUN", run, "must be a run's number (fedkeel deploy status)")
    with control(server) as flower:
        flower("stop", run)


def _follow(flower: Control, number: str) -> None:
    """Copies a run's log until the run ends, or the server goes."""
    process: subprocess.Popen[bytes] = subprocess.Popen(
        flower.command("log", number, "--stream"),
        env=flower.env,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    try:
        with process.stdout as log:
            for line in log:
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()
    finally:
        finish(process, grace=1)


def _state(flower: Control, number: str, patience: float = 90) -> tuple[str, str]:
    """How a run stands, once it has ended (its log may end a little earlier). Raises RunError."""
    until, found, details = time.monotonic() + patience, "", ""
    while time.monotonic() < until:
        try:
            rows = flower("list", "--run-id", number).get("runs")
        except RunError as error:
            found, details = "unknown", f"the server does not say: {error}"
        else:
            assert isinstance(rows, list)
            found, details = str(rows[0]["status"]), _details(rows[0])
            if found.startswith("finished"):
                return found, details
        time.sleep(2)
    return found, details


def _details(row: Mapping[str, object]) -> str:
    """What Flower says of a run's end, "" for nothing."""
    found = str(row.get("status-details") or "")
    return "" if found == "N/A" else found
