"""What every source of images must do; a new generator joins by an entry in `READY`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedkeel.data.fashion import Fashion
from fedkeel.data.sources import ImageFolder
from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.generators.base import Remembers, Source
from fedkeel.generators.flow import CHUNK, Bundled, FlowConfig, FlowNet, amend, euler, save
from fedkeel.generators.folder import Folder
from fedkeel.generators.gaussian import Gaussian, fit
from fedkeel.generators.names import marks, match
from fedkeel.generators.public import Public
from fedkeel.generators.store import Pool
from fedkeel.options import build
from fedkeel.records import Samples
from fedkeel.registry import get

CPU = torch.device("cpu")
DATA = Fashion(train_limit=400, test_limit=10).load()
FEW = ("dress", "ankle boot", "t-shirt/top")


def picture(path: Path, x: torch.Tensor) -> None:
    """One image [C, H, W] uint8 as a file."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real images of each of three classes, in folders."""
    root = tmp_path_factory.mktemp("pictures")
    for name in FEW:
        for i, x in enumerate(DATA.train_x[DATA.train_y == DATA.classes.index(name)]):
            picture(root / name.replace("/", "-") / f"{i:03}.png", x)
    return root


READY: dict[str, Callable[[Path], dict[str, object]]] = {
    "bundled": lambda pictures: {},
    "gaussian": lambda pictures: {},
    "folder": lambda pictures: {"dir": str(pictures)},
    "public": lambda pictures: {},
}
PUBLIC = Samples.real_ones(DATA.train_x, DATA.train_y)


def few(samples: Samples) -> Samples:
    """Those of the classes FEW, with their numbers there."""
    labels = torch.tensor([FEW.index(name) if name in FEW else -1 for name in DATA.classes])[samples.y]
    return Samples.real_ones(samples.x[labels >= 0], labels[labels >= 0])


def source_of(name: str, pictures: Path, **options: object) -> Source:
    made = build(get("generators", name), {**READY[name](pictures), **options}, "generator")
    source: Source = made.load(FEW, (1, 28, 28), CPU, few(PUBLIC))
    return source


@pytest.fixture(params=sorted(READY))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_right_count_type_and_size(name: str, pictures: Path) -> None:
    source = source_of(name, pictures)
    x = source.generate([0, 2, 2, 1, 0], [0, 0, 1, 7, 3])
    assert x.dtype == torch.uint8
    assert x.shape == (5, 1, 28, 28)
    assert len({image.numpy().tobytes() for image in x}) == 5
    assert source.generate([], []).shape == (0, 1, 28, 28)
    assert source.classes == FEW
    assert isinstance(source.prompt(0), str)
    assert all(isinstance(size, int) for size in source.memory_bytes().values())


def test_the_batch_changes_no_image(name: str, pictures: Path) -> None:
    """Neither its size, nor the place in it, nor what else is in it."""
    source = source_of(name, pictures)
    labels, indices = [0, 1, 2] * 30, [i // 3 for i in range(90)]
    whole = source.generate(labels, indices)
    assert len(whole) > CHUNK
    assert torch.equal(whole, source_of(name, pictures).generate(labels, indices))
    assert torch.equal(whole.flip(0), source.generate(labels[::-1], indices[::-1]))
    alone = [source.generate([labels[row]], [indices[row]])[0] for row in (0, 63, 64)]
    assert torch.equal(whole[[0, 63, 64]], torch.stack(alone))


@pytest.mark.parametrize("name", ["bundled", "gaussian"])
def test_images_are_of_their_class_and_seed(name: str, pictures: Path) -> None:
    """The class means of made and real images are closest where the classes are the same."""
    source = source_of(name, pictures)
    x = source.generate([0] * 20 + [1] * 20 + [2] * 20, list(range(20)) * 3).float().reshape(3, 20, -1).mean(1)
    real = torch.stack([DATA.train_x[DATA.train_y == DATA.classes.index(c)].float().mean(0).flatten() for c in FEW])
    assert torch.cdist(x, real).argmin(1).tolist() == [0, 1, 2]
    other = source_of(name, pictures, seed=1)
    assert not torch.equal(source.generate([0], [0]), other.generate([0], [0]))
    assert source.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("name", "fingerprint", "pixels"),
    [
        ("bundled", "fea3cffcceced114", [[53, 92, 128, 122], [99, 28, 196, 197]]),
        ("gaussian", "fa45bfadbd61f586", [[182, 195, 204, 183], [19, 138, 139, 157]]),
    ],
)
def test_what_images_are_under_a_fingerprint(name: str, fingerprint: str, pixels: list[list[int]]) -> None:
    """Recorded, but for rounding: pools that are there have these. Whoever changes images changes what they go by."""
    source = build(get("generators", name), {}, "generator").load(("dress", "bag"), (1, 28, 28), CPU)
    assert source.fingerprint()[:16] == fingerprint
    x = source.generate([0, 1], [0, 7])[:, 0, 6:26:5, 14].int()
    assert (x - torch.tensor(pixels)).abs().max() <= 2


@pytest.mark.parametrize("name", ["bundled", "gaussian"])
def test_a_class_is_known_by_its_name(name: str) -> None:
    made = build(get("generators", name), {}, "generator")
    one = made.load(("bag", "dress"), (1, 28, 28), CPU)
    two = made.load(("Dress",), (1, 28, 28), CPU)
    assert torch.equal(one.generate([1], [3]), two.generate([0], [3]))
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("name", ["bundled", "gaussian"])
@pytest.mark.parametrize(("classes", "shape"), [(("frog", "dress"), (1, 28, 28)), (("dress",), (3, 32, 32))])
def test_what_it_cannot_make_is_refused(name: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> None:
    with pytest.raises(PoolError, match=r"28x28x1: t-shirt/top, trouser"):
        build(get("generators", name), {}, "generator").load(classes, shape, CPU)


def test_fingerprint_is_stable_and_follows_the_options(name: str, pictures: Path) -> None:
    assert source_of(name, pictures).fingerprint() == source_of(name, pictures).fingerprint()
    if name == "bundled":
        assert source_of(name, pictures, steps=1).fingerprint() != source_of(name, pictures, steps=2).fingerprint()
    if name == "folder":
        assert source_of(name, pictures).fingerprint() != source_of(name, pictures, resize=True).fingerprint()


def test_a_flow_of_another_size_loads_through_the_same_class(tmp_path: Path) -> None:
    config = FlowConfig(("cat", "dog"), (3, 16, 16), widths=(8, 16, 32), condition=16)
    path = tmp_path / "flow-tiny.safetensors"
    save(FlowNet(config), config, path, "untrained")
    source = Bundled(path=str(path), steps=1).load(("dog",), (3, 16, 16), CPU)
    assert source.generate([0, 0], [0, 1]).shape == (2, 3, 16, 16)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="flow-tiny"):
        Bundled(path=str(path)).load(("dog",), (3, 16, 16), CPU)


def test_a_flow_that_returns_no_numbers_is_noticed(tmp_path: Path) -> None:
    config = FlowConfig(("cat",), (1, 8, 8), widths=(8,), condition=8)
    net = FlowNet(config)
    torch.nn.init.constant_(net.last.bias, float("nan"))
    save(net, config, tmp_path / "flow.safetensors", "broken")
    source = Bundled(path=str(tmp_path / "flow.safetensors")).load(("cat",), (1, 8, 8), CPU)
    with pytest.raises(PoolError, match=r"'cat'.*not finite"):
        source.generate([0], [5])


@pytest.mark.parametrize("count", [3, 40])
def test_gaussian_by_hand(count: int) -> None:
    """Mean and covariance of what it would draw are those of the images: basis' basis = the covariance."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 1, 2, 3), generator=stream, dtype=torch.uint8)
    fitted = fit(Samples.real_ones(x, torch.zeros(count, dtype=torch.int64)), ("a",), rank=6)
    rows = x.flatten(1).float()
    assert torch.allclose(fitted.mean[0].float(), rows.mean(0), rtol=1e-3)
    basis = fitted.basis[0].float()
    assert torch.allclose(basis.T @ basis, rows.T.cov(), rtol=1e-2, atol=20.0)


def test_gaussian_can_be_fitted_saved_and_refitted(tmp_path: Path) -> None:
    samples = Samples.real_ones(DATA.train_x, DATA.train_y)
    fit(samples, DATA.classes, rank=10).save(tmp_path / "own.safetensors")
    source = Gaussian(path=str(tmp_path / "own.safetensors")).load(FEW, (1, 28, 28), CPU)
    assert source.generate([1], [0]).shape == (1, 1, 28, 28)
    dresses = samples.take(samples.y == 3)
    with pytest.raises(PoolError, match="'t-shirt/top' has 0"):
        fit(dresses, DATA.classes)
    with pytest.raises(DataError, match="absent"):
        Gaussian(path=str(tmp_path / "absent.safetensors")).load(FEW, (1, 28, 28), CPU)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="no fitted Gaussians"):
        Gaussian(path=str(tmp_path / "other.safetensors")).load(FEW, (1, 28, 28), CPU)


def test_gaussian_is_fitted_to_public_images_where_the_package_has_none() -> None:
    """Sizes and classes that no file in the package knows; a file that is named, or knows them, comes first."""
    colour = Samples.real_ones(DATA.train_x[:60, :, ::2, ::2].expand(-1, 3, -1, -1), torch.arange(60) % 2)
    source = Gaussian().load(("one", "two"), (3, 14, 14), CPU, colour)
    assert source.generate([1, 0], [0, 0]).shape == (2, 3, 14, 14)
    assert source.mean[1].float() == pytest.approx(colour.x[1::2].float().mean(0).flatten(), rel=1e-3)
    bundled = Gaussian().load(FEW, (1, 28, 28), CPU)
    assert Gaussian().load(FEW, (1, 28, 28), CPU, few(PUBLIC)).fingerprint() == bundled.fingerprint()
    with pytest.raises(PoolError, match=r"14x14x3 images of one, two; it has .*; set data\.public_limit"):
        Gaussian().load(("one", "two"), (3, 14, 14), CPU)
    with pytest.raises(PoolError, match="'two' has 1"):
        Gaussian().load(("one", "two"), (3, 14, 14), CPU, colour.take(torch.tensor([0, 1, 2, 4])))


def test_public_images_are_served_as_they_are() -> None:
    public = few(PUBLIC)
    source = Public().load(FEW, (1, 28, 28), CPU, public)
    dresses = public.x[public.y == 0]
    assert torch.equal(source.generate([0] * 40, list(range(40))), dresses)
    with pytest.raises(PoolError, match=r"'dress': public image 41 is wanted, there are 40; raise data\.public_limit"):
        source.generate([0], [40])
    again = Public(repeat=True).load(FEW, (1, 28, 28), CPU, public)
    assert torch.equal(again.generate([0], [43]), dresses[3:4])
    lane = Pool(again, None, lanes=10).take(0, 7, 40)  # 7, 17, 27, 37, then 48 % 40, ...
    assert torch.equal(lane[:6], dresses[[7, 17, 27, 37, 8, 18]])
    assert sorted(marks(lane).tolist()) == sorted(marks(dresses).tolist())
    limited = Public(limit=30).load(FEW, (1, 28, 28), CPU, public)
    assert limited.memory_bytes() == {"images": 30 * 784}  # stratified: ten of each
    assert torch.equal(limited.generate([0], [9]), dresses[9:10])
    assert len({each.fingerprint() for each in (source, again, limited)}) == 3
    with pytest.raises(ConfigError, match=r"data\.public_limit = 0: generator 'public' needs public images"):
        Public().load(FEW, (1, 28, 28), CPU)
    with pytest.raises(PoolError, match="no images of ankle boot"):
        Public().load(FEW, (1, 28, 28), CPU, public.take(public.y != 1))


def test_a_weights_file_says_how_it_is_served_and_what_it_was_trained_on(tmp_path: Path) -> None:
    config, path = FlowConfig(("cat",), (1, 8, 8), widths=(8,), condition=8), tmp_path / "flow.safetensors"
    net, images = FlowNet(config), torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    save(net, config, path, "as it was saved before")
    old = Bundled(path=str(path)).load(("cat",), (1, 8, 8), CPU)
    assert (old.steps, old.trained_on) == (1, None)
    amend(path, images, steps=3)
    amend(path)  # nothing to add, nothing lost
    new = Bundled(path=str(path)).load(("cat",), (1, 8, 8), CPU)
    assert new.steps == 3 and new.trained_on is not None and torch.equal(new.trained_on, marks(images))
    one = Bundled(path=str(path), steps=1).load(("cat",), (1, 8, 8), CPU)
    assert torch.equal(one.generate([0], [4]), old.generate([0], [4]))
    assert not torch.equal(one.generate([0], [4]), new.generate([0], [4]))
    save(net, config, path, "with its images", images)
    assert torch.equal(Bundled(path=str(path)).load(("cat",), (1, 8, 8), CPU).trained_on, marks(images))


@pytest.mark.parametrize("name", ["bundled", "gaussian"])
def test_the_bundled_ones_know_their_images(name: str) -> None:
    """By the hashes beside the data: 10,000 public ones, none of which a client of `fashion` has."""
    source = build(get("generators", name), {}, "generator").load(DATA.classes, DATA.shape, CPU)
    assert isinstance(source, Remembers) and source.trained_on is not None
    assert len(source.trained_on.unique()) == 10_000
    assert not torch.isin(marks(Fashion().load().train_x), source.trained_on).any()


def test_other_gaussians_do_not_know_their_images(tmp_path: Path) -> None:
    """One of a file of one's own, also of the same name, and one that was fitted to public images, which nobody has."""
    fit(PUBLIC, DATA.classes, rank=5).save(tmp_path / "gaussian-fashion.safetensors")
    assert Gaussian(path=str(tmp_path / "gaussian-fashion.safetensors")).load(FEW, (1, 28, 28), CPU).trained_on is None
    halves = Samples.real_ones(DATA.train_x, DATA.train_y % 2)
    assert Gaussian().load(("one", "two"), (1, 28, 28), CPU, halves).trained_on is None


def test_a_flow_that_predicts_the_image(tmp_path: Path) -> None:
    """Its velocity leads from where it is to what it predicts, here a grey of 0.5: (0.5 - x) / (1 - t), with 1 - t no
    less than 0.05; so Euler steps end there, however many. The file says what it predicts."""
    config = FlowConfig(("cat",), (1, 8, 8), patch=4, widths=(16,), condition=16, predicts="image")
    net = FlowNet(config)
    nn.init.constant_(net.last.bias, 0.5)
    x, ids = torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    t = torch.tensor([0.0, 0.75, 0.99])
    by_hand = (0.5 - x) / torch.tensor([1.0, 0.25, 0.05]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(net(x, t, ids), by_hand)
    for steps in (1, 5):
        torch.testing.assert_close(euler(net, x, ids, steps), torch.full_like(x, 0.5))
    path = tmp_path / "flow-grey.safetensors"
    save(net, config, path, "grey")
    made = Bundled(path=str(path)).load(("cat",), (1, 8, 8), CPU).generate([0], [0])
    assert set(made.unique().tolist()) == {191}  # 1.5 * 127.5


@pytest.mark.parametrize(
    ("classes", "shape", "public"),
    [(("Ship", "frog"), (3, 32, 32), 10_000), (("SeaLake", "Annual Crop"), (3, 64, 64), 2_000)],
    ids=["cifar10", "eurosat"],
)
def test_the_other_bundled_flows(classes: tuple[str, ...], shape: tuple[int, int, int], public: int) -> None:
    """Found by classes and size; their classes differ more than the images of one."""
    source = Bundled(steps=2).load(classes, shape, CPU)
    assert source.trained_on is not None and len(source.trained_on.unique()) == public
    assert Bundled().load(classes, shape, CPU).steps == 8
    x = source.generate([0] * 8 + [1] * 8, [*range(8)] * 2)
    assert x.shape == (16, *shape) and x.dtype == torch.uint8
    means = x.float().mean((2, 3))
    assert (means[:8].mean(0) - means[8:].mean(0)).norm() > 20


@pytest.mark.parametrize("text", ["[]", "{}", '{"shape": [3, 8]}', '{"shape": [1, 8, 8], "classes": ["a"]}', "7"])
def test_a_weights_file_of_something_else_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"config": text})
    with pytest.raises(DataError, match=r"other\.safetensors is not a weights file of a flow"):
        Bundled(path=str(path)).load(("a",), (1, 8, 8), CPU)


def test_marks() -> None:
    """The first eight bytes of SHA-256, as a signed number, whatever the memory looks like."""
    x = torch.tensor([[[[1, 2], [3, 4]]], [[[0, 0], [0, 0]]]], dtype=torch.uint8)
    wanted = [hashlib.sha256(bytes(pixels)).digest()[:8] for pixels in ([1, 2, 3, 4], [0, 0, 0, 0])]
    assert marks(x).tolist() == [int.from_bytes(each, "little", signed=True) for each in wanted]
    assert torch.equal(marks(x.to(memory_format=torch.channels_last)), marks(x))
    assert len(marks(x[:0])) == 0


def test_folder_serves_the_files_in_order(pictures: Path) -> None:
    source = source_of("folder", pictures)
    dresses = DATA.train_x[DATA.train_y == DATA.classes.index("dress")]
    assert torch.equal(source.generate([0] * 40, list(range(40))), dresses)
    with pytest.raises(PoolError, match="'dress': image 41 is wanted, there are 40"):
        source.generate([0], [40])


def test_folder_refuses_or_resizes_other_sizes(pictures: Path) -> None:
    with pytest.raises(PoolError, match="28x28, wanted 32x32"):
        Folder(dir=str(pictures)).load(FEW, (3, 32, 32), CPU).generate([0], [0])
    x = Folder(dir=str(pictures), resize=True).load(FEW, (3, 32, 32), CPU).generate([0], [0])
    assert x.shape == (1, 3, 32, 32)


def test_folder_has_the_pixels_of_the_data_room(tmp_path: Path) -> None:
    """Of any mode and size: a real image is the same one as data and as a control. Fine stripes become grey."""
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (24, 24, 4), dtype=torch.uint8, generator=rng).numpy()
    stripes = torch.tensor([255, 0]).to(torch.uint8).repeat(24, 12).numpy()
    made = [Image.fromarray(colours), Image.fromarray(colours[..., :3]), Image.fromarray(stripes)]
    made += [made[0].quantize(16), made[2].convert("LA"), made[2].convert("1")]
    for split in ("train", "test"):
        (tmp_path / split / "dress").mkdir(parents=True)
        for at, each in enumerate(made):
            each.save(tmp_path / split / "dress" / f"{at}.png")
    for channels in (1, 3):
        theirs = ImageFolder(dir=str(tmp_path), size=8, channels=channels).load()  # type: ignore[arg-type]
        source = Folder(dir=str(tmp_path / "train"), resize=True).load(("dress",), theirs.shape, CPU)
        assert torch.equal(source.generate([0] * len(made), list(range(len(made)))), theirs.train_x)
    x = source.generate([0], [2]).int()
    assert (x[..., 1:-1] - 127).abs().max() <= 30 and (x - 127).abs().max() <= 60


def test_folder_refuses_more_than_eight_bits(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "dress").mkdir()
    Image.fromarray(torch.full((8, 8), 40_000).to(torch.uint16).numpy()).save(tmp_path / "dress" / "1.png")
    with pytest.raises(DataError, match=r"class 'dress', image 1: more than 8 bits a channel \(mode I;16\)"):
        Folder(dir=str(tmp_path)).load(("dress",), (1, 8, 8), CPU).generate([0], [0])


def test_folder_fingerprint_follows_its_pictures(tmp_path: Path) -> None:
    prints = set()
    for grey in (7, 8):
        picture(tmp_path / "dress" / "1.png", torch.full((1, 8, 8), grey, dtype=torch.uint8))
        prints.add(Folder(dir=str(tmp_path)).load(("dress",), (1, 8, 8), CPU).fingerprint())
    assert len(prints) == 2


def test_folder_fingerprint_follows_how_files_are_decoded(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_of("folder", pictures).fingerprint()
    monkeypatch.setattr("fedkeel.generators.folder.DECODED", 1)
    assert source_of("folder", pictures).fingerprint() != before


def test_folder_reads_tables_of_the_hub(pictures: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [sorted((pictures / name.replace("/", "-")).iterdir()) for name in FEW]
    rows = [(path, label) for i in range(4) for label, path in enumerate(each[i] for each in files)]
    features = {"image": {"_type": "Image"}, "label": {"names": [*FEW, "frog"], "_type": "ClassLabel"}}
    for number in range(2):
        part = rows[number * 6 : number * 6 + 6]
        table = pa.table(
            {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in part],
                "label": [label for _, label in part],
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
    source = Folder(dir=str(tmp_path)).load(FEW, (1, 28, 28), CPU)
    expected = source_of("folder", pictures).generate([0, 1, 2], [0, 3, 1])
    assert torch.equal(source.generate([0, 1, 2], [0, 3, 1]), expected)
    with pytest.raises(PoolError, match="no images of frog"):
        Folder(dir=str(tmp_path)).load(("frog",), (1, 28, 28), CPU)
    (tmp_path / "above" / "data").mkdir(parents=True)  # as data sets lie on the hub, and as one file
    table = pa.concat_tables([pq.read_table(path) for path in sorted(tmp_path.glob("train-*"))])
    pq.write_table(table, tmp_path / "above" / "data" / "train.parquet")
    again = Folder(dir=str(tmp_path / "above")).load(FEW, (1, 28, 28), CPU)
    assert torch.equal(again.generate([0, 1, 2], [0, 3, 1]), expected)
    (tmp_path / "train-00002.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"train-00002\.parquet"):
        Folder(dir=str(tmp_path)).load(FEW, (1, 28, 28), CPU)


@pytest.mark.parametrize(
    ("label", "image", "why"),
    [
        (-1, b"x", ", split train, row 1: label -1 is not in 0..1"),  # the hub's word for no label
        (None, b"x", r"train-0\.parquet, row 1: the label is missing"),
        (2, b"x", ", split train, row 1: label 2 is not in 0..1"),
        (1, None, r"train-0\.parquet, row 1: there is no picture"),
    ],
)
def test_folder_names_the_row_that_lacks_something(
    label: int | None, image: bytes | None, why: str, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": each, "path": ""} for each in (b"x", image, b"x")], "label": [0, label, 1]})
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(note), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=why):
        Folder(dir=str(tmp_path)).load(("cat", "dog"), (1, 8, 8), CPU)


def test_folder_takes_the_first_of_several_columns_of_classes(tmp_path: Path) -> None:
    """As in CIFAR-100: fine classes, then coarse ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture(tmp_path / "1.png", torch.full((1, 8, 8), 7, dtype=torch.uint8))
    kinds = {"fine": ["cat", "trout"], "coarse": ["fish", "pet"]}
    features = {"image": {"_type": "Image"}} | {
        name: {"names": names, "_type": "ClassLabel"} for name, names in kinds.items()
    }
    one = {"bytes": (tmp_path / "1.png").read_bytes(), "path": None}
    table = pa.table({"image": [one, one], "fine": [0, 1], "coarse": [1, 0]})
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(note), tmp_path / "train.parquet")
    x = Folder(dir=str(tmp_path)).load(("trout",), (1, 8, 8), CPU).generate([0], [0])
    assert torch.equal(x, torch.full((1, 1, 8, 8), 7, dtype=torch.uint8))


def test_folder_says_what_is_wrong_with_it(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator\.dir"):
        Folder().load(FEW, (1, 28, 28), CPU)
    with pytest.raises(DataError, match="neither"):
        Folder(dir=str(tmp_path)).load(FEW, (1, 28, 28), CPU)
    with pytest.raises(PoolError, match="no images of frog; there are ankle boot"):
        Folder(dir=str(pictures)).load(("dress", "frog"), (1, 28, 28), CPU)
    (tmp_path / "frog").mkdir()
    (tmp_path / "frog" / "._1.png").write_bytes(b"hidden")
    (tmp_path / "frog" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="'frog', image 1"):
        Folder(dir=str(tmp_path)).load(("frog",), (1, 28, 28), CPU).generate([0], [0])
    (tmp_path / "splits" / "train" / "frog").mkdir(parents=True)
    (tmp_path / "splits" / "test").mkdir()
    with pytest.raises(ConfigError, match=r"a folder per class, and holds test, train. Did you mean '.*splits/train'"):
        Folder(dir=str(tmp_path / "splits")).load(("frog",), (1, 28, 28), CPU)


def test_global_randomness_is_left_alone(name: str, pictures: Path) -> None:
    before = torch.get_rng_state()
    source_of(name, pictures).generate([0], [0])
    assert torch.equal(torch.get_rng_state(), before)


def test_names_across_spellings() -> None:
    assert match(["T - shirt / top", "Ankle_boot"], ["ankle boot", "t-shirt/top"]) == [1, 0]
    assert match(["C++", "C"], ["C", "C++"]) == [1, 0]
    assert match(["+", "-"], ["-", "+"]) == [1, 0] and match(["caf\u00e9"], ["cafe\u0301"]) == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bundled_on_a_gpu() -> None:
    """Noise is drawn on the CPU, so the images agree up to rounding."""
    sources = [Bundled().load(FEW, (1, 28, 28), torch.device(name)) for name in ("cpu", "cuda")]
    one, two = (source.generate([0, 1, 2], [0, 0, 0]).int() for source in sources)
    assert (one - two).abs().max() <= 2
