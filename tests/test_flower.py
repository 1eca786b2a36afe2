"""The Flower runtime on a grid within this process (tests/loopback.py); real processes: tests/test_federation.py."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, replace

import battery
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_privacy import PRIVATE

pytest.importorskip("flwr")

import loopback
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedkeel.algorithms.base import Algorithm
from fedkeel.checkpoint import Checkpoints
from fedkeel.config import parse
from fedkeel.data import site
from fedkeel.errors import ConfigError, RunError, TooFewClients
from fedkeel.job import Job
from fedkeel.loop import run
from fedkeel.privacy import norm
from fedkeel.records import Reply, Update
from fedkeel.registry import register
from fedkeel.runtimes import flower, flower_roster, flower_server, wire
from fedkeel.runtimes.inprocess import InProcessRuntime


def config(tmp_path, *overrides, method="fedavg", net="batch"):
    where = ("data.name=tiny", f"runs_dir={tmp_path}/runs", "federation.join_wait=0.5")
    return battery.config(method, *where, *overrides, net=net)


def state_files(tmp_path):
    """What nodes have on disk, by client and round."""
    found = {}
    for path in tmp_path.glob("node*/*/client-*/*.safetensors"):
        client, _, version = path.stem.partition("-")
        found[int(client), int(version)] = load_file(path)
    return found


@pytest.mark.full
@pytest.mark.parametrize("method", battery.methods())
def test_every_method_gives_the_same_bits(tmp_path, method):
    cfg = config(tmp_path, method=method)
    alone = run(cfg, folder=tmp_path / "alone")
    over = loopback.federate(loopback.grid(tmp_path), cfg)
    battery.same(alone, over)
    states = [json.loads(path.read_text()) for path in cfg.folder.glob("checkpoint/*/state.json")]
    accepted = {(client, number) for state in states for client, number, _ in state["kept"]["clients"]}
    there = state_files(tmp_path)
    assert accepted <= set(there)
    for client, number in accepted:
        kept = load_file(tmp_path / "alone" / "clients" / f"{client}-{number}.safetensors")
        battery.same_bits(there[client, number], kept, f"client {client}, round {number}: ")


def kept_of(grid):
    """What nodes answer from now on, by action."""
    replies = []

    def keep(action, message, answer):
        reply = answer()
        replies.append((action, flower.packet_of(reply.content)))
        return reply

    grid.change = dict.fromkeys(grid.nodes, keep)
    return replies


def test_privacy_gives_the_same_bits_and_nodes_clip(tmp_path):
    """Before anything leaves the node, what it sends is no longer than the limit, and without the limit it is."""
    pytest.importorskip("dp_accounting")
    cfg = config(tmp_path, *PRIVATE, "local.lr=0.5", method="scaffold", net="group")
    alone = run(cfg)
    grid = loopback.grid(tmp_path)
    replies = kept_of(grid)
    battery.same(alone, loopback.federate(grid, cfg))
    assert 0 < alone.rounds[0]["privacy/epsilon"] <= alone.rounds[-1]["privacy/epsilon"]
    assert [record["failed"] for record in alone.rounds] == [[]] * 3
    found = [
        {name: wire.tensor_of(raw) for name, raw in packet.tensors.items()}
        for action, packet in replies
        if action == "train.fit"
    ]
    assert len(found) == 6 and all(set(each) == {"delta", "buffers", "extra.c"} for each in found)
    lengths = [norm(Update(1.0, each["delta"], {"c": each["extra.c"]})) for each in found]
    assert cfg.privacy is not None and max(lengths) <= cfg.privacy.clip
    job = Job(replace(cfg, privacy=None))
    whole = job.worker.fit(job.first_server(), 0, None).update
    assert whole is not None and norm(whole) > 2 * cfg.privacy.clip, "there was nothing to clip"


def test_a_robust_median_gives_the_same_bits(tmp_path):
    cfg = config(tmp_path, "robust.name=median", "participation=1.0", method="scaffold")
    over = loopback.federate(loopback.grid(tmp_path), cfg)
    battery.same(run(cfg), over)
    plain = run(replace(cfg, robust=None))
    assert any(not torch.equal(tensor, over.weights[name]) for name, tensor in plain.weights.items())


def test_more_clients_than_are_sent_to_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_roster, "AT_ONCE", 2)
    cfg = config(tmp_path, "clients=5", "participation=1.0", "partition.min_size=2", "pool.dir=", method="fbl")
    battery.same(run(cfg), loopback.federate(loopback.grid(tmp_path, clients=5), cfg))


# faults of nodes ------------------------------------------------------------------------------------------------------


def spoiled(change):
    """Answers of training with their packet changed."""

    def act(action, message, answer):
        reply = answer()
        if action != "train.fit":
            return reply
        return Message(flower.record_of(change(flower.packet_of(reply.content))), reply_to=message)

    return act


def with_tensor(name, tensor):
    return spoiled(lambda packet: replace(packet, tensors={**packet.tensors, name: wire.raw(tensor)}))


def with_facts(**facts):
    return spoiled(lambda packet: replace(packet, text=wire.dumps({**wire.loads(packet.text), **facts})))


def with_nan(packet):
    delta = wire.tensor_of(packet.tensors["delta"])
    delta[0] = float("nan")
    return replace(packet, tensors={**packet.tensors, "delta": wire.raw(delta)})


def vast(packet):
    delta = torch.full_like(wire.tensor_of(packet.tensors["delta"]), 3e38)
    return replace(packet, tensors={**packet.tensors, "delta": wire.raw(delta)})


def raises(action, message, answer):
    if action == "train.fit":
        raise RuntimeError("out of coffee")
    return answer()


def silent(action, message, answer):
    return None if action == "train.fit" else answer()


def pickled(action, message, answer):
    if action != "train.fit":
        return answer()
    record = RecordDict({"tensors": ArrayRecord([np.zeros(3)]), "values": ConfigRecord({"json": "{}"})})
    return Message(record, reply_to=message)


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (raises, "Flower, code 2: .*out of coffee"),
        (silent, "no reply within 1 seconds"),
        (spoiled(with_nan), "'delta' is not finite"),
        (with_tensor("delta", torch.zeros(3)), r"'delta' is float32 \[3\], not float32"),
        (with_tensor("extra.labels", torch.zeros(3)), "undeclared field 'extra.labels'"),
        (with_tensor("delta", torch.zeros(600_000)), "a reply of 2.3 MiB, federation.max_reply is 2.0"),
        (with_facts(versions={**wire.versions(), "fedkeel": "0.0.1"}), "fedkeel 0.0.1, the server has"),
        (with_facts(weight=-5.0), "its weight is -5.0"),
        (with_facts(weight=1e300), r"its weight is 1e\+300"),
        (spoiled(vast), r"'delta' holds 3e\+38"),
        (with_facts(failure="\ud800\nround 9/9\x1b[2J"), r"^  round 9/9 \[2J$"),
        (pickled, "is written as 'numpy.ndarray'"),
    ],
)
def test_a_faulty_node_is_named_and_the_round_goes_on(tmp_path, act, why):
    cfg = config(tmp_path, "rounds=1", "participation=1.0", "federation.deadline=1", "federation.max_reply=2")
    grid = loopback.grid(tmp_path)
    grid.change[102] = act
    result = loopback.federate(grid, cfg)
    record = result.rounds[0]
    assert record["clients"] == [0, 1, 3] and [note["client"] for note in record["failed"]] == [2]
    assert re.search(why, record["failed"][0]["reason"]), record["failed"]


def test_a_round_of_weight_zero_is_tried_again(tmp_path, monkeypatch, room):
    """On a federation, by a server that lives on; anywhere else it ends the run, with the same words."""
    monkeypatch.setattr(flower_server, "PAUSE", 0.01)
    cfg = config(tmp_path, "participation=1.0")
    grid, left = loopback.grid(tmp_path), [4]

    def weightless(action, message, answer):
        if action != "train.fit" or not left[0]:
            return answer()
        left[0] -= 1
        return with_facts_of(answer(), message, weight=0.0)

    grid.change = dict.fromkeys(grid.nodes, weightless)
    battery.same(run(cfg), loopback.federate(grid, cfg))
    assert left == [0]

    @register("algorithms", "weightless")
    @dataclass(frozen=True, kw_only=True)
    class Weightless(Algorithm):
        def weight(self, local):
            return 0.0

    with pytest.raises(TooFewClients, match="round 1: the weights of all usable updates are zero"):
        run(replace(cfg, algorithm=Weightless()))


def test_a_server_that_is_away_for_a_moment_costs_a_reply(tmp_path, monkeypatch):
    """Flower raises when it cannot be reached: what was to be sent is lost, and why is in the record."""
    cfg = config(tmp_path, "participation=1.0", "rounds=2")
    grid, push, down = loopback.grid(tmp_path), loopback.Loopback.push_messages, [True]
    monkeypatch.setattr(flower_roster, "AT_ONCE", 2)

    def away(self, messages):
        if down[0] and messages[0].metadata.message_type == "train.fit":
            down[0] = False
            raise ConnectionError("connection refused\nby peer")
        return push(self, messages)

    monkeypatch.setattr(loopback.Loopback, "push_messages", away)
    first, second = loopback.federate(grid, cfg).rounds
    why = "it could not be sent: ConnectionError: connection refused by peer"
    assert first["failed"] == [{"client": 0, "reason": why}, {"client": 1, "reason": why}]
    assert first["clients"] == [2, 3] and second["clients"] == [0, 1, 2, 3]


def test_why_an_answer_could_not_be_fetched_is_told():
    class Post:
        def take(self, number):
            raise OSError("no route to host")

    reason = flower_roster.Awaited(Post(), "7", 0.1, 0.01).wait().reason
    assert reason == "no reply within 0.1 seconds; OSError: no route to host"
    Post.take = lambda self, number: None
    assert flower_roster.Awaited(Post(), "7", 0.1, 0.01).wait().reason == "no reply within 0.1 seconds"


def test_it_ends_as_a_run_in_which_the_same_clients_failed(tmp_path, room):
    """Also the states of clients: what a failed round would have made of them is nowhere."""
    cfg = config(tmp_path, "participation=1.0", "federation.deadline=5", method="scaffold")
    grid = loopback.grid(tmp_path)
    fails = {(1, 0), (2, 1), (0, 1)}

    def act(action, message, answer):
        facts = wire.loads(flower.packet_of(message.content).text)
        reply = answer()
        if action == "train.fit" and (facts["client"], facts["round"]) in fails:
            raise RuntimeError("the reply is lost, the state is pending")
        return reply

    grid.change = dict.fromkeys(grid.nodes, act)
    over = loopback.federate(grid, cfg)

    class Failing(InProcessRuntime):
        def run(self, server, clients, accepted, measure):
            for client in clients:
                if (client, server.round) in fails:
                    yield Reply(client, failure="lost")
                else:
                    yield from super().run(server, [client], accepted, measure)

    class Engine:
        remote = False

        def start(self, job):
            return Failing(job)

    alone = run(cfg, engine=Engine())
    battery.same_bits(over.weights, alone.weights, "")
    assert [record["clients"] for record in over.rounds] == [record["clients"] for record in alone.rounds]


@pytest.mark.full
def test_a_late_reply_is_dropped_and_so_is_its_state(tmp_path):
    cfg = config(tmp_path, "rounds=2", "participation=1.0", "federation.deadline=6", "federation.join_wait=60")
    cfg = replace(cfg, algorithm=config(tmp_path, method="scaffold").algorithm)
    grid, late = loopback.grid(tmp_path, threads=True), []

    def slow(action, message, answer):
        reply = answer()
        if action == "train.fit" and not late:
            late.append(True)
            loopback.until((cfg.folder / "rounds.jsonl").read_text, 60)  # the round is over
        return reply

    grid.change[101] = slow
    result = loopback.federate(grid, cfg)
    assert [record["clients"] for record in result.rounds] == [[0, 2, 3], [0, 1, 2, 3]]
    fits = [wire.loads(flower.packet_of(m.content).text) for m in grid.sent if m.metadata.message_type == "train.fit"]
    assert [f["accepted"] for f in fits if f["client"] == 1] == [None, None]
    assert [f["accepted"] for f in fits if f["client"] == 0] == [None, 0]
    kept = {version for client, version in state_files(tmp_path) if client == 1}
    assert kept == {1}, "the state of the round whose reply was late is gone"


# who takes part -------------------------------------------------------------------------------------------------------


def test_of_two_nodes_of_one_client_the_second_waits(tmp_path, capsys):
    cfg = config(tmp_path, "participation=1.0")
    grid = loopback.grid(tmp_path)
    grid.nodes[200] = {"client": "1", "state-dir": str(tmp_path / "other")}
    battery.same(loopback.federate(grid, cfg), run(cfg))
    said = capsys.readouterr().out
    assert "client 1: node 200 says that it is this client, and so does node 101" in said
    assert {action for node, action in grid.log if node == 200} == {"query.info"}


def test_nodes_that_do_not_belong_are_refused_by_name(tmp_path, capsys):
    cfg = config(tmp_path, 'federation.sites=["a", "b", "c", "d"]', "rounds=1", "participation=1.0")
    grid = loopback.grid(tmp_path)
    for node, name in zip(grid.nodes.values(), ["d", "c", "b", "aa"], strict=True):
        node["client"] = name

    def old(action, message, answer):
        return with_facts_of(answer(), message, versions={**wire.versions(), "torch": "2.11.0"})

    grid.change[101] = old
    result = loopback.federate(grid, cfg)
    said = capsys.readouterr().out
    assert "client = 'aa': this run's clients are a, b, c, d. Did you mean 'a'?" in said
    assert "refused: client c: torch 2.11.0, the server has " in said
    assert [note["client"] for note in result.rounds[0]["failed"]] == [0, 2]
    assert all("no node is connected" in note["reason"] for note in result.rounds[0]["failed"])
    assert result.rounds[0]["clients"] == [1, 3], "names stand for places in federation.sites"


@pytest.mark.parametrize("samples", [-1, 2.5, True, 2**53, 10**400])
def test_a_site_that_claims_what_cannot_be_is_refused(tmp_path, capsys, samples):
    """Numbers of samples go into averages over all clients."""
    grid = loopback.grid(tmp_path)
    grid.change[101] = lambda action, message, answer: with_facts_of(answer(), message, samples=samples)
    cfg = config(tmp_path, "rounds=1", "participation=1.0", "algorithm.denominator=all")
    result = loopback.federate(grid, cfg)
    assert "its answer is no answer" in capsys.readouterr().out
    assert len(result.rounds[0]["clients"]) == cfg.clients - 1


def with_facts_of(reply, message, **facts):
    packet = flower.packet_of(reply.content)
    packet = replace(packet, text=wire.dumps({**wire.loads(packet.text), **facts}))
    return Message(flower.record_of(packet), reply_to=message)


def test_a_node_joins_late_and_another_leaves(tmp_path):
    cfg = config(tmp_path, "rounds=3", "participation=1.0", "federation.join_wait=1")
    grid = loopback.grid(tmp_path)
    late = grid.nodes.pop(103)

    def listing():
        rounds = cfg.folder / "rounds.jsonl"
        done = rounds.read_text().count("\n") if rounds.exists() else 0
        if done == 1:
            grid.nodes.setdefault(103, late)
        if done == 2:
            grid.nodes.pop(100, None)

    grid.listing = listing
    result = loopback.federate(grid, cfg)
    assert [record["clients"] for record in result.rounds] == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3]]
    assert result.rounds[2]["failed"] == [{"client": 0, "reason": "no node is connected for this client"}]


def test_a_round_does_not_wait_for_nodes_that_were_refused(tmp_path, monkeypatch, capsys):
    """The fifth node is refused, asked again before each round, and does not answer any more."""
    monkeypatch.setattr(flower_roster, "AGAIN", 0.0)
    cfg = config(tmp_path, "rounds=3", "participation=1.0")
    grid, asked = loopback.grid(tmp_path), []
    grid.nodes[104] = {"client": "nobody"}

    def once(action, message, answer):
        asked.append(action)
        return answer() if len(asked) == 1 else None

    grid.change[104] = once
    began = time.monotonic()
    result = loopback.federate(grid, cfg)
    assert time.monotonic() - began < flower_roster.NEWCOMERS / 2
    assert len(asked) > 1 and [record["clients"] for record in result.rounds] == [[0, 1, 2, 3]] * 3
    assert capsys.readouterr().out.count("refused: node 104: client = 'nobody'") == 1


def test_a_node_has_as_long_to_load_its_data_as_the_configuration_says(tmp_path):
    cfg = config(tmp_path, "rounds=1", "federation.load_deadline=7000")
    grid = loopback.grid(tmp_path)
    loopback.federate(grid, cfg)
    asked = [message for message in grid.sent if message.metadata.message_type == "query.info"]
    assert [flower.seconds_of(message) for message in asked] == [7000.0] * 4
    assert {round(message.metadata.ttl - flower.GRACE) for message in asked} == {7000}


def test_too_few_clients_fail_the_run_in_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flower_server, "PAUSE", 0.01)
    cfg = config(tmp_path, "rounds=2", "participation=1.0", "min_replies=4")
    grid = loopback.grid(tmp_path)
    grid.change[102] = raises
    with pytest.raises(TooFewClients, match="3 usable updates, min_replies = 4"):
        loopback.federate(grid, cfg)
    assert "trying again (5 of 5)" in capsys.readouterr().out
    absent = config(tmp_path / "other", "participation=1.0", "min_replies=4", "federation.join_wait=0.1")
    few = loopback.grid(tmp_path / "other", clients=3)
    monkeypatch.setattr(flower_server, "RETRIES", 0)
    with pytest.raises(TooFewClients, match=r"3 of 4 clients are connected after 0\.1 seconds"):
        loopback.federate(few, absent)


@pytest.mark.parametrize("method", ["scaffold", "fedamp"])
def test_a_round_that_is_tried_again_changes_nothing(tmp_path, monkeypatch, method):
    monkeypatch.setattr(flower_server, "PAUSE", 0.01)
    cfg = config(tmp_path, "participation=1.0", "min_replies=4", method=method)
    grid, fails = loopback.grid(tmp_path), [2]

    def twice(action, message, answer):
        reply = answer()
        if action == "train.fit" and wire.loads(flower.packet_of(message.content).text)["round"] == 1 and fails[0]:
            fails[0] -= 1
            raise RuntimeError("not now")
        return reply

    grid.change[101] = twice
    battery.same(run(cfg), loopback.federate(grid, cfg))
    assert fails == [0]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["scaffold", "fedrep", "fbl"])
def test_a_server_that_was_killed_goes_on(tmp_path, monkeypatch, method, every):
    """After a round, in the middle of one, and after it was averaged but before the checkpoint."""
    cfg = config(tmp_path, "rounds=4", f"checkpoint_every={every}", method=method)
    alone = run(cfg)
    grid, save = loopback.grid(tmp_path), Checkpoints.save

    def killed(kills):
        """A KeyboardInterrupt stands for the end of the process."""
        with monkeypatch.context() as patch:
            kills(patch)
            with pytest.raises(KeyboardInterrupt):
                loopback.federate(grid, cfg, resume=True)

    def before_checkpoint(patch):
        def die(self, server, accepted):
            if server.round == 2:
                raise KeyboardInterrupt
            save(self, server, accepted)

        patch.setattr(Checkpoints, "save", die)

    def within_round(patch):
        run_, seen = flower_server.FlowerRuntime.run, []

        def die(self, server, *rest, **more):
            for reply in run_(self, server, *rest, **more):
                seen.append(reply)
                if server.round == 3:
                    raise KeyboardInterrupt
                yield reply

        patch.setattr(flower_server.FlowerRuntime, "run", die)

    killed(before_checkpoint)
    first = json.loads((cfg.folder / "federation.json").read_text())["experiment"]
    killed(within_round)
    battery.same(alone, loopback.federate(grid, cfg, resume=True))
    assert {path.parent.parent.name for path in tmp_path.glob("node*/*/client-*/*")} == {first}


def test_a_checkpoint_that_is_damaged_leaves_the_one_before(tmp_path):
    cfg = config(tmp_path, "participation=1.0", method="scaffold")
    grid = loopback.grid(tmp_path)
    alone = loopback.federate(grid, cfg)
    states = cfg.folder.glob("checkpoint/*/state.json")
    newest = max(states, key=lambda path: json.loads(path.read_text())["round"])
    newest.with_name("server.safetensors").write_bytes(b"damaged")
    battery.same(alone, loopback.federate(grid, cfg, resume=True))


def test_a_new_run_does_not_see_the_states_of_another(tmp_path):
    cfg = config(tmp_path, method="scaffold")
    grid = loopback.grid(tmp_path)
    first = loopback.federate(grid, cfg)
    other = replace(cfg, name="other")
    battery.same(first, loopback.federate(grid, other))
    assert len({path.name for path in tmp_path.glob("node*/*") if path.name != "pools"}) == 2
    with pytest.raises(ConfigError, match="holds a run"):
        loopback.federate(grid, cfg)


def test_a_lost_state_is_named_unless_there_is_nothing_in_it(tmp_path, monkeypatch):
    for method, lost in (("scaffold", True), ("fedavg", False)):
        cfg = replace(config(tmp_path, "participation=1.0", "min_replies=1", method=method), name=method)
        grid = loopback.grid(tmp_path / method)

        def forget(action, message, answer, method=method):
            for path in (tmp_path / method / "node2").glob("*/client-2/*.safetensors"):
                path.unlink()
            return answer()

        grid.change[102] = forget
        result = loopback.federate(grid, cfg)
        failed = [note["reason"] for record in result.rounds for note in record["failed"]]
        assert bool(failed) == lost
        assert all("its state of round 0 cannot be read" in reason for reason in failed)


# images ---------------------------------------------------------------------------------------------------------------


def test_images_are_made_on_nodes_before_the_first_round(tmp_path):
    cfg = config(tmp_path, "pool.dir=", "participation=1.0", method="fbl")
    grid = loopback.grid(tmp_path)
    battery.same(run(cfg), loopback.federate(grid, cfg))
    making = Job(cfg).filled
    actions = [action for _, action in grid.log]
    assert actions == ["query.info"] * 4 + ["train.prepare"] * len(making) + ["train.fit"] * 12
    there = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("node*/pools/*/*")}
    assert len(making) > 1 and there == {f"node{k}" for k in making}


def test_who_joins_late_makes_its_images_beside_the_rounds(tmp_path):
    cfg = config(tmp_path, "participation=1.0", "federation.join_wait=1", "pool.dir=", method="fbl")
    grid = loopback.grid(tmp_path, threads=True)
    late, go = grid.nodes.pop(101), threading.Event()

    def listing():
        rounds = cfg.folder / "rounds.jsonl"
        done = rounds.read_text().count("\n") if rounds.exists() else 0
        if done >= 1:
            grid.nodes.setdefault(101, late)
        if done >= 2:
            go.set()
            loopback.until(lambda: made)

    made = []

    def slow(action, message, answer):
        if action != "train.prepare":
            return answer()
        go.wait(20)
        reply = answer()
        threading.Timer(0.3, lambda: made.append(True)).start()
        return reply

    grid.change[101] = slow
    grid.listing = listing
    result = loopback.federate(grid, cfg)
    assert [record["clients"] for record in result.rounds] == [[0, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert result.rounds[1]["failed"] == [{"client": 1, "reason": "its images are still being made"}]


@pytest.mark.parametrize("needed", [3, 4])
def test_a_client_that_cannot_make_its_images_is_passed_over(tmp_path, monkeypatch, capsys, needed):
    """It is asked a few times. Then its reply counts as failed: the round goes on, or is tried again in vain."""
    monkeypatch.setattr(flower_server, "PAUSE", 0.01)
    monkeypatch.setattr(flower_server, "RETRIES", 1)
    small = ("participation=1.0", "rounds=1", f"min_replies={needed}", "federation.join_wait=20")
    cfg = config(tmp_path, *small, "pool.dir=", method="fbl")
    making = Job(cfg).filled
    grid, node = loopback.grid(tmp_path), 100 + making[0]

    def dies(action, message, answer):
        if action == "train.prepare":
            raise RuntimeError("out of memory")
        return answer()

    grid.change[node] = dies
    why = "it has not made its images: Flower, code 2: .*out of memory"
    if needed == 3:
        record = loopback.federate(grid, cfg).rounds[0]
        assert [note["client"] for note in record["failed"]] == [making[0]]
        assert re.match(f"{why}|its images are still being made", record["failed"][0]["reason"])
        assert grid.log.count((node, "train.prepare")) == 2, "before the rounds, and once more"
    else:
        with pytest.raises(TooFewClients, match=f"3 usable updates, min_replies = 4: client {making[0]}: {why}"):
            loopback.federate(grid, cfg)
        assert grid.log.count((node, "train.prepare")) == 2 * (1 + flower_server.ATTEMPTS)
        assert "trying again (1 of 1)" in capsys.readouterr().out


def test_a_client_that_leaves_while_it_makes_its_images_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_server, "RETRIES", 0)
    small = ("participation=1.0", "rounds=1", "min_replies=4", "federation.join_wait=20")
    cfg = config(tmp_path, *small, "pool.dir=", method="fbl")
    making = Job(cfg).filled
    grid, asked = loopback.grid(tmp_path, threads=True), []

    def leaves(action, message, answer):
        if action != "train.prepare":
            return answer()
        asked.append(action)
        if len(asked) == 1:
            raise RuntimeError("not now")
        threading.Timer(0.3, lambda: grid.nodes.pop(100 + making[0])).start()
        return None

    grid.change[100 + making[0]] = leaves
    with pytest.raises(TooFewClients, match="no node is connected for this client"):
        loopback.federate(grid, cfg)
    assert len(asked) == 2


# personal models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedrep", "fedavg_ft"])
def test_personal_models_are_measured_on_nodes(tmp_path, method, capsys):
    cfg = config(tmp_path, "personal.measure=always", method=method)
    grid = loopback.grid(tmp_path)
    battery.same(run(cfg), loopback.federate(grid, cfg))
    assert [action for _, action in grid.log].count("evaluate.personal") == 4
    again = replace(cfg, name="again")

    def wrong(action, message, answer):
        return with_facts_of(answer(), message, **({"curve": [7.0]} if action == "evaluate.personal" else {}))

    grid.change[102] = wrong
    result = loopback.federate(grid, again)
    assert result.rounds[-1]["personal/clients"][2] is None
    assert "client 2: its own model could not be measured: its answer is no answer" in capsys.readouterr().out


# sites ----------------------------------------------------------------------------------------------------------------


CLASSES = ["north-west", "north-east", "south-west", "south-east"]


def site_a():
    x, y = tiny.data().train_x, tiny.data().train_y
    return x[:40], [CLASSES[label] for label in y[:40]]


def site_b():
    found = tiny.data()
    return replace(found, train_x=found.train_x[40:], train_y=found.train_y[40:])


def sited(tmp_path, *overrides, **more):
    names = 'federation.sites=["a", "b", "c"]'
    wanted = config(tmp_path, names, "clients=3", "participation=1.0", "rounds=2", "local.epochs=3", *overrides, **more)
    return parse({**wanted.table(), "partition": {"name": "sites"}})


def site_grid(tmp_path):
    folder = tmp_path / "pictures" / "train"
    found = tiny.data(seed=5)
    for number in range(20):
        place = folder / CLASSES[found.train_y[number] % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(found.train_x[number, 0].numpy()).resize((20, 20)).save(place / f"{number}.png")
    grid = loopback.grid(tmp_path, clients=3)
    places = ("test_flower:site_a", "test_flower:site_b", str(tmp_path / "pictures"))
    for name, place, node in zip("abc", places, grid.nodes.values(), strict=True):
        node |= {"client": name, "data": place}
    return grid


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedrep", "fbl"])
def test_sites_train_on_their_own_data(tmp_path, method):
    cfg = sited(tmp_path, "evaluate.local_every=1", method=method)
    result = loopback.federate(site_grid(tmp_path), cfg)
    for record in result.rounds:
        assert record["clients"] == [0, 1, 2] and not record["failed"]
    noted = json.loads((cfg.folder / "federation.json").read_text())["samples"]
    assert noted == {"0": 40, "1": 56, "2": 20}
    assert not (cfg.folder / "partition.json").exists()
    assert 0 <= result.rounds[-1]["local_after/accuracy"] <= 1, "measured by the one site that has test images"


def site_c():
    """Of each class another number: 3, 11, 17, 29."""
    found = tiny.data(train=160, seed=7)
    rows = torch.cat([torch.nonzero(found.train_y == c)[:n, 0] for c, n in enumerate((3, 11, 17, 29))])
    return found.train_x[rows].numpy(), found.train_y[rows].numpy()


def found_in(sent, x, y):
    """What of a site's data is in bytes that it sent: rows of its pictures, as they are or normalised; how many it has
    of each class, or which share, in any of the types that numbers come in."""
    held = tiny.data()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (held.mean, held.std))
    counts = torch.bincount(torch.as_tensor(y), minlength=4)
    pixels = torch.as_tensor(x).view(len(y), 1, 16, 16)
    shown = (pixels, pixels / 255, (pixels / 255 - mean) / std)
    wanted = [(f"a row of picture {k}", part[k, 0, row]) for part in shown for k in range(len(y)) for row in range(16)]
    types = (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)
    wanted += [(f"counts as {kind}", counts.to(kind)) for kind in types]
    wanted += [(f"shares as {kind}", (counts.double() / len(y)).to(kind)) for kind in types[3:]]
    wanted += [(f"labels as {kind}", torch.as_tensor(y).to(kind)) for kind in types]
    return [name for name, tensor in wanted if wire.raw(tensor).data in sent]


def numbers_in(value):
    """All numbers in a JSON value, and those that its texts hold."""
    if isinstance(value, str):
        return [float(word) for word in re.findall(r"(?<![\w.])\d+(?![\w.])", value)]
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_in(part)]
    return [] if value is None else [float(value)]


@pytest.mark.parametrize("method", ["scaffold", "fbl"])
def test_what_a_site_sends_has_nothing_of_its_data_in_it(tmp_path, method):
    """Names of fields and numbers of samples, and what the method declares; not one picture or count of a class."""
    grid = site_grid(tmp_path)
    grid.nodes[101]["data"] = "test_flower:site_c"
    replies = kept_of(grid)
    loopback.federate(grid, sited(tmp_path, "personal.measure=always", method=method))
    fields = {action: set(wire.loads(packet.text)) for action, packet in replies}
    assert fields["query.info"] == {"client", "samples", "partition", "key", "versions", "warnings"}
    assert fields["train.fit"] == wire.FACTS
    if method == "fbl":
        assert fields["train.prepare"] == {"client", "images", "seconds", "versions", "warnings"}
    assert {name for _, packet in replies for name in packet.tensors if "counter" not in name} == {
        "delta", "buffers", *(["extra.c"] if method == "scaffold" else []),
    }  # fmt: skip
    (x, y), counts = site_c(), {3.0, 11.0, 17.0, 29.0}
    own = [packet for _, packet in replies if wire.loads(packet.text)["client"] == 1]
    assert len(own) >= 3
    for packet in own:
        sent = b"|".join([packet.text.encode(), *(raw.data for raw in packet.tensors.values())])
        assert found_in(sent, x, y) == []
        facts = wire.loads(packet.text)
        told = {key: facts[key] for key in set(facts) - {"client", "round", "seconds", "versions", "metrics"}}
        assert not counts & set(numbers_in(told)), told
    assert found_in(b"..." + x[7, 0, 3].tobytes() + b"...", x, y) == ["a row of picture 7"]
    leak = wire.raw(torch.tensor([3, 11, 17, 29])).data
    assert found_in(leak, x, y) == ["counts as torch.int64"]
    assert counts & set(numbers_in({"warnings": ["there are 17 of class 2"]}))


def test_a_sites_pictures_are_decoded_once_for_all_messages(tmp_path, monkeypatch):
    """Each message has a new process, which finds them decoded."""
    seen, decode = [], site.decode

    def counted(pictures, count, *rest):
        seen.append(count)
        return decode(pictures, count, *rest)

    monkeypatch.setattr(site, "decode", counted)
    result = loopback.federate(site_grid(tmp_path), sited(tmp_path))
    assert [record["clients"] for record in result.rounds] == [[0, 1, 2]] * 2
    assert seen == [20]
    assert [path.parts[-3] for path in tmp_path.glob("node*/decoded/*")] == ["node2"], "only of folders"


def test_an_absent_site_is_waited_for_once(tmp_path, monkeypatch, capsys):
    cfg, grid, waits = sited(tmp_path), site_grid(tmp_path), []
    wait = flower_roster.Roster.wait

    def noted(self, clients, wanted, seconds):
        waits.append(wanted)
        return wait(self, clients, wanted, seconds)

    monkeypatch.setattr(flower_roster.Roster, "wait", noted)
    del grid.nodes[102]
    loopback.federate(grid, cfg)
    assert waits == [3, 1], "for all, then for min_replies of them, which are there"
    assert capsys.readouterr().out.count("going on without client c") == 1


def test_a_site_that_joins_late_counts_among_all(tmp_path, monkeypatch):
    """Under denominator = "all" the step is that part of all samples that took part: never more than all, and a site
    that was there once counts after a resume too."""
    cfg = sited(tmp_path, 'algorithm.denominator="all"', "rounds=3", method="fedavg")
    grid, parts, part_of_all = site_grid(tmp_path), [], Algorithm.part_of_all
    late = grid.nodes.pop(102)

    def noted(self, server, total):
        parts.append((total, server.samples))
        return part_of_all(self, server, total)

    def listing():
        if parts:
            grid.nodes.setdefault(102, late)

    def gone(action, message, answer):
        if action == "train.fit" and len(parts) == 2:
            raise KeyboardInterrupt
        return answer()

    monkeypatch.setattr(Algorithm, "part_of_all", noted)
    grid.listing, grid.change[100] = listing, gone
    with pytest.raises(KeyboardInterrupt):
        loopback.federate(grid, cfg)
    grid.listing = lambda: grid.nodes.pop(102, None)
    del grid.change[100]
    loopback.federate(grid, cfg, resume=True)
    whole = len(tiny.data().train_y)
    assert parts == [(whole, whole), (whole + 20, whole + 20), (whole, whole + 20)]


def test_sites_keep_their_order_when_a_run_is_resumed(tmp_path):
    """The number stands for the place, and each node has its own client's state only."""
    cfg = sited(tmp_path, "rounds=1")
    loopback.federate(site_grid(tmp_path), cfg)
    for names in (["b", "a", "c"], ["a", "b", "d"], []):
        other = replace(cfg, federation=replace(cfg.federation, sites=tuple(names)))
        grid = site_grid(tmp_path)
        with pytest.raises(ConfigError, match="must be as when this run began: a, b, c") as caught:
            loopback.federate(grid, other, resume=True)
        assert (caught.value.key, caught.value.value) == ("federation.sites", names)
        assert grid.log == [], "before anybody is asked"
    loopback.federate(site_grid(tmp_path), replace(cfg, rounds=1), resume=True)
    note = cfg.folder / "federation.json"
    table = json.loads(note.read_text())
    assert table.pop("sites") == ["a", "b", "c"]
    note.write_text(json.dumps(table))
    loopback.federate(site_grid(tmp_path), cfg, resume=True)  # noted by an earlier version


def test_a_node_with_data_needs_sites_and_the_other_way_round(tmp_path, capsys):
    grid = site_grid(tmp_path)
    del grid.nodes[100]["data"]
    loopback.federate(grid, sited(tmp_path, "rounds=1"))
    said = capsys.readouterr().out
    assert "refused: client a: data = '': partition 'sites' takes each client's data from its own machine" in said
    plain = loopback.grid(tmp_path / "plain")
    plain.nodes[101]["data"] = "test_flower:site_a"
    loopback.federate(plain, config(tmp_path / "plain", "rounds=1", "participation=1.0"))
    assert "client 1: data = 'test_flower:site_a': this node has data of its own" in capsys.readouterr().out


def test_a_run_of_sites_resumes(tmp_path):
    cfg = sited(tmp_path, method="fedavg")
    whole = loopback.federate(site_grid(tmp_path), cfg)
    part, grid = replace(cfg, name="part"), site_grid(tmp_path / "part")

    def gone(action, message, answer):
        if action == "train.fit" and wire.loads(flower.packet_of(message.content).text)["round"] == 1:
            raise KeyboardInterrupt
        return answer()

    grid.change[100] = gone
    with pytest.raises(KeyboardInterrupt):
        loopback.federate(grid, part)
    grid.change.clear()
    battery.same(whole, loopback.federate(grid, part, resume=True))


# one process ----------------------------------------------------------------------------------------------------------


def test_the_runtime_without_a_federation_is_one_clear_error(tmp_path):
    cfg = config(tmp_path, "runtime=flower")
    with pytest.raises(ConfigError, match=r"runtime = 'flower': runs on a federation: .* fedkeel deploy submit"):
        run(cfg, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_client_that_hangs_is_ended(monkeypatch):
    monkeypatch.setenv("FEDKEEL_NODE", "1")
    with pytest.raises(RunError, match="deadline"), flower.watched(0.05):
        time.sleep(5)
    with flower.watched(0.05):
        pass
    time.sleep(0.1)  # nothing is left that would end this process


def test_flower_finds_both_halves():
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.supercore.object_ref import load_app, validate

    for name, kind in (("server_app", ServerApp), ("client_app", ClientApp)):
        where = f"fedkeel.runtimes.flower:{name}"
        assert validate(where) == (True, None)
        assert isinstance(load_app(where, ValueError), kind)
