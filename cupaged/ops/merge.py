"""Merging attention over parts of a context."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import UnsupportedError
from cupaged.ops.arrays import as_backend_array, backend_of, check_alignment, empty_for, like_caller
from cupaged.ops.checks import check_contiguous, check_dtype, check_shape
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["merge_states"]

THREADS = 256
STORAGE_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32))


@on_callers_streams
def merge_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Merge attention over disjoint parts of a context into attention over all of it.

    The parts come from `paged_attention` with ``return_lse=True``. Where heads have sinks, give them to one part only:
    a log-sum-exp includes the sink.

    Parameters
    ----------
    outs : array, [parts, ..., D]
        The parts' outputs, in float16, bfloat16 or float32; D a multiple of 16 bytes.
    lses : array, float32 [parts, ...]
        Their log-sum-exps. A part with -inf counts nothing and is not read.

    Returns
    -------
    out : array, [..., D]
        Of the kind and dtype of `outs`; 0 where every part has log-sum-exp -inf.
    lse : array, float32 [...]
        The whole's log-sum-exp.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    UnsupportedError
        If D is no multiple of 16 bytes.

    References
    ----------
    .. [1] Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
    """
    caller, backend = outs, backend_of(outs, "outs")
    outs, lses = as_backend_array(outs, "outs", backend), as_backend_array(lses, "lses", backend)
    check_dtype(outs, "outs", *STORAGE_DTYPES)
    if outs.ndim < 2 or outs.shape[0] == 0:
        raise ValueError(f"outs must have shape [parts, ..., D] with one part at least; got {list(outs.shape)}")
    check_dtype(lses, "lses", np.dtype(np.float32))
    check_shape(lses, "lses", outs.shape[:-1])
    check_contiguous(outs, "outs")
    check_contiguous(lses, "lses")
    parts, head_dim = outs.shape[0], outs.shape[-1]
    per_vector = 16 // outs.dtype.itemsize
    if head_dim % per_vector:
        raise UnsupportedError(f"outs must have a last axis that is a multiple of {per_vector}; got {head_dim}")
    out = empty_for(caller, outs.shape[1:], outs.dtype, backend)
    lse = empty_for(caller, outs.shape[1:-1], np.float32, backend)
    if out.size:
        check_alignment(outs, "outs")
        rows, vectors = math.prod(out.shape[:-1]), head_dim // per_vector
        kernel = load_kernel(
            "attention/merge_states.cu", "merge_states", {"STORAGE": C_TYPE_OF_DTYPE[outs.dtype]}, backend
        )
        kernel(
            (-(-rows * vectors // THREADS),),
            (THREADS,),
            out=out,
            lse=lse,
            outs=outs,
            lses=lses,
            parts=parts,
            rows=rows,
            vectors=vectors,
        )
    return like_caller(out, caller), like_caller(lse, caller)
