"""Does the host build's traffic recorder count what the GPU's own counters count?

The same launches run twice: on the CPU, where the recorder puts warp-wide requests together, and on the GPU under
Nsight Compute, which reads l1tex's counters of global-load requests and sectors. Needs a GPU, ncu and a C++ compiler.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cupaged as pg
from cupaged.bench.ncu import parse_ncu, run_ncu
from cupaged.bench.report import (
    argument_parser,
    console,
    machine_stamp,
    measured_row,
    print_table,
    run_experiment,
    write_results,
)
from cupaged.bench.traffic import cache_traffic
from cupaged.bench.workload import DecodeWorkload, decode_workload

KERNEL = "paged_attention_v1"
REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum"
SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum"
AGREEMENT = 0.05


@dataclass(frozen=True)
class Case:
    """One launch that is counted twice."""

    layout: str
    head_dim: int
    block_size: int
    dtype: str

    def workload(self, backend: str) -> DecodeWorkload:
        """Build it: the same lengths, values and placement on both backends."""
        return decode_workload((700, 333, 1, 512), 8, 2, backend=backend, **asdict(self))


LAYOUTS = ("BSHD", "BHSD", "HBSD", "BS2HD", "BHDSX")
SHAPES = ((128, 16, "float16"), (72, 16, "float16"), (64, 7, "bfloat16"), (256, 64, "float32"))
CASES = [Case(layout, *shape) for shape in SHAPES for layout in LAYOUTS]


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns 0 if every case agrees."""
    parser = argument_parser(__doc__ or "", backends=False)
    parser.add_argument("--launch-only", action="store_true", help="launch the cases on the GPU, for ncu to count")
    options = parser.parse_args(arguments)
    cases = CASES[:5] if options.smoke else CASES
    if options.launch_only:
        for case in cases:
            pg.paged_attention(*case.workload("cuda").arguments, kernel=KERNEL)
        return 0
    counted = list(count_on_gpu(options.smoke))
    if len(counted) != len(cases):
        raise RuntimeError(f"ncu counted {len(counted)} launches of {KERNEL}; expected {len(cases)}")
    rows = [measured_row(asdict(case), partial(compare, case, *gpu)) for case, gpu in zip(cases, counted, strict=True)]
    print_table(rows, COLUMNS, "Global loads of one launch: the recorder on the CPU beside Nsight Compute on the GPU")
    verdict = conclusion(rows)
    console.print(verdict)
    folder = write_results(
        rows, machine_stamp("cuda"), "traffic_agreement", options.out, metrics=[SECTORS, REQUESTS], conclusion=verdict
    )
    console.print(f"table and JSON: {folder}")
    return 0 if agreeing(rows) == len(rows) else 1


COLUMNS = {
    "layout": "layout",
    "head_dim": "D",
    "block_size": "block",
    "dtype": "dtype",
    "gpu_requests": "requests",
    "request_ratio": "GPU/host|.3f",
    "gpu_sectors_per_request": "sec/req GPU|.3f",
    "host_sectors_per_request": "host|.3f",
    "difference": "off|.2%",
    "status": "status",
}


def count_on_gpu(smoke: bool) -> Iterator[tuple[float | None, float | None]]:
    """Yield requests and sectors of every launch, in order, as Nsight Compute counts them; None where it could not."""
    command = [sys.executable, os.path.abspath(__file__), "--launch-only", *["--smoke"] * smoke]
    for launch in parse_ncu(run_ncu((REQUESTS, SECTORS), (KERNEL,), command)):
        yield launch.values.get(REQUESTS), launch.values.get(SECTORS)


def compare(case: Case, requests: float | None, sectors: float | None) -> dict[str, Any]:
    """Count the case on the host and set it beside the GPU's counters."""
    if not requests or not sectors:
        raise ValueError(f"ncu counted requests: {requests}, sectors: {sectors}")
    gpu_requests, gpu_sectors = int(requests), int(sectors)
    work = case.workload("host")
    host, _ = cache_traffic(lambda: pg.paged_attention(*work.arguments, kernel=KERNEL))
    if not host.requests or not host.sectors:
        raise ValueError(f"the recorder counted requests: {host.requests}, sectors: {host.sectors}")
    gpu_ratio = gpu_sectors / gpu_requests
    return {
        "status": "ok",
        "host_requests": host.requests,
        "gpu_requests": gpu_requests,
        "request_ratio": gpu_requests / host.requests,
        "host_sectors": host.sectors,
        "gpu_sectors": gpu_sectors,
        "host_sectors_per_request": host.sectors_per_request,
        "gpu_sectors_per_request": gpu_ratio,
        "difference": abs(host.sectors_per_request / gpu_ratio - 1),
    }


def agreeing(rows: list[dict[str, Any]]) -> int:
    """Return the number of launches of which both counted alike."""
    return sum(row["status"] == "ok" and row["difference"] <= AGREEMENT for row in rows)


def conclusion(rows: list[dict[str, Any]]) -> str:
    """Say how well the two agree, and where least."""
    verdict = f"Sectors per request agree within {AGREEMENT:.0%} in {agreeing(rows)} of {len(rows)} launches"
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return f"{verdict}; none could be compared."
    worst = max(good, key=lambda row: row["difference"])
    return (
        f"{verdict}; the largest difference is {worst['difference']:.2%}, for {worst['layout']} at "
        f"D = {worst['head_dim']}, block size {worst['block_size']}, {worst['dtype']}. {merges(good)}"
    )


def merges(rows: list[dict[str, Any]]) -> str:
    """Say where the GPU's compiler made fewer or more load instructions than the source has."""
    changed = [row for row in rows if row["gpu_requests"] != row["host_requests"]]
    if not changed:
        return "The compiler neither merged nor split a load: the numbers of requests are equal everywhere."
    listed = "; ".join(
        f"{row['layout']} D = {row['head_dim']}, block size {row['block_size']}, {row['dtype']}: "
        f"{row['gpu_requests'] / row['host_requests'] - 1:+.1%}"
        for row in changed
    )
    return f"The compiler merged (fewer requests) or split (more) loads in {len(changed)} launches: {listed}."


if __name__ == "__main__":
    run_experiment(main)
