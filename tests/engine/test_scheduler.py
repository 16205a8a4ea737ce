"""What runs when: exact traces, and invariants over random loads. No model: a token follows from those before it."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import SamplingParams, Sequence, State
from cupaged.memory.preemption import CostModel

BLOCK = 4


def scheduler_of(num_blocks, cpu_blocks=0, **options):
    manager = pg.BlockManager(num_blocks, cpu_blocks, BLOCK, prefix_caching=options.pop("prefix_caching", True))
    return Scheduler(manager, **{"max_batch_tokens": 8, "max_num_seqs": 4, "spare_blocks": 0, **options})


def request(seq_id, prompt, max_tokens=4, priority=0):
    prompt = np.full(prompt, seq_id, np.int32) if isinstance(prompt, int) else np.asarray(prompt, np.int32)
    return Sequence(seq_id, prompt, SamplingParams(max_tokens), priority)


def next_token(sequence):
    return (7 * int(sequence.tokens().sum()) + sequence.num_tokens) % 50


class Memory:
    """Slots that hold (text so far) instead of keys and values, so that a wrong or stale slot shows."""

    def __init__(self, manager):
        self.gpu = [None] * (manager.gpu.num_blocks * BLOCK)
        self.cpu = [None] * (manager.cpu.num_blocks * BLOCK)

    def run(self, scheduler):
        """Carry out one step; returns it."""
        step = scheduler.schedule()
        for move in step.moves:
            source, target = {
                "copy": (self.gpu, self.gpu), "out": (self.gpu, self.cpu), "in": (self.cpu, self.gpu)
            }[move.kind]  # fmt: skip
            for a, b in move.pairs.tolist():
                target[b * BLOCK : (b + 1) * BLOCK] = source[a * BLOCK : (a + 1) * BLOCK]
        for work in step.work:
            slots = scheduler.manager.slots(work.sequence.seq_id, 0, work.stop)
            for position in range(work.start, work.stop):
                self.gpu[slots[position]] = tuple(work.sequence.tokens(0, position + 1).tolist())
        for work in step.work:
            slots = scheduler.manager.slots(work.sequence.seq_id, 0, work.stop)
            for position in range(work.stop):
                assert self.gpu[slots[position]] == tuple(work.sequence.tokens(0, position + 1).tolist())
        scheduler.complete(step, [next_token(work.sequence) for work in step.work if work.samples])
        scheduler.manager.check()
        return step


def run_all(scheduler, sequences):
    for sequence in sequences:
        scheduler.add(sequence)
    memory, steps = Memory(scheduler.manager), []
    while scheduler.unfinished:
        steps.append(memory.run(scheduler))
        assert len(steps) < 10_000
    return steps


def trace(steps):
    return [[(work.sequence.seq_id, work.start, work.count) for work in step.work] for step in steps]


def expected_output(sequence):
    alone = request(sequence.seq_id, sequence.prompt, sequence.params.max_tokens)
    while len(alone.output) < alone.params.max_tokens:
        alone.output.append(next_token(alone))
    return alone.output


def assert_all_free(manager):
    assert manager.seq_ids == []
    assert manager.gpu.num_available == manager.gpu.num_blocks and manager.cpu.num_used == 0


def test_prompts_are_cut_to_the_budget_and_decoding_goes_first():
    scheduler = scheduler_of(20)
    steps = run_all(scheduler, [request(0, 5, 3), request(1, 10, 2)])
    assert trace(steps) == [
        [(0, 0, 5), (1, 0, 3)],
        [(0, 5, 1), (1, 3, 7)],
        [(0, 6, 1), (1, 10, 1)],
    ]
    assert_all_free(scheduler.manager)


def test_admission_waits_for_blocks_and_nobody_overtakes():
    scheduler = scheduler_of(4)
    steps = run_all(scheduler, [request(0, 8, 2), request(1, 12, 1), request(2, 1, 1)])
    assert trace(steps) == [
        [(0, 0, 8)],  # two blocks, and then a third: request 1 would need three
        [(0, 8, 1)],
        [(1, 0, 8)],
        [(1, 8, 4), (2, 0, 1)],
    ]


def test_spare_blocks_are_left_to_those_that_run():
    (first, *_) = run_all(scheduler_of(4, spare_blocks=1), [request(0, 4, 2), request(1, 8, 1)])
    assert trace([first]) == [[(0, 0, 4), (1, 0, 4)]]
    (first, *_) = run_all(scheduler_of(4, spare_blocks=2), [request(0, 4, 2), request(1, 8, 1)])
    assert trace([first]) == [[(0, 0, 4)]]


def test_the_higher_priority_is_admitted_first():
    scheduler = scheduler_of(2)
    steps = run_all(scheduler, [request(0, 5, 1), request(1, 5, 1, priority=3), request(2, 5, 1)])
    assert [work.sequence.seq_id for step in steps for work in step.work] == [1, 0, 2]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_lowest_priority_gives_way(preemption):
    scheduler = scheduler_of(4, 4, preemption=preemption, max_batch_tokens=12)
    sequences = [request(i, 4, 5, priority=i) for i in range(3)]
    steps = run_all(scheduler, sequences)
    assert [step.preempted for step in steps if step.preempted] == [[0]]
    assert [sequence.num_preemptions for sequence in sequences] == [1, 0, 0]
    assert [sequence.output for sequence in sequences] == [expected_output(sequence) for sequence in sequences]
    counters = scheduler.manager.counters
    assert counters.preemptions == 1
    assert (counters.blocks_swapped_out, counters.blocks_swapped_in) == ((1, 1) if preemption == "swap" else (0, 0))
    assert_all_free(scheduler.manager)


def test_a_cost_model_decides_how():
    def swapped(link):
        scheduler = scheduler_of(4, 4, preemption=CostModel(100.0, link, 1000.0))
        run_all(scheduler, [request(i, 4, 6) for i in range(3)])
        return scheduler.manager.counters.blocks_swapped_out

    assert swapped(1e9) > 0 and swapped(1.0) == 0


def test_a_full_cpu_pool_means_computing_again():
    scheduler = scheduler_of(4, 0, preemption="swap")
    sequences = [request(i, 4, 6) for i in range(3)]
    run_all(scheduler, sequences)
    assert scheduler.manager.counters.preemptions > 0 and scheduler.manager.counters.blocks_swapped_out == 0
    assert [sequence.output for sequence in sequences] == [expected_output(sequence) for sequence in sequences]


def test_a_prefix_is_shared_once_it_is_computed():
    text = np.arange(12)
    scheduler = scheduler_of(20, max_batch_tokens=12)
    steps = run_all(scheduler, [request(0, text, 3), request(1, [*text, 5], 2), request(2, text, 2)])
    assert trace(steps) == [
        [(0, 0, 12)],
        [(0, 12, 1), (1, 12, 1), (2, 8, 4)],  # three blocks are there; of a whole prompt the last is computed again
        [(0, 13, 1), (1, 13, 1), (2, 12, 1)],
    ]


def test_blocks_that_are_not_computed_yet_are_not_shared():
    text = np.arange(16)
    steps = run_all(scheduler_of(20), [request(0, text, 1), request(1, text, 1)])
    assert trace(steps) == [[(0, 0, 8)], [(0, 8, 8)], [(1, 12, 4)]]


def test_the_answer_ends_at_its_end_and_at_the_limit():
    scheduler = scheduler_of(20, max_batch_tokens=12)
    ends, goes_on, short = request(0, 3, 9), request(1, 3, 9), request(2, 3, 9)
    goes_on.params = SamplingParams(4, ignore_end=True)
    short.params, short.limit = SamplingParams(9, ignore_end=True), 5
    for sequence in (ends, goes_on, short):
        scheduler.add(sequence)
    while scheduler.unfinished:
        step = scheduler.schedule()
        scheduler.complete(step, [13 for work in step.work if work.samples], end_token=13 if ends.output else None)
    assert (ends.output, ends.finish_reason) == ([13, 13], "end")
    assert (goes_on.output, goes_on.finish_reason) == ([13] * 4, "length")
    assert (short.output, short.finish_reason) == ([13] * 2, "length")
    assert_all_free(scheduler.manager)


def test_a_cancelled_request_leaves_no_block_wherever_it_stands():
    scheduler = scheduler_of(6, 6)
    sequences = [request(i, 8, 5) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    memory = Memory(scheduler.manager)
    memory.run(scheduler)
    memory.run(scheduler)
    scheduler.preempt(sequences[0], swap=True)
    assert [sequence.state for sequence in sequences] == [State.SWAPPED, State.RUNNING, State.WAITING, State.WAITING]
    for sequence in sequences:
        scheduler.cancel(sequence)
        scheduler.cancel(sequence)
    assert not scheduler.unfinished and {sequence.finish_reason for sequence in sequences} == {"cancelled"}
    assert_all_free(scheduler.manager)


def test_a_request_that_is_cancelled_while_its_step_runs_gets_no_token():
    scheduler = scheduler_of(6)
    sequences = [request(i, 3, 5) for i in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    step = scheduler.schedule()
    scheduler.cancel(sequences[0])
    scheduler.complete(step, [1, 2])
    assert sequences[0].output == [] and sequences[1].output == [2]


def test_only_what_runs_is_preempted():
    scheduler = scheduler_of(6)
    waiting = request(0, 3)
    scheduler.add(waiting)
    with pytest.raises(ValueError, match="sequence must be running; 0 is waiting"):
        scheduler.preempt(waiting, swap=False)


def test_a_request_that_fits_no_pool_is_an_error_and_changes_nothing():
    scheduler = scheduler_of(2)
    scheduler.add(request(0, 9))
    with pytest.raises(pg.OutOfBlocksError, match="needed 3, free 2"):
        scheduler.schedule()
    assert_all_free(scheduler.manager)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preemption": "drop"}, 'preemption must be "recompute", "swap" or a CostModel; got \'drop\''),
        ({"max_batch_tokens": 2}, "max_batch_tokens must be at least max_num_seqs, 4; got 2"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        scheduler_of(4, **options)


@pytest.mark.parametrize("seed", range(200))
def test_every_request_gets_its_tokens_whatever_happens(seed):
    random = np.random.default_rng(seed)
    scheduler = scheduler_of(
        int(random.integers(4, 13)), int(random.choice([0, 3, 12])),
        max_batch_tokens=int(random.integers(4, 13)),
        preemption=["recompute", "swap", CostModel(100.0, 400.0, 10.0)][random.integers(3)],
        spare_blocks=int(random.integers(3)),
        prefix_caching=bool(random.integers(2)),
    )  # fmt: skip
    sequences = [
        request(i, np.full(length, random.integers(2)), int(random.integers(1, BLOCK + 2)), int(random.integers(3)))
        for i, length in enumerate(random.integers(1, 3 * BLOCK + 1, random.integers(1, 8)).tolist())
    ]  # many share a prefix
    unborn, memory, cancelled = list(sequences), Memory(scheduler.manager), set()
    for _ in range(500):
        if unborn and random.random() < 0.5:
            scheduler.add(unborn.pop())
        elif not unborn and not scheduler.unfinished:
            break
        if scheduler.running and random.random() < 0.2:
            victim = scheduler.running[random.integers(len(scheduler.running))]
            scheduler.preempt(victim, swap=random.random() < 0.5 and scheduler.manager.can_swap_out(victim.seq_id))
        if scheduler.unfinished and random.random() < 0.03:
            victim = (scheduler.running + scheduler.waiting)[0]
            scheduler.cancel(victim)
            cancelled.add(victim.seq_id)
        step = memory.run(scheduler)
        assert step.num_tokens <= scheduler.max_batch_tokens and len(step.work) <= scheduler.max_num_seqs
    assert not scheduler.unfinished and not unborn
    for sequence in sequences:
        expected = expected_output(sequence)
        if sequence.seq_id in cancelled:
            assert sequence.output == expected[: len(sequence.output)]
        else:
            assert sequence.output == expected
    assert_all_free(scheduler.manager)


def test_a_sequence_that_failed_ends_and_cannot_be_found():
    scheduler = scheduler_of(20, max_batch_tokens=16)
    first, second = request(0, [1, 2, 3, 4, 5]), request(1, [9, 8, 7, 6, 5])
    for sequence in (first, second):
        scheduler.add(sequence)
    scheduler.complete(scheduler.schedule(), [1, -1])
    assert second.state is State.FINISHED and second.finish_reason == "error" and second.output == []
    assert scheduler.running == [first] and first.output == [1]
    manager = scheduler.manager
    manager.allocate("a", [1, 2, 3, 4, 0])
    manager.allocate("b", [9, 8, 7, 6, 0])
    assert manager.cached_tokens("a") == 4 and manager.cached_tokens("b") == 0
    manager.check()


def test_a_part_of_a_prompt_can_fail():
    scheduler = scheduler_of(20, max_batch_tokens=4, max_num_seqs=4)
    sequence, other = request(0, 12), request(1, 2)
    for each in (sequence, other):
        scheduler.add(each)
    scheduler.complete(scheduler.schedule(), [])
    assert len(scheduler.manager.gpu.cache) == 1
    scheduler.complete(scheduler.schedule(), [], failed={0})
    assert sequence.finish_reason == "error" and sequence.num_computed == 8
    assert len(scheduler.manager.gpu.cache) == 0 and scheduler.manager.gpu.num_free == 20
    memory = Memory(scheduler.manager)
    while scheduler.unfinished:
        memory.run(scheduler)
    assert other.output == expected_output(other)
    assert_all_free(scheduler.manager)


def test_who_was_cancelled_in_its_last_step_has_not_failed():
    scheduler = scheduler_of(20)
    sequence = request(0, 4)
    scheduler.add(sequence)
    step = scheduler.schedule()
    scheduler.cancel(sequence)
    scheduler.complete(step, [-1], failed={0})
    assert sequence.finish_reason == "cancelled"
