"""Comparisons with the reference, by the error budget of `cupaged.bench.accuracy`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cupaged.bench.accuracy import decode_budget, merge_budget, prefill_budget
from cupaged.reference import as_numpy as to_numpy

__all__ = [
    "assert_decode_matches_reference",
    "assert_merge_matches_reference",
    "assert_prefill_matches_reference",
    "to_numpy",
]


def assert_decode_matches_reference(case, out, lse=None, kernel="auto"):
    """Hold a decode result to the float64 reference."""
    budget = decode_budget(*case.arguments, kernel, **case.variants)
    assert out.dtype == case.query.dtype
    _assert_within(budget, to_numpy(out), None if lse is None else to_numpy(lse))


def assert_prefill_matches_reference(case, out, lse=None, rows=slice(None)):
    """Hold a prefill result, or some of its rows, to the float64 reference."""
    budget = prefill_budget(*case.arguments, **case.options)
    assert out.dtype == case.query.dtype
    if rows != slice(None):
        fields = ("expected", "out", "expected_lse", "lse")
        budget = replace(budget, **{name: getattr(budget, name)[rows] for name in fields})
    _assert_within(budget, to_numpy(out), None if lse is None else to_numpy(lse))


def assert_merge_matches_reference(outs, lses, out, lse):
    """Hold merged parts to the float64 reference."""
    assert out.dtype == outs.dtype
    _assert_within(merge_budget(outs, lses), to_numpy(out), to_numpy(lse))


def _assert_within(budget, out, lse):
    expected, expected_lse = budget.expected, budget.expected_lse
    assert out.shape == expected.shape
    actual = out.astype(np.float64)
    assert np.isfinite(actual).all(), "the output holds NaN or infinity: something was read that must not be"
    error = np.abs(actual - expected)
    if error.size:
        worst = np.unravel_index(np.argmax(error / budget.out), error.shape)
        assert (error <= budget.out).all(), (
            f"at {worst}: got {actual[worst]}, expected {expected[worst]}, "
            f"error {error[worst]:.3g}, budget {budget.out[worst]:.3g}"
        )
    if lse is not None:
        assert lse.dtype == np.float32 and lse.shape == expected_lse.shape
        empty = np.isneginf(expected_lse)
        np.testing.assert_array_equal(np.isneginf(lse), empty)
        error = np.where(empty, 0.0, np.abs(lse.astype(np.float64) - np.where(empty, 0.0, expected_lse)))
        if error.size:
            worst = np.unravel_index(np.argmax(error / budget.lse), error.shape)
            assert (error <= budget.lse).all(), (
                f"lse at {worst} errs by {error[worst]:.3g}, {budget.lse[worst]:.3g} allowed"
            )
