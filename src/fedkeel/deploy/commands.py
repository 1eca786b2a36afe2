"""`fedkeel deploy`: the commands, thin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedkeel.errors import ConfigError

app = typer.Typer(help="Federations of real machines: keys, a server, nodes, runs.", no_args_is_help=True)

Keys = Annotated[Path | None, typer.Option(help="Folder of `fedkeel deploy keys`.", show_default=False)]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Plain HTTP without keys, for trials on one machine.", show_default=False)
]
Where = Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.", show_default=False)]


@app.callback()
def deploy() -> None:
    """Federations of real machines: keys, a server, nodes, runs."""


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where they lie, or will.", show_default=False)],
    host: Annotated[
        list[str] | None, typer.Option(metavar="NAME_OR_IP", help="The server as nodes reach it; repeatable.")
    ] = None,
    node: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A node; repeatable.")] = None,
    days: Annotated[int, typer.Option(min=1, help="For which the server's certificate is valid.")] = 730,
) -> None:
    """Make a federation's own certificates and keys; call it again with more nodes at any time."""
    from fedkeel.deploy.keys import advice, make_keys

    made = make_keys(folder, host or (), node or (), days)
    typer.echo(f"made: {', '.join(path.name for path in made.new) or 'nothing, all is there'}")
    for line in advice(folder, node or ()):
        typer.echo(line)


@app.command()
def server(
    keys: Keys = None,
    insecure: Insecure = False,
    host: Annotated[str, typer.Option(help="Address to listen on.", show_default="0.0.0.0")] = "",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8443,
    database: Annotated[Path, typer.Option(help="File in which Flower keeps nodes and runs.")] = Path(
        "federation/state.db"
    ),
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs.", show_default="each configuration's runs_dir")
    ] = None,
) -> None:
    """Run the server, in the foreground, until it is stopped. Nodes whose NAME.pub lies in the keys may join."""
    from fedkeel.deploy.server import serve

    chosen = _keys(keys, insecure)
    host = host or ("127.0.0.1" if insecure else "0.0.0.0")
    raise typer.Exit(serve(chosen, host, port, database, runs_dir, _say))


@app.command()
def node(
    name: Annotated[str, typer.Option(help="The node: its key is NAME.key.", show_default=False)],
    server: Where,
    keys: Keys = None,
    insecure: Insecure = False,
    client: Annotated[str, typer.Option(help="The client's name or number.", show_default="NAME")] = "",
    data: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            help="This site's own data: a folder of parquet files or of pictures, or module:function.",
            show_default="its part of the configuration's",
        ),
    ] = "",
    state: Annotated[
        Path | None, typer.Option(help="Folder for what the client keeps.", show_default="federation/NAME")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, show_default="a free one")] = None,
) -> None:
    """Run a node, in the foreground, until it is stopped; it is started again whenever it ends."""
    from fedkeel.deploy.node import Node, keep

    made = Node(
        server=server,
        keys=_keys(keys, insecure),
        name=name,
        state=state or Path("federation") / name,
        client=client,
        data=data,
        port=port,
    )
    raise typer.Exit(keep(made, _say))


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.", show_default=False)],
    server: Where,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Keys to override.", show_default=False)
    ] = None,
    keys: Keys = None,
    insecure: Insecure = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    runs_dir: Annotated[
        str, typer.Option(help="Folder of runs on the server's machine.", show_default="the server's")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
) -> None:
    """Start a run and follow it to its end. Ctrl-C stops following, not the run."""
    from fedkeel.config import read
    from fedkeel.deploy.flower import Server
    from fedkeel.deploy.submit import submit as start

    chosen = read(config, overrides or ())
    raise typer.Exit(start(chosen, Server(server, _keys(keys, insecure)), resume, runs_dir, detach, say=_say))


@app.command()
def status(
    server: Where,
    keys: Keys = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Plain values for a script, on stdout.")] = False,
) -> None:
    """Nodes and runs of a federation."""
    from fedkeel.deploy.flower import Server
    from fedkeel.deploy.submit import status as ask

    found = ask(Server(server, _keys(keys, insecure)))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for room, rows in found.items():
        assert isinstance(rows, list)
        typer.echo(f"{room}:" + ("" if rows else " none"))
        for row in rows:
            typer.echo("  " + "  ".join(str(value) for value in row.values() if value not in ("", None)))


@app.command()
def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Its number (see status).", show_default=False)],
    server: Where,
    keys: Keys = None,
    insecure: Insecure = False,
) -> None:
    """Stop a run; what it has reached is kept, and --resume goes on from there."""
    from fedkeel.deploy.flower import Server
    from fedkeel.deploy.submit import stop as end

    end(Server(server, _keys(keys, insecure)), run)
    _say(f"run {run} is stopped")


def _keys(keys: Path | None, insecure: bool) -> Path | None:
    """The folder of keys, None for plain HTTP. Raises ConfigError unless it is one of the two."""
    if (keys is None) != insecure:
        raise ConfigError("--keys", str(keys), "give a folder of keys (fedkeel deploy keys), or --insecure, not both")
    return keys


def _say(text: str) -> None:
    typer.echo(text, err=True)
