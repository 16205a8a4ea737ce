"""The paging experiment: every way to find a block is right, and the overheads are what its rows say."""

import pytest

from tests.kit.experiments import document, functions, run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("paging")
    printed, _ = run("paging_overhead", "--smoke", "--backend", "host", "--out", str(out))
    return printed, document(out, "paging_overhead")


def test_every_way_is_right_and_only_computed_blocks_need_no_look_up(smoke):
    printed, result = smoke
    assert len(result["rows"]) == 2 * 2 * 3 + 3 * 2
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert (row["table_requests"] == 0) == (row["way"] == "computed")
        assert row["requests"] >= row["table_requests"]
    assert "All 18 cells are right." in printed and "GB/s" not in printed


def test_look_ups_of_the_gathering_kernel_are_what_arithmetic_says(smoke):
    """64 rows of 2 KiB are 2048 loads of 32 elements, or 256 of 32 vectors; a warp looks 32 rows up at once."""
    rows = {row["look_up"]: row for row in smoke[1]["rows"] if row["way"] == "random" and row["look_up"] != "block"}
    assert {unit: row["table_requests"] for unit, row in rows.items()} == {"element": 2048, "vector": 256, "row": 2}
    assert rows["element"]["overhead"] == rows["vector"]["overhead"] == 1.0


def test_a_kernel_that_reads_the_table_all_the_same_is_seen():
    """The table of a cell that computes its blocks is unmapped: reading it cannot look right."""
    script = functions("paging_overhead")
    step = script["CONFIGS"]["host", True].step
    work = step.build("host", placement="sequential")
    assert (script["as_given"](work, "computed").block_tables == -1).all()
    assert script["as_given"](work, "random") is work
    row = script["attend"]("paged_attention_v1", step, "computed", "host", None)
    assert row["status"] == "ok"
    script["DEFINES"]["computed"].clear()
    row = script["attend"]("paged_attention_v1", step, "computed", "host", None)
    assert row["status"].startswith("wrong: error is ")


def test_the_conclusion_follows_from_the_rows():
    script = functions("paging_overhead")
    base = {"kernel": "k", "block_size": 16, "way": "computed", "look_up": "block", "status": "ok", "time_us": 100.0}
    rows = script["compared"](
        [base, {**base, "way": "in order", "time_us": 101.0}, {**base, "way": "random", "status": "failed: x"}],
        "kernel", "block_size",
    )  # fmt: skip
    assert rows[1]["overhead"] == pytest.approx(0.01) and "overhead" not in rows[2]
    text = script["conclusion"](rows)
    assert text.startswith("1 of 3 cells failed.")
    assert "k, time with a table against computed block ids, blocks in order: +1.0% at block size 16" in text
    assert "anywhere" not in text and "20 to 26 %" in text


def test_help_tells_the_question():
    assert "What does paging cost a kernel?" in run("paging_overhead", "--help")[0]


@pytest.mark.gpu
def test_on_a_gpu_it_measures_time(tmp_path):
    run("paging_overhead", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    result = document(tmp_path, "paging_overhead")
    assert all(row["status"] == "ok" and 0 < row["of_ceiling"] < 1.1 for row in result["rows"])
