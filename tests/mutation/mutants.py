"""Small mistakes that the tests must notice: what changes, what must hold, and which tests see to it, quick ones first.

A mutant that changes no result says why it is `equivalent`; its tests then pass. Old texts are as short as they can be
and still occur once in their file: the rest of the code may change without them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A mistake."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    holds: str
    equivalent: str = ""


SMALL_PRINT = "tests/memory/test_small_print.py"
MANAGER_TESTS = "tests/memory/test_manager.py"
PREFIX_TESTS = "tests/memory/test_prefix_cache.py"
EVICTION_TESTS = "tests/memory/test_eviction.py"
ALLOCATOR_TESTS = "tests/memory/test_allocator.py"
TABLE_TESTS = "tests/memory/test_block_table.py"
PREEMPTION_TESTS = "tests/memory/test_preemption.py"
WATERMARK_TESTS = "tests/memory/test_watermark.py"
METRICS_TESTS = "tests/memory/test_metrics.py"

SCHEDULER_TESTS = "tests/engine/test_small_print.py"
SAMPLING_TESTS = "tests/ops/test_sampling.py"
PLAN_TESTS = "tests/ops/test_plan.py"
RUNGS_TESTS = "tests/ops/test_rungs.py"
MERGE_TESTS = "tests/ops/test_merge.py"
PREFILL_TESTS = "tests/ops/test_prefill.py"
VARIANTS_TESTS = "tests/ops/test_variants.py"
ATTENTION_TESTS = "tests/ops/test_attention.py"


def with_variant(variant: str, shape: str = "BSHD-float16-D64-bs16-H4/2-len0+1+2+15") -> str:
    """Return the test of all kernels that take a variant of attention."""
    return f"{VARIANTS_TESTS}::test_every_kernel_that_serves_it_matches_the_reference[host-{shape}-{variant}]"


def of_corner(kernel: str, shape: str) -> str:
    """Return the test of one kernel on one of the shapes of plain decode."""
    return f"{ATTENTION_TESTS}::test_corner_cases_match_the_reference[host-paged_attention_{kernel}-{shape}]"


def of_prefill(shape: str) -> str:
    """Return the test of prefill on one of its shapes."""
    return f"{PREFILL_TESTS}::test_it_matches_the_reference[host-{shape}]"


def of_prefix(shape: str) -> str:
    """Return the test of a shared prefix on one of its shapes."""
    return f"tests/ops/test_shared_prefix.py::test_sharing_changes_no_result[host-{shape}]"


EVERYTHING = with_variant("Q3-window20-softcap3-alibi-sinks")
OPS_PRINT = "tests/ops/test_small_print.py"
USES_OF_A_PLAN = OPS_PRINT + "::test_every_use_of_a_plan_writes_every_row_alike"
WINDOW_OF_PREFILL = OPS_PRINT + "::test_each_row_of_a_prefill_sees_its_own_window"

MANAGER = "cupaged/memory/manager.py"
POOL = "cupaged/memory/pool.py"
EVICTION = "cupaged/memory/eviction.py"
PREFIX = "cupaged/memory/prefix_cache.py"
TABLE = "cupaged/memory/block_table.py"
ALLOCATOR = "cupaged/memory/allocator.py"
PREEMPTION = "cupaged/memory/preemption.py"
WATERMARK = "cupaged/memory/watermark.py"
METRICS = "cupaged/memory/metrics.py"

MEMORY = [
    Mutant(
        "allocator: a bound off by one",
        ALLOCATOR,
        "ordered[-1] >= self.num_blocks",
        "ordered[-1] > self.num_blocks",
        (ALLOCATOR_TESTS,),
        "the first id past the pool is not one of its blocks",
    ),
    Mutant(
        "allocator: a run comes back reversed",
        ALLOCATOR,
        "= ids[::-1]\n",
        "= ids\n",
        (ALLOCATOR_TESTS, MANAGER_TESTS),
        "a run that was freed together comes back in its order",
    ),
    Mutant(
        "pool: sharing is no use",
        POOL,
        "        self.stats.hit(index, priority)\n",
        "",
        (SMALL_PRINT,),
        "content that is shared counts as used once more",
    ),
    Mutant(
        "pool: sharing loses its priority",
        POOL,
        "self.stats.hit(index, priority)",
        "self.stats.hit(index)",
        (SMALL_PRINT,),
        "a sequence of a higher priority raises that of what it shares",
    ),
    Mutant(
        "pool: publishing loses its priority",
        POOL,
        "depth[new], priority)",
        "depth[new], 0)",
        (SMALL_PRINT,),
        "new content has the priority of its sequence",
    ),
    Mutant(
        "pool: a touch is no access",
        POOL,
        "        self.stats.hit(index)\n        self.stats.accessed(index)\n",
        "        self.stats.hit(index)\n",
        (SMALL_PRINT,),
        "a touched block is the most recent",
    ),
    Mutant(
        "pool: a text's end goes last",
        POOL,
        "blocks[unread & named][::-1]",
        "blocks[unread & named]",
        (EVICTION_TESTS,),
        "the last blocks of a text are evicted before the first",
    ),
    Mutant(
        "pool: repeated readers leave once",
        POOL,
        "np.subtract.at(self.ref_count, blocks, 1)",
        "self.ref_count[blocks] -= 1",
        (SMALL_PRINT, MANAGER_TESTS),
        "each reader that leaves a block is counted",
    ),
    Mutant(
        "pool: what is shared may be evicted too",
        POOL,
        "if len(besides):",
        "if False:",
        (SMALL_PRINT, MANAGER_TESTS),
        "a cached prefix is not counted as room for its own prompt",
    ),
    Mutant(
        "pool: pressure a block late",
        POOL,
        "if free < self.pressure_mark:",
        "if free < self.pressure_mark - 1:",
        (SMALL_PRINT,),
        "pressure is felt as soon as fewer blocks than the mark are free",
    ),
    Mutant(
        "pool: pressure a block early",
        POOL,
        "if free < self.pressure_mark:",
        "if free <= self.pressure_mark:",
        (SMALL_PRINT,),
        "no pressure is felt while as many blocks as the mark are free",
    ),
    Mutant(
        "pool: the peak counts what is cached",
        POOL,
        "used = self.num_blocks - free - len(self.policy)",
        "used = self.num_blocks - free",
        (SMALL_PRINT,),
        "the peak counts blocks that are read",
    ),
    Mutant(
        "stats: new content inherits uses",
        EVICTION,
        "self.access_count[blocks] = 1",
        "self.access_count[blocks] += 1",
        (SMALL_PRINT, EVICTION_TESTS),
        "uses are those of a block's present content",
    ),
    Mutant(
        "stats: a hit lowers a priority",
        EVICTION,
        "np.maximum(self.priority[blocks], priority)",
        "priority",
        (SMALL_PRINT,),
        "a block keeps the highest priority of its readers",
    ),
    Mutant(
        "lru: a place that is not current decides",
        EVICTION,
        "return self._place[as_index(self._queue[start:stop])] == np.arange(start, stop)",
        "return self._place[as_index(self._queue[start:stop])] >= 0",
        (EVICTION_TESTS,),
        "only a block's current place in the queue counts",
    ),
    Mutant(
        "keyed: compaction keeps outdated entries",
        EVICTION,
        "if self._ticket[entry[2]] == entry[1]]",
        "if self._ticket[entry[2]]]",
        (EVICTION_TESTS,),
        "outdated entries do not pile up",
    ),
    Mutant(
        "lfu: equals by age, not by last use",
        EVICTION,
        "self.stats.access_count[blocks], self.stats.last_access[blocks]",
        "self.stats.access_count[blocks], self.stats.published[blocks]",
        (EVICTION_TESTS,),
        "of contents with as many uses the least recent goes first",
    ),
    Mutant(
        "cost: a beginning costs less than its end",
        EVICTION,
        "np.maximum.accumulate(context)",
        "context",
        (EVICTION_TESTS,),
        "no block counts for less than those that follow it",
    ),
    Mutant(
        "prefix cache: the second owner takes the name",
        PREFIX,
        "list(map(self._block_of.setdefault, digests, ids))",
        "[self._block_of.update({digest: block}) or block for digest, block in zip(digests, ids, strict=True)]",
        (PREFIX_TESTS,),
        "a digest that is known keeps its block",
    ),
    Mutant(
        "prefix cache: a fork shares its list of names",
        PREFIX,
        "self.digests[row].copy()",
        "self.digests[row]",
        (SMALL_PRINT, PREFIX_TESTS),
        "twins name what they write by themselves",
    ),
    Mutant(
        "prefix cache: a fork forgets the unfinished block",
        PREFIX,
        "        self.unfinished[twin] = self.unfinished[row]\n",
        "",
        (SMALL_PRINT, PREFIX_TESTS),
        "a fork continues its parent's unfinished block",
    ),
    Mutant(
        "prefix cache: extra keys without lengths",
        PREFIX,
        'b"%c%d:" % (kind, len(text)) + text',
        "kind + text",
        (SMALL_PRINT, PREFIX_TESTS),
        "no two sequences of extra keys read alike",
    ),
    Mutant(
        "block table: a copied tail is not mirrored",
        TABLE,
        "        self.changed[rows] = True\n",
        "",
        (SMALL_PRINT,),
        "a row with a new last block counts as changed",
    ),
    Mutant(
        "block table: a guard is lifted by a second",
        TABLE,
        "self.room[row] = -abs(self.room[row])",
        "self.room[row] = -self.room[row]",
        (TABLE_TESTS, SMALL_PRINT, MANAGER_TESTS),
        "a last block that two forks guard stays guarded",
    ),
    Mutant(
        "block table: a freed row keeps its ids",
        TABLE,
        "        self.ids[row, : len(blocks)] = UNMAPPED\n",
        "",
        (TABLE_TESTS, MANAGER_TESTS),
        "a row that no sequence has is unmapped",
    ),
    Mutant(
        "manager: the first own block stays published",
        MANAGER,
        "sequence.num_cached // self.block_size",
        "sequence.num_cached // self.block_size + 1",
        (SMALL_PRINT,),
        "nothing of what was not computed is found",
    ),
    Mutant(
        "manager: a batch survives a swap",
        MANAGER,
        '            self._epoch += 1\n            self._note("out", pairs)\n',
        '            self._note("out", pairs)\n',
        (SMALL_PRINT,),
        "a batch gives out no slots of a sequence that is swapped out",
    ),
    Mutant(
        "manager: a batch is looked up once for ever",
        MANAGER,
        "if batch.epoch != self._epoch:",
        "if batch.epoch < 0:",
        (MANAGER_TESTS,),
        "a batch notices that a sequence is gone",
    ),
    Mutant(
        "manager: no token is left to compute",
        MANAGER,
        "digests[: (num_tokens - 1) // self.block_size]",
        "digests[: num_tokens // self.block_size]",
        (PREFIX_TESTS,),
        "a prompt that is cached whole leaves one token to compute",
    ),
    Mutant(
        "manager: the last reader copies too",
        MANAGER,
        "copied = ~full & (readers_left > 1)",
        "copied = ~full & (readers_left > 0)",
        (MANAGER_TESTS,),
        "the last reader of a block writes in place",
    ),
    Mutant(
        "manager: an offload that is there is no use",
        MANAGER,
        "        self.cpu.touch(there[there >= 0])\n",
        "",
        (SMALL_PRINT,),
        "content that is evicted again is as good as new on the CPU",
    ),
    Mutant(
        "manager: what is restored may be offloaded onto",
        MANAGER,
        "self.cpu.share(on_cpu)",
        "self.cpu.touch(on_cpu)",
        (MANAGER_TESTS,),
        "offloading never overwrites what is about to be restored",
    ),
    Mutant(
        "manager: a swapped sequence keeps its CPU blocks",
        MANAGER,
        "                self.cpu.release(source)\n",
        "",
        (MANAGER_TESTS,),
        "a sequence that comes back leaves no block behind",
    ),
    Mutant(
        "manager: twins come back unguarded",
        MANAGER,
        "                self.tables.guard(sequence.row)\n",
        "",
        (SMALL_PRINT, MANAGER_TESTS),
        "copy-on-write survives a swap",
    ),
    Mutant(
        "manager: what came back is not found",
        MANAGER,
        ", len(hits), publish",
        ", num_found, publish",
        (SMALL_PRINT,),
        "restored blocks are found on the GPU",
    ),
    Mutant(
        "manager: published at priority 0",
        MANAGER,
        "digests, depth, priority)",
        "digests, depth)",
        (SMALL_PRINT,),
        "blocks are published with their sequence's priority",
    ),
    Mutant(
        "manager: a swapped block has one reader",
        MANAGER,
        "    pool.ref_count[twin_of] = np.bincount(place)\n",
        "",
        (MANAGER_TESTS,),
        "twins that move together count as readers on the other side",
    ),
    Mutant(
        "manager: a fork shares without priority",
        MANAGER,
        "self.gpu.share(self.tables.blocks(row), int(self.tables.priority[row]))",
        "self.gpu.share(self.tables.blocks(row))",
        (SMALL_PRINT, MANAGER_TESTS),
        "a fork does not change what its parent's blocks are worth",
        equivalent="a fork has its parent's priority, and the parent's named blocks have at least that; "
        "blocks without a name get theirs when they are published",
    ),
    Mutant(
        "preemption: the earliest goes first",
        PREEMPTION,
        "latest_first = reversed([",
        "latest_first = ([",
        (PREEMPTION_TESTS,),
        "of equal priorities the latest gives way first",
    ),
    Mutant(
        "preemption: who frees nothing goes too",
        PREEMPTION,
        "            victims = others\n",
        "            pass\n",
        (SMALL_PRINT, PREEMPTION_TESTS),
        "nobody gives way for nothing",
    ),
    Mutant(
        "preemption: an equal priority stays",
        PREEMPTION,
        "manager.priority(seq_id) <= priority",
        "manager.priority(seq_id) < priority",
        (SMALL_PRINT, PREEMPTION_TESTS),
        "sequences of the priority that is named give way",
    ),
    Mutant(
        "preemption: each alone has room on the CPU",
        PREEMPTION,
        "manager.can_swap_out(*swapped, seq_id)",
        "manager.can_swap_out(seq_id)",
        (PREEMPTION_TESTS, SMALL_PRINT),
        "victims are swapped as far as the CPU holds all of them",
    ),
    Mutant(
        "watermark: begins a block late",
        WATERMARK,
        "+ 1e-9) + 1",
        "+ 1e-9)",
        (WATERMARK_TESTS + "::test_the_marks_are_exact",),
        "eviction begins at the high mark",
    ),
    Mutant(
        "watermark: the pool's mark is a block low",
        WATERMARK,
        "pressure_mark = self.start_below",
        "pressure_mark = self.start_below - 1",
        (SMALL_PRINT,),
        "the thread wakes at the high mark",
    ),
    Mutant(
        "watermark: it does not go on between the marks",
        WATERMARK,
        "self.evicting = self.evicting or pool",
        "self.evicting = pool",
        (WATERMARK_TESTS + "::test_between_the_marks_it_goes_on_if_it_has_begun_and_does_not_begin",),
        "eviction goes on down to the low mark once it has begun",
    ),
    Mutant(
        "metrics: a shared tail wastes twice",
        METRICS,
        "tables.room[rows[first]]",
        "tables.room[rows]",
        (SMALL_PRINT, METRICS_TESTS),
        "the empty slots of a block that twins share count once",
    ),
    Mutant(
        "metrics: bytes one way only",
        METRICS,
        "(counters.blocks_swapped_out + counters.blocks_swapped_in)",
        "(counters.blocks_swapped_out)",
        (SMALL_PRINT,),
        "bytes are counted on the way out and on the way in",
    ),
]

VARIANTS = "kernels_cu/include/variants.cuh"
SOFTMAX = "kernels_cu/include/softmax.cuh"
RUNNING = "kernels_cu/include/running_attention.cuh"
PERSISTENT = "kernels_cu/attention/paged_attention_persistent.cu"
PREFILL = "kernels_cu/attention/paged_prefill.cu"
MASK = "kernels_cu/include/prefill_mask.cuh"
V1 = "kernels_cu/attention/paged_attention_v1.cu"
SAMPLE = "kernels_cu/sampling/sample.cu"

KERNELS = [
    Mutant(
        "variants: a window a token too narrow",
        VARIANTS,
        "max(context - window, 0)",
        "max(context - window + 1, 0)",
        (with_variant("window20"),),
        "a query sees as many tokens as its window has, its own among them",
    ),
    Mutant(
        "variants: a window a token too wide",
        VARIANTS,
        "max(context - window, 0)",
        "max(context - window - 1, 0)",
        (with_variant("window20"),),
        "a query sees no token before its window",
    ),
    Mutant(
        "variants: a query token does not see itself",
        VARIANTS,
        "seq_len - query_tokens + 1 + i",
        "seq_len - query_tokens + i",
        (with_variant("Q3"),),
        "a query token sees itself",
    ),
    Mutant(
        "variants: distances are one too many",
        VARIANTS,
        "(key_token - (context - 1))",
        "(key_token - context)",
        (with_variant("alibi"),),
        "ALiBi adds nothing to the logit of a query's own token",
    ),
    Mutant(
        "variants: a cap in other units",
        VARIANTS,
        "soft_capped(product, softcap * kLog2E)",
        "soft_capped(product, softcap)",
        (with_variant("softcap3"),),
        "the cap is in units of natural logarithms",
    ),
    Mutant(
        "variants: a sink does not shrink the values",
        VARIANTS,
        "    return factor;",
        "    return 1.0f;",
        (with_variant("sinks"),),
        "a sink that is the largest logit shrinks what was summed up before",
    ),
    Mutant(
        "softmax: a sum is not rescaled",
        SOFTMAX,
        "    sum *= factor;\n",
        "",
        (of_corner("v2", "BSHD-float16-D128-bs16-H1/1-len500"),),
        "a sum is relative to the present maximum",
    ),
    Mutant(
        "softmax: nothing less nothing",
        SOFTMAX,
        "return logit == minus_infinity() ? 0.0f : exp2f(logit - max);",
        "return exp2f(logit - max);",
        (of_corner("v2", "BSHD-float16-D64-bs16-H4/2-len60+100+2-unmapped"),),
        "what takes no part has weight 0 even if nothing takes part",
    ),
    Mutant(
        "soft cap: no sign",
        "kernels_cu/include/soft_cap.cuh",
        "return copysignf(cap - below_cap, x);",
        "return cap - below_cap;",
        (with_variant("softcap3"),),
        "negative logits are bounded from below",
    ),
    Mutant(
        "merging: parts count as they are",
        RUNNING,
        "    softmax.sum += other.sum * factor;\n",
        "    softmax.sum += other.sum;\n",
        (of_corner("mma", "BSHD-float16-D128-bs16-H1/1-len500"),),
        "a part's sum is relative to the merged maximum",
    ),
    Mutant(
        "offsets: 32 bits",
        "kernels_cu/include/paged_kv.cuh",
        "static_cast<long long>(block_id) * block",
        "block_id * block",
        (ATTENTION_TESTS + "::test_offsets_beyond_32_bits_on_the_host[paged_attention_v1]",),
        "a block id times a stride takes 64 bits",
    ),
    Mutant(
        "token row: a lane without a vector loads",
        "kernels_cu/include/token_row.cuh",
        "block_id != kUnmapped && owns(i)",
        "block_id != kUnmapped",
        (of_corner("v2", "BSHD-bfloat16-D248-bs16-H4/2-len33+90"),),
        "lanes past the end of a row read nothing",
    ),
    Mutant(
        "reduce: halves are handed to the wrong lane",
        "kernels_cu/include/reduce.cuh",
        "own = upper ? value[i + left] : value[i], handed = upper ? value[i]",
        "own = upper ? value[i] : value[i + left], handed = upper ? value[i]",
        ("tests/runtime/test_device_functions.py::test_scattered_sums[host-2-2]",),
        "each lane keeps the sums that it says",
    ),
    Mutant(
        "v1: a window's stretch begins within a block",
        V1,
        "int begin = first_token - first_token % BLOCK_SIZE;",
        "int begin = first_token;",
        (with_variant("window20", "BHDSX-float16-D64-bs16-H4/2-len0+1+2+15"),),
        "a stretch begins with a KV block",
    ),
    Mutant(
        "v1: a stretch ends late",
        V1,
        "bool holds(int token) const { return token < end &&",
        "bool holds(int token) const { return token <= end &&",
        (of_corner("v1", "BSHD-float16-D64-bs16-H4/2-len0+1+15+16"),),
        "no slot past the context is read",
    ),
    Mutant(
        "v1: slots past the end count",
        V1,
        "if (slot + s < filled && (!WINDOW",
        "if ((!WINDOW",
        (of_corner("v1", "BHDSX-float16-D64-bs16-H4/2-len0+1+15+16"),),
        "a slot without a token may hold NaN",
    ),
    Mutant(
        "v1: one sum for all stretches",
        V1,
        "accumulator.scale(softmax.raise(block_reduce<Max, WARPS>(largest, max_of_warp)));",
        "softmax.raise(block_reduce<Max, WARPS>(largest, max_of_warp));",
        (OPS_PRINT + "::test_logits_may_climb_along_the_context[paged_attention_v1-BSHD]",),
        "what a stretch summed up shrinks as the maximum rises",
    ),
    Mutant(
        "v2: a partition reads into the next",
        "kernels_cu/attention/paged_attention_v2.cu",
        "begin + min(partition_tokens, seen - begin)",
        "seen",
        (RUNGS_TESTS + "::test_partitions_of_any_size[host-7-paged_attention_v2]",),
        "a partition ends where the next begins",
    ),
    Mutant(
        "partitions: the last one is left out",
        "kernels_cu/attention/merge_partitions.cu",
        "seen / partition_tokens + (seen % partition_tokens != 0)",
        "seen / partition_tokens",
        (RUNGS_TESTS + "::test_partitions_of_any_size[host-7-paged_attention_v2]",),
        "a partition that is not full counts too",
    ),
    Mutant(
        "partitions: one more than there are",
        "kernels_cu/attention/merge_partitions.cu",
        "seen / partition_tokens + (seen % partition_tokens != 0)",
        "seen / partition_tokens + 1",
        (RUNGS_TESTS + "::test_work_space_is_not_read_before_it_is_written",),
        "work space is not read before it is written",
    ),
    Mutant(
        "partitions: no sink",
        "kernels_cu/attention/merge_partitions.cu",
        "  variants.add_sink(softmax, blockIdx.x % num_heads);\n",
        "",
        (RUNGS_TESTS + "::test_partitions_of_a_window[host-33-7]",),
        "a sink joins once, when partitions are merged",
    ),
    Mutant(
        "merge: a part over nothing is read",
        "kernels_cu/attention/merge_states.cu",
        "load_global_if(of_part != minus_infinity(), address)",
        "load_global(address)",
        (MERGE_TESTS + "::test_parts_over_nothing_count_nothing_whatever_they_hold[host-float16]",),
        "a part over nothing may hold NaN",
    ),
    Mutant(
        "decode plan: an empty sequence has no piece",
        "kernels_cu/include/decode_plan.cuh",
        "max(first + 1, (seq_len + CHUNK - 1) / CHUNK)",
        "(seq_len + CHUNK - 1) / CHUNK",
        (
            ATTENTION_TESTS + "::test_a_sequence_of_length_zero_gives_zero_and_minus_infinity[host-auto]",
            PLAN_TESTS + "::test_pieces_cover_every_chunk_once[host-lens3]",
        ),
        "somebody writes an empty sequence's output",
    ),
    Mutant(
        "decode plan: a window loses its first token",
        "kernels_cu/include/decode_plan.cuh",
        "- (window - 1))",
        "- (window - 2))",
        (OPS_PRINT + "::test_a_window_that_begins_beside_a_chunks_edge",),
        "the chunk of the window's first token takes part",
    ),
    Mutant(
        "decode plan: a place is found one off",
        "kernels_cu/attention/plan_decode.cu",
        "if (offsets[2 * middle] <= i) low = middle;",
        "if (offsets[2 * middle] < i) low = middle;",
        (PLAN_TESTS + "::test_pieces_cover_every_chunk_once[host-lens1]",),
        "each piece is of its own sequence",
    ),
    Mutant(
        "persistent: a window's edge is not seen",
        PERSISTENT,
        "first_token + token >= variants.first_token(context[half])",
        "first_token + token > variants.first_token(context[half])",
        (with_variant("window20"),),
        "a query sees the first token of its window",
    ),
    Mutant(
        "persistent: a query sees the token behind it",
        PERSISTENT,
        "first_token + token < context[half]",
        "first_token + token <= context[half]",
        (with_variant("Q3"),),
        "a query token sees no later one",
    ),
    Mutant(
        "persistent: the slot past the end is copied",
        PERSISTENT,
        "from_token <= token && token < to_token",
        "from_token <= token && token <= to_token",
        (
            of_prefix("BSHD-float16-D64-bs16-H4/2-len65+72-prefix64"),
            PLAN_TESTS + "::test_groups_of_every_size[host-1-1]",
        ),
        "what lies past the end of a sequence may be NaN",
    ),
    Mutant(
        "persistent: all parts in one place",
        PERSISTENT,
        "static_cast<long long>(piece.slot + piece.part) * ROWS + row",
        "static_cast<long long>(piece.slot) * ROWS + row",
        (
            PLAN_TESTS + "::test_one_plan_serves_the_caches_of_all_layers[host]",
            of_prefix("BSHD-float16-D64-bs16-H4/2-len2049+2064+2088-prefix2048"),
        ),
        "each part of a tile has work space of its own",
    ),
    Mutant(
        "persistent: lanes that share parts meet some twice",
        PERSISTENT,
        "first += lanes * MERGED_AT_ONCE",
        "first += MERGED_AT_ONCE",
        (OPS_PRINT + "::test_more_parts_than_lanes_read_at_once_are_merged_once_each[1]",),
        "each part of a tile is merged once",
    ),
    Mutant(
        "persistent: arrivals do not start again",
        PERSISTENT,
        "atomicInc(arrivals + 1 + piece.slot, others)",
        "atomicAdd(arrivals + 1 + piece.slot, 1u)",
        (USES_OF_A_PLAN + "[in parts]",),
        "a plan is used again and again",
    ),
    Mutant(
        "persistent: the queue does not start again",
        PERSISTENT,
        "atomicInc(arrivals, count - 1)",
        "atomicInc(arrivals, count)",
        (USES_OF_A_PLAN + "[from a queue]",),
        "a plan with a queue is used again and again",
    ),
    Mutant(
        "persistent: the ring stays in the next piece",
        PERSISTENT,
        "    in_next = false;\n",
        "",
        (USES_OF_A_PLAN + "[in turns]",),
        "copies go on into the piece after the next",
    ),
    Mutant(
        "persistent: a tile's rows run over",
        PERSISTENT,
        "min(ROWS, rows_of_head - first)",
        "ROWS",
        (PLAN_TESTS + "::test_groups_of_every_size[host-9-1]", PLAN_TESTS + "::test_groups_of_every_size[host-36-3]"),
        "a tile ends with its KV head's rows",
    ),
    Mutant(
        "shared prefix: its tokens are read again",
        "kernels_cu/include/shared_prefix.cuh",
        "SHARED_PREFIX == PREFIX_BEFORE ? tokens : 0",
        "0",
        (
            of_prefix("BHSD-float16-D64-bs5-H4/2-len75+80+150-prefix70"),
            of_prefix("BSHD-float16-D64-bs16-H4/2-len65+72-prefix64"),
        ),
        "a token of the prefix counts once",
    ),
    Mutant(
        "prefill: a mask is forgotten where rows end in a tile",
        MASK,
        "first + Tokens <= shortest)",
        "first + Tokens <= longest)",
        (of_prefill("BSHD-bfloat16-D64-bs16-H4/2-len150+60-new60+60"),),
        "each row sees no token behind its own",
    ),
    Mutant(
        "prefill: unmapped tokens are seen",
        MASK,
        " && all_mapped();",
        ";",
        (of_prefill("BSHD-float16-D64-bs16-H24/2-len260+40-unmapped-new50+40-full"),),
        "tokens without a block take no part",
    ),
    Mutant(
        "prefill: a tile at the window's edge is seen whole",
        MASK,
        "first >= variants.first_token(longest)",
        "first >= variants.first_token(shortest)",
        (
            of_prefill("BSHD-float16-D64-bs16-H4/2-len200+70-Q70-window33-softcap5-alibi-sinks-new20+70"),
            WINDOW_OF_PREFILL + "[128-few tokens]",
        ),
        "each row sees no token before its own window",
    ),
    Mutant(
        "prefill: rows are looked up from the last one's window on",
        PREFILL,
        "variants.first_token(shortest), CAUSAL",
        "variants.first_token(longest), CAUSAL",
        (
            of_prefill("BSHD-float16-D64-bs16-H4/2-len200+70-Q70-window33-softcap5-alibi-sinks-new20+70"),
            WINDOW_OF_PREFILL,
        ),
        "what the first row of a tile sees is copied",
    ),
    Mutant(
        "prefill: a piece begins late",
        "kernels_cu/attention/plan_prefill.cu",
        "max(0, max(0, shortest) - window) / tile_tokens",
        "max(0, max(0, shortest) - window + 1) / tile_tokens",
        (WINDOW_OF_PREFILL,),
        "the tile of the window's first token takes part",
    ),
    Mutant(
        "prefill: a scale below zero waits",
        PREFILL,
        "TRANSFORMED || factor <= 0.0f",
        "TRANSFORMED",
        (OPS_PRINT + "::test_logits_may_fall_as_products_rise",),
        "the maximum is that of the logits, also where the scale is negative",
    ),
    Mutant(
        "prefill: a result over the tile that is on its way",
        PREFILL,
        "memory.stage[(used + 1) % STAGES];",
        "memory.stage[used % STAGES];",
        (of_prefill("BSHD-bfloat16-D64-bs16-H4/2-len150+60-new60+60"), WINDOW_OF_PREFILL),
        "a result takes a stage that is no longer read",
    ),
    Mutant(
        "prefill: work of the turn before is overwritten",
        PREFILL,
        "exchange.work[(turn + 1) % 3];",
        "exchange.work[turn];",
        (of_prefill("BSHD-bfloat16-D64-bs16-H4/2-len150+60-new60+60"),),
        "a piece stays until its result is written",
    ),
    Mutant(
        "prefill: heads share the place of parts",
        PREFILL,
        "* num_kv_heads + work.kv_head * piece.parts",
        "* num_kv_heads",
        (OPS_PRINT + "::test_parts_of_a_prefill_are_merged_for_each_kv_head",),
        "parts of each head have work space",
    ),
    Mutant(
        "append: the last of odd vectors is left out",
        "kernels_cu/cache/append_kv.cu",
        "(vectors_per_token + 1) / kTileVectors",
        "vectors_per_token / kTileVectors",
        ("tests/ops/test_cache.py::test_runs_of_any_kind_where_slots_lie_together[host-0-8-72-1-float16]",),
        "every vector of a token is written",
    ),
    Mutant(
        "append: runs that begin within a vector",
        "kernels_cu/include/column_tile.cuh",
        "first >= 0 && first % Vec == 0 &&",
        "first >= 0 &&",
        ("tests/ops/test_cache.py::test_runs_of_any_kind_where_slots_lie_together[host-0-16-64-3-float16]",),
        "only slots that make a whole vector are written as one",
    ),
    Mutant(
        "copy: runs lie side by side",
        "kernels_cu/cache/copy_blocks.cu",
        "id * block_stride + run * run_stride",
        "id * block_stride + run",
        ("tests/ops/test_blocks.py::test_only_the_destinations_change[host-float16-16-128-HBSD]",),
        "each run of a block is copied from its place",
    ),
    Mutant(
        "rope: what a product loses",
        "kernels_cu/cache/rope_append_kv.cu",
        "product - rintf(product) + lost",
        "product - rintf(product)",
        ("tests/ops/test_rope.py::test_keys_and_queries_turn_and_values_stay[host-False-float32-40-40-False-BSHD]",),
        "angles are right at large positions",
    ),
    Mutant(
        "sample: of equals the last",
        SAMPLE,
        "(0xffffffffu - static_cast<unsigned>(i))",
        "static_cast<unsigned>(i)",
        (SAMPLING_TESTS + "::test_ties_stay_and_the_first_is_the_most_likely",),
        "of equal logits the first is taken",
    ),
    Mutant(
        "sample: a threshold needs one more",
        SAMPLE,
        "bits += sums[c] >= target;",
        "bits += sums[c] > target;",
        (SAMPLING_TESTS + "::test_the_token_is_where_the_number_falls[host-31-{'top_k': 1}]",),
        "as many tokens take part as were asked for",
    ),
    Mutant(
        "sample: a number on the edge stays",
        SAMPLE,
        "rest < up_to",
        "rest <= up_to",
        (OPS_PRINT + "::test_a_number_on_the_edge_of_two_tokens_is_the_second_ones",),
        "a number that a token does not reach is the next one's",
    ),
    Mutant(
        "sample: infinity is a number",
        SAMPLE,
        "largest_key < kInfinity",
        "largest_key <= kInfinity",
        (SAMPLING_TESTS + "::test_rows_without_a_finite_largest_logit_give_no_token",),
        "an infinite logit gives no token",
    ),
    Mutant(
        "texture: no bound of a tile",
        "kernels_cu/include/load_path.cuh",
        "TEXTURE_TILES == 1 ? coordinate : coordinate & ((1ll << place.tile_bits) - 1)",
        "coordinate",
        ("tests/ops/test_textures.py::test_a_cache_too_long_for_one_texture_is_tiled[TEXTURE_LINEAR-BSHD]",),
        "a coordinate counts from the beginning of its tile",
    ),
]

CHECKS = "cupaged/ops/checks.py"
TEXTURES = "cupaged/ops/textures.py"
SCHEDULER = "cupaged/engine/scheduler.py"
BAD_INPUT = "tests/ops/test_bad_input.py"
SWAP = "cupaged/ops/swap.py"

OPS = [
    Mutant(
        "checks: the window's edge is two off",
        CHECKS,
        "lens - query_tokens - window + 1",
        "lens - query_tokens - window + 2",
        (OPS_PRINT + "::test_blocks_are_checked_from_the_one_with_the_windows_first_token_on",),
        "the block of the window's first token is checked",
    ),
    Mutant(
        "checks: a full table is refused",
        CHECKS,
        "(lens > capacity,",
        "(lens >= capacity,",
        (OPS_PRINT + "::test_a_sequence_may_fill_all_that_its_table_maps",),
        "a sequence may fill all that its table maps",
    ),
    Mutant(
        "checks: the last position is one too far",
        CHECKS,
        "(given >= end)",
        "(given > end)",
        (OPS_PRINT + "::test_positions_reach_to_where_float32_holds_every_integer",),
        "positions lie below their end",
    ),
    Mutant(
        "checks: a prefix may reach into the queries",
        CHECKS,
        "lens < shared_prefix + query_tokens",
        "lens < shared_prefix",
        (OPS_PRINT + "::test_query_tokens_stand_right_behind_a_shared_prefix_or_later",),
        "all query tokens stand behind the shared prefix",
    ),
    Mutant(
        "checks: what lies right behind the cache is its own",
        "cupaged/ops/overlap.py",
        "a[0] < b[1] and b[0] < a[1]",
        "a[0] <= b[1] and b[0] < a[1]",
        (OPS_PRINT + "::test_out_may_lie_right_beside_the_cache_and_the_query",),
        "memory right behind the cache may be written",
    ),
    Mutant(
        "plan: a chunk too many is not missed",
        "cupaged/attention/kernels/persistent.py",
        "-(-lens // self.shape.chunk) > ranges[:, 1]",
        "lens // self.shape.chunk > ranges[:, 1]",
        (OPS_PRINT + "::test_a_plan_holds_whole_chunks_and_no_token_more",),
        "a plan holds every token of a call",
    ),
    Mutant(
        "textures: a tile of a power too many",
        TEXTURES,
        "bits = limit.bit_length() - 1",
        "bits = limit.bit_length()",
        (OPS_PRINT + "::test_a_tile_is_a_power_of_two_within_the_limit",),
        "a tile fits the device's limit",
    ),
    Mutant(
        "textures: the first tile fits and is cut",
        TEXTURES,
        "if count <= limit:",
        "if count < limit:",
        (OPS_PRINT + "::test_what_just_fits_a_texture_object_is_one",),
        "what fits one texture object is one",
    ),
    Mutant(
        "swap: textures are not refreshed",
        SWAP,
        "            refresh_blocks(cache, ids)\n",
        "            pass\n",
        (
            "tests/ops/test_textures.py::test_blocks_that_are_copied_scattered_or_swapped_in_are_seen_through_textures[host-0]",
        ),
        "blocks that come back are seen through textures",
    ),
    Mutant(
        "swap: a run of no bytes",
        SWAP,
        "bisect_right(begins, first)",
        "bisect_left(begins, first)",
        ("tests/ops/test_blocks.py::test_swapped_blocks_come_back[host-2-BSHD]",),
        "runs of neighbours are split where a buffer begins",
        equivalent="a buffer that begins with a run has a run of no bytes before it: nothing else is copied",
    ),
    Mutant(
        "swap: out and in share a launch",
        SWAP,
        "key = len(ids), out",
        "key = len(ids)",
        ("tests/ops/test_blocks.py::test_swapped_blocks_come_back[host-2-BSHD]",),
        "gathering and scattering are different launches",
    ),
    Mutant(
        "rope: turns of another scaling",
        "cupaged/ops/cache.py",
        "name = (rotary_dim, theta, scaling)",
        "name = (rotary_dim, theta)",
        (OPS_PRINT + "::test_each_scaling_has_turns_of_its_own",),
        "each scaling has turns of its own",
    ),
    Mutant(
        "scheduler: one more than may run",
        SCHEDULER,
        "len(self.running) < self.max_num_seqs",
        "len(self.running) <= self.max_num_seqs",
        (SCHEDULER_TESTS,),
        "no more run than may",
    ),
    Mutant(
        "scheduler: computing again starts where it was",
        SCHEDULER,
        "            sequence.num_computed = 0\n",
        "            pass\n",
        (SCHEDULER_TESTS,),
        "a sequence that was dropped is computed from its first token",
    ),
    Mutant(
        "scheduler: a peer protects nobody",
        SCHEDULER,
        "if running.rank <= sequence.rank]",
        "if running.rank < sequence.rank]",
        (SCHEDULER_TESTS,),
        "a sequence does not preempt itself to make room for itself",
    ),
    Mutant(
        "scheduler: admission after a preemption",
        SCHEDULER,
        "if len(self._preempted) == preempted_before:",
        "if True:",
        (SCHEDULER_TESTS,),
        "nobody is admitted in a step that preempts",
    ),
]

UNWRITTEN_TESTS = "tests/memory/test_unwritten.py"
MOVES_TESTS = "tests/memory/test_moves.py"
FAILURE_TESTS = "tests/engine/test_failed_calls.py"
MOVES = "cupaged/memory/moves.py"

UNDISTURBED = [
    Mutant(
        "moves: what a move reads stays reserved for ever",
        MOVES,
        "            self._release(move.pairs[:, 0])\n",
        "            pass\n",
        (MOVES_TESTS,),
        "a CPU block is free again once the move that reads it was made",
    ),
    Mutant(
        "moves: a swap reserves nothing",
        MANAGER,
        "                self.cpu.reserve(pairs[:, 0])\n",
        "                pass\n",
        (MOVES_TESTS,),
        "no other move writes to a CPU block that a swap is about to read",
    ),
    Mutant(
        "moves: looking takes a move away",
        MOVES,
        "            if self._moves and self._moves[0] is move:",
        "            if self._moves:",
        (MOVES_TESTS,),
        "a move is dropped only when it was made itself",
    ),
    Mutant(
        "manager: an offload is not on the list",
        MANAGER,
        '            self.moves.add(Move("out", np.stack([source, target], axis=1), cached=True))\n',
        "            pass\n",
        (MANAGER_TESTS, MOVES_TESTS),
        "what is kept on the CPU is moved there",
    ),
    Mutant(
        "manager: a batch's last token counts as computed",
        MANAGER,
        "written = start if num_tokens == stop else num_tokens - 1",
        "written = start if num_tokens == stop else num_tokens",
        (UNWRITTEN_TESTS,),
        "a block that the last token of a victim filled is not found",
    ),
    Mutant(
        "manager: blocks left behind by a swap stay findable",
        MANAGER,
        "        if sequence.left_blocks is not None:",
        "        if False:",
        (UNWRITTEN_TESTS,),
        "what was never computed is not found where it lay before a swap",
    ),
    Mutant(
        "manager: offloaded copies stay findable",
        MANAGER,
        "        self.cpu.forget(digests)\n\n    def _publish_if_wanted",
        "\n    def _publish_if_wanted",
        (UNWRITTEN_TESTS,),
        "what was never computed is not found on the CPU",
    ),
    Mutant(
        "manager: a victim is dropped as if it were computed",
        MANAGER,
        "            self._unpublish_unwritten(self._known(seq_id))\n            self.free(seq_id)",
        "            self.free(seq_id)",
        (UNWRITTEN_TESTS,),
        "a victim that was not computed is not found",
    ),
    Mutant(
        "manager: undoing a copy loses the shared block",
        MANAGER,
        "            self.gpu.reserve(np.array([mark.tail], np.int32))\n",
        "            pass\n",
        (UNWRITTEN_TESTS,),
        "after an undone copy both sequences read the block again",
    ),
    Mutant(
        "manager: undo leaves what was published",
        MANAGER,
        "        self._unpublish(sequence, mark.num_published)\n",
        "",
        (UNWRITTEN_TESTS,),
        "what an undone append filled is not found",
    ),
    Mutant(
        "manager: a readmitted sequence counts its own prefix as a hit",
        MANAGER,
        "self.prefix_caching and not readmitted:",
        "self.prefix_caching:",
        (UNWRITTEN_TESTS,),
        "the hit rate leaves out what a preempted sequence finds of its own",
    ),
    Mutant(
        "scheduler: a preempted request is admitted as new",
        SCHEDULER,
        "readmitted=sequence.num_preemptions > 0",
        "readmitted=False",
        (FAILURE_TESTS + "::test_a_preempted_request_counts_no_hit_for_what_it_finds_of_its_own",),
        "the hit rate leaves out what a preempted request finds of its own",
    ),
    Mutant(
        "preemption: a prompt that others wait for gives way alone",
        "cupaged/memory/preemption.py",
        " >= short and not _are_waited_for(manager, victims)",
        " >= short",
        (UNWRITTEN_TESTS,),
        "nobody is left to read blocks that nobody computes",
    ),
    Mutant(
        "pool: a hook that raises loses the blocks",
        "cupaged/memory/pool.py",
        "            except BaseException:\n                self.policy.add(blocks)\n                raise\n",
        "            except BaseException:\n                raise\n",
        (UNWRITTEN_TESTS,),
        "blocks whose eviction failed are evictable again",
    ),
    Mutant(
        "cache: naming a block twice counts anew",
        "cupaged/memory/prefix_cache.py",
        "if owner == ids[i] and not named[i]]",
        "if owner == ids[i]]",
        (UNWRITTEN_TESTS,),
        "publishing the same blocks again changes no count",
    ),
    Mutant(
        "engine: moves are forgotten before they are made",
        "cupaged/engine/generate.py",
        "            self._carry_out(step.moves)\n",
        "            self.manager.moves.done(step.moves)\n            self._carry_out(step.moves)\n",
        (FAILURE_TESTS,),
        "moves that failed are made by the next step",
    ),
    Mutant(
        "attention: a failed call keeps its tokens",
        "cupaged/engine/attention.py",
        "            self._undo(step.growth, error)\n            raise\n",
        "            raise\n",
        (FAILURE_TESTS,),
        "a call that fails looks as if it had never been made",
    ),
]

HUGE_TESTS = "tests/ops/test_huge_logits.py"
TILE = "kernels_cu/include/prefill_tile.cuh"

LOGITS = [
    Mutant(
        "prefill: weights may outgrow their type",
        TILE,
        "outgrown = outgrown || sum > headroom;",
        "outgrown = false;",
        (PREFILL_TESTS + "::test_logits_may_outgrow_all_before_them[host-climbing-float16-60]",),
        "weights stay within the storage type",
    ),
    Mutant(
        "prefill: no maximum is large",
        TILE,
        "wants = wants || (fabsf(state.max) > LARGE && state.max != NO_LOGIT);",
        "wants = wants || false;",
        (HUGE_TESTS,),
        "beside a large maximum, weights are made of rounded logits",
    ),
    Mutant(
        "prefill: infinite products are taken as they are",
        "kernels_cu/attention/paged_prefill.cu",
        " || Tile::has_infinity(product)",
        "",
        (HUGE_TESTS,),
        "a product beyond float32 counts as the largest number",
    ),
    Mutant(
        "softmax: a logit beyond float32 is infinite",
        "kernels_cu/include/softmax.cuh",
        "  const float at_most = logit > kLargestFloat ? kLargestFloat : logit;",
        "  const float at_most = logit;",
        (HUGE_TESTS,),
        "a logit beyond float32 counts as the largest number",
    ),
    Mutant(
        "persistent: the first fence is missing",
        "kernels_cu/attention/paged_attention_persistent.cu",
        "fence_device();\n        exchange.last",
        "exchange.last",
        ("tests/runtime/test_mutants.py",),
        "what is merged was written before its writer counted itself",
    ),
]

MUTANTS = [*MEMORY, *UNDISTURBED, *KERNELS, *LOGITS, *OPS]
