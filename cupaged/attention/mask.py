"""Who sees whom: causality, a window, several query tokens, a prefix that sequences share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupaged.errors import UnsupportedError
from cupaged.ops.checks import checked_flag, checked_shared_prefix, checked_window

__all__ = ["MASK_OPTIONS", "Mask", "checked_mask"]

MASK_OPTIONS = frozenset({"query_tokens", "window"})  # that a kernel serves or not


@dataclass(frozen=True)
class Mask:
    """Which tokens a query token sees.

    Attributes
    ----------
    causal : bool
        Whether it sees the tokens up to its own only, or all of its sequence's.
    window : int, optional
        Tokens that it sees at most, its own included.
    shared_prefix : int
        First tokens of all sequences that lie in the same blocks.
    query_tokens : int, optional
        Query tokens of each sequence; None where each has its own number of them.
    """

    causal: bool = True
    window: int | None = None
    shared_prefix: int = 0
    query_tokens: int | None = 1

    @property
    def options(self) -> frozenset[str]:
        """Those of `MASK_OPTIONS` that are asked for."""
        several = self.query_tokens is not None and self.query_tokens != 1
        asked = {"query_tokens": several, "window": self.window is not None}
        return frozenset(name for name, is_asked in asked.items() if is_asked)

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters of a kernel that serves them; those that are not asked for are not read."""
        of_sequence = {} if self.query_tokens is None else {"query_tokens": self.query_tokens}
        return {**of_sequence, "window": self.window or 0}


def checked_mask(mask: Mask, block_size: int, max_blocks: int | None = None) -> Mask:
    """Return a mask whose fields are checked, or raise by name.

    Parameters
    ----------
    mask : Mask
        With a caller's values, not checked yet; `query_tokens` is.
    block_size : int
        Of the cache.
    max_blocks : int, optional
        Blocks that a row of the block table has: a window as wide as they are hides nothing, and counts as none.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If there is a window without causality, or besides a shared prefix.
    """
    causal, window = checked_flag(mask.causal, "causal"), checked_window(mask.window)
    if window is not None and not causal:
        raise UnsupportedError(f"window must be left out where causal is False; got window {window}")
    if window is not None and max_blocks is not None and window >= max_blocks * block_size:
        window = None
    shared_prefix = checked_shared_prefix(mask.shared_prefix, block_size, window, max_blocks)
    return Mask(causal, window, shared_prefix, mask.query_tokens)
