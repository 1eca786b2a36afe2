"""A node of a federation: Flower's supernode, kept alive by a supervisor that knows what its refusals mean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import tomli_w

from fedkeel.deploy.flower import address, check_free, check_insecure, environment, free_port, program
from fedkeel.deploy.keys import exposed, files
from fedkeel.deploy.server import ends, finish
from fedkeel.errors import ConfigError
from fedkeel.files import locked, write

Why = Literal["key", "certificate", "clock", "port", "version", "other"]

SIGNS: Mapping[str, Why] = {
    r"\[code: 2004\]|Failed to activate SuperNode|No SuperNode found|could not be activated": "key",
    r"CERTIFICATE_VERIFY_FAILED|SSL/TLS handshake error|SSLCertVerification": "certificate",
    r"Invalid SuperNode authentication|401 Unauthorized": "clock",
    r"Errno 98|Errno 48|[Aa]ddress already in use": "port",
    r"Exit Code: 606": "version",
}
"""What in the supernode's log says why it ended (Flower 1.41 and 1.42)."""
LASTING: Mapping[Why, tuple[float, str]] = {
    "key": (
        180,
        "the server does not take this node's key: either it is not registered there (is its .pub file in the server's "
        "folder of keys?), or a node with the same key is connected; a killed node's key is taken again after a minute",
    ),
    "certificate": (
        20,
        "the server's certificate cannot be verified: ca.crt is of another federation, the certificate has ended, or "
        "it does not name this address (fedkeel deploy keys --host)",
    ),
    "clock": (180, "the server refuses this node's signature: are the clocks of both machines right?"),
    "version": (20, "the server runs another version of Flower; install the same one on all machines"),
}
"""Seconds after which a refusal is taken as final, and what it means."""
LONGEST = 60.0
"""Seconds between two attempts, at most."""
JOINED = "SuperNode ID:"
FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
"""What `module:function` looks like."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node on this machine.

    server: "host:port". keys: a folder with ca.crt and NAME.key; None: plain HTTP on this machine. name: the key's, and
    the client's unless `client` gives another. data: this site's own data, "" = its part of the configuration's.
    state: folder for what the client keeps. port: for Flower's own processes on this machine; None: a free one.
    """

    server: str
    keys: Path | None
    name: str
    state: Path
    client: str = ""
    data: str = ""
    port: int | None = None

    def check(self) -> None:
        """Raises ConfigError or MissingExtra for what can be seen before the start."""
        program("flower-supernode")
        host, _ = address(self.server)
        if self.keys is None:
            check_insecure(host, "--server")
        else:
            files(self.keys, "ca.crt", f"{self.name}.key")
        if self.port is not None:
            check_free("127.0.0.1", self.port)
        if self.data and not self.place.is_dir() and not re.fullmatch(FUNCTION, self.data):
            raise ConfigError("--data", self.data, "must be a folder on this machine, or module:function")

    @property
    def place(self) -> Path:
        """The site's data, where they are a folder."""
        return Path(self.data).expanduser()

    def config(self) -> dict[str, str]:
        """What the client's process is told."""
        found = {"client": self.client or self.name, "state-dir": str(self.state.absolute())}
        if self.data:
            found["data"] = str(self.place.absolute()) if self.place.is_dir() else self.data
        return found

    def command(self, port: int, config: Path) -> list[str]:
        """The supernode's words. config: a TOML file with `config()`, so that any path survives."""
        words = [program("flower-supernode"), "--superlink", self.server, "--host", "127.0.0.1", "--port", str(port)]
        words += ["--node-config", str(config)]
        if self.keys is None:
            return [*words, "--insecure"]
        words += ["--root-certificates", str(self.keys / "ca.crt")]
        return [*words, "--auth-supernode-private-key", str(self.keys / f"{self.name}.key")]

    def environment(self) -> dict[str, str]:
        """For the supernode and the client's processes."""
        # "module:function" of --data is looked up as `python -m` would
        path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        return environment(self.state / "flower", FEDKEEL_NODE="1", PYTHONPATH=path)


def reason(log: str) -> Why:
    """Why a supernode ended, from its log."""
    return next((why for sign, why in SIGNS.items() if re.search(sign, log)), "other")


def keep(node: Node, say: Say = print, patience: Mapping[Why, float] | None = None) -> int:
    """Runs the node until SIGINT or SIGTERM, starting it again whenever it ends; returns the exit code.

    1 when the server refuses it for good. patience: seconds for each kind of refusal, in place of LASTING's.
    """
    node.check()
    if node.keys is not None:
        for text in exposed(node.keys, f"{node.name}.key"):
            say(text)
    stop, wait = threading.Event(), 1.0
    why, first = "", 0.0  # of the refusals in a row, the last of which is the last end
    with _alone(node.state), ends(stop):
        (node.state / "flower").mkdir(exist_ok=True)
        config = (node.state / f"{node.name}.toml").absolute()
        write(config, tomli_w.dumps(node.config()).encode())
        while True:
            ended, joined = _once(node, config, stop)
            if stop.is_set():
                say(f"node {node.name}: stopped")
                return 0
            if joined:
                wait = 1.0
            fresh = joined or ended != why
            if fresh:
                why, first = ended, time.monotonic()
            if ended in LASTING:
                limit, meaning = LASTING[ended]
                limit = (patience or {}).get(ended, limit)
                if time.monotonic() - first >= limit:
                    say(f"error: node {node.name}: refused for {limit:.0f} seconds: {meaning}")
                    return 1
                if fresh:
                    say(f"node {node.name}: refused: {meaning}; trying on for {limit:.0f} seconds")
                wait = min(wait, 10.0)
            elif ended == "port" and node.port is not None:
                say(f"error: node {node.name}: port {node.port} is taken by another program")
                return 1
            else:
                say(f"node {node.name}: ended; it is started again in {wait:.0f} seconds")
            if stop.wait(wait):
                return 0
            wait = min(2 * wait, LONGEST)


def _alone(state: Path) -> AbstractContextManager[None]:
    """Keeps other nodes out of a state folder."""
    return locked(state, ConfigError("--state", str(state), "another node runs with this folder; give each its own"))


def _once(node: Node, config: Path, stop: threading.Event) -> tuple[Why, bool]:
    """One life of the supernode: why it ended, and whether the server had accepted it."""
    port = node.port or free_port()
    process: subprocess.Popen[bytes] = subprocess.Popen(
        node.command(port, config),
        env=node.environment(),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=100)
    joined = threading.Event()
    reader = threading.Thread(target=_pass_on, args=(process.stdout, lines, joined), daemon=True)
    reader.start()
    try:
        while process.poll() is None and not stop.wait(0.2):
            pass
    finally:
        # what is left of a killed node's processes must not go on with its work
        finish(process)
        reader.join(5)
    return reason("" if joined.is_set() else "".join(lines)), joined.is_set()


def _pass_on(source: IO[bytes], lines: deque[str], joined: threading.Event) -> None:
    """Copies a log to stderr and keeps its end."""
    with source:
        for line in source:
            text = line.decode(errors="replace")
            lines.append(text)
            if JOINED in text:
                joined.set()
            with suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()
