"""paged_attention_v1: a thread block for every (query token, query head), logits in shared memory."""

from __future__ import annotations

from typing import Any

from cupaged import layouts
from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, load, row_defines
from cupaged.attention.logits import LOGITS_OPTIONS
from cupaged.attention.mask import MASK_OPTIONS
from cupaged.config import CacheConfig
from cupaged.runtime.info import KernelInfo

__all__ = ["V1", "v1_defines"]

THREADS = 128
STRETCH_TOKENS = 4096  # 16 KiB of logits: several thread blocks fit an SM, and few contexts need a second stretch


class BlockOfLogits(Kernel):
    """Keeps the logits of one stretch of the context at a time."""

    info = KernelInfo(
        "paged_attention_v1",
        "attention/paged_attention_v1.cu",
        "one thread block per (sequence, query head); logits in shared memory, one stretch of the context at a time",
        Serves(mask=MASK_OPTIONS, logits=LOGITS_OPTIONS),
    )

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the one launch."""
        config, window = call.config, call.mask.window
        in_sight = call.max_blocks if window is None else (window - 2) // config.block_size + 2
        stretch_blocks = max(1, min(call.max_blocks, in_sight, STRETCH_TOKENS // config.block_size))
        stretch_tokens = stretch_blocks * config.block_size
        return [
            Launch(
                load(self.info, {**v1_defines(config), **call.defines}, call.cache.backend),
                (call.query.size // config.head_dim,),
                (THREADS,),
                {
                    **cache_arguments(call),
                    **call.mask.arguments,
                    **call.logits.arguments,
                    "num_heads": call.num_heads,
                    "stretch_tokens": stretch_tokens,
                },
                shared_bytes=4 * max(stretch_tokens, THREADS // 32 * config.head_dim),
            )
        ]


def v1_defines(config: CacheConfig) -> dict[str, object]:
    """Return what it is specialised to, besides what a call asks for."""
    return {
        **row_defines(config),
        "KEY_PACK": layouts.kv_strides(config, "key").pack_size,
        "VALUE_COLUMNS": int(layouts.kv_strides(config, "value").pack_size == 1),
    }


V1 = BlockOfLogits()
