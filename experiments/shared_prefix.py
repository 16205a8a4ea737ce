"""What does sharing a prefix gain?

Decode for sequences that begin with the same tokens, a system prompt for example, three ways: each has a copy of the
prefix; the prefix is in memory once and each reads it (the same block ids in all tables); it is read once for all of
them (`shared_prefix`). On a GPU the answer is the time of a step beside the bytes that it must read; without one the
bytes that the kernels ask for are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import cupaged as pg
from cupaged.bench.accuracy import verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    save_figure,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.traffic import CACHE_ARRAYS, record_traffic
from cupaged.bench.workload import DecodeStep, DecodeWorkload

KERNEL = "paged_attention_persistent"
WAYS = COPIED, MAPPED, READ_ONCE = ("a copy each", "same blocks", "read once")
EXPECTATION = (
    "What to expect. N sequences with prefix n and suffix s hold N (n + s) tokens, of which n + N s differ: by bytes "
    "alone sharing gains at most N (n + s) / (n + N s). Mapping the same blocks gains some of it without a word to the "
    "kernel, as long as the prefix stays in the L2 cache. Read once, the prefix is still asked for once by each tile "
    "of query rows, from the L2 cache where all goes well, and a second launch costs a few microseconds: with few "
    "sequences or a short prefix there is nothing to gain."
)


@dataclass(frozen=True)
class Config:
    """What is swept, and the heads."""

    sequences: tuple[int, ...]
    prefixes: tuple[int, ...]
    suffix: int = 256
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"


CONFIGS = {
    ("cuda", False): Config((1, 4, 16, 64), (1024, 8192, 32768)),
    ("cuda", True): Config((1, 16), (1024,)),
    ("host", False): Config((1, 2, 4, 8, 16, 32), (64, 512), 16, 4, 2, 64),
    ("host", True): Config((1, 6), (64,), 16, 4, 2, 64),
}


class SharedPrefix(Experiment):
    """A decode step behind a prefix, which the sequences hold in each of the ways."""

    expectation = EXPECTATION
    place, spreads, reads_ceiling = 80, True, True
    configs = CONFIGS

    def cells(self) -> list[Row]:
        axes = product(self.config.prefixes, self.config.sequences, WAYS)
        return [{"prefix": prefix, "sequences": sequences, "way": way} for prefix, sequences, way in axes]

    def measure(self, cell: Row) -> Row:
        return measure(self.config, self.backend, self.ceiling, **cell)

    def compare(self, rows: list[Row]) -> list[Row]:
        return with_gains(rows)

    def title(self) -> str:
        config = self.config
        return f"A decode step with {config.num_heads}/{config.num_kv_heads} heads, suffix {config.suffix}"

    def notes(self, rows: list[Row]) -> Row:
        return {**super().notes(rows), "kernel": KERNEL, "read_ceiling_gb_s": self.ceiling}


COMMON = {"prefix": "prefix", "sequences": "sequences", "way": "way", "bytes": "bytes held|,", "asked": "asked for|,"}
GPU_COLUMNS = {**COMMON, "time_us": "us|.1f", "of_ceiling": "of ceiling|.1%", "gain": "gain|.2f", "bound": "bound|.2f",
               "status": "status"}  # fmt: skip
HOST_COLUMNS = {**COMMON, "gain": "fewer by|.2f", "bound": "bound|.2f", "status": "status"}


# --- measuring ----------------------------------------------------------------------------------------------------


def build(config: Config, prefix: int, sequences: int, way: str, backend: str, seed: int = 0) -> DecodeWorkload:
    """Return the arguments of a step; `kv_bytes` counts a token that several sequences hold once."""

    def of_lens(*lens: int) -> DecodeWorkload:
        heads = config.num_heads, config.num_kv_heads
        return DecodeStep("shared", *heads, lens, config.head_dim, config.block_size, config.dtype).build(backend, seed)

    if way == COPIED:
        return of_lens(*[prefix + config.suffix] * sequences)
    work = of_lens(prefix, *[config.suffix] * sequences)
    xp, first, rest = work.cache.xp, *(-(-tokens // config.block_size) for tokens in (prefix, config.suffix))
    shared = xp.broadcast_to(work.block_tables[0, :first], (sequences, first))
    tables = xp.ascontiguousarray(xp.concatenate([shared, work.block_tables[1:, :rest]], axis=1))
    return replace(work, query=work.query[1:], block_tables=tables, seq_lens=work.seq_lens[1:] + np.int32(prefix))


def attention_call(work: DecodeWorkload, shared_prefix: int, out: Any) -> tuple[Callable[[], Any], pg.DecodePlan]:
    """Return a planned call, and its plan."""
    plan = pg.plan_decode(work.cache, work.seq_lens, work.query.shape[1], shared_prefix=shared_prefix)
    options: dict[str, Any] = {"kernel": KERNEL, "plan": plan, "shared_prefix": shared_prefix, "validate": False}
    return lambda: pg.paged_attention(*work.arguments, out=out, **options), plan


def asked_bytes(plan: pg.DecodePlan, prefix: int, suffix: int) -> int:
    """Return the bytes of keys and values that a step's launches ask for: each tile of query rows asks for its own."""
    token = plan.config.bytes_per_token
    tiles = plan.tiles // plan.config.num_kv_heads
    if plan.prefix is None:
        return plan.num_seqs * tiles * (prefix + suffix) * token
    of_prefix = plan.prefix.tiles // plan.config.num_kv_heads * prefix
    return (of_prefix + plan.num_seqs * tiles * suffix) * token


def measure(config: Config, backend: str, ceiling: float | None, prefix: int, sequences: int, way: str) -> Row:
    """Make a step one way and check it; count what it asks for on the CPU, time it on a GPU."""
    work = build(config, prefix, sequences, way, backend)
    out = work.cache.xp.full_like(work.query, float("nan"))
    shared = prefix if way == READ_ONCE else 0
    call, plan = attention_call(work, shared, out)
    row: Row = {"bytes": work.kv_bytes}
    if ceiling is None:
        with record_traffic() as log:
            call()
        row["asked"] = sum(launch.of(*CACHE_ARRAYS).bytes for launch in log)
    else:
        call()
        row["asked"] = asked_bytes(plan, prefix, config.suffix)
    row = {**verdict_on(work.error_of(out, KERNEL)), **row}
    if ceiling is not None:
        seeds = range(1, copies_for_cold_l2(work.kv_bytes, fetched_ahead=True))
        copies = (build(config, prefix, sequences, way, backend, seed) for seed in seeds)
        timing = time_graph([call, *(attention_call(copy, shared, out)[0] for copy in copies)])
        row |= {"time_us": timing.median_us, "spread_us": timing.spread_us}
        row["of_ceiling"] = work.kv_bytes / timing.median_us / 1e3 / ceiling
    return row


def with_gains(rows: list[Row]) -> list[Row]:
    """Add what a way gains over a copy each, in time or else in bytes asked for, and the most that bytes allow."""
    copied = {(row["prefix"], row["sequences"]): row for row in rows if row["way"] == COPIED and row["status"] == "ok"}
    for row in rows:
        base = copied.get((row["prefix"], row["sequences"]))
        if base and row["status"] == "ok" and row is not base:
            key = "time_us" if "time_us" in row else "asked"
            row["gain"] = base[key] / row[key]
            row["bound"] = base["bytes"] / row["bytes"]
    return rows


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row]) -> str:
    """Say what sharing gains, at best and at worst, and beside the bound."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} cells failed." if failed else f"All {len(rows)} cells are right."]
    for way in (MAPPED, READ_ONCE):
        some = [row for row in rows if row["way"] == way and "gain" in row]
        if some:
            best, worst = (pick(some, key=lambda row: row["gain"]) for pick in (max, min))
            what = "a step is faster" if "time_us" in best else "a step asks for less"
            parts.append(
                f"{way.capitalize()}: {what} than with a copy each by a factor of {worst['gain']:.2f} "
                f"({cell_of(worst)}) to {best['gain']:.2f} ({cell_of(best)}, where bytes allow {best['bound']:.2f})."
            )
    times = {(row["prefix"], row["sequences"], row["way"]): row["time_us"] for row in rows if "time_us" in row}
    lost = [
        (prefix, count)
        for prefix, count, way in times
        if way == READ_ONCE and count > 1
        and times[prefix, count, way] > times.get((prefix, count, MAPPED), np.inf)
    ]  # fmt: skip
    if lost:
        cells = ", ".join(f"{count} with {prefix}" for prefix, count in lost)
        parts.append(f"Reading once is slower than mapping the same blocks for {cells} (sequences with prefix).")
    if not times:
        parts.append("Time was not measured: a CPU says nothing about it.")
    return " ".join(parts)


def cell_of(row: Row) -> str:
    """Return where a row stands in the sweep."""
    return f"{row['sequences']} sequences, prefix {row['prefix']}"


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """One panel a prefix: time of a step, or bytes asked for, by sequences; dashed: the least that bytes allow."""
    good = [row for row in rows if row["status"] == "ok"]
    prefixes = list(dict.fromkeys(row["prefix"] for row in good))
    if not prefixes:
        return
    figure, axes = new_figure(columns=len(prefixes), width=4.5 * len(prefixes) + 1, height=4.4)
    key, factor, name = ("time_us", 1, "us a step") if stamp["backend"] == "cuda" else ("asked", 1e-6, "MB asked for")
    for axis, prefix in zip(np.atleast_1d(axes), prefixes, strict=True):
        for way in WAYS:
            line = {r["sequences"]: factor * r[key] for r in good if (r["prefix"], r["way"]) == (prefix, way)}
            axis.plot(list(line), list(line.values()), "o-", label=way)
        least = {
            r["sequences"]: factor * r[key] * r["gain"] / r["bound"]
            for r in good
            if (r["prefix"], r["way"]) == (prefix, READ_ONCE) and "gain" in r
        }
        axis.plot(list(least), list(least.values()), "k--", linewidth=1, label="a copy each / bound by bytes")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("sequences")
        axis.set_title(f"prefix of {prefix} tokens", fontsize=10)
    np.atleast_1d(axes)[0].set_ylabel(name)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.suptitle(f"Decode behind a prefix that all sequences share ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = SharedPrefix()

if __name__ == "__main__":
    run_script(EXPERIMENT)
