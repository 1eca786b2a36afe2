"""The documentation: every command parses, every example runs, the site builds.

A block of bash, python or toml in docs/ and README.md is run, each page in an empty folder, from top to bottom:

- `title="NAME"` makes it a file of that name; exp.toml of first-run.md is there on every page;
- python runs in one namespace a page, `fedkeel ...` as the command line does, all in this process;
- toml without a title must be a configuration.

One that cannot run here has a reason in a comment above it, `<!-- not run: REASON -->`. Run or not, all `fedkeel`
commands, those in running text too, must parse: command, options, keys.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer.main
from benchmark_modules import BENCHMARKS, modules_of
from typer.testing import CliRunner

from fedkeel import catalogue, cli, config, registry
from fedkeel.errors import UserError
from fedkeel.reproduce import command as reproduce
from fedkeel.reproduce.tables import laid

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
ALSO = [ROOT / "CONTRIBUTING.md", ROOT / "examples" / "flower" / "README.md"]
"""Whose commands must parse too."""
QUICK = {"docs/your-method.md"}
"""Pages that run in a second; the others are for `make test`, but for those with configurations only."""
RUN = ("bash", "python", "toml")
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
SKIP = re.compile(r"<!-- not run: (.+) -->\s*$")
INLINE = re.compile(r"`(fedkeel [a-z][^`]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. title: of the file that it is; reason: why it is not run."""

    page: str
    line: int
    language: str
    title: str
    text: str
    reason: str

    def commands(self) -> list[list[str]]:
        """Its commands, a line each, as a shell would split them."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str, path: Path) -> list[Block]:
    """Those of a page in their order."""
    text = path.read_text()
    out = []
    for found in FENCE.finditer(text):
        skipped = SKIP.search(text[: found.start()])
        body = "".join(line.removeprefix(found["indent"]) for line in found["text"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start()) + 1
        out.append(Block(page, line, found["language"], found["title"] or "", body, skipped[1] if skipped else ""))
    return out


BLOCKS = {page: blocks(page, path) for page, path in PAGES.items()}
COMMAND = typer.main.get_command(cli.app)
EXP = next(block.text for block in BLOCKS["docs/first-run.md"] if block.title == "exp.toml")
FEWER = EXP.replace("train_limit = 1000", "train_limit = 400").replace("test_limit = 500", "test_limit = 100")
"""The same on fewer images, for pages that take it as given; docs/first-run.md writes its own."""


# what is there --------------------------------------------------------------------------------------------------------


def test_fewer_are_fewer() -> None:
    assert tomllib.loads(FEWER)["data"] == {"name": "fashion", "train_limit": 400, "test_limit": 100}


def test_examples_that_are_not_run_are_few() -> None:
    counted = [block for page in BLOCKS.values() for block in page if block.language in RUN]
    left = [block for block in counted if block.reason]
    assert len(counted) > 60 and len(left) < len(counted) / 3, [(block.page, block.line) for block in left]
    marked = sum(path.read_text().count("<!-- not run") for path in PAGES.values())
    assert marked == len([block for page in BLOCKS.values() for block in page if block.reason]), (
        "a mark without a block"
    )


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `fedkeel` command of the documentation, with where it stands."""
    for path in [*PAGES.values(), *ALSO]:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        for block in blocks(name, path):
            if block.language in ("", "bash"):
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.startswith("fedkeel "):
                        yield f"{name}:{block.line}", shlex.split(line, comments=True)
        outside = FENCE.sub("", text)
        for line in re.findall(r"^    (fedkeel .+)$", outside, re.M):
            yield name, shlex.split(line, comments=True)
        for found in INLINE.finditer(outside):
            yield name, shlex.split(found[1].replace("...", ""))


def parsed(words: list[str]) -> tuple[click.Context, dict[str, Any]]:
    """The context and the values of a command line. Raises click.UsageError for a wrong one."""
    command: Any = COMMAND
    context = command.make_context("fedkeel", words[1:])
    while isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        if isinstance(command, click.Group) and not rest:
            break  # a group's name alone, as text has it
        context = command.make_context(name, rest, parent=context)
    return context, context.params


def wrong(words: list[str]) -> str:
    """What is wrong with a command, nothing where it is right. N stands for a number, brackets for what may be left
    out."""
    try:
        context, values = parsed([re.sub(r"^[A-Z]$", "1", word.strip("[]")) for word in words])
        for option in context.command.params:
            if option.metavar == "KEY=VALUE...":
                check_keys(values[option.name or ""] or ())
        for spec in (spec.strip() for spec in (values.get("algorithms") or "").split(",")):
            if spec not in ("", "myprox"):
                config.parse(config.with_method(tomllib.loads(EXP), spec))
        if context.info_name == "show" and values["name"] not in ("NAME", "myprox"):
            catalogue.find(values["name"])
        if context.info_name == "list" and values["room"]:
            registry.names(values["room"])
        if context.info_name == "reproduce" and set(values["tables"] or ()) - {"1", "NAME", "TABLE"}:
            reproduce.plan(values["tables"], values["profile"], *map(_list, (values["rows"], values["columns"])))
    except (click.UsageError, UserError) as error:
        return str(getattr(error, "message", error))
    return ""


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def check_keys(keys: Sequence[str]) -> None:
    """Overrides of exp.toml, and options of methods under methods.NAME. Raises ConfigError."""
    config.parse(tomllib.loads(EXP), [key for key in keys if not key.startswith("methods.")])
    for key in keys:
        if key.startswith("methods.") and (name := key.split(".")[1]) in registry.names("algorithms"):
            config.parse({"algorithm": {"name": name}}, [key.replace(f"methods.{name}", "algorithm", 1)])


def test_every_command_parses() -> None:
    found = list(commands())
    assert len(found) > 100
    assert not {(where, shlex.join(words)): said for where, words in found if (said := wrong(words))}


@pytest.mark.parametrize(
    "line",
    [
        "fedkeel runn exp.toml",
        "fedkeel run exp.toml --seeds 3",
        "fedkeel run exp.toml local.lrr=0.1",
        "fedkeel run exp.toml local.lr=-1",
        "fedkeel compare exp.toml --algorithms fedavgg",
        "fedkeel compare exp.toml --algorithms fedprox methods.fedprox.mue=1",
        "fedkeel show fedporx",
        "fedkeel list methods",
        "fedkeel deploy nodes",
        "fedkeel reproduce fbl-t9",
        "fedkeel reproduce fbl-t1 --columns c10-09",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    assert wrong(line.split())


def test_configurations_of_examples_are_right() -> None:
    """Those that a page or README names; the one of a Flower app goes over the app's own keys."""
    config.read(ROOT / "examples/private.toml")


def test_links_of_the_readme_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *ALSO):
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("name", ["baselines", "generators", "reliability"])
def test_a_benchmarks_page_has_the_numbers_of_its_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of benchmarks/speed: test_speed.py; of benchmarks/evidence: test_evidence.py."""
    if name == "reliability":
        pytest.importorskip("flwr", reason="needs the extra `flower`")
    with modules_of(BENCHMARKS, name) as found:
        made = found[name]
        results, kept = json.loads(made.OUT.read_text()), (made.OUT.read_text(), made.PAGE.read_text())
        for file in ("OUT", "PAGE"):
            monkeypatch.setattr(made, file, tmp_path / file)
        made.save(results) if name == "reliability" else made.write(results["runs"])
        assert (made.OUT.read_text(), made.PAGE.read_text()) == kept


# what it does ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; what is registered or imported there is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for room in registry.PACKAGES:
        registry.names(room)
        monkeypatch.setitem(registry._things, room, dict(registry._things[room]))
    (tmp_path / "exp.toml").write_text(FEWER)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def check_toml(block: Block) -> None:
    """A configuration: its own keys, and those of every method in [methods]; or a table of `fedkeel reproduce`, whose
    rows and columns set such keys."""
    table = tomllib.loads(block.text)
    if {"rows", "columns"} <= table.keys():
        for line in (*table["rows"].values(), *table["columns"].values()):
            config.parse(laid(tomllib.loads(EXP), line.get("set", {})))
        return
    config.parse(table)
    for name in table.get("methods", {}):
        config.parse(config.with_method(table, name))


def run(block: Block, names: dict[str, Any]) -> None:
    """Runs a block in the working folder."""
    if block.title:
        Path(block.title).write_text(block.text)
        importlib.invalidate_caches()
    if block.language == "toml":
        check_toml(block)
    elif block.language == "python" and not block.title:
        source = "\n" * block.line + block.text  # so that a traceback names the page's own line
        exec(compile(source, block.page, "exec", dont_inherit=True), names)
    elif block.language == "bash":
        for words in block.commands():
            assert words[0] == "fedkeel", f"{block.page}:{block.line}: only fedkeel is run here: {shlex.join(words)}"
            done = CliRunner().invoke(cli.app, words[1:], prog_name="fedkeel")
            assert done.exit_code == 0, f"{block.page}:{block.line}: {shlex.join(words)}\n{done.output}"


def to_run(page: str) -> list[Block]:
    return [block for block in BLOCKS[page] if block.language in RUN and not block.reason]


def quick(page: str) -> bool:
    return page in QUICK or all(block.language == "toml" for block in to_run(page))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if quick(page) else [pytest.mark.full]) for page in PAGES if to_run(page)],
)
def test_the_examples_of_a_page_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written on the first page only: they take longer than its runs."""
    names: dict[str, Any] = {"__name__": "page"}
    if page != "docs/first-run.md":
        monkeypatch.setattr("fedkeel.report.page.write_page", lambda runs, path: path)
        monkeypatch.setattr("fedkeel.report.plots.write_pngs", lambda runs, folder: [])
    for block in to_run(page):
        run(block, names)


@pytest.mark.full
def test_a_method_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """The package of your-method.md, installed beside this environment."""
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    for block in BLOCKS["docs/your-method.md"]:
        if block.title:
            (package / block.title).write_text(block.text)
    (tmp_path / "exp.toml").write_text(EXP)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(package)], check=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": str(site)}

    words = ["compare", "exp.toml", "--algorithms", "fedprox,myprox", "--json", "rounds=1", "methods.myprox.mu=0.1"]
    command = [sys.executable, "-c", "from fedkeel.cli import main; main()", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"].keys() == {"fedprox", "myprox"}


# the site -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """tools/build_docs.py."""
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_method_page_has_what_a_reader_looks_for(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = catalogue.traffic(["scaffold"])
    monkeypatch.setattr(hook, "sent", lambda: measured)
    page = hook.method_page("scaffold")
    assert page.startswith("# SCAFFOLD\n\nControl variates cancel client drift.")
    assert "(https://arxiv.org/abs/1910.06378)" in page and "option II" in page.replace("Option", "option")
    assert "| server to client | `model, c` | 2.00 |" in page
    assert "| `server_lr` | 1.0 | a number > 0 |" in page
    assert "**`scaffold`** | 70.1 ± 3.5 |" in page and "[`fedavg`](fedavg.md)" in page
    assert "    class Scaffold(Algorithm):" in page


@pytest.mark.full
@pytest.mark.parametrize("name", registry.names("algorithms"))
def test_the_command_on_a_methods_page_runs(hook: ModuleType, name: str, folder: Path, no_report: None) -> None:
    """On fewer images; no method is switched off by the few rounds."""
    words = hook.first_command(name)
    found = config.parse(tomllib.loads(EXP), words[3:])
    assert not found.algorithm.off(found.rounds)
    fewer = ["rounds=3", "data.train_limit=300", "data.test_limit=60", "model.width=4"]
    fewer += [
        "personal.epochs=1",
        *(["algorithm.iterations=2", "algorithm.tune_epochs=1"] if name == "dynafed" else []),
    ]
    done = CliRunner().invoke(cli.app, [*words[1:], *fewer], prog_name="fedkeel")
    assert done.exit_code == 0, done.output


def test_every_hook_is_explained(hook: ModuleType) -> None:
    explained = re.findall(r"^\| `(\w+)\(", PAGES["docs/your-method.md"].read_text(), re.M)
    assert sorted(explained) == sorted(hook.HOOKS)


def test_committed_cells_stand_on_the_page_of_their_method(hook: ModuleType, tmp_path: Path) -> None:
    """Mean and sample deviation over seeds: 0.5 and 0.6 give 55.0 ± 7.1. Variants stand apart, a control that the paper
    does not have does not count, nor does a cell of another configuration."""
    for place, value, key in (
        ("fbl-t3/m1--c10--seed1", 0.5, ""),
        ("fbl-t3/m1--c10--seed2", 0.6, ""),
        ("fbl-t3/m2--c10--seed1", 0.25, ""),
        ("fbl-t3/m2--c10--seed2", 0.9, "of another configuration"),
        ("fbl-t1/fbl-nocut--c10-01--seed1", 0.9, ""),
    ):
        cell = json.loads((hook.CELLS / f"reduced/{place}.json").read_text())
        path = tmp_path / f"reduced/{place}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**cell, "key": key or cell["key"], "headline": {"global/accuracy": value}}))
    said, text = hook.reproduced_results("fbl", tmp_path)
    link = "[fbl-t3](../evidence-tables.md#tables)"
    assert text.splitlines()[2:] == [
        f"| {link} | M1: random cut | CIFAR-10 | global | 55.0 ± 7.1 | 2 | 75.2 | reduced |",
        f"| {link} | M2: loss | CIFAR-10 | global | 25.0 | 1 | 76.8 | reduced |",
    ]
    assert "evidence.md" in said
    assert hook.reproduced_results("moon", tmp_path) == []


def test_the_page_has_every_table_with_its_runs(tmp_path: Path) -> None:
    page = PAGES["docs/reproducing.md"].read_text()
    for each in reproduce.overview(tmp_path):
        cells: Any = each["cells"]
        runs = " | ".join(str(cells[profile]["cells"] or "–") for profile in ("paper", "reduced"))
        assert re.search(rf"^\| `{each['name']}` \| [^|]+ \| {runs} \|$", page, re.M), each["name"]


def test_a_docstring_is_taken_literally(hook: ModuleType) -> None:
    assert hook.prose("w_k * `a_b` [B]") == r"w\_k \* `a_b` \[B\]"
    assert (
        hook.prose("Li et al., arXiv 1812.06127") == "Li et al., [arXiv 1812.06127](https://arxiv.org/abs/1812.06127)"
    )


class Reads(HTMLParser):
    """What a page loads, and its words outside code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.code += tag in ("code", "pre", "script", "style")
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(str(found["src"]))
        if tag == "link":
            self.loads.append(str(found.get("href")))

    def handle_endtag(self, tag: str) -> None:
        self.code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self.code:
            self.words.append(data)


@pytest.mark.full
def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    """Strictly: a broken link, a page outside the navigation or an unknown anchor is an error."""
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    methods = {path.stem for path in pages if path.parent.name == "methods"}
    assert methods == {*(name for name in registry.names("algorithms") if ours(name)), "index"}
    for page in pages:
        read = Reads(page.read_text())
        assert not [place for place in read.loads if place.startswith(("http:", "https:", "//"))], page
        text = "".join(read.words)
        for left in ("```", "<!-- figures", "|---", "](", "\n- "):  # Markdown that was not understood
            assert left not in text, (page.name, left, text[max(0, text.index(left) - 80) :][:160])
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def ours(name: str) -> bool:
    return registry.get("algorithms", name).__module__.startswith("fedkeel.")
