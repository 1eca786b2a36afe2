"""Clients in processes of Ray: the same numbers as in one process, whatever becomes of the processes."""

from __future__ import annotations

import gc
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import battery
import pytest
import tiny
import torch
from safetensors.torch import load_file

from fedkeel import registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.config import Config, read
from fedkeel.errors import ConfigError, MissingExtra, UndeclaredField
from fedkeel.federation import FINEST, Cluster
from fedkeel.job import Job
from fedkeel.loop import Result, resume, run
from fedkeel.options import option
from fedkeel.record import Silent, numbers
from fedkeel.records import Local, Reply, Samples, Update
from fedkeel.runtimes import ray as on_ray
from fedkeel.runtimes.boxes import Box, boxed, unboxed
from fedkeel.runtimes.ray_worker import Actor

try:
    ray = on_ray._ray()
except MissingExtra as missing:
    pytest.skip(str(missing), allow_module_level=True)

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files and processes open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # how pytest reports these
]
ON_RAY = ("runtime=ray", "ray.actors=2")
UNIFORM = "algorithm.weights=uniform"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with room for two."""
    assert on_ray.join(Cluster(actors=2))
    assert not on_ray.join(Cluster(actors=2))  # connected already
    yield
    ray.shutdown()
    with warnings.catch_warnings():  # Ray leaves files and ended processes to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


class Heard(Silent):
    """Keeps warnings and how far the making of images was."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.made: list[tuple[int, int]] = []
        self.tuned: list[int] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def generating(self, done: int, total: int) -> None:
        self.made.append((done, total))

    def tuning(self, client: int, done: int, total: int) -> None:
        self.tuned.append(client)


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What clients keep, by file."""
    return {path.name: load_file(path) for path in sorted((folder / "clients").glob("*.safetensors"))}


def same(one: Result, other: Result) -> None:
    """Records, weights and what clients keep, bit for bit."""
    battery.same(one, other)
    assert one.folder is not None and other.folder is not None
    kept, again = states(one.folder), states(other.folder)
    assert kept.keys() == again.keys()
    assert kept or not Job(read(one.folder / "config.toml"), battery.data()).worker.keeps
    for name, tensors in kept.items():
        battery.same_bits(tensors, again[name], name)


def plain(config: Config, folder: Path) -> Result:
    """The same configuration in one process."""
    return run(replace(config, runtime="inprocess"), data=battery.data(), folder=folder)


def with_own_images(config: Config, folder: Path) -> Result:
    """The run on Ray, with a pool of its own: what one process has made is not there."""
    pool, heard = replace(config.pool, dir=str(folder.with_suffix(".pool"))), Heard()
    done = run(replace(config, pool=pool), data=battery.data(), folder=folder, listener=heard)
    assert not heard.made or list(Path(pool.dir).rglob("part-*"))
    return done


@pytest.mark.parametrize("method", ["fedrep", "fedamp", "fbl"])
def test_the_same_bits_as_in_process(method: str, cluster: None, tmp_path: Path) -> None:
    """Personal heads and what is measured on them; mail, a shelf and what clients measure; synthetic images."""
    config = battery.config(method, *ON_RAY, "evaluate.local_every=2", "participation=0.75")
    same(plain(config, tmp_path / "one"), with_own_images(config, tmp_path / "ray"))


@pytest.mark.parametrize(
    "options",
    [
        (UNIFORM, "privacy.clip=0.5", "privacy.noise_multiplier=0.02", "privacy.randomness=seed"),
        (UNIFORM, "robust.name=median"),
    ],
    ids=["privacy", "robust"],
)
def test_noise_and_a_robust_rule(
    options: tuple[str, ...], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the object store has what all get once a round, the data set once, each client's samples once at most."""
    if "privacy.randomness=seed" in options:
        pytest.importorskip("dp_accounting")
    config = battery.config("scaffold", *ON_RAY, *options, "participation=1.0", net="group")
    one, kinds, put = plain(config, tmp_path / "one"), Counter[str](), ray.put

    def counting(thing: Any) -> Any:
        kinds[type(thing).__name__] += 1
        return put(thing)

    monkeypatch.setattr(ray, "put", counting)
    same(one, run(config, data=battery.data(), folder=tmp_path / "ray"))
    assert kinds.pop("Setup") >= 2  # one for each process
    assert kinds == {"Dataset": 1, "Server": config.rounds, "tuple": config.clients}


def test_stopped_and_resumed(cluster: None, tmp_path: Path) -> None:
    """With shared state and clients' own."""
    config = battery.config("scaffold", *ON_RAY)
    with pytest.raises(KeyboardInterrupt):
        run(config, data=battery.data(), folder=tmp_path / "run", listener=battery.Stop(1))
    same(plain(config, tmp_path / "whole"), resume(tmp_path / "run", data=battery.data()))


def test_tuned_generators_and_what_is_told_of_them(cluster: None, tmp_path: Path) -> None:
    tuned = ("algorithm.tune=true", "algorithm.min_images=1", f"pool.dir={tmp_path}/pool")
    config, heard = battery.config("regl", *ON_RAY, *tuned), Heard()
    there = run(config, data=battery.data(), folder=tmp_path / "ray", listener=heard)
    parts = sorted((tmp_path / "pool").rglob("part-*"))
    assert parts and heard.made[-1][0] == heard.made[-1][1] > 0 and heard.tuned
    same(plain(config, tmp_path / "one"), there)
    assert sorted((tmp_path / "pool").rglob("part-*")) == parts  # all had been made
    battery.same_bits(
        *(load_file(tmp_path / name / "contact.safetensors") for name in ("one", "ray")), "contact sheet: "
    )
    adapters = [json.loads((tmp_path / name / "adapters.json").read_text()) for name in ("one", "ray")]
    prints = [{each["client"]: each["fingerprint"] for each in one} for one in adapters]
    assert prints[0] == prints[1] and set(prints[0]) == set(heard.tuned)
    spent = json.loads((tmp_path / "ray/generators.json").read_text())
    assert spent["generator"]["images"] == heard.made[-1][1] and spent["generator"]["seconds"] > 0


@dataclass(frozen=True, kw_only=True)
class Strange(Algorithm):
    """Client 0 raises; in round 2, client 1 ends its process once and client 3 always, or raises in a process that it
    must not end; in round 3, client 2 sends what it must not."""

    folder: str = option("", "where it is noted who has died")

    def client_state(self, params: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"count": torch.zeros((), dtype=torch.bfloat16)}

    def prepare(self, local: Local) -> Samples:
        local.data.x.add_(0)  # a method may write to what it is given
        if local.client == 0:
            raise ValueError("no data today")
        dead = Path(self.folder) / f"{local.client}"
        if local.round == 1 and (local.client == 3 or (local.client == 1 and not dead.exists())):
            if not (Path(self.folder) / "spare").exists():
                dead.touch()
                os._exit(1)
            if local.client == 3:
                raise ValueError("spared")
        return local.data

    def upload(self, local: Local) -> Update:
        extra = {"secret": torch.ones(1)} if local.client == 2 and local.round == 2 else {}
        return Update(1.0, local.params - local.anchor, extra=extra, keep={"count": local.mine["count"] + 1})


def test_processes_that_die_methods_that_raise_and_mistakes(
    cluster: None, tmp_path: Path, room: str, capfd: pytest.CaptureFixture[str]
) -> None:
    registry.register(room, "strange")(Strange)
    config, heard = battery.config("strange", *ON_RAY, "participation=1.0", f"algorithm.folder={tmp_path}"), Heard()
    mistake = r"^Strange.upload sends \['secret'\], which is not in `sends`$"
    with pytest.raises(UndeclaredField, match=mistake):
        run(config, data=battery.data(), folder=tmp_path / "ray", listener=heard)
    assert (tmp_path / "1").exists() and (tmp_path / "3").exists()
    assert {text.partition(":")[0] for text in heard.warnings} == {
        f"a worker process died before or during client {k}'s turn" for k in (1, 3)
    }
    assert capfd.readouterr() == ("", "")  # Ray itself says nothing
    (tmp_path / "spare").touch()
    with pytest.raises(UndeclaredField, match=mistake):
        plain(config, tmp_path / "one")
    one, there = ([numbers(each) for each in rounds(tmp_path / name)] for name in ("one", "ray"))
    assert there[0]["clients"] == [1, 2, 3] and there[1]["clients"] == [1, 2]
    assert (
        there[0]["failed"][0]["reason"] == "ValueError: no data today"
        and "in prepare" in there[0]["failed"][0]["trace"]
    )
    assert there[1]["failed"][1]["reason"].startswith("a worker process died 3 times before or during its turn: ")
    one[1]["failed"][1] = there[1]["failed"][1]
    assert one == there  # and with them the accuracies of the server's model
    kept, again = states(tmp_path / "one"), states(tmp_path / "ray")
    assert kept.keys() == again.keys() and kept["1-1.safetensors"]["mine.count"].dtype == torch.bfloat16
    for name, tensors in kept.items():
        battery.same_bits(tensors, again[name], name)


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_what_travels() -> None:
    """Every type, no elements, no dimensions, parts of others; what arrives can be written to unless it is shared."""
    cpu = torch.device("cpu")
    grid = torch.arange(24).reshape(4, 6)
    tensors = {str(dtype): grid.to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool)}
    tensors |= {"none": torch.empty(0, 3), "scalar": torch.tensor(0.1), "part": grid[1:3, ::2], "turned": grid.T}
    nan = {"nan": torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32)}  # their bits are kept
    reply = Reply(3, update=Update(1.0, torch.ones(2), extra=tensors), state=nan)
    back = unboxed(pickle.loads(pickle.dumps(boxed(reply))), cpu)  # noqa: S301
    battery.same_bits(tensors, back.update.extra, "extra: ")
    battery.same_bits(nan, back.state, "state: ")
    box = Box.of(torch.ones(3))
    box.bytes.flags.writeable = False
    box.tensor(cpu).add_(1)
    assert torch.equal(box.tensor(cpu, copy=False), torch.ones(3))


def test_how_many_processes_find_room() -> None:
    def machine(alive: bool = True, **has: float) -> dict[str, object]:
        return {"Alive": alive, "Resources": has}

    nodes = [machine(CPU=3.0), machine(CPU=8.0, GPU=2.0), machine(alive=False, CPU=64.0, GPU=8.0)]
    assert on_ray.room(Cluster(), nodes) == 11
    assert on_ray.room(Cluster(cpus=2), nodes) == 1 + 4
    assert on_ray.room(Cluster(gpus=0.3), nodes) == 6  # three on each GPU
    assert on_ray.room(Cluster(cpus=4, gpus=0.5), nodes) == 2
    assert on_ray.room(Cluster(gpus=2), nodes) == 1


def test_the_smallest_share_is_rays() -> None:
    ray.remote(Actor).options(num_cpus=FINEST, num_gpus=FINEST)
    for key in ("num_cpus", "num_gpus"):
        with pytest.raises(ValueError, match=str(FINEST)):
            ray.remote(Actor).options(**{key: 0.9 * FINEST})


def test_mistakes_in_the_section_and_a_missing_extra(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for override, text in (
        ("ray.actors=1000", r"ray.actors = 1000: the cluster has room for \d+ worker processes of 1 CPUs each"),
        ("ray.gpus=0.5", "ray.gpus = 0.5: the cluster has room for 0 worker processes of 1 CPUs and 0.5 GPUs each"),
        ("ray.cpus=1.5", "ray.cpus = 1.5: must be a whole number when it is above 1"),
    ):
        with pytest.raises(ConfigError, match=f"^{text}"):
            run(tiny.config("runtime=ray", override), data=tiny.data())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedkeel\[ray\]'"):
        run(tiny.config("runtime=ray"), data=tiny.data())


@pytest.mark.slow
@pytest.mark.parametrize("method", battery.methods())
def test_every_method_on_ray(method: str, cluster: None, tmp_path: Path) -> None:
    config = battery.config(method, *ON_RAY)
    same(plain(config, tmp_path / "one"), with_own_images(config, tmp_path / "ray"))


def test_a_cluster_of_its_own_listens_on_this_machine_only() -> None:
    """Ray asks nobody who they are. In a process of its own, as it decides when it is imported."""
    script = (
        "from fedkeel.federation import Cluster\nfrom fedkeel.runtimes import ray as on_ray\n"
        "on_ray.join(Cluster(actors=1))\n"
        "import ray\n"
        "print([node['NodeManagerAddress'] for node in ray.nodes()])\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240)
    assert told.stdout.split("\n")[0] == "['127.0.0.1']"


@pytest.mark.slow
def test_a_cluster_that_runs_already(tmp_path: Path) -> None:
    """Two commands that use it one after another; it is there until its own end. One that is not there is named."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = replace(tiny.config("data.train_limit=200", "data.test_limit=50", "rounds=2"), runs_dir=str(tmp_path))
    (tmp_path / "config.toml").write_text(config.toml())

    def command(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        words = [
            str(Path(sys.executable).with_name("fedkeel")),
            "run",
            str(tmp_path / "config.toml"),
            f"name={name}",
            *overrides,
        ]
        return subprocess.run(words, capture_output=True, text=True, timeout=300)

    where = ("runtime=ray", "ray.actors=2", f"ray.address={address}")
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", f"--port={address.partition(':')[2]}"]
    missing = command("missing", *where)
    assert missing.returncode == 2 and f"ray.address = '{address}': no such cluster can be used" in missing.stderr
    assert "Traceback" not in missing.stderr
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as place,  # its address must not be found there afterwards
        subprocess.Popen(
            [*start, *quiet],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_TMPDIR": place},
        ) as head,
    ):
        try:
            assert head.stdout is not None
            said = [head.stdout.readline()]
            while "Ray runtime started" not in said[-1]:
                assert head.poll() is None, said
                said.append(head.stdout.readline())
            for name in ("one", "two"):
                done = command(name, *where)
                assert done.returncode == 0, done.stderr
                time.sleep(1)
                assert head.poll() is None
        finally:
            head.terminate()
            head.communicate(timeout=60)
    assert command("plain").returncode == 0
    models = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "plain")}
    assert len(models) == 1
