"""The server of a federation: Flower's superlink with safe flags, and the nodes whose public keys lie in a folder."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

from fedkeel.deploy.admission import Admission
from fedkeel.deploy.flower import Server, check_free, check_insecure, environment, program
from fedkeel.deploy.keys import expires, exposed, files, hosts_of
from fedkeel.errors import ConfigError, RunError

START = 120.0
"""Seconds within which the server must answer."""
LOOK = 5.0
"""Seconds between looks at the folder of keys."""
GRACE = 15.0
"""Seconds to end in, before a process is killed."""
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}

Say = Callable[[str], None]


def command(host: str, port: int, database: Path, keys: Path | None) -> list[str]:
    """The superlink's words: TLS and node keys, or plain HTTP where keys is None."""
    words = [sys.executable, "-m", "fedkeel.deploy.superlink", "--host", host, "--port", str(port)]
    words += ["--database", str(database), "--disable-runtime-dependency-installation"]
    if keys is None:
        return [*words, "--insecure"]
    ca, certificate, key = (str(keys / name) for name in ("ca.crt", "server.crt", "server.key"))
    words += ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
    return [*words, "--enable-supernode-auth"]


def serve(
    keys: Path | None,
    host: str = "0.0.0.0",
    port: int = 8443,
    database: Path = Path("federation/state.db"),
    runs_dir: Path | None = None,
    say: Say = print,
) -> int:
    """Runs the server until SIGINT or SIGTERM; returns the exit code.

    keys: the folder of `fedkeel deploy keys`; nodes whose public key is put there later are let in, those whose key is
    taken away are shut out. None: plain HTTP without keys, on this machine only. runs_dir: folder of runs that name
    none. Raises ConfigError for what is wrong before the start.
    """
    program("flower-superlink")
    here = ANY.get(host, host)
    if keys is None:
        check_insecure(host, "--host")
    else:
        files(keys, "ca.crt", "server.crt", "server.key")
        if here not in hosts_of(keys):
            names = f"the server's certificate names {', '.join(hosts_of(keys))} only (fedkeel deploy keys --host)"
            raise ConfigError("--host", host, names)
        _check_certificate(keys, say)
        for text in exposed(keys, "server.key"):
            say(text)
    check_free(host, port)
    database = database.absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    more = {"FEDKEEL_RUNS_DIR": str(runs_dir.absolute())} if runs_dir else {}
    env = environment(database.parent / "flower", **more)
    (database.parent / "flower").mkdir(exist_ok=True)
    server = Server(f"[{here}]:{port}" if ":" in here else f"{here}:{port}", keys)
    stop = threading.Event()
    groups: set[int] = set()
    with ends(stop), running(command(host, port, database, keys), env, groups) as link:
        if not _up(server, link, stop):
            return _ended(link, stop, say)
        groups |= groups_under(link.pid)  # they are not to be found once it is dead
        say(
            f"the server answers on {host}:{port}" + (" (plain HTTP, no keys)" if keys is None else " (TLS, node keys)")
        )
        admission = None if keys is None else Admission(server, keys, say)
        while not stop.is_set() and link.poll() is None:
            if admission is not None:
                admission.look()
            stop.wait(LOOK)
        return _ended(link, stop, say)


@contextmanager
def ends(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`."""

    def asked(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(words: Sequence[str], env: dict[str, str], groups: set[int]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block: asked first, then killed, and its group, and the `groups`, with it."""
    process: subprocess.Popen[bytes] = subprocess.Popen(
        words, env=env, start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        finish(process, groups=groups)


def finish(process: subprocess.Popen[bytes], grace: float = GRACE, groups: Iterable[int] = ()) -> None:
    """Ends a process that leads a group, and whatever is left of that group, of `groups` and of its children's.

    Flower's server starts others in groups of their own, and does not wait for them: one that goes on for a while
    would still hold its run's folder.
    """
    left = {process.pid, *groups, *groups_under(process.pid)}  # before it ends: orphans are nobody's children
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    for group in left:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


def groups_under(process: int) -> set[int]:
    """Process groups of a process's descendants, the caller's own left out; {} where the system does not tell."""
    rows, family, size = _processes(), {process}, 0
    while len(family) > size:
        size = len(family)
        family |= {pid for pid, parent, _ in rows if parent in family}
    return {group for pid, _, group in rows if pid in family and pid != process} - {os.getpgrp()}


def _processes() -> list[tuple[int, int, int]]:
    """Number, parent and group of each process: from /proc (slim images have no ps), else from ps."""
    rows = []
    for path in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        with suppress(OSError, ValueError):  # it has ended, or is no process
            # "number (name) state parent group ...", and a name may hold anything
            _, parent, group, *_ = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
            rows.append((int(path.name), int(parent), int(group)))
    if rows:
        return rows
    words = ["ps", "-A", "-o", "pid=,ppid=,pgid="]
    with suppress(OSError):  # what asks wants to end a process: that must go on
        listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        for line in listed.splitlines():
            number, parent, group = line.split()
            rows.append((int(number), int(parent), int(group)))
    return rows


def _check_certificate(keys: Path, say: Say) -> None:
    """Warns of a certificate that ends soon. Raises ConfigError for one that has ended or does not go with its key."""
    path, end = keys / "server.crt", expires(keys)
    anew = "move server.crt and server.key away and call `fedkeel deploy keys` with the same --host where ca.key is"
    left = end - datetime.now(UTC)
    if left < timedelta():
        raise ConfigError("--keys", str(path), f"the certificate ended on {end:%Y-%m-%d}: {anew}")
    if left.days < 30:
        say(f"warning: the server's certificate ends on {end:%Y-%m-%d}: {anew}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, keys / "server.key", password="")
    except ssl.SSLError as error:
        raise ConfigError("--keys", str(path), f"does not go with server.key: {error.reason}") from None


def _up(server: Server, link: subprocess.Popen[bytes], stop: threading.Event) -> bool:
    """Waits for the server. Raises RunError when it does not answer, or answers without its guard, ConfigError when
    its certificate cannot be verified."""
    last, until = "", time.monotonic() + START
    while time.monotonic() < until:
        if stop.is_set() or link.poll() is not None:
            return False
        try:
            status, guarded = server.answer(timeout=5)
        except ssl.SSLCertVerificationError as error:
            why = f"server.crt cannot be verified by ca.crt: {error.verify_message}"
            raise ConfigError("--keys", str(server.keys), why) from None
        except (OSError, http.client.HTTPException) as error:
            last = str(error) or type(error).__name__
        else:
            if not guarded:
                raise RunError("this version of Flower starts without the guard of its commands; it was stopped")
            if status == 200:
                return True
            last = f"it answers with status {status}"
        stop.wait(0.5)
    raise RunError(f"the server does not answer on {server.where} after {START:.0f} seconds ({last}); its log is above")


def _ended(link: subprocess.Popen[bytes], stop: threading.Event, say: Say) -> int:
    if stop.is_set():
        say("stopping")
        return 0
    say(f"error: the server ended by itself with code {link.returncode}; its log is above")
    return 1
