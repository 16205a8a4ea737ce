"""The paged model finds the logits of the dense one, whatever way its tokens are cut into steps."""

import numpy as np
import pytest

from cupaged.engine.model import Llama, ModelInput
from cupaged.engine.weights import random_checkpoint
from cupaged.reference import as_numpy
from tests.kit.llama import SMALL, dense_logits, half_budget, logits_budget
from tests.kit.real_model import smollm2

BLOCK = 8
TEXTS = [
    np.random.default_rng(seed).integers(SMALL.vocab_size, size=length) for seed, length in enumerate((21, 8, 1, 14))
]
TABLES = np.random.default_rng(0).permutation(16).astype(np.int32).reshape(4, 4)
CHECKPOINT = random_checkpoint(SMALL)


def step_input(xp, starts, stops, texts, tables, decode=False):
    """Return tokens `starts[i]` to `stops[i]` of each text as a step."""
    positions = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    rows = np.repeat(np.arange(len(texts)), np.subtract(stops, starts))
    tokens = np.array([texts[row][position] for row, position in zip(rows, positions, strict=True)])
    slots = tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    lens = np.where(np.subtract(stops, starts) > 0, stops, 0)
    query_start = np.concatenate([[0], np.cumsum(np.subtract(stops, starts))])
    ints = [xp.asarray(array.astype(np.int32)) for array in (tokens, positions, tables, lens, query_start)]
    return ModelInput(ints[0], ints[1], xp.asarray(slots), ints[2], ints[3], None if decode else ints[4])


def paged_logits(model, texts, tables, prompt_lengths, chunk):
    """Return the logits after every token: prompts in chunks, together with each other, then token by token."""
    caches = model.new_caches(int(tables.max()) + 1, BLOCK)
    found = [[] for _ in texts]
    at = np.zeros(len(texts), int)
    while (at < prompt_lengths).any():
        stops = np.minimum(at + chunk, prompt_lengths)
        logits = as_numpy(model.forward(step_input(model.xp, at, stops, texts, tables), caches))
        for i, part in enumerate(np.split(logits, np.cumsum(stops - at)[:-1])):
            found[i].append(part)
        at = stops
    while True:
        (rows,) = np.nonzero(at < [len(text) for text in texts])
        if not len(rows):
            return [np.concatenate(parts) for parts in found]
        step = step_input(model.xp, at[rows], at[rows] + 1, [texts[row] for row in rows], tables[rows], decode=True)
        for row, logits in zip(rows, as_numpy(model.forward(step, caches)), strict=True):
            found[row].append(logits[None])
        at[rows] += 1


@pytest.mark.parametrize("chunk", [3, 100])
def test_logits_are_the_dense_ones(backend, chunk):
    model = Llama(CHECKPOINT, backend, "float32")
    found = paged_logits(model, TEXTS, TABLES, np.array([15, 6, 1, 14]), chunk)
    for text, logits in zip(TEXTS, found, strict=True):
        expected, budget = logits_budget(CHECKPOINT, text)
        assert np.abs(logits - expected).max() <= budget


def test_the_reference_gives_the_same():
    model = Llama(CHECKPOINT, "host", "float32", use_reference=True)
    found = paged_logits(model, TEXTS, TABLES, np.array([15, 6, 1, 14]), 4)
    for text, logits in zip(TEXTS, found, strict=True):
        expected, budget = logits_budget(CHECKPOINT, text)
        assert np.abs(logits - expected).max() <= budget


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_loses_what_its_digits_lose(backend, dtype):
    model = Llama(CHECKPOINT, backend, dtype)
    found = paged_logits(model, TEXTS[:2], TABLES[:2], np.array([15, 6]), 6)
    for text, logits in zip(TEXTS, found, strict=False):
        expected = dense_logits(CHECKPOINT, text, dtype=np.float64)
        assert np.abs(logits - expected).max() <= half_budget(CHECKPOINT, text, model.storage)


def test_tokens_that_fill_up_a_batch_change_nothing(backend, xp):
    model = Llama(CHECKPOINT, backend, "float32")
    caches = model.new_caches(16, BLOCK)
    full = step_input(xp, [0, 0], [5, 3], TEXTS[:2], TABLES[:2])
    model.forward(full, caches)
    step = step_input(xp, [5, 3], [6, 4], TEXTS[:2], TABLES[:2], decode=True)
    alone = as_numpy(model.forward(step, caches))
    before = [contents(cache) for cache in caches]
    padded = ModelInput(
        xp.concatenate([step.tokens, xp.zeros(2, np.int32)]),
        xp.concatenate([step.positions, xp.zeros(2, np.int32)]),
        xp.concatenate([step.slots, xp.full(2, -1, np.int64)]),
        xp.concatenate([step.block_tables, xp.full((2, 4), -1, np.int32)]),
        xp.concatenate([step.seq_lens, xp.zeros(2, np.int32)]),
    )
    filled = as_numpy(model.forward(padded, caches))[:2]
    budget = max(logits_budget(CHECKPOINT, text[:6])[1] for text in TEXTS[:2])
    assert np.abs(filled - alone).max() <= budget
    untouched = np.setdiff1d(np.arange(16 * BLOCK), as_numpy(step.slots))
    for cache, held in zip(caches, before, strict=True):
        np.testing.assert_array_equal(contents(cache)[:, untouched], held[:, untouched])


def contents(cache):
    """Return copies of keys and values, [2, slots, heads, dim]."""
    return np.stack([as_numpy(array).copy().reshape(-1, *array.shape[2:]) for array in cache.to_dense()])


def test_logits_only_where_wanted(backend, xp):
    model = Llama(CHECKPOINT, backend, "float32", use_reference=backend == "host")
    step = step_input(xp, [0, 0], [5, 3], TEXTS[:2], TABLES[:2])
    every = as_numpy(model.forward(step, model.new_caches(16, BLOCK)))
    wanted = ModelInput(**{**vars(step), "wanted": xp.asarray(np.array([4, 7], np.int32))})
    some = as_numpy(model.forward(wanted, model.new_caches(16, BLOCK)))
    budget = logits_budget(CHECKPOINT, TEXTS[0][:5])[1]
    assert some.shape == (2, SMALL.vocab_size) and np.abs(some - every[[4, 7]]).max() <= budget


def test_the_real_model_agrees_with_the_dense_one():
    checkpoint, tokenizer = smollm2()
    tokens = tokenizer.encode("The capital of France is")
    model = Llama(checkpoint, "host", "float32", use_reference=True)
    table = np.array([[2, 0]], np.int32)
    found = model.forward(step_input(np, [0], [len(tokens)], [tokens], table), model.new_caches(3, BLOCK))
    expected, budget = logits_budget(checkpoint, tokens)
    assert np.abs(found - expected).max() <= budget
    assert tokenizer.decode([int(found[-1].argmax())]) == " Paris"
