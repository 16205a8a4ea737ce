"""paged_attention_naive and paged_attention_online: a thread block for every (sequence, query head)."""

from __future__ import annotations

from typing import Any

from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, cache_defines, load
from cupaged.runtime.info import KernelInfo

__all__ = ["NAIVE", "ONLINE"]

THREADS = 128


class BlockPerHead(Kernel):
    """A kernel whose grid is the (sequence, query head) pairs."""

    def __init__(self, info: KernelInfo) -> None:
        self.info = info

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the one launch."""
        call = call.on_three_axes
        kernel = load(self.info, cache_defines(call.config), call.cache.backend)
        arguments = {**cache_arguments(call), "num_heads": call.num_heads}
        return [Launch(kernel, (call.query.shape[0] * call.num_heads,), (THREADS,), arguments)]


NAIVE = BlockPerHead(
    KernelInfo(
        "paged_attention_naive",
        "attention/paged_attention_naive.cu",
        "a thread a token, three passes over the context: maximum, sum, weighted values; nothing is kept between them",
        Serves(),
    )
)
ONLINE = BlockPerHead(
    KernelInfo(
        "paged_attention_online",
        "attention/paged_attention_online.cu",
        "one pass: key and value of a token read together, a running maximum and sum, the block meets once",
        Serves(),
    )
)
