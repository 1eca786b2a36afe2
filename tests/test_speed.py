"""The harness of the speed benchmarks: turns, ratios, process trees, tables. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import BENCHMARKS, modules_of

from fedkeel.config import parse

pytestmark = pytest.mark.full

SPEED = BENCHMARKS / "speed"


@pytest.fixture(scope="module")
def speed() -> Iterator[dict[str, ModuleType]]:
    """The modules of benchmarks/speed, which are imported from there."""
    names = ("workloads", "needs", "loops", "parts", "harness", "contender", "measure", "page")
    with modules_of(SPEED, *names) as found:
        yield found


def echo(steps: int, log: Path | None = None) -> list[str]:
    """The command of a contender that only counts."""
    noted = f"open({str(log)!r}, 'a').write('{steps} ')" if log else "0"
    answer = json.dumps({"steps": steps})
    text = f"import sys; print('{{}}', flush=True)\nfor line in sys.stdin: {noted}; print({answer!r}, flush=True)"
    return [sys.executable, "-c", text]


def test_a_race_takes_turns_and_keeps_what_failed(speed: dict[str, ModuleType], tmp_path: Path) -> None:
    log = tmp_path / "log"
    broken = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    found = speed["harness"].race({"a": echo(3, log), "b": echo(4, log), "c": broken}, 6)
    turns = [set(pair) for pair in zip(*[iter(log.read_text().split()[2:])] * 2, strict=True)]
    assert turns == [{"3", "4"}] * 6, "each repetition has one round of each"
    assert found.failed == {"c": "no such thing"} and len(found.rounds) == 6
    assert found.ratio("a", "c", bound=1.0) == {"value": None, "bound": 1.0, "why": "c: no such thing"}
    assert found.ratio("a", "b")["per"] == "step: the numbers of steps differ"
    assert set(found.table()["a"]) >= {"cpu_s", "wall_s", "steps", "peak_mb"}


def test_a_race_goes_on_without_who_loses_a_client(speed: dict[str, ModuleType]) -> None:
    """A round of fewer clients is another round: it is no figure."""
    text = (
        "import sys; print('{}', flush=True)\n"
        "for at, line in enumerate(sys.stdin):\n"
        '    lost = \'[{"client": 3, "reason": "out of memory"}]\' if at == 2 else \'[]\'\n'
        "    print('{\"steps\": 4, \"failed\": ' + lost + '}', flush=True)"
    )
    found = speed["harness"].race({"a": echo(3), "b": [sys.executable, "-c", text]}, 4)
    assert found.failed == {"b": "clients failed: out of memory"}
    assert found.ratio("b", "a")["value"] is None
    assert set(found.table()) == {"a", "b"} and "why" in found.table()["b"]
    assert [sorted(each) for each in found.rounds[2:]] == [["a"], ["a"]]


def test_options_of_the_measurements_exist(speed: dict[str, ModuleType]) -> None:
    measure, table = speed["measure"], speed["contender"].table(speed["workloads"].WORKLOADS["W1"])
    assert parse(table, measure.BF16).local.precision == "bfloat16"
    assert parse(table, measure.TWO_WORKERS).runtime == "pool"
    for name, options in measure.METHODS.items():
        assert parse(table, [f"algorithm.name={name}", *options])


def test_ratios_are_medians_of_pairs(speed: dict[str, ModuleType]) -> None:
    timing, made = speed["harness"].Timing, speed["harness"].Race
    # the machine becomes slower and slower: the ratio is 2 all the same
    rounds = [{"a": timing(0, 2.0 * slow, 5), "b": timing(0, 1.0 * slow, 5)} for slow in (1, 3, 9)]
    found = made(rounds, {}, {}, {}, {}, {}, (1.0, 2.0)).ratio("a", "b", bound=2.5)
    assert (found["value"], found["spread"], found["bound"]) == (2.0, [2.0, 2.0], 2.5) and "per" not in found


def test_children_are_counted(speed: dict[str, ModuleType]) -> None:
    child = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.2: pass\ninput()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    try:
        while speed["harness"].tree_seconds(process.pid) < 0.2:
            assert process.poll() is None
            time.sleep(0.01)
        assert len(speed["harness"].tree(process.pid)) == 2
    finally:
        process.communicate(b"\n")
    assert speed["harness"].tree_seconds(process.pid) == 0


def test_the_contenders_train_the_same_network(speed: dict[str, ModuleType]) -> None:
    workloads = speed["workloads"]
    for name, count in (("W1", 201_538), ("W2", 11_173_962), ("W0", 201_538)):
        work = workloads.WORKLOADS[name]
        assert sum(parameter.numel() for parameter in workloads.network(work).parameters()) == count
    assert [workloads.WORKLOADS[name].steps for name in ("W1", "W2", "W0")] == [250, 100, 100]
    again = workloads.arrays(workloads.WORKLOADS["W0"])
    assert all(map(torch.equal, workloads.arrays(workloads.WORKLOADS["W0"]), again))


def test_the_best_loop_computes_what_the_plain_one_does(speed: dict[str, ModuleType]) -> None:
    """Same draws, same arithmetic up to rounding: after two rounds both have the same model."""
    loops, work = speed["loops"], speed["workloads"].tiny(speed["workloads"].WORKLOADS["W1"])
    models: list[torch.nn.Module] = []
    network = loops.network
    loops.network = lambda work: models.append(network(work)) or models[-1]
    try:
        for loop in (loops.bare(work), loops.limit(work)):
            assert [loop(), loop()] == [work.steps] * 2
    finally:
        loops.network = network
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("fedavg", 32, 32),
        ("moon", 96, 32),  # two more networks
        ("fedntd", 64, 32),
        ("fedalign", 32, 32),
        ("fedgen", 32, 32),
        ("pfedgate", 32, 32),
        ("fedrep", 32, 0),  # the one epoch of `tiny` is the head's
        ("dynafed", 3032, 3032),  # 20 steps on 150 images
    ],
)
def test_a_loop_does_what_a_method_needs(
    speed: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, name: str, forward: int, backward: int
) -> None:
    """A round of 4 steps of 8: images through the bodies of all networks; numbers are finite, and the model moves."""
    loops, needs, work = speed["loops"], speed["needs"], speed["workloads"].tiny(speed["workloads"].WORKLOADS["W1"])
    models: list[torch.nn.Sequential] = []
    for module in (loops, needs):
        make = module.network
        monkeypatch.setattr(module, "network", lambda work, make=make: models.append(make(work)) or models[-1])
    one_round = loops.limit(work, needs=needs.NEEDS.get(name))
    before = [parameter.clone() for parameter in models[0].parameters()]
    with ExitStack() as hooks:
        found = [hooks.enter_context(speed["parts"].passes(model[-2])) for model in models]
        assert one_round() == 4
    assert sum(each["forward"] for each in found) == forward
    assert sum(each["backward"] for each in found) == backward
    after = list(models[0].parameters())
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert not torch.equal(after[-1], before[-1]), "the head"


def test_needs_are_of_methods_that_there_are(speed: dict[str, ModuleType]) -> None:
    from fedkeel import registry

    methods = {name: registry.get("algorithms", name) for name in registry.names("algorithms")}
    needs = speed["needs"].NEEDS
    assert set(needs) <= set(methods)
    assert {name for name, method in methods.items() if not method.has_global} <= set(needs)


def test_fedkeel_answers_by_its_public_parts(speed: dict[str, ModuleType]) -> None:
    answers = speed["contender"].contender(speed["contender"].workload("tiny:W1"), "fedkeel", [])
    assert answers["go"]() == {"steps": 4, "failed": []}
    assert answers["count"]() == {"forward": 32, "backward": 32, "evaluated": 20}
    parts = answers["profile"]()
    assert set(parts) == {"rest", *speed["parts"].PARTS}, "a part is no longer called by its name in parts.py"


def test_a_registry_of_all_bounds(speed: dict[str, ModuleType]) -> None:
    keys = [key for _, keys in speed["measure"].MEASUREMENTS.values() for key in keys]
    assert len(keys) == len(set(keys)) and set(speed["measure"].BOUNDS) <= set(keys)


def test_one_figure_is_written_beside_the_others(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    out.write_text(json.dumps({"import_s": {"value": 1}}))
    command = [sys.executable, str(SPEED), "--tiny", "--out", str(out), "W0_float32"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["import_s"] == {"value": 1} and found["W0_float32"]["bound"] == 0.88
    assert {"bare", "limit", "fedkeel"} == set(found["W0"]) and found["hardware"]["cores"]


def test_tables_are_made_between_their_markers(speed: dict[str, ModuleType]) -> None:
    figures = {"W1_float32": {"value": 0.61, "spread": [0.6, 0.62], "load": [1.0, 2.0]}}
    text = speed["page"].filled("before\n<!-- reach -->\nold\n<!-- end -->\nafter\n", figures)
    assert "| W1_float32 | 0.61 | 0.66 | 0.6 to 0.62 | 1.0-2.0 |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    page = (SPEED / "README.md").read_text()
    assert {name for _, name, _ in speed["page"].MARKED.findall(page)} == set(speed["page"].TABLES)


def test_the_page_has_the_numbers_of_its_measurements(speed: dict[str, ModuleType]) -> None:
    """After new ones: `python benchmarks/speed --page`."""
    page = speed["page"].PAGE.read_text()
    assert page == speed["page"].filled(page, json.loads((BENCHMARKS / "results" / "speed.json").read_text()))
