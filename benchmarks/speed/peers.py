"""Other libraries against the same plain loop, each in an environment of its own with the same torch.

    python benchmarks/speed/peers.py [NAME ...] [--keep FOLDER] [--workload W1|W0] [--rounds 10]

The environments are made by pip in FOLDER (the user's cache unless it is named) and found again there, made anew for
other versions. Only the peers that are named are measured, fedkeel beside them; the figures of the others are kept.
Writes benchmarks/results/speed.json and its page. Not part of `make bench`: it needs a package registry.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, NamedTuple

from harness import HERE, fedkeel, ours, race, unavailable

TORCH = "torch==2.13.0"


class Peer(NamedTuple):
    """One library. adapter: its program in adapters/; package: what pip installs; words: after the workload."""

    adapter: str
    package: str
    words: tuple[str, ...] = ()


PEERS = {
    "pfl-research": Peer("pfl_research.py", "pfl==0.6.0"),
    "FedLab": Peer("fedlab_serial.py", "fedlab==1.3.0"),
    "Flower-simulation": Peer("flower_simulation.py", "flwr[simulation]==1.41.0"),
    "Flower-simulation-2": Peer("flower_simulation.py", "flwr[simulation]==1.41.0", ("2",)),
}
"""Clients are trained one after another, but two at once in the last. This Flower brings ray 2.55.1."""
OUT = HERE.parent / "results/speed.json"


def main() -> None:
    from fedkeel.files import cache, write_json

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}; all when none is named")
    parser.add_argument("--keep", type=Path, default=cache() / "peers", help="where the environments are")
    parser.add_argument("--workload", default="W1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if unknown := set(given.names) - set(PEERS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    commands = {"bare": ours(given.workload, "bare"), "fedkeel": fedkeel(given.workload)}
    refused = {}
    for name in given.names or PEERS:
        peer = PEERS[name]
        try:
            python = installed(given.keep / Path(peer.adapter).stem, peer.package)
            commands[name] = [str(python), str(HERE / "adapters" / peer.adapter), given.workload, *peer.words]
        except subprocess.CalledProcessError as error:
            refused[name] = f"does not install: {(error.stderr.strip().splitlines() or ['?'])[-1]}"
    found = race(commands, given.rounds)
    versions = {name: {"version": peer.package} for name, peer in PEERS.items()}
    section: dict[str, Any] = {name: {**unavailable(why), **versions[name]} for name, why in refused.items()}
    for name in commands:
        if name != "bare":
            key = name if given.workload == "W1" else f"{name}, {given.workload}"
            section[key] = {**found.ratio(name, "bare"), **found.table()[name], **versions.get(name, {})}
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    write_json(given.out, {**results, "peers": {**results.get("peers", {}), **section}})
    print(json.dumps(section, indent=1))
    if given.out == OUT:
        from page import write_page

        write_page(json.loads(OUT.read_text()))


def installed(folder: Path, package: str) -> Path:
    """The Python of an environment with this package. Raises CalledProcessError when pip cannot make it."""
    python, done, wanted = folder / "bin/python", folder / "done", [TORCH, "numpy", package]
    if not done.exists() or done.read_text().split() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(command, check=True, capture_output=True, text=True)
        done.write_text(" ".join(wanted))
    return python


if __name__ == "__main__":
    sys.exit(main())
