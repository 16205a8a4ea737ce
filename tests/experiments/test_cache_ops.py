"""The cache operations' experiment checks results without a GPU, and times them with one."""

import pytest

from tests.kit.experiments import document, run


def test_without_a_gpu_results_are_checked(tmp_path):
    text, _ = run("cache_ops", "--smoke", "--backend", "host", "--out", str(tmp_path))
    rows = document(tmp_path, "cache_ops", picture=False)["rows"]
    assert len(rows) == 35 and f"{len(rows)} of {len(rows)} results are right." in text
    assert not any("time_us" in row for row in rows)


@pytest.mark.gpu
def test_on_a_gpu_bandwidth_is_below_the_ceiling(tmp_path):
    run("cache_ops", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    rows = document(tmp_path, "cache_ops")["rows"]
    assert len(rows) == 35 and all(row["status"] == "ok" and 0 < row["of_ceiling"] < 1.1 for row in rows)
    swaps = [row for row in rows if row["operation"].startswith("swap")]
    assert len(swaps) == 10 and all(0 < row["from_idle_of_ceiling"] < 1.1 for row in swaps)
