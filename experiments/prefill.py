"""How fast is attention of whole prompts, chunks and speculative tokens over a paged context, beside what others ship?

The toolkit's paged_prefill, planned as decode where each sequence has the same few new tokens, beside FlashInfer's
paged prefill in each of its backends, and PyTorch's attention on keys and values in one piece: the same workloads over
the same memory in the same run, some tokens of each result checked against the reference, all timed in turns by the
replay of a CUDA graph each. Without a GPU results are checked and not timed.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from peers import (
    FLASHINFER,
    Peer,
    as_torch,
    first_result,
    host_copy,
    on_current_stream,
    page_lists,
    release,
    versions,
    why_not,
    workspace,
)

from cupaged.bench.accuracy import decode_check, verdict_on
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    measured_row,
    new_figure,
    save_figure,
)
from cupaged.bench.timing import Replay, Timing, capture, copies_for_cold_l2, time_in_turns, time_launches
from cupaged.bench.workload import PREFILL_WORKLOADS, PrefillStep, PrefillWorkload, prefill_call
from cupaged.errors import UnsupportedError

Call = Callable[[], Any]
Prepare = Callable[[Sequence[PrefillWorkload]], tuple[list[Call], Call]]

OURS, OURS_AS_PREFILL = "cupaged", "cupaged, planned as prefill"
FEW = 8  # new tokens of every sequence, up to which they are planned as decode
EXPECTATION = (
    "What to expect. Long prompts are bound by arithmetic: a tile of keys is read once for 128 query rows. mma.sync "
    "reaches some 60 % of what Hopper's own instructions do, so kernels made of it (FlashInfer's fa2, this one) end "
    "below those made of wgmma (fa3). Four tokens over 4k are bound by memory, as decode is. Short prompts without "
    "shared heads spend much of their time on tiles that the diagonal cuts, and on starting and writing."
)
SMALL_WORKLOADS = (  # for a CPU
    PrefillStep("prefill 2x70", 4, 2, 70, 2, 70, 64),
    PrefillStep("spec 2x3 over 200", 4, 2, 3, 2, 200, 64),
)
GPU_COLUMNS = {"workload": "workload", "peer": "contender", "time_us": "us|.1f", "tflop_s": "TFLOP/s|.0f",
               "gb_s": "GB/s|.0f", "of_ceiling": "of read ceiling|.0%", "ratio": "time over ours|.2f",
               "status": "status"}  # fmt: skip
HOST_COLUMNS = {"workload": "workload", "peer": "contender", "error_of_budget": "error of budget|.2f",
                "status": "status"}  # fmt: skip


class Prefill(Experiment):
    """The toolkit and its peers, on prompts, chunks and a few new tokens."""

    expectation, unit = EXPECTATION, "workload"
    place, reads_ceiling = 110, True

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of all arrays")
        parser.add_argument("--head-dim", type=int, default=None, help="another head dim than the workloads'")

    def set_up(self) -> None:
        reasons = {p.name: why_not(p) if self.backend == "cuda" else "it is for the cuda backend" for p in PEERS}
        self.peers = [peer for peer in PEERS if reasons[peer.name] is None]
        self.missing = {name: why for name, why in reasons.items() if why is not None}

    def expect(self) -> str:
        return "\n".join([f"{EXPECTATION}\n", *(f"not compared: {name}: {why}" for name, why in self.missing.items())])

    def steps(self) -> Sequence[PrefillStep]:
        """Return the workloads as they are listed."""
        if self.backend == "host":
            return SMALL_WORKLOADS
        return PREFILL_WORKLOADS[3:] if self.smoke else PREFILL_WORKLOADS

    def cells(self) -> list[PrefillStep]:
        head_dim = self.options.head_dim
        changes = {"dtype": self.options.dtype, **({"head_dim": head_dim} if head_dim else {})}
        return [replace(step, **changes) for step in self.steps()]

    def what(self, cell: PrefillStep) -> Row:
        return {"workload": cell.name}

    def rows(self, cell: PrefillStep) -> list[Row]:
        return with_ratios(measure(cell, self.peers, self.backend, self.ceiling))

    def title(self) -> str:
        return "Causal attention of new tokens over a paged context"

    def notes(self, rows: list[Row]) -> Row:
        return {
            "peers": versions(self.peers), "read_ceiling_gb_s": self.ceiling, "not_compared": self.missing,
            "workloads": [asdict(step) for step in self.steps()],
        }  # fmt: skip

    def went_well(self, rows: list[Row]) -> bool:
        return all(row["status"] == "ok" for row in rows if row.get("peer", OURS) in (OURS, OURS_AS_PREFILL))


# --- the contenders -----------------------------------------------------------------------------------------------


def flashinfer(backend: str) -> Callable[[PrefillWorkload], Call]:
    """Return the adapter of FlashInfer's paged prefill with some backend; it plans once, as for all layers."""

    def prepare(work: PrefillWorkload) -> Call:
        torch = import_module("torch")
        query, pages = as_torch(work.query), (as_torch(work.cache.key), as_torch(work.cache.value))
        config = work.cache.config
        lists = page_lists(host_copy(work.block_tables), host_copy(work.seq_lens), config.block_size)
        indptr, indices, last_page_len = (torch.from_numpy(values).to(query.device) for values in lists)
        wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(
            workspace("flashinfer", str(query.device)), "NHD", backend=backend
        )
        wrapper.plan(
            as_torch(work.query_start), indptr, indices, last_page_len, query.shape[1], config.num_kv_heads,
            config.head_dim, config.block_size, causal=True, q_data_type=query.dtype, kv_data_type=query.dtype,
        )  # fmt: skip
        out = torch.empty_like(query)
        return lambda: wrapper.run(query, pages, out=out)

    return prepare


def sdpa(backend: str) -> Callable[[PrefillWorkload], Call]:
    """Return the adapter of torch's attention on keys and values in one piece, with some backend."""

    def prepare(work: PrefillWorkload) -> Call:
        torch = import_module("torch")
        kernels, bias = import_module("torch.nn.attention"), import_module("torch.nn.attention.bias")
        config, lens = work.cache.config, host_copy(work.seq_lens)
        new = np.diff(host_copy(work.query_start))
        if (lens != lens[0]).any() or (new != new[0]).any():
            raise UnsupportedError("contiguous keys and values need contexts and chunks of one length")
        tables = as_torch(work.block_tables).long()

        def in_one_piece(pages: Any) -> Any:
            rows = as_torch(pages)[tables].reshape(len(lens), -1, config.num_kv_heads, config.head_dim)
            return rows[:, : int(lens[0])].transpose(1, 2).contiguous()  # [num_seqs, Hkv, length, D]

        key, value = in_one_piece(work.cache.key), in_one_piece(work.cache.value)
        query = as_torch(work.query).view(len(lens), int(new[0]), -1, config.head_dim).transpose(1, 2).contiguous()
        square = int(new[0]) == int(lens[0])
        mask = {"is_causal": True} if square else {"attn_mask": bias.causal_lower_right(int(new[0]), int(lens[0]))}
        chosen = [getattr(kernels.SDPBackend, backend)]

        def call() -> Any:
            with kernels.sdpa_kernel(chosen):
                attention = torch.nn.functional.scaled_dot_product_attention
                return attention(query, key, value, enable_gqa=True, **mask).transpose(1, 2)

        return call

    return prepare


PEERS = (
    Peer("FlashInfer, fa2", "FlashInfer", FLASHINFER, flashinfer("fa2")),
    Peer("FlashInfer, fa3", "FlashInfer", FLASHINFER, flashinfer("fa3")),
    Peer("SDPA, flash", "SDPA", ("torch",), sdpa("FLASH_ATTENTION")),
    Peer("SDPA, cuDNN", "SDPA", ("torch",), sdpa("CUDNN_ATTENTION")),
)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(step: PrefillStep, peers: Sequence[Peer], backend: str, ceiling: float | None) -> list[Row]:
    """Return a row for each contender, the toolkit first; whatever goes wrong in a peer is a row."""
    copies, few = [step.build(backend)], step.new <= FEW  # which the decode kernel answers
    if backend == "cuda":
        seeds = range(1, copies_for_cold_l2(copies[0].kv_bytes, fetched_ahead=few))
        copies += [step.build(backend, seed) for seed in seeds]
    what = {"workload": step.name, "gflop": copies[0].flop / 1e9, "kv_mb": copies[0].kv_bytes / 1e6}
    contenders = [Contender(OURS, ours(partial(prefill_call, few=few)))]
    if few:
        contenders.append(Contender(OURS_AS_PREFILL, ours(prefill_call)))
    contenders += [Contender(peer.name, of_peer(peer), (Exception,)) for peer in peers]
    rows = [
        measured_row({**what, "peer": each.name}, lambda each=each: each.check(copies), each.forgiven)
        for each in contenders
    ]
    if ceiling is not None:
        rows = [row | measured_row({}, each.capture, each.forgiven) for row, each in zip(rows, contenders, strict=True)]
        replays = {each: each.replay for each in contenders if each.replay is not None}
        for each, timing in zip(replays, time_in_turns(list(replays.values())), strict=True):
            each.timing = timing
        rows = [row | each.times(copies[0], ceiling) for row, each in zip(rows, contenders, strict=True)]
    release(backend)
    return rows


class Contender:
    """Who attends: its calls, kept while they are replayed, and how long one takes."""

    def __init__(self, name: str, prepare: Prepare, forgiven: tuple[type[Exception], ...] = ()) -> None:
        self.name, self.forgiven = name, forgiven
        self._prepare = prepare
        self._calls: list[Call] = []
        self.replay: Replay | None = None
        self.timing: Timing | None = None

    def check(self, copies: Sequence[PrefillWorkload]) -> Row:
        """Attend once, and hold the result to the reference."""
        calls, result = self._prepare(copies)
        row = verdict_on(error_of(copies[0], result()))
        self._calls = calls
        return row

    def capture(self) -> Row:
        """Capture the calls in a graph; time their launches where that fails."""
        if not self._calls:
            return {}
        try:
            replay = capture(self._calls)
            replay.elapsed_us()  # who fails here takes no turns
            self.replay = replay
        except Exception as error:
            self.timing = time_launches(self._calls)
            return {"timed": "launches", "not_captured": " ".join(str(error).split())[:200]}
        return {"timed": "graph"}

    def times(self, work: PrefillWorkload, ceiling: float) -> Row:
        """Return time, arithmetic and bandwidth on the GPU."""
        if self.timing is None:
            return {}
        bandwidth = work.kv_bytes / self.timing.median_us / 1e3
        return {
            "time_us": self.timing.median_us,
            "spread_us": self.timing.spread_us,
            "tflop_s": work.flop / self.timing.median_us / 1e6,
            "gb_s": bandwidth,
            "of_ceiling": bandwidth / ceiling,
        }


def ours(call_of: Callable[[PrefillWorkload, Any], Call]) -> Prepare:
    """Return what prepares a function of the toolkit."""

    def prepare(copies: Sequence[PrefillWorkload]) -> tuple[list[Call], Call]:
        out = copies[0].cache.xp.full_like(copies[0].query, float("nan"))
        calls = [call_of(copy, out) for copy in copies]

        def result() -> Any:
            calls[0]()
            return out

        return calls, result

    return prepare


def of_peer(peer: Peer) -> Prepare:
    """Return what prepares a peer."""

    def prepare(copies: Sequence[PrefillWorkload]) -> tuple[list[Call], Call]:
        work = copies[0]
        backend, xp = work.cache.backend, work.cache.xp
        calls = [on_current_stream(peer.prepare(copy), backend) for copy in copies]  # type: ignore[arg-type]
        return calls, lambda: xp.asarray(first_result(calls[0], backend).reshape(work.query.shape).float())

    return prepare


def error_of(work: PrefillWorkload, out: Any) -> float:
    """Return the largest error of some tokens as a fraction of its budget: of the first and the last sequence."""
    worst = 0.0
    for seq in dict.fromkeys((0, len(work.seq_lens) - 1)):
        first = int(work.query_start[seq])
        length, new = int(work.seq_lens[seq]), int(work.query_start[seq + 1]) - first
        positions = sorted({length - new, length - new // 2 - 1, length - 1})
        rows, arguments = work.tokens(seq, positions)
        worst = max(worst, decode_check(out[rows], *arguments, rounds_weights=True))
    return worst


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return a workload's rows with each time over the toolkit's."""
    ours = rows[0].get("time_us")
    return [{**row, "ratio": row["time_us"] / ours} if ours and "time_us" in row else row for row in rows]


def conclusion(rows: Sequence[Row]) -> str:
    """Say what the rows show."""
    ours = [row for row in rows if row["peer"] in (OURS, OURS_AS_PREFILL)]
    parts = [f"{sum(row['status'] == 'ok' for row in ours)} of {len(ours)} results of the toolkit match the reference."]
    for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] != OURS):
        ratios = [row["ratio"] for row in rows if row["peer"] == peer and row["status"] == "ok" and "ratio" in row]
        if ratios:
            mean = float(np.exp(np.mean(np.log(ratios))))
            over = f"{min(ratios):.2f} to {max(ratios):.2f} times the time of {OURS} on {len(ratios)} workloads"
            parts.append(
                f"{peer} takes {over}, {mean:.2f} in the geometric mean."
                if len(ratios) > 1
                else f"{peer} takes {mean:.2f} times the time of {OURS} on one workload."
            )
    return " ".join(parts)


def draw(rows: Sequence[Row], stamp: dict[str, str], path: Path) -> None:
    """Bars of TFLOP/s by workload and contender; nothing without times."""
    good = {
        (row["workload"], row["peer"]): row["tflop_s"] for row in rows if row["status"] == "ok" and "tflop_s" in row
    }
    named = dict.fromkeys([OURS, OURS_AS_PREFILL, *(row["peer"] for row in rows)])
    peers = [peer for peer in named if any(key[1] == peer for key in good)]
    if not peers:
        return
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axis = new_figure(width=12, height=4.8)
    width = 0.85 / len(peers)
    present = [[peer for peer in peers if (name, peer) in good] for name in names]
    for peer in peers:
        mine = [n for n, found in enumerate(present) if peer in found]
        places = [n + (present[n].index(peer) - (len(present[n]) - 1) / 2) * width for n in mine]
        bars = axis.bar(places, [good[names[n], peer] for n in mine], width=0.95 * width, label=peer)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("TFLOP/s of the causal product")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(peers), frameon=False, fontsize=9)
    axis.set_title(f"Prefill over a paged context ({stamp['device']})", fontsize=11)
    save_figure(figure, path)


EXPERIMENT = Prefill()

if __name__ == "__main__":
    run_script(EXPERIMENT)
