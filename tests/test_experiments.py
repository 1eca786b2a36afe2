"""The protocols of the two papers that come with the package: every method in them can be made from them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import fedkeel.experiments
from fedkeel.config import load, parse, with_method

FOLDER = Path(fedkeel.experiments.__file__).parent
FBL = ("fedavg", "fedprox", "scaffold", "moon", "fedgen", "feddyn", "fedntd", "fedcda", "fbl", "fbl(25%)", "fbl(50%)")
GLOBAL = (
    "fedavg",
    "fedprox",
    "scaffold",
    "fednova",
    "fedadam",
    "moon",
    "fedalign",
    "dynafed",
    "regl:TF",
    "regl:FT",
    "centralized",
)
PERSONAL = ("separate", "fedavg_ft", "fedrep", "fedbn", "fedamp", "pfedgate", "fedcac")


@pytest.mark.parametrize(
    ("file", "spec"),
    [("fbl", spec) for spec in FBL]
    + [("fbl-conventional", spec) for spec in FBL]
    + [("regl", spec) for spec in GLOBAL + PERSONAL],
)
def test_a_protocol_has_all_its_methods(file, spec):
    config = parse(with_method(load(FOLDER / f"{file}.toml"), spec))
    assert config.rounds == 200
    assert config.local.epochs == (5 if file == "regl" else 10)


def test_the_two_optimisers_of_fbl_differ_in_nothing_else():
    printed, conventional = (load(FOLDER / f"{name}.toml") for name in ("fbl", "fbl-conventional"))
    assert (printed["local"]["lr"], printed["local"]["momentum"]) == (1e-3, 1e-4)
    assert (conventional["local"]["lr"], conventional["local"]["momentum"]) == (1e-2, 0.9)
    for table in (printed, conventional):
        table["local"] = {key: value for key, value in table["local"].items() if key not in ("lr", "momentum")}
        del table["name"]
    assert printed == conventional


def test_regls_tables_name_their_methods_and_budgets():
    """Table 2 has the centralised bound, capped at 200 epochs (R-19); in Table 4 every best is of 50 measurements."""
    text = (FOLDER / "regl.toml").read_text()
    lists = [line.removeprefix("#   ").split(",") for line in text.splitlines() if line.startswith("#   ")]
    assert set(lists[0]) == set(GLOBAL)
    table = load(FOLDER / "regl.toml")
    central = parse(with_method(table, "centralized"))
    passes = [central.algorithm.phases(round_of(number, 200, 5), central.local)[0].epochs for number in range(200)]
    assert sum(passes) == 200
    for spec in PERSONAL:
        config = parse(with_method(table, spec))
        assert config.rounds // config.personal.every == config.personal.epochs == 50


def round_of(number, rounds, clients):
    """As much of a client's round as `phases` looks at."""
    return SimpleNamespace(round=number, rounds=rounds, clients=clients, lr=0.1)


def test_no_table_of_options_is_for_nothing():
    for path in FOLDER.glob("*.toml"):
        table = load(path)
        for name in table.get("methods", {}):
            parse(with_method(table, name))
