"""What does paging cost a kernel?

The same kernel reads the same keys and values three ways: without a block table, computing where each block lies; by a
table whose blocks lie in order; by a table whose blocks lie anywhere. And a kernel that only gathers rows looks the
table up for every element, for every 16-byte vector, or once a row. On a GPU the answer is time; without one it is the
loads that the look-ups add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.bench.accuracy import verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    save_figure,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.traffic import record_traffic
from cupaged.bench.workload import DecodeStep, DecodeWorkload, decode_call
from cupaged.runtime import kernels_defining, load_kernel

WAYS = ("computed", "in order", "random")  # no table; blocks in order; blocks anywhere
DEFINES: dict[str, dict[str, int]] = {"computed": {"TABLE_LOOKUP": 0}, "in order": {}, "random": {}}
ROW_ELEMENTS = 1024  # eight heads of 128, 2 KiB
GATHER = "gather_lookup"
UNITS = {"element": 1, "vector": 8, "row": ROW_ELEMENTS}  # what shares a look-up, in elements
PUBLISHED = (
    "vLLM's paper has 20 to 26 % for its kernel against a contiguous one; later kernels claim below 1 % at block 16"
)
EXPECTATION = (
    "What to expect. A look-up is 4 bytes for a block of keys and values: at block size 16, 8 KV heads and D = 128 in "
    "half precision 4 bytes for 64 KiB, and lanes that read the same entry share one request. So the table's bytes "
    "cost nothing; what can cost is that no row can be asked for before its block is known. Blocks in order or "
    "anywhere should differ only where a block is smaller than what DRAM opens at once. A look-up for every element "
    "adds one load to each load and should be seen; one for a vector or a row should not."
)


@dataclass(frozen=True)
class Config:
    """What is swept."""

    kernels: tuple[str, ...]
    block_sizes: tuple[int, ...]
    step: DecodeStep
    gather_blocks: tuple[int, ...]
    gather_tokens: int


KERNELS = ("paged_attention_v1", "paged_attention_persistent")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONFIGS = {
    ("cuda", False): Config(KERNELS, SIZES, DecodeStep("32/32 b32 2k", 32, 32, (2048,) * 32), (1, 16, 256), 1 << 20),
    ("cuda", True): Config(KERNELS, (16,), DecodeStep("32/32 b8 1k", 32, 32, (1024,) * 8), (16,), 1 << 16),
    ("host", False): Config(KERNELS, SIZES, DecodeStep("2/2 b2 256", 2, 2, (256,) * 2, 64), (1, 16, 256), 512),
    ("host", True): Config(KERNELS, (1, 16), DecodeStep("2/2 b2 64", 2, 2, (64,) * 2, 64), (16,), 64),
}


class PagingOverhead(Experiment):
    """Attention and a gather of rows, with blocks that are looked up and blocks that are computed."""

    expectation = EXPECTATION
    place, spreads, reads_ceiling = 30, True, True
    configs = CONFIGS

    def prepare(self) -> None:
        self.data, self.expected = gather_data(self.config.gather_tokens, self.backend)

    def cells(self) -> list[Row]:
        attention = product(self.config.kernels, self.config.block_sizes, ("block",), WAYS)
        gathers = product((GATHER,), self.config.gather_blocks, UNITS, ("computed", "random"))
        return [
            {"kernel": kernel, "block_size": size, "way": way, "look_up": look_up}
            for kernel, size, look_up, way in (*attention, *gathers)
        ]

    def measure(self, cell: Row) -> Row:
        kernel, block_size, way, look_up = cell.values()
        if kernel == GATHER:
            return gather(self.data, self.expected, block_size, look_up, way, self.backend, self.ceiling)
        return attend(kernel, replace(self.config.step, block_size=block_size), way, self.backend, self.ceiling)

    def compare(self, rows: list[Row]) -> list[Row]:
        return compared(rows, "kernel", "block_size", "look_up")

    def title(self) -> str:
        return f"One kernel with and without a block table, {self.config.step.name}; then rows gathered"

    def notes(self, rows: list[Row]) -> Row:
        return {**super().notes(rows), "published": PUBLISHED, **self.once}


COMMON = {"kernel": "kernel", "block_size": "block", "way": "table", "look_up": "look-up"}
GPU_COLUMNS = {**COMMON, "time_us": "us|.1f", "gb_s": "GB/s|.0f", "of_ceiling": "of ceiling|.1%",
               "overhead": "over computed|+.1%", "status": "status"}  # fmt: skip
HOST_COLUMNS = {**COMMON, "requests": "loads|,", "table_requests": "look-ups|,", "table_sectors": "their sectors|,",
                "overhead": "over computed|+.1%", "status": "status"}  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------------------


def attend(kernel: str, step: DecodeStep, way: str, backend: str, ceiling: float | None) -> Row:
    """Return what attention did one way."""
    placement = "random" if way == "random" else "sequential"
    work = step.build(backend, placement=placement)
    out = work.cache.xp.full_like(work.query, float("nan"))
    with kernels_defining(**DEFINES[way]):
        call = decode_call(as_given(work, way), kernel, out)
        if backend == "cuda":
            call()
        else:
            row = counted(call)
        error = work.error_of(out, kernel)
        if backend == "cuda":
            seeds = range(1, copies_for_cold_l2(work.kv_bytes, fetched_ahead=True))
            copies = (step.build(backend, seed, placement=placement) for seed in seeds)
            calls = [call, *(decode_call(as_given(copy, way), kernel, out) for copy in copies)]
            row = time_graph(calls).row(work.kv_bytes, ceiling)
    return {**verdict_on(error), **row}


def as_given(work: DecodeWorkload, way: str) -> DecodeWorkload:
    """Return what the kernel is given: where blocks are computed the table holds none, so that reading it is wrong."""
    if way != "computed":
        return work
    return replace(work, block_tables=work.cache.xp.full_like(work.block_tables, -1))


def gather_data(tokens: int, backend: str) -> tuple[Any, int]:
    """Return rows of random elements, uint16 [tokens * ROW_ELEMENTS], and their exclusive or."""
    words = np.random.default_rng(0).integers(2**64, size=tokens * ROW_ELEMENTS // 4, dtype=np.uint64)
    expected = int(np.bitwise_xor.reduce(np.bitwise_xor.reduce(words).reshape(1).view(np.uint16)))
    xp = np if backend == "host" else cupy_module()
    return xp.asarray(words.view(np.uint16)), expected


def gather(data: Any, expected: int, block_size: int, unit: str, way: str, backend: str, ceiling: float | None) -> Row:
    """Return what gathering all rows of `data` did; the elements' exclusive or must be `expected`."""
    xp = np if backend == "host" else cupy_module()
    tokens = data.size // ROW_ELEMENTS
    ids = np.random.default_rng(0).permutation(-(-tokens // block_size)).astype(np.int32)
    table = xp.asarray(ids if way == "random" else np.full_like(ids, -1))
    combined = xp.zeros(1, dtype=np.uint32)
    defines = {"ROW": ROW_ELEMENTS, "BLOCK_SIZE": block_size, "UNIT": UNITS[unit]}
    with kernels_defining(**DEFINES[way]):
        kernel = load_kernel("bench/gather_lookup.cu", GATHER, defines, backend)
    blocks = 4 if backend == "host" else 8 * xp.cuda.Device().attributes["MultiProcessorCount"]

    def call() -> None:
        kernel((blocks,), (256,), combined=combined, data=data, block_table=table, tokens=tokens)

    row = counted(call) if backend == "host" else call() or {}
    found = int(combined[0])
    status = "ok" if found == expected else f"wrong: the elements combine to {found}, expected {expected}"
    if backend == "cuda":
        row = time_graph([call]).row(data.nbytes, ceiling)
    return {"status": status, **row}


def cupy_module() -> Any:
    """Return CuPy."""
    import cupy

    return cupy


def counted(call: Callable[[], Any]) -> Row:
    """Return the loads of a launch on the CPU, and those of them that look blocks up."""
    with record_traffic() as log:
        call()
    table = log[-1].of("block_tables", "block_table")
    return {"requests": log[-1].requests, "table_requests": table.requests, "table_sectors": table.sectors}


# --- reporting ----------------------------------------------------------------------------------------------------


def compared(rows: list[Row], *keys: str) -> list[Row]:
    """Add to each row what it takes over the one that computes its blocks, as a fraction: time, or loads on the CPU."""
    base = {tuple(row[key] for key in keys): cost_of(row) for row in rows if row["way"] == "computed"}
    for row in rows:
        without, cost = base.get(tuple(row[key] for key in keys)), cost_of(row)
        if without and cost:
            row["overhead"] = cost / without - 1
    return rows


def cost_of(row: Row) -> float | None:
    """Return time, or loads where there is no time; None for a row that is not right."""
    return row.get("time_us", row.get("requests")) if row["status"] == "ok" else None


def conclusion(rows: list[Row]) -> str:
    """Say what the rows show."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} cells failed." if failed else f"All {len(rows)} cells are right."]
    what = "time" if any("time_us" in row for row in rows) else "loads"
    paged = [row for row in rows if row["way"] != "computed" and "overhead" in row]
    for kernel in dict.fromkeys(row["kernel"] for row in paged if row["look_up"] == "block"):
        for way in WAYS[1:]:
            some = [row for row in paged if (row["kernel"], row["way"], row["look_up"]) == (kernel, way, "block")]
            if some:
                worst = max(some, key=lambda row: row["overhead"])
                at_16 = "".join(f"{row['overhead']:+.1%} at block size 16, " for row in some if row["block_size"] == 16)
                parts.append(
                    f"{kernel}, {what} with a table against computed block ids, blocks "
                    f"{'anywhere' if way == 'random' else way}: {at_16}{worst['overhead']:+.1%} at most, at block size "
                    f"{worst['block_size']}."
                )
    gathered = [row for row in paged if row["look_up"] in UNITS]
    if gathered:
        block = min((row["block_size"] for row in gathered), key=lambda size: abs(size - 16))
        listed = ", ".join(
            f"{row['overhead']:+.1%} for every {row['look_up']}" for row in gathered if row["block_size"] == block
        )
        parts.append(f"Gathering rows from blocks of {block}, look-ups cost, in {what}: {listed}.")
    if what == "time" and len(parts) > 1:
        parts.append(f"Published: {PUBLISHED}.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Left: attention's overhead by block size; right: the gathering kernel's, by what shares a look-up."""
    good = [row for row in rows if "overhead" in row and row["way"] != "computed"]
    figure, (left, right) = new_figure(columns=2, width=11, height=4.5)
    sizes = sorted({row["block_size"] for row in good if row["look_up"] == "block"})
    for kernel, way in dict.fromkeys((row["kernel"], row["way"]) for row in good if row["look_up"] == "block"):
        line = {row["block_size"]: 100 * row["overhead"] for row in good
                if (row["kernel"], row["way"], row["look_up"]) == (kernel, way, "block")}  # fmt: skip
        left.plot([sizes.index(size) for size in line], list(line.values()), "o-", label=f"{kernel}, blocks {way}")
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    left.set_xlabel("block size (tokens)")
    left.set_ylim(bottom=min(0.0, *left.get_ylim()))
    gathered = [row for row in good if row["look_up"] in UNITS]
    blocks = sorted({row["block_size"] for row in gathered})
    for i, block in enumerate(blocks):
        bars = {row["look_up"]: 100 * row["overhead"] for row in gathered if row["block_size"] == block}
        places = [list(UNITS).index(unit) + (i - (len(blocks) - 1) / 2) * 0.25 for unit in bars]
        right.bar(places, list(bars.values()), width=0.23, label=f"block size {block}")
    right.set_xticks(range(len(UNITS)), [f"a look-up for every {unit}" for unit in UNITS], fontsize=8)
    what = "time" if stamp["backend"] == "cuda" else "loads"
    for axis, title in ((left, "Attention"), (right, "Gathering rows of 2 KiB, blocks at random")):
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(f"{what} over computed block ids, percent")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    where = stamp["device"] if what == "time" else "counted on the CPU from the same .cu files"
    figure.suptitle(f"What the block table costs ({where})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = PagingOverhead()

if __name__ == "__main__":
    run_script(EXPERIMENT)
