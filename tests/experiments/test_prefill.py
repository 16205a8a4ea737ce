"""The prefill experiment checks results without a GPU, and times them with one."""

import pytest

from cupaged.bench.workload import PREFILL_WORKLOADS, PrefillStep
from tests.kit.experiments import document, run


def test_without_a_gpu_results_are_checked(tmp_path):
    text, _ = run("prefill", "--smoke", "--backend", "host", "--out", str(tmp_path))
    assert "3 of 3 results of the toolkit match the reference." in text
    rows = document(tmp_path, "prefill", picture=False)["rows"]
    assert [(row["peer"], row["status"]) for row in rows] == [
        ("cupaged", "ok"), ("cupaged", "ok"), ("cupaged, planned as prefill", "ok"),
    ]  # fmt: skip
    assert all(0 < row["error_of_budget"] <= 1 and "time_us" not in row for row in rows)


@pytest.mark.gpu
def test_on_a_gpu_times_and_arithmetic_belong_together(tmp_path):
    run("prefill", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    rows = document(tmp_path, "prefill")["rows"]
    ours = [row for row in rows if row["peer"].startswith("cupaged")]
    assert len(ours) == 3 and all(row["status"] == "ok" for row in ours)
    assert all(row["tflop_s"] == pytest.approx(row["gflop"] / row["time_us"] * 1e3) for row in ours)


def test_the_arithmetic_of_a_workload():
    work = PrefillStep("", 4, 2, 3, 2, 10, 64).build("host")
    assert work.flop == 2 * (8 + 9 + 10) * 4 * 4 * 64
    assert work.kv_bytes == 2 * 10 * 2 * 2 * 64 * 2
    rows, (query, _, tables, lens) = work.tokens(1, [7, 9])
    assert rows.tolist() == [3, 5] and lens.tolist() == [8, 10]
    assert (query == work.query[[3, 5]]).all() and (tables == work.block_tables[1]).all()


def test_the_workloads_are_those_that_are_asked_for():
    assert [(step.new, step.num_seqs, step.context) for step in PREFILL_WORKLOADS] == [
        (4096, 4, 4096), (16384, 1, 16384), (512, 8, 8192), (4, 64, 4096), (512, 16, 512),
    ]  # fmt: skip
