"""A site's own data: three places, classes by name, the federation's size and normalisation."""

from __future__ import annotations

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from fedkeel.data.dataset import Dataset
from fedkeel.data.site import Target, load
from fedkeel.errors import ConfigError, DataError, EmptyClient

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
    parquet(tmp_path / "p" / "train.parquet", [0, 1], ["dog", "wolf"])
    with pytest.raises(DataError, match="class 'wolf'"):
        load(str(tmp_path / "p"), TARGET)
    (tmp_path / "p" / "train.parquet").rename(tmp_path / "p" / "other.parquet")
    with pytest.raises(DataError, match="there is no train"):
        load(str(tmp_path / "p"), TARGET)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyClient, match="there are no samples to train on"):
        load(str(tmp_path / "empty"), TARGET)


def test_nothing_of_the_sites_own_statistics():
    assert load("test_site:numbered", TARGET).std == (0.5,)
    assert tiny.data().std != (0.5,)
