"""Layouts: what the strides say is where the dense order says an element is."""

import numpy as np
import pytest

import cupaged as pg
from cupaged import layouts

LAYOUTS = list(layouts.LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("block_size", [1, 6, 16])
def test_dense_and_back(layout, dtype, block_size):
    config = pg.CacheConfig(5, block_size, 3, 40, dtype, layout)
    cache = pg.KVCache(config, "host")
    dense = [np.arange(cache.key.size, dtype=config.numpy_dtype).reshape(5, block_size, 3, 40) + i for i in (0, 9)]
    cache.fill_from_dense(*dense)
    for stored, expected in zip(cache.to_dense(), dense, strict=True):
        np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("block_size", [1, 6, 16])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_strides_lead_to_every_element(layout, dtype, block_size, kind):
    config = pg.CacheConfig(4, block_size, 3, 40, dtype, layout)
    cache = pg.KVCache(config, "host")
    rng = np.random.default_rng(0)
    dense = [rng.standard_normal((4, block_size, 3, 40)).astype(config.numpy_dtype) for _ in "kv"]
    cache.fill_from_dense(*dense)
    view = getattr(cache, kind)
    memory = cache.storage[0 if kind == "key" or len(cache.storage) == 1 else 1].reshape(-1)
    start = (view.ctypes.data - memory.ctypes.data) // config.numpy_dtype.itemsize
    s = layouts.kv_strides(config, kind)
    block, slot, head, dim = np.indices((4, block_size, 3, 40))
    offsets = start + block * s.block + head * s.head + slot * s.slot + dim // s.pack_size * s.pack + dim % s.pack_size
    np.testing.assert_array_equal(memory[offsets], dense[0 if kind == "key" else 1])


def test_shapes_are_those_of_the_table():
    shapes = {}
    for layout in LAYOUTS:
        cache = pg.KVCache(pg.CacheConfig(9, 16, 2, 64, "float16", layout), "host")
        shapes[layout] = [array.shape for array in cache.storage]
        assert cache.nbytes == cache.config.nbytes == 9 * 16 * 2 * 64 * 2 * 2
    assert shapes == {
        "BSHD": [(9, 16, 2, 64)] * 2,
        "BHSD": [(9, 2, 16, 64)] * 2,
        "HBSD": [(2, 9, 16, 64)] * 2,
        "BS2HD": [(9, 16, 2, 2, 64)],
        "BHDSX": [(9, 2, 8, 16, 8), (9, 2, 64, 16)],
    }


def test_taking_blocks_is_taking_them_from_the_dense_order():
    for layout in LAYOUTS:
        config = pg.CacheConfig(6, 4, 2, 32, "float32", layout)
        cache = pg.KVCache(config, "host")
        rng = np.random.default_rng(0)
        dense = [rng.standard_normal((6, 4, 2, 32)).astype(np.float32) for _ in "kv"]
        cache.fill_from_dense(*dense)
        for taken, expected in zip(cache.blocks(np.array([5, 0, 5])), dense, strict=True):
            np.testing.assert_array_equal(taken, expected[[5, 0, 5]])


def test_wrong_shapes_are_refused():
    cache = pg.KVCache(pg.CacheConfig(2, 4, 2, 32, "float32"), "host")
    good = np.zeros((2, 4, 2, 32), dtype=np.float32)
    with pytest.raises(ValueError, match=r"value must be float32 with shape \(2, 4, 2, 32\); got float32"):
        cache.fill_from_dense(good, good[:1])
    with pytest.raises(ValueError, match=r"key must be float32 .* got float64"):
        cache.fill_from_dense(good.astype(np.float64), good)
    with pytest.raises(ValueError, match=r"a key array in BHDSX must have axes"):
        layouts.to_dense(good, "BHDSX", "key")
    with pytest.raises(ValueError, match="layout must be one of"):
        layouts.to_dense(good, "XYZ", "key")
    with pytest.raises(ValueError, match="kind must be 'key' or 'value'"):
        layouts.to_dense(good, "BSHD", "query")
    with pytest.raises(ValueError, match=r"dense must have axes \[block, slot, head, dim\]"):
        layouts.from_dense(good[0], "BSHD", "key")
    with pytest.raises(TypeError, match="config must be a CacheConfig; got dict"):
        pg.KVCache({"num_blocks": 2}, "host")


def test_host_arrays_start_where_a_gpu_allocation_would():
    cache = pg.KVCache(pg.CacheConfig(3, 5, 1, 40, "float16"), "host")
    assert all(array.ctypes.data % 512 == 0 for array in cache.storage)
