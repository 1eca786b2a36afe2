"""What clients keep: pending until the server names it accepted, whatever happened in between."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from fedkeel.clients import ClientStore
from fedkeel.errors import CheckpointError


def state(value: float, size: int = 4) -> dict[str, torch.Tensor]:
    return {"own": torch.full((size,), value), "mine.kept": torch.tensor([1, 2, 3])}


def value(found) -> float | None:
    return None if found is None else float(found["own"][0])


@pytest.fixture(params=["in memory", "past the budget"])
def store(request, tmp_path) -> ClientStore:
    return ClientStore(tmp_path / "clients", budget=2 << 30 if request.param == "in memory" else 1)


def test_a_file_of_somebody_else_stays(store):
    store.put(3, 0, state(1.0))
    store.flush([(3, 0)])
    other = store.folder / "0-1 copy.safetensors"
    other.touch()
    again = ClientStore(store.folder, budget=1)
    again.collect({(3, 0)})
    assert other.exists() and value(again.open(3, 0)) == 1.0


def test_nothing_before_the_first_round(store):
    assert store.open(3, None) is None


def test_promoted_when_the_server_accepted_it(store):
    store.open(3, None)
    store.put(3, 0, state(1.0))
    assert value(store.open(3, 0)) == 1.0
    store.put(3, 5, state(2.0))
    assert value(store.open(3, 5)) == 2.0
    assert value(store.open(3, 5)) == 2.0  # asked again: the same


def test_dropped_when_the_server_did_not_take_it(store):
    """A late exception, a timeout, too few clients: round 5 happened for the client but not for the server."""
    store.put(3, 0, state(1.0))
    store.open(3, 0)
    store.put(3, 5, state(2.0))
    assert value(store.open(3, 0)) == 1.0
    with pytest.raises(CheckpointError, match=r"client 3.*round 5"):
        drop(store, 3, 5)


def drop(store: ClientStore, client: int, version: int):
    """The dropped state is gone from memory; its file, if it was spilled, goes with the next collection."""
    store.collect({(3, 0)})
    return store.open(client, version)


def test_a_first_update_that_was_refused_leaves_nothing(store):
    store.put(3, 0, state(1.0))
    assert store.open(3, None) is None
    store.put(3, 2, state(2.0))
    assert value(store.open(3, 2)) == 2.0


def test_a_part_of_a_state(tmp_path):
    """From memory or from its file, which is not taken in; a damaged one is refused as by `get`."""
    for budget in (1 << 20, 0):
        store = ClientStore(tmp_path / str(budget), budget=budget)
        for client in (3, 4):
            store.put(client, 1, {"w": torch.arange(1000.0), "marks": torch.arange(100, dtype=torch.uint8)})
        held = set(store._held)
        assert ((3, 1) in held) == (budget > 0)
        for client in (3, 4):
            assert store.part(client, 1, "marks", slice(90, 95)).tolist() == [90, 91, 92, 93, 94]
        assert set(store._held) == held
    store.file(3, 1).write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="client 3: its state of round 1 cannot be read"):
        store.part(3, 1, "marks", slice(0, 5))


def test_a_round_done_again_replaces_the_pending_state(store):
    """A killed server repeats the round: the state of the repetition counts, whatever file the first try left."""
    store.put(3, 1, state(1.0))
    store.put(3, 1, state(2.0))
    store.flush([(3, 1)])
    assert value(store.open(3, 1)) == 2.0
    assert value(ClientStore(store.folder).open(3, 1)) == 2.0


def test_a_damaged_file_is_written_over(tmp_path):
    """The round whose file was damaged is done again after falling back; the new state must reach the disk."""
    first = ClientStore(tmp_path)
    first.put(3, 1, state(1.0))
    first.flush([(3, 1)])
    file = first.file(3, 1)
    file.write_bytes(file.read_bytes()[:-3])
    again = ClientStore(tmp_path)
    with pytest.raises(CheckpointError, match="client 3"):
        again.open(3, 1)
    again.put(3, 1, state(1.0))
    again.flush([(3, 1)])
    assert value(ClientStore(tmp_path).open(3, 1)) == 1.0


def test_clients_do_not_see_each_other(store):
    store.put(1, 0, state(1.0))
    store.put(2, 0, state(2.0))
    store.put(12, 0, state(12.0))
    assert [value(store.open(client, 0)) for client in (1, 2, 12)] == [1.0, 2.0, 12.0]


def test_spilled_states_come_back_bit_for_bit(tmp_path):
    """Past the budget the least recently used go to disk: of every type, empty ones and scalars too."""
    generator = torch.Generator().manual_seed(0)
    states = {
        client: {
            "own": torch.randn(100, generator=generator) * 1e-40,  # subnormal numbers too
            "mine.kept": torch.randint(-(2**62), 2**62, (7,), generator=generator),
            "mine.rows": torch.rand(5, generator=generator) < 0.5,
            "mine.cycle": torch.tensor(-1),
            "mine.none": torch.empty(0, dtype=torch.int64),
        }
        for client in range(6)
    }
    store = ClientStore(tmp_path / "clients", budget=1000)
    for client, kept in states.items():
        store.put(client, 4, {name: tensor.clone() for name, tensor in kept.items()})
    assert len(list(store.folder.glob("*.safetensors"))) >= 4
    assert len(store._held) == 2 and store._bytes <= 1000
    for client in (5, 0, 3, 1, 2, 4):
        found = store.open(client, 4)
        assert found.keys() == states[client].keys()
        for name, tensor in states[client].items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name], tensor)


def test_the_budget_is_kept_over_many_rounds(tmp_path):
    store = ClientStore(tmp_path, budget=500)
    accepted: dict[int, int] = {}
    for number in range(8):
        for client in range(4):
            store.open(client, accepted.get(client))
            store.put(client, number, state(10.0 * number + client, 40))
            accepted[client] = number
            assert store._bytes == sum(t.numel() * t.element_size() for s in store._held.values() for t in s.values())
            assert store._bytes <= 500
        store.flush(accepted.items())
        store.collect(set(accepted.items()))
    assert [value(store.open(client, 7)) for client in range(4)] == [70.0, 71.0, 72.0, 73.0]
    assert all(int(path.stem.partition("-")[2]) >= 6 for path in tmp_path.glob("*"))  # what is accepted and one before


def test_collect_keeps_what_is_needed_and_what_is_in_use(tmp_path):
    store = ClientStore(tmp_path, budget=1)
    for version in (1, 2, 3):
        for client in (1, 2):
            store.put(client, version, state(float(version)))
    store.put(9, 9, state(9.0))
    store.open(1, 3)
    store.collect({(2, 1)})
    left = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert left >= {"1-3", "2-1", "2-2", "2-3"}  # what client 2 has pending may still be accepted
    assert not left & {"1-1", "1-2"}


def test_dropped_versions_leave_no_files(tmp_path):
    """Between checkpoints too, however far apart they are: four clients' last versions, and one pending each."""
    store, accepted, most = ClientStore(tmp_path, budget=1), dict[int, int](), 0
    for number in range(20):
        for client in range(4):
            store.open(client, accepted.get(client))
            store.put(client, number, state(10.0 * number + client))
            accepted[client] = number
            most = max(most, len(list(tmp_path.iterdir())))
    assert most <= 8
    assert [value(store.open(client, 19)) for client in range(4)] == [190.0, 191.0, 192.0, 193.0]


def test_versions_that_a_checkpoint_names_keep_their_files(tmp_path):
    """Until it names others; what is dropped then goes at once."""
    store = ClientStore(tmp_path, budget=1)
    for version in (1, 2):
        store.put(3, version, state(float(version)))
    store.put(9, 9, state(9.0))
    store.collect({(3, 1)})
    store.open(3, 2)
    store.put(3, 4, state(4.0))
    store.put(9, 9, state(9.0))
    store.open(3, 4)
    assert {path.stem for path in tmp_path.iterdir()} >= {"3-1", "3-4"}
    assert not store.file(3, 2).exists()
    assert value(ClientStore(tmp_path).open(3, 1)) == 1.0
    store.collect({(3, 4)})
    assert {path.stem for path in tmp_path.iterdir()} - {"9-9"} == {"3-4"}


def test_files_of_a_process_that_was_stopped_are_collected(tmp_path, monkeypatch):
    """They are looked for once: from then on the store knows what is there."""
    left = ClientStore(tmp_path)
    for client in range(3):
        left.put(client, 7, state(0.0))
    left.flush((client, 7) for client in range(3))
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: listed.append(path) or glob(path, pattern))
    store = ClientStore(tmp_path)
    for number in range(8, 12):
        store.put(0, number, state(float(number)))
        store.open(0, number)
        store.flush([(0, number)])
        store.collect({(0, number), (1, 7)})
        assert {path.stem for path in tmp_path.iterdir()} == {f"0-{number}", "1-7"}
    assert listed == [tmp_path]


def test_tensors_that_share_memory_can_be_kept(tmp_path):
    """The file format refuses them; a method may well keep one tensor under two names."""
    both, store = torch.arange(4.0), ClientStore(tmp_path)
    store.put(0, 0, {"a": both, "b": both, "c": both[1:3], "d": both.view(2, 2)})
    store.flush([(0, 0)])
    found = ClientStore(tmp_path).open(0, 0)
    assert torch.equal(found["a"], both) and torch.equal(found["b"], both)
    assert torch.equal(found["c"], both[1:3]) and torch.equal(found["d"], both.view(2, 2))


def test_without_a_run_folder_the_disk_is_touched_past_the_budget_only():
    plain, small = ClientStore(), ClientStore(budget=1)
    for store in (plain, small):
        for client in range(3):
            store.put(client, 0, state(float(client)))
        assert [value(store.open(client, 0)) for client in range(3)] == [0.0, 1.0, 2.0]
    folder = Path(small.folder)
    assert folder.is_dir() and "folder" not in vars(plain)
    del small, store
    gc.collect()
    assert not folder.exists()
