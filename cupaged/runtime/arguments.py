"""Arguments of a launch: checked and typed by the kernel's signature, the same way on both backends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.runtime.source import Parameter

__all__ = ["Strided", "check_array", "check_extent", "check_names", "typed_scalar"]

MAX_THREADS_PER_BLOCK = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)


@dataclass(frozen=True)
class Strided:
    """Marks an array whose strides the caller passes to the kernel as well; any other array must be contiguous."""

    array: Any


def check_names(kernel: str, parameters: tuple[Parameter, ...], arguments: Mapping[str, Any]) -> None:
    """Raise TypeError unless `arguments` has exactly the kernel's parameter names."""
    expected = [p.name for p in parameters]
    if expected == list(arguments):
        return
    missing = [name for name in expected if name not in arguments]
    unknown = [name for name in arguments if name not in expected]
    if missing or unknown:
        raise TypeError(f"{kernel}: missing arguments {missing}, unknown arguments {unknown}; it takes {expected}")


def typed_scalar(kernel: str, parameter: Parameter, value: Any) -> np.generic:
    """Return `value` as a NumPy scalar of the parameter's own width.

    Raises
    ------
    TypeError
        If `value` is not a number of the parameter's kind.
    ValueError
        If the parameter's type cannot hold it.
    """
    dtype, where = parameter.dtype, f"{kernel}: argument {parameter.name}"
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if dtype.kind in "iub":
        if not isinstance(value, Integral):
            raise TypeError(f"{where} must be an integer ({parameter.c_type}); got {type(value).__name__} {value!r}")
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if not low <= int(value) <= high:
            raise ValueError(f"{where} must lie in [{low}, {high}] ({parameter.c_type}); got {value}")
        return dtype.type(int(value))
    if not isinstance(value, Real):
        raise TypeError(f"{where} must be a real number ({parameter.c_type}); got {type(value).__name__} {value!r}")
    largest = float(ml_dtypes.finfo(dtype).max)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{where} must be at most {largest:g} ({parameter.c_type}); got a larger integer") from None
    if math.isfinite(number) and abs(number) > largest:
        raise ValueError(f"{where} must be at most {largest:g} ({parameter.c_type}); got {value!r}")
    return dtype.type(number)


def check_array(kernel: str, parameter: Parameter, array: Any, address: int, *, contiguous: bool) -> None:
    """Raise unless `array`, of the backend's own kind, has the parameter's dtype, and is aligned and contiguous."""
    where = f"{kernel}: argument {parameter.name}"
    if array.dtype != parameter.dtype:
        raise TypeError(f"{where} must have dtype {parameter.dtype}; got {array.dtype}")
    if address % parameter.dtype.itemsize:
        raise ValueError(
            f"{where} must start at a multiple of its {parameter.dtype.itemsize} bytes; got address {address}"
        )
    if contiguous and not array.flags.c_contiguous:
        raise ValueError(
            f"{where} must be C-contiguous; got shape {array.shape} with strides {array.strides} (bytes). "
            f"Pass a contiguous copy, or Strided(array) where the kernel takes the strides"
        )


def check_extent(kernel: str, grid: tuple[int, ...], block: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return `grid` and `block` with three axes each, or raise ValueError if CUDA allows no such launch."""
    sizes = []
    for name, extent, limit in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        full = (*extent, 1, 1, 1)[:3]
        if not 1 <= len(extent) <= 3 or any(not 1 <= n <= most for n, most in zip(full, limit, strict=True)):
            raise ValueError(f"{kernel}: {name} must be 1 to 3 sizes, each from 1 to at most {limit}; got {extent}")
        sizes.append(tuple(int(n) for n in full))
    if math.prod(sizes[1]) > MAX_THREADS_PER_BLOCK:
        raise ValueError(f"{kernel}: block must have at most {MAX_THREADS_PER_BLOCK} threads; got {block}")
    return sizes[0], sizes[1]
