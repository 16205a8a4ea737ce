"""The traditional allocators: the documents' own example, exact placements, and a model of one flag a slot."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupaged.errors import NoHoleError
from cupaged.memory.contiguous import Buddy, ContiguousAllocator, FirstFit, ReserveMax, Usage


def holes(memory: ContiguousAllocator) -> list[tuple[int, int]]:
    starts, sizes = memory.holes()
    return list(zip(starts.tolist(), sizes.tolist(), strict=True))


def test_deep_dive_example_is_38_percent() -> None:
    memory = ReserveMax(num_slots=3 * 2048, max_len=2048)
    starts = [memory.allocate(request, tokens=used, reserve=2048, final=used) for request, used in USED.items()]
    assert starts == [0, 2048, 4096]
    usage = memory.usage(next_reserve=2048)
    assert usage == Usage(tokens=2332, reservation=0, internal=3812, external=0, free=0)
    assert usage.occupancy == 2332 / 6144
    assert f"{usage.occupancy:.1%}" == "38.0%"


USED = {"a": 312, "b": 148, "c": 1872}


def test_reserve_max_gives_every_request_the_same_region() -> None:
    memory = ReserveMax(num_slots=100, max_len=30)
    assert [memory.allocate(request, 1, reserve) for request, reserve in enumerate((1, 30, 17))] == [0, 30, 60]
    assert not memory.can_allocate(1)
    assert holes(memory) == [(90, 10)]
    with pytest.raises(NoHoleError) as caught:
        memory.allocate(3, 1, 1)
    assert (caught.value.needed, caught.value.free, caught.value.largest) == (30, 10, 10)
    with pytest.raises(ValueError, match="reserve must be at most max_len = 30, got 31"):
        memory.allocate(3, 1, 31)


def test_the_three_losses_are_told_apart() -> None:
    memory = FirstFit(num_slots=1000)
    memory.allocate("grows", tokens=100, reserve=300, final=250)
    memory.allocate("leaves", tokens=50, reserve=200)
    memory.allocate("stays", tokens=400, reserve=400)
    memory.free("leaves")
    assert holes(memory) == [(300, 200), (900, 100)]
    assert memory.usage(150) == Usage(tokens=500, reservation=150, internal=50, external=100, free=200)
    assert memory.usage(250) == Usage(tokens=500, reservation=150, internal=50, external=300, free=0)
    assert memory.usage() == Usage(tokens=500, reservation=150, internal=50, external=0, free=300)
    memory.append(["grows"], 150)
    assert memory.usage(150) == Usage(tokens=650, reservation=0, internal=50, external=100, free=200)
    memory.append(["grows"], 20)
    assert memory.usage(150) == Usage(tokens=670, reservation=0, internal=30, external=100, free=200)


def test_external_fragmentation_refuses_what_there_is_room_for() -> None:
    memory = FirstFit(num_slots=600)
    for request in range(6):
        memory.allocate(request, 100, 100)
    for request in (0, 2, 4):
        memory.free(request)
    assert memory.free_slots == 300
    assert memory.can_allocate(100)
    assert not memory.can_allocate(101)
    with pytest.raises(NoHoleError, match="needed 101 slots, free 300, largest hole 100"):
        memory.allocate(6, 1, 101)
    assert len(memory) == 3


def test_first_fit_takes_the_lowest_hole_and_joins_neighbours() -> None:
    memory = FirstFit(num_slots=100)
    assert [memory.allocate(request, 1, size) for request, size in enumerate((10, 20, 30, 40))] == [0, 10, 30, 60]
    assert holes(memory) == []
    memory.free(2)
    memory.free(0)
    assert holes(memory) == [(0, 10), (30, 30)]
    assert memory.allocate(4, 1, 5) == 0
    assert memory.allocate(5, 1, 6) == 30
    assert holes(memory) == [(5, 5), (36, 24)]
    memory.free(1)
    assert holes(memory) == [(5, 25), (36, 24)]
    memory.free(5)
    assert holes(memory) == [(5, 55)]
    memory.free(3)
    memory.free(4)
    assert holes(memory) == [(0, 100)]


def test_buddy_splits_and_joins() -> None:
    memory = Buddy(num_slots=64)
    assert memory.allocate("a", 1, 9) == 0
    assert holes(memory) == [(16, 16), (32, 32)]
    assert memory.allocate("b", 1, 16) == 16
    assert memory.allocate("c", 1, 1) == 32
    assert holes(memory) == [(33, 1), (34, 2), (36, 4), (40, 8), (48, 16)]
    memory.free("b")
    assert memory.allocate("d", 1, 3) == 36
    assert memory.usage(17) == Usage(tokens=3, reservation=10, internal=8, external=43, free=0)
    memory.free("a")
    assert holes(memory) == [(0, 32), (33, 1), (34, 2), (40, 8), (48, 16)]
    memory.free("d")
    memory.free("c")
    assert holes(memory) == [(0, 64)]


def test_buddy_arena_that_is_no_power_of_two() -> None:
    memory = Buddy(num_slots=100)
    assert holes(memory) == [(0, 64), (64, 32), (96, 4)]
    assert memory.allocate("a", 4, 4) == 96
    assert memory.allocate("b", 33, 33) == 0
    memory.free("a")
    memory.free("b")
    assert holes(memory) == [(0, 64), (64, 32), (96, 4)]


def test_buddy_takes_the_lowest_of_equal_holes() -> None:
    memory = Buddy(num_slots=16)
    for request in range(4):
        memory.allocate(request, 4, 4)
    memory.free(3)
    memory.free(1)
    assert memory.allocate(4, 1, 4) == 4
    assert memory.allocate(5, 1, 4) == 12


def test_neighbours_that_are_not_buddies_stay_apart() -> None:
    memory = Buddy(num_slots=16)
    for request in range(4):
        memory.allocate(request, 4, 4)
    memory.free(1)
    memory.free(2)
    assert holes(memory) == [(4, 4), (8, 4)]
    assert not memory.can_allocate(8)


@pytest.mark.parametrize("make", [FirstFit, Buddy, lambda slots: ReserveMax(slots, 8)], ids=["first", "buddy", "max"])
def test_bad_input_changes_nothing(make) -> None:
    memory = make(64)
    memory.allocate("a", 2, 4, final=3)
    before = (holes(memory), memory.usage(5))
    size = int(memory.regions().size[0])
    mistakes = [
        (lambda: memory.allocate("a", 1, 1), ValueError, "request_id must not be in use, got 'a'"),
        (lambda: memory.allocate("b", 5, 4), ValueError, "reserve must be at least 5, got 4"),
        (lambda: memory.allocate("b", -1, 4), ValueError, "tokens must be at least 0, got -1"),
        (lambda: memory.allocate("b", 2, 4, final=1), ValueError, "final must be at least 2, got 1"),
        (lambda: memory.allocate("b", 2, 4, final=5), ValueError, "final must be at most the 4 slots reserved"),
        (lambda: memory.allocate("b", 2.0, 4), TypeError, "tokens must be an integer, got float"),
        (lambda: memory.append(["a", "b"]), ValueError, "request_id must be in use, got 'b'"),
        (lambda: memory.append(["a", "a"]), ValueError, "request_ids must name each request once"),
        (lambda: memory.append(["a"], 0), ValueError, "n must be at least 1, got 0"),
        (lambda: memory.append(["a"], size), ValueError, f"n must be at most {size - 2} more tokens for request 'a'"),
        (lambda: memory.append(["a"], 2**63 - 1), ValueError, f"n must be at most {size - 2} more tokens for"),
        (lambda: memory.append(["a"], 10**30), ValueError, f"n must be at most {size - 2} more tokens for"),
        (lambda: memory.free("b"), ValueError, "request_id must be in use, got 'b'"),
    ]
    for mistake, kind, message in mistakes:
        with pytest.raises(kind, match=message):
            mistake()
        assert (holes(memory), memory.usage(5)) == before
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match="num_slots must be at most 9223372036854775807, got 9223372036854775808"):
        make(2**63)


@pytest.mark.parametrize("make", [FirstFit, Buddy], ids=["first", "buddy"])
def test_the_largest_arena_counts_right(make) -> None:
    memory = make(2**63 - 1)
    memory.allocate("a", 1, 2**62)
    memory.append(["a"], 2**62 - 1)
    assert memory.usage(2**62) == Usage(2**62, 0, 0, 2**62 - 1, 0)
    with pytest.raises(NoHoleError):
        memory.allocate("b", 1, 2**64)
    assert memory.usage() == Usage(2**62, 0, 0, 0, 2**62 - 1)


def test_no_hole_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(NoHoleError(3, 2, 1)))
    assert (error.needed, error.free, error.largest) == (3, 2, 1)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 11), st.integers(1, 40)),
        st.tuples(st.just("free"), st.integers(0, 11), st.none()),
        st.tuples(st.just("append"), st.integers(0, 11), st.integers(1, 3)),
    ),
    max_size=60,
)


@pytest.mark.parametrize("make", [FirstFit, Buddy, lambda slots: ReserveMax(slots, 40)], ids=["first", "buddy", "max"])
@settings(max_examples=300, deadline=None)
@given(num_slots=st.integers(1, 200), operations=operations)
def test_against_one_flag_a_slot(make, num_slots: int, operations: list) -> None:
    """The model: an owner a slot, and (start, size, tokens, final) a request."""
    memory = make(num_slots)
    owner = np.full(num_slots, -1)
    regions: dict[int, list[int]] = {}
    for name, request, amount in operations:
        if name == "allocate" and request not in regions:
            size = memory.region_size(amount)
            final = (amount + 1) // 2
            if not memory.can_allocate(amount):
                with pytest.raises(NoHoleError) as caught:
                    memory.allocate(request, 0, amount, final)
                assert caught.value.free == (owner == -1).sum()
                assert isinstance(memory, Buddy) or longest_run(owner == -1) < size
            else:
                start = memory.allocate(request, 0, amount, final)
                assert (owner[start : start + size] == -1).all()
                assert start + size <= num_slots
                owner[start : start + size] = request
                regions[request] = [start, size, 0, final]
        elif name == "free" and request in regions:
            memory.free(request)
            owner[owner == request] = -1
            del regions[request]
        elif name == "append" and request in regions:
            region = regions[request]
            if region[2] + amount <= region[1]:
                memory.append([request], amount)
                region[2] += amount
                region[3] = max(region[3], region[2])
            else:
                with pytest.raises(ValueError, match="more tokens for request"):
                    memory.append([request], amount)
        assert_same(memory, owner, regions)
    for request in list(regions):
        memory.free(request)
    assert holes(memory) == holes(make(num_slots))


def assert_same(memory: ContiguousAllocator, owner: np.ndarray, regions: dict[int, list[int]]) -> None:
    assert sorted(zip(*(column.tolist() for column in memory.regions()), strict=True)) == sorted(
        tuple(region) for region in regions.values()
    )
    free = np.zeros(len(owner), bool)
    for start, size in holes(memory):
        assert not free[start : start + size].any()
        free[start : start + size] = True
    assert (free == (owner == -1)).all()
    usage = memory.usage(7)
    assert sum(usage) == memory.num_slots
    assert usage.tokens == sum(region[2] for region in regions.values())
    assert usage.reservation == sum(region[3] - region[2] for region in regions.values())
    assert usage.external + usage.free == memory.free_slots == free.sum()
    assert usage.external == sum(size for _, size in holes(memory) if size < memory.region_size(7))


def longest_run(flags: np.ndarray) -> int:
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest
