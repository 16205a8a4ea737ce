"""What counts as a whole number or a real one, in an argument: NumPy counts spans of time among the integers."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.ma import MaskedArray

__all__ = ["check_unmasked", "holds_integers", "is_hashable", "is_integer", "is_real"]


def is_integer(value: Any) -> bool:
    """Whether it is a whole number of Python or NumPy: no bool, and no span of time."""
    return isinstance(value, Integral) and not isinstance(value, bool | np.timedelta64)


def is_real(value: Any) -> bool:
    """Whether it is a real number, a fraction for example: no bool, and no span of time."""
    return issubclass(type(value), Real) and not isinstance(value, bool | np.timedelta64)


def holds_integers(array: np.ndarray) -> bool:
    """Whether an array's entries are whole numbers: no bools, and no spans of time."""
    return array.dtype.kind in "iu"


def check_unmasked(array: Any, name: str) -> None:
    """Raise TypeError for a masked array: what its mask hides would be read all the same."""
    if isinstance(array, MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, whose entries all count; got {type(array).__name__}")


def is_hashable(value: Any) -> bool:
    """Whether it can be looked up in a dict; a tuple of lists cannot."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
