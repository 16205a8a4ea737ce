"""The fragmentation experiment: the documents' example, its verdicts, and a small run from command line to files."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "fragmentation.py"


@pytest.fixture(scope="module")
def fragmentation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fragmentation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fragmentation"] = module
    spec.loader.exec_module(module)
    return module


def test_documents_example(fragmentation: ModuleType) -> None:
    reserved, paged = fragmentation.documents_example()
    assert (reserved["slots"], reserved["tokens"], f"{reserved['occupancy']:.1%}") == (6144, 2332, "38.0%")
    assert (paged["slots"], paged["tokens"], f"{paged['occupancy']:.1%}") == (2352, 2332, "99.1%")


def test_verdicts_come_from_the_values(fragmentation: ModuleType) -> None:
    verdict = fragmentation.verdict
    assert verdict({"a": 5, "b": 10}, 5, 10) == "holds"
    assert verdict({"a": 4.9, "b": 10.1, "c": 7, "d": 1}, 5, 10) == "holds: c; more: b; less: a, d"
    assert verdict({"a": 0.5}, 0.96, 1) == "less: a"


def test_power_of_two(fragmentation: ModuleType) -> None:
    assert fragmentation.power_of_two(np.array([1, 2, 3, 4, 5, 1000, 1024, 1025])).tolist() == [
        1, 2, 4, 4, 8, 1024, 1024, 2048,
    ]  # fmt: skip


def test_smoke(fragmentation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fragmentation.py", "--smoke", "--out", str(tmp_path)])
    fragmentation.EXPERIMENT.main()
    results = json.loads((tmp_path / "fragmentation.json").read_text())
    rows = {row["system"]: row for row in results["rows"]}
    assert list(rows) == [
        "reserve-max", "first-fit pow2", "first-fit oracle", "buddy pow2", "buddy oracle",
        "paged 1", "paged 16", "paged 256",
    ]  # fmt: skip
    for row in rows.values():
        parts = [row[part] for part in ("tokens", "reservation", "internal", "external", "free")]
        assert sum(parts) == pytest.approx(1)
        assert row["completed"] + row["refused"] == results["requests"]
    assert [claim["claim"] for claim in results["claims"]] and results["conclusion"]
    for name in ("fragmentation.csv", "fragmentation.png", "fragmentation_over_time.csv"):
        assert (tmp_path / name).stat().st_size > 0


# --- traces as they come --------------------------------------------------------------------------

BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def burst(start: int, sizes: list[tuple[int, int]]) -> str:
    """A line a request, all within a few seconds."""
    lines = (f"{start + i % 3},GPT-4,{p},{o},{p + o},Conversation log\n" for i, (p, o) in enumerate(sizes))
    return "".join(lines)


def run_main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fragmentation.py", "--smoke", *map(str, arguments)])
    return script.EXPERIMENT.main()


def test_a_bursty_trace_with_failed_requests_is_replayed(
    fragmentation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle, from which the map is drawn, lies between the bursts, when nothing runs."""
    text = BURSTGPT + burst(0, [(90, 30), (0, 0), (40, 20)] * 4) + burst(90_000, [(50, 10), (30, 0)] * 3)
    path = tmp_path / "bursts.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    options = ("--trace", path, "--slots", 1024, "--max-len", 200, "--load", 0.2, "--out", tmp_path)
    assert run_main(fragmentation, monkeypatch, *options) == 0
    results = json.loads((tmp_path / "fragmentation_bursts.json").read_text())
    assert (results["requests"], results["left_out"]) == (11, 7)
    over_time = json.loads((tmp_path / "fragmentation_bursts_over_time.json").read_text())["rows"]
    assert 0 in [row["running"] for row in over_time if row["system"] == "paged 16"]
    assert all(row["status"] == "ok" and row["completed"] == 11 for row in results["rows"])
    assert (tmp_path / "fragmentation_bursts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_system_that_cannot_hold_the_trace_is_a_failed_row(
    fragmentation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buddy system of 200 slots has no region of 256, and blocks of 256 do not fit."""
    path = tmp_path / "long.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,150,30\n1,20,3\n9,50,40\n")
    options = ("--trace", path, "--slots", 200, "--max-len", 200, "--load", 0.9, "--out", tmp_path)
    assert run_main(fragmentation, monkeypatch, *options) == 1
    results = json.loads((tmp_path / "fragmentation_long.json").read_text())
    failed = {row["system"]: row["status"] for row in results["rows"] if row["status"] != "ok"}
    assert failed == {
        "buddy pow2": "failed: memory must have room for request 0 alone, which holds 150 tokens",
        "buddy oracle": "failed: memory must have room for request 0 alone, which holds 150 tokens",
        "paged 256": "failed: num_slots must be at least 256, got 200",
    }
    assert results["conclusion"].startswith("Failed: buddy pow2, buddy oracle, paged 256. Paged at block 16")
    assert (tmp_path / "fragmentation_long.png").stat().st_size > 0


@pytest.mark.parametrize("left", [(), ("paged 16",), ("reserve-max",), ("reserve-max", "paged 16"), ("buddy oracle",)])
def test_what_was_not_measured_settles_nothing(
    fragmentation: ModuleType, left: tuple[str, ...], tmp_path: Path
) -> None:
    """Rows that failed, and rows in which nothing ran, are no evidence for a claim."""
    shares = {"tokens": 0.0, "reservation": 0.0, "internal": 0.0, "external": 0.0, "free": 1.0}
    rows = [
        {"system": name, "block_size": size, "status": "ok", "occupancy": 1.0, **shares, "running": 0.0}
        if name in left
        else {"system": name, "block_size": size, "status": "failed: x"}
        for name, size in (("reserve-max", None), ("buddy oracle", None), ("paged 16", 16))
    ]
    claims, config = fragmentation.settle(rows), fragmentation.Config()
    wanting = [claim["verdict"] == "could not be measured" for claim in claims]
    contiguous = any(name != "paged 16" for name in left)
    assert wanting == ["paged 16" not in left, not contiguous, not contiguous, True]
    assert "there is nothing to compare" in fragmentation.conclusion(rows, config)
    trace = fragmentation.sample_trace(10)
    fragmentation.save_figure(fragmentation.draw(rows, {}, trace, config), tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("0,9,9\n1,9,9\n", (), "offered_tokens must be at most the 234 that the trace's 2 requests hold"),
        ("0,9,9\n", (), "trace must hold at least two requests that generate a token"),
        ("0,9,0\n1,9,0\n2,9,9\n", (), r"and have at most 8192 tokens \(--max-len\), got 1 of 3"),
        ("0,9,9\n0,9,9\n", (), "trace must hold at least two requests that arrive over time"),
        ("0,x,9\n", (), "line 2, column 'num_prefill_tokens': expected a whole number of tokens"),
        (
            "0,9,9\n1,9,9\n",
            ("--slots", "99", "--max-len", "100"),
            "--slots must hold a request of --max-len 100, got 99",
        ),
        ("0,9,9\n1,9,9\n", ("--requests", "0"), "argument --requests: expected a whole number of at least 1, got '0'"),
        ("0,9,9\n1,9,9\n", ("--load", "nan"), "argument --load: expected a finite number above 0, got 'nan'"),
        ("0,9,9\n1,9,9\n", ("--load", "0"), "argument --load: expected a finite number above 0, got '0'"),
    ],
)
def test_a_trace_that_says_too_little_is_a_sentence(
    fragmentation: ModuleType, text: str, options: tuple[str, ...], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "few.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + text)
    with pytest.raises(SystemExit) as stopped:
        run_main(fragmentation, monkeypatch, "--trace", path, "--out", tmp_path / "out", *options)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_expectations_of_the_longest_requests_do_not_overflow(fragmentation: ModuleType) -> None:
    trace = fragmentation.Trace(np.arange(20.0), np.full(20, 2**30), np.full(20, 2**30 - 1))
    config = fragmentation.Config(num_slots=2**31, max_len=2**31 - 1)
    requests = fragmentation.Requests.from_trace(trace, config.num_slots)
    said = fragmentation.expectation(trace, requests, config)
    assert "a request of this trace holds 1,610,612,735 tokens on average" in said and "only 25% too early" in said
