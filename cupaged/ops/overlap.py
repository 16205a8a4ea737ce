"""What a call writes lies apart from what it reads: compared by address, whatever type or view the arrays have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupaged.runtime.arguments import byte_bounds

__all__ = ["check_apart"]


def check_apart(written: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise ValueError if an array that a call writes shares memory with one that it reads, or with another result.

    Thread blocks run in any order: some still read what others have written by then.

    Parameters
    ----------
    written, read : mapping of str to array, KVCache or None
        Arguments by name; arrays are NumPy's or CuPy's, with any strides. A `KVCache` stands for its storage, None for
        nothing.

    Raises
    ------
    ValueError
        Naming both arguments.
    """
    results = [(name, bounds) for name, value in written.items() for bounds in _bounds(value)]
    for name, value in read.items():
        for bounds in _bounds(value):
            for result, of_result in results:
                if _overlap(bounds, of_result):
                    raise ValueError(
                        f"{result} must not share memory with {name}: other thread blocks still read it; "
                        f"{_where(result, of_result)}, {_where(name, bounds)}"
                    )
    for place, (name, bounds) in enumerate(results):
        for other, of_other in results[:place]:
            if name != other and _overlap(bounds, of_other):
                raise ValueError(
                    f"{name} must not share memory with {other}, as both are written; "
                    f"{_where(name, bounds)}, {_where(other, of_other)}"
                )


def _bounds(value: Any) -> tuple[tuple[int, int], ...]:
    """Return the addresses between which an argument's memory lies; a cache has one or two arrays."""
    if value is None:
        return ()
    found = value.bounds if hasattr(value, "bounds") else (byte_bounds(value),)
    return tuple((low, high) for low, high in found if low < high)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _where(name: str, bounds: tuple[int, int]) -> str:
    return f"{name} lies at {bounds[0]:#x} to {bounds[1]:#x}"
