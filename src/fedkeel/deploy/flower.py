"""Flower's own programs: the environment they run in, and its commands with answers as JSON.

Telemetry and update checks are off, nothing is installed at run time, and the user's ~/.flwr is left alone.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedkeel.deploy.keys import files
from fedkeel.errors import ConfigError, MissingExtra, RunError

LINK = "fedkeel"
"""What the server is called in the configuration that Flower's commands read."""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def environment(home: Path, **more: str) -> dict[str, str]:
    """For Flower's programs. home: where Flower keeps its files; more: further variables."""
    binaries = str(Path(sys.executable).parent)  # Flower starts its other programs by name
    found = {**os.environ, **QUIET, "FLWR_HOME": str(home.absolute()), "PYTHONUNBUFFERED": "1", **more}
    found["PATH"] = os.pathsep.join([binaries, os.environ.get("PATH", os.defpath)])
    found.pop("FORWARDED_ALLOW_IPS", None)  # would let a request say which machine it comes from
    return found


def program(name: str) -> str:
    """Where one of Flower's programs is. Raises MissingExtra."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None or importlib.util.find_spec("flwr") is None:
        raise MissingExtra("fedkeel deploy", "flower")
    return found


def address(text: str, key: str = "--server") -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(key, text, "must look like host:port, such as server.example.org:8443")
    return host.strip("[]"), int(port)


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_free(host: str, port: int, key: str = "--port") -> None:
    """Raises ConfigError when this machine cannot listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(key, port, f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def check_insecure(host: str, key: str) -> None:
    """Raises ConfigError where plain HTTP would cross a network."""
    if host not in LOOPBACK:
        allowed = f"plain HTTP without keys is for this machine only ({', '.join(LOOPBACK)}); leave out --insecure"
        raise ConfigError(key, host, allowed)


@dataclass(frozen=True)
class Server:
    """A server to talk to. keys: a folder with ca.crt; None: plain HTTP, on this machine only."""

    where: str
    keys: Path | None

    def __post_init__(self) -> None:
        host, _ = address(self.where)
        if self.keys is None:
            check_insecure(host, "--server")
        else:
            files(self.keys, "ca.crt")

    def answer(self, path: str = "/health", timeout: float = 10) -> tuple[int, bool]:
        """Status of a GET, and whether the server is guarded. Raises OSError, ssl.SSLError or HTTPException."""
        host, port = address(self.where)
        if self.keys is None:
            link = http.client.HTTPConnection(host, port, timeout=timeout)
        else:
            trust = ssl.create_default_context(cafile=str(self.keys / "ca.crt"))
            link = http.client.HTTPSConnection(host, port, timeout=timeout, context=trust)
        try:
            link.request("GET", path)
            reply = link.getresponse()
            return reply.status, reply.getheader("x-fedkeel-guard") is not None
        finally:
            link.close()

    def check(self) -> None:
        """Raises ConfigError when no server of this federation answers, or it takes no commands from here."""
        try:
            self.answer()
            status, _ = self.answer("/openapi.json")
        except ssl.SSLCertVerificationError as error:
            ours = f"its certificate is not one of {self.keys}: {error.verify_message}"
            raise ConfigError("--server", self.where, ours) from None
        except ssl.SSLError as error:
            raise ConfigError("--server", self.where, f"does not speak TLS ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, http.client.RemoteDisconnected) and self.keys is None:
                why = "it seems to speak TLS; give --keys, without --insecure"
            raise ConfigError("--server", self.where, f"no server answers there: {why}") from None
        if status == 403:
            _, port = address(self.where)
            way = f"ssh -L {port}:127.0.0.1:{port} SERVER, then --server 127.0.0.1:{port}"
            raise ConfigError("--server", self.where, f"takes commands from its own machine only; go there, or {way}")


class Control:
    """Flower's commands to one server."""

    def __init__(self, server: Server, home: Path) -> None:
        self.server, self.env = server, environment(home, COLUMNS="200", NO_COLOR="1")

    def __call__(self, *words: str) -> Mapping[str, object]:
        """The answer to a command such as ("supernode", "list"). Raises RunError with Flower's message."""
        return self._answer(self.command(*words, "--format", "json"), words[0])

    def nodes(self) -> list[dict[str, str]]:
        """All nodes that Flower knows, those shut out too: name, node (its number), status, key. Raises RunError."""
        found = self._answer([sys.executable, "-m", "fedkeel.deploy.known_nodes", LINK], "supernode")["nodes"]
        assert isinstance(found, list)
        return found

    def _answer(self, command: list[str], word: str) -> Mapping[str, object]:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        try:
            found = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            found = {}
        if done.returncode or not found.get("success"):
            said = str(found.get("error-message") or done.stderr or done.stdout or f"exit code {done.returncode}")
            said = " ".join(said[max(said.find("[code"), 0) :].split())  # what it was doing stands before that
            raise RunError(f"flwr {word}: {said}")
        return dict(found)

    def command(self, *words: str) -> list[str]:
        """The words of a command; the server's name goes where the command wants it, after all arguments."""
        return [program("flwr"), *words, LINK]


@contextmanager
def control(server: Server) -> Iterator[Control]:
    """Flower's commands, with a configuration of their own. Raises ConfigError when the server does not answer."""
    program("flwr")
    server.check()
    with tempfile.TemporaryDirectory(prefix="fedkeel-") as place:
        home = Path(place)
        link: dict[str, object] = {"address": server.where}
        if server.keys is None:
            link["insecure"] = True
        else:
            link["root-certificates"] = str((server.keys / "ca.crt").absolute())
        (home / "config.toml").write_bytes(tomli_w.dumps({"superlink": {"default": LINK, LINK: link}}).encode())
        yield Control(server, home)
