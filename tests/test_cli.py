"""The command line: exit codes, one clear line for each mistake, and every command on tiny pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import fedkeel
from fedkeel import catalogue, cli, comparison, contact, doctor, registry
from fedkeel.comparison import compare, slug
from fedkeel.config import NAMED, load
from fedkeel.data.dataset import Dataset
from fedkeel.doctor import EXTRAS, Check, examine
from fedkeel.errors import CheckpointError, ConfigError, RunError
from fedkeel.files import locked
from fedkeel.record import Silent

CONFIG = """
rounds = 3
clients = 4
participation = 1.0
device = "cpu"
data = {{ name = "imagefolder", dir = "{pictures}" }}
partition = {{ name = "dirichlet", alpha = 0.5, min_size = 4 }}
model = {{ name = "mlp", hidden = [8] }}
local = {{ batch = 8, lr = 0.05 }}
methods.fedprox.mu = 0.5
generator = {{ name = "gaussian", path = "{weights}" }}
pool = {{ dir = "{pool}" }}
"""


def fedkeel_(*words: str | Path) -> Result:
    """The command, as a shell would run it."""
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="fedkeel")


def done(*words: str | Path) -> Result:
    """The command, which must succeed."""
    result = fedkeel_(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="session")
def config_text(tmp_path_factory: pytest.TempPathFactory, data: Dataset, generator: tuple[str, ...]) -> str:
    """A configuration whose data are a folder of PNG pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for split, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        for at, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            folder = root / split / data.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{at:03}.png")
    weights, pool = (text.partition("=")[2] for text in generator[1:])
    return CONFIG.format(pictures=root, weights=weights, pool=pool)


@pytest.fixture
def config(config_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as a file in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp.toml").write_text(config_text)
    return Path("exp.toml")


# what is there before anything runs -----------------------------------------------------------------------------------


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from fedkeel.cli import app; from typer.testing import CliRunner\n"
        "for words in (['--help'], ['run', '--help'], ['reproduce', '--help'], ['--version'], []):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "import fedkeel\n"
        "slow = {'torch', 'numpy', 'datasets', 'matplotlib', 'plotly', 'fedkeel.config'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_the_command() -> None:
    words = [sys.executable, "-m", "fedkeel", "--version"]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.startswith("fedkeel ")


def test_version_and_help_of_every_command() -> None:
    assert done("--version").stdout == f"fedkeel {fedkeel.__version__}\n"
    text = done("--help").stdout
    for command in (
        "demo", "run", "resume", "compare", "reproduce", "partition", "generate", "list", "show", "report", "doctor",
    ):  # fmt: skip
        assert command in text
        assert "--help" in done(command, "--help").stdout
    assert "cifar10" in done("data", "get", "--help").stdout


def test_public_names() -> None:
    for name in fedkeel.__all__:
        assert getattr(fedkeel, name) is not None
    assert set(dir(fedkeel)) == set(fedkeel.__all__)
    assert callable(fedkeel.compare)
    with pytest.raises(AttributeError, match="algoritm"):
        _ = fedkeel.algoritm  # type: ignore[attr-defined]


def test_from_python(data: Dataset) -> None:
    table = {"rounds": 2, "clients": 4, "model": {"name": "mlp"}, "partition": {"name": "iid"}}
    result = fedkeel.run(fedkeel.parse(table, ["local.lr=0.05"]), data=data)
    assert 0 < result.headline() <= 1


# mistakes -------------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[Sequence[str], Sequence[str]]] = [  # the line's words, and what the message must name
    (["run", "missing.toml"], ["missing.toml", "no such file"]),
    (["run", "broken.toml"], ["broken.toml", "TOML", "line 1"]),
    (["run", "exp.toml", "local.epoch=3"], ["local.epoch = 3", "no such key", "Did you mean 'epochs'?"]),
    (["run", "exp.toml", "pratition.alpha=3"], ["pratition", "no such key", "'partition'"]),
    (["run", "exp.toml", "rounds=many"], ["rounds = 'many'", "a whole number"]),
    (["run", "exp.toml", "rounds=0"], ["rounds = 0", ">= 1"]),
    (["reproduce", "--rows", "m1"], ["--rows = 'm1'", "needs a TABLE"]),
    (["compare", "exp.toml", "--algorithms", "fedavg", "--dir", "exp.toml"], ["--dir = 'exp.toml'", "a folder"]),
    (["run", "exp.toml", "local.lr=-1"], ["local.lr = -1", "> 0"]),
    (["run", "exp.toml", "local.buffers=avg"], ["local.buffers = 'avg'", "'average'"]),
    (["run", "exp.toml", "algorithm.name=fedproxx"], ["algorithms", "'fedproxx'", "Did you mean 'fedprox'?"]),
    (["run", "exp.toml", "algorithm.name=fbl", "algorithm.preset=M9"], ["algorithm.preset = 'M9'", "M1"]),
    (["run", "exp.toml", "participation=1.5"], ["participation = 1.5", "at most 1.0"]),
    (["run", "exp.toml", "participation=9"], ["participation = 9", "4 clients"]),
    (["run", "exp.toml", "profiles.none=0.7", "profiles.unconstrained=0.7"], ["profiles.none = 0.7", "at most 0.3"]),
    (["run", "exp.toml", "rounds"], ["override = 'rounds'", "local.lr=0.1"]),
    (["run", "exp.toml", "data.dir=nowhere"], ["nowhere", "no such folder"]),
    (["run", "exp.toml", "data.name=parquet"], ["data.dir", "required"]),
    (["run", "exp.toml", "device=cuda:99"], ["cuda:99"]),
    (["run", "exp.toml", "device=gpu"], ["device = 'gpu'", "cuda"]),
    (["run", "exp.toml", "name=../up"], ["name = '../up'"]),
    (["run", "exp.toml", "partition.min_size=50"], ["96 samples", "4 clients", "50 each"]),
    (["run", "exp.toml", "model.name=cnn", "data.size=8"], ["8", "16"]),
    (["resume", "nothing"], ["nothing", "no run"]),
    (["report", "nothing"], ["nothing", "no such folder"]),
    (["compare", "exp.toml"], ["--algorithms", "name the methods"]),
    (["compare", "exp.toml", "--algorithms", "fedavg,fbk"], ["'fbk'", "Did you mean 'fbl'?"]),
    (["compare", "exp.toml", "--algorithms", "fbl(x%)"], ["fbl(x%)", "fbl(25%)"]),
    (["compare", "exp.toml", "--algorithms", "fbl(125%)"], ["profiles.unconstrained = 1.25", "<= 1"]),
    (["compare", "exp.toml", "--algorithms", "fedavg", "methods.fedprx.mu=1"], ["methods.fedprx", "'fedprox'?"]),
    (["compare", "exp.toml", "--algorithms", "fbl", "algorithm.mew=1"], ["algorithm.mew = 1", "no such key"]),
    (["compare", "exp.toml", "--algorithms", "fbl", "algorithm.name=fedprox", "algorithm.mu=1"],
     ["algorithm.name = 'fedprox'", "fedprox, which is not compared", "methods.NAME.KEY"]),
    (["compare", "exp.toml", "--algorithms", "fbl,fbl"], ["algorithms = 'fbl'", "once"]),
    (["compare", "exp.toml", "--algorithms", "fbl", "--seeds", "0"], ["--seeds", "0", "x>=1"]),
    (["list", "algorithm"], ["'algorithm'", "Did you mean 'algorithms'?"]),
    (["show", "fbll"], ["'fbll'", "Did you mean 'fbl'?"]),
    (["show", "room/fbl"], ["rooms", "'room'"]),
    (["data", "get", "cifar1"], ["'cifar1'", "Did you mean 'cifar10'?"]),
    (["show", "algorithm"], ["'algorithm'", "fedkeel list algorithms"]),
    (["rnu"], ["No such command 'rnu'. Did you mean 'run'? (see"]),
    (["data", "gett"], ["No such command 'gett'. Did you mean 'get'? (see"]),
    (["xyzzy"], ["No such command 'xyzzy'. (see"]),
    (["run", "exp.toml", "partition.name=single_class", "clients=3"], ["set clients = 4 (it is 3)"]),
    (["run"], ["CONFIG", "fedkeel run --help"]),
    (["run", "exp.toml", "--fast"], ["--fast"]),
    (["--fast"], ["--fast"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_clear_line(config: Path, words: Sequence[str], named: Sequence[str]) -> None:
    Path("broken.toml").write_text("rounds = = 3")
    result = fedkeel_(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stderr
    for part in named:
        assert part in lines[0]
    assert not list(Path().glob("runs/*/config.toml")), "a run that could not start does not stand in the way"


def test_debug_shows_the_traceback_wherever_it_stands(config: Path) -> None:
    for words in (["--debug", "run", "exp.toml", "rounds=0"], ["run", "exp.toml", "rounds=0", "--debug"]):
        result = fedkeel_(*words)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: rounds = 0")


def test_a_failed_run_is_exit_code_1(config: Path) -> None:
    result = fedkeel_("run", config, "local.lr=1e30", "local.epochs=5")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: round \d+: .*", result.stderr.splitlines()[-1])


def test_a_mistake_of_ours_is_exit_code_1(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr("fedkeel.loop.run", broken)
    result = fedkeel_("run", config)
    assert result.exit_code == 1
    assert result.stderr == "error: ZeroDivisionError: by hand (--debug shows where)\n"


def test_ctrl_c_says_how_to_go_on(config: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    def stop(self: Silent, record: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedkeel.record.Console.finished_round", stop)
        result = fedkeel_("run", config)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped; to go on: fedkeel resume runs/exp"
    assert "Traceback" not in result.stderr
    stopped = len(Path("runs/exp/rounds.jsonl").read_text().splitlines())
    assert stopped == 1
    done("resume", "runs/exp")
    done("run", config, "name=whole")
    lines = [Path(f"runs/{name}/rounds.jsonl").read_text().splitlines() for name in ("exp", "whole")]
    accuracies = [[json.loads(line)["global/accuracy"] for line in each] for each in lines]
    assert accuracies[0] == accuracies[1]


# runs -----------------------------------------------------------------------------------------------------------------


def test_run_writes_all_files_and_says_its_headline(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = done("run", config, "algorithm.name=fbl", "name=first")
    assert re.match(r"fbl: accuracy \d+\.\d\d % \(mean over the last 10", result.stdout)
    assert "runs/first/report.html" in result.stdout
    files = {path.name for path in Path("runs/first").iterdir()}
    assert files >= {
        "config.toml", "manifest.json", "partition.json", "rounds.jsonl", "checkpoint", "model.safetensors",
        "report.html", "balanced.json", "contact.safetensors",
    }  # fmt: skip
    again = fedkeel_("run", config, "name=first")
    assert again.exit_code == 2
    assert "runs/first holds a run: resume it" in again.stderr
    value = json.loads(done("resume", "first", "--json").stdout)
    assert value["folder"] == "runs/first"
    assert value["label"] == "fbl"
    assert f"{100 * value['global/accuracy']:.2f} %" in result.stdout
    # run from its own config.toml, it makes the same numbers
    monkeypatch.setattr(comparison, "publish", lambda *args: None)
    copy = json.loads(done("run", "runs/first/config.toml", "name=copy", "--json").stdout)
    assert copy["headlines"] == value["headlines"]


def test_a_failing_report_does_not_fail_the_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fedkeel.report.page.write_page", full)
    result = done("run", config)
    assert "warning: no report: OSError: disk full" in result.stderr
    assert "report" not in result.stdout


def test_a_method_without_synthetic_images_has_no_contact_sheet(config: Path, no_report: None) -> None:
    done("run", config)
    assert not Path("runs/exp/contact.safetensors").exists()


# comparisons ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a command asks of `compare`, which runs nothing."""
    found: dict[str, object] = {}

    def record(table: dict[str, object], specs: Sequence[str], seeds: range, folder: Path, **rest: object) -> None:
        found.update(rest, table=table, specs=specs, seeds=list(seeds), folder=folder)
        raise RunError("enough")

    monkeypatch.setattr(comparison, "compare", record)
    return found


SPECS = "fedavg,fedprox,fbl:M1,fbl(50%)"


def test_compare_goes_on_cell_by_cell(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("compare", config, "--algorithms", SPECS, "--seeds", "2", "rounds=2", "--dir", "out")
    first = json.loads(done(*words, "--json").stdout)
    assert list(first["methods"]) == SPECS.split(",")
    assert Path(first["report"]).read_text().count("fbl(50%)")
    assert first["methods"]["fbl(50%)"]["seeds"] == [1, 2]
    cells = {path.name for path in Path("out").iterdir() if path.is_dir()}
    assert cells == {f"{slug(spec)}-seed{seed}" for spec in SPECS.split(",") for seed in (1, 2)} | {"pictures"}
    assert json.loads(Path("out/summary.json").read_text())["methods"] == first["methods"]
    assert list(Path("out/pictures").glob("*.png"))
    configs = {
        name: load(Path("out") / name / "config.toml") for name in ("fedprox-seed1", "fbl-50-seed2", "fbl-m1-seed1")
    }
    assert configs["fedprox-seed1"]["algorithm"]["mu"] == 0.5  # type: ignore[index]
    assert configs["fbl-50-seed2"]["profiles"]["unconstrained"] == 0.5  # type: ignore[index]
    assert configs["fbl-m1-seed1"]["algorithm"]["sampling"] == "random"  # type: ignore[index]
    hashes = {json.loads((Path("out") / name / "manifest.json").read_text())["partition"] for name in configs}
    assert len(hashes) == 2, "one partition a seed"

    # one cell has lost its end, another everything: these two run again, and nothing else does
    Path("out/fedprox-seed2/model.safetensors").unlink()
    for path in sorted(Path("out/fedavg-seed1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    ran: list[str] = []
    run = comparison.run

    def noted(config: fedkeel.Config, **options: object) -> object:
        ran.append(config.name)
        return run(config, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison, "run", noted)
    monkeypatch.setattr(comparison, "publish", lambda *args: None)
    second = json.loads(done(*words, "--json").stdout)
    assert ran == ["fedavg-seed1", "fedprox-seed2"]
    for spec, row in first["methods"].items():
        assert second["methods"][spec]["headlines"] == row["headlines"]

    refused = fedkeel_(*words, "local.lr=0.2")
    assert refused.exit_code == 2
    assert "out/fedavg-seed1 holds a run of another configuration: local.lr = 0.05 there, 0.2 here" in refused.stderr
    several = fedkeel_("resume", "out")
    assert several.exit_code == 2
    assert "holds several runs" in several.stderr


def test_seeds_that_were_run_in_other_ways_are_one_method(config: Path, no_report: None) -> None:
    """Settings that decide no numbers, and an option that is younger than the first run."""
    words = ("compare", config, "--algorithms", "fedavg,fedprox", "rounds=1", "--json")
    done(*words)
    for spec in ("fedavg", "fedprox"):
        path = Path(f"runs/exp/{spec}-seed1/config.toml")
        path.write_text(path.read_text().replace("validation = 0.0\n", ""))
    changed = ("workers=2", "memory=1.0", "pool.dir=elsewhere", "evaluate.local_clients=[1]")
    found = json.loads(done(*words, "--seeds", "2", *changed).stdout)
    assert [row["seeds"] for row in found["methods"].values()] == [[1, 2], [1, 2]]


def test_methods_are_compared_under_privacy(config: Path, no_report: None) -> None:
    """No method with weights by size is made on the way."""
    pytest.importorskip("dp_accounting")
    uniform = ("methods.fedprox.weights=uniform", "methods.fedavg.weights=uniform")
    words = ("compare", config, "--algorithms", "fedprox,fedavg", "privacy.clip=1.0", "rounds=1", *uniform)
    assert list(json.loads(done(*words, "--json").stdout)["methods"]) == ["fedprox", "fedavg"]


def test_a_run_and_a_comparison_do_not_share_a_folder(config: Path, no_report: None) -> None:
    """Either would hide the other: both are runs/exp unless they are told otherwise."""
    run, compare = ("run", config, "rounds=1"), ("compare", config, "--algorithms", "fedavg", "rounds=1")
    done(*run)
    refused = fedkeel_(*compare)
    assert refused.exit_code == 2 and "runs/exp holds a run" in refused.stderr and "--dir" in refused.stderr
    done(*compare, "name=both")
    refused = fedkeel_(*run, "name=both")
    assert refused.exit_code == 2 and "name = 'both': runs/both holds a comparison" in refused.stderr
    assert not Path("runs/exp/fedavg-seed1").exists() and not Path("runs/both/config.toml").exists()
    done(*compare, "name=both")


def test_a_cell_that_was_run_on_other_data_is_refused(config: Path, data: Dataset, no_report: None) -> None:
    table = load(config) | {"rounds": 1, "evaluate": {"validation": 0.25}}
    compare(table, ["fedavg"], [1], "out")
    assert compare(table, ["fedavg"], [1], "out").results.keys() == {("fedavg", 1)}
    other = replace(data, train_y=data.train_y.flip(0))
    for specs in (["fedavg"], ["fedprox", "fedavg"]):
        with pytest.raises(
            CheckpointError, match=r"out/fedavg-seed1 holds a run on other data: data fingerprint \w+ there"
        ):
            compare(table, specs, [1], "out", data=other)
    assert not Path("out/fedprox-seed1").exists(), "before anything runs"
    Path("out/fedavg-seed1/manifest.json").write_text("")
    with pytest.raises(CheckpointError, match="data fingerprint unknown there"):
        compare(table, ["fedavg"], [1], "out")


def test_a_failed_cell_does_not_stop_the_others(config: Path, data: Dataset, no_report: None) -> None:
    table = load(config) | {"methods": {"fedprox": {"mu": 1e30}}, "local": {"epochs": 5, "batch": 8}}
    with pytest.raises(RunError, match="1 of 3 runs failed: fedprox-seed1: round 1"):
        compare(table, ["fedprox", "fedavg", "fbl"], [1], "out", data=data)
    assert list(json.loads(Path("out/summary.json").read_text())["methods"]) == ["fedavg", "fbl"]


def test_a_mistake_of_one_method_does_not_stop_the_others(config: Path, data: Dataset, no_report: None) -> None:
    """A generator that does not load is found by the run that needs it."""
    table = load(config) | {"rounds": 1, "generator": {"name": "folder", "dir": "nowhere"}}
    with pytest.raises(RunError, match="1 of 2 runs failed: fbl-seed1: nowhere has neither"):
        compare(table, ["fbl", "fedavg"], [1], "out", data=data)
    assert list(json.loads(Path("out/summary.json").read_text())["methods"]) == ["fedavg"]


def test_a_method_without_its_generator_is_refused_before_anything_runs(
    config: Path, data: Dataset, no_report: None
) -> None:
    table = {key: value for key, value in load(config).items() if key != "generator"} | {"rounds": 1}
    for needs in ("fbl", "fgl"):
        with pytest.raises(ConfigError, match="generator = None: this run needs synthetic images: name a generator"):
            compare(table, ["fedavg", needs], [1], "out", data=data)
        assert not Path("out").exists()
    none = {**table, "profiles": {"none": 1.0}}  # nobody who could generate: no generator is needed
    assert list(compare(none, ["fedavg", "fbl"], [1], "out", data=data).results) == [("fedavg", 1), ("fbl", 1)]


def test_starting_afresh_removes_only_what_began_so(config: Path, data: Dataset, no_report: None) -> None:
    table = load(config) | {"rounds": 1}
    compare(table, ["fedavg", "fedprox"], [1], "out", data=data, again=True)
    mine = compare(table, ["fbl"], [1], "out", data=data)
    stamp = Path("out/fbl-seed1/rounds.jsonl").stat().st_mtime_ns
    redone = compare(table | {"rounds": 2}, ["fedavg"], [1], "out", data=data, again=True)
    assert len(redone.results["fedavg", 1].rounds) == 2
    assert not Path("out/fedprox-seed1").exists()
    assert Path("out/fbl-seed1/rounds.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="fbl-seed1"):
        compare(table | {"rounds": 2}, ["fbl"], [1], "out", data=data, again=True)
    assert list(mine.results) == [("fbl", 1)]


def test_what_another_process_runs_is_not_started_afresh(config: Path, data: Dataset, no_report: None) -> None:
    table = load(config) | {"rounds": 1}
    compare(table, ["fedavg"], [1], "out", data=data, again=True)
    with locked(Path("out/fedavg-seed1"), RuntimeError("busy")):
        with pytest.raises(CheckpointError, match="fedavg-seed1 is being written by another process"):
            compare(table, ["fedavg"], [1], "out", data=data, again=True)
        assert Path("out/fedavg-seed1/model.safetensors").exists()


def test_a_lock_that_its_holder_removed_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the old file gets its lock; who made the new one has that too."""

    def late(file: object, how: int) -> None:
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()

    monkeypatch.setattr("fcntl.flock", late)
    with pytest.raises(RuntimeError, match="busy"), locked(tmp_path, RuntimeError("busy")):
        pytest.fail("two are in")


@pytest.mark.parametrize(
    ("specs", "seeds", "why"),
    [
        (["fedavg"], [], "seeds = .*: must be a list of numbers, each of them once, and one at least"),
        (["fedavg"], [1, 1], "seeds = "),
        (["fedavg"], 2, "seeds = 2: must be a list"),
        ("fedavg", [1], "algorithms = 'fedavg': must be a list of methods"),
        (["My_Algo!", "my_algo"], [1], "algorithms = 'my_algo': .* by names of their own"),
        (["方法"], [1], "algorithms = '方法': needs a letter from a to z or a digit"),
    ],
)
def test_runs_of_a_comparison_have_folders(config: Path, specs: list[str], seeds: list[int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        compare(load(config), specs, seeds, "out")


def test_slugs() -> None:
    assert [slug(spec) for spec in ("fedavg", "fbl:M3", "fbl(25%)", "fbl:M3(25%)")] == [
        "fedavg", "fbl-m3", "fbl-25", "fbl-m3-25",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="once"):
        compare({}, [], [1], "out")


def test_seeds_begin_at_the_configurations(config: Path, asked: dict[str, object]) -> None:
    assert fedkeel_("compare", config, "--algorithms", "fedavg", "--seeds", "3", "seed=5").exit_code == 1
    assert asked["seeds"] == [5, 6, 7]


def test_demo_is_a_comparison_of_the_bundled_settings(asked: dict[str, object], tmp_path: Path) -> None:
    assert fedkeel_("demo", "--all", "--seeds", "2", "--dir", tmp_path).exit_code == 1
    assert set(cli.DEMO) < set(cli.DEMO_ALL)
    assert asked["specs"] == cli.DEMO_ALL
    assert asked["seeds"] == [1, 2]
    assert asked["again"] is True
    table = asked["table"]
    assert isinstance(table, dict)
    planned = comparison.cells(table, cli.DEMO_ALL, [1], tmp_path)
    assert len({str(cell.config.local) + str(cell.config.partition) for cell in planned}) == 1
    assert planned[0].config.clients == 20


def test_report_of_several_runs(config: Path, no_report: None) -> None:
    done("run", config, "name=one")
    done("run", config, "name=two", "algorithm.name=fedprox")
    result = done("report", "one", "runs/two", "--out", "both")
    assert "fedprox" in result.stdout
    assert "report: both/report.html" in result.stdout
    assert list(json.loads(done("report", "runs", "--json").stdout)["methods"]) == ["fedavg", "fedprox"]


# looking --------------------------------------------------------------------------------------------------------------


def test_partition_shows_what_the_run_will_use(config: Path, no_report: None) -> None:
    value = json.loads(done("partition", config, "--json").stdout)
    assert len(value["counts"]) == 4
    assert sum(map(sum, value["counts"])) == 96
    assert Path(value["picture"]).read_bytes().startswith(b"\x89PNG")
    text = done("partition", config, "--out", "elsewhere").stdout
    assert "north-west" in text
    assert Path("elsewhere/partition.json").exists()
    done("run", config)
    assert json.loads(Path("runs/exp/manifest.json").read_text())["partition"] == value["hash"]
    other = fedkeel_("partition", config, "partition.alpha=3")
    assert other.exit_code == 2
    assert "partition.alpha is 3.0, in the manifest 0.5" in other.stderr
    Path("taken/partition.png").mkdir(parents=True)
    refused = fedkeel_("partition", config, "--out", "taken")
    assert refused.exit_code == 2 and "cannot write taken/partition.png" in refused.stderr


def test_generate_fills_the_pool(config: Path) -> None:
    words = ("generate", config, "algorithm.name=regl", "algorithm.volume=3", "pool.dir=pool")
    value = json.loads(done(*words, "--json").stdout)
    assert value["images"] == 4 * 4 * 3
    assert Path(value["pool"]).is_relative_to("pool")
    parts = {path: path.stat().st_mtime_ns for path in Path("pool").rglob("*.safetensors")}
    assert value["fingerprint"][:16] in done(*words).stdout
    assert {path: path.stat().st_mtime_ns for path in Path("pool").rglob("*.safetensors")} == parts
    assert "no client" in done("generate", config).stdout


def test_generate_tunes_first(config: Path) -> None:
    """A folder for each generator: what is named is the one that holds them all."""
    regl = ("algorithm.name=regl", "algorithm.preset=FT", "algorithm.min_images=1", "algorithm.volume=3")
    words = ("generate", config, *regl, "pool.dir=pool")
    value = json.loads(done(*words, "--json").stdout)
    assert (value["images"], value["pool"]) == (4 * 4 * 3, "pool")
    assert value["spent"]["generator"]["images"] == 4 * 4 * 3 and value["spent"]["generator"]["seconds"] > 0
    folders = {entry["fingerprint"][:16] for entry in value["adapters"]}
    assert len(folders) == 4 and folders == {path.parent.name for path in Path("pool").glob("*/part-*")}
    assert value["generators"] == [value["fingerprint"]] and value["fingerprint"][:16] not in folders


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """What is measured of each method."""
    return {row["name"]: row for row in json.loads(done("list", "algorithms", "--json").stdout)}


def test_list_measures_what_crosses(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["fedavg"]["down"] == rows["fedavg"]["up"] == 1
    assert rows["fedavg"]["client_sends"] == ["model"]
    assert rows["scaffold"]["server_sends"] == ["model", "c"]
    assert 1.9 < rows["scaffold"]["up"] <= 2
    assert rows["fbl"]["up"] == 1, "offsets, images and choices stay"
    assert rows["fedamp"]["server_sends"] == ["params", "alpha"], "a mixture, no model beside it"
    assert all(row["up"] is not None and row["down"] is not None for row in rows.values()), "every method is measured"
    table = done("list", "algorithms").stdout
    assert "2.00" in table
    assert [line.split()[0] for line in table.splitlines() if "params down in place of the model" in line] == ["fedamp"]
    everything = json.loads(done("list", "--json").stdout)
    assert {row["room"] for row in everything} >= {"algorithms", "datasets", "partitions", "models", "generators"}
    assert all(row["doc"] and not row["doc"].startswith(row["name"] + "(") for row in everything)
    assert "dirichlet" in done("list", "partitions").stdout


def test_show_knows_everything_that_is_listed() -> None:
    for row in json.loads(done("list", "--json").stdout):
        value = json.loads(done("show", f"{row['room']}/{row['name']}", "--json").stdout)
        assert value["name"] == row["name"]
    help_text = " ".join(done("show", "--help").stdout.replace("│", " ").split())
    written = fedkeel.parse({"model": {"name": "mlp"}}).table()
    sections = {key for key, value in written.items() if isinstance(value, dict)} - NAMED.keys()
    assert sections >= {"local", "personal"}
    assert sections | {"run", "privacy", "robust"} == catalogue.SECTIONS.keys()  # absent where not asked for
    for section in catalogue.SECTIONS:
        value = json.loads(done("show", section, "--json").stdout)
        assert value["room"] == "sections"
        assert {option["name"] for option in value["options"]} >= dict(written.get(section, {})).keys()  # type: ignore[call-overload]
        assert re.search(rf"\b{section}\b", help_text)
    text = done("show", "fbl").stdout
    for part in ("rounds between choices (m)", "10, 25, 50, 100, 0", "preset M1", "arXiv 2601.14042"):
        assert part in text
    lr = next(
        option for option in json.loads(done("show", "local", "--json").stdout)["options"] if option["name"] == "lr"
    )
    assert (lr["default"], lr["allowed"], lr["type"]) == (0.01, "> 0", "a number")


def test_show_says_of_a_method_what_crosses_and_where_it_departs() -> None:
    for name in registry.names("algorithms"):
        value = json.loads(done("show", f"algorithms/{name}", "--json").stdout)
        assert value["crosses"].startswith("What crosses: ") and "\n" not in value["crosses"]
        assert "departures" in value or name in ("fedavg_ft",), name
    text = done("show", "scaffold").stdout
    paper, departure, crosses, options = (text.index(part) for part in ("paper:", "Departure:", "What crosses:", "Opt"))
    assert paper < departure < crosses < options
    assert "departures" not in json.loads(done("show", "models/cnn", "--json").stdout)


def test_show_leaves_out_what_a_method_has_no_use_for() -> None:
    def values(name: str) -> dict[str, str]:
        return {each["name"]: each["type"] for each in json.loads(done("show", name, "--json").stdout)["options"]}

    assert {"weights", "denominator"} <= values("fedavg").keys()
    for name in ("separate", "centralized", "fedamp"):
        assert not {"weights", "denominator"} & values(name).keys()
    for name in ("feddyn", "scaffold"):  # which refuse a third
        assert values(name)["weights"] == "samples | uniform"


def test_a_contact_sheet_is_of_images_that_are_there(config: Path, data: Dataset) -> None:
    from safetensors.torch import load_file

    from fedkeel.job import Job

    job = Job(fedkeel.read(config, ["algorithm.name=regl", "algorithm.volume=3"]), data)
    job.generate()
    there = len(job.images.pool)
    assert contact.write_sheet(job, Path("sheet.safetensors"))
    assert len(job.images.pool) == there
    sheet = load_file("sheet.safetensors")
    assert sheet["real"].shape == sheet["fake"].shape == (4, 3, 1, 16, 16)
    assert (sheet["real"][2, 1] == data.train_x[2 + 4]).all()


def test_a_contact_sheet_of_samples_that_clients_hold_in_common(config: Path, data: Dataset) -> None:
    """Three images of a class, held by all four clients: twelve on their count, three to show."""
    from safetensors.torch import load_file

    from fedkeel.job import Job

    rows = [row for row, label in enumerate(data.train_y.tolist()) if label or row < 12]
    few = replace(data, train_x=data.train_x[rows], train_y=data.train_y[rows])
    shared = ("partition.name=global_share", "partition.share=1.0", "partition.min_size=1")
    job = Job(fedkeel.read(config, ["algorithm.name=regl", "algorithm.volume=8", *shared]), few)
    assert job.counts.sum(0)[0] == 12
    job.generate()
    assert contact.write_sheet(job, Path("sheet.safetensors"))
    assert load_file("sheet.safetensors")["real"].shape == (4, 3, 1, 16, 16)


def test_doctor_speaks_of_declared_extras_only() -> None:
    declared = metadata("fedkeel").get_all("Provides-Extra") or []
    assert EXTRAS.keys() <= set(declared)
    found = {check.name.removeprefix("extra ") for check in examine() if check.name.startswith("extra ")}
    assert found == EXTRAS.keys()
    for name, packages in EXTRAS.items():
        needed = [line for line in requires("fedkeel") or [] if line.endswith(f"extra == '{name}'")]
        assert len(needed) == len(packages)
        for package in packages:
            assert any(line.startswith(package.replace("_", "-")) for line in needed)


@pytest.fixture
def readme() -> dict[str, str]:
    """By method: what README says that crosses."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    cells = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    return {name: each[-2] for each in cells for name in re.findall(r"`(\w+)`", each[1])}


def test_the_readme_has_every_method(readme: dict[str, str]) -> None:
    assert sorted(readme) == registry.names("algorithms")


def test_the_factors_of_the_readme_are_those_measured(readme: dict[str, str], rows: dict[str, dict[str, Any]]) -> None:
    """What has no factor is FedAvg's traffic, but for less than a hundredth."""

    def says(word: str, factor: float) -> bool:
        return f"{factor:.{len(word.partition('.')[2])}f}" == word

    for name in readme.keys() - {"centralized"}:  # which sends the data before
        words, factors = re.findall(r"\(x ([\d.]+)\)", readme[name]), (rows[name]["down"], rows[name]["up"])
        assert all(any(says(word, each) for each in factors) for word in words), (name, factors)
        assert all(any(says(word, each) for word in (*words, "1.00")) for each in factors), (name, factors)


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path / "cache"))
    found = {check.name: check for check in examine()}
    for name in ("python", "torch", "threads", "bundled data", "cache", "disk", "image pools"):
        assert found[name].state == "ok", found[name]
    for name, check in found.items():
        assert check.state == "ok" or check.mend, name
    assert found["cifar10"] == Check("cifar10", "absent", "not fetched", "fedkeel data get cifar10")

    monkeypatch.setattr(
        "fedkeel.doctor.examine", lambda: [Check("torch", "ok", "2"), Check("extra ray", "absent", "-", "pip")]
    )
    assert "extra ray" in done("doctor").stdout
    assert json.loads(done("doctor", "--json").stdout)[1]["mend"] == "pip"
    monkeypatch.setattr(
        "fedkeel.doctor.examine", lambda: [Check("cache", "broken", "read-only", "export FEDKEEL_CACHE=")]
    )
    assert fedkeel_("doctor").exit_code == 1


def test_doctor_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A check that fails keeps no other from its turn."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDKEEL_CACHE", str(cache))
    monkeypatch.setitem(doctor._CHECKS, "torch", lambda: 1 // 0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1_500_000_000))

    def unknown(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", unknown)  # run from its source, without an installation
    (cache / "cifar10").mkdir(parents=True)
    found = {check.name: check for check in examine()}
    wrong, little = found["torch"], found["disk"]
    assert (wrong.state, wrong.found) == ("broken", "ZeroDivisionError: integer division or modulo by zero")
    assert (little.state, little.found) == ("absent", "here 1.5 GB free, cache 1.5 GB free")
    assert "FEDKEEL_CACHE" in little.mend
    assert found["python"].state == "ok" and found["python"].found.endswith("fedkeel of unknown version")
    assert found["cifar10"] == Check("cifar10", "absent", "not fetched", "fedkeel data get cifar10")

    (cache / "cifar10" / "train-0.parquet").touch()
    part = doctor._cifar10()
    assert part.state == "absent" and part.mend == f"rm -r {cache / 'cifar10'}; fedkeel data get cifar10"
    (cache / "cifar10" / "test-0.parquet").touch()
    assert doctor._cifar10() == Check("cifar10", "ok", str(cache / "cifar10"))
