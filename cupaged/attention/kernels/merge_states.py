"""Merging attention over parts of a context."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import UnsupportedError
from cupaged.ops.arrays import as_backend_array, backend_of, check_alignment, empty_for, like_caller
from cupaged.ops.checks import check_contiguous, check_dtype, check_shape
from cupaged.runtime.info import KernelInfo
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["MERGE_STATES", "merged_states"]

THREADS = 256
STORAGE_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32))
MERGE_STATES = KernelInfo(
    "merge_states",
    "attention/merge_states.cu",
    "merges attention over disjoint parts of a context by their log-sum-exps",
    "float16, bfloat16, float32; any shape whose last axis is a multiple of 16 bytes; parts over nothing",
)


def merged_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Merge parts, as `cupaged.merge_states` says."""
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
        defines = {"STORAGE": C_TYPE_OF_DTYPE[outs.dtype]}
        kernel = load_kernel(MERGE_STATES.file, MERGE_STATES.name, defines, backend)
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
