"""How fast fedkeel is, against plain loops in turns, and how its cost grows.

make bench                                         all that needs no GPU: half an hour on two cores
python benchmarks/speed W1_float32 import_s        only those; the other figures are kept
python benchmarks/speed methods --only moon fedntd  only these rows of the table of methods
python benchmarks/speed --tiny --out /tmp/s.json   next to nothing of everything, to see that it works
python benchmarks/speed --page                     writes the tables of README.md anew
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import HERE, Unavailable, unavailable
from measure import BOUNDS, MEASUREMENTS, Setting

OUT = HERE.parent / "results/speed.json"


def main() -> None:
    known = {key: name for name, (_, keys) in MEASUREMENTS.items() for key in (name, *keys)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help=f"which figures; all when none is named: {', '.join(known)}"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where they are written, beside those that are there")
    parser.add_argument("--tiny", action="store_true", help="one repetition of next to nothing; needs --out")
    parser.add_argument("--full", action="store_true", help="whole rounds of W2 in place of tenths: an hour more")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="only these of `methods`")
    parser.add_argument("--page", action="store_true", help="only write the page, from the figures that are there")
    given = parser.parse_args()
    if unknown := set(given.keys) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if given.only:
        from fedkeel import registry

        if unknown := set(given.only) - set(registry.names("algorithms")):
            parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    if given.tiny and given.out == OUT:
        parser.error("--tiny gives no figures to keep: name another file with --out")
    if not given.page:
        chosen = dict.fromkeys(known[key] for key in given.keys or known)
        with tempfile.TemporaryDirectory(prefix="fedkeel-speed-") as folder:
            os.environ["FEDKEEL_CACHE"] = folder
            for name in chosen:
                one(name, Setting(given.tiny, given.full, Path(folder), tuple(given.only)), given.out)
    if given.out == OUT:
        from page import write_page

        write_page(json.loads(OUT.read_text()))


def one(name: str, setting: Setting, out: Path) -> None:
    """Makes one measurement and writes what came of it at once: a run that is stopped keeps what it has."""
    from fedkeel.files import write_json

    function, keys = MEASUREMENTS[name]
    began = time.perf_counter()
    try:
        found = function(setting)
    except Unavailable as why:
        found = {key: unavailable(str(why), BOUNDS.get(key)) for key in keys}
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if setting.only and "methods" in found:
        found["methods"] = {**results.get("methods", {}), **found["methods"]}
    took = time.perf_counter() - began
    measured = {**results.get("measured", {}), name: {**hardware(), "seconds": round(took)}}
    write_json(out, {**results, "hardware": hardware(), "measured": measured, **found})
    print(f"{name}: {took:.0f} s", flush=True)
    for key in BOUNDS:
        if key in found:
            each = found[key]
            says = each["why"] if each["value"] is None else f"{each['spread']}, load {each['load']}"
            print(f"  {key}: {each['value']} (at most {each['bound']}) {says}", flush=True)


def hardware() -> dict[str, Any]:
    """What a measurement ran on. The last one's stands above the tables, each one's under `measured`."""
    import subprocess

    import torch

    from fedkeel.loop import commit, processor

    git = ["git", "status", "--porcelain", "src", "benchmarks/speed"]
    return {
        "processor": processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "changed": bool(subprocess.run(git, capture_output=True, cwd=HERE.parents[1]).stdout),  # since that commit
    }


if __name__ == "__main__":
    main()
