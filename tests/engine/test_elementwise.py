"""RMSNorm and SwiGLU, held to float64."""

import ml_dtypes
import numpy as np
import pytest

import cupaged as pg
from cupaged.bench.accuracy import FLOAT32_EPS, SAFETY
from cupaged.engine import elementwise
from cupaged.engine.elementwise import rms_norm, swiglu
from cupaged.runtime import launch
from tests.kit.compare import to_numpy

DTYPES = [np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32)]


def assert_within(found, exact, single):
    """A few times what float32 loses in the same arithmetic, in the same row, and the rounding of the result."""
    storage, found = ml_dtypes.finfo(found.dtype), to_numpy(found)
    lost, size = (np.abs(array).max(axis=-1, keepdims=True, initial=0.0) for array in (single - exact, exact))
    arithmetic = lost + FLOAT32_EPS * size
    budget = SAFETY * arithmetic + np.abs(exact) * float(storage.eps) + float(storage.smallest_subnormal)
    assert found.shape == exact.shape and (np.abs(found.astype(np.float64) - exact) <= budget).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (5, 64), (3, 576), (2, 1028), (0, 8), (70, 12)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rows_are_normalised(dtype, shape, size, backend, xp):
    random = np.random.default_rng(0)
    x = (size * random.standard_normal(shape)).astype(np.float32)
    weight = random.standard_normal(shape[1]).astype(np.float32)
    found = rms_norm(xp.asarray(x), xp.asarray(weight), 1e-5, dtype)
    assert found.dtype == dtype
    exact, single = (pg.reference.rms_norm(x, weight, 1e-5, kind) for kind in (np.float64, np.float32))
    assert_within(found, exact, single)


def test_a_row_of_zeros_stays_so(backend, xp):
    found = rms_norm(xp.zeros((2, 8), np.float32), xp.ones(8, np.float32), 1e-5, np.float16)
    assert not to_numpy(found).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (5, 192), (3, 3072), (0, 16), (70, 48)])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_ups_are_gated(dtype, shape, size, backend, xp):
    gate_up = (size * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    found = swiglu(xp.asarray(gate_up))
    assert found.dtype == dtype
    assert_within(found, *(pg.reference.swiglu(gate_up, kind) for kind in (np.float64, np.float32)))


def test_gates_at_the_ends_of_the_range(backend, xp):
    gate = np.array([-np.inf, -1e4, -100.0, 0.0, 100.0, 1e4, 6e4, -0.0], np.float16)
    gate[0] = -65504
    gate_up = np.concatenate([gate, np.ones(8, np.float16)])[np.newaxis]
    found = to_numpy(swiglu(xp.asarray(gate_up)))
    np.testing.assert_array_equal(found, pg.reference.swiglu(gate_up).astype(np.float16))


@pytest.mark.parametrize(
    ("x", "weight", "dtype", "error", "message"),
    [
        (((2, 8), "f2"), ((8,), "f4"), "f2", TypeError, "x must have dtype float32; got float16"),
        (((2, 8), "f4"), ((4,), "f4"), "f2", ValueError, r"weight must have shape \[8\]; got \[4\]"),
        (((2, 8), "f4"), ((8,), "f4"), "f8", TypeError, "dtype must be float16, bfloat16 or float32; got float64"),
        (((2, 6), "f4"), ((6,), "f4"), "f2", pg.UnsupportedError, "x must have a width that is a multiple of 4; got 6"),
        (((8,), "f4"), ((8,), "f4"), "f2", ValueError, r"x must have shape \[rows, width\]; got \[8\]"),
    ],
)
def test_a_mistake_in_a_norm_is_named(x, weight, dtype, error, message, backend, xp):
    with pytest.raises(error, match=message):
        rms_norm(xp.zeros(*x), xp.zeros(*weight), 1e-5, dtype)


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (((2, 16), "f8"), TypeError, "gate_up must have dtype float16 or bfloat16 or float32; got float64"),
        (((2, 24), "f2"), pg.UnsupportedError, "gate_up must have a width that is a multiple of 16; got 24"),
        (((16,), "f2"), ValueError, r"gate_up must have shape \[rows, 2 \* width\]; got \[16\]"),
    ],
)
def test_a_mistake_in_a_gate_is_named(gate_up, error, message, backend, xp):
    with pytest.raises(error, match=message):
        swiglu(xp.zeros(*gate_up))


def test_rows_in_pieces_are_named(backend, xp):
    with pytest.raises(ValueError, match="x must be C-contiguous"):
        rms_norm(xp.zeros((8, 8), np.float32)[::2], xp.ones(8, np.float32), 1e-5, np.float16)
    with pytest.raises(ValueError, match="gate_up must be C-contiguous"):
        swiglu(xp.zeros((8, 32), np.float16)[:, :16])


def test_a_call_like_one_before_is_not_checked_again(monkeypatch, backend, xp):
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal((2, *shape)).astype(np.float32) for shape in ((3, 64), (64,)))
    monkeypatch.setattr(launch, "_remembered", {})
    for i in range(2):
        given = xp.asarray(x[i]), xp.asarray(weight[i])
        normed, gated = rms_norm(*given, 1e-5, np.float16), swiglu(given[0])
        exact, single = (pg.reference.rms_norm(x[i], weight[i], 1e-5, kind) for kind in (np.float64, np.float32))
        assert_within(normed, exact, single)
        assert_within(gated, *(pg.reference.swiglu(x[i], kind) for kind in (np.float64, np.float32)))
        monkeypatch.setattr(elementwise, "load_kernel", None)
    for change in ({"eps": 1e-6}, {"dtype": np.float32}, {"x": given[0][:2]}):
        with pytest.raises(TypeError, match="NoneType"):
            rms_norm(**{"x": given[0], "weight": given[1], "eps": 1e-5, "dtype": np.float16, **change})
    with pytest.raises(TypeError, match="NoneType"):
        swiglu(normed)
