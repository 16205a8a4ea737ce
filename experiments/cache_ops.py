"""How close to a copy's speed are the operations on the cache, and how close to the link's is swapping?

Appending, rotating and appending, copying, gathering and scattering blocks read every byte once and write it once: they
are held to the device's own copy, in every layout. Swapping is held to one pinned copy of the same bytes over the link,
both asked for ahead, behind a stream that is held, as a server asks for them behind other work, and once more from an
idle GPU, where the CPU's time counts. Each operation's result is checked first. Without a GPU results are checked and
not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

import cupaged as pg
from cupaged.bench.ceilings import copy_ceiling
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    save_figure,
)
from cupaged.bench.timing import time_behind_work, time_graph, time_until_done_in_turns
from cupaged.layouts import LAYOUTS

SIZES_MB = (1, 8, 64, 256)
COLD_MB = 64  # smaller ones are found in the L2 cache again, and are no share of the memory's speed
REPEATS = {"repeats": 31, "warm_ups": 5}  # of what goes over the link: much of it is Python, whose times scatter
EXPECTATION = (
    "What to expect. From some tens of megabytes on, vectors of 16 bytes that are read and written once should come "
    "within a tenth of the copy, whatever the layout: values in BHDSX, whose neighbours lie a block apart, are turned "
    "round in shared memory. Small operations are launches. A swap is a gather and a copy that overlap: the link's "
    "speed, if blocks on the host are neighbours; blocks that are not cost a copy each. From an idle GPU nothing hides "
    "the Python before the first copy, some 100 us: a tenth of 64 MB."
)


class CacheOps(Experiment):
    """Every operation in every layout, on blocks of some sizes."""

    expectation = EXPECTATION
    place, wants_quiet_cpu, spreads = 120, True, True

    def sizes(self) -> Sequence[float]:
        """Return how many megabytes are moved."""
        return (0.05,) if self.backend == "host" else SIZES_MB[2:3] if self.smoke else SIZES_MB

    def measure_once(self) -> Row:
        large = [size for size in self.sizes() if self.backend == "cuda" and size >= COLD_MB]
        return {"copy_ceiling_gb_s": {str(size): copy_ceiling(round(size * 1e6)) for size in large}}

    @property
    def ceilings(self) -> dict[str, float]:
        """The speed of a copy in GB/s, by the megabytes that it reads and writes."""
        return self.once["copy_ceiling_gb_s"]

    def cells(self) -> list[tuple[str, float]]:
        return list(product(LAYOUTS, self.sizes()))

    def what(self, cell: tuple[str, float]) -> Row:
        return dict(zip(("layout", "mb"), cell, strict=True))

    def rows(self, cell: tuple[str, float]) -> list[Row]:
        layout, size = cell
        return measure(layout, size, self.backend, self.ceilings.get(str(size)))

    def title(self) -> str:
        said = " and ".join(f"{ceiling:.0f} GB/s ({size} MB)" for size, ceiling in self.ceilings.items())
        return f"Bytes read and written, beside copies of as much: {said}" if said else "Results"

    def notes(self, rows: list[Row]) -> Row:
        return self.once


HOST_COLUMNS = {"operation": "operation", "layout": "layout", "mb": "MB|.2f", "status": "status"}
GPU_COLUMNS = {"operation": "operation", "layout": "layout", "mb": "MB|.0f", "time_us": "us|.1f", "gb_s": "GB/s|.0f",
               "of_ceiling": "of ceiling|.0%", "from_idle_of_ceiling": "from idle|.0%", "status": "status"}  # fmt: skip


def measure(layout: str, size_mb: float, backend: str, ceiling: float | None) -> list[Row]:
    """Check and time every operation on blocks of at least `size_mb` megabytes of keys and values."""
    config = pg.CacheConfig(1, 16, 8, 128, "bfloat16", layout)
    count = max(2, ceil(size_mb * 1e6 / (config.block_size * config.bytes_per_token)))
    work = Work(layout, count, backend)
    rows = []
    for name, (call, check) in work.operations().items():
        what = {"operation": name, "layout": layout, "mb": work.nbytes / 1e6}
        rows.append(measured_row(what, lambda c=call, k=check: on_device(c, k, work, ceiling)))
    for name, out in (("swap out", True), ("swap in", False)):
        what = {"operation": name, "layout": layout, "mb": work.nbytes / 1e6}
        rows.append(measured_row(what, lambda o=out: over_the_link(work, o)))
    return rows


class Work:
    """A cache of twice as many blocks as are moved, and what is moved."""

    def __init__(self, layout: str, count: int, backend: str) -> None:
        self.cache = pg.KVCache(pg.CacheConfig(2 * count, 16, 8, 128, "bfloat16", layout), backend)
        self.count, config, xp = count, self.cache.config, self.cache.xp
        self.nbytes = count * config.block_size * config.bytes_per_token
        rng = np.random.default_rng(0)
        self.order = rng.permutation(2 * count).astype(np.int32)
        tokens = count * config.block_size
        shape = (tokens, config.num_kv_heads, config.head_dim)
        generator = xp.random.default_rng(0)
        self.key, self.value = (
            generator.standard_normal(shape, dtype=np.float32).astype(config.numpy_dtype) for _ in "kv"
        )
        blocks = self.order[:count].astype(np.int64)
        self.slots_on_host = (blocks[:, None] * config.block_size + np.arange(config.block_size)).reshape(-1)
        self.slots = xp.asarray(self.slots_on_host)
        self.positions = xp.zeros(tokens, dtype=np.int32)
        self.sources, self.targets = (xp.asarray(ids) for ids in (self.order[:count], self.order[count:]))
        self.pairs = xp.stack([self.sources, self.targets], axis=1)

    def operations(self) -> dict[str, tuple[Callable[[], Any], Callable[[], bool]]]:
        """Return by name what is launched, and what says afterwards whether its result is right."""
        cache, count = self.cache, self.count
        out = pg.gather_blocks(cache, self.sources)
        return {
            "append": (
                lambda: pg.append_kv(cache, self.key, self.value, self.slots, validate=False),
                lambda: self._holds(self.sources),
            ),
            "rope and append": (  # position 0: nothing turns
                lambda: pg.rope_append_kv(cache, self.key, self.value, self.slots, self.positions, validate=False),
                lambda: self._holds(self.sources),
            ),
            "copy": (lambda: pg.copy_blocks(cache, self.pairs, validate=False), lambda: self._holds(self.targets)),
            "gather": (
                lambda: pg.gather_blocks(cache, self.sources, out, validate=False),
                lambda: bool((out == pg.gather_blocks(cache, self.targets)).all()) and count == len(out),
            ),
            "scatter": (
                lambda: pg.scatter_blocks(cache, self.targets, out, validate=False),
                lambda: self._holds(self.targets),
            ),
        }

    def _holds(self, ids: Any) -> bool:
        """Whether the listed blocks hold the new tokens in order."""
        config = self.cache.config
        ids = ids if isinstance(ids, np.ndarray) else ids.get()
        some = np.unique(np.linspace(0, self.count - 1, 8).astype(int))
        expected = [
            array.reshape(self.count, config.block_size, *array.shape[1:])[some] for array in (self.key, self.value)
        ]
        expected = [array if isinstance(array, np.ndarray) else array.get() for array in expected]
        return all(np.array_equal(*pair) for pair in zip(self.cache.blocks(ids[some]), expected, strict=True))


def on_device(call: Callable[[], Any], check: Callable[[], bool], work: Work, ceiling: float | None) -> Row:
    """Check and time an operation that reads and writes the work's bytes; hold it to a ceiling if there is one."""
    call()
    row: Row = {"status": "ok" if check() else "wrong: the cache holds something else"}
    if work.cache.backend == "host":
        return row
    timing = time_graph([call])
    bandwidth = 2 * work.nbytes / timing.median_us / 1e3
    row |= {"time_us": timing.median_us, "gb_s": bandwidth}
    return row | ({"of_ceiling": bandwidth / ceiling} if ceiling else {})


def over_the_link(work: Work, out: bool) -> Row:
    """Check and time a swap, beside one pinned copy of the same bytes."""
    engine = pg.SwapEngine([work.cache], work.count)
    pairs = np.stack([work.order[: work.count], np.arange(work.count, dtype=np.int32)], axis=1)
    engine.swap_out(pairs)
    engine.synchronise()
    gathered = pg.gather_blocks(work.cache, pairs[:, 0])
    expected = gathered if isinstance(gathered, np.ndarray) else gathered.get()
    right = np.array_equal(engine.host[0].blocks.view(np.uint16), expected.view(np.uint16))
    if not out:
        back = np.stack([pairs[:, 1], work.order[work.count :]], axis=1)
        engine.swap_in(back)
        engine.synchronise()
        moved = pg.gather_blocks(work.cache, work.targets)
        right = right and bool((moved == gathered).all())
    row: Row = {"status": "ok" if right else "wrong: other bytes arrived"}
    if work.cache.backend == "host":
        return row

    import cupy

    swap = partial(engine.swap_out, pairs) if out else partial(engine.swap_in, back)
    one_copy = over_in_one(gathered, engine.host[0].blocks, out)

    def swap_behind_work() -> None:
        swap()
        engine.wait()

    taken, link = time_behind_work([swap_behind_work, one_copy], **REPEATS)
    wait_for_copy = cupy.cuda.get_current_stream().synchronize
    from_idle, link_from_idle = time_until_done_in_turns(
        [(swap, engine.synchronise), (one_copy, wait_for_copy)], **REPEATS
    )
    return {**row, "time_us": 1e6 * taken, "gb_s": work.nbytes / taken / 1e9, "of_ceiling": link / taken,
            "link_gb_s": work.nbytes / link / 1e9, "from_idle_us": 1e6 * from_idle,
            "from_idle_of_ceiling": link_from_idle / from_idle}  # fmt: skip


def over_in_one(device: Any, host: np.ndarray, out: bool) -> Callable[[], Any]:
    """Return what copies all bytes at once between the device and pinned memory, on the current stream."""
    import cupy

    runtime = cupy.cuda.runtime
    far, near = host.ctypes.data, device.data.ptr
    kind = runtime.memcpyDeviceToHost if out else runtime.memcpyHostToDevice
    ends = (far, near) if out else (near, far)
    return lambda: runtime.memcpyAsync(*ends, device.nbytes, kind, cupy.cuda.get_current_stream().ptr)


def conclusion(rows: Sequence[Row]) -> str:
    """Say what the rows show."""
    parts = [f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} results are right."]
    timed = [row for row in rows if row["status"] == "ok" and "of_ceiling" in row and row["mb"] >= COLD_MB]
    for name in dict.fromkeys(row["operation"] for row in timed):
        mine = sorted((row for row in timed if row["operation"] == name), key=lambda row: row["of_ceiling"])
        ceiling = "one pinned copy" if "swap" in name else "the copy"
        from_idle = [row["from_idle_of_ceiling"] for row in mine if "from_idle_of_ceiling" in row]
        said = f", from an idle GPU {min(from_idle):.0%} to {max(from_idle):.0%}" if from_idle else ""
        parts.append(
            f"From 64 MB on, {name} reaches {mine[0]['of_ceiling']:.0%} ({mine[0]['layout']}) to "
            f"{mine[-1]['of_ceiling']:.0%} ({mine[-1]['layout']}) of {ceiling}{said}."
        )
    return " ".join(parts)


def draw(rows: Sequence[Row], stamp: dict[str, str], path: Path) -> None:
    """Bars by operation and layout, in percent of the ceiling, of the largest size; nothing without times."""
    timed = [row for row in rows if row["status"] == "ok" and "of_ceiling" in row]
    if not timed:
        return
    largest = max(row["mb"] for row in timed)
    best = {(row["operation"], row["layout"]): 100 * row["of_ceiling"] for row in timed if row["mb"] == largest}
    names = list(dict.fromkeys(name for name, _ in best))
    figure, axis = new_figure(width=12, height=4.8)
    width = 0.85 / len(LAYOUTS)
    for i, layout in enumerate(LAYOUTS):
        places = [n + (i - (len(LAYOUTS) - 1) / 2) * width for n in range(len(names))]
        bars = axis.bar(places, [best.get((name, layout), 0) for name in names], width=0.95 * width, label=layout)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("percent of the copy, or of one pinned copy")
    figure.legend(loc="outside lower center", ncols=len(LAYOUTS))
    axis.set_title(f"Operations on {largest:.0f} MB of cache ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = CacheOps()

if __name__ == "__main__":
    run_script(EXPERIMENT)
