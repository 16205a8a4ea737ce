"""paged_attention_batched: the thread blocks that run at once take (query, head) pairs in turns."""

from __future__ import annotations

from typing import Any

from cupaged.attention.call import EVEN, QUERY_TO_SEQ, AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, cache_defines, load
from cupaged.kv_cache import KVCache
from cupaged.runtime.device import multiprocessors
from cupaged.runtime.info import KernelInfo

__all__ = ["BATCHED", "batched_blocks"]

THREADS = 128
BLOCKS_PER_MULTIPROCESSOR = 4  # that run at once


class Batched(Kernel):
    """Any number of queries, each of any sequence."""

    info = KernelInfo(
        "paged_attention_batched",
        "attention/paged_attention_batched.cu",
        "any number of queries in a launch of any size; query_to_seq says whose context a query reads",
        Serves(queries=frozenset({EVEN, QUERY_TO_SEQ})),
    )
    because = "it serves query_to_seq"

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the one launch; without `query_to_seq` query i reads sequence i."""
        call = call.on_three_axes
        num_queries, num_heads = call.query.shape[0], call.num_heads
        kernel = load(self.info, cache_defines(call.config), call.cache.backend)
        of_queries = {"query_to_seq": call.pages.query_to_seq, "num_queries": num_queries, "num_heads": num_heads}
        blocks = batched_blocks(call.cache, num_queries * num_heads)
        return [Launch(kernel, (blocks,), (THREADS,), {**cache_arguments(call), **of_queries})]


def batched_blocks(cache: KVCache, pairs: int) -> int:
    """Return the grid: what runs at once. Any other gives the same result."""
    return min(pairs, BLOCKS_PER_MULTIPROCESSOR * multiprocessors(cache.backend, cache.device))


BATCHED = Batched()
