"""A window begins at its first token, wherever that lies in a block or a tile: for prefill, and for what is checked."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.kernels.prefill import TILE_TOKENS
from cupaged.bench.accuracy import prefill_budget
from cupaged.runtime import kernels_from
from tests.kit.cases import ILLEGAL_IDS
from tests.kit.mutants import kernels_with

BLOCK_SIZES = [1, 7, 16, 64, 256]
WINDOWS = [1, 2, 17, *range(TILE_TOKENS - 2, TILE_TOKENS + 3), 130]
TOKENS = 270


def calls(block_size, window, backend, group=2):
    """Yield prefill calls whose windows begin at borders of tiles and beside them; all that is seen weighs alike."""
    cache = pg.KVCache(pg.CacheConfig(-(-TOKENS // block_size), block_size, 1, 64, "float16"), backend)
    xp, rng = cache.xp, np.random.default_rng(0)
    key, value = (xp.asarray(rng.standard_normal((TOKENS, 1, 64)).astype(np.float16)) for _ in "kv")
    pg.append_kv(cache, key, value, xp.arange(TOKENS))
    beside = [TILE_TOKENS * tiles + more for tiles in (1, 2) for more in (-2, -1, 0, 1, 2)]
    few = [(first + window, 2) for first in beside if first + window <= TOKENS]
    for lens, new in (zip(*few, strict=True), ((150, 64), (150, 9))):
        lens, starts = np.array([*lens], np.int32), np.cumsum([0, *new]).astype(np.int32)
        tables = xp.asarray(np.tile(np.arange(cache.config.num_blocks, dtype=np.int32), (len(lens), 1)))
        query = xp.zeros((int(starts[-1]), group, 64), np.float16)
        yield query, cache, tables, xp.asarray(lens), xp.asarray(starts)


def worst_error(block_size, window, backend):
    """Return the largest error of all calls as a fraction of its budget."""
    worst = 0.0
    for call in calls(block_size, window, backend):
        out, lse = pg.paged_prefill(*call, window=window, return_lse=True)
        budget = prefill_budget(*call, window=window)
        worst = max(worst, budget.error_of(out), budget.error_of_lse(lse))
    return worst


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_prefill_sees_a_window_to_its_first_token_and_no_further(block_size, window, backend):
    assert worst_error(block_size, window, backend) <= 1


MASK, PREFILL, PLAN = "include/prefill_mask.cuh", "attention/paged_prefill.cu", "attention/plan_prefill.cu"
MUTANTS = [
    (MASK, "first + Tokens <= variants.first_token(shortest)", "first + Tokens - 1 <= variants.first_token(shortest)"),
    (MASK, "(CAUSAL && first >= longest)", "(CAUSAL && first + 1 >= longest)"),
    (MASK, "first + Tokens <= shortest)", "first + Tokens - 1 <= shortest)"),
    (MASK, "first >= variants.first_token(longest)", "first + 1 >= variants.first_token(longest)"),
    (MASK, "begin = variants.first_token(context) - first,", "begin = variants.first_token(context) - first + 1,"),
    (MASK, "begin = variants.first_token(context) - first,", "begin = variants.first_token(context) - first - 1,"),
    (MASK, "end = context - first;", "end = context - first + 1;"),
    (MASK, "end = context - first;", "end = context - first - 1;"),
    (PREFILL, "variants.first_token(shortest), CAUSAL", "variants.first_token(shortest) + 1, CAUSAL"),
    (PLAN, "max(0, shortest) - window) / tile_tokens", "max(0, shortest) - window + 1) / tile_tokens"),
]


@pytest.mark.parametrize(("file", "text", "mutant"), MUTANTS, ids=lambda value: value.strip()[-40:])
def test_an_edge_that_is_off_by_one_is_seen(tmp_path, file, text, mutant):
    with kernels_from(kernels_with(tmp_path, file, text, mutant)):
        assert worst_error(16, TILE_TOKENS, "host") > 1


@pytest.mark.parametrize("query_tokens", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 4, 7, 16])
def test_the_first_block_of_a_window_is_checked_and_the_one_before_it_is_not(block_size, query_tokens, backend):
    """For every window and length, so that the first token lies at every place in its block."""
    blocks = 6
    cache = pg.KVCache(pg.CacheConfig(blocks, block_size, 1, 64, "float16"), backend)
    xp, shape = cache.xp, (1, query_tokens, 1, 64)
    query = xp.zeros(shape, np.float16)
    length = blocks * block_size
    for window in range(1, length - query_tokens + 1):
        first_token = length - query_tokens + 1 - window
        first = first_token // block_size
        table = np.arange(blocks, dtype=np.int32)[np.newaxis]
        table[0, :first] = ILLEGAL_IDS[0]
        lens = xp.asarray([length], dtype=np.int32)
        pg.paged_attention(query, cache, xp.asarray(table), lens, window=window, validate=True)
        table[0, first] = ILLEGAL_IDS[0]
        with pytest.raises(ValueError, match=rf"block_tables\[0, {first}\] is -7"):
            pg.paged_attention(query, cache, xp.asarray(table), lens, window=window, validate=True)
        table[0, first] = first
        flat, starts = query.reshape(query_tokens, 1, 64), xp.asarray([0, query_tokens], dtype=np.int32)
        pg.paged_prefill(flat, cache, xp.asarray(table), lens, starts, window=window, validate=True)
        table[0, first] = ILLEGAL_IDS[0]
        with pytest.raises(ValueError, match=rf"block_tables\[0, {first}\] is -7"):
            pg.paged_prefill(flat, cache, xp.asarray(table), lens, starts, window=window, validate=True)
