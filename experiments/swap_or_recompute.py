"""When a sequence must give way and come back: is it quicker to swap its blocks, or to compute them again?

Figure 19 of the vLLM paper (arXiv 2309.06180) sets the two beside each other by block size, for OPT-13B: swapping small
blocks takes long, as each is a copy of its own; recomputing does not depend on them; from 16 to 64 the two are alike.
Here a sequence's blocks are swapped out and in, in all layers, beside the matrix products and the attention of a
prefill of the same length, by length and block size, with blocks that are neighbours on the host, which share a copy,
and with blocks that are not. Without a GPU it is checked that blocks come back as they were, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import cupaged as pg
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    save_figure,
)
from cupaged.bench.timing import time_graph, time_until_done
from cupaged.engine.products import product as matrix_product

REPEATS = {"repeats": 5, "warm_ups": 1, "repeats_of_slow": 3}
BLOCK_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048)
HOST_BLOCKS = NEIGHBOURS, SCATTERED = ("neighbours", "scattered")
PAPER_LENGTH = 256  # what the conclusion compares block sizes at
EXPECTATION = (
    "What to expect. Swapping moves bytes in proportion to the length, recomputing does arithmetic that grows a little "
    "faster: on one machine one of them wins at nearly every length. Blocks that are neighbours on the host share a "
    "copy, so their size should hardly matter; scattered ones cost a copy each, as in the paper, and small ones lose."
)


@dataclass(frozen=True)
class Model:
    """What decides both costs: OPT-13B, the paper's."""

    layers: int = 40
    heads: int = 40
    head_dim: int = 128
    hidden: int = 5120
    feed_forward: int = 20480


SMALL = Model(2, 2, 64, 128, 256)  # for a CPU, and for a smoke run


class SwapOrRecompute(Experiment):
    """A sequence of every length, in blocks of every size."""

    expectation = EXPECTATION
    place, wants_quiet_cpu = 130, True

    def set_up(self) -> None:
        small = self.backend == "host" or self.smoke
        self.model, self.lengths, self.sizes = (SMALL, (50,), (1, 16)) if small else (Model(), LENGTHS, BLOCK_SIZES)

    def cells(self) -> list[tuple[int, int]]:
        return list(product(self.lengths, self.sizes))

    def what(self, cell: tuple[int, int]) -> Row:
        return dict(zip(("tokens", "block_size"), cell, strict=True))

    def rows(self, cell: tuple[int, int]) -> list[Row]:
        length, size = cell
        recompute = recompute_seconds(self.model, length) if self.backend == "cuda" else None
        swap = Swap(self.model, length, size, self.backend)
        return [
            measured_row(self.what(cell) | {"host_blocks": kind}, partial(measure, swap, kind == SCATTERED, recompute))
            for kind in HOST_BLOCKS
        ]

    def title(self) -> str:
        return "A sequence out and in again, or computed again"

    def notes(self, rows: list[Row]) -> Row:
        return {"model": vars(self.model)}


HOST_COLUMNS = {"tokens": "tokens", "block_size": "block size", "host_blocks": "on the host", "status": "status"}
GPU_COLUMNS = {"tokens": "tokens", "block_size": "block size", "host_blocks": "on the host", "out_ms": "out ms|.2f",
           "in_ms": "in ms|.2f", "recompute_ms": "recompute ms|.2f", "gb_s": "GB/s|.1f",
           "status": "status"}  # fmt: skip


class Swap:
    """A sequence's blocks in all layers, as many to come back to, and the engine that moves them."""

    def __init__(self, model: Model, length: int, block_size: int, backend: str) -> None:
        self.model, self.backend, self.blocks = model, backend, -(-length // block_size)
        self.config = pg.CacheConfig(2 * self.blocks, block_size, model.heads, model.head_dim, "float16")
        self.nbytes = model.layers * self.blocks * block_size * self.config.bytes_per_token
        self.rng = np.random.default_rng(0)
        self.filled = 0  # words so far

    @cached_property
    def caches(self) -> list[pg.KVCache]:
        """One a layer."""
        return [pg.KVCache(self.config, self.backend) for _ in range(self.model.layers)]

    @cached_property
    def engine(self) -> pg.SwapEngine:
        """With as many blocks on the host."""
        return pg.SwapEngine(self.caches, 2 * self.blocks)

    def pairs(self, scattered: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return (from, to) blocks of the way out and of the way back, which ends elsewhere."""
        here, there = np.split(self.rng.permutation(2 * self.blocks).astype(np.int32), 2)
        places = self.rng.permutation(np.arange(0, 2 * self.blocks, 2)) if scattered else np.arange(self.blocks)
        return np.stack([here, places], axis=1), np.stack([places, there], axis=1)

    def brings_back(self, out: np.ndarray, back: np.ndarray) -> bool:
        """Whether every bit of every layer's blocks arrives; four bytes hold a number that was nowhere before."""
        xp = self.caches[0].xp
        for words in self._words():
            numbers = xp.arange(self.filled, self.filled + words.size, dtype=np.uint32)
            words[...] = numbers.reshape(words.shape)
            self.filled += words.size
        self.engine.swap_out(out)
        self.engine.swap_in(back)
        self.engine.synchronise()
        here, there = (xp.asarray(ids) for ids in (out[:, 0], back[:, 1]))
        same = [(words[there] == words[here]).all() for words in self._words()]
        return all(map(bool, same))

    def _words(self) -> Iterator[Any]:
        """Return keys and values of each layer as bits, [num_blocks, words]: of floats, NaN would equal nothing."""
        for cache in self.caches:
            for array in cache.storage:
                yield array.reshape(cache.config.num_blocks, -1).view(np.uint32)


def measure(swap: Swap, scattered: bool, recompute: float | None) -> Row:
    """Swap a sequence out and in, check that it came back, and time both ways."""
    out, back = swap.pairs(scattered)
    right = swap.brings_back(out, back)
    row: Row = {"status": "ok" if right else "wrong: other bytes came back", "blocks": swap.blocks}
    if recompute is None:
        return row
    out_s = time_until_done(lambda: swap.engine.swap_out(out), swap.engine.synchronise, **REPEATS)
    in_s = time_until_done(lambda: swap.engine.swap_in(back), swap.engine.synchronise, **REPEATS)
    return {**row, "mb": swap.nbytes / 1e6, "out_ms": 1e3 * out_s, "in_ms": 1e3 * in_s,
            "recompute_ms": 1e3 * recompute, "gb_s": 2 * swap.nbytes / (out_s + in_s) / 1e9}  # fmt: skip


@lru_cache
def recompute_seconds(model: Model, length: int) -> float:
    """Return the time of a prefill's matrix products, append and attention, one layer's times their number.

    From a graph: of a short prompt, launching by Python would be most of it.
    """
    import cupy

    xp = cupy
    width = model.heads * model.head_dim
    shapes = [(model.hidden, 3 * width), (width, model.hidden), (model.hidden, model.feed_forward),
              (model.feed_forward, model.hidden)]  # fmt: skip
    rng = xp.random.default_rng(0)  # zeros take less power, and so run at a higher clock

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)

    weights = [normal(*shape) for shape in shapes]
    inputs = [normal(length, shape[0]) for shape in shapes]
    cache = pg.KVCache(pg.CacheConfig(-(-length // 16), 16, model.heads, model.head_dim, "float16"), "cuda")
    rows = normal(length, model.heads, model.head_dim)
    tables = xp.arange(cache.config.num_blocks, dtype=np.int32)[None]
    lens, starts = xp.asarray([length], dtype=np.int32), xp.asarray([0, length], dtype=np.int32)
    slots = xp.arange(length)
    plan = pg.plan_prefill(cache, lens, starts, length, model.heads)

    def layer() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            matrix_product(x, weight)
        pg.append_kv(cache, rows, rows, slots, validate=False)
        pg.paged_prefill(rows, cache, tables, lens, starts, plan=plan, validate=False)

    return 1e-6 * model.layers * time_graph([layer]).median_us


def conclusion(rows: Sequence[Row]) -> str:
    """Say what the rows show."""
    parts = [f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} swaps brought back what went out."]
    timed = [row for row in rows if row["status"] == "ok" and "recompute_ms" in row]
    for kind in dict.fromkeys(row["host_blocks"] for row in timed):
        for size in dict.fromkeys(row["block_size"] for row in timed):
            mine = [row for row in timed if (row["host_blocks"], row["block_size"]) == (kind, size)]
            quicker = [row["tokens"] for row in mine if row["out_ms"] + row["in_ms"] < row["recompute_ms"]]
            said = "at no length" if not quicker else f"at {', '.join(map(str, quicker))} tokens"
            parts.append(f"Blocks of {size}, {kind}: swapping is quicker {said}.")
    return " ".join(parts)


def draw(rows: Sequence[Row], stamp: dict[str, str], path: Path) -> None:
    """Times by block size, and by length, beside recomputing; nothing without times."""
    timed = [row for row in rows if row["status"] == "ok" and "recompute_ms" in row]
    if not timed:
        return
    lengths = list(dict.fromkeys(row["tokens"] for row in timed))
    sizes = list(dict.fromkeys(row["block_size"] for row in timed))
    length = PAPER_LENGTH if PAPER_LENGTH in lengths else lengths[0]
    size = 16 if 16 in sizes else sizes[0]
    figure, axes = new_figure(2, width=12, height=4.8)
    for axis, key, fixed, label in (
        (axes[0], "block_size", ("tokens", length), "block size"),
        (axes[1], "tokens", ("block_size", size), "tokens"),
    ):
        chosen = [row for row in timed if row[fixed[0]] == fixed[1]]
        for kind in ("neighbours", "scattered"):
            mine = [row for row in chosen if row["host_blocks"] == kind]
            both = [row["out_ms"] + row["in_ms"] for row in mine]
            axis.plot([row[key] for row in mine], both, marker="o", label=f"swap out and in, {kind}")
        mine = [row for row in chosen if row["host_blocks"] == "neighbours"]
        axis.plot([row[key] for row in mine], [row["recompute_ms"] for row in mine], marker="s", label="recompute")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({row[key] for row in chosen}))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter("{x:g}")
        axis.set_xlabel(f"{label} ({fixed[0].replace('_', ' ')} {fixed[1]})")
        axis.set_ylabel("ms")
    axes[0].legend()
    figure.suptitle(f"Swap or recompute ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = SwapOrRecompute()

if __name__ == "__main__":
    run_script(EXPERIMENT)
