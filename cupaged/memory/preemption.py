"""When eviction is not enough: which sequences give way, and whether they are swapped or computed again.

A victim's blocks come back at a price. Swapping moves them to the CPU and back, at the speed of the link; dropping them
means that the prompt and everything generated so far go through the model once more, at the speed of prefill. Which is
cheaper depends on the machine, the model and the length, so it is a model with measured rates that decides (compare
section 7.3 and figure 19 of arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cupaged.errors import OutOfBlocksError
from cupaged.memory.allocator import whole_number
from cupaged.memory.manager import NO_PAIRS, BlockManager, Pairs
from cupaged.memory.pool import NO_BLOCKS

__all__ = ["CostModel", "Preemption", "make_room"]

SeqId = Hashable


@dataclass(frozen=True)
class CostModel:
    """What it costs to bring a preempted sequence back. Measure the rates on the machine that serves.

    Parameters
    ----------
    prefill_tokens_per_s : float
        Tokens of short prompts that the model computes in a second.
    link_bytes_per_s : float
        Bytes that move between GPU and CPU in a second, in one direction.
    bytes_per_block : float
        Keys and values of a block over all layers.
    seconds_per_copy : float
        What a copied block costs besides its bytes; small blocks make a swap of many copies.
    par_context : float
        Context length at which attention costs as much as the rest of the model; see `cupaged.memory.eviction.Cost`.
    """

    prefill_tokens_per_s: float
    link_bytes_per_s: float
    bytes_per_block: float
    seconds_per_copy: float = 0.0
    par_context: float = 30_000.0

    def recompute_seconds(self, num_tokens: int) -> float:
        """Return the time to compute a sequence's keys and values again."""
        return num_tokens * (1 + num_tokens / (2 * self.par_context)) / self.prefill_tokens_per_s

    def swap_seconds(self, num_blocks: int) -> float:
        """Return the time to move a sequence's blocks out and in again."""
        return 2 * num_blocks * (self.bytes_per_block / self.link_bytes_per_s + self.seconds_per_copy)

    def prefers_swap(self, num_tokens: int, num_blocks: int) -> bool:
        """Return whether swapping is the cheaper of the two."""
        return self.swap_seconds(num_blocks) < self.recompute_seconds(num_tokens)


@dataclass
class Preemption:
    """Who gave way, and how."""

    swapped: list[SeqId] = field(default_factory=list)
    """Sequences that lie in the CPU pool now; bring them back with `BlockManager.swap_in`."""
    dropped: list[SeqId] = field(default_factory=list)
    """Sequences that the manager has forgotten; admit them again, as `readmitted`, with all their tokens."""
    pairs: Pairs = field(default_factory=lambda: NO_PAIRS)
    """int32 [num_blocks, 2]: the (GPU block, CPU block) copies to make before anything else."""


def make_room(
    manager: BlockManager,
    num_blocks: int,
    cost: CostModel | None = None,
    *,
    protect: Collection[SeqId] = (),
    priority: int | None = None,
) -> Preemption:
    """Preempt as few sequences as it takes for `num_blocks` GPU blocks to be free or evictable.

    The lowest priority gives way first; among equals, the one admitted last, which has the least to lose. A sequence
    whose prompt others share, and which may not have computed it yet, gives way only together with them.

    Parameters
    ----------
    manager : BlockManager
        Whose sequences may have to give way.
    num_blocks : int
        Blocks that must be available.
    cost : CostModel, optional
        Decides between swapping and dropping; without it, or without room in the CPU pool, victims are dropped.
    protect : collection of hashables
        Sequences that must stay.
    priority : int, optional
        If given, only sequences of at most this priority give way.

    Returns
    -------
    Preemption
        The victims, none if there was room.

    Raises
    ------
    OutOfBlocksError
        If it would not be enough if all of them gave way; none has then.
    """
    num_blocks = whole_number("num_blocks", num_blocks, at_least=0)
    with manager.lock:
        short = num_blocks - manager.gpu.num_available
        if short <= 0:
            return Preemption()
        victims = _victims(manager, _candidates(manager, protect, priority), short)
        if victims is None:
            raise OutOfBlocksError(num_blocks, manager.gpu.num_free, manager.gpu.num_evictable)
        swapped = _worth_swapping(manager, victims, cost)
        pairs = manager.swap_out(*swapped) if swapped else NO_PAIRS
        dropped = [seq_id for seq_id in victims if seq_id not in swapped]
        for seq_id in dropped:
            manager.drop(seq_id)
        manager.counters.preemptions += len(victims)
        return Preemption(swapped, dropped, pairs)


def _candidates(manager: BlockManager, protect: Collection[SeqId], priority: int | None) -> list[SeqId]:
    """Return who may give way, first victim first."""
    latest_first = reversed([seq_id for seq_id in manager.seq_ids if not manager.is_swapped(seq_id)])
    allowed = [
        seq_id
        for seq_id in latest_first
        if seq_id not in protect and (priority is None or manager.priority(seq_id) <= priority)
    ]
    return sorted(allowed, key=manager.priority)


def _victims(manager: BlockManager, candidates: list[SeqId], short: int) -> list[SeqId] | None:
    """Return the first candidates that free `short` blocks together, less those that contribute nothing."""

    def are_enough(victims: list[SeqId]) -> bool:
        return _freed(manager, victims) >= short and not _are_waited_for(manager, victims)

    count = next((n for n in range(1, len(candidates) + 1) if are_enough(candidates[:n])), None)
    if count is None:
        return None
    victims = candidates[:count]
    for seq_id in reversed(candidates[:count]):
        others = [victim for victim in victims if victim != seq_id]
        if are_enough(others):
            victims = others
    return victims


def _are_waited_for(manager: BlockManager, seq_ids: list[SeqId]) -> bool:
    """Whether others read blocks that these sequences are still to compute."""
    unwritten: NDArray[np.int32] = np.concatenate([NO_BLOCKS, *(manager.unwritten_blocks(each) for each in seq_ids)])
    return len(unwritten) > 0 and _freed(manager, seq_ids, unwritten) < len(np.unique(unwritten))


def _freed(manager: BlockManager, seq_ids: list[SeqId], among: NDArray[np.int32] | None = None) -> int:
    """Return how many blocks, of all or `among` some, have no reader besides these sequences."""
    if not seq_ids:
        return 0
    held: NDArray[np.int32] = np.concatenate([manager.blocks(seq_id) for seq_id in seq_ids])
    blocks, readers = np.unique(held, return_counts=True)
    freed = blocks[manager.gpu.ref_count[blocks] == readers]
    return len(freed) if among is None else int(np.count_nonzero(np.isin(freed, among)))


def _worth_swapping(manager: BlockManager, victims: list[SeqId], cost: CostModel | None) -> list[SeqId]:
    """Return the victims to swap: those that are cheaper to swap, as far as the CPU pool has room."""
    swapped: list[SeqId] = []
    if cost is None:
        return swapped
    for seq_id in victims:
        cheaper = cost.prefers_swap(manager.num_tokens(seq_id), len(manager.blocks(seq_id)))
        if cheaper and manager.can_swap_out(*swapped, seq_id):
            swapped.append(seq_id)
    return swapped
