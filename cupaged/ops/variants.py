"""What a call asks for besides plain decode: checked, and as a kernel with ``include/variants.cuh`` takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import check_contiguous, check_dtype, check_shape, checked_softcap, checked_window

__all__ = ["ALL_VARIANTS", "Variants", "checked_of_heads", "checked_variants"]

ALL_VARIANTS = frozenset({"query_tokens", "window", "softcap", "alibi_slopes", "sinks"})


@dataclass(frozen=True)
class Variants:
    """A call's variants; plain decode has none.

    Attributes
    ----------
    query_tokens : int
        Query tokens of each sequence.
    window : int, optional
        Tokens that a query sees, its own included.
    softcap : float, optional
        Bound of the logits.
    alibi_slopes, sinks : array, float32 [H], optional
        On the cache's backend.
    """

    query_tokens: int = 1
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: Any = None
    sinks: Any = None

    @property
    def names(self) -> frozenset[str]:
        """Those of `ALL_VARIANTS` that the call asks for."""
        given = {name for name in ALL_VARIANTS if getattr(self, name) is not None}
        return frozenset(given - {"query_tokens"} if self.query_tokens == 1 else given)

    @property
    def defines(self) -> dict[str, int]:
        """Defines that switch on what the call asks for; none for plain decode."""
        return {"ALIBI" if name == "alibi_slopes" else name.upper(): 1 for name in sorted(self.names)}

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters of a kernel that takes variants; those that are not asked for are not read."""
        return {
            "query_tokens": self.query_tokens,
            "window": self.window or 0,
            "softcap": self.softcap or 0.0,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }


def checked_variants(
    query: Any,
    backend: str,
    max_tokens: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
) -> Variants:
    """Return the variants of a call, or raise by name.

    Parameters
    ----------
    query : array, [num_seqs, H, D] or [num_seqs, Q, H, D]
        Checked.
    backend : {"cuda", "host"}
        Where the kernel runs.
    max_tokens : int
        The longest sequence that the block table maps: a window that wide hides nothing, and counts as none.
    window, softcap, alibi_slopes, sinks
        The arguments of `cupaged.paged_attention`.
    """
    window, softcap = checked_window(window), checked_softcap(softcap)
    if window is not None and window >= max_tokens:
        window = None
    of_heads = checked_of_heads(query, backend, alibi_slopes, sinks)
    return Variants(query.shape[1] if query.ndim == 4 else 1, window, softcap, **of_heads)


def checked_of_heads(query: Any, backend: str, alibi_slopes: Any, sinks: Any) -> dict[str, Any]:
    """Return `alibi_slopes` and `sinks`, float32 [H] or None, as the backend's own arrays, or raise by name."""
    of_heads = {"alibi_slopes": alibi_slopes, "sinks": sinks}
    for name, array in of_heads.items():
        if array is not None:
            of_heads[name] = array = as_backend_array(array, name, backend)
            check_dtype(array, name, np.dtype(np.float32))
            check_shape(array, name, (query.shape[-2],))
            check_contiguous(array, name)
    return of_heads
