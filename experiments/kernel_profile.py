"""Does each kernel keep what the profiling checklist asks for?

Nsight Compute counts one launch of each kernel on a decode workload: memory throughput above 80 %, achieved occupancy
above 50 %, shared-memory bank conflicts below 5 %, warp execution efficiency above 90 %. A target is a hint where to
look, not a goal: a kernel can run at the memory's speed with few warps. Bytes, time and FLOP are kept, for a roofline.
Needs a GPU and ncu; --read takes what ncu wrote elsewhere. (The name is not profile.py: that would hide Python's own
module of this name from all scripts beside it.)
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cupaged as pg
from cupaged.bench.ceilings import read_ceiling
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.ncu import Launch, parse_ncu, run_ncu
from cupaged.bench.report import (
    new_figure,
    print_table,
    save_figure,
)
from cupaged.bench.roofline import draw_roofline
from cupaged.bench.workload import WORKLOADS, DecodeStep, DecodeWorkload, decode_call
from cupaged.engine.elementwise import rms_norm, swiglu

MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
THREADS = "smsp__thread_inst_executed_per_inst_executed.ratio"
BYTES_READ, BYTES_WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
FLOAT32 = {f"smsp__sass_thread_inst_executed_op_{op}_pred_on.sum": flop for op, flop in
           (("fadd", 1), ("fmul", 1), ("ffma", 2))}  # fmt: skip
METRICS = (MEMORY, DRAM, WARPS, CONFLICTS, WAVEFRONTS, THREADS, BYTES_READ, BYTES_WRITTEN, TIME, *FLOAT32)
NOT_LAUNCHED = "not launched: "
SMALLEST = "gqa 32/8 b8 1k"


@dataclass(frozen=True)
class Check:
    """One line of the checklist, all in percent."""

    name: str
    title: str
    target: float
    above: bool
    value: Callable[[dict[str, float]], float]

    @property
    def rule(self) -> str:
        """The target in words."""
        return f"{'above' if self.above else 'below'} {self.target:g} %"

    def verdict(self, value: float | None) -> str:
        """Return "met" or "missed"; "not counted" for None."""
        if value is None:
            return "not counted"
        return "met" if (value > self.target if self.above else value < self.target) else "missed"


CHECKS = (
    Check("memory_throughput", "memory throughput", 80, True, lambda of: of[MEMORY]),
    Check("achieved_occupancy", "achieved occupancy", 50, True, lambda of: of[WARPS]),
    Check("bank_conflicts", "bank conflicts", 5, False, lambda of: 100 * of[CONFLICTS] / max(1.0, of[WAVEFRONTS])),
    Check("warp_efficiency", "warp efficiency", 90, True, lambda of: 100 * of[THREADS] / 32),
)
MERGED_PARTS = 8
VOCABULARY = 32768
EXPECTATION = (
    "What to expect. A decode kernel that reads at the memory's speed meets the first line and may miss the second: "
    "copies that run on their own need few warps. Rows in shared memory are padded against bank conflicts. Warps part "
    "only where a sequence ends inside one, so that long contexts keep the last line."
)


class KernelProfile(Experiment):
    """One launch of each kernel, as Nsight Compute counts it."""

    expectation, unit = EXPECTATION, "workload"
    place, runs_on, launches_for_ncu = 140, "gpu", True

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--kernel", choices=tuple(pg.kernels()), help="count this one only (default: all)")
        parser.add_argument("--workload", choices=[step.name for step in WORKLOADS], default="gqa 32/8 b64 4k")
        parser.add_argument("--read", type=Path, help="a file with what ncu printed, instead of running it")

    def choose_backend(self) -> str:
        return "cpu" if self.options.read and not self.options.launch_only else super().choose_backend()

    def set_up(self) -> None:
        workload = SMALLEST if self.smoke else self.options.workload
        (self.step,) = (step for step in WORKLOADS if step.name == workload)
        self.names = [self.options.kernel] if self.options.kernel else list(pg.kernels())
        path = self.options.read
        if path:
            try:
                self.read = profile(self.names, self.step, path.read_text(encoding="utf-8", errors="replace"))
            except ValueError as error:  # no table of ncu's
                raise ValueError(f"{path}: {error}") from None

    def make_stamp(self) -> dict[str, str]:
        read = self.options.read
        return super().make_stamp() | ({"counted": f"elsewhere, read from {read.name}"} if read else {})

    def launch(self) -> None:
        launch_all(self.names, self.step)

    def measure_once(self) -> Row:
        if self.options.read:
            return {"rows": self.read, "read_ceiling_gb_s": None}
        command = [sys.executable, os.path.abspath(__file__), "--launch-only", "--workload", self.step.name]
        command += ["--kernel", self.options.kernel] if self.options.kernel else []
        text = run_ncu(METRICS, self.names, command)
        try:
            return {"rows": profile(self.names, self.step, text), "read_ceiling_gb_s": read_ceiling()}
        except ValueError as error:  # no table of ncu's
            raise pg.BackendUnavailableError(f"ncu: {error}") from None

    def cells(self) -> list[DecodeStep]:
        return [self.step]

    def rows(self, cell: DecodeStep) -> list[Row]:
        return self.once["rows"]

    def show(self, rows: list[Row]) -> None:
        print_table([shown(row) for row in rows], COLUMNS, self.title())

    def title(self) -> str:
        return f"One launch of each kernel on {self.step.name}, as ncu counts it"

    def notes(self, rows: list[Row]) -> Row:
        return {
            "workload": self.step.name, "read_ceiling_gb_s": self.ceiling, "metrics": METRICS,
            "targets": {check.name: check.rule for check in CHECKS},
        }  # fmt: skip

    def draw(self, rows: list[Row], path: Path) -> None:
        draw(rows, self.stamp, path)
        if self.ceiling:
            title = f"Kernels on {self.step.name} under the roof ({self.stamp['device']})"
            draw_roofline(rows, self.ceiling, title, path.with_name("kernel_profile_roofline.png"))

    def went_well(self, rows: list[Row]) -> bool:
        return all(row["status"].startswith(("ok", NOT_LAUNCHED)) for row in rows)


COLUMNS = {
    "kernel": "kernel",
    **{check.name: f"{check.title} {check.rule}" for check in CHECKS},
    "time_us": "us|.1f",
    "dram_gb_s": "GB/s|.0f",
    "status": "status",
}


# --- launching, under ncu -----------------------------------------------------------------------------------------


def launch_all(names: Sequence[str], step: DecodeStep) -> None:
    """Launch each kernel once; what a kernel does not serve is said on a line of its own."""
    work = step.build("cuda")
    for name in tqdm(names, desc="launching", unit="kernel"):
        try:
            launch(name, work)
        except (ValueError, RuntimeError) as error:
            print(f"{NOT_LAUNCHED}{name}: {' '.join(str(error).split())}", flush=True)
    work.cache.xp.cuda.Device().synchronize()


def launch(name: str, work: DecodeWorkload) -> None:
    """Launch a kernel of the registry on a workload."""
    if name.startswith("paged_attention"):
        decode_call(work, name)()
    elif name == "merge_partitions":
        decode_call(work, "paged_attention_v2")()
    elif name == "merge_states":
        xp, query = work.cache.xp, work.query
        pg.merge_states(
            xp.zeros((MERGED_PARTS, *query.shape), query.dtype), xp.zeros((MERGED_PARTS, *query.shape[:2]), xp.float32)
        )
    elif name == "plan_decode":
        pg.plan_decode(work.cache, work.seq_lens, work.query.shape[1])
    elif name == "sample":
        logits = work.cache.xp.zeros((len(work.query), VOCABULARY), work.cache.xp.float32)
        pg.sample(logits, temperature=1.0, top_k=50, top_p=0.9, seed=0)
    elif name in ("rms_norm", "swiglu"):
        xp, (rows, heads, dim) = work.cache.xp, work.query.shape
        if name == "rms_norm":
            rms_norm(
                xp.zeros((rows, heads * dim), xp.float32), xp.ones(heads * dim, xp.float32), 1e-5, work.query.dtype
            )
        else:
            swiglu(xp.zeros((rows, 8 * heads * dim), work.query.dtype))
    elif name == "write_texture":
        pg.bind_textures(work.cache, "array").refresh()
    elif name in ("paged_prefill", "plan_prefill"):
        starts = work.cache.xp.arange(len(work.query) + 1, dtype=work.seq_lens.dtype)
        pg.paged_prefill(*work.arguments, starts, validate=False)
    elif name == "copy_blocks":
        half = work.cache.config.num_blocks // 2
        pg.copy_blocks(work.cache, [[block, half + block] for block in range(half)])
    elif name in ("append_kv", "rope_append_kv"):
        config, xp = work.cache.config, work.cache.xp
        rows = xp.zeros((min(8192, config.num_slots), config.num_kv_heads, config.head_dim), config.numpy_dtype)
        slots = xp.arange(len(rows), dtype=work.seq_lens.dtype)
        if name == "append_kv":
            pg.append_kv(work.cache, rows, rows, slots, validate=False)
        else:
            pg.rope_append_kv(work.cache, rows, rows, slots, slots, validate=False)
    else:
        raise pg.UnsupportedError("this experiment does not know how to launch it")


# --- reading what ncu said ----------------------------------------------------------------------------------------


def profile(names: Sequence[str], step: DecodeStep, text: str) -> list[Row]:
    """Return a row for each kernel, from its first launch in what ncu printed."""
    launches = {launch.kernel: launch for launch in reversed(parse_ncu(text))}
    refused = dict(
        line.removeprefix(NOT_LAUNCHED).split(": ", 1) for line in text.splitlines() if line.startswith(NOT_LAUNCHED)
    )
    rows = []
    for name in names:
        row: Row = {"kernel": name, "workload": step.name}
        if name in refused:
            rows.append({**row, "status": f"{NOT_LAUNCHED}{refused[name][:300]}"})
        elif name not in launches:
            rows.append({**row, "status": "failed: ncu counted no launch of it"})
        else:
            rows.append({**row, "status": "ok", **checked(launches[name]), **roofline(launches[name], step)})
    return rows


def checked(launch: Launch) -> Row:
    """Return value and verdict of each line of the checklist."""
    row: Row = {}
    for check in CHECKS:
        try:
            value = check.value(launch.values)
        except KeyError:  # ncu could not count it here
            value = None
        row[check.name], row[f"{check.name}_verdict"] = value, check.verdict(value)
    return row


def roofline(launch: Launch, step: DecodeStep) -> Row:
    """Return bytes, time and FLOP: those of attention by its arithmetic, and what the CUDA cores did in float32."""
    of = launch.values
    row: Row = {"dram_percent_of_peak": of.get(DRAM)}
    if FLOAT32.keys() <= of.keys():
        row["float32_flop"] = sum(flop * of[metric] for metric, flop in FLOAT32.items())
    if not {TIME, BYTES_READ, BYTES_WRITTEN} <= of.keys() or not of[TIME]:
        return row
    nbytes, seconds = of[BYTES_READ] + of[BYTES_WRITTEN], of[TIME]
    row |= {
        "time_us": 1e6 * seconds,
        "dram_read_bytes": of[BYTES_READ],
        "dram_write_bytes": of[BYTES_WRITTEN],
        "dram_gb_s": nbytes / seconds / 1e9,
    }
    if launch.kernel.startswith("paged_attention") and nbytes:
        flop = 4 * step.num_heads * step.head_dim * sum(step.seq_lens)
        row |= {"flop": flop, "flop_per_byte": flop / nbytes, "gflop_s": flop / seconds / 1e9}
    return row


# --- reporting ----------------------------------------------------------------------------------------------------


def shown(row: Row) -> Row:
    """Return a row for the terminal: each value with its verdict."""
    cells = {}
    for check in CHECKS:
        if row.get(check.name) is not None:
            cells[check.name] = f"{row[check.name]:.1f} {row[check.name + '_verdict']}"
    return {**row, **cells}


def conclusion(rows: list[Row]) -> str:
    """Say which kernels meet the checklist and what the others miss."""
    good = [row for row in rows if row["status"] == "ok"]
    parts = [f"{len(good)} of {len(rows)} kernels were counted."]
    for row in good:
        missed = [
            f"{check.title} {row[check.name]:.1f} % ({check.rule} is asked)"
            for check in CHECKS
            if row[f"{check.name}_verdict"] == "missed"
        ]
        unknown = [check.title for check in CHECKS if row[f"{check.name}_verdict"] == "not counted"]
        said = f"misses {', '.join(missed)}" if missed else "misses no target"
        if unknown:
            said += f" (not counted: {', '.join(unknown)})"
        parts.append(f"{row['kernel']} {said}.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """One panel a check: a bar for each kernel, the target as a line."""
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return
    figure, axes = new_figure(columns=len(CHECKS), width=13, height=0.5 * len(good) + 2)
    for axis, check in zip(np.atleast_1d(axes), CHECKS, strict=True):
        colours = ["C0" if row[f"{check.name}_verdict"] == "met" else "C1" for row in good]
        axis.barh(range(len(good)), [row[check.name] or 0 for row in good], color=colours)
        axis.axvline(check.target, color="black", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(good)), [row["kernel"] for row in good] if axis is axes[0] else [""] * len(good))
        axis.set_title(f"{check.title}\n{check.rule}", fontsize=9)
        axis.set_xlim(left=0)
    figure.suptitle(
        f"The profiling checklist on {good[0]['workload']} ({stamp.get('counted', stamp['device'])})", fontsize=11
    )
    save_figure(figure, path)


EXPERIMENT = KernelProfile()

if __name__ == "__main__":
    run_script(EXPERIMENT)
