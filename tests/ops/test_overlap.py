"""What a call writes and what it reads never share memory: any overlap is refused by name, and nothing is changed."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.products import add_product
from cupaged.ops.blocks import block_elements
from cupaged.ops.overlap import check_apart
from cupaged.runtime.arguments import byte_bounds
from tests.kit.cases import DecodeShape, decode_case, serving_kernels
from tests.ops.test_arrays import Foreign

SHAPE = DecodeShape((20, 33), alibi=True, sinks=True)
PLAIN = DecodeShape((20, 33))
SIXTEEN = 16  # bytes: what queries and results must be aligned to


def to_numpy(array):
    return array.get() if hasattr(array, "get") else np.asarray(array)


def joined(xp, first, second, shared):
    """Return copies of two arrays in one piece of memory, the last `shared` bytes of the first under the second."""
    room = xp.zeros(first.nbytes + second.nbytes + 1024, xp.uint8)
    address = room.ctypes.data if xp is np else room.data.ptr
    start = -address % 512
    copies = []
    for array, at in ((first, start), (second, start + first.nbytes - shared)):
        copy = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        copies.append(copy)
    return copies


def refused(call, written, read, *, watched):
    """Assert that a call is refused, names both arguments, and leaves the watched arrays as they were."""
    before = [to_numpy(array).copy().view(np.uint8) for array in watched]
    with pytest.raises(ValueError, match=f"{written} must not share memory with {read}[:,]") as caught:
        call()
    for array, was in zip(watched, before, strict=True):
        np.testing.assert_array_equal(to_numpy(array).view(np.uint8), was)
    assert "0x" in str(caught.value)


# --- attention ----------------------------------------------------------------------------------------------------

INPUTS = ("query", "block_tables", "seq_lens", "alibi_slopes", "sinks")


def arguments_of(case):
    query, cache, tables, lens = case.arguments
    return {"query": query, "cache": cache, "block_tables": tables, "seq_lens": lens, **case.variants}


def over(xp, given, name):
    """Return an `out`, and arguments of which one lies over its end."""
    query = given["query"]
    if name == "query":
        out, copy = joined(xp, query, query, SIXTEEN)
    else:
        out, copy = joined(xp, query, given[name], given[name].dtype.itemsize)
    return out, {**given, name: copy}


@pytest.mark.parametrize("name", INPUTS)
def test_decode_refuses_a_result_over_any_of_its_inputs(name, backend, xp):
    case = decode_case(SHAPE, backend)
    for kernel in ("auto", *serving_kernels(case)):
        out, given = over(xp, arguments_of(case), name)
        refused(lambda: pg.paged_attention(**given, kernel=kernel, out=out), "out", name, watched=[out, given[name]])  # noqa: B023


@pytest.mark.parametrize("name", ["block_tables", "seq_lens", "query_to_seq"])
def test_decode_refuses_a_result_over_whose_context_a_query_reads(name, backend, xp):
    case = decode_case(PLAIN, backend)
    given = {**arguments_of(case), "query_to_seq": xp.arange(2, dtype=xp.int32)}
    out, given = over(xp, given, name)
    refused(lambda: pg.paged_attention(**given, out=out), "out", name, watched=[out, given[name]])


@pytest.mark.parametrize("name", INPUTS)
def test_a_known_call_still_looks_where_its_arrays_lie(name, backend, xp, monkeypatch):
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    case = decode_case(SHAPE, backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, SHAPE.num_heads)
    given = {**arguments_of(case), "plan": plan, "validate": False}
    out, moved = over(xp, given, name)
    apart = {key: value.copy() if key == name else value for key, value in moved.items()}
    for _ in range(2):  # the second is known
        pg.paged_attention(**apart, out=out)
        pg.paged_attention(**apart, out=out.copy())
    refused(lambda: pg.paged_attention(**moved, out=out), "out", name, watched=[out, moved[name]])


@pytest.mark.parametrize("name", INPUTS)
def test_preparing_a_call_refuses_it_too(name, backend, xp):
    case = decode_case(SHAPE, backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, SHAPE.num_heads)
    out, given = over(xp, arguments_of(case), name)
    refused(lambda: plan.prepare(**given, out=out), "out", name, watched=[out, given[name]])


@pytest.mark.parametrize("name", [*INPUTS, "query_start"])
@pytest.mark.parametrize("planned", ["not", "prefill", "decode"])
def test_prefill_refuses_a_result_over_any_of_its_inputs(name, planned, backend, xp):
    case = decode_case(SHAPE, backend)
    given = {**arguments_of(case), "query_start": xp.arange(3, dtype=xp.int32)}
    if planned == "prefill":
        given["plan"] = pg.plan_prefill(case.cache, case.seq_lens, given["query_start"], 2, SHAPE.num_heads)
    elif planned == "decode":
        given["plan"] = pg.plan_decode(case.cache, case.seq_lens, SHAPE.num_heads)
    out, given = over(xp, given, name)
    refused(lambda: pg.paged_prefill(**given, out=out), "out", name, watched=[out, given[name]])


def test_an_array_of_another_library_is_seen_where_it_lies(backend, xp):
    case = decode_case(PLAIN, backend)
    out, given = over(xp, arguments_of(case), "seq_lens")
    for wrapped in ({"seq_lens": Foreign(given["seq_lens"])}, {"out": Foreign(out)}):
        call = {**given, "out": out, **wrapped}
        refused(lambda: pg.paged_attention(**call), "out", "seq_lens", watched=[out])  # noqa: B023


def test_neighbours_in_one_piece_of_memory_are_served(backend, xp):
    case = decode_case(PLAIN, backend)
    expected = pg.paged_attention(*case.arguments)
    for name in ("query", "block_tables", "seq_lens"):
        copies = joined(xp, expected, arguments_of(case)[name], 0)
        out, given = copies[0], {**arguments_of(case), name: copies[1]}
        out[...] = np.nan
        pg.paged_attention(**given, out=out)
        np.testing.assert_array_equal(to_numpy(out), to_numpy(expected))


# --- the cache as a result ----------------------------------------------------------------------------------------


def within(cache, shape, dtype, of="key"):
    """Return an array of this shape and type that lies in the cache's memory."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return getattr(cache, of).reshape(-1).view(np.uint8)[:count].view(dtype).reshape(shape)


def new_tokens(cache, xp):
    config, tokens = cache.config, 3
    rows = (tokens, config.num_kv_heads, config.head_dim)
    return {
        "key": xp.ones(rows, config.numpy_dtype),
        "value": xp.ones(rows, config.numpy_dtype),
        "slot_mapping": xp.arange(tokens, dtype=np.int64),
        "positions": xp.arange(tokens, dtype=np.int32),
        "query": xp.ones((tokens, 4, config.head_dim), config.numpy_dtype),
    }


@pytest.mark.parametrize("layout", ["BSHD", "HBSD"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", ["key", "value", "slot_mapping", "positions", "query"])
def test_appending_refuses_what_lies_in_the_cache(name, known, layout, backend, xp, monkeypatch):
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "float16", layout), backend)
    given = new_tokens(cache, xp)
    append_names = ("key", "value", "slot_mapping")

    def rope(**changes):
        pg.rope_append_kv(cache, **{**given, **changes}, validate=False)

    def append(**changes):
        pg.append_kv(cache, *(changes.get(n, given[n]) for n in append_names), validate=False)

    for call in (rope, append) if name in append_names else (rope,):
        if known:
            call()
        inside = within(cache, given[name].shape, given[name].dtype, "value")
        refused(lambda: call(**{name: inside}), "cache", name, watched=cache.storage)  # noqa: B023


def test_rows_with_gaps_are_refused_where_they_reach_into_the_cache(backend, xp):
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "float16"), backend)
    given = new_tokens(cache, xp)
    gaps = cache.key.reshape(-1, 2, 64)[::3][:3]
    refused(
        lambda: pg.rope_append_kv(cache, **{**given, "key": gaps}, validate=False), "cache", "key",
        watched=cache.storage,
    )  # fmt: skip


def test_blocks_are_not_moved_over_what_says_where(backend, xp):
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "float16"), backend)
    ids, blocks = xp.arange(2, dtype=np.int32), xp.ones((2, block_elements(cache)), np.float16)
    pairs, inside = within(cache, (1, 2), np.int32), within(cache, (2,), np.int32)
    pairs[...] = xp.arange(2, dtype=np.int32)
    inside[...] = ids
    blocks_inside = within(cache, blocks.shape, np.float16)
    watched = cache.storage
    refused(lambda: pg.copy_blocks(cache, pairs), "cache", "pairs", watched=watched)
    refused(lambda: pg.scatter_blocks(cache, inside, blocks), "cache", "block_ids", watched=watched)
    refused(lambda: pg.scatter_blocks(cache, ids, blocks_inside), "cache", "blocks", watched=watched)
    refused(lambda: pg.gather_blocks(cache, ids, out=blocks_inside), "out", "cache", watched=watched)
    out, over_ids = joined(xp, blocks, ids, 4)
    over_ids[...] = 0
    refused(lambda: pg.gather_blocks(cache, over_ids, out=out), "out", "block_ids", watched=[out])


def test_a_cache_is_not_filled_from_itself(backend):
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "float16", "BSHD"), backend)
    cache.key[...] = 1
    refused(lambda: cache.fill_from_dense(cache.value, cache.key), "cache", "key", watched=cache.storage)


def test_a_cache_comes_once_in_a_swap_engine(backend):
    cache, other = (pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "float16"), backend) for _ in range(2))
    with pytest.raises(ValueError, match=r"caches\[2\] must not share memory with caches\[0\], as both are written"):
        pg.SwapEngine([cache, other, cache], 4)


def test_a_layer_refuses_rows_in_its_cache_before_it_finds_room(backend, xp):
    layer = pg.PagedAttention(pg.CacheConfig(8, 16, 2, 64, "float16"), backend=backend)
    given = new_tokens(layer.cache, xp)
    for name in ("query", "key", "value"):
        rows = {n: given[n] for n in ("query", "key", "value")}
        rows[name] = within(layer.cache, given[name].shape, np.float16)
        refused(lambda: layer.forward(**rows, sequence_ids=[7], is_prompt=True), "cache", name,  # noqa: B023
                watched=layer.cache.storage)  # fmt: skip
        assert 7 not in layer.manager


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits", "temperature", "top_k", "top_p", "seed"])
def test_sampling_refuses_a_result_over_any_of_its_inputs(name, backend, xp):
    given = {
        "logits": xp.ones((4, 16), np.float32),
        "temperature": xp.ones(4, np.float32),
        "top_k": xp.full(4, 3, np.int32),
        "top_p": xp.ones(4, np.float32),
        "seed": xp.arange(4, dtype=np.uint64),
    }
    if name != "logits":
        same = given[name].view(np.int32)[:4]
        refused(lambda: pg.sample(**given, out=same), "out", name, watched=[given[name]])
    shared = given[name].dtype.itemsize
    out, given[name] = joined(xp, xp.zeros(4, np.int32), given[name], shared)
    refused(lambda: pg.sample(**given, out=out), "out", name, watched=[out, given[name]])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_product_is_not_added_to_its_factors(name, backend, xp):
    given = {"a": xp.ones((8, 8), np.float32), "b": xp.ones((8, 8), np.float32)}
    refused(lambda: add_product(given[name], **given), "c", name, watched=[given[name]])
    c, given[name] = joined(xp, xp.zeros((8, 8), np.float32), given[name], 4)
    refused(lambda: add_product(c, **given), "c", name, watched=[c, given[name]])


@pytest.mark.parametrize(
    "cut",
    [
        lambda a: a,
        lambda a: a[::-1],
        lambda a: a[:, ::-2],
        lambda a: a[1::2, 3:4],
        lambda a: a.T[2:5],
        lambda a: a[1:1],
        lambda a: np.broadcast_to(a[0], (4, 6)),
    ],
)
def test_an_arrays_addresses_are_those_of_its_first_and_last_byte(cut):
    array = cut(np.zeros((5, 6), np.float32))
    low, high = byte_bounds(array)
    if array.size:
        assert (low, high) == np.lib.array_utils.byte_bounds(array)
    else:
        assert low == high


def test_empty_arrays_and_missing_ones_lie_nowhere():
    room = np.zeros(16, np.int32)
    check_apart({"out": room}, {"empty": room[4:4], "none": None})
    check_apart({"out": room[4:4]}, {"query": room})
    with pytest.raises(ValueError, match="lse must not share memory with out, as both are written"):
        check_apart({"out": room[:8], "lse": room[7:]}, {})


# --- a plan's own arrays ------------------------------------------------------------------------------------------


def inside(xp, array, like):
    """Return an array like another one, in the memory of the first; None where there is too little of it."""
    words = array.reshape(-1).view(xp.uint8)
    return words[: like.nbytes].view(like.dtype).reshape(like.shape) if len(words) >= like.nbytes else None


@pytest.mark.parametrize("kind", ["decode", "remembered", "prefill"])
def test_results_and_queries_lie_apart_from_the_arrays_of_a_plan(kind, backend, xp):
    case = decode_case(DecodeShape((150, 33), num_heads=2, num_kv_heads=1), backend)
    query, cache, tables, lens = case.arguments
    if kind == "prefill":
        start = xp.arange(3, dtype=xp.int32)
        plan = pg.plan_prefill(cache, lens, start, 2, 2)
    else:
        plan = pg.plan_decode(cache, lens, 2)

    def call(query, **options):
        if kind == "prefill":
            return pg.paged_prefill(query, cache, tables, lens, start, plan=plan, **options)
        return pg.paged_attention(query, cache, tables, lens, plan=plan, **options)

    if kind == "remembered":
        call(query, validate=False, out=xp.empty_like(query))  # a call like it needs no checks
    options = {"validate": False} if kind == "remembered" else {}
    tried = 0
    for array in list(vars(plan).values()):
        if isinstance(array, xp.ndarray) and (place := inside(xp, array, query)) is not None:
            tried += 1
            refused(lambda place=place: call(query, out=place, **options), "out", "plan", watched=[array])
            if kind != "remembered":
                refused(lambda place=place: call(place), "plan", "query", watched=[array])
    assert tried >= 2
    assert to_numpy(call(query)).shape == tuple(query.shape)
