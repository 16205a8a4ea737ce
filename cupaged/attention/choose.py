"""Which kernels there are, which one answers a call, and why.

A new kernel of attention is a .cu file, a file in `cupaged.attention.kernels` and a line in `DECODING`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cupaged.attention.call import AttentionCall, Pages, checked_call
from cupaged.attention.kernel import Kernel
from cupaged.attention.kernels.batched import BATCHED
from cupaged.attention.kernels.block_per_head import NAIVE, ONLINE
from cupaged.attention.kernels.merge_states import MERGE_STATES
from cupaged.attention.kernels.partitions import MMA, V2
from cupaged.attention.kernels.persistent import PERSISTENT
from cupaged.attention.kernels.prefill import PREFILL
from cupaged.attention.kernels.texture import TEXTURE
from cupaged.attention.kernels.v1 import V1
from cupaged.attention.kernels.warp import WARP
from cupaged.attention.logits import Logits
from cupaged.attention.mask import Mask
from cupaged.errors import UnsupportedError, written
from cupaged.kv_cache import KVCache
from cupaged.ops.registry import OTHER_KERNELS
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.info import KernelInfo

__all__ = ["ATTENTION_KERNELS", "KERNELS", "PLANNED", "PREFILLING", "Choice", "choose", "explain", "kernels"]

DECODING: tuple[Kernel, ...] = (
    NAIVE,
    V1,
    WARP,
    ONLINE,
    TEXTURE,
    V2,
    BATCHED,
    MMA,
    PERSISTENT,
)
KERNELS: tuple[Kernel, ...] = (*DECODING, PREFILL)
AUTO: tuple[Kernel, ...] = (PERSISTENT, V2, BATCHED, PREFILL)  # the first that serves a call is taken
PLANNED, PREFILLING = PERSISTENT, PREFILL  # what plan_decode and plan_prefill make plans for
BY_NAME = {kernel.info.name: kernel for kernel in DECODING}
ATTENTION_KERNELS = tuple(BY_NAME)


@dataclass(frozen=True)
class Choice:
    """Which kernel runs, and why.

    Attributes
    ----------
    kernel, reason : str
        Its name, and why it was chosen.
    shared_prefix : int
        Tokens that are read once for all sequences.
    served_by : Kernel
        The kernel itself.
    """

    kernel: str
    reason: str
    shared_prefix: int = 0
    served_by: Kernel = field(kw_only=True, repr=False)


@on_callers_streams
def explain(
    query: Any,
    cache: KVCache,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None = None,
    kernel: str = "auto",
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_to_seq: Any = None,
    shared_prefix: int = 0,
) -> Choice:
    """Return which kernel `paged_attention` would run with these arguments, and why; launches nothing."""
    pages, mask = Pages(block_tables, seq_lens, query_to_seq=query_to_seq), Mask(True, window, shared_prefix)
    return choose(checked_call(query, cache, pages, mask, Logits(scale, softcap, alibi_slopes, sinks)), kernel)


def choose(call: AttentionCall, name: str = "auto") -> Choice:
    """Return the kernel that answers a call, and why.

    Raises
    ------
    TypeError, ValueError
        If `name` is no kernel's name.
    UnsupportedError
        If the kernel of that name, or any, does not serve the call; the message says what it does not.
    """
    if not isinstance(name, str):
        raise TypeError(f"kernel must be a name; got {type(name).__name__} {written(name)}")
    if name != "auto" and name not in BY_NAME:
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(BY_NAME)}; got {name!r}")
    choice = _best(call) if name == "auto" else _named(call, BY_NAME[name])
    shared = call.mask.shared_prefix
    if not shared:
        return choice
    tokens = f"the {shared} tokens that sequences share"
    if not choice.served_by.info.serves.shared_prefix:
        return replace(choice, reason=f"{choice.reason}; it reads {tokens} for each of them")
    if call.query.shape[0] < 2:
        return replace(choice, reason=f"{choice.reason}; there is no other sequence to share with")
    return replace(choice, reason=f"{choice.reason}; {tokens} are read for all of them at once", shared_prefix=shared)


def kernels() -> dict[str, KernelInfo]:
    """Return every kernel by name."""
    found: list[KernelInfo] = []
    for group in (DECODING, (PREFILL,)):
        found += [kernel.info for kernel in group] + [info for kernel in group for info in kernel.helpers]
    return {info.name: info for info in (*found, MERGE_STATES, *OTHER_KERNELS)}


def _named(call: AttentionCall, kernel: Kernel) -> Choice:
    if call.pages.queries not in kernel.info.serves.queries:
        names = " or ".join(other.info.name for other in _that_take(call.pages.queries, KERNELS))
        raise UnsupportedError(f"{call.pages.queries} is served by {names}; the call names {kernel.info.name}")
    limit = kernel.why_not(call)
    if limit is not None:
        raise UnsupportedError(limit)
    return Choice(kernel.info.name, "it was named", served_by=kernel)


def _best(call: AttentionCall) -> Choice:
    limits: list[str] = []
    for kernel in _that_take(call.pages.queries, AUTO):
        limit = kernel.why_not(call)
        if limit is None:
            return Choice(kernel.info.name, "; ".join([kernel.because, *limits]), served_by=kernel)
        limits.append(limit)
    raise UnsupportedError("; ".join(limits))


def _that_take(queries: str, kernels: Sequence[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if queries in kernel.info.serves.queries]
