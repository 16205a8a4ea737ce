"""The replay: exact schedules on traces small enough to follow by hand, and the sums that must always hold."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import pytest

from cupaged.memory.contiguous import Buddy, FirstFit, ReserveMax, Usage
from cupaged.memory.replay import STATES, ContiguousMemory, PagedMemory, Replay, Requests, replay
from cupaged.memory.sampler import Trace, sample_trace


def totals(outcome: Replay) -> tuple[int, int, int]:
    return int(outcome.refused[-1]), int(outcome.preempted[-1]), int(outcome.completed[-1])


def requests(*rows: tuple[int, int, int]) -> Requests:
    """(arrival, prompt, output) a request."""
    return Requests(*np.array(rows, np.int64).T)


def reserve_max(num_slots: int, max_len: int, these: Requests) -> ContiguousMemory:
    return ContiguousMemory(ReserveMax(num_slots, max_len), these, np.full(len(these.arrival), max_len))


def test_first_come_first_served_in_two_regions() -> None:
    these = requests((0, 3, 2), (0, 1, 4), (1, 5, 1))
    outcome = replay(these, reserve_max(20, 10, these), max_waiting=8)
    assert outcome.running.tolist() == [2, 2, 2, 1, 0]
    assert outcome.waiting.tolist() == [0, 1, 0, 0, 0]
    assert dict(zip(STATES, outcome.usage.T.tolist(), strict=True)) == {
        "tokens": [4, 6, 8, 4, 0],
        "reservation": [6, 4, 3, 1, 0],
        "internal": [10, 10, 9, 5, 0],
        "external": [0, 0, 0, 0, 0],
        "free": [0, 0, 0, 10, 20],
    }
    assert totals(outcome) == (0, 0, 3)


def test_a_full_line_refuses_whoever_comes() -> None:
    these = requests((0, 1, 9), (1, 1, 1), (1, 1, 1), (1, 1, 1), (5, 1, 1))
    outcome = replay(these, reserve_max(10, 10, these), max_waiting=2)
    assert totals(outcome) == (2, 0, 3)
    assert outcome.refused.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert outcome.waiting.tolist() == [0, 2, 2, 2, 2, 2, 2, 2, 2, 1, 0, 0]


def test_a_large_request_holds_up_those_behind_it() -> None:
    these = requests((0, 6, 3), (0, 6, 1), (0, 1, 1))
    outcome = replay(these, ContiguousMemory(FirstFit(12), these, these.final), max_waiting=8)
    assert outcome.running.tolist() == [1, 1, 1, 2, 0]
    assert outcome.waiting.tolist() == [2, 2, 2, 0, 0]
    external = outcome.usage[:, STATES.index("external")]
    assert external.tolist() == [3, 3, 3, 0, 0]


def test_a_paged_memory_preempts_the_youngest_and_computes_it_again() -> None:
    """Four blocks of two slots: both requests fit until the third step, when the second gives way."""
    these = requests((0, 3, 4), (0, 3, 3))
    outcome = replay(these, PagedMemory(8, 2, these, kept_free=0), max_waiting=8)
    assert outcome.running.tolist() == [2, 2, 1, 1, 1, 1, 0]
    assert outcome.waiting.tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert outcome.usage[:, STATES.index("tokens")].tolist() == [6, 8, 5, 6, 4, 5, 0]
    assert totals(outcome) == (0, 1, 2)


def test_a_preempted_request_is_first_in_line() -> None:
    """The third request would fit where the second was, but came after it."""
    these = requests((0, 3, 4), (0, 3, 3), (0, 1, 1))
    outcome = replay(these, PagedMemory(8, 2, these, kept_free=0), max_waiting=8)
    assert outcome.running.tolist() == [2, 2, 1, 1, 2, 1, 0]
    assert outcome.waiting.tolist() == [1, 1, 2, 2, 0, 0, 0]


def test_blocks_kept_free_hold_an_admission_back() -> None:
    these = requests((0, 4, 1), (0, 4, 1))
    assert replay(these, PagedMemory(20, 2, these, kept_free=0.6), max_waiting=8).running.tolist() == [2, 0]
    assert replay(these, PagedMemory(20, 2, these, kept_free=0.7), max_waiting=8).running.tolist() == [1, 1, 0]


def test_a_request_that_never_fits_is_an_error() -> None:
    these = requests((0, 3, 2), (1, 9, 1))
    with pytest.raises(ValueError, match="memory must have room for request 1 alone, which holds 9 tokens"):
        replay(these, PagedMemory(8, 2, these, kept_free=0), max_waiting=8)


def test_a_request_that_outgrows_the_memory_alone_is_an_error() -> None:
    """The last block is full and the request is alone: to preempt it would go on for ever."""
    these = requests((0, 3, 2), (2, 7, 3))
    with pytest.raises(ValueError, match="memory must have room for request 1 alone, which holds 9 tokens"):
        replay(these, PagedMemory(8, 2, these, kept_free=0), max_waiting=8)


@pytest.mark.parametrize("block_size", [1, 16, 64, 100])
def test_a_memory_is_painted_free_while_nothing_runs(block_size: int) -> None:
    these = requests((3, 10, 5), (50, 10, 5))
    outcome = replay(these, PagedMemory(200, block_size, these), 4, paint_at=[0, 2, 5, 30, 52, 54, 55])
    running = outcome.running[[0, 2, 5, 30, 52, 54, 55]]
    assert running.tolist() == [0, 0, 1, 0, 1, 1, 0]
    for runs, painted in zip(running, outcome.painted, strict=True):
        assert (painted != STATES.index("free")).any() == runs


def test_no_requests_are_no_steps() -> None:
    these = Requests(*np.empty((3, 0), np.int64))
    outcome = replay(these, PagedMemory(8, 2, these), max_waiting=1, paint_at=[0])
    assert outcome.usage.shape == (0, len(STATES)) and outcome.painted.shape == (0, 8)
    assert all(len(column) == 0 for column in outcome)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1, 0], [1, 1], [1, 1]), "requests must be in order of arrival"),
        (([0, 1], [1, 0], [1, 1]), "requests must have prompts of at least 1 token everywhere, got 0"),
        (([0, 1], [1, 1], [0, 1]), "requests must have outputs of at least 1 token everywhere, got 0"),
        (([-1, 1], [1, 1], [1, 1]), "requests must have arrivals of at least step 0, got -1"),
        (([0, 1], [1], [1, 1]), r"requests must have columns of one length, got \[\(2,\), \(1,\), \(2,\)\]"),
    ],
)
def test_requests_must_be_in_order_and_have_tokens(columns: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Requests(*(np.array(column, np.int64) for column in columns))


@pytest.mark.parametrize("column", ["arrival", "prompt", "output"])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, np.nan], ValueError, "must be whole numbers that fit in int64, got nan for request 1"),
        ([1.0, np.inf], ValueError, "must be whole numbers that fit in int64, got inf for request 1"),
        (np.array([-np.inf, 1], np.float16), ValueError, "must be whole numbers .* got -inf for request 0"),
        ([1.5, 2.0], ValueError, "must be whole numbers that fit in int64, got 1.5 for request 0"),
        (np.array([1, 1.5], np.float16), ValueError, "must be whole numbers .* got 1.5 for request 1"),
        ([1.0, 2.0**63], ValueError, r"must be whole numbers .* got 9.22337203685\d*e\+18 for request 1"),
        ([1.0, 1e30], ValueError, r"must be whole numbers that fit in int64, got 1e\+30 for request 1"),
        (np.array([1, 2**63], np.uint64), ValueError, "must be whole .* got 9223372036854775808 for request 1"),
        ([1, 10**30], TypeError, "must be whole numbers that fit in int64, got object"),
        ([True, True], TypeError, "must be whole numbers that fit in int64, got bool"),
        (["1", "2"], TypeError, "must be whole numbers that fit in int64, got <U1"),
        ([None, 2], TypeError, "must be whole numbers that fit in int64, got object"),
        ([1j, 2], TypeError, "must be whole numbers that fit in int64, got complex128"),
        (np.array([1, 2], "m8[s]"), TypeError, r"must be whole numbers that fit in int64, got timedelta64\[s\]"),
        (np.ma.array([1, 2], mask=[False, True]), TypeError, "must be whole numbers, got masked ones"),
        ([[1], [2]], ValueError, "must have one dimension, got 2"),
        (3, ValueError, "must have one dimension, got 0"),
        ([[1], [2, 3]], ValueError, "must be a vector of whole numbers: "),
    ],
)
def test_columns_of_requests_must_be_whole_numbers(column: str, values: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^requests.{column} {message}"):
        Requests(**{"arrival": [1, 2], "prompt": [1, 2], "output": [1, 2], column: values})


def test_a_request_has_no_more_tokens_than_a_trace_allows() -> None:
    assert Requests([0], [2**31 - 2], [1]).final.tolist() == [2**31 - 1]
    for prompt in (2**31 - 1, 2**63 - 1):
        with pytest.raises(ValueError, match=f"2147483647 tokens .* together, got {prompt} and 1 for request 0"):
            Requests([0], [prompt], [1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.float16, np.float64, np.longdouble, list])
def test_requests_of_every_type_are_replayed_alike(dtype: type) -> None:
    columns = [[0, 3], [200, 150], [100, 7]]
    these = Requests(*(column if dtype is list else np.array(column, dtype) for column in columns))
    assert all(column.dtype == np.int64 for column in (these.arrival, these.prompt, these.output, these.final))
    assert these.final.tolist() == [300, 157] and len(these) == 2
    outcome = replay(these, PagedMemory(512, 16, these), 4, paint_at=[0])
    assert totals(outcome) == (0, 0, 2) and len(outcome.running) == 101
    assert (outcome.painted == STATES.index("reservation")).sum() == 208 - 200


def test_requests_do_not_change_with_the_arrays_that_they_came_from() -> None:
    arrival = np.array([0, 1])
    these = Requests(arrival, [1, 1], [1, 1])
    arrival[1] = 10**12
    assert these.arrival.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        these.arrival[1] = 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Requests([0, 10**9], [10, 10], [5, 5]),
        lambda: Requests([0, 2**63 - 1], [10, 10], [5, 5]),
        lambda: Requests([0], [10], [2**30]),
        lambda: Requests.from_trace(Trace([0.0, 1.0], [1, 3], [1, 1]), 1e-10),
    ],
)
def test_a_replay_of_too_many_steps_is_refused_at_once(make: Callable[[], Requests]) -> None:
    these = make()
    steps = max(int(these.arrival[-1]), int(these.output[0])) + 1
    memory = PagedMemory(64, 16, these)
    with pytest.raises(ValueError, match=f"within max_steps = 2000000 decode steps, got .* take at least {steps}$"):
        replay(these, memory, 4)
    assert memory.manager.gpu.num_used == 0


def test_a_memory_is_not_asked_again_while_nothing_happens() -> None:
    class Asked(PagedMemory):
        times = 0

        def usage(self, running: Any, held: Any, upcoming: int | None) -> Usage:
            self.times += 1
            return super().usage(running, held, upcoming)

    these = requests((1000, 10, 5), (50_000, 10, 5))
    memory = Asked(64, 16, these)
    outcome = replay(these, memory, 4, paint_at=[500, 1000, 30_000])
    assert memory.times == 1 + 6 + 6
    assert outcome.running.nonzero()[0].tolist() == [*range(1000, 1005), *range(50_000, 50_005)]
    assert outcome.completed.tolist() == [0] * 1005 + [1] * 49_000 + [2]
    assert outcome.usage[[0, 999, 1005, 49_999, 50_005]].tolist() == [[0, 0, 0, 0, 64]] * 5
    assert (outcome.usage[:, 0] > 0).sum() == 10
    assert [int((picture != STATES.index("free")).sum()) for picture in outcome.painted] == [0, 16, 0]


def test_a_replay_takes_no_more_steps_than_allowed() -> None:
    """The second request waits for the first: together they take 11 steps, which no arrival tells."""
    these = requests((0, 1, 5), (0, 1, 5))
    assert len(replay(these, reserve_max(8, 8, these), 4, max_steps=11).running) == 11
    with pytest.raises(ValueError, match="within max_steps = 10 decode steps, got 1 of 2 requests completed and 0 ref"):
        replay(these, reserve_max(8, 8, these), 4, max_steps=10)
    late = requests((9, 1, 1))
    assert len(replay(late, PagedMemory(8, 2, late), 4, max_steps=11).running) == 11
    for max_steps, error in ((0, ValueError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="max_steps must be "):
            replay(these, PagedMemory(8, 2, these), 4, max_steps=max_steps)


@pytest.mark.parametrize(
    ("paint_at", "error", "message"),
    [
        ((step for step in [0]), TypeError, "paint_at must be a collection of steps, got generator"),
        (count(), TypeError, "paint_at must be a collection of steps, got count"),
        (5, TypeError, "paint_at must be a collection of steps, got int"),
        (None, TypeError, "paint_at must be a collection of steps, got NoneType"),
        (np.array(5), TypeError, "paint_at must be a collection of steps, got ndarray"),
        ("12", TypeError, "paint_at must be a collection of steps, got str"),
        (b"12", TypeError, "paint_at must be a collection of steps, got bytes"),
        (["a"], TypeError, "each step of paint_at must be an integer, got str"),
        ([3.5], TypeError, "each step of paint_at must be an integer, got float"),
        ([True], TypeError, "each step of paint_at must be an integer, got bool"),
        ([[0], [1]], TypeError, "each step of paint_at must be an integer, got list"),
        ([[0], [1, 2]], TypeError, "each step of paint_at must be an integer, got list"),
        ([-1], ValueError, "each step of paint_at must be at least 0, got -1"),
    ],
)
def test_steps_to_paint_must_be_a_collection_of_steps(paint_at: Any, error: type, message: str) -> None:
    these = requests((0, 1, 1))
    memory = PagedMemory(8, 2, these)
    with pytest.raises(error, match=message):
        replay(these, memory, 1, paint_at)
    assert memory.manager.gpu.num_used == 0


@pytest.mark.parametrize(
    "paint_at", [[4, 0, 0], (0, 4), {0, 4}, np.array([0, 4]), {0: "a", 4: "b"}, range(0, 10**12, 4)]
)
def test_steps_to_paint_come_in_order_of_time(paint_at: Any) -> None:
    these = requests((3, 1, 3))
    outcome = replay(these, PagedMemory(8, 2, these), 1, paint_at)
    assert [int((picture != STATES.index("free")).sum()) for picture in outcome.painted] == [0, 2]


@pytest.mark.parametrize(
    ("reserve", "error", "message"),
    [
        ([5], ValueError, "reserve must hold one number for each of 2 requests, got 1"),
        ([5, 9, 9], ValueError, "reserve must hold one number for each of 2 requests, got 3"),
        ([5, 8], ValueError, "reserve must be at least the 9 tokens that request 1 holds in the end, got 8"),
        ([-5, 9], ValueError, "reserve must be at least the 5 tokens that request 0 holds in the end, got -5"),
        ([5.5, 9], ValueError, "reserve must be whole numbers that fit in int64, got 5.5 for request 0"),
        (["a", "b"], TypeError, "reserve must be whole numbers"),
        (9, ValueError, "reserve must have one dimension, got 0"),
        (None, ValueError, "reserve must have one dimension, got 0"),
    ],
)
def test_a_contiguous_memory_asks_for_a_reserve_for_each_request(reserve: Any, error: type, message: str) -> None:
    these = requests((0, 3, 2), (0, 5, 4))
    with pytest.raises(error, match=message):
        ContiguousMemory(FirstFit(100), these, reserve)


@pytest.mark.parametrize("reserve", [[5, 9], np.array([200, 220], np.uint8), [5.0, 9.0]])
def test_a_reserve_of_every_type_is_taken(reserve: Any) -> None:
    these = requests((0, 3, 2), (0, 5, 4))
    outcome = replay(these, ContiguousMemory(FirstFit(420), these, reserve), 4)
    assert outcome.usage[0].tolist() == [8, 6, sum(map(int, reserve)) - 14, 0, 420 - sum(map(int, reserve))]


@pytest.mark.parametrize("others", [[(0, 3, 2)], [(0, 3, 2), (0, 5, 4), (0, 1, 1)], [(0, 3, 2), (0, 5, 5)]])
def test_a_memory_made_for_other_requests_is_refused(others: list) -> None:
    these, others = requests((0, 3, 2), (0, 5, 4)), requests(*others)
    for memory in (PagedMemory(64, 2, others), ContiguousMemory(FirstFit(64), others, others.final)):
        with pytest.raises(ValueError, match=f"made for the 2 requests .*, got one made for {len(others)} others"):
            replay(these, memory, 4)


@pytest.mark.parametrize("these", [[(0, 1, 1)], None, ([0], [1], [1])])
def test_a_replay_asks_for_requests(these: Any) -> None:
    with pytest.raises(TypeError, match=f"requests must be Requests, got {type(these).__name__}"):
        replay(these, PagedMemory(8, 2, requests((0, 1, 1))), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 15}, "num_slots must be at least 16, got 15"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"kept_free": -0.1}, "kept_free must be at least 0 and below 1, got -0.1"),
        ({"kept_free": 1.0}, "kept_free must be at least 0 and below 1, got 1.0"),
        ({"kept_free": float("nan")}, "kept_free must be at least 0 and below 1, got nan"),
    ],
)
def test_a_paged_memory_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedMemory(**{"num_slots": 64, "block_size": 16, "requests": requests((0, 1, 1)), **arguments})


# --- on a sampled trace ---------------------------------------------------------------------------

NUM_SLOTS = 20_000
TRACE = sample_trace(400, seed=3)
TRACE = TRACE[TRACE.total_tokens <= 4096]
REQUESTS = Requests.from_trace(TRACE, offered_tokens=1.5 * NUM_SLOTS)
MEMORIES = {
    "reserve-max": lambda: reserve_max(NUM_SLOTS, 4096, REQUESTS),
    "first fit": lambda: ContiguousMemory(FirstFit(NUM_SLOTS), REQUESTS, REQUESTS.final),
    "buddy": lambda: ContiguousMemory(Buddy(NUM_SLOTS), REQUESTS, REQUESTS.final),
    "paged 1": lambda: PagedMemory(NUM_SLOTS, 1, REQUESTS),
    "paged 16": lambda: PagedMemory(NUM_SLOTS, 16, REQUESTS),
    "paged 256": lambda: PagedMemory(NUM_SLOTS, 256, REQUESTS),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_every_slot_and_every_request_is_accounted_for(name: str) -> None:
    steps = range(0, int(REQUESTS.arrival[-1]), 97)
    outcome = replay(REQUESTS, MEMORIES[name](), max_waiting=16, paint_at=steps)
    assert (outcome.usage >= 0).all()
    assert (outcome.usage.sum(axis=1) == NUM_SLOTS).all()
    refused, preempted, completed = totals(outcome)
    assert completed + refused == len(TRACE)
    assert outcome.running.max() > 1
    assert outcome.waiting.max() <= 16 + preempted
    for step, painted in zip(steps, outcome.painted, strict=True):
        assert np.bincount(painted, minlength=len(STATES)).tolist() == outcome.usage[step].tolist()


@pytest.mark.parametrize("block_size", [1, 8, 16, 100, 256])
def test_in_ample_memory_occupancy_is_what_the_lengths_say(block_size: int) -> None:
    outcome = replay(REQUESTS, PagedMemory(10**6, block_size, REQUESTS), max_waiting=16)
    assert totals(outcome) == (0, 0, len(TRACE))
    tokens, allocated = outcome.usage[:, 0].sum(), outcome.usage[:, :3].sum()
    assert (tokens, allocated) == (TRACE.token_steps().sum(), TRACE.slot_steps(block_size).sum())
    assert tokens / allocated == TRACE.paged_occupancy(block_size)


def test_the_longest_trace_that_can_be_offered_arrives_in_one_step() -> None:
    assert Requests.from_trace(Trace([0.0, 1.0], [1, 3], [1, 1]), 4.0).arrival.tolist() == [0, 1]


def test_the_longest_requests_arrive_over_time() -> None:
    """Together they hold more token steps than an int64 holds."""
    trace = Trace(np.arange(41.0), np.full(41, 2**30), np.full(41, 2**30 - 1))
    steps = 41 * sum((2**31 - 2, -(2**30 - 1))) * (2**31 - 2 + 2**30) // 2
    assert Requests.from_trace(trace, 2.0**31).arrival.tolist() == [step * steps // 40 // 2**31 for step in range(41)]


def test_offered_tokens_are_what_an_ample_memory_holds() -> None:
    these = Requests.from_trace(TRACE, offered_tokens=30_000)
    outcome = replay(these, PagedMemory(10**6, 16, these), max_waiting=16)
    assert outcome.usage[:, 0].sum() / these.arrival[-1] == pytest.approx(30_000, rel=0.001)


@pytest.mark.parametrize(
    ("trace", "offered", "message"),
    [
        (Trace([0.0], [1], [1]), 10, "trace must hold at least two requests that arrive over time"),
        (Trace([1.0, 1.0], [1, 1], [1, 1]), 10, "trace must hold at least two requests that arrive over time"),
        (Trace([0.0, 1.0], [1, 1], [1, 0]), 10, "trace must hold requests that generate at least one token"),
        (Trace([0.0, 1.0], [1, 1], [1, 1]), 0, "offered_tokens must be positive, got 0"),
        (Trace([0.0, 1.0], [1, 1], [1, 1]), float("nan"), "offered_tokens must be positive, got nan"),
        (Trace([0.0, 1.0], [1, 3], [1, 1]), 4.1, "must be at most the 4 that the trace's 2 requests hold, .* got 4.1"),
        (Trace([0.0, 1.0], [1, 3], [1, 1]), float("inf"), "must be at most the 4 that the trace's 2 .* got inf"),
        (Trace([0.0, 1.0], [1, 3], [1, 1]), 10**400, "must be at most the 4 that the trace's 2 .* got inf"),
        (Trace([0.0, 1.0], [1, 3], [1, 1]), -(10**400), "offered_tokens must be positive, got -inf"),
        (Trace([0.0, 1.0], [1, 3], [1, 1]), Fraction(1, 10**400), "offered_tokens must be positive, got 0"),
        (Trace([0.0, 1.0], [1, 1], [1, 1]), 1e-300, "must be at least 2.22045e-16, .* got 1e-300"),
    ],
)
def test_requests_refuse(trace: Trace, offered: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Requests.from_trace(trace, offered)


@pytest.mark.parametrize("value", ["0.5", None, 1j, True, np.array([0.5]), np.True_])
def test_numbers_must_be_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=f"offered_tokens must be a number, got {type(value).__name__}"):
        Requests.from_trace(Trace([0.0, 1.0], [1, 3], [1, 1]), value)
    with pytest.raises(TypeError, match=f"kept_free must be a number, got {type(value).__name__}"):
        PagedMemory(64, 16, requests((0, 1, 1)), value)


def test_numbers_of_every_type_are_taken() -> None:
    trace = Trace([0.0, 1.0], [1, 3], [1, 1])
    for offered in (2, 2.0, np.float32(2), np.int8(2), Fraction(2)):
        assert Requests.from_trace(trace, offered).arrival.tolist() == [0, 2]


def test_an_offer_of_more_digits_than_can_be_printed_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at most the 4 that the trace's 2 requests hold, .* got inf"):
        Requests.from_trace(Trace([0.0, 1.0], [1, 3], [1, 1]), 10**5000)
