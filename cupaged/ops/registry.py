"""What kernels there are: name, file, idea, and what they serve."""

from __future__ import annotations

from dataclasses import dataclass

from cupaged.ops.variants import ALL_VARIANTS

__all__ = ["ATTENTION_KERNELS", "KernelInfo", "kernels"]


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of the toolkit.

    Attributes
    ----------
    name : str
        What ``kernel=`` takes; also the entry point.
    file : str
        The .cu file, under ``kernels_cu``.
    idea : str
        What it adds over the one before it.
    constraints : str
        What it serves.
    rounds_weights : bool
        Whether it rounds the softmax's weights to the storage type, as tensor cores want them.
    variants : frozenset of str
        What an attention kernel takes besides plain decode, of `cupaged.ops.variants.ALL_VARIANTS`.
    """

    name: str
    file: str
    idea: str
    constraints: str
    rounds_weights: bool = False
    variants: frozenset[str] = frozenset()


_ANY = "float16, bfloat16, float32; D 32 to 256 in steps of 8; block size 1 to 256; any group, length and layout"
_TENSOR_CORES = (
    "float16, bfloat16; D 32 to 256 in steps of 16; block size 1 to 256; any group and length; all but BHDSX"
)
_KERNELS = (
    KernelInfo(
        "paged_attention_naive",
        "attention/paged_attention_naive.cu",
        "a thread a token, three passes over the context: maximum, sum, weighted values; nothing is kept between them",
        _ANY,
    ),
    KernelInfo(
        "paged_attention_v1",
        "attention/paged_attention_v1.cu",
        "one thread block per (sequence, query head); logits in shared memory, one stretch of the context at a time",
        _ANY,
        variants=ALL_VARIANTS,
    ),
    KernelInfo(
        "paged_attention_warp",
        "attention/paged_attention_warp.cu",
        "one warp per (sequence, query head): 16-byte loads and shuffles, no shared memory, no barrier",
        _ANY,
    ),
    KernelInfo(
        "paged_attention_online",
        "attention/paged_attention_online.cu",
        "one pass: key and value of a token read together, a running maximum and sum, the block meets once",
        _ANY,
    ),
    KernelInfo(
        "paged_attention_texture",
        "attention/paged_attention_texture.cu",
        "paged_attention_online with keys and values through textures, or by another path of loads that a define names",
        "float16, bfloat16, float32; D 32 to 256 in steps of 8; block size 1 to 256; any group and length; all but "
        "BHDSX; within the device's limits on textures",
    ),
    KernelInfo(
        "paged_attention_v2",
        "attention/paged_attention_v2.cu",
        "the context cut into partitions that run side by side, up to 4 query heads of a KV head sharing each load",
        _ANY,
        variants=ALL_VARIANTS,
    ),
    KernelInfo(
        "paged_attention_batched",
        "attention/paged_attention_batched.cu",
        "any number of queries in a launch of any size; query_to_seq says whose context a query reads",
        _ANY,
    ),
    KernelInfo(
        "paged_attention_mma",
        "attention/paged_attention_mma.cu",
        "tensor cores for up to 16 query heads of a KV head at once, which read each byte once, over v2's partitions",
        _TENSOR_CORES,
        rounds_weights=True,
    ),
    KernelInfo(
        "paged_attention_persistent",
        "attention/paged_attention_persistent.cu",
        "tensor cores, copies that are always under way, and work shared out in chunks of tokens",
        _TENSOR_CORES,
        rounds_weights=True,
        variants=ALL_VARIANTS,
    ),
    KernelInfo(
        "merge_partitions",
        "attention/merge_partitions.cu",
        "merges what paged_attention_v2 or _mma found over the partitions of each context",
        "what paged_attention_v2 serves",
    ),
    KernelInfo(
        "plan_decode",
        "attention/plan_decode.cu",
        "shares decode work out over thread blocks, on the device, from lengths that the host need not know",
        "what paged_attention_persistent serves",
    ),
    KernelInfo(
        "paged_prefill",
        "attention/paged_prefill.cu",
        "new tokens of any number over a paged context: tiles of rows on tensor cores, tiles of tokens copied ahead",
        _TENSOR_CORES,
        rounds_weights=True,
        variants=ALL_VARIANTS - {"query_tokens"},
    ),
    KernelInfo(
        "plan_prefill",
        "attention/plan_prefill.cu",
        "shares prefill work out over thread blocks, on the device, the longest pieces first",
        "what paged_prefill serves",
    ),
    KernelInfo(
        "merge_states",
        "attention/merge_states.cu",
        "merges attention over disjoint parts of a context by their log-sum-exps",
        "float16, bfloat16, float32; any shape whose last axis is a multiple of 16 bytes; parts over nothing",
    ),
    KernelInfo(
        "append_kv",
        "cache/append_kv.cu",
        "writes new keys and values to the slots of a slot mapping, 16 bytes a thread",
        "float16, bfloat16, float32; all layouts; a slot of -1 is skipped",
    ),
    KernelInfo(
        "write_texture",
        "cache/write_texture.cu",
        "copies tokens from a cache to the array that a texture reads, by surface writes",
        "what paged_attention_texture serves",
    ),
    KernelInfo(
        "rope_append_kv",
        "cache/rope_append_kv.cu",
        "rotates new keys by their positions and writes them with their values; rotates queries too",
        "what append_kv serves; rotated dimensions a multiple of 16, of 8 in float32",
    ),
    KernelInfo(
        "copy_blocks",
        "cache/copy_blocks.cu",
        "copies whole blocks: within a cache, into an array, or from one, 64 bytes a thread",
        "any cache",
    ),
    KernelInfo(
        "rms_norm",
        "engine/rms_norm.cu",
        "normalises float32 rows by their mean square, and writes them in the type that products take",
        "float32 rows whose width is a multiple of 4; float16, bfloat16, float32 out",
    ),
    KernelInfo(
        "swiglu",
        "engine/swiglu.cu",
        "silu(gate) * up, of gates and ups side by side",
        "float16, bfloat16, float32; a width that is a multiple of 16 bytes",
    ),
    KernelInfo(
        "sample",
        "sampling/sample.cu",
        "draws tokens by temperature, top-k and top-p: a threshold is searched for bit by bit, nothing is sorted",
        "float16, bfloat16, float32 logits; up to 2**19 tokens",
    ),
)
ATTENTION_KERNELS = tuple(info.name for info in _KERNELS if info.name.startswith("paged_attention"))


def kernels() -> dict[str, KernelInfo]:
    """Return every kernel by name."""
    return {info.name: info for info in _KERNELS}
