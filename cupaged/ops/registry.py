"""What kernels there are besides those of attention."""

from __future__ import annotations

from cupaged.runtime.info import KernelInfo

__all__ = ["OTHER_KERNELS"]

OTHER_KERNELS = (
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
