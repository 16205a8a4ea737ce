"""The paged engine says token for token what a dense model says, whatever happens to its blocks on the way."""

import dataclasses
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.decode_step import DecodeStep, shape_class
from cupaged.engine.sequence import Sequence
from cupaged.engine.weights import random_checkpoint
from cupaged.reference import as_numpy
from tests.kit.llama import SMALL, byte_tokenizer, dense_greedy, dense_logits, half_budget
from tests.kit.real_model import smollm2

CHECKPOINT = random_checkpoint(SMALL, seed=3)
BLOCK = 4
GREEDY = pg.SamplingParams(12, ignore_end=True)


@cache
def dense(prompt, num_tokens):
    return dense_greedy(CHECKPOINT, prompt, num_tokens)


def prompts_of(lengths, seed=0, shared=0):
    """Return prompts that begin with the same `shared` tokens."""
    random = np.random.default_rng(seed)
    begin = random.integers(SMALL.vocab_size, size=shared).tolist()
    return [(begin + random.integers(SMALL.vocab_size, size=length).tolist())[: max(length, 1)] for length in lengths]


def small_llm(backend="host", **options):
    options = {"num_blocks": 64, "block_size": BLOCK, "max_batch_tokens": 32, "max_num_seqs": 8, **options}
    return pg.LLM(CHECKPOINT, backend=backend, dtype="float32", **options)


def assert_all_free(llm):
    manager = llm.manager
    assert manager.seq_ids == [] and not llm.unfinished
    assert manager.gpu.num_available == manager.gpu.num_blocks and manager.cpu.num_used == 0
    manager.check()


def assert_dense(completions, prompts, num_tokens=12):
    for completion, prompt in zip(completions, prompts, strict=True):
        assert completion.tokens.tolist() == dense(tuple(prompt), num_tokens)
        assert completion.finish_reason == "length" and len(completion.times) == num_tokens


def test_a_batch_says_what_each_says_alone(backend):
    llm, prompts = small_llm(backend), prompts_of([1, 3, 4, 5, 9, 17, 30, 2, 8, 33])
    assert_dense(llm.generate(prompts, GREEDY), prompts)
    assert_all_free(llm)


@pytest.mark.parametrize("budget", [3, 5, 64])
def test_prompts_in_chunks(backend, budget):
    llm = small_llm(backend, max_batch_tokens=budget, max_num_seqs=3)
    prompts = prompts_of([20, 1, 13, 7])
    assert_dense(llm.generate(prompts, GREEDY), prompts)


def test_prefixes_that_are_found(backend):
    llm, prompts = small_llm(backend), prompts_of([20, 21, 30, 16, 17], shared=16)
    assert_dense(llm.generate(prompts[:1], GREEDY), prompts[:1])
    answers = llm.generate([*prompts, prompts[0]], GREEDY)
    assert_dense(answers, [*prompts, prompts[0]])
    assert [answer.cached_tokens for answer in answers] == [16, 16, 16, 12, 16, 16]
    assert llm.stats()["prefix_hit_rate"] > 0.5
    assert_all_free(llm)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_cache_that_is_too_small_for_all(backend, preemption):
    llm = small_llm(backend, num_blocks=13, num_cpu_blocks=40, preemption=preemption, spare_blocks=0)
    prompts = prompts_of([8, 11, 9, 12, 7])
    answers = llm.generate(prompts, GREEDY)
    assert_dense(answers, prompts)
    stats = llm.stats()
    assert stats["preemptions"] == sum(answer.num_preemptions for answer in answers) > 0
    assert (stats["blocks_swapped_out"] > 0) == (preemption == "swap")
    assert_all_free(llm)


@pytest.mark.parametrize("seed", range(6))
def test_preemption_of_both_kinds_at_random_moments(backend, seed):
    """With swapping, computing again, prefix hits, chunks, offloaded blocks and cancelled requests all at once."""
    random = np.random.default_rng(seed)
    llm = small_llm(
        backend, num_blocks=24, num_cpu_blocks=24, max_batch_tokens=int(random.integers(8, 20)),
        preemption=str(random.choice(["swap", "recompute"])), on_evict=str(random.choice(["drop", "offload"])),
    )  # fmt: skip
    prompts = prompts_of(random.integers(1, 30, 9).tolist(), seed=seed % 2, shared=9)
    kinds, cancelled = set(), []

    def disturb(report):
        running = list(llm.scheduler.running)
        if running and random.random() < 0.4:
            victim = running[random.integers(len(running))]
            swap = bool(random.random() < 0.5 and llm.manager.can_swap_out(victim.seq_id))
            llm.scheduler.preempt(victim, swap=swap)
            kinds.add(swap)
        if not cancelled and random.random() < 0.03 and report.running:
            cancelled.append(report.running[0])
            llm.cancel(report.running[0])

    answers = llm.generate(prompts, GREEDY, callback=disturb)
    assert kinds == {True, False}
    for answer, prompt in zip(answers, prompts, strict=True):
        expected = dense(tuple(prompt), 12)
        if answer.finish_reason == "cancelled":
            assert answer.request_id in cancelled
            expected = expected[: len(answer.tokens)]
        assert answer.tokens.tolist() == expected
    assert_all_free(llm)


def test_the_kernels_say_the_same_on_the_host():
    llm, prompts = small_llm(use_kernels=True), prompts_of([5, 9, 2])
    answers = llm.generate(prompts, pg.SamplingParams(4, ignore_end=True))
    assert [answer.tokens.tolist() for answer in answers] == [dense(tuple(prompt), 12)[:4] for prompt in prompts]


@pytest.mark.parametrize("use_kernels", [False, True])
def test_steps_of_fixed_shape_say_the_same(use_kernels):
    """What a GPU captures, run step by step on the host: classes of shapes, and rows that are left over."""
    llm, prompts = small_llm(use_kernels=use_kernels), prompts_of([5, 9, 2, 30, 8])
    llm._fixed_steps = True
    num_tokens = 3 if use_kernels else 12
    answers = llm.generate(prompts, [pg.SamplingParams(num_tokens - i % 2, ignore_end=True) for i in range(5)])
    for i, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        assert answer.tokens.tolist() == dense(tuple(prompt), 12)[: num_tokens - i % 2]
    assert llm.num_captures > 1
    assert_all_free(llm)


def test_half_precision_goes_through_prefill_and_plans(backend):
    prompts = prompts_of([9, 3])
    llm = pg.LLM(
        CHECKPOINT, backend=backend, dtype="float16", use_kernels=True, num_blocks=16, block_size=BLOCK, graphs=False
    )
    answers = llm.generate(prompts, pg.SamplingParams(3, ignore_end=True))
    for answer, prompt in zip(answers, prompts, strict=True):  # each token is the best, as far as half precision tells
        text = [*prompt, *answer.tokens.tolist()]
        logits = dense_logits(CHECKPOINT, text, dtype=np.float64)[len(prompt) - 1 : -1]
        chosen = logits[np.arange(3), answer.tokens]
        assert (logits.max(axis=1) - chosen <= 2 * half_budget(CHECKPOINT, text, np.float16)).all()


def test_shape_classes():
    assert [shape_class(n, 1)[0] for n in (1, 2, 3, 5, 8, 9, 16, 17, 64)] == [1, 2, 3, 6, 8, 12, 16, 24, 64]
    assert [shape_class(1, n)[1] for n in (1, 8, 9, 100)] == [8, 8, 16, 128]


def test_a_class_that_comes_back_is_not_captured_again():
    llm, prompts = small_llm(), prompts_of([5, 9])
    llm._fixed_steps = True
    llm.generate(prompts, GREEDY)
    captures = llm.num_captures
    llm.generate(prompts, GREEDY)
    assert llm.num_captures == captures > 0


def test_classes_can_be_captured_ahead():
    llm, prompts = small_llm(), prompts_of([5, 9, 7])
    llm.prepare(8, 32)
    assert llm.num_captures == 0  # there are no graphs on the host
    llm._fixed_steps = True
    llm.prepare(8, 32)
    assert llm.num_captures == len({1, 2, 3, 4, 6, 8})
    assert_dense(llm.generate(prompts, GREEDY), prompts)
    assert llm.num_captures == 6
    before = [contents.copy() for cache in llm.caches for contents in cache.storage]
    llm.prepare(8, 32)
    after = [contents for cache in llm.caches for contents in cache.storage]
    for old, new in zip(before, after, strict=True):  # nothing is written
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
def test_steps_that_cannot_be_captured_are_launched(error, monkeypatch):
    refused = []

    def refuse(step):
        refused.append(step)
        raise error("this is not recorded")

    monkeypatch.setattr(DecodeStep, "_capture", refuse)
    llm, prompts = small_llm(), prompts_of([5, 9])
    llm._fixed_steps = llm.model.captures = True
    with pytest.warns(UserWarning, match="launched, not replayed from a graph: this is not recorded"):
        assert_dense(llm.generate(prompts, GREEDY), prompts)
        assert_dense(llm.generate(prompts[:1], GREEDY), prompts[:1])
    assert len(refused) == 1 < len(llm._decode_steps)  # another class is not tried


@pytest.mark.gpu
def test_a_captured_step_is_replayed_and_captured_anew_for_another_class():
    llm, prompts = small_llm("cuda"), prompts_of([5, 9, 2, 30, 8])
    lengths = [12, 4, 9, 12, 6]
    answers = llm.generate(prompts, [pg.SamplingParams(length, ignore_end=True) for length in lengths])
    for answer, prompt, length in zip(answers, prompts, lengths, strict=True):
        assert answer.tokens.tolist() == dense(tuple(prompt), 12)[:length]
    steps = list(llm._decode_steps.values())
    assert len(steps) == llm.num_captures > 1 and all(step.graph is not None for step in steps)
    eager = small_llm("cuda", graphs=False)
    params = pg.SamplingParams(12, temperature=0.9, top_k=20, top_p=0.95, seed=5, ignore_end=True)
    assert [a.tokens.tolist() for a in llm.generate(prompts, params)] == [
        a.tokens.tolist() for a in eager.generate(prompts, params)
    ]
    assert eager.num_captures == 0


@pytest.mark.gpu
def test_what_a_graph_writes_is_its_own():
    """Arrays made after a capture must not lie where its replay writes."""
    llm, prompts = small_llm("cuda"), prompts_of([5])
    xp = llm.model.xp
    llm.generate(prompts, GREEDY)
    with llm._stream:
        others = [xp.full(n, 7.0, np.float32) for n in (97, 1000, 64 * 97, 4096, 100_000)]
    llm.generate(prompts, GREEDY)
    assert all(bool((other == 7.0).all()) for other in others)


def test_drawing_depends_on_the_seed_and_not_on_the_batch(backend):
    prompts = prompts_of([5, 9, 2, 6])
    params = [pg.SamplingParams(8, 1.0, top_k=20, top_p=0.9, seed=seed, ignore_end=True) for seed in (1, 2, 3, 1)]
    together = small_llm(backend).generate(prompts, params)
    alone = [small_llm(backend).generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert [a.tokens.tolist() for a in together] == [a.tokens.tolist() for a in alone]
    other = small_llm(backend).generate(prompts[:1], pg.SamplingParams(8, 1.0, seed=9, ignore_end=True))
    assert other[0].tokens.tolist() != together[0].tokens.tolist()


def test_a_report_shows_the_blocks_after_each_step():
    llm, prompts = small_llm(num_blocks=16, num_cpu_blocks=8), prompts_of([6, 3])
    reports = []
    answers = llm.generate(prompts, pg.SamplingParams(3, ignore_end=True), callback=reports.append)
    first, last = reports[0], reports[-1]
    a, b = (answer.request_id for answer in answers)
    assert first.work == ((a, 0, 6), (b, 0, 3)) and first.running == (a, b) and first.index == 0
    assert first.new_tokens == {a: answers[0].tokens[0], b: answers[1].tokens[0]}
    assert first.tokens_stored == {a: 6, b: 3}
    np.testing.assert_array_equal(np.flatnonzero(first.block_map == a), np.sort(first.block_tables[a]))
    assert [len(first.block_tables[seq_id]) for seq_id in (a, b)] == [2, 1]
    assert [len(report.block_tables.get(b, ())) for report in reports] == [1, 1, 0]
    assert last.finished == (a, b) and last.running == () and (last.block_map < 0).all()
    assert (last.block_map == -2).sum() == 3  # full blocks stay to be found again
    assert [report.index for report in reports] == [0, 1, 2] and all(report.seconds > 0 for report in reports)


def test_a_request_can_be_cancelled_from_the_callback():
    llm, prompts = small_llm(), prompts_of([6, 3])

    def cancel(report):
        if report.index == 4:
            llm.cancel(report.running[0])

    first, second = llm.generate(prompts, GREEDY, callback=cancel)
    assert first.finish_reason == "cancelled" and first.tokens.tolist() == dense(tuple(prompts[0]), 12)[:5]
    assert_dense([second], prompts[1:])
    assert_all_free(llm)


def test_an_error_in_the_middle_leaves_no_block(monkeypatch):
    llm, prompts = small_llm(), prompts_of([6, 3])

    def fail(report):
        if report.index == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        llm.generate(prompts, GREEDY, callback=fail)
    assert_all_free(llm)
    monkeypatch.setattr(llm.model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(prompts, GREEDY)
    assert_all_free(llm)
    monkeypatch.undo()
    assert_dense(llm.generate(prompts, GREEDY), prompts)


def assert_nothing_kept(llm):
    assert llm._answers == {} and llm._requests == {}
    assert_all_free(llm)


def failing_once(error, call):
    """Return a call that raises `error` the first time, and does what it should from then on."""
    errors = [error]

    def fail(*arguments, **named):
        if errors:
            raise errors.pop()
        return call(*arguments, **named)

    return fail


def test_no_answer_is_kept_that_nobody_can_ask_for():
    llm, prompts = small_llm(), prompts_of([6, 3])
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            llm.generate(prompts, GREEDY, callback=lambda report: 1 / 0)
        assert not hasattr(caught.value, "__notes__")
    assert_nothing_kept(llm)
    with pytest.raises(KeyError, match="request_id must name"):  # one answer was taken away: the others go too
        llm.generate(prompts, GREEDY, callback=lambda report: [llm.completion(each) for each in report.finished])
    assert_nothing_kept(llm)


@pytest.mark.parametrize("error", [OSError("in the way"), KeyboardInterrupt("in the way")])
@pytest.mark.parametrize("place", ["_retire", "scheduler.cancel", "manager.free"])
def test_each_request_is_ended_whatever_happens_to_the_one_before(monkeypatch, error, place):
    llm, prompts = small_llm(), prompts_of([6, 3, 5])
    owner, name = (llm, place) if "." not in place else (getattr(llm, place.split(".")[0]), place.split(".")[1])

    def fail(report):
        if report.index == 2:
            monkeypatch.setattr(owner, name, failing_once(error, getattr(owner, name)))
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        llm.generate(prompts, GREEDY, callback=fail)
    assert "in the way" in caught.value.__notes__[0]
    assert_nothing_kept(llm)
    assert_dense(llm.generate(prompts, GREEDY), prompts)


def test_a_request_that_cannot_be_ended_does_not_run_on(monkeypatch):
    llm, prompts = small_llm(), prompts_of([6, 3])

    def refuse(seq_id, **_):
        raise OSError("never")

    def fail(report):
        monkeypatch.setattr(llm.manager, "free", refuse)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        llm.generate(prompts, GREEDY, callback=fail)
    assert len(caught.value.__notes__) == 4 and not llm.unfinished
    assert llm._answers == {} and llm._requests == {}


def test_a_stream_that_is_left_keeps_nothing(monkeypatch):
    for package in ("tokenizers", "jinja2"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    weights = random_checkpoint(dataclasses.replace(SMALL, vocab_size=261), seed=3)
    llm = pg.LLM(dataclasses.replace(weights, metadata=byte_tokenizer()), backend="host", num_blocks=16)
    params = pg.SamplingParams(20, ignore_end=True)
    pieces = llm.stream("abc", params)
    next(pieces)
    pieces.close()
    assert_nothing_kept(llm)
    pieces = llm.stream("abc", params)
    next(pieces)
    monkeypatch.setattr(llm.manager, "free", failing_once(OSError("in the way"), llm.manager.free))
    with pytest.raises(OSError, match="in the way"):
        pieces.close()
    assert_nothing_kept(llm)
    monkeypatch.setattr(llm.model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(llm.stream("abc", params))
    assert_nothing_kept(llm)


BROKEN = 5  # a token whose logits nothing can be chosen from


def broken_llm(monkeypatch, value, backend="host", everywhere=False, **options):
    """Return an LLM whose logits after the token `BROKEN`, one of them or all, are `value`."""
    llm = small_llm(backend, **options)
    forward = llm.model.forward

    def broken(step, *arguments, **named):
        logits, tokens = forward(step, *arguments, **named), as_numpy(step.tokens)
        rows = np.flatnonzero((tokens if step.wanted is None else tokens[as_numpy(step.wanted)]) == BROKEN)
        for row in rows.tolist():
            logits[row, slice(None) if everywhere else 7] = value
        return logits

    monkeypatch.setattr(llm.model, "forward", broken)
    return llm


def with_embedding(value):
    """Return the model with an embedding of `BROKEN` that is `value`: keys and values become NaN too."""
    embedding = CHECKPOINT.embedding.copy()
    embedding[BROKEN] = value
    return dataclasses.replace(CHECKPOINT, embedding=embedding, unembedding=CHECKPOINT.embedding)


@cache
def sound_prompts(*lengths):
    """Return four prompts of some lengths neither in which nor in whose greedy answers `BROKEN` is."""
    every = (prompts_of([length], seed=seed)[0] for seed in range(99) for length in lengths)
    sound = (prompt for prompt in every if BROKEN not in [*prompt, *dense(tuple(prompt), 12)])
    return [next(sound) for _ in range(4)]


def assert_failed(completion, num_tokens=0):
    assert completion.finish_reason == "error" and len(completion.tokens) == num_tokens == len(completion.times)
    assert completion.error.endswith(
        f"its first {len(completion.prompt) + num_tokens} tokens hold NaN or have no finite largest entry: "
        "no token can be chosen"
    )


MINUS_NAN = np.copysign(np.nan, -1)
NO_CHOICE = [(np.nan, False), (MINUS_NAN, False), (np.inf, False), (np.nan, True), (MINUS_NAN, True), (-np.inf, True)]


@pytest.mark.parametrize(("value", "everywhere"), NO_CHOICE)
@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_nothing_can_be_chosen_from_end_their_request_alone(
    monkeypatch, value, everywhere, use_kernels, temperature
):
    num_tokens = 2 if use_kernels else 12
    params = pg.SamplingParams(num_tokens, temperature, top_k=4, top_p=0.9, seed=1, ignore_end=True)
    prompts = sound_prompts(5, 9, 2)
    expected = small_llm(use_kernels=use_kernels).generate(prompts, params)
    assert all(BROKEN not in answer.tokens for answer in expected)
    llm = broken_llm(monkeypatch, value, everywhere=everywhere, use_kernels=use_kernels)
    reports = []
    with pytest.warns(RuntimeWarning, match=r"2 of 6 requests ended in an error; prompts\[1\]: the logits after its"):
        answers = llm.generate([prompts[0], [3, BROKEN], *prompts[1:], [BROKEN]], params, callback=reports.append)
    assert [answer.tokens.tolist() for answer in answers if not answer.error] == [
        answer.tokens.tolist() for answer in expected
    ]
    for failed in (answers[1], answers[5]):
        assert_failed(failed)
    assert reports[0].failed == reports[0].finished == (answers[1].request_id, answers[5].request_id)
    assert not set(reports[0].failed) & set(reports[0].new_tokens)
    assert all(not report.failed for report in reports[1:])
    assert llm.stats()["tokens_generated"] == 4 * num_tokens
    assert_all_free(llm)


def test_steps_of_fixed_shape_end_a_request_alone(monkeypatch):
    prompts = sound_prompts(5, 9)
    llm = broken_llm(monkeypatch, np.nan, num_blocks=80)
    llm._fixed_steps = True
    ids = [llm.submit(prompt, GREEDY) for prompt in prompts]
    llm.step()
    fork = llm.fork(ids[0], BROKEN)
    while llm.unfinished:
        llm.step()
    assert llm.num_captures > 1
    assert_dense([llm.completion(seq_id) for seq_id in ids], prompts)
    assert_failed(llm.completion(fork), 1)
    assert_all_free(llm)


@pytest.mark.parametrize("value", [np.nan, MINUS_NAN, np.inf])
def test_keys_and_values_that_are_nan_stay_with_their_request(backend, value):
    """The pool is so small that blocks which held NaN are used again by the others."""
    prompts = sound_prompts(5, 9, 2)
    llm = pg.LLM(with_embedding(value), backend=backend, dtype="float32", num_blocks=24, block_size=BLOCK)
    expected = pg.LLM(with_embedding(0), backend=backend, dtype="float32", block_size=BLOCK).generate(prompts, GREEDY)
    broken = [[1, 2, BROKEN, 3, 4, 6, 7, 8, 9], [BROKEN], [*range(6, 14), BROKEN]]
    for _ in range(3):
        with pytest.warns(RuntimeWarning, match="3 of 7 requests ended in an error"):
            answers = llm.generate([*broken, *prompts], GREEDY)
        assert [a.tokens.tolist() for a in answers[3:]] == [a.tokens.tolist() for a in expected]
        for failed in answers[:3]:
            assert_failed(failed)
    assert_all_free(llm)


@pytest.mark.parametrize("at", [2, 9, 21])
def test_no_block_that_holds_nan_is_found_by_others(backend, at):
    """A prompt in chunks: a block is found by others before the first token of the answer is chosen."""
    llm = pg.LLM(
        with_embedding(np.nan), backend=backend, dtype="float32", num_blocks=64, block_size=BLOCK, max_batch_tokens=8,
        max_num_seqs=8,
    )  # fmt: skip
    sound = [token for token in prompts_of([60])[0] if token != BROKEN][:30]
    prompt = [*sound[:at], BROKEN, *sound[at:]]
    first = llm.submit(prompt, GREEDY)
    while llm.unfinished:
        llm.step()
        assert llm.manager.gpu.cache.named.sum() <= at // BLOCK
    failed = llm.completion(first)
    assert failed.finish_reason == "error" and len(failed.tokens) == 0
    assert f"after its first {8 * (at // 8 + 1)} tokens" in failed.error
    assert llm.manager.gpu.num_free == 64 and len(llm.manager.gpu.cache) == 0
    (same,) = llm.generate([sound], GREEDY)
    plain = pg.LLM(with_embedding(0), backend=backend, dtype="float32", block_size=BLOCK).generate([sound], GREEDY)
    assert same.tokens.tolist() == plain[0].tokens.tolist() and same.cached_tokens == 0
    assert_all_free(llm)


@pytest.mark.parametrize("offload", [False, True])
def test_a_prefix_that_went_bad_is_computed_again_after_one_error(backend, offload):
    """Whose block holds NaN cannot be told: none of the request's text is found again, in either pool."""
    llm = small_llm(backend, num_blocks=8, num_cpu_blocks=8 * offload, on_evict="offload" if offload else "drop")
    (prompt,), (other,) = prompts_of([14]), prompts_of([24], seed=1)
    assert_dense(llm.generate([prompt], GREEDY), [prompt])
    for layer in llm.caches:
        for array in layer.storage:
            array[...] = np.nan  # what happened to it is not known
    if offload:
        llm.manager.evict(8)
        llm.generate([other], GREEDY)  # blocks go to the CPU pool and back
    with pytest.warns(RuntimeWarning, match="1 of 1 requests ended in an error"):
        (failed,) = llm.generate([prompt], GREEDY)
    assert failed.cached_tokens == 12 and failed.finish_reason == "error"
    (again,) = llm.generate([prompt], GREEDY)
    assert again.cached_tokens == 0
    assert_dense([again], [prompt])
    assert_all_free(llm)


def test_a_stream_that_cannot_go_on_says_so():
    for package in ("tokenizers", "jinja2"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    sound = random_checkpoint(dataclasses.replace(SMALL, vocab_size=261), seed=3)
    embedding = sound.embedding.copy()
    embedding[ord("b")] = np.nan
    checkpoint = dataclasses.replace(sound, embedding=embedding, metadata=byte_tokenizer())
    llm = pg.LLM(checkpoint, backend="host", num_blocks=16, block_size=BLOCK)
    with pytest.raises(pg.InvalidLogitsError, match="the logits after its first 3 tokens hold NaN or have no finite"):
        list(llm.stream("abc", GREEDY))
    assert_all_free(llm)
    (answer,) = llm.generate(["ac"], pg.SamplingParams(1, ignore_end=True))
    assert "".join(llm.stream("ac", pg.SamplingParams(1, ignore_end=True))) == answer.text != ""
    assert_all_free(llm)


def test_who_shares_blocks_with_a_request_that_failed_goes_on(monkeypatch):
    (prompt,) = sound_prompts(9)[:1]
    llm = broken_llm(monkeypatch, np.nan)
    parent = llm.submit(prompt, GREEDY)
    llm.step()
    twin, broken = llm.fork(parent), llm.fork(parent, BROKEN)
    llm.step()
    assert_failed(llm.completion(broken), 1)
    while llm.unfinished:
        llm.step()
    assert_dense([llm.completion(parent), llm.completion(twin)], [prompt] * 2)
    (again,) = llm.generate([prompt], GREEDY)
    assert_dense([again], [prompt])
    assert_all_free(llm)


def test_a_preempted_request_can_fail_when_it_is_computed_again(monkeypatch):
    llm, prompts = small_llm(num_blocks=64), sound_prompts(9, 5)
    ids = [llm.submit(prompt, GREEDY) for prompt in prompts[:2]]
    llm.step()
    llm.scheduler.preempt(llm._requests[ids[0]], swap=False)
    sound = llm.model.forward

    def broken(step, *arguments, **named):
        logits = sound(step, *arguments, **named)
        logits[-1] = np.nan  # the one that is computed again is the last
        return logits

    monkeypatch.setattr(llm.model, "forward", broken)
    llm.step()
    monkeypatch.setattr(llm.model, "forward", sound)
    while llm.unfinished:
        llm.step()
    assert_failed(llm.completion(ids[0]), 1)
    assert_dense([llm.completion(ids[1])], prompts[1:2])
    assert_all_free(llm)


def test_requests_step_by_step():
    llm, prompts = small_llm(), prompts_of([6, 3])
    first = llm.submit(prompts[0], GREEDY)
    llm.step()
    second = llm.submit(prompts[1], GREEDY, priority=1)
    with pytest.raises(KeyError, match="request_id must name a request that has ended"):
        llm.completion(first)
    while llm.unfinished:
        llm.step()
    assert_dense([llm.completion(first), llm.completion(second)], prompts)
    with pytest.raises(KeyError):
        llm.completion(first)
    llm.cancel(first)  # has ended long since


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def dense_beams(prompt, width, num_tokens):
    """Return the texts of a beam search, the best first."""
    beams = [(0.0, [])]
    for _ in range(num_tokens):
        longer = [
            (score + gain, [*text, token])
            for score, text in beams
            for token, gain in enumerate(log_softmax(dense_logits(CHECKPOINT, [*prompt, *text])[-1]))
        ]
        beams = sorted(longer, reverse=True)[:width]
    return [text for _, text in beams]


@pytest.mark.parametrize("preempting", [False, True])
def test_beam_search_by_forks_copies_on_write(backend, preempting):
    (prompt,), width, num_tokens = prompts_of([6]), 3, 8
    llm = small_llm(backend, num_cpu_blocks=64)
    scores = {llm.submit(prompt, pg.SamplingParams(50, ignore_end=True)): 0.0}
    for _ in range(num_tokens):
        report = llm.step(report=True, logits=True)
        assert set(report.logits) == set(report.new_tokens) == set(scores)
        longer = [
            (scores[seq_id] + gain, seq_id, token)
            for seq_id, row in report.logits.items()
            for token, gain in enumerate(log_softmax(row))
        ]
        best = sorted(longer, reverse=True)[:width]
        forks = {llm.fork(seq_id, token): score for score, seq_id, token in best}
        for seq_id in scores:
            llm.cancel(seq_id)
        scores = forks
        if preempting:
            for request in list(llm.scheduler.running):
                llm.scheduler.preempt(request, swap=request.seq_id % 2 == 0)
    found = []
    for seq_id in sorted(scores, key=scores.get, reverse=True):
        llm.cancel(seq_id)
        found.append(llm.completion(seq_id).tokens.tolist())
    assert found == dense_beams(prompt, width, num_tokens)
    assert llm.stats()["copies"] > 0 or preempting
    assert_all_free(llm)


SAMPLED = pg.SamplingParams(12, 1.0, seed=5, ignore_end=True)


def forked(llm, params, seeds=(None, None), token=None, grandchild=False):
    """Return what a request and its forks, made after its first token, answer."""
    ids = [llm.submit(prompts_of([6])[0], params)]
    llm.step()
    ids += [llm.fork(ids[0], token, seed=seed) for seed in seeds]
    if grandchild:
        ids.append(llm.fork(ids[1]))
    while llm.unfinished:
        llm.step()
    return [llm.completion(seq_id).tokens.tolist() for seq_id in ids]


def test_sampled_forks_differ_and_are_repeatable(backend):
    answers = forked(small_llm(backend), SAMPLED, [None] * 3, grandchild=True)
    assert len({answer[0] for answer in answers}) == 1
    assert len({tuple(answer[1:]) for answer in answers}) == 5
    used = small_llm(backend)  # in which names of requests and the contents of the cache are others
    used.generate(prompts_of([6, 9]), GREEDY)
    assert forked(used, SAMPLED, [None] * 3, grandchild=True) == answers
    assert answers[0] == small_llm(backend).generate(prompts_of([6]), SAMPLED)[0].tokens.tolist()
    assert_all_free(used)


def test_forks_of_different_seeds_differ():
    first = forked(small_llm(), SAMPLED)
    second = forked(small_llm(), dataclasses.replace(SAMPLED, seed=6))
    assert all(a[1:] != b[1:] for a in first for b in second)


def test_a_fork_draws_by_the_seed_that_it_is_given():
    parent, same, other, huge = forked(small_llm(), SAMPLED, [5, np.int64(-7), 2**64 - 7])
    assert same == parent
    assert other[1:] != parent[1:] and huge == other  # modulo 2**64
    (again,) = small_llm().generate([[*prompts_of([6])[0], parent[0]]], dataclasses.replace(SAMPLED, seed=-7))
    assert other[1:] == again.tokens.tolist()[: len(other) - 1]


def test_greedy_forks_say_what_their_parent_says():
    for answer in forked(small_llm(), GREEDY, [None, 3]):
        assert answer == dense(tuple(prompts_of([6])[0]), 12)


def test_a_sampled_fork_can_begin_with_another_token():
    parent, *forks = forked(small_llm(), SAMPLED, token=41)
    assert parent[0] != 41 and {answer[0] for answer in forks} == {41}
    assert forks[0][1:] != forks[1][1:]


def test_forks_are_checked():
    llm = small_llm(max_num_seqs=2, max_batch_tokens=4)
    first = llm.submit(prompts_of([6])[0], GREEDY)
    with pytest.raises(ValueError, match="parent must be running, between two tokens of its answer; 0 is not"):
        llm.fork(first)
    llm.step()  # a part of the prompt
    with pytest.raises(ValueError, match="parent must be running"):
        llm.fork(first)
    llm.step()
    with pytest.raises(ValueError, match="token must be a token id from 0 to 96; got 97"):
        llm.fork(first, 97)
    for token in (1.5, "1", True):
        with pytest.raises(TypeError, match="token must be an integer"):
            llm.fork(first, token)
    with pytest.raises(TypeError, match="seed must be an integer; got float 1.5"):
        llm.fork(first, seed=1.5)
    second = llm.fork(first)
    with pytest.raises(ValueError, match="fewer than 2 that run"):
        llm.fork(first)
    while llm.unfinished:
        llm.step()
    answers = [llm.completion(seq_id) for seq_id in (first, second)]
    assert_dense(answers, prompts_of([6]) * 2)
    with pytest.raises(KeyError, match="request_id must name a request that has not ended"):
        llm.fork(first)
    assert_all_free(llm)


def test_generation_ends_where_the_cache_ends():
    llm, prompts = small_llm(num_blocks=3), prompts_of([9, 12])
    first, second = llm.generate(prompts, GREEDY)
    assert (len(first.tokens), first.finish_reason) == (3, "length")
    assert (len(second.tokens), second.finish_reason) == (1, "length")
    assert_all_free(llm)


def test_generation_ends_with_the_models_context():
    llm = small_llm(num_blocks=200)
    (answer,) = llm.generate([[1] * 509], pg.SamplingParams(50, ignore_end=True))
    assert len(answer.tokens) == SMALL.max_tokens - 509


class BadArray:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a story", TypeError, "prompts must be a list of texts or of lists of token ids; got str"),
        ([[1], []], ValueError, r"prompts\[1\] must hold at least one token; got none"),
        ([[1], [5, 97]], ValueError, r"prompts\[1\] must hold token ids from 0 to 96; token 1 is 97"),
        ([[-1]], ValueError, "token 0 is -1"),
        ([[1.5]], TypeError, r"prompts\[0\] must be integers, token ids; got float64"),
        ([[[1]]], ValueError, r"prompts\[0\] must be a text or a vector of token ids; got shape \[1, 1\]"),
        ([[1] * 257], ValueError, r"prompts\[0\] must have at most 256 tokens, what the cache holds; got 257"),
        ([[1] * 513], ValueError, r"at most 512 tokens, what the model's context holds; got 513"),
        (["text"], TypeError, r"prompts\[0\] must be token ids, as this model has no tokenizer; got str"),
        (b"story", TypeError, "prompts must be a list of texts or of lists of token ids; got bytes"),
        ([[1], 5], TypeError, r"prompts\[1\] must be a text or a vector of token ids; got int"),
        ([[1], None], TypeError, r"prompts\[1\] must be a text or a vector of token ids; got NoneType"),
        ([[1], b"ab"], TypeError, r"prompts\[1\] must be a text or a vector of token ids; got bytes"),
        ([[1], {1: 2}], TypeError, r"prompts\[1\] must be a text or a vector of token ids; got dict"),
        ([[1], [[1], [2, 3]]], ValueError, r"prompts\[1\] must be a text or a vector of token ids; .*inhomogeneous"),
        ([[1], [2**70]], TypeError, r"prompts\[1\] must be integers, token ids; got object"),
        ([[1], np.array([2**63], np.uint64)], ValueError, r"prompts\[1\] must hold .*; token 0 is 9223372036854775808"),
        ([[1], [True]], TypeError, r"prompts\[1\] must be integers, token ids; got bool"),
        ([[1], np.ma.array([1, 2], mask=[0, 1])], TypeError, r"prompts\[1\] must be an array without a mask"),
        ([[1], np.array([1, 2], "m8[s]")], TypeError, r"prompts\[1\] must be integers, token ids; got timedelta64"),
        ([[1], [np.timedelta64(1, "ns")]], TypeError, r"prompts\[1\] must be integers, token ids; got timedelta64"),
        ([[1], BadArray()], ValueError, r"prompts\[1\] must be a text or a vector of token ids; RuntimeError\('no'\)"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_answered(prompts, error, message):
    llm = small_llm()
    with pytest.raises(error, match=message):
        llm.generate(prompts)
    assert not llm.unfinished
    assert_all_free(llm)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"temperature": -1}, ValueError, "temperature must be finite and at least 0; got -1"),
        ({"temperature": "hot"}, TypeError, "temperature must be a real number; got str 'hot'"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1; got 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer; got float 1.5"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite and at least 0; got nan"),
        ({"temperature": np.longdouble(np.inf)}, ValueError, "temperature must be finite and at least 0"),
        ({"temperature": -1e-50}, ValueError, "temperature must be finite and at least 0; got -1e-50"),
        ({"temperature": -(10**400)}, ValueError, "temperature must be finite and at least 0; got -1000"),
        ({"top_p": Fraction(10**30 + 1, 10**30)}, ValueError, "top_p must be above 0 and at most 1"),
        ({"top_p": True}, TypeError, "top_p must be a real number; got bool True"),
        ({"max_tokens": np.timedelta64(5)}, TypeError, "max_tokens must be an integer, got timedelta64"),
        ({"top_k": np.timedelta64(5)}, TypeError, "top_k must be an integer, got timedelta64"),
        ({"seed": np.timedelta64(5)}, TypeError, "seed must be an integer; got timedelta64"),
        ({"temperature": np.timedelta64(1)}, TypeError, "temperature must be a real number; got timedelta64"),
        ({"top_p": np.timedelta64(1)}, TypeError, "top_p must be a real number; got timedelta64"),
        ({"ignore_end": "no"}, TypeError, "ignore_end must be a bool; got str 'no'"),
    ],
)
def test_sampling_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        pg.SamplingParams(**options)


@pytest.mark.parametrize("use_kernels", [False, True])
def test_numbers_beyond_float32_mean_what_they_say(use_kernels):
    """Were they rounded to float32, 1e300 would be infinite and 1e-50 would be 0."""
    llm, (prompt,) = small_llm(use_kernels=use_kernels), prompts_of([5])
    first = dense((*prompt,), 12)[:4]
    for options in (
        {"temperature": 1e-50}, {"temperature": Fraction(1, 10**400)}, {"temperature": 1.0, "top_p": 1e-50},
        {"temperature": 1.0, "top_p": Fraction(1, 10**400)}, {"temperature": 1e300, "top_k": 1},
        {"temperature": np.float32(1), "top_p": np.float16(6e-8)}, {"temperature": 1e-40, "top_k": 10**400},
    ):  # fmt: skip
        (answer,) = llm.generate([prompt], pg.SamplingParams(4, seed=3, ignore_end=True, **options))
        assert answer.tokens.tolist() == first, options
    for temperature in (1e300, 10**400, np.float64(1e300)):
        params = pg.SamplingParams(4, temperature, seed=3, ignore_end=True)
        (hot,) = llm.generate([prompt], params)
        (flat,) = llm.generate([prompt], pg.SamplingParams(4, 1e30, seed=3, ignore_end=True))
        assert hot.tokens.tolist() == flat.tokens.tolist() != first


def test_numbers_of_numpy_are_taken_as_numbers():
    llm, (prompt,) = small_llm(), prompts_of([5])
    plain = pg.SamplingParams(4, 0.75, 20, 0.5, seed=-3, ignore_end=True)
    numpy = pg.SamplingParams(
        np.uint8(4), np.float32(0.75), np.int16(20), np.float16(0.5), seed=np.int64(-3), ignore_end=np.bool_(True)
    )
    assert numpy == plain and hash(numpy) == hash(plain)
    first, second = llm.generate([prompt] * 2, [plain, numpy])
    assert first.tokens.tolist() == second.tokens.tolist()
    for seed in (2**64 - 3, 10**400 * 2**64 - 3, np.uint64(2**64 - 3)):
        (same,) = llm.generate([prompt], dataclasses.replace(plain, seed=seed))
        assert same.tokens.tolist() == first.tokens.tolist()


REFUSED = [
    ({"priority": 2**31}, ValueError, "must fit in int32, got 2147483648"),
    ({"priority": 10**400}, ValueError, "must fit in int32, got 1000"),
    ({"priority": -(2**31) - 1}, ValueError, "must be at least -2147483648, got -2147483649"),
    ({"priority": 1.0}, TypeError, "must be an integer, got float"),
    ({"priority": True}, TypeError, "must be an integer, got bool"),
    ({"priority": None}, TypeError, "must be an integer, got NoneType"),
    ({"priority": "1"}, TypeError, "must be an integer, got str"),
    ({"params": {}}, TypeError, "params must be SamplingParams; got dict"),
    ({"params": 0}, TypeError, "params must be SamplingParams; got int"),
    ({"params": {"seed": 1}}, TypeError, "params must be SamplingParams; got dict"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_all_of_a_request_is_checked_before_it_waits(options, error, message):
    llm, prompts = small_llm(), prompts_of([5, 3])
    with pytest.raises(error, match=message):
        llm.submit(prompts[0], **options)
    params, priority = ([value] for value in (options.get("params", GREEDY), options.get("priority", 0)))
    with pytest.raises(error, match=message):
        llm.generate(prompts, [GREEDY, *params], priorities=[0, *priority])
    if "priority" in options:
        with pytest.raises(error, match=r"priorities\[1\]"):
            llm.generate(prompts, GREEDY, priorities=[0, *priority])
        with pytest.raises(error, match=message):
            Sequence(0, np.array(prompts[0], np.int32), GREEDY, *priority)
    assert not llm.unfinished and not llm.scheduler.waiting
    assert_dense(llm.generate(prompts, GREEDY), prompts)  # what was refused does not stop others
    assert_all_free(llm)


def test_all_that_is_in_range_is_served():
    llm, prompts = small_llm(num_blocks=6), prompts_of([5, 3, 6, 4])
    params = pg.SamplingParams(10**30, seed=10**400, top_k=2**63, ignore_end=False)
    ids = [
        llm.submit(prompt, params, priority=priority)
        for prompt, priority in zip(prompts, (2**31 - 1, -(2**31), np.int64(7), np.uint8(255)), strict=True)
    ]
    while llm.unfinished:
        llm.step()
    for seq_id, prompt in zip(ids, prompts, strict=True):
        answer = llm.completion(seq_id)
        assert len(answer.tokens) == 6 * BLOCK - len(prompt)  # to the end of the cache
        assert answer.tokens[:12].tolist() == dense(tuple(prompt), 12)


@pytest.mark.parametrize(
    "priorities",
    ["12", b"12", bytearray(b"12"), memoryview(b"12"), {0: 1, 1: 2}, {0: 1, 1: 2}.keys(), {1, 2}, frozenset({1, 2}),
     np.array(5), 5],
)  # fmt: skip
def test_priorities_are_a_list(priorities):
    llm = small_llm()
    with pytest.raises(TypeError, match="priorities must be a list with one entry for each prompt; got"):
        llm.generate([[1], [2]], priorities=priorities)
    assert_all_free(llm)


@pytest.mark.parametrize("flag", ["no", "x", 3, 1, [], 0.0])
def test_flags_are_true_or_false(flag):
    llm = small_llm()
    for call in (lambda: llm.generate([[1]], chat=flag), lambda: llm.submit([1], chat=flag)):
        with pytest.raises(TypeError, match="^chat must be True or False; got"):
            call()
    for name in ("prefix_caching", "use_kernels", "graphs"):
        with pytest.raises(TypeError, match=f"^{name} must be True or False; got"):
            small_llm(**{name: flag})
    assert_nothing_kept(llm)


def test_flags_of_numpy_are_flags():
    llm = small_llm(prefix_caching=np.False_, use_kernels=np.False_, graphs=np.True_)
    (prompt,) = prompts_of([9])
    first, second = llm.generate([prompt], GREEDY, chat=np.False_) + llm.generate([prompt], GREEDY)
    assert_dense([first, second], [prompt] * 2)
    assert second.cached_tokens == 0


@pytest.mark.parametrize("given", [[], ["lru"], {}, ([],), None, 3])
def test_names_of_policies_are_texts(given):
    with pytest.raises(ValueError, match='^preemption must be "recompute", "swap" or a CostModel; got'):
        small_llm(preemption=given)
    with pytest.raises(ValueError, match="^eviction must be one of lru, fifo, .* or a callable, got"):
        small_llm(eviction=given)


@pytest.mark.parametrize("request_id", [[1], {}, ([1],), np.array([1])])
def test_what_cannot_name_a_request_is_refused(request_id):
    llm = small_llm()
    for call in (llm.cancel, llm.fork, llm.completion):
        with pytest.raises(TypeError, match="^request_id must be an integer; got"):
            call(request_id)


def test_arguments_are_checked():
    llm = small_llm()
    with pytest.raises(TypeError, match="callback must be callable; got int"):
        llm.generate([[1]], callback=5)
    with pytest.raises(ValueError, match="priorities must have one entry for each of the 2 prompts; got 1"):
        llm.generate([[1], [2]], priorities=[1])
    with pytest.raises(ValueError, match="params must have one entry for each of the 2 prompts; got 1"):
        llm.generate([[1], [2]], [GREEDY])
    with pytest.raises(TypeError, match="params must be SamplingParams; got int"):
        llm.generate([[1]], [5])
    with pytest.raises(TypeError, match="stream needs a model with a tokenizer"):
        next(llm.stream([1]))
    assert_all_free(llm)
    with pytest.raises(FileNotFoundError, match=r"there is none at nowhere\.gguf"):
        pg.LLM("nowhere.gguf")


def test_the_real_model_speaks_through_the_cache():
    checkpoint, tokenizer = smollm2()
    llm = pg.LLM(checkpoint, backend="host", num_blocks=24, max_batch_tokens=16, max_num_seqs=4)
    prompts = ["The capital of France is", "Water boils at"]
    answers = llm.generate(prompts, pg.SamplingParams(5, ignore_end=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens.tolist() == dense_greedy(checkpoint, tokenizer.encode(prompt), 5)
        assert answer.text == tokenizer.decode(answer.tokens)
    text = "".join(llm.stream("Say hello.", pg.SamplingParams(6), chat=True))
    (again,) = llm.generate(["Say hello."], pg.SamplingParams(6), chat=True)
    assert text == again.text and len(text) > 5 and again.cached_tokens >= 16
    assert_all_free(llm)


VERBS = ("Explain", "Write a poem about", "List facts on", "Why study", "Describe")
TOPICS = ("the sea", "numbers", "a cat", "the moon", "bread", "trains", "music", "winter", "light", "glass")
PROMPTS = [f"{verb} {topic}" for verb in VERBS for topic in TOPICS]


@pytest.mark.slow
def test_fifty_prompts_of_the_real_model(backend, xp):
    """64 tokens each, and on the way prefix hits, chunks, and preemption of both kinds at random moments."""
    checkpoint, tokenizer = smollm2()
    random = np.random.default_rng(0)
    llm = pg.LLM(
        checkpoint, backend=backend, dtype="float32", num_blocks=200, num_cpu_blocks=200, max_batch_tokens=128,
        max_num_seqs=32, preemption="swap",
    )  # fmt: skip

    def disturb(report):
        if llm.scheduler.running and random.random() < 0.2:
            victim = llm.scheduler.running[random.integers(len(llm.scheduler.running))]
            swap = bool(random.random() < 0.5 and llm.manager.can_swap_out(victim.seq_id))
            llm.scheduler.preempt(victim, swap=swap)

    answers = llm.generate(PROMPTS, pg.SamplingParams(64, ignore_end=True), chat=True, callback=disturb)
    assert llm.stats()["blocks_swapped_in"] > 0 and llm.stats()["cached_tokens"] > 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = tokenizer.encode(tokenizer.chat(prompt))
        # one dense pass over the whole text checks every choice: each token must be the best after those before it
        logits = dense_logits(checkpoint, [*tokens, *answer.tokens.tolist()], xp)[len(tokens) - 1 : -1]
        assert answer.tokens.tolist() == logits.argmax(axis=1).tolist(), prompt
    assert_all_free(llm)
