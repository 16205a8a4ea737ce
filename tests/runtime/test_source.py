"""A kernel's signature and digest are read from its source."""

import ml_dtypes
import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime.arguments import argument_converters, typed_values
from cupaged.runtime.source import KernelSource, Parameter, kernels_defining, kernels_folder, kernels_from
from tests.kit.programs import kernel_from_text


def source(tmp_path, text, entry="kernel", **defines):
    (tmp_path / "include").mkdir(exist_ok=True)
    (tmp_path / "kernel.cu").write_text(text, encoding="utf-8")
    with kernels_from(tmp_path):
        return KernelSource.read("kernel.cu", entry, defines)


def test_a_signature_with_everything(tmp_path):
    parameters = source(tmp_path, """
// extern "C" __global__ void kernel(int commented_out)
extern "C" __global__ void __launch_bounds__(THREADS, 4) kernel(
    STORAGE* __restrict__ out,          // [a, b], with a comment (and brackets)
    const float *bias, /* another, comment */
    const long long stride, unsigned int n, bool flag, double x) {}
""", STORAGE="__nv_bfloat16").parameters  # fmt: skip
    assert parameters == (
        Parameter("out", "__nv_bfloat16", np.dtype(ml_dtypes.bfloat16), True, False),
        Parameter("bias", "float", np.dtype(np.float32), True, True),
        Parameter("stride", "long long", np.dtype(np.int64), False, True),
        Parameter("n", "unsigned int", np.dtype(np.uint32), False, False),
        Parameter("flag", "bool", np.dtype(np.bool_), False, False),
        Parameter("x", "double", np.dtype(np.float64), False, False),
    )


def test_no_parameters(tmp_path):
    assert source(tmp_path, 'extern "C" __global__ void kernel() {}').parameters == ()


def test_what_cannot_be_an_argument_is_refused(tmp_path):
    for c_type in ("long", "float4", "size_t"):
        with pytest.raises(pg.KernelBuildError, match=f"parameter n of kernel has type '{c_type}'"):
            _ = source(tmp_path, f'extern "C" __global__ void kernel({c_type} n) {{}}').parameters
    with pytest.raises(pg.KernelBuildError, match="kernel.cu has no entry point"):
        _ = source(tmp_path, "__global__ void kernel(int n) {}").parameters


def test_every_shipped_kernel_has_a_signature_that_arguments_fit():
    defines = {"STORAGE": "float", "SLOT": "int"}
    for info in pg.kernels().values():
        parameters = KernelSource.read(info.file, info.name, defines).parameters
        assert parameters[0].is_pointer
        assert parameters[0].is_const == (info.name == "write_texture")  # what it writes lies behind handles


def test_the_digest_depends_on_headers_and_defines(tmp_path):
    (tmp_path / "include").mkdir()
    header = tmp_path / "include" / "outer.cuh"
    header.write_text('#include "inner.cuh"\n')
    (tmp_path / "include" / "inner.cuh").write_text("constexpr int X = 1;\n")
    text = '#include "outer.cuh"\nextern "C" __global__ void kernel(int n) {}'
    first = source(tmp_path, text, A=1)
    assert {path.name for path in first.files} == {"kernel.cu", "outer.cuh", "inner.cuh"}
    assert first.digest == source(tmp_path, text, A=1).digest
    assert first.digest != source(tmp_path, text, A=2).digest
    (tmp_path / "include" / "inner.cuh").write_text("constexpr int X = 2;\n")
    assert first.digest != source(tmp_path, text, A=1).digest


def test_a_kernels_folder_needs_an_include_folder(tmp_path):
    with pytest.raises(ValueError, match="folder: expected a copy of kernels_cu"), kernels_from(tmp_path):
        pass


def test_the_kernels_folder_can_be_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPAGED_KERNELS", str(tmp_path))
    assert kernels_folder() == tmp_path


def typed(name, c_type, dtype, value):
    """Return what a kernel with one parameter gets for a value."""
    converters = argument_converters("kernel", (Parameter(name, c_type, np.dtype(dtype), False, True),), None)
    return typed_values("kernel", converters, {name: value})[0]


@pytest.mark.parametrize(
    ("c_type", "dtype", "value", "expected"),
    [
        ("float", np.float32, 0.1, np.float32(0.1)),
        ("float", np.float32, 3, np.float32(3)),
        ("float", np.float32, np.float64(0.1), np.float32(0.1)),
        ("float", np.float32, float("inf"), np.float32("inf")),
        ("double", np.float64, 0.1, np.float64(0.1)),
        ("int", np.int32, np.int64(7), np.int32(7)),
        ("long long", np.int64, 2**40, np.int64(2**40)),
        ("unsigned int", np.uint32, 2**32 - 1, np.uint32(2**32 - 1)),
        ("bool", np.bool_, True, np.bool_(True)),
        ("bool", np.bool_, 1, np.bool_(True)),
        ("int", np.int32, True, np.int32(1)),
        ("half", np.float16, 65504.0, np.float16(65504)),
        ("unsigned long long", np.uint64, 2**64 - 1, np.uint64(2**64 - 1)),
        ("int", np.int32, np.array(5), np.int32(5)),
    ],
)
def test_a_scalar_arrives_in_the_width_of_its_parameter(c_type, dtype, value, expected):
    scalar = typed("n", c_type, dtype, value)
    assert scalar == expected
    assert scalar.dtype == expected.dtype


@pytest.mark.parametrize(
    ("c_type", "dtype", "value", "error"),
    [
        ("float", np.float32, 1e39, ValueError),
        ("float", np.float32, 10**400, ValueError),
        ("float", np.float32, -1e39, ValueError),
        ("half", np.float16, 65505.0, ValueError),
        ("int", np.int32, 2**31, ValueError),
        ("int", np.int32, 1.0, TypeError),
        ("half", np.float16, 1e6, ValueError),
        ("float", np.float32, 1j, TypeError),
        ("float", np.float32, "1", TypeError),
        ("int", np.int32, -(2**31) - 1, ValueError),
        ("unsigned int", np.uint32, -1, ValueError),
        ("int", np.int32, np.float32(1), TypeError),
        ("bool", np.bool_, 2, ValueError),
    ],
)
def test_a_scalar_that_does_not_fit_is_refused(c_type, dtype, value, error):
    with pytest.raises(error, match="kernel: argument n must"):
        typed("n", c_type, dtype, value)


def test_an_experiment_adds_a_define_for_a_while(tmp_path):
    text = 'extern "C" __global__ void value(int* out) { out[0] = VALUE; }'
    out = np.zeros(1, np.int32)

    def run():
        kernel_from_text(tmp_path, text, "value", "host", {"VALUE": 1})((1,), (1,), out=out)
        return int(out[0])

    assert run() == 1
    with kernels_defining(VALUE=2):
        assert run() == 2
        with kernels_defining(VALUE=3, OTHER=4):
            assert run() == 3
        assert run() == 2
    assert run() == 1


@pytest.mark.parametrize("kernel", ["paged_attention_v1"])
def test_a_kernel_can_do_without_the_table(kernel):
    """Without look-ups it takes what a table of sequences in a row would say, and reads none of it."""
    cache = pg.KVCache(pg.CacheConfig(6, 16, 2, 64), "host")
    rng = np.random.default_rng(0)
    for array in cache.storage:
        array[...] = rng.standard_normal(array.shape).astype(np.float16)
    query = rng.standard_normal((2, 2, 64)).astype(np.float16)
    lens = np.array([40, 33], np.int32)
    expected = pg.paged_attention(query, cache, np.arange(6, dtype=np.int32).reshape(2, 3), lens, kernel=kernel)
    unmapped = np.full((2, 3), -1, np.int32)
    with kernels_defining(TABLE_LOOKUP=0):
        computed = pg.paged_attention(query, cache, unmapped, lens, kernel=kernel)
    np.testing.assert_array_equal(computed, expected)
    assert not pg.paged_attention(query, cache, unmapped, lens, kernel=kernel).any()
