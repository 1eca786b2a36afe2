"""docs/evidence.md: the claims of the two papers, one by one, against the cells that were run here, and their tables.

python benchmarks/evidence          reads benchmarks/results/reproduce, writes docs/evidence.md
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from claims import CLAIMS
from drawn import PICTURE, draw, said
from judged import CELLS, PROFILE, ROOT, Claim, outcomes

from fedkeel.reproduce.shown import LEGEND, facts, matrix, show
from fedkeel.reproduce.tables import experiment, names

PAGE = ROOT / "docs/evidence.md"
PARTS = {
    "FBL": ("FBL's claims", "arXiv 2601.14042; the figures are those of CIFAR-10 where no other data are named."),
    "ReGL": ("ReGL's claims", "arXiv 2409.14063; ImageFruit stands for ten food classes of Tiny-ImageNet here."),
    "both": ("What both stand on", "The generator."),
    "ours": ("Controls of our own", "Not in the papers: what else could explain a gain."),
}


def page() -> str:
    """The whole page."""
    numbered = list(enumerate(CLAIMS, 1))
    counts = Counter(claim.verdict() for claim in CLAIMS)
    lines = [
        "# Evidence",
        "",
        "The claims of the two papers, one by one, and controls of our own, against what was run here. Nothing was "
        "tuned to make a claim hold: rates were chosen on validation images, from the same grid for every method; all "
        "else was fixed before the first test image was looked at.",
        "",
        f"The runs are those of the profile `{PROFILE}` ([reproducing](reproducing.md)): the papers' clients, "
        "partitions and methods with a small CNN, few rounds, and generators of this project in place of Stable "
        "Diffusion, on two CPU cores. So the *order* of methods can be held against the papers, the numbers cannot. "
        f"CPU hours spent on all cells so far: **{cpu_hours():.1f}**. Every cell is a JSON file in "
        "`benchmarks/results/reproduce`; the tables are [below](#tables).",
        "",
        "A claim is made of differences between cells, in points, each taken seed by seed (**mean**, then each seed). "
        "It **holds** when all seeds agree in all of them, **holds in part** when they do in some, **does not hold** "
        "when a difference has the other sign in all seeds and none has the claimed one, and is **open** when seeds "
        "disagree; *as far as it was run* says that a difference or one of three seeds is missing. Two or three seeds "
        "say little about a difference of a point or two; the sentences say where that matters.",
        "",
        *picture(),
        "| verdict | claims |",
        "|---|---:|",
        *(f"| {word} | {count} |" for word, count in sorted(counts.items())),
        "",
        "| | claim | whose | verdict |",
        "|---:|---|---|---|",
        *(f"| [{at}](#claim-{at}) | {c.text} | {c.paper} | {c.verdict()} |" for at, c in numbered),
        "",
    ]
    for paper, (title, about) in PARTS.items():
        lines += [f"## {title}", "", about, ""]
        for at, claim in numbered:
            if claim.paper == paper:
                lines += section(at, claim)
    lines += ["## Tables", "", f"{LEGEND} In italics: as printed. In brackets: seeds done, of how many.", ""]
    for name in names():
        lines += table(name)
    return "\n".join(lines).rstrip() + "\n"


def picture() -> list[str]:
    """Methods and controls of FBL's Table I; nothing before its methods were run."""
    shown = said()
    if not shown:
        return []
    image = f"![Accuracy of every method and control on CIFAR-10]({PICTURE.relative_to(PAGE.parent)})"
    what = "*A dot a seed, a line their mean: baselines, methods that balance, controls"
    return [image, "", f"{what}. {'. '.join(shown)}.*", ""]


def section(at: int, claim: Claim) -> list[str]:
    """A claim with its figures. The heading's anchor is ours, so that a verdict may change and links stay."""
    lines = [
        f'### <a id="claim-{at}"></a>{at}. {claim.text}',
        "",
        f"**{claim.verdict()}**. Printed: {claim.printed}.",
        "",
    ]
    lines += [f"- {part.words()}" for part in claim.parts]
    lines += [""] * bool(claim.parts)
    lines += [f"{text}", ""] if (text := claim.untestable or claim.note) else []
    commands = ", ".join(f"`{command}`" for command in claim.commands())
    return [*lines, *([f"Run by {commands}", ""] if commands else [])]


def table(name: str) -> list[str]:
    """A table of the papers with our numbers; nothing where no cell of it was run."""
    found = list(outcomes(name).values())
    if not any(each.state == "done" for each in found):
        return []
    shown = show(experiment(name), PROFILE, found)
    made = "; ".join(f"{what}: {text}" for what, text in facts(shown) if what in ("Cells", "Spent", "Generator", "Run"))
    order = [
        f"{column.label} {a} of {b}"
        for column in shown.columns
        if (pairs := shown.order.get(column.key))
        for a, b in [pairs]
    ]
    lines = [f"### {name}: {shown.title}", "", f"{shown.paper}. {made}.", "", *matrix(shown), ""]
    lines += [f"[{letter}] {text}  " for letter, text in shown.footnotes.items()] + [""] * bool(shown.footnotes)
    lines += [f"Pairs of methods in the paper's order: {'; '.join(order)}.", ""] if order else []
    return [
        *lines,
        f"With departures and notes: `fedkeel reproduce {name} --dir benchmarks/results/reproduce --show`",
        "",
    ]


def cpu_hours() -> float:
    """Of every cell that was run for itself, under whatever table."""
    found = [json.loads(path.read_text()) for path in sorted((CELLS / PROFILE).glob("*/*--*--seed*.json"))]
    return float(sum(each["cpu_seconds"] for each in found if "same_as" not in each) / 3600)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
