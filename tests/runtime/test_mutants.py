"""Mistakes that no single result need show: each is put into a kernel, and some test case fails."""

import re

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import host, kernels_folder, kernels_from
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.mutants import kernels_with
from tests.kit.prefill import PrefillShape, prefill_case

PERSISTENT, PREFILL = "attention/paged_attention_persistent.cu", "attention/paged_prefill.cu"
QUEUED = DecodeShape((1700, 1600, 1600, 1650), num_heads=2, num_kv_heads=2, head_dim=32)
IN_TURNS = DecodeShape((300, 290, 310) * 12, num_heads=2, num_kv_heads=2, head_dim=32)
IN_PARTS = DecodeShape((4000,), num_heads=9, num_kv_heads=1, head_dim=32)
PROMPTS = PrefillShape(DecodeShape((200, 130, 150), num_heads=4, num_kv_heads=2, head_dim=32), (190, 130, 100))
CHUNKS = PrefillShape(DecodeShape((900, 400, 700), num_heads=9, num_kv_heads=1, head_dim=32), (6, 4, 5))

# What touches memory that copies fill: wrong by one stage, or before they arrive, or while others still read.
COPIES = [
    (PERSISTENT, "const int used_stage = (used + STAGES - 1) % STAGES;", "const int used_stage = used % STAGES;"),
    (PERSISTENT, "wait_for_all_but(issued - used - 1);", "wait_for_all_but(issued - used);"),
    (PERSISTENT, "        fill_ring(STAGES);\n", "        fill_ring(STAGES + 1);\n"),
    (PREFILL, "Stage& room = memory.stage[(used + 1) % STAGES];", "Stage& room = memory.stage[used % STAGES];"),
    (PREFILL, "if (more) loader = start(next, used % STAGES);", "if (more) loader = start(next, (used + 1) % STAGES);"),
    (PREFILL, "if (t + 1 < end) start_copy(loader, t + 1, 1 - stage, end);",
     "if (t + 1 < end) start_copy(loader, t + 1, stage, end);"),
]  # fmt: skip
# Counters that must be 0 again after a launch.
COUNTERS = [
    (PERSISTENT, "gridDim.x + atomicInc(arrivals, count - 1)", "gridDim.x + atomicInc(arrivals, count)"),
    (PERSISTENT, "atomicInc(arrivals + 1 + piece.slot, others)", "atomicInc(arrivals + 1 + piece.slot, others + 1)"),
    (PREFILL, "gridDim.x + atomicInc(arrivals, total - 1)", "gridDim.x + atomicInc(arrivals, total)"),
    (PREFILL, "atomicInc(arrivals + 1 + first_part, others)", "atomicInc(arrivals + 1 + first_part, others + 1)"),
]  # fmt: skip
USES = 16  # of a plan: more than blocks on the host


def planned_calls(file):
    """Yield cases of a kernel, each with its plan and what attends."""
    if file == PERSISTENT:
        for shape in (QUEUED, IN_TURNS, IN_PARTS):
            case = decode_case(shape, "host")
            plan = pg.plan_decode(case.cache, case.seq_lens, shape.num_heads)
            yield case, plan, pg.paged_attention
    else:
        for shape in (PROMPTS, CHUNKS):
            case = prefill_case(shape, "host")
            lens, new = case.decode.seq_lens, sum(shape.new_tokens)
            plan = pg.plan_prefill(case.decode.cache, lens, case.query_start, new, shape.decode.num_heads)
            yield case, plan, pg.paged_prefill


def results(file, seeds):
    """Return the results of a kernel's cases over schedules; a row that is not written is NaN."""
    found = []
    for case, plan, attend in planned_calls(file):
        for seed in seeds:
            with host.schedule(seed):
                found.append(attend(*case.arguments, plan=plan, out=np.full_like(case.query, np.nan)))
    return found


@pytest.fixture(scope="module")
def right():
    """What the kernels give as they are: the same under every schedule."""
    found = {}
    for file in (PERSISTENT, PREFILL):
        found[file] = results(file, range(3))
        for first, *others in (found[file][i : i + 3] for i in range(0, len(found[file]), 3)):
            assert np.isfinite(first.astype(float)).all()
            for other in others:
                np.testing.assert_array_equal(first, other)
    return found


@pytest.mark.parametrize(("file", "text", "mutant"), COPIES, ids=lambda value: value.strip()[-40:])
def test_a_wrong_stage_or_wait_makes_a_result_wrong(right, tmp_path, file, text, mutant):
    with kernels_from(kernels_with(tmp_path, file, text, mutant)):
        found = results(file, range(3))
    assert any(not np.array_equal(*pair, equal_nan=True) for pair in zip(found, right[file], strict=True))


def leaves_counters_at_zero(file):
    """Whether every use of a plan writes all rows, alike, and leaves its counters at 0."""
    for case, plan, attend in planned_calls(file):
        first = None
        for _ in range(USES):
            out = attend(*case.arguments, plan=plan, out=np.full_like(case.query, np.nan))
            first = out if first is None else first
            if plan.arrivals.any() or not np.array_equal(out, first):
                return False
    return True


@pytest.mark.parametrize("file", [PERSISTENT, PREFILL])
def test_a_plan_may_be_used_over_and_over(file):
    assert leaves_counters_at_zero(file)


@pytest.mark.parametrize(("file", "text", "mutant"), COUNTERS, ids=lambda value: value.strip()[-40:])
def test_a_counter_that_does_not_return_to_zero_is_seen(tmp_path, file, text, mutant):
    with kernels_from(kernels_with(tmp_path, file, text, mutant)):
        assert not leaves_counters_at_zero(file)


@pytest.mark.parametrize("file", [PERSISTENT, PREFILL])
def test_a_fence_stands_on_either_side_of_each_arrival(file):
    """What a block wrote must be seen before it counts as arrived, and what others wrote only read after that.

    The host runs blocks whose stores all see at once, so only the text can show that a fence is missing.
    """
    lines = [line.split("//")[0].strip() for line in (kernels_folder() / file).read_text(encoding="utf-8").splitlines()]
    arrivals = [i for i, line in enumerate(lines) if re.match(r"exchange\.last = atomicInc\(arrivals \+ 1", line)]
    assert len(arrivals) == 1
    for i in arrivals:
        assert lines[i - 1] == lines[i + 1] == "fence_device();"
        before = next(line for line in lines[i - 2 :: -1] if line.startswith("__sync"))
        after = next(line for line in lines[i + 2 :] if line.startswith("__sync"))
        assert before == after == "__syncthreads();"
