"""What do sliding windows, soft caps, ALiBi, sinks and log-sum-exps cost?

Each kernel that takes every variant runs a decode step plainly and with one variant at a time. On a GPU the answer is
time; without one it is the bytes of keys and values that the kernel asks for. A sliding window should cost what a
context of its length costs; the others add arithmetic to a kernel that waits for memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cupaged.bench.accuracy import decode_check, verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    save_figure,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.traffic import CACHE_ARRAYS, record_traffic
from cupaged.bench.workload import DecodeStep, DecodeWorkload, decode_call

KERNELS = ("paged_attention_v1", "paged_attention_v2", "paged_attention_persistent")
PLAIN, SHORT, WINDOW, LSE = "plain", "as short as the window", "window", "log-sum-exp"
VARIANTS = (PLAIN, SHORT, WINDOW, "soft cap", "ALiBi", "sinks", LSE)
AIM_WINDOW, AIM_OTHERS = 0.10, 0.03  # what a variant may cost, by the project's aims
EXPECTATION = (
    "What to expect. Tokens before a window are not read, so that it costs what a context as short as the window does. "
    "A soft cap is a tanh a logit, ALiBi a multiplication, a sink and a log-sum-exp a few operations a row: kernels "
    "that wait for memory should not notice, those that are bound by arithmetic should."
)


@dataclass(frozen=True)
class Config:
    """The step: heads, sequences, their context and the window in it."""

    sequences: int = 16
    context: int = 32768
    window: int = 1024
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"

    def build(self, variant: str, backend: str, seed: int = 0) -> DecodeWorkload:
        """Return the arguments of a step."""
        lens = (self.window if variant == SHORT else self.context,) * self.sequences
        heads = self.num_heads, self.num_kv_heads
        return DecodeStep("variants", *heads, lens, self.head_dim, self.block_size, self.dtype).build(backend, seed)

    def options(self, variant: str, xp: Any) -> dict[str, Any]:
        """Return what `paged_attention` is told besides the arrays of the step."""
        a_head_each = xp.linspace(0.01, 0.5, self.num_heads, dtype=xp.float32)
        return {
            WINDOW: {"window": self.window},
            "soft cap": {"softcap": 30.0},
            "ALiBi": {"alibi_slopes": a_head_each},
            "sinks": {"sinks": a_head_each},
            LSE: {"return_lse": True},
        }.get(variant, {})


CONFIGS = {
    ("cuda", False): Config(),
    ("cuda", True): Config(2, 4096),
    ("host", False): Config(2, 512, 64, 4, 2, 64),
    ("host", True): Config(1, 160, 32, 4, 2, 64),
}


class Variants(Experiment):
    """A decode step by each kernel, plainly and with one variant at a time."""

    expectation = EXPECTATION
    place, spreads, reads_ceiling = 90, True, True
    configs = CONFIGS

    def cells(self) -> list[Row]:
        return [{"kernel": kernel, "variant": variant} for kernel, variant in product(KERNELS, VARIANTS)]

    def measure(self, cell: Row) -> Row:
        return measure(self.config, self.backend, **cell)

    def compare(self, rows: list[Row]) -> list[Row]:
        return with_costs(rows)

    def columns(self) -> dict[str, str]:
        return {"kernel": "kernel", "variant": "variant", **(TIME if self.ceiling else BYTES), "status": "status"}

    def title(self) -> str:
        config = self.config
        return f"{config.sequences} sequences of {config.context} tokens, window {config.window}"

    def notes(self, rows: list[Row]) -> Row:
        return {**super().notes(rows), "read_ceiling_gb_s": self.ceiling}


TIME = {"time_us": "us|.1f", "cost": "cost|+.1%"}
BYTES = {"asked": "bytes asked for|,", "cost": "cost|+.1%"}


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(config: Config, backend: str, kernel: str, variant: str) -> Row:
    """Check a kernel with a variant; count what it asks for on the CPU, time it on a GPU."""
    work = config.build(variant, backend)
    options = config.options(variant, work.cache.xp)
    out = work.cache.xp.full_like(work.query, float("nan"))
    call = decode_call(work, kernel, out, **options)
    row: Row = {}
    if backend == "host":
        with record_traffic() as log:
            call()
        row["asked"] = sum(launch.of(*CACHE_ARRAYS).bytes for launch in log)
    else:
        call()
    told = {name: value for name, value in options.items() if name != "return_lse"}
    row |= verdict_on(decode_check(out[-1:], *work.some(slice(-1, None)), kernel, **told))
    if backend == "cuda":
        read = work.kv_bytes * options.get("window", config.context) // config.context  # nothing before a window
        seeds = range(1, copies_for_cold_l2(read, fetched_ahead=True))
        copies = (decode_call(config.build(variant, backend, seed), kernel, out, **options) for seed in seeds)
        timing = time_graph([call, *copies])
        row |= {"time_us": timing.median_us, "spread_us": timing.spread_us}
    return row


def with_costs(rows: list[Row]) -> list[Row]:
    """Add what a variant costs over the plain step, and a window over a context that is as short."""
    base = {(row["kernel"], row["variant"]): row for row in rows if row["status"] == "ok"}
    for row in rows:
        plain = base.get((row["kernel"], SHORT if row["variant"] == WINDOW else PLAIN))
        if plain and row["status"] == "ok" and row["variant"] not in (PLAIN, SHORT):
            key = "time_us" if "time_us" in row else "asked"
            row["cost"] = row[key] / plain[key] - 1
    return rows


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row]) -> str:
    """Say what each kernel's variants cost, and which cost more than the aim."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} cells failed." if failed else f"All {len(rows)} cells are right."]
    for kernel in KERNELS:
        costs = {row["variant"]: row["cost"] for row in rows if row["kernel"] == kernel and "cost" in row}
        others = {variant: cost for variant, cost in costs.items() if variant != WINDOW}
        if WINDOW in costs:
            parts.append(f"{kernel}: a window costs {costs[WINDOW]:+.1%} over a context as short as it.")
        if others:
            most = max(others, key=lambda variant: others[variant])
            among = "of the others " if WINDOW in costs else ""
            parts.append(f"{kernel}: {among}{most} costs most, {others[most]:+.1%}.")
        over = [v for v, cost in costs.items() if cost > (AIM_WINDOW if v == WINDOW else AIM_OTHERS)]
        if over:
            parts.append(
                f"Above the aim of {AIM_WINDOW:.0%} for a window and {AIM_OTHERS:.0%} else: {', '.join(over)}."
            )
    if not any("time_us" in row for row in rows):
        parts.append("These are bytes; time was not measured: a CPU says nothing about it.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Bars of what each variant costs, by kernel."""
    names = [variant for variant in VARIANTS if any(row["variant"] == variant and "cost" in row for row in rows)]
    if not names:
        return
    figure, axis = new_figure(width=10, height=4.4)
    width = 0.8 / len(KERNELS)
    for i, kernel in enumerate(KERNELS):
        cost = {row["variant"]: 100 * row["cost"] for row in rows if row["kernel"] == kernel and "cost" in row}
        places = [n + (i - (len(KERNELS) - 1) / 2) * width for n in range(len(names))]
        bars = axis.bar(places, [cost.get(name, 0.0) for name in names], width=0.95 * width, label=kernel)
        axis.bar_label(bars, labels=[f"{cost[name]:+.1f}" if name in cost else "" for name in names], fontsize=7)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel(f"percent more {'time' if stamp['backend'] == 'cuda' else 'bytes asked for'}")
    axis.legend(fontsize=8)
    axis.set_title(f"What a variant costs ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = Variants()

if __name__ == "__main__":
    run_script(EXPERIMENT)
