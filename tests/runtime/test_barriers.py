"""Every barrier of paged_attention_v1 is needed, and a missing one is seen: without it, some test case fails."""

import re
import shutil

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import host, kernels_folder, kernels_from
from tests.kit.cases import DecodeShape, decode_case

FILES = (
    "attention/paged_attention_v1.cu",
    "include/reduce.cuh",
)
BARRIERS = [
    (file, match.start())
    for file in FILES
    for match in re.finditer(r"__syncthreads\(\);", (kernels_folder() / file).read_text(encoding="utf-8"))
]
SHAPES = [
    DecodeShape((300,), num_heads=2, num_kv_heads=1),
    DecodeShape((300,), num_heads=2, num_kv_heads=1, layout="BHDSX"),
    DecodeShape((9000,), num_heads=1, num_kv_heads=1),  # three stretches: logits are written over
]


def copy_without(tmp_path, file, position):
    copy = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    text = (copy / file).read_text(encoding="utf-8")
    changed = text[:position] + re.sub(r"__syncthreads\(\);", "", text[position:], count=1)
    assert changed != text
    (copy / file).write_text(changed, encoding="utf-8")
    return copy


def outcomes(shape):
    """Return the results over three schedules."""
    case = decode_case(shape, "host")
    results = []
    for seed in range(3):
        with host.schedule(seed):
            results.append(pg.paged_attention(*case.arguments, kernel="paged_attention_v1"))
    return results


def test_there_are_barriers_to_remove():
    assert len(BARRIERS) == 3


@pytest.mark.parametrize(("file", "position"), BARRIERS, ids=lambda value: str(value).split("/")[-1])
def test_without_it_a_result_is_wrong(tmp_path, file, position):
    expected = {shape: outcomes(shape) for shape in SHAPES}
    with kernels_from(copy_without(tmp_path, file, position)):
        wrong = sum(
            not np.array_equal(actual, right, equal_nan=True)
            for shape in SHAPES
            for actual, right in zip(outcomes(shape), expected[shape], strict=True)
        )
    assert wrong > 0
