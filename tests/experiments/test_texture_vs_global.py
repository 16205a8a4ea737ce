"""The texture experiment: every path is right everywhere, and verdicts follow from the rows."""

import numpy as np
import pytest

from cupaged.runtime import kernels_defining
from tests.kit.experiments import document, functions, run


@pytest.fixture(scope="module")
def script():
    return functions("texture_vs_global")


def test_every_path_is_right_and_nothing_is_timed_on_the_host(tmp_path, script):
    printed, _ = run("texture_vs_global", "--smoke", "--backend", "host", "--out", str(tmp_path))
    result = document(tmp_path, "texture_vs_global", picture=False)
    assert {row["status"] for row in result["rows"]} == {"ok"}
    paths, floats = set(script["PATHS"]), set(script["OF_FLOATS"])
    for part, expected in (("latency", paths), ("gather", paths), ("attention", paths | floats)):
        assert {row["path"] for row in result["rows"] if row["part"] == part} == expected
    assert not any(name in row for row in result["rows"] for name in script["TIMES"])
    assert all(row["verdict"].startswith("could not be measured here") for row in result["verdicts"])
    assert "Timings need a GPU" in printed and "GB/s" not in printed


@pytest.mark.parametrize("order", ["random", "row by row"])
def test_a_chain_visits_every_row_once_and_closes(script, order):
    cache, chain = script["chain_in_cache"](8, order, "host")
    keys = cache.key.view(np.int32)
    at, seen = tuple(chain[0]), []
    for _ in range(len(chain)):
        seen.append(at)
        block, head, slot = at
        at = tuple(int(n) for n in keys[block, slot, head, :3])
    assert at == seen[0] and len(set(seen)) == 8 * 16


def test_a_wrong_chain_and_a_wrong_word_are_seen(script):
    cache, chain = script["chain_in_cache"](8, "random", "host")
    with kernels_defining(LOAD_PATH="TEXTURE_ARRAY"):
        assert script["chase"](cache, chain, "L1", 20) == {"status": "ok"}
        cache.textures.clear()
        block, head, slot = chain[18]
        cache.key.view(np.int32)[block, slot, head, :3] = chain[0]
        assert script["chase"](cache, chain, "HBM", 20)["status"].startswith("wrong: the chain led to")
        cache, table, expected = script["gather_cache"](16, 64, 1 << 15, "host")
        assert script["gather"](cache, table, expected ^ 4, None)["status"].startswith("wrong: the words combine to")


def rows_of(texture_hbm=600.0, array=0.9, in_order=1.1, gain=0.95):
    cycles = {"plain": {"L1": 40, "L2": 270, "HBM": 600}, "tex": {"L1": 90, "L2": 320, "HBM": texture_hbm}}
    rows = []
    for path in ("plain", "tex linear", "tex pitch", "tex array"):
        for level, value in cycles[path[:5].strip() if path == "plain" else "tex"].items():
            factor = {"plain": 1.1}.get(path, in_order)
            rows += [
                {"part": "latency", "path": path, "level": level, "order": "random", "cycles": value, "status": "ok"},
                {"part": "latency", "path": path, "level": level, "order": "row by row", "cycles": value / factor,
                 "status": "ok"},
            ]  # fmt: skip
        ratio = {"plain": 1.0, "tex array": array}.get(path, gain)
        rows += [{"part": part, "path": path, "of_plain": ratio, "status": "ok"} for part in ("gather", "attention")]
    return rows


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"5x": "does not hold", "cycles": "does not hold", "locality": "does not hold",
              "prefetch": "does not hold"}),
        ({"texture_hbm": 100.0}, {"5x": "holds"}),
        ({"gain": 1.5, "array": 1.4}, {"5x": "holds partly", "locality": "holds"}),
        ({"in_order": 3.0}, {"prefetch": "holds"}),
    ],
)  # fmt: skip
def test_verdicts_follow_from_the_rows(script, changed, expected):
    verdicts = {row["name"]: row for row in script["judge"](rows_of(**changed))}
    for name, verdict in expected.items():
        assert verdicts[name]["verdict"].split(":")[0] == verdict and verdicts[name]["measured"]


def test_a_failed_cell_leaves_its_claim_open(script):
    rows = [row for row in rows_of() if row["path"] != "plain" or row["part"] != "latency"]
    verdicts = {row["name"]: row["verdict"] for row in script["judge"](rows)}
    assert verdicts["cycles"].startswith("could not be measured") and verdicts["locality"] == "does not hold"


def test_counters_are_given_as_the_reason(script):
    of = {"part": "counters", "kernel": "paged_attention_texture", "status": "ok", "l1_hit_percent": 1.5,
          "l2_read_sectors": 2e6, "dram_bytes_read": 5e8}  # fmt: skip
    rows = [*rows_of(), {**of, "path": "plain"}, {**of, "path": "tex linear", "l1_hit_percent": None}]
    (reason,) = {row["counted"] for row in script["judge"](rows)}
    assert reason == "plain: L1 hits 1.5 %, 2,000,000 sectors asked of L2, 500,000,000 bytes from DRAM"


@pytest.mark.parametrize(("asked", "alike"), [(2.01e6, True), (2.1e6, False)])
def test_where_all_ask_for_the_same_the_verdict_says_so(script, asked, alike):
    of = {"part": "counters", "kernel": "paged_attention_texture", "status": "ok", "l1_hit_percent": 1.5,
          "l2_read_sectors": 2e6, "dram_bytes_read": 5e8}  # fmt: skip
    counts = [{**of, "path": path} for path in ("plain", "tex linear")]
    rows = [*rows_of(), *counts, {**of, "path": "tex array", "l2_read_sectors": asked}]
    verdicts = {row["name"]: row["verdict"] for row in script["judge"](rows)}
    for name in ("5x", "locality"):
        assert ("the same sectors to L2" in verdicts[name]) == alike


@pytest.mark.gpu
def test_on_a_gpu_it_measures(tmp_path):
    run("texture_vs_global", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    result = document(tmp_path, "texture_vs_global")
    latencies = [row for row in result["rows"] if row["part"] == "latency"]
    assert all(row["status"] == "ok" for row in result["rows"]) and all(row["cycles"] > 10 for row in latencies)
