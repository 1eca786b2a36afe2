"""The pictures of one client: the numbers behind them by hand, what is recorded, and the files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from fedkeel import cli
from fedkeel.data.dataset import Dataset
from fedkeel.errors import CheckpointError, ConfigError, DataError
from fedkeel.generators import quality
from fedkeel.generators.base import Tunable
from fedkeel.generators.quality import mmd2
from fedkeel.loop import resume, run
from fedkeel.record import numbers
from fedkeel.report import embedding, figures
from fedkeel.report.classes import Change, change
from fedkeel.report.classes import draw as draw_changes
from fedkeel.report.figures import Asked, Sheet, pools, sheet, write_figures
from fedkeel.report.finished import Finished, open_run

SPLIT = ("partition.name=dirichlet", "partition.alpha=0.3", "partition.min_size=4")
SKEWED = (*SPLIT, "rounds=2", "seed=4", "local.lr=0.005")
RECORD = ("evaluate.local_rounds=[1, 2]", "evaluate.local_clients=[1, 3]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, data: Dataset, generator: tuple[str, ...]) -> dict[str, Path]:
    """A run of FedAvg with a record of clients 1 and 3, and one of ReGL without, of one partition."""
    root = tmp_path_factory.mktemp("figures")
    torch.set_num_threads(1)
    run(tiny.config(*SKEWED, *RECORD, "name=plain"), data=data, folder=root / "plain")
    regl = ("name=filled", "algorithm.name=regl", "algorithm.volume=6", *generator)
    run(tiny.config(*SKEWED, *regl), data=data, folder=root / "filled")
    return {"plain": root / "plain", "filled": root / "filled"}


@pytest.fixture
def plain(folders: dict[str, Path], data: Dataset) -> Finished:
    return open_run(folders["plain"], data=data)


@pytest.fixture
def filled(folders: dict[str, Path], data: Dataset) -> Finished:
    return open_run(folders["filled"], data=data)


# what a run records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedrep"])
def test_recording_changes_nothing_else(method: str, data: Dataset) -> None:
    """Bit for bit, with BatchNorm: weights, and the records but for what was recorded; the mean over clients is not
    taken from the two that were asked for."""
    small = (*tiny.BATCHNORM, f"algorithm.name={method}", *SKEWED)
    without = run(tiny.config(*small), data=data)
    recorded = run(tiny.config(*small, *RECORD), data=data)
    assert all(torch.equal(value, recorded.weights[name]) for name, value in without.weights.items())
    for before, after in zip(without.rounds, recorded.rounds, strict=True):
        rest = numbers(after)
        assert [entry["client"] for entry in rest.pop("local/classes")] == [1, 3]
        assert rest == numbers(before)


def test_what_is_recorded_has_the_means_of_all_clients(data: Dataset) -> None:
    """All clients in round 2: their mean per class is what `local_every` writes."""
    found = run(tiny.config(*SKEWED, "evaluate.local_rounds=[2]", "evaluate.local_every=2"), data=data).rounds
    assert "local/classes" not in found[0] and "local_before/accuracy" not in found[0]
    entries = found[1]["local/classes"]
    assert [entry["client"] for entry in entries] == [0, 1, 2, 3]
    for when in ("before", "after"):
        means = torch.tensor([entry[when] for entry in entries], dtype=torch.float64).mean(0).tolist()
        named = [found[1][f"local_{when}/class/{name}"] for name in data.classes]
        assert named == pytest.approx(means)
    assert entries[0]["before"] == entries[3]["before"]  # all start from the server's model
    assert entries[0]["after"] != entries[3]["after"]


def test_a_record_asked_for_later_does_not_make_it_another_run(data: Dataset, tmp_path: Path) -> None:
    assert tiny.config(*RECORD).key() == tiny.config().key()
    run(tiny.config("rounds=2"), data=data, folder=tmp_path / "run")
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(text.replace("local_rounds = []", "local_rounds = [2]"))
    assert len(resume(tmp_path / "run", data=data).rounds) == 2


def test_rounds_and_clients_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.local_rounds = \[9\]: rounds are numbered 1 to 4"):
        tiny.config("evaluate.local_rounds=[9]")
    with pytest.raises(ConfigError, match=r"evaluate.local_clients = \[4\]: clients are numbered 0 to 3"):
        tiny.config("evaluate.local_clients=[4]")


# Fig. 7 ---------------------------------------------------------------------------------------------------------------


def test_a_record_is_read(plain: Finished) -> None:
    line = json.loads((plain.folder / "rounds.jsonl").read_text().splitlines()[1])
    entry = line["local/classes"][1]
    found = change(plain, 3)
    assert (found.client, found.round, found.recorded) == (3, 2, True)
    assert list(found.before) == entry["before"] and list(found.after) == entry["after"]
    assert list(found.held) == plain.job.counts[3].tolist()
    assert change(plain, 3, 1).round == 1


def test_without_a_record_the_next_update_is_measured(plain: Finished, data: Dataset) -> None:
    """As the run itself would have gone on: round 3 of a run of 3 rounds is the update after a run of 2."""
    longer = run(tiny.config(*SKEWED, "rounds=3", "evaluate.local_rounds=[3]"), data=data)
    entry = longer.rounds[2]["local/classes"][2]
    found = change(plain, 2)
    assert (found.round, found.recorded) == (3, False)
    assert list(found.before) == entry["before"] and list(found.after) == entry["after"]


def test_nothing_of_a_run_is_changed(plain: Finished) -> None:
    files = {path: path.read_bytes() for path in plain.folder.rglob("*") if path.is_file()}
    change(plain, 2)
    embedding.update_clouds(plain, 2, 5)
    assert {path: path.read_bytes() for path in plain.folder.rglob("*") if path.is_file()} == files


def test_a_round_without_a_record(plain: Finished, filled: Finished) -> None:
    with pytest.raises(DataError, match="round 2 has no record of client 0; recorded are: round 1: clients 1, 3; rou"):
        change(plain, 0, 2)
    with pytest.raises(DataError, match="round 1 has no record of client 1; recorded are: none"):
        change(filled, 1, 1)


def example(**other: object) -> Change:
    base = Change(
        "fedavg", 0, 5, True, ("a", "b", "c", "d"), (9, 0, 3, 0), (0.2, 0.6, 0.4, None), (0.8, 0.1, 1.0, None)
    )
    return replace(base, **other)  # type: ignore[arg-type]


def test_means_by_hand() -> None:
    """Held a and c: (0.2 + 0.4) / 2 and (0.8 + 1) / 2; missing b and d, of which d has no test images."""
    assert example().mean(True) == pytest.approx((0.3, 0.9))
    assert example().mean(False) == (0.6, 0.1)
    assert example(held=(1, 1, 1, 1)).mean(False) == (None, None)


def test_the_bars(tmp_path: Path) -> None:
    figure = draw_changes([example(), example(title="regl", recorded=False)])
    upper, lower = figure.axes
    bars = [round(bar.get_height()) for bar in upper.patches]
    assert bars == [20, 60, 40, 80, 10, 100]  # before, then after; nothing for d
    assert upper.get_title(loc="left") == "fedavg: client 0, round 5"
    assert lower.get_title(loc="left") == "regl: client 0, after the last round, 4"
    assert [tick.get_text() for tick in upper.get_xticklabels()] == [
        "a\n9 held",
        "b\nmissing",
        "c\n3 held",
        "d\nmissing",
    ]


def test_many_classes_fit() -> None:
    names = tuple(f"a rather long class name {c}" for c in range(100))
    values = tuple([0.5] * 100)
    figure = draw_changes([Change("x", 0, 1, True, names, tuple(range(100)), values, values)])
    assert figure.get_figwidth() <= 24 and len(figure.axes[0].get_xticklabels()) == 100


# Figs. 4 and 6 --------------------------------------------------------------------------------------------------------


def test_silhouette_by_hand() -> None:
    """Points 0 and 1 of class 0, 4 and 6 of class 1 on a line. Point 0: own 1, other (4 + 6) / 2: 1 - 1/5; point 6: own
    2, other (6 + 5) / 2: 1 - 2/5.5."""
    x = torch.tensor([[0.0], [1.0], [4.0], [6.0]])
    found = embedding.silhouette(x, torch.tensor([0, 0, 1, 1]))
    assert found[0] == pytest.approx(1 - 1 / 5) and found[3] == pytest.approx(1 - 2 / 5.5)
    assert embedding.silhouette(x, torch.tensor([2, 2, 2, 2])).isnan().all()
    assert embedding.silhouette(x, torch.tensor([0, 1, 2, 3])).isnan().all()


def test_mmd_by_hand() -> None:
    """One feature, real 1 and -1 (root mean square 1), made 2 and 2. Kernel (x y + 1)^3: within real (1 - 1)^3 = 0,
    within made 125, between the mean of 3^3 and (-1)^3 = 13: 0 + 125 - 26."""
    features = {1: 1.0, 2: -1.0, 3: 2.0}

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[features[int(image[0, 0, 0])]] for image in images])

    def pictures(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.uint8)[:, None, None, None]

    labels = torch.tensor([0, 1])
    groups = {
        "real": (pictures(1, 2), labels),
        "vanilla": (pictures(3, 3), labels),
        "adapted": (pictures(1, 2), labels),
    }
    found = embedding.image_cloud("x", groups, encode)
    assert found.scores["mmd2/vanilla"] == pytest.approx(99)
    assert found.scores["mmd2/adapted"] == pytest.approx(0 + 0 - 2 * (8 + 0 + 0 + 8) / 4)
    assert found.kinds.tolist() == [0, 0, 1, 1, 2, 2] and found.labels.tolist() == [0, 1] * 3
    assert found.names == ("real", "vanilla", "adapted")


def test_tsne_keeps_clusters_and_repeats_itself() -> None:
    x = torch.cat([torch.randn(20, 60, generator=torch.Generator().manual_seed(c)) * 0.1 + 5 * c for c in range(3)])
    state = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    one, two = embedding.tsne(x), embedding.tsne(x)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index,union-attr]
    assert one.shape == (60, 2) and np.array_equal(one, two)
    middles = one.reshape(3, 20, 2).mean(1)
    inner = np.linalg.norm(one.reshape(3, 20, 2) - middles[:, None], axis=2).max()
    apart = min(float(np.linalg.norm(middles[a] - middles[b])) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert apart > inner


def test_too_little_for_tsne() -> None:
    with pytest.raises(DataError, match="at least 5 images, there are 4"):
        embedding.tsne(torch.randn(4, 3))
    with pytest.raises(DataError, match="are the same"):
        embedding.tsne(torch.ones(9, 3))


@pytest.mark.parametrize(
    ("held", "most", "shown"),
    [
        ([5, 0, 3], 10, [0, 1, 2]),
        ([1, 9, 0, 8, 0, 7, 0], 4, [1, 2, 3, 4]),
        ([0, 0, 0, 0, 2], 3, [0, 1, 4]),
        ([4, 3, 2, 1], 3, [0, 1, 2]),
        ([4, 3, 2, 0], 3, [0, 1, 3]),
    ],
)
def test_classes_shown(held: list[int], most: int, shown: list[int]) -> None:
    assert embedding.chosen(torch.tensor(held), most) == shown


def test_update_clouds(plain: Finished, data: Dataset) -> None:
    """The points are the first test images of each class; what the client misses is marked, if it misses anything."""
    before, after = embedding.update_clouds(plain, 1, 5)
    assert before.labels.tolist() == np.repeat(range(4), 5).tolist() == after.labels.tolist()
    held = plain.job.counts[1]
    assert before.kinds.tolist() == (held[torch.from_numpy(before.labels)] == 0).long().tolist()
    assert not np.array_equal(before.places, after.places)
    rows = torch.cat([torch.nonzero(data.test_y == c)[:5, 0] for c in range(4)])
    x = embedding.encoder(plain, plain.model(1))(data.test_x[rows])
    apart = embedding.silhouette(x, data.test_y[rows])
    mine = held[data.test_y[rows]] > 0
    assert before.scores["silhouette/held"] == pytest.approx(float(apart[mine].mean()))
    figure = embedding.draw([before, after], data.classes, 2)
    assert "before a local update" in figure.axes[0].get_title(loc="left")


# Fig. 8 ---------------------------------------------------------------------------------------------------------------


def test_sheet(filled: Finished, data: Dataset) -> None:
    """The client's own images stand first; the generated ones are those that it trained on."""
    found = sheet(filled, 2, 3)
    assert list(found.groups) == ["real", "vanilla"] and found.held == tuple(filled.job.counts[2].tolist())
    own = set(filled.job.partition.clients[2].tolist())
    for c, rows in enumerate(found.numbers["real"]):
        assert torch.equal(found.groups["real"][c], data.train_x[rows])
        assert [row in own for row in rows] == sorted((row in own for row in rows), reverse=True)
        assert sum(row in own for row in rows) == min(3, found.held[c])
        trained = filled.job.images(2, torch.tensor([6 * (k == c) for k in range(4)]), 0).x
        assert torch.equal(found.groups["vanilla"][c], trained[:3])
        again = filled.job.source.generate([c] * 3, found.numbers["vanilla"][c])
        assert torch.equal(found.groups["vanilla"][c], again)


def test_adapted_images_stand_beside_the_plain_ones_of_the_same_seeds(
    data: Dataset, generator: tuple[str, ...], tmp_path: Path
) -> None:
    config = tiny.config(*SKEWED, "algorithm.name=regl", "algorithm.tune=true", "algorithm.volume=4", *generator)
    config = replace(config, pool=replace(config.pool, dir=str(tmp_path / "pool")))
    run(config, data=data, folder=tmp_path / "tuned")
    tuned = open_run(tmp_path / "tuned", data=data)
    assert isinstance(tuned.job.source, Tunable)
    client = next(k for k in range(4) if tuned.job.adapts(k))
    found = sheet(tuned, client, 3)
    assert found.numbers["adapted"] == found.numbers["vanilla"]
    assert found.fingerprints["adapted"] != found.fingerprints["vanilla"] == tuned.job.source.fingerprint()
    trained = tuned.job.images(client, torch.tensor([4, 4, 4, 4]), 0).x
    assert torch.equal(
        torch.cat(list(found.groups["adapted"])), torch.cat([trained[4 * c : 4 * c + 3] for c in range(4)])
    )
    assert not torch.equal(found.groups["adapted"][0], found.groups["vanilla"][0])
    (figure,) = found.draw()
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["real", "vanilla", "adapted"]


def test_a_client_that_makes_no_images_has_no_sheet(filled: Finished) -> None:
    assert pools(filled, 0)
    filled.job.plan.fake[0] = 0
    assert pools(filled, 0) == {}


def test_many_classes_make_several_sheets() -> None:
    one = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    empty = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    names = tuple(f"class {c}" for c in range(45))
    parts = {"real": [empty, *[one] * 44], "vanilla": [one] * 45}
    figures = Sheet("x", 0, names, tuple(range(45)), parts, {}, {}).draw()
    assert [len(figure.axes[0].get_yticks()) for figure in figures] == [20, 20, 5]


# files and mistakes ---------------------------------------------------------------------------------------------------


def test_files(folders: dict[str, Path], data: Dataset, tmp_path: Path) -> None:
    """Every picture has its size, is not blank, and has its numbers beside it."""
    written = write_figures(list(folders.values()), tmp_path, Asked(client=1, each=6, shown=4), data)
    names = ["classes", "tsne-update", "tsne-images-regl", "sheet-regl"]
    assert [path.name for path in written] == [f"{name}-client1.png" for name in names]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        dark = (pixels < 200).any(2)
        assert 0.01 < dark.mean() < 0.9
        assert not dark[[0, -1]].any() and not dark[:, [0, -1]].any(), f"{path.name}: something is cut off at the edge"
        json.loads(path.with_suffix(".json").read_text(), parse_constant=lambda word: pytest.fail(word))
    both = json.loads((tmp_path / "classes-client1.json").read_text())
    assert [entry["title"] for entry in both] == ["fedavg (plain)", "regl (filled)"]
    assert all(math.isfinite(entry["mean"]["held"]["after"]) for entry in both)


def test_mistakes(folders: dict[str, Path], data: Dataset, tmp_path: Path, generator: tuple[str, ...]) -> None:
    def fails(kind: type[Exception], text: str, *runs: Path, **asked: object) -> None:
        with pytest.raises(kind, match=text):
            write_figures(runs or [folders["plain"]], tmp_path / "out", Asked(**asked), data)  # type: ignore[arg-type]

    fails(ConfigError, "client = 7: .*plain: clients are numbered 0 to 3", client=7)
    fails(ConfigError, "what = 'sheet'.*Did you mean 'sheets'", what=["sheet"])
    fails(DataError, "client 0 of these runs trains on no synthetic images", what=["sheets"])
    fails(DataError, "no such folder", tmp_path / "nothing")
    run(
        tiny.config(*SKEWED, "seed=5", "algorithm.mu=0.1", "algorithm.name=fedprox"),
        data=data,
        folder=tmp_path / "other",
    )
    fails(DataError, "differ in their partition", folders["plain"], tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    fails(CheckpointError, "not done", tmp_path / "other")
    lines = (tmp_path / "other" / "rounds.jsonl").read_text().splitlines()
    (tmp_path / "other" / "rounds.jsonl").write_text(lines[0] + "\n")
    fails(CheckpointError, r"not done \(1 of 2 rounds\); fedkeel resume .*other", tmp_path / "other")
    with pytest.raises(CheckpointError, match="no run"):
        open_run(tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_gone(data: Dataset, tmp_path: Path) -> None:
    run(tiny.config("rounds=1"), data=data, folder=tmp_path / "run")
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="checkpoint is gone"):
        open_run(tmp_path / "run", data=data)


def apart(run: Finished, encode: embedding.Encode) -> float:
    """The squared MMD of client 1's real images, at most 6 of a class, to as many of its synthetic ones."""
    own = run.job.samples(1)
    counts = torch.where(run.job.counts[1] > 1, run.job.counts[1].clamp(max=6), 0)
    real = torch.cat([own.x[own.y == c][:n] for c, n in enumerate(counts.tolist())])
    x, y = encode(real), encode(run.job.images(1, counts, 0).x)
    scale = x.square().mean().sqrt()
    return mmd2(x / scale, y / scale)


def test_images_are_compared_by_a_network_that_knows_no_synthetic_one(filled: Finished) -> None:
    found = figures.images(filled, 1, 6)
    assert found is not None and found.title.endswith("features of a classifier of real images")
    judge = quality.reference(filled.job)
    assert found.scores["mmd2/vanilla"] == pytest.approx(apart(filled, embedding.encoder(filled, judge)))
    assert found.scores["mmd2/vanilla"] != pytest.approx(apart(filled, embedding.encoder(filled, filled.model(1))))


@pytest.mark.slow  # for the import of transformers
def test_features_of_clip(filled: Finished, folders: dict[str, Path], data: Dataset, tmp_path: Path) -> None:
    from standins.vision import clip

    from fedkeel.generators.condition import Encoder

    name = str(clip(tmp_path / "clip", 12))
    write_figures([folders["filled"]], tmp_path, Asked(["tsne"], client=1, each=6, clip=name), data)
    found = json.loads((tmp_path / "tsne-images-regl-client1.json").read_text())
    assert found["scores"]["mmd2/vanilla"] == pytest.approx(apart(filled, Encoder(Path(name), torch.device("cpu"))))
    assert found["title"].endswith("CLIP features")
    with pytest.raises(DataError, match="clip: nowhere is not on this machine"):
        write_figures([folders["filled"]], tmp_path, Asked(["tsne"], client=1, clip="nowhere"), data)


@pytest.mark.parametrize("method", ["fedrep", "centralized", "pfedgate"])
def test_other_methods(method: str, data: Dataset, tmp_path: Path) -> None:
    """One with personal parts, one that pools all data, one whose network is not plain."""
    run(tiny.config(f"algorithm.name={method}", "rounds=1"), data=data, folder=tmp_path / "run")
    written = write_figures([tmp_path / "run"], tmp_path / "out", Asked(each=4), data)
    assert [path.name for path in written] == ["classes-client0.png", "tsne-update-client0.png"]


def test_the_command(folders: dict[str, Path], data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkeel.data.fashion.Fashion.load", lambda self: data)

    def command(*words: str) -> tuple[int, str]:
        shown = CliRunner().invoke(cli.app, ["figures", *words], prog_name="fedkeel")
        return shown.exit_code, shown.output

    code, said = command(str(folders["plain"]), "--what", "classes", "--client", "3", "--round", "1", "--json")
    assert code == 0
    (entry,) = json.loads(said)
    assert Path(entry["picture"]) == folders["plain"] / "figures" / "classes-client3.png"
    assert json.loads(Path(entry["numbers"]).read_text())[0]["round"] == 1
    code, said = command(str(folders["plain"]), "--client", "9", "--out", str(tmp_path))
    assert code == 2 and said.startswith("error: client = 9") and said.count("\n") == 1
