"""The fragmentation experiment: the documents' example, its verdicts, and a small run from command line to files."""

from __future__ import annotations

import importlib.util
import json
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
    fragmentation.main()
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
