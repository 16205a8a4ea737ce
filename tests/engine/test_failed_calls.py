"""A call or a step that fails, wherever it fails, and is made again, answers as if it had not failed."""

from __future__ import annotations

import sys
from contextlib import suppress

import numpy as np
import pytest

import cupaged as pg
import cupaged.engine.attention as attention_module
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import SamplingParams, Sequence
from cupaged.engine.weights import ModelConfig, random_checkpoint
from cupaged.memory.watermark import WatermarkEvictor
from cupaged.ops.swap import SwapEngine
from tests.kit.compare import to_numpy
from tests.kit.llama import SMALL, dense_greedy

CONFIG = pg.CacheConfig(32, 4, 1, 64, "float16")
STEPS_OF_A_CALL = ("copy_blocks", "append_kv", "paged_attention", "paged_prefill")
TINY = ModelConfig(1, 32, 64, 48, 1, 1, 32, max_tokens=200)
ERRORS = (MemoryError("invented"), KeyboardInterrupt("invented"), pg.KernelBuildError("invented"))


class FailsOnce:
    """Raises at a chosen call, before or after it has done its work; afterwards it does what it should."""

    def __init__(self, work, error, after: bool = False, at: int = 0) -> None:
        self.work, self.error, self.after, self.left = work, error, after, at

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == -1 and not self.after:
            raise self.error
        result = self.work(*args, **options)
        if self.left == -1:
            raise self.error
        return result

    @property
    def failed(self) -> bool:
        return self.left < 0


def rows(count: int, seed: int, xp):
    rng = np.random.default_rng(seed)
    return [xp.asarray(rng.standard_normal((count, 1, 64)).astype(np.float16)) for _ in range(3)]


def state_of(manager) -> tuple:
    return (
        manager.gpu.ref_count.tobytes(), manager.gpu.allocator.allocated.tobytes(), manager.gpu.cache.named.tobytes(),
        [(seq_id, manager.num_tokens(seq_id), manager.blocks(seq_id).tolist()) for seq_id in manager.seq_ids],
    )  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", STEPS_OF_A_CALL)
def test_a_call_that_fails_looks_as_if_it_had_never_been_made(what, after, error, backend, xp, monkeypatch):
    """A prompt, a chunk, a decode step, and one that copies a shared block: each fails once, and is made again."""
    tokens = list(range(9))
    calls = [
        (rows(9, 0, xp), ["a"], True, [tokens]),
        (rows(3, 1, xp), ["a"], True, [[50, 51, 52]]),
        (rows(1, 2, xp), ["a"], False, [60]),
        ("fork",),
        (rows(2, 3, xp), ["a", "b"], False, [61, 62]),
        (rows(9, 4, xp), ["c", "d"], True, [[1, 2, 3, 4, 5], [1, 2, 3, 4]]),
    ]

    def run(fails_at: int | None):
        module = pg.PagedAttention(CONFIG, backend=backend)
        answers = []
        for i, call in enumerate(calls):
            if call == ("fork",):
                module.manager.fork("a", "b")
                continue
            (query, key, value), names, is_prompt, text = call
            if i == fails_at:
                work = FailsOnce(getattr(attention_module, what), error, after)
                monkeypatch.setattr(attention_module, what, work)
                before = state_of(module.manager)
                try:
                    module(query, key, value, names, is_prompt, tokens=text)
                except type(error):
                    assert state_of(module.manager) == before
                else:
                    assert not work.failed
                monkeypatch.undo()
                if not work.failed:
                    return None
            answers.append(to_numpy(module(query, key, value, names, is_prompt, tokens=text)))
            module.manager.check()
        return answers

    expected = run(None)
    reached = 0
    for fails_at in range(len(calls)):
        if calls[fails_at] != ("fork",) and (answers := run(fails_at)) is not None:
            reached += 1
            for actual, right in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(actual, right)
    assert reached == {"copy_blocks": 1, "append_kv": 5, "paged_attention": 2, "paged_prefill": 3}[what]


def test_what_a_failed_call_was_to_write_is_not_found_by_others(backend, xp, monkeypatch):
    module = pg.PagedAttention(CONFIG, backend=backend)
    query, key, value = rows(9, 0, xp)
    monkeypatch.setattr(attention_module, "append_kv", FailsOnce(attention_module.append_kv, MemoryError()))
    with pytest.raises(MemoryError):
        module(query, key, value, ["a"], True, tokens=[range(9)])
    assert module.manager.seq_ids == []
    module.manager.allocate("probe", range(9))
    assert module.manager.cached_tokens("probe") == 0


def test_a_layer_that_fails_takes_the_step_back_for_all_layers(backend, xp, monkeypatch):
    """The first layer has written and attended; the second fails; the step must be asked for again."""
    first = pg.PagedAttention(CONFIG, backend=backend)
    second = pg.PagedAttention(CONFIG, first.manager, backend)
    query, key, value = rows(5, 0, xp)
    step = first.step(["a"], True, 5, tokens=[range(5)])
    for layer in (first, second):
        layer.attend(query, key, value, step)
    row = rows(1, 1, xp)
    step = first.step(["a"], False, 1, tokens=[5])
    expected = first.attend(*row, step)
    with monkeypatch.context() as patched:
        patched.setattr(attention_module, "paged_attention", FailsOnce(None, MemoryError()))
        with pytest.raises(MemoryError):
            second.attend(*row, step)
    assert first.manager.num_tokens("a") == 5
    with pytest.raises(ValueError, match="step must not have been taken back"):
        second.attend(*row, step)
    again = first.step(["a"], False, 1, tokens=[5])
    assert again.slots.tolist() == step.slots.tolist()
    np.testing.assert_array_equal(to_numpy(first.attend(*row, again)), to_numpy(expected))
    second.attend(*row, again)
    assert first.manager.num_tokens("a") == 6


def test_a_step_can_be_taken_back_by_hand(backend):
    module = pg.PagedAttention(CONFIG, backend=backend)
    step = module.step(["a", "b"], True, 9, tokens=[range(5), range(4)])
    module.undo(step)
    assert module.manager.seq_ids == [] and module.manager.gpu.num_free == 32


def test_transfers_that_fail_are_made_by_the_next_call(backend, xp, monkeypatch):
    config = pg.CacheConfig(4, 4, 1, 64, "float16")
    manager = pg.BlockManager(4, 8, 4, on_evict="offload")
    cache = pg.KVCache(config, backend)
    swaps = SwapEngine([cache], 8)
    module = pg.PagedAttention(config, manager, backend, cache=cache, swaps=swaps)
    prompt = rows(9, 0, xp)
    expected = to_numpy(module(*prompt, ["a"], True, tokens=[range(9)]))
    module.free("a")
    monkeypatch.setattr(swaps, "swap_out", FailsOnce(swaps.swap_out, MemoryError()))
    with pytest.raises(MemoryError):
        module(*rows(13, 1, xp), ["b"], True, tokens=[range(100, 113)])
    assert manager.seq_ids == []
    assert [move.kind for move in manager.moves.pending] == ["out"]
    module(*rows(13, 1, xp), ["b"], True, tokens=[range(100, 113)])
    module.free("b")
    query, key, value = prompt
    again = module(query[8:], key[8:], value[8:], ["again"], True, tokens=[range(9)])
    assert manager.cached_tokens("again") == 8
    np.testing.assert_array_equal(to_numpy(again), expected[8:])


# ---- the engine -----------------------------------------------------------------------------------------------------


def engine(backend, **options):
    return pg.LLM(
        random_checkpoint(SMALL, seed=3), backend=backend, dtype="float32", block_size=4, max_batch_tokens=16,
        max_num_seqs=8, spare_blocks=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("options", [{"preemption": "swap"}, {"on_evict": "offload"}], ids=str)
def test_moves_that_fail_are_made_by_the_next_step(options, half_way, error, backend):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(SMALL.vocab_size, size=n).tolist() for n in (8, 11, 9, 12, 7, 8)]
    prompts += prompts[:2]
    llm = engine(backend, num_blocks=13, num_cpu_blocks=40, **options)
    ids = [llm.submit(prompt, pg.SamplingParams(12, ignore_end=True)) for prompt in prompts]
    carry_out, failures = llm._carry_out, []

    def fails_at_first(moves):
        if not moves or len(failures) > 40:
            return carry_out(moves)
        seen = tuple(move.pairs.tobytes() for move in moves)
        if seen in failures:
            return carry_out(moves)
        failures.append(seen)
        if half_way:
            carry_out(moves[: len(moves) // 2])
        raise error

    llm._carry_out = fails_at_first
    for _ in range(1000):
        if not llm.unfinished:
            break
        try:
            llm.step()
        except type(error):
            pass
    assert len(failures) > 2, "nothing was moved, so nothing was shown"
    checkpoint = random_checkpoint(SMALL, seed=3)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert llm.completion(request_id).tokens.tolist() == dense_greedy(checkpoint, prompt, 12)
    llm.manager.check()
    assert llm.manager.moves.pending == ()


@pytest.mark.parametrize("what", ["schedule", "_compute", "complete"])
def test_a_step_that_fails_anywhere_is_made_again_by_the_next(what, backend):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(SMALL.vocab_size, size=n).tolist() for n in (8, 11, 9, 12, 7)]
    llm = engine(backend, num_blocks=13, num_cpu_blocks=40, preemption="swap")
    ids = [llm.submit(prompt, pg.SamplingParams(12, ignore_end=True)) for prompt in prompts]
    holder = llm if what == "_compute" else llm.scheduler
    work, count = getattr(holder, what), 0
    while llm.unfinished:
        count += 1
        assert count < 1000
        if count % 3 == 0:
            setattr(holder, what, FailsOnce(work, MemoryError("invented"), after=what != "complete"))
            with pytest.raises(MemoryError):
                llm.step()
            setattr(holder, what, work)
        else:
            llm.step()
    checkpoint = random_checkpoint(SMALL, seed=3)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert llm.completion(request_id).tokens.tolist() == dense_greedy(checkpoint, prompt, 12)
    llm.manager.check()


def test_a_fork_whose_copy_failed_answers_as_if_it_had_not(backend):
    def run(fails: bool):
        llm = engine(backend, num_blocks=40)
        params = pg.SamplingParams(12, ignore_end=True)
        first = llm.submit([1, 2, 3, 4, 5], params)
        llm.step()
        llm.step()
        second = llm.fork(first, 7)
        carry_out = llm._carry_out
        if fails:
            llm._carry_out = FailsOnce(carry_out, MemoryError())
            with pytest.raises(MemoryError):
                llm.step()
            llm._carry_out = carry_out
        while llm.unfinished:
            llm.step()
        return [llm.completion(each).tokens.tolist() for each in (first, second)]

    assert run(True) == run(False)


def test_a_preempted_request_counts_no_hit_for_what_it_finds_of_its_own():
    manager = pg.BlockManager(8, 0, 4)
    scheduler = Scheduler(manager, max_batch_tokens=64, max_num_seqs=4, spare_blocks=0)
    request = Sequence(0, np.arange(9, dtype=np.int32), SamplingParams(8))
    scheduler.add(request)
    scheduler.complete(scheduler.schedule(), [1])
    scheduler.complete(scheduler.schedule(), [2])
    scheduler.preempt(request, swap=False)
    step = scheduler.schedule()
    assert step.work[0].start == 8, "it finds what it had computed"
    assert (manager.counters.prompt_tokens, manager.counters.cached_tokens) == (9, 0)
    assert request.num_cached == 0


# ---- everything at once ---------------------------------------------------------------------------------------------


def random_engine_answers(seed: int) -> tuple[list, list, dict]:
    """Return what an engine with room answers, what one under pressure with an evictor does, and its stats."""
    rng = np.random.default_rng(seed)
    checkpoint = random_checkpoint(TINY, seed=seed % 7)
    prompts = [rng.integers(0, 48, rng.integers(8, 30)).tolist() for _ in range(6)]
    prompts += [prompts[i] + rng.integers(0, 48, 3).tolist() for i in rng.integers(0, 6, 4)]
    params = pg.SamplingParams(int(rng.integers(4, 20)), ignore_end=True)
    roomy = pg.LLM(checkpoint, backend="host", block_size=4, num_blocks=600, max_num_seqs=16, prefix_caching=False)
    tight = pg.LLM(
        checkpoint, backend="host", block_size=4, num_blocks=int(rng.integers(14, 30)),
        num_cpu_blocks=int(rng.integers(4, 40)), preemption="swap", on_evict="offload",
        max_num_seqs=int(rng.integers(2, 8)), eviction=str(rng.choice(["lru", "lfu", "cost"])),
    )  # fmt: skip
    expected = [each.tokens.tolist() for each in roomy.generate(prompts, params)]
    with WatermarkEvictor(tight.manager, 0.3, 0.1, blocks_per_step=int(rng.integers(1, 4)), pause=0):
        answers = [each.tokens.tolist() for each in tight.generate(prompts, params)]
    tight.manager.check()
    return expected, answers, tight.stats()


def check_random_engines(seeds) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the evictor's thread gets its turn between any two steps of ours
    moved = 0
    try:
        for seed in seeds:
            expected, answers, stats = random_engine_answers(seed)
            assert answers == expected, f"seed {seed}"
            moved += stats["blocks_offloaded"] > 0 and stats["blocks_swapped_in"] > 0
    finally:
        sys.setswitchinterval(interval)
    assert moved >= len(seeds) // 4, "too few runs that swapped and offloaded"


@pytest.mark.parametrize("first", [0, 25])
def test_swap_offload_and_evictor_together_answer_as_an_engine_with_room(first):
    check_random_engines(range(first, first + 25))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_swap_offload_and_evictor_together_answer_as_an_engine_with_room_in_1000_runs(first):
    check_random_engines(range(first, first + 100))


# ---- interrupted anywhere -------------------------------------------------------------------------------------------


def answers_with_one_failure(holder_of, what: str, after: bool, at: int, options: dict, backend) -> bool:
    """Run requests with the `at`-th call of something failing once; returns whether there was such a call."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(SMALL.vocab_size, size=n).tolist() for n in (8, 11, 9, 12, 7)]
    llm = engine(backend, num_blocks=13, num_cpu_blocks=40, **options)
    ids = [llm.submit(prompt, pg.SamplingParams(6, ignore_end=True)) for prompt in prompts]
    holder = holder_of(llm)
    work = FailsOnce(getattr(holder, what), MemoryError("invented"), after, at)
    setattr(holder, what, work)
    for _ in range(300):
        if not llm.unfinished and not llm._requests:
            break
        with suppress(MemoryError):
            llm.step()
    checkpoint = random_checkpoint(SMALL, seed=3)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert llm.completion(request_id).tokens.tolist() == dense_greedy(checkpoint, prompt, 6)
    assert llm._requests == llm._answers == {} and llm.manager.seq_ids == []
    llm.manager.check()
    return work.failed


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize(
    ("holder_of", "what"),
    [
        (lambda llm: llm.manager, "publish"),
        (lambda llm: llm.manager, "free"),
        (lambda llm: llm.manager, "allocate"),
        (lambda llm: llm.manager, "append"),
        (lambda llm: llm.manager, "append_batch"),
        (lambda llm: llm.manager, "swap_out"),
        (lambda llm: llm.manager, "swap_in"),
        (lambda llm: llm.manager, "drop"),
        (lambda llm: llm.scheduler, "_finish"),
        (lambda llm: llm.scheduler, "_wait_again"),
        (lambda llm: llm.scheduler, "complete"),
        (lambda llm: llm, "_retire"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_engine_that_is_interrupted_anywhere_answers_as_if_it_had_not_been(
    holder_of, what, preemption, after, backend
):
    reached = [
        answers_with_one_failure(holder_of, what, after, at, {"preemption": preemption}, backend) for at in (0, 2, 5)
    ]
    other_way = {"swap": ("drop",), "recompute": ("swap_out", "swap_in")}[preemption]
    assert any(reached) or what in other_way


def test_a_policy_that_raises_costs_content_and_no_request(backend):
    from cupaged.memory.eviction import LFU

    class Unsure(LFU):
        calls = 0

        def key(self, blocks):
            Unsure.calls += 1
            if Unsure.calls % 2:
                raise RuntimeError("no key")
            return super().key(blocks)

    rng = np.random.default_rng(1)
    prompts = [rng.integers(SMALL.vocab_size, size=n).tolist() for n in (8, 11, 9, 12, 7)]
    llm = engine(backend, num_blocks=13, num_cpu_blocks=40, preemption="swap", eviction=Unsure)
    with pytest.warns(RuntimeWarning, match="the eviction policy raised"):
        answers = llm.generate(prompts, pg.SamplingParams(6, ignore_end=True))
    checkpoint = random_checkpoint(SMALL, seed=3)
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.tokens.tolist() == dense_greedy(checkpoint, prompt, 6)
    llm.manager.check()
