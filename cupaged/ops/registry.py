"""What kernels there are: name, file, idea, and what they serve."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    name: str
    file: str
    idea: str
    constraints: str


_KERNELS = (
    KernelInfo(
        "paged_attention_v1",
        "attention/paged_attention_v1.cu",
        "one thread block per (sequence, query head); logits in shared memory, one stretch of the context at a time",
        "float16, bfloat16, float32; D 32 to 256 in steps of 8; block size 1 to 256; any group, length and layout",
    ),
    KernelInfo(
        "append_kv",
        "cache/append_kv.cu",
        "writes new keys and values to the slots of a slot mapping, 16 bytes a thread",
        "float16, bfloat16, float32; all layouts; a slot of -1 is skipped",
    ),
)
ATTENTION_KERNELS = tuple(info.name for info in _KERNELS if info.file.startswith("attention/"))


def kernels() -> dict[str, KernelInfo]:
    """Return every kernel by name."""
    return {info.name: info for info in _KERNELS}
