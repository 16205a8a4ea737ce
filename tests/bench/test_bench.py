"""Error budgets, workloads and reports."""

import csv
import json
from time import sleep

import numpy as np
import pytest

import cupaged as pg
from cupaged.bench import report, timing
from cupaged.bench.accuracy import decode_budget, decode_check, verdict_on
from cupaged.bench.roofline import draw_roofline
from cupaged.bench.traffic import cache_traffic
from cupaged.bench.workload import WORKLOADS, DecodeStep, decode_call, decode_workload, lognormal


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
    assert half.lse.max() < 1e-4


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


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "wrap",
    [
        float,
        np.float32,
        np.float16,
        lambda x: [1.0, x],
        lambda x: (x,),
        lambda x: {"of": {"a": x}},
        lambda x: np.array([0, x]),
    ],
)
def test_a_number_that_is_none_is_never_written(wrap, number, tmp_path):
    stamp = {"backend": "host"}
    rows = [{"kernel": "a", "time_us": 1.0}, {"kernel": "b", "time_us": wrap(number)}]
    with pytest.raises(
        ValueError, match=f"trial, row 2, column 'time_us'.*: expected a finite number or None, got {number}"
    ):
        report.write_results(rows, stamp, "trial", tmp_path / "new")
    with pytest.raises(ValueError, match=f"trial, ceiling.*: expected a finite number or None, got {number}"):
        report.write_results(rows[:1], stamp, "trial", tmp_path / "new", ceiling=wrap(number))
    with pytest.raises(TypeError, match="trial, row 1, column 'a': a result holds complex"):
        report.write_results([{"a": 1j}], stamp, "trial", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_csv_and_json_hold_the_same(tmp_path):
    rows = [
        {"a": np.float32(0.1), "b": np.int8(3), "c": None, "d": np.bool_(True), "e": np.arange(2), "f": tmp_path},
        {"a": float(np.float32(0.1)), "b": 3, "c": '\udce9 é, "x"', "d": True, "e": [0, 1], "f": str(tmp_path)},
    ]
    report.write_results(rows, {"backend": "host"}, "trial", tmp_path, pair=(np.float64(1), np.int64(2)))
    document = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    assert document["pair"] == [1.0, 2]
    assert document["rows"] == [{**rows[1], "c": None}, rows[1]]
    with open(tmp_path / "trial.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {**second, "c": ""}
    assert second == {key: str(value) for key, value in rows[1].items() if key != "c"} | {"c": '\\udce9 é, "x"'}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"status": "ok", "time_us": 3.0, "gb_s": np.nan}, "failed: gb_s is nan"),
        ({"time_us": np.float32("inf"), "values": [1.0, -np.inf]}, "failed: time_us is inf, values is -inf"),
        ({"counts": {"a": np.array([0.5, np.nan])}}, "failed: counts is nan"),
    ],
)
@pytest.mark.parametrize("errors", [(), (ValueError,)])
def test_a_row_with_a_number_that_is_none_has_failed(found, status, errors, tmp_path):
    row = report.measured_row({"kernel": "a"}, lambda: found, errors)
    assert row == {"kernel": "a", "status": status}
    report.write_results([row], {"backend": "host"}, "trial", tmp_path)


def test_nothing_to_divide_by_is_none():
    assert report.ratio(0, 0) is None and report.ratio(3, 0.0) is None
    assert report.ratio(3, 4) == 0.75 and report.ratio(0, 4) == 0


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, ("1", "30"), ("0", "-3", "1.5", "x", "", "9" * 5000)),
        (float, ("1e-9", "2"), ("0", "-1", "nan", "inf", "x")),
    ],
)
def test_arguments_are_above_zero(kind, right, wrong, capsys):
    parser = report.argument_parser("?")
    parser.add_argument("--size", type=report.positive(kind))
    for text in right:
        assert parser.parse_args([f"--size={text}"]).size == kind(text)
    for text in wrong:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--size={text}"])
        assert f"argument --size: expected a {'whole' if kind is int else 'finite'} number" in capsys.readouterr().err


def test_a_table_shows_what_it_holds(capsys, monkeypatch):
    """Brackets are no markup here, and colons no emoji."""
    monkeypatch.setattr(report.console, "_width", 200)
    hostile = "[num_seqs, H] [/red] [bold] decode.cu:100: x\\"
    report.print_table([{"a": hostile, "b": None, "c": 0.25}], {"a": hostile, "b": "b", "c": "c|.1%"}, hostile)
    report.console.print(hostile)
    printed = capsys.readouterr().out
    assert printed.count(hostile) == 4 and "25.0%" in printed and "–" in printed


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

    from cupaged.bench.timing import capture, copies_for_cold_l2, time_graph

    small, large = (cupy.zeros(n, dtype=cupy.float32) for n in (1 << 20, 1 << 26))
    short, long = (time_graph([lambda a=a: cupy.add(a, 1, out=a)]) for a in (small, large))
    assert 0 < short.median_us < long.median_us
    replay = capture([lambda: cupy.add(small, 1, out=small)])
    assert replay.calls > 8 and replay.elapsed_us() > 500  # so that the graph's own launch hardly counts
    assert copies_for_cold_l2(1 << 33) == 1
    assert copies_for_cold_l2(1 << 20) > 50
    ahead = [copies_for_cold_l2(mb << 20, fetched_ahead=True) for mb in (8192, 300, 32, 1)]
    assert ahead[0] == 2 < ahead[1] <= ahead[2] == 16 and ahead[3] > 50


@pytest.mark.gpu
def test_what_python_is_slow_to_launch_is_timed_over_as_long():
    import cupy

    numbers = cupy.zeros(1 << 20, dtype=cupy.float32)

    def slow_to_launch():
        sleep(0.001)
        cupy.add(numbers, 1, out=numbers)

    assert timing.capture([slow_to_launch]).elapsed_us() > 2500


@pytest.mark.gpu
def test_behind_work_the_time_of_the_cpu_does_not_count():
    import cupy

    numbers = cupy.zeros(1 << 26, dtype=cupy.float32)

    def add():
        cupy.add(numbers, 1, out=numbers)

    def slow_to_ask():
        add()
        sleep(0.02)
        add()

    once, twice = timing.time_behind_work([add, slow_to_ask], repeats=5, warm_ups=1)
    assert 1.8 < twice / once < 2.2


@pytest.mark.gpu
def test_a_call_that_waits_for_what_is_held_is_told_so(monkeypatch):
    import cupy

    monkeypatch.setattr(timing, "HELD_S", 0.05)
    with pytest.raises(RuntimeError, match=r"must not wait for the GPU; this one had not returned after 0\.05 s"):
        timing.time_behind_work([lambda: cupy.cuda.get_current_stream().synchronize()], repeats=1, warm_ups=0)


@pytest.mark.parametrize("contenders", [1, 2, 3])
def test_contenders_are_replayed_in_turns_and_each_is_first_as_often(contenders):
    from cupaged.bench.timing import time_in_turns

    asked = []

    class Replayed:
        calls, slow = 4, False

        def __init__(self, name):
            self.name = name

        def elapsed_us(self):
            asked.append(self.name)
            return 100.0 * (self.name + 1)

    timings = time_in_turns([Replayed(name) for name in range(contenders)], repeats=7)
    rounds = np.array(asked).reshape(-1, contenders)[3:]
    assert len(rounds) >= 7
    assert np.bincount(rounds[:, 0]).tolist() == [len(rounds) // contenders] * contenders
    assert (np.sort(rounds, axis=1) == np.arange(contenders)).all()
    assert [timing.median_us for timing in timings] == [25.0 * (name + 1) for name in range(contenders)]


def test_the_workloads_name_what_they_are():
    """The names say heads, batch and context; the rest is what the field measures: D = 128, block size 16."""
    assert len({step.name for step in WORKLOADS}) == len(WORKLOADS) == 8
    for step in WORKLOADS:
        heads, batch = step.name.split()[1:3]
        if batch.startswith("b"):
            assert heads == f"{step.num_heads}/{step.num_kv_heads}" and len(step.seq_lens) == int(batch[1:])
        assert (step.head_dim, step.block_size, step.dtype) == (128, 16, "bfloat16")
    assert lognormal(64, 8192) == lognormal(64, 8192) and max(lognormal(500, 900)) == 900


@pytest.mark.parametrize("kernel", ["auto", "paged_attention_v1", "paged_attention_persistent"])
def test_a_call_is_made_ready_once_and_right_every_time(kernel):
    work = DecodeStep("small", 4, 2, (50, 33), head_dim=64).build("host")
    out = np.full_like(work.query, np.nan)
    call = decode_call(work, kernel, out)
    for _ in range(2):
        out[...] = np.nan
        call()
        assert decode_check(out, *work.arguments, kernel) <= 1
    assert work.flop == 4 * 4 * 64 * 83
    assert work.kv_bytes == 83 * 2 * 2 * 64 * 2


def test_the_caller_can_say_that_weights_are_rounded():
    """A tensor-core kernel's result keeps the budget of its kind, whatever the toolkit would choose."""
    arguments = decode_workload((500, 33), 4, 2, 64, 16, dtype="bfloat16", backend="host").arguments
    plain, rounded = (decode_budget(*arguments, rounds_weights=value) for value in (False, True))
    assert (rounded.out >= plain.out).all() and rounded.out.max() > plain.out.max()
    np.testing.assert_array_equal(rounded.out, decode_budget(*arguments, "paged_attention_persistent").out)


def test_a_measurement_that_fails_is_a_row():
    def broken():
        raise MemoryError("out of\n  memory")

    assert report.measured_row({"kernel": "a"}, lambda: {"time_us": 3.0}) == {"kernel": "a", "time_us": 3.0}
    assert report.measured_row({"kernel": "a"}, broken) == {"kernel": "a", "status": "failed: out of memory"}
    with pytest.raises(ZeroDivisionError):
        report.measured_row({}, lambda: {"time_us": 1 / 0})
    assert verdict_on(0.5) == {"status": "ok", "error_of_budget": 0.5}
    assert verdict_on(np.inf) == {"status": "wrong: error is inf times the budget", "error_of_budget": None}


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ("refused at /home/someone/.cache/jit-1/decode.cu:63: group_size: 5", "refused at decode.cu:63: group_size: 5"),
        ("'/opt/x/libcuda.so.1' is missing", "'libcuda.so.1' is missing"),
        ("see https://example.org/a/b and 32/8 heads, a/b/c", "see https://example.org/a/b and 32/8 heads, a/b/c"),
    ],
)
def test_a_machines_folders_stay_out_of_results(message, left):
    def broken():
        raise RuntimeError(message)

    assert report.measured_row({}, broken) == {"status": f"failed: {left}"}


def test_the_roofline_draws_what_went_well(tmp_path):
    row = {"kernel": "a", "workload": "b", "status": "ok", "flop_per_byte": 4.0, "gflop_s": 9000.0}
    path = tmp_path / "roof.png"
    assert not draw_roofline([{**row, "status": "failed: no memory"}], 3000.0, "t", path) and not path.exists()
    assert draw_roofline([row, {**row, "kernel": "c"}, {"kernel": "d", "status": "failed: x"}], 3000.0, "t", path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.gpu
def test_the_copy_ceiling_is_plausible():
    from cupaged.bench.ceilings import copy_ceiling

    assert 100 < copy_ceiling(1 << 28) < 20_000


@pytest.mark.gpu
def test_a_call_that_fails_under_capture_leaves_the_gpu_usable():
    import cupy

    from cupaged.bench.timing import time_graph, time_launches

    array = cupy.zeros(1 << 20, dtype=cupy.float32)
    calls = []

    def fails_when_captured():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("not under capture")

    with pytest.raises(RuntimeError, match="not under capture"):
        time_graph([fails_when_captured])
    assert time_launches([lambda: cupy.add(array, 1, out=array)]).median_us > 0
    assert time_graph([lambda: cupy.add(array, 1, out=array)]).median_us > 0


@pytest.mark.parametrize("wrong", [0, 3])
def test_a_workload_is_checked_by_its_longest_sequence_and_its_last(wrong):
    work = decode_workload((90, 5, 7, 33), 4, 2, 64, 16, backend="host")
    out = pg.paged_attention(*work.arguments)
    assert 0 < work.error_of(out) <= 1 and 0 < work.error_of(out, only_longest=True) <= 1
    worse = out.copy()
    worse[wrong] += 1
    assert work.error_of(worse) > 1
    assert (work.error_of(worse, only_longest=True) > 1) == (wrong == 0)


def test_a_number_that_is_none_is_seen_in_any_sequence():
    work = decode_workload((90, 5, 33), 4, 2, 64, 16, backend="host")
    out = pg.paged_attention(*work.arguments)
    out[1, 0, 0] = np.nan
    assert work.error_of(out) == np.inf


@pytest.mark.parametrize(("seconds", "calls"), [(0.001, 2 + 5), (0.02, 2 + 3)])
def test_what_is_slow_is_called_less_often(seconds, calls, monkeypatch):
    clock, made = [0.0], []

    def wait():
        clock[0] += seconds * (len(made) > waited[0])
        waited[0] = len(made)

    waited = [0]
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    taken = timing.time_until_done(lambda: made.append(1), wait, repeats=5, warm_ups=2, repeats_of_slow=3)
    assert taken == pytest.approx(seconds) and len(made) == calls


def test_what_slows_the_machine_slows_all_contenders(monkeypatch):
    clock, made = [0.0], []
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        made.append(name)
        clock[0] += seconds * (10 if len(made) in range(9, 13) else 1)  # two of seven rounds

    contenders = [(lambda: call("a", 1.0), lambda: None), (lambda: call("b", 3.0), lambda: None)]
    taken = timing.time_until_done_in_turns(contenders, repeats=5, warm_ups=2)
    assert taken == pytest.approx([1.0, 3.0])
    assert made == 7 * ["a", "b"]
