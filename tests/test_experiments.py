"""The protocols, tables and figures of the two papers that come with the package: every run in them can be made, and
the printed numbers are where they belong."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedkeel.experiments
from fedkeel.algorithms.fbl import FBL as FBL_METHOD
from fedkeel.config import load, parse, with_method
from fedkeel.errors import ConfigError
from fedkeel.generators.prompts import origin, phrases, reviewed
from fedkeel.reproduce.cells import read as read_cell
from fedkeel.reproduce.cells import reproduce
from fedkeel.reproduce.tables import cells, experiment, folder_of, names, protocols

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


@pytest.mark.parametrize("file", ["fbl", "fbl-conventional", "regl", "reduced-fbl", "reduced-regl"])
def test_the_headline_of_a_protocol_is_of_the_last_rounds(file):
    """F-25: of the last ten evaluations, which are the last ten rounds where each is evaluated."""
    assert load(FOLDER / f"{file}.toml").get("evaluate", {}).get("every", 1) == 1


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


# tables and figures ---------------------------------------------------------------------------------------------------

PRINTED = {  # numbers in the papers, counted there
    "fbl-f4b": 0,
    "fbl-t1": 11 * 9,
    "fbl-t2a": 7 * 4,
    "fbl-t2b": 7 * 2,
    "fbl-t2c": 7 * 3,
    "fbl-t3": 7 * 2,
    "fbl-t4": 6 * 4,
    "fbl-x1": 2,
    "fbl-x2": 2,
    "regl-f1": 2 * 2,
    "regl-f5": 2,
    "regl-t1": 2 * 5,
    "regl-t2": 5 + 10 * 10,
    "regl-t3": 10 * 5,
    "regl-t4": 9 * 10,
    "regl-t5": 6 * 6,
    "regl-t6": 16 * 4,
    "regl-t7": 6 * 6,
}


@cache
def planned(table, profile):
    """The runs of one seed."""
    return cells(experiment(table), profile, seeds=[1])


def cell(table, row, column, profile="paper"):
    """The only one of that row and column with seed 1."""
    (found,) = cells(experiment(table), profile, [row], [column], [1])
    return found


@pytest.mark.parametrize("table", names())
def test_a_table_has_its_runs_in_every_profile(table):
    found = experiment(table)
    for profile in protocols()[found.family]:
        some = planned(table, profile)
        assert len({each.name for each in some}) == len(some)
    rows, columns = found.lines("smoke")
    assert {each.row.key for each in planned(table, "smoke")} == {row.key for row in rows}
    assert {each.column.key for each in planned(table, "smoke")} == {column.key for column in columns}
    for each in planned(table, "smoke"):
        assert each.config.clients <= 10 and each.config.rounds == 2 and folder_of(each.config) is None


@pytest.mark.parametrize("table", PRINTED)
def test_a_table_has_the_printed_numbers_of_its_cells(table):
    """As many as are printed, and in the profile `paper` a run for each, and one for each run but in figures."""
    found = experiment(table)
    assert found.printed.keys() <= found.rows.keys()
    given = {(row, column): value for row, each in found.printed.items() for column, value in each.items()}
    assert {column for _, column in given} <= found.columns.keys()
    assert sum(not found.columns[column].like for _, column in given) == PRINTED[table]
    assert all(len(value) in (1, 2) and all(0 < number < 100 for number in value) for value in given.values())
    runs = {(each.row.key, each.column.key) for each in planned(table, "paper")}
    runs = {(row, column) for row, column in runs if row in found.printed or not found.printed}  # controls have none
    there = {one for one in given if "paper" in found.columns[one[1]].only}
    assert there <= runs and (there == runs or table in ("fbl-f4b", "regl-f5"))
    for key in found.marks:
        parts = tuple(key.rsplit(".", 1))
        assert parts in given or key in found.rows or key in found.columns


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("fbl-t1", "moon", "c10-01", [51.38, 5.21]),
        ("fbl-t1", "fbl-25", "c100-01", [48.19, 0.37]),
        ("fbl-t1", "fbl-50", "tiny-05", [46.34, 0.55]),
        ("fbl-t2a", "fedgen", "c100-shards6", [11.39, 0.87]),
        ("fbl-t2b", "moon", "c10-100", [60.53, 3.17]),
        ("fbl-t2c", "scaffold", "tiny-noise005", [32.88, 1.69]),
        ("fbl-t4", "fbl-75", "c100-05", [57.45, 0.68]),
        ("fbl-x1", "fbl-none30", "c10-03", [80.8, 0.57]),
        ("fbl-x2", "fedavg", "eurosat-03", [82.7, 1.51]),
        ("regl-t1", "fedavg-personal", "fruit-share30", [57.3]),
        ("regl-t2", "centralized", "cars-001", [89.5, 0.7]),
        ("regl-t2", "regl-ft", "eurosat-05", [93.3, 0.6]),
        ("regl-t3", "dynafed", "cub", [32.0, 2.1]),
        ("regl-t4", "fedamp", "in100-001", [63.8, 2.0]),
        ("regl-t5", "regl-ft", "fruit-iid", [81.0]),
        ("regl-t6", "fednova-e20", "in100-05", [53.5]),
        ("regl-t7", "fedopt", "in100-m50", [23.0]),
        ("regl-f5", "regl-ft", "in100-v2000", [77]),
    ],
)
def test_printed_numbers_are_where_the_papers_have_them(table, row, column, value):
    assert experiment(table).printed[row][column] == value


def test_numbers_that_contradict_others_are_marked():
    """What the papers print twice and otherwise, or beyond belief."""
    for table, row, column in [
        ("fbl-t1", "fbl-25", "c100-01"),
        ("fbl-t2b", "moon", "c10-100"),
        ("fbl-t2b", "fedprox", "c10-100"),
        ("fbl-t3", "m1", "c100"),
        ("fbl-t3", "m2", "c100"),
        ("fbl-t3", "m3", "c100"),
        ("fbl-t4", "fbl-25", "c100-01"),
        ("regl-t1", "fedavg", "fruit-share0"),
        ("regl-t5", "fedopt", "fruit-001"),
        ("regl-t7", "fedopt", "fruit-m5"),
    ]:
        assert experiment(table).printed_at(row, column)[1], (table, row, column)
    assert not experiment("fbl-t1").printed_at("fedavg", "c10-01")[1]


def test_another_reading_of_a_column_has_its_numbers_and_marks():
    found = experiment("fbl-t1")
    assert found.printed["fbl-25"]["c100-01+conv"] == found.printed["fbl-25"]["c100-01"]
    assert found.printed_at("fbl-25", "c100-01+conv") == found.printed_at("fbl-25", "c100-01")
    assert experiment("regl-t1").printed["fedavg"]["in100-share5"] == [39.1]


@pytest.mark.parametrize(
    "same",
    [
        [("fbl-t1", "fbl", "c10-01"), ("fbl-t4", "fbl", "c10-01")],
        [("fbl-t1", "fbl-50", "c100-05"), ("fbl-t4", "fbl-50", "c100-05")],
        [("fbl-t1", "fbl", "c10-03"), ("fbl-t3", "m7", "c10"), ("fbl-x1", "fbl", "c10-03"), ("fbl-f4b", "fbl", "m50")],
        [("regl-t1", "fedavg", "fruit-share0"), ("regl-t4", "fedavg", "fruit-001")],
        [("regl-t1", "fedavg", "in100-share20"), ("regl-t1", "fedavg-personal", "in100-share20")],
        [("regl-t5", "moon", "fruit-001"), ("regl-t6", "moon-e5", "fruit-001"), ("regl-t7", "moon", "fruit-m5")],
        [("regl-t6", "regl-ft-e5", "in100-001"), ("regl-t7", "regl-ft", "in100-m10")],
    ],
)
def test_what_two_tables_share_is_one_run(same):
    assert len({cell(*one).key for one in same}) == 1


def test_both_optimisers_of_fbl_are_the_protocols_beside_the_tables():
    for row in ("fedavg", "moon", "fbl"):
        for column, file in (("c10-01", "fbl"), ("c10-01+conv", "fbl-conventional")):
            table = with_method(load(FOLDER / f"{file}.toml"), row)
            assert cell("fbl-t1", row, column).key == parse(table).key()


def test_the_ablation_is_what_its_presets_say():
    """M1 to M7, whatever the base says of the method; the drop is the base's where there is one."""
    for profile in ("paper", "smoke"):
        for preset, options in FBL_METHOD.presets.items():
            method = cell("fbl-t3", preset.lower(), "c10", profile).config.algorithm
            assert {name: getattr(method, name) for name in options} == options


def test_data_sets_bring_what_the_papers_say_of_them():
    def of(table, row, column):
        return cell(table, row, column).config

    assert [of("fbl-t1", "moon", f"{data}-01").algorithm.mu for data in ("c10", "c100", "tiny")] == [5, 1, 1]
    assert [of("fbl-t1", "fbl", f"{data}-01").augment.crop for data in ("c10", "c100", "tiny")] == [4, 4, 8]
    columns = ("fruit-001", "in100-001", "cub-001", "cars-001", "eurosat-001")
    found = [of("regl-t2", "regl-tf", column) for column in columns]
    assert [config.clients for config in found] == [5, 10, 20, 20, 5]
    assert [config.algorithm.volume for config in found] == [1300, 1300, 100, 100, 3000]
    assert [bool(config.model.pretrained) for config in found] == [False, False, True, True, False]
    assert [len(config.data.classes) for config in found] == [10, 100, 0, 0, 0]
    assert [of("regl-t3", "fedavg", column).clients for column in ("fruit", "in100", "cub", "cars", "eurosat")] == [
        10,
        100,
        200,
        196,
        10,
    ]


@pytest.mark.parametrize("table", ["imagefruit", "imagenet100-cmc"])
def test_classes_of_imagenet_are_those_that_have_prompts(table):
    column = "fruit" if table == "imagefruit" else "in100"
    classes = cell("regl-t3", "regl-tf", column).config.data.classes
    found = reviewed(table)
    assert phrases(classes) == tuple(row[0] for row in found.rows.values())
    assert origin(classes)["table"] == table


def test_all_that_a_run_reads_lies_below_one_folder(tmp_path):
    one = cell("regl-t2", "fedavg", "cub-001")
    (tmp_path / "cub").mkdir()
    with pytest.raises(ConfigError, match=r"resnet34\.safetensors in it"):
        one.placed(tmp_path, tmp_path / "run")
    (tmp_path / "resnet34.safetensors").touch()
    config = one.placed(tmp_path, tmp_path / "run")
    assert (config.data.dir, config.model.pretrained) == (
        str(tmp_path / "cub"),
        str(tmp_path / "resnet34.safetensors"),
    )
    with pytest.raises(ConfigError, match="--data"):
        one.placed(None, tmp_path / "run")


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("regl-t1", ["fruit-share5"]),
        pytest.param("fbl-x1", [], marks=pytest.mark.full),
        pytest.param("regl-t4", ["fruit-001"], marks=pytest.mark.full),
    ],
)
def test_a_table_runs(table, columns, tmp_path):
    """Each row has the number that it shows; rows of the same configuration are one run."""
    runs = cells(experiment(table), "smoke", columns=columns)
    found = reproduce(runs, tmp_path / "out", pools=tmp_path / "pools")
    assert [each.error for each in found] == [""] * len(runs)
    shown = [each.headline() for each in found]
    assert all(value is not None and 0 <= value <= 1 for value in shown)
    assert len(list((tmp_path / "out").glob("smoke/*/runs/*"))) == len({each.key for each in runs})


@pytest.mark.parametrize("family", ["fbl", "regl"])
def test_rates_are_those_that_did_best(family: str) -> None:
    """On validation images, of the grid that every method got, and beyond it where its edge was best; the cells are in
    the repository."""
    folder = Path(__file__).parents[1] / "benchmarks/results/reproduce"
    every = [read_cell(cell, folder) for cell in cells(experiment(f"{family}-rates"), "reduced")]
    assert all(outcome.state == "done" or "loss is nan" in outcome.error for outcome in every)
    done = [outcome for outcome in every if not outcome.cell.row.columns]  # the others are controls at one rate
    best: dict[str, tuple[float, float]] = {}
    for outcome in done:
        reached, rate = outcome.headline() or 0.0, outcome.cell.config.local.lr
        best[outcome.cell.row.key] = max(best.get(outcome.cell.row.key, (0.0, 0.0)), (reached, rate))
    assert {row: rate for row, (_, rate) in best.items()} == protocols()[family]["reduced"].rates
    tried: dict[str, set[float]] = {}
    for outcome in done:
        tried.setdefault(outcome.cell.row.key, set()).add(outcome.cell.config.local.lr)
    assert [row for row, (_, rate) in best.items() if rate in (min(tried[row]), max(tried[row]))] == []
