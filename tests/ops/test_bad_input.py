"""A caller's mistake is an error that names the argument, what was expected and what came; nothing is launched."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.choose import ATTENTION_KERNELS
from tests.kit.cases import DecodeShape, decode_case


@pytest.fixture
def case(backend):
    return decode_case(DecodeShape((20, 33)), backend)


def call(case, **changed):
    arguments = {"query": case.query, "cache": case.cache, "block_tables": case.block_tables,
                 "seq_lens": case.seq_lens, **changed}  # fmt: skip
    return pg.paged_attention(**arguments)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("query", lambda q, xp: q.astype(xp.float32), TypeError, "query must have dtype float16; got float32"),
        ("query", lambda q, xp: q[:, :, :32].copy(), ValueError, r"query must have shape \[num_seqs, H, 64\]; got \[2"),
        ("query", lambda q, xp: q[0], ValueError, r"query must have shape"),
        ("query", lambda q, xp: q[:, :3].copy(), ValueError, "multiple of the cache's 2 KV heads; got 3"),
        ("query", lambda q, xp: q[:, :0].copy(), ValueError, "multiple of the cache's 2 KV heads; got 0"),
        ("query", lambda q, xp: q[:, ::2], ValueError, "query must be C-contiguous"),
        ("query", lambda q, xp: xp.empty(q.size + 8, q.dtype)[1 : q.size + 1].reshape(q.shape), ValueError,
         "query must start on a 16-byte boundary"),
        ("query", lambda q, xp: [[1.0]], TypeError, "query must be a (NumPy|CuPy) array"),
        ("cache", lambda c, xp: c.key, TypeError, "cache must be a KVCache; got"),
        ("block_tables", lambda t, xp: t.astype(xp.int64), TypeError, "block_tables must have dtype int32; got int64"),
        ("block_tables", lambda t, xp: t[:1], ValueError, r"block_tables must have shape \[2, max_blocks\]; got \[1"),
        ("block_tables", lambda t, xp: t.T.copy().T, ValueError, "block_tables must be C-contiguous"),
        ("seq_lens", lambda n, xp: n.astype(xp.float32), TypeError, "seq_lens must have dtype int32; got float32"),
        ("seq_lens", lambda n, xp: n[:1], ValueError, r"seq_lens must have shape \[2\]; got \[1\]"),
        ("seq_lens", lambda n, xp: -n, ValueError, r"seq_lens must be at least 0; seq_lens\[0\] is -20"),
        ("seq_lens", lambda n, xp: n + 1000, ValueError, r"seq_lens must be at most 80, .*seq_lens\[0\] is 1020"),
        ("seq_lens", lambda n, xp: n + 13, ValueError, r"block_tables\[0, 2\] is"),
        ("block_tables", lambda t, xp: t + 100, ValueError, r"block ids below 8, .*block_tables\[0, 0\] is 10"),
        ("scale", lambda _, xp: "1", TypeError, "scale must be a real number; got str '1'"),
        ("scale", lambda _, xp: float("nan"), ValueError, "scale must be finite; got nan"),
        ("scale", lambda _, xp: 1e39, ValueError, r"scale must be at most 2\.36e\+38 either way, .* got 1e\+39"),
        ("scale", lambda _, xp: -3e38, ValueError, "scale must be at most"),
        ("kernel", lambda _, xp: "v9", ValueError, "kernel must be 'auto' or one of paged_attention_naive"),
        ("out", lambda _, xp: xp.empty((2, 4, 64), xp.float32), TypeError, "out must have dtype float16"),
        ("out", lambda _, xp: xp.empty((2, 4, 32), xp.float16), ValueError, r"out must have shape \[2, 4, 64\]"),
        ("out", lambda _, xp: xp.empty((2, 4, 128), xp.float16)[:, :, ::2], ValueError, "out must be C-contiguous"),
        ("out", lambda _, xp: xp.empty(520, xp.float16)[1:513].reshape(2, 4, 64), ValueError,
         "out must start on a 16-byte boundary"),
    ],
)  # fmt: skip
def test_decode_names_the_argument(case, xp, argument, change, error, message):
    given = {"scale": None, "kernel": "auto", "out": None}.get(argument, getattr(case, argument, None))
    with pytest.raises(error, match=message):
        call(case, **{argument: change(given, xp)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q: q.astype("int64"), TypeError, "query_to_seq must have dtype int32; got int64"),
        (lambda q: q[:1].copy(), ValueError, r"query_to_seq must have shape \[2\]; got \[1\]"),
        (lambda q: q.repeat(2)[::2], ValueError, "query_to_seq must be C-contiguous"),
        (lambda q: q + 1, ValueError, r"query_to_seq must hold sequences from 0 to below 2; query_to_seq\[1\] is 2"),
        (lambda q: q - 1, ValueError, r"from 0 to below 2; query_to_seq\[0\] is -1"),
    ],
)
def test_query_to_seq_is_checked(case, xp, change, error, message):
    with pytest.raises(error, match=message):
        call(case, query_to_seq=change(xp.arange(2, dtype=xp.int32)))


@pytest.mark.parametrize("kernel", [kernel for kernel in ATTENTION_KERNELS if kernel != "paged_attention_batched"])
def test_query_to_seq_is_refused_by_other_kernels(case, xp, kernel):
    with pytest.raises(pg.UnsupportedError, match=f"served by paged_attention_batched; the call names {kernel}"):
        call(case, query_to_seq=xp.arange(2, dtype=xp.int32), kernel=kernel)


def test_out_may_not_lie_in_the_cache():
    case = decode_case(DecodeShape((20,), num_heads=2), "host")
    with pytest.raises(ValueError, match="out must not share memory with cache"):
        call(case, out=case.cache.key[0, :1])


def test_misaligned_lengths_are_refused():
    case = decode_case(DecodeShape((20, 33)), "host")
    room = np.zeros(9, np.uint8)[1:].view(np.int32)
    room[:] = case.seq_lens
    with pytest.raises(ValueError, match="argument seq_lens must start at a multiple of its 4 bytes"):
        call(case, seq_lens=room)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_nan_in_the_cache_is_not_hidden(kernel):
    """A token's key that is NaN makes output and log-sum-exp NaN, as in the reference, not an empty result."""
    case = decode_case(DecodeShape((3,), num_heads=2), "host")
    case.cache.key[int(case.block_tables[0, 0]), 1] = np.nan
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_out_may_not_be_the_query(case):
    with pytest.raises(ValueError, match="out must not share memory with query"):
        call(case, out=case.query)


@pytest.mark.gpu
def test_arrays_of_the_other_backend_are_refused():
    gpu, cpu = decode_case(DecodeShape((20,)), "cuda"), decode_case(DecodeShape((20,)), "host")
    with pytest.raises(TypeError, match="query must be a CuPy array, as the cache is on the GPU; got numpy"):
        call(gpu, query=cpu.query)
    with pytest.raises(TypeError, match="seq_lens must be a NumPy array, as the cache is on the host; got cupy"):
        call(cpu, seq_lens=gpu.seq_lens)


@pytest.mark.gpu
def test_the_gpu_does_not_read_lengths_unless_asked(monkeypatch):
    """A table entry past the cache passes where nothing reads it: validation is a choice."""
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(DecodeShape((20,)), "cuda")
    too_long = case.seq_lens * 0 + 10_000_000
    with pytest.raises(ValueError, match="seq_lens must be at most"):
        call(case, seq_lens=too_long, validate=True)
    call(case, validate=False)


def test_what_is_refused_changes_nothing(case, xp):
    out = xp.full(case.query.shape, 7, dtype=case.query.dtype)
    with pytest.raises(ValueError, match="seq_lens"):
        call(case, seq_lens=case.seq_lens + 1000, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("num_blocks", 0, ValueError, "num_blocks must be at least 1; got 0"),
        ("num_blocks", 2**31, pg.UnsupportedError, "num_blocks must fit int32"),
        ("block_size", 257, pg.UnsupportedError, r"block_size must lie in \[1, 256\]; got 257"),
        ("block_size", 16.0, TypeError, "block_size must be an integer; got float 16.0"),
        ("block_size", True, TypeError, "block_size must be an integer; got bool True"),
        ("num_kv_heads", -1, ValueError, "num_kv_heads must be at least 1; got -1"),
        ("head_dim", 24, pg.UnsupportedError, r"head_dim must lie in \[32, 256\] in steps of 8; got 24"),
        ("head_dim", 264, pg.UnsupportedError, "head_dim must lie in"),
        ("head_dim", 100, pg.UnsupportedError, "head_dim must lie in"),
        ("dtype", "float64", ValueError, "dtype must be one of float16, bfloat16, float32; got 'float64'"),
        ("num_kv_heads", 32768, pg.UnsupportedError, r"num_kv_heads must leave a block below 2\*\*30 elements"),
        ("layout", ["BSHD"], TypeError, r"layout must be a name; got list \['BSHD'\]"),
        ("layout", "SBHD", ValueError, "layout must be one of BSHD, BHSD, HBSD, BS2HD, BHDSX; got 'SBHD'"),
    ],
)
def test_a_config_names_the_field(field, value, error, message):
    good = {"num_blocks": 4, "block_size": 16 if field != "num_kv_heads" else 256, "num_kv_heads": 2, "head_dim": 256}
    with pytest.raises(error, match=message):
        pg.CacheConfig(**{**good, field: value})


def test_numpy_integers_do_not_overflow():
    config = pg.CacheConfig(np.int32(65536), np.uint8(16), np.int32(8), np.int64(128))
    assert config.nbytes == 65536 * 16 * 8 * 128 * 2 * 2
    assert config.num_slots == 65536 * 16


def test_a_cache_keeps_its_arrays():
    cache = pg.KVCache(pg.CacheConfig(2, 16, 1, 64), "host")
    with pytest.raises(AttributeError):
        cache.key = np.zeros((1, 1, 1, 1), np.float16)
    with pytest.raises(TypeError, match="backend must be one of cuda, host, or None; got int 0"):
        pg.KVCache(cache.config, 0)
