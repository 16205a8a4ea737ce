"""Does the host build's traffic recorder count what the GPU's own counters count?

The same launches run twice: on the CPU, where the recorder puts warp-wide requests together, and on the GPU under
Nsight Compute, which reads l1tex's counters of global-load requests and sectors. Needs a GPU, ncu and a C++ compiler.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import cupaged as pg
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.ncu import parse_ncu, run_ncu
from cupaged.bench.traffic import cache_traffic
from cupaged.bench.workload import DecodeWorkload, decode_workload

KERNEL = "paged_attention_v1"
REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum"
SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum"
AGREEMENT = 0.05
EXPECTATION = (
    "What to expect. The same source asks for the same addresses, so sectors per request should agree wherever blocks "
    "lie. The numbers of requests may differ: NVRTC merges or splits loads as the host's compiler does not."
)


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


class TrafficAgreement(Experiment):
    """Some launches, counted twice."""

    expectation = EXPECTATION
    place, runs_on, launches_for_ncu = 150, "gpu", True

    def cells(self) -> list[Case]:
        return CASES[:5] if self.smoke else CASES

    def launch(self) -> None:
        for case in self.cells():
            pg.paged_attention(*case.workload("cuda").arguments, kernel=KERNEL)

    def measure_once(self) -> Row:
        counted, cases = list(count_on_gpu(self.smoke)), self.cells()
        if len(counted) != len(cases):
            raise RuntimeError(f"ncu counted {len(counted)} launches of {KERNEL}; expected {len(cases)}")
        return {"counted": counted}

    def measure(self, cell: Case) -> Row:
        return compare(cell, *self.once["counted"][CASES.index(cell)])

    def title(self) -> str:
        return "Global loads of one launch: the recorder on the CPU beside Nsight Compute on the GPU"

    def notes(self, rows: list[Row]) -> Row:
        return {"metrics": [SECTORS, REQUESTS]}

    def went_well(self, rows: list[Row]) -> bool:
        return agreeing(rows) == len(rows)


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


def compare(case: Case, requests: float | None, sectors: float | None) -> Row:
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


def agreeing(rows: list[Row]) -> int:
    """Return the number of launches of which both counted alike."""
    return sum(row["status"] == "ok" and row["difference"] <= AGREEMENT for row in rows)


def conclusion(rows: list[Row]) -> str:
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


def merges(rows: list[Row]) -> str:
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


EXPERIMENT = TrafficAgreement()

if __name__ == "__main__":
    run_script(EXPERIMENT)
