"""Environment variables that switch something on: a value that says neither is an error that names the variable."""

from __future__ import annotations

import os

__all__ = ["environment_flag"]

FLAGS = {"": False, "0": False, "1": True}


def environment_flag(variable: str) -> bool:
    """Return whether a variable is 1, and not 0, empty or unset.

    Raises
    ------
    ValueError
        If it is anything else: "no" and "false" might be meant for either.
    """
    value = os.environ.get(variable, "")
    if value not in FLAGS:
        raise ValueError(f"{variable} must be 0 or 1; got {value!r}")
    return FLAGS[value]
