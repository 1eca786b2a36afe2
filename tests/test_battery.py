"""Every method through every check of the battery; and methods with a fault, which the checks must find."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import battery
import pytest
import tiny
import torch

from fedkeel import local as clients
from fedkeel.algorithms.base import Algorithm, Over
from fedkeel.errors import ConfigError
from fedkeel.models.split import Split
from fedkeel.records import Phase, Update
from fedkeel.registry import get, register


@pytest.mark.parametrize("check", battery.CHECKS)
@pytest.mark.parametrize("method", battery.methods())
def test_battery(method, check):
    try:
        battery.CHECKS[check](method)
    except battery.NotApplicable as reason:
        pytest.skip(str(reason))


# methods under balancing ----------------------------------------------------------------------------------------------


PLAIN = [name for name in battery.methods() if not issubclass(get("algorithms", name), Over)]


@pytest.mark.parametrize("over", ["fbl", "regl"])
@pytest.mark.parametrize("method", PLAIN)
def test_balancing_goes_over_every_method(method, over):
    """As docs/comparing.md says: ReGL over all but those that pool the data, FBL over those that also leave the network
    as it is. No client fails."""
    algorithm = get("algorithms", method)()
    as_it_is = type(algorithm.build(tiny.config(*battery.NETS["batch"]).model.build((1, 16, 16), 4))) is Split
    if algorithm.pooled or (over == "fbl" and not as_it_is):
        with pytest.raises(ConfigError, match=r"no clients to balance|which changes the network; ReGL can"):
            battery.run(battery.config(method, f"balance.name={over}"), data=battery.data())
        return
    volume = ("balance.volume=4",) if over == "regl" else ()
    config = battery.config(method, f"balance.name={over}", *volume, "rounds=2")
    battery.finite(battery.run(config, data=battery.data()))


# methods with a fault -------------------------------------------------------------------------------------------------


class ChangesTheServers(Algorithm):
    def start(self, local):
        local.anchor.add_(0.01)


class ChangesWhatAllGet(Algorithm):
    def server_state(self, params):
        return {"c": torch.zeros(3)}

    def start(self, local):
        local.shared["c"].add_(1)


class ChangesItsMail(Algorithm):
    def mail(self, server, client):
        return {"params": server.params.clone()}

    def upload(self, local):
        update = super().upload(local)
        local.mail["params"].zero_()
        return update


class KeepsTheLiveWeights(Algorithm):
    def client_state(self, params):
        return {"w": params.clone()}

    def upload(self, local):
        return replace(super().upload(local), keep={"w": local.params})


class SendsTheLiveWeights(Algorithm):
    def upload(self, local):
        return Update(1.0, local.params)


class RemembersTheLastClient(Algorithm):
    last = [0]  # outlives the client, as the state of a module does

    def upload(self, local):
        update = super().upload(local)
        update.delta.add_(1e-6 * self.last[0])
        self.last[0] = local.client
        return update


class SendsLess(Algorithm):
    def sends(self):
        return ("one", "other")

    def upload(self, local):
        return replace(super().upload(local), extra={"one": torch.ones(1)} if local.round == 1 else {})


class SharesNothing(Algorithm):
    def server_state(self, params):
        return {"never": torch.empty(0)}


class HeadsStandStill(Algorithm):
    def personal(self, name, module):
        return name.startswith("head.")

    def phases(self, local, training):
        return (Phase(1, own=False),)


class BodiesStandStill(HeadsStandStill):
    def phases(self, local, training):
        return (Phase(1, shared=False),)


@pytest.mark.parametrize(
    ("check", "method", "why"),
    [
        ("apart", ChangesTheServers, "changed by client 0: server params"),
        ("apart", ChangesWhatAllGet, "changed by client 0: server shared c"),
        ("apart", ChangesItsMail, "changed by client 0: mail params"),
        ("apart", RemembersTheLastClient, "depends on the order of the clients: client 0's delta"),
        ("declares", SendsLess, r"never sent: \['other'\]"),
        ("declares", SharesNothing, r"never shared: \['never'\]"),
        ("learns", HeadsStandStill, "nothing of a client's own"),
        ("learns", BodiesStandStill, "nothing shared"),
    ],
)
def test_a_fault_is_found(room, check, method, why):
    register(room, method.__name__)(dataclass(frozen=True, kw_only=True)(method))
    with pytest.raises(AssertionError, match=why):
        battery.CHECKS[check](method.__name__)


@pytest.mark.parametrize("method", [KeepsTheLiveWeights, SendsTheLiveWeights])
def test_live_weights_are_no_fault(room, method):
    """They are copied before the next client trains."""
    register(room, method.__name__)(dataclass(frozen=True, kw_only=True)(method))
    battery.CHECKS["apart"](method.__name__)


@pytest.mark.parametrize("name", ["payload", "size_of"])
def test_wrong_counts_of_bytes_are_found(room, monkeypatch, name):
    @register(room, f"counted by {name}")
    @dataclass(frozen=True, kw_only=True)
    class Counted(Algorithm):
        def mail(self, server, client):
            return {"note": torch.ones(2)}

    right = getattr(clients, name)
    monkeypatch.setattr(clients, name, lambda *its: right(*its) - 4)
    with pytest.raises(AssertionError):
        battery.declares(f"counted by {name}")


def test_bits_are_compared():
    """Type, shape, the sign of zero and the payload of NaN; not how a tensor lies in memory."""
    one = torch.tensor([[0.0, 1.0], [2.0, math.nan]])
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    for other in (one.clone(), one.T.contiguous().T):
        assert battery.identical(one, other)
    changed = one.clone()
    changed[1, 1] = other_nan[0]
    for other in (one * torch.tensor([[-1.0, 1.0], [1.0, 1.0]]), one.bfloat16(), one.reshape(4), one[None], changed):
        assert not battery.identical(one, other)
    for value, same in (((1, 0), True), ((1, 1), False)):
        assert battery.identical(torch.tensor([True, False]), torch.tensor(value).bool()) is same
    assert battery.identical(torch.tensor(3), torch.tensor(3))
    assert battery.identical(torch.empty(0, 3), torch.empty(0, 3))
    assert not battery.identical(torch.empty(0, 3), torch.empty(3, 0))
    with pytest.raises(AssertionError, match="state w"):
        battery.same_bits({"w": torch.zeros(2)}, {"w": -torch.zeros(2)}, "state ")


def test_the_page_is_that_of_the_last_battery():
    """After a change of a method's length: `python tests/battery.py --page`; of a check or a method: `make battery`."""
    table = json.loads(battery.TABLE.read_text())
    assert list(table) == battery.methods() and {tuple(row) for row in table.values()} == {tuple(battery.CHECKS)}
    assert battery.PAGE.read_text() == battery.markdown(table)


def test_lines_are_counted():
    source = '''"""Module.

    Two paragraphs.
    """

    import os  # why

    # a comment
    class Thing:
        """Class."""

        size: int = 3
        """Of it."""

        def name(self) -> str:
            return f"""
    a text, which is code {os.sep}
    """
    '''.replace("\n    ", "\n")
    assert battery.lengths(source) == (7, 18)
