"""docs/evidence.md: the claims of the two papers, one by one, against the cells that were run here; their tables and
figures in docs/evidence-tables.md.

python benchmarks/evidence          reads benchmarks/results/reproduce, writes both pages and their pictures
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from functools import cache
from statistics import fmean
from typing import Any

from claims import CLAIMS, SHORT
from drawn import PICTURE, draw, draw_figures, figures, image, there
from judged import CELLS, COUNTED, END, ERRORS, POINTS, PROFILE, ROOT, Claim, outcomes

from fedkeel.reproduce.pictures import ALT
from fedkeel.reproduce.shown import LEGEND, facts, matrix, show
from fedkeel.reproduce.tables import experiment, names, protocols

REPLACED, FLOWS = 2.5, 2.5
"""CPU hours: of cells in the history of this repository that others have replaced, and of training the two flows."""

PAGE = ROOT / "docs/evidence.md"
TABLES = ROOT / "docs/evidence-tables.md"
PARTS = {
    "FBL": (
        "FBL's claims",
        "arXiv 2601.14042; the figures are those of CIFAR-10 where no other data are named. Tiny-ImageNet is ten of "
        "its classes here, of food: the same that stand in for ImageFruit in ReGL's tables.",
    ),
    "ReGL": (
        "ReGL's claims",
        "arXiv 2409.14063; ten food classes of Tiny-ImageNet stand in for ImageFruit. "
        "For a given seed both data sets are split identically, count for count, so they are no independent draws.",
    ),
    "both": ("What both stand on", "The generator."),
    "ours": ("Controls of our own", "Not in the papers: what else could explain a gain."),
}


def page() -> str:
    """The claims and their verdicts."""
    numbered = list(enumerate(CLAIMS, 1))
    counts = Counter(claim.outcome() for claim in CLAIMS)
    parts = sum(bool(part.values()) for claim in CLAIMS for part in claim.parts)
    lines = [
        "# Evidence",
        "",
        "The claims of the two papers, one by one, and controls of our own, against what was run here: the papers' "
        "clients, partitions and methods with a small CNN, few rounds, and generators of this project in place of "
        f"Stable Diffusion (the profile `{PROFILE}`, [reproducing](reproducing.md)). So the *order* of methods can be "
        f"compared with the papers', the numbers cannot. The cells that stand here took **{cpu_hours():.1f}** CPU "
        "hours. No claim is tuned into holding. The [tables and figures](evidence-tables.md) have a page of their own.",
        "",
        "## In short",
        "",
        *(f"- {text}" for text in SHORT),
        "",
        *picture(),
        "## How to read this",
        "",
        "**Differences.** A claim is made of differences between cells, in points, each taken seed by seed (**mean**, "
        "then each seed). *The best of* some methods is the one with the best mean over seeds; where that is another "
        "one at the end or in print, it is named there. A run that diverged counts as chance. Beside each difference "
        "stands what the paper's numbers give (*printed*), and the same *at the end* of the runs: the mean of their "
        f"last {END} measurements in place of ten, as many runs still rise, baselines more than methods that balance. "
        "Personal models count by their best round on test images, as the paper's do ([R-11](reading-the-papers.md)); "
        "at the end, by the last ones. What figures show (Figs. 4a, 4, 6 and 7) is measured for one client a seed, in "
        "their pictures' features, and given in hundredths, as each line says.",
        "",
        "**Verdicts.** A difference is *seen* when all seeds agree in its sign and their mean is at least "
        f"{POINTS:g} point and more than {ERRORS:g} standard errors from zero. A claim",
        "",
        "- **holds** when all of its differences are seen;",
        "- **holds in part** when some are;",
        "- **does not hold** when one is seen the other way round and none as claimed;",
        "- otherwise there is **no clear difference**.",
        "",
        "*As far as it was run* says that a difference or one of three seeds is missing. Bounds such as *to be above* "
        f"are ours; such a difference need not be a whole point above its bound, only more than {ERRORS:g} standard "
        "errors.",
        "",
        f"**Chance.** Where there is no difference at all, the mean of two seeds is still more than {ERRORS:g} "
        f"standard errors from zero in 30% of all cases, that of three seeds in 18%, and {parts} measured differences "
        "stand below. A claim of several differences holds only when all are seen, and fails with one. So a verdict "
        "is worth what its figures are: read them.",
        "",
        "**Rates.** Learning rates were chosen on validation images of one seed, one degree of skew and one data set, "
        "CIFAR-10 for FBL's tables and the food classes for ReGL's, then used in all of them: the same three for "
        "every method, and further ones where the best lay on the edge, by the mean over the last ten rounds, though "
        "the table of personal models shows the best round (`fbl-rates` and `regl-rates`, "
        "[tables](evidence-tables.md)). FedGen's edge was noticed after its first test cells were there, and that the "
        "centralised model had FedAvg's rate, not its own. SCAFFOLD's rates are too high for EuroSAT, where some of "
        "its runs diverge and others swing. All rates were chosen with two local epochs and serve for other numbers "
        "of them too, which may cost controls with as many steps as ReGL something; the rate of personal tuning, "
        "0.01, was not chosen on anything. The controls were added as questions came up. CIFAR-10's test images had "
        "been used before, for the [card of the generators](generator-card.md) and the "
        "[comparisons](generators-compared.md).",
        "",
        "**Weights.** FBL, SCAFFOLD, FedDyn, DynaFed and FedRep average their clients uniformly, as their papers do, "
        "the others by samples. Under strong skew, where some clients are tiny, that alone moves a method by points; "
        "Table I of FBL has controls at α = 0.1 ([claim](#claim-weights)), the other tables have none.",
        "",
        f"**Machines.** Two CPU cores. {repeated()} Cells that were replaced since took {REPLACED} CPU hours more, "
        f"training the two flows {FLOWS} ([card](generator-card.md)): about {cpu_hours() + REPLACED + FLOWS:.0f} in "
        "all, without runs that failed and the drawing of figures. Every cell is a JSON file in "
        "`benchmarks/results/reproduce`. Codes such as R-11 and F-21 are those of [how we read the "
        "papers](reading-the-papers.md).",
        "",
        "## Verdicts",
        "",
        "| verdict | claims |",
        "|---|---:|",
        *(f"| {word} | {count} |" for word, count in sorted(counts.items())),
        "",
        "Differences are means over seeds, in points or as the claim says; of more than three the lowest and the "
        "highest.",
        "",
        "| | claim | whose | differences | verdict |",
        "|---:|---|---|---|---|",
        *(
            f"| [{at}](#claim-{c.key or at}) | {c.text} | {c.paper} | {c.differences()} | {c.verdict()} |"
            for at, c in numbered
        ),
        "",
    ]
    for paper, (title, about) in PARTS.items():
        lines += [f"## {title}", "", about, ""]
        for at, claim in numbered:
            if claim.paper == paper:
                lines += section(at, claim)
    return "\n".join([*lines, *counted()]).rstrip() + "\n"


def tables_page() -> str:
    """What the claims are judged by."""
    lines = [
        "# Tables and figures",
        "",
        f"Ours beside the printed ones, of the profile `{PROFILE}` ([reproducing](reproducing.md)); what they come to "
        "is [Evidence](evidence.md).",
        "",
        "## Tables",
        "",
        f"{LEGEND} In italics: as printed. In brackets: seeds done, of how many.",
        "",
        *departures(),
    ]
    for name in names():
        lines += table(name)
    lines += pictures()
    return "\n".join(lines).rstrip() + "\n"


def picture() -> list[str]:
    """Methods and controls of FBL's Table I; nothing before its methods were run."""
    if not there():
        return []
    shown = f"![Accuracy of every method and control on CIFAR-10]({PICTURE.relative_to(PAGE.parent)})"
    what = "*A dot a seed, a line their mean: baselines, methods that balance, controls. The numbers are in the first"
    place = f"evidence-tables.md#fbl-t1-{slug(experiment('fbl-t1').title)}"
    pool = "FBL (25%), FBL (50%) and FBL's controls draw from one pool of synthetic images unless they say otherwise."
    return [shown, "", f"{what} columns of [fbl-t1]({place}). {pool}*", ""]


def slug(title: str) -> str:
    """Of a heading, as the site makes anchors of them."""
    return "-".join(re.findall(r"\w+", title.lower()))


def section(at: int, claim: Claim) -> list[str]:
    """A claim with its figures. The heading's anchor is ours, so that a verdict may change and links stay."""
    anchor = f'<a id="claim-{claim.key or at}"></a>'
    lines = [f"### {anchor}{at}. {claim.text}", "", f"**{claim.verdict()}**. Printed: {claim.printed}.", ""]
    lines += [f"- {part.words()}" for part in claim.parts] + [""] * bool(claim.parts)
    if claim.verdict("end") not in (claim.verdict(), "not run yet"):
        lines += [f"At the end of the runs: **{claim.verdict('end')}**.", ""]
    lines += [text, ""] if (text := claim.untestable or claim.note) else []
    commands = ", ".join(f"`{command}`" for command in claim.commands())
    return [*lines, *([f"Run by {commands}", ""] if commands else [])]


def counted() -> list[str]:
    """What notes say of partitions."""
    found = json.loads(COUNTED.read_text())
    title = experiment("fbl-t1")
    lines = [
        '## <a id="counted"></a>Counted',
        "",
        "From the partitions, of three seeds: the share of the clients' real images that FBL keeps, the share of what "
        "they train on that is synthetic, and the images a class in the pool that they draw from, as many as any of "
        "them needs at most. With `FBL (50%)` half of the clients are unconstrained.",
        "",
        "| | | real images kept | synthetic | images a class in the pool |",
        "|---|---|---:|---:|---:|",
    ]
    for column, rows in found["fbl-t1"].items():
        for row, seeds in rows.items():
            kept, synthetic, pool = (fmean(each[name] for each in seeds) for name in ("kept", "synthetic", "pool"))
            names = f"{title.columns[column].label} | {title.rows[row].label}"
            lines.append(f"| {names} | {kept:.0%} | {synthetic:.0%} | {pool:.0f} |")
    often = found["regl-t4"]["majority"]
    said = ", ".join(f"{experiment('regl-t4').columns[key].label} {value:.0%}" for key, value in often.items())
    lines += [
        "",
        f"A client's most frequent class, always named, is right (mean of {found['regl-t4']['draws']} draws):",
    ]
    return [*lines, f"{said}.", "", "Counted by `python benchmarks/evidence/counted.py --data FOLDER`"]


def departures() -> list[str]:
    """What holds for all tables of a paper."""
    lines = []
    for paper, family in (("FBL", "fbl"), ("ReGL", "regl")):
        lines += [f"Where all of {paper}'s tables depart from the paper:", ""]
        protocol = protocols()[family][PROFILE]
        lines += [*(f"- {text}" for text in (*protocol.training, *protocol.departures)), ""]
    return lines


def table(name: str) -> list[str]:
    """A table of the papers with our numbers; nothing where no cell of it was run."""
    found = list(outcomes(name).values())
    if not any(each.state == "done" for each in found):
        return []
    shown = show(experiment(name), PROFILE, found)
    made = "; ".join(
        f"{what}: {text}" for what, text in facts(shown) if what in ("Cells", "Spent", "Generator", "Hardware", "Run")
    )
    order = [
        f"{column.label} {a} of {b}" for column in shown.columns for a, b in [shown.order.get(column.key, (0, 0))] if b
    ]
    lines = [f"### {name}: {shown.title}", "", f"{shown.paper}. {made}.", "", *matrix(shown), ""]
    lines += [f"- {each.where}: {each.text}" for each in shown.reasons if each.where]
    lines += [f"- {text}" for text in shown.notes]
    lines += [f"- [{letter}] {text}" for letter, text in shown.footnotes.items()]
    lines += [f"- {text}" for text in shown.absent]
    lines += [f"- stale: {text}" for text in shown.stale]
    lines += [f"- failed: {text}" for text in shown.failed]
    lines += [f"- pairs of methods in the paper's order (half of them by chance): {'; '.join(order)}"] if order else []
    return [*lines, "", f"`fedkeel reproduce {name} --dir benchmarks/results/reproduce --show`", ""]


def pictures() -> list[str]:
    """The papers' figures, as `fedkeel reproduce` draws them."""
    lines = [
        "## Figures",
        "",
        "Charts are of all seeds, the others of seed 1, by `benchmarks/evidence/measured.py`.",
        "",
    ]
    for each in figures():
        file = image(each.table, each.picture.name).relative_to(PAGE.parent)
        lines += [f"### {each.table}: {each.title}", "", f"![{ALT[each.picture.kind]}]({file})", ""]
        lines += [f"*{each.caption}*", ""]
    return lines


@cache
def own() -> list[dict[str, Any]]:
    """Every cell that was run for itself, under whatever table."""
    found = [json.loads(path.read_text()) for path in sorted((CELLS / PROFILE).glob("*/*--*--seed*.json"))]
    return [each for each in found if "same_as" not in each]


def cpu_hours() -> float:
    """Of all of them."""
    return float(sum(each["cpu_seconds"] for each in own()) / 3600)


def repeated() -> str:
    """How far runs of one configuration on different processors came apart."""
    runs: dict[str, dict[str, float]] = {}
    for each in own():
        if (value := each["headline"].get("global/accuracy")) is not None:  # personal methods have no global model
            runs.setdefault(each["key"], {})[each["hardware"]["processor"]] = value
    apart = [100 * (max(each.values()) - min(each.values())) for each in runs.values() if len(each) > 1]
    if not apart:
        return "All runs were made on one kind of processor."
    return (
        "The runs were made on more than one kind of processor, whose sums differ in the last bits, which training "
        f"makes large: {len(apart)} configurations that were run on two of them came {fmean(apart):.1f} points apart "
        f"on average and {max(apart):.1f} at most. So seed by seed is closest where a table names one processor."
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw()
    draw_figures()
    PAGE.write_text(page())
    TABLES.write_text(tables_page())


if __name__ == "__main__":
    main()
