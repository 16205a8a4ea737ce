"""Products of matrices against float64: on the host, through a stand-in for cuBLAS, and on a GPU, in a graph too."""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cupaged as pg
from cupaged.engine import products
from cupaged.engine.products import add_product, product
from tests.kit.compare import to_numpy
from tests.kit.cuda_stub import CudaStub

DTYPES = [np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32)]
SHAPES = [(1, 1, 1), (3, 5, 2), (1, 64, 9), (7, 1, 4), (64, 576, 96), (0, 8, 4), (4, 8, 0)]
FLOAT32_EPS = float(np.finfo(np.float32).eps)


def matrices(shape, dtype, transposed=False, seed=0):
    """Return a and b, b as the transpose of an array if asked for."""
    random, (m, k, n) = np.random.default_rng(seed), shape
    a = random.standard_normal((m, k)).astype(dtype)
    return a, random.standard_normal((n, k)).astype(dtype).T if transposed else random.standard_normal((k, n)).astype(
        dtype
    )


def assert_product(found, a, b, start=0.0):
    """A sum of k products errs by k units of float32 of its terms, and by a unit of the result's own type."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    expected, found = start + a @ b, to_numpy(found)
    terms = np.abs(start) + np.abs(a) @ np.abs(b)
    budget = (a.shape[1] + 1) * FLOAT32_EPS * terms + np.abs(expected) * float(ml_dtypes.finfo(found.dtype).eps)
    assert found.shape == expected.shape and (np.abs(found.astype(np.float64) - expected) <= budget).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_sums(dtype, shape, transposed, backend, xp):
    a, b = matrices(shape, dtype, transposed)
    given = xp.asarray(a), xp.asarray(b.T).T if transposed else xp.asarray(b)
    for result_dtype in (None, np.float32):
        found = product(*given, result_dtype)
        assert found.dtype == (result_dtype or dtype)
        assert_product(found, a, b)
    start = np.random.default_rng(1).standard_normal((shape[0], shape[2])).astype(np.float32)
    total = xp.asarray(start.copy())
    add_product(total, *given)
    assert_product(total, a, b, start.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_long_sum_keep_float32(dtype, xp):
    """Where few rows leave a GPU idle, cuBLAS cuts the sum into parts, which are large here and cancel each other."""
    a, b = (np.abs(matrix) for matrix in matrices((4, 2048, 576), dtype))
    a[:, 1024:] *= -1
    assert_product(product(xp.asarray(a), xp.asarray(b)), a, b)


class StubCublas:
    """cuBLAS as its documentation has it, column by column, on the memory that it is given; called through C."""

    def __init__(self):
        self.calls = []
        self._dtypes = {number: dtype for dtype, number in products.CUDA_TYPES.items()}
        for name, arguments in products.SIGNATURES.items():
            function = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, "_" + name))
            function.argtypes = arguments
            setattr(self, name, function)

    def _cublasSetStream_v2(self, handle, stream):
        self.calls.append(("stream", handle, stream))
        return 0

    def _cublasSetMathMode(self, handle, mode):
        self.calls.append(("math mode", handle, mode))
        return 0

    def _cublasSetWorkspace_v2(self, handle, workspace, size):
        self.calls.append(("workspace", handle, workspace, size))
        return 0

    def _cublasGemmEx(
        self, handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo
    ):
        self.calls.append(("gemm", handle))
        if (compute, algo) != (68, -1) or a_type != b_type:
            return 15  # not supported

        def matrix(address, number, rows, columns, stride):
            if stride < max(1, rows):
                raise ValueError("a leading dimension is below the number of rows")
            dtype = self._dtypes[number]
            size = ((columns - 1) * stride + rows) * dtype.itemsize
            memory = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8).view(dtype)
            return np.lib.stride_tricks.as_strided(memory, (rows, columns), (dtype.itemsize, stride * dtype.itemsize))

        first = matrix(a, a_type, k, m, lda).T if op_a else matrix(a, a_type, m, k, lda)
        second = matrix(b, b_type, n, k, ldb).T if op_b else matrix(b, b_type, k, n, ldb)
        result = matrix(c, c_type, m, n, ldc)
        total = alpha[0] * (first.astype(np.float32) @ second.astype(np.float32))
        result[...] = total if beta[0] == 0 else total + beta[0] * result
        return 0


@pytest.fixture
def cublas(monkeypatch):
    """A stand-in for cuBLAS, and CuPy arrays that lie in the host's memory."""
    cupy = pytest.importorskip("cupy")
    stub, library, memory = CudaStub(monkeypatch), StubCublas(), []

    def on_device(array):
        held = np.array(array, order="K")
        memory.append(held)
        if held.flags.c_contiguous:
            return stub.array(held.shape, held.dtype, address=held.ctypes.data)
        return stub.array(held.T.shape, held.dtype, address=held.ctypes.data).T

    handle = products._Handle(library, 11, 22, SimpleNamespace(ptr=33))
    monkeypatch.setattr(products, "_handle", lambda: handle)
    monkeypatch.setattr(cupy, "empty", lambda shape, dtype: on_device(np.full(shape, 7, dtype)))
    monkeypatch.setattr(products, "backend_of", lambda array, name: "cuda")  # which asks the driver
    return SimpleNamespace(library=library, on_device=on_device, stub=stub)


def contents(array):
    """Return what lies where a stand-in's array does."""
    memory = (ctypes.c_char * max(1, array.nbytes)).from_address(array.data.ptr)
    return np.frombuffer(memory, np.uint8)[: array.nbytes].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_cublas_is_asked_for_the_transpose(dtype, shape, transposed, cublas):
    a, b = matrices(shape, dtype, transposed)
    given = cublas.on_device(a), cublas.on_device(b)
    for result_dtype in (None, np.float32):
        assert_product(contents(product(*given, result_dtype)), a, b)
    start = np.random.default_rng(1).standard_normal((shape[0], shape[2])).astype(np.float32)
    total = cublas.on_device(start)
    add_product(total, *given)
    assert_product(contents(total), a, b, start.astype(np.float64))
    each = [("stream", 11, 22), ("workspace", 11, 33, 32 * 2**20), ("gemm", 11)]
    assert cublas.library.calls == (3 * each if shape[0] and shape[2] else [])


def test_a_refusal_and_another_device_are_named(cublas, monkeypatch):
    a, b = (cublas.on_device(array) for array in matrices((2, 3, 4), np.float32))
    monkeypatch.setattr(products, "COMPUTE_32F", 0)
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with cuBLAS status 15"):
        product(a, b)
    cublas.stub.device = 1
    with pytest.raises(ValueError, match="a lies on device 0; the current device is 1"):
        product(a, b)


class FakeStream:
    def __init__(self, ptr, capturing=False):
        self.ptr, self.capturing = ptr, capturing

    def is_capturing(self):
        return self.capturing


def test_a_handle_belongs_to_a_stream_and_a_thread_and_goes_with_them(cublas, monkeypatch):
    import cupy

    monkeypatch.undo()  # but for the library
    created = []
    destroyed = []
    fake = SimpleNamespace(
        create=lambda: created.append(1) or len(created), getVersion=lambda handle: 130_100, destroy=destroyed.append
    )
    streams = [FakeStream(5), FakeStream(6)]
    monkeypatch.setitem(vars(cupy.cuda), "cublas", fake)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: streams[0])
    monkeypatch.setattr(cupy.cuda, "Memory", lambda size: cupy.cuda.UnownedMemory(1 << 30, size, None, 0))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(products, "_library", lambda version: cublas.library)
    monkeypatch.setattr(products, "_of_thread", threading.local())
    first = products._handle()
    assert first is products._handle() and (first.stream, first.handle, first.workspace.ptr) == (5, 1, 1 << 30)
    with ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(products._handle).result().handle == 2
    assert destroyed == [2]  # with the thread
    streams[0] = streams[1]
    assert products._handle().stream == 6 and len(created) == 3
    del first
    assert destroyed == [2, 1]  # with the stream, of which nothing is left
    streams[0] = FakeStream(7, capturing=True)
    with pytest.raises(RuntimeError, match="compute a product on this stream before the capture"):
        products._handle()


def test_a_library_that_is_not_there_is_named():
    with pytest.raises(pg.BackendUnavailableError, match=r"need libcublas.so.99, of the version 990102 that CuPy uses"):
        products._library(990102)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (((2, 3), "f2"), ((4, 3), "f2"), ValueError, r"b must have shape \[3, n\]; got \[4, 3\]"),
        (((2, 3), "f2"), ((3, 4), "f4"), TypeError, "b must have dtype float16; got float32"),
        (((2, 3), "f8"), ((3, 4), "f8"), TypeError, "a must have dtype float16 or bfloat16 or float32; got float64"),
        (((6,), "f4"), ((6, 4), "f4"), ValueError, r"a must have shape \[m, k\]; got \[6\]"),
        (((2, 0), "f4"), ((0, 4), "f4"), ValueError, r"a must have at least one column; got shape \[2, 0\]"),
    ],
)
def test_a_mistake_names_the_argument(a, b, error, message, backend, xp):
    with pytest.raises(error, match=message):
        product(xp.zeros(*a), xp.zeros(*b))


def test_an_array_in_pieces_is_named(backend, xp):
    a, b = xp.zeros((4, 6), np.float32), xp.zeros((6, 8), np.float32)
    with pytest.raises(ValueError, match="a must be C-contiguous"):
        product(a[:, ::2], b[:3])
    with pytest.raises(ValueError, match="b must be C-contiguous, or the transpose of an array that is"):
        product(a, b[:, ::2])
    with pytest.raises(TypeError, match="dtype must be float32 or that of a, float32; got float16"):
        product(a, b, np.float16)
    with pytest.raises(ValueError, match=r"c must have shape \[4, 8\]; got \[4, 7\]"):
        add_product(xp.zeros((4, 7), np.float32), a, b)
    with pytest.raises(TypeError, match="c must have dtype float32; got float16"):
        add_product(xp.zeros((4, 8), np.float16), a, b)
    with pytest.raises(TypeError, match="b must be a (NumPy|CuPy) array"):
        product(a, [[1.0]])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_product_is_replayed_on_other_numbers(dtype):
    import cupy

    a, b = matrices((64, 576, 192), dtype)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        given, total = [cupy.asarray(array) for array in (a, b)], cupy.zeros((64, 192), np.float32)
        found = product(*given)  # makes the handle
        stream.begin_capture()
        found = product(*given)
        add_product(total, *given)
        graph = stream.end_capture()
        total[...] = 0
        for seed in (1, 2):
            others = matrices((64, 576, 192), dtype, seed=seed)
            for array, other in zip(given, others, strict=True):
                array[...] = cupy.asarray(other)
            start = to_numpy(total).astype(np.float64)
            graph.launch(stream)
            assert_product(found, *others)
            assert_product(total, *others, start)
