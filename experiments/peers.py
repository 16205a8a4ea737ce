"""How does decode attention here compare with what others ship?

The toolkit's choice, kernel "auto", beside FlashInfer's paged decode in each of its backends, PyTorch's attention on
contiguous keys and values, and whatever else can be imported: the same workloads over the same memory in the same run,
each result checked against the reference, each timed by the same replay of a CUDA graph over caches that the L2 does
not hold. Peers that cannot be imported are named, with the reason. Without a GPU results are checked and not timed.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.attention.choose import explain
from cupaged.bench.accuracy import verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    print_table,
    save_figure,
)
from cupaged.bench.timing import Timing, copies_for_cold_l2, time_graph, time_launches
from cupaged.bench.workload import WORKLOADS, DecodeStep, DecodeWorkload, decode_call, lognormal
from cupaged.config import DTYPES
from cupaged.errors import UnsupportedError
from cupaged.ops.arrays import like_caller

Call = Callable[[], Any]

OURS = "cupaged auto"
WORKSPACE_BYTES = 256 << 20
IN_A_LINE = 9  # workloads of the picture
EXPECTATION = (
    "What to expect. Every contender reads the same bytes, so the read ceiling bounds them all, and large batches "
    "should come within some percent of it and of each other. PyTorch reads keys and values that lie in one piece: "
    "what it is ahead of a paged kernel is the most that paging can cost. Small batches are decided by how work is "
    "shared out over the GPU and by what a launch does besides reading."
)

# Shapes that the eight do not show; most of them read more than 200 MB.
MORE_WORKLOADS = (
    DecodeStep("group 1, D 64, b128 2k", 16, 16, (2048,) * 128, 64),
    DecodeStep("group 4, D 64, b256 1k", 32, 8, (1024,) * 256, 64),
    DecodeStep("group 5, b64 2k", 40, 8, (2048,) * 64),
    DecodeStep("group 7, b32 4k", 28, 4, (4096,) * 32),
    DecodeStep("group 8, D 64, b64 4k", 64, 8, (4096,) * 64, 64),
    DecodeStep("group 12, b64 2k", 48, 4, (2048,) * 64),
    DecodeStep("group 1, D 256, b16 4k", 8, 8, (4096,) * 16, 256),
    DecodeStep("group 8, D 256, b64 4k", 16, 2, (4096,) * 64, 256),
    *(DecodeStep(f"block {size}, 32/8 b64 2k", 32, 8, (2048,) * 64, block_size=size) for size in (1, 24, 64, 128)),
    DecodeStep("32/8 b1 512", 32, 8, (512,)),
    DecodeStep("32/8 b1 8k", 32, 8, (8192,)),
    DecodeStep("32/8 b4 32k", 32, 8, (32768,) * 4),
    DecodeStep("32/8 b16 256", 32, 8, (256,) * 16),
    DecodeStep("32/8 b512 512", 32, 8, (512,) * 512),
    DecodeStep("32/8 b512 lognormal", 32, 8, lognormal(512, 8192)),
    DecodeStep("64/8 b256 lognormal", 64, 8, lognormal(256, 16384)),
)
SMALL_WORKLOADS = (  # for a CPU
    DecodeStep("gqa 4/2 b2 40", 4, 2, (40, 40), 64),
    DecodeStep("gqa 4/2 b2 mixed", 4, 2, (17, 40), 64),
)


class Peers(Experiment):
    """The toolkit and its peers, on every workload."""

    expectation, unit = EXPECTATION, "workload"
    place, reads_ceiling = 100, True
    keeps_what_was_measured = True  # peers compile for minutes

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--all-shapes", action="store_true", help="more groups, head dims, block sizes and batches")
        parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of keys, values and queries")
        parser.add_argument("--peers", default="", help="comma-separated parts of names: run these peers only")

    def set_up(self) -> None:
        self.peers, self.missing = find_peers(self.backend, [part for part in self.options.peers.split(",") if part])

    def expect(self) -> str:
        reasons = dict.fromkeys(peer["why"] for peer in self.missing)
        named = {why: "; ".join(peer["peer"] for peer in self.missing if peer["why"] == why) for why in reasons}
        return "\n".join([f"{EXPECTATION}\n", *(f"not compared: {names}: {why}" for why, names in named.items())])

    def cells(self) -> list[DecodeStep]:
        options = self.options
        return workloads(self.backend, smoke=self.smoke, everything=options.all_shapes, dtype=options.dtype)

    def what(self, cell: DecodeStep) -> Row:
        return {"workload": cell.name}

    def rows(self, cell: DecodeStep) -> list[Row]:
        return with_ratios(measure(cell, self.peers, self.backend, self.ceiling))

    def show(self, rows: list[Row]) -> None:
        super().show(rows)
        if self.ceiling:
            title = f"The best of each, {self.options.dtype}, beside a read ceiling of {self.ceiling:.0f} GB/s"
            print_table(summary(rows), SUMMARY_COLUMNS, title)

    def title(self) -> str:
        return "Every contender"

    def notes(self, rows: list[Row]) -> Row:
        measured = {row["workload"] for row in rows}
        return {
            "peers": versions(self.peers), "not_compared": self.missing, "read_ceiling_gb_s": self.ceiling,
            "workloads": [asdict(step) for step in self.cells() if step.name in measured],
        }  # fmt: skip

    def file_name(self) -> str:
        name = "peers_all_shapes" if self.options.all_shapes else "peers"
        return name if self.options.dtype == "bfloat16" else f"{name}_{self.options.dtype}"

    def went_well(self, rows: list[Row]) -> bool:
        return all(row["status"] == "ok" for row in rows if row.get("peer", OURS) == OURS)


GPU_COLUMNS = {"workload": "workload", "peer": "contender", "time_us": "us|.1f", "gb_s": "GB/s|.0f",
               "of_ceiling": "of ceiling|.0%", "ratio": "time over ours|.2f", "status": "status"}  # fmt: skip
HOST_COLUMNS = {"workload": "workload", "peer": "contender", "error_of_budget": "error of budget|.2f",
                "status": "status"}  # fmt: skip
SUMMARY_COLUMNS = {"workload": "workload", OURS: "cupaged", "FlashInfer": "FlashInfer", "SDPA": "SDPA",
                   "over FlashInfer": "FlashInfer/ours|.2f", "over SDPA": "SDPA/ours|.2f"}  # fmt: skip


def workloads(backend: str, *, smoke: bool, everything: bool, dtype: str) -> list[DecodeStep]:
    """Return what is run."""
    if backend == "host":
        return [replace(step, dtype=dtype) for step in SMALL_WORKLOADS]
    steps = WORKLOADS[3:4] if smoke else (*WORKLOADS, *MORE_WORKLOADS) if everything else WORKLOADS
    return [replace(step, dtype=dtype) for step in steps]


# --- the contenders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A contender: what must import, and what makes a workload ready.

    `prepare` takes a workload and returns a call that launches on torch's current stream and returns the result,
    [num_seqs, H, D] or a shape with as many elements in that order; plans are made in `prepare`, as once for a step.
    """

    name: str
    family: str
    modules: tuple[str, ...]
    prepare: Callable[[DecodeWorkload], Call]
    backends: tuple[str, ...] = ("cuda",)


def find_peers(backend: str, parts: Sequence[str] = ()) -> tuple[list[Peer], list[dict[str, str]]]:
    """Return the peers that import here, and those that do not, with the reason."""
    found, missing = [], []
    for peer in PEERS:
        if parts and not any(part in peer.name for part in parts):
            continue
        why = why_not(peer) if backend in peer.backends else f"it is for the {peer.backends[0]} backend"
        if why is None:
            found.append(peer)
        else:
            missing.append({"peer": peer.name, "why": why})
    return found, missing


def why_not(peer: Peer) -> str | None:
    """Return None if a peer's modules import, else what the first of them said."""
    for module in peer.modules:
        try:
            import_module(module)
        except Exception as error:  # a foreign package may fail in any way
            return f"{module} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """Return what was compared, and the version of the package it comes from."""
    return {peer.name: str(getattr(import_module(peer.modules[0]), "__version__", "unknown")) for peer in peers}


def as_torch(array: Any) -> Any:
    """Return NumPy or CuPy memory as a torch tensor, without a copy."""
    return like_caller(array, import_module("torch").empty(0))


def mapped_tables(work: DecodeWorkload) -> Any:
    """Return the block tables with block 0 where nothing is mapped: peers may read past a sequence's last block."""
    return as_torch(work.cache.xp.maximum(work.block_tables, 0))


def page_lists(block_tables: np.ndarray, seq_lens: np.ndarray, page: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return FlashInfer's form of a block table.

    Returns
    -------
    indptr : int32 [num_seqs + 1]
        Where each sequence's pages begin in `indices`.
    indices : int32 [indptr[-1]]
        Pages of all sequences.
    last_page_len : int32 [num_seqs]
        Tokens in each sequence's last page, 1 to `page`.
    """
    pages = -(-seq_lens // page)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = np.concatenate([row[:count] for row, count in zip(block_tables, pages, strict=True)])
    return indptr, indices.astype(np.int32), (seq_lens - (pages - 1) * page).astype(np.int32)


@cache
def workspace(owner: str, device: str) -> Any:
    """Return scratch memory that the calls of one owner share: they run one behind the other."""
    torch = import_module("torch")
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def host_copy(array: Any) -> np.ndarray:
    """Return a NumPy array of a small NumPy or CuPy array."""
    return array if isinstance(array, np.ndarray) else array.get()


def flashinfer(**backend: Any) -> Callable[[DecodeWorkload], Call]:
    """Return the adapter of FlashInfer's paged decode with some backend."""

    def prepare(work: DecodeWorkload) -> Call:
        torch = import_module("torch")
        query, pages = as_torch(work.query), (as_torch(work.cache.key), as_torch(work.cache.value))
        lists = page_lists(host_copy(work.block_tables), host_copy(work.seq_lens), work.cache.config.block_size)
        indptr, indices, last_page_len = (torch.from_numpy(values) for values in lists)
        wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            workspace("flashinfer", str(query.device)), "NHD", **backend
        )
        config = work.cache.config
        wrapper.plan(
            indptr, indices.to(query.device), last_page_len, query.shape[1], config.num_kv_heads, config.head_dim,
            config.block_size, q_data_type=query.dtype, kv_data_type=query.dtype,
        )  # fmt: skip
        out = torch.empty_like(query)
        return lambda: wrapper.run(query, pages, out=out)

    return prepare


def flashinfer_xqa(work: DecodeWorkload) -> Call:
    """Return a call of the XQA kernel that FlashInfer ships; scale 1 / sqrt(D)."""
    torch = import_module("torch")
    query, pages = as_torch(work.query), (as_torch(work.cache.key), as_torch(work.cache.value))
    if work.cache.config.block_size not in (16, 32, 64, 128):
        raise UnsupportedError(f"XQA takes pages of 16, 32, 64 or 128; got {work.cache.config.block_size}")
    scratch = workspace("xqa", str(query.device))
    tables, lens = mapped_tables(work), as_torch(work.seq_lens).view(torch.uint32)
    longest, scale, out = int(work.seq_lens.max()), work.cache.config.head_dim**-0.5, torch.empty_like(query)
    decode = import_module("flashinfer.decode").xqa_batch_decode_with_kv_cache
    return lambda: decode(
        query, pages, scratch, tables, lens, longest, bmm1_scale=scale, bmm2_scale=1.0, out=out, kv_layout="NHD"
    )


def sdpa(backend: str | None) -> Callable[[DecodeWorkload], Call]:
    """Return the adapter of torch's attention on keys and values in one piece, with some backend or torch's choice.

    The query heads of a KV head are given as as many queries, so that every backend reads keys and values once.
    """

    def prepare(work: DecodeWorkload) -> Call:
        lens = host_copy(work.seq_lens)
        if (lens != lens[0]).any():
            raise UnsupportedError("contiguous keys and values need contexts of one length")
        attention = import_module("torch").nn.functional.scaled_dot_product_attention
        kv_heads, dim = work.cache.config.num_kv_heads, work.cache.config.head_dim
        tables = as_torch(work.block_tables).long()

        def in_one_piece(pages: Any) -> Any:
            rows = as_torch(pages)[tables].reshape(len(lens), -1, kv_heads, dim)[:, : int(lens[0])]
            return rows.transpose(1, 2).contiguous()  # [num_seqs, Hkv, length, D]

        key, value = in_one_piece(work.cache.key), in_one_piece(work.cache.value)
        query = as_torch(work.query).view(len(lens), kv_heads, -1, dim)
        if backend is None:
            return lambda: attention(query, key, value)
        kernels = import_module("torch.nn.attention")
        chosen = [getattr(kernels.SDPBackend, backend)]

        def call() -> Any:
            with kernels.sdpa_kernel(chosen):
                return attention(query, key, value)

        return call

    return prepare


def flash_attention(module: str, table_argument: str) -> Callable[[DecodeWorkload], Call]:
    """Return the adapter of FlashAttention's decode over a paged cache: version 2 or 3, by module."""

    def prepare(work: DecodeWorkload) -> Call:
        query, key, value = (as_torch(array) for array in (work.query, work.cache.key, work.cache.value))
        query, tables, lens = query.unsqueeze(1), mapped_tables(work), as_torch(work.seq_lens)
        decode = import_module(module).flash_attn_with_kvcache
        return lambda: decode(query, key, value, cache_seqlens=lens, **{table_argument: tables})

    return prepare


def vllm_attention(work: DecodeWorkload) -> Call:
    """Return a call of the FlashAttention that vLLM ships, over a paged cache."""
    torch = import_module("torch")
    query, key, value = (as_torch(array) for array in (work.query, work.cache.key, work.cache.value))
    tables, lens, longest = mapped_tables(work), as_torch(work.seq_lens), int(work.seq_lens.max())
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    out = torch.empty_like(query)
    decode = import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    return lambda: decode(
        q=query, k=key, v=value, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=longest, seqused_k=lens,
        block_table=tables, out=out,
    )  # fmt: skip


FLASHINFER = ("flashinfer", "torch")
PEERS = (
    Peer("FlashInfer, CUDA cores", "FlashInfer", FLASHINFER, flashinfer(use_tensor_cores=False)),
    Peer("FlashInfer, fa2", "FlashInfer", FLASHINFER, flashinfer(use_tensor_cores=True, backend="fa2")),
    Peer("FlashInfer, fa3", "FlashInfer", FLASHINFER, flashinfer(use_tensor_cores=True, backend="fa3")),
    Peer("FlashInfer, XQA", "FlashInfer", ("flashinfer", "flashinfer.decode", "torch"), flashinfer_xqa),
    Peer("SDPA, flash", "SDPA", ("torch",), sdpa("FLASH_ATTENTION")),
    Peer("SDPA, cuDNN", "SDPA", ("torch",), sdpa("CUDNN_ATTENTION")),
    Peer("SDPA, efficient", "SDPA", ("torch",), sdpa("EFFICIENT_ATTENTION")),
    Peer("SDPA", "SDPA", ("torch",), sdpa(None), ("host",)),
    Peer("FlashAttention 2", "FlashAttention", ("flash_attn", "torch"), flash_attention("flash_attn", "block_table")),
    Peer("FlashAttention 3", "FlashAttention", ("flash_attn_interface", "torch"),
         flash_attention("flash_attn_interface", "page_table")),
    Peer("vLLM's FlashAttention", "vLLM", ("vllm.vllm_flash_attn", "torch"), vllm_attention),
)  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(step: DecodeStep, peers: Sequence[Peer], backend: str, ceiling: float | None) -> list[Row]:
    """Return a row for each contender, the toolkit first; whatever goes wrong in a peer is a row."""
    copies = [step.build(backend)]
    if backend == "cuda":
        seeds = range(1, copies_for_cold_l2(copies[0].kv_bytes, fetched_ahead=True))
        copies += [step.build(backend, seed) for seed in seeds]
    what = {"workload": step.name, "kv_mb": copies[0].kv_bytes / 1e6}
    rows = [measured_row({**what, "peer": OURS, "family": "cupaged"}, lambda: measure_ours(copies, ceiling))]
    for peer in peers:
        named = {**what, "peer": peer.name, "family": peer.family}
        rows.append(measured_row(named, lambda p=peer: measure_peer(p, copies, ceiling), (Exception,)))
        release(backend)
    return rows


def measure_ours(copies: Sequence[DecodeWorkload], ceiling: float | None) -> Row:
    """Check and time the kernel that "auto" takes."""
    work = copies[0]
    kernel = explain(*work.arguments).kernel
    out = work.cache.xp.full_like(work.query, float("nan"))
    calls = [decode_call(copy, kernel, out) for copy in copies]
    calls[0]()
    error = work.error_of(out, kernel)
    return {"kernel": kernel, **verdict_on(error), **timed(calls, work, ceiling)}


def measure_peer(peer: Peer, copies: Sequence[DecodeWorkload], ceiling: float | None) -> Row:
    """Check and time a peer."""
    work = copies[0]
    backend = work.cache.backend
    calls = [on_current_stream(peer.prepare(copy), backend) for copy in copies]
    result = first_result(calls[0], backend).reshape(work.query.shape)
    error = work.error_of(result.float().cpu().numpy(), rounds_weights=True)
    return {**verdict_on(error), **timed(calls, work, ceiling)}


def first_result(call: Call, backend: str) -> Any:
    """Return a call's result, made on a stream of its own after all that was prepared, and finished."""
    if backend == "host":
        return call()
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        result = call()
    stream.synchronize()
    return result


def on_current_stream(call: Call, backend: str) -> Call:
    """Return a call that makes CuPy's current stream torch's, so that both capture and time it alike.

    It must not be the null stream: torch takes one of its own for that.
    """
    if backend == "host":
        return call
    import cupy

    torch = import_module("torch")

    def launch() -> Any:
        with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
            return call()

    return launch


def timed(calls: Sequence[Call], work: DecodeWorkload, ceiling: float | None) -> Row:
    """Return time and bandwidth on the GPU: of a graph's replay, or of launches where a peer cannot be captured."""
    if ceiling is None:
        return {}
    row: Row = {"timed": "graph"}
    try:
        timing: Timing = time_graph(calls)
    except Exception as error:
        row = {"timed": "launches", "not_captured": " ".join(str(error).split())[:200]}
        timing = time_launches(calls)
    return row | timing.row(work.kv_bytes, ceiling)


def release(backend: str) -> None:
    """Give memory that CuPy and torch keep back to the GPU: they share it."""
    if backend == "cuda":
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        with suppress(Exception):
            import_module("torch").cuda.empty_cache()


# --- reporting ----------------------------------------------------------------------------------------------------


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add to each row of a workload its time over the toolkit's: above 1 the toolkit is faster."""
    ours = next((row.get("time_us") for row in rows if row["peer"] == OURS and row["status"] == "ok"), None)
    for row in rows:
        if ours and row["status"] == "ok" and row["peer"] != OURS:
            row["ratio"] = row["time_us"] / ours
    return rows


def best_of(rows: Sequence[Row], workload: str, family: str) -> Row | None:
    """Return the fastest right result of a family on a workload."""
    some = [r for r in rows if (r["workload"], r["family"], r["status"]) == (workload, family, "ok") and "time_us" in r]
    return min(some, key=lambda row: row["time_us"], default=None)


def summary(rows: list[Row]) -> list[Row]:
    """Return a row for each workload: the toolkit, and the best of FlashInfer and of SDPA."""
    table = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        line: Row = {"workload": workload}
        for column, family in ((OURS, "cupaged"), ("FlashInfer", "FlashInfer"), ("SDPA", "SDPA")):
            best = best_of(rows, workload, family)
            if best:
                kind = best["peer"].partition(", ")[2]
                line[column] = f"{best['gb_s']:.0f} ({100 * best['of_ceiling']:.0f} %){' ' + kind if kind else ''}"
                line[f"over {family}"] = best.get("ratio")
        table.append(line)
    return table


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def conclusion(rows: list[Row]) -> str:
    """Say how the toolkit stands beside the best of each family."""
    ours = [row for row in rows if row["peer"] == OURS]
    right = sum(row["status"] == "ok" for row in ours)
    parts = [f"{right} of {len(ours)} results of the toolkit match the reference."]
    for family in dict.fromkeys(row["family"] for row in rows if row["family"] != "cupaged"):
        names = list(dict.fromkeys(row["workload"] for row in rows))
        best = {name: found for name in names if (found := best_of(rows, name, family)) and "ratio" in found}
        if best:
            ratios = {name: row["ratio"] for name, row in best.items()}
            least, most = min(ratios, key=lambda n: ratios[n]), max(ratios, key=lambda n: ratios[n])
            parts.append(
                f"Against the best of {family} it is {geometric_mean(list(ratios.values())):.2f} times as fast in the "
                f"geometric mean of {len(ratios)} workloads, from {ratios[least]:.2f} ({least}) to {ratios[most]:.2f} "
                f"({most})."
            )
    for row in rows:
        if row["status"].startswith("wrong"):
            parts.append(f"{row['peer']} on {row['workload']} is {row['status']}.")
    launched = sorted({row["peer"] for row in rows if row.get("timed") == "launches"})
    if launched:
        parts.append(f"Timed by launches, as they cannot be captured: {', '.join(launched)}.")
    return " ".join(parts)


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Bars of each family's best by workload, in percent of the read ceiling; nothing without times."""
    families = [
        f for f in dict.fromkeys(row["family"] for row in rows) if any(best_of(rows, r["workload"], f) for r in rows)
    ]
    if not families:
        return
    names = list(dict.fromkeys(row["workload"] for row in rows))
    lines = [names[first : first + IN_A_LINE] for first in range(0, len(names), IN_A_LINE)]
    figure, axes = new_figure(
        rows=len(lines), width=max(10.0, 1.1 * len(lines[0]) + 2), height=5 + 3 * (len(lines) - 1)
    )
    axes = np.atleast_1d(axes)
    width = 0.8 / len(families)
    for axis, line in zip(axes, lines, strict=True):
        for i, family in enumerate(families):
            heights = [100 * best["of_ceiling"] if (best := best_of(rows, name, family)) else 0 for name in line]
            places = [n + (i - (len(families) - 1) / 2) * width for n in range(len(line))]
            bars = axis.bar(places, heights, width=0.95 * width, label=family)
            axis.bar_label(bars, labels=[f"{h:.0f}" if h else "" for h in heights], fontsize=7)
        axis.set_xticks(range(len(line)), [name.replace(" b", "\nb", 1) for name in line], fontsize=8)
        axis.set_ylabel("percent of the read ceiling")
    axes[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(families), frameon=False)
    axes[0].set_title(f"Decode attention beside its peers, the best of each ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = Peers()

if __name__ == "__main__":
    run_script(EXPERIMENT)
