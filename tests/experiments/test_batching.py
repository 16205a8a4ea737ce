"""The batching experiment: both ways are right, its launches are counted, its sentences follow from its rows."""

import pytest

from tests.kit.experiments import document, functions, run


@pytest.fixture(scope="module")
def script():
    return functions("batching")


def row(way, time_us, graph=False, batch=8, status="ok"):
    return {"way": way, "context": 128, "batch": batch, "graph": graph, "status": status, "time_us": time_us}


def test_a_smoke_run_counts_launches(tmp_path):
    printed, _ = run("batching", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "batching")["rows"]
    assert {(r["way"], r["batch"]): r["launches"] for r in rows} == {
        ("a launch per sequence", 1): 1, ("a launch per sequence", 4): 4, ("one launch", 1): 1, ("one launch", 4): 1,
    }  # fmt: skip
    assert all(r["status"] == "ok" and "time_us" not in r for r in rows)
    assert "4 for a batch of 4" in printed and " us " not in printed
    assert "3 to 10 ms a launch" in printed


def test_gains_compare_like_with_like(script):
    single, one = script["WAYS"]
    rows = script["with_gains"]([row(single, 80.0), row(single, 20.0, True), row(one, 10.0), row(one, 10.0, True)])
    assert [r.get("gain") for r in rows] == [None, None, 8.0, 2.0]
    rows = script["with_gains"]([row(single, 80.0, status="failed: x"), row(one, 10.0)])
    assert "gain" not in rows[1]


def test_the_claims_are_held_against_the_rows(script):
    single, one = script["WAYS"]
    rows = script["with_gains"]([row(single, 200.0), row(single, 20.0, True), row(one, 10.0), row(one, 10.0, True)])
    text = script["conclusion"](rows, [{"launch": "a bare CuPy launch", "us": 5.0}])
    assert "An empty launch costs 5.0 us (a bare CuPy launch)" in text
    assert "is 600 to 2,000 times as much" in text
    assert "Launched one by one, one launch gains a factor of 20.0" in text and "10 or more in 1 of 1 cells" in text
    assert "Replayed from graphs, one launch gains a factor of 2.0" in text and "10 or more in 0 of 1 cells" in text


def test_failed_cells_are_counted(script):
    rows = [row(script["WAYS"][0], 1.0), row(script["WAYS"][1], 1.0, status="failed: no memory")]
    assert script["conclusion"](rows, []).startswith("1 of 2 cells failed.")


def test_help_tells_the_question():
    assert "What does a launch cost, and what does batching gain?" in run("batching", "--help")[0]


@pytest.mark.gpu
def test_on_a_gpu_it_measures_steps_and_launches(tmp_path):
    run("batching", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    result = document(tmp_path, "batching")
    assert all(r["status"] == "ok" and r["time_us"] > 0 for r in result["rows"])
    bare, *_, node = (cost["us"] for cost in result["launch_costs"])
    assert 0 < node < bare < 1000
