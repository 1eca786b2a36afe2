"""docs/evidence.md: verdicts by hand, and a page that says what the cells say."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, modules_of

from fedkeel.errors import FedkeelError

EVIDENCE = BENCHMARKS / "evidence"
WHEN = ("before", "after")

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
    monkeypatch.setattr(
        judged, "of", lambda table, row, column, way: {} if way == "printed" else found.get((row, column), {})
    )
    return found


def part(judged: ModuleType, values: dict[int, float], above: float | None = None, **others: dict[int, float]) -> Any:
    """others: by reading."""
    places = (("fbl-t3", "m2", "c10"), ("fbl-t3", "m1", "c10"))
    return judged.Part("a − b", places, lambda way: {"headline": values, **others}.get(way, {}), above)


@pytest.mark.parametrize(
    ("values", "above", "verdict"),
    [
        ({}, None, "missing"),
        ({1: 3.0}, None, "missing"),
        ({1: 3.0, 2: 2.0}, None, "seen"),  # mean 2.5, standard error 0.5
        ({1: 3.0, 2: 0.5}, None, "open"),  # mean 1.75, standard error 1.25
        ({1: 0.9, 2: 0.8}, None, "open"),  # less than a point
        ({1: 0.9, 2: 0.8}, 0.0, "seen"),  # a bound need not be a point away
        ({1: 3.0, 2: -0.1}, None, "open"),
        ({1: 9.0, 2: 9.0, 3: 9.0, 4: -0.1, 5: 9.0}, None, "open"),  # mean 7.2, error 1.8, but one the other way
        ({1: -3.0, 2: -2.5, 3: -2.0}, None, "contradicted"),
        ({1: -0.5, 2: -0.4}, -1.0, "seen"),  # half a point above the bound
        ({1: 15.0, 2: 16.0}, 20.0, "contradicted"),
        ({1: 19.0, 2: 25.0}, 20.0, "open"),
    ],
)
def test_verdict_of_a_difference(
    judged: ModuleType, values: dict[int, float], above: float | None, verdict: str
) -> None:
    assert part(judged, values, above).verdict() == verdict


SEEN, OPEN, AGAINST = {1: 3.0, 2: 2.0, 3: 2.5}, {1: 1.0, 2: -2.0, 3: 1.0}, {1: -3.0, 2: -2.0, 3: -2.5}
TWO, MISSING = {1: 3.0, 2: 2.0}, {1: 3.0}


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([SEEN, SEEN], "holds"),
        ([SEEN, OPEN], "holds in part (1 of 2)"),
        ([SEEN, AGAINST, SEEN, OPEN], "holds in part (2 of 4, 1 the other way round)"),
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
    assert part(judged, {}, printed={0: 7.0}).words() == "a − b: not run; printed +7.0"
    found = part(judged, {1: 3.0, 2: 2.0}, printed={0: -7.0}, end={1: 1.0, 2: 2.0})
    assert found.words() == "a − b: **+2.5** (+3.0, +2.0); printed −7.0; at the end +1.5"
    best = judged.replace(found, whose=lambda way: "B" if way == "printed" else "A")
    assert best.words() == "a − b, A: **+2.5** (+3.0, +2.0); printed −7.0 (B); at the end +1.5"


def test_differences_of_a_claim_in_short(judged: ModuleType) -> None:
    """Means; of more than three the two ends; nothing of what was not run."""
    parts = [part(judged, {1: 3.0, 2: 2.0}), part(judged, {}), part(judged, {1: -1.0}), part(judged, {1: 0.5})]
    assert judged.Claim("FBL", "x", "y", parts).differences() == "+2.5, −1.0, +0.5"
    assert judged.Claim("FBL", "x", "y", [*parts, part(judged, {1: 9.0})]).differences() == "−1.0 to +9.0"
    assert judged.Claim("FBL", "x", "y", untestable="no weights").differences() == ""


def test_a_claim_may_turn_at_the_end_of_the_runs(judged: ModuleType) -> None:
    claim = judged.Claim("FBL", "x", "y", [part(judged, SEEN, end=AGAINST)])
    assert claim.verdict() == "holds" and claim.verdict("end") == "does not hold"
    figure = judged.Claim("FBL", "x", "y", [part(judged, SEEN)])
    assert figure.verdict("end") == "not run yet", "figures are measured once, after the last round"


def test_differences_are_taken_seed_by_seed(judged: ModuleType, numbers: Numbers) -> None:
    """Seed 3 has only one of the two; best_of needs every baseline, and takes the best by mean: m3, 43 above 42."""
    numbers |= {
        ("m1", "c10"): {1: 40.0, 2: 44.0},
        ("m2", "c10"): {1: 42.0, 2: 43.0, 3: 90.0},
        ("m3", "c10"): {1: 45.0, 2: 41.0, 3: 0.0},
    }
    assert judged.gap("fbl-t3", "m2", "m1", "c10").values() == {1: 2.0, 2: -1.0}
    assert judged.best_of("fbl-t3", "m2", ["m1", "m3"], "c10").values() == {1: -3.0, 2: 2.0, 3: 90.0}
    assert judged.best_of("fbl-t3", "m2", ["m1", "m3", "m4"], "c10").values() == {}
    best = judged.best_of("fbl-t3", "m2", ["m1", "m3"], "c10")
    assert best.label == "M2: loss − the best of 2 baselines, CIFAR-10" and len(best.places) == 3
    assert best.whose("headline") == "M3: loss, alignment"


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
    picture = judged.picture_of("fbl-f4a", "aligned-c10-03")
    ours = {seed: judged.stands_on("fbl-f4a", judged.replace(picture, seed=seed)) for seed in (1, 2, 3)}
    assert ours[1]["cells"] != ours[3]["cells"]
    near = {"distance/synthetic": 0.5, "distance/with offset": 0.375}
    seeds = {
        "1": {**ours[1], "numbers": near},
        "2": {**ours[2], "cells": ["another"], "numbers": near},
        "3": {**ours[3], "numbers": {**near, "distance/with offset": None}},
    }
    monkeypatch.setattr(judged, "measured", lambda table: {"aligned-c10-03": {"caption": "", "seeds": seeds}})
    judged.kept_of.cache_clear()
    before, after = (judged.figure("fbl-f4a", "aligned-c10-03", f"distance/{w}") for w in ("synthetic", "with offset"))
    assert (before - after).values() == {1: 12.5}
    claim = judged.Claim("FBL", "x", "y", [(before - after).called("nearer")])
    assert claim.commands() == ["python benchmarks/evidence/measured.py fbl-f4a --data FOLDER"]
    with pytest.raises(AssertionError, match="has no distance/real"):
        judged.figure("fbl-f4a", "aligned-c10-03", "distance/real")
    judged.kept_of.cache_clear()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("aligned", {"scores": {"distance/synthetic": 0.6, "distance/with offset": 0.25}}),
        ("images", {"scores": {"mmd2/vanilla": 0.2, "mmd2/adapted": None}}),
        ("update", [{"scores": {"silhouette/held": 0.1 * at, "silhouette/missing": None}} for at in range(4)]),
        (
            "classes",
            [
                {"recorded": True, "mean": {"held": {"before": 0.1 * at, "after": 0.2}, "missing": dict.fromkeys(WHEN)}}
                for at in range(2)
            ],
        ),
    ],
)
def test_what_a_picture_measured(judged: ModuleType, kind: str, found: Any) -> None:
    """By the names that claims go by; the pictures' numbers are in the order of rows, before and after."""
    import measured

    picture = judged.Picture(kind, "", ("a", "b"))
    values = measured.numbers(picture, found)
    assert sorted(values) == sorted(judged.names_of(picture))
    if kind == "update":
        held = {f"{row}/held/{when}": 0.1 * at for at, (row, when) in enumerate([(r, w) for r in "ab" for w in WHEN])}
        assert {name: value for name, value in values.items() if value is not None} == pytest.approx(held)
    if kind == "classes":
        assert (values["a/held/before"], values["b/held/before"], values["b/held/after"]) == (0.0, 0.1, 0.2)
        with pytest.raises(FedkeelError, match="measure it first"):
            measured.numbers(picture, [{**each, "recorded": False} for each in found])


def test_figures_are_measured_seed_by_seed(
    judged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured before stays; a picture that cannot be drawn is told, and the others are measured."""
    import measured
    from matplotlib.figure import Figure

    def draw(picture: Any, source: Any) -> Any:
        if picture.seed == 2:
            raise FedkeelError("no such client")
        near = {"distance/synthetic": picture.seed / 10, "distance/with offset": 0.0}
        return Figure(), f"of seed {picture.seed}", {"scores": near}

    monkeypatch.setattr(measured, "reproduce", lambda planned, folder, **_: [])
    monkeypatch.setattr(measured, "DRAW", {"aligned": draw})
    monkeypatch.setattr(measured, "CELLS", tmp_path)
    monkeypatch.setattr(measured, "image", lambda table, name: tmp_path / f"{table}-{name}.png")
    for seeds in ([1, 2], [3]):
        measured.measure("fbl-f4a", tmp_path, tmp_path, seeds, 1)
    assert "seed 2: not measured: no such client" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "reduced/fbl-f4a/measured.json").read_text()).values()
    assert found["caption"] == "of seed 1" and (tmp_path / "fbl-f4a-aligned-c10-03.png").is_file()
    assert {seed: one["numbers"]["distance/synthetic"] for seed, one in found["seeds"].items()} == {"1": 0.1, "3": 0.3}
    monkeypatch.setattr(judged, "measured", lambda table: {"aligned-c10-03": found})
    judged.kept_of.cache_clear()
    assert judged.figure("fbl-f4a", "aligned-c10-03", "distance/synthetic").values() == {1: 10.0, 3: 30.0}
    judged.kept_of.cache_clear()


def test_a_run_that_diverged_counts_as_chance(judged: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that failed otherwise counts for nothing."""
    (cell,) = judged.cells(judged.experiment("fbl-t3"), "reduced", ["m1"], [], [1])
    curve = {"global/accuracy": [0.5] * 20}
    kept = {"key": cell.key, "headline": {"global/accuracy": 0.5}, "rounds": curve, "classes": dict.fromkeys("abcd")}
    done = judged.Outcome(cell, kept)
    lost = judged.Outcome(cell, None, "round 3: client 0: the training loss is nan after 14 steps")
    broken = judged.Outcome(cell, None, "no space left on device")
    found = {("m1", "c10", 1): done, ("m1", "c10", 2): lost, ("m1", "c10", 3): broken}
    monkeypatch.setattr(judged, "outcomes", lambda table: found)
    assert judged.of("fbl-t3", "m1", "c10") == {1: 50.0, 2: 25.0}


@pytest.mark.parametrize(
    ("curve", "headline", "end"),
    [
        ([0.0] * 10 + [0.5] * 7 + [0.6, 0.7, 0.8], 56.0, 70.0),
        ([0.0] * 7 + [0.6, 0.7, 0.8], 21.0, 70.0),  # ten rounds are all there are
        ([0.0, None] * 7 + [0.6, None, 0.7, None, 0.8], 21.0, 70.0),  # likewise, every second round measured
    ],
)
def test_the_end_of_a_run(
    judged: ModuleType, monkeypatch: pytest.MonkeyPatch, curve: list[float | None], headline: float, end: float
) -> None:
    """The mean of the last ten and of the last three measured rounds."""
    (cell,) = judged.cells(judged.experiment("fbl-t3"), "reduced", ["m1"], [], [1])
    tail = [each for each in curve if each is not None][-10:]
    kept = {
        "key": cell.key,
        "headline": {"global/accuracy": sum(tail) / len(tail)},
        "rounds": {"global/accuracy": curve},
    }
    monkeypatch.setattr(judged, "outcomes", lambda table: {("m1", "c10", 1): judged.Outcome(cell, kept)})
    assert judged.of("fbl-t3", "m1", "c10")[1] == pytest.approx(headline)
    assert judged.of("fbl-t3", "m1", "c10", "end")[1] == pytest.approx(end)
    assert judged.of("fbl-t3", "m1", "c10", "printed") == {0: 75.16}


def test_the_end_of_personal_models_is_not_their_best(judged: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best so far looks back over the whole run."""
    (cell,) = judged.cells(judged.experiment("regl-t4"), "reduced", ["fedrep"], ["fruit-001"], [1])
    best, last = "personal/accuracy_best", "personal/accuracy_last"
    curves = {best: [0.25, 0.75, 0.75, 0.75], last: [0.25, 0.75, 0.25, 0.5]}
    kept = {"key": cell.key, "headline": {best: 0.75, last: 0.4375}, "rounds": curves}
    monkeypatch.setattr(judged, "outcomes", lambda table: {("fedrep", "fruit-001", 1): judged.Outcome(cell, kept)})
    assert judged.of("regl-t4", "fedrep", "fruit-001") == {1: 75.0}
    assert judged.of("regl-t4", "fedrep", "fruit-001", "end") == {1: 50.0}


def test_what_the_papers_printed_passes_their_claims(judged: ModuleType) -> None:
    """A claim that the paper's own numbers go against is not the paper's."""
    import claims

    printed = [(claim, part, *part.values("printed").values()) for claim in claims.CLAIMS for part in claim.parts]
    known = [each for each in printed if len(each) == 3]
    assert len(known) > 60
    assert [(c.text, p.label, value) for c, p, value in known if value <= (p.above or 0.0)] == []


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
    assert made["TABLES"].read_text() == made["tables_page"]()


def test_the_page_has_every_departure(judged: ModuleType) -> None:
    from fedkeel.reproduce.tables import protocols

    page = runpy.run_path(str(EVIDENCE / "__main__.py"))["TABLES"].read_text()
    for family in protocols().values():
        assert all(f"- {text}\n" in page for text in (*family["reduced"].training, *family["reduced"].departures))


def test_every_judged_claim_has_a_sentence(judged: ModuleType) -> None:
    import claims

    judged_ones = [
        each for each in claims.CLAIMS if not each.verdict().endswith(("run yet", "not judged")) and not each.untestable
    ]
    assert [each.text for each in judged_ones if not each.note] == []
