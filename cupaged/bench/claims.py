"""The claims ledger: what the two study documents state as facts, and what an experiment's result says about it.

The documents are a PagedAttention implementation guide ("the guide") and a PagedAttention kernel deep dive ("the deep
dive"). A claim is data and one function: the function gets the JSON that the experiment wrote and returns a finding. It
measures nothing itself, so that a verdict can be passed on results that were committed, and again on new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cupaged.config import CacheConfig

__all__ = ["CLAIMS", "FAILS", "HOLDS", "OPEN", "PARTLY", "VERDICTS", "Claim", "Finding", "judge"]

HOLDS, PARTLY, FAILS, OPEN = VERDICTS = (
    "holds",
    "holds partly",
    "does not hold",
    "could not be measured here",
)
Document = Mapping[str, Any]
Row = Mapping[str, Any]
Range = tuple[float, float]

VLLM = "vLLM paper, arXiv 2309.06180"
DOCUMENTS, GUIDE, DEEP_DIVE = "the documents", "the guide", "the deep dive"
GIB = 2**30
# Dense matrix products in half precision, TFLOP/s, by the name in a result's stamp: NVIDIA's data sheets.
PEAK_TFLOP_S = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-80GB": 312.0}


@dataclass(frozen=True)
class Finding:
    """What a result says about a claim.

    Attributes
    ----------
    measured : str
        The figure, in words.
    verdict : str
        One of `VERDICTS`.
    reason : str
        Why, or by how much it differs.
    values : (float, float), optional
        Least and largest of what was measured, in the claim's unit, for the picture.
    """

    measured: str
    verdict: str
    reason: str
    values: Range | None = None


@dataclass(frozen=True)
class Claim:
    """One row of the ledger.

    Attributes
    ----------
    name : str
        Short, unique.
    statement : str
        What is stated.
    origin : str
        Where.
    published, source : str
        The figure of the literature to hold it against, and where it is from.
    compare : callable
        From the experiment's result to a `Finding`; KeyError if the result does not hold what it needs.
    experiment : str
        The script under ``experiments/`` that measures it; "" for plain arithmetic.
    gpu : bool
        Whether the experiment must have run on a GPU.
    unit : str
        Of the values below and of the finding's.
    stated_values, published_values : (float, float), optional
        For the picture.
    """

    name: str
    statement: str
    origin: str
    published: str
    source: str
    compare: Callable[[Document], Finding]
    experiment: str = ""
    gpu: bool = False
    unit: str = ""
    stated_values: Range | None = None
    published_values: Range | None = None

    @property
    def command(self) -> str:
        """The one command that reproduces the measurement."""
        return f"python experiments/{self.experiment or 'claims'}.py"


def judge(claim: Claim, document: Document | None) -> Finding:
    """Return what a result says about a claim; without a result, or with one that lacks what it takes, nothing.

    Parameters
    ----------
    claim : Claim
        The claim.
    document : mapping, optional
        What the claim's experiment wrote as JSON.
    """
    if document is None and claim.experiment:
        return Finding("", OPEN, "its experiment has no result here yet" + (": it needs a GPU" * claim.gpu))
    if claim.gpu and document is not None and document["stamp"]["backend"] != "cuda":
        return Finding("", OPEN, "timings need a GPU; the result is from a CPU")
    try:
        return claim.compare(document or {})
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:  # None: nothing was measured
        return Finding("", OPEN, f"the result of {claim.command} lacks what this takes: {error}")


def verdict_of(part: float) -> str:
    """Return the verdict where a claim holds in this part of the cases."""
    return HOLDS if part == 1 else PARTLY if part > 0 else FAILS


def spread(values: Sequence[float]) -> Range:
    """Return the least and the largest; ValueError if there is none."""
    return min(values), max(values)


def good_rows(document: Document) -> list[Row]:
    """Return the rows that did not fail."""
    return [row for row in document["rows"] if row.get("status", "ok") == "ok"]


# --- memory -------------------------------------------------------------------------------------------------------


def _occupancy(document: Document) -> dict[str, float]:
    """Return by allocator the percentage of all slots that hold tokens; of the paged ones block 16 only."""
    rows = {row["system"]: 100 * row["tokens"] for row in good_rows(document)}
    return {name: value for name, value in rows.items() if not name.startswith("paged") or name == "paged 16"}


def _unpaged(document: Document) -> dict[str, float]:
    found = _occupancy(document)
    found.pop("paged 16")
    return found


def _named(values: Mapping[str, float], form: str = "{:.1f} %") -> str:
    return ", ".join(f"{form.format(value)} ({name})" for name, value in values.items())


def utilisation(document: Document) -> Finding:
    """How much of the memory holds tokens under paging."""
    paged = _occupancy(document)["paged 16"]
    reason = f"{paged - 96.3:+.1f} points on the published figure, lengths: {document['trace']}"
    return Finding(f"{paged:.1f} % at block 16", verdict_of(float(paged > 96)), reason, (paged, paged))


def before_paging(document: Document) -> Finding:
    """How much of it does without."""
    found = _unpaged(document)
    less = [name for name, value in found.items() if value < 40]
    low, high = spread(list(found.values()))
    reason = (
        f"{low - 20.4:+.1f} and {high - 38.2:+.1f} points on the published range; below 40 %: "
        f"{', '.join(less) or 'none'}. reserve-max reserves the longest that a request may grow, "
        "the others what it will hold, rounded up (pow2) or not (oracle)"
    )
    return Finding(_named(found), verdict_of(len(less) / len(found)), reason, (low, high))


def waste(document: Document) -> Finding:
    """How much reservation and fragmentation cost without paging."""
    found = {name: 100 - value for name, value in _unpaged(document).items()}
    inside = [name for name, value in found.items() if 60 <= value <= 80]
    more = [name for name, value in found.items() if value > 80]
    least, most = spread(list(found.values()))
    reason = (
        f"{least - 61.8:+.1f} and {most - 79.6:+.1f} points on the published range; within 60 to 80 %: "
        f"{', '.join(inside) or 'none'}; more: {', '.join(more) or 'none'}; the rest less, as they reserve less"
    )
    return Finding(_named(found), verdict_of(len(inside + more) / len(found)), reason, (least, most))


def more_requests(document: Document) -> Finding:
    """How many times more requests run at once."""
    running = {row["system"]: row["running"] for row in good_rows(document)}
    gains = {name: running["paged 16"] / running[name] for name in _unpaged(document)}
    inside = [name for name, gain in gains.items() if gain >= 5]
    reason = (
        f"5 times or more over {', '.join(inside) or 'none'}: the gain is what is reserved over what is used, a "
        "property of the longest request allowed and of the trace"
    )
    return Finding(_named(gains, "{:.1f}"), verdict_of(len(inside) / len(gains)), reason, spread(list(gains.values())))


def more_served(document: Document) -> Finding:
    """How many times more requests a real model serves at once in the same memory."""
    rows = good_rows(document)
    (reserved,) = (row for row in rows if row["way"] == "contiguous")
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != "contiguous"))
    gains = {way: spread([row["at_once_gain"] for row in rows if row["way"] == way]) for way in ways}
    faster = spread([row["throughput_gain"] for row in rows if row["way"] in ways])
    reason = (
        f"{document['model']}, {document['trace']}: what is reserved for each request is used to "
        f"{100 * reserved['occupancy']:.0f} %, so that paging alone can serve {1 / reserved['occupancy']:.1f} times as "
        f"many. Throughput: {faster[0]:.1f} to {faster[1]:.1f} times"
    )
    measured = ", ".join(f"{low:.1f} to {high:.1f} times ({way})" for way, (low, high) in gains.items())
    part = sum(high >= 5 for _, high in gains.values()) / len(gains)
    low, high = zip(*gains.values(), strict=True)
    return Finding(measured, verdict_of(part), reason, (min(low), max(high)))


def example(document: Document) -> Finding:
    """The deep dive's three requests, replayed."""
    found = {row["system"]: 100 * row["occupancy"] for row in document["documents_example"]}
    value = found["reserve-max 2048"]
    return Finding(f"{value:.1f} %", verdict_of(float(abs(value - 38) < 0.05)), "the same arithmetic", (value, value))


def sharing(document: Document) -> Finding:
    """What prefix sharing saves, over all its workloads."""
    saved = [(row["workload"], row["saved_percent"]) for row in document["rows"] if "saved_percent" in row]
    half = sum(value >= 50 for _, value in saved)
    by_workload = {name: spread([value for other, value in saved if other == name]) for name in dict(saved)}
    measured = ", ".join(f"{low:.0f} to {high:.0f} % ({name})" for name, (low, high) in by_workload.items())
    reason = f"50 % or more in {half} of {len(saved)} cases: how long the prefix is against what follows decides"
    for name, lengths in dict.fromkeys((row["workload"], row.get("lengths")) for row in document["rows"]):
        some = [row for row in document["rows"] if (row["workload"], row.get("lengths")) == (name, lengths)]
        if "published_low" in some[0]:
            low, high = spread([row["saved_percent"] for row in some])
            off = f"{low - some[0]['published_low']:+.1f} and {high - some[0]['published_high']:+.1f}"
            reason += f"; {name} on lengths like {lengths}'s: {off} points on the published range"
    return Finding(measured, verdict_of(half / len(saved)), reason, spread([value for _, value in saved]))


def kv_of_70b(_: Document) -> Finding:
    """Bytes of 10 requests of 2048 tokens, 80 layers of 128-wide heads in half precision."""
    gib = [10 * 2048 * 80 * CacheConfig(1, 16, heads, 128).bytes_per_token / GIB for heads in (8, 64)]
    heads = 20e9 / (10 * 2048 * 80 * CacheConfig(1, 16, 1, 128).bytes_per_token)
    reason = (
        f"2 * 80 * Hkv * 128 * 2 bytes a token: 20 GB would be {heads:.1f} KV heads, which no 70B model has (8 with "
        "grouped queries, 64 without)"
    )
    return Finding(f"{gib[0]:.2f} GiB with 8 KV heads, {gib[1]:.0f} GiB with 64", FAILS, reason, (gib[0], gib[1]))


def swap_or_recompute(document: Document) -> Finding:
    """What brings a preempted sequence back sooner, at the paper's length and with a copy for each block, as there."""
    ratio = {
        row["block_size"]: (row["out_ms"] + row["in_ms"]) / row["recompute_ms"]
        for row in document["rows"]
        if row["status"] == "ok" and row["tokens"] == 256 and row["host_blocks"] == "scattered"
    }
    small, large = ratio[min(ratio)] > 1, ratio[max(ratio)] < 1
    measured = (
        f"swapping takes {ratio[min(ratio)]:.1f} times as long at {min(ratio)}, {ratio[max(ratio)]:.2f} at {max(ratio)}"
    )
    between = ", ".join(f"{ratio[size]:.2f} at {size}" for size in sorted(ratio) if 16 <= size <= 64)
    reason = (
        "256 tokens of OPT-13B, blocks that are no neighbours on the host; from 16 to 64, published as level, swapping "
        f"takes {between}"
    )
    verdict = HOLDS if small and large else PARTLY if small or large else FAILS
    return Finding(measured, verdict, reason, (min(ratio.values()), max(ratio.values())))


# --- kernels ------------------------------------------------------------------------------------------------------


def texture(name: str) -> Callable[[Document], Finding]:
    """Return what reads a verdict of texture_vs_global.py, which passes it beside its rows."""

    def compare(document: Document) -> Finding:
        (row,) = (row for row in document["verdicts"] if row["name"] == name)
        verdict, _, why = row["verdict"].partition(": ")
        counted = f"Nsight Compute on attention: {row['counted']}" if row.get("counted") else ""
        return Finding(row["measured"] or "", verdict, "; ".join(filter(None, (why, counted))))

    return compare


def launch_cost(document: Document) -> Finding:
    """What a launch costs."""
    costs = {row["launch"]: row["us"] for row in document["launch_costs"]}
    bare = costs["a bare CuPy launch"]
    listed = ", ".join(f"{us:.1f} us ({how})" for how, us in costs.items())
    verdict = verdict_of(float(bare >= 3000))
    reason = f"3 to 10 ms is {3000 / bare:,.0f} to {10000 / bare:,.0f} times a bare launch, which takes microseconds"
    return Finding(listed, verdict, reason if verdict == FAILS else "", spread([us / 1000 for us in costs.values()]))


def batching(document: Document) -> Finding:
    """What one launch for all sequences gains where there is little work; where there is much, it fills the GPU."""
    good = [row for row in good_rows(document) if row.get("gain") and row["batch"] > 1]
    shortest, largest = min(row["context"] for row in good), max(row["batch"] for row in good)
    rows = [row for row in good if row["context"] == shortest]
    low, high = spread([row["gain"] for row in rows])
    inside = [row for row in rows if row["gain"] >= 10]
    most = {graph: max([row["gain"] for row in rows if row["graph"] == graph], default=0) for graph in (False, True)}
    costs = {row["launch"]: row["us"] for row in document["launch_costs"]}
    bare = costs["a bare CuPy launch"]
    reason = (
        f"contexts of {shortest}, batches up to {largest}: 10 times or more in {len(inside)} of {len(rows)} cells. "
        f"One by one a call takes {max(costs.values()) / bare:.0f} times as long as a bare launch of {bare:.1f} us: "
        f"that is what is saved: {most[False]:.0f} times at most. From graphs, {most[True]:.0f} at most, it is the GPU "
        "that is filled"
    )
    return Finding(f"{low:.1f} to {high:.1f} times", verdict_of(len(inside) / len(rows)), reason, (low, high))


def block_size(document: Document) -> Finding:
    """Which block sizes lose nothing worth mentioning, in time or in slots."""
    rows = {row["block_size"]: row for row in good_rows(document)}
    fastest = min(row["time_us"] for row in rows.values())
    loss = {size: (row["time_us"] / fastest - 1, 1 - row["occupancy"]) for size, row in rows.items()}
    as_good = sorted(size for size, (time, slots) in loss.items() if time <= 0.02 and slots <= 0.02)
    time, slots = loss[16]
    measured = f"at 16: {time:+.1%} time on the fastest, {slots:.1%} of slots empty"
    reason = f"at most 2 % of time and of slots lost: block sizes {', '.join(map(str, as_good)) or 'none'}"
    if 16 not in as_good:
        return Finding(measured, FAILS, reason)
    ends = (float(as_good[0]), float(as_good[-1]))
    return Finding(measured, HOLDS if as_good == [16] else PARTLY, f"{reason}: 16 is one of them", ends)


def paging(document: Document) -> Finding:
    """What a block table costs a kernel, blocks of 16 anywhere."""
    rows = [
        row for row in good_rows(document)
        if row["way"] == "random" and row["block_size"] == 16 and row["look_up"] == "block" and "time_us" in row
    ]  # fmt: skip
    found = {row["kernel"]: 100 * row["overhead"] for row in rows}
    low, high = spread(list(found.values()))
    gathered = {
        row["look_up"]: 100 * row["overhead"] for row in good_rows(document)
        if row["kernel"] == "gather_lookup" and row["way"] == "random" and row["block_size"] == 16
    }  # fmt: skip
    verdict = HOLDS if low >= 5 else PARTLY if high >= 1 else FAILS
    in_order = spread(
        [
            100 * row["overhead"] for row in good_rows(document)
            if row["way"] == "in order" and row["block_size"] == 16 and row["kernel"] in found
        ]
    )  # fmt: skip
    reason = (
        f"{20 - high:.0f} to {26 - low:.0f} points below what was published. Of blocks in order a table costs "
        f"{in_order[0]:+.1f} to {in_order[1]:+.1f} %: what costs is where blocks lie, not looking them up. Gathering "
        f"rows, a look-up for every element costs {gathered['element']:.1f} %, placement included, for every row "
        f"{gathered['row']:.1f} %"
    )
    return Finding(_named(found, "{:+.1f} %"), verdict, reason, (low, high))


def compute_bound(document: Document) -> Finding:
    """How much of the arithmetic peak decode reaches."""
    device = document["stamp"]["device"]
    if device not in PEAK_TFLOP_S:
        return Finding("", OPEN, f"the peak of {device} is not in cupaged.bench.claims.PEAK_TFLOP_S")
    rows = [row for row in good_rows(document) if "gflop_s" in row]
    best = max(rows, key=lambda row: row["gflop_s"])
    percent = best["gflop_s"] / PEAK_TFLOP_S[device] / 10
    reason = (
        f"decode does {best['flop_per_byte']:.0f} FLOP for a byte there, at {best['of_ceiling']:.0%} of the read "
        "ceiling: memory is the limit long before arithmetic"
    )
    measured = f"{percent:.1f} % of {PEAK_TFLOP_S[device]:.0f} TFLOP/s at best ({best['kernel']}, {best['workload']})"
    return Finding(measured, verdict_of(float(percent > 60)), reason, (percent, percent))


def checklist(document: Document) -> Finding:
    """Whether the kernels that keep the guide's profiling checklist are the good ones: attention, by time."""
    rows = [row for row in good_rows(document) if row["kernel"].startswith("paged_attention")]
    names = [key.removesuffix("_verdict") for key in rows[0] if key.endswith("_verdict")]
    keeping = [row["kernel"] for row in rows if all(row[f"{name}_verdict"] == "met" for name in names)]
    fastest, slowest = (pick(rows, key=lambda row: row["time_us"]) for pick in (min, max))
    missed = [name.replace("_", " ") for name in names if fastest[f"{name}_verdict"] != "met"]
    measured = f"all four are met by {', '.join(keeping) or 'none'}, of {len(rows)} attention kernels"
    reason = (
        f"the fastest of them, {fastest['kernel']}, misses {', '.join(missed) or 'none'}; "
        f"the slowest is {slowest['kernel']}. Copies that run on their own keep memory busy with few warps"
    )
    verdict = HOLDS if keeping == [fastest["kernel"]] else PARTLY if fastest["kernel"] in keeping else FAILS
    return Finding(measured, verdict, reason)


CLAIMS = (
    Claim(
        "utilisation", "more than 96 % of the KV memory is in use", DOCUMENTS, "96.3 %", f"{VLLM}, figure 2",
        utilisation, "fragmentation", unit="%", stated_values=(96, 100), published_values=(96.3, 96.3),
    ),
    Claim(
        "before paging", "less than 40 % was in use before", DOCUMENTS, "20.4 to 38.2 %", f"{VLLM}, figure 2",
        before_paging, "fragmentation", unit="%", stated_values=(40, 40), published_values=(20.4, 38.2),
    ),
    Claim(
        "waste", "fragmentation wastes 60 to 80 %", DOCUMENTS, "61.8 to 79.6 %", f"{VLLM}, figure 2",
        waste, "fragmentation", unit="%", stated_values=(60, 80), published_values=(61.8, 79.6),
    ),
    Claim(
        "example", "312, 148 and 1872 tokens in three reservations of 2048 use 38.0 %", DEEP_DIVE, "–", "arithmetic",
        example, "fragmentation", unit="%", stated_values=(38, 38),
    ),
    Claim(
        "sharing", "prefix sharing saves 50 %", DOCUMENTS,
        "samples 6.1 to 9.8 % (Alpaca), 16.2 to 30.5 % (ShareGPT); beams 37.6 to 55.2 %, 44.3 to 66.3 %",
        f"{VLLM}, section 6.3", sharing, "prefix_sharing", unit="%", stated_values=(50, 50),
        published_values=(6.1, 66.3),
    ),
    Claim(
        "requests", "5 to 10 times more requests at once", DOCUMENTS, "2 to 4 times the throughput", VLLM,
        more_requests, "fragmentation", unit="times", stated_values=(5, 10), published_values=(2, 4),
    ),
    Claim(
        "requests served", "5 to 10 times more requests at once, of a model that is served", DOCUMENTS,
        "2 to 4 times the throughput", VLLM, more_served, "serving", gpu=True, unit="times", stated_values=(5, 10),
        published_values=(2, 4),
    ),
    Claim(
        "70B", "10 requests of 2K tokens on a 70B model need 20 GB of KV", DOCUMENTS,
        "6.25 GiB with 8 KV heads, 50 GiB with 64", "arithmetic: 2 * 80 * Hkv * 128 * 2 bytes a token", kv_of_70b,
        unit="GiB", stated_values=(20e9 / GIB, 20e9 / GIB), published_values=(6.25, 50),
    ),
    Claim(
        "swap", "small blocks are sooner recomputed than swapped, large ones sooner swapped", DOCUMENTS,
        "recomputing is cheaper at small blocks, swapping at large ones; level from 16 to 64", f"{VLLM}, figure 19",
        swap_or_recompute, "swap_or_recompute", gpu=True, unit="times recomputing",
    ),
    Claim(
        "texture 5x", "texture memory is 5 times faster for random access", DEEP_DIVE, "–", "no source is given",
        texture("5x"), "texture_vs_global", gpu=True,
    ),
    Claim(
        "texture cycles", "texture memory takes 100 cycles instead of 500", DEEP_DIVE, "–", "no source is given",
        texture("cycles"), "texture_vs_global", gpu=True,
    ),
    Claim(
        "texture locality", "the texture cache's 2D locality helps a paged cache", DEEP_DIVE, "–", "no source is given",
        texture("locality"), "texture_vs_global", gpu=True,
    ),
    Claim(
        "texture prefetch", "texture hardware prefetches", DEEP_DIVE, "–", "no source is given",
        texture("prefetch"), "texture_vs_global", gpu=True,
    ),
    Claim(
        "launch", "a kernel launch costs 3 to 10 ms", DEEP_DIVE, "–", "no source is given",
        launch_cost, "batching", gpu=True, unit="ms", stated_values=(3, 10),
    ),
    Claim(
        "batching", "batching cuts launch overhead 10 to 100 times", DEEP_DIVE, "–", "no source is given",
        batching, "batching", gpu=True, unit="times", stated_values=(10, 100),
    ),
    Claim(
        "block size", "block size 16 is optimal for most workloads", DOCUMENTS,
        "16 to 128 on ShareGPT, 16 to 32 on Alpaca", f"{VLLM}, figure 18", block_size, "block_sizes", gpu=True,
        unit="tokens", stated_values=(16, 16), published_values=(16, 128),
    ),
    Claim(
        "paging", "paging itself costs kernel time", DOCUMENTS, "20 to 26 %; later kernels below 1 % at block 16",
        f"{VLLM}, section 7.1; later kernels' own reports", paging, "paging_overhead", gpu=True, unit="%",
        published_values=(20, 26),
    ),
    Claim(
        "compute", "decode over block tables reaches more than 60 % of peak compute", DOCUMENTS,
        "about one FLOP a byte for each query head of a KV head", "arithmetic", compute_bound, "decode", gpu=True,
        unit="%", stated_values=(60, 100),
    ),
    Claim(
        "checklist",
        "a good kernel has memory throughput > 80 %, occupancy > 50 %, bank conflicts < 5 %, warp efficiency > 90 %",
        GUIDE, "–", "no source is given", checklist, "kernel_profile", gpu=True,
    ),
)  # fmt: skip
