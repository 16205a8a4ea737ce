"""What the wrappers check before a launch: an argument's name, what was expected, what came."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from cupaged.errors import UnsupportedError, written
from cupaged.kinds import is_integer
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import as_backend_array, check_alignment
from cupaged.ops.overlap import check_apart
from cupaged.runtime.environment import environment_flag

__all__ = [
    "as_float32",
    "as_numpy",
    "as_real",
    "check_at_least_one",
    "check_block_tables",
    "check_cache",
    "check_contiguous",
    "check_dtype",
    "check_positions",
    "check_query_start",
    "check_query_to_seq",
    "check_shape",
    "check_shared_prefix",
    "check_slots",
    "checked_flag",
    "checked_heads",
    "checked_integer",
    "checked_out",
    "checked_real",
    "checked_scale",
    "checked_shared_prefix",
    "checked_softcap",
    "checked_window",
    "must_validate",
]

INT32_MAX = 2**31 - 1  # the largest integer that a kernel takes for a size
FLOAT32_MIN, FLOAT32_MAX = 2.0**-149, float(np.finfo(np.float32).max)
MAX_SCALE = FLOAT32_MAX * math.log(2)  # which float32 holds in units of log 2
SOFTCAP_RANGE = (1e-30, 1e30)  # within it, float32 holds the cap, its inverse and what they become in units of log 2


def check_cache(cache: Any) -> None:
    """Raise TypeError unless `cache` is a KVCache."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache; got {type(cache).__module__}.{type(cache).__name__}")


def checked_integer(number: Any, name: str, low: int | None = None, high: int = INT32_MAX, note: str = "") -> int:
    """Return an integer from `low` to `high`, Python's own, or raise by name; `note` says what it counts."""
    if type(number) is not int and not is_integer(number):
        raise TypeError(f"{name} must be an integer{note}; got {type(number).__name__} {written(number)}")
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}{note}; got {written(int(number))}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}{note}; got {written(int(number))}")
    return int(number)


def checked_real(number: Any, name: str, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> float:
    """Return a finite number from `low` to `high`, or raise by name; float32 holds it."""
    if not (isinstance(number, float | np.floating) or is_integer(number)):
        raise TypeError(f"{name} must be a real number; got {type(number).__name__} {written(number)}")
    value = number if isinstance(number, int) else float(number)  # a float16 cannot be compared with the limits
    if low == -FLOAT32_MAX and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {number!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {written(number)}")
    return float(value)


def checked_heads(num_heads: Any, cache: KVCache) -> int:
    """Return a number of query heads, or raise by name unless each KV head serves as many of them."""
    of_cache, number = cache.config.num_kv_heads, checked_integer(num_heads, "num_heads")
    if number < 1 or number % of_cache:
        raise ValueError(f"num_heads must be a multiple of the cache's {of_cache} KV heads; got {written(number)}")
    return number


def checked_flag(flag: Any, name: str) -> bool:
    """Return True or False, or raise by name: what only counts as true may be a mistake."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {type(flag).__name__} {written(flag)}")
    return bool(flag)


def check_at_least_one(number: Any, name: str) -> None:
    """Raise unless `number` is an integer, 1 or more, that a kernel can take."""
    checked_integer(number, name, 1)


def checked_window(window: Any) -> int | None:
    """Return a window in tokens, or None where there is none; one beyond int32 hides as little as its largest."""
    if window is None:
        return None
    if isinstance(window, int) and window > INT32_MAX:
        return INT32_MAX
    number = checked_integer(window, "window", note=", in tokens")
    if number < 1:
        raise ValueError(f"window must be at least 1, the query's own token; got {written(number)}")
    return number


def checked_softcap(softcap: Any) -> float | None:
    """Return the bound of the logits, or None where there is none, or raise by name."""
    if softcap is None:
        return None
    return checked_real(softcap, "softcap", *SOFTCAP_RANGE)


def check_shape(array: Any, name: str, shape: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `array` has `shape`; a string in it stands for any size and says what it is."""
    fits = array.ndim == len(shape) and all(
        isinstance(expected, str) or size == expected for size, expected in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}]; got {list(array.shape)}")


def check_dtype(array: Any, name: str, *dtypes: np.dtype) -> None:
    """Raise TypeError unless `array` has one of the dtypes."""
    if array.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {expected}; got {array.dtype}")


def check_contiguous(array: Any, name: str) -> None:
    """Raise ValueError unless `array` is C-contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous; got shape {array.shape} with strides {array.strides} (bytes)")


def must_validate(validate: bool | None, backend: str) -> bool:
    """Whether to read arrays before the launch: as asked, else CUPAGED_VALIDATE, else only where reading is free."""
    if validate is not None:
        return validate if validate is True or validate is False else checked_flag(validate, "validate")
    return environment_flag("CUPAGED_VALIDATE") or backend == "host"


def check_block_tables(
    cache: KVCache, block_tables: Any, seq_lens: Any, query_tokens: Any = 1, window: int | None = None
) -> None:
    """Raise ValueError if a length is negative or beyond the table, or a used table entry is no block of the cache.

    Entries are used from the first that the earliest of `query_tokens`, a number or one for each sequence, sees through
    its window.
    """
    tables, lens = as_numpy(block_tables), as_numpy(seq_lens).astype(np.int64)
    block_size, num_blocks = cache.config.block_size, cache.config.num_blocks
    capacity = tables.shape[1] * block_size
    for wrong, expected in ((lens < 0, "at least 0"), (lens > capacity, f"at most {capacity}, what the table maps")):
        if wrong.any():
            seq = int(np.argmax(wrong))
            raise ValueError(f"seq_lens must be {expected}; seq_lens[{seq}] is {lens[seq]}")
    first = np.zeros_like(lens) if window is None else np.maximum(lens - query_tokens - window + 1, 0)
    entries = np.arange(tables.shape[1])
    used = (entries >= (first // block_size)[:, None]) & (entries < -(-lens // block_size)[:, None])
    wrong = used & ((tables < -1) | (tables >= num_blocks))
    if wrong.any():
        seq, entry = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"block_tables must hold block ids below {num_blocks}, or -1 where unmapped; "
            f"block_tables[{seq}, {entry}] is {tables[seq, entry]}"
        )


def checked_shared_prefix(
    shared_prefix: Any, block_size: int, window: int | None = None, max_blocks: int | None = None
) -> int:
    """Return `shared_prefix`, in tokens, or raise by name unless it is whole blocks, and there is no window."""
    whole = f"whole blocks, a multiple of {block_size} tokens"
    if is_integer(shared_prefix) and shared_prefix < 0:
        raise ValueError(f"shared_prefix must be {whole}; got {written(int(shared_prefix))}")
    shared_prefix = checked_integer(shared_prefix, "shared_prefix", 0, note=", in tokens")
    if shared_prefix % block_size:
        raise ValueError(f"shared_prefix must be {whole}; got {shared_prefix}")
    if max_blocks is not None and shared_prefix > max_blocks * block_size:
        raise ValueError(
            f"shared_prefix must be at most {max_blocks * block_size}, what the table maps; got {shared_prefix}"
        )
    if shared_prefix and window is not None:
        raise UnsupportedError(
            "shared_prefix must be left out where there is a window, which hides another part of it from each "
            f"sequence; got shared_prefix {shared_prefix} and window {window}"
        )
    return shared_prefix


def check_shared_prefix(
    shared_prefix: int, block_size: int, block_tables: Any, seq_lens: Any, query_tokens: int = 1
) -> None:
    """Raise ValueError unless all rows begin with the same blocks, and all query tokens stand behind these.

    A sequence of length 0 may share a prefix, of which it sees nothing.
    """
    if not shared_prefix:
        return
    tables, lens = as_numpy(block_tables), as_numpy(seq_lens).astype(np.int64)
    tables = tables[:, : shared_prefix // block_size]
    differs = tables != tables[:1]
    if differs.any():
        seq, entry = (int(i) for i in np.argwhere(differs)[0])
        raise ValueError(
            f"block_tables must have the same blocks in all rows for the shared prefix of {shared_prefix} tokens; "
            f"block_tables[{seq}, {entry}] is {tables[seq, entry]}, and {tables[0, entry]} in row 0"
        )
    short = (lens != 0) & (lens < shared_prefix + query_tokens)
    if short.any():
        seq = int(np.argmax(short))
        raise ValueError(
            f"seq_lens must be 0 or count the shared prefix of {shared_prefix} tokens and the query tokens, "
            f"{shared_prefix + query_tokens} at least; seq_lens[{seq}] is {lens[seq]}"
        )


def check_positions(positions: Any, end: int) -> None:
    """Raise ValueError unless all positions lie from 0 to below `end`."""
    given = as_numpy(positions)
    wrong = (given < 0) | (given >= end)
    if wrong.any():
        token = int(np.argmax(wrong))
        raise ValueError(f"positions must lie from 0 to below {end}; positions[{token}] is {given[token]}")


def check_query_start(query_start: Any, total_tokens: int) -> None:
    """Raise ValueError unless the entries rise from 0 to the number of query tokens."""
    starts = as_numpy(query_start).astype(np.int64)
    if starts[0] != 0 or starts[-1] != total_tokens:
        raise ValueError(
            f"query_start must begin with 0 and end with the number of query tokens, {total_tokens}; "
            f"it begins with {starts[0]} and ends with {starts[-1]}"
        )
    falls = np.diff(starts) < 0
    if falls.any():
        seq = int(np.argmax(falls))
        raise ValueError(
            f"query_start must not fall; query_start[{seq}] is {starts[seq]}, "
            f"and query_start[{seq + 1}] {starts[seq + 1]}"
        )


def check_query_to_seq(query_to_seq: Any, num_seqs: int) -> None:
    """Raise ValueError if an entry, where there is such an array, is no sequence."""
    if query_to_seq is None:
        return
    seqs = as_numpy(query_to_seq)
    wrong = (seqs < 0) | (seqs >= num_seqs)
    if wrong.any():
        query = int(np.argmax(wrong))
        raise ValueError(
            f"query_to_seq must hold sequences from 0 to below {num_seqs}; query_to_seq[{query}] is {seqs[query]}"
        )


def check_slots(cache: KVCache, slot_mapping: Any) -> None:
    """Raise ValueError if a slot is no slot of the cache, or two tokens go to the same one."""
    slots = as_numpy(slot_mapping)
    wrong = (slots < -1) | (slots >= cache.config.num_slots)
    if wrong.any():
        token = int(np.argmax(wrong))
        raise ValueError(
            f"slot_mapping must hold slots below {cache.config.num_slots}, or -1 to skip a token; "
            f"slot_mapping[{token}] is {slots[token]}"
        )
    written, counts = np.unique(slots[slots >= 0], return_counts=True)
    if (counts > 1).any():
        twice = int(written[np.argmax(counts > 1)])
        tokens = np.flatnonzero(slots == twice)[:2].tolist()
        raise ValueError(f"slot_mapping must name a slot once; slot {twice} is given to tokens {tokens}")


def as_real(value: Any) -> float:
    """Return a number as a float: a finite one stays finite, and one that is not 0 stays so, however large or small."""
    sign = 1.0 if value > 0 else -1.0
    try:
        number = float(value)
    except OverflowError:  # a whole number or a fraction beyond all floats
        number = sign * math.inf
    if math.isinf(number) and abs(value) != math.inf:
        return sign * sys.float_info.max
    if number == 0 and value != 0:
        return sign * math.ulp(0.0)
    return number


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return float64 numbers as float32: positive ones beyond its range as the largest and the smallest that it has."""
    within = np.clip(values, FLOAT32_MIN, FLOAT32_MAX)
    return np.where(values > 0, within, values).astype(np.float32)


def checked_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the logits, ``1 / sqrt(head_dim)`` if none is given, or raise by name."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, float) and math.isfinite(scale) and abs(scale) > MAX_SCALE:
        raise ValueError(f"scale must be at most {MAX_SCALE:.3g} either way, as logits are float32; got {scale!r}")
    scale = checked_real(scale, "scale")
    if abs(scale) > MAX_SCALE:
        raise ValueError(f"scale must be at most {MAX_SCALE:.3g} either way, as logits are float32; got {scale!r}")
    return scale


def checked_out(out: Any, query: Any, cache: KVCache, **read: Any) -> Any:
    """Return `out` as the backend's own array, or raise by name unless a result like `query` can be written to it.

    `read` are the call's other arrays, the backend's own, which it must not overlap either.
    """
    array = as_backend_array(out, "out", cache.backend)
    check_dtype(array, "out", query.dtype)
    check_shape(array, "out", query.shape)
    check_contiguous(array, "out")
    if array.size:
        check_alignment(array, "out")
    check_apart({"out": array}, {"query": query, "cache": cache, **read})
    return array


def as_numpy(array: Any) -> np.ndarray:
    """Return a NumPy or CuPy array as NumPy."""
    return array.get() if hasattr(array, "get") else np.asarray(array)
