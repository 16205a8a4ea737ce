"""The memory manager's experiments run from end to end and write what a reader needs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kit.experiments import functions

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> str:
    """Run an experiment as a reader would, and return what it printed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize("name", ["bookkeeping", "eviction", "prefix_sharing"])
def test_a_smoke_run_writes_rows_a_stamp_and_a_picture(name, tmp_path):
    printed = run(name, "--smoke", "--out", str(tmp_path))
    assert printed.index("Expect:") < printed.index("Found:")
    document = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    with open(tmp_path / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["rows"]) > 0
    assert document["stamp"]["backend"] == "cpu"
    assert document["conclusion"].startswith("Found:")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bookkeeping", "eviction", "prefix_sharing"])
def test_help_tells_the_question(name):
    assert "?" in run(name, "--help")


def test_a_hit_rate_of_nothing_is_none():
    script = functions("eviction")
    prompts = [script["Prompt"](np.arange(9, dtype=np.int32))]  # shorter than a block: nothing can be found
    assert script["replay"](script["SMOKE"], prompts, "lru", 4) == (None, None)
    assert [script["of_best"](*rates) for rates in ((None, 0.5), (0.0, 0.0), (0.2, 0.4))] == [None, None, 0.5]
    workload = next(iter(script["WORKLOADS"]))
    rows = [{"workload": workload, "policy": "lru", "of_belady": share} for share in (None, 0.5, 1.0)]
    assert script["mean_of_belady"](rows, workload, "lru") == 0.75
    assert script["mean_of_belady"](rows[:1], workload, "lru") is None
    timed = [
        {"policy": policy, "mode": mode, "p50": 1.0, "p99_9": 2.0}
        for policy in ("lru", "lfu")
        for mode in script["MODES"]
    ]
    empty = [
        {"workload": name, "policy": p, "of_belady": None} for name in script["WORKLOADS"] for p in script["POLICIES"]
    ]
    assert script["conclusion"](empty, timed).count("Belady finds nothing") == len(script["WORKLOADS"])
    assert functions("prefix_sharing")["Usage"]().saved is None


def test_no_policy_beats_belady(tmp_path):
    run("eviction", "--smoke", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "eviction.json").read_text(encoding="utf-8"))["rows"]
    assert {row["policy"] for row in rows} == {"Belady", "lru", "fifo", "lfu", "priority", "cost"}
    assert all(row["of_belady"] <= 1 + 1e-9 for row in rows)  # a quotient of two means
