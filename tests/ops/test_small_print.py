"""What kernels and their wrappers promise in half sentences: each would be easy to lose, and nothing else shows it."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.choose import ATTENTION_KERNELS
from cupaged.attention.kernels import persistent as plans
from cupaged.bench.accuracy import decode_budget
from cupaged.kv_cache import aligned_zeros
from cupaged.ops import textures
from cupaged.ops.cache import MAX_POSITION, frequencies
from cupaged.ops.checks import check_block_tables, check_shared_prefix
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference, assert_prefill_matches_reference
from tests.kit.prefill import PrefillShape, prefill_case

# ---- decode plans that are used again -------------------------------------------------------------------------------

QUEUED = DecodeShape((1700, 1600, 1600, 1650), num_heads=2, num_kv_heads=2, head_dim=32)
IN_TURNS = DecodeShape((300, 290, 310) * 12, num_heads=2, num_kv_heads=2, head_dim=32)
CUT = DecodeShape((4000,), num_heads=9, num_kv_heads=1, head_dim=32)


@pytest.mark.parametrize(
    ("shape", "uses"), [(QUEUED, 9), (IN_TURNS, 2), (CUT, 2)], ids=["from a queue", "in turns", "in parts"]
)
def test_every_use_of_a_plan_writes_every_row_alike(shape, uses):
    """A queue that is one off serves as often as there are thread blocks, here 7: each finds another piece gone."""
    case = decode_case(shape, "host")
    plan = pg.plan_decode(case.cache, case.seq_lens, shape.num_heads)
    first = None
    for _ in range(uses):
        out = np.full_like(case.query, np.nan)
        pg.paged_attention(*case.arguments, plan=plan, out=out)
        first = out if first is None else first
        np.testing.assert_array_equal(out, first)
        assert not plan.arrivals.any()
    assert_decode_matches_reference(case, first)


@pytest.mark.parametrize("heads", [1, 16])
def test_more_parts_than_lanes_read_at_once_are_merged_once_each(heads, monkeypatch):
    monkeypatch.setattr(plans, "HOST_BLOCKS", 40)
    case = decode_case(DecodeShape((12_000,), num_heads=heads, num_kv_heads=1, head_dim=32), "host")
    plan = pg.plan_decode(case.cache, case.seq_lens, heads)
    assert plan.pieces[0, 4] > 16  # parts
    assert_decode_matches_reference(case, *pg.paged_attention(*case.arguments, plan=plan, return_lse=True))


# ---- prefill --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [3, 90], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("window", [1, 64, 127, 128])
def test_each_row_of_a_prefill_sees_its_own_window(window, new):
    for length in (191, 192, 193):
        decode = DecodeShape((length,), num_heads=4, num_kv_heads=2, window=window, query_tokens=new)
        case = prefill_case(PrefillShape(decode, (new,)), "host")
        out, lse = pg.paged_prefill(*case.arguments, return_lse=True, **case.options)
        assert_prefill_matches_reference(case, out, lse)


@pytest.mark.parametrize("new", [3, 90], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_logits_may_fall_as_products_rise(scale, new):
    case = prefill_case(PrefillShape(DecodeShape((190,), spread=2.0), (new,), scale=scale), "host")
    out, lse = pg.paged_prefill(*case.arguments, return_lse=True, **case.options)
    assert_prefill_matches_reference(case, out, lse)


def test_parts_of_a_prefill_are_merged_for_each_kv_head():
    case = prefill_case(PrefillShape(DecodeShape((1500, 40), num_heads=6, num_kv_heads=3), (3, 1)), "host")
    plan = pg.plan_prefill(case.decode.cache, case.decode.seq_lens, case.query_start, 4, 6)
    assert plan.pieces[: int(plan.summary[0]), 8].max() > 1
    for _ in range(3):
        out, lse = pg.paged_prefill(*case.arguments, return_lse=True, plan=plan, **case.options)
        assert_prefill_matches_reference(case, out, lse)


# ---- bounds of what is checked --------------------------------------------------------------------------------------


def test_a_sequence_may_fill_all_that_its_table_maps():
    cache = pg.KVCache(pg.CacheConfig(2, 16, 1, 32), "host")
    query, tables = np.ones((1, 1, 32), np.float16), np.array([[1, 0]], np.int32)
    assert not pg.paged_attention(query, cache, tables, np.array([32], np.int32)).any()
    with pytest.raises(ValueError, match=r"seq_lens must be at most 32, .* seq_lens\[0\] is 33"):
        pg.paged_attention(query, cache, tables, np.array([33], np.int32))


def test_a_plan_holds_whole_chunks_and_no_token_more():
    cache = pg.KVCache(pg.CacheConfig(8, 16, 1, 64), "host")
    plan = pg.plan_decode(cache, np.array([33], np.int32), 1)
    assert plan.shape.chunk == 32
    plan.check_lens(np.array([64], np.int32))
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 65, and the plan holds its tokens 0 to 63"):
        plan.check_lens(np.array([65], np.int32))


@pytest.mark.parametrize("query_tokens", [None, 3])
def test_blocks_are_checked_from_the_one_with_the_windows_first_token_on(query_tokens):
    """The earliest query token sees tokens 31 and on: the last of block 1."""
    length = 31 + 20 + (query_tokens or 1) - 1
    case = decode_case(DecodeShape((length,), window=20, query_tokens=query_tokens), "host")
    case.block_tables[0, 0] = 10**6
    check_block_tables(case.cache, case.block_tables, case.seq_lens, query_tokens or 1, window=20)
    case.block_tables[0, 1] = 10**6
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] is 1000000"):
        check_block_tables(case.cache, case.block_tables, case.seq_lens, query_tokens or 1, window=20)


def test_positions_reach_to_where_float32_holds_every_integer():
    cache, rows = pg.KVCache(pg.CacheConfig(1, 4, 1, 32), "host"), np.ones((1, 1, 32), np.float16)
    pg.rope_append_kv(cache, rows, rows, np.array([0]), np.array([MAX_POSITION - 1], np.int32))
    with pytest.raises(ValueError, match=r"positions must lie from 0 to below 16777216; positions\[0\] is 16777216"):
        pg.rope_append_kv(cache, rows, rows, np.array([0]), np.array([MAX_POSITION], np.int32))


def test_query_tokens_stand_right_behind_a_shared_prefix_or_later():
    tables = np.zeros((2, 3), np.int32)
    check_shared_prefix(32, 16, tables, np.array([35, 0], np.int32), query_tokens=3)
    with pytest.raises(ValueError, match=r"seq_lens must be 0 or count .* 35 at least; seq_lens\[0\] is 34"):
        check_shared_prefix(32, 16, tables, np.array([34, 0], np.int32), query_tokens=3)


def test_out_may_lie_right_beside_the_cache_and_the_query(monkeypatch):
    """In memory: room for `out`, keys, values, room for `out`, the query, room for `out`. A row has 64 bytes."""
    memory = aligned_zeros((6144,), np.dtype(np.uint8))
    storage = iter((memory[64:2112], memory[2112:4160]))
    monkeypatch.setattr("cupaged.kv_cache.aligned_zeros", lambda shape, dtype: next(storage).view(dtype).reshape(shape))
    cache = pg.KVCache(pg.CacheConfig(2, 16, 1, 32), "host")

    def row(first):
        return memory[first : first + 64].view(np.float16).reshape(1, 1, 32)

    arguments = row(4224), cache, np.array([[0, 1]], np.int32), np.array([20], np.int32)
    for first in (0, 4160, 4288):
        pg.paged_attention(*arguments, out=row(first))
    for first, whose in ((16, "cache"), (4144, "cache"), (4176, "query"), (4272, "query")):
        with pytest.raises(ValueError, match=f"out must not share memory with {whose}"):
            pg.paged_attention(*arguments, out=row(first))


# ---- rope and textures ----------------------------------------------------------------------------------------------


def test_each_scaling_has_turns_of_its_own():
    cache, rng = pg.KVCache(pg.CacheConfig(1, 4, 1, 128, "float32"), "host"), np.random.default_rng(0)
    rows, position = rng.standard_normal((1, 1, 128)).astype(np.float32), np.array([5000], np.int32)
    for scaling in (None, pg.Llama3Scaling(), pg.Llama3Scaling(factor=32.0), None):
        rotated = pg.rope_append_kv(cache, rows, rows, np.array([0]), position, query=rows, scaling=scaling)
        expected = pg.reference.rotate(rows, position, frequencies(128, scaling=scaling))
        np.testing.assert_allclose(rotated, expected, atol=1e-5)


@pytest.mark.parametrize("spare", [0, -1])
def test_what_just_fits_a_texture_object_is_one(spare, monkeypatch):
    cache = pg.KVCache(pg.CacheConfig(5, 16, 3, 64), "host")  # 1920 texels of keys: no power of two
    texels = cache.key.nbytes // 16
    low = {**vars(textures.H100_LIMITS), "MaxTexture1DLinearWidth": texels + spare}
    monkeypatch.setattr(textures, "H100_LIMITS", textures.TextureLimits(**low))
    assert textures.bind_textures(cache).tiles == 1 - spare


def test_a_tile_is_a_power_of_two_within_the_limit():
    sizes = [textures._tile(1000, limit) for limit in (255, 256, 257, 511)]
    assert sizes == [(7, 128), (8, 256), (8, 256), (8, 256)]


# ---- edges of what decode reads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_tokens", [None, 3])
def test_a_window_that_begins_beside_a_chunks_edge(query_tokens):
    """A chunk has 32 tokens: the windows begin with the last of one, or with the first of the next."""
    lens = [20 + (query_tokens or 1) - 1 + first for first in (30, 31, 32, 63, 64)]
    case = decode_case(DecodeShape(tuple(lens), window=20, query_tokens=query_tokens), "host")
    out, lse = pg.paged_attention(
        *case.arguments, kernel="paged_attention_persistent", return_lse=True, **case.variants
    )
    assert_decode_matches_reference(case, out, lse, "paged_attention_persistent")


@pytest.mark.parametrize(
    ("kernel", "layout"), [*((kernel, "BSHD") for kernel in ATTENTION_KERNELS), ("paged_attention_v1", "BHDSX")]
)
def test_logits_may_climb_along_the_context(kernel, layout):
    """What was summed up shrinks with each new maximum: over tokens, lanes, warps, stretches, partitions and parts."""
    tokens, head_dim = 9000, 32
    cache = pg.KVCache(pg.CacheConfig(-(-tokens // 16), 16, 1, head_dim, "float16", layout), "host")
    rng = np.random.default_rng(0)
    key, value = np.zeros((tokens, 1, head_dim)), rng.standard_normal((tokens, 1, head_dim))
    key[:, 0, 0] = np.linspace(-20, 20, tokens)
    query = np.zeros((1, 1, head_dim), np.float16)
    query[..., 0] = 1
    pg.append_kv(cache, key.astype(np.float16), value.astype(np.float16), np.arange(tokens))
    tables = np.arange(cache.config.num_blocks, dtype=np.int32)[np.newaxis]
    arguments = query, cache, tables, np.array([tokens], np.int32)
    out, lse = pg.paged_attention(*arguments, scale=0.25, kernel=kernel, return_lse=True)
    budget = decode_budget(*arguments, kernel, scale=0.25)
    assert budget.error_of(out) <= 1
    assert np.abs(lse - budget.expected_lse).max() <= budget.lse


# ---- sampling -------------------------------------------------------------------------------------------------------


def seed_of(bits):
    """Return the seed of which SplitMix64 makes these 64 bits."""

    def without_shift(z, shift):
        x = z
        for _ in range(64 // shift):
            x = z ^ x >> shift
        return x

    z = without_shift(bits, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z = without_shift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (without_shift(z, 30) - 0x9E3779B97F4A7C15) % 2**64


def test_a_number_on_the_edge_of_two_tokens_is_the_second_ones():
    """Of 1024 tokens alike, each has a stretch of 2**54 numbers; token 512 is the first of the second of two warps."""
    tokens = [1, 31, 32, 511, 512, 513, 1023]
    numbers = [bits for token in tokens for bits in ((token << 54) - 1, token << 54)]
    seeds = np.array([seed_of(bits) for bits in numbers], np.uint64)
    drawn = pg.sample(np.zeros((len(seeds), 1024), np.float32), seed=seeds)
    assert drawn.tolist() == [token + before for token in tokens for before in (-1, 0)]
