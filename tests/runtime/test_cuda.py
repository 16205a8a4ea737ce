"""The CUDA backend on a GPU: streams, graphs, devices, edited files, arrays of other libraries."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import kernels_from, load_kernel
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference
from tests.kit.programs import kernel_from_text

pytestmark = pytest.mark.gpu

FILL = """
extern "C" __global__ void fill(int* out, const int value) { out[threadIdx.x] = value + ADD; }   // [32]
"""


def test_a_call_can_be_captured_in_a_graph_and_replayed(monkeypatch):
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(DecodeShape((100, 33)), "cuda")
    out = cupy.empty_like(case.query)
    pg.paged_attention(*case.arguments, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        pg.paged_attention(*case.arguments, out=out)
        graph = stream.end_capture()
        out.fill(float("nan"))
        case.query *= 0.5
        graph.launch(stream)
    stream.synchronize()
    assert_decode_matches_reference(case, out)


def test_work_goes_to_the_current_stream(monkeypatch):
    """A launch queued behind slow work on its stream is not waited for."""
    import cupy

    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(DecodeShape((100,)), "cuda")
    out = pg.paged_attention(*case.arguments)
    cupy.cuda.Device().synchronize()
    stream, busy = cupy.cuda.Stream(non_blocking=True), cupy.ones((4096, 4096), dtype=cupy.float32)
    with stream:
        for _ in range(40):
            busy = busy @ busy * 1e-4
        done = stream.record()
        pg.paged_attention(*case.arguments, out=out)
        assert not done.done
    stream.synchronize()


def test_an_edited_header_is_noticed(tmp_path):
    import cupy

    text = '#include "added.cuh"\n' + FILL
    include = tmp_path / "kernels" / "include"
    include.mkdir(parents=True)
    for add in (1, 7):
        (include / "added.cuh").write_text(f"constexpr int ADD = {add};\n")
        out = cupy.zeros(32, dtype=cupy.int32)
        kernel_from_text(tmp_path, text, "fill", "cuda")((1,), (32,), out=out, value=10)
        assert (out == 10 + add).all()


def test_shared_memory_beyond_the_device_names_the_limit(tmp_path):
    import cupy

    kernel = kernel_from_text(tmp_path, FILL, "fill", "cuda", {"ADD": 0})
    limit = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    with pytest.raises(pg.UnsupportedError, match=f"shared_bytes must be at most {limit} on this device"):
        kernel((1,), (32,), shared_bytes=limit + 1, out=cupy.zeros(32, dtype=cupy.int32), value=1)


def test_shared_memory_that_two_threads_raise_ends_at_the_larger(tmp_path):
    """Also of two kernel objects with one function on the GPU; each launch finds at least what it asked for."""
    import threading

    import cupy

    from cupaged.runtime.cuda import CudaKernel

    for turn in range(50):
        source = kernel_from_text(tmp_path, FILL, "fill", "cuda", {"ADD": turn}).source
        one, start = CudaKernel(source).build(), threading.Barrier(3)
        failed = []

        def work(kernel, size, start=start, failed=failed):
            out = cupy.zeros(32, dtype=cupy.int32)
            start.wait()
            try:
                kernel((1,), (32,), shared_bytes=size, out=out, value=1)
                cupy.cuda.get_current_stream().synchronize()
            except Exception as error:
                failed.append(error)

        asked = [(one, 64 * 1024), (one, 90 * 1024), (CudaKernel(source), 72 * 1024)]
        threads = [threading.Thread(target=work, args=each) for each in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert one.raw_kernel().max_dynamic_shared_size_bytes == 90 * 1024


def test_arguments_are_refused_by_name(tmp_path):
    import cupy

    kernel = kernel_from_text(tmp_path, FILL, "fill", "cuda", {"ADD": 0})
    good = cupy.zeros(32, dtype=cupy.int32)
    with pytest.raises(TypeError, match="argument out must be a CuPy array on the cuda backend; got numpy.ndarray"):
        kernel((1,), (32,), out=np.zeros(32, dtype=np.int32), value=1)
    with pytest.raises(ValueError, match="argument out must be C-contiguous"):
        kernel((1,), (32,), out=cupy.zeros(64, dtype=cupy.int32)[::2], value=1)
    with pytest.raises(TypeError, match="argument out must have dtype int32; got float32"):
        kernel((1,), (32,), out=good.astype(cupy.float32), value=1)
    with pytest.raises(TypeError, match="argument value must be an integer"):
        kernel((1,), (32,), out=good, value=1.5)


def test_an_array_on_another_device_is_refused(tmp_path):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    kernel = kernel_from_text(tmp_path, FILL, "fill", "cuda", {"ADD": 0})
    with cupy.cuda.Device(1):
        elsewhere = cupy.zeros(32, dtype=cupy.int32)
    with pytest.raises(ValueError, match="argument out lies on device 1; the current device is 0"):
        kernel((1,), (32,), out=elsewhere, value=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_tensors_go_in_and_come_out_without_a_copy(dtype):
    torch = pytest.importorskip("torch", reason="torch is not a dependency; it is tested where it is installed")
    case = decode_case(DecodeShape((100, 33), dtype=dtype), "cuda")
    bits, torch_bits = ("int32", torch.int32) if dtype == "float32" else ("int16", torch.int16)
    query = torch.from_dlpack(case.query.view(bits)).view(getattr(torch, dtype))
    tables, lens = torch.from_dlpack(case.block_tables), torch.from_dlpack(case.seq_lens)
    out, lse = pg.paged_attention(query, case.cache, tables, lens, return_lse=True)
    assert isinstance(out, torch.Tensor) and out.dtype == query.dtype and out.is_cuda
    assert isinstance(lse, torch.Tensor) and lse.dtype == torch.float32
    expected = pg.paged_attention(*case.arguments)
    np.testing.assert_array_equal(out.view(torch_bits).cpu().numpy(), expected.view(bits).get())
    given = torch.empty_like(query)
    assert pg.paged_attention(query, case.cache, tables, lens, out=given) is given
    assert torch.equal(given, out)


def test_a_kernel_from_a_changed_copy(tmp_path):
    """Copy kernels_cu, change a line, run it: both versions live side by side."""
    import shutil

    from cupaged.runtime import kernels_folder

    copy = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    file = copy / "attention" / "paged_attention_v1.cu"
    text = file.read_text(encoding="utf-8")
    changed = text.replace("total * softmax.normaliser()", "2.0f * total * softmax.normaliser()")
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    case = decode_case(DecodeShape((64,)), "cuda")
    out = pg.paged_attention(*case.arguments, kernel="paged_attention_v1")
    with kernels_from(copy):
        doubled = pg.paged_attention(*case.arguments, kernel="paged_attention_v1")
    np.testing.assert_array_equal(doubled.get(), 2 * out.get())
    assert load_kernel("cache/append_kv.cu", "append_kv", backend="cuda").source.folder == kernels_folder()
