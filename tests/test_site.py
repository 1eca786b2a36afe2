"""A site's own data: three places, classes by name, the federation's size and normalisation."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedkeel.data import site
from fedkeel.data.dataset import Dataset
from fedkeel.data.site import Target, load
from fedkeel.errors import ConfigError, DataError, EmptyClient, StorageError

TARGET = Target(("cat", "dog", "fox"), (1, 16, 16), (0.25,), (0.5,))
X = torch.arange(6 * 256, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(6, 1, 16, 16)


def png(number, size=16, mode="L"):
    out = io.BytesIO()
    Image.fromarray(X[number, 0].numpy()).convert(mode).resize((size, size)).save(out, "PNG")
    return out.getvalue()


def folder(root, split, names, size=16, mode="L"):
    for number, name in enumerate(names):
        place = root / split / name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(number, size, mode))
    return str(root)


def parquet(path, labels, names):
    table = pa.table(
        {"image": [{"bytes": png(i), "path": None} for i in range(len(labels))], "label": pa.array(labels, pa.int64())}
    )
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    meta = {b"huggingface": f'{{"info": {{"features": {str(features).replace(chr(39), chr(34))}}}}}'.encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(meta), path)


def test_parquet(tmp_path):
    parquet(tmp_path / "data" / "train-0.parquet", [1, 0, 1], ["dog", "fox"])
    found = load(str(tmp_path), TARGET)
    assert found.train_y.tolist() == [2, 1, 2] and torch.equal(found.train_x, X[:3])
    assert (found.classes, found.mean, found.std) == (TARGET.classes, (0.25,), (0.5,))
    assert found.test_x.shape == (0, 1, 16, 16) and found.test_y.dtype == torch.int64
    parquet(tmp_path / "data" / "test-0.parquet", [0], ["dog", "fox"])
    assert load(str(tmp_path), TARGET).test_y.tolist() == [1]


def test_pictures_with_and_without_splits(tmp_path):
    both = folder(tmp_path / "both", "train", ["fox", "cat"])
    folder(tmp_path / "both", "test", ["fox"])
    found = load(both, TARGET)
    assert sorted(found.train_y.tolist()) == [0, 2] and found.test_y.tolist() == [2]
    assert torch.equal(found.train_x[found.train_y == 2], X[:1])
    plain = load(folder(tmp_path / "plain", "", ["dog", "cat"]), TARGET)
    assert plain.train_y.tolist() == [0, 1] and len(plain.test_y) == 0


def test_pictures_are_brought_to_the_federations_size(tmp_path):
    found = load(folder(tmp_path, "train", ["dog"], size=40, mode="RGB"), TARGET)
    assert found.train_x.shape == (1, 1, 16, 16) and found.train_x.dtype == torch.uint8


def test_fine_stripes_become_grey_when_shrunk(tmp_path):
    """Columns of one pixel, black and white: without a filter all that is left would be one of the two."""
    stripes = np.zeros((48, 48), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "train" / "dog").mkdir(parents=True)
    Image.fromarray(stripes).save(tmp_path / "train" / "dog" / "1.png")
    x = load(str(tmp_path), TARGET).train_x.int()
    assert (x[..., 1:-1] - 127).abs().max() <= 30 and (x - 127).abs().max() <= 60


def numbered():
    return X.numpy(), np.array([2, 0, 1, 1, 0, 2])


def named():
    return X[:2, 0], ["fox", "cat"]


def as_dataset():
    y = torch.tensor([1, 0])
    return Dataset("own", ("fox", "dog"), X[:2], y, X[2:4], y, (0.9,), (0.9,))


def wrong_size():
    return X[:, :, :8], [0] * 6


def wrong_number():
    return X, [0, 1, 2, 3, 0, 0]


def floats():
    return X, [0.5] * 6


def too_few():
    return X, [0, 1]


def nothing():
    return X[:0], []


def unlike():
    return "images"


def test_functions():
    assert load("test_site:numbered", TARGET).train_y.tolist() == [2, 0, 1, 1, 0, 2]
    found = load("test_site:named", TARGET)
    assert found.train_y.tolist() == [2, 0] and torch.equal(found.train_x, X[:2])
    found = load("test_site:as_dataset", TARGET)
    assert found.train_y.tolist() == [1, 2] and found.test_y.tolist() == [1, 2]
    assert found.mean == (0.25,), "the federation's"


@pytest.mark.parametrize(
    ("place", "error", "why"),
    [
        ("nowhere", ConfigError, "data = 'nowhere': there is no such folder on this machine"),
        ("no_such_module:load", ConfigError, "cannot be imported on this machine"),
        ("test_site:no_such_function", ConfigError, "cannot be imported on this machine"),
        (
            "test_site:wrong_size",
            DataError,
            "images are 1x8x16 (channels x height x width), the federation's",
        ),
        ("test_site:wrong_number", DataError, "row 3: label 3 is not in 0..2"),
        ("test_site:floats", DataError, "labels must be class names or whole numbers"),
        ("test_site:too_few", DataError, "6 images but 2 labels"),
        ("test_site:nothing", DataError, "there are no pictures"),
        ("test_site:unlike", DataError, "returned str: a Dataset, or images and labels"),
    ],
)
def test_what_does_not_fit_is_named(place, error, why):
    with pytest.raises(error, match=re.escape(why)):
        load(place, TARGET)


def test_a_class_that_the_federation_does_not_have(tmp_path):
    place = folder(tmp_path, "train", ["dogs"])
    with pytest.raises(DataError, match=r"class 'dogs' is none of the federation's, which are cat, dog, fox\. Did you"):
        load(place, TARGET)
    accented = replace(TARGET, classes=("caf\u00e9", "dog", "fox"))  # one letter, and a letter with an accent
    assert load(folder(tmp_path / "macos", "train", ["cafe\u0301"]), accented).train_y.unique().tolist() == [0]
    parquet(tmp_path / "p" / "train.parquet", [0, 1], ["dog", "wolf"])
    with pytest.raises(DataError, match="class 'wolf'"):
        load(str(tmp_path / "p"), TARGET)
    (tmp_path / "p" / "train.parquet").rename(tmp_path / "p" / "other.parquet")
    with pytest.raises(DataError, match="there is no train"):
        load(str(tmp_path / "p"), TARGET)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyClient, match="there are no samples to train on"):
        load(str(tmp_path / "empty"), TARGET)


def test_nothing_of_the_sites_own_statistics(tmp_path):
    """One picture among black ones, among white ones and alone: mean and deviation are the federation's, and its bytes
    are the same, so that nothing of the others is in them."""
    loaded = []
    for name, grey in (("black", 0), ("white", 255), ("alone", None)):
        place = folder(tmp_path / name, "train", ["fox"])
        for number in range(20 if grey is not None else 0):
            (tmp_path / name / "train" / "cat").mkdir(exist_ok=True)
            Image.new("L", (16, 16), grey).save(tmp_path / name / "train" / "cat" / f"{number}.png")
        loaded.append(load(place, TARGET))
    assert [len(found.train_y) for found in loaded] == [21, 21, 1]
    for found in (*loaded, load("test_site:numbered", TARGET), load("test_site:as_dataset", TARGET)):
        assert (found.mean, found.std) == (TARGET.mean, TARGET.std)
    for found in loaded:
        assert torch.equal(found.train_x[found.train_y == 2], X[:1])


# the decoded copy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def decodings(monkeypatch):
    """How many splits have been decoded."""
    seen, decode = [], site.decode

    def counted(pictures, count, *rest):
        seen.append(count)
        return decode(pictures, count, *rest)

    monkeypatch.setattr(site, "decode", counted)
    return seen


def same(one, other):
    return all(
        torch.equal(getattr(one, part), getattr(other, part)) for part in ("train_x", "train_y", "test_x", "test_y")
    )


@pytest.mark.parametrize("kind", ["pictures", "parquet"])
def test_pictures_are_decoded_once(tmp_path, decodings, monkeypatch, kind):
    """A copy in several files, for this target alone, and only for the user whose node it is."""
    monkeypatch.setattr(site, "AT_ONCE", 2 * 256)
    place, copies = tmp_path / "data", tmp_path / "state" / "decoded"
    if kind == "pictures":
        folder(place, "train", ["fox", "cat", "dog", "fox", "cat"])
        folder(place, "test", ["fox"])
    else:
        parquet(place / "train-0.parquet", [1, 0, 1, 0, 1], ["dog", "fox"])
        parquet(place / "test-0.parquet", [1], ["dog", "fox"])
    plain = load(str(place), TARGET)
    assert decodings == [5, 1]
    for _ in range(3):
        assert same(load(str(place), TARGET, copies), plain)
    assert decodings == [5, 1, 5, 1]
    (there,) = copies.iterdir()
    assert len(list(there.glob("train-*.safetensors"))) == 3 and there.stat().st_mode & 0o777 == 0o700
    small = replace(TARGET, shape=(1, 8, 8))
    for _ in range(2):
        assert load(str(place), small, copies).train_x.shape == (5, 1, 8, 8)
    assert decodings == [5, 1, 5, 1, 5, 1] and len(list(copies.iterdir())) == 2


def changes(place):
    """What makes a copy one of other pictures."""
    first = sorted((place / "train").rglob("*.png"))[0]

    def rewritten():
        first.write_bytes(png(5))

    def touched():
        os.utime(first, (1, 1))

    def renamed():
        first.rename(first.with_name("another.png"))

    def more():
        (first.parent / "more.png").write_bytes(png(4))

    def less():
        first.unlink()

    return {each.__name__: each for each in (rewritten, touched, renamed, more, less)}


@pytest.mark.parametrize("change", ["rewritten", "touched", "renamed", "more", "less"])
def test_a_change_of_the_files_is_noticed(tmp_path, decodings, change):
    place, copies = tmp_path / "data", tmp_path / "state" / "decoded"
    folder(place, "train", ["fox", "cat", "dog"])
    load(str(place), TARGET, copies)
    changes(place)[change]()
    decodings.clear()
    assert same(load(str(place), TARGET, copies), load(str(place), TARGET))
    assert len(decodings) == 2
    assert same(load(str(place), TARGET, copies), load(str(place), TARGET)) and len(decodings) == 3


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "index", "strange"])
def test_a_damaged_copy_is_made_again(tmp_path, decodings, damage):
    place, copies = tmp_path / "data", tmp_path / "state" / "decoded"
    folder(place, "train", ["fox", "cat", "dog"])
    plain = load(str(place), TARGET, copies)
    (index,), (file,) = copies.glob("*/index.json"), copies.glob("*/train-0.safetensors")
    content = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "short":
        file.write_bytes(content[:-1])
    elif damage == "gone":
        file.unlink()
    else:
        index.write_text("{" if damage == "index" else json.dumps({**json.loads(index.read_text()), "train": [1]}))
    decodings.clear()
    assert same(load(str(place), TARGET, copies), plain) and decodings == [3]
    assert same(load(str(place), TARGET, copies), plain) and decodings == [3]


def test_without_room_for_a_copy_the_data_are_there_all_the_same(tmp_path, decodings, monkeypatch):
    place, copies = tmp_path / "data", tmp_path / "state" / "decoded"
    folder(place, "train", ["fox", "cat"])

    def full(path, tensors):
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr(site, "write_tensors", full)
    assert same(load(str(place), TARGET, copies), load(str(place), TARGET))
    assert list(copies.iterdir()) == [], "what was written before the disk was full is gone"


def test_the_nodes_own_folder_among_the_data_is_no_change(tmp_path, decodings):
    """Nor does a link that goes round in a circle matter."""
    parquet(tmp_path / "train-0.parquet", [1, 0], ["dog", "fox"])
    (tmp_path / "circle").symlink_to(tmp_path)
    for number in range(3):
        load(str(tmp_path), TARGET, tmp_path / "state" / "decoded")
        (tmp_path / "state" / "log").write_text(str(number))
    assert decodings == [2]


def test_what_a_function_returns_is_asked_for_each_time(tmp_path):
    load("test_site:numbered", TARGET, tmp_path / "decoded")
    assert not (tmp_path / "decoded").exists()
