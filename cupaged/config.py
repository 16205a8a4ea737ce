"""The shape of a cache, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cupaged.axes import LAYOUTS
from cupaged.errors import UnsupportedError, written
from cupaged.kinds import is_integer

__all__ = ["DTYPES", "CacheConfig"]

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class CacheConfig:
    """What a KV cache holds and how it lies in memory.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool.
    block_size : int
        Tokens in a block, 1 to 256.
    num_kv_heads : int
        KV heads.
    head_dim : int
        Dimensions of a head, 32 to 256 in steps of 8.
    dtype : {"float16", "bfloat16", "float32"}
        Storage type.
    layout : {"BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX"}
        Order of the axes, see `cupaged.layouts`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        Naming the field, what was expected and what came.
    """

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float16"
    layout: str = "BSHD"

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not is_integer(value):
                raise TypeError(f"{name} must be an integer; got {type(value).__name__} {written(value)}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {written(int(value))}")
            object.__setattr__(self, name, int(value))  # a NumPy integer would overflow in what follows
        if self.block_size > 256:
            raise UnsupportedError(f"block_size must lie in [1, 256]; got {written(self.block_size)}")
        if not 32 <= self.head_dim <= 256 or self.head_dim % 8 != 0:
            raise UnsupportedError(f"head_dim must lie in [32, 256] in steps of 8; got {written(self.head_dim)}")
        if self.num_blocks > 2**31 - 1:
            raise UnsupportedError(f"num_blocks must fit int32, the block tables' type; got {written(self.num_blocks)}")
        if 2 * self.block_size * self.num_kv_heads * self.head_dim > 2**31 - 1:
            raise UnsupportedError(
                f"num_kv_heads must leave a block below 2**30 elements; got {written(self.num_kv_heads)} heads of "
                f"{self.head_dim} in blocks of {self.block_size}"
            )
        for name in ("dtype", "layout"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"{name} must be a name; got {type(getattr(self, name)).__name__} {written(getattr(self, name))}"
                )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}")

    @property
    def numpy_dtype(self) -> np.dtype:
        """The storage type as a NumPy dtype."""
        return DTYPES[self.dtype]

    @property
    def num_slots(self) -> int:
        """Token slots in the pool."""
        return self.num_blocks * self.block_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * self.numpy_dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, keys and values."""
        return self.num_slots * self.bytes_per_token
