"""Are textures faster than global memory for a paged cache?

The same kernels read the same bytes by seven paths: an ordinary load, the read-only path (__ldg), a read-only load that
leaves L1 alone, cp.async, and textures over linear memory, pitch-linear memory and a block-linear array. Three
measurements: cycles of a load that waits for the one before it, from a working set in L1, in L2 and in HBM, in random
order and row by row; bandwidth of gathering random blocks; attention itself, in each layout. Where Nsight Compute is
at hand it counts sectors and hits. Without a GPU the results are only checked: a CPU has no timings to offer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import cupaged as pg
from cupaged import layouts
from cupaged.bench.accuracy import verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.ncu import parse_ncu, run_ncu
from cupaged.bench.report import (
    measured_row,
    new_figure,
    print_table,
    save_figure,
)
from cupaged.bench.timing import copies_for_cold_l2, time_graph
from cupaged.bench.workload import DecodeStep, DecodeWorkload, decode_call
from cupaged.ops.textures import load_path
from cupaged.runtime import kernels_defining, load_kernel
from cupaged.runtime.arguments import Strided
from cupaged.runtime.source import C_TYPE_OF_DTYPE

PATHS: dict[str, dict[str, object]] = {
    "plain": {"LOAD_PATH": "LOAD_PLAIN"},
    "__ldg": {"LOAD_PATH": "LOAD_READ_ONLY"},
    "no_allocate": {"LOAD_PATH": "LOAD_NO_ALLOCATE"},
    "cp.async": {"LOAD_PATH": "LOAD_ASYNC_COPY"},
    "tex linear": {"LOAD_PATH": "TEXTURE_LINEAR"},
    "tex pitch": {"LOAD_PATH": "TEXTURE_PITCH"},
    "tex array": {"LOAD_PATH": "TEXTURE_ARRAY"},
}
OF_FLOATS = {f"{name}, floats": {**defines, "TEXEL_FLOATS": 1} for name, defines in PATHS.items() if "tex" in name}
KERNEL = "paged_attention_texture"
LAYOUTS = ("BSHD", "BHSD", "HBSD", "BS2HD")
EXPECTATION = (
    "What to expect. Since Volta textures and global loads share L1, so that both find the same bytes in the same "
    "places; a texture's address takes a longer way there. A load that misses costs what L2 or HBM cost, whoever asks. "
    "Nothing is fetched ahead by either. Where many loads are on their way at once, as in attention, latency hides and "
    "bandwidth decides: it should be equal, but for the few bytes that a texture unit moves a cycle."
)
CLAIMS = {
    "5x": "texture memory is 5 times faster for random access",
    "cycles": "texture memory takes 100 cycles instead of 500",
    "locality": "a texture's 2D locality helps a paged cache",
    "prefetch": "texture hardware prefetches",
}


@dataclass(frozen=True)
class Config:
    """What is swept; the slots of a chase's working sets, whose 2 KiB rows have 16 parts of 128 bytes."""

    levels: dict[str, int]
    steps: int
    gather_blocks: tuple[int, ...]
    gather_dims: tuple[int, ...]
    gather_bytes: int
    step: DecodeStep


CHASE = {"block_size": 16, "num_kv_heads": 16, "head_dim": 32, "dtype": "float32"}
GATHER_HEADS = 8
CONFIGS = {
    ("cuda", False): Config({"L1": 8, "L2": 4096, "HBM": 131072}, 4096, (1, 16, 64, 256), (64, 128), 1 << 28,
                            DecodeStep("32/32 b32 1k", 32, 32, (1024,) * 32, dtype="float16")),
    ("cuda", True): Config({"L1": 8, "L2": 4096, "HBM": 65536}, 1024, (16,), (128,), 1 << 26,
                           DecodeStep("32/32 b8 1k", 32, 32, (1024,) * 8, dtype="float16")),
    ("host", False): Config({"L1": 8, "L2": 64, "HBM": 256}, 256, (1, 7, 256), (64, 72), 1 << 18,
                            DecodeStep("4/2 b2 200", 4, 2, (200,) * 2, 64, dtype="float16")),
    ("host", True): Config({"L1": 8, "L2": 16, "HBM": 32}, 64, (16,), (64,), 1 << 15,
                           DecodeStep("2/2 b2 64", 2, 2, (64,) * 2, 64, dtype="float16")),
}  # fmt: skip
SECTORS_LSU, SECTORS_TEX = "l1tex__t_sectors_pipe_lsu.sum", "l1tex__t_sectors_pipe_tex.sum"
L1_HITS, L2_HITS = "l1tex__t_sector_hit_rate.pct", "lts__t_sector_hit_rate.pct"
L2_READS, DRAM_READ = "lts__t_sectors_op_read.sum", "dram__bytes_read.sum"
METRICS = {
    SECTORS_LSU: "sectors_lsu", SECTORS_TEX: "sectors_tex", L1_HITS: "l1_hit_percent", L2_READS: "l2_read_sectors",
    L2_HITS: "l2_hit_percent", DRAM_READ: "dram_bytes_read",
}  # fmt: skip


class TextureVsGlobal(Experiment):
    """Latency, gathers and attention, each by every path; on a GPU also what Nsight Compute counts."""

    expectation = EXPECTATION
    place, spreads, reads_ceiling, launches_for_ncu = 50, True, True, True
    configs = CONFIGS

    def launch(self) -> None:
        launch_counted(self.config)

    def measure_once(self) -> Row:
        found = super().measure_once()
        if self.backend == "cuda":
            found["counters"], found["not_counted"] = counter_rows(self.smoke)
        return found

    def cells(self) -> list[Row]:
        config = self.config
        latency = product(config.levels, ("random", "row by row"))
        gathers = product(config.gather_blocks, config.gather_dims)
        return [
            *({"part": "latency", "level": level, "order": order} for level, order in latency),
            *({"part": "gather", "block_size": size, "head_dim": dim} for size, dim in gathers),
            *({"part": "attention", "layout": layout} for layout in LAYOUTS),
        ]

    def rows(self, cell: Row) -> list[Row]:
        measure = {"latency": latency_rows, "gather": gather_rows, "attention": attention_rows}[cell["part"]]
        where = {key: value for key, value in cell.items() if key != "part"}
        return measure(self.config, self.backend, self.ceiling, **where)

    def compare(self, rows: list[Row]) -> list[Row]:
        rows = [*rows, *self.once.get("counters", [])]
        self.verdicts = judge(rows)
        return rows

    def show(self, rows: list[Row]) -> None:
        for part, columns in COLUMNS.items():
            some = [row for row in rows if row["part"] == part]
            if some:
                print_table(some, columns if self.backend == "cuda" else WITHOUT_TIMES[part], TITLES[part])
        columns = {"claim": "claim", "measured": "measured", "verdict": "verdict"}
        print_table(self.verdicts, columns, "What became of the claims")

    def conclusion(self, rows: list[Row]) -> str:
        return conclusion(rows, self.verdicts)

    def notes(self, rows: list[Row]) -> Row:
        once = {key: value for key, value in self.once.items() if key != "counters"}
        return {**super().notes(rows), "verdicts": self.verdicts, **once}

    def draw(self, rows: list[Row], path: Path) -> None:
        if self.backend == "cuda":
            draw(rows, self.stamp, path)


TITLES = {
    "latency": "Cycles of a load that waits for the one before it, address included",
    "gather": "Rows gathered from random blocks, BSHD",
    "attention": "One kernel, its keys and values by each path",
    "counters": "What Nsight Compute counted of one launch",
}
COLUMNS = {
    "latency": {"path": "path", "level": "working set in", "order": "order", "cycles": "cycles|.0f",
                "status": "status"},
    "gather": {"path": "path", "block_size": "block", "head_dim": "D", "gb_s": "GB/s|.0f",
               "of_ceiling": "of ceiling|.1%", "of_plain": "of plain|.3f", "status": "status"},
    "attention": {"path": "path", "layout": "layout", "time_us": "us|.1f", "gb_s": "GB/s|.0f",
                  "of_ceiling": "of ceiling|.1%", "of_plain": "of plain|.3f", "status": "status"},
    "counters": {"path": "path", "kernel": "kernel", **{name: f"{name}|,.0f" for name in METRICS.values()},
                 "status": "status"},
}  # fmt: skip
TIMES = ("cycles", "time_us", "gb_s", "of_ceiling", "of_plain")
WITHOUT_TIMES = {part: {k: v for k, v in columns.items() if k not in TIMES} for part, columns in COLUMNS.items()}


# --- latency ------------------------------------------------------------------------------------------------------


def latency_rows(config: Config, backend: str, ceiling: float | None, level: str, order: str) -> list[Row]:
    """Return a row for each path along one chain: in a working set, in an order."""
    cache, chain = chain_in_cache(config.levels[level], order, backend)
    what = {"part": "latency", "level": level, "order": order}
    return by_path(what, PATHS, lambda: chase(cache, chain, level, config.steps))


def by_path(what: Row, paths: dict[str, dict[str, object]], measure: Callable[[], Row]) -> list[Row]:
    """Return a row for each path: what `measure` finds where kernels load by it."""
    rows = []
    for name, defines in paths.items():
        with kernels_defining(**defines):
            rows.append(measured_row({"part": what["part"], "path": name, **what}, measure))
    return rows


def chain_in_cache(slots: int, order: str, backend: str) -> tuple[pg.KVCache, np.ndarray]:
    """Return a cache whose keys hold a closed chain, and its positions, [length, (block, head, slot)], in order."""
    size, heads = CHASE["block_size"], CHASE["num_kv_heads"]
    num_blocks = -(-slots // size)
    cache = pg.KVCache(pg.CacheConfig(num_blocks, **CHASE, layout="BSHD"), backend)
    length = slots * heads
    visits = np.arange(length) if order == "row by row" else np.random.default_rng(0).permutation(length)
    slot, head = np.divmod(visits, heads)
    chain = np.stack([slot // size, head, slot % size], axis=1).astype(np.int32)
    keys = np.zeros((num_blocks, size, heads, CHASE["head_dim"]), dtype=np.int32)
    keys[chain[:, 0], chain[:, 2], chain[:, 1], :3] = np.roll(chain, -1, axis=0)
    cache.key[...] = cache.xp.asarray(keys.view(np.float32))
    return cache, chain


def chase(cache: pg.KVCache, chain: np.ndarray, level: str, steps: int, repeats: int = 5) -> Row:
    """Return the cycles of a step by the path of the `kernels_defining` block, the least of some repeats.

    A working set in L1 or L2 is gone through once before the clock starts; in HBM each repeat takes a part of the chain
    that no one has read before.
    """
    xp, config = cache.xp, cache.config
    of_path, textures = load_path(cache)
    defines = {"HEAD_DIM": config.head_dim, "BLOCK_SIZE": config.block_size, **of_path}
    kernel = load_kernel("bench/pointer_chase.cu", "pointer_chase", defines, cache.backend)
    end, cycles = xp.zeros(3, dtype=np.int32), xp.zeros(1, dtype=np.int64)
    warm = 0 if level == "HBM" else len(chain)
    found = []
    if cache.backend == "cuda" and level == "HBM":
        flush_l2()
    for repeat in range(1 if cache.backend == "host" else repeats):
        first = repeat * steps % len(chain) if level == "HBM" else 0
        block, head, slot = (int(n) for n in chain[first])
        kernel(
            (1,), (1,), end=end, cycles=cycles, key_cache=Strided(cache.key), first_block=block, first_head=head,
            first_slot=slot, warm_steps=warm, steps=steps, **key_arguments(cache, textures),
        )  # fmt: skip
        expected = chain[(first + warm + steps) % len(chain)]
        if (pg.reference.as_numpy(end) != expected).any():
            return {"status": f"wrong: the chain led to {end}, expected {expected}"}
        found.append(int(cycles[0]) / steps)
    return {"status": "ok", **({"cycles": min(found)} if cache.backend == "cuda" else {})}


def flush_l2() -> None:
    """Write more than the L2 cache holds."""
    import cupy

    cupy.zeros(4 * cupy.cuda.Device().attributes["L2CacheSize"], dtype=cupy.uint8)[...] = 1
    cupy.cuda.Device().synchronize()


def key_arguments(cache: pg.KVCache, textures: Row) -> Row:
    """Return what kernels over keys alone take of `load_path`'s arguments, and the strides."""
    strides = layouts.kv_strides(cache.config, "key")
    names = ("key_texture", "key_textures", "tile_bits", "first_key_texel", "head_rows")
    return {
        **{name: textures[name] for name in names},
        "key_block_stride": strides.block,
        "key_head_stride": strides.head,
        "key_slot_stride": strides.slot,
    }


# --- gathering ----------------------------------------------------------------------------------------------------


def gather_rows(config: Config, backend: str, ceiling: float | None, block_size: int, head_dim: int) -> list[Row]:
    """Return a row for each path."""
    work = gather_cache(block_size, head_dim, config.gather_bytes, backend)
    what = {"part": "gather", "block_size": block_size, "head_dim": head_dim}
    return with_plain(by_path(what, PATHS, lambda: gather(*work, ceiling)), "gb_s")


def gather_cache(block_size: int, head_dim: int, nbytes: int, backend: str) -> tuple[pg.KVCache, Any, int]:
    """Return a cache of random keys, a table of all its blocks in random order, and the keys' exclusive or."""
    num_blocks = max(1, nbytes // (block_size * GATHER_HEADS * head_dim * 2))
    cache = pg.KVCache(pg.CacheConfig(num_blocks, block_size, GATHER_HEADS, head_dim), backend)
    rng = np.random.default_rng(0)
    words = rng.integers(2**32, size=cache.key.nbytes // 4, dtype=np.uint32)
    cache.key.reshape(-1).view(np.uint32)[...] = cache.xp.asarray(words)
    table = cache.xp.asarray(rng.permutation(num_blocks).astype(np.int32))
    return cache, table, int(np.bitwise_xor.reduce(words))


def gather_call(cache: pg.KVCache, table: Any, combined: Any) -> Callable[[], Any]:
    """Return a launch by the path of the `kernels_defining` block."""
    config, xp = cache.config, cache.xp
    of_path, textures = load_path(cache)
    defines = {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
        "HEADS": config.num_kv_heads,
        **of_path,
    }
    kernel = load_kernel("bench/gather_paths.cu", "gather_paths", defines, cache.backend)
    blocks = 2 if cache.backend == "host" else 8 * xp.cuda.Device().attributes["MultiProcessorCount"]
    return lambda: kernel(
        (blocks,), (256,), combined=combined, key_cache=Strided(cache.key), block_table=table,
        tokens=config.num_slots, **key_arguments(cache, textures),
    )  # fmt: skip


def gather(cache: pg.KVCache, table: Any, expected: int, ceiling: float | None) -> Row:
    """Return what gathering all keys did."""
    combined = cache.xp.zeros(1, dtype=np.uint32)
    call = gather_call(cache, table, combined)
    call()
    if int(combined[0]) != expected:
        return {"status": f"wrong: the words combine to {int(combined[0])}, expected {expected}"}
    return {"status": "ok", **(time_graph([call]).row(cache.key.nbytes, ceiling) if ceiling else {})}


# --- attention ----------------------------------------------------------------------------------------------------


def attention_rows(config: Config, backend: str, ceiling: float | None, layout: str) -> list[Row]:
    """Return a row for each path, textures also with texels of floats."""
    count = 1 if backend == "host" else copies_for_cold_l2(config.step.build(backend, layout=layout).kv_bytes)
    copies = [config.step.build(backend, seed, layout=layout) for seed in range(count)]
    what = {"part": "attention", "layout": layout}
    return with_plain(by_path(what, {**PATHS, **OF_FLOATS}, lambda: attend(copies, ceiling)), "gb_s")


def attend(copies: Sequence[DecodeWorkload], ceiling: float | None) -> Row:
    """Return what attention did by the path of the `kernels_defining` block."""
    work = copies[0]
    out = work.cache.xp.full_like(work.query, float("nan"))
    calls = [decode_call(copy, KERNEL, out) for copy in copies]
    calls[0]()
    row = verdict_on(work.error_of(out, KERNEL))
    return {**row, **(time_graph(calls).row(work.kv_bytes, ceiling) if ceiling else {})}


def with_plain(rows: list[Row], key: str) -> list[Row]:
    """Add to each row of a cell its figure over that of the plain path."""
    base = next((row[key] for row in rows if row["path"] == "plain" and key in row), None)
    for row in rows:
        if base and key in row:
            row["of_plain"] = row[key] / base
    return rows


# --- counters -----------------------------------------------------------------------------------------------------


def launch_counted(config: Config) -> None:
    """Launch attention and gathering once by each path, for ncu to count."""
    work = config.step.build("cuda")
    cache, table, _ = gather_cache(16, 128, config.gather_bytes, "cuda")
    combined = cache.xp.zeros(1, dtype=np.uint32)
    for defines in PATHS.values():
        with kernels_defining(**defines):
            decode_call(work, KERNEL)()
            gather_call(cache, table, combined)()
    cache.xp.cuda.Device().synchronize()


def counter_rows(smoke: bool) -> tuple[list[Row], str]:
    """Return what ncu counted of each path's launches, or why it counted nothing."""
    command = [sys.executable, os.path.abspath(__file__), "--launch-only", "--backend", "cuda", *["--smoke"] * smoke]
    try:
        launches = parse_ncu(run_ncu(tuple(METRICS), (KERNEL, "gather_paths"), command))
    except (pg.BackendUnavailableError, RuntimeError, ValueError) as error:
        return [], " ".join(str(error).split())[:300]
    cells = list(product(PATHS, (KERNEL, "gather_paths")))
    if [launch.kernel for launch in launches] != [kernel for _, kernel in cells]:
        return [], f"ncu counted {len(launches)} launches; expected {len(cells)}"
    return [
        {
            "part": "counters", "path": path, "kernel": kernel, "status": "ok",
            **{name: launch.values.get(metric) for metric, name in METRICS.items()},
        }
        for (path, kernel), launch in zip(cells, launches, strict=True)
    ], ""  # fmt: skip


# --- verdicts -----------------------------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Row]:
    """Return a verdict on each claim, with what it rests on; none can be passed without times."""
    judges = {"5x": judge_factor, "cycles": judge_cycles, "locality": judge_locality, "prefetch": judge_prefetch}
    verdicts = []
    for name, claim in CLAIMS.items():
        try:
            measured, verdict = judges[name](rows)
        except KeyError:
            measured, verdict = None, "could not be measured here: timings need a GPU"
        verdicts.append(
            {"name": name, "claim": claim, "measured": measured, "verdict": verdict, "counted": counted(rows)}
        )
    return verdicts


def counted(rows: list[Row]) -> str | None:
    """Return what ncu counted of attention by a plain load and by the texture over the same memory, in words."""
    of = {row["path"]: row for row in rows if row["part"] == "counters" and row["kernel"] == KERNEL}
    names = {"l1_hit_percent": "L1 hits {:.1f} %", "l2_read_sectors": "{:,.0f} sectors asked of L2",
             "dram_bytes_read": "{:,.0f} bytes from DRAM"}  # fmt: skip
    said = []
    for path in ("plain", "tex linear", "tex array"):
        values = {name: of.get(path, {}).get(name) for name in names}
        if all(value is not None for value in values.values()):
            said.append(f"{path}: {', '.join(text.format(values[name]) for name, text in names.items())}")
    return "; ".join(said) or None


def because_alike(rows: list[Row]) -> str:
    """Return what the counters show where textures and plain loads ask for the same, within a percent."""
    of = {row["path"]: row for row in rows if row["part"] == "counters" and row["kernel"] == KERNEL}
    for name in ("l2_read_sectors", "dram_bytes_read"):
        asked = [of.get(path, {}).get(name) for path in ("plain", "tex linear", "tex array")]
        if None in asked or max(asked) > 1.01 * min(asked):
            return ""
    return ": through a texture or not, L1 passes on the same sectors to L2, and L2 the same bytes to memory"


def latency(rows: list[Row], path: str, level: str, order: str = "random") -> float:
    """Return the cycles of one cell; KeyError if they were not measured."""
    for row in rows:
        if (row["part"], row.get("level"), row.get("order"), row["path"]) == ("latency", level, order, path):
            return float(row["cycles"])
    raise KeyError(path)


def textures_of(paths: dict[str, Any]) -> list[str]:
    """Return the paths through textures."""
    return [path for path in paths if path.startswith("tex")]


def best_texture(rows: list[Row], part: str) -> Row:
    """Return the row of a texture that is furthest ahead of the plain path; KeyError if there is none."""
    some = [row for row in rows if row["part"] == part and row["path"].startswith("tex") and "of_plain" in row]
    if not some:
        raise KeyError(part)
    return max(some, key=lambda row: row["of_plain"])


def judge_factor(rows: list[Row]) -> tuple[str, str]:
    """The factor that random access gains: gathering, attention, and one load after the other from HBM."""
    gathered, attended = best_texture(rows, "gather"), best_texture(rows, "attention")
    alone = latency(rows, "plain", "HBM") / min(latency(rows, path, "HBM") for path in textures_of(PATHS))
    gains = {"gathering": gathered["of_plain"], "attention": attended["of_plain"], "loads one by one": alone}
    best = max(gains.values())
    measured = "best texture over plain: " + ", ".join(f"{gain:.2f} ({what})" for what, gain in gains.items())
    if best >= 4.5:
        return measured, "holds"
    return measured, "holds partly: faster, not 5 times" if best >= 1.1 else f"does not hold{because_alike(rows)}"


def judge_cycles(rows: list[Row]) -> tuple[str, str]:
    """Whether 500 and 100 cycles are global memory and texture, or a miss and a hit."""
    plain, texture = ({level: latency(rows, path, level) for level in ("L1", "L2", "HBM")}
                      for path in ("plain", "tex linear"))  # fmt: skip
    listed = " and ".join(
        f"{name} {', '.join(f'{cycles:.0f} ({level})' for level, cycles in found.items())}"
        for name, found in (("plain", plain), ("texture", texture))
    )
    if min(texture["HBM"], texture["L2"]) <= 0.5 * min(plain["HBM"], plain["L2"]):
        return listed, "holds"
    if texture["L1"] < 0.5 * plain["L1"]:
        return listed, "holds partly: where both hit L1"
    return listed, "does not hold: the two figures are a miss and a hit, which both paths have"


def judge_locality(rows: list[Row]) -> tuple[str, str]:
    """Whether a block-linear array gathers or attends faster than memory that is laid out in a line."""
    ratios = [
        row["of_plain"] for row in rows if row["path"] == "tex array" and row["part"] in ("gather", "attention")
        and "of_plain" in row
    ]  # fmt: skip
    if not ratios:
        raise KeyError("tex array")
    ahead = sum(ratio >= 1.05 for ratio in ratios)
    measured = f"array over plain: {min(ratios):.2f} to {max(ratios):.2f}, 1.05 or more in {ahead} of {len(ratios)}"
    if ahead == len(ratios):
        return measured, "holds"
    if ahead:
        return measured, f"holds partly: in {ahead} of {len(ratios)} cells"
    return measured, f"does not hold{because_alike(rows)}"


def judge_prefetch(rows: list[Row]) -> tuple[str, str]:
    """Whether going row by row gains a texture more than it gains plain loads: something would have fetched ahead.

    Only in linear memory is each step a line of its own. In an array, rows that follow each other share lines, and what
    is gained there is no prefetch.
    """
    linear = [path for path in textures_of(PATHS) if path != "tex array"]
    gains = {path: latency(rows, path, "HBM") / latency(rows, path, "HBM", "row by row") for path in ("plain", *linear)}
    plain = gains.pop("plain")
    measured = f"row by row over random, from HBM: plain {plain:.2f}, textures " + ", ".join(
        f"{gain:.2f} ({path.removeprefix('tex ')})" for path, gain in gains.items()
    )
    if max(gains.values()) >= 2 * plain:
        return measured, "holds"
    return measured, "does not hold: plain loads gain as much by going row by row"


def conclusion(rows: list[Row], verdicts: list[Row]) -> str:
    """Say what the rows show."""
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [f"{failed} of {len(rows)} cells failed." if failed else f"All {len(rows)} cells are right."]
    if not any(name in row for row in rows for name in TIMES):
        parts.append("Timings need a GPU: which path is faster cannot be said here.")
    else:
        parts += [f"'{row['claim']}': {row['verdict']} ({row['measured']})." for row in verdicts]
        if verdicts[0]["counted"]:
            parts.append(f"Nsight Compute on attention: {verdicts[0]['counted']}.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Three panels: cycles by working set, bandwidth of gathering, attention by layout."""
    good = [row for row in rows if row["status"] == "ok"]
    figure, axes = new_figure(columns=3, width=16, height=4.8)
    panels = (
        ("latency", "level", "cycles", "cycles a step, random order", {"order": "random"}),
        ("gather", "block_size", "gb_s", "GB/s, gathering, D = 128", {"head_dim": 128}),
        ("attention", "layout", "gb_s", "GB/s, attention", {}),
    )
    for axis, (part, along, key, title, only) in zip(axes, panels, strict=True):
        some = [
            row for row in good
            if row["part"] == part and key in row and all(row[k] == v for k, v in only.items())
            and "floats" not in row["path"]
        ]  # fmt: skip
        places = list(dict.fromkeys(row[along] for row in some))
        for i, name in enumerate(PATHS):
            bars = {places.index(row[along]): row[key] for row in some if row["path"] == name}
            where = [x + (i - 3) * 0.115 for x in bars]
            axis.bar(where, list(bars.values()), width=0.11, label=name.lstrip("_"))  # else matplotlib hides it
        axis.set_xticks(range(len(places)), [str(place) for place in places])
        axis.set_xlabel(along.replace("_", " "))
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Paths of loads ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = TextureVsGlobal()

if __name__ == "__main__":
    run_script(EXPERIMENT)
