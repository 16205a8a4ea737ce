"""The main job runs, writes what it promises, and says what its rows say."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cupaged.runtime.select import why_no_gpu

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "layouts.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("layouts")
    answer = run("--smoke", "--backend", "host", "--out", str(out))
    assert answer.returncode == 0, answer.stderr
    return out, answer.stdout


def test_it_writes_table_stamp_and_picture(smoke):
    out, _ = smoke
    document = json.loads((out / "layouts.json").read_text(encoding="utf-8"))
    assert document["stamp"]["backend"] == "host"
    assert {"device", "python", "numpy", "commit", "date"} <= document["stamp"].keys()
    with open(out / "layouts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["rows"]) == 5 * 2 * 2 * 2
    assert (out / "layouts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_cell_is_checked_and_right(smoke):
    out, _ = smoke
    for row in json.loads((out / "layouts.json").read_text(encoding="utf-8"))["rows"]:
        assert row["status"] == "ok"
        assert 0 < row["error_of_budget"] <= 1


def test_the_counts_are_what_arithmetic_says(smoke):
    """At D = 128 in half precision every plain layout reads whole sectors, wherever its blocks lie."""
    out, _ = smoke
    for row in json.loads((out / "layouts.json").read_text(encoding="utf-8"))["rows"]:
        if row["head_dim"] == 128 and row["layout"] != "BHDSX":
            assert row["used_fraction"] == row["used_fraction_per_block"] == 1.0
        if row["head_dim"] == 72 and row["block_size"] == 16:
            rest_wasted = row["layout"] in ("BSHD", "BS2HD")  # 144 bytes lie in 5 sectors: the half is another head's
            assert (row["used_fraction_per_block"] == 144 / 160) == rest_wasted


def test_it_says_what_to_expect_first_and_concludes_last(smoke):
    _, text = smoke
    text = " ".join(text.split())
    assert text.index("What to expect.") < text.index("Sectors per request") < text.index("All 40 cells match")
    assert "GB/s" not in text, "host runs say nothing about a GPU's speed"


def test_a_wrong_cell_is_reported_not_hidden():
    script = runpy.run_path(str(SCRIPT))
    good = {"layout": "BSHD", "head_dim": 128, "dtype": "float16", "block_size": 16, "placement": "random"}
    rows = [
        {**good, "status": "ok", "used_fraction": 1.0, "used_fraction_per_block": 1.0},
        {**good, "layout": "BHSD", "status": "ok", "used_fraction": 0.5, "used_fraction_per_block": 0.5},
        {**good, "layout": "HBSD", "status": "failed: no memory"},
    ]
    text = script["conclusion"](rows, "host")
    assert text.startswith("1 of 3 cells failed.")
    assert "differs by 5% or less in 0 of 1 combinations" in text
    assert "The largest gap is 50%" in text


def test_a_changed_kernel_that_is_wrong_is_seen_at_once(tmp_path):
    """The README's loop: edit a kernel, run, and read what went wrong, in the table too."""
    import os
    import shutil

    shutil.copytree(ROOT / "kernels_cu", tmp_path / "kernels")
    file = tmp_path / "kernels" / "attention" / "paged_attention_v1.cu"
    text = file.read_text(encoding="utf-8")
    file.write_text(
        text.replace("total * softmax.normaliser()", "1.1f * total * softmax.normaliser()"), encoding="utf-8"
    )
    environment = {**os.environ, "CUPAGED_KERNELS": str(tmp_path / "kernels")}
    command = [sys.executable, str(SCRIPT), "--smoke", "--backend", "host", "--out", str(tmp_path / "out")]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 1
    assert "not ok: wrong: error is" in " ".join(answer.stdout.split())
    assert "40 of 40 cells failed" in " ".join(answer.stdout.split())
    assert "wrong" in answer.stdout.split("D   block")[1]


def test_what_a_user_can_put_right_is_a_sentence(tmp_path):
    import os

    environment = {**os.environ, "PATH": str(tmp_path), "CUPAGED_BACKEND": "host"}
    environment.pop("CXX", None)
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 69
    assert "Traceback" not in answer.stderr
    assert "BackendUnavailableError: the host backend needs a C++20 compiler" in answer.stderr


def test_help_tells_the_question():
    answer = run("--help")
    assert answer.returncode == 0
    assert "Does the layout of the KV cache matter, and where?" in answer.stdout


def test_asking_for_a_gpu_that_is_not_there():
    if why_no_gpu() is None:
        pytest.skip("there is a GPU")
    answer = run("--smoke", "--backend", "cuda")
    assert answer.returncode != 0
    assert "backend asks for cuda, but" in answer.stderr


@pytest.mark.gpu
def test_on_a_gpu_it_measures_bandwidth_beside_a_ceiling(tmp_path):
    answer = run("--smoke", "--backend", "cuda", "--out", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    document = json.loads((tmp_path / "layouts.json").read_text(encoding="utf-8"))
    assert document["read_ceiling_gb_s"] > 0
    for row in document["rows"]:
        assert row["status"] == "ok"
        assert row["gb_s"] == pytest.approx(row["of_ceiling"] * document["read_ceiling_gb_s"])
        assert 0 < row["of_ceiling"] < 1.1
