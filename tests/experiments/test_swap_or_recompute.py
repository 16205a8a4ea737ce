"""The swap experiment checks that blocks come back without a GPU, and times both ways with one."""

import pytest

from tests.kit.experiments import document, functions, run


def test_without_a_gpu_blocks_come_back(tmp_path):
    text, _ = run("swap_or_recompute", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "swap_or_recompute", picture=False)["rows"]
    assert len(rows) == 4 and "4 of 4 swaps brought back what went out." in text
    assert not any("out_ms" in row for row in rows)


@pytest.mark.gpu
def test_on_a_gpu_both_ways_are_timed(tmp_path):
    run("swap_or_recompute", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    rows = document(tmp_path, "swap_or_recompute")["rows"]
    assert all(row["status"] == "ok" and row["out_ms"] > 0 and row["recompute_ms"] > 0 for row in rows)


def test_the_conclusion_says_where_swapping_is_quicker(tmp_path):
    module = functions("swap_or_recompute")
    rows = [
        {"status": "ok", "tokens": tokens, "block_size": 16, "host_blocks": "neighbours", "out_ms": 1.0, "in_ms": 1.0,
         "recompute_ms": tokens / 100}
        for tokens in (100, 300, 900)
    ]  # fmt: skip
    assert "Blocks of 16, neighbours: swapping is quicker at 300, 900 tokens." in module["conclusion"](rows)
    module["draw"](rows, {"device": "some GPU"}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
