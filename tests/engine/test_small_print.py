"""What the scheduler promises in half sentences: each would be easy to lose, and nothing else shows it."""

import pytest

from cupaged.engine.sequence import State
from tests.engine.test_scheduler import Memory, expected_output, request, run_all, scheduler_of, trace


def test_no_more_run_than_may():
    scheduler = scheduler_of(20, max_num_seqs=2)
    steps = run_all(scheduler, [request(i, 1, 2) for i in range(3)])
    assert [len(step.work) for step in steps] == [2, 2, 1, 1]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_one_that_is_worth_least_gives_way_itself_if_it_finds_no_room(preemption):
    """Who is worth more has room in its last block: the other needs a block, and nobody is worth less than it."""
    scheduler = scheduler_of(3, 3, max_batch_tokens=12, preemption=preemption)
    sequences = [request(0, 5, 3), request(1, 4, 3)]
    steps = run_all(scheduler, sequences)
    assert trace(steps[:2]) == [[(0, 0, 5), (1, 0, 4)], [(0, 5, 1)]]
    assert steps[1].preempted == [1]
    assert [sequence.output for sequence in sequences] == [expected_output(sequence) for sequence in sequences]


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = scheduler_of(4, max_batch_tokens=13)
    for sequence in (request(0, 4, 3), request(1, 9, 3)):
        scheduler.add(sequence)
    memory = Memory(scheduler.manager)
    memory.run(scheduler)
    scheduler.add(request(2, 1, 3, priority=1))  # there would be room: 0 needs one of the three blocks of 1
    steps = [memory.run(scheduler) for _ in range(2)]
    assert trace(steps)[0] == [(0, 4, 1)]
    assert steps[0].preempted == [1]
    assert (2, 0, 1) in trace(steps)[1]


def test_a_sequence_that_was_dropped_has_nothing_in_the_cache():
    scheduler = scheduler_of(4, 4)
    sequences = [request(i, 5, 3) for i in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    Memory(scheduler.manager).run(scheduler)
    computed = [sequence.num_computed for sequence in sequences]
    for sequence, swap in zip(sequences, (False, True), strict=True):
        scheduler.preempt(sequence, swap=swap)
    assert [sequence.state for sequence in sequences] == [State.WAITING, State.SWAPPED]
    assert [sequence.num_computed for sequence in sequences] == [0, computed[1]]
