"""What ncu prints is read as it is written, and what stops ncu is a sentence."""

import os
import re
from pathlib import Path

import pytest

import cupaged as pg
from cupaged.bench.ncu import parse_ncu, run_ncu

SAMPLE = Path(__file__).resolve().parents[1] / "experiments" / "ncu_sample.txt"


def test_launches_are_read_in_order_in_base_units():
    launches = parse_ncu(SAMPLE.read_text(encoding="utf-8"))
    assert [launch.kernel for launch in launches] == [
        "paged_attention_v1", "plan_decode", "paged_attention_persistent", "plan_decode",
    ]  # fmt: skip
    first, plan = launches[:2]
    assert first.values["dram__bytes_read.sum"] == pytest.approx(1080e6)
    assert first.values["dram__bytes_write.sum"] == pytest.approx(524_290)
    assert first.values["gpu__time_duration.sum"] == pytest.approx(640e-6)
    assert first.values["l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"] == 48_000
    assert first.values["sm__warps_active.avg.pct_of_peak_sustained_active"] == 43.75
    assert "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum" not in plan.values, "n/a is no number"


@pytest.mark.parametrize(
    ("unit", "value"),
    [("byte", 3), ("Gbyte", 3e9), ("ns", 3e-9), ("nsecond", 3e-9), ("msecond", 3e-3), ("s", 3), ("%", 3), ("inst", 3),
     ("sector", 3), ("", 3), ("Gbyte/s", 3e9), ("byte/ns", 3e9), ("inst/cycle", 3), ("Mbyte/us", 3e12)],
)  # fmt: skip
def test_units(unit, value):
    text = f'"ID","Kernel Name","a__b.sum"\n"","","{unit}"\n"0","k(int)","3"\n'
    (launch,) = parse_ncu(text)
    assert launch.kernel == "k" and launch.values == {"a__b.sum": pytest.approx(value)}


HEADS = '"ID","Process ID","Kernel Name","a__b.sum"\n"","","","byte"\n'


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "noise",
    [
        '"hello"',
        '"a","b"',
        '"1","2","3"',
        '"x","y","z","4"',
        '"',
        '""',
        '"un","closed',
        '"' + "x" * 200_000,
        '"a"\r"b"',
        "n: 3",
    ],
)
def test_lines_of_the_program_that_begin_with_a_quote_are_its_own(noise, end):
    rows = '"0","4711","k(int)","3"\n"1","4711","l","4"\n'
    first, second = rows.splitlines(keepends=True)
    text = f"{noise}\n{HEADS}{noise}\n{first}{noise}\n{second}{noise}\n"
    launches = parse_ncu(text.replace("\n", end))
    assert [(launch.kernel, launch.values) for launch in launches] == [("k", {"a__b.sum": 3}), ("l", {"a__b.sum": 4})]


def test_heads_behind_a_line_without_an_end_are_found():
    (launch,) = parse_ncu(f'sum of "x" is 3{HEADS}"0","1","k","5"')
    assert launch.values == {"a__b.sum": 5}


def test_each_table_has_its_own_heads_and_units():
    """As of several processes, or of outputs put together."""
    text = (
        f'{HEADS}"0","1","k","3"\n'
        '"ID","Kernel Name","c__d.sum","a__b.sum"\n"","","us","Kbyte"\n"0","l","2,000","4"\n"1,024","m","1","n/a"\n'
        '"ID","Kernel Name","a__b.sum"\n"0","n","7"\n'
    )
    assert [(launch.kernel, launch.values) for launch in parse_ncu(text)] == [
        ("k", {"a__b.sum": 3}),
        ("l", {"c__d.sum": pytest.approx(2e-3), "a__b.sum": 4000}),
        ("m", {"c__d.sum": pytest.approx(1e-6)}),
        ("n", {"a__b.sum": 7}),
    ]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("k", "k"),
        ("k(int, float *)", "k"),
        ("void ns::k<(int)3, float>(const float *, int)", "void ns::k<(int)3, float>"),
        ("(anonymous namespace)::k(void (*)(int))", "(anonymous namespace)::k"),
        ('k<""a,b"">(int)', 'k<"a,b">'),
        ("k)", "k)"),
    ],
)
def test_names_of_kernels_hold_what_they_will(name, kernel):
    (launch,) = parse_ncu(f'{HEADS}"0","1","{name}","5"\n')
    assert launch.kernel == kernel and launch.values == {"a__b.sum": 5}


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("1,234,567", 1234567), ("1,234.5", 1234.5), ("-3", -3), ("1e3", 1000), ("2.", 2), (" 7 ", 7),
     (".5", 0.5), ("-.5", -0.5), ("+.5e3", 500), ("1.5E-3", 0.0015), ("0", 0), (".", None), ("-", None), ("e5", None),
     ("n/a", None), ("(!) n/a", None), ("", None), ("nan", None), ("-nan", None), ("inf", None), ("1e999", None),
     ("NVIDIA H100", None), ("(128, 1, 1)", None)],
)  # fmt: skip
def test_numbers(text, number):
    (launch,) = parse_ncu(f'{HEADS}"0","1","k","{text}"\n')
    assert launch.values == ({} if number is None else {"a__b.sum": number})


@pytest.mark.parametrize(
    "text",
    [
        "1,5",
        "1.234,5",
        "12,34",
        "1,2345",
        "1 234",
        "1'234",
        "1.2.3",
        "0x10",
        "-0x10",
        "1e",
        "1.5e+",
        "1_000",
        "3 %",
        "1.5K",
        ",5",
        "1,234,",
        "\u0663",
        "\u22123",
        "- 3",
        "1\u00a0234",
        "5;6",
    ],
)
def test_a_number_in_another_form_is_said(text):
    """As under a locale with decimal commas: read without its comma it would be another number."""
    got = re.escape(repr(text))
    with pytest.raises(ValueError, match=f"line 3 of what ncu printed, a__b.sum: expected a number .* got {got}"):
        parse_ncu(f'{HEADS}"0","1","k","{text}"\n')


@pytest.mark.parametrize(
    "row",
    ['"0","1","k(int)"', '"0","1","k(int)","3","4"', '"1024","1","k"', '"0","1","k(int', '"0","1","k","1","234"',
     '"","",""', '"","","","byte","byte"'],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_row_with_another_number_of_fields_is_said(row, end):
    """A launch that is left out would make the others pass for all there were; units left out, another unit."""
    got = len(row.split(","))
    with pytest.raises(ValueError, match=f"line 4 of what ncu printed: expected 4 fields as the heads, got {got}$"):
        parse_ncu(f"noise\n{HEADS}{row}{end}")


@pytest.mark.parametrize("name", ["a__b.sum", "ID", "Kernel Name"])
def test_a_column_that_comes_twice_is_said(name):
    with pytest.raises(ValueError, match=f"line 2 of what ncu printed: expected each column once, got {name} again"):
        parse_ncu(f'noise\n"ID","Kernel Name","a__b.sum","{name}"\n"","","byte","byte"\n"0","k","3","4"\n')


def test_a_column_that_is_not_read_may_come_twice():
    (launch,) = parse_ncu('"ID","Stream","Kernel Name","Stream","a__b.sum"\n"0","7","k","7","3"\n')
    assert launch.kernel == "k" and launch.values == {"a__b.sum": 3}


@pytest.mark.parametrize("text", [None, b'"ID"', 3, ["a"]])
def test_what_is_no_text_is_said(text):
    with pytest.raises(TypeError, match=f"text must be a string, got {type(text).__name__}"):
        parse_ncu(text)


def test_another_page_is_said():
    with pytest.raises(ValueError, match="must be what ncu --csv --page raw prints, with metrics as columns; got"):
        parse_ncu('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","k","a__b.sum","byte","3"\n')


def test_text_without_launches():
    assert parse_ncu("") == []
    assert parse_ncu('"hello"\n') == []
    assert parse_ncu("==PROF== nothing\n") == []
    assert parse_ncu('"ID","Kernel Name","a__b.sum"\n"","","%"\n') == []
    with pytest.raises(ValueError, match="columns ID and Kernel Name; got"):
        parse_ncu('"a","b"\n"1","2"\n')


def fake_ncu(folder, monkeypatch, body):
    path = folder / "ncu"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_missing_ncu_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pg.BackendUnavailableError, match="ncu, Nsight Compute's command line, is not on PATH"):
        run_ncu(("a",), ("k",), ("true",))


def test_ncu_is_told_what_to_count(monkeypatch, tmp_path):
    fake_ncu(tmp_path, monkeypatch, 'printf "%s\\n" "$@"')
    said = run_ncu(("a.sum", "b.sum"), ("k", "l"), ("program", "--flag")).split("\n")
    assert said[said.index("--metrics") + 1] == "a.sum,b.sum"
    assert said[said.index("--kernel-name") + 1] == "regex:^(k|l)$"
    assert said[said.index("--clock-control") + 1] == "none" and "--csv" in said
    assert said[-3:] == ["program", "--flag", ""]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", pg.BackendUnavailableError, "only administrators read"),
        ("echo '==ERROR== ERR_NVGPUCTRPERM'", pg.BackendUnavailableError, "only administrators read"),
        ("echo 'Failed to find metric x' >&2; exit 9", RuntimeError, "(?s)ncu failed:.*Failed to find metric x"),
    ],
)
def test_what_stops_ncu_is_said(monkeypatch, tmp_path, body, error, message):
    fake_ncu(tmp_path, monkeypatch, body)
    with pytest.raises(error, match=message):
        run_ncu(("a",), ("k",), ("true",))


def test_what_a_program_prints_need_not_be_utf_8(monkeypatch, tmp_path):
    fake_ncu(tmp_path, monkeypatch, "printf 'caf\\351\\n'")
    assert run_ncu(("a",), ("k",), ("true",)) == "caf\ufffd\n"


def test_an_ncu_that_does_not_end_is_said(monkeypatch, tmp_path):
    fake_ncu(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(RuntimeError, match="ncu failed: it had not ended after 0.2 s"):
        run_ncu(("a",), ("k",), ("true",), timeout=0.2)
