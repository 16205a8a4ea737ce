"""Memory traffic without a GPU: what a decode call asks of memory, counted by the host build's recorder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupaged.runtime.host import LaunchTraffic, record_traffic

__all__ = ["SECTOR_BYTES", "cache_traffic", "record_traffic"]

SECTOR_BYTES = 32
CACHE_ARRAYS = ("key_cache", "value_cache")


def cache_traffic(call: Callable[[], Any]) -> tuple[LaunchTraffic, LaunchTraffic]:
    """Run `call`, which makes one launch on the host backend; return its traffic, whole and of the cache alone.

    Raises
    ------
    ValueError
        If `call` made no launch, or several.
    """
    with record_traffic() as log:
        call()
    if len(log) != 1:
        raise ValueError(f"call must make one launch on the host backend; it made {len(log)}")
    return log[0], log[0].of(*CACHE_ARRAYS)
