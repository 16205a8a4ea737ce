"""What the README shows is what was measured, and its examples run."""

import json
import math
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README.replace("\n", " ")
LADDER = (ROOT / "kernels_cu" / "README.md").read_text(encoding="utf-8")
LADDER_TEXT = " ".join(LADDER.split())
RESULTS = ROOT / "experiments" / "results" / "h100-80gb-hbm3"
CPU_RESULTS = ROOT / "experiments" / "results" / "cpu"
PLAIN = ("BSHD", "BHSD", "HBSD", "BS2HD")


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_layouts_use_of_the_bytes_they_fetch_is_what_the_table_says():
    document = json.loads((CPU_RESULTS / "layouts.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    assert len(rows) == 360 and all(row["status"] == "ok" for row in rows) and "all 360 cells" in TEXT
    used = defaultdict(list)  # in half precision, by a thread block
    for row in rows:
        if row["dtype"] != "float32":
            used[row["head_dim"], row["layout"], row["block_size"] > 1].append(row["used_fraction_per_block"])
    plain = [used[dim, name, many] for dim in (64, 128) for name in PLAIN for many in (False, True)]
    assert min(map(min, plain)) == 1 and "at D = 64 and 128 the four plain layouts use every byte" in TEXT
    assert {round(value, 2) for many in (False, True) for value in used[72, "BSHD", many]} == {0.9}
    assert min(used[72, "BHSD", True] + used[72, "HBSD", True]) >= 0.98
    assert "uses 90 % in BSHD, and 98 % or more in BHSD and HBSD" in TEXT
    half = [row for row in rows if row["dtype"] != "float32"]
    packed = [row["used_fraction"] for row in half if (row["layout"], row["block_size"]) == ("BHDSX", 7)]
    assert f"uses {100 * min(packed):.0f} to {100 * max(packed):.0f} % of what single requests fetch" in TEXT


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_how_much_the_layout_matters_on_a_gpu():
    rows = result("layouts")["rows"]
    assert len(rows) == 450 and all(row["status"] == "ok" for row in rows) and "all 450 cells" in README
    figures = defaultdict(dict)
    for row in rows:
        cell = row["head_dim"], row["dtype"], row["block_size"], row["placement"]
        figures[cell][row["layout"]] = row["of_ceiling"]
    assert sum(cell[0] == 128 for cell in figures) == 30
    for dims, blocks, said in (
        ((64, 128), (1, 7, 16, 64, 256), "at most {:.0f} % less than the fastest in all 30"),
        ((72,), (7, 16, 64, 256), "whose rows are no whole sectors, {:.0f} %, and"),
        ((72,), (1,), "and {:.0f} % where a block holds a single token"),
    ):
        cells = [cell for cell in figures if cell[0] in dims and cell[2] in blocks]
        plain = [[figures[cell][name] for name in PLAIN] for cell in cells]
        assert said.format(100 * max(1 - min(some) / max(some) for some in plain)) in TEXT
    packed = {
        block: statistics.median(
            some["BHDSX"] / max(some[name] for name in PLAIN) for cell, some in figures.items() if cell[2] == block
        )
        for block in (1, 7, 16, 64, 256)
    }
    assert all(abs(packed[block] - 1) < 0.01 for block in (1, 16))
    assert "in the median within a hundredth of the best at block sizes 1 and 16" in TEXT
    behind = [100 * packed[block] for block in (7, 64, 256)]
    assert f"at 7, 64 and 256 it reaches {min(behind):.0f} to {max(behind):.0f} %." in TEXT


def test_what_textures_do_is_what_was_measured():
    document = result("texture_vs_global")
    assert all(row["verdict"].startswith("does not hold") for row in document["verdicts"])
    cycles = {(row["path"], row["level"]): row["cycles"] for row in document["rows"]
              if row["part"] == "latency" and row["order"] == "random"}  # fmt: skip
    more = [value - cycles["plain", level] for (path, level), value in cycles.items() if path.startswith("tex")]
    assert f"takes {min(more):.0f} to {max(more):.0f} cycles more" in README
    attention = re.search(r"([\d.]+) \(attention\)", document["verdicts"][0]["measured"]).group(1)
    assert attention == "1.00" and "textures [at best as fast]" in README


def test_the_ledgers_head_is_the_ledgers():
    rows = result("claims")["rows"]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in {row["verdict"] for row in rows}}
    said = f"{counts['holds']} hold, {counts['holds partly']} hold partly, {counts['does not hold']} do not"
    assert f"of {len(rows)} claims {said}" in TEXT
    head = README[README.index("| claim | measured | verdict |") :].split("\n\n")[0].splitlines()[2:]
    verdicts = {row["statement"]: row for row in rows}
    for line in head:
        statement, measured, verdict = (part.strip() for part in line.strip("|").split("|"))
        (row,) = (row for text, row in verdicts.items() if text.startswith(statement.split(" reaches")[0]))
        assert row["verdict"] == verdict
        for figure in re.findall(r"\d+\.\d+", measured):
            assert figure in row["measured"]


def test_operations_and_prompts_run_as_fast_as_it_says():
    timed = [row for row in result("cache_ops")["rows"] if "of_ceiling" in row and row["mb"] >= 64]
    moved = [row["of_ceiling"] for row in timed if row["operation"] in ("append", "copy", "gather", "scatter")]
    assert f"run at {100 * min(moved):.0f} to {100 * max(moved):.0f} % of" in TEXT
    swaps = [row for row in timed if row["operation"].startswith("swap")]
    busy = [100 * row["of_ceiling"] for row in swaps]
    assert f"Swapping reaches {min(busy):.0f} to {max(busy):.0f} % of one pinned copy's from 64 MB on" in TEXT
    idle = defaultdict(list)
    for row in swaps:
        idle[round(row["mb"])].append(100 * row["from_idle_of_ceiling"])
    large, small = (f"{min(idle[mb]):.0f} to {max(idle[mb]):.0f} % at {mb} MB" for mb in (256, 64))
    assert f"where the time of the CPU that starts it counts, {large} and {small}." in TEXT
    ours = {row["workload"]: row for row in result("prefill")["rows"] if row["peer"] == "cupaged"}
    long = [row["tflop_s"] for name, row in ours.items() if not name.startswith("spec") and not name.endswith("mha")]
    assert f"{min(long):.0f} to {max(long):.0f} TFLOP/s on long ones" in TEXT
    assert f"{100 * ours['spec 64x4 over 4k']['of_ceiling']:.0f} % of the read ceiling on speculative" in TEXT


def test_when_a_sequence_is_sooner_swapped():
    rows = result("swap_or_recompute")["rows"]
    quicker = defaultdict(list)
    for row in rows:
        cell = row["block_size"], row["tokens"]
        quicker[row["host_blocks"]] += [cell] if row["out_ms"] + row["in_ms"] < row["recompute_ms"] else []
    near, far = quicker["neighbours"], quicker["scattered"]
    cells = sum(row["host_blocks"] == "neighbours" for row in rows)
    assert f"in {len(near)} of {cells} cells" in TEXT
    lengths = sorted({row["tokens"] for row in rows})
    assert lengths[0] == 128 and lengths[-1] == 2048
    assert {size for size, tokens in far if tokens == 128} >= {8, 16}
    assert not [size for size, tokens in far if size <= 16 and tokens >= 512]
    sizes = sorted({row["block_size"] for row in rows if row["block_size"] >= 64})
    assert {cell for cell in far if cell[0] >= 64} == {(size, tokens) for size in sizes for tokens in lengths}
    assert (32, 2048) not in far
    said = "scattered blocks of 16 and less lose from 512 tokens on, those of 64 and more win at every length"
    assert said in TEXT


def test_what_variants_cost():
    cost = {(row["kernel"], row["variant"]): 100 * row["cost"] for row in result("variants")["rows"] if "cost" in row}
    soft_cap = cost.pop(("paged_attention_v2", "soft cap"))
    assert f"v2 pays {soft_cap:.0f} % for a soft cap, and nothing else costs v1 or v2 anything" in TEXT
    assert max(value for (name, _), value in cost.items() if name[-2:] in ("v1", "v2")) < 0.5
    fastest = {variant: value for (name, variant), value in cost.items() if name.endswith("persistent")}
    assert f"but {fastest.pop('window'):.0f} % for a window of 1024 over 32k" in TEXT
    assert max(fastest.values()) < 0.5 and "the fastest kernel [nothing that can be told from noise]" in TEXT


def test_what_paging_costs():
    rows = result("paging_overhead")["rows"]
    assert all(row["status"] == "ok" for row in rows)
    fastest = [row for row in rows if row["kernel"] == "paged_attention_persistent"]
    anywhere = {row["block_size"]: 100 * row["overhead"] for row in fastest if row["way"] == "random"}
    said = f"{anywhere[16]:.1f} % of the fastest kernel's time at block size 16, {max(anywhere.values()):.1f} % at most"
    assert said in TEXT
    in_order = max(100 * row["overhead"] for row in fastest if row["way"] == "in order")
    assert f"where they lie in order, {in_order:.1f} % at most" in TEXT


def test_prompts_beside_peers_run_as_it_says():
    rows = result("prefill")["rows"]
    assert all(row["status"] == "ok" for row in rows)
    ratios = defaultdict(dict)
    for row in rows:
        ratios[row["peer"]][row["workload"]] = row["ratio"]
    (few,) = (row for row in rows if row["peer"] == "cupaged, planned as prefill")
    assert f"planned as decode ({100 * few['of_ceiling']:.0f} % as prefill)" in TEXT

    def spread(peer, *names):
        found = [ratio for name, ratio in ratios[peer].items() if name in names]
        return f"{min(found):.2f} to {max(found):.2f}"

    long, short = ("prefill 4x4096", "prefill 1x16384", "chunk 8x512 over 8k"), "prefill 16x512 mha"
    assert f"FlashInfer's fa2 takes {spread('FlashInfer, fa2', *long)} times as long on long ones" in TEXT
    assert f"{ratios['FlashInfer, fa2'][short]:.2f} times on many short ones" in TEXT
    assert f"{ratios['FlashInfer, fa2'][few['workload']]:.2f} times on speculative tokens" in TEXT
    assert f"in one piece, {spread('SDPA, flash', *long, short)} times." in TEXT
    assert f"FlashInfer's fa3 {spread('FlashInfer, fa3', *long, short)} times as long" in TEXT
    cudnn = spread("SDPA, cuDNN", long[0], long[1], short)
    assert f"cuDNN's on one piece {cudnn}, but {ratios['SDPA, cuDNN'][long[2]]:.2f} on chunks" in TEXT


def test_a_call_costs_what_it_says():
    rows = {row["call"]: row for row in result("call_overhead")["rows"]}
    over = {name: row["over_bare_us"] for name, row in rows.items()}
    assert f"CuPy takes {rows['bare launch']['cpu_us']:.1f} us to launch" in TEXT
    assert f"has its plan takes {over['planned']:.1f} us more" in TEXT
    assert f"lie ready for the driver, {-over['prepared']:.1f} us less" in TEXT
    assert f"plan for itself takes {over['unplanned']:.0f} us more" in TEXT


def test_the_profile_says_what_it_says():
    (row,) = (row for row in result("kernel_profile")["rows"] if row["kernel"] == "paged_attention_persistent")
    assert (
        f"{row['dram_percent_of_peak']:.0f} % of the peak of the memory [with {row['achieved_occupancy']:.0f} %"
        in README
    )


def test_decode_comes_as_close_to_the_memory_as_it_says():
    rows = result("decode")["rows"]
    fastest = [row for row in rows if row["kernel"] == "paged_attention_persistent"]
    large = [100 * row["of_ceiling"] for row in fastest if row["kv_mb"] > 200]
    assert f"reads at {min(large):.0f} to {max(large):.0f} % of the read ceiling on every workload above" in TEXT
    small = {round(row["kv_mb"]): f"{100 * row['of_ceiling']:.0f} %" for row in fastest if row["kv_mb"] < 200}
    assert sorted(small) == [34, 134]
    assert f"at {small[134]} on one of 134 MB and at {small[34]} on one of 34 MB" in TEXT
    longer = [100 * (row["apart_us"] / row["time_us"] - 1) for row in fastest]
    assert f"calls take {min(longer):.0f} to {max(longer):.0f} % longer" in TEXT


def test_the_model_serves_as_many_as_it_says():
    served = result("serving")
    assert served["model"] == "random weights of SmolLM2-135M's shape" and "random weights in this run" in TEXT
    assert all(row["status"] == "ok" for row in served["rows"])
    for way, form in (
        ("paged", "[{:.1f} to {:.1f} times]"),
        ("paged, prefixes shared", "{:.1f} to {:.1f} times where"),
    ):
        gains = [row["at_once_gain"] for row in served["rows"] if row["way"] == way]
        assert form.format(min(gains), max(gains)) in TEXT
    faster = [row["throughput_gain"] for row in served["rows"] if row["way"] != "contiguous"]
    assert f"at {min(faster):.1f} to {max(faster):.1f} times the throughput" in TEXT
    step = {row["way"]: row["ms"] for row in result("model_step")["rows"]}
    quickest = min(ms for way, ms in step.items() if way.startswith("transformers"))
    assert f"takes [{step['one graph']:.2f} ms]" in TEXT
    assert f"{step['launched one by one']:.1f} ms launched one by one, and {quickest:.1f} ms or more by trans" in TEXT


def test_the_recorder_agrees_with_nsight_compute():
    document = json.loads((RESULTS / "traffic_agreement.json").read_text(encoding="utf-8"))
    assert len(document["rows"]) == 20 and "all 20\nlaunches" in README
    for row in document["rows"]:
        assert row["host_requests"] == row["gpu_requests"]
        assert row["host_sectors"] == row["gpu_sectors"]


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    answer = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    error, *lines = answer.stdout.splitlines()
    assert float(error) < 1e-3
    assert any(line.startswith("key_cache paged_attention_") for line in lines)


def test_the_second_command_is_what_ci_runs():
    assert ".venv/bin/python -m pytest -n auto" in README
    assert ".venv/bin/python -m pytest -n auto" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_ladder_shows_what_was_measured():
    rows = json.loads((RESULTS / "decode.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 64 and all(row["status"] == "ok" for row in rows)
    (heads,) = (line.split(" | ") for line in LADDER.splitlines() if line.startswith("| workload (H/Hkv"))
    ladder, showed = LADDER.split("What each rung showed")
    speed = {(row["kernel"].removeprefix("paged_attention_"), row["workload"]): row["gb_s"] for row in rows}
    one, long = (speed["v2", name] / speed["v1", name] for name in ("gqa 32/8 b1 128k", "gqa 32/8 b32 one long"))
    said = f"worth a factor of {one:.0f} on one sequence of 128k, and of {long:.0f} on one long among short ones"
    assert said in " ".join(showed.split())
    for row in rows:
        (line,) = (line for line in ladder.splitlines() if line.startswith(f"| {row['workload']} |"))
        place = [head.strip(" |") for head in heads].index(row["kernel"].removeprefix("paged_attention_"))
        assert line.split(" | ")[place].strip(" |") == f"{row['gb_s']:.0f} ({100 * row['of_ceiling']:.0f} %)"


def test_the_comparison_with_peers_is_what_was_measured():
    table = LADDER.split("Beside its peers")[1]
    best = defaultdict(dict)  # by workload and family
    for row in json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))["rows"]:
        assert row["status"] == "ok" or row["family"] == "SDPA"
        known = best[row["workload"]].get(row["family"])
        if row["status"] == "ok" and (known is None or row["time_us"] < known["time_us"]):
            best[row["workload"]][row["family"]] = row
    assert len(best) == 8
    for name, of in best.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        shown = [f"{of['cupaged']['gb_s']:.0f}", f"{of['FlashInfer']['ratio']:.2f}"]
        shown.append(f"{of['SDPA']['ratio']:.2f}" if "SDPA" in of else "–")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [cells[1], *cells[4:]] == shown
    flashinfer = [of["FlashInfer"]["ratio"] for of in best.values()]
    mean = math.exp(sum(map(math.log, flashinfer)) / len(flashinfer))
    assert f"by {100 * (min(flashinfer) - 1):.0f} to {100 * (max(flashinfer) - 1):.0f} %" in TEXT
    assert f"in the geometric mean by {100 * (mean - 1):.0f} %" in TEXT
    contiguous = [of["SDPA"]["ratio"] for of in best.values() if "SDPA" in of]
    said = f"by {100 * (min(contiguous) - 1):.0f} to {100 * (max(contiguous) - 1):.0f} % faster than PyTorch's"
    assert said in TEXT


def test_more_shapes_beside_peers_are_what_was_measured():
    least = defaultdict(dict)  # of a family's times over ours, by workload
    for row in result("peers_all_shapes")["rows"]:
        if row["status"] == "ok":
            of = least[row["family"]]
            of[row["workload"]] = min(of.get(row["workload"], math.inf), row.get("ratio", 1.0))
    assert len(least["cupaged"]) == 27
    ratios = {family: sorted(of.values()) for family, of in least.items()}
    mean = math.exp(sum(map(math.log, ratios["FlashInfer"])) / 27)
    low, high = ratios["FlashInfer"][0], ratios["FlashInfer"][-1]
    assert f"[27 workloads of more shapes](kernels_cu/README.md) FlashInfer takes {low:.2f} to {high:.2f} times" in TEXT
    assert f"FlashInfer takes {low:.2f} to {high:.2f} times as long, in the geometric mean {mean:.2f}" in LADDER_TEXT
    for dim in ("D 64", "D 256"):
        mine = [ratio for name, ratio in least["SDPA"].items() if dim in name]
        assert f"{min(mine):.2f} to {max(mine):.2f} times at {dim.replace(' ', ' = ')}" in LADDER_TEXT
    assert min(ratio for name, ratio in least["SDPA"].items() if "D 64" not in name and "D 256" not in name) > 1
    assert low > 0.99
    assert [name for name, ratio in least["FlashInfer"].items() if ratio < 1.01] == ["group 1, D 256, b16 4k"]


def test_half_precision_of_either_kind_takes_as_long():
    ours = [
        {row["workload"]: row["time_us"] for row in result(name)["rows"] if row["family"] == "cupaged"}
        for name in ("peers", "peers_float16")
    ]
    differ = [abs(ours[1][name] / taken - 1) for name, taken in ours[0].items()]
    assert len(differ) == 8 and "In float16 `persistent` takes" in LADDER_TEXT
    assert f"as in bfloat16, within {100 * max(differ):.1f} %." in LADDER_TEXT


def test_with_another_kernel_between_calls_take_as_much_longer_as_it_says():
    rows = [row for row in result("decode")["rows"] if "apart_us" in row]
    longer = [row["apart_us"] - row["time_us"] for row in rows]
    assert f"takes {min(longer):.0f} to {max(longer):.0f} us longer" in LADDER_TEXT
    smallest = min(rows, key=lambda row: row["kv_mb"])
    others = [row["apart_us"] / row["time_us"] - 1 for row in rows if row is not smallest]
    share = smallest["apart_us"] / smallest["time_us"] - 1
    assert f"{100 * share:.0f} % of the smallest call, at most {100 * max(others):.0f} % of others" in LADDER_TEXT
    parts = {row["workload"]: f"{100 * row['of_ceiling']:.1f}" for row in rows}
    assert f"read at {parts['gqa 32/8 b1 128k']} and {parts['gqa 32/8 b32 one long']} %" in LADDER_TEXT


def test_the_table_of_prefill_is_what_was_measured():
    table = LADDER.split("## Prefill")[1]
    rows = [row for row in result("prefill")["rows"] if row["peer"] != "cupaged, planned as prefill"]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    peers = ("cupaged", "FlashInfer, fa2", "FlashInfer, fa3", "SDPA, flash", "SDPA, cuDNN")
    speeds = {(row["workload"], row["peer"]): f"{row['tflop_s']:.0f}" for row in rows}
    for name in names:
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [speeds[name, peer] for peer in peers]
