"""The report: numbers by hand, files that a running or damaged run leaves, and the page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import errno
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import save_file

from fedkeel import cli
from fedkeel.data.dataset import Dataset
from fedkeel.errors import DataError, StorageError
from fedkeel.loop import run
from fedkeel.report.page import _sheet, page, write_page
from fedkeel.report.plots import accuracy, bubbles, contact, per_class, traffic, write_pngs
from fedkeel.report.runs import RunData, methods, read_run, read_runs
from fedkeel.report.table import as_json, as_markdown, as_text, duration, size, summarise

CLASSES = ["cat", '<b>&"dog', "a$b$c", "</script><script>alert(1)</script>"]
EVIL = "<img src=x onerror=alert(2)>"


def write_run(
    folder: Path, algorithm: str, label: str, seed: int, accuracies: Sequence[float | None], **config: object
) -> Path:
    """A run's folder whose rounds have these accuracies (None: not evaluated)."""
    folder.mkdir(parents=True)
    manifest = {
        "label": label, "runtime": "inprocess", "algorithm": algorithm, "seed": seed, "classes": CLASSES,
        "data": {"name": "fashion", "fingerprint": "d" * 64}, "partition": f"abc{seed}", "generator": None,
        "profiles": ["constrained"] * 2, "config": "c" * 64, "commit": "0123456789" * 4,
        "versions": {"fedkeel": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "machine": "x86_64", "processor": "Abacus 3", "gpu": None, "threads": 1},
        "started": f"2026-05-0{len(label)}T10:0{seed}:00", "resumed": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    settings = {"name": folder.name, "seed": seed, "rounds": len(accuracies), **config}
    (folder / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    counts = [[40, 0, 3, 1], [0, 25, 0, 0]]
    (folder / "partition.json").write_text(
        json.dumps(
            {
                "format": 1,
                "name": "dirichlet",
                "options": {"alpha": 0.1},
                "seed": seed,
                "data": "d" * 64,
                "hash": f"abc{seed}",
                "counts": counts,
                "clients": [list(range(44)), list(range(44, 69))],
            }
        )
    )
    (folder / "balanced.json").write_text(json.dumps({"real": counts, "fake": [[0] * 4] * 2}))  # not balanced
    lines = []
    for at, value in enumerate(accuracies, start=1):
        row: dict[str, object] = {
            "round": at, "train/loss": 1 / at, "bytes/up": 1000, "bytes/down": 2000, "seconds/train": 2.0,
            "seconds/evaluate": 0.5, "clients": [0, 1], "failed": [],
        }  # fmt: skip
        if value is not None:
            row |= {"global/accuracy": value, "global/balanced_accuracy": value - 0.1, "global/loss": 1 - value}
            row |= {f"global/class/{name}": value + 0.01 * place for place, name in enumerate(CLASSES)}
        lines.append(json.dumps(row))
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def add(folder: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Puts these metrics into the records of a run's rounds."""
    path = folder / "rounds.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**one, **more}) + "\n" for one, more in zip(known, rows, strict=True)))


BALANCED = {"real": [[11, 0, 3, 1], [0, 6, 0, 0]], "fake": [[0, 11, 8, 10], [6, 0, 6, 6]]}


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """FedAvg and FBL, two seeds each. FBL has balancing and pictures; FedAvg is unfinished, its second seed has lost a
    client and is being written."""
    root = tmp_path / "demo"
    write_run(root / "fedavg-seed1", "fedavg", "FedAvg", 1, [0.1, 0.3, 0.5], rounds=9)
    torn = write_run(root / "fedavg-seed2", "fedavg", "FedAvg", 2, [0.2, None, 0.6], rounds=9)
    with (torn / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 4, "clients": [0], "failed": [{"client": 1, "reason": EVIL}]}))
        file.write('\n{"round": 5, "global/acc')
    for seed in (1, 2):
        folder = write_run(root / f"fbl-seed{seed}", "fbl", "FBL (25%)", seed, [0.7] * 2 + [0.9] * 10)
        (folder / "balanced.json").write_text(json.dumps(BALANCED))
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 4, 3, 1, 8, 8), np.uint8)
        save_file({"real": pixels[0], "fake": pixels[1]}, folder / "contact.safetensors")
    return root


@pytest.fixture
def uneven(tmp_path: Path) -> list[RunData]:
    """One method, of which no two columns have the same number: it is best in the second of three rounds, and so on."""
    folders = [tmp_path / f"seed{seed}" for seed in (1, 2)]
    for seed, accuracies in ((1, [0.1, 0.5, 0.3]), (2, [0.2, 0.7, 0.4])):
        folder = write_run(folders[seed - 1], "fedrep", "FedRep", seed, accuracies)
        add(folder, [{"personal/accuracy_last": 0.65, "personal/accuracy_best": 0.8}] * 3)
        (folder / "balanced.json").write_text(json.dumps(BALANCED))
    return read_runs(folders)


def test_numbers_by_hand(comparison: Path) -> None:
    """FedAvg: headlines (0.1 + 0.3 + 0.5) / 3 = 0.3 and (0.2 + 0.6) / 2 = 0.4; their mean is 0.35 and the sample
    standard deviation sqrt(2 * 0.05^2 / 1) = 0.0707. FBL: the last ten of twelve rounds, 0.9."""
    fedavg, fbl = summarise(read_runs([comparison]))
    assert (fedavg.key, fedavg.label, fedavg.seeds, fedavg.rounds) == ("fedavg", "FedAvg", (1, 2), 3)
    assert fedavg.headlines == pytest.approx((0.3, 0.4))
    assert fedavg.mean == pytest.approx(0.35)
    assert fedavg.std == pytest.approx(0.0707107, abs=1e-6)
    assert (fedavg.best, fedavg.last) == pytest.approx((0.55, 0.55))
    assert fedavg.balanced_accuracy == pytest.approx(0.25)
    assert (fedavg.up, fedavg.down) == (3000, 6000)
    assert fedavg.seconds == {"train": 6.0, "evaluate": 1.5}
    assert fedavg.failed == 1
    assert (fbl.mean, fbl.std, fbl.best) == pytest.approx((0.9, 0.0, 0.9))
    assert methods(read_runs([comparison]))[1].per_class()[CLASSES[3]] == pytest.approx(0.93)


def test_what_looks_back_over_all_rounds_is_read_at_the_end(tmp_path: Path) -> None:
    """A best so far and the number of evaluations behind it are not averaged over the last ten."""
    folder = write_run(tmp_path / "run", "fedrep", "FedRep", 1, [None] * 4)
    values = zip([0.2, 0.8, 0.4, 0.6], [0.2, 0.8, 0.8, 0.8], [1, 2, 3, 4], strict=True)
    names = ("personal/accuracy_last", "personal/accuracy_best", "personal/evaluations")
    add(folder, [dict(zip(names, each, strict=True)) for each in values])
    (row,) = summarise(read_runs([folder]))
    found = {name: row.metrics[f"personal/{name}"] for name in ("accuracy_last", "accuracy_best", "evaluations")}
    assert found == pytest.approx({"accuracy_last": 0.5, "accuracy_best": 0.8, "evaluations": 4})


def test_a_real_run(comparison: Path, data: Dataset, generator: tuple[str, ...], tmp_path: Path) -> None:
    """What the loop writes is what the other tests here stand on, and the page says where its numbers come from."""
    config = tiny.config(
        "algorithm.name=fbl", "partition.name=dirichlet", "partition.alpha=0.3", "rounds=2", *generator
    )
    result = run(config, data=data, folder=tmp_path / "run")
    for name in ("manifest.json", "partition.json", "balanced.json"):
        ours = json.loads((comparison / "fbl-seed1" / name).read_text())
        theirs = json.loads((tmp_path / "run" / name).read_text())
        assert ours.keys() == theirs.keys()
        assert name != "manifest.json" or ours["hardware"].keys() == theirs["hardware"].keys()
    written = set(json.loads((comparison / "fbl-seed1" / "rounds.jsonl").read_text().splitlines()[0]))
    assert {key for key in written if "class" not in key} <= set(result.rounds[0])

    runs = read_runs([tmp_path / "run"])
    assert runs[0].balanced and runs[0].hash == json.loads((tmp_path / "run" / "partition.json").read_text())["hash"]
    (row,) = summarise(runs)
    assert (row.label, row.rounds, row.mean) == ("fbl", 2, pytest.approx(result.headline()))
    own = page(runs).replace(_plotly(), "")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert f"fedkeel {manifest['versions']['fedkeel']}, torch {manifest['versions']['torch']}" in own
    assert manifest["hardware"]["processor"] in html.unescape(own)
    assert manifest["generator"]["fingerprint"][:12] in own
    for heading in ("Over rounds", "Per class", "Who holds what", "Real beside synthetic", "What it cost"):
        assert f"<h2>{heading}</h2>" in own
    assert "commit 012345678901" in page(read_runs([comparison]))


def test_a_page_that_cannot_be_written(comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: nothing half-written stays, and the page that was there is as before."""
    (tmp_path / "report.html").write_text("before")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    runs = read_runs([comparison])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"report\.html: No space left"):
            write_page(runs, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["report.html"]
    with pytest.raises(StorageError):  # a file where the folder should be
        write_page(runs, tmp_path / "report.html" / "report.html")


def test_summary_layout(comparison: Path) -> None:
    summary = json.loads(json.dumps(as_json(summarise(read_runs([comparison]))), allow_nan=False))
    assert list(summary) == ["methods"]
    assert list(summary["methods"]) == ["fedavg", "fbl"]
    fedavg = summary["methods"]["fedavg"]
    assert {"global/accuracy", "global/balanced_accuracy", "std", "best", "last", "bytes/up"} <= set(fedavg)
    assert fedavg["seeds"] == [1, 2]
    assert fedavg["global/accuracy"] == pytest.approx(0.35)


def test_table_as_text_and_markdown(comparison: Path) -> None:
    from rich.console import Console

    rows = summarise(read_runs([comparison / "fedavg-seed1", comparison / "fbl-seed1", comparison / "fbl-seed2"]))
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(as_text(rows))
    assert re.search(r"FBL \(25%\) +2 +90\.00 ± 0\.00 +90\.00", captured.get())
    assert re.search(r"FedAvg +1 +30\.00 +50\.00", captured.get())
    lines = as_markdown(rows).splitlines()
    assert lines[2].startswith("| FedAvg | 1 | 3 | 30.00 | 50.00 |")
    assert "**90.00 ± 0.00**" in lines[3]
    assert lines[1].count("|") == lines[2].count("|") == lines[3].count("|")


def test_each_column_has_its_own_number(uneven: list[RunData]) -> None:
    """Accuracies: 0.9 / 3 and 1.3 / 3, which deviate by 0.4 / 3 / sqrt(2); at best 0.5 and 0.7, at last 0.3 and 0.4."""
    rows = summarise(uneven)
    heads, _, cells = (line.strip("|").split("|") for line in as_markdown(rows).splitlines()[:3])
    assert {head.strip(): cell.strip() for head, cell in zip(heads, cells, strict=True)} == {
        "Method": "FedRep", "Seeds": "2", "Rounds": "3", "Accuracy %": "36.67 ± 9.43", "Best": "60.00", "Last": "35.00",
        "Balanced": "26.67", "Personal, last": "65.00", "Personal, best": "80.00", "Up": "3.0 kB", "Down": "6.0 kB",
        "Time": "7.5 s",
    }  # fmt: skip
    found: Any = as_json(rows)["methods"]
    names = ("global/accuracy", "std", "best", "last", "bytes/up", "bytes/down", "seconds", "seconds/train")
    values = [found["fedrep"][name] for name in names]
    assert values == pytest.approx([0.36667, 0.09428, 0.6, 0.35, 3000, 6000, 7.5, 6], abs=1e-5)


def test_the_words_of_a_run_are_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkeel.comparison.publish", lambda *args: None)
    cli._finish(write_run(tmp_path / "run", "fedavg", "FedAvg", 1, [0.1, 0.5, 0.3]), False)
    said = "FedAvg: accuracy 30.00 % (mean over the last 10 evaluations; best 50.00, last 30.00)\n"
    assert capsys.readouterr().out == said


def test_words_for_sizes_and_times() -> None:
    assert [size(count) for count in (0, 999, 1500, 249_000, 1.5e9, 2e15)] == [
        "0 B", "999 B", "1.5 kB", "249 kB", "1.5 GB", "2000.0 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (0, 4.21, 59.97, 200, 7500)] == ["0.0 s", "4.2 s", "1m 00s", "3m 20s", "2h 05m"]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    """The run under two names that got furthest; what was run on other data is another method."""
    for name, seed, accuracies in (("a", 1, [0.2]), ("b", 1, [0.2, 0.4]), ("c", 2, [0.4, 0.6]), ("d", 1, [0.9])):
        write_run(tmp_path / name, "fedavg", "FedAvg", seed, accuracies, rounds=2)
    (same,) = methods(read_runs([tmp_path / name for name in "abc"]))
    assert [run.folder.name for run in same.runs] == ["b", "c"]
    (row,) = summarise(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert (row.seeds, row.std) == ((1,), None)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    (tmp_path / "d" / "manifest.json").write_text(json.dumps({**manifest, "data": {"fingerprint": "e" * 64}}))
    assert [method.label for method in methods(read_runs([tmp_path / name for name in "bd"]))] == [
        "FedAvg, data.fingerprint=dddddddddddd", "FedAvg, data.fingerprint=eeeeeeeeeeee",
    ]  # fmt: skip


def test_same_label_other_settings_is_another_method(tmp_path: Path) -> None:
    """Two FedAvg runs that differ in more than their seed are never averaged."""
    for at, alpha in enumerate((0.1, 0.5)):
        write_run(tmp_path / f"run{at}", "fedavg", "FedAvg", 1, [0.5], alpha=alpha)
    write_run(tmp_path / "run2", "fedavg", "FedAvg", 2, [0.7], alpha=0.5, device="cuda")
    first, second = methods(read_runs([tmp_path / "run0", tmp_path / "run1", tmp_path / "run2"]))
    assert (first.label, second.label) == ("FedAvg, alpha=0.1", "FedAvg, alpha=0.5")
    assert (first.key, second.key) == ("fedavg-alpha-0.1", "fedavg-alpha-0.5")
    assert [run.seed for run in second.runs] == [1, 2]


def test_reads_running_and_resumed_runs(comparison: Path) -> None:
    """A torn last line is ignored; rounds run again after a resume replace what they undo."""
    run = read_run(comparison / "fedavg-seed2")
    assert run.rounds == (1, 2, 3, 4)
    assert run.series("global/accuracy") == ([1, 3], [0.2, 0.6])
    assert (run.failed[0].round, run.failed[0].client, run.failed[0].reason) == (4, "1", EVIL)
    again = comparison / "fedavg-seed1"
    with (again / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "global/accuracy": 0.35}\n')
    assert read_run(again).series("global/accuracy") == ([1, 2], [0.1, 0.35])
    assert len(read_runs([comparison, comparison / "fbl-seed1"])) == 4  # named twice, read once


def test_damaged_folders_are_named(comparison: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_runs([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        read_runs([tmp_path / "empty"])
    run = comparison / "fedavg-seed1"

    def broken(name: str, text: str, match: str) -> None:
        kept = (run / name).read_text()
        (run / name).write_text(text)
        with pytest.raises(DataError, match=match):
            read_run(run)
        (run / name).write_text(kept)

    broken("manifest.json", "{", "not JSON")
    broken("manifest.json", "{}", "classes")
    broken("rounds.jsonl", '{"round"\n{"round": 1}\n', "line 1")
    broken("rounds.jsonl", "[]\n", "whole 'round'")
    broken("config.toml", "= 3", "not TOML")
    broken("partition.json", '{"counts": [[1, 2]]}', "4 counts")
    broken("partition.json", '{"counts": [[1, 2], [3]]}', "whole numbers")
    (comparison / "fbl-seed1/contact.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="contact sheet"):
        read_run(comparison / "fbl-seed1").pictures()


def test_pictures_are_written(comparison: Path, tmp_path: Path) -> None:
    written = write_pngs(read_runs([comparison]), tmp_path / "png")
    names = {path.name for path in written}
    assert {"accuracy.png", "classes.png", "partition.png", "balanced-fbl.png", "contact-fbl.png"} <= names
    assert {"bytes.png", "seconds.png"} <= names
    assert "balanced-fedavg.png" not in names
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 4000
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_pngs(read_runs([comparison]), tmp_path / "file")


def test_pictures_of_many_clients_and_classes() -> None:
    """A hundred by a hundred: labels thin out, every class keeps its name."""
    counts = np.random.default_rng(0).integers(0, 50, (100, 100))
    names = [f"class {at}" for at in range(100)]
    axes = bubbles(counts, names, counts).axes[0]
    assert len(axes.get_xticks()) <= 26
    assert len(axes.get_yticklabels()) == 100
    sheet = np.zeros((100, 2, 3, 8, 8), np.uint8)
    assert len(contact(sheet, sheet, names).axes) == 4
    assert per_class([]).axes


def test_disc_areas_are_counts() -> None:
    """A disc's area is proportional to its count, the largest filling a cell."""
    discs: Any = bubbles(np.array([[4, 1], [0, 2]]), ["a", "b"]).axes[0].collections[0]
    sizes = discs.get_sizes()
    assert sizes / sizes.max() == pytest.approx([1, 0.25, 0.5])


def test_curves_bars_and_discs_have_the_numbers(uneven: list[RunData]) -> None:
    """On the page and in the pictures. Two seeds that are 0.1, 0.2 and 0.1 apart deviate by that over sqrt(2)."""
    own = page(uneven)
    drawn = json.loads(own.partition('id="figures">')[2].partition("</script>")[0])
    line = drawn["curve global/accuracy"]["data"][-1]
    assert line["x"] == [1, 2, 3] and line["y"] == pytest.approx([15, 60, 35])
    assert line["customdata"] == pytest.approx([7.0711, 14.1421, 7.0711])
    assert drawn["classes"]["data"][0]["y"] == pytest.approx([36.67, 37.67, 38.67, 39.67])
    assert "69 real samples" in own and "21 real and 47 synthetic samples" in own
    both, real = drawn["holding 1"]["data"]
    assert both["marker"]["size"] == [11, 11, 11, 6, 6, 6] and real["marker"]["size"] == [11, 3, 1, 6]
    (curve,) = accuracy(uneven).axes[0].lines
    assert list(curve.get_ydata()) == pytest.approx([15, 60, 35])  # type: ignore[arg-type]
    bars: Any = traffic(uneven).axes[0].patches
    assert [bar.get_width() for bar in bars] == [3000, 6000]
    bars = per_class(uneven).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([36.67, 37.67, 38.67, 39.67], abs=0.01)


def test_real_pictures_are_left_of_synthetic_ones() -> None:
    black, white = (np.full((1, 2, 1, 8, 8), grey, np.uint8) for grey in (0, 255))
    (shown,) = contact(black, white, ["a"]).axes[0].images
    pixels: Any = shown.get_array()
    middle = pixels.shape[1] // 2
    assert pixels[:, :middle].min() == 0 and pixels[:, middle:].min() == 255
    sheet = _sheet(black, white, ["a"])
    for kind, grey in (("real", 0), ("fake", 255)):
        coded = sheet.partition(f'<div class="{kind}">')[2].partition("base64,")[2].partition('"')[0]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))))
        assert set(pixels[pixels[..., 3] > 0][:, :3].flatten().tolist()) == {grey}, "but for the gaps"


def test_page_needs_nothing_from_outside(comparison: Path, tmp_path: Path) -> None:
    path = write_page(read_runs([comparison]), tmp_path / "new" / "report.html")
    text = path.read_text()
    own = text.replace(_plotly(), "")
    assert len(own) < 200_000
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", own)
    assert "http" not in own.replace("http-equiv", "").replace("fedkeel", "")
    assert "default-src 'none'" in own
    assert list(path.parent.iterdir()) == [path]


def test_page_escapes_text_from_files(comparison: Path) -> None:
    own = page(read_runs([comparison]), title="A <i>title</i>").replace(_plotly(), "")
    assert "<h1>A &lt;i&gt;title&lt;/i&gt;</h1>" in own
    assert "<script>alert" not in own
    assert "<img src=x" not in own
    assert "&lt;img src=x onerror" in own
    assert "&lt;b&gt;&amp;&quot;dog" in own
    assert '"\\u003cb>' not in own  # plotly would read the tag


def test_page_of_a_run_that_has_just_started(tmp_path: Path) -> None:
    """No round yet, no partition known: the sections without data are absent, the page says how far it is."""
    folder = write_run(tmp_path / "run", "fedavg", "FedAvg", 1, [], rounds=50)
    (folder / "partition.json").unlink()
    (folder / "rounds.jsonl").unlink()
    runs = read_runs([folder])
    own = page(runs).replace(_plotly(), "")
    assert "round 0 of 50" in own
    for heading in ("Over rounds", "Per class", "Who holds what", "Real beside synthetic", "What it cost"):
        assert f"<h2>{heading}</h2>" not in own
    assert write_pngs(runs, tmp_path / "png") == []


def test_import_is_light() -> None:
    heavy = "('matplotlib', 'plotly', 'rich', 'PIL', 'torch')"
    code = f"import sys, fedkeel.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.full
def test_page_in_a_browser(comparison: Path, tmp_path: Path) -> None:
    """Nothing on the console, every chart drawn, a click on the legend hides a method, the chooser changes the metric,
    nothing sticks out of a phone's screen."""
    path = write_page(read_runs([comparison]), tmp_path / "report.html")
    with browser(tmp_path) as ask:
        ask("POST", "/url", {"url": path.as_uri()})
        drawn = "return document.documentElement.dataset.drawn"
        charts = int(until(lambda: run_script(ask, drawn)))
        assert charts == run_script(ask, "return document.querySelectorAll('[data-figure]').length") == 6
        lines = "return document.querySelectorAll('#curve svg .scatterlayer .js-line').length"
        assert run_script(ask, lines) >= 3
        assert run_script(ask, "return document.querySelectorAll('svg .barlayer .point').length") > 0

        hidden = "return document.getElementById('curve').data.filter(t => t.visible === 'legendonly').length"
        assert run_script(ask, hidden) == 0
        name = ask("POST", "/element", {"using": "css selector", "value": "#curve .legendtoggle"})
        ask("POST", f"/element/{next(iter(name.values()))}/click", {})
        assert until(lambda: run_script(ask, hidden)) >= 1

        choose = "const s = document.getElementById('metric'); s.value = 'curve global/loss';"
        run_script(ask, choose + "s.dispatchEvent(new Event('change'))")
        title = "return document.getElementById('curve').layout.yaxis.title.text"
        assert until(lambda: run_script(ask, title) == "Loss of the global model")
        assert run_script(ask, hidden) >= 1  # still hidden

        metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        ask("POST", "/url", {"url": path.as_uri()})
        until(lambda: run_script(ask, drawn))
        assert run_script(ask, "return document.documentElement.scrollWidth") <= 400
        console = ask("POST", "/se/log", {"type": "browser"})
        assert console == []


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def until(question: Any, seconds: float = 10) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < end, "the browser did not get there"
        time.sleep(0.05)
    return answer


def run_script(ask: Any, script: str) -> Any:
    return ask("POST", "/execute/sync", {"script": script, "args": []})


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A headless Chromium behind chromedriver, spoken to in WebDriver's JSON; skips where there is none."""
    driver = shutil.which("chromedriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if driver is None or chromium is None:
        pytest.skip("needs Chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(method: str, url: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)["value"]

    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
        f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    wanted = {
        "goog:chromeOptions": {"args": flags, "binary": chromium},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    with subprocess.Popen(
        [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = next(found[1] for line in process.stdout if (found := re.search(r"on port (\d+)\.", line)))
            server = f"http://127.0.0.1:{port}"
            opened = call("POST", f"{server}/session", {"capabilities": {"alwaysMatch": wanted}})
            session = f"{server}/session/{opened['sessionId']}"
            try:
                yield lambda method, path, body=None: call(method, session + path, body)
            finally:
                call("DELETE", session)
        finally:
            process.terminate()
