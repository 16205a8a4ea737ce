"""RoPE fused with the append, held to float64."""

import math
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

import cupaged as pg
from cupaged.ops.cache import frequencies
from cupaged.runtime import host, launch
from tests.kit.compare import to_numpy
from tests.kit.slots import broken_runs

LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"]
FLOAT32_EPS = float(np.finfo(np.float32).eps)


def allowed(rows, dtype):
    """Half a unit of the result's last place is a unit of its largest term's; float32 errs in the angle and in sums."""
    size = np.abs(to_numpy(rows).astype(float)).max(axis=-1, keepdims=True)
    return size * (2 * float(ml_dtypes.finfo(dtype).eps) + 16 * FLOAT32_EPS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotary_dim"), [("float16", 128, None), ("bfloat16", 72, 32), ("float32", 40, 40)]
)
@pytest.mark.parametrize("together", [False, True])
def test_keys_and_queries_turn_and_values_stay(layout, interleaved, dtype, head_dim, rotary_dim, together, backend, xp):
    """In arrays of their own, or together in a token's row, as one product leaves them."""
    cache = pg.KVCache(pg.CacheConfig(5, 7, 2, head_dim, dtype, layout), backend)
    rng = np.random.default_rng(0)
    storage = cache.config.numpy_dtype
    rows = xp.asarray(rng.standard_normal((6, 10, head_dim)).astype(storage))
    query, key, value = rows[:, :6], rows[:, 6:8], rows[:, 8:]
    if not together:
        query, key, value = (xp.ascontiguousarray(array) for array in (query, key, value))
    positions = np.array([0, 1, 100, 8191, 131071, 2**24 - 1], np.int32)
    slots = np.array([3, 34, -1, 0, 20, 7])
    scaling = pg.Llama3Scaling() if dtype == "float16" else None
    options = {"rotary_dim": rotary_dim, "theta": 500000.0, "interleaved": interleaved, "scaling": scaling}
    rotated = pg.rope_append_kv(cache, key, value, xp.asarray(slots), xp.asarray(positions), query=query, **options)
    assert rotated.flags.c_contiguous
    angles = frequencies(rotary_dim or head_dim, 500000.0, scaling)
    expected = pg.reference.rotate(query, positions, angles, interleaved)
    assert (np.abs(to_numpy(rotated).astype(float) - expected) <= allowed(query, storage)).all()
    stored_key, stored_value = (to_numpy(array).reshape(35, 2, head_dim) for array in cache.to_dense())
    expected = pg.reference.rotate(key, positions, angles, interleaved)
    there = slots >= 0
    error = np.abs(stored_key[slots[there]].astype(float) - expected[there])
    assert (error <= allowed(key, storage)[there]).all()
    np.testing.assert_array_equal(stored_value[slots[there]], to_numpy(value)[there])
    others = np.setdiff1d(np.arange(35), slots)
    assert not stored_key[others].any() and not stored_value[others].any()


def test_what_cannot_be_taken_as_it_lies_is_named(backend, xp):
    cache = pg.KVCache(pg.CacheConfig(2, 4, 1, 32), backend)
    slots, positions = xp.asarray([0, 1]), xp.asarray([0, 1], dtype=xp.int32)
    good = xp.ones((2, 1, 32), xp.float16)
    uneven = xp.ones(80, xp.float16)
    uneven = xp.lib.stride_tricks.as_strided(uneven, (2, 1, 32), (72, 64, 2))
    with pytest.raises(ValueError, match="key must have a multiple of 16 bytes from one token to the next; got 72"):
        pg.rope_append_kv(cache, uneven, good, slots, positions)
    with pytest.raises(ValueError, match=r"value\[0\] must be C-contiguous"):
        pg.rope_append_kv(cache, good, xp.ones((2, 1, 64), xp.float16)[:, :, ::2], slots, positions)
    with pytest.raises(ValueError, match=r"query\[0\] must be C-contiguous"):
        pg.rope_append_kv(cache, good, good, slots, positions, query=xp.ones((2, 4, 32), xp.float16)[:, ::2])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotary_dim", "block_size", "heads"),
    [("float16", 64, 64, 16, 2), ("bfloat16", 72, 32, 8, 3), ("float16", 72, 48, 24, 1), ("float32", 40, 24, 16, 3),
     ("float32", 72, 72, 7, 1)],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_runs_of_any_kind_where_slots_lie_together(
    interleaved, dtype, head_dim, rotary_dim, block_size, heads, seed, backend, xp, monkeypatch
):
    """Values arrive as they are, and keys turned, however a prompt's slots begin, end and are broken."""
    if seed == 2:
        monkeypatch.setattr("cupaged.ops.cache.ROPE_BLOCKS", 1)  # as of long prompts: a block takes all heads
    cache = pg.KVCache(pg.CacheConfig(5, block_size, heads, head_dim, dtype, "BHDSX"), backend)
    rng = np.random.default_rng(seed)
    storage, num_slots = cache.config.numpy_dtype, cache.config.num_slots
    slots = broken_runs(rng, num_slots, block_size)
    key, value = (xp.asarray(rng.standard_normal((len(slots), heads, head_dim)).astype(storage)) for _ in "kv")
    query = xp.asarray(rng.standard_normal((len(slots), 2 * heads, head_dim)).astype(storage))
    positions = rng.integers(0, 10000, len(slots)).astype(np.int32)
    options = {"rotary_dim": rotary_dim, "interleaved": interleaved}
    with host.schedule(seed) if backend == "host" else nullcontext():
        rotated = pg.rope_append_kv(cache, key, value, xp.asarray(slots), xp.asarray(positions), query=query, **options)
    angles = frequencies(rotary_dim)
    expected = pg.reference.rotate(query, positions, angles, interleaved)
    assert (np.abs(to_numpy(rotated).astype(float) - expected) <= allowed(query, storage)).all()
    stored_key, stored_value = (to_numpy(array).reshape(num_slots, heads, head_dim) for array in cache.to_dense())
    there = slots >= 0
    error = np.abs(stored_key[slots[there]] - pg.reference.rotate(key, positions, angles, interleaved)[there])
    assert (error <= allowed(key, storage)[there]).all()
    np.testing.assert_array_equal(stored_value[slots[there]], to_numpy(value)[there])
    others = np.setdiff1d(np.arange(num_slots), slots)
    assert len(others) and not stored_key[others].any() and not stored_value[others].any()


def test_without_a_query_nothing_is_returned(backend, xp):
    cache = pg.KVCache(pg.CacheConfig(2, 4, 1, 32), backend)
    rows = xp.ones((1, 1, 32), xp.float16)
    assert pg.rope_append_kv(cache, rows, rows, xp.asarray([5]), xp.asarray([0], dtype=xp.int32)) is None
    assert (to_numpy(cache.to_dense()[0])[1, 1] == 1).all()


def test_llama_3_keeps_fast_turns_and_slows_slow_ones():
    plain, scaled = frequencies(128, 500000.0), frequencies(128, 500000.0, pg.Llama3Scaling())
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_array_equal(scaled[turns >= 4], plain[turns >= 4])
    np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 8, rtol=1e-15)
    between = (turns > 1) & (turns < 4)
    smooth = (turns[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (smooth + (1 - smooth) / 8), rtol=1e-15)
    assert between.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rotary_dim": 24},
            pg.UnsupportedError,
            "rotary_dim must be a multiple of 16, at most the head_dim 32; got 24",
        ),
        (
            {"rotary_dim": 48},
            pg.UnsupportedError,
            "rotary_dim must be a multiple of 16, at most the head_dim 32; got 48",
        ),
        ({"theta": 0.0}, ValueError, "theta must be positive and finite; got 0.0"),
        ({"scaling": 8.0}, TypeError, "scaling must be a Llama3Scaling; got float"),
        ({"positions": [-1]}, ValueError, r"positions must lie from 0 to below 16777216; positions\[0\] is -1"),
        ({"positions": [0, 1]}, ValueError, r"positions must have shape \[1\]; got \[2\]"),
    ],
)
def test_a_mistake_names_the_argument(options, error, message, backend, xp):
    cache = pg.KVCache(pg.CacheConfig(2, 4, 1, 32), backend)
    rows = xp.ones((1, 1, 32), xp.float16)
    positions = xp.asarray(options.get("positions", [0]), dtype=xp.int32)
    options = {name: value for name, value in options.items() if name != "positions"}
    with pytest.raises(error, match=message):
        pg.rope_append_kv(cache, rows, rows, xp.asarray([0]), positions, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.0}, "factor must be positive and finite; got 0.0"),
        ({"original_context": -1}, "original_context must be positive and finite; got -1"),
        ({"low_freq_factor": 4.0}, "high_freq_factor must be above low_freq_factor, 4.0, and finite; got 4.0"),
    ],
)
def test_a_scaling_of_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pg.Llama3Scaling(**options)


def test_a_call_like_one_before_is_not_checked_again(monkeypatch, backend, xp):
    """Another layer's, with another cache: its rows go there."""
    monkeypatch.setattr(launch, "_remembered", {})
    rng, config = np.random.default_rng(0), pg.CacheConfig(3, 4, 2, 64)
    positions, slots = np.array([0, 100, 8191], np.int32), np.array([9, 0, 3])
    for _ in range(2):
        cache = pg.KVCache(config, backend)
        rows = xp.asarray(rng.standard_normal((3, 8, 64)).astype(np.float16))
        given = rows[:, 4:6], rows[:, 6:], xp.asarray(slots), xp.asarray(positions)
        rotated = pg.rope_append_kv(cache, *given, query=rows[:, :4], validate=False)
        expected = pg.reference.rotate(rows[:, :6], positions, frequencies(64))
        error = np.abs(to_numpy(rotated).astype(float) - expected[:, :4])
        assert (error <= allowed(rows[:, :4], np.float16)).all()
        key, value = (to_numpy(array).reshape(12, 2, 64)[slots] for array in cache.to_dense())
        assert (np.abs(key.astype(float) - expected[:, 4:]) <= allowed(rows[:, 4:6], np.float16)).all()
        np.testing.assert_array_equal(value, to_numpy(rows)[:, 6:])
        monkeypatch.setattr("cupaged.ops.cache.load_kernel", None)
    for change in ({"theta": 500.0}, {"query": rows[:, :2]}, {"interleaved": True}, {"validate": True}):
        with pytest.raises(TypeError, match="NoneType"):
            pg.rope_append_kv(cache, *given, **{"query": rows[:, :4], "validate": False, **change})
