"""Which block size is the best compromise?

Small blocks waste few slots; large ones need short block tables, few allocations, and give the kernel long runs of
bytes. For each size from 1 to 256: decode attention's time (kernel "auto") on a batch as it is met in serving, the
share of slots that hold tokens over a trace's decode steps, and the table's bytes. Without a GPU the loads of one step
are counted instead of timed.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupaged.attention.choose import explain
from cupaged.bench.accuracy import decode_check, verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    save_figure,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.traffic import record_traffic
from cupaged.bench.workload import DecodeStep, decode_call
from cupaged.memory.sampler import WORKLOADS, Trace, exact_sum, load_trace, sample_trace

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
AS_FAST = 0.02  # within this of the fastest is called as fast
AS_LEAN = 0.01  # slots wasted, at most, for a size that is called lean
CLAIM = (
    "The documents call 16 optimal for most workloads; vLLM's paper (arXiv 2309.06180, figure 18) finds 16 to 128 good "
    "on ShareGPT and 16 to 32 on Alpaca."
)
EXPECTATION = (
    "What to expect. A sequence wastes half a block on average, so waste grows with the size: under 1 % up to about 16 "
    "tokens where contexts are a thousand long. The kernel reads the same bytes whatever the size is: a token's row "
    "for one head is one run of bytes already in a block of one token. Only very small blocks should cost time, by "
    "look-ups that wait and by rows that lie anywhere."
)


@dataclass(frozen=True)
class Config:
    """The batch, and how many requests are sampled."""

    sizes: tuple[int, ...] = SIZES
    batch: int = 64
    longest: int = 16_384
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    requests: int = 10_000


SMALL = {"batch": 3, "longest": 100, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64}  # quick on a CPU
CONFIGS = {
    ("cuda", False): Config(),
    ("cuda", True): Config((1, 16), batch=8, requests=500),
    ("host", False): Config(**SMALL),
    ("host", True): Config((1, 16), **SMALL, requests=500),
}


class BlockSizes(Experiment):
    """A decode step of a trace's requests, at every block size."""

    expectation, claim, unit = EXPECTATION, CLAIM, "size"
    place, spreads, reads_ceiling = 40, True, True
    configs = CONFIGS

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--trace", type=Path, help="a trace file in Azure, BurstGPT, Mooncake or Vidur columns, plain or .gz"
        )
        parser.add_argument("--workload", choices=tuple(WORKLOADS), default="conversation", help="what is sampled")

    def set_up(self) -> None:
        path = self.options.trace
        trace = load_trace(path) if path else sample_trace(self.config.requests, self.options.workload)
        self.trace = trace[trace.output_tokens > 0]
        self.contexts = contexts_of(self.trace, self.config)

    def cells(self) -> Sequence[int]:
        return self.config.sizes

    def what(self, cell: int) -> Row:
        return {"block_size": cell, **memory_of(self.trace, self.contexts, cell)}

    def measure(self, cell: int) -> Row:
        step = step_of(self.config, self.contexts, cell)
        return measure_on_gpu(step, self.ceiling) if self.ceiling else count_on_host(step)

    def title(self) -> str:
        length = np.mean(self.contexts)
        return f"A decode step of {len(self.contexts)} requests ({self.trace.name}), {length:,.0f} tokens long"

    def notes(self, rows: list[Row]) -> Row:
        return {
            **super().notes(rows), "trace": self.trace.name, "claim": CLAIM, "contexts": self.contexts,
            "read_ceiling_gb_s": self.ceiling,
        }  # fmt: skip

    def file_name(self) -> str:
        return f"block_sizes_{self.trace.name}" if self.options.trace else "block_sizes"


MEMORY_COLUMNS = {"block_size": "block", "occupancy": "slots with tokens|.2%", "wasted_slots": "wasted a request|.1f",
                  "table_bytes": "table bytes|,", "allocations": "blocks a step|.2f"}  # fmt: skip
GPU_COLUMNS = {**MEMORY_COLUMNS, "kernel": "kernel", "time_us": "us|.1f", "of_ceiling": "of ceiling|.1%",
               "status": "status"}  # fmt: skip
HOST_COLUMNS = {**MEMORY_COLUMNS, "kernel": "kernel", "loads": "loads|,", "table_sectors": "table sectors|,",
                "status": "status"}  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------------------


def contexts_of(trace: Trace, config: Config) -> tuple[int, ...]:
    """Return the contexts of a batch at some moment: a request is met the more often the longer it generates."""
    if not len(trace):
        raise ValueError("trace must hold a request that generates at least one token, got none")
    rng = np.random.default_rng(0)
    met = rng.choice(len(trace), config.batch, p=trace.output_tokens / trace.output_tokens.sum())
    generated = rng.integers(1, trace.output_tokens[met] + 1)
    return tuple(int(n) for n in np.minimum(trace.prompt_tokens[met] + generated, config.longest))


def memory_of(trace: Trace, contexts: tuple[int, ...], size: int) -> Row:
    """Return what blocks of a size cost in memory and bookkeeping."""
    blocks = -(-np.array(contexts) // size)
    occupancy = trace.paged_occupancy(size)
    held = exact_sum(trace.token_steps()) / exact_sum(trace.output_tokens)
    return {
        "occupancy": occupancy,
        "wasted_slots": float(held / occupancy - held),  # of a request, averaged over its decode steps
        "table_bytes": int(4 * len(contexts) * blocks.max()),
        "allocations": len(contexts) / size,  # new blocks of the batch in a step, on average
    }


def step_of(config: Config, contexts: tuple[int, ...], size: int) -> DecodeStep:
    """Return the decode step at a block size."""
    heads = config.num_heads, config.num_kv_heads
    return DecodeStep("serving", *heads, contexts, config.head_dim, size, config.dtype)


def count_on_host(step: DecodeStep) -> Row:
    """Run a step on the CPU, check it, and return its loads; v1's, which all go through the recorder."""
    kernel = "paged_attention_v1"
    work = step.build("host")
    out = np.full_like(work.query, np.nan)
    with record_traffic() as log:
        decode_call(work, kernel, out)()
    table = log[-1].of("block_tables")
    verdict = verdict_on(decode_check(out, *work.arguments, kernel))
    return {"kernel": kernel, **verdict, "loads": log[-1].requests, "table_sectors": table.sectors}


def measure_on_gpu(step: DecodeStep, ceiling: float) -> Row:
    """Check a step on the GPU and time it."""
    work = step.build("cuda")
    out = work.cache.xp.full_like(work.query, float("nan"))
    kernel = explain(*work.arguments).kernel
    call = decode_call(work, kernel, out)
    call()
    error = work.error_of(out, kernel)
    copies = (step.build("cuda", seed) for seed in range(1, copies_for_cold_l2(work.kv_bytes, fetched_ahead=True)))
    timing = time_graph([call, *(decode_call(copy, kernel, out) for copy in copies)])
    return {"kernel": kernel, **verdict_on(error), **timing.row(work.kv_bytes, ceiling)}


# --- reporting ----------------------------------------------------------------------------------------------------


def compromise(rows: list[Row]) -> Row | None:
    """Return the largest size that is as fast as the fastest and lean; the leanest of the fast, if none is lean."""
    good = [row for row in rows if row["status"] == "ok"]
    times = [row["time_us"] for row in good if "time_us" in row]
    fast = [row for row in good if not times or row["time_us"] <= (1 + AS_FAST) * min(times)]
    lean = [row for row in fast if 1 - row["occupancy"] <= AS_LEAN]
    if lean:
        return max(lean, key=lambda row: row["block_size"])
    return max(fast, key=lambda row: row["occupancy"], default=None)


def conclusion(rows: list[Row]) -> str:
    """Say which size is the best compromise, and what its neighbours would change."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} sizes failed."] if failed else []
    best = compromise(rows)
    if best is None:
        return " ".join([*parts, "No size can be recommended."])
    good = [row for row in rows if row["status"] == "ok"]
    reasons = []
    if "time_us" in best:
        fastest = min(good, key=lambda row: row["time_us"])
        loss = best["time_us"] / fastest["time_us"] - 1
        reasons.append(
            f"its attention takes {best['time_us']:.1f} us, "
            + (f"{loss:.1%} more than at {fastest['block_size']}" if loss else "the least of all")
        )
    reasons.append(f"it leaves {1 - best['occupancy']:.2%} of the slots without a token")
    reasons.append(f"its table takes {best['table_bytes']:,} bytes")
    parts.append(f"Block size {best['block_size']} is the best compromise here: {', and '.join(reasons)}.")
    place = good.index(best)
    for row in good[max(0, place - 1) : place] + good[place + 1 : place + 2]:
        change = f"{1 - row['occupancy']:.2%} of the slots empty, {row['table_bytes']:,} bytes of table"
        if "time_us" in row:
            change = f"{row['time_us'] / best['time_us'] - 1:+.1%} time, {change}"
        parts.append(f"Block size {row['block_size']}: {change}.")
    if "time_us" not in best:
        parts.append("Time was not measured: a CPU says nothing about it.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Time (or loads) over block size on one axis, slots that hold tokens and the table's bytes on others."""
    good = [row for row in rows if row["status"] == "ok"]
    figure, (left, middle, right) = new_figure(columns=3, width=13, height=4.2)
    key, name = (
        ("time_us", "attention, us") if stamp["backend"] == "cuda" else ("loads", "loads of a step (on the CPU)")
    )
    for axis, column, factor, title in (
        (left, key, 1, name),
        (middle, "occupancy", 100, "slots that hold tokens, percent"),
        (right, "table_bytes", 1 / 1024, "block table, KiB"),
    ):
        axis.plot(range(len(good)), [factor * row[column] for row in good], "o-")
        axis.set_xticks(range(len(good)), [str(row["block_size"]) for row in good])
        axis.set_xlabel("block size (tokens)")
        axis.set_title(title, fontsize=10)
    left.set_ylim(0, 1.1 * max((row[key] for row in good), default=1))
    best = compromise(rows)
    if best:
        for axis in (left, middle, right):
            axis.axvline(good.index(best), color="grey", linestyle="--", linewidth=1)
    right.set_yscale("log")
    figure.suptitle(f"What a block size costs; dashed: the best compromise ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = BlockSizes()

if __name__ == "__main__":
    run_script(EXPERIMENT)
