"""Deployment: keys, the words and environment of Flower's programs, refusals; slow ones with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
import tiny
from click.testing import Result
from federation import SERVER, Federation
from typer.testing import CliRunner

from fedkeel import cli
from fedkeel.deploy import admission, flower, keys, node, server, submit, superlink
from fedkeel.errors import ConfigError, MissingExtra, RunError

pytest.importorskip("flwr", reason="needs the extra `flower`")
APP = ("flower_app:server_app", "flower_app:client_app")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a federation of two; not changed by tests."""
    made = tmp_path_factory.mktemp("federation") / "keys"
    keys.make_keys(made, ["fed.example.org", "10.1.2.3", "::2"], ["berlin", "paris"], days=90)
    return made


def deploy(*words: str | Path) -> Result:
    """The command, as a shell would run it."""
    return CliRunner().invoke(cli.app, ["deploy", *map(str, words)], prog_name="fedkeel")


# keys -----------------------------------------------------------------------------------------------------------------


def test_the_chain_verifies_for_the_servers_names_and_for_no_others(folder: Path) -> None:
    from cryptography import x509
    from cryptography.x509 import verification

    ca, leaf = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    policy = verification.PolicyBuilder().store(verification.Store([ca]))
    for name in ("localhost", "fed.example.org"):
        assert policy.build_server_verifier(x509.DNSName(name)).verify(leaf, []) == [leaf, ca]
    with pytest.raises(verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere.example.org")).verify(leaf, [])
    assert keys.hosts_of(folder) == ["localhost", "fed.example.org", "127.0.0.1", "10.1.2.3", "::2"]
    assert timedelta(89) < keys.expires(folder) - datetime.now(UTC) < timedelta(91)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_only_its_owner_can_read_a_private_key(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {name for name in modes if name.endswith(".key")} == {"ca.key", "server.key", "berlin.key", "paris.key"}
    assert all((mode == 0o600) == name.endswith(".key") for name, mode in modes.items()), modes


def test_node_keys_are_what_flower_reads(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = form.load_ssh_private_key((folder / "berlin.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    public = form.load_ssh_public_key((folder / "berlin.pub").read_bytes())
    assert key.public_key() == public and (folder / "berlin.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert public != form.load_ssh_public_key((folder / "paris.pub").read_bytes())


def test_nodes_are_added_and_nothing_is_overwritten(tmp_path: Path) -> None:
    made = keys.make_keys(tmp_path / "k", nodes=["a"])
    before = {path: path.read_bytes() for path in (tmp_path / "k").iterdir()}
    assert set(made.new) == before.keys() and made.kept == ()
    (tmp_path / "k" / "ca.key").rename(tmp_path / "elsewhere")  # nodes are added without the authority's key
    del before[tmp_path / "k" / "ca.key"]
    more = keys.make_keys(tmp_path / "k", nodes=["a", "b"])
    assert [path.name for path in more.new] == ["b.key", "b.pub"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert keys.public(tmp_path / "k").keys() == {"a", "b"}


def test_another_host_wants_the_servers_certificate_out_of_the_way(tmp_path: Path) -> None:
    keys.make_keys(tmp_path, ["one.org"])
    with pytest.raises(ConfigError, match=r"--host = 'two.org': server.crt is there and names localhost, one.org"):
        keys.make_keys(tmp_path, ["one.org", "two.org"])
    ca = (tmp_path / "ca.crt").read_bytes()
    for name in ("server.key", "server.crt"):
        (tmp_path / name).unlink()
    keys.make_keys(tmp_path, ["one.org", "two.org"])
    assert "two.org" in keys.hosts_of(tmp_path) and (tmp_path / "ca.crt").read_bytes() == ca


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--node", "../a"], "--node = '../a'"),
        (["--node", "ca"], "ca and server are taken"),
        (["--host", "a b"], "--host = 'a b'"),
        (["--host", "host:8443"], "without port"),
    ],
)
def test_wrong_names_make_no_keys(tmp_path: Path, words: list[str], error: str) -> None:
    result = deploy("keys", tmp_path / "k", *words)
    assert result.exit_code == 2 and error in result.output and not (tmp_path / "k").exists()


def test_half_a_pair_is_an_error(tmp_path: Path) -> None:
    keys.make_keys(tmp_path, nodes=["a"])
    (tmp_path / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"holds server.crt but not server.key"):
        keys.make_keys(tmp_path)
    (tmp_path / "server.crt").unlink()
    (tmp_path / "a.key").unlink()
    with pytest.raises(ConfigError, match=r"a.pub is there without its private key"):
        keys.make_keys(tmp_path, nodes=["a"])


def test_the_command_says_where_each_file_goes(tmp_path: Path) -> None:
    result = deploy("keys", tmp_path / "k", "--host", "fed.org", "--node", "a", "--node", "b")
    assert result.exit_code == 0, result.output
    assert "server: ca.crt server.crt server.key a.pub b.pub" in result.output
    assert "node b: ca.crt b.key" in result.output
    again = deploy("keys", tmp_path / "k", "--node", "a")
    assert "made: nothing, all is there" in again.output


def test_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    keys.make_keys(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_private_key_that_others_can_read_is_told(tmp_path: Path) -> None:
    keys.make_keys(tmp_path, nodes=["a", "b"])
    (tmp_path / "a.key").chmod(0o640)
    (warning,) = keys.exposed(tmp_path, "a.key", "b.key", "server.key")
    assert f"{tmp_path}/a.key" in warning and "mode 0640" in warning


def test_a_certificate_that_cannot_serve_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.make_keys(tmp_path, days=20)
    said: list[str] = []
    server._check_certificate(tmp_path, said.append)
    assert len(said) == 1 and "ends on" in said[0] and "with the same --host" in said[0]
    other = keys.make_keys(tmp_path / "other").new
    assert tmp_path / "other" / "server.key" in other
    (tmp_path / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    with pytest.raises(ConfigError, match=r"server.crt': does not go with server.key"):
        server._check_certificate(tmp_path, said.append)
    monkeypatch.setattr(server, "expires", lambda keys: datetime(2020, 1, 31, tzinfo=UTC))
    with pytest.raises(ConfigError, match=r"server.crt': the certificate ended on 2020-01-31: move"):
        server.serve(tmp_path, "127.0.0.1", database=tmp_path / "state.db")
    assert not (tmp_path / "state.db").exists()


def test_a_certificate_that_cannot_be_verified_is_no_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: flower.Server, path: str = "/health", timeout: float = 10) -> tuple[int, bool]:
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_message = "unable to get local issuer certificate"
        raise error

    monkeypatch.setattr(flower.Server, "answer", answer)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as link:
        with pytest.raises(ConfigError, match=r"server.crt cannot be verified by ca.crt: unable to get"):
            server._up(flower.Server("127.0.0.1:1", folder), link, threading.Event())
        link.kill()


# who may join ---------------------------------------------------------------------------------------------------------


class Link:
    """Flower's list of nodes: a key is taken once, and stays after its node was shut out."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self.asked = 0
        self.fails = ""

    def nodes(self) -> list[dict[str, str]]:
        self.asked += 1
        return [dict(row) for row in self.rows]

    def __call__(self, room: str, word: str, what: str, *more: str) -> Mapping[str, object]:
        assert room == "supernode"
        if word == "unregister":
            (row,) = [row for row in self.rows if row["node"] == what and row["status"] != admission.SHUT]
            row["status"] = admission.SHUT
            return {}
        key = keys.public_key(Path(what))
        if Path(what).stem == self.fails:
            raise RunError("flwr supernode: the server is busy")
        assert word == "register" and more[0] == "--name" and key not in {row["key"] for row in self.rows}
        self.rows.append({"name": more[1], "node": str(len(self.rows)), "status": "registered", "key": key})
        return {"node-id": self.rows[-1]["node"]}

    @property
    def admitted(self) -> list[str]:
        """Names of those that may join."""
        return sorted(row["name"] for row in self.rows if row["status"] != admission.SHUT)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    made = Link()

    @contextmanager
    def control(server: flower.Server) -> Iterator[Link]:
        yield made

    monkeypatch.setattr(admission, "control", control)
    return made


def door(folder: Path, said: list[str]) -> admission.Admission:
    """A server that has just started."""
    return admission.Admission(flower.Server("127.0.0.1:1", None), folder, said.append)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Keys of a and b."""
    keys.make_keys(tmp_path / "k", nodes=["a", "b"])
    return tmp_path / "k"


def test_keys_come_and_go(two: Path, link: Link) -> None:
    said: list[str] = []
    at = door(two, said)
    for _ in range(3):
        at.look()
    assert said == ["node a may join", "node b may join"] and link.asked == 1
    keys.make_keys(two, nodes=["c"])
    (two / "a.pub").rename(two / "a.old")
    at.look()
    assert said[2:] == [f"node a is shut out: its key is gone from {two}", "node c may join"]
    (two / "a.old").rename(two / "a.pub")
    for _ in range(3):
        at.look()
    assert len(said) == 5 and "a.pub: this key was shut out before" in said[4] and "under a new name" in said[4]
    assert link.admitted == ["b", "c"]


def test_a_new_key_under_an_old_name_shuts_out_the_old_one(two: Path, link: Link) -> None:
    said: list[str] = []
    at = door(two, said)
    at.look()
    for end in ("key", "pub"):
        (two / f"a.{end}").unlink()
    keys.make_keys(two, nodes=["a"])
    at.look()
    assert said[2:] == [f"node a is shut out: its key is gone from {two}", "node a may join"]
    assert [row["key"] for row in link.rows if row["status"] != admission.SHUT] == [
        keys.public_key(two / "b.pub"),
        keys.public_key(two / "a.pub"),
    ]


def test_a_deleted_key_is_shut_out_whatever_happened_before(two: Path, link: Link, tmp_path: Path) -> None:
    """A server that died between two registrations, then a folder of keys made anew: only Flower's list remains."""
    link.fails = "b"
    said: list[str] = []
    door(two, said).look()
    assert said[0] == "node a may join" and "b.pub: flwr supernode: the server is busy" in said[1]
    link.fails = ""
    (two / "a.pub").unlink()
    door(two, said).look()
    assert link.admitted == ["b"]
    keys.make_keys(tmp_path / "new", nodes=["b", "c"])
    door(tmp_path / "new", said).look()
    assert link.admitted == ["b", "c"] and [row["status"] for row in link.rows[:2]] == [admission.SHUT] * 2
    assert not list(two.glob("*.json")), "the folder of keys may be read-only"


def test_what_failed_is_tried_again_and_told_once(two: Path, link: Link) -> None:
    link.fails = "a"
    said: list[str] = []
    at = door(two, said)
    for _ in range(3):
        at.look()
    assert len(said) == 2 and said[0].startswith("warning: node a may not join yet") and said[1] == "node b may join"
    link.fails = ""
    at.look()
    assert said[2:] == ["node a may join"]


@pytest.mark.parametrize("case", ["folder", "files"])
def test_keys_that_are_all_gone_are_a_fault(two: Path, link: Link, case: str) -> None:
    said: list[str] = []
    at = door(two, said)
    at.look()
    away = two.with_name("away")
    two.rename(away)
    if case == "files":
        two.mkdir()
    at.look()
    at.look()
    assert len(said) == 3 and f"there is no NAME.pub in {two}" in said[2] and link.admitted == ["a", "b"]
    if case == "files":
        two.rmdir()
    away.rename(two)
    at.look()
    assert len(said) == 3 and link.admitted == ["a", "b"]


def test_a_file_that_is_no_key_is_named_and_stops_nobody(two: Path, link: Link) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed25519

    said: list[str] = []
    at = door(two, said)
    at.look()
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    (two / "a.pub").write_text("half a k")  # as while it is copied: a stays
    (two / "aa.pub").write_bytes(key.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH))
    keys.make_keys(two, nodes=["c"])
    at.look()
    at.look()
    assert len(said) == 5 and said[4] == "node c may join" and link.admitted == ["a", "b", "c"]
    assert f"{two}/a.pub': cannot be read as a public key" in said[2]
    assert f"{two}/aa.pub': must be on an elliptic curve" in said[3]


@pytest.mark.full
def test_flowers_own_list_has_what_admission_needs(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's app in this process, asked by Flower's commands."""
    import uvicorn
    from flwr.superlink.main import create_app

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    served = uvicorn.Server(
        uvicorn.Config(create_app(), host="127.0.0.1", port=flower.free_port(), log_level="warning", ws="none")
    )
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        while not served.started:
            time.sleep(0.05)
        said: list[str] = []
        there = flower.Server(f"127.0.0.1:{served.config.port}", None)
        at = admission.Admission(there, two, said.append)
        at.look()
        (two / "a.pub").rename(two / "a.old")
        at.look()
        (two / "a.old").rename(two / "a.pub")
        at.look()
        with flower.control(there) as ask:
            found = {each["name"]: (each["status"], each["key"]) for each in ask.nodes()}
        named = submit.status(there)["nodes"]
    finally:
        served.should_exit = True
        thread.join()
    assert said[:2] == ["node a may join", "node b may join"] and "a is shut out" in said[2]
    assert "this key was shut out before" in said[3] and len(said) == 4
    assert found == {
        "a": (admission.SHUT, keys.public_key(two / "a.pub")),
        "b": ("registered", keys.public_key(two / "b.pub")),
    }
    assert [each["name"] for each in cast(list[dict[str, str]], named)] == ["b"]


# ends -----------------------------------------------------------------------------------------------------------------


def test_a_processs_groups_are_found_with_proc_or_ps_and_it_ends_without_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [sys.executable, "-c", "import os; os.setsid() if os.fork() == 0 else 0; os.write(1, b'1\\n'); input()"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdin is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == process.stdout.readline() == b"1\n"
        groups = server.groups_under(process.pid)
        assert len(groups - {process.pid}) == 1
        monkeypatch.setattr(Path, "is_dir", lambda path: False)
        assert server.groups_under(process.pid) == groups
        monkeypatch.setenv("PATH", "")
        assert server.groups_under(process.pid) == set()
        server.finish(process, grace=5, groups=groups)
        assert process.returncode == -15
        assert process.stdout.read() == b""  # nobody is left who could write


# a node's life --------------------------------------------------------------------------------------------------------


def test_two_nodes_do_not_share_a_state_folder(folder: Path, tmp_path: Path) -> None:
    made = node.Node(server="fed.org:8443", keys=folder, name="berlin", state=tmp_path / "state")
    with node._alone(made.state), pytest.raises(ConfigError, match=r"--state = .*another node runs with this folder"):
        node.keep(made)
    assert not (made.state / "berlin.toml").exists()


def test_a_refusal_is_final_only_after_its_time_in_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old refusal does not count for a new one: between them the node ended for another reason."""
    ends: list[tuple[node.Why, bool]] = [("key", False), ("other", False), ("key", False), ("key", False)]
    now = [1000.0]

    def once(made: node.Node, config: Path, stop: threading.Event) -> tuple[node.Why, bool]:
        assert tomllib.loads((made.state / "berlin.toml").read_text())["client"] == "berlin"
        now[0] += 3600
        return ends.pop(0)

    monkeypatch.setattr(node, "_once", once)
    monkeypatch.setattr(node, "LONGEST", 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said: list[str] = []
    made = node.Node(server="fed.org:8443", keys=folder, name="berlin", state=tmp_path / "state")
    assert node.keep(made, said.append) == 1 and not ends
    assert ["refused:" in line for line in said] == [True, False, True, False] and "error" in said[3]


# what Flower's programs are told --------------------------------------------------------------------------------------


def test_the_server_is_started_with_tls_and_node_keys_and_installs_nothing() -> None:
    words = server.command("0.0.0.0", 8443, Path("state.db"), Path("k"))
    assert words[:3] == [sys.executable, "-m", "fedkeel.deploy.superlink"]
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(words)
    assert words[words.index("--ssl-keyfile") + 1] == "k/server.key" and "--insecure" not in words
    plain = server.command("127.0.0.1", 8443, Path("state.db"), None)
    assert "--insecure" in plain and "--disable-runtime-dependency-installation" in plain
    assert not {"--enable-supernode-auth", "--ssl-keyfile"} & set(plain)


def test_the_environment_turns_off_what_calls_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    env = flower.environment(tmp_path, FEDKEEL_NODE="1")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["RAY_USAGE_STATS_ENABLED"] == "0" and env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_HOME"] == str(tmp_path) and env["FEDKEEL_NODE"] == "1" and "FORWARDED_ALLOW_IPS" not in env
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_node_is_told_who_it_is_and_where_its_data_lie(tmp_path: Path, folder: Path) -> None:
    from flwr.common.config import parse_config_args

    place = tmp_path / 'it\'s "here" = there'
    place.mkdir()
    made = node.Node(server="fed.org:8443", keys=folder, name="berlin", state=place / "state", data=str(place))
    words = made.command(9100, Path("node.toml"))
    assert words[words.index("--superlink") + 1] == "fed.org:8443" and "--insecure" not in words
    assert words[words.index("--auth-supernode-private-key") + 1] == str(folder / "berlin.key")
    assert words[words.index("--root-certificates") + 1] == str(folder / "ca.crt")
    assert made.environment()["FEDKEEL_NODE"] == "1"
    import tomli_w

    (tmp_path / "node.toml").write_text(tomli_w.dumps(made.config()))
    read = parse_config_args([str(tmp_path / "node.toml")])  # as flower-supernode reads --node-config
    assert read == {"client": "berlin", "state-dir": str(place / "state"), "data": str(place)}
    other = node.Node(server="a:1", keys=folder, name="berlin", state=place, client="3", data="sites:load")
    assert other.config()["client"] == "3" and other.config()["data"] == "sites:load"


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_configuration_of_any_text_survives_the_app(tmp_path: Path) -> None:
    import tomli_w
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.config import get_fab_config

    config = tiny.config('name="Ünder \'the\' \\"sea\\" ${x}"', "local.lr=0.123")
    (tmp_path / "pyproject.toml").write_text(tomli_w.dumps(submit.app(config, resume=True, runs_dir="/srv/my runs")))
    read = get_fab_config(build_fab_from_disk(tmp_path))
    told = read["tool"]["flwr"]["app"]["config"]
    assert tomllib.loads(told["config"]) == config.table()
    assert told["resume"] is True and told["runs-dir"] == "/srv/my runs"
    assert read["tool"]["flwr"]["app"]["components"]["serverapp"] == "fedkeel.runtimes.flower:server_app"
    assert read["project"]["dependencies"] == []


def test_a_trackers_password_is_not_handed_to_the_sites() -> None:
    """Flower installs the app on every node. The error does not repeat it either."""
    with pytest.raises(ConfigError, match=r"mlflow = 'https://\.\.\.@host': .*MLFLOW_TRACKING_PASSWORD") as found:
        submit.app(tiny.config("mlflow=https://me:secret@host/api"))
    assert "secret" not in str(found.value)
    submit.app(tiny.config("mlflow=https://host/api"))


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["server", "--insecure", "--host", "0.0.0.0"],
            "--host = '0.0.0.0': plain HTTP without keys is for this machine",
        ),
        (["server"], "give a folder of keys (fedkeel deploy keys), or --insecure"),
        (["server", "--keys", "KEYS", "--insecure"], "not both"),
        (["server", "--keys", "nowhere"], "nowhere/ca.crt': there is no such file"),
        (["server", "--keys", "KEYS", "--host", "10.9.9.9"], "the server's certificate names localhost,"),
        (["server", "--keys", "KEYS", "--host", "127.0.0.1", "--port", "TAKEN"], "Address already in use"),
        (["node", "--name", "berlin", "--server", "fed.org:8443", "--insecure"], "--server = 'fed.org'"),
        (["node", "--name", "rome", "--server", "fed.org:8443", "--keys", "KEYS"], "rome.key': there is no such file"),
        (["node", "--name", "berlin", "--server", "fed.org", "--keys", "KEYS"], "must look like host:port"),
        (
            ["node", "--name", "berlin", "--server", "fed.org:8443", "--keys", "KEYS", "--data", "/no/scans"],
            "--data = '/no/scans': must be a folder on this machine, or module:function",
        ),
        (["status", "--server", "127.0.0.1:1", "--keys", "KEYS"], "no server answers there: Connection refused"),
        (["status", "--server", "127.0.0.1:1", "--keys", "nowhere"], "there is no such file"),
        (["stop", "last", "--server", "127.0.0.1:1", "--keys", "KEYS"], "must be a run's number"),
        (["submit", "exp.toml", "--server", "127.0.0.1:1", "--keys", "KEYS"], "CONFIG = 'exp.toml': there is no such"),
        (["submit", "bad.toml", "--server", "127.0.0.1:1", "--keys", "KEYS"], "Did you mean 'rounds'?"),
    ],
)
def test_mistakes_are_one_clear_line(
    words: list[str], error: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("round = 3")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = {"KEYS": str(folder), "TAKEN": str(taken.getsockname()[1])}
        result = deploy(*(given.get(word, word) for word in words))
    assert result.exit_code == 2 and error in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1


def test_without_flower_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedkeel\[flower\]'"):
        flower.program("flower-superlink")


def test_deploy_costs_the_command_line_no_import_of_flower() -> None:
    code = "import sys, fedkeel.cli; print([name for name in sys.modules if name.split('.')[0] in ('flwr', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("Exit Code: 305\nFailed to initialize\n[code: 2004] Failed to activate SuperNode.\n", "key"),
        (
            "SSL/TLS handshake error detected.\n[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed\n",
            "certificate",
        ),
        ("[Errno 98] error while attempting to bind on address: address already in use\n", "port"),
        ("Killed\n", "other"),
    ],
)
def test_the_log_says_why_a_node_ended(log: str, why: str) -> None:
    assert node.reason(log) == why


# the guard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "client", "may"),
    [
        ("/v1/fleet/pull-messages", "203.0.113.9", True),
        ("/health", "203.0.113.9", True),
        ("/v1/control/start-run", "203.0.113.9", False),
        ("/v1/runtime/acquire-task", "203.0.113.9", False),
        ("/v1/fleet/../control/start-run", "203.0.113.9", True),  # no such route: see below
        ("/v1/fleets", "203.0.113.9", False),
        ("/docs", "203.0.113.9", False),
        ("/v1/control/start-run", "127.0.0.1", True),
        ("/v1/control/start-run", "::1", True),
        ("/v1/control/start-run", "10.0.0.5", True),  # the server's own address
        ("/v1/control/start-run", "testclient", False),
        ("/v1/control/start-run", None, False),
    ],
)
def test_commands_are_taken_from_the_servers_machine_only(path: str, client: str | None, may: bool) -> None:
    scope = {"type": "http", "path": path, "client": client and (client, 40000), "server": ("10.0.0.5", 8443)}
    assert superlink.allowed(scope) is may


def test_flowers_own_app_is_guarded() -> None:
    """Flower's routes as they are: no path of commands is among those that are open, and none is reached by dots."""
    import httpx
    from flwr.superlink.main import create_app

    app = create_app()
    app.add_middleware(superlink.Guard)

    async def ask(path: str, client: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(client, 40000))
        async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.5") as link:
            return await link.post(path, content=b"")

    paths = {"/docs", "/openapi.json", *app.openapi()["paths"]}
    commands = {path for path in paths if not path.startswith(superlink.OPEN)}
    assert {"/v1/control/start-run", "/v1/control/register-node"} <= commands
    for path in sorted(commands):
        reply = asyncio.run(ask(path, "203.0.113.9"))
        assert reply.status_code == 403 and superlink.MARK.decode() in reply.headers, path
    assert asyncio.run(ask("/v1/fleet/%2e%2e/control/start-run", "203.0.113.9")).status_code == 404
    assert asyncio.run(ask("/v1/control/start-run", "127.0.0.1")).status_code not in (403, 404)
    assert asyncio.run(ask("/v1/fleet/pull-messages", "203.0.113.9")).status_code not in (403, 404)


def test_a_server_without_its_guard_is_not_left_running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = "import http.server as h; h.HTTPServer(('127.0.0.1', {}), h.SimpleHTTPRequestHandler).serve_forever()"
    port, started = flower.free_port(), []

    def unguarded(host: str, port: int, database: Path, keys: Path | None) -> list[str]:
        started.append(port)
        return [sys.executable, "-c", answers.format(port)]

    monkeypatch.setattr(server, "command", unguarded)
    with pytest.raises(RunError, match="without the guard"):
        server.serve(None, "127.0.0.1", port, tmp_path / "state.db")
    assert started == [port]
    flower.check_free("127.0.0.1", port)


# real processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server and two nodes with TLS and keys, and an app that says what it was given."""
    with Federation(
        tmp_path_factory.mktemp("deployed"), ["berlin", "paris"], data={"paris": "sites:load"}, components=APP
    ) as made:
        yield made


@pytest.mark.slow
def test_a_run_reaches_all_nodes_and_ends_as_it_should(federation: Federation) -> None:
    good = federation.submit(tiny.config('name="says \\"hello\\""'))
    assert good.wait(300) == 0, good.log()
    told = [json.loads(line.partition("TOLD ")[2]) for line in good.log().splitlines() if line.startswith("TOLD ")]
    assert {each["client"]: each.get("data") for each in told} == {"berlin": None, "paris": "sites:load"}
    assert all(each["mark"] == "1" for each in told)
    (run,) = [json.loads(line.partition("RUN ")[2]) for line in good.log().splitlines() if line.startswith("RUN ")]
    assert tomllib.loads(run["config"]) == tiny.config('name="says \\"hello\\""').table()
    bad = federation.submit(tiny.config("name=fails"))
    assert bad.wait(300) == 1 and "finished:failed" in bad.log() and "this run fails" in bad.log()
    found = submit.status(federation.server)
    assert {(each["name"], each["status"]) for each in found["nodes"]} == {("berlin", "online"), ("paris", "online")}  # type: ignore[index,attr-defined]
    assert [each["status"] for each in found["runs"]] == ["finished:failed", "finished:completed"]  # type: ignore[index,attr-defined]


@pytest.mark.slow
def test_a_run_is_left_and_stopped(federation: Federation) -> None:
    waiting = federation.submit(tiny.config("name=waits"))
    federation.until(lambda: "flwr-serverapp" in waiting.log(), 200, "log of the run")
    waiting.process.send_signal(2)
    assert waiting.wait(60) == 130 and "goes on; to stop it: fedkeel deploy stop" in waiting.log()
    (run,) = [each["run"] for each in submit.status(federation.server)["runs"] if each["status"] == "running"]  # type: ignore[attr-defined]
    submit.stop(federation.server, run)
    states = {each["run"]: each["status"] for each in submit.status(federation.server)["runs"]}  # type: ignore[attr-defined]
    assert states[run] == "finished:stopped"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unregistered", "wrong CA", "stolen key"])
def test_strangers_are_refused(federation: Federation, tmp_path: Path, case: str) -> None:
    """A node whose key is not registered, one with another authority's certificate, and one with the key of a node that
    is there (stolen key) are refused. The first message names the cause; after its patience the supervisor gives up
    with code 1."""
    keys.make_keys(tmp_path / "other", nodes=["berlin"])
    ours = {"unregistered": "ca.crt", "wrong CA": "berlin.key", "stolen key": "ca.crt berlin.key"}[case].split()
    for name in ours:
        assert federation.keys is not None
        (tmp_path / "other" / name).write_bytes((federation.keys / name).read_bytes())
    made = node.Node(server=federation.where, keys=tmp_path / "other", name="berlin", state=tmp_path / "state")
    said: list[str] = []
    assert node.keep(made, said.append, {"key": 5, "certificate": 5}) == 1
    meaning = "certificate cannot be verified" if case == "wrong CA" else "does not take this node's key"
    assert all("refused" in line and meaning in line for line in said) and said[-1].startswith("error: node berlin")
    assert federation.processes["berlin"].alive and federation.joined("berlin") >= 1
    if case == "wrong CA":
        with pytest.raises(ConfigError, match="its certificate is not one of"):
            submit.status(flower.Server(federation.where, tmp_path / "other"))


@pytest.mark.slow
def test_a_killed_supernode_comes_back_by_itself(federation: Federation) -> None:
    """Flower's node process is killed: `fedkeel deploy node` starts it again, and it is the same node."""
    before = federation.joined("paris")
    federation.crash("paris")
    federation.until(lambda: federation.joined("paris") > before, 180, "restart of paris")
    number = [line for line in federation.log("paris").splitlines() if "SuperNode ID:" in line]
    assert len({line.rpartition(" ")[2] for line in number}) == 1, "it is another node now"


@pytest.mark.slow
def test_sites_come_and_go_while_the_server_runs(federation: Federation) -> None:
    """A new site's public key is put into the folder: it may join. It is deleted: the site is shut out, for good."""
    assert federation.keys is not None
    keys.make_keys(federation.keys, nodes=["rome"])
    federation.until(lambda: "node rome may join" in federation.log(SERVER), 120, "registration of rome")
    federation.start("rome")
    federation.until(lambda: federation.joined("rome") > 0, 120, "node rome")
    assert federation.stop("rome") == 0
    (federation.keys / "rome.pub").rename(federation.keys / "rome.old")
    federation.until(lambda: "node rome is shut out" in federation.log(SERVER), 120, "shutting out of rome")
    (federation.keys / "rome.pub").write_text((federation.keys / "rome.old").read_text())
    again = "rome.pub: this key was shut out before"
    federation.until(lambda: again in federation.log(SERVER), 120, "word of rome's return")
    left = submit.status(federation.server)["nodes"]
    assert "rome" not in {each["name"] for each in left}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_plain_http_on_this_machine(tmp_path: Path) -> None:
    with Federation(tmp_path, ["0"], insecure=True, components=APP) as plain:
        run = plain.submit(tiny.config())
        assert run.wait(300) == 0, run.log()
        waiting = plain.submit(tiny.config("name=waits"))
        plain.until(lambda: "flwr-serverapp" in waiting.log(), 200, "log of the run")
        keys.make_keys(tmp_path / "k")
        with pytest.raises(ConfigError, match="does not speak TLS"):
            flower.Server(plain.where, tmp_path / "k").check()
        assert plain.stop(SERVER) == 0
        assert "flwr-serverapp" not in _processes(plain.where), "a run outlived its server"
        assert waiting.wait(200) == 1


def _processes(word: str) -> str:
    listed = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if word in line)


def test_the_certificate_holds_in_a_handshake(folder: Path) -> None:
    """Python's own TLS, strict as from 3.13 on."""
    served, trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=folder / "ca.crt")
    served.load_cert_chain(folder / "server.crt", folder / "server.key")
    trust.verify_flags |= ssl.VERIFY_X509_STRICT
    for name, good in (("fed.example.org", True), ("10.1.2.3", True), ("fed.example.com", False)):
        down, up = ssl.MemoryBIO(), ssl.MemoryBIO()
        client, host = trust.wrap_bio(down, up, server_hostname=name), served.wrap_bio(up, down, server_side=True)
        if good:
            _shake(client, host)
            assert client.version() == "TLSv1.3"
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                _shake(client, host)


def _shake(*ends: ssl.SSLObject) -> None:
    """Both sides in turn until neither waits."""
    left = list(ends)
    for end in left * 8:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
