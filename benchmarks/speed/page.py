"""The tables of benchmarks/speed/README.md from the figures: between its markers, the prose around them stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from harness import HERE
from measure import BOUNDS

PAGE = HERE / "README.md"
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Figures = dict[str, Any]


def write_page(figures: Figures) -> None:
    """Replaces every table of the page."""
    PAGE.write_text(filled(PAGE.read_text(), figures))


def filled(text: str, figures: Figures) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end -->` made anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]](figures) + found[3], text)


def rows(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def figure(value: object) -> str:
    """A number, "-" where there is none."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def reach(figures: Figures) -> str:
    """What has a bound."""
    body = []
    for key, bound in BOUNDS.items():
        each = figures.get(key, {"value": None, "why": "not measured"})
        spread = " to ".join(map(figure, each.get("spread", [])))
        load = each.get("load", "")
        said = figure(each["value"]) if each["value"] is not None else each["why"]
        body.append((key, said, figure(bound), spread, "-".join(map(str, load)) if isinstance(load, list) else load))
    return rows(("what", "value", "at most", "quartiles", "load"), body)


def machine(figures: Figures) -> str:
    """Where it was measured."""
    return "; ".join(f"{key} {value}" for key, value in figures.get("hardware", {}).items()) + "\n"


def contenders(figures: Figures) -> str:
    """Seconds of each contender on each workload."""
    body = []
    for work in ("W1", "W0", "W2", "two_workers", "FBL", "registered", "cohort"):
        for name, each in figures.get(work, {}).items():
            if isinstance(each, dict) and "cpu_s" in each:
                cells = (each[key] for key in ("cpu_s", "wall_s", "steps", "start_s", "first_round_s", "peak_mb"))
                body.append((work, name, *map(figure, cells)))
    return rows(("workload", "contender", "CPU s", "wall s", "steps", "start s", "first round s", "peak MB"), body)


def methods(figures: Figures) -> str:
    """Every method beside what its equations need."""
    needed, body = figures.get("needed", {}), []
    for name, each in figures.get("methods", {}).items():
        cpu = each["cpu"]
        said = figure(cpu["value"]) if cpu["value"] is not None else cpu["why"]
        need = figure(needed[name]["value"] if name in needed else 1)
        ways = (figure(each.get("forward")), figure(each.get("backward")))
        body.append((name, said, need, *ways, " ".join(each["options"])))
    return rows(("method", "CPU of a step", "needed", "forward", "backward", "options"), body)


def profile(figures: Figures) -> str:
    """Where a round goes."""
    works = figures.get("profile", {})
    parts = sorted({part for each in works.values() for part in each["shares"]})
    parts.sort(key=lambda part: -max(each["shares"].get(part, 0.0) for each in works.values()))
    head = ("part", *(f"{work} ({each['cpu_s']:.3g} s)" for work, each in works.items()))
    return rows(head, [(part, *(f"{each['shares'].get(part, 0):.1%}" for each in works.values())) for part in parts])


def large(figures: Figures) -> str:
    """Large things, and generators."""
    body = []
    for section in ("first_round_s", "generation", "large_pool", "large_model"):
        found = figures.get(section, {})
        for name, each in (found if section != "large_model" else {"": found}).items():
            shown = (f"{key} {figure(value)}" for key, value in each.items() if key not in ("bound", "spread"))
            body.append((f"{section} {name}", ", ".join(shown)))
    return rows(("what", "figures"), body)


def peers(figures: Figures) -> str:
    """Other libraries."""
    body = []
    for name, each in figures.get("peers", {}).items():
        said = figure(each["value"]) if each["value"] is not None else each["why"]
        seconds = (figure(each.get(key)) for key in ("cpu_s", "wall_s", "peak_mb"))
        spread, load = " to ".join(map(figure, each.get("spread", []))), "-".join(map(str, each.get("load", [])))
        body.append((name, each.get("version", ""), said, spread, *seconds, load))
    return rows(("peer", "version", "CPU / bare", "quartiles", "CPU s", "wall s", "peak MB", "load"), body)


TABLES: dict[str, Callable[[Figures], str]] = {
    "reach": reach,
    "machine": machine,
    "contenders": contenders,
    "methods": methods,
    "profile": profile,
    "large": large,
    "peers": peers,
}
