"""Arrays of other libraries go in without a copy on the host too, and results come back in the caller's kind."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops.arrays import as_backend_array, like_caller
from tests.kit.cases import DecodeShape, decode_case


class Foreign:
    """Anything that speaks DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_what_speaks_dlpack_is_taken_without_a_copy():
    array = np.arange(6, dtype=np.int32)
    taken = as_backend_array(Foreign(array), "seq_lens", "host")
    assert taken.ctypes.data == array.ctypes.data
    np.testing.assert_array_equal(taken, array)


def test_a_foreign_query_gives_the_same_result():
    case = decode_case(DecodeShape((20, 33)), "host")
    expected = pg.paged_attention(*case.arguments)
    out = pg.paged_attention(Foreign(case.query), case.cache, Foreign(case.block_tables), Foreign(case.seq_lens))
    np.testing.assert_array_equal(out, expected)


def test_what_is_no_array_is_refused_by_name():
    with pytest.raises(
        TypeError, match="seq_lens must be a NumPy array, as the cache is on the host; got builtins.list"
    ):
        as_backend_array([1, 2], "seq_lens", "host")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_tensors_on_the_cpu(dtype):
    torch = pytest.importorskip("torch", reason="torch is not a dependency; it is tested where it is installed")
    case = decode_case(DecodeShape((100, 33), dtype=dtype), "host")
    bits = "int32" if dtype == "float32" else "int16"
    query = torch.from_numpy(case.query.view(bits)).view(getattr(torch, dtype))
    assert as_backend_array(query, "query", "host").ctypes.data == case.query.ctypes.data
    tables, lens = torch.from_numpy(case.block_tables), torch.from_numpy(case.seq_lens)
    out, lse = pg.paged_attention(query, case.cache, tables, lens, return_lse=True)
    assert isinstance(out, torch.Tensor) and out.dtype == query.dtype and lse.dtype == torch.float32
    expected = pg.paged_attention(*case.arguments)
    np.testing.assert_array_equal(out.view(getattr(torch, bits)).numpy(), expected.view(bits))
    given = torch.empty_like(query)
    assert pg.paged_attention(query, case.cache, tables, lens, out=given) is given
    assert torch.equal(given, out)


def test_results_stay_as_they_are_where_the_caller_has_no_from_dlpack():
    result = np.zeros(3, dtype=np.float32)
    assert like_caller(result, Foreign(result)) is result


def test_masked_arrays_are_refused_by_name():
    logits = np.ma.array(np.zeros((1, 4), np.float32), mask=[[0, 0, 0, 1]])
    with pytest.raises(TypeError, match="^logits must be an array without a mask, whose entries all count"):
        pg.sample(logits)
    with pytest.raises(TypeError, match="^seed must be an array without a mask"):
        pg.sample(logits.data, seed=np.ma.array([1], np.uint64, mask=[1]))
