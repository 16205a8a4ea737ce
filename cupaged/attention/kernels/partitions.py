"""paged_attention_v2 and paged_attention_mma: contexts cut into partitions that run side by side, then merged."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, cache_defines, load, row_defines
from cupaged.attention.logits import LOGITS_OPTIONS
from cupaged.attention.mask import MASK_OPTIONS
from cupaged.runtime.device import multiprocessors
from cupaged.runtime.info import KernelInfo

__all__ = ["MMA", "V2", "split_context"]

THREADS = 128
WARPS = THREADS // 32
MMA_CHUNK = 16  # tokens, as in kernels_cu/include/attention_tile.cuh
MAX_HEADS_OF_TILE = 4  # query heads that share a load in paged_attention_v2: more take too many registers
BLOCKS_TO_FILL = 8  # thread blocks for each multiprocessor: two waves of what runs at once
MOST_WAVES = 16
PARTITION_TOKENS = 1024
MIN_PARTITION_TOKENS = 128  # below, starting and merging a partition takes as long as reading it
STEP_TOKENS = 32  # a multiple of them keeps all lanes of a step busy at D = 128 in half precision
MAX_PARTITIONS = 65535  # of a grid's second axis
MERGED_OPTIONS = ("QUERY_TOKENS", "WINDOW", "SINKS")  # defines that the merge goes by too

MERGE = KernelInfo(
    "merge_partitions",
    "attention/merge_partitions.cu",
    "merges what paged_attention_v2 or _mma found over the partitions of each context",
    "what paged_attention_v2 serves",
)


class OverPartitions(Kernel):
    """A kernel over (query token, KV head, tile of its query heads) and partitions; merge_partitions follows it."""

    helpers = (MERGE,)

    def over_partitions(
        self, kernel: Any, tiles: int, call: AttentionCall, arguments: dict[str, Any], shared_bytes: int = 0
    ) -> list[Launch]:
        """Return the launches; `call` is on three axes."""
        config, xp = call.config, call.cache.xp
        rows, num_heads, head_dim = call.query.shape
        blocks, window = rows * config.num_kv_heads * tiles, call.mask.window
        capacity = call.max_blocks * config.block_size if window is None else window
        processors = multiprocessors(call.cache.backend, call.cache.device)
        tokens, partitions = split_context(capacity, blocks, processors)
        partial: dict[str, Any] = {"partial_out": None, "partial_state": None}
        if partitions > 1:
            partial["partial_out"] = xp.empty((rows, num_heads, partitions, head_dim), dtype=np.float32)
            partial["partial_state"] = xp.empty((rows, num_heads, partitions, 2), dtype=np.float32)
        arguments = {
            **cache_arguments(call, packs=not self.info.serves.whole_rows),
            "num_heads": num_heads,
            **arguments,
            **partial,
            "partition_tokens": tokens,
        }
        launch = Launch(kernel, (blocks, partitions), (THREADS,), arguments, shared_bytes)
        return [launch] if partitions == 1 else [launch, self._merge(call, partial, partitions, tokens)]

    def _merge(self, call: AttentionCall, partial: dict[str, Any], partitions: int, tokens: int) -> Launch:
        defines = {name: row_defines(call.config)[name] for name in ("STORAGE", "HEAD_DIM")}
        defines |= {name: 1 for name in call.defines if name in MERGED_OPTIONS}
        kernel = load(MERGE, defines, call.cache.backend)
        arguments = {
            "out": call.out,
            "lse": call.lse,
            "seq_lens": call.pages.seq_lens,
            "num_heads": call.num_heads,
            **call.mask.arguments,
            "sinks": call.logits.sinks,
            **partial,
            "partitions": partitions,
            "partition_tokens": tokens,
        }
        return Launch(kernel, (call.query.shape[0] * call.num_heads,), (THREADS,), arguments)


class V2Partitions(OverPartitions):
    """Tiles of up to 4 query heads."""

    info = KernelInfo(
        "paged_attention_v2",
        "attention/paged_attention_v2.cu",
        "the context cut into partitions that run side by side, up to 4 query heads of a KV head sharing each load",
        Serves(mask=MASK_OPTIONS, logits=LOGITS_OPTIONS),
    )
    because = "it serves everything: partitions fill the GPU, and heads share loads"

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the launch over partitions, and that of the merge if there are several."""
        call = call.on_three_axes
        tiles = -(-call.group // MAX_HEADS_OF_TILE)
        heads = -(-call.group // tiles)
        kernel = load(self.info, {**cache_defines(call.config), "HEADS": heads, **call.defines}, call.cache.backend)
        return self.over_partitions(kernel, tiles, call, {**call.mask.arguments, **call.logits.arguments})


class MmaPartitions(OverPartitions):
    """Tiles of 8 or 16 query heads, on tensor cores."""

    info = KernelInfo(
        "paged_attention_mma",
        "attention/paged_attention_mma.cu",
        "tensor cores for up to 16 query heads of a KV head at once, which read each byte once, over v2's partitions",
        Serves(("float16", "bfloat16"), range(32, 257, 16), whole_rows=True, capability=80),
        rounds_weights=True,
    )

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the launch over partitions, and that of the merge if there are several."""
        call = call.on_three_axes
        config, rows = call.config, 8 if call.group <= 8 else 16
        kernel = load(self.info, {**row_defines(config), "ROWS": rows}, call.cache.backend)
        chunk_bytes = 2 * MMA_CHUNK * config.head_dim * config.numpy_dtype.itemsize
        return self.over_partitions(kernel, -(-call.group // rows), call, {}, WARPS * chunk_bytes)


def split_context(capacity: int, blocks: int, processors: int) -> tuple[int, int]:
    """Return the tokens of a partition, and how many partitions cover a context of up to `capacity` tokens.

    Lengths are on the device and not read back, so this goes by what a table can hold. Enough partitions that `blocks`
    thread blocks for each fill the GPU; of PARTITION_TOKENS, so that sequences of unlike length are cut into equal
    work; but no more than MOST_WAVES times what fills the GPU, as most of them may turn out to be empty.
    """
    fill = BLOCKS_TO_FILL * processors
    most = min(max(1, MOST_WAVES * fill // blocks), MAX_PARTITIONS)
    wanted = min(max(fill // blocks, -(-capacity // PARTITION_TOKENS), 1), most)
    tokens = max(-(-capacity // wanted), MIN_PARTITION_TOKENS)
    tokens = -(-tokens // STEP_TOKENS) * STEP_TOKENS
    return tokens, max(1, -(-capacity // tokens))


V2, MMA = V2Partitions(), MmaPartitions()
