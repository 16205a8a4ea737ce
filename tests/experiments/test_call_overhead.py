"""The call-overhead experiment: every way to call is right, its launches are counted, its sentences follow its rows."""

import pytest

from tests.kit.experiments import document, functions, run

CALLS = ["bare launch", "prepared", "planned", "unplanned", "update of the plan", "append_kv"]


@pytest.fixture(scope="module")
def script():
    return functions("call_overhead")


def row(call, cpu_us, status="ok"):
    return {"call": call, "status": status, "cpu_us": cpu_us, "graph_us": 2.5}


def test_a_smoke_run_counts_launches_and_functions(tmp_path):
    printed, _ = run("call_overhead", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "call_overhead")["rows"]
    assert [r["call"] for r in rows] == CALLS
    assert [r["launches"] for r in rows] == [1, 1, 1, 2, 1, 1]
    assert all(r["status"] == "ok" and "cpu_us" not in r for r in rows)
    bare, prepared, planned, unplanned, *_ = (r["functions"] for r in rows)
    assert bare == 0 < prepared < planned < unplanned
    assert "All 6 calls are right." in printed and " us in a graph" not in printed


def test_overheads_are_over_the_bare_launch_and_held_to_the_aim(script):
    for planned, kept in ((17.5, "keeps"), (18.5, "misses")):
        rows = script["with_overheads"]([row("bare launch", 8.0), row("prepared", 8.5), row("planned", planned)])
        assert [r["over_bare_us"] for r in rows] == [0, 0.5, planned - 8]
        text = script["conclusion"](rows)
        assert f"A planned call {kept} the aim of 10 us." in text and "0.5 us (prepared)" in text
        assert "Replayed from a graph, a call takes 2.50 us (bare launch), 2.50 us (prepared)" in text


def test_without_a_bare_launch_nothing_is_compared(script):
    rows = [{"call": "bare launch", "status": "failed: x"}, row("planned", 9.0)]
    assert "over_bare_us" not in script["with_overheads"](rows)[1]
    assert script["conclusion"](rows) == "1 of 2 calls failed."


def test_help_tells_the_question():
    assert "What does a call cost before the GPU hears of it?" in run("call_overhead", "--help")[0]


@pytest.mark.gpu
def test_on_a_gpu_it_times_every_call(tmp_path):
    run("call_overhead", "--smoke", "--backend", "cuda", "--out", str(tmp_path), CUPAGED_VALIDATE="0")
    rows = document(tmp_path, "call_overhead")["rows"]
    assert [r["call"] for r in rows] == CALLS
    assert all(r["status"] == "ok" and 0 < r["cpu_us"] < 5000 and 0 < r["graph_us"] < 1000 for r in rows)
