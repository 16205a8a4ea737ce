"""Slot mappings."""

import numpy as np


def broken_runs(rng, num_slots, block_size):
    """Return slots in runs that begin anywhere, cross blocks, and are broken by skipped tokens; none comes twice."""
    starts = np.unique(np.concatenate([rng.integers(0, num_slots, 6), [0, 2 * block_size]]))
    runs = [np.arange(a, b) for a, b in zip(starts, [*starts[1:], num_slots], strict=True)]
    slots = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
    slots[rng.integers(0, len(slots), 4)] = -1
    return slots[: len(slots) - int(rng.integers(0, 16))]
