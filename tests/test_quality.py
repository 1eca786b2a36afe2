"""What `fedkeel generate --inspect` and `--profile` find: every fault is named, good images pass, numbers are right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import tiny
import torch
from click.testing import Result
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from fedkeel import cli
from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.generators import cost, quality
from fedkeel.generators.cost import Cost, costs, measure, variants
from fedkeel.generators.gaussian import Gaussian
from fedkeel.generators.names import digest
from fedkeel.generators.quality import (
    ClassQuality,
    Limits,
    Quality,
    Recipe,
    inspect,
    judged,
    kid,
    mmd2,
    nearest,
    spread,
)
from fedkeel.job import Job
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.report import sheets

EACH = 30
QUICK = Recipe(steps=80, batch=16, lr=5e-3)
BROKEN = 1
"""The class that goes wrong, "north-east"."""


def coloured(data: Dataset) -> Dataset:
    """The same in three channels that differ."""
    parts = (torch.cat([x, x // 2, 255 - x], dim=1) for x in (data.train_x, data.test_x))
    train, test = parts
    return replace(data, train_x=train, test_x=test, mean=data.mean * 3, std=data.std * 3)


def job_of(data: Dataset, *overrides: str) -> Job:
    return Job(tiny.config(*overrides), data=data)


@dataclass
class Drawn:
    """Fresh images like the data's, and one class with a fault."""

    data: Dataset
    fault: str = ""

    def __post_init__(self) -> None:
        self.classes, self.shape = self.data.classes, self.data.shape
        fresh = tiny.data(train=tiny.CLASSES * 60, seed=7)
        self.fresh = coloured(fresh) if self.shape[0] == 3 else fresh

    def of(self, data: Dataset, label: int) -> Tensor:
        return data.train_x[data.train_y == label]

    def one(self, label: int, index: int) -> Tensor:
        good = self.of(self.fresh, label)[index]
        if label != BROKEN or not self.fault:
            return good
        if self.fault == "swapped":
            return self.of(self.fresh, BROKEN + 1)[index]
        if self.fault == "copies":  # every second a train image, with a grey level changed here and there
            return self.of(self.data, label)[index] ^ (torch.arange(self.shape[2]) == index % 16).byte()
        if self.fault == "equal":
            return self.of(self.data, label)[index] if index < 3 else good
        if self.fault == "collapsed":
            noise = torch.randint(0, 9, self.shape, generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
            return self.of(self.fresh, label)[0] // 2 + 60 + noise
        if self.fault == "repeats":
            return self.of(self.fresh, label)[index % 20]
        assert self.fault == "blank"
        return torch.full(self.shape, 7, dtype=torch.uint8)

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        return torch.stack([self.one(label, index) for label, index in zip(labels, indices, strict=True)])

    def prompt(self, label: int) -> str:
        return f"a bright {self.classes[label]}"

    def memory_bytes(self) -> dict[str, int]:
        return {"images": self.fresh.train_x.numel()}

    def fingerprint(self) -> str:
        return digest(self.fault, *self.shape)


@pytest.fixture(scope="module")
def images() -> Dataset:
    return tiny.data(train=160, test=160)


@pytest.fixture(scope="module")
def good(images: Dataset) -> Quality:
    return inspect(job_of(images), EACH, QUICK, source=Drawn(images))


# numbers --------------------------------------------------------------------------------------------------------------


def test_kid_by_hand() -> None:
    """The unbiased estimate of MMD^2 summed pair by pair in NumPy (Binkowski et al. 2018, equation 4)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1, (7, 5)), rng.normal(0, 1, (9, 5))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_of_equal_and_of_different_distributions() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 8, generator=rng), torch.randn(300, 8, generator=rng)
    same, error = kid(x, y)
    assert same is not None and error is not None
    assert abs(same) < 3 * error
    far, error = kid(x + 1, y)
    assert far is not None and error is not None
    assert far > 10 * error
    blocks = [mmd2(x[at::5], y[at::5]) for at in range(5)]
    assert kid(x, y)[1] == pytest.approx(np.std(blocks, ddof=1) / np.sqrt(5), rel=1e-5)
    assert kid(x[:4], y)[1] is None
    assert kid(x[:1], y) == (None, None)


def test_nearest_is_exact_where_it_is_near() -> None:
    """A matrix product alone would find distances near 1e-2 for equal rows as long as these."""
    rng = torch.Generator().manual_seed(0)
    train = 1000 + torch.randn(50, 6, generator=rng)
    gaps, after, places = nearest(torch.cat([train[[3, 9]], train[[5]] + 1e-3]), train)
    assert places.tolist() == [3, 9, 5]
    assert gaps[:2].tolist() == [0, 0]
    assert float(gaps[2]) == pytest.approx(1e-3 * 6**0.5, rel=0.1)  # float32 near 1000
    expected = sorted((train - train[3]).norm(dim=1).tolist())[1:11]
    assert float(after[0]) == pytest.approx(np.mean(expected), rel=1e-5)
    assert nearest(train[:1], train[:1])[1].isinf().all()


def test_spread_by_hand() -> None:
    assert spread(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx((5 + 0 + 5) / 3)
    assert spread(torch.zeros(1, 2)) is None


def test_rules_at_their_limits() -> None:
    """At the limit a class passes, beyond it fails; few images do not fail by chance."""
    fine = ClassQuality(
        "a", "", 100, accuracy=0.4, accuracy_real=0.8, kid=0.5, kid_error=0.0, kid_other=0.5, other="b",
        copies=0.01, exact=1, diversity=0.5, repeats=0.01,
    )  # fmt: skip
    assert judged(fine, Limits()).failed == {}
    for rule, change in {
        "accuracy": {"accuracy": 0.39},
        "kid": {"kid": 0.51},
        "diversity": {"diversity": 0.49},
        "copies": {"copies": 0.02, "exact": 2},
        "repeats": {"repeats": 0.02},
    }.items():
        assert list(judged(replace(fine, **change), Limits()).failed) == [rule]
    assert judged(replace(fine, copies=0.02, exact=0), Limits()).failed == {}
    assert list(judged(replace(fine, copies=0.06, exact=0), Limits()).failed) == ["copies"]
    assert judged(replace(fine, kid=0.7, kid_error=0.1), Limits()).failed == {}
    assert judged(ClassQuality("a", "", 100, accuracy=0.0), Limits()).failed == {}  # nothing to compare with


# classes --------------------------------------------------------------------------------------------------------------


def test_good_images_pass(good: Quality, images: Dataset) -> None:
    assert good.failed == []
    assert good.reference > 0.9 and good.accuracy > 0.9 and good.cas > 0.8 and good.cas_real > 0.8
    assert good.trained_on == (160, 4 * EACH, 4 * EACH)
    for each in good.classes:
        assert each.images == EACH
        assert each.prompt == f"a bright {each.name}"
        assert each.kid is not None and each.kid_other is not None and each.diversity is not None
        assert each.kid < 0.3 * each.kid_other
        assert 0.7 < each.diversity < 1.3
        assert each.exact == 0 and each.public is None
    assert torch.equal(good.real[2], images.train_x[images.train_y == 2][: quality.SHOWN])


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        ("swapped", {"accuracy", "kid"}),
        ("copies", {"copies"}),
        ("equal", {"copies"}),
        ("collapsed", {"diversity"}),
        ("repeats", {"repeats"}),
        ("blank", {"images"}),
    ],
)
def test_a_fault_is_named_and_only_that_class(images: Dataset, fault: str, rules: set[str]) -> None:
    found = inspect(job_of(images), EACH, QUICK, source=Drawn(images, fault))
    assert [each.name for each in found.failed] == ["north-east"]
    assert rules <= set(found.failed[0].failed)
    if fault == "equal":
        assert found.failed[0].exact == 3
        assert [(pair.label, pair.index, pair.exact) for pair in found.pairs[:3]] == [(1, i, True) for i in range(3)]
        assert torch.equal(found.pairs[0].fake, found.pairs[0].real)
    if fault == "copies":
        assert found.pairs[0].label == BROKEN and found.pairs[0].copy and not found.pairs[0].exact
    if fault == "blank":
        assert "one colour" in found.failed[0].failed["images"]
        assert found.failed[0].images == 0 and found.failed[0].accuracy is None
    lines = " ".join(sheets.summary(found))
    assert "north-east fails" in lines and all(f"{rule}: " in lines for rule in rules)


def test_again_the_same(good: Quality, images: Dataset) -> None:
    """Whatever the global generator is at, and whether the images come from the pool or are made."""
    torch.manual_seed(99)
    again = inspect(job_of(images), EACH, QUICK, source=Drawn(images))
    assert sheets.as_json(again) == sheets.as_json(good)


def test_images_set_aside_are_compared_too(images: Dataset) -> None:
    """A control that hands out public images is shown as that, and passes."""
    source = Drawn(images)
    public = Samples.real_ones(source.fresh.train_x, source.fresh.train_y)
    found = inspect(job_of(replace(images, public=public)), EACH, QUICK, source=source)
    assert [each.public for each in found.classes] == [1.0] * 4
    assert found.failed == []
    assert "of public %" in sheets.table(found)[0]


def test_classes_without_real_images(images: Dataset) -> None:
    """No client holds class 3 and no test image shows class 2: what can be measured is."""
    train, test = images.train_y != 3, images.test_y != 2
    part = replace(
        images, train_x=images.train_x[train], train_y=images.train_y[train],
        test_x=images.test_x[test], test_y=images.test_y[test],
    )  # fmt: skip
    found = inspect(job_of(part), EACH, QUICK, source=Drawn(images))
    assert found.classes[2].accuracy_real is None and found.classes[2].kid is None
    assert found.classes[2].diversity is None and found.classes[2].accuracy is not None
    assert found.classes[3].accuracy_real is not None and found.classes[3].kid is not None
    assert len(found.real[3]) == 0
    assert sheets.contact(found)
    with pytest.raises(DataError, match="no test images"):
        inspect(job_of(replace(images, test_x=images.test_x[:0], test_y=images.test_y[:0])), source=Drawn(images))


def test_what_cannot_be_inspected(images: Dataset) -> None:
    with pytest.raises(ConfigError, match="name a generator"):
        inspect(job_of(images), EACH, QUICK)
    with pytest.raises(ConfigError, match="at least 2"):
        inspect(job_of(images), 1, QUICK, source=Drawn(images))

    class Nothing(Drawn):
        def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
            raise PoolError("out of paint")

    with pytest.raises(PoolError, match="out of paint"):
        inspect(job_of(images), EACH, QUICK, source=Nothing(images, "nothing"))


# sheets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True])
def test_sheets_and_page(images: Dataset, tmp_path: Path, colour: bool) -> None:
    data = coloured(images) if colour else images
    found = inspect(job_of(data), 14, QUICK, source=Drawn(data, "equal"))
    files = sheets.write_quality(found, tmp_path / "out")
    assert set(files) == {"sheet-1", "pairs", "md", "html", "json"}
    with Image.open(files["sheet-1"]) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    assert pixels.shape[1] > 800
    inside = pixels[:, 150:-400]  # the images, without the words on both sides
    assert (np.ptp(inside, axis=2).max() > 40) == colour
    values = json.loads(Path(files["json"]).read_text())
    assert values["failed"] == ["north-east"]
    assert values["classes"]["north-east"]["exact"] == 3
    assert values["recipe"] == {"steps": 80, "batch": 16, "lr": 5e-3}
    html = Path(files["html"]).read_text()
    assert (
        html.count("data:image/png;base64,") == 2 and "fails: copies" in html and "http" not in html.split("<body>")[1]
    )
    table = [line for line in Path(files["md"]).read_text().splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1


def test_many_classes_take_several_sheets(good: Quality) -> None:
    many = replace(good, classes=good.classes * 6, real=good.real * 6, fake=good.fake * 6)
    assert len(sheets.contact(many)) == 2


def test_large_images_are_shrunk(good: Quality) -> None:
    big = torch.randint(0, 256, (2, 3, 200, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert sheets.strip(big, 3, big).shape == (52, 3 * 77, 3)


# costs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Precise:
    """A generator with a choice of precisions."""

    precision: Literal["fp32", "bf16"] = option("fp32", "of the weights")
    asked: ClassVar[list[int]] = []

    def load(
        self, classes: tuple[str, ...], shape: tuple[int, int, int], device: torch.device, public: object
    ) -> Drawn:
        source, whole = Drawn(tiny.data()), Drawn.generate

        def generate(labels: Sequence[int], indices: Sequence[int]) -> Tensor:
            self.asked.append(len(labels))
            return whole(source, labels, indices)

        source.generate = generate  # type: ignore[method-assign]
        return source


def test_measure_makes_every_image_once_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, data = Precise(), tiny.data()
    generator.asked.clear()
    found, made = measure("fp32", generator, data.classes, data.shape, torch.device("cpu"), 5)
    expected = Drawn(data).generate([0] * 5 + [1] * 5 + [2] * 5 + [3] * 5, list(range(5)) * 4)
    assert torch.equal(made, expected)
    assert generator.asked == [2, 2, 64, 64, 64]
    assert (found.batch, found.images, found.precision) == (64, 20, "fp32")
    assert found.seconds > 0 and found.per_core is not None and found.per_core > 0 and found.peak is not None
    assert found.bytes == {"images": Drawn(data).fresh.train_x.numel()}
    monkeypatch.setattr(cost, "QUICK", 0.0)  # as if it were slow
    generator.asked.clear()
    assert measure("fp32", generator, data.classes, data.shape, torch.device("cpu"), 7)[0].batch == 8
    assert generator.asked == [2, 2, 8, 8, 8, 8]


PEAK = """
import torch
from fedkeel.generators import cost
before = cost._forget_peak(torch.device("cpu"))
torch.ones(30_000_000).sum()
print(cost._peak(torch.device("cpu"), before))
"""


def test_peak_sees_memory_that_is_gone_again() -> None:
    # in a process of its own, as measures are: this one may give memory back to the system at any time
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    assert 100e6 < int(done.stdout) < 400e6


def test_a_gpu_is_begun_before_its_peak_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh process there is nothing of it to forget yet, and PyTorch refuses."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    assert cost._forget_peak(torch.device("cuda:0")) == 0
    assert calls == ["init", torch.device("cuda:0")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_a_gpu_in_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK.replace('"cpu"', '"cuda:0"').replace(".sum()", ".to('cuda:0').sum()")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert 100e6 < int(done.stdout) < 400e6


def test_precisions_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "name_of", lambda room, thing: "precise")
    assert [each.precision for each in variants(Precise(), ["bf16", "fp32", "bf16"]).values()] == ["bf16", "fp32"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"--precisions = 'bf17': must be one of 'fp32', 'bf16'.*'bf16'\?"):
        variants(Precise(), ["bf17"])
    with pytest.raises(ConfigError, match="such as fp32"):
        variants(Precise(), [])
    assert list(variants(Gaussian(), None)) == [""]
    with pytest.raises(ConfigError, match="'precise' has no precisions"):
        variants(Gaussian(), ["fp32"])
    with pytest.raises(ConfigError, match="name a generator"):
        variants(None, None)


def test_costs_of_what_works_and_what_does_not(
    images: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A precision that fails is a row with its reason; differences are from fp32; all failing is an error."""
    monkeypatch.setattr(cost, "name_of", lambda room, thing: "precise")
    made = Drawn(images).generate([label for label in range(4) for _ in range(3)], list(range(3)) * 4)

    def apart(job: Job, precision: str, *_: object) -> tuple[Cost, Tensor | None, bool]:
        if precision == "bf16":
            return Cost(precision, {}, error="no such weights"), None, True
        return Cost(precision, {"unet": 10}, 1.0, 0.5, 2.0, 1000, 8, 12), made, False

    monkeypatch.setattr(cost, "measure_apart", apart)
    job = job_of(images)
    found = costs(job, ["fp32", "bf16"], 3, Precise())
    assert [each.difference for each in found] == [0.0, None]
    assert found[0].accuracy is not None and found[0].accuracy > 0.9
    assert sheets.cost_rows(found)[1][2] == "failed: no such weights"
    files = sheets.write_costs(found, cost.machine(job), tmp_path)
    rows = json.loads(Path(files["json"]).read_text())["precisions"]
    assert rows[1]["seconds"] is None and rows[0]["bytes"] == {"unet": 10}
    with pytest.raises(PoolError.__base__, match="no such weights"):
        costs(job, ["bf16"], 3, Precise())


# the command ----------------------------------------------------------------------------------------------------------

CONFIG = """
clients = 4
device = "cpu"
data = { name = "fashion", train_limit = 200, test_limit = 100 }
partition = { name = "iid" }
model = { name = "mlp", hidden = [8] }
generator = { name = "gaussian" }
pool = { dir = "pool" }
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "Recipe", lambda: Recipe(60, 32, 5e-3))
    (tmp_path / "exp.toml").write_text(CONFIG)
    return Path("exp.toml")


def fedkeel_(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="fedkeel")


def test_inspect_from_the_command_line(config: Path) -> None:
    result = fedkeel_("generate", config, "--inspect", "--images", "5", "--json")
    values = json.loads(result.stdout)
    assert result.exit_code == (1 if values["failed"] else 0)
    assert set(values["classes"]) >= {"trouser", "bag"}
    assert Path("runs/exp/generator/sheet-1.png").is_file()
    assert Path(values["files"]["html"]) == Path("runs/exp/generator/quality.html")
    assert len(list(Path("pool").glob("*/part-*"))) == 10


def test_a_failing_class_is_exit_code_1(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "Limits", lambda: Limits(diversity=99.0))
    result = fedkeel_("generate", config, "--inspect", "--images", "3", "--out", "there")
    assert result.exit_code == 1
    assert "trouser fails: diversity" in result.stdout and "nearest class" in result.stdout
    assert Path("there/quality.json").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--images", "3"], "--images = '3': goes with --profile or --inspect"),
        (["--inspect", "--precisions", "fp32"], "--precisions = 'fp32': goes with --profile"),
        (["--inspect", "--profile"], "not both"),
        (["--inspect", "--client", "4"], "--client = 4: clients are numbered 0 to 3"),
        (["--profile", "--precisions", "fp32"], "'gaussian' has no precisions"),
        (["--inspect", "--images", "1"], "at least 2"),
        (["--inspect", "generator.name=folder", "generator.dir=nowhere"], "nowhere"),
    ],
)
def test_mistakes(config: Path, words: list[str], named: str) -> None:
    result = fedkeel_("generate", config, *words)
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.output


def test_inspect_without_a_generator(config: Path) -> None:
    config.write_text(CONFIG.replace('generator = { name = "gaussian" }', ""))
    for what in ("--inspect", "--profile"):
        result = fedkeel_("generate", config, what)
        assert result.exit_code == 2 and "name a generator" in result.stderr


def test_profile_in_a_process_of_its_own(config: Path) -> None:
    result = fedkeel_("generate", config, "--profile", "--images", "4", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["precisions"]
    assert row["precision"] == "" and row["images"] == 40 and row["error"] == ""
    assert row["bytes"]["parameters"] > 0 and row["seconds"] > 0 and row["per_core"] > 0 and row["peak"] > 0
    assert 0.1 < row["accuracy"] <= 1
    assert "parameters" in Path("runs/exp/generator/profile.md").read_text()


@pytest.mark.slow
def test_precisions_of_a_pipeline(config: Path, tmp_path: Path) -> None:
    """The real loading and 4-bit code on a pipeline of random weights: fewer bits, fewer bytes, near images."""
    pytest.importorskip("diffusers")
    from standins.pipeline import pipeline

    pipeline(tmp_path / "sd", widths=(32, 64), tokens=77)
    keys = ["generator.name=stable-diffusion", "generator.model=sd", "generator.resolution=32", "generator.steps=2"]
    words = ("--profile", "--images", "1", "--precisions", "fp32,bf16,uint4,nf4", "--json", "generator.stored=0", *keys)
    result = fedkeel_("generate", config, *words)
    assert result.exit_code == 0, result.output
    rows = {row["precision"]: row for row in json.loads(result.stdout)["precisions"]}
    unet = {name: rows[name]["bytes"]["unet"] for name in ("fp32", "bf16", "uint4")}
    assert unet["fp32"] == pytest.approx(2 * unet["bf16"], rel=0.02) and unet["uint4"] < unet["bf16"]
    assert rows["fp32"]["difference"] == 0 < rows["bf16"]["difference"] < rows["uint4"]["difference"] < 30
    assert "CUDA" in rows["nf4"]["error"] or torch.cuda.is_available()
