"""Prompts: the lists are the data sets' own, each class is asked for in words that mean it and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fedkeel.data.fashion import BUNDLED
from fedkeel.errors import ConfigError, PoolError
from fedkeel.generators.prompts import TEMPLATES, Table, origin, phrases, prompt, reviewed, tables

SIZES = {
    "fashion": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny-imagenet": 200,
    "eurosat": 10,
    "imagefruit": 10,
    "imagenet100-cmc": 100,
    "imagenet100-fgl": 100,
    "cub": 200,
    "cars": 196,
}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EUROSAT = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
FOOD10 = (
    "acorn",
    "banana",
    "bell_pepper",
    "cauliflower",
    "espresso",
    "lemon",
    "mushroom",
    "orange",
    "pizza",
    "pomegranate",
)
"""The class names of a part of Tiny-ImageNet, with underscores."""

MENDED = {
    ("cifar100", "mouse"): "rodent",
    ("cifar100", "ray"): "fish",
    ("cifar100", "flatfish"): "flounder",
    ("cifar100", "seal"): "mammal",
    ("cifar100", "tank"): "army",
    ("cifar100", "plate"): "dish",
    ("cifar100", "can"): "food container",
    ("cifar100", "plain"): "grassland",
    ("cifar100", "keyboard"): "computer",
    ("cifar100", "apple"): "fruit",
    ("cifar100", "orange"): "fruit",
    ("cifar100", "train"): "railway",
    ("cifar100", "lawn_mower"): "lawn mower machine",
    ("cifar100", "caterpillar"): "larva",
    ("cifar100", "beetle"): "insect",
    ("tiny-imagenet", "crane"): "machine",
    ("imagenet100-fgl", "crane"): "bird",
    ("tiny-imagenet", "drumstick"): "drums",
    ("tiny-imagenet", "organ"): "instrument",
    ("tiny-imagenet", "brass"): "plaque",
    ("tiny-imagenet", "nail"): "metal",
    ("tiny-imagenet", "chest"): "storage",
    ("tiny-imagenet", "plate"): "food",
    ("tiny-imagenet", "fly"): "insect",
    ("tiny-imagenet", "monarch"): "butterfly",
    ("tiny-imagenet", "cardigan"): "sweater",
    ("tiny-imagenet", "teddy"): "bear",
    ("tiny-imagenet", "gondola"): "boat",
    ("tiny-imagenet", "orange"): "fruit",
    ("tiny-imagenet", "walking stick"): "insect",
    ("imagenet100-cmc", "reel"): "fishing",
    ("imagenet100-cmc", "boxer"): "dog",
    ("imagenet100-cmc", "papillon"): "dog",
    ("imagenet100-cmc", "wing"): "aircraft",
    ("imagenet100-cmc", "pirate"): "ship",
    ("imagenet100-cmc", "iron"): "clothes",
    ("imagenet100-cmc", "jean"): "jeans",
    ("imagenet100-fgl", "drake"): "duck",
    ("imagenet100-fgl", "kite"): "bird",
    ("imagenet100-fgl", "tick"): "arachnid",
    ("imagenet100-fgl", "cock"): "rooster",
    ("imagenet100-fgl", "hammerhead"): "shark",
    ("imagefruit", "fig"): "fruit",
    ("imagefruit", "orange"): "fruit",
    ("imagefruit", "Granny Smith"): "green Granny Smith apple",
    ("cub", "105.Whip_poor_Will"): "bird",
    ("cub", "017.Cardinal"): "bird",
    ("cub", "103.Sayornis"): "phoebe",
    ("cub", "110.Geococcyx"): "roadrunner",
    ("cub", "141.Artic_Tern"): "Arctic",
    ("cars", "Nissan Leaf Hatchback 2012"): "car",
    ("cars", "Ford Ranger SuperCab 2011"): "pickup truck",
    ("fashion", "trouser"): "pair of trousers",
    ("fashion", "bag"): "handbag",
    ("eurosat", "River"): "satellite image",
}

LISTS = {
    "tiny-imagenet": "d9cb11f6be1439ac299ac5047acf001cda5f4dcc9cd17c7323b08389cd3ab7ea",
    "imagenet100-cmc": "b06db93f7ac2851ef476c162d6c4cbba17197be0269c88005add46486f682cb0",
    "imagenet100-fgl": "ff5e43ffc204636268ba3f1f44b77bf29a6b9eb56dfb1b0fadd440ddfe68c7aa",
    "imagefruit": "0789a7c523047b21c1618eab01ad84ddec7a4a12009b3befccbcb12a7e650f8d",
}
"""SHA-256 of the WordNet ids in the order of the published lists, one to a line."""

NAMES = {
    "cifar100": "fbe8ad23bbaf24969898a386833b49c3aaf6ad1119d43f7b41cdea1b3416d578",
    "cub": "5c4ad6e85652ad6f7e622fa990eaf07b7420cd120b6af1e3112bb6328c81029b",
    "cars": "93d089469409bbd00725ce041797cad929e156fba50c3e19a0f49ef65efcb990",
}
"""The same of class names."""


@pytest.mark.parametrize("name", SIZES)
def test_a_table_names_each_class_of_its_data_set_in_words_of_its_own(name: str) -> None:
    table = reviewed(name)
    said = [row[0] for row in table.rows.values()]
    assert len(said) == SIZES[name] and table.source
    assert len({phrase.casefold() for phrase in said}) == len(said)
    for phrase in said:
        assert phrase == " ".join(phrase.split()) and phrase.isascii() and phrase.isprintable() and len(phrase) < 70
        assert not set(phrase) & set("_{}") and not phrase.startswith(("a ", "an ", "the "))
    # each class is found by its own name and by each other spelling, and no spelling means two classes
    spellings = [(spelling, row[0]) for key, row in table.rows.items() for spelling in (key, *row[1:])]
    assert all(table.phrase(spelling) == phrase for spelling, phrase in spellings)
    assert phrases(tuple(table.rows), name) == tuple(said)


def test_the_tables_are_these() -> None:
    assert set(tables()) == set(SIZES)


@pytest.mark.parametrize("name", LISTS)
def test_the_imagenet_lists_are_the_published_ones(name: str) -> None:
    ids = [row[1] for row in reviewed(name).rows.values()]
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == LISTS[name]
    assert phrases(ids, name) == phrases(tuple(reviewed(name).rows), name)


@pytest.mark.parametrize("name", NAMES)
def test_the_other_long_lists_are_the_published_ones(name: str) -> None:
    assert hashlib.sha256("\n".join(reviewed(name).rows).encode()).hexdigest() == NAMES[name]


def test_a_wordnet_id_is_asked_for_in_the_same_words_everywhere() -> None:
    said: dict[str, set[str]] = {}
    for name in LISTS:
        for phrase, synset, *_ in reviewed(name).rows.values():
            said.setdefault(synset, set()).add(phrase)
    assert len(said) == 370
    assert all(len(each) == 1 for each in said.values())


@pytest.mark.parametrize(("table", "name"), MENDED)
def test_an_ambiguous_name_says_what_is_meant(table: str, name: str) -> None:
    [phrase] = phrases([name], table)
    assert MENDED[table, name] in phrase and phrase != name


def test_eurosat_is_seen_from_above_and_fashion_lies_on_black() -> None:
    assert all(phrase.startswith("satellite image of ") for phrase in phrases(EUROSAT))
    fashion = json.loads((BUNDLED / "fashion.json").read_text())["classes"]
    assert all(phrase.endswith("on a black background") for phrase in phrases(fashion))
    for classes, table in ((EUROSAT, "eurosat"), (fashion, "fashion")):
        found = origin(classes)
        assert found["table"] == table and found["departure"] == reviewed(table).departure != ""


@pytest.mark.parametrize(
    ("classes", "table"),
    [
        (CIFAR10, "cifar10"),
        (CIFAR10[3:6], "cifar10"),
        (EUROSAT, "eurosat"),
        (("Annual Crop Land", *(name.upper() for name in EUROSAT[1:])), "eurosat"),
        (FOOD10, "tiny-imagenet"),
        (("banana", "fruit_orange", "fig"), ""),
        (("banana", "orange", "fig"), "imagefruit"),
        (("orange", "mushroom"), "cifar100"),  # Tiny-ImageNet knows both, and is larger
        (("n02869837", "n13037406"), "imagenet100-cmc"),
        (("tench, Tinca tinca", "goose"), "imagenet100-fgl"),
        (("001.Black_footed_Albatross", "200.Common_Yellowthroat"), "cub"),
        (("0001 AM General Hummer SUV 2000", "Ram C-V Cargo Van Minivan 2012"), "cars"),
        (
            (
                "T - shirt / top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            "fashion",
        ),
        (("river", "forest"), ""),  # these two need not be seen from a satellite
        (("coat", "dress"), ""),  # nor these lie on black
        (("crane, a bird", "crane, a machine"), ""),
    ],
)
def test_auto_takes_the_smallest_table_that_knows_all_classes(classes: tuple[str, ...], table: str) -> None:
    assert origin(classes)["table"] == table
    if table:
        assert phrases(classes) == phrases(classes, table)
    else:
        assert phrases(classes) == tuple(name.replace("_", " ") for name in classes)


def test_without_a_table_the_names_are_cleaned() -> None:
    assert phrases(["red__panda_", "Blue  whale"]) == ("red panda", "Blue whale")
    assert phrases([]) == ()


@pytest.mark.parametrize("names", [("n00000001", "dog"), ("dog", "7"), ("dog", "--")])
def test_a_name_that_says_nothing_is_refused_by_name(names: tuple[str, str]) -> None:
    silent = next(name for name in names if name != "dog")
    with pytest.raises(PoolError, match=rf"'{silent}'.*JSON file"):
        phrases(names)


def test_two_classes_never_get_the_same_words() -> None:
    with pytest.raises(PoolError, match="'Red_panda' and 'red panda'"):
        phrases(["Red_panda", "red panda"])
    with pytest.raises(PoolError, match=r"'crane, a bird' and 'crane, a machine' .*construction crane"):
        phrases(["crane, a bird", "crane, a machine"], "tiny-imagenet")


def test_a_named_table_must_know_every_class() -> None:
    with pytest.raises(PoolError, match=r"'cifar10' has no phrase for 'airplan' \(nearest: 'airplane'\), 'xyzzy'$"):
        phrases(["cat", "airplan", "xyzzy"], "cifar10")
    with pytest.raises(PoolError, match="and 95 more"):
        phrases([f"qq{i}" for i in range(100)], "cub")


def test_an_unknown_table_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"generator\.prompts = 'cifar-11'.*Did you mean 'cifar10'"):
        phrases(["cat"], "cifar-11")
    assert phrases(["tench"], "ImageNet100_FGL") == ("tench fish",)


def test_a_file_of_the_users_is_a_table(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"Class_A": " café  au lait ", "b": "tea", "c": "milk"}), encoding="utf-8")
    assert phrases(["class a", "B"], str(file)) == ("café au lait", "tea")
    assert origin(["b"], str(file)) == {"table": "mine.json", "source": str(file), "departure": ""}
    with pytest.raises(PoolError, match=r"no phrase for 'd'"):
        phrases(["d"], str(file))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold an object"),
        ("{}", "must hold an object"),
        ('{"a": 3}', "phrase of 'a'"),
        ('{"a": " "}', "phrase of 'a'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_error(tmp_path: Path, content: str | None, problem: str) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        phrases(["a"], str(file))


def test_templates_are_the_papers_wordings() -> None:
    assert prompt("regl", "orange fruit") == "A photo of orange fruit, real world images, high resolution"
    assert prompt("regl-text", "orange fruit") == "A photo of orange fruit"
    assert prompt("fbl", "tulip flower") == "a photo of a tulip flower"
    assert prompt("{class} at night", "a {b}") == "a {b} at night"  # braces of a phrase are its own


@pytest.mark.parametrize("template", ["A photo", "{class} and {class}", "{class} {style}", "{}", "{class}}", ""])
def test_a_template_without_one_class_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"generator\.template"):
        prompt(template, "cat")


def test_a_misspelled_template_is_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'regl-text'"):
        prompt("regl-txt", "cat")
    assert set(TEMPLATES) == {"regl", "regl-text", "fbl"}


def test_a_name_wins_over_another_class_alias() -> None:
    table = Table("t", "", "", {"car": ("passenger car", "truck"), "truck": ("big truck",)})
    assert table.phrase("truck") == "big truck"
