"""What crosses between machines: every bit, and nothing that was not asked for."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkeel.records import Reply, Server, Update
from fedkeel.runtimes import wire
from fedkeel.runtimes.wire import Gate, Malformed, Packet, Raw
from fedkeel.weights import Statistics, Weights, mean

TENSORS = [
    torch.tensor([1.0, -0.0, math.inf, math.nan, 1e-45]),
    torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last),
    torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).t(),
    torch.tensor([1.5, -2.0, 3e38], dtype=torch.bfloat16),
    torch.tensor(3.25, dtype=torch.float16),
    torch.tensor(7.5, dtype=torch.bfloat16),
    torch.tensor([1e300, -1e-300], dtype=torch.float64),
    torch.tensor([[-(2**63), 2**63 - 1]]),
    torch.tensor([-(2**31)], dtype=torch.int32),
    torch.tensor([True, False, True]),
    torch.tensor(True),
    torch.arange(256, dtype=torch.uint8),
    torch.tensor([1 + 2j]),
    torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
    torch.empty(0),
    torch.empty(0, 3, dtype=torch.int64),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}")
def test_every_bit_of_a_tensor_arrives(tensor):
    raw = wire.raw(tensor)
    found = wire.tensor_of(raw)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(found.reshape(-1).view(torch.uint8), flat)
    assert raw.data == flat.numpy().tobytes()
    if found.numel() and found.dtype not in (torch.bool, torch.float8_e4m3fn):
        found.add_(1)  # in memory of its own
        assert raw.data == flat.numpy().tobytes()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (Raw("object", (1,), b"1234"), "no type 'object'"),
        (Raw("float32", (2,), b"1234"), "4 bytes are no float32 tensor"),
        (Raw("float32", (-1, -1), b"1234"), "no float32 tensor"),
        (Raw("float32", (2**40, 2**40), b""), "no float32 tensor"),
        (Raw("bool", (2,), b"\x00\x02"), "bool"),
    ],
)
def test_bytes_that_are_no_tensor_are_refused(raw, why):
    with pytest.raises(Malformed, match=why):
        wire.tensor_of(raw)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000])
def test_text_that_is_no_object_is_refused(text):
    with pytest.raises(Malformed):
        wire.loads(text)


def server(**more):
    return Server(
        params=torch.arange(5.0),
        buffers=torch.ones(2),
        clients=3,
        samples=30,
        counters={"n": torch.tensor(4)},
        shared={"c": torch.full((5,), 0.5)},
        private={"secret": torch.ones(9)},
        round=2,
        **more,
    )


def test_the_public_part_goes_down_and_nothing_private():
    there = server(beside={"other": torch.ones(5)}, metrics={"m": 1.0})
    shared = {name: wire.raw(tensor) for name, tensor in wire.public(there).items()}
    assert sorted(shared) == ["buffers", "counter.n", "params", "shared.c"]
    packet = wire.down(shared, {"note": torch.tensor([3])}, {"round": 2})
    assert sorted(packet.tensors) == ["buffers", "counter.n", "mail.note", "params", "shared.c"]
    found, mail = wire.received(packet, server(), 2)
    assert torch.equal(found.params, there.params) and torch.equal(found.shared["c"], there.shared["c"])
    assert found.round == 2 and found.counters["n"] == 4 and torch.equal(mail["note"], torch.tensor([3]))


def test_the_model_is_not_sent_where_mail_has_one():
    there = server()
    shared = {name: wire.raw(tensor) for name, tensor in wire.public(there).items()}
    packet = wire.down(shared, {"params": torch.full((5,), 9.0)}, {})
    assert "params" not in packet.tensors
    found, mail = wire.received(packet, there, 2)
    assert torch.equal(found.params, torch.full((5,), 9.0)) and torch.equal(mail["params"], found.params)


def good(**more):
    fields = {
        "update": Update(12.5, torch.arange(5.0) / 3, {"c": torch.ones(5)}),
        "buffers": torch.tensor([0.1, 0.2]),
        "counters": {"n": torch.tensor(7)},
        "loss": 0.1 + 0.2,
        "steps": 3,
        "state": {"own": torch.ones(100)},
        "metrics": {"local_after/accuracy": 1 / 3, "local_after/loss": math.inf, "method/drift": 0.25},
    }
    return Reply(1, **{**fields, **more})


def gate(limit=1e6):
    names = {"local_after/accuracy", "local_after/loss", "local_after/class/ox"}
    return Gate(2, wire.kinds(good()), names, limit)


def test_a_good_reply_arrives_whole_and_its_state_stays():
    packet = wire.up(good(), 2, ["careful"])
    assert "state" not in packet.text and not any("own" in name for name in packet.tensors)
    found = gate().reply(packet, 1)
    assert found.failure == "" and found.update is not None and found.update.weight == 12.5
    assert torch.equal(found.update.delta, good().update.delta) and torch.equal(found.update.extra["c"], torch.ones(5))
    assert torch.equal(found.buffers, good().buffers) and found.counters["n"] == 7
    assert (found.loss, found.steps, found.bytes_up) == (0.1 + 0.2, 3, 20 + 20 + 8 + 8)
    assert found.metrics["local_after/accuracy"] == 1 / 3 and found.metrics["method/drift"] == 0.25
    assert math.isnan(found.metrics["local_after/loss"]) and not found.state and not found.update.keep


def tensors(**more):
    def change(packet):
        found = {**packet.tensors, **{name.replace("__", "."): t and wire.raw(t[0]) for name, t in more.items()}}
        return replace(packet, tensors={name: raw for name, raw in found.items() if raw})

    return change


def facts(**more):
    return lambda packet: replace(packet, text=json.dumps({**json.loads(packet.text), **more}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (tensors(delta=(torch.arange(4.0),)), r"'delta' is float32 \[4\], not float32 \[5\]"),
        (tensors(delta=(torch.empty(0),)), r"'delta' is float32 \[0\]"),
        (tensors(delta=(torch.arange(5.0).double(),)), r"'delta' is float64 \[5\], not float32 \[5\]"),
        (tensors(delta=(torch.tensor([1.0, 2.0, math.nan, 4.0, 5.0]),)), "'delta' is not finite"),
        (tensors(buffers=(torch.tensor([math.inf, 1.0]),)), "'buffers' is not finite"),
        (tensors(extra__c=(torch.full((5,), -math.inf),)), "'extra.c' is not finite"),
        (tensors(counter__n=(torch.ones(2),)), r"'counter.n' is float32 \[2\], not int64 \[\]"),
        (tensors(delta=None), "'delta' is missing"),
        (tensors(extra__c=None), "'extra.c' is missing"),
        (tensors(extra__labels=(torch.ones(3),)), "undeclared field 'extra.labels'"),
        (tensors(state=(torch.ones(3),)), "undeclared field 'state'"),
        (lambda packet: Packet({**packet.tensors, "delta": Raw("float32", (5,), b"")}, packet.text), "0 bytes are no"),
        (facts(client=2), "it is of client 2, not 1"),
        (facts(client=True), "it is of client True"),
        (facts(round=1), "it is of round 1, not 2"),
        (tensors(delta=(torch.full((5,), 3e38),)), r"'delta' holds 3e\+38, 1e\+09 is the most that is taken"),
        (tensors(buffers=(torch.tensor([0.1, -2e9]),)), r"'buffers' holds 2e\+09"),
        (facts(weight=-1), "its weight is -1"),
        (facts(weight=1e300), r"its weight is 1e\+300, not 0 or a number from 2\^-53 to 2\^53"),
        (facts(weight=2**53 + 1), "its weight is 9007199254740993"),
        (facts(weight=1e-300), "its weight is 1e-300"),
        (facts(weight="\n\x1b[2J"), r"its weight is  +\[2J, not 0"),
        (facts(weight=None), "its weight is None"),
        (facts(weight=10**400), "its weight is 1"),
        (facts(weight=True), "its weight is True"),
        (facts(loss=None), "its training loss is None after 3 steps"),
        (facts(loss=1e300), r"its training loss is 1e\+300 after 3 steps"),
        (facts(steps=-1), "its number of steps is -1"),
        (facts(steps=2.5), "its number of steps is 2.5"),
        (facts(labels=[1, 2]), "undeclared field 'labels'"),
        (facts(metrics={"patients": 3.0}), "undeclared metric 'patients'"),
        (facts(metrics={"local_before/accuracy": 0.5}), "undeclared metric 'local_before/accuracy'"),
        (facts(metrics={"method/\x1b[2J": 0.5}), "undeclared metric"),
        (facts(metrics={"method/a": "high"}), "metric 'method/a' is high, not a number"),
        (facts(metrics={"local_after/class/ox": None}), "metric 'local_after/class/ox' is None, not a number"),
        (facts(metrics={f"method/{i}": 0.5 for i in range(65)}), "65 metrics"),
        (facts(metrics=[1]), "no JSON object"),
        (facts(versions={**wire.versions(), "torch": "2.1.0"}), r"torch 2\.1\.0, the server has"),
        (facts(versions=None), "does not say which versions"),
        (lambda packet: replace(packet, text="{"), "cannot be read"),
        (lambda packet: replace(packet, text='{"weight": NaN}'), "NaN"),
        (lambda packet: replace(packet, text="[]"), "no JSON object"),
    ],
)
def test_whatever_is_wrong_is_refused_and_named(change, why):
    found = gate().reply(change(wire.up(good(), 2)), 1)
    assert found.update is None and found.client == 1
    with pytest.raises(ValueError, match=why):
        raise ValueError(found.failure)


def test_a_reply_that_is_too_large_is_refused_unread():
    packet = replace(wire.up(good(), 2), text="{" + " " * 2**21)
    assert gate().reply(packet, 1).failure == "refused: a reply of 2.0 MiB, federation.max_reply is 1.0"


def test_a_failure_is_told_in_one_line_without_control_characters():
    """What a terminal obeys, what could pass for a line of the log's own, half a character that no file takes."""
    reply = Reply(
        1, failure="no\x1b[31m luck\r\nround 9\u2028\u202e\ud800" + "x" * 5000, trace="Traceback\n  line\nround 9"
    )
    found = gate().reply(wire.up(reply, 2), 1)
    assert found.failure.startswith("no [31m luck  round 9   x") and len(found.failure) < 2100
    assert found.trace == "Traceback\n      line\n    round 9" and found.update is None


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.tensor([wire.LARGEST, -wire.LARGEST]), ""),
        (torch.tensor([2e9]), "holds 2e+09, 1e+09 is the most that is taken"),
        (torch.tensor([0.0, -1e300], dtype=torch.float64), "holds 1e+300, 1e+09 is the most that is taken"),
        (torch.tensor([65504.0], dtype=torch.float16), ""),
        (torch.tensor([0.0, math.inf], dtype=torch.float16), "is not finite"),
        (torch.tensor([1e30], dtype=torch.bfloat16), "holds 1e+30, 1e+09 is the most that is taken"),
        (torch.tensor([1.0, math.nan], dtype=torch.bfloat16), "is not finite"),
        (torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn), ""),
        (torch.tensor([1.0, math.nan]).to(torch.float8_e5m2), "is not finite"),
        (torch.tensor([1.0, complex(0.0, math.inf)]), "is not finite"),
        (torch.tensor([2**63 - 1]), ""),
        (torch.tensor([True]), ""),
        (torch.empty(0), ""),
    ],
)  # fmt: skip
def test_numbers_that_no_sum_could_take_are_refused(tensor, why):
    assert wire.beyond(tensor) == why


def test_what_is_taken_can_be_averaged():
    """Ten thousand of the heaviest replies with the largest values there may be, as means and as pooled variances."""
    most = torch.tensor([wire.LARGEST, -wire.LARGEST])
    layout = Weights(nn.BatchNorm1d(1)).layout
    assert len(layout.variance_pairs()) == 1
    statistics = Statistics(layout, "pooled")
    for _ in range(10_000):
        statistics.add(most, wire.HEAVIEST)
    found = statistics.average()
    assert found is not None and bool(torch.isfinite(found).all())
    for weight in (wire.HEAVIEST, 1 / wire.HEAVIEST):
        (average,) = mean((weight, (most,)) for _ in range(10_000))
        assert torch.allclose(average, most, rtol=1e-3)
    for weight in (0.0, wire.HEAVIEST, 1 / wire.HEAVIEST):
        update = replace(good().update, weight=weight, delta=torch.full((5,), wire.LARGEST))
        assert gate().reply(wire.up(good(update=update), 2), 1).failure == ""


def test_without_a_rehearsal_the_first_reply_tells():
    packet = wire.up(good(), 2)
    assumed = wire.assumed(packet, server(), ("c",))
    assert assumed == wire.kinds(good())
    assert "extra.c" not in wire.assumed(packet, server(), ())
    wrong = tensors(delta=(torch.arange(4.0),))(packet)
    assert "[4]" in replace(gate(), expected=wire.assumed(wrong, server(), ("c",))).reply(wrong, 1).failure


def test_versions_that_differ_are_named():
    ours = wire.versions()
    assert wire.differing(ours, ours) == ""
    theirs = {**ours, "torch": "2.11.0"}
    assert wire.differing(theirs, {**ours, "torch": "2.13.0"}) == "torch 2.11.0, the server has 2.13.0"
    forged = {**ours, "torch": "2.1\nround 9/9\x1b[2J\ud800"}
    assert wire.differing(forged, {**ours, "torch": "2.13.0"}) == "torch 2.1 round 9/9 [2J , the server has 2.13.0"
    assert "+" not in ours["torch"] and set(ours) == {"python", "byte order", "fedkeel", "torch", "flwr", "numpy"}
