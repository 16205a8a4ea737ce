"""Errors that a caller may want to catch; every other mistake is a plain ValueError or TypeError."""

from __future__ import annotations

from typing import Any

__all__ = [
    "BackendUnavailableError",
    "DoubleFreeError",
    "ForeignBlockError",
    "InvalidLogitsError",
    "KernelBuildError",
    "KernelLaunchError",
    "NoHoleError",
    "OutOfBlocksError",
    "UnsupportedError",
    "written",
]

LONGEST = 200  # characters


def written(value: Any) -> str:
    """Return how a message shows what came: as Python writes it, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write the longest
        return f"{'about -' if value < 0 else 'about '}2**{value.bit_length()}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class UnsupportedError(ValueError):
    """A valid request that the chosen kernel or device cannot serve; the message names the limit."""


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run on this machine; the message says what to install."""


class KernelBuildError(RuntimeError):
    """A .cu file did not compile; the message carries the compiler's, at the line of the .cu file."""


class KernelLaunchError(RuntimeError):
    """A kernel broke a rule of the CUDA model while it ran, a divergent barrier for example."""


class InvalidLogitsError(RuntimeError):
    """The logits of a request hold NaN or have no finite largest entry: no token can be chosen, and it ends."""


class ForeignBlockError(ValueError):
    """A block id that the pool does not own; nothing was changed."""


class DoubleFreeError(ValueError):
    """A block was freed that is free already, or twice in one call; nothing was changed."""


class OutOfBlocksError(RuntimeError):
    """A pool cannot serve a request; nothing was changed.

    Attributes
    ----------
    needed : int
        Blocks that the request asked for.
    free : int
        Blocks that were free.
    evictable : int
        Blocks that held only cached content and could have been evicted.
    """

    def __init__(self, needed: int, free: int, evictable: int = 0) -> None:
        self.needed = int(needed)
        self.free = int(free)
        self.evictable = int(evictable)
        super().__init__(f"out of blocks: needed {self.needed}, free {self.free}, evictable {self.evictable}")

    def __reduce__(self) -> tuple[type[OutOfBlocksError], tuple[int, int, int]]:
        return type(self), (self.needed, self.free, self.evictable)


class NoHoleError(RuntimeError):
    """A contiguous allocator has no hole for a region, though it may have slots enough; nothing was changed.

    Attributes
    ----------
    needed : int
        Slots of the region that was asked for.
    free : int
        Slots that were free, in all holes together.
    largest : int
        Slots of the largest hole.
    """

    def __init__(self, needed: int, free: int, largest: int) -> None:
        self.needed = int(needed)
        self.free = int(free)
        self.largest = int(largest)
        super().__init__(f"no hole: needed {self.needed} slots, free {self.free}, largest hole {self.largest}")

    def __reduce__(self) -> tuple[type[NoHoleError], tuple[int, int, int]]:
        return type(self), (self.needed, self.free, self.largest)
