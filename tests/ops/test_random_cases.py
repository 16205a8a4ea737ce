"""Random decode cases, each by every kernel that serves it; a failure names the seed that makes the case again."""

import numpy as np
import pytest

import cupaged as pg
from tests.kit.cases import decode_case, random_shape, serving_kernels
from tests.kit.compare import assert_decode_matches_reference, to_numpy

ON_HOST = {"cases": 300, "specialisations": 24}  # every dtype with every head dimension
ON_GPU = {"cases": 2000, "specialisations": 160}


def check(seed, specialisations, backend):
    shape = random_shape(seed, specialisations)
    case, elsewhere = (decode_case(shape, backend, seed, placement) for placement in (seed, seed + 1))
    for kernel in serving_kernels(case):
        try:
            out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True, **case.variants)
            assert_decode_matches_reference(case, out, lse, kernel)
            if seed % 3 == 0:
                moved = pg.paged_attention(*elsewhere.arguments, kernel=kernel, **elsewhere.variants)
                same = np.array_equal(*(to_numpy(array).view(np.uint8) for array in (out, moved)))
                assert same, "the result depends on where blocks lie"
        except (AssertionError, pg.KernelLaunchError) as error:
            raise AssertionError(f"random_shape({seed}, {specialisations}), {shape}, by {kernel}: {error}") from error


@pytest.mark.parametrize("seed", range(ON_HOST["cases"]))
def test_a_random_case_on_the_host(seed):
    check(seed, ON_HOST["specialisations"], "host")


@pytest.mark.gpu
@pytest.mark.parametrize("hundred", range(ON_GPU["cases"] // 100))
def test_a_hundred_random_cases_on_the_gpu(hundred):
    for seed in range(hundred, ON_GPU["cases"], ON_GPU["cases"] // 100):  # which share what must be compiled
        check(seed, ON_GPU["specialisations"], "cuda")
