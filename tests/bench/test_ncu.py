"""What ncu prints is read as it is written, and what stops ncu is a sentence."""

import os
from pathlib import Path

import pytest

import cupaged as pg
from cupaged.bench.ncu import parse_ncu, run_ncu

SAMPLE = Path(__file__).resolve().parents[1] / "experiments" / "ncu_sample.txt"


def test_launches_are_read_in_order_in_base_units():
    launches = parse_ncu(SAMPLE.read_text(encoding="utf-8"))
    assert [launch.kernel for launch in launches] == [
        "paged_attention_v1", "plan_decode", "paged_attention_persistent", "plan_decode",
    ]  # fmt: skip
    first, plan = launches[:2]
    assert first.values["dram__bytes_read.sum"] == pytest.approx(1080e6)
    assert first.values["dram__bytes_write.sum"] == pytest.approx(524_290)
    assert first.values["gpu__time_duration.sum"] == pytest.approx(640e-6)
    assert first.values["l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"] == 48_000
    assert first.values["sm__warps_active.avg.pct_of_peak_sustained_active"] == 43.75
    assert "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum" not in plan.values, "n/a is no number"


@pytest.mark.parametrize(
    ("unit", "value"),
    [("byte", 3), ("Gbyte", 3e9), ("ns", 3e-9), ("nsecond", 3e-9), ("msecond", 3e-3), ("s", 3), ("%", 3), ("inst", 3),
     ("sector", 3), ("", 3)],
)  # fmt: skip
def test_units(unit, value):
    text = f'"ID","Kernel Name","a__b.sum"\n"","","{unit}"\n"0","k(int)","3"\n'
    (launch,) = parse_ncu(text)
    assert launch.kernel == "k" and launch.values == {"a__b.sum": pytest.approx(value)}


def test_text_without_launches():
    assert parse_ncu("==PROF== nothing\n") == []
    assert parse_ncu('"ID","Kernel Name","a__b.sum"\n"","","%"\n') == []
    with pytest.raises(ValueError, match="columns ID and Kernel Name; got"):
        parse_ncu('"a","b"\n"1","2"\n')


def fake_ncu(folder, monkeypatch, body):
    path = folder / "ncu"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_missing_ncu_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pg.BackendUnavailableError, match="ncu, Nsight Compute's command line, is not on PATH"):
        run_ncu(("a",), ("k",), ("true",))


def test_ncu_is_told_what_to_count(monkeypatch, tmp_path):
    fake_ncu(tmp_path, monkeypatch, 'printf "%s\\n" "$@"')
    said = run_ncu(("a.sum", "b.sum"), ("k", "l"), ("program", "--flag")).split("\n")
    assert said[said.index("--metrics") + 1] == "a.sum,b.sum"
    assert said[said.index("--kernel-name") + 1] == "regex:^(k|l)$"
    assert said[said.index("--clock-control") + 1] == "none" and "--csv" in said
    assert said[-3:] == ["program", "--flag", ""]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", pg.BackendUnavailableError, "only administrators read"),
        ("echo '==ERROR== ERR_NVGPUCTRPERM'", pg.BackendUnavailableError, "only administrators read"),
        ("echo 'Failed to find metric x' >&2; exit 9", RuntimeError, "(?s)ncu failed:.*Failed to find metric x"),
    ],
)
def test_what_stops_ncu_is_said(monkeypatch, tmp_path, body, error, message):
    fake_ncu(tmp_path, monkeypatch, body)
    with pytest.raises(error, match=message):
        run_ncu(("a",), ("k",), ("true",))
