"""Does the layout of the KV cache matter, and where?

One kernel, paged_attention_v1, reads the same keys and values from five layouts. On a GPU the answer is time and
bandwidth; without one the same .cu file runs on the CPU and the answer is the memory traffic that each layout causes:
32-byte sectors per warp-wide request, and how much of the fetched bytes is used, by a request and by a thread block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import cupaged as pg
from cupaged.bench.accuracy import decode_check, verdict_on
from cupaged.bench.experiment import Experiment, print_failures, run_script
from cupaged.bench.report import new_figure, print_table, save_figure
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.traffic import cache_traffic
from cupaged.bench.workload import PLACEMENTS, DecodeWorkload, decode_workload

KERNEL = "paged_attention_v1"
LAYOUTS = ("BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX")
PLAIN = LAYOUTS[:4]  # a token's row for one head is one run of bytes
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
COLUMNS = {"dtype": "dtype", "head_dim": "D", "block_size": "block", **{layout: layout for layout in LAYOUTS}}
NOISE = 0.05  # differences below this are not called differences

EXPECTATION = (
    "What to expect. In the four plain layouts a token's row for one head is one run of bytes: at D = 128 in half "
    "precision 256 bytes, eight whole 32-byte sectors. They differ only in which row comes next, so a kernel that "
    "reads whole rows should not care. It may care where a row is no multiple of 32 bytes (D = 72 in half precision: "
    "144 bytes, 4.5 sectors). In BHSD and HBSD the rest of the sector is the same head's next token, which the same "
    "thread block wants; in BSHD and BS2HD it is another head's, which another block wants and fetches once more. "
    "BHDSX keeps 16 bytes of neighbouring tokens together, and its values run along the tokens: that should be no "
    "worse at block sizes that 16-byte loads divide; at odd ones values are read one by one, and each request uses "
    "little of what it touches, though the L1 cache should find the rest again."
)


@dataclass(frozen=True)
class Cell:
    """One combination to measure."""

    layout: str
    block_size: int
    head_dim: int
    dtype: str
    placement: str


@dataclass(frozen=True)
class Sweep:
    """What is swept, and the workload of every cell."""

    block_sizes: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    num_heads: int  # query heads and KV heads alike: every byte of the cache is wanted once
    seq_lens: tuple[int, ...]
    layouts: tuple[str, ...] = LAYOUTS
    placements: tuple[str, ...] = PLACEMENTS

    def cells(self) -> list[Cell]:
        """Return all combinations, the layouts of a combination next to each other."""
        axes = product(self.head_dims, self.dtypes, self.block_sizes, self.placements, self.layouts)
        return [Cell(layout, block, dim, dtype, place) for dim, dtype, block, place, layout in axes]

    def workload(self, cell: Cell, backend: str, seed: int = 0) -> DecodeWorkload:
        """Build a cell's cache and queries."""
        heads = self.num_heads
        return decode_workload(self.seq_lens, heads, heads, backend=backend, seed=seed, **asdict(cell))


HALF_AND_SINGLE = ("float16", "bfloat16", "float32")
SWEEPS = {
    ("cuda", False): Sweep((1, 7, 16, 64, 256), (64, 72, 128), HALF_AND_SINGLE, 32, (2048,) * 16),
    ("cuda", True): Sweep((16,), (72, 128), ("float16",), 32, (1024,) * 8),
    ("host", False): Sweep((1, 7, 16, 64), (64, 72, 128), HALF_AND_SINGLE, 2, (130, 67)),
    ("host", True): Sweep((1, 16), (72, 128), ("float16",), 2, (40, 17)),
}


class Layouts(Experiment):
    """One kernel over five layouts: measured on a GPU, counted on the host."""

    expectation = EXPECTATION
    place, spreads = 10, True
    configs = SWEEPS
    reads_ceiling = True

    def prepare(self) -> None:
        build_kernels(self.config, self.backend)

    def cells(self) -> list[Cell]:
        return self.config.cells()

    def measure(self, cell: Cell) -> dict[str, Any]:
        if self.ceiling is None:
            return count_on_host(self.config, cell)
        return measure_on_gpu(self.config, cell, self.ceiling)

    def show(self, rows: list[dict[str, Any]]) -> None:
        print_table(summary(rows, self.backend), COLUMNS, title(self.backend, self.once))
        print_failures(rows)

    def conclusion(self, rows: list[dict[str, Any]]) -> str:
        return conclusion(rows, self.backend)

    def notes(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"sweep": asdict(self.config), "question": self.asked, "kernel": KERNEL, **self.once}

    def draw(self, rows: list[dict[str, Any]], path: Path) -> None:
        draw(rows, self.backend, self.stamp, path)


# --- measuring ----------------------------------------------------------------------------------------------------


def attend(work: DecodeWorkload, out: Any = None) -> Any:
    """Launch the kernel, nothing read back."""
    return pg.paged_attention(*work.arguments, kernel=KERNEL, out=out, validate=False)


def count_on_host(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """Run a cell on the CPU, check it, and return its traffic."""
    work = sweep.workload(cell, "host")
    out = np.full_like(work.query, np.nan)
    whole, cache = cache_traffic(lambda: attend(work, out))
    return {
        **verdict_on(decode_check(out, *work.arguments, KERNEL)),
        "sectors_per_request": cache.sectors_per_request,
        "used_fraction": cache.used_fraction,
        "used_fraction_per_block": cache.used_fraction_per_block,
        "requests": cache.requests,
        "sectors": cache.sectors,
        "all_loads_sectors_per_request": whole.sectors_per_request,
    }


def measure_on_gpu(sweep: Sweep, cell: Cell, ceiling: float) -> dict[str, Any]:
    """Check a cell on the GPU, time it, and return bandwidth beside the read ceiling."""
    work = sweep.workload(cell, "cuda")
    out = work.cache.xp.full_like(work.query, float("nan"))
    attend(work, out)
    error = work.error_of(out, KERNEL, only_longest=True)
    copies = [work, *(sweep.workload(cell, "cuda", seed) for seed in range(1, copies_for_cold_l2(work.kv_bytes)))]
    timing = time_graph([lambda copy=copy: attend(copy, out) for copy in copies])
    return verdict_on(error) | timing.row(work.kv_bytes, ceiling)


def build_kernels(sweep: Sweep, backend: str) -> None:
    """Compile what the sweep needs, on all cores: the first run on a machine spends its time here."""
    variants = {(c.head_dim, c.dtype, c.block_size, c.layout == "BHDSX"): c for c in sweep.cells()}

    def build(cell: Cell) -> None:
        heads = sweep.num_heads
        attend(decode_workload((1,), heads, heads, backend=backend, **asdict(cell)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(copy_context().run, build, cell) for cell in variants.values()]
        for job in tqdm(jobs, desc="building", unit="kernel"):
            job.result()


# --- reporting ----------------------------------------------------------------------------------------------------


def metric_of(backend: str) -> str:
    """Return the row's key by which layouts are compared; more is better."""
    return "of_ceiling" if backend == "cuda" else "used_fraction_per_block"


def groups(
    rows: Iterable[dict[str, Any]], *keys: str, failed: bool = False
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return the rows that went well, or all with `failed`, by the values of `keys`."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if failed or row["status"] == "ok":
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def summary(rows: list[dict[str, Any]], backend: str) -> list[dict[str, Any]]:
    """Return one row per (dtype, head dim, block size): each layout's figure at random placement, or that it failed."""
    table = []
    all_rows = groups(rows, "dtype", "head_dim", "block_size", failed=True)
    for (dtype, dim, block), some in all_rows.items():
        line: dict[str, Any] = {"dtype": SHORT[dtype], "head_dim": dim, "block_size": block}
        for row in some:
            if row["status"] != "ok":
                line[row["layout"]] = row["status"].split(":")[0]
            elif row["placement"] == "random":
                line[row["layout"]] = (
                    f"{row['gb_s']:.0f} {100 * row['of_ceiling']:.0f}"
                    if backend == "cuda"
                    else f"{row['sectors_per_request']:.1f} {100 * row['used_fraction_per_block']:.0f}"
                )
        table.append(line)
    return table


def title(backend: str, notes: dict[str, Any]) -> str:
    """Return what the table shows."""
    if backend == "cuda":
        ceiling = notes["read_ceiling_gb_s"]
        return f"GB/s of keys and values, and percent of the read ceiling ({ceiling:.0f} GB/s); blocks at random"
    return "Sectors per request, and percent of the fetched bytes that a thread block uses; blocks at random"


def conclusion(rows: list[dict[str, Any]], backend: str) -> str:
    """Say in a few sentences what the rows show."""
    metric = metric_of(backend)
    failed = sum(row["status"] != "ok" for row in rows)
    what = "bandwidth" if backend == "cuda" else "the fraction of fetched bytes that a thread block uses"
    combinations = groups((r for r in rows if r["layout"] in PLAIN), "head_dim", "dtype", "block_size", "placement")
    gaps = {key: relative_gap([row[metric] for row in some]) for key, some in combinations.items()}
    same = sum(gap <= NOISE for gap in gaps.values())
    parts = [f"{failed} of {len(rows)} cells failed." if failed else f"All {len(rows)} cells match the reference."]
    if not gaps:
        return parts[0]
    parts.append(
        f"Among the four plain layouts, {what} differs by {NOISE:.0%} or less in {same} of {len(gaps)} combinations."
    )
    worst = max(gaps, key=lambda key: gaps[key])
    if gaps[worst] > NOISE:
        some = sorted(combinations[worst], key=lambda row: row[metric])
        dim, dtype, block, placement = worst
        parts.append(
            f"The largest gap is {gaps[worst]:.0%}, at D = {dim}, {dtype}, block size {block}, {placement} placement: "
            f"{some[-1]['layout']} {some[-1][metric]:.1%} against {some[0]['layout']} {some[0][metric]:.1%}."
        )
    parts.append(packed_against_plain(rows, metric))
    if backend == "host":
        parts.append(wasteful_requests(rows))
    parts.append(placement_effect(rows, metric))
    return " ".join(part for part in parts if part)


def packed_against_plain(rows: list[dict[str, Any]], metric: str) -> str:
    """Say where the x-packed layout loses to the best plain one, by block size."""
    losses = {}
    for (block,), some in groups(rows, "block_size").items():
        by_cell = groups(some, "head_dim", "dtype", "placement")
        ratios = [
            next(r[metric] for r in cell if r["layout"] == "BHDSX")
            / max(r[metric] for r in cell if r["layout"] in PLAIN)
            for cell in by_cell.values()
            if {"BHDSX"} < {r["layout"] for r in cell}
        ]
        if ratios:
            losses[block] = float(np.median(ratios))
    listed = ", ".join(f"{ratio:.2f} at block size {block}" for block, ratio in sorted(losses.items()))
    return f"BHDSX reaches, of the best plain layout's figure, in the median {listed}." if listed else ""


def wasteful_requests(rows: list[dict[str, Any]]) -> str:
    """Say where single requests use the least of what they touch."""
    good = [row for row in rows if row["status"] == "ok"]
    worst = min(good, key=lambda row: row["used_fraction"])
    return (
        f"Single requests waste the most in {worst['layout']} at D = {worst['head_dim']}, {worst['dtype']}, block size "
        f"{worst['block_size']}: {worst['used_fraction']:.0%} of their sectors' bytes is used at once, "
        f"{worst['used_fraction_per_block']:.0%} by the block in the end."
    )


def placement_effect(rows: list[dict[str, Any]], metric: str) -> str:
    """Say what random placement costs against blocks in order."""
    pairs = [
        {row["placement"]: row[metric] for row in some}
        for some in groups(rows, "layout", "head_dim", "dtype", "block_size").values()
    ]
    changes = [pair["random"] / pair["sequential"] - 1 for pair in pairs if len(pair) == len(PLACEMENTS)]
    if not changes:
        return ""
    return (
        f"Blocks placed at random instead of in order change it by {np.median(changes):+.1%} in the median, "
        f"{min(changes):+.1%} at worst."
    )


def relative_gap(values: list[float]) -> float:
    """Return how far the smallest value lies below the largest, as a fraction of the largest."""
    return 1 - min(values) / max(values)


def draw(rows: list[dict[str, Any]], backend: str, stamp: dict[str, str], path: Path) -> None:
    """One panel a head dimension, float16, random placement: the figure of each layout by block size."""
    metric = metric_of(backend)
    shown = groups((r for r in rows if r["dtype"] == "float16" and r["placement"] == "random"), "head_dim")
    if not shown:
        return
    figure, axes = new_figure(columns=len(shown), width=4.2 * len(shown) + 1, height=4.2)
    for axis, ((dim,), some) in zip(np.atleast_1d(axes), sorted(shown.items()), strict=True):
        blocks = sorted({row["block_size"] for row in some})
        for i, layout in enumerate(LAYOUTS):
            bars = {blocks.index(row["block_size"]): row for row in some if row["layout"] == layout}
            where = [b + (i - 2) * 0.16 for b in bars]
            axis.bar(where, [100 * row[metric] for row in bars.values()], width=0.15, label=layout)
            if backend == "host":
                dots = [100 * row["used_fraction"] for row in bars.values()]
                axis.plot(where, dots, "_", color="black", markersize=9, label="by one request" if i == 4 else None)
        axis.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        axis.set_xlabel("block size (tokens)")
        row_bytes = 2 * dim
        axis.set_title(f"D = {dim}: a row is {row_bytes} bytes, {row_bytes / 32:g} sectors", fontsize=10)
        axis.set_ylim(0, 110)
    what = "percent of the read ceiling" if backend == "cuda" else "percent of fetched bytes that a block uses"
    np.atleast_1d(axes)[0].set_ylabel(what)
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    where_run = stamp["device"] if backend == "cuda" else "counted on the CPU from the same .cu file"
    figure.suptitle(f"One decode kernel, five KV layouts, float16, blocks at random ({where_run})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = Layouts()

if __name__ == "__main__":
    run_script(EXPERIMENT)
