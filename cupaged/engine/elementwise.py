"""What a Llama computes besides products and attention, in a launch each."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import UnsupportedError
from cupaged.ops.arrays import array_module, as_backend_array, backend_of, check_alignment
from cupaged.ops.checks import check_contiguous, check_dtype, check_shape, checked_real
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.launch import remembered
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["rms_norm", "swiglu"]

FLOAT32 = np.dtype(np.float32)
STORAGE_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32))
NORM_THREADS, NORM_VECTOR = 128, 4
GATE_THREADS = 256


def rms_norm(x: Any, weight: Any, eps: float, dtype: Any) -> Any:
    """Return rows divided by the root of their mean square, times a weight [1]_.

    Parameters
    ----------
    x : array, float32 [rows, width]
        Width a multiple of 4.
    weight : array, float32 [width]
    eps : float
        Added to the mean square.
    dtype : dtype
        The result's: float16, bfloat16 or float32.

    Returns
    -------
    array, [rows, width]

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If the width is no multiple of 4.

    References
    ----------
    .. [1] Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """
    backend, dtype, given = backend_of(x, "x"), np.dtype(dtype), (x, weight)
    checked = remembered("rms_norm", backend).find((eps, dtype), given)
    if checked is not None:
        out = array_module(backend).empty(x.shape, dtype)
        checked.launch(*given, out)
        return out
    return _checked_norm(x, weight, eps, dtype, backend)


@on_callers_streams
def _checked_norm(x: Any, weight: Any, eps: float, dtype: Any, backend: str) -> Any:
    """Check a call of `rms_norm`, launch it, and remember it."""
    given = x, weight
    x, weight = as_backend_array(x, "x", backend), as_backend_array(weight, "weight", backend)
    check_dtype(x, "x", FLOAT32)
    check_shape(x, "x", ("rows", "width"))
    check_dtype(weight, "weight", FLOAT32)
    check_shape(weight, "weight", (x.shape[1],))
    if checked_real(eps, "eps") < 0:
        raise ValueError(f"eps must be at least 0; got {eps!r}")
    if dtype not in STORAGE_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    if x.shape[1] % NORM_VECTOR:
        raise UnsupportedError(f"x must have a width that is a multiple of {NORM_VECTOR}; got {x.shape[1]}")
    out = array_module(backend).empty(x.shape, dtype)
    for array, name in ((x, "x"), (weight, "weight")):
        check_contiguous(array, name)
        if out.size:
            check_alignment(array, name)
    if out.size:
        kernel = load_kernel("engine/rms_norm.cu", "rms_norm", {"STORAGE": C_TYPE_OF_DTYPE[dtype]}, backend)
        launch = kernel.prepare(
            (x.shape[0],), (NORM_THREADS,),
            out=out, x=x, weight=weight, vectors=x.shape[1] // NORM_VECTOR, eps=float(eps),
        )  # fmt: skip
        launch()
        remembered("rms_norm", backend).add((eps, dtype), given, launch, ("x", "weight", "out"))
    return out


def swiglu(gate_up: Any) -> Any:
    """Return ``silu(gate) * up`` of rows that hold gates first and ups behind them [1]_.

    Parameters
    ----------
    gate_up : array, float16, bfloat16 or float32 [rows, 2 * width]
        Width a multiple of 16 bytes.

    Returns
    -------
    array, [rows, width]
        Of the same dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If the width is no multiple of 16 bytes.

    References
    ----------
    .. [1] Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    backend, given = backend_of(gate_up, "gate_up"), (gate_up,)
    checked = remembered("swiglu", backend).find((), given)
    if checked is not None:
        out = array_module(backend).empty((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
        checked.launch(gate_up, out)
        return out
    return _checked_swiglu(gate_up, backend)


@on_callers_streams
def _checked_swiglu(gate_up: Any, backend: str) -> Any:
    """Check a call of `swiglu`, launch it, and remember it."""
    given = (gate_up,)
    gate_up = as_backend_array(gate_up, "gate_up", backend)
    check_dtype(gate_up, "gate_up", *STORAGE_DTYPES)
    check_shape(gate_up, "gate_up", ("rows", "2 * width"))
    check_contiguous(gate_up, "gate_up")
    rows, per_vector = gate_up.shape[0], 16 // gate_up.dtype.itemsize
    if gate_up.shape[1] % (2 * per_vector):
        raise UnsupportedError(
            f"gate_up must have a width that is a multiple of {2 * per_vector}; got {gate_up.shape[1]}"
        )
    out = array_module(backend).empty((rows, gate_up.shape[1] // 2), gate_up.dtype)
    if out.size:
        check_alignment(gate_up, "gate_up")
        vectors = out.shape[1] // per_vector
        kernel = load_kernel("engine/swiglu.cu", "swiglu", {"STORAGE": C_TYPE_OF_DTYPE[out.dtype]}, backend)
        launch = kernel.prepare(
            (-(-rows * vectors // GATE_THREADS),), (GATE_THREADS,),
            out=out, gate_up=gate_up, rows=rows, vectors=vectors,
        )  # fmt: skip
        launch()
        remembered("swiglu", backend).add((), given, launch, ("gate_up", "out"))
    return out
