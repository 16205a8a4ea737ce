"""The profiling checklist: values, verdicts and the roofline's numbers follow from what ncu printed."""

import os
from pathlib import Path

import pytest

import cupaged as pg
from cupaged.bench.workload import WORKLOADS, DecodeStep
from cupaged.runtime.host import record_traffic
from cupaged.runtime.select import why_no_gpu
from tests.kit.experiments import document, functions, run

SAMPLE = Path(__file__).with_name("ncu_sample.txt")
STEP = WORKLOADS[1]


@pytest.fixture(scope="module")
def script():
    return functions("kernel_profile")


@pytest.fixture(scope="module")
def rows(script):
    names = ["paged_attention_v1", "paged_attention_persistent", "plan_decode", "append_kv", "gather"]
    return {row["kernel"]: row for row in script["profile"](names, STEP, SAMPLE.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("kernel", list(pg.kernels()))
def test_every_kernel_of_the_registry_can_be_launched(kernel, script):
    with record_traffic() as log:
        script["launch"](kernel, DecodeStep("small", 4, 2, (700, 17), 64).build("host"))
    assert kernel in [launch.kernel for launch in log]


def test_a_row_has_each_value_beside_its_verdict(rows):
    v1, mma = rows["paged_attention_v1"], rows["paged_attention_persistent"]
    assert (v1["memory_throughput"], v1["memory_throughput_verdict"]) == (85.1, "met")
    assert (v1["achieved_occupancy"], v1["achieved_occupancy_verdict"]) == (43.75, "missed")
    assert (v1["bank_conflicts"], v1["bank_conflicts_verdict"]) == (pytest.approx(2.5), "met")
    assert (v1["warp_efficiency"], v1["warp_efficiency_verdict"]) == (pytest.approx(98.5), "met")
    assert mma["bank_conflicts"] == pytest.approx(0.5) and mma["achieved_occupancy_verdict"] == "missed"


def test_the_first_launch_counts(rows):
    plan = rows["plan_decode"]
    assert plan["achieved_occupancy"] == 48.9 and plan["warp_efficiency_verdict"] == "missed"
    assert plan["bank_conflicts"] == 0 and "float32_flop" not in plan and "flop" not in plan


def test_the_roofline_has_bytes_time_and_flop(rows):
    row = rows["paged_attention_persistent"]
    assert row["time_us"] == pytest.approx(400)
    assert row["dram_gb_s"] == pytest.approx((1100e6 + 1.04858e6) / 400e-6 / 1e9)
    assert row["flop"] == 4 * 32 * 128 * 64 * 4096
    assert row["gflop_s"] == pytest.approx(row["flop_per_byte"] * row["dram_gb_s"])
    assert rows["paged_attention_v1"]["float32_flop"] == 1e6 + 2e6 + 2 * 3e6


def test_what_was_not_counted_is_a_row(rows):
    assert rows["append_kv"]["status"] == "not launched: rows must be: at least 1"
    assert rows["gather"]["status"] == "failed: ncu counted no launch of it"


def test_a_counter_that_is_missing_is_no_verdict(script):
    launch = script["Launch"]("k", {script["WARPS"]: 60.0})
    row = {"kernel": "k", "status": "ok", **script["checked"](launch)}
    assert row["achieved_occupancy_verdict"] == "met"
    assert row["bank_conflicts"] is None and row["bank_conflicts_verdict"] == "not counted"
    text = script["conclusion"]([row])
    assert "k misses no target (not counted: memory throughput, bank conflicts, warp efficiency)." in text


def test_the_conclusion_names_what_is_missed(script, rows):
    text = script["conclusion"](list(rows.values()))
    assert text.startswith("3 of 5 kernels were counted.")
    assert "paged_attention_v1 misses achieved occupancy 43.8 % (above 50 % is asked)." in text


def test_what_ncu_wrote_elsewhere_can_be_read(tmp_path):
    printed, _ = run(
        "kernel_profile", "--read", str(SAMPLE), "--kernel", "paged_attention_persistent", "--out", str(tmp_path)
    )
    result = document(tmp_path, "kernel_profile")
    assert [row["kernel"] for row in result["rows"]] == ["paged_attention_persistent"]
    assert result["targets"]["bank_conflicts"] == "below 5 %"
    assert result["stamp"]["counted"] == "elsewhere, read from ncu_sample.txt"
    assert "90.0 met" in printed and "24.6 missed" in printed


@pytest.mark.parametrize("name", [name for name in pg.kernels() if name in ("plan_decode", "append_kv")])
def test_it_knows_how_to_launch_what_is_no_attention(script, name):
    work = DecodeStep("small", 4, 2, (20, 5), head_dim=64).build("host")
    script["launch"](name, work)
    if name == "append_kv":
        assert not work.cache.key.any(), "all slots were written with zeros"


def test_a_kernel_that_it_does_not_know_is_said(script):
    work = DecodeStep("small", 4, 2, (5,), head_dim=64).build("host")
    with pytest.raises(pg.UnsupportedError, match="does not know how to launch it"):
        script["launch"]("unheard_of", work)


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    _, errors = run("kernel_profile", "--smoke", "--out", str(tmp_path), status=69)
    assert "asks for cuda, but" in errors and "Traceback" not in errors


def test_help_tells_the_question():
    assert "Does each kernel keep what the profiling checklist asks for?" in run("kernel_profile", "--help")[0]


def test_it_hides_no_module_of_python():
    """A script named like a module of Python's own would be imported in its place by every script beside it."""
    import sys

    folder = SAMPLE.parents[2] / "experiments"
    assert not {name.removesuffix(".py") for name in os.listdir(folder)} & sys.stdlib_module_names


@pytest.mark.gpu
def test_on_a_gpu_with_ncu_every_kernel_is_counted(tmp_path):
    import shutil

    if shutil.which("ncu") is None:
        pytest.skip("ncu is not on PATH")
    run("kernel_profile", "--workload", "gqa 32/8 b8 1k", "--out", str(tmp_path))
    assert all(row["status"] == "ok" for row in document(tmp_path, "kernel_profile")["rows"])


def test_a_file_that_is_not_of_ncu_is_a_sentence(tmp_path):
    for name, text, message in (
        (
            "table.csv",
            b'"a","b"\n"1","2"\n',
            "must be what ncu --csv --page raw prints, with columns ID and Kernel Name",
        ),
        ("comma.txt", b'"ID","Kernel Name","a__b.sum"\n"0","k","1,5"\n', "line 2 of what ncu printed, a__b.sum"),
    ):
        (tmp_path / name).write_bytes(text)
        _, errors = run("kernel_profile", "--smoke", "--read", str(tmp_path / name), "--out", str(tmp_path), status=2)
        assert f"{name}: " in errors and message in " ".join(errors.split()) and "Traceback" not in errors
