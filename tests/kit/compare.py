"""Comparisons by an error budget: what the same mathematics loses in float32 and in the storage type, times two.

A weight of the softmax is exp of a logit, so its relative error is the logit's absolute one: a float32 dot product
errs by a few units in the last place of the largest logit. The output is a weighted mean of values, so it errs by
that fraction of the largest value, and once more when it is rounded to the storage type.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import cupaged as pg

FLOAT32_EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 8  # of the logits' scale in a float32 dot product, a scaling, exp2f and two sums


def to_numpy(array):
    """Return any array as NumPy."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def assert_decode_matches_reference(case, out, lse=None):
    """Hold a decode result to the float64 reference."""
    expected, expected_lse = pg.reference.paged_attention(*case.arguments, return_lse=True)
    out = to_numpy(out)
    dtype = case.cache.config.numpy_dtype
    assert out.dtype == dtype
    assert out.shape == expected.shape
    actual = out.astype(np.float64)
    assert np.isfinite(actual).all(), "the output holds NaN or infinity: something was read that must not be"
    logits, values = _scales(case, expected_lse)
    arithmetic = ROUNDINGS * FLOAT32_EPS * (1 + logits) * values
    rounding = np.abs(expected) * float(ml_dtypes.finfo(dtype).eps) + float(ml_dtypes.finfo(dtype).smallest_subnormal)
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(error - 2 * (arithmetic + rounding)), error.shape)
    assert (error <= 2 * (arithmetic + rounding)).all(), (
        f"at {worst}: got {actual[worst]}, expected {expected[worst]}, "
        f"error {error[worst]:.3g}, budget {2 * (arithmetic + rounding)[worst]:.3g}"
    )
    if lse is not None:
        lse = to_numpy(lse)
        assert lse.dtype == np.float32
        empty = np.isneginf(expected_lse)
        np.testing.assert_array_equal(np.isneginf(lse), empty)
        error = np.abs(lse[~empty].astype(np.float64) - expected_lse[~empty])
        assert (error <= 2 * ROUNDINGS * FLOAT32_EPS * (1 + logits)).all(), f"lse errs by {error.max():.3g}"


def _scales(case, lse):
    """Return bounds of the largest logit and of the largest value, over tokens that take part."""
    query = to_numpy(case.query).astype(np.float64)
    key, value = (to_numpy(array).astype(np.float64) for array in case.cache.to_dense())
    norm = np.sqrt(np.nansum(key**2, axis=-1).max(initial=0.0))
    logits = np.sqrt((query**2).sum(axis=-1)).max(initial=0.0) * norm / np.sqrt(query.shape[-1])
    finite = np.abs(lse[np.isfinite(lse)]).max(initial=0.0)
    return max(logits, finite), np.nanmax(np.abs(value), initial=0.0)
