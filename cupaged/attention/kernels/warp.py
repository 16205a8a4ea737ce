"""paged_attention_warp: a warp for every (sequence, query head)."""

from __future__ import annotations

from typing import Any

from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, cache_defines, load
from cupaged.runtime.info import KernelInfo

__all__ = ["WARP"]

THREADS = 128
WARPS = THREADS // 32


class Warp(Kernel):
    """Each warp of a thread block has a (sequence, query head) pair of its own."""

    info = KernelInfo(
        "paged_attention_warp",
        "attention/paged_attention_warp.cu",
        "one warp per (sequence, query head): 16-byte loads and shuffles, no shared memory, no barrier",
        Serves(),
    )

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the one launch."""
        call = call.on_three_axes
        rows, num_heads = call.query.shape[0], call.num_heads
        kernel = load(self.info, cache_defines(call.config), call.cache.backend)
        arguments = {**cache_arguments(call), "num_seqs": rows, "num_heads": num_heads}
        return [Launch(kernel, (-(-rows * num_heads // WARPS),), (THREADS,), arguments)]


WARP = Warp()
