"""What a logit is: a scaled product, and what is done to it before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import check_contiguous, check_dtype, check_shape, checked_scale, checked_softcap

__all__ = ["LOGITS_OPTIONS", "Logits", "checked_logits"]

LOGITS_OPTIONS = frozenset({"softcap", "alibi_slopes", "sinks"})  # that a kernel serves or not


@dataclass(frozen=True)
class Logits:
    """How logits are made from products of queries and keys.

    Attributes
    ----------
    scale : float, optional
        Factor of the products; None stands for ``1 / sqrt(D)`` until it is checked.
    softcap : float, optional
        Bound of the logits.
    alibi_slopes, sinks : array, float32 [H], optional
        ALiBi's slope of each head, and one logit of each head that has no value.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Any = None
    sinks: Any = None

    @property
    def options(self) -> frozenset[str]:
        """Those of `LOGITS_OPTIONS` that are asked for."""
        return frozenset(name for name in LOGITS_OPTIONS if getattr(self, name) is not None)

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters of a kernel that serves them; those that are not asked for are not read."""
        return {"softcap": self.softcap or 0.0, "alibi_slopes": self.alibi_slopes, "sinks": self.sinks}


def checked_logits(logits: Logits, num_heads: int, head_dim: int, backend: str) -> Logits:
    """Return logits whose fields are checked, arrays being the backend's own, or raise by name."""
    scale, softcap = checked_scale(logits.scale, head_dim), checked_softcap(logits.softcap)
    of_heads = {"alibi_slopes": logits.alibi_slopes, "sinks": logits.sinks}
    for name, array in of_heads.items():
        if array is not None:
            of_heads[name] = array = as_backend_array(array, name, backend)
            check_dtype(array, name, np.dtype(np.float32))
            check_shape(array, name, (num_heads,))
            check_contiguous(array, name)
    return Logits(scale, softcap, **of_heads)
