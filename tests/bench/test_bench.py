"""Error budgets, workloads and reports."""

import json

import numpy as np
import pytest

import cupaged as pg
from cupaged.bench import report
from cupaged.bench.accuracy import decode_budget, decode_check
from cupaged.bench.traffic import cache_traffic
from cupaged.bench.workload import decode_workload


def test_the_budget_sees_what_a_wrong_kernel_does():
    """A right result takes part of the budget; one ulp too many, a lost token or a NaN exceeds it."""
    work = decode_workload((50, 33), 4, 2, 64, 16, backend="host")
    out = pg.paged_attention(*work.arguments)
    assert 0 < decode_check(out, *work.arguments) <= 1
    worse = out.copy()
    worse.view(np.uint16)[0, 0, 0] += 4
    assert decode_check(worse, *work.arguments) > 1
    shorter = pg.paged_attention(work.query, work.cache, work.block_tables, work.seq_lens - 1)
    assert decode_check(shorter, *work.arguments) > 10
    worse[0, 0, 0] = np.nan
    assert decode_check(worse, *work.arguments) == np.inf


def test_the_budget_follows_the_storage_type():
    """float32 may err by parts in a million, half by its own rounding: a kernel in tf32 would not pass as float32."""
    single, half = (
        decode_budget(*decode_workload((500, 33), 4, 2, 64, 16, dtype=dtype, backend="host").arguments)
        for dtype in ("float32", "float16")
    )
    assert single.out.max() < 1e-5
    assert 1e-4 < half.out.max() < 1e-2
    assert half.lse < 1e-4


def test_a_workload_places_blocks_in_order_or_not():
    ordered, shuffled = (
        decode_workload((40, 20), 2, 1, 32, 8, placement=placement, backend="host")
        for placement in ("sequential", "random")
    )
    np.testing.assert_array_equal(ordered.block_tables, [[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]])
    assert sorted(shuffled.block_tables[shuffled.block_tables >= 0]) == list(range(8))
    assert not np.array_equal(ordered.block_tables, shuffled.block_tables)
    assert ordered.kv_bytes == 60 * 2 * 32 * 2
    with pytest.raises(ValueError, match="placement must be one of sequential, random; got 'sorted'"):
        decode_workload((1,), 1, 1, 32, 8, placement="sorted", backend="host")


def test_traffic_wants_exactly_one_launch():
    with pytest.raises(ValueError, match="must make one launch on the host backend; it made 0"):
        cache_traffic(lambda: None)


def test_results_are_written_with_their_stamp(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPAGED_COMMIT", "abc123")
    stamp = report.machine_stamp("host")
    assert stamp["commit"] == "abc123"
    rows = [{"a": 1, "b": np.float64(0.5)}, {"a": 2, "c": "x"}]
    report.write_results(rows, stamp, "trial", tmp_path, conclusion="fine")
    document = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    assert document["rows"] == [{"a": 1, "b": 0.5}, {"a": 2, "c": "x"}]
    assert (document["experiment"], document["conclusion"]) == ("trial", "fine")
    assert (tmp_path / "trial.csv").read_text(encoding="utf-8") == "a,b,c\n1,0.5,\n2,,x\n"
    with pytest.raises(TypeError, match="a result holds object"):
        report.write_results([{"a": object()}], stamp, "trial", tmp_path)


@pytest.mark.parametrize(
    ("stamp", "folder"),
    [
        ({"backend": "cuda", "device": "NVIDIA H100 80GB HBM3"}, "h100-80gb-hbm3"),
        ({"backend": "host", "device": "Some CPU"}, "cpu"),
    ],
)
def test_results_lie_under_their_device(stamp, folder):
    assert report.device_folder(stamp) == folder


@pytest.mark.gpu
def test_the_read_ceiling_is_plausible():
    from cupaged.bench.ceilings import read_ceiling

    ceiling = read_ceiling(1 << 28)
    assert 100 < ceiling < 20_000


@pytest.mark.gpu
def test_a_graph_of_calls_is_timed():
    import cupy

    from cupaged.bench.timing import copies_for_cold_l2, time_graph

    small, large = (cupy.zeros(n, dtype=cupy.float32) for n in (1 << 20, 1 << 26))
    short, long = (time_graph([lambda a=a: cupy.add(a, 1, out=a)]) for a in (small, large))
    assert 0 < short.median_us < long.median_us
    assert copies_for_cold_l2(1 << 33) == 1
    assert copies_for_cold_l2(1 << 20) > 50
