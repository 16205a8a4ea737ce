"""The claims ledger: every row of it is complete, and every verdict follows from a result."""

import json
from pathlib import Path

import pytest

from cupaged.bench.claims import CLAIMS, FAILS, HOLDS, OPEN, PARTLY, VERDICTS, judge

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {claim.name: claim for claim in CLAIMS}
CUDA = {"stamp": {"backend": "cuda", "device": "NVIDIA H100 80GB HBM3"}}


def verdict(name, **document):
    return judge(BY_NAME[name], {**CUDA, **document})


def test_every_claim_is_complete_and_its_command_exists():
    assert len(BY_NAME) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.statement and claim.origin and claim.published and claim.source
        assert (ROOT / claim.command.removeprefix("python ")).is_file()
        assert not (claim.stated_values or claim.published_values) or claim.unit


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_without_a_result_a_measured_claim_stays_open(claim):
    finding = judge(claim, None)
    assert finding.reason and (finding.verdict == OPEN) == (claim.experiment != "")


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.experiment], ids=lambda claim: claim.name)
def test_a_result_that_lacks_what_it_takes_settles_nothing(claim):
    finding = judge(claim, {**CUDA, "rows": [], "documents_example": [], "verdicts": [], "launch_costs": []})
    assert finding.verdict == OPEN and "lacks" in finding.reason


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.gpu], ids=lambda claim: claim.name)
def test_a_result_from_a_cpu_settles_no_claim_about_a_gpu(claim):
    finding = judge(claim, {"stamp": {"backend": "host"}, "rows": [{"status": "ok"}]})
    assert finding.verdict == OPEN and "timings need a GPU" in finding.reason


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS if claim.experiment], ids=lambda claim: claim.name
)  # fmt: skip
def test_committed_results_are_read(claim):
    """Whatever has been committed settles its claims: a result whose form has changed would not."""
    found = sorted(ROOT.glob(f"experiments/results/*/{claim.experiment}.json"))
    for path in found:
        document = json.loads(path.read_text(encoding="utf-8"))
        finding = judge(claim, document)
        if claim.gpu and document["stamp"]["backend"] != "cuda":
            assert finding.verdict == OPEN
        else:
            assert finding.verdict in VERDICTS[:3] and finding.measured and finding.reason


def batches(*gains):
    rows = [{"status": "ok", "context": 128, "batch": 64, "graph": False, "gain": gain} for gain in gains]
    more = {"status": "ok", "context": 4096, "batch": 64, "graph": False, "gain": 1.0}  # of much work: not looked at
    return {"rows": [*rows, more], "launch_costs": [{"launch": "a bare CuPy launch", "us": 5.0}]}


def memory(**tokens):
    rows = [{"system": name.replace("_", " "), "tokens": part, "running": 100 * part} for name, part in tokens.items()]
    return {"rows": rows, "trace": "t"}


def served(**gains):
    row = {"status": "ok", "throughput_gain": 2.0}
    paged = [{**row, "way": way, "at_once_gain": gain} for way, found in gains.items() for gain in found]
    reserved = {**row, "way": "contiguous", "at_once_gain": 1.0, "occupancy": 0.25}
    return {"rows": [reserved, *paged], "model": "m", "trace": "t"}


def test_what_paging_can_serve_follows_from_what_was_reserved():
    finding = verdict("requests served", **served(paged=[3.4, 3.3]))
    assert "used to 25 %, so that paging alone can serve 4.0 times as many" in finding.reason
    assert finding.measured == "3.3 to 3.4 times (paged)" and finding.values == (3.3, 3.4)


@pytest.mark.parametrize(
    ("name", "document", "expected"),
    [
        ("utilisation", memory(paged_16=0.97), HOLDS),
        ("utilisation", memory(paged_16=0.95, paged_1=0.99), FAILS),
        ("before paging", memory(paged_16=0.97, a=0.3, b=0.2), HOLDS),
        ("before paging", memory(paged_16=0.97, a=0.3, b=0.5), PARTLY),
        ("waste", memory(paged_16=0.97, a=0.9), FAILS),
        ("waste", memory(paged_16=0.97, a=0.3), HOLDS),
        ("requests", memory(paged_16=1.0, a=0.19, b=0.1), HOLDS),
        ("requests", memory(paged_16=1.0, a=0.25), FAILS),
        ("requests served", served(paged=[3.4, 5.2]), HOLDS),
        ("requests served", served(paged=[3.4, 3.3], shared=[4.0, 5.0]), PARTLY),
        ("requests served", served(paged=[3.4, 3.3]), FAILS),
        ("example", {"documents_example": [{"system": "reserve-max 2048", "occupancy": 2332 / 6144}]}, HOLDS),
        ("sharing", {"rows": [{"workload": "w", "saved_percent": 51.0}]}, HOLDS),
        (
            "sharing",
            {"rows": [{"workload": "w", "saved_percent": 51.0}, {"workload": "w", "saved_percent": 9}]},
            PARTLY,
        ),
        ("70B", {}, FAILS),
        ("launch", {"launch_costs": [{"launch": "a bare CuPy launch", "us": 6.0}]}, FAILS),
        ("launch", {"launch_costs": [{"launch": "a bare CuPy launch", "us": 4000.0}]}, HOLDS),
        ("batching", batches(20.0, 12.0), HOLDS),
        ("batching", batches(20.0, 9.0), PARTLY),
        ("batching", batches(9.0), FAILS),
        ("texture 5x", {"verdicts": [{"name": "5x", "measured": "m", "verdict": "does not hold: why"}]}, FAILS),
        ("texture 5x", {"verdicts": [{"name": "5x", "measured": None, "verdict": f"{OPEN}: a GPU"}]}, OPEN),
    ],
)
def test_verdicts(name, document, expected):
    assert verdict(name, **document).verdict == expected


def sizes(**changed):
    rows = {
        "4": {"time_us": 104.0, "occupancy": 0.999},
        "16": {"time_us": 101.0, "occupancy": 0.99},
        "64": {"time_us": 100.0, "occupancy": 0.95},
    }
    return {
        "rows": [{"status": "ok", "block_size": int(k), **v, **changed.get(f"at_{k}", {})} for k, v in rows.items()]
    }


def test_which_block_sizes_lose_nothing():
    assert verdict("block size", **sizes()).verdict == HOLDS
    also = verdict("block size", **sizes(at_4={"time_us": 100.0}))
    assert also.verdict == PARTLY and also.values == (4.0, 16.0)
    assert verdict("block size", **sizes(at_16={"time_us": 110.0})).verdict == FAILS


def test_what_paging_costs():
    row = {"status": "ok", "way": "random", "block_size": 16, "look_up": "block", "time_us": 1.0, "kernel": "k"}
    others = [
        {**row, "way": "in order", "overhead": 0.002},
        *({**row, "kernel": "gather_lookup", "look_up": unit, "overhead": 0.08} for unit in ("element", "row")),
    ]
    for overhead, expected in ((0.005, FAILS), (0.02, PARTLY), (0.22, HOLDS)):
        finding = verdict("paging", rows=[{**row, "overhead": overhead}, *others])
        assert finding.verdict == expected and "in order a table costs +0.2 to +0.2 %" in finding.reason


def test_the_peak_of_an_unknown_device_leaves_its_claim_open():
    row = {"gflop_s": 7e5, "flop_per_byte": 200, "of_ceiling": 0.9, "kernel": "k", "workload": "w"}
    assert verdict("compute", rows=[row]).verdict == HOLDS
    finding = judge(BY_NAME["compute"], {"stamp": {"backend": "cuda", "device": "another"}, "rows": [row]})
    assert finding.verdict == OPEN and "another" in finding.reason


def test_the_checklist_holds_if_it_finds_the_fastest_attention_kernel():
    def row(name, us, last):
        return {
            "status": "ok",
            "kernel": f"paged_attention_{name}",
            "time_us": us,
            "a_verdict": "met",
            "b_verdict": last,
        }

    helper = {**row("x", 0.1, "met"), "kernel": "merge_states"}
    assert verdict("checklist", rows=[row("fast", 1.0, "met"), row("slow", 2.0, "missed"), helper]).verdict == HOLDS
    assert verdict("checklist", rows=[row("fast", 1.0, "met"), row("slow", 2.0, "met"), helper]).verdict == PARTLY
    finding = verdict("checklist", rows=[row("fast", 1.0, "missed"), row("slow", 2.0, "met"), helper])
    assert finding.verdict == FAILS and "the fastest of them, paged_attention_fast, misses b" in finding.reason
    assert finding.measured == "all four are met by paged_attention_slow, of 2 attention kernels"


def swaps(**times):
    rows = [
        {"status": "ok", "tokens": 256, "host_blocks": kind, "block_size": int(size.removeprefix("at_")), "out_ms": ms,
         "in_ms": ms, "recompute_ms": 10.0}
        for size, ms in times.items()
        for kind in ("scattered", "neighbours")
    ]  # fmt: skip
    return {"rows": rows}


def test_swapping_is_held_to_recomputing_at_both_ends():
    finding = verdict("swap", **swaps(at_1=50.0, at_16=6.0, at_256=2.0))
    assert finding.verdict == HOLDS and finding.values == (0.4, 10.0) and "1.20 at 16" in finding.reason
    assert verdict("swap", **swaps(at_1=2.0, at_16=2.0, at_256=2.0)).verdict == PARTLY
    assert verdict("swap", **swaps(at_1=2.0, at_16=6.0, at_256=20.0)).verdict == FAILS


@pytest.mark.parametrize("name", ["utilisation", "before paging", "waste", "requests"])
@pytest.mark.parametrize("failed", ["paged 16", "buddy oracle", "every one"])
def test_an_allocator_that_failed_is_no_evidence(name, failed):
    """It is left out; without paged 16, which these claims are about, there is no verdict."""
    shares = {"tokens": 0.5, "reservation": 0.2, "internal": 0.2, "external": 0.0, "running": 4.0}
    systems = {"reserve-max": None, "buddy oracle": None, "paged 16": 16}
    rows = [
        {"system": system, "block_size": size, "status": "failed: x"}
        if failed in (system, "every one")
        else {"system": system, "block_size": size, "status": "ok", **shares}
        for system, size in systems.items()
    ]
    claim = next(claim for claim in CLAIMS if claim.name == name)
    finding = judge(claim, {"stamp": {"backend": "cpu"}, "trace": "x", "rows": rows})
    assert (finding.verdict == OPEN) == (failed != "buddy oracle")
    assert failed not in finding.measured


def test_a_null_is_no_evidence():
    claim = next(claim for claim in CLAIMS if claim.experiment == "prefix_sharing")
    rows = [{"workload": "chat", "saved_percent": None}]
    assert judge(claim, {"stamp": {"backend": "cpu"}, "rows": rows}).verdict == OPEN
