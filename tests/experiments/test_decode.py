"""The decode experiment needs a GPU, and says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cupaged.attention.choose import ATTENTION_KERNELS
from cupaged.runtime.select import why_no_gpu

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "decode.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    answer = run("--smoke")
    assert answer.returncode == 69
    assert "asks for cuda, but" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_right_and_below_the_ceiling(tmp_path):
    answer = run("--smoke", "--out", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    rows = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))["rows"]
    elsewhere = {"paged_attention_texture"}  # texture_vs_global.py
    assert [row["kernel"] for row in rows] == [name for name in ATTENTION_KERNELS if name not in elsewhere]
    assert all(row["status"] == "ok" for row in rows)
    assert all(0 < row["of_ceiling"] < 1.05 for row in rows)
    assert all(row["gflop_s"] == pytest.approx(row["gb_s"] * row["flop_per_byte"]) for row in rows)
    assert (tmp_path / "decode_roofline.png").stat().st_size > 0
