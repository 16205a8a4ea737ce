"""Whole blocks: copied, gathered, scattered and swapped, in every layout, on both backends."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops import swap
from tests.kit.compare import to_numpy

LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"]


def numbered_cache(layout, backend, dtype="float16", block_size=7, head_dim=40, heads=3, num_blocks=9, seed=1):
    """Return a cache of random content, and its dense copies."""
    cache = pg.KVCache(pg.CacheConfig(num_blocks, block_size, heads, head_dim, dtype, layout), backend)
    rng = np.random.default_rng(seed)
    dense = [
        rng.standard_normal((num_blocks, block_size, heads, head_dim)).astype(cache.config.numpy_dtype) for _ in "kv"
    ]
    cache.fill_from_dense(*dense)
    return cache, dense


def assert_holds(cache, dense):
    for stored, expected in zip(cache.to_dense(), dense, strict=True):
        np.testing.assert_array_equal(to_numpy(stored), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim"), [("float16", 16, 128), ("float32", 7, 40), ("bfloat16", 1, 40)]
)
def test_only_the_destinations_change(layout, dtype, block_size, head_dim, backend):
    cache, dense = numbered_cache(layout, backend, dtype, block_size, head_dim)
    pairs = np.array([[0, 5], [3, 1], [0, 8]], np.int32)
    pg.copy_blocks(cache, pairs)
    for array in dense:
        array[pairs[:, 1]] = array[pairs[:, 0]]
    assert_holds(cache, dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_blocks_come_back_elsewhere(layout, backend, xp):
    cache, dense = numbered_cache(layout, backend)
    other, expected = numbered_cache(layout, backend, seed=2)
    blocks = pg.gather_blocks(cache, [4, 0, 7])
    assert blocks.shape == (3, 2 * 7 * 3 * 40)
    pg.scatter_blocks(other, xp.asarray([1, 8, 2], dtype=xp.int32), blocks)
    for array, source in zip(expected, dense, strict=True):
        array[[1, 8, 2]] = source[[4, 0, 7]]
    assert_holds(other, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_swapped_blocks_come_back(layout, at_once, backend, monkeypatch):
    cache, dense = numbered_cache(layout, backend)
    monkeypatch.setattr(swap, "STAGING_BYTES", at_once * 2 * 7 * 3 * 40 * 2)
    host = pg.HostBlocks(cache.config, 6)
    out = np.array([[2, 5], [7, 0], [4, 1], [8, 2], [0, 4]])
    pg.swap_blocks(cache, host, out)
    pg.copy_blocks(cache, [[1, 2], [3, 7]])
    back = np.array([[5, 6], [1, 3], [0, 0]])
    pg.swap_blocks(host, cache, back)
    was = dict(out[:, ::-1].tolist())
    for array in dense:
        before = array.copy()
        array[[2, 7]] = before[[1, 3]]
        for source, target in back.tolist():
            array[target] = before[was[source]]
    assert_holds(cache, dense)


def test_the_manager_drives_the_engine(backend, xp):
    manager = pg.BlockManager(num_gpu_blocks=8, num_cpu_blocks=8, block_size=7)
    layers = [numbered_cache("HBSD", backend, num_blocks=8, seed=seed) for seed in range(2)]
    engine = pg.SwapEngine([cache for cache, _ in layers], num_host_blocks=8)
    manager.allocate("a", 40)
    before = manager.block_tables(["a"])[0]
    engine.swap_out(manager.swap_out("a"))
    engine.wait()  # what follows writes to the blocks that are free now
    manager.allocate("b", 30)
    for cache, dense in layers:
        ids = manager.block_tables(["b"])[0]
        pg.scatter_blocks(cache, ids, xp.zeros((len(ids), 2 * 7 * 3 * 40), dense[0].dtype))
    manager.free("b")
    engine.swap_in(manager.swap_in("a"))
    engine.synchronise()
    after = manager.block_tables(["a"])[0]
    for cache, dense in layers:
        for stored, expected in zip(cache.blocks(after), dense, strict=True):
            np.testing.assert_array_equal(stored, expected[before])


def test_the_engine_carries_out_transfers(backend):
    cache, dense = numbered_cache("BSHD", backend)
    engine = pg.SwapEngine([cache], num_host_blocks=3)
    from cupaged.memory.manager import Transfer

    pairs = np.array([[4, 2], [5, 0]], np.int32)
    engine.carry_out([Transfer("offload", pairs), Transfer("restore", np.array([[2, 1], [0, 3]], np.int32))])
    engine.synchronise()
    for array in dense:
        array[[1, 3]] = array[[4, 5]]
    assert_holds(cache, dense)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([[0, 9]], ValueError, "pairs must name blocks from 0 to below 9; got 9"),
        ([[-1, 0]], ValueError, "pairs must name blocks from 0 to below 9; got -1"),
        ([[0, 1], [2, 1]], ValueError, "pairs must write a block once; block 1 is written twice"),
        ([[0, 1], [1, 2]], ValueError, "block 1 is read and written"),
        ([[0, 1, 2]], ValueError, r"pairs must have shape \[num_pairs, 2\]; got \[1, 3\]"),
        ([[0.0, 1.0]], TypeError, "pairs must be integers; got dtype float64"),
    ],
)
def test_bad_pairs_are_refused_and_nothing_is_copied(pairs, error, message, backend):
    cache, dense = numbered_cache("BSHD", backend)
    with pytest.raises(error, match=message):
        pg.copy_blocks(cache, pairs)
    assert_holds(cache, dense)


def test_bad_swaps_are_refused(backend):
    cache, _ = numbered_cache("BSHD", backend)
    host = pg.HostBlocks(cache.config, 2)
    with pytest.raises(ValueError, match="blocks of the host from 0 to below 2; got 2"):
        pg.swap_blocks(cache, host, [[0, 2]])
    with pytest.raises(ValueError, match="pairs must write a block once; block 4 is written twice"):
        pg.swap_blocks(host, cache, [[0, 4], [1, 4]])
    with pytest.raises(TypeError, match="must be a KVCache and a HostBlocks; got KVCache and KVCache"):
        pg.swap_blocks(cache, cache, [[0, 1]])
    with pytest.raises(ValueError, match="caches must hold one cache at least"):
        pg.SwapEngine([], 3)
    pg.copy_blocks(cache, [])
    pg.swap_blocks(cache, host, [])


def test_blocks_that_vectors_cannot_read_are_refused(backend, xp):
    cache, _ = numbered_cache("BSHD", backend)
    elements = pg.gather_blocks(cache, [0]).shape[1]
    askew = xp.zeros(elements + 2, cache.config.numpy_dtype)[2:].reshape(1, elements)
    for call in (lambda: pg.gather_blocks(cache, [0], askew), lambda: pg.scatter_blocks(cache, [0], askew)):
        with pytest.raises(ValueError, match="must start on a 16-byte boundary"):
            call()


@pytest.mark.parametrize("ids", [(1, 1), [1, 1], np.array([1, 1])], ids=lambda ids: type(ids).__name__)
def test_a_block_that_is_scattered_twice_is_refused(ids, backend):
    cache, _ = numbered_cache("BSHD", backend)
    with pytest.raises(ValueError, match="block_ids must write a block once; block 1 is written twice"):
        pg.scatter_blocks(cache, ids, pg.gather_blocks(cache, [0, 2]))


@pytest.mark.gpu
def test_scattering_by_ids_on_the_host_reads_nothing_back(monkeypatch):
    cache, _ = numbered_cache("BSHD", "cuda")
    blocks = pg.gather_blocks(cache, [0, 2])
    read = []
    monkeypatch.setattr("cupaged.ops.blocks.as_numpy", lambda array: read.append(type(array)) or np.asarray(array))
    pg.scatter_blocks(cache, [1, 3], blocks)
    assert read and set(read) == {np.ndarray}
