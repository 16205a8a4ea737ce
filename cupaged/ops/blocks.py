"""Whole blocks of a cache: copied within it, gathered into an array, scattered from one."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment, on_device
from cupaged.ops.checks import as_numpy, check_cache, check_contiguous, check_dtype, check_shape, must_validate
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import on_callers_streams
from cupaged.ops.textures import refresh_blocks
from cupaged.runtime.launch import CheckedCall, PreparedLaunch
from cupaged.runtime.select import load_kernel

__all__ = ["as_words", "block_elements", "copy_blocks", "gather_blocks", "halves", "prepare_move", "scatter_blocks"]

THREADS, VECTORS = 256, 4  # as in kernels_cu/cache/copy_blocks.cu
INT32 = np.dtype(np.int32)
MOST_BLOCKS_OF_A_GRID = 2**31 - 1


def block_elements(cache: KVCache) -> int:
    """Return the elements of a block: keys and values of all its slots."""
    config = cache.config
    return 2 * config.block_size * config.num_kv_heads * config.head_dim


@on_callers_streams
def copy_blocks(cache: KVCache, pairs: Any, *, validate: bool | None = None) -> None:
    """Copy blocks within a cache, as copy-on-write asks for it.

    Parameters
    ----------
    cache : KVCache
        Written in place.
    pairs : int [num_pairs, 2]
        (source, destination) blocks, on the host, as `BlockManager.append` returns them, or int32 on the device.
        All copies are made at once: no block may be written twice, or be both read and written.
    validate : bool, optional
        Read pairs that lie on a GPU and check them, which waits for it. The default does so if CUPAGED_VALIDATE is set
        to 1; pairs on the host are always checked.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was copied.
    """
    check_cache(cache)
    pairs = _as_ids(cache, pairs, "pairs", ("num_pairs", 2))
    check_apart({"cache": cache}, {"pairs": pairs})
    if must_validate(validate, cache.backend) or isinstance(pairs, np.ndarray):
        sources, targets = as_numpy(pairs).T
        _check_ids(cache, sources, "pairs")
        _check_ids(cache, targets, "pairs")
        _check_once(targets, "pairs")
        both = np.intersect1d(sources, targets)
        if both.size:
            raise ValueError(f"pairs must not read a block that they write; block {both[0]} is read and written")
    ids = _on_device(cache, pairs, "pairs").reshape(-1)
    of_cache = _strides_in_cache(cache)
    if len(ids):
        _prepared(cache, cache.storage, cache.storage, ids[1:], ids, of_cache, of_cache, len(ids) // 2, id_stride=2)()
    refresh_blocks(cache, ids[1::2])


@on_callers_streams
def gather_blocks(cache: KVCache, block_ids: Any, out: Any = None, *, validate: bool | None = None) -> Any:
    """Copy blocks of a cache into an array, one behind the other.

    Parameters
    ----------
    cache : KVCache
    block_ids : int [num_blocks]
        On the host, or int32 on the cache's device.
    out : array, [num_blocks, elements], optional
        Where to write them, of the cache's dtype; `elements` are those of a block's keys, then of its values, as they
        lie in the cache's layout.
    validate : bool, optional
        As in `copy_blocks`.

    Returns
    -------
    array, [num_blocks, elements]
        On the cache's backend.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    check_cache(cache)
    ids = _checked_ids(cache, block_ids, validate)
    shape = (ids.shape[0], block_elements(cache))
    if out is None:
        result = out = cache.xp.empty(shape, cache.config.numpy_dtype)
    else:
        result = as_backend_array(out, "out", cache.backend)
        _check_blocks(cache, result, "out", shape)
        check_apart({"out": result}, {"cache": cache, "block_ids": ids})
    if len(ids):
        strides = _strides_in_array(cache), _strides_in_cache(cache)
        _prepared(cache, halves(cache, result), cache.storage, None, ids, *strides, len(ids))()
    return out


@on_callers_streams
def scatter_blocks(cache: KVCache, block_ids: Any, blocks: Any, *, validate: bool | None = None) -> None:
    """Copy blocks from an array, as `gather_blocks` made it, into a cache; no block may come twice.

    Parameters and errors are those of `gather_blocks`; `blocks` is its result.
    """
    check_cache(cache)
    ids = _checked_ids(cache, block_ids, validate, once=True)
    blocks = as_backend_array(blocks, "blocks", cache.backend)
    _check_blocks(cache, blocks, "blocks", (ids.shape[0], block_elements(cache)))
    check_apart({"cache": cache}, {"block_ids": ids, "blocks": blocks})
    if len(ids):
        strides = _strides_in_cache(cache), _strides_in_array(cache)
        _prepared(cache, cache.storage, halves(cache, blocks), ids, None, *strides, len(ids))()
    refresh_blocks(cache, ids)


def _runs(cache: KVCache) -> tuple[int, int]:
    """Return into how many runs an array of the cache cuts a block, and the 16-byte vectors of a run."""
    runs = cache.config.num_kv_heads if cache.config.layout == "HBSD" else 1
    vectors = block_elements(cache) // len(cache.storage) * cache.config.numpy_dtype.itemsize // 16
    return runs, vectors // runs


def _strides_in_cache(cache: KVCache) -> tuple[int, int]:
    """Return the vectors from block to block, and from run to run, of an array of the cache."""
    _, vectors = _runs(cache)
    return vectors, cache.config.num_blocks * vectors


def _strides_in_array(cache: KVCache) -> tuple[int, int]:
    """Return the same of an array of gathered blocks."""
    runs, vectors = _runs(cache)
    return len(cache.storage) * runs * vectors, vectors


def halves(cache: KVCache, blocks: Any) -> tuple[Any, ...]:
    """Return where the parts from each of the cache's arrays begin in an array of gathered blocks."""
    flat = blocks.reshape(-1)
    step = block_elements(cache) // len(cache.storage)
    return tuple(flat[i * step :] for i in range(len(cache.storage)))


def as_words(arrays: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return one or two arrays as the kernel takes them; None is the second if there is one."""
    words = [array.reshape(-1).view(INT32) for array in arrays]
    return words[0], words[1] if len(words) > 1 else None


def prepare_move(cache: KVCache, ids: Any, blocks: Any, gather: bool) -> CheckedCall:
    """Return a launch that gathers as many blocks as there are ids, or scatters them, and checks nothing.

    Parameters
    ----------
    cache : KVCache
    ids : int32 [num_blocks]
        On the cache's backend.
    blocks : array, [num_blocks or more, elements]
        As `gather_blocks` fills it.
    gather : bool
        Whether to gather, or to scatter.

    Returns
    -------
    CheckedCall
        It takes `as_words` of what is written, then of what is read (a cache's storage, and `halves`), then ids: of
        this cache and these arrays, or of others that are like them in all but place and content.
    """
    array = halves(cache, blocks), _strides_in_array(cache)
    held = cache.storage, _strides_in_cache(cache)
    (to, to_strides), (source, from_strides) = (array, held) if gather else (held, array)
    to_ids, from_ids = (None, ids) if gather else (ids, None)
    launch = _prepared(cache, to, source, to_ids, from_ids, to_strides, from_strides, len(ids))
    names = ("first_to", "second_to", "first_from", "second_from", "from_ids" if gather else "to_ids")
    return CheckedCall((), launch, names)


def _prepared(
    cache: KVCache,
    to: tuple[Any, ...],
    source: tuple[Any, ...],
    to_ids: Any,
    from_ids: Any,
    to_strides: tuple[int, int],
    from_strides: tuple[int, int],
    count: int,
    id_stride: int = 1,
) -> PreparedLaunch:
    """Return the launch that copies `count` blocks, one at least, from the arrays of `source` to those of `to`."""
    (first_to, second_to), (first_from, second_from) = as_words(to), as_words(source)
    runs, vectors = _runs(cache)
    chunks = -(-vectors // (THREADS * VECTORS))
    kernel = load_kernel("cache/copy_blocks.cu", "copy_blocks", {}, cache.backend)
    at_once = max(1, MOST_BLOCKS_OF_A_GRID // (runs * chunks))
    if count > at_once:
        raise ValueError(f"a call must copy at most {at_once} blocks of this size; got {count}")
    return kernel.prepare(
        (count * runs * chunks, len(cache.storage)),
        (THREADS,),
        first_to=first_to,
        second_to=second_to,
        first_from=first_from,
        second_from=second_from,
        to_ids=to_ids,
        from_ids=from_ids,
        id_stride=id_stride,
        to_block_stride=to_strides[0],
        to_run_stride=to_strides[1],
        from_block_stride=from_strides[0],
        from_run_stride=from_strides[1],
        runs=runs,
        run_vectors=vectors,
        chunks=chunks,
    )


def _as_ids(cache: KVCache, ids: Any, name: str, shape: tuple[int | str, ...]) -> Any:
    """Return ids as int32, where they lie."""
    if isinstance(ids, list | tuple | np.ndarray):
        array = np.asarray(ids)
        if array.size == 0:
            array = array.reshape([size if isinstance(size, int) else 0 for size in shape]).astype(INT32)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers; got dtype {array.dtype}")
        check_shape(array, name, shape)
        return array.astype(np.int64) if array.dtype != INT32 else array
    array = as_backend_array(ids, name, cache.backend)
    check_dtype(array, name, INT32)
    check_shape(array, name, shape)
    return array


def _checked_ids(cache: KVCache, block_ids: Any, validate: bool | None, once: bool = False) -> Any:
    """Return block ids as int32 on the cache's device, checked if they lie on the host or it is asked for."""
    ids = _as_ids(cache, block_ids, "block_ids", ("num_blocks",))
    if must_validate(validate, cache.backend) or isinstance(ids, np.ndarray):
        _check_ids(cache, as_numpy(ids), "block_ids")
        if once:
            _check_once(as_numpy(ids), "block_ids")
    return _on_device(cache, ids, "block_ids")


def _on_device(cache: KVCache, ids: Any, name: str) -> Any:
    """Return ids as int32, in one piece on the cache's device."""
    if isinstance(ids, np.ndarray):
        ids = ids.astype(INT32, copy=False)
    return cache.xp.ascontiguousarray(on_device(ids, name, cache.backend))


def _check_ids(cache: KVCache, ids: np.ndarray, name: str) -> None:
    wrong = (ids < 0) | (ids >= cache.config.num_blocks)
    if wrong.any():
        raise ValueError(
            f"{name} must name blocks from 0 to below {cache.config.num_blocks}; got {ids[np.argmax(wrong)]}"
        )


def _check_once(ids: np.ndarray, name: str) -> None:
    written, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{name} must write a block once; block {written[np.argmax(counts > 1)]} is written twice")


def _check_blocks(cache: KVCache, blocks: Any, name: str, shape: tuple[int, int]) -> None:
    check_dtype(blocks, name, cache.config.numpy_dtype)
    check_shape(blocks, name, shape)
    check_contiguous(blocks, name)
    if blocks.size:
        check_alignment(blocks, name)
