"""Appending new keys and values to a cache, as they are or rotated by their positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.errors import UnsupportedError, written
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import VECTOR_BYTES, as_backend_array, check_alignment, empty_for, like_caller
from cupaged.ops.checks import (
    check_cache,
    check_contiguous,
    check_dtype,
    check_positions,
    check_shape,
    check_slots,
    checked_flag,
    checked_integer,
    checked_real,
    must_validate,
)
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import on_callers_streams
from cupaged.ops.textures import refresh_slots
from cupaged.runtime.arguments import Strided
from cupaged.runtime.captures import refuse_in_capture
from cupaged.runtime.launch import remembered
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["Llama3Scaling", "append_kv", "frequencies", "rope_append_kv"]

THREADS = 256
ROPE_THREADS = 128
ROPE_BLOCKS = 1024  # several for each of a GPU's multiprocessors
TILE_TOKENS, TILE_VECTORS = 16, 2  # as in kernels_cu/include/column_tile.cuh
MAX_POSITION = 2**24  # up to which float32 holds every integer


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3 stretches RoPE for contexts longer than it was first trained on.

    Frequencies that turn at least `high_freq_factor` times over the original context stay, those that turn at most
    `low_freq_factor` times are divided by `factor`, and those between are mixed.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context"):
            _checked_positive(getattr(self, name), name)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor, {self.low_freq_factor}, and finite; "
                f"got {self.high_freq_factor!r}"
            )


def _checked_positive(number: Any, name: str) -> float:
    checked = checked_real(number, name)
    if checked <= 0:
        raise ValueError(f"{name} must be positive and finite; got {written(number)}")
    return checked


def frequencies(rotary_dim: int, theta: float = 10000.0, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """Return RoPE's angle of each pair of dimensions a position, in radians, float64 [rotary_dim / 2]."""
    plain: np.ndarray = _checked_positive(theta, "theta") ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    if scaling is None:
        return plain
    turns = scaling.original_context * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling.factor)


def append_kv(cache: KVCache, key: Any, value: Any, slot_mapping: Any, *, validate: bool | None = None) -> None:
    """Write new tokens' keys and values into their slots.

    Parameters
    ----------
    cache : KVCache
        Written in place.
    key, value : array, [num_tokens, Hkv, D]
        In the cache's dtype.
    slot_mapping : array, int32 or int64 [num_tokens]
        ``block_id * block_size + offset`` for each token; -1 skips it. No slot may come twice.
    validate : bool, optional
        Read `slot_mapping` and check it, which on a GPU waits for it. The default reads it on the host backend only,
        or everywhere if CUPAGED_VALIDATE is set to 1.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was written.
    """
    check_cache(cache)
    config, given = cache.config, (key, value, slot_mapping)
    if not must_validate(validate, cache.backend):
        checked = cache.appends.find((config,), given, cache.bounds)
        if checked is not None:
            checked.launch(*given, cache.key, cache.value)
            refresh_slots(cache, slot_mapping)
            return
    _append_checked(cache, key, value, slot_mapping, validate)


@on_callers_streams
def _append_checked(cache: KVCache, key: Any, value: Any, slot_mapping: Any, validate: bool | None) -> None:
    """Check a call of `append_kv`, launch it, and let the cache remember it."""
    config, given = cache.config, (key, value, slot_mapping)
    key, value, slot_mapping = _checked_tokens(cache, key, value, slot_mapping)
    check_apart({"cache": cache}, {"key": key, "value": value, "slot_mapping": slot_mapping})
    if key.size == 0:
        return
    if must_validate(validate, cache.backend):
        check_slots(cache, slot_mapping)

    key_strides, value_strides = layouts.kv_strides(config, "key"), layouts.kv_strides(config, "value")
    kernel = load_kernel(
        "cache/append_kv.cu",
        "append_kv",
        _append_defines(cache, slot_mapping),
        cache.backend,
    )
    tokens, vectors = key.shape[0], config.num_kv_heads * config.head_dim * config.numpy_dtype.itemsize // 16
    threads = tokens * vectors
    if value_strides.pack_size == 1:  # warps take tiles
        threads = -(-tokens // TILE_TOKENS) * -(-vectors // TILE_VECTORS) * 32
    launch = kernel.prepare(
        (-(-threads // THREADS),),
        (THREADS,),
        key_cache=Strided(cache.key),
        value_cache=Strided(cache.value),
        key=key,
        value=value,
        slot_mapping=slot_mapping,
        num_tokens=key.shape[0],
        num_kv_heads=config.num_kv_heads,
        **layouts.stride_arguments(key_strides, value_strides),
    )
    launch()
    cache.appends.add((config,), given, launch, ("key", "value", "slot_mapping", "key_cache", "value_cache"))
    refresh_slots(cache, slot_mapping)


def rope_append_kv(
    cache: KVCache,
    key: Any,
    value: Any,
    slot_mapping: Any,
    positions: Any,
    *,
    query: Any = None,
    rotary_dim: int | None = None,
    theta: float = 10000.0,
    interleaved: bool = False,
    scaling: Llama3Scaling | None = None,
    validate: bool | None = None,
) -> Any:
    """Rotate new tokens' keys by their positions, and write them with their values into their slots.

    Parameters
    ----------
    cache : KVCache
        Written in place.
    key, value : array, [num_tokens, Hkv, D]
        In the cache's dtype. A token's heads lie side by side; between tokens there may be other things, so that query,
        key and value can be views of what one product made.
    slot_mapping : array, int32 or int64 [num_tokens]
        As `append_kv` takes it; the query of a token that is skipped is rotated all the same.
    positions : array, int32 [num_tokens]
        From 0 to below 2**24.
    query : array, [num_tokens, H, D], optional
        To be rotated too; it lies as keys do.
    rotary_dim : int, optional
        Dimensions that turn, the first ones; all D if not given. A multiple of 16 (of 8 in float32).
    theta : float
        RoPE's base.
    interleaved : bool
        Whether neighbouring dimensions turn together (GPT-J), or dimension i and i + rotary_dim / 2 (GPT-NeoX, Llama).
    scaling : Llama3Scaling, optional
        Of the frequencies.
    validate : bool, optional
        As `append_kv` takes it; reads the positions too.

    Returns
    -------
    array, of the query's shape, or None
        The rotated query, C-contiguous; `query` stays as it is.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was written.
    UnsupportedError
        If `rotary_dim` is not served; the message names the limit.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
    """
    check_cache(cache)
    config, validates = cache.config, must_validate(validate, cache.backend)
    options = (config, cache.device, rotary_dim, theta, interleaved, scaling)
    given = (key, value, slot_mapping, positions, query)
    checked = None if validates else remembered("rope_append_kv", cache.backend).find(options, given, cache.bounds)
    if checked is not None:
        rotated = None if query is None else cache.xp.empty(query.shape, query.dtype)
        checked.launch(
            *given, cache.key, cache.value, rotated, _turns(cache, rotary_dim or config.head_dim, theta, scaling)
        )
        refresh_slots(cache, slot_mapping)
        return rotated
    return _rotate_checked(cache, *given, options, validates, rotary_dim, theta, interleaved, scaling)


@on_callers_streams
def _rotate_checked(
    cache: KVCache,
    key: Any,
    value: Any,
    slot_mapping: Any,
    positions: Any,
    query: Any,
    options: tuple[Any, ...],
    validates: bool,
    rotary_dim: int | None,
    theta: float,
    interleaved: bool,
    scaling: Llama3Scaling | None,
) -> Any:
    """Check a call of `rope_append_kv`, launch it, and remember it by its options."""
    config, caller, given = cache.config, query, (key, value, slot_mapping, positions, query)
    key, value, slot_mapping = _checked_tokens(cache, key, value, slot_mapping, between=True)
    positions = as_backend_array(positions, "positions", cache.backend)
    check_dtype(positions, "positions", np.dtype(np.int32))
    check_shape(positions, "positions", (key.shape[0],))
    check_contiguous(positions, "positions")
    if query is not None:
        query = checked_rows(cache, query, "query", key.shape[0], "H", between=True)
    check_apart(
        {"cache": cache},
        {"key": key, "value": value, "slot_mapping": slot_mapping, "positions": positions, "query": query},
    )
    rotary_dim = config.head_dim if rotary_dim is None else rotary_dim
    step = 2 * (16 // config.numpy_dtype.itemsize)
    rotary_dim = checked_integer(rotary_dim, "rotary_dim")
    checked_flag(interleaved, "interleaved")
    if not 0 < rotary_dim <= config.head_dim or rotary_dim % step:
        raise UnsupportedError(
            f"rotary_dim must be a multiple of {step}, at most the head_dim {config.head_dim}; "
            f"got {written(rotary_dim)}"
        )
    _checked_positive(theta, "theta")
    if scaling is not None and not isinstance(scaling, Llama3Scaling):
        raise TypeError(f"scaling must be a Llama3Scaling; got {type(scaling).__name__}")
    if validates:
        check_slots(cache, slot_mapping)
        check_positions(positions, MAX_POSITION)
    rotated = None if query is None else empty_for(caller, query.shape, query.dtype, cache.backend)
    if key.shape[0]:
        key_strides, value_strides = layouts.kv_strides(config, "key"), layouts.kv_strides(config, "value")
        defines = {
            **_append_defines(cache, slot_mapping),
            "ROTARY_DIM": rotary_dim,
            "INTERLEAVED": int(interleaved),
        }
        kernel = load_kernel("cache/rope_append_kv.cu", "rope_append_kv", defines, cache.backend)
        heads = max(config.num_kv_heads, 0 if query is None else query.shape[1])
        launch = kernel.prepare(
            _rope_grid(key.shape[0], heads, in_tiles=value_strides.pack_size == 1),
            (ROPE_THREADS,),
            key_cache=Strided(cache.key),
            value_cache=Strided(cache.value),
            rotated=rotated,
            query=Strided(query),
            key=Strided(key),
            value=Strided(value),
            slot_mapping=slot_mapping,
            positions=positions,
            turns=_turns(cache, rotary_dim, float(theta), scaling),
            num_heads=0 if query is None else query.shape[1],
            num_kv_heads=config.num_kv_heads,
            query_stride=0 if query is None else _token_stride(query),
            key_stride=_token_stride(key),
            value_stride=_token_stride(value),
            **layouts.stride_arguments(key_strides, value_strides),
            num_tokens=key.shape[0],
        )
        launch()
        arrays = ("key", "value", "slot_mapping", "positions", "query", "key_cache", "value_cache", "rotated", "turns")
        remembered("rope_append_kv", cache.backend).add(options, given, launch, arrays)
        refresh_slots(cache, slot_mapping)
    return None if rotated is None else like_caller(rotated, caller)


def _rope_grid(tokens: int, heads: int, in_tiles: bool) -> tuple[int, ...]:
    """Return a block a token; in tiles of tokens, which are few, blocks share the heads of one, if need be all."""
    if not in_tiles:
        return (tokens,)
    tiles = -(-tokens // TILE_TOKENS)
    return tiles, min(heads, -(-ROPE_BLOCKS // tiles))


def _turns(cache: KVCache, rotary_dim: int, theta: float, scaling: Llama3Scaling | None) -> Any:
    """Return turns a position as two floats, float32 [2, rotary_dim / 2], on the cache's device; made once."""
    name = (rotary_dim, theta, scaling)
    if name not in cache.turns:
        refuse_in_capture(cache.backend, "rope_append_kv must have uploaded its angles by a call before")
        exact = frequencies(rotary_dim, theta, scaling) / (2 * math.pi)
        high = exact.astype(np.float32)
        cache.turns.setdefault(name, cache.xp.asarray(np.stack([high, (exact - high).astype(np.float32)])))
    return cache.turns[name]


def _token_stride(rows: Any) -> int:
    """Return how many elements lie from one token to the next."""
    return int(rows.strides[0] // rows.dtype.itemsize)


def _checked_tokens(
    cache: KVCache, key: Any, value: Any, slot_mapping: Any, *, between: bool = False
) -> tuple[Any, Any, Any]:
    """Return keys, values and slots as the backend's own arrays, or raise by name."""
    heads = cache.config.num_kv_heads
    key = checked_rows(cache, key, "key", "num_tokens", heads, between=between)
    value = checked_rows(cache, value, "value", "num_tokens", heads, between=between)
    check_shape(value, "value", key.shape)
    slot_mapping = as_backend_array(slot_mapping, "slot_mapping", cache.backend)
    check_dtype(slot_mapping, "slot_mapping", np.dtype(np.int32), np.dtype(np.int64))
    check_shape(slot_mapping, "slot_mapping", (key.shape[0],))
    check_contiguous(slot_mapping, "slot_mapping")
    return key, value, slot_mapping


def checked_rows(
    cache: KVCache, array: Any, name: str, num_rows: int | str, heads: int | str, *, between: bool = False
) -> Any:
    """Return [num_rows, heads, D] in the cache's dtype as the backend's own array, or raise by name.

    `between` says whether there may be other things, whole vectors of them, between a row of heads and the next.
    """
    array = as_backend_array(array, name, cache.backend)
    check_dtype(array, name, cache.config.numpy_dtype)
    check_shape(array, name, (num_rows, heads, cache.config.head_dim))
    if between and array.shape[0] > 1:
        check_contiguous(array[0], f"{name}[0]")
        if array.strides[0] % VECTOR_BYTES:
            raise ValueError(
                f"{name} must have a multiple of {VECTOR_BYTES} bytes from one token to the next; "
                f"got {array.strides[0]}"
            )
    else:
        check_contiguous(array, name)
    if array.size:
        check_alignment(array, name)
    return array


def _append_defines(cache: KVCache, slot_mapping: Any) -> dict[str, object]:
    """Return what a kernel that appends is specialised to."""
    config = cache.config
    return {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "SLOT": C_TYPE_OF_DTYPE[slot_mapping.dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
        "KEY_PACK": layouts.kv_strides(config, "key").pack_size,
        "VALUE_PACK": layouts.kv_strides(config, "value").pack_size,
    }
