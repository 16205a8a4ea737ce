"""How close to the memory's speed does decode attention come, kernel by kernel?

Decode reads every cached key and value once and does little else, so its floor is bytes over read bandwidth. Each
kernel runs the workloads that people serve, call after call; bandwidth is set beside the read ceiling of the same run.
A kernel that starts while the one before it ends is also timed with another one between its calls. Needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cupaged.bench.accuracy import verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    save_figure,
)
from cupaged.bench.roofline import draw_roofline
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.workload import WORKLOADS, DecodeStep, DecodeWorkload, decode_call

KERNELS = (  # rung by rung
    "paged_attention_naive",
    "paged_attention_v1",
    "paged_attention_warp",
    "paged_attention_online",
    "paged_attention_v2",
    "paged_attention_batched",
    "paged_attention_mma",
    "paged_attention_persistent",
)
EXPECTATION = (
    "What to expect. The naive kernel reads numbers one by one, and each key three times: far below the ceiling. v1 "
    "gives every query head a thread block of its own: with as many KV heads as query heads it reads each byte once "
    "and can come near the ceiling; with `group` query heads to a KV head it reads each byte `group` times, mostly "
    "from L2, and falls behind. The warp kernel reads keys twice and has a warp where v1 has a block: behind v1, most "
    "of all on small batches. The online kernel reads as v1 does, without the passes over logits: level. v2 lets up "
    "to 4 query heads share each load and cuts contexts into partitions: ahead of v1 wherever heads share or the "
    "batch is small. The batched kernel is the online one with no more blocks than run at once: level with it, but "
    "for the wait for the longest pairs. The mma kernel takes v2's partitions and reads each byte once whatever the "
    "group is, as tensor cores answer all its heads at once: ahead of v2 wherever arithmetic held that back, most of "
    "all with 8 heads and more; with one head to a KV head, behind it, as 7 of 8 rows are idle and chunks go through "
    "shared memory. The persistent kernel keeps copies on the way at all times and shares work out by chunks of "
    "tokens: ahead of mma wherever partitions fit the lengths badly, and where starting and merging them shows. On "
    "Hopper its calls start while the kernel before them ends, and fetch their first keys: where that is another call "
    "of attention, a few microseconds overlap; where it is another kernel, fewer."
)


class Decode(Experiment):
    """Every kernel on every workload."""

    expectation, unit = EXPECTATION, "workload"
    place, runs_on, reads_ceiling = 20, "gpu", True

    def cells(self) -> Sequence[DecodeStep]:
        return WORKLOADS[3:4] if self.smoke else WORKLOADS

    def what(self, cell: DecodeStep) -> Row:
        return {"workload": cell.name}

    def rows(self, cell: DecodeStep) -> list[Row]:
        return measure(cell, self.ceiling)

    def title(self) -> str:
        return f"Keys and values read, beside a read ceiling of {self.ceiling:.0f} GB/s"

    def notes(self, rows: list[Row]) -> Row:
        return self.once

    def draw(self, rows: list[Row], path: Path) -> None:
        draw(rows, self.stamp, path)
        title = f"Decode attention under the roof ({self.stamp['device']})"
        draw_roofline(rows, self.ceiling, title, path.with_name("decode_roofline.png"))


COLUMNS = {
    "workload": "workload",
    "kernel": "kernel",
    "time_us": "us|.1f",
    "gb_s": "GB/s|.0f",
    "of_ceiling": "of ceiling|.0%",
    "apart_us": "us between others|.1f",
    "status": "status",
}


def measure(step: DecodeStep, ceiling: float) -> list[Row]:
    """Check and time every kernel on a workload."""
    copies = [step.build("cuda")]
    seeds = range(1, copies_for_cold_l2(copies[0].kv_bytes, fetched_ahead=True))
    copies += [step.build("cuda", seed) for seed in seeds]
    what = {"workload": step.name}
    return [
        measured_row({**what, "kernel": kernel}, lambda kernel=kernel: measure_kernel(kernel, step, copies, ceiling))
        for kernel in KERNELS
    ]


def measure_kernel(kernel: str, step: DecodeStep, copies: list[DecodeWorkload], ceiling: float) -> Row:
    """Return what one kernel did: correctness first, then time."""
    work = copies[0]
    out = work.cache.xp.full_like(work.query, float("nan"))
    calls = [decode_call(copy, kernel, out) for copy in copies]
    calls[0]()
    error = work.error_of(out, kernel)
    timing = time_graph(calls)
    bandwidth = work.kv_bytes / timing.median_us / 1e3
    row = {
        **verdict_on(error),
        "time_us": timing.median_us,
        "spread_us": timing.spread_us,
        "kv_mb": work.kv_bytes / 1e6,
        "gb_s": bandwidth,
        "of_ceiling": bandwidth / ceiling,
        "flop_per_byte": work.flop / work.kv_bytes,
        "gflop_s": work.flop / timing.median_us / 1e3,
        **{key: value for key, value in asdict(step).items() if key not in ("name", "seq_lens")},
    }
    return row | {"apart_us": time_apart(calls)} if kernel == KERNELS[-1] else row


def time_apart(calls: Sequence[Callable[[], Any]]) -> float:
    """Return microseconds of a call when another kernel, whose own time is taken off, runs before each."""
    import cupy

    number = cupy.zeros(1, dtype=cupy.float32)

    def other() -> None:
        cupy.add(number, 1, out=number)

    def after_the_other(call: Callable[[], Any]) -> None:
        other()
        call()

    both = time_graph([partial(after_the_other, call) for call in calls])
    return both.median_us - time_graph([other] * len(calls)).median_us


def conclusion(rows: list[Row]) -> str:
    """Say what the rows show."""
    good = [row for row in rows if row["status"] == "ok"]
    parts = [f"{len(good)} of {len(rows)} results match the reference."]
    for kernel in KERNELS:
        mine = sorted((row for row in good if row["kernel"] == kernel), key=lambda row: row["of_ceiling"])
        if mine:
            parts.append(
                f"{kernel} reads at {mine[0]['of_ceiling']:.0%} ({mine[0]['workload']}) to "
                f"{mine[-1]['of_ceiling']:.0%} ({mine[-1]['workload']}) of the read ceiling."
            )
    longer = sorted(row["apart_us"] / row["time_us"] - 1 for row in good if "apart_us" in row)
    if longer:
        parts.append(
            f"Between other kernels, a call of {KERNELS[-1]} takes {longer[0]:+.1%} to {longer[-1]:+.1%} longer."
        )
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Bars of each kernel by workload, in percent of the ceiling."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axis = new_figure(width=14, height=4.8)
    width = 0.9 / len(KERNELS)
    for i, kernel in enumerate(KERNELS):
        heights = {r["workload"]: 100 * r["of_ceiling"] for r in rows if r["kernel"] == kernel and r["status"] == "ok"}
        bars = axis.bar(
            [n + (i - (len(KERNELS) - 1) / 2) * width for n in range(len(names))],
            [heights.get(name, 0) for name in names], width=0.95 * width, label=kernel.removeprefix("paged_attention_"),
        )  # fmt: skip
        axis.bar_label(bars, fmt="%.0f", fontsize=6)
    axis.set_xticks(range(len(names)), [name.replace(" b", "\nb", 1) for name in names], fontsize=8)
    axis.set_ylabel("percent of the read ceiling")
    axis.set_ylim(0, 115)  # room for the legend
    axis.legend(loc="upper right", ncols=len(KERNELS))
    axis.set_title(f"Decode attention, bfloat16, D = 128, block size 16 ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = Decode()

if __name__ == "__main__":
    run_script(EXPERIMENT)
