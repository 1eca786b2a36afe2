"""Streams: equal names draw equal numbers, everything else is independent, the global generator is never touched."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fedkeel.rng import Streams, isolated, stream_seed


def draws(generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=generator).tolist()


def test_known_seed():
    """First 8 bytes of SHA-256("1\\x1fbatch\\x1f3\\x1f5"), little endian, halved: the same everywhere, for ever."""
    assert stream_seed(1, "batch", 3, 5) == 1845952321185336977


def test_every_part_of_the_name_counts():
    names = [
        (seed, purpose, *ids) for seed in (1, 2) for purpose in ("batch", "drop") for ids in ((), (0,), (0, 1), (1, 0))
    ]
    seeds = [stream_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    for one, other in itertools.combinations(names[:4], 2):
        assert draws(Streams(one[0])(*one[1:])) != draws(Streams(other[0])(*other[1:]))


def test_ids_do_not_run_into_each_other():
    assert stream_seed(1, "x", 1, 23) != stream_seed(1, "x", 12, 3) != stream_seed(11, "x", 2, 3)


def test_a_stream_starts_afresh_whatever_else_was_drawn():
    streams = Streams(7)
    first = draws(streams("batch", 2, 3))
    draws(streams("augment", 2, 3))
    torch.rand(100)
    assert draws(streams("batch", 2, 3)) == first == draws(Streams(7)("batch", 2, 3))


def test_bound_ids_come_first():
    assert draws(Streams(7).at(2, 3)("batch", 4)) == draws(Streams(7)("batch", 2, 3, 4))
    assert draws(Streams(7).at(2).at(3)("batch")) == draws(Streams(7)("batch", 2, 3))


def test_numpy_stream():
    one, other = Streams(7).numpy("partition", 1), Streams(7).numpy("partition", 2)
    again = Streams(7).numpy("partition", 1).random(4)
    assert one.random(4).tolist() == again.tolist() != other.random(4).tolist()


@pytest.mark.parametrize("seed", [1, 2])
def test_isolated_code_sees_its_own_seed_and_leaves_no_trace(seed):
    before = torch.get_rng_state()
    with isolated(Streams(seed)("init")):
        first = nn.Linear(3, 3).weight
    torch.rand(5)
    with isolated(Streams(seed)("init")):
        second = nn.Linear(3, 3).weight
    with isolated(Streams(seed + 1)("init")):
        other = nn.Linear(3, 3).weight
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.set_rng_state(before)
    with pytest.raises(RuntimeError, match="invalid"), isolated(Streams(seed)("init")):
        torch.rand(3).view(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_isolated_code_leaves_no_seed_for_a_gpu_that_is_used_later(monkeypatch):
    """torch.manual_seed does, with the stack of its caller: ten times the cost."""
    noted = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda call, **_: noted.append(call))
    with isolated(Streams(1)("init")):
        torch.rand(1)
    assert not noted
