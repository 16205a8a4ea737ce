"""The next token of each sequence, drawn from its logits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import UnsupportedError, written
from cupaged.kinds import is_integer, is_real
from cupaged.ops.arrays import array_module, as_backend_array, backend_of, empty_for, like_caller
from cupaged.ops.checks import (
    as_float32,
    as_numpy,
    as_real,
    check_contiguous,
    check_dtype,
    check_shape,
    must_validate,
)
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = ["sample"]

LOGIT_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32))
MAX_VOCABULARY = 2**19  # so that weights of 44 bits sum up in 63
TOKENS_OF_WARP = 512  # at least, where there are several warps
MAX_WARPS = 32
INVALID = ("raise", "mark")  # what to do with rows that have no token


@on_callers_streams
def sample(
    logits: Any,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: Any = 0,
    *,
    out: Any = None,
    validate: bool | None = None,
    invalid: str = "raise",
) -> Any:
    """Draw the next token of each sequence.

    The logits are divided by the temperature; of the tokens, the `top_k` most likely stay, and of these the fewest most
    likely ones that together have the share `top_p` of their probability [1]_; tokens that tie with the last one to
    stay, stay too. One of them is drawn by its probability. The draw depends on a row's seed and logits alone.

    Parameters
    ----------
    logits : array, float16, bfloat16 or float32 [num_seqs, vocab_size]
        A row needs a finite logit, and none that is NaN or plus infinity; minus infinity rules a token out. Any other
        row is invalid: it has no token, and -1 stands in its place. Other rows are drawn as if it were not there.
    temperature : float, or float32 array [num_seqs]
        0 or more; 0 takes the most likely token, of equal ones the first. Numbers that float32 does not hold are taken
        as the nearest that it has above 0: 1e-50 draws among equals of the most likely, 1e300 among all alike.
    top_k : int, or int32 array [num_seqs]
        0 (and anything beyond the vocabulary) means all.
    top_p : float, or float32 array [num_seqs]
        Above 0 and at most 1; 1 means all.
    seed : int, or uint64 array [num_seqs]
        Of each row; one number, modulo 2**64, gives row i the seed ``seed + i``.
    out : array, int32 [num_seqs], optional
        Where to write the tokens; it shares no memory with any other argument.
    validate : bool, optional
        Read all arrays and check them, which on a GPU waits for it. The default reads them on the host backend only,
        or everywhere if CUPAGED_VALIDATE is set to 1. Without it, an invalid row gives -1, and so does a row whose
        temperature, top_k or top_p is out of its range.
    invalid : {"raise", "mark"}
        What a check does with rows of invalid logits: raise ValueError for the whole call, or leave -1 for them.
        Without `validate` nothing is raised for them in any case.

    Returns
    -------
    array, int32 [num_seqs]
        Token ids, of the kind of `logits`; -1 for an invalid row.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was launched.
    UnsupportedError
        If the vocabulary has more than 2**19 tokens.

    References
    ----------
    .. [1] Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020.
    """
    caller, backend = logits, backend_of(logits, "logits")
    logits = as_backend_array(logits, "logits", backend)
    check_dtype(logits, "logits", *LOGIT_DTYPES)
    check_shape(logits, "logits", ("num_seqs", "vocab_size"))
    check_contiguous(logits, "logits")
    num_seqs, vocab_size = logits.shape
    if vocab_size == 0:
        raise ValueError("logits must have at least one token a row; got none")
    if vocab_size > MAX_VOCABULARY:
        raise UnsupportedError(f"logits must have at most {MAX_VOCABULARY} tokens a row; got {vocab_size}")
    temperature = _of_each_row(temperature, "temperature", np.float32, num_seqs, backend)
    top_k = _of_each_row(top_k, "top_k", np.int32, num_seqs, backend)
    top_p = _of_each_row(top_p, "top_p", np.float32, num_seqs, backend)
    seed = _of_each_row(seed, "seed", np.uint64, num_seqs, backend)
    if out is None:
        tokens = empty_for(caller, (num_seqs,), np.int32, backend)
    else:
        tokens = as_backend_array(out, "out", backend)
        check_dtype(tokens, "out", np.dtype(np.int32))
        check_shape(tokens, "out", (num_seqs,))
        check_contiguous(tokens, "out")
        check_apart(
            {"out": tokens},
            {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
        )
    if invalid not in INVALID:
        raise ValueError(f"invalid must be one of {', '.join(INVALID)}; got {invalid!r}")
    if must_validate(validate, backend):
        _check_ranges(temperature, top_k, top_p)
        if invalid == "raise":
            _check_logits(logits)
    if num_seqs:
        warps = min(MAX_WARPS, max(1, vocab_size // TOKENS_OF_WARP))
        defines = {"STORAGE": C_TYPE_OF_DTYPE[logits.dtype], "WARPS": 1 << (warps.bit_length() - 1)}
        kernel = load_kernel("sampling/sample.cu", "sample", defines, backend)
        kernel(
            (num_seqs,),
            (32 * int(defines["WARPS"]),),
            tokens=tokens,
            logits=logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=seed,
            vocab_size=vocab_size,
        )
    return like_caller(tokens, caller) if out is None else out


def _of_each_row(value: Any, name: str, dtype: Any, num_seqs: int, backend: str) -> Any:
    """Return one value a row as the backend's array: the caller's, or a number for all."""
    expected, xp = np.dtype(dtype), array_module(backend)
    if hasattr(value, "shape") and len(value.shape):
        array = as_backend_array(value, name, backend)
        check_dtype(array, name, expected)
        check_shape(array, name, (num_seqs,))
        check_contiguous(array, name)
        return array
    if not (is_integer(value) if expected.kind in "iu" else is_real(value)):
        what = "an integer" if expected.kind in "iu" else "a real number"
        raise TypeError(
            f"{name} must be {what}, or an array of {expected}; got {type(value).__name__} {written(value)}"
        )
    if name == "seed":
        return xp.arange(num_seqs, dtype=expected) + expected.type(int(value) % 2**64)
    number = np.array([as_real(value)])
    _check_range(name, number, value)
    if expected.kind == "i":
        return xp.full(num_seqs, min(int(value), np.iinfo(expected).max), expected)
    return xp.full(num_seqs, as_float32(number)[0], expected)


def _check_range(name: str, values: np.ndarray, given: Any = None) -> None:
    if name == "top_p":
        beyond = given is not None and given > 1  # which a float may not tell
        wrong, expected = ~((values > 0) & (values <= 1)) | beyond, "above 0 and at most 1"
    elif name == "top_k":
        wrong, expected = values < 0, "an integer, 0 or more"
    else:
        wrong, expected = ~((values >= 0) & np.isfinite(values)), "finite and at least 0"
    if wrong.any():
        raise ValueError(f"{name} must be {expected}; got {values[np.argmax(wrong)] if given is None else given}")


def _check_ranges(temperature: Any, top_k: Any, top_p: Any) -> None:
    for name, array in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        _check_range(name, as_numpy(array).astype(np.float64))


def _check_logits(logits: Any) -> None:
    largest = as_numpy(logits).astype(np.float32).max(axis=1, initial=-np.inf)  # NaN where there is one
    if not np.isfinite(largest).all():
        row = int(np.argmin(np.isfinite(largest)))
        raise ValueError(f"logits must have a finite largest entry in each row; that of row {row} is {largest[row]}")
