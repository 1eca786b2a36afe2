"""The pictures of the papers' tables: the numbers behind them by hand, what they stand on, how they are shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_tables import Files, anew, of_package
from typer.testing import CliRunner

from fedkeel import cli
from fedkeel.errors import ConfigError
from fedkeel.report.embedding import distances
from fedkeel.reproduce import command, shown
from fedkeel.reproduce.asked import KINDS, OF_RUNS, Picture, asked
from fedkeel.reproduce.cells import Outcome, path_of, read, reproduce, run_of
from fedkeel.reproduce.drawings import filling, skewed
from fedkeel.reproduce.pictures import Source, draw
from fedkeel.reproduce.tables import Cell, experiment

BASE = {
    "rounds": 1,
    "clients": 3,
    "participation": 1.0,
    "device": "cpu",
    "data": {"name": "fashion", "train_limit": 90, "test_limit": 40},
    "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 2},
    "model": {"name": "mlp", "hidden": [4]},
    "local": {"epochs": 1, "batch": 16, "lr": 0.05},
    "generator": {"name": "gaussian"},
    "methods": {"regl": {"volume": 5}},
}
TABLE: dict[str, Any] = {
    "title": "Tiny",
    "paper": "Nobody, Figure 1",
    "family": "tiny",
    "columns": {
        "one": {"label": "one", "data": "some", "set": {"methods": {"fbl": {"period": 1}}}},
        "two": {"label": "two", "data": "some", "set": {"methods": {"fbl": {"period": 0}}}},
    },
    "rows": {"fbl": {"label": "FBL & more", "method": "fbl"}},
    "printed": {"fbl": {"one": [40.5, 1.0]}},
    "pictures": [{"kind": "curve", "title": "By period", "axis": "m", "option": "period", "zero": "never"}],
}
RUNS: dict[str, Any] = {
    **TABLE,
    "printed": {},
    "columns": {"one": TABLE["columns"]["one"]},
    "pictures": [{"kind": "classes", "title": "Around an update", "column": "one", "rows": ["fbl"]}],
}
PROFILES: dict[str, Any] = {
    "paper": {"base": "base", "seeds": [1]},
    "reduced": {"base": "base", "seeds": [1, 2]},
    "smoke": {"base": "base", "seeds": [1]},
}
PROTOCOLS = {"families": {"tiny": PROFILES}, "data": {"some": {profile: {} for profile in PROFILES}}}


@pytest.fixture
def files() -> Iterator[Files]:
    """Small tables in place of the package's. A test that changes them calls `anew`."""
    with of_package({"base": BASE, "protocols": PROTOCOLS, "tiny": TABLE}) as found:
        yield found


def made(cell: Cell, accuracy: float) -> Outcome:
    """A cell as if it had come to this."""
    found = {
        "key": cell.key,
        "headline": {"global/accuracy": accuracy},
        "failed": 0,
        "departures": [],
        "generator": None,
        "data": {"name": "tiny", "fingerprint": "of the images"},
        "versions": {},
        "commit": "",
        "hardware": {"processor": "A processor", "gpu": None},
        "cpu_seconds": 1.0,
        "seconds": 1.0,
        "started": "2026-01-02T03:04:05+00:00",
    }
    return Outcome(cell, found)


def source(folder: Path, values: Mapping[str, tuple[float | None, ...]], profile: str = "reduced") -> Source:
    """The table, where each column has these accuracies by seed."""
    outcomes = []
    for cell in command.plan(["tiny"], profile):
        value = values[cell.column.key][cell.seed - 1]
        outcomes.append(Outcome(cell, None) if value is None else made(cell, value))
    found = experiment("tiny")
    return Source(found, shown.show(found, profile, outcomes), outcomes, folder)


def there(folder: Path, table: str = "tiny", profile: str = "smoke") -> Source:
    """The table as it stands in a folder."""
    outcomes = [read(cell, folder) for cell in command.plan([table], profile)]
    return Source(experiment(table), shown.show(experiment(table), profile, outcomes), outcomes, folder)


def numbers(folder: Path, name: str, profile: str = "reduced") -> dict[str, Any]:
    """What stands beside a picture."""
    found: dict[str, Any] = json.loads((folder / profile / "tiny" / f"{name}.json").read_text())
    return found


def fedkeel_(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in ("reproduce", *words)], prog_name="fedkeel")


# numbers by hand ------------------------------------------------------------------------------------------------------


def test_a_curve_has_means_deviations_and_printed_values(files: Files, tmp_path: Path) -> None:
    """50 and 52: mean 51, deviation sqrt(((50 - 51)^2 + (52 - 51)^2) / 1) = sqrt(2). 30 alone has none."""
    (drawn,) = draw(source(tmp_path, {"one": (0.5, 0.52), "two": (0.3, None)}))
    (line,) = numbers(tmp_path, "curve")["numbers"]["lines"].items()
    first, second = line[1]
    assert line[0] == "FBL & more"
    assert (first["at"], second["at"]) == ("1", "never"), "the option's value, and the word for 0"
    assert first["mean"] == pytest.approx(51) and first["std"] == pytest.approx(2**0.5)
    assert first["seeds"] == {"1": 50, "2": 52} and first["printed"] == 40.5
    assert (second["mean"], second["std"], second["printed"]) == (30, None, None)
    assert drawn.caption == "FBL & more: 51.00 ± 1.41 at 1 (printed 40.5), 30.00 at never."
    with Image.open(tmp_path / "reduced/tiny" / drawn.file) as image:
        assert image.format == "PNG" and 700 <= image.width <= 1800


def test_lines_and_bars(files: Files, tmp_path: Path) -> None:
    """Lines take the columns that the profile has; a bar of a missing cell is said to be missing."""
    lines = {"A": ["one"], "B": ["two"], "C": ["elsewhere"]}
    files["tiny"] = {
        **TABLE,
        "pictures": [{**TABLE["pictures"][0], "lines": lines}, {"kind": "bars", "title": "Side by side"}],
    }
    curve, bars = draw(source(tmp_path, {"one": (0.5, 0.52), "two": (None, None)}))
    assert curve.caption == "A: 51.00 ± 1.41 at 1 (printed 40.5)."
    assert bars.caption == "FBL & more: 51.00 ± 1.41 at one (printed 40.5), missing at two."
    assert [each["mean"] for each in numbers(tmp_path, "bars")["numbers"]["bars"]["FBL & more"]] == [51, None]
    row = next(iter(TABLE["printed"]))
    files["tiny"] = {**files["tiny"], "printed": {row: {**TABLE["printed"][row], "one": [77.5]}}}
    anew()
    _, bars = draw(source(tmp_path, {"one": (0.5, 0.52), "two": (None, None)}))
    assert "(printed 77.5)" in bars.caption, "what is printed beside ours has changed"


def test_the_distance_of_class_means_by_hand() -> None:
    """Class 0: real mean (1, 0), synthetic (4, 4): apart 5; with its offset (-3, 0) synthetic (1, 4): apart 4. Class 1:
    (0, 2) both: 0, and 1 with (0, 1). Lengths of real ones 0, 2, 2, 2: root mean square sqrt(3). Class 2 has no real
    one."""
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    fake = torch.tensor([[3.0, 4.0], [5.0, 4.0], [0.0, 2.0], [9.0, 9.0]])
    shift = torch.tensor([[-3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = distances(real, torch.tensor([0, 0, 1, 1]), fake, torch.tensor([0, 0, 1, 2]), shift)
    assert found == {
        0: (pytest.approx(5 / 3**0.5), pytest.approx(4 / 3**0.5)),
        1: (pytest.approx(0), pytest.approx(1 / 3**0.5)),
    }


def test_which_client_is_shown() -> None:
    """The largest of those that miss a class, of all where none does; the one with most pairs of real and filled."""
    assert skewed(torch.tensor([[9, 9], [0, 5], [7, 0]])) == 2
    assert skewed(torch.tensor([[4, 4], [5, 5]])) == 1
    assert filling(torch.tensor([[9, 0], [3, 2]]), torch.tensor([[0, 9], [5, 5]])) == 1


def test_figures_of_a_partition_need_no_run(files: Files, tmp_path: Path) -> None:
    """And what was drawn is not drawn again, unless it is of another configuration."""
    both = {"columns": ["one"], "rows": ["fbl"]}
    kinds = ({"kind": "partition", "title": "Who"}, {"kind": "histogram", "title": "One"})
    files["tiny"] = {**TABLE, "runs": False, "printed": {}, "pictures": [{**kind, **both} for kind in kinds]}
    anew()
    words = ("tiny", "--profile", "smoke", "--dir", tmp_path)
    result = fedkeel_(*words)
    assert result.exit_code == 0, result.output
    assert "Who: one: 3 clients hold 90 samples; " in result.stdout and "Bold: " not in result.stdout
    folder = tmp_path / "smoke/tiny"
    assert not (folder / "runs").exists()
    counts = torch.tensor(numbers(tmp_path, "partition-one", "smoke")["numbers"]["counts"])
    assert counts.shape == (3, 10) and counts.sum() == 90
    found = numbers(tmp_path, "histogram-one", "smoke")["numbers"]
    assert found["client"] == skewed(counts) and found["before"] == counts[skewed(counts)].tolist()
    point = sum(found["before"]) // 10  # FBL: every class at the mean of all
    assert [a + b for a, b in zip(found["real"], found["synthetic"], strict=True)] == [point] * 10
    page = (folder / "table.html").read_text()
    assert page.count('<img alt="') == 2 and "<table" not in page
    (entry,) = json.loads(fedkeel_("--json", "--dir", tmp_path).stdout)
    assert entry["cells"]["smoke"] == {"cells": 0, "done": 0}
    path = folder / "partition-one.png"
    before = path.stat().st_mtime_ns
    assert fedkeel_(*words, "--show").exit_code == 0 and path.stat().st_mtime_ns == before
    other = {"label": "one", "data": "some", "set": {"partition": {"alpha": 5.0}}}
    files["tiny"] = {**files["tiny"], "columns": {"one": other}, "pictures": files["tiny"]["pictures"][:1]}
    anew()
    assert fedkeel_(*words, "--show").exit_code == 0 and path.stat().st_mtime_ns > before


# what is missing ------------------------------------------------------------------------------------------------------


def test_a_picture_without_its_run_names_the_command(files: Files, tmp_path: Path) -> None:
    """Missing, stale, and gone though the cell is done; the command makes it, and the picture is there."""
    files["tiny"] = RUNS
    (drawn,) = draw(there(tmp_path))
    words = f"tiny --profile smoke --rows fbl --columns one --seeds 1 --dir {tmp_path}"
    assert drawn.missing == f"it needs the runs of fbl (missing): fedkeel reproduce {words}" and not drawn.file
    result = fedkeel_(*words.split())
    assert result.exit_code == 0, result.output
    assert re.search(r"Around an update: one: Mean accuracy .*\(classes-one\.png\)", result.stdout)
    found = there(tmp_path)
    (cell,) = command.plan(["tiny"], "smoke")
    changed = replace(found.outcomes[0], found={**(found.outcomes[0].found or {}), "key": "other"})
    (stale,) = draw(replace(found, outcomes=[changed]))
    assert stale.missing.startswith("it needs the runs of fbl (stale): ")
    (tmp_path / "smoke/tiny/classes-one.png").unlink()
    shutil.rmtree(run_of(cell, tmp_path))
    (gone,) = draw(found)
    expected = f"is gone: remove {path_of(cell, tmp_path)}; to make it: fedkeel reproduce {words}"
    assert gone.missing.endswith(expected)
    page = shown.as_html(replace(found.whole, pictures=(gone,)))
    assert "Not drawn: " in page and "<img" not in page
    assert "<small>printed" not in page and "  printed" not in result.stdout, "the paper has no number of it"


def test_nothing_of_the_table_is_done(files: Files, tmp_path: Path) -> None:
    (drawn,) = draw(source(tmp_path, {"one": (None, None), "two": (None, None)}))
    assert "none of its cells is done: fedkeel reproduce tiny --profile reduced --data FOLDER --dir" in drawn.missing


def test_a_run_that_kept_all_serves_other_pictures(files: Files, tmp_path: Path) -> None:
    files["tiny"] = RUNS
    files["tiny-2"] = {**RUNS, "rows": {"else": RUNS["rows"]["fbl"]}}
    files["tiny-2"]["pictures"] = [{**RUNS["pictures"][0], "rows": ["else"]}]
    for name in ("tiny", "tiny-2"):
        reproduce(command.plan([name], "smoke"), tmp_path)
    (first,), (second,) = (command.plan([name], "smoke") for name in ("tiny", "tiny-2"))
    assert run_of(second, tmp_path) == run_of(first, tmp_path)
    assert (run_of(first, tmp_path) / "checkpoint").is_dir()


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kind": "curv"}, ["pictures.kind = 'curv'", "Did you mean 'curve'?"]),
        ({"kind": "update", "column": "on", "rows": ["fbl"]}, ["pictures.column = 'on'", "one, two"]),
        ({"kind": "update", "column": "one", "rows": ["fb"]}, ["pictures.rows = 'fb'", "fbl"]),
        ({"kind": "curve", "opton": "period"}, ["opton", "option"]),
    ],
)
def test_a_mistake_in_an_experiment_file(files: Files, entry: dict[str, Any], named: list[str]) -> None:
    files["tiny"] = {**TABLE, "pictures": [{"title": "T", **entry}]}
    with pytest.raises(ConfigError) as caught:
        asked(experiment("tiny"), "smoke")
    for part in named:
        assert part in str(caught.value)


# how they are shown ---------------------------------------------------------------------------------------------------


def test_the_page_has_its_pictures_inside(files: Files, tmp_path: Path) -> None:
    found = source(tmp_path, {"one": (0.5, 0.52), "two": (0.3, None)})
    table = replace(found.whole, pictures=draw(found))
    page = shown.as_html(table)
    assert not re.search(r"(src|href)=\"(?!data:)", page) and page.count('src="data:image/png;base64,') == 1
    assert 'alt="Line chart of accuracy' in page
    assert "<figcaption>FBL &amp; more: 51.00 ± 1.41 at 1 (printed 40.5), 30.00 at never.</figcaption>" in page
    text = shown.as_markdown(table)
    assert re.search(r"## By period\n\n!\[Line chart .*\]\(curve\.png\)\n\nFBL & more: 51\.00", text)
    (value,) = shown.as_json(table)["pictures"]  # type: ignore[misc]
    assert value["file"] == "curve.png" and "png" not in value
    json.dumps(shown.as_json(table))


# the package's own ----------------------------------------------------------------------------------------------------

FIGURES = ("fbl-f4a", "fbl-f4b", "fbl-f5", "regl-f1", "regl-f3", "regl-f4", "regl-f5", "regl-f6", "regl-f7", "regl-f8")


def test_every_kind_is_in_a_figure() -> None:
    pictures: dict[str, list[Picture]] = {name: asked(experiment(name), "smoke") for name in FIGURES}
    assert {each.kind for several in pictures.values() for each in several} == set(KINDS)
    for profile in ("paper", "reduced"):
        assert all(asked(experiment(name), profile) for name in FIGURES)
    for several in pictures.values():
        assert len({each.name for each in several}) == len(several), "files of their own"
        assert all(bool(each.column) == (each.kind not in ("curve", "bars")) for each in several)


@pytest.mark.full
def test_all_figures_in_the_profile_smoke(tmp_path: Path) -> None:
    words = ("--profile", "smoke", "--dir", tmp_path, "--pools", tmp_path / "pools")
    result = fedkeel_(*FIGURES, *words, "--json")
    assert result.exit_code == 0, result.output
    drawn = {each["name"]: each["pictures"] for each in json.loads(result.stdout)}
    assert list(drawn) == list(FIGURES)
    for name, pictures in drawn.items():
        assert len(pictures) == len(asked(experiment(name), "smoke"))
        for each in pictures:
            assert each["file"] and not each["missing"] and re.search(r"\d", each["caption"]), each
            with Image.open(tmp_path / "smoke" / name / each["file"]) as image:
                assert 500 <= image.width <= 1900
            beside = json.loads((tmp_path / "smoke" / name / each["file"]).with_suffix(".json").read_text())
            assert beside["caption"] == each["caption"] and beside["numbers"] and beside["cells"]
        page = (tmp_path / "smoke" / name / "table.html").read_text()
        assert page.count("data:image/png;base64,") == len(pictures)

    def of(name: str, picture: str) -> Any:
        return json.loads((tmp_path / "smoke" / name / f"{picture}.json").read_text())["numbers"]

    aligned = of("fbl-f4a", "aligned-c10-03")
    means = torch.tensor(list(aligned["distances"].values())).mean(0).tolist()
    assert list(aligned["scores"].values()) == pytest.approx(means) and means[0] != means[1]
    assert set(of("regl-f6", "images-fruit-001")["scores"]) == {"mmd2/vanilla", "mmd2/adapted"}
    held = of("regl-f7", "classes-fruit-001")
    assert len(held) == 2 and held[0]["client"] == held[1]["client"] and held[0]["held"] == held[1]["held"]
    assert held[0]["round"] == held[1]["round"] and held[0]["recorded"] == held[1]["recorded"]
    assert set(of("regl-f8", "sheet-fruit-001")["numbers"]) == {"real", "vanilla", "adapted"}
    assert set(of("fbl-f5", "sheet-eurosat-03")["numbers"]) == {"real", "synthetic"}
    # and again: nothing is run and nothing drawn anew
    files = [*tmp_path.glob("smoke/*/*.png"), *tmp_path.glob("smoke/*/*--*.json")]
    times = {path: path.stat().st_mtime_ns for path in files}
    assert fedkeel_(*FIGURES, *words, "--show").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in files} == times
    assert all("checkpoint" in {part.name for part in run.iterdir()} for run in _runs(tmp_path))


def _runs(folder: Path) -> Iterator[Path]:
    """Those that pictures were drawn from."""
    for name in FIGURES:
        if any(each.kind in OF_RUNS for each in asked(experiment(name), "smoke")):
            yield from {run_of(cell, folder) for cell in command.plan([name], "smoke")}
