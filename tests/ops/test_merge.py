"""Parts of attention merge into the whole, by their log-sum-exps, on both backends."""

import ml_dtypes
import numpy as np
import pytest

import cupaged as pg
from cupaged.bench.accuracy import decode_budget, merge_budget
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_merge_matches_reference, to_numpy

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


def random_parts(xp, shape, dtype, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal(shape).astype(dtype)
    lses = (spread * rng.standard_normal(shape[:-1])).astype(np.float32)
    return outs, lses


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(1, 5, 64), (2, 3, 4, 128), (9, 2, 3, 5, 40), (64, 7, 72), (3, 8), (2, 0, 4, 64)])
@pytest.mark.parametrize("spread", [0.1, 30.0, 1000.0])
def test_merged_parts_match_the_reference(dtype, shape, spread, backend, xp):
    outs, lses = random_parts(xp, shape, dtype, spread=spread)
    outs, lses = xp.asarray(outs), xp.asarray(lses)
    assert_merge_matches_reference(outs, lses, *pg.merge_states(outs, lses))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_parts_over_nothing_count_nothing_whatever_they_hold(dtype, backend, xp):
    outs, lses = random_parts(xp, (5, 6, 64), dtype)
    lses[np.random.default_rng(1).random(lses.shape) < 0.5] = -np.inf
    lses[:, 2], lses[:, 3] = -np.inf, (-np.inf, -np.inf, 1.0, -np.inf, -np.inf)
    outs[np.isneginf(lses)] = np.nan
    merged, lse = pg.merge_states(xp.asarray(outs), xp.asarray(lses))
    assert_merge_matches_reference(outs, lses, merged, lse)
    assert not to_numpy(merged)[2].any() and np.isneginf(to_numpy(lse)[2])
    np.testing.assert_array_equal(to_numpy(merged)[3], outs[2, 3])


def test_one_part_stays_as_it_is(backend, xp):
    outs, lses = random_parts(xp, (1, 30, 64), np.float16, spread=20.0)
    merged, lse = pg.merge_states(xp.asarray(outs), xp.asarray(lses))
    np.testing.assert_array_equal(to_numpy(merged), outs[0])
    np.testing.assert_allclose(to_numpy(lse), lses[0], rtol=1e-6)


@pytest.mark.parametrize("kernel", ["auto", "paged_attention_v1"])
@pytest.mark.parametrize("variants", [{}, {"sinks": True, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_of_a_context_make_the_whole(kernel, variants, dtype, backend, xp):
    """Cut after 3 blocks, and a third part that is empty; the sinks go to the second."""
    case = decode_case(DecodeShape((100, 48, 20), dtype=dtype, **variants), backend)
    query, cache, tables, lens = case.arguments
    cut = xp.minimum(lens, 48)
    parts = [
        (tables, cut, {**case.variants, "sinks": None}),
        (xp.ascontiguousarray(tables[:, 3:]), lens - cut, case.variants),
        (tables, lens * 0, {**case.variants, "sinks": None}),
    ]
    results, errors, lse_errors = [], [], []
    for table, length, asked in parts:
        results.append(
            pg.paged_attention(query, cache, table, length, kernel=kernel, return_lse=True, **asked)
        )  # fmt: skip
        budget = decode_budget(query, cache, table, length, kernel, **asked)
        errors.append(budget.out)
        lse_errors.append(budget.lse)
    outs, lses = (xp.stack(arrays) for arrays in zip(*results, strict=True))
    merged, lse = pg.merge_states(outs, lses)
    expected, expected_lse = pg.reference.paged_attention(*case.arguments, return_lse=True, **case.variants)
    own = merge_budget(outs, lses)
    # An error e of a part's log-sum-exp changes shares by at most 2e of the larger output.
    largest, lse_error = np.abs(to_numpy(outs).astype(float)).max(axis=(0, -1)), np.max(lse_errors, axis=0)
    allowed = np.max(errors, axis=0) + own.out + (2 * lse_error * largest)[..., np.newaxis]
    assert (np.abs(to_numpy(merged).astype(float) - expected) <= allowed).all()
    assert (np.abs(to_numpy(lse) - expected_lse) <= lse_error + own.lse).all()


def test_a_sink_is_a_part_without_a_value(backend, xp):
    case = decode_case(DecodeShape((33, 70), dtype="float32", sinks=True), backend)
    plain = pg.paged_attention(*case.arguments, return_lse=True)
    sinks = xp.broadcast_to(case.variants["sinks"], plain[1].shape)
    merged, lse = pg.merge_states(xp.stack([plain[0], plain[0] * 0]), xp.stack([plain[1], sinks]))
    expected, expected_lse = pg.reference.paged_attention(*case.arguments, return_lse=True, **case.variants)
    budget = decode_budget(*case.arguments)
    assert (np.abs(to_numpy(merged) - expected) <= 2 * budget.out).all()
    assert (np.abs(to_numpy(lse) - expected_lse) <= 2 * budget.lse).all()


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ((3,), (3,), ValueError, r"outs must have shape \[parts, ..., D\] with one part at least; got \[3\]"),
        ((0, 2, 8), (0, 2), ValueError, r"with one part at least; got \[0, 2, 8\]"),
        ((2, 3, 8), (2, 4), ValueError, r"lses must have shape \[2, 3\]; got \[2, 4\]"),
        ((2, 3, 12), (2, 3), pg.UnsupportedError, "outs must have a last axis that is a multiple of 8; got 12"),
    ],
)
def test_a_wrong_shape_is_named(outs, lses, error, message, backend, xp):
    with pytest.raises(error, match=message):
        pg.merge_states(xp.zeros(outs, np.float16), xp.zeros(lses, np.float32))


def test_a_wrong_array_is_named(backend, xp):
    outs, lses = xp.zeros((2, 3, 8), np.float16), xp.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="outs must have dtype float16 or bfloat16 or float32; got float64"):
        pg.merge_states(outs.astype(np.float64), lses)
    with pytest.raises(TypeError, match="lses must have dtype float32; got float16"):
        pg.merge_states(outs, lses.astype(np.float16))
    with pytest.raises(ValueError, match="outs must be C-contiguous"):
        pg.merge_states(outs.transpose(1, 0, 2), xp.zeros((3, 2), np.float32))
    with pytest.raises(TypeError, match="outs must be an array in the memory of .* got builtins.list"):
        pg.merge_states([1.0], lses)
    with pytest.raises(TypeError, match="lses must be a (NumPy|CuPy) array"):
        pg.merge_states(outs, [1.0])


def test_a_torch_tensor_comes_back_as_one():
    torch = pytest.importorskip("torch")
    outs, lses = torch.ones((2, 3, 8), dtype=torch.bfloat16), torch.zeros((2, 3))
    merged, lse = pg.merge_states(outs, lses)
    assert isinstance(merged, torch.Tensor) and merged.dtype == torch.bfloat16 and (merged == 1).all()
    torch.testing.assert_close(lse, torch.full((3,), float(np.log(2))))
