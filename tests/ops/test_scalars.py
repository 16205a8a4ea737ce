"""A number or a flag that is none is an error that names the argument and what came, whatever it is."""

import ml_dtypes
import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.elementwise import rms_norm
from cupaged.ops.cache import frequencies
from cupaged.runtime import host
from tests.kit.cases import DecodeShape, decode_case

HUGE = 10**5000  # more digits than Python writes
NO_NUMBERS = {
    "str": "1e4", "empty str": "", "bytes": b"1", "complex": 1j, "True": True, "False": False, "NumPy True": np.True_,
    "list": [1], "tuple": (1,), "dict": {}, "object": object(), "array": np.array([1, 2]),
    "array of one": np.array([1]), "array of no axes": np.array(1),
    "float array of no axes": np.array(1.0), "bfloat16": ml_dtypes.bfloat16(1), "time": np.timedelta64(1),
    "seconds": np.timedelta64(1, "s"),
}  # fmt: skip
NOT_FINITE = {"NaN": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "NumPy NaN": np.float16("nan")}
TOO_LARGE = {"huge": HUGE, "-huge": -HUGE, "beyond float": 10**400}
NO_REALS = {
    **NO_NUMBERS,
    **NOT_FINITE,
    **TOO_LARGE,
    "beyond float32": 1e39,
    "beyond float32, as double": np.float64(4e38),
}
NO_INTEGERS = {**NO_NUMBERS, **NOT_FINITE, "float": 2.0, "NumPy float": np.float64(2), "-huge": -HUGE}
NO_FLAGS = {**NO_NUMBERS, **NOT_FINITE, **TOO_LARGE, "one": 1, "zero": 0, "NumPy one": np.int64(1)}
NO_FLAGS = {name: value for name, value in NO_FLAGS.items() if not isinstance(value, bool | np.bool_)}
NO_NAMES = {name: value for name, value in {**NO_NUMBERS, **TOO_LARGE}.items() if not isinstance(value, str)}


@pytest.fixture(scope="module")
def case():
    return decode_case(DecodeShape((20, 33), dtype="float16"), "host")


def rows(case, count=2):
    config = case.cache.config
    return np.zeros((count, config.num_kv_heads, config.head_dim), config.numpy_dtype)


def starts():
    return np.arange(3, dtype=np.int32)


def rope(case, **given):
    ids = np.arange(2, dtype=np.int32)
    pg.rope_append_kv(case.cache, rows(case), rows(case), ids, ids, **given)


def append(case, **given):
    pg.append_kv(case.cache, rows(case), rows(case), np.arange(2, dtype=np.int32), **given)


CALLS = {
    "paged_attention": lambda case, **given: pg.paged_attention(*case.arguments, **given),
    "explain": lambda case, **given: pg.explain(*case.arguments, **given),
    "paged_prefill": lambda case, **given: pg.paged_prefill(*case.arguments, starts(), **given),
    "plan_decode": lambda case, **given: pg.plan_decode(case.cache, case.seq_lens, **{"num_heads": 4, **given}),
    "plan_prefill": lambda case, **given: pg.plan_prefill(
        case.cache, case.seq_lens, starts(), **{"total_tokens": 2, "num_heads": 4, **given}
    ),
    "append_kv": append,
    "rope_append_kv": rope,
    "frequencies": lambda case, **given: frequencies(64, **given),
    "Llama3Scaling": lambda case, **given: pg.Llama3Scaling(**given),
    "copy_blocks": lambda case, **given: pg.copy_blocks(case.cache, [(0, 1)], **given),
    "gather_blocks": lambda case, **given: pg.gather_blocks(case.cache, [0, 1], **given),
    "bind_textures": lambda case, **given: pg.bind_textures(case.cache, **given),
    "HostBlocks": lambda case, **given: pg.HostBlocks(case.cache.config, **{"num_blocks": 1, **given}),
    "SwapEngine": lambda case, **given: pg.SwapEngine([case.cache], **{"num_host_blocks": 1, **given}),
    "CacheConfig": lambda case, **given: pg.CacheConfig(
        **{"num_blocks": 1, "block_size": 1, "num_kv_heads": 1, "head_dim": 64, **given}
    ),
    "PagedAttention": lambda case, **given: pg.PagedAttention(case.cache.config, cache=case.cache, **given),
    "reference": lambda case, **given: pg.reference.paged_attention(*case.arguments, **given),
    "rms_norm": lambda case, **given: rms_norm(
        np.ones((1, 4), np.float32), np.ones(4, np.float32), dtype="float32", **given
    ),
    "schedule": lambda case, **given: host.schedule(**given).__enter__(),
}
REALS = {
    "paged_attention": ("scale", "softcap"), "explain": ("scale", "softcap"), "paged_prefill": ("scale", "softcap"),
    "rope_append_kv": ("theta",), "frequencies": ("theta",), "rms_norm": ("eps",),
    "Llama3Scaling": ("factor", "low_freq_factor", "high_freq_factor", "original_context"),
    "PagedAttention": ("scale", "softcap"), "reference": ("scale", "softcap"),
}  # fmt: skip
INTEGERS = {
    "paged_attention": ("window", "shared_prefix"), "explain": ("window", "shared_prefix"),
    "paged_prefill": ("window",),
    "plan_decode": ("num_heads", "query_tokens", "window", "shared_prefix"),
    "plan_prefill": ("num_heads", "total_tokens", "window"), "rope_append_kv": ("rotary_dim",),
    "HostBlocks": ("num_blocks",), "SwapEngine": ("num_host_blocks",), "schedule": ("seed",),
    "CacheConfig": ("num_blocks", "block_size", "num_kv_heads", "head_dim"), "PagedAttention": ("window",),
    "reference": ("window", "shared_prefix"),
}  # fmt: skip
FLAGS = {
    "paged_attention": ("return_lse", "validate"), "paged_prefill": ("causal", "return_lse", "validate"),
    "plan_decode": ("overlap",), "plan_prefill": ("causal", "overlap"), "append_kv": ("validate",),
    "rope_append_kv": ("interleaved", "validate"), "copy_blocks": ("validate",), "gather_blocks": ("validate",),
    "bind_textures": ("floats",), "HostBlocks": ("pinned",), "SwapEngine": ("pinned",),
}  # fmt: skip
NAMES = {"paged_attention": ("kernel",), "explain": ("kernel",), "bind_textures": ("binding",),
         "CacheConfig": ("dtype", "layout")}  # fmt: skip


def refused(case, call, argument, values):
    """Every value is refused by name, in one short sentence."""
    for what, value in values.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{argument} must ") as error:
            CALLS[call](case, **{argument: value})
        assert len(str(error.value)) < 600, what


def arguments(table):
    return [(call, argument) for call, names in table.items() for argument in names]


@pytest.mark.parametrize(("call", "argument"), arguments(REALS))
def test_what_is_no_real_number_is_refused(case, call, argument):
    refused(case, call, argument, NO_REALS)


@pytest.mark.parametrize(("call", "argument"), arguments(INTEGERS))
def test_what_is_no_integer_is_refused(case, call, argument):
    too_large = {} if argument == "window" else TOO_LARGE if argument == "seed" else {**TOO_LARGE, "int32": 2**31}
    refused(case, call, argument, {**NO_INTEGERS, **too_large})


@pytest.mark.parametrize(("call", "argument"), arguments(FLAGS))
def test_what_is_neither_true_nor_false_is_refused(case, call, argument):
    refused(case, call, argument, NO_FLAGS)


@pytest.mark.parametrize(("call", "argument"), arguments(NAMES))
def test_what_is_no_name_is_refused(case, call, argument):
    refused(case, call, argument, NO_NAMES)


def test_numbers_of_numpy_mean_what_pythons_do(case):
    one = pg.paged_attention(*case.arguments, scale=0.5, softcap=2.0, window=7, return_lse=False)
    for real, integer in ((np.float16, np.int8), (np.float64, np.uint64), (np.longdouble, np.int16)):
        same = pg.paged_attention(
            *case.arguments,
            scale=real(0.5),
            softcap=real(2),
            window=integer(7),
            return_lse=np.False_,
            validate=np.True_,
        )
        np.testing.assert_array_equal(same, one)


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**64, HUGE], ids=["int32", "beyond", "64 bits", "huge"])
def test_a_window_that_no_sequence_fills_hides_nothing(case, window):
    np.testing.assert_array_equal(
        pg.paged_attention(*case.arguments, window=window), pg.paged_attention(*case.arguments)
    )
    plan = pg.plan_decode(case.cache, case.seq_lens, 4, window=window)
    np.testing.assert_array_equal(
        pg.paged_attention(*case.arguments, window=window, plan=plan), pg.paged_attention(*case.arguments)
    )
    np.testing.assert_allclose(
        pg.reference.paged_attention(*case.arguments, window=window), pg.reference.paged_attention(*case.arguments)
    )
