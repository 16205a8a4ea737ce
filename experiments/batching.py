"""What does a launch cost, and what does batching gain?

Decode for a batch, three ways: a launch for every sequence, one launch for all, and each of the two replayed from a
CUDA graph, where the CPU takes no part. On a GPU the answer is the time of a step; without one the launches are
counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import cupaged as pg
from cupaged.bench.accuracy import decode_check, verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    print_table,
    save_figure,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph, time_launches
from cupaged.bench.traffic import record_traffic
from cupaged.bench.workload import DecodeStep, DecodeWorkload
from cupaged.runtime import load_kernel

BATCHED = "paged_attention_batched"
KERNEL = BATCHED if BATCHED in pg.kernels() else "paged_attention_v1"
WAYS = ("a launch per sequence", "one launch")
CLAIMED_LAUNCH_US = (3_000, 10_000)
CLAIMED_GAIN = (10, 100)
CLAIM = "The documents: 3 to 10 ms a launch; batching gains a factor of 10 to 100."
EXPECTATION = (
    "What to expect. A launch takes the CPU some microseconds, so a step of n launches takes n times that, or what the "
    "GPU needs if that is longer. One sequence with a short context keeps a few SMs busy for a few microseconds: "
    "launched one by one, a large batch waits for the CPU and leaves the GPU empty, and one launch gains most. With "
    "long contexts a launch has more to do and the gain is what idle SMs cost. A graph takes the CPU out, not the idle "
    "SMs: launches of a graph still run one behind the other."
)


@dataclass(frozen=True)
class Config:
    """What is swept, and the heads."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"


CONFIGS = {
    ("cuda", False): Config((1, 2, 4, 8, 16, 32, 64, 128, 256), (128, 4096)),
    ("cuda", True): Config((1, 8), (128,)),
    ("host", False): Config((1, 2, 4, 8, 16), (16, 128), 4, 2, 64),
    ("host", True): Config((1, 4), (16,), 4, 2, 64),
}


class Batching(Experiment):
    """A decode step, launched for each sequence or for all, in every batch."""

    expectation, claim, unit = EXPECTATION, CLAIM, "batch"
    place, wants_quiet_cpu, spreads = 60, True, True
    configs = CONFIGS

    def measure_once(self) -> Row:
        return {"launch_costs": launch_costs() if self.backend == "cuda" else []}

    def cells(self) -> list[tuple[int, int]]:
        return list(product(self.config.contexts, self.config.batches))

    def what(self, cell: tuple[int, int]) -> Row:
        return dict(zip(("context", "batch"), cell, strict=True))

    def rows(self, cell: tuple[int, int]) -> list[Row]:
        (context, batch), config = cell, self.config
        heads = config.num_heads, config.num_kv_heads
        step = DecodeStep("batch", *heads, (context,) * batch, config.head_dim, dtype=config.dtype)
        return measure_on_gpu(step) if self.backend == "cuda" else count_on_host(step)

    def show(self, rows: list[Row]) -> None:
        if self.once["launch_costs"]:
            columns = {"launch": "an empty launch", "us": "us|.2f"}
            print_table(self.once["launch_costs"], columns, "What a launch costs")
        super().show(rows)

    def title(self) -> str:
        return f"A decode step with {KERNEL}, {self.config.num_heads}/{self.config.num_kv_heads} heads"

    def conclusion(self, rows: list[Row]) -> str:
        return conclusion(rows, self.once["launch_costs"])

    def notes(self, rows: list[Row]) -> Row:
        return {**super().notes(rows), "kernel": KERNEL, **self.once, "claim": CLAIM}


COMMON = {"context": "context", "batch": "batch", "way": "way", "launches": "launches"}
GPU_COLUMNS = {**COMMON, "graph": "graph", "time_us": "us a step|.1f", "gain": "gain|.2f", "status": "status"}
HOST_COLUMNS = {**COMMON, "status": "status"}


# --- measuring ----------------------------------------------------------------------------------------------------


def step_calls(work: DecodeWorkload, way: str, out: Any) -> list[Callable[[], Any]]:
    """Return the launches of a step: one for each sequence, or one for all."""
    batch = len(work.query)
    pieces = [slice(i, i + 1) for i in range(batch)] if way == WAYS[0] else [slice(0, batch)]
    return [attention_call(work.some(piece), out[piece]) for piece in pieces]


def attention_call(arguments: tuple[Any, ...], out: Any) -> Callable[[], Any]:
    """Return one launch; the batched kernel is told which sequence each query belongs to."""
    query, cache, _, _ = arguments
    extra = {"query_to_seq": cache.xp.arange(len(query), dtype=np.int32)} if KERNEL == BATCHED else {}
    return lambda: pg.paged_attention(*arguments, kernel=KERNEL, out=out, validate=False, **extra)


def run_all(calls: list[Callable[[], Any]]) -> None:
    """Make a step."""
    for call in calls:
        call()


def what_of(step: DecodeStep, way: str) -> Row:
    """Return the part of a row that says what was done."""
    return {"context": step.seq_lens[0], "batch": len(step.seq_lens), "way": way}


def count_on_host(step: DecodeStep) -> list[Row]:
    """Make a step each way on the CPU, check it, and count its launches."""

    def measure(way: str) -> Row:
        work = step.build("host")
        out = np.full_like(work.query, np.nan)
        calls = step_calls(work, way, out)
        with record_traffic() as log:
            run_all(calls)
        return {**verdict_on(decode_check(out, *work.arguments, KERNEL)), "launches": len(log)}

    return [measured_row(what_of(step, way), lambda way=way: measure(way)) for way in WAYS]


def measure_on_gpu(step: DecodeStep) -> list[Row]:
    """Make a step each way on the GPU, check it, and time it launched and replayed."""
    copies = [step.build("cuda")]
    copies += [step.build("cuda", seed) for seed in range(1, copies_for_cold_l2(copies[0].kv_bytes))]

    def measure(way: str, graph: bool) -> Row:
        work = copies[0]
        out = work.cache.xp.full_like(work.query, float("nan"))
        steps = [step_calls(copy, way, out) for copy in copies]
        run_all(steps[0])
        error = work.error_of(out, KERNEL)
        timing = (time_graph if graph else time_launches)([lambda calls=calls: run_all(calls) for calls in steps])
        return {
            **verdict_on(error),
            "launches": len(steps[0]),
            "time_us": timing.median_us,
            "spread_us": timing.spread_us,
            "gb_s": work.kv_bytes / timing.median_us / 1e3,
        }

    rows = [
        measured_row({**what_of(step, way), "graph": graph}, lambda way=way, graph=graph: measure(way, graph))
        for way, graph in product(WAYS, (False, True))
    ]
    return with_gains(rows)


def with_gains(rows: list[Row]) -> list[Row]:
    """Add to each row of one launch how many times faster it is than a launch per sequence."""
    slow = {row["graph"]: row["time_us"] for row in rows if row["way"] == WAYS[0] and row["status"] == "ok"}
    for row in rows:
        if row["way"] == WAYS[1] and row["status"] == "ok" and row["graph"] in slow:
            row["gain"] = slow[row["graph"]] / row["time_us"]
    return rows


def launch_costs(launches: int = 2000) -> list[Row]:
    """Return the microseconds that launching costs, by how it is done; the kernel finds nothing to do."""
    import cupy

    kernel = load_kernel("bench/read_stream.cu", "read_stream", backend="cuda")
    data, combined = cupy.zeros(4, dtype=np.uint32), cupy.zeros(1, dtype=np.uint32)
    raw, values = kernel.raw_kernel(), (combined, data, np.int64(0))
    empty = DecodeStep("empty", 8, 8, (1,)).build("cuda")
    attention = attention_call(empty.arguments, cupy.empty_like(empty.query))
    ways: dict[str, Callable[[], Any]] = {
        "a bare CuPy launch": lambda: raw((1,), (32,), values),
        "through load_kernel, arguments checked": lambda: kernel((1,), (32,), combined=combined, data=data, vectors=0),
        "through paged_attention": attention,
    }
    rows = []
    for name, launch in ways.items():
        for _ in range(100):
            launch()
        cupy.cuda.Device().synchronize()
        start = perf_counter()
        for _ in range(launches):
            launch()
        cupy.cuda.Device().synchronize()
        rows.append({"launch": name, "us": 1e6 * (perf_counter() - start) / launches})
    in_graph = time_graph([ways["a bare CuPy launch"]] * 200).median_us
    return [*rows, {"launch": "a node of a graph", "us": in_graph}]


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row], costs: list[Row]) -> str:
    """Say what the rows show, beside what the documents claim."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} cells failed." if failed else f"All {len(rows)} cells are right."]
    if costs:
        listed = ", ".join(f"{row['us']:.1f} us ({row['launch']})" for row in costs)
        low, high = (claimed / costs[0]["us"] for claimed in CLAIMED_LAUNCH_US)
        parts.append(
            f"An empty launch costs {listed}: what the documents say is {low:,.0f} to {high:,.0f} times as much."
        )
    gains = [row for row in rows if "gain" in row and row["batch"] > 1]
    for graph in (False, True):
        some = [row for row in gains if row["graph"] == graph]
        if some:
            best, worst = (pick(some, key=lambda row: row["gain"]) for pick in (max, min))
            inside = sum(row["gain"] >= CLAIMED_GAIN[0] for row in some)
            least, most = (f"{row['gain']:.1f} ({cell_of(row)})" for row in (worst, best))
            parts.append(
                f"{'Replayed from graphs' if graph else 'Launched one by one'}, one launch gains a factor of {least} "
                f"to {most}; {CLAIMED_GAIN[0]} or more in {inside} of {len(some)} cells."
            )
    if not gains and not failed:
        most = max(rows, key=lambda row: row["launches"])
        parts.append(
            f"A step takes a launch for each sequence, {most['launches']} for a batch of {most['batch']}, or one for "
            "all; what that costs only a GPU can say."
        )
    return " ".join(parts)


def cell_of(row: Row) -> str:
    """Return where a row stands in the sweep."""
    return f"batch {row['batch']}, context {row['context']}"


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """One panel a context: time of a step by batch, a line for each way; launches where there is no time."""
    good = [row for row in rows if row["status"] == "ok"]
    contexts = list(dict.fromkeys(row["context"] for row in good))
    if not contexts:
        return
    figure, axes = new_figure(columns=len(contexts), width=5 * len(contexts) + 1, height=4.4)
    key = "time_us" if stamp["backend"] == "cuda" else "launches"
    for axis, context in zip(np.atleast_1d(axes), contexts, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in good:
            if row["context"] == context:
                name = row["way"] + (", from a graph" if row.get("graph") else "")
                lines.setdefault(name, {})[row["batch"]] = row[key]
        for name, line in lines.items():
            axis.plot(list(line), list(line.values()), "o--" if "graph" in name else "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("sequences in the batch")
        axis.set_title(f"context {context}", fontsize=10)
    np.atleast_1d(axes)[0].set_ylabel("us a step" if key == "time_us" else "launches a step")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.suptitle(f"A decode step by launches, {KERNEL} ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = Batching()

if __name__ == "__main__":
    run_script(EXPERIMENT)
