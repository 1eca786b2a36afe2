"""Configurations: what is wrong is said by name, and what is written down makes the same run again."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from itertools import permutations
from typing import Literal

import pytest
import tiny

from fedkeel import registry
from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fbl import FBL
from fedkeel.algorithms.fedprox import FedProx
from fedkeel.config import load, parse, read, with_method
from fedkeel.errors import ConfigError, UnknownName, UserError
from fedkeel.generators.flow import Bundled
from fedkeel.generators.gaussian import Gaussian
from fedkeel.models.resnet import ResNet18
from fedkeel.options import build, option, options
from fedkeel.partition.dirichlet import Dirichlet


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("round=3", "round", "Did you mean 'rounds'?"),
        ("local.momentun=0.9", "local.momentun", "Did you mean 'momentum'?"),
        ("algorithm.mu=0.1", "algorithm.mu", "no such key"),
        ("model.hiden=[3]", "model.hiden", "Did you mean 'hidden'?"),
        ("evaluate.evry=3", "evaluate.evry", "Did you mean 'every'?"),
        ("lokal.lr=0.1", "lokal", "Did you mean 'local'?"),
        ("rounds=many", "rounds", "must be a whole number"),
        ("rounds=2.0", "rounds", "must be a whole number"),
        ("rounds=true", "rounds", "must be a whole number"),
        ("local.lr=fast", "local.lr", "must be a number"),
        ("local.nesterov=1", "local.nesterov", "must be true or false"),
        ("local=3", "local", "must be a table of keys"),
        ("name=3", "name", "must be a word"),
        ("profiles.none_ids=3", "profiles.none_ids", "must be a list of a whole number"),
        ("profiles.none_ids=[1,true]", "profiles.none_ids[1]", "must be a whole number"),
        ("model=mlp", "model", "must be a table with a name"),
        ("model.name=3", "model.name", "must be one of cnn, mlp"),
        ("rounds=0", "rounds", "must be >= 1"),
        ("seed=-1", "seed", "must be >= 0"),
        ("local.lr=0", "local.lr", "must be > 0"),
        ("local.lr=nan", "local.lr", "must be finite and > 0"),
        ("local.lr=inf", "local.lr", "must be finite and > 0"),
        ("local.momentum=1.0", "local.momentum", "must be >= 0 and < 1"),
        ("local.clip=-1", "local.clip", "must be > 0"),
        ("local.clip=tight", "local.clip", "must be a number"),
        ("local.weight_decay=nan", "local.weight_decay", "must be finite and >= 0"),
        ("local.nesterov=true", "local.nesterov", "needs momentum above 0"),
        ("local.buffers=averge", "local.buffers", "Did you mean 'average'?"),
        ("on_failure=halt", "on_failure", "'continue', 'stop'"),
        ("participation=0", "participation", "must be > 0"),
        ("participation=1.5", "participation", "a share is at most 1.0"),
        ("participation=5", "participation", "there are 4 clients only"),
        ("min_replies=5", "min_replies", "at most 4, the clients of a round"),
        ("participation=nan", "participation", "must be finite and > 0"),
        ("participation=half", "participation", "must be a whole number or a number"),
        ("participation=true", "participation", "must be a whole number or a number"),
        ("name=../other", "name", "plain folder name"),
        ("name=" + 201 * "x", "name", "of at most 200 bytes"),
        ("balance.name=moon", "balance.name", "works over another: fbl, regl"),
        ("balance.name=rgl", "balance.name", "Did you mean 'regl'?"),
        ("profiles.unconstrained=0.7", "profiles.none", "at most 0.3: the two shares overlap"),
        ("profiles.unconstrained_ids=[1,4]", "profiles.unconstrained_ids", "clients are numbered 0 to 3"),
        ("data.name=", "data.name", "there is no ''"),
        ("rounds", "override", "must look like local.lr=0.1"),
        ("seed.deep=1", "seed.deep", "seed is not a table"),
    ],
)
def test_what_is_wrong_is_said_by_name(override, key, said):
    table = {"profiles": {"none": 0.5}} if "unconstrained=" in override else {"seed": 1}
    with pytest.raises((ConfigError, UnknownName)) as caught:
        tiny.config(override, table=table)
    assert said in str(caught.value)
    if isinstance(caught.value, ConfigError):
        assert caught.value.key == key
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.name=fedprocs", "Did you mean 'fedprox'?"),
        ("partition.name=dirichlett", "Did you mean 'dirichlet'?"),
        ("model.name=resnet19", "Did you mean 'resnet1"),
        ("generator.name=gausian", "Did you mean 'gaussian'?"),
        ("data.name=fashon", "Did you mean 'fashion'?"),
    ],
)
def test_names_that_nothing_has(override, said):
    with pytest.raises(UnknownName) as caught:
        tiny.config(override)
    assert said in str(caught.value)


def test_defaults():
    config = parse({})
    assert isinstance(config.algorithm, Algorithm) and config.balance is None and config.generator is None
    assert (config.rounds, config.clients, config.cohort, config.seed) == (200, 20, 10, 1)
    assert config.partition == Dirichlet() and type(config.model) is ResNet18


def test_options_of_what_is_there_by_default():
    """A section without a name is about the default thing."""
    config = parse(
        {"model": {"norm": "group"}}, ["partition.alpha=0.7", "data.train_limit=100", "algorithm.weights=uniform"]
    )
    assert type(config.model) is ResNet18 and config.model.norm == "group"
    assert config.partition == Dirichlet(alpha=0.7)
    assert config.data.train_limit == 100 and config.algorithm.weights == "uniform"


def test_types_of_overrides():
    config = tiny.config(
        "name=trial",
        "seed=3",
        "local.lr=1",
        "local.momentum=5e-1",
        "local.nesterov=true",
        "local.steps=7",
        'local.buffers="local"',
        "model.hidden=[4,3]",
        "partition.name=dirichlet",
        "partition.alpha=0.25",
        "runs_dir=/tmp/a=b",
        "profiles.none_ids=[]",
    )
    assert (config.name, config.seed, config.runs_dir) == ("trial", 3, "/tmp/a=b")
    assert config.local.lr == 1.0 and isinstance(config.local.lr, float)
    assert (config.local.momentum, config.local.nesterov, config.local.steps) == (0.5, True, 7)
    assert config.local.buffers == "local" and config.model.hidden == (4, 3)
    assert config.partition.alpha == 0.25


def test_the_table_is_not_changed():
    table = {"local": {"lr": 0.1}, "methods": {"fbl": {"period": 3}}}
    parse(table, ["local.lr=0.2", "methods.fbl.period=4"])
    with_method(table, "fbl:M3")
    assert table == {"local": {"lr": 0.1}, "methods": {"fbl": {"period": 3}}}


@pytest.mark.parametrize(
    ("overrides", "mu"),
    [
        ([], 0.5),  # of [algorithm], which is another method
        (["algorithm.name=moon"], 5.0),
        (["algorithm.name=moon", "methods.moon.mu=3"], 3.0),
        (["algorithm.mu=2", "algorithm.name=moon", "methods.moon.mu=3"], 2.0),
        (["algorithm={name='moon',mu=7}"], 7.0),
        (["methods.fedprox.mu=0.25"], 0.25),
        (["methods.fedprox.mu=0.25", "algorithm.mu=0.75"], 0.75),
    ],
)
def test_options_of_a_method_hold_in_a_run_as_in_a_comparison(tmp_path, overrides, mu):
    """A rate tuned by runs would else be one of other options than those compared."""
    path = tmp_path / "exp.toml"
    path.write_text('[algorithm]\nname = "fedprox"\nmu = 0.5\n[methods.moon]\nmu = 5.0\n')
    assert read(path, overrides).algorithm.mu == mu


def test_another_name_clears_the_options_of_the_old_one():
    """And the same name, quoted or not, keeps them."""
    table = {"algorithm": {"name": "fedprox", "mu": 0.5}}
    for same, other in (("fedprox", "fbl"), ('"fedprox"', '"fbl"')):
        assert parse(table, [f"algorithm.name={same}"]).algorithm == FedProx(mu=0.5)
        assert parse(table, [f"algorithm.name={other}", "algorithm.period=7"]).algorithm == FBL(period=7)
    model = parse({"model": {"name": "mlp", "hidden": [3]}}, ["model.name=cnn", "model.hidden=7"]).model
    assert model.hidden == 7
    assert tiny.config("name=other").model.hidden == (8,)  # the run's own name clears nothing


@pytest.mark.parametrize(
    ("table", "texts"),
    [
        ({}, ["partition.name=global_share", "partition.alpha=0.05"]),
        ({}, ["algorithm.name=fedprox", "algorithm.mu=0.7"]),
        ({}, ["data.name=parquet", "data.dir=X"]),
        ({"algorithm": {"name": "fbl", "period": 3}}, ["algorithm.name=fedprox", "algorithm.mu=0.7"]),
        ({}, ["algorithm={name='fbl'}", "algorithm.name=fedprox", "algorithm.mu=0.7"]),
        (
            {"generator": {"name": "bundled", "steps": 2}, "generators": {"constrained": {"steps": 8}}},
            ["generator.name=gaussian", "generators.constrained.name=gaussian", "generators.constrained.seed=7"],
        ),
    ],
)
def test_the_order_of_overrides_changes_nothing(table, texts):
    made = [parse(table, order) for order in permutations(texts)]
    assert all(config == made[0] for config in made)
    for text in texts:
        path, value = text.split("=", 1)
        section, _, key = path.rpartition(".")
        found = made[0].table()
        for part in section.split(".") if section else ():
            found = found[part]
        assert not section or str(found[key]) == value, text
    assert parse({}, ["rounds=3", "rounds=5"]).rounds == 5  # of one key the last stands


def test_a_name_that_is_not_another_clears_nothing():
    """The default's own name, that of a section that chooses no thing, and the first that a section gets."""
    assert parse({"partition": {"alpha": 0.05}}, ["partition.name=dirichlet"]).partition == Dirichlet(alpha=0.05)
    assert parse({"algorithm": {"weights": "uniform"}}, ["algorithm.name=fedavg"]).algorithm.weights == "uniform"
    robust = parse({"robust": {"trim": 0.3}}, ["robust.name=trimmed_mean"]).robust
    assert (robust.name, robust.trim) == ("trimmed_mean", 0.3)
    assert parse({"generator": {"steps": 3}}, ["generator.name=bundled"]).generator == Bundled(steps=3)
    table = {"generator": {"name": "bundled"}, "generators": {"constrained": {"steps": 8}}}
    same = parse(table, ["generators.constrained.name=bundled"])
    assert same.generator_of("constrained") == Bundled(steps=8)


def test_presets():
    for table in ({"algorithm": {"name": "fbl", "preset": "M3"}}, with_method({}, "fbl:M3")):
        method = parse(table).algorithm
        assert isinstance(method, FBL) and (method.align, method.drop, method.carry) == (True, 0, 0.0)
    stronger = parse({"algorithm": {"name": "fbl"}}, ["algorithm.preset=M3", "algorithm.drop=8"]).algorithm
    assert (stronger.drop, stronger.carry) == (8, 0.0)  # what is named stands over the preset
    for wrong in ("M33", 3, ["M3"]):
        with pytest.raises(ConfigError, match=r"algorithm\.preset.*presets of fbl: M1, M2"):
            parse({"algorithm": {"name": "fbl", "preset": wrong}})
    with pytest.raises(ConfigError, match="presets of fedavg: none"):
        parse({"algorithm": {"preset": "M3"}})


COMPLETE = {
    "name": "all",
    "participation": 3,
    "clients": 7,
    "algorithm": {"name": "scaffold", "server_lr": 0.5},
    "balance": {"name": "fbl", "preset": "M3", "drop_rate": 0.25},
    "partition": {"name": "shards"},
    "generator": {"name": "gaussian", "seed": 4},
    "model": {"name": "mlp", "hidden": []},
    "local": {"steps": 5, "clip": 1.0, "lr": 1},
    "profiles": {"unconstrained": 0.25, "none_ids": [1, 5]},
    "augment": {"flip": True},
    "noise": {},
    "evaluate": {"every": 3},
    "pool": {"sharing": "shared"},
    "generators": {"unconstrained": {"seed": 9}, "constrained": {"name": "bundled", "steps": 2}},
}


@pytest.mark.parametrize("table", [{}, COMPLETE, {"participation": 1.0}, {"participation": 1}])
def test_what_is_written_makes_the_same_run(table, tmp_path):
    config = parse(table)
    again = parse(config.table())
    assert again == config and again.key() == config.key() and again.toml() == config.toml()
    (tmp_path / "config.toml").write_text(config.toml())
    from_file = read(tmp_path / "config.toml")
    assert from_file == config and from_file.key() == config.key()
    assert type(from_file.participation) is type(config.participation)


def test_the_written_form_is_complete():
    """Every option of every section stands in it, so that a later version with other defaults runs the same."""
    table = tomllib.loads(parse(COMPLETE).toml())
    assert table["algorithm"]["name"] == "scaffold" and table["balance"]["carry"] == 0.0
    for section, thing in (("local", parse(COMPLETE).local), ("balance", parse(COMPLETE).balance)):
        missing = {item.name for item in options(type(thing))} - set(table[section])
        assert all(getattr(thing, name) is None for name in missing), missing


@pytest.mark.parametrize(
    "override",
    [
        "local.lr=0.2",
        "seed=2",
        "rounds=5",
        "algorithm.weights=uniform",
        "model.hidden=[9]",
        "augment.flip=true",
        "threads=2",
    ],
)
def test_the_key_follows_what_decides_numbers(override):
    assert tiny.config(override).key() != tiny.config().key()


@pytest.mark.parametrize(
    "override",
    ["name=x", "runs_dir=x", "checkpoint_every=3", "on_failure=stop", "min_replies=2", "mlflow=x", "pool.dir=x"],
)
def test_the_key_ignores_what_does_not(override):
    assert tiny.config(override).key() == tiny.config().key()


def test_generators_by_profile():
    """A section of a profile stands over [generator], unless it names another one."""
    table = {
        "generator": {"name": "bundled", "steps": 2, "seed": 3},
        "generators": {"unconstrained": {"steps": 8}, "constrained": {"name": "gaussian"}},
    }
    config = parse(table, ["generators.unconstrained.tune_steps=7"])
    assert config.generator_of("unconstrained") == Bundled(steps=8, seed=3, tune_steps=7)
    assert config.generator_of("constrained") == Gaussian()
    assert config.generator_of("none") == config.generator == Bundled(steps=2, seed=3)
    assert parse({}).generators is None and parse({}).generator_of("constrained") is None
    assert parse({"generators": {"constrained": {"name": "gaussian"}}}).generator_of("constrained") == Gaussian()
    for other in ("generators.unconstrained.steps=9", "generators.constrained.seed=1"):
        assert parse(table, [other]).key() != parse(table).key()
    again = parse(parse(table).table())
    assert again == parse(table) and again.key() == parse(table).key()
    named = parse({**table, "generators": {"unconstrained": {"name": "bundled", "steps": 8}}})
    assert named.generator_of("unconstrained") == Bundled(steps=8, seed=3)  # the same one: over it, too


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"none": {"name": "bundled"}}, r"generators\.none = .*cannot generate"),
        ({"constraint": {}}, r"generators\.constraint = .* Did you mean 'constrained'"),
        ({"constrained": {"stepps": 3}}, r"generators\.constrained\.stepps = 3.* Did you mean 'steps'"),
        ({"constrained": {"steps": 0}}, r"generators\.constrained\.steps = 0: must be >= 1"),
        ({"constrained": {"name": "bundle"}}, r"there is no 'bundle'"),
        ({"constrained": 3}, r"generators\.constrained = 3: must be a table with a name"),
        (3, r"generators = 3: must hold tables: constrained, unconstrained"),
    ],
)
def test_generators_that_cannot_be(section, said):
    with pytest.raises((ConfigError, UnknownName), match=said):
        parse({"generator": {"name": "bundled"}, "generators": section})


def test_a_profile_of_no_generator_needs_a_name():
    with pytest.raises(ConfigError, match=r"generators\.constrained\.name = None"):
        parse({"generators": {"constrained": {"seed": 1}}})


def test_options_younger_than_recorded_runs_leave_their_keys_alone():
    """Runs begun before these options are gone on with: keys as they were then."""
    base = {"clients": 4, "model": {"name": "cnn", "width": 8}}
    keys = {
        "fedavg": "8e33a55b36e16f264c4c46b259bdd8f60d87cf477af43b70eb41f88f0e08c898",
        "regl": "05467e7d5f4d7f5088777717636d7f595f6d6681ee2d5b212b26ac7f143fa987",
    }
    for name, key in keys.items():
        config = parse(with_method({**base, "generator": {"name": "bundled"}}, name))
        assert config.key() == key
        assert parse(config.table()).key() == key
    old = parse(with_method({**base, "generator": {"name": "bundled", "steps": 1}}, "regl"))  # as they wrote it down
    assert old.key() == keys["regl"]
    for changed in ("generator.steps=2", "generator.tune_lr=0.1", "algorithm.tune=true", "evaluate.validation=0.1"):
        assert parse(old.table(), [changed]).key() != keys["regl"], changed
    assert parse(old.table(), ["pool.tuning_budget=3"]).key() == keys["regl"]  # what a machine has time for


def test_what_balances_decides_numbers():
    over = ((), ("balance.name=fbl",), ("balance.name=regl",))
    assert len({tiny.config("algorithm.name=scaffold", *balance).key() for balance in over}) == 3


def test_shared_images_decide_numbers():
    assert tiny.config("pool.sharing=shared").key() != tiny.config().key()


@pytest.mark.parametrize(
    ("participation", "cohort"), [("1", 1), ("1.0", 4), ("0.5", 2), ("3", 3), ("0.1", 1), ("0.4", 2), ("0.374", 1)]
)
def test_share_or_count(participation, cohort):
    """max(1, round(q N)), halves up; a whole number is a count, so 1 is one client and 1.0 is all."""
    assert tiny.config(f"participation={participation}").cohort == cohort


def test_with_method():
    table = {
        "algorithm": {"name": "fedprox", "mu": 0.5},
        "methods": {"fbl": {"period": 7, "drop": 8}, "fedprox": {"weights": "uniform"}},
        "profiles": {"none": 0.5},
    }
    assert parse(with_method(table, "fedavg")).algorithm == Algorithm()
    assert parse(with_method(table, "fedprox")).algorithm == FedProx(mu=0.5, weights="uniform")
    assert parse(with_method(table, "fbl")).algorithm == FBL(period=7, drop=8)
    preset = parse(with_method(table, "fbl:M5")).algorithm
    assert (preset.period, preset.drop, preset.carry) == (7, 2, 0.9)  # period is not the preset's
    quarter = parse(with_method(table, "fbl(25%)"))
    assert (quarter.profiles.unconstrained, quarter.profiles.none) == (0.25, 0.5)
    assert isinstance(quarter.algorithm, FBL)
    assert parse(with_method({}, "fbl(12.5%)")).profiles.unconstrained == 0.125
    both = parse(with_method(table, "fbl:M5(25%)"))
    assert both.algorithm == preset and both.profiles == quarter.profiles


@pytest.mark.parametrize(
    ("table", "spec", "said"),
    [
        ({}, "fbl(some%)", r"must look like fbl\(25%\)"),
        ({}, "fbl(25)", r"must look like .* fbl:M3\(25%\)"),
        ({}, "fbl(25%):M3", r"must look like .* fbl:M3\(25%\)"),
        ({}, "fbl:", r"must look like"),
        ({}, "fbl(250%)", r"profiles\.unconstrained.*<= 1"),
        ({"profiles": {"none": 0.9}}, "fbl(25%)", "overlap"),
        ({}, "fbl:M9", "presets of fbl"),
        ({}, "fedbl", "Did you mean"),
        ({"methods": 3}, "fbl", r"methods.*\[methods\.fbl\]"),
        ({"methods": {"fbl": 3}}, "fbl", r"methods.*\[methods\.fbl\]"),
        ({"profiles": 3}, "fbl(25%)", "profiles"),
        ({"methods": {"fbl": {"mu": 1}}}, "fbl", r"methods\.fbl\.mu"),
        ({"methods": {"fedbl": {"drop": 1}}}, "fedavg", r"methods\.fedbl = .*no such method.* Did you mean 'fedbn'"),
        ({"methods": {"fedprox": {"my": 1}}}, "fedavg", r"methods\.fedprox\.my = 1.* Did you mean 'mu'"),
        ({"methods": {"fbl": {"preset": "M9"}}}, "fedavg", r"methods\.fbl\.preset"),
    ],
)
def test_methods_that_cannot_be(table, spec, said):
    with pytest.raises((ConfigError, UnknownName), match=said):
        parse(with_method(table, spec))


def test_options_of_methods_are_checked_without_them_too():
    """In a run as in a comparison; where [algorithm] is the method's own, the two are one."""
    for table in ({"methods": {"fedbl": {}}}, {"methods": 3}, {"methods": {"fbl": 3}}):
        with pytest.raises(ConfigError, match="methods"):
            parse(table)
    own = {"algorithm": {"name": "pfedgate", "split": 10}, "methods": {"pfedgate": {"sparsity": 0.1}}}
    assert parse(own).algorithm.split == 10
    with pytest.raises(ConfigError, match=r"methods\.pfedgate\.sparsity"):
        parse({"methods": {"pfedgate": {"sparsity": 0.1}}})


def test_balance_works_over_the_algorithm():
    config = tiny.config("algorithm.name=fedprox", "algorithm.mu=0.3", "balance.name=fbl", "balance.period=5")
    assert config.method == FBL(period=5, base=FedProx(mu=0.3))
    assert tiny.config("algorithm.name=fedprox").method == FedProx()


def test_balance_with_a_method_that_is_not_over_another():
    with pytest.raises(
        ConfigError, match=r"balance\.name = 'fedprox': must be a method that works over another: fbl, regl"
    ):
        tiny.config("balance.name=fedprox")


@pytest.mark.parametrize(("over", "under"), [("fbl", "fbl"), ("regl", "fbl"), ("fbl", "regl")])
def test_balance_over_a_method_that_balances(over, under):
    with pytest.raises(ConfigError, match=rf"balance\.name = '{over}': cannot work over {under}"):
        tiny.config(f"algorithm.name={under}", f"balance.name={over}")


def test_weights_that_the_method_underneath_does_not_have():
    """The option is [balance]'s, its check the algorithm's: said when the configuration is read."""
    with pytest.raises(ConfigError, match=r"balance\.weights = 'trained': .* must be 'uniform' or 'samples'") as caught:
        tiny.config("algorithm.name=scaffold", "balance.name=fbl", "balance.weights=trained")
    assert caught.value.key == "balance.weights"
    tiny.config("algorithm.name=fedprox", "balance.name=fbl", "balance.weights=trained")  # FedProx has them


@pytest.mark.parametrize("key", ["weights=uniform", "denominator=all"])
def test_weights_of_the_method_underneath_are_not_dropped_without_a_word(key):
    """[balance] has its own, which hold; those that were given must be the same."""
    name, value = key.split("=")
    with pytest.raises(ConfigError, match=rf"algorithm\.{name} = '{value}': .* set balance\.{name} instead"):
        tiny.config(f"algorithm.{key}", "balance.name=regl")
    for algorithm in ((f"algorithm.{key}",), ()):
        assert getattr(tiny.config(*algorithm, "balance.name=regl", f"balance.{key}").method.inner, name) == value


def test_the_base_of_a_method_is_no_option():
    with pytest.raises(ConfigError, match=r"balance\.base = 3"):
        tiny.config("balance.name=fbl", "balance.base=3")


def test_profiles_that_overlap():
    with pytest.raises(ConfigError, match=r"profiles\.none_ids = \[2\]: .* unconstrained too"):
        tiny.config("profiles.none_ids=[1,2]", "profiles.unconstrained_ids=[2,3]")
    full = tiny.config("profiles.none=0.5", "profiles.unconstrained=0.5").profiles
    assert (full.none, full.unconstrained) == (0.5, 0.5)


def test_a_share_of_clients_or_a_list_of_them():
    for group in ("unconstrained", "none"):
        with pytest.raises(ConfigError, match=rf"profiles\.{group}_ids = \[1\]: cannot go with {group} = 0\.25: give"):
            tiny.config(f"profiles.{group}=0.25", f"profiles.{group}_ids=[1]")
    assert tiny.config("profiles.none=0.25", "profiles.unconstrained_ids=[1]").profiles.none == 0.25
    table = {"profiles": {"unconstrained_ids": [1, 2]}}
    for spec in ("fbl(25%)", "fbl(0%)"):
        with pytest.raises(
            ConfigError, match=r"profiles\.unconstrained_ids = \[1, 2\]: cannot go with fbl\(\d+%\): give"
        ):
            with_method(table, spec)
    assert parse(with_method(table, "fbl")).profiles.unconstrained_ids == (1, 2)


def test_files(tmp_path):
    (tmp_path / "trial.toml").write_text("rounds = 3\n[local]\nlr = 0.5\n")
    config = read(tmp_path / "trial.toml", ["local.lr=0.25"])
    assert (config.name, config.rounds, config.local.lr) == ("trial", 3, 0.25)
    assert str(config.folder) == "runs/trial"
    for name, content, said in (
        ("none.toml", None, "no such file"),
        ("bad.toml", b"rounds = = 3", "cannot be read as TOML"),
        ("latin.toml", b'name = "\xe9"', "cannot be read as TOML"),
        ("folder.toml", "", "cannot be read as TOML"),
    ):
        if content == "":
            (tmp_path / name).mkdir()
        elif content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name)


def test_build_names_what_is_missing():
    @dataclass(frozen=True, kw_only=True)
    class Thing:
        size: int
        share: float = option(0.5, "a share", ge=0, le=1)

    assert build(Thing, {"size": 3}) == Thing(size=3)
    with pytest.raises(ConfigError, match=r"thing\.size = None: this key is required"):
        build(Thing, {}, "thing")
    with pytest.raises(ConfigError, match=r"thing\.share = 2\.0: must be >= 0 and <= 1"):
        build(Thing, {"size": 1, "share": 2}, "thing")


def test_a_choice_is_of_its_own_type():
    """3.0 is no 3, and true no 1, though Python calls them equal."""

    @dataclass(frozen=True, kw_only=True)
    class Thing:
        channels: Literal[1, 3] = option(1, "of a picture")

    assert type(build(Thing, {"channels": 3}).channels) is int
    for value in (3.0, True, "3"):
        with pytest.raises(ConfigError, match=r"channels = .*: must be one of 1, 3"):
            build(Thing, {"channels": value})


@pytest.mark.parametrize("key", ["local.lr", "seed", "participation"])
def test_numbers_beyond_any_range(key):
    for sign in ("", "-"):
        with pytest.raises(ConfigError, match=rf"{key} = {sign}10*: must be within ±1\.8e\+308"):
            tiny.config(f"{key}={sign}{10**400}")


def test_every_registered_option_has_words():
    """What `fedkeel show` prints; a field without documentation would be an option nobody can find."""
    for room in ("algorithms", "datasets", "partitions", "models", "generators"):
        for name in registry.names(room):
            cls = registry.get(room, name)
            assert cls.__doc__
            for field in fields(cls):
                assert "hidden" in field.metadata or field.metadata["meaning"].doc, (room, name, field.name)


def test_nothing_to_balance_under_a_pooled_method():
    with pytest.raises(ConfigError, match="balance = 'centralized'"):
        tiny.config("algorithm.name=centralized", "balance.name=fbl")


# what other packages register -----------------------------------------------------------------------------------------


def test_a_package_that_cannot_be_loaded_is_named(room, tmp_path, monkeypatch):
    """By every look-up, and what stands after it is not lost once it is mended."""
    monkeypatch.syspath_prepend(str(tmp_path))
    method = "from fedkeel.algorithms.base import Algorithm\nfrom fedkeel.registry import get, register\n"
    method += "assert get('algorithms', 'fedavg')\n"  # a look-up within the look-up
    (tmp_path / "sound.py").write_text(f"{method}@register('algorithms', 'sound')\nclass Sound(Algorithm): ...\n")
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    points = [EntryPoint(name, f"{name}:{name.title()}", "fedkeel.algorithms") for name in ("broken", "sound")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_scanned", set())
    for _ in range(2):
        with pytest.raises(UserError, match=r"entry point broken = 'broken:Broken' .*No module named 'no_such_thing'"):
            registry.names(room)
    (tmp_path / "broken.py").write_text("Broken = None\n")
    importlib.invalidate_caches()
    assert "sound" in registry.names(room)


def test_a_name_is_of_one_class(room, tmp_path, monkeypatch):
    """The same class again, of a module imported anew, replaces itself; one of another module does not."""

    class Scaffold(Algorithm): ...

    Scaffold.__qualname__ = "Scaffold"
    bundled = registry.get(room, "scaffold")
    said = r"algorithms: 'scaffold' is the name of two classes, fedkeel\.algorithms\.scaffold\.Scaffold and test_config"
    with pytest.raises(UserError, match=said):
        registry.register(room, "scaffold")(Scaffold)
    assert registry.get(room, "scaffold") is bundled
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "again.py").write_text("class Mine: ...\n")
    first = importlib.import_module("again").Mine
    registry.register(room, "mine")(first)
    second = importlib.reload(sys.modules["again"]).Mine
    assert registry.register(room, "mine")(second) is not first and registry.get(room, "mine") is second
