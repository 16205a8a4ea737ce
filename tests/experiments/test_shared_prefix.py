"""The shared-prefix experiment: every way is right, what is asked for is arithmetic, its sentences follow its rows."""

import pytest

from tests.kit.experiments import document, functions, run


@pytest.fixture(scope="module")
def script():
    return functions("shared_prefix")


def row(script, way, time_us, held, sequences=8, status="ok"):
    return {
        "way": script[way],
        "prefix": 64,
        "sequences": sequences,
        "time_us": time_us,
        "bytes": held,
        "status": status,
    }


def test_a_smoke_run_counts_what_is_asked_for(tmp_path):
    printed, _ = run("shared_prefix", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "shared_prefix")["rows"]
    assert len(rows) == 2 * 3 and all(r["status"] == "ok" and "time_us" not in r for r in rows)
    token = 2 * 2 * 64 * 2  # keys and values of 2 heads in bfloat16
    found = {(r["way"], r["sequences"]): (r["bytes"] // token, r["asked"] // token) for r in rows}
    assert found == {
        ("a copy each", 1): (80, 80), ("same blocks", 1): (80, 80), ("read once", 1): (80, 80),
        ("a copy each", 6): (480, 480), ("same blocks", 6): (160, 480),
        ("read once", 6): (160, 160),  # 6 sequences of 2 heads a KV head are one tile
    }  # fmt: skip
    assert "All 6 cells are right." in printed and "to 3.00 (6 sequences, prefix 64, where bytes allow 3.00)" in printed
    assert "Time was not measured" in printed


@pytest.mark.parametrize("way", ["COPIED", "MAPPED", "READ_ONCE"])
def test_what_is_said_to_be_asked_for_is_what_is_counted(script, way):
    config = script["CONFIGS"]["host", True]
    for sequences in (1, 3, 20):
        work = script["build"](config, 64, sequences, script[way], "host")
        _, plan = script["attention_call"](work, 64 if way == "READ_ONCE" else 0, None)
        counted = script["measure"](config, "host", None, 64, sequences, script[way])["asked"]
        assert script["asked_bytes"](plan, 64, config.suffix) == counted


def test_gains_are_over_a_copy_each(script):
    rows = [row(script, "COPIED", 80.0, 800), row(script, "MAPPED", 40.0, 200), row(script, "READ_ONCE", 25.0, 200)]
    rows = script["with_gains"](rows)
    assert [r.get("gain") for r in rows] == [None, 2.0, 3.2]
    assert [r.get("bound") for r in rows] == [None, 4.0, 4.0]
    text = script["conclusion"](rows)
    assert "Same blocks: a step is faster than with a copy each by a factor of 2.00" in text
    assert "to 3.20 (8 sequences, prefix 64, where bytes allow 4.00)." in text and "slower" not in text
    failed = script["with_gains"]([row(script, "COPIED", 80.0, 800, status="failed: x"), row(script, "MAPPED", 4.0, 2)])
    assert "gain" not in failed[1] and script["conclusion"](failed).startswith("1 of 2 cells failed.")


def test_where_reading_once_loses_is_said(script):
    rows = [row(script, "MAPPED", 10.0, 200, count) for count in (2, 8)]
    rows += [row(script, "READ_ONCE", 12.0, 200, 2), row(script, "READ_ONCE", 9.0, 200, 8)]
    assert "Reading once is slower than mapping the same blocks for 2 with 64" in script["conclusion"](rows)


def test_help_tells_the_question():
    assert "What does sharing a prefix gain?" in run("shared_prefix", "--help")[0]


@pytest.mark.gpu
def test_on_a_gpu_it_measures_time(tmp_path):
    run("shared_prefix", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    result = document(tmp_path, "shared_prefix")
    assert all(r["status"] == "ok" and r["time_us"] > 0 and 0 < r["of_ceiling"] < 1.1 for r in result["rows"])
