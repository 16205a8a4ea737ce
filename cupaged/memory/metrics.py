"""How full, how well, how often: the numbers that tell whether the memory manager does its work.

The share of blocks in use says little: a pool can be two thirds used while a third of the slots hold tokens. `snapshot`
therefore counts slots as well; blocks that several sequences share count once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cupaged.memory.counters import Counters

if TYPE_CHECKING:
    from cupaged.memory.manager import BlockManager
    from cupaged.memory.pool import BlockPool

__all__ = ["History", "PrometheusCollector", "external_fragmentation", "snapshot"]


def snapshot(manager: BlockManager) -> dict[str, int | float]:
    """Return every gauge and counter of a manager as a plain dict.

    Blocks are free, used (read by a sequence) or evictable (cached, read by none); ``blocks_shared`` of the used ones
    are read by several. ``token_occupancy`` is the share of the used blocks' slots that hold tokens, and
    ``tail_waste_slots`` are the slots that do not: the ends of last blocks. ``external_fragmentation`` is what an
    allocator of contiguous memory would suffer from; paging does not. Rates are 0 where there is nothing to divide by.

    It scans the block states, O(num_blocks).
    """
    with manager.lock:
        gpu, counters = manager.gpu, manager.counters
        slots = gpu.num_used * manager.block_size
        waste = _tail_waste(manager)
        swapped = sum(manager.is_swapped(seq_id) for seq_id in manager.seq_ids)
        return {
            "blocks_total": gpu.num_blocks,
            "blocks_free": gpu.num_free,
            "blocks_used": gpu.num_used,
            "blocks_shared": int(np.count_nonzero(gpu.ref_count > 1)),
            "blocks_evictable": gpu.num_evictable,
            "blocks_used_peak": gpu.peak_used,
            "block_usage": _ratio(gpu.num_used, gpu.num_blocks),
            "cpu_blocks_total": manager.cpu.num_blocks,
            "cpu_blocks_used": manager.cpu.num_used,
            "cpu_blocks_evictable": manager.cpu.num_evictable,
            "sequences_running": len(manager.seq_ids) - swapped,
            "sequences_swapped": swapped,
            "tokens_stored": slots - waste,
            "token_occupancy": _ratio(slots - waste, slots),
            "tail_waste_slots": waste,
            "external_fragmentation": external_fragmentation(gpu),
            **asdict(counters),
            "prefix_hit_rate": _ratio(counters.cached_tokens, counters.prompt_tokens),
            "evictions": gpu.num_evicted,
            "swapped_bytes": (counters.blocks_swapped_out + counters.blocks_swapped_in) * manager.bytes_per_block,
        }


def external_fragmentation(pool: BlockPool) -> float:
    """Return the share of a pool's free blocks that lie outside its longest run of free blocks."""
    if not pool.num_free:
        return 0.0
    edges = np.flatnonzero(np.diff(pool.allocator.allocated, prepend=True, append=True))
    longest = int((edges[1::2] - edges[::2]).max())
    return 1 - longest / pool.num_free


class History:
    """Snapshots over time, one array a name.

    Parameters
    ----------
    manager : BlockManager
        What to look at.
    names : collection of str, optional
        Which entries of `snapshot` to keep (default: all).
    """

    def __init__(self, manager: BlockManager, names: tuple[str, ...] | None = None) -> None:
        known = tuple(snapshot(manager))
        unknown = set(names or ()) - set(known)
        if unknown:
            raise ValueError(f"names must be entries of a snapshot, {', '.join(known)}; got {', '.join(unknown)}")
        self.manager = manager
        self._times: list[float] = []
        self._values: dict[str, list[float]] = {name: [] for name in names or known}

    def sample(self, time: float) -> dict[str, int | float]:
        """Add a snapshot taken at `time`, in whatever unit the caller counts, and return it."""
        now = snapshot(self.manager)
        self._times.append(time)
        for name, values in self._values.items():
            values.append(now[name])
        return now

    @property
    def times(self) -> NDArray[np.float64]:
        """When the samples were taken, float64 [num_samples]."""
        return np.array(self._times)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return one entry over time, float64 [num_samples]."""
        return np.array(self._values[name], np.float64)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._times)

    def as_rows(self) -> list[dict[str, float]]:
        """Return one dict a sample, with its time, ready for a table."""
        columns = {"time": self._times, **self._values}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


CUMULATIVE = frozenset({"evictions", "swapped_bytes", *(field for field in asdict(Counters()))})


class PrometheusCollector:
    """A collector for prometheus-client: ``REGISTRY.register(PrometheusCollector(manager))``.

    Every entry of `snapshot` becomes a gauge ``<prefix>_<name>``, or, if it only grows, a counter
    ``<prefix>_<name>_total``. Needs the package prometheus-client.
    """

    def __init__(self, manager: BlockManager, prefix: str = "cupaged") -> None:
        self.manager = manager
        self.prefix = prefix

    def collect(self) -> Iterator[Any]:
        """Yield one metric an entry; prometheus-client calls this at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, value in snapshot(self.manager).items():
            family = CounterMetricFamily if name in CUMULATIVE else GaugeMetricFamily
            yield family(f"{self.prefix}_{name}", name.replace("_", " "), value=value)


def _tail_waste(manager: BlockManager) -> int:
    """Return the empty slots in the last blocks on the GPU; readers of one last block see the same tokens in it."""
    tables = manager.tables
    rows = np.flatnonzero(tables.num_blocks)
    _, first = np.unique(tables.tails(rows), return_index=True)
    return int(abs(tables.room[rows[first]]).sum())


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
