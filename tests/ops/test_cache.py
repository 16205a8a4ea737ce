"""Appending writes exactly the slots that it is given, in every layout."""

from contextlib import nullcontext

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import host
from tests.kit.compare import to_numpy
from tests.kit.slots import broken_runs

LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"]


def marked_cache(layout, dtype, backend, *, block_size=16, head_dim=64, heads=3, num_blocks=5):
    """Return a cache in which every element is different from what is appended, and its dense copies."""
    cache = pg.KVCache(pg.CacheConfig(num_blocks, block_size, heads, head_dim, dtype, layout), backend)
    shape = (num_blocks, block_size, heads, head_dim)
    rng = np.random.default_rng(1)
    dense = [(100 + rng.integers(0, 50, shape)).astype(cache.config.numpy_dtype) for _ in "kv"]
    cache.fill_from_dense(*dense)
    return cache, dense


def new_tokens(cache, count, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, cache.config.num_kv_heads, cache.config.head_dim)
    return [cache.xp.asarray(rng.standard_normal(shape).astype(cache.config.numpy_dtype)) for _ in "kv"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (1, 40), (7, 256), (256, 72)])
def test_only_the_named_slots_change(layout, dtype, block_size, head_dim, backend, xp):
    cache, dense = marked_cache(layout, dtype, backend, block_size=block_size, head_dim=head_dim)
    slots = np.random.default_rng(2).permutation(cache.config.num_slots)[:4].astype(np.int64)
    slots[2] = -1
    key, value = new_tokens(cache, 4)
    pg.append_kv(cache, key, value, xp.asarray(slots))
    pg.reference.append_kv(*dense, key, value, slots)
    for stored, expected in zip(cache.to_dense(), dense, strict=True):
        np.testing.assert_array_equal(to_numpy(stored), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("first", [0, 8, 5, 13])
def test_a_prompt_whose_slots_are_neighbours(layout, dtype, first, backend, xp):
    cache, dense = marked_cache(layout, dtype, backend)
    slots = np.concatenate([np.arange(first, 16), [32, 33, 34, -1], np.arange(48, 64), [7 - first % 2 * 7 + 64]])
    key, value = new_tokens(cache, len(slots))
    pg.append_kv(cache, key, value, xp.asarray(slots))
    pg.reference.append_kv(*dense, key, value, slots)
    for stored, expected in zip(cache.to_dense(), dense, strict=True):
        np.testing.assert_array_equal(to_numpy(stored), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("block_size", "head_dim", "heads"), [(16, 64, 3), (8, 72, 1), (24, 40, 3), (7, 72, 2), (32, 128, 1), (4, 72, 3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_runs_of_any_kind_where_slots_lie_together(dtype, block_size, head_dim, heads, seed, backend, xp):
    cache, dense = marked_cache("BHDSX", dtype, backend, block_size=block_size, head_dim=head_dim, heads=heads)
    slots = broken_runs(np.random.default_rng(seed), cache.config.num_slots, block_size)
    key, value = new_tokens(cache, len(slots), seed)
    with host.schedule(seed) if backend == "host" else nullcontext():
        pg.append_kv(cache, key, value, xp.asarray(slots))
    pg.reference.append_kv(*dense, key, value, slots)
    for stored, expected in zip(cache.to_dense(), dense, strict=True):
        np.testing.assert_array_equal(to_numpy(stored), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_slots_may_be_of_either_integer_type(dtype, backend, xp):
    cache, _dense = marked_cache("BSHD", "float16", backend)
    key, value = new_tokens(cache, 1)
    pg.append_kv(cache, key, value, xp.asarray([37], dtype=dtype))
    np.testing.assert_array_equal(to_numpy(cache.key)[37 // 16, 37 % 16], to_numpy(key)[0])


def test_nothing_to_append_is_fine(backend, xp):
    cache, dense = marked_cache("BSHD", "float16", backend)
    key, value = new_tokens(cache, 0)
    pg.append_kv(cache, key, value, xp.empty(0, dtype=xp.int64))
    np.testing.assert_array_equal(to_numpy(cache.key), dense[0])


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ([0, 80], ValueError, r"slots below 80, or -1 to skip a token; slot_mapping\[1\] is 80"),
        ([-2, 0], ValueError, r"slot_mapping\[0\] is -2"),
        ([5, 5], ValueError, r"slot_mapping must name a slot once; slot 5 is given to tokens \[0, 1\]"),
        ([1.0, 2.0], TypeError, "slot_mapping must have dtype int32 or int64; got float"),
        ([[0, 1]], ValueError, r"slot_mapping must have shape \[2\]; got \[1, 2\]"),
    ],
)
def test_bad_slots_are_refused_and_nothing_is_written(slots, error, message, backend, xp):
    cache, dense = marked_cache("BSHD", "float16", backend)
    key, value = new_tokens(cache, 2)
    with pytest.raises(error, match=message):
        pg.append_kv(cache, key, value, xp.asarray(slots))
    np.testing.assert_array_equal(to_numpy(cache.key), dense[0])


def test_bad_rows_are_refused(backend, xp):
    cache, _ = marked_cache("BSHD", "float16", backend)
    key, value = new_tokens(cache, 2)
    slots = xp.asarray([0, 1])
    with pytest.raises(TypeError, match="key must have dtype float16; got float32"):
        pg.append_kv(cache, key.astype(xp.float32), value, slots)
    with pytest.raises(ValueError, match=r"value must have shape \[2, 3, 64\]; got \[1, 3, 64\]"):
        pg.append_kv(cache, key, value[:1], slots)
    with pytest.raises(ValueError, match=r"key must have shape \[num_tokens, 3, 64\]"):
        pg.append_kv(cache, key[:, :2].copy(), value, slots)
    with pytest.raises(ValueError, match="key must be C-contiguous"):
        pg.append_kv(cache, new_tokens(cache, 4)[0][::2], value, slots)
    with pytest.raises(ValueError, match="value must start on a 16-byte boundary"):
        shifted = xp.empty(value.size + 8, value.dtype)[1 : value.size + 1].reshape(value.shape)
        pg.append_kv(cache, key, shifted, slots)
