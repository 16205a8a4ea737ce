"""Products of matrices, by cuBLAS on a GPU, where a CUDA graph can capture them.

CuPy (up to 14.2 at least) refuses to record its own calls of cuBLAS. So cublasGemmEx is called here, from the library
that CuPy has loaded, with a handle and a workspace of its own for each stream, which go with the stream; a graph keeps
the workspace that it was captured with. Sums are always float32.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import ml_dtypes
import numpy as np

from cupaged.errors import BackendUnavailableError
from cupaged.ops.arrays import as_backend_array, backend_of
from cupaged.ops.checks import check_contiguous, check_dtype, check_shape
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.captures import is_capturing, keep_for_graph

__all__ = ["add_product", "product"]

FLOAT32 = np.dtype(np.float32)
CUDA_TYPES = {np.dtype(np.float16): 2, np.dtype(ml_dtypes.bfloat16): 14, FLOAT32: 0}  # cudaDataType
COMPUTE_32F = 68  # cublasComputeType_t
NO_NARROW_SUMS = 16  # cublasMath_t: parts of a sum are added up in float32 too, not in the result's type
DEFAULT_ALGORITHM = -1  # cublasGemmAlgo_t
AS_IT_LIES, TRANSPOSED = 0, 1  # cublasOperation_t
WORKSPACE_BYTES = 32 * 2**20
ZERO, ONE = ctypes.c_float(0), ctypes.c_float(1)  # read at the call, also within a capture

_int, _pointer = ctypes.c_int, ctypes.c_void_p
SIGNATURES: dict[str, Sequence[Any]] = {
    "cublasSetStream_v2": (_pointer, _pointer),
    "cublasSetMathMode": (_pointer, _int),
    "cublasSetWorkspace_v2": (_pointer, _pointer, ctypes.c_size_t),
    "cublasGemmEx": (
        _pointer, _int, _int, _int, _int, _int,  # handle, two operations, rows, columns and depth
        ctypes.POINTER(ctypes.c_float), _pointer, _int, _int, _pointer, _int, _int,  # alpha; two arrays, types, strides
        ctypes.POINTER(ctypes.c_float), _pointer, _int, _int,  # beta, the result
        _int, _int,  # type of sums, algorithm
    ),
}  # fmt: skip


@on_callers_streams
def product(a: Any, b: Any, dtype: Any = None) -> Any:
    """Return the matrix product of two arrays, NumPy's or CuPy's, summed in float32.

    On a GPU the work goes to CuPy's current stream. A graph can capture it if a product was computed on the same stream
    before, which makes the stream's handle.

    Parameters
    ----------
    a : array, float16, bfloat16 or float32 [m, k]
        C-contiguous.
    b : array, of the same dtype, [k, n]
        C-contiguous, or the transpose of an array that is.
    dtype : dtype, optional
        The result's: that of `a`, which is the default, or float32.

    Returns
    -------
    array, [m, n]

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing was launched.
    BackendUnavailableError
        If the cuBLAS that CuPy uses is not found.
    RuntimeError
        If cuBLAS refuses.
    """
    backend, a, b = _checked(a, b)
    result_dtype = a.dtype if dtype is None else np.dtype(dtype)
    if result_dtype not in (a.dtype, FLOAT32):
        raise TypeError(f"dtype must be float32 or that of a, {a.dtype}; got {result_dtype}")
    if backend == "host":
        return _host_product(a, b).astype(result_dtype, copy=False)
    import cupy

    c = cupy.empty((a.shape[0], b.shape[1]), result_dtype)
    _launch(a, b, c, ZERO)
    return c


@on_callers_streams
def add_product(c: Any, a: Any, b: Any) -> None:
    """Add the product of `a` and `b` to `c`, float32 [m, n], C-contiguous, in place; the rest is as in `product`.

    `c` shares no memory with `a` or `b`.
    """
    backend, a, b = _checked(a, b)
    c = as_backend_array(c, "c", backend)
    check_dtype(c, "c", FLOAT32)
    check_shape(c, "c", (a.shape[0], b.shape[1]))
    check_contiguous(c, "c")
    check_apart({"c": c}, {"a": a, "b": b})
    if backend == "host":
        c += _host_product(a, b)
    else:
        _launch(a, b, c, ONE)


def _checked(a: Any, b: Any) -> tuple[str, Any, Any]:
    """Return where two matrices are, and them as the backend's own arrays, or raise by name."""
    backend = backend_of(a, "a")
    a, b = as_backend_array(a, "a", backend), as_backend_array(b, "b", backend)
    check_dtype(a, "a", *CUDA_TYPES)
    check_dtype(b, "b", a.dtype)
    check_shape(a, "a", ("m", "k"))
    check_shape(b, "b", (a.shape[1], "n"))
    if not a.shape[1]:
        raise ValueError(f"a must have at least one column; got shape {list(a.shape)}")
    check_contiguous(a, "a")
    if not (b.flags.c_contiguous or b.flags.f_contiguous):
        raise ValueError(
            f"b must be C-contiguous, or the transpose of an array that is; got shape {b.shape} with strides "
            f"{b.strides} (bytes)"
        )
    return backend, a, b


def _host_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide: np.ndarray = a.astype(np.float32, copy=False) @ b.astype(np.float32, copy=False)
    return wide


# --- cuBLAS -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Handle:
    """A handle of cuBLAS and its workspace, which a graph that captured a product keeps for itself."""

    library: Any
    handle: int
    stream: int
    workspace: Any
    destroy: Callable[[int], None] | None = None

    def __del__(self) -> None:
        if self.destroy is not None:
            with suppress(Exception):  # the driver may be gone before us
                self.library.cublasSetStream_v2(self.handle, 0)  # its own may be gone
                self.destroy(self.handle)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(self.handle, *arguments)
        if status:
            raise RuntimeError(f"{name} failed with cuBLAS status {status}")


def _launch(a: Any, b: Any, c: Any, beta: ctypes.c_float) -> None:
    """Launch c = a b + beta c.

    cuBLAS takes matrices column by column, so that it sees the transposes of what lies here row by row. It is asked for
    the transpose of c, which is that of b times that of a.
    """
    import cupy

    (m, k), n, device = a.shape, b.shape[1], cupy.cuda.runtime.getDevice()
    for name, array in (("a", a), ("b", b), ("c", c)):
        if array.data.device_id != device:
            raise ValueError(f"{name} lies on device {array.data.device_id}; the current device is {device}")
    if not (m and n):
        return
    rows = b.flags.c_contiguous
    handle = _handle()
    handle.call("cublasSetStream_v2", handle.stream)  # which takes the workspace away
    handle.call("cublasSetWorkspace_v2", handle.workspace.ptr, WORKSPACE_BYTES)
    handle.call(
        "cublasGemmEx", AS_IT_LIES if rows else TRANSPOSED, AS_IT_LIES, n, m, k,
        ctypes.byref(ONE), b.data.ptr, CUDA_TYPES[b.dtype], n if rows else k, a.data.ptr, CUDA_TYPES[a.dtype], k,
        ctypes.byref(beta), c.data.ptr, CUDA_TYPES[c.dtype], n,
        COMPUTE_32F, DEFAULT_ALGORITHM,
    )  # fmt: skip


_of_thread = threading.local()


def _handle() -> _Handle:
    """Return the handle of the current device, stream and thread: nothing else uses it or its workspace meanwhile.

    It is freed with the stream or the thread, whichever ends first.
    """
    import cupy

    stream, device = cupy.cuda.get_current_stream(), cupy.cuda.runtime.getDevice()
    if not hasattr(_of_thread, "handles"):
        _of_thread.handles = defaultdict(WeakKeyDictionary)
    handles = _of_thread.handles[device]
    handle, capturing = handles.get(stream), is_capturing(stream)
    if handle is None:
        if capturing:
            raise RuntimeError("compute a product on this stream before the capture: the first one allocates memory")
        created = cupy.cuda.cublas.create()
        workspace = cupy.cuda.MemoryPointer(cupy.cuda.Memory(WORKSPACE_BYTES), 0)  # of no pool
        library = _library(cupy.cuda.cublas.getVersion(created))
        handle = handles[stream] = _Handle(library, created, stream.ptr, workspace, cupy.cuda.cublas.destroy)
        handle.call("cublasSetMathMode", NO_NARROW_SUMS)
    if capturing:
        keep_for_graph(stream, handle.workspace)
    return handle


@cache
def _library(version: int) -> Any:
    """Return cuBLAS as ctypes has it: the library that CuPy has loaded, found by the name that it has in memory."""
    name = f"libcublas.so.{version // 10_000}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise BackendUnavailableError(
            f"products on the GPU need {name}, of the version {version} that CuPy uses: {error}"
        ) from error
    for function, arguments in SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    return library
