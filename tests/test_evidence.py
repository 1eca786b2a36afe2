"""docs/evidence.md: verdicts by hand, and a page that says what the cells say."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, modules_of

EVIDENCE = BENCHMARKS / "evidence"

Numbers = dict[tuple[str, str], dict[int, float]]
"""By row and column: what a method reached, by seed."""


@pytest.fixture(scope="module")
def judged() -> Iterator[ModuleType]:
    """benchmarks/evidence/judged.py."""
    with modules_of(EVIDENCE, "judged", "claims", "drawn", "measured") as found:
        yield found["judged"]


@pytest.fixture
def numbers(judged: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Numbers:
    """What methods reached, in whatever table: filled by the test."""
    found: Numbers = {}
    monkeypatch.setattr(judged, "of", lambda table, row, column: found.get((row, column), {}))
    return found


def part(judged: ModuleType, values: dict[int, float], above: float = 0.0) -> Any:
    return judged.Part("a − b", (("fbl-t3", "m2", "c10"), ("fbl-t3", "m1", "c10")), lambda: values, above)


@pytest.mark.parametrize(
    ("values", "above", "verdict"),
    [
        ({}, 0.0, "missing"),
        ({1: 3.0}, 0.0, "missing"),
        ({1: 3.0, 2: 2.0}, 0.0, "seen"),  # mean 2.5, standard error 0.5
        ({1: 3.0, 2: 0.5}, 0.0, "open"),  # mean 1.75, standard error 1.25
        ({1: 0.9, 2: 0.8}, 0.0, "open"),  # less than a point
        ({1: 3.0, 2: -0.1}, 0.0, "open"),
        ({1: 9.0, 2: 9.0, 3: 9.0, 4: -0.1, 5: 9.0}, 0.0, "open"),  # mean 7.2, error 1.8, but one the other way
        ({1: -3.0, 2: -2.5, 3: -2.0}, 0.0, "contradicted"),
        ({1: -0.5, 2: -0.4}, -1.0, "seen"),  # half a point above the bound
        ({1: 15.0, 2: 16.0}, 20.0, "contradicted"),
        ({1: 19.0, 2: 25.0}, 20.0, "open"),
    ],
)
def test_verdict_of_a_difference(judged: ModuleType, values: dict[int, float], above: float, verdict: str) -> None:
    assert part(judged, values, above).verdict() == verdict


SEEN, OPEN, AGAINST = {1: 3.0, 2: 2.0, 3: 2.5}, {1: 1.0, 2: -2.0, 3: 1.0}, {1: -3.0, 2: -2.0, 3: -2.5}
TWO, MISSING = {1: 3.0, 2: 2.0}, {1: 3.0}


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([SEEN, SEEN], "holds"),
        ([SEEN, OPEN], "holds in part (1 of 2)"),
        ([SEEN, AGAINST, SEEN], "holds in part (2 of 3)"),
        ([OPEN, AGAINST], "does not hold"),
        ([OPEN, OPEN], "no clear difference"),
        ([MISSING, {}], "one seed, not judged"),
        ([{}, {}], "not run yet"),
        ([SEEN, MISSING], "holds, as far as it was run"),
        ([SEEN, TWO], "holds, as far as it was run"),
        ([AGAINST, MISSING], "does not hold, as far as it was run"),
    ],
)
def test_verdict_of_a_claim(judged: ModuleType, parts: list[dict[int, float]], verdict: str) -> None:
    assert judged.Claim("FBL", "x", "y", [part(judged, values) for values in parts]).verdict() == verdict


def test_a_claim_that_cannot_be_tested_says_so(judged: ModuleType) -> None:
    claim = judged.Claim("FBL", "x", "y", [part(judged, SEEN)], untestable="no weights")
    assert claim.verdict() == "cannot be tested here"


def test_words_of_a_difference(judged: ModuleType) -> None:
    """Mean of 3 and -1; one seed is shown but not judged."""
    assert part(judged, {2: -1.0, 1: 3.0}).words() == "a − b: **+1.0** (+3.0, −1.0)"
    assert part(judged, {1: 3.0}, -1.0).words() == "a − b: **+3.0** (+3.0, to be above −1.0; one seed, not judged)"
    assert part(judged, {1: -0.04, 2: 0.04}).words() == "a − b: **+0.0** (+0.0, +0.0)"
    assert part(judged, {}).words() == "a − b: not run"


def test_differences_are_taken_seed_by_seed(judged: ModuleType, numbers: Numbers) -> None:
    """Seed 3 has only one of the two; best_of needs every baseline, and takes the best of each seed."""
    numbers |= {
        ("m1", "c10"): {1: 40.0, 2: 44.0},
        ("m2", "c10"): {1: 42.0, 2: 43.0, 3: 90.0},
        ("m3", "c10"): {1: 45.0, 2: 41.0},
    }
    assert judged.gap("fbl-t3", "m2", "m1", "c10").values() == {1: 2.0, 2: -1.0}
    assert judged.best_of("fbl-t3", "m2", ["m1", "m3"], "c10").values() == {1: -3.0, 2: -1.0}
    assert judged.best_of("fbl-t3", "m2", ["m1", "m3", "m4"], "c10").values() == {}
    best = judged.best_of("fbl-t3", "m2", ["m1", "m3"], "c10")
    assert best.label == "M2: loss − the best of 2 baselines, CIFAR-10" and len(best.places) == 3


def test_differences_of_differences(judged: ModuleType, numbers: Numbers) -> None:
    """10 - 4 = 6 and 8 - 7 = 1 in the one column, 9 - 7 = 2 and 9 - 1 = 8 in the other; 150% and 14.3% more."""
    numbers |= {
        ("fbl", "c10-01"): {1: 10.0, 2: 8.0},
        ("fedavg", "c10-01"): {1: 4.0, 2: 7.0},
        ("fbl", "c10-05"): {1: 9.0, 2: 9.0},
        ("fedavg", "c10-05"): {1: 7.0, 2: 1.0},
    }
    one, other = (judged.gap("fbl-t1", "fbl", "fedavg", column) for column in ("c10-01", "c10-05"))
    assert (one - other).values() == {1: 4.0, 2: -7.0}
    assert (0.5 * one - other).values() == {1: 1.0, 2: -7.5}
    assert len((one - other).places) == 4
    assert judged.rise("fbl-t1", "fbl", "c10-05", "c10-01").values() == {1: -1.0, 2: 1.0}
    found = judged.relative(judged.at("fbl-t1", "fbl", "c10-01"), judged.at("fbl-t1", "fedavg", "c10-01"), "gain")
    assert found.values() == pytest.approx({1: 150.0, 2: 100 / 7})


def test_numbers_of_a_figure(judged: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times 100; seed 2 was measured in cells that have changed since, seed 3 had nothing to measure."""
    (picture,) = judged.asked(judged.experiment("fbl-f4a"), "reduced")
    keys = {seed: judged.keys_of("fbl-f4a", judged.replace(picture, seed=seed)) for seed in (1, 3)}
    assert keys[1] != keys[3]
    seeds = {
        "1": {"cells": keys[1], "before": 0.5, "after": 0.375},
        "2": {"cells": ["another"], "before": 0.5, "after": 0.25},
        "3": {"cells": keys[3], "before": 0.5, "after": None},
    }
    monkeypatch.setattr(judged, "measured", lambda table: {"aligned-c10-03": {"caption": "", "seeds": seeds}})
    before, after = (judged.figure("fbl-f4a", "aligned-c10-03", when) for when in ("before", "after"))
    assert (before - after).values() == {1: 12.5}
    claim = judged.Claim("FBL", "x", "y", [(before - after).called("nearer")])
    assert claim.commands() == ["python benchmarks/evidence/measured.py fbl-f4a --data FOLDER"]


@pytest.mark.parametrize(
    ("kind", "found", "numbers"),
    [
        ("aligned", {"distances": {"cat": [0.5, 0.3], "dog": [0.7, 0.2]}}, {"before": 0.6, "after": 0.25}),
        (
            "images",
            {"scores": {"mmd2/vanilla": 0.2, "mmd2/adapted": None}},
            {"mmd2/vanilla": 0.2, "mmd2/adapted": None},
        ),
        (
            "update",
            [{"scores": {"silhouette/held": 0.1 * at, "silhouette/missing": None}} for at in range(4)],
            {"a/held/before": 0.0, "a/held/after": 0.1, "b/held/before": 0.2, "b/held/after": 0.3}
            | {f"{row}/missing/{when}": None for row in "ab" for when in ("before", "after")},
        ),
        (
            "classes",
            [{"mean": {"held": {"before": 0.1, "after": 0.2}}}, {"mean": {"held": {"before": 0.3, "after": 0.4}}}],
            {"a/held/before": 0.1, "a/held/after": 0.2, "b/held/before": 0.3, "b/held/after": 0.4},
        ),
    ],
)
def test_what_a_picture_measured(judged: ModuleType, kind: str, found: Any, numbers: dict[str, float | None]) -> None:
    import measured

    values = measured.numbers(judged.Picture(kind, "", ("a", "b")), found)
    assert values.keys() == numbers.keys()
    for name, value in numbers.items():
        assert values[name] == (value if value is None else pytest.approx(value)), name


def test_a_run_that_diverged_counts_as_chance(judged: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that failed otherwise counts for nothing."""
    (cell,) = judged.cells(judged.experiment("fbl-t3"), "reduced", ["m1"], [], [1])
    done = judged.Outcome(
        cell, {"key": cell.key, "headline": {"global/accuracy": 0.5}, "classes": dict.fromkeys("abcd")}
    )
    lost = judged.Outcome(cell, None, "round 3: client 0: the training loss is nan after 14 steps")
    broken = judged.Outcome(cell, None, "no space left on device")
    found = {("m1", "c10", 1): done, ("m1", "c10", 2): lost, ("m1", "c10", 3): broken}
    monkeypatch.setattr(judged, "outcomes", lambda table: found)
    assert judged.of("fbl-t3", "m1", "c10") == {1: 50.0, 2: 25.0}


def test_commands_run_a_claims_cells(judged: ModuleType) -> None:
    parts = [judged.gap("fbl-t3", "m2", "m1", "c10"), judged.gap("fbl-x1", "fbl", "fbl-none30", "c10-03")]
    assert judged.Claim("FBL", "x", "y", parts).commands() == [
        "fedkeel reproduce fbl-t3 --rows m2,m1 --columns c10 --data FOLDER",
        "fedkeel reproduce fbl-x1 --rows fbl,fbl-none30 --columns c10-03 --data FOLDER",
    ]


def test_every_claim_names_cells_that_there_are(judged: ModuleType) -> None:
    """A part of a wrong row or column stops here, and every claim is judged or says why not."""
    import claims

    assert len(claims.CLAIMS) >= 25
    for claim in claims.CLAIMS:
        assert bool(claim.parts) != bool(claim.untestable), claim.text
        assert len({part.label for part in claim.parts}) == len(claim.parts), claim.text
        for each in claim.parts:
            each.values()


def test_the_page_says_what_the_cells_say(judged: ModuleType) -> None:
    """After new cells: `python benchmarks/evidence`."""
    made = runpy.run_path(str(EVIDENCE / "__main__.py"))
    assert made["PAGE"].read_text() == made["page"]()


def test_every_judged_claim_has_a_sentence(judged: ModuleType) -> None:
    import claims

    judged_ones = [
        each for each in claims.CLAIMS if not each.verdict().endswith(("run yet", "not judged")) and not each.untestable
    ]
    assert [each.text for each in judged_ones if not each.note] == []
