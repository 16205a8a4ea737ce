"""How close to the memory's speed does decode attention come, kernel by kernel?

Decode reads every cached key and value once and does little else, so its floor is bytes over read bandwidth. Each
kernel runs the workloads that people serve; bandwidth is set beside the read ceiling of the same run. Needs a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

import cupaged as pg
from cupaged.bench.accuracy import decode_check
from cupaged.bench.ceilings import read_ceiling
from cupaged.bench.report import (
    argument_parser,
    console,
    machine_stamp,
    new_figure,
    print_table,
    result_folder,
    run_experiment,
    save_figure,
    write_results,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.workload import DecodeWorkload, decode_workload
from cupaged.runtime import choose_backend

KERNELS = (  # rung by rung
    "paged_attention_naive",
    "paged_attention_v1",
    "paged_attention_warp",
    "paged_attention_online",
    "paged_attention_v2",
    "paged_attention_batched",
    "paged_attention_mma",
)
EXPECTATION = (
    "What to expect. The naive kernel reads numbers one by one, and each key three times: far below the ceiling. v1 "
    "gives every query head a thread block of its own: with as many KV heads as query heads it reads each byte once "
    "and can come near the ceiling; with `group` query heads to a KV head it reads each byte `group` times, mostly "
    "from L2, and falls behind. The warp kernel reads keys twice and has a warp where v1 has a block: behind v1, most "
    "of all on small batches. The online kernel reads as v1 does, without the passes over logits: level. v2 lets up "
    "to 4 query heads share each load and cuts contexts into partitions: ahead of v1 wherever heads share or the "
    "batch is small. The batched kernel is the online one with no more blocks than run at once: level with it, but "
    "for the wait for the longest pairs. The tensor-core kernel reads each byte once whatever the group is, and "
    "shares work out by chunks of tokens, so that one long sequence or a small batch still fills the GPU."
)


@dataclass(frozen=True)
class Workload:
    """One decode step: query heads, KV heads, and the context of each sequence."""

    name: str
    num_heads: int
    num_kv_heads: int
    seq_lens: tuple[int, ...]
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"

    def build(self, seed: int) -> DecodeWorkload:
        """Return the arguments of a call."""
        return decode_workload(
            self.seq_lens, self.num_heads, self.num_kv_heads, self.head_dim, self.block_size,
            dtype=self.dtype, backend="cuda", seed=seed,
        )  # fmt: skip


def lognormal(count: int, longest: int) -> tuple[int, ...]:
    """Return context lengths as they are met in serving: most short, few long."""
    lens = np.random.default_rng(0).lognormal(6.6, 0.9, count)
    return tuple(int(n) for n in np.clip(lens, 1, longest))


WORKLOADS = (
    Workload("mha 32/32 b32 1k", 32, 32, (1024,) * 32),
    Workload("gqa 32/8 b64 4k", 32, 8, (4096,) * 64),
    Workload("gqa 32/8 b1 128k", 32, 8, (131072,)),
    Workload("gqa 32/8 b8 1k", 32, 8, (1024,) * 8),
    Workload("gqa 64/8 b16 8k", 64, 8, (8192,) * 16),
    Workload("mqa 8/1 b128 2k", 8, 1, (2048,) * 128),
    Workload("gqa 32/8 b64 lognormal", 32, 8, lognormal(64, 8192)),
    Workload("gqa 32/8 b32 one long", 32, 8, (65536,) + (256,) * 31),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; returns 0 if every result was right."""
    parser = argument_parser(__doc__ or "", backends=False)
    options = parser.parse_args(arguments)
    stamp = machine_stamp(choose_backend("cuda"))
    result_folder(stamp, options.out)
    console.print(EXPECTATION, "\n")
    ceiling = read_ceiling()
    rows: list[dict[str, Any]] = []
    for workload in tqdm(WORKLOADS[3:4] if options.smoke else WORKLOADS, desc="decode", unit="workload"):
        rows += measure(workload, ceiling)
    print_table(rows, COLUMNS, f"Keys and values read, beside a read ceiling of {ceiling:.0f} GB/s")
    verdict = conclusion(rows)
    console.print(verdict, "\n")
    folder = write_results(rows, stamp, "decode", options.out, read_ceiling_gb_s=ceiling, conclusion=verdict)
    draw(rows, stamp, folder / "decode.png")
    console.print(f"table, JSON and picture: {folder}")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


COLUMNS = {
    "workload": "workload",
    "kernel": "kernel",
    "time_us": "us|.1f",
    "gb_s": "GB/s|.0f",
    "of_ceiling": "of ceiling|.0%",
    "status": "status",
}


def measure(workload: Workload, ceiling: float) -> list[dict[str, Any]]:
    """Check and time every kernel on a workload."""
    copies = [workload.build(0)]
    copies += [workload.build(seed) for seed in range(1, copies_for_cold_l2(copies[0].kv_bytes))]
    rows = []
    for kernel in KERNELS:
        row = {"workload": workload.name, "kernel": kernel}
        try:
            rows.append({**row, **measure_kernel(kernel, workload, copies, ceiling)})
        except (RuntimeError, ValueError, MemoryError) as error:
            rows.append({**row, "status": f"failed: {error}"})
    return rows


def measure_kernel(kernel: str, workload: Workload, copies: list[DecodeWorkload], ceiling: float) -> dict[str, Any]:
    """Return one row; the plan is made once, as it is for all layers of a step."""
    planned = kernel == "paged_attention_mma"
    plans = [pg.plan_decode(c.cache, c.seq_lens, workload.num_heads) if planned else None for c in copies]
    out = copies[0].cache.xp.full_like(copies[0].query, float("nan"))

    def call(work: DecodeWorkload, plan: pg.DecodePlan | None) -> None:
        pg.paged_attention(*work.arguments, kernel=kernel, out=out, plan=plan, validate=False)

    call(copies[0], plans[0])
    error = decode_check(out[-2:], *copies[0].some(slice(-2, None)), kernel)
    timing = time_graph([lambda c=c, p=p: call(c, p) for c, p in zip(copies, plans, strict=True)])
    bandwidth = copies[0].kv_bytes / timing.median_us / 1e3
    return {
        "status": "ok" if error <= 1 else f"wrong: error is {error:.3g} times the budget",
        "time_us": timing.median_us,
        "spread_us": timing.spread_us,
        "kv_mb": copies[0].kv_bytes / 1e6,
        "gb_s": bandwidth,
        "of_ceiling": bandwidth / ceiling,
        **{key: value for key, value in asdict(workload).items() if key not in ("name", "seq_lens")},
    }


def conclusion(rows: list[dict[str, Any]]) -> str:
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
    return " ".join(parts)


def draw(rows: list[dict[str, Any]], stamp: dict[str, str], path: Any) -> None:
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


if __name__ == "__main__":
    run_experiment(main)
