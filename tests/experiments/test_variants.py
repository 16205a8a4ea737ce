"""The variants experiment: every cell is right, bytes are arithmetic, its sentences follow its rows."""

import pytest

from tests.kit.experiments import document, functions, run

TOKEN = 2 * 2 * 64 * 2  # keys and values of 2 heads in bfloat16


@pytest.fixture(scope="module")
def script():
    return functions("variants")


def test_a_smoke_run_counts_what_is_asked_for(tmp_path):
    printed, _ = run("variants", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "variants")["rows"]
    assert len(rows) == 3 * 7 and all(row["status"] == "ok" and "time_us" not in row for row in rows)
    for row in rows:
        tokens = 32 if row["variant"] in ("window", "as short as the window") else 160
        shared_by = 2 if row["kernel"] == "paged_attention_v1" else 1  # v1 reads a KV head for each query head
        assert row["asked"] == tokens * shared_by * TOKEN, row
    assert (
        "All 21 cells are right." in printed and "Time was not measured".lower() in printed.replace("\n", " ").lower()
    )


def row(variant, time_us, kernel="paged_attention_v1", status="ok"):
    return {"kernel": kernel, "variant": variant, "time_us": time_us, "status": status}


def test_a_window_is_held_to_a_short_context_and_the_others_to_the_plain_step(script):
    rows = [row("plain", 100.0), row("as short as the window", 10.0), row("window", 10.5), row("soft cap", 104.0)]
    rows = script["with_costs"](rows)
    assert [r.get("cost") for r in rows] == [None, None, pytest.approx(0.05), pytest.approx(0.04)]
    text = script["conclusion"](rows)
    assert "paged_attention_v1: a window costs +5.0% over a context as short as it." in text
    assert "paged_attention_v1: of the others soft cap costs most, +4.0%." in text
    assert "Above the aim of 10% for a window and 3% else: soft cap." in text and "CPU" not in text


def test_a_cell_that_failed_gives_no_cost(script):
    rows = script["with_costs"]([row("plain", 100.0, status="failed: x"), row("sinks", 100.0)])
    assert "cost" not in rows[1] and script["conclusion"](rows).startswith("1 of 2 cells failed.")


@pytest.mark.gpu
def test_a_smoke_run_times_every_cell(tmp_path):
    run("variants", "--smoke", "--out", str(tmp_path))
    rows = document(tmp_path, "variants")["rows"]
    assert all(row["status"] == "ok" and row["time_us"] > 0 for row in rows)
