"""The recorder still counts what Nsight Compute counted: the committed table is held against the code as it is."""

import json
import runpy
from pathlib import Path

import pytest

import cupaged as pg
from cupaged.bench.traffic import cache_traffic

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "experiments/results/h100-80gb-hbm3/traffic_agreement.json").read_text(encoding="utf-8"))[
    "rows"
]
SCRIPT = runpy.run_path(str(ROOT / "experiments" / "traffic_agreement.py"))


def test_every_case_was_counted_on_a_gpu():
    assert len(ROWS) == len(SCRIPT["CASES"]) == 20


def test_what_was_not_counted_is_a_failed_row():
    case = SCRIPT["CASES"][0]
    for counted in ((None, None), (5, None), (0.0, 0.0)):
        with pytest.raises(ValueError, match=f"ncu counted requests: {counted[0]}, sectors: {counted[1]}"):
            SCRIPT["compare"](case, *counted)
    good = {**ROWS[0], "status": "ok"}
    failed = {"layout": "BSHD", "status": "failed: ncu counted requests: None"}
    assert SCRIPT["agreeing"]([good, failed]) == 1
    assert SCRIPT["conclusion"]([good, failed]).startswith(
        "Sectors per request agree within 5% in 1 of 2 launches; the"
    )
    assert SCRIPT["conclusion"]([failed]).endswith("in 0 of 1 launches; none could be compared.")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['layout']}-D{row['head_dim']}-bs{row['block_size']}")
def test_requests_and_sectors_are_those_of_the_gpu(row):
    case = SCRIPT["Case"](row["layout"], row["head_dim"], row["block_size"], row["dtype"])
    work = case.workload("host")
    whole, _ = cache_traffic(lambda: pg.paged_attention(*work.arguments, kernel=SCRIPT["KERNEL"]))
    assert (whole.requests, whole.sectors) == (row["gpu_requests"], row["gpu_sectors"])
