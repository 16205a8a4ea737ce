"""What a memory manager counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters"]


@dataclass
class Counters:
    """What a manager has counted since it began."""

    prompt_tokens: int = 0
    """Tokens of prompts whose text was given, so that a cached prefix could be looked up; none of the readmitted."""
    cached_tokens: int = 0
    """Those of them that were found."""
    copies: int = 0
    """Blocks copied because a sequence wrote to a block that another reads."""
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    blocks_offloaded: int = 0
    """Cached blocks that moved to the CPU when they were evicted."""
    blocks_restored: int = 0
    """Cached blocks that came back from the CPU."""
    preemptions: int = 0
    """Sequences that gave way to others."""
