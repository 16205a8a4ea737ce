"""The swap experiment checks that blocks come back without a GPU, and times both ways with one."""

import numpy as np
import pytest

import cupaged as pg
from tests.kit.experiments import document, functions, run


def test_without_a_gpu_blocks_come_back(tmp_path):
    text, _ = run("swap_or_recompute", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "swap_or_recompute", picture=False)["rows"]
    assert len(rows) == 4 and "4 of 4 swaps brought back what went out." in text
    assert not any("out_ms" in row for row in rows)


@pytest.mark.parametrize("scattered", [False, True])
def test_a_block_that_does_not_come_back_is_noticed(scattered, monkeypatch):
    module = functions("swap_or_recompute")
    swap = module["Swap"](module["SMALL"], 400, 16, "host")
    assert swap.brings_back(*swap.pairs(scattered))
    arrays = [array for cache in swap.caches for array in cache.storage]
    assert any(np.isnan(array).any() for array in arrays)  # NaN equals nothing, not even itself
    assert swap.brings_back(*swap.pairs(scattered))
    out, back = swap.pairs(scattered)
    with monkeypatch.context() as patch:
        patch.setattr(swap.engine, "swap_out", lambda pairs: None)
        assert not swap.brings_back(out, back)
    last = pg.SwapEngine.swap_in
    with monkeypatch.context() as patch:
        patch.setattr(swap.engine, "swap_in", lambda pairs: last(swap.engine, pairs[:-1]))
        assert not swap.brings_back(*swap.pairs(scattered))


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
