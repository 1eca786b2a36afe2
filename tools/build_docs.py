"""The hook of the documentation site: pages of methods and tables of figures, made when the site is built.

    make docs          builds the site into site/

A method's page has its docstring, its options, what it sends (measured on the spot), and our results from
benchmarks/results. Where a page of docs/ says `<!-- figures: NAME -->`, the table or picture of that name is put in,
made from benchmarks/results/speed.json. Nothing of this is committed, so nothing of it can be out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fedkeel
from fedkeel.algorithms.base import Algorithm, Over
from fedkeel.catalogue import Thing, Traffic, things, traffic
from fedkeel.reproduce.cells import read
from fedkeel.reproduce.shown import Shown, show
from fedkeel.reproduce.tables import cells, experiment, names

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CELLS = RESULTS / "reproduce"
"""Cells of the papers' tables that were committed: PROFILE/TABLE/CELL.json, as `fedkeel reproduce` leaves them."""
MARK = re.compile(r"<!-- figures: (\w+) -->")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
KINDS = {"global": "One model for all", "personal": "A model for each client", "bound": "Bounds"}
METRICS = {
    "global/accuracy": "global",
    "personal/accuracy_last": "personal, last",
    "personal/accuracy_best": "personal, best",
}
BESIDE = {"global": ("fedavg", "centralized"), "personal": ("fedavg_ft", "separate")}
"""Methods that stand beside each one in its table of results."""
SHORT = {
    "regl": ["algorithm.volume=5"],
    "fgl": ["algorithm.volume=20", "algorithm.epochs=5"],
    "dynafed": ["algorithm.snapshots=2", "algorithm.iterations=50"],
    "fedcda": ["algorithm.warmup=2"],
}
"""What makes a method's first command fit the few rounds and images of exp.toml."""
FEDAVG = "FedAvg: the average of locally trained models. Every other method is written as what it does differently."
INNER = ("weight", "only_sums", "part_of_all", "idle", "falls_back", "tunes_generator")
"""Functions of a method that are no hooks."""
HOOKS = [
    name
    for name, member in vars(Algorithm).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in INNER
]
Figures = dict[str, Any]


# events of mkdocs -----------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the methods into the navigation."""
    for section in config.nav or ():
        ((title, pages),) = section.items()
        if title == "Methods":
            pages += [{name: f"methods/{name}.md"} for name in methods()]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of the methods."""
    files.append(File.generated(config, "methods/index.md", content=overview()))
    for name in methods():
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the figures. Of links to files beside docs/, which work on a git host, the text stays."""
    if "/" not in page.file.src_uri:
        markdown = OUTSIDE.sub(r"`\1`", markdown)
    return filled(markdown, json.loads((RESULTS / "speed.json").read_text()))


# methods --------------------------------------------------------------------------------------------------------------


@cache
def methods() -> dict[str, Thing]:
    """fedkeel's own methods by name."""
    return {thing.name: thing for thing in things("algorithms") if thing.cls.__module__.startswith("fedkeel.")}


@cache
def sent() -> dict[str, Traffic]:
    """What each method sends, measured."""
    return traffic(list(methods()))


def overview() -> str:
    """The page that lists all methods."""
    text = [
        "# Methods",
        "Most methods send the model's weights, and with them the client's weight in the average, usually its number "
        "of samples. Down and up are bytes of a round as factors of FedAvg's, measured on a small CNN when this page "
        "was made, as `fedkeel list algorithms` does. Accuracies, in "
        "per cent, are ours on the bundled images: Dirichlet 0.1, three seeds, one setting for all and tuned for none "
        "([more](../baselines.md)).",
    ]
    for kind, title in KINDS.items():
        rows = []
        for name, thing in methods().items():
            if _kind(thing) == kind:
                said = _paragraphs(thing)[0].partition(": ")[2]
                if len(_together(thing)) > 1:
                    said += f" {thing.cls.__doc__}"
                factors = (_factor(sent()[name].times_down), _factor(sent()[name].times_up))
                rows.append((f"[`{name}`]({name}.md)", prose(said).removesuffix("."), *factors, _headline(name)))
        text += [
            f"## {title}",
            table(("method", "what it does", "down", "up", "accuracy"), rows, ":--,:--,--:,--:,--:"),
        ]
    return "\n\n".join(text) + "\n"


def method_page(name: str) -> str:
    """The page of one method."""
    thing = methods()[name]
    first, *rest = _paragraphs(thing)
    parts = thing.parts()
    title, _, said = first.partition(": ")
    alone = len(_together(thing)) == 1
    own = "" if thing.cls is Algorithm else inspect.cleandoc(thing.cls.__doc__ or "")
    source = Path(inspect.getsourcefile(thing.cls) or "")
    base = Over if issubclass(thing.cls, Over) else Algorithm
    own_hooks = [f"`{hook}`" for hook in HOOKS if getattr(thing.cls, hook) is not getattr(base, hook)]
    text = [
        f"# {title if alone else thing.cls.__name__}",
        prose(_sentence(said) if alone else first),
        *(prose(paragraph) for paragraph in rest if paragraph not in parts.values()),
        *([prose(own)] if own else []),
        f"```bash\n{shlex.join(first_command(name))}\n```",
        *_departures(parts.get("departures", "")),
        "## What crosses",
        prose(_after_colon(parts["crosses"])),
        _measured(sent()[name]),
        "## Options",
        _options(thing),
        *_presets(thing),
        "## Our numbers",
        bundled_results(name),
        *reproduced_results(name),
        "## The code",
        f"Beside its options it has {', '.join(own_hooks) or 'nothing of its own'}"
        f" ([what these hooks are](../your-method.md#the-hooks)).",
        f'??? quote "{source.name}"\n\n' + _indented(f"```python\n{source.read_text()}```"),
    ]
    return "\n\n".join(text) + "\n"


def first_command(name: str) -> list[str]:
    """What a method's page begins with: exp.toml of the first run, by this method."""
    return ["fedkeel", "run", "exp.toml", f"algorithm.name={name}", *SHORT.get(name, [])]


def bundled_results(name: str) -> str:
    """Results on the bundled images, beside the references: accuracy in per cent, mean and deviation over seeds."""
    found = json.loads((RESULTS / "baselines-fashion.json").read_text())
    shown = [
        metric for metric in METRICS if any(metric in results.get(name, {}) for results in found["table"].values())
    ]
    beside = [other for other in BESIDE[methods()[name].cls.kind] if other != name]
    rows = []
    for setting, results in found["table"].items():
        for each in (each for each in (name, *beside) if each in results):
            label = f"**`{each}`**" if each == name else f"[`{each}`]({each}.md)"
            values = (_spread(results[each].get(metric)) for metric in shown)
            rows.append((f"Dirichlet, {setting}", label, *values, f"{results[each]['cpu_s'][0]:.0f}"))
    changed = ", ".join(f"`{key} = {value}`" for key, value in found["methods"].get(name, {}).items())
    said = [
        "Accuracy in per cent, mean and deviation of three seeds, on the bundled images ([more](../baselines.md)).",
        *([f"Not at their defaults: {changed}."] if changed else []),
    ]
    heads = ("Fashion-MNIST", "method", *(METRICS[metric] for metric in shown), "CPU s")
    return " ".join(said) + "\n\n" + table(heads, rows, ",".join([":--", ":--"] + ["--:"] * (len(heads) - 2)))


def reproduced_results(name: str, folder: Path = CELLS) -> list[str]:
    """Results in the papers' tables beside the printed ones: rows and columns that the papers have, where a seed of
    the committed cells is done. Nothing where there are none; the profile "smoke" shows invariants only and does not
    count."""
    rows = []
    for shown in tables(folder):
        of = experiment(shown.name).rows
        for row in (row for row in shown.rows if not row.own and re.split(r"[:(]", of[row.key].method)[0] == name):
            for column in shown.columns:
                spot = shown.spots[row.key, column.key]
                if spot.mean is not None and spot.printed:
                    place = (f"[{shown.name}](../evidence-tables.md#tables)", row.label, column.label)
                    ours = f"{spot.mean:.1f}" + (f" ± {spot.std:.1f}" if spot.std is not None else "")
                    printed = f"{spot.printed[0]:.1f}"
                    rows.append((*place, METRICS[row.metric], ours, str(len(spot.ours)), printed, shown.profile))
    if not rows:
        return []
    heads = ("table", "row", "column", "accuracy", "ours", "seeds", "printed", "profile")
    said = (
        "In the papers' tables (`fedkeel reproduce`). The profile `reduced` has a small network, few rounds and other "
        "generators: what may be compared is the order of methods in a column. The [evidence](../evidence.md) does "
        "that, and has controls of our own."
    )
    return [said, table(heads, rows, ":--,:--,:--,:--,--:,--:,--:,:--")]


@cache
def tables(folder: Path) -> list[Shown]:
    """The papers' tables with committed cells, profile by profile."""
    asked = [(experiment(name), profile) for name in names() for profile in ("paper", "reduced")]
    there = [(found, profile) for found, profile in asked if (folder / profile / found.name).is_dir() and found.runs]
    return [show(found, profile, [read(cell, folder) for cell in cells(found, profile)]) for found, profile in there]


def _kind(thing: Thing) -> str:
    return "bound" if thing.name in ("centralized", "separate") else str(getattr(thing.cls, "kind", "global"))


def _paragraphs(thing: Thing) -> list[str]:
    """Those of a method's module."""
    module = inspect.getmodule(thing.cls)
    first, *rest = inspect.cleandoc((module and module.__doc__) or "").split("\n\n")
    return [FEDAVG if thing.cls is Algorithm else first, *rest]


def _together(thing: Thing) -> list[Thing]:
    """The methods of its file."""
    return [other for other in methods().values() if other.cls.__module__ == thing.cls.__module__]


def _after_colon(text: str) -> str:
    return _sentence(text.partition(":")[2].strip())


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a letter of an equation."""
    return text if re.match(r"\w\b", text) else text[:1].upper() + text[1:]


def _departures(text: str) -> list[str]:
    return ["## Where it departs from the paper", prose(_after_colon(text))] if text else []


def _measured(found: Traffic) -> str:
    down, up = ", ".join(found.from_server()), ", ".join(("model", *found.up))
    rows = [
        ("server to client", f"`{down}`", _factor(found.times_down)),
        ("client to server", f"`{up}`", _factor(found.times_up)),
        ("stays on the client", "", _factor(found.times_kept)),
    ]
    if found.times_down == found.times_up == 0:
        rows = [(where, "", factor) for where, _, factor in rows]
    note = "Bytes of a round, measured on a small CNN when this page was made; FedAvg's model is 1."
    return f"{note}\n\n" + table(("", "what", "bytes"), rows, ":--,:--,--:")


def _options(thing: Thing) -> str:
    rows = []
    for option in thing.options():
        meaning = option.meaning
        allowed = " ".join(part for part in (option.kind, meaning.allowed()) if part)
        grid = f" Grid: {', '.join(map(toml, meaning.grid))}." if meaning.grid else ""
        off = "" if meaning.off is None else f" {toml(meaning.off)} = off."
        rows.append(
            (f"`{option.name}`", prose(toml(option.default)), prose(allowed), prose(f"{meaning.doc}.{grid}{off}"))
        )
    return table(("`algorithm.`", "default", "values", "meaning"), rows) if rows else "None."


def _presets(thing: Thing) -> list[str]:
    found = getattr(thing.cls, "presets", {})
    rows = [
        (f"`{name}`", ", ".join(f"`{key} = {toml(value)}`" for key, value in values.items()) or "the defaults")
        for name, values in found.items()
    ]
    return (
        ["### Presets", "`algorithm.preset = NAME` sets several at once.", table(("preset", "sets"), rows)]
        if rows
        else []
    )


def _headline(name: str) -> str:
    found = json.loads((RESULTS / "baselines-fashion.json").read_text())["table"]["alpha 0.1"].get(name, {})
    metric = next((metric for metric in METRICS if metric in found), "")
    if methods()[name].cls.kind == "personal" and "personal/accuracy_last" in found:
        metric = "personal/accuracy_last"
    return _spread(found.get(metric))


# words ----------------------------------------------------------------------------------------------------------------


def prose(text: str, up: str = "../") -> str:
    """Plain text of a docstring as Markdown: code stays, papers and pages become links, the rest is taken literally.
    up: the way to docs/ from the page that it stands on."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[\]|\\])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    said = "`".join(parts)
    said = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", said)
    said = re.sub(r"\(OpenReview (\w+)\)", r"([OpenReview](https://openreview.net/forum?id=\1))", said)
    return re.sub(r"docs/([\w-]+)\.md", rf"[\1]({up}\1.md)", said)


def toml(value: object) -> str:
    """A value as a configuration has it; a dash for nothing."""
    return "–" if value is None else json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], ruler: str = "") -> str:
    """A Markdown table. ruler: alignments, such as ":--,--:"."""
    rules = ruler.split(",") if ruler else ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rules, *rows))


def _indented(text: str) -> str:
    return "".join(f"    {line}" if line.strip() else line for line in text.splitlines(keepends=True))


def _factor(value: float) -> str:
    return f"{value:.2f}"


def _spread(value: Sequence[float] | None) -> str:
    return "–" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


# performance ----------------------------------------------------------------------------------------------------------


def filled(markdown: str, figures: Figures) -> str:
    """A page with its marks replaced by figures. Raises KeyError for a name that is none."""
    return MARK.sub(lambda found: FIGURES[found[1]](figures), markdown)


def peers(figures: Figures) -> str:
    """A picture and a table of other libraries."""
    found = {name: each for name, each in figures["peers"].items() if each["value"] is not None}
    names = {"Flower-simulation": "Flower, one client at a time", "Flower-simulation-2": "Flower, two at a time"}
    bars = [("plain loop", 1.0, (1.0, 1.0))]
    bars += [(names.get(name, name), each["value"], tuple(each["spread"])) for name, each in found.items()]
    rows = [
        (names.get(name, name), each.get("version", ""), *(f"{each[key]:.3g}" for key in ("value", "cpu_s", "wall_s")),
         f"{each['peak_mb']:,.0f}")
        for name, each in found.items()
    ]  # fmt: skip
    heads = ("", "version", "CPU, plain loop = 1", "CPU s a round", "wall s", "peak MB")
    picture = svg(bars, "CPU time of a round; the plain loop is 1; thin lines are quartiles")
    return f"{picture}\n\n" + table(heads, rows, ":--,:--,--:,--:,--:,--:")


def svg(bars: Sequence[tuple[str, float, tuple[float, ...]]], title: str) -> str:
    """Horizontal bars in the colours of the page, smallest first: names, values, quartiles."""
    wide, step = 420, 34
    scale = (wide - 40) / max(value for _, value, _ in bars)
    lines = []
    for row, (name, value, (low, high)) in enumerate(sorted(bars, key=lambda bar: bar[1])):
        top = row * step
        ours = ' class="ours"' if name == "fedkeel" else ""
        lines += [
            f'<text x="0" y="{top + 12}">{escape(name)}</text>',
            f'<rect{ours} x="0" y="{top + 16}" width="{value * scale:.1f}" height="12"/>',
            f'<line x1="{low * scale:.1f}" x2="{high * scale:.1f}" y1="{top + 22}" y2="{top + 22}"/>',
            f'<text x="{max(value, high) * scale + 5:.1f}" y="{top + 27}">{value:.2f}</text>',
        ]
    box = f'viewBox="0 0 {wide} {len(bars) * step}"'
    return f'<svg class="bars" role="img" aria-label="{escape(title)}" {box}>{"".join(lines)}</svg>\n\n*{title}.*'


def plain(figures: Figures) -> str:
    """fedkeel beside a loop without a library."""
    works = {
        "W1": "small CNN, 28x28, 5 epochs of 100 samples",
        "W0": "small CNN, 28x28, one step of 20 samples",
        "W2": "ResNet-18, 32x32, 10 steps of 64 samples",
    }
    rows = []
    for work, said in works.items():
        ratio, each = figures[f"{work}_float32"], figures[work]
        rows.append((said, *(f"{each[one]['cpu_s']:.3g}" for one in ("bare", "limit", "fedkeel")), _ratio(ratio)))
    heads = ("a client's work", "plain loop, CPU s", "best loop we know", "fedkeel", "fedkeel / plain")
    return table(heads, rows, ":--,--:,--:,--:,--:")


def scale(figures: Figures) -> str:
    """What holds for many clients, two workers, and the start."""
    said = {
        "round_100k_over_100": "time of a round with 100,000 registered clients, 50 of them drawn, by that with 100",
        "memory_100k_over_100": "memory, the same",
        "two_workers_wall": 'wall time of two workers (`runtime = "pool"`), by that of one',
        "two_workers_cpu": "CPU time, the same",
        "loop_overhead": "CPU time of fedkeel, by that of the best loop we know",
    }
    rows = [(text, _ratio(figures[key])) for key, text in said.items()]
    rows += [("seconds to import fedkeel, beyond PyTorch", _ratio(figures["import_s"]))]
    rows += [("seconds of `fedkeel --help`", _ratio(figures["help_s"]))]
    return table(("", "measured"), rows, ":--,--:")


def costs(figures: Figures) -> str:
    """A step of each method, relative to FedAvg's."""
    found = {name: each for name, each in figures["methods"].items() if each["cpu"]["value"] is not None}
    rows = []
    for name, each in sorted(found.items(), key=lambda item: item[1]["cpu"]["value"]):
        asked = " ".join(f"`{option}`" for option in each["options"])
        passes = (f"{each.get(key, 1.0):.3g}" for key in ("forward", "backward"))
        rows.append((f"[`{name}`](methods/{name}.md)", f"{each['cpu']['value']:.2f}", *passes, asked))
    heads = ("method", "CPU of a step", "images forward", "images back", "with")
    return table(heads, rows, ":--,--:,--:,--:,:--")


def generation(figures: Figures) -> str:
    """Synthetic images a second."""
    rows = []
    for name, each in figures["generation"].items():
        generator, size = name.split()
        rows.append((f"`{generator}`", size, f"{each['per_core_s']:,.0f}"))
    return table(("generator", "pixels", "images a second, one core"), rows, ":--,:--,--:")


def machine(figures: Figures) -> str:
    """What it was measured on."""
    found = figures["hardware"]
    measured = {(each["commit"][:10], each["changed"]) for each in (found, *figures["measured"].values())}
    commits = ", ".join(f"`{commit}`" + " with changes" * changed for commit, changed in sorted(measured))
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB, Python {found['python']}, "
        f"PyTorch {found['torch']}; fedkeel at commits {commits}. "
        "Figures of other machines will differ; ratios less so."
    )


def _ratio(found: Figures) -> str:
    spread = found.get("spread")
    return f"{found['value']:.2f}" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")


def public(_: Figures) -> str:
    """What `import fedkeel` offers, by its docstrings; of classes their public functions too."""
    text = []
    for name in fedkeel.__all__:
        thing = getattr(fedkeel, name)
        if name.startswith("_"):
            continue
        if inspect.isfunction(thing):
            text += [f"### {name}", f"```python\n{_signed(name, thing)}\n```", *_said(thing)]
            continue
        text += [f"### {name}", *_said(thing)]
        own = [] if issubclass(thing, Algorithm) else vars(thing).items()
        for part, member in own:
            if inspect.isfunction(member) and not part.startswith("_") and member.__doc__:
                text += [f"`{_signed(f'{name}.{part}', member)}`: {' '.join(_said(member))}"]
    return "\n\n".join(text)


def _signed(name: str, function: Any) -> str:
    """A function as it is called."""
    found = inspect.signature(function)
    shown = [
        each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values() if each.name != "self"
    ]
    return f"{name}{found.replace(parameters=shown, return_annotation=inspect.Signature.empty)}"


def _said(thing: Any) -> list[str]:
    """A docstring's paragraphs as Markdown of a page of docs/."""
    paragraphs = inspect.cleandoc(thing.__doc__ or "").split("\n\n")
    return [prose(" ".join(each.split()), up="") for each in paragraphs]


FIGURES = {
    "public": public,
    "peers": peers,
    "plain": plain,
    "scale": scale,
    "methods": costs,
    "generation": generation,
    "machine": machine,
}
"""What a page can ask for."""
