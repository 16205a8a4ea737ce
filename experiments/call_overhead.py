"""What does a call cost before the GPU hears of it?

Decode of one small batch, called every way there is: a bare CuPy launch of the same kernel with the same arguments, a
prepared call, a planned call, one that plans for itself; and what else a step makes, updating the plan and appending
keys and values. On a GPU the answer is the CPU's time for each call, and the GPU's when a graph replays it. Without a
GPU nothing is timed: launches are counted, and the Python functions that a call runs through before them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import cupaged as pg
from cupaged.bench.accuracy import decode_check, verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    save_figure,
)
from cupaged.bench.timing import time_graph, time_python
from cupaged.bench.traffic import record_traffic
from cupaged.bench.workload import DecodeStep
from cupaged.runtime.host import HostKernel

Call = Callable[[], Any]

AIM_US = 10
ATTENTION = BARE, PREPARED, PLANNED, UNPLANNED = ("bare launch", "prepared", "planned", "unplanned")
CALLS = (*ATTENTION, UPDATE, APPEND) = (*ATTENTION, "update of the plan", "append_kv")
EXPECTATION = (
    "What to expect. CuPy takes 8 us and more to launch a kernel of as many arguments: it looks at the type of each. A "
    "prepared call goes to the driver with its arguments lying ready: it should take less. A planned call like one "
    "before looks at what its arrays are, some 30 attributes, and at the environment: the aim is at most "
    f"{AIM_US} us more than CuPy's launch. A call without a plan checks and types every argument, and those of the "
    "planner that it launches first. A graph holds launches, not Python: in it all ways to launch one kernel cost the "
    "same, but that CuPy's cannot start a kernel while the one before it ends."
)


@dataclass(frozen=True)
class Config:
    """The step, small enough that the CPU takes longer to launch it than the GPU to run it."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    batch: int = 8
    context: int = 128
    batches: int = 400
    """Timed batches of 20 calls."""


CONFIGS = {
    ("cuda", False): Config(),
    ("cuda", True): Config(batches=20),
    ("host", False): Config(batch=4, context=40),
    ("host", True): Config(4, 2, 64, batch=2, context=20),
}
COMMON = {"call": "call", "launches": "launches"}
GPU_COLUMNS = {**COMMON, "cpu_us": "us of the CPU|.2f", "over_bare_us": "over bare|+.2f",
               "graph_us": "us in a graph|.2f", "status": "status"}  # fmt: skip
HOST_COLUMNS = {**COMMON, "functions": "Python functions", "status": "status"}


class CallOverhead(Experiment):
    """One step, called in every way."""

    expectation, unit = EXPECTATION, "call"
    place, wants_quiet_cpu = 70, True
    configs = CONFIGS

    def prepare(self) -> None:
        self.step = Step(self.config, self.backend)

    def cells(self) -> Sequence[str]:
        return CALLS

    def what(self, cell: str) -> Row:
        return {"call": cell}

    def measure(self, cell: str) -> Row:
        return self.step.checked(cell, self.backend)

    def compare(self, rows: list[Row]) -> list[Row]:
        if self.backend == "cuda":
            add_times(rows, self.step, self.config)
        return with_overheads(rows)

    def title(self) -> str:
        config = self.config
        return f"A decode step, {config.num_heads}/{config.num_kv_heads} heads, batch {config.batch}"


# --- measuring ----------------------------------------------------------------------------------------------------


class Step:
    """One decode step, and every way to call a part of it."""

    def __init__(self, config: Config, backend: str) -> None:
        decode = DecodeStep(
            "step", config.num_heads, config.num_kv_heads, (config.context,) * config.batch, config.head_dim
        )
        self.work = work = decode.build(backend)
        cache, xp = work.cache, work.cache.xp
        self.out = xp.empty_like(work.query)
        plan = pg.plan_decode(cache, work.seq_lens, config.num_heads)
        self.prepared = plan.prepare(*work.arguments, out=self.out)
        (launch,) = self.prepared.launches
        bare = launch.launcher.by_cupy if backend == "cuda" else launch.launcher.run
        validate = False if backend == "host" else None  # on the host a call reads its tables unless told not to
        attend = partial(pg.paged_attention, *work.arguments, out=self.out, validate=validate)
        # the newest token of each sequence is written again, with what its slot holds
        last = work.block_tables[:, -1] * cache.config.block_size + (config.context - 1) % cache.config.block_size
        slots = last.astype(np.int64)
        rows = (array.reshape(-1, *array.shape[2:])[slots] for array in cache.to_dense())
        self.calls: dict[str, Call] = {
            BARE: partial(bare, launch.values),
            PREPARED: self.prepared,
            PLANNED: partial(attend, plan=plan),
            UNPLANNED: partial(attend, kernel="paged_attention_persistent"),
            UPDATE: partial(plan.update, work.seq_lens),
            APPEND: partial(pg.append_kv, cache, *rows, slots, validate=validate),
        }

    def checked(self, name: str, backend: str) -> Row:
        """Make a call, look at the result of attention after it, and count what another one does."""
        call = self.calls[name]
        self.out.fill(float("nan"))
        call()
        if name not in ATTENTION:
            self.prepared()
        row = verdict_on(decode_check(self.out, *self.work.arguments, "paged_attention_persistent"))
        if backend == "host":
            row["functions"] = min(python_functions(call) for _ in range(5))  # now and then one looks at the files
            with record_traffic() as log:
                call()
            row["launches"] = len(log)
        else:
            row["launches"] = 2 if name == UNPLANNED else 1
        return row


def python_functions(call: Call) -> int:
    """Return how many Python functions a call runs through before the launch, for which the host build stands."""
    count, launching, launch = 0, False, HostKernel._run.__code__

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count, launching
        if frame.f_code is launch:
            launching = event != "return"
        elif event == "call" and not launching:
            count += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def add_times(rows: list[Row], step: Step, config: Config) -> None:
    """Add what the calls that are right take, of the CPU, and of the GPU where a graph replays them."""
    good = [row for row in rows if row["status"] == "ok"]
    calls = [step.calls[row["call"]] for row in good]
    for row, call, timing in zip(good, calls, time_python(calls, config.batches), strict=True):
        row["cpu_us"], row["spread_us"] = timing.median_us, timing.spread_us
        row |= measured_row({}, lambda call=call: {"graph_us": time_graph([call]).median_us})


def with_overheads(rows: list[Row]) -> list[Row]:
    """Add how much more of the CPU's time each call takes than a bare launch."""
    bare = next((row for row in rows if row["call"] == BARE), {})
    for row in rows:
        if "cpu_us" in row and "cpu_us" in bare:
            row["over_bare_us"] = row["cpu_us"] - bare["cpu_us"]
    return rows


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row]) -> str:
    """Say what the rows show, beside the aim."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} calls failed." if failed else f"All {len(rows)} calls are right."]
    good = {row["call"]: row for row in rows if row["status"] == "ok"}
    planned = good.get(PLANNED, {})
    if "over_bare_us" in planned:
        kept = "keeps" if planned["over_bare_us"] <= AIM_US else "misses"
        listed = ", ".join(f"{row['over_bare_us']:+.1f} us ({name})" for name, row in good.items() if name != BARE)
        parts.append(f"A bare launch takes the CPU {good[BARE]['cpu_us']:.1f} us. Others, beside it: {listed}.")
        parts.append(f"A planned call {kept} the aim of {AIM_US} us.")
        in_graph = ", ".join(f"{row['graph_us']:.2f} us ({name})" for name, row in good.items())
        parts.append(f"Replayed from a graph, a call takes {in_graph}.")
    elif "functions" in planned:
        listed = ", ".join(f"{row['functions']} ({name})" for name, row in good.items())
        parts.append(f"Python functions before the launches: {listed}. What they cost beside one, only a GPU can say.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Draw a bar for each call: the CPU's time, or the functions."""
    key = "cpu_us" if stamp["backend"] == "cuda" else "functions"
    good = [row for row in rows if key in row]
    if not good:
        return
    figure, axis = new_figure(width=8, height=3.6)
    bars = axis.barh([row["call"] for row in good], [row[key] for row in good])
    axis.bar_label(bars, fmt="%.1f" if key == "cpu_us" else "%d", padding=3)
    axis.invert_yaxis()
    axis.set_xlabel("us of the CPU" if key == "cpu_us" else "Python functions")
    axis.set_title(f"What a call costs before the GPU hears of it ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = CallOverhead()

if __name__ == "__main__":
    run_script(EXPERIMENT)
