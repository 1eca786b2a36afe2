"""A federation of real processes on this machine: a server, nodes, and runs; for tests and benchmarks.

    with Federation(folder, ["0", "1", "2"]) as federation:
        run = federation.submit(config)
        federation.kill("1")            # as a power cut would
        federation.start("1")           # the same key
        assert run.wait(600) == 0, run.log()

Everything is started by `fedkeel deploy`, with TLS and node keys unless `insecure`, and polls faster than by default.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fedkeel.config import Config
from fedkeel.deploy.flower import Server, free_port
from fedkeel.deploy.keys import make_keys
from fedkeel.deploy.server import groups_under
from fedkeel.deploy.submit import COMPONENTS

FEDKEEL = [sys.executable, "-c", "from fedkeel.cli import main; main()"]
SUBMIT = """
import json, sys
from pathlib import Path
from fedkeel.config import parse
from fedkeel.deploy.flower import Server
from fedkeel.deploy.submit import submit
import tomllib
given = json.loads(sys.argv[1])
keys = given["keys"] and Path(given["keys"])
config, server = parse(tomllib.loads(given["config"])), Server(given["server"], keys)
sys.exit(submit(config, server, given["resume"], given["runs_dir"], components=tuple(given["components"])))
"""
SERVER = "server"


class Process:
    """A process with a log, in a session of its own."""

    def __init__(self, words: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self.path = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env), cwd=cwd,
                start_new_session=True,
            )  # fmt: skip

    def log(self) -> str:
        """All it has said, and those before it with the same name."""
        return self.path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises TimeoutExpired."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to it and all it has started, at once."""
        groups = {self.process.pid, *groups_under(self.process.pid)}
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, then its exit code."""
        if self.alive:
            self.process.terminate()
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class Federation:
    """See the module. folder: for everything that is written; runs lie in folder/runs.

    nodes: their names, each also the client's. data: a site's own data by node's name. env: for all processes.
    components: the app, by import path.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[str],
        *,
        insecure: bool = False,
        data: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        components: tuple[str, str] = COMPONENTS,
    ) -> None:
        self.folder, self.nodes, self.data, self.components = folder, list(nodes), dict(data or {}), components
        self.port = free_port()
        self.keys = None if insecure else folder / "keys"
        self.runs = folder / "runs"
        self.processes: dict[str, Process] = {}
        here = str(Path(__file__).parent)
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")])),
            **(env or {}),
        }
        self._submitted = 0

    @property
    def where(self) -> str:
        """The server's address."""
        return f"127.0.0.1:{self.port}"

    @property
    def server(self) -> Server:
        """To ask it something."""
        return Server(self.where, self.keys)

    def __enter__(self) -> Federation:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.keys is not None:
            make_keys(self.keys, nodes=self.nodes)
        try:
            self.start(SERVER)
            self.until(lambda: "the server answers" in self.log(SERVER), 120, "the server")
            if self.keys is not None:
                self.until(lambda: self.log(SERVER).count("may join") >= len(self.nodes), 240, "registered nodes")
            for node in self.nodes:
                self.start(node)
            for node in self.nodes:
                self.until(lambda node=node: self.joined(node) > 0, 120, f"node {node}")  # type: ignore[misc]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process; nodes first, so that none waits for the server."""
        for name in sorted(self.processes, key=lambda name: name == SERVER):
            process = self.processes[name]
            if process.alive:
                with suppress(subprocess.TimeoutExpired):
                    process.stop()

    def start(self, name: str, *more: str) -> Process:
        """Starts the server or a node, again after it was killed. more: further words of its command."""
        trust = ["--insecure"] if self.keys is None else ["--keys", str(self.keys)]
        if name == SERVER:
            words = ["server", *trust, "--host", "127.0.0.1", "--port", str(self.port)]
            words += ["--database", str(self.folder / "server" / "state.db"), "--runs-dir", str(self.runs)]
        else:
            words = [
                "node",
                "--name",
                name,
                "--server",
                self.where,
                *trust,
                "--state",
                str(self.folder / f"node-{name}"),
            ]
            words += ["--data", self.data[name]] if name in self.data else []
        made = Process([*FEDKEEL, "deploy", *words, *more], self.folder / f"{name}.log", self.env, self.folder)
        self.processes[name] = made
        return made

    def kill(self, name: str) -> None:
        """SIGKILL to the server or a node, with all their processes."""
        self.processes[name].kill()

    def crash(self, name: str) -> None:
        """SIGKILL to Flower's processes of the server or a node only: a node's supervisor starts it again."""
        for group in groups_under(self.processes[name].process.pid):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def stop(self, name: str) -> int:
        """SIGTERM to the server or a node; its exit code."""
        return self.processes[name].stop()

    def log(self, name: str) -> str:
        """What the server or a node has said so far, in all its lives."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def joined(self, node: str) -> int:
        """How often a node has been accepted by the server."""
        return self.log(node).count("SuperNode ID:")

    def submit(self, config: Config, *, resume: bool = False) -> Process:
        """Starts a run; the process follows it, and ends with its exit code."""
        self._submitted += 1
        given = {
            "config": config.toml(),
            "keys": self.keys and str(self.keys),
            "server": self.where,
            "resume": resume,
            "runs_dir": str(self.runs),
            "components": self.components,
        }
        words = [sys.executable, "-c", SUBMIT, json.dumps(given)]
        name = f"submit-{self._submitted}"
        self.processes[name] = Process(words, self.folder / f"{name}.log", self.env, self.folder)
        return self.processes[name]

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits. Raises AssertionError with the logs' ends."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(f"--- {name}\n{self.log(name)[-2000:]}" for name in self.processes)
                raise AssertionError(f"no {what} after {seconds:.0f} seconds\n{logs}")
            time.sleep(0.1)
