"""Arguments of a launch: checked and typed by the kernel's signature, the same way on both backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.runtime.source import Parameter

__all__ = [
    "Strided",
    "address_of",
    "argument_converters",
    "byte_bounds",
    "check_array",
    "check_extent",
    "typed_scalar",
    "typed_values",
]

MAX_THREADS_PER_BLOCK = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
NULL = np.uint64(0)  # what a kernel gets for None


@dataclass(frozen=True)
class Strided:
    """Marks an array whose strides the caller passes to the kernel as well; any other array must be contiguous."""

    array: Any


def address_of(array: Any) -> int:
    """Return where the first element of an array lies, NumPy's or CuPy's."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def byte_bounds(array: Any) -> tuple[int, int]:
    """Return the addresses between which an array lies, NumPy's or CuPy's, with any strides; equal ones if it is empty.

    An array with gaps counts from its first byte to its last.
    """
    start = address_of(array)
    if array.size == 0:
        return start, start
    if array.flags.c_contiguous:
        return start, start + array.nbytes
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    before, behind = sum(min(0, step) for step in reach), sum(max(0, step) for step in reach)
    return start + before, start + behind + array.dtype.itemsize


def argument_converters(
    kernel: str, parameters: tuple[Parameter, ...], check: Callable[[Parameter, Any, bool], None]
) -> dict[str, Callable[[Any], Any]]:
    """Return, by parameter, what turns a launch's argument into the value that the kernel gets; made once a kernel.

    A number becomes a NumPy scalar of the parameter's width, None a null pointer, and an array stays what it is, after
    ``check(parameter, array, contiguous)``, which raises if it is not an array that the backend takes.
    """

    def of_array(parameter: Parameter) -> Callable[[Any], Any]:
        def convert(value: Any) -> Any:
            strided = isinstance(value, Strided)
            array = value.array if strided else value
            if array is None:
                return NULL
            check(parameter, array, not strided)
            return array

        return convert

    def of_scalar(parameter: Parameter) -> Callable[[Any], Any]:
        dtype = parameter.dtype
        if dtype.kind == "b":
            return lambda value: typed_scalar(kernel, parameter, value)
        plain, limits = (int, np.iinfo) if dtype.kind in "iu" else (float, ml_dtypes.finfo)
        low, high = plain(limits(dtype).min), plain(limits(dtype).max)

        def convert(value: Any) -> Any:
            if type(value) is plain and low <= value <= high:  # what nearly every number is
                return dtype.type(value)
            return typed_scalar(kernel, parameter, value)

        return convert

    return {p.name: of_array(p) if p.is_pointer else of_scalar(p) for p in parameters}


def typed_values(
    kernel: str, converters: Mapping[str, Callable[[Any], Any]], arguments: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return what the kernel gets for `arguments`, in the order of its parameters.

    Raises
    ------
    TypeError
        If `arguments` does not have exactly the kernel's parameter names; besides, what a converter raises.
    """
    if arguments.keys() != converters.keys():
        expected = list(converters)
        missing = [name for name in expected if name not in arguments]
        unknown = [name for name in arguments if name not in converters]
        raise TypeError(f"{kernel}: missing arguments {missing}, unknown arguments {unknown}; it takes {expected}")
    return tuple([convert(arguments[name]) for name, convert in converters.items()])


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
        if value.dtype.kind == "m":  # `item` makes an integer of some
            raise TypeError(f"{where} must be a number ({parameter.c_type}), not a span of time; got {value!r}")
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
