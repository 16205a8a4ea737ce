"""Operations on the cache itself: appending new keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment
from cupaged.ops.checks import check_cache, check_contiguous, check_dtype, check_shape, check_slots, must_validate
from cupaged.runtime.arguments import Strided
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["append_kv"]

THREADS = 256


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
        checked = cache.appends.find((config,), given)
        if checked is not None:
            checked.launch(*given, cache.key, cache.value)
            _refresh_textures(cache, slot_mapping)
            return
    key, value, slot_mapping = (
        as_backend_array(array, name, cache.backend)
        for array, name in ((key, "key"), (value, "value"), (slot_mapping, "slot_mapping"))
    )
    for array, name in ((key, "key"), (value, "value")):
        check_dtype(array, name, config.numpy_dtype)
        check_shape(array, name, ("num_tokens", config.num_kv_heads, config.head_dim))
    check_shape(value, "value", key.shape)
    check_dtype(slot_mapping, "slot_mapping", np.dtype(np.int32), np.dtype(np.int64))
    check_shape(slot_mapping, "slot_mapping", (key.shape[0],))
    for array, name in ((key, "key"), (value, "value"), (slot_mapping, "slot_mapping")):
        check_contiguous(array, name)
    if key.size == 0:
        return
    check_alignment(key, "key")
    check_alignment(value, "value")
    if must_validate(validate, cache.backend):
        check_slots(cache, slot_mapping)

    key_strides, value_strides = layouts.kv_strides(config, "key"), layouts.kv_strides(config, "value")
    kernel = load_kernel(
        "cache/append_kv.cu",
        "append_kv",
        {
            "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
            "SLOT": C_TYPE_OF_DTYPE[slot_mapping.dtype],
            "HEAD_DIM": config.head_dim,
            "BLOCK_SIZE": config.block_size,
            "KEY_PACK": key_strides.pack_size,
            "VALUE_PACK": value_strides.pack_size,
        },
        cache.backend,
    )
    vectors = key.size // (16 // config.numpy_dtype.itemsize)
    launch = kernel.prepare(
        (-(-vectors // THREADS),),
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
    _refresh_textures(cache, slot_mapping)


def _refresh_textures(cache: KVCache, slot_mapping: Any) -> None:
    """Write what was appended to the arrays that textures read, where there are any."""
    for textures in cache.textures.values():
        textures.refresh(slot_mapping)
